"""The example that measures what map types cost: each type and operation has its row, every key was found.

And what is so on any machine is so here; the figures are printed by `tests/bench/map_types.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import pytest

from tests.bench import map_types
from tests.kernel import examples_runner
from tests.workloads import run as workloads

# An emulated machine takes minutes for what starts a command.
pytestmark = pytest.mark.timeout(2 * examples_runner.SECONDS)
#: Of a process on each CPU: so many that they overlap, though one starts a moment before the other.
CALLS = 4999
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


def test_where_all_cpus_count_a_counter_of_each_ones_own_is_cheaper(run: examples_runner.Run) -> None:
    # One CPU alone adds to a shared counter as quickly: 1.7 ns, and 2.2 to its own, on a virtual machine of two CPUs.
    together = {kind: value for (_, kind), value in run.rows("map-types", "together").items()}
    assert set(together) == set(COUNTED)
    assert together["percpu-array"] < together["array"]
    batches, stretched = (run.rows("map-types", each) for each in ("batches-together", "stretched"))
    for kind in COUNTED:  # each call of anybody on the machine is one
        assert batches[(kind,)] + stretched.get((kind,), 0) >= CALLS * len(os.sched_getaffinity(0))


def test_the_order_is_printed_beside_the_articles_and_each_type_has_its_share_of_an_xdp_program(
    run: examples_runner.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tests/bench/map_types.py`, with fewer rounds than for figures that are to be shown."""
    alone, together = (
        {key[1:]: value for key, value in run.rows("map-types", name).items()} for name in ("alone", "together")
    )
    monkeypatch.setattr(map_types, "policy_rows", lambda: (alone, together))
    monkeypatch.setattr(map_types, "REPEAT", 10_000)
    monkeypatch.setattr(map_types, "ROUNDS", 3)
    map_types.main()
    text = capsys.readouterr().out
    title, *lines = text.partition("lookup, one CPU")[2].partition("update, one CPU")[0].splitlines()
    shown = [re.fullmatch(r"  (\d)\. ([\w-]+) +([\d.]+) ns(?:   article: (\d))?", line) for line in lines]
    rows = [each.groups() for each in shown if each]
    assert not title and len(rows) == len(lines) == len(TYPES)
    assert [int(place) for place, *_ in rows] == [*range(1, len(TYPES) + 1)]
    picoseconds = [alone["lookup", kind] for _, kind, *_ in rows]
    assert picoseconds == sorted(picoseconds), "this node's order"
    said = ("array", "percpu-array", "hash", "percpu-hash", "lru-hash", "lpm-trie")
    assert {kind: number for _, kind, _, number in rows if number} == {
        kind: str(place) for place, kind in enumerate(said, start=1)
    }
    shares = {
        kind: int(share) for kind, share in re.findall(r"^  ([\w-]+) +[\d.]+ ns \(([+-]\d+)%\)", text, re.MULTILINE)
    }
    assert set(shares) == set(TYPES)
    assert shares["lpm-trie"] < shares["hash"] < 0, "packets a second with one lookup, against none"
    assert shares["lpm-trie"] < shares["array"]
