"""What every unit test starts with: logs as they are by default, and properties that no busy machine makes fail."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import structlog

# An example that waits for a CPU is no failure; the time limit of a whole test is pytest's.
hypothesis.settings.register_profile("unit", deadline=None)
hypothesis.settings.load_profile("unit")


@pytest.fixture(autouse=True)
def logs_as_by_default() -> Iterator[None]:
    """A command line sets up logging for its own process: to a stderr that is gone after its test."""
    yield
    structlog.reset_defaults()
