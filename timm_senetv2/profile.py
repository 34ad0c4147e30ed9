"""What a model costs on paper: parameters, multiply-adds, activations."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_MATRIX_OPS = (_aten.convolution, _aten._convolution, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


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


class _MatrixOps(TorchDispatchMode):
    """Adds up the operations of `_MATRIX_OPS`, by torch's formulas, and what they put out.

    torch's FlopCounterMode also tells modules and composite operations apart, which takes half of its time.
    """

    flops = activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _MATRIX_OPS:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.activations += out.numel()
        return out


_RANDOM = {
    *(torch.Tensor.normal_, torch.Tensor.uniform_),
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),  # those that ask the mode themselves
}


class _WithoutValues(TorchFunctionMode):
    """Leaves out random numbers: the meta device keeps none, and they are half of the time that a model takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs)


def on_meta(name: str, **options: Any) -> nn.Module:
    """`timm.create_model` with these options on the meta device: shapes, without memory for values."""
    with _WithoutValues():
        return timm.create_model(name, device='meta', **options)


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
    a ResNet-50. A model on the meta device costs no memory and no time, and there attention's products count too, which
    torch computes in one operation elsewhere.

    Args:
        model: Any model; each of its modules has its own mode again afterwards.
        input_size: Channels, height, width of the image.
    """
    weight = next(model.parameters())
    image = torch.empty(1, *input_size, device=weight.device, dtype=weight.dtype)
    found = _MatrixOps()  # type: ignore[no-untyped-call]  # torch's modes have no types
    # in inference mode the operations would arrive before they are taken apart into those that count
    with torch.inference_mode(False), evaluating(model), _WithoutNorms(), found:
        model(image)
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=found.flops // 2,
        activations=found.activations,
    )
