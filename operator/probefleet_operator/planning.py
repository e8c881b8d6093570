"""Policies in, plans out, as the toolchain gets to them: the asynchronous half between objects.py and placement.

`Planning.refresh()` compares the store with what has been planned and starts a task for each policy that changed:
parse, fetch or compile its object, plan. Results are `Entry` values; `candidates()` hands them to `placement.place`.
A policy that cannot be planned is still a candidate, without a plan: then the nodes keep what they have of it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace

import structlog
from probefleet_core import catalog as catalog_module
from probefleet_core import errors as core_errors
from probefleet_core import placement, planner, policy, values

from probefleet_operator import api, errors, objects, reflector, toolchain

log = structlog.get_logger(__name__)

RETRY_FIRST_SECONDS = 5.0
RETRY_MAX_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the newest generation has no plan."""

    reason: str  # one CamelCase word
    message: str
    transient: bool  # trying again may help


@dataclass(frozen=True, slots=True)
class Entry:
    """One policy, as far as planning has come.

    While a new generation is under way, `policy` and `planned` are still the last generation's: nodes that join
    meanwhile run what the others run.
    """

    uid: values.PolicyUid
    namespace: str
    name: str
    generation: int
    raw: api.Json
    settled_generation: int = -1  # the newest that was planned or refused
    policy: values.ProbePolicy | None = None
    planned: planner.Planned | None = None
    refusal: Refusal | None = None

    @property
    def pending(self) -> bool:
        """The newest generation is neither planned nor refused yet."""
        return self.settled_generation != self.generation


@dataclass(frozen=True, slots=True)
class MapEntry:
    """One ProbeMap, as far as planning has come."""

    uid: str
    namespace: str
    name: str
    generation: int
    compiled: planner.CompiledProbeMap | None = None
    refusal: Refusal | None = None


@dataclass(slots=True)
class _Work:
    """What a task was started for; another key makes it worthless."""

    key: object
    task: asyncio.Task[None]


class Planning:
    """Entries of all policies and ProbeMaps. Belongs to the main loop."""

    def __init__(
        self,
        store: objects.ObjectStore,
        tools: toolchain.Toolchain,
        blobs: toolchain.Blobs,
        catalog: catalog_module.Catalog,
        *,
        on_change: Callable[[], None],
        cluster_size: Callable[[], tuple[int, int]],
        pushed_objects: Callable[[], set[str]],
    ) -> None:
        """`on_change()` is called when an entry has changed; `cluster_size()` gives nodes and CPUs of the largest;
        `pushed_objects()` the objects that nodes were last told to have."""
        self._store, self._tools, self._blobs, self._catalog = store, tools, blobs, catalog
        self._on_change, self._cluster_size = on_change, cluster_size
        self._pushed_objects = pushed_objects
        self.entries: dict[values.PolicyUid, Entry] = {}
        self.maps: dict[str, MapEntry] = {}
        self._work: dict[str, _Work] = {}
        self._slots = asyncio.Semaphore(2)

    @property
    def idle(self) -> bool:
        """Everything has been planned or refused."""
        return not any(entry.pending for entry in self.entries.values())

    def raw_map(self, uid: str) -> api.Json | None:
        """A ProbeMap as the API server has it."""
        return self._store.all("ProbeMap").get(uid)

    def candidates(self) -> list[placement.Candidate]:
        """For `placement.place`."""
        return [
            placement.Candidate(
                uid=entry.uid,
                namespace=entry.namespace,
                name=entry.name,
                policy=entry.policy,
                plan=entry.planned.plan if entry.planned else None,
                probe_maps=tuple(entry.planned.probe_maps) if entry.planned else (),
            )
            for entry in self.entries.values()
        ]

    def refresh(self) -> None:
        """Start what the store asks for and forget what it has no more."""
        raw_policies, raw_maps = self._store.all("ProbePolicy"), self._store.all("ProbeMap")
        for deleted in self.entries.keys() - raw_policies.keys():
            del self.entries[deleted]
            self._cancel(deleted)
        for gone in self.maps.keys() - raw_maps.keys():
            del self.maps[gone]
            self._cancel(gone)
        for uid, raw in raw_maps.items():
            self._ensure(uid, _generation(raw), functools.partial(self._compile_map, raw))
        for uid, raw in raw_policies.items():
            known = self.entries.get(values.PolicyUid(uid))
            if known is None:
                self.entries[values.PolicyUid(uid)] = _unplanned(raw)
            elif known.raw is not raw:
                self.entries[values.PolicyUid(uid)] = replace(known, generation=_generation(raw), raw=raw)
            maps = self._maps_key(raw["metadata"]["namespace"])
            if maps is not None:
                self._ensure(uid, (_generation(raw), maps), functools.partial(self._plan, values.PolicyUid(uid)))
        self._retain_blobs()

    async def close(self) -> None:
        """End all tasks."""
        tasks = [work.task for work in self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._work.clear()

    def _maps_key(self, namespace: str) -> object | None:
        """What of the namespace's ProbeMaps a policy's plan depends on; None while one of them is not compiled yet."""
        key: list[object] = []
        for uid, raw in sorted(self._store.all("ProbeMap").items()):
            if raw["metadata"]["namespace"] == namespace:
                entry = self.maps.get(uid)
                if entry is None or entry.generation != _generation(raw):
                    return None
                key.append((uid, entry.generation, entry.compiled is not None))
        return tuple(key)

    def _ensure(self, uid: str, key: object, start: Callable[[], Coroutine[object, object, None]]) -> None:
        work = self._work.get(uid)
        if work is not None and work.key == key:
            return
        self._cancel(uid)
        task = asyncio.create_task(start(), name=f"plan-{uid}")
        self._work[uid] = _Work(key, task)

    def _cancel(self, uid: str) -> None:
        if work := self._work.pop(uid, None):
            work.task.cancel()

    async def _compile_map(self, raw: api.Json) -> None:
        metadata = raw["metadata"]
        entry = MapEntry(metadata["uid"], metadata["namespace"], metadata["name"], _generation(raw))
        compiled: planner.CompiledProbeMap | None = None
        retry = RETRY_FIRST_SECONDS
        while True:
            refusal: Refusal | None = None
            try:
                probe_map = policy.parse_probe_map(raw)
                source = planner.probe_map_source(probe_map)
                elf = await self._tools.compiled(source, f"{probe_map.name}.probemap.c")
                compiled = planner.CompiledProbeMap(probe_map=probe_map, elf=elf)
                planner.plan_probe_map(compiled)
            except core_errors.Refused as problem:
                refusal = Refusal("Invalid", str(problem), transient=False)
            except errors.ToolchainError as problem:
                transient = isinstance(problem, errors.ToolchainUnavailable)
                refusal = Refusal(problem.reason, str(problem), transient=transient)
            self.maps[entry.uid] = MapEntry(
                entry.uid, entry.namespace, entry.name, entry.generation, None if refusal else compiled, refusal
            )
            self._on_change()
            if refusal is None or not refusal.transient:
                return
            await asyncio.sleep(reflector.jittered(retry))
            retry = min(retry * 2, RETRY_MAX_SECONDS)

    async def _plan(self, uid: values.PolicyUid) -> None:
        retry = RETRY_FIRST_SECONDS
        while True:
            before = self.entries[uid]
            entry = await self._try_plan(before)
            self.entries[uid] = entry
            named = {"policy": f"{entry.namespace}/{entry.name}", "generation": entry.generation}
            if entry.refusal is None:
                log.info("policy planned", **named)
            elif before.refusal != entry.refusal:
                log.warning("policy refused", **named, reason=entry.refusal.reason, message=entry.refusal.message)
            self._on_change()
            if entry.refusal is None or not entry.refusal.transient:
                return
            await asyncio.sleep(reflector.jittered(retry))
            retry = min(retry * 2, RETRY_MAX_SECONDS)

    async def _try_plan(self, base: Entry) -> Entry:
        parsed: values.ProbePolicy | None = None
        try:
            parsed = policy.parse_policy(base.raw)
            elf = await self._object(parsed)
            node_count, cpus = self._cluster_size()
            probe_maps = self._compiled_maps(base.namespace)
            async with self._slots:
                planned = await asyncio.to_thread(
                    planner.plan,
                    parsed,
                    catalog=self._catalog,
                    elf=elf,
                    probe_maps=probe_maps,
                    node_count=node_count,
                    cpus=cpus,
                )
        except core_errors.Refused as problem:
            return _refused(base, parsed, "Invalid", str(problem), transient=False)
        except errors.ToolchainError as problem:
            transient = isinstance(problem, errors.ToolchainUnavailable)
            return _refused(base, parsed, problem.reason, str(problem), transient=transient)
        except errors.ApiError as problem:
            return _refused(base, parsed, "ApiUnavailable", str(problem), transient=True)
        except Exception as problem:
            # A bug in planning one policy must not end the others' measurements.
            log.exception("planning failed", policy=f"{base.namespace}/{base.name}")
            return _refused(base, parsed, "InternalError", f"{type(problem).__name__}: {problem}", transient=True)
        for sha256, data in planned.objects.items():
            self._blobs.put(sha256, data)
        return replace(base, settled_generation=base.generation, policy=parsed, planned=planned, refusal=None)

    async def _object(self, parsed: values.ProbePolicy) -> bytes | None:
        """The CO-RE object that the planner wants; None where it has or needs none."""
        program = parsed.program
        if isinstance(program, values.CProgram):
            return await self._tools.compiled(program.source, f"{parsed.name}.bpf.c")
        if isinstance(program, values.ObjectProgram):
            if program.config_map is not None:
                return await self._tools.from_config_map(parsed.namespace, program.config_map, program.sha256)
            return program.inline
        return None

    def _compiled_maps(self, namespace: str) -> Mapping[str, planner.CompiledProbeMap]:
        return {
            entry.name: entry.compiled
            for entry in self.maps.values()
            if entry.namespace == namespace and entry.compiled is not None
        }

    def _retain_blobs(self) -> None:
        wanted = {sha256 for entry in self.entries.values() if entry.planned for sha256 in entry.planned.objects}
        # A changed policy's old plan may still be pushed until the new one is there.
        if self.idle and self._blobs.names() - wanted:
            self._blobs.retain(wanted | self._pushed_objects())


def _generation(raw: api.Json) -> int:
    return int(raw["metadata"].get("generation", 0))


def _unplanned(raw: api.Json) -> Entry:
    metadata = raw["metadata"]
    return Entry(values.PolicyUid(metadata["uid"]), metadata["namespace"], metadata["name"], _generation(raw), raw)


def _refused(base: Entry, parsed: values.ProbePolicy | None, reason: str, message: str, *, transient: bool) -> Entry:
    """The entry of a generation that has no plan: readable or not, what runs keeps running."""
    refused = replace(base, settled_generation=base.generation, refusal=Refusal(reason, message, transient))
    return refused if parsed is None else replace(refused, policy=parsed, planned=None)


def uses_map(entry: Entry, uid: str) -> bool:
    """Whether a policy's plan shares a ProbeMap."""
    return entry.planned is not None and any(each.uid == uid for each in entry.planned.probe_maps)


def program_title(entry: Entry) -> str:
    """ "catalog/runqlat", "c/slow": for the PROGRAM column, readable from the manifest even where the plan failed."""
    program = (entry.raw.get("spec") or {}).get("program") or {}
    for kind in ("catalog", "bcc", "c", "object", "bpftrace"):
        if kind in program:
            return f"{kind}/{program[kind].get('name', entry.name) if kind == 'catalog' else entry.name}"
    return "-"
