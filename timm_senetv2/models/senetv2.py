"""SENetV2 and SEneXtV2 for 224-pixel images: timm's ResNet and ResNeXt trunks with SaE in every block.

Paper: `SENetV2: Aggregated dense layer for channelwise and global representations` - https://arxiv.org/abs/2311.10807

The layer sits where timm's ResNets put `se`: after the last norm of the residual branch, before the shortcut is added.
That placement gives the parameter counts the author publishes.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.resnet import ResNet
from torch import nn

from ._options import sae_layer
from ._registry import register_model
from .blocks import SaEBasicBlock, SaEBottleneck
from .pretrained import lift_state_dict, lifted_cfgs

__all__: list[str] = []  # register_model adds each entry function


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.95,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2311.10807',
        **kwargs,
    }


# Each model's sources with SE, the one with the best ImageNet top-1 first
_SE_SOURCES = {
    'senetv2_resnet50': (
        'seresnet50.ra2_in1k',
        'seresnet50.a1_in1k',
        'seresnet50.a2_in1k',
        'seresnet50.a3_in1k',
    ),
    'senetv2_resnet152d': ('seresnet152d.ra2_in1k',),
    'senextv2_50': ('seresnext50_32x4d.racm_in1k', 'seresnext50_32x4d.gluon_in1k'),
    'senextv2_26d_32x4d': ('seresnext26d_32x4d.bt_in1k',),
    'senextv2_26t_32x4d': ('seresnext26t_32x4d.bt_in1k',),
    'senextv2_101_32x4d': ('seresnext101_32x4d.gluon_in1k',),
    'senextv2_101_32x8d': ('seresnext101_32x8d.ah_in1k',),
    'senextv2_101_64x4d': ('seresnext101_64x4d.gluon_in1k',),
    'senextv2_101d_32x8d': ('seresnext101d_32x8d.ah_in1k',),
    'senextv2_aa101d_32x8d': (
        'seresnextaa101d_32x8d.sw_in12k_ft_in1k_288',
        'seresnextaa101d_32x8d.sw_in12k_ft_in1k',
        'seresnextaa101d_32x8d.ah_in1k',
    ),
    'senextv2_aa201d_32x8d': ('seresnextaa201d_32x8d.sw_in12k_ft_in1k_384',),
}

# Sources without attention: the best ImageNet top-1 first, and last those whose licence (cc-by-nc-4.0) forbids
# commercial use, so that none of them is a default
_PLAIN_SOURCES = {
    'senetv2_resnet18': (
        'resnet18.a1_in1k',
        'resnet18.a2_in1k',
        'resnet18.gluon_in1k',
        'resnet18.tv_in1k',
        'resnet18.a3_in1k',
        'resnet18.fb_swsl_ig1b_ft_in1k',
        'resnet18.fb_ssl_yfcc100m_ft_in1k',
    ),
    'senetv2_resnet34': (
        'resnet34.ra4_e3600_r224_in1k',
        'resnet34.a1_in1k',
        'resnet34.a2_in1k',
        'resnet34.bt_in1k',
        'resnet34.gluon_in1k',
        'resnet34.tv_in1k',
        'resnet34.a3_in1k',
    ),
    'senetv2_resnet50': (
        'resnet50.a1_in1k',
        'resnet50.d_in1k',
        'resnet50.c1_in1k',
        'resnet50.c2_in1k',
        'resnet50.tv2_in1k',
        'resnet50.a2_in1k',
        'resnet50.b1k_in1k',
        'resnet50.a1h_in1k',
        'resnet50.b2k_in1k',
        'resnet50.ram_in1k',
        'resnet50.ra_in1k',
        'resnet50.bt_in1k',
        'resnet50.am_in1k',
        'resnet50.a3_in1k',
        'resnet50.gluon_in1k',
        'resnet50.tv_in1k',
        'resnet50.fb_swsl_ig1b_ft_in1k',
        'resnet50.fb_ssl_yfcc100m_ft_in1k',
    ),
    'senetv2_resnet101': (
        'resnet101.a1h_in1k',
        'resnet101.a1_in1k',
        'resnet101.a2_in1k',
        'resnet101.tv2_in1k',
        'resnet101.a3_in1k',
        'resnet101.gluon_in1k',
        'resnet101.tv_in1k',
    ),
    'senetv2_resnet152': (
        'resnet152.a1h_in1k',
        'resnet152.a1_in1k',
        'resnet152.a2_in1k',
        'resnet152.tv2_in1k',
        'resnet152.a3_in1k',
        'resnet152.gluon_in1k',
        'resnet152.tv_in1k',
    ),
    'senetv2_resnet152d': (
        'resnet152d.ra2_in1k',
        'resnet152d.gluon_in1k',
    ),
    'senextv2_50': (
        'resnext50_32x4d.a1h_in1k',
        'resnext50_32x4d.a1_in1k',
        'resnext50_32x4d.a2_in1k',
        'resnext50_32x4d.tv2_in1k',
        'resnext50_32x4d.ra_in1k',
        'resnext50_32x4d.gluon_in1k',
        'resnext50_32x4d.a3_in1k',
        'resnext50_32x4d.tv_in1k',
        'resnext50_32x4d.fb_swsl_ig1b_ft_in1k',
        'resnext50_32x4d.fb_ssl_yfcc100m_ft_in1k',
    ),
    'senextv2_101_32x4d': (
        'resnext101_32x4d.gluon_in1k',
        'resnext101_32x4d.fb_swsl_ig1b_ft_in1k',
        'resnext101_32x4d.fb_ssl_yfcc100m_ft_in1k',
    ),
    'senextv2_101_32x8d': (
        'resnext101_32x8d.tv2_in1k',
        'resnext101_32x8d.tv_in1k',
        'resnext101_32x8d.fb_swsl_ig1b_ft_in1k',
        'resnext101_32x8d.fb_wsl_ig1b_ft_in1k',
        'resnext101_32x8d.fb_ssl_yfcc100m_ft_in1k',
    ),
    'senextv2_101_64x4d': (
        'resnext101_64x4d.c1_in1k',
        'resnext101_64x4d.tv_in1k',
        'resnext101_64x4d.gluon_in1k',
    ),
}

default_cfgs = generate_default_cfgs(
    {
        **lifted_cfgs('se', _SE_SOURCES),
        **lifted_cfgs('plain', _PLAIN_SOURCES),
        'senetv2_resnet18.untrained': _cfg(),
        'senetv2_resnet34.untrained': _cfg(),
        'senetv2_resnet50.untrained': _cfg(),
        'senetv2_resnet101.untrained': _cfg(),
        'senetv2_resnet152.untrained': _cfg(),
        'senetv2_resnet152d.untrained': _cfg(first_conv='conv1.0'),
        'senextv2_50.untrained': _cfg(),
        'senextv2_26d_32x4d.untrained': _cfg(first_conv='conv1.0'),
        'senextv2_26t_32x4d.untrained': _cfg(first_conv='conv1.0'),
        'senextv2_101_32x4d.untrained': _cfg(),
        'senextv2_101_32x8d.untrained': _cfg(),
        'senextv2_101_64x4d.untrained': _cfg(),
        'senextv2_101d_32x8d.untrained': _cfg(first_conv='conv1.0'),
        'senextv2_aa101d_32x8d.untrained': _cfg(first_conv='conv1.0'),
        'senextv2_aa201d_32x8d.untrained': _cfg(first_conv='conv1.0'),
    }
)

# timm's "d" trunk: three 3x3 convs in the stem, average pooling in the shortcut
_D = dict(stem_width=32, stem_type='deep', avg_down=True)


def _create_senetv2(
    variant: str,
    pretrained: bool,
    sae_reduction: int = 32,
    sae_cardinality: int = 4,
    sae_add_identity: bool = False,
    sae_bias: bool = True,
    **kwargs: Any,
) -> ResNet:
    """Build one of timm's ResNets around SaE.

    Args:
        variant: Model name.
        pretrained: Load the weights of the chosen tag.
        sae_reduction: A branch has channels // sae_reduction hidden units.
        sae_cardinality: Branches of each SaE.
        sae_add_identity: The author's Keras form, x + x · s.
        sae_bias: Whether SaE's dense layers have biases.
        **kwargs: timm's, for `build_model_with_cfg` and `ResNet`.

    Raises:
        ValueError: An option out of its range; names option and value.
        RuntimeError: Pretrained weights that do not fit; see `lift_state_dict`.
    """
    attn_layer = sae_layer(sae_reduction, sae_cardinality, sae_add_identity, sae_bias)
    block_args = dict(attn_layer=attn_layer, **kwargs.pop('block_args', {}))
    return build_model_with_cfg(
        ResNet, variant, pretrained, block_args=block_args, pretrained_filter_fn=lift_state_dict, **kwargs
    )


def _trunk(block: type[nn.Module], *layers: int, **kwargs: Any) -> dict[str, Any]:
    return dict(block=block, layers=layers, **kwargs)


@register_model
def senetv2_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SENetV2-18: ResNet-18 with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBasicBlock, 2, 2, 2, 2)
    return _create_senetv2('senetv2_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def senetv2_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SENetV2-34: ResNet-34 with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBasicBlock, 3, 4, 6, 3)
    return _create_senetv2('senetv2_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def senetv2_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SENetV2-50: ResNet-50 with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 3, 4, 6, 3)
    return _create_senetv2('senetv2_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def senetv2_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SENetV2-101: ResNet-101 with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 3, 4, 23, 3)
    return _create_senetv2('senetv2_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def senetv2_resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SENetV2-152: ResNet-152 with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 3, 8, 36, 3)
    return _create_senetv2('senetv2_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def senetv2_resnet152d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SENetV2-152-D: the trunk of timm's seresnet152d with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 3, 8, 36, 3, **_D)
    return _create_senetv2('senetv2_resnet152d', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-50: ResNeXt-50 32x4d with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 3, 4, 6, 3, cardinality=32, base_width=4)
    return _create_senetv2('senextv2_50', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_26d_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-26-D: the trunk of timm's seresnext26d_32x4d with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 2, 2, 2, 2, cardinality=32, base_width=4, **_D)
    return _create_senetv2('senextv2_26d_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_26t_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-26-T: the trunk of timm's seresnext26t_32x4d, its stem tiered 24, 32, 64, with SaE in every block."""
    model_args = _trunk(SaEBottleneck, 2, 2, 2, 2, cardinality=32, base_width=4, **dict(_D, stem_type='deep_tiered'))
    return _create_senetv2('senextv2_26t_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_101_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-101 32x4d: ResNeXt-101 32x4d with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 3, 4, 23, 3, cardinality=32, base_width=4)
    return _create_senetv2('senextv2_101_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_101_32x8d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-101 32x8d: ResNeXt-101 32x8d with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 3, 4, 23, 3, cardinality=32, base_width=8)
    return _create_senetv2('senextv2_101_32x8d', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_101_64x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-101 64x4d: ResNeXt-101 64x4d with SaE (reduction 32, cardinality 4) in every block."""
    model_args = _trunk(SaEBottleneck, 3, 4, 23, 3, cardinality=64, base_width=4)
    return _create_senetv2('senextv2_101_64x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_101d_32x8d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-101-D 32x8d: the trunk of timm's seresnext101d_32x8d with SaE in every block."""
    model_args = _trunk(SaEBottleneck, 3, 4, 23, 3, cardinality=32, base_width=8, **_D)
    return _create_senetv2('senextv2_101d_32x8d', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_aa101d_32x8d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-AA-101-D 32x8d: the trunk of timm's seresnextaa101d_32x8d (anti-aliased) with SaE in every block."""
    model_args = _trunk(SaEBottleneck, 3, 4, 23, 3, cardinality=32, base_width=8, aa_layer=nn.AvgPool2d, **_D)
    return _create_senetv2('senextv2_aa101d_32x8d', pretrained, **dict(model_args, **kwargs))


@register_model
def senextv2_aa201d_32x8d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SEneXtV2-AA-201-D 32x8d: the trunk of timm's seresnextaa201d_32x8d (anti-aliased) with SaE in every block."""
    model_args = _trunk(
        SaEBottleneck, 3, 24, 36, 4, cardinality=32, base_width=8, aa_layer=nn.AvgPool2d, **dict(_D, stem_width=64)
    )
    return _create_senetv2('senextv2_aa201d_32x8d', pretrained, **dict(model_args, **kwargs))
