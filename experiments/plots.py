"""Pictures: accuracy and curves of a grid of runs, and what the quickstart's model makes of images."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import Row, by_model
from .statistics import Difference, mean_sd

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .data import ImageData

INK, FAINT, WRONG = '#22303c', '#c8d0d6', '#c8372d'
COLOURS = ('#7f8c99', '#e0a030', '#2a9d8f', '#3559c7', '#a44aa8', '#6b8e23')
COLUMNS = 10  # of the quickstart's images
_MARKERS = 'osD^vP*X<>hp'


def _style(**more: Any) -> Any:
    """Settings of matplotlib for a picture: names of classes and models are plain text, whatever is in them."""
    import matplotlib

    settings: dict[Any, Any] = {'text.parse_math': False, 'text.usetex': False, **more}
    return matplotlib.rc_context(settings)


def _figure(width: float, height: float) -> tuple['Figure', 'Axes']:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots()
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _colours(count: int) -> list[Any]:
    import matplotlib

    if count <= 10:
        return list(matplotlib.colormaps['tab10'](np.arange(count)))
    return list(matplotlib.colormaps['turbo'](np.linspace(0.05, 0.95, count)))


def _png(figure: 'Figure') -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=130, metadata={'Software': None})
    return content.getvalue()


def _legend(figure: 'Figure') -> None:
    """The models below the picture, in two columns if their names are short."""
    _, labels = figure.axes[0].get_legend_handles_labels()
    room = 7.5 * figure.get_figwidth()  # letters in a column
    columns = 2 if max(map(len, labels), default=0) <= room else 1
    figure.legend(loc='outside lower center', ncols=columns, fontsize=8, frameon=False)


def _far_below(accuracy: dict[str, float]) -> set[str]:
    """Models more than 10 points below the median one: in the picture they would squeeze all others together."""
    limit = np.median(list(accuracy.values())) - 10
    return {model for model, value in accuracy.items() if value < limit}


def plot_accuracy(rows: list[Row]) -> bytes:
    """Accuracy against parameters, a point with its standard deviation a model. A PNG."""
    models = by_model(rows)
    with _style():
        figure, axes = _figure(7, 4.5 + 0.1 * len(models))
        accuracy = {model: [float(row['accuracy']) for row in runs] for model, runs in models.items()}
        parameters = {model: int(runs[0]['parameters']) / 1e6 for model, runs in models.items()}
        low, high = min(parameters.values()), max(parameters.values())
        far = _far_below({model: float(np.mean(values)) for model, values in accuracy.items()})
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
                    xytext=(8 * side, 5 + 11 * sorted(far).index(model)),  # one above another
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
        _legend(figure)
        return _png(figure)


def plot_curves(rows: list[Row]) -> bytes:
    """Test accuracy by epoch, a line (mean over seeds) a model, with a band (their range) where they are few. A PNG."""
    models = by_model(rows)
    ends = {model: max(int(row['epoch']) for row in epochs) for model, epochs in models.items()}
    far = _far_below(
        {
            model: float(np.mean([float(row['accuracy']) for row in epochs if int(row['epoch']) == ends[model]]))
            for model, epochs in models.items()
        }
    )
    with _style():
        figure, axes = _figure(7, 4.5 + 0.1 * len(models))
        lowest = []
        widths = np.linspace(4.5, 1.2, len(models))  # of two curves in one place both are seen
        for (model, epochs), colour, width in zip(models.items(), _colours(len(models)), widths, strict=True):
            curves: dict[int, list[float]] = {}
            for row in epochs:
                curves.setdefault(int(row['epoch']), []).append(float(row['accuracy']))
            x = sorted(curves)
            means = [np.mean(curves[epoch]) for epoch in x]
            if model not in far:
                lowest += [min(curves[epoch]) for epoch in x[len(x) // 2 :]]
            label = f'{model} (ends at {means[-1]:.1f})' if model in far else model
            if len(x) == 1:  # not trained, or tested once
                axes.axhline(float(means[0]), color=colour, label=label, linewidth=1.2, linestyle='--')
            else:
                axes.plot(x, means, color=colour, label=label, linewidth=width)
            if len(models) <= 6:  # more bands hide each other
                axes.fill_between(
                    x, [min(curves[e]) for e in x], [max(curves[e]) for e in x], color=colour, alpha=0.12, linewidth=0
                )
        low = max(0, min(lowest) - 2)  # the first epochs may run out of the picture: what differs is at the end
        axes.set_ylim(low, max(low + 0.5, min(100.5, axes.get_ylim()[1])))
        axes.locator_params(axis='x', integer=True)
        axes.set_xlabel('epoch')
        axes.set_ylabel('test accuracy, %')
        title = 'mean over seeds' if len(models) > 6 else 'mean and range over seeds'
        axes.set_title(f'test accuracy by epoch: {title}', fontsize=10)
        _legend(figure)
        return _png(figure)


FAR = 4.0  # percentage points: a difference beyond is an arrow with its figure, lest the others lie on one line


def plot_differences(panels: Mapping[str, Mapping[str, Difference]], title: str) -> bytes:
    """Differences in accuracy with their 95 % intervals, a panel a setting. A PNG."""
    from matplotlib.figure import Figure

    heights = [len(rows) + 1.2 for rows in panels.values()]
    with _style():
        figure = Figure(figsize=(9, 0.8 + 0.3 * sum(heights)), layout='constrained')
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        near = [
            abs(end)
            for rows in panels.values()
            for gap in rows.values()
            for end in (gap.mean, gap.low, gap.high)
            if abs(gap.mean) <= FAR and np.isfinite(end)
        ]
        reach = 1.1 * max([*near, 0.5])
        for axes, (name, rows) in zip(column, panels.items(), strict=True):
            for y, gap in enumerate(rows.values()):
                if abs(gap.mean) > FAR:
                    side = np.sign(gap.mean)
                    axes.plot(side * reach * 0.98, y, '<' if side < 0 else '>', color=WRONG, markersize=6)
                    axes.annotate(
                        str(gap), (side * reach * 0.95, y), ha='left' if side < 0 else 'right', va='center', fontsize=8
                    )
                    continue
                certain = gap.low > 0 or gap.high < 0
                axes.plot([gap.low, gap.high], [y, y], color=COLOURS[3] if certain else COLOURS[0], linewidth=2)
                axes.plot(gap.mean, y, 'o', color=COLOURS[3] if certain else COLOURS[0], markersize=5.5)
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xlim(-reach, reach)
            axes.set_title(name, fontsize=9, loc='left', fontweight='bold')
            axes.spines[['top', 'right', 'left']].set_visible(False)
            axes.tick_params(axis='y', length=0)
            axes.grid(axis='x', alpha=0.25)
        column[-1].set_xlabel(f'{title}\nmean and 95 % interval, paired by seed; blue: the interval leaves out zero')
        return _png(figure)


def plot_cost(rows: list[Row], times: Sequence[Row]) -> bytes:
    """Accuracy against parameters, multiply-adds and the time of a training step, a point a model. A PNG."""
    from matplotlib.figure import Figure

    steps = {row['model']: float(row['ms']) for row in times if row['mode'] == 'training'}
    models = {model: runs for model, runs in by_model(rows).items() if model in steps}
    costs: tuple[tuple[str, Callable[[str], float]], ...] = (
        ('parameters, millions', lambda model: int(models[model][0]['parameters']) / 1e6),
        ('multiply-adds, millions', lambda model: float(models[model][0]['gmacs']) * 1e3),
        ('training step, ms', lambda model: steps[model]),
    )
    with _style():
        figure = Figure(figsize=(11, 4 + 0.12 * len(models)), layout='constrained')
        markers = _MARKERS * len(models)
        for axes, (title, cost) in zip(figure.subplots(1, 3, sharey=True), costs, strict=True):
            for model, colour, marker in zip(models, _colours(len(models)), markers, strict=False):
                values = [float(row['accuracy']) for row in models[model]]
                deviation = np.std(values, ddof=1) if len(values) > 1 else None
                label = model if axes is figure.axes[0] else None
                axes.errorbar(cost(model), np.mean(values), deviation, fmt=marker, color=colour, capsize=3, label=label)
            axes.set_xscale('log')
            axes.margins(x=0.15)
            narrow = np.divide(*axes.get_xlim()[::-1]) < 10
            axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
            axes.xaxis.set_minor_formatter((lambda value, _: f'{value:.6g}') if narrow else (lambda value, _: ''))
            axes.tick_params(axis='x', which='both', labelsize=8, labelrotation=45)
            axes.spines[['top', 'right']].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set_xlabel(title)
        figure.axes[0].set_ylabel('test accuracy after the last epoch, %')
        _legend(figure)
        return _png(figure)


def plot_fresh(rows: list[Row]) -> bytes:
    """What the hidden units that a lift added do, by epoch: a line (mean over seeds) a model. A PNG."""
    from matplotlib.figure import Figure

    models = by_model(rows)
    panels = (
        (
            'size of the fresh columns of fc2',
            "share of the size of the source's",
            lambda row: float(row['norm_ratio']),
        ),
        ('images that fire a fresh unit', 'percent', lambda row: float(row['firing'])),
        (
            'accuracy lost by setting them to zero',
            'percentage points',
            lambda row: float(row['accuracy']) - float(row['without']),
        ),
    )
    with _style():
        figure = Figure(figsize=(11, 3.6 + 0.12 * len(models)), layout='constrained')
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.15)
        for axes, (title, unit, value) in zip(figure.subplots(1, 3), panels, strict=True):
            for (model, own), colour in zip(models.items(), _colours(len(models)), strict=True):
                by_epoch: dict[int, list[float]] = {}
                for row in own:
                    by_epoch.setdefault(int(row['epoch']), []).append(value(row))
                x = sorted(by_epoch)
                label = model if axes is figure.axes[0] else None
                axes.plot(x, [np.mean(by_epoch[e]) for e in x], 'o-', color=colour, markersize=3.5, label=label)
                if len(models) <= 4:
                    low, high = ([limit(by_epoch[e]) for e in x] for limit in (min, max))
                    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.spines[['top', 'right']].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set_ylim(min(0, axes.get_ylim()[0]))
            axes.set_title(title, fontsize=10, loc='left')
            axes.set_ylabel(unit)
            axes.set_xlabel('epoch')
            axes.locator_params(axis='x', integer=True)
        _legend(figure)
        return _png(figure)


@dataclass(frozen=True)
class Curve:
    """How one model's training went, a value an epoch: mean cross-entropy, and accuracy in percent."""

    name: str
    train_loss: Sequence[float]
    test_accuracy: Sequence[float]


def pick(targets: Sequence[int], probabilities: 'torch.Tensor') -> tuple[list[int], list[int]]:
    """Test images to show: one of each of the first ten classes, and the ten of which the model is least sure."""
    firsts = [targets.index(c) for c in sorted(set(targets))[:COLUMNS]]
    confidence = probabilities.max(1).values
    return firsts, confidence.argsort()[:COLUMNS].tolist()


def plot_quickstart(
    curves: Sequence[Curve],
    data: 'ImageData',
    shown: str,
    probabilities: 'torch.Tensor',
    picked: Sequence[Sequence[int]],
) -> bytes:
    """How the training went, and what a model makes of images it has not seen. A PNG.

    Args:
        curves: Of each model.
        data: Whose test images are shown.
        shown: Name of the model that classified them.
        probabilities: Its class probabilities of the test images, (images, classes).
        picked: Two rows of test images, of at most ten.
    """
    from matplotlib.figure import Figure

    with _style(
        **{
            'font.size': 9,
            'text.color': INK,
            'axes.labelcolor': INK,
            'xtick.color': INK,
            'ytick.color': INK,
            'axes.edgecolor': FAINT,
            'axes.spines.top': False,
            'axes.spines.right': False,
        }
    ):
        figure = Figure(figsize=(11, 7.4), layout='constrained')
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        top, bottom = parts
        _curves(top, curves)
        _images(bottom, data, shown, probabilities, picked)
        return _png(figure)


def _curves(figure: Any, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    left, right = figure.subplots(1, 2)
    for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
        epochs = range(1, len(curve.train_loss) + 1)
        style: dict[str, Any] = dict(color=colour, marker='o', markersize=3.5, linewidth=1.8)
        left.plot(epochs, curve.train_loss, **style)
        right.plot(epochs, curve.test_accuracy, **style, label=f'{curve.name}  {curve.test_accuracy[-1]:.1f} %')
    left.set_yscale('log')
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter('{x:g}')
    left.yaxis.set_minor_locator(NullLocator())
    for axes, title in ((left, 'Training loss'), (right, 'Held-out accuracy, %')):
        axes.set_title(title, loc='left', fontweight='bold')
        axes.set_xlabel('epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis='y', color=FAINT, linewidth=0.6)
        axes.tick_params(length=0)
    right.legend(frameon=False, loc='lower right')


def _images(
    figure: Any, data: 'ImageData', shown: str, probabilities: 'torch.Tensor', picked: Sequence[Sequence[int]]
) -> None:
    figure.suptitle(
        f'{shown} on held-out images: some, and those it is least sure of',
        x=0.008,
        ha='left',
        fontsize=10,
        fontweight='bold',
    )
    data.test.transform = None
    grid = figure.subplots(2, COLUMNS)
    for axes in grid.flat:
        axes.axis('off')
    for row, indices in zip(grid, picked, strict=True):
        for axes, index in zip(row, indices, strict=False):
            image, target = data.test[index]
            confidence, predicted = probabilities[index].max(0)
            # as the model sees it: tiny images are enlarged smoothly
            axes.imshow(image, interpolation='bicubic' if max(image.size) < 32 else 'antialiased')
            text = f'{_short(data.classes[predicted])}  {100 * confidence:.0f} %'
            if predicted == target:
                axes.set_title(text, fontsize=9)
            else:
                axes.set_title(f'{text}\nis {_short(data.classes[target])}', fontsize=9, color=WRONG)


def _short(name: str) -> str:
    """A class's name in the width of its image."""
    return name if len(name) <= 14 else f'{name[:13]}…'
