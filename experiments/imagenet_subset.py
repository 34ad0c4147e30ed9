"""The SENetV2 paper's reduced ImageNet: the same number of training images for every class, without copies."""

import hashlib
import json
import os
import re
import sys
import tarfile
from collections import defaultdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from timm.data.readers import create_reader
from tqdm import tqdm

from timm_senetv2.errors import UserError, one_line, printable
from timm_senetv2.files import write_atomically

from .data import refuse_loops

MANIFEST = 'manifest.json'
VALIDATION = ('validation', 'val', 'valid', 'eval', 'evaluation')  # what train.py looks for


class Source:
    """The training images of a folder or tar, as timm reads them.

    Attributes:
        images: For each class, the reader's index of each image by its file name; none where its folder is empty.
    """

    def __init__(self, path: Path) -> None:
        self.is_tar = path.is_file()
        if not path.exists() or self.is_tar and path.suffix != '.tar':
            raise UserError(f'{printable(path)} is neither a folder nor a .tar file')
        try:
            if not self.is_tar:
                refuse_loops(path)
            if sys.stderr.isatty():  # as tqdm's bars
                print(f'reading {printable(path)}', file=sys.stderr)
            options: dict[str, Any] = dict(cache_tarinfo=False) if self.is_tar else {}
            self._reader = create_reader('', str(path), **options)
        except (RuntimeError, ValueError):  # of the folder reader, of the tar reader
            raise UserError(f'{printable(path)} holds no images that timm reads') from None
        except (tarfile.TarError, EOFError, OSError) as e:
            raise UserError(f'{printable(path)} cannot be read: {one_line(e)}') from None
        if self.is_tar and not ends_as_a_tar(path):
            raise UserError(
                f'{printable(path)} is cut short: it lacks the zeros that a tar ends with; get the file again'
            )

        if self.is_tar:
            names, targets = self._reader.class_idx_to_name, self._reader.targets
        else:
            names = {index: name for name, index in self._reader.class_to_idx.items()}
            targets = [target for _, target in self._reader.samples]
        self._paths = self._reader.filenames(absolute=True)
        self.images: dict[str, dict[str, int]] = defaultdict(dict)
        for index, (image, target) in enumerate(zip(self._paths, targets, strict=True)):
            label, name = names[target], PurePosixPath(Path(image).as_posix()).name
            if label in ('', '.', '..'):
                raise UserError(
                    f'{printable(image)} is in no class: {printable(path)} must hold a folder of images for each class'
                )
            if name in self.images[label]:
                raise UserError(
                    f'class {printable(label)} of {printable(path)} has two images named {printable(name)}; '
                    'give one another name'
                )
            self.images[label][name] = index
        if not self.is_tar:
            used = {Path(image).relative_to(path).parts[0] for image in self._paths}
            for folder in path.iterdir():
                if folder.is_dir() and folder.name not in used and not folder.name.startswith('.'):
                    self.images.setdefault(folder.name, {})

    def put(self, index: int, target: Path) -> None:
        """Link image `index` at `target`, or write it there from a tar; leaves alone what is there already."""
        if self.is_tar:
            content = self._reader[index][0].read()
            if target.is_symlink() or target.exists():
                if target.is_symlink() or not target.is_file() or target.read_bytes() != content:
                    raise UserError(
                        f'{printable(target)} is in the way and not of this subset; remove it and run this again'
                    )
            else:
                write(target, content)
        else:
            link(Path(self._paths[index]), target)


def ends_as_a_tar(path: Path) -> bool:
    """Whether the file's last block is of zeros. Python's tarfile takes a tar cut inside a header for whole."""
    with path.open('rb') as file:
        file.seek(-min(512, path.stat().st_size), os.SEEK_END)
        return not any(file.read())


def write(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)


def is_leftover(path: Path) -> bool:
    """Whether a file in a folder of ours has the name that `write_atomically` gives to a file that is not yet whole."""
    return re.fullmatch(r'\.[0-9a-f]{12}(\.\w+)?', path.name) is not None and not path.is_symlink()


def link(source: Path, target: Path) -> None:
    """Link `target` to `source`, by its absolute path; leaves that link alone where it is already there."""
    source = source.absolute()
    if target.is_symlink() and os.readlink(target) == str(source):
        return
    if target.is_symlink() or target.exists():
        raise UserError(f'{printable(target)} is in the way and not of this subset; remove it and run this again')
    target.symlink_to(source, target_is_directory=source.is_dir())


def choose(images: dict[str, dict[str, int]], per_class: int, seed: int) -> dict[str, list[str]]:
    """The names of the chosen images of each class, sorted."""

    def rank(label: str, name: str) -> bytes:
        return hashlib.sha256(os.fsencode(f'{seed}/{label}/{name}')).digest()

    return {label: sorted(sorted(images[label], key=partial(rank, label))[:per_class]) for label in sorted(images)}


def claim(dst: Path, manifest: dict) -> None:
    """Make DST this subset's: a new or empty folder, or one where a run with the same manifest was interrupted."""
    if (dst / MANIFEST).is_file():
        try:
            with open(dst / MANIFEST, encoding='utf-8') as f:
                old = json.load(f)
            same = {k: v for k, v in old.items() if k != 'complete'} == manifest
            described = f'{old["per_class"]} images a class with seed {old["seed"]} from {old["source"]}'
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f'{printable(dst / MANIFEST)} is not of this script; choose another DST') from None
        if not same:
            raise UserError(
                f'{printable(dst)} is already another subset ({described}, or the source has changed since); '
                'remove it or choose another DST'
            )
        return
    if dst.exists() and (not dst.is_dir() or any(not is_leftover(p) for p in dst.iterdir())):
        raise UserError(f'{printable(dst)} exists and is not a subset made by this script; choose another DST')
    dst.mkdir(parents=True, exist_ok=True)
    write_manifest(dst, manifest, complete=False)


def write_manifest(dst: Path, manifest: dict, complete: bool) -> None:
    write(dst / MANIFEST, (json.dumps(dict(complete=complete, **manifest), indent=1) + '\n').encode())


def refuse_foreign(train: Path, chosen: dict[str, list[str]]) -> None:
    """Raise a UserError if there are images that are not of the subset; remove what a kill left half-written."""
    for folder in train.iterdir():
        names = set(chosen.get(folder.name, ()))
        for path in folder.iterdir() if folder.is_dir() else [folder]:
            if path.name not in names or path == folder:
                if is_leftover(path):
                    path.unlink()
                    continue
                raise UserError(f'{printable(path)} is not of this subset; remove it and run this again')


def make_subset(src: Path, dst: Path, per_class: int, seed: int) -> None:
    """Link so many training images of each class into a new folder, or write them there out of a tar.

    Args:
        src: A folder with train/, a folder with a folder for each class, or a tar that timm reads.
        dst: The folder to make, or one where this was interrupted.
        per_class: Images of each class.
        seed: Of the choice, by a hash of the seed and the image's class and file name.

    Raises:
        UserError: A source or a destination that will not do; says why.
    """
    if per_class < 1:
        raise UserError(f'--per-class must be at least 1, got {per_class}')
    if os.path.lexists(dst) and not dst.is_dir():
        raise UserError(f'{printable(dst)} is a file or a broken link; choose another DST')

    train = src / 'train' if (src / 'train').is_dir() else src
    if Path(os.path.realpath(dst)).is_relative_to(os.path.realpath(src)):
        raise UserError(f'DST ({printable(dst)}) lies inside SRC ({printable(src)}); choose a DST outside')
    source = Source(train)
    chosen = choose(source.images, per_class, seed)
    files = [(label, name) for label, names in chosen.items() for name in names]
    listing = ''.join(f'{label}/{name}\n' for label, names in chosen.items() for name in names)
    digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
    short = {label: len(names) for label, names in chosen.items() if len(names) < per_class}
    manifest = dict(
        source=str(train.resolve()),
        seed=seed,
        per_class=per_class,
        images=len(files),
        sha256=digest,
        short=short,
        classes=chosen,
    )
    try:
        claim(dst, manifest)
        for label in chosen:
            (dst / 'train' / label).mkdir(parents=True, exist_ok=True)
        refuse_foreign(dst / 'train', chosen)
        for path in dst.iterdir():
            if is_leftover(path):
                path.unlink()
        for label, name in tqdm(files, 'extracting' if source.is_tar else 'linking', unit='image', disable=None):
            source.put(source.images[label][name], dst / 'train' / label / name)
        validation = None
        if train != src:
            validation = next((src / v for v in VALIDATION if (src / v).is_dir()), None)
        if validation:
            link(validation, dst / validation.name)
        write_manifest(dst, manifest, complete=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as e:
        raise UserError(f'{printable(e.filename)} cannot be written: {e.strerror}') from None

    print(f'{dst}: {len(files)} images of {len(chosen)} classes, sha256 {digest}')
    if not validation:
        print(
            f'{src} has no validation images: put a folder or link validation/ into {dst}, or train with --val-split ""'
        )
    if short:
        shown = ', '.join(f'{label} ({count})' for label, count in list(short.items())[:10])
        print(
            f'warning: fewer than {per_class} images in {len(short)} of {len(chosen)} classes: {shown}'
            + (f' and {len(short) - 10} more, see {dst / MANIFEST}' if len(short) > 10 else ''),
            file=sys.stderr,
        )
    tested = {folder.name for folder in validation.iterdir() if folder.is_dir()} if validation else set()
    different = sorted(tested ^ {label for label, names in chosen.items() if names})
    if tested and different:
        print(
            f'warning: training and validation images are not of the same classes (only one has {different[0]}, '
            f'{len(different)} in all), and timm numbers the classes of each alone: mend the source, or give '
            "train.py's --class-map",
            file=sys.stderr,
        )
