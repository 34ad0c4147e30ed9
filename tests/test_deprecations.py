"""The earlier names of models that were renamed."""

import json

import pytest
import timm
import torch

OLD_TO_NEW = {f'senetv2_resnet{depth}': f'cifar_senetv2_resnet{depth}' for depth in (20, 32, 44, 56, 110)}


def test_earlier_names_map_to_the_current_ones_and_are_not_listed():
    assert OLD_TO_NEW.items() <= timm.models.get_deprecated_models('cifar').items()
    assert not OLD_TO_NEW.keys() & set(timm.list_models())


@pytest.mark.parametrize('old', OLD_TO_NEW)
def test_an_earlier_name_builds_the_current_model(old):
    with pytest.warns(UserWarning, match=OLD_TO_NEW[old]):
        model = timm.create_model(f'{old}.untrained', num_classes=7)
    assert model.pretrained_cfg['architecture'] == OLD_TO_NEW[old]
    assert model.state_dict().keys() == timm.create_model(OLD_TO_NEW[old]).state_dict().keys()
    assert model.fc.out_features == 7


@pytest.mark.parametrize('old', ['senetv2_resnet20', 'senetv2_resnet20.fmnist'])
@pytest.mark.filterwarnings('ignore:Mapping deprecated model name')
def test_an_earlier_name_loads_the_same_weights(old):
    current = timm.create_model('cifar_senetv2_resnet20.fmnist', pretrained=True).state_dict()
    loaded = timm.create_model(old, pretrained=True).state_dict()
    assert loaded.keys() == current.keys()
    assert all(torch.equal(loaded[key], current[key]) for key in current)


@pytest.mark.filterwarnings('ignore:Mapping deprecated model name')
def test_a_folder_saved_under_an_earlier_name_loads(tmp_path):
    model = timm.create_model('cifar_senetv2_resnet20.fmnist', pretrained=True)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['architecture'] = 'senetv2_resnet20'
    (tmp_path / 'config.json').write_text(json.dumps(config))
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
