"""How often what was tried, and how it ended."""

import csv
import io
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from timm_senetv2.errors import UserError, one_line, run
from timm_senetv2.files import write_atomically

COLUMNS = ('kind', 'case', 'tried', 'right', 'one_line', 'failed', 'slowest_s', 'first_failure', 'command', 'versions')
PACKAGES = ('torch', 'timm', 'huggingface-hub', 'pillow', 'safetensors', 'pydantic')
SLOW = 60.0  # seconds of work, not of waiting, after which a refusal is a failure


@dataclass
class Row:
    """The outcomes of one case: `right` results, refusals in `one_line`, and failures, which are all else."""

    tried: int = 0
    right: int = 0
    one_line: int = 0
    failed: int = 0
    slowest_s: float = 0.0
    first_failure: str = ''


@dataclass
class Tally:
    """The rows of one kind, by case."""

    kind: str
    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, case: str, outcome: str, seconds: float, says: str = '') -> None:
        """Count an outcome: 'right', 'one_line' or 'failed', with what a failure says."""
        row = self.rows.setdefault(case, Row())
        if seconds > SLOW and outcome != 'failed':
            outcome, says = 'failed', f'took {seconds:.0f} s'
        row.tried += 1
        setattr(row, outcome, getattr(row, outcome) + 1)
        row.slowest_s = max(row.slowest_s, seconds)
        if outcome == 'failed' and not row.first_failure:
            row.first_failure = says

    @property
    def failed(self) -> int:
        return sum(row.failed for row in self.rows.values())

    @property
    def tried(self) -> int:
        return sum(row.tried for row in self.rows.values())


def outcome_of(action: Callable[[], str | None]) -> tuple[str, float, str]:
    """Do something, as a command does it, that must end in a right result or in one plain line and exit code 2.

    Args:
        action: Returns what is wrong with its result, or None.

    Returns:
        'right', 'one_line' or 'failed'; the seconds of this process's work; and what a refusal or failure says.
    """
    began = time.process_time()
    out, err, wrong = io.StringIO(), io.StringIO(), []
    code: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            run(lambda: wrong.append(action()))
    except SystemExit as e:
        code = e.code
    except Exception as e:
        code, wrong = 1, [f'{type(e).__name__}: {one_line(e)}']
    seconds = time.process_time() - began
    if wrong:
        return ('right', seconds, '') if wrong == [None] else ('failed', seconds, str(wrong[0]))
    says = why_no_line(code, err.getvalue())
    return ('failed', seconds, says) if says else ('one_line', seconds, err.getvalue().strip())


def is_plain(text: str) -> bool:
    """Whether a message is one line that a terminal shows as it is."""
    return 0 < len(text) < 2500 and text.isprintable()


def why_no_line(code: object, err: str) -> str | None:
    """What is wrong with how a command refused something; None where it was exit code 2 and one plain line."""
    lines = err.splitlines()
    if code == 2 and len(lines) == 1 and lines[0].startswith('error: ') and is_plain(lines[0]):
        return None
    return f'exit code {code}, and on stderr: {one_line(ValueError(err[-400:]))}'


def versions() -> str:
    return ', '.join([f'Python {platform.python_version()}', *(f'{name} {version(name)}' for name in PACKAGES)])


def write(path: Path, tallies: Iterable[Tally], command: str) -> None:
    """Write the rows of these kinds into a CSV file, in place of those of the same kinds; others stay."""
    new = {
        tally.kind: [
            dict(vars(row), kind=tally.kind, case=case, slowest_s=f'{row.slowest_s:.1f}')
            | dict(command=command, versions=versions())
            for case, row in tally.rows.items()
        ]
        for tally in tallies
    }
    kept = [row for row in read(path) if row['kind'] not in new] if path.exists() else []
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    rows: list[dict] = [*kept, *(row for rows in new.values() for row in rows)]
    writer.writerows(sorted(rows, key=lambda row: row['kind']))
    with write_atomically(path) as temporary:
        temporary.write_text(text.getvalue(), encoding='utf-8')


def read(path: Path) -> list[dict[str, str]]:
    """The rows of such a file.

    Raises:
        UserError: Another file.
    """
    try:
        with path.open(newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError(f'{path} was not written by this command; give another --out')
            return list(reader)
    except (ValueError, csv.Error) as e:
        raise UserError(f'{path} cannot be read: {one_line(e)}; give another --out') from None
