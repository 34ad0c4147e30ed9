"""What a lift's fresh hidden units start as and what becomes of them, against what is computed by hand."""

import csv
import math

import pytest
import reproduce
import timm
import torch

from experiments import fresh
from experiments.batches import Batches
from experiments.data import load_dataset
from experiments.settings import Settings, make_settings, parse_specs
from experiments.training import evaluate, train
from experiments.warm_start import attention, build, fresh_units, load_source

SE, SAE = 'cifar_seresnet20.fmnist', 'cifar_senetv2_resnet20'
DIGITS = ['--dataset', 'digits', '--image-size', '8', '--crop-padding', '1', '--batch-size', '16', '--device', 'cpu']


def spec(word: str):
    (one,) = parse_specs(word)
    return one


def settings(*arguments: str) -> Settings:
    args = reproduce.parse_args([*DIGITS, '--models', SAE, '--epochs', '2', '--out', 'x', *arguments])
    return make_settings(vars(args))


def lifted(how: str | None = None):
    torch.manual_seed(0)
    source = load_source(SE)
    model = build(spec(f'{SAE}@lift' + (f':fresh_init={how}' if how else '')), 10, source)
    return model, source


def digits(count: int = 60) -> Batches:
    return Batches(load_dataset('digits', limit=count), settings(), 0)


@pytest.mark.parametrize('how', ['kaiming', 'small', 'copy'])
def test_fresh_units_start_as_asked_and_the_sources_units_stay(how):
    model, source = lifted(how)
    default, _ = lifted()
    rows, columns, trained = [], [], []
    for name, known in fresh_units(model, source).items():
        layer, other = model.get_submodule(name), default.get_submodule(name)
        for key in ('fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias'):
            theirs = source.state_dict[f'{name}.{key}']
            ours = layer.state_dict()[key]
            if key.startswith('fc1'):
                ours = ours[:known]
            elif key == 'fc2.weight':
                ours = ours[:, :known]
            assert torch.equal(ours, theirs.flatten(1) if theirs.ndim > 2 else theirs)
        rows.append(layer.fc1.weight[known:] * math.sqrt(layer.channels))
        columns.append(layer.fc2.weight[:, known:])
        trained.append(layer.fc2.weight[:, :known].std())
        if how == 'kaiming':
            assert layer.fc1.bias[known:].eq(0).all() and not layer.fc1.bias[:known].eq(0).all()
        if how == 'copy':
            for i in range(known, len(layer.fc1.weight)):
                expected = layer.fc1.weight[(i - known) % known] + 0.1 * other.fc1.weight[i]
                torch.testing.assert_close(layer.fc1.weight[i], expected)
    if how == 'kaiming':
        assert torch.cat([r.flatten() for r in rows]).std().item() == pytest.approx(math.sqrt(2), rel=0.05)
    if how == 'small':
        for column, std in zip(columns, trained, strict=True):
            assert 0 < column.abs().mean() < 0.2 * std
    else:
        assert all(column.eq(0).all() for column in columns)


def test_logits_stay_but_with_small_columns():
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, kaiming, copy, small = (
            lifted(how)[0].double().eval()(images) for how in (None, 'kaiming', 'copy', 'small')
        )
    torch.testing.assert_close(kaiming, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(copy, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(small, expected, rtol=1e-6, atol=1e-6)


def test_measured_values_are_those_computed_by_hand():
    """The oracle takes each layer's input by a hook and computes its hidden units itself."""
    model, source = lifted()
    batches = digits()
    known = fresh_units(model, source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in known:
            layer = model.get_submodule(name)
            layer.fc2.weight[:, known[name] :].normal_(std=3.0, generator=generator)
            layer.fc1.bias[-1] = -1e6  # a unit that no image fires
    state = {key: value.clone() for key, value in model.state_dict().items()}
    test = batches.of(model, 0)[1]
    values = fresh.measure(model, known, lambda: test.batches(0))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(layer.act._forward_hooks for _, layer in attention(model))

    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in known}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs[name].append(args[0]))
        for name in known
    ]
    loss, accuracy = evaluate(model, test.batches(0))
    for handle in handles:
        handle.remove()
    ours, theirs, ratios = [], [], []
    for name, first in known.items():
        layer = model.get_submodule(name)
        z = torch.cat(inputs[name]).double().mean((2, 3))
        assert len(z) == 60
        hidden = z @ layer.fc1.weight.double().T + layer.fc1.bias.double()
        ours.append(hidden[:, first:] > 0)
        theirs.append(hidden[:, :first] > 0)
        norms = layer.fc2.weight.double().norm(dim=0) ** 2
        ratios.append(norms[first:].mean() / norms[:first].mean())
    assert values['firing'] == pytest.approx(100 * torch.cat(ours, 1).double().mean().item(), abs=0.1)
    assert values['known_firing'] == pytest.approx(100 * torch.cat(theirs, 1).double().mean().item(), abs=0.1)
    silent = 100 * (~torch.cat(ours, 1)).all(0).double().mean().item()
    assert values['silent'] == pytest.approx(silent, abs=2.0) and silent >= 100 * 9 / 63
    assert values['norm_ratio'] == pytest.approx(torch.stack(ratios).mean().sqrt().item(), rel=1e-4)
    assert (values['loss'], values['accuracy']) == (pytest.approx(loss), accuracy)

    with torch.no_grad():
        for name, first in known.items():
            model.get_submodule(name).fc2.weight[:, first:] = 0
    without = evaluate(model, test.batches(0))
    assert (values['loss_without'], values['without']) == (pytest.approx(without[0]), without[1])
    assert without[0] != pytest.approx(loss)


def test_a_grid_measures_lifted_models_by_epoch_and_a_resumed_one_the_same(tmp_path, monkeypatch):
    arguments = [*DIGITS, '--limit', '60', '--epochs', '3', '--init', SE, '--measure-fresh']
    arguments += ['--models', 'cifar_seresnet20@continue', f'{SAE}@lift', f'{SAE}@lift:fresh_init=copy', '--out']
    reproduce.main([*arguments, str(tmp_path / 'whole')])
    with (tmp_path / 'whole' / 'fresh.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['model'], row['epoch']) for row in rows] == [
        (model, str(epoch)) for model in (f'{SAE}@lift', f'{SAE}@lift:fresh_init=copy') for epoch in (1, 2, 3)
    ]
    with (tmp_path / 'whole' / 'curves.csv').open(newline='') as file:
        accuracy = {(row['model'], row['epoch']): float(row['accuracy']) for row in csv.DictReader(file)}
    for row in rows:
        assert float(row['accuracy']) == pytest.approx(accuracy[row['model'], row['epoch']], abs=1e-3)
    assert (tmp_path / 'whole' / 'fresh.png').read_bytes().startswith(b'\x89PNG')

    from timm.utils import CheckpointSaver

    save, calls = CheckpointSaver.save_checkpoint, []

    def interrupted(saver, epoch, metric):
        calls.append(epoch)
        if len(calls) == 5:
            raise KeyboardInterrupt  # after the epoch was measured and before its checkpoint
        save(saver, epoch, metric)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointSaver, 'save_checkpoint', interrupted)
        reproduce.main([*arguments, str(tmp_path / 'parts')])
    reproduce.main([*arguments, str(tmp_path / 'parts')])
    assert (tmp_path / 'parts' / 'fresh.csv').read_bytes() == (tmp_path / 'whole' / 'fresh.csv').read_bytes()


def test_measuring_does_not_change_a_training():
    source = load_source(SE)
    model = spec(f'{SAE}@lift')
    batches = digits(40)
    histories = []
    for watch in (False, True):
        seen = []

        def after_epoch(epoch, model, watch=watch, seen=seen):
            if watch:
                test = batches.of(model, 0)[1]
                seen.append(fresh.measure(model, fresh_units(model, source), lambda: test.batches(0)))

        trained, history = train(model, 0, batches.settings, batches, source, after_epoch=after_epoch)
        histories.append(([{k: v for k, v in row.items() if k != 'seconds'} for row in history], trained.state_dict()))
        assert len(seen) == (2 if watch else 0)
    (first, weights), (second, others) = histories
    assert first == second and all(torch.equal(value, others[key]) for key, value in weights.items())


def test_an_epoch_of_several_passes_takes_every_image_so_often_and_steps_so_often():
    batches = Batches(load_dataset('digits', limit=32), settings('--epoch-repeats', '3'), 0)
    made, seen = batches.of(timm.create_model('small_cnn')), []

    class Watched:
        def __len__(self):
            return len(made[0])

        def batches(self, seed):
            for images, targets in made[0].batches(seed):
                seen.append(targets.tolist())
                yield images, targets

    batches.made[next(iter(batches.made))] = (Watched(), made[1])
    rates = []
    _, history = train(
        spec('small_cnn'), 0, batches.settings, batches, progress=lambda done, history: rates.append(done)
    )
    assert len(history) == 2 and len(seen) == 2 * 3 * 2
    targets = sorted(batches.data.train.targets)
    passes = [seen[i] + seen[i + 1] for i in range(0, len(seen), 2)]
    assert all(sorted(taken) == targets for taken in passes)
    assert len({tuple(taken) for taken in passes}) == len(passes)  # each in an order of its own
    assert rates == pytest.approx([0, *(i / 6 for i in range(1, 13))])
