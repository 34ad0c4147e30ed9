"""Files, tables and plots of the runs that reproduce.py makes."""

import csv
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _cli import UserError
from scipy import stats

FORMAT = 1  # of results.csv and curves.csv; raise it when a column changes its meaning

NUMBERS = {'seed', 'epoch', 'parameters', 'gmacs', 'loss', 'test_loss', 'accuracy', 'best_accuracy'}  # that are read

Row = dict[str, str]  # of results.csv or curves.csv


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a file written by `write_csv`, none where there is no file."""
    if not path.exists():
        return []
    damaged = UserError(
        f'{path} was written by another version of the script or is damaged; move it away or give another --out'
    )
    try:
        with path.open(newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != columns:
                raise UserError(
                    f'{path} was not written by this version of the script (its columns differ); '
                    f'move it away or give another --out'
                )
            rows = list(reader)
        for row in rows:
            if None in row or None in row.values() or row.get('format', str(FORMAT)) != str(FORMAT):
                raise damaged
            for column in NUMBERS & row.keys():
                float(row[column])
    except (ValueError, csv.Error):  # no UTF-8, no number, a NUL
        raise damaged from None
    return rows


@dataclass(frozen=True)
class Difference:
    """A difference in percentage points, with the ends of its 95 % interval (NaN where there is none)."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    paired: bool = True

    def __str__(self) -> str:
        mean, low, high = (f'{round(value, 2) + 0.0:+.2f}' for value in (self.mean, self.low, self.high))  # no -0.00
        interval = '(one seed)' if math.isnan(self.low) else f'[{low}, {high}]'
        return f'{mean} {interval}{"" if self.paired else " unpaired"}'


def difference(values: dict[str, float], baseline: dict[str, float]) -> Difference:
    """Mean of values - baseline with the 95 % interval of that mean.

    Paired over the seeds (keys) that both have, by Student's t. Where they have none in common, the difference of the
    two means, by Welch's.
    """
    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        a, b = list(values.values()), list(baseline.values())
        mean = float(np.mean(a) - np.mean(b))
        if min(len(a), len(b)) < 2:
            return Difference(mean, paired=False)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        return Difference(mean, float(interval.low), float(interval.high), paired=False)
    differences = np.array([values[seed] - baseline[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) == 1:
        return Difference(mean)
    half = float(stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(differences))
    return Difference(mean, mean - half, mean + half)


def by_model(rows: list[Row]) -> dict[str, list[Row]]:
    models = {}
    for row in rows:
        models.setdefault(row['model'], []).append(row)
    return models


def mean_sd(values: list[float]) -> str:
    """'mean ± sample standard deviation', the mean alone of one value."""
    return f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else f'{values[0]:.2f}'


def table(rows: list[Row], baseline: str) -> str:
    """A Markdown table of runs that share their settings, a line a model."""
    models = by_model(rows)
    reference = {row['seed']: float(row['accuracy']) for row in models.get(baseline, ())}
    lines = [
        '| model | parameters | GMACs | runs | accuracy, % | best epoch, % | test loss | difference, points |',
        '|---|--:|--:|--:|--:|--:|--:|--:|',
    ]
    for model, runs in models.items():
        accuracy = {row['seed']: float(row['accuracy']) for row in runs}
        gap = 'baseline' if model == baseline else str(difference(accuracy, reference)) if reference else ''
        name = model.replace('|', r'\|')
        lines.append(
            f'| `{name}` | {int(runs[0]["parameters"]):,} | {float(runs[0]["gmacs"]):.4f} | {len(runs)} '
            f'| {mean_sd(list(accuracy.values()))} | {mean_sd([float(row["best_accuracy"]) for row in runs])} '
            f'| {np.mean([float(row["loss"]) for row in runs]):.4f} | {gap} |'
        )
    return '\n'.join(lines) + '\n'


def caption(rows: list[Row], baseline: str) -> str:
    """What the table's columns mean, and the protocol in one line."""
    row = rows[0]
    size = f', images of {row["image_size"]} pixels' if row['image_size'] else ''
    limit = f', {row["limit"]} training and test images' if row['limit'] else ''
    return (
        f'{row["dataset"]}{limit}{size}, protocol {row["protocol"]}: {row["opt"]}, lr {row["lr"]}, weight decay '
        f'{row["weight_decay"]}, batch {row["batch_size"]}, {row["epochs"]} epochs. Accuracy on the test images after '
        f'the last epoch, mean ± standard deviation over seeds; the best epoch is chosen on the test images, hence '
        f'optimistic. Difference: to `{baseline}` after the last epoch, paired by seed, with its 95 % interval '
        f'(Student t), or of other seeds and then marked as unpaired (Welch).\n'
    )


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots()
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _colours(count: int) -> list:
    import matplotlib

    if count <= 10:
        return list(matplotlib.colormaps['tab10'].colors[:count])
    return list(matplotlib.colormaps['turbo'](np.linspace(0.05, 0.95, count)))


_MARKERS = 'osD^vP*X<>hp'


def _png(figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=130, metadata={'Software': None})
    return content.getvalue()


def _far_below(accuracy: dict[str, float]) -> set[str]:
    """Models more than 10 points below the median one: in the picture they would squeeze all others together."""
    limit = np.median(list(accuracy.values())) - 10
    return {model for model, value in accuracy.items() if value < limit}


def plot_accuracy(rows: list[Row]) -> bytes:
    """Accuracy against parameters, a point with its standard deviation a model. A PNG."""
    models = by_model(rows)
    figure, axes = _figure(7, 4.5 + 0.1 * len(models))
    accuracy = {model: [float(row['accuracy']) for row in runs] for model, runs in models.items()}
    parameters = {model: int(runs[0]['parameters']) / 1e6 for model, runs in models.items()}
    low, high = min(parameters.values()), max(parameters.values())
    far = _far_below({model: np.mean(values) for model, values in accuracy.items()})
    sizes = np.linspace(11, 5, len(models))  # of two models in one place both are seen
    for model, colour, marker, size in zip(
        models, _colours(len(models)), (_MARKERS * len(models))[: len(models)], sizes, strict=True
    ):
        x, values = parameters[model], accuracy[model]
        if model in far:
            edge, side = axes.get_xaxis_transform(), -1 if x * x > low * high else 1  # the text towards the middle
            axes.plot(x, 0, marker, color=colour, markersize=size, label=model, transform=edge, clip_on=False)
            axes.annotate(
                f'far below: {mean_sd(values)}',
                (x, 0),
                xycoords=edge,
                xytext=(8 * side, 5),
                textcoords='offset points',
                color=colour,
                fontsize=8,
                ha='left' if side > 0 else 'right',
            )
        else:
            axes.errorbar(
                x,
                np.mean(values),
                yerr=np.std(values, ddof=1) if len(values) > 1 else None,
                fmt=marker,
                color=colour,
                capsize=3,
                markersize=size,
                label=model,
            )
    axes.set_xscale('log')
    margin = max(1.05, (high / low) ** 0.08)
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
    axes.xaxis.set_minor_formatter(lambda value, _: f'{value:g}')
    axes.tick_params(axis='x', which='minor', labelsize=8)
    axes.set_xlabel('parameters, millions')
    axes.set_ylabel('test accuracy after the last epoch, %')
    axes.set_title(f'{rows[0]["dataset"]}, {rows[0]["protocol"]}: mean ± standard deviation', fontsize=10)
    figure.legend(loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    return _png(figure)


def plot_curves(rows: list[Row]) -> bytes:
    """Test accuracy by epoch, a line (mean over seeds) a model, with a band (their range) where they are few. A PNG."""
    models = by_model(rows)
    figure, axes = _figure(7, 4.5 + 0.1 * len(models))
    last = max(int(row['epoch']) for row in rows)
    far = _far_below(
        {
            model: np.mean([float(row['accuracy']) for row in epochs if int(row['epoch']) == last])
            for model, epochs in models.items()
        }
    )
    lowest = []
    widths = np.linspace(4.5, 1.2, len(models))  # of two curves in one place both are seen
    for (model, epochs), colour, width in zip(models.items(), _colours(len(models)), widths, strict=True):
        curves = {}
        for row in epochs:
            curves.setdefault(int(row['epoch']), []).append(float(row['accuracy']))
        x = sorted(curves)
        means = [np.mean(curves[epoch]) for epoch in x]
        if model not in far:
            lowest += [min(curves[epoch]) for epoch in x[len(x) // 2 :]]
        label = f'{model} (ends at {means[-1]:.1f})' if model in far else model
        axes.plot(x, means, color=colour, label=label, linewidth=width)
        if len(models) <= 6:  # more bands hide each other
            axes.fill_between(
                x, [min(curves[e]) for e in x], [max(curves[e]) for e in x], color=colour, alpha=0.12, linewidth=0
            )
    low = max(0, min(lowest) - 2)  # the first epochs may run out of the picture: what differs is at the end
    axes.set_ylim(low, min(100.5, axes.get_ylim()[1]))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel('epoch')
    axes.set_ylabel('test accuracy, %')
    title = 'mean over seeds' if len(models) > 6 else 'mean and range over seeds'
    axes.set_title(f'test accuracy by epoch: {title}', fontsize=10)
    figure.legend(loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    return _png(figure)
