"""Layers, blocks and models on a GPU: what a CPU cannot show. Where the device is a parameter, a CPU runs it too."""

import os
import socket
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import timm
import torch
from block_pairs import both_blocks, both_modes, build, images, randomize_norms, twin_of
from safetensors.torch import load_file
from torch import nn

from experiments.benchmark.timing import Contestant, peak_bytes
from timm_senetv2.layers import ChannelAggregation, SqueezeAggregatedExcitation

on_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device here')]
cuda_only = pytest.mark.parametrize('device', [pytest.param('cuda', marks=on_cuda)])
each_device = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=on_cuda)])
each_dtype = pytest.mark.parametrize(
    'dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
LAYOUTS = {'NCHW': torch.contiguous_format, 'channels-last': torch.channels_last}
each_layout = pytest.mark.parametrize('layout', LAYOUTS)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32: it would round the inputs of convs and products to 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, sums: int) -> None:
    """Within what rounding does to results of so many sums in this dtype, relative to the largest element."""
    assert got.dtype == dtype and got.shape == want.shape
    size = want.abs().max().item()
    assert size > 0 and got.isfinite().all()
    error = (got.double().cpu() - want.double().cpu()).abs().max().item()
    assert error <= 4 * torch.finfo(dtype).eps * sums**0.5 * size, f'{error / size:.1e}'


def gradients(module: nn.Module, x: torch.Tensor, forward=None) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = (forward or module)(x)
    direction = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    (out * direction).sum().backward()
    return {'out': out.detach(), 'x': x.grad} | {k: p.grad.clone() for k, p in module.named_parameters()}


# ---- layers


@each_layout
@each_dtype
@each_device
def test_sae_layer_equals_the_formula(device, dtype, layout):
    """The papers' formula in float64 on the CPU; the memory format stays."""
    layer = SqueezeAggregatedExcitation(32, reduction=8, cardinality=2)
    x = torch.randn(3, 32, 9, 7)
    layer, x = layer.to(dtype), x.to(dtype)
    z = x.double().mean((2, 3))
    hidden = (z @ layer.fc1.weight.double().T + layer.fc1.bias.double()).relu()
    s = (hidden @ layer.fc2.weight.double().T + layer.fc2.bias.double()).sigmoid()
    layer.to(device)
    out = layer(x.to(device).to(memory_format=LAYOUTS[layout]))
    assert out.device.type == device and out.is_contiguous(memory_format=LAYOUTS[layout])
    assert_close(out, x.double() * s[:, :, None, None], dtype, sums=32)


@each_layout
@each_dtype
@each_device
@pytest.mark.parametrize('op', ['sum', 'mean', 'max'])
def test_aggregation_equals_the_formula(op, device, dtype, layout):
    x = torch.randn(2, 16, 5, 7).to(dtype)
    groups = x.double().view(2, 4, 4, 5, 7)
    want = groups.amax(2) if op == 'max' else getattr(groups, op)(2)
    out = ChannelAggregation(factor=4, op=op)(x.to(device).to(memory_format=LAYOUTS[layout]))
    assert out.device.type == device
    assert_close(out, want, dtype, sums=4)


# ---- blocks: ours beside timm's, which has the same weights and runs its own forward


def block_and_reference(cls, case: str, device: str, dtype: torch.dtype, training: bool):
    """Our block, timm's beside it, and timm's in float64 on the CPU."""
    block = build(cls, case, dtype=dtype).train(training)
    reference = twin_of(block).double()
    block.to(device)
    return block, twin_of(block), reference


def worse(got, theirs, want, dtype, sums: int) -> list[str]:
    """Where the error is above 1.25 times that of timm's block, and above what rounding alone allows."""
    found = []
    for name in want:
        size = want[name].abs().max().item()
        error, allowed = ((t[name].double().cpu() - want[name]).square().mean().sqrt().item() for t in (got, theirs))
        if not error <= max(1.25 * allowed, torch.finfo(dtype).eps * sums**0.5 * size):
            found.append(f'{name}: {error:.1e}, timm {allowed:.1e}, of {size:.1e}')
    return found


@each_layout
@each_dtype
@both_modes
@pytest.mark.parametrize('case', ['identity shortcut', 'everything'])
@both_blocks
@each_device
def test_eager_block_is_as_exact_as_timms(device, cls, case, training, dtype, layout):
    """Output and gradients, and the output without autograd."""
    block, twin, reference = block_and_reference(cls, case, device, dtype, training)
    x = images(4, dtype)
    on_device = x.to(device).to(memory_format=LAYOUTS[layout])
    torch.manual_seed(1)  # the same paths are dropped, where the generators are the same
    drops = training and case == 'everything' and device != 'cpu'
    if not drops:
        results = []
        for b, inputs in (block, on_device), (twin, on_device), (reference, x.double()):
            torch.manual_seed(1)
            results.append(gradients(b, inputs))
        assert not worse(*results, dtype, sums=4 * 36 * 32)
    with torch.no_grad():
        out, theirs, want = block.eval()(on_device), twin.eval()(on_device), reference.eval()(x.double())
    assert not worse({'out': out}, {'out': theirs}, {'out': want}, dtype, sums=32 * 9)


@each_layout
@each_dtype
@both_modes
@both_blocks
@cuda_only
def test_compiled_block_is_as_exact_as_timms(device, cls, training, dtype, layout):
    """The fused tail, made into kernels; the buffers of the norms move as timm's."""
    block, twin, reference = block_and_reference(cls, 'stride', device, dtype, training)
    x = images(4, dtype)
    on_device = x.to(device).to(memory_format=LAYOUTS[layout])
    forward = torch.compile(block, fullgraph=True)
    results = [gradients(block, on_device, forward), gradients(twin, on_device), gradients(reference, x.double())]
    assert not worse(*results, dtype, sums=4 * 36 * 32)
    buffers = [{k: b.double() for k, b in m.named_buffers() if b.is_floating_point()} for m in (block, twin, reference)]
    assert not worse(*buffers, dtype, sums=4 * 36)


@both_modes
@pytest.mark.parametrize('amp', [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@both_blocks
@cuda_only
def test_compiled_block_under_autocast(device, amp, cls, training):
    block, twin, reference = block_and_reference(cls, 'stride', device, torch.float32, training)
    x = images(4, torch.float32)
    with torch.autocast(device, amp):
        got = gradients(block, x.to(device), torch.compile(block, fullgraph=True))
        theirs = gradients(twin, x.to(device))
    assert not worse(got, theirs, gradients(reference, x.double()), amp, sums=4 * 36 * 32)


# ---- CUDA graphs


def model(device: str, name: str = 'senetv2_resnet18', **kwargs) -> nn.Module:
    """With norms under which the gates move the logits."""
    return randomize_norms(timm.create_model(name, num_classes=5, **kwargs)).to(device)


def batch(device: str, n: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3)).to(device)


@cuda_only
def test_captured_graph_replays_new_inputs(device):
    """Nothing in the forward waits for the device or depends on where a tensor lies."""
    network = model(device).eval()
    static = batch(device)
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                network(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = network(static)
        for seed in range(3):
            x = torch.randn(static.shape, generator=torch.Generator().manual_seed(seed)).to(device)
            static.copy_(x)
            graph.replay()
            torch.testing.assert_close(out, network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
@cuda_only
def test_compiled_with_cuda_graphs_gives_the_eager_result(device, training):
    network = model(device).train(training)
    eager = model(device)
    eager.load_state_dict(network.state_dict())
    eager.train(training)
    forward = torch.compile(network, mode='reduce-overhead')
    for step in range(4):  # the first records
        torch.compiler.cudagraph_mark_step_begin()
        x = batch(device) + step / 10
        with nullcontext() if training else torch.inference_mode():
            got, want = forward(x), eager(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        if training:  # else the graph's memory would wait for it
            got.square().mean().backward()
            want.square().mean().backward()
    for (name, got), want in zip(network.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f'{name}: {text}')


# ---- training


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@each_device
def test_half_precision_with_a_gradient_scaler_learns(device, compiled):
    """float16 on a GPU; a CPU has bfloat16, and a scaler that is turned off. The loss of one batch must fall."""
    if compiled and device == 'cpu':
        pytest.skip('what is compiled on a CPU is tested with the fused tails')
    network = model(device, 'cifar_senetv2_resnet20', depth=8).train()
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, enabled=device == 'cuda')
    x, target = batch(device, 10, 32), torch.arange(10, device=device) % 5
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16 if device == 'cuda' else torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in network.parameters())
    assert losses[-1] < 0.5 * losses[0], losses
    if device == 'cuda':
        assert scaler.get_scale() > 0


DDP = """
import sys
import torch
import torch.distributed as dist
import timm
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

device, backend, out = arguments
torch.backends.cudnn.allow_tf32 = False
dist.init_process_group(backend)
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = timm.create_model('cifar_senetv2_resnet20', num_classes=5).to(device)
for m in model.modules():
    if isinstance(m, nn.BatchNorm2d):
        nn.init.uniform_(m.weight, 0.5, 1.5)
        m.eval()  # its statistics would be those of each process
if device == 'cuda':
    torch.cuda.set_device(0)
wrapped = DistributedDataParallel(model, device_ids=[0] if device == 'cuda' else None)
x, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
loss = nn.functional.cross_entropy(wrapped(x[mine].to(device)), target[mine].to(device))
loss.backward()
if rank == 0:
    save_file({k: p.grad.cpu().clone() for k, p in model.named_parameters()}, out)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    'device, backend, processes',
    [pytest.param('cuda', 'nccl', 1, marks=on_cuda), ('cpu', 'gloo', 2)],
)
def test_distributed_gradients_equal_those_of_one_process(device, backend, processes, tmp_path, interpreters):
    """NCCL takes one process a device, so a single GPU has one."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    running = []
    for rank in range(processes):
        names = dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=rank, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        environment = os.environ | {key: str(value) for key, value in names.items()} | {'OMP_NUM_THREADS': '1'}
        arguments = [device, backend, str(tmp_path / 'gradients.safetensors')]
        running.append(interpreters.start(f'arguments = {arguments!r}\n{DDP}', env=environment))
    for process in running:
        assert process.wait() == 0, process.stderr
    got = load_file(tmp_path / 'gradients.safetensors')

    torch.manual_seed(0)
    network = timm.create_model('cifar_senetv2_resnet20', num_classes=5)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            m.eval()
    x, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    network.double()
    nn.functional.cross_entropy(network(x.double()), target).backward()
    assert any(name.endswith('se.fc1.weight') and p.grad.abs().max() > 0 for name, p in network.named_parameters())
    for name, p in network.named_parameters():
        assert_close(got[name], p.grad, torch.float32, sums=8 * 32 * 32 * 9)


@cuda_only
def test_compiled_training_needs_no_more_memory_than_a_plain_network(device):
    """Attention adds its weights and (N, C) tensors, and nothing of the size of the images."""
    peaks = {}
    for name in 'resnet50', 'seresnet50', 'senetv2_resnet50':
        network = timm.create_model(name).to(device).to(memory_format=torch.channels_last)
        forward = torch.compile(network)
        x = batch(device, 32, 128).to(memory_format=torch.channels_last)

        def step(network=network, forward=forward, x=x) -> None:
            with torch.autocast('cuda', torch.bfloat16):
                loss = forward(x).float().square().mean()
            loss.backward()
            network.zero_grad(set_to_none=True)

        for _ in range(3):
            step()
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        peaks[name] = peak_bytes(Contestant(step, own_bytes=lambda: 0), device) - weights  # those of the gradients
        del network, forward, x, step
        torch.cuda.empty_cache()
    assert peaks['senetv2_resnet50'] < 1.05 * peaks['resnet50'], peaks
    assert peaks['senetv2_resnet50'] < peaks['seresnet50'], peaks


@each_device
def test_state_moves_between_devices(device, tmp_path):
    """Weights saved on one device give the same logits on another."""
    network = model(device, 'cifar_senetv2_resnet20').eval()
    torch.save(network.state_dict(), tmp_path / 'weights.pth')
    other = timm.create_model('cifar_senetv2_resnet20', num_classes=5, checkpoint_path=str(tmp_path / 'weights.pth'))
    x = batch('cpu', 2, 32).double()
    with torch.no_grad():
        want = other.eval().double()(x)
        got = network.double()(x.to(device)).cpu()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
