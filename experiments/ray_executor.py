"""An executor that makes the runs of a grid on a Ray cluster, each run a task.

Three kinds of processes take part. The command owns --out: it writes the rows that come in and shows how far the runs
are. A child of it, `_drive`, is Ray's driver: Ray ends its driver without asking when it loses the cluster, and the
command is then still there to say so in one line. The tasks train, and write nothing but their runs' folders in --out,
which has to be on storage that every node sees.

Images in memory and the weights to start from travel through Ray's object store, and the code as modules of Ray's
runtime environment. Image folders have to be on every node, under the same path.
"""

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import pickle
import platform
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import timm_senetv2
from timm_senetv2.errors import UserError, is_full_disk, one_line, printable
from timm_senetv2.files import MARK

from .batches import Batches
from .data import FileImages
from .grid import Executor, Job, Made, Run, make_run
from .warm_start import Source

LOCAL = 'local'  # the address of a cluster of our own on this machine
JOIN_SECONDS = 120  # to start a cluster or to join one; Ray itself may try for ever
STOP_SECONDS = 30
POLL_SECONDS = 0.5

# What the driver sends: one of these words, and what belongs to it
_READY, _NOTE, _MADE, _FAILED = 'ready', 'note', 'made', 'failed'


@dataclass(frozen=True)
class Cluster:
    """Where the runs are made, and what Ray sets aside for each.

    Attributes:
        address: `LOCAL` for a cluster of our own on this machine, 'auto' for the one that runs here, or HOST:PORT.
        cpus: Cores for a run.
        gpus: GPUs for a run, at most 1.
        max_retries: How often a run is tried again after its worker or its node has died.
    """

    address: str
    cpus: int
    gpus: float
    max_retries: int

    def __str__(self) -> str:
        return 'the Ray cluster' if self.address in (LOCAL, 'auto') else f'the Ray cluster at {self.address}'


@dataclass(frozen=True)
class _Task:
    """What all runs have in common, for the workers."""

    job: Job
    batches: Batches
    source: Source | None
    folder: str  # that relative paths start from
    threads: int  # sums depend on it: the same in every worker as in the command without Ray


def on_ray(
    address: str, device: str, cpus_per_run: int | None = None, gpus_per_run: float | None = None, max_retries: int = 3
) -> Executor:
    """The executor that makes the runs on a cluster.

    Args:
        address: See `Cluster`.
        device: Of the runs, 'cpu' or 'cuda'.
        cpus_per_run: See `Cluster`; None for as many as torch has threads here, on a GPU for one.
        gpus_per_run: See `Cluster`; None for one if the device is 'cuda'.
        max_retries: See `Cluster`.

    Raises:
        UserError: Ray is not installed, or an argument has no meaning; names the option.
    """
    if address not in (LOCAL, 'auto') and not re.fullmatch(r'([^\s:/]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}', address):
        raise UserError(f'--ray takes nothing, auto, or HOST:PORT of a cluster, got {printable(address)!r}')
    if cpus_per_run is not None and cpus_per_run < 1:
        raise UserError(f'--cpus-per-run must be at least 1, got {cpus_per_run}')
    if gpus_per_run is not None and not 0 <= gpus_per_run <= 1:
        raise UserError(f'--gpus-per-run must be from 0 to 1 (a run uses one GPU at most), got {gpus_per_run:g}')
    if device == 'cuda' and gpus_per_run == 0:
        raise UserError('--gpus-per-run 0 leaves no GPU for --device cuda; give a part of one, or --device cpu')
    if device == 'cpu' and gpus_per_run:
        raise UserError(f'--gpus-per-run {gpus_per_run:g} has no meaning with --device cpu; leave one of the two out')
    if max_retries < 0:
        raise UserError(f'--max-retries must be at least 0, got {max_retries}')
    if importlib.util.find_spec('ray') is None:
        raise UserError('ray is not installed; in the clone: pip install -e ".[ray]"')
    if gpus_per_run is None:
        gpus_per_run = 1.0 if device == 'cuda' else 0.0
    if cpus_per_run is None:
        cpus_per_run = 1 if gpus_per_run else torch.get_num_threads()
    cluster = Cluster(address, cpus_per_run, gpus_per_run, max_retries)

    def executor(
        runs: Sequence[Run], job: Job, batches: Batches, source: Source | None, bar: tqdm
    ) -> Generator[Made, None, None]:
        if runs:
            job = replace(job, out=job.out.absolute())
            task = _Task(job, replace(batches, made={}), source, os.getcwd(), torch.get_num_threads())
            yield from _made_on(cluster, runs, task, bar)

    return executor


def _made_on(cluster: Cluster, runs: Sequence[Run], task: _Task, bar: tqdm) -> Generator[Made, None, None]:
    """Start the driver, yield what the cluster makes, and end all of it, however the caller ends."""
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix='timm-senetv2-ray-') as folder:
        log = Path(folder, 'driver.log')
        driver = context.Process(target=_drive, args=(theirs, log, cluster, task, runs), daemon=True)
        with _held_back(signal.SIGINT):  # for ever in the driver: Ctrl-C goes to every process of a terminal
            driver.start()
        theirs.close()
        try:
            yield from _received(ours, log, cluster, runs, task, bar)
        finally:
            ours.close()  # tells the driver to cancel what is left, and to end
            driver.join(STOP_SECONDS)
            if driver.is_alive():
                driver.kill()
                driver.join()


@contextlib.contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _received(
    connection: Connection, log: Path, cluster: Cluster, runs: Sequence[Run], task: _Task, bar: tqdm
) -> Iterator[Made]:
    """What the driver sends, until all runs are made; a UserError if it fails or is lost."""
    left = {run.name: run.spec.settings(task.job.settings).epochs for run in runs}
    start, joined, deadline = bar.n, False, time.monotonic() + JOIN_SECONDS
    bar.set_description('starting Ray' if cluster.address == LOCAL else 'joining Ray')
    while left:
        if not connection.poll(POLL_SECONDS):
            if joined:
                bar.update(start + _epochs(task.job.out / 'runs', left) - bar.n)
                bar.refresh()
            elif time.monotonic() > deadline or 'InvalidAuthToken' in _text(log):
                raise UserError(_not_joined(cluster, log))
            continue
        try:
            what, content = connection.recv()
        except (EOFError, ConnectionError):
            if not joined:
                raise UserError(_not_joined(cluster, log)) from None
            raise UserError(
                f'{cluster} is gone, or its head was restarted; finished runs and epochs are kept: when the cluster '
                f'is up, run the same command again'
            ) from None
        if what == _FAILED:
            raise content
        if what == _NOTE:
            tqdm.write(content)
        if what == _READY:
            joined = True
        if what == _MADE:
            start += left.pop(content.run.name)
            bar.update(max(0, start - bar.n))
            yield content
        bar.set_description(f'{len(runs) - len(left)} of {len(runs)} runs')


def _epochs(folder: Path, left: dict[str, int]) -> int:
    """The finished epochs of runs that are being made: the rows of their histories."""
    total = 0
    with contextlib.suppress(OSError):
        for name in left.keys() & {entry.name for entry in os.scandir(folder)}:
            total += min(max(_text(folder / name / 'history.csv').count('\n') - 1, 0), left[name])
    return total


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8', errors='replace')
    except OSError:
        return ''


def _not_joined(cluster: Cluster, log: Path) -> str:
    text = _text(log)
    if 'InvalidAuthToken' in text:
        return (
            f'{cluster} wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH where '
            f"~/.ray/auth_token is not the cluster's"
        )
    last = next((line for line in reversed(text.splitlines()) if line.strip()), 'Ray did not say why')
    verb = 'started' if cluster.address == LOCAL else 'joined'
    return f'{cluster} could not be {verb}: {printable(last)}'


# In the driver


def _drive(connection: Connection, log: Path, cluster: Cluster, task: _Task, runs: Sequence[Run]) -> None:
    """Make the runs and send each; end when all are sent, when one has failed, or when the command closes its end."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)  # what Ray has to say, it says to these two
    os.dup2(output, 2)
    # Ray lets workers look for modules in the driver's folder and that of its script first: another clone may be there
    os.chdir(log.parent)
    sys.argv = [str(log)]
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # no telemetry unless asked for
    os.environ.setdefault('RAY_task_oom_retries', str(cluster.max_retries))  # Ray's own is without end
    os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')
    import ray

    pending: list[Any] = []
    try:
        _join(cluster, task)
        connection.send((_READY, None))
        if not any(_fits(node, cluster) for node in ray.nodes()):
            needed = f'{cluster.cpus} cores' + (f' and {cluster.gpus:g} GPUs' if cluster.gpus else '')
            if cluster.address == LOCAL:
                raise UserError(f'this machine does not have {needed}; give less as --cpus-per-run or --gpus-per-run')
            connection.send((_NOTE, f'no node of the cluster has {needed} yet; waiting for one'))
        make = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=cluster.max_retries)(_make)
        shared = ray.put(task)
        by_ref = {make.options(name=run.name).remote(shared, run): run for run in runs}
        pending = list(by_ref)
        failed: Exception | None = None
        while pending and failed is None and not connection.poll():
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            if done:  # and whatever else is: nothing finished is lost if one of them has failed
                more, pending = ray.wait(pending, num_returns=len(pending), timeout=0) if pending else ([], [])
                done += more
            for ref in done:
                try:
                    connection.send((_MADE, ray.get(ref)))
                except ray.exceptions.RayError as e:
                    failed = failed or _failure(e, by_ref[ref], cluster)
        if failed is not None:
            connection.send((_FAILED, failed))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the command has ended
    except Exception as e:
        with contextlib.suppress(OSError):
            connection.send((_FAILED, e if isinstance(e, UserError) else UserError(f'{cluster}: {one_line(e)}')))
    finally:
        if ray.is_initialized():
            for ref in pending:
                ray.cancel(ref, force=True)
            if pending:
                ray.wait(pending, num_returns=len(pending), timeout=STOP_SECONDS / 3)
            ray.shutdown()


def _join(cluster: Cluster, task: _Task) -> None:
    """Join the cluster, or start one; a UserError where there is none."""
    import ray

    options: dict[str, Any] = dict(address=cluster.address)
    if cluster.address == LOCAL:
        # what Ray would take by itself is a third of the memory, for a few megabytes of images
        size = len(pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL))
        options.update(include_dashboard=False, object_store_memory=2 * size + 2**27)
    elif cluster.address != 'auto':
        host, _, port = cluster.address.rpartition(':')
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=10).close()
        except (OSError, OverflowError) as e:
            raise UserError(
                f'nothing answers at {cluster.address} ({one_line(e)}); start a cluster there with '
                f'`ray start --head --port {port}`, or leave out the address to start one on this machine'
            ) from None
    packages = [str(Path(module).parent) for module in (__file__, timm_senetv2.__file__)]
    try:
        ray.init(
            **options,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=dict(py_modules=packages, excludes=['**/__pycache__']),
        )
    except Exception as e:  # no cluster, other versions of Ray or Python, no node on this machine: each has its own
        if cluster.address == 'auto' and isinstance(e, ConnectionError):
            raise UserError('--ray auto: no Ray cluster runs on this machine; leave out auto to start one') from None
        verb = 'started' if cluster.address == LOCAL else 'joined'
        raise UserError(f'{cluster} could not be {verb}: {one_line(e)}') from None


def _fits(node: dict[str, Any], cluster: Cluster) -> bool:
    resources = node['Resources']
    return node['Alive'] and resources.get('CPU', 0) >= cluster.cpus and resources.get('GPU', 0) >= cluster.gpus


def _failure(error: Exception, run: Run, cluster: Cluster) -> Exception:
    """What the command ends with when a run has failed."""
    import ray

    cause = getattr(error, 'cause', None)
    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(cause, UserError):
            return UserError(str(cause))
        if isinstance(cause, OSError) and is_full_disk(cause):
            return OSError(cause.errno, cause.strerror, cause.filename)
        return RuntimeError(f'{run.spec} seed {run.seed} failed in its worker\n{error}')
    name = f'{run.spec} seed {run.seed}'
    died = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    if not isinstance(error, died):
        return UserError(f'{name} could not be made by Ray: {one_line(error)}')
    tries = f'{cluster.max_retries + 1} times' if cluster.max_retries else 'once'
    return UserError(
        f'{name} was tried {tries}, and its worker or node died ({one_line(error)[:200]}); run the same command '
        f'again, and it goes on at the last finished epoch'
    )


# In the workers

_kept: dict[Job, Batches] = {}  # a worker makes many runs, and prepares the images once


def _make(task: _Task, run: Run) -> Made:
    """Make a run in a worker, as `one_after_the_other` would make it in the command."""
    node = platform.node()
    if not (task.job.out / MARK).exists():
        raise UserError(f'the node {node} does not see {task.job.out}: --out must be on storage that every node sees')
    with contextlib.suppress(OSError):
        os.chdir(task.folder)
    torch.set_num_threads(task.threads)
    batches = _kept.setdefault(task.job, task.batches)
    images = batches.data.train
    if isinstance(images, FileImages) and not os.path.exists(images.paths[0]):
        raise UserError(f'the node {node} does not see {printable(images.paths[0])}: images must be on every node')
    return make_run(run, task.job, batches, task.source, lambda done, history: None)
