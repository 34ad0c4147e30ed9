"""Run timm's own train.py, or another of its scripts, as they are: timm's wheel does not carry them.

    timm-senetv2 train --data-dir imagenet --model senetv2_resnet50 ...
    torchrun --nproc_per_node=8 -m timm_senetv2 train --config recipe.yaml --data-dir imagenet
    timm-senetv2 train --script validate --data-dir imagenet --model senetv2_resnet50 --checkpoint last.pth.tar
    timm-senetv2 train --experiment mine --resume auto ...      goes on where that experiment stopped

The script is taken from the first of these: --timm-repo or $TIMM_REPO; the copy of the installed timm's release in
torch.hub's cache; GitHub, by torch.hub, into that cache. `timm` itself stays the installed one. All arguments but the
ones below go to timm's script untouched; but `--resume auto` becomes `--resume` with the newest checkpoint that
train.py left in the folder of its --output and --experiment, or nothing where there is none yet.
"""

import os
from collections.abc import Sequence

from . import PROG, Extras, Parser, need

# Packages that a script of timm's needs beside timm's own, by the extra that brings them
_EXTRAS: Extras = {'inference': {'train': ('pandas',)}, 'onnx_export': {'export': ('onnx', 'onnxscript')}}
SCRIPTS = ('train', 'validate', 'benchmark', 'inference', 'onnx_export')


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog=f'{PROG} train',
        description=__doc__,
        usage="%(prog)s [--script NAME] [--timm-repo DIR] [--resume auto] [--timm-help] [ARGS of timm's script ...]",
        allow_abbrev=False,
    )
    parser.add_argument('--script', choices=SCRIPTS, default='train', help="which of timm's scripts (default: train)")
    parser.add_argument(
        '--timm-repo',
        metavar='DIR',
        default=os.environ.get('TIMM_REPO'),
        help="a checkout of timm's repository, best of the installed version (default: $TIMM_REPO)",
    )
    parser.add_argument('--timm-help', action='store_true', help="show the options of timm's script instead of these")
    args, rest = parser.parse_known_args(argv)
    need(_EXTRAS.get(args.script, {}), f"timm's {args.script}.py")

    from ..timm_scripts import run_script, with_resume

    if args.timm_help:
        rest = ['--help']
    elif args.script == 'train':
        rest = with_resume(rest)
    run_script(args.script, args.timm_repo, rest)
