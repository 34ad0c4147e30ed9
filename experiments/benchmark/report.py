"""The files of a benchmark: tables of numbers, the same in Markdown, and a chart. All follow from the rows."""

import csv
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import matplotlib

from timm_senetv2.errors import UserError, one_line

from ..files import write_csv, write_text
from .suite import BESIDE, Row

matplotlib.use('Agg')

COLUMNS = (
    'experiment',
    'contestant',
    'baseline',
    'device',
    'runtime',
    'dtype',
    'autocast',
    'layout',
    'training',
    'batch',
    'size',
    'rounds',
    'ms',
    'ms_q1',
    'ms_q3',
    'images_per_s',
    'peak_mib',
    'ratio',
    'ratio_q1',
    'ratio_q3',
    'difference_ms',
    'peak_ratio',
    'matrix_share',
    'machine',
    'threads',
    'torch',
    'timm',
    'command',
)
ROUND_COLUMNS = ('experiment', 'contestant', 'round', 'ms')
KERNEL_COLUMNS = ('experiment', 'contestant', 'kernel', 'kind', 'calls', 'ms')


def make_folder(folder: Path) -> None:
    """Make the folder for the files, if it is not there.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot write to {folder}: {e.strerror}; give another --out') from e


class Files:
    """The files benchmark_NAME.csv, .md and .png, benchmark_NAME_rounds.csv and _kernels.csv of a folder."""

    def __init__(self, folder: Path, name: str, order: Iterable[str]):
        """`order` are titles of experiments: the files have them in this order, others after them."""
        self.stem = folder / f'benchmark_{name}'
        self.order = {title: i for i, title in enumerate(order)}
        self.columns = {'': COLUMNS, '_rounds': ROUND_COLUMNS, '_kernels': KERNEL_COLUMNS}
        self.rows: dict[str, list[Row]] = {part: [] for part in self.columns}
        make_folder(folder)

    def _path(self, end: str) -> Path:
        return self.stem.with_name(self.stem.name + end)

    def load(self) -> set[str]:
        """Take over what the files hold. Returns the titles of the experiments in them.

        Raises:
            UserError: Files with other columns, of another version of this command.
        """
        for part, columns in self.columns.items():
            path = self._path(f'{part}.csv')
            if not path.exists():
                continue
            mend = 'give another --name, or replace it by --fresh'
            try:
                with path.open(newline='', encoding='utf-8') as file:
                    reader = csv.DictReader(file)
                    if tuple(reader.fieldnames or ()) != columns:
                        raise UserError(
                            f'{path} was not written by this version of the benchmark (its columns differ); {mend}'
                        )
                    self.rows[part] = list(reader)
            except (ValueError, csv.Error) as e:  # no UTF-8, a NUL
                raise UserError(f'{path} is damaged ({one_line(e)}); {mend}') from None
            if any(None in row or None in row.values() for row in self.rows[part]):
                raise UserError(f'{path} is damaged (a row of another length); {mend}')
        return {row['experiment'] for row in self.rows['']}

    def add(self, command: str, rows: list[Row], rounds: list[Row], kernels: list[Row]) -> None:
        """Add an experiment that `command` measured, in place of an earlier one with its title."""
        rows = [row | {'command': command} for row in rows]
        for part, new in zip(self.rows, (rows, rounds, kernels), strict=True):
            titles = {row['experiment'] for row in rows}
            kept = [row for row in self.rows[part] if row['experiment'] not in titles]
            last = len(self.order)
            self.rows[part] = sorted(kept + new, key=lambda row: self.order.get(row['experiment'], last))

    def write(self) -> list[str]:
        """Write all of them. Returns their names."""
        written = []
        for part, columns in self.columns.items():
            if self.rows[part]:
                write_csv(self._path(f'{part}.csv'), columns, self.rows[part])
                written.append(self._path(f'{part}.csv').name)
        write_text(self._path('.md'), report(self.rows[''], self.rows['_kernels']))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'chart.png'
            chart(self.rows[''], file)
            write_text(self._path('.png'), file.read_bytes())
        return [*written, self._path('.md').name, self._path('.png').name]


def _experiments(rows: list[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row['experiment'], []).append(row)
    return list(found.values())


def _of_models(rows: list[Row]) -> bool:
    return rows[0]['experiment'].startswith('models, ')


def _between(row: Row, column: str) -> str:
    low, middle, high = (float(row[column + end]) for end in ('_q1', '', '_q3'))
    return f'{middle:.3f} ({low:.3f}–{high:.3f})'


def speed_table(rows: list[Row], baseline: str) -> str:
    """Markdown: a line a setting, a column a model, the model's speed over that of the baseline."""
    chosen = [row for row in rows if _of_models([row]) and row['baseline'] == baseline]
    names = [name for name in dict.fromkeys(row['contestant'] for row in chosen) if name != baseline]
    lines = [
        f'| speed / `{baseline}` | {" | ".join(f"`{name}`" for name in names)} |',
        '|---|' + '--:|' * len(names),
    ]
    for experiment in _experiments(chosen):
        ratios = {row['contestant']: f'{float(row["ratio"]):.3f}' for row in experiment}
        title = experiment[0]['experiment'].removeprefix('models, ')
        lines.append(f'| {title} | {" | ".join(ratios.get(name, "") for name in names)} |')
    return '\n'.join(lines) if names else ''


def experiment_table(rows: list[Row]) -> str:
    """Markdown: a line a contestant, its times and its ratios to each baseline."""
    title, rounds = rows[0]['experiment'], rows[0]['rounds']
    baselines = list(dict.fromkeys(row['baseline'] for row in rows))
    optional = [
        (name, column)
        for name, column in (
            ('images/s', 'images_per_s'),
            ('peak MiB', 'peak_mib'),
            ('share of matrix rate', 'matrix_share'),
        )
        if any(row[column] for row in rows)
    ]
    heads = ['', 'ms', *(name for name, _ in optional)]
    compared = ('speed', 'memory') if rows[0]['peak_mib'] else ('speed',)
    heads += [f'{what} / {b}' for b in baselines for what in compared]
    lines = [
        f'**{title}**, {rounds} rounds',
        '',
        f'| {" | ".join(heads)} |',
        '|---|' + '--:|' * (len(heads) - 1),
    ]
    for name in dict.fromkeys(row['contestant'] for row in rows):
        mine = [row for row in rows if row['contestant'] == name]
        cells = [name, f'{mine[0]["ms"]} ({mine[0]["ms_q1"]}–{mine[0]["ms_q3"]})']
        cells += [mine[0][column] for _, column in optional]
        for row in mine:
            cells.append(_between(row, 'ratio'))
            if row['peak_ratio']:
                cells.append(f'{float(row["peak_ratio"]):.3f}')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def kernel_table(rows: list[Row]) -> str:
    """Markdown: a line a kind of kernel, the milliseconds of each contestant; then each one's longest kernels."""
    names = list(dict.fromkeys(row['contestant'] for row in rows))
    spent: dict[str, dict[str, float]] = {}
    for row in rows:
        times = spent.setdefault(row['kind'], dict.fromkeys(names, 0.0))
        times[row['contestant']] += float(row['ms'])
    lines = [
        'What the time of a step is spent on, in ms, under the profiler:',
        '',
        f'| | {" | ".join(names)} |',
        '|---|' + '--:|' * len(names),
    ]
    for kind, times in sorted(spent.items(), key=lambda item: -sum(item[1].values())):
        lines.append(f'| {kind} | {" | ".join(f"{times[name]:.3g}" for name in names)} |')
    return '\n'.join(lines)


def beside_table(rows: list[Row]) -> str:
    """Markdown: a line a model of this package, its speed over the plain model and over timm's with SE beside it."""
    lines = ["| | speed / the plain model | speed / timm's with SE |", '|---|--:|--:|']
    for experiment in _experiments(rows):
        name, *settings = experiment[0]['experiment'].removeprefix(BESIDE).split(', ')
        ours = [row for row in experiment if row['contestant'] == name and row['baseline'] != name]
        cells = [f'{float(row["ratio"]):.3f} (`{row["baseline"]}`)' for row in ours]
        lines.append(f'| `{name}`, {", ".join(settings)} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def _together(commands: Iterable[str]) -> list[str]:
    """Each command once, and all that measured parts of the suite as the one that measures them in one go."""
    suite = re.compile(r'(.* --suite) ((?:[a-z][\w-]* ?)+)')
    parts: dict[str, list[str]] = {}
    for command in commands:
        match = suite.fullmatch(command)
        parts.setdefault(match[1] if match else command, []).extend(match[2].split() if match else ())
    return [' '.join((command, *dict.fromkeys(names))) for command, names in parts.items()]


def measured_with(rows: list[Row]) -> str:
    """A sentence or two: the commands, the machine, and what the figures are."""
    first = rows[0]
    commands = ', '.join(f'`{command}`' for command in _together([row['command'] for row in rows]))
    return (
        f'Measured with {commands} on {first["machine"]}, {first["threads"]} threads, torch {first["torch"]}, timm '
        f'{first["timm"]}: medians over interleaved rounds.'
    )


def report(rows: list[Row], kernels: list[Row]) -> str:
    """The Markdown file: machine, speed of all models in all settings, then a table an experiment."""
    parts = [
        f'{measured_with(rows)} Quartiles are in brackets. A speed is the ratio of two times of the same round: above '
        '1 is faster than the model it is compared with. Memory is the peak of live tensors in a step.',
    ]
    parts += [speed_table(rows, row['baseline']) for row in rows if _of_models([row])][:1]
    beside = [row for row in rows if row['experiment'].startswith(BESIDE)]
    if beside:
        parts.append(beside_table(beside))
    for experiment in _experiments(rows):
        parts.append(experiment_table(experiment))
        mine = [row for row in kernels if row['experiment'] == experiment[0]['experiment']]
        if mine:
            parts.append(kernel_table(mine))
    return '\n\n'.join(part for part in parts if part) + '\n'


def chart(rows: list[Row], path: Path) -> None:
    """Speed over the first baseline, a line a setting and a dot a contestant, with its quartiles."""
    import matplotlib.pyplot as plt

    shown = [e for e in _experiments(rows) if _of_models(e)] or _experiments(rows)
    shown = [[row for row in e if row['baseline'] == e[0]['baseline']] for e in shown]
    names = list(dict.fromkeys(row['contestant'] for e in shown for row in e if row['contestant'] != row['baseline']))
    colours = {name: f'C{i % 10}' for i, name in enumerate(names)}
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.34 * len(shown)), layout='constrained')
    for i, experiment in enumerate(shown):
        for row in experiment:
            if row['contestant'] not in colours:
                continue
            ratio, low, high = (float(row[column]) for column in ('ratio', 'ratio_q1', 'ratio_q3'))
            colour = colours[row['contestant']]
            axis.plot([low, high], [i, i], color=colour, linewidth=4, alpha=0.3, solid_capstyle='butt')
            axis.plot([ratio], [i], 'o', color=colour, markersize=6)
    for name in names:
        axis.plot([], [], 'o', color=colours[name], label=name)
    axis.axvline(1, color='black', linewidth=0.8)
    axis.set_yticks(range(len(shown)), [e[0]['experiment'].removeprefix('models, ') for e in shown], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis='x', alpha=0.3)
    baselines = list(dict.fromkeys(e[0]['baseline'] for e in shown))
    axis.set_xlabel(f'speed / {baselines[0]}' if len(baselines) == 1 else 'speed over the baseline')
    if names:
        figure.legend(loc='outside upper center', ncols=min(3, len(names)), fontsize=8)
    figure.savefig(path, dpi=110, metadata={'Software': None})
    plt.close(figure)
