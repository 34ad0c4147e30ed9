"""Time, memory and kernels of steps that run side by side, round by round, in one process."""

import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from tqdm import tqdm

SAMPLE_SECONDS = 0.02  # a sample repeats a shorter step until it has lasted this long


@dataclass
class Contestant:
    """A step to time.

    Attributes:
        step: One step.
        own_bytes: Bytes held between steps; None where memory is not measured.
        images: Images of a step.
        flops: Multiplications and additions of a step; 0 where they are not counted.
    """

    step: Callable[[], Any]
    own_bytes: Callable[[], int] | None = None
    images: int = 0
    flops: int = 0


def _sample(contestant: Contestant, repeats: int, device: str) -> float:
    """Seconds of one step."""
    if device == 'cuda':
        # Events lie in the stream's queue: they time the kernels, a CUDA graph's too, and not the return to Python
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            contestant.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        contestant.step()
    return (time.perf_counter() - begun) / repeats


def measure(contestants: dict[str, Contestant], rounds: int, device: str, title: str) -> dict[str, list[float]]:
    """Seconds of one step, by contestant and round.

    Every contestant runs in every round, in an order that turns by one from round to round, so that whatever else the
    machine does falls on all of them.
    """
    names = list(contestants)
    repeats = {}
    for name in tqdm(names, desc=f'{title}: warm-up', leave=False, disable=None):
        for _ in range(3):  # compiles, allocates, records a CUDA graph
            _sample(contestants[name], 1, device)
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / _sample(contestants[name], 1, device)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(rounds), desc=title, leave=False, disable=None):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            times[name].append(_sample(contestants[name], repeats[name], device))
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return low, middle, high


def compare(baseline: list[float], contestant: list[float]) -> tuple[float, float, float, float]:
    """First quartile, median and third quartile of the rounds' ratios baseline / contestant; median difference."""
    ratios = [b / c for b, c in zip(baseline, contestant, strict=True)]
    difference = statistics.median([c - b for b, c in zip(baseline, contestant, strict=True)])
    return *quartiles(ratios), difference


def peak_bytes(contestant: Contestant, device: str) -> int:
    """Peak memory of a step: what the contestant holds, and the highest sum of what the step allocates and not frees.

    CUDA's allocator reports it; on a CPU it is added up from the allocations that torch's profiler records.
    """
    assert contestant.own_bytes is not None
    if device == 'cuda':
        contestant.step()  # settles what the step frees first, as the next step will
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.step()
        torch.cuda.synchronize()
        return contestant.own_bytes() + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        contestant.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())['traceEvents']
    live = peak = 0
    for event in sorted((e for e in events if e.get('name') == '[memory]'), key=lambda e: e['ts']):
        live += event['args']['Bytes']
        peak = max(peak, live)
    return contestant.own_bytes() + peak


# What a kernel of CUDA, or an operation of a CPU, does, by the first of these that its name contains
_PRODUCTS = 'convolutions and matrix products'
_KINDS = (
    (_PRODUCTS, ('triton_tem', 'triton_mm', 'triton_conv')),
    ('fused by the compiler', ('triton_', 'cpp_fused', 'graph_', 'torch-compiled', 'compiledfunction')),
    ('optimizer', ('multi_tensor_apply', '_foreach', 'fused_sgd')),
    ('norm', ('batch_norm', 'batchnorm', 'bn_fw', 'bn_bw')),
    ('copies and fills', ('memcpy', 'memset', 'copy_', 'clone', 'fill_', 'nchwtonhwc', 'nhwctonchw', 'empty')),
    (_PRODUCTS, ('conv', 'gemm', 'cutlass', 'cudnn', 'wgrad', 'dgrad', 'fprop', 'xmma', 'nvjet', 'addmm', 'aten::mm')),
    ('pooling and sums', ('pool', 'reduce', 'aten::mean', 'aten::sum', 'var_mean', 'softmax')),
)


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in _KINDS if any(word in name for word in words)), 'element by element')


def kernels(contestant: Contestant, device: str, steps: int = 3) -> list[tuple[str, str, float, float]]:
    """What a step spends its time on: name, kind, calls a step, milliseconds a step, the longest first.

    CUDA kernels on a GPU, torch's operations without those that they call on a CPU.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == 'cuda' else [])
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            contestant.step()
        if device == 'cuda':
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if device == 'cuda' else DeviceType.CPU
    rows = []
    for event in profile.key_averages():
        if event.device_type != wanted or event.key.startswith('ProfilerStep'):
            continue
        spent = event.self_device_time_total if device == 'cuda' else event.self_cpu_time_total
        if spent > 0:
            rows.append((event.key, kind_of(event.key), event.count / steps, spent / 1e3 / steps))
    return sorted(rows, key=lambda row: -row[3])


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large matrix product: the rate that the device has to offer."""
    n = 8192 if device == 'cuda' else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    step = Contestant(torch.inference_mode()(lambda: a @ a))
    times = measure({'matrix product': step}, 10, device, 'matrix product')['matrix product']
    return 2 * n**3 / min(times)  # the rest is what something else on the machine took


def machine(device: str) -> str:
    """The processor's name, or the GPU's."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    try:
        with open('/proc/cpuinfo') as file:
            names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
