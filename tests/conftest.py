"""What all tests share: a fixed seed, and a Hub on loopback."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hub_server import HubServer
from interpreters import Interpreters

# What steers Python, threads, the Hub's client, our commands and where files go; libraries set others at their import
STEERING = ('PYTHON', 'OMP_', 'HF_', 'TIMM_', 'RAY_', 'PATH', 'HOME', 'TMP', 'XDG_', 'CI')


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking again and again at what torch and timm imported: 0.4 s each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind reports all of triton as leaked


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """Fail a test that leaves PYTHONPATH and the like to the tests after it."""
    before = dict(os.environ)
    yield
    changed = [k for k in before | dict(os.environ) if k.startswith(STEERING) and before.get(k) != os.environ.get(k)]
    assert not changed, f'the test left other environment variables: {", ".join(sorted(changed))}'


@pytest.fixture(autouse=True)
def path_stays(monkeypatch) -> None:
    """Undo what a test, or a script that it imports, does to sys.path."""
    monkeypatch.setattr(sys, 'path', sys.path[:])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    """torch.compile counts how often it compiled a function for the whole process, and refuses to go on after eight."""
    yield
    if 'torch._dynamo' in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """A Hub without repositories and tokens, at `hub_server.url`."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope='session')
def interpreters() -> Iterator[Interpreters]:
    """Fresh interpreters with torch, torchvision and what draws and holds images; not with timm."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith('_AUTOLOAD')}
    often = [name for name in ('matplotlib.pyplot', 'sklearn.datasets') if find_spec(name.partition('.')[0])]
    with Interpreters('torch', 'torchvision', *often, env=kept) as server:
        yield server


@pytest.fixture
def tails(monkeypatch) -> list[torch.nn.Module]:
    """The blocks whose fused tail ran eagerly."""
    from timm_senetv2.models import blocks  # here, for most tests need none, and some look at what is imported

    ran = []
    tail = blocks.fused_tail
    monkeypatch.setattr(blocks, 'fused_tail', lambda block, *args: ran.append(block) or tail(block, *args))
    return ran
