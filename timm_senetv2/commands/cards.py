"""Write the model card of every released model.tag into a folder, as MODEL.TAG.md.

    timm-senetv2 cards cards/ --owner me

Nothing is downloaded: a card needs the model's shape and its config, not its weights.
"""

from collections.abc import Sequence
from pathlib import Path

from . import PROG, Parser


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog=f'{PROG} cards', description=__doc__)
    parser.add_argument(
        'folder',
        type=Path,
        metavar='DIR',
        help='a new folder, or one that this command wrote and nobody changed',
    )
    parser.add_argument(
        '--owner', default='timm-senetv2', help='owner of the repositories on the Hub (default: %(default)s)'
    )
    args = parser.parse_args(argv)

    from tqdm import tqdm

    from .. import catalog, hub
    from ..files import check_output, output_folder
    from ..hub.card import data_configs
    from ..profile import Profile, count, on_meta

    hub.check_target(f'{args.owner}/name')
    check_output(args.folder, 'cards')
    released = [(name, tag) for name in catalog.names() for tag in catalog.tags(name)]
    costs: dict[tuple[str, tuple[int, int, int]], Profile] = {}
    with output_folder(args.folder, 'cards') as folder:
        for name, tag in tqdm(released, unit='card'):
            facts = hub.facts_of(name, tag)
            model = on_meta(f'{name}.{tag}')
            size = data_configs(model, facts)[0]['input_size']
            if (name, size) not in costs:  # tags differ in their weights alone, and counting takes the longest
                costs[name, size] = count(model, size)
            card = hub.render_card(model, f'{args.owner}/{name}.{tag}', facts, costs[name, size])
            (folder / f'{name}.{tag}.md').write_text(str(card), encoding='utf-8', newline='\n')
    print(f'wrote {len(released)} cards to {args.folder}')
