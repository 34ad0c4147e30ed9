"""The comparison with other kinds of networks: what it trains, and that one command does it."""

import csv

import compare_architectures
import pytest

from experiments import step_time
from timm_senetv2.errors import UserError


def test_one_command_trains_tests_and_times(tmp_path, monkeypatch, capsys):
    every = compare_architectures.models(16)
    chosen = [every[0], *(word for word in every if word.startswith(('mobilenet', 'vit')))]
    monkeypatch.setattr(compare_architectures, 'models', lambda side, small: chosen)
    monkeypatch.setattr(step_time, 'ROUNDS', 1)
    out = tmp_path / 'out'
    arguments = ['--dataset', 'digits', '--quick', '--image-size', '16', '--crop-padding', '1', '--device', 'cpu']
    compare_architectures.main([*arguments, '--out', str(out)])
    with (out / 'results.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['model'] for row in rows] == chosen and len(chosen) == 3
    assert {(row['opt'], row['lr'], row['epochs'], row['limit']) for row in rows} == {('adamw', '0.001', '1', '64')}
    assert all(row['command'].startswith('python scripts/compare_architectures.py --dataset digits') for row in rows)
    with (out / step_time.FILE).open(newline='') as file:
        assert {row['model'] for row in csv.DictReader(file)} == set(chosen)
    assert (out / 'accuracy_vs_cost.png').exists()
    assert '| training step, ms |' in capsys.readouterr().out


def test_the_list_says_what_each_costs(capsys):
    compare_architectures.main(['--list', '--models', 'small_cnn'])
    listed = capsys.readouterr().out
    rows = {row.split('`')[1]: row.split('|')[2].strip() for row in listed.splitlines() if '`' in row}
    assert list(rows) == [*compare_architectures.models(32), 'small_cnn']
    assert rows['cifar_resnet20'] == '272,474'
    kinds = ('resnet', 'seresnet', 'senetv2', 'efficientnet', 'mobilenetv3', 'regnety', 'vit')
    assert all(any(kind in name for name in rows) for kind in kinds)


def test_small_ones_are_of_the_same_kinds_and_cost_as_much_as_the_resnets(capsys):
    compare_architectures.main(['--list', '--small', '--image-size', '16'])
    rows = [row.split('|') for row in capsys.readouterr().out.splitlines() if '`' in row]
    costs = [float(row[3]) for row in rows]
    assert len(rows) == len(compare_architectures.models(16)) and max(costs) < 2 * costs[0]
    assert max(int(row[2].replace(',', '')) for row in rows) < 3_000_000


@pytest.mark.parametrize('size', ['8', '30'])
def test_a_size_that_has_no_eight_patches_is_one_line(size):
    with pytest.raises(UserError, match='--image-size must be a multiple of 8'):
        compare_architectures.main(['--dataset', 'digits', '--image-size', size, '--out', 'x'])
