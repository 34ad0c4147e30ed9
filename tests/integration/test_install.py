"""Wheel, source distribution and editable install, each in an environment where nothing else provides the package."""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from interpreters import Interpreters, Program
from interpreters import command as code_of
from safetensors.torch import load_file

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
print(sum(facts.license is not None for facts in [timm_senetv2.hub.facts_of('senetv2_resnet50', 'plain_tv_in1k')]))
"""


def clean_environment(**env: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH' and not k.endswith('_AUTOLOAD')}
    return dict(clean, **env)


def execute(*command, cwd=None, **env) -> subprocess.CompletedProcess[str]:
    given = clean_environment(**env)
    return subprocess.run([str(c) for c in command], cwd=cwd, env=given, capture_output=True, text=True)


def run(*command, cwd=None, **env) -> str:
    result = execute(*command, cwd=cwd, **env)
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
        packages = self.packages = folder / 'packages'
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


def new_environment(folder: Path) -> Environment:
    environment = Environment(folder)
    code = (
        'from importlib import metadata, util; '
        'names = [e.name for e in metadata.entry_points(group="torch.backends")]; '
        'found = [util.find_spec(name) is not None for name in ("timm", "timm_senetv2", "timm_senetv2_autoload")]; '
        'print("timm_senetv2" in names, found)'
    )
    assert run(environment.python, '-c', code, cwd=folder) == 'False [True, False, False]'
    return environment


@pytest.fixture
def environment(tmp_path) -> Environment:
    return new_environment(tmp_path)


class Installed:
    """An environment with the wheel, shared by the tests that only look at it.

    Attributes:
        command: Its `timm-senetv2`.
    """

    def __init__(self, environment: Environment, interpreters: Interpreters) -> None:
        self.environment, self.interpreters = environment, interpreters
        self.command = environment.python.parent / 'timm-senetv2'

    def execute(self, *words: object, cwd: Path, **env: str) -> Program:
        """Run a script, or `-m` and a module, in an interpreter of the environment that has imported torch."""
        return self.interpreters.run(code_of(words), cwd, env=clean_environment(**env))

    def run(self, *words: object, cwd: Path, **env: str) -> str:
        done = self.execute(*words, cwd=cwd, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    @contextlib.contextmanager
    def without(self, *packages: str) -> Iterator[None]:
        """Without the packages whose names start so."""
        folder = self.environment.packages
        hidden = {path: path.readlink() for package in packages for path in folder.glob(f'{package}*')}
        for path in hidden:
            path.unlink()
        try:
            yield
        finally:
            for path, target in hidden.items():
                path.symlink_to(target)


@pytest.fixture(scope='module')
def installed(dist, tmp_path_factory) -> Iterator[Installed]:
    environment = new_environment(tmp_path_factory.mktemp('installed'))
    environment.install(dist['wheel'])
    with Interpreters('torch', 'torchvision', env=clean_environment(), python=environment.python) as interpreters:
        yield Installed(environment, interpreters)


def test_source_distribution_builds_the_wheel_of_the_clone(clone, dist, tmp_path):
    build(clone, tmp_path, '--wheel')

    def contents(wheel):
        with zipfile.ZipFile(wheel) as archive:
            return {n: hashlib.sha256(archive.read(n)).hexdigest() for n in archive.namelist()}

    wheel = contents(dist['wheel'])
    assert contents(next(tmp_path.glob('*.whl'))) == wheel
    expected = {p.relative_to(clone).as_posix() for p in (clone / 'timm_senetv2').rglob('*') if p.is_file()}
    expected |= {'timm_senetv2_autoload.py'}
    assert expected <= wheel.keys()
    assert 'timm_senetv2/py.typed' in wheel
    assert any(n.endswith('licenses/LICENSE') for n in wheel)


# A source distribution is built into the same wheel, as the test above shows
@pytest.mark.parametrize('kind', ['wheel', pytest.param('sdist', marks=pytest.mark.slow)])
def test_installed_package_works_and_uninstalls_without_trace(kind, dist, environment, tmp_path):
    environment.install(dist[kind])
    where = environment.site_packages / 'timm_senetv2'
    assert run(environment.python, '-c', CHECK, cwd=tmp_path).splitlines() == [f'38 {where}', '1']
    environment.pip('uninstall', '--yes', 'timm-senetv2')
    assert not where.exists()
    code = 'import torch, timm; print(timm.is_model("seanet20"), timm.is_model("resnet18"))'
    assert run(environment.python, '-W', 'error::RuntimeWarning', '-c', code, cwd=tmp_path) == 'False True'


@pytest.mark.slow  # as installed from the wheel, and test_registration.py has packages whose folder is gone
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


SCRIPT = """
import sys, timm
from pathlib import Path
print(Path(timm.__file__).parts[-2], timm.is_model('seanet20'), *sys.argv[1:])
"""


def test_every_command_works_from_the_wheel_outside_any_clone(installed, hub_server, tmp_path):
    python, command = installed.environment.python, installed.command
    away = tmp_path / 'away'
    away.mkdir()

    listed = json.loads(installed.run(command, 'models', 'senetv2_resnet50', '--json', cwd=away))
    assert [row['params'] for row in listed] == [30603912]
    default = next(tag for tag in listed[0]['tags'] if tag['default'])
    assert default['source'] == 'timm/seresnet50.ra2_in1k' and default['accuracies'][0]['top1'] == 81.288

    torch.manual_seed(0)
    model = timm.create_model('cifar_senetv2_resnet20', num_classes=4)
    torch.save(
        {'state_dict': model.state_dict(), 'epoch': 7, 'args': argparse.Namespace(lr=0.1)}, away / 'last.pth.tar'
    )
    told = installed.run(
        command, 'convert', 'last.pth.tar', '--model', 'cifar_senetv2_resnet20', '--out', 'out', cwd=away
    )
    assert 'epoch: 7' in told and 'classes: 4' in told
    converted = load_file(away / 'out' / 'model.safetensors')
    assert all(torch.equal(converted[key], tensor) for key, tensor in model.state_dict().items())

    hub_server.tokens['hf_sentinel'] = 'write'
    hub = dict(HF_ENDPOINT=hub_server.url, HF_HOME=str(tmp_path / 'hf'), HF_HUB_DISABLE_XET='1', HF_TOKEN='hf_sentinel')
    given = (
        '--model',
        'cifar_senetv2_resnet20',
        '--checkpoint',
        'out/model.safetensors',
        '--repo-id',
        'me/x',
        '--license',
        'mit',
    )
    told = installed.run(command, 'push', *given, cwd=away, **hub)
    assert told.splitlines()[-1] == "model = timm.create_model('hf-hub:me/x', pretrained=True)"
    assert 'model.safetensors' in hub_server.model('me/x').files()

    (away / 'repo' / 'timm').mkdir(parents=True)
    (away / 'repo' / 'train.py').write_text(SCRIPT)
    arguments = ('train', '--timm-repo', 'repo', '--model', 'x', '--', '-y')
    assert run(command, *arguments, cwd=away) == 'timm True --model x -- -y'  # a cold start, as a user's
    assert installed.run('-m', 'timm_senetv2', *arguments, cwd=away) == 'timm True --model x -- -y'
    told = run(
        python,
        *('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'timm_senetv2', *arguments),
        cwd=away,
    )
    assert told.splitlines() == ['timm True --model x -- -y'] * 2


def test_command_without_its_extra_says_in_one_line_what_to_install(installed, tmp_path):
    command = ('-m', 'timm_senetv2')
    with installed.without('pydantic', 'jinja2'):
        for name in ('push', 'cards'):
            done = installed.execute(*command, name, 'x', cwd=tmp_path)
            line = f"error: timm-senetv2 {name} needs jinja2 and pydantic: pip install 'timm-senetv2[hub]'\n"
            assert (done.returncode, done.stderr) == (2, line)
        installed.run(*command, 'push', '--help', cwd=tmp_path)
        installed.run(*command, 'convert', '--help', cwd=tmp_path)
        installed.run(*command, 'models', 'small_*', cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['wheel', 'sdist'])
def test_every_registration_case_holds_for_an_installed_package(kind, dist, environment, tmp_path):
    environment.install(dist[kind])
    tests = tmp_path / 'tests'
    tests.mkdir()
    for name in ('test_registration.py', 'conftest.py', 'helpers/hub_server.py', 'helpers/interpreters.py'):
        shutil.copy(ROOT / 'tests' / name, tests)
    output = run(environment.python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', tests, cwd=tmp_path)
    assert ' passed' in output.splitlines()[-1] and 'failed' not in output and 'skipped' not in output
