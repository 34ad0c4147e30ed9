"""List the models: tags, accuracies, parameters, multiply-adds.

    timm-senetv2 models
    timm-senetv2 models 'senextv2_*' --json

A tag's accuracy is the top-1 in % that timm publishes for the weights it starts from, on ImageNet-1k's validation set,
at the image size in brackets; the tag marked * is the one that pretrained=True loads. Weights that this package carries
itself, such as .fmnist, have their figures on their cards: timm-senetv2 cards.
"""

import json
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import PROG, Parser

if TYPE_CHECKING:
    from .. import catalog


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog=f'{PROG} models', description=__doc__)
    parser.add_argument('filter', nargs='*', help="wildcard patterns as for timm.list_models, such as 'senetv2_*'")
    parser.add_argument('--json', action='store_true', help='print JSON: a list with an object for each model')
    args = parser.parse_args(argv)

    from .. import catalog
    from ..errors import UserError, did_you_mean, printable

    rows = catalog.models(args.filter)
    if not rows:
        patterns = ' '.join(args.filter)
        raise UserError(f'no model matches {printable(patterns)!r}{did_you_mean(patterns, catalog.names())}')
    if args.json:
        print(json.dumps([catalog.as_json(row) for row in rows], indent=2))
        return
    width = max(len(row.name) for row in rows)
    head = f'{"model":{width}}  pixels  params, M    GMACs  '
    print(f'{head}pretrained tags: top-1, % (pixels); * is the default')
    room = max(40, shutil.get_terminal_size().columns - len(head))
    for row in rows:
        sizes = f'{row.input_size[-1]:6}  {row.params / 1e6:9.2f}  {row.macs / 1e9:7.3f}'
        first, *more = textwrap.wrap('  '.join(_tag(tag) for tag in row.tags), room, break_long_words=False) or ['']
        print(f'{row.name:{width}}  {sizes}  {first}'.replace('\xa0', ' ').rstrip())
        for line in more:
            print(' ' * len(head) + line.replace('\xa0', ' '))


def _tag(tag: 'catalog.Tag') -> str:
    best = f'\xa0{tag.accuracies[0].top1:.2f}\xa0({tag.accuracies[0].img_size})' if tag.accuracies else ''
    return f'{tag.tag}{"*" if tag.default else ""}{best}'
