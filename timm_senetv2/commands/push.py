"""Put a model on the Hugging Face Hub: weights as safetensors, timm's config, a model card, all in one commit.

    timm-senetv2 push --model cifar_senetv2_resnet20 --pretrained fmnist --repo-id me/mine.fmnist
    timm-senetv2 push --model senetv2_resnet50 --checkpoint output/train/run/model_best.pth.tar --ema \\
        --card facts.yaml --repo-id me/senetv2_resnet50.mine --private
    timm-senetv2 push ... --dry-run out/     writes the three files and pushes nothing

The weights must fit the model before anything is created on the Hub. What was pushed is downloaded again and compared,
file by file and logit by logit. Where the repository holds the same files already, no commit is made; where a push
failed, the same command finishes it. The token is the one of `hf auth login` or $HF_TOKEN.
"""

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ..errors import Stream
from . import PROG, Parser, options

_REPORT_EVERY = 10.0  # seconds


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    _set_up_output(args.verbose)
    _push(args)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=f'{PROG} push', description=__doc__)
    parser.add_argument(
        '--model',
        required=True,
        help='model name, such as senetv2_resnet50; a tag says whose preprocessing a checkpoint was trained with, if '
        'the file does not say it',
    )
    parser.add_argument(
        '--repo-id', required=True, metavar='OWNER/NAME', help='repository on the Hub; created if it is not there'
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        '--checkpoint',
        metavar='FILE',
        help="a checkpoint of timm's train.py, of the SEANet authors or of an unofficial port, or a plain state dict",
    )
    weights.add_argument('--pretrained', metavar='TAG', help="the model's pretrained weights of this tag")
    parser.add_argument('--ema', action='store_true', help='take the averaged weights of the checkpoint')
    parser.add_argument(
        '--num-classes', type=int, metavar='N', help='classes of the model (default: those of the checkpoint or tag)'
    )
    options.add_model_kwargs(parser)
    parser.add_argument(
        '--card', metavar='FILE', help='YAML file of facts for the model card (default: those of the tag, else none)'
    )
    parser.add_argument(
        '--license',
        metavar='ID',
        help="licence of the weights, such as apache-2.0 (default: that of the card's facts, or of the tag)",
    )
    parser.add_argument(
        '--private',
        action='store_true',
        help='create the repository as a private one; one that is there and public is refused',
    )
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--revision', default='main', help='branch; created if it is not there (default: main)')
    parser.add_argument(
        '--dry-run',
        metavar='DIR',
        help='write the files into DIR, and push nothing: a new folder, or one that this command wrote',
    )
    parser.add_argument(
        '--timeout',
        type=minutes,
        default=60.0,
        metavar='MINUTES',
        help='end the push after this time, however slow the Hub is; the same command finishes it (default: 60)',
    )
    parser.add_argument('-v', '--verbose', action='store_true', help="show what the Hub's client does")
    return parser.parse_args(argv)


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 60 * 24 * 7:
        raise argparse.ArgumentTypeError('must be above 0, and at most a week, in minutes')
    return value


class _Masked(Stream):
    """A text stream that never shows a secret, whoever writes to it."""

    def __init__(self, stream: TextIO, secret: str) -> None:
        super().__init__(stream)
        self._secret = secret

    def write(self, text: str) -> int:
        return super().write(text.replace(self._secret, '<token>'))


def _set_up_output(verbose: bool) -> None:
    """Mask the token in all output, and with `verbose` show what the Hub's client does."""
    from huggingface_hub import get_token

    client_log = logging.getLogger('huggingface_hub')
    if token := get_token():
        sys.stdout, sys.stderr = _Masked(sys.stdout, token), _Masked(sys.stderr, token)
        for handler in client_log.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format='%(name)s: %(message)s')
    if verbose:
        client_log.setLevel(logging.DEBUG)
        logging.getLogger('timm_senetv2').setLevel(logging.DEBUG)
    else:  # the steps that `_Watch` listens to are not for the log
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.WARNING)


class _Watch(logging.Handler):
    """Tells every few seconds which step a push is at, and ends the process when its time is up.

    A request of huggingface_hub's has no bound in all: a Hub that sends a byte a second keeps it for hours. Its threads
    cannot be stopped from outside, so the process ends; the Hub then has the whole commit or nothing of it.
    """

    def __init__(self, seconds: float, folder: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(logging.INFO)
        self._seconds, self._folder = seconds, folder
        self._step, self._over = 'start', threading.Event()
        self._logger = logging.getLogger('timm_senetv2.hub')

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self._step = record.getMessage()

    def __enter__(self) -> None:
        self._level = self._logger.level
        if self._logger.getEffectiveLevel() > logging.INFO:
            self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)

    def _watch(self) -> None:
        began = time.monotonic()
        while (left := began + self._seconds - time.monotonic()) > 0:
            if self._over.wait(min(left, _REPORT_EVERY)):
                return
            passed = time.monotonic() - began
            if passed < self._seconds:
                print(f'{self._step}: {passed:.0f} s of at most {self._seconds:.0f} s', file=sys.stderr, flush=True)
        print(
            f'error: the push was not over after {self._seconds / 60:g} minutes; its last step: {self._step}. '
            'Run it again, and it goes on where it stopped; --timeout allows more time',
            file=sys.stderr,
            flush=True,
        )
        self._folder.cleanup()
        sys.stdout.flush()
        os._exit(2)


def _push(args: argparse.Namespace) -> None:
    from .. import hub
    from ..catalog import config_of
    from ..files import check_output

    hub.check_target(args.repo_id, args.revision)
    if args.dry_run is not None:
        check_output(args.dry_run, 'push')
    model_args = options.model_kwargs(args.model_kwargs)
    if args.num_classes is not None:
        model_args['num_classes'] = args.num_classes
    facts = hub.load_facts(args.card) if args.card is not None else hub.Facts()
    if args.license is not None:
        facts = hub.with_license(facts, args.license)
    temporary = tempfile.TemporaryDirectory()
    with temporary, _Watch(args.timeout * 60, temporary):
        model = hub.build(args.model, args.pretrained, args.checkpoint, args.ema, **model_args)
        if args.pretrained is not None and args.card is None:
            facts = hub.facts_of(config_of(model)['architecture'], args.pretrained)
            facts = facts if args.license is None else hub.with_license(facts, args.license)
        card = hub.render_card(model, args.repo_id, facts)
        folder = Path(temporary.name) / 'files' if args.dry_run is None else args.dry_run
        hub.write_files(model, folder, card, facts)
        if args.dry_run is not None:
            print(f'preprocessing: {options.preprocessing(config_of(model))}')
            print(f'wrote {", ".join(hub.FILES)} to {args.dry_run}')
            return
        pushed = hub.push(
            folder, args.repo_id, model, private=args.private, create_pr=args.create_pr, revision=args.revision
        )
    print(f'{"pushed" if pushed.new else "nothing to do, the same files are there"}: {pushed.url}')
    print('downloaded again: the same files, the same logits')
    print(hub.load_line(args.repo_id, pushed.revision))
