"""One plain line for every mistake, and streams that outlive their reader."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from timm_senetv2.errors import UserError, did_you_mean, one_line, printable, run, why


def exit_of(main, capsys):
    with pytest.raises(SystemExit) as done:
        run(main)
    return done.value.code, *capsys.readouterr()


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    'name, known, expected',
    [
        ('seanet21', ['seanet20', 'seanet110', 'small_cnn'], '; did you mean seanet20 or seanet110?'),
        ('aab', ['aaa', 'aac', 'aad', 'zzz'], '; did you mean aa'),
        ('quickstart', ['seanet20'], ''),
        ('top1', ['to\x1bp1'], r'; did you mean to\x1bp1?'),
        ('x', [], ''),
    ],
)
def test_close_names_are_proposed(name, known, expected):
    says = did_you_mean(name, known)
    assert says.startswith(expected) if expected.endswith('aa') else says == expected
    assert expected == '' or says.endswith('?')


def test_three_close_names_are_listed_with_one_or():
    assert did_you_mean('aaaa', ['aaab', 'aaac', 'aaad']).count(' or ') == 1
    assert did_you_mean('aaaa', ['aaab', 'aaac', 'aaad']).count(',') == 1


@pytest.mark.parametrize(
    'text, shown',
    [
        ('layer1.0.conv1', 'layer1.0.conv1'),
        ('a\nerror: forged', r'a\nerror: forged'),
        ('\x1b[31mred', r'\x1b[31mred'),
        ('\udcff', r'\udcff'),
        ('a\u202eb', r'a\u202eb'),
        ('naïve 狗', 'naïve 狗'),
        (7, '7'),
    ],
)
def test_names_from_files_are_shown_escaped(text, shown):
    assert printable(text) == shown


def test_long_names_are_cut():
    assert len(printable('x' * 10**6)) < 210


def test_one_line_of_an_error_names_its_type_where_it_says_nothing():
    assert one_line(ValueError('a\n  b\x1b')) == r'a b\x1b'
    assert one_line(KeyError()) == 'KeyError'


def test_reason_of_a_failed_write_is_the_systems_words():
    assert why(OSError(errno.EACCES, 'Permission denied', '/x')) == 'Permission denied'
    assert why(OSError(errno.ENOSPC, 'No space left on device')).startswith('the disk is full')
    assert why(RuntimeError('IoError(Os { code: 28, message: "No space left on device" })')).startswith('the disk is')


@pytest.mark.parametrize(
    'error, code, line',
    [
        (UserError('no\nsuch model'), 2, 'error: no such model\n'),
        (UserError('bad \x1b[2J name'), 2, 'error: bad \\x1b[2J name\n'),
        (OSError(errno.ENOSPC, 'No space left on device', 'x'), 2, 'error: the disk is full: x; free some space'),
        (FileNotFoundError(2, 'No such file or directory', 'x'), 2, 'error: x cannot be used: No such file'),
        (KeyboardInterrupt(), 130, 'interrupted\n'),
    ],
)
def test_every_mistake_ends_with_one_line_and_its_code(capsys, error, code, line):
    found, out, err = exit_of(raising(error), capsys)
    assert (found, out) == (code, '')
    assert err.startswith(line) and err.count('\n') == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_success_ends_with_what_main_returns(capsys):
    assert exit_of(lambda: None, capsys)[0] is None
    assert exit_of(lambda: 3, capsys)[0] == 3


LONG_RUN = """
    import sys
    from timm_senetv2.errors import run

    def main():
        for i in range(100_000):
            print('epoch', i)
            print('progress', i, file=sys.stderr)
        open(sys.argv[1], 'w').write('done')

    run(main)
"""


@pytest.mark.parametrize('pipe', ['2>/dev/null | head -1', '2>&1 >/dev/null | head -1', '2>&1 | head -1'])
def test_a_run_finishes_although_the_reader_of_its_output_is_gone(tmp_path, pipe):
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent(LONG_RUN))
    command = f'{sys.executable} {script} {tmp_path}/result {pipe}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'result').read_text() == 'done'
    assert done.stdout in ('epoch 0\n', 'progress 0\n') and done.stderr == ''


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_any_name_can_be_printed_on_any_terminal(encoding):
    code = r'from timm_senetv2.errors import run; run(lambda: print("é \udcff"))'
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, env={**os.environ, 'PYTHONIOENCODING': encoding}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b' \\udcff\n')


def test_neither_torch_nor_timm_is_imported():
    code = "import sys, timm_senetv2.errors, timm_senetv2.files; print({'torch', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'set()\n'
