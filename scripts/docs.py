"""Fill the generated regions of every Markdown file of this repository: tables of models, tags, families, speed, runs.

A region begins with a line `<!-- docs.py: GENERATOR ARGUMENT … -->` and ends with `<!-- /docs.py -->`. What stands in
it follows from the package and the committed CSV files; nothing is trained or timed here. The generators are the
functions of experiments/markdown.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a package that is installed, and not as editable

from experiments import markdown  # noqa: E402
from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, run  # noqa: E402
from timm_senetv2.files import write_atomically  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 2 if a region is out of date')
    parser.add_argument(
        '--absolute-links',
        nargs=2,
        metavar=('URL', 'REF'),
        help="instead, make README.md's links absolute, for the package's page on an index: a release does so before "
        'it builds; URL is the repository, REF a tag or branch',
    )
    parser.add_argument('files', nargs='*', type=Path, metavar='FILE', help='only these (default: all *.md)')
    args = parser.parse_args(argv)
    if args.absolute_links:
        readme = markdown.ROOT / 'README.md'
        text = markdown.absolute(readme.read_text(encoding='utf-8'), *args.absolute_links)
        with write_atomically(readme) as temporary:
            temporary.write_text(text, encoding='utf-8')
        return
    stale = []
    for path in args.files or markdown.documents():
        try:
            text = path.read_text(encoding='utf-8')
            filled = markdown.fill(text)
        except UserError as e:
            raise UserError(f'{path}: {e}') from None
        except UnicodeDecodeError:
            raise UserError(f'{path} is not a text file in UTF-8') from None
        if filled == text:
            continue
        stale.append(str(path))
        if not args.check:
            with write_atomically(path) as temporary:
                temporary.write_text(filled, encoding='utf-8')
            print(f'wrote {path}')
    if args.check and stale:
        raise UserError(f'out of date: {", ".join(stale)}; run python scripts/docs.py')


if __name__ == '__main__':
    run(main)
