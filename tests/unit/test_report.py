"""Reports: everything that matters is said, in few bytes, and golden in its words.

``UPDATE_GOLDEN=1 pytest tests/unit/test_report.py`` writes the golden files anew; read the difference.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest
import yaml
from probefleet_core import report, result, summary
from probefleet_core.aggregate import Aggregate, Result
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.fakes.samples import PODS, SECOND, START, UID, FakeNode, chunk, counter, facts

O = plan_pb2.Output  # noqa: E741
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def send(aggregate: Aggregate, node: FakeNode, at: float, **more: int) -> None:
    batch = node.batch(at)
    batch.tables[0].lost = more.pop("lost", 0)
    if more:
        batch.agent_cpu_ns, batch.agent_rss_bytes = int(at * 0.004 * SECOND), 41 << 20
        batch.instances.add(digest="d1", policy_uids=[UID], cost_known=True, map_bytes=1 << 20, **more)
    aggregate.apply(node.name, 1, batch, batch.time_ns)


def ask(aggregate: Aggregate, at: float, *nodes: str) -> Result:
    now_ns = int(START + at * SECOND)
    return aggregate.result(now_ns, selected_nodes=frozenset(nodes or ("node-1", "node-2")), names=PODS.get)


def slow_connects() -> Result:
    """A histogram by workload and port on three of four nodes, with everything that can be said about it."""
    output = counter("workload", "key.dport", name="latency", kind=O.HISTOGRAM, unit="ns", limit=20)
    output.map = "durations"
    aggregate = Aggregate(facts(output))
    for index, name in enumerate(("node-1", "node-2", "node-3")):
        node = FakeNode(name, keys=("pod_uid", "key.dport"), output="latency")
        for slot, count in ((18, 3), (19, 70), (20, 23), (23, 2), (26, 1)):
            node.add("uid-web-1", 443, slot=slot, count=count * (index + 1), width=27)
        node.add("uid-cart", 5432, slot=20, count=30, width=27)
        node.add("", 53, slot=14, count=7, width=27)
        send(aggregate, node, 710, runs=1000, run_time_ns=SECOND // 500, stats_time_ns=SECOND)
        node.add("uid-web-1", 443, slot=19, count=61 * 200, width=27)
        node.add("uid-cart", 5432, slot=23, count=22 * 200, width=27)
        node.add("", 53, slot=14, count=17 * 200, width=27)
        # The busiest is node-3; its ring lost twelve.
        cost = SECOND // 1000 * (index + 1) + SECOND // 500
        send(
            aggregate, node, 720, lost=12 * (index == 2), runs=13_000, run_time_ns=cost,
            stats_time_ns=11 * SECOND, hook_time_ns=12_000 * 100,
        )  # fmt: skip
    batch = node.batch(730)
    batch.tables[0].uncounted.append("LRU eviction in map conns")
    batch.tables[0].lost = 12
    batch.tables[0].entries, batch.tables[0].max_entries = 9318, 10_240
    batch.tables[0].gaps.add(start_ns=START + 300 * SECOND, end_ns=START + 303 * SECOND, why="the agent was replaced")
    aggregate.apply(node.name, 1, batch, batch.time_ns)
    return ask(aggregate, 725, "node-1", "node-2", "node-3", "node-4")


def execs() -> Result:
    """Records of processes, some lost."""
    aggregate = Aggregate(facts(counter(name="execs", kind=O.EVENTS)))
    first = chunk(range(0, 7 * 48, 48), submitted=9, lost=2)
    batch = stream_pb2.Batch(sequence=1, time_ns=START + 10 * SECOND, events=[first])
    aggregate.apply("node-1", 1, batch, batch.time_ns)
    return ask(aggregate, 11, "node-1")


def calls() -> Result:
    """1,020 calls of one system call: 997 of one pod, 23 of another on another node; and a gauge beside it."""
    gauge = counter("node", name="depth", kind=O.GAUGE, merge=O.MAX, unit="bytes")
    aggregate = Aggregate(facts(counter("pod", "key.uid", kind=O.TOPK, unit="calls"), gauge))
    for name, pod, count in (("node-1", "uid-web-1", 997), ("node-2", "uid-web-2", 23)):
        node = FakeNode(name, keys=("pod_uid", "key.uid"))
        node.add(pod, 1000, count=count)
        batch = node.batch(10)
        depth = FakeNode(name, keys=(), output="depth")
        depth.add(count=count << 10)
        batch.tables.append(depth.batch(10).tables[0])
        aggregate.apply(name, 1, batch, batch.time_ns)
    return ask(aggregate, 11)


def profile() -> Result:
    """Folded stacks of two pods."""
    aggregate = Aggregate(facts(counter("pod", name="stacks", kind=O.STACKS, unit="samples")))
    node = FakeNode("node-1", keys=("pod_uid", "stack"), output="stacks")
    node.add("uid-web-1", "main;serve;read;ksys_read_[k]", count=61)
    node.add("uid-web-1", "main;serve;compute<int, char>", count=22)
    node.add("uid-cart", "main;wait", count=17)
    send(aggregate, node, 10)
    return ask(aggregate, 11, "node-1")


def nothing() -> Result:
    """A policy that no node has answered yet."""
    return ask(Aggregate(facts(counter("pod"), counter(name="latency", kind=O.HISTOGRAM, unit="ns"))), 1)


RESULTS = {
    "slow-connects": slow_connects, "execs": execs, "calls": calls, "profile": profile, "nothing": nothing,
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_a_report_reads_as_its_golden_one(name: str) -> None:
    status = report.status(RESULTS[name]())
    json.dumps(status, allow_nan=False)
    golden(f"report-{name}.yaml", yaml.safe_dump(status, sort_keys=False, allow_unicode=True, width=160))


def test_frames_without_a_name_are_counted_as_often_as_their_stacks() -> None:
    """The command is no frame; the vDSO's has a name; `[k]` marks the kernel's."""
    aggregate = Aggregate(facts(counter("pod", name="stacks", kind=O.STACKS, unit="samples")))
    node = FakeNode("node-1", keys=("pod_uid", "stack"), output="stacks")
    node.add("uid-web-1", "[odd];main;[libz.so.1];[unknown];[unknown]_[k]", count=23)
    node.add("uid-web-1", "web;main;[vdso];do_syscall_64_[k]", count=997)
    node.add("uid-cart", "cart", count=17)
    send(aggregate, node, 10)
    status = report.status(ask(aggregate, 11, "node-1"))
    (output,) = status["outputs"]
    assert output["frames"] == {"unknown": 3 * 23, "named": 23 + 3 * 997}
    line = "2.2% of the frames have no name: [unknown], or [FILE] where only that is known"
    assert f"  {line}" in status["summary"]
    assert summary.nameless(report.status(profile())["outputs"][0]) == []


def test_columns_say_what_matters_at_a_glance() -> None:
    assert report.columns(slow_connects()) == {
        "coverage": "3/4",
        "rate": "3.6k/s",
        "lost": "12+?",
        "p50": "808µs",
        "p99": "16ms",
        "top": "cart/dport=5432 85% web/dport=443 15%",
        "since": "12m",
    }
    assert report.columns(nothing()) == {
        "coverage": "0/2", "rate": "0/s", "lost": "0", "p50": "", "p99": "", "top": "", "since": "",
    }  # fmt: skip
    assert report.columns(profile())["top"] == ""
    assert report.columns(calls())["top"] == "web-1/uid=1000 98% web-2/uid=1000 2.3%"


def test_a_percentile_in_the_open_slot_says_at_least() -> None:
    output = counter(name="latency", kind=O.HISTOGRAM, unit="ns")
    aggregate = Aggregate(facts(output))
    node = FakeNode("node-1", keys=(), output="latency")
    node.add(slot=26, count=5, width=27)
    send(aggregate, node, 10)
    status = report.status(ask(aggregate, 10))
    assert (status["columns"]["p50"], status["columns"]["p99"]) == ("≥67ms", "≥67ms")
    assert status["outputs"][0]["window"]["atLeast"] == ["p50", "p90", "p99"]
    assert status["outputs"][0]["window"]["buckets"] == [{"from": 1 << 26, "count": 5}]
    assert "p50 ≥67ms" in "\n".join(status["summary"])


def test_overhead_is_a_share_or_unknown_or_being_measured_or_nothing_yet() -> None:
    assert report.overhead_column(result.Cost(known_nodes=1, max_cores=0.0031)) == "0.31%"
    assert report.overhead_column(result.Cost(unknown_nodes=1)) == "unknown"
    assert report.overhead_column(result.Cost()) == ""
    assert report.overhead_column(result.Cost(measuring_nodes=1, unknown_nodes=1)) == "measuring"
    lines = summary.head(report.status(dataclasses.replace(nothing(), cost=result.Cost(measuring_nodes=2))))
    assert lines[-1] == "cost: measuring (programs are timed one second in ten)"
    assert (report.rate_column(nothing()), report.rate_column(calls())) == ("", "102/s")
    lines = summary.head(report.status(dataclasses.replace(nothing(), cost=result.Cost(unknown_nodes=2))))
    assert lines[-1].startswith("cost: unknown")


def test_one_machine_is_not_called_the_busiest_and_runs_are_called_runs() -> None:
    cost = result.Cost(
        known_nodes=1, max_cores=0.0031, mean_cores=0.0031, max_node="vm", runs_per_second=997, runs_known=True
    )
    measured = dataclasses.replace(
        calls(), cost=cost, rate_per_second=997, coverage=dataclasses.replace(calls().coverage, selected=1, sampled=1)
    )
    assert summary.head(report.status(measured)) == [
        "1/1 nodes for 11s, 997 runs/s, lost 0",
        "cost: 0.31% of one CPU on vm, 0B of maps",
    ]


def large(rows: int, *, kind: int, key: str, limit: int = 50, outputs: int = 1) -> Result:
    column = "stack" if kind == O.STACKS else "key.path"
    plans = [
        counter(*([column] if kind != O.STACKS else []), name=f"out{i}", kind=kind, limit=limit) for i in range(outputs)
    ]
    aggregate = Aggregate(facts(*plans))
    batch = stream_pb2.Batch(sequence=1, time_ns=START + 10 * SECOND)
    for index in range(outputs):
        node = FakeNode("node-1", keys=(column,), output=f"out{index}")
        for row in range(rows):
            node.values[(f"{row:06}" + key,)] = [row + 1] * (64 if kind == O.HISTOGRAM else 1)
        batch.tables.append(node.batch(10).tables[0])
    aggregate.apply("node-1", 1, batch, batch.time_ns)
    return ask(aggregate, 10)


def test_at_most_fifty_rows_are_shown_and_the_rest_is_in_other() -> None:
    status = report.status(large(3000, kind=O.COUNTER, key="", limit=100))
    total = status["outputs"][0]["total"]
    assert (len(total["rows"]), total["other"]["rows"], total["value"]) == (50, 2950, sum(range(1, 3001)))
    assert sum(row["value"] for row in total["rows"]) + total["other"]["value"] == total["value"]
    assert status["outputs"][0]["truncated"] == "50 of 3,000 rows are shown, the rest is in other"
    fewer = report.status(large(3000, kind=O.COUNTER, key="", limit=7))["outputs"][0]
    assert (len(fewer["total"]["rows"]), fewer["total"]["other"]["rows"]) == (7, 2993)
    assert any("(2,995 more)" in line for line in summary.output_lines(fewer, rows=5, histograms=0, window_seconds=10))


def test_sums_of_the_rows_and_of_the_rest_are_the_sum_of_the_whole() -> None:
    output = report.status(large(30, kind=O.HISTOGRAM, key="", limit=7))["outputs"][0]
    total = output["total"]
    together = sum(row["sum"] for row in total["rows"]) + total["other"]["sum"]
    assert together == pytest.approx(total["sum"], rel=1e-5)  # six digits of each
    header, body = summary.cells(total, output, 5)
    assert header[1:4] == ["COUNT", "SUM", "SHARE"]
    # 30 + 29 + … + 26 of 465 in the five largest.
    assert (body[-1][0], body[-1][3]) == ("(25 more)", "70%")


def test_a_report_of_an_earlier_operator_has_no_sums() -> None:
    output = report.status(large(3, kind=O.HISTOGRAM, key=""))["outputs"][0]
    for part in (output["total"], *output["total"]["rows"]):
        del part["sum"]
    header, body = summary.cells(output["total"], output, 5)
    assert header[1:3] == ["COUNT", "SHARE"]
    assert [row[2] for row in body] == ["50%", "33%", "17%"]


def test_values_that_are_all_zero_have_no_share() -> None:
    aggregate = Aggregate(
        facts(
            counter("workload", kind=O.HISTOGRAM, histogram=plan_pb2.Histogram(scale=plan_pb2.Histogram.LINEAR, step=1))
        )
    )
    node = FakeNode("node-1")
    node.add("uid-web-1", slot=0, width=2, count=3)
    batch = node.batch(10)
    aggregate.apply("node-1", 1, batch, batch.time_ns)
    assert report.columns(ask(aggregate, 10))["top"] == ""


def test_rows_fit_a_terminal_and_keep_the_end_of_a_path() -> None:
    output = report.status(large(3, kind=O.COUNTER, key="/very/long/path" * 4))["outputs"][0]
    title, *rows = summary.output_lines(output, rows=5, histograms=0, window_seconds=10, width=40)
    assert title == "out0 (counter by path), last 10s, 6 of 6"
    assert max(map(len, rows)) == 40
    assert rows[1].split() == ["…ong/path/very/long/path", "3", "50%"]
    assert len(summary.output_lines(output, rows=5, histograms=0, window_seconds=10)[1]) > 60, "a pipe has room"


@pytest.mark.parametrize(
    ("kind", "key", "outputs"),
    [
        (O.HISTOGRAM, "/very/long/path" * 30, 4),
        (O.STACKS, ";frame_with_a_long_name<é>" * 80, 3),
        (O.COUNTER, "x" * 250, 8),
        (O.COUNTER, "é" * 30_000, 1),
    ],
)
def test_whatever_comes_a_report_stays_small(kind: int, key: str, outputs: int) -> None:
    measured = large(60, kind=kind, key=key, outputs=outputs)
    status = report.status(measured)
    assert report.size_bytes(status) <= report.AIM_BYTES
    assert all(len(line) <= summary.MAX_LINE for line in status["summary"])
    assert len(status["summary"]) <= summary.MAX_LINES
    for output in status["outputs"]:
        assert output["total"]["value"] in (sum(range(1, 61)), 64 * sum(range(1, 61)))


def test_too_many_lines_say_how_many_are_missing() -> None:
    lines = report.status(large(60, kind=O.COUNTER, key="", outputs=20))["summary"]
    assert len(lines) == summary.MAX_LINES
    assert "more lines: see status.outputs" in lines[-1]


def test_large_records_are_cut_and_the_report_says_so() -> None:
    aggregate = Aggregate(facts(counter(name="execs", kind=O.EVENTS)))
    big = chunk(range(0, 200 * 48, 48))
    for index in range(30):
        big.columns.add(name=f"field{index}", strings=big.columns[3].strings)
    big.columns[3].strings.distinct[:] = [text * 100 for text in big.columns[3].strings.distinct]
    batch = stream_pb2.Batch(sequence=1, time_ns=START + 10 * SECOND, events=[big])
    aggregate.apply("node-1", 1, batch, batch.time_ns)
    output = report.status(ask(aggregate, 10))["outputs"][0]
    assert output["truncated"] == f"the newest {len(output['events']['records'])} of 200"
    assert len(output["events"]["records"]) in (25, 50)
    assert output["events"]["records"][-1]["comm"].endswith(f"cmd-{199 * 48}")


def test_numbers_beyond_int64_are_held_at_its_end() -> None:
    aggregate = Aggregate(facts(counter()))
    node = FakeNode("node-1", keys=())
    node.values[()] = [2**64 - 1]
    send(aggregate, node, 10)
    assert report.status(ask(aggregate, 10))["outputs"][0]["total"]["value"] == 2**63 - 1


def test_negative_gauges_are_shown_as_they_are() -> None:
    from probefleet_wire import columns

    aggregate = Aggregate(facts(counter("node", kind=O.GAUGE, unit="ns")))
    table = stream_pb2.Table(policy_uid=UID, output="calls", epoch="e", new_rows=1, generation=1)
    table.rows, table.values = columns.pack(np.array([0], np.uint32)), columns.pack(np.array([-1500], np.int64))
    aggregate.apply("node-1", 1, stream_pb2.Batch(sequence=1, time_ns=START, tables=[table]), START)
    status = report.status(ask(aggregate, 1))
    assert status["outputs"][0]["window"]["rows"] == [{"key": ["node-1"], "value": -1500}]
    assert any(line.split() == ["node-1", "-1.5µs"] for line in status["summary"])


def test_long_keys_keep_their_end() -> None:
    assert report.key_text("/usr/lib/" + "x" * 300 + "/libc.so.6").endswith("xx/libc.so.6")
    assert len(report.key_text("y" * 300)) == report.MAX_KEY_TEXT
    assert (report.key_text(7), report.key_text(0.25)) == ("7", "0.25")
