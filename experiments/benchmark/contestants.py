"""What is measured: models as they run in training and inference, and layers alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import timm
import torch
import torch.nn.functional as F
from timm.models import reparameterize_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_senetv2.errors import UserError, did_you_mean, printable
from timm_senetv2.layers import SqueezeAggregatedExcitation
from timm_senetv2.models.blocks import SaEBasicBlock, SaEBottleneck

from ..randomize import randomize
from .engines import ENGINES, engine
from .timing import Contestant

DTYPES = ('float32', 'bfloat16', 'float16')
VARIANTS = ('reparameterized', 'four-branch')
LAYOUTS = {'NCHW': torch.contiguous_format, 'channels-last': torch.channels_last}
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')


@dataclass(frozen=True)
class Setting:
    """How models run.

    Attributes:
        runtime: 'eager', 'compiled', an engine, or 'compiled, MODE' with one of torch.compile's modes.
        autocast: Whether a dtype other than float32 is that of autocast; else the weights are cast to it.
        size: Height and width of the images in pixels.
    """

    device: str = 'cpu'
    runtime: str = 'eager'
    dtype: str = 'float32'
    autocast: bool = False
    layout: str = 'NCHW'
    training: bool = False
    batch: int = 8
    size: int = 224

    def __str__(self) -> str:
        dtype = f'{self.dtype} by autocast' if self.autocast else self.dtype
        mode = 'training step' if self.training else 'inference'
        return ', '.join([mode, self.device, self.runtime, dtype, self.layout, f'batch {self.batch}'])


def compiled(mode: str) -> str:
    """The runtime of a mode of torch.compile."""
    return 'compiled' if mode == 'default' else f'compiled, {mode}'


class FourBranchSaE(nn.Module):
    """SaE as the paper draws it and public ports write it: a pooling layer, four dense layers, a concatenation."""

    def __init__(self, channels: int, reduction: int = 32, cardinality: int = 4, add_identity: bool = False):
        super().__init__()
        hidden = channels // reduction
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True)) for _ in range(cardinality)
        )
        self.excite = nn.Sequential(nn.Linear(cardinality * hidden, channels), nn.Sigmoid())
        self.add_identity = add_identity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.pool(x).flatten(1)
        s = self.excite(torch.cat([branch(z) for branch in self.branches], dim=1))
        scaled = x * s[:, :, None, None].expand_as(x)
        return x + scaled if self.add_identity else scaled


def four_branch(model: nn.Module) -> nn.Module:
    """The model with timm's blocks in place of ours and the four-branch layer in place of SaE."""
    plain = {SaEBasicBlock: BasicBlock, SaEBottleneck: Bottleneck}
    for block in [m for m in model.modules() if type(m) in plain]:
        block.__class__ = plain[type(block)]
        sae = cast(SqueezeAggregatedExcitation, block.se)
        block.se = FourBranchSaE(sae.channels, sae.channels // sae.rd_channels, sae.cardinality, sae.add_identity)
    return model


def create(spec: str, size: int | None = None) -> nn.Module:
    """A model by name, or by name:variant.

    Args:
        spec: A timm name; with ':reparameterized', its norms folded; with ':four-branch', SaE in four branches.
        size: Pixels of random images on which its norms get random weights and measured statistics, as a trained
            model's have; None leaves the fresh ones.

    Raises:
        UserError: An unknown name or variant, or a variant that the model does not have.
    """
    name, _, variant = spec.partition(':')
    if not timm.is_model(name):
        close = did_you_mean(name, timm.list_models()) or '; timm.list_models() has all names'
        raise UserError(f'unknown model {printable(name)!r}{close}')
    if variant and variant not in VARIANTS:
        raise UserError(f'unknown variant {variant!r} of {name}; choose {" or ".join(VARIANTS)}, or leave it out')
    model = timm.create_model(name)
    if variant == 'four-branch':
        if not any(isinstance(m, SaEBasicBlock | SaEBottleneck) for m in model.modules()):
            raise UserError(f'{name} has no SaE blocks to write with four branches; give a senetv2 or senextv2 model')
        model = four_branch(model)
    if size is not None:
        randomize(model, torch.randn(4, 3, size, size))
    return reparameterize_model(model.eval()) if variant == 'reparameterized' else model


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of parameters, buffers and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _flops(model: nn.Module, size: int) -> int:
    """Multiplications and additions of one image in inference."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()


def _forward(model: nn.Module, runtime: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """What computes the model's output, and whether CUDA graphs may do it."""
    if runtime == 'eager':
        return model, False
    mode = runtime.partition(', ')[2] or 'default'
    # dynamic=False: the sizes are those of this setting alone. torch counts compilations of a function, here timm's one
    # forward, for the whole process and gives up after eight.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(model, mode=mode, dynamic=False), mode in ('reduce-overhead', 'max-autotune')


def model_contestant(spec: str, setting: Setting) -> Contestant:
    """A model's step: inference, or forward pass, cross-entropy, backward pass and SGD with momentum."""
    if setting.runtime in ENGINES:
        return engine_contestant(spec, setting)
    torch.manual_seed(0)
    model = create(spec, setting.size)
    flops = _flops(model, setting.size) if setting.device == 'cuda' else 0
    dtype = getattr(torch, setting.dtype)
    layout = LAYOUTS[setting.layout]
    autocast = partial(torch.autocast, setting.device, dtype, enabled=setting.autocast)
    weights = torch.float32 if setting.autocast else dtype
    model = model.train(setting.training).to(setting.device, weights).to(memory_format=layout)
    forward, graphs = _forward(model, setting.runtime)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, device=setting.device)
    x = x.to(weights, memory_format=layout)
    optimizer = None
    if setting.training:
        target = torch.arange(setting.batch, device=setting.device) % cast(int, model.num_classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            with autocast():
                loss = F.cross_entropy(forward(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    else:

        def step() -> None:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.inference_mode(), autocast():
                forward(x)

    return Contestant(
        step,
        # The memory of a CUDA graph belongs to the graph between steps, too: nothing to compare
        None if graphs and setting.device == 'cuda' else lambda: state_bytes(model, optimizer),
        setting.batch,
        flops * setting.batch * (3 if setting.training else 1),  # backward: the gradients of inputs and of weights
    )


def engine_contestant(spec: str, setting: Setting) -> Contestant:
    """Inference of the model as an engine runs it, with torch's number of threads."""
    torch.manual_seed(0)
    model = create(spec, setting.size).eval()
    x = torch.randn(setting.batch, 3, setting.size, setting.size)
    engine_run = engine(setting.runtime, model, x)
    return Contestant(lambda: engine_run(x), images=setting.batch)


def layer_contestant(layer: Callable, x: torch.Tensor, backward: bool) -> Contestant:
    """A layer alone: forward, or forward and backward with the gradients of input and parameters."""
    if isinstance(layer, nn.Module):
        layer = layer.to(x.device, x.dtype)
    if not backward:
        return Contestant(torch.inference_mode()(partial(layer, x)))
    with torch.no_grad():
        gradient = torch.randn_like(layer(x))
    x = x.clone().requires_grad_()
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []

    def step() -> None:
        torch.autograd.grad(layer(x), [x, *parameters], gradient)

    return Contestant(step)
