"""The pages hold what they promise: snippets run, commands and their options exist, links lead somewhere."""

import ast
import functools
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hub_server import HubServer
from interpreters import Interpreters
from interpreters import command as code_of
from PIL import Image
from safetensors.torch import save

import timm_senetv2
from timm_senetv2 import gates, hub

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'results' / 'README.md', ROOT / 'results' / 'lift.md']
FAILS = 'upstream-num-classes.md'  # its first block shows an error of others; test_upstream.py runs it
LAUNCHERS = ('timm-senetv2', '-m timm_senetv2', 'scripts/', 'tests/', 'docs/examples/', 'python -m experiments')
SLOW = '<!-- slow: '  # in the line above a block: it compiles or converts, which takes a minute
CONTINUES = '<!-- continues -->'  # in the line above a block that uses files of the block before
# Where the weights come from that the pages load: on the real Hub, and with random numbers on the one here
SOURCES = ('seresnet50.ra2_in1k', 'seresnet50.a1_in1k', 'resnet18.a1_in1k')


def blocks(page: Path, language: str) -> list[tuple[str, bool]]:
    """Fenced blocks, and whether a comment above says that they are slow. One that continues another is part of it."""
    text = page.read_text(encoding='utf-8')
    found: list[tuple[str, bool]] = []
    for mark, code in re.findall(rf'^(<!-- [^\n]*\n)? *```{language}\n(.*?)^ *```$', text, flags=re.M | re.S):
        code, slow = textwrap.dedent(code), mark.startswith(SLOW)
        if mark.startswith(CONTINUES):
            before, slow = found.pop()
            code = before + code
        found.append((code, slow))
    return found


def lacking(code: str) -> list[str]:
    """The packages that the code imports and that are not installed here."""
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [n for i in imports for n in ([i.module] if isinstance(i, ast.ImportFrom) else [a.name for a in i.names])]
    return sorted({m.split('.')[0] for m in modules if not importlib.util.find_spec(m.split('.')[0])})


def snippets() -> Iterator:
    for page in (page for page in PAGES if page.name != FAILS):
        for i, (code, slow) in enumerate(blocks(page, 'python')):
            marks = [pytest.mark.slow, pytest.mark.timeout(1800)] if slow else []
            if needed := lacking(code):
                marks.append(pytest.mark.skip(reason=f'{", ".join(needed)} not installed'))
            yield pytest.param(code, marks=marks, id=f'{page.name}-{i}')


COMMANDS = sorted(
    {
        command.strip()
        for page in (*PAGES, ROOT / 'CONTRIBUTING.md')
        for block, _ in blocks(page, 'bash')
        for command in block.replace('\\\n', ' ').splitlines()
        if any(launcher in command for launcher in LAUNCHERS) and not command.startswith(('#', 'pip '))
    }
)
CHEAP = [command for command in COMMANDS if command.startswith('timm-senetv2 models')]


@pytest.fixture(scope='module')
def reader(tmp_path_factory) -> Iterator[Interpreters]:
    """Runs snippets with a Hub on loopback for the Hub."""
    folder = tmp_path_factory.mktemp('reader')
    with HubServer() as server:
        for source in SOURCES:
            state = timm.create_model(source.split('.')[0]).state_dict()
            server.add_repo(f'timm/{source}', {'model.safetensors': save(state)})
        model = timm.create_model('cifar_senetv2_resnet20')
        card = hub.render_card(model, 'me/senetv2_resnet50.mine', hub.Facts(license='mit'))
        hub.write_files(model, folder / 'mine', card, hub.Facts(license='mit'))
        files = {name: (folder / 'mine' / name).read_bytes() for name in hub.FILES}
        server.add_repo('me/senetv2_resnet50.mine', files)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HUGGING'))}
        own = dict(HF_ENDPOINT=server.url, HF_HOME=str(folder / 'hf'), HF_HUB_DISABLE_XET='1')
        with Interpreters('timm', env={**kept, **own}) as interpreters:
            yield interpreters


@pytest.fixture
def desk(tmp_path) -> Path:
    """A folder with what the pages take for granted: a photo, a folder of images by class, this clone's results."""
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        for split in ('train', 'val') if i < 2 else ('train',):
            for name in ('daisy', 'rose'):
                pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
                path = tmp_path / 'flowers' / split / name / f'{i}.jpg'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(path)
    shutil.copy(tmp_path / 'flowers/train/daisy/0.jpg', tmp_path / 'photo.jpg')
    (tmp_path / 'results').symlink_to(ROOT / 'results')
    return tmp_path


@pytest.mark.parametrize('snippet', list(snippets()))
def test_python_snippet_runs(snippet, reader, desk):
    snippet = snippet.replace('batch_size=32', 'batch_size=4')  # a reader's pictures fill a batch
    snippet = snippet.replace('for epoch in range(3)', 'for epoch in range(1)')
    if 'export(' in snippet:  # which takes its time for every block
        snippet = snippet.replace(
            "create_model('cifar_senetv2_resnet20')", "create_model('cifar_senetv2_resnet20', depth=8)"
        )
    done = reader.run(snippet, desk)
    assert done.returncode == 0, done.stderr
    if 'ankle_boot' in snippet:
        assert done.stdout.startswith('Ankle boot')


def test_snippets_are_found_and_fail_where_they_are_wrong(reader, tmp_path):
    assert len(list(snippets())) > 30
    right = reader.run('import timm\nprint(timm.__name__)', tmp_path)
    assert (right.returncode, right.stdout, right.stderr) == (0, 'timm\n', '')
    wrong = reader.run("import timm\ntimm.create_model('senetv2_resnet50', sae_cardinalty=2)", tmp_path)
    assert wrong.returncode == 1 and 'sae_cardinalty' in wrong.stderr


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_bash_blocks_parse(page):
    for block, _ in blocks(page, 'bash'):
        done = subprocess.run(['bash', '-n'], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('command', CHEAP)
def test_cheap_command_runs(command, reader, tmp_path):
    words = shlex.split(command)
    done = reader.run(code_of(['-m', 'timm_senetv2', *words[1:]]), tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 2, done.stderr


def test_reference_has_every_public_name():
    text = (ROOT / 'docs' / 'api.md').read_text(encoding='utf-8')
    named = {name.rpartition('.')[2] for name in re.findall(r'^<!-- api: (\S+) -->$', text, flags=re.M)}
    functions = {name for name, value in vars(gates).items() if inspect.isfunction(value) and name[0] != '_'}
    own = {name for name in functions if getattr(gates, name).__module__ == gates.__name__}
    assert named == {*timm_senetv2.__all__, *hub.__all__, *own} - {'FILES'}


def test_lowest_versions_are_those_of_the_metadata():
    text = (ROOT / 'docs' / 'versions.md').read_text(encoding='utf-8').replace('huggingface_hub', 'huggingface-hub')
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    rows = dict(re.findall(r'^\| ([\w-]+) \| ([\d.]+) \|', text, flags=re.M))
    required = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)",', project.partition('[project.optional')[0], flags=re.M))
    required['Python'] = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    assert {'Python', 'torch', 'timm'} <= set(rows)
    assert rows == {name: required[name] for name in rows}


@functools.cache
def help_of(reader: Interpreters, script: str) -> str:
    if script.endswith('.sh'):
        done = subprocess.run(['bash', script, '--help'], capture_output=True, text=True, cwd=ROOT)
    else:
        done = reader.run(code_of(f'{script} --help'), ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('command', COMMANDS)
def test_command_and_its_options_exist(command, reader):
    words = shlex.split(command.split('; do')[-1], comments=True)
    for word in words:
        if word.startswith(('scripts/', 'docs/', 'tests/')):
            assert (ROOT / word).exists()
    if 'timm-senetv2' in words or 'timm_senetv2' in words:
        start = words.index('timm-senetv2' if 'timm-senetv2' in words else 'timm_senetv2')
        subcommand, arguments = words[start + 1], words[start + 2 :]
        text = help_of(reader, f'-m timm_senetv2 {subcommand}')
        if subcommand == 'train':
            return  # all but a few options are timm's; the recipes have tests of their own
    else:
        start = next(i for i, word in enumerate(words) if word.startswith(('scripts/', 'docs/', 'tests/')))
        script, arguments = words[start], words[start + 1 :]
        if 'pytest' in words or words[0] == 'nox' or script == 'tests/instruction_sets.sh':
            return  # their arguments are pytest's
        if script.startswith('docs/'):
            pytest.importorskip('segmentation_models_pytorch' if 'segmentation' in script else 'torchvision')
            text = reader.run(code_of([ROOT / script, '--help'])).stdout
        else:
            text = help_of(reader, script)
        if script == 'scripts/compare_architectures.py':  # hands on what it does not know
            text += help_of(reader, 'scripts/reproduce.py')
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
