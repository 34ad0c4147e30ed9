"""Try `timm_senetv2.lift` on every family of timm that has SE layers, and write which it works for.

All models with SE, or with a relative of it, are built without memory and lifted; of each family the smallest one that
lifts is also built with random weights and compared with itself from before the lift, on random images.

    python -m experiments.lift_families

`python scripts/docs.py` brings the table into results/lift.md.
"""

import argparse
import copy
import csv
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from tqdm import tqdm

from timm_senetv2 import lift
from timm_senetv2.errors import UserError, did_you_mean, run
from timm_senetv2.files import write_atomically
from timm_senetv2.lifting import SE_CLASSES
from timm_senetv2.registration import MODEL_MODULES

from .randomize import randomize

COLUMNS = (
    'family',
    'models_with_se',
    'lifted',
    'compared',
    'se_layers',
    'params_before',
    'params_after',
    'output_std',
    'max_difference_float32',
    'max_difference_float64',
    'why_refused',
)
TOLERANCE = 1e-5  # in double: in single precision rounding alone differs by about as much in the deepest models


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='the table, csv (default: results/lift_families.csv)',
        default=Path(__file__).parents[1] / 'results' / 'lift_families.csv',
    )
    parser.add_argument('--family', nargs='*', metavar='NAME', help='try only these modules of timm.models')
    return parser.parse_args(argv)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def try_family(family: str) -> dict[str, object] | None:
    """One row of the table, or None for a family without SE."""
    lifted, refused = {}, {}
    for name in tqdm(timm.list_models(module=family), desc=family, leave=False):
        with torch.device('meta'):
            model = timm.create_model(name)
        se = [m for m in model.modules() if isinstance(m, SE_CLASSES)]
        if not se:
            continue
        try:
            lifted[name] = dict(se_layers=len(se), params_before=count(model), params_after=count(lift(model)))
        except ValueError as e:
            refused[name] = str(e)
    if not lifted and not refused:
        return None
    row = dict(family=family, models_with_se=len(lifted) + len(refused), lifted=len(lifted))
    if lifted:
        smallest = min(lifted, key=lambda name: lifted[name]['params_before'])
        row.update(compared=smallest, **lifted[smallest], **compare(smallest))
    row['why_refused'] = '; '.join(dict.fromkeys(text.partition(': ')[2] for text in refused.values()))
    return row


@torch.no_grad()
def compare(name: str) -> dict[str, str]:
    """Build the model with random weights and compare its outputs before and after the lift."""
    torch.manual_seed(0)
    before = timm.create_model(name)
    images = torch.randn(4, *resolve_model_data_config(before)['input_size'])
    randomize(before, images)
    after = lift(copy.deepcopy(before))
    figures = {}
    for dtype in (torch.float32, torch.float64):
        outputs = before.to(dtype)(images.to(dtype))
        difference = (after.to(dtype)(images.to(dtype)) - outputs).abs().max().item()
        figures[f'max_difference_{str(dtype).removeprefix("torch.")}'] = f'{difference:.1e}'
    if not difference <= TOLERANCE:
        raise UserError(f'{name}: lifted, its outputs differ by {difference:.3g} in double precision')
    return dict(output_std=f'{outputs.std():.2f}', **figures)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    families = args.family or [family for family in timm.list_modules() if family not in MODEL_MODULES]
    unknown = [family for family in families if family not in timm.list_modules()]
    if unknown:
        raise UserError(f'timm has no module {unknown[0]!r}{did_you_mean(unknown[0], timm.list_modules())}')
    rows = [row for family in tqdm(families) if (row := try_family(family)) is not None]
    with write_atomically(args.out) as temporary, temporary.open('w', newline='') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run(main)
