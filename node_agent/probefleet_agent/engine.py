"""The agent without a network: pushes in, statuses and batches out.

``session`` wraps it for a cluster, ``probefleet run`` for one machine::

    apply(Push) ─▶ reconcile ─▶ installed, bindings ─▶ status()
    collect(now) ─▶ batches: read maps and rings once ─▶ each policy's readers ─▶ Batch     acknowledge(number) ─▶ rings

Synchronous and single-threaded: whoever has an event loop calls it from one worker thread. It survives ``kill -9``
because what matters lies in the kernel: at ``open`` it adopts every pinned instance, its policies included, and
goes on reading.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Set
from pathlib import Path

from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_agent import batches, costs, endpoints, iterating, joining, reconcile, samples
from probefleet_agent.bindings import Bindings
from probefleet_agent.errors import ProbefleetError, SlotTaken
from probefleet_agent.identities import Identities
from probefleet_agent.installed import Installed, map_uids
from probefleet_agent.kernel import clock, links_network, maps, mounts, pins
from probefleet_agent.marks import Marks
from probefleet_agent.pods import PolicyUid
from probefleet_agent.reconcile import Digest, MapUid
from probefleet_agent.tracker import Tracker

PROTOCOL = 1
VERSION = "0.1.0"
#: How often manifests note that they were asked for.
REMEMBER_NS = 300_000_000_000


#: How often it is looked whether interfaces and pods came or went, where programs are attached to them.
FOLLOW_EVERY_NS = 1_000_000_000


class StalePush(ProbefleetError):
    """A push that is not newer than the last: of an operator that was replaced, or sent twice."""

    reason = "StalePush"


class Engine:
    """One node's programs and what they measure."""

    def __init__(self, root: pins.Root, *, cgroup_root: str, node: str, stats: bool, files_root: str) -> None:
        self.node = node
        self._root = root
        self._files_root = files_root
        self._followed_ns = 0
        self._tracker = Tracker(root)  # first: where it begins anew, it takes away what the tree has of the agent's own
        self._installed = Installed(root, files_root, cgroup_root)
        self._identities = Identities(self._tracker, cgroup_root=cgroup_root)
        self._marks = Marks(root)
        self._bindings = Bindings(self._identities.book, self._marks)
        self._wanted: dict[PolicyUid, plan_pb2.Plan] = {}
        self._endpoints = endpoints.Endpoints()
        self._specs: dict[MapUid, plan_pb2.ProbeMap] = {}
        self._settled = 0
        self._stream = samples.Stream()
        self._costs = costs.Costs(enabled=stats)
        # Of the last push, also an earlier process's: an operator that was replaced cannot come back.
        self._term, self._version = self._tracker.term, self._tracker.version
        self._remembered_ns = time.time_ns()
        self._fresh: set[Digest] = set()  # loaded while this push is carried out
        #: More records wait in a ring than the last ``collect`` could take: it is to be called again at once.
        self.behind = False

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
        self._bindings.close()
        self._installed.close()
        self._costs.close()
        self._marks.close()
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
        self._stream = samples.Stream()
        self._bindings.restart_stream()
        self._identities.book.restart_stream()
        system = os.uname()
        return stream_pb2.Hello(
            protocol=PROTOCOL, node=self.node, boot_id=clock.boot_id(), agent_version=VERSION,
            kernel_release=system.release, machine=system.machine, cpus=len(maps.online_cpus()),
            kernel_build=system.version, applied_term=self._term, applied_version=self._version,
        )  # fmt: skip

    def apply(self, push: stream_pb2.Push, *, wait: bool = True) -> None:
        """Make the node what the push says. Raises StalePush for one that is older than the last; errors of single
        policies are not raised but stand in ``status``.

        Without ``wait`` processes (bpftrace's) go on beginning when it returns; ``collect`` looks after them.
        """
        if (push.term, push.version) <= (self._term, self._version):
            raise StalePush(f"push {push.term}.{push.version} is not newer than {self._term}.{self._version}")
        if push.HasField("endpoints"):
            self._endpoints.hear(push.endpoints)
        self._installed.keep_blobs(push.blobs)
        self._term, self._version = push.term, push.version
        self._identities.select(push)
        wanted = {PolicyUid(plan.policy_uid): plan for plan in push.plans}
        specs = {MapUid(spec.uid): spec for spec in push.probe_maps}
        # What has changed since the last push may be tried again.
        changed = {
            Digest(plan.instance.digest)
            for uid, plan in wanted.items()
            if plan.HasField("instance") and not _same(plan, self._wanted.get(uid))
        }
        changed_maps = {uid for uid, spec in specs.items() if uid in self._specs and self._specs[uid] != spec}
        self._installed.try_again(changed, frozenset(specs), changed_maps)
        self._wanted, self._specs = wanted, specs
        if all(plan.HasField("instance") for plan in wanted.values()):
            self._installed.drop_unadopted()
            self._installed.forget_attempts({Digest(plan.instance.digest) for plan in wanted.values()})
            self._bindings.forget_strangers()
        self._reconcile()
        while wait and self._installed.starting:
            self._installed.wait()
            self._look()
        self._fill_filters()
        self._endpoints.write(self._installed.shared(MapUid(endpoints.UID)))
        self._follow(time.time_ns())
        self._installed.forget_blobs(
            {plan.instance.object.sha256 for plan in wanted.values()} | {spec.sha256 for spec in specs.values()}
        )
        self._tracker.note_push(push.term, push.version)

    def status(self) -> stream_pb2.Status:
        """What runs, and why the rest does not."""
        status = stream_pb2.Status(term=self._term, version=self._version)
        for uid, plan in sorted(self._wanted.items()):
            status.policies.append(self._policy_status(uid, plan))
        for map_uid, (_, handle) in sorted(self._installed.maps.items()):
            users = [
                uid
                for uid, bound in self._bindings.bound.items()
                if map_uid in map_uids(self._installed.loaded[bound.digest].instance)
            ]
            status.probe_maps.append(
                stream_pb2.MapStatus(
                    uid=map_uid,
                    kernel_map_id=handle.info.id,
                    bytes=maps.memory_with_inner_bytes(handle.fd),
                    users=sorted(users),
                    max_entries=handle.info.max_entries,
                )
            )
            if failure := self._installed.map_failures.get(map_uid):
                status.probe_maps[-1].reason, status.probe_maps[-1].message = failure.reason, failure.message
        for map_uid in sorted(self._installed.map_failures.keys() - self._installed.maps.keys()):
            failure = self._installed.map_failures[map_uid]
            status.probe_maps.append(stream_pb2.MapStatus(uid=map_uid, reason=failure.reason, message=failure.message))
        return status

    def collect(self, now_ns: int, *, force: bool = False, complete: bool = True) -> stream_pb2.Batch | None:
        """What is due, as the next batch; ``None`` where nothing is, or too much is unacknowledged.

        With ``force`` everything is due, and processes (bpftrace's) are waited for until they have said all that they
        count; without ``complete`` it is what they have said by now.
        """
        self.behind = False
        self._look()
        if not force and not self._stream.open:
            return None
        batch = stream_pb2.Batch(time_ns=now_ns)
        bound, loaded = self._bindings.bound, self._installed.loaded
        running = [each.running for each in loaded.values() if each.running is not None]
        for process in running if force and complete else []:
            process.ask()  # all at once: each takes a second or two
        for process in running:
            process.pump(complete=force and complete)
        for each in loaded.values():
            if each.running is not None and each.running.ended and not each.ended_ns:
                each.ended_ns = now_ns
        # Long before it is due: the clock was set back.
        due = [
            uid for uid, each in bound.items()
            if force or not each.due_ns - _interval_ns(each.plan) <= now_ns < each.due_ns
        ]  # fmt: skip
        self._bindings.lookups.refresh()
        if abs(now_ns - self._followed_ns) > FOLLOW_EVERY_NS:
            self._follow(now_ns)
        if due:
            self._identities.learn(scan=False)
            self._tracker.beat(now_ns)
        for digest in self._costs.tick(now_ns, loaded, self._bindings.budgets(), force=force):
            self._installed.detach(digest)
        for digest in {bound[uid].digest for uid in due}:
            batches.look_for_room(loaded[digest], self._bindings.maps_read(digest))
            if loaded[digest].runs_each_interval:
                iterating.run(loaded[digest], self._files_root)
                self._bindings.feed(loaded[digest])
        for each in loaded.values():
            each.notes = self._endpoints.sentences() if MapUid(endpoints.UID) in map_uids(each.instance) else []
        missed = {digest: dict(each.missed) for digest, each in loaded.items()}
        commits, self.behind = batches.add_events(
            batch, due, now_ns, force=force, loaded=loaded, bindings=self._bindings, identities=self._identities
        )
        batches.add_tables(batch, due, now_ns, loaded=loaded, bindings=self._bindings, identities=self._identities)
        for digest, each in loaded.items():
            if each.missed != missed[digest]:
                self._installed.remember(each)
        if due:
            self._identities.forget_gone(now_ns, lambda: batches.cgroups_in_use(loaded, self._bindings))
            self._fill_filters()
        for uid in due:
            interval_ns = _interval_ns(bound[uid].plan)
            # Aligned to whole intervals: the nodes' windows lie over each other.
            bound[uid].due_ns = (now_ns // interval_ns + 1) * interval_ns
        for digest in {bound[uid].digest for uid in due} | self._costs.take_fresh():
            batch.instances.append(self._costs.stat(loaded[digest], self._bindings.users(digest)))
        if abs(now_ns - self._remembered_ns) > REMEMBER_NS:
            self._remember(now_ns)
        if not (batch.tables or batch.events or batch.instances):
            return None
        usage = resource.getrusage(resource.RUSAGE_SELF)
        batch.agent_cpu_ns = int((usage.ru_utime + usage.ru_stime) * 1e9)
        batch.agent_rss_bytes = _resident_bytes()
        batch.compile_hits, batch.compile_misses = self._installed.compiled.hits, self._installed.compiled.misses
        batch.sequence = self._stream.number(commits)
        return batch

    def acknowledge(self, sequence: int) -> None:
        """The operator has merged all batches up to this one: their records' room goes back to the kernel."""
        self._bindings.acknowledge(self._stream.acknowledge(sequence))

    def ends_a_process(self, push: stream_pb2.Push) -> bool:
        """Whether a process runs (bpftrace's) that the push leaves out: what it counted last is still to be read."""
        staying = {plan.instance.digest for plan in push.plans if plan.HasField("instance")}
        kept = {PolicyUid(plan.policy_uid) for plan in push.plans if not plan.HasField("instance")}
        staying |= {bound.digest for uid, bound in self._bindings.bound.items() if uid in kept}
        return any(each.running is not None for digest, each in self._installed.loaded.items() if digest not in staying)

    @property
    def turns(self) -> tuple[int, frozenset[str]]:
        """Another value when a status has something new to say: what began by now, what went over its budget or ended
        by itself, and what cannot be read.
        """
        gone = (
            digest
            for digest, loaded in self._installed.loaded.items()
            if loaded.detached or (loaded.running is not None and loaded.running.ended)
        )
        unread = (uid for uid, bound in self._bindings.bound.items() if bound.unread)
        return self._settled, frozenset((*gone, *unread))

    def remove_everything(self) -> None:
        """Take every instance, map and pin of this tree away."""
        for digest in list(self._installed.loaded):
            self._remove(digest)
        for uid in list(self._installed.maps):
            self._installed.remove_map(uid)
        self._bindings.bound.clear()
        self._wanted = {}
        self._root.purge()

    def _adopt(self) -> None:
        self._installed.adopt(stopped_ns=self._tracker.stopped_ns or time.time_ns())
        links_network.sweep(self._root.path, self._files_root, but=list(self._installed.loaded))
        for digest, loaded in self._installed.loaded.items():
            for name, plan in loaded.plans.items():
                self._bind(PolicyUid(name), plan, digest)
                self._wanted[PolicyUid(name)] = plan
        self._identities.learn(scan=True)

    def _look(self) -> None:
        """What began by now is bound, and what it replaces goes."""
        if settled := self._installed.look():
            self._settled += len(settled)
            self._reconcile(fresh=settled)

    def _reconcile(self, fresh: Set[Digest] = frozenset()) -> None:
        desired = reconcile.Desired(
            {
                uid: reconcile.Wanted(
                    Digest(plan.instance.digest) if plan.HasField("instance") else None, map_uids(plan.instance)
                )
                for uid, plan in self._wanted.items()
            },
            frozenset(self._specs),
        )
        self._fresh = {*fresh}
        while actions := reconcile.reconcile(desired, self._observed()):
            for action in actions:
                match action:
                    case reconcile.MakeMap(uid):
                        self._installed.make_map(self._specs[uid])
                    case reconcile.GrowMap(uid):
                        for digest in self._installed.grow_map(self._specs[uid]):
                            self._costs.begin_anew(digest)
                    case reconcile.Load(digest):
                        plans = {uid: plan for uid, plan in self._wanted.items() if plan.instance.digest == digest}
                        if (instance := next(iter(plans.values())).instance).WhichOneof("program") == "bpftrace":
                            self._installed.begin(instance)
                            continue
                        filter_on = self._identities.needs_filter(list(plans))
                        self._installed.load(list(plans.values()), filter_on=filter_on)
                        self._fresh.add(digest)
                    case reconcile.Bind(policy, digest):
                        self._bind(policy, self._wanted[policy], digest)
                    case reconcile.Unbind(policy):
                        self._unbind(policy)
                    case reconcile.Remove(digest):
                        self._remove(digest)
                    case reconcile.RemoveMap(uid):
                        self._installed.remove_map(uid)
        failed = set(self._installed.failures)
        for policy, plan in self._wanted.items():
            bound = self._bindings.bound.get(policy)
            if bound is None or plan.instance.digest != bound.digest:
                continue
            waits = bound.failure is not None and bound.failure.reason == SlotTaken.reason
            if waits or not _same(plan, bound.plan):
                self._bind(policy, plan, bound.digest)
        if failed - set(self._installed.failures):
            self._reconcile(self._fresh)  # an edit has left a slot that another policy waits for

    def _observed(self) -> reconcile.Observed:
        return reconcile.Observed(
            instances={digest: map_uids(loaded.instance) for digest, loaded in self._installed.loaded.items()},
            bindings={uid: bound.digest for uid, bound in self._bindings.bound.items()},
            maps=frozenset(self._installed.maps),
            starting=frozenset(self._installed.starting),
            failed=frozenset(self._installed.failures),
            failed_maps=frozenset(self._installed.map_failures),
            outgrown=frozenset(
                uid
                for uid, (spec, _) in self._installed.maps.items()
                if uid in self._specs and self._specs[uid].sha256 != spec.sha256
            ),
        )

    def _bind(self, uid: PolicyUid, plan: plan_pb2.Plan, digest: Digest) -> None:
        before = self._bindings.bound.get(uid)
        loaded = self._installed.loaded[digest]
        failure = self._installed.rewrite(loaded, plan.instance)
        if loaded.detached and before is not None and before.plan.generation != plan.generation:
            self._costs.begin_anew(digest)
            failure = self._installed.attach_again(loaded) or failure
        self._installed.learn_records(loaded, plan)
        if uid in loaded.plans:
            joining.extend(self._root, loaded, plan)
        elif digest not in self._fresh:
            joining.join(self._root, loaded, plan)
        self._bindings.bind(uid, plan, loaded)
        if failure is not None:
            self._bindings.bound[uid].failure = failure
        if not _same(plan, loaded.plans.get(uid)):
            loaded.plans[uid] = plan
            self._installed.remember(loaded, asked=True)
        if before and before.digest != digest:
            self._leave(uid, before.digest)

    def _unbind(self, uid: PolicyUid) -> None:
        self._leave(uid, self._bindings.unbind(uid).digest)

    def _leave(self, uid: PolicyUid, digest: Digest) -> None:
        loaded = self._installed.loaded.get(digest)
        if loaded and uid in loaded.plans:
            del loaded.plans[uid]
            joined = loaded.joined.pop(uid, None)
            self._installed.remember(loaded)
            if joined is not None:
                joining.leave(self._root, loaded, uid, joined)

    def _remove(self, digest: Digest) -> None:
        self._bindings.forget(digest)
        self._identities.forget_filter(digest)
        self._costs.forget(digest)
        self._installed.remove(digest)

    def _fill_filters(self) -> None:
        for digest, loaded in self._installed.loaded.items():
            self._identities.fill_filter(loaded, self._bindings.users(digest))

    def _follow(self, now_ns: int) -> None:
        """Interfaces and pods come and go: attach where programs are wanted now."""
        self._followed_ns = now_ns
        for digest, loaded in self._installed.loaded.items():
            if loaded.followers.each and not loaded.detached:
                users = self._bindings.users(digest)
                pods = self._identities.groups_of_pods(users) if loaded.followers.by_pod else {}
                self._installed.follow(loaded, pods, now_ns)

    def _remember(self, now_ns: int) -> None:
        self._remembered_ns = now_ns
        for loaded in self._installed.loaded.values():
            self._installed.remember(loaded, asked=True)

    def _policy_status(self, uid: PolicyUid, plan: plan_pb2.Plan) -> stream_pb2.PolicyStatus:
        bound = self._bindings.bound.get(uid)
        status = stream_pb2.PolicyStatus(
            policy_uid=uid, generation=plan.generation, state=stream_pb2.PolicyStatus.PENDING
        )
        if bound is not None:
            loaded = self._installed.loaded[bound.digest]
            status.digest = bound.digest
            status.ways.extend(loaded.ways)
            status.verified_instructions = loaded.verified_instructions()
            if not plan.HasField("instance"):
                status.generation = bound.plan.generation
        failure = self._installed.failures.get(Digest(plan.instance.digest))
        if failure is None and bound is not None:
            failure = bound.failure or next(iter(bound.unread.values()), None)
        if failure is not None:
            status.state = stream_pb2.PolicyStatus.FAILED
            status.reason, status.message, status.log_tail = failure.reason, failure.message, failure.log_tail
        elif Digest(plan.instance.digest) in self._installed.starting:
            status.reason, status.message = "Starting", "bpftrace compiles the script and attaches its probes"
        elif bound is not None and self._installed.loaded[bound.digest].detached:
            status.state = stream_pb2.PolicyStatus.DETACHED
            status.reason, status.message = "OverBudget", self._installed.loaded[bound.digest].detached
        elif bound is not None and (running := self._installed.loaded[bound.digest].running) and running.ended:
            status.state = stream_pb2.PolicyStatus.FAILED
            status.reason, status.message = "ProgramEnded", f"bpftrace: {running.ended}"
        elif bound is not None:
            status.state = stream_pb2.PolicyStatus.READY
        return status


def _same(one: plan_pb2.Plan, other: plan_pb2.Plan | None) -> bool:
    return other is not None and one.SerializeToString(deterministic=True) == other.SerializeToString(
        deterministic=True
    )


def _interval_ns(plan: plan_pb2.Plan) -> int:
    return max(plan.interval_ms, 100) * 1_000_000


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
