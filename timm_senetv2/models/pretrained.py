"""Where pretrained weights come from, and how SE weights become SaE weights on the way in."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, split_model_name_tag
from torch import nn

from ..layers import SqueezeAggregatedExcitation

_WEIGHTS_DIR = Path(__file__).parents[1] / 'weights'


def lifted_cfgs(sources: Mapping[str, Iterable[str]]) -> dict[str, PretrainedCfg]:
    """Pretrained configs of models that start from timm's SE weights, tagged `se_` and the source's tag.

    Each is timm's own config of the source: data, classifier, licence, and where the weights are.

    Args:
        sources: For each of our models its sources in timm, as `name.tag`, the default first. Those that the
            installed timm does not have are left out.
    """
    cfgs = {}
    for model, names in sources.items():
        for name in names:
            try:
                cfg = get_pretrained_cfg(name)
            except RuntimeError:  # timm has the architecture without this tag
                continue
            if cfg is not None and cfg.has_weights:
                cfgs[f'{model}.se_{split_model_name_tag(name)[1]}'] = cfg
    return cfgs


def shipped_cfgs(models: Iterable[str], tag: str, cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Pretrained configs of models whose weights lie in this package, as `weights/<model>.<tag>.safetensors`.

    Args:
        models: Model names; those without such a file are left out.
        tag: Their tag.
        cfg: The rest of the config.
    """
    files = {f'{model}.{tag}': _WEIGHTS_DIR / f'{model}.{tag}.safetensors' for model in models}
    return {name: dict(cfg, file=str(file)) for name, file in files.items() if file.is_file()}


def lift_state_dict(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """timm's checkpoint filter for models with SaE: SE weights are embedded, native weights pass through.

    Args:
        state_dict: The checkpoint's weights; unchanged.
        model: The model that will load them. The hidden units that SE does not fill keep its initialisation.

    Raises:
        RuntimeError: Attention weights that are neither the layer's own nor those of an SE layer that fits into it;
            names the tensor and both shapes.
    """
    lifted = dict(state_dict)
    for name, layer in model.named_modules():
        if not isinstance(layer, SqueezeAggregatedExcitation):
            continue
        prefix = f'{name}.'
        own = {key: tensor.shape for key, tensor in layer.state_dict(prefix=prefix).items()}
        given = {key: tensor.shape for key, tensor in state_dict.items() if key.startswith(prefix)}
        if given == own:
            continue
        for key in given.keys() - own.keys():
            raise RuntimeError(
                f'{key}, of shape {tuple(given[key])}, is not a weight of an SE layer; '
                f'{name} has {", ".join(f"{k} {tuple(v)}" for k, v in own.items())}'
            )
        lifted.update(layer.embed(state_dict, prefix))
    return lifted
