"""Our blocks and timm's own block classes with the same weights: the same action has the same result on both."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import timm
import torch
from block_pairs import (
    BLOCKS,
    CASES,
    PLANES,
    SAE,
    WIDTH,
    assert_same,
    both_blocks,
    both_modes,
    build,
    images,
    last,
    randomize_norms,
    run,
    twin_of,
)
from timm.models import reparameterize_model
from timm.utils import ModelEmaV3
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from timm_senetv2.layers import SqueezeAggregatedExcitation
from timm_senetv2.models import blocks, fused

pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
PARTS = [
    'conv1', 'bn1', 'act1', 'conv2', 'bn2', 'act2', 'conv3', 'bn3', 'act3', 'drop_block', 'aa', 'drop_path',
    'se', 'se.fc1', 'se.act', 'se.fc2', 'se.gate_act', 'downsample', 'downsample.0', 'downsample.1',
]  # fmt: skip


@pytest.fixture(autouse=True)
def fuse_small_inputs(monkeypatch) -> None:
    """So that the fused tail is taken wherever nothing else forbids it."""
    monkeypatch.setattr(fused, '_WORTHWHILE', 0)


def result_of(action: Callable, block: nn.Module, x: torch.Tensor):
    """What the action returns for a copy of the block, or the type of its error."""
    torch.manual_seed(2)
    try:
        return action(copy.deepcopy(block), x.clone())
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as e:
        return type(e)


def assert_pair(action: Callable, block: nn.Module, x: torch.Tensor | None = None, raises: bool = False, **tolerance):
    """The action gives the same on our block and on timm's; with the same bits unless a tolerance is given."""
    x = images() if x is None else x
    got, want = (result_of(action, b, x) for b in (block, twin_of(block)))
    assert isinstance(want, type) == raises, want
    torch.testing.assert_close(got, want, **(tolerance or dict(rtol=0, atol=0))) if not raises else None
    assert type(got) is type(want) and (not raises or got is want)


def part(block: nn.Module, name: str) -> nn.Module:
    if not any(name == n for n, _ in block.named_modules()):
        pytest.skip('a basic block has no third conv')
    return block.get_submodule(name)


# ---- nothing is attached


@both_modes
@pytest.mark.parametrize('case', CASES)
@both_blocks
def test_block_equals_timms(cls, case, training):
    """With autograd timm's own forward runs: the same bits in values, gradients and buffers."""
    block = build(cls, case).train(training)
    twin, x = twin_of(block), images()
    assert_same(run(block, x), run(twin, x), 0)
    assert_same(run(block, x), run(twin, x), 0)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('case', CASES)
@both_blocks
def test_inference_without_autograd_equals_timms(cls, case, context, memory_format, tails):
    """The fused tail runs; the block's input and the memory format stay as they were."""
    block = build(cls, case).eval()
    x = images().to(memory_format=memory_format)
    before = x.clone()
    with context():
        out, want = block(x), twin_of(block)(x)
    assert tails == [block]
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, before)
    assert out.is_contiguous(memory_format=memory_format)


# ---- hooks

KINDS = [
    'forward_pre_hook', 'forward_hook', 'full_backward_pre_hook', 'full_backward_hook', 'forward_hook with kwargs',
]  # fmt: skip


def attach(module: nn.Module, kind: str, seen: list) -> None:
    """A hook that keeps what it sees, and copies of it."""

    def see(_, *values):
        for value in values:
            for v in value if isinstance(value, tuple) else (value,):
                if isinstance(v, torch.Tensor):
                    seen.append((v, v.detach().clone()))

    register = getattr(module, f'register_{kind.split(" ")[0]}')
    register(see, with_kwargs=True) if 'kwargs' in kind else register(see)


@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad], ids=['no_grad', 'grad'])
@pytest.mark.parametrize('kind', ['forward_pre_hook', 'forward_hook', 'forward_hook with kwargs'])
@pytest.mark.parametrize('name', PARTS)
@both_blocks
def test_forward_hooks_see_and_keep_what_they_do_in_timms(cls, name, kind, context):
    """What a hook kept is afterwards what it is after timm's forward: nothing more is overwritten."""

    def keep(block, x):
        seen = []
        attach(part(block, name), kind, seen)
        with context():
            out = block(x)
        return [out.detach()] + [t.detach() for pair in seen for t in pair]

    # Hooks inside the attention leave the tail fused; it calls those layers as modules
    assert_pair(keep, build(cls, 'everything').eval(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('kind', ['full_backward_pre_hook', 'full_backward_hook'])
@pytest.mark.parametrize('name', PARTS)
@both_modes
@both_blocks
def test_backward_hooks_see_what_they_do_in_timms(cls, training, name, kind):
    def keep(block, x):
        seen = []
        attach(part(block, name), kind, seen)
        return list(run(block, x).values()) + [t for pair in seen for t in pair]

    block = build(cls, 'everything', act_layer=lambda inplace: nn.SiLU()).train(training)
    # timm adds in place to what drop_path returns (in eval mode: what se returns), which such hooks do not allow
    assert_pair(keep, block, raises=name == 'drop_path' or (name == 'se' and not training))


@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad], ids=['no_grad', 'grad'])
@pytest.mark.parametrize('name', ['conv', 'bn', 'se', 'drop_path', 'downsample'])
@both_blocks
def test_hook_that_replaces_the_output_is_obeyed(cls, name, context):
    def double(block, x):
        part(block, name).register_forward_hook(lambda module, args, out: out * 2)
        with context():
            return block(x).detach()

    block = build(cls, 'everything').eval()
    name = last(block, name) if name in ('conv', 'bn') else name
    tolerance = dict(rtol=1e-10, atol=1e-10) if name == 'downsample' else {}  # called as a module by the tail too
    assert_pair(double, block, **tolerance)


@pytest.mark.parametrize('register', ['forward_hook', 'forward_pre_hook', 'full_backward_hook'])
@both_blocks
def test_global_module_hooks_are_called_as_often_as_in_timms(cls, register):
    def count(block, x):
        calls = []
        name = 'register_module_' + register
        handle = getattr(torch.nn.modules.module, name)(lambda module, *args: calls.append(type(module).__name__))
        try:
            if 'backward' in register:
                block(x.requires_grad_()).sum().backward()
            else:
                with torch.no_grad():
                    block(x)
        finally:
            handle.remove()
        return sorted(c.replace('SaE', '') for c in calls)

    block = build(cls, 'stride', act_layer=lambda inplace: nn.SiLU()).eval()
    assert_pair_of_lists(count, block)


def assert_pair_of_lists(action, block):
    x = images()
    got, want = (result_of(action, b, x) for b in (block, twin_of(block)))
    assert got == want and (isinstance(want, type) or want)


# ---- replaced parts

REPLACED = {
    'conv': lambda forward, x: forward(x) * 2 + 1,
    'bn': lambda forward, x: forward(x).relu(),
    'se': lambda forward, x: forward(x) - 1,
    'drop_path': lambda forward, x: forward(x) * 3,
    'downsample': lambda forward, x: forward(x).neg(),
}


@both_modes
@pytest.mark.parametrize('name', REPLACED)
@both_blocks
def test_replaced_forward_is_obeyed(cls, name, training):
    """As accelerate and many patches do it: an attribute `forward` of the instance."""

    def replace(block, x):
        module = part(block, last(block, name) if name in ('conv', 'bn') else name)
        module.forward = partial(REPLACED[name], module.forward)
        with torch.no_grad():
            without = block(x)
        return [without, *run(block, x).values()]

    tolerance = dict(rtol=1e-10, atol=1e-10) if name == 'downsample' else {}
    assert_pair(replace, build(cls, 'everything').train(training), **tolerance)


class LoRA(nn.Module):
    """A low-rank update of a weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(len(weight), 2, dtype=weight.dtype))
        self.b = nn.Parameter(torch.randn(2, weight[0].numel(), dtype=weight.dtype))

    def forward(self, weight):
        return weight + (self.a @ self.b).view_as(weight)


def old_weight_norm(module):
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(module)


PARAMETRIZATIONS = {
    'lora': lambda m: parametrize.register_parametrization(m, 'weight', LoRA(m.weight)),
    'weight_norm': parametrizations.weight_norm,
    'old weight_norm': old_weight_norm,
    'spectral_norm': parametrizations.spectral_norm,
    'old spectral_norm': torch.nn.utils.spectral_norm,
    'pruning': lambda m: prune.l1_unstructured(m, 'weight', 0.5),
}


@pytest.mark.parametrize('how', PARAMETRIZATIONS)
@pytest.mark.parametrize('name', ['conv', 'se.fc2'])
@both_blocks
def test_parametrizations(cls, name, how):
    def change(block, x):
        PARAMETRIZATIONS[how](part(block, last(block, name) if name == 'conv' else name))
        with torch.no_grad():
            without = block.eval()(x)
        return [without, *run(block.train(), x).values()]

    assert_pair(change, build(cls, 'stride'), **({} if name == 'conv' else dict(rtol=1e-10, atol=1e-10)))


class NoisyConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x.amax()


class ActNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def without_counter() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(WIDTH)
    norm.num_batches_tracked = None
    return norm


OTHERS = {
    'conv subclass': ('conv', lambda: NoisyConv(PLANES, WIDTH, 1)),
    '3x3 conv with bias': ('conv', lambda: nn.Conv2d(PLANES, WIDTH, 3, padding=1)),
    'norm subclass': ('bn', lambda: ActNorm(WIDTH)),
    'no running statistics': ('bn', lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False)),
    'not affine': ('bn', lambda: nn.BatchNorm2d(WIDTH, affine=False)),
    'no momentum': ('bn', lambda: nn.BatchNorm2d(WIDTH, momentum=None)),
    'no counter': ('bn', without_counter),
    'sync': ('bn', lambda: nn.SyncBatchNorm(WIDTH)),
    'group norm': ('bn', lambda: nn.GroupNorm(4, WIDTH)),
    'instance norm': ('bn', lambda: nn.InstanceNorm2d(WIDTH)),
    'identity': ('bn', nn.Identity),
}


@both_modes
@pytest.mark.parametrize('other', OTHERS)
@both_blocks
def test_other_convs_and_norms(cls, other, training):
    name, make = OTHERS[other]
    block = build(cls)
    made = randomize_norms(make())
    if name == 'conv' and cls is not blocks.SaEBottleneck:
        made = type(made)(WIDTH, WIDTH, made.kernel_size, padding=made.padding)
    if other == 'sync':
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    else:
        setattr(block, last(block, name), made)
    if other == 'sync' and training:
        block.eval()  # it trains on GPUs only

    def both(block, x):
        found = list(run(block, x).values())
        with torch.no_grad():
            return [*found, block(x)]

    assert_pair(both, block.double().train(training), rtol=1e-10, atol=1e-10)


@both_blocks
def test_frozen_norms_in_a_training_block(cls):
    def frozen(block, x):
        block.train()
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        with torch.no_grad():
            without = block(x)
        return [without, *run(block, x).values()]

    assert_pair(frozen, build(cls, 'stride'), rtol=1e-10, atol=1e-10)


@both_blocks
def test_frozen_parameters(cls):
    """Whatever has no gradient, the rest has the right one."""
    for frozen in 'conv', 'bn', 'se':
        block = build(cls, 'stride').train()
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        assert_pair(lambda b, x: list(run(b, x).values()), block)


@pytest.mark.parametrize('wrong', ['wider shortcut', 'smaller shortcut', 'larger shortcut'])
@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad], ids=['no_grad', 'grad'])
@both_blocks
def test_branch_that_does_not_fit_the_shortcut_is_refused_as_by_timm(cls, wrong, context):
    def forward(block, x):
        stride = {'wider shortcut': 1, 'smaller shortcut': 6, 'larger shortcut': 1}[wrong]
        block.downsample = nn.Conv2d(WIDTH, WIDTH * (1 + (wrong[0] == 'w')), 1, stride).double()
        if wrong == 'larger shortcut':
            part(block, 'conv2').stride = 6, 6  # to one pixel, which a shortcut could stretch
        with context():
            return block(x).detach()

    assert_pair(
        forward, build(cls).eval(), raises=wrong != 'smaller shortcut',
        **(dict(rtol=1e-10, atol=1e-10) if wrong == 'smaller shortcut' else {}),
    )  # fmt: skip


# ---- graphs


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op in ('call_function', 'call_module', 'call_method')]


@both_blocks
def test_fx_graph_is_timms(cls):
    block = build(cls, 'stride').eval()
    ours, theirs = torch.fx.symbolic_trace(block), torch.fx.symbolic_trace(twin_of(block))
    assert targets(ours.graph) == targets(theirs.graph)
    x = images()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(torch.fx.Interpreter(ours).run(x), theirs(x))
    assert_same(run(ours.train(), x), run(theirs.train(), x), 0)


@both_blocks
def test_feature_extractors_keep_their_features(cls):
    """torchvision's and timm's, at the convs and norms."""

    def features(block, x):
        nodes = [name for name, _ in block.named_modules() if name.startswith(('conv', 'bn', 'se.fc')) or name == 'se']
        with torch.no_grad():
            return create_feature_extractor(block, nodes)(x)

    assert_pair(features, build(cls, 'stride').eval())


@both_blocks
def test_timms_feature_extractor_keeps_its_features(cls):
    name = 'senetv2_resnet18' if cls is blocks.SaEBasicBlock else 'senetv2_resnet50'
    layers = [2, 1, 1, 1]
    model = timm.create_model(name, layers=layers, num_classes=5).double().eval()
    randomize_norms(model)
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if type(m) is cls:
            m.__class__ = BLOCKS[cls]
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    norm = f'layer1.0.{"bn2" if cls is blocks.SaEBasicBlock else "bn3"}'
    with torch.no_grad():
        from timm.models._features_fx import create_feature_extractor as timms

        found = [timms(m, [norm, 'layer2.0', 'layer4.0'])(x) for m in (model, twin)]
    for ours, theirs in zip(*(f.values() if isinstance(f, dict) else f for f in found), strict=True):
        assert torch.equal(ours, theirs)


@both_blocks
def test_torchscript(cls, tails):
    """Scripting leaves the block as it was."""

    def script(block, x):
        scripted = torch.jit.script(block)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        with torch.no_grad():
            loaded = torch.jit.load(buffer).eval()(x)
        return [loaded, *run(scripted.train(), x).values()]

    block = build(cls, 'stride').eval()
    assert_pair(script, block)
    torch.jit.script(block)
    with torch.no_grad():
        block(images())
    assert type(block) is cls and tails == [block]


@pytest.mark.filterwarnings('error::torch.jit.TracerWarning')
@both_blocks
def test_torchscript_trace(cls):
    def trace(block, x):
        with torch.no_grad():
            traced = torch.jit.trace(block, x)
            ops = [n.kind() for n in traced.inlined_graph.nodes()]
            return [traced(torch.cat([x, x])), torch.tensor(len(ops)), torch.tensor([hash(op) for op in ops])]

    assert_pair(trace, build(cls, 'stride').eval())


@pytest.mark.parametrize('mode', ['real', 'fake', 'symbolic'])
@both_blocks
def test_make_fx_graph_is_timms(cls, mode):
    block = build(cls, 'stride').eval()
    x = images()
    with torch.no_grad():
        ours, theirs = (make_fx(b, tracing_mode=mode, _allow_non_fake_inputs=True)(x) for b in (block, twin_of(block)))
        assert torch.equal(ours(x), theirs(x))
    assert targets(ours.graph) == targets(theirs.graph)


@pytest.mark.parametrize('strict', [False, True], ids=['non-strict', 'strict'])
@both_modes
@both_blocks
def test_exported_graph_is_timms(cls, training, strict):
    block = build(cls, 'stride').train(training)
    x, more = images(), images(5)
    dynamic = ({0: torch.export.Dim('batch', min=2, max=8)},)
    ours, theirs = (
        torch.export.export(b, (x,), dynamic_shapes=dynamic, strict=strict) for b in (block, twin_of(block))
    )
    assert targets(ours.graph) == targets(theirs.graph)
    assert torch.equal(ours.module()(more), theirs.module()(more))


# ---- function transforms and derivatives


def loss(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x).square().sum()


def state_of(block: nn.Module) -> tuple[dict, dict]:
    return dict(block.named_parameters()), {name: b.clone() for name, b in block.named_buffers()}


def of_parameters(block: nn.Module, x: torch.Tensor) -> tuple[dict, Callable[[dict], torch.Tensor]]:
    parameters, buffers = state_of(block)
    some = {k: v.detach() for k, v in parameters.items() if k in ('se.fc1.bias', last(block, 'bn') + '.bias')}
    return (
        some,
        lambda some: (
            functional_call(block, (parameters | some, {k: b.clone() for k, b in buffers.items()}), (x,)).square().sum()
        ),
    )


def linearized(block, x):
    out, push = linearize(block.requires_grad_(False), x)  # torch cannot fold parameters with gradients
    return [out, push(x), push(x * 2)]


def ensemble(block, x):
    parameters, buffers = stack_module_state([block, copy.deepcopy(block)])
    return vmap(lambda p, b: functional_call(block, (p, b), (x,)))(parameters, buffers).detach()


def ensemble_gradients(block, x):
    parameters, buffers = stack_module_state([block, copy.deepcopy(block)])
    return vmap(grad(lambda p, b: functional_call(block, (p, b), (x,)).square().sum()))(parameters, buffers)


def of_each_parameter(transform: Callable) -> Callable:
    def apply(block, x):
        some, function = of_parameters(block, x)
        return transform(function)(some)

    return apply


TRANSFORMS = {
    'vmap': lambda b, x: vmap(b)(torch.stack([x, x * 2])),
    'grad': lambda b, x: grad(partial(loss, b))(x),
    'jvp': lambda b, x: list(jvp(b, (x,), (x + 1,))),
    'vjp': lambda b, x: torch.func.vjp(b, x)[1](torch.ones_like(b(x))),
    'jacrev': of_each_parameter(jacrev),
    'jacfwd': of_each_parameter(jacfwd),
    'hessian': of_each_parameter(hessian),
    'jvp of grad': lambda b, x: list(jvp(grad(partial(loss, b)), (x,), (x + 1,))),
    'grad of jvp': lambda b, x: grad(lambda x: jvp(partial(loss, b), (x,), (x + 1,))[1])(x),
    'grad of grad': lambda b, x: grad(lambda x: grad(partial(loss, b))(x).square().sum())(x),
    'vmap of grad': lambda b, x: vmap(grad(partial(loss, b)))(torch.stack([x, x * 2])),
    'vmap of jvp': lambda b, x: vmap(lambda t: jvp(b, (x,), (t,))[1])(torch.stack([x, x * 2])),
    'linearize': linearized,
    'functional_call': lambda b, x: functional_call(b, {k: v * 2 for k, v in b.named_parameters()}, (x,)).detach(),
    'functionalize': lambda b, x: torch.func.functionalize(b)(x),
    'ensemble': ensemble,
    'gradients of an ensemble': ensemble_gradients,
}
_NOT_IN_TRAINING = {
    'vmap', 'vmap of grad',  # statistics that are not batched cannot be updated
}  # fmt: skip


@pytest.mark.parametrize(
    'name, context',
    [
        # it traces a graph, which takes longer than all other transforms together
        pytest.param(
            name,
            context,
            marks=[pytest.mark.slow] if (name, mode) == ('linearize', 'no_grad') else [],
            id=f'{name}-{mode}',
        )
        for name in TRANSFORMS
        for mode, context in (('no_grad', torch.no_grad), ('grad', torch.enable_grad))
    ],
)
@both_modes
@both_blocks
def test_function_transforms(cls, name, training, context):
    def transform(block, x):
        with context():
            needs_no_buffers = not training or name.endswith('ensemble') or name.startswith(('jac', 'hess'))
            return detached(TRANSFORMS[name](block if needs_no_buffers else Stateless(block), x))

    block = build(cls, 'stride' if training else 'everything').train(training)
    # these also call the block as it is, so the tail may be fused
    exact = {} if name not in ('functional_call', 'linearize', 'vjp') else dict(rtol=1e-10, atol=1e-10)
    got, want = (result_of(transform, b, images(2).fill_(0.1) + SEEDED[:2]) for b in (block, twin_of(block)))
    assert isinstance(want, type) == (training and name in _NOT_IN_TRAINING), want
    if isinstance(want, type):
        assert got is want
    else:
        torch.testing.assert_close(got, want, **(exact or dict(rtol=0, atol=0)))


def detached(tree):
    return torch.utils._pytree.tree_map(lambda t: t.detach(), tree)


class Stateless(nn.Module):
    """A block in training whose buffers are new in every call: transforms forbid to write into those outside."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return functional_call(self.block, {k: b.clone() for k, b in self.block.named_buffers()}, (x,))


torch.manual_seed(0)
SEEDED = images()


@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad], ids=['no_grad', 'grad'])
@both_modes
@both_blocks
def test_forward_mode_derivative(cls, training, context):
    def derive(block, x):
        with context(), forward_ad.dual_level():
            dual = forward_ad.unpack_dual(block(forward_ad.make_dual(x, x + 1)))
            return [dual.primal.detach(), dual.tangent.detach()]

    assert_pair(derive, build(cls, 'stride').train(training))


@both_modes
@both_blocks
def test_backward_inside_forward_mode(cls, training):
    """Forward over reverse, by hand: a Hessian times a vector."""

    def derive(block, x):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
            (gradient,) = torch.autograd.grad(loss(block, dual), dual, create_graph=True)
            return [t.detach() for t in forward_ad.unpack_dual(gradient)]

    assert_pair(derive, build(cls, 'stride', act_layer=nn.SiLU).train(training))


@both_modes
@both_blocks
def test_double_backward(cls, training):
    """A gradient penalty differentiates through the backward pass."""

    def penalty(block, x):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(block, x), x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), [x, *block.parameters()], allow_unused=True))

    assert_pair(penalty, build(cls, 'stride', act_layer=nn.SiLU).train(training))


@both_modes
@both_blocks
def test_batched_backward(cls, training):
    """`is_grads_batched` runs vmap over a backward pass whose forward pass was an ordinary one."""

    def batched(block, x):
        out = block(x.requires_grad_())
        directions = torch.stack([torch.ones_like(out), out.detach()])
        return torch.autograd.grad(out, x, directions, is_grads_batched=True)[0]

    assert_pair(batched, build(cls, 'stride').train(training), rtol=1e-10, atol=1e-10)


# ---- those who watch operations


class Subclass(torch.Tensor):
    """Counts nothing, changes nothing: an ordinary subclass."""


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, '__name__', str(func)))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('mode', [Functions, Operations])
@both_blocks
def test_modes_see_timms_operations(cls, mode):
    def watch(block, x):
        with torch.no_grad(), mode() as watching:
            block(x)
        return watching.seen

    assert_pair_of_lists(watch, build(cls, 'stride').eval())


@both_blocks
def test_tensor_subclass_goes_through_timms(cls):
    def forward(block, x):
        with torch.no_grad():
            out = block(x.as_subclass(Subclass))
        assert type(out) is Subclass
        return out.as_subclass(torch.Tensor)

    assert_pair(forward, build(cls, 'stride').eval())


@both_blocks
def test_flop_counter_has_timms_table(cls):
    def count(block, x):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            block(x)
        table = {k.replace('SaE', ''): {str(op): n for op, n in v.items()} for k, v in counter.flop_counts.items()}
        assert any(last(block, 'conv') in name for name in table)
        return table

    assert_pair_of_lists(count, build(cls, 'stride').eval())


# ---- wrappers


@pytest.fixture(scope='module')
def one_process(tmp_path_factory) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp('gloo') / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('leaves', [(), ('conv', 'bn', 'se'), ('se',), ('se.fc1', 'se.fc2')], ids=str)
@both_blocks
def test_fsdp2(cls, leaves, one_process):
    from torch.distributed.device_mesh import init_device_mesh

    fully_shard = getattr(torch.distributed.fsdp, 'fully_shard', None)
    if fully_shard is None:
        pytest.skip('this torch has no public FSDP2')

    def shard(block, x):
        mesh = init_device_mesh('cpu', (1,))
        for leaf in leaves:
            fully_shard(part(block, last(block, leaf) if leaf in ('conv', 'bn') else leaf), mesh=mesh)
        fully_shard(block, mesh=mesh)
        with torch.no_grad():
            without = block.eval()(x)
        out = block.train()(x)
        out.sum().backward()
        return [without, out.detach(), *(p.grad.full_tensor() for p in block.parameters())]

    assert_pair(shard, build(cls, 'stride'), rtol=1e-10, atol=1e-10)


@both_blocks
def test_ddp(cls, one_process):
    def wrap(block, x):
        found = run(block, x, nn.parallel.DistributedDataParallel(block.train()))
        return list(found.values())

    assert_pair(wrap, build(cls, 'stride'))


@both_blocks
def test_accelerates_offload(cls):
    accelerate = pytest.importorskip('accelerate')

    def offload(block, x):
        accelerate.cpu_offload(block, execution_device=torch.device('cpu'))
        with torch.no_grad():
            return block(x)

    assert_pair(offload, build(cls, 'stride').eval())


@pytest.mark.parametrize('reentrant', [False, True])
@both_blocks
def test_gradient_checkpointing(cls, reentrant):
    def train(block, x):
        return list(run(block.train(), x, partial(checkpoint, block, use_reentrant=reentrant)).values())

    block = build(cls, 'everything')
    assert_pair(train, block)
    got = run(block.train(), images(), partial(checkpoint, block, use_reentrant=reentrant))
    assert set(got) >= {'x', 'se.fc1.weight'}


@both_blocks
def test_ema(cls):
    def average(block, x):
        ema = ModelEmaV3(block, decay=0.5)
        for p in block.parameters():
            p.data.add_(1)
        ema.update(block)
        with torch.no_grad():
            return ema(x)

    assert_pair(average, build(cls, 'stride').eval(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=['deepcopy', 'pickle'])
@both_blocks
def test_hooked_block_that_was_copied(cls, copied):
    def keep(block, x):
        part(block, last(block, 'bn')).register_forward_hook(doubled)
        with torch.no_grad():
            return copied(block)(x)

    assert_pair(keep, build(cls, 'stride').eval())


def doubled(module, args, out):
    return out * 2


# ---- any input


@pytest.mark.parametrize('n', [0, 1, 16])
@pytest.mark.parametrize('size', [1, 2])
@both_blocks
def test_any_batch_and_image_size(cls, n, size):
    """Where the weight of the last conv is no smaller than its output, the early squeeze spares nothing."""
    block = build(cls).eval()
    x = images(n, size=size)
    with torch.no_grad():
        torch.testing.assert_close(block(x), twin_of(block)(x), rtol=1e-10, atol=1e-10)


@both_blocks
def test_training_on_one_value_a_channel_raises_as_timm_does(cls):
    block = build(cls).train()
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        block(images(1, size=1))


@both_blocks
def test_other_attention_is_refused(cls):
    with pytest.raises(ValueError, match=f'attn_layer of {cls.__name__} must build a SqueezeAggregatedExcitation'):
        cls(WIDTH, WIDTH // cls.expansion, attn_layer='eca')
    assert isinstance(cls(WIDTH, WIDTH // cls.expansion, attn_layer=SAE).se, SqueezeAggregatedExcitation)


# ---- reparameterize


@pytest.mark.parametrize('case', CASES)
@both_blocks
def test_reparameterized_block_equals_the_block_in_eval(cls, case, tails):
    block = build(cls, case)
    x = images()
    with torch.no_grad():
        want = twin_of(block.eval())(x)
        merged = reparameterize_model(nn.Sequential(block.train())).eval()  # timm's validate.py calls it when training
        assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
        assert any(isinstance(m, nn.BatchNorm2d) for m in block.modules()), 'timm works on a copy'
        torch.testing.assert_close(merged(x), want, rtol=1e-10, atol=1e-10)
        assert tails == [merged[0]]
        again = reparameterize_model(merged)
        torch.testing.assert_close(again(x), want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.jit.script(merged)(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('tamper', ['subclasses', 'hook', 'pruning'])
def test_reparameterize_leaves_what_it_cannot_fold(tamper):
    block = build(blocks.SaEBottleneck).eval()
    if tamper == 'subclasses':
        block.bn1 = ActNorm(PLANES).double().eval()
        block.conv2 = NoisyConv(PLANES, PLANES, 3, padding=1).double()
    elif tamper == 'hook':
        block.bn1.register_forward_hook(doubled)
        block.conv2.register_forward_hook(doubled)
    else:
        with torch.no_grad():  # else timm cannot copy it
            prune.l1_unstructured(block.conv1, 'weight', 0.5)
            prune.l1_unstructured(block.conv2, 'weight', 0.5)
    x = images()
    merged = reparameterize_model(nn.Sequential(block))
    with torch.no_grad():
        torch.testing.assert_close(merged(x), twin_of(block)(x), rtol=1e-10, atol=1e-10)
    assert type(merged[0].bn1) is type(block.bn1) and isinstance(merged[0].bn2, nn.BatchNorm2d)
    assert isinstance(merged[0].bn3, nn.Identity)


@pytest.mark.parametrize('name', ['senetv2_resnet18', 'senextv2_26t_32x4d', 'seanet20'])
def test_reparameterized_model_has_equal_logits(name):
    """All norms but those of the stem, which no block holds."""
    model = randomize_norms(timm.create_model(name, num_classes=10)).double().eval()
    merged = reparameterize_model(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        got, want = merged(x), model(x)
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()
    left = [name for name, m in merged.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(name.startswith(('conv1', 'bn1')) for name in left)


# ---- the whole network


def test_model_equals_timms_trunk_in_every_mode(tails):
    """Eval with and without autograd, features, gradient checkpointing, training."""
    ours = randomize_norms(timm.create_model('senetv2_resnet50', num_classes=10, layers=(2, 1, 2, 1))).double()
    theirs = copy.deepcopy(ours)
    for m in theirs.modules():
        if isinstance(m, blocks.SaEBottleneck):
            m.__class__ = BLOCKS[blocks.SaEBottleneck]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def check(got, want):
        for a, b in zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]:
            assert (a - b).abs().max() <= 1e-9 * b.abs().max()

    ours.eval(), theirs.eval()
    check(ours(x), theirs(x))
    assert not tails
    with torch.inference_mode():
        check(ours(x), theirs(x))
        assert len(tails) == 6
        check(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1])

    ours.train(), theirs.train()
    ours.set_grad_checkpointing()
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
