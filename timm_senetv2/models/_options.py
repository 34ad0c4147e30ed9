"""The model options that every trunk has."""

from collections.abc import Callable
from functools import partial

from torch import nn

from ..layers import SqueezeAggregatedExcitation
from ..layers._checks import check_whole_number


def sae_layer(sae_reduction: int, sae_cardinality: int, sae_add_identity: bool) -> Callable[..., nn.Module]:
    """What builds the SaE of a block from its width.

    Raises:
        ValueError: A reduction or a cardinality that is not a whole number above zero; names option and value.
    """
    check_whole_number('sae_reduction', sae_reduction)
    check_whole_number('sae_cardinality', sae_cardinality)
    return partial(
        SqueezeAggregatedExcitation,
        reduction=sae_reduction,
        cardinality=sae_cardinality,
        add_identity=sae_add_identity,
    )
