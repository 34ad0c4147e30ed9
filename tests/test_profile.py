import pytest
import timm
import torch

from timm_senetv2.profile import count, on_meta


def test_count_of_a_convolution_and_a_linear_layer_by_hand():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 5),
    )
    profile = count(model, (3, 16, 16))
    assert profile.params == 3 * 8 * 9 + 2 * 8 + 8 * 5 + 5
    assert profile.macs == 8 * 8 * 8 * 27 + 8 * 5  # each output element of the convolution takes 27 multiply-adds
    assert profile.activations == 8 * 8 * 8 + 5
    assert model.training


def test_each_module_keeps_its_mode():
    model = timm.create_model('small_saecnn', device='meta').train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    before = [m.training for m in model.modules()]
    count(model, (3, 32, 32))
    assert [m.training for m in model.modules()] == before and not frozen.training


@pytest.mark.parametrize('name, params', [('resnet50', 25.6), ('seresnet50', 28.1)])
def test_count_agrees_with_timms_model_cards(name, params):
    profile = count(timm.create_model(name, device='meta'), (3, 224, 224))
    assert round(profile.params / 1e6, 1) == params
    assert round(profile.macs / 1e9, 1) == 4.1
    assert round(profile.activations / 1e6, 1) == 11.1


def test_count_is_the_same_on_meta_and_on_the_cpu():
    on_meta = count(timm.create_model('cifar_senetv2_resnet20', device='meta'), (3, 32, 32))
    assert on_meta == count(timm.create_model('cifar_senetv2_resnet20'), (3, 32, 32))


@pytest.mark.parametrize('device', ['meta', 'cpu'])
@pytest.mark.parametrize('name', ['cifar_senetv2_resnet20', 'test_vit'])
def test_count_in_inference_mode_and_of_a_traced_model_is_the_same(name, device):
    model = timm.create_model(name, device=device).eval()
    size = model.pretrained_cfg['input_size']
    profile = count(model, size)
    assert profile.macs > 1e6
    with torch.inference_mode():
        assert count(model, size) == profile
    if device == 'cpu':
        traced = torch.jit.trace(model, torch.zeros(1, *size), check_trace=False)
        assert count(traced, size)[:2] == profile[:2]


@pytest.mark.parametrize('name', ['senetv2_resnet18', 'seanet20', 'convnext_atto', 'vit_tiny_patch16_224'])
def test_model_without_values_is_that_of_timm(name):
    ours, theirs = on_meta(name, num_classes=7), timm.create_model(name, num_classes=7, device='meta')
    assert str(ours) == str(theirs)
    assert {p.device.type for p in ours.parameters()} == {'meta'}
    shapes = [{key: (t.shape, t.dtype) for key, t in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.pretrained_cfg == theirs.pretrained_cfg
