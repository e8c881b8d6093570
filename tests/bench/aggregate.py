"""How fast batches are merged: ``python tests/bench/aggregate.py`` prints rows a second on one core, with unpacking.

The goal is 20 million value updates a second. Nodes with few rows are bound by the cost of a message, some 30 µs.
"""

from __future__ import annotations

import time

import numpy as np
from probefleet_core.aggregate import Aggregate, PolicyFacts
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

Output = plan_pb2.Output
ROUNDS = range(2, 8)
SECOND = 10**9


class Node:
    """Values of one node, and the batches that say them."""

    def __init__(self, name: str, rows: int, width: int) -> None:
        self.name = name
        self.values = np.zeros((rows, width), np.uint64)
        self.known = False

    def batch(self, sequence: int, share: float, random: np.random.Generator) -> tuple[stream_pb2.Batch, int]:
        rows, width = self.values.shape
        changed = np.flatnonzero(random.random(rows) < share) if self.known else np.arange(rows)
        self.values[changed] += random.integers(1, 1000, (len(changed), width)).astype(np.uint64)
        new = 0 if self.known else rows
        table = stream_pb2.Table(policy_uid="u", output="o", epoch="e", generation=1, width=width, since_ns=1)
        table.new_rows, table.first_new_row = new, rows - new
        if new:
            table.keys.append(columns.column("pod_uid", [f"uid-{row}" for row in range(rows)]))
        table.rows = columns.pack(changed.astype(np.uint32))
        table.values = columns.pack(self.values[changed])
        self.known = True
        return stream_pb2.Batch(sequence=sequence, time_ns=sequence * 10 * SECOND, tables=[table]), len(changed)


def run(*, rows: int, width: int, nodes: int, share: float = 1.0) -> None:
    """Print the best of some rounds, and what a result takes."""
    output = Output(name="o", kind=Output.HISTOGRAM if width > 1 else Output.COUNTER, group_by=["pod"])
    aggregate = Aggregate(PolicyFacts("u", "s", "p", 1, 10_000, (output,)))
    random = np.random.default_rng(23)
    fleet = [Node(f"node-{index}", rows, width) for index in range(nodes)]
    for node in fleet:
        aggregate.apply(node.name, 1, node.batch(1, 1.0, random)[0], 10 * SECOND)
    best = 0.0
    for sequence in ROUNDS:
        batches = [(node.name, *node.batch(sequence, share, random)) for node in fleet]
        began = time.perf_counter()
        for name, batch, _ in batches:
            aggregate.apply(name, 1, batch, sequence * 10 * SECOND)
        best = max(best, sum(count for _, _, count in batches) / (time.perf_counter() - began))
    began = time.perf_counter()
    aggregate.result(ROUNDS[-1] * 10 * SECOND, selected_nodes={node.name for node in fleet}, names=lambda _: None)
    took = time.perf_counter() - began
    print(
        f"{nodes:5} nodes × {rows:6} rows × {width:3} values, {share:4.0%} changed: "
        f"{best / 1e6:6.1f} M rows/s, {best * width / 1e6:6.1f} M values/s; a result {took * 1e3:6.1f} ms"
    )


if __name__ == "__main__":
    run(rows=10_000, width=1, nodes=20)
    run(rows=10_000, width=1, nodes=20, share=0.3)
    run(rows=1_000, width=27, nodes=20)
    run(rows=100, width=27, nodes=500)
    run(rows=10, width=1, nodes=2_000)
