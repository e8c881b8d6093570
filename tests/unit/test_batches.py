"""Since when a table counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from probefleet_agent import batches
from probefleet_agent.collect import TableReader
from probefleet_agent.kernel import clock
from probefleet_agent.loaded import Joined, Loaded, MapHandle
from probefleet_wire.v1 import plan_pb2

MADE, LOADED, CAME = 1_000, 2_000, 3_000


@pytest.mark.parametrize("joined", [{}, {"p": Joined(CAME)}], ids=["first", "joined"])
@pytest.mark.parametrize(
    ("uid", "made", "since"),
    [("", 0, {"first": LOADED, "joined": CAME}), ("map", MADE, MADE), ("pinned:/sys/fs/bpf/x", 0, clock.booted_ns())],
    ids=["own", "ProbeMap", "pinned by others"],
)
def test_a_map_that_was_there_before_the_policy_counts_since_then(
    joined: dict[str, Joined], uid: str, made: int, since: int | dict[str, int]
) -> None:
    instance = cast("Loaded", SimpleNamespace(joined=joined, since_ns=LOADED))
    handle = cast("MapHandle", SimpleNamespace(epoch="boot:7", probe_map_uid=uid, since_ns=made))
    output = plan_pb2.Output(name="calls", map="calls")
    reader = cast("TableReader", SimpleNamespace(baseline=None, plan=plan_pb2.Plan(policy_uid="p"), output=output))
    wanted = since["joined" if joined else "first"] if isinstance(since, dict) else since
    assert batches._beginning(instance, handle, reader) == ("boot:7", wanted)
