"""What the scripts share towards the person who runs them."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's, or of the machine's, that one line explains: what is wrong and what to do."""


def one_line(error: Exception) -> str:
    """What an exception says, to be part of a UserError's line."""
    return ' '.join(str(error).split()) or type(error).__name__


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main function and exit: 2 and one plain line on a UserError, a full disk or a path that the
    system refuses, 130 on Ctrl-C."""
    try:
        code = main()
    except UserError as e:
        print(f'error: {e}', file=sys.stderr)
        code = 2
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            says = f'the disk is full{f": {e.filename}" if e.filename else ""}; free some space and run it again'
        elif e.filename:
            says = f'{e.filename} cannot be used: {e.strerror}; give another path, or mend this one'
        else:
            raise
        print(f'error: {says}', file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 130
    sys.exit(code)
