"""The tests with the oldest and the newest of everything that pyproject.toml supports: `nox`, and `nox --list`.

Each session has an environment of its own under build/nox, made with uv where uv is installed; `-R` uses it again.
What follows `--` goes to pytest: `nox -s lowest -- tests/test_hub.py -k push`. A Python that is not on this machine
is fetched by uv, or its session is skipped.
"""

import re
from pathlib import Path

import nox

PROJECT = nox.project.load_toml('pyproject.toml')['project']
PYTHONS = nox.project.python_versions(nox.project.load_toml('pyproject.toml'))
EXTRAS = ('hub', 'gates', 'train', 'export', 'experiments', 'docs', 'test')  # as scripts/test.sh
CORE = tuple(f'tests/test_{name}.py' for name in ('layers', 'blocks', 'models', 'registration', 'package'))

nox.needs_version = '>=2024.10'
nox.options.sessions = ('lowest', 'newest')
nox.options.default_venv_backend = 'uv|virtualenv'
nox.options.envdir = 'build/nox'
nox.options.error_on_missing_interpreters = False


def lower_bounds() -> list[str]:
    """The package's own dependencies and those of its commands, each at the lowest version that is allowed."""
    optional = PROJECT['optional-dependencies']
    requirements = [*PROJECT['dependencies'], *optional['hub'], *optional['train'], *optional['export']]
    return [re.sub('>=', '==', requirement, count=1) for requirement in requirements]


def run_tests(session: nox.Session, default: tuple[str, ...]) -> None:
    session.run('python', '-m', 'pytest', '-q', '-n', '2', '--dist', 'loadscope', *(session.posargs or default))


def install(session: nox.Session, *requirements: str) -> None:
    session.env['OMP_NUM_THREADS'] = '1'  # two processes side by side are faster than two threads in one
    # uv's environments lack both: pip fetches timm's tests, and torch.compile of torch 2.5 imports setuptools
    session.install('pip', 'setuptools', *requirements, '-e', f'.[{",".join(EXTRAS)}]')
    names = ('torch', 'torchvision', 'timm', 'huggingface_hub')
    session.run('python', '-c', f'import importlib.metadata as m\nfor n in {names}: print(n, m.version(n))')


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """The oldest Python with the lowest torch, timm, huggingface_hub and others: the core tests, and timm's own."""
    install(session, *lower_bounds())
    if not session.posargs:
        session.run('python', 'tests/run_timm_tests.py', '--fast', '-n', '2')
    run_tests(session, CORE)


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """Each supported Python with the newest of everything: all tests but the slow ones."""
    install(session, '--upgrade')
    run_tests(session, ('tests',))


@nox.session
def timm_main(session: nox.Session) -> None:
    """timm from a checkout, `nox -s timm_main -- FOLDER [pytest's arguments]`: the core tests, and that timm's own."""
    if not session.posargs or not (Path(session.posargs[0]) / 'timm' / '__init__.py').is_file():
        session.error('say where timm is: nox -s timm_main -- /path/to/pytorch-image-models')
    checkout = Path(session.posargs.pop(0)).resolve()
    install(session)
    session.install('--no-deps', str(checkout))
    session.run('python', '-c', 'import timm; print("timm", timm.__version__)')
    if not session.posargs:
        session.run('python', 'tests/run_timm_tests.py', '--fast', '--timm-repo', str(checkout), '-n', '2')
    run_tests(session, CORE)
