"""Try what can go wrong: kills, faults of the Hub, damaged images, hostile files, several processes on one cache.

    python tests/check_reliability.py                 everything: about ten minutes on two cores
    python tests/check_reliability.py --quick         a share of each kind, as the tests do
    python tests/check_reliability.py --kinds kills   one kind; the rows of the others stay as they are in --out

Each case must end in a right result or in one plain line. Counts and outcomes go to results/reliability.csv, from where
scripts/docs.py brings them into results/reliability.md. Exit code 1 says that some case ended otherwise.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ('', 'tests', 'tests/helpers', 'scripts')]

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, run  # noqa: E402

KINDS = ('kills', 'hub_faults', 'images', 'hostile_files', 'shared_cache')
QUICK = 0.03  # of the full numbers


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog='check_reliability.py', description=__doc__)
    parser.add_argument('--quick', action='store_true', help='a share of the cases, in less than half a minute')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=KINDS, metavar='KIND', help=', '.join(KINDS))
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='processes side by side (default: 2)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of instants and damages (default: 0)')
    parser.add_argument(
        '--out', type=Path, metavar='FILE', help='(default: results/reliability.csv; with --quick none is written)'
    )
    args = parser.parse_args(argv)

    from importlib import import_module

    from reliability import tally

    if args.jobs < 1:
        raise UserError(f'--jobs must be at least 1, got {args.jobs}')
    out = args.out or (None if args.quick else ROOT / 'results' / 'reliability.csv')
    if out is not None and not out.parent.is_dir():
        raise UserError(f'cannot write {out}: {out.parent} is not a folder')
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(['python', 'tests/check_reliability.py', *words])
    failed = 0
    for kind in dict.fromkeys(args.kinds):
        found = import_module(f'reliability.{kind}').check(args.seed, QUICK if args.quick else 1, args.jobs)
        print(f'{kind}: {found.tried} tried, {found.failed} failed', flush=True)
        for case, row in found.rows.items():
            if row.failed:
                print(f'  {case}: {row.failed} of {row.tried}: {row.first_failure}')
        failed += found.failed
        if out is not None:
            tally.write(out, [found], command)
    return 1 if failed else 0


if __name__ == '__main__':
    run(main)
