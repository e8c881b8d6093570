"""A result in Kubernetes form: ``Result`` in, the ``status`` of a ProbeReport out. Pure.

The operator applies it, the query API answers with it, ``probefleet run`` prints the very same. It is bounded: at most
``MAX_ROWS`` rows an output, and where it would still be larger than ``AIM_BYTES``, detail goes step by step;
``truncated`` says what is not shown. Sums, percentiles and ``other`` are always of everything.

::

    observedGeneration, time, since, windowSeconds
    columns    {coverage, rate, lost, p50, p99, top, since}         strings, for kubectl get
    coverage   {sampled, selected, missing[], missingCount, stale[], staleCount}
    ratePerSecond, lost, uncounted[], gaps[{node, start, end, why}], cost{…}
    outputs[]  {name, kind, unit, groupBy[], scale, step, since, ratePerSecond, lost, uncounted[], truncated,
                retired, forgotten,
                window, total   {value, sum, percentiles{p50, p90, p99}, atLeast[], buckets[{from, to, count}],
                                 rows[{key[], value, sum, ratePerSecond, percentiles, atLeast[], buckets[]}],
                                 other{rows, value, sum}},
                frames {named, unknown}, events {received, submitted, lost, dropped, records[{field: text}]}}
    summary[]  lines, for kubectl describe
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from probefleet_wire import merge
from probefleet_wire.v1 import plan_pb2

from probefleet_core import earlier, summary
from probefleet_core import format as humane
from probefleet_core.result import STACK, Cost, Events, Label, OutputResult, Result, Rows, sizes

Json: TypeAlias = dict[str, Any]

AIM_BYTES: Final = 64 << 10
MAX_BYTES: Final = 256 << 10
MAX_ROWS: Final = 50
MAX_RECORDS: Final = 50
MAX_BUCKET_ROWS: Final = 10
MAX_KEY_TEXT: Final = 256
#: A folded stack may be long; its leaf, at the end, matters most.
MAX_STACK_TEXT: Final = 1024
MAX_FIELD_TEXT: Final = 256
MAX_INT64: Final = (1 << 63) - 1
QUANTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
KINDS: Final = {
    plan_pb2.Output.COUNTER: "counter",
    plan_pb2.Output.GAUGE: "gauge",
    plan_pb2.Output.HISTOGRAM: "histogram",
    plan_pb2.Output.TOPK: "topk",
    plan_pb2.Output.STACKS: "stacks",
    plan_pb2.Output.EVENTS: "events",
}
SCALES: Final = {
    plan_pb2.Histogram.LOG2: "log2",
    plan_pb2.Histogram.LOG2_BCC: "log2-bcc",
    plan_pb2.Histogram.LINEAR: "linear",
}


@dataclass(frozen=True, slots=True)
class Detail:
    """How much is shown."""

    rows: int = MAX_ROWS
    records: int = MAX_RECORDS
    bucket_rows: int = MAX_BUCKET_ROWS
    text: int = MAX_STACK_TEXT


#: From everything to what always fits.
STEPS: Final = (
    Detail(),
    Detail(bucket_rows=0),
    Detail(rows=25, records=25, bucket_rows=0, text=512),
    Detail(rows=10, records=10, bucket_rows=0, text=256),
    Detail(rows=5, records=3, bucket_rows=0, text=128),
    Detail(rows=1, records=1, bucket_rows=0, text=64),
)


def status(result: Result) -> Json:
    """The ``status`` of the policy's ProbeReport: as much detail as fits ``AIM_BYTES``."""
    body: Json = {}
    for detail in STEPS:
        body = _status(result, detail)
        if size_bytes(body) <= AIM_BYTES:
            break
    return body


def size_bytes(body: Json) -> int:
    """As the API server stores it."""
    return len(json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode())


def columns(result: Result) -> dict[str, str]:
    """What ``kubectl get probereports`` shows."""
    coverage = result.coverage
    p50 = p99 = ""
    for output in result.outputs:
        if output.output.kind == plan_pb2.Output.HISTOGRAM:
            unit = output.output.unit
            p50, p99 = (_percentile_text(output.window.sum, output, q, unit) for q in (0.5, 0.99))
            break
    return {
        "coverage": f"{coverage.sampled}/{coverage.selected}",
        "rate": humane.rate(result.rate_per_second),
        "lost": lost_text(result.lost, result.uncounted),
        "p50": p50,
        "p99": p99,
        "top": _top_text(result),
        "since": humane.age(result.time_ns - result.since_ns) if result.since_ns else "",
    }


def lost_text(lost: int, uncounted: Sequence[str]) -> str:
    """``0``, ``12``, and ``12+?`` where there are losses that nobody counts."""
    return humane.count(lost) + ("+?" if uncounted else "")


def rate_column(result: Result) -> str:
    """RATE of ``kubectl get probepolicies``."""
    return humane.rate(result.rate_per_second) if result.since_ns else ""


def overhead_column(cost: Cost) -> str:
    """OVERHEAD: the share of one CPU that programs take on the busiest node."""
    if cost.known_nodes:
        return humane.percent(cost.max_cores)
    if cost.measuring_nodes:
        return "measuring"
    return "unknown" if cost.unknown_nodes else ""


def cost(measured: Cost) -> Json:
    """``cost`` of a ProbeReport's and a ProbePolicy's status. Millicores of programs: run time and hooks together."""
    return {
        "overhead": overhead_column(measured),
        "nodesKnown": measured.known_nodes,
        "nodesUnknown": measured.unknown_nodes,
        "maxMillicores": _number(measured.max_cores * 1000),
        "maxNode": measured.max_node,
        "meanMillicores": _number(measured.mean_cores * 1000),
        "runsPerSecond": _number(measured.runs_per_second),
        "mapBytesMax": _integer(measured.max_map_bytes),
        "mapBytesTotal": _integer(measured.total_map_bytes),
        "agentMillicoresMax": _number(measured.max_agent_cores * 1000),
        "agentMillicoresMean": _number(measured.mean_agent_cores * 1000),
        "agentMemoryBytesMax": _integer(measured.max_agent_rss_bytes),
        "sharedBy": measured.shared_by,
    }


def key_text(label: Label, limit: int = MAX_KEY_TEXT) -> str:
    """One part of a row's key as text, its end kept where it is too long."""
    text = f"{label:g}" if isinstance(label, float) else str(label)
    return text if len(text) <= limit else "…" + text[1 - limit :]


def _status(result: Result, detail: Detail) -> Json:
    body: Json = {
        "observedGeneration": result.facts.generation,
        "time": humane.timestamp(result.time_ns),
        "windowSeconds": _number(result.window_seconds),
        "columns": columns(result),
        "coverage": _camel(dataclasses.asdict(result.coverage)),
        "ratePerSecond": _number(result.rate_per_second),
        "lost": _integer(result.lost),
        "uncounted": list(result.uncounted),
        "gaps": [
            {
                "node": gap.node,
                "start": humane.precise_timestamp(gap.start_ns),
                "end": humane.precise_timestamp(gap.end_ns),
                "why": gap.why,
            }
            for gap in result.gaps
        ],
        "cost": cost(result.cost),
        "outputs": [_output(output, detail) for output in result.outputs],
    }
    if result.since_ns:
        body["since"] = humane.timestamp(result.since_ns)
    body["summary"] = summary.lines(body)
    return body


def _output(output: OutputResult, detail: Detail) -> Json:
    plan = output.output
    body: Json = {
        "name": plan.name,
        "kind": KINDS.get(plan.kind, "counter"),
        "unit": plan.unit,
        "groupBy": list(output.group_by),
        "ratePerSecond": _number(output.rate_per_second),
        "lost": _integer(output.lost),
        "uncounted": list(output.uncounted),
    }
    if plan.kind == plan_pb2.Output.HISTOGRAM:
        body["scale"] = SCALES.get(plan.histogram.scale, "log2")
        if plan.histogram.step:
            body["step"] = _integer(plan.histogram.step)
    if plan.kind == plan_pb2.Output.STACKS and STACK in output.group_by:
        body["frames"] = _frames(output.total, output.group_by.index(STACK))
    body |= {name: _integer(count) for name in earlier.FIELDS if (count := getattr(output, name))}
    if output.fullest is not None:
        fill = output.fullest
        body["mapFill"] = {"node": fill.node, "map": plan.map, "entries": fill.entries, "maxEntries": fill.max_entries}
    if output.since_ns:
        body["since"] = humane.timestamp(output.since_ns)
    if output.events is not None:
        body["events"] = _events(output.events, detail)
        body["window"], body["total"] = {"value": output.window.whole}, {"value": output.total.whole}
        hidden = output.events.received - len(body["events"]["records"])
        if hidden > 0:
            body["truncated"] = f"the newest {len(body['events']['records'])} of {humane.count(output.events.received)}"
        return body
    limit = min(plan.limit or MAX_ROWS, detail.rows)
    body["window"], body["total"] = (_rows(rows, output, limit, detail) for rows in (output.window, output.total))
    all_rows = len(output.total.labels) + output.total.other_count
    if all_rows > limit:
        body["truncated"] = f"{limit} of {humane.count(all_rows)} rows are shown, the rest is in other"
    return body


def _frames(rows: Rows, column: int) -> Json:
    """Frames of the stacks' rows, each as often as its stack was counted: those with a function's name, and those
    without, ``[unknown]`` or ``[libfoo.so]``. The first part of a folded stack is the command.
    """
    named = unknown = 0
    for label, weight in zip(rows.labels, rows.weights.tolist(), strict=True):
        frames = str(label[column]).split(";")[1:]
        nameless = sum(frame.startswith("[") and not frame.startswith("[vdso]") for frame in frames)
        unknown += nameless * weight
        named += (len(frames) - nameless) * weight
    return {"named": _integer(named), "unknown": _integer(unknown)}


def _rows(rows: Rows, output: OutputResult, limit: int, detail: Detail) -> Json:
    histogram = output.output.kind == plan_pb2.Output.HISTOGRAM
    text = detail.text if output.output.kind == plan_pb2.Output.STACKS else min(detail.text, MAX_KEY_TEXT)
    signed = rows.values.dtype.kind == "i"
    body: Json = {"value": _whole(rows)}
    if histogram and rows.whole:
        body |= {"sum": _sum(rows.sum, output)} | _distribution(rows.sum, output)
    weights = rows.weights.tolist()
    shown = []
    for index, label in enumerate(rows.labels[:limit]):
        row: Json = {"key": [key_text(part, text) for part in label], "value": _integer(weights[index])}
        if rows.rates[index]:
            row["ratePerSecond"] = _number(float(rows.rates[index]))
        if histogram and weights[index]:
            row["sum"] = _sum(rows.values[index], output)
            row |= _distribution(rows.values[index], output, buckets=index < detail.bucket_rows and len(weights) > 1)
        shown.append(row)
    body["rows"] = shown
    hidden = len(rows.labels) - len(shown) + rows.other_count
    if hidden:
        rest = rows.weights[len(shown) :]
        rest_value = int(rest.sum(dtype=np.int64 if signed else np.uint64))
        if rows.other is not None:
            rest_value += int(rows.other.sum(dtype=rows.other.dtype))
        body["other"] = {"rows": hidden, "value": _integer(rest_value)}
        if histogram:
            rest_values = rows.values[len(shown) :].sum(axis=0, dtype=rows.values.dtype)
            body["other"]["sum"] = _sum(rest_values + (0 if rows.other is None else rows.other), output)
    return body


def _sum(counts: Any, output: OutputResult) -> float | int:
    return _number(float(sizes(output.output, counts[np.newaxis])[0]))


def _whole(rows: Rows) -> int:
    return _integer(rows.whole)


def _distribution(counts: Any, output: OutputResult, *, buckets: bool = True) -> Json:
    bounds = output.bounds if len(counts) == output.total.sum.size else _bounds(output, len(counts))
    found = {name: merge.percentile(counts, bounds, quantile) for name, quantile in QUANTILES}
    body: Json = {"percentiles": {name: _number(each.value) for name, each in found.items() if each is not None}}
    at_least = [name for name, each in found.items() if each is not None and each.at_least]
    if at_least:
        body["atLeast"] = at_least
    if buckets:
        body["buckets"] = _buckets(counts, bounds)
    return body


def _bounds(output: OutputResult, width: int) -> tuple[Any, Any]:
    return merge.slot_bounds(output.output.histogram.scale, output.output.histogram.step, width)


def _buckets(counts: Any, bounds: tuple[Any, Any]) -> list[Json]:
    filled = np.flatnonzero(counts)
    if not filled.size:
        return []
    buckets = []
    for slot in range(int(filled[0]), int(filled[-1]) + 1):
        bucket: Json = {"from": _integer(float(bounds[0][slot])), "count": _integer(int(counts[slot]))}
        # No end: open to the right.
        if np.isfinite(bounds[1][slot]):
            bucket["to"] = _integer(float(bounds[1][slot]))
        buckets.append(bucket)
    return buckets


def _events(events: Events, detail: Detail) -> Json:
    return {
        "received": _integer(events.received),
        "submitted": _integer(events.submitted),
        "lost": _integer(events.lost),
        "dropped": _integer(events.dropped),
        "records": [record_texts(record) for record in events.records[len(events.records) - detail.records :]]
        if len(events.records) > detail.records
        else [record_texts(record) for record in events.records],
    }


def record_texts(record: dict[str, Label]) -> dict[str, str]:
    """A record as texts, ``time`` first: fields differ from probe to probe, so one type for all."""
    texts = {"time": humane.precise_timestamp(int(record["time_ns"]))} if "time_ns" in record else {}
    return texts | {name: key_text(value, MAX_FIELD_TEXT) for name, value in record.items() if name != "time_ns"}


def _percentile_text(counts: Any, output: OutputResult, quantile: float, unit: str) -> str:
    found = merge.percentile(counts, _bounds(output, len(counts)), quantile)
    if found is None:
        return ""
    return ("≥" if found.at_least else "") + humane.quantity(found.value, unit)


def _top_text(result: Result) -> str:
    for output in result.outputs:
        rows = output.window if output.window.labels else output.total
        whole = rows.whole
        if not output.group_by or not rows.labels or not whole or output.output.kind == plan_pb2.Output.GAUGE:
            continue
        if output.output.kind == plan_pb2.Output.STACKS:
            continue  # too long for a column
        group_by = output.group_by
        largest, (all_of_it,) = (sizes(output.output, each) for each in (rows.values[:2], rows.sum[np.newaxis]))
        if not all_of_it:
            continue  # all of them are zero
        tops = zip(rows.labels[:2], largest.tolist(), strict=True)
        return " ".join(
            f"{summary.label_text(label, group_by)} {humane.percent(value / all_of_it)}" for label, value in tops
        )
    return ""


def _number(value: float) -> float | int:
    """Six digits at most: more would be noise, and would make every report differ from the one before."""
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < MAX_INT64 else rounded


def _integer(value: float) -> int:
    """What the API's int64 can hold."""
    return max(min(int(value), MAX_INT64), -MAX_INT64)


def _camel(body: dict[str, Any]) -> Json:
    names = {"missing_count": "missingCount", "stale_count": "staleCount"}
    return {names.get(name, name): list(value) if isinstance(value, tuple) else value for name, value in body.items()}
