"""The files of a grid of runs: results.csv, a row a run, and curves.csv, a row an epoch, written by one process."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from timm_senetv2.errors import UserError, printable, why
from timm_senetv2.files import MARK, write_atomically

from .settings import LATER_SETTINGS, Settings, run_id, settings_as_text, settings_from_text

TOOL = 'reproduce.py'
FORMAT = 1  # of results.csv and curves.csv; raise it when a column changes its meaning

# Runs recorded earlier have these too; the benchmark measures such things by themselves
MEASURED = ('images_per_second', 'data_wait_share', 'peak_memory_mib')
RESULTS = (
    'format',
    'run',
    'model',
    'seed',
    'accuracy',
    'loss',
    'best_accuracy',
    'best_epoch',
    'parameters',
    'gmacs',
    'seconds',
    *MEASURED,
    *Settings.__dataclass_fields__,
    'torch',
    'timm',
    'timm_senetv2',
    'python',
    'processor',
    'command',
)
CURVES = ('format', 'run', 'model', 'seed', 'epoch', 'lr', 'train_loss', 'test_loss', 'accuracy')
OPTIONAL = {*MEASURED, *LATER_SETTINGS}  # columns that a file has only if a run has something in them

Row = dict[str, str]  # of results.csv or curves.csv


def write_text(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file with column names on top."""
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that have a value for each column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n', extrasaction='ignore')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def check_table(path: Path, columns: Sequence[str]) -> None:
    """Make sure that a table may be written: to a new file, or in place of one with the same columns.

    Raises:
        UserError: The file holds something else.
    """
    try:
        with path.open(newline='', encoding='utf-8') as file:
            found = next(csv.reader(file), [])
    except FileNotFoundError:
        return
    except (OSError, ValueError, csv.Error):
        found = []
    if tuple(found) != tuple(columns):
        raise UserError(f'{printable(path)} is not a table of this command; name a new file')


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, without the optional columns in which none has a value."""
    used = [c for c in columns if c not in OPTIONAL or any(row.get(c) not in (None, '') for row in rows)]
    write_csv(path, used, [{c: row.get(c, '') for c in used} for row in rows])


def _whole(least: int) -> Callable[[str], bool]:
    return lambda text: bool(re.fullmatch(r'0|[1-9][0-9]{0,18}', text)) and int(text) >= least


def _number(low: float, high: float) -> Callable[[str], bool]:
    return lambda text: low <= float(text) <= high


# What the cells are that are read again; a loss is nan or inf where a training diverged
_VALID: dict[str, Callable[[str], bool]] = {
    'format': lambda text: text == str(FORMAT),
    'seed': _whole(0),
    'epoch': _whole(1),
    'best_epoch': _whole(1),
    'parameters': _whole(1),
    'gmacs': _number(0, 1e12),
    'accuracy': _number(0, 100),
    'best_accuracy': _number(0, 100),
    'lr': _number(0, 1e308),
    'loss': lambda text: not float(text) < 0,
    'test_loss': lambda text: not float(text) < 0,
}


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file written by `write_rows`, none where there is no file; '' where an optional column is missing.

    Raises:
        UserError: Not such a file, or not any more: says what is wrong with it.
    """
    shown = printable(path)
    mend = 'put it back as it was, move it away, or give another --out'
    try:
        text = path.read_bytes().decode()
        if text and not text.endswith('\n'):
            raise ValueError('its last line is cut short')
        with io.StringIO(text, newline='') as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            if names != [c for c in columns if c in names or c not in OPTIONAL]:
                raise UserError(f'{shown} was not written by this version of the script (its columns differ); {mend}')
            rows = []
            for row in reader:
                for column, text in row.items():
                    if column is None or text is None or column in _VALID and not _VALID[column](text):
                        what = 'a row of another length' if column is None or text is None else f'{column} {text!r}'
                        raise UserError(
                            f'{shown} was written by another version of the script, edited or damaged: line '
                            f'{reader.line_num} has {printable(what)}; {mend}'
                        )
                rows.append({column: row.get(column, '') for column in columns})
    except FileNotFoundError:
        return []
    except (ValueError, csv.Error) as e:  # no UTF-8, no number, a NUL
        raise UserError(
            f'{shown} was written by another version of the script, edited or damaged ({printable(e)}); {mend}'
        ) from None
    return rows


def read_results(out: Path) -> tuple[list[Row], list[Row]]:
    """The rows of results.csv and of curves.csv in a folder, none where there are none.

    Raises:
        UserError: They are not as they were written, each or together; names the file and the row.
    """
    results, curves = read_rows(out / 'results.csv', RESULTS), read_rows(out / 'curves.csv', CURVES)
    mend = 'put it back as it was, move both files away, or give another --out'
    if {row['run'] for row in results} - {row['run'] for row in curves}:
        raise UserError(f'{printable(out / "curves.csv")} lacks runs that results.csv has; {mend}')
    epochs: dict[str, list[Row]] = {}
    for row in curves:
        epochs.setdefault(row['run'], []).append(row)
    seen = set()
    for row in results:
        run = row['run']
        if run in seen:
            raise UserError(f'{printable(out / "results.csv")} has two rows of {printable(run)}; {mend}')
        seen.add(run)
        try:
            expected = run_id(row['model'], int(row['seed']), settings_from_text(row))
        except ValueError:
            expected = ''
        if run != expected:
            raise UserError(
                f'{printable(out / "results.csv")} was edited or damaged: the name {printable(run)} does not belong '
                f'to the model, seed and settings beside it; {mend}'
            )
        own = epochs[run]
        accuracy = [float(c['accuracy']) for c in own]
        if (
            [int(c['epoch']) for c in own] != list(range(1, len(own) + 1))
            or {(c['model'], c['seed']) for c in own} != {(row['model'], row['seed'])}
            or accuracy[-1] != float(row['accuracy'])
            or max(accuracy) != float(row['best_accuracy'])
            or not int(row['best_epoch']) <= len(own)
            or accuracy[int(row['best_epoch']) - 1] != max(accuracy)
        ):
            raise UserError(
                f'{printable(out / "curves.csv")} and results.csv contradict each other about {printable(run)}; {mend}'
            )
    return results, curves


def rows_of(results: list[Row], settings: Settings) -> list[Row]:
    """The runs made under these settings."""
    ours = settings_as_text(settings)
    return [row for row in results if all(row[k] == v for k, v in ours.items())]


def by_model(rows: list[Row]) -> dict[str, list[Row]]:
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(row['model'], []).append(row)
    return models


def add_run(out: Path, row: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
    """Add a finished run to the files in `out`, results.csv last: a run listed there is never made again."""
    curves: list[Mapping[str, Any]] = [r for r in read_rows(out / 'curves.csv', CURVES) if r['run'] != row['run']]
    write_rows(out / 'curves.csv', CURVES, [*curves, *curve])
    write_rows(out / 'results.csv', RESULTS, [*read_rows(out / 'results.csv', RESULTS), row])


def order_runs(out: Path, names: Sequence[str]) -> None:
    """Put the rows of these runs, the last of the files in `out`, in this order; curves.csv first."""
    rank = {name: i for i, name in enumerate(names)}
    for path, columns in ((out / 'curves.csv', CURVES), (out / 'results.csv', RESULTS)):
        rows = read_rows(path, columns)
        ordered = sorted(rows, key=lambda row: rank.get(row['run'], -1))
        if ordered != rows:
            write_rows(path, columns, ordered)


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """The folder `out`, made if need be, and written by this process alone while the block runs.

    A new or empty folder gets the mark of this tool. One that is not empty must have it, or the results of runs that
    were made before there was a mark.

    Raises:
        UserError: The folder is somebody else's, cannot be written, or another process is at it.
    """
    shown = printable(out)
    check_out(out)
    try:
        (out / 'runs').mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / 'runs' / '.lock')
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f'another process is writing {shown}; wait until it has ended, or give another --out') from None
    except OSError as e:
        raise UserError(f'--out {shown} cannot be made a folder or written: {why(e)}; give another') from None
    try:
        if not (out / MARK).exists():
            write_text(out / MARK, json.dumps(dict(tool=TOOL)) + '\n')
        yield
    finally:
        lock.release()


def check_out(out: Path) -> None:
    """Make sure that the runs' files may be written to `out`, without touching anything.

    Raises:
        UserError: They may not; says why.
    """
    shown = printable(out)
    try:
        real = Path(os.path.realpath(out))
        if real == real.parent:
            raise UserError(f'--out {shown} is the root of the file system; give a folder in it')
        if not os.path.lexists(out):
            return
        if not real.is_dir():
            raise UserError(f'--out {shown} cannot be made a folder: a file or a broken link has that name')
        if not any(p.name != 'runs' for p in real.iterdir()):
            runs = real / 'runs'
            if not runs.exists() or not any(p.name != '.lock' for p in runs.iterdir()):
                return
        mark = real / MARK
        if mark.is_file():
            tool = json.loads(mark.read_text(encoding='utf-8'))['tool']
            if tool == TOOL:
                return
            raise UserError(f'--out {shown} is a folder of {printable(tool)}; give another')
    except OSError as e:
        raise UserError(f'--out {shown} cannot be used: {why(e)}; give another') from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'--out {shown} has a damaged {MARK}; give another') from None
    if not (real / 'results.csv').is_file() or not read_rows(real / 'results.csv', RESULTS):
        raise UserError(f'--out {shown} holds files that {TOOL} did not write; give a new folder')
