"""timm's residual blocks with SaE: the same parameters and state dict, fewer passes over the large tensors.

timm's block with attention goes over the block's output, its largest tensor, for the last norm, the squeeze, the scale,
the shortcut and the activation. Here:

* scale and shortcut addition are one pass, as in the Caffe SENet's "Axpy" layer (hujie-frank/SENet);
* with its norm in eval mode, a bottleneck squeezes before it expands: the last norm is then the affine map
  y -> a·y + b of each channel, a = weight / sqrt(running_var + eps), b = bias - a · running_mean, and the 1x1 conv
  before it is a matrix W applied at every pixel. Means commute with both, so mean(a·Wx + b) = a·W·mean(x) + b: the
  squeeze reads the input of the conv, a quarter of the channels. And a·Wx + b = (aW)x + b, a conv with a bias: the norm
  is no pass at all.

Both are exact up to rounding. Where one does not hold, a block does what timm's does.
"""
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..layers import SqueezeAggregatedExcitation


def _require_sae(block: nn.Module) -> None:
    if not isinstance(block.se, SqueezeAggregatedExcitation):
        raise ValueError(
            f'attn_layer of {type(block).__name__} must build a SqueezeAggregatedExcitation, '
            f'got {type(block.se).__name__}; use timm\'s block for other attention'
        )


def _scale_add(x: torch.Tensor, scale: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """x · scale + shortcut, (N, C, H, W) with a scale of (N, C). x is the caller's own and may be overwritten."""
    scale = scale[..., None, None]  # an ellipsis, because torch 2.5 cannot export slices of a dynamic batch
    if x.is_cpu and x.dtype == shortcut.dtype and not torch.is_grad_enabled():
        # On a CPU the memory of a new tensor, page by page, costs more than a second pass over the one at hand
        return x.mul_(scale).add_(shortcut)
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
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    return nn.Identity()


def _fold_shortcut_norm(downsample: nn.Module | None) -> None:
    """Fold a norm into the conv before it in timm's shortcuts: (conv, norm) or (pool, conv, norm)."""
    if isinstance(downsample, nn.Sequential) and len(downsample) > 1:
        downsample[-1] = _fold_norm(downsample[-2], downsample[-1])


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know when the module is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _can_squeeze_before(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `norm(conv(x))` is now one affine map of the channels at each pixel, and nobody watches it."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and (type(norm) is nn.Identity or _is_affine(norm) and not norm.training)
        and not _is_hooked(conv)
        and not _is_hooked(norm)
    )


def _squeeze_before(pooled: torch.Tensor, conv: nn.Module, norm: nn.Module) -> torch.Tensor:
    """The channel means of `norm(conv(x))`, (N, C_out), from those of x, (N, C_in)."""
    pooled = F.linear(pooled, conv.weight.flatten(1), conv.bias)
    if type(norm) is nn.Identity:  # after `reparameterize`
        return pooled
    return F.batch_norm(pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _conv_norm(x: torch.Tensor, conv: nn.Conv2d, norm: nn.Module) -> torch.Tensor:
    """`norm(conv(x))` for a 1x1 conv and a norm in eval mode."""
    if (
            type(norm) is nn.Identity
            or not x.is_cpu  # elsewhere the bias of a conv is a pass of its own
            or torch.compiler.is_compiling()  # a compiler makes the norm part of the next pass
            or torch.jit.is_tracing()
            or x.shape[0] * x.shape[2] * x.shape[3] <= x.shape[1]  # the weight is no smaller than the output
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
    return F.conv2d(x, weight.to(conv.weight.dtype), bias.to(conv.weight.dtype))


class SaEBasicBlock(BasicBlock):
    """timm's BasicBlock with SaE; channel scale and shortcut addition are one pass.

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
        x = self.bn2(x)
        scale = self.se.scale(self.se.squeeze(x))
        if self.drop_path is not None:
            scale = self.drop_path(scale)  # a sample's branch is dropped by its scale, at no pass over x

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = _scale_add(x, scale, shortcut)
        return self.act2(x)


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

        x, pooled = self._expand(x)
        scale = self.se.scale(pooled)
        if self.drop_path is not None:
            scale = self.drop_path(scale)  # a sample's branch is dropped by its scale, at no pass over x

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = _scale_add(x, scale, shortcut)
        return self.act3(x)

    def _expand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last conv and its norm, (N, C, H, W), and their channel means, (N, C)."""
        if not torch.jit.is_scripting():  # alone in its line: TorchScript then leaves the rest uncompiled
            if not isinstance(x, torch.fx.Proxy) and _can_squeeze_before(self.conv3, self.bn3):
                pooled = _squeeze_before(self.se.squeeze(x), self.conv3, self.bn3)
                return _conv_norm(x, self.conv3, self.bn3), pooled
        x = self.conv3(x)
        x = self.bn3(x)
        return x, self.se.squeeze(x)
