"""Every path through the blocks against timm's plain block with the paper's layer as a step of its own."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import BlurPool2d, DropPath
from timm.models import reparameterize_model
from timm.models.resnet import BasicBlock, Bottleneck, downsample_avg, downsample_conv
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from timm_senetv2.layers import SqueezeAggregatedExcitation
from timm_senetv2.models import blocks
from timm_senetv2.models.blocks import SaEBasicBlock, SaEBottleneck

PLANES, WIDTH, SIZE = 8, 32, 6
SAE = partial(SqueezeAggregatedExcitation, reduction=4, cardinality=2)

CASES = {
    'identity shortcut': {},
    'stride': dict(stride=2, downsample=downsample_conv),
    'pooled shortcut': dict(stride=2, downsample=downsample_avg),
    'dilation': dict(dilation=2),
    'anti-aliasing': dict(stride=2, downsample=downsample_conv, aa_layer=BlurPool2d),
    'drop path': dict(drop_path=0.5),
    'add_identity': dict(attn_layer=partial(SAE, add_identity=True)),
}
BLOCKS = {SaEBasicBlock: BasicBlock, SaEBottleneck: Bottleneck}


class PaperSaE(nn.Module):
    """The paper's figure, written out: branches side by side, concatenated, then the excitation as a multiplication."""

    def __init__(self, sae: SqueezeAggregatedExcitation) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sae, z = self.sae, x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
        rows = sae.fc1.weight.split(sae.rd_channels), sae.fc1.bias.split(sae.rd_channels)
        hidden = torch.cat([(z @ w.T + b).clamp(min=0) for w, b in zip(*rows, strict=True)], 1)
        scaled = x * (hidden @ sae.fc2.weight.T + sae.fc2.bias).sigmoid().reshape(*x.shape[:2], 1, 1)
        return x + scaled if sae.add_identity else scaled


def build(cls: type[nn.Module], case: dict, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One of our blocks with norms that are not the identity."""
    args = dict(attn_layer=SAE) | case
    planes = PLANES if cls is SaEBottleneck else WIDTH
    if 'downsample' in args:
        args['downsample'] = args['downsample'](WIDTH, WIDTH, kernel_size=1, stride=args['stride'])
    if 'drop_path' in args:
        args['drop_path'] = DropPath(args['drop_path'])
    block = cls(WIDTH, planes, **args)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return block.to(dtype)


def timm_twin(block: nn.Module, layer: type[nn.Module] = PaperSaE) -> nn.Module:
    """timm's block with the same weights and the attention as a layer of its own."""
    twin = copy.deepcopy(block)
    twin.__class__ = BLOCKS[type(block)]
    twin.se = layer(twin.se)
    return twin


def images(n: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, WIDTH, SIZE, SIZE, dtype=dtype)


def run(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and the gradients of a fixed function of it, by parameter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # the same paths are dropped
    out = block(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = {name.replace('se.sae.', 'se.'): p.grad for name, p in block.named_parameters()}
    return {'out': out.detach(), 'x': x.grad, **grads}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1)
        assert error <= tolerance, f'{name}: {error:.1e}'


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('cls', BLOCKS)
def test_block_equals_timms_with_separate_attention(cls, case, training):
    """Values, gradients and running statistics. Float64 to 1e-10, float32 to 2e-4 of the largest element."""
    for dtype, tolerance in (torch.float64, 1e-10), (torch.float32, 2e-4):
        ours = build(cls, CASES[case], dtype).train(training)
        twin = timm_twin(ours)
        x = images(dtype=dtype)
        assert_same(run(ours, x), run(twin, x), tolerance)
        for ours_buffer, twin_buffer in zip(ours.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours_buffer, twin_buffer, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('cls', BLOCKS)
def test_inference_without_autograd_equals_timms(cls, case, context, memory_format):
    """Where a block may overwrite its own tensors; its input and the memory format stay as they were."""
    ours = build(cls, CASES[case]).eval()
    twin = timm_twin(ours)
    x = images().to(memory_format=memory_format)
    before = x.clone()
    with context():
        out, want = ours(x), twin(x)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, before)
    assert out.is_contiguous(memory_format=memory_format)


def squeezed_from(block: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes of the (N, C, H, W) tensors that the block takes channel means of."""
    with torch.profiler.profile(record_shapes=True) as profile, torch.no_grad():
        block(x)
    shapes = [tuple(e.input_shapes[0]) for e in profile.events() if e.name in ('aten::mean', 'aten::sum')]
    return [shape for shape in shapes if len(shape) == 4]


def test_bottleneck_squeezes_before_it_expands():
    block = build(SaEBottleneck, {}).eval()
    x = images()
    assert squeezed_from(block, x) == [(3, PLANES, SIZE, SIZE)]
    assert squeezed_from(block.train(), x) == [(3, WIDTH, SIZE, SIZE)]


def test_frozen_norm_in_a_training_block_squeezes_early():
    block = build(SaEBottleneck, {}).train()
    block.bn3.eval()
    x = images()
    assert squeezed_from(block, x) == [(3, PLANES, SIZE, SIZE)]
    assert_same(run(block, x), run(timm_twin(block), x), 1e-10)


class NoisyConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x.amax()


class ActNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    'replace',
    [
        lambda b: setattr(b, 'conv3', NoisyConv(PLANES, WIDTH, 1).double()),
        lambda b: setattr(b, 'conv3', nn.Conv2d(PLANES, WIDTH, 3, padding=1).double()),
        lambda b: setattr(b, 'bn3', ActNorm(WIDTH).double()),
        lambda b: setattr(b, 'bn3', nn.BatchNorm2d(WIDTH, track_running_stats=False).double()),
        lambda b: setattr(b, 'bn3', nn.GroupNorm(4, WIDTH).double()),
        lambda b: setattr(b, 'bn3', nn.InstanceNorm2d(WIDTH).double()),
    ],
    ids=['conv subclass', '3x3 conv', 'norm subclass', 'no running statistics', 'group norm', 'instance norm'],
)
def test_where_it_does_not_hold_the_plain_path_runs(replace):
    block = build(SaEBottleneck, {})
    replace(block)
    block.eval()
    x = images()
    assert squeezed_from(block, x) == [(3, WIDTH, SIZE, SIZE)]
    assert_same(run(block, x), run(timm_twin(block), x), 1e-10)


@pytest.mark.parametrize(
    'norm',
    [
        nn.BatchNorm2d(WIDTH, affine=False),
        nn.SyncBatchNorm(WIDTH),
        nn.Identity(),
    ],
    ids=['no affine parameters', 'sync', 'identity'],
)
def test_other_norms_it_holds_for(norm):
    block = build(SaEBottleneck, {})
    block.conv3 = nn.Conv2d(PLANES, WIDTH, 1, bias=True)  # as after reparameterize
    block.bn3 = norm
    block.double().eval()
    x = images()
    assert squeezed_from(block, x) == [(3, PLANES, SIZE, SIZE)]
    assert_same(run(block, x), run(timm_twin(block), x), 1e-10)


@pytest.mark.parametrize('n', [0, 1, 16])
def test_any_batch_size(n):
    """Where the weight of the last conv is no smaller than its output, there is nothing to spare."""
    block = build(SaEBottleneck, {}).eval()
    x = images(n)[:, :, :2, :2]
    assert squeezed_from(block, x) == [(n, PLANES if n == 16 else WIDTH, 2, 2)]
    torch.testing.assert_close(block(x), timm_twin(block)(x), rtol=1e-10, atol=1e-10)


def test_path_for_other_devices_gives_the_same(monkeypatch):
    """On a GPU norm and conv stay two steps and the scale writes a new tensor: run that path here."""
    block = build(SaEBottleneck, {}).eval()
    x = images()
    want = timm_twin(block)(x)
    monkeypatch.setattr(blocks, '_conv_norm', lambda x, conv, norm: norm(conv(x)))
    torch.testing.assert_close(block(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('hooked_part', [None, 0, 1, 'all'])
@pytest.mark.parametrize(
    'downsample',
    [
        downsample_conv(WIDTH, WIDTH, kernel_size=1, stride=2),
        downsample_conv(WIDTH, WIDTH, kernel_size=3, stride=2),
        downsample_avg(WIDTH, WIDTH, kernel_size=1, stride=2),
        nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, stride=2, groups=2), ActNorm(WIDTH)),
    ],
    ids=['conv', '3x3 conv', 'pool', 'norm subclass'],
)
@pytest.mark.parametrize('cls', BLOCKS)
def test_shortcuts_norm_in_inference(cls, downsample, hooked_part):
    block = build(cls, dict(stride=2, downsample=lambda *args, **kwargs: copy.deepcopy(downsample))).eval()
    twin, x, seen = timm_twin(block), images(), []
    for model in block, twin:
        if hooked_part is not None:
            module = model.downsample if hooked_part == 'all' else model.downsample[hooked_part]
            module.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with torch.inference_mode():
        torch.testing.assert_close(block(x), twin(x), rtol=1e-10, atol=1e-10)
    if seen:
        torch.testing.assert_close(*seen, rtol=1e-10, atol=1e-10)
    assert len(seen) == (0 if hooked_part is None else 2)


@pytest.mark.parametrize('name', ['conv3', 'bn3'])
def test_hooks_see_what_they_see_in_timms_block(name):
    block = build(SaEBottleneck, {}).eval()
    twin = timm_twin(block)
    x, seen = images(), []
    for b in block, twin:
        getattr(b, name).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        b(x)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('cls', BLOCKS)
def test_autocast_bfloat16(cls, training):
    block = build(cls, CASES['stride'], torch.float32).train(training)
    twin = timm_twin(block, nn.Sequential)  # the layer as it is: in half precision the order of its steps matters
    x = images(8, torch.float32)
    want = run(twin, x)['out']
    with torch.autocast('cpu', torch.bfloat16):
        ours, theirs = run(block, x)['out'], twin(x)
    assert ours.dtype == theirs.dtype
    assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max()  # as near to float32 as timm's is


@pytest.mark.parametrize('cls', BLOCKS)
def test_bfloat16_weights(cls):
    block = build(cls, CASES['stride'], torch.float32).eval()
    x = images(8, torch.float32)
    want = timm_twin(block)(x)
    block = block.bfloat16()
    theirs = timm_twin(block, nn.Sequential)(x.bfloat16())
    with torch.inference_mode():
        ours = block(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max()


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('cls', BLOCKS)
def test_reparameterized_block_equals_the_block_in_eval(cls, case):
    block = build(cls, CASES[case])
    x = images()
    want = timm_twin(block.eval())(x)
    fused = reparameterize_model(nn.Sequential(block.train())).eval()  # timm's validate.py calls it in training mode
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in block.modules()), 'timm works on a copy'
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), want, rtol=1e-10, atol=1e-10)
    again = reparameterize_model(fused)
    torch.testing.assert_close(again(x), want, rtol=1e-10, atol=1e-10)


def test_reparameterize_leaves_what_it_cannot_fold():
    block = build(SaEBottleneck, {}).eval()
    block.bn1 = ActNorm(PLANES).double().eval()
    block.conv2 = NoisyConv(PLANES, PLANES, 3, padding=1).double()
    x = images()
    want = timm_twin(block)(x)
    fused = reparameterize_model(nn.Sequential(block))
    torch.testing.assert_close(fused(x), want, rtol=1e-10, atol=1e-10)
    assert isinstance(fused[0].bn1, ActNorm) and isinstance(fused[0].bn2, nn.BatchNorm2d)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('cls', BLOCKS)
def test_compile_full_graph(cls, training):
    block = build(cls, CASES['stride']).train(training)
    twin = timm_twin(block)
    x = images().to(memory_format=torch.channels_last)
    compiled = torch.compile(block, fullgraph=True, backend='aot_eager')
    want = run(twin, x)
    assert_same({k.removeprefix('_orig_mod.'): v for k, v in run(compiled, x).items()}, want, 1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('cls', BLOCKS)
def test_export(cls):
    block = build(cls, CASES['stride']).eval()
    x = images()
    batch = torch.export.Dim('batch', min=2, max=8)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},))
    more = images(5)
    torch.testing.assert_close(program.module()(more), timm_twin(block)(more), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('cls', BLOCKS)
def test_fx_graph_serves_training_and_inference(cls):
    """Traced in eval mode and put in training mode afterwards, as torchvision's feature extractors do."""
    block = build(cls, CASES['stride']).eval()
    twin = timm_twin(block)
    graph = torch.fx.symbolic_trace(block)
    x = images()
    torch.testing.assert_close(graph(x), twin(x), rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(graph)(x), twin(x), rtol=1e-10, atol=1e-10)
    assert_same(run(graph.train(), x), run(twin.train(), x), 1e-10)


@pytest.mark.parametrize('cls', BLOCKS)
def test_torchscript_script_and_trace(cls):
    block = build(cls, CASES['stride']).eval()
    twin = timm_twin(block)
    x = images()
    scripted = torch.jit.script(block)
    with torch.inference_mode():
        torch.testing.assert_close(scripted(x), twin(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.jit.trace(block, x)(x), twin(x), rtol=1e-10, atol=1e-10)
    assert_same(run(scripted.train(), x), run(twin.train(), x), 1e-10)
    fused = reparameterize_model(nn.Sequential(block))
    torch.testing.assert_close(torch.jit.script(fused)(x), fused(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('cls', BLOCKS)
def test_forward_mode_derivative_without_autograd(cls):
    """It has no rule for what a block overwrites otherwise."""
    block = build(cls, CASES['stride']).eval()
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(images(), images())
        got, want = (forward_ad.unpack_dual(model(x)) for model in (block, timm_twin(block)))
    torch.testing.assert_close(got.primal, want.primal, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.tangent, want.tangent, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        got, want = (torch.func.jvp(model, (x.detach(),), (x.detach(),)) for model in (block, timm_twin(block)))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('cls', BLOCKS)
def test_vmap_over_an_ensemble(cls):
    """torch.func's way to run several models at once; it has no rule for what a block overwrites otherwise."""
    members = [build(cls, CASES['stride']).eval() for _ in range(2)]
    state = torch.func.stack_module_state(members)
    x = images()
    with torch.no_grad():
        out = torch.vmap(lambda state: torch.func.functional_call(members[0], state, (x,)))(state)
        for i, member in enumerate(members):
            torch.testing.assert_close(out[i], timm_twin(member)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('cls', BLOCKS)
def test_second_derivatives(cls, training):
    """A gradient penalty differentiates through the backward pass."""
    block = build(cls, {}).train(training)
    x = images(2).requires_grad_()

    def penalty(block: nn.Module) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    torch.testing.assert_close(penalty(block), penalty(timm_twin(block)), rtol=1e-9, atol=1e-9)


def kept_for_backward(block: nn.Module, x: torch.Tensor) -> int:
    """How many tensors of the block's output's shape its forward pass keeps."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        out = block(x)
    return sum(t.shape == out.shape for t in kept.values())


@pytest.mark.parametrize('case', ['stride', 'drop path', 'add_identity'])
@pytest.mark.parametrize('cls', BLOCKS)
def test_training_keeps_one_large_tensor_less_than_timm(cls, case):
    block = build(cls, CASES[case]).train()
    assert kept_for_backward(block, images()) == kept_for_backward(timm_twin(block), images()) - 1


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, args, out: out * 1.5)
    return norm


@pytest.mark.parametrize(
    'norm',
    [
        ActNorm(WIDTH),
        nn.BatchNorm2d(WIDTH, affine=False),
        nn.BatchNorm2d(WIDTH, track_running_stats=False),
        nn.BatchNorm2d(WIDTH, momentum=None),
        nn.GroupNorm(4, WIDTH),
        nn.Identity(),
        hooked(nn.BatchNorm2d(WIDTH)),
    ],
    ids=['subclass', 'not affine', 'no statistics', 'no momentum', 'group norm', 'identity', 'hooked'],
)
@pytest.mark.parametrize('cls', BLOCKS)
def test_training_with_other_norms(cls, norm):
    block = build(cls, {})
    setattr(block, 'bn3' if cls is SaEBottleneck else 'bn2', copy.deepcopy(norm))
    block.double().train()
    twin = timm_twin(block)
    x = images()
    assert_same(run(block, x), run(twin, x), 1e-10)
    for ours, theirs in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('cls', BLOCKS)
def test_training_on_one_value_a_channel_raises_as_timm_does(cls):
    block = build(cls, {}).train()
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        block(images(1)[:, :, :1, :1])


@pytest.mark.parametrize('cls', BLOCKS)
def test_training_with_frozen_parts(cls):
    """Whatever has no gradient, the rest has the right one."""
    for frozen in 'conv', 'bn', 'se':
        block = build(cls, CASES['stride']).train()
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        twin = timm_twin(block)
        x = images()
        got, want = run(block, x), run(twin, x)
        assert_same(*({k: v for k, v in found.items() if v is not None} for found in (got, want)), 1e-10)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('cls', BLOCKS)
def test_training_under_checkpoint(cls, reentrant):
    block = build(cls, CASES['drop path']).train()
    twin = timm_twin(block)
    wrapped = partial(checkpoint, block, use_reentrant=reentrant)
    wrapped.named_parameters = block.named_parameters
    x = images()
    assert_same(run(wrapped, x), run(twin, x), 1e-10)


@pytest.mark.parametrize('cls', BLOCKS)
def test_training_with_torch_func(cls):
    """Gradients, forward-mode derivatives and an ensemble, of a function of the parameters, in training mode."""
    block = build(cls, CASES['stride']).train()
    twin = timm_twin(block)
    x, direction = images(), images()

    def state(model: nn.Module) -> tuple[dict, dict]:
        return dict(model.named_parameters()), {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss(model: nn.Module, parameters: dict, buffers: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum()

    def check(got: dict | torch.Tensor, want: dict | torch.Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    def named_as_ours(found: dict) -> dict:
        return {name.replace('se.sae.', 'se.'): value for name, value in found.items()}

    got = torch.func.grad(partial(loss, block))(*state(block), x)
    check(got, named_as_ours(torch.func.grad(partial(loss, twin))(*state(twin), x)))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        check(*(forward_ad.unpack_dual(loss(model, *state(model), dual)).tangent for model in (block, twin)))
        for part in 'se', 'conv', 'bn', 'downsample':
            tangents = []
            for model in block, twin:
                parameters, buffers = state(model)
                parameters = {
                    name: forward_ad.make_dual(p, torch.ones_like(p)) if name.startswith(part) else p
                    for name, p in parameters.items()
                }
                tangents.append(forward_ad.unpack_dual(loss(model, parameters, buffers, x)).tangent)
            check(*tangents)

    others = block, build(cls, CASES['stride']).train()
    got = torch.vmap(torch.func.grad(partial(loss, block)), (0, 0, None))(*torch.func.stack_module_state(others), x)
    want = torch.vmap(torch.func.grad(partial(loss, twin)), (0, 0, None))(
        *torch.func.stack_module_state([timm_twin(m) for m in others]), x
    )
    check({k: v.detach() for k, v in got.items()}, named_as_ours(want))


def trained_statistics(model: nn.Module) -> nn.Module:
    """Norms that are not the identity, as after training."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1)
            nn.init.normal_(m.bias, std=0.1)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize('name', ['senetv2_resnet18', 'senextv2_26t_32x4d', 'seanet20'])
def test_reparameterized_model_has_equal_logits(name):
    """All norms but those of the stem, which no block holds."""
    model = trained_statistics(timm.create_model(name, num_classes=10)).eval()
    fused = reparameterize_model(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    left = [name for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(name.startswith(('conv1', 'bn1')) for name in left)


def test_model_equals_timms_trunk_in_every_mode():
    """The whole network: eval with and without autograd, features, gradient checkpointing, training."""
    ours = trained_statistics(timm.create_model('senetv2_resnet50', num_classes=10)).double()
    theirs = copy.deepcopy(ours)
    for m in theirs.modules():
        if isinstance(m, SaEBottleneck):
            m.__class__ = Bottleneck
            m.se = PaperSaE(m.se)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def check(got, want):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    ours.eval(), theirs.eval()
    check(ours(x), theirs(x))
    with torch.inference_mode():
        check(ours(x), theirs(x))
        check(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1])

    ours.train(), theirs.train()
    ours.set_grad_checkpointing()
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        check(p.grad, q.grad)
