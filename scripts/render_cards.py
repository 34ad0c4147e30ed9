"""Render the model card of every released model.tag, from the facts in hub_cards/, into a folder.

    python scripts/render_cards.py cards/ --owner me

Nothing is downloaded: a card needs the model's shape and its config, not its weights.
"""
import argparse
from pathlib import Path

import timm
from _cli import UserError, run
from _profile import count
from tqdm import tqdm

from timm_senetv2 import hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='DIR', help='where to write MODEL.TAG.md; created if need be')
    parser.add_argument(
        '--owner', default='timm-senetv2', help='owner of the repositories on the Hub (default: %(default)s)')
    args = parser.parse_args()
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot make the folder {args.folder}: {e.strerror}') from None
    for path in tqdm(sorted(hub.CARDS.glob('*.yaml')), unit='card'):
        model = timm.create_model(path.stem, device='meta')
        try:
            card = hub.render_card(model, f'{args.owner}/{path.stem}', hub.load_facts(path), count)
        except hub.HubError as e:
            raise UserError(e) from None
        (args.folder / f'{path.stem}.md').write_text(str(card), encoding='utf-8', newline='\n')


if __name__ == '__main__':
    run(main)
