"""When and how the models reach timm's registry."""
import importlib
from types import ModuleType

import wrapt

from timm_senetv2_autoload import warn

MODEL_MODULES = ('senetv2', 'cifar', 'small_cnn')
name_clashes: list[str] = []  # names that timm had before us


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
    failures: dict[str, list[str]] = {}
    for name in MODEL_MODULES:
        try:
            importlib.import_module(f'timm_senetv2.models.{name}')
        except Exception as e:  # whatever a future timm may do, `import timm` has to survive it
            failures.setdefault(f'{type(e).__name__}: {e}', []).append(name)
    problems = [f'{", ".join(names)} failed with {reason}' for reason, names in failures.items()]
    if name_clashes:
        problems.append(f'timm already has {", ".join(name_clashes)} and keeps its own')
    if problems:
        warn(
            f'timm_senetv2 could not register all of its models in timm: {"; ".join(problems)}. '
            'Update timm-senetv2 to a version made for your timm; TIMM_SENETV2_AUTOLOAD=0 turns the registration off.'
        )
