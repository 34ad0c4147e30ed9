"""`lift` on every family of timm with SE, `add_attention` on every model made of ResNet blocks: which they work for.

All models are built without memory and converted. Of each family (attention: of each kind of model in it) the smallest
one that converts is also built with random weights, and its outputs are compared with those from before.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
from torch import nn
from tqdm import tqdm

from timm_senetv2 import SqueezeAggregatedExcitation, add_attention, lift
from timm_senetv2.errors import UserError, did_you_mean
from timm_senetv2.lifting import BLOCK_CLASSES, SE_CLASSES
from timm_senetv2.registration import MODEL_MODULES

from .files import check_table, write_csv
from .randomize import randomize

TOLERANCE = 1e-5  # of a lift, in double: in single precision rounding alone is about as much in the deepest models
SIZE = 128  # pixels for `add_attention`, where the model takes any
TORCHVISION = {'torchvision': torchvision.models, 'torchvision.quantization': torchvision.models.quantization}
Build = Callable[[], nn.Module]
Row = dict[str, Any]


def builders(family: str) -> Iterator[tuple[str, Build]]:
    """Each model of a family, and what builds it."""
    if family in TORCHVISION:
        # those by name: some of the others cannot be built without memory
        for name in torchvision.models.list_models(module=TORCHVISION[family], include='*resne*'):
            yield name, partial(torchvision.models.get_model, name, weights=None)
    else:
        for name in timm.list_models(module=family):
            yield name, partial(timm.create_model, name)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Conversions:
    """What became of the models of a family, or of one kind in it: sizes by name, or why one was refused."""

    def __init__(self) -> None:
        self.done: dict[str, dict[str, int]] = {}
        self.refused: dict[str, str] = {}

    def convert(self, name: str, model: nn.Module, convert: Callable[[nn.Module], nn.Module], **facts: int) -> None:
        before = parameters(model)
        try:
            self.done[name] = dict(**facts, params_before=before, params_after=parameters(convert(model)))
        except ValueError as e:
            self.refused[name] = str(e).partition(': ')[2]

    def __len__(self) -> int:
        return len(self.done) + len(self.refused)

    def smallest(self) -> str | None:
        return min(self.done, key=lambda name: self.done[name]['params_before'], default=None)

    def why_refused(self) -> str:
        return '; '.join(dict.fromkeys(self.refused.values()))


def lift_rows(family: str) -> list[Row]:
    """One row, or none for a family without SE."""
    found = Conversions()
    builds = dict(builders(family))
    for name, build in tqdm(builds.items(), desc=family, leave=False):
        with torch.device('meta'):
            model = build()
        se = [m for m in model.modules() if isinstance(m, SE_CLASSES)]
        if se:
            found.convert(name, model, lift, se_layers=len(se))
    if not len(found):
        return []
    row: Row = dict(family=family, models_with_se=len(found), lifted=len(found.done), why_refused=found.why_refused())
    smallest = found.smallest()
    if smallest:
        row.update(compared=smallest, **found.done[smallest], **compare_lifted(smallest, builds[smallest]))
    return [row]


@torch.no_grad()
def compare_lifted(name: str, build: Build) -> dict[str, str]:
    """The model with random weights beside itself after the lift.

    Raises:
        UserError: Outputs that differ by more than rounding does.
    """
    torch.manual_seed(0)
    before = build()
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


def attention_rows(family: str) -> list[Row]:
    """A row for each kind of model, which is a name without its numbers; none for a family without such blocks."""
    kinds: dict[str, Conversions] = {}
    builds = dict(builders(family))
    for name, build in tqdm(builds.items(), desc=family, leave=False):
        with torch.device('meta'):
            model = build()
        blocks = [m for m in model.modules() if isinstance(m, BLOCK_CLASSES) and getattr(m, 'se', None) is None]
        if blocks:
            found = kinds.setdefault(re.sub(r'\d+', '*', name), Conversions())
            found.convert(name, model, add_attention, blocks=len(blocks))
    rows = []
    for kind, found in kinds.items():
        row: Row = dict(family=family, models=kind, without_attention=len(found), added=len(found.done))
        row['why_refused'] = found.why_refused()
        smallest = found.smallest()
        if smallest:
            row.update(compared=smallest, **found.done[smallest], **compare_added(smallest, builds[smallest]))
        rows.append(row)
    return rows


@torch.no_grad()
def compare_added(name: str, build: Build) -> dict[str, str]:
    """The model with random weights beside itself with attention added, in inference and in training.

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


@dataclass(frozen=True)
class Table:
    """One of the two tables.

    Attributes:
        file: Its name in results/.
        columns: Of the file.
        rows: Makes the rows of a family.
        families: All that there are.
    """

    file: str
    columns: tuple[str, ...]
    rows: Callable[[str], list[Row]]
    families: tuple[str, ...]


_TIMM = tuple(family for family in timm.list_modules() if family not in MODEL_MODULES)
TABLES = {
    'lift': Table(
        'lift_families.csv',
        (
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
        ),
        lift_rows,
        _TIMM,
    ),
    'attention': Table(
        'attention_families.csv',
        (
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
        ),
        attention_rows,
        (*_TIMM, 'cifar', *TORCHVISION),
    ),
}


def write_table(table: Table, families: Iterable[str], out: Path) -> None:
    """Try the families and write the table, when all of them have been tried.

    Raises:
        UserError: A family that there is not, or a model whose outputs changed.
    """
    families = list(families)
    for family in families:
        if family not in table.families:
            raise UserError(f'there is no family {family!r}{did_you_mean(family, table.families)}')
    check_table(out, table.columns)
    rows = [row for family in tqdm(families) for row in table.rows(family)]
    write_csv(out, table.columns, [{column: row.get(column, '') for column in table.columns} for row in rows])
