"""The pretrained tags and the lift of SE weights into SaE while a checkpoint is loaded."""

import copy
import csv
import dataclasses
import functools
import json
import re
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from networks import images, sae_layers
from timm.layers import BatchNormAct2d, SEModule
from timm.models import get_pretrained_cfg, save_for_hf
from timm.models.resnet import BasicBlock, Bottleneck

from experiments.randomize import randomize
from timm_senetv2.models import pretrained
from timm_senetv2.models.pretrained import lifted_cfgs, shipped_cfgs


def rows_of(table: str) -> list[dict[str, str]]:
    with (Path(__file__).parents[1] / 'timm_senetv2' / 'weights' / table).open(newline='') as f:
        return list(csv.DictReader(f))


def sources(kind: str, rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((kind, row['model'], row['source_on_the_hub'].removeprefix('timm/')) for row in rows))


ROWS = {'se': rows_of('lift_sources.csv'), 'plain': rows_of('plain_sources.csv')}
SOURCES = [source for kind, rows in ROWS.items() for source in sources(kind, rows)]
ARCHITECTURES = dict(sorted((model, source.split('.')[0]) for kind, model, source in SOURCES if kind == 'se'))
PLAIN = dict(sorted((model, source.split('.')[0]) for kind, model, source in SOURCES if kind == 'plain'))
QUICK = ('senetv2_resnet50', 'senextv2_26t_32x4d')
QUICK_PLAIN = (('senetv2_resnet18', {}), ('senetv2_resnet50', dict(layers=(2, 1, 1, 2))))


def tag(kind: str, model: str, source: str) -> str:
    return f'{model}.{kind}_{source.split(".")[1]}'


def se_source(name: str, **kwargs) -> torch.nn.Module:
    model = timm.create_model(name, **kwargs)
    weight = next(model.parameters())
    # small scales, as training gives them to residual branches: with scales of 1, 200 layers amplify rounding past 1e-4
    return randomize(model, images(8, 96, weight.shape[1], dtype=weight.dtype), scales=(0.1, 0.5))


@pytest.fixture(scope='module')
def seresnet18() -> torch.nn.Module:
    return se_source('seresnet18')


@functools.cache
def fresh_weights(name: str) -> dict[str, torch.Tensor]:
    """Weights to leave as they are."""
    return timm.create_model(name).state_dict()


def lifted(name: str, source: torch.nn.Module, **kwargs) -> torch.nn.Module:
    """The model with the source's weights loaded as timm loads those of a file or of the Hub."""
    overlay = dict(state_dict=source.state_dict(), **kwargs.pop('overlay', {}))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


# ---- the tags


def test_every_source_is_a_tag_that_timm_lists():
    assert len(SOURCES) == len(sources('se', ROWS['se'])) + 69
    assert {tag(*source) for source in SOURCES} == set(timm.list_pretrained('sene*v2_*'))


@pytest.mark.parametrize('model', {**ARCHITECTURES, **PLAIN})
def test_default_tag_is_the_best_source_that_may_be_used_commercially(model):
    kind = 'se' if model in ARCHITECTURES else 'plain'
    rows = [row for row in ROWS[kind] if row['model'] == model and row.get('license') != 'cc-by-nc-4.0']
    best = max(rows, key=lambda row: float(row['top1']))
    default = get_pretrained_cfg(model)
    assert default.hf_hub_id == best['source_on_the_hub']
    assert default.tag == f'{kind}_{best["source_on_the_hub"].split(".")[1]}'
    assert timm.is_model_pretrained(model)


@pytest.mark.parametrize('row', ROWS['plain'], ids=lambda row: row['source_on_the_hub'])
def test_license_is_that_of_the_source(row):
    name = row['source_on_the_hub'].removeprefix('timm/')
    assert get_pretrained_cfg(tag('plain', row['model'], name)).license == row['license']
    assert row['license'] in ('apache-2.0', 'bsd-3-clause', 'cc-by-nc-4.0')


@pytest.mark.parametrize(('kind', 'model', 'source'), SOURCES)
def test_config_is_that_of_the_source(kind, model, source):
    ours, theirs = get_pretrained_cfg(tag(kind, model, source)), get_pretrained_cfg(source)
    assert ours.hf_hub_id == f'timm/{source}'
    assert (ours.architecture, ours.tag) == (model, f'{kind}_{source.split(".")[1]}')
    assert dataclasses.replace(ours, architecture=None, tag=None) == dataclasses.replace(
        theirs, architecture=None, tag=None
    )


def test_source_that_timm_lacks_is_left_out():
    names = ('seresnet50.no_such_tag', 'no_such_model.x', 'seresnet18.untrained', 'seresnet50.a1_in1k')
    cfgs = lifted_cfgs('se', {'a': names})
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
    x = images(size=96, dtype=dtype)
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
    source = randomize(timm.create_model('seresnext26d_32x4d'), images(8, 96))
    model = lifted('senextv2_26d_32x4d', source).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # images of different colours, as a data set has them: a ReLU that is off for a whole batch would get no gradient
    batch = images(32, 32) + 2 * torch.randn(32, 3, 1, 1)
    torch.nn.functional.cross_entropy(model(batch), torch.arange(32)).backward()
    optimizer.step()
    for name, layer in sae_layers(model).items():
        fresh = layer.fc2.weight[:, source.get_submodule(name).fc1.out_channels :]
        assert fresh.shape[1] and fresh.any(0).all(), name


# ---- sources without attention


def plain_source(name: str, size: int = 64, **kwargs) -> torch.nn.Module:
    model = timm.create_model(name, **kwargs)
    weight = next(model.parameters())
    return randomize(model, images(4, size, weight.shape[1], dtype=weight.dtype), scales=(0.1, 0.5))


def plain_tag(model: str) -> str:
    return next(tag(*source) for source in SOURCES if source[:2] == ('plain', model))


def from_plain(model: str, file: Path, **kwargs) -> torch.nn.Module:
    return timm.create_model(plain_tag(model), pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs)


def saved(model: torch.nn.Module, folder: Path) -> Path:
    safetensors.torch.save_file(model.state_dict(), folder / 'source.safetensors')
    return folder / 'source.safetensors'


def with_timms_blocks(model: torch.nn.Module) -> torch.nn.Module:
    """The same parameters, computed by timm's own forward."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            block.__class__ = BasicBlock if isinstance(block, BasicBlock) else Bottleneck
    return model


def loss_of_a_training_step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss = torch.nn.functional.cross_entropy(model.train()(x), torch.arange(len(x)))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return loss.detach()


@pytest.mark.parametrize(
    'model, options',
    [
        *QUICK_PLAIN,
        *(pytest.param(model, {}, marks=pytest.mark.slow) for model in PLAIN if (model, {}) not in QUICK_PLAIN),
    ],
)
def test_plain_source_with_idle_attention_computes_the_same(model, options, tmp_path):
    source = plain_source(PLAIN[model], **options)
    ours = from_plain(model, saved(source, tmp_path), **options).eval()
    theirs = with_timms_blocks(ours)
    x = images(2, 64)
    with torch.no_grad():
        expected = source(x)
        assert torch.equal(theirs(x), expected)
        active = copy.deepcopy(theirs)
        for layer in sae_layers(active).values():
            layer.fc2.bias.add_(1)
        assert (active(x) - expected).abs().max() > 1e-2 * expected.abs().max()  # the gates matter to these logits
        difference = (ours(x) - expected).abs().max() / expected.abs().max()
        print(
            f'{model}: through its own blocks its logits differ by {difference:.1e} of the largest in single precision'
        )

    in_double, x_in_double = copy.deepcopy(source).double(), x.double()
    ours.double()
    with torch.no_grad():
        expected = in_double(x_in_double)
        assert (ours(x_in_double) - expected).abs().max() <= 1e-10 * expected.abs().max()
    expected = loss_of_a_training_step(in_double, x_in_double)
    torch.testing.assert_close(loss_of_a_training_step(ours, x_in_double), expected, rtol=1e-8, atol=0)
    assert torch.equal(loss_of_a_training_step(theirs, x), loss_of_a_training_step(source, x))
    for trained in (theirs, ours):
        for name, layer in sae_layers(trained).items():
            assert layer.fc2.weight.any() and layer.fc2.bias.any(), name
    statistics = {key: tensor for key, tensor in source.state_dict().items() if 'running' in key or 'num_b' in key}
    assert statistics
    for key, tensor in statistics.items():
        assert torch.equal(theirs.state_dict()[key], tensor), key


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_plain_source_in_other_dtypes(dtype, tmp_path):
    source = plain_source('resnet18', dtype=dtype)
    ours = with_timms_blocks(from_plain('senetv2_resnet18', saved(source, tmp_path), dtype=dtype)).eval()
    x = images(2, 64, dtype=dtype)
    assert torch.equal(ours(x), source(x))


def test_plain_source_is_rounded_to_half_precision_before_it_is_doubled(tmp_path):
    source = plain_source('resnet18')
    with torch.no_grad():
        source.layer2[0].bn2.weight.copy_(torch.linspace(1e-6, 4e-5, 128))  # float16 has few digits down there
    ours = from_plain('senetv2_resnet18', saved(source, tmp_path), dtype=torch.float16)
    assert torch.equal(ours.layer2[0].bn2.weight, 2 * source.layer2[0].bn2.weight.half())


def test_plain_source_too_large_to_be_doubled_is_refused_in_half_precision_alone(tmp_path):
    source = plain_source('resnet18').half()
    source.layer2[1].bn2.weight.data[3] = 40_000  # float16 ends at 65,504
    file = saved(source, tmp_path)
    message = r'layer2.1.bn2.weight holds values whose double overflows in float16.*; build the model in float32$'
    with pytest.raises(RuntimeError, match=message):
        from_plain('senetv2_resnet18', file, dtype=torch.float16)
    assert from_plain('senetv2_resnet18', file).layer2[1].bn2.weight[3] == 80_000
    source.float().layer2[1].bn2.weight.data[3] = 2e38
    with pytest.raises(RuntimeError, match='overflows in float32, and weights without .* to start with it$'):
        from_plain('senetv2_resnet18', saved(source, tmp_path))


@pytest.mark.parametrize('num_classes', [1000, 7])
@pytest.mark.parametrize(
    ('source', 'key'),
    [('resnet18', 'layer1.0.bn2.weight'), ('resnet18', 'epoch'), ('seresnet18', 'layer1.0.se.fc1.weight')],
)
def test_entry_that_is_no_tensor_is_refused_by_its_name(source, key, num_classes):
    state = {**fresh_weights(source), key: 3}
    with pytest.raises(RuntimeError, match=f'^{re.escape(key)} is of type int, and weights are tensors$'):
        timm.create_model(
            'senetv2_resnet18',
            pretrained=True,
            pretrained_cfg_overlay=dict(state_dict=state, tag='plain_a'),
            num_classes=num_classes,
        )


def test_idle_attention_keeps_fresh_first_layers_and_doubles_the_last_norms(tmp_path):
    source = plain_source('resnet50')
    torch.manual_seed(1)
    fresh = timm.create_model('senetv2_resnet50.untrained')
    torch.manual_seed(1)
    ours = from_plain('senetv2_resnet50', saved(source, tmp_path))
    for name, layer in sae_layers(ours).items():
        initial = fresh.get_submodule(name)
        assert torch.equal(layer.fc1.weight, initial.fc1.weight) and torch.equal(layer.fc1.bias, initial.fc1.bias)
        assert not layer.fc2.weight.any() and not layer.fc2.bias.any()
    for key, tensor in source.state_dict().items():
        factor = 2 if re.fullmatch(r'layer\d\.\d+\.bn3\.(weight|bias)', key) else 1
        assert torch.equal(ours.state_dict()[key], factor * tensor), key


@pytest.fixture(scope='module')
def resnet18(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    source = plain_source('resnet18')
    return source, saved(source, tmp_path_factory.mktemp('resnet18'))


@pytest.mark.parametrize(
    'sizes', [dict(sae_cardinality=8), dict(sae_reduction=8), dict(sae_cardinality=1), dict(sae_bias=False)]
)
def test_plain_source_into_other_sizes(sizes, resnet18):
    source, file = resnet18
    x = images(2, 64)
    assert torch.equal(with_timms_blocks(from_plain('senetv2_resnet18', file, **sizes)).eval()(x), source(x))


def test_classifier_that_timm_drops_may_be_anything(resnet18):
    state = {**resnet18[0].state_dict(), 'fc.weight': None, 'fc.bias': None}
    overlay = dict(state_dict=state, tag='plain_a')
    model = timm.create_model('senetv2_resnet18', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert torch.equal(model.conv1.weight, state['conv1.weight'])


@pytest.mark.parametrize('num_classes', [7, 0])
def test_plain_source_with_another_classifier(num_classes, resnet18):
    source, file = resnet18
    ours = with_timms_blocks(from_plain('senetv2_resnet18', file, num_classes=num_classes)).eval()
    x = images(2, 64)
    assert torch.equal(ours.forward_features(x), source.forward_features(x))
    assert ours(x).shape == (2, num_classes or 512)


def test_plain_source_with_one_input_channel_equals_timms_own_adaptation(resnet18):
    _, file = resnet18
    gray = timm.create_model(
        'resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), in_chans=1
    ).eval()
    x = images(2, 64, channels=1)
    assert torch.equal(with_timms_blocks(from_plain('senetv2_resnet18', file, in_chans=1)).eval()(x), gray(x))


def test_plain_source_with_features_only(resnet18):
    source, file = resnet18
    features = with_timms_blocks(from_plain('senetv2_resnet18', file, features_only=True)).eval()
    x = images(2, 64)
    for actual, expected in zip(features(x), source.forward_intermediates(x)[1], strict=True):
        assert torch.equal(actual, expected)


def test_plain_source_into_add_identity_is_refused(resnet18):
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc2\.weight is missing, and .* add_identity.* 3/2'):
        from_plain('senetv2_resnet18', resnet18[1], sae_add_identity=True)


@pytest.mark.parametrize('num_classes', [1000, 7])
@pytest.mark.parametrize(
    ('rename', 'message'),
    [
        ({'layer2.0.bn2.weight': None}, r'^layer2\.0\.bn2\.weight is missing'),
        ({'layer2.0.bn2.weight': 'layer2.0.norm.weight'}, r'^layer2\.0\.norm\.weight, of shape \(128,\), has no place'),
        ({'layer4.1.conv2.weight': 'layer4.1.attention.weight'}, r'^layer4\.1\.attention\.weight, of shape'),
    ],
)
def test_plain_weights_of_another_architecture_are_refused(rename, message, num_classes, resnet18):
    state = {rename.get(key, key): tensor for key, tensor in resnet18[0].state_dict().items()}
    state.pop(None, None)
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(
            'senetv2_resnet18.plain_a1_in1k',
            pretrained=True,
            pretrained_cfg_overlay=dict(state_dict=state),
            num_classes=num_classes,
        )


def test_norm_that_is_more_than_affine_is_refused(resnet18):
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc2\.weight is missing, .* affine norm'):
        from_plain('senetv2_resnet18', resnet18[1], norm_layer=BatchNormAct2d)


def test_fine_tuned_model_keeps_its_plain_tag_and_loads(resnet18, tmp_path):
    model = from_plain('senetv2_resnet18', resnet18[1])
    loss_of_a_training_step(model, images(4, 64))
    save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['pretrained_cfg']['tag'] == plain_tag('senetv2_resnet18').split('.')[1]
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(2, 64)
    assert torch.equal(again(x), model(x))


def test_plain_tag_of_a_saved_config_is_enough(resnet18, tmp_path):
    source, file = resnet18
    save_for_hf(from_plain('senetv2_resnet18', file), tmp_path, safe_serialization=True)
    cfg = json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
    model = timm.create_model('senetv2_resnet18', pretrained=True, pretrained_cfg=dict(cfg, file=str(file)))
    x = images(2, 64)
    assert torch.equal(with_timms_blocks(model).eval()(x), source(x))


# ---- with timm's options


def test_lift_with_other_classes_keeps_the_features(seresnet18):
    source = seresnet18
    target = lifted('senetv2_resnet18', source, num_classes=7)
    x = images(size=96)
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
    x = images(size=96, channels=1)
    torch.testing.assert_close(lifted(model, source, in_chans=1)(x), gray(x), rtol=0, atol=1e-4)


def test_lift_with_features_only(seresnet18):
    source = seresnet18
    features = lifted('senetv2_resnet18', source, features_only=True)
    x = images(size=96)
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
    x = images(size=96)
    torch.testing.assert_close(lifted('senetv2_resnet18', source, **sizes)(x), source(x), rtol=0, atol=1e-4)


def test_any_number_of_hidden_units_that_fits_is_lifted():
    source = se_source('seresnet34', block_args=dict(attn_layer=partial(SEModule, rd_channels=7)))
    x = images(size=96)
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
@pytest.mark.parametrize('name', ['senetv2_resnet18.untrained', 'senetv2_resnet50', 'cifar_senetv2_resnet20'])
def test_weights_without_attention_are_refused_even_where_timm_loads_loosely(name, num_classes):
    plain = {key: t for key, t in fresh_weights(name).items() if '.se.' not in key}
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc1\.weight is missing; its shape in this layer is'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=plain), num_classes=num_classes)


@pytest.mark.parametrize('kind', ['se_a', 'plain_a'])
@pytest.mark.parametrize('num_classes', [1000, 7])
@pytest.mark.parametrize(
    ('lost', 'missing'),
    [
        (r'layer1\.1\.se\.fc[12]\.bias', 'layer1.1.se.fc1.bias'),  # native weights that lost biases
        (r'layer\d\.\d\.se\.fc[12]\.bias', 'layer1.0.se.fc1.bias'),
        (r'layer[34]\.\d\.se\..*', 'layer3.0.se.fc1.weight'),
        (r'layer1\.0\.se\.fc1\..*', 'layer1.0.se.fc1.weight'),
        (r'layer2\.0\.se\.fc2\.weight', 'layer2.0.se.fc2.weight'),
    ],
)
@pytest.mark.parametrize('source', ['senetv2_resnet18', 'seresnet18'])
def test_missing_attention_weights_are_refused_by_the_first_name(source, lost, missing, num_classes, kind):
    state = fresh_weights(source)
    kept = {key: tensor for key, tensor in state.items() if not re.fullmatch(lost, key)}
    assert len(kept) < len(state)
    with pytest.raises(RuntimeError, match=rf'^{re.escape(missing)} is missing'):
        timm.create_model(
            'senetv2_resnet18',
            pretrained=True,
            pretrained_cfg_overlay=dict(state_dict=kept, tag=kind),
            num_classes=num_classes,
        )


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


def test_attention_without_biases_is_lifted_where_the_architecture_has_none():
    source = se_source('seresnet18', block_args=dict(attn_layer=partial(SEModule, bias=False)))
    x = images(size=96)
    target = lifted('senetv2_resnet18', source, sae_bias=False)
    assert not [name for name, _ in target.named_parameters() if '.se.' in name and name.endswith('bias')]
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc1\.bias is missing; .* \(8,\)'):
        lifted('senetv2_resnet18', source)


def test_biases_without_a_place_are_refused():
    with pytest.raises(RuntimeError, match=r'^layer1\.0\.se\.fc1\.bias, of shape \(8,\), .*'):
        lifted('senetv2_resnet18', timm.create_model('seresnet18'), sae_bias=False)


# ---- through timm's own ways in and out


def test_file_of_the_source_and_directory_of_the_lifted_model(tmp_path):
    source = se_source('seresnext26t_32x4d')
    file = tmp_path / 'source.safetensors'
    safetensors.torch.save_file(source.state_dict(), file)
    model = timm.create_model('senextv2_26t_32x4d', pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    x = images(size=96)
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
    x = images(size=96)
    torch.testing.assert_close(
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), source(x), rtol=0, atol=1e-4
    )
