"""Estimate what a training takes on given GPUs: images a second, hours, network, loader, money.

    python scripts/plan_training.py --gpus 32 --gpu h100 --recipe scripts/recipes/senetv2_resnet50_rsb_a2.yaml --price 3

The figures are a model on paper, within a quarter of timm's published training speeds on one RTX 3090; on other GPUs
it scales with the memory's bandwidth, and nothing was measured here. Where results/benchmark_cuda.csv has the model and
the GPU, its measured speed is taken instead. experiments/cost.py has all constants with their sources.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a package that is installed, and not as editable

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, one_line, run  # noqa: E402


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-9 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number above zero, at most a billion')
    return value


def _whole(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text) if text.isdecimal() and len(text) < 20 else 0
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from 1 to {most:,}')
        return value

    return number


def _digits(value: float) -> str:
    """In full above ten, with two digits that count below."""
    return f'{value:,.0f}' if value >= 10 else f'{value:.2g}'


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('--gpus', type=_whole(10**6), required=True, metavar='N', help='how many, in machines of eight')
    parser.add_argument(
        '--gpu', type=str.lower, required=True, metavar='NAME', help='rtx3090, rtx4090, a100, h100 or h200'
    )
    parser.add_argument('--recipe', type=Path, required=True, metavar='FILE', help="YAML options of timm's train.py")
    parser.add_argument(
        '--images', type=_whole(10**12), metavar='N', help="training images (default: those of the recipe's set)"
    )
    parser.add_argument('--network', type=_above_zero, metavar='GB/S', help='for each GPU, between them')
    parser.add_argument('--price', type=_above_zero, metavar='MONEY', help='of one GPU for an hour')
    args = parser.parse_args(argv)

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
    _, height, width = found.input_size
    print(
        f'{recipe["model"]} on {args.gpus} x {args.gpu}, {recipe.get("epochs", 300)} epochs of '
        f'{found.training_images:,} images of {width} x {height} pixels'
    )
    print(f'  one GPU       {_digits(found.images_per_gpu)} images/s, {found.source}')
    print(f'  all           {_digits(found.images)} images/s, {_digits(found.step_seconds * 1e3)} ms a step')
    print(f'  hours         {_digits(found.hours)}, {_digits(found.hours * args.gpus)} GPU hours')
    print(
        f'  gradients     {_digits(found.gradient_bytes / 1e6)} MB a step, exchanged in '
        f'{_digits(found.exchange_seconds * 1e3)} ms; {_digits(found.exposed_seconds * 1e3)} ms of it not during '
        f'backward'
    )
    cores = '' if found.loader_cores is None else f'{_digits(found.loader_cores)} cores at {cost.CORE:.0f} images/s, '
    print(f'  loader        {cores}{_digits(found.loader_bytes / 1e6)} MB/s read')
    if found.price is not None:
        print(f'  price         {_digits(found.price)}')
    if found.source.startswith('estimated') and found.step_seconds < cost.SHORT:
        print(
            f'  too fast      in a step below {cost.SHORT * 1e3:.0f} ms the launches of kernels count too, and the '
            f'loader may be slower'
        )
    if found.source.startswith('estimated') and not (recipe.get('amp') and recipe.get('channels_last')):
        print('  assumed       --amp --channels-last, which the recipe leaves out; slower without')


if __name__ == '__main__':
    run(main)
