"""The models in timm's factory: sizes, trunks, options, and the whole of timm's model API."""

import functools
import json
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import images
from timm.layers import DropPath, SEModule
from timm.models import FeatureDictNet, load_checkpoint, save_for_hf
from timm.optim import param_groups_layer_decay

from timm_senetv2.layers import ChannelAggregation, SqueezeAggregatedExcitation
from timm_senetv2.profile import on_meta
from timm_senetv2.registration import MODEL_MODULES

DEPTHS = (20, 32, 44, 56, 110)
TWINS = {  # the model of timm with the same trunk and SE in the place of SaE
    'senetv2_resnet18': 'seresnet18',
    'senetv2_resnet34': 'seresnet34',
    'senetv2_resnet50': 'seresnet50',
    'senetv2_resnet101': 'seresnet101',
    'senetv2_resnet152': 'seresnet152',
    'senetv2_resnet152d': 'seresnet152d',
    'senextv2_50': 'seresnext50_32x4d',
    'senextv2_26d_32x4d': 'seresnext26d_32x4d',
    'senextv2_26t_32x4d': 'seresnext26t_32x4d',
    'senextv2_101_32x4d': 'seresnext101_32x4d',
    'senextv2_101_32x8d': 'seresnext101_32x8d',
    'senextv2_101_64x4d': 'seresnext101_64x4d',
    'senextv2_101d_32x8d': 'seresnext101d_32x8d',
    'senextv2_aa101d_32x8d': 'seresnextaa101d_32x8d',
    'senextv2_aa201d_32x8d': 'seresnextaa201d_32x8d',
}
TRUNKS32 = {f'{f}{d}': d for f in ('cifar_resnet', 'cifar_seresnet', 'cifar_senetv2_resnet', 'seanet') for d in DEPTHS}
SMALL = ('small_cnn', 'small_secnn', 'small_saecnn')
ALL = (*TWINS, *TRUNKS32, *SMALL)
# One model of every kind, quick enough to run on real tensors
QUICK = (
    'small_saecnn',
    'cifar_resnet20',
    'cifar_senetv2_resnet20',
    'seanet20',
    'senetv2_resnet18',
    'senextv2_26t_32x4d',
)
all_models = pytest.mark.parametrize('name', ALL)
quick_models = pytest.mark.parametrize('name', QUICK)


@functools.cache
def shared(name):
    """The model on the meta device, for tests that only look at it."""
    return on_meta(name).eval()


NARROW = {'seanet20': dict(widths=(32, 64, 128))}  # at its own widths one forward of it takes as long as all others


# Two ways to compute the same differ in float32 by what the CPU's instructions and the number of threads decide
def float64_model(name, **kwargs):
    return timm.create_model(name, **NARROW.get(name, {}), **kwargs).double()


def float64_images(*args, **kwargs):
    return images(*args, dtype=torch.float64, **kwargs)


def count(model):
    return sum(p.numel() for p in model.parameters())


# ---- names and sizes


def test_the_registered_models_are_these():
    assert sorted(timm.list_models(module=MODEL_MODULES)) == sorted(ALL)


@pytest.mark.parametrize(
    'name, kwargs, parameters',
    [
        ('senetv2_resnet50', {}, 30_603_912),
        ('senextv2_50', {}, 30_075_784),
        ('seanet20', {}, 16_188_330),
        ('seanet20', dict(num_classes=100), 16_199_940),
        ('cifar_resnet20', {}, 272_474),
    ],
)
def test_published_parameter_counts(name, kwargs, parameters):
    assert count(on_meta(name, **kwargs)) == parameters


@pytest.mark.parametrize('classes', [1000, 100, 10, 0])
def test_sae_adds_the_published_parameters_to_resnet50(classes):
    plain, se, sae = (
        on_meta(name, num_classes=classes, **kwargs)
        for name, kwargs in (('resnet50', {}), ('senetv2_resnet50', dict(sae_cardinality=1)), ('senetv2_resnet50', {}))
    )
    assert count(sae) - count(plain) == 5_046_880
    assert count(se) - count(plain) == 1_273_048


@all_models
def test_default_number_of_classes_is_that_of_the_dataset(name):
    assert shared(name).num_classes == (1000 if name in TWINS else 10)


@pytest.mark.parametrize('name', SMALL)
def test_small_cnns_are_small_and_differ_by_their_attention(name):
    model = shared(name)
    assert count(model) < 200_000
    convs = [(3, 32), (32, 32), (32, 64), (64, 128)]
    trunk = sum(9 * i * o + 2 * o for i, o in convs) + 128 * 10 + 10
    c = dict(zip(SMALL, (0, 1, 4), strict=True))[name]
    assert count(model) == trunk + sum(2 * w * c * (w // 16) + c * (w // 16) + w for w in (32, 64, 128) if c)


def trunk32_parameters(depth, widths, cardinality, reduction, factor, after, classes=10):
    """By hand: convs without bias, two parameters a channel of each norm, SE or SaE, 1x1 shortcuts, the classifier."""
    n = (depth - 2) // 6
    total = 3 * 16 * 9 + 2 * 16
    width_in = 16
    for stage, width in enumerate(widths):
        for block in range(n):
            total += 9 * width_in * width + 2 * width + 9 * width * width + 2 * width
            if width_in != width or (stage > 0 and block == 0):
                total += width_in * width + 2 * width
            if cardinality:
                hidden = cardinality * max(1, width // reduction)
                total += 2 * width * hidden + hidden + width
            width_in = width // factor if after == 'block' or block == n - 1 else width
    return total + width_in * classes + classes


@pytest.mark.parametrize('name', TRUNKS32)
def test_parameters_of_32_pixel_trunks(name):
    family = name.rstrip('0123456789')
    expected = {
        'cifar_resnet': ((16, 32, 64), 0, 1, 1, 'stage'),
        'cifar_seresnet': ((16, 32, 64), 1, 16, 1, 'stage'),
        'cifar_senetv2_resnet': ((16, 32, 64), 4, 16, 1, 'stage'),
        'seanet': ((128, 256, 512), 1, 8, 4, 'stage'),
    }[family]
    assert count(shared(name)) == trunk32_parameters(TRUNKS32[name], *expected)


# ---- trunks


@pytest.mark.parametrize('name, twin', TWINS.items())
def test_trunk_is_that_of_timms_twin(name, twin):
    ours, theirs = shared(name), shared(twin)

    def tensors(model):
        return {k: v.shape for k, v in model.state_dict().items() if '.se.' not in k}

    def layers(model):  # all but the attention and the blocks that hold it: names, types and settings
        leaves = ((k, m) for k, m in model.named_modules() if not any(m.children()) and '.se.' not in k)
        return {k: repr(m) for k, m in leaves}

    assert tensors(ours) == tensors(theirs)
    assert layers(ours) == layers(theirs)
    attention = {k for k, m in ours.named_modules() if isinstance(m, SqueezeAggregatedExcitation)}
    assert attention == {k for k, _ in theirs.named_modules() if k.endswith('.se')}
    sae = sum(sum(p.numel() for p in m.parameters()) for k, m in ours.named_modules() if k in attention)
    widths = [m.fc2.out_features for k, m in ours.named_modules() if k in attention]
    assert sae == sum(2 * w * 4 * max(1, w // 32) + 4 * max(1, w // 32) + w for w in widths)


@pytest.mark.parametrize('name', ['senetv2_resnet18', 'senextv2_26t_32x4d'])
def test_one_branch_with_timms_weights_is_timms_twin(name):
    se = partial(SEModule, rd_ratio=1 / 8)  # at 1/16 timm rounds the hidden units of narrow layers
    theirs = float64_model(TWINS[name], num_classes=7, block_args=dict(attn_layer=se)).eval()
    ours = float64_model(name, num_classes=7, sae_cardinality=1, sae_reduction=8).eval()
    state = theirs.state_dict()
    ours.load_state_dict({k: v.flatten(1) if '.se.' in k and v.ndim == 4 else v for k, v in state.items()})
    x = float64_images(size=64)
    torch.testing.assert_close(ours(x), theirs(x))


def seanet_forward(state, x, n, op, after):
    """SEANet from its state dict in plain functions of torch, with the running statistics of its norms."""

    def norm(x, name):
        keys = ('running_mean', 'running_var', 'weight', 'bias')
        mean, var, weight, bias = (state[f'{name}.{k}'][:, None, None] for k in keys)
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def aggregate(x):
        groups = x.reshape(x.shape[0], x.shape[1] // 4, 4, *x.shape[2:])
        return groups.max(2).values if op == 'max' else groups.sum(2) / (4 if op == 'mean' else 1)

    x = norm(F.conv2d(x, state['conv1.weight'], padding=1), 'bn1').relu()
    for stage in (1, 2, 3):
        for block in range(n):
            p = f'layer{stage}.{block}'
            stride = 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, state[f'{p}.conv1.weight'], stride=stride, padding=1), f'{p}.bn1').relu()
            y = norm(F.conv2d(y, state[f'{p}.conv2.weight'], padding=1), f'{p}.bn2')
            hidden = (y.mean((2, 3)) @ state[f'{p}.se.fc1.weight'].T + state[f'{p}.se.fc1.bias']).relu()
            gate = (hidden @ state[f'{p}.se.fc2.weight'].T + state[f'{p}.se.fc2.bias']).sigmoid()
            y = y * gate[:, :, None, None]
            if f'{p}.downsample.0.weight' in state:
                x = norm(F.conv2d(x, state[f'{p}.downsample.0.weight'], stride=stride), f'{p}.downsample.1')
            x = (x + y).relu()
            if after == 'block' or block == n - 1:
                x = aggregate(x)
    return x.mean((2, 3)) @ state['fc.weight'].T + state['fc.bias']


@pytest.mark.parametrize('after', ['stage', 'block'])
@pytest.mark.parametrize('op', ['sum', 'mean', 'max'])
def test_seanet_equals_plain_functions(op, after):
    model = float64_model('seanet20', aggregation_op=op, aggregate_after=after).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # statistics that leave nothing to chance
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias, std=0.1)
    x = images(2, size=16, dtype=torch.float64)
    expected = seanet_forward(model.state_dict(), x, 3, op, after)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_seanet_state_dict_has_the_published_names():
    keys = set(timm.create_model('seanet20').state_dict())
    norm = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    expected = {'conv1.weight', 'fc.weight', 'fc.bias'} | {f'bn1.{k}' for k in norm}
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            p = f'layer{stage}.{block}'
            expected |= {f'{p}.conv{i}.weight' for i in (1, 2)} | {f'{p}.bn{i}.{k}' for i in (1, 2) for k in norm}
            expected |= {f'{p}.se.fc{i}.{k}' for i in (1, 2) for k in ('weight', 'bias')}
        expected |= {f'layer{stage}.0.downsample.0.weight'} | {f'layer{stage}.0.downsample.1.{k}' for k in norm}
    assert keys == expected


def test_initialisation_is_the_seanet_authors():
    model = timm.create_model('seanet20')
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()
        elif isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 10_000:
            fan_in = m.weight[0].numel()
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)


# ---- options


@pytest.mark.parametrize('after', ['stage', 'block'])
@pytest.mark.parametrize('factor', [1, 2, 8])
def test_aggregation_options_change_the_widths(factor, after):
    options = dict(aggregate_after=after, aggregation_op='max') if factor > 1 else {}
    model = on_meta('seanet32', aggregation_factor=factor, **options)
    assert count(model) == trunk32_parameters(32, (128, 256, 512), 1, 8, factor, after)
    assert model.num_features == 512 // factor
    layers = [m for m in model.modules() if isinstance(m, ChannelAggregation)]
    assert len(layers) == (0 if factor == 1 else 3 if after == 'stage' else 15)
    assert all(m.factor == factor and m.op == 'max' for m in layers)


@pytest.mark.parametrize('name', ['senetv2_resnet18', 'senextv2_26t_32x4d', 'cifar_senetv2_resnet20', 'small_saecnn'])
def test_sae_options_reach_every_layer(name):
    model = on_meta(name, sae_reduction=8, sae_cardinality=2, sae_add_identity=True)
    layers = [m for m in model.modules() if isinstance(m, SqueezeAggregatedExcitation)]
    assert layers
    for m in layers:
        assert (m.cardinality, m.rd_channels, m.add_identity) == (2, m.channels // 8, True)


def test_sae_options_give_and_take_attention_on_32_pixel_trunks():
    assert count(on_meta('cifar_resnet20', sae_cardinality=4)) == count(on_meta('cifar_senetv2_resnet20'))
    assert count(on_meta('cifar_senetv2_resnet20', sae_cardinality=0)) == count(on_meta('cifar_resnet20'))
    assert count(on_meta('small_cnn', sae_cardinality=1)) == count(on_meta('small_secnn'))
    assert not any(isinstance(m, SqueezeAggregatedExcitation) for m in on_meta('seanet20', sae_cardinality=0).modules())
    assert on_meta('small_cnn', sae_cardinality=2, sae_reduction=8).layer1.se.rd_channels == 4


@pytest.mark.parametrize('name', ['senetv2_resnet18', 'cifar_senetv2_resnet20', 'small_saecnn'])
def test_sae_without_biases(name):
    layers = [m for m in on_meta(name, sae_bias=False).modules() if isinstance(m, SqueezeAggregatedExcitation)]
    assert layers and all(m.fc1.bias is None and m.fc2.bias is None for m in layers)


@pytest.mark.parametrize(
    'name, kwargs, message',
    [
        ('seanet20', dict(aggregation_factor=0), 'aggregation_factor .* got 0'),
        ('seanet20', dict(aggregation_factor=-4), 'aggregation_factor .* got -4'),
        ('seanet20', dict(aggregation_factor=3), 'aggregation_factor .* got 3'),
        ('seanet20', dict(aggregation_op='median'), "aggregation_op .* got 'median'"),
        ('seanet20', dict(aggregate_after='layer'), "aggregate_after .* got 'layer'"),
        ('seanet20', dict(sae_reduction=0), 'sae_reduction .* got 0'),
        ('cifar_resnet20', dict(depth=21), 'depth .* got 21'),
        ('cifar_resnet20', dict(depth=2), 'depth .* got 2'),
        ('cifar_resnet20', dict(aggregation_op='median'), "aggregation_op .* got 'median'"),
        ('cifar_senetv2_resnet20', dict(sae_cardinality=-1), 'sae_cardinality .* got -1'),
        ('cifar_senetv2_resnet20', dict(sae_cardinality=1.5), 'sae_cardinality .* got 1.5'),
        ('small_saecnn', dict(sae_cardinality=-1), 'sae_cardinality .* at least 0, got -1'),
        ('small_saecnn', dict(sae_cardinality=True), 'sae_cardinality .* got True'),
        ('small_saecnn', dict(sae_reduction=-1), 'sae_reduction .* got -1'),
        ('senetv2_resnet50', dict(sae_reduction=0), 'sae_reduction .* got 0'),
        ('senextv2_50', dict(sae_cardinality='4'), "sae_cardinality .* got '4'"),
        ('senextv2_50', dict(sae_cardinality=0), 'sae_cardinality .* got 0'),
        ('senextv2_50', dict(sae_add_identity='False'), "sae_add_identity must be True or False, got 'False'"),
        ('small_secnn', dict(sae_bias=1), 'sae_bias must be True or False, got 1'),
        ('cifar_resnet20', dict(sae_reduction=8), 'sae_reduction=8 has no meaning .* without attention'),
        ('cifar_resnet20', dict(sae_reduction=16), 'sae_reduction=16 has no meaning .* set sae_cardinality'),
        ('cifar_resnet20', dict(sae_add_identity=False), 'sae_add_identity=False has no meaning'),
        ('small_cnn', dict(sae_reduction=8), 'sae_reduction=8 has no meaning'),
        ('small_cnn', dict(sae_bias=False), 'sae_bias=False has no meaning'),
        ('seanet20', dict(sae_cardinality=0, sae_reduction=8), 'sae_reduction=8 has no meaning'),
        ('cifar_resnet20', dict(aggregation_op='max'), "aggregation_op='max' has no meaning .* without aggregation"),
        ('cifar_senetv2_resnet20', dict(aggregate_after='block'), "aggregate_after='block' has no meaning .* set aggr"),
        ('seanet20', dict(aggregation_factor=1, aggregation_op='sum'), "aggregation_op='sum' has no meaning"),
    ],
)
def test_bad_options_raise_naming_argument_and_value(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        on_meta(name, **kwargs)


@all_models
def test_unknown_arguments_raise_a_type_error(name):
    with pytest.raises(TypeError, match='sae_cardinalty'):
        on_meta(name, sae_cardinalty=4)


# ---- timm's model API


@all_models
def test_feature_channels_and_reductions_are_those_of_the_outputs(name):
    model = on_meta(name, features_only=True).eval()
    size = 64 if name in TWINS else 32
    with torch.no_grad():
        outputs = model(images(size=size, device='meta'))
    assert [o.shape[1] for o in outputs] == model.feature_info.channels()
    assert [size // o.shape[2] for o in outputs] == model.feature_info.reduction()
    assert model.feature_info.reduction() == ([2, 4, 8, 16, 32] if name in TWINS else [1, 1, 2, 4])


@all_models
def test_features_and_head_have_the_sizes_the_model_states(name, monkeypatch):
    model = shared(name)
    cfg = model.pretrained_cfg
    x = torch.randn(2, *cfg['input_size'], device='meta')
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, *cfg['pool_size'])
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model.forward_head(features).shape == (2, model.num_classes)
        monkeypatch.setattr(model, 'forward_features', lambda x: features)  # most of the time of a forward
        assert model(x).shape == (2, model.num_classes)
    assert model.get_classifier() is model.get_submodule(cfg['classifier'])
    assert model.get_classifier().in_features == model.head_hidden_size
    assert model.get_submodule(cfg['first_conv']).in_channels == 3


@quick_models
def test_head_after_features_is_the_forward(name):
    model, x = float64_model(name).eval(), float64_images()
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))


@quick_models
def test_intermediates_equal_features_only(name):
    model = float64_model(name).eval()
    features = float64_model(name, features_only=True).eval()
    features.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('fc.')})
    x = float64_images()
    expected = features(x)
    final, intermediates = model.forward_intermediates(x)
    assert len(intermediates) == len(expected)
    for a, b in zip(intermediates, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(final, model.forward_features(x))
    last = len(expected) - 1
    for indices, kept in ((1, [last]), (2, [last - 1, last]), ([0, 2], [0, 2]), ([-1], [last])):
        some = model.forward_intermediates(x, indices=indices, intermediates_only=True, stop_early=True)
        assert len(some) == len(kept)
        for a, i in zip(some, kept, strict=True):
            torch.testing.assert_close(a, expected[i])


@pytest.mark.parametrize('name', ['senetv2_resnet18', 'cifar_senetv2_resnet20', 'seanet20', 'small_saecnn'])
def test_feature_cfg_of_the_caller_is_taken(name):
    given = dict(feature_cls='dict', out_indices=(0, 2))
    model = on_meta(name, features_only=True, feature_cfg=dict(given)).eval()
    assert type(model) is FeatureDictNet
    assert model.feature_info.out_indices == (0, 2)
    default = on_meta(name, features_only=True, feature_cfg=dict(feature_cls='getter'))
    count = len(default.feature_info.out_indices)
    assert type(default).__name__ == 'FeatureGetterNet' and count == (5 if name in TWINS else 4)
    x = images(device='meta')
    shapes = [f.shape for f in on_meta(name).forward_intermediates(x, intermediates_only=True)]
    assert [f.shape for f in model(x).values()] == [shapes[0], shapes[2]]
    assert [f.shape for f in default(x)] == shapes


@pytest.mark.parametrize('indices', [0, 5, [4], [-5], []])
def test_bad_intermediate_indices_raise(indices):
    with pytest.raises(ValueError, match='indices .* got'):
        on_meta('cifar_resnet20').forward_intermediates(images(device='meta'), indices=indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        on_meta('cifar_resnet20').forward_intermediates(images(device='meta'), output_fmt='NLC')


@quick_models
def test_pruned_model_keeps_its_intermediates_and_drops_the_rest(name):
    x = float64_images()
    model = float64_model(name).eval()
    expected = model.forward_intermediates(x, intermediates_only=True)
    state = model.state_dict()
    whole = count(model)
    for index in range(len(expected)):
        pruned = float64_model(name).eval()
        pruned.load_state_dict(state)
        pruned.set_grad_checkpointing()
        assert pruned.prune_intermediate_layers([index]) == [index]
        torch.testing.assert_close(
            pruned.forward_intermediates(x, indices=[index], intermediates_only=True)[0], expected[index]
        )
        torch.testing.assert_close(pruned.forward_features(x), expected[index])
        assert count(pruned) < whole
    model.prune_intermediate_layers([len(expected) - 1], prune_head=False)
    assert count(model) == whole


@quick_models
def test_reset_classifier(name):
    model, x = float64_model(name).eval(), float64_images()
    features = model.forward_features(x)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(5, 'max')
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(3)  # keeps the pooling
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize('name', ['small_saecnn', 'seanet20', 'senetv2_resnet18'])
@pytest.mark.parametrize('global_pool', ['avg', 'max', 'avgmax', 'catavgmax', ''])
def test_global_pool(name, global_pool):
    model = float64_model(name, global_pool=global_pool, num_classes=0 if global_pool == '' else 4).eval()
    x = float64_images()
    features = model.forward_features(x)
    mean, maximum = features.mean((2, 3)), features.amax((2, 3))
    expected = {
        'avg': mean,
        'max': maximum,
        'avgmax': (mean + maximum) / 2,
        'catavgmax': torch.cat([mean, maximum], 1),
        '': features,
    }[global_pool]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
    assert model.head_hidden_size == expected.shape[1]
    assert model(x).shape[1] == (4 if global_pool else model.num_features)


@all_models
def test_group_matcher_decays_the_learning_rate_layer_by_layer(name):
    model = shared(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {}
    parameter_names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for p in group['params']:
            assert parameter_names[id(p)] not in scales
            scales[parameter_names[id(p)]] = group['lr_scale']
    assert scales.keys() == set(parameter_names.values())
    assert scales['fc.weight'] == 1
    first_conv = model.pretrained_cfg['first_conv'] + '.weight'
    assert scales[first_conv] == min(scales.values())
    stages = [[v for k, v in scales.items() if k.startswith(f'layer{i}.')] for i in (1, 2, 3)]
    assert max(stages[0]) < min(stages[1]) and max(stages[1]) < min(stages[2]) < 1
    n_blocks = sum(
        1 for k, _ in model.named_modules() if k.startswith('layer') and k.count('.') == 1 and k.split('.')[1].isdigit()
    )
    # stem, a group for each block (in the small CNN for each stage), the classifier
    assert len(set(scales.values())) == 2 + (n_blocks or 3)


@quick_models
def test_grad_checkpointing_changes_neither_outputs_nor_gradients(name):
    x = float64_images(4)
    runs = []
    state = float64_model(name).state_dict()
    for enable in (False, True):
        model = float64_model(name).train()
        model.load_state_dict(state)
        model.set_grad_checkpointing(enable)
        y = model(x)
        y.square().mean().backward()
        runs.append((y, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(runs[1][0], runs[0][0])
    assert all(g is not None for g in runs[0][1].values())
    for n, gradient in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][n], gradient, msg=n)


@quick_models
@pytest.mark.parametrize('in_chans', [1, 4])
def test_in_chans(name, in_chans):
    model = timm.create_model(name, in_chans=in_chans).eval()
    assert model.in_chans == in_chans
    assert model(images(channels=in_chans)).shape == (2, model.num_classes)


@quick_models
def test_drop_rate_drops_in_training_only(name):
    model = float64_model(name, drop_rate=0.5, num_classes=0).eval()
    plain = float64_model(name, num_classes=0).eval()
    plain.load_state_dict(model.state_dict())
    x = float64_images()
    torch.testing.assert_close(model(x), plain(x))
    features = model.forward_features(x)
    model.train()
    dropped = model.forward_head(features, pre_logits=True)
    pooled = features.mean((2, 3))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (pooled / 0.5)[kept])
    share = (~kept & (pooled != 0)).sum() / (pooled != 0).sum()
    assert 0.3 < share < 0.7


@pytest.mark.parametrize('name', ['cifar_resnet20', 'cifar_senetv2_resnet20', 'seanet20', 'senetv2_resnet18'])
def test_drop_path_rises_linearly_and_acts_in_training_only(name):
    model = float64_model(name, drop_path_rate=0.4).eval()
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    blocks = 8 if name == 'senetv2_resnet18' else 9
    expected = [0.4 * i / (blocks - 1) for i in range(1, blocks)]
    assert rates == pytest.approx(expected)
    plain = float64_model(name).eval()
    plain.load_state_dict(model.state_dict())
    x = float64_images(8)
    torch.testing.assert_close(model(x), plain(x))
    model.train()
    for p in model.parameters():  # timm zeroes the last norm of each branch: let the branches differ from nothing
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    assert not torch.allclose(model(x), model(x))


@quick_models
def test_dropping_every_branch_leaves_the_shortcuts(name):
    if name == 'small_saecnn':
        with pytest.raises(TypeError, match='drop_path_rate'):  # no residual branches to drop
            timm.create_model(name, drop_path_rate=0.1)
        return
    model = timm.create_model(name, drop_path_rate=0.1).train()
    block = next(
        m for m in model.modules() if isinstance(getattr(m, 'drop_path', None), DropPath) and m.downsample is None
    )
    block.drop_path.drop_prob = 1.0
    width = block.conv1.in_channels
    x = torch.rand(2, width, 8, 8)
    torch.testing.assert_close(block(x), x)


@all_models
def test_meta_construction_puts_everything_on_meta(name):
    model = timm.create_model(name, device='meta', dtype=torch.bfloat16)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == 'meta', key
        assert tensor.dtype == (torch.int64 if key.endswith('num_batches_tracked') else torch.bfloat16), key


@quick_models
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtype_construction(name, dtype):
    model = timm.create_model(name, dtype=dtype, **NARROW.get(name, {})).eval()
    y = model(images(dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()


@quick_models
def test_channels_last_is_kept_through_the_trunk(name):
    model = float64_model(name).eval()
    x = float64_images(size=64)
    expected = model.forward_features(x)
    model.to(memory_format=torch.channels_last)
    actual = model.forward_features(x.to(memory_format=torch.channels_last))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, check_stride=False)


@quick_models
def test_empty_batch(name):
    model = timm.create_model(name).eval()
    assert model(images(0)).shape == (0, model.num_classes)


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('small_saecnn', {}),
        pytest.param('cifar_senetv2_resnet20', dict(depth=8), marks=pytest.mark.slow),  # the trunk of the next
        ('seanet20', dict(depth=8)),
        ('senextv2_26t_32x4d', dict(layers=(1, 1, 1, 1))),
    ],
)
def test_compile_fullgraph_and_export_with_a_dynamic_batch(name, kwargs):
    """Of few blocks each: a graph takes its time for every one."""
    model, x = float64_model(name, **kwargs).eval(), float64_images(3)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (float64_images(2),), dynamic_shapes=({0: torch.export.Dim('batch')},))
        torch.testing.assert_close(program.module()(x), expected)


# ---- checkpoints


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('small_cnn', dict(num_classes=5)),
        ('small_saecnn', dict(sae_cardinality=2, sae_reduction=8, sae_add_identity=True, widths=(8, 16, 32))),
        ('cifar_resnet20', dict(num_classes=100, depth=14, global_pool='avgmax')),
        ('cifar_seresnet20', dict(sae_reduction=4, in_chans=1)),
        ('cifar_senetv2_resnet20', dict(sae_cardinality=8, sae_add_identity=True, drop_path_rate=0.1)),
        ('seanet20', dict(aggregation_factor=2, aggregation_op='max', aggregate_after='block', widths=(16, 32, 64))),
        ('senetv2_resnet18', dict(sae_reduction=16, sae_cardinality=2, sae_add_identity=True, num_classes=11)),
        ('senextv2_26t_32x4d', dict(sae_reduction=8, sae_cardinality=1, num_classes=3, drop_rate=0.2)),
    ],
)
def test_saved_checkpoint_rebuilds_itself_with_equal_logits(name, kwargs, tmp_path):
    model = timm.create_model(name, **kwargs).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
    folder = tmp_path / 'checkpoint'
    save_for_hf(model, folder, safe_serialization=True)
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = images(channels=kwargs.get('in_chans', 3))
    assert torch.equal(again(x), model(x))
    # and into a model of a different head, as for fine-tuning
    other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=2).eval()
    torch.testing.assert_close(other.forward_features(x), model.forward_features(x))
    assert other(x).shape == (2, 2)


@pytest.mark.parametrize(
    ('name', 'recorded'),
    [
        ('cifar_resnet20', dict(sae_reduction=8, sae_add_identity=False, aggregation_op='max')),
        ('small_cnn', dict(sae_reduction=8)),
        ('seanet20', dict(sae_cardinality=0, sae_reduction=4)),
    ],
)
def test_checkpoint_that_records_options_without_meaning_loads(name, recorded, tmp_path):
    """As versions before these were refused have written them."""
    model = timm.create_model(name, **({'sae_cardinality': 0} if 'sae_cardinality' in recorded else {})).eval()
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=recorded)
    assert recorded.items() <= json.loads((tmp_path / 'config.json').read_text())['model_args'].items()
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images()
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match='sae_reduction=2 has no meaning'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, sae_reduction=2)


def test_saved_weights_load_by_path(tmp_path):
    model = timm.create_model('cifar_senetv2_resnet20').eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model('cifar_senetv2_resnet20').eval()
    load_checkpoint(again, str(tmp_path / 'model.safetensors'))
    x = images()
    assert torch.equal(again(x), model(x))
