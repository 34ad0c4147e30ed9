"""The layers of the papers, in plain torch."""

from .aggregation import ChannelAggregation as ChannelAggregation
from .sae import SqueezeAggregatedExcitation as SqueezeAggregatedExcitation

__all__ = ['ChannelAggregation', 'SqueezeAggregatedExcitation']
