"""The end of a residual block with SaE in fewer passes over its large tensors, for when nobody can see inside.

Notation: y is what the block's last conv puts out, (N, C, H, W); the norm after it is the affine map y -> a·y + b of
each channel; s, (N, C), is the gate. A block returns act((a·y + b)·s + shortcut). With a·s and b·s, (N, C), that is one
multiplication and two additions for each element, and the squeeze is the only other reason to read y:

* It needs no reading where the norm has running statistics and the conv is a 1x1 matrix W applied at every pixel: means
  commute with both, so mean(a·Wx + b) = a·W·mean(x) + b ("squeeze before expand"), and x has a quarter of the channels.
* In training, the norm's statistics and the squeeze are one pass: the mean and the variance of each image and channel
  give those of the batch (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
  variances", 1979), and the squeeze is a·mean_n + b. Backward, autograd of this needs sum(g·(y - mean)) and sum(g) over
  the pixels, and writes the gradient of y: what a norm without attention pays.

Under `torch.compile` the formulas are written as they are, and the compiler makes each pass one kernel. Eagerly only
inference on a CPU gains.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from ..layers import SqueezeAggregatedExcitation
from ..layers._eager import is_compiled, is_observed, is_plain

# The classes that a tail takes the place of, each with the forward that it knows
_FORWARDS: dict[type[nn.Module], object] = {
    cls: cls.forward for cls in (nn.BatchNorm2d, nn.Conv2d, nn.Identity, DropPath, SqueezeAggregatedExcitation)
}
_WORTHWHILE = 2**19  # elements of a block's input; for fewer, the steps between the passes cost more than a pass


def may_fuse(block: Any, x: torch.Tensor, conv: nn.Module, norm: Any) -> bool:
    """Whether nobody can tell the fused tail from timm's own forward, and the tail is the faster one.

    Args:
        block: One of timm's residual blocks with SaE.
        x: The block's input.
        conv: The last conv of the block.
        norm: The norm after it.
    """
    if type(x) is not torch.Tensor:  # a tensor subclass, or a stand-in for a tensor while a graph is captured
        return False
    if torch.compiler.is_compiling():
        worthwhile = is_compiled() and len(x) > 0
    else:
        worthwhile = (
            not torch.is_grad_enabled()
            and not (norm.training and type(norm) is not nn.Identity)
            and not is_observed()  # before the next lines, which whoever observes would see
            and x.is_cpu
            and (x.numel() >= _WORTHWHILE or type(norm) is nn.Identity)
        )
    return (
        worthwhile
        and _is_plain(conv, nn.Conv2d)
        and (_is_plain(norm, nn.BatchNorm2d) and _has_statistics(norm) or _is_plain(norm, nn.Identity))
        and _is_plain(block.se, SqueezeAggregatedExcitation)
        and (block.drop_path is None or _is_plain(block.drop_path, DropPath))
    )


def _is_plain(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    return is_plain(module, cls, _FORWARDS[cls])


def _has_statistics(norm: nn.BatchNorm2d) -> bool:
    return (
        norm.affine
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.num_batches_tracked is not None
        and norm.momentum is not None  # without one, the average is cumulative and waits for the device
    )


def fused_tail(block: Any, x: torch.Tensor, shortcut: torch.Tensor, conv: Any, norm: Any) -> torch.Tensor:
    """What timm's forward does before the last activation: `drop_path(se(norm(conv(x)))) + downsample(shortcut)`.

    Args:
        block: See `may_fuse`, which must hold.
        x: Input of the last conv, (N, C_in, H, W).
        shortcut: The block's input.
        conv: The last conv.
        norm: The norm after it, a BatchNorm2d or an Identity.

    Returns:
        (N, C, H, W), in the dtype of the conv's output and in memory of its own.
    """
    y = conv(x)
    compiling = torch.compiler.is_compiling()
    dtype = torch.promote_types(y.dtype, torch.float32)  # half precision would lose the digits of factors and means
    out = y.to(dtype) if compiling else y  # once: the gradients of two casts would each be rounded
    has_norm = type(norm) is nn.BatchNorm2d
    if has_norm and norm.training:
        out, a, b, z = _normalize_batch(out, norm)
    elif has_norm:
        shift, b = norm.running_mean.to(dtype), norm.bias
        a = torch.rsqrt(norm.running_var.to(dtype) + norm.eps) * norm.weight
        if compiling:
            out = out - _nchw(shift)
        if torch.is_grad_enabled():  # the gradients need more digits than the output
            z = out.mean((2, 3))
        else:
            z = _channel_means(x, y, conv, dtype) - shift
        z = torch.addcmul(b, z, a)
    else:
        z = _channel_means(x, y, conv, dtype)

    s = block.se.scale(z.to(y.dtype))
    if block.drop_path is not None:
        s = block.drop_path(s)  # a sample's branch is dropped by its gate
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    if shortcut.shape != y.shape:  # timm adds in place: the shortcut may be broadcast to the branch, not the reverse
        shortcut = torch.zeros_like(y).add_(shortcut)

    if compiling:
        if has_norm:
            scale, offset = torch.stack((a * s, b * s)).unbind()  # else Inductor computes both for each pixel
            out = out * _nchw(scale) + _nchw(offset)
        else:
            out = out * _nchw(s)
        return (out + shortcut).to(y.dtype)
    if not has_norm:
        return torch.addcmul(shortcut, y, _nchw(s), out=y)
    if y.dtype == dtype:
        factor = a * s
        # in float64 and from the rounded factor: with large means, the two large products must cancel
        offset = torch.addcmul((b * s).double(), shift.double(), factor.double(), value=-1).to(dtype)
        return torch.addcmul(shortcut, y, _nchw(factor), out=y).add_(_nchw(offset))
    _normalize_and_scale_(y, norm, s.to(dtype))
    return y.add_(shortcut)


def _nchw(per_channel: torch.Tensor) -> torch.Tensor:
    """(C,) or (N, C) for arithmetic with (N, C, H, W)."""
    return per_channel.view(*per_channel.shape, 1, 1)


def _channel_means(x: torch.Tensor, y: torch.Tensor, conv: nn.Conv2d, dtype: torch.dtype) -> torch.Tensor:
    """The channel means of y = conv(x), (N, C): from those of x where that reads less, and where it is exact."""
    pixels = y.shape[2] * y.shape[3]
    if not torch.compiler.is_compiling():  # a comparison with the batch would be a guard on it
        pixels *= y.shape[0]
    commutes = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    if not commutes or pixels <= conv.in_channels:  # then y is no larger than the conv's weight
        return y.mean((2, 3), dtype=dtype)
    z = x.mean((2, 3), dtype=dtype)
    weight, bias = conv.weight.view(conv.out_channels, -1), conv.bias
    if weight.dtype == dtype and not torch.is_autocast_enabled(y.device.type):
        return F.linear(z, weight, bias)
    with torch.autocast(y.device.type, enabled=False):  # it would round the means
        return F.linear(z, weight.to(dtype), None if bias is None else bias.to(dtype))


def _normalize_batch(y: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """BatchNorm in training, with its buffers: y less its mean, a and b for that, (C,), the channel means, (N, C)."""
    n, _, h, w = y.shape
    count = n * h * w
    if count == 1:
        norm(y)  # raises
    # Any value of the channel will do: without it, means much larger than deviations would cost digits
    shift = y[0, :, h // 2, w // 2].detach()
    y = y - _nchw(shift)
    var_n, mean_n = torch.var_mean(y, (2, 3), correction=0)
    mean = mean_n.mean(0)
    var = (var_n + (mean_n - mean).square()).mean(0)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        for running, of_batch in (norm.running_mean, mean + shift), (norm.running_var, var * (count / (count - 1))):
            running.mul_(1 - norm.momentum).add_(of_batch.to(running.dtype), alpha=norm.momentum)
    a = norm.weight * torch.rsqrt(var + norm.eps)
    constant = mean.detach()  # so that the gradient of the mean is of (C,), and no sum over y
    return y - _nchw(constant), a, norm.bias + (constant - mean) * a, (mean_n - mean) * a + norm.bias


def _normalize_and_scale_(y: torch.Tensor, norm: Any, s: torch.Tensor) -> None:
    """y = norm(y)·s in place, rounded once: a batch norm with weights of its own for each image."""
    mean, var = norm.running_mean.to(s.dtype), norm.running_var.to(s.dtype)
    weight, bias = norm.weight * s, norm.bias * s
    n, c, h, w = y.shape
    if y.is_contiguous():
        parts = [(y.view(1, n * c, h, w), weight.flatten(), bias.flatten(), mean.repeat(n), var.repeat(n))]
    else:
        parts = [(y[i : i + 1], weight[i], bias[i], mean, var) for i in range(n)]
    unused = torch.empty(0)
    for y_i, weight_i, bias_i, mean_i, var_i in parts:
        torch.native_batch_norm(y_i, weight_i, bias_i, mean_i, var_i, False, 0.0, norm.eps, out=(y_i, unused, unused))
