"""timm's residual blocks with SaE: timm's own forward, or the fused tail where nobody can tell the two apart."""

import copy
from functools import wraps
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..layers import SqueezeAggregatedExcitation
from ..layers._eager import is_plain
from .fused import fused_tail, may_fuse


class SaEBasicBlock(BasicBlock):
    """timm's BasicBlock with SaE.

    Shapes: (N, C_in, H, W) in, (N, C_out, H / stride, W / stride) out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes timm's arguments; `attn_layer` must build a SqueezeAggregatedExcitation, else ValueError."""
        super().__init__(*args, **kwargs)
        _require_sae(self)

    @wraps(BasicBlock.forward)  # TorchScript compiles the source of what is wrapped, which is timm's
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if not may_fuse(self, x, self.conv2, self.bn2):
            return super().forward(x)
        shortcut = x
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.aa(x)  # type: ignore[misc]  # timm types it as None
        return self.act2(fused_tail(self, x, shortcut, self.conv2, self.bn2))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold each norm into the conv before it, for inference; `timm.models.reparameterize_model` calls it."""
        self.conv1, self.bn1 = _fold_norm(self.conv1, self.bn1)
        self.conv2, self.bn2 = _fold_norm(self.conv2, self.bn2)
        _fold_shortcut_norm(self.downsample)


class SaEBottleneck(Bottleneck):
    """timm's Bottleneck with SaE.

    Shapes: (N, C_in, H, W) in, (N, C_out, H / stride, W / stride) out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes timm's arguments; `attn_layer` must build a SqueezeAggregatedExcitation, else ValueError."""
        super().__init__(*args, **kwargs)
        _require_sae(self)

    @wraps(Bottleneck.forward)  # TorchScript compiles the source of what is wrapped, which is timm's
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if not may_fuse(self, x, self.conv3, self.bn3):
            return super().forward(x)
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.aa(x)  # type: ignore[misc]
        return self.act3(fused_tail(self, x, shortcut, self.conv3, self.bn3))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold each norm into the conv before it, for inference; `timm.models.reparameterize_model` calls it."""
        self.conv1, self.bn1 = _fold_norm(self.conv1, self.bn1)
        self.conv2, self.bn2 = _fold_norm(self.conv2, self.bn2)
        self.conv3, self.bn3 = _fold_norm(self.conv3, self.bn3)
        _fold_shortcut_norm(self.downsample)


def _require_sae(block: nn.Module) -> None:
    if not isinstance(block.se, SqueezeAggregatedExcitation):
        raise ValueError(
            f'attn_layer of {type(block).__name__} must build a SqueezeAggregatedExcitation, '
            f"got {type(block.se).__name__}; use timm's block for other attention"
        )


def _fold_norm(conv: Any, norm: Any) -> tuple[Any, Any]:
    """A conv with the norm folded in, and what takes the norm's place; the two as they are where that cannot be."""
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    if not is_plain(conv, nn.Conv2d, nn.Conv2d.forward) or not any(is_plain(norm, cls, cls.forward) for cls in norms):
        return conv, norm  # somebody else takes part in what they compute
    if norm.running_mean is None:
        return conv, norm
    conv = copy.deepcopy(conv)  # another block may share it
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return conv, nn.Identity().train(norm.training)


def _fold_shortcut_norm(downsample: nn.Module | None) -> None:
    """Fold a norm into the conv before it in timm's shortcuts: (conv, norm) or (pool, conv, norm)."""
    if isinstance(downsample, nn.Sequential) and len(downsample) > 1:
        downsample[-2], downsample[-1] = _fold_norm(downsample[-2], downsample[-1])
