"""Each private name of torch in layers/_eager.py is there and means what we think; and what counts as plain."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from timm_senetv2.layers._eager import is_intercepted, is_observed, is_plain


def observed_during(run) -> bool:
    """What is_observed answers inside the function that `run` is given and calls with a tensor."""
    answers = []

    def function(x):
        answers.append(is_observed())
        return x.sum()

    run(function)
    return all(answers) and bool(answers)


def test_nothing_is_observed_in_ordinary_code():
    assert not observed_during(lambda f: f(torch.ones(2)))
    with torch.no_grad():
        assert not is_observed() and not is_intercepted()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        assert not is_observed()
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: answers.append(is_observed()))
    answers = []
    x.sum().backward()
    assert answers == [False]


def test_compiling():
    seen = torch.compile(lambda x: x + 1 if is_observed() else x - 1, backend='eager', fullgraph=True)
    assert seen(torch.zeros(())) == 1
    assert not is_observed()


def test_is_intercepted_is_answered_while_compiling():
    seen = torch.compile(lambda x: x + 1 if is_intercepted() else x - 1, backend='eager', fullgraph=True)
    assert seen(torch.zeros(())) == -1
    handle = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        assert seen(torch.zeros(())) == 1
    finally:
        handle.remove()
    assert seen(torch.zeros(())) == -1


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
def test_tracing():
    assert observed_during(lambda f: torch.jit.trace(f, torch.ones(2), check_trace=False))
    assert not is_observed()


@pytest.mark.parametrize(
    'transform',
    [
        lambda f: vmap(f)(torch.ones(2, 2)),
        lambda f: grad(f)(torch.ones(2)),
        lambda f: jvp(f, (torch.ones(2),), (torch.ones(2),)),
        lambda f: functionalize(f)(torch.ones(2)),
        lambda f: vmap(grad(f))(torch.ones(2, 2)),
    ],
    ids=['vmap', 'grad', 'jvp', 'functionalize', 'vmap of grad'],
)
def test_peek_interpreter_stack_shows_function_transforms(transform):
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert observed_during(transform)
    assert not is_observed()


def test_current_level_shows_forward_mode():
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert is_observed()
    assert not is_observed()


@pytest.mark.parametrize(
    'mode', [lambda: FlopCounterMode(display=False), lambda: torch._subclasses.FakeTensorMode()], ids=['flops', 'fake']
)
def test_dispatch_modes(mode):
    with mode():
        assert is_observed()
    assert not is_observed()


def test_make_fx():
    assert observed_during(lambda f: make_fx(f)(torch.ones(2)))


def test_len_torch_function_stack_shows_function_modes():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        assert is_intercepted() and is_observed()
    assert not is_observed()


@pytest.mark.parametrize('kind', ['forward_pre_hook', 'forward_hook', 'full_backward_pre_hook', 'full_backward_hook'])
def test_has_any_global_hook(kind):
    handle = getattr(torch.nn.modules.module, f'register_module_{kind}')(lambda *args: None)
    try:
        assert is_intercepted() and is_observed()
    finally:
        handle.remove()
    assert not is_observed()


def test_replaced_module_call(monkeypatch):
    """As torch.fx and some profilers do it while they trace."""
    monkeypatch.setattr(nn.Module, '__call__', lambda self, *args, **kwargs: self.forward(*args, **kwargs))
    assert is_observed()


def test_fx_replaces_module_call():
    class Model(nn.Module):
        def forward(self, x):
            answers.append(is_observed())
            return x

    answers = []
    torch.fx.symbolic_trace(Model())
    assert answers == [True]


# ---- plain modules


def plain(module: nn.Module) -> bool:
    return is_plain(module, nn.BatchNorm2d, FORWARD)


FORWARD = nn.BatchNorm2d.forward


class Subclass(nn.BatchNorm2d):
    pass


class Wrapper(torch.Tensor):
    pass


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def keep(*args):
    return None


def set_buffer(m: nn.Module) -> None:
    m.running_mean = m.running_mean.as_subclass(Wrapper)


TAMPERED = {
    'subclass': lambda m: setattr(m, '__class__', Subclass),
    'forward hook': lambda m: m.register_forward_hook(keep),
    'forward hook with kwargs': lambda m: m.register_forward_hook(keep, with_kwargs=True),
    'forward pre-hook': lambda m: m.register_forward_pre_hook(keep),
    'full backward hook': lambda m: m.register_full_backward_hook(keep),
    'full backward pre-hook': lambda m: m.register_full_backward_pre_hook(keep),
    'replaced forward': lambda m: setattr(m, 'forward', m.forward),
    'parametrization': lambda m: parametrize.register_parametrization(m, 'weight', Double()),
    'pruning': lambda m: prune.l1_unstructured(m, 'weight', 1),
    'parameter subclass': lambda m: setattr(m, 'weight', nn.Parameter(m.weight.detach().as_subclass(Wrapper))),
    'buffer subclass': set_buffer,
}


@pytest.mark.parametrize('how', TAMPERED)
def test_tampered_module_is_not_plain(how):
    module = nn.BatchNorm2d(4)
    assert plain(module)
    TAMPERED[how](module)
    assert not plain(module)


def test_removed_hook_leaves_a_plain_module():
    module = nn.BatchNorm2d(4)
    module.register_forward_hook(keep).remove()
    assert plain(module)


@pytest.mark.parametrize(
    'how',
    [parametrizations.weight_norm, parametrizations.spectral_norm, torch.nn.utils.spectral_norm],
    ids=['weight_norm', 'spectral_norm', 'old spectral_norm'],
)
def test_normed_weight_is_not_plain(how):
    assert is_plain(nn.Conv2d(2, 2, 1), nn.Conv2d, nn.Conv2d.forward)
    assert not is_plain(how(nn.Conv2d(2, 2, 1)), nn.Conv2d, nn.Conv2d.forward)


def test_patched_class_is_not_plain(monkeypatch):
    module = nn.BatchNorm2d(4)
    monkeypatch.setattr(nn.BatchNorm2d, 'forward', lambda self, x: x)
    assert not plain(module)


def test_other_modules_without_parameters_and_with_none_are_plain():
    assert plain(nn.BatchNorm2d(4, affine=False, track_running_stats=False))
    assert plain(nn.BatchNorm2d(4).double().requires_grad_(False).eval())
    assert not plain(nn.Identity())
