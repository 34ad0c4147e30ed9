"""timm's `register_model`, for a guest."""

from collections.abc import Callable

from timm.models import is_model, model_entrypoint
from timm.models import register_model as timm_register_model

from ..registration import name_clashes


def register_model(fn: Callable) -> Callable:
    """Register an entry function in timm, except under a name that timm already has: that one stays timm's."""
    name = fn.__name__
    if is_model(name) and model_entrypoint(name).__module__ != fn.__module__:
        name_clashes.append(name)
        return fn
    return timm_register_model(fn)
