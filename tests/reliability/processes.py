"""Commands in processes of their own that start at once: forked from one that has imported what they need."""

import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

PRELOADED = ('reliability.preloaded',)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_STEPS = {'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.chmod', 'os.link', 'os.symlink', 'os.truncate'}


_STARTING = threading.Lock()


@dataclass
class Strike:
    """A process's own end by SIGKILL, right before so many steps on the file system; at 0 they are only counted."""

    step: int
    count_file: Path


def context() -> Any:
    """The context of multiprocessing whose processes are forked from the one that imported `PRELOADED`.

    That one starts here, with an environment of its own: what starts other processes later keeps the one it has.
    """
    found = get_context('forkserver')
    found.set_forkserver_preload([*PRELOADED])
    # Python before 3.13 does not tell the server where to look
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get('PYTHONPATH', '')]))
    with _STARTING, patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'):
        forkserver.ensure_running()
    return found


def start(main: Callable[..., object], *args: Any, folder: Path, log: Path, strike: Strike | None = None) -> Any:
    """Start `main(*args)` in a process whose working directory is `folder`; stdout and stderr go to `log`.out, .err."""
    process = context().Process(target=_run, args=(main, args, folder, log, strike), daemon=True)
    process.start()
    return process


def _run(main: Callable[..., object], args: tuple, folder: Path, log: Path, strike: Strike | None) -> None:
    os.chdir(folder)
    os.environ['TMPDIR'] = str(log.parent)
    for descriptor, end in ((1, '.out'), (2, '.err')):
        opened = os.open(f'{log}{end}', os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(opened, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
    if strike is not None:
        _arm(strike, str(folder))
    code: object = 0
    try:
        main(*args)
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _arm(strike: Strike, folder: str) -> None:
    counter = os.open(strike.count_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event == 'open':
            if not isinstance(args[0], (str, bytes)) or not isinstance(args[2], int) or not args[2] & _WRITES:
                return
        elif event not in _STEPS:
            return
        if not os.path.abspath(os.fsdecode(args[0])).startswith(folder):
            return
        seen += 1
        if seen == strike.step:
            os.kill(os.getpid(), signal.SIGKILL)
        os.pwrite(counter, str(seen).encode(), 0)

    sys.addaudithook(hook)


def limit_memory(more: int) -> None:
    """Let this process take so many bytes of address space more than it has."""
    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
