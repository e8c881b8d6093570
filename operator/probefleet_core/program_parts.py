"""What each kind of program brings to a plan: catalog, bcc, bpftrace, c and object. Pure; called by ``planner``.

Each function takes the whole request and answers ``Parts``: where the programs go, what the outputs are, which
variables are set. What cannot be is noted as problems, all of them, not only the first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from probefleet_wire import bpftrace_script, btf_check
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.elf import Elf

from probefleet_core import (
    bcc_source,
    errors,
    interval_outputs,
    interval_targets,
    legacy_maps,
    map_contents,
    network_parts,
    network_targets,
    observe_only,
    outputs,
    to_wire,
    values,
)
from probefleet_core import catalog as catalog_module
from probefleet_core.parameters import ParameterError

#: What ``probefleet_selected()`` of <probefleet.h> looks into.
FILTER = "probefleet_filter"


@dataclass(frozen=True, slots=True)
class CompiledProbeMap:
    """A ProbeMap and the object that clang made of ``probe_map_source``."""

    probe_map: values.ProbeMap
    elf: bytes


@dataclass(frozen=True, slots=True)
class Attached:
    """An attachment, the group of ways that it belongs to, and the way that it is a part of."""

    attachment: values.Attachment
    alternative: str = ""
    way: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of ``planner.plan``, together."""

    policy: values.ProbePolicy
    catalog: catalog_module.Catalog
    elf: bytes | None
    probe_maps: Mapping[str, CompiledProbeMap]
    node_count: int
    cpus: int


@dataclass(frozen=True, slots=True)
class Parts:
    """What a program's kind contributes to the plan."""

    title: str
    elf: bytes | None
    parsed: BpfObject | None
    attached: tuple[Attached, ...]
    outputs: tuple[values.Output, ...]
    parameters: Mapping[str, bytes]
    filters: bool  #: it asks probefleet_selected()
    source: str = ""


def of_catalog(request: Request, program: values.CatalogProgram, problems: errors.Problems) -> Parts | None:
    """A probe of the catalog: its own object, targets and outputs, with the parameters that the policy sets."""
    path = "spec.program.catalog"
    probe = request.catalog.get(program.name)
    if probe is None:
        problems.add(
            f"{path}.name",
            f'"{program.name}"',
            why="the catalog has no probe of that name",
            write=errors.did_you_mean(program.name, request.catalog.names, what="probe in the catalog"),
        )
        return None
    known = {parameter.name: parameter for parameter in probe.parameters}
    good = []
    for name, text in program.parameters:
        try:
            # One by one, so that all that are wrong are heard of.
            probe.settings([(name, text)])
            known[name].encode(text)
            good.append((name, text))
        except ParameterError as error:
            problems.add(f"{path}.parameters.{name}", f'"{error.what}"', why=error.why, write=error.write)
    for field, parameter in probe.unfilled(good).items():
        for index, output in enumerate(request.policy.outputs):
            if field in (output.group_by or ()):
                problems.add(
                    f"spec.outputs[{index}].groupBy",
                    f'"{field}"',
                    why="the probe leaves it at 0 unless it is told to fill it",
                    write=f'Write {path}.parameters: {{{parameter}: "true"}}.',
                )
    parsed = BpfObject.parse(probe.elf)
    defaults = tuple(each.output for each in probe.outputs)
    asked = tuple(_with_catalog_groups(output, defaults) for output in request.policy.outputs)
    return Parts(
        title=f"catalog/{probe.name}",
        elf=probe.elf,
        parsed=parsed,
        attached=tuple(
            Attached(values.Attachment(each.program, each.target), each.alternative, each.way, each.optional)
            for each in probe.attachments(good)
        ),
        outputs=_resolved(asked, parsed, problems) if asked else defaults,
        parameters=probe.variables(good),
        filters=Elf.parse(probe.elf).uses(FILTER),
    )


def _with_catalog_groups(output: values.Output, defaults: Sequence[values.Output]) -> values.Output:
    """A policy's own output of a catalog probe groups as the catalog does, where it does not say otherwise."""
    if output.group_by is None and output.kind is not values.Kind.EVENTS:
        for default in defaults:
            if (default.map, default.kind) == (output.map, output.kind):
                return replace(output, group_by=default.group_by)
    return output


def of_bcc(policy: values.ProbePolicy, source: str, problems: errors.Problems) -> Parts:
    """A BCC program: its text is all there is; the node compiles and attaches it."""
    path = "spec.program.bcc.source"
    for refusal in observe_only.refused_in_source(bcc_source.without_comments(source)):
        problems.add(path, refusal.what, why=refusal.why, write=refusal.write)
    for index, each in enumerate(policy.attach):
        if not bcc_source.names(source, each.program):
            problems.add(
                f"spec.attach[{index}].program",
                f'"{each.program}"',
                why="the source has no function of that name",
                write="Write the function's name as it stands in the source.",
            )
        if isinstance(each.target, network_targets.TARGETS):
            problems.add(
                f"spec.attach[{index}].{to_wire.kind_of(each.target)}",
                "a BCC program that decides about packets",
                why="its verdict has to be fixed before nodes get it, and BCC compiles there",
                write="Write it in libbpf's C: program.c.",
            )
    asked = tuple(
        replace(output, group_by=outputs.bcc_groups(source, output.map) if output.group_by is None else output.group_by)
        for output in policy.outputs
    )
    found = asked or outputs.bcc_outputs(source)
    if not found:
        problems.add(
            "spec.outputs",
            "missing",
            why="no table is declared by BPF_HASH, BPF_LPM_TRIE, BPF_HISTOGRAM, BPF_ARRAY, BPF_PERF_OUTPUT or "
            "BPF_RINGBUF_OUTPUT",
            write="Write outputs that name the program's maps.",
        )
    return Parts(
        title=f"bcc/{policy.name}",
        elf=None,
        parsed=None,
        attached=tuple(Attached(each) for each in policy.attach),
        outputs=tuple(_bcc_slots(output, source) for output in found),
        parameters={},
        filters=bcc_source.asks_for_pods(source),
        source=source,
    )


_REFUSED_CALLS = re.compile(r"\b(system|signal|override|override_return)\s*\(")


def of_bpftrace(policy: values.ProbePolicy, script: str, problems: errors.Problems) -> Parts:
    """A script for bpftrace: its text says which maps there are; it attaches itself, on the node."""
    path = "spec.program.bpftrace.script"
    for name in dict.fromkeys(_REFUSED_CALLS.findall(bpftrace_script.bare(script))):
        problems.add(
            path,
            f"it calls {name}()",
            why="Probefleet observes only, and that call can change what it watches",
            write="Leave the call away.",
        )
    defaults = outputs.bpftrace_outputs(script)
    if not defaults:
        problems.add(
            path,
            "nothing to report",
            why="the script writes no map and prints nothing",
            write="Count in a map, as @calls[comm] = count().",
        )
    by_map = {each.map: each for each in reversed(defaults)}
    asked = []
    for index, output in enumerate(policy.outputs):
        known = by_map.get(output.map)
        if known is None and output.map in bpftrace_script.working(script):
            problems.add(
                f"spec.outputs[{index}].from.map",
                f'"{output.map}"',
                why="the script deletes its keys by itself: bpftrace cannot print such a map while programs change it",
                write="Count in another map, as @calls[comm] = count().",
            )
            continue
        if known is None:
            problems.add(
                f"spec.outputs[{index}].from.map",
                f'"{output.map}"',
                why="the script has no map of that name (they are named here without @)",
                write=errors.did_you_mean(output.map, list(by_map), what="map"),
            )
            continue
        groups = known.group_by if output.group_by is None else output.group_by
        histogram = known.histogram if output.kind is values.Kind.HISTOGRAM else None
        asked.append(replace(output, group_by=groups, value=output.value or known.value, histogram=histogram))
    return Parts(
        title=f"bpftrace/{policy.name}",
        elf=None,
        parsed=None,
        attached=(),
        outputs=tuple(asked) or defaults,
        parameters={},
        filters=False,
        source=script,
    )


def _bcc_slots(output: values.Output, source: str) -> values.Output:
    """A histogram that does not say where its slots are has them where BCC's convention puts them."""
    if output.histogram is None or output.histogram.slots:
        return output
    table = next((each for each in outputs.bcc_outputs(source) if each.map == output.map and each.histogram), None)
    slots = table.histogram.slots if table and table.histogram else "key"
    return replace(output, histogram=replace(output.histogram, slots=slots))


def object_path(program: values.Program) -> str:
    """Where the policy says which object."""
    return "spec.program.c.source" if isinstance(program, values.CProgram) else "spec.program.object"


def of_object(request: Request, problems: errors.Problems) -> Parts | None:
    """A CO-RE object, compiled from the policy's source or given: everything is read from its ELF and BTF.

    ElfError and BtfError where it contradicts itself; some of that is found only when its maps are laid out.
    """
    policy, program = request.policy, request.policy.program
    kind, path = "c" if isinstance(program, values.CProgram) else "object", object_path(program)
    data = request.elf
    if isinstance(program, values.ObjectProgram):
        data = data if data is not None else program.inline
        if data is not None and hashlib.sha256(data).hexdigest() != program.sha256:
            problems.add(
                f"{path}.sha256",
                f'"{program.sha256[:12]}…"',
                why=f"the object's bytes hash to {hashlib.sha256(data).hexdigest()}",
                write="Write that hash, if these are the bytes that you mean.",
            )
            return None
    if data is None:
        raise ValueError(f"planner.plan needs the object of program.{kind}: see object_from")
    try:
        data = legacy_maps.translate(data)
        parsed = BpfObject.parse(data)
        btf_check.check(Elf.parse(data))
        refusals = list(observe_only.refused_in_object(data, parsed))
        objections = list(network_parts.objections(data, parsed))
        fixed = network_parts.fixed(data, parsed)
    except legacy_maps.LegacyMapsError as error:
        problems.add(path, 'maps in SEC("maps")', why=str(error), write=f"Write {error.write}")
        return None
    if parsed.btf is None:
        problems.add(path, "an object without BTF", why="its maps cannot be read", write="Compile it with clang -g.")
        return None
    for refusal in refusals:
        problems.add(path, refusal.what, why=refusal.why, write=refusal.write)
    for what, why, write in objections:
        problems.add(path, what, why=why, write=write)
    resolved = _resolved(policy.outputs, parsed, problems)
    attached = _attachments(policy, parsed, path, problems)
    targets = interval_outputs.with_records([each.attachment for each in attached], resolved, problems)
    return Parts(
        title=f"{kind}/{policy.name}",
        elf=fixed,
        parsed=parsed,
        attached=tuple(replace(each, attachment=target) for each, target in zip(attached, targets, strict=True)),
        outputs=resolved,
        parameters={},
        filters=Elf.parse(data).uses(FILTER),
    )


def _attachments(
    policy: values.ProbePolicy, parsed: BpfObject, path: str, problems: errors.Problems
) -> tuple[Attached, ...]:
    """Where each program goes: as ``attach`` says, else as its SEC() does."""
    if not parsed.programs:
        problems.add(path, "no program", why="nothing would run", write='Give a function a SEC("…") name.')
    overrides: dict[str, list[values.Attachment]] = {}
    jumped_to = map_contents.tail_programs(policy, parsed)
    names = [program.name for program in parsed.programs]
    for index, each in enumerate(policy.attach):
        if each.program not in names:
            problems.add(
                f"spec.attach[{index}].program",
                f'"{each.program}"',
                why="the object has no program of that name",
                write=errors.did_you_mean(each.program, names, what="program"),
            )
        overrides.setdefault(each.program, []).append(each)
    made: list[Attached] = []
    for program in parsed.programs:
        section = observe_only.read_section(program.section)
        if isinstance(section, observe_only.Refusal):
            problems.add(path, f"{program.name}: {section.what}", why=section.why, write=section.write)
            continue
        for each in overrides.get(program.name, ()):
            if to_wire.kind_of(each.target) not in section.fits:
                problems.add(
                    f"spec.attach[{policy.attach.index(each)}]",
                    f'{to_wire.kind_of(each.target)} for a program of SEC("{program.section}")',
                    why="the kernel takes a program only where its type fits",
                    write=f"Write {' or '.join(section.fits)}, or change its SEC().",
                )
            made.append(Attached(each))
        if program.name in jumped_to:
            continue
        _check_several(program.name, overrides.get(program.name, ()), problems)
        if program.name not in overrides and section.target is not None and not section.optional:
            made.append(Attached(values.Attachment(program.name, section.target)))
        elif program.name not in overrides and not section.optional:
            problems.add(
                "spec.attach",
                f'nothing for {program.name}, whose SEC("{program.section}") names no target',
                why="it would never run",
                write=f"Write an attach entry with program: {program.name} and {' or '.join(section.fits)}, or a slot "
                "of tailCalls.",
            )
    return tuple(made)


def _check_several(program: str, attachments: Sequence[values.Attachment], problems: errors.Problems) -> None:
    """A program that is loaded for one target cannot have a second."""
    kinds = [to_wire.kind_of(each.target) for each in attachments]
    if len(kinds) > 1 and (bound := sorted({"tpBtf", "fentry", "fexit", "lsm"} & set(kinds))):
        problems.add(
            "spec.attach",
            f"{len(kinds)} targets for {program}",
            why=f"the kernel binds a program to its {bound[0]} target when it loads it, and to one only",
            write="Write the function once for each target, or take a kprobe.",
        )
    patterns = {isinstance(each.target, values.KprobePattern) for each in attachments}
    if len(patterns) > 1:
        problems.add(
            "spec.attach",
            f"functions and function for {program}",
            why="a program for a pattern is loaded in another way than one for a single function",
            write="Write functions in all of them (a name is a pattern, too), or use two programs.",
        )


def _resolved(
    asked: Sequence[values.Output], parsed: BpfObject, problems: errors.Problems
) -> tuple[values.Output, ...]:
    """The outputs, checked; or those that the maps suggest."""
    assert parsed.btf is not None
    maps = outputs.known_maps(parsed)
    if not asked:
        found = outputs.default_outputs(maps) or interval_outputs.default_outputs(parsed)
        if not found:
            problems.add(
                "spec.outputs",
                "missing",
                why="no map of the program holds numbers or records that BTF describes",
                write="Give a map a key and an integer value by __type(), or a ring buffer __type(value, struct …).",
            )
        return found
    iterators = interval_targets.iterators(parsed)
    made = [
        interval_outputs.resolve(output, parsed, f"spec.outputs[{index}]", problems)
        if output.map in iterators
        else outputs.resolve(output, maps, parsed, f"spec.outputs[{index}]", problems)
        for index, output in enumerate(asked)
    ]
    return tuple(output for output in made if output is not None)
