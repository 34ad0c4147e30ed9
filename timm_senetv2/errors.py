"""Mistakes of the user's or the machine's, told in one plain line."""

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TextIO

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake of the user's, or of the machine's. Its text is one plain line: what is wrong and what to do."""


def printable(text: object, limit: int = 200) -> str:
    """Text from a file, to be shown: control characters and other non-printables escaped, its end cut off.

    Args:
        text: Anything; `str` is taken of it.
        limit: Characters to show at most.
    """
    text = str(text)
    shown = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text[:limit])
    return shown if len(text) <= limit else f'{shown} …'


def one_line(error: BaseException) -> str:
    """What an exception says, to be part of a UserError's line; the name of its type where it says nothing."""
    return printable(' '.join(str(error).split()), limit=500) or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a line about an unknown name: '; did you mean a or b?', or nothing where no known name is close."""
    close = [printable(match) for match in difflib.get_close_matches(name, list(known), n=3)]
    if not close:
        return ''
    return f'; did you mean {" or ".join(filter(None, [", ".join(close[:-1]), close[-1]]))}?'


def is_full_disk(error: BaseException) -> bool:
    """Whether this is the system's answer to a write for which there is no room.

    safetensors writes in Rust and raises a type of its own with the system's message inside.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL_DISK
    return any(os.strerror(code) in str(error) for code in _FULL_DISK)


def why(error: BaseException) -> str:
    """Why a file could not be used, in a few words: the system's reason without number and path."""
    if is_full_disk(error):
        return 'the disk is full; free some space and run it again'
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


class Stream:
    """A text stream whose reader may close it, as `| head -1` does: what is left to say is then dropped.

    A run that has worked for hours must not end because nobody reads its progress.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._reader_may_be_gone():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # names of files hold any bytes, and a terminal may know ASCII alone
                encoding = self._stream.encoding or 'ascii'
                self._stream.write(text.encode(encoding, 'backslashreplace').decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._reader_may_be_gone():
            self._stream.flush()

    @contextlib.contextmanager
    def _reader_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and exit as every command of this project does.

    With 2 and one plain line on a UserError, a full disk or a path that the system refuses; with 130 on Ctrl-C. A
    closed pipe behind stdout or stderr does not end the run.
    """
    streams = sys.stdout, sys.stderr
    nowhere = open(os.devnull, 'w')  # in place of a stream that was closed before the start: that one is None
    sys.stdout, sys.stderr = Stream(sys.stdout or nowhere), Stream(sys.stderr or nowhere)
    try:
        code = _main_code(main)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
    sys.exit(code)


def _main_code(main: Callable[[], int | None]) -> int | None:
    try:
        return main()
    except UserError as e:
        says = ' '.join(str(e).split())
    except OSError as e:
        if e.errno in _FULL_DISK:
            says = f'the disk is full{f": {e.filename}" if e.filename else ""}; free some space and run it again'
        elif e.filename:
            says = f'{e.filename} cannot be used: {e.strerror}; give another path, or mend this one'
        else:
            raise
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    print(f'error: {printable(says, limit=2000)}', file=sys.stderr)
    return 2
