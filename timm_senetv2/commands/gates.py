"""Measure and draw what the channel attention of a trained model does, on your images.

    timm-senetv2 gates senetv2_resnet50 --data imagenet/val --out gates/
    timm-senetv2 gates local-dir:mine --data photos --classes cat dog bird --overlay 8 --out gates/
    timm-senetv2 gates cifar_senetv2_resnet20.fmnist --data data --dataset torch/fashion_mnist --out gates/

MODEL is any name that timm.create_model takes and that has pretrained weights, of this package or of timm, with SaE,
SE, effective SE or ECA: name.tag, local-dir:DIR, hf-hub:OWNER/NAME. --data is a folder with a folder of images for each
class. Writes into the folder --out: report.md, which says in sentences what was found; pictures; the numbers as CSV.

As in section 6.4 of the SENet paper: how the gates are distributed over images, by class and within one. To see whether
a block's attention matters, its gates are replaced by their means over the images; for this the model runs once for
each block, so --effect-images 0 is much quicker.
"""

from collections.abc import Sequence
from pathlib import Path

from . import PROG, Parser, need


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog=f'{PROG} gates', description=__doc__)
    parser.add_argument('model', metavar='MODEL', help='name with or without tag, local-dir:DIR, or hf-hub:OWNER/NAME')
    parser.add_argument(
        '--data',
        '--data-dir',
        required=True,
        type=Path,
        metavar='DIR',
        help='folder with a folder of images for each class, or of a --dataset',
    )
    parser.add_argument(
        '--dataset',
        default='',
        metavar='torch/NAME',
        help='a data set of torchvision in DIR, such as torch/cifar10, as for train.py',
    )
    parser.add_argument('--dataset-download', action='store_true', help='download that data set into DIR')
    parser.add_argument(
        '--split',
        default='validation',
        help='part of the data: train, validation, test, or a folder (default: validation, or else test)',
    )
    parser.add_argument(
        '--images',
        type=int,
        default=1000,
        metavar='N',
        help='images at most, as many of each class; of so many classes that each has about 20 (default: 1000)',
    )
    parser.add_argument(
        '--effect-images', type=int, metavar='N', help='of these, images to replace gates on; 0: none (default: all)'
    )
    parser.add_argument(
        '--classes', nargs='+', default=[], metavar='NAME', help='classes to draw, at most 7 (default: 5 of them)'
    )
    parser.add_argument(
        '--overlay', type=int, default=0, metavar='N', help='also draw class-activation maps (Grad-CAM) of N images'
    )
    parser.add_argument('--img-size', type=int, metavar='PIXELS', help="side of the images (default: the model's)")
    parser.add_argument('-b', '--batch-size', type=int, default=64, metavar='N', help='images at a time (default: 64)')
    parser.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='loading processes (default: 2)')
    parser.add_argument('--device', default='cpu', help='such as cuda (default: cpu)')
    parser.add_argument(
        '--out', required=True, type=Path, metavar='DIR', help='new folder, or one that this command wrote'
    )
    args = parser.parse_args(argv)
    if args.overlay:
        need({'gates': ('pytorch_grad_cam',)}, f'{PROG} gates --overlay')

    from ..gates_report import write_report

    print(write_report(**vars(args)))
    print(f'wrote {args.out}')
