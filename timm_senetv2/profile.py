"""What a model costs on paper: parameters, multiply-adds, activations."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_aten = torch.ops.aten
_MATRIX_OPS = (_aten.convolution, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


class Profile(NamedTuple):
    """Parameters, multiply-adds of one image, and elements that its convolutions and matrix products put out."""

    params: int
    macs: int
    activations: int


class _WithoutNorms(TorchFunctionMode):
    """Leaves out batch norms: none of it counts, and on the meta device they are half of a network's time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


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
    activations = 0

    def and_activations(flops_of: Callable[..., int]) -> Callable[..., int]:
        """torch's formula of an operation, which also adds up what the operation puts out."""

        def formula(*args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
            nonlocal activations
            activations += math.prod(out_shape)
            return flops_of(*args, out_val=out_shape, **kwargs)

        return formula

    mapping = {op: and_activations(flop_registry[op]) for op in _MATRIX_OPS}
    flops = FlopCounterMode(display=False, custom_mapping=mapping)
    with evaluating(model), _WithoutNorms(), flops:
        model(image)
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=flops.get_total_flops() // 2,
        activations=activations,
    )
