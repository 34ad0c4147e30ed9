"""When and how the models reach timm's registry."""

import importlib
import sys
import weakref
from types import ModuleType

from timm_senetv2_autoload import register_after_timm, warn

MODEL_MODULES = ('senetv2', 'cifar', 'small_cnn')
name_clashes: list[str] = []  # names that timm had before us

_registered_in: 'weakref.WeakSet[ModuleType]' = weakref.WeakSet()  # every `timm.models` so far
_INDEPENDENT_OF_TIMM = ('timm_senetv2.registration', 'timm_senetv2.errors', 'timm_senetv2.layers')


def register() -> None:
    """Put the models in timm's registry: now if `timm.models` is imported, and whenever it is imported from now on.

    Imports neither torch nor timm itself, never raises, and does nothing the second time. What goes wrong becomes one
    `RuntimeWarning` when timm is imported; timm and its own models go on working. A `timm.models` that is imported
    from scratch (after `timm` was purged from `sys.modules`) has an empty registry, and gets the models again.
    """
    register_after_timm()
    timm_models = sys.modules.get('timm.models')
    if timm_models is None or timm_models in _registered_in:
        return
    _forget_modules_of_another_timm(timm_models)
    _register_models()
    _registered_in.add(timm_models)


def _forget_modules_of_another_timm(timm_models: ModuleType) -> None:
    """Purge our modules from `sys.modules` if they were made with a timm that has been purged itself.

    They are then imported again and made of the new timm's classes. Whoever holds the old ones keeps them, with the
    old timm.
    """
    registry = sys.modules.get('timm_senetv2.models._registry')
    made_with = getattr(registry, 'timm_register_model', None)
    if made_with is None or made_with is getattr(timm_models, 'register_model', None):
        return
    package = sys.modules['timm_senetv2']
    for name in [name for name in sys.modules if name.startswith('timm_senetv2.')]:
        if not name.startswith(_INDEPENDENT_OF_TIMM):
            del sys.modules[name]
            vars(package).pop(name.removeprefix('timm_senetv2.'), None)


def _register_models() -> None:
    failures: dict[str, list[str]] = {}
    name_clashes.clear()
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
