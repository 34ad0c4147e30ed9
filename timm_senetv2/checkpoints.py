"""Foreign weights into ours: the SEANet authors' checkpoints, SaE stored branch by branch."""

import pickle
import re
from collections.abc import Mapping
from os import PathLike
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import nn

from .layers import SqueezeAggregatedExcitation
from .models.pretrained import lift_state_dict

_SEANET_LAYOUTS = {
    "the SEANet authors' for CIFAR-10": {'epoch', 'weight'},
    "the SEANet authors' for CIFAR-100": {'epoch', 'state_dict', 'best_acc1'},
}


class Checkpoint(NamedTuple):
    """What `read_checkpoint` finds in a file."""

    state_dict: dict[str, torch.Tensor]
    layout: str
    """The file's form in words."""
    epoch: int | None = None
    best_acc1: float | None = None
    """Best test accuracy, %, as the file has it."""


def read_checkpoint(path: str | PathLike) -> Checkpoint:
    """Read a foreign checkpoint: the SEANet authors' CIFAR-10 or CIFAR-100 form, or a state dict by itself.

    Args:
        path: A `torch.save` file, of any PyTorch version, or a `.safetensors` file. It is never unpickled freely.

    Raises:
        ValueError: A file that is damaged, that needs more than `weights_only=True` allows, or without a state dict.
        OSError: A file that cannot be opened.
    """
    with open(path, 'rb'):  # torch reports a missing file in several ways
        pass
    try:
        content = (
            load_file(path)
            if str(path).endswith('.safetensors')
            else torch.load(path, map_location='cpu', weights_only=True)
        )
    except Exception as e:  # bytes that are no checkpoint can fail in any way
        needs = re.search(r'GLOBAL (\S+)', str(e)) if isinstance(e, pickle.UnpicklingError) else None
        if needs is None:
            raise ValueError(f'{path} is not a checkpoint, or it is damaged') from e
        raise ValueError(
            f'{path} is refused: reading it would run {needs[1]}, and a file of weights needs no code. '
            'If you trust it, load it where it was made and save its state dict alone'
        ) from e

    if not isinstance(content, Mapping):
        raise ValueError(f'{path} holds a {type(content).__name__}, not weights by name')
    wrapper = next((key for key in ('weight', 'state_dict') if isinstance(content.get(key), Mapping)), None)
    state_dict = content if wrapper is None else content[wrapper]
    if not state_dict or not all(torch.is_tensor(value) for value in state_dict.values()):
        raise ValueError(f'{path} holds no state dict; its keys are {", ".join(map(str, list(content)[:8])) or "none"}')
    if wrapper is None:
        return Checkpoint(clean_state_dict(state_dict), 'a state dict')
    layout = next((name for name, keys in _SEANET_LAYOUTS.items() if keys <= content.keys()), 'a training checkpoint')
    epoch, best_acc1 = content.get('epoch'), content.get('best_acc1')
    return Checkpoint(
        clean_state_dict(state_dict),
        f'{layout}: {", ".join(content)}',
        None if epoch is None else int(epoch),
        None if best_acc1 is None else float(best_acc1),
    )


def convert_state_dict(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Foreign weights under the names and in the shapes of one of our models.

    Trunk tensors go by their names, which are torchvision's in the published code. Attention goes by structure: within
    a block, one or more dense layers C to d, in the order of their names, and one layer from all of their outputs to C,
    whatever they are called. One is SE, as the SEANet authors store it (`se.fc.0`, `se.fc.2`); four are SaE as
    unofficial PyTorch ports store it (`fc1.0` to `fc4.0`, and `fc.0`). Layers without biases get biases of zero.

    Args:
        state_dict: The foreign weights; unchanged.
        model: The model to convert for; unchanged.

    Returns:
        A complete state dict of the model.

    Raises:
        ValueError: Names or shapes that do not match; names the first on each side.
        RuntimeError: Attention that has no room in the model; see `lift_state_dict`.
    """
    own = model.state_dict()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SqueezeAggregatedExcitation)}
    trunk = [key for key in own if not key.startswith(tuple(f'{name}.' for name in layers))]
    converted = {key: state_dict[key] for key in trunk if key in state_dict}
    foreign = {key: tensor for key, tensor in state_dict.items() if key not in converted}
    for name, layer in layers.items():
        block = name.rpartition('.')[0] + '.'
        dense = _fused({key: foreign[key] for key in foreign if key.startswith(block)}, layer.channels)
        if dense is not None:
            converted.update({f'{name}.{key}': tensor for key, tensor in dense.items()})
            foreign = {key: tensor for key, tensor in foreign.items() if not key.startswith(block)}

    missing = [key for key in own if key not in converted]
    if foreign or missing:
        raise ValueError(
            f'the weights are not those of this model: {_first(foreign, foreign)} is in the file only, '
            f'{_first(missing, own)} in the model only'
        )
    for key in trunk:
        if converted[key].shape != own[key].shape:
            shapes = tuple(converted[key].shape), tuple(own[key].shape)
            raise ValueError(f'{key} has the shape {shapes[0]} in the file and {shapes[1]} in the model')
    return lift_state_dict(converted, model)


def _first(keys, tensors: Mapping[str, torch.Tensor]) -> str:
    return next((f'{key} {tuple(tensors[key].shape)}' for key in keys), 'nothing')


def _natural(key: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', key)]


def _fused(tensors: Mapping[str, torch.Tensor], channels: int) -> dict[str, torch.Tensor] | None:
    """The dense layers of one attention as `fc1` and `fc2`, or None where they are not of the known structure."""
    names = [key for key in sorted(tensors, key=_natural) if key.endswith('.weight') and tensors[key].ndim > 1]
    weights = {key: tensors[key].flatten(1) for key in names}
    branches = [key for key, w in weights.items() if w.shape[1] == channels > w.shape[0]]
    outputs = [key for key, w in weights.items() if w.shape[0] == channels]
    if not branches or len(outputs) != 1 or len(weights) != len(branches) + 1:
        return None
    first, second = torch.cat([weights[key] for key in branches]), weights[outputs[0]]
    if len({weights[key].shape for key in branches}) > 1 or second.shape[1] != len(first):
        return None
    biases = [key.removesuffix('weight') + 'bias' for key in (*branches, *outputs)]
    if tensors.keys() == weights.keys():
        fc1_bias, fc2_bias = first.new_zeros(len(first)), second.new_zeros(channels)
    elif tensors.keys() == {*weights, *biases}:
        fc1_bias, fc2_bias = torch.cat([tensors[key] for key in biases[:-1]]), tensors[biases[-1]]
    else:
        return None
    return {'fc1.weight': first, 'fc1.bias': fc1_bias, 'fc2.weight': second, 'fc2.bias': fc2_bias}
