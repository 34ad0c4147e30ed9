"""Estimate what a training takes on given GPUs: images a second, hours, network, loader, money.

    python scripts/plan_training.py --gpus 32 --gpu h100 --recipe scripts/recipes/senetv2_resnet50_rsb_a2.yaml --price 3

The figures are a model on paper, within a quarter of timm's published training speeds on one RTX 3090; on other GPUs
it scales with the memory's bandwidth, and nothing was measured here. Where results/benchmark_cuda.csv has the model and
the GPU, its measured speed is taken instead. experiments/cost.py has all constants with their sources.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a package that is installed, and not as editable

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, one_line, run  # noqa: E402


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text} is not a number above zero')
    return value


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('--gpus', type=int, required=True, metavar='N', help='how many, in machines of eight')
    parser.add_argument('--gpu', required=True, metavar='NAME', help='rtx3090, rtx4090, a100, h100 or h200')
    parser.add_argument('--recipe', type=Path, required=True, metavar='FILE', help="YAML options of timm's train.py")
    parser.add_argument('--images', type=int, metavar='N', help="training images (default: those of the recipe's set)")
    parser.add_argument('--network', type=_above_zero, metavar='GB/S', help='for each GPU, between them')
    parser.add_argument('--price', type=_above_zero, metavar='MONEY', help='of one GPU for an hour')
    args = parser.parse_args(argv)
    if args.gpus < 1 or args.images is not None and args.images < 1:
        parser.error('--gpus and --images are whole numbers above zero')

    import yaml

    from experiments import cost

    try:
        recipe = yaml.safe_load(args.recipe.read_text(encoding='utf-8'))
    except RecursionError:
        raise UserError(f'{args.recipe} is nested too deeply') from None
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f'{args.recipe} cannot be read: {one_line(e)}') from None
    if not isinstance(recipe, dict):
        raise UserError(f'{args.recipe} is not a YAML file of options')
    network = args.network * 1e9 if args.network else None
    results = ROOT / 'results' / 'benchmark_cuda.csv'
    found = cost.plan(
        recipe, args.gpus, args.gpu, images=args.images, network=network, price=args.price, results=results
    )
    print(f'{recipe["model"]} on {args.gpus} x {args.gpu}, {recipe.get("epochs", 300)} epochs')
    print(f'  one GPU       {found.images_per_gpu:,.0f} images/s, {found.source}')
    print(f'  all           {found.images:,.0f} images/s, {found.step_seconds * 1e3:,.0f} ms a step')
    print(f'  hours         {found.hours:,.1f}, {found.hours * args.gpus:,.0f} GPU hours')
    print(
        f'  gradients     {found.gradient_bytes / 1e6:,.0f} MB a step, exchanged in '
        f'{found.exchange_seconds * 1e3:,.1f} ms; {found.exposed_seconds * 1e3:,.1f} ms of it not during backward'
    )
    print(
        f'  loader        {found.loader_cores:,.0f} cores at {cost.CORE:.0f} images/s each, '
        f'{found.loader_bytes / 1e6:,.0f} MB/s read'
    )
    if found.price is not None:
        print(f'  price         {found.price:,.0f}')


if __name__ == '__main__':
    run(main)
