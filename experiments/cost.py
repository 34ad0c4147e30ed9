"""What a training takes on given GPUs, on paper: images a second, hours, network, loader, money.

A convolutional network in training goes over its activations again and again, so the memory's bandwidth limits it
before the matrix units do. One number, the passes over the activations, turns a GPU's bandwidth into images a second.
It comes from timm's published training benchmark of an RTX 3090 (huggingface/pytorch-image-models,
results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv), ten of whose rows are in `PUBLISHED`: the tests hold the
model against all of them. Where results/benchmark_cuda.csv has the model and the GPU, the measured figure is taken.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from timm.data import resolve_data_config
from timm.layers import SEModule
from torch import nn

from timm_senetv2.errors import UserError, did_you_mean, one_line, printable
from timm_senetv2.layers import SqueezeAggregatedExcitation
from timm_senetv2.profile import count, on_meta

from .files import read_csv

# Passes over the outputs of the convs in a training step with autocast, channels-last, without a compiler: about what
# the rows below give for their models, without attention and with SE
PASSES, PASSES_WITH_ATTENTION = 40.0, 47.0
BYTES = 2  # of an activation in half precision
EFFICIENCY = 0.5  # of the matrix units' rate that convs reach at best: an assumption, a bound that is rarely met
BACKWARD = 2 / 3  # of a step is backward pass, during which gradients are exchanged
VALIDATION = 1.02  # 50,000 images without a backward pass after 1.28 million with one
CORE = 150.0  # images a second that one CPU core decodes and augments at 224 pixels: a rule of thumb, measure yours
PHOTO = 128  # pixels of a side from which the images are taken for such JPEGs
SHORT = 0.02  # seconds: in a shorter step the launches of some thousand kernels count, which the model leaves out

# Images a second, one RTX 3090, AMP, channels-last, torch 1.12: timm's own measurement
PUBLISHED = {
    'resnet101': 747.89,
    'resnet152': 501.44,
    'resnext101_32x4d': 609.01,
    'resnext101_64x4d': 363.79,
    'resnext101_32x8d': 312.80,
    'seresnet101': 590.42,
    'seresnet152': 379.38,
    'seresnext50_32x4d': 814.69,
    'seresnext101_32x4d': 479.03,
    'seresnext101_32x8d': 278.13,
}


@dataclass(frozen=True)
class Gpu:
    """The maker's data sheet.

    Attributes:
        name: How torch names it begins or contains this.
        rate: Multiplications and additions a second in bfloat16, dense.
        bandwidth: Bytes a second of its memory.
        link: Bytes a second and direction to the other GPUs of its machine.
    """

    name: str
    rate: float
    bandwidth: float
    link: float


GPUS = {
    'rtx3090': Gpu('RTX 3090', 71e12, 936e9, 32e9),
    'rtx4090': Gpu('RTX 4090', 165e12, 1008e9, 32e9),
    'a100': Gpu('A100-SXM4-80GB', 312e12, 2039e9, 300e9),
    'h100': Gpu('H100 80GB', 989e12, 3350e9, 450e9),
    'h200': Gpu('H200', 989e12, 4800e9, 450e9),
}
PER_MACHINE = 8
NETWORK = 25e9  # bytes a second for each GPU between machines: an adapter of 200 Gbit/s each


@dataclass(frozen=True)
class Data:
    """A training set: images, and bytes of one as it is stored."""

    images: int
    bytes_each: float


DATA = {
    'imagenet': Data(1_281_167, 138e9 / 1_281_167),
    'torch/cifar10': Data(50_000, 3072),
    'torch/cifar100': Data(50_000, 3072),
    'torch/fashion_mnist': Data(60_000, 784),
}


@dataclass(frozen=True)
class Plan:
    """What `plan` finds. Rates are a second, of all GPUs together unless the name says otherwise."""

    training_images: int
    input_size: tuple[int, int, int]
    images_per_gpu: float
    source: str
    images: float
    step_seconds: float
    hours: float
    gradient_bytes: int
    exchange_seconds: float
    exposed_seconds: float
    loader_cores: float | None  # None where the images are too small for the rule of thumb
    loader_bytes: float
    price: float | None


def images_per_second(name: str, gpu: Gpu, compiled: bool = False, model_args: dict[str, Any] | None = None) -> float:
    """Images a second of one GPU in training at the model's own input size, by the model above.

    Args:
        name: A timm name.
        gpu: Where.
        compiled: torch.compile: the one-pass tail of this package's blocks adds no pass to those of a plain network.
        model_args: Options of the model.
    """
    model = on_meta(name, **(model_args or {}))
    return 1 / max(_seconds(model, cast(dict[str, Any], model.pretrained_cfg)['input_size'], gpu, compiled))


def _seconds(model: nn.Module, input_size: tuple[int, int, int], gpu: Gpu, compiled: bool) -> tuple[float, float]:
    """Seconds that the memory, and that the matrix units, need for one image in training."""
    profile = count(model, input_size)
    attention = any(isinstance(m, SEModule | SqueezeAggregatedExcitation) for m in model.modules())
    passes = PASSES_WITH_ATTENTION if attention and not compiled else PASSES
    memory = profile.activations * BYTES * passes / gpu.bandwidth
    return memory, 2 * 3 * profile.macs / (gpu.rate * EFFICIENCY)


def _model(recipe: dict[str, Any]) -> tuple[nn.Module, tuple[int, int, int]]:
    """The recipe's model, and channels, height and width of its images, as timm's train.py takes them."""
    name = recipe.get('model', '')
    if not isinstance(name, str) or not timm.is_model(name):
        close = did_you_mean(str(name), timm.list_models())
        raise UserError(f'the recipe names no model that timm knows: {printable(repr(name))}{close}')
    given = {key: recipe[key] for key in ('input_size', 'img_size', 'in_chans') if recipe.get(key) is not None}
    size, options = given.get('input_size'), recipe.get('model_kwargs') or {}
    sides = (*size, given.get('img_size', 1)) if isinstance(size, list) else (given.get('img_size', 1),)
    if size is not None and len(sides) != 4 or any(type(side) is not int or not 0 < side < 2**15 for side in sides):
        raise UserError(
            'input_size of the recipe must be channels, height and width, and img_size one side: whole numbers'
        )
    if not isinstance(options, dict):
        raise UserError('model_kwargs of the recipe must be options with their values')
    if recipe.get('num_classes') is not None:
        options = options | dict(num_classes=_whole(recipe, 'num_classes', 0))
    if channels := given.get('in_chans') or (size and size[0]):
        options = options | dict(in_chans=channels)
    try:
        model = on_meta(name, **options)
        found = resolve_data_config(given, model=model)['input_size']
        count(model, found)
    except Exception as e:  # a wrong option shows as anything
        raise UserError(f'{name} cannot be built, or take its images, as the recipe says: {one_line(e)}') from None
    return model, found


def measured(name: str, gpu: Gpu, compiled: bool, path: Path) -> float | None:
    """Images a second in training as benchmark.py measured them, the largest batch; None where it did not."""
    if not path.exists():
        return None
    rows = [
        row
        for row in read_csv(path)
        if row['contestant'] == name
        and gpu.name in row['machine']
        and row['training'] == 'True'
        and row['runtime'] == ('compiled' if compiled else 'eager')
    ]
    return max((float(row['images_per_s']) for row in rows), default=None)


def _whole(recipe: dict[str, Any], key: str, default: int) -> int:
    value = recipe.get(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise UserError(f'{key} of the recipe must be a whole number above zero, got {printable(repr(value))}')
    return value


def plan(
    recipe: dict[str, Any],
    gpus: int,
    gpu: str,
    *,
    images: int | None = None,
    network: float | None = None,
    price: float | None = None,
    results: Path | None = None,
) -> Plan:
    """What a recipe takes.

    Args:
        recipe: The options of timm's train.py, as in scripts/recipes.
        gpus: How many, in machines of eight.
        gpu: A key of `GPUS`.
        images: In the training set, in place of those of the recipe's data set.
        network: Bytes a second for each GPU between machines, or all where there is one machine.
        price: Of one GPU for an hour.
        results: A benchmark's CSV file, for measured figures.

    Raises:
        UserError: An unknown GPU, model or data set, or a number of the recipe's that is none.
    """
    if gpu not in GPUS:
        raise UserError(f'no figures for the GPU {printable(gpu)!r}{did_you_mean(gpu, GPUS)}; known: {", ".join(GPUS)}')
    data = DATA.get(str(recipe.get('dataset') or 'imagenet'))
    if data is None and images is None:
        raise UserError(f'the size of the data set {printable(repr(recipe["dataset"]))} is not known; give --images')
    device, compiled = GPUS[gpu], bool(recipe.get('torchcompile'))
    model, input_size = _model(recipe)
    plain = not recipe.get('model_kwargs') and input_size == cast(dict[str, Any], model.pretrained_cfg)['input_size']
    name = recipe['model'].partition('.')[0]
    rate = measured(name, device, compiled, results) if results and plain else None
    source = 'measured by scripts/benchmark.py'
    if rate is None:
        memory, arithmetic = _seconds(model, input_size, device, compiled)
        source = (
            "estimated from the memory's bandwidth" if memory > arithmetic else "estimated from the matrix units' rate"
        )
        rate = 1 / max(memory, arithmetic)

    batch = _whole(recipe, 'batch_size', 128) * _whole(recipe, 'grad_accum_steps', 1)
    compute = batch / rate
    params = sum(p.numel() for p in model.parameters())
    gradient = 4 * params  # in float32, whatever the autocast
    link = network or (device.link if gpus <= PER_MACHINE else NETWORK)
    exchange = 2 * (gpus - 1) / gpus * gradient / link  # a ring sends each byte twice, less its own share
    exposed = max(0.0, exchange - BACKWARD * compute)
    step = compute + exposed
    total = gpus * batch / step
    number = images or (data.images if data else 0)
    hours = _whole(recipe, 'epochs', 300) * number / total * VALIDATION / 3600
    return Plan(
        training_images=number,
        input_size=input_size,
        images_per_gpu=rate,
        source=source,
        images=total,
        step_seconds=step,
        hours=hours,
        gradient_bytes=gradient,
        exchange_seconds=exchange,
        exposed_seconds=exposed,
        loader_cores=total / CORE if min(input_size[1:]) >= PHOTO else None,
        loader_bytes=total * (data.bytes_each if data else DATA['imagenet'].bytes_each),
        price=price * gpus * hours if price is not None else None,
    )
