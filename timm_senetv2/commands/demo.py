"""Serve a page to play with: choose a model, give an image, see classes, gates and where the class is seen.

    timm-senetv2 demo
    timm-senetv2 demo --models 'cifar_*' local-dir:seanet20_cifar10 hf-hub:me/mine
    timm-senetv2 demo --models cifar_senetv2_resnet20 --space out/     writes a Hugging Face Space and serves nothing

Only this machine can reach the page unless --host or --share says otherwise. A visitor can choose from the list of
--models and, with --allow-hub, type other models of this package on the Hub; never a folder of this machine. Without
--models the list has the weights that this package carries and, while only this machine can reach the page, all tags.
"""

import argparse
import math
from collections.abc import Sequence

from . import PROG, Parser


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog=f'{PROG} demo', description=__doc__)
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='NAME',
        help='what can be chosen: models, model.tag, wildcard patterns, local-dir:FOLDER, hf-hub:OWNER/NAME',
    )
    parser.add_argument('--allow-hub', action='store_true', help='visitors may type hf-hub:OWNER/NAME')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: 127.0.0.1)')
    parser.add_argument('--port', type=port, default=7860, help='port to listen on, 0 for any free one (default: 7860)')
    parser.add_argument('--share', action='store_true', help="open a public link through Gradio's servers")
    parser.add_argument(
        '--timeout',
        type=seconds,
        default=60.0,
        metavar='SECONDS',
        help='how long a visitor waits at most, for a download say (default: 60)',
    )
    parser.add_argument(
        '--space',
        metavar='DIR',
        help='write a Hugging Face Space and serve nothing: a new folder, or one that this command wrote',
    )
    parser.add_argument(
        '--package',
        metavar='REQUIREMENT',
        help='what the Space installs (default: this version from the package index), such as '
        "'timm-senetv2[demo] @ git+https://…'",
    )
    args = parser.parse_args(argv)
    if args.package is not None and args.space is None:
        parser.error('--package is for --space')

    from ..demo import Settings, serve, write_space

    settings = Settings(args.models, args.allow_hub, args.host, args.port, args.share, args.timeout)
    if args.space is None:
        serve(settings)
        return
    write_space(args.space, settings, args.package)
    print(f'wrote a Space to {args.space}; its README.md says how to push it')


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError('must be from 0 to 65535')
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError('must be above 0')
    return value
