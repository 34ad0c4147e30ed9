"""Measure what Ray costs a run: the same grid of tiny runs without it, and on clusters of this machine.

The runs differ only in their seed and take a fraction of a second each. Made one at a time by Ray, what each takes
longer than without it is the engine's cost: scheduling, the way of the rows back, and the run in another process. The
rows of all ways are compared, and have to be equal.

`python scripts/sweep_cost.py` is its command.
"""

import contextlib
import csv
import io
import os
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timm_senetv2.errors import UserError
from timm_senetv2.files import write_atomically

from .benchmark.timing import machine
from .files import check_table, read_results
from .grid import Executor, Job, Made, one_after_the_other, reproduce
from .ray_executor import LOCAL, on_ray
from .settings import PROTOCOLS, Settings

COLUMNS = ('way', 'at_once', 'runs', 'rounds', 'start_s', 'run_ms', 'run_ms_least', 'run_ms_most', 'machine', 'torch')
SETTINGS = Settings(
    dataset='digits',
    limit=48,
    image_size=8,
    protocol='modern',
    **{**PROTOCOLS['modern'], 'epochs': 1, 'batch_size': 16},
    crop_padding=1,
    hflip=False,
    ema_decay=None,
    amp=None,
    channels_last=False,
    compile=False,
    device='cpu',
)


def measure(executor: Executor, runs: int) -> tuple[float, float, list[Any]]:
    """Seconds until the first run is made, seconds of each further one, and the rows, which are compared."""
    times = []

    def timed(*args: Any) -> Generator[Made, None, None]:
        times.append(time.perf_counter())
        with contextlib.closing(executor(*args)) as coming:
            for made in coming:
                times.append(time.perf_counter())
                yield made

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        reproduce(['small_cnn'], range(runs), Job(SETTINGS, Path(folder), command=''), executor=timed)
        results, curves = read_results(Path(folder))
    rows = [{k: v for k, v in row.items() if k != 'seconds'} for row in results]
    return times[1] - times[0], (times[-1] - times[1]) / (runs - 1), [rows, curves]


def write_costs(out: Path, runs: int, rounds: int) -> None:
    """Measure each way so many times, in turn, and write the table.

    Raises:
        UserError: The rows of two ways differ, or the file is another table; nothing was written.
    """
    check_table(out, COLUMNS)
    torch.set_num_threads(1)
    cores = os.cpu_count() or 1
    ways: dict[tuple[str, int], Executor] = {('without Ray', 1): one_after_the_other}
    for at_once in dict.fromkeys((1, cores)):
        ways['with Ray', at_once] = on_ray(LOCAL, 'cpu', cpus_per_run=cores // at_once)
    measured: dict[tuple[str, int], list[tuple[float, float, list[Any]]]] = {way: [] for way in ways}
    for _ in tqdm(range(rounds), 'rounds'):
        for way, executor in ways.items():
            measured[way].append(measure(executor, runs))
    first = next(iter(measured.values()))[0][2]
    if any(rows != first for times in measured.values() for *_, rows in times):
        raise UserError('the rows of one way differ from those of another; nothing was written')
    with write_atomically(out) as temporary, temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        for (title, at_once), times in measured.items():
            per_run = [1000 * seconds for _, seconds, _ in times]
            row = (
                title,
                at_once,
                runs,
                rounds,
                f'{statistics.median(start for start, *_ in times):.1f}',
                f'{statistics.median(per_run):.1f}',
                f'{min(per_run):.1f}',
                f'{max(per_run):.1f}',
                machine('cpu'),
                torch.__version__,
            )
            writer.writerow(dict(zip(COLUMNS, row, strict=True)))
