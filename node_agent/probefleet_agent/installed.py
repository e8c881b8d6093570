"""What is in the kernel of this node: instances and ProbeMaps, by digest and uid, and why the rest is not.

The engine carries out ``reconcile``'s actions with it; ``execute`` does each one. What failed is remembered here until
a push changes it, so that nothing is tried again and again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import structlog
import zstandard
from google.protobuf.message import DecodeError
from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_agent import execute, jumping, map_contents, map_growing, object_programs
from probefleet_agent.attempts import Attempts
from probefleet_agent.errors import CannotGrow, ProbefleetError, SlotTaken
from probefleet_agent.kernel import bcc, clock, pins
from probefleet_agent.kernel.spread import Pods
from probefleet_agent.loaded import Loaded, MapHandle, record_of
from probefleet_agent.reconcile import Digest, MapUid

#: An object's bytes after unpacking; the largest catalog object has 60 KB.
MAX_BLOB_BYTES = 16 << 20
#: What nobody has asked for this long is taken away when an agent starts.
FORGOTTEN_NS = 3_600_000_000_000
#: What reading a pin can raise: also one that another version of the agent wrote in its own way.
UNREADABLE = (ProbefleetError, DecodeError, ValueError, KeyError, TypeError, OSError)

log = structlog.get_logger("agent")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an instance, a ProbeMap or an output does not run."""

    reason: str
    message: str
    log_tail: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """In the words of an exception."""
        reason = error.reason if isinstance(error, ProbefleetError) else "BadOutput"
        tail = getattr(error, "tail", "")
        return cls(reason, str(error), tail if isinstance(tail, str) else "")


class Installed:
    """Every instance and ProbeMap under one tree of pins."""

    def __init__(self, root: pins.Root, files_root: str, cgroup_root: str) -> None:
        self.loaded: dict[Digest, Loaded] = {}
        #: Processes that begin; ``look`` makes them loaded, or failed.
        self.starting: dict[Digest, Loaded] = {}
        self.maps: dict[MapUid, tuple[plan_pb2.ProbeMap, MapHandle]] = {}
        self.failures: dict[Digest, Failure] = {}
        self.map_failures: dict[MapUid, Failure] = {}
        self._root = root
        self._executor = execute.Executor(root, files_root, cgroup_root, others=self.loaded)
        self._attempts = Attempts(root)
        self._unadopted: set[Digest] = set()
        self._unadopted_maps: set[MapUid] = set()
        self._blobs: dict[str, bytes] = {}

    @property
    def compiled(self) -> bcc.Known:
        """What BCC made, and how often that was known already."""
        return self._executor.compiled

    def adopt(self, *, stopped_ns: int) -> None:
        """Take over what an earlier process pinned; what nobody has asked for in an hour is removed."""
        for uid in self._root.list_maps():
            try:
                self.maps[MapUid(uid)] = self._executor.adopt_map(uid)
            except UNREADABLE as error:
                log.warning("a ProbeMap cannot be adopted; it is left as it is", uid=uid, error=str(error))
                self._unadopted_maps.add(MapUid(uid))
        for name in self._root.list_instances():
            digest = Digest(name)
            try:
                loaded = self._executor.adopt(name, stopped_ns=stopped_ns)
            except UNREADABLE as error:
                # It may count on: only a push takes it away, or loads it anew.
                log.warning("an instance cannot be adopted; it is left as it is", digest=name, error=str(error))
                self._unadopted.add(digest)
                continue
            if self._unadopted_maps.intersection(handle.probe_map_uid for handle in loaded.maps.values()):
                # With a ProbeMap made anew it would write where nobody reads: it is loaded anew as well.
                loaded.close()
                self._unadopted.add(digest)
                continue
            for handle in loaded.maps.values():
                if shared := self.maps.get(MapUid(handle.probe_map_uid)):
                    handle.heir_of, handle.since_ns = shared[1].heir_of, shared[1].since_ns
            self.loaded[digest] = loaded
            if clock.since_boot_ns() - loaded.asked_boot_ns > FORGOTTEN_NS:
                log.warning("no operator has asked for this instance in an hour: removed", digest=name)
                self.remove(digest)
                continue
            log.info("adopted", digest=name, title=loaded.instance.title, policies=len(loaded.plans))
        if not self._unadopted:
            self._settle()

    def drop_unadopted(self) -> None:
        """What could not be adopted is wanted anew or not at all, says a push that names every instance it wants."""
        for digest in self._unadopted:
            self._root.remove(digest)
        for uid in self._unadopted_maps:
            self._root.remove_map(uid)
        if self._unadopted:
            self._settle()
        self._unadopted.clear()
        self._unadopted_maps.clear()

    def _settle(self) -> None:
        """What an earlier process left in shared program arrays is somebody's who is here, or goes."""
        jumping.settle((handle for _, handle in self.maps.values()), self.loaded.values())

    def load(self, plans: Sequence[plan_pb2.Plan], *, filter_on: bool) -> None:
        """Load and attach the instance that these plans share; where that fails, remember why."""
        instance = plans[0].instance
        digest = Digest(instance.digest)
        started_ns = time.monotonic_ns()
        try:
            self._require_maps(instance)
            budgets = [plan.budget.map_memory_bytes for plan in plans if plan.budget.map_memory_bytes]
            with self._attempts.noted(digest):
                loaded = self._executor.load(
                    instance,
                    blob=self._blobs.get(instance.object.sha256),
                    probe_maps={uid: handle for uid, (_, handle) in self.maps.items()},
                    budget_bytes=min(budgets, default=0),
                    filter_on=filter_on,
                )
        except (ProbefleetError, ValueError, KeyError, OSError) as error:
            self._fail(instance, error)
            return
        self.loaded[digest] = loaded
        took_ms = (time.monotonic_ns() - started_ns) // 1_000_000
        words: dict[str, object] = {"ways": loaded.ways, "took_ms": took_ms}
        if instance.WhichOneof("program") == "bcc":
            words |= {"compile_hits": self.compiled.hits, "compile_misses": self.compiled.misses}
        log.info("loaded", digest=digest, title=instance.title, **words)

    def learn_records(self, loaded: Loaded, plan: plan_pb2.Plan) -> None:
        """How the structs are read that the plan's outputs name, as long as the object is at hand."""
        blob = self._blobs.get(loaded.instance.object.sha256)
        for output in plan.outputs:
            name = record_of(output.record)
            if blob is None or not output.record or name in loaded.record_layouts:
                continue
            if layout := object_programs.record_layout(blob, loaded.instance.title, output.record):
                loaded.record_layouts[name] = layout

    def rewrite(self, loaded: Loaded, wanted: plan_pb2.Instance) -> Failure | None:
        """Make its maps hold what the policy writes now; why not, where that fails and they hold what they held."""
        if map_contents.same(loaded.instance, wanted):
            return None
        try:
            map_contents.write(loaded, wanted, before=loaded.instance, others=self.loaded.values())
        except ProbefleetError as error:
            log.warning("maps cannot be written", digest=loaded.digest, error=str(error))
            return Failure.of(error)
        map_contents.keep(loaded, wanted)
        self._slots_may_be_free()
        log.info("maps are written anew", digest=loaded.digest)
        return None

    def try_again(self, changed: Set[Digest], specs: Set[MapUid], changed_maps: Set[MapUid]) -> None:
        """A push changed these instances and ProbeMaps, and wants these: what failed of them may be tried once more."""
        self.failures = {digest: why for digest, why in self.failures.items() if digest not in changed}
        self._slots_may_be_free()
        self.map_failures = {
            uid: why for uid, why in self.map_failures.items() if uid in specs - changed_maps and not changed
        }

    def _slots_may_be_free(self) -> None:
        """What found a slot taken is tried once more."""
        self.failures = {digest: why for digest, why in self.failures.items() if why.reason != SlotTaken.reason}

    def forget_attempts(self, wanted: Set[Digest]) -> None:
        """What nobody wants any more may be tried anew when somebody does."""
        self._attempts.keep_only(wanted)

    def begin(self, instance: plan_pb2.Instance) -> None:
        """Start the process of an instance that has one, which takes seconds."""
        try:
            self.starting[Digest(instance.digest)] = self._executor.begin(instance)
        except ProbefleetError as error:
            self._fail(instance, error)

    def look(self) -> set[Digest]:
        """Processes that have begun by now, or never will."""
        settled = set()
        for digest, loaded in list(self.starting.items()):
            try:
                if not self._executor.begun(loaded):
                    continue
                self.loaded[digest] = loaded
                log.info("loaded", digest=digest, title=loaded.instance.title)
            except (ProbefleetError, OSError) as error:
                loaded.close()
                self._fail(loaded.instance, error)
            del self.starting[digest]
            settled.add(digest)
        return settled

    def wait(self) -> None:
        """A moment, or until one of those that begin says something."""
        execute.wait(*self.starting.values())

    def remove(self, digest: Digest) -> None:
        """Detach, unload and unpin an instance."""
        if digest in self.starting:
            self.starting.pop(digest).close()
            return
        loaded = self.loaded.pop(digest)
        self._executor.remove(loaded)
        self._slots_may_be_free()
        log.info("removed", digest=digest, title=loaded.instance.title)

    def detach(self, digest: Digest) -> None:
        """End its attachments; what it counted stays."""
        self._executor.detach(self.loaded[digest])
        log.warning("over its budget: detached", digest=digest)

    def attach_again(self, loaded: Loaded) -> Failure | None:
        """What went over its budget may try once more, for its policy has changed; why not, where that fails."""
        try:
            self._executor.attach_again(loaded)
        except (ProbefleetError, OSError) as error:
            log.warning("cannot be attached again", digest=loaded.digest, error=str(error))
            return Failure.of(error)
        log.info("attached again", digest=loaded.digest)
        return None

    def follow(self, loaded: Loaded, pods: Pods, now_ns: int) -> None:
        """Attach to what came, let go of what went."""
        self._executor.follow(loaded, pods, now_ns)

    def make_map(self, spec: plan_pb2.ProbeMap) -> None:
        """Create and pin a ProbeMap; where that fails, remember why."""
        uid = MapUid(spec.uid)
        blob = self._blobs.get(spec.sha256)
        if blob is None:
            what = (
                f"ProbeMap {spec.namespace}/{spec.name}: its definition {spec.sha256[:12]} did not come with the push"
            )
            self.map_failures[uid] = Failure("BadObject", what)
            return
        try:
            self.maps[uid] = (spec, self._executor.make_map(spec, blob))
        except (ProbefleetError, OSError) as error:
            self.map_failures[uid] = Failure.of(error)

    def grow_map(self, spec: plan_pb2.ProbeMap) -> list[Digest]:
        """Give a ProbeMap the size that is asked for now: which instances have new programs. Where that cannot be,
        remember why, and go on with the map that is there.
        """
        uid = MapUid(spec.uid)
        before, old = self.maps[uid]
        users = [loaded for loaded in self.loaded.values() if uid in map_uids(loaded.instance)]
        title = f"ProbeMap {spec.namespace}/{spec.name}"
        new: MapHandle | None = None
        try:
            blob = self._blobs.get(spec.sha256)
            if blob is None:
                raise CannotGrow(f"{title}: its new definition {spec.sha256[:12]} did not come with the push")
            new = self._executor.create_map(spec, blob)
            if map_growing.same(old, new):
                # Another compiler's object of the same map.
                self.maps[uid] = (spec, old)
                self._executor.remember_map(spec, old)
                new.fd.close()
                return []
            if why := map_growing.why_not(old, new):
                raise CannotGrow(
                    f"{title} stays as it is, for {why}. Make one of another name, and let the policies share that."
                )
            grown = map_growing.grow(
                self._executor,
                spec,
                old,
                new,
                [(each, self._blobs.get(each.instance.object.sha256)) for each in users],
                {str(other): handle for other, (_, handle) in self.maps.items()},
            )
        except (ProbefleetError, ValueError, KeyError, OSError) as error:
            self.map_failures[uid] = Failure.of(error)
            log.warning("a ProbeMap does not grow", uid=uid, name=spec.name, error=str(error))
            self._resume(users, f"{title} was to grow, which failed")
            if new is not None:
                new.fd.close()
            return []
        self.maps[uid] = (spec, grown.handle)
        for loaded in grown.before:
            loaded.close()
        old.fd.close()
        self.loaded.update({Digest(digest): loaded for digest, loaded in grown.users.items()})
        log.info(
            "a ProbeMap has grown",
            uid=uid,
            name=spec.name,
            was=before.generation,
            entries=grown.handle.info.max_entries,
        )
        return [Digest(digest) for digest in grown.users]

    def _resume(self, users: Iterable[Loaded], why: str) -> None:
        for loaded in users:
            if loaded.halted_ns:
                try:
                    self._executor.resume(loaded, why)
                except (ProbefleetError, OSError) as error:
                    self.failures[Digest(loaded.digest)] = Failure.of(error)

    def remove_map(self, uid: MapUid) -> None:
        """Unpin a ProbeMap."""
        _, handle = self.maps.pop(uid)
        self._root.remove_map(uid)
        handle.fd.close()

    def shared(self, uid: MapUid) -> MapHandle | None:
        """A ProbeMap's map, where it is here."""
        return self.maps[uid][1] if uid in self.maps else None

    def keep_blobs(self, blobs: Iterable[stream_pb2.Blob]) -> None:
        """Take in the objects that came with a push."""
        for blob in blobs:
            data = zstandard.ZstdDecompressor().decompress(blob.zstd, max_output_size=MAX_BLOB_BYTES)
            self._blobs[blob.sha256] = data

    def forget_blobs(self, needed: Set[str]) -> None:
        """Objects are needed again only to load: keep those of the newest push, as the operator reckons with."""
        self._blobs = {digest: data for digest, data in self._blobs.items() if digest in needed}

    def remember(self, loaded: Loaded, *, asked: bool = False) -> None:
        """Write its manifest anew: who is bound; with ``asked`` also that an operator wants it now."""
        if asked:
            loaded.asked_boot_ns = clock.since_boot_ns()
        self._executor.remember(loaded)

    def close(self) -> None:
        """Let go of descriptors; what is pinned goes on counting."""
        for loaded in (*self.loaded.values(), *self.starting.values()):
            loaded.close()
        for _, handle in self.maps.values():
            handle.fd.close()
        self.loaded, self.starting, self.maps = {}, {}, {}
        self._attempts.close()

    def _fail(self, instance: plan_pb2.Instance, error: Exception) -> None:
        failure = self.failures[Digest(instance.digest)] = Failure.of(error)
        log.warning("cannot run", digest=instance.digest, title=instance.title, reason=failure.reason)

    def _require_maps(self, instance: plan_pb2.Instance) -> None:
        missing = map_uids(instance) - set(self.maps)
        if missing:
            why = "; ".join(self.map_failures[uid].message for uid in missing if uid in self.map_failures)
            raise ProbefleetError(f"{instance.title}: a shared map could not be made: {why or sorted(missing)}")


def map_uids(instance: plan_pb2.Instance) -> frozenset[MapUid]:
    """The ProbeMaps that an instance shares."""
    return frozenset(MapUid(each.probe_map_uid) for each in instance.shared_maps)
