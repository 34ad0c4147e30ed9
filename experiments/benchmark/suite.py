"""Which settings belong together, and how one of them is measured."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import timm
import torch

from timm_senetv2.layers import ChannelAggregation, SqueezeAggregatedExcitation

from .contestants import (
    LAYOUTS,
    FourBranchSaE,
    Setting,
    compiled,
    layer_contestant,
    model_contestant,
)
from .engines import ENGINES
from .timing import Contestant, compare, kernels, machine, matrix_rate, measure, peak_bytes, quartiles


def _beside_timm(depth: int) -> list[str]:
    return [f'resnet{depth}', f'seresnet{depth}', f'senetv2_resnet{depth}', f'senetv2_resnet{depth}:reparameterized']


MODELS = _beside_timm(50)
BESIDE = 'beside '  # how the titles begin of experiments with one model of ours, the plain one and timm's with SE
TRIOS = {
    **{f'senetv2_resnet{depth}': (f'resnet{depth}', f'seresnet{depth}') for depth in (18, 34, 50, 101, 152)},
    'senextv2_50': ('resnext50_32x4d', 'seresnext50_32x4d'),
    'senextv2_101_32x4d': ('resnext101_32x4d', 'seresnext101_32x4d'),
    'senextv2_101_32x8d': ('resnext101_32x8d', 'seresnext101_32x8d'),
    'senextv2_101_64x4d': ('resnext101_64x4d', 'seresnext101_64x4d'),
    'cifar_senetv2_resnet20': ('cifar_resnet20', 'cifar_seresnet20'),
}
SAE_SIZES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
AGGREGATION_SIZES = ((128, 32), (256, 16), (512, 8))  # seanet20's stages
AGGREGATION_BATCHES = (8, 128)  # as the models above, and as the paper trains: tensors that fit the caches, and not

Row = dict[str, Any]  # of one of the files that `report` writes


@dataclass
class Experiment:
    """Contestants that run side by side.

    Attributes:
        title: Says it all; unique in a suite.
        setting: The columns of its rows.
        build: Makes the contestants, by name.
        baselines: Those that all are compared with.
        profiled: Whether the kernels of each contestant are listed as well.
    """

    title: str
    setting: Setting
    build: Callable[[], dict[str, Contestant]]
    baselines: tuple[str, ...]
    rounds: int
    profiled: bool = False


def trainable(specs: list[str]) -> list[str]:
    """The models that still have norms."""
    return [spec for spec in specs if not spec.endswith(':reparameterized')]


def models_experiment(
    specs: list[str],
    baselines: list[str],
    setting: Setting,
    rounds: int,
    profiled: bool = False,
    title: str = 'models, ',
) -> Experiment:
    specs = trainable(specs) if setting.training else specs
    return Experiment(
        f'{title}{setting}',
        setting,
        lambda: {spec: model_contestant(spec, setting) for spec in specs},
        tuple(name for name in baselines if name in specs),
        rounds,
        profiled,
    )


def layer_experiment(
    title: str, layers: Callable[[], dict[str, Callable]], channels: int, setting: Setting, rounds: int, backward: bool
) -> Experiment:
    def build() -> dict[str, Contestant]:
        torch.manual_seed(0)
        dtype = getattr(torch, setting.dtype)
        x = torch.randn(setting.batch, channels, setting.size, setting.size, device=setting.device, dtype=dtype)
        x = x.to(memory_format=LAYOUTS[setting.layout])
        return {name: layer_contestant(layer, x, backward) for name, layer in layers().items()}

    shape = f'{channels}x{setting.size}x{setting.size}'
    what = 'forward and backward' if backward else 'forward'
    return Experiment(
        f'{title}, {shape}, {what}, {setting.device}, {setting.dtype}, {setting.layout}',
        setting,
        build,
        (next(iter(layers())),),
        rounds,
    )


def sae_experiment(channels: int, size: int, setting: Setting, rounds: int) -> Experiment:
    return layer_experiment(
        'SaE layer',
        lambda: {'four-branch SaE': FourBranchSaE(channels), 'SaE': SqueezeAggregatedExcitation(channels)},
        channels,
        replace(setting, size=size),
        rounds,
        backward=True,
    )


def aggregation_experiment(channels: int, size: int, setting: Setting, rounds: int, backward: bool) -> Experiment:
    return layer_experiment(
        f'channel aggregation, batch {setting.batch}',
        lambda: {'clone': torch.clone, 'aggregation': ChannelAggregation()},
        channels,
        replace(setting, size=size),
        rounds,
        backward,
    )


def _trios(base: Setting, rounds: int, quick: bool) -> list[Experiment]:
    found = []
    for ours, (plain, se) in TRIOS.items():
        setting = replace(base, size=32, batch=16 * base.batch) if ours.startswith('cifar') else base
        if quick:
            setting = replace(base, size=32, batch=2)
        title = f'{BESIDE}{ours}, '
        found.append(models_experiment([plain, se, ours], [plain, se], setting, 3 if quick else rounds, title=title))
    return found[::4] if quick else found


def _layers(base: Setting, quick: bool) -> list[Experiment]:
    rounds, found = 3 if quick else 41, []
    for layout in LAYOUTS:
        setting = replace(base, layout=layout)
        found += [sae_experiment(c, size, setting, rounds) for c, size in SAE_SIZES]
        found += [
            aggregation_experiment(c, size, replace(setting, batch=batch), rounds, backward)
            for batch in ((setting.batch,) if quick else AGGREGATION_BATCHES)
            for backward in (False, True)
            for c, size in AGGREGATION_SIZES
        ]
    return found


def suite(device: str, quick: bool = False) -> dict[str, list[Experiment]]:
    """Everything that results/ reports of a device, by part. `quick` is for trying it: its figures mean little."""
    names = _beside_timm(18 if quick else 50)
    ports = [*names, f'{names[2]}:four-branch']

    def models(
        settings: list[Setting], rounds: int, specs: list[str] = names, profiled: bool = False
    ) -> list[Experiment]:
        if quick:
            rounds = 3
            settings = list(dict.fromkeys(replace(s, batch=2, size=min(s.size, 64)) for s in settings))
        return [models_experiment(specs, specs[:2], setting, rounds, profiled) for setting in settings]

    def settings(base: Setting, batches: tuple[int, ...], layouts: Iterable[str] = LAYOUTS) -> list[Setting]:
        return [replace(base, batch=batch, layout=layout) for layout, batch in product(layouts, batches)]

    if device == 'cuda':
        base = Setting('cuda', dtype='bfloat16', layout='channels-last')
        training = replace(base, training=True, autocast=True)
        parts = {}
        for name, runtime in (
            ('eager', 'eager'),
            ('compiled', 'compiled'),
            ('max-autotune', compiled('max-autotune')),
        ):
            last, step = replace(base, runtime=runtime), replace(training, runtime=runtime)
            parts[f'{name}-inference'] = models(settings(last, (1, 64, 256), ('channels-last',)), 50, profiled=True)
            parts[f'{name}-training'] = models(settings(step, (128, 256), ('channels-last',)), 50, profiled=True)
        seanet = [replace(training, runtime=runtime, batch=512, size=32) for runtime in ('eager', 'compiled')]
        parts['seanet'] = models(seanet, 50, ['seanet20'], profiled=True)
        parts['models'] = _trios(replace(base, batch=256), 25, quick)
        parts['layers'] = _layers(replace(base, batch=2 if quick else 128), quick)
        return parts

    base = Setting()
    half, inductor = replace(base, dtype='bfloat16'), replace(base, runtime='compiled')
    engines = [replace(base, runtime=engine, batch=batch) for engine in ENGINES for batch in (1, 8)]
    return {
        'inference': models(settings(base, (1, 8)), 25, ports) + models(settings(base, (32,)), 11),
        'training': models(settings(replace(base, training=True), (8,)), 11, ports),
        'bfloat16-inference': models(settings(half, (1, 8)), 25) + models(settings(half, (32,)), 11),
        'bfloat16-training': models(settings(replace(half, training=True), (8,)), 11),
        'compiled-inference': models(settings(inductor, (1, 8)), 25) + models(settings(inductor, (32,)), 11),
        'compiled-training': models(settings(replace(inductor, training=True), (8,)), 41),
        'engines': models(engines, 25),
        'models': _trios(replace(base, layout='channels-last'), 15, quick),
        'layers': _layers(replace(base, batch=2) if quick else base, quick),
    }


def measure_experiment(experiment: Experiment) -> tuple[list[Row], list[Row], list[Row]]:
    """Run it.

    Returns:
        The rows of the three files of `report`: the medians, the times of all rounds, and the kernels.
    """
    setting = experiment.setting
    torch.compiler.reset()  # else a batch or layout that is new makes torch compile for any size
    contestants = experiment.build()
    times = measure(contestants, experiment.rounds, setting.device, experiment.title)
    peaks = {name: peak_bytes(c, setting.device) for name, c in contestants.items() if c.own_bytes is not None}
    counted = any(c.flops for c in contestants.values())
    rate = matrix_rate(setting.device, getattr(torch, setting.dtype)) if counted else 0
    shared = dict(
        experiment=experiment.title,
        device=setting.device,
        runtime=setting.runtime,
        dtype=setting.dtype,
        autocast=setting.autocast,
        layout=setting.layout,
        training=setting.training,
        batch=setting.batch,
        size=setting.size,
        rounds=experiment.rounds,
        machine=machine(setting.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
    )
    rows, round_rows, kernel_rows = [], [], []
    for name, contestant in contestants.items():
        low, middle, high = quartiles(times[name])
        own = dict(
            contestant=name,
            ms=f'{middle * 1e3:.4g}',
            ms_q1=f'{low * 1e3:.4g}',
            ms_q3=f'{high * 1e3:.4g}',
            images_per_s=f'{contestant.images / middle:.4g}' if contestant.images else '',
            peak_mib=f'{peaks[name] / 2**20:.1f}' if name in peaks else '',
            matrix_share=f'{contestant.flops / middle / rate:.3f}' if contestant.flops else '',
        )
        for baseline in experiment.baselines:
            q1, median, q3, difference = compare(times[baseline], times[name])
            rows.append(
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
        round_rows += [
            dict(experiment=experiment.title, contestant=name, round=i, ms=f'{t * 1e3:.6g}')
            for i, t in enumerate(times[name])
        ]
        if experiment.profiled:
            kernel_rows += [
                dict(
                    experiment=experiment.title,
                    contestant=name,
                    kernel=kernel[:200],
                    kind=kind,
                    calls=f'{calls:g}',
                    ms=f'{ms:.4g}',
                )
                for kernel, kind, calls, ms in kernels(contestant, setting.device)
            ]
    del contestants
    gc.collect()
    if setting.device == 'cuda':
        torch.cuda.empty_cache()
    return rows, round_rows, kernel_rows
