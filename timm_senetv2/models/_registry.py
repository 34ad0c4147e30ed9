"""timm's `register_model` and `register_model_deprecations`, which never override a name that timm has."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import get_deprecated_models, is_model, model_entrypoint
from timm.models import register_model as timm_register_model
from timm.models import register_model_deprecations as timm_register_model_deprecations

from ..registration import name_clashes


def register_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Register an entry function in timm, except under a name that timm already has: that one stays timm's."""
    name = fn.__name__
    if is_model(name) and model_entrypoint(name).__module__ != fn.__module__:
        name_clashes.append(name)
        return fn
    return timm_register_model(fn)


def register_model_deprecations(module_name: str, current_names: Mapping[str, str]) -> None:
    """Register old model names, each with its current one, except those that timm has: they stay timm's."""
    taken = [old for old, new in current_names.items() if is_model(old) and get_deprecated_models().get(old) != new]
    name_clashes.extend(taken)
    timm_register_model_deprecations(module_name, {old: new for old, new in current_names.items() if old not in taken})
