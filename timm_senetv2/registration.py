"""When and how the models reach timm's registry."""
import importlib
import warnings
from types import ModuleType

import wrapt

MODEL_MODULES = ('senetv2', 'cifar', 'small_cnn')


def register() -> None:
    """Put the models in timm's registry: now if `timm.models` is imported, else right after it will be.

    Imports neither torch nor timm itself, never raises, and does nothing the second time. What goes wrong becomes one
    `RuntimeWarning` when timm is imported; timm and its own models go on working.
    """
    global _registered
    if _registered:
        return
    _registered = True
    wrapt.register_post_import_hook(_register_models, 'timm.models')


_registered = False


def _register_models(_timm_models: ModuleType) -> None:
    problems = []
    for name in MODEL_MODULES:
        try:
            importlib.import_module(f'timm_senetv2.models.{name}')
        except Exception as e:  # whatever a future timm may do, `import timm` has to survive it
            problems.append(f'{name} failed with {type(e).__name__}: {e}')
    try:
        from .models._registry import name_clashes

        if name_clashes:
            problems.append(f'timm already has {", ".join(name_clashes)} and keeps its own')
    except Exception as e:
        problems.append(f'{type(e).__name__}: {e}')
    if problems:
        warnings.warn(
            f'timm_senetv2 could not register all of its models in timm: {"; ".join(problems)}. '
            'Check that your timm version is supported, or set TIMM_SENETV2_AUTOLOAD=0 to silence this.',
            RuntimeWarning,
        )
