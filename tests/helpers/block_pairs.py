"""One of our blocks and timm's own block class with the same weights, for tests that treat both alike."""

import copy
from functools import partial

import pytest
import torch
from timm.layers import BlurPool2d, DropPath
from timm.models.resnet import BasicBlock, Bottleneck, downsample_avg, downsample_conv
from torch import nn

from timm_senetv2.layers import SqueezeAggregatedExcitation
from timm_senetv2.models.blocks import SaEBasicBlock, SaEBottleneck

PLANES, WIDTH, SIZE = 8, 32, 6
SAE = partial(SqueezeAggregatedExcitation, reduction=4, cardinality=2)
BLOCKS = {SaEBasicBlock: BasicBlock, SaEBottleneck: Bottleneck}
both_blocks = pytest.mark.parametrize('cls', BLOCKS)
both_modes = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
CASES = {
    'identity shortcut': {},
    'stride': dict(stride=2, downsample=downsample_conv),
    'pooled shortcut': dict(stride=2, downsample=downsample_avg),
    'dilation': dict(dilation=2),
    'anti-aliasing': dict(stride=2, downsample=downsample_conv, aa_layer=BlurPool2d),
    'drop path': dict(drop_path=0.5),
    'add_identity': dict(attn_layer=partial(SAE, add_identity=True)),
    'everything': dict(stride=2, downsample=downsample_conv, drop_path=0.5),
}


def build(cls: type[nn.Module], case: str = 'identity shortcut', dtype: torch.dtype = torch.float64, **args):
    """One of our blocks with norms that are not the identity."""
    args = dict(attn_layer=SAE) | CASES[case] | args
    planes = PLANES if cls is SaEBottleneck else WIDTH
    if 'downsample' in args:
        args['downsample'] = args['downsample'](WIDTH, WIDTH, kernel_size=1, stride=args['stride'])
    if 'drop_path' in args:
        args['drop_path'] = DropPath(args['drop_path'])
    return randomize_norms(cls(WIDTH, planes, **args)).to(dtype)


def randomize_norms(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias)
            if m.track_running_stats:
                nn.init.normal_(m.running_mean)
                nn.init.uniform_(m.running_var, 0.5, 2)
    return model


def twin_of(block: nn.Module) -> nn.Module:
    """timm's own block with the same weights, and our layer as its `se`."""
    twin = copy.deepcopy(block)
    twin.__class__ = BLOCKS[type(block)]
    return twin


def last(block: nn.Module, kind: str) -> str:
    """Name of the last conv or norm, `conv2` or `bn3` say: `kind` is 'conv' or 'bn'."""
    return f'{kind}{3 if isinstance(block, Bottleneck) else 2}'


def images(n: int = 3, dtype: torch.dtype = torch.float64, size: int = SIZE) -> torch.Tensor:
    return torch.randn(n, WIDTH, size, size, dtype=dtype)


def run(block: nn.Module, x: torch.Tensor, forward=None) -> dict[str, torch.Tensor]:
    """Output, the gradients of a fixed function of it, and the buffers afterwards, by name."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # the same paths are dropped
    block.zero_grad()
    out = (block if forward is None else forward)(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    return {'out': out.detach(), 'x': x.grad, **grads, **{k: b.clone() for k, b in block.named_buffers()}}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    """Equal to `tolerance` of the largest element of each; 0 asks for the same bits."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        if tolerance == 0:
            assert torch.equal(got[name], want[name]), name
        elif want[name].numel():
            error = (got[name].double() - want[name].double()).abs().max() / want[name].abs().max().clamp(min=1)
            assert error <= tolerance, f'{name}: {error:.1e}'
