"""The model to push: its weights, from a checkpoint or a pretrained tag, fit it or nothing happens."""

import argparse
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict, get_pretrained_cfg, model_entrypoint
from torch import nn

from .errors import HubError, attempt

_PACKAGE = __name__.partition('.')[0]


def build(
    name: str,
    tag: str | None = None,
    checkpoint: str | Path | None = None,
    ema: bool = False,
    **model_args,
) -> nn.Module:
    """A model of this package with its weights, in eval mode.

    The hidden units that a lift adds are initialised from a fixed seed, so that the same tag gives the same file.

    Args:
        name: A model of timm_senetv2.
        tag: Pretrained tag of timm's registry. Or:
        checkpoint: A checkpoint of timm's training script, a state dict, or a safetensors file.
        ema: Take the checkpoint's averaged weights.
        **model_args: For `timm.create_model`, such as num_classes.

    Raises:
        HubError: An unknown model or tag, or a file that cannot be read or does not fit; names the first such tensor.
    """
    ours = [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith(f'{_PACKAGE}.')]
    if name not in ours:
        near = get_close_matches(name, ours, 1)
        raise HubError(f'{name} is not a model of timm_senetv2' + (f'; do you mean {near[0]}?' if near else ''))
    if (tag is None) == (checkpoint is None):
        raise HubError('give either a pretrained tag or a checkpoint')
    if ema and checkpoint is None:
        raise HubError('averaged (EMA) weights come from a checkpoint, a pretrained tag has none')
    known = [n.partition('.')[2] for n in timm.list_pretrained(f'{name}.*')]
    if tag is not None and tag not in known:
        raise HubError(f'{name} has no pretrained weights with the tag {tag!r}; it has {", ".join(known) or "none"}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if tag is not None:
            source = get_pretrained_cfg(f'{name}.{tag}').hf_hub_id
            model = attempt(
                f'load the weights of {name}.{tag}',
                lambda: timm.create_model(f'{name}.{tag}', pretrained=True, **model_args),
                repo_id=source or '',
            )
        else:
            # what the config says of pretrained weights does not hold for the checkpoint
            model = timm.create_model(f'{name}.untrained', pretrained_cfg_overlay=dict(tag=None), **model_args)
    if checkpoint is not None:
        _load_checkpoint(model, Path(checkpoint), ema)
    for tensor_name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise HubError(f'{tensor_name} holds NaN or infinity: the training diverged')
    return model.eval()


def _load_checkpoint(model: nn.Module, path: Path, ema: bool) -> None:
    state = _read_checkpoint(path, ema)
    name = model.pretrained_cfg['architecture']
    own = model.state_dict()
    for key, tensor in own.items():
        if key not in state:
            raise HubError(f'{path} does not fit {name}: it lacks {key}, of shape {tuple(tensor.shape)}')
    for key, tensor in state.items():
        if key not in own:
            raise HubError(f'{path} does not fit {name}, which has no {key}')
        if tensor.shape != own[key].shape:
            hint = '; give the number of classes' if key.startswith(model.get_classifier(name_only=True)) else ''
            raise HubError(
                f'{path} does not fit {name}: its {key} has the shape {tuple(tensor.shape)} '
                f'instead of {tuple(own[key].shape)}{hint}'
            )
    model.load_state_dict(state)


def _read_checkpoint(path: Path, ema: bool) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise HubError(f'there is no file {path}')
    try:
        if path.suffix == '.safetensors':
            checkpoint = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm records its arguments as one
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except SafetensorError as e:
        raise HubError(f'{path} is damaged, or not a safetensors file: {e}') from None
    except Exception as e:  # torch.load raises a dozen types, by the kind of damage
        raise HubError(
            f'{path} cannot be read as a checkpoint: {str(e).splitlines()[0] if str(e) else type(e).__name__}'
        ) from None
    if not isinstance(checkpoint, dict):
        raise HubError(f'{path} holds no state dict but a {type(checkpoint).__name__}')
    wanted = ('state_dict_ema', 'model_ema') if ema else ('state_dict', 'model')
    key = next((key for key in wanted if isinstance(checkpoint.get(key), dict)), None)
    if ema and key is None:
        raise HubError(f'{path} holds no averaged (EMA) weights')
    state = checkpoint[key] if key else checkpoint
    odd = next((k for k, v in state.items() if not isinstance(v, torch.Tensor)), None)
    if odd is not None or not state:
        raise HubError(f'{path} holds no state dict' + (f': its {odd!r} is not a tensor' if odd is not None else ''))
    return clean_state_dict(state)
