"""A policy and its compiled object in, a ``Plan`` for the nodes out. Pure and deterministic.

::

    policy.parse_policy ─▶ planner.object_from ─▶ toolchain (clang), ConfigMap, catalog ─▶ planner.plan ─▶ placement

``plan`` reads the object's ELF and BTF, so that what cannot work is said before a node hears of it: unknown catalog
names, parameters, maps and fields, programs that could change what they watch, maps over the budget. The instance's
digest covers everything that makes a running instance differ, and nothing else: policies that differ in outputs,
selectors or intervals share one program on the hook.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from probefleet_wire import map_types
from probefleet_wire.bpf_object import MapDef
from probefleet_wire.btf_layout import Field
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import ElfError
from probefleet_wire.map_types import MapType
from probefleet_wire.v1 import plan_pb2

from probefleet_core import (
    bcc_source,
    endpoints,
    errors,
    interval_outputs,
    map_contents,
    map_facts,
    network_targets,
    outputs,
    probe_maps,
    program_parts,
    quantities,
    to_wire,
    values,
)
from probefleet_core import catalog as catalog_module

DIGEST_CHARACTERS = 32
USE_PROGRAM = "use-program"
USE_CLUSTER_SCOPE = "use-cluster-scope"


CompiledProbeMap = program_parts.CompiledProbeMap


class ObjectFrom(enum.Enum):
    """Who has to provide the compiled object before ``plan`` can be called."""

    CATALOG = "catalog"  #: bpf/<probe>, compiled with the release
    COMPILER = "compiler"  #: clang, from spec.program.c.source
    CONFIG_MAP = "configMap"  #: spec.program.object.configMapKeyRef
    INLINE = "inline"  #: spec.program.object.inline
    NOBODY = "nobody"  #: bcc, bpftrace: compiled on the node


@dataclass(frozen=True, slots=True)
class Summary:
    """What ``probefleet explain`` shows of a plan."""

    programs: tuple[str, ...]  #: "on_switch: tpBtf sched_switch"; "on the node" for bcc's, which is compiled there
    maps: tuple[tuple[str, int], ...]  #: name → bytes on one node, estimated for ``cpus``; empty for bcc
    map_bytes: int  #: their sum
    pins: tuple[str, ...]  #: paths below the bpffs mount
    verbs: tuple[str, ...]  #: RBAC rules that the applying user needs: "create probepolicies.probefleet.io", …
    not_read: tuple[tuple[str, str], ...] = ()  #: maps that no output reads by itself → their type, and why


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, the bytes it refers to, and what it amounts to."""

    plan: plan_pb2.Plan
    objects: Mapping[str, bytes]  #: sha256 (hex) → ELF: what Push.blobs has to carry
    probe_maps: tuple[plan_pb2.ProbeMap, ...]  #: those that the plan shares
    summary: Summary


def object_from(policy: values.ProbePolicy) -> ObjectFrom:
    """Who provides the object of this policy's program."""
    match policy.program:
        case values.CatalogProgram():
            return ObjectFrom.CATALOG
        case values.BccProgram() | values.BpftraceProgram():
            return ObjectFrom.NOBODY
        case values.CProgram():
            return ObjectFrom.COMPILER
        case values.ObjectProgram(inline=inline):
            return ObjectFrom.CONFIG_MAP if inline is None else ObjectFrom.INLINE


def plan(
    policy: values.ProbePolicy,
    *,
    catalog: catalog_module.Catalog,
    elf: bytes | None,
    probe_maps: Mapping[str, CompiledProbeMap],
    node_count: int = 1,
    cpus: int = 1,
) -> Planned:
    """The plan of a policy; raises ``errors.PolicyRefused`` with every problem found.

    ``elf`` is the CO-RE object that ``object_from`` names (for ``CATALOG`` and ``INLINE`` it may be None: the policy or
    the catalog has it; for ``NOBODY`` it is None). ``probe_maps`` are those of the policy's namespace by name; ones
    that do not compile are left out by the caller. ``node_count`` and ``cpus`` (of the largest node) are for messages
    and estimates only: the plan does not depend on them.
    """
    request = program_parts.Request(policy, catalog, elf, probe_maps, node_count, cpus)
    problems = errors.Problems()
    try:
        return _plan(request, problems)
    except (ElfError, BtfError) as error:
        if not isinstance(policy.program, values.CProgram | values.ObjectProgram):
            raise  # an object of our own contradicts itself: a bug
        problems.add(
            program_parts.object_path(policy.program),
            "not an object that can be read",
            why=str(error),
            write="Compile it with clang -g -target bpf.",
        )
    raise errors.PolicyRefused(problems.found)


def _plan(request: program_parts.Request, problems: errors.Problems) -> Planned:
    policy = request.policy
    match policy.program:
        case values.CatalogProgram():
            parts = program_parts.of_catalog(request, policy.program, problems)
        case values.BccProgram(source=source):
            parts = program_parts.of_bcc(policy, source, problems)
        case values.BpftraceProgram(script=script):
            parts = program_parts.of_bpftrace(policy, script, problems)
        case values.CProgram() | values.ObjectProgram():
            parts = program_parts.of_object(request, problems)
    if parts is None or problems:
        raise errors.PolicyRefused(problems.found)
    shared = _shared_maps(request, parts, problems)
    sizes = _sizes(request, parts, shared, problems)
    _check_drained(parts, shared, problems)
    written = _written(policy, parts, shared, problems)
    _check_selection(policy, parts, problems)
    if parts.parsed is not None:
        constants = map_contents.constants(policy, parts.parsed, problems)
        parts = replace(parts, parameters={**parts.parameters, **constants})
    if problems:
        raise errors.PolicyRefused(problems.found)
    return _assemble(request, parts, shared, sizes, written)


def probe_map_source(probe_map: values.ProbeMap) -> str:
    """C text for clang: an object without programs whose one map, ``shared``, is this ProbeMap."""
    return probe_maps.source(probe_map)


def plan_probe_map(compiled: CompiledProbeMap) -> plan_pb2.ProbeMap:
    """The wire's ProbeMap; raises ``errors.ProbeMapRefused`` where the object's map is not what was asked for."""
    return probe_maps.to_wire(compiled.probe_map, compiled.elf)


# Maps.


def _shared_maps(
    request: program_parts.Request, parts: program_parts.Parts, problems: errors.Problems
) -> dict[str, CompiledProbeMap]:
    """Which of the program's maps are replaced by which ProbeMap, checked."""
    own = {each.name: each for each in parts.parsed.all_maps} if parts.parsed else {}
    there = [name for name in own if not map_facts.is_own(name)]
    found: dict[str, CompiledProbeMap] = {}
    for index, use in enumerate(request.policy.maps):
        path = f"spec.maps[{index}]"
        known = use.name in there if parts.parsed else bcc_source.names(parts.source, use.name)
        if not known:
            problems.add(
                f"{path}.name",
                f'"{use.name}"',
                why="the program has no map of that name",
                write=errors.did_you_mean(use.name, there, what="map") if parts.parsed else "Write a map's name.",
            )
            continue
        if not use.probe_map:
            continue
        compiled = request.probe_maps.get(use.probe_map)
        why, write = _share_refused(request, use, compiled, parts, own.get(use.name))
        if why or compiled is None:
            problems.add(f"{path}.share.probeMap", f'"{use.probe_map}"', why=why, write=write)
            continue
        found[use.name] = compiled
    if endpoints.MAP in own or (not parts.parsed and bcc_source.names(parts.source, endpoints.MAP)):
        if request.catalog.endpoints:
            found[endpoints.MAP] = endpoints.builtin(request.catalog.endpoints)
        else:
            why = "the map's object, endpoints.bpf.o, is not where the catalog's objects are"
            problems.add("spec.program", f"<{endpoints.HEADER}>", why=why, write="Run `make bpf`, or leave it away.")
    return found


def _share_refused(
    request: program_parts.Request,
    use: values.MapUse,
    compiled: CompiledProbeMap | None,
    parts: program_parts.Parts,
    own: MapDef | None,
) -> tuple[str, str]:
    """Why a map cannot be replaced by a ProbeMap and what to write instead; empty where it can."""
    policy = request.policy
    if compiled is None:
        why = f"namespace {policy.namespace} has no ProbeMap of that name (or it does not compile)"
        return why, errors.did_you_mean(use.probe_map, list(request.probe_maps), what="ProbeMap in the namespace")
    allowed = compiled.probe_map.policies
    if allowed and policy.name not in allowed:
        return f"its spec.policies does not name {policy.name}", "Add the policy there, or use a map of its own."
    if own is None or parts.parsed is None or parts.parsed.btf is None:
        return "", ""  # bcc: the node compares
    shared, shared_btf = probe_maps.definition_of(compiled.probe_map, compiled.elf)
    misfit = probe_maps.misfit(own, parts.parsed.btf, shared, shared_btf)
    return (f"{use.name} does not fit: {misfit}", "Declare both alike, or share another map.") if misfit else ("", "")


def _sizes(
    request: program_parts.Request,
    parts: program_parts.Parts,
    shared: Mapping[str, CompiledProbeMap],
    problems: errors.Problems,
) -> tuple[tuple[str, int], ...]:
    """Bytes of each map on one node; over the budget is a problem."""
    policy = request.policy
    entries = {use.name: use.max_entries for use in policy.maps if use.max_entries}
    elsewhere = {*shared, *(use.name for use in policy.maps if use.pinned)}
    own = [each for each in parts.parsed.all_maps if each.name not in elsewhere] if parts.parsed else []
    for index, use in enumerate(policy.maps):
        found = next((each for each in own if each.name == use.name), None)
        is_ring = found is not None and found.type in (MapType.RINGBUF, MapType.USER_RINGBUF)
        if use.max_entries and is_ring and not map_facts.is_ring_size(use.max_entries):
            problems.add(
                f"spec.maps[{index}].maxEntries",
                f"{use.max_entries}",
                why="a ring buffer's size is in bytes, a power of two and at least one page",
                write=f"Write {max(4096, 1 << (use.max_entries - 1).bit_length())}.",
            )
    sizes = [
        (each.name, map_facts.bytes_of(each, cpus=request.cpus, entries=entries.get(each.name, 0))) for each in own
    ]
    for name, compiled in shared.items():
        sizes.append((name, probe_maps.bytes_of(compiled.probe_map, compiled.elf, cpus=request.cpus)))
    total, budget = sum(size for _, size in sizes), policy.budget.map_memory_bytes
    if total > budget:
        largest = ", ".join(
            f"{name} {quantities.show_bytes(size)}" for name, size in sorted(sizes, key=lambda each: -each[1])[:3]
        )
        whole = quantities.show_bytes(total * request.node_count)
        nodes = f", on {request.node_count:,} nodes {whole}" if request.node_count > 1 else ""
        problems.add(
            "spec.budget.mapMemory",
            f"maps need {quantities.show_bytes(total)} on a node with {request.cpus} CPUs{nodes}",
            why=f"the budget is {quantities.show_bytes(budget)} a node; the largest are {largest}",
            write=f"Write maps: [{{name: …, maxEntries: …}}] with less, or mapMemory: {-(-total >> 20)}Mi or more.",
        )
    return tuple(sizes)


def _check_drained(
    parts: program_parts.Parts, shared: Mapping[str, CompiledProbeMap], problems: errors.Problems
) -> None:
    """What an output takes out of a shared queue, a program would never see."""
    popped = (values.MapType.QUEUE, values.MapType.STACK)
    for index, output in enumerate(parts.outputs):
        compiled = shared.get(output.map)
        if compiled is not None and compiled.probe_map.type in popped:
            problems.add(
                f"spec.outputs[{index}].from.map",
                f'"{output.map}"',
                why=f"reading takes entries out of a {compiled.probe_map.type} that other programs use as well",
                write="Leave the output away, or the share.",
            )


@dataclass(frozen=True, slots=True)
class _Written:
    """What the policy writes. While its program runs, it is no part of the digest."""

    contents: tuple[plan_pb2.MapContent, ...] = ()
    filled: tuple[plan_pb2.MapContent, ...] = ()  #: once, when the maps are made: this is part of the digest
    tail_calls: tuple[plan_pb2.TailCalls, ...] = ()
    tail_programs: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.contents or self.tail_calls)


def _written(
    policy: values.ProbePolicy,
    parts: program_parts.Parts,
    shared: Mapping[str, CompiledProbeMap],
    problems: errors.Problems,
) -> _Written:
    sizes = {use.name: use.max_entries for use in policy.maps if use.max_entries}
    sizes |= {name: compiled.probe_map.max_entries for name, compiled in shared.items()}
    if isinstance(policy.program, values.BccProgram):
        return _Written(
            contents=tuple(map_contents.bcc_contents(policy)),
            filled=tuple(map_contents.bcc_filled(policy)),
            tail_calls=tuple(map_contents.bcc_tail_calls(policy, parts.source, sizes, problems)),
        )
    if parts.parsed is None:
        return _Written()
    return _Written(
        contents=tuple(map_contents.contents(policy, parts.parsed, sizes, problems)),
        filled=tuple(map_contents.filled(policy, parts.parsed, sizes, problems)),
        tail_calls=tuple(map_contents.tail_calls(policy, parts.parsed, sizes, problems)),
        tail_programs=map_contents.tail_programs(policy, parts.parsed),
    )


# Pods.


def _at_pods(attached: program_parts.Attached) -> bool:
    """Whether the target is the selected pods' own interfaces or cgroups."""
    target = attached.attachment.target
    return isinstance(target, network_targets.TARGETS) and target.pods


def _check_selection(policy: values.ProbePolicy, parts: program_parts.Parts, problems: errors.Problems) -> None:
    """A policy that asks for some pods needs a program that can tell them apart."""
    if policy.scope is values.Scope.CLUSTER and policy.pods is None:
        return
    if parts.attached and all(_at_pods(each) for each in parts.attached):
        return  # attached to these pods alone
    where = "spec.pods" if policy.pods is not None else "spec.scope"
    if not parts.filters:
        problems.add(
            where,
            "a choice of pods",
            why="the program does not call probefleet_selected(), so it cannot leave other pods out",
            write="Call probefleet_selected(cgroup_id) from <probefleet.h>, or select no pods.",
        )
    if parts.parsed is None or parts.parsed.btf is None:
        return
    maps = outputs.known_maps(parts.parsed)
    for output in parts.outputs:
        found = maps.get(output.map)
        # An event's identity is in its record, a count's in its key; an iterator has only records.
        record = _record_fields(output, found) if found else interval_outputs.record_fields(parts.parsed, output.record)
        decoded = any(decoder == "cgroup" for _, decoder in output.decode)
        if not decoded and not any(outputs.CGROUP in field.typedefs for field in record):
            problems.add(
                where,
                f"a choice of pods with output {output.name}",
                why=f"what {output.map} holds does not say whose event it is",
                write=f"Give its key (or record) a field of type {outputs.CGROUP}, or select no pods.",
            )


def _record_fields(output: values.Output, found: outputs.Known) -> Sequence[Field]:
    if output.kind is not values.Kind.EVENTS:
        return found.key
    named = found.btf.find(output.record) if output.record else None
    return found.btf.layout_of(named) if named else found.value


# Everything together.


def _assemble(
    request: program_parts.Request,
    parts: program_parts.Parts,
    shared: Mapping[str, CompiledProbeMap],
    sizes: tuple[tuple[str, int], ...],
    written: _Written,
) -> Planned:
    policy = request.policy
    instance = plan_pb2.Instance(
        owner=policy.uid if written else "",
        tail_programs=written.tail_programs,
        filled=written.filled,
        attachments=[
            to_wire.attachment(each.attachment, each.alternative, way=each.way, optional=each.optional)
            for each in parts.attached
        ],
        parameters=[plan_pb2.Parameter(variable=name, value=value) for name, value in sorted(parts.parameters.items())],
        shared_maps=[
            plan_pb2.SharedMap(map=name, probe_map_uid=compiled.probe_map.uid)
            for name, compiled in sorted(shared.items())
        ],
        pinned_maps=[
            plan_pb2.PinnedMap(map=use.name, path=use.pinned)
            for use in sorted(policy.maps, key=lambda use: use.name)
            if use.pinned
        ],
        map_sizes=[
            plan_pb2.MapSize(map=use.name, max_entries=use.max_entries)
            for use in sorted(policy.maps, key=lambda use: use.name)
            if use.max_entries
        ],
    )
    if any(_at_pods(each) for each in parts.attached):
        instance.pods_of = policy.uid
    objects: dict[str, bytes] = {}
    if parts.elf is not None:
        sha256 = hashlib.sha256(parts.elf).hexdigest()
        objects[sha256] = parts.elf
        instance.object.sha256 = sha256
    elif isinstance(policy.program, values.BpftraceProgram):
        instance.bpftrace.script = parts.source
    else:
        # The name of the file stays out of it: two policies with the same text are one program.
        instance.bcc.CopyFrom(plan_pb2.BccSource(source=parts.source, file_name="program.c"))
    # The title is for people and no part of what runs.
    serialized = instance.SerializeToString(deterministic=True)
    instance.digest = hashlib.sha256(serialized).hexdigest()[:DIGEST_CHARACTERS]
    instance.title = parts.title
    # An edit of these goes on with the same program.
    instance.contents.extend(written.contents)
    instance.tail_calls.extend(written.tail_calls)
    maps = {compiled.probe_map.uid: compiled for compiled in shared.values()}
    for compiled in maps.values():
        objects[hashlib.sha256(compiled.elf).hexdigest()] = compiled.elf
    return Planned(
        plan=plan_pb2.Plan(
            policy_uid=policy.uid,
            namespace=policy.namespace,
            name=policy.name,
            generation=policy.generation,
            scope=to_wire.scope(policy.scope),
            instance=instance,
            outputs=[to_wire.output(each) for each in parts.outputs],
            interval_ms=policy.interval_ms,
            budget=plan_pb2.Budget(
                cpu_millicores=policy.budget.cpu_millicores, map_memory_bytes=policy.budget.map_memory_bytes
            ),
            filters_pods=parts.filters,
        ),
        objects=objects,
        probe_maps=tuple(plan_probe_map(maps[uid]) for uid in sorted(maps)),
        summary=_summary(policy, parts, shared, sizes, instance),
    )


def _not_read(parts: program_parts.Parts) -> tuple[tuple[str, str], ...]:
    read = {output.map for output in parts.outputs}
    found = []
    for each in parts.parsed.maps if parts.parsed else ():
        why = map_facts.why_not_read(each)
        if each.type in map_types.POPPED and each.name not in read:
            why = "reading takes its entries out: an output with events: {} does"
        if why and not map_facts.is_own(each.name):
            found.append((each.name, f"{map_facts.type_name(each.type)}, not read: {why}"))
    return tuple(found)


def _summary(
    policy: values.ProbePolicy,
    parts: program_parts.Parts,
    shared: Mapping[str, CompiledProbeMap],
    sizes: tuple[tuple[str, int], ...],
    made: plan_pb2.Instance,
) -> Summary:
    programs = [
        f"{each.attachment.program}: {to_wire.describe(each.attachment.target)}"
        + (f" (one way to {each.alternative})" if each.alternative else "")
        + (" (where there is one)" if each.optional else "")
        for each in parts.attached
    ]
    slots: dict[str, dict[str, list[int]]] = {}
    for each in made.tail_calls:
        for slot, name in sorted(each.entries.items()):
            slots.setdefault(name, {}).setdefault(each.map, []).append(slot)
    for name in made.tail_programs:
        ways = [f"{held}[{', '.join(map(str, numbers))}]" for held, numbers in slots.get(name, {}).items()]
        programs.append(f"{name}: jumped to" + (f" by {' and '.join(ways)}" if ways else ""))
    instance = f"probefleet/instances/{made.digest}"
    loaded = dict.fromkeys([*(each.attachment.program for each in parts.attached), *made.tail_programs])
    pins = [f"{instance}/prog_{name}" for name in loaded]
    pins += [f"{instance}/link_*_{name}" for name in dict.fromkeys(each.attachment.program for each in parts.attached)]
    # bpffs takes no dot in a name.
    pins += [f"{instance}/map_{name.replace('.', '%')}" for name, _ in sizes]
    pins += [f"{instance}/manifest"]
    for uid in sorted({each.probe_map.uid for each in shared.values()}):
        pins += [f"probefleet/maps/{uid}/map_map", f"probefleet/maps/{uid}/manifest"]
    verbs = ["create probepolicies.probefleet.io"]
    if policy.scope is values.Scope.CLUSTER:
        verbs.append(f"{USE_CLUSTER_SCOPE} probepolicies.probefleet.io")
    if not isinstance(policy.program, values.CatalogProgram):
        verbs.append(f"{USE_PROGRAM} probepolicies.probefleet.io")
    how = "bpftrace" if isinstance(policy.program, values.BpftraceProgram) else "the names of its functions"
    return Summary(
        programs=tuple(programs) or (f"compiled and attached on the node, by {how}",),
        maps=sizes,
        map_bytes=sum(size for _, size in sizes),
        pins=tuple(pins),
        not_read=_not_read(parts),
        verbs=tuple(verbs),
    )
