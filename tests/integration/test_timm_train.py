"""timm's real scripts on a small image folder, as a user runs them."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(
    not os.environ.get('TIMM_REPO'),
    reason=f"timm's scripts are not in its wheel: set TIMM_REPO to a checkout of timm v{timm.__version__}",
)

TRAIN = ('-m', 'timm_senetv2', 'train')
RECIPES = sorted((Path(__file__).parents[2] / 'scripts' / 'recipes').glob('*.yaml'))
CLASSES = 3
CPU = ('--device', 'cpu')
SMALL = ('--num-classes', str(CLASSES), '--workers', '0', '--batch-size', '12', *CPU)
CONSTANT = ('--sched', 'constant', '--warmup-epochs', '0', '--lr', '0.05')


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory) -> Path:
    """Three classes, eight training and six validation images each; the classes differ in colour, faintly."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('validation', 6)):
        for label in range(CLASSES):
            (folder / split / f'class{label}').mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (40, 40, 3))
                pixels[..., label] += 20
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f'class{label}' / f'{label}_{i}.png')
    return folder


def run(*command: str | Path) -> subprocess.CompletedProcess:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def run_script(name: str, *args: str | Path) -> subprocess.CompletedProcess:
    return run(sys.executable, *TRAIN, '--script', name, *args)


def train(image_folder: Path, output: Path, model: str, *args: str | Path) -> Path:
    """One epoch unless told otherwise; returns the folder with timm's summary and checkpoints."""
    run_script(
        'train',
        '--data-dir',
        image_folder,
        '--model',
        model,
        '--epochs',
        '1',
        *SMALL,
        '--output',
        output.parent,
        '--experiment',
        output.name,
        *args,
    )
    return output


def summary(output: Path) -> list[dict[str, float]]:
    with open(output / 'summary.csv', newline='') as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def load(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)  # timm's checkpoints hold its arguments


@pytest.fixture(scope='module')
def seanet(image_folder, tmp_path_factory) -> Path:
    return train(image_folder, tmp_path_factory.mktemp('seanet') / 'run', 'seanet20', *CONSTANT)


def check_epoch(output: Path, model: str) -> None:
    (row,) = summary(output)
    assert row['epoch'] == 0
    assert np.isfinite(row['train_loss'])
    checkpoint = load(output / 'last.pth.tar')
    assert checkpoint['arch'] == model
    torch.manual_seed(42)  # timm's default seed: the weights that training began with
    fresh = timm.create_model(model, num_classes=CLASSES)
    assert checkpoint['state_dict'].keys() == fresh.state_dict().keys()
    fc = next(name for name in fresh.state_dict() if name.endswith('se.fc1.weight'))
    assert not torch.equal(checkpoint['state_dict'][fc], fresh.state_dict()[fc])
    fresh.load_state_dict(checkpoint['state_dict'])


def test_one_epoch_of_seanet20(seanet):
    check_epoch(seanet, 'seanet20')


@pytest.mark.slow
@pytest.mark.parametrize('model', ['senetv2_resnet50', 'senextv2_50'])
def test_one_epoch(image_folder, tmp_path, model):
    check_epoch(train(image_folder, tmp_path / 'run', model, '--img-size', '64', *CONSTANT), model)


def test_validate_gives_the_accuracy_of_training(image_folder, seanet):
    result = run_script(
        'validate', '--data-dir', image_folder, '--model', 'seanet20', '--checkpoint', seanet / 'last.pth.tar', *SMALL
    )
    scores = json.loads(result.stdout.split('--result')[1])
    assert scores['top1'] == pytest.approx(summary(seanet)[0]['eval_top1'], abs=1e-3)
    assert scores['param_count'] == 16.19


@pytest.mark.slow
def test_resumed_training_equals_uninterrupted(image_folder, tmp_path):
    # one batch an epoch without augmentation: the order of the images does not matter
    args = ('--no-aug', '--batch-size', '24', *CONSTANT)
    through = train(image_folder, tmp_path / 'through', 'cifar_senetv2_resnet20', *args, '--epochs', '2')
    first = train(image_folder, tmp_path / 'first', 'cifar_senetv2_resnet20', *args)
    resumed = train(
        image_folder,
        tmp_path / 'resumed',
        'cifar_senetv2_resnet20',
        *args,
        '--epochs',
        '2',
        '--resume',
        first / 'last.pth.tar',
    )
    assert [row['epoch'] for row in summary(resumed)] == [1]
    expected, got = load(through / 'last.pth.tar'), load(resumed / 'last.pth.tar')
    before = load(first / 'last.pth.tar')
    assert got['epoch'] == expected['epoch'] == 1
    for name, tensor in expected['state_dict'].items():
        assert torch.allclose(got['state_dict'][name], tensor, rtol=1e-3, atol=1e-4), name
    assert not torch.allclose(before['state_dict']['conv1.weight'], got['state_dict']['conv1.weight'], atol=1e-3)


@pytest.mark.slow
def test_model_kwargs_amp_and_ema(image_folder, tmp_path):
    output = train(
        image_folder,
        tmp_path / 'run',
        'cifar_senetv2_resnet20',
        '--model-kwargs',
        'sae_cardinality=2',
        '--amp',
        '--amp-dtype',
        'bfloat16',
        '--channels-last',
        '--model-ema',
        '--model-ema-decay',
        '0.5',
    )
    checkpoint = load(output / 'last.pth.tar')
    plain, ema = checkpoint['state_dict'], checkpoint['state_dict_ema']
    shapes = {k: v.shape for k, v in plain.items()}
    assert shapes == {
        k: v.shape
        for k, v in timm.create_model('cifar_senetv2_resnet20', num_classes=CLASSES, sae_cardinality=2)
        .state_dict()
        .items()
    }
    assert shapes != {
        k: v.shape for k, v in timm.create_model('cifar_senetv2_resnet20', num_classes=CLASSES).state_dict().items()
    }
    assert all(v.dtype == torch.float32 for k, v in plain.items() if not k.endswith('num_batches_tracked'))
    assert ema.keys() == plain.keys()
    assert not torch.equal(ema['layer1.0.se.fc1.weight'], plain['layer1.0.se.fc1.weight'])

    validated = run_script(
        'validate',
        '--data-dir',
        image_folder,
        '--model',
        'cifar_senetv2_resnet20',
        '--model-kwargs',
        'sae_cardinality=2',
        '--checkpoint',
        output / 'last.pth.tar',
        '--use-ema',
        '--amp',
        '--amp-dtype',
        'bfloat16',
        '--channels-last',
        *SMALL,
    )
    scores = json.loads(validated.stdout.split('--result')[1])
    assert scores['top1'] == pytest.approx(summary(output)[0]['eval_top1'], abs=1e-3)


@pytest.mark.slow
def test_two_processes_train_one_model(image_folder, tmp_path):
    launcher = tmp_path / 'launcher.py'  # saves what each rank has when train.py has levelled the batch norms
    launcher.write_text(
        textwrap.dedent(f"""
        import os, runpy, sys
        import timm.utils
        from safetensors.torch import save_file

        level, rank = timm.utils.distribute_bn, os.environ['RANK']

        def tensors(model):
            return {{k.removeprefix('module.'): v.clone() for k, v in model.state_dict().items()}}

        def record(model, *args):
            save_file(tensors(model), f'{tmp_path}/before{{rank}}.safetensors')
            level(model, *args)
            save_file(tensors(model), f'{tmp_path}/after{{rank}}.safetensors')

        timm.utils.distribute_bn = record
        sys.argv.insert(1, 'train')
        runpy.run_module('timm_senetv2', run_name='__main__')
    """)
    )
    run(
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        launcher,
        '--data-dir',
        image_folder,
        '--model',
        'cifar_senetv2_resnet20',
        '--epochs',
        '1',
        *SMALL,
        '--batch-size',
        '6',
        '--output',
        tmp_path,
        '--experiment',
        'run',
    )
    ranks = [load_file(tmp_path / f'after{rank}.safetensors') for rank in range(2)]
    unlevelled = [load_file(tmp_path / f'before{rank}.safetensors') for rank in range(2)]
    assert not torch.equal(*(r['bn1.running_mean'] for r in unlevelled))  # each saw other images
    checkpoint = load(tmp_path / 'run' / 'last.pth.tar')['state_dict']
    assert checkpoint.keys() == ranks[0].keys() == ranks[1].keys()
    for name, tensor in checkpoint.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert torch.equal(ranks[0][name], tensor), name
    torch.manual_seed(42)
    fresh = timm.create_model('cifar_senetv2_resnet20', num_classes=CLASSES)
    assert not torch.equal(checkpoint['layer1.0.se.fc1.weight'], fresh.state_dict()['layer1.0.se.fc1.weight'])

    validated = run_script(
        'validate',
        '--data-dir',
        image_folder,
        '--model',
        'cifar_senetv2_resnet20',
        '--checkpoint',
        tmp_path / 'run' / 'last.pth.tar',
        *SMALL,
    )
    scores = json.loads(validated.stdout.split('--result')[1])
    assert scores['top1'] == pytest.approx(summary(tmp_path / 'run')[0]['eval_top1'], abs=1e-3)


@pytest.mark.slow
def test_plain_train_py_knows_the_models(image_folder, tmp_path):
    # the checkout's own timm is imported here: it stands beside train.py
    run(
        sys.executable,
        Path(os.environ['TIMM_REPO']) / 'train.py',
        '--data-dir',
        image_folder,
        '--model',
        'cifar_senetv2_resnet20',
        '--epochs',
        '1',
        *SMALL,
        '--workers',
        '1',
        '--output',
        tmp_path,
        '--experiment',
        'run',
    )
    assert load(tmp_path / 'run' / 'last.pth.tar')['arch'] == 'cifar_senetv2_resnet20'


@pytest.mark.slow
@pytest.mark.parametrize('model, size', [('seanet20', 32), ('senetv2_resnet50', 64)])
def test_onnx_export_agrees_with_torch(seanet, tmp_path, model, size):
    checkpoint = seanet / 'last.pth.tar'
    if model != 'seanet20':
        checkpoint = tmp_path / 'fresh.pth'
        torch.save(timm.create_model(model, num_classes=CLASSES).state_dict(), checkpoint)
    run_script(
        'onnx_export',
        tmp_path / 'model.onnx',
        '--model',
        model,
        '--num-classes',
        str(CLASSES),
        '--checkpoint',
        checkpoint,
        '--img-size',
        str(size),
    )
    images = torch.randn(1, 3, size, size)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    network = timm.create_model(model, num_classes=CLASSES, checkpoint_path=str(checkpoint)).eval()
    with torch.inference_mode():
        expected = network(images).numpy()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inference_and_benchmark(image_folder, seanet, tmp_path):
    run_script(
        'inference',
        '--data-dir',
        image_folder / 'validation',
        '--model',
        'seanet20',
        '--checkpoint',
        seanet / 'last.pth.tar',
        *SMALL,
        '--topk',
        '1',
        '--results-dir',
        tmp_path,
        '--results-file',
        'classes',
        '--results-format',
        'json',
    )
    with open(next(tmp_path.glob('classes*.json'))) as f:
        assert len(json.load(f)) == 6 * CLASSES

    result = run_script(
        'benchmark',
        '--model',
        'cifar_senetv2_resnet20',
        *CPU,
        '--batch-size',
        '2',
        '--bench',
        'inference',
        '--num-warm-iter',
        '1',
        '--num-bench-iter',
        '5',
    )
    assert json.loads(result.stdout.split('--result')[1])['infer_samples_per_sec'] > 0


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, '>u4').tobytes() + values.astype(np.uint8).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: p.stem)
def test_recipe_trains(image_folder, tmp_path, recipe):
    settings = yaml.safe_load(recipe.read_text())
    small = ['--epochs', '1', '--workers', '0', '--batch-size', '12', '--amp-dtype', 'bfloat16', *CPU]
    if settings.get('dataset') == 'torch/fashion_mnist':
        raw = tmp_path / 'FashionMNIST' / 'raw'
        raw.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for split in ('train', 't10k'):
            (raw / f'{split}-images-idx3-ubyte').write_bytes(idx(rng.integers(0, 256, (24, 28, 28))))
            (raw / f'{split}-labels-idx1-ubyte').write_bytes(idx(np.arange(24) % 10))
        data = ['--data-dir', tmp_path]
    else:
        data = ['--data-dir', image_folder, '--dataset', '', '--num-classes', str(CLASSES)]
        if 'seanet' not in recipe.stem:
            data += ['--img-size', '64']
    if 'aug_repeats' in settings:
        small += ['--aug-repeats', '0']  # its header says so for a single process
    if settings.get('pretrained'):  # what the tag would fetch: the weights of timm's SE-ResNet, here fresh ones
        torch.save(timm.create_model('seresnet50').state_dict(), tmp_path / 'se.pth')
        small += ['--pretrained-path', tmp_path / 'se.pth']
    run_script('train', '--config', recipe, *data, *small, '--output', tmp_path, '--experiment', 'run')
    (row,) = summary(tmp_path / 'run')
    assert np.isfinite(row['train_loss'])
    assert load(tmp_path / 'run' / 'last.pth.tar')['arch'] == settings['model']
