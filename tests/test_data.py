import gzip
import io
import os
import pickle
import struct
import zlib
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, features
from sklearn.datasets import load_digits
from timm.data import create_loader

from experiments.data import FileImages, ImageError, load_dataset
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
    for label, count in counts.items():
        rng = np.random.default_rng(zlib.crc32(f'{folder.name}/{label}'.encode()))
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
    source = load_digits()
    whole = np.bincount(source.target)
    assert np.abs(np.bincount(data.test.targets) - whole / 4).max() < 1
    images = sorted(image.tobytes() for image in (*data.train.images, *data.test.images))
    assert images == sorted(image.tobytes() for image in np.round(source.images * 255 / 16).astype(np.uint8))


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


def as_one(folder: Path) -> str:
    """What load_dataset says of a folder that it refuses."""
    with pytest.raises(UserError) as error:
        load_dataset(str(folder))
    return message(error)


@pytest.mark.parametrize('target', ['..', '../..', '/', '.', 'up'])
def test_a_link_to_a_folder_above_adds_no_image(tmp_path, target):
    write_images(tmp_path / 'images', {'ant': 8, 'bee': 8})
    before = load_dataset(str(tmp_path / 'images'))
    (tmp_path / 'images' / 'ant' / 'up').symlink_to(target)
    (tmp_path / 'images' / 'whole').symlink_to(tmp_path)  # in the place of a class
    after = load_dataset(str(tmp_path / 'images'))
    assert (after.train.paths, after.test.paths) == (before.train.paths, before.test.paths)
    assert after.classes == ('ant', 'bee')


def test_a_linked_folder_and_file_count_once(tmp_path):
    write_images(tmp_path / 'images', {'ant': 4, 'bee': 8})
    write_images(tmp_path / 'elsewhere', {'more': 4})
    for name in ('more', 'again'):
        (tmp_path / 'images' / 'ant' / name).symlink_to(tmp_path / 'elsewhere' / 'more')
    (tmp_path / 'images' / 'ant' / 'same.png').symlink_to('0.png')
    (tmp_path / 'images' / 'ant' / 'hard.png').hardlink_to(tmp_path / 'images' / 'ant' / '1.png')
    data = load_dataset(str(tmp_path / 'images'))
    assert sorted((*data.train.targets, *data.test.targets)) == [0] * 8 + [1] * 8


def test_an_image_in_two_classes_is_refused(tmp_path):
    write_images(tmp_path, {'ant': 4, 'bee': 4})
    (tmp_path / 'ant' / 'bees').symlink_to('../bee')
    assert 'are the same file in two classes' in as_one(tmp_path)


@pytest.mark.parametrize('how', ['symlink', 'hard link', 'copy'])
def test_an_image_on_both_sides_of_the_split_is_refused(tmp_path, how):
    write_images(tmp_path / 'train', {'ant': 3, 'bee': 2})
    write_images(tmp_path / 'val', {'ant': 1, 'bee': 1})
    source, copy = tmp_path / 'train' / 'ant' / '2.png', tmp_path / 'val' / 'ant' / 'x.png'
    if how == 'symlink':
        copy.symlink_to(source)
    elif how == 'hard link':
        copy.hardlink_to(source)
    else:
        copy.write_bytes(source.read_bytes())
    text = as_one(tmp_path)
    assert str(source) in text and str(copy) in text and 'take one away' in text


def test_folders_whose_names_start_with_a_dot_are_no_classes(tmp_path):
    write_images(tmp_path, {'ant': 4, 'bee': 4})
    (tmp_path / '.ipynb_checkpoints').mkdir()
    assert load_dataset(str(tmp_path)).classes == ('ant', 'bee')


def test_an_empty_class_is_named(tmp_path):
    write_images(tmp_path, {'ant': 4, 'bee': 4})
    (tmp_path / 'cow').mkdir()
    assert "its folder 'cow' holds no images" in as_one(tmp_path)


def test_a_link_that_leads_nowhere_is_no_data_set(tmp_path):
    (tmp_path / 'loop').symlink_to('loop')
    assert 'unknown dataset' in as_one(tmp_path / 'loop')


def test_names_of_classes_are_printable_whatever_the_folders_are_called(tmp_path):
    names = [b'caf\xe9', b'two\nlines', b'\x1b[31mred', b'$a_{$']
    for i, name in enumerate(names):
        write_images(tmp_path / 'temporary', {str(i): 4})
        os.rename(tmp_path / 'temporary' / str(i), os.path.join(os.fsencode(tmp_path), name))
    (tmp_path / 'temporary').rmdir()
    classes = load_dataset(str(tmp_path)).classes
    assert all(name.isprintable() for name in classes) and len(set(classes)) == 4
    assert '$a_{$' in classes and r'two\nlines' in classes


@pytest.mark.parametrize('kind', ['AVIF', 'DDS', 'BLP', 'PNG', 'TIFF', 'GIF', 'JPEG2000'])
def test_damaged_images_of_any_kind_are_one_line(tmp_path, kind):
    if kind == 'AVIF' and not features.check('avif'):
        pytest.skip('this Pillow reads no AVIF')
    rng = np.random.default_rng(0)
    mode = 'P' if kind in ('BLP', 'GIF') else 'RGB'
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(24, 24, 3), dtype=np.uint8)).convert(mode).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / 'x.png'
    images = FileImages([str(path)], [0])
    refused = 0
    for _ in range(60):
        content = bytearray(whole[: rng.integers(1, len(whole))])
        for place in rng.integers(len(content), size=4):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            images[0]
        except ImageError as e:
            refused += 1
            assert str(path) in str(e) and len(str(e).splitlines()) == 1
    assert refused > 5


def test_a_postscript_program_named_as_an_image_is_not_run(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new('RGB', (4, 4)).save(buffer, 'EPS')
    (tmp_path / 'x.png').write_bytes(buffer.getvalue())
    (tmp_path / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\n')
    (tmp_path / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', None)  # Pillow looks for it once
    with pytest.raises(ImageError):
        FileImages([str(tmp_path / 'x.png')], [0])[0]
    assert not (tmp_path / 'ran').exists()


def test_a_refused_image_leaves_nothing_on_stderr(tmp_path, capfd):
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8)).save(buffer, 'TIFF', tiffinfo={277: 3})
    content = bytearray(buffer.getvalue())
    at = content.index(bytes([277 & 255, 277 >> 8]))  # SamplesPerPixel: type, count, value
    content[at + 8 : at + 10] = (5120).to_bytes(2, 'little')
    (tmp_path / 'x.tif').write_bytes(content)
    with pytest.raises(ImageError):
        FileImages([str(tmp_path / 'x.tif')], [0])[0]
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('shape', [(2**32 - 1,) * 3, (2**31, 2**31, 4), (2**20, 28, 28), (0, 28, 28)])
def test_a_header_that_announces_too_much_or_nothing_is_refused(tmp_path, shape):
    write_fashion_mnist(tmp_path / 'data')
    content = struct.pack('>HBB3I', 0, 8, 3, *shape)
    (tmp_path / 'data' / f'{NAMES[0]}.gz').write_bytes(gzip.compress(content))
    with pytest.raises(UserError) as error:
        load_dataset('fashion-mnist', tmp_path / 'data', download=False)
    assert NAMES[0] in message(error)


def test_a_gzip_bomb_ends_in_one_line_under_a_memory_limit(tmp_path, interpreters):
    """10 GB of zeros in 10 MB, read by a process that may have 2 GB more than it starts with."""
    write_fashion_mnist(tmp_path / 'data')
    chunk = gzip.compress(bytes(2**26))
    with (tmp_path / 'data' / f'{NAMES[0]}.gz').open('wb') as file:
        file.write(gzip.compress(struct.pack('>HBB3I', 0, 8, 3, 60000, 28, 28)))
        for _ in range(160):
            file.write(chunk)
    code = f"""
import resource, sys
from experiments.data import load_dataset
from timm_senetv2.errors import run
size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**31,) * 2)
run(lambda: load_dataset('fashion-mnist', {str(tmp_path / 'data')!r}, download=False))
"""
    done = interpreters.run(code, Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr.startswith('error: ') and 'holds more than' in done.stderr and len(done.stderr.splitlines()) == 1
