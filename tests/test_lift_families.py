"""The command that tries the lift on timm's families, and the table made by it."""

import sys

import lift_families
import pytest
from _cli import run


def call(monkeypatch, *args) -> int:
    monkeypatch.setattr(sys, 'argv', ['lift_families.py', *map(str, args)])
    with pytest.raises(SystemExit) as done:
        run(lift_families.main)
    return done.value.code or 0


def test_families_are_tried_and_written(monkeypatch, capsys, tmp_path):
    out = tmp_path / 'table.csv'
    assert call(monkeypatch, '--family', 'lcnetv2', 'vovnet', 'vgg', '--out', out) == 0
    header, lifted, refused = out.read_text().splitlines()  # vgg has no SE, so no row
    assert header.split(',') == list(lift_families.COLUMNS)
    assert lifted.startswith('lcnetv2,3,3,lcnetv2_small,4,')
    assert refused.startswith('vovnet,7,0,') and refused.endswith('it has one dense layer where SE has two')
    assert '| `lcnetv2` | 3 | 3 | `lcnetv2_small` |' in capsys.readouterr().out


def test_lift_that_changes_the_outputs_fails_the_command(monkeypatch, capsys, tmp_path):
    def broken(model):
        model.conv_stem.weight.data.mul_(2)
        return model

    monkeypatch.setattr(lift_families, 'lift', broken)
    assert call(monkeypatch, '--family', 'hardcorenas', '--out', tmp_path / 'table.csv') == 2
    assert 'its outputs differ by' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_unknown_family_is_refused(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, '--family', 'no_such', '--out', tmp_path / 'table.csv') == 2
    assert "timm has no module 'no_such'" in capsys.readouterr().err


def test_published_table_is_that_of_the_file(monkeypatch, capsys):
    assert call(monkeypatch, '--table') == 0
    table = capsys.readouterr().out
    readme = (lift_families.Path(lift_families.__file__).parents[1] / 'results' / 'README.md').read_text()
    assert table.count('\n') > 20 and table in readme
