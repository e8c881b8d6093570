"""Attach to static probes of user space (USDT), so that programs written for libbpf's usdt.bpf.h work unchanged.

Such a program reads its arguments through two maps of its own: ``__bpf_usdt_specs`` says where each argument is, and
the attachment's cookie (before Linux 5.15: ``__bpf_usdt_ip_to_spec_id``, by the instruction's address) says which
entry holds. libbpf fills them when it attaches; here we do. The maps are found by the program itself, and an entry that
says the same is taken again, so that attaching anew after a restart needs nothing remembered.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

from probefleet_wire.btf import Btf

from probefleet_agent.errors import KernelError, NoSuchTarget, ObjectError, UnsupportedFeature
from probefleet_agent.kernel import btf_kernel, elf_file, features, symbols, syscall, targets, usdt, user_files
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.link import Attachment, Kind, Link, on_events
from probefleet_agent.kernel.uapi import AttachType, ProgramType

# The kernel keeps 15 characters of a map's name.
_SPECS, _BY_ADDRESS = "__bpf_usdt_specs"[:15], "__bpf_usdt_ip_to_spec_id"[:15]
# PERF_UPROBE_REF_CTR_OFFSET_SHIFT: where in perf_event_attr.config the semaphore's place goes.
_SEMAPHORE_SHIFT = 32


def _type(_attachment: Attachment, _section: str) -> tuple[int, int]:
    # libbpf from 1.3 on loads SEC("usdt") programs so by itself wherever the kernel can.
    return ProgramType.KPROBE, AttachType.TRACE_UPROBE_MULTI if features.uprobe_multi() else AttachType.NONE


def _rooted(attachment: Attachment, root: str) -> Attachment:
    if attachment.usdt.pods:
        return attachment
    moved = Attachment()
    moved.CopyFrom(attachment)
    moved.usdt.path = user_files.locate(attachment.usdt.path, root)
    return moved


def _check(attachment: Attachment, _section: str) -> None:
    if not features.uprobes():
        raise UnsupportedFeature("uprobes", "4.17", "it was built without CONFIG_UPROBES, or is too old")
    if attachment.usdt.pods:
        return  # each pod has a file of its own: what it lacks is said when it is there
    places, is_fixed = _places(attachment)
    if not features.cookies() and not is_fixed and not attachment.usdt.pid and any(each.arguments for each in places):
        why = "without attach cookies the arguments of a file that is loaded anywhere are known for one process only"
        raise UnsupportedFeature("attach cookies", "5.15", f"{why}; write pid")


def _places(attachment: Attachment) -> tuple[list[usdt.Place], bool]:
    """Where the probe is, and whether the file is loaded where its addresses say."""
    wanted = attachment.usdt
    try:
        with elf_file.open_file(Path(wanted.path)) as elf:
            everything, is_fixed = usdt.places(elf), elf.is_fixed
    except FileNotFoundError as error:
        raise NoSuchTarget(f"file {wanted.path}", where="on this node") from error
    except (OSError, elf_file.NotElf) as error:
        raise NoSuchTarget(
            f"probe {wanted.provider}:{wanted.name}", why=str(error), where=f"in {wanted.path}"
        ) from error
    found = [each for each in everything if (each.provider, each.name) == (wanted.provider, wanted.name)]
    if not found:
        raise usdt.near(everything, wanted.provider, wanted.name, wanted.path)
    return found, is_fixed


def _usdt(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    wanted = attachment.usdt
    places, is_fixed = _places(attachment)
    many = f" ({len(places)} places)" if len(places) > 1 else ""
    way = f"usdt {wanted.path}:{wanted.provider}:{wanted.name}{many}"
    with _Specs(prog_fd) as specs:
        cookies = [specs.number(usdt.arguments_of(each) if specs.wanted else ()) for each in places]
        if specs.wanted and not features.cookies():
            moved = 0 if is_fixed else _loaded_at(wanted.path, wanted.pid, places[0])
            for place, cookie in zip(places, cookies, strict=True):
                specs.set_address(place.address + moved, cookie)
    if features.uprobe_multi():
        rows = [(each.offset, each.semaphore_offset, cookie) for each, cookie in zip(places, cookies, strict=True)]
        try:
            return Link((syscall.link_places(prog_fd, wanted.path, rows, pid=wanted.pid),), True, way)
        except KernelError as error:
            if error.errno == errno.ESRCH:
                raise NoSuchTarget(f"process {wanted.pid} to probe") from error
            if error.errno != errno.EINVAL:  # the program is attached to something else as well
                raise
    return _one_by_one(prog_fd, wanted.path, wanted.pid, places, cookies, way)


def _one_by_one(
    prog_fd: SupportsIndex, path: str, pid: int, places: Sequence[usdt.Place], cookies: Sequence[int], way: str
) -> Link:
    pmu = targets.pmu("uprobe", "uprobes")
    process, cpu = (pid, -1) if pid > 0 else (-1, 0)
    made: list[Link] = []
    try:
        for place, cookie in zip(places, cookies, strict=True):
            event = syscall.perf_event_open(
                pmu.type, place.semaphore_offset << _SEMAPHORE_SHIFT, pid=process, cpu=cpu, config1=path.encode(),
                config2=place.offset, what=way,
            )  # fmt: skip
            made.append(on_events(prog_fd, [event], way, cookie=cookie))
    except BaseException as error:
        for link in made:
            link.close()
        if isinstance(error, KernelError) and error.errno == errno.ESRCH:
            raise NoSuchTarget(f"process {pid} to probe") from error
        raise
    fds = tuple(fd for link in made for fd in link.fds)
    return Link(fds, made[0].pinnable, way, tuple(fd for link in made for fd in link.keeps))


def _loaded_at(path: str, pid: int, place: usdt.Place) -> int:
    """How far from its linked addresses a process has loaded the file."""
    name = Path(path).resolve().name
    try:
        mappings = symbols.executable_mappings(Path(f"/proc/{pid}/maps").read_text(errors="replace"))
    except OSError as error:
        raise NoSuchTarget(f"process {pid} to probe") from error
    for each in mappings:
        if Path(each.path).name == name and each.offset <= place.offset < each.offset + each.end - each.start:
            return each.start + place.offset - each.offset - place.address
    raise NoSuchTarget(f"mapping of {path} in process {pid}")


class _Specs:
    """The two maps of a program that reads arguments; ``wanted`` is False for one that reads none."""

    def __init__(self, prog_fd: SupportsIndex) -> None:
        self._maps: dict[str, Fd] = {}
        for number in syscall.program_info(prog_fd).map_ids:
            fd = syscall.fd_by_id("map", number)
            name = syscall.map_info(fd).name
            if name in (_SPECS, _BY_ADDRESS):
                self._maps[name] = fd
            else:
                fd.close()
        self.wanted = _SPECS in self._maps
        if self.wanted:
            self._info = syscall.map_info(self._maps[_SPECS])
            with syscall.fd_by_id("btf", self._info.btf_id) as btf:
                self._layout = _Layout(btf_kernel.for_fd(btf), self._info.btf_value_type_id)

    def __enter__(self) -> _Specs:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._maps.values():
            fd.close()

    def number(self, arguments: tuple[usdt.Argument, ...]) -> int:
        """The entry that says this; entry 0 stays empty, for probes without arguments."""
        if not arguments:
            return 0
        wanted = self._layout.pack(arguments, self._info.value_size)
        for number in range(1, self._info.max_entries):
            key = struct.pack("<I", number)
            there = syscall.map_lookup(self._maps[_SPECS], key, self._info.value_size)
            if there is not None and not any(there):
                syscall.map_update(self._maps[_SPECS], key, wanted)
                return number
            if there == wanted:
                return number
        raise ObjectError(
            f"more than {self._info.max_entries} different argument lists of USDT probes: "
            "define BPF_USDT_MAX_SPEC_CNT before #include <bpf/usdt.bpf.h>"
        )

    def set_address(self, address: int, number: int) -> None:
        """Before Linux 5.15: which entry holds where."""
        if _BY_ADDRESS in self._maps:
            syscall.map_update(self._maps[_BY_ADDRESS], struct.pack("<Q", address), struct.pack("<I", number))


class _Layout:
    """Writes ``struct __bpf_usdt_spec`` as the program's own BTF lays it out: it differs between versions of libbpf."""

    def __init__(self, btf: Btf, type_id: int) -> None:
        spec = btf.struct(type_id)
        self._spec = {each.name: each for each in spec.members}
        array = btf.dtype_of(self._spec["args"].type)
        self._each_bytes = array.base.itemsize
        inner = btf.find("__bpf_usdt_arg_spec")
        if inner is None:
            raise ObjectError("the program's types do not describe struct __bpf_usdt_arg_spec")
        self._sizes = {
            each.name: each.bitfield_bits or btf.size_of(each.type) * 8 for each in btf.struct(inner).members
        }
        self._bits = {each.name: each.bit_offset for each in btf.struct(inner).members}

    def pack(self, arguments: tuple[usdt.Argument, ...], size_bytes: int) -> bytes:
        """The entry's bytes."""
        made = 0
        for number, each in enumerate(arguments):
            at = self._spec["args"].bit_offset + number * self._each_bytes * 8
            for name, value in (
                ("val_off", each.value),
                ("arg_type", int(each.where)),
                ("reg_off", each.register_offset),
                ("arg_signed", int(each.signed)),
                ("arg_bitshift", 64 - each.size_bytes * 8),
            ):
                made |= (value & ((1 << self._sizes[name]) - 1)) << at + self._bits[name]
        made |= len(arguments) << self._spec["arg_cnt"].bit_offset
        return made.to_bytes(size_bytes, "little")


KINDS = {"usdt": Kind(_type, _check, _usdt, rooted=_rooted)}
