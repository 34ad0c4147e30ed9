"""Everything that waits for a GPU, most valuable first: the benchmark suite, the tests marked `cuda`, and the runs.

    python scripts/on_gpu.py --list                     show the commands
    python scripts/on_gpu.py --data-dir /data           run them; started again, it goes on where it was
    python scripts/on_gpu.py --device cpu --quick       try all of them without a GPU; the figures mean nothing

Each step is a command of its own that can be run by hand. One that fails does not stop the others: the names of those
that failed end the output, and the exit code is 1. What was run, and how long it took, is in on_gpu.csv.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a package that is installed, and not as editable

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, run  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument('steps', nargs='*', metavar='STEP', help='only these (default: all)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='default: %(default)s')
    parser.add_argument('--quick', action='store_true', help='one epoch on few images of digits, to try the commands')
    parser.add_argument('--data-dir', metavar='DIR', help='where Fashion-MNIST and CIFAR are, or are downloaded to')
    parser.add_argument('--no-download', action='store_true', help='fail where a data set is not there')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='for tables and runs (default: results/ of this clone; with --quick or on a CPU output/on_gpu)',
    )
    parser.add_argument('--list', action='store_true', help='print the commands, and end')
    args = parser.parse_args(argv)

    from experiments import on_gpu

    tried = args.quick or args.device == 'cpu'
    out = (args.out or ROOT / ('output/on_gpu' if tried else 'results')).resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # as the recorded commands shall have it
    data = [*(('--data-dir', str(Path(args.data_dir).resolve())) if args.data_dir else ())]
    data += ['--no-download'] if args.no_download else []
    found = on_gpu.chosen(on_gpu.steps(args.device, args.quick, out, data), args.steps)
    if args.list:
        for step in found:
            print(f'# {step.name}: {step.purpose}\n{on_gpu.shown(step)}')
        return 0

    import torch

    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('torch finds no CUDA device here; --device cpu --quick tries the commands without one')
    failed = on_gpu.run_all(found, args.device, out)
    if failed:
        print(f'failed: {", ".join(failed)}; started again, this goes on with them', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    run(main)
