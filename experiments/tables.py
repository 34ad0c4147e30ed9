"""Tables of finished runs, in Markdown."""

import numpy as np

from .files import Row, by_model
from .statistics import difference, mean_sd


def table(rows: list[Row], baseline: str) -> str:
    """A Markdown table of runs that share their settings, a line a model.

    Args:
        rows: Of results.csv.
        baseline: The model that the others are compared with; without runs of it there are no differences.
    """
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
    few = f', {row["per_class"]} training images of each class, others for each seed' if row.get('per_class') else ''
    epochs = f'{row["epochs"]} epoch{"" if str(row["epochs"]) == "1" else "s"}'
    passes = f' of {row["epoch_repeats"]} passes over the training images' if row.get('epoch_repeats') else ''
    starts = ''
    if any('@' in row['model'] for row in rows):
        starts = (
            ' What follows @ is how a model starts, and what of its training differs from the others'
            + (' (@keep: not trained)' if any('@keep' in row['model'] for row in rows) else '')
            + (f'; the weights at the start have the SHA-256 {row["init"]}' if row.get('init') else '')
            + '.'
        )
    return (
        f'{row["dataset"]}{limit}{few}{size}, protocol {row["protocol"]}: {row["opt"]}, lr {row["lr"]}, weight decay '
        f'{row["weight_decay"]}, batch {row["batch_size"]}, {epochs}{passes}.{starts} Accuracy on the '
        f'test images after the last epoch, mean ± standard deviation over seeds; the best epoch is chosen on the test '
        f'images, hence optimistic. Difference: to `{baseline}` after the last epoch, paired by seed, with its 95 % '
        f'interval (Student t), or of other seeds and then marked as unpaired (Welch).\n'
    )


def page(rows: list[Row], baseline: str) -> str:
    """The commands that made the runs, their table and its caption: table.md."""
    given = dict.fromkeys(row['command'] for row in rows)
    # Ray changes where runs are made, not what comes out: the same command without it says all
    commands = ''.join(f'{c}\n' for c in given if ' --ray' not in c or c.replace(' --ray', '') not in given)
    return f'```bash\n{commands}```\n\n{table(rows, baseline)}\n{caption(rows, baseline)}'


def fresh_table(rows: list[Row]) -> str:
    """What became of the hidden units that lifts added: means over seeds, the loss of accuracy with its interval, in
    Markdown. By epoch for one model; for several, after the first epoch and the last."""
    lines = [
        "| model | epoch | runs | their columns, % of the source's | images that fire one, % | of the source's, % "
        '| silent, % | accuracy without them, points |',
        '|---|--:|--:|--:|--:|--:|--:|--:|',
    ]
    models = by_model(rows)
    for model, own in models.items():
        epochs = sorted({int(row['epoch']) for row in own})
        for epoch in epochs if len(models) == 1 else dict.fromkeys((epochs[0], epochs[-1])):
            now = [row for row in own if int(row['epoch']) == epoch]
            mean = {key: np.mean([float(row[key]) for row in now]) for key in ('firing', 'known_firing', 'silent')}
            size = 100 * np.mean([float(row['norm_ratio']) for row in now])
            with_, without = ({row['seed']: float(row[key]) for row in now} for key in ('accuracy', 'without'))
            lines.append(
                f'| `{model}` | {epoch} | {len(now)} | {size:.1f} | {mean["firing"]:.1f} | {mean["known_firing"]:.1f} '
                f'| {mean["silent"]:.1f} | {difference(without, with_)} |'
            )
    return '\n'.join(lines) + '\n'
