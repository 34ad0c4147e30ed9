import csv
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quickstart
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from experiments.data import load_dataset
from timm_senetv2.errors import UserError

SCRIPT = Path(quickstart.__file__)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    """What one epoch of the small CNN on digits wrote and said."""
    out = tmp_path_factory.mktemp('quickstart') / 'out'
    done = subprocess.run(
        [sys.executable, SCRIPT, '--models', 'small_cnn', '--epochs', '1', '--out', out],
        capture_output=True,
        text=True,
        check=True,
    )
    return out, done.stdout


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An image folder of two classes, told apart by their colour."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for channel, name in enumerate(('blue', 'red')):
        (root / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 80, (40, 36, 3), dtype=np.uint8)
            pixels[..., 2 - 2 * channel] += 150
            Image.fromarray(pixels).save(root / name / f'{i}.png')
    return root


def test_run_writes_a_model_a_table_and_a_picture(digits_run):
    out, text = digits_run
    assert sorted(snapshot(out)) == [
        '.timm-senetv2.json',
        'quickstart.png',
        'results.csv',
        'small_cnn/config.json',
        'small_cnn/model.safetensors',
    ]
    with Image.open(out / 'quickstart.png') as picture:
        assert picture.width > 1000 and len(np.unique(picture.convert('L').resize((64, 64)))) > 20
    (row,) = csv.DictReader((out / 'results.csv').open())
    assert row['model'] == 'small_cnn' and row['parameters'] == '104042'
    assert f'{float(row["test_accuracy"]):.2f} %' in text and '104,042' in text


def test_saved_model_has_the_accuracy_the_table_says(digits_run):
    """Loaded and fed by hand, image by image, from what was saved alone."""
    out, _ = digits_run
    model = timm.create_model(f'local-dir:{out / "small_cnn"}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == [str(i) for i in range(10)]
    transform = create_transform(**resolve_model_data_config(model))
    test = load_dataset('digits').test
    with torch.inference_mode():
        predicted = model(torch.stack([transform(image) for image, _ in test])).argmax(1)
    (row,) = csv.DictReader((out / 'results.csv').open())
    assert 100 * (predicted == torch.tensor(test.targets)).float().mean() == pytest.approx(
        float(row['test_accuracy']), abs=0.3
    )  # one image of 450: another batch size rounds otherwise


def test_same_seed_gives_the_same_result_whatever_else_is_trained(folder, tmp_path):
    args = ['--dataset', str(folder), '--epochs', '1', '--out']
    quickstart.main([*args, str(tmp_path / 'a'), '--models', 'small_saecnn'])
    quickstart.main([*args, str(tmp_path / 'b'), '--models', 'small_cnn', 'small_saecnn'])
    quickstart.main([*args, str(tmp_path / 'c'), '--models', 'small_saecnn', '--seed', '1'])
    a, b, c = ((tmp_path / x / 'small_saecnn' / 'model.safetensors').read_bytes() for x in 'abc')
    assert a == b
    assert a != c


def test_image_folder_is_learnt_and_replaces_the_last_run(folder, tmp_path, capsys):
    out = tmp_path / 'out'
    args = ['--dataset', str(folder), '--out', str(out), '--models', 'cifar_resnet20']
    quickstart.main([*args, '--epochs', '1'])
    quickstart.main([*args, '--epochs', '20'])
    assert [p.name for p in tmp_path.iterdir()] == ['out']
    rows = list(csv.DictReader((out / 'results.csv').open()))
    assert len(rows) == 20 and float(rows[-1]['test_accuracy']) == 100
    assert 'labelled red' in capsys.readouterr().out


def test_interrupted_run_leaves_the_last_one_alone(digits_run, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(digits_run[0], out)
    before = snapshot(out)

    process = subprocess.Popen(
        [sys.executable, SCRIPT, '--models', 'small_cnn', '--epochs', '1000', '--out', out],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # a background job of a shell without job control inherits that Ctrl-C is ignored; nobody could interrupt it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Traceback' not in errors
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_killed_run_is_cleaned_up_by_the_next(folder, tmp_path):
    args = ['--dataset', str(folder), '--models', 'small_cnn', '--out', str(tmp_path / 'out')]
    process = subprocess.Popen([sys.executable, SCRIPT, *args, '--epochs', '1000'], stdout=subprocess.DEVNULL)
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not (tmp_path / 'out').exists()
    quickstart.main([*args, '--epochs', '1'])
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_help_needs_nothing_installed(tmp_path):
    done = subprocess.run([sys.executable, '-S', SCRIPT, '--help'], capture_output=True, text=True)
    assert done.returncode == 0
    for option in ('--epochs', '--models', '--seed', '--out', '--data-dir', '--dataset'):
        assert option in done.stdout


def test_bad_input_is_one_plain_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, '--models', 'cifar_senetv2_resnet21', '--out', tmp_path / 'out'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown model 'cifar_senetv2_resnet21'; did you mean")
    assert 'cifar_senetv2_resnet20' in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'args, culprit',
    [
        (['--dataset', 'no/such/folder'], 'no/such/folder'),
        (['--epochs', '0'], '--epochs'),
        (['--seed', '-1'], '--seed'),
    ],
)
def test_bad_input_names_the_culprit(args, culprit, tmp_path):
    with pytest.raises(UserError, match=culprit):
        quickstart.main([*args, '--models', 'small_cnn', '--out', str(tmp_path / 'out')])
    assert not list(tmp_path.iterdir())


def test_folder_without_classes_is_refused(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='empty'):
        quickstart.main(['--dataset', str(tmp_path / 'empty'), '--out', str(tmp_path / 'out')])
    assert [p.name for p in tmp_path.iterdir()] == ['empty']


def test_unwritable_out_is_refused(folder, tmp_path):
    (tmp_path / 'file').touch()
    for out in (tmp_path / 'file', tmp_path / 'file' / 'out'):
        with pytest.raises(UserError, match='file'):
            quickstart.main(['--dataset', str(folder), '--models', 'small_cnn', '--out', str(out)])


def test_folder_with_other_things_in_it_is_not_replaced(folder, tmp_path):
    (tmp_path / 'thesis.txt').write_text('precious')
    with pytest.raises(UserError, match='was not written by quickstart.py'):
        quickstart.main(['--dataset', str(folder), '--models', 'small_cnn', '--out', str(tmp_path)])
    assert (tmp_path / 'thesis.txt').read_text() == 'precious'


def test_corrupt_image_is_named_and_nothing_is_left(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'images')
    broken = tmp_path / 'images' / 'red' / '3.png'
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=str(broken)):
        quickstart.main(
            [
                '--dataset',
                str(tmp_path / 'images'),
                '--models',
                'small_cnn',
                '--epochs',
                '1',
                '--out',
                str(tmp_path / 'out'),
            ]
        )
    assert [p.name for p in tmp_path.iterdir()] == ['images']
