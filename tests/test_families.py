"""The command that tries the lift and the adding of attention on families of models, and the tables made by it."""

from pathlib import Path

import families as script
import pytest

from experiments import families
from experiments.files import read_csv
from timm_senetv2.errors import run

RESULTS = Path(__file__).parents[1] / 'results'


def call(*args) -> int:
    with pytest.raises(SystemExit) as done:
        run(lambda: script.main([str(arg) for arg in args]))
    return done.value.code or 0


def test_lift_is_tried_and_written(tmp_path):
    out = tmp_path / 'table.csv'
    assert call('lift', '--family', 'lcnetv2', 'vovnet', 'vgg', '--out', out) == 0
    lifted, refused = read_csv(out)  # vgg has no SE, so no row
    assert [lifted[k] for k in ('family', 'models_with_se', 'lifted', 'compared')] == [
        'lcnetv2', '3', '3', 'lcnetv2_small',
    ]  # fmt: skip
    assert (refused['family'], refused['models_with_se'], refused['lifted']) == ('vovnet', '7', '0')
    assert refused['why_refused'].endswith('it has one dense layer where SE has two')


def test_attention_is_tried_and_written(tmp_path):
    out = tmp_path / 'table.csv'
    assert call('attention', '--family', 'cifar', 'torchvision.quantization', 'vgg', '--out', out) == 0
    cifar, *refused = read_csv(out)  # vgg has no such blocks, so no row
    assert (cifar['models'], cifar['added'], cifar['compared']) == ('cifar_resnet*', '5', 'cifar_resnet20')
    assert cifar['equal_in_inference'] == cifar['equal_in_training'] == 'yes'
    assert {row['why_refused'] for row in refused} == {"its class is not timm's or torchvision's own"}


def test_lift_that_changes_the_outputs_fails_the_command(monkeypatch, capsys, tmp_path):
    def broken(model):
        model.conv_stem.weight.data.mul_(2)
        return model

    monkeypatch.setattr(families, 'lift', broken)
    assert call('lift', '--family', 'hardcorenas', '--out', tmp_path / 'table.csv') == 2
    assert 'its outputs differ by' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_attention_that_changes_one_bit_fails_the_command(monkeypatch, capsys, tmp_path):
    add_attention = families.add_attention

    def broken(model):
        add_attention(model).layer1[0].bn2.bias.data.mul_(1 + 1e-6)
        return model

    monkeypatch.setattr(families, 'add_attention', broken)
    assert call('attention', '--family', 'cifar', '--out', tmp_path / 'table.csv') == 2
    assert capsys.readouterr().err.endswith('cifar_resnet20: with attention added, its outputs differ\n')
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('table', families.TABLES)
def test_unknown_family_is_refused(table, capsys, tmp_path):
    assert call(table, '--family', 'resnt', '--out', tmp_path / 'table.csv') == 2
    assert "there is no family 'resnt'; did you mean resnet" in capsys.readouterr().err


@pytest.mark.parametrize('table', families.TABLES)
def test_published_table_is_of_this_command(table):
    rows = read_csv(RESULTS / families.TABLES[table].file)
    assert tuple(rows[0]) == families.TABLES[table].columns
    assert {row['family'] for row in rows} <= set(families.TABLES[table].families)
    if table == 'attention':
        assert {'hrnet', 'resnet', 'torchvision'} <= {row['family'] for row in rows}
        assert all(row['equal_in_inference'] == row['equal_in_training'] == 'yes' for row in rows if row['compared'])
    else:
        assert all(float(row['max_difference_float64']) <= families.TOLERANCE for row in rows if row['compared'])


def test_file_of_the_user_is_kept(tmp_path, capsys):
    (tmp_path / 'mine.csv').write_text('name,score\nme,1\n')
    assert call('lift', '--family', 'vgg', '--out', tmp_path / 'mine.csv') == 2
    assert 'is not a table of this command' in capsys.readouterr().err
    assert (tmp_path / 'mine.csv').read_text() == 'name,score\nme,1\n'
