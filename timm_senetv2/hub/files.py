"""The files of a repository: weights, config, card."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from torch import nn

from ..catalog import classes_of, config_of
from ..checkpoints import save
from ..errors import UserError, printable, why
from ..files import output_folder
from .card import data_config
from .facts import Facts

FILES = ('model.safetensors', 'config.json', 'README.md')


def _labels(model: nn.Module, facts: Facts) -> dict[str, Any]:
    names = facts.labels or config_of(model).get('label_names')
    if not names and 'imagenet-1k' in facts.datasets and classes_of(model) == 1000:
        imagenet = ImageNetInfo('imagenet-1k')
        return dict(label_names=imagenet.label_names(), label_descriptions=imagenet.label_descriptions(as_dict=True))
    if not names:
        return {}
    if len(names) != classes_of(model):
        what = f'{len(names)} labels were given' if facts.labels else f'the weights have labels of {len(names)} classes'
        raise UserError(f'{what} for a model with {classes_of(model)} classes; the facts may give it labels of its own')
    return dict(label_names=list(names))


def write_files(model: nn.Module, folder: str | Path, card: ModelCard, facts: Facts) -> None:
    """Write the three files of a repository: weights (safetensors), timm's config with the labels, and the card.

    The folder appears whole; see `timm_senetv2.files.output_folder` for what it may replace.

    Raises:
        UserError: `folder` holds what this did not write, or cannot be written.
    """
    config = _labels(model, facts)
    if facts.license is not None:
        config['pretrained_cfg'] = dict(license=facts.license)
    try:
        with output_folder(folder, 'push') as new:
            save(model, new, model_config=config, data_config=data_config(facts))
            (new / 'README.md').write_text(str(card), encoding='utf-8', newline='\n')
    except (OSError, SafetensorError) as e:
        raise UserError(f'cannot write {printable(folder)}: {why(e)}') from None
