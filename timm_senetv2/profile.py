"""What a model costs on paper: parameters, multiply-adds, activations."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
_MATRIX_OPS = (_aten.convolution, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


class Profile(NamedTuple):
    """Parameters, multiply-adds of one image, and elements that its convolutions and matrix products put out."""

    params: int
    macs: int
    activations: int


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without autograd; each module has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _output_elements(*_args: Any, out_shape: Sequence[int], **_kwargs: Any) -> int:
    return math.prod(out_shape)


def count(model: nn.Module, input_size: tuple[int, int, int]) -> Profile:
    """Count over one forward pass in eval mode of one image.

    Only convolutions and matrix products count; timm's published tables add batch norm and pooling, half a percent of
    a ResNet-50. A model on the meta device costs no memory and no time.

    Args:
        model: Any model; each of its modules has its own mode again afterwards.
        input_size: Channels, height, width of the image.
    """
    weight = next(model.parameters())
    image = torch.empty(1, *input_size, device=weight.device, dtype=weight.dtype)
    flops = FlopCounterMode(display=False)
    elements = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_MATRIX_OPS, _output_elements))
    with evaluating(model), flops, elements:
        model(image)
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=flops.get_total_flops() // 2,
        activations=elements.get_total_flops(),
    )
