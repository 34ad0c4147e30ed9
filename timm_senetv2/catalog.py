"""The models of this package as rows: sizes, and the tags of their pretrained weights with their accuracies."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
from timm.models import get_pretrained_cfg, model_entrypoint, split_model_name_tag
from timm.utils import natural_key
from torch import nn

from . import register
from .profile import count, on_meta
from .sources import Published, sources

register()  # the models are there even with torch's autoload off


class Tag(NamedTuple):
    """Pretrained weights of a model.

    source: Where they come from on the Hub; None for those that this package carries.
    license: As timm's results or this package state it.
    accuracies: Those timm publishes for the source, on ImageNet-1k; none for those that this package carries.
    """

    tag: str
    default: bool
    source: str | None
    license: str | None
    accuracies: tuple[Published, ...]


class Model(NamedTuple):
    """A model: parameters, and multiply-adds of one image of `input_size` (channels, height, width)."""

    name: str
    module: str
    input_size: tuple[int, int, int]
    num_classes: int
    params: int
    macs: int
    tags: tuple[Tag, ...]


def names(pattern: str | list[str] = '') -> list[str]:
    """The names of this package's models that match one of timm's wildcard patterns, in natural order."""
    found = timm.list_models(pattern)
    return sorted((n for n in found if model_entrypoint(n).__module__.startswith(f'{__package__}.')), key=natural_key)


def tags(name: str) -> list[str]:
    """The tags of a model's pretrained weights, the default first."""
    listed = [split_model_name_tag(found)[1] for found in timm.list_pretrained(f'{name}.*')]
    return sorted(listed, key=lambda tag: tag != default_tag(name))


def default_tag(name: str) -> str | None:
    """The tag of the weights that a model's bare name means; None where it has none."""
    cfg = get_pretrained_cfg(name)
    return cfg.tag or None if cfg is not None and cfg.has_weights else None


def models(pattern: str | list[str] = '') -> list[Model]:
    """A row for each model that matches; see `names`. Built without memory for weights, so it takes seconds."""
    return [_model(name) for name in names(pattern)]


def as_json(row: Model) -> dict[str, Any]:
    """A row as plain JSON values, with named fields."""
    return {
        **row._asdict(),
        'tags': [{**tag._asdict(), 'accuracies': [a._asdict() for a in tag.accuracies]} for tag in row.tags],
    }


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """timm's config of a model: architecture, tag, where its weights come from, preprocessing."""
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # torch: Tensor | Module
    return config


def classes_of(model: nn.Module) -> int:
    """The number of classes of one of timm's models."""
    return int(model.num_classes)  # type: ignore[arg-type]  # torch: Tensor | Module


def _model(name: str) -> Model:
    model = on_meta(name)
    size = config_of(model)['input_size']
    profile = count(model, size)
    default, rows = default_tag(name), []
    for tag in tags(name):
        cfg = get_pretrained_cfg(f'{name}.{tag}')
        if cfg is None:
            continue
        source = sources().get(cfg.hf_hub_id or '')
        licence = cfg.license or (source.license if source else None)
        rows.append(Tag(tag, tag == default, cfg.hf_hub_id, licence, source.accuracies if source else ()))
    module = model_entrypoint(name).__module__.rpartition('.')[2]
    return Model(name, module, tuple(size), classes_of(model), profile.params, profile.macs, tuple(rows))
