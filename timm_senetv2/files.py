"""Files and folders that appear whole or not at all, and that never take the place of a user's own."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import UserError, is_full_disk, printable, why

MARK = '.timm-senetv2.json'
_NEW, _PREVIOUS, _LOCK = 'new', 'previous', 'lock'


@contextlib.contextmanager
def output_folder(out: str | os.PathLike[str], tool: str) -> Iterator[Path]:
    """A new folder to write into, which becomes `out` when the block ends without an error.

    The folder that `out` becomes carries a mark, the file `.timm-senetv2.json`: the tool, and the sha256 of each file.
    An `out` that exists and is not empty is replaced only if it carries this tool's mark and holds nothing but the
    files that the tool wrote, unchanged. After an error, or a kill at any moment, `out` is what it was; what a killed
    run left beside it is cleared by the next one. Permissions are those of any new file and folder (the umask's).

    Args:
        out: Where the folder is going to be. Parents are created.
        tool: The name of the command.

    Raises:
        UserError: Before the block, where `out` cannot be written or holds what the tool did not write; names it.
            After the block, where somebody wrote into `out` meanwhile; the new folder is kept under a name beside it.
    """
    out = _real(out)
    check_output(out, tool)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(out)
        workspace = out.parent / f'.timm-senetv2-{secrets.token_hex(4)}'
        workspace.mkdir()
    except OSError as e:
        raise UserError(f'cannot write {printable(out)}: {why(e)}') from None
    lock = FileLock(workspace / _LOCK)
    try:
        with lock:
            _write_json(workspace / MARK, dict(tool=tool, unfinished=out.name))
            new = workspace / _NEW
            new.mkdir()
            yield new
            _finish(new, tool, workspace)
            _take_place(new, out, tool, workspace)
    finally:
        _remove(workspace)


def check_output(out: str | os.PathLike[str], tool: str) -> None:
    """Make sure that `output_folder` may make or replace `out`, without touching anything.

    Raises:
        UserError: It may not; names the culprit.
    """
    out = _real(out)
    shown = printable(out)
    if out == out.parent or os.path.ismount(out):
        raise UserError(f'{shown} is the root of a file system; name a new folder in it')
    if not os.path.lexists(out):
        parent = next(p for p in out.parents if os.path.lexists(p))
        if not parent.is_dir():
            raise UserError(f'cannot write {shown}: {printable(parent)} is not a folder')
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f'cannot write {shown}: no permission to write into {printable(parent)}')
        return
    if not out.is_dir():
        raise UserError(f'{shown} is a file; name a new folder')
    with contextlib.suppress(OSError):  # a working directory that was removed has no path
        if Path.cwd().is_relative_to(out):
            raise UserError(f'{shown} is the folder you work in; name a new folder')
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UserError(f'cannot write {shown}: no permission to write into {printable(out.parent)}')
    try:
        culprit = _first_foreign(out, tool)
    except OSError as e:
        raise UserError(f'cannot read {shown}: {why(e)}; name a new folder') from None
    if culprit is not None:
        raise UserError(f'{shown} exists and {culprit}; nothing was changed; name a new folder')


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write one file to, which becomes `path` when the block ends without an error.

    It lies beside `path` and ends with the same suffix. The file is on the disk before it gets its name, and has the
    permissions of any new file (the umask's), whatever the writer gave it.

    Raises:
        UserError: It cannot be written.
    """
    path = _real(path)
    temporary = path.with_name(f'.{secrets.token_hex(6)}{path.suffix}')
    try:
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode & 0o777)
            _sync(temporary)
            os.replace(temporary, path)
        except OSError as e:
            if e.filename is not None and str(e.filename) not in (str(temporary), str(path)):
                raise
            raise UserError(f'cannot write {printable(path)}: {why(e)}') from None
        except Exception as e:  # some writers have error types of their own for a full disk
            if isinstance(e, UserError) or not is_full_disk(e):
                raise
            raise UserError(f'cannot write {printable(path)}: {why(e)}') from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _real(path: str | os.PathLike[str]) -> Path:
    """The path itself, absolute, where links lead elsewhere."""
    text = os.fspath(path)
    try:
        if not text:
            raise ValueError('the name is empty')
        return Path(text).resolve()
    except (OSError, RuntimeError, ValueError) as e:  # looping links, a NUL
        raise UserError(f'cannot write {printable(text)!r}: {why(e)}') from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open('w', encoding='utf-8', newline='\n') as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write('\n')
        file.flush()
        os.fsync(file.fileno())


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """The mark of a folder, or None where it has none of ours."""
    path = folder / MARK
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 24:
            return None
        mark = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) and isinstance(mark.get('tool'), str) else None


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything in a folder, by its name within it; links are not followed."""
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in sorted((*folders, *files)):
            path = Path(root, name)
            yield path.relative_to(folder).as_posix(), path


def _raise(error: OSError) -> None:
    raise error


def _first_foreign(out: Path, tool: str) -> str | None:
    """What in a folder was not written by the tool, in words; None where it is empty or all was."""
    if not any(out.iterdir()):
        return None
    mark = _read_mark(out)
    if mark is None or 'unfinished' in mark:
        return f'was not written by {tool}'
    if mark['tool'] != tool:
        return f'was written by {printable(mark["tool"])}, not by {tool}'
    files, folders = mark.get('files'), mark.get('folders')
    if not isinstance(files, dict) or not isinstance(folders, list):
        return f'its {MARK} is damaged'
    for name, path in _entries(out):
        if name == MARK:
            continue
        if path.is_symlink():
            return f'holds the link {printable(name)}, which {tool} did not write'
        if path.is_dir():
            if name not in folders:
                return f'holds the folder {printable(name)}, which {tool} did not write'
        elif name not in files:
            return f'holds {printable(name)}, which {tool} did not write'
        elif not path.is_file() or sha256(path) != files[name]:
            return f'its {printable(name)} was changed since {tool} wrote it'
    return None


def _finish(new: Path, tool: str, workspace: Path) -> None:
    """Give everything in the new folder the permissions of new files, bring it to the disk, and mark the folder."""
    file_mode = (workspace / MARK).stat().st_mode & 0o777
    folder_mode = workspace.stat().st_mode & 0o777
    files, folders = {}, []
    for name, path in _entries(new):
        if path.is_symlink() or name == MARK:
            continue
        if path.is_dir():
            folders.append(name)
            path.chmod(folder_mode)
        else:
            path.chmod(file_mode)
            _sync(path)
            files[name] = sha256(path)
    _write_json(new / MARK, dict(tool=tool, files=files, folders=folders))


def _take_place(new: Path, out: Path, tool: str, workspace: Path) -> None:
    """Rename the new folder to `out`; what was there waits in the workspace meanwhile, where the next run finds it."""
    try:
        check_output(out, tool)  # somebody may have written there since
        if out.exists():
            os.rename(out, workspace / _PREVIOUS)
        try:
            os.rename(new, out)
        except OSError:
            if (workspace / _PREVIOUS).exists() and not os.path.lexists(out):
                os.rename(workspace / _PREVIOUS, out)
            raise
    except (OSError, UserError) as e:
        number = 2
        while os.path.lexists(kept := out.with_name(f'{out.name}-{number}')):
            number += 1
        os.rename(new, kept)
        raise UserError(f'{why(e)}. What was written is in {printable(kept)}') from None
    _sync(out.parent)


def _clear_leftovers(out: Path) -> None:
    """Remove what killed runs for this folder left beside it; one that was about to replace it gives it back first."""
    for workspace in out.parent.glob('.timm-senetv2-*'):
        if workspace.is_symlink() or not workspace.is_dir():
            continue
        mark = _read_mark(workspace)
        with contextlib.suppress(OSError, Timeout):  # held by a process that is alive, or cleared by another
            if mark is not None and mark.get('unfinished') == out.name:
                with FileLock(workspace / _LOCK, timeout=0):
                    if (workspace / _PREVIOUS).is_dir() and not os.path.lexists(out):
                        os.rename(workspace / _PREVIOUS, out)
                    _remove(workspace)
            elif mark is None and time.time() - workspace.stat().st_mtime > 60:
                # killed before its mark was written, or when all but the folder was removed: rmdir takes empty ones
                inside = list(workspace.iterdir())
                if all(path.name in (_LOCK, MARK) and not path.stat().st_size for path in inside):
                    for path in inside:
                        path.unlink()
                workspace.rmdir()


def _remove(workspace: Path) -> None:
    """Remove a workspace, its mark last, so that what a kill leaves of it is known as ours."""
    for name in (_PREVIOUS, _NEW):
        shutil.rmtree(workspace / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (workspace / MARK).unlink(missing_ok=True)
        (workspace / _LOCK).unlink(missing_ok=True)
        workspace.rmdir()


def _sync(path: Path) -> None:
    """Bring a file or a folder to the disk, as far as the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # the umask may forbid reading
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
