"""The generated regions of the repository's Markdown files: tables and captions that follow from files and the package.

A region is everything between a line `<!-- docs.py: GENERATOR ARGUMENT … -->` and the next `<!-- /docs.py -->`. The
generators are the functions of `GENERATORS`; what they return stands in the region.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from timm_senetv2 import catalog
from timm_senetv2.errors import UserError, did_you_mean

from . import step_time, tables
from .benchmark import imports as benchmark_imports
from .benchmark import report
from .benchmark import traffic as benchmark_traffic
from .benchmark.suite import BESIDE, TRIOS
from .files import read_csv, read_results
from .integrations import integrations

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'results'
REGION = re.compile(r'^(<!-- docs\.py: ([^\n]*?) -->\n)(.*?)^(<!-- /docs\.py -->)$', flags=re.M | re.S)
BEGIN, END = '<!-- docs.py: ', '<!-- /docs.py -->'


def documents() -> Iterator[Path]:
    """Every Markdown file of the repository, but those of environments, builds and runs."""
    for path in sorted(ROOT.rglob('*.md')):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith('.') and part != '.github' for part in parts)
        if not hidden and not {'build', 'dist', 'node_modules', 'output', 'site'} & set(parts):
            yield path


def fill(text: str) -> str:
    """The text with every region as its generator makes it now.

    Raises:
        UserError: A region without end or with an unknown generator; says which.
    """

    def region(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        if name not in GENERATORS:
            raise UserError(f'no generator is named {name!r}{did_you_mean(name, GENERATORS)}')
        try:
            content = GENERATORS[name](*arguments)
        except TypeError as e:
            raise UserError(f'{match[1].strip()}: {e}') from None
        return f'{match[1]}{content.rstrip()}\n{match[4]}'

    marks = re.findall(r'^<!-- (/?)docs\.py', text, flags=re.M)
    if marks != ['', '/'] * (len(marks) // 2):
        raise UserError(f'a line {BEGIN}… --> has no {END} after it, or one stands alone')
    return REGION.sub(region, text)


def absolute(text: str, repository: str, ref: str) -> str:
    """The text with its relative links made absolute, for a page that stands elsewhere, as on a package index.

    Args:
        text: Of a Markdown file at the root of the repository.
        repository: Its URL, as of GitHub or a server like it.
        ref: A tag or branch.
    """

    def link(match: re.Match[str]) -> str:
        kind = 'raw' if match[1] else 'blob'
        return f'{match[1]}[{match[2]}]({repository.rstrip("/")}/{kind}/{ref}/{match[3]})'

    outside = re.split(r'(^```.*?^```$)', text, flags=re.M | re.S)
    outside[::2] = [re.sub(r'(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)', link, part) for part in outside[::2]]
    return ''.join(outside)


@cache
def _models() -> list[catalog.Model]:
    return catalog.models()


def _digits(value: float) -> str:
    return f'{value:#.3g}'.rstrip('.')  # three significant ones


def _top1(accuracies: tuple) -> str:
    return ', '.join(f'{a.top1:.2f}&nbsp;({a.img_size})' for a in accuracies)


PAPERS = {  # by the beginning of the name
    'senetv2_': '[SENetV2](https://arxiv.org/abs/2311.10807)',
    'senextv2_': '[SENetV2](https://arxiv.org/abs/2311.10807)',
    'seanet': '[SEANet](https://github.com/akhilesh-pandey/SEANet-pytorch)',
    'cifar_senetv2': '[SENetV2](https://arxiv.org/abs/2311.10807)',
    'cifar_seresnet': '[SENet](https://arxiv.org/abs/1709.01507)',
    'cifar_resnet': '[ResNet](https://arxiv.org/abs/1512.03385)',
    'small_saecnn': '[SENetV2](https://arxiv.org/abs/2311.10807)',
    'small_secnn': '[SENet](https://arxiv.org/abs/1709.01507)',
    'small_cnn': '–',
}


def models() -> str:
    """All models, with the classes of their configuration."""
    rows = ['| Model | Paper | Input | Parameters | GMACs |', '|---|---|--:|--:|--:|']
    for model in _models():
        paper = next(paper for prefix, paper in PAPERS.items() if model.name.startswith(prefix))
        size, params, gmacs = model.input_size[-1], _digits(model.params / 1e6), _digits(model.macs / 1e9)
        rows.append(f'| `{model.name}` | {paper} | {size} | {params} M | {gmacs} |')
    return '\n'.join(rows)


def summary(device: str) -> str:
    """The models a newcomer looks for: size, accuracy of the default weights, and speed where it was measured."""
    rows = [row for row in _benchmark(device) if row['experiment'].startswith(BESIDE)]
    speeds = {(row['contestant'], row['baseline']): float(row['ratio']) for row in rows}
    heads = ['Model', 'Parameters', 'GMACs', 'ImageNet-1k top-1, % (pixels)']
    heads += ['Speed / plain', 'Speed / SE'] if speeds else []
    lines = [f'| {" | ".join(heads)} |', '|---|' + '--:|' * (len(heads) - 1)]
    for model in sorted(_models(), key=lambda model: model.input_size[-1] < 100):  # large images first
        published = [tag.accuracies for tag in model.tags if tag.default and tag.accuracies]
        if model.name not in TRIOS and not published:
            continue
        cells = [f'`{model.name}`', f'{_digits(model.params / 1e6)} M', _digits(model.macs / 1e9)]
        cells.append(_top1(published[0]) if published else '')
        if speeds:
            beside = TRIOS.get(model.name, ('', ''))
            cells += [f'{speeds[model.name, b]:.2f}' if (model.name, b) in speeds else '' for b in beside]
        lines.append(f'| {" | ".join(cells)} |')
    caption = (
        'GMACs are billions of multiply-adds of one image. The accuracy is that of the weights that `pretrained=True` '
        "loads, from timm's results table."
    )
    if speeds:
        first = rows[0]
        caption += (
            f' Speed is throughput in {first["runtime"]} inference ({first["machine"]}, {first["threads"]} threads, '
            f'{first["dtype"]}, {first["layout"]}, batch {first["batch"]}), as a ratio '
            "to timm's model without attention and to timm's model with SE: above 1 is faster. Where nothing stands, "
            'nothing was measured.'
        )
    return '\n'.join([*lines, '', caption])


CHOICES = (  # what a reader has, the model to take, why
    ('photographs, a first try', 'senetv2_resnet50', 'the usual size; most pretrained tags'),
    ('photographs, a CPU or a small GPU', 'senetv2_resnet18', 'the cheapest'),
    ('the same, a little more time', 'senextv2_26t_32x4d', 'much more accurate for half as much again'),
    (
        'more accuracy for the same cost',
        'senextv2_50',
        'grouped convs: slower than their multiply-adds on some machines',
    ),
    ('accuracy first', 'senextv2_101d_32x8d', 'large; from ImageNet-1k alone'),
    ('accuracy first, with time and memory', 'senextv2_aa101d_32x8d', 'pretrained on ImageNet-12k, on larger images'),
    ('the most accurate there is here', 'senextv2_aa201d_32x8d', 'for servers'),
    ('32-pixel pictures', 'cifar_senetv2_resnet20', 'trains in minutes; deeper ones up to `110`'),
    ("SEANet's experiments", 'seanet20', 'compare it with a plain network of its size'),
)


def choices(device: str) -> str:
    """One table to choose by: accuracy of the default weights, size, cost, and speed where it was measured."""
    found = {model.name: model for model in _models()}
    speeds = {row['contestant']: row for row in _benchmark(device) if row['experiment'].startswith(BESIDE)}
    heads = ['You have', 'Take', 'Top-1, % (pixels)', 'Parameters', 'GMACs']
    heads += ['Images/s'] if speeds else []
    lines = [f'| {" | ".join(heads)} | Why |', f'|---|---|{"--:|" * (len(heads) - 2)}---|']
    for situation, name, why in CHOICES:
        model = found[name]
        published = [tag.accuracies for tag in model.tags if tag.default and tag.accuracies]
        cells = [situation, f'`{name}`', _top1(published[0]) if published else '']
        cells += [f'{_digits(model.params / 1e6)} M', _digits(model.macs / 1e9)]
        if speeds:
            cells += [speeds[name]['images_per_s'] if name in speeds else '']
        lines.append(f'| {" | ".join(cells)} | {why} |')
    return '\n'.join(lines)


def tags() -> str:
    """All tags whose weights are on the Hub: the source, timm's accuracy of it, its licence where it limits use."""
    rows = ['| Tag, bold where it is the default | Source on the Hub | Its top-1, % (pixels) |', '|---|---|---|']
    for model in _models():
        for tag in model.tags:
            if tag.source and tag.accuracies:
                name = f'`{model.name}.{tag.tag}`'
                name = f'**{name}**' if tag.default else name
                if tag.license and 'nc' in tag.license.lower().split('-'):
                    name += f' ({tag.license})'
                link = f'[{tag.source}](https://huggingface.co/{tag.source})'
                rows.append(f'| {name} | {link} | {_top1(tag.accuracies)} |')
    return '\n'.join(rows)


def families() -> str:
    """timm's families with SE, and whether the lift works for them."""
    lines = [
        '| Family in timm | With SE | Lifted | Compared | Output std | Largest difference: float32 | float64 '
        '| Refused where |',
        '|---|--:|--:|---|--:|--:|--:|---|',
    ]
    for row in read_csv(RESULTS / 'lift_families.csv'):
        compared = f'`{row["compared"]}`' if row['compared'] else ''
        lines.append(
            f'| `{row["family"]}` | {row["models_with_se"]} | {row["lifted"]} | {compared} '
            f'| {row["output_std"]} | {row["max_difference_float32"]} | {row["max_difference_float64"]} '
            f'| {row["why_refused"]} |'
        )
    return '\n'.join(lines)


def attention() -> str:
    """Kinds of models made of ResNet's blocks, and whether attention can be added to them."""
    lines = [
        '| Family | Models | Without attention | Added | Compared | Equal: inference | training | Refused where |',
        '|---|---|--:|--:|---|---|---|---|',
    ]
    for row in read_csv(RESULTS / 'attention_families.csv'):
        compared = f'`{row["compared"]}`' if row['compared'] else ''
        lines.append(
            f'| `{row["family"]}` | `{row["models"]}` | {row["without_attention"]} | {row["added"]} | {compared} '
            f'| {row["equal_in_inference"]} | {row["equal_in_training"]} | {row["why_refused"]} |'
        )
    return '\n'.join(lines)


@cache
def _benchmark(name: str) -> list[dict[str, str]]:
    return read_csv(RESULTS / f'benchmark_{name}.csv')


def speed(name: str, *words: str) -> str:
    """The speed of all models in the settings of a benchmark that have all of the words, and how it was measured."""
    rows = [row for row in _benchmark(name) if row['experiment'].startswith('models, ')]
    rows = [row for row in rows if set(words) <= set(row['experiment'].replace(',', '').split())]
    return f'{report.speed_table(rows, rows[0]["baseline"])}\n\n{report.measured_with(rows)}'


RUNTIMES = {  # of the benchmark, and what docs/export.md calls them
    'eager': 'PyTorch',
    'compiled': '`torch.compile`',
    'aot-inductor': 'AOTInductor',
    'onnxruntime': 'onnxruntime',
    'openvino': 'OpenVINO',
    'executorch': 'ExecuTorch (XNNPACK)',
    'torchscript': 'TorchScript',
}


def runtimes(name: str, batch: str) -> str:
    """What serves the model at which speed, beside timm's model with SE: inference in float32, NCHW, at one batch."""
    ours, beside = 'senetv2_resnet50', 'seresnet50'
    chosen = dict(training='False', dtype='float32', layout='NCHW', batch=batch, baseline=beside)
    rows = [
        row for row in _benchmark(name) if row['experiment'].startswith('models, ') and chosen.items() <= row.items()
    ]
    lines = [
        f'| | `{beside}`, ms | `{ours}`, ms | reparameterized, ms | speed / `{beside}` | reparameterized |',
        '|---|--:|--:|--:|--:|--:|',
    ]
    for runtime, words in RUNTIMES.items():
        found = {row['contestant']: row for row in rows if row['runtime'] == runtime}
        if found:
            models = [found[model] for model in (beside, ours, f'{ours}:reparameterized')]
            cells = [words, *(row['ms'] for row in models), *(f'{float(row["ratio"]):.2f}' for row in models[1:])]
            lines.append(f'| {" | ".join(cells)} |')
    shown = [row for row in rows if row['runtime'] in RUNTIMES]
    return '\n'.join(lines) + f'\n\n{report.measured_with(shown)}'


def imports() -> str:
    """What registering the models takes, at the end of the imports of torch and timm."""
    return benchmark_imports.table(RESULTS / 'benchmark_imports.csv')


def traffic() -> str:
    """The bytes that attention adds to a step, and the speed that they allow."""
    return benchmark_traffic.table(RESULTS / 'benchmark_traffic.csv', RESULTS / 'benchmark_cpu.csv')


def runs(name: str, baseline: str) -> str:
    """The commands that made the runs of a folder, their table and its caption."""
    results, _ = read_results(RESULTS / 'runs' / name)
    if not results:
        raise UserError(f'results/runs/{name} holds no runs')
    return tables.page(results, baseline)


def fresh(name: str) -> str:
    """What became of the hidden units that the lifts of a folder added, by epoch."""
    rows = read_csv(RESULTS / 'runs' / name / 'fresh.csv')
    return (
        f'{tables.fresh_table(rows)}\n'
        'Means over seeds and layers, on the test images. Columns: the root mean square of the norms of the new '
        'columns of `fc2`, over that of the others. An image fires a unit that is above zero; a unit that none fires '
        'is silent. Without them: after their columns are set to zero again, less the accuracy before, paired by '
        'seed, with its 95 % interval (Student t).'
    )


def step_times(name: str) -> str:
    """What the models of a folder of runs cost: parameters, multiply-adds and the times of a step; and the command."""
    folder = RESULTS / 'runs' / name
    rows = step_time.read(folder)
    if not rows:
        raise UserError(f'results/runs/{name} holds no step times')
    return f'```bash\n{rows[0]["command"]}\n```\n\n{step_time.table(rows, read_results(folder)[0])}'


def sweep() -> str:
    """What Ray costs a run of a grid."""
    rows = read_csv(RESULTS / 'sweep_cost.csv')
    lines = [
        '| | Runs at once | First run made after, s | Each further run, ms | Least to most |',
        '|---|--:|--:|--:|--:|',
    ]
    for row in rows:
        spread = f'{row["run_ms_least"]} to {row["run_ms_most"]}'
        lines.append(f'| {row["way"]} | {row["at_once"]} | {row["start_s"]} | {row["run_ms"]} | {spread} |')
    first = rows[0]
    one = next(row for row in rows if row['way'] != first['way'] and row['at_once'] == '1')
    cost = float(one['run_ms']) - float(first['run_ms'])
    rounds = int(first['rounds'])
    command = 'python scripts/sweep_cost.py' + (f' --rounds {rounds}' if rounds != 3 else '')
    caption = (
        f'`{command}`: {first["runs"]} runs of one epoch, one thread each, '
        f'{f"medians of {rounds} rounds" if rounds > 1 else "one round"} on a shared {first["machine"]}, torch '
        f'{first["torch"]}.'
    )
    if rounds > 1:  # one does not say how far the machine's other work moves the times
        caption += f' Made one at a time, a run takes {abs(cost):.0f} ms {"more" if cost >= 0 else "less"} with Ray.'
    return '\n'.join([*lines, '', caption])


def weights() -> str:
    """The weights that the package carries, and the accuracies of the runs they come from."""
    results = {row['run']: row for row in read_results(RESULTS / 'runs' / 'fmnist')[0]}
    lines = ['| Tag | Fashion-MNIST, % of the test images | Parameters |', '|---|--:|--:|']
    for row in read_csv(RESULTS / 'fmnist_weights.csv'):
        run = results[row['run']]
        lines.append(f'| `{row["tag"]}` | {float(run["accuracy"]):.2f} | {int(run["parameters"]):,} |')
    return '\n'.join(lines)


def gates(name: str, part: str) -> str:
    """The findings, or the table of the blocks, of a report of `timm-senetv2 gates` in results/gates."""
    parts = {'findings': '## Findings', 'blocks': '## Block by block'}
    if part not in parts:
        raise UserError(f'a report has no part {part!r}{did_you_mean(part, parts)}')
    text = (RESULTS / 'gates' / name / 'report.md').read_text(encoding='utf-8')
    return text.partition(f'{parts[part]}\n\n')[2].partition('\n## ')[0].strip()


MISFORTUNES = {  # by the names of tests/check_reliability.py
    'kills': 'SIGKILL in the middle of a command',
    'hub_faults': 'Faults of the Hub in a push or a download',
    'images': 'Damaged images',
    'hostile_files': 'Hostile and damaged files',
    'shared_cache': 'Several processes on one cache or folder',
}


def reliability() -> str:
    """What was tried to break the commands, and how it ended."""
    rows = read_csv(RESULTS / 'reliability.csv')
    lines = ['| | Cases | Right result | Refused in one line | Failed |', '|---|--:|--:|--:|--:|']
    totals = [0, 0, 0, 0]
    for kind, title in MISFORTUNES.items():
        counts = [sum(int(r[column]) for r in rows if r['kind'] == kind) for column in _OUTCOMES]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        lines.append(f'| {title} | {" | ".join(f"{count:,}" for count in counts)} |')
    lines.append(f'| **All** | {" | ".join(f"**{total:,}**" for total in totals)} |')
    used = sorted({row['versions'] for row in rows})
    return '\n'.join([*lines, '', f'Measured with {"; ".join(used)}.'])


def reliability_cases(kind: str) -> str:
    """The cases of one kind; those of images by format."""
    groups: dict[str, list[int]] = {}
    for row in read_csv(RESULTS / 'reliability.csv'):
        if row['kind'] == kind:
            counts = groups.setdefault(_group(kind, row['case']), [0, 0, 0, 0])
            for i, column in enumerate(_OUTCOMES):
                counts[i] += int(row[column])
    if not groups:
        raise UserError(f'results/reliability.csv has no rows of {kind!r}{did_you_mean(kind, MISFORTUNES)}')
    lines = ['| Case | Cases | Right result | Refused in one line | Failed |', '|---|--:|--:|--:|--:|']
    lines += [f'| {case} | {" | ".join(f"{count:,}" for count in counts)} |' for case, counts in groups.items()]
    return '\n'.join(lines)


_OUTCOMES = ('tried', 'right', 'one_line', 'failed')


def _group(kind: str, case: str) -> str:
    """Of a fault of the Hub, without whether it passes; of an image its damage, whatever its format."""
    if kind == 'hub_faults':
        return case.removesuffix(', once').removesuffix(', always')
    return case.rpartition(', ')[2] if kind == 'images' else case


GENERATORS: dict[str, Callable[..., str]] = {
    generator.__name__: generator
    for generator in (
        attention,
        choices,
        families,
        fresh,
        gates,
        imports,
        integrations,
        models,
        reliability,
        reliability_cases,
        runs,
        runtimes,
        speed,
        step_times,
        summary,
        sweep,
        tags,
        traffic,
        weights,
    )
}
