"""What `import torch` calls at its end (entry point group `torch.backends`), and the wait for timm.

A module of its own, outside the package, for two reasons. With `TIMM_SENETV2_AUTOLOAD=0` nothing of the package is
imported, although torch imports whatever holds the entry point. And importing the package always registers the models:
it must not have been imported before timm was, or `import timm_senetv2` would do nothing.
"""

import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_TIMM = 'timm.models'


def autoload() -> None:
    """Register the models in timm, now or when timm is imported. Never raises: torch would then fail to import."""
    if os.environ.get('TIMM_SENETV2_AUTOLOAD') == '0':
        return
    try:
        if _TIMM in sys.modules:
            _register()
        else:
            register_after_timm()
    except Exception as e:
        _warn_not_loaded(e)


def register_after_timm() -> None:
    """Have the models registered at the end of every import of `timm.models` from now on."""
    if not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


def warn(message: str) -> None:
    """Issue a RuntimeWarning; where warnings are errors, print it, for no error may reach `import torch` or timm."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:
        print(f'RuntimeWarning: {message}', file=sys.stderr)


class _TimmFinder:
    """A finder that finds nothing itself: it returns what the other finders find for `timm.models`, with its loader
    replaced by one that registers the models afterwards.

    wrapt has such hooks too, but importing wrapt takes longer than all else here does, in every program that imports
    torch, and a finder that comes before wrapt's and answers first disables it.
    """

    def __init__(self) -> None:
        self._asking = threading.local()  # whether this thread asks the other finders, which may ask us

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: 'ModuleType | None' = None
    ) -> 'ModuleSpec | None':
        """The spec of `timm.models` when it is about to be imported; None for any other module and for reloads."""
        if sys.meta_path[:1] != [self]:
            self._move_to_front()
        if fullname != _TIMM or fullname in sys.modules or getattr(self._asking, 'now', False):
            return None
        self._asking.now = True
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._asking.now = False
        loader: Any = spec.loader if spec is not None else None
        if spec is not None and hasattr(loader, 'exec_module') and type(loader) is not _ThenRegister:
            spec.loader = cast(Any, _ThenRegister(loader))
        return spec

    def _move_to_front(self) -> None:
        # An import hook inserted after us, such as typeguard's, would answer for timm first. Before timm comes to its
        # models it looks for packages that are not loaded (apex, for one, each time), so we are asked in between. One
        # assignment, because other threads may be iterating over the list.
        finders = sys.meta_path
        if self in finders:
            i = finders.index(self)
            finders[: i + 1] = [self, *finders[:i]]

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: 'ModuleType | None'
    ) -> 'ModuleSpec | None':
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, 'find_spec', None)
            if find_spec is not None and not _is_ours(finder):
                spec: ModuleSpec | None = find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _ThenRegister:
    """A loader that behaves like another one in everything, and registers the models after executing `timm.models`.

    Module and spec get the other loader back before the module is executed. Whoever asks for a spec and does not load
    it sees a loader of the same class, equal to the other one, that is pickled as the other one.
    """

    __slots__ = ('_then_register_loader',)  # and no __dict__: that is the other loader's

    def __init__(self, loader: Any) -> None:
        self._then_register_loader = loader

    def exec_module(self, module: 'ModuleType') -> None:
        loader = self._then_register_loader
        spec: Any = module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = loader
        if getattr(module, '__loader__', None) is self:
            module.__loader__ = loader
        loader.exec_module(module)
        try:
            _register()
        except Exception as e:
            _warn_not_loaded(e)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._then_register_loader, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._then_register_loader)

    def __eq__(self, other: object) -> bool:
        return bool(self._then_register_loader == other)

    def __hash__(self) -> int:
        return hash(self._then_register_loader)

    def __repr__(self) -> str:
        return repr(self._then_register_loader)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._then_register_loader.__reduce_ex__(protocol)


def _is_ours(finder: object) -> bool:
    # By name: this module may have been purged from sys.modules and imported again
    cls = type(finder)
    return (cls.__module__, cls.__qualname__) == (_TimmFinder.__module__, _TimmFinder.__qualname__)


def _register() -> None:
    from timm_senetv2.registration import register

    register()


def _warn_not_loaded(error: Exception) -> None:
    warn(
        f'timm_senetv2 could not be loaded, its models are not in timm: {type(error).__name__}: {error}. '
        'Reinstall it, or set TIMM_SENETV2_AUTOLOAD=0 to silence this.'
    )
