"""What Ray costs a run: the measurement on few runs, and the committed table."""

import csv
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments import markdown, sweep_cost
from timm_senetv2.errors import UserError


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_the_page_says_what_was_measured(tmp_path, monkeypatch):
    measured = [('without Ray', 1, 2.0, 50.4), ('with Ray', 1, 9.0, 63.0), ('with Ray', 2, 9.5, 31.0)]
    rows = [
        dict(zip(sweep_cost.COLUMNS, map(str, (way, n, 200, 3, start, ms, ms, ms, 'a machine', '2.9')), strict=True))
        for way, n, start, ms in measured
    ]
    with (tmp_path / 'sweep_cost.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, sweep_cost.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(markdown, 'RESULTS', tmp_path)
    text = markdown.sweep()
    assert '200 runs' in text and 'a run takes 13 ms more with Ray' in text
    for row in rows:
        assert f'| {row["way"]} | {row["at_once"]} | {row["start_s"]} | {row["run_ms"]} |' in text


def test_ways_whose_rows_differ_are_not_written(tmp_path, monkeypatch):
    seen = []

    def measure(executor, runs):
        seen.append(executor)
        return 1.0, 1.0, [[{'accuracy': str(len(seen))}], []]

    monkeypatch.setattr(sweep_cost, 'measure', measure)
    monkeypatch.setattr(sweep_cost, 'on_ray', lambda *args, **kwargs: None)
    with pytest.raises(UserError, match='differ'):
        sweep_cost.write_costs(tmp_path / 'cost.csv', runs=2, rounds=1)
    assert len(seen) >= 2 and not list(tmp_path.iterdir())


@pytest.fixture(scope='module', autouse=True)
def imports() -> None:
    import sklearn  # noqa: F401  # sets variables, before a test's environment is looked at


@pytest.mark.integration
@pytest.mark.timeout(1200)
@pytest.mark.skipif(find_spec('ray') is None, reason='needs ray')
def test_it_measures_a_grid_in_each_way(tmp_path, monkeypatch):
    monkeypatch.setenv('RAY_worker_niceness', '0')
    monkeypatch.setenv('RAY_memory_monitor_refresh_ms', '0')
    import_module('sweep_cost').main(['--runs', '4', '--rounds', '1', '--out', str(tmp_path / 'cost.csv')])
    rows = read(tmp_path / 'cost.csv')
    assert tuple(rows[0]) == sweep_cost.COLUMNS
    assert all(float(row['start_s']) > 0 and float(row['run_ms']) > 0 for row in rows)
