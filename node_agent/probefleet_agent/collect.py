"""Readers: what a policy's outputs are, read from the maps and rings of the instance it is bound to.

In: bytes from ``kernel.maps`` and ``kernel.rings``, identities from ``pods``. Out: ``Table`` and ``EventChunk``
messages. The engine makes one reader an output when it binds a policy, and asks it every interval. A map is read
once for all policies that share an instance; each keeps only what its selection lets through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from probefleet_wire import columns
from probefleet_wire.btf_layout import Field
from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_agent import decode, pods, prints, samples
from probefleet_agent.baseline import Baseline, Nature
from probefleet_agent.decode import DecodeError, Layout
from probefleet_agent.pods import Answer, Book, CgroupId, PolicyUid
from probefleet_agent.samples import Classified, GroupKey, Mark

Bytes = npt.NDArray[np.uint8]
_POD = ("namespace", "workload", "pod")
POD_COLUMN, CONTAINER_COLUMN, STACK_COLUMN = "pod_uid", "container_id", "stack"
#: What a pod did that the operator has not told us about is held back this long, while there is an operator. Then a
#: record is dropped and counted; counts stay in their map, and it is said that they are in no row.
HOLD_NS = 5_000_000_000
#: Records of one reading: bounds a batch.
MAX_RECORDS = 65_536
_KERNEL_STACK, _USER_STACK = ("kernel_stack_id_t",), ("user_stack_id_t", "stack_id_t")


class Stacks(Protocol):
    """Gives stacks as folded text."""

    def folded(
        self, pids: Sequence[int], kernel_ids: Sequence[int | None], user_ids: Sequence[int | None]
    ) -> list[str]:
        """``outermost;…;innermost`` of each, kernel frames last, marked ``_[k]``."""


@dataclass(slots=True)
class TableReader:
    """One output that is rows: counter, gauge, histogram, topk or stacks."""

    plan: plan_pb2.Plan
    output: plan_pb2.Output
    layout: Layout
    book: Book
    lookups: decode.Lookups
    stacks: Stacks | None
    of_records: bool = False  # of an iterator: a reading's keys are its values, and may come twice
    baseline: Baseline | None = None  # what the map held before the policy came
    nature: Nature | None = None  # of a map whose entries come and go without the agent
    rows: samples.Rows = field(init=False)
    _cgroup: Field | None = field(init=False)
    _slot: Field | None = field(init=False)
    selector: str = ""  # by which its keys were judged
    _turn: int = 0  # of the policy's selection, when they were last
    _unnamed: frozenset[int] = frozenset()
    _unnamed_since_ns: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        key = self.layout.key
        self._cgroup = decode.with_typedef(key, *decode.CGROUP) or self._named("cgroup")
        slots = self.output.histogram.slots
        slot = slots.removeprefix("key").removeprefix(".")  # empty: the whole key is the slot, as in BPF_HISTOGRAM
        self._slot = decode.find(key, slot, "the key") if slots.startswith("key") else None
        names = [POD_COLUMN] if any(group in _POD or group == "container" for group in self.output.group_by) else []
        names += [CONTAINER_COLUMN] if "container" in self.output.group_by else []
        names += [group for group in self.output.group_by if group == "key" or group.startswith("key.")]
        names += [STACK_COLUMN] if self.output.kind == plan_pb2.Output.STACKS else []
        fold = "sum"
        if self.output.kind == plan_pb2.Output.GAUGE:
            merge = plan_pb2.Output.Merge.Name(self.output.merge).lower()
            fold = "max" if merge == "latest" else merge
        gauge = self.output.kind == plan_pb2.Output.GAUGE
        counted = not (self.of_records and not self.output.value)  # else records themselves are
        signed = gauge and counted and decode.find(self.layout.value, self.output.value, "the map's value").signed
        self.rows = samples.Rows(self._width(), tuple(names), fold, None if gauge else self.nature, signed)
        for name in self.rows.names:
            if name.startswith("key"):
                self._decoder(name)  # a misnamed field is said now, not at the first event

    def read(self, keys: Bytes, values: npt.NDArray[np.uint8]) -> None:
        """Take in one reading of the map."""
        self._unnamed = frozenset()
        self.selector = self.selector or self.book.selector(PolicyUid(self.plan.policy_uid))
        if not keys.shape[1]:  # a map of maps without any
            return
        if (turn := self.book.turn(PolicyUid(self.plan.policy_uid))) != self._turn:
            self._turn = turn
            self.rows.ask_again(self._refused)
        if self.of_records:
            self._read_records(keys)
            return
        histogram = self.output.kind == plan_pb2.Output.HISTOGRAM
        if not histogram and self.rows.fold != "sum":
            numbers = decode.folded(values, self.layout, self.output.value, self.rows.fold)
        else:
            numbers = decode.numbers(values, self.layout, self.output.value)
        if self.baseline is not None:
            keys, numbers = self.baseline.subtract(keys, numbers)
        if numbers.ndim == 2 and not histogram:
            numbers = numbers.sum(axis=1, dtype=np.uint64)
        self.rows.update(keys, numbers, self._classify)

    def _read_records(self, records: Bytes) -> None:
        """One reading of an iterator: records that agree in what they are grouped by come together first."""
        numbers = np.ones(len(records), np.uint64)
        if self.output.value:
            numbers = decode.numbers(records, self.layout, self.output.value)
        wanted = np.zeros(records.shape[1], np.uint8)
        fields = [self._decoder(name)[0] for name in self.rows.names if name.startswith("key")]
        for at in [*fields, *([self._cgroup] if self._cgroup else [])]:
            wanted[at.offset_bytes : at.offset_bytes + at.size_bytes] = 1
        distinct, index = np.unique(records * wanted, axis=0, return_inverse=True)
        signed = numbers.view(np.int64 if self.rows.signed else np.uint64)
        limits = np.iinfo(signed.dtype)
        target, start = {
            "sum": (np.add, 0), "max": (np.maximum, limits.min), "min": (np.minimum, limits.max),
        }[self.rows.fold]  # fmt: skip
        totals = np.full(len(distinct), start, signed.dtype)
        target.at(totals, index.reshape(-1), signed)
        self.rows.update(distinct, totals.view(np.uint64), self._classify)

    def cgroups(self, keys: Bytes) -> list[int]:
        """Distinct cgroup ids among the keys."""
        return [] if self._cgroup is None else np.unique(decode.raw(keys, self._cgroup)).tolist()

    def unnamed(self, now_ns: int) -> int:
        """Cgroups of the last reading that nobody can tell whose they are, for longer than a name takes to come."""
        known = self._unnamed_since_ns if self.book.current else {}
        self._unnamed_since_ns = {cgroup: min(known.get(cgroup, now_ns), now_ns) for cgroup in self._unnamed}
        return sum(now_ns - since >= HOLD_NS for since in self._unnamed_since_ns.values())

    def _width(self) -> int:
        if self.output.kind != plan_pb2.Output.HISTOGRAM:
            return 1
        if self._slot is not None:
            return 64
        shape = decode.find(self.layout.value, self.output.value, "the map's value").shape
        if not shape:
            raise DecodeError(
                f"output {self.output.name}: {self.output.map} holds one number a key, no slots. Name the field of the "
                "key that is the slot (histogram.slots: key.FIELD), or count in an array of slots."
            )
        return int(np.prod(shape))

    def _named(self, decoder: str) -> Field | None:
        for name, said in self.output.decode.items():
            if said == decoder:
                return decode.find(self.layout.key, name.removeprefix("key").removeprefix("."), "the key")
        return None

    def _decoder(self, name: str) -> tuple[Field, str]:
        at = decode.find(self.layout.key, name.removeprefix("key").removeprefix("."), "the key")
        return at, decode.decoder_of(at, self.output.decode, name)

    def _classify(self, keys: Bytes) -> Classified:
        uid = PolicyUid(self.plan.policy_uid)
        counts, pending, identities = judge(self.book, uid, keys, self._cgroup)
        self._unnamed = frozenset(self.cgroups(keys[pending]))
        parts: list[Sequence[str | int | float]] = []
        for name in self.rows.names:
            if name == POD_COLUMN:
                parts.append([identity.pod for identity in identities])
            elif name == CONTAINER_COLUMN:
                parts.append([identity.container for identity in identities])
            elif name == STACK_COLUMN:
                parts.append(self._folded(keys, counts))
            else:
                at, decoder = self._decoder(name)
                parts.append(decode.column(keys, at, decoder, self.lookups).tolist())
        rows: list[GroupKey] = list(zip(*parts, strict=True)) if parts else [()] * len(keys)
        slots = np.zeros(len(keys), np.int64)
        if self._slot is not None:
            slots = decode.raw(keys, self._slot).astype(np.int64)
        groups = [row if counted else None for row, counted in zip(rows, counts.tolist(), strict=True)]
        return Classified(groups, pending, slots)

    def _refused(self, keys: Bytes) -> npt.NDArray[np.bool_]:
        counts, pending, _ = judge(self.book, PolicyUid(self.plan.policy_uid), keys, self._cgroup)
        return ~(counts | pending)

    def _folded(self, keys: Bytes, counts: npt.NDArray[np.bool_]) -> list[str]:
        if self.stacks is None:
            raise DecodeError(f"output {self.output.name}: the program has no stack trace map")

        wanted = np.flatnonzero(counts)

        def ids(typedefs: tuple[str, ...]) -> list[int | None]:
            at = decode.with_typedef(self.layout.key, *typedefs)
            return decode.raw(keys[wanted], at).tolist() if at else [None] * len(wanted)

        pids = [pid or 0 for pid in ids(("pid_nr_t",))]
        texts = [""] * len(keys)
        for at, text in zip(
            wanted.tolist(), self.stacks.folded(pids, ids(_KERNEL_STACK), ids(_USER_STACK)), strict=True
        ):
            texts[at] = text
        return texts


@dataclass(slots=True)
class EventReader:
    """One output that is records, for one policy: from where in the ring it reads on, and what came of it so far."""

    plan: plan_pb2.Plan
    output: plan_pb2.Output
    layout: Layout
    book: Book
    lookups: decode.Lookups
    settled: Mark  # what the operator has acknowledged
    epoch: str = ""  # of the ring
    since_ns: int = 0  # when it began to count by this selector; 0: with the program, or when the policy joined that
    selector: str = ""  # by which records were judged
    lost_before: int = 0  # what a ring that this process keeps had lost, and dropped, when the policy joined
    dropped_before: int = 0
    full_before: int = 0  # how often a ring had been seen full by then
    cursor: int = field(init=False)
    counted: int | None = field(init=False)
    dropped: int = field(init=False)
    announced: bool = field(init=False)  # does the operator know in this stream what lay before?
    _cgroup: Field | None = field(init=False)
    #: What the program had lost, in numbers and in words, as the operator heard last.
    told: tuple[tuple[int, int, int, int], list[str]] | None = None
    read_ns: int = 0  # when its ring was looked at last
    _waiting_since_ns: int = 0

    def __post_init__(self) -> None:
        self._cgroup = decode.with_typedef(self.layout.value, *decode.CGROUP)
        self.restart_stream()

    def restart_stream(self) -> None:
        """A new stream: go back to what was acknowledged."""
        self.go_on(self.settled)

    def go_on(self, mark: Mark) -> None:
        """Read from there, and say what lay before."""
        self.cursor, self.counted, self.dropped = mark
        self.announced = False

    @property
    def mark(self) -> Mark:
        """How far it has read."""
        return Mark(self.cursor, self.counted, self.dropped)

    def chunk(
        self, records: Bytes, positions: npt.NDArray[np.uint64], end_position: int, now_ns: int
    ) -> stream_pb2.EventChunk | None:
        """What counts of the records read from ``cursor`` on; moves the cursor. ``None`` where there is nothing."""
        if end_position == self.cursor:
            return None
        self.selector = self.selector or self.book.selector(PolicyUid(self.plan.policy_uid))
        counts, pending, identities = judge(self.book, PolicyUid(self.plan.policy_uid), records, self._cgroup)
        stop = len(records)
        if pending.any():
            waiting_since_ns = self._waiting_since_ns if self.book.current else 0
            self._waiting_since_ns = min(waiting_since_ns or now_ns, now_ns)  # the clock may have been set back
            if now_ns - self._waiting_since_ns < HOLD_NS:
                stop = int(np.flatnonzero(pending)[0])
                end_position = int(positions[stop])
            else:
                self.dropped += int(pending.sum())
                self._waiting_since_ns = 0
        else:
            self._waiting_since_ns = 0
        self.cursor = end_position
        keep = np.flatnonzero(counts[:stop])
        self.counted = None if self.counted is None else self.counted + len(keep)
        chunk = stream_pb2.EventChunk(
            positions=columns.pack(positions[keep]), end_position=end_position, dropped=self.dropped
        )
        taken = records[keep]
        own = decode.own_command(self.layout.value)
        # First, so that other fields of the records (a parent) know what these say.
        processes = decode.processes(taken, own, self.lookups) if own is not None else None
        for at in self.layout.value:
            if at is self._cgroup:
                continue
            if prints.is_part(at):
                continue
            decoder = decode.decoder_of(at, self.output.decode, at.name)
            name = "time_ns" if decoder == "ktime" and "time_ns" not in {c.name for c in chunk.columns} else at.name
            if processes is not None and own is not None and at is own[0] and decoder == "pid":
                values: decode.Coded = processes
            else:
                values = decode.coded(taken, at, decoder, self.lookups)
            if isinstance(values, columns.StringColumn):
                chunk.columns.append(columns.coded_column(name, values.distinct, values.index.astype(np.int64)))
            else:
                chunk.columns.append(columns.column(name, values))
        if prints.is_line(self.layout.value):
            chunk.columns.append(columns.column("message", prints.messages(taken, self.layout.value)))
        whose, containers = identities.index[keep], [each.container for each in identities.known]
        chunk.columns.append(columns.coded_column(POD_COLUMN, [each.pod for each in identities.known], whose))
        chunk.columns.append(columns.coded_column(CONTAINER_COLUMN, containers, whose))
        return chunk


@dataclass(frozen=True, slots=True)
class Whose:
    """An identity for each of many entries: entry ``i`` is ``known[index[i]]``'s."""

    known: tuple[pods.Identity, ...]
    index: npt.NDArray[np.int64]

    def __iter__(self) -> Iterator[pods.Identity]:
        return (self.known[at] for at in self.index.tolist())


def judge(
    book: Book, policy: PolicyUid, entries: Bytes, cgroup: Field | None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], Whose]:
    """Of each entry: does it count, must it wait, whose is it. Entries without a cgroup count for all."""
    n = len(entries)
    if cgroup is None:
        return np.ones(n, bool), np.zeros(n, bool), Whose((pods.Identity(pods.UNKNOWN, ""),), np.zeros(n, np.int64))
    found, index = decode.distinct(decode.raw(entries, cgroup))
    ids = [CgroupId(int(value)) for value in found.tolist()]
    answers = np.array([book.answer(policy, cgroup_id) for cgroup_id in ids] or [Answer.UNKNOWN], np.uint8)[index]
    unknown = pods.Identity(pods.UNKNOWN, "")
    known = tuple(book.identities.get(cgroup_id, unknown) for cgroup_id in ids)
    return answers == Answer.SELECTED, answers == Answer.UNKNOWN, Whose(known, index)


def wants_events(output: plan_pb2.Output) -> bool:
    """Is it read from a ring?"""
    return output.kind == plan_pb2.Output.EVENTS


def cgroups_in(layout: Layout, keys: Bytes) -> Sequence[int]:
    """Distinct cgroup ids in a map's keys."""
    at = decode.with_typedef(layout.key, *decode.CGROUP)
    return [] if at is None or not len(keys) else np.unique(decode.raw(keys, at)).tolist()
