"""Files and folders are whole or absent whatever happens, and a user's own are never touched."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from timm_senetv2 import files
from timm_senetv2.errors import UserError
from timm_senetv2.files import MARK, output_folder, write_atomically


def write(out: Path, tool: str = 'convert', **contents: str) -> None:
    with output_folder(out, tool) as folder:
        for name, text in (contents or {'a': 'one', 'sub/b': 'two'}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


def snapshot(folder: Path) -> dict[str, str | None]:
    """Everything in a folder and beside it, with the contents of files."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob('*'))
    }


def test_folder_appears_whole_with_a_mark_naming_the_tool_and_its_files(tmp_path):
    write(tmp_path / 'new' / 'out')
    found = snapshot(tmp_path / 'new')
    mark = json.loads(found.pop(f'out/{MARK}'))
    assert found == {'out': None, 'out/a': 'one', 'out/sub': None, 'out/sub/b': 'two'}
    assert mark['tool'] == 'convert' and set(mark['files']) == {'a', 'sub/b'}


def test_folder_of_the_same_tool_is_replaced_by_the_next_run(tmp_path):
    write(tmp_path / 'out')
    write(tmp_path / 'out', a='changed')
    assert (tmp_path / 'out' / 'a').read_text() == 'changed'
    assert sorted(snapshot(tmp_path)) == ['out', f'out/{MARK}', 'out/a']


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / 'out').mkdir()
    write(tmp_path / 'out')
    assert (tmp_path / 'out' / 'a').read_text() == 'one'


def test_error_in_the_block_leaves_everything_as_it_was(tmp_path):
    write(tmp_path / 'out')
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / 'out', 'convert') as folder:
        (folder / 'a').write_text('half')
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before


def spoil(change):
    """Let `change` happen to a folder that convert wrote."""

    def make(out: Path) -> None:
        write(out)
        change(out)

    return make


def plain(out: Path) -> None:
    out.mkdir()
    (out / 'thesis.tex').write_text('mine')


@pytest.mark.parametrize(
    'make, culprit',
    [
        (plain, 'was not written by convert'),
        (lambda out: write(out, tool='push'), 'was written by push, not by convert'),
        (spoil(lambda out: (out / 'thesis.tex').write_text('mine')), 'holds thesis.tex, which convert did not write'),
        (spoil(lambda out: (out / 'sub' / 'c').write_text('mine')), 'holds sub/c, which convert did not write'),
        (spoil(lambda out: (out / 'mine').mkdir()), 'holds the folder mine, which convert did not write'),
        (spoil(lambda out: (out / 'a').write_text('edited')), 'its a was changed since convert wrote it'),
        (spoil(lambda out: (out / 'link').symlink_to('/')), 'holds the link link'),
        (spoil(lambda out: (out / 'x\ny').write_text('')), r'holds x\\ny'),
        (spoil(lambda out: (out / MARK).unlink()), 'was not written by convert'),
        (spoil(lambda out: (out / MARK).write_text('{"tool": "convert"}')), f'its {MARK} is damaged'),
        (spoil(lambda out: (out / MARK).write_text('[' * 100_000)), 'was not written by convert'),
        (lambda out: out.write_text('mine'), 'is a file'),
    ],
)
def test_what_is_not_ours_is_refused_before_any_work_and_stays(tmp_path, make, culprit):
    make(tmp_path / 'out')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=culprit) as caught, output_folder(tmp_path / 'out', 'convert'):
        pytest.fail('the work began')
    assert snapshot(tmp_path) == before
    assert '\n' not in str(caught.value)


def test_folder_whose_files_were_deleted_may_be_replaced(tmp_path):
    write(tmp_path / 'out')
    (tmp_path / 'out' / 'a').unlink()
    write(tmp_path / 'out')
    assert (tmp_path / 'out' / 'a').read_text() == 'one'


@pytest.mark.parametrize('out', ['/', '/proc/x', '', 'a\0b'])
def test_places_where_nothing_can_be_written_are_one_line(out):
    with pytest.raises(UserError) as caught, output_folder(out, 'convert'):
        pytest.fail('the work began')
    assert '\n' not in str(caught.value)


def test_parent_that_is_a_file_and_links_that_loop_are_one_line(tmp_path):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'loop').symlink_to('loop')
    for out in ('file/out', 'loop/out', 'loop'):
        with pytest.raises(UserError), output_folder(tmp_path / out, 'convert'):
            pytest.fail('the work began')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_parent_without_permission_is_one_line(tmp_path):
    (tmp_path / 'locked').mkdir(mode=0o500)
    with pytest.raises(UserError, match='no permission'), output_folder(tmp_path / 'locked' / 'out', 'convert'):
        pytest.fail('the work began')


def test_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='the folder you work in'), output_folder('.', 'convert'):
        pytest.fail('the work began')


def test_link_to_a_folder_stays_a_link_and_its_target_is_replaced(tmp_path):
    write(tmp_path / 'target')
    (tmp_path / 'out').symlink_to('target')
    write(tmp_path / 'out', a='changed')
    assert (tmp_path / 'out').is_symlink() and (tmp_path / 'target' / 'a').read_text() == 'changed'


def test_what_somebody_wrote_there_meanwhile_stays_and_so_does_the_work(tmp_path):
    with pytest.raises(UserError, match='What was written is in .*out-2'):
        with output_folder(tmp_path / 'out', 'convert') as folder:
            (folder / 'a').write_text('ours')
            plain(tmp_path / 'out')
    assert (tmp_path / 'out' / 'thesis.tex').read_text() == 'mine'
    assert (tmp_path / 'out-2' / 'a').read_text() == 'ours'
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('umask', [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask_whatever_the_writer_gave(tmp_path, umask):
    before = os.umask(umask)
    try:
        with output_folder(tmp_path / 'out', 'convert') as folder:
            (folder / 'sub').mkdir(mode=0o700)
            os.close(os.open(folder / 'sub' / 'secret', os.O_CREAT | os.O_WRONLY, 0o600))
        with write_atomically(tmp_path / 'file') as path:
            path.unlink()
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob('*')}
    folder, file = 0o777 & ~umask, 0o666 & ~umask
    assert modes == {'out': folder, 'sub': folder, MARK: file, 'secret': file, 'file': file}


# Kills

WRITER = """
    import sys, time
    from pathlib import Path
    from timm_senetv2.files import output_folder

    with output_folder(sys.argv[1], 'convert') as folder:
        for i in range(20):
            (folder / str(i)).write_text(sys.argv[2] * 10_000)
        print('written', flush=True)
        time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def writer(tmp_path):
    """Start a process that replaces `out`; returns when it has written and is about to finish."""
    script = tmp_path / 'writer.py'
    script.write_text(textwrap.dedent(WRITER))
    started = []

    def start(out: Path, text: str, sleep: float) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, script, out, text, str(sleep)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == 'written\n'
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_leftover_of_a_killed_run_is_cleared_by_the_next_and_that_of_a_live_one_is_not(tmp_path, writer):
    out = tmp_path / 'outs' / 'out'
    killed = writer(out, 'k', 60)
    killed.kill()
    killed.wait()
    alive = writer(out, 'a', 60)
    assert len(list(out.parent.iterdir())) == 1  # the dead one's is gone
    write(out)
    assert len(list(out.parent.iterdir())) == 2
    alive.kill()
    alive.wait()
    write(out)
    assert list(out.parent.iterdir()) == [out]


def test_folders_that_only_look_like_leftovers_stay(tmp_path):
    for name, content in (('.timm-senetv2-12345678', 'mine'), ('out.previous', 'mine'), ('out.unfinished', 'mine')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'file').write_text(content)
    os.utime(tmp_path / '.timm-senetv2-12345678', (0, 0))
    before = snapshot(tmp_path)
    write(tmp_path / 'out')
    after = {name: text for name, text in snapshot(tmp_path).items() if name.partition('/')[0] != 'out'}
    assert after == before


@pytest.mark.parametrize('inside', [(), ('lock',), ('lock', MARK)])
def test_workspace_without_anything_in_it_is_removed_once_it_is_old(tmp_path, inside):
    for name in ('.timm-senetv2-00000000', '.timm-senetv2-11111111'):
        (tmp_path / name).mkdir()
        for file in inside:
            (tmp_path / name / file).touch()
    os.utime(tmp_path / '.timm-senetv2-00000000', (0, 0))
    write(tmp_path / 'out')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.timm-senetv2-11111111', 'out']


def test_kill_between_the_two_renames_gives_the_previous_folder_back(tmp_path, monkeypatch):
    out = tmp_path / 'out'
    write(out, a='before')
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == 2:
            os._exit(9)
        real(source, target)

    child = os.fork()
    if not child:
        monkeypatch.setattr(os, 'rename', rename)
        write(out, a='after')
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not out.exists()
    with pytest.raises(ZeroDivisionError), output_folder(out, 'convert'):
        assert (out / 'a').read_text() == 'before'
        raise ZeroDivisionError
    assert (out / 'a').read_text() == 'before' and list(tmp_path.iterdir()) == [out]


def test_folder_is_the_old_or_the_new_one_whenever_the_run_is_killed(tmp_path, writer):
    out = tmp_path / 'outs' / 'out'
    write(out, **{str(i): 'o' * 10_000 for i in range(20)})
    for delay in [i * 0.004 for i in range(12)]:
        process = writer(out, 'n', 0)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for workspace in out.parent.glob('.timm-senetv2-*'):  # one without a mark is left alone while it is new
            os.utime(workspace, (0, 0))
        with pytest.raises(ZeroDivisionError), output_folder(out, 'convert'):  # gives back what was moved away
            raise ZeroDivisionError
        found = {path.name: path.read_text() for path in out.iterdir() if path.name != MARK}
        assert sorted(found) == sorted(map(str, range(20)))
        assert set(found.values()) in ({'o' * 10_000}, {'n' * 10_000})
        assert files._first_foreign(out, 'convert') is None
        assert list(out.parent.iterdir()) == [out]


# One file


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / 'table.csv'
    with write_atomically(target) as path:
        assert path.suffix == '.csv' and path.parent == tmp_path
        path.write_text('one')
    with pytest.raises(ZeroDivisionError), write_atomically(target) as path:
        path.write_text('half')
        raise ZeroDivisionError
    assert snapshot(tmp_path) == {'table.csv': 'one'}


def test_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / 'file').write_text('one')
    (tmp_path / 'link').symlink_to('file')
    with write_atomically(tmp_path / 'link') as path:
        path.write_text('two')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'file').read_text() == 'two'


def test_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'folder').mkdir()
    for target in (tmp_path / 'folder', tmp_path / 'no' / 'file', Path('/proc/x')):
        with pytest.raises(UserError, match='cannot write'), write_atomically(target) as path:
            path.write_text('x')
    assert snapshot(tmp_path) == {'folder': None}


def test_error_about_another_file_is_not_blamed_on_this_one(tmp_path):
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / 'file'):
        (tmp_path / 'other').read_text()


def test_full_disk_is_said_and_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match='the disk is full'), write_atomically(tmp_path / 'file') as path:
        path.write_text('half')
        raise OSError(28, 'No space left on device')
    assert snapshot(tmp_path) == {}
