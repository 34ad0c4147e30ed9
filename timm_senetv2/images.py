"""Labelled images for a command: a folder with class subfolders, or one of torchvision's data sets, through timm."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo, create_dataset, infer_imagenet_subset
from torch import nn
from torch.utils.data import Dataset

from .catalog import config_of
from .errors import UserError, did_you_mean, one_line, printable, why

IMAGES_A_CLASS = 20  # about so many, before a further class is taken
EXTENSIONS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')
_SPLITS = {  # as timm names them, and test
    'train': ('train', 'training'),
    'validation': ('validation', 'val', 'valid', 'eval', 'evaluation'),
    'test': ('test',),
}


class ImageError(UserError):
    """An image that cannot be read."""

    def __init__(self, message: str) -> None:
        # a loader's worker hands an exception on with its traceback in front of the message
        super().__init__(message.strip().splitlines()[-1].removeprefix(f'{__name__}.ImageError: '))


@cache
def formats() -> list[str]:
    """Pillow's formats but EPS: that is a program, which Pillow has Ghostscript run, whatever the file is called."""
    Image.init()
    return [name for name in Image.ID if name != 'EPS']


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits a pixel in 8, over its whole range: Pillow's `convert` would clip it. Others as they are."""
    if not image.mode.startswith('I'):
        return image
    return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images of some classes, in an order in which the classes take turns. Items are (RGB image, class index).

    Attributes:
        name: What the images are of, to be shown.
        classes: Names of the classes that are taken.
        all_classes: Names of all classes of the data.
        transform: What each image is passed through, or None.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        targets: Sequence[int],
        all_classes: Sequence[str],
        limit: int,
        wanted: Sequence[str] = (),
    ) -> None:
        """
        Args:
            name: See above.
            source: A data set of timm's or torchvision's.
            targets: Class of each of its images.
            all_classes: Names of its classes.
            limit: Images to take at most: the same number of each class, and of so many classes, two at least, that
                each has about IMAGES_A_CLASS; classes and images evenly spread.
            wanted: Names of classes to take in any case.

        Raises:
            UserError: There is no such class, or it has no images.
        """
        self.name, self._source, self.all_classes = name, source, tuple(map(printable, all_classes))
        self.transform: Callable[[Image.Image], Any] | None = None
        kinds, counts = np.unique(np.asarray(targets), return_counts=True)
        most = max(2, math.ceil(limit / min(IMAGES_A_CLASS, int(counts.max()))))
        first = [_place(name, self.all_classes, kinds) for name in wanted]
        others = [place for place in range(len(kinds)) if place not in first]
        spread = [others[i] for i in _evenly(len(others), max(0, most - len(set(first))))]
        taken = kinds[sorted({*first, *spread})]
        own = [np.flatnonzero(np.asarray(targets) == kind) for kind in taken]
        share = _shares([len(indices) for indices in own], limit)
        own = [indices[_evenly(len(indices), n)] for indices, n in zip(own, share, strict=True)]
        self.class_indices = [int(kind) for kind in taken]
        self.classes = tuple(self.all_classes[kind] for kind in self.class_indices)
        turns = max(len(indices) for indices in own)
        self._order = [(int(o[turn]), k) for turn in range(turns) for k, o in enumerate(own) if turn < len(o)]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        place, label = self._order[index]
        image = self.picture(index)
        try:
            return self.transform(image) if self.transform else image, label
        except Exception as e:  # an image of one pixel, say, that cannot be cropped, or a size beyond all memory
            raise ImageError(
                f'{self._named(place)}, of {image.width} x {image.height} pixels, cannot be brought to the size of the '
                f"model's input: {one_line(e)}; take it away, or choose another --img-size"
            ) from None

    def picture(self, index: int) -> Image.Image:
        """The image itself, in RGB, without the transform.

        Raises:
            ImageError: It cannot be read; names it.
        """
        place, _ = self._order[index]
        try:
            reader = getattr(
                self._source, 'reader', None
            )  # timm's own __getitem__ takes another image for a damaged one
            if reader is None:
                image = self._source[place][0]
            else:
                with reader[place][0] as file, warnings.catch_warnings():
                    # Pillow warns of large images and refuses those of twice that size
                    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
                    image = Image.open(file, formats=formats())
                    image.load()
            return eight_bits(image).convert('RGB')
        except Exception as e:  # each of Pillow's decoders has its own for damaged files
            raise ImageError(
                f'{self._named(place)} cannot be read as an image ({one_line(e)}); repair it or take it away'
            ) from None

    def _named(self, place: int) -> str:
        reader = getattr(self._source, 'reader', None)
        return printable(reader.samples[place][0]) if reader is not None else f'image {place} of {self.name}'


def open_images(
    data: str | os.PathLike[str],
    dataset: str = '',
    split: str = 'validation',
    download: bool = False,
    limit: int = 1000,
    wanted: Sequence[str] = (),
) -> LabelledImages:
    """Images of a folder, or of a data set of torchvision's.

    Args:
        data: The folder. Of images: with a folder for each class, or such a folder for each split.
        dataset: '' for a folder of images; 'torch/NAME' for a data set of torchvision's, as timm names them.
        split: 'validation', which is `test` where there is none, 'train', 'test', or the name of a folder.
        download: Download torchvision's data set into the folder where it is not there.
        limit, wanted: See `LabelledImages`.

    Raises:
        UserError: There are no images, no classes, or no such data set or split.
    """
    data, shown = Path(data), printable(data)
    if not data.is_dir() and not download:
        raise UserError(f'{shown} is not a folder; --data names one with a folder of images for each class')
    if dataset and not dataset.lower().startswith('torch/'):
        raise UserError(
            f"--dataset takes 'torch/NAME', such as torch/cifar10, or is left out, got {printable(dataset)!r}"
        )
    try:
        if dataset:
            source: Any = create_dataset(dataset, root=str(data), split=split, download=download)
        else:
            folder = _split_folder(data, split)
            source = create_dataset('', root=str(folder), search_split=False, input_key=';'.join(EXTENSIONS))
    except AssertionError as e:  # timm's word for a name that it does not know
        raise UserError(f'{printable(dataset)}: {one_line(e)}') from None
    except OSError as e:
        raise UserError(f'{shown} cannot be read: {why(e)}') from None
    except (RuntimeError, ValueError) as e:
        more = '; --dataset-download downloads it' if dataset and not download else ''
        raise UserError(f'{shown} holds no images that can be used: {one_line(e)}{more}') from None
    if dataset:
        known = [synonym for synonyms in _SPLITS.values() for synonym in synonyms]
        if isinstance(getattr(source, 'train', None), bool) and split not in known:  # timm takes it for the test images
            raise UserError(f'--split must be train, validation or test, got {printable(split)!r}')
        names = [str(name) for name in getattr(source, 'classes', [])]
        targets = [int(target) for target in getattr(source, 'targets', [])]
        name = f'{dataset.partition("/")[2]}, {split}'
        if not names or not targets:
            raise UserError(f'--dataset {printable(dataset)}: torchvision does not say which image is of which class')
    else:
        names = list(source.reader.class_to_idx)
        targets = [target for _, target in source.reader.samples]
        name = Path(source.reader.root).name or str(source.reader.root)
        if '' in names:
            raise UserError(f'{shown} has images without a class; put them into a folder for each class')
    if limit < 2 or len(targets) < 2:
        raise UserError(f'{shown}: one image says nothing of how gates vary from image to image; give two or more')
    return LabelledImages(name, source, targets, names, limit, wanted)


def _split_folder(data: Path, split: str) -> Path:
    """The folder of a split, which holds a folder for each class; the folder itself where it has no splits.

    Raises:
        UserError: There are splits, and not this one.
    """
    there = {
        kind: folder
        for kind, synonyms in _SPLITS.items()
        for folder in map(data.joinpath, reversed(synonyms))
        if folder.is_dir() and any(path.is_dir() for path in folder.iterdir())
    }
    kind = next((kind for kind, synonyms in _SPLITS.items() if split in synonyms), None)
    if kind is None and split and (data / split).is_dir():
        return data / split
    if kind in there:
        return there[kind]
    if kind == 'validation' and 'test' in there:
        return there['test']
    if there or kind is None:
        names = ', '.join(folder.name for folder in there.values())
        parts = f'has {names}' if there else 'has no parts'
        raise UserError(
            f'{printable(data)} {parts} and no {printable(split)}; --split says which part is to be measured'
            + (f': {names}' if there else '; leave it out')
        )
    return data


def outputs_of(model: nn.Module, images: LabelledImages) -> tuple[list[int] | None, str]:
    """The model's output for each class of the images, None where it cannot be known; and how it is known, a sentence.

    By name, where the model, or ImageNet, has names for its outputs and all classes are among them; by order, where the
    outputs have no names and are as many as the classes of the data.
    """
    config = config_of(model)
    number = int(getattr(model, 'num_classes', 0))
    known = config.get('label_names') or []
    if not known and (subset := infer_imagenet_subset(config)) is not None:
        known = ImageNetInfo(subset).label_names()
    if number and len(known) == number:
        places = {_plain(name): i for i, name in enumerate(known)}
        missing = [name for name in images.all_classes if _plain(name) not in places]
        if not missing:
            return [
                places[_plain(name)] for name in images.classes
            ], 'The right output of each class is that of its name.'
        return None, (
            f'Whether the model is right is not known, for it has no output named {missing[0]!r}'
            f'{f" and {len(missing) - 1} others of the classes" * (len(missing) > 1)}; folders that are named as its '
            'labels would tell.'
        )
    if number and len(images.all_classes) == number:
        return images.class_indices, (
            "The model's outputs have no names: the right one of each class was found by the order of the classes."
        )
    return None, f'Whether the model is right is not known: its {number} outputs have no names.'


def _place(name: str, names: Sequence[str], kinds: Any) -> int:
    """The place of a class among those that have images."""
    if name not in names:
        raise UserError(f'there is no class {printable(name)!r}{did_you_mean(name, names)}')
    places = np.flatnonzero(kinds == names.index(name))
    if not len(places):
        raise UserError(f'there are no images of the class {printable(name)!r}')
    return int(places[0])


def _plain(name: str) -> str:
    return ''.join(c for c in name.casefold() if c.isalnum())


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly spread."""
    return [int(i) for i in np.linspace(0, count - 1, min(count, most)).round()]


def _shares(counts: Sequence[int], limit: int) -> list[int]:
    """How many of each class, as equal as their numbers allow, to have at most `limit` in all."""
    shares, left = [0] * len(counts), limit
    for rank, k in enumerate(sorted(range(len(counts)), key=lambda k: counts[k])):
        shares[k] = min(counts[k], math.ceil(left / (len(counts) - rank)))
        left -= shares[k]
    return shares
