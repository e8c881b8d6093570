"""Processes that stay hold no library that they do not use."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("probefleet_operator.app, probefleet_operator.main", {"kubernetes", "rich", "requests", "pydantic"}),
        ("probefleet_agent.main, probefleet_agent.session", {"rich", "pygments", "kubernetes", "yaml", "aiohttp"}),
    ],
)
def test_a_process_that_stays_imports_what_it_uses(imported: str, heavy: set[str]) -> None:
    program = f"import sys, {imported}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_who_wants_such_a_library_gets_it() -> None:
    program = (
        "import probefleet_operator.handlers, probefleet_agent.main, rich.table, kubernetes.client; print('there')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "there\n"
