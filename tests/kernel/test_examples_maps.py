"""The example that measures what map types cost: each type and operation has its row, every key was found.

And what is so on any machine is so here; the figures are printed by `tests/bench/map_types.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.kernel import examples_runner
from tests.workloads import run as workloads

# An emulated machine takes minutes for what starts a command.
pytestmark = pytest.mark.timeout(2 * examples_runner.SECONDS)
CALLS = 97
COUNTED = ("array", "percpu-array", "hash", "percpu-hash")
TYPES = (*COUNTED, "lru-hash", "lru-percpu-hash", "lpm-trie")
MEASURED = (
    {("lookup", each) for each in TYPES} | {("update", each) for each in TYPES} | {("count", each) for each in COUNTED}
)
#: Of each operation and type, in one interval.
BATCHES = 64


@pytest.fixture(scope="module")
def run() -> Iterator[examples_runner.Run]:
    """The example, while a process on each CPU makes it count: all CPUs write to one entry."""
    with examples_runner.running("map-types.yaml", links=1) as run, contextlib.ExitStack() as held:
        busy = []
        for cpu in sorted(os.sched_getaffinity(0)):
            each = held.enter_context(workloads.start("calls", "rare", CALLS))
            os.sched_setaffinity(each.pid, {cpu})
            busy.append(each)
        for each in busy:
            each.go()
        for each in busy:
            assert each.done()["calls"] == CALLS
    yield run


def costs(run: examples_runner.Run) -> dict[tuple[str, str], int]:
    """(operation, type) → picoseconds."""
    return {(key[1], key[2]): value for key, value in run.rows("map-types", "alone").items()}


@pytest.mark.shows("example/map-types")
def test_each_type_and_operation_has_its_cost(run: examples_runner.Run) -> None:
    found = costs(run)
    assert set(found) == MEASURED
    assert all(0 < picoseconds < 1_000_000_000 for picoseconds in found.values())
    assert run.output("map-types", "alone")["unit"] == "ps"
    intervals, rest = divmod(run.rows("map-types", "batches")[()], BATCHES * len(MEASURED))
    assert intervals >= 1 and rest == 0, "every interval measures everything once"


def test_every_key_that_was_looked_up_was_there(run: examples_runner.Run) -> None:
    assert run.rows("map-types", "missed").get((), 0) == 0


def test_what_the_article_says_of_lookups_holds_where_it_is_far_apart(run: examples_runner.Run) -> None:
    found = costs(run)
    assert found["lookup", "array"] < found["lookup", "hash"] < found["lookup", "lpm-trie"]
    assert found["lookup", "percpu-array"] < found["lookup", "percpu-hash"]
    assert found["update", "array"] < found["update", "hash"] < found["update", "lpm-trie"]


def test_a_counter_of_each_cpus_own_is_cheaper_than_one_for_all(run: examples_runner.Run) -> None:
    found = costs(run)
    assert found["count", "percpu-array"] < found["count", "array"]
    together = {kind: value for (_, kind), value in run.rows("map-types", "together").items()}
    assert set(together) == set(COUNTED)
    assert together["percpu-array"] < together["array"]
    batches, stretched = (run.rows("map-types", each) for each in ("batches-together", "stretched"))
    for kind in COUNTED:  # each call of anybody on the machine is one
        assert batches[(kind,)] + stretched.get((kind,), 0) >= CALLS * len(os.sched_getaffinity(0))
