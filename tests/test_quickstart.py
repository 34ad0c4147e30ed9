import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quickstart
import reproduce
import timm
import torch
from interpreters import command
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from experiments.data import load_dataset
from timm_senetv2.errors import UserError

SCRIPT = Path(quickstart.__file__)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory, interpreters):
    """What one epoch of the small CNN on digits wrote and said."""
    out = tmp_path_factory.mktemp('quickstart') / 'out'
    done = interpreters.run(command([SCRIPT, '--models', 'small_cnn', '--epochs', '1', '--out', out]))
    assert done.returncode == 0, done.stderr
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
    assert not model.pretrained_cfg.get('license')  # nobody has said it
    assert 'num_classes' not in json.loads((out / 'small_cnn' / 'config.json').read_text()).get('model_args', {})
    transform = create_transform(**resolve_model_data_config(model))
    test = load_dataset('digits').test
    with torch.inference_mode():
        predicted = model(torch.stack([transform(image) for image, _ in test])).argmax(1)
    (row,) = csv.DictReader((out / 'results.csv').open())
    assert 100 * (predicted == torch.tensor(test.targets)).float().mean() == pytest.approx(
        float(row['test_accuracy']), abs=0.3
    )  # one image of 450: another batch size rounds otherwise


@pytest.fixture
def no_picture(monkeypatch):
    """Leave out the picture, which takes longer than an epoch."""
    monkeypatch.setattr('experiments.quickstart.plot_quickstart', lambda *_: b'')


def test_same_seed_gives_the_same_result_whatever_else_is_trained(folder, tmp_path, no_picture):
    args = ['--dataset', str(folder), '--epochs', '1', '--out']
    quickstart.main([*args, str(tmp_path / 'a'), '--models', 'small_saecnn'])
    quickstart.main([*args, str(tmp_path / 'b'), '--models', 'small_cnn', 'small_saecnn'])
    quickstart.main([*args, str(tmp_path / 'c'), '--models', 'small_saecnn', '--seed', '1'])
    a, b, c = ((tmp_path / x / 'small_saecnn' / 'model.safetensors').read_bytes() for x in 'abc')
    assert a == b
    assert a != c


def test_image_folder_is_learnt_and_replaces_the_last_run(folder, tmp_path, capsys, no_picture):
    out = tmp_path / 'out'
    args = ['--dataset', str(folder), '--out', str(out), '--models', 'cifar_resnet20']
    quickstart.main([*args, '--epochs', '1'])
    quickstart.main([*args, '--epochs', '20'])
    assert [p.name for p in tmp_path.iterdir()] == ['out']
    rows = list(csv.DictReader((out / 'results.csv').open()))
    assert len(rows) == 20 and float(rows[-1]['test_accuracy']) == 100
    assert 'labelled red' in capsys.readouterr().out


def test_interrupted_run_leaves_the_last_one_alone(digits_run, tmp_path, interpreters):
    out = tmp_path / 'out'
    shutil.copytree(digits_run[0], out)
    before = snapshot(out)

    process = interpreters.start(command([SCRIPT, '--models', 'small_cnn', '--epochs', '1000', '--out', out]))
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert 'Traceback' not in process.stderr
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_killed_run_is_cleaned_up_by_the_next(folder, tmp_path, interpreters, no_picture):
    args = ['--dataset', str(folder), '--models', 'small_cnn', '--out', str(tmp_path / 'out')]
    process = interpreters.start(command([SCRIPT, *args, '--epochs', '1000']))
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'out').exists()
    quickstart.main([*args, '--epochs', '1'])
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_help_needs_nothing_installed(tmp_path):
    done = subprocess.run([sys.executable, '-S', SCRIPT, '--help'], capture_output=True, text=True)
    assert done.returncode == 0
    for option in ('--epochs', '--models', '--seed', '--out', '--data-dir', '--dataset'):
        assert option in done.stdout


def test_bad_input_is_one_plain_line_and_exit_code_2(tmp_path, interpreters):
    done = interpreters.run(command([SCRIPT, '--models', 'cifar_senetv2_resnet21', '--out', tmp_path / 'out']))
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


def test_numbers_are_those_of_reproduce_py(digits_run, tmp_path):
    """One training loop and one data path: the same settings give the same digits."""
    reproduce.main(
        ['--dataset', 'digits', '--batch-size', '64', '--epochs', '1', '--channels-last', '--device', 'cpu']
        + ['--models', 'small_cnn', '--out', str(tmp_path / 'out')]
    )
    (expected,) = csv.DictReader((tmp_path / 'out' / 'curves.csv').open())
    (row,) = csv.DictReader((digits_run[0] / 'results.csv').open())
    assert float(row['test_accuracy']) == pytest.approx(float(expected['accuracy']), abs=0.3)  # threads may differ
    assert float(row['train_loss']) == pytest.approx(float(expected['train_loss']), abs=1e-3)


@pytest.mark.parametrize('name', [b'$a_{$', b'caf\xe9', b'two\nlines', '漢字'.encode()])
def test_any_name_of_a_class_can_be_drawn_and_said(folder, tmp_path, name, capsys):
    images = tmp_path / 'images'
    shutil.copytree(folder, images)
    os.rename(images / 'red', os.path.join(os.fsencode(images), name))
    quickstart.main(
        ['--dataset', str(images), '--models', 'small_cnn', '--epochs', '1', '--out', str(tmp_path / 'out')]
    )
    captured = capsys.readouterr()
    assert 'could not be made' not in captured.err and 'quickstart.png' in captured.out
    assert (tmp_path / 'out' / 'quickstart.png').stat().st_size > 10_000
    model = timm.create_model(f'local-dir:{tmp_path / "out" / "small_cnn"}', pretrained=True)
    assert len(model.pretrained_cfg['label_names']) == 2


def test_a_picture_that_fails_costs_nothing_else(folder, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError('no font for this')

    monkeypatch.setattr('experiments.quickstart.plot_quickstart', fail)
    out = tmp_path / 'out'
    quickstart.main(['--dataset', str(folder), '--models', 'small_cnn', '--epochs', '1', '--out', str(out)])
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == 'warning: quickstart.png could not be made: no font for this'
    assert 'local-dir:' in captured.out and 'quickstart.png' not in captured.out
    assert (out / 'results.csv').is_file() and (out / 'small_cnn' / 'model.safetensors').is_file()


def test_a_closed_pipe_loses_nothing(folder, tmp_path, interpreters):
    args = ['--dataset', folder, '--models', 'small_cnn', 'small_secnn', '--epochs', '1', '--out', tmp_path / 'out']
    closed = 'import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n'
    done = interpreters.run(closed + command([SCRIPT, *args]))
    assert done.returncode == 0, done.stderr
    assert 'Error' not in done.stderr
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {
        '.timm-senetv2.json',
        'quickstart.png',
        'results.csv',
        'small_cnn',
        'small_secnn',
    }


@pytest.mark.parametrize(
    'make, says',
    [
        (lambda out: (out / 'results.csv').write_text('format,run\n'), 'was not written by quickstart.py'),
        (lambda out: (out / 'thesis.tex').write_text('precious'), 'was not written by quickstart.py'),
        (
            lambda out: (out / '.timm-senetv2.json').write_text('{"tool": "reproduce.py"}'),
            'was written by reproduce.py, not by quickstart.py',
        ),
    ],
)
def test_a_folder_that_this_script_did_not_write_is_not_replaced(folder, tmp_path, make, says):
    out = tmp_path / 'out'
    out.mkdir()
    make(out)
    for name in ('out.previous', 'out.unfinished'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'thesis.tex').write_text('precious')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=says):
        quickstart.main(['--dataset', str(folder), '--models', 'small_cnn', '--epochs', '1', '--out', str(out)])
    assert snapshot(tmp_path) == before


def test_a_file_of_the_users_in_our_folder_is_not_removed(digits_run, folder, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(digits_run[0], out)
    (out / 'thesis.tex').write_text('precious')
    before = snapshot(out)
    with pytest.raises(UserError, match='holds thesis.tex, which quickstart.py did not write'):
        quickstart.main(['--dataset', str(folder), '--models', 'small_cnn', '--epochs', '1', '--out', str(out)])
    assert snapshot(out) == before


def test_files_have_the_permissions_of_new_files(digits_run):
    umask = os.umask(0)
    os.umask(umask)
    files = [p for p in digits_run[0].rglob('*') if p.is_file()]
    assert files and {p.stat().st_mode & 0o777 for p in files} == {0o666 & ~umask}


def test_the_root_and_a_looping_link_are_refused(folder, tmp_path):
    (tmp_path / 'loop').symlink_to('loop')
    for out in ('/', str(tmp_path / 'loop')):
        with pytest.raises(UserError):
            quickstart.main(['--dataset', str(folder), '--models', 'small_cnn', '--epochs', '1', '--out', out])


def test_a_missing_package_is_one_line_before_anything_is_done(tmp_path):
    done = subprocess.run(
        [sys.executable, '-S', SCRIPT, '--out', tmp_path / 'out'], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1
    assert 'pip install -e ".[experiments]"' in done.stderr
