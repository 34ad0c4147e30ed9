"""quickstart.sh and test.sh, wherever the clone lies and whatever way they are called: what they install and run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDER = """#!/bin/bash
printf '%s|%s\\n' "$PWD" "$*" >> "$(dirname "$0")/calls"
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone, as far as the scripts look at it, with a Python that writes down how it is called."""
    clone = tmp_path / 'a [b] $c'
    shutil.copytree(ROOT / 'scripts', clone / 'scripts', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'timm_senetv2_autoload.py'):
        shutil.copy(ROOT / name, clone)
    python = clone / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    return clone


def calls(clone: Path) -> list[tuple[str, str]]:
    """The folder and the arguments of each call of Python but the looks at its version."""
    lines = (clone / '.venv' / 'bin' / 'calls').read_text().splitlines()
    return [(place, call) for place, _, call in (line.partition('|') for line in lines) if not call.startswith('-c ')]


@pytest.mark.parametrize('way', ['from the clone', 'from scripts', 'from elsewhere', 'through a link'])
def test_quickstart_installs_what_it_needs_from_the_clone_and_runs(clone, tmp_path, way):
    link = tmp_path / 'elsewhere' / 'start'
    link.parent.mkdir()
    link.symlink_to(os.path.relpath(clone / 'scripts' / 'quickstart.sh', link.parent))
    folder, script = {
        'from the clone': (clone, 'scripts/quickstart.sh'),
        'from scripts': (clone / 'scripts', 'quickstart.sh'),
        'from elsewhere': (tmp_path, str(clone / 'scripts' / 'quickstart.sh')),
        'through a link': (tmp_path, 'elsewhere/start'),
    }[way]
    (tmp_path / 'scripts').mkdir()  # where CDPATH would lead
    done = subprocess.run(
        ['bash', script, '--epochs', '1'],
        cwd=folder,
        env={**os.environ, 'CDPATH': f'{tmp_path}:{clone}:.'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    install, run = calls(clone)
    assert install[0] == str(clone) and install[1].endswith('-e .[experiments]')
    assert run == (str(folder), f'{clone}/scripts/quickstart.py --epochs 1')


def test_test_sh_runs_every_check(clone, tmp_path):
    done = subprocess.run(
        ['bash', clone / 'scripts' / 'test.sh'],
        cwd=tmp_path,
        env={**os.environ, 'CDPATH': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = calls(clone)
    assert {place for place, _ in made} == {str(clone)}
    checks = [call for _, call in made[1:]]
    for start in ('-m ruff check', '-m ruff format --check', '-m mypy', 'tests/run_timm_tests.py', '-m pytest'):
        assert any(call.startswith(start) for call in checks), start


def test_an_unknown_argument_of_test_sh_is_one_line(clone):
    done = subprocess.run(['bash', clone / 'scripts' / 'test.sh', '--fast'], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith('error: unknown argument --fast')
