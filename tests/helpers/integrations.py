"""Checks of other libraries: each in a fresh process, its outcome kept in results/integrations.csv."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from experiments.files import read_csv, write_csv

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / 'results' / 'integrations.csv'
COLUMNS = ('kind', 'library', 'version', 'call', 'model', 'result')


def environment(cache: Path, hub: str | None = None) -> dict[str, str]:
    """The environment of a process with the Hub's cache in that folder, and no network but for the Hub at that URL."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING')) and k != 'PYTHONPATH'}
    own = dict(OMP_NUM_THREADS='1', TORCHINDUCTOR_COMPILE_THREADS='1', HF_HOME=str(cache / 'hf'))
    own |= dict(HF_ENDPOINT=hub, HF_HUB_DISABLE_XET='1') if hub else dict(HF_HUB_OFFLINE='1')
    return given | own


def fresh(script: str, name: str, folder: Path, cache: Path, hub: str | None = None) -> list[dict[str, Any]]:
    """Run `script NAME FOLDER` of tests/integration in a process without an import of ours; return what it found."""
    done = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'integration' / script, name, folder],
        env=environment(cache, hub),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith('RESULT ')]
    assert done.returncode == 0 and found, f'{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    return found


def record(kind: str, library: str, version: str, call: str, model: str, result: str) -> None:
    """Put one row into the results, in place of the one of the same call and model."""
    with FileLock(Path(tempfile.gettempdir(), 'timm-senetv2-integrations.lock')):
        rows = {}
        if RESULTS.exists():
            rows = {_key(row): row for row in read_csv(RESULTS)}
        row = dict(zip(COLUMNS, (kind, library, version, call, model, result), strict=True))
        rows[_key(row)] = row
        write_csv(RESULTS, COLUMNS, [rows[key] for key in sorted(rows)])


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return row['kind'], row['library'].lower(), row['call'], row['model']


def need(library: str, module: str) -> None:
    """Skip the test where the library is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{library} is not installed: pip install 'timm-senetv2[integration]'")
