"""Train ResNets without attention, with SE and with SaE beside other kinds of networks of timm, under one protocol.

    python scripts/compare_architectures.py --dataset cifar100 --seeds 0 1 2 --epochs 100 --out output/architectures

The others are EfficientNet, MobileNetV3, RegNetY and a small vision transformer, made for small images: a stride of 8
in place of 32 where timm has the option, patches of an eighth of the image. --list says what each costs. The optimizer
is AdamW, which all of them train with: lr 0.001, weight decay 0.05, cosine, label smoothing 0.1, batch 128.

Whatever this script has no option for goes to reproduce.py (`python scripts/reproduce.py --help`), and may change what
stands above: --opt, --lr, --data-dir, --limit, --amp, --device. The folder --out is one of reproduce.py, with
step_times.csv and accuracy_vs_cost.png: accuracy against parameters, multiply-adds and the time of a training step.
Time steps on a machine that does nothing else: run the finished command again.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's packages, whatever is installed

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, run  # noqa: E402


def models(side: int, small: bool = False) -> list[str]:
    """The networks for images of so many pixels, as words of reproduce.py."""
    ours = ['cifar_resnet20', 'cifar_seresnet20', 'cifar_senetv2_resnet20']
    if small:
        return [
            *ours,
            'tinynet_e:output_stride=8',
            'mobilenetv3_small_100',
            'regnety_002:output_stride=8',
            f'vit_tiny_patch16_224:img_size={side},patch_size={side // 4},embed_dim=64,depth=8,num_heads=2',
        ]
    return [
        *ours,
        'efficientnet_b0:output_stride=8',
        'mobilenetv3_large_100',
        'regnety_002:output_stride=8',
        f'vit_tiny_patch16_224:img_size={side},patch_size={side // 8},embed_dim=64,depth=8,num_heads=2',
    ]


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--image-size', type=int, default=32, metavar='N', help='side of the images (default: 32)')
    parser.add_argument(
        '--small',
        action='store_true',
        help='for a CPU, smaller ones of these kinds: TinyNet-E, a scaled-down EfficientNet; MobileNetV3-Small; '
        'patches of a quarter of the image for the transformer',
    )
    parser.add_argument('--models', nargs='+', default=[], metavar='MODEL', help='further models')
    parser.add_argument(
        '--list', action='store_true', help='list the models with parameters and multiply-adds, and end'
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='one epoch on 64 images under one seed, to try the command; the figures mean nothing',
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, others = parse_args(argv)
    given = list(sys.argv[1:] if argv is None else argv)

    if args.image_size < 16 or args.image_size % 8:
        raise UserError(f'--image-size must be a multiple of 8 of at least 16, got {args.image_size}')
    words = [*models(args.image_size, args.small), *args.models]
    if args.list:
        print(listing(words, args.image_size))
        return
    import reproduce

    chosen = ['--image-size', str(args.image_size), '--opt', 'adamw', '--lr', '0.001', '--weight-decay', '0.05']
    chosen += ['--step-time', *others]
    if args.quick:
        chosen += ['--limit', '64', '--epochs', '1', '--batch-size', '16', '--seeds', '0']
    reproduce.main(
        ['--models', *words, *chosen],
        command=shlex.join(['python', 'scripts/compare_architectures.py', *given]),
    )


def listing(words: Sequence[str], side: int) -> str:
    """Parameters and multiply-adds of each model with ten classes, as a table."""
    from experiments.settings import parse_specs
    from experiments.warm_start import build
    from timm_senetv2.profile import count

    lines = ['| model | parameters | GMACs |', '|---|--:|--:|']
    for spec in (spec for word in words for spec in parse_specs(word)):
        costs = count(build(spec, 10, shapes_only=True), (3, side, side))
        lines.append(f'| `{spec}` | {costs.params:,} | {costs.macs / 1e9:.4f} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main)
