"""scripts/docs.py and experiments/markdown.py: the generated regions of the Markdown files."""

import re
import statistics
from pathlib import Path

import pytest
import timm

import docs
from experiments import markdown
from experiments.files import read_csv
from timm_senetv2.errors import UserError, run

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / 'timm_senetv2' / 'weights'


def cells(table: str) -> dict[str, list[str]]:
    """The rows of a Markdown table, by their first cell without its marks."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines() if line[:1] == '|']
    return {row[0].replace('`', '').replace('*', '').split(' ')[0]: row[1:] for row in rows[2:]}


def test_every_region_of_every_document_is_up_to_date():
    docs.main(['--check'])


def test_documents_have_regions():
    filled = {path.relative_to(ROOT).as_posix() for path in markdown.documents() if markdown.BEGIN in path.read_text()}
    assert {'README.md', 'docs/models.md', 'docs/pretrained.md', 'results/README.md', 'results/speed.md'} <= filled


def test_stale_region_is_noticed_and_written_and_nothing_else(tmp_path, capsys):
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- docs.py: weights -->\n| old |\n<!-- /docs.py -->\nafter\n')
    with pytest.raises(UserError, match='out of date: .*page.md; run python scripts/docs.py'):
        docs.main(['--check', str(page)])
    assert '| old |' in page.read_text()
    docs.main([str(page)])
    text = page.read_text()
    assert text.startswith('before\n<!-- docs.py: weights -->\n| Tag |') and text.endswith(
        '\n<!-- /docs.py -->\nafter\n'
    )
    assert '| old |' not in text
    docs.main(['--check', str(page)])
    written = page.stat().st_mtime_ns
    docs.main([str(page)])
    assert page.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    'text, message',
    [
        ('<!-- docs.py: tagz -->\n<!-- /docs.py -->\n', "no generator is named 'tagz'; did you mean tags?"),
        ('<!-- docs.py: tags -->\n', 'has no <!-- /docs.py --> after it'),
        ('<!-- docs.py: tags -->\n<!-- docs.py: models -->\n<!-- /docs.py -->\n', 'has no'),
        ('<!-- docs.py: runs -->\n<!-- /docs.py -->\n', 'missing 2 required'),
        ('<!-- docs.py: runs nothing resnet50 -->\n<!-- /docs.py -->\n', 'results/runs/nothing holds no runs'),
    ],
)
def test_broken_region_costs_one_line(text, message, tmp_path, capsys):
    page = tmp_path / 'page.md'
    page.write_text(text)
    with pytest.raises(SystemExit) as stop:
        run(lambda: docs.main([str(page)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert 'page.md' in error and message in error
    assert page.read_text() == text


def test_table_of_models_has_all_models_with_their_parameters():
    table = cells(markdown.models())
    modules = ('senetv2', 'cifar', 'small_cnn')
    assert set(table) == {name for module in modules for name in timm.list_models(module=module)}
    for name in 'senetv2_resnet18', 'small_cnn', 'cifar_resnet20':
        params = sum(p.numel() for p in timm.create_model(name).parameters())
        assert float(table[name][2].removesuffix(' M')) == pytest.approx(params / 1e6, rel=5e-3)


def test_accuracies_are_those_of_the_sources():
    published = {
        f'{row["model"]}.{kind}_{row["source_on_the_hub"].split(".")[1]}': row
        for kind, name in (('se', 'lift_sources.csv'), ('plain', 'plain_sources.csv'))
        for row in read_csv(WEIGHTS / name)
    }
    table = cells(markdown.tags())
    assert set(table) == set(published)
    for tag, row in published.items():
        assert f'{float(row["top1"]):.2f}&nbsp;({row["img_size"]})' in table[tag][1]
    restricted = {tag for tag, row in published.items() if '-nc-' in row.get('license', '')}
    assert restricted and all(f'`{tag}` (cc-by-nc' in markdown.tags() for tag in restricted)


def test_accuracies_of_our_weights_are_those_of_the_runs_they_come_from():
    runs = {row['run']: row for row in read_csv(ROOT / 'results/runs/fmnist/results.csv')}
    table = cells(markdown.weights())
    rows = read_csv(ROOT / 'results/fmnist_weights.csv')
    assert len(rows) == len(table) == 3
    for row in rows:
        run = runs[row['run']]
        assert table[row['tag']][0] == f'{float(run["accuracy"]):.2f}'
        assert run['seed'] == '0' and 'epochs 5' in run['command']


def test_speeds_are_those_of_the_benchmark():
    rows = read_csv(ROOT / 'results/benchmark_cpu.csv')
    text = markdown.speed('cpu', 'channels-last')
    found = re.findall(r'^\| ((?:inference|training step), .*?channels-last.*?) \| (.*) \|$', text, flags=re.M)
    names = re.findall(r'`([^`]*)`', text.splitlines()[0])
    assert found and names[0] == 'resnet50'
    for setting, ratios in found:
        measured = {
            row['contestant']: row['ratio']
            for row in rows
            if row['experiment'] == f'models, {setting}' and row['baseline'] == 'resnet50'
        }
        for name, ratio in zip(names[1:], ratios.split(' | '), strict=True):
            assert ratio.strip() == (f'{float(measured[name]):.3f}' if name in measured else '')


def test_runtimes_are_those_of_the_benchmark():
    """Against the times of all rounds, from which neither the table nor its file was read."""
    rounds: dict[tuple[str, str], list[float]] = {}
    for row in read_csv(ROOT / 'results/benchmark_cpu_rounds.csv'):
        rounds.setdefault((row['experiment'], row['contestant']), []).append(float(row['ms']))
    for batch in '1', '8':
        table = cells(markdown.runtimes('cpu', batch))
        for runtime, words in markdown.RUNTIMES.items():
            experiment = f'models, inference, cpu, {runtime}, float32, NCHW, batch {batch}'
            models = ('seresnet50', 'senetv2_resnet50', 'senetv2_resnet50:reparameterized')
            times = [rounds.get((experiment, model)) for model in models]
            row = table.pop(words.replace('`', '').split()[0], None)
            assert (row is not None) == all(times)  # where nothing was measured, nothing stands
            if row is None:
                continue
            expected = [statistics.median(t) for t in times]
            expected += [statistics.median(a / b for a, b in zip(times[0], t, strict=True)) for t in times[1:]]
            assert [float(cell) for cell in row] == pytest.approx(expected, rel=2e-2)
        assert not table


def test_links_become_absolute_for_an_index():
    text = (
        '[a](docs/a.md#b) ![p](results/p.png) [x](https://x.org) [t](#top)\n```bash\n[q](docs/q.md)\n```\n[c][timm]\n'
    )
    assert markdown.absolute(text, 'https://git.example/o/n/', 'v1') == (
        '[a](https://git.example/o/n/blob/v1/docs/a.md#b) ![p](https://git.example/o/n/raw/v1/results/p.png) '
        '[x](https://x.org) [t](#top)\n```bash\n[q](docs/q.md)\n```\n[c][timm]\n'
    )
