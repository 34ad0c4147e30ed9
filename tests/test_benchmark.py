"""scripts/benchmark.py: a small real measurement, and its arithmetic."""

import csv
import statistics
from pathlib import Path

import benchmark
import pytest
import torch

MODELS = ['small_cnn', 'small_saecnn', 'cifar_senetv2_resnet20:reparameterized', 'cifar_senetv2_resnet20:four-branch']


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_measurement_of_small_models(tmp_path):
    benchmark.main(
        [
            '--models',
            *MODELS,
            '--baseline',
            *MODELS[:2],
            '--batch',
            '2',
            '--size',
            '32',
            '--rounds',
            '3',
            '--out',
            str(tmp_path),
            '--name',
            'trial',
        ]
    )
    rows, rounds = read(tmp_path / 'benchmark_trial.csv'), read(tmp_path / 'benchmark_trial_rounds.csv')
    assert tuple(rows[0]) == benchmark.COLUMNS
    assert [(row['contestant'], row['baseline']) for row in rows] == [(m, b) for m in MODELS for b in MODELS[:2]]

    # every model once a round, and the ratios round by round, from the raw times
    times = {m: [float(r['ms']) for r in rounds if r['contestant'] == m] for m in MODELS}
    assert all(len(t) == 3 for t in times.values())
    for row in rows:
        by_round = sorted(times[row['baseline']][i] / times[row['contestant']][i] for i in range(3))
        assert float(row['ratio']) == pytest.approx(by_round[1], rel=1e-3)
        assert float(row['ratio_q1']) == pytest.approx((by_round[0] + by_round[1]) / 2, rel=1e-3)
        assert float(row['images_per_s']) == pytest.approx(2000 / statistics.median(times[row['contestant']]), rel=1e-3)

    text = (tmp_path / 'benchmark_trial.md').read_text()
    assert all(f'| {m} |' in text for m in MODELS)
    assert (tmp_path / 'benchmark_trial.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f'benchmark_trial{end}' for end in ('.csv', '.md', '.png', '_rounds.csv')
    ]


def test_ratios_are_paired_by_round():
    """A machine that slows down threefold halfway does not show in the ratios, as it would in a ratio of medians."""
    baseline, contestant = [1.0, 1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0, 3.0]
    q1, median, q3, difference = benchmark.compare(baseline, contestant)
    assert (q1, median, q3) == (0.5, 0.5, 0.5)
    assert difference == 1.0


def test_every_contestant_runs_in_every_round_in_a_turning_order():
    order = []
    contestants = {
        name: benchmark.Contestant(lambda name=name: order.append(name) or 1.0, timed_by_step=True) for name in 'abc'
    }
    times = benchmark.measure(contestants, 3, 'cpu', '')
    assert ''.join(order[-9:]) == 'abcbcacab'
    assert times == {'a': [1.0] * 3, 'b': [1.0] * 3, 'c': [1.0] * 3}


def test_peak_memory_on_cpu():
    """Of three buffers of 4 MiB two live at once, the first being freed in time, beside a state of 1 MiB."""
    mib = 2**20

    def step() -> None:
        a = torch.ones(mib)
        b = a + 1
        del a
        _ = b * 2

    assert benchmark.peak_bytes(benchmark.Contestant(step, lambda: mib), 'cpu') == pytest.approx(9 * mib, rel=1e-3)


@pytest.mark.parametrize('training', [False, True])
def test_peak_memory_of_training_holds_activations_gradients_and_momentum(training):
    setting = benchmark.Setting(batch=2, size=32, training=training)
    contestant = benchmark.model_contestant('small_saecnn', setting)
    contestant.step()
    weights = sum(p.numel() * 4 for p in benchmark.create('small_saecnn').parameters())
    peak = benchmark.peak_bytes(contestant, 'cpu')
    assert peak > (3 if training else 1) * weights
    assert contestant.own_bytes() >= (2 if training else 1) * weights


def test_four_branches_are_timms_blocks_with_as_many_parameters():
    ours, theirs = benchmark.create('senetv2_resnet18'), benchmark.create('senetv2_resnet18:four-branch')
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    types = {type(m).__name__ for m in theirs.modules()}
    assert 'FourBranchSaE' in types and 'BasicBlock' in types
    assert not types & {'SaEBasicBlock', 'SqueezeAggregatedExcitation'}


def test_four_branch_layer_computes_sae():
    """The layer compared with is the same function of the same weights, so the comparison is of speed alone."""
    four, ours = benchmark.FourBranchSaE(64), benchmark.SqueezeAggregatedExcitation(64)
    with torch.no_grad():
        for k, branch in enumerate(four.branches):
            ours.fc1.weight[2 * k : 2 * k + 2] = branch[0].weight
            ours.fc1.bias[2 * k : 2 * k + 2] = branch[0].bias
        ours.fc2.load_state_dict(four.excite[0].state_dict())
    x = torch.randn(2, 64, 5, 5)
    torch.testing.assert_close(ours(x), four(x))


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_suite_measures_what_the_targets_ask(device):
    """Every target of the device finds its row; that is what makes a target's line more than "not measured"."""
    experiments = {e.title: e for e in benchmark.suite(device, quick=False)}
    for target in benchmark.targets():
        if target.experiment.setting.device == device:
            experiment = experiments[target.experiment.title]
            assert target.baseline in experiment.baselines


def test_target_line_says_met_missed_or_not_measured():
    target = benchmark.targets()[0]
    row = dict(experiment=target.experiment.title, contestant=target.contestant, baseline=target.baseline)
    assert target.line([]).endswith('| not measured | |')
    assert target.line([row | dict(ratio='1.0301')]).endswith('| 1.03 | yes |')
    assert target.line([row | dict(ratio='1.0299')]).endswith('| 1.03 | no |')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--models', 'resnet5'], "unknown model 'resnet5'"),
        (['--models', 'cifar_senetv2_resnet20:fast'], "unknown variant 'fast'"),
        (['--models', 'cifar_resnet20:four-branch'], 'no SaE blocks'),
        (['--models', 'small_cnn', '--baseline', 'resnet50'], "baseline 'resnet50' is not among the models"),
        (['--models', 'cifar_senetv2_resnet20:reparameterized', '--train'], 'no norms left to train'),
        (['--rounds', '0'], 'not a whole number above zero'),
        (['--dtype', 'int8'], 'invalid choice'),
        pytest.param(
            ['--device', 'cuda'],
            'no CUDA device',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device here'),
        ),
        (['--models', 'small_cnn', '--out', 'taken'], 'cannot write to'),
    ],
)
def test_bad_input_costs_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').touch()
    with pytest.raises(SystemExit) as stop:
        benchmark.run(lambda: benchmark.main(arguments))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error
    assert [p.name for p in tmp_path.iterdir()] == ['taken']


def test_import_cost_is_measured_in_fresh_interpreters():
    """With and without the plugin, which has to be installed."""
    seconds = benchmark.import_contestant('json', plugin=False).step()
    assert 0 < seconds < 60
    with pytest.raises(benchmark.UserError, match='install it first'):
        benchmark.import_contestant('json', plugin=True).step()


def test_suite_writes_targets_and_a_table_an_experiment(tmp_path, monkeypatch):
    setting = benchmark.Setting(batch=2)
    monkeypatch.setattr(
        benchmark,
        'suite',
        lambda device, quick: [
            benchmark.sae_experiment(2048, 7, benchmark.CPU, 3),
            benchmark.aggregation_experiment(128, 8, setting, 3, backward=False),
            benchmark.aggregation_experiment(128, 8, setting, 3, backward=True),
            benchmark.models_experiment(
                ['small_cnn', 'small_saecnn'], ['small_cnn'], benchmark.Setting(batch=2, size=32, training=True), 3
            ),
        ],
    )
    benchmark.main(['--suite', '--out', str(tmp_path)])
    text = (tmp_path / 'benchmark_cpu.md').read_text()
    assert text.count('\n**') == 4
    lines = [line for line in text.splitlines() if 'SaE layer 2048x7x7' in line and '≥' in line]
    assert len(lines) == 2 and 'not measured' not in lines[0] and 'not measured' in lines[1]
    rows = read(tmp_path / 'benchmark_cpu.csv')
    assert {row['contestant'] for row in rows} == {
        'SaE',
        'four-branch SaE',
        'clone',
        'aggregation',
        'small_cnn',
        'small_saecnn',
    }
    assert all(float(row['peak_ratio']) > 0 for row in rows if row['contestant'].startswith('small'))


def test_imports_alone_are_measured_against_their_budget(tmp_path):
    benchmark.main(['--imports', '--rounds', '1', '--out', str(tmp_path)])
    rows = read(tmp_path / 'benchmark_imports.csv')
    assert [row['experiment'] for row in rows] == ['import torch'] * 3 + ['import timm'] * 3
    text = (tmp_path / 'benchmark_imports.md').read_text()
    for module, budget, i in ('torch', 5, 0), ('timm', 60, 3):
        _, whole, alone = rows[i : i + 3]
        assert f'| import {module}, added ms, difference of whole imports | ≤ {budget} | ' in text
        assert f'{float(whole["difference_ms"]):.3g} |' in text
        assert f'| import {module}, added ms, registration alone | ≤ {budget} | {float(alone["ms"]):.3g} |' in text
        assert 0 < float(alone['ms']) < 5000
