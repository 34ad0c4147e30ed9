"""When and how the models reach timm's registry."""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

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
    if 'timm.models' in sys.modules:
        _register_models()
    else:
        sys.meta_path.insert(0, _AfterTimmModels())


_registered = False


class _AfterTimmModels(MetaPathFinder):
    """Finds nothing itself; has the models registered at the end of the import of `timm.models`.

    wrapt has such a hook too, but importing wrapt takes four times as long as all else here does, in every program that
    imports torch.
    """

    _searching = False

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != 'timm.models' or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Another loader, and after it the registration. The module is left with the other loader."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register_models()


def _register_models() -> None:
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
