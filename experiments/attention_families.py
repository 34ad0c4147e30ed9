"""Try `timm_senetv2.add_attention` on every model made of ResNet blocks, and write which it works for.

All models of timm and torchvision with residual blocks of their ResNets and without attention are built without memory
and given it. They are told apart by their names without the numbers; of each kind the smallest one is also built with
random weights and compared, to the last bit, with itself from before: in inference and in training.

    python -m experiments.attention_families
"""

import argparse
import copy
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
from torch import nn
from tqdm import tqdm

from timm_senetv2 import SqueezeAggregatedExcitation, add_attention
from timm_senetv2.errors import UserError, did_you_mean, run
from timm_senetv2.files import write_atomically
from timm_senetv2.lifting import BLOCK_CLASSES
from timm_senetv2.registration import MODEL_MODULES

from .randomize import randomize

COLUMNS = (
    'family',
    'models',
    'without_attention',
    'added',
    'compared',
    'blocks',
    'params_before',
    'params_after',
    'output_std',
    'equal_in_inference',
    'equal_in_training',
    'why_refused',
)
SIZE = 128  # pixels, where the model takes any
TORCHVISION = {'torchvision': torchvision.models, 'torchvision.quantization': torchvision.models.quantization}
Build = Callable[[], nn.Module]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='the table, csv (default: results/attention_families.csv)',
        default=Path(__file__).parents[1] / 'results' / 'attention_families.csv',
    )
    parser.add_argument(
        '--family', nargs='*', metavar='NAME', help='try only these: modules of timm.models, torchvision'
    )
    return parser.parse_args(argv)


def builders(family: str) -> Iterator[tuple[str, Build]]:
    """Each model of a family, and what builds it."""
    if family in TORCHVISION:
        # those by name: some of the others cannot be built without memory
        for name in torchvision.models.list_models(module=TORCHVISION[family], include='*resne*'):
            yield name, partial(torchvision.models.get_model, name, weights=None)
    else:
        for name in timm.list_models(module=family):
            yield name, partial(timm.create_model, name)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def try_family(family: str) -> list[dict[str, Any]]:
    """The rows of a family, one for each kind of model; none for a family without such blocks."""
    added: dict[str, dict[str, dict[str, int]]] = {}
    refused: dict[str, dict[str, str]] = {}
    builds = dict(builders(family))
    for name, build in tqdm(builds.items(), desc=family, leave=False):
        with torch.device('meta'):
            model = build()
        blocks = [m for m in model.modules() if isinstance(m, BLOCK_CLASSES) and getattr(m, 'se', None) is None]
        if not blocks:
            continue
        kind = re.sub(r'\d+', '*', name)
        added.setdefault(kind, {}), refused.setdefault(kind, {})
        before = count(model)
        try:
            added[kind][name] = dict(blocks=len(blocks), params_before=before, params_after=count(add_attention(model)))
        except ValueError as e:
            refused[kind][name] = str(e).partition(': ')[2]
    rows = []
    for kind in added:
        row: dict[str, Any] = dict(
            family=family,
            models=kind,
            without_attention=len(added[kind]) + len(refused[kind]),
            added=len(added[kind]),
            why_refused='; '.join(dict.fromkeys(refused[kind].values())),
        )
        if added[kind]:
            smallest = min(added[kind], key=lambda name: added[kind][name]['params_before'])
            row.update(compared=smallest, **added[kind][smallest], **compare(smallest, builds[smallest]))
        rows.append(row)
    return rows


@torch.no_grad()
def compare(name: str, build: Build) -> dict[str, str]:
    """Build the model with random weights and compare its outputs before and after, and in training too.

    Raises:
        UserError: Outputs that differ in a single bit, or that do not depend on the attention.
    """
    torch.manual_seed(0)
    before = build()
    data = resolve_model_data_config(before) if hasattr(before, 'pretrained_cfg') else {}
    size = data['input_size'][-1] if hasattr(before, 'patch_embed') else SIZE
    images = torch.randn(4, 3, size, size)
    randomize(before, images)
    after = add_attention(copy.deepcopy(before))
    outputs = before(images)
    in_inference = torch.equal(after(images), outputs)
    active = copy.deepcopy(after)
    for layer in active.modules():
        if isinstance(layer, SqueezeAggregatedExcitation):
            nn.init.ones_(layer.fc2.bias)
    if (active(images) - outputs).abs().max() < 0.01 * outputs.std():
        raise UserError(f'{name}: its outputs do not depend on the attention, so the comparison shows nothing')
    trained = []
    for model in (before, after):
        torch.manual_seed(1)
        trained.append(model.train()(images))
    in_training = torch.equal(*trained)
    if not in_inference or not in_training:
        raise UserError(f'{name}: with attention added, its outputs differ')
    return dict(output_std=f'{outputs.std():.2f}', equal_in_inference='yes', equal_in_training='yes')


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    known = [*(family for family in timm.list_modules() if family not in MODEL_MODULES), 'cifar', *TORCHVISION]
    families = args.family or known
    unknown = [family for family in families if family not in known]
    if unknown:
        raise UserError(f'there is no family {unknown[0]!r}{did_you_mean(unknown[0], known)}')
    rows = [row for family in tqdm(families) for row in try_family(family)]
    with write_atomically(args.out) as temporary, temporary.open('w', newline='') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run(main)
