"""The model to push: its weights, from a checkpoint or a pretrained tag, fit it or nothing happens."""

import os
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from .. import catalog
from ..create import check_options, from_checkpoint, known_name
from ..errors import UserError, did_you_mean, printable
from .retry import attempt


def build(
    name: str,
    tag: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    ema: bool = False,
    **model_args: Any,
) -> nn.Module:
    """A model of this package with its weights, in eval mode.

    The hidden units that a lift adds are initialised from a fixed seed, so that the same tag gives the same file.

    Args:
        name: A model of timm_senetv2; with a tag, for a checkpoint that was trained from that tag.
        tag: Pretrained tag of timm's registry. Or:
        checkpoint: A checkpoint of timm's training script, one of the layouts that `read_checkpoint` knows, a state
            dict, or a safetensors file.
        ema: Take the checkpoint's averaged weights.
        **model_args: For `timm.create_model`. Where it is not given, the number of classes is the checkpoint's; options
            and preprocessing are those that timm's train.py recorded in it.

    Raises:
        UserError: An unknown model or tag, or a file that cannot be read or does not fit; names the first such tensor.
    """
    if (tag is None) == (checkpoint is None):
        raise UserError('give either a pretrained tag or a checkpoint')
    if checkpoint is not None:
        return from_checkpoint(name, checkpoint, ema, model_args)[0]
    if ema:
        raise UserError('averaged (EMA) weights come from a checkpoint, a pretrained tag has none')
    name = known_name(name)
    known = catalog.tags(name)
    if tag not in known:
        close = did_you_mean(str(tag), known) or f'; it has {", ".join(known) or "none"}'
        raise UserError(f'{name} has no pretrained weights with the tag {printable(tag)!r}{close}')
    check_options(name, model_args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = attempt(
            f'load the weights of {name}.{tag}',
            lambda: timm.create_model(f'{name}.{tag}', pretrained=True, **model_args),
            repo_id=getattr(get_pretrained_cfg(f'{name}.{tag}'), 'hf_hub_id', None) or '',
        )
    return model.eval()
