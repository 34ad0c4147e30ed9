"""Pictures of what `gates.measure` found: PNGs, in colours that colour-blind people can tell apart (Okabe and Ito)."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image

from .errors import printable
from .gates import CONSTANT, NEAR, LayerGates, Measurement

if TYPE_CHECKING:
    from .overlays import Overlay

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#7F7F7F')  # at most so many classes
INK, FAINT = '#22303c', '#c8d0d6'
MOST_LAYERS = 9  # of which channels and units are drawn
_STYLE: dict[Any, Any] = {
    'text.parse_math': False,  # names of classes and models are plain text, whatever is in them
    'text.usetex': False,
    'font.size': 9,
    'axes.titlesize': 10,
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': FAINT,
    'axes.labelcolor': INK,
    'text.color': INK,
    'xtick.color': INK,
    'ytick.color': INK,
}


def short_names(layers: Sequence[LayerGates]) -> list[str]:
    """The layers' names without the last word where that is the same for all: the names of their blocks."""
    heads, _, tails = zip(*(layer.name.rpartition('.') for layer in layers), strict=True)
    return list(heads) if len(set(tails)) == 1 and all(heads) else [layer.name or 'the layer' for layer in layers]


def drawn_layers(count: int) -> list[int]:
    """Which layers have their channels drawn: all, or evenly spread ones with the first and the last."""
    if count <= MOST_LAYERS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)]


def write_pictures(folder: Path, measured: Measurement, title: str, shown: Sequence[int]) -> list[str]:
    """Write the pictures into a folder.

    Args:
        folder: An existing one.
        measured: What to draw.
        title: Of the model and its data.
        shown: Indices of the classes to draw, at most as many as COLOURS.

    Returns:
        The names of the files: overview.png, classes.png, within_class.png where a class has two images, and units.png
        where a layer has two hidden units that vary.
    """
    pictures: dict[str, Figure | None] = {}
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # a name in a script that matplotlib's font has not
        pictures['overview.png'] = _overview(measured, title)
        pictures['classes.png'] = _classes(measured, title, shown)
        pictures['within_class.png'] = _within_class(measured, title, shown)
        pictures['units.png'] = _units(measured, title)
        for name, figure in pictures.items():
            if figure is not None:
                (folder / name).write_bytes(_png(figure))
    return [name for name, figure in pictures.items() if figure is not None]


def write_overlays(folder: Path, overlays: Sequence['Overlay'], title: str) -> list[str]:
    """Write overlays.png: images, and where the model finds the class it names, with its gates and with mean gates."""
    columns = min(6, len(overlays))
    groups = -(-len(overlays) // columns)
    style = {**_STYLE, 'font.size': 10, 'axes.titlesize': 10, 'axes.titlelocation': 'center'}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')
        figure = Figure(figsize=(max(8.0, 1.75 * columns + 0.9), 6.3 * groups + 0.5), layout='constrained')
        grid = figure.subplots(3 * groups, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for i, overlay in enumerate(overlays):
            top, column = 3 * (i // columns), i % columns
            image = overlay.image.movedim(0, -1).numpy()
            grid[top, column].imshow(image, interpolation='nearest')
            grid[top, column].set_title(f'is {_cut(overlay.label)}')
            for row, view in ((1, overlay.own), (2, overlay.fixed)):
                axes = grid[top + row, column]
                axes.imshow(image.mean(-1), cmap='gray', vmin=0, vmax=1, interpolation='nearest')
                axes.imshow(view.map.numpy(), cmap='inferno', vmin=0, vmax=1, alpha=0.6, interpolation='bilinear')
                axes.set_title(f'{_cut(view.predicted)}\n{100 * view.probability:.0f} %')
        for row in range(3 * groups):
            what = ('the image', 'its own gates', 'mean gates')[row % 3]
            grid[row, 0].text(-0.08, 0.5, what, rotation=90, ha='right', va='center', transform=grid[row, 0].transAxes)
        _head(figure, f'{_cut(title, 70)}: where the class is found (Grad-CAM), brighter is more')
        (folder / 'overlays.png').write_bytes(_png(figure, dpi=75, colours=None))
    return ['overlays.png']


def _png(figure: Figure, dpi: int = 100, colours: int | None = 256) -> bytes:
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format='png', dpi=dpi, metadata={'Software': None})
    with Image.open(drawn) as opened:  # 256 colours are enough for a plot, and take half the space
        picture = opened.convert('RGB')
        (picture if colours is None else picture.quantize(colours)).save(small, format='png', optimize=True)
    return small.getvalue()


def _cut(name: str, most: int = 18) -> str:
    name = printable(name)
    return name if len(name) <= most else f'{name[: most - 1]}…'


def _head(figure: Figure, text: str) -> None:
    figure.suptitle(printable(text), x=0.008, ha='left', fontsize=11, fontweight='bold')


def _percent(share: float | None) -> float:
    return float('nan') if share is None else 100 * share


# ---- over the blocks


def _overview(measured: Measurement, title: str) -> Figure:
    layers, places = measured.layers, list(range(len(measured.layers)))
    figure = Figure(figsize=(13, 7.6), layout='constrained')
    grid = figure.subplots(2, 3)
    for axes in grid.flat:
        axes.grid(axis='y', color=FAINT, linewidth=0.6, alpha=0.7)
        _name_blocks(axes, layers)

    axes = grid[0, 0]
    axes.set_title('Gates, over images and channels')
    quantiles = {q: [layer.quantile(q) for layer in layers] for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    for i in places:
        low, high, first, last = (quantiles[q][i] for q in (0.05, 0.95, 0.25, 0.75))
        axes.plot([i, i], [low, high], color='#56B4E9', linewidth=2, label='5 % to 95 %' if i == 0 else None)
        axes.plot([i, i], [first, last], color='#0072B2', linewidth=7, solid_capstyle='butt')
    axes.plot([], [], color='#0072B2', linewidth=7, label='25 % to 75 %')
    axes.plot(places, quantiles[0.5], 'o', color='black', markersize=4, label='median')
    axes.set_ylim(min(0, *quantiles[0.05]), max(1, *quantiles[0.95]))
    _legend(axes)

    axes = grid[0, 1]
    axes.set_title('Saturated gates, constant channels, %')
    for label, colour, marker, values in (
        (f'gates within {NEAR:g} of 0', '#0072B2', 'o', [layer.near_zero for layer in layers]),
        (f'gates within {NEAR:g} of 1', '#D55E00', '^', [layer.near_one for layer in layers]),
        ('channels whose gate is constant', '#009E73', 's', [layer.constant for layer in layers]),
    ):
        axes.plot(places, [_percent(v) for v in values], marker=marker, color=colour, label=label, markersize=5)
    axes.set_ylim(0, 145)  # room for the legend
    axes.set_yticks(range(0, 101, 20))
    _legend(axes, 'upper left')

    axes = grid[0, 2]
    axes.set_axisbelow(True)
    pale = [_hardly_varies(layer) for layer in layers]
    colours = ['#A9CCE3' if hardly else '#0072B2' for hardly in pale]
    axes.bar(places, [_percent(layer.between_share) for layer in layers], color=colours)
    note = f'\n(pale: where gates hardly vary, SD < {CONSTANT:g})' * any(pale)
    axes.set_title(f'Variance of a gate that lies between classes, %{note}')
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20))
    if all(layer.between_share is None for layer in layers):
        _say(axes, 'needs two classes,\nand two images of a class')

    _draw_effects(grid[1, 0], grid[1, 1], measured)
    _draw_units(grid[1, 2], layers)
    _head(figure, f'{_cut(title, 70)}: all blocks')
    return figure


def _hardly_varies(layer: LayerGates) -> bool:
    return float(layer.std.square().mean().sqrt()) < CONSTANT


def _draw_effects(left: Any, right: Any, measured: Measurement) -> None:
    effects = [layer.effect for layer in measured.layers]
    left.set_title('Mean gates in one block: accuracy, points')
    right.set_title('Mean gates in one block: outputs')
    known = [(i, e) for i, e in enumerate(effects) if e is not None]
    if not known:
        _say(left, 'not measured')
        _say(right, 'not measured')
        return
    left.axhline(0, color='black', linewidth=0.8)
    if known[0][1].change is None:
        _say(left, 'the classes of the images are\nnot those of the model')
    for i, effect in known:
        if effect.change is not None and effect.interval is not None:
            low, high = effect.interval
            clear = low > 0 or high < 0
            colour = '#D55E00' if clear else '#7F7F7F'
            left.plot([i, i], [low, high], color=colour, linewidth=2)
            left.plot(i, effect.change, 'D' if clear else 'o', color=colour, markersize=5)
    if known[0][1].change is not None:
        left.plot([], [], 'D-', color='#D55E00', markersize=5, label='95 % interval without 0')
        left.plot([], [], 'o-', color='#7F7F7F', markersize=5, label='95 % interval with 0')
        left.margins(y=0.15)
        _legend(left)
    for label, colour, marker, values in (
        ('images with another prediction, %', '#D55E00', '^', [100 * e.predictions_changed for _, e in known]),
        (
            'mean change of a logit, % of its SD',
            '#0072B2',
            'o',
            [100 * e.output_change / e.output_std if e.output_std else float('nan') for _, e in known],
        ),
    ):
        right.plot([i for i, _ in known], values, marker=marker, color=colour, label=label, markersize=5)
    right.set_ylim(bottom=0)
    right.margins(y=0.15)
    _legend(right)


def _draw_units(axes: Any, layers: Sequence[LayerGates]) -> None:
    axes.set_title('Hidden units of the attention')
    units = [layer.units for layer in layers]
    if not any(units):
        _say(axes, 'these layers have none')
        return
    branches = any(layer.branches > 1 for layer in layers)
    nan = float('nan')
    for label, colour, marker, values in (
        (
            f'mean |correlation| {"within a branch" if branches else "of two units"}',
            '#0072B2',
            'o',
            [nan if u is None or u.within is None else u.within for u in units],
        ),
        (
            'mean |correlation| between branches',
            '#E69F00',
            's',
            [nan if u is None or u.between is None else u.between for u in units],
        ),
        (
            'share that never fires',
            'black',
            'x',
            [nan if u is None else u.never_fire / len(u.mean) for u in units],
        ),
    ):
        if branches or 'between' not in label:
            axes.plot(range(len(units)), values, marker=marker, color=colour, label=label, markersize=5)
    axes.set_ylim(-0.03, 1.03)
    _legend(axes)


def _name_blocks(axes: Any, layers: Sequence[LayerGates]) -> None:
    names = short_names(layers)
    step = -(-len(names) // 16)
    axes.set_xticks(range(0, len(names), step), [_cut(name, 24) for name in names[::step]], rotation=45, ha='right')
    axes.set_xlim(-0.6, len(names) - 0.4)


def _legend(axes: Any, place: str = 'best') -> None:
    axes.legend(frameon=True, framealpha=0.85, edgecolor='none', fontsize=8, loc=place)


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha='center', va='center', transform=axes.transAxes)


# ---- channel by channel


def _panels(layers: Sequence[LayerGates], height: float = 2.5) -> tuple[Figure, list[Any], list[int]]:
    drawn = drawn_layers(len(layers))
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.1 * columns + 0.4, height * rows + 1.1), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    return figure, grid[: len(drawn)], drawn


def _classes(measured: Measurement, title: str, shown: Sequence[int]) -> Figure:
    layers = measured.layers
    figure, grid, drawn = _panels(layers)
    names = short_names(layers)
    for axes, place in zip(grid, drawn, strict=True):
        layer = layers[place]
        order = layer.mean.argsort()
        for k, colour in zip(shown, COLOURS, strict=False):
            _channel_line(
                axes, layer.class_mean[k][order], color=colour, linewidth=1.1, label=_cut(measured.classes[k])
            )
        _channel_line(axes, layer.mean[order], color='black', linewidth=1.8, label='all classes')
        axes.set_title(_cut(names[place], 40))
    _share_height(grid)
    _finish(figure, grid, f'{_cut(title, 70)}: mean gate of each channel, by class')
    return figure


def _within_class(measured: Measurement, title: str, shown: Sequence[int]) -> Figure | None:
    layers = measured.layers
    pair = [k for k in shown if float(measured.class_images[k]) > 1][:2]
    if not pair:
        return None
    figure, grid, drawn = _panels(layers)
    names = short_names(layers)
    for axes, place in zip(grid, drawn, strict=True):
        layer = layers[place]
        order = layer.mean.argsort()
        for k, colour in zip(pair, COLOURS, strict=False):
            mean, std = layer.class_mean[k][order], layer.class_std[k][order]
            label = f'{_cut(measured.classes[k])}: mean ± standard deviation'
            axes.fill_between(range(len(mean)), mean - std, mean + std, color=colour, alpha=0.22, linewidth=0)
            _channel_line(axes, mean, color=colour, linewidth=1.4, label=label)
        axes.set_title(_cut(names[place], 40))
    _share_height(grid)
    _finish(figure, grid, f'{_cut(title, 70)}: gates of each channel, within a class')
    return figure


def _channel_line(axes: Any, values: torch.Tensor, **style: Any) -> None:
    axes.plot(range(len(values)), values.tolist(), marker='.' if len(values) < 40 else None, markersize=4, **style)


def _share_height(grid: Sequence[Any]) -> None:
    low = min(axes.get_ylim()[0] for axes in grid)
    high = max(axes.get_ylim()[1] for axes in grid)
    for axes in grid:
        axes.set_ylim(low, high)
        axes.grid(axis='y', color=FAINT, linewidth=0.6, alpha=0.7)


def _finish(figure: Figure, grid: Sequence[Any], head: str) -> None:
    columns = min(3, len(grid))
    for i, axes in enumerate(grid):
        if i % columns == 0:
            axes.set_ylabel('gate')
        if i + columns >= len(grid):  # nothing below it
            axes.set_xlabel('channels, sorted by their mean gate')
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(8, len(labels)), frameon=False)
    _head(figure, head)


# ---- hidden units


def _units(measured: Measurement, title: str) -> Figure | None:
    layers = [layer for layer in measured.layers if layer.units is not None and _varying(layer) > 1]
    if not layers:
        return None
    figure, grid, drawn = _panels(layers, height=3.3)
    names = short_names(layers)
    image = None
    for axes, place in zip(grid, drawn, strict=True):
        layer = layers[place]
        assert layer.units is not None
        correlation = layer.units.correlation
        colours = matplotlib.colormaps['PuOr'].with_extremes(bad='#d9d9d9')
        image = axes.imshow(correlation.numpy(), cmap=colours, vmin=-1, vmax=1, interpolation='nearest')
        each = len(correlation) // layer.branches
        for k in range(1, layer.branches):
            axes.axhline(k * each - 0.5, color='black', linewidth=1)
            axes.axvline(k * each - 0.5, color='black', linewidth=1)
        axes.set_title(_cut(names[place], 40))
        axes.locator_params(integer=True, nbins=6)
    assert image is not None
    figure.colorbar(image, ax=grid, label='correlation over images', shrink=0.7)
    branches = ', lines between branches' if any(layer.branches > 1 for layer in layers) else ''
    figure.supxlabel(f'hidden units{branches}; grey: the same in every image', fontsize=9)
    _head(figure, f'{_cut(title, 70)}: correlation of hidden units')
    return figure


def _varying(layer: LayerGates) -> int:
    return 0 if layer.units is None else int((~layer.units.correlation.diagonal().isnan()).sum())
