"""The README's table of all models: print it, write it between its two markers, or check that it is up to date."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import timm
from _cli import UserError, run
from _profile import count

import timm_senetv2  # noqa: F401  the models are there even with torch's autoload off
from timm_senetv2.registration import MODEL_MODULES

README = Path(__file__).resolve().parents[1] / 'README.md'
BEGIN, END = '<!-- models: scripts/model_table.py --write -->', '<!-- /models -->'
PAPERS = {  # by the beginning of the name; the README has the links
    'senetv2_': '[SENetV2]',
    'senextv2_': '[SENetV2]',
    'seanet': '[SEANet]',
    'cifar_senetv2': '[SENetV2]',
    'cifar_seresnet': '[SENet]',
    'cifar_resnet': '[ResNet]',
    'small_saecnn': '[SENetV2]',
    'small_secnn': '[SENet]',
    'small_cnn': '–',
}


def natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def digits(value: float) -> str:
    return f'{value:#.3g}'.rstrip('.')  # three significant ones


def table() -> str:
    """A Markdown table: a row a model, with the classes of its configuration."""
    rows = ['| Model | Paper | Input | Parameters | GMACs |', '|---|---|--:|--:|--:|']
    for module in MODEL_MODULES:
        for name in sorted(timm.list_models(module=module), key=natural):
            model = timm.create_model(name, device='meta')
            size = model.pretrained_cfg['input_size']
            profile = count(model, size)
            paper = next(paper for prefix, paper in PAPERS.items() if name.startswith(prefix))
            params, gmacs = digits(profile.params / 1e6), digits(profile.macs / 1e9)
            rows.append(f'| `{name}` | {paper} | {size[-1]} | {params} M | {gmacs} |')
    return '\n'.join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--write', action='store_true', help='write the table into README.md')
    group.add_argument('--check', action='store_true', help='exit with 2 unless README.md has this table')
    args = parser.parse_args(argv)
    if not args.write and not args.check:
        print(table())
        return
    before, begin, rest = README.read_text(encoding='utf-8').partition(f'{BEGIN}\n')
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f'{README} lacks the line {BEGIN} or {END}')
    text = f'{before}{begin}{table()}\n{end}{after}'
    if args.write:
        README.write_text(text, encoding='utf-8')
    elif text != README.read_text(encoding='utf-8'):
        raise UserError('the table of models in README.md is out of date; run python scripts/model_table.py --write')


if __name__ == '__main__':
    run(main)
