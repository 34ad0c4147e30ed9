"""Models from the checkpoints of timm's train.py: what it records in the file holds for what is made of it."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config

from timm_senetv2 import hub
from timm_senetv2.create import from_checkpoint
from timm_senetv2.errors import UserError
from timm_senetv2.layers import SqueezeAggregatedExcitation

KEYS = ('input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')


def trained(path: Path, name: str, **arguments: object) -> torch.nn.Module:
    """Save a model as train.py does that was called with these arguments; the model."""
    arguments = dict(model=name, model_kwargs={}, gp=None, in_chans=None) | arguments
    torch.manual_seed(1)
    model = timm.create_model(
        name, num_classes=7, in_chans=arguments['in_chans'] or arguments.get('input_size', [3])[0],
        global_pool=arguments['gp'],
        **arguments['model_kwargs'],
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, SqueezeAggregatedExcitation):  # else a gate of about 1/2 everywhere shows no option
            torch.nn.init.normal_(m.fc2.weight)
        elif isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
    content = dict(epoch=1, arch=name, args=argparse.Namespace(**arguments), state_dict=model.state_dict())
    torch.save(content, path)
    return model.eval()


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('cifar_senetv2_resnet20.fmnist', {}),
        ('cifar_senetv2_resnet20', {}),  # the default tag's
        ('cifar_senetv2_resnet20.untrained', {}),
        ('cifar_senetv2_resnet20', dict(mean=[0.1, 0.2, 0.3], std=(0.5,), crop_pct=0.875, interpolation='bicubic')),
        ('senetv2_resnet18.plain_fb_swsl_ig1b_ft_in1k', dict(img_size=192)),
        ('cifar_senetv2_resnet20', dict(input_size=[3, 48, 48])),
        ('cifar_senetv2_resnet20', dict(crop_pct=1.1, crop_mode='squash', interpolation='')),
        ('cifar_senetv2_resnet20', dict(in_chans=1, img_size=28, mean=(0.2,), std=(0.3,))),
        ('cifar_senetv2_resnet20', dict(input_size=[1, 28, 28])),
        ('senetv2_resnet20.fmnist', {}),  # a name of before
    ],
)
def test_preprocessing_is_that_of_the_training(tmp_path, name, arguments):
    trained(tmp_path / 'x.pth', name, **arguments)
    given = f'{name.partition(".")[0]}.untrained'  # the file knows better
    config = from_checkpoint(given, tmp_path / 'x.pth', False, {})[0].pretrained_cfg
    # as train.py resolves it
    expected = resolve_data_config(arguments, pretrained_cfg=timm.create_model(name).pretrained_cfg)
    assert {key: config[key] for key in KEYS} == {key: expected[key] for key in KEYS}
    assert config.get('tag') is None and config.get('license') is None and config.get('label_names') is None


def test_feature_map_of_the_config_is_that_of_its_input(tmp_path):
    trained(tmp_path / 'x.pth', 'cifar_senetv2_resnet20', img_size=50)
    model, _ = from_checkpoint('cifar_senetv2_resnet20', tmp_path / 'x.pth', False, {})
    assert model.pretrained_cfg['pool_size'] == tuple(model.forward_features(torch.zeros(1, 3, 50, 50)).shape[2:])


def test_tag_says_the_preprocessing_of_a_file_that_does_not(tmp_path):
    torch.save(timm.create_model('cifar_senetv2_resnet20').state_dict(), tmp_path / 'x.pth')
    means = {}
    for name in ('cifar_senetv2_resnet20', 'cifar_senetv2_resnet20.fmnist', 'cifar_senetv2_resnet20.untrained'):
        means[name.partition('.')[2]] = from_checkpoint(name, tmp_path / 'x.pth', False, {})[0].pretrained_cfg['mean']
    assert means == {'': means['untrained'], 'untrained': means['untrained'], 'fmnist': (0.286, 0.286, 0.286)}
    with pytest.raises(UserError, match="cifar_senetv2_resnet20 has no tag 'fmnits'; did you mean fmnist"):
        from_checkpoint('cifar_senetv2_resnet20.fmnits', tmp_path / 'x.pth', False, {})


@pytest.mark.parametrize(
    'arguments',
    [
        dict(model_kwargs=dict(sae_add_identity=True)),  # leaves every shape as it is
        dict(model_kwargs=dict(sae_reduction=8, drop_rate=0.1)),
        dict(gp='max'),
        dict(in_chans=1),
        dict(input_size=(1, 32, 32)),
        dict(model_kwargs=dict(widths=[16, 16, 32])),
    ],
)
def test_options_are_those_of_the_training(tmp_path, arguments):
    source = trained(tmp_path / 'x.pth', 'cifar_senetv2_resnet20', **arguments)
    given = dict(widths=(16, 16, 32)) if 'widths' in arguments.get('model_kwargs', {}) else {}
    model = hub.build('cifar_senetv2_resnet20', checkpoint=tmp_path / 'x.pth', drop_rate=0.2, **given)
    x = torch.randn(2, source.conv1.in_channels, 32, 32)
    assert torch.equal(model(x), source(x)) and model.drop_rate == 0.2
    hub.write_files(model, tmp_path / 'out', 'a card', hub.Facts(license='mit'))
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert torch.equal(loaded(x), source(x))


@pytest.mark.parametrize(
    ('name', 'ours', 'arguments'),
    [
        ('cifar_seresnet20', 'cifar_senetv2_resnet20', dict(gp='max', model_kwargs=dict(sae_reduction=64))),
        ('seresnet18', 'senetv2_resnet18', dict(model_kwargs=dict(act_layer='silu', zero_init_last=0))),
    ],
)
def test_lifted_weights_keep_all_options_but_the_size_of_se(tmp_path, name, ours, arguments):
    source = trained(tmp_path / 'x.pth', name, **arguments).double()
    model = from_checkpoint(ours, tmp_path / 'x.pth', False, {})[0].double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), source(x))
    assert model.layer1[0].se.cardinality == 4


def test_unknown_tag_of_another_version_is_the_default(tmp_path):
    trained(tmp_path / 'x.pth', 'cifar_senetv2_resnet20', model='cifar_senetv2_resnet20.newer')
    model, _ = from_checkpoint('cifar_senetv2_resnet20', tmp_path / 'x.pth', False, {})
    assert model.pretrained_cfg['mean'] == timm.create_model('cifar_senetv2_resnet20').pretrained_cfg['mean']


def test_training_from_a_folder_keeps_its_options_where_a_tag_says_the_preprocessing(tmp_path):
    source = trained(tmp_path / 'x.pth', 'cifar_senetv2_resnet20', gp='max', model='local-dir:mine', img_size=40)
    model, _ = from_checkpoint('cifar_senetv2_resnet20.fmnist', tmp_path / 'x.pth', False, {})
    x = torch.randn(2, 3, 40, 40)
    assert torch.equal(model(x), source(x))
    assert model.pretrained_cfg['mean'] == (0.286,) * 3 and model.pretrained_cfg['input_size'] == (3, 40, 40)


@pytest.mark.parametrize(
    ('given', 'arguments', 'says'),
    [
        (
            dict(sae_add_identity=False),
            dict(model_kwargs=dict(sae_add_identity=True)),
            'was trained with sae_add_ident',
        ),
        (dict(in_chans=3), dict(in_chans=1), 'was trained with in_chans=1, and --model-kwargs says in_chans=3'),
        ({}, dict(model_kwargs=dict(nonsense=1)), 'x.pth records options: .* no option nonsense'),
        ({}, dict(model_kwargs=[1]), 'records options that are none'),
        ({}, dict(std=[0.0]), 'records std=.*, which makes no sense'),
        ({}, dict(mean=['a'] * 3), 'records mean=.*, which makes no sense'),
        ({}, dict(mean=[0.1, 0.2]), 'records mean=.*, which makes no sense'),
        ({}, dict(mean=[10**400] * 3), 'records mean=.*, which makes no sense'),
        ({}, dict(mean=torch.tensor([0.5] * 3)), 'records mean=.*, which makes no sense'),
        ({}, dict(crop_pct=float('nan')), 'records crop_pct=nan, which makes no sense'),
        ({}, dict(crop_pct=torch.tensor([0.5, 0.6])), 'records crop_pct=.*, which makes no sense'),
        ({}, dict(input_size=[3, -1, 5]), 'records input_size=.*, which makes no sense'),
        ({}, dict(in_chans=10**13), 'records in_chans=.*, which makes no sense'),
        ({}, dict(img_size='x'), 'records img_size=x, which makes no sense'),
        ({}, dict(interpolation=7), 'records interpolation=7, which makes no sense'),
        ({}, dict(interpolation='nope'), 'records interpolation=nope, which makes no sense'),
        ({}, dict(crop_mode='a' + chr(10)), 'records crop_mode=a.*, which makes no sense'),
        ({}, dict(model='cifar_seresnet20', model_kwargs=dict(nonsense=1)), 'no option nonsense'),
        (
            {},
            dict(model='local-dir:x'),
            'x.pth was trained from local-dir:x: say by --model cifar_senetv2_resnet20.TAG',
        ),
    ],
)
def test_record_that_cannot_hold_is_refused(tmp_path, given, arguments, says):
    content = dict(state_dict=timm.create_model('cifar_senetv2_resnet20', num_classes=7).state_dict())
    content['args'] = argparse.Namespace(**dict(model='cifar_senetv2_resnet20') | arguments)
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(UserError, match=says) as caught:
        from_checkpoint('cifar_senetv2_resnet20', tmp_path / 'x.pth', False, given)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('arguments', [7, {}, dict(model=3), dict(model='other.tag', mean=None), {1: 2}])
def test_record_that_says_nothing_of_the_model_is_left(tmp_path, arguments):
    torch.save(
        dict(state_dict=timm.create_model('cifar_senetv2_resnet20').state_dict(), args=arguments), tmp_path / 'x.pth'
    )
    model, checkpoint = from_checkpoint('cifar_senetv2_resnet20', tmp_path / 'x.pth', False, {})
    assert model.pretrained_cfg['mean'] == timm.create_model('cifar_senetv2_resnet20.untrained').pretrained_cfg['mean']


def test_licence_of_trained_weights_is_only_their_owners_to_say(tmp_path):
    trained(tmp_path / 'x.pth', 'cifar_senetv2_resnet20.fmnist')
    model = hub.build('cifar_senetv2_resnet20', checkpoint=tmp_path / 'x.pth')
    with pytest.raises(UserError, match='needs a license: give it by --license'):
        hub.render_card(model, 'me/x', hub.Facts())
    facts = hub.with_license(hub.Facts(), 'cc-by-nc-4.0')
    assert hub.render_card(model, 'me/x', facts).data.license == 'cc-by-nc-4.0'
    hub.write_files(model, tmp_path / 'out', 'a card', facts)
    assert timm.create_model(f'local-dir:{tmp_path / "out"}').pretrained_cfg['license'] == 'cc-by-nc-4.0'
    with pytest.raises(UserError, match='--license: .*is not the id of a licence'):
        hub.with_license(facts, 'my own')
