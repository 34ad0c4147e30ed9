"""The model options that every trunk has."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..layers import SqueezeAggregatedExcitation
from ..layers._checks import check_switch, check_whole_number

# What has no meaning without attention, and without aggregation
_OF_ATTENTION = ('sae_reduction', 'sae_add_identity', 'sae_bias')
_OF_AGGREGATION = ('aggregation_op', 'aggregate_after')


def sae_layer(
    sae_reduction: int,
    sae_cardinality: int,
    sae_add_identity: bool,
    sae_bias: bool,
) -> Callable[..., nn.Module]:
    """What builds the SaE of a block from its width.

    Raises:
        ValueError: A reduction or a cardinality that is not a whole number above zero, or a switch that is neither True
            nor False; names option and value.
    """
    check_whole_number('sae_reduction', sae_reduction)
    check_whole_number('sae_cardinality', sae_cardinality)
    for name, value in (('sae_add_identity', sae_add_identity), ('sae_bias', sae_bias)):
        check_switch(name, value)
    return partial(
        SqueezeAggregatedExcitation,
        reduction=sae_reduction,
        cardinality=sae_cardinality,
        bias=sae_bias,
        add_identity=sae_add_identity,
    )


def optional_sae_layer(
    sae_cardinality: int,
    sae_reduction: int | None,
    sae_add_identity: bool | None,
    sae_bias: bool | None,
) -> Callable[..., nn.Module] | None:
    """`sae_layer` of the 32-pixel models: a cardinality of 0 means no attention, and None the default of the others.

    Raises:
        ValueError: See `sae_layer`; or one of the others given together with a cardinality of 0.
    """
    check_whole_number('sae_cardinality', sae_cardinality, least=0)
    if sae_cardinality:
        return sae_layer(
            16 if sae_reduction is None else sae_reduction,
            sae_cardinality,
            False if sae_add_identity is None else sae_add_identity,
            True if sae_bias is None else sae_bias,
        )
    refuse_without_meaning(
        dict(zip(_OF_ATTENTION, (sae_reduction, sae_add_identity, sae_bias), strict=True)),
        'attention; leave it out, or set sae_cardinality to 1 (SE) or more (SaE)',
    )
    return None


def refuse_without_meaning(options: Mapping[str, object], lacking: str) -> None:
    """Raise a ValueError for the first option that is not None."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f'{name}={value!r} has no meaning in a model without {lacking}')


def without_recorded(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model, less those without meaning that come from the `config.json` of its checkpoint.

    Earlier versions took and recorded them; and a checkpoint with attention may be asked for without. timm hands on
    what is recorded as `pretrained_model_args`.
    """
    recorded = kwargs.get('pretrained_model_args') or {}
    unused = [
        *(() if kwargs.get('sae_cardinality') else _OF_ATTENTION),
        *(() if kwargs.get('aggregation_factor', 1) != 1 else _OF_AGGREGATION),
    ]
    return {
        name: value
        for name, value in kwargs.items()
        if not (name in unused and name in recorded and recorded[name] == value)
    }
