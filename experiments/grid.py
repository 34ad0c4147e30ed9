"""A grid of runs, models x seeds under one protocol: made, written down, tabulated and drawn.

One process owns the folder and writes its files. What makes a run (`make_run`) touches nothing but that run's own
folders and returns its rows, so an executor may call it anywhere.
"""

import platform
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

import timm_senetv2
from timm_senetv2.errors import UserError, one_line, printable
from timm_senetv2.files import output_folder
from timm_senetv2.profile import Profile, count

from . import fresh, step_time
from .batches import Batches
from .data import ImageData, load_dataset
from .files import FORMAT, TOOL, Row, add_run, check_out, order_runs, owned, read_results, rows_of, write_text
from .plots import plot_accuracy, plot_cost, plot_curves
from .settings import ModelSpec, Settings, parse_specs, run_id
from .tables import page
from .training import History, Progress, check_optimizer, train
from .warm_start import Source, build, load_source, save


@dataclass(frozen=True)
class Run:
    """One training: a model under a seed."""

    spec: ModelSpec
    seed: int
    name: str  # also of its folder


@dataclass(frozen=True)
class Job:
    """What all runs of a grid have in common."""

    settings: Settings
    out: Path
    command: str
    data_dir: str | None = None
    download: bool = True
    workers: int = 4
    init: str | None = None
    save_weights: bool = False
    keep_checkpoints: bool = False
    measure_fresh: bool = False
    step_time: bool = False


@dataclass(frozen=True)
class Made:
    """A finished run and its rows, one for results.csv and one an epoch for curves.csv."""

    run: Run
    row: dict[str, Any]
    curve: list[dict[str, Any]]
    fresh: list[dict[str, Any]] = field(default_factory=list)  # for fresh.csv


Executor = Callable[[Sequence[Run], Job, Batches, Source | None, tqdm], Generator[Made, None, None]]


def one_after_the_other(
    runs: Sequence[Run], job: Job, batches: Batches, source: Source | None, bar: tqdm
) -> Generator[Made, None, None]:
    """The executor that makes the runs in this process."""
    for run in runs:
        start = bar.n
        bar.set_description(f'{run.spec} seed {run.seed}')

        def progress(done: float, history: History, run: Run = run, start: float = start) -> None:
            if history:
                bar.set_description(f'{run.spec} seed {run.seed}: {history[-1]["accuracy"]:.2f} %', refresh=False)
            bar.update(start + done - bar.n)

        yield make_run(run, job, batches, source, progress)


def make_run(run: Run, job: Job, batches: Batches, source: Source | None, progress: Progress) -> Made:
    """Train one model, from the last finished epoch in its folder if there is one, and return its rows.

    Writes its checkpoints, in job.out/runs/NAME, and its weights where they are asked for, in job.out/weights/NAME.
    """
    torch.backends.cudnn.deterministic = True
    settings = job.settings
    run_dir = job.out / 'runs' / run.name
    watched: dict[str, Any] = {}
    if job.measure_fresh and run.spec.start == 'lift' and source is not None:
        watched = dict(after_epoch=fresh.watch(source, batches, run.seed, run_dir / 'fresh.csv'))
    model, history = train(run.spec, run.seed, settings, batches, source, run_dir, progress, **watched)
    costs = profile(run.spec, batches, source)
    if job.save_weights:
        with output_folder(job.out / 'weights' / run.name, TOOL) as folder:
            save(model, folder, batches.data.classes, batches.data_config(model))
    columns = dict(format=FORMAT, run=run.name, model=str(run.spec), seed=run.seed)
    curve = [
        {
            **columns,
            'epoch': int(row['epoch']) + 1,
            'lr': f'{row["lr"]:.6g}',
            'accuracy': f'{row["accuracy"]:.4f}',
            'train_loss': f'{row["train_loss"]:.6f}',
            'test_loss': f'{row["test_loss"]:.6f}',
        }
        for row in history
    ]
    best = max(history, key=lambda row: row['accuracy'])
    row = dict(
        **columns,
        accuracy=f'{history[-1]["accuracy"]:.4f}',
        loss=f'{history[-1]["test_loss"]:.6f}',
        best_accuracy=f'{best["accuracy"]:.4f}',
        best_epoch=int(best['epoch']) + 1,
        parameters=costs.params,
        gmacs=f'{costs.macs / 1e9:.6f}',
        seconds=f'{sum(row["seconds"] for row in history):.1f}',
        **asdict(settings),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_senetv2=timm_senetv2.__version__,
        python=platform.python_version(),
        processor=torch.cuda.get_device_name() if settings.device == 'cuda' else platform.machine(),
        command=job.command,
    )
    return Made(run, row, curve, fresh.rows(run_dir / 'fresh.csv', columns) if watched else [])


def profile(spec: ModelSpec, batches: Batches, source: Source | None = None) -> Profile:
    """What the model costs at the size of the images; a UserError if it cannot be built or cannot take them."""
    classes = len(batches.data.classes)
    model = build(spec, classes, source, shapes_only=True)
    batches.check(model)
    size = batches.data_config(model)['input_size']
    try:
        costs = count(model, size)
        logits = model.eval()(torch.empty(1, *size, device='meta'))
    except Exception as e:  # a wrong option shows as anything
        raise UserError(
            f'{spec} cannot take images of {" x ".join(map(str, size))} (channels, height, width): '
            f'{one_line(e)}; give another --image-size or other options'
        ) from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        raise UserError(f'{spec} is no classifier: it does not put out {classes} logits an image')
    return costs


def reproduce(
    models: Sequence[str],
    seeds: Sequence[int],
    job: Job,
    baseline: str | None = None,
    executor: Executor = one_after_the_other,
) -> str:
    """Make the runs of a grid that are not yet in the job's folder, and its table and plots.

    Args:
        models: Command-line words, see `parse_specs`.
        seeds: Each model is trained under each.
        job: Settings and folder.
        baseline: The model that the others are compared with; the first if None.
        executor: Makes the runs, and yields each when it is finished, in any order.

    Returns:
        The table.

    Raises:
        UserError: A mistake on the command line or in the folder, found before anything is trained; a damaged image or
            a full disk, on which the finished runs are kept.
    """
    specs = list(dict.fromkeys(spec for word in models for spec in parse_specs(word)))
    check_out(job.out)
    results, _ = read_results(job.out)
    check_optimizer(job.settings)
    source = load_source(job.init) if job.init else None
    if source is not None:
        job = replace(job, settings=replace(job.settings, init=source.sha256))
    settings = job.settings
    reference = baseline_of(baseline, specs, rows_of(results, settings))
    data = load_dataset(settings.dataset, job.data_dir, job.download, settings.limit)
    batches = Batches(data, settings, job.workers)
    _check_models(specs, seeds, batches, source, rows_of(results, settings), job.out)

    grid = [Run(spec, seed, run_id(str(spec), seed, settings)) for seed in dict.fromkeys(seeds) for spec in specs]
    with owned(job.out):
        results, _ = read_results(job.out)
        finished = {row['run'] for row in results}
        left = [run for run in grid if run.name not in finished]
        epochs = sum(run.spec.settings(settings).epochs for run in grid)
        bar = tqdm(
            total=epochs,
            initial=epochs - sum(run.spec.settings(settings).epochs for run in left),
            unit='epoch',
            bar_format='{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}]',
            disable=None,
            mininterval=1,
        )
        # an executor may have tasks elsewhere to end: before the folder is anybody else's, whatever happens here
        with bar, closing(executor(left, job, batches, source, bar)) as coming:
            for made in coming:
                if made.fresh:
                    fresh.add(job.out, made.fresh)
                add_run(job.out, made.row, made.curve)
                if not job.keep_checkpoints:
                    shutil.rmtree(job.out / 'runs' / made.run.name, ignore_errors=True)
                tqdm.write(
                    f'{made.run.spec} seed {made.run.seed}: accuracy {float(made.row["accuracy"]):.2f} % after '
                    f'{len(made.curve)} epochs, best {float(made.row["best_accuracy"]):.2f} %'
                )
        names = [run.name for run in left]
        order_runs(job.out, names)
        fresh.order(job.out, names)
        if job.step_time:
            timed = specs if reference in map(str, specs) else [*parse_specs(reference), *specs]
            step_time.write(job.out, step_time.step_times(timed, reference, settings, batches, source, job.command))
        return report(job.out, settings, reference)


def _check_models(
    specs: Sequence[ModelSpec],
    seeds: Sequence[int],
    batches: Batches,
    source: Source | None,
    rows: Sequence[Row],
    out: Path,
) -> None:
    """Raise a UserError if a model cannot be trained as asked for, or is no longer what it was in finished runs."""
    data = batches.data
    _check_data(data, batches.settings, seeds)
    for spec in specs:
        costs = profile(spec, batches, source)
        if spec.start != 'scratch':
            build(spec, len(data.classes), source)
        for row in rows:
            if row['model'] == str(spec) and int(row['parameters']) != costs.params:
                raise UserError(
                    f'{printable(out / "results.csv")} has {spec} with {row["parameters"]} parameters, and it has '
                    f'{costs.params} now: the classes of {printable(data.name)} or the model have changed, or the '
                    f'file was edited; give another --out'
                )


def _check_data(data: ImageData, settings: Settings, seeds: Sequence[int]) -> None:
    if len(data.train) < 2:
        raise UserError(f'{printable(data.name)} has {len(data.train)} training images, and batch norm needs two')
    if settings.per_class:
        data.few(settings.per_class, seeds[0])


def baseline_of(word: str | None, specs: list[ModelSpec], rows: list[Row]) -> str:
    """The model that the others are compared with: the one asked for, if it is of this grid or of finished runs."""
    if word is None:
        return str(specs[0])
    chosen = parse_specs(word)
    if len(chosen) > 1 or str(chosen[0]) not in {*map(str, specs), *(row['model'] for row in rows)}:
        raise UserError(f'--baseline {word} must be one of the models: {", ".join(map(str, specs))}')
    return str(chosen[0])


def report(out: Path, settings: Settings, baseline: str) -> str:
    """Write table and plots of all runs in `out` under these settings, and return the table."""
    results, curves = read_results(out)
    rows = rows_of(results, settings)
    runs = {row['run'] for row in rows}
    text = page(rows, baseline)
    write_text(out / 'table.md', text)
    write_text(out / 'accuracy_vs_parameters.png', plot_accuracy(rows))
    write_text(out / 'curves.png', plot_curves([row for row in curves if row['run'] in runs]))
    fresh.draw(out)
    if times := step_time.read(out):
        write_text(out / 'accuracy_vs_cost.png', plot_cost(rows, times))
        text += f'\n{step_time.table(times, results)}'
    return text
