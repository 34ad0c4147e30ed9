import gzip
import pickle
import struct
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_loader

from experiments.data import ImageError, load_dataset
from timm_senetv2.errors import UserError

NAMES = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion_mnist(folder: Path, compress: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = dict(
        zip(
            NAMES,
            (
                rng.integers(256, size=(12, 28, 28)),
                rng.integers(10, size=12),
                rng.integers(256, size=(6, 28, 28)),
                rng.integers(10, size=6),
            ),
            strict=True,
        )
    )
    for name, array in arrays.items():
        if compress:
            (folder / f'{name}.gz').write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def write_images(folder: Path, counts: dict[str, int]) -> None:
    rng = np.random.default_rng(len(str(folder)))
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(256, size=(20, 24, 3), dtype=np.uint8)).save(folder / label / f'{i}.png')


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert '\n' not in text
    return text


def test_digits_hold_out_a_stratified_quarter_that_is_always_the_same():
    data, again = load_dataset('digits'), load_dataset('digits')
    assert (len(data.train), len(data.test)) == (1347, 450)
    assert data.test.targets == again.test.targets
    np.testing.assert_array_equal(data.test.images, again.test.images)
    whole = np.bincount(load_digits().target)
    assert np.abs(np.bincount(data.test.targets) - whole / 4).max() < 1
    images = sorted(image.tobytes() for image in (*data.train.images, *data.test.images))
    assert images == sorted(
        np.round(load_digits().images * 255 / 16).astype(np.uint8).reshape(1797, 64).tobytes()[64 * i : 64 * i + 64]
        for i in range(1797)
    )


def test_mean_and_std_are_those_of_the_training_images():
    data = load_dataset('digits')
    assert data.mean == pytest.approx([np.mean(data.train.images / 255)] * 3, abs=1e-4)
    assert data.std == pytest.approx([np.std(data.train.images / 255)] * 3, abs=1e-4)


@pytest.mark.parametrize('compress', [True, False])
@pytest.mark.parametrize('inner', ['.', 'FashionMNIST/raw'])
def test_fashion_mnist_is_read_from_files_already_there(tmp_path, compress, inner):
    arrays = write_fashion_mnist(tmp_path / 'data' / inner, compress)
    data = load_dataset('fashion-mnist', tmp_path / 'data', download=False)
    for images, name, labels in ((data.train, *NAMES[:2]), (data.test, *NAMES[2:])):
        for i in range(len(images)):
            image, target = images[i]
            assert image.mode == 'RGB'
            np.testing.assert_array_equal(np.asarray(image), np.repeat(arrays[name][i][..., None], 3, 2))
            assert target == arrays[labels][i]
    assert len(data.classes) == 10


@pytest.mark.parametrize(
    'damage, says',
    [
        (lambda f: (f / f'{NAMES[3]}.gz').unlink(), f'lacks {NAMES[3]}'),
        (lambda f: (f / f'{NAMES[0]}.gz').write_bytes((f / f'{NAMES[0]}.gz').read_bytes()[:500]), f'{NAMES[0]}.gz is'),
        (lambda f: (f / f'{NAMES[0]}.gz').write_bytes(gzip.compress(idx(np.zeros((12, 28, 28)))[:-1])), 'truncated'),
        (lambda f: (f / f'{NAMES[1]}.gz').write_bytes(gzip.compress(b'no idx file')), 'not an idx file'),
        (lambda f: (f / f'{NAMES[1]}.gz').write_bytes(gzip.compress(idx(np.zeros(11)))), '12 images'),
        (
            lambda f: (f / f'{NAMES[1]}.gz').write_bytes(gzip.compress(idx(np.full(12, 10)))),
            'not those of Fashion-MNIST',
        ),
    ],
)
def test_a_missing_or_damaged_fashion_mnist_file_is_named(tmp_path, damage, says):
    write_fashion_mnist(tmp_path / 'data')
    damage(tmp_path / 'data')
    with pytest.raises(UserError) as error:
        load_dataset('fashion-mnist', tmp_path / 'data', download=False)
    assert says in message(error)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of four images in torchvision's layout, whose checksums torchvision is told."""
    folder = tmp_path / torchvision.datasets.CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5((folder / name).read_bytes()).hexdigest()]

    def batch() -> dict:
        return {'data': rng.integers(256, size=(4, 3072), dtype=np.uint8), 'labels': [0, 1, 2, 9]}

    meta = write('batches.meta', {'label_names': [f'class {i}' for i in range(10)]})
    patches = dict(
        train_list=[write('data_batch_1', batch())],
        test_list=[write('test_batch', batch())],
        meta=dict(filename=meta[0], key='label_names', md5=meta[1]),
        url='http://127.0.0.1:9/cifar-10-python.tar.gz',
    )
    for name, value in patches.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    return folder


def test_cifar_is_read_from_torchvisions_layout(cifar):
    data = load_dataset('cifar10', cifar.parent)
    assert (len(data.train), len(data.test), data.classes[9], data.size) == (4, 4, 'class 9', 32)
    stored = pickle.loads((cifar / 'data_batch_1').read_bytes())['data'][3].reshape(3, 32, 32)
    image, target = data.train[3]
    np.testing.assert_array_equal(np.asarray(image), stored.transpose(1, 2, 0))
    assert target == 9


@pytest.mark.parametrize('download', [True, False])
def test_a_damaged_cifar_without_network_is_one_line(cifar, download):
    (cifar / 'data_batch_1').write_bytes((cifar / 'data_batch_1').read_bytes()[:100])
    with pytest.raises(UserError, match='CIFAR-10 is not in .* or its files are damaged') as error:
        load_dataset('cifar10', cifar.parent, download=download)
    message(error)


def test_image_folder_with_train_and_val(tmp_path):
    write_images(tmp_path / 'train', {'ant': 3, 'bee': 2})
    write_images(tmp_path / 'val', {'ant': 1, 'bee': 1})
    data = load_dataset(str(tmp_path))
    assert (data.classes, data.train.targets, data.test.targets) == (('ant', 'bee'), [0, 0, 0, 1, 1], [0, 1])
    assert data.train[0][0].size == (24, 20)


def test_image_folder_without_split_holds_out_a_stratified_quarter(tmp_path):
    write_images(tmp_path, {'ant': 8, 'bee': 4})
    data = load_dataset(str(tmp_path))
    assert sorted(data.test.targets) == [0, 0, 1]
    assert not set(data.train.paths) & set(data.test.paths)
    assert load_dataset(str(tmp_path)).test.paths == data.test.paths


def test_limit_keeps_images_of_several_classes(tmp_path):
    write_images(tmp_path / 'train', {'ant': 10, 'bee': 10})
    write_images(tmp_path / 'val', {'ant': 1, 'bee': 1})
    data = load_dataset(str(tmp_path), limit=8)
    assert len(data.train) == 8
    assert set(data.train.targets) == {0, 1}
    assert len(data.test) == 2


@pytest.mark.parametrize(
    'make, says',
    [
        (lambda root: write_images(root / 'train', {'ant': 1}), 'none of val'),
        (lambda root: (write_images(root / 'train', {'ant': 1}), write_images(root / 'val', {'bee': 1})), "'ant'"),
        (lambda root: (root / 'notes.txt').write_text('x'), 'not an image folder'),
        (lambda root: write_images(root, {'ant': 1, 'bee': 5}), 'cannot be split'),
    ],
)
def test_a_folder_that_is_no_image_folder_is_explained(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(UserError) as error:
        load_dataset(str(tmp_path))
    assert says in message(error)


def test_unknown_dataset_lists_the_known():
    with pytest.raises(UserError, match="unknown dataset 'mnist': choose digits, fashion-mnist") as error:
        load_dataset('mnist')
    message(error)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_image_is_named_through_timms_loader(tmp_path, workers):
    write_images(tmp_path / 'train', {'ant': 2, 'bee': 2})
    write_images(tmp_path / 'val', {'ant': 1, 'bee': 1})
    damaged = tmp_path / 'train' / 'bee' / '1.png'
    damaged.write_bytes(damaged.read_bytes()[:200])
    loader = create_loader(
        load_dataset(str(tmp_path)).train,
        input_size=(3, 8, 8),
        batch_size=4,
        num_workers=workers,
        persistent_workers=False,
        device=torch.device('cpu'),
    )
    with pytest.raises(ImageError) as error:
        list(loader)
    assert message(error).startswith(f'{damaged} cannot be read as an image')
