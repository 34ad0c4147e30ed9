"""What the tests with other libraries share: time enough on a machine that has other work."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
MOST = 3600  # seconds: ends a test that hangs; each takes a few minutes at most on two idle cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(MOST))
