"""Sweeps on Ray: the same rows as without it, whatever dies on the way.

The clusters are real ones of several raylets on this machine; only the mistakes on the command line need no Ray.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import reproduce

from experiments import ray_executor
from experiments.ray_executor import on_ray
from timm_senetv2.errors import UserError

SCRIPT = Path(reproduce.__file__)
DIGITS = ['--dataset', 'digits', '--image-size', '8', '--crop-padding', '1', '--batch-size', '16', '--device', 'cpu']
GRID = [*DIGITS, '--limit', '200', '--models', 'small_cnn', 'small_saecnn', '--seeds', '0', '1', '--epochs', '12']
RUNS, EPOCHS = 4, 12
MEASURED = ('seconds', 'command')
STORE = 100 * 2**20  # bytes of a node's object store
LIMIT = 240  # seconds until something has to have happened, on a machine that does ten other things

needs_ray = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec('ray') is None, reason='needs ray'),
]


def rows(out: Path, name: str = 'results.csv') -> list[dict[str, str]]:
    with (out / name).open(newline='') as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f'waited in vain until {what}'
        time.sleep(0.05)


# The command line


@pytest.mark.parametrize(
    'words, says',
    [
        (['--ray', 'ray://head:10001'], '--ray takes nothing, auto, or HOST:PORT'),
        (['--ray', 'head'], '--ray takes nothing, auto, or HOST:PORT'),
        (['--ray', '--cpus-per-run', '0'], '--cpus-per-run must be at least 1'),
        (['--ray', '--gpus-per-run', '2', '--device', 'cuda'], '--gpus-per-run must be from 0 to 1'),
        (['--ray', '--gpus-per-run', 'nan', '--device', 'cuda'], '--gpus-per-run must be from 0 to 1'),
        (['--ray', '--gpus-per-run', '0', '--device', 'cuda'], 'leaves no GPU for --device cuda'),
        (['--ray', '--gpus-per-run', '0.5'], 'has no meaning with --device cpu'),
        (['--ray', '--max-retries', '-1'], '--max-retries must be at least 0'),
        (['--gpus-per-run', '0.5'], '--gpus-per-run has a meaning with --ray only'),
        (['--max-retries', '1'], '--max-retries has a meaning with --ray only'),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, words, says):
    with pytest.raises(UserError) as error:
        reproduce.main([*GRID, '--out', str(tmp_path / 'out'), *words])
    assert says in str(error.value) and '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_without_ray_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'ray is not installed; in the clone: pip install -e "\.\[ray\]"'):
        on_ray('local', 'cpu')
    assert re.search(r'^ray = \[', (SCRIPT.parents[1] / 'pyproject.toml').read_text(), flags=re.M)


# On real clusters


class Command:
    """reproduce.py in a session of its own, as a terminal has it."""

    started: 'list[Command]' = []

    def __init__(self, *words: str | Path) -> None:
        self.started.append(self)
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a shell starts what follows & with Ctrl-C ignored, and the tests would hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def end(self) -> tuple[int, list[str]]:
        """Its exit code and its lines on stderr."""
        _, errors = self.process.communicate(timeout=2 * LIMIT)
        assert 'Traceback' not in errors
        return self.process.returncode, errors.splitlines()


def children(pid: int) -> set[int]:
    """The process and all below it."""
    parents: dict[int, list[int]] = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = path.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, left = set(), [pid]
    while left:
        found.add(pid := left.pop())
        left += parents.get(pid, [])
    return found


def busy_workers(*runs: str) -> dict[int, str]:
    """The processes that make a run now: Ray calls them by the names of their tasks."""
    found = {}
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            words = path.read_bytes().split(b'\0')[0].decode(errors='replace')
        except OSError:
            continue
        if words.startswith('ray::small_'):
            found[int(path.parent.name)] = words.removeprefix('ray::').strip()
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def history(out: Path, run: str) -> list[list[float]]:
    """The rows of a run's finished epochs, with the seconds that each took: an epoch made twice shows."""
    try:
        lines = (out / 'runs' / run / 'history.csv').read_text().splitlines()[1:]
    except OSError:
        return []
    return [[float(value) for value in line.split(',')] for line in lines]


@pytest.fixture(scope='module', autouse=True)
def environment() -> Iterator[None]:
    if find_spec('ray') is not None:
        import ray.cluster_utils  # noqa: F401  # sets RAY_CLIENT_MODE, before a test's environment is looked at
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        patch.setenv('RAY_AUTH_MODE', 'disabled')
        patch.setenv('OMP_NUM_THREADS', '1')
        patch.setenv('RAY_worker_niceness', '0')  # Ray's is 15, and other tests may run beside these
        patch.setenv('RAY_memory_monitor_refresh_ms', '0')  # nor are runs to die for the memory that others take
        yield


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A command that a failed test has left running would go on for minutes."""
    yield
    for command in Command.started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()
    Command.started.clear()


@pytest.fixture(scope='module')
def whole(tmp_path_factory, environment) -> Path:
    """The grid without Ray, never interrupted."""
    out = tmp_path_factory.mktemp('whole')
    code, _ = Command(*GRID, '--out', out).end()
    assert code == 0 and len(rows(out)) == RUNS
    return out


@pytest.fixture
def cluster(environment) -> Iterator:
    """Starts a cluster of a head without cores and so many nodes with two each."""
    from ray.cluster_utils import Cluster

    started = []

    def start(nodes: int) -> Cluster:
        cluster = Cluster(
            initialize_head=True,
            head_node_args=dict(num_cpus=0, object_store_memory=STORE, include_dashboard=False),
            shutdown_at_exit=False,
        )
        started.append(cluster)
        for _ in range(nodes):
            cluster.add_node(num_cpus=2, object_store_memory=STORE)
        return cluster

    yield start
    for one in started:
        one.shutdown()


def raylet(node) -> int:
    return node.all_processes['raylet'][0].process.pid


def assert_same(out: Path, whole: Path) -> None:
    assert rows(out) == rows(whole)
    assert rows(out, 'curves.csv') == rows(whole, 'curves.csv')


class TestOnClusters:
    pytestmark = needs_ray

    def test_a_cluster_of_its_own_makes_the_same_rows_and_is_gone_afterwards(self, whole, tmp_path):
        command = Command(*GRID, '--out', tmp_path, '--ray')
        wait_for(busy_workers, 'a run is made')
        below = children(command.process.pid)
        code, _ = command.end()
        assert code == 0
        assert_same(tmp_path, whole)
        wait_for(lambda: not any(map(is_alive, below)), 'its processes are gone')

    @pytest.mark.parametrize('nodes, cores', [(2, 2), (4, 1)])
    def test_any_number_of_nodes_and_workers_makes_the_same_rows(
        self, whole, tmp_path, monkeypatch, cluster, nodes, cores
    ):
        address = cluster(nodes).address
        words = ['--ray', address, '--cpus-per-run', str(cores)]
        # the code travels, and is not what happens to have its name in the folder of the command
        (tmp_path / 'experiments').mkdir()
        (tmp_path / 'experiments' / '__init__.py').write_text('')
        monkeypatch.chdir(tmp_path)
        code, errors = Command(*GRID, '--out', 'out', *words).end()
        assert code == 0, errors
        assert_same(tmp_path / 'out', whole)
        assert not list((tmp_path / 'out' / 'runs').glob('*/*'))

    @pytest.mark.parametrize('victim', ['worker', 'node'])
    def test_a_run_whose_worker_or_node_dies_goes_on_at_its_last_epoch(self, whole, tmp_path, cluster, victim):
        started = cluster(2)
        command = Command(*GRID, '--out', tmp_path, '--keep-checkpoints', '--ray', started.address)
        half_made = {}

        def found() -> bool:
            for pid, run in busy_workers().items():
                if 3 <= len(history(tmp_path, run)) < EPOCHS - 3:
                    half_made[pid] = run
            return bool(half_made)

        wait_for(found, 'a run has made some epochs')
        pid, run = half_made.popitem()
        if victim == 'worker':
            os.kill(pid, signal.SIGKILL)
        else:
            node = next(node for node in started.worker_nodes if pid in children(raylet(node)))
            started.remove_node(node, allow_graceful=False)
        before = history(tmp_path, run)
        code, errors = command.end()
        assert code == 0, errors
        assert_same(tmp_path, whole)
        # killed between an epoch's history and its checkpoint, the run makes that one epoch again
        assert len(before) >= 3 and history(tmp_path, run)[: len(before) - 1] == before[:-1]

    def test_the_head_restarted_is_one_line_and_the_same_command_goes_on(self, whole, tmp_path, cluster):
        first = cluster(2)
        words = [*GRID, '--out', tmp_path, '--keep-checkpoints', '--ray']
        command = Command(*words, first.address)
        wait_for(lambda: any(len(history(tmp_path, run)) >= 3 for run in busy_workers().values()), 'epochs are made')
        first.shutdown()
        code, errors = command.end()
        assert code == 2
        assert re.match(r'error: the Ray cluster at .* is gone, .* run the same command again$', errors[-1])
        wait_for(lambda: not busy_workers(), 'its tasks are gone')
        before = {path.name: history(tmp_path, path.name)[:-1] for path in (tmp_path / 'runs').iterdir()}
        code, errors = Command(*words, cluster(2).address).end()
        assert code == 0, errors
        assert_same(tmp_path, whole)
        assert any(before.values())
        for run, epochs in before.items():
            assert history(tmp_path, run)[: len(epochs)] == epochs

    def test_a_full_disk_is_one_line_and_nothing_is_lost(self, whole, tmp_path):
        disk = tmp_path / 'disk'
        disk.mkdir()
        if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk]).returncode:
            pytest.skip('only root may mount a small disk')
        try:
            words = [*GRID, '--out', disk / 'out', '--keep-checkpoints', '--ray', '--cpus-per-run', '1']
            code, errors = Command(*words).end()
            assert code == 2 and re.match('error: .*disk is full', errors[-1]), errors
            finished = rows(disk / 'out') if (disk / 'out' / 'results.csv').exists() else []
            assert all(row in rows(whole) for row in finished)
            subprocess.run(['mount', '-o', 'remount,size=200m', disk], check=True)
            code, errors = Command(*words).end()
            assert code == 0, errors
            assert sorted(map(str, rows(disk / 'out'))) == sorted(map(str, rows(whole)))
        finally:
            subprocess.run(['umount', disk], check=True)

    @pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
    def test_ended_it_leaves_no_task_and_a_joined_cluster_running(self, whole, tmp_path, cluster, number, code):
        """Ctrl-C goes to every process of the terminal; a kill to the command alone."""
        started = cluster(2)
        words = [*GRID, '--out', tmp_path, '--keep-checkpoints', '--ray', started.address]
        command = Command(*words)
        wait_for(lambda: any(len(history(tmp_path, run)) >= 2 for run in busy_workers().values()), 'epochs are made')
        below = children(command.process.pid)
        os.killpg(command.process.pid, number) if number == signal.SIGINT else command.process.kill()
        exit_code, errors = command.end()
        assert exit_code == code
        if number == signal.SIGINT:
            assert errors[-1] == 'interrupted'
        wait_for(lambda: not busy_workers() and not any(map(is_alive, below)), 'its processes and tasks are gone')
        before = {path.name: history(tmp_path, path.name)[:-1] for path in (tmp_path / 'runs').iterdir()}
        assert any(before.values())
        exit_code, errors = Command(*words).end()
        assert exit_code == 0, errors
        assert sorted(map(str, rows(tmp_path))) == sorted(map(str, rows(whole)))
        for run, epochs in before.items():
            assert history(tmp_path, run)[: len(epochs)] == epochs

    def test_ended_by_ctrl_c_it_shuts_down_a_cluster_of_its_own(self, tmp_path):
        command = Command(*GRID, '--out', tmp_path, '--ray')
        wait_for(busy_workers, 'a run is made')
        below = children(command.process.pid)
        os.killpg(command.process.pid, signal.SIGINT)
        code, errors = command.end()
        assert code == 130 and errors[-1] == 'interrupted'
        wait_for(lambda: not any(map(is_alive, below)), 'its processes are gone')

    def test_a_run_whose_worker_dies_again_and_again_is_one_line(self, tmp_path, cluster):
        words = [*GRID, '--epochs', '500', '--out', tmp_path, '--ray', cluster(1).address, '--max-retries', '1']
        command = Command(*words)
        killed = set()
        deadline = time.monotonic() + LIMIT
        while command.process.poll() is None:
            assert time.monotonic() < deadline
            for pid in busy_workers().keys() - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.05)
        code, errors = command.end()
        assert code == 2 and 'was tried 2 times, and its worker or node died' in errors[-1]

    def test_no_cluster_is_one_line(self, tmp_path):
        for address, says in (('127.0.0.1:9', 'nothing answers at 127.0.0.1:9'), ('auto', 'no Ray cluster runs on')):
            code, errors = Command(*GRID, '--out', tmp_path / 'out', '--ray', address).end()
            assert code == 2 and says in errors[-1], errors

    def test_more_cores_than_there_are_is_one_line(self, tmp_path):
        code, errors = Command(*GRID, '--out', tmp_path, '--ray', '--cpus-per-run', '4096').end()
        assert code == 2 and 'this machine does not have 4096 cores' in errors[-1]
