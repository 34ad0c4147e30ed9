"""The times of a step, taken on models as a grid trains them."""

import csv

import pytest
import reproduce
import torch

from experiments import step_time
from experiments.batches import Batches
from experiments.data import load_dataset
from experiments.settings import make_settings, parse_specs
from experiments.warm_start import load_source

PLAIN = 'cifar_resnet20.fmnist'
DIGITS = ['--dataset', 'digits', '--image-size', '8', '--crop-padding', '1', '--batch-size', '8', '--device', 'cpu']


def test_a_step_trains_what_the_grid_trains_and_inference_nothing(monkeypatch):
    """Watches the steps: which parameters get gradients' updates, and whether autograd runs."""
    arguments = reproduce.parse_args([*DIGITS, '--models', 'small_cnn', '--epochs', '1', '--out', 'x'])
    settings = make_settings(vars(arguments))
    batches = Batches(load_dataset('digits', limit=16), settings, 0)
    words = ['cifar_resnet20@continue', 'cifar_resnet20@add_attention:reduction=16,train_only=attention']
    specs = [spec for word in words for spec in parse_specs(word)]
    models, moved = {}, {}
    start = step_time.start

    def started(spec, *rest):
        models[str(spec)] = model = start(spec, *rest)
        return model

    def measured(contestants, rounds, device, title):
        for name, contestant in contestants.items():
            before = {key: value.clone() for key, value in models[name].state_dict().items()}
            contestant.step()
            after = models[name].state_dict()
            moved[name, title] = {key for key in before if not torch.equal(before[key], after[key])}
            assert contestant.images == 8
        return {name: [0.002 * (i + 1)] * rounds for i, name in enumerate(contestants)}

    monkeypatch.setattr(step_time, 'start', started)
    monkeypatch.setattr(step_time, 'measure', measured)
    rows = step_time.step_times(specs, words[0], settings, batches, load_source(PLAIN), 'the command', rounds=3)
    for word in words:
        assert moved[word, 'step time, inference'] == set()
    every = moved[words[0], 'step time, training']
    assert any('conv1' in key for key in every) and any('running_mean' in key for key in every)
    assert all('.se.' in key for key in moved[words[1], 'step time, training'])
    assert [(row['model'], row['mode'], float(row['ms']), float(row['times_baseline'])) for row in rows] == [
        (word, mode, pytest.approx(ms), pytest.approx(ratio))
        for mode in ('training', 'inference')
        for word, ms, ratio in zip(words, (2.0, 4.0), (1.0, 2.0), strict=True)
    ]


def test_times_are_written_drawn_and_tabulated_and_later_runs_keep_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_time, 'ROUNDS', 2)
    out = tmp_path / 'out'
    arguments = [*DIGITS, '--limit', '16', '--epochs', '1', '--models', 'small_cnn', 'small_saecnn', '--out', str(out)]
    reproduce.main([*arguments, '--step-time'])
    with (out / step_time.FILE).open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['model'], row['mode']) for row in rows] == [
        (model, mode) for mode in ('training', 'inference') for model in ('small_cnn', 'small_saecnn')
    ]
    assert all(float(row['ms']) > 0 and row['command'].endswith('--step-time') for row in rows)
    assert rows[0]['times_baseline'] == '1.0000'
    assert (out / 'accuracy_vs_cost.png').read_bytes().startswith(b'\x89PNG')
    assert '| training step, ms |' in capsys.readouterr().out
    before = (out / step_time.FILE).read_bytes()
    reproduce.main([*arguments, '--seeds', '1'])
    assert (out / step_time.FILE).read_bytes() == before
