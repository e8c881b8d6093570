"""An instance of BCC's dialect: compiled in a sandboxed child, linked to our own maps, loaded by our own gate.

Called by ``execute`` for instances with ``bcc``; what comes back is a ``Loaded`` like any other: pinned, adopted,
shared, read and removed the same way. Where the policy names no attachments, the functions' names say them
(``tracepoint__…``, ``kprobe__…``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType
from typing import SupportsIndex

from probefleet_wire.observe_only import refused_helpers
from probefleet_wire.v1 import plan_pb2

from probefleet_agent import map_fit
from probefleet_agent.decode import Layout
from probefleet_agent.errors import KernelError, NotObserving, ObjectError, VerifierError
from probefleet_agent.kernel import bcc, bcc_source, btf_kernel, links, maps, syscall, verifier_log
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.loaded import Loaded, MapHandle


def load(
    instance: plan_pb2.Instance,
    probe_maps: Mapping[str, MapHandle],
    budget_bytes: int,
    files_root: str = "",
    known: bcc.Known | None = None,
    own: Mapping[str, MapHandle] = MappingProxyType({}),
) -> Loaded:
    """Compile and load; not yet attached. Raises ProbefleetError; then nothing of it is left.

    ``own``: maps of an earlier load, which are used once more.
    """
    program = bcc.compile(instance.bcc.source, name=instance.bcc.file_name, known=known)
    shared = {each.map: probe_maps[each.probe_map_uid] for each in instance.shared_maps}
    sizes = {size.map: size.max_entries for size in instance.map_sizes}
    for name in (*shared, *sizes):
        if name not in {each.name for each in program.maps}:
            there = ", ".join(each.name for each in program.maps) or "none"
            raise ObjectError(f"{instance.title}: maps names {name!r}; the program has: {there}")
    definitions = [each.definition for each in program.maps]
    map_fit.check_budget(definitions, sizes, frozenset(shared) | frozenset(own), budget_bytes)
    if helpers := refused_helpers(b"".join(function.instructions for function in program.functions)):
        raise NotObserving(instance.title, helpers)
    chosen = _attachments(instance, program)
    for attachment in chosen:
        refusal = links.supported(attachment, program_section=_section(instance, attachment), root=files_root)
        if refusal is not None:
            raise refusal
    loaded = Loaded(instance, {}, {}, {a.program: _section(instance, a) for a in chosen}, chosen=chosen)
    with contextlib.ExitStack() as undo:
        undo.callback(loaded.close)
        with syscall.btf_load(program.btf_bytes) as btf:
            # A map of maps is made in the likeness of one that is there.
            for each in sorted(program.maps, key=lambda each: bool(each.inner)):
                if each.name in own:
                    loaded.maps[each.name] = replace(own[each.name], fd=own[each.name].fd.dup())
                    continue
                inner = loaded.maps[each.inner].fd if each.inner else 0
                size = sizes.get(each.name, 0)
                loaded.maps[each.name] = _map(each, shared.get(each.name), size, btf, inner, instance.title)
            fds = {name: handle.fd for name, handle in loaded.maps.items()}
            functions = {function.name: function for function in program.functions}
            types = links.program_types(chosen, {each.program: _section(instance, each) for each in chosen})
            for attachment in chosen:
                if attachment.program not in loaded.programs:
                    function, kind = functions[attachment.program], types[attachment.program]
                    loaded.programs[function.name] = _program(function, attachment, kind, program, fds, btf)
            named = {name for each in instance.tail_calls for name in each.entries.values()}
            for name in sorted(_jumped_to(instance, program, named) - loaded.programs.keys()):
                caller = _caller(name, instance, functions, chosen)
                try:
                    made = _program(functions[name], caller, types[caller.program], program, fds, btf)
                except VerifierError:
                    if name in named:
                        raise
                    continue  # of another type, it seems: nobody has asked for it
                loaded.programs[name], loaded.sections[name] = made, _section(instance, caller)
        undo.pop_all()
    return loaded


def _jumped_to(instance: plan_pb2.Instance, program: bcc.BccProgram, named: Set[str]) -> Set[str]:
    """What ``tail_calls`` names, and the functions that an edit could name: those that take a context alone."""
    if not instance.tail_calls:
        return set()
    there = {function.name for function in program.functions}
    return there & named | {each for each in there if bcc_source.takes_a_context(instance.bcc.source, each)}


def _caller(
    name: str,
    instance: plan_pb2.Instance,
    functions: Mapping[str, bcc.BccFunction],
    chosen: Sequence[plan_pb2.Attachment],
) -> plan_pb2.Attachment:
    """An attached function that jumps to this one, for both have to be of one type; any, where none does yet."""
    arrays = {each.map for each in instance.tail_calls if name in each.entries.values()}

    def jumps(attachment: plan_pb2.Attachment) -> bool:
        return any(table in arrays for _, table in functions[attachment.program].references)

    return next((each for each in chosen if jumps(each)), chosen[0])


def _attachments(instance: plan_pb2.Instance, program: bcc.BccProgram) -> list[plan_pb2.Attachment]:
    there = {function.name for function in program.functions}
    if instance.attachments:
        for attachment in instance.attachments:
            if attachment.program not in there:
                names = ", ".join(sorted(there)) or "none"
                raise ObjectError(f"{instance.title}: attach names program {attachment.program!r}; there is: {names}")
        return list(instance.attachments)
    found = [each for function in program.functions if (each := _attachment(function)) is not None]
    if not found:
        raise ObjectError(
            f"{instance.title}: nothing says where its functions go. Name them as BCC does (kprobe__FUNCTION, "
            "TRACEPOINT_PROBE(category, name), raw_tracepoint__NAME), or write spec.attach."
        )
    return found


def _attachment(function: bcc.BccFunction) -> plan_pb2.Attachment | None:
    hint = function.hint
    attachment = plan_pb2.Attachment(program=function.name)
    if hint.kind in ("kprobe", "kretprobe"):
        attachment.kprobe.function, attachment.kprobe.on_return = hint.target, hint.kind == "kretprobe"
    elif hint.kind == "tracepoint":
        attachment.tracepoint.category, attachment.tracepoint.name = hint.category, hint.target
    elif hint.kind == "raw_tracepoint":
        attachment.raw_tracepoint.name = hint.target
    elif hint.kind == "syscall":
        attachment.syscall.name = hint.target
    elif hint.kind in ("fentry", "fexit"):
        attachment.fentry.function, attachment.fentry.on_return = hint.target, hint.kind == "fexit"
    elif hint.kind == "lsm":
        attachment.lsm.hook = hint.target
    else:
        return None
    return attachment


def _section(instance: plan_pb2.Instance, attachment: plan_pb2.Attachment) -> str:
    """What SEC() would say. It decides for ``syscall`` targets only: a function named ``kprobe__…`` or ``syscall__…``,
    or whose context is ``struct pt_regs``, reads registers; any other gets the tracepoint's record.
    """
    hint = bcc_source.hint_of(attachment.program)
    if hint.kind == "syscall" or (
        not hint.kind and bcc_source.reads_registers(instance.bcc.source, attachment.program)
    ):
        return "kprobe"
    return hint.kind


def _map(
    each: bcc.BccMap, shared: MapHandle | None, max_entries: int, btf: Fd, inner: SupportsIndex, title: str
) -> MapHandle:
    definition = each.definition
    layout = _layout(each)
    if shared is not None:
        map_fit.check_fit(definition, layout, shared, title)
        return replace(shared, name=each.name, fd=shared.fd.dup(), layout=shared.layout or layout)
    typed = each.takes_btf
    fd = syscall.map_create(
        definition.type,
        key_size=definition.key_bytes,
        value_size=definition.value_bytes,
        max_entries=max_entries or definition.max_entries,
        name=each.name,
        flags=definition.flags,
        inner_map_fd=inner,
        btf_fd=btf if typed else 0,
        btf_key_type_id=definition.key_type if typed else 0,
        btf_value_type_id=definition.value_type if typed else 0,
    )
    return MapHandle(each.name, fd, maps.info(fd), layout)


def _layout(each: bcc.BccMap) -> Layout | None:
    if each.record:
        return Layout((), 0, each.record, each.record_bytes)
    if not each.value:
        return None
    return Layout(each.key, each.definition.key_bytes, each.value, each.definition.value_bytes)


def _program(
    function: bcc.BccFunction,
    attachment: plan_pb2.Attachment,
    kinds: tuple[int, int],
    program: bcc.BccProgram,
    fds: Mapping[str, Fd],
    btf: Fd,
) -> Fd:
    kind, attach_type = kinds
    attach_btf_id = 0
    if name := links.btf_name(attachment):
        attach_btf_id = btf_kernel.vmlinux().require(name)
    load = functools.partial(
        syscall.prog_load,
        function.linked(fds),
        kind,
        licence=program.licence,
        name=function.name,
        expected_attach_type=attach_type,
        attach_btf_id=attach_btf_id,
        kernel_version=program.kernel_version,
    )
    (functions, function_bytes), (lines, line_bytes) = function.function_records, function.line_records
    if not lines:
        return load()
    try:
        return load(
            btf_fd=btf,
            func_info=functions,
            func_info_record_bytes=function_bytes,
            line_info=lines,
            line_info_record_bytes=line_bytes,
        )
    except VerifierError as error:
        if not verifier_log.has_instructions(error.log):
            return load()  # it is the lines that this kernel does not take
        raise verifier_log.refusal(
            error.log, function.name, lambda instruction: ("", function.line_of(instruction))
        ) from error
    except KernelError:
        return load()
