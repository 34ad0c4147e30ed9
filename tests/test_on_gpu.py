"""scripts/on_gpu.py: its commands exist, one that fails does not stop the others, and it goes on where it was."""

from pathlib import Path

import benchmark
import compare_architectures
import on_gpu as script
import pytest
import reproduce
import torch

from experiments import on_gpu
from experiments.files import read_csv
from experiments.settings import make_settings, parse_specs
from timm_senetv2.errors import run

ALL = [(device, quick) for device in ('cuda', 'cpu') for quick in (False, True)]


@pytest.mark.parametrize('device, quick', ALL)
def test_every_command_is_understood(device, quick, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    steps = on_gpu.steps(device, quick, Path('results'), ['--data-dir', 'data'])
    assert len({step.name for step in steps}) == len(steps)
    saved = set()
    for step in steps:
        script, *arguments = step.command
        if script == 'scripts/benchmark.py':
            args = benchmark.parse_args(arguments)
            assert (args.device, args.quick, args.out) == (device, quick, Path('results'))
        elif script in ('scripts/reproduce.py', 'scripts/compare_architectures.py'):
            if script != 'scripts/reproduce.py':
                own, arguments = compare_architectures.parse_args(arguments)
                assert own.quick == quick
                arguments = ['--models', *compare_architectures.models(own.image_size), *arguments]
            args = reproduce.parse_args(arguments)
            assert make_settings(vars(args)).device == device
            specs = [spec for word in args.models for spec in parse_specs(word)]
            if args.save_weights:
                saved |= {
                    str(Path(args.out, 'weights', f'{spec}-seed{seed}-*')) for spec in specs for seed in args.seeds
                }
            if quick and script == 'scripts/reproduce.py':
                assert all(spec.settings(make_settings(vars(args))).epochs <= 2 for spec in specs)
            assert any(spec.start not in ('scratch',) for spec in specs) == bool(args.init)
            assert not args.init or args.init in saved, 'it starts from what no earlier step saves'
        else:
            assert (on_gpu.ROOT / 'tests' / 'test_cuda.py').exists() and 'tests/test_cuda.py' in arguments


def test_a_failing_step_stops_no_other_and_is_made_again(tmp_path, capfd):
    def step(name: str, code: str) -> on_gpu.Step:
        return on_gpu.Step(name, 'to see', ('-c', code))

    mark = tmp_path / 'mark'

    def append(letter: str) -> str:
        return f'open({str(mark)!r}, "a").write({letter!r})'

    needs = f'import os, sys; sys.exit(0 if os.path.exists({str(tmp_path / "there")!r}) else 7)'
    steps = [step('first', append('a')), step('second', needs), step('third', append('b'))]
    assert on_gpu.run_all(steps, 'cpu', tmp_path) == ['second']
    assert [(row['step'], row['code']) for row in read_csv(tmp_path / 'on_gpu.csv')] == [
        ('first', '0'), ('second', '7'), ('third', '0'),
    ]  # fmt: skip
    (tmp_path / 'there').touch()
    assert on_gpu.run_all(steps, 'cpu', tmp_path) == []
    assert mark.read_text() == 'ab'
    assert 'finished before' in capfd.readouterr().out


def test_step_without_the_weights_it_starts_from_fails_alone(tmp_path, capsys):
    steps = [on_gpu.Step('lifted', 'to see', ('-c', 'pass', str(tmp_path / 'weights' / 'x-seed0-*')))]
    assert on_gpu.run_all(steps, 'cpu', tmp_path) == ['lifted']
    assert 'must match one folder of weights, and matches 0' in capsys.readouterr().err


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['benchmrk'], "there is no step 'benchmrk'; did you mean benchmark"),
        pytest.param(
            ['tests'],
            'torch finds no CUDA device here',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device here'),
        ),
    ],
)
def test_bad_input_costs_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: script.main(arguments))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_commands_are_listed_as_a_shell_takes_them(capsys):
    assert script.main(['--list', 'benchmark', 'tests']) == 0
    assert capsys.readouterr().out.splitlines()[1::2] == [
        'python scripts/benchmark.py --device cuda --resume --out results --suite',
        'python -m pytest -q tests/test_cuda.py -m cuda',
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_can_be_tried_without_a_gpu(tmp_path):
    assert script.main(['--device', 'cpu', '--quick', '--out', str(tmp_path)]) == 0
    rows = read_csv(tmp_path / 'on_gpu.csv')
    assert len(rows) == len(on_gpu.steps('cpu', True, tmp_path)) and {row['code'] for row in rows} == {'0'}
