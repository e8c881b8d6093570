"""What is of the wrong kind has its clear error, and leaves nothing behind: the kernel is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from probefleet_agent.kernel import mounts

pytestmark = pytest.mark.kernel
ROUNDS = 250


@pytest.fixture
def folder() -> Iterator[Path]:
    """A tree of pins of the test's own."""
    path = mounts.mount_bpffs() / "probefleet-test-damage"
    path.mkdir(exist_ok=True)
    yield path
    path.rmdir()


def test_damaged_objects_load_or_are_refused_in_words_and_leave_nothing(folder: Path) -> None:
    """In a process of its own, which libbpf might end: then its last line says by which round."""
    command = [sys.executable, "-m", "tests.kernel.damage", "997", str(ROUNDS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    ends = found["ends"]
    assert sum(ends.values()) == ROUNDS
    assert min(ends["loaded"], ends["refused by the agent"], ends["refused by the planner"]) > ROUNDS // 20, ends
