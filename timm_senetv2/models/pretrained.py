"""Where pretrained weights come from, and how SE weights, and weights without attention, become ours on the way in."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import GroupNorm, GroupNorm1, LayerNorm2d
from timm.models import PretrainedCfg, is_model, model_entrypoint, split_model_name_tag
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..layers import SqueezeAggregatedExcitation

_WEIGHTS_DIR = Path(__file__).parents[1] / 'weights'


def lifted_cfgs(kind: str, sources: Mapping[str, Iterable[str]]) -> dict[str, PretrainedCfg]:
    """Pretrained configs of models that start from timm's weights, each tagged with the kind and the source's tag.

    Each is timm's own config of the source: data, classifier, licence, and where the weights are.

    Args:
        kind: 'se' for sources with SE, 'plain' for sources without attention.
        sources: For each of our models its sources in timm, as `name.tag`, the default first. Those that the
            installed timm does not have are left out.
    """
    cfgs = {}
    for model, names in sources.items():
        for name in names:
            cfg = _timms_cfg(name)
            if cfg is not None and cfg.has_weights:
                cfgs[f'{model}.{kind}_{cfg.tag}'] = cfg
    return cfgs


def _timms_cfg(name: str) -> PretrainedCfg | None:
    """timm's config of `name.tag`; None where the installed timm has no such model or tag.

    What timm's get_pretrained_cfg returns, without its deep copy: for all sources that is a third of registration.
    """
    if not is_model(name):
        return None
    architecture, tag = split_model_name_tag(name)
    known = getattr(sys.modules[model_entrypoint(name).__module__], 'default_cfgs', {})
    cfg = known[architecture].cfgs.get(tag) if architecture in known else None
    if cfg is None:
        return None
    hub_id = f'timm/{name}' if cfg.hf_hub_id == 'timm/' else cfg.hf_hub_id  # as timm completes it
    return replace(cfg, architecture=architecture, tag=tag, hf_hub_id=hub_id)


def shipped_cfgs(models: Iterable[str], tag: str, cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Pretrained configs of models whose weights lie in this package, as `weights/<model>.<tag>.safetensors`.

    Args:
        models: Model names; those without such a file are left out.
        tag: Their tag.
        cfg: The rest of the config.
    """
    files = {f'{model}.{tag}': _WEIGHTS_DIR / f'{model}.{tag}.safetensors' for model in models}
    return {name: dict(cfg, file=str(file)) for name, file in files.items() if file.is_file()}


# Norms that end with a weight and a bias for each channel. Exact types: a subclass may go on, with an activation say.
AFFINE_NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.InstanceNorm2d,
    nn.GroupNorm,
    GroupNorm,
    GroupNorm1,
    LayerNorm2d,
)


def lift_state_dict(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """timm's checkpoint filter for models with SaE: native weights pass, and those of sources are made to fit.

    SE weights are embedded. Under a tag `plain_…`, and no other, a file without any attention is taken as that of the
    model without attention: a native file that lost its attention has the same names.

    Args:
        state_dict: The checkpoint's weights; unchanged.
        model: The model that will load them, with timm's `pretrained_cfg`, where the tag is. The hidden units that the
            source does not fill keep its initialisation.

    Raises:
        RuntimeError: Attention weights that are neither the layer's own nor those of an SE layer that fits into it;
            names the first tensor that is missing or does not fit, and the shapes. Or weights without attention that
            are too large to be doubled.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SqueezeAggregatedExcitation)}
    prefixes = tuple(f'{name}.' for name in layers)
    cfg: Mapping[str, Any] = vars(model).get('pretrained_cfg') or {}  # timm sets it before it loads anything
    is_plain = str(cfg.get('tag')).startswith('plain_')
    if layers and is_plain and not any(key.startswith(prefixes) for key in state_dict):
        return _with_idle_attention(state_dict, model, layers, cfg.get('classifier') or ())
    lifted = dict(state_dict)
    for name, layer in layers.items():
        prefix = f'{name}.'
        own = {key: tensor.shape for key, tensor in layer.state_dict(prefix=prefix).items()}
        given = {key: _shape(key, tensor) for key, tensor in state_dict.items() if key.startswith(prefix)}
        if given == own:
            continue
        for key, shape in given.items():
            if key not in own:
                raise RuntimeError(
                    f'{key}, of shape {tuple(shape)}, is not a weight of an SE layer; '
                    f'{name} has {", ".join(f"{k} {tuple(v)}" for k, v in own.items())}'
                )
        lifted.update(layer.embed(state_dict, prefix))
    return lifted


def _with_idle_attention(
    state_dict: Mapping[str, torch.Tensor],
    model: nn.Module,
    layers: Mapping[str, SqueezeAggregatedExcitation],
    classifiers: str | Iterable[str],
) -> dict[str, torch.Tensor]:
    """Weights of the model without attention as weights of the model.

    With `fc2` zero every gate is sigmoid(0) = 1/2; weight and bias of the norm before it are doubled. Doubling and
    halving are exact in binary floating point, so 2 · norm(y) · 1/2 is norm(y) to the last bit, in training too.
    """
    own = model.state_dict()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    for key, tensor in state_dict.items():
        if key.rpartition('.')[0] in classifiers:
            continue
        shape = _shape(key, tensor)
        if key not in own:
            raise RuntimeError(f'{key}, of shape {tuple(shape)}, has no place in a model without attention')
    lifted = dict(state_dict)
    for name, layer in layers.items():
        if layer.add_identity:
            raise RuntimeError(
                f'{name}.fc2.weight is missing, and weights without attention cannot start a layer with add_identity: '
                'there the gate of 1/2 gives 3/2, whose inverse is no exact factor'
            )
        parent = name.rpartition('.')[0]
        norm_name = last_norm(model.get_submodule(parent))
        norm = getattr(model.get_submodule(parent), norm_name or '', None)
        if norm is None or type(norm) not in AFFINE_NORMS:
            raise RuntimeError(
                f'{name}.fc2.weight is missing, and weights without attention cannot start this layer: '
                f'it does not follow an affine norm of a residual block'
            )
        for part, _ in norm.named_parameters():
            key = f'{parent}.{norm_name}.{part}'
            if key not in state_dict:
                raise RuntimeError(f'{key} is missing; its shape in this model is {tuple(own[key].shape)}')
            lifted[key] = _doubled(key, state_dict[key], own[key].dtype)
        for key, tensor in layer.state_dict(prefix=f'{name}.').items():
            idle = key.startswith(f'{name}.fc2.')
            lifted[key] = torch.zeros_like(tensor) if idle else tensor.clone()
    return lifted


def _doubled(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Twice a tensor that is going to be loaded as this dtype; raises a RuntimeError where that would overflow."""
    doubled = 2 * tensor.to(dtype)  # rounded before it is doubled, as in the model without attention
    if not tensor.is_meta and (doubled.isinf() & tensor.isfinite()).any():
        remedy = '; build the model in float32' if dtype.itemsize < 4 else ''
        raise RuntimeError(
            f'{key} holds values whose double overflows in {str(dtype).removeprefix("torch.")}, and weights without '
            f'attention are doubled to start with it{remedy}'
        )
    return doubled


def _shape(key: str, tensor: object) -> torch.Size:
    if not isinstance(tensor, torch.Tensor):
        raise RuntimeError(f'{key} is of type {type(tensor).__name__}, and weights are tensors')
    return tensor.shape


def last_norm(block: nn.Module) -> str | None:
    """The name of the norm right before the attention of one of timm's residual blocks; None for other modules."""
    return 'bn2' if isinstance(block, BasicBlock) else 'bn3' if isinstance(block, Bottleneck) else None
