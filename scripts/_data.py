"""The data sets of the scripts, as PIL images that any of timm's transforms and loaders can take."""

import gzip
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from _cli import UserError, one_line
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset

DATASETS = ('digits', 'fashion-mnist', 'cifar10', 'cifar100')
SYSTEM_FASHION_MNIST = Path('/usr/share/datasets/fashion-mnist')  # Debian's package dataset-fashion-mnist

FASHION_MNIST_CLASSES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)
# of the SEANet authors, who use those of CIFAR-10 for CIFAR-100 too
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,) * 3, (0.3530,) * 3
DIGITS_MEAN, DIGITS_STD = (0.3053,) * 3, (0.3758,) * 3


class ImageError(UserError):
    """An image that cannot be read."""

    def __init__(self, message: str) -> None:
        # a loader's worker hands an exception on with its traceback in front of the message
        super().__init__(message.strip().splitlines()[-1].removeprefix(f'{__name__}.ImageError: '))


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
            with Image.open(path) as file:
                image = file.convert('RGB')
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise ImageError(f'{path} cannot be read as an image ({reason}); repair it or take it away') from None
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
    elif Path(name).is_dir():
        data = _image_folder(name)
    else:
        raise UserError(f'unknown dataset {name!r}: choose {", ".join(DATASETS)}, or give the path of an image folder')
    if limit is not None:
        data.train, data.test = _subset(data.train, limit), _subset(data.test, limit)
    return data


def _subset(images: ArrayImages | FileImages, limit: int) -> ArrayImages | FileImages:
    # files come sorted by class: without the shuffle a small subset would be of one class
    kept = np.sort(np.random.default_rng(0).permutation(len(images))[:limit])
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
            raise  # a full disk, no permission: about the machine, not about the download; _cli.run has a line for it
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
        if images.shape[1:] != (28, 28) or not len(labels) or labels.max() >= len(FASHION_MNIST_CLASSES):
            raise UserError(f'{folder}: {images_name} and {labels_name} are not those of Fashion-MNIST')
        sets[split] = ArrayImages(images, labels)
    return ImageData(
        name='fashion-mnist',
        **sets,
        classes=FASHION_MNIST_CLASSES,
        mean=FASHION_MNIST_MEAN,
        std=FASHION_MNIST_STD,
        size=28,
    )


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes, plain or .gz: two zero bytes, 8, the number of dimensions, the dimensions as
    big-endian 32-bit integers, the bytes."""
    path = next((p for p in (folder / name, folder / f'{name}.gz') if p.is_file()), None)
    if path is None:
        raise UserError(f'{folder} lacks {name} (plain or .gz); put it there or give another --data-dir')
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (EOFError, OSError, zlib.error) as e:
        raise UserError(f'{path} is damaged or truncated ({one_line(e)}); get the file again') from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f'{path} is not an idx file of unsigned bytes with {dimensions} dimension(s)')
    shape = np.frombuffer(content, '>u4', dimensions, offset=4).astype(int)
    if len(content) - header != shape.prod():
        raise UserError(
            f'{path} is truncated or damaged: {len(content) - header} bytes of data where its header announces '
            f'{shape.prod()}; get the file again'
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _image_folder(name: str) -> ImageData:
    root = Path(name)
    train_dir = root / 'train'
    if train_dir.is_dir():
        test_dir = next((root / n for n in ('val', 'validation', 'test') if (root / n).is_dir()), None)
        if test_dir is None:
            raise UserError(f'{root} has a folder train but none of val, validation, test')
        train, classes = _scan(train_dir)
        test, test_classes = _scan(test_dir)
        if classes != test_classes:
            different = sorted(set(classes) ^ set(test_classes))
            raise UserError(f'{train_dir} and {test_dir} must hold the same classes; only one has {different[0]!r}')
    else:
        samples, classes = _scan(root)
        kept, held_out = _hold_out([target for _, target in samples], str(root))
        train, test = [samples[i] for i in kept], [samples[i] for i in held_out]
    return ImageData(
        name=name,
        train=FileImages(*zip(*train, strict=True)),
        test=FileImages(*zip(*test, strict=True)),
        classes=tuple(classes),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=None,
    )


def _scan(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as e:
        raise UserError(
            f'{folder} is not an image folder: it needs a folder of images for each class ({one_line(e)})'
        ) from None
    return found.samples, found.classes
