"""A ProbeMap's status: a node has it when its map is there and as large as the spec says."""

from __future__ import annotations

import datetime

from probefleet_core import values
from probefleet_operator import map_status
from probefleet_wire.v1 import stream_pb2

NOW = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)


def status(said: dict[str, stream_pb2.MapStatus | None], max_entries: int = 4096) -> dict[str, object]:
    facts = map_status.MapFacts(
        generation=2,
        settled=True,
        refusal=None,
        policies=["writer"],
        max_entries=max_entries,
        said={values.NodeName(node): each for node, each in said.items()},
    )
    return map_status.status_of(facts, previous=(), now=NOW)


def of(entries: int, reason: str = "", message: str = "") -> stream_pb2.MapStatus:
    return stream_pb2.MapStatus(kernel_map_id=7, max_entries=entries, bytes=100, reason=reason, message=message)


def test_a_node_whose_map_has_not_grown_yet_is_not_ready() -> None:
    found = status({"a": of(4096), "b": of(64), "c": None})
    assert found["nodes"] == {"desired": 3, "ready": 1, "failed": 0}
    assert found["columns"] == {"nodes": "1/3", "users": "1", "status": "Progressing"}


def test_a_map_that_cannot_grow_on_a_node_says_why_and_is_still_there() -> None:
    found = status({"a": of(4096), "b": of(64, "CannotGrow", "ProbeMap shop/opens stays as it is")})
    assert found["nodes"] == {"desired": 2, "ready": 1, "failed": 1}
    assert found["failures"] == [
        {"reason": "CannotGrow", "message": "ProbeMap shop/opens stays as it is", "nodes": 1, "example": "b"}
    ]


def test_an_agent_that_does_not_say_how_large_its_map_is_is_believed() -> None:
    assert status({"a": of(0)})["nodes"] == {"desired": 1, "ready": 1, "failed": 0}
