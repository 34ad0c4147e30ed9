"""Weight files: read whatever form they have, foreign layouts into ours, and written as timm loads them."""

import json
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict, save_for_hf
from torch import nn

from .errors import UserError, one_line, printable, why
from .layers import SqueezeAggregatedExcitation
from .models.pretrained import lift_state_dict

Number = TypeVar('Number', int, float)

_SEANET_LAYOUTS = {
    "the SEANet authors' for CIFAR-10": {'epoch', 'weight'},
    "the SEANet authors' for CIFAR-100": {'epoch', 'state_dict', 'best_acc1'},
}
_WRAPPERS = ('state_dict', 'model', 'weight')
_AVERAGED = ('state_dict_ema', 'model_ema')


class Checkpoint(NamedTuple):
    """What `read_checkpoint` finds in a file."""

    state_dict: dict[str, torch.Tensor]
    layout: str
    """The file's form in words."""
    epoch: int | None = None
    best_acc1: float | None = None
    """Best test accuracy, %, as the file has it."""
    arguments: Mapping[str, Any] = MappingProxyType({})
    """What timm's train.py was called with, as far as the file has it."""


def read_checkpoint(path: str | PathLike[str], ema: bool = False) -> Checkpoint:
    """Read weights: of timm's train.py, in the SEANet authors' CIFAR-10 or CIFAR-100 form, or a state dict by itself.

    Args:
        path: A `torch.save` file, of any PyTorch version, or a `.safetensors` file. It is never unpickled freely.
        ema: Take the averaged weights that timm's train.py keeps beside the others.

    Raises:
        UserError: A file that is not there or damaged, that needs more than `weights_only=True` allows, or without
            plain tensors by name; names the first that is not.
    """
    path, shown = Path(path), printable(path)
    content = _load(path, shown)
    if not isinstance(content, Mapping):
        raise UserError(f'{shown} holds no state dict but a {type(content).__name__}')
    wrapper = next((key for key in (_AVERAGED if ema else _WRAPPERS) if isinstance(content.get(key), Mapping)), None)
    if ema and wrapper is None:
        raise UserError(f'{shown} holds no averaged (EMA) weights; leave --ema out')
    state_dict = content if wrapper is None else content[wrapper]
    if not state_dict or (wrapper is None and not any(isinstance(value, torch.Tensor) for value in content.values())):
        keys = ', '.join(printable(key, limit=40) for key in list(content)[:8])
        raise UserError(f'{shown} holds no state dict; its keys are {keys or "none"}')
    for key, tensor in state_dict.items():
        if not isinstance(key, str):
            raise UserError(f'{shown} holds no state dict: its key {printable(key, limit=40)} is not a name')
        reason = _why_no_weight(tensor)
        if reason:
            raise UserError(f'{shown} holds no state dict: its {printable(key)!r} {reason}')
    state_dict = clean_state_dict(dict(state_dict))
    if wrapper is None:
        return Checkpoint(state_dict, 'a state dict')
    layout = next((name for name, keys in _SEANET_LAYOUTS.items() if keys <= content.keys()), 'a training checkpoint')
    keys = ', '.join(printable(key, limit=40) for key in list(content)[:12])
    return Checkpoint(
        state_dict,
        f'{layout}: {keys}{", the averaged weights" if ema else ""}',
        _number(content.get('epoch'), int),
        _number(content.get('best_acc1'), float),
        _arguments(content.get('args')),
    )


def load_weights(model: nn.Module, checkpoint: Checkpoint, source: str) -> None:
    """Put the weights of a checkpoint into one of our models, converting them where they are of a foreign layout.

    Args:
        model: Changed in place, unless this raises.
        checkpoint: From `read_checkpoint`.
        source: What to call the checkpoint, such as its path.

    Raises:
        UserError: Weights that do not fit, or are not finite; names the first on each side.
    """
    name = model.pretrained_cfg['architecture']  # type: ignore[index]  # torch: Tensor | Module
    shown = printable(source)
    own = model.state_dict()
    try:
        state_dict = convert_state_dict(checkpoint.state_dict, model)
    except (RuntimeError, ValueError) as e:
        raise UserError(f'{shown} does not fit {name}: {one_line(e)}') from None
    for key, tensor in state_dict.items():
        kinds = [t.is_floating_point() or t.is_complex() for t in (tensor, own[key])]
        if kinds[0] != kinds[1] or tensor.is_complex():
            types = [str(t.dtype).removeprefix('torch.') for t in (tensor, own[key])]
            raise UserError(f'{shown} does not fit {name}: its {key} holds {types[0]} where {types[1]} belongs')
        if not tensor.to(own[key].dtype).isfinite().all():
            raise UserError(f'{shown}: {key} holds NaN or infinity: the training diverged')
    model.load_state_dict(state_dict)


def save(model: nn.Module, folder: Path, **kwargs: Any) -> None:
    """timm's `save_for_hf`, in safetensors, and so that transformers loads it too.

    timm 1.0.31 records `num_classes` among the model's arguments as well as beside them, and transformers' TimmWrapper
    passes both to `create_model`, which refuses that. timm itself takes the one beside them. What
    `model_config` sets to None in `pretrained_cfg` is left out.
    """
    save_for_hf(model, str(folder), safe_serialization=True, **kwargs)
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    if 'num_classes' in config:
        config.get('model_args', {}).pop('num_classes', None)
        if not config.get('model_args', True):
            del config['model_args']
    config['pretrained_cfg'] = {key: value for key, value in config['pretrained_cfg'].items() if value is not None}
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def _load(path: Path, shown: str) -> object:
    try:
        if not path.is_file():
            raise UserError(f'cannot read {shown}: {"it is not a file" if path.exists() else "there is no such file"}')
        with path.open('rb') as file:  # torch reports a file that may not be read in several ways
            is_zip = file.read(4) == b'PK\x03\x04'
    except (OSError, ValueError) as e:
        raise UserError(f'cannot read {shown}: {why(e)}') from None
    damaged = UserError(f'{shown} is not a checkpoint, or it is damaged')
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:  # torch never compresses; a megabyte could become gigabytes
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise damaged
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of tensors that are refused below
            return torch.load(path, map_location='cpu', weights_only=True)  # timm records its arguments as a Namespace
    except Exception as e:  # bytes that are no checkpoint can fail in any way
        needs = re.search(r'GLOBAL (\S+)', str(e)) if isinstance(e, pickle.UnpicklingError) else None
        if needs is None:
            raise damaged from None
    raise UserError(
        f'{shown} is refused: reading it would run {printable(needs[1])}, and a file of weights needs no code. '
        'If you trust it, load it where it was made and save its state dict alone'
    )


def _why_no_weight(tensor: object) -> str | None:
    """Why this is not a plain tensor with all of its values, in words; None if it is."""
    if not isinstance(tensor, torch.Tensor):
        return 'is not a tensor'
    if tensor.layout != torch.strided:
        return 'is a sparse tensor; save it dense'
    if tensor.is_quantized:
        return 'is a quantized tensor; save it as float'
    if tensor.device.type != 'cpu':
        return f'has no values (device {tensor.device.type})'
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f'has the shape {tuple(tensor.shape)} and fewer values than that'
    return None


def _number(value: object, kind: type[Number]) -> Number | None:
    """A number that a file tells about itself; None where it tells nothing that can be one."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and _why_no_weight(value) is None:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        return None
    return kind(value)


def _arguments(value: object) -> Mapping[str, Any]:
    """The arguments that timm's train.py records as a Namespace; without those that nobody set."""
    given = vars(value) if isinstance(value, Namespace) else value if isinstance(value, Mapping) else {}
    return {key: item for key, item in given.items() if isinstance(key, str) and item is not None}


def convert_state_dict(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Foreign weights under the names and in the shapes of one of our models; its own pass through.

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
    if {key: tensor.shape for key, tensor in state_dict.items()} == {key: tensor.shape for key, tensor in own.items()}:
        return dict(state_dict)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SqueezeAggregatedExcitation)}
    trunk = [key for key in own if not key.startswith(tuple(f'{name}.' for name in layers))]
    converted = {key: state_dict[key] for key in trunk if key in state_dict}
    foreign = {key: tensor for key, tensor in state_dict.items() if key not in converted}
    for name, layer in layers.items():
        block = name.rpartition('.')[0] + '.'
        dense = _fused({key: foreign[key] for key in foreign if key.startswith(block)}, layer.channels)
        if dense is not None:
            converted.update({f'{name}.{key}': tensor for key, tensor in dense.state_dict().items()})
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


def _first(keys: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> str:
    return next((f'{printable(key)} {tuple(tensors[key].shape)}' for key in keys), 'nothing')


def _natural(key: str) -> list[str | int]:
    # not timm.utils.natural_key, which fails on a digit like '²' and takes names of different case for the same
    return [int(part) if part.isdecimal() else part for part in re.split(r'([0-9]+)', key)]


def _fused(tensors: Mapping[str, torch.Tensor], channels: int) -> SqueezeAggregatedExcitation | None:
    """The dense layers of one attention as one SaE layer, or None where they are not of the known structure."""
    names = [key for key in sorted(tensors, key=_natural) if key.endswith('.weight') and tensors[key].ndim > 1]
    weights = {key: tensors[key].flatten(1) for key in names}
    branches = [key for key, w in weights.items() if w.shape[1] == channels > w.shape[0]]
    outputs = [key for key, w in weights.items() if w.shape[0] == channels]
    if not branches or len(outputs) != 1 or len(weights) != len(branches) + 1:
        return None
    biases = [key.removesuffix('weight') + 'bias' for key in (*branches, *outputs)]
    if tensors.keys() == weights.keys():
        tensors = dict(zip(biases, (weights[key][:, 0].new_zeros(len(weights[key])) for key in names), strict=True))
    elif tensors.keys() != {*weights, *biases}:
        return None
    try:
        return SqueezeAggregatedExcitation.from_branches(
            branch_weights=[weights[key] for key in branches],
            out_weight=weights[outputs[0]],
            branch_biases=[tensors[key] for key in biases[:-1]],
            out_bias=tensors[biases[-1]],
        )
    except ValueError:  # shapes that do not belong together
        return None
