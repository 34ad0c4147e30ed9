"""A model of this package with a user's options, every mistake of which is one line."""

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_type_hints

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_deprecated_models, get_pretrained_cfg, get_pretrained_cfg_value
from torch import nn
from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]

from . import catalog
from .checkpoints import Checkpoint, load_weights, read_checkpoint
from .errors import UserError, did_you_mean, one_line, printable
from .profile import on_meta

# What create_model takes beside a model's options; each would change what is built, loaded or saved
_NOT_OPTIONS = {
    'pretrained',
    'pretrained_cfg',
    'pretrained_cfg_overlay',
    'checkpoint_path',
    'cache_dir',
    'model_name',
    'scriptable',
    'exportable',
    'no_jit',
    'features_only',
    'out_indices',
    'feature_cfg',
    'feature_cls',
    'device',
    'dtype',
}
# Of the models whose class is timm's ResNet, in whose signature they are not
_SAE_OPTIONS: dict[str, type] = dict(sae_reduction=int, sae_cardinality=int, sae_add_identity=bool, sae_bias=bool)
_MOST_BLOCKS = 1000


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 14


def _are_numbers(values: Any, above: float) -> bool:
    plain = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
    return plain and all(above < value < 1e9 for value in values)  # NaN is neither


# Of train.py's arguments for images, in this order
_MAKES_SENSE: dict[str, Callable[[Any], bool]] = {
    'in_chans': _is_size,
    'img_size': _is_size,
    'input_size': lambda value: isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_size, value)),
    'mean': lambda value: _are_numbers(value, -1e9),
    'std': lambda value: _are_numbers(value, 0),
    'crop_pct': lambda value: _are_numbers([value], 0),
    'crop_mode': lambda value: isinstance(value, str) and value in ('center', 'squash', 'border'),
    'interpolation': lambda value: (
        isinstance(value, str) and value in (*(m.value for m in InterpolationMode), 'random')
    ),
}


def known_name(name: str) -> str:
    """The current name of a model of this package.

    Raises:
        UserError: There is none; proposes others.
    """
    known = catalog.names()
    current = _current(name).partition('.')[0]
    if current in known:
        return current
    raise UserError(f'{printable(name)!r} is not one of our models{did_you_mean(name, known)}')


def _current(name: str) -> str:
    """The name in place of a deprecated one, with its tag."""
    base, dot, tag = name.partition('.')
    current = get_deprecated_models().get(name) or get_deprecated_models().get(base)
    if not current:
        return name
    return f'{current.partition(".")[0]}.{tag}' if dot else current


def untrained(
    name: str, model_args: Mapping[str, Any], preprocessing: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    """The model with fresh weights, from a fixed seed, and a config that says nothing of pretrained weights.

    Args:
        name: A model of this package.
        model_args: Options of the model, as `timm.create_model` takes them.
        preprocessing: What of it differs from the model's own, under the names of timm's configs.

    Raises:
        UserError: An unknown model, or an option that it does not have or not with that value.
    """
    name = known_name(name)
    check_options(name, model_args)
    overlay = dict(preprocessing, tag=None, license=None)  # only its owner can say the licence of other weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(f'{name}.untrained', pretrained_cfg_overlay=overlay, **model_args)


def from_checkpoint(
    name: str, path: str | os.PathLike[str], ema: bool, model_args: Mapping[str, Any]
) -> tuple[nn.Module, Checkpoint]:
    """A model of this package with the weights of a file, in eval mode, and what the file says of itself.

    Options and preprocessing are those that timm's train.py recorded in the file, where it wrote it.

    Args:
        name: A model of this package. With a tag, it was trained with the tag's preprocessing, unless the file names
            another start.
        path: Any file that `read_checkpoint` reads.
        ema: Take the file's averaged weights.
        model_args: As for `untrained`. The number of classes is the file's where it is not given.

    Raises:
        UserError: An unknown model, tag or option, a file that cannot be read or does not fit, or options other than
            those that the model was trained with.
    """
    full_name, name = _current(name), known_name(name)
    check_options(name, model_args)
    checkpoint = read_checkpoint(path, ema)
    model_args = {**_trained_options(name, checkpoint, model_args, printable(path)), **model_args}
    if 'num_classes' not in model_args:
        classifier = checkpoint.state_dict.get(f'{get_pretrained_cfg_value(name, "classifier")}.weight')
        if classifier is not None and classifier.ndim > 0:
            model_args = {**model_args, 'num_classes': len(classifier)}
    model = untrained(name, model_args, _trained_preprocessing(full_name, checkpoint, printable(path)))
    load_weights(model, checkpoint, os.fspath(path))
    return model.eval(), checkpoint


def _trained_options(name: str, checkpoint: Checkpoint, model_args: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """The model's options that a file records.

    Raises:
        UserError: They cannot be those of the model, or contradict `model_args`.
    """
    recorded = checkpoint.arguments
    trained = recorded.get('model')
    if not isinstance(trained, str):
        return {}
    options = recorded.get('model_kwargs') or {}
    if not isinstance(options, Mapping):
        raise UserError(f'{shown} records options that are none: {printable(options, limit=100)}')
    options = {key: value for key, value in options.items() if key not in _NOT_OPTIONS}
    if ':' not in trained and _current(trained).partition('.')[0] != name:  # SE to be lifted: its own sizes
        options = {key: value for key, value in options.items() if not str(key).startswith('sae_')}
    if 'gp' in recorded:
        options.setdefault('global_pool', recorded['gp'])
    preprocessing = _recorded_preprocessing(checkpoint, shown)
    if 'in_chans' in preprocessing or 'input_size' in preprocessing:  # as train.py has it
        options.setdefault('in_chans', preprocessing.get('in_chans') or preprocessing['input_size'][0])
    kinds = _plain_types(type(on_meta(f'{name}.untrained')))
    for key, value in options.items():  # timm takes 0 and 1 as well
        if kinds.get(key) is bool and type(value) is int and value in (0, 1):
            options[key] = bool(value)
    check_options(name, options, f'{shown} records options')
    for key, value in options.items():
        given = model_args.get(key, value)
        if _as_tuples(given) != _as_tuples(value) and not key.endswith('_rate'):  # of what training drops
            raise UserError(
                f'{shown} was trained with {_shown({key: value})}, and --model-kwargs says {_shown({key: given})}; '
                'leave it out'
            )
    return options


def _trained_preprocessing(name: str, checkpoint: Checkpoint, shown: str) -> dict[str, Any]:
    """What timm's train.py made of its images, as far as the file or a name with a tag says it.

    Raises:
        UserError: There is no such tag, what the file says makes no sense, or it says too little.
    """
    base, dot, tag = name.partition('.')
    known = catalog.tags(base)
    if dot and tag not in (*known, 'untrained'):
        raise UserError(f'{base} has no tag {printable(tag)!r}{did_you_mean(tag, known) or _one_of(known)}')
    trained = checkpoint.arguments.get('model')
    if isinstance(trained, str) and timm.is_model(_current(trained).partition('.')[0]):
        name = _current(trained)
    elif not dot and isinstance(trained, str) and ':' in trained:
        raise UserError(
            f'{shown} was trained from {printable(trained, limit=200)}: say by --model {base}.TAG whose preprocessing '
            f'that has{_one_of([*known, "untrained"])}'
        )
    elif not dot:
        return {}
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError:  # a tag of another version
        config = get_pretrained_cfg(name.partition('.')[0])
    if config is None:
        return {}
    found: dict[str, Any] = resolve_data_config(
        _recorded_preprocessing(checkpoint, shown), pretrained_cfg=config.to_dict()
    )
    if config.pool_size:
        sizes = zip(config.pool_size, config.input_size[1:], found['input_size'][1:], strict=True)
        found['pool_size'] = tuple(math.ceil(pool * new / old) for pool, old, new in sizes)
    return found


def _recorded_preprocessing(checkpoint: Checkpoint, shown: str) -> dict[str, Any]:
    """train.py's arguments for images, as far as a file has them.

    Raises:
        UserError: They make no sense.
    """
    recorded = {key: checkpoint.arguments[key] for key in _MAKES_SENSE if checkpoint.arguments.get(key) is not None}
    if recorded.get('interpolation') == '':  # train.py's way to leave it to the model
        del recorded['interpolation']
    for key, value in recorded.items():
        sensible = _MAKES_SENSE[key](value)
        if sensible and key in ('mean', 'std'):
            sensible = len(value) in (1, recorded.get('input_size', [recorded.get('in_chans', 3)])[0])
        if not sensible:
            what = f'{key}={printable(value, limit=60)}'
            raise UserError(f'{shown} records {what}, which makes no sense; save its state dict alone')
    return recorded


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _one_of(names: Sequence[str]) -> str:
    return f'; it has {", ".join(names) or "none"}'


def pretrained(name: str) -> nn.Module:
    """A pretrained model by any name that `timm.create_model` takes, of this package or of timm, in eval mode.

    Args:
        name: A model with or without a tag, 'local-dir:DIR', or 'hf-hub:OWNER/NAME'.

    Raises:
        UserError: There is no such model, it has no pretrained weights, or they cannot be had.
    """
    shown = printable(name)
    if ':' not in name:
        base = name.partition('.')[0]
        if '/' in name or os.sep in name:
            raise UserError(
                f'{shown!r} is not a model; write local-dir:DIR for a folder, hf-hub:OWNER/NAME for the Hub'
            )
        if not timm.is_model(base) and base not in get_deprecated_models():
            raise UserError(f'{shown!r} is not a model of timm or of ours{did_you_mean(base, timm.list_models())}')
    try:
        return timm.create_model(name, pretrained=True).eval()
    except Exception as e:  # files, Hub and network each have kinds of their own
        raise UserError(f'{shown} cannot be loaded: {one_line(e)}') from None


def check_options(name: str, model_args: Mapping[str, Any], given_by: str = '--model-kwargs') -> None:
    """Make sure that a model can be built with these options, without the memory for its weights.

    Args:
        name: A model of this package.
        model_args: Options of the model, as `timm.create_model` takes them.
        given_by: What the user gave them by, to be named.

    Raises:
        UserError: It cannot; names the option where that is known.
    """
    if not model_args:
        return
    kinds = _plain_types(type(on_meta(f'{name}.untrained')))
    for key, value in model_args.items():
        if key in _NOT_OPTIONS:
            raise UserError(f'{given_by}: {key} is not an option of a model')
        if key in ('layers', 'depth'):  # each block takes time, before any memory
            _check_blocks(key, value, given_by)
        if key in kinds:
            _check_value(key, value, kinds[key], given_by)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of weights without elements
            model = on_meta(f'{name}.untrained', **model_args)
    except Exception as e:  # timm answers wrong options with many kinds
        reason = why_not_built(name, e)
        raise UserError(f'{given_by}: {name} cannot be built with {_shown(model_args)}: {reason}') from None
    empty = next((key for key, p in model.named_parameters() if not p.numel()), None)
    if empty is not None:
        raise UserError(f'{given_by}: with {_shown(model_args)}, {empty} of {name} has no elements')
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if needed > _memory():
        raise UserError(
            f'{name} with {_shown(model_args)} has {needed / 1e9:,.0f} GB of weights, more than the memory '
            f'of this machine ({_memory() / 1e9:,.0f} GB)'
        )


def why_not_built(name: str, error: Exception) -> str:
    """Why `timm.create_model` did not build a model, in words that a user of its options understands.

    Args:
        name: Of the model, as timm has it.
        error: What was raised. Of an option that there is not it names a class and its `__init__`.
    """
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    if unknown is None:
        return one_line(error)
    model = type(on_meta(name))
    return f'it has no option {unknown[1]}{did_you_mean(unknown[1], _options(model))}'


def _options(model: type[nn.Module]) -> set[str]:
    """The names of the options of a model class, by its signature."""
    taken = {key for cls in model.__mro__ for key in inspect.signature(cls).parameters}
    return {*_SAE_OPTIONS, *taken} - {'args', 'kwargs'} - _NOT_OPTIONS


def _check_blocks(key: str, value: Any, given_by: str) -> None:
    counts: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts):
        raise UserError(f'{given_by}: {key} must be whole numbers above zero, got {printable(repr(value))}')
    if sum(counts) > _MOST_BLOCKS:
        raise UserError(f'{given_by}: {key}={printable(value)} is more than {_MOST_BLOCKS} blocks')


def _check_value(key: str, value: Any, kind: type, given_by: str) -> None:
    says = f'{given_by}: {key} must be {_KINDS[kind]}, got {printable(repr(value))}'
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(says)
        if key.endswith('_rate') and not 0 <= value < 1:
            raise UserError(f'{given_by}: {key} must be from 0 to below 1, got {value}')
    elif type(value) is not kind or (isinstance(value, int) and not 0 <= value < 1 << 40):
        raise UserError(says)


_KINDS: dict[type, str] = {
    float: 'a number',
    int: 'a whole number from 0 to 2**40',
    bool: 'True or False',
    str: 'a name',
}


def _plain_types(model: type[nn.Module]) -> dict[str, type]:
    """The options of a model class that are plainly a number, a name or a truth value, by its signature."""
    found = dict(_SAE_OPTIONS)
    for cls in reversed(model.__mro__):
        init = vars(cls).get('__init__')
        if inspect.isfunction(init) and cls.__module__ != nn.Module.__module__:
            hints = get_type_hints(init)
            found.update({key: kind for key, kind in hints.items() if kind in _KINDS})
    return found


def _shown(model_args: Mapping[str, Any]) -> str:
    return printable(', '.join(f'{key}={value}' for key, value in model_args.items()) or 'its own options')


def _memory() -> int:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError, OSError):  # no such system call
        return 1 << 38
