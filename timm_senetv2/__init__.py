"""SENetV2, SEneXtV2 and SEANet for timm.

Importing this package puts its models in timm's factory: at once if timm is already imported, else as soon as it is.
Neither torch nor timm is imported here; the names below load on first use.
"""

from typing import TYPE_CHECKING

from .registration import register

if TYPE_CHECKING:
    from .layers import ChannelAggregation as ChannelAggregation
    from .layers import SqueezeAggregatedExcitation as SqueezeAggregatedExcitation
    from .lifting import add_attention as add_attention
    from .lifting import lift as lift
    from .models import CifarResNet as CifarResNet
    from .models import SmallCNN as SmallCNN

__version__ = '0.1.0'

_LAZY = {
    'ChannelAggregation': 'layers',
    'SqueezeAggregatedExcitation': 'layers',
    'CifarResNet': 'models',
    'SmallCNN': 'models',
    'add_attention': 'lifting',
    'lift': 'lifting',
}

__all__ = [
    'ChannelAggregation',
    'CifarResNet',
    'SmallCNN',
    'SqueezeAggregatedExcitation',
    'add_attention',
    'lift',
    'register',
]

register()


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'.{_LAZY[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
