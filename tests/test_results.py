"""The committed results: tables, commands and shipped weights belong to the rows they are said to come from."""

import csv
import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import timm_senetv2
from experiments.files import CURVES, RESULTS, read_rows
from experiments.settings import parse_specs
from experiments.tables import caption, table
from experiments.warm_start import build
from timm_senetv2 import SqueezeAggregatedExcitation

RESULTS_DIR = Path(__file__).parents[1] / 'results'
FOLDERS = sorted(path.parent for path in RESULTS_DIR.glob('runs/*/table.md'))
WEIGHTS = ('cifar_resnet20', 'cifar_seresnet20', 'cifar_senetv2_resnet20')


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_a_table_is_that_of_its_rows_and_stands_in_a_page(folder):
    rows = read_rows(folder / 'results.csv', RESULTS)
    text = (folder / 'table.md').read_text()
    baseline = re.search(r'Difference: to `(.*?)` after', text)[1]
    assert table(rows, baseline) in text
    assert caption(rows, baseline) in text
    shown = text.split('```')[1].removeprefix('bash').strip().splitlines()
    assert {row['command'] for row in rows} >= set(shown)
    assert {row['command'].replace(' --ray', '') for row in rows} == {line.replace(' --ray', '') for line in shown}
    assert len(shown) == len({line.replace(' --ray', '') for line in shown})
    assert any(text in page.read_text() for page in RESULTS_DIR.glob('*.md'))
    assert {row['run'] for row in rows} == {row['run'] for row in read_rows(folder / 'curves.csv', CURVES)}


def test_there_are_results():
    assert len(FOLDERS) >= 6


@pytest.mark.parametrize('name', WEIGHTS)
def test_shipped_weights_are_those_of_the_recorded_run(name):
    with (RESULTS_DIR / 'fmnist_weights.csv').open(newline='') as file:
        (facts,) = (row for row in csv.DictReader(file) if row['tag'] == f'{name}.fmnist')
    path = Path(timm_senetv2.__file__).parent / 'weights' / f'{name}.fmnist.safetensors'
    assert hashlib.sha256(path.read_bytes()).hexdigest() == facts['sha256']
    runs = read_rows(RESULTS_DIR / 'runs' / 'fmnist' / 'results.csv', RESULTS)
    (run,) = (row for row in runs if row['run'] == facts['run'])
    assert run['model'] == name and '--save-weights' in run['command']
    assert float(run['accuracy']) >= 92
    with safe_open(path, 'pt') as file:
        shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}
    assert shapes == {key: list(value.shape) for key, value in timm.create_model(name).state_dict().items()}


@pytest.mark.parametrize(
    'other', ['cifar_seresnet20:sae_reduction=4', 'cifar_senetv2_resnet20:sae_cardinality=2,sae_reduction=8']
)
def test_branches_and_width_compared_have_the_same_hidden_units_and_the_same_start(other):
    states = []
    for word in ('cifar_senetv2_resnet20', other):
        (spec,) = parse_specs(word)
        torch.manual_seed(3)
        model = build(spec, 10)
        states.append(model.state_dict())
        hidden = [m.fc1.out_features for m in model.modules() if isinstance(m, SqueezeAggregatedExcitation)]
        assert hidden == [4] * 3 + [8] * 3 + [16] * 3
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
