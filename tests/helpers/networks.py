"""Images, and a look at the layers of a network."""

import torch
from torch import nn

from timm_senetv2.layers import SqueezeAggregatedExcitation


def images(n: int = 2, size: int = 32, channels: int = 3, **kwargs) -> torch.Tensor:
    return torch.randn(n, channels, size, size, **kwargs)


def sae_layers(model: nn.Module) -> dict[str, SqueezeAggregatedExcitation]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SqueezeAggregatedExcitation)}
