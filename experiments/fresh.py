"""What becomes of the hidden units that a lift adds: whether they fire, and what they do to the output."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .batches import Batches
from .files import FORMAT, Row, write_csv, write_text
from .plots import plot_fresh
from .training import AfterEpoch, evaluate
from .warm_start import Source, fresh_units

# norm_ratio: root mean square over the layers of: norm of a fresh column of fc2 / norm of one of the source's (each the
#   root mean square over the columns of the layer)
# firing, known_firing: percent of (image, unit) pairs in which a fresh unit, or one of the source's, is above zero
# silent: percent of fresh units that no test image fires
# accuracy, without: percent of the test images, as the model is, and with the fresh columns of fc2 at zero
MEASURED = ('norm_ratio', 'firing', 'known_firing', 'silent', 'accuracy', 'without', 'loss', 'loss_without')
COLUMNS = ('format', 'run', 'model', 'seed', 'epoch', *MEASURED)


@torch.no_grad()
def measure(
    model: torch.nn.Module, fresh: Mapping[str, int], batches: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]
) -> dict[str, float]:
    """The values of MEASURED for a lifted model, which is left in evaluation mode.

    Args:
        model: With SaE.
        fresh: How many hidden units of each layer are the source's, by the layer's name; the others are fresh.
        batches: Makes the test batches anew.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in fresh}
    ratios = []
    for name, known in fresh.items():
        columns = layers[name].fc2.weight.float().square().sum(0)
        ratios.append(columns[known:].mean() / columns[:known].mean())
    with _fired(layers) as fired:
        loss, accuracy = evaluate(model, batches())
    images = max(count for count, _ in fired.values())
    ours = torch.cat([fired[name][1][known:] for name, known in fresh.items()]) / images
    theirs = torch.cat([fired[name][1][:known] for name, known in fresh.items()]) / images
    with _without(layers, fresh):
        loss_without, without = evaluate(model, batches())
    values = (
        torch.stack(ratios).mean().sqrt().item(),
        100 * ours.mean().item(),
        100 * theirs.mean().item(),
        100 * ours.eq(0).double().mean().item(),
        accuracy,
        without,
        loss,
        loss_without,
    )
    return dict(zip(MEASURED, values, strict=True))


@contextmanager
def _fired(layers: Mapping[str, Any]) -> Iterator[dict[str, tuple[int, torch.Tensor]]]:
    """Counts by layer, while the block runs: the images, and for each hidden unit those for which it was above zero."""
    counts = {name: (0, torch.zeros(layer.fc1.out_features)) for name, layer in layers.items()}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            images, fired = counts[name]
            counts[name] = images + len(output), fired + (output.flatten(1) > 0).sum(0).cpu()

        return hook

    handles = [layer.act.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without(layers: Mapping[str, Any], fresh: Mapping[str, int]) -> Iterator[None]:
    """The fresh columns of fc2 at zero while the block runs."""
    kept = {name: layer.fc2.weight.detach().clone() for name, layer in layers.items()}
    try:
        for name, known in fresh.items():
            layers[name].fc2.weight[:, known:] = 0
        yield
    finally:
        for name, layer in layers.items():
            layer.fc2.weight.copy_(kept[name])


def watch(source: Source, batches: Batches, seed: int, path: Path) -> AfterEpoch:
    """For `train`: measures the model after each epoch and keeps the rows in a file, so that a resumed run has all."""

    def after_epoch(epoch: int, model: torch.nn.Module) -> None:
        test = batches.of(model, seed)[1]
        values = measure(model, fresh_units(model, source), lambda: test.batches(0))
        row = dict(epoch=epoch, **{key: f'{value:.6g}' for key, value in values.items()})
        write_csv(path, ('epoch', *MEASURED), [*(r for r in _read(path) if int(r['epoch']) < epoch), row])

    return after_epoch


def rows(path: Path, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `watch` kept of a finished run, as rows of fresh.csv."""
    return [{**columns, 'format': FORMAT, **row} for row in _read(path)]


def add(out: Path, new: Sequence[Mapping[str, Any]]) -> None:
    """Add the rows of a finished run to fresh.csv in `out`."""
    runs = {row['run'] for row in new}
    every: list[Mapping[str, Any]] = [row for row in _read(out / 'fresh.csv') if row['run'] not in runs]
    write_csv(out / 'fresh.csv', COLUMNS, [*every, *new])


def order(out: Path, names: Sequence[str]) -> None:
    """Put the rows of these runs, the last of fresh.csv in `out`, in this order."""
    rank = {name: i for i, name in enumerate(names)}
    rows = _read(out / 'fresh.csv')
    ordered = sorted(rows, key=lambda row: rank.get(row['run'], -1))
    if ordered != rows:
        write_csv(out / 'fresh.csv', COLUMNS, ordered)


def draw(out: Path) -> None:
    """fresh.png, where there is a fresh.csv."""
    if found := _read(out / 'fresh.csv'):
        write_text(out / 'fresh.png', plot_fresh(found))


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))
