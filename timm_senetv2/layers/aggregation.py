"""Channel aggregation, the third step of SEANet.

Source: `Global Feature Representation using Squeeze, Excite and Aggregation Networks (SEANet)`, MIND 2019, and the
authors' code, https://github.com/akhilesh-pandey/SEANet-pytorch
"""

from typing import Any, cast

import torch
from torch import nn

from ._checks import check_whole_number
from ._eager import is_observed


def _check_groups(channels: int, factor: int) -> None:
    if channels % factor != 0:
        raise ValueError(f'factor must divide the number of channels, got factor {factor} for {channels} channels')


def _widen(x: torch.Tensor) -> torch.Tensor:
    # The sum of a group is rounded once, and a mean cannot overflow on the way
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def _narrow(sums: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sums if sums.dtype == x.dtype else sums.to(x.dtype)


# Checks on shapes and dtypes: fx tracing must not look into them
torch.fx.wrap('_check_groups')
torch.fx.wrap('_widen')
torch.fx.wrap('_narrow')


def _aggregate(x: torch.Tensor, factor: int, mean: bool, in_place: bool) -> torch.Tensor:
    """The sum or mean of each group, in new memory."""
    # Elementwise over the members of a group: it keeps channels-last, where a reduction returns contiguous NCHW
    members: list[torch.Tensor] = x.unflatten(1, (-1, factor)).unbind(2)
    if factor == 1:
        return members[0].clone()
    out = _widen(members[0]) + members[1]
    for i in range(2, factor):  # into the first sum, not into a new tensor each: half the time on a CPU
        out = out.add_(members[i]) if in_place else out + members[i]
    if mean:
        out = out.div_(factor) if in_place else out / factor
    return _narrow(out, x)


class _Aggregate(torch.autograd.Function):
    """`_aggregate` with a gradient that is written once, where autograd's own puts the members' together."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: int, mean: bool) -> torch.Tensor:
        ctx.factor, ctx.mean = factor, mean
        ctx.channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return _aggregate(x, factor, mean, in_place=True)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grads[0] / ctx.factor if ctx.mean else grads[0]
        n, groups, height, width = grad.shape
        if ctx.channels_last:
            grad = grad.permute(0, 2, 3, 1)[..., None].expand(-1, -1, -1, -1, ctx.factor)
            return grad.reshape(n, height, width, groups * ctx.factor).permute(0, 3, 1, 2), None, None
        grad = grad[:, :, None].expand(-1, -1, ctx.factor, -1, -1)
        return grad.reshape(n, groups * ctx.factor, height, width), None, None


class ChannelAggregation(nn.Module):
    """Replace each group of `factor` consecutive channels by their sum, mean or maximum.

    Shapes: (N, C, H, W) in, (N, C / factor, H, W) out, in the same memory format and dtype; N may be 0. The output is
    always new memory, with factor 1 a copy. Half precision is summed in float32 and rounded once. No parameters.
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
            members: list[torch.Tensor] = x.unflatten(1, (-1, self.factor)).unbind(2)
            out = members[0].clone() if self.factor == 1 else members[0]
            for i in range(1, self.factor):
                out = torch.maximum(out, members[i])
            return out
        if not torch.jit.is_scripting():  # alone in its line: TorchScript then leaves the rest uncompiled
            if type(x) is torch.Tensor and not is_observed():  # nobody can see the sums that are written into
                if torch.is_grad_enabled():
                    return cast(torch.Tensor, _Aggregate.apply(x, self.factor, self.op == 'mean'))
                return _aggregate(x, self.factor, self.op == 'mean', in_place=True)
        return _aggregate(x, self.factor, self.op == 'mean', in_place=False)

    def extra_repr(self) -> str:
        return f'factor={self.factor}, op={self.op!r}'
