"""Run timm's own model tests, unmodified, for the models of this package.

They are `tests/test_models.py` of the source distribution of the installed timm, which pip downloads once into
build/timm-tests. This file is also the pytest plugin that picks our models out of all of timm's: see `pytest_configure`
and `pytest_collection_modifyitems`.

Left out, unless --pretrained is given: test_model_load_pretrained and test_model_features_pretrained, which download
the weights of every pretrained tag.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / 'build' / 'timm-tests'
# Every family and each kind of trunk once, all of them quick on a CPU
FAST = (
    'small_cnn',
    'small_secnn',
    'small_saecnn',
    'cifar_resnet20',
    'cifar_seresnet20',
    'cifar_senetv2_resnet20',
    'seanet20',
    'senetv2_resnet18',
    'senextv2_26t_32x4d',
)
NEED_NETWORK = ('test_model_load_pretrained', 'test_model_features_pretrained')


def fetch() -> Path:
    """The folder with timm's tests and pytest settings, downloaded if it isn't there yet."""
    timm_version = version('timm')
    folder = CACHE / f'timm-{timm_version}'
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        print(f'Downloading the source distribution of timm {timm_version}', flush=True)
        pip = subprocess.run(
            [
                sys.executable,
                '-m',
                'pip',
                'download',
                '--quiet',
                '--disable-pip-version-check',
                '--no-deps',
                '--no-binary',
                'timm',
                '--dest',
                temporary,
                f'timm=={timm_version}',
            ]
        )
        sdists = list(Path(temporary).glob('timm-*.tar.gz'))
        if pip.returncode != 0 or len(sdists) != 1:
            sys.exit(f'error: pip could not download the source distribution of timm {timm_version}, see above')
        with tarfile.open(sdists[0]) as archive:
            # without its timm folder, so that the tests import the installed timm
            wanted = [m for m in archive.getmembers() if m.name.split('/')[1] in ('tests', 'pyproject.toml')]
            archive.extractall(temporary, members=wanted, filter='data')
        shutil.move(Path(temporary) / f'timm-{timm_version}', folder)
    return folder


def _copy_tests(checkout: Path) -> Path:
    """The folder with a checkout's tests, without its timm folder, so that they import the installed timm."""
    if not (checkout / 'tests' / 'test_models.py').is_file():
        sys.exit(f'error: {checkout} has no tests/test_models.py; --timm-repo takes a checkout of timm')
    folder = CACHE / 'checkout'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkout / 'tests', folder / 'tests')
    shutil.copy(checkout / 'pyproject.toml', folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='All other arguments go to pytest: -k, -x, --durations=20, …',
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--fast', action='store_true', help=f'only {", ".join(FAST)}')
    which.add_argument('--rest', action='store_true', help='all models but those of --fast')
    which.add_argument('--models', nargs='+', metavar='NAME', help='only these')
    parser.add_argument(
        '--timm-repo', type=Path, metavar='DIR', help='a checkout of the installed timm, in place of the download'
    )
    parser.add_argument('--pretrained', action='store_true', help='also the tests that download pretrained weights')
    args, pytest_args = parser.parse_known_args()

    import timm

    from timm_senetv2.registration import MODEL_MODULES

    ours = timm.list_models(module=MODEL_MODULES)
    chosen = args.models or [name for name in ours if not (args.fast or args.rest) or (name in FAST) == args.fast]
    unknown = sorted(set(chosen) - set(ours))
    if unknown:
        sys.exit(f'error: not a model of timm_senetv2: {", ".join(unknown)}')
    folder = _copy_tests(args.timm_repo) if args.timm_repo else fetch()
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')])),
        TIMM_TESTS_MODELS=','.join(chosen),
        TIMM_TESTS_PRETRAINED='1' if args.pretrained else '',
    )
    # Whether a model is right does not depend on the speed of this machine: no time limits
    return subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            '-p',
            Path(__file__).stem,
            '-p',
            'no:timeout',
            '-p',
            'no:cacheprovider',
            '-c',
            'pyproject.toml',
            '-W',
            'ignore::pytest.PytestUnknownMarkWarning',
            '-q',
            'tests/test_models.py',
            *pytest_args,
        ],
        cwd=folder,
        env=environment,
    ).returncode


# ---- the plugin


def pytest_configure() -> None:
    """Show timm's tests our models only, also where they ask for the modules that have `forward_intermediates`."""
    import timm

    chosen = set(os.environ['TIMM_TESTS_MODELS'].split(','))
    list_all = timm.list_models

    def list_models(filter='', module='', **kwargs):
        # timm's tests name the modules to test for intermediates; all of ours are to be
        return [name for name in list_all(filter, **kwargs) if name.split('.')[0] in chosen]

    timm.list_models = list_models


def pytest_collection_modifyitems(config, items) -> None:
    chosen = set(os.environ['TIMM_TESTS_MODELS'].split(','))
    out = set() if os.environ['TIMM_TESTS_PRETRAINED'] else set(NEED_NETWORK)
    selected, deselected = [], []
    for item in items:
        name = item.callspec.params.get('model_name', '') if hasattr(item, 'callspec') else ''
        keep = str(name).split('.')[0] in chosen and item.originalname not in out
        (selected if keep else deselected).append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)


if __name__ == '__main__':
    sys.exit(main())
