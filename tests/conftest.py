"""What all tests share: a fixed seed, and a Hub on loopback."""
from collections.abc import Iterator

import pytest
import torch
from hub_server import HubServer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """A Hub without repositories and tokens, at `hub_server.url`."""
    with HubServer() as server:
        yield server
