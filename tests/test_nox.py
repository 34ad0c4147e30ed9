"""noxfile.py: its sessions, and the lower bounds that it installs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('nox')
ROOT = Path(__file__).parents[1]


def nox(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-m', 'nox', *args], cwd=ROOT, capture_output=True, text=True)


def test_one_command_runs_the_oldest_and_the_newest_of_everything():
    done = nox('--list')
    assert done.returncode == 0, done.stderr
    chosen = re.findall(r'^\* (\S+)', done.stdout, flags=re.M)
    project = (ROOT / 'pyproject.toml').read_text()
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert chosen == ['lowest', *(f'newest-{python}' for python in pythons)]
    assert re.search(r'^- timm_main', done.stdout, flags=re.M)


def test_lowest_installs_each_dependency_at_its_bound():
    import noxfile

    pins = dict(pin.split('==') for pin in noxfile.lower_bounds())
    project = (ROOT / 'pyproject.toml').read_text()
    required = dict(re.findall(r'^    "([\w-]+)>=([\w.]+)"', project.partition('[project.optional')[0], flags=re.M))
    assert {'torch', 'timm', 'huggingface-hub'} <= set(required)
    assert required.items() <= pins.items()


def test_timm_main_without_a_checkout_says_what_it_wants():
    done = nox('-s', 'timm_main', '--no-venv', '--', 'nowhere')
    assert done.returncode != 0
    assert 'nox -s timm_main -- /path/to/pytorch-image-models' in done.stderr
