"""The data sets, as PIL images that any of timm's transforms and loaders can take."""

import gzip
import hashlib
import logging
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from timm_senetv2.errors import UserError, one_line, printable
from timm_senetv2.files import sha256
from timm_senetv2.images import ImageError, formats
from timm_senetv2.models.cifar import CIFAR_MEAN, CIFAR_STD

DATASETS = ('digits', 'fashion-mnist', 'cifar10', 'cifar100')
SYSTEM_FASHION_MNIST = Path('/usr/share/datasets/fashion-mnist')  # Debian's package dataset-fashion-mnist

FASHION_MNIST_CFG: Any = get_pretrained_cfg('cifar_resnet20.fmnist')  # of the weights in the package
DIGITS_MEAN, DIGITS_STD = (0.3053,) * 3, (0.3758,) * 3
MOST_FASHION_MNIST = 100_000  # images; the header of a damaged file may announce any number
COMPARED_BYTES = 2**32  # of images of equal size, read to see whether they are copies of each other
logging.getLogger('PIL').setLevel(logging.CRITICAL)  # some decoders log what they raise, and the log goes to stderr


class ArrayImages(Dataset):
    """Images from an array in memory: (N, H, W) or (N, H, W, 3), uint8. Items are (RGB image, class index)."""

    def __init__(self, images: np.ndarray, targets: Sequence[int]) -> None:
        self.images = images
        self.targets = [int(t) for t in targets]
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert('RGB')
        return self.transform(image) if self.transform else image, self.targets[index]


class FileImages(Dataset):
    """Images from files. Items are (RGB image, class index); a damaged file raises an ImageError that names it."""

    def __init__(self, paths: Sequence[str], targets: Sequence[int]) -> None:
        self.paths = [str(p) for p in paths]
        self.targets = [int(t) for t in targets]
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.paths[index]
        try:
            with Image.open(path, formats=formats()) as file:
                image = file.convert('RGB')
        except Exception as e:  # each of Pillow's decoders has its own for damaged files
            raise ImageError(
                f'{printable(path)} cannot be read as an image ({one_line(e)}); repair it or take it away'
            ) from None
        return self.transform(image) if self.transform else image, self.targets[index]


@dataclass
class ImageData:
    """Training and test images of one data set.

    Attributes:
        name: Its name, or the path of the image folder.
        train: Items are (PIL image in RGB, class index), passed through `train.transform` where that is set.
        test: The same.
        classes: Names of the classes, in the order of their indices.
        mean: Of the channels of the training images, in 0 to 1.
        std: Of the channels of the training images, in 0 to 1.
        size: Side of the images in pixels; None where it differs from image to image.
    """

    name: str
    train: ArrayImages | FileImages
    test: ArrayImages | FileImages
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None

    @property
    def in_memory(self) -> bool:
        """Whether the images are arrays in memory rather than files."""
        return isinstance(self.train, ArrayImages)

    def fingerprint(self) -> str:
        """The same for the same classes and images: SHA-256 over them; of files over their names."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for images in (self.train, self.test):
            digest.update(np.asarray(images.targets).tobytes())
            if isinstance(images, ArrayImages):
                digest.update(np.ascontiguousarray(images.images).tobytes())
            else:
                digest.update(repr(images.paths).encode())
        return digest.hexdigest()

    def few(self, per_class: int, seed: int) -> 'ImageData':
        """The same with so many training images of each class, drawn by the seed; fewer are among more.

        Raises:
            UserError: A class has fewer.
        """
        targets = np.asarray(self.train.targets)
        order = np.random.default_rng(seed).permutation(len(targets))
        kept = []
        for index, name in enumerate(self.classes):
            own = order[targets[order] == index]
            if len(own) < per_class:
                raise UserError(f'--per-class {per_class}: class {name!r} has only {len(own)} training images')
            kept.append(own[:per_class])
        return replace(self, train=_chosen(self.train, np.sort(np.concatenate(kept))))


def load_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
    limit: int | None = None,
) -> ImageData:
    """Load a data set by name, or an image folder by its path.

    Args:
        name: 'digits' (of scikit-learn, a fixed stratified quarter held out), 'fashion-mnist', 'cifar10', 'cifar100',
            or the path of an image folder: train/ and val/ (or test/) with a folder for each class in them, or the
            classes' folders alone, of which a fixed stratified quarter is then held out.
        data_dir: Where the files are or shall be downloaded to. For fashion-mnist either torchvision's layout or the
            four idx files, plain or .gz. By default Debian's folder of Fashion-MNIST where there is one, else a
            folder in the user's cache.
        download: Whether files that are not there may be downloaded.
        limit: Keep so many training and so many test images, the same ones each time.

    Raises:
        UserError: An unknown name, or files that are missing or damaged; says which and what to do.
    """
    if limit is not None and limit < 1:
        raise UserError(f'the limit of images must be at least 1, got {limit}')
    if name == 'digits':
        data = _digits()
    elif name == 'fashion-mnist':
        data = _fashion_mnist(data_dir, download)
    elif name in ('cifar10', 'cifar100'):
        data = _cifar(name, data_dir, download)
    elif os.path.isdir(name):
        data = _image_folder(name)
    else:
        raise UserError(
            f'unknown dataset {printable(repr(name))}: choose {", ".join(DATASETS)}, or give the path of an image '
            f'folder'
        )
    if limit is not None:
        data.train, data.test = _subset(data.train, limit), _subset(data.test, limit)
    return data


def _subset(images: ArrayImages | FileImages, limit: int) -> ArrayImages | FileImages:
    # files come sorted by class: without the shuffle a small subset would be of one class
    return _chosen(images, np.sort(np.random.default_rng(0).permutation(len(images))[:limit]))


def _chosen(images: ArrayImages | FileImages, kept: np.ndarray) -> ArrayImages | FileImages:
    targets = [images.targets[i] for i in kept]
    if isinstance(images, ArrayImages):
        return ArrayImages(images.images[kept], targets)
    return FileImages([images.paths[i] for i in kept], targets)


def _hold_out(targets: Sequence[int], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training images and of the held-out quarter; the same on any machine."""
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(np.arange(len(targets)), test_size=0.25, random_state=0, stratify=targets)
    except ValueError as e:
        raise UserError(f'{what} cannot be split into training and test images: {e}') from None
    return np.sort(train), np.sort(test)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # from 17 levels of grey
    train, test = _hold_out(digits.target, 'digits')
    return ImageData(
        name='digits',
        train=ArrayImages(images[train], digits.target[train]),
        test=ArrayImages(images[test], digits.target[test]),
        classes=tuple(str(n) for n in digits.target_names),
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
        size=8,
    )


def _cache_dir() -> Path:
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_senetv2' / 'data'


def _torchvision(cls: type, title: str, root: Path, download: bool) -> list[Any]:
    """The training and the test set of a torchvision class, downloaded where they are not there."""

    def build(fetch: bool) -> list[Any]:
        return [cls(root, train=train, download=fetch) for train in (True, False)]

    try:
        return build(False)
    except (RuntimeError, OSError, EOFError, ValueError):
        if not download:
            raise UserError(
                f'{title} is not in {root}, or its files are damaged; allow the download or give another --data-dir'
            ) from None
    try:
        return build(True)
    except (RuntimeError, OSError, EOFError, ValueError) as e:
        if isinstance(e, OSError) and e.errno is not None and not hasattr(e, 'reason'):
            raise  # a full disk, no permission: about the machine, not about the download; errors.run has a line for it
        raise UserError(
            f'{title} is not in {root}, or its files are damaged, and downloading it failed ({one_line(e)}); '
            f'connect to the network or give the folder of a copy as --data-dir'
        ) from None


def _cifar(name: str, data_dir: str | os.PathLike | None, download: bool) -> ImageData:
    cls, title = dict(
        cifar10=(torchvision.datasets.CIFAR10, 'CIFAR-10'), cifar100=(torchvision.datasets.CIFAR100, 'CIFAR-100')
    )[name]
    with warnings.catch_warnings():
        # numpy's remark on how torchvision's files were pickled is of no use to the reader
        warnings.filterwarnings('ignore', message=r'dtype\(\): align')
        train, test = _torchvision(cls, title, Path(data_dir) if data_dir else _cache_dir(), download)
    return ImageData(
        name=name,
        train=ArrayImages(train.data, train.targets),
        test=ArrayImages(test.data, test.targets),
        classes=tuple(train.classes),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        size=32,
    )


def _fashion_mnist(data_dir: str | os.PathLike | None, download: bool) -> ImageData:
    files = {
        'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
        'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'),
    }
    if data_dir:
        root = Path(data_dir)
    else:
        root = SYSTEM_FASHION_MNIST if SYSTEM_FASHION_MNIST.is_dir() else _cache_dir()
    names = [name for pair in files.values() for name in pair]
    folder = next(
        (
            folder
            for folder in (root, root / 'FashionMNIST' / 'raw')
            if any((folder / f'{name}{end}').is_file() for name in names for end in ('', '.gz'))
        ),
        None,
    )
    if folder is None:
        _torchvision(torchvision.datasets.FashionMNIST, 'Fashion-MNIST', root, download)
        folder = root / 'FashionMNIST' / 'raw'

    sets = {}
    for split, (images_name, labels_name) in files.items():
        images = _read_idx(folder, images_name, dimensions=3)
        labels = _read_idx(folder, labels_name, dimensions=1)
        if len(images) != len(labels):
            raise UserError(
                f'{folder}: {images_name} holds {len(images)} images and {labels_name} {len(labels)} labels; '
                f'take the files from one source'
            )
        if images.shape[1:] != (28, 28) or not len(labels) or labels.max() >= len(FASHION_MNIST_CFG.label_names):
            raise UserError(f'{folder}: {images_name} and {labels_name} are not those of Fashion-MNIST')
        sets[split] = ArrayImages(images, labels.tolist())
    return ImageData(
        name='fashion-mnist',
        **sets,
        classes=tuple(FASHION_MNIST_CFG.label_names),
        mean=FASHION_MNIST_CFG.mean,
        std=FASHION_MNIST_CFG.std,
        size=28,
    )


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes, plain or .gz: two zero bytes, 8, the number of dimensions, the dimensions as
    big-endian 32-bit integers, the bytes."""
    path = next((p for p in (folder / name, folder / f'{name}.gz') if p.is_file()), None)
    if path is None:
        raise UserError(f'{folder} lacks {name} (plain or .gz); put it there or give another --data-dir')
    header = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
            start = file.read(header)
            if len(start) < header or start[:4] != bytes((0, 0, 8, dimensions)):
                raise UserError(
                    f'{printable(path)} is not an idx file of unsigned bytes with {dimensions} dimension(s)'
                )
            shape = tuple(int(n) for n in np.frombuffer(start, '>u4', dimensions, offset=4))
            announced = math.prod(shape)
            if announced > MOST_FASHION_MNIST * 28 ** (2 * (dimensions == 3)):
                raise UserError(
                    f'{printable(path)} announces {" x ".join(map(str, shape))} bytes and is not of Fashion-MNIST; '
                    f'get the file again'
                )
            content = file.read(announced + 1)  # and no more, however much the file unpacks to
    except (EOFError, OSError, zlib.error) as e:
        raise UserError(f'{printable(path)} is damaged or truncated ({one_line(e)}); get the file again') from None
    if len(content) != announced:
        raise UserError(
            f'{printable(path)} is truncated or damaged: it holds {"more" if len(content) > announced else "less"} '
            f'than the {announced} bytes of data that its header announces; get the file again'
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _image_folder(name: str) -> ImageData:
    root = Path(name)
    train_dir = root / 'train'
    if train_dir.is_dir():
        test_dir = next((root / n for n in ('val', 'validation', 'test') if (root / n).is_dir()), None)
        if test_dir is None:
            raise UserError(f'{printable(root)} has a folder train but none of val, validation, test')
        train, classes = _scan(train_dir)
        test, test_classes = _scan(test_dir)
        if classes != test_classes:
            different = sorted(set(classes) ^ set(test_classes))
            raise UserError(
                f'{printable(train_dir)} and {printable(test_dir)} must hold the same classes; only one has '
                f'{different[0]!r}'
            )
    else:
        samples, classes = _scan(root)
        kept, held_out = _hold_out([target for _, target in samples], printable(root))
        train, test = [samples[i] for i in kept], [samples[i] for i in held_out]
    _refuse_copies([path for path, _ in train], [path for path, _ in test])
    return ImageData(
        name=name,
        train=FileImages(*zip(*train, strict=True)),
        test=FileImages(*zip(*test, strict=True)),
        classes=tuple(printable(c) for c in classes),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=None,
    )


def _scan(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """The images of a folder with a folder for each class, with their class indices, and the classes' names.

    Links are followed, each to a file or folder that has not been seen: a link to a folder above leads nowhere new.

    Raises:
        UserError: No such folder, a class without images, or an image that is in two classes.
    """
    above = {os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)}
    try:
        classes = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith('.') and os.path.realpath(entry.path) not in above
        )
    except OSError as e:
        raise UserError(f'{printable(folder)} cannot be read: {one_line(e)}') from None
    samples: list[tuple[str, int]] = []
    found: dict[tuple[int, int], tuple[str, int]] = {}  # by what tells a file from any other, whatever its names
    for index, label in enumerate(classes):
        before = len(samples)
        for path in _files(folder / label, above):
            status = os.stat(path)
            known = found.setdefault((status.st_dev, status.st_ino), (path, index))
            if known[1] != index:
                raise UserError(
                    f'{printable(known[0])} and {printable(path)} are the same file in two classes; take one away'
                )
            if known[0] == path:
                samples.append((path, index))
        if len(samples) == before:
            raise UserError(
                f'{printable(folder)} is not an image folder: its folder {printable(label)!r} holds no images'
            )
    if not classes:
        raise UserError(f'{printable(folder)} is not an image folder: it needs a folder of images for each class')
    return samples, classes


def _files(folder: Path, above: set[str]) -> Iterator[str]:
    """The images in a folder and its folders, links followed, each folder once."""
    seen = {*above}

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        new = real not in seen
        seen.add(real)
        return new

    if is_new(str(folder)):
        for root, folders, names in os.walk(folder, followlinks=True):
            folders[:] = [name for name in sorted(folders) if is_new(os.path.join(root, name))]
            for name in sorted(names):
                path = os.path.join(root, name)
                if name.lower().endswith(IMG_EXTENSIONS) and os.path.isfile(path):
                    yield path


def refuse_loops(folder: Path) -> None:
    """Raise a UserError if following the links in a folder leads to a folder twice, or for ever."""
    seen = {os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)}
    for root, folders, _ in os.walk(folder, followlinks=True):
        for name in folders:
            path = os.path.join(root, name)
            real = os.path.realpath(path)
            if real in seen:
                raise UserError(f'{printable(path)} is a link to a folder that is read anyway; take it away')
            seen.add(real)


def _refuse_copies(train: Sequence[str], test: Sequence[str]) -> None:
    """Raise a UserError if an image to test with is one to train on too: the same file, or a copy of it.

    Contents are compared of files of equal size, as long as there are not too many of them to read.
    """
    by_size: dict[int, tuple[list[str], list[str]]] = {}
    identities: dict[tuple[int, int], str] = {}
    for side, paths in enumerate((train, test)):
        for path in paths:
            status = os.stat(path)
            other = identities.setdefault((status.st_dev, status.st_ino), path)
            if other != path:
                raise UserError(
                    f'{printable(other)} and {printable(path)} are the same file, one to train on and one to test '
                    f'with; take one away'
                )
            by_size.setdefault(status.st_size, ([], []))[side].append(path)
    both = [(size, trained, tested) for size, (trained, tested) in sorted(by_size.items()) if trained and tested]
    if sum(size * (len(trained) + len(tested)) for size, trained, tested in both) > COMPARED_BYTES:
        return
    for _, trained, tested in both:
        known = {_content(path): path for path in trained}
        for path in tested:
            copied = known.get(_content(path))
            if copied is not None:
                raise UserError(
                    f'{printable(copied)} and {printable(path)} are copies of one image, one to train on and one to '
                    f'test with; take one away'
                )


def _content(path: str) -> str:
    return sha256(Path(path))
