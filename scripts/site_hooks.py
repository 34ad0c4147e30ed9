"""What mkdocs.yml asks of Python: pages and pictures from outside docs/, links, and the reference of the code.

The pages are written for a repository's web page, where a link leads from file to file. Here the same links have to
work in a site: `results/*.md` and a few others become pages too, pictures and tables that are linked are taken along,
and a link to any other file of the repository leads to the repository, if mkdocs knows where that is.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ('results/*.md', 'hub_cards/README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'SECURITY.md')
TAKEN_ALONG = ('results/**/*.png', 'results/**/*.svg', 'results/**/*.csv')
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#|/)([^)\s#]*)(#[^)\s]*)?\)')
CODE = re.compile(r'(^(?P<fence>`{3,})[^\n]*\n.*?^(?P=fence)$|`[^`\n]*`)', flags=re.M | re.S)
API = re.compile(r'^<!-- api: (\S+) -->$', flags=re.M)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add what lies outside docs/, under its path in the repository."""
    for pattern in (*PAGES, *TAKEN_ALONG):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Turn links that are right in the repository into links that are right in the site."""
    here = _in_repository(page.file)

    def link(match: re.Match[str]) -> str:
        mark, words, target, anchor = match[1], match[2], match[3], match[4] or ''
        words = LINK.sub(link, words)  # a picture that is a link
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        name = path.removeprefix('docs/')
        if files.get_file_from_path(name):
            return f'{mark}[{words}]({posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")}{anchor})'
        if not (ROOT / path).exists():
            return match[0]  # mkdocs says that it leads nowhere
        if not config.repo_url:
            return words
        reference = os.environ.get('REPOSITORY_REF', 'main')
        return f'{mark}[{words}]({config.repo_url.rstrip("/")}/blob/{reference}/{path}{anchor})'

    parts = CODE.split(markdown)  # text, code, its fence, text, …
    markdown = ''.join(LINK.sub(link, part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 != 2)
    return API.sub(r'::: \1', markdown)


def _in_repository(file: File) -> str:
    outside = file.abs_src_path is not None and not Path(file.abs_src_path).is_relative_to(ROOT / 'docs')
    return file.src_uri if outside else f'docs/{file.src_uri}'
