"""The agent without a network: pushes in, statuses and batches out.

``session`` wraps it for a cluster, ``probefleet run`` for one machine::

    apply(Push) ─▶ reconcile ─▶ execute ─▶ status()
    collect(now) ─▶ read maps and rings once ─▶ readers of each policy ─▶ Batch        acknowledge(sequence) ─▶ rings

Synchronous and single-threaded: whoever has an event loop calls it from one worker thread. It survives ``kill -9``
because what matters lies in the kernel: at ``open`` it adopts every pinned instance, its policies included, and
goes on reading.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog
import zstandard
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_agent import collect as reading
from probefleet_agent import costs, execute, names, reconcile, samples
from probefleet_agent.decode import DecodeError, Layout
from probefleet_agent.errors import ProbefleetError
from probefleet_agent.execute import Loaded, MapHandle
from probefleet_agent.kernel import clock, maps, mounts, pins, symbols
from probefleet_agent.kernel.rings import Records, RingReader
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.perf_ring import PerfRing
from probefleet_agent.pods import Answer, Book, CgroupId, PodUid, PolicyUid, Selected
from probefleet_agent.reconcile import Digest, MapUid
from probefleet_agent.tracker import Tracker

PROTOCOL = 1
VERSION = "0.1.0"
#: An object's bytes after unpacking; the largest catalog object has 60 KB.
MAX_BLOB_BYTES = 16 << 20
#: What nobody has asked for this long is taken away when an agent starts.
FORGOTTEN_NS = 3_600_000_000_000
#: How often manifests note that they were asked for.
REMEMBER_NS = 300_000_000_000
_RING_READ_BYTES = 4 << 20

log = structlog.get_logger("agent")


class StalePush(ProbefleetError):
    """A push that is not newer than the last: of an operator that was replaced, or sent twice."""

    reason = "StalePush"


@dataclass(slots=True)
class Failure:
    """Why an instance or a ProbeMap does not run."""

    reason: str
    message: str
    log_tail: str = ""


@dataclass(slots=True)
class Bound:
    """One policy with its readers."""

    plan: plan_pb2.Plan
    digest: Digest
    tables: dict[str, reading.TableReader] = field(default_factory=dict)
    events: dict[str, reading.EventReader] = field(default_factory=dict)
    committed: dict[str, int] = field(default_factory=dict)  # output → position acknowledged
    begins: dict[str, int] = field(default_factory=dict)  # output → position of the first record that is this policy's
    due_ns: int = 0
    failure: Failure | None = None  # its outputs cannot be read


class Engine:
    """One node's programs and what they measure."""

    def __init__(self, root: pins.Root, *, cgroup_root: str, node: str, stats: bool, files_root: str) -> None:
        self.node = node
        self._root = root
        self._executor = execute.Executor(root, files_root)
        self._tracker = Tracker(root)
        self._book = Book(root=cgroup_root)
        self._lookups = names.MachineLookups()
        self._symbolizer = symbols.Symbolizer()
        self._loaded: dict[Digest, Loaded] = {}
        self._maps: dict[MapUid, tuple[plan_pb2.ProbeMap, MapHandle]] = {}
        self._bound: dict[PolicyUid, Bound] = {}
        self._rings: dict[tuple[Digest, str], RingReader | PerfRing] = {}
        self._filters: dict[Digest, dict[CgroupId, Answer]] = {}
        self._failures: dict[Digest, Failure] = {}
        self._unadopted: set[Digest] = set()
        self._map_failures: dict[MapUid, Failure] = {}
        self._blobs: dict[str, bytes] = {}
        self._wanted: dict[PolicyUid, plan_pb2.Plan] = {}
        self._stream = samples.Stream()
        self._costs = costs.Costs(enabled=stats)
        # Of the last push, also an earlier process's: an operator that was replaced cannot come back.
        self._term, self._version = self._tracker.term, self._tracker.version
        self._remembered_ns = time.time_ns()
        self._scanned_ns = 0

    @classmethod
    def open(
        cls,
        *,
        bpffs: Path | None = None,
        cgroup_root: str = "/",
        node: str = "",
        stats: bool = True,
        files_root: str = "",
    ) -> Engine:
        """Start on this machine: mount what is missing, adopt what is pinned."""
        mounts.mount_tracefs()
        root = pins.root(bpffs or mounts.BPFFS)
        root.create()
        engine = cls(root, cgroup_root=cgroup_root, node=node or platform.node(), stats=stats, files_root=files_root)
        try:
            engine._adopt()
        except BaseException:
            engine.close()
            raise
        return engine

    def close(self) -> None:
        """Let go of descriptors; what is pinned goes on counting."""
        for ring in self._rings.values():
            ring.close()
        for loaded in self._loaded.values():
            loaded.close()
        for _, handle in self._maps.values():
            handle.fd.close()
        self._rings, self._loaded, self._maps = {}, {}, {}
        self._costs.close()
        self._tracker.close()

    def leave(self) -> bool:
        """Remove the agent's own memory too, where nothing runs and no map is held: an uninstallation leaves no pin.

        With programs pinned it stays, for it names the pods that they count while no agent is there.
        """
        if self._wanted or self._root.list_instances() or self._root.list_maps():
            return False
        self._root.purge()
        return True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What others ask -------------------------------------------------------------------------------------------------

    def hello(self) -> stream_pb2.Hello:
        """What this node is; and a new stream: every key is due again."""
        self._restart_stream()
        system = os.uname()
        return stream_pb2.Hello(
            protocol=PROTOCOL, node=self.node, boot_id=clock.boot_id(), agent_version=VERSION,
            kernel_release=system.release, machine=system.machine, cpus=len(maps.online_cpus()),
            kernel_build=system.version, applied_term=self._term, applied_version=self._version,
        )  # fmt: skip

    def apply(self, push: stream_pb2.Push) -> None:
        """Make the node what the push says. Raises StalePush for one that is older than the last; errors of single
        policies are not raised but stand in ``status``.
        """
        if (push.term, push.version) <= (self._term, self._version):
            raise StalePush(f"push {push.term}.{push.version} is not newer than {self._term}.{self._version}")
        for blob in push.blobs:
            data = zstandard.ZstdDecompressor().decompress(blob.zstd, max_output_size=MAX_BLOB_BYTES)
            self._blobs[blob.sha256] = data
        self._term, self._version = push.term, push.version
        self._learn(scan=not self._scanned_ns)
        self._book.select(
            {
                PolicyUid(each.policy_uid): Selected(each.everything, frozenset(PodUid(uid) for uid in each.pod_uids))
                for each in push.selections
            },
            [PodUid(uid) for uid in push.known_pod_uids],
        )
        wanted = {PolicyUid(plan.policy_uid): plan for plan in push.plans}
        # What has changed since the last push may be tried again.
        changed = {
            Digest(plan.instance.digest)
            for uid, plan in wanted.items()
            if plan.HasField("instance") and not _same(plan, self._wanted.get(uid))
        }
        self._failures = {digest: why for digest, why in self._failures.items() if digest not in changed}
        specs = {MapUid(spec.uid): spec for spec in push.probe_maps}
        self._map_failures = {uid: why for uid, why in self._map_failures.items() if uid in specs and not changed}
        self._wanted = wanted
        self._drop_unadopted()
        self._reconcile(specs)
        self._fill_filters()
        self._forget_blobs(specs.values())
        self._tracker.note_push(push.term, push.version)

    def status(self) -> stream_pb2.Status:
        """What runs, and why the rest does not."""
        status = stream_pb2.Status(term=self._term, version=self._version)
        for uid, plan in sorted(self._wanted.items()):
            status.policies.append(self._policy_status(uid, plan))
        for map_uid, (_, handle) in sorted(self._maps.items()):
            users = [p for p, bound in self._bound.items() if map_uid in self._map_uids(self._loaded[bound.digest])]
            status.probe_maps.append(
                stream_pb2.MapStatus(
                    uid=map_uid,
                    kernel_map_id=handle.info.id,
                    bytes=maps.memory_used_bytes(handle.fd),
                    users=sorted(users),
                )
            )
        for map_uid, failure in sorted(self._map_failures.items()):
            status.probe_maps.append(stream_pb2.MapStatus(uid=map_uid, reason=failure.reason, message=failure.message))
        return status

    def collect(self, now_ns: int, *, force: bool = False) -> stream_pb2.Batch | None:
        """What is due, as the next batch; ``None`` where nothing is, or too much is unacknowledged."""
        if not force and not self._stream.open:
            return None
        batch = stream_pb2.Batch(time_ns=now_ns)
        due = [uid for uid, bound in self._bound.items() if force or now_ns >= bound.due_ns]
        self._lookups.refresh()
        if due:
            self._learn(scan=False)
            self._tracker.beat(now_ns)
        detached = self._costs.tick(now_ns, self._loaded, self._budgets(), force=force)
        for digest in detached:
            self._detach(digest)
        commits = self._collect_events(batch, now_ns)
        self._collect_tables(batch, due, now_ns)
        if due:
            self._fill_filters()
        for uid in due:
            bound = self._bound[uid]
            interval_ns = max(bound.plan.interval_ms, 100) * 1_000_000
            # Aligned to whole intervals: the nodes' windows lie over each other.
            bound.due_ns = (now_ns // interval_ns + 1) * interval_ns
        for digest in {self._bound[uid].digest for uid in due}:
            users = [uid for uid, bound in self._bound.items() if bound.digest == digest]
            batch.instances.append(self._costs.stat(self._loaded[digest], users))
        if now_ns - self._remembered_ns > REMEMBER_NS:
            self._remember(now_ns)
        if not (batch.tables or batch.events or batch.instances):
            return None
        usage = resource.getrusage(resource.RUSAGE_SELF)
        batch.agent_cpu_ns = int((usage.ru_utime + usage.ru_stime) * 1e9)
        batch.agent_rss_bytes = _resident_bytes()
        batch.sequence = self._stream.number(commits)
        return batch

    def acknowledge(self, sequence: int) -> None:
        """The operator has merged all batches up to this one: their records' room goes back to the kernel."""
        for (uid, output), position in self._stream.acknowledge(sequence).items():
            bound = self._bound.get(uid)
            if bound is not None and output in bound.events:
                bound.committed[output] = max(bound.committed.get(output, 0), position)
        for (digest, name), ring in self._rings.items():
            positions = [
                bound.committed.get(output, ring.consumer_position())
                for bound in self._bound.values()
                for output, reader in bound.events.items()
                if bound.digest == digest and reader.output.map == name
            ]
            if positions and min(positions) > ring.consumer_position():
                ring.commit(min(positions))

    @property
    def detached(self) -> frozenset[str]:
        """Digests of instances that went over their budget."""
        return frozenset(digest for digest, loaded in self._loaded.items() if loaded.detached)

    def remove_everything(self) -> None:
        """Take every instance, map and pin of this tree away."""
        for digest in list(self._loaded):
            self._remove(digest)
        for uid in list(self._maps):
            self._remove_map(uid)
        self._bound, self._wanted = {}, {}
        self._root.purge()

    # Reconcile -------------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        now_ns = time.time_ns()
        for uid in self._root.list_maps():
            spec, handle = self._executor.adopt_map(uid)
            self._maps[MapUid(uid)] = (spec, handle)
        for name in self._root.list_instances():
            digest = Digest(name)
            try:
                loaded = self._executor.adopt(name, stopped_ns=self._tracker.stopped_ns or now_ns)
            except ProbefleetError as error:
                # It may count on: only a push takes it away, or loads it anew.
                log.warning("an instance cannot be adopted; it is left as it is", digest=name, error=str(error))
                self._unadopted.add(digest)
                continue
            self._loaded[digest] = loaded
            if now_ns - loaded.asked_ns > FORGOTTEN_NS:
                log.warning("no operator has asked for this instance in an hour: removed", digest=name)
                self._remove(digest)
                continue
            for uid, plan in loaded.plans.items():
                self._bind(PolicyUid(uid), plan, digest)
                self._wanted[PolicyUid(uid)] = plan
            log.info("adopted", digest=name, title=loaded.instance.title, policies=len(loaded.plans))
        self._learn(scan=True)

    def _reconcile(self, specs: dict[MapUid, plan_pb2.ProbeMap]) -> None:
        desired = reconcile.Desired(
            {
                uid: reconcile.Wanted(
                    Digest(plan.instance.digest) if plan.HasField("instance") else None,
                    frozenset(MapUid(each.probe_map_uid) for each in plan.instance.shared_maps),
                )
                for uid, plan in self._wanted.items()
            },
            frozenset(specs),
        )
        while actions := reconcile.reconcile(desired, self._observed()):
            for action in actions:
                match action:
                    case reconcile.MakeMap(uid):
                        self._make_map(specs[uid])
                    case reconcile.Load(digest):
                        self._load(digest)
                    case reconcile.Bind(policy, digest):
                        self._bind(policy, self._wanted[policy], digest)
                    case reconcile.Unbind(policy):
                        self._unbind(policy)
                    case reconcile.Remove(digest):
                        self._remove(digest)
                    case reconcile.RemoveMap(uid):
                        self._remove_map(uid)
        for policy, plan in self._wanted.items():
            bound = self._bound.get(policy)
            if bound and plan.instance.digest == bound.digest and not _same(plan, bound.plan):
                self._bind(policy, plan, bound.digest)

    def _observed(self) -> reconcile.Observed:
        return reconcile.Observed(
            instances={digest: self._map_uids(loaded) for digest, loaded in self._loaded.items()},
            bindings={uid: bound.digest for uid, bound in self._bound.items()},
            maps=frozenset(self._maps),
            failed=frozenset(self._failures),
            failed_maps=frozenset(self._map_failures),
        )

    @staticmethod
    def _map_uids(loaded: Loaded) -> frozenset[MapUid]:
        return frozenset(MapUid(each.probe_map_uid) for each in loaded.instance.shared_maps)

    def _load(self, digest: Digest) -> None:
        plans = [plan for plan in self._wanted.values() if plan.instance.digest == digest]
        instance = plans[0].instance
        started_ns = time.monotonic_ns()
        try:
            self._require_maps(instance)
            loaded = self._executor.load(
                instance,
                blob=self._blobs.get(instance.object.sha256),
                probe_maps={uid: handle for uid, (_, handle) in self._maps.items()},
                budget_bytes=min((p.budget.map_memory_bytes for p in plans if p.budget.map_memory_bytes), default=0),
                filter_on=self._book.root != "/" or not all(self._everything(plan) for plan in plans),
            )
        except (ProbefleetError, ValueError, KeyError, OSError) as error:
            self._failures[digest] = _failure(error)
            log.warning("cannot run", digest=digest, title=instance.title, reason=self._failures[digest].reason)
            return
        self._loaded[digest] = loaded
        took_ms = (time.monotonic_ns() - started_ns) // 1_000_000
        log.info("loaded", digest=digest, title=instance.title, ways=loaded.ways, took_ms=took_ms)

    def _drop_unadopted(self) -> None:
        """What could not be adopted is wanted anew or not at all: unless the push keeps what it cannot name."""
        if all(plan.HasField("instance") for plan in self._wanted.values()):
            for digest in self._unadopted:
                self._root.remove(digest)
            self._unadopted.clear()

    def _require_maps(self, instance: plan_pb2.Instance) -> None:
        missing = {MapUid(each.probe_map_uid) for each in instance.shared_maps} - set(self._maps)
        if missing:
            why = "; ".join(self._map_failures[uid].message for uid in missing if uid in self._map_failures)
            raise ProbefleetError(f"{instance.title}: a shared map could not be made: {why or sorted(missing)}")

    def _everything(self, plan: plan_pb2.Plan) -> bool:
        selected = self._book.selections.get(PolicyUid(plan.policy_uid))
        return selected is not None and selected.everything

    def _bind(self, uid: PolicyUid, plan: plan_pb2.Plan, digest: Digest) -> None:
        loaded = self._loaded[digest]
        before = self._bound.get(uid)
        if before and before.digest != digest and uid in self._loaded[before.digest].plans:
            del self._loaded[before.digest].plans[uid]
        bound = Bound(plan, digest)
        try:
            for output in plan.outputs:
                self._add_reader(bound, output, loaded, before)
        except (DecodeError, ProbefleetError) as error:
            bound.failure = _failure(error)
        self._bound[uid] = bound
        self._remember_plan(loaded, uid, plan)

    def _add_reader(self, bound: Bound, output: plan_pb2.Output, loaded: Loaded, before: Bound | None) -> None:
        handle = loaded.maps.get(output.map)
        if handle is None:
            raise DecodeError(
                f"output {output.name}: no map {output.map!r}; there is: {', '.join(sorted(loaded.maps))}"
            )
        if handle.layout is None:
            raise DecodeError(f"output {output.name}: nothing describes the entries of map {output.map}")
        if reading.wants_events(output):
            ring = self._ring(bound.digest, handle)
            earlier = before.events.get(output.name) if before and before.digest == bound.digest else None
            bound.begins[output.name] = begins = self._begins(bound, output.name, loaded, before, ring)
            cursor = earlier.cursor if earlier else max(begins, ring.consumer_position())
            bound.events[output.name] = reading.EventReader(
                bound.plan, output, handle.layout, self._book, self._lookups, cursor
            )
            return
        stacks = None
        if output.kind == plan_pb2.Output.STACKS:
            traces = [each for each in loaded.maps.values() if each.info.type == MapType.STACK_TRACE]
            stacks = names.StackReader(traces[0].fd, self._symbolizer, self._lookups) if traces else None
        bound.tables[output.name] = reading.TableReader(
            bound.plan, output, handle.layout, self._book, self._lookups, stacks
        )

    def _ring(self, digest: Digest, handle: MapHandle) -> RingReader | PerfRing:
        key = (digest, handle.name)
        if key not in self._rings:
            perf = handle.info.type == MapType.PERF_EVENT_ARRAY
            self._rings[key] = PerfRing(handle.fd) if perf else RingReader(handle.fd)
        return self._rings[key]

    def _begins(
        self, bound: Bound, output: str, loaded: Loaded, before: Bound | None, ring: RingReader | PerfRing
    ) -> int:
        """From where on records are this policy's: what a ring in use held before the policy came is not."""
        if before and before.digest == bound.digest and output in before.begins:
            return before.begins[output]
        came_later = bound.plan.policy_uid not in loaded.plans and loaded.plans
        return ring.producer_position() if came_later else 0

    def _unbind(self, uid: PolicyUid) -> None:
        bound = self._bound.pop(uid)
        loaded = self._loaded.get(bound.digest)
        if loaded and uid in loaded.plans:
            del loaded.plans[uid]
            self._executor.remember(loaded)

    def _remove(self, digest: Digest) -> None:
        for key in [key for key in self._rings if key[0] == digest]:
            self._rings.pop(key).close()
        loaded = self._loaded.pop(digest)
        self._filters.pop(digest, None)
        self._costs.forget(digest)
        self._executor.remove(loaded)
        log.info("removed", digest=digest, title=loaded.instance.title)

    def _make_map(self, spec: plan_pb2.ProbeMap) -> None:
        uid = MapUid(spec.uid)
        blob = self._blobs.get(spec.sha256)
        if blob is None:
            what = (
                f"ProbeMap {spec.namespace}/{spec.name}: its definition {spec.sha256[:12]} did not come with the push"
            )
            self._map_failures[uid] = Failure("BadObject", what)
            return
        try:
            self._maps[uid] = (spec, self._executor.make_map(spec, blob))
        except (ProbefleetError, OSError) as error:
            self._map_failures[uid] = _failure(error)

    def _remove_map(self, uid: MapUid) -> None:
        _, handle = self._maps.pop(uid)
        self._root.remove_map(uid)
        handle.fd.close()

    def _detach(self, digest: Digest) -> None:
        self._executor.detach(self._loaded[digest])
        log.warning("over its budget: detached", digest=digest)

    def _budgets(self) -> dict[Digest, int]:
        """CPU budget of each instance in millicores: the largest of its policies', 0 where one has none."""
        budgets: dict[Digest, int] = {}
        for bound in self._bound.values():
            asked = bound.plan.budget.cpu_millicores
            known = budgets.get(bound.digest)
            budgets[bound.digest] = asked if known is None else 0 if 0 in (known, asked) else max(known, asked)
        return budgets

    # Reading ---------------------------------------------------------------------------------------------------------

    def _collect_tables(self, batch: stream_pb2.Batch, due: Iterable[PolicyUid], now_ns: int) -> None:
        readings: dict[tuple[Digest, str], tuple[reading.Bytes, reading.Bytes]] = {}
        for uid in due:
            bound = self._bound[uid]
            loaded = self._loaded[bound.digest]
            counts = loaded.lost()
            for name, reader in bound.tables.items():
                handle = loaded.maps[reader.output.map]
                key = (bound.digest, handle.name)
                if key not in readings:
                    readings[key] = maps.read(handle.fd, handle.info)
                    self._know(reading.cgroups_in(reader.layout, readings[key][0]), now_ns)
                try:
                    reader.read(*readings[key])
                except (DecodeError, ProbefleetError) as error:
                    bound.failure = _failure(error)
                    continue
                table = reader.rows.table() or stream_pb2.Table(
                    rows=columns.pack(np.zeros(0, np.uint32)),
                    values=columns.pack(np.zeros(0, np.uint64)),
                    width=reader.rows.width,
                )
                table.policy_uid, table.output, table.generation = uid, name, bound.plan.generation
                table.epoch = f"{clock.boot_id()}:{handle.info.id}"
                table.since_ns, table.lost = loaded.since_ns, counts[0] + counts[3]
                table.uncounted.extend(self._uncounted(reader, handle))
                table.gaps.extend(_gaps(loaded))
                batch.tables.append(table)

    def _uncounted(self, reader: reading.TableReader, handle: MapHandle) -> list[str]:
        words = []
        if handle.info.type in (MapType.LRU_HASH, MapType.LRU_PERCPU_HASH):
            words.append(f"{handle.name} is an LRU map: what it evicts is not counted")
        if reader.rows.overflowed:
            words.append(f"more than {samples.MAX_ROWS:,} rows: the rest is in one row (other)")
        if isinstance(reader.stacks, names.StackReader) and reader.stacks.collisions:
            words.append("stacks that collided in the stack trace map")
        if self._tracker.lost():
            words.append("cgroups that could not be remembered: pods that ended quickly may be missing")
        return words

    def _collect_events(self, batch: stream_pb2.Batch, now_ns: int) -> list[samples.Commit]:
        commits: list[samples.Commit] = []
        for uid, bound in self._bound.items():
            for name, reader in bound.events.items():
                loaded = self._loaded[bound.digest]
                handle = loaded.maps[reader.output.map]
                ring = self._ring(bound.digest, handle)
                records = ring.read(reader.cursor, _RING_READ_BYTES)
                if not len(records) and records.end_position == reader.cursor:
                    continue
                data = _records(records, reader.layout.value_bytes)
                self._know_records(reader, data, now_ns)
                began = reader.cursor
                try:
                    chunk = reader.chunk(data, records.positions, records.end_position, now_ns)
                except DecodeError as error:
                    bound.failure = _failure(error)
                    continue
                if chunk is None:
                    continue
                counts = loaded.lost()
                chunk.policy_uid, chunk.output, chunk.generation = uid, name, bound.plan.generation
                chunk.epoch = f"{clock.boot_id()}:{handle.info.id}"
                chunk.since_ns, chunk.submitted, chunk.lost = loaded.since_ns, counts[2], counts[1] + counts[3]
                if isinstance(ring, PerfRing):
                    chunk.epoch += ring.incarnation
                    chunk.lost += ring.lost
                    chunk.dropped += ring.dropped
                chunk.gaps.extend(_gaps(loaded))
                chunk.start_position = began
                batch.events.append(chunk)
                commits.append(((uid, name), reader.cursor))
        return commits

    def _know_records(self, reader: reading.EventReader, data: reading.Bytes, now_ns: int) -> None:
        layout = reader.layout
        as_keys = Layout(layout.value, layout.value_bytes, (), 0)
        self._know(reading.cgroups_in(as_keys, data), now_ns)

    def _know(self, cgroup_ids: Iterable[int], now_ns: int) -> None:
        """Look again for cgroups that nobody has heard of: they came since the last look."""
        if all(cgroup in self._book.identities for cgroup in cgroup_ids):
            return
        self._learn(scan=False)
        if any(cgroup not in self._book.identities for cgroup in cgroup_ids) and now_ns - self._scanned_ns > 1e9:
            self._learn(scan=True)

    def _learn(self, *, scan: bool) -> None:
        if scan:
            self._book.learn(self._tracker.scan())
            self._scanned_ns = time.time_ns()
        self._book.learn(self._tracker.paths())

    def _fill_filters(self) -> None:
        """Tell programs which cgroups are refused: only cost depends on it (see pods)."""
        for digest, loaded in self._loaded.items():
            handle = loaded.maps.get(execute.FILTER)
            if handle is None:
                continue
            policies = [uid for uid, bound in self._bound.items() if bound.digest == digest]
            written = self._filters.setdefault(digest, {})
            fresh = {}
            for cgroup in self._book.identities:
                answer = self._book.joint_answer(policies, cgroup)
                if answer != written.get(cgroup, Answer.UNKNOWN):
                    fresh[cgroup] = answer
            room = handle.info.max_entries - len(written)
            for cgroup, answer in list(fresh.items())[: max(room, 0)]:
                written[cgroup] = answer
            known = [cgroup for cgroup in fresh if cgroup in written]
            if known:
                keys = np.array(known, np.uint64).view(np.uint8).reshape(-1, 8)
                values = np.array([written[cgroup] for cgroup in known], np.uint8).reshape(-1, 1)
                maps.update_many(handle.fd, keys, values)

    # Housekeeping ----------------------------------------------------------------------------------------------------

    def _restart_stream(self) -> None:
        self._stream = samples.Stream()
        for bound in self._bound.values():
            bound.due_ns = 0
            bound.committed.clear()
            for reader in bound.tables.values():
                reader.rows.restart_stream()
            for name, events in bound.events.items():
                ring = self._ring(bound.digest, self._loaded[bound.digest].maps[events.output.map])
                events.cursor = max(bound.begins.get(name, 0), ring.consumer_position())

    def _remember_plan(self, loaded: Loaded, uid: PolicyUid, plan: plan_pb2.Plan) -> None:
        if _same(plan, loaded.plans.get(uid)):
            return
        loaded.plans[uid] = plan
        loaded.asked_ns = time.time_ns()
        self._executor.remember(loaded)

    def _remember(self, now_ns: int) -> None:
        self._remembered_ns = now_ns
        for loaded in self._loaded.values():
            loaded.asked_ns = now_ns
            self._executor.remember(loaded)

    def _forget_blobs(self, specs: Iterable[plan_pb2.ProbeMap]) -> None:
        """Objects are needed again only to load: keep those of the newest push, as the operator reckons with."""
        needed = {plan.instance.object.sha256 for plan in self._wanted.values()}
        needed |= {spec.sha256 for spec in specs}
        self._blobs = {digest: data for digest, data in self._blobs.items() if digest in needed}

    def _policy_status(self, uid: PolicyUid, plan: plan_pb2.Plan) -> stream_pb2.PolicyStatus:
        bound = self._bound.get(uid)
        status = stream_pb2.PolicyStatus(
            policy_uid=uid, generation=plan.generation, state=stream_pb2.PolicyStatus.PENDING
        )
        if bound is not None:
            loaded = self._loaded[bound.digest]
            status.digest = bound.digest
            status.ways.extend(loaded.ways)
            status.verified_instructions = loaded.verified_instructions()
            if not plan.HasField("instance"):
                status.generation = bound.plan.generation
        failure = self._failures.get(Digest(plan.instance.digest)) or (bound.failure if bound else None)
        if failure is not None:
            status.state = stream_pb2.PolicyStatus.FAILED
            status.reason, status.message, status.log_tail = failure.reason, failure.message, failure.log_tail
        elif bound is not None and self._loaded[bound.digest].detached:
            status.state = stream_pb2.PolicyStatus.DETACHED
            status.reason, status.message = "OverBudget", self._loaded[bound.digest].detached
        elif bound is not None:
            status.state = stream_pb2.PolicyStatus.READY
        return status


def _records(records: Records, record_bytes: int) -> reading.Bytes:
    """The records of one reading as ``u1[n, record_bytes]``."""
    dtype = np.dtype({"names": ["b"], "formats": [(np.uint8, record_bytes)], "itemsize": record_bytes})
    array = records.array(dtype)
    found: reading.Bytes = array.view(np.uint8).reshape(len(array), record_bytes)
    return found


def _gaps(loaded: Loaded) -> list[stream_pb2.Gap]:
    return [stream_pb2.Gap(start_ns=start, end_ns=end, why=why) for start, end, why in loaded.gaps]


def _same(one: plan_pb2.Plan, other: plan_pb2.Plan | None) -> bool:
    return other is not None and one.SerializeToString(deterministic=True) == other.SerializeToString(
        deterministic=True
    )


def _failure(error: Exception) -> Failure:
    reason = error.reason if isinstance(error, ProbefleetError) else "BadOutput"
    tail = getattr(error, "tail", "")
    return Failure(reason, str(error), tail if isinstance(tail, str) else "")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
