"""An instance of a compiled object (a catalog probe's, a policy's C, or an object as it is): loaded by libbpf.

Called by ``execute``, like ``bcc_programs`` and ``bpftrace_programs`` for theirs; what comes back is a ``Loaded`` like
any other. Before libbpf is given the bytes, our own reader has gone through them; what they may not do is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from probefleet_wire import btf_check, map_layout
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import Elf, ElfError
from probefleet_wire.observe_only import named_by_number, refused_helpers
from probefleet_wire.v1 import plan_pb2

from probefleet_agent import map_fit, observing, pinned_by_others, ways
from probefleet_agent.decode import Layout
from probefleet_agent.errors import NotObserving, ObjectError
from probefleet_agent.kernel import libbpf, links, maps
from probefleet_agent.kernel.uapi import ProgramType
from probefleet_agent.loaded import FILTER, Loaded, MapHandle

FILTER_ON = "probefleet_filter_on"


def load(
    instance: plan_pb2.Instance,
    blob: bytes,
    probe_maps: Mapping[str, MapHandle],
    *,
    budget_bytes: int,
    filter_on: bool,
    files_root: str = "",
    own: Mapping[str, MapHandle] = MappingProxyType({}),
) -> Loaded:
    """Read the object, judge it and load it; not yet attached. Raises ProbefleetError; then nothing of it is left.

    ``own``: maps of an earlier load, which are used once more.
    """
    try:
        parsed = _judged(instance.title, blob)
        return _load(instance, blob, parsed, probe_maps, budget_bytes, filter_on, files_root, own)
    except (ElfError, BtfError) as error:
        raise _unreadable(instance.title, error) from error


def _judged(title: str, blob: bytes) -> BpfObject:
    """The object, where libbpf may be given it and it only looks."""
    parsed, elf = BpfObject.parse(blob), Elf.parse(blob)
    btf_check.check(elf)
    code = b"".join(section.data for section in elf.sections if section.executable)
    if helpers := refused_helpers(code):
        raise NotObserving(title, helpers)
    if numbers := named_by_number(code):
        raise NotObserving.because(title, f"it names {', '.join(numbers)}: that could be anybody's")
    return parsed


def _load(
    instance: plan_pb2.Instance,
    blob: bytes,
    parsed: BpfObject,
    probe_maps: Mapping[str, MapHandle],
    budget_bytes: int,
    filter_on: bool,
    files_root: str,
    own: Mapping[str, MapHandle],
) -> Loaded:
    with pinned_by_others.opened(instance) as foreign:
        shared = {each.map: probe_maps[each.probe_map_uid] for each in instance.shared_maps} | foreign
        sizes = {size.map: size.max_entries for size in instance.map_sizes}
        map_fit.check_budget(parsed.all_maps, sizes, frozenset(shared) | frozenset(own), budget_bytes)
        map_fit.check_numa(parsed.all_maps)
        sections = {program.name: program.section for program in parsed.programs}
        chosen = _choose(instance.attachments, sections, instance.title, files_root)

        def configure(opened: libbpf.Object) -> None:
            _configure(opened, instance, chosen, filter_on)

        for name, handle in shared.items():
            definition = parsed.map(name)
            layout = map_layout.layout_of(parsed, definition) if definition else None
            map_fit.check_fit(definition, layout, handle, instance.title)
        pinned_by_others.prove_read_only(blob, instance, parsed, foreign, configure)
        with libbpf.open_object(blob, instance.title) as opened:
            configure(opened)
            for name, handle in {**own, **shared}.items():
                opened.reuse_map(name, handle.fd)
            loading = [program for program in opened.program_names if opened.autoload(program)]
            types = {each: opened.program_type(each)[0] for each in loading}
            observing.check(instance.title, blob, types)
            for name, handle in shared.items():
                callers = {each.name for each in parsed.callers(name)}
                kinds = {each: kind for each, kind in types.items() if each in callers}
                map_fit.check_jumps(name, handle, kinds, instance.title)
            opened.load()
            return _taken(opened, instance, parsed, shared, chosen)


def parse(blob: bytes, title: str) -> BpfObject:
    """The object as our own reader sees it. Raises ObjectError."""
    try:
        return BpfObject.parse(blob)
    except (ElfError, BtfError) as error:
        raise _unreadable(title, error) from error


def _unreadable(title: str, error: Exception) -> ObjectError:
    return ObjectError(f"{title} is not a BPF object that can be read: {error}")


def record_layout(blob: bytes, title: str, name: str) -> Layout | None:
    """How records of a struct are read that the object has and no map of it names."""
    return _struct(parse(blob, title), name)


def _choose(
    attachments: Sequence[plan_pb2.Attachment], sections: Mapping[str, str], title: str, files_root: str
) -> list[plan_pb2.Attachment]:
    """Those that this kernel can attach; of alternatives the first way all of whose members it has."""
    refusals: list[ways.Refusal] = []
    for attachment in attachments:
        if attachment.program not in sections:
            there = ", ".join(sections) or "none"
            raise ObjectError(f"{title}: attach names program {attachment.program!r}; the object has: {there}")
        section = sections[attachment.program]
        refusals.append(links.supported(attachment, program_section=section, root=files_root))
    return ways.choose(attachments, refusals, title)


def _configure(
    opened: libbpf.Object,
    instance: plan_pb2.Instance,
    chosen: Sequence[plan_pb2.Attachment],
    filter_on: bool,
) -> None:
    """Everything that is set before an object is loaded, but for shared maps."""
    sections = {program: opened.section(program) for program in opened.program_names}
    wanted = {attachment.program for attachment in chosen} | set(instance.tail_programs)
    for program in opened.program_names:
        opened.set_autoload(program, program in wanted)
    types = links.program_types(chosen, sections)
    for attachment in chosen:
        opened.set_type(attachment.program, *types[attachment.program])
        if target := links.bound_to(attachment):
            opened.set_attach_target(attachment.program, target)
    for program in instance.tail_programs:
        _like_its_callers(opened, program, chosen, types)
    for parameter in instance.parameters:
        opened.set_rodata(parameter.variable, parameter.value)
    if FILTER in opened.map_names and filter_on:
        opened.set_rodata(FILTER_ON, b"\x01")
    for size in instance.map_sizes:
        opened.set_max_entries(size.map, size.max_entries)


def _like_its_callers(
    opened: libbpf.Object,
    program: str,
    chosen: Sequence[plan_pb2.Attachment],
    types: Mapping[str, tuple[int, int]],
) -> None:
    """What others jump to is of their type, where its SEC() does not say more (a place binds no kprobe program)."""
    kind, _ = opened.program_type(program)
    section = opened.section(program)
    for caller in chosen:
        caller_kind, attach_type = types[caller.program]
        if kind in (0, caller_kind) and (kind == ProgramType.KPROBE or "/" not in section):
            opened.set_type(program, caller_kind, attach_type)
            if target := links.bound_to(caller):
                opened.set_attach_target(program, target)
            return
    if section.removeprefix("?").split("/")[0] in ("uprobe", "uretprobe"):
        # Who jumps to it is another policy's, and was loaded as what is attached to functions of user space is.
        opened.set_type(program, *links.program_type(plan_pb2.Attachment(uprobe=plan_pb2.Uprobe())))


def _taken(
    opened: libbpf.Object,
    instance: plan_pb2.Instance,
    parsed: BpfObject,
    shared: Mapping[str, MapHandle],
    chosen: Sequence[plan_pb2.Attachment],
) -> Loaded:
    """What is loaded, as descriptors of our own."""
    definitions = {definition.name: definition for definition in parsed.all_maps}
    sections = {program: opened.section(program) for program in opened.program_names}
    loaded = Loaded(instance, {}, {}, sections, chosen=list(chosen))
    loaded.record_layouts = _record_layouts(parsed, chosen)
    try:
        for name in (*opened.map_names, *(each for each in opened.section_names if each in definitions)):
            fd = opened.map_fd(name)
            made = MapHandle(name, fd, maps.info(fd), map_layout.layout_of(parsed, definitions[name]))
            if theirs := shared.get(name):
                made.probe_map_uid, made.heir_of, made.since_ns = theirs.probe_map_uid, theirs.heir_of, theirs.since_ns
            loaded.maps[name] = made
        for program in opened.program_names:
            if opened.autoload(program):
                loaded.programs[program] = opened.program_fd(program)
    except BaseException:
        loaded.close()
        raise
    return loaded


def _record_layouts(parsed: BpfObject, chosen: Sequence[plan_pb2.Attachment]) -> dict[str, Layout]:
    """How the structs that iterators write are read; as a key too, for a gauge groups by their fields."""
    found: dict[str, Layout] = {}
    for attachment in chosen:
        if attachment.iterator.record and (layout := _struct(parsed, attachment.iterator.record)):
            found[attachment.program] = layout
    return found


def _struct(parsed: BpfObject, name: str) -> Layout | None:
    named = parsed.btf.find(name) if parsed.btf else None
    if named is None or parsed.btf is None:
        return None
    fields, size = parsed.btf.layout_of(named), parsed.btf.size_of(named)
    return Layout(fields, size, fields, size)
