"""timm's residual blocks with SaE: the same parameters and state dict, fewer passes over the large tensors."""
import torch
from timm.models.resnet import BasicBlock, Bottleneck

from ..layers import SqueezeAggregatedExcitation


def _require_sae(block: torch.nn.Module) -> None:
    if not isinstance(block.se, SqueezeAggregatedExcitation):
        raise ValueError(
            f'attn_layer of {type(block).__name__} must build a SqueezeAggregatedExcitation, '
            f'got {type(block.se).__name__}; use timm\'s block for other attention'
        )


class SaEBasicBlock(BasicBlock):
    """timm's BasicBlock with SaE; channel scale and shortcut addition are one pass.

    Shapes: (N, C_in, H, W) in, (N, C_out, H / stride, W / stride) out.
    """

    def __init__(self, *args, **kwargs) -> None:
        """Takes timm's arguments; `attn_layer` must build a SqueezeAggregatedExcitation, else ValueError."""
        super().__init__(*args, **kwargs)
        _require_sae(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        x = self.conv2(x)
        x = self.bn2(x)
        scale = self.se.scale(x.mean((2, 3)))
        if self.drop_path is not None:
            scale = self.drop_path(scale)  # a sample's branch is dropped by its scale, at no pass over x

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = torch.addcmul(shortcut, x, scale[:, :, None, None])
        return self.act2(x)


class SaEBottleneck(Bottleneck):
    """timm's Bottleneck with SaE; channel scale and shortcut addition are one pass.

    Shapes: (N, C_in, H, W) in, (N, C_out, H / stride, W / stride) out.
    """

    def __init__(self, *args, **kwargs) -> None:
        """Takes timm's arguments; `attn_layer` must build a SqueezeAggregatedExcitation, else ValueError."""
        super().__init__(*args, **kwargs)
        _require_sae(self)

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

        x = self.conv3(x)
        x = self.bn3(x)
        scale = self.se.scale(x.mean((2, 3)))
        if self.drop_path is not None:
            scale = self.drop_path(scale)  # a sample's branch is dropped by its scale, at no pass over x

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = torch.addcmul(shortcut, x, scale[:, :, None, None])
        return self.act3(x)
