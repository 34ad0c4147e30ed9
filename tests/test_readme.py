"""The pages hold what they promise: snippets run, commands and their options exist, links lead somewhere."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'results' / 'README.md', ROOT / 'results' / 'lift.md']
ONLINE = '<!-- needs the network -->'
LAUNCHERS = ('timm-senetv2', '-m timm_senetv2', 'scripts/')


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks, but those that a comment above marks as in need of the network."""
    text = page.read_text(encoding='utf-8')
    found = re.findall(rf'^({re.escape(ONLINE)}\n)?```{language}\n(.*?)^```', text, flags=re.M | re.S)
    return [block for online, block in found if not online]


SNIPPETS = {f'{page.name}-{i}': block for page in PAGES for i, block in enumerate(blocks(page, 'python'))}
COMMANDS = sorted(
    {
        command.strip()
        for page in PAGES
        for block in blocks(page, 'bash')
        for command in block.replace('\\\n', ' ').splitlines()
        if any(launcher in command for launcher in LAUNCHERS) and not command.startswith(('#', 'pip '))
    }
)


@pytest.mark.parametrize('snippet', SNIPPETS.values(), ids=SNIPPETS)
def test_python_snippet_runs(snippet, tmp_path):
    (tmp_path / 'results').symlink_to(ROOT / 'results')  # nothing else of the clone is at hand
    done = subprocess.run([sys.executable, '-c', snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if 'ankle_boot' in snippet:
        assert done.stdout.startswith('Ankle boot')


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run([*command, '--help'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('command', COMMANDS)
def test_command_and_its_options_exist(command):
    words = shlex.split(command.split('; do')[-1], comments=True)
    for word in words:
        if word.startswith('scripts/'):
            assert (ROOT / word).exists()
    if 'timm-senetv2' in words or 'timm_senetv2' in words:
        start = words.index('timm-senetv2' if 'timm-senetv2' in words else 'timm_senetv2')
        subcommand, arguments = words[start + 1], words[start + 2 :]
        text = help_of(sys.executable, '-m', 'timm_senetv2', subcommand)
        if subcommand == 'train':
            return  # all but a few options are timm's; the recipes have tests of their own
    else:
        start = next(i for i, word in enumerate(words) if word.startswith('scripts/'))
        script, arguments = words[start], words[start + 1 :]
        text = help_of(*([sys.executable] if script.endswith('.py') else ['bash']), script)
    for option in [word.partition('=')[0] for word in arguments if word.startswith('--')]:
        assert re.search(rf'(^|[\s,\[]){re.escape(option)}\b', text, flags=re.M), f'no option {option}'


@pytest.mark.parametrize(
    'page', [*PAGES, *(ROOT / n for n in ('CONTRIBUTING.md', 'SECURITY.md'))], ids=lambda p: p.name
)
def test_named_files_exist(page):
    text = page.read_text(encoding='utf-8')
    links = [link.partition('#')[0] for link in re.findall(r'\]\((?!https?:)([^)#\s][^)\s]*)\)', text)]
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r'(?<![\w./-])((?:scripts|results|docs|tests|timm_senetv2|experiments)/[\w./-]*)', text)
    missing += [path for path in paths if not (ROOT / path.rstrip('.')).exists() and f'({path}' not in text]
    assert not missing


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_anchors_exist(page):
    for link in re.findall(r'\]\((?!https?:)([^)\s]*#[^)\s]+)\)', page.read_text(encoding='utf-8')):
        path, _, anchor = link.partition('#')
        text = (page.parent / path if path else page).read_text(encoding='utf-8')
        heads = [
            re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in re.findall(r'^#+ (.*)$', text, re.M)
        ]
        assert anchor in heads, link


def test_links_by_name_are_defined():
    text = README.read_text(encoding='utf-8')
    prose = re.sub(r'^```.*?^```|`[^`]*`', '', text, flags=re.M | re.S)
    used = re.findall(r'\[[^\]]*\]\[([^\]]+)\]|(?<!\])\[([A-Z][A-Za-z0-9]+|timm)\](?![(:\[])', prose)
    names = {a or b for a, b in used}
    assert names and names <= set(re.findall(r'^\[([^\]]+)\]: https://', text, flags=re.M))
