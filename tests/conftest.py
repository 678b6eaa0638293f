"""The lanes: a test's folder under tests/ is its marker, and the real logs are used only where somebody has them."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is slow: no test may fail for that.
settings.register_profile("no_clock", deadline=None)
settings.load_profile("no_clock")

TESTS = Path(__file__).parent
LANES = ("unit", "fuzz", "two_process", "end_to_end", "faults", "cluster", "gpu", "real_logs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing_logs = pytest.mark.skip(reason="set WATCHTOWER_REAL_LOGS to the folder of the real logs")
    for item in items:
        lane = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else None
        if lane in LANES:
            item.add_marker(lane)
        if lane == "real_logs" and not os.environ.get("WATCHTOWER_REAL_LOGS"):
            item.add_marker(missing_logs)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return TESTS.parent


@pytest.fixture(scope="session")
def installed_by_make() -> bool:
    """Whether this is the environment that the Makefile installed whole, and not one put together by hand."""
    return any(Path(sys.prefix).glob(".installed-*"))
