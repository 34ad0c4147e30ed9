"""Interpreters that are new but for torch and torchvision, whose import takes most of the time of a short program.

They are forked from a process that has imported these two and nothing else: not timm, and of this package only what
`import torch` calls. What a program does before or while it imports torch needs a cold start, `subprocess.run`.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['torch', 'torchvision'])


@dataclass(frozen=True)
class Done:
    """What a program left, as subprocess.CompletedProcess has it."""

    returncode: int
    stdout: str
    stderr: str


def run_code(code: str, cwd: Path, path: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Done:
    """Run the code as `python -c` would, with these folders first on its path and this environment (default: ours)."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, 'out'), Path(folder, 'err')
        process = _context.Process(target=_run, args=(code, cwd, list(path), dict(env or os.environ), out, err))
        process.start()
        process.join()
        return Done(process.exitcode, out.read_text(), err.read_text())


def _run(code: str, cwd: Path, path: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = ['', *path]
    exec(compile(code, '<string>', 'exec'), {'__name__': '__main__', '__builtins__': __builtins__})
