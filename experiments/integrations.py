"""The tables of results/integrations.csv, which the integration tests write."""

from pathlib import Path

from timm_senetv2.errors import UserError

from .files import read_csv

RESULTS = Path(__file__).parents[1] / 'results' / 'integrations.csv'
CONVERTED = ('senetv2_resnet50', 'senetv2_resnet50, reparameterized', 'seresnet50')


def integrations(kind: str) -> str:
    """What was found with the libraries of a kind, 'converter' or 'consumer', as a Markdown table.

    Raises:
        UserError: Nothing was found of that kind.
    """
    rows = [row for row in read_csv(RESULTS) if row['kind'] == kind]
    if not rows:
        raise UserError(f'{RESULTS.name} has no rows of kind {kind!r}')
    if kind == 'consumer':
        lines = ['| Library | Version | Call | Model | Result |', '|---|---|---|---|---|']
        lines += [
            f'| {row["library"]} | {row["version"]} | `{row["call"]}` | `{row["model"]}` | {row["result"]} |'
            for row in rows
        ]
        return '\n'.join(lines)
    calls: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        calls.setdefault((row['library'], row['version'], row['call']), {})[row['model']] = row['result']
    lines = [
        "| Library | Version | Call | `senetv2_resnet50` | reparameterized | timm's `seresnet50` |",
        '|---|---|---|---|---|---|',
    ]
    for (library, version, call), results in calls.items():
        cells = [results.get(model, 'not run').removeprefix('logits differ by ') for model in CONVERTED]
        lines.append(f'| {library} | {version} | `{call}` | {" | ".join(cells)} |')
    return '\n'.join(lines)
