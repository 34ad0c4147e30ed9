"""Run timm's own train.py, or another of its scripts, as they are: timm's wheel does not carry them.

    python scripts/train.py --data-dir imagenet --model senetv2_resnet50 ...
    torchrun --nproc_per_node=8 scripts/train.py --config scripts/recipes/senetv2_resnet50_rsb_a2.yaml --data-dir ...
    python scripts/train.py --script validate --data-dir imagenet --model senetv2_resnet50 --checkpoint last.pth.tar

The script is taken from the first of these: --timm-repo or $TIMM_REPO; the copy of the installed timm's release in
torch.hub's cache; GitHub, by torch.hub, into that cache. `timm` itself stays the installed one. All arguments but the
ones below go to timm's script untouched.
"""

import argparse
import contextlib
import os
import re
import runpy
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path

import timm
import torch
from _cli import UserError, run
from filelock import FileLock
from torch.nn.parallel import DistributedDataParallel

import timm_senetv2  # noqa: F401  the models are there even with torch's autoload off

SCRIPTS = ('train', 'validate', 'benchmark', 'inference', 'onnx_export')
REPO = 'huggingface/pytorch-image-models'


class AnyDeviceDDP(DistributedDataParallel):
    """DistributedDataParallel that takes a CPU in `device_ids`.

    train.py names its device there whatever it is; for modules on the CPU torch wants None and raises otherwise.
    """

    def __init__(self, module: torch.nn.Module, device_ids: list | None = None, **kwargs) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--script NAME] [--timm-repo DIR] [--timm-help] [ARGS of timm's script ...]",
        allow_abbrev=False,
    )
    parser.add_argument('--script', choices=SCRIPTS, default='train', help="which of timm's scripts (default: train)")
    parser.add_argument(
        '--timm-repo',
        metavar='DIR',
        default=os.environ.get('TIMM_REPO'),
        help="a checkout of timm's repository, best of the installed version (default: $TIMM_REPO)",
    )
    parser.add_argument('--timm-help', action='store_true', help="show the options of timm's script instead of these")
    args, timm_args = parser.parse_known_args()

    script = find_script(args.script, args.timm_repo)
    sys.argv = [str(script), *(['--help'] if args.timm_help else timm_args)]
    # As `python script.py` would have it, its folder in place of ours; but last, lest its `timm` shadow the installed.
    sys.path[:] = [p for p in sys.path if p != str(Path(__file__).parent)] + [str(script.parent)]
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        torch.nn.parallel.DistributedDataParallel = AnyDeviceDDP
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    run(main)
