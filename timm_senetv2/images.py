"""Labelled images for a command: a folder with class subfolders, or one of torchvision's data sets, through timm."""

import math
import os
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

IMAGES_A_CLASS = 20  # at least, before a further class is taken


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
            limit: Images to take at most: the same number of each class, and of so many classes that each has
                IMAGES_A_CLASS; classes and images evenly spread.
            wanted: Names of classes to take in any case.

        Raises:
            UserError: There is no such class, or it has no images.
        """
        self.name, self._source, self.all_classes = name, source, tuple(map(printable, all_classes))
        self.transform: Callable[[Image.Image], Any] | None = None
        kinds, counts = np.unique(np.asarray(targets), return_counts=True)
        most = max(1, limit // min(IMAGES_A_CLASS, int(counts.max())))
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
        except Exception as e:  # an image of one pixel, say, that cannot be cropped
            raise ImageError(f'{self._named(place)} cannot be used: {one_line(e)}; take it away') from None

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
                with reader[place][0] as file:
                    image = Image.open(file, formats=formats())
                    image.load()
            return image.convert('RGB')  # type: ignore[no-any-return]
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
        split: Such as 'validation' or 'train'; timm finds val, eval, test and the like.
        download: Download torchvision's data set into the folder where it is not there.
        limit, wanted: See `LabelledImages`.

    Raises:
        UserError: There are no images, no classes, or no such data set.
    """
    data, shown = Path(data), printable(data)
    if not data.is_dir() and not download:
        raise UserError(f'{shown} is not a folder; --data names one with a folder of images for each class')
    if dataset and not dataset.lower().startswith('torch/'):
        raise UserError(
            f"--dataset takes 'torch/NAME', such as torch/cifar10, or is left out, got {printable(dataset)!r}"
        )
    try:
        source: Any = create_dataset(dataset, root=str(data), split=split, download=download)
    except AssertionError as e:  # timm's word for a name that it does not know
        raise UserError(f'{printable(dataset)}: {one_line(e)}') from None
    except OSError as e:
        raise UserError(f'{shown} cannot be read: {why(e)}') from None
    except (RuntimeError, ValueError) as e:
        more = '; --dataset-download downloads it' if dataset and not download else ''
        raise UserError(f'{shown} holds no images that can be used: {one_line(e)}{more}') from None
    if dataset:
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


def outputs_of(model: nn.Module, images: LabelledImages) -> list[int] | None:
    """The model's output for each class of the images; None where it cannot be known.

    By name, where the names of the classes are those of the model's labels or of ImageNet's; else by order, where the
    data has as many classes as the model has outputs.
    """
    config = config_of(model)
    number = int(getattr(model, 'num_classes', 0))
    known = config.get('label_names') or []
    if not known and (subset := infer_imagenet_subset(config)) is not None:
        known = ImageNetInfo(subset).label_names()
    places = {_plain(name): i for i, name in enumerate(known)}
    if len(known) == number and all(_plain(name) in places for name in images.all_classes):
        return [places[_plain(name)] for name in images.classes]
    return images.class_indices if number and len(images.all_classes) == number else None


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
