"""Channel aggregation, the third step of SEANet.

Source: `Global Feature Representation using Squeeze, Excite and Aggregation Networks (SEANet)`, MIND 2019, and the
authors' code, https://github.com/akhilesh-pandey/SEANet-pytorch
"""

import torch
from torch import nn

from ._checks import check_whole_number
from ._eager import is_observed


def _check_groups(channels: int, factor: int) -> None:
    if channels % factor != 0:
        raise ValueError(f'factor must divide the number of channels, got factor {factor} for {channels} channels')


torch.fx.wrap('_check_groups')  # a check on shapes: fx tracing must not look into it


def _sum_groups(x: torch.Tensor, factor: int) -> torch.Tensor:
    # Elementwise over the members of a group: it keeps channels-last, where a reduction returns contiguous NCHW
    members = x.unflatten(1, (-1, factor)).unbind(2)
    out = members[0]
    for i in range(1, factor):  # into the first sum, not into a new tensor each: half the time on a CPU
        out = out + members[i] if i == 1 else out.add_(members[i])
    return out


class _GroupSum(torch.autograd.Function):
    """`_sum_groups` with a gradient that is written once, where autograd's own puts the members' together."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return _sum_groups(x, factor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad):
        n, groups, height, width = grad.shape
        if ctx.channels_last:
            grad = grad.permute(0, 2, 3, 1)[..., None].expand(-1, -1, -1, -1, ctx.factor)
            return grad.reshape(n, height, width, groups * ctx.factor).permute(0, 3, 1, 2), None
        grad = grad[:, :, None].expand(-1, -1, ctx.factor, -1, -1)
        return grad.reshape(n, groups * ctx.factor, height, width), None

    @staticmethod
    def jvp(ctx, x_tangent, _):
        return _sum_groups(x_tangent, ctx.factor)


class ChannelAggregation(nn.Module):
    """Replace each group of `factor` consecutive channels by their sum, mean or maximum.

    Shapes: (N, C, H, W) in, (N, C / factor, H, W) out, in the same memory format; N may be 0. No parameters.
    The slides name sum, mean and max; the published weights use the sum over groups of 4.
    """

    OPS = ('sum', 'mean', 'max')

    def __init__(self, factor: int = 4, op: str = 'sum') -> None:
        """
        Args:
            factor: Channels in a group.
            op: 'sum', 'mean' or 'max'.

        Raises:
            ValueError: A factor that is not a whole number above zero or an unknown op, here; channels that factor
                does not divide, in `forward`.
        """
        super().__init__()
        check_whole_number('factor', factor)
        if op not in self.OPS:
            raise ValueError(f'op must be one of {", ".join(self.OPS)}, got {op!r}')
        self.factor = factor
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_groups(x.shape[1], self.factor)
        if self.op == 'max':
            members = x.unflatten(1, (-1, self.factor)).unbind(2)
            out = members[0]
            for i in range(1, self.factor):
                out = torch.maximum(out, members[i])
            return out
        out = self._sum(x)
        return out / self.factor if self.op == 'mean' else out

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # alone in its line: TorchScript then leaves the rest uncompiled
            if self.factor > 1 and type(x) is torch.Tensor and torch.is_grad_enabled() and not is_observed():
                return _GroupSum.apply(x, self.factor)
        return _sum_groups(x, self.factor)

    def extra_repr(self) -> str:
        return f'factor={self.factor}, op={self.op!r}'
