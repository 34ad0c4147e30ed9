"""`add_attention` on live models of timm and torchvision: the same outputs to the last bit, and it trains."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from networks import images, sae_layers
from timm.layers import BatchNormAct2d, LayerNorm2d
from timm.models import reparameterize_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.utils import parametrizations, prune

import timm_senetv2
from experiments.randomize import randomize
from timm_senetv2 import add_attention
from timm_senetv2.lifting import TorchvisionBasicBlock, TorchvisionBottleneck

SMALL = dict(layers=(1, 1, 1, 1), num_classes=10)


def small(block=Bottleneck, **kwargs) -> nn.Module:
    return timm.models.resnet.ResNet(block, **dict(SMALL, **kwargs))


def small_of_torchvision(**kwargs) -> nn.Module:
    """torchvision's resnet50 of a few blocks, one of them with an identity shortcut."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=10, **kwargs)


MODELS = {
    'resnet18': lambda: timm.create_model('resnet18', num_classes=10),
    'd': lambda: small(stem_type='deep', stem_width=32, avg_down=True),
    's': lambda: small(stem_type='deep', stem_width=64),
    'wide': lambda: small(base_width=128),
    'resnext': lambda: small(cardinality=32, base_width=4),
    'aa': lambda: small(aa_layer=nn.AvgPool2d),
    'group norm': lambda: small(norm_layer='groupnorm'),
    'one group': lambda: small(norm_layer='groupnorm1'),
    'layer norm': lambda: small(norm_layer=LayerNorm2d),
    'instance norm': lambda: small(norm_layer=lambda c, **dd: nn.InstanceNorm2d(c, affine=True, **dd)),
    'dilated': lambda: small(output_stride=8),
    'hrnet': lambda: timm.create_model('hrnet_w18_small', num_classes=10),
    'cifar': lambda: timm.create_model('cifar_resnet20'),
    'features': lambda: timm.create_model('resnet18', features_only=True, out_indices=(4,)),
    'torchvision resnet18': lambda: torchvision.models.resnet18(num_classes=10),
    'torchvision resnet50': lambda: small_of_torchvision(),
    'torchvision resnext50': lambda: small_of_torchvision(groups=32, width_per_group=4),
}


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y[-1] if isinstance(y, list) else y


@pytest.mark.parametrize('name', MODELS)
def test_outputs_gradients_and_statistics_stay_to_the_last_bit(name):
    x = images(4, 64)
    before = randomize(MODELS[name](), x)
    model = copy.deepcopy(before)
    assert add_attention(model) is model
    assert sae_layers(model)
    with torch.no_grad():
        expected = output(before, x)
        assert expected.std() > 0.01
        assert torch.equal(output(model, x), expected)
        active = copy.deepcopy(model)
        for layer in sae_layers(active).values():
            layer.fc2.bias.add_(1)
        assert (output(active, x) - expected).abs().max() > 0.01 * expected.abs().max()

    before.train(), model.train()
    expected = output(before, x)
    actual = output(model, x)
    assert torch.equal(actual, expected)
    expected.square().mean().backward()
    actual.square().mean().backward()
    halved = {id(p) for m in model.modules() if getattr(m, 'se', None) for p in last_norm(m).parameters()}
    assert halved
    for key, parameter in before.named_parameters():
        ours = model.get_parameter(key)
        factor = 0.5 if id(ours) in halved else 1
        assert parameter.grad is None or torch.equal(ours.grad, factor * parameter.grad), key
    for key, buffer in before.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key


def last_norm(block: nn.Module) -> nn.Module:
    return block.bn3 if hasattr(block, 'bn3') else block.bn2


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    before = randomize(small().to(torch.float32), images(4, 64)).to(dtype)
    model = add_attention(copy.deepcopy(before))
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = images(4, 64, dtype=dtype)
    assert torch.equal(model(x), before(x))


def test_folded_norms():
    """The last affine step is then the conv, with a bias."""
    before = small()
    randomize(before, images(4, 64))
    for block in before.modules():
        if isinstance(block, Bottleneck):
            block.conv3 = torch.nn.utils.fuse_conv_bn_eval(block.conv3, block.bn3)
            block.bn3 = nn.Identity()
    model = add_attention(copy.deepcopy(before))
    x = images(4, 64)
    assert torch.equal(model(x), before(x))
    assert torch.equal(model.layer1[0].conv3.bias, 2 * before.layer1[0].conv3.bias)


def test_one_training_step_moves_every_layer():
    model = add_attention(randomize(small(), images(4, 64))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        first = {name: layer.fc1.weight.clone() for name, layer in sae_layers(model).items()}
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images(4, 64)), torch.arange(4)).backward()
        optimizer.step()
        for name, layer in sae_layers(model).items():
            assert layer.fc2.weight.any() and layer.fc2.bias.any(), name
            assert torch.equal(layer.fc1.weight, first[name]) == (step == 0), name  # its gradient comes through fc2


def test_sizes_device_and_mode():
    model = add_attention(small().eval(), reduction=16, cardinality=2)
    layer = model.layer2[0].se
    assert (layer.channels, layer.cardinality, layer.rd_channels) == (512, 2, 32)
    assert not layer.training and not layer.fc1.training
    with torch.device('meta'):
        assert {p.device.type for p in add_attention(timm.create_model('resnet50')).parameters()} == {'meta'}


def test_names_of_the_state_dict_stay_and_it_loads_into_a_model_built_again():
    for build in (small, lambda: torchvision.models.resnet18(num_classes=10)):
        before = randomize(build(), images(4, 64))
        model = add_attention(copy.deepcopy(before))
        old, new = before.state_dict(), model.state_dict()
        assert old.keys() <= new.keys() and all('.se.fc' in key for key in new.keys() - old.keys())
        for layer in sae_layers(model).values():
            nn.init.normal_(layer.fc2.weight)
        again = add_attention(build()).eval()
        again.load_state_dict(new)
        x = images(4, 64)
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('build', [small, lambda: torchvision.models.resnet18(num_classes=10)])
def test_copies_pickles_and_scripts(build):
    model = add_attention(randomize(build(), images(4, 64)))
    for layer in sae_layers(model).values():
        nn.init.normal_(layer.fc2.weight)
    x = images(4, 64)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(reparameterize_model(model)(x), expected)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_torchvision_blocks_keep_their_class_as_base():
    model = add_attention(torchvision.models.resnet50())
    assert isinstance(model.layer1[0], (torchvision.models.resnet.Bottleneck, TorchvisionBottleneck))
    assert isinstance(add_attention(torchvision.models.resnet18()).layer1[0], TorchvisionBasicBlock)
    assert type(add_attention(small()).layer1[0]) is Bottleneck


def test_blocks_with_attention_keep_it():
    model = small()
    attention = nn.Identity()
    model.layer2[0].se = attention
    weight = model.layer2[0].bn3.weight.clone()
    add_attention(model)
    assert model.layer2[0].se is attention and torch.equal(model.layer2[0].bn3.weight, weight)
    assert len(sae_layers(model)) == 3


def test_add_attention_is_public():
    assert timm_senetv2.add_attention is add_attention
    assert 'add_attention' in timm_senetv2.__all__


# ---- what is refused


class OwnBlock(BasicBlock):
    pass


class OwnNorm(nn.BatchNorm2d):
    pass


def set_norm(norm):
    return lambda model: setattr(model.layer2[0], 'bn3', norm() if callable(norm) else norm)


def share_the_norm(model: nn.Module) -> None:
    model.layer3[0].bn3 = model.layer2[0].bn3


def tie_the_weight(model: nn.Module) -> None:
    model.layer2[0].bn3.weight = model.layer2[0].downsample[1].weight


def tie_the_memory(model: nn.Module) -> None:
    model.layer2[0].bn3.bias.data = model.layer2[0].downsample[1].bias.data


def call_the_norm_twice(model: nn.Module) -> None:
    model.layer2[0].bn2 = model.layer2[0].bn3


def overlap_in_memory(model: nn.Module) -> None:
    both = torch.rand(700)
    model.layer2[0].bn3.weight = nn.Parameter(both[:512])
    model.layer2[0].bn3.bias = nn.Parameter(both[188:])


def keep_a_view(model: nn.Module) -> None:
    model.register_buffer('view', model.layer2[0].bn3.weight.data[5:9])


def replace_forward(name: str):
    def alter(model: nn.Module) -> None:
        module = model.get_submodule(name)
        forward = module.forward
        module.forward = lambda x: forward(x)

    return alter


def fold_into(conv):
    def alter(model: nn.Module) -> None:
        model.layer2[0].bn3 = nn.Identity()
        model.layer2[0].conv3 = conv()

    return alter


@pytest.mark.parametrize(
    ('alter', 'reason'),
    [
        (set_norm(lambda: nn.BatchNorm2d(512, affine=False)), 'its bn3 has no weight'),
        (set_norm(lambda: torchvision.ops.FrozenBatchNorm2d(512)), 'its bn3 is a FrozenBatchNorm2d, of which'),
        (set_norm(lambda: BatchNormAct2d(512)), 'its bn3 is a BatchNormAct2d, of which'),
        (set_norm(lambda: OwnNorm(512)), 'its bn3 is a OwnNorm, of which'),
        (set_norm(lambda: nn.LazyBatchNorm2d()), 'its bn3 is a LazyBatchNorm2d, of which'),
        (set_norm(lambda: nn.Sequential(nn.BatchNorm2d(512))), 'its bn3 is a Sequential, of which'),
        (share_the_norm, 'its bn3 is shared with another module'),
        (tie_the_weight, 'its bn3 is shared with another module'),
        (tie_the_memory, 'its bn3 is shared with another module'),
        (call_the_norm_twice, 'its bn3 is shared with another module'),
        (overlap_in_memory, 'its bn3 is shared with another module'),
        (keep_a_view, 'its bn3 is shared with another module'),
        (
            lambda m: setattr(m.layer2[0].bn3, 'weight', nn.Parameter(torch.ones(1).expand(512))),
            'its bn3 has a parameter whose elements share memory',
        ),
        (lambda m: m.layer2[0].bn3.weight.data.fill_(2e38), 'twice the parameters of its bn3 would'),
        (lambda m: m.layer2[0].bn3.register_forward_hook(lambda *a: None), 'its bn3 has hooks'),
        (lambda m: m.layer2[0].bn3.register_full_backward_hook(lambda *a: None), 'its bn3 has hooks'),
        (lambda m: m.layer2[0].bn3.weight.register_hook(torch.neg), 'its bn3 has a weight whose gradient has hooks'),
        (lambda m: parametrizations.weight_norm(m.layer2[0].bn3), 'its bn3 is a ParametrizedBatchNorm2d'),
        (lambda m: prune.l1_unstructured(m.layer2[0].bn3, 'weight', 0.5), 'its bn3 has hooks'),
        (replace_forward('layer2.0.bn3'), 'its bn3 has a forward that is not of its class'),
        (replace_forward('layer2.0'), 'its forward is not that of its class'),
        (lambda m: setattr(m.layer2[0], 'conv3', nn.LazyConv2d(512, 1)), 'its conv3 is a LazyConv2d without a plain'),
        (fold_into(lambda: torch.ao.nn.quantized.Conv2d(128, 512, 1)), 'its conv3 is a Conv2d without a plain'),
        (fold_into(lambda: parametrizations.weight_norm(nn.Conv2d(128, 512, 1))), 'its conv3 is a ParametrizedConv2d'),
    ],
)
def test_block_that_cannot_be_proved_equal_is_refused_and_the_model_unchanged(alter, reason):
    model = small()
    alter(model)
    modules = {name: (m, type(m)) for name, m in model.named_modules()}
    values = {n: p.detach().clone() for n, p in model.named_parameters() if not nn.parameter.is_lazy(p)}
    with pytest.raises(ValueError, match=rf'^layer2\.0 \(Bottleneck\) cannot take attention: {reason}'):
        add_attention(model)
    assert {name: (m, type(m)) for name, m in model.named_modules()} == modules
    for name, value in values.items():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize(('name', 'said'), [('layer2', 'layer2'), ('', 'the model')])
def test_block_in_something_whose_forward_was_replaced_is_refused(name, said):
    model = small()
    replace_forward(name)(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=f'cannot take attention: {said} has a forward that is not of its class'):
        add_attention(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_compiled_models_and_parts_of_models_take_attention():
    model = small()
    randomize(model, images(2, 64))
    model.eval()
    model.layer3 = torch.compile(model.layer3, backend='eager')
    model.layer4[0].forward = model.layer4[0].forward  # as accelerate leaves it
    whole = torch.compile(model, backend='eager')
    x = images(2, 64)
    expected = whole(x)
    assert torch.equal(add_attention(whole)(x), expected)
    with torch.no_grad():
        for layer in sae_layers(model).values():
            layer.fc2.bias.fill_(9)
    assert not torch.equal(whole(x), expected)


def test_parameters_apart_in_one_storage_are_not_shared():
    model = small()
    both = torch.rand(1024)
    model.layer2[0].bn3.weight = nn.Parameter(both[:512])
    model.layer2[0].bn3.bias = nn.Parameter(both[512:])
    randomize(model, images(2, 64))
    model.eval()
    x = images(2, 64)
    expected = model(x)
    assert torch.equal(add_attention(model)(x), expected)


def test_what_was_taken_from_the_model_before_keeps_its_values():
    model = small()
    randomize(model, images(2, 64))
    model.eval()
    x = images(2, 64)
    expected, norm = model(x), model.layer2[0].bn3
    state, traced, weight = model.state_dict(), torch.jit.trace(model, x, check_trace=False), norm.weight
    add_attention(model)
    again = small().eval()
    again.load_state_dict(state)
    assert torch.equal(again(x), expected)
    assert torch.equal(traced(x), expected)
    assert norm.weight is not weight and torch.equal(norm.weight, 2 * weight)


def test_marks_and_memory_format_of_doubled_parameters_stay():
    model = small().double()
    conv = nn.Conv2d(128, 512, 1).double().to(memory_format=torch.channels_last)
    model.layer2[0].bn3, model.layer2[0].conv3 = nn.Identity(), conv
    conv.weight._no_weight_decay = True
    conv.bias.requires_grad_(False)
    stride = conv.weight.stride()
    add_attention(model)
    assert conv.weight._no_weight_decay and conv.weight.stride() == stride
    assert conv.weight.requires_grad and not conv.bias.requires_grad
    assert type(conv.weight) is nn.Parameter and conv.weight.dtype == torch.float64


def test_block_in_two_places_is_checked_at_both():
    model = nn.ModuleDict({'first': nn.Sequential(small().layer1[0])})
    model['second'] = nn.Sequential(model['first'][0])
    second = model['second']
    second.forward = lambda x: x
    with pytest.raises(ValueError, match=r'^first\.0 \(Bottleneck\) cannot take attention: second has a forward'):
        add_attention(model)
    del second.forward
    add_attention(model)
    assert model['second'][0].se is model['first'][0].se


def test_model_made_in_inference_mode_can_take_attention():
    with torch.inference_mode():
        model = small().eval()
        x = images(2, 64)
        expected = model(x)
        assert torch.equal(add_attention(model)(x), expected)


def test_attention_added_in_inference_mode_can_be_trained():
    model = small()
    with torch.inference_mode():
        add_attention(model)
    model(images(2, 64)).sum().backward()
    assert all(layer.fc2.weight.grad is not None for layer in sae_layers(model).values())


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: timm.create_model('seresnet18'), 'every residual block of this ResNet has attention'),
        (lambda: timm.create_model('senetv2_resnet18'), 'every residual block of this ResNet has attention'),
        (lambda: add_attention(timm.create_model('resnet18')), 'every residual block of this ResNet has attention'),
        (lambda: timm.create_model('regnetx_002'), 'RegNet holds no residual block'),
        (lambda: nn.Sequential(OwnBlock(64, 64)), r'^0 \(OwnBlock\) cannot take attention: its class is not timm'),
        (
            lambda: torchvision.models.quantization.resnet18(),
            r'^layer1\.0 \(QuantizableBasicBlock\) cannot take attention: its class is not',
        ),
        (
            lambda: torchvision.models.detection.fasterrcnn_resnet50_fpn(weights_backbone=None, weights=None),
            None,
        ),
    ],
)
def test_models_without_such_blocks_are_refused(build, message):
    with torch.device('meta'):
        model = build()
    if message is None:  # a detector's trunk is a ResNet too
        assert sae_layers(add_attention(model))
        return
    with pytest.raises(ValueError, match=message):
        add_attention(model)


@pytest.mark.parametrize('build', [small, lambda: torchvision.models.resnet18()])
def test_failure_in_the_middle_leaves_the_model_unchanged(build, monkeypatch):
    model = build()
    before = copy.deepcopy(model)
    classes = {name: type(m) for name, m in model.named_modules()}
    last = model.layer4[0]
    set_attribute = nn.Module.__setattr__

    def fail_at_last(module: nn.Module, name: str, value: object) -> None:
        if module is last and name == 'se':
            raise RuntimeError('no memory left')
        set_attribute(module, name, value)

    with pytest.raises(RuntimeError, match='no memory left'), monkeypatch.context() as patched:
        patched.setattr(nn.Module, '__setattr__', fail_at_last)
        add_attention(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model.eval()(images(1, 64))


@pytest.mark.parametrize(
    ('name', 'stubborn'), [('layer3.0.bn3', 'bias'), ('layer3.0', 'se'), ('layer3.0', '__class__')]
)
def test_module_that_lets_nothing_be_set_leaves_the_model_unchanged(name, stubborn):
    model = randomize(small(), images(2, 64)).eval()
    target = model.get_submodule(name)

    kind, set_attribute = type(target), type(target).__setattr__

    def refuse(module: nn.Module, attribute: str, value: object) -> None:
        if module is target and attribute == stubborn:
            raise RuntimeError('no')
        set_attribute(module, attribute, value)

    x = images(2, 64)
    expected, classes = model(x), {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(RuntimeError, match='no'), pytest.MonkeyPatch.context() as patched:
        patched.setattr(kind, '__setattr__', refuse)
        add_attention(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert torch.equal(model(x), expected)


def test_name_in_place_of_a_model_is_refused():
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, .* got 'resnet18'"):
        add_attention('resnet18')


@pytest.mark.parametrize('options', [dict(reduction=0), dict(cardinality=True)])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))} must be a whole number'):
        add_attention(small(), **options)
