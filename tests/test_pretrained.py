"""The pretrained tags and the lift of SE weights into SaE while a checkpoint is loaded."""

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from _randomize import randomize
from timm.layers import SEModule
from timm.models import get_pretrained_cfg, save_for_hf

from timm_senetv2.layers import SqueezeAggregatedExcitation
from timm_senetv2.models import pretrained
from timm_senetv2.models.pretrained import lifted_cfgs, shipped_cfgs

ROWS = list(csv.DictReader((Path(__file__).parents[1] / 'results' / 'lift_sources.csv').open()))
SOURCES = list(dict.fromkeys((row['model'], row['source_on_the_hub'].removeprefix('timm/')) for row in ROWS))
ARCHITECTURES = dict(sorted((model, source.split('.')[0]) for model, source in SOURCES))
QUICK = ('senetv2_resnet50', 'senextv2_26t_32x4d')


def tag(model: str, source: str) -> str:
    return f'{model}.se_{source.split(".")[1]}'


def images(n: int = 2, size: int = 96, chans: int = 3, **kwargs) -> torch.Tensor:
    return torch.randn(n, chans, size, size, **kwargs)


def se_source(name: str, **kwargs) -> torch.nn.Module:
    model = timm.create_model(name, **kwargs)
    weight = next(model.parameters())
    # small scales, as training gives them to residual branches: with scales of 1, 200 layers amplify rounding past 1e-4
    return randomize(model, images(8, 96, weight.shape[1], dtype=weight.dtype), scales=(0.1, 0.5))


@pytest.fixture(scope='module')
def seresnet18() -> torch.nn.Module:
    return se_source('seresnet18')


def lifted(name: str, source: torch.nn.Module, **kwargs) -> torch.nn.Module:
    """The model with the source's weights loaded as timm loads those of a file or of the Hub."""
    overlay = dict(state_dict=source.state_dict(), **kwargs.pop('overlay', {}))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def sae_layers(model: torch.nn.Module) -> dict[str, SqueezeAggregatedExcitation]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SqueezeAggregatedExcitation)}


# ---- the tags


def test_every_source_is_a_tag_that_timm_lists():
    assert {tag(*pair) for pair in SOURCES} <= set(timm.list_pretrained('sene*v2_*'))


@pytest.mark.parametrize('model', ARCHITECTURES)
def test_default_tag_is_the_best_source(model):
    best = max((row for row in ROWS if row['model'] == model), key=lambda row: float(row['top1']))
    assert get_pretrained_cfg(model).hf_hub_id == best['source_on_the_hub']
    assert timm.is_model_pretrained(model)


@pytest.mark.parametrize(('model', 'source'), SOURCES)
def test_config_is_that_of_the_source(model, source):
    ours, theirs = get_pretrained_cfg(tag(model, source)), get_pretrained_cfg(source)
    assert ours.hf_hub_id == f'timm/{source}'
    assert (ours.architecture, ours.tag) == (model, f'se_{source.split(".")[1]}')
    assert dataclasses.replace(ours, architecture=None, tag=None) == dataclasses.replace(
        theirs, architecture=None, tag=None
    )


def test_source_that_timm_lacks_is_left_out():
    names = ('seresnet50.no_such_tag', 'no_such_model.x', 'seresnet18.untrained', 'seresnet50.a1_in1k')
    cfgs = lifted_cfgs({'a': names})
    assert list(cfgs) == ['a.se_a1_in1k']


def test_shipped_weights_are_a_tag_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, '_WEIGHTS_DIR', tmp_path)
    (tmp_path / 'a.fmnist.safetensors').touch()
    cfgs = shipped_cfgs(('a', 'b'), 'fmnist', dict(num_classes=10))
    assert cfgs == {'a.fmnist': dict(num_classes=10, file=str(tmp_path / 'a.fmnist.safetensors'))}


def test_every_model_has_a_config_without_weights_too():
    for model in timm.list_models(module=['senetv2', 'cifar', 'small_cnn']):
        assert not get_pretrained_cfg(f'{model}.untrained').has_weights


# ---- the function is the source's


def assert_lifted_logits_equal(model: str, atol: float, dtype: torch.dtype) -> float:
    source = se_source(ARCHITECTURES[model], dtype=dtype)
    target = lifted(model, source, dtype=dtype)
    x = images(dtype=dtype)
    with torch.no_grad():
        expected, actual = source(x), target(x)
        for layer in sae_layers(target).values():
            layer.fc2.weight.neg_()
        assert (target(x) - expected).abs().max() > 0.01  # the attention matters to these logits
    difference = (actual - expected).abs().max().item()
    print(f'{model}: logits of standard deviation {expected.std():.3g} differ by at most {difference:.3g} in {dtype}')
    assert difference <= atol


@pytest.mark.parametrize(
    'model', [pytest.param(model, marks=() if model in QUICK else pytest.mark.slow) for model in ARCHITECTURES]
)
def test_lifted_logits_equal_source(model):
    assert_lifted_logits_equal(model, 1e-4, torch.float32)


@pytest.mark.parametrize('model', ['senetv2_resnet50', pytest.param('senextv2_50', marks=pytest.mark.slow)])
def test_lifted_logits_equal_source_in_double(model):
    assert_lifted_logits_equal(model, 1e-10, torch.float64)


def test_fresh_rows_keep_the_initialisation_and_fresh_columns_are_zero(seresnet18):
    source = seresnet18
    torch.manual_seed(1)
    fresh = timm.create_model('senetv2_resnet18')
    torch.manual_seed(1)
    target = lifted('senetv2_resnet18', source)
    for name, layer in sae_layers(target).items():
        se = source.get_submodule(name)
        units = se.fc1.out_channels
        initial = fresh.get_submodule(name)
        assert torch.equal(layer.fc1.weight[:units], se.fc1.weight.flatten(1))
        assert torch.equal(layer.fc1.bias[:units], se.fc1.bias)
        assert torch.equal(layer.fc2.weight[:, :units], se.fc2.weight.flatten(1))
        assert torch.equal(layer.fc2.bias, se.fc2.bias)
        assert torch.equal(layer.fc1.weight[units:], initial.fc1.weight[units:])
        assert torch.equal(layer.fc1.bias[units:], initial.fc1.bias[units:])
        assert not layer.fc2.weight[:, units:].any()
    assert units == 32 and layer.fc1.out_features == 64


def test_one_training_step_changes_every_fresh_column():
    source = randomize(timm.create_model('seresnext26d_32x4d'), images(8))
    model = lifted('senextv2_26d_32x4d', source).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # images of different colours, as a data set has them: a ReLU that is off for a whole batch would get no gradient
    batch = images(32, 32) + 2 * torch.randn(32, 3, 1, 1)
    torch.nn.functional.cross_entropy(model(batch), torch.arange(32)).backward()
    optimizer.step()
    for name, layer in sae_layers(model).items():
        fresh = layer.fc2.weight[:, source.get_submodule(name).fc1.out_channels :]
        assert fresh.shape[1] and fresh.any(0).all(), name


# ---- with timm's options


def test_lift_with_other_classes_keeps_the_features(seresnet18):
    source = seresnet18
    target = lifted('senetv2_resnet18', source, num_classes=7)
    x = images()
    assert target(x).shape == (2, 7)
    torch.testing.assert_close(target.forward_features(x), source.forward_features(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ('model', 'source_name'), [('senetv2_resnet18', 'seresnet18'), ('senextv2_26d_32x4d', 'seresnext26d_32x4d')]
)
def test_lift_with_one_input_channel_equals_timms_own_adaptation(model, source_name):
    source = se_source(source_name)
    gray = timm.create_model(
        source_name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=source.state_dict()), in_chans=1
    ).eval()
    x = images(chans=1)
    torch.testing.assert_close(lifted(model, source, in_chans=1)(x), gray(x), rtol=0, atol=1e-4)


def test_lift_with_features_only(seresnet18):
    source = seresnet18
    features = lifted('senetv2_resnet18', source, features_only=True)
    x = images()
    _, expected = source.forward_intermediates(x)
    for actual, wanted in zip(features(x), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    'sizes',
    [
        dict(sae_cardinality=8),
        dict(sae_reduction=8),
        dict(sae_cardinality=1, sae_reduction=8),
    ],
)
def test_lift_into_other_sizes_while_there_is_room(sizes, seresnet18):
    source = seresnet18
    x = images()
    torch.testing.assert_close(lifted('senetv2_resnet18', source, **sizes)(x), source(x), rtol=0, atol=1e-4)


def test_any_number_of_hidden_units_that_fits_is_lifted():
    source = se_source('seresnet34', block_args=dict(attn_layer=partial(SEModule, rd_channels=7)))
    x = images()
    torch.testing.assert_close(lifted('senetv2_resnet34', source)(x), source(x), rtol=0, atol=1e-4)


def test_lift_from_fewer_branches_of_our_own():
    source = randomize(timm.create_model('cifar_seresnet20'), images(4, 32))
    x = images(size=32)
    torch.testing.assert_close(lifted('cifar_senetv2_resnet20', source)(x), source(x), rtol=0, atol=1e-5)


# ---- native weights, and weights that do not fit


@pytest.mark.parametrize('add_identity', [False, True])
def test_native_weights_pass_through_unchanged(add_identity):
    source = randomize(timm.create_model('senetv2_resnet18', sae_add_identity=add_identity), images(2, 32))
    target = lifted('senetv2_resnet18', source, sae_add_identity=add_identity)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


def test_weights_without_room_are_refused():
    source = timm.create_model('seresnet18')
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc1\.weight has the shape \(8, 64, 1, 1\), and \(2, 64\)'):
        lifted('senetv2_resnet18', source, sae_cardinality=1)


def test_lift_into_add_identity_is_refused():
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc1\.weight cannot be lifted into .* add_identity'):
        lifted('senetv2_resnet18', timm.create_model('seresnet18'), sae_add_identity=True)


@pytest.mark.parametrize('num_classes', [1000, 7])
def test_weights_without_attention_are_refused_even_where_timm_loads_loosely(num_classes):
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc1\.weight is missing; .* \(8, 64\)'):
        lifted('senetv2_resnet18', timm.create_model('resnet18'), num_classes=num_classes)


@pytest.mark.parametrize('damage', ['fc1.bias', 'fc2.weight', 'fc2.bias'])
def test_se_weights_of_a_wrong_shape_are_refused_with_tensor_and_both_shapes(damage):
    source = timm.create_model('seresnet18').state_dict()
    key = f'layer2.1.se.{damage}'
    wanted = tuple(source[key].shape[:2])
    source[key] = source[key][1:]
    with pytest.raises(RuntimeError) as error:
        timm.create_model('senetv2_resnet18', pretrained=True, pretrained_cfg_overlay=dict(state_dict=source))
    assert str(error.value).startswith(f'{key} has the shape {tuple(source[key].shape)}')
    assert str(wanted) in str(error.value)


def test_one_missing_bias_is_refused():
    source = timm.create_model('seresnet18').state_dict()
    del source['layer1.0.se.fc1.bias']
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc1\.bias is missing; .* \(8,\)'):
        timm.create_model('senetv2_resnet18', pretrained=True, pretrained_cfg_overlay=dict(state_dict=source))


def test_norm_inside_the_attention_is_refused():
    attn_layer = partial(SEModule, norm_layer=torch.nn.BatchNorm2d)
    source = timm.create_model('seresnet18', block_args=dict(attn_layer=attn_layer))
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.bn\..*, of shape .*, is not a weight of an SE layer'):
        lifted('senetv2_resnet18', source, num_classes=7)


def test_attention_without_biases_is_lifted():
    source = se_source('seresnet18', block_args=dict(attn_layer=partial(SEModule, bias=False)))
    x = images()
    torch.testing.assert_close(lifted('senetv2_resnet18', source)(x), source(x), rtol=0, atol=1e-4)


# ---- through timm's own ways in and out


def test_file_of_the_source_and_directory_of_the_lifted_model(tmp_path):
    source = se_source('seresnext26t_32x4d')
    file = tmp_path / 'source.safetensors'
    safetensors.torch.save_file(source.state_dict(), file)
    model = timm.create_model('senextv2_26t_32x4d', pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    x = images()
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=1e-4)

    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert str(tmp_path) not in (tmp_path / 'saved' / 'config.json').read_text()
    saved_cfg = json.loads((tmp_path / 'saved' / 'config.json').read_text())['pretrained_cfg']
    assert saved_cfg['test_input_size'] == [3, 288, 288]


def test_directory_of_a_source_loads_as_ours_under_our_architecture(tmp_path, seresnet18):
    source = seresnet18
    save_for_hf(source, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['architecture'] = 'senetv2_resnet18'
    del config['model_args']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    x = images()
    torch.testing.assert_close(
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), source(x), rtol=0, atol=1e-4
    )
