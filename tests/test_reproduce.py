import csv
import math
import os
import re
import shutil
import signal
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pytest
import reproduce
import timm
import torch
from interpreters import command
from PIL import Image
from reliability import processes
from scipy.optimize import brentq
from scipy.special import betainc
from timm.data import create_transform
from timm.utils import CheckpointSaver

from experiments import batches as batches_module
from experiments import grid
from experiments.batches import Batches, LoaderBatches, MemoryBatches
from experiments.data import ArrayImages, load_dataset
from experiments.files import RESULTS, owned, read_rows, write_csv
from experiments.settings import Settings, make_settings, parse_specs
from experiments.statistics import difference
from experiments.tables import table
from experiments.training import make_optimizer
from experiments.warm_start import build
from timm_senetv2 import errors
from timm_senetv2.errors import UserError

SCRIPT = Path(reproduce.__file__)
DIGITS = ['--dataset', 'digits', '--image-size', '8', '--crop-padding', '1', '--batch-size', '16']
SMALL = [*DIGITS, '--limit', '48', '--models', 'small_cnn', 'small_saecnn:sae_reduction=8', '--device', 'cpu']
MEASURED = ('seconds', 'command')


def rows(out: Path, name: str = 'results.csv') -> list[dict[str, str]]:
    with (out / name).open(newline='') as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
    """Two models, two seeds, three epochs, never interrupted."""
    out = tmp_path_factory.mktemp('finished')
    reproduce.main([*SMALL, '--seeds', '0', '1', '--epochs', '3', '--out', str(out), '--save-weights'])
    return out


def test_one_row_a_run_with_final_and_best_accuracy(finished):
    results, curves = rows(finished), rows(finished, 'curves.csv')
    assert [(row['model'], row['seed']) for row in results] == [
        (model, seed) for seed in '01' for model in ('small_cnn', 'small_saecnn:sae_reduction=8')
    ]
    for row in results:
        epochs = [float(c['accuracy']) for c in curves if c['run'] == row['run']]
        assert len(epochs) == 3
        assert float(row['accuracy']) == epochs[-1]
        assert float(row['best_accuracy']) == max(epochs)
        assert epochs[int(row['best_epoch']) - 1] == max(epochs)
    model = timm.create_model('small_saecnn', sae_reduction=8)
    assert int(results[1]['parameters']) == sum(p.numel() for p in model.parameters())
    assert results[0]['torch'] == torch.__version__


def test_a_model_learns_a_whole_set(tmp_path):
    arguments = [*DIGITS, '--batch-size', '64', '--device', 'cpu']
    reproduce.main([*arguments, '--models', 'small_saecnn', '--epochs', '4', '--out', str(tmp_path)])
    (row,) = rows(tmp_path)
    assert float(row['accuracy']) > 90


def test_saved_weights_have_the_accuracy_that_was_written_down(finished):
    data = load_dataset('digits', limit=48)
    transform = create_transform((3, 8, 8), mean=data.mean, std=data.std, interpolation='bilinear', crop_pct=1.0)
    images = torch.stack([transform(image) for image, _ in data.test])
    for row in rows(finished):
        (spec,) = parse_specs(row['model'])
        model = build(spec, 10).eval()
        timm.models.load_checkpoint(model, str(finished / 'weights' / row['run'] / 'model.safetensors'))
        with torch.inference_mode():
            correct = (model(images).argmax(1) == torch.tensor(data.test.targets)).float().mean().item()
        assert 100 * correct == pytest.approx(float(row['accuracy']), abs=1e-3)


def test_a_seed_repeats_itself_and_two_seeds_differ(finished, tmp_path):
    reproduce.main([*SMALL, '--seeds', '1', '--epochs', '3', '--out', str(tmp_path)])
    assert rows(tmp_path) == [row for row in rows(finished) if row['seed'] == '1']
    curves = rows(finished, 'curves.csv')
    assert rows(tmp_path, 'curves.csv') == [row for row in curves if row['seed'] == '1']
    losses = {seed: [row['train_loss'] for row in curves if row['seed'] == seed] for seed in '01'}
    assert not set(losses['0']) & set(losses['1'])


def test_finished_runs_are_not_repeated(finished, monkeypatch):
    monkeypatch.setattr(grid, 'train', lambda *_: pytest.fail('trained again'))
    before = rows(finished)
    reproduce.main([*SMALL, '--seeds', '0', '1', '--epochs', '3', '--out', str(finished)])
    assert rows(finished) == before


@pytest.fixture(scope='module', params=[[], ['--ema-decay', '0.9', '--amp']], ids=['plain', 'ema amp'])
def uninterrupted(request, tmp_path_factory):
    """Arguments, and the folder of what they made."""
    whole = tmp_path_factory.mktemp('whole')
    arguments = [*SMALL, '--epochs', '3', '--seeds', '0', *request.param, '--out']
    reproduce.main([*arguments, str(whole)])
    return arguments, whole


@pytest.mark.parametrize('moment', ['before the checkpoint', 'between unlink and rename', 'after the checkpoint'])
def test_interrupted_and_started_again_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch, moment):
    arguments, whole = uninterrupted
    save, calls = CheckpointSaver.save_checkpoint, []

    def interrupted(saver, epoch, metric):
        calls.append(epoch)
        if len(calls) == 5:  # the second epoch of the second run
            if moment == 'after the checkpoint':
                save(saver, epoch, metric)
            elif moment == 'between unlink and rename':
                save(saver, epoch, metric)
                folder = Path(saver.checkpoint_dir)
                os.replace(folder / 'last.pth.tar', folder / 'tmp.pth.tar')
            raise KeyboardInterrupt
        return save(saver, epoch, metric)

    monkeypatch.setattr(CheckpointSaver, 'save_checkpoint', interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main([*arguments, str(tmp_path / 'parts')])
    assert rows(tmp_path / 'parts') == rows(whole)[:1]
    reproduce.main([*arguments, str(tmp_path / 'parts')])
    assert calls[5:] == ([1, 2] if moment == 'before the checkpoint' else [2])
    assert rows(tmp_path / 'parts') == rows(whole)
    assert rows(tmp_path / 'parts', 'curves.csv') == rows(whole, 'curves.csv')


def test_killed_and_started_again_equals_uninterrupted(finished, tmp_path, interpreters):
    arguments = [*SMALL, '--seeds', '0', '1', '--epochs', '3', '--out', str(tmp_path), '--save-weights']
    process = interpreters.start(command([SCRIPT, *arguments]))
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob('runs/small_saecnn*/history.csv')) and not (tmp_path / 'table.md').exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reproduce.main(arguments)
    assert rows(tmp_path) == rows(finished)
    assert rows(tmp_path, 'curves.csv') == rows(finished, 'curves.csv')


def test_a_second_process_on_the_same_folder_is_refused_in_one_line(finished, tmp_path, interpreters):
    arguments = [*SMALL, '--seeds', '0', '1', '--epochs', '3', '--out', str(tmp_path / 'out')]
    with owned(tmp_path / 'out'):
        second = interpreters.run(command([SCRIPT, *arguments]))
        assert second.returncode == 2
        assert second.stderr.startswith('error: another process is writing ')
        assert len(second.stderr.splitlines()) == 1
        assert not (tmp_path / 'out' / 'results.csv').exists()
    reproduce.main(arguments)
    assert rows(tmp_path / 'out') == rows(finished)


def test_an_executor_may_make_the_runs_anywhere_and_in_any_order(finished, tmp_path):
    """What an engine for many machines does: a process a run, given the job and the run alone."""

    def elsewhere(runs, job, batches, source, bar):
        with ProcessPoolExecutor(2, mp_context=processes.context()) as pool:
            for future in as_completed([pool.submit(make_alone, run, job, batches, source) for run in reversed(runs)]):
                yield future.result()

    args = reproduce.parse_args([*SMALL, '--seeds', '0', '1', '--epochs', '3', '--out', str(tmp_path)])
    job = grid.Job(make_settings(vars(args)), tmp_path, command='')
    text = grid.reproduce(args.models, args.seeds, job, executor=elsewhere)
    assert rows(tmp_path) == rows(finished)
    assert rows(tmp_path, 'curves.csv') == rows(finished, 'curves.csv')
    assert table(read_rows(tmp_path / 'results.csv', RESULTS), 'small_cnn') in text


def make_alone(run, job, batches, source):
    return grid.make_run(run, job, batches, source, lambda done, history: None)


def settings(**changes) -> Settings:
    arguments = reproduce.parse_args(['--models', 'small_cnn', '--dataset', 'digits', '--out', 'x', '--device', 'cpu'])
    return Settings(**{**vars(make_settings(vars(arguments))), **changes})


def test_batches_from_memory_are_crops_and_flips_of_every_image_once():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(1, 256, (10, 6, 6, 3), dtype=np.uint8))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    batches = MemoryBatches(
        images, torch.arange(10), settings(batch_size=5, crop_padding=2, hflip=True), mean, std, training=True
    )
    shift = torch.tensor(mean).view(3, 1, 1)
    scale = torch.tensor(std).view(3, 1, 1)
    seen, moved, flipped = [], 0, 0
    for epoch in range(4):
        for batch, targets in batches.batches(epoch):
            for image, target in zip(batch, targets, strict=True):
                padded = torch.nn.functional.pad(images[target].permute(2, 0, 1), (2, 2, 2, 2))
                crops = {
                    (y, x, flip): (crop.flip(2) if flip else crop)
                    for y in range(5)
                    for x in range(5)
                    for flip in (False, True)
                    for crop in [padded[:, y : y + 6, x : x + 6]]
                }
                found = [
                    key for key, crop in crops.items() if torch.allclose(image, (crop / 255 - shift) / scale, atol=1e-5)
                ]
                assert len(found) == 1
                moved += found[0][:2] != (2, 2)
                flipped += found[0][2]
                seen.append(target.item())
        assert sorted(seen[-10:]) == list(range(10))
    assert moved > 20 and 5 < flipped < 35
    assert seen[:10] != seen[10:20]


@pytest.mark.parametrize('read_at_once', [256, 6])
def test_test_batches_are_what_timms_transform_gives(monkeypatch, read_at_once):
    monkeypatch.setattr(batches_module, 'READ_AT_ONCE', read_at_once)
    data = load_dataset('digits', limit=20)
    batches = Batches(data, settings(image_size=20, batch_size=8), workers=0)
    _, test = batches.of(timm.create_model('small_cnn'))
    transform = create_transform((3, 20, 20), mean=data.mean, std=data.std, interpolation='bilinear', crop_pct=1.0)
    expected = torch.stack([transform(image) for image, _ in ArrayImages(data.test.images, data.test.targets)])
    torch.testing.assert_close(torch.cat([images for images, _ in test.batches(0)]), expected)


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (('train', 6), ('val', 2)):
        for label in ('ant', 'bee'):
            (tmp_path / 'images' / split / label).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(256, size=(12, 14, 3), dtype=np.uint8))
                image.save(tmp_path / 'images' / split / label / f'{i}.png')
    return tmp_path / 'images'


@pytest.mark.parametrize('fits', [True, False], ids=['in memory', 'by the loader'])
def test_an_image_folder_trains_the_same_with_any_workers_and_resumes(folder, tmp_path, monkeypatch, fits):
    if not fits:
        monkeypatch.setattr(batches_module, 'MEMORY_LIMIT', 0)
    arguments = [
        '--dataset',
        str(folder),
        '--image-size',
        '8',
        '--models',
        'small_cnn',
        '--epochs',
        '2',
        '--batch-size',
        '4',
        '--device',
        'cpu',
        '--workers',
        '0',
        '--out',
    ]
    used = []
    init = LoaderBatches.__init__
    monkeypatch.setattr(LoaderBatches, '__init__', lambda self, *args: (used.append(self), init(self, *args))[1])
    reproduce.main([*arguments, str(tmp_path / 'whole')])
    assert len(used) == (0 if fits else 2)
    reproduce.main([*arguments, str(tmp_path / 'workers'), '--workers', '2'])
    assert rows(tmp_path / 'workers', 'curves.csv') == rows(tmp_path / 'whole', 'curves.csv')
    save = CheckpointSaver.save_checkpoint

    def interrupted(saver, epoch, metric):
        save(saver, epoch, metric)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSaver, 'save_checkpoint', interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce.main([*arguments, str(tmp_path / 'parts')])
    reproduce.main([*arguments, str(tmp_path / 'parts')])
    assert rows(tmp_path / 'parts', 'curves.csv') == rows(tmp_path / 'whole', 'curves.csv')


@pytest.mark.parametrize('dataset', ['digits', 'folder'])
def test_all_models_of_a_grid_get_the_same_pixels(folder, monkeypatch, dataset):
    """timm's configs of these two want other interpolations and crops of the same image."""
    monkeypatch.setattr(batches_module, 'MEMORY_LIMIT', 0 if dataset == 'folder' else 2**30)
    data = load_dataset('digits', limit=20) if dataset == 'digits' else load_dataset(str(folder))
    seen = []
    for name in ('resnet50', 'senetv2_resnet50', 'cifar_resnet20'):
        batches = Batches(data, settings(image_size=12, batch_size=4), workers=0)
        for part in batches.of(timm.create_model(name)):
            seen.append(torch.cat([images for images, _ in part.batches(3)]))
    for training, test in zip(seen[2::2], seen[3::2], strict=True):
        assert torch.equal(training, seen[0]) and torch.equal(test, seen[1])


def test_the_loaders_augmentation_is_of_epoch_and_image(folder, monkeypatch):
    monkeypatch.setattr(batches_module, 'MEMORY_LIMIT', 0)
    data = load_dataset(str(folder))
    training, _ = Batches(data, settings(image_size=8, batch_size=12, crop_padding=4), 0).of(
        timm.create_model('small_cnn')
    )
    ((one, _),) = training.batches(0)
    ((again, _),) = training.batches(0)
    ((other, _),) = training.batches(1)
    assert torch.equal(one, again)
    assert not torch.equal(one.sum((1, 2, 3)).sort().values, other.sum((1, 2, 3)).sort().values)
    before = torch.get_rng_state()
    training.images[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_protocols_are_the_papers():
    def built(protocol: str):
        args = reproduce.parse_args(
            ['--models', 'small_cnn', '--dataset', 'cifar10', '--out', 'x', '--protocol', protocol]
        )
        chosen = make_settings(vars(args))
        model = timm.create_model('cifar_resnet20')
        return chosen, make_optimizer(model, chosen, updates=10)

    chosen, (optimizer, scheduler) = built('seanet')
    assert (chosen.epochs, chosen.batch_size, chosen.crop_padding, chosen.hflip) == (200, 64, 4, True)
    assert type(optimizer) is torch.optim.SGD
    assert {(g['momentum'], g['weight_decay'], g['nesterov']) for g in optimizer.param_groups} == {(0.9, 1e-4, False)}
    rates = []
    for epoch in range(200):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates == pytest.approx([0.1] * 80 + [0.01] * 80 + [0.001] * 40)

    chosen, (optimizer, scheduler) = built('senetv2')
    assert isinstance(optimizer, torch.optim.Adam) and chosen.label_smoothing == 0 and scheduler is None

    chosen, (optimizer, scheduler) = built('modern')
    assert optimizer.param_groups[0]['nesterov'] and chosen.label_smoothing > 0
    rates = []
    for update in range(10 * chosen.epochs):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]['lr'])
    top = rates.index(max(rates))
    assert top == pytest.approx(0.2 * len(rates), abs=1) and max(rates) == pytest.approx(0.1, rel=0.05)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 1e-3


def test_specs_expand_to_their_grid():
    assert [str(s) for s in parse_specs('cifar_senetv2_resnet20:sae_cardinality=1|2,sae_reduction=8')] == [
        'cifar_senetv2_resnet20:sae_cardinality=1,sae_reduction=8',
        'cifar_senetv2_resnet20:sae_cardinality=2,sae_reduction=8',
    ]
    (spec,) = parse_specs('seanet20:widths=[8, 16,32],aggregation_op=max')
    assert dict(spec.options) == {'widths': [8, 16, 32], 'aggregation_op': 'max'}
    assert build(spec, 10).num_features == 8
    assert len({spec, *parse_specs('seanet20:widths=[8,16,32],aggregation_op=max')}) == 1


def students_quantile(p: float, degrees: int) -> float:
    """Where Student's t distribution function is p > 1/2, by the incomplete beta function."""
    return brentq(lambda t: 1 - 0.5 * betainc(degrees / 2, 0.5, degrees / (degrees + t * t)) - p, 0, 1000)


def test_paired_difference_agrees_with_an_independent_computation():
    a = {'0': 91.2, '1': 90.4, '2': 92.0, '3': 91.1, '9': 12.0}
    b = {'3': 90.0, '1': 90.6, '2': 90.9, '0': 90.1, '7': 55.0}
    d = [a[s] - b[s] for s in '0123']
    mean = sum(d) / 4
    half = students_quantile(0.975, 3) * statistics.stdev(d) / math.sqrt(4)
    result = difference(a, b)
    assert (result.mean, result.low, result.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-9)
    assert students_quantile(0.975, 3) == pytest.approx(3.182446, abs=1e-5)  # as printed in any table


def test_difference_of_other_seeds_is_unpaired():
    a, b = [91.2, 90.4, 92.0], [90.0, 90.6, 90.9, 90.1]
    va, vb = statistics.variance(a) / 3, statistics.variance(b) / 4
    degrees = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)  # Welch-Satterthwaite
    mean = statistics.mean(a) - statistics.mean(b)
    half = students_quantile(0.975, degrees) * math.sqrt(va + vb)
    result = difference(dict(zip('012', a, strict=True)), dict(zip('3456', b, strict=True)))
    assert (result.mean, result.low, result.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-9)
    assert str(result).endswith('] unpaired')


def test_difference_of_equal_runs_and_of_one_seed():
    assert str(difference({'0': 90.0, '1': 91.0}, {'0': 90.0, '1': 91.0})) == '+0.00 [+0.00, +0.00]'
    assert str(difference({'0': 90.0, '1': 91.0}, {'0': 90.001, '1': 91.001})) == '+0.00 [+0.00, +0.00]'
    assert str(difference({'0': 90.0}, {'0': 91.0})) == '-1.00 (one seed)'
    assert str(difference({'0': 90.0}, {'1': 91.0})) == '-1.00 (one seed) unpaired'


def test_table_and_plots_are_made_from_the_rows(finished):
    text = (finished / 'table.md').read_text()
    by_model = {}
    for row in rows(finished):
        by_model.setdefault(row['model'], []).append(float(row['accuracy']))
    for model, accuracy in by_model.items():
        assert re.search(
            rf'`{model}` .* \| {statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f} \|', text
        )
    assert 'best epoch' in text and str(finished) in text
    for name in ('accuracy_vs_parameters.png', 'curves.png'):
        assert Image.open(finished / name).width > 500
    assert table(read_rows(finished / 'results.csv', RESULTS), 'small_cnn') in text


@pytest.mark.parametrize(
    'change, says',
    [
        (['--protocol', 'imagenet'], "unknown protocol 'imagenet': choose seanet"),
        (['--models', 'senetv2_resnet21'], "unknown model 'senetv2_resnet21'; did you mean senetv2_resnet"),
        (['--models', 'small_cnn:sae_cardinality'], 'expected key=value'),
        (['--models', 'small_cnn:sae_cardinality=-1'], 'sae_cardinality must be a whole number'),
        (['--models', 'small_cnn:colour=1'], 'it has no option colour'),
        (['--models', 'cifar_resnet20:widths=[-1,2,3]'], 'cannot be built'),
        (['--models', 'small_cnn:checkpoint_path=nowhere'], 'is not an option of a model'),
        (['--models', 'vit_tiny_patch16_224'], 'cannot take images of 3 x 8 x 8'),
        (['--models', 'small_cnn:in_chans=1'], 'or other options'),
        (['--models', 'resnet18:features_only=True'], 'is no classifier'),
        (['--models', 'small_cnn:num_classes=3'], 'is that of the data'),
        (['--baseline', 'seanet20'], '--baseline seanet20 must be one of the models: small_cnn, small_saecnn'),
        (['--baseline', 'small_saecnn:sae_reduction=8|16'], 'must be one of the models'),
        (['--baseline', 'nothing'], "unknown model 'nothing'"),
        (['--dataset', 'imagenet'], "unknown dataset 'imagenet'"),
        (['--opt', 'sgdx'], "unknown optimizer 'sgdx'"),
        (['--epochs', '0'], '--epochs must be at least 1'),
        (['--opt', 'adahessian'], '--opt adahessian cannot be used here'),
        (['--lr', 'nan'], '--lr must be above 0'),
        (['--lr', 'inf'], '--lr must be above 0 and finite'),
        (['--weight-decay', '-1'], '--weight-decay must be at least 0'),
        (['--weight-decay', 'nan'], '--weight-decay must be at least 0'),
        (['--weight-decay', 'inf'], '--weight-decay must be finite'),
        (['--image-size', '0'], '--image-size must be at least 1'),
        (['--image-size', '100000'], '--image-size must be at most 4096'),
        (['--crop-padding', '8'], '--crop-padding must be below the 8 pixels'),
        (['--workers', '100000'], '--workers must be at most 256'),
        (['--batch-size', '1000000000'], '--batch-size must be at most'),
        (['--per-class', '0'], '--per-class must be at least 1'),
        (['--per-class', '40'], '--per-class 40: class'),
        (['--limit', '1'], 'has 1 training images'),
        (['--out', '/'], 'is the root of the file system'),
        (['--dataset', 'caf\udce9'], 'is not UTF-8'),
        (['--seeds', '0', '-1'], '--seeds must be at least 0'),
        (['--seeds', str(2**63)], '--seeds must be below'),
        (['--out', ''], '--out needs'),
        (['--ema-decay', '1'], '--ema-decay must be'),
        (['--limit', '0'], '--limit must be at least 1'),
        (['--dataset', 'fashion-mnist', '--data-dir', 'nowhere', '--no-download'], 'Fashion-MNIST is not in nowhere'),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        reproduce.main([*SMALL, '--out', 'out', *change])
    assert says in str(error.value) and '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['results.csv', 'curves.csv'])
@pytest.mark.parametrize(
    'damage',
    [
        lambda text: text.replace('format,', 'version,', 1),
        lambda text: re.sub(r'^1,', '0,', text, flags=re.MULTILINE),
        lambda text: text[: -len(text.splitlines()[-1]) // 2],
        lambda text: re.sub(r',small_cnn,0,', ',small_cnn,zero,', text),
        lambda text: text.replace('small', '\udcff'),
    ],
)
def test_results_of_another_version_are_refused_and_kept(finished, tmp_path, name, damage):
    for file in ('results.csv', 'curves.csv'):
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    (tmp_path / name).write_text(damage((finished / name).read_text()), errors='surrogateescape')
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=f'{name} was .*version.*another --out'):
        reproduce.main([*SMALL, '--seeds', '0', '1', '--epochs', '3', '--out', str(tmp_path)])
    assert (tmp_path / name).read_bytes() == before


EDITS = {
    'results.csv': [
        ('parameters', '104042.0'),
        ('parameters', '0'),
        ('parameters', '104043'),
        ('accuracy', 'inf'),
        ('accuracy', 'nan'),
        ('accuracy', '101'),
        ('accuracy', '11.0'),
        ('best_accuracy', '99'),
        ('best_epoch', '1.0'),
        ('best_epoch', '0'),
        ('best_epoch', '9'),
        ('seed', '1.0'),
        ('seed', '7'),
        ('gmacs', 'inf'),
        ('model', 'small_secnn'),
        ('run', 'mine'),
        ('lr', '0.2'),
        ('batch_size', '16.0'),
        ('hflip', 'no'),
    ],
    'curves.csv': [
        ('accuracy', 'inf'),
        ('accuracy', '101'),
        ('seed', '1.0'),
        ('seed', '7'),
        ('epoch', '0'),
        ('epoch', '9'),
        ('epoch', '1.0'),
        ('lr', '-1'),
        ('test_loss', '-1'),
        ('model', 'small_secnn'),
    ],
}


@pytest.mark.parametrize('name, column, value', [(name, *edit) for name, edits in EDITS.items() for edit in edits])
def test_results_edited_by_hand_are_noticed_before_anything_is_trained(
    finished, tmp_path, monkeypatch, name, column, value
):
    monkeypatch.setattr(grid, 'train', lambda *_: pytest.fail('trained'))
    for file in ('results.csv', 'curves.csv'):
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    with (tmp_path / name).open(newline='') as file:
        lines = list(csv.DictReader(file))
    lines[0][column] = value
    write_csv(tmp_path / name, list(lines[0]), lines)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=r'edited|contradict|lacks runs|parameters'):
        reproduce.main([*SMALL, '--seeds', '0', '1', '2', '--epochs', '3', '--out', str(tmp_path)])
    assert (tmp_path / name).read_bytes() == before


def test_classes_added_to_a_folder_after_a_kill_are_noticed(folder, tmp_path, monkeypatch):
    arguments = ['--dataset', str(folder), '--image-size', '8', '--epochs', '2', '--workers', '0', '--device', 'cpu']
    arguments += ['--models', 'small_cnn', '--out', str(tmp_path / 'out')]
    save = CheckpointSaver.save_checkpoint

    def interrupted(saver, epoch, metric):
        save(saver, epoch, metric)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointSaver, 'save_checkpoint', interrupted)
        reproduce.main(arguments)
    for split in ('train', 'val'):
        (folder / split / 'cow').mkdir()
        image = np.random.default_rng(len(split)).integers(256, size=(12, 14, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / split / 'cow' / '0.png')
    with pytest.raises(UserError, match='have changed since the training in .* began'):
        reproduce.main(arguments)
    for split in ('train', 'val'):
        (folder / split / 'cow' / '0.png').unlink()
        (folder / split / 'cow').rmdir()
    reproduce.main(arguments)
    assert len(rows(tmp_path / 'out', 'curves.csv')) == 2
    for split in ('train', 'val'):
        (folder / split / 'cow').mkdir()
        image = np.random.default_rng(len(split)).integers(256, size=(12, 14, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / split / 'cow' / '0.png')
    with pytest.raises(UserError, match='the classes of .* have changed'):
        reproduce.main(arguments)


def test_a_recorded_command_with_an_old_name_finds_its_rows(tmp_path, monkeypatch):
    committed = Path(__file__).parents[1] / 'results' / 'runs' / 'digits_attention'
    shutil.copytree(committed, tmp_path / 'copy')
    monkeypatch.setattr(grid, 'train', lambda *_: pytest.fail('trained again'))
    with (committed / 'results.csv').open(newline='') as file:
        command = next(csv.DictReader(file))['command']
    assert ' cifar_senetv2_resnet20 ' in command
    arguments = command.replace(' cifar_senetv2_resnet20 ', ' senetv2_resnet20 ').split()[2:]
    arguments[arguments.index('--out') + 1] = str(tmp_path / 'copy')
    reproduce.main([*arguments, '--device', 'cpu'])
    for name in ('results.csv', 'curves.csv', 'table.md'):
        assert (tmp_path / 'copy' / name).read_bytes() == (committed / name).read_bytes()


@pytest.mark.parametrize(
    'make, says',
    [
        (lambda out: (out / 'table.md').write_text('precious'), 'holds files that reproduce.py did not write'),
        (
            lambda out: (out / '.timm-senetv2.json').write_text('{"tool": "quickstart.py"}'),
            'is a folder of quickstart.py',
        ),
        (lambda out: (out / '.timm-senetv2.json').write_text('{'), 'has a damaged'),
        (lambda out: (out / 'runs').write_text('precious'), 'did not write|cannot be'),
    ],
)
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, make, says):
    out = tmp_path / 'out'
    out.mkdir()
    make(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError, match=says):
        reproduce.main([*SMALL, '--out', str(out)])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_new_runs_go_into_a_file_with_the_columns_of_an_earlier_version(tmp_path):
    """Those of the committed runs: what was measured of them stays, and new ones leave it empty."""
    committed = Path(__file__).parents[1] / 'results' / 'runs' / 'digits_small_cnn'
    shutil.copytree(committed, tmp_path / 'copy')
    with (committed / 'results.csv').open(newline='') as file:
        before = list(csv.DictReader(file))
    reproduce.main([*SMALL, '--epochs', '1', '--out', str(tmp_path / 'copy')])
    with (tmp_path / 'copy' / 'results.csv').open(newline='') as file:
        after = list(csv.DictReader(file))
    assert after[: len(before)] == before and len(after) == len(before) + 2
    assert before[0]['peak_memory_mib'] and not after[-1]['peak_memory_mib'] and 'init' not in after[0]


def test_results_without_their_curves_are_refused(finished, tmp_path):
    (tmp_path / 'results.csv').write_bytes((finished / 'results.csv').read_bytes())
    with pytest.raises(UserError, match='curves.csv lacks runs that results.csv has'):
        reproduce.main([*SMALL, '--seeds', '0', '1', '--epochs', '3', '--out', str(tmp_path)])


@pytest.mark.parametrize('damage', [b'garbage', b''])
def test_a_damaged_checkpoint_costs_its_epochs_and_no_more(finished, tmp_path, monkeypatch, damage):
    def interrupted(saver, epoch, metric):
        save(saver, epoch, metric)
        raise KeyboardInterrupt

    arguments = [*SMALL, '--seeds', '0', '1', '--epochs', '3', '--out', str(tmp_path)]
    save = CheckpointSaver.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointSaver, 'save_checkpoint', interrupted)
        reproduce.main(arguments)
    checkpoints = list(tmp_path.glob('runs/*/*.pth.tar'))
    assert checkpoints
    for path in checkpoints:
        path.write_bytes(damage)
    reproduce.main(arguments)
    assert rows(tmp_path) == rows(finished)


@pytest.mark.parametrize(
    'arguments',
    [
        ['--out', '/proc/out'],
        ['--out', 'x' * 300],
        ['--out', 'out', '--dataset', 'fashion-mnist', '--data-dir', 'file'],
        ['--out', 'out', '--dataset', 'cifar10', '--data-dir', 'file'],
    ],
)
def test_a_path_that_the_system_refuses_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('x')
    with pytest.raises(SystemExit) as stopped:
        errors.run(lambda: reproduce.main([*SMALL, *arguments]))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / 'out').write_text('x')
    with pytest.raises(UserError, match='cannot be made a folder'):
        reproduce.main([*SMALL, '--out', str(tmp_path / 'out')])


def test_a_full_disk_is_one_line_exit_code_2_and_finished_rows_stay(finished, tmp_path, interpreters):
    """A limit on the size of files stands in for the full disk: torch's writer fails the same way."""
    for file in ('results.csv', 'curves.csv'):
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n'
    arguments = [*SMALL, '--seeds', '2', '--epochs', '3', '--out', tmp_path]
    process = interpreters.run(limit + command([SCRIPT, *arguments]))
    assert process.returncode == 2
    assert re.fullmatch(
        r'error: the checkpoint in .* cannot be written, probably the disk is full .*\n',
        process.stderr.splitlines(keepends=True)[-1],
    )
    assert 'Traceback' not in process.stderr
    assert rows(tmp_path) == rows(finished)


def test_a_damaged_image_is_named_and_finished_rows_stay(folder, tmp_path):
    out = tmp_path / 'out'
    arguments = [
        '--dataset',
        str(folder),
        '--image-size',
        '8',
        '--epochs',
        '1',
        '--workers',
        '0',
        '--device',
        'cpu',
        '--out',
        str(out),
        '--models',
    ]
    reproduce.main([*arguments, 'small_cnn'])
    before = rows(out)
    damaged = folder / 'val' / 'bee' / '1.png'
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=f'{damaged} cannot be read as an image'):
        reproduce.main([*arguments, 'small_cnn', 'small_secnn'])
    assert rows(out) == before
