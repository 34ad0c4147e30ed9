"""The Fashion-MNIST weights that ship in the package, through timm alone and offline."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg, save_for_hf

from experiments.data import FASHION_MNIST_CFG

MODELS = ('cifar_resnet20', 'cifar_seresnet20', 'cifar_senetv2_resnet20')
# 28-pixel images of the test set, ten a row: row c holds the first ten of class c. Fashion-MNIST, MIT licence
SHEET = Path(__file__).parent / 'data' / 'fashion_mnist.png'

shipped = pytest.mark.parametrize('name', MODELS)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a network connection was asked for')

    monkeypatch.setattr('socket.socket.connect', refuse)


@shipped
def test_pretrained_is_a_working_classifier_offline(name):
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    sheet = Image.open(SHEET).convert('RGB')
    tiles = [sheet.crop((28 * x, 28 * y, 28 * x + 28, 28 * y + 28)) for y in range(10) for x in range(10)]
    with torch.no_grad():
        found = model(torch.stack([transform(tile) for tile in tiles])).argmax(1)
    correct = (found == torch.arange(10).repeat_interleave(10)).float().mean().item()
    print(f'{name}: {correct:.0%} of 100 images')
    assert correct >= 0.88


@shipped
def test_tag_is_listed_and_is_the_default(name):
    assert f'{name}.fmnist' in timm.list_pretrained('*20')
    assert get_pretrained_cfg(name).tag == 'fmnist'


@shipped
def test_config_says_how_the_images_were_prepared(name):
    cfg = get_pretrained_cfg(f'{name}.fmnist')
    assert cfg.label_names[9] == 'Ankle boot' and len(cfg.label_names) == 10
    assert (cfg.mean, cfg.std) == ((0.286,) * 3, (0.353,) * 3)
    assert (cfg.label_names, cfg.mean, cfg.std) == (
        FASHION_MNIST_CFG.label_names,
        FASHION_MNIST_CFG.mean,
        FASHION_MNIST_CFG.std,
    )


@shipped
def test_saved_directory_names_the_labels_and_no_path_of_this_machine(name, tmp_path):
    model = timm.create_model(name, pretrained=True)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = (tmp_path / 'config.json').read_text()
    assert str(Path(timm.__file__).parents[1]) not in config and 'safetensors' not in config
    assert json.loads(config)['pretrained_cfg']['label_names'][9] == 'Ankle boot'
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


@shipped
def test_fine_tuning_start_takes_the_trunk(name):
    model = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
    assert torch.equal(model.layer3[2].conv2.weight, timm.create_model(name, pretrained=True).layer3[2].conv2.weight)
