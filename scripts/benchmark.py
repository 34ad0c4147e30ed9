"""Measure speed and memory of models and layers against baselines, interleaved in one process."""

import argparse
import os
import shlex
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a package that is installed, and not as editable

from experiments.benchmark import imports, report, suite, traffic  # noqa: E402
from experiments.benchmark.contestants import (  # noqa: E402
    COMPILE_MODES,
    DTYPES,
    LAYOUTS,
    Setting,
    compiled,
    create,
)
from experiments.benchmark.engines import ENGINES, require_engine  # noqa: E402
from experiments.files import check_table, write_csv  # noqa: E402
from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, run  # noqa: E402

DESCRIPTION = """\
Measure speed and memory of models and layers against baselines.

In every round each contestant runs once, in an order that turns by one from round to round, so that whatever else the
machine does falls on all of them. A ratio is the baseline's time over the contestant's in the same round: above 1 the
contestant is faster. Printed and written are medians over the rounds and quartiles; the times of all rounds are in
benchmark_NAME_rounds.csv. What these files hold of other settings stays there. They are complete after each setting:
--resume goes on with a run that was stopped.

Every combination of --modes, --batch-sizes, --dtypes and --layouts is a setting, and all models run side by side in it.
Without these options: inference at batch 8 in float32, NCHW; with --device cuda, bfloat16, channels-last, at batch 1,
64 and 256 in inference and 128 and 256 in training.

A model is a timm name, or one with a suffix: NAME:reparameterized has its norms folded by timm's reparameterize_model;
NAME:four-branch is a SENetV2 as public ports write it, timm's plain blocks with four dense layers side by side. Norms
have random weights and measured statistics.

A training step is forward pass, cross-entropy, backward pass and an SGD step with momentum. In half precision the
weights are cast; with --autocast they stay in float32.

Peak memory is that of live tensors over one step: parameters, buffers and optimizer state, and on top of them the
highest sum of what the step has allocated and not freed. CUDA's allocator reports it; on a CPU it is added up from the
allocations that torch's profiler records.
"""


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not a whole number above zero')
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=DESCRIPTION)
    parser.add_argument(
        '--suite',
        nargs='*',
        metavar='PART',
        help='everything that results/ reports of the device, or some parts of it '
        f'(cpu: {", ".join(suite.suite("cpu"))}; cuda: {", ".join(suite.suite("cuda"))}); '
        'of the other options only --device, --threads, --quick, --resume, --fresh, --out and --name apply',
    )
    parser.add_argument(
        '--imports',
        action='store_true',
        help='measure instead what registering the models takes at the end of `import torch` and `import timm`; of the '
        'other options only --rounds, --quick, --out and --name apply; the file is benchmark_NAME.csv',
    )
    parser.add_argument(
        '--traffic',
        action='store_true',
        help='count instead the bytes that steps read and write, and time a copy; of the other options only --threads, '
        '--quick, --out and --name apply; the file is benchmark_NAME.csv',
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=suite.MODELS,
        metavar='MODEL',
        help='timm names, with or without a suffix (default: %(default)s)',
    )
    parser.add_argument(
        '--baseline',
        nargs='+',
        metavar='MODEL',
        help='one or more of the models that the others are compared with (default: the first)',
    )
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='default: %(default)s')
    parser.add_argument('--modes', nargs='+', default=['inference'], choices=['inference', 'training'])
    parser.add_argument('--batch-sizes', nargs='+', type=positive, metavar='N', help='images in a batch')
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES)
    parser.add_argument('--layouts', nargs='+', choices=list(LAYOUTS))
    parser.add_argument('--autocast', action='store_true', help='half precision by autocast, not by casting the model')
    how = parser.add_mutually_exclusive_group()
    how.add_argument('--compile', action='store_true', help='torch.compile every model')
    how.add_argument('--engines', nargs='+', choices=list(ENGINES), help='run the models exported, on a CPU')
    parser.add_argument(
        '--compile-mode', default='default', choices=COMPILE_MODES, help='of torch.compile (default: %(default)s)'
    )
    parser.add_argument('--size', type=positive, default=224, help='height and width in pixels (default: %(default)s)')
    parser.add_argument('--rounds', type=positive, default=25, help='rounds to measure (default: %(default)s)')
    parser.add_argument('--threads', type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument('--profile', action='store_true', help='list the kernels of each model, or its operations')
    parser.add_argument(
        '--quick',
        action='store_true',
        help='three rounds of small batches, to try the command; the figures mean little',
    )
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument('--resume', action='store_true', help='measure only what the files of this name lack')
    keep.add_argument(
        '--fresh', action='store_true', help='drop what the files of this name hold, even if it is not measured again'
    )
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'results', help="folder for the files (default: this clone's results)"
    )
    parser.add_argument(
        '--name',
        help='files are benchmark_NAME.csv, .md, .png, benchmark_NAME_rounds.csv and _kernels.csv '
        '(default: the device with --suite, imports with --imports, traffic with --traffic, else custom; '
        'with --quick the same and _quick)',
    )
    args = parser.parse_args(argv)
    if args.name is None:
        args.name = 'imports' if args.imports else 'traffic' if args.traffic else 'custom'
        if args.suite is not None:
            args.name = args.device
        if args.quick:  # else its figures would stand in results/ beside true ones
            args.name += '_quick'
    if args.compile_mode != 'default' and not args.compile:
        parser.error('--compile-mode has a meaning with --compile only')
    return args


def settings(args: argparse.Namespace) -> list[Setting]:
    """Every combination on the command line."""
    cuda = args.device == 'cuda'
    dtypes = args.dtypes or ['bfloat16' if cuda else 'float32']
    layouts = args.layouts or ['channels-last' if cuda else 'NCHW']
    found = []
    for mode in dict.fromkeys(args.modes):
        training = mode == 'training'
        batches = args.batch_sizes or (([128, 256] if training else [1, 64, 256]) if cuda else [8])
        for dtype, layout, batch in product(dtypes, layouts, batches):
            autocast = args.autocast and dtype != 'float32'
            setting = Setting(args.device, 'eager', dtype, autocast, layout, training, batch, args.size)
            runtimes = args.engines or [compiled(args.compile_mode) if args.compile else 'eager']
            found += [replace(setting, runtime=runtime) for runtime in runtimes]
    if args.quick:
        found = [replace(s, batch=min(s.batch, 2), size=min(s.size, 64)) for s in found]
    return list(dict.fromkeys(found))


def check_engines(args: argparse.Namespace) -> None:
    if not args.engines:
        return
    if args.device != 'cpu' or args.modes != ['inference'] or args.dtypes not in (None, ['float32']):
        raise UserError('--engines measures inference in float32 on a CPU; leave out --device, --modes and --dtypes')
    if args.layouts not in (None, ['NCHW']):
        raise UserError('an exported model chooses its own layout; leave out --layouts, or --engines')
    for engine in args.engines:
        require_engine(engine)


def chosen(args: argparse.Namespace) -> list[suite.Experiment]:
    """The experiments of the command line."""
    if args.suite is not None:
        parts = suite.suite(args.device, args.quick)
        for part in args.suite:
            if part not in parts:
                raise UserError(f'the suite has no part {part!r}; its parts: {", ".join(parts)}')
        experiments = [e for part in args.suite or parts for e in parts[part]]
        missing = {}
        for engine in ENGINES.keys() & {e.setting.runtime for e in experiments}:
            try:
                require_engine(engine)
            except UserError as e:
                missing[engine] = str(e)
        for engine, why in sorted(missing.items()):
            print(f'left out: {engine}; {why}', file=sys.stderr)
        by_title = {e.title: e for e in experiments if e.setting.runtime not in missing}  # --quick makes batches equal
        return list(by_title.values())
    rounds = 3 if args.quick else args.rounds
    specs = list(dict.fromkeys(args.models))
    baselines = args.baseline or specs[:1]
    for name in baselines:
        if name not in specs:
            raise UserError(f'baseline {name!r} is not among the models: {", ".join(specs)}')
    for spec in specs:
        with torch.device('meta'):  # a wrong name stops here, before anything is measured
            create(spec)
        if 'training' in args.modes and spec.endswith(':reparameterized') and args.models is not suite.MODELS:
            raise UserError(f'{spec} has no norms left to train; leave it out or leave out --modes training')
    check_engines(args)
    return [suite.models_experiment(specs, baselines, s, rounds, args.profile) for s in settings(args)]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # else torch's profiler talks of its own start and stop
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('torch finds no CUDA device here; leave out --device cuda, or run where there is a GPU')
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(
        ['python', 'scripts/benchmark.py', *(word for word in words if word not in ('--resume', '--fresh'))]
    )
    if args.imports:
        report.make_folder(args.out)
        path = args.out / f'benchmark_{args.name}.csv'
        check_table(path, imports.COLUMNS)
        write_csv(path, imports.COLUMNS, imports.measure(3 if args.quick else args.rounds, command))
        print(f'{imports.table(path)}\n\nwrote {path}')
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.traffic:
        report.make_folder(args.out)
        path = args.out / f'benchmark_{args.name}.csv'
        check_table(path, traffic.COLUMNS)
        write_csv(path, traffic.COLUMNS, traffic.measure_all(args.quick, command))
        print(f'wrote {path}')
        return
    torch.backends.cudnn.benchmark = True  # as timm's benchmark.py: the sizes never change
    experiments = chosen(args)
    whole = suite.suite(args.device, args.quick).values() if args.suite is not None else [experiments]
    files = report.Files(args.out, args.name, [e.title for part in whole for e in part])
    done = set() if args.fresh else files.load()
    if args.resume:
        experiments = [e for e in experiments if e.title not in done]
    for experiment in tqdm(experiments, desc='experiments', disable=len(experiments) == 1 or None):
        try:
            files.add(command, *suite.measure_experiment(experiment))
        except torch.OutOfMemoryError as e:
            line = f'{experiment.title} does not fit into memory'
            if len(experiments) == 1:
                raise UserError(f'{line}; give a smaller batch') from e
            tqdm.write(f'left out: {line}', file=sys.stderr)
            continue
        rows = [row for row in files.rows[''] if row['experiment'] == experiment.title]
        tqdm.write(report.experiment_table(rows) + '\n')
        files.write()
    if files.rows['']:
        print(f'wrote {", ".join(files.write())} to {args.out}')


if __name__ == '__main__':
    run(main)
