"""`lift` on live timm models. The lift while loading: test_pretrained.py."""

import copy

import pytest
import timm
import torch
from networks import images, sae_layers
from timm.layers import SEModule
from timm.models.efficientnet import SqueezeExcite
from torch import nn
from torch.nn.utils import parametrizations, prune

import timm_senetv2
from experiments.randomize import randomize
from timm_senetv2 import SqueezeAggregatedExcitation, lift

QCONFIG = torch.ao.quantization.get_default_qat_qconfig('x86')


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
    x = images(8, 64)
    source = randomize(timm.create_model(name), x)
    model = lift(copy.deepcopy(source))
    assert not [m for m in model.modules() if type(m).__name__ in ('SEModule', 'SqueezeExcite')]
    with torch.no_grad():
        expected = source(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.double()(x.double()), source.double()(x.double()), rtol=0, atol=1e-10)
        for layer in sae_layers(model).values():
            layer.fc2.weight.neg_()
        assert (model(x.double()) - expected).abs().max() > 0.01  # the attention matters to these outputs


def test_lift_is_public_and_in_place():
    model = timm.create_model('mobilenetv3_small_050')
    assert timm_senetv2.lift(model) is model
    assert 'lift' in timm_senetv2.__all__


def test_lift_of_a_feature_extractor():
    x = images(size=64)
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


class OwnAct(nn.ReLU):
    pass


def accelerate_hook(module: nn.Module) -> None:
    """As accelerate's offloading does it."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def tie(model: nn.Module) -> None:
    model[1].fc1.weight = model[0].fc1.weight


def tie_memory(model: nn.Module) -> None:
    model[1].fc2.weight.data = model[0].fc2.weight.data


def tie_to_outside(model: nn.Module) -> None:
    model.add_module('other', nn.Conv2d(16, 8, 1))
    model.other.weight = model[1].fc1.weight


def share_a_layer(model: nn.Module) -> None:
    model[1].fc1 = model[0].fc1


def tie_within(model: nn.Module) -> None:
    model[1].fc1 = nn.Conv2d(16, 16, 1)
    model[1].fc2 = model[1].fc1


def replace_forward_around(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x: forward(x)


def drop_a_bias(model: nn.Module) -> None:
    model[1].fc2.bias = None


def drop_hidden_units(model: nn.Module) -> None:
    model[1].fc1.weight = nn.Parameter(model[1].fc1.weight[:3])


def replace_part(name: str, part) -> object:
    return lambda model: setattr(model[1], name, part() if callable(part) else part)


def hook(register: str, target: str):
    return lambda model: getattr(model.get_submodule(target), register)(lambda *args, **kwargs: None)


@pytest.mark.parametrize(
    ('alter', 'reason'),
    [
        *(
            (hook(register, target), 'has hooks')
            for register in (
                'register_forward_hook',
                'register_forward_pre_hook',
                'register_full_backward_hook',
                'register_full_backward_pre_hook',
                'register_state_dict_post_hook',
                'register_load_state_dict_pre_hook',
            )
            for target in ('1', '1.fc1', '1.act', '1.gate', '1.bn')
            if target != '1.bn' or register == 'register_forward_hook'
        ),
        *((lambda m, t=t: accelerate_hook(m.get_submodule(t)), 'forward') for t in ('1', '1.fc1', '1.act', '1.gate')),
        (lambda m: parametrizations.weight_norm(m[1].fc1), r'fc1 is a .*ParametrizedConv2d'),
        (
            lambda m: torch.nn.utils.parametrize.register_parametrization(m[1].fc2, 'bias', nn.Softplus()),
            'Parametrized',
        ),
        (lambda m: prune.l1_unstructured(m[1].fc1, 'weight', 0.5), 'fc1 has hooks'),
        (lambda m: m[1].fc1.weight.register_hook(torch.neg), 'fc1 has a weight whose gradient has hooks'),
        (lambda m: m[1].fc1.register_buffer('mask', torch.ones(1)), 'fc1 also holds mask'),
        (lambda m: m[1].register_parameter('scale', nn.Parameter(torch.ones(1))), 'it also holds scale'),
        (lambda m: m[1].add_module('lora', nn.Linear(2, 2)), 'it also holds lora'),
        (tie, '^0 .* fc1 shares its weights with another layer'),
        (tie_memory, '^0 .* fc2 shares its weights with another layer'),
        (tie_to_outside, '^1 .* fc1 shares its weights with another layer'),
        (share_a_layer, '^0 .* fc1 shares its weights with another layer'),
        (tie_within, '^1 .* fc1 shares its weights with another layer'),
        (replace_forward_around, '^0 .* the model has a forward that is not of its class'),
        (drop_a_bias, 'only its fc1 has a bias'),
        (drop_hidden_units, 'fc1 and fc2 do not belong together'),
        (lambda m: m[1].fc2.double(), 'differ in dtype'),
        (replace_part('fc1', lambda: nn.LazyConv2d(8, 1)), 'fc1 is a .*LazyConv2d'),
        (replace_part('fc1', lambda: nn.Conv2d(16, 8, 1, padding=1)), 'fc1 is not a plain 1x1 convolution'),
        (replace_part('fc1', lambda: nn.Conv2d(16, 8, 1, groups=2)), 'fc1 is not a plain 1x1 convolution'),
        (
            replace_part('fc1', lambda: torch.ao.nn.qat.Conv2d(16, 8, 1, qconfig=QCONFIG)),
            r'fc1 is a torch\.ao\..*Conv2d, not a plain',
        ),
        (replace_part('act', lambda: nn.PReLU(8)), 'act is a PReLU with a slope for each channel'),
        (replace_part('act', lambda: nn.Softmax(1)), 'act is a Softmax, of which it is not known'),
        (replace_part('act', nn.RReLU), 'act is a RReLU, of which it is not known'),
        (replace_part('act', OwnAct), 'act is a OwnAct, of which it is not known'),
        (replace_part('gate', lambda: nn.Softmax(1)), 'gate is a Softmax, of which it is not known'),
        (replace_part('bn', lambda: nn.BatchNorm2d(8)), 'a BatchNorm2d between its dense layers'),
    ],
)
def test_what_cannot_be_proved_equal_is_refused_and_the_model_unchanged(alter, reason):
    model = nn.Sequential(SEModule(16, rd_channels=8), SEModule(16, rd_channels=8))
    alter(model)
    modules, tensors = dict(model.named_modules()), {n: t.clone() for n, t in plain_tensors(model).items()}
    with pytest.raises(ValueError, match=f'(?s){reason}') as error:
        lift(model)
    assert 'cannot be lifted: ' in str(error.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensors[name], tensor) for name, tensor in plain_tensors(model).items())


def plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if not isinstance(p, nn.parameter.UninitializedParameter)}


def test_failure_in_the_middle_leaves_the_model_unchanged():
    class Stubborn(nn.Sequential):
        def __setattr__(self, name, value):
            if isinstance(value, SqueezeAggregatedExcitation):
                raise RuntimeError('no')
            super().__setattr__(name, value)

    model = nn.Sequential(SEModule(16), Stubborn(SEModule(16)))
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match='no'):
        lift(model)
    assert dict(model.named_modules()) == before


def test_prelu_with_one_slope_is_carried():
    source = randomize(timm.create_model('efficientnet_b0', act_layer='prelu'), images(4, 64))
    model = lift(copy.deepcopy(source)).double()
    x = images(size=64, dtype=torch.float64)
    torch.testing.assert_close(model(x), source.double()(x), rtol=0, atol=1e-10)
    slopes = [m for m in model.modules() if isinstance(m, nn.PReLU)]
    assert len(slopes) == len([m for m in source.modules() if isinstance(m, nn.PReLU)])


def test_hooks_of_accelerate_that_were_removed_are_no_obstacle():
    hooks = pytest.importorskip('accelerate.hooks')
    se = SEModule(16)
    for module in (se, se.fc1, se.act):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    with pytest.raises(ValueError, match='has a forward that is not of its class'):
        lift(se)
    hooks.remove_hook_from_module(se, recurse=True)
    x = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(lift(se)(x), se(x))


def test_parts_in_different_modes_keep_them():
    se = SEModule(16)
    se.fc1.eval()
    se.act.eval()
    layer = lift(se)
    assert layer.training and layer.fc2.training and not layer.fc1.training and not layer.act.training


def test_model_in_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(SEModule(16)))
        with pytest.raises(ValueError, match='wrapped in DistributedDataParallel'):
            lift(model)
        assert isinstance(model.module[0], SEModule)
    finally:
        torch.distributed.destroy_process_group()


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


def test_name_in_place_of_a_model_is_refused():
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, .* got 'seresnet18'"):
        lift('seresnet18')


@pytest.mark.parametrize('options', [dict(reduction=0), dict(cardinality=0), dict(cardinality=2.5)])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))} must be a whole number'):
        lift(SEModule(16), **options)
