"""Channel aggregation, the third step of SEANet.

Source: `Global Feature Representation using Squeeze, Excite and Aggregation Networks (SEANet)`, MIND 2019, and the
authors' code, https://github.com/akhilesh-pandey/SEANet-pytorch
"""
import torch
from torch import nn

from ._checks import check_whole_number


def _check_groups(channels: int, factor: int) -> None:
    if channels % factor != 0:
        raise ValueError(f'factor must divide the number of channels, got factor {factor} for {channels} channels')


torch.fx.wrap('_check_groups')  # a check on shapes: fx tracing must not look into it


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
        # Elementwise over the members of a group: it keeps channels-last, where a reduction returns contiguous NCHW
        members = x.unflatten(1, (-1, self.factor)).unbind(2)
        out = members[0]
        for i in range(1, self.factor):
            if self.op == 'max':
                out = torch.maximum(out, members[i])
            else:  # into the first sum, not into a new tensor each: half the time on a CPU
                out = out + members[i] if i == 1 else out.add_(members[i])
        return out / self.factor if self.op == 'mean' else out

    def extra_repr(self) -> str:
        return f'factor={self.factor}, op={self.op!r}'
