"""Images from strangers: read within limits, or refused in one plain line."""

import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError
from timm.models import get_pretrained_cfg

from .. import register
from ..errors import UserError
from ..images import eight_bits

MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
MOST_STRETCHED = 20  # longer side / shorter side: a transform that makes the shorter side fit enlarges the longer one
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')
_NAMES = 'PNG, JPEG, WebP, GIF or BMP'
_FOLDER = Path(__file__).parent / 'examples'


class Example(NamedTuple):
    """An image that this package carries."""

    label: str
    path: Path


def examples() -> list[Example]:
    """The first test image of each class of Fashion-MNIST, in the order of the classes."""
    register()  # the models are there even with torch's autoload off
    cfg = get_pretrained_cfg('cifar_senetv2_resnet20.fmnist')
    assert cfg is not None and cfg.label_names is not None
    return [Example(label, _FOLDER / f'{re.sub("[^a-z]+", "_", label.lower())}.png') for label in cfg.label_names]


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image as a person sees it: upright, in RGB, on white where it is transparent, the first of an animation.

    Size and shape are checked by the file's header, before any pixel is decoded.

    Raises:
        UserError: Not an image of a known format, damaged, or too large.
    """
    try:
        size = os.stat(path).st_size
        if size > MOST_BYTES:
            raise UserError(f'The file has {size / 2**20:.0f} MB; give one of at most {MOST_BYTES // 2**20} MB.')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns of large images, which are refused below
            with Image.open(path, formats=FORMATS) as file:
                _check_size(*file.size)
                file.draft('RGB', (1024, 1024))  # decodes a JPEG at the fraction of its size that still has as many
                file.load()
                return _as_seen(file)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(_too_large('The image has far too many pixels')) from None
    except UnidentifiedImageError:
        raise UserError(f'This file is not an image that can be read here; give a {_NAMES} file.') from None
    except Exception:  # each of Pillow's decoders has its own for damaged files
        raise UserError(f'The image is damaged and cannot be read; give another {_NAMES} file.') from None


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(_too_large(f'The image has {width:,} × {height:,} pixels'))
    if max(width, height) > MOST_STRETCHED * min(width, height):
        raise UserError(
            f'The image has {width:,} × {height:,} pixels, too long and narrow; '
            f'crop it to at most {MOST_STRETCHED} times as long as wide.'
        )


def _too_large(what: str) -> str:
    return f'{what}; give one of at most {MOST_PIXELS // 10**6} million pixels.'


def _as_seen(file: Image.Image) -> Image.Image:
    image = eight_bits(ImageOps.exif_transpose(file))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        return Image.alpha_composite(white, image).convert('RGB')
    return image.convert('RGB')
