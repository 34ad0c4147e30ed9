"""scripts/benchmark.py and experiments/benchmark: small real measurements, and their arithmetic."""

import re
import statistics
import sys
import time
from pathlib import Path

import benchmark
import pytest
import timm
import torch

from experiments.benchmark import contestants, engines, imports, report, suite, timing, traffic
from experiments.benchmark.engines import ENGINES, require_engine
from experiments.files import read_csv, write_csv
from timm_senetv2.errors import UserError, run
from timm_senetv2.layers import SqueezeAggregatedExcitation

MODELS = ['small_cnn', 'small_saecnn', 'cifar_senetv2_resnet20:reparameterized', 'cifar_senetv2_resnet20:four-branch']
SMALL = ['--batch-sizes', '2', '--size', '32', '--rounds', '3']


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command and executorch set for their process ends with the test."""
    for name in 'KINETO_LOG_LEVEL', 'OPENVINO_LIB_PATH':
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)


def test_measurement_of_small_models(tmp_path):
    benchmark.main(
        ['--models', *MODELS, '--baseline', *MODELS[:2], *SMALL, '--out', str(tmp_path), '--name', 'trial', '--profile']
    )
    rows, rounds = read_csv(tmp_path / 'benchmark_trial.csv'), read_csv(tmp_path / 'benchmark_trial_rounds.csv')
    assert tuple(rows[0]) == report.COLUMNS
    assert [(row['contestant'], row['baseline']) for row in rows] == [(m, b) for m in MODELS for b in MODELS[:2]]

    # every model once a round, and the ratios round by round, from the raw times
    times = {m: [float(r['ms']) for r in rounds if r['contestant'] == m] for m in MODELS}
    assert all(len(t) == 3 for t in times.values())
    for row in rows:
        by_round = sorted(times[row['baseline']][i] / times[row['contestant']][i] for i in range(3))
        assert float(row['ratio']) == pytest.approx(by_round[1], rel=1e-3, abs=1e-4)  # the file has four decimals
        assert float(row['ratio_q1']) == pytest.approx((by_round[0] + by_round[1]) / 2, rel=1e-3, abs=1e-4)
        assert float(row['images_per_s']) == pytest.approx(2000 / statistics.median(times[row['contestant']]), rel=1e-3)

    kernels = read_csv(tmp_path / 'benchmark_trial_kernels.csv')
    assert {row['contestant'] for row in kernels} == set(MODELS)
    conv = [r for r in kernels if r['contestant'] == 'small_cnn' and r['kind'] == 'convolutions and matrix products']
    assert conv and all(float(row['ms']) > 0 for row in conv)

    text = (tmp_path / 'benchmark_trial.md').read_text()
    assert all(f'| {m} |' in text for m in MODELS)
    assert (tmp_path / 'benchmark_trial.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f'benchmark_trial{end}' for end in ('.csv', '.md', '.png', '_kernels.csv', '_rounds.csv')
    ]


def test_every_combination_is_a_setting_with_rows_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'chart', lambda rows, path: path.touch())  # else it is drawn again for each setting
    benchmark.main(
        ['--models', MODELS[0], '--size', '32', '--rounds', '1', '--out', str(tmp_path), '--modes', 'inference']
        + ['training', '--batch-sizes', '1', '2', '--dtypes', 'float32', 'bfloat16', '--layouts', 'NCHW']
        + ['channels-last', '--autocast']
    )
    rows = read_csv(tmp_path / 'benchmark_custom.csv')
    found = {tuple(row[c] for c in ('training', 'batch', 'dtype', 'layout', 'autocast')) for row in rows}
    assert len(found) == 16
    assert {(row['dtype'], row['autocast']) for row in rows} == {('float32', 'False'), ('bfloat16', 'True')}


def test_resume_measures_only_what_is_missing(tmp_path):
    arguments = ['--models', *MODELS[:2], '--size', '32', '--rounds', '1', '--out', str(tmp_path)]
    benchmark.main([*arguments, '--batch-sizes', '2'])
    before = read_csv(tmp_path / 'benchmark_custom.csv')
    benchmark.main([*arguments, '--batch-sizes', '1', '2', '--resume'])
    after = read_csv(tmp_path / 'benchmark_custom.csv')
    assert [row for row in after if row['batch'] == '2'] == before
    assert [row['batch'] for row in after] == ['1', '1', '2', '2']  # in the order of the command line
    assert len(read_csv(tmp_path / 'benchmark_custom_rounds.csv')) == 4


def test_compiled_models_are_measured_at_every_size_in_one_process(tmp_path):
    benchmark.main(
        ['--models', 'small_saecnn', '--size', '32', '--rounds', '1', '--batch-sizes', '1', '2']
        + ['--compile', '--out', str(tmp_path)]
    )
    rows = read_csv(tmp_path / 'benchmark_custom.csv')
    assert {(row['runtime'], row['batch']) for row in rows} == {('compiled', '1'), ('compiled', '2')}


# AOTInductor compiles C++, which takes four times as long as the other engines together
@pytest.mark.parametrize(
    'engine', [pytest.param(name, marks=[pytest.mark.slow] if name == 'aot-inductor' else []) for name in ENGINES]
)
def test_engines_run_the_exported_model(engine):
    """An engine computes what the model computes."""
    try:
        require_engine(engine)
    except UserError as e:
        pytest.skip(str(e))
    model = contestants.create('small_saecnn', 32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(engines.engine(engine, model, torch.zeros_like(x))(x), expected, rtol=1e-3, atol=1e-4)


def test_missing_engine_costs_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(SystemExit) as stop:
        run(lambda: benchmark.main(['--models', 'small_cnn', '--engines', 'openvino', '--out', str(tmp_path)]))
    assert stop.value.code == 2
    assert 'openvino is not installed; pip install openvino' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'executorch', None)
    experiments = benchmark.chosen(benchmark.parse_args(['--suite', 'engines']))
    assert {e.setting.runtime for e in experiments} == ENGINES.keys() - {'openvino', 'executorch'}
    assert re.findall('^left out: (.*); .* is not installed', capsys.readouterr().err, re.M) == [
        'executorch',
        'openvino',
    ]


def test_ratios_are_paired_by_round():
    """A machine that slows down threefold halfway does not show in the ratios, as it would in a ratio of medians."""
    baseline, contestant = [1.0, 1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0, 3.0]
    q1, median, q3, difference = timing.compare(baseline, contestant)
    assert (q1, median, q3) == (0.5, 0.5, 0.5)
    assert difference == 1.0


def test_every_contestant_runs_in_every_round_in_a_turning_order():
    order = []
    trio = {name: timing.Contestant(lambda name=name: (order.append(name), time.sleep(0.03))) for name in 'abc'}
    times = timing.measure(trio, 3, 'cpu', '')
    assert ''.join(order[-9:]) == 'abcbcacab'  # one repeat, since a step lasts longer than a sample
    assert {name: len(seconds) for name, seconds in times.items()} == {'a': 3, 'b': 3, 'c': 3}
    assert all(0.03 <= second < 3 for seconds in times.values() for second in seconds)


def test_peak_memory_on_cpu():
    """Of three buffers of 4 MiB two live at once, the first being freed in time, beside a state of 1 MiB."""
    mib = 2**20

    def step() -> None:
        a = torch.ones(mib)
        b = a + 1
        del a
        _ = b * 2

    assert timing.peak_bytes(timing.Contestant(step, lambda: mib), 'cpu') == pytest.approx(9 * mib, rel=1e-3)


@pytest.mark.parametrize('training', [False, True])
def test_peak_memory_of_training_holds_activations_gradients_and_momentum(training):
    setting = contestants.Setting(batch=2, size=32, training=training)
    contestant = contestants.model_contestant('small_saecnn', setting)
    contestant.step()
    weights = sum(p.numel() * 4 for p in contestants.create('small_saecnn').parameters())
    peak = timing.peak_bytes(contestant, 'cpu')
    assert peak > (3 if training else 1) * weights
    assert contestant.own_bytes() >= (2 if training else 1) * weights


def test_kernels_name_what_a_step_spends_its_time_on():
    x, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3)
    rows = timing.kernels(timing.Contestant(lambda: torch.conv2d(x, weight).exp_()), 'cpu')
    assert rows[0][1] == 'convolutions and matrix products'
    exp = next(row for row in rows if row[0] == 'aten::exp_')
    assert exp[1] == 'element by element' and exp[2] == 1 and 0 < exp[3] < rows[0][3]


@pytest.mark.parametrize(
    'kernel, kind',
    [
        ('sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc', 'convolutions and matrix products'),
        ('void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512>', 'norm'),
        ('triton_red_fused_native_batch_norm_backward_12', 'fused by the compiler'),
        ('void at::native::multi_tensor_apply_kernel<at::native::TensorListMetadata>', 'optimizer'),
        ('void at::native::vectorized_elementwise_kernel<4, at::native::sigmoid>', 'element by element'),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert timing.kind_of(kernel) == kind


def test_norms_are_random_so_that_attention_matters():
    """timm's last norm of a branch starts at zero, which would hide the branch and its gates."""
    torch.manual_seed(0)
    model = contestants.create('senetv2_resnet18', 32)
    assert model.layer1[0].bn2.weight.abs().min() > 0.1
    assert model.layer4[1].bn2.running_mean.abs().max() > 0
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model.eval()(x)
        for name, parameter in model.named_parameters():
            if 'se.fc2.bias' in name:
                parameter += 1
        assert (model(x) - before).abs().max() > 1e-3 * before.abs().max()


def test_four_branches_are_timms_blocks_with_as_many_parameters():
    ours, theirs = contestants.create('senetv2_resnet18'), contestants.create('senetv2_resnet18:four-branch')
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    types = {type(m).__name__ for m in theirs.modules()}
    assert 'FourBranchSaE' in types and 'BasicBlock' in types
    assert not types & {'SaEBasicBlock', 'SqueezeAggregatedExcitation'}


def test_four_branch_layer_computes_sae():
    """The layer compared with is the same function of the same weights, so the comparison is of speed alone."""
    four, ours = contestants.FourBranchSaE(64).double(), SqueezeAggregatedExcitation(64).double()
    with torch.no_grad():
        for k, branch in enumerate(four.branches):
            ours.fc1.weight[2 * k : 2 * k + 2] = branch[0].weight
            ours.fc1.bias[2 * k : 2 * k + 2] = branch[0].bias
        ours.fc2.load_state_dict(four.excite[0].state_dict())
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), four(x))


def test_suite_of_a_cpu_has_every_setting_that_matters():
    """Our model and both of timm's, at each batch, layout, dtype and runtime of which the tables speak."""
    experiments = {e.title: e for part in suite.suite('cpu').values() for e in part}
    for layout in 'NCHW', 'channels-last':
        for what in (
            *(f'inference, cpu, eager, float32, {layout}, batch {n}' for n in (1, 8, 32)),
            *(f'inference, cpu, eager, bfloat16, {layout}, batch {n}' for n in (1, 8)),
            *(f'inference, cpu, compiled, float32, {layout}, batch {n}' for n in (1, 8)),
            *(f'training step, cpu, {r}, float32, {layout}, batch 8' for r in ('eager', 'compiled')),
        ):
            assert experiments[f'models, {what}'].baselines == ('resnet50', 'seresnet50')
    for engine in ENGINES:
        for n in 1, 8:
            assert f'models, inference, cpu, {engine}, float32, NCHW, batch {n}' in experiments


def test_suite_of_a_gpu_has_every_setting_that_matters():
    experiments = {e.title: e for part in suite.suite('cuda').values() for e in part}
    for runtime in 'eager', 'compiled', 'compiled, max-autotune':
        for n in 1, 64, 256:
            assert experiments[f'models, inference, cuda, {runtime}, bfloat16, channels-last, batch {n}'].profiled
        for n in 128, 256:
            title = f'models, training step, cuda, {runtime}, bfloat16 by autocast, channels-last, batch {n}'
            assert experiments[title].baselines == ('resnet50', 'seresnet50')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--models', 'resnet5'], "unknown model 'resnet5'"),
        (['--models', 'cifar_senetv2_resnet20:fast'], "unknown variant 'fast'"),
        (['--models', 'cifar_resnet20:four-branch'], 'no SaE blocks'),
        (['--models', 'small_cnn', '--baseline', 'resnet50'], "baseline 'resnet50' is not among the models"),
        (['--models', 'cifar_senetv2_resnet20:reparameterized', '--modes', 'training'], 'no norms left to train'),
        (['--rounds', '0'], 'not a whole number above zero'),
        (['--dtypes', 'int8'], 'invalid choice'),
        (['--suite', 'everything'], "no part 'everything'; its parts: inference"),
        (['--compile-mode', 'max-autotune'], 'with --compile only'),
        (['--engines', 'onnxruntime', '--dtypes', 'bfloat16'], 'measures inference in float32 on a CPU'),
        (['--engines', 'onnxruntime', '--layouts', 'channels-last'], 'chooses its own layout'),
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
        run(lambda: benchmark.main(arguments))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error
    assert [p.name for p in tmp_path.iterdir()] == ['taken']


@pytest.mark.parametrize('more', [[], ['--resume']])
def test_measuring_one_setting_keeps_the_others_but_for_fresh(tmp_path, more):
    def measure(batch: int, *more: str) -> list[tuple[str, str]]:  # batch and time of all rows
        arguments = ['--models', *MODELS[:1], '--size', '32', '--rounds', '1', '--out', str(tmp_path)]
        benchmark.main([*arguments, '--batch-sizes', str(batch), *more])
        return sorted((row['batch'], row['ms']) for row in read_csv(tmp_path / 'benchmark_custom.csv'))

    first, both = measure(1), measure(2, *more)
    assert both[0] == first[0] and [batch for batch, _ in both] == ['1', '2']
    again = measure(1)
    assert again[1] == both[1] and len(again) == 2
    assert [batch for batch, _ in measure(2, '--fresh')] == ['2']


def test_quick_figures_go_to_files_of_their_own(tmp_path):
    benchmark.main(['--models', *MODELS[:1], '--quick', '--out', str(tmp_path)])
    assert (tmp_path / 'benchmark_custom_quick.csv').exists() and not (tmp_path / 'benchmark_custom.csv').exists()


def test_files_of_another_version_are_not_resumed(tmp_path):
    (tmp_path / 'benchmark_custom.csv').write_text('experiment,contestant\na,b\n')
    with pytest.raises(UserError, match='its columns differ'):
        benchmark.main(['--models', 'small_cnn', '--resume', '--out', str(tmp_path)])


def test_suite_writes_a_table_an_experiment_and_the_speed_of_all_models(tmp_path, monkeypatch):
    setting = contestants.Setting(batch=2)
    small = contestants.Setting(batch=2, size=32, training=True)
    monkeypatch.setattr(
        suite,
        'suite',
        lambda device, quick=False: {
            'models': [suite.models_experiment(['small_cnn', 'small_saecnn'], ['small_cnn'], small, 3)],
            'layers': [
                suite.sae_experiment(2048, 7, setting, 3),
                suite.aggregation_experiment(128, 8, setting, 3, backward=False),
                suite.aggregation_experiment(128, 8, setting, 3, backward=True),
            ],
        },
    )
    benchmark.main(['--suite', 'layers', '--out', str(tmp_path)])
    benchmark.main(['--suite', '--resume', '--out', str(tmp_path)])
    text = (tmp_path / 'benchmark_cpu.md').read_text()
    assert text.count('\n**') == 4
    rows = read_csv(tmp_path / 'benchmark_cpu.csv')
    names = ['small_cnn', 'small_saecnn', 'four-branch SaE', 'SaE', 'clone', 'aggregation']
    assert list(dict.fromkeys(row['contestant'] for row in rows)) == names  # in the suite's order
    assert all(float(row['peak_ratio']) > 0 for row in rows if row['contestant'].startswith('small'))
    ratio = float(next(row['ratio'] for row in rows if row['contestant'] == 'small_saecnn'))
    line = next(line for line in text.splitlines() if line.startswith('| training step, cpu, eager, float32, NCHW'))
    assert line.endswith(f'| {ratio:.3f} |')


def test_registration_takes_a_part_of_an_import_in_a_fresh_interpreter():
    imported, registered = imports.sample('torch')
    assert 0 < registered < imported


def test_medians_of_registration_are_written_and_shown(tmp_path, monkeypatch, capsys):
    seconds = {
        'torch': [(9, 9), (2, 0.002), (4, 0.001)],
        'timm': [(9, 9), (3, 0.02), (5, 0.01)],
    }  # the first is untimed
    monkeypatch.setattr(imports, 'sample', lambda module: seconds[module].pop(0))
    benchmark.main(['--imports', '--rounds', '2', '--out', str(tmp_path / 'new')])
    assert seconds == {'torch': [], 'timm': []}
    rows = read_csv(tmp_path / 'new' / 'benchmark_imports.csv')
    assert [(row['module'], row['round'], float(row['import_ms']), float(row['registration_ms'])) for row in rows] == [
        ('torch', '0', 2000, 2),
        ('timm', '0', 3000, 20),
        ('torch', '1', 4000, 1),
        ('timm', '1', 5000, 10),
    ]
    shown = capsys.readouterr().out
    assert '| `import torch` | 1.5 (1.25–1.75) | 3000 (2500–3500) |' in shown
    assert '| `import timm` | 15 (12.5–17.5) | 4000 (3500–4500) |' in shown


@pytest.mark.slow
def test_registration_is_measured_in_fresh_interpreters(tmp_path, capsys):
    benchmark.main(['--imports', '--rounds', '2', '--out', str(tmp_path / 'new')])
    shown = capsys.readouterr().out.splitlines()
    rows = read_csv(tmp_path / 'new' / 'benchmark_imports.csv')
    assert [(row['module'], row['round']) for row in rows] == [(m, str(i)) for i in (0, 1) for m in ('torch', 'timm')]
    for module in 'torch', 'timm':
        mine = [row for row in rows if row['module'] == module]
        medians = [statistics.median(float(row[c]) for row in mine) for c in ('registration_ms', 'import_ms')]
        assert 0 < medians[0] < medians[1]
        line = next(line for line in shown if line.startswith(f'| `import {module}` |'))
        cells = [float(cell.split(' (')[0]) for cell in line.strip('| ').split(' | ')[1:]]
        assert cells == pytest.approx(medians, rel=0.01)


def test_published_registration_is_a_small_part_of_an_import():
    rows = read_csv(Path(benchmark.__file__).parents[1] / 'results' / 'benchmark_imports.csv')
    for module, most in ('torch', 5), ('timm', 20):  # milliseconds
        assert statistics.median(float(row['registration_ms']) for row in rows if row['module'] == module) < most


def test_missing_entry_point_is_one_line(monkeypatch):
    monkeypatch.setattr(imports, 'PROGRAM', imports.PROGRAM.replace("name='timm_senetv2'", "name='not_installed'"))
    with pytest.raises(UserError, match='install it first'):
        imports.sample('json')
    with pytest.raises(UserError, match='import no_such_module failed: ModuleNotFoundError'):
        imports.sample('no_such_module')


def test_bytes_of_operations_are_those_of_their_tensors():
    x, gate = torch.ones(4, 25), torch.ones(4, 1)
    for step, moved in (
        (lambda: x + x, 800),
        (lambda: x * gate, 816),
        (lambda: x * gate.expand(4, 25), 816),
        (lambda: x.add_(gate), 816),
        (lambda: x.t().reshape(25, 4), 0),
        (lambda: torch.empty(100), 0),
    ):
        with traffic.Counter() as counter:
            step()
        assert (counter.moved, counter.operations) == (moved, 1 if moved else 0)


def test_bytes_are_those_of_the_fused_tail_where_it_runs(tails):
    setting = contestants.Setting(batch=8, size=128)
    plain, _ = traffic.count('resnet18', setting)
    ours, _ = traffic.count('senetv2_resnet18', setting)
    assert len(tails) == 2 * 3  # the blocks of large input, in the step that is counted and in the one before
    weights = sum(p.numel() for n, p in timm.create_model('senetv2_resnet18').named_parameters() if '.se.' in n)
    images = 4 * 8 * sum(2 * c * size**2 for c, size in ((64, 32), (128, 16), (256, 8), (512, 4)))
    # timm's tail reads the block's output once for the squeeze, and reads and writes it for the scale
    assert 4 * weights + images < ours - plain < 4 * weights + 3 * images


def test_bytes_of_a_training_step_are_those_of_the_optimizer_too():
    layer = torch.nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9, lr=0.1, foreach=False)
    counter = traffic.Counter()
    for _ in range(2):
        layer(torch.ones(1, 8)).sum().backward()
        with traffic._around_optimizers(counter):
            optimizer.step()
    before = counter.moved
    optimizer.step()
    assert counter.moved == before > 2 * 3 * layer.weight.nbytes  # and is not counted after


def test_floor_follows_from_the_bytes_that_attention_adds(tmp_path):
    setting = 'inference, cpu, eager, float32, NCHW, batch 1'
    shared = dict(copy_mib_per_s=1000, machine='m', threads=2, torch='t', timm='t', command='c')
    counted = [('resnet50', 100, 10), ('seresnet50', 130, 20), ('senetv2_resnet50', 150, 22)]
    rows = [dict(setting=setting, contestant=c, mib=m, operations=o, **shared) for c, m, o in counted]
    write_csv(tmp_path / 'traffic.csv', traffic.COLUMNS, rows)
    speeds = [
        dict(experiment=f'models, {setting}', contestant=c, baseline='resnet50', ms=ms, ratio=ratio)
        for c, ms, ratio in (('resnet50', 150, 1), ('senetv2_resnet50', 250, 0.6))
    ]
    write_csv(tmp_path / 'cpu.csv', list(speeds[0]), speeds)
    table = traffic.table(tmp_path / 'traffic.csv', tmp_path / 'cpu.csv')
    assert f'| {setting} | 100 | 30 | 50 | 12 | 50.0 | 0.750 | 0.600 |' in table.splitlines()


def test_parts_of_the_suite_are_one_command_and_others_stand_beside_it():
    suite, other = 'python scripts/benchmark.py --suite', 'python scripts/benchmark.py --models resnet18'
    commands = (f'{suite} inference training', other, f'{suite} layers inference', other, f'{suite} models --quick')
    rows = [dict(command=command, machine='a CPU', threads=1, torch='2', timm='1') for command in commands]
    text = report.measured_with(rows)
    assert text.startswith(
        f'Measured with `{suite} inference training layers`, `{other}`, `{suite} models --quick` on a CPU, 1 threads'
    )
