"""timm's own scripts, as they are: where they come from, and how they run. timm's wheel does not carry them."""

import argparse
import contextlib
import os
import re
import runpy
import sys
import zipfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from filelock import FileLock
from torch.nn.parallel import DistributedDataParallel

from . import register
from .errors import UserError, one_line, printable

REPO = 'huggingface/pytorch-image-models'


class AnyDeviceDDP(DistributedDataParallel):
    """DistributedDataParallel that takes a CPU in `device_ids`.

    train.py names its device there whatever it is; for modules on the CPU torch wants None and raises otherwise.
    """

    def __init__(self, module: torch.nn.Module, device_ids: list[Any] | None = None, **kwargs: Any) -> None:
        if device_ids is not None:
            device_ids = [d for d in device_ids if torch.device(d).type != 'cpu'] or None
        super().__init__(module, device_ids=device_ids, **kwargs)


def cached_checkout() -> Path:
    """Where torch.hub keeps the sources of the installed timm's release."""
    return Path(torch.hub.get_dir()) / f'{REPO.replace("/", "_")}_v{timm.__version__}'


def fetch() -> None:
    """Fetch them there; of several processes (torchrun's ranks) the first does and the others wait for it."""
    checkout = cached_checkout()
    try:
        checkout.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(checkout.with_name(f'{checkout.name}.lock')):
            if checkout.is_dir():
                return
            # Skipped is the check, by GitHub's rate-limited API, that a commit is not of a fork: a release tag is not.
            with contextlib.redirect_stdout(sys.stderr):
                torch.hub.list(f'{REPO}:v{timm.__version__}', skip_validation=True, trust_repo=True, verbose=False)
    except (OSError, HTTPException, zipfile.BadZipFile) as e:
        raise UserError(
            f'the scripts of timm {timm.__version__} could not be fetched into {checkout} ({e}); run git clone '
            f'--depth 1 --branch v{timm.__version__} https://github.com/{REPO} timm-repo where there is internet, '
            'and pass --timm-repo timm-repo'
        ) from None


def find_script(name: str, timm_repo: str | None) -> Path:
    """The path of timm's script `name`, fetched if need be; warns where the checkout is of another version."""
    if timm_repo:
        checkout = Path(timm_repo).expanduser().resolve()
        if not (checkout / f'{name}.py').is_file():
            raise UserError(
                f'{checkout} has no {name}.py; --timm-repo and $TIMM_REPO name a checkout of https://github.com/{REPO}'
            )
    else:
        checkout = cached_checkout()
        if not checkout.is_dir():
            fetch()
        if not (checkout / f'{name}.py').is_file():
            raise UserError(f'{checkout} has no {name}.py; delete that folder and run this again')

    version_file = checkout / 'timm' / 'version.py'
    found = re.search(r"__version__ = '(.+)'", version_file.read_text()) if version_file.is_file() else None
    version = found[1] if found else 'unknown'
    if version != timm.__version__ and os.environ.get('RANK', '0') == '0':
        print(
            f'warning: {name}.py of timm {version} runs with the installed timm {timm.__version__}; '
            f'if it fails, use a checkout of v{timm.__version__}',
            file=sys.stderr,
        )
    return checkout / f'{name}.py'


def run_script(name: str, timm_repo: str | None, arguments: Sequence[str]) -> None:
    """Run one of timm's scripts in this process, as `python script.py ARGUMENTS` would.

    Raises:
        UserError: There is no such script and none can be fetched.
    """
    register()  # the models are there even with torch's autoload off
    script = find_script(name, timm_repo)
    sys.argv = [str(script), *arguments]
    # As `python script.py` would have it, its folder in place of the one that `python -m` puts there, which may hold
    # another timm; but last, lest its own `timm` shadow the installed one
    own = {str(Path.cwd()), ''} if sys.path and not getattr(sys.flags, 'safe_path', False) else set()
    sys.path[:] = [p for i, p in enumerate(sys.path) if i or p not in own] + [str(script.parent)]
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        torch.nn.parallel.DistributedDataParallel = AnyDeviceDDP  # type: ignore[misc, assignment]
    runpy.run_path(str(script), run_name='__main__')


def with_resume(arguments: Sequence[str]) -> list[str]:
    """train.py's arguments, `--resume auto` replaced by the newest checkpoint of the experiment, or left out.

    Raises:
        UserError: `--resume auto` without `--experiment`: train.py then makes a new folder in every run.
    """
    own = arguments[: arguments.index('--')] if '--' in arguments else arguments
    at = next(
        (i for i, a in enumerate(own) if a == '--resume=auto' or list(own[i : i + 2]) == ['--resume', 'auto']), None
    )
    if at is None:
        return list(arguments)
    before, after = list(arguments[:at]), list(arguments[at + (1 if '=' in arguments[at] else 2) :])
    newest = newest_checkpoint(_experiment_folder([*before, *after]))
    if os.environ.get('RANK', '0') == '0':
        print(f'resuming from {newest}' if newest else 'no checkpoint yet: starting afresh', file=sys.stderr)
    return [*before, *(['--resume', str(newest)] if newest else []), *after]


def _experiment_folder(arguments: Sequence[str]) -> Path:
    """Where train.py puts what it writes, by its arguments and the file of its --config."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-c', '--config')
    parser.add_argument('--output')
    parser.add_argument('--experiment')
    given = parser.parse_known_args(list(arguments))[0]
    settings: Any = {}
    if given.config:
        try:
            settings = yaml.safe_load(Path(given.config).read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
            raise UserError(f'cannot read --config {printable(given.config)}: {one_line(e)}') from None
    if not isinstance(settings, dict):
        settings = {}
    experiment = given.experiment or settings.get('experiment')
    if not experiment:
        raise UserError('--resume auto needs --experiment NAME: without it, every run gets a new folder')
    return Path(given.output or settings.get('output') or './output/train', str(experiment))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest epoch among those that train.py keeps in a folder; None where there is none.

    Damaged ones are passed over. One that train.py wrote in the middle of an epoch (recovery) counts only where there
    is no other, since the rest of its epoch would be skipped.
    """
    found = []
    for path in folder.glob('*.pth.tar') if folder.is_dir() else ():
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                epoch = torch.load(path, map_location='cpu', weights_only=True, mmap=True)['epoch']
            found.append((not path.name.startswith('recovery'), int(epoch), path.name == 'last.pth.tar', path))
        except Exception:  # a damaged file can fail in any way
            print(f'warning: {printable(path)} is damaged; passing it over', file=sys.stderr)
    return max(found)[-1] if found else None
