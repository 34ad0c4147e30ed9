"""SaE in a live model, without changing what it computes: from SE (`lift`), from no attention (`add_attention`).

The module is not called lift, because a submodule of that name would take the place of the function in the package.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from timm.layers import EffectiveSEModule, SEModule
from timm.models import resnet
from timm.models.efficientnet import SqueezeExcite
from timm.models.senet import SEModule as OriginalSEModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torchvision.models import resnet as torchvision_resnet  # type: ignore[import-untyped]

from .layers import SqueezeAggregatedExcitation
from .layers._checks import check_whole_number
from .models.pretrained import AFFINE_NORMS

Model = TypeVar('Model', bound=nn.Module)


# ---- what a module may hide


class _Uses(NamedTuple):
    """Which places of one model hold each child, and each piece of memory."""

    places: Counter[int]  # names under which a module stands in others, by its id
    memory: dict[int, list[tuple[int, int]]]  # first and last byte of each tensor, by the address of its storage

    @classmethod
    def of(cls, model: nn.Module) -> '_Uses':
        places, memory = Counter[int](), dict[int, list[tuple[int, int]]]()
        for module in model.modules():
            places.update(id(child) for child in module._modules.values() if child is not None)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and (found := _memory_of(tensor)):
                    memory.setdefault(found[0], []).append(found[1])
        return cls(places, memory)

    def is_shared(self, parameter: nn.Parameter) -> bool:
        """Whether a second tensor, or the same under a second name, lies in the same memory, if only in part."""
        found = _memory_of(parameter)
        if found is None:
            return False
        first, last = found[1]
        return sum(start <= last and first <= end for start, end in self.memory[found[0]]) > 1


def _memory_of(tensor: torch.Tensor) -> tuple[int, tuple[int, int]] | None:
    """Address of a tensor's storage, and of its first and last byte; on the meta device, of an empty one, its id."""
    if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.layout != torch.strided:
        return id(tensor), (0, 0)
    if not tensor.data_ptr():
        return id(tensor), (0, 0)
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return tensor.untyped_storage().data_ptr(), (start, start + reach * tensor.element_size() - 1)


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


def _altered(
    module: nn.Module,
    parameters: Iterable[str] = (),
    children: Iterable[str] = (),
    buffers: Iterable[str] = (),
) -> str | None:
    """Why the module may do more than its class says, or None.

    Args:
        module: The module.
        parameters: Names of those that its class has; it may hold no others.
        children: Likewise.
        buffers: Likewise.
    """
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return 'has hooks'
    for name, value in vars(module).items():
        method = getattr(type(module), name, None)
        own = getattr(value, '__func__', None) is method and getattr(value, '__self__', None) is module
        if callable(method) and not own:  # its own is what accelerate leaves behind when it removes its hooks
            return f'has a {name} that is not of its class'
    surplus = [
        *(module._parameters.keys() - set(parameters)),
        *(module._modules.keys() - set(children)),
        *(module._buffers.keys() - set(buffers)),
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


def _has_replaced_forward(module: nn.Module) -> bool:
    """Whether its forward is not of its class. accelerate leaves the class's own behind when it removes its hooks."""
    forward = vars(module).get('forward')
    if forward is None or '_orig_mod' in module._modules:  # torch.compile's wrapper, which compiles anew when asked to
        return False
    of_class = getattr(forward, '__func__', None) is type(module).forward
    return not (of_class and getattr(forward, '__self__', None) is module)


def _places(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[nn.Module, list[str]]:
    """Each module of these kinds with every name under which it stands in the model."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            places.setdefault(module, []).append(name)
    return places


def _refuse_uncertain(
    model: nn.Module,
    places: Mapping[nn.Module, list[str]],
    why_not: Callable[[nn.Module, _Uses], str | None],
    cannot: str,
) -> None:
    """Raise a ValueError for the first of these modules that may compute something else once it is changed."""
    uses = _Uses.of(model)
    for module, names in places.items():
        reason = why_not(module, uses)
        around = next(filter(None, (_replaced_around(model, name) for name in names)), None)
        if around and not reason:
            reason = f'{around} has a forward that is not of its class, which may not call it'
        if reason:
            raise ValueError(f'{names[0] or "the module"} ({type(module).__name__}) cannot {cannot}: {reason}')


def _replaced_around(model: nn.Module, name: str) -> str | None:
    """The first module around `name` whose forward was replaced, so that it may not call what it holds; or None."""
    parts = name.split('.')[:-1]
    for around in ('.'.join(parts[:count]) for count in range(len(parts) + 1)):
        if name and _has_replaced_forward(model.get_submodule(around)):
            return around or 'the model'
    return None


def _kind(parameter: torch.Tensor) -> str:
    if type(parameter) is nn.Parameter:
        return f'{parameter.dtype}, {parameter.layout}'
    return type(parameter).__name__


def _check_arguments(model: nn.Module, reduction: int, cardinality: int) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f'model must be a torch.nn.Module, such as timm.create_model returns, got {model!r}')
    check_whole_number('reduction', reduction)
    check_whole_number('cardinality', cardinality)


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
    _check_arguments(model, reduction, cardinality)
    names = _places(model, SE_CLASSES)
    if not names:
        raise ValueError(f'{type(model).__name__} holds no SEModule or SqueezeExcite, so there is nothing to lift')
    _refuse_uncertain(model, names, _why_not_lifted, 'be lifted')
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
            model.get_submodule(parent)._modules[child] = se
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
        if uses.places[id(conv)] > 1 or any(uses.is_shared(p) for p in conv.parameters()):
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


@torch.inference_mode(False)  # parameters made in that mode could never be trained
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


# ---- SaE where there was no attention


class TorchvisionBasicBlock(torchvision_resnet.BasicBlock):  # type: ignore[misc]
    """torchvision's BasicBlock with attention, `se`, between the last norm and the sum. `add_attention` makes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        branch: torch.Tensor = self.relu(self.bn1(self.conv1(x)))
        branch = self.se(self.bn2(self.conv2(branch)))
        branch += x if self.downsample is None else self.downsample(x)
        branch = self.relu(branch)
        return branch


class TorchvisionBottleneck(torchvision_resnet.Bottleneck):  # type: ignore[misc]
    """torchvision's Bottleneck with attention, `se`, between the last norm and the sum. `add_attention` makes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        branch: torch.Tensor = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.se(self.bn3(self.conv3(branch)))
        branch += x if self.downsample is None else self.downsample(x)
        branch = self.relu(branch)
        return branch


# Each block: the names of its last conv and norm, and the class it has once it has attention. timm's own forward calls
# `se` where there is one, so timm's blocks stay timm's.
_BLOCKS: dict[type[nn.Module], tuple[str, str, type[nn.Module]]] = {
    resnet.BasicBlock: ('conv2', 'bn2', resnet.BasicBlock),
    resnet.Bottleneck: ('conv3', 'bn3', resnet.Bottleneck),
    torchvision_resnet.BasicBlock: ('conv2', 'bn2', TorchvisionBasicBlock),
    torchvision_resnet.Bottleneck: ('conv3', 'bn3', TorchvisionBottleneck),
}
BLOCK_CLASSES: tuple[type[nn.Module], ...] = tuple(_BLOCKS)


def add_attention(model: Model, reduction: int = 32, cardinality: int = 4) -> Model:
    """Put SaE into every residual block without attention, without changing what the model computes.

    The layer comes after the last norm of the residual branch, before the shortcut is added. Its second dense layer is
    zero, so each gate is sigmoid(0) = 1/2, and weight and bias of that norm are doubled. Both are exact in binary
    floating point, so the outputs stay the same to the last bit, in inference and in training, short of overflow and
    of float16's smallest numbers, below 6e-5. At 1/2 the sigmoid is steepest: the attention trains from the first step
    on.

    Names in the state dict stay, and `<block>.se.*` are new. A saved state dict loads into the model built again, with
    attention added again. Build the optimizer, and wrap or compile the model, afterwards.

    Args:
        model: A model made of the residual blocks of timm's ResNet, whatever its stem, shortcuts and norms, or of
            torchvision's. Changed in place. Blocks that have attention keep it; see `lift`.
        reduction: A branch has channels // reduction hidden units, and at least one.
        cardinality: Branches of each SaE.

    Returns:
        The model.

    Raises:
        ValueError: A model without such blocks, or with a block of which it is not certain that it stays the same: its
            last norm has no weight, or is shared, hooked, parametrized, frozen for good or quantized; or its class or
            forward is not timm's or torchvision's own. Says which and why; the model is unchanged then.
    """
    _check_arguments(model, reduction, cardinality)
    blocks = _places(model, BLOCK_CLASSES)
    without = {block: names for block, names in blocks.items() if getattr(block, 'se', None) is None}
    if not without:
        raise ValueError(
            f'every residual block of this {type(model).__name__} has attention'
            if blocks
            else f"{type(model).__name__} holds no residual block of timm's or torchvision's ResNet"
        )
    _refuse_uncertain(model, without, _why_no_attention, 'take attention')
    _refuse_parallel(model)

    plans = [(block, _last_affine(block), _idle_sae(block, reduction, cardinality)) for block in without]
    doubled = [(last, {name: _doubled(p) for name, p in last.named_parameters()}) for _, last, _ in plans]
    undo: list[Callable[[], object]] = []
    try:
        for last, parameters in doubled:
            for name, parameter in parameters.items():
                undo.append(partial(last._parameters.update, {name: last.get_parameter(name)}))
                setattr(last, name, parameter)
        for block, _, layer in plans:
            undo.append(partial(_take_attention, block, type(block), 'se' in vars(block)))
            block.se = layer
            block.__class__ = _BLOCKS[type(block)][2]
    except BaseException:  # a module's own __setattr__, or a hook's; or Ctrl-C
        for action in reversed(undo):  # past what may have raised it
            action()
        raise
    return model


@torch.inference_mode(False)
def _doubled(parameter: nn.Parameter) -> nn.Parameter:
    """A new parameter of twice the value: what holds the old one, such as an earlier state dict, keeps its value."""
    doubled = nn.Parameter(2 * parameter.detach(), requires_grad=parameter.requires_grad)
    vars(doubled).update(vars(parameter))  # such as marks for an optimizer
    return doubled


def _take_attention(block: nn.Module, kind: type[nn.Module], names_se: bool) -> None:
    """Make the block again what it was: of its class, and with or without a name `se` for what it has not."""
    object.__setattr__(block, '__class__', kind)
    block._modules.pop('se', None)
    if names_se:
        vars(block)['se'] = None


def _last_affine(block: nn.Module) -> nn.Module:
    """The last module of the residual branch: its norm, or its conv where the norm has been folded into that."""
    conv, norm, _ = _BLOCKS[type(block)]
    last: nn.Module = getattr(block, norm)
    return getattr(block, conv) if type(last) is nn.Identity else last


def _why_no_attention(block: nn.Module, uses: _Uses) -> str | None:
    """Why it is not certain that the block computes the same with attention, or None."""
    if type(block) not in _BLOCKS:
        return "its class is not timm's or torchvision's own"
    if _has_replaced_forward(block):
        return 'its forward is not that of its class'
    conv_name, norm_name, _ = _BLOCKS[type(block)]
    conv, norm = getattr(block, conv_name), getattr(block, norm_name)
    weight = getattr(conv, 'weight', None)
    if not isinstance(weight, torch.Tensor) or is_lazy(weight) or weight.dtype not in _DTYPES:
        return f'its {conv_name} is a {type(conv).__name__} without a plain floating-point weight'
    if type(norm) is nn.Identity:
        if _altered(norm):
            return f'its {norm_name} {_altered(norm)}'
        name, last, is_known = conv_name, conv, type(conv) is nn.Conv2d
    else:
        name, last, is_known = norm_name, norm, type(norm) in AFFINE_NORMS
    if not is_known:
        return f'its {name} is a {type(last).__name__}, of which it is not known that it ends with weight and bias'
    if getattr(last, 'weight', None) is None:
        return f'its {name} has no weight that could be doubled'
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    reason = _altered(last, parameters=('weight', 'bias'), buffers=buffers)
    if reason:
        return f'its {name} {reason}'
    if uses.places[id(last)] > 1 or any(uses.is_shared(p) for p in last.parameters()):
        return f'its {name} is shared with another module'
    for parameter in last.parameters():
        if any(size > 1 and step == 0 for size, step in zip(parameter.shape, parameter.stride(), strict=True)):
            return f'its {name} has a parameter whose elements share memory'
        if not parameter.is_meta and (2 * parameter.detach()).isinf().any():
            return f'twice the parameters of its {name} would overflow in {parameter.dtype}'
    return None


@torch.inference_mode(False)
def _idle_sae(block: nn.Module, reduction: int, cardinality: int) -> SqueezeAggregatedExcitation:
    weight: torch.Tensor = getattr(block, _BLOCKS[type(block)][0]).weight
    layer = SqueezeAggregatedExcitation(
        weight.shape[0], reduction, cardinality, device=weight.device, dtype=weight.dtype
    )
    nn.init.zeros_(layer.fc2.weight)
    nn.init.zeros_(layer.fc2.bias)
    return layer.train(block.training)
