"""Measure speed and memory of models and layers against baselines, interleaved in one process."""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import timm
import torch
import torch.nn.functional as F
from _cli import UserError, run
from _profile import count
from timm.models import reparameterize_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from tqdm import tqdm

from experiments.files import write_csv
from experiments.files import write_text as write_atomically
from timm_senetv2.layers import ChannelAggregation, SqueezeAggregatedExcitation
from timm_senetv2.models.blocks import SaEBasicBlock, SaEBottleneck

matplotlib.use('Agg')

DTYPES = ('float32', 'bfloat16', 'float16')
VARIANTS = ('reparameterized', 'four-branch')
COLUMNS = (
    'experiment',
    'contestant',
    'baseline',
    'device',
    'dtype',
    'channels_last',
    'compiled',
    'training',
    'batch',
    'size',
    'rounds',
    'ms',
    'ms_q1',
    'ms_q3',
    'images_per_s',
    'peak_mib',
    'ratio',
    'ratio_q1',
    'ratio_q3',
    'difference_ms',
    'peak_ratio',
    'matrix_share',
    'machine',
    'threads',
    'torch',
    'timm',
)
ROUND_COLUMNS = ('experiment', 'contestant', 'round', 'ms')
SAMPLE_SECONDS = 0.02  # a sample repeats a shorter step until it has lasted this long

DESCRIPTION = """\
Measure speed and memory of models and layers against baselines.

In every round each contestant runs once, in an order that turns by one from round to round, so that whatever else the
machine does falls on all of them. A ratio is the baseline's time over the contestant's in the same round: above 1 the
contestant is faster. Printed and written are medians over the rounds and quartiles; the times of all rounds are in
benchmark_NAME_rounds.csv.

A model is a timm name, or one with a suffix: NAME:reparameterized has its norms folded by timm's reparameterize_model;
NAME:four-branch is a SENetV2 as public ports write it, timm's plain blocks with four dense layers side by side.

A training step is forward pass, cross-entropy, backward pass and an SGD step with momentum. In half precision,
inference casts the model and training uses autocast.

Peak memory is that of live tensors over one step: parameters, buffers and optimizer state, and on top of them the
highest sum of what the step has allocated and not freed. CUDA's allocator reports it; on a CPU it is added up from the
allocations that torch's profiler records.
"""


class FourBranchSaE(nn.Module):
    """SaE as the paper draws it and public ports write it: a pooling layer, four dense layers, a concatenation."""

    def __init__(self, channels: int, reduction: int = 32, cardinality: int = 4, add_identity: bool = False):
        super().__init__()
        hidden = channels // reduction
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True)) for _ in range(cardinality)
        )
        self.excite = nn.Sequential(nn.Linear(cardinality * hidden, channels), nn.Sigmoid())
        self.add_identity = add_identity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.pool(x).flatten(1)
        s = self.excite(torch.cat([branch(z) for branch in self.branches], dim=1))
        scaled = x * s[:, :, None, None].expand_as(x)
        return x + scaled if self.add_identity else scaled


@dataclass(frozen=True)
class Setting:
    """How models run: one experiment's column values."""

    device: str = 'cpu'
    dtype: str = 'float32'
    channels_last: bool = False
    compiled: bool = False
    training: bool = False
    batch: int = 8
    size: int = 224

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        return ', '.join(
            [
                'training step' if self.training else 'inference',
                self.device,
                self.dtype,
                'channels-last' if self.channels_last else 'NCHW',
                'compiled' if self.compiled else 'eager',
                f'batch {self.batch}',
            ]
        )


@dataclass
class Contestant:
    """A step to time. `timed_by_step`: the step returns its own time in seconds, as a child process does."""

    step: Callable[[], float | None]
    own_bytes: Callable[[], int] | None = None  # what it holds between steps; None where memory is not of interest
    images: int = 0  # a step
    flops: int = 0  # a step
    timed_by_step: bool = False


@dataclass
class Experiment:
    title: str
    setting: Setting
    build: Callable[[], dict[str, Contestant]]
    baselines: tuple[str, ...]
    rounds: int
    rows: list[dict] = field(default_factory=list)
    round_rows: list[dict] = field(default_factory=list)


def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def sample(contestant: Contestant, repeats: int, device: str) -> float:
    """Seconds of one step."""
    if contestant.timed_by_step:
        return contestant.step()
    if device == 'cuda':
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            contestant.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        contestant.step()
    return (time.perf_counter() - start) / repeats


def measure(contestants: dict[str, Contestant], rounds: int, device: str, title: str) -> dict[str, list[float]]:
    """Seconds of one step, by contestant and round. All contestants run in every round, in a turning order."""
    names = list(contestants)
    repeats = {}
    for name in tqdm(names, desc=f'{title}: warm-up', leave=False, disable=None):
        for _ in range(2):  # compiles, allocates
            sample(contestants[name], 1, device)
        synchronize(device)
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / sample(contestants[name], 1, device)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(rounds), desc=title, leave=False, disable=None):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            times[name].append(sample(contestants[name], repeats[name], device))
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method='inclusive'))


def compare(baseline: list[float], contestant: list[float]) -> tuple[float, float, float, float]:
    """First quartile, median and third quartile of the rounds' ratios baseline / contestant; median difference."""
    ratios = [b / c for b, c in zip(baseline, contestant, strict=True)]
    difference = statistics.median([c - b for b, c in zip(baseline, contestant, strict=True)])
    return *quartiles(ratios), difference


def peak_bytes(contestant: Contestant, device: str) -> int:
    """Peak memory of a step, as the script's description defines it."""
    if device == 'cuda':
        contestant.step()  # settles what the step frees first, as the next step will
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.step()
        torch.cuda.synchronize()
        return contestant.own_bytes() + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
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


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of parameters, buffers and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def four_branch(model: nn.Module) -> nn.Module:
    """The model with timm's blocks in place of ours and the four-branch layer in place of SaE."""
    plain = {SaEBasicBlock: BasicBlock, SaEBottleneck: Bottleneck}
    for block in [m for m in model.modules() if type(m) in plain]:
        block.__class__ = plain[type(block)]
        sae = block.se
        block.se = FourBranchSaE(sae.channels, sae.channels // sae.rd_channels, sae.cardinality, sae.add_identity)
    return model


def create(spec: str) -> nn.Module:
    """A model by name, or by name:variant."""
    name, _, variant = spec.partition(':')
    if not timm.is_model(name):
        raise UserError(f'unknown model {name!r}; timm.list_models() lists them, ours with timm_senetv2 installed')
    if variant and variant not in VARIANTS:
        raise UserError(f'unknown variant {variant!r} of {name}; choose {" or ".join(VARIANTS)}, or leave it out')
    model = timm.create_model(name)
    if variant == 'reparameterized':
        return reparameterize_model(model.eval())
    if variant == 'four-branch':
        if not any(isinstance(m, SaEBasicBlock | SaEBottleneck) for m in model.modules()):
            raise UserError(f'{name} has no SaE blocks to write with four branches; give a senetv2 or senextv2 model')
        return four_branch(model)
    return model


def model_contestant(spec: str, setting: Setting) -> Contestant:
    torch.manual_seed(0)
    model = create(spec)
    macs = count(model, (3, setting.size, setting.size)).macs
    dtype = getattr(torch, setting.dtype)
    half = dtype != torch.float32
    model = model.train(setting.training).to(setting.device, memory_format=setting.memory_format)
    if half and not setting.training:
        model = model.to(dtype)
    forward = torch.compile(model) if setting.compiled else model
    x = torch.randn(setting.batch, 3, setting.size, setting.size, device=setting.device)
    x = x.to(memory_format=setting.memory_format)
    optimizer = None
    if setting.training:
        target = torch.arange(setting.batch, device=setting.device) % model.num_classes
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(setting.device, dtype, enabled=half):
                loss = F.cross_entropy(forward(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        x = x.to(dtype)

        def step() -> None:
            with torch.inference_mode():
                forward(x)

    flops = 2 * macs * setting.batch * (3 if setting.training else 1)  # backward: inputs' and weights' gradients
    return Contestant(step, lambda: state_bytes(model, optimizer), setting.batch, flops)


def models_experiment(specs: list[str], baselines: list[str], setting: Setting, rounds: int) -> Experiment:
    return Experiment(
        f'models, {setting}',
        setting,
        lambda: {spec: model_contestant(spec, setting) for spec in specs},
        tuple(baselines),
        rounds,
    )


def layer_step(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, gradients of input and parameters."""
    with torch.no_grad():
        gradient = torch.randn_like(layer(x))
    x = x.clone().requires_grad_()
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []

    def step() -> None:
        torch.autograd.grad(layer(x), [x, *parameters], gradient)

    return step


def layer_experiment(
    title: str,
    layers: Callable[[], dict[str, Callable]],
    channels: int,
    setting: Setting,
    rounds: int,
    backward: bool,
) -> Experiment:
    def build() -> dict[str, Contestant]:
        torch.manual_seed(0)
        dtype = getattr(torch, setting.dtype)
        x = torch.randn(setting.batch, channels, setting.size, setting.size, device=setting.device, dtype=dtype)
        x = x.to(memory_format=setting.memory_format)
        contestants = {}
        for name, layer in layers().items():
            if isinstance(layer, nn.Module):
                layer = layer.to(setting.device, dtype)
            step = layer_step(layer, x) if backward else torch.inference_mode()(partial(layer, x))
            contestants[name] = Contestant(step)
        return contestants

    layout = 'channels-last' if setting.channels_last else 'NCHW'
    what = 'forward and backward' if backward else 'forward'
    return Experiment(
        f'{title}, {channels}x{setting.size}x{setting.size}, {what}, {setting.device}, {setting.dtype}, {layout}',
        setting,
        build,
        (next(iter(layers())),),
        rounds,
    )


IMPORT = """
import time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
import sys
print(seconds, 'timm_senetv2' in sys.modules)
"""

# The same work as at the end of `import torch`, or of timm.models, on the clock alone
REGISTER = """
import {module}
import sys, time
from importlib.metadata import entry_points
entries = entry_points(group='torch.backends', name='timm_senetv2')
start = time.perf_counter()
for entry in entries:
    entry.load()()
print(time.perf_counter() - start, 'timm_senetv2' in sys.modules)
"""


def import_contestant(module: str, plugin: bool, program: str = IMPORT) -> Contestant:
    environment = {k: v for k, v in os.environ.items() if not k.endswith('_AUTOLOAD')}
    if not plugin:
        environment['TIMM_SENETV2_AUTOLOAD'] = '0'
    if program is REGISTER:
        environment['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'

    def step() -> float:
        child = subprocess.run(
            [sys.executable, '-c', program.format(module=module)], env=environment, capture_output=True, text=True
        )
        if child.returncode:
            raise UserError(f'import {module} failed: {(child.stderr.strip().splitlines() or ["no message"])[-1]}')
        seconds, loaded = child.stdout.split()
        if (loaded == 'True') != plugin:
            raise UserError('torch does not load timm_senetv2; install it first: pip install -e .')
        return float(seconds)

    return Contestant(step, timed_by_step=True)


def import_experiment(module: str, rounds: int) -> Experiment:
    return Experiment(
        f'import {module}',
        Setting(batch=0, size=0),
        lambda: {
            f'import {module}': import_contestant(module, plugin=False),
            f'import {module} with timm_senetv2': import_contestant(module, plugin=True),
            f'registration after import {module}': import_contestant(module, plugin=True, program=REGISTER),
        },
        (f'import {module}',),
        rounds,
    )


def matrix_rate(setting: Setting) -> float:
    """Multiplications and additions a second of a large matrix product: the rate the device has to offer."""
    n = 8192 if setting.device == 'cuda' else 2048
    a = torch.randn(n, n, device=setting.device, dtype=getattr(torch, setting.dtype))
    step = Contestant(torch.inference_mode()(lambda: a @ a))
    times = measure({'matrix product': step}, 10, setting.device, 'matrix product')['matrix product']
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


def measure_experiment(experiment: Experiment, rates: dict[str, float]) -> None:
    """Run it and fill its rows."""
    setting = experiment.setting
    contestants = experiment.build()
    times = measure(contestants, experiment.rounds, setting.device, experiment.title)
    peaks = {name: peak_bytes(c, setting.device) for name, c in contestants.items() if c.own_bytes is not None}
    if any(c.flops for c in contestants.values()) and setting.dtype not in rates:
        rates[setting.dtype] = matrix_rate(setting)
    shared = dict(
        experiment=experiment.title,
        device=setting.device,
        dtype=setting.dtype,
        channels_last=setting.channels_last,
        compiled=setting.compiled,
        training=setting.training,
        batch=setting.batch,
        size=setting.size,
        rounds=experiment.rounds,
        machine=machine(setting.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
    )
    for name, contestant in contestants.items():
        low, middle, high = quartiles(times[name])
        own = dict(
            contestant=name,
            ms=f'{middle * 1e3:.4g}',
            ms_q1=f'{low * 1e3:.4g}',
            ms_q3=f'{high * 1e3:.4g}',
            images_per_s=f'{contestant.images / middle:.4g}' if contestant.images else '',
            peak_mib=f'{peaks[name] / 2**20:.1f}' if name in peaks else '',
            matrix_share=f'{contestant.flops / middle / rates[setting.dtype]:.3f}' if contestant.flops else '',
        )
        for baseline in experiment.baselines:
            q1, median, q3, difference = compare(times[baseline], times[name])
            experiment.rows.append(
                shared
                | own
                | dict(
                    baseline=baseline,
                    ratio=f'{median:.4f}',
                    ratio_q1=f'{q1:.4f}',
                    ratio_q3=f'{q3:.4f}',
                    difference_ms=f'{difference * 1e3:.4g}',
                    peak_ratio=f'{peaks[name] / peaks[baseline]:.4f}' if name in peaks else '',
                )
            )
        experiment.round_rows += [
            dict(experiment=experiment.title, contestant=name, round=i, ms=f'{t * 1e3:.6g}')
            for i, t in enumerate(times[name])
        ]
    del contestants
    gc.collect()
    if setting.device == 'cuda':
        torch.cuda.empty_cache()


SENETV2 = 'senetv2_resnet50'
SUITE_MODELS = ['resnet50', 'seresnet50', SENETV2, f'{SENETV2}:reparameterized', f'{SENETV2}:four-branch']
TRAINABLE = [m for m in SUITE_MODELS if not m.endswith(':reparameterized')]
SUITE_BASELINES = ['resnet50', 'seresnet50']
SAE_SIZES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
AGGREGATION_SIZES = ((128, 32), (256, 16), (512, 8))  # seanet20's stages
AGGREGATION_BATCHES = (8, 128)  # as the models above, and as the paper trains: tensors that fit the caches, and not
FOUR_BRANCH, SAE, CLONE, AGGREGATION = 'four-branch SaE', 'SaE', 'clone', 'aggregation'

CPU = Setting()
GPU = Setting('cuda', 'bfloat16', channels_last=True, batch=128)
GPU_SEANET = Setting('cuda', 'bfloat16', channels_last=True, training=True, batch=512, size=32)


def with_(setting: Setting, **changes) -> Setting:
    return Setting(**{**vars(setting), **changes})


def sae_experiment(channels: int, size: int, setting: Setting, rounds: int) -> Experiment:
    return layer_experiment(
        'SaE layer',
        lambda: {FOUR_BRANCH: FourBranchSaE(channels), SAE: SqueezeAggregatedExcitation(channels)},
        channels,
        with_(setting, size=size),
        rounds,
        backward=True,
    )


def aggregation_experiment(channels: int, size: int, setting: Setting, rounds: int, backward: bool) -> Experiment:
    return layer_experiment(
        f'channel aggregation, batch {setting.batch}',
        lambda: {CLONE: torch.clone, AGGREGATION: ChannelAggregation()},
        channels,
        with_(setting, size=size),
        rounds,
        backward,
    )


def suite(device: str, quick: bool) -> list[Experiment]:
    """Everything results/README.md reports for a device. `quick` is for trying the command: its figures mean little."""

    def rounds(n: int) -> int:
        return 3 if quick else n

    def shrunk(setting: Setting) -> Setting:
        return with_(setting, batch=2, size=min(setting.size, 64)) if quick else setting

    experiments = []
    if device == 'cpu':
        for channels_last in False, True:
            setting = shrunk(with_(CPU, channels_last=channels_last))
            experiments += [
                models_experiment(SUITE_MODELS, SUITE_BASELINES, setting, rounds(25)),
                models_experiment(TRAINABLE, SUITE_BASELINES, with_(setting, training=True), rounds(11)),
            ]
    else:
        for training in False, True:
            for compiled in False, True:
                setting = shrunk(with_(GPU, training=training, compiled=compiled))
                specs = TRAINABLE if training else SUITE_MODELS
                experiments.append(models_experiment(specs, SUITE_BASELINES, setting, rounds(50)))
        for compiled in False, True:
            experiments.append(
                models_experiment(['seanet20'], ['seanet20'], shrunk(with_(GPU_SEANET, compiled=compiled)), rounds(50))
            )
    base = CPU if device == 'cpu' else GPU
    for channels_last in False, True:
        setting = shrunk(with_(base, channels_last=channels_last))
        experiments += [sae_experiment(c, size, setting, rounds(41)) for c, size in SAE_SIZES]
        for batch in (setting.batch,) if quick else AGGREGATION_BATCHES:
            experiments += [
                aggregation_experiment(c, size, with_(setting, batch=batch), rounds(41), backward)
                for backward in (False, True)
                for c, size in AGGREGATION_SIZES
            ]
    return experiments


@dataclass(frozen=True)
class Target:
    """A bound on a column of one row of the suite."""

    text: str
    experiment: Experiment
    contestant: str
    baseline: str
    column: str
    bound: float
    at_least: bool = True

    def line(self, rows: list[dict]) -> str:
        values = [
            row[self.column]
            for row in rows
            if (row['experiment'], row['contestant'], row['baseline'])
            == (self.experiment.title, self.contestant, self.baseline)
        ]
        wanted = f'{"≥" if self.at_least else "≤"} {self.bound:g}'
        if not values:
            return f'| {self.text} | {wanted} | not measured | |'
        met = float(values[0]) >= self.bound if self.at_least else float(values[0]) <= self.bound
        return f'| {self.text} | {wanted} | {float(values[0]):.3g} | {"yes" if met else "no"} |'


def targets() -> list[Target]:
    found = []
    for channels_last, layout in (False, 'NCHW'), (True, 'channels-last'):
        inference = models_experiment([], [], with_(CPU, channels_last=channels_last), 1)
        training = models_experiment([], [], with_(CPU, channels_last=channels_last, training=True), 1)
        setting = with_(CPU, channels_last=channels_last)
        found += [
            Target(f'CPU inference, speed / seresnet50, {layout}', inference, SENETV2, 'seresnet50', 'ratio', 1.03),
            Target(f'CPU inference, speed / resnet50, {layout}', inference, SENETV2, 'resnet50', 'ratio', 0.97),
            Target(f'CPU training step, speed / seresnet50, {layout}', training, SENETV2, 'seresnet50', 'ratio', 1.02),
            Target(
                f'CPU training step, peak memory / seresnet50, {layout}',
                training,
                SENETV2,
                'seresnet50',
                'peak_ratio',
                1,
                at_least=False,
            ),
            Target(
                f'SaE layer 2048x7x7, forward and backward, speed / four-branch, {layout}',
                sae_experiment(2048, 7, setting, 1),
                SAE,
                FOUR_BRANCH,
                'ratio',
                1.3,
            ),
        ]
        found += [
            Target(
                f'aggregation {batch}x{c}x{size}x{size}, forward, speed / clone, {layout}',
                aggregation_experiment(c, size, with_(setting, batch=batch), 1, backward=False),
                AGGREGATION,
                CLONE,
                'ratio',
                1,
            )
            for batch in AGGREGATION_BATCHES
            for c, size in AGGREGATION_SIZES
        ]
    for training, compiled, bound in (False, True, 0.95), (False, False, 0.97), (True, True, 0.90):
        setting = with_(GPU, training=training, compiled=compiled)
        found.append(
            Target(
                f'GPU {"training step" if training else "inference"}, {"compiled" if compiled else "eager"}, '
                'speed / resnet50',
                models_experiment([], [], setting, 1),
                SENETV2,
                'resnet50',
                'ratio',
                bound,
            )
        )
    return found


def import_targets() -> list[Target]:
    found = []
    for module, bound in ('torch', 5), ('timm', 60):
        baseline, experiment = f'import {module}', import_experiment(module, 1)
        found += [
            Target(
                f'import {module}, added ms, difference of whole imports',
                experiment,
                f'{baseline} with timm_senetv2',
                baseline,
                'difference_ms',
                bound,
                at_least=False,
            ),
            Target(
                f'import {module}, added ms, registration alone',
                experiment,
                f'registration after {baseline}',
                baseline,
                'ms',
                bound,
                at_least=False,
            ),
        ]
    return found


def experiment_table(rows: list[dict]) -> str:
    """Markdown: a line a contestant, its ratios to each baseline."""
    baselines = list(dict.fromkeys(row['baseline'] for row in rows))
    optional = [
        (name, column)
        for name, column in (
            ('images/s', 'images_per_s'),
            ('peak MiB', 'peak_mib'),
            ('share of matrix rate', 'matrix_share'),
        )
        if any(row[column] for row in rows)
    ]
    heads = ['', 'ms', *(name for name, _ in optional)]
    compared = ('speed', 'memory') if rows[0]['peak_mib'] else ('speed',)
    heads += [f'{what} / {b}' for b in baselines for what in compared]
    lines = [
        f'**{rows[0]["experiment"]}**, {rows[0]["rounds"]} rounds',
        '',
        f'| {" | ".join(heads)} |',
        '|' + '---|' * len(heads),
    ]
    for name in dict.fromkeys(row['contestant'] for row in rows):
        mine = [row for row in rows if row['contestant'] == name]
        cells = [name, f'{mine[0]["ms"]} ({mine[0]["ms_q1"]}–{mine[0]["ms_q3"]})']
        cells += [mine[0][column] for _, column in optional]
        for row in mine:
            cells.append(f'{float(row["ratio"]):.3f} ({float(row["ratio_q1"]):.3f}–{float(row["ratio_q3"]):.3f})')
            if row['peak_ratio']:
                cells.append(f'{float(row["peak_ratio"]):.3f}')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def report(experiments: list[Experiment], command: str, suite: bool) -> str:
    """The Markdown file: machine, targets (in a suite also those not measured), a table an experiment."""
    rows = [row for e in experiments for row in e.rows]
    first = rows[0]
    parts = [
        f'`{command}` on {first["machine"]}, {first["threads"]} threads, torch {first["torch"]}, timm {first["timm"]}. '
        'Medians over interleaved rounds, quartiles in brackets; a speed is a ratio of times round by round, above 1 '
        'is faster than the baseline; memory is the peak of live tensors in a step.',
    ]
    if suite:
        lines = [target.line(rows) for target in targets()]
    else:
        lines = [target.line(rows) for target in targets() + import_targets()]
        lines = [line for line in lines if 'not measured' not in line]
    if lines:
        parts.append('\n'.join(['| | target | measured | met |', '|---|---|---|---|', *lines]))
    parts += [experiment_table(e.rows) for e in experiments]
    return '\n\n'.join(parts) + '\n'


def chart(experiments: list[Experiment], path: Path) -> None:
    """Bars of speed over the first baseline, a panel an experiment with models, else one a experiment."""
    import matplotlib.pyplot as plt

    shown = [e for e in experiments if e.title.startswith('models')] or experiments
    columns = min(2, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.5 * columns, 0.6 + 2.4 * lines), squeeze=False, layout='constrained'
    )
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, experiment in zip(axes.flat, shown, strict=False):
        rows = [row for row in experiment.rows if row['baseline'] == experiment.baselines[0]]
        ratios = [float(row['ratio']) for row in rows]
        spread = [
            [ratio - float(row['ratio_q1']) for ratio, row in zip(ratios, rows, strict=True)],
            [float(row['ratio_q3']) - ratio for ratio, row in zip(ratios, rows, strict=True)],
        ]
        names = [row['contestant'] for row in rows]
        colors = ['#9aa5b1' if name in experiment.baselines else '#2f6f9f' for name in names]
        axis.barh(names, ratios, xerr=spread, color=colors)
        axis.axvline(1, color='black', linewidth=0.8)
        axis.invert_yaxis()
        axis.set_xlim(0, max(1.2, *ratios) * 1.1)
        axis.set_xlabel(f'speed / {experiment.baselines[0]}')
        axis.set_title(experiment.title.removeprefix('models, '), fontsize=9)
        for i, ratio in enumerate(ratios):
            axis.text(0.01, i, f'{ratio:.2f}', va='center', color='white', fontsize=9)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'chart.png'
        figure.savefig(file, dpi=110, metadata={'Software': None})
        write_atomically(path, file.read_bytes())
    plt.close(figure)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not a whole number above zero')
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--suite',
        action='store_true',
        help='everything results/README.md reports for the device: models in inference and training, '
        'the layers alone; only --device, --threads, --quick, --out, --name apply',
    )
    parser.add_argument(
        '--imports',
        action='store_true',
        help='measure instead what registering the models adds to `import torch` and `import timm`',
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=SUITE_MODELS,
        metavar='MODEL',
        help='timm names, with or without a suffix (default: %(default)s)',
    )
    parser.add_argument(
        '--baseline',
        nargs='+',
        metavar='MODEL',
        help='one or more of the models that the others are compared with (default: the first)',
    )
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='default: %(default)s')
    parser.add_argument('--dtype', default='float32', choices=DTYPES, help='default: %(default)s')
    parser.add_argument('--channels-last', action='store_true', help='channels-last memory format')
    parser.add_argument('--compile', action='store_true', help='torch.compile every model')
    parser.add_argument('--train', action='store_true', help='measure a training step in place of inference')
    parser.add_argument('--batch', type=positive, default=8, help='images in a batch (default: %(default)s)')
    parser.add_argument('--size', type=positive, default=224, help='height and width in pixels (default: %(default)s)')
    parser.add_argument('--rounds', type=positive, default=25, help='rounds to measure (default: %(default)s)')
    parser.add_argument('--threads', type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        '--quick',
        action='store_true',
        help='three rounds of small batches, to try the command; the figures mean little',
    )
    parser.add_argument('--out', default='results', help='folder for the files (default: %(default)s)')
    parser.add_argument(
        '--name',
        help='files are benchmark_NAME.csv, .md, .png and benchmark_NAME_rounds.csv '
        '(default: the device with --suite, imports with --imports, else custom)',
    )
    args = parser.parse_args(argv)
    if args.train:
        args.models = [m for m in args.models if args.models is not SUITE_MODELS or m in TRAINABLE]
    return args


def chosen(args: argparse.Namespace) -> list[Experiment]:
    """The experiments of the command line."""
    if args.suite:
        return suite(args.device, args.quick)
    if args.imports:
        return [import_experiment(module, args.rounds) for module in ('torch', 'timm')]
    specs = list(dict.fromkeys(args.models))
    baselines = args.baseline or specs[:1]
    for name in baselines:
        if name not in specs:
            raise UserError(f'baseline {name!r} is not among the models: {", ".join(specs)}')
    for spec in specs:
        with torch.device('meta'):  # a wrong name stops here, before anything is measured
            create(spec)
        if args.train and spec.endswith(':reparameterized'):
            raise UserError(f'{spec} has no norms left to train; leave it out or leave out --train')
    rounds, batch, size = (3, 2, min(args.size, 64)) if args.quick else (args.rounds, args.batch, args.size)
    setting = Setting(args.device, args.dtype, args.channels_last, args.compile, args.train, batch, size)
    return [models_experiment(specs, baselines, setting, rounds)]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # else torch's profiler talks of its own start and stop
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('torch finds no CUDA device here; leave out --device cuda, or run where there is a GPU')
    if args.threads:
        torch.set_num_threads(args.threads)
    experiments = chosen(args)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot write to {out}: {e.strerror}; give another --out') from e
    rates: dict[str, float] = {}
    for experiment in tqdm(experiments, desc='experiments', disable=len(experiments) == 1 or None):
        try:
            measure_experiment(experiment, rates)
        except torch.OutOfMemoryError as e:
            raise UserError(f'{experiment.title} does not fit into memory; give a smaller --batch') from e
        tqdm.write(experiment_table(experiment.rows) + '\n')
    stem = f'benchmark_{args.name or (args.device if args.suite else "imports" if args.imports else "custom")}'
    words = sys.argv[1:] if argv is None else argv
    text = report(experiments, ' '.join(['python scripts/benchmark.py', *words]), args.suite)
    write_csv(out / f'{stem}.csv', COLUMNS, [row for e in experiments for row in e.rows])
    write_csv(out / f'{stem}_rounds.csv', ROUND_COLUMNS, [row for e in experiments for row in e.round_rows])
    write_atomically(out / f'{stem}.md', text.encode())
    chart(experiments, out / f'{stem}.png')
    print(f'wrote {out}/{stem}.csv, {stem}_rounds.csv, {stem}.md and {stem}.png')


if __name__ == '__main__':
    run(main)
