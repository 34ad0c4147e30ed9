"""Put a model on the Hugging Face Hub: weights as safetensors, timm's config, a model card, all in one commit.

    python scripts/push_to_hub.py --model cifar_senetv2_resnet20 --pretrained fmnist --repo-id me/mine.fmnist
    python scripts/push_to_hub.py --model senetv2_resnet50 --checkpoint output/train/run/model_best.pth.tar --ema \\
        --card facts.yaml --repo-id me/senetv2_resnet50.mine --private
    python scripts/push_to_hub.py ... --dry-run out/     writes the three files and pushes nothing

The weights must fit the model before anything is created on the Hub. What was pushed is downloaded again and compared,
file by file and logit by logit. Where the repository holds the same files already, no commit is made; where a push
failed, the same command finishes it. The token is the one of `hf auth login` or $HF_TOKEN.
"""

import argparse
import logging
import sys
import tempfile
from typing import TextIO

from _cli import UserError, run
from _profile import count
from huggingface_hub import get_token
from timm.utils import ParseKwargs

from timm_senetv2 import hub


class Masked:
    """A text stream that never shows a secret, whoever writes to it."""

    def __init__(self, stream: TextIO, secret: str) -> None:
        self.stream = stream
        self.secret = secret

    def write(self, text: str) -> int:
        return self.stream.write(text.replace(self.secret, '<token>'))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def set_up_output(verbose: bool) -> None:
    """Mask the token in all output, and with `verbose` show what the Hub's client does."""
    client_log = logging.getLogger('huggingface_hub')
    if token := get_token():
        sys.stdout, sys.stderr = Masked(sys.stdout, token), Masked(sys.stderr, token)
        for handler in client_log.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format='%(name)s: %(message)s')
    if verbose:
        client_log.setLevel(logging.DEBUG)
        logging.getLogger('timm_senetv2').setLevel(logging.DEBUG)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='model name, such as senetv2_resnet50')
    parser.add_argument(
        '--repo-id', required=True, metavar='OWNER/NAME', help='repository on the Hub; created if it is not there'
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        '--checkpoint', metavar='FILE', help="a checkpoint of timm's train.py, a state dict, or a safetensors file"
    )
    weights.add_argument('--pretrained', metavar='TAG', help="the model's pretrained weights of this tag")
    parser.add_argument('--ema', action='store_true', help='take the averaged weights of the checkpoint')
    parser.add_argument(
        '--num-classes', type=int, metavar='N', help="classes of the checkpoint (default: the model's own number)"
    )
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help='options of the model, as for train.py, such as sae_reduction=16',
    )
    parser.add_argument(
        '--card',
        metavar='FILE',
        help='YAML file of facts for the model card (default: hub_cards/MODEL.TAG.yaml with --pretrained, else none)',
    )
    parser.add_argument('--private', action='store_true', help='create the repository as a private one')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--revision', default='main', help='branch; created if it is not there (default: main)')
    parser.add_argument('--dry-run', metavar='DIR', help='write the files into DIR, and push nothing')
    parser.add_argument('-v', '--verbose', action='store_true', help="show what the Hub's client does")
    return parser.parse_args()


def push(args: argparse.Namespace) -> None:
    model_args = dict(args.model_kwargs)
    if args.num_classes is not None:
        model_args['num_classes'] = args.num_classes
    facts = hub.load_facts(args.card) if args.card else hub.Facts()
    model = hub.build(args.model, args.pretrained, args.checkpoint, args.ema, **model_args)
    if args.pretrained and not args.card:
        facts = hub.facts_of(args.model, args.pretrained)
    card = hub.render_card(model, args.repo_id, facts, count)
    if args.dry_run:
        hub.write_files(model, args.dry_run, card, facts)
        print(f'wrote {", ".join(hub.FILES)} to {args.dry_run}')
        return
    with tempfile.TemporaryDirectory() as folder:
        hub.write_files(model, folder, card, facts)
        pushed = hub.push(
            folder, args.repo_id, model, private=args.private, create_pr=args.create_pr, revision=args.revision
        )
    print(f'{"pushed" if pushed.new else "nothing to do, the same files are there"}: {pushed.url}')
    print('downloaded again: the same files, the same logits')
    print(hub.load_line(args.repo_id, pushed.revision))


def main() -> None:
    args = parse_args()
    set_up_output(args.verbose)
    try:
        push(args)
    except hub.HubError as e:
        raise UserError(e) from None


if __name__ == '__main__':
    run(main)
