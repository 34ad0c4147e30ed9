"""Whether anybody can see inside a computation: what every faster way of computing the same has to ask first."""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:
    from torch.nn.modules.module import _has_any_global_hook
except ImportError:  # torch 2.5 has the hooks, and no function that looks at all of them

    def _has_any_global_hook() -> bool:  # type: ignore[misc]
        return bool(
            _module._global_backward_pre_hooks
            or _module._global_backward_hooks
            or _module._global_forward_pre_hooks
            or _module._global_forward_hooks
        )


_MODULE_CALL = nn.Module.__call__
_METHODS = frozenset({'forward', '_conv_forward', 'squeeze', 'gate', 'scale'})
_ORDINARY = (nn.Parameter, torch.Tensor, type(None))


def is_observed() -> bool:
    """Whether operations are compiled, recorded, transformed or intercepted, or all modules hooked.

    The one place for names of torch that are not public; tests/test_eager.py fails when one of them goes.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad, jvp, functionalize, …
        or forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode()  # make_fx, FlopCounterMode, FakeTensorMode, …
        or is_intercepted()
        or nn.Module.__call__ is not _MODULE_CALL
    )


def is_compiled() -> bool:
    """Whether `torch.compile` is at work, whose graph nobody but the compiler sees; an exported one is for others.

    torch 2.5 cannot tell the two apart: there it is False.
    """
    return (
        torch.compiler.is_compiling()
        and hasattr(torch.compiler, 'is_exporting')
        and not torch.compiler.is_exporting()
        and not is_intercepted()
    )


def is_intercepted() -> bool:
    """Whether a mode sees every function of torch, or a hook every module: while compiling too."""
    return torch._C._len_torch_function_stack() > 0 or bool(_has_any_global_hook())


def is_plain(module: nn.Module | None, cls: type[nn.Module], forward: object) -> bool:
    """Whether the module is exactly of this class, with this forward and no hooks, and its tensors are ordinary ones.

    Parametrizations change the class of a module; pruning, weight norm and spectral norm are hooks of it.
    """
    if type(module) is not cls:
        return False
    own = module.__dict__
    return (
        cls.forward is forward
        and _METHODS.isdisjoint(own)  # none of them is replaced in this instance
        and not (own['_forward_hooks'] or own['_forward_pre_hooks'])
        and not (own['_backward_hooks'] or own['_backward_pre_hooks'])
        and all(type(t) in _ORDINARY for t in (*own['_parameters'].values(), *own['_buffers'].values()))
    )
