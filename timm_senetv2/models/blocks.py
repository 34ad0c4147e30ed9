"""timm's residual blocks with SaE: the same parameters and state dict, fewer passes over the large tensors.

timm's block with attention goes over the block's output, its largest tensor, for the last norm, the squeeze, the scale,
the shortcut and the activation. Here:

* scale and shortcut addition are one pass, as in the Caffe SENet's "Axpy" layer (hujie-frank/SENet);
* with its norm in eval mode, a bottleneck squeezes before it expands: the last norm is then the affine map
  y -> a·y + b of each channel, a = weight / sqrt(running_var + eps), b = bias - a · running_mean, and the 1x1 conv
  before it is a matrix W applied at every pixel. Means commute with both, so mean(a·Wx + b) = a·W·mean(x) + b: the
  squeeze reads the input of the conv, a quarter of the channels. And a·Wx + b = (aW)x + b, a conv with a bias: the norm
  is no pass at all;
* in training on a CPU, the output x of the last norm is not kept for the backward pass, which needs it only for the
  gradient of the scale, sum(g·x) over the pixels. That is a·sum(g·y) + b·sum(g) of the norm's input y, which the norm
  keeps anyway.

All are exact up to rounding. Where one does not hold, a block does what timm's does.
"""

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..layers import SqueezeAggregatedExcitation
from ..layers._eager import has_tangent, is_eager, scale_gradients


def _require_sae(block: nn.Module) -> None:
    if not isinstance(block.se, SqueezeAggregatedExcitation):
        raise ValueError(
            f'attn_layer of {type(block).__name__} must build a SqueezeAggregatedExcitation, '
            f"got {type(block.se).__name__}; use timm's block for other attention"
        )


class _ScaleAddNormed(torch.autograd.Function):
    """`addcmul(shortcut, x, scale)` that keeps y instead of x = a·y + b, the output of a batch norm in training.

    Inputs: x, scale and shortcut, and what `_norm_in_training` returned beside x: that gets no gradient here, x brings
    it there.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, shortcut, y, mean, inverse_std, weight, bias, eps):
        return torch.addcmul(shortcut, x, scale[..., None, None])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], *inputs[3:])

    @staticmethod
    def backward(ctx, grad):
        scale, y, mean, inverse_std, weight, bias, eps = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative x has to depend on y in every way it does
            x = F.batch_norm(y, None, None, weight, bias, training=True, eps=eps.item())
            grad_x, grad_scale = scale_gradients(grad, x, scale)
        else:
            grad_x, sums = scale_gradients(grad, y, scale)
            factor = weight * inverse_std
            grad_scale = factor * sums + (bias - factor * mean) * grad.sum((2, 3))
        return grad_x, grad_scale, grad, None, None, None, None, None, None


def _can_restore(y: torch.Tensor, norm: nn.Module) -> bool:
    """Whether `norm(y)` is plain BatchNorm in training, in full precision, eager, on a CPU, and nobody watches it."""
    return (
        is_eager(y)
        and type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.running_mean is not None
        and norm.momentum is not None
        and not _is_hooked(norm)
        and torch.is_grad_enabled()
        and y.is_cpu
        and y.dtype == norm.weight.dtype == norm.running_mean.dtype
        and y.dtype in (torch.float32, torch.float64)  # half precision would round the two sums that a and b join
        and y.numel() > y.shape[1]  # otherwise the norm has an error to raise
    )


def _norm_in_training(y: torch.Tensor, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x = `norm(y)`, and what `_scale_add` needs in order not to keep x.

    That is y, its mean and 1 / standard deviation in this batch, and the norm's weight, bias and eps.
    """
    norm.num_batches_tracked.add_(1)
    x, mean, inverse_std = torch.native_batch_norm(
        y, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
    )
    return x, [y, mean, inverse_std, norm.weight, norm.bias, torch.tensor(norm.eps, dtype=torch.float64)]


def _overwrite(x: torch.Tensor, scale: torch.Tensor, shortcut: torch.Tensor) -> bool:
    """Make x x · scale + shortcut, where it can be: on a CPU the memory of a new tensor, page by page, costs time."""
    if (
        not is_eager(x)
        or not x.is_cpu
        or not x.dtype == scale.dtype == shortcut.dtype
        or torch.is_grad_enabled()
        or has_tangent(x, scale, shortcut)
    ):
        return False
    try:
        torch.addcmul(shortcut, x, scale, out=x)
    except RuntimeError:  # vmap has no rule for `out` and leaves x alone
        return False
    return True


def _scale_add(x: torch.Tensor, scale: torch.Tensor, shortcut: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    """x · scale + shortcut, (N, C, H, W) with a scale of (N, C). x is the caller's own and may be overwritten.

    `kept` is what `_norm_in_training` returned beside x, or empty.
    """
    if not torch.jit.is_scripting():  # alone in its line: TorchScript then leaves the rest uncompiled
        if kept and not has_tangent(x, scale, shortcut):
            return _ScaleAddNormed.apply(x, scale, shortcut, *kept)
    scale = scale[..., None, None]  # an ellipsis, because torch 2.5 cannot export slices of a dynamic batch
    if not torch.jit.is_scripting():
        if _overwrite(x, scale, shortcut):
            return x
    return torch.addcmul(shortcut, x, scale)


torch.fx.wrap('_scale_add')  # it looks at the tensor, so fx tracing must not look into it


def _is_affine(norm: nn.Module) -> bool:
    """Whether the norm, in eval mode, is BatchNorm's affine map. Exact types: a subclass may compute something else."""
    return type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and norm.running_mean is not None


def _fold_norm(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold the norm into the conv, in place. Returns what takes the norm's place: itself where it cannot be folded."""
    if type(conv) is not nn.Conv2d or not _is_affine(norm):
        return norm
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return nn.Identity()


def _fold_shortcut_norm(downsample: nn.Module | None) -> None:
    """Fold a norm into the conv before it in timm's shortcuts: (conv, norm) or (pool, conv, norm)."""
    if isinstance(downsample, nn.Sequential) and len(downsample) > 1:
        downsample[-1] = _fold_norm(downsample[-2], downsample[-1])


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know when the module is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_affine_at_each_pixel(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `norm(conv(x))` is now one affine map of the channels at each pixel, and nobody watches it."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.padding == (0, 0)
        and (type(norm) is nn.Identity or _is_affine(norm) and not norm.training)
        and not _is_hooked(conv)
        and not _is_hooked(norm)
    )


def _is_small(x: torch.Tensor) -> bool:
    """Whether a 1x1 conv's weight is no smaller than its output for x, where that matters: eager and on a CPU."""
    return is_eager(x) and x.is_cpu and x.shape[0] * x.shape[2] * x.shape[3] <= x.shape[1]


def _squeeze_before(pooled: torch.Tensor, conv: nn.Module, norm: nn.Module) -> torch.Tensor:
    """The channel means of `norm(conv(x))`, (N, C_out), from those of x, (N, C_in)."""
    pooled = F.linear(pooled, conv.weight.flatten(1), conv.bias)
    return norm(pooled[..., None, None]).flatten(1)  # called: torch 2.5 cannot export a norm's buffers used elsewhere


def _conv_norm(x: torch.Tensor, conv: nn.Conv2d, norm: nn.Module) -> torch.Tensor:
    """`norm(conv(x))` for a 1x1 conv and a norm in eval mode."""
    if (
        type(norm) is nn.Identity
        or not is_eager(x)  # a compiler makes the norm part of the next pass
        or not x.is_cpu  # elsewhere the bias of a conv is a pass of its own
    ):
        return norm(conv(x))
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)  # half precision would round the factor
    factor = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = -norm.running_mean * factor
    if conv.bias is not None:
        bias = bias + conv.bias * factor
    if norm.bias is not None:
        bias = bias + norm.bias
    weight = conv.weight * factor[:, None, None, None]
    dtype = conv.weight.dtype
    return F.conv2d(x, weight.to(dtype), bias.to(dtype), conv.stride, conv.padding, conv.dilation, conv.groups)


def _shortcut(x: torch.Tensor, downsample: nn.Module) -> torch.Tensor:
    """`downsample(x)`; timm's (conv, norm) and (pool, conv, norm) without a pass for a norm in eval mode."""
    if (
        type(downsample) is nn.Sequential
        and len(downsample) in (2, 3)
        and not _is_hooked(downsample)
        and _is_affine_at_each_pixel(downsample[-2], downsample[-1])
    ):
        if len(downsample) == 3:
            x = downsample[0](x)
        return _conv_norm(x, downsample[-2], downsample[-1])
    return downsample(x)


class SaEBasicBlock(BasicBlock):
    """timm's BasicBlock with SaE; scale and shortcut are one pass, and training on a CPU keeps one large tensor less.

    Its last conv reads as many channels as it writes, so squeezing before it would save no reading.

    Shapes: (N, C_in, H, W) in, (N, C_out, H / stride, W / stride) out.
    """

    def __init__(self, *args, **kwargs) -> None:
        """Takes timm's arguments; `attn_layer` must build a SqueezeAggregatedExcitation, else ValueError."""
        super().__init__(*args, **kwargs)
        _require_sae(self)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold each norm into the conv before it, for inference; `timm.models.reparameterize_model` calls it."""
        self.bn1 = _fold_norm(self.conv1, self.bn1)
        self.bn2 = _fold_norm(self.conv2, self.bn2)
        _fold_shortcut_norm(self.downsample)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        x = self.conv2(x)
        x, kept = self._norm(x)
        scale = self.se.scale(self.se.squeeze(x))
        if self.drop_path is not None:
            scale = self.drop_path(scale)  # a sample's branch is dropped by its scale, at no pass over x

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = _scale_add(x, scale, shortcut, kept)
        return self.act2(x)

    def _norm(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last norm, (N, C, H, W), and for `_scale_add` `kept`."""
        if not torch.jit.is_scripting():
            if _can_restore(x, self.bn2):
                return _norm_in_training(x, self.bn2)
        return self.bn2(x), []


class SaEBottleneck(Bottleneck):
    """timm's Bottleneck with SaE; in eval mode it squeezes before the last conv, as the module's docstring derives.

    Hooks on that conv or its norm, or other modules in their place, turn this off for the block, and so do fx tracing,
    whose graph has to serve training too, and TorchScript.

    Shapes: (N, C_in, H, W) in, (N, C_out, H / stride, W / stride) out.
    """

    def __init__(self, *args, **kwargs) -> None:
        """Takes timm's arguments; `attn_layer` must build a SqueezeAggregatedExcitation, else ValueError."""
        super().__init__(*args, **kwargs)
        _require_sae(self)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold each norm into the conv before it, for inference; `timm.models.reparameterize_model` calls it."""
        self.bn1 = _fold_norm(self.conv1, self.bn1)
        self.bn2 = _fold_norm(self.conv2, self.bn2)
        self.bn3 = _fold_norm(self.conv3, self.bn3)
        _fold_shortcut_norm(self.downsample)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)

        x, pooled, kept = self._expand(x)
        scale = self.se.scale(pooled)
        if self.drop_path is not None:
            scale = self.drop_path(scale)  # a sample's branch is dropped by its scale, at no pass over x

        if self.downsample is not None:
            if torch.jit.is_scripting():
                shortcut = self.downsample(shortcut)
            else:
                shortcut = _shortcut(shortcut, self.downsample)
        x = _scale_add(x, scale, shortcut, kept)
        return self.act3(x)

    def _expand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The last conv and its norm, (N, C, H, W), their channel means, (N, C), and for `_scale_add` `kept`."""
        if not torch.jit.is_scripting():
            if self._can_squeeze_before(x):
                pooled = _squeeze_before(self.se.squeeze(x), self.conv3, self.bn3)
                return _conv_norm(x, self.conv3, self.bn3), pooled, []
        x = self.conv3(x)
        if not torch.jit.is_scripting():
            if _can_restore(x, self.bn3):
                x, kept = _norm_in_training(x, self.bn3)
                return x, self.se.squeeze(x), kept
        x = self.bn3(x)
        return x, self.se.squeeze(x), []

    def _can_squeeze_before(self, x: torch.Tensor) -> bool:
        return (
            not isinstance(x, torch.fx.Proxy)
            and _is_affine_at_each_pixel(self.conv3, self.bn3)
            and self.conv3.stride == (1, 1)
            and not _is_small(x)
        )
