"""What all tests share: a fixed seed, and a Hub on loopback."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hub_server import HubServer

SET_BY_LIBRARIES = {'PYTEST_CURRENT_TEST'}


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """Fail a test that leaves PYTHONPATH and the like to the tests after it."""
    before = dict(os.environ)
    yield
    changed = {k for k in before | dict(os.environ) if before.get(k) != os.environ.get(k)} - SET_BY_LIBRARIES
    assert not changed, f'the test left other environment variables: {sorted(changed)}'


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


@pytest.fixture
def tails(monkeypatch) -> list[torch.nn.Module]:
    """The blocks whose fused tail ran eagerly."""
    from timm_senetv2.models import blocks  # here, for most tests need none, and some look at what is imported

    ran = []
    tail = blocks.fused_tail
    monkeypatch.setattr(blocks, 'fused_tail', lambda block, *args: ran.append(block) or tail(block, *args))
    return ran
