"""All that waits for a GPU, as commands in the order of their worth, run one after the other."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm_senetv2.errors import UserError, did_you_mean

from .files import read_csv, write_csv

ROOT = Path(__file__).parents[1]
COLUMNS = ('step', 'device', 'code', 'seconds', 'command')
SEEDS = ['0', '1', '2', '3', '4']
TRIO = ['cifar_resnet20', 'cifar_seresnet20', 'cifar_senetv2_resnet20']


@dataclass(frozen=True)
class Step:
    """A command of this clone, words of one that follows `python`, and what it is for."""

    name: str
    purpose: str
    command: tuple[str, ...]


def steps(device: str, quick: bool, out: Path, data: Sequence[str] = ()) -> list[Step]:
    """The commands.

    Args:
        device: 'cuda', or 'cpu' to try them.
        quick: One epoch on few images of digits; the figures mean nothing.
        out: Their folders and files go there.
        data: Options of reproduce.py about where the data sets are.
    """
    cuda = device == 'cuda'

    def reproduce(name: str, purpose: str, dataset: str, models: Sequence[str], *options: str) -> Step:
        if quick:  # nor as long as a model may say for itself
            models = [re.sub(r'\bepochs=\d+', 'epochs=2', model) for model in models]
        words = ['scripts/reproduce.py', '--device', device, '--models', *models, '--out', str(out / 'runs' / name)]
        if quick:
            words += ['--dataset', 'digits', '--limit', '64', '--batch-size', '32', '--seeds', '0']
            kept: list[str] = [word for word in ('--save-weights', '--channels-last', '--amp') if word in options]
            kept += ['--per-class', '4'] if '--per-class' in options else []
            kept += ['--init', options[options.index('--init') + 1]] if '--init' in options else []
            words += [*kept, '--image-size', '16', '--epochs', '1']
        else:
            words += ['--dataset', dataset, *options, *(() if dataset == 'digits' else data)]
        return Step(name, purpose, tuple(words))

    def compare(name: str, purpose: str, dataset: str, *options: str) -> Step:
        words = ['scripts/compare_architectures.py', '--device', device, '--out', str(out / 'runs' / name)]
        if quick:
            words += ['--dataset', 'digits', '--quick', '--image-size', '16']
        else:
            words += ['--dataset', dataset, *options, '--amp', '--channels-last', *data]
        return Step(name, purpose, tuple(words))

    def weights(of: str, model: str, seed: int) -> str:
        """Weights that an earlier step saves: the folder of its run, by a pattern."""
        return str(out / 'runs' / of / 'weights' / f'{model}-seed{seed}-*')

    fmnist = ['--crop-padding', '2', '--batch-size', '128', '--amp', '--channels-last']
    suffix = '' if cuda else f'_{device}'
    bench = ['scripts/benchmark.py', '--device', device, '--resume', '--out', str(out)]
    source = f'fmnist_source{suffix}'
    lifted = [
        'cifar_seresnet20@continue',
        'cifar_senetv2_resnet20@lift',
        'cifar_seresnet20:sae_reduction=4@lift',
    ]
    begin = ['--init', weights(source, 'cifar_seresnet20', 0)]
    found = [
        Step(
            'benchmark',
            'speed and memory of models and layers, with the kernels of each step',
            tuple([*bench, '--suite', *(() if cuda else ('layers',)), *(('--quick',) if quick else ())]),
        ),
        Step(
            'tests',
            'what is tested on a GPU only' if cuda else 'the tests of tests/test_cuda.py that a CPU can run',
            ('-m', 'pytest', '-q', 'tests/test_cuda.py', '-m', 'cuda' if cuda else 'not cuda'),
        ),
        reproduce(
            f'digits_attention_{device}', 'the rows of results/README.md, question 1, once more', 'digits', TRIO,
            '--image-size', '8', '--crop-padding', '1', '--batch-size', '64', '--epochs', '10', '--seeds', *SEEDS,
        ),
        reproduce(
            source, 'an SE network that has converged', 'fashion-mnist', ['cifar_seresnet20'],
            *fmnist, '--epochs', '200', '--seeds', '0', '--save-weights',
        ),
        reproduce(
            f'fmnist_continued{suffix}', 'what training on from it gives, lifted or not, and SaE from scratch',
            'fashion-mnist', [*lifted, 'cifar_senetv2_resnet20@scratch:epochs=250'],
            *fmnist, '--epochs', '50', '--lr', '0.02', '--seeds', *SEEDS, *begin, '--save-weights',
        ),
        reproduce(
            f'digits_from_fmnist{suffix}', 'the same continuations on digits', 'digits',
            [*lifted, 'cifar_senetv2_resnet20'], '--image-size', '32', '--crop-padding', '2', '--epochs', '50',
            '--lr', '0.02', '--seeds', *SEEDS, *begin,
        ),
        reproduce(
            f'fmnist_100_a_class{suffix}', 'the same continuations with 100 images a class', 'fashion-mnist',
            [*lifted, 'cifar_senetv2_resnet20'], *fmnist, '--per-class', '100', '--epochs', '100', '--lr', '0.02',
            '--seeds', *SEEDS, *begin,
        ),
        reproduce(
            f'fmnist_fresh_lr{suffix}', 'the learning rate of the units that a lift adds', 'fashion-mnist',
            ['cifar_senetv2_resnet20@lift:fresh_lr=1|10', 'cifar_senetv2_resnet20@lift:attention_lr=10'],
            *fmnist, '--epochs', '50', '--lr', '0.02', '--seeds', *SEEDS, *begin, '--save-weights',
        ),
        reproduce(
            f'fmnist_200{suffix}', 'longer training, and larger networks', 'fashion-mnist',
            [*TRIO, 'cifar_resnet56', 'cifar_seresnet56', 'cifar_senetv2_resnet56', 'seanet20'],
            *fmnist, '--epochs', '200', '--seeds', *SEEDS,
        ),
        compare(
            f'fmnist_kinds{suffix}', 'beside other kinds of networks', 'fashion-mnist',
            '--crop-padding', '2', '--batch-size', '128', '--epochs', '50', '--seeds', *SEEDS,
        ),
    ]  # fmt: skip
    if not quick:
        found.append(
            compare(
                f'cifar100_kinds{suffix}', 'other kinds of networks on CIFAR-100', 'cifar100',
                '--epochs', '100', '--seeds', *SEEDS[:3],
            )
        )  # fmt: skip
    return found


def chosen(found: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps of these names; all without any.

    Raises:
        UserError: A name that there is not.
    """
    known = [step.name for step in found]
    for name in names:
        if name not in known:
            raise UserError(f'there is no step {name!r}{did_you_mean(name, known)}; --list shows them')
    return [step for step in found if not names or step.name in names]


def shown(step: Step) -> str:
    return shlex.join(['python', *step.command])


def run_all(found: Sequence[Step], device: str, out: Path) -> list[str]:
    """Run the steps, passing over those that on_gpu.csv in `out` has as finished. Returns those that failed.

    A step that fails does not keep the others from running. What each wrote stays: all of them go on where they were.
    """
    log = ROOT / out / 'on_gpu.csv'
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = read_csv(log) if log.exists() else []
    failed = []
    for number, step in enumerate(found, 1):
        if any(row['command'] == shown(step) and row['code'] == '0' for row in rows):
            print(f'[{number}/{len(found)}] {step.name}: finished before', flush=True)
            continue
        print(f'[{number}/{len(found)}] {step.name}: {step.purpose}\n{shown(step)}', flush=True)
        begun = time.monotonic()
        try:
            command = [sys.executable, *(_found(word) for word in step.command)]
        except UserError as e:  # the step that makes what this one starts from failed
            print(f'{step.name}: {e}', file=sys.stderr)
            failed.append(step.name)
            continue
        code = subprocess.run(command, cwd=ROOT).returncode
        rows = [row for row in rows if row['command'] != shown(step)]
        seconds = f'{time.monotonic() - begun:.0f}'
        rows.append(dict(step=step.name, device=device, code=str(code), seconds=seconds, command=shown(step)))
        write_csv(log, COLUMNS, rows)
        if code:
            failed.append(step.name)
    return failed


def _found(word: str) -> str:
    """A path for a pattern that ends with -*; other words as they are."""
    path = Path(word)
    if not word.endswith('-*'):
        return word
    matches = sorted((ROOT / path).parent.glob(path.name))
    if len(matches) != 1:
        raise UserError(f'{word} must match one folder of weights, and matches {len(matches)}')
    return str(matches[0])
