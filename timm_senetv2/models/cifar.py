"""32-pixel ResNets: plain, with SE, SENetV2 and SEANet, one class for every row of the papers' CIFAR tables.

Papers:
* `Deep Residual Learning for Image Recognition`, section 4.2 - https://arxiv.org/abs/1512.03385
* `SENetV2: Aggregated dense layer for channelwise and global representations` - https://arxiv.org/abs/2311.10807
* `Global Feature Representation using Squeeze, Excite and Aggregation Networks (SEANet)`, MIND 2019;
  the authors' code: https://github.com/akhilesh-pandey/SEANet-pytorch

SEANet's slides place the aggregation after the SE of each block, its code after each stage. The published weights are
of the code, so that is the default here and `aggregate_after='block'` the other. The code widens the trunk to
128, 256, 512 channels, which the slides do not mention.
"""

from functools import partial
from typing import Any, cast

from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from ..layers import ChannelAggregation
from ..layers._checks import check_whole_number
from ._options import optional_sae_layer, refuse_without_meaning, without_recorded
from ._registry import register_model, register_model_deprecations
from .blocks import SaEBasicBlock
from .pretrained import lift_state_dict, shipped_cfgs
from .trunk32 import Trunk32

__all__ = ['CifarResNet']  # register_model adds each entry function

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


class CifarResNet(Trunk32):
    """ResNet for 32-pixel images: a 3x3 stem, three stages of n basic blocks, depth 6n + 2.

    Shortcuts are 1x1 convs wherever the width or the resolution changes, else the identity.
    """

    def __init__(
        self,
        depth: int = 20,
        widths: tuple[int, int, int] = (16, 32, 64),
        stem_width: int = 16,
        sae_cardinality: int = 0,
        sae_reduction: int | None = None,
        sae_add_identity: bool | None = None,
        sae_bias: bool | None = None,
        aggregation_factor: int = 1,
        aggregation_op: str | None = None,
        aggregate_after: str | None = None,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            depth: Layers with weights, 6n + 2.
            widths: Channels of each stage, before aggregation.
            stem_width: Channels of the stem.
            sae_cardinality: Branches of each SaE; 1 is SE, 0 leaves attention out.
            sae_reduction: A branch has channels // sae_reduction hidden units; None for 16.
            sae_add_identity: The SENetV2 author's Keras form, x + x · s; None for False.
            sae_bias: Whether SaE's dense layers have biases; None for True.
            aggregation_factor: Channels that SEANet aggregates into one; 1 leaves aggregation out.
            aggregation_op: 'sum', 'mean' or 'max'; None for 'sum'.
            aggregate_after: 'stage' or 'block'; None for 'stage'.
            drop_path_rate: Stochastic depth, rising linearly to this rate at the last block.
            **kwargs: num_classes, in_chans, global_pool, drop_rate, device, dtype: see `Trunk32`.

        Raises:
            ValueError: An argument out of its range, or one of attention or aggregation in a model without; names
                argument and value.
        """
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f'depth must be 6n + 2 with n of at least 1, got {depth}')
        if aggregate_after not in ('stage', 'block', None):
            raise ValueError(f"aggregate_after must be 'stage' or 'block', got {aggregate_after!r}")
        attn_layer = optional_sae_layer(sae_cardinality, sae_reduction, sae_add_identity, sae_bias)
        check_whole_number('aggregation_factor', aggregation_factor)
        if aggregation_op not in (*ChannelAggregation.OPS, None):
            raise ValueError(
                f'aggregation_op must be one of {", ".join(ChannelAggregation.OPS)}, got {aggregation_op!r}'
            )
        if aggregation_factor == 1:
            refuse_without_meaning(
                dict(aggregation_op=aggregation_op, aggregate_after=aggregate_after),
                'aggregation; leave it out, or set aggregation_factor to 2 or more',
            )
        for width in widths:
            if width % aggregation_factor:
                raise ValueError(f'aggregation_factor must divide the widths {tuple(widths)}, got {aggregation_factor}')

        n = (depth - 2) // 6
        drop_rates = iter(cast(list[float], calculate_drop_path_rates(drop_path_rate, 3 * n)))
        aggregation = partial(ChannelAggregation, aggregation_factor, aggregation_op or 'sum')
        block = BasicBlock if attn_layer is None else partial(SaEBasicBlock, attn_layer=attn_layer)

        def stages(in_width: int, dd: dict[str, Any]) -> list[tuple[nn.Sequential, int]]:
            built = []
            for width, first_stride in zip(widths, (1, 2, 2), strict=True):
                stage = nn.Sequential()
                for i in range(n):
                    stride = first_stride if i == 0 else 1
                    rate = next(drop_rates)
                    shortcut = (
                        downsample_conv(in_width, width, 1, stride, **dd) if stride != 1 or in_width != width else None
                    )
                    stage.add_module(
                        str(i),
                        block(
                            in_width, width, stride, shortcut, drop_path=DropPath(rate) if rate > 0.0 else None, **dd
                        ),
                    )
                    in_width = width
                    last = i == n - 1
                    if aggregation_factor > 1 and (aggregate_after == 'block' or last):
                        # named, not numbered: the blocks keep the indices of the published weights
                        stage.add_module(f'aggregate{i}', aggregation())
                        in_width = width // aggregation_factor
                built.append((stage, in_width))
            return built

        super().__init__(stages, stem_width, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': CIFAR_MEAN,
        'std': CIFAR_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


_FASHION_MNIST = _cfg(
    mean=(0.2860,) * 3,
    std=(0.3530,) * 3,
    label_names=(
        'T-shirt/top',
        'Trouser',
        'Pullover',
        'Dress',
        'Coat',
        'Sandal',
        'Shirt',
        'Sneaker',
        'Bag',
        'Ankle boot',
    ),
)

default_cfgs = generate_default_cfgs(
    {
        **shipped_cfgs(('cifar_resnet20', 'cifar_seresnet20', 'cifar_senetv2_resnet20'), 'fmnist', _FASHION_MNIST),
        **{
            f'{family}{depth}.untrained': _cfg()
            for family in ('cifar_resnet', 'cifar_seresnet', 'cifar_senetv2_resnet', 'seanet')
            for depth in (20, 32, 44, 56, 110)
        },
    }
)


def _create_cifar(
    variant: str, pretrained: bool, feature_cfg: dict[str, Any] | None = None, **kwargs: Any
) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet,
        variant,
        pretrained,
        feature_cfg=dict(dict(out_indices=(0, 1, 2, 3)), **(feature_cfg or {})),
        pretrained_filter_fn=lift_state_dict,
        **without_recorded(kwargs),
    )


def _create_seanet(variant: str, pretrained: bool, sae_cardinality: int = 1, **kwargs: Any) -> CifarResNet:
    model_args: dict[str, Any] = dict(widths=(128, 256, 512), sae_cardinality=sae_cardinality, aggregation_factor=4)
    if sae_cardinality:
        model_args.update(sae_reduction=8)
    return _create_cifar(variant, pretrained, **dict(model_args, **kwargs))


_SE = dict(sae_cardinality=1)
_SAE = dict(sae_cardinality=4)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for 32-pixel images, widths 16, 32, 64, without attention."""
    return _create_cifar('cifar_resnet20', pretrained, **dict(dict(depth=20), **kwargs))


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for 32-pixel images, widths 16, 32, 64, without attention."""
    return _create_cifar('cifar_resnet32', pretrained, **dict(dict(depth=32), **kwargs))


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for 32-pixel images, widths 16, 32, 64, without attention."""
    return _create_cifar('cifar_resnet44', pretrained, **dict(dict(depth=44), **kwargs))


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for 32-pixel images, widths 16, 32, 64, without attention."""
    return _create_cifar('cifar_resnet56', pretrained, **dict(dict(depth=56), **kwargs))


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for 32-pixel images, widths 16, 32, 64, without attention."""
    return _create_cifar('cifar_resnet110', pretrained, **dict(dict(depth=110), **kwargs))


@register_model
def cifar_seresnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for 32-pixel images with SE (reduction 16) in every block."""
    return _create_cifar('cifar_seresnet20', pretrained, **dict(dict(depth=20, **_SE), **kwargs))


@register_model
def cifar_seresnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for 32-pixel images with SE (reduction 16) in every block."""
    return _create_cifar('cifar_seresnet32', pretrained, **dict(dict(depth=32, **_SE), **kwargs))


@register_model
def cifar_seresnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for 32-pixel images with SE (reduction 16) in every block."""
    return _create_cifar('cifar_seresnet44', pretrained, **dict(dict(depth=44, **_SE), **kwargs))


@register_model
def cifar_seresnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for 32-pixel images with SE (reduction 16) in every block."""
    return _create_cifar('cifar_seresnet56', pretrained, **dict(dict(depth=56, **_SE), **kwargs))


@register_model
def cifar_seresnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for 32-pixel images with SE (reduction 16) in every block."""
    return _create_cifar('cifar_seresnet110', pretrained, **dict(dict(depth=110, **_SE), **kwargs))


@register_model
def cifar_senetv2_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SENetV2-20 for 32-pixel images: ResNet-20 with SaE (reduction 16, cardinality 4) in every block."""
    return _create_cifar('cifar_senetv2_resnet20', pretrained, **dict(dict(depth=20, **_SAE), **kwargs))


@register_model
def cifar_senetv2_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SENetV2-32 for 32-pixel images: ResNet-32 with SaE (reduction 16, cardinality 4) in every block."""
    return _create_cifar('cifar_senetv2_resnet32', pretrained, **dict(dict(depth=32, **_SAE), **kwargs))


@register_model
def cifar_senetv2_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SENetV2-44 for 32-pixel images: ResNet-44 with SaE (reduction 16, cardinality 4) in every block."""
    return _create_cifar('cifar_senetv2_resnet44', pretrained, **dict(dict(depth=44, **_SAE), **kwargs))


@register_model
def cifar_senetv2_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SENetV2-56 for 32-pixel images: ResNet-56 with SaE (reduction 16, cardinality 4) in every block."""
    return _create_cifar('cifar_senetv2_resnet56', pretrained, **dict(dict(depth=56, **_SAE), **kwargs))


@register_model
def cifar_senetv2_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SENetV2-110 for 32-pixel images: ResNet-110 with SaE (reduction 16, cardinality 4) in every block."""
    return _create_cifar('cifar_senetv2_resnet110', pretrained, **dict(dict(depth=110, **_SAE), **kwargs))


@register_model
def seanet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SEANet-20: widths 128, 256, 512, SE (reduction 8), and the sum over groups of 4 channels after each stage."""
    return _create_seanet('seanet20', pretrained, **dict(dict(depth=20), **kwargs))


@register_model
def seanet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SEANet-32: widths 128, 256, 512, SE (reduction 8), and the sum over groups of 4 channels after each stage."""
    return _create_seanet('seanet32', pretrained, **dict(dict(depth=32), **kwargs))


@register_model
def seanet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SEANet-44: widths 128, 256, 512, SE (reduction 8), and the sum over groups of 4 channels after each stage."""
    return _create_seanet('seanet44', pretrained, **dict(dict(depth=44), **kwargs))


@register_model
def seanet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SEANet-56: widths 128, 256, 512, SE (reduction 8), and the sum over groups of 4 channels after each stage."""
    return _create_seanet('seanet56', pretrained, **dict(dict(depth=56), **kwargs))


@register_model
def seanet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """SEANet-110: widths 128, 256, 512, SE (reduction 8), and the sum over groups of 4 channels after each stage."""
    return _create_seanet('seanet110', pretrained, **dict(dict(depth=110), **kwargs))


# Earlier names, which recorded commands and configs hold
register_model_deprecations(
    __name__, {f'senetv2_resnet{depth}': f'cifar_senetv2_resnet{depth}' for depth in (20, 32, 44, 56, 110)}
)
