"""Files made to do harm, and good ones damaged: no code runs, memory and time stay small, a refusal is one line."""

import csv
import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save
from tqdm import tqdm

from experiments.data import load_dataset
from experiments.files import read_results
from experiments.imagenet_subset import make_subset
from timm_senetv2 import hub
from timm_senetv2.checkpoints import load_weights, read_checkpoint

from .processes import context, limit_memory
from .tally import Tally, outcome_of

MEMORY = 2 << 30  # bytes of address space on top of what a reading process starts with
ROOT = Path(__file__).parents[2]
RUNS = ROOT / 'results' / 'runs' / 'digits_small_cnn'


# ---- what is read


def _read_weights(path: Path) -> str | None:
    """Read a file into a model; what loads must be finite and of the model's shapes."""
    model = timm.create_model('small_cnn')
    load_weights(model, read_checkpoint(path), str(path))
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point()):
        return 'weights that are not finite were loaded'
    return None


def _read_card(path: Path) -> str | None:
    facts = hub.load_facts(path)
    model = timm.create_model('small_cnn', device='meta')
    card = str(hub.render_card(model, 'me/x', facts))
    return None if card.startswith('---\n') else 'a card without its metadata'


# ---- pickles


class _Call:
    """Something that a free unpickling would call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def _payload(canary: Path, chance: random.Random) -> Any:
    """An object whose unpickling would write the canary, were it allowed to."""
    line = f'open({str(canary)!r}, "w").close()'
    return chance.choice(
        [
            _Call(os.system, f'touch {canary}'),
            _Call(eval, line),
            _Call(exec, line),
            _Call(partial, os.system, f'touch {canary}'),
            _Call(os.mkdir, str(canary)),
            _Call(shutil.copy, __file__, str(canary)),
            _Call(np.save, str(canary), 3),
            _Call(getattr, partial(os.system), 'func'),
            _Call(torch.save, 3, str(canary)),
            _Call(torch.load, str(canary)),
            _Call(__import__, 'antigravity'),
        ]
    )


def _pickle(folder: Path, chance: random.Random) -> str | None:
    canary = folder / 'canary'
    content = chance.choice(
        [
            lambda x: x,
            lambda x: {'state_dict': {'fc.weight': x}},
            lambda x: {'epoch': 3, 'weight': _state(), 'optimizer_state_dict': x},
            lambda x: {**_state(), 'extra': x},
            lambda x: {x: torch.ones(1)} if isinstance(x, str) else [x],
        ]
    )(_payload(canary, chance))
    path = folder / f'x{chance.choice([".pth", ".pt", ".bin", ".pth.tar", ".safetensors", ""])}'
    how = chance.choice(['zip', 'legacy', 'plain', 'tar'])
    if how in ('zip', 'legacy'):
        torch.save(content, path, _use_new_zipfile_serialization=how == 'zip')
    elif how == 'plain':
        path.write_bytes(pickle.dumps(content, protocol=chance.randint(0, 5)))
    else:
        with tarfile.open(path, 'w') as tar:
            for name in ('storages', 'tensors', 'pickle'):
                data = pickle.dumps(content, protocol=2)
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    try:
        return _read_weights(path) or 'a file that holds more than weights was taken'
    finally:
        if canary.exists() or (folder / 'canary.npy').exists():
            raise AssertionError('code out of the file was run')


@cache
def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model('small_cnn').state_dict()


# ---- weights


def _damaged_weights(folder: Path, chance: random.Random, suffix: str) -> str | None:
    path = folder / f'x{suffix}'
    buffer = io.BytesIO()
    if suffix == '.safetensors':
        buffer.write(save(_state()))
    else:
        torch.save(_state(), buffer, _use_new_zipfile_serialization=chance.random() < 0.7)
    path.write_bytes(_damage(buffer.getvalue(), chance, head=2000))
    return _read_weights(path)


def _damage(content: bytes, chance: random.Random, head: int) -> bytes:
    """A few bits, the end, a stretch of zeros or of noise: half of the time in the first bytes."""
    data = bytearray(content)
    reach = min(head, len(data)) if chance.random() < 0.5 else len(data)
    how = chance.randrange(4)
    if how == 0:
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(reach)] ^= 1 << chance.randrange(8)
    elif how == 1:
        del data[chance.randrange(reach) :]
    else:
        at, length = chance.randrange(reach), chance.randint(1, 64)
        data[at : at + length] = bytes(length) if how == 2 else chance.randbytes(length)
    return bytes(data)


def _safetensors_header(folder: Path, chance: random.Random) -> str | None:
    tensor = dict(dtype='F32', shape=[2], data_offsets=[0, 8])
    name = chance.choice(['conv.weight', '', 'a\nerror: b', '\x1b[2J', 'x' * 10**6, '__metadata__'])
    change = chance.choice(
        [
            dict(shape=[2**40, 2**40]),
            dict(shape=[2**40, 0], data_offsets=[0, 0]),
            dict(shape=[-1]),
            dict(shape=2),
            dict(shape=[1] * 10_000),
            dict(data_offsets=[0, 2**63]),
            dict(data_offsets=[8, 0]),
            dict(data_offsets=[-8, 0]),
            dict(dtype='F33'),
            dict(dtype=None),
            {},
        ]
    )
    header: bytes = json.dumps({name: {**tensor, **change}, 'b': tensor}).encode()
    header = chance.choice([header, header, header, b'[' * 10**5, b'{"a":' * 10**5, b'{}', b'null', header + b'}'])
    length = chance.choice([len(header)] * 4 + [0, 2**63, 2**64 - 1, 10**9, len(header) - 1])
    (folder / 'x.safetensors').write_bytes(struct.pack('<Q', length) + header + bytes(8))
    return _read_weights(folder / 'x.safetensors')


def _odd_tensors(folder: Path, chance: random.Random) -> str | None:
    """A state dict with something in it that is no plain tensor of the right shape."""
    state = dict(_state())
    key = chance.choice(list(state))
    tensor = state[key]
    odd: Any = chance.choice(
        [
            lambda: tensor.to_sparse(),
            lambda: torch.empty(2**40, 0),
            lambda: torch.ones(1).expand(10**6, 10**6),
            lambda: torch.ones(10**6, 10**6, device='meta'),
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            lambda: torch.full_like(tensor.float(), float('nan')),
            lambda: torch.full_like(tensor.float(), float('inf')),
            lambda: tensor.to(torch.complex64),
            lambda: tensor.to(torch.int8),
            lambda: tensor[None],
            lambda: 3,
            lambda: None,
            lambda: {'a': tensor},
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the making of quantized tensors, not of reading them
        odd = odd()
    state[chance.choice([key, key, key, 'more\x1b[31m', 7])] = odd
    wrapped = chance.choice([state, dict(state_dict=state, epoch=chance.choice(['x', 10**30, odd]), args=[])])
    torch.save(wrapped, folder / 'x.pth')
    return _read_weights(folder / 'x.pth')


def _zip_bomb(folder: Path, chance: random.Random) -> str | None:
    """A checkpoint whose entries are packed, or announce other sizes than they have."""
    torch.save(dict(a=torch.zeros(1000)), folder / 'plain.pth')
    size = chance.choice([1 << 20, 1 << 28])
    with zipfile.ZipFile(folder / 'plain.pth') as plain, zipfile.ZipFile(folder / 'x.pth', 'w') as bomb:
        for name in plain.namelist():
            content = plain.read(name)
            if name.endswith('data/0'):
                content = bytes(size)
            bomb.writestr(name, content, zipfile.ZIP_DEFLATED if chance.random() < 0.7 else zipfile.ZIP_STORED)
    return _read_weights(folder / 'x.pth')


# ---- cards


_CARD = """
summary: A model.
license: mit
datasets: [me/set]
labels: [a, b]
data_config: {mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], crop_pct: 0.9}
training: {command: python train.py, hyperparameters: {epochs: 2}}
results:
  - {file: table.csv, row: {seed: 3}, metrics: {Top-1: top1}, dataset: me/set, dataset_name: Set, split: test}
limits: Few.
"""
_TABLE = 'model,seed,top1\nsmall_cnn,3,91.25\nsmall_cnn,2,90\n'
_YAML = [
    'limits: ' + '[' * 5000,
    'limits: ' + '{a: ' * 5000,
    '- ' * 5000 + 'x',
    ''.join(f'{" " * i}a:\n' for i in range(5000)),
    'a: &a [x]\n'
    + ''.join(f'{c}: &{c} [{", ".join([f"*{p}"] * 9)}]\n' for p, c in zip('abcdefgh', 'bcdefghi', strict=True)),
    'limits: &a [*a]',
    '<<: {summary: x}',
    '? [a]\n: b',
    'summary: !!python/object/apply:os.system [touch canary]',
    'summary: !!python/name:os.system',
    'limits: ' + '9' * 10**5,
    'limits: 1' + ':59' * 1000,
    'limits: ' + 'x' * (2 << 20),
    '%YAML 9.9\n---\nlimits: x',
    'limits: x\n---\nlimits: y',
    '\x00',
    'summary: "\\x1b[2J"',
    'license: "mit\\nlibrary_name: x"',
    'datasets: [me/../../x]',
    'results: [{file: ../../../../etc/passwd, metrics: {a: b}, dataset: a, dataset_name: a, split: a}]',
    'results: [{file: /dev/zero, metrics: {a: b}, dataset: a, dataset_name: a, split: a}]',
]


def _hostile_card(folder: Path, chance: random.Random) -> str | None:
    text = chance.choice(_YAML)
    (folder / 'x.yaml').write_bytes(text.encode(chance.choice(['utf-8'] * 4 + ['utf-16', 'utf-32'])))
    os.chdir(folder)
    wrong = _read_card(folder / 'x.yaml')
    return 'code out of the file was run' if (folder / 'canary').exists() else wrong


def _damaged_card(folder: Path, chance: random.Random) -> str | None:
    text, table = _CARD.encode(), _TABLE.encode()
    if chance.random() < 0.3:
        table = _damage(table, chance, head=20)
    else:
        text = _damage(text, chance, head=200)
    (folder / 'x.yaml').write_bytes(text)
    (folder / 'table.csv').write_bytes(table)
    return _read_card(folder / 'x.yaml')


# ---- tables of results


def _damaged_results(folder: Path, chance: random.Random) -> str | None:
    """The results of committed runs, with damage or with a cell changed by hand."""
    for name in ('results.csv', 'curves.csv'):
        shutil.copy(RUNS / name, folder)
    path = folder / chance.choice(['results.csv', 'curves.csv'])
    if chance.random() < 0.5:
        path.write_bytes(_damage(path.read_bytes(), chance, head=3000))
    else:
        rows = list(csv.reader(io.StringIO(path.read_text())))
        row = chance.choice(rows)
        new = chance.choice(['104042.0', 'inf', 'nan', '0', '1.0', '-1', '', '9' * 400, 'x', '=1+1', '\x00', '"'])
        row[chance.randrange(len(row))] = new
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows(rows)
        path.write_text(text.getvalue())
    results, curves = read_results(folder)
    if {row['run'] for row in results} - {row['run'] for row in curves}:
        return 'results without curves were taken'
    return None


# ---- data sets


def _fashion_mnist(folder: Path, images: bytes, labels: bytes | None = None) -> str | None:
    whole = struct.pack('>HBB3I', 0, 8, 3, 4, 28, 28) + bytes(4 * 784)
    counts = struct.pack('>HBBI', 0, 8, 1, 4) + bytes(4)
    (folder / 'train-images-idx3-ubyte.gz').write_bytes(images)
    (folder / 'train-labels-idx1-ubyte.gz').write_bytes(gzip.compress(counts) if labels is None else labels)
    (folder / 't10k-images-idx3-ubyte.gz').write_bytes(gzip.compress(whole))
    (folder / 't10k-labels-idx1-ubyte.gz').write_bytes(gzip.compress(counts))
    data = load_dataset('fashion-mnist', folder, download=False)
    return None if len(data.train) == 4 and data.train[0][0].size == (28, 28) else 'images of another number or size'


def _damaged_idx(folder: Path, chance: random.Random) -> str | None:
    whole = struct.pack('>HBB3I', 0, 8, 3, 4, 28, 28) + bytes(4 * 784)
    if chance.random() < 0.5:
        return _fashion_mnist(folder, _damage(gzip.compress(whole), chance, head=40))
    return _fashion_mnist(folder, gzip.compress(_damage(whole, chance, head=16)))


def _large_idx(folder: Path, chance: random.Random) -> str | None:
    shape = chance.choice([(2**32 - 1,) * 3, (2**31, 2**31, 4), (2**20, 28, 28), (0, 28, 28), (4, 2**16, 2**16)])
    return _fashion_mnist(folder, gzip.compress(struct.pack('>HBB3I', 0, 8, 3, *shape)))


@cache
def _zeros() -> bytes:
    return gzip.compress(bytes(1 << 26))


def _gzip_bomb(folder: Path, chance: random.Random) -> str | None:
    """Ten gigabytes in ten megabytes, behind a header of the right size."""
    announced = chance.choice([4, 60_000, 100_000])
    return _fashion_mnist(folder, gzip.compress(struct.pack('>HBB3I', 0, 8, 3, announced, 28, 28)) + 160 * _zeros())


_TAR_NAMES = ('../evil.png', '/tmp/evil.png', '../../evil/x.png', 'a/../../b/x.png', 'ant/0.png', '.png')
_TAR_NAMES += ('ant/\x1b[2J.png', 'x' * 300 + '/y.png')


def _hostile_tar(folder: Path, chance: random.Random) -> str | None:
    """A tar for make_imagenet_subset.py with names that lead out of the folder, links, devices, or damage."""
    path, out = folder / 'x.tar', folder / 'deep' / 'out'
    out.parent.mkdir()
    with tarfile.open(path, 'w') as tar:
        for i in range(4):
            info = tarfile.TarInfo(f'ant/{i}.png')
            info.size = 4
            tar.addfile(info, io.BytesIO(b'\x89PNG'))
        info = tarfile.TarInfo(chance.choice(_TAR_NAMES))
        info.type = chance.choice([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
        info.linkname = chance.choice(['/etc/passwd', '../../x', 'ant/0.png'])
        tar.addfile(info)
    if chance.random() < 0.5:
        path.write_bytes(_damage(path.read_bytes(), chance, head=2048))
    before = {p for p in folder.rglob('*')}
    try:
        make_subset(path, out, 2, 0)
    finally:
        foreign = {p for p in folder.rglob('*') if not p.is_relative_to(out)} - before
        if foreign or Path('/tmp/evil.png').exists():
            raise AssertionError(f'written outside DST: {sorted(map(str, foreign))}')
    return None


CASES: dict[str, tuple[int, Callable[[Path, random.Random], str | None]]] = {  # how often in a full run
    'pickle that would run code': (400, _pickle),
    'safetensors file, damaged': (300, partial(_damaged_weights, suffix='.safetensors')),
    'checkpoint, damaged': (300, partial(_damaged_weights, suffix='.pth')),
    'safetensors header, made up': (300, _safetensors_header),
    'checkpoint with odd tensors or keys': (200, _odd_tensors),
    'checkpoint in a packed archive': (20, _zip_bomb),
    'card, hostile YAML': (150, _hostile_card),
    'card or its CSV, damaged': (400, _damaged_card),
    'results.csv or curves.csv, edited or damaged': (500, _damaged_results),
    'idx file, damaged': (150, _damaged_idx),
    'idx header that announces too much': (30, _large_idx),
    'idx file, gzip bomb of 10 GB': (6, _gzip_bomb),
    'tar with hostile names, or damaged': (150, _hostile_tar),
}


def check(seed: int, share: float, jobs: int) -> Tally:
    """Read each in a process that may not take much memory."""
    tally = Tally('hostile_files')
    chance = random.Random(seed)
    cases = [
        (case, chance.getrandbits(32))
        for case, (count, _) in CASES.items()
        for _ in range(max(1, round(count * share)))
    ]
    chance.shuffle(cases)
    batches = [cases[i : i + 50] for i in range(0, len(cases), 50)]
    with tqdm(total=len(cases), desc='hostile_files', unit='file', disable=None) as bar:
        with ProcessPoolExecutor(jobs, mp_context=context(), initializer=_prepare) as pool:
            futures = [pool.submit(_try, batch) for batch in batches]
            for batch, future in zip(batches, futures, strict=True):
                try:
                    for outcome in future.result(timeout=400):
                        tally.add(*outcome)
                except (BrokenProcessPool, TimeoutError) as e:
                    tally.add('a batch that ended its process', 'failed', 0.0, f'{type(e).__name__}: {batch[0]} …')
                bar.update(len(batch))
    return tally


def _prepare() -> None:  # in this module, so that all of its imports come before the limit
    limit_memory(MEMORY)


def _try(jobs: list[tuple[str, int]]) -> list[tuple[str, str, float, str]]:
    found = []
    for case, seed in jobs:
        with tempfile.TemporaryDirectory() as folder:
            found.append((case, *outcome_of(partial(CASES[case][1], Path(folder), random.Random(seed)))))
            os.chdir(ROOT)
    return found
