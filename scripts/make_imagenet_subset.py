"""Make the SENetV2 paper's reduced ImageNet: the same number of training images for every class, without copies.

    python scripts/make_imagenet_subset.py imagenet imagenet-250 --per-class 250 --seed 0
    timm-senetv2 train --data-dir imagenet-250 --model senetv2_resnet50 ...

SRC is a folder with train/ (and validation/ or val/, which is linked as it is), a folder with a folder for each class,
or a tar that timm reads: of class folders, or of one tar a class as ImageNet's own ILSVRC2012_img_train.tar. DST gets
train/CLASS/IMAGE, links into a folder or files out of a tar, and manifest.json with the list and its SHA-256.

An image is in or out by a hash of the seed and its class and file name alone, so the same seed gives the same images on
any machine, from folder and tar alike, and 100 a class are among the 250. Interrupted and run again, it goes on.
"""

# The rest is imported in main(), after the arguments: --help needs no patience
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's packages, whatever is installed

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import run  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('src', metavar='SRC', type=Path, help='image folder or .tar')
    parser.add_argument('dst', metavar='DST', type=Path, help='folder to make; not inside SRC')
    parser.add_argument(
        '--per-class', type=int, default=250, metavar='N', help='training images of each class (default: 250)'
    )
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='other seeds choose other images (default: 0)')
    args = parser.parse_args(argv)

    from experiments.imagenet_subset import make_subset

    make_subset(args.src, args.dst, args.per_class, args.seed)


if __name__ == '__main__':
    run(main)
