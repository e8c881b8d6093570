"""An agent's half of the stream, without a kernel: cumulative values in, batches out, as a real agent sends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from probefleet_core.result import PodName, PolicyFacts
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
INTERVAL_MS = 10_000
UID = "policy-1"

PODS = {
    "uid-web-1": PodName("shop", "web-1", "Deployment", "web", {"c1": "nginx", "c2": "sidecar"}),
    "uid-web-2": PodName("shop", "web-2", "Deployment", "web", {"c3": "nginx"}),
    "uid-cart": PodName("shop", "cart-0", "StatefulSet", "cart"),
    "uid-far": PodName("far", "web-1", "Deployment", "web"),
}


def facts(*outputs: plan_pb2.Output, generation: int = 1, cluster: bool = False) -> PolicyFacts:
    return PolicyFacts(UID, "shop", "p", generation, INTERVAL_MS, outputs, digest="d1", cluster=cluster)


def counter(
    *group_by: str, name: str = "calls", kind: plan_pb2.Output.Kind.ValueType = plan_pb2.Output.COUNTER, **more: Any
) -> plan_pb2.Output:
    return plan_pb2.Output(name=name, kind=kind, group_by=group_by, **more)


@dataclass
class FakeNode:
    """An agent's half of the stream: cumulative values by key, keys once a stream, changed rows only."""

    name: str
    keys: tuple[str, ...] = ("pod_uid",)
    output: str = "calls"
    epoch: str = "boot-1:7"
    since_ns: int = START
    generation: int = 1
    session: int = 1
    values: dict[tuple[str | int, ...], list[int]] = field(default_factory=dict)
    _sent: list[tuple[str | int, ...]] = field(default_factory=list)
    _sent_values: dict[tuple[str | int, ...], list[int]] = field(default_factory=dict)
    sequence: int = 0

    def add(self, *key: str | int, count: int = 1, slot: int = 0, width: int = 1) -> None:
        self.values.setdefault(key, [0] * width)[slot] += count

    def restart_stream(self, session: int) -> None:
        self.session, self.sequence = session, 0
        self._sent, self._sent_values = [], {}

    def reboot(self, session: int, epoch: str, since_ns: int) -> None:
        self.restart_stream(session)
        self.epoch, self.since_ns, self.values = epoch, since_ns, {}

    def batch(self, at_seconds: float, *, lost: int = 0, runs: bool = False, empty: bool = False) -> stream_pb2.Batch:
        self.sequence += 1
        batch = stream_pb2.Batch(sequence=self.sequence, time_ns=int(START + at_seconds * SECOND))
        if runs:
            batch.instances.add(digest="d1", policy_uids=[UID])
        if empty:
            return batch
        new = [key for key in self.values if key not in self._sent]
        table = batch.tables.add(
            policy_uid=UID,
            output=self.output,
            epoch=self.epoch,
            first_new_row=len(self._sent),
            new_rows=len(new),
            since_ns=self.since_ns,
            lost=lost,
            generation=self.generation,
        )
        for index, name in enumerate(self.keys):
            if new:
                table.keys.append(columns.column(name, np.array([key[index] for key in new])))
        self._sent += new
        changed = [r for r, key in enumerate(self._sent) if self._sent_values.get(key) != self.values[key]]
        table.width = len(next(iter(self.values.values()), [0]))
        table.rows = columns.pack(np.array(changed, np.uint32))
        table.values = columns.pack(np.array([self.values[self._sent[r]] for r in changed], np.uint64))
        self._sent_values = {key: list(value) for key, value in self.values.items()}
        return batch


def chunk(
    positions: Sequence[int], *, epoch: str = "boot-1:3", end: int | None = None, **more: Any
) -> stream_pb2.EventChunk:
    return stream_pb2.EventChunk(
        policy_uid=UID,
        output="execs",
        epoch=epoch,
        positions=columns.pack(np.array(positions, np.uint64)) if positions else b"",
        end_position=end if end is not None else (positions[-1] + 48 if positions else 0),
        columns=[
            columns.column("time_ns", np.array(positions, np.uint64) * 1000 + START),
            columns.column("pod_uid", ["uid-web-1"] * len(positions)),
            columns.column("container_id", ["c1"] * len(positions)),
            columns.column("comm", [f"cmd-{position}" for position in positions]),
        ],
        generation=1,
        since_ns=START,
        **more,
    )
