"""The quickstart's picture: how the training went, and what a model makes of images it has not seen."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from _data import ImageData
from _fit import Fit

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402  after the choice of backend
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

INK, FAINT, WRONG = '#22303c', '#c8d0d6', '#c8372d'
COLOURS = ('#7f8c99', '#e0a030', '#2a9d8f', '#3559c7', '#a44aa8', '#6b8e23')
COLUMNS = 10


def pick(targets: Sequence[int], probabilities: torch.Tensor) -> tuple[list[int], list[int]]:
    """Test images to show: one of each of the first ten classes, and the ten of which the model is least sure."""
    firsts = [targets.index(c) for c in sorted(set(targets))[:COLUMNS]]
    confidence = probabilities.max(1).values
    return firsts, confidence.argsort()[:COLUMNS].tolist()


def draw(
    path: Path,
    fits: Sequence[Fit],
    data: ImageData,
    shown: str,
    probabilities: torch.Tensor,
    picked: Sequence[Sequence[int]],
) -> None:
    """Write the picture.

    Args:
        path: The file, a PNG.
        fits: Whose curves are drawn.
        data: Whose test images are shown.
        shown: Name of the model that classified them.
        probabilities: Its class probabilities of the test images, (images, classes).
        picked: Two rows of test images, of at most ten.
    """
    with plt.rc_context(
        {
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
        figure = plt.figure(figsize=(11, 7.4), dpi=130, layout='constrained')
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        _curves(top, fits)
        _images(bottom, data, shown, probabilities, picked)
        figure.savefig(path)
        plt.close(figure)


def _curves(figure, fits: Sequence[Fit]) -> None:
    left, right = figure.subplots(1, 2)
    for fit, colour in zip(fits, COLOURS * len(fits), strict=False):
        epochs = range(1, len(fit.train_loss) + 1)
        style = dict(color=colour, marker='o', markersize=3.5, linewidth=1.8)
        left.plot(epochs, fit.train_loss, **style)
        right.plot(epochs, fit.test_accuracy, **style, label=f'{fit.name}  {fit.test_accuracy[-1]:.1f} %')
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


def _images(figure, data: ImageData, shown: str, probabilities: torch.Tensor, picked: Sequence[Sequence[int]]) -> None:
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
            text = f'{data.classes[predicted]}  {100 * confidence:.0f} %'
            if predicted == target:
                axes.set_title(text, fontsize=9)
            else:
                axes.set_title(f'{text}\nis {data.classes[target]}', fontsize=9, color=WRONG)
