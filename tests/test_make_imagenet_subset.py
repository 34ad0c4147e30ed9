import errno
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import make_imagenet_subset
import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from experiments import imagenet_subset as script
from timm_senetv2 import errors, files
from timm_senetv2.errors import UserError

CLASSES = ('n01', 'n02', 'n10')


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, 'PNG')
    return buffer.getvalue()


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """Twelve training images a class, two for validation."""
    for split, count in (('train', 12), ('val', 2)):
        for c, label in enumerate(CLASSES):
            folder = tmp_path / 'imagenet' / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f'{label}_{i}.png').write_bytes(png(20 * c + i))
    return tmp_path / 'imagenet'


@pytest.fixture
def run_main(monkeypatch):
    def run_main(*args) -> None:
        make_imagenet_subset.main([*map(str, args)])

    return run_main


def chosen(dst: Path) -> set[str]:
    return {f'{p.parent.name}/{p.name}' for p in (dst / 'train').glob('*/*')}


def by_hand(seed: int, per_class: int) -> set[str]:
    """The rule of the docstring, once more."""
    result = set()
    for label in CLASSES:
        hashes = {
            hashlib.sha256(f'{seed}/{label}/{label}_{i}.png'.encode()).hexdigest(): f'{label}/{label}_{i}.png'
            for i in range(12)
        }
        result |= {hashes[h] for h in sorted(hashes)[:per_class]}
    return result


def test_links_so_many_images_of_each_class_and_the_whole_validation_set(imagenet, tmp_path, run_main):
    dst = tmp_path / 'subset'
    run_main(imagenet, dst, '--per-class', 5, '--seed', 3)
    assert chosen(dst) == by_hand(3, 5)
    assert all(p.is_symlink() for p in (dst / 'train').glob('*/*'))
    for path in (dst / 'train').glob('*/*'):
        assert path.read_bytes() == (imagenet / 'train' / path.parent.name / path.name).read_bytes()
    assert len(list((dst / 'val').glob('*/*'))) == 6


def test_timm_reads_the_subset_with_the_labels_of_the_whole(imagenet, tmp_path, run_main):
    dst = tmp_path / 'subset'
    run_main(imagenet, dst, '--per-class', 5)
    whole, subset = (create_dataset('', root=str(r), split='train') for r in (imagenet, dst))
    assert subset.reader.class_to_idx == whole.reader.class_to_idx
    assert len(subset) == 15
    assert len(create_dataset('', root=str(dst), split='validation')) == 6


def test_same_seed_same_images_other_seed_others_and_fewer_are_among_more(imagenet, tmp_path, run_main):
    subsets = {}
    for seed, per_class in ((0, 5), (1, 5), (0, 3)):
        run_main(imagenet, tmp_path / f's{seed}{per_class}', '--per-class', per_class, '--seed', seed)
        subsets[seed, per_class] = chosen(tmp_path / f's{seed}{per_class}')
    assert subsets[0, 5] == by_hand(0, 5) != subsets[1, 5]
    assert subsets[0, 3] < subsets[0, 5]


def test_order_of_the_directory_does_not_matter(tmp_path, run_main):
    order = list(range(12))
    for run, seed in enumerate((1, 2)):
        np.random.default_rng(seed).shuffle(order)
        for i in order:
            path = tmp_path / f'src{run}' / 'n01' / f'n01_{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(i))
        run_main(tmp_path / f'src{run}', tmp_path / f'dst{run}', '--per-class', 5)
    manifests = [json.loads((tmp_path / f'dst{run}' / 'manifest.json').read_text()) for run in range(2)]
    assert manifests[0]['sha256'] == manifests[1]['sha256']
    assert manifests[0]['classes'] == manifests[1]['classes']


def test_manifest_lists_the_files_and_their_hash(imagenet, tmp_path, run_main):
    dst = tmp_path / 'subset'
    run_main(imagenet, dst, '--per-class', 5, '--seed', 7)
    manifest = json.loads((dst / 'manifest.json').read_text())
    assert (manifest['seed'], manifest['per_class'], manifest['images'], manifest['complete']) == (7, 5, 15, True)
    lines = sorted(f'{label}/{name}' for label, names in manifest['classes'].items() for name in names)
    assert set(lines) == chosen(dst)
    assert manifest['sha256'] == hashlib.sha256(''.join(f'{line}\n' for line in lines).encode()).hexdigest()


@pytest.mark.parametrize('nested', [False, True], ids=['folders in a tar', 'tars in a tar'])
def test_tar_gives_the_images_of_the_folder(imagenet, tmp_path, run_main, nested):
    archive = tmp_path / 'train.tar'
    with tarfile.open(archive, 'w') as outer:
        for label in CLASSES:
            if nested:
                inner = tmp_path / f'{label}.tar'
                with tarfile.open(inner, 'w') as tar:
                    for path in sorted((imagenet / 'train' / label).iterdir()):
                        tar.add(path, path.name)
                outer.add(inner, inner.name)
            else:
                outer.add(imagenet / 'train' / label, label)
    dst = tmp_path / 'subset'
    run_main(archive, dst, '--per-class', 5, '--seed', 3)
    assert chosen(dst) == by_hand(3, 5)
    for path in (dst / 'train').glob('*/*'):
        assert not path.is_symlink()
        assert path.read_bytes() == (imagenet / 'train' / path.parent.name / path.name).read_bytes()
    run_main(archive, dst, '--per-class', 5, '--seed', 3)
    assert chosen(dst) == by_hand(3, 5)


def test_interrupted_run_goes_on(imagenet, tmp_path, run_main, monkeypatch):
    dst = tmp_path / 'subset'
    link, made = script.link, []

    def link_some(source, target):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(target)
        link(source, target)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(script, 'link', link_some)
        run_main(imagenet, dst, '--per-class', 5)
    assert len(chosen(dst)) == 4
    assert json.loads((dst / 'manifest.json').read_text())['complete'] is False
    before = {p: p.lstat().st_ino for p in made}
    run_main(imagenet, dst, '--per-class', 5)
    assert chosen(dst) == by_hand(0, 5)
    assert {p: p.lstat().st_ino for p in made} == before
    assert json.loads((dst / 'manifest.json').read_text())['complete'] is True


def test_refuses_a_folder_with_something_else(imagenet, tmp_path, run_main):
    dst = tmp_path / 'precious'
    dst.mkdir()
    (dst / 'thesis.tex').write_text('x')
    with pytest.raises(UserError, match='exists and is not a subset'):
        run_main(imagenet, dst)
    assert [p.name for p in dst.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize('args', [('--seed', 1), ('--per-class', 4)])
def test_refuses_another_subset(imagenet, tmp_path, run_main, args):
    dst = tmp_path / 'subset'
    run_main(imagenet, dst, '--per-class', 5)
    before = (dst / 'manifest.json').read_bytes()
    with pytest.raises(UserError, match='already another subset .5 images a class with seed 0'):
        run_main(imagenet, dst, *('--per-class', 5), *args)
    assert (dst / 'manifest.json').read_bytes() == before
    assert chosen(dst) == by_hand(0, 5)


def test_refuses_a_file_in_the_way(imagenet, tmp_path, run_main):
    dst = tmp_path / 'subset'
    run_main(imagenet, dst, '--per-class', 5)
    path = dst / 'train' / sorted(chosen(dst))[0]
    path.unlink()
    path.write_text('mine')
    with pytest.raises(UserError, match='is in the way'):
        run_main(imagenet, dst, '--per-class', 5)
    assert path.read_text() == 'mine'


def test_reports_classes_with_too_few_images(imagenet, tmp_path, run_main, capsys):
    for i in range(9):
        (imagenet / 'train' / 'n02' / f'n02_{i}.png').unlink()
    run_main(imagenet, tmp_path / 'subset', '--per-class', 5)
    assert 'fewer than 5 images in 1 of 3 classes: n02 (3)' in capsys.readouterr().err
    assert json.loads((tmp_path / 'subset' / 'manifest.json').read_text())['short'] == {'n02': 3}
    assert len(chosen(tmp_path / 'subset')) == 13


def test_reports_classes_without_images_and_a_validation_set_of_others(imagenet, tmp_path, run_main, capsys):
    for path in (imagenet / 'train' / 'n02').iterdir():
        path.unlink()
    run_main(imagenet, tmp_path / 'subset', '--per-class', 5)
    err = capsys.readouterr().err
    assert 'fewer than 5 images in 1 of 3 classes: n02 (0)' in err
    assert 'training and validation images are not of the same classes (only one has n02, 1 in all)' in err
    assert json.loads((tmp_path / 'subset' / 'manifest.json').read_text())['short'] == {'n02': 0}


def test_goes_on_after_a_full_disk(imagenet, tmp_path, run_main, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch, pytest.raises(UserError, match='the disk is full'):
        patch.setattr(files.os, 'replace', full)
        run_main(imagenet, tmp_path / 'subset', '--per-class', 5)
    assert not list((tmp_path / 'subset').iterdir())
    (tmp_path / 'subset' / '.0123456789ab.json').write_text('{')  # what a kill in between leaves
    run_main(imagenet, tmp_path / 'subset', '--per-class', 5)
    assert chosen(tmp_path / 'subset') == by_hand(0, 5)


def cut_tar(folder: Path) -> Path:
    """One that ends inside the header of its second image."""
    with tarfile.open(folder / 'cut.tar', 'w') as tar:
        for label in ('n01', 'n02'):
            info = tarfile.TarInfo(f'{label}/a.png')
            info.size = len(png(0))
            tar.addfile(info, io.BytesIO(png(0)))
    content = (folder / 'cut.tar').read_bytes()
    (folder / 'cut.tar').write_bytes(content[: content.index(b'n02') + 200])
    return folder / 'cut.tar'


def broken_tar(folder: Path) -> Path:
    (folder / 'broken.tar').write_bytes(b'no tar at all' * 100)
    return folder / 'broken.tar'


def empty_tar(folder: Path) -> Path:
    tarfile.open(folder / 'empty.tar', 'w').close()
    return folder / 'empty.tar'


def empty_folder(folder: Path) -> Path:
    (folder / 'empty').mkdir()
    return folder / 'empty'


def no_classes(folder: Path) -> Path:
    (folder / 'flat').mkdir()
    (folder / 'flat' / 'a.png').write_bytes(png(0))
    return folder / 'flat'


def double_name(folder: Path) -> Path:
    for parent in ('x', 'y'):
        (folder / 'double' / parent / 'n01').mkdir(parents=True)
        (folder / 'double' / parent / 'n01' / 'a.png').write_bytes(png(0))
    return folder / 'double'


@pytest.mark.parametrize(
    'source, message',
    [
        (lambda folder: folder / 'nowhere', 'neither a folder nor a .tar file'),
        (broken_tar, 'cannot be read'),
        (cut_tar, 'is cut short'),
        (empty_tar, 'holds no images'),
        (empty_folder, 'holds no images'),
        (no_classes, 'is in no class'),
        (double_name, 'two images named a.png'),
    ],
)
def test_bad_source_is_refused_before_anything_is_written(tmp_path, run_main, source, message):
    with pytest.raises(UserError, match=message):
        run_main(source(tmp_path), tmp_path / 'dst')
    assert not (tmp_path / 'dst').exists()


def test_what_a_kill_left_half_written_is_removed_and_a_foreign_image_refused(imagenet, tmp_path, run_main):
    dst = tmp_path / 'subset'
    run_main(imagenet, dst, '--per-class', 5)
    (dst / 'train' / 'n01' / '.0123456789ab.png').write_bytes(png(1)[:10])
    run_main(imagenet, dst, '--per-class', 5)
    assert chosen(dst) == by_hand(0, 5)
    (dst / 'train' / 'n01' / 'mine.png').write_bytes(png(1))
    with pytest.raises(UserError, match='mine.png is not of this subset'):
        run_main(imagenet, dst, '--per-class', 5)
    assert (dst / 'train' / 'n01' / 'mine.png').exists()


@pytest.mark.parametrize('target', ['..', '../n02', '../..', 'loop'])
def test_links_that_loop_or_lead_to_other_classes_are_refused(imagenet, tmp_path, run_main, target):
    (imagenet / 'train' / 'n01' / 'loop').symlink_to(target)
    if target == 'loop':  # leads nowhere at all
        run_main(imagenet, tmp_path / 'dst', '--per-class', 5)
        assert chosen(tmp_path / 'dst') == by_hand(0, 5)
        return
    with pytest.raises(UserError, match='n01/loop is a link to a folder that is read anyway|n02/.* is a link'):
        run_main(imagenet, tmp_path / 'dst')
    assert not (tmp_path / 'dst').exists()


def test_a_looping_link_as_source_or_destination_is_one_line(imagenet, tmp_path, run_main):
    (tmp_path / 'loop').symlink_to('loop')
    with pytest.raises(UserError, match='loop is neither a folder nor a .tar file'):
        run_main(tmp_path / 'loop', tmp_path / 'dst')
    with pytest.raises(UserError, match='loop is a file or a broken link'):
        run_main(imagenet, tmp_path / 'loop')


def test_what_a_kill_left_beside_the_manifest_is_removed(imagenet, tmp_path, run_main):
    run_main(imagenet, tmp_path / 'dst', '--per-class', 1)
    before = sorted((tmp_path / 'dst').rglob('*'))
    (tmp_path / 'dst' / '.0123456789ab.json').write_text('half')
    run_main(imagenet, tmp_path / 'dst', '--per-class', 1)
    assert sorted((tmp_path / 'dst').rglob('*')) == before


def test_bad_number_or_place_is_refused(imagenet, tmp_path, run_main):
    with pytest.raises(UserError, match='--per-class must be at least 1, got 0'):
        run_main(imagenet, tmp_path / 'dst', '--per-class', 0)
    with pytest.raises(UserError, match='inside SRC'):
        run_main(imagenet, imagenet / 'train' / 'subset')


def test_bad_input_exits_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['make_imagenet_subset.py', str(tmp_path / 'nowhere'), str(tmp_path / 'dst')])
    with pytest.raises(SystemExit) as e:
        errors.run(make_imagenet_subset.main)
    assert e.value.code == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
