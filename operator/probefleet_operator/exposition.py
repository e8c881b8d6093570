"""Merged outputs for Prometheus: results in, metric families out, under a limit of series a policy.

Collected at each scrape from the results that reports were last rendered from, so a scrape merges nothing. Families:

- `probefleet_output_total{namespace, policy, output, …}`: counters and top-K;
- `probefleet_output{…}`: gauges;
- `probefleet_output_distribution_bucket{…, le}`, `_count`: histograms;
- `probefleet_policy_coverage_ratio`, `_lost_total`, `_runs_per_second`, `_cores`: each policy's own health;
- `probefleet_series_left_out`: rows that found no room under the limit. Stacks are never exported: each is a series.

Rows carry one label for each of `groupBy` (`key.dport` becomes `key_dport`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator

from probefleet_core import result
from probefleet_wire.v1 import plan_pb2
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Results = Callable[[], Iterable[result.Result]]
Labels = dict[str, str]

_RESERVED = frozenset({"namespace", "policy", "output", "le"})


class OutputsCollector(Collector):
    """Registered while this process leads."""

    def __init__(self, results: Results, *, series_per_policy: int) -> None:
        self._results, self._limit = results, series_per_policy

    def collect(self) -> Iterator[Metric]:
        """All families; called in the main loop by the HTTP server."""
        totals = Metric("probefleet_output", "Merged counters of policies.", "counter")
        gauges = Metric("probefleet_output_value", "Merged gauges of policies.", "gauge")
        distributions = Metric("probefleet_output_distribution", "Merged histograms of policies.", "histogram")
        coverage = Metric("probefleet_policy_coverage_ratio", "Nodes with a fresh sample of those selected.", "gauge")
        lost = Metric("probefleet_policy_lost", "What the policy's programs could not count.", "counter")
        runs = Metric("probefleet_policy_runs_per_second", "Program runs a second in the window.", "gauge")
        cores = Metric("probefleet_policy_cores", "CPU of the policy's programs on the busiest node.", "gauge")
        left_out = Metric("probefleet_series_left_out", "Rows that found no room under the limit.", "gauge")
        for each in self._results():
            who = {"namespace": each.facts.namespace, "policy": each.facts.name}
            if each.coverage.selected:
                coverage.add_sample(coverage.name, who, each.coverage.sampled / each.coverage.selected)
            if each.settled:
                lost.add_sample(f"{lost.name}_total", who, each.lost)
            runs.add_sample(runs.name, who, each.rate_per_second)
            if each.cost.known_nodes:
                cores.add_sample(cores.name, who, each.cost.max_cores)
            room, omitted = self._limit, 0
            for output in each.outputs:
                if not each.settled and output.output.kind != plan_pb2.Output.GAUGE:
                    # A counter that is small until all nodes have come again looks like one that counts from zero:
                    # rate() would add all of it once more.
                    continue
                labels = {**who, "output": output.output.name}
                kind = output.output.kind
                if kind == plan_pb2.Output.HISTOGRAM:
                    used, dropped = _histogram(distributions, output, labels, room)
                elif kind == plan_pb2.Output.GAUGE:
                    used, dropped = _rows(gauges, gauges.name, output, labels, room)
                elif kind in (plan_pb2.Output.COUNTER, plan_pb2.Output.TOPK):
                    used, dropped = _rows(totals, f"{totals.name}_total", output, labels, room)
                elif kind == plan_pb2.Output.EVENTS and output.events is not None:
                    totals.add_sample(f"{totals.name}_total", labels, output.events.received)
                    used, dropped = 1, 0
                else:
                    used, dropped = 0, len(output.total.labels)
                room, omitted = room - used, omitted + dropped
            left_out.add_sample(left_out.name, who, omitted)
        yield from (totals, gauges, distributions, coverage, lost, runs, cores, left_out)


def _rows(family: Metric, name: str, output: result.OutputResult, labels: Labels, room: int) -> tuple[int, int]:
    """Add a sample a row; answers how many were added and how many left out."""
    # A gauge is of now: what a node held that is silent, or has left, is none of it.
    rows = output.window if output.output.kind == plan_pb2.Output.GAUGE else output.total
    taken = min(len(rows.labels), max(room, 0))
    for row, value in zip(rows.labels[:taken], rows.weights[:taken].tolist(), strict=True):
        family.add_sample(name, labels | _row_labels(output.output.group_by, row), value)
    return taken, len(rows.labels) - taken + rows.other_count


def _histogram(family: Metric, output: result.OutputResult, labels: Labels, room: int) -> tuple[int, int]:
    """Add the buckets of each row that has room for all of them."""
    rows = output.total
    if not len(rows.labels):
        return 0, 0
    ends = output.bounds[1].tolist()
    each = len(ends) + 2
    taken = min(len(rows.labels), max(room, 0) // each)
    for row, slots in zip(rows.labels[:taken], rows.values[:taken].tolist(), strict=True):
        named = labels | _row_labels(output.output.group_by, row)
        running = 0
        for end, count in zip(ends, slots, strict=True):
            running += count
            if math.isfinite(end):
                family.add_sample(f"{family.name}_bucket", named | {"le": f"{end:.17g}"}, running)
        family.add_sample(f"{family.name}_bucket", named | {"le": "+Inf"}, running)
        family.add_sample(f"{family.name}_count", named, running)
    return taken * each, len(rows.labels) - taken + rows.other_count


def _row_labels(group_by: Iterable[str], row: result.Labels) -> Labels:
    return {label_name(group): str(value) for group, value in zip(group_by, row, strict=True)}


def label_name(group: str) -> str:
    """A name that Prometheus takes for one of `groupBy`."""
    name = re.sub(r"[^a-zA-Z0-9_]", "_", group)
    if name == "namespace":
        return "pod_namespace"  # "namespace" is the policy's
    return f"by_{name}" if name in _RESERVED or not name[:1].isalpha() else name
