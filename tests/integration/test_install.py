"""Wheel, source distribution and editable install, each in an environment where nothing else provides the package."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import warnings
warnings.simplefilter('error', RuntimeWarning)
import timm, torch
model = timm.create_model('cifar_senetv2_resnet20', num_classes=3)
assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
import timm_senetv2, timm_senetv2.hub
from importlib.metadata import version
from pathlib import Path
assert version('timm-senetv2') == timm_senetv2.__version__
print(len(timm.list_models(module=['senetv2', 'cifar', 'small_cnn'])), Path(timm_senetv2.__file__).parent)
print(timm_senetv2.hub.CARDS)
"""


def run(*command, cwd=None, **env) -> str:
    clean = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH' and not k.endswith('_AUTOLOAD')}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=dict(clean, **env), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def build(source: Path, out: Path, *options: str) -> None:
    run(sys.executable, '-m', 'build', '--no-isolation', *options, '--outdir', out, source)


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path:
    """A copy of what a clone holds, so that a build leaves nothing behind in ours."""
    folder = tmp_path_factory.mktemp('clone') / 'timm-senetv2'
    listed = run('git', '-C', ROOT, 'ls-files', '--cached', '--others', '--exclude-standard')
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope='module')
def dist(clone, tmp_path_factory) -> dict[str, Path]:
    """The source distribution, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp('dist')
    build(clone, out)
    return {'sdist': next(out.glob('*.tar.gz')), 'wheel': next(out.glob('*.whl'))}


class Environment:
    """A virtual environment that sees the packages of this one, without timm_senetv2."""

    def __init__(self, folder: Path) -> None:
        packages = folder / 'packages'
        packages.mkdir()
        for path in map(Path, sys.path):
            if path.name in ('site-packages', 'dist-packages'):
                for entry in path.iterdir():
                    link = packages / entry.name
                    if not entry.name.lstrip('_').startswith(('timm_senetv2', '__pycache__')) and not link.exists():
                        link.symlink_to(entry)
        venv.create(folder / 'venv', symlinks=True)
        self.python = folder / 'venv' / 'bin' / 'python'
        self.site_packages = Path(run(self.python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'))
        (self.site_packages / 'packages.pth').write_text(f'{packages}\n')

    def pip(self, *args) -> None:
        run(self.python, '-m', 'pip', '--disable-pip-version-check', '--no-input', *args, cwd=self.site_packages)

    def install(self, *what) -> None:
        self.pip('install', '--no-deps', '--no-index', '--no-build-isolation', *what)


@pytest.fixture
def environment(tmp_path) -> Environment:
    environment = Environment(tmp_path)
    code = 'import timm, sys; print(timm.is_model("seanet20"), "timm_senetv2" in sys.modules)'
    assert run(environment.python, '-c', code, cwd=tmp_path) == 'False False'
    return environment


def test_source_distribution_builds_the_wheel_of_the_clone(clone, dist, tmp_path):
    build(clone, tmp_path, '--wheel')

    def contents(wheel):
        with zipfile.ZipFile(wheel) as archive:
            return {n: hashlib.sha256(archive.read(n)).hexdigest() for n in archive.namelist()}

    wheel = contents(dist['wheel'])
    assert contents(next(tmp_path.glob('*.whl'))) == wheel
    expected = {p.relative_to(clone).as_posix() for p in (clone / 'timm_senetv2').rglob('*') if p.is_file()}
    expected |= {f'timm_senetv2/{p.relative_to(clone).as_posix()}' for p in (clone / 'hub_cards').iterdir()}
    expected |= {'timm_senetv2_autoload.py'}
    assert expected <= wheel.keys()
    assert 'timm_senetv2/py.typed' in wheel
    assert any(n.endswith('licenses/LICENSE') for n in wheel)


@pytest.mark.parametrize('kind', ['wheel', 'sdist'])
def test_installed_package_works_and_uninstalls_without_trace(kind, dist, environment, tmp_path):
    environment.install(dist[kind])
    where = environment.site_packages / 'timm_senetv2'
    assert run(environment.python, '-c', CHECK, cwd=tmp_path).splitlines() == [f'38 {where}', f'{where / "hub_cards"}']
    environment.pip('uninstall', '--yes', 'timm-senetv2')
    assert not where.exists()
    code = 'import torch, timm; print(timm.is_model("seanet20"), timm.is_model("resnet18"))'
    assert run(environment.python, '-W', 'error::RuntimeWarning', '-c', code, cwd=tmp_path) == 'False True'


def test_editable_install_works_and_its_deleted_clone_costs_a_warning(dist, environment, tmp_path):
    with tarfile.open(dist['sdist']) as archive:
        archive.extractall(tmp_path, filter='data')
    clone = next(tmp_path.glob('timm_senetv2-*'))
    environment.install('-e', clone)
    assert run(environment.python, '-c', CHECK, cwd=tmp_path).splitlines()[0] == f'38 {clone / "timm_senetv2"}'
    shutil.rmtree(clone)
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import timm
print([w.category.__name__ for w in caught if 'timm_senetv2 could not be loaded' in str(w.message)])
print(timm.is_model('resnet18'), timm.is_model('seanet20'))
"""
    assert run(environment.python, '-c', code, cwd=tmp_path).splitlines() == ["['RuntimeWarning']", 'True False']


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('kind', ['wheel', 'sdist'])
def test_every_registration_case_holds_for_an_installed_package(kind, dist, environment, tmp_path):
    environment.install(dist[kind])
    tests = tmp_path / 'tests'
    tests.mkdir()
    for name in ('test_registration.py', 'conftest.py', 'hub_server.py'):
        shutil.copy(ROOT / 'tests' / name, tests)
    output = run(environment.python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', tests, cwd=tmp_path)
    assert ' passed' in output.splitlines()[-1] and 'failed' not in output and 'skipped' not in output
