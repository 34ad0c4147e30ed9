"""The documentation as a site: it builds without a warning, and its links, pictures and reference are there."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import timm_senetv2

for package in ('mkdocs', 'material', 'mkdocstrings'):
    pytest.importorskip(package, reason="the extra `docs` is not installed: pip install -e '.[docs]'")

import site_hooks  # noqa: E402
from mkdocs.config import load_config  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('site') / 'site'
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(folder)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith('REPOSITORY_')},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Links(HTMLParser):
    """The targets of a page's links and pictures, and the ids in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == 'id' and value:
                self.ids.add(value)
            if name in ('href', 'src') and value and tag in ('a', 'img'):
                self.targets.append(value)


def file_of(site: Path, page: Path, target: str) -> Path:
    path = (page.parent / unquote(urlsplit(target).path)).resolve() if urlsplit(target).path else page
    return path / 'index.html' if path.is_dir() else path


def test_every_link_within_the_site_leads_somewhere(site):
    pages = {page: Links(page) for page in site.rglob('*.html') if page.name != '404.html'}
    assert len(pages) > 20
    broken, inside = [], 0
    for page, links in pages.items():
        for target in links.targets:
            if urlsplit(target).scheme or target.startswith('//'):
                continue
            inside += 1
            file = file_of(site, page, target)
            anchor = unquote(urlsplit(target).fragment)
            known = pages[file].ids if file in pages else set()
            if not file.is_file() or anchor and anchor != '__tabbed' and anchor not in known:
                broken.append(f'{page.relative_to(site)}: {target}')
    assert inside > 500
    assert not broken


def test_pages_and_pictures_from_outside_docs_are_there(site):
    assert 'SaE' in (site / 'results' / 'index.html').read_text()
    speed = Links(site / 'results' / 'speed' / 'index.html')
    assert any(target.endswith('benchmark_cpu.png') for target in speed.targets)
    assert (site / 'results' / 'benchmark_cpu.png').read_bytes() == (
        ROOT / 'results' / 'benchmark_cpu.png'
    ).read_bytes()
    assert any(
        target.endswith('how-it-works/#the-block') for target in speed.targets
    )  # written as ../docs/how-it-works.md#the-block


def test_reference_shows_signatures_and_arguments(site):
    text = (site / 'api' / 'index.html').read_text()
    ids = Links(site / 'api' / 'index.html').ids
    assert {name for name in timm_senetv2.__all__} <= {i.rpartition('.')[2] for i in ids}
    assert '<!-- api' not in text and ':::' not in text
    for words in ('cardinality', 'Number of branches', 'Raises'):
        assert words in text


def test_links_to_the_repository_need_its_address(site, monkeypatch):
    assert not any('/blob/' in t and 'recipes' in t for t in Links(site / 'training' / 'index.html').targets)
    monkeypatch.setenv('REPOSITORY_URL', 'https://git.example/o/n/')
    monkeypatch.setenv('REPOSITORY_REF', 'v1')
    config = load_config(str(ROOT / 'mkdocs.yml'))
    file = File('integrations.md', str(ROOT / 'docs'), config.site_dir, config.use_directory_urls)
    text = (ROOT / 'docs' / 'integrations.md').read_text(encoding='utf-8')
    linked = site_hooks.on_page_markdown(text, Page(None, file, config), config, Files([file]))
    assert '](https://git.example/o/n/blob/v1/tests/integration)' in linked


def test_nothing_is_fetched_from_elsewhere(site):
    """Fonts, scripts and pictures are the site's own: it works offline, and tells nobody who reads it."""
    for page in (site / 'index.html', site / 'how-it-works' / 'index.html'):
        text = page.read_text()
        assert 'fonts.googleapis' not in text and '<script src="http' not in text and '<img src="http' not in text
