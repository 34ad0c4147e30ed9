"""A small CNN for 32-pixel images, plain, with SE and with SaE.

The comparison of a Keras repository that trained a small CNN on CIFAR-10 with and without SE blocks. Its layers are not
published; this is a 3x3 stem and three stages of widths 32, 64, 128.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn

from ._options import optional_sae_layer, without_recorded
from ._registry import register_model
from .cifar import _cfg
from .pretrained import lift_state_dict
from .trunk32 import Trunk32

__all__ = ['SmallCNN']  # register_model adds each entry function


class SmallCNN(Trunk32):
    """A 3x3 stem and three stages of 3x3 conv, norm, ReLU, with attention at the end of each stage."""

    checkpoint_whole_stages = True

    def __init__(
        self,
        widths: tuple[int, int, int] = (32, 64, 128),
        sae_cardinality: int = 0,
        sae_reduction: int | None = None,
        sae_add_identity: bool | None = None,
        sae_bias: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            widths: Channels of each stage; the stem has those of the first.
            sae_cardinality: Branches of each SaE; 1 is SE, 0 leaves attention out.
            sae_reduction: A branch has channels // sae_reduction hidden units; None for 16.
            sae_add_identity: The SENetV2 author's Keras form, x + x · s; None for False.
            sae_bias: Whether SaE's dense layers have biases; None for True.
            **kwargs: num_classes, in_chans, global_pool, drop_rate, device, dtype: see `Trunk32`.

        Raises:
            ValueError: An argument out of its range, or one of attention in a model without; names argument and value.
        """
        attn_layer = optional_sae_layer(sae_cardinality, sae_reduction, sae_add_identity, sae_bias)

        def stages(in_width: int, dd: dict[str, Any]) -> list[tuple[nn.Sequential, int]]:
            built = []
            for index, width in enumerate(widths):
                stage = nn.Sequential()
                if index > 0:
                    stage.add_module('pool', nn.MaxPool2d(2))
                stage.add_module('conv', nn.Conv2d(in_width, width, 3, padding=1, bias=False, **dd))
                stage.add_module('bn', nn.BatchNorm2d(width, **dd))
                stage.add_module('act', nn.ReLU(inplace=True))
                if attn_layer is not None:
                    stage.add_module('se', attn_layer(width, **dd))
                built.append((stage, width))
                in_width = width
            return built

        super().__init__(stages, widths[0], **kwargs)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that group the parameters, for layer-wise learning-rate decay: a group a stage."""
        patterns: dict[str, str] = super().group_matcher(coarse=True)
        return patterns


default_cfgs = generate_default_cfgs(
    {f'{name}.untrained': _cfg() for name in ('small_cnn', 'small_secnn', 'small_saecnn')}
)


def _create_small_cnn(
    variant: str, pretrained: bool, feature_cfg: dict[str, Any] | None = None, **kwargs: Any
) -> SmallCNN:
    return build_model_with_cfg(
        SmallCNN,
        variant,
        pretrained,
        feature_cfg=dict(dict(out_indices=(0, 1, 2, 3)), **(feature_cfg or {})),
        pretrained_filter_fn=lift_state_dict,
        **without_recorded(kwargs),
    )


@register_model
def small_cnn(pretrained: bool = False, **kwargs: Any) -> SmallCNN:
    """The small CNN without attention."""
    return _create_small_cnn('small_cnn', pretrained, **kwargs)


@register_model
def small_secnn(pretrained: bool = False, **kwargs: Any) -> SmallCNN:
    """The small CNN with SE (reduction 16) in every stage."""
    return _create_small_cnn('small_secnn', pretrained, **dict(dict(sae_cardinality=1), **kwargs))


@register_model
def small_saecnn(pretrained: bool = False, **kwargs: Any) -> SmallCNN:
    """The small CNN with SaE (reduction 16, cardinality 4) in every stage."""
    return _create_small_cnn('small_saecnn', pretrained, **dict(dict(sae_cardinality=4), **kwargs))
