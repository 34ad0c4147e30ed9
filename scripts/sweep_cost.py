"""Measure what Ray costs a run of reproduce.py, and write results/sweep_cost.csv.

    python scripts/sweep_cost.py        needs the extra `ray`, and a machine that does nothing else

The same grid of tiny runs is made without Ray and on clusters of this machine, in turn. `python scripts/docs.py` brings
the table into docs/many-machines.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a package that is installed, and not as editable

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import run  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('--runs', type=int, default=200, metavar='N', help='runs of the grid (default: 200)')
    parser.add_argument('--rounds', type=int, default=3, metavar='N', help='how often each way (default: 3)')
    parser.add_argument(
        '--out', type=Path, metavar='FILE', help='a csv file (default: results/sweep_cost.csv of this clone)'
    )
    args = parser.parse_args(argv)
    if args.runs < 2 or args.rounds < 1:
        parser.error('--runs must be at least 2 and --rounds at least 1')

    from experiments.sweep_cost import write_costs

    out = args.out or ROOT / 'results' / 'sweep_cost.csv'
    write_costs(out, args.runs, args.rounds)
    print(f'wrote {out}')


if __name__ == '__main__':
    run(main)
