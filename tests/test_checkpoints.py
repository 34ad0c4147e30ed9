"""`lift` on live timm models. Foreign files: test_convert_checkpoint.py. The lift while loading: test_pretrained.py."""

import copy

import pytest
import timm
import torch
from timm.layers import SEModule
from timm.models.efficientnet import SqueezeExcite
from torch import nn

import timm_senetv2
from experiments.randomize import randomize
from timm_senetv2 import SqueezeAggregatedExcitation, lift


def images(n: int = 2, size: int = 64, **kwargs) -> torch.Tensor:
    return torch.randn(n, 3, size, size, **kwargs)


def sae_layers(model: nn.Module) -> list[SqueezeAggregatedExcitation]:
    return [m for m in model.modules() if isinstance(m, SqueezeAggregatedExcitation)]


@pytest.mark.parametrize(
    'name',
    [
        'seresnet18',
        'legacy_seresnet18',
        'regnety_002',
        'mobilenetv3_small_050',  # hard-sigmoid gate
        'efficientnet_b0',  # SiLU, and more channels than SE's hidden units say
        'ghostnet_050',
        'lcnet_050',
    ],
)
def test_lifted_model_computes_the_same(name):
    x = images(8)
    source = randomize(timm.create_model(name), x)
    model = lift(copy.deepcopy(source))
    assert not [m for m in model.modules() if type(m).__name__ in ('SEModule', 'SqueezeExcite')]
    with torch.no_grad():
        expected = source(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.double()(x.double()), source.double()(x.double()), rtol=0, atol=1e-10)
        for layer in sae_layers(model):
            layer.fc2.weight.neg_()
        assert (model(x.double()) - expected).abs().max() > 0.01  # the attention matters to these outputs


def test_lift_is_public_and_in_place():
    model = timm.create_model('mobilenetv3_small_050')
    assert timm_senetv2.lift(model) is model
    assert 'lift' in timm_senetv2.__all__


def test_lift_of_a_feature_extractor():
    x = images()
    source = timm.create_model('regnety_002', features_only=True).eval()
    expected = source(x)
    for actual, wanted in zip(lift(source)(x), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'se',
    [
        SEModule(40),
        SEModule(40, bias=False),
        SEModule(40, rd_channels=64, act_layer=nn.GELU, gate_layer=nn.Tanh),
        SqueezeExcite(40, rd_channels=3, act_layer=nn.SiLU, gate_layer='hard_sigmoid'),
    ],
)
def test_single_layer_computes_the_same(se):
    se.double()
    x = torch.randn(3, 40, 4, 5, dtype=torch.float64)
    layer = lift(se)
    assert isinstance(layer, SqueezeAggregatedExcitation)
    torch.testing.assert_close(layer(x), se(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ('channels', 'hidden', 'options', 'rd_channels'),
    [
        (256, 16, {}, 8),  # reduction 32, cardinality 4
        (256, 64, {}, 16),  # SE has more than 4 branches of 8: they grow
        (256, 65, {}, 17),
        (256, 64, dict(cardinality=8), 8),
        (256, 64, dict(reduction=8), 32),
        (16, 1, {}, 1),
    ],
)
def test_sizes_are_the_papers_or_as_many_as_the_source_needs(channels, hidden, options, rd_channels):
    layer = lift(SEModule(channels, rd_channels=hidden), **options)
    assert (layer.cardinality, layer.rd_channels) == (options.get('cardinality', 4), rd_channels)


def test_activation_gate_dtype_mode_and_frozen_parameters_stay():
    se = SqueezeExcite(32, act_layer=nn.Hardswish, gate_layer='hard_sigmoid', dtype=torch.bfloat16).eval()
    se.conv_reduce.weight.requires_grad_(False)
    layer = lift(se)
    assert layer.act is se.act1 and layer.gate_act is se.gate
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not layer.training
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ['fc1.weight']


def test_layer_used_in_two_places_stays_one():
    se = SEModule(16)
    model = lift(nn.Sequential(se, nn.ReLU(), se))
    assert isinstance(model[0], SqueezeAggregatedExcitation) and model[0] is model[2]


def test_model_without_memory_is_lifted_without_memory():
    with torch.device('meta'):
        model = timm.create_model('seresnet50')
    assert {p.device.type for p in lift(model).parameters()} == {'meta'}


def test_one_training_step_changes_the_new_capacity():
    model = lift(nn.Sequential(SEModule(32, rd_channels=4), nn.Flatten(), nn.Linear(32, 5)), reduction=4)
    before = copy.deepcopy(model[0])
    assert not before.fc2.weight[:, 4:].any()
    x = torch.randn(64, 32, 1, 1)
    nn.functional.cross_entropy(model(x), torch.arange(64) % 5).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model[0].fc2.weight[:, 4:].any(0).all()


class OwnSE(SEModule):
    pass


@pytest.mark.parametrize(
    ('model', 'reason'),
    [
        (lambda: timm.create_model('rexnet_100'), r'^features\.3\.se \(SEModule\) .* a BatchNorm2d between its dense'),
        (lambda: timm.create_model('ese_vovnet19b_slim'), r'\(EffectiveSEModule\) .* one dense layer where SE has two'),
        (lambda: nn.Sequential(SEModule(16), SEModule(16, add_maxpool=True)), r'^1 \(SEModule\) .* the maximum'),
        (lambda: nn.Sequential(SEModule(16), OwnSE(16)), r"^1 \(OwnSE\) .* not timm's own"),
        (lambda: timm.create_model('resnet18'), r'^ResNet holds no SEModule or SqueezeExcite'),
    ],
)
def test_unusual_attention_is_refused_and_the_model_unchanged(model, reason):
    with torch.device('meta'):
        model = model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=reason):
        lift(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize('options', [dict(reduction=0), dict(cardinality=0), dict(cardinality=2.5)])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))} must be a whole number'):
        lift(SEModule(16), **options)
