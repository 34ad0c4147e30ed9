"""One training by several torchrun agents, as on several machines, on this one's loopback: timm's train.py unchanged.

What is in docs/many-machines.md about restarts and `--resume auto` is tested here with the real script.
"""

import contextlib
import csv
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get('TIMM_REPO'),
        reason=f"timm's scripts are not in its wheel: set TIMM_REPO to a checkout of timm v{timm.__version__}",
    ),
]

MODEL = 'cifar_senetv2_resnet20'
CLASSES = 3
EACH = {'train': 16, 'validation': 4}  # images of a class
EPOCHS, LONG = 12, 40  # the long one must not end before another agent has started
PATIENCE = 600.0  # seconds for anything to happen; a busy machine takes a minute to start two processes


def pictures(split: str) -> Iterator[tuple[str, int, bytes]]:
    """Name, class and PNG file of each image; the classes differ in colour."""
    rng = np.random.default_rng(0)
    for i in range(EACH[split]):
        for label in range(CLASSES):
            pixels = rng.integers(0, 200, (32, 32, 3))
            pixels[..., label] += 50
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, 'png')
            yield f'{label}_{i}', label, file.getvalue()


def write_folder(folder: Path) -> list[str]:
    """An image folder; returns the options of train.py that read it."""
    for split in EACH:
        for name, label, png in pictures(split):
            path = folder / split / f'class{label}' / f'{name}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
    return ['--data-dir', str(folder)]


def write_shards(folder: Path) -> list[str]:
    """Four webdataset shards for training and two for validation: one or more for each of two readers."""
    pytest.importorskip('webdataset')
    folder.mkdir()
    options = ['--data-dir', str(folder), '--dataset', 'wds/']
    for split, shards in (('train', 4), ('validation', 2)):
        images = list(pictures(split))
        for shard in range(shards):
            with tarfile.open(folder / f'{split}-{shard:04}.tar', 'w') as archive:
                for name, label, png in images[shard::shards]:
                    for end, content in (('png', png), ('cls', str(label).encode())):
                        member = tarfile.TarInfo(f'{name}.{end}')
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        name = f'{split}-{{0000..{shards - 1:04}}}.tar|{len(images)}'
        options += ['--train-split' if split == 'train' else '--val-split', name]
    return options


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def children(pid: int) -> list[int]:
    """Processes that a process started, and those that these started."""
    told = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True).stdout
    own = [int(word) for word in told.split()]
    return own + [grandchild for child in own for grandchild in children(child)]


class Job:
    """A training by several agents that share an output folder and write a log each."""

    def __init__(self, tmp_path: Path, nnodes: str, data: list[str], epochs: int) -> None:
        self.folder, self.run, self.nnodes = tmp_path, tmp_path / 'output' / 'run', nnodes
        self.agents: list[subprocess.Popen] = []
        self.command = [
            *(sys.executable, '-m', 'torch.distributed.run', '--nnodes', nnodes, '--nproc_per_node', '1'),
            *('--rdzv_backend', 'c10d', '--rdzv_endpoint', f'127.0.0.1:{free_port()}', '--rdzv_id', 'run'),
            *('--rdzv_conf', f'join_timeout={PATIENCE:.0f},last_call_timeout=2', '--local_addr', '127.0.0.1'),
            *('--max_restarts', '5', '--monitor_interval', '0.5', '-m', 'timm_senetv2', 'train', *data),
            *('--model', MODEL, '--num-classes', str(CLASSES), '--epochs', str(epochs), '--batch-size', '12'),
            *('--device', 'cpu', '--workers', '1', '--sched', 'constant', '--warmup-epochs', '0', '--lr', '0.01'),
            *('--output', str(self.run.parent), '--experiment', self.run.name, '--resume', 'auto'),
        ]

    def start_agent(self) -> subprocess.Popen:
        with (self.folder / f'agent{len(self.agents)}.log').open('w') as log:
            environment = dict(os.environ, OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', PYTHONUNBUFFERED='1')
            if ':' in self.nnodes:  # else agents that were there before do not tell a new one where the store is
                environment['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'
            agent = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )
        self.agents.append(agent)
        return agent

    def log(self) -> str:
        return '\n'.join(path.read_text() for path in sorted(self.folder.glob('agent*.log')))

    def epochs(self) -> list[int]:
        """Those that train.py has finished, in the order of its summary, which has a head after each restart."""
        path = self.run / 'summary.csv'
        if not path.exists():
            return []
        with path.open(newline='') as file:
            return [int(row[0]) for row in csv.reader(file) if row and row[0].isdigit()]

    def checkpoint(self) -> int:
        """The epoch of the newest checkpoint; -1 before the first."""
        with contextlib.suppress(OSError, RuntimeError, EOFError):
            return torch.load(self.run / 'last.pth.tar', map_location='cpu', weights_only=False)['epoch']
        return -1

    def wait(self, what: Callable[[], object], name: str) -> None:
        end = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < end, f'{name} did not happen:\n{self.log()[-6000:]}'
            codes = [agent.poll() for agent in self.agents]
            assert name == 'the end' or any(code is None for code in codes), f'no agent is left:\n{self.log()[-6000:]}'
            time.sleep(0.2)

    def finish(self, agents: list[subprocess.Popen]) -> None:
        self.wait(lambda: all(agent.poll() is not None for agent in agents), 'the end')
        assert [agent.returncode for agent in agents] == [0] * len(agents), self.log()[-6000:]

    def stop(self) -> None:
        for agent in self.agents:
            for pid in [*children(agent.pid), agent.pid] if agent.poll() is None else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            agent.wait()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[str, list[str], int], Job]]:
    jobs: list[Job] = []

    def start(nnodes: str, data: list[str], epochs: int) -> Job:
        jobs.append(Job(tmp_path, nnodes, data, epochs))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()


def worker_of(agent: subprocess.Popen) -> int:
    """The training process of an agent with one; its own children are loaders."""
    told = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(agent.pid)], capture_output=True, text=True).stdout.split()
    assert told, 'the agent has no worker'
    return int(told[0])


@pytest.mark.parametrize('write', [write_folder, write_shards], ids=['image folder', 'webdataset shards'])
def test_two_agents_go_on_after_a_worker_was_killed(write, start, tmp_path, hub_server):
    job = start('2', write(tmp_path / 'images'), EPOCHS)
    agents = [job.start_agent(), job.start_agent()]
    job.wait(lambda: job.checkpoint() >= 1, 'a second checkpoint')
    os.kill(worker_of(agents[1]), signal.SIGKILL)
    reached = job.checkpoint()
    job.finish(agents)

    log = job.log()
    assert 'total 2' in log  # timm's line about its processes
    resumed = [line for line in log.splitlines() if line.startswith('resuming from ')]
    assert resumed and str(job.run) in resumed[-1]
    # nothing skipped; at most the epoch whose checkpoint was not yet written is there twice
    assert list(dict.fromkeys(job.epochs())) == list(range(EPOCHS))
    assert reached < EPOCHS - 1 and job.checkpoint() == EPOCHS - 1

    hub_server.tokens['hf_sentinel'] = 'write'
    hub = dict(HF_ENDPOINT=hub_server.url, HF_HOME=str(tmp_path / 'hf'), HF_HUB_DISABLE_XET='1', HF_TOKEN='hf_sentinel')
    pushed = subprocess.run(
        [
            *(sys.executable, '-m', 'timm_senetv2', 'push', '--model', MODEL, '--repo-id', 'me/mine'),
            *('--checkpoint', str(job.run / 'last.pth.tar'), '--license', 'mit'),
        ],
        env=os.environ | hub,
        capture_output=True,
        text=True,
    )
    assert pushed.returncode == 0, pushed.stderr
    assert 'model.safetensors' in hub_server.model('me/mine').files()


def test_elastic_job_takes_in_an_agent_and_goes_on_without_it(start, tmp_path):
    job = start('1:2', write_folder(tmp_path / 'images'), LONG)
    first = job.start_agent()
    job.wait(lambda: job.checkpoint() >= 0, 'a checkpoint of one agent')
    assert 'total 2' not in job.log()
    second = job.start_agent()
    job.wait(lambda: 'total 2' in job.log(), 'a training of two')
    reached = job.checkpoint()
    job.wait(lambda: job.checkpoint() > reached, 'a checkpoint of two')
    for pid in [*children(second.pid), second.pid]:  # the machine is gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    reached = job.checkpoint()
    job.finish([first])
    assert reached < LONG - 1, 'the job had ended before the second agent was killed: give it more epochs'
    assert list(dict.fromkeys(job.epochs())) == list(range(LONG)) and job.checkpoint() == LONG - 1
