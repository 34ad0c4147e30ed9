"""The command that tries the lift on timm's families, and the table made by it."""

import pytest

from experiments import lift_families
from timm_senetv2.errors import run


def call(*args) -> int:
    with pytest.raises(SystemExit) as done:
        run(lambda: lift_families.main([str(arg) for arg in args]))
    return done.value.code or 0


def test_families_are_tried_and_written(tmp_path):
    out = tmp_path / 'table.csv'
    assert call('--family', 'lcnetv2', 'vovnet', 'vgg', '--out', out) == 0
    header, lifted, refused = out.read_text().splitlines()  # vgg has no SE, so no row
    assert header.split(',') == list(lift_families.COLUMNS)
    assert lifted.startswith('lcnetv2,3,3,lcnetv2_small,4,')
    assert refused.startswith('vovnet,7,0,') and refused.endswith('it has one dense layer where SE has two')


def test_lift_that_changes_the_outputs_fails_the_command(monkeypatch, capsys, tmp_path):
    def broken(model):
        model.conv_stem.weight.data.mul_(2)
        return model

    monkeypatch.setattr(lift_families, 'lift', broken)
    assert call('--family', 'hardcorenas', '--out', tmp_path / 'table.csv') == 2
    assert 'its outputs differ by' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_unknown_family_is_refused(capsys, tmp_path):
    assert call('--family', 'no_such', '--out', tmp_path / 'table.csv') == 2
    assert "timm has no module 'no_such'" in capsys.readouterr().err
