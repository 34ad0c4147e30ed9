"""The files of a repository: weights, config, card."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torch import nn

from .card import Facts
from .errors import FULL_DISK, HubError

FILES = ('model.safetensors', 'config.json', 'README.md')


def _labels(model: nn.Module, facts: Facts) -> dict[str, Any]:
    names = facts.labels or model.pretrained_cfg.get('label_names')
    if not names and 'imagenet-1k' in facts.datasets and model.num_classes == 1000:
        imagenet = ImageNetInfo('imagenet-1k')
        return dict(label_names=imagenet.label_names(), label_descriptions=imagenet.label_descriptions(as_dict=True))
    if not names:
        return {}
    if len(names) != model.num_classes:
        raise HubError(f'{len(names)} labels were given for a model with {model.num_classes} classes')
    return dict(label_names=list(names))


def write_files(model: nn.Module, folder: str | Path, card: ModelCard, facts: Facts) -> None:
    """Write the three files of a repository: weights (safetensors), timm's config with the labels, and the card.

    They are written beside `folder` first, so that it never holds half a file.

    Raises:
        HubError: `folder` is a file, or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise HubError(f'{folder} is a file; give a folder')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as beside:
            save_for_hf(
                model,
                beside,
                model_config=_labels(model, facts),
                safe_serialization=True,
                data_config=facts.data_config,
            )
            (Path(beside) / 'README.md').write_text(str(card), encoding='utf-8', newline='\n')
            shutil.copymode(Path(beside) / 'config.json', Path(beside) / 'model.safetensors')  # not the owner's alone
            folder.mkdir(exist_ok=True)
            for name in FILES:
                os.replace(Path(beside) / name, folder / name)
    except (OSError, SafetensorError) as e:
        # safetensors writes in Rust and raises its own type, with the system's message inside
        full = getattr(e, 'errno', None) in FULL_DISK or os.strerror(errno.ENOSPC) in str(e)
        reason = 'the disk is full' if full else (getattr(e, 'strerror', None) or str(e))
        raise HubError(f'cannot write {folder}: {reason}') from None
