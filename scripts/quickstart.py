"""Train the small models of the papers on real images, save them, load one again, and draw what it sees."""

# torch, timm and matplotlib are imported in main(), after the arguments: --help needs no installation and no patience
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this clone's packages, whatever is installed

from timm_senetv2.commands import Parser  # noqa: E402  needs nothing installed either
from timm_senetv2.errors import UserError, run  # noqa: E402

MODELS = ('small_cnn', 'small_secnn', 'small_saecnn', 'cifar_senetv2_resnet20')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__ + ' Takes a few minutes on two CPU cores; uses a GPU where there is one. Writes a '
        'folder a model (model.safetensors and config.json, which timm loads as local-dir:FOLDER), results.csv (a row '
        'an epoch) and quickstart.png. They replace those of the last run when all is trained, not before.',
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=list(MODELS),
        metavar='MODEL',
        help=f'names from timm.list_models(), trained from scratch (default: {" ".join(MODELS)})',
    )
    parser.add_argument('--epochs', type=int, default=10, metavar='N', help='passes over the images (default: 10)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='each model starts from it (default: 0)')
    parser.add_argument(
        '--dataset',
        default='digits',
        metavar='NAME',
        help='digits (1,797 handwritten ones that come with scikit-learn, a quarter held out), fashion-mnist, cifar10, '
        'cifar100, or the path of an image folder: train/ and val/ with a folder for each class in them, or the '
        "classes' folders alone, of which a quarter is held out (default: digits)",
    )
    parser.add_argument(
        '--data-dir',
        metavar='DIR',
        help="where fashion-mnist, cifar10 or cifar100 is or shall be downloaded to (default: in the user's cache)",
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=ROOT / 'output' / 'quickstart',
        metavar='DIR',
        help='folder to write: a new one, or one that this script wrote (default: output/quickstart in the clone)',
    )
    args = parser.parse_args(argv)
    if args.epochs < 1:
        raise UserError(f'--epochs must be at least 1, got {args.epochs}')
    if not 0 <= args.seed < 2**32:
        raise UserError(f'--seed must lie in 0 to {2**32 - 1}, got {args.seed}')
    args.models = list(dict.fromkeys(args.models))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from experiments.quickstart import quickstart

    quickstart(args.models, args.epochs, args.seed, args.dataset, args.data_dir, args.out)


if __name__ == '__main__':
    run(main)
