"""Render the model card of every released model.tag, from the facts in hub_cards/, into a folder.

    python scripts/render_cards.py cards/ --owner me

Nothing is downloaded: a card needs the model's shape and its config, not its weights.
"""

import argparse
from pathlib import Path

import timm
from _cli import UserError, run
from _profile import count
from timm.models import model_entrypoint, split_model_name_tag
from tqdm import tqdm

from timm_senetv2 import hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='DIR', help='where to write MODEL.TAG.md; created if need be')
    parser.add_argument(
        '--owner', default='timm-senetv2', help='owner of the repositories on the Hub (default: %(default)s)'
    )
    args = parser.parse_args()
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot make the folder {args.folder}: {e.strerror}') from None
    released = [
        name for name in timm.list_pretrained() if model_entrypoint(name).__module__.startswith('timm_senetv2.')
    ]
    for name in tqdm(released, unit='card'):
        try:
            facts = hub.facts_of(*split_model_name_tag(name))
            card = hub.render_card(timm.create_model(name, device='meta'), f'{args.owner}/{name}', facts, count)
        except hub.HubError as e:
            raise UserError(e) from None
        (args.folder / f'{name}.md').write_text(str(card), encoding='utf-8', newline='\n')


if __name__ == '__main__':
    run(main)
