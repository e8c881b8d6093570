"""What a policy has measured so far, merged over the fleet, as frozen values.

``aggregate`` makes a ``Result``; ``report`` puts it into the form of a ProbeReport, the operator's metrics
export it, ``probefleet run`` prints it. Numbers are whole here: nothing is rounded or cut before ``report``,
except that an output has at most ``MAX_ROWS`` rows and the rest in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from probefleet_wire import merge
from probefleet_wire.v1 import plan_pb2

Label: TypeAlias = str | int | float
Labels: TypeAlias = tuple[Label, ...]
Counts: TypeAlias = npt.NDArray[Any]
Record: TypeAlias = dict[str, Label]

MAX_ROWS: Final = 1_000

#: Labels that no name in Kubernetes can be.
HOST: Final = "(host)"
UNKNOWN: Final = "(unknown)"
OTHER: Final = "(other)"

#: The column of folded stacks.
STACK: Final = "stack"


@dataclass(frozen=True, slots=True)
class PodName:
    """What the operator knows of a pod uid; ``containers`` maps container ids to names.

    ``nodes``: where it runs or ran, and so who may speak for it. Empty: not checked (on a single machine there is one).
    """

    namespace: str
    name: str
    workload_kind: str = ""
    workload: str = ""
    containers: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()


#: Names of a pod, or None for one that nobody has heard of. Must also know pods that are gone.
Names: TypeAlias = Callable[[str], PodName | None]


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """What the aggregator needs to know of a plan."""

    uid: str
    namespace: str
    name: str
    generation: int
    interval_ms: int
    outputs: tuple[plan_pb2.Output, ...]
    digest: str = ""  # of the instance: its statistics are this policy's cost
    cluster: bool = False  # scope: pods of many namespaces come together, so names carry theirs

    @classmethod
    def of(cls, plan: plan_pb2.Plan) -> PolicyFacts:
        """The facts of one plan."""
        return cls(
            uid=plan.policy_uid,
            namespace=plan.namespace,
            name=plan.name,
            generation=plan.generation,
            interval_ms=plan.interval_ms or 10_000,
            outputs=tuple(plan.outputs),
            digest=plan.instance.digest,
            cluster=plan.scope == plan_pb2.SCOPE_CLUSTER,
        )


def group_by(output: plan_pb2.Output) -> tuple[str, ...]:
    """What the rows of an output are grouped by: of stacks, the stack itself comes last."""
    named = tuple(output.group_by)
    return (*named, STACK) if output.kind == plan_pb2.Output.STACKS and STACK not in named else named


def sizes(output: plan_pb2.Output, values: Counts) -> Counts:
    """By what rows of ``values[n, width]`` are put in order, ``[n]``: their value. Of a histogram what its values add
    up to: a pod that waited for long comes before one that waited often.
    """
    if output.kind == plan_pb2.Output.HISTOGRAM:
        histogram = output.histogram
        return merge.sums(values, merge.slot_bounds(histogram.scale, histogram.step, values.shape[1]))
    found: Counts = values.sum(axis=1, dtype=values.dtype)
    return found


@dataclass(frozen=True, slots=True)
class Rows:
    """Merged rows of one output, largest first (``sizes``).

    ``values`` is ``[n, width]`` (width 1, or a histogram's slots), ``rates`` ``[n]`` events per second of the
    window (zeros in totals). ``other`` is the one row that stands for ``other_count`` more, ``sum`` the whole
    with it.
    """

    labels: tuple[Labels, ...]
    values: Counts
    rates: npt.NDArray[np.float64]
    sum: Counts
    other: Counts | None = None
    other_count: int = 0

    @property
    def weights(self) -> Counts:
        """One number a row: the value, or how many values a histogram holds."""
        weights: Counts = self.values.sum(axis=1, dtype=self.values.dtype)
        return weights

    @property
    def whole(self) -> int:
        """Everything together: the sum of all values."""
        return int(self.sum.sum(dtype=self.sum.dtype)) if self.sum.size else 0


@dataclass(frozen=True, slots=True)
class Events:
    """The newest records of a ring, oldest first, and what became of all others."""

    records: tuple[Record, ...]
    received: int  # by this operator and those before it
    submitted: int  # 0: the program does not count them
    lost: int  # no room in the ring
    dropped: int  # the agent could not keep them


@dataclass(frozen=True, slots=True)
class MapFill:
    """How much of a hash map is taken, on the node where it is fullest."""

    node: str
    entries: int
    max_entries: int

    @property
    def share(self) -> float:
        """1.0 is full: what finds no room from then on is lost."""
        return self.entries / self.max_entries


@dataclass(frozen=True, slots=True)
class OutputResult:
    """One output of the policy: the last interval of every fresh node, and everything since it began."""

    output: plan_pb2.Output
    window: Rows
    total: Rows
    rate_per_second: float  # of what is counted, in the window
    since_ns: int  # wall clock; 0: nothing came yet
    lost: int
    uncounted: tuple[str, ...]
    events: Events | None = None
    fullest: MapFill | None = None
    retired: int = 0  # of the total: by nodes that have left, or before a reboot; only this operator knows of it
    forgotten: int = 0  # in no total: the same of operators before this one

    @property
    def group_by(self) -> tuple[str, ...]:
        """The names of a row's labels."""
        return group_by(self.output)

    @property
    def bounds(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Where the histogram's slots begin and end."""
        histogram = self.output.histogram
        return merge.slot_bounds(histogram.scale, histogram.step, self.total.sum.size)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Nodes with a sample newer than three intervals, of those selected. Lists are sorted and at most 20 long."""

    sampled: int
    selected: int
    missing: tuple[str, ...] = ()  # no sample of this generation at all
    missing_count: int = 0
    stale: tuple[str, ...] = ()  # an old one
    stale_count: int = 0


@dataclass(frozen=True, slots=True)
class NodeGap:
    """A time in which a node did not count, and why."""

    node: str
    start_ns: int
    end_ns: int
    why: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What the policy costs. Shares are cores (1.0 is one CPU fully), of programs: run time and hooks together."""

    known_nodes: int = 0
    measuring_nodes: int = 0  # whose first window of statistics is not over
    unknown_nodes: int = 0
    max_cores: float = 0.0
    max_node: str = ""
    mean_cores: float = 0.0
    runs_per_second: float = 0.0  # of the nodes that can tell
    runs_known: bool = False  # which are all, or all but some that have begun just now
    max_map_bytes: int = 0
    total_map_bytes: int = 0
    max_agent_cores: float = 0.0
    mean_agent_cores: float = 0.0
    max_agent_rss_bytes: int = 0
    shared_by: int = 1  # policies that share the instance, and so its cost


@dataclass(frozen=True, slots=True)
class Result:
    """One policy over the whole fleet at ``time_ns``."""

    facts: PolicyFacts
    time_ns: int
    since_ns: int  # 0: nothing came yet
    outputs: tuple[OutputResult, ...]
    coverage: Coverage
    rate_per_second: float  # program runs, or, where these are unknown, what the first output counts
    lost: int
    uncounted: tuple[str, ...]
    gaps: tuple[NodeGap, ...]
    cost: Cost
    settled: bool  # every node has said what it holds, or had the time to: totals do not grow for that any more
    window_seconds: float  # the longest window of any node and output; an interval, where none was late
