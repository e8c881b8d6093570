"""Fills a batch: every map and ring that is due is read once, and each policy's reader takes its part.

In: the instances and the readers bound to them. Out: ``Table`` and ``EventChunk`` messages in the batch, each with what
was lost on its way, and how far each ring was read. The engine calls it every tick.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence, Set

import numpy as np
from probefleet_wire.v1 import stream_pb2

from probefleet_agent import collect, iterating, joining, names, samples
from probefleet_agent.bindings import Bindings
from probefleet_agent.decode import DecodeError, Layout
from probefleet_agent.errors import ProbefleetError
from probefleet_agent.identities import Identities
from probefleet_agent.installed import Failure
from probefleet_agent.kernel import clock, map_storage, maps, uapi
from probefleet_agent.kernel.rings import Records, RingReader
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.loaded import ITERATOR, LOST, Loaded, MapHandle
from probefleet_agent.perf_ring import KeptRing
from probefleet_agent.pinned_by_others import MARK
from probefleet_agent.pods import PolicyUid
from probefleet_agent.reconcile import Digest

_RING_READ_BYTES = 4 << 20
#: A ring of which less than an eighth is unread is read this often: a chunk costs the same for one record as for many.
_EVENTS_EVERY_NS = 1_000_000_000
_NO_ROOM = "what finds no room"
_FILLING = frozenset({MapType.HASH, MapType.PERCPU_HASH, MapType.LPM_TRIE})
#: A map that no output reads is looked at once an interval, if it is no larger.
_MAX_LOOKED_AT = 65_536
_READABLE = uapi.HASH_TYPES | {MapType.ARRAY, MapType.PERCPU_ARRAY}


def add_tables(
    batch: stream_pb2.Batch,
    due: Iterable[PolicyUid],
    now_ns: int,
    *,
    loaded: Mapping[Digest, Loaded],
    bindings: Bindings,
    identities: Identities,
) -> None:
    """The rows of all policies that are due."""
    readings: dict[tuple[Digest, str], tuple[collect.Bytes, collect.Bytes]] = {}
    for uid in due:
        bound = bindings.bound[uid]
        instance = loaded[bound.digest]
        counts = instance.lost_of(uid)
        joined = instance.joined.get(uid)
        for name, reader in bound.tables.items():
            handle = instance.source(reader.output.map)
            if handle is None:
                continue  # an iterator that was detached
            key = (bound.digest, handle.name)
            bound.unread.pop(name, None)
            try:
                if key not in readings:
                    readings[key] = _read(instance, handle)
                identities.know(reader.cgroups(readings[key][0]), now_ns)
                reader.read(*readings[key])
            except (DecodeError, ProbefleetError) as error:
                # The others go on. This one's rows stay as they were, and its report says why.
                bound.unread[name] = Failure.of(error)
            table = reader.rows.table() or reader.rows.no_table()
            table.policy_uid, table.output, table.generation = uid, name, bound.plan.generation
            table.epoch, table.since_ns = _beginning(instance, handle, reader)
            table.lost, table.program_epoch = counts[0] + counts[3], _program_epoch(instance, uid)
            if key in readings and handle.info.type in _FILLING:
                table.entries, table.max_entries = len(readings[key][0]), handle.info.max_entries
            full = 0 < table.max_entries <= table.entries
            if full and _is_written(handle) and not instance.counts_losses():
                table.uncounted.append(_full(handle))
            if unread := bound.unread.get(name):
                table.uncounted.append(f"output {name} could not be read: {unread.message}")
            table.uncounted.extend(joining.sentences(joined, reader.baseline))
            table.uncounted.extend(_uncounted(reader, handle, identities, now_ns))
            table.uncounted.extend(_forgotten(instance, f"{uid} {name}", reader))
            table.uncounted.extend(instance.said())
            table.gaps.extend(_gaps(instance, uid, now_ns))
            batch.tables.append(table)
        joining.keep(instance, uid)


def add_events(
    batch: stream_pb2.Batch,
    due: Collection[PolicyUid],
    now_ns: int,
    *,
    force: bool,
    loaded: Mapping[Digest, Loaded],
    bindings: Bindings,
    identities: Identities,
) -> tuple[list[samples.Commit], bool]:
    """The records that have come for all policies: how far each one's ring is read, and whether more wait there."""
    commits: list[samples.Commit] = []
    behind = False
    for uid, bound in bindings.bound.items():
        for name, reader in bound.events.items():
            instance = loaded[bound.digest]
            handle = instance.source(reader.output.map)
            if handle is None:
                continue
            ring = bindings.ring(bound.digest, handle)
            gap_grows = uid in due and bool(instance.detached or instance.ended_ns)
            waited = reader.announced and abs(now_ns - reader.read_ns) < _EVENTS_EVERY_NS
            if waited and not (force or gap_grows) and isinstance(ring, RingReader) and _is_calm(ring, reader.cursor):
                continue
            reader.read_ns = now_ns
            layout = reader.layout
            bound.unread.pop(name, None)
            try:
                read = ring.read(reader.cursor, _RING_READ_BYTES)
            except ProbefleetError as error:
                bound.unread[name] = Failure.of(error)  # the others go on
                continue
            # Of records that are shorter than their type there may be so many that the whole would not fit in memory.
            records = read.first(max(1, 2 * _RING_READ_BYTES // max(layout.value_bytes, 1)))
            counts = instance.lost_of(uid)
            told = (
                counts,
                [
                    *_missed(instance, f"{uid} {name}", _said_of(ring, handle, reader, counts)),
                    *instance.said(),
                ],
            )
            quiet = not len(records) and records.end_position == reader.cursor and told == reader.told
            if quiet and reader.announced and not gap_grows:
                continue
            data = _records(records, layout.value_bytes)
            identities.know(collect.cgroups_in(_as_keys(layout), data), now_ns)
            began = reader.mark
            try:
                chunk = reader.chunk(data, records.positions, records.end_position, now_ns)
            except DecodeError as error:
                # They stay in the ring: what finds no room there is counted.
                bound.unread[name] = Failure.of(error)
                reader.cursor, reader.counted, reader.dropped = began
                continue
            if chunk is None:
                # Nothing came, and yet an operator that is new has to hear what lay before, and each of what was lost.
                chunk = stream_pb2.EventChunk(end_position=reader.cursor, dropped=reader.dropped)
            reader.announced, reader.told = True, told
            # Not where records are held back for want of an identity: they come no sooner by reading on.
            whole = records.end_position == reader.cursor
            much = reader.cursor - began.position > _RING_READ_BYTES // 2 or len(records) < len(read)
            behind = behind or (whole and much)
            chunk.policy_uid, chunk.output, chunk.generation = uid, name, bound.plan.generation
            chunk.epoch = reader.epoch
            chunk.since_ns, chunk.submitted = reader.since_ns or instance.since_of(uid), counts[2]
            # A map that is full on the way to the record loses it, too.
            chunk.lost_by_program, chunk.lost_before_ring = counts[1], counts[0] + counts[3]
            chunk.program_epoch = _program_epoch(instance, uid)
            chunk.lost = counts[1]
            if isinstance(ring, KeptRing):
                chunk.lost += ring.lost - reader.lost_before
                chunk.dropped += ring.dropped - reader.dropped_before
            chunk.gaps.extend(_gaps(instance, uid, now_ns))
            chunk.uncounted.extend(told[1])
            chunk.start_position = began.position
            if began.counted is not None:
                chunk.counted_before = began.counted
            batch.events.append(chunk)
            commits.append(((uid, name, reader.epoch), reader.mark))
    return commits, behind


def _said_of(
    ring: RingReader | KeptRing, handle: MapHandle, reader: collect.EventReader, counts: tuple[int, int, int, int]
) -> list[str]:
    """What a ring lost and nobody counts. A program that counts its records counts those that find no room."""
    if isinstance(ring, KeptRing):
        return ring.said
    unsaid = ring.full > reader.full_before and not (counts[1] or counts[2])
    return [f"{handle.name} was full, and the program does not count {_NO_ROOM}"] if unsaid else []


def _missed(instance: Loaded, whose: str, said: Sequence[str]) -> list[str]:
    """What is said now, and what was once: records that found no room stay missing, whoever is the agent."""
    before = instance.missed.get(whose, [])
    if new := [each for each in said if each.endswith(_NO_ROOM) and each not in before]:
        instance.missed[whose] = [*before, *new]
    return [*dict.fromkeys([*instance.missed.get(whose, []), *said])]


def _forgotten(instance: Loaded, whose: str, reader: collect.TableReader) -> list[str]:
    """What keys had counted that went, or whose pods are selected no more, is in the agent's memory alone, and the next
    agent says that it is missing.
    """
    said = []
    if reader.rows.went:
        said.append(
            f"keys of {reader.output.map} went before the agent was replaced: what they had counted is in no total"
        )
    if reader.rows.left:
        said.append("pods were relabelled before the agent was replaced: what they had counted is in no total")
    before = instance.missed.get(whose, [])
    if new := [each for each in said if each not in before]:
        instance.missed[whose] = [*before, *new]
    return list(instance.forgotten.get(whose, ()))


def look_for_room(instance: Loaded, read: Set[str]) -> None:
    """Note the maps that are full, where a program does not count that; not those that are read, and said, anyway."""
    instance.full.clear()
    if instance.counts_losses():
        return
    # What the policy fills, programs only look into.
    read = read | {each.map for each in instance.instance.contents}
    for handle in instance.maps.values():
        entries = handle.info.max_entries
        ours = handle.name.startswith(("probefleet_", "__"))
        if ours or handle.name in read or handle.info.type not in _FILLING or entries > _MAX_LOOKED_AT:
            continue
        if not _is_written(handle):
            continue
        with contextlib.suppress(ProbefleetError):  # what may not be read is not known
            if len(maps.read(handle.fd, handle.info)[0]) >= entries:
                instance.full.append(_full(handle))


def _full(handle: MapHandle) -> str:
    return f"{handle.name} is full, and the program does not count {_NO_ROOM}"


def _is_written(handle: MapHandle) -> bool:
    """By its programs: of a map that others own it is proved that they only read it."""
    return not handle.probe_map_uid.startswith(MARK)


def _is_calm(ring: RingReader, cursor: int) -> bool:
    return ring.producer_position() - cursor < ring.size // 8


def cgroups_in_use(loaded: Mapping[Digest, Loaded], bindings: Bindings) -> set[int]:
    """Every cgroup that a map of any instance holds, in keys or in values, or a record that is not acknowledged."""
    found: set[int] = set()
    for instance in loaded.values():
        for handle in instance.maps.values():
            layout = handle.layout
            if layout is not None and handle.info.type in _READABLE:
                keys, values = maps.read(handle.fd, handle.info)
                each_value = values.reshape(-1, values.shape[-1])[:, : layout.value_bytes]
                found.update(collect.cgroups_in(layout, keys), collect.cgroups_in(_as_keys(layout), each_value))
    for bound in bindings.bound.values():
        instance = loaded[bound.digest]
        for table in bound.tables.values():
            if (source := instance.source(table.output.map)) is not None:
                found.update(table.cgroups(_read(instance, source)[0]))
        for reader in bound.events.values():
            if (source := instance.source(reader.output.map)) is None:
                continue
            ring = bindings.ring(bound.digest, source)
            position = max(reader.settled.position, ring.consumer_position())
            while (records := ring.read(position, _RING_READ_BYTES)).end_position > position:
                records = records.first(max(1, 2 * _RING_READ_BYTES // max(reader.layout.value_bytes, 1)))
                data = _records(records, reader.layout.value_bytes)
                found.update(collect.cgroups_in(_as_keys(reader.layout), data))
                position = records.end_position
    return found


def _read(instance: Loaded, handle: MapHandle) -> tuple[collect.Bytes, collect.Bytes]:
    """Keys and values of a map; of an iterator its records, twice."""
    if handle.info.type == ITERATOR:
        records = iterating.records(instance, handle)
        return records, records
    return maps.read(handle.fd, handle.info)


def _as_keys(layout: Layout) -> Layout:
    """Of a value or a record, so that its cgroup is found as a key's is."""
    return Layout(layout.value, layout.value_bytes, (), 0)


def _uncounted(reader: collect.TableReader, handle: MapHandle, identities: Identities, now_ns: int) -> list[str]:
    words = []
    if unnamed := reader.unnamed(now_ns):
        words.append(f"counts of {unnamed} cgroups whose pod nobody has named: they are in no row")
    if handle.info.type in (MapType.LRU_HASH, MapType.LRU_PERCPU_HASH):
        words.append(f"{handle.name} is an LRU map: what it evicts is not counted")
    elif reader.rows.went:
        words.append(
            f"keys of {handle.name} went, or began anew ({reader.rows.went:,} times): counts between their last "
            "reading and that are missing"
        )
    if handle.info.type == MapType.TASK_STORAGE:
        words.append(f"{handle.name} is task storage: a task that ended took its entry with it")
        if not map_storage.thread_descriptors():
            words.append(f"{handle.name}: threads but the first of each process cannot be read before Linux 6.9")
    if reader.rows.overflowed:
        words.append(f"more than {samples.MAX_ROWS:,} rows: the rest is in one row (other)")
    if isinstance(reader.stacks, names.StackReader) and reader.stacks.collisions:
        words.append("stacks that collided in the stack trace map")
    if isinstance(reader.stacks, names.StackReader) and reader.stacks.ambiguous:
        words.append("stacks whose id is in more than one stack trace map")
    if identities.tracker.lost():
        words.append("cgroups that could not be remembered: pods that ended quickly may be missing")
    return words


def _records(records: Records, record_bytes: int) -> collect.Bytes:
    """The records of one reading as ``u1[n, record_bytes]``."""
    dtype = np.dtype({"names": ["b"], "formats": [(np.uint8, record_bytes)], "itemsize": record_bytes})
    array = records.array(dtype)
    found: collect.Bytes = array.view(np.uint8).reshape(len(array), record_bytes)
    return found


def _beginning(instance: Loaded, handle: MapHandle, reader: collect.TableReader) -> tuple[str, int]:
    """The epoch of a table, and since when it counts."""
    epoch = handle.epoch
    if handle.probe_map_uid:
        # It holds what others counted before this policy came. One that is not ours is no older than this boot.
        return epoch, handle.since_ns or clock.booted_ns()
    if reader.baseline is not None:
        # A policy that left and came again counts from nothing once more: another epoch.
        return f"{epoch}:{reader.baseline.since_ns:x}", reader.baseline.since_ns
    joined = instance.joined.get(reader.plan.policy_uid)
    if joined is None or (reader.output.map, reader.output.value) in joined.whole:
        return epoch, instance.since_ns
    return epoch, joined.since_ns


def _program_epoch(instance: Loaded, policy: PolicyUid) -> str:
    """Of what the instance's program counts itself, for a policy that may have come later."""
    lost, joined = instance.maps.get(LOST), instance.joined.get(policy)
    return f"{lost.epoch if lost else clock.boot_id()}{f':{joined.since_ns:x}' if joined else ''}"


def _gaps(loaded: Loaded, policy: PolicyUid, now_ns: int) -> list[stream_pb2.Gap]:
    return [stream_pb2.Gap(start_ns=start, end_ns=end, why=why) for start, end, why in loaded.gaps_of(policy, now_ns)]
