"""SIGKILL in the middle of commands: afterwards nothing is half-written, nothing is lost, and the next run succeeds."""

import hashlib
import random
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import timm
import torch
from PIL import Image
from tqdm import tqdm

from experiments.files import read_results
from timm_senetv2.errors import UserError, run

from . import processes
from .tally import Tally

PATIENCE = 300.0  # seconds for a run that nothing disturbs


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        name: What it is called in the results.
        module: Where its `main` is.
        argv: Its arguments; the working directory holds what `prepare` made.
        prepare: Fills the working directory.
        out: The folder or file that it makes, in the working directory.
        kills: In a full run.
        resumes: Whether it goes on where it was killed, so that `out` may hold a part; else it is whole or as before.
    """

    name: str
    module: str
    argv: tuple[str, ...]
    prepare: Callable[[Path], None]
    out: str
    kills: int
    resumes: bool = False

    def main(self) -> None:
        run(lambda: import_module(self.module).main(list(self.argv)))


def _checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save(dict(epoch=3, state_dict=timm.create_model('small_saecnn').state_dict()), folder / 'best.pth')


def _page(folder: Path) -> None:
    old = ''.join(f'before\n<!-- docs.py: {name} -->\nold\n<!-- /docs.py -->\n' for name in ('weights', 'families'))
    (folder / 'page.md').write_text(old)


def _images(folder: Path) -> None:
    for split, count in (('train', 6), ('val', 2)):
        for label in ('ant', 'bee'):
            (folder / 'src' / split / label).mkdir(parents=True)
            for i in range(count):
                colour = (40 * i, 99 * (split == 'val'), 99 * (label == 'bee'))
                Image.new('RGB', (8, 8), colour).save(folder / 'src' / split / label / f'{i}.png')


def _tar(folder: Path) -> None:
    _images(folder)
    with tarfile.open(folder / 'src.tar', 'w') as tar:
        tar.add(folder / 'src' / 'train', '.')
    shutil.rmtree(folder / 'src')


def _nothing(folder: Path) -> None:
    pass


_SUBSET = ('out', '--per-class', '4')
COMMANDS = (
    Command('timm-senetv2 convert', 'timm_senetv2.commands', ('convert', 'best.pth', '--model', 'small_saecnn')
            + ('--out', 'out'), _checkpoint, 'out', 28),
    Command('timm-senetv2 push --dry-run', 'timm_senetv2.commands', ('push', '--model', 'cifar_resnet20')
            + ('--pretrained', 'fmnist', '--repo-id', 'me/x', '--dry-run', 'out'), _nothing, 'out', 24),
    Command('docs.py', 'docs', ('page.md',), _page, 'page.md', 14),
    Command('make_imagenet_subset.py, folder', 'make_imagenet_subset', ('src', *_SUBSET), _images, 'out', 14, True),
    Command('make_imagenet_subset.py, tar', 'make_imagenet_subset', ('src.tar', *_SUBSET), _tar, 'out', 14, True),
    Command('quickstart.py', 'quickstart', ('--models', 'small_cnn', '--epochs', '1', '--out', 'out')
            , _nothing, 'out', 8),
    Command('reproduce.py', 'reproduce', ('--dataset', 'digits', '--limit', '128', '--models', 'small_cnn', '--epochs')
            + ('2', '--batch-size', '64', '--image-size', '8', '--seeds', '0', '1', '--out', 'out', '--device', 'cpu')
            + ('--save-weights',), _nothing, 'out', 10, True),
)  # fmt: skip


def check(seed: int, share: float, jobs: int) -> Tally:
    """Kill each command, a share of its full number of times, and run it again after each kill."""
    tally = Tally('kills')
    commands = COMMANDS if share == 1 else COMMANDS[:3]
    numbers = {command: max(2, round(command.kills * share)) for command in commands}
    with tqdm(total=sum(numbers.values()), desc='kills', unit='kill', disable=None) as bar:

        def kill(command: Command) -> None:
            chance = random.Random(f'{seed} {command.name}')
            with tempfile.TemporaryDirectory() as scratch:
                trial = _Trial(command, Path(scratch))
                for number in range(numbers[command]):
                    began = time.monotonic()
                    case, wrong = trial.kill(number, chance)
                    case = f'{command.name}, {case}'
                    tally.add(case, 'right' if wrong is None else 'failed', 0.0, wrong or '')
                    tally.rows[case].slowest_s = max(tally.rows[case].slowest_s, time.monotonic() - began)
                    bar.update()

        with ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(kill, command) for command in reversed(commands)]:  # the longest first
                future.result()
    tally.rows = dict(sorted(tally.rows.items()))
    return tally


class _Trial:
    """One command, what it writes when nothing disturbs it, how long it takes and in how many steps."""

    def __init__(self, command: Command, scratch: Path) -> None:
        self.command, self.scratch = command, scratch
        self.folder = scratch / 'work'
        self._fresh()
        began = time.monotonic()
        strike = processes.Strike(0, scratch / 'steps')
        process = self._start(strike)
        process.join(PATIENCE)
        self.seconds = time.monotonic() - began
        if process.exitcode != 0:
            raise UserError(f'{command.name} fails undisturbed: {(scratch / "log.err").read_text()[-500:]}')
        self.steps = int((scratch / 'steps').read_text() or 0)
        self.reference = self._written()
        self.whole = _snapshot(self.folder)

    def kill(self, number: int, chance: random.Random) -> tuple[str, str | None]:
        """Kill it once. Every second time before a step on the file system, else at any instant; every third time
        with the result of an earlier run in place."""
        replaces = number % 3 == 2
        if not replaces:
            self._fresh()
        before = _snapshot(self.folder)
        case = f'{"replacing its result, " if replaces else ""}killed '
        if number % 2:
            case += 'before a step on the file system'
            process = self._start(processes.Strike(chance.randint(1, max(1, self.steps)), self.scratch / 'steps'))
            process.join(PATIENCE)
        else:
            case += 'at any instant'
            process = self._start()
            process.join(chance.uniform(0.0, self.seconds))
            process.kill()
            process.join()
        return case, self._why_wrong(before) or self._why_not_again()

    def _start(self, strike: processes.Strike | None = None):
        return processes.start(self.command.main, folder=self.folder, log=self.scratch / 'log', strike=strike)

    def _fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / 'thesis.tex').write_text('mine')
        self.command.prepare(self.folder)

    def _why_wrong(self, before: dict[str, str]) -> str | None:
        """What the kill has lost, or left half-written where it is taken for whole."""
        now = _snapshot(self.folder)
        out = self.command.out
        for name, digest in before.items():
            if name.split('/')[0] != out and now.get(name) != digest:
                return f'{name} is lost or changed'
        for name in now.keys() - before.keys():
            if name.split('/')[0] != out and not name.startswith('.'):
                return f'{name} was left behind in sight'
        if self.command.resumes:
            return self._why_wrong_part()
        parts = [{k: v for k, v in state.items() if k.split('/')[0] == out} for state in (now, before, self.whole)]
        if parts[0] in parts[1:]:
            return None
        kept = [name for name in now if name.startswith('.timm-senetv2-') and '/previous/' in name]
        if not parts[0] and len(kept) == len(parts[1]):  # between its two renames: the next run gives it back
            return None
        return f'{out} is neither as before nor whole: {sorted(parts[0])}'

    def _why_wrong_part(self) -> str | None:
        """Of a command that resumes: whether each of its files is whole, and what it lists is there."""
        out = self.folder / self.command.out
        if self.command.module == 'reproduce':
            results, _ = read_results(out)  # raises unless both files are whole and agree
            if any(row not in self.reference['rows'] for row in map(_of_run, results)):
                return 'results.csv holds another run than an undisturbed one'
            return None
        for name, digest in _snapshot(out).items() if out.exists() else ():
            path = Path(name)
            if path.suffix == '.png' and not path.name.startswith('.') and self.reference['files'].get(name) != digest:
                return f'{name} is half-written'
        return None

    def _why_not_again(self) -> str | None:
        """What is wrong with the next run and what it leaves."""
        process = self._start()
        process.join(PATIENCE)
        if process.exitcode != 0:
            process.kill()
            return f'the next run ended with {process.exitcode}: {(self.scratch / "log.err").read_text()[-300:]}'
        if self._written() != self.reference:
            return 'the next run wrote something else than an undisturbed one'
        return None

    def _written(self) -> dict:
        """What the command wrote, as far as it does not hold the time that it took."""
        out = self.folder / self.command.out
        if self.command.module == 'reproduce':
            results, curves = read_results(out)
            weights = {k: v for k, v in _snapshot(out / 'weights').items() if k.endswith('.safetensors')}
            return dict(rows=sorted(map(_of_run, results), key=str), curves=sorted(curves, key=str), weights=weights)
        files = _snapshot(out) if out.is_dir() else {out.name: _digest(out)}
        # what a kill leaves hidden is cleared by a run a minute later: it might be of a process that is alive
        beside = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith('.'))
        return dict(files={k: v for k, v in files.items() if not k.endswith('quickstart.png')}, beside=beside)


def _of_run(row: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in row.items() if k not in ('seconds', 'images_per_second', 'data_wait_share')}


def _snapshot(folder: Path) -> dict[str, str]:
    """Every file of a folder by its name within it, with its content's digest; links by where they lead."""
    found = {}
    for path in sorted(folder.rglob('*')):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f'-> {path.readlink()}'
        elif path.is_file():
            found[name] = _digest(path)
    return found


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name == '.timm-senetv2.json':  # the digests in it are those of the files, and of the picture
        return 'mark'
    return hashlib.sha256(content).hexdigest()
