"""The README and CONTRIBUTING hold what they promise: snippets run, links lead somewhere, options exist."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import model_table
import pretrained_table
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
ONLINE = '<!-- needs the network -->'


def blocks(language: str) -> list[tuple[bool, str]]:
    """Fenced blocks, each with whether a comment above says that it needs the network."""
    found = re.findall(rf'^({re.escape(ONLINE)}\n)?```{language}\n(.*?)^```', README, flags=re.M | re.S)
    return [(bool(online), text) for online, text in found]


SNIPPETS = [text for online, text in blocks('python') if not online]
COMMANDS = [
    command
    for _, text in blocks('bash')
    for command in text.replace('\\\n', ' ').splitlines()
    if 'scripts/' in command and not command.startswith('#')
]


def test_the_two_commands_come_first():
    first = README.split('```')[1].splitlines()
    assert [line.partition('#')[0].strip() for line in first] == [
        'bash',
        'bash scripts/quickstart.sh',
        'bash scripts/test.sh',
    ]


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda s: s.strip().splitlines()[-1][:40])
def test_python_snippet_runs(snippet, tmp_path):
    (tmp_path / 'results').symlink_to(ROOT / 'results')  # nothing else of the clone is at hand
    done = subprocess.run([sys.executable, '-c', snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if 'ankle_boot' in snippet:
        assert done.stdout.startswith('Ankle boot')


@pytest.mark.parametrize('command', COMMANDS)
def test_command_names_a_script_and_options_that_exist(command):
    words = shlex.split(command, comments=True)
    position = next(i for i, word in enumerate(words) if word.startswith('scripts/'))
    script, arguments = ROOT / words[position], words[position + 1 :]
    assert script.is_file()
    if script.name == 'train.py':
        # all but a few options are timm's; the recipes have tests of their own
        for word in arguments:
            assert not word.startswith('scripts/') or (ROOT / word).is_file()
        return
    options = [word.partition('=')[0] for word in arguments if word.startswith('--')]
    if not options:
        return
    run = [sys.executable] if script.suffix == '.py' else ['bash']
    text = subprocess.run([*run, script, '--help'], capture_output=True, text=True, check=True).stdout
    for option in options:
        assert re.search(rf'(^|[\s,\[]){re.escape(option)}\b', text, flags=re.M), f'{script.name} has no {option}'


@pytest.mark.parametrize('document', sorted(p.name for p in ROOT.glob('*.md')))
def test_named_files_exist(document):
    text = (ROOT / document).read_text(encoding='utf-8')
    links = [link.partition('#')[0] for link in re.findall(r'\]\((?!https?:)([^)#][^)]*)\)', text)]
    paths = re.findall(r'(?<![\w./-])((?:scripts|results|docs|tests|timm_senetv2|hub_cards)/[\w./-]*)', text)
    missing = [p for p in {*links, *paths} if not (ROOT / p.rstrip('.')).exists()]
    assert not missing


def test_links_by_name_are_defined():
    prose = re.sub(r'^```.*?^```|`[^`]*`', '', README, flags=re.M | re.S)
    used = re.findall(r'\[[^\]]*\]\[([^\]]+)\]|(?<!\])\[([A-Z][A-Za-z]+|timm)\](?![(:\[])', prose)
    names = {a or b for a, b in used}
    assert names and names <= set(re.findall(r'^\[([^\]]+)\]: https://', README, flags=re.M))


def test_table_of_models_is_up_to_date():
    model_table.main(['--check'])


def test_table_that_is_out_of_date_is_noticed_and_written(tmp_path, monkeypatch):
    other = tmp_path / 'README.md'
    other.write_text(README, encoding='utf-8')
    monkeypatch.setattr(model_table, 'README', other)
    monkeypatch.setattr(model_table, 'table', lambda: '| a new table |')
    with pytest.raises(model_table.UserError, match='out of date'):
        model_table.main(['--check'])
    model_table.main(['--write'])
    model_table.main(['--check'])
    text = other.read_text(encoding='utf-8')
    assert '| a new table |' in text and 'senetv2_resnet101' not in text
    assert text.startswith(README[:500]) and text.endswith(README[-500:])


def test_table_of_tags_is_up_to_date(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['pretrained_table.py'])
    pretrained_table.main()
    table = README.split('<!-- tags: scripts/pretrained_table.py -->\n')[1].split('<!-- /tags -->')[0]
    assert table == capsys.readouterr().out


def test_accuracies_of_our_weights_are_those_of_the_runs_they_come_from():
    with (ROOT / 'results/runs/fmnist/results.csv').open(newline='') as file:
        runs = {row['run']: row for row in csv.DictReader(file)}
    with (ROOT / 'results/fmnist_weights.csv').open(newline='') as file:
        rows = [runs[row['run']] for row in csv.DictReader(file)]
    assert rows
    for row in rows:
        assert f'`{row["model"]}` {float(row["accuracy"]):.2f} %' in ' '.join(README.split())
        assert row['seed'] == '0' and 'epochs 5' in row['command']


def test_speeds_are_those_of_the_benchmark():
    _, _, rest = README.partition('<!-- speed: rows of results/benchmark_cpu.md -->\n')
    rows = rest.partition('<!-- /speed -->')[0].splitlines()
    measured = (ROOT / 'results/benchmark_cpu.md').read_text(encoding='utf-8').splitlines()
    assert len(rows) > 4 and set(rows) <= set(measured)
    assert not {row for row in measured if row.startswith('| CPU ')} - set(rows)  # the missed ones too
