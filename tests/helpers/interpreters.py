"""Interpreters that are new but for a few imported modules: importing torch takes most of the time of a short program.

As a program it imports the modules of its command line, and then forks for each line of its input that holds a program.
What a program does before or while it imports these modules needs a cold start, `subprocess`.
"""

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType


class Interpreters:
    """Starts the program above, and ends it: a context manager."""

    def __init__(
        self, *modules: str, env: Mapping[str, str] | None = None, python: Path | str = sys.executable
    ) -> None:
        self.command = [str(python), __file__, *modules]
        self.env = dict(env or os.environ)

    def __enter__(self) -> 'Interpreters':
        self.process = subprocess.Popen(
            self.command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()  # it has nothing to say, and torch takes its time to end
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def start(
        self, code: str, folder: Path | str = '.', path: Sequence[Path | str] = (), env: Mapping[str, str] | None = None
    ) -> 'Program':
        """Run code as `python -c` would in this folder, with these folders on its path (env: default ours)."""
        out = tempfile.TemporaryDirectory()
        request = dict(
            code=code,
            folder=os.path.abspath(folder),
            path=[str(p) for p in path],
            env=dict(os.environ if env is None else env),
            out=out.name,
        )
        return Program(self, self.ask(request), out)

    def run(self, code: str, folder: Path | str = '.', **more: object) -> 'Program':
        """`start`, and wait until it has ended."""
        program = self.start(code, folder, **more)
        program.wait()
        return program

    def ask(self, request: dict[str, object]) -> int:
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


class Program:
    """A running program, or one that has ended, as subprocess.Popen has it; stdout and stderr are text so far."""

    def __init__(self, server: Interpreters, pid: int, out: tempfile.TemporaryDirectory) -> None:
        self.server, self.pid, self.out = server, pid, out
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            status = self.server.ask(dict(wait=self.pid, options=options))
            self.returncode = None if status == RUNNING else status
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return Path(self.out.name, 'stdout').read_text()

    @property
    def stderr(self) -> str:
        return Path(self.out.name, 'stderr').read_text()


RUNNING = 1000  # in place of an exit code


def command(words: str | Sequence[object]) -> str:
    """The code that does what `python …` does: a script or `-m module` with its arguments, as a list or a line."""
    script, *arguments = shlex.split(words) if isinstance(words, str) else [str(word) for word in words]
    if script == '-m':
        module = arguments[0]
        return f'import runpy, sys; sys.argv = {arguments!r}; runpy.run_module({module!r}, run_name="__main__")'
    return f'import runpy, sys; sys.argv = {[script, *arguments]!r}; runpy.run_path({script!r}, run_name="__main__")'


def main() -> None:
    for module in sys.argv[1:]:
        __import__(module)
    gc.freeze()  # else each program's garbage collector copies the pages that hold them
    for line in sys.stdin:
        request = json.loads(line)
        if 'wait' in request:
            pid, status = os.waitpid(request['wait'], request['options'])
            print(os.waitstatus_to_exitcode(status) if pid else RUNNING, flush=True)
        else:
            child = os.fork()
            if child == 0:
                os._exit(_run(**request))
            print(child, flush=True)


def _run(code: str, folder: str, path: list[str], env: dict[str, str], out: str) -> int:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate((os.devnull, f'{out}/stdout', f'{out}/stderr')):
        file = os.open(name, os.O_CREAT | os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    sys.path[:1] = ['', *path]  # as of a program that is started there
    sys.argv = ['-c']
    module = sys.modules['__main__'] = ModuleType('__main__')
    status = 0
    try:
        exec(compile(code, '<string>', 'exec'), module.__dict__)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == '__main__':
    main()
