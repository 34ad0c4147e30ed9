"""timm's own train.py with WebDataset shards, with a folder of Hugging Face's `datasets`, and with a teacher."""

import csv
import io
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import timm
from integrations import environment, need, record
from PIL import Image

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not os.environ.get('TIMM_REPO'),
        reason=f"timm's train.py is not in its wheel: set TIMM_REPO to a checkout of timm v{timm.__version__}",
    ),
]
NAME, CLASSES, SHARDS, EPOCHS = 'cifar_senetv2_resnet20', 3, 2, 6
COUNTS = dict(train=16, validation=8)  # images of a class


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """The same images in `images/SPLIT/CLASS/` and in `shards/SPLIT-0000?.tar`; the class is the brightest colour."""
    folder = tmp_path_factory.mktemp('readers')
    rng = np.random.default_rng(0)
    (folder / 'shards').mkdir()
    for split, count in COUNTS.items():
        tars = [tarfile.open(folder / 'shards' / f'{split}-0000{i}.tar', 'w') for i in range(SHARDS)]
        for number in range(count * CLASSES):
            label = number % CLASSES
            pixels = rng.integers(0, 160, (32, 32, 3))
            pixels[..., label] += 90
            path = folder / 'images' / split / f'class{label}' / f'{number:03}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            for suffix, content in (('png', path.read_bytes()), ('cls', str(label).encode())):
                member = tarfile.TarInfo(f'{number:03}.{suffix}')
                member.size = len(content)
                tars[number % SHARDS].addfile(member, io.BytesIO(content))
        for tar in tars:
            tar.close()
    return folder


def command(folder: Path, *arguments: object) -> None:
    """Run `timm-senetv2 ARGUMENTS` in a process of its own, without a network."""
    done = subprocess.run(
        [sys.executable, '-m', 'timm_senetv2', *map(str, arguments)],
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f'{done.stdout[-2000:]}\n{done.stderr[-4000:]}'


def train(folder: Path, *arguments: object) -> list[dict[str, float]]:
    """Train for some epochs; returns the rows of train.py's summary."""
    shutil.rmtree(folder / 'run', ignore_errors=True)
    command(
        folder,
        'train',
        *('--model', NAME, '--num-classes', CLASSES, '--epochs', EPOCHS, '--batch-size', 12, '--workers', 0),
        *('--device', 'cpu', '--no-aug', '--sched', 'constant', '--warmup-epochs', 0, '--lr', 0.05),
        *('--output', folder, '--experiment', 'run', *arguments),
    )
    with open(folder / 'run' / 'summary.csv', newline='') as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def learned(rows: list[dict[str, float]], top1: float = 90) -> str:
    losses = [row['train_loss'] for row in rows]
    assert losses[-1] < 0.5 * losses[0], losses
    assert rows[-1]['eval_top1'] > top1, rows[-1]  # so images and labels belong together; one in three by chance
    return f'loss {losses[0]:.2f} to {losses[-1]:.2f} in {EPOCHS} epochs, top-1 {rows[-1]["eval_top1"]:.0f} %'


def of_reader(data: Path, reader: str) -> list[object]:
    if reader == 'wds':
        shards = {split: f'{split}-{{00000..{SHARDS - 1:05}}}.tar|{count * CLASSES}' for split, count in COUNTS.items()}
        splits = ['--train-split', shards['train'], '--val-split', shards['validation']]
        return ['--data-dir', data / 'shards', '--dataset', 'wds/colours', *splits]
    return ['--dataset', f'hfds/{data / "images"}', '--train-split', 'train', '--val-split', 'validation']


@pytest.mark.parametrize(
    'reader, library, dataset', [('wds', 'webdataset', 'wds/NAME'), ('hfds', 'datasets', 'hfds/FOLDER')]
)
def test_train_py_learns_from_the_reader(reader, library, dataset, data, tmp_path):
    need(library, library)
    result = learned(train(tmp_path, *of_reader(data, reader)))
    record('consumer', library, version(library), f'timm-senetv2 train --dataset {dataset}', NAME, result)


def test_train_py_distils_from_a_teacher_of_ours(data, tmp_path):
    """The teacher is the folder that `push` writes; its logits alone teach the student."""
    folder = ['--data-dir', data / 'images']
    learned(train(tmp_path, *folder))
    checkpoint = (tmp_path / 'run' / 'last.pth.tar').rename(tmp_path / 'teacher.pth.tar')
    command(
        tmp_path,
        *('push', '--model', NAME, '--checkpoint', checkpoint, '--repo-id', 'me/teacher', '--license', 'mit'),
        *('--dry-run', tmp_path / 'teacher'),
    )
    teacher = ['--kd-model-name', f'local-dir:{tmp_path / "teacher"}', '--task-loss-weight', 0]
    options = ['--distill-loss-weight', 1, '--lr', 0.01, '--seed', 1]
    result = learned(train(tmp_path, *folder, *teacher, *options), top1=50)  # it never sees a label
    call = 'timm-senetv2 train --kd-model-name local-dir:FOLDER --task-loss-weight 0'
    record('consumer', 'timm', version('timm'), call, NAME, result)
