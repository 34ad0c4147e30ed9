"""What registering the models takes at the end of `import torch`, and of timm's models."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from timm_senetv2.errors import UserError

from ..files import read_csv
from .timing import machine, quartiles

MODULES = ('torch', 'timm')
COLUMNS = ('module', 'round', 'import_ms', 'registration_ms', 'machine', 'torch', 'timm', 'command')

# The entry point is called as torch calls it, but on a clock of its own: two whole imports differ by more than it takes
PROGRAM = """
import sys, time
from importlib.metadata import entry_points
entries = entry_points(group='torch.backends', name='timm_senetv2')
start = time.perf_counter()
import {module}
middle = time.perf_counter()
for entry in entries:
    entry.load()()
end = time.perf_counter()
ours = any(type(finder).__module__ == 'timm_senetv2_autoload' for finder in sys.meta_path)
print(middle - start, end - middle, ours)
"""


def sample(module: str) -> tuple[float, float]:
    """Seconds of an import and of the registration after it, in a fresh Python.

    Raises:
        UserError: An import that fails, or an entry point that is not installed.
    """
    # with byte code in its caches, as pip leaves a package, even where this machine's user wants none written
    without = ('PYTHONDONTWRITEBYTECODE',)
    environment = {k: v for k, v in os.environ.items() if not k.endswith('_AUTOLOAD') and k not in without}
    environment['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'
    command = [sys.executable, '-c', PROGRAM.format(module=module)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise UserError(f'import {module} failed: {(child.stderr.strip().splitlines() or ["no message"])[-1]}')
    imported, registered, ours = child.stdout.split()[-3:]
    if ours != 'True':
        raise UserError('torch does not load timm_senetv2; install it first: pip install -e .')
    return float(imported), float(registered)


def measure(rounds: int, command: str) -> list[dict[str, Any]]:
    """Rows of the file, the modules in turn; a first, untimed sample of each fills the disk's caches."""
    shared = dict(machine=machine('cpu'), torch=torch.__version__, timm=timm.__version__, command=command)
    for module in MODULES:
        sample(module)
    rows = []
    for i in tqdm(range(rounds), desc='imports', leave=False, disable=None):
        for module in MODULES:
            imported, registered = sample(module)
            ms = dict(import_ms=f'{imported * 1e3:.6g}', registration_ms=f'{registered * 1e3:.6g}')
            rows.append(dict(module=module, round=i, **ms, **shared))
    return rows


def table(path: Path) -> str:
    """Markdown: medians and quartiles of a file, and how they were measured."""
    rows = read_csv(path)
    lines = ['| | registration, ms | the import itself, ms |', '|---|--:|--:|']
    for module in MODULES:
        mine = [row for row in rows if row['module'] == module]
        cells = []
        for column in ('registration_ms', 'import_ms'):
            low, middle, high = quartiles([float(row[column]) for row in mine])
            cells.append(
                f'{middle:.3g} ({low:.3g}–{high:.3g})' if middle < 100 else f'{middle:.0f} ({low:.0f}–{high:.0f})'
            )
        lines.append(f'| `import {module}` | {" | ".join(cells)} |')
    first = rows[0]
    return '\n'.join(
        [
            *lines,
            '',
            f'Measured with `{first["command"]}` on {first["machine"]}, torch {first["torch"]}, timm {first["timm"]}: '
            'medians and quartiles over fresh Pythons.',
        ]
    )
