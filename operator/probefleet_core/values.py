"""A user's objects as frozen values: what ``policy`` makes of YAML, and ``planner`` and ``placement`` work with.

Names are those of the resource in Python's spelling. Units are in the names. Nothing here does anything but hold and
compare; the only behaviour is ``Selector.matches``, because a selector without it means nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType, TypeAlias

from probefleet_core import interval_targets, network_targets

PolicyUid = NewType("PolicyUid", str)
ProbeMapUid = NewType("ProbeMapUid", str)
PodUid = NewType("PodUid", str)
NodeName = NewType("NodeName", str)
Digest = NewType("Digest", str)


class Scope(enum.StrEnum):
    """Whose events a policy may see."""

    NAMESPACE = "Namespace"
    CLUSTER = "Cluster"


# Label selectors, with the meaning that Kubernetes gives them.


class Operator(enum.StrEnum):
    """What a requirement asks of a label."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One of ``matchExpressions``."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """As in Kubernetes: ``NotIn`` also holds for an object without the label."""
        value = labels.get(self.key)
        if self.operator is Operator.IN:
            return value is not None and value in self.values
        if self.operator is Operator.NOT_IN:
            return value is None or value not in self.values
        return (value is not None) == (self.operator is Operator.EXISTS)

    def __str__(self) -> str:
        return f"{self.key} {self.operator.value} {','.join(self.values)}".rstrip()


@dataclass(frozen=True, slots=True)
class Selector:
    """A label selector; an empty one matches everything. ``match_labels`` is sorted by key."""

    match_labels: tuple[tuple[str, str], ...] = ()
    match_expressions: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """True where every label and every expression holds."""
        return all(labels.get(key) == value for key, value in self.match_labels) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )

    def __str__(self) -> str:
        return "; ".join([f"{key}={value}" for key, value in self.match_labels] + [*map(str, self.match_expressions)])


# Programs: the member present is the kind.


@dataclass(frozen=True, slots=True)
class CatalogProgram:
    """A probe that Probefleet ships; parameters as the user wrote them, sorted by name."""

    name: str
    parameters: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class BccProgram:
    """C in BCC's dialect, compiled on the node."""

    source: str


@dataclass(frozen=True, slots=True)
class BpftraceProgram:
    """A script for bpftrace, which runs on the node as a process of its own."""

    script: str


@dataclass(frozen=True, slots=True)
class CProgram:
    """C in libbpf's dialect, compiled once by the operator."""

    source: str


@dataclass(frozen=True, slots=True)
class ConfigMapKey:
    """A key of a ConfigMap in the policy's namespace."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class ObjectProgram:
    """A compiled CO-RE object: inline, or in a ConfigMap; ``sha256`` (hex) is what its bytes must hash to."""

    sha256: str
    inline: bytes | None = None
    config_map: ConfigMapKey | None = None


Program: TypeAlias = CatalogProgram | BccProgram | BpftraceProgram | CProgram | ObjectProgram


# Where programs are attached.


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """``category:name`` of tracefs."""

    category: str
    name: str


@dataclass(frozen=True, slots=True)
class RawTracepoint:
    """A tracepoint with its raw arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class BtfTracepoint:
    """A tracepoint with typed arguments (``tp_btf``)."""

    name: str


@dataclass(frozen=True, slots=True)
class Kprobe:
    """A kernel function's entry (plus ``offset`` bytes), or its return."""

    function: str
    offset: int = 0
    on_return: bool = False


@dataclass(frozen=True, slots=True)
class KprobePattern:
    """Every kernel function whose name fits a shell's pattern (``tcp_*``), its entry or its return."""

    pattern: str
    on_return: bool = False


@dataclass(frozen=True, slots=True)
class Fentry:
    """A kernel function's entry or return, its arguments typed by BTF."""

    function: str
    on_return: bool = False


@dataclass(frozen=True, slots=True)
class Lsm:
    """A security hook such as ``file_open``, watched after its verdict."""

    hook: str


@dataclass(frozen=True, slots=True)
class Usdt:
    """A probe that the author of a user program put there. ``path`` and ``pods`` as in Uprobe; ``pid`` 0: all."""

    path: str
    provider: str
    name: str
    pid: int = 0
    pods: bool = False


@dataclass(frozen=True, slots=True)
class Uprobe:
    """A user function's entry or return; ``symbol`` or, where that is empty, an offset in the file. ``pid`` 0: all.

    ``path`` is absolute, or the name of a library. ``pods``: in the selected pods' containers, not on the node.
    """

    path: str
    symbol: str = ""
    offset: int = 0
    pid: int = 0
    on_return: bool = False
    pods: bool = False


@dataclass(frozen=True, slots=True)
class PerfEvent:
    """A sampling event on every CPU: by frequency or by period, never both."""

    event: str
    frequency_hz: int = 0
    period: int = 0


@dataclass(frozen=True, slots=True)
class Syscall:
    """A system call by its name, entered or returned from."""

    name: str
    on_return: bool = False


Target: TypeAlias = (
    Tracepoint
    | RawTracepoint
    | BtfTracepoint
    | Kprobe
    | KprobePattern
    | Fentry
    | Lsm
    | Uprobe
    | Usdt
    | PerfEvent
    | Syscall
    | network_targets.Target
    | interval_targets.Target
)


@dataclass(frozen=True, slots=True)
class Attachment:
    """One program (a function's name) on one target."""

    program: str
    target: Target


# Maps and outputs.


@dataclass(frozen=True, slots=True)
class MapEntry:
    """An entry that the policy writes: key and value as YAML has them."""

    key: object  #: None: it has none, as in a queue
    value: object


@dataclass(frozen=True, slots=True)
class MapUse:
    """What is said of one map of the program: what takes its place, how large it is, what is written into it."""

    name: str
    probe_map: str = ""
    pinned: str = ""  #: path on the node of a map that somebody else pinned
    max_entries: int = 0
    entries: tuple[MapEntry, ...] | None = None  #: None: the policy writes nothing


@dataclass(frozen=True, slots=True)
class TailCalls:
    """What jumps through a program array lead to, by slot."""

    map: str
    entries: tuple[tuple[int, str], ...]


class Kind(enum.StrEnum):
    """How an output's numbers are to be read."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    TOPK = "topk"
    STACKS = "stacks"
    EVENTS = "events"


class Merge(enum.StrEnum):
    """How gauges of several nodes become one."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"
    LATEST = "latest"


class Scale(enum.StrEnum):
    """What slot i holds: ``log2`` [2^i, 2^(i+1)), ``log2-bcc`` [2^(i-1), 2^i), ``linear`` [i·step, (i+1)·step)."""

    LOG2 = "log2"
    LOG2_BCC = "log2-bcc"
    LINEAR = "linear"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Where a histogram's slots are, and what they mean. ``slots``: ``value`` or ``key.FIELD``; empty: found by BTF."""

    scale: Scale = Scale.LOG2
    step: int = 0
    slots: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """One result: which map, read how, grouped by what. ``group_by`` ``None``: the default of the map."""

    name: str
    map: str
    kind: Kind
    value: str = ""
    record: str = ""
    merge: Merge = Merge.SUM
    histogram: Histogram | None = None
    group_by: tuple[str, ...] | None = None
    limit: int = 20
    unit: str = ""
    decode: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """What a policy may cost on one node."""

    cpu_millicores: int
    map_memory_bytes: int


@dataclass(frozen=True, slots=True)
class ProbePolicy:
    """A ProbePolicy that could be carried out as far as its own text says."""

    uid: PolicyUid
    namespace: str
    name: str
    generation: int
    created_ns: int  #: wall clock; 0 for a policy that is not in a cluster
    deleting: bool  #: has a deletionTimestamp
    scope: Scope
    program: Program
    nodes: Selector = Selector()
    pods: Selector | None = None  #: None: no selector was given
    attach: tuple[Attachment, ...] = ()
    maps: tuple[MapUse, ...] = ()
    tail_calls: tuple[TailCalls, ...] = ()
    outputs: tuple[Output, ...] = ()  #: empty: every map that BTF describes
    interval_ms: int = 10_000
    ttl_ms: int = 0  #: 0: for ever
    suspend: bool = False
    budget: Budget = Budget(cpu_millicores=100, map_memory_bytes=32 << 20)


class MapType(enum.StrEnum):
    """The types that a ProbeMap may have."""

    ARRAY = "array"
    PERCPU_ARRAY = "percpu-array"
    HASH = "hash"
    PERCPU_HASH = "percpu-hash"
    LRU_HASH = "lru-hash"
    RINGBUF = "ringbuf"
    PERF_EVENT_ARRAY = "perf-event-array"
    STACK_TRACE = "stack-trace"
    LRU_PERCPU_HASH = "lru-percpu-hash"
    LPM_TRIE = "lpm-trie"
    QUEUE = "queue"
    STACK = "stack"
    BLOOM_FILTER = "bloom-filter"
    PROG_ARRAY = "prog-array"
    ARRAY_OF_MAPS = "array-of-maps"
    HASH_OF_MAPS = "hash-of-maps"
    TASK_STORAGE = "task-storage"
    CGRP_STORAGE = "cgrp-storage"
    SK_STORAGE = "sk-storage"
    CGROUP_STORAGE = "cgroup-storage"
    PERCPU_CGROUP_STORAGE = "percpu-cgroup-storage"


@dataclass(frozen=True, slots=True)
class InnerMaps:
    """What lies in a map of maps: maps that are all alike. ``keys``: which keys of a hash of maps have one."""

    type: MapType
    max_entries: int
    key: str
    value: str
    keys: tuple[int | str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbeMap:
    """A map of its own resource. ``key`` and ``value`` are C: ``u32 pid`` or ``struct {…}``."""

    uid: ProbeMapUid
    namespace: str
    name: str
    generation: int
    deleting: bool
    type: MapType
    max_entries: int  #: 0 of storage, which has an entry for each owner
    key: str
    value: str
    policies: tuple[str, ...] = ()  #: who may use it, and so write to it; empty: every policy of the namespace
    inner: InnerMaps | None = None  #: of a map of maps
