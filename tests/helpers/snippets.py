"""Runs snippets of Python, each in a process of its own, without the seconds that importing torch and timm takes.

As a program it imports both and then forks for each line of its input: `{"code": …, "folder": …}`. It answers with the
exit status; what the snippet printed is in the folder, in `stdout` and `stderr`.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


class Runner:
    """Starts the program above, and ends it: a context manager."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)

    def __enter__(self) -> 'Runner':
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, code: str, folder: Path) -> Done:
        self.process.stdin.write(json.dumps(dict(code=code, folder=str(folder))) + '\n')
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return Done(status, (folder / 'stdout').read_text(), (folder / 'stderr').read_text())


def main() -> None:
    import timm  # noqa: F401  torch with it, and what registers our models

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_run(**request))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(code: str, folder: str) -> int:
    os.chdir(folder)
    for name, stream in (('stdout', sys.stdout), ('stderr', sys.stderr)):
        file = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    os.close(sys.stdin.fileno())
    status = 0
    sys.path[0] = ''  # as of a program that the reader starts there
    module = sys.modules['__main__'] = ModuleType('__main__')
    try:
        exec(compile(code, 'snippet', 'exec'), module.__dict__)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == '__main__':
    main()
