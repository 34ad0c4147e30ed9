"""Arguments that several subcommands take."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, printable


def add_model_kwargs(parser: argparse.ArgumentParser) -> None:
    """--model-kwargs KEY=VALUE ..., as timm's scripts have it; `model_kwargs` reads it."""
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        default=[],
        metavar='KEY=VALUE',
        help="the model's options where they are not the default, as for train.py, such as sae_reduction=16",
    )


def model_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """The options, by timm's own reading of them.

    Raises:
        UserError: Something that is not KEY=VALUE.
    """
    from timm.utils import ParseKwargs  # imports torch, which `--help` need not wait for

    for pair in pairs:
        key, equals, _ = pair.partition('=')
        if not key.isidentifier() or not equals:
            raise UserError(f'--model-kwargs takes KEY=VALUE, got {printable(pair)!r}')
    parsed = argparse.Namespace()
    try:
        ParseKwargs([], 'given')(argparse.ArgumentParser(), parsed, list(pairs))
    except (RecursionError, MemoryError):
        raise UserError('--model-kwargs: a value is nested too deeply') from None
    given: dict[str, Any] = parsed.given
    return given


def preprocessing(config: Mapping[str, Any]) -> str:
    """What is done to an image, in one line, from timm's config of a model."""
    size = 'x'.join(map(str, config['input_size']))
    mean, std = (', '.join(f'{value:.4g}' for value in config[key]) for key in ('mean', 'std'))
    mode = config.get('crop_mode') or 'center'
    crop = f'crop {config["crop_pct"]:g}' + (f' ({mode})' if mode != 'center' else '')
    return f'{size}, {config["interpolation"]}, {crop}, mean {mean}, std {std}'
