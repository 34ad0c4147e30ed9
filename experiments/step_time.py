"""How long a step of training, and of inference, takes for the models of a grid, side by side."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import NativeScaler

from .batches import Batches
from .benchmark.timing import Contestant, compare, machine, measure, quartiles
from .files import Row, write_csv
from .settings import ModelSpec, Settings
from .training import autocast, start, start_optimizer, update
from .warm_start import Source, set_training

FILE = 'step_times.csv'
COLUMNS = (
    'model',
    'baseline',
    'mode',
    'batch',
    'rounds',
    'ms',
    'ms_q1',
    'ms_q3',
    'times_baseline',  # median over the rounds of time / the baseline's in the same round
    'times_q1',
    'times_q3',
    'device',
    'amp',
    'channels_last',
    'compile',
    'machine',
    'threads',
    'torch',
    'timm',
    'command',
)
ROUNDS = 21


def step_times(
    specs: Sequence[ModelSpec],
    baseline: str,
    settings: Settings,
    batches: Batches,
    source: Source | None,
    command: str,
    rounds: int | None = None,
) -> list[dict[str, Any]]:
    """Time each model as the grid trains and tests it, round by round in one process. Rows of step_times.csv.

    A step of training holds one batch that is on the device already: forward pass, loss, backward pass, optimizer. One
    of inference is the forward pass of the same batch.
    """
    rounds = rounds or ROUNDS
    rows = []
    for mode in ('training', 'inference'):
        contestants = {str(spec): _contestant(spec, mode, settings, batches, source) for spec in specs}
        times = measure(contestants, rounds, settings.device, f'step time, {mode}')
        for name, values in times.items():
            q1, median, q3 = quartiles(values)
            low, middle, high, _ = compare(values, times[baseline])  # theirs over the baseline's
            rows.append(
                dict(
                    model=name,
                    baseline=baseline,
                    mode=mode,
                    batch=contestants[name].images,
                    rounds=rounds,
                    ms=f'{median * 1e3:.4g}',
                    ms_q1=f'{q1 * 1e3:.4g}',
                    ms_q3=f'{q3 * 1e3:.4g}',
                    times_baseline=f'{middle:.4f}',
                    times_q1=f'{low:.4f}',
                    times_q3=f'{high:.4f}',
                    device=settings.device,
                    amp=settings.amp or '',
                    channels_last=settings.channels_last,
                    compile=settings.compile,
                    machine=machine(settings.device),
                    threads=torch.get_num_threads(),
                    torch=torch.__version__,
                    timm=timm.__version__,
                    command=command,
                )
            )
    return rows


def _contestant(spec: ModelSpec, mode: str, settings: Settings, batches: Batches, source: Source | None) -> Contestant:
    settings = spec.settings(settings)
    torch.manual_seed(0)
    model = start(spec, settings, batches, source)
    training, _ = batches.of(model, 0)
    images, targets = next(iter(training.batches(0)))
    forward: Any = torch.compile(model) if settings.compile else model
    amp = autocast(settings)
    if mode == 'training':
        # no schedule, and steps too small to lead anywhere: it is the time that counts
        optimizer, _ = start_optimizer(model, spec, settings, len(training), source)
        for group in optimizer.param_groups:
            group['lr'] = 1e-6
        scaler = NativeScaler(device=settings.device) if settings.amp == 'float16' else None
        set_training(model)

        def step() -> None:
            update(forward, images, targets, settings, amp, optimizer, scaler)
    else:
        model.eval()

        def step() -> None:
            with torch.inference_mode(), amp:
                forward(images)

    return Contestant(step, images=len(images))


def write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_csv(out / FILE, COLUMNS, rows)


def read(out: Path) -> list[Row]:
    """The rows of step_times.csv in a folder, none where there is none."""
    if not (out / FILE).exists():
        return []
    with (out / FILE).open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[Row], results: Sequence[Row]) -> str:
    """Cost of each model, in Markdown: parameters, multiply-adds, and the times of a step.

    Args:
        rows: Of step_times.csv.
        results: Of results.csv, which has parameters and multiply-adds.
    """
    baseline = rows[0]['baseline']
    costs = {row['model']: (int(row['parameters']), float(row['gmacs'])) for row in results}
    lines = [
        '| model | parameters | GMACs | training step, ms | / baseline | inference, ms | / baseline |',
        '|---|--:|--:|--:|--:|--:|--:|',
    ]
    for model in dict.fromkeys(row['model'] for row in rows):
        parameters, gmacs = costs[model]
        cells = [f'`{model}`'.replace('|', r'\|'), f'{parameters:,}', f'{gmacs:.4f}']
        for mode in ('training', 'inference'):
            (row,) = (row for row in rows if (row['model'], row['mode']) == (model, mode))
            share = f'{float(row["times_baseline"]):.2f} [{float(row["times_q1"]):.2f}, {float(row["times_q3"]):.2f}]'
            cells += [f'{float(row["ms"]):.1f}', 'baseline' if model == baseline else share]
        lines.append(f'| {" | ".join(cells)} |')
    row = rows[0]
    kind = f'{row["amp"] or "float32"}{", channels-last" if row["channels_last"] == "True" else ""}'
    return '\n'.join(lines) + (
        f'\n\nA step has a batch of {row["batch"]} images; {row["device"]} ({row["machine"]}, {row["threads"]} '
        f'thread{"" if row["threads"] == "1" else "s"}), '
        f'{"compiled" if row["compile"] == "True" else "eager"}, {kind}. '
        f'Medians of {row["rounds"]} rounds in which all models run in turn; in brackets the quartiles of the ratio of '
        f'two times in one round. Training is forward pass, loss, backward pass and optimizer. The baseline is '
        f'`{baseline}`.\n'
    )
