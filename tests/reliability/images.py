"""Damaged images of every format, in the name of another: each is read, or refused in one line, within the memory."""

import io
import itertools
import os
import random
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.data import FileImages

from .processes import context, limit_memory
from .tally import Tally, outcome_of

COUNT = 10_800
MEMORY = 3 << 30  # bytes of address space that a reading process may take on top: an image has at most 178 megapixels
SUFFIXES = ('.png', '.jpg', '.tif', '.webp', '.bmp', '.ppm')

FORMATS: dict[str, tuple[str, dict]] = {  # by name: Pillow's, and how it is written
    'PNG': ('RGB', {}),
    'PNG, palette': ('P', dict(format='PNG')),
    'PNG, 16 bits': ('I;16', dict(format='PNG')),
    'JPEG': ('RGB', {}),
    'JPEG, progressive': ('RGB', dict(format='JPEG', progressive=True)),
    'JPEG, CMYK': ('CMYK', dict(format='JPEG')),
    'TIFF': ('RGB', {}),
    'TIFF, LZW': ('RGB', dict(format='TIFF', compression='tiff_lzw')),
    'TIFF, JPEG': ('RGB', dict(format='TIFF', compression='jpeg')),
    'TIFF, fax': ('1', dict(format='TIFF', compression='group4')),
    'WEBP': ('RGBA', {}),
    'WEBP, lossless': ('RGB', dict(format='WEBP', lossless=True)),
    'BMP': ('RGB', {}),
    'PPM': ('RGB', {}),
    'GIF': ('P', {}),
    'JPEG2000': ('RGB', {}),
    'AVIF': ('RGB', {}),
    'DDS': ('RGB', {}),
    'BLP': ('P', {}),
    'ICO': ('RGBA', dict(format='ICO', sizes=[(53, 37)])),
    'TGA': ('RGB', dict(format='TGA', compression='tga_rle')),
    'PCX': ('L', {}),
    'SGI': ('RGB', {}),
    'EPS': ('RGB', {}),
}
DAMAGES = ('whole', 'one bit', 'bits', 'header', 'cut', 'hole', 'spliced', 'noise', 'dimensions')


def readers() -> dict[str, Callable[[str], Image.Image]]:
    """Whatever reads an image for a command, by name."""
    found: dict[str, Callable[[str], Image.Image]] = {'experiments/data.py': lambda path: FileImages([path], [0])[0][0]}
    with suppress(ImportError):
        from timm_senetv2.images import LabelledImages

        def labelled(path: str) -> Image.Image:
            reader = type('Reader', (), dict(samples=[(path, 0)], __getitem__=lambda *_: (open(path, 'rb'), 0)))()
            return LabelledImages('x', SimpleNamespace(reader=reader), [0], ['x'], 1).picture(0)

        found['timm_senetv2/images.py'] = labelled
    with suppress(ImportError):
        from timm_senetv2.demo.images import read_image

        found['timm_senetv2/demo/images.py'] = read_image
    return found


@cache
def whole(name: str) -> bytes:
    """An image of the format; empty where this Pillow does not write it."""
    mode, options = FORMATS[name]
    y, x = np.mgrid[:37, :53]
    pixels = np.stack([5 * x, 7 * y, x * y], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == 'I;16' else image.convert(mode)
    buffer = io.BytesIO()
    try:
        image.save(buffer, **{'format': name, **options})
    except (OSError, KeyError):  # built without it
        return b''
    return buffer.getvalue()


def damaged(name: str, damage: str, chance: random.Random) -> bytes:
    content = bytearray(whole(name))
    size = len(content)
    if damage in ('one bit', 'bits', 'header'):
        reach = min(size, 64) if damage == 'header' else size
        for _ in range(1 if damage == 'one bit' else chance.randint(2, 32)):
            content[chance.randrange(reach)] ^= 1 << chance.randrange(8)
    elif damage == 'cut':
        del content[chance.randrange(size) :]
    elif damage == 'hole':
        start, length = chance.randrange(size), chance.randint(1, 256)
        content[start : start + length] = bytes(min(length, size - start))
    elif damage == 'spliced':
        other = whole(chance.choice([n for n in FORMATS if whole(n)]))
        at = chance.randrange(size)
        content[at:] = other[chance.randrange(len(other)) :]
    elif damage == 'noise':
        content = bytearray(content[: chance.choice([0, 2, 4, 8, 16, 32])] + chance.randbytes(chance.randint(0, 2000)))
    elif (
        damage == 'dimensions'
    ):  # any two bytes of the head become the largest numbers: somewhere there the sizes stand
        at = chance.randrange(min(size - 4, 200))
        content[at : at + 4] = chance.choice(
            [b'\xff\xff\xff\x7f', b'\x7f\xff\xff\xff', b'\x00\x00\xff\xff', b'\xff' * 4]
        )
        if name.startswith('PNG'):
            content[16:24] = struct.pack('>2I', *chance.choices([1, 2**16, 2**31 - 1, 30_000, 12_000], k=2))
            content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
    return bytes(content)


def check(seed: int, share: float, jobs: int) -> Tally:
    """Read damaged images in processes of their own, whose crash or hunger for memory is seen."""
    tally = Tally('images')
    chance = random.Random(seed)
    names = [name for name in FORMATS if whole(name)]
    absent = sorted(FORMATS.keys() - set(names))
    if absent:
        tqdm.write(f'this Pillow writes no {", ".join(absent)}')
    every = itertools.cycle(itertools.product(names, DAMAGES, readers()))
    cases = [(*next(every), chance.getrandbits(32)) for _ in range(round(COUNT * share))]
    batches = [cases[i : i + 100] for i in range(0, len(cases), 100)]
    with tqdm(total=len(cases), desc='images', unit='image', disable=None) as bar:
        with ProcessPoolExecutor(jobs, mp_context=context(), initializer=_prepare) as pool:
            futures = [pool.submit(_read_batch, batch) for batch in batches]
            for batch, future in zip(batches, futures, strict=True):
                try:
                    for case, *outcome in future.result(timeout=300):
                        tally.add(case, *outcome)
                except (BrokenProcessPool, TimeoutError) as e:
                    tally.add(f'a batch of {len(batch)} images', 'failed', 0.0, f'{type(e).__name__}: {batch[0]} …')
                bar.update(len(batch))
    return tally


def _prepare() -> None:
    limit_memory(MEMORY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes its remarks there, whatever Pillow makes of them
    warnings.simplefilter('ignore')  # Pillow's, of large and of odd images that it reads


def _read_batch(jobs: list[tuple[str, str, str, int]]) -> list[tuple[str, str, float, str]]:
    found, reads = [], readers()
    with tempfile.TemporaryDirectory() as folder:
        for name, damage, reader, seed in jobs:
            chance = random.Random(seed)
            path = Path(folder) / f'x{chance.choice(SUFFIXES)}'
            path.write_bytes(damaged(name, damage, chance))
            reading = partial(_why_wrong, reads[reader], str(path), damage)
            found.append((f'{reader}: {name}, {damage}', *outcome_of(reading)))
            path.unlink()
    return found


def _why_wrong(read: Callable[[str], Image.Image], path: str, damage: str) -> str | None:
    began = time.process_time()
    image = read(path)
    if image.mode != 'RGB' or not image.width or not image.height:
        return f'an image of mode {image.mode} and size {image.size}'
    pixels = np.asarray(image)
    if damage == 'whole' and (pixels.shape != (37, 53, 3) or not pixels.any()):
        return f'a whole image is read as one of shape {pixels.shape}'
    if time.process_time() - began > 20:
        return 'took more than 20 s'
    return None
