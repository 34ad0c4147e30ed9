"""Draw what adding attention to a trained network, and lifting one, is worth, from the rows in results/runs.

    python scripts/lift_worth.py        writes lift_worth_attention.png, lift_worth_lift.png and lift_worth_fresh.png

results/lift-worth.md shows them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a package that is installed, and not as editable

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, run  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        '--results', type=Path, default=ROOT / 'results', metavar='DIR', help='(default: results/ of this clone)'
    )
    args = parser.parse_args(argv)

    from experiments.lift_worth import draw

    written = draw(args.results)
    if not written:
        raise UserError(f'{args.results} has no runs of these')
    for path in written:
        print(f'wrote {path}')


if __name__ == '__main__':
    run(main)
