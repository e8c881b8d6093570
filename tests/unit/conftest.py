"""What every unit test starts with: logs as they are by default, and properties that no busy machine makes fail."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import structlog

# An example that waits for a CPU is no failure; the time limit of a whole test is pytest's.
hypothesis.settings.register_profile("unit", deadline=None)
hypothesis.settings.load_profile("unit")


#: The tests of the pure modules whose branches are to be covered (``PURE`` in the Makefile). What others do in passing
#: would count as covered as well, and they take half as long again while it is watched.
WATCHED = {
    *("aggregate", "baseline", "collect", "columns", "decode", "departed", "foreign_pods", "map_plans", "merge"),
    *("placement", "planner", "pods", "policy", "prints", "reconcile", "report", "samples"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") not in WATCHED:
            item.add_marker("no_cover")


@pytest.fixture(autouse=True)
def logs_as_by_default() -> Iterator[None]:
    """A command line sets up logging for its own process: to a stderr that is gone after its test."""
    yield
    structlog.reset_defaults()
