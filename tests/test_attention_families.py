"""The command that adds attention to the families of timm and torchvision, and the table made by it."""

import csv
from pathlib import Path

import pytest

from experiments import attention_families
from timm_senetv2.errors import run


def call(*args) -> int:
    with pytest.raises(SystemExit) as done:
        run(lambda: attention_families.main([str(arg) for arg in args]))
    return done.value.code or 0


def test_families_are_tried_and_written(tmp_path):
    out = tmp_path / 'table.csv'
    assert call('--family', 'cifar', 'torchvision.quantization', 'vgg', '--out', out) == 0
    cifar, *refused = csv.DictReader(out.read_text().splitlines())  # vgg has no such blocks, so no row
    assert (cifar['models'], cifar['added'], cifar['compared']) == ('cifar_resnet*', '5', 'cifar_resnet20')
    assert cifar['equal_in_inference'] == cifar['equal_in_training'] == 'yes'
    assert {row['why_refused'] for row in refused} == {"its class is not timm's or torchvision's own"}


def test_attention_that_changes_one_bit_fails_the_command(monkeypatch, capsys, tmp_path):
    add_attention = attention_families.add_attention

    def broken(model):
        add_attention(model).layer1[0].bn2.bias.data.mul_(1 + 1e-6)
        return model

    monkeypatch.setattr(attention_families, 'add_attention', broken)
    assert call('--family', 'cifar', '--out', tmp_path / 'table.csv') == 2
    assert capsys.readouterr().err.endswith('cifar_resnet20: with attention added, its outputs differ\n')
    assert not any(tmp_path.iterdir())


def test_unknown_family_is_refused(capsys, tmp_path):
    assert call('--family', 'resnt', '--out', tmp_path / 'table.csv') == 2
    assert "there is no family 'resnt'; did you mean resnet" in capsys.readouterr().err


def test_published_table_is_of_this_command():
    path = Path(attention_families.__file__).parents[1] / 'results' / 'attention_families.csv'
    with path.open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == list(attention_families.COLUMNS)
    assert {'hrnet', 'resnet', 'torchvision'} <= {row['family'] for row in rows}
    assert all(row['equal_in_inference'] == row['equal_in_training'] == 'yes' for row in rows if row['compared'])
