"""The fused tails: that they run, that training with them is timm's, and that they are never less exact than timm."""

import itertools
import math
import shutil
import statistics
from functools import partial

import pytest
import torch
from block_pairs import (
    BLOCKS,
    SAE,
    WIDTH,
    assert_same,
    both_blocks,
    both_modes,
    build,
    images,
    last,
    run,
    twin_of,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from timm_senetv2.models import blocks, fused


class Graphs:
    """A backend for torch.compile that keeps the graphs and runs them as they are, or with `inner`."""

    def __init__(self, inner: str = 'eager') -> None:
        self.seen, self.inner = [], torch._dynamo.lookup_backend(inner)

    def __call__(self, graph, inputs, **kwargs):
        self.seen.append([n.target for n in graph.graph.nodes if n.op in ('call_function', 'call_method')])
        return self.inner(graph, inputs, **kwargs)


def norms_in(targets: list) -> int:
    return targets.count(torch.nn.functional.batch_norm)


def compiled(block: nn.Module, backend='aot_eager', **kwargs):
    return torch.compile(block, fullgraph=True, backend=backend, **kwargs)


# ---- where it runs


@both_blocks
def test_eager_inference_is_fused_where_it_pays(cls, tails):
    block = build(cls, dtype=torch.float32).eval()
    size = math.isqrt(fused._WORTHWHILE // WIDTH // 2) + 1
    x = images(2, torch.float32, size)
    assert x.numel() >= fused._WORTHWHILE
    with torch.no_grad():
        block(x[:1])
        assert not tails
        block(x)
        assert tails == [block]
        block.train()(x)
    block.eval()(x)
    assert tails == [block]


@both_modes
@both_blocks
def test_compiled_graph_is_fused(cls, training):
    """Without a break, and without the last norm as an operation of its own."""
    block = build(cls, 'everything').train(training)
    ours, theirs = Graphs(), Graphs()
    x = images()
    compiled(block, ours)(x), compiled(twin_of(block), theirs)(x)
    assert len(ours.seen) == len(theirs.seen) == 1
    assert norms_in(ours.seen[0]) == norms_in(theirs.seen[0]) - 1
    assert (torch.var_mean in ours.seen[0]) == training


@pytest.mark.parametrize('name', ['conv', 'bn', 'se', 'drop_path'])
@both_blocks
def test_hooked_parts_are_compiled_as_timms(cls, name):
    block = build(cls, 'drop path').eval()
    name = last(block, name) if name in ('conv', 'bn') else name
    block.get_submodule(name).register_forward_hook(lambda module, args, out: out * 2)
    ours, theirs = Graphs(), Graphs()
    x = images()
    assert torch.equal(compiled(block, ours)(x), compiled(twin_of(block), theirs)(x))
    assert ours.seen == theirs.seen


@both_blocks
def test_global_hooks_are_called_while_compiled_as_in_timms(cls):
    block = build(cls, 'stride').eval()
    calls = {}
    for b in block, twin_of(block):
        seen = calls[b] = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(1))  # noqa: B023
        try:
            torch.compile(b, backend='eager')(images())
        finally:
            handle.remove()
    ours, theirs = calls.values()
    assert len(ours) == len(theirs) > 0


# ---- compiled, the same as timm's


def two_steps(block: nn.Module, forward=None, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Output and gradients of the second of two steps, and the buffers after both."""
    torch.manual_seed(3)
    x = images(4, dtype)
    run(block, x, forward)
    return run(block, x * 2 + 1, forward)


CHANGES = {
    'as built': lambda b: None,
    'frozen last norm': lambda b: getattr(b, last(b, 'bn')).eval(),
    'eval': lambda b: b.eval(),
    'momentum 0': lambda b: [setattr(m, 'momentum', 0.0) for m in b.modules() if hasattr(m, 'momentum')],
    'momentum 1': lambda b: [setattr(m, 'momentum', 1.0) for m in b.modules() if hasattr(m, 'momentum')],
    'no counter': lambda b: setattr(getattr(b, last(b, 'bn')), 'num_batches_tracked', None),
    'identity norm': lambda b: setattr(b, last(b, 'bn'), nn.Identity()),
    'group norm': lambda b: setattr(b, last(b, 'bn'), nn.GroupNorm(4, WIDTH).double()),
}


# Both blocks have one tail, which all changes are about: by default each change is of one of the two
@pytest.mark.parametrize(
    'cls, change',
    [
        pytest.param(cls, change, marks=pytest.mark.slow if (i + k) % 2 and i else ())
        for i, change in enumerate(CHANGES)
        for k, cls in enumerate(BLOCKS)
    ],
)
def test_compiled_training_equals_timms(cls, change):
    """Outputs, every gradient, and the norms' statistics and counters after two steps."""
    block = build(cls, 'everything' if change == 'as built' else 'identity shortcut').train()
    CHANGES[change](block)
    twin = twin_of(block)
    assert_same(two_steps(block, compiled(block)), two_steps(twin))


@pytest.mark.parametrize('case', ['pooled shortcut', 'anti-aliasing', 'add_identity'])
@both_blocks
def test_compiled_training_of_other_blocks_equals_timms(cls, case):
    block = build(cls, case).train()
    twin = twin_of(block)
    assert_same(two_steps(block, compiled(block)), two_steps(twin))


@both_blocks
def test_compiled_gradient_checkpointing(cls):
    block = build(cls, 'stride').train()
    twin = twin_of(block)
    forwards = [  # compiled both: eagerly, a norm that is recomputed updates its statistics twice
        torch.compile(partial(checkpoint, b, use_reentrant=False), fullgraph=True, backend='aot_eager')
        for b in (block, twin)
    ]
    assert_same(two_steps(block, forwards[0]), two_steps(twin, forwards[1]))


@both_blocks
def test_compiled_training_with_a_dynamic_batch_compiles_once(cls):
    block = build(cls, 'stride').train()
    twin, counter = twin_of(block), CompileCounter()
    forward = compiled(block, counter, dynamic=True)
    for n in 2, 3, 5, 8:
        x = images(n)
        assert_same(run(block, x, forward), run(twin, x))
    assert counter.frame_count == 1


@both_blocks
def test_compiled_training_on_one_value_a_channel_is_refused_as_by_timm(cls):
    block = build(cls).train()
    setattr(block, 'conv1' if cls is blocks.SaEBasicBlock else 'conv2', nn.Identity())
    for m in (block.bn1, getattr(block, 'bn2', None)):
        if m is not getattr(block, last(block, 'bn')):
            m.eval()  # so that the last norm is the one to refuse
    errors = []
    for b in block, twin_of(block):
        with pytest.raises(Exception, match='Expected more than 1 value per channel when training') as e:
            torch.compile(b, backend='eager')(images(1, size=1))
        errors.append(e.type)
    assert errors[0] is errors[1]


@both_blocks
def test_compiled_training_on_an_empty_batch(cls):
    block = build(cls).train()
    twin = twin_of(block)
    x = images(0)
    with torch.no_grad():
        assert torch.compile(block, backend='eager')(x).shape == twin(x).shape
    for (name, ours), theirs in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)


@pytest.mark.skipif(shutil.which('c++') is None, reason="torch's inductor compiles C++ and needs a compiler")
def test_inductor():
    block = build(blocks.SaEBottleneck, 'stride').train()
    twin = twin_of(block)
    assert_same(two_steps(block, torch.compile(block, fullgraph=True)), two_steps(twin))


# ---- never less exact than timm

RATIOS, VARIANCES, SEEDS = (0, 1, 10, 100, 1000), (1e-6, 1e-3, 1), range(6)
PRECISIONS = {
    'float32': (torch.float32, False),
    'bfloat16': (torch.bfloat16, False),
    'float16': (torch.float16, False),
    'autocast': (torch.float32, True),
}


def set_norm(block: nn.Module, ratio: float, variance: float) -> None:
    """New weights, with which the last norm's input has this variance, and a mean of `ratio` standard deviations."""
    conv, norm = getattr(block, last(block, 'conv')), getattr(block, last(block, 'bn'))
    before = block.bn1 if last(block, 'bn') == 'bn2' else block.bn2
    for m in block.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.bias)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
            m.num_batches_tracked.zero_()
    with torch.no_grad():
        before.weight[0], before.bias[0] = 0, 1  # a channel of ones, whose weight in the conv is the mean
        std = variance**0.5
        mean = ratio * std * (1 + 0.5 * torch.rand(conv.out_channels))
        conv.weight.mul_(std)
        centre = conv.kernel_size[0] // 2
        conv.weight[:, 0] = 0
        conv.weight[:, 0, centre, centre] = mean / block.act1(torch.ones(()))
        norm.running_mean.copy_(mean)
        norm.running_var.fill_(variance)


def exactness_pair(cls, precision: str):
    dtype, autocast = PRECISIONS[precision]
    # with ReLU an element that rounds to the other side of zero would outweigh all other errors
    block = build(cls, dtype=dtype, act_layer=nn.SiLU, attn_layer=partial(SAE, act_layer=nn.SiLU))
    context = partial(torch.autocast, 'cpu', torch.bfloat16, enabled=autocast)
    return block, twin_of(block), twin_of(block).double(), context


def inference(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {'out': block(x)}


def trained(forward, block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    block.zero_grad()
    out = forward(x)
    direction = torch.linspace(-1, 2, out.numel()).view(out.shape).to(out.dtype)
    (out * direction).sum().backward()
    return {'out': out.detach(), 'x': x.grad} | {n: p.grad.clone() for n, p in block.named_parameters()}


def assert_never_less_exact(cls, precision, run_ours, run_timms, training):
    """RMS errors against float64 are at most 1.25 times timm's, or one unit of rounding of the result.

    The same rounding in another order gives one RMS of a few elements twice another. So the ratios of many blocks are
    averaged, as logarithms, for each tensor and ratio of mean to deviation, and 1.25 has to be exceeded by more than
    twice the standard error of that average; over all ratios of mean to deviation, by anything.
    """
    ours, timms, reference, context = exactness_pair(cls, precision)
    for b in ours, timms, reference:
        b.train(training)
    dtype = PRECISIONS[precision][0]
    unit = torch.finfo(torch.bfloat16 if precision == 'autocast' else dtype).eps / 2
    logs: dict[str, dict[float, list[float]]] = {}
    for ratio, variance, seed in itertools.product(RATIOS, VARIANCES, SEEDS):
        torch.manual_seed(seed)
        set_norm(ours, ratio, variance)
        for b in timms, reference:
            b.load_state_dict(ours.state_dict())
        x = images(4, dtype)
        with context():
            got, theirs = run_ours(ours, x), run_timms(timms, x)
        want = run_timms(reference, x.double())
        for name in want:
            largest = theirs[name].abs().max()
            if largest.isfinite():
                if largest < torch.finfo(dtype).max / 8:  # else another order of adding up may overflow
                    assert got[name].isfinite().all(), f'{name} at ratio {ratio}, variance {variance}'
                error, allowed, size = (
                    t.double().square().mean().sqrt().item()
                    for t in (got[name] - want[name], theirs[name] - want[name], want[name])
                )
                if math.isfinite(error):
                    times = max(error, unit * size) / max(allowed, unit * size)
                    logs.setdefault(name, {}).setdefault(ratio, []).append(math.log(times))
    too_large = []
    for name, of_ratios in logs.items():
        for ratio, values in of_ratios.items():
            error = statistics.stdev(values) / len(values) ** 0.5
            if statistics.mean(values) - 2 * error > math.log(1.25):
                too_large.append(f'{name}, ratio {ratio}: {math.exp(statistics.mean(values)):.2f}')
        mean = statistics.mean(itertools.chain(*of_ratios.values()))
        if mean > math.log(1.25):
            too_large.append(f'{name}: {math.exp(mean):.2f}')
    assert not too_large, '\n'.join(too_large)


@pytest.mark.parametrize('precision', PRECISIONS)
@both_blocks
def test_eager_inference_is_never_less_exact_than_timms(cls, precision, monkeypatch):
    monkeypatch.setattr(fused, '_WORTHWHILE', 0)
    assert_never_less_exact(cls, precision, inference, inference, training=False)


# each block and mode by default, and each dtype of the weights; all combinations take a minute more
COMPILED_BY_DEFAULT = {
    ('float32', blocks.SaEBottleneck, True),
    ('bfloat16', blocks.SaEBasicBlock, True),
    ('float16', blocks.SaEBottleneck, False),
}


@pytest.mark.parametrize(
    'precision, cls, training',
    [
        pytest.param(*case, marks=() if case in COMPILED_BY_DEFAULT else pytest.mark.slow)
        for case in itertools.product(PRECISIONS, (blocks.SaEBasicBlock, blocks.SaEBottleneck), (False, True))
    ],
)
def test_compiled_training_is_never_less_exact_than_timms(cls, precision, training):
    """Both compiled: with the compiler's own formulas for batch norm, but run step by step."""
    forwards = {}

    def run(block, x):
        if block not in forwards:
            forwards[block] = compiled(block, 'aot_eager_decomp_partition')
        return trained(forwards[block] if x.dtype != torch.float64 else block, block, x)

    assert_never_less_exact(cls, precision, run, run, training)
