"""Try `timm_senetv2.lift` or `timm_senetv2.add_attention` on all families of timm, and write which it works for.

    python scripts/families.py lift        every family with SE layers or a relative of them
    python scripts/families.py attention   every model with ResNet's blocks and without attention, torchvision's too

`python scripts/docs.py` brings the tables into results/lift.md.
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
    parser.add_argument('table', choices=('lift', 'attention'), help='what to try')
    parser.add_argument(
        '--family',
        nargs='+',
        metavar='NAME',
        help='only these: modules of timm.models; for attention also torchvision and torchvision.quantization',
    )
    parser.add_argument(
        '--out', type=Path, metavar='FILE', help='a csv file (default: the one in results/ of this clone)'
    )
    args = parser.parse_args(argv)

    from experiments.families import TABLES, write_table

    table = TABLES[args.table]
    out = args.out or ROOT / 'results' / table.file
    write_table(table, args.family or table.families, out)
    print(f'wrote {out}')


if __name__ == '__main__':
    run(main)
