"""SE of any timm model into SaE, without changing what the model computes: `lift`.

The module is not called lift, because a submodule of that name would take the place of the function in the package.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from timm.layers import EffectiveSEModule, SEModule
from timm.models.efficientnet import SqueezeExcite
from timm.models.senet import SEModule as OriginalSEModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .layers import SqueezeAggregatedExcitation
from .layers._checks import check_whole_number

Model = TypeVar('Model', bound=nn.Module)


# ---- what a module may hide


class _Uses(NamedTuple):
    """How many modules hold each child, and how many places hold each parameter, in one model."""

    parents: Counter[int]
    holders: Counter[tuple[str, int]]

    @classmethod
    def of(cls, model: nn.Module) -> '_Uses':
        parents, holders = Counter[int](), Counter[tuple[str, int]]()
        for module in model.modules():
            parents.update({id(child) for child in module.children()})
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders.update(_identities(parameter))
        return cls(parents, holders)

    def is_shared(self, parameter: nn.Parameter) -> bool:
        return any(self.holders[identity] > 1 for identity in _identities(parameter))


def _identities(parameter: nn.Parameter) -> list[tuple[str, int]]:
    """The object, and its memory where it has any: two parameters may share that too."""
    found = [('object', id(parameter))]
    if type(parameter) is nn.Parameter and parameter.layout == torch.strided and parameter.data_ptr():
        found.append(('memory', parameter.data_ptr()))
    return found


# torch tells nothing of hooks in public
_HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
    '_state_dict_hooks',
    '_state_dict_pre_hooks',
    '_load_state_dict_pre_hooks',
    '_load_state_dict_post_hooks',
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _altered(module: nn.Module, parameters: Iterable[str] = (), children: Iterable[str] = ()) -> str | None:
    """Why the module may do more than its class says, or None.

    Args:
        module: One that holds no parameters but those named and no children but those named.
        parameters: Names.
        children: Names.
    """
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return 'has hooks'
    replaced = next((name for name in vars(module) if callable(getattr(type(module), name, None))), None)
    if replaced is not None:
        return f'has a {replaced} that is not of its class'
    surplus = [
        *(module._parameters.keys() - set(parameters)),
        *(module._modules.keys() - set(children)),
        *module._buffers.keys(),
    ]
    if surplus:
        return f'also holds {min(surplus)}, as pruned, normalised and wrapped modules do'
    for name in parameters:
        parameter = module._parameters.get(name)
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter or parameter.layout != torch.strided or parameter.dtype not in _DTYPES:
            return f'has a {name} that is not a plain floating-point parameter but a {_kind(parameter)}'
        if parameter._backward_hooks or getattr(parameter, '_post_accumulate_grad_hooks', None):
            return f'has a {name} whose gradient has hooks'
    return None


def _kind(parameter: torch.Tensor) -> str:
    if type(parameter) is nn.Parameter:
        return f'{parameter.dtype}, {parameter.layout}'
    return type(parameter).__name__


def _refuse_parallel(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f'{name or "the model"} is wrapped in DistributedDataParallel, which would not see the new parameters; '
                'change the model first and wrap it then'
            )


# ---- SE into SaE

# The names each of timm's SE classes has for: first dense layer, activation, second dense layer, gate
_SE_PARTS: dict[type[nn.Module], tuple[str, str, str, str]] = {
    SEModule: ('fc1', 'act', 'fc2', 'gate'),
    SqueezeExcite: ('conv_reduce', 'act1', 'conv_expand', 'gate'),
    OriginalSEModule: ('fc1', 'relu', 'fc2', 'sigmoid'),
}
SE_CLASSES: tuple[type[nn.Module], ...] = (*_SE_PARTS, EffectiveSEModule)

# Activations that treat each number by itself, so that more hidden units and other shapes change nothing: torch's own,
# and timm's versions of them. RReLU is not among them: it draws random numbers, one for each hidden unit.
_ELEMENTWISE = {
    *('CELU', 'ELU', 'GELU', 'Hardshrink', 'Hardsigmoid', 'Hardswish', 'Hardtanh', 'Identity', 'LeakyReLU'),
    *('LogSigmoid', 'Mish', 'PReLU', 'ReLU', 'ReLU6', 'SELU', 'SiLU', 'Sigmoid', 'Softplus', 'Softshrink', 'Softsign'),
    *('Tanh', 'Tanhshrink', 'Threshold'),
    *('GELUTanh', 'HardMish', 'HardMishMe', 'HardSigmoid', 'HardSigmoidMe', 'HardSwish', 'HardSwishMe', 'MishMe'),
    *('QuickGELU', 'Swish', 'SwishMe'),
}
_ELEMENTWISE_MODULES = (
    'torch.nn.modules.activation',
    'torch.nn.modules.linear',
    'timm.layers.activations',
    'timm.layers.activations_me',
)


def lift(model: Model, reduction: int = 32, cardinality: int = 4) -> Model:
    """Put SaE in the place of every SE layer of a timm model, without changing what the model computes.

    An SE layer with d' hidden units over C channels becomes SaE with `cardinality` branches of C // reduction hidden
    units each, or of ceil(d' / cardinality) where that is more, which takes all of SE's. Hidden units beyond d' add
    nothing yet and train from the first step on. Activation, gate, dtype, device, training mode and which parameters
    require gradients stay. The parameters are new ones: build the optimizer, and wrap the model, afterwards.

    Args:
        model: A model of any family whose attention is timm's `SEModule` or `SqueezeExcite`. Changed in place. timm
            rebuilds a model from its name, with SE, so build and lift again before loading the result's state dict.
        reduction: See above.
        cardinality: Branches of each SaE.

    Returns:
        The model; or the SaE layer, if `model` is itself an SE layer.

    Raises:
        ValueError: A model without SE layers, or with one of which it is not certain that SaE computes the same: a norm
            or a maximum inside, an activation that is not elementwise, hooks, a replaced `forward`, pruned, quantized
            or parametrized parts, weights shared with other layers. Says which and why; the model is unchanged then.
    """
    check_whole_number('reduction', reduction)
    check_whole_number('cardinality', cardinality)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SE_CLASSES):
            names.setdefault(module, []).append(name)
    if not names:
        raise ValueError(f'{type(model).__name__} holds no SEModule or SqueezeExcite, so there is nothing to lift')
    uses = _Uses.of(model)
    for se, (name, *_) in names.items():
        reason = _why_not_lifted(se, uses)
        if reason:
            raise ValueError(f'{name or "the layer"} ({type(se).__name__}) cannot be lifted: {reason}')
    _refuse_parallel(model)

    layers = {se: _sae_like(se, reduction, cardinality) for se in names}
    if model in layers:
        return layers[model]  # type: ignore[return-value]
    places = [(se, *name.rpartition('.')[::2]) for se in names for name in names[se]]
    try:
        for se, parent, child in places:
            setattr(model.get_submodule(parent), child, layers[se])
    except BaseException:  # a parent's own __setattr__, or Ctrl-C
        for se, parent, child in places:
            setattr(model.get_submodule(parent), child, se)
        raise
    return model


def _why_not_lifted(se: nn.Module, uses: _Uses) -> str | None:
    """Why it is not certain that SaE computes what this layer does, or None."""
    if isinstance(se, EffectiveSEModule):
        return 'it has one dense layer where SE has two'
    if type(se) not in _SE_PARTS:
        return "its class is not timm's own"
    names = _SE_PARTS[type(se)]
    reason = _altered(se, children=(*names, 'bn'))
    if reason:
        return f'it {reason}'
    norm = getattr(se, 'bn', None)
    if norm is not None and type(norm) is not nn.Identity:
        return f'it has a {type(norm).__name__} between its dense layers'
    if norm is not None and (reason := _altered(norm)):
        return f'its bn {reason}'
    if getattr(se, 'add_maxpool', False):
        return 'it squeezes with the maximum as well as the mean'

    first, act, second, gate = _parts(se)
    for name, conv in ((names[0], first), (names[2], second)):
        if type(conv) is not nn.Conv2d:
            found = f'{type(conv).__module__}.{type(conv).__qualname__}'
            return f'its {name} is a {found}, not a plain 1x1 convolution'
        if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.padding not in ((0, 0), 'valid'):
            return f'its {name} is not a plain 1x1 convolution'
        reason = _altered(conv, parameters=('weight', 'bias'))
        if reason:
            return f'its {name} {reason}'
        if uses.parents[id(conv)] > 1 or any(uses.is_shared(p) for p in conv.parameters()):
            return f'its {name} shares its weights with another layer'
    assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    if (first.bias is None) != (second.bias is None):
        return f'only its {names[0] if first.bias is not None else names[2]} has a bias'
    hidden, channels = first.weight.shape[:2]
    shapes = [(hidden, channels, 1, 1), (channels, hidden, 1, 1)]
    if [first.weight.shape, second.weight.shape] != shapes or first.in_channels != channels:
        return f'its {names[0]} and {names[2]} do not belong together'
    if len({(p.dtype, p.device) for p in (*first.parameters(), *second.parameters())}) > 1:
        return 'its parameters differ in dtype or device'

    for name, activation in ((names[1], act), (names[3], gate)):
        kind = type(activation)
        if kind.__name__ not in _ELEMENTWISE or kind.__module__ not in _ELEMENTWISE_MODULES:
            return f'its {name} is a {kind.__name__}, of which it is not known that it treats each number by itself'
        reason = _altered(activation, parameters=('weight',))
        if reason:
            return f'its {name} {reason}'
        if isinstance(activation, nn.PReLU) and activation.weight.numel() > 1:
            return f'its {name} is a PReLU with a slope for each channel, and SaE has other hidden units'
    return None


def _parts(se: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    first, act, second, gate = _SE_PARTS[type(se)]
    return getattr(se, first), getattr(se, act), getattr(se, second), getattr(se, gate)


def _sae_like(se: nn.Module, reduction: int, cardinality: int) -> SqueezeAggregatedExcitation:
    first, act, second, gate = _parts(se)
    assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    layer = SqueezeAggregatedExcitation(
        first.in_channels,
        cardinality=cardinality,
        rd_channels=max(1, first.in_channels // reduction, math.ceil(first.out_channels / cardinality)),
        bias=first.bias is not None,
        act_layer=lambda: act,
        gate_layer=lambda: gate,
        device=first.weight.device,
        dtype=first.weight.dtype,
    )
    parts = (('fc1', first, layer.fc1), ('fc2', second, layer.fc2))
    given = {f'{ours}.{name}': p for ours, conv, _ in parts for name, p in conv.named_parameters()}
    layer.load_state_dict({**layer.state_dict(), **layer.embed(given)})
    for name, parameter in given.items():
        layer.get_parameter(name).requires_grad_(parameter.requires_grad)
    layer.training = se.training  # not layer.train(): activation and gate are SE's own and stay as they are
    for _, conv, linear in parts:
        linear.training = conv.training
    return layer
