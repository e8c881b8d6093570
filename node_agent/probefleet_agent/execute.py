"""One instance, from a plan to pinned programs that count: the only place that loads, attaches and removes.

The engine carries out ``reconcile``'s actions with it. An ``Instance`` (of whatever kind) becomes a ``Loaded``: its
maps, its programs, its links, and how its bytes are read. All of it lies in one folder of pins, built aside and
renamed, with a manifest that says everything a later process needs to *adopt* it; so counting goes on while the
agent is replaced. What fails leaves nothing behind.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from probefleet_wire import kept, map_layout
from probefleet_wire.bpf_object import MapDef
from probefleet_wire.v1 import plan_pb2

from probefleet_agent import bcc_programs, bpftrace_programs, joining, jumping, map_contents, object_programs, observing
from probefleet_agent.decode import Layout
from probefleet_agent.errors import ObjectError
from probefleet_agent.kernel import bcc, clock, hooks, libbpf, links, links_network, maps, pins, syscall
from probefleet_agent.kernel.spread import MAX_PLACES, Pods
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.loaded import FILTER, OVER_BUDGET, Loaded, MapHandle, b64

MAX_WAYS = 64
#: Of what BCC made; the agent is to stay small.
MAX_COMPILED_BYTES = 8 << 20


@dataclass(slots=True)
class Executor:
    """Loads, adopts and removes instances and ProbeMaps under one tree of pins."""

    root: pins.Root
    #: Stands before the paths of uprobes: the agent's own files are others than the node's.
    files_root: str = ""
    #: The node's own cgroup below the cgroup2 mount.
    cgroup_root: str = "/"
    #: What hooks cost here; measured before the first program is attached to one of its kind.
    hooks: hooks.Hooks = field(default_factory=hooks.Hooks)
    #: What BCC made: a policy that comes again, or another one of the same source, need not wait for the compiler.
    compiled: bcc.Known = field(default_factory=lambda: kept.Kept(MAX_COMPILED_BYTES))
    #: All that is loaded, by digest: whose programs stand in program arrays that instances share.
    others: Mapping[Any, Loaded] = field(default_factory=dict)

    def load(
        self,
        instance: plan_pb2.Instance,
        *,
        blob: bytes | None,
        probe_maps: Mapping[str, MapHandle],
        budget_bytes: int,
        filter_on: bool,
    ) -> Loaded:
        """Load, attach and pin. Raises ProbefleetError; then nothing of it is left."""
        if instance.WhichOneof("program") == "bpftrace":
            loaded = self.begin(instance)
            with contextlib.ExitStack() as undo:
                undo.callback(loaded.close)
                while not self.begun(loaded):
                    wait(loaded)
                undo.pop_all()
            return loaded
        with contextlib.ExitStack() as undo:
            loaded = self._make(instance, blob, probe_maps, budget_bytes, filter_on)
            undo.callback(loaded.close)
            undo.callback(self._leave_slots, loaded)
            map_contents.fill(loaded)
            map_contents.write(loaded, instance, others=self.others.values())
            with self.root.staging(instance.digest) as folder:
                self.pin(loaded, folder)
                # Counting begins with the links: what comes before them cannot fail any more.
                loaded.since_ns, loaded.asked_boot_ns = time.time_ns(), clock.since_boot_ns()
                self._begin(loaded, folder)
                folder.write_manifest(loaded.manifest())
            undo.pop_all()
        return loaded

    def load_again(self, loaded: Loaded, *, blob: bytes | None, probe_maps: Mapping[str, MapHandle]) -> Loaded:
        """An instance's programs once more, for another ProbeMap in the place of one; its own maps are the same ones.

        Not attached, and not pinned. Program arrays of its own are made anew: theirs hold the programs that are there
        now. Into those that it shares they come when it is attached.
        """
        own = {
            name: handle
            for name, handle in loaded.maps.items()
            if not handle.probe_map_uid and handle.info.type != MapType.PROG_ARRAY
        }
        again = self._make(loaded.instance, blob, probe_maps, 0, FILTER in loaded.maps, own)
        try:
            written, wanted = plan_pb2.Instance(), plan_pb2.Instance()
            written.CopyFrom(loaded.instance)
            written.ClearField("tail_calls")
            wanted.CopyFrom(written)
            wanted.tail_calls.extend(
                each for each in loaded.instance.tail_calls if not again.maps[each.map].probe_map_uid
            )
            map_contents.write(again, wanted, before=written)
        except BaseException:
            again.close()
            raise
        again.since_ns, again.asked_boot_ns = loaded.since_ns, loaded.asked_boot_ns
        again.detached, again.detached_ns = loaded.detached, loaded.detached_ns
        again.gaps, again.plans, again.missed = list(loaded.gaps), dict(loaded.plans), dict(loaded.missed)
        again.forgotten = loaded.forgotten
        again.joined = joining.passed_on(loaded)
        again.ways, again.record_layouts = list(loaded.ways), dict(loaded.record_layouts)
        return again

    def begin_again(self, loaded: Loaded, folder: pins.Folder) -> None:
        """Attach what ``load_again`` made, unless it is over its budget. The manifest is still to be written."""
        if not loaded.detached:
            jumping.enter(loaded, self.others.values())
            self._begin(loaded, folder)

    def halt(self, loaded: Loaded) -> list[int]:
        """End its attachments for a while; the ids of links that the kernel may take a moment to let go of.

        What is pinned says so first: should this process die meanwhile, the next one attaches again.
        """
        loaded.halted_ns = time.time_ns()
        self.remember(loaded)
        return self._let_go(loaded)

    def resume(self, loaded: Loaded, why: str) -> None:
        """Attach again what ``halt`` let go of; the time between is a gap. Where that fails, nothing is attached."""
        self.root.detach(loaded.digest)
        if not loaded.detached:
            try:
                jumping.enter(loaded, self.others.values())
                self._begin(loaded, self.root.folder(loaded.digest))
            except BaseException:
                self._let_go(loaded)
                raise
        loaded.add_gap(loaded.halted_ns, time.time_ns(), why)
        loaded.halted_ns = 0
        self.remember(loaded)

    def _make(
        self,
        instance: plan_pb2.Instance,
        blob: bytes | None,
        probe_maps: Mapping[str, MapHandle],
        budget_bytes: int,
        filter_on: bool,
        own: Mapping[str, MapHandle] = MappingProxyType({}),
    ) -> Loaded:
        """Maps and programs; ``own``: maps that are there already."""
        if instance.WhichOneof("program") == "bcc":
            observing.check_attachments(instance)
            return bcc_programs.load(instance, probe_maps, budget_bytes, self.files_root, self.compiled, own)
        if blob is None:
            raise ObjectError(f"{instance.title}: object {instance.object.sha256[:12]} did not come with the push")
        return object_programs.load(
            instance, blob, probe_maps,
            budget_bytes=budget_bytes, filter_on=filter_on, files_root=self.files_root, own=own,
        )  # fmt: skip

    def pin(self, loaded: Loaded, folder: pins.Folder) -> None:
        """Pin maps, programs and baselines, and measure what hooks cost: all that comes before they are attached."""
        for handle in loaded.maps.values():
            folder.pin_map(handle.name, handle.fd)
        for name, fd in loaded.programs.items():
            folder.pin_program(name, fd)
        for policy, joined in loaded.joined.items():
            if joined.kept is not None:
                folder.pin_baseline(policy, joined.kept)
        self._measure_hooks(loaded)

    def _begin(self, loaded: Loaded, folder: pins.Folder) -> None:
        """Attach, and pin what can be pinned."""
        loaded.ways = self._attach(loaded)
        for number, link in loaded.links.items():
            if link.pinnable:
                for index, fd in enumerate(link.fds):
                    folder.pin_link(number * MAX_PLACES + index, loaded.chosen[number].program, fd)
        loaded.followers.pin(folder)

    def begin(self, instance: plan_pb2.Instance) -> Loaded:
        """Start the process of an instance that has one; ``begun`` says when it counts. Raises ProbefleetError."""
        observing.check_attachments(instance)
        return bpftrace_programs.load(instance)

    def begun(self, loaded: Loaded) -> bool:
        """Whether it counts; then it is pinned. Raises ProbefleetError where it never will: close it then."""
        if not _counts(loaded):
            return False
        loaded.since_ns, loaded.asked_boot_ns = time.time_ns(), clock.since_boot_ns()
        with self.root.staging(loaded.digest) as folder:
            _pin_process(loaded, folder)
        return True

    def adopt(self, digest: str, *, stopped_ns: int) -> Loaded:
        """Take over an instance that an earlier process pinned; what could not be pinned is attached anew.

        ``stopped_ns`` is when the earlier process was last known to be alive: since then unpinned links are gone.
        """
        with contextlib.ExitStack() as undo:
            pinned = undo.enter_context(contextlib.closing(self.root.open_instance(digest)))
            told = json.loads(pinned.manifest)
            instance = plan_pb2.Instance.FromString(base64.b64decode(told["instance"]))
            if instance.WhichOneof("program") == "bpftrace":
                return self._begin_again(instance, told, stopped_ns)
            layouts = {name: Layout.from_json(text) for name, text in told["layouts"].items()}
            loaded = Loaded(
                instance=instance,
                maps={
                    name: MapHandle(name, fd, maps.info(fd), layouts.get(name), told["shared"].get(name, ""))
                    for name, fd in pinned.maps.items()
                },
                programs=pinned.programs,
                sections=told["sections"],
                chosen=[plan_pb2.Attachment.FromString(base64.b64decode(text)) for text in told["chosen"]],
                ways=told["ways"],
                since_ns=told["since_ns"],
                gaps=[(start, end, why) for start, end, why in told["gaps"]],
                missed=told.get("missed", {}),
                forgotten=dict(told.get("missed", {})),
                pinned_links=told["pinned_links"],
                plans={uid: plan_pb2.Plan.FromString(base64.b64decode(text)) for uid, text in told["plans"].items()},
                asked_boot_ns=told.get("asked_boot_ns", clock.since_boot_ns()),
                halted_ns=told.get("halted_ns", 0),
                detached=told.get("detached", ""),
                detached_ns=told.get("detached_ns", 0),
                record_layouts={name: Layout.from_json(text) for name, text in told.get("records", {}).items()},
            )
            anew = joining.adopt(self.root, loaded, told.get("joined", {}))
            self._measure_hooks(loaded)
            if loaded.halted_ns:
                for fd in pinned.numbered.values():
                    fd.close()
                self.resume(loaded, "the agent ended while it let a shared map grow, which it then gave up")
                undo.pop_all()
                return loaded
            if any(handle.info.type == MapType.PERF_EVENT_ARRAY for handle in loaded.maps.values()):
                why = "perf buffers end with the agent's process, and the records that came meanwhile with them"
                loaded.add_gap(stopped_ns, time.time_ns(), why)
                self.root.write_manifest(digest, loaded.manifest())
            if loaded.detached:
                self.root.detach(digest)  # an agent that was about to has ended
            elif not loaded.pinned_links:
                self._attach(loaded, pinned={number // MAX_PLACES for number in pinned.numbered})
                why = "this kernel (before 5.15) ends such attachments with the agent's process"
                loaded.add_gap(stopped_ns, time.time_ns(), why)
                self.root.write_manifest(digest, loaded.manifest())
            else:
                self._begin_following(loaded)
            kept = loaded.followers.take_over(pinned.numbered, told.get("places", {}), stopped_ns)
            kept |= _take_over_iterators(loaded, pinned)
            for number, fd in pinned.numbered.items():
                if number not in kept:
                    fd.close()
            if anew:
                self.remember(loaded)
            undo.pop_all()
        return loaded

    def _begin_again(self, instance: plan_pb2.Instance, told: dict[str, Any], stopped_ns: int) -> Loaded:
        """A program that ended with the earlier process is started anew: its maps are others, and there is a gap.

        What the earlier one left stays until then: should this process die meanwhile, the next one knows of the gap.
        """
        loaded = self.begin(instance)
        with contextlib.ExitStack() as undo:
            undo.callback(loaded.close)
            while not _counts(loaded):
                wait(loaded)
            loaded.plans = {
                uid: plan_pb2.Plan.FromString(base64.b64decode(text)) for uid, text in told["plans"].items()
            }
            loaded.gaps = [(start, end, why) for start, end, why in told["gaps"]]
            loaded.add_gap(stopped_ns, time.time_ns(), "bpftrace ends with the agent's process")
            loaded.since_ns = told["since_ns"]
            loaded.asked_boot_ns = told.get("asked_boot_ns", clock.since_boot_ns())
            joining.begun_again(loaded, told.get("joined", {}))
            _pin_process(loaded, self.root.beside(loaded.digest))
            self.root.exchange([loaded.digest], [])
            undo.pop_all()
        return loaded

    def remove(self, loaded: Loaded) -> None:
        """Detach, unload, unpin."""
        self._leave_slots(loaded)
        self.root.remove(loaded.digest)
        loaded.close()

    def detach(self, loaded: Loaded) -> None:
        """End its attachments; maps and what they hold stay. What is pinned says so first."""
        loaded.detached_ns = time.time_ns()
        self.remember(loaded)
        if loaded.running is not None:
            loaded.running.close()
            loaded.running = None
        self._let_go(loaded)

    def _let_go(self, loaded: Loaded) -> list[int]:
        """End its attachments; the ids of links that the kernel may take a moment to let go of."""
        self._leave_slots(loaded)
        ids = self.root.detach(loaded.digest)
        for link in loaded.links.values():
            link.close()
        loaded.links.clear()
        loaded.followers.close()
        return ids

    def attach_again(self, loaded: Loaded) -> None:
        """What was detached may try once more; the time between is a gap. Raises ProbefleetError: it stays detached."""
        why, since_ns = loaded.detached, loaded.detached_ns
        loaded.halted_ns, loaded.detached, loaded.detached_ns = since_ns, "", 0
        try:
            self.resume(loaded, OVER_BUDGET)
        except BaseException:
            loaded.halted_ns, loaded.detached, loaded.detached_ns = 0, why, since_ns
            raise

    def follow(self, loaded: Loaded, pods: Pods, now_ns: int) -> None:
        """Keep up with interfaces and pods that came and went; ``pods`` are those that its policies select."""
        changed, gaps = loaded.followers.follow(self.root.folder(loaded.digest), pods, now_ns)
        if changed:
            for gap in gaps:
                loaded.add_gap(*gap)
            for number, text in loaded.followers.ways():
                if number < len(loaded.ways):
                    loaded.ways[number] = text
            self.remember(loaded)

    def remember(self, loaded: Loaded) -> None:
        """Write the manifest anew: who is bound, and when an operator last asked for it."""
        self.root.write_manifest(loaded.digest, loaded.manifest())

    def make_map(self, spec: plan_pb2.ProbeMap, blob: bytes) -> MapHandle:
        """Create and pin a ProbeMap from the definition in its object."""
        handle = self.create_map(spec, blob)
        try:
            with self.root.staging_map(spec.uid) as folder:
                pin_map(folder, spec, handle)
        except BaseException:
            handle.fd.close()
            raise
        return handle

    def create_map(self, spec: plan_pb2.ProbeMap, blob: bytes) -> MapHandle:
        """A ProbeMap's map, not yet pinned."""
        parsed = object_programs.parse(blob, f"{spec.namespace}/{spec.name}")
        with libbpf.open_object(blob, spec.name) as opened:
            opened.load()
            fd = opened.map_fd(spec.map)
        definition = next(each for each in parsed.maps if each.name == spec.map)
        layout = map_layout.layout_of(parsed, definition)
        handle = MapHandle(spec.map, fd, maps.info(fd), layout, spec.uid, since_ns=time.time_ns())
        try:
            _put_inner_maps(spec, definition, handle)
        except BaseException:
            fd.close()
            raise
        return handle

    def remember_map(self, spec: plan_pb2.ProbeMap, handle: MapHandle) -> None:
        """Write its manifest anew."""
        self.root.map_folder(spec.uid).write_manifest(_map_manifest(spec, handle))

    def adopt_map(self, uid: str) -> tuple[plan_pb2.ProbeMap, MapHandle]:
        """Take over a ProbeMap that is pinned."""
        pinned = self.root.open_map(uid)
        told = json.loads(pinned.manifest)
        spec = plan_pb2.ProbeMap.FromString(base64.b64decode(told["spec"]))
        fd = pinned.maps["map"]
        layout = Layout.from_json(told["layout"]) if told["layout"] else None
        heir_of, since_ns = told.get("heir_of", 0), told.get("since_ns", 0)
        return spec, MapHandle(spec.map, fd, maps.info(fd), layout, uid, heir_of=heir_of, since_ns=since_ns)

    def _leave_slots(self, loaded: Loaded) -> None:
        jumping.leave(loaded, self.others.values())

    def _measure_hooks(self, loaded: Loaded) -> None:
        """What each program's hooks cost a run: the dearest's, where it has several."""
        kinds = [hooks.kind(each, loaded.sections.get(each.program, "")) for each in loaded.chosen]
        costs_ns = {kind: self.hooks.measure(kind) for kind in dict.fromkeys(kinds)}
        for name, kind in zip((each.program for each in loaded.chosen), kinds, strict=True):
            cost_ns = costs_ns[kind]
            if cost_ns is None:
                loaded.unmeasured.add(kind)
            else:
                loaded.hooks_ns[name] = max(cost_ns, loaded.hooks_ns.get(name, 0.0))

    def _attach(self, loaded: Loaded, pinned: Set[int] = frozenset()) -> list[str]:
        """Attach all but the attachments of these numbers; each in words."""
        self._begin_following(loaded)
        followed = {follower.number for follower in loaded.followers.each}
        ways = dict(loaded.followers.begin())
        for numbers in links.together(loaded.chosen):
            first, attachments = numbers[0], [loaded.chosen[number] for number in numbers]
            if first in followed or not pinned.isdisjoint(numbers):
                continue
            program = attachments[0].program
            fd, section = loaded.programs[program], loaded.sections.get(program, "")
            many = links.attach_together(fd, attachments, root=self.files_root) if len(numbers) > 1 else None
            made = {first: many[0]} if many else {}
            for number in numbers if many is None else ():
                made[number] = links.attach(fd, loaded.chosen[number], program_section=section, root=self.files_root)
                loaded.links[number] = made[number]
            loaded.links.update(made)
            loaded.pinned_links = loaded.pinned_links and all(each.pinnable for each in made.values())
            words = many[1] if many else [each.way for each in made.values()]
            ways.update((number, f"{program}: {way}") for number, way in zip(numbers, words, strict=True))
        return [ways[number] for number in sorted(ways)][:MAX_WAYS]

    def _begin_following(self, loaded: Loaded) -> None:
        around = links_network.Surroundings(
            self.files_root, self.cgroup_root, f"probefleet:{self.root.path}:{loaded.digest}"
        )
        for number, attachment in enumerate(loaded.chosen):
            loaded.followers.add(number, attachment, loaded.programs[attachment.program], around)


def pin_map(folder: pins.Folder, spec: plan_pb2.ProbeMap, handle: MapHandle) -> None:
    """A ProbeMap's pins."""
    folder.pin_map("map", handle.fd)
    folder.write_manifest(_map_manifest(spec, handle))


def _put_inner_maps(spec: plan_pb2.ProbeMap, definition: MapDef, handle: MapHandle) -> None:
    """A map for each key of a map of maps: the kernel lets no program put one in."""
    inner, size = definition.inner, handle.info.key_size
    if inner is None:
        return
    for at in range(0, len(spec.inner_keys), size):
        with syscall.map_create(
            inner.type, key_size=inner.key_bytes, value_size=inner.value_bytes, max_entries=inner.max_entries,
            name=spec.name, flags=inner.flags,
        ) as made:  # fmt: skip
            syscall.map_update(handle.fd, spec.inner_keys[at : at + size], int(made).to_bytes(4, "little"))


def _map_manifest(spec: plan_pb2.ProbeMap, handle: MapHandle) -> bytes:
    layout = handle.layout.to_json() if handle.layout else ""
    told = {"spec": b64(spec), "layout": layout, "heir_of": handle.heir_of, "since_ns": handle.since_ns}
    return json.dumps(told).encode()


def _counts(loaded: Loaded) -> bool:
    """Whether its process has begun to. Raises ProbefleetError where it never will."""
    assert loaded.running is not None
    loaded.running.pump()
    return loaded.running.started


def _pin_process(loaded: Loaded, folder: pins.Folder) -> None:
    """All that a process leaves to the next agent."""
    for handle in loaded.maps.values():
        folder.pin_map(handle.name, handle.fd)
    folder.write_manifest(loaded.manifest())


def wait(*begun: Loaded) -> None:
    """A moment, or until one of these processes says something."""
    each = begun[0].running
    assert each is not None
    each.pump(wait_seconds=0.1)


def _take_over_iterators(loaded: Loaded, pinned: pins.Pinned) -> set[int]:
    """Iterators are read through their links: these stay open. Answers with the numbers of their pins."""
    kept: set[int] = set()
    for number, attachment in enumerate(loaded.chosen):
        first = number * MAX_PLACES
        if attachment.WhichOneof("target") == "iterator" and first in pinned.numbered:
            loaded.links[number] = links.Link((pinned.numbered[first],), True, f"iterator {attachment.iterator.type}")
            kept.add(first)
    return kept
