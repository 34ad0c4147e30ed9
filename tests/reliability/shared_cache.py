"""Several processes at once: pretrained weights into one cold cache, and commands that write to one folder."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from hub_server import HubServer
from safetensors.torch import save
from tqdm import tqdm

from experiments.files import read_results

from . import processes
from .hub_faults import TAG, as_hub
from .kills import COMMANDS, Command
from .tally import Tally, why_no_line

PROCESSES = 8


def _load(url: str, cache: str, weights: str) -> None:
    """Load the model by timm's own call, as 8 processes of a training do, and compare it with the source."""
    name, tag, _ = TAG
    with as_hub(url), mock.patch('huggingface_hub.constants.HF_HUB_CACHE', cache):
        state = timm.create_model(f'{name}.{tag}', pretrained=True).state_dict()
    source = torch.load(weights, weights_only=True)
    for key, tensor in source.items():
        if '.se.' not in key and not torch.equal(state[key], tensor):
            raise SystemExit(f'{key} differs')


def check(seed: int, share: float, jobs: int) -> Tally:
    """Start them at once and see what each of them says, and what is there afterwards."""
    tally = Tally('shared_cache')
    count, rounds = (PROCESSES, 4) if share == 1 else (2, 1)
    commands = [c for c in COMMANDS if c.name.split()[-1] in ('convert', '--dry-run', 'reproduce.py')]
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=rounds + len(commands), desc='shared_cache', unit='round', disable=None) as bar,
    ):
        for number in range(rounds):
            _cold_cache(tally, Path(scratch), number, count)
            bar.update()
        for command in commands if share == 1 else commands[:1]:
            _one_folder(tally, Path(scratch), command, count)
            bar.update()
    return tally


def _cold_cache(tally: Tally, scratch: Path, number: int, count: int) -> None:
    name, tag, source_name = TAG
    torch.manual_seed(0)
    source = timm.create_model(source_name)
    weights = scratch / 'weights.pth'
    torch.save(source.state_dict(), weights)
    folder = scratch / f'cache{number}'
    folder.mkdir()
    case = f'{count} processes load pretrained weights into one cold cache'
    with HubServer() as server:
        server.add_repo(
            f'timm/{source_name}.{tag.removeprefix("se_")}', {'model.safetensors': save(source.state_dict())}
        )
        if number % 2:
            case += ', the first download cut off'
            server.fault('GET', '/cdn/', cut=True)
        arguments = (server.url, str(folder), str(weights))
        for code, err, seconds in _at_once(scratch, [(_load, arguments)] * count):
            wrong = '' if code == 0 else f'exit code {code}: {err[-300:]}'
            tally.add(case, 'failed' if wrong else 'right', 0.0, wrong)
            tally.rows[case].slowest_s = max(tally.rows[case].slowest_s, seconds)
        downloads = sum(path.startswith('/cdn/') for method, path in server.requests if method == 'GET')
    if downloads > 2:
        tally.add(f'{case}: downloaded once', 'failed', 0.0, f'downloaded {downloads} times')


def _one_folder(tally: Tally, scratch: Path, command: Command, count: int) -> None:
    """Start a command so many times in one folder: one at least does its work, the others end in one line."""
    folder = scratch / command.name.split()[-1]
    folder.mkdir()
    command.prepare(folder)
    case = f'{command.name}, {count} processes with one --out'
    done = 0
    for code, err, seconds in _at_once(scratch, [(command.main, ())] * count, folder):
        done += code == 0
        wrong = '' if code == 0 else why_no_line(code, err) or ''
        tally.add(case, 'failed' if wrong else 'right' if code == 0 else 'one_line', 0.0, wrong)
        tally.rows[case].slowest_s = max(tally.rows[case].slowest_s, seconds)
    out = folder / command.out
    whole = bool(read_results(out)[0]) if command.module == 'reproduce' else (out / 'model.safetensors').is_file()
    if not done or not whole:
        tally.add(f'{case}: one does its work', 'failed', 0.0, f'{done} did')


def _at_once(scratch: Path, jobs: list[tuple[Any, tuple]], folder: Path | None = None) -> list[tuple[int, str, float]]:
    began = time.monotonic()
    running = [
        processes.start(main, *arguments, folder=folder or scratch, log=scratch / f'log{i}')
        for i, (main, arguments) in enumerate(jobs)
    ]
    ended = []
    for i, process in enumerate(running):
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
        err = Path(f'{scratch}{os.sep}log{i}.err').read_text()
        ended.append((process.exitcode, err, time.monotonic() - began))
    return ended
