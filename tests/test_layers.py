"""The two layers against the papers' formulas, and in every way torch can run them."""

import copy
import io
import shutil
from functools import partial

import onnxruntime
import pytest
import torch
from timm.layers import SEModule
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from timm_senetv2.layers import ChannelAggregation, SqueezeAggregatedExcitation

LAYERS = {
    'sae': lambda **kw: SqueezeAggregatedExcitation(16, reduction=4, cardinality=2, **kw),
    'sae_add_identity': lambda **kw: SqueezeAggregatedExcitation(16, reduction=4, add_identity=True, **kw),
    'se': lambda **kw: SqueezeAggregatedExcitation(16, reduction=4, cardinality=1, **kw),
    'sum': lambda **kw: ChannelAggregation(4, 'sum'),
    'mean': lambda **kw: ChannelAggregation(4, 'mean'),
    'max': lambda **kw: ChannelAggregation(4, 'max'),
}
both_layers = pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS)


def image(n: int = 2, **kwargs) -> torch.Tensor:
    return torch.randn(n, 16, 5, 7, **kwargs)


# ---- against an independent computation


def paper_sae(x, branch_weights, branch_biases, out_weight, out_bias, add_identity=False):
    """SaE as the paper draws it: separate branches, a concatenation, a dense layer, in loops and einsum."""
    z = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    branches = []
    for w, b in zip(branch_weights, branch_biases, strict=True):
        branches.append(torch.clamp(torch.einsum('dc,nc->nd', w, z) + b, min=0))
    s = 1 / (1 + torch.exp(-(torch.einsum('ch,nh->nc', out_weight, torch.cat(branches, 1)) + out_bias)))
    scaled = torch.einsum('nchw,nc->nchw', x, s)
    return x + scaled if add_identity else scaled


@pytest.mark.parametrize('add_identity', [False, True])
@pytest.mark.parametrize('cardinality', [1, 2, 4])
def test_sae_equals_separate_branches_forward_and_gradients(cardinality, add_identity):
    c, d = 12, 3
    tensors = dict(
        branch_weights=[torch.randn(d, c, dtype=torch.float64) for _ in range(cardinality)],
        branch_biases=[torch.randn(d, dtype=torch.float64) for _ in range(cardinality)],
        out_weight=torch.randn(c, cardinality * d, dtype=torch.float64),
        out_bias=torch.randn(c, dtype=torch.float64),
    )
    layer = SqueezeAggregatedExcitation.from_branches(**tensors, add_identity=add_identity)
    leaves = [*tensors['branch_weights'], *tensors['branch_biases'], tensors['out_weight'], tensors['out_bias']]
    x = torch.randn(3, c, 4, 5, dtype=torch.float64, requires_grad=True)
    for leaf in leaves:
        leaf.requires_grad_()
    expected = paper_sae(x, **tensors, add_identity=add_identity)
    direction = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [x, *leaves], direction)

    actual = layer(x)
    (actual * direction).sum().backward(inputs=[x, *layer.parameters()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, expected_grads[0], rtol=0, atol=1e-10)
    grad_w, grad_b = expected_grads[1 : cardinality + 1], expected_grads[cardinality + 1 : -2]
    torch.testing.assert_close(layer.fc1.weight.grad, torch.cat(grad_w), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.fc1.bias.grad, torch.cat(grad_b), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.fc2.weight.grad, expected_grads[-2], rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.fc2.bias.grad, expected_grads[-1], rtol=0, atol=1e-10)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('factor', [1, 2, 4, 16])
@pytest.mark.parametrize('op', ['sum', 'mean', 'max'])
def test_aggregation_equals_a_loop_over_groups_forward_and_gradients(op, factor, memory_format):
    x = image(dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    channels = []
    for group in range(16 // factor):
        members = [x[:, group * factor + i] for i in range(factor)]
        channels.append(max_of(members) if op == 'max' else sum(members) / (factor if op == 'mean' else 1))
    expected = torch.stack(channels, 1)
    direction = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, direction)

    actual = ChannelAggregation(factor, op)(x)
    (actual_grad,) = torch.autograd.grad(actual, x, direction)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=0, atol=1e-12)
    if op != 'max' and factor in (2, 4):
        assert actual_grad.is_contiguous(memory_format=memory_format)


# Groups that are added up one after the other, by an expression that torch differentiates itself
def groups_in_a_loop(x, factor, op):
    members = x.unflatten(1, (-1, factor)).unbind(2)
    out = members[0]
    for member in members[1:]:
        out = torch.maximum(out, member) if op == 'max' else out + member
    return out / factor if op == 'mean' else out


@pytest.mark.parametrize('factor', [1, 4])
@pytest.mark.parametrize('op', ['sum', 'mean', 'max'])
@pytest.mark.filterwarnings('ignore:Attempted to insert a get_attr Node:UserWarning')  # torch.func.linearize
def test_transforms_of_aggregation_equal_those_of_a_loop(op, factor):
    """Forward over reverse, reverse over reverse, linearize, vmap and dual numbers."""

    def energies(aggregate):  # curved, so that second derivatives are not zero
        def energy(x):
            return (aggregate(x).sin() * torch.arange(x.shape[1] // factor).add(1.0)[:, None, None]).sum()

        return energy

    layer = ChannelAggregation(factor, op)
    x, v = torch.randn(2, 2, 8, 2, 3, dtype=torch.float64)

    def results(aggregate):
        energy = energies(aggregate)
        out, jvp = torch.func.linearize(aggregate, x)
        yield from (out, jvp(v))
        yield from torch.func.jvp(torch.func.grad(energy), (x,), (v,))
        yield torch.func.hessian(energy)(x)
        yield torch.func.jacrev(torch.func.jacrev(energy))(x)
        yield torch.vmap(torch.func.grad(energy))(torch.stack([x, v]))
        yield from torch.func.vjp(aggregate, x)[1](aggregate(v))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
            value = energy(dual)
            yield forward_ad.unpack_dual(value).tangent
            (gradient,) = torch.autograd.grad(value, dual)
            yield from forward_ad.unpack_dual(gradient)[:2]
        leaf = x.clone().requires_grad_()
        output = aggregate(leaf)
        eye = torch.eye(output.numel(), dtype=x.dtype).view(-1, *output.shape)
        yield torch.autograd.grad(output, leaf, eye, is_grads_batched=True)[0]

    actuals = list(results(layer))
    expecteds = list(results(partial(groups_in_a_loop, factor=factor, op=op)))
    assert len(actuals) == len(expecteds) == 12
    for actual, expected in zip(actuals, expecteds, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('op', ['sum', 'mean'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_aggregation_in_half_precision_is_rounded_once(dtype, op, grad):
    x = torch.randn(4, 64, 5, 5).to(dtype)
    exact = groups_in_a_loop(x.double(), 16, op)
    for layer in (ChannelAggregation(16, op), torch.fx.symbolic_trace(ChannelAggregation(16, op))):
        with torch.set_grad_enabled(grad):
            y = layer(x)
        assert y.dtype == dtype
        # half a unit in the last place, and sixteen roundings in float32
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + 16 * x.abs().max() * torch.finfo(torch.float32).eps
        assert ((y.double() - exact).abs() <= bound).all()


def test_mean_of_large_half_precision_values_does_not_overflow():
    x = torch.full((1, 4, 2, 2), 3e4, dtype=torch.float16)
    layer = ChannelAggregation(4, 'mean')
    for run in (layer, torch.no_grad()(layer), torch.fx.symbolic_trace(layer), torch.compile(layer, backend='eager')):
        assert (run(x) == 3e4).all()
    assert (torch.vmap(layer)(x[None]) == 3e4).all()


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('how', ['eager', 'fx', 'script'])
@pytest.mark.parametrize('factor', [1, 2, 4])
@pytest.mark.parametrize('op', ['sum', 'mean', 'max'])
@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
def test_output_of_aggregation_may_be_written_into(op, factor, how, grad):
    layer = ChannelAggregation(factor, op)
    layer = {'eager': layer, 'fx': torch.fx.symbolic_trace(layer), 'script': torch.jit.script(layer)}[how]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image(requires_grad=grad).to(memory_format=memory_format)
        before = x.detach().clone()
        with torch.set_grad_enabled(grad):
            y = layer(x)
            assert y.is_contiguous(memory_format=memory_format)
            y.zero_()
        assert torch.equal(x, before)


@pytest.mark.parametrize('op', ['sum', 'mean'])
def test_no_sum_that_others_hold_is_written_into(op):
    x = image()
    graph = torch.fx.symbolic_trace(ChannelAggregation(4, op))
    kept = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if isinstance(result, torch.Tensor):
                kept[node.name] = result, result.clone()
            return result

    with torch.no_grad():
        Keep(graph).run(x)
    assert sum(name.startswith('add') for name in kept) == 3
    for held, before in kept.values():
        assert torch.equal(held, before)

    seen = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.is_mutable)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Operations():
        ChannelAggregation(4, op)(x)
    assert len(seen) > 3 and not any(seen)


@both_layers
def test_other_derivatives(layer):
    """Second derivatives, forward mode, and vmap, numerically and against one image at a time."""
    layer = layer().double()
    x = torch.randn(2, 16, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, x, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(layer, x)
    images = torch.randn(3, 2, 16, 2, 2, dtype=torch.float64)
    got = torch.vmap(torch.func.grad(lambda x: layer(x).square().sum()))(images)
    for i, x in enumerate(images):
        torch.testing.assert_close(got[i], torch.func.grad(lambda x: layer(x).square().sum())(x))


def max_of(tensors):
    best = tensors[0]
    for t in tensors[1:]:
        best = torch.where(t > best, t, best)
    return best


def test_one_branch_is_timms_se_module():
    ours = SqueezeAggregatedExcitation(32, reduction=4, cardinality=1).double()
    theirs = SEModule(32, rd_channels=8).double()
    theirs.load_state_dict(
        {
            name: value[:, :, None, None] if name.endswith('weight') else value
            for name, value in ours.state_dict().items()
        }
    )
    x = torch.randn(2, 32, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_gate_and_scale_rebuild_the_output():
    for add_identity in (False, True):
        layer = SqueezeAggregatedExcitation(16, reduction=4, add_identity=add_identity).double()
        x = image(dtype=torch.float64)
        s = layer.gate(x.mean((2, 3)))
        assert s.shape == (2, 16)
        assert ((s > 0) & (s < 1)).all()
        torch.testing.assert_close(layer(x), x + x * s[..., None, None] if add_identity else x * s[..., None, None])
        torch.testing.assert_close(layer.scale(x.mean((2, 3))), 1 + s if add_identity else s)


@pytest.mark.parametrize(
    'gate_layer, function',
    [
        ('sigmoid', lambda v: 1 / (1 + (-v).exp())),
        ('hard_sigmoid', lambda v: ((v + 3) / 6).clamp(0, 1)),
        ('tanh', lambda v: (v.exp() - (-v).exp()) / (v.exp() + (-v).exp())),
        (nn.Softplus, lambda v: (1 + v.exp()).log()),
    ],
)
def test_gate_layer_is_applied_to_the_second_dense_layer(gate_layer, function):
    layer = SqueezeAggregatedExcitation(16, reduction=4, gate_layer=gate_layer, act_layer=nn.Tanh)
    z = torch.randn(3, 16)
    hidden = torch.tanh(z @ layer.fc1.weight.T + layer.fc1.bias)
    torch.testing.assert_close(layer.gate(z), function(hidden @ layer.fc2.weight.T + layer.fc2.bias))


# ---- sizes


@pytest.mark.parametrize('channels, reduction, cardinality', [(64, 32, 4), (2048, 32, 4), (256, 16, 1), (512, 8, 2)])
def test_parameter_count_is_the_papers_formula(channels, reduction, cardinality):
    layer = SqueezeAggregatedExcitation(channels, reduction, cardinality)
    expected = channels**2 * 2 * cardinality // reduction + channels * cardinality // reduction + channels
    assert sum(p.numel() for p in layer.parameters()) == expected


def test_paper_defaults_are_reduction_32_cardinality_4():
    layer = SqueezeAggregatedExcitation(256)
    assert layer.fc1.weight.shape == (32, 256)
    assert sum(p.numel() for p in layer.parameters()) == 256**2 // 4 + 256 * 9 // 8


def test_branch_has_at_least_one_channel():
    layer = SqueezeAggregatedExcitation(8, reduction=32, cardinality=4)
    assert layer.fc1.weight.shape == (4, 8)
    assert layer(torch.randn(1, 8, 2, 2)).shape == (1, 8, 2, 2)


def test_rd_channels_and_bias():
    layer = SqueezeAggregatedExcitation(16, cardinality=3, rd_channels=5, bias=False)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        'fc1.weight': (15, 16),
        'fc2.weight': (16, 15),
    }


def test_from_branches_without_biases():
    weights = [torch.randn(2, 6, dtype=torch.float64) for _ in range(3)]
    out_weight = torch.randn(6, 6, dtype=torch.float64)
    layer = SqueezeAggregatedExcitation.from_branches(weights, out_weight)
    assert layer.fc1.bias is None and layer.fc2.bias is None
    zeros = [torch.zeros(2, dtype=torch.float64)] * 3
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), paper_sae(x, weights, zeros, out_weight, torch.zeros(6, dtype=torch.float64)))


# ---- bad values


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(channels=0), 'channels must be a whole number of at least 1, got 0'),
        (dict(channels=-8), 'channels .* got -8'),
        (dict(channels=16, reduction=0), 'reduction .* got 0'),
        (dict(channels=16, reduction=2.5), 'reduction .* got 2.5'),
        (dict(channels=16, cardinality=-1), 'cardinality .* got -1'),
        (dict(channels=16, cardinality=True), 'cardinality .* got True'),
        (dict(channels=16, rd_channels=0), 'rd_channels .* got 0'),
        (dict(channels=16, gate_layer='softmax'), "gate_layer .* got 'softmax'"),
    ],
)
def test_sae_names_the_bad_argument_and_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SqueezeAggregatedExcitation(**kwargs)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(branch_weights=[]), r'branch_weights .* got shapes \[\]'),
        (dict(branch_weights=[torch.zeros(2, 6), torch.zeros(3, 6)]), r'branch_weights .*\(3, 6\)'),
        (dict(branch_weights=[torch.zeros(6)]), r'branch_weights .*\(6,\)'),
        (dict(out_weight=torch.zeros(4, 6)), r'out_weight must have shape \(6, 4\).* got \(4, 6\)'),
        (dict(branch_biases=None), 'branch_biases and out_bias must be given together'),
        (dict(out_bias=None), 'branch_biases and out_bias must be given together'),
        (dict(branch_biases=[torch.zeros(2)]), r'branch_biases must be 2 tensors of shape \(2,\)'),
        (dict(out_bias=torch.zeros(4)), r'out_bias must have shape \(6,\), got \(4,\)'),
    ],
)
def test_from_branches_names_the_bad_argument(kwargs, message):
    good = dict(
        branch_weights=[torch.zeros(2, 6)] * 2,
        out_weight=torch.zeros(6, 4),
        branch_biases=[torch.zeros(2)] * 2,
        out_bias=torch.zeros(6),
    )
    SqueezeAggregatedExcitation.from_branches(**good)
    with pytest.raises(ValueError, match=message):
        SqueezeAggregatedExcitation.from_branches(**dict(good, **kwargs))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(factor=0), 'factor must be a whole number of at least 1, got 0'),
        (dict(factor=-4), 'factor .* got -4'),
        (dict(factor=2.0), 'factor .* got 2.0'),
        (dict(op='median'), "op must be one of sum, mean, max, got 'median'"),
    ],
)
def test_aggregation_names_the_bad_argument_and_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ChannelAggregation(**kwargs)


def test_aggregation_names_channels_that_the_factor_does_not_divide():
    with pytest.raises(ValueError, match='factor must divide the number of channels, got factor 4 for 18 channels'):
        ChannelAggregation(4)(torch.zeros(1, 18, 2, 2))


# ---- every way to run them


@both_layers
def test_compile_fullgraph(layer):
    model, x = layer().double(), image(dtype=torch.float64).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x))
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(shutil.which('c++') is None, reason="torch's inductor compiles C++ and needs a compiler")
@pytest.mark.parametrize('layer', [LAYERS['sae'], LAYERS['sum']], ids=['sae', 'sum'])
def test_compile_with_inductor_keeps_values_and_memory_format(layer):
    model, x = layer().double(), image(dtype=torch.float64).to(memory_format=torch.channels_last)
    y = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(y, model(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


@both_layers
def test_export_with_a_dynamic_batch(layer):
    model = layer().double().eval()
    program = torch.export.export(
        model, (image(3, dtype=torch.float64),), dynamic_shapes=({0: torch.export.Dim('batch')},), strict=True
    )
    x = image(5, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), model(x))


def test_exported_mean_keeps_its_dimensions_for_xnnpack_takes_no_other():
    program = torch.export.export(LAYERS['sae']().eval(), (image(),)).run_decompositions()
    means = [node for node in program.graph.nodes if node.target is torch.ops.aten.mean.dim]
    assert [node.args[2:] for node in means] == [(True,)]


@both_layers
def test_fx(layer):
    model, x = layer().double(), image(dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    assert traced(image(5, dtype=torch.float64)).shape[0] == 5


@both_layers
@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
def test_torchscript(layer):
    model, x = layer().double(), image(dtype=torch.float64)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), model(x))


@both_layers
def test_onnx(layer, tmp_path):
    model = layer().eval()
    path = tmp_path / 'layer.onnx'
    dynamic = torch.__version__ >= '2.6'  # the exporter of 2.5 refuses a view whose sizes are not all known
    shapes = ({0: torch.export.Dim('batch')},) if dynamic else None
    torch.onnx.export(model, (image(3),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    x = image(5 if dynamic else 3)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), model(x).detach(), rtol=1e-4, atol=1e-5)


@both_layers
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(layer, dtype):
    model, x = layer(), image()
    with torch.autocast('cpu', dtype):
        y = model(x.to(dtype))  # what a conv under autocast would put out
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), model(x).float(), rtol=3e-2, atol=3e-2)


@both_layers
@pytest.mark.parametrize('how', ['eager', 'compile', 'export', 'fx', 'script'])
@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
def test_memory_format_is_kept(layer, how):
    model = layer().double().eval()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = image(dtype=torch.float64).to(memory_format=memory_format)
        run = {
            'eager': lambda: model,
            'compile': lambda: torch.compile(model, fullgraph=True, backend='aot_eager'),
            'export': lambda: torch.export.export(model, (x,), strict=True).module(),  # noqa: B023
            'fx': lambda: torch.fx.symbolic_trace(model),
            'script': lambda: torch.jit.script(model),
        }[how]()
        y = run(x)
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, model(x.contiguous()), check_stride=False)


@both_layers
def test_empty_batch(layer):
    model, x = layer(), image(0).requires_grad_()
    y = model(x)
    assert y.shape[0] == 0 and y.shape[2:] == (5, 7)
    y.sum().backward()
    assert x.grad.shape == x.shape


@both_layers
def test_meta_device(layer):
    y = layer(device='meta')(image(device='meta'))
    assert y.device.type == 'meta'
    assert y.shape[0] == 2 and y.shape[2:] == (5, 7)


def test_device_and_dtype_arguments_reach_the_parameters():
    layer = SqueezeAggregatedExcitation(16, device='meta', dtype=torch.float64)
    for parameter in layer.parameters():
        assert parameter.device.type == 'meta' and parameter.dtype == torch.float64


def test_repr_tells_the_sizes():
    assert '16, cardinality=4, rd_channels=2, add_identity=True' in repr(
        SqueezeAggregatedExcitation(16, 8, add_identity=True)
    )
    assert repr(ChannelAggregation(2, 'max')) == "ChannelAggregation(factor=2, op='max')"


# ---- SaE's faster ways, where nobody can see them


class PooledByMaximum(SqueezeAggregatedExcitation):
    def squeeze(self, x):
        return x.amax((2, 3))


@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad])
def test_overridden_squeeze_is_obeyed(context):
    layer = PooledByMaximum(16, reduction=4)
    x = image()
    with context():
        torch.testing.assert_close(layer(x), x * layer.gate(x.amax((2, 3)))[..., None, None])


@pytest.mark.parametrize('training', [False, True])
def test_forward_over_reverse(training):
    """A Hessian times a vector, by hand and by torch.func, against the numerical derivative of the gradient."""
    layer = SqueezeAggregatedExcitation(16, reduction=4).double().train(training)
    x, v = torch.randn(2, 2, 16, 3, 3, dtype=torch.float64)

    def gradient(x):
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    _, product = torch.func.jvp(gradient, (x,), (v,))
    numerical = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(product, numerical, rtol=1e-5, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), v)
        (by_hand,) = torch.autograd.grad(layer(dual).square().sum(), dual, create_graph=True)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(by_hand).tangent, product)


@pytest.mark.parametrize('bias', [True, False])
def test_one_row_of_many_channels(bias):
    """A product and a sum in place of the dense layers, unless somebody watches those."""
    layer = SqueezeAggregatedExcitation(1024, bias=bias)
    z = torch.randn(2, 1024)
    exact = copy.deepcopy(layer).double().gate(z.double())
    with torch.no_grad():
        rows = torch.cat([layer.gate(row) for row in z.split(1)])
        # float32 sums of 1024 and of 128 products, into a sigmoid whose slope is at most 1/4
        torch.testing.assert_close(rows.double(), exact, rtol=0, atol=1024 * torch.finfo(torch.float32).eps)
        seen = []
        layer.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
        layer.fc2.forward = lambda hidden: torch.zeros(len(hidden), 1024)
        assert torch.equal(layer.gate(z[:1]), torch.full((1, 1024), 0.5))
        assert len(seen) == 1
