"""Checkpoints of the SEANet authors and of unofficial SaE ports, against plain-torch constructions of both."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from interpreters import command
from networks import images
from torch import nn

from experiments.randomize import randomize
from timm_senetv2.checkpoints import convert_state_dict, read_checkpoint
from timm_senetv2.commands import main
from timm_senetv2.errors import UserError
from timm_senetv2.files import MARK


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def convert(capsys) -> Callable[..., Done]:
    """Run the command in this process: torch and timm are imported already."""

    def call(*args) -> Done:
        with pytest.raises(SystemExit) as done:
            main(['convert', *map(str, args)])
        return Done(done.value.code or 0, *capsys.readouterr())

    return call


# ---- the foreign architectures, in plain torch


class Squeeze(nn.Module):
    """SE with the SEANet authors' names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 8
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x):
        n, c, h, w = x.shape
        return torch.einsum('nchw,nc->nchw', x, self.fc(x.reshape(n, c, h * w).sum(2) / (h * w)))


class Branches(nn.Module):
    """SaE as unofficial ports write it: separate dense layers and an output layer, under various names."""

    def __init__(self, channels: int, names: list[str], output: str, reduction: int = 16, bias: bool = False) -> None:
        super().__init__()
        d = channels // reduction
        self.names, self.output = names, output
        for name in names:
            self.add_module(name, nn.Sequential(nn.Linear(channels, d, bias=bias), nn.ReLU()))
        self.add_module(output, nn.Sequential(nn.Linear(len(names) * d, channels, bias=bias), nn.Sigmoid()))

    def forward(self, x):
        z = F.adaptive_avg_pool2d(x, 1).flatten(1)
        s = self.get_submodule(self.output)(torch.cat([self.get_submodule(name)(z) for name in self.names], 1))
        return x * s[:, :, None, None]


class Block(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int, attention: nn.Module, attribute: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.attribute = attribute
        self.add_module(attribute, attention)
        if inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        residual = self.downsample(x) if hasattr(self, 'downsample') else x
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.get_submodule(self.attribute)(self.bn2(self.conv2(x))) + residual)


class ResNet20(nn.Module):
    """The 32-pixel trunk with any attention; `aggregate` sums each group of 4 channels after a stage, as in SEANet."""

    def __init__(self, classes, widths, attention, attribute='se', aggregate=False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inplanes = 16
        for i, width in enumerate(widths):
            blocks = [
                Block(width if j else inplanes, width, 2 if i and not j else 1, attention(width), attribute)
                for j in range(3)
            ]
            self.add_module(f'layer{i + 1}', nn.Sequential(*blocks))
            inplanes = width // 4 if aggregate else width
        self.fc = nn.Linear(inplanes, classes)
        self.aggregate = aggregate

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
            if self.aggregate:
                x = x[:, 0::4] + x[:, 1::4] + x[:, 2::4] + x[:, 3::4]
        return self.fc(x.sum((2, 3)) / (x.shape[2] * x.shape[3]))


# ---- the SEANet authors' files


@pytest.fixture(scope='module')
def seanet() -> dict[int, nn.Module]:
    torch.manual_seed(0)
    models = {classes: ResNet20(classes, (128, 256, 512), Squeeze, aggregate=True) for classes in (10, 100)}
    return {classes: randomize(model, images(4)) for classes, model in models.items()}


def authors_file(path: Path, model: nn.Module, layout: str, optimizer: bool = True, legacy: bool = True) -> Path:
    """Save as the authors' training scripts do; their PyTorch 0.4 wrote the format from before zip files."""
    state = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict()
    if layout == 'cifar10':
        content = dict(epoch=165, weight=model.state_dict(), optimizer_state_dict=state)
    else:
        content = dict(epoch=190, state_dict=model.state_dict(), best_acc1=torch.tensor(78.67), optimizer=state)
    if not optimizer:
        content = {key: value for key, value in content.items() if not key.startswith('optimizer')}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize(
    ('layout', 'classes', 'parameters', 'optimizer', 'legacy'),
    [
        ('cifar10', 10, '16,188,330', True, True),
        ('cifar100', 100, '16,199,940', False, False),
    ],
)
def test_authors_file_becomes_a_directory_with_the_same_logits(
    tmp_path, convert, seanet, layout, classes, parameters, optimizer, legacy
):
    source = seanet[classes]
    file = authors_file(tmp_path / 'best_model.pth', source, layout, optimizer, legacy)
    done = convert(file, '--model', 'seanet20', '--out', tmp_path / 'new' / 'out')
    assert done.returncode == 0, done.stderr
    for found in (f'CIFAR-{classes}', f'classes: {classes}\n', f'parameters: {parameters}\n'):
        assert found in done.stdout
    assert ('epoch: 165' if layout == 'cifar10' else 'best accuracy in the file: 78.67 %') in done.stdout
    assert sorted(p.name for p in (tmp_path / 'new').rglob('*')) == [MARK, 'config.json', 'model.safetensors', 'out']

    model = timm.create_model(f'local-dir:{tmp_path / "new" / "out"}', pretrained=True).eval()
    x = images()
    expected = source(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('layout', ['cifar10', 'cifar100'])
@pytest.mark.parametrize('optimizer', [False, True])
@pytest.mark.parametrize('legacy', [False, True])
def test_both_layouts_are_read_with_and_without_optimizer(tmp_path, seanet, layout, optimizer, legacy):
    file = authors_file(tmp_path / 'x.pth', seanet[10], layout, optimizer, legacy)
    checkpoint = read_checkpoint(file)
    assert checkpoint.epoch == (165 if layout == 'cifar10' else 190)
    assert checkpoint.best_acc1 == (None if layout == 'cifar10' else pytest.approx(78.67))
    assert checkpoint.state_dict.keys() == seanet[10].state_dict().keys()


def test_data_parallel_prefix_is_removed(tmp_path, seanet):
    torch.save({f'module.{k}': v for k, v in seanet[10].state_dict().items()}, tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth').state_dict.keys() == seanet[10].state_dict().keys()


# ---- SaE stored branch by branch

NUMBERED = dict(names=['fc1', 'fc2', 'fc3', 'fc4'], output='fc')


def port(attribute: str = 'se', **kwargs) -> nn.Module:
    return randomize(ResNet20(5, (16, 32, 64), partial(Branches, **kwargs), attribute), images(4))


@pytest.mark.parametrize(
    ('attribute', 'attention'),
    [
        ('se', NUMBERED),
        ('se', dict(NUMBERED, bias=True)),
        ('selayer', dict(names=[f'branch{i}' for i in range(4)], output='excitation')),
        ('attention', dict(names=[f'dense{i}' for i in range(12)], output='a_first_by_name', bias=True)),
        ('se', dict(names=['fc1', 'fc2'], output='fc', reduction=8)),
        ('se', dict(names=['fc1', 'fc2'], output='fc', reduction=16)),  # half of the room
    ],
)
def test_branches_become_one_layer_with_the_same_logits(tmp_path, attribute, attention):
    source = port(attribute, **attention)
    cardinality = max(4, len(attention['names']))
    model = timm.create_model('cifar_senetv2_resnet20', num_classes=5, sae_cardinality=cardinality).eval()
    model.load_state_dict(convert_state_dict(source.state_dict(), model))
    x = images()
    expected = source(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_script_converts_a_port_in_safetensors(tmp_path, interpreters):
    source = port(**NUMBERED)
    safetensors.torch.save_file(source.state_dict(), tmp_path / 'port.safetensors')
    arguments = [tmp_path / 'port.safetensors', '--model', 'cifar_senetv2_resnet20', '--out', tmp_path / 'out']
    done = interpreters.run(command(['-m', 'timm_senetv2', 'convert', *arguments]))
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = images()
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=1e-5)


def test_options_of_the_model_are_kept_in_the_directory(tmp_path, convert):
    torch.save(port(**dict(NUMBERED, reduction=8)).state_dict(), tmp_path / 'x.pth')
    done = convert(
        tmp_path / 'x.pth',
        '--model',
        'cifar_senetv2_resnet20',
        '--out',
        tmp_path / 'out',
        '--model-kwargs',
        'sae_reduction=8',
        'sae_add_identity=True',
    )
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model.layer1[0].se.rd_channels == 2 and model.layer1[0].se.add_identity


# ---- what does not fit is refused, and nothing is written


@pytest.fixture
def refused(tmp_path, convert) -> Callable[..., None]:
    """Assert that the script refuses to convert the content, in one line, and leaves nothing behind."""

    def check(content, *reasons: str, model: str = 'seanet20') -> None:
        torch.save(content, tmp_path / 'x.pth')
        done = convert(tmp_path / 'x.pth', '--model', model, '--out', tmp_path / 'out')
        assert done.returncode == 2
        assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
        for reason in reasons:
            assert reason in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == ['x.pth']

    return check


def test_half_known_file_is_refused_with_the_first_unmatched_key_of_each_side(refused, seanet):
    state = seanet[10].state_dict()
    renamed = {key.replace('layer2.0.conv2', 'layer2.0.second'): tensor for key, tensor in state.items()}
    refused(
        dict(epoch=1, weight=renamed),
        'layer2.0.second.weight (256, 256, 3, 3) is in the file only',
        'in the model only',
    )


def test_attention_of_an_unknown_structure_is_refused(seanet):
    state = dict(seanet[10].state_dict())
    state['layer1.1.se.norm.weight'] = torch.ones(16)
    model = timm.create_model('seanet20')
    with pytest.raises(
        ValueError,
        match=(
            r'layer1\.1\.se\.fc\.0\.weight \(16, 128\) is in the file only, '
            r'layer1\.1\.se\.fc1\.weight \(16, 128\) in the model only'
        ),
    ):
        convert_state_dict(state, model)


def test_missing_weight_is_refused(seanet):
    state = dict(seanet[10].state_dict())
    del state['bn1.running_var']
    with pytest.raises(ValueError, match=r'nothing is in the file only, bn1\.running_var \(16,\) in the model only'):
        convert_state_dict(state, timm.create_model('seanet20'))


def test_wrong_shape_is_refused_with_both_shapes(seanet):
    state = dict(seanet[10].state_dict())
    state['conv1.weight'] = state['conv1.weight'][:, :1]
    with pytest.raises(ValueError, match=r'^conv1\.weight has the shape \(16, 1, 3, 3\) .* \(16, 3, 3, 3\)'):
        convert_state_dict(state, timm.create_model('seanet20'))


def test_other_depth_is_refused(refused, seanet):
    reason = 'layer1.3.conv1.weight (128, 128, 3, 3) in the model only'
    refused(seanet[10].state_dict(), reason, model='seanet32')


class Opaque:
    """Something that only an unsafe pickle could load."""


def test_pickle_that_needs_code_is_refused_and_the_message_says_which(refused):
    refused(dict(epoch=1, weight={}, args=Opaque()), 'refused', 'Opaque')


def test_file_without_weights_is_refused(refused):
    refused(dict(epoch=1, loss=0.1), 'holds no state dict; its keys are epoch, loss')


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04 half a zip', b'\x80\x02}q'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_file_that_is_no_checkpoint_is_refused(tmp_path, content, suffix):
    file = tmp_path / f'x{suffix}'
    file.write_bytes(content)
    with pytest.raises(UserError, match='is not a checkpoint, or it is damaged'):
        read_checkpoint(file)


def test_script_refuses_wrong_arguments(tmp_path, convert, seanet):
    missing = convert(tmp_path / 'no.pth', '--model', 'seanet20', '--out', tmp_path / 'out')
    assert missing.returncode == 2
    assert missing.stderr == f'error: cannot read {tmp_path}/no.pth: there is no such file\n'
    unknown = convert(tmp_path / 'no.pth', '--model', 'seanet21', '--out', tmp_path / 'out')
    assert unknown.returncode == 2 and "'seanet21' is not one of our models; did you mean seanet" in unknown.stderr
    taken = convert(tmp_path / 'no.pth', '--model', 'seanet20', '--out', tmp_path.parent)
    assert taken.returncode == 2 and 'was not written by convert' in taken.stderr
    file = authors_file(tmp_path / 'x.pth', seanet[10], 'cifar10')
    option = convert(file, '--model', 'seanet20', '--out', tmp_path / 'out', '--model-kwargs', 'no_such=1')
    assert option.returncode == 2 and option.stderr.startswith('error: --model-kwargs: ') and 'no_such' in option.stderr
