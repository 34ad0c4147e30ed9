"""Squeeze Aggregated Excitation (SaE), the channel attention of SENetV2.

Paper: `SENetV2: Aggregated dense layer for channelwise and global representations` - https://arxiv.org/abs/2311.10807
With one branch it is `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507

The paper draws `cardinality` dense layers side by side, each with its activation, and concatenates them. Over the same
input that is one dense layer with the branches' rows stacked, exactly, and one matrix product instead of many. So it is
built that way: rows [k·d, (k+1)·d) of `fc1` are branch k.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ._checks import check_switch, check_whole_number
from ._eager import is_compiled, is_observed, is_plain

_WEIGHTS = ('fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias')
_GATES = {'sigmoid': nn.Sigmoid, 'hard_sigmoid': nn.Hardsigmoid, 'tanh': nn.Tanh}


_LINEAR_FORWARD = nn.Linear.forward
_FULL_PRECISION = (torch.float32, torch.float64)
_MANY_CHANNELS = 1024  # from here on, the product of one row with a weight is worth a second thread


def _is_one_row(x: torch.Tensor, *linears: nn.Module) -> bool:
    """Whether x is one row in float32 on a CPU, without autograd, and nobody can see how the linears are computed."""
    return (
        type(x) is torch.Tensor
        and not torch.is_grad_enabled()
        and (is_compiled() or not is_observed())  # before the next lines, which whoever observes would see
        and x.is_cpu
        and len(x) == 1
        and x.dtype == torch.float32
        and all(is_plain(m, nn.Linear, _LINEAR_FORWARD) and m.weight.dtype == x.dtype for m in linears)
    )


def _linear_of_one_row(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """`linear(x)` as a product and a sum, which all threads share; a matrix times one vector runs on one."""
    out = (linear.weight * x).sum(1)[None]
    return out if linear.bias is None else out.add_(linear.bias)


class SqueezeAggregatedExcitation(nn.Module):
    """Rescale each channel by a gate computed from the means of all channels.

    With z the (N, C) channel means of x: `s = gate(fc2(act(fc1(z))))`, and the output is `x · s`, as in the paper's
    formula. The author's Keras code computes `x + x · s` instead: `add_identity=True`.

    Shapes: (N, C, H, W) in, the same out, in the same memory format; N may be 0.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 32,
        cardinality: int = 4,
        rd_channels: int | None = None,
        bias: bool = True,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        gate_layer: str | Callable[[], nn.Module] = 'sigmoid',
        add_identity: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            channels: C, the channels of the input.
            reduction: A branch has C // reduction hidden units, and at least one.
            cardinality: Number of branches. 1 is plain squeeze-and-excitation.
            rd_channels: Hidden units of one branch, in place of C // reduction.
            bias: Whether both dense layers have biases.
            act_layer: Activation between the dense layers, a module class.
            gate_layer: Activation after them: 'sigmoid', 'hard_sigmoid', 'tanh', or a module class.
            add_identity: Return x + x · s, the author's Keras form.
            device: Device of the parameters.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: A size that is not a whole number above zero, an unknown gate, an activation that is no module
                class, or a switch that is neither True nor False; names argument and value.
        """
        super().__init__()
        check_whole_number('channels', channels)
        check_whole_number('reduction', reduction)
        check_whole_number('cardinality', cardinality)
        if rd_channels is None:
            rd_channels = max(1, channels // reduction)
        check_whole_number('rd_channels', rd_channels)
        if isinstance(gate_layer, str):
            if gate_layer not in _GATES:
                raise ValueError(f'gate_layer must be one of {", ".join(_GATES)} or a module class, got {gate_layer!r}')
            gate_layer = _GATES[gate_layer]
        for name, layer in (('act_layer', act_layer), ('gate_layer', gate_layer)):
            if not callable(layer):
                raise ValueError(f'{name} must be a module class, got {layer!r}')
        check_switch('bias', bias)
        check_switch('add_identity', add_identity)
        self.channels = channels
        self.cardinality = cardinality
        self.rd_channels = rd_channels
        self.add_identity = add_identity

        # nn.Linear's default initialisation depends on fan-in alone, so stacking the branches' rows leaves it unchanged
        self.fc1 = nn.Linear(channels, cardinality * rd_channels, bias=bias, device=device, dtype=dtype)
        self.act = act_layer()
        self.fc2 = nn.Linear(cardinality * rd_channels, channels, bias=bias, device=device, dtype=dtype)
        self.gate_act = gate_layer()

    @classmethod
    def from_branches(
        cls,
        branch_weights: Sequence[torch.Tensor],
        out_weight: torch.Tensor,
        branch_biases: Sequence[torch.Tensor] | None = None,
        out_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> 'SqueezeAggregatedExcitation':
        """Build the layer from the separate dense layers of the paper's figure.

        Args:
            branch_weights: c tensors W_k of shape (d, C).
            out_weight: V, of shape (C, c·d), its columns in the order of the branches.
            branch_biases: c tensors b_k of shape (d,), or None for a layer without biases.
            out_bias: v, of shape (C,). Given together with `branch_biases`, or not at all.
            **kwargs: act_layer, gate_layer, add_identity.

        Raises:
            ValueError: No branches, shapes that do not belong together, or biases on one side only.
        """
        weights = list(branch_weights)
        if not weights or any(w.ndim != 2 or w.shape != weights[0].shape for w in weights):
            raise ValueError(
                'branch_weights must be one or more (d, C) tensors of one shape, '
                f'got shapes {[tuple(w.shape) for w in weights]}'
            )
        d, channels = weights[0].shape
        if tuple(out_weight.shape) != (channels, len(weights) * d):
            raise ValueError(
                f'out_weight must have shape {(channels, len(weights) * d)} for {len(weights)} branches of shape '
                f'{(d, channels)}, got {tuple(out_weight.shape)}'
            )
        if (branch_biases is None) != (out_bias is None):
            raise ValueError('branch_biases and out_bias must be given together, or neither')
        if branch_biases is not None:
            shapes = [tuple(b.shape) for b in branch_biases]
            if shapes != [(d,)] * len(weights):
                raise ValueError(f'branch_biases must be {len(weights)} tensors of shape {(d,)}, got shapes {shapes}')
            assert out_bias is not None
            if tuple(out_bias.shape) != (channels,):
                raise ValueError(f'out_bias must have shape {(channels,)}, got {tuple(out_bias.shape)}')

        layer = cls(
            channels,
            cardinality=len(weights),
            rd_channels=d,
            bias=branch_biases is not None,
            device=out_weight.device,
            dtype=out_weight.dtype,
            **kwargs,
        )
        with torch.no_grad():
            layer.fc1.weight.copy_(torch.cat(weights))
            layer.fc2.weight.copy_(out_weight)
            if branch_biases is not None and out_bias is not None:
                layer.fc1.bias.copy_(torch.cat(list(branch_biases)))
                layer.fc2.bias.copy_(out_bias)
        return layer

    @torch.no_grad()
    def embed(self, se_state: Mapping[str, torch.Tensor], prefix: str = '') -> dict[str, torch.Tensor]:
        """The state dict with which this layer computes exactly what an SE layer does.

        The SE layer's d' hidden units become the first of this layer's. The other columns of `fc2` are zero, so
        that they add nothing; their rows of `fc1` stay as this layer has them, so that gradients reach those columns.

        Args:
            se_state: `fc1.weight` (d', C), `fc1.bias` (d',), `fc2.weight` (C, d') and `fc2.bias` (C,), the weights also
                as those of 1x1 convs; no biases for a layer without biases. Other entries are ignored.
            prefix: Precedes these names in `se_state` and in the result.

        Returns:
            The layer's state dict, in the layer's dtype and on its device; the layer itself is unchanged.

        Raises:
            RuntimeError: Weights that are not those of an SE layer over C channels with at most as many hidden units as
                this layer; names the first tensor that is missing or does not fit, and the shapes. Or a layer with
                `add_identity`, which has no such weights.
        """
        if self.add_identity:
            raise RuntimeError(
                f'{prefix}fc1.weight cannot be lifted into a layer with add_identity: '
                'x + x · s is another function than x · s of SE'
            )
        own = self.state_dict()
        hidden, channels = own['fc1.weight'].shape
        given = {name: se_state[prefix + name] for name in _WEIGHTS if prefix + name in se_state}
        units = min(hidden, len(given.get('fc1.weight', ())))
        shapes = dict(zip(_WEIGHTS, ((units, channels), (units,), (channels, units), (channels,)), strict=True))

        embedded = {}
        for name, shape in shapes.items():
            if name not in own and name not in given:
                continue
            if name not in given:
                raise RuntimeError(f'{prefix}{name} is missing; its shape in this layer is {tuple(own[name].shape)}')
            if name not in own:
                raise RuntimeError(f'{prefix}{name}, of shape {tuple(given[name].shape)}, has no place: no biases here')
            tensor = given[name]
            if tensor.shape[2:] == (1, 1):
                tensor = tensor.flatten(1)
            if tensor.shape != shape:
                raise RuntimeError(
                    f'{prefix}{name} has the shape {tuple(given[name].shape)}, and {shape} is what a layer with '
                    f'{channels} channels and room for {hidden} hidden units can take'
                )
            fresh = own[name]
            full = torch.zeros_like(fresh) if name == 'fc2.weight' else fresh.clone()
            full[tuple(map(slice, shape))] = tensor.to(full)
            embedded[prefix + name] = full
        return embedded

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """z, the channel means, (N, C), of x, (N, C, H, W)."""
        if not torch.jit.is_scripting():  # alone in its line: TorchScript then leaves the rest uncompiled
            if type(x) is torch.Tensor and torch.is_grad_enabled() and x.dtype in _FULL_PRECISION and not is_observed():
                # The gradient of a sum is a view of one number a channel, that of a mean is written out. In half
                # precision the sum would be rounded once more
                return x.sum((2, 3)) / (x.shape[2] * x.shape[3])
        # ExecuTorch's XNNPACK takes no mean that drops dimensions: with one, each block would leave and enter it again
        return x.mean((2, 3), keepdim=True).flatten(1)

    def gate(self, pooled: torch.Tensor) -> torch.Tensor:
        """s, (N, C), from the channel means, (N, C)."""
        if not torch.jit.is_scripting():  # alone in its line: TorchScript then leaves the rest uncompiled
            if self.channels >= _MANY_CHANNELS and _is_one_row(pooled, self.fc1, self.fc2):
                return self.gate_act(_linear_of_one_row(self.act(_linear_of_one_row(pooled, self.fc1)), self.fc2))
        return self.gate_act(self.fc2(self.act(self.fc1(pooled))))

    def scale(self, pooled: torch.Tensor) -> torch.Tensor:
        """What `forward` multiplies x by: s, or 1 + s with `add_identity`. (N, C) from the channel means, (N, C).

        For a block that fuses the multiplication with other work.
        """
        s = self.gate(pooled)
        return 1 + s if self.add_identity else s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # an ellipsis, because torch 2.5 cannot export slices of a dynamic batch
        return x * self.scale(self.squeeze(x))[..., None, None]

    def extra_repr(self) -> str:
        text = f'{self.channels}, cardinality={self.cardinality}, rd_channels={self.rd_channels}'
        return text + ', add_identity=True' if self.add_identity else text
