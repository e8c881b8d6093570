"""Attach to functions of the kernel by kprobes, one or all that fit a pattern, and to system calls by name."""

from __future__ import annotations

import errno
from typing import SupportsIndex

from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import KernelError, NoSuchTarget, UnsupportedFeature
from probefleet_agent.kernel import features, kernel_functions, links_trace, syscall, targets
from probefleet_agent.kernel.link import Attachment, Kind, Link, always, on_events
from probefleet_agent.kernel.uapi import AttachType, ProgramType

#: Without kprobe.multi each function takes a perf event and a link, and some milliseconds to attach.
MAX_ONE_BY_ONE = 1000


def _need_kprobes() -> None:
    if not features.kprobes():
        raise UnsupportedFeature("kprobes", why="it was built without CONFIG_KPROBES; take a tracepoint or tp_btf")


def _check_kprobe(attachment: Attachment, _section: str) -> None:
    _need_kprobes()
    targets.check_function(attachment.kprobe.function)


def _kprobe(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    wanted = attachment.kprobe
    return _probe(prog_fd, wanted.function, wanted.offset, wanted.on_return)


def _probe(prog_fd: SupportsIndex, function: str, offset: int, on_return: bool) -> Link:
    way = f"{'kretprobe' if on_return else 'kprobe'} {function}" + (f"+{offset:#x}" if offset else "")
    pmu = targets.pmu("kprobe", "kprobes")
    targets.check_function(function)
    try:
        event = syscall.perf_event_open(
            pmu.type, pmu.on_return if on_return else 0, cpu=0, config1=function.encode(), config2=offset, what=way
        )
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EADDRNOTAVAIL, errno.EILSEQ):
            why = "the kernel does not allow a probe there (it is inlined, notrace, or on the blacklist)"
            raise NoSuchTarget(f"function {function} to probe", targets.near_functions(function), why) from error
        raise
    return on_events(prog_fd, [event], way)


def _pattern_type(_attachment: Attachment, _section: str) -> tuple[int, int]:
    return ProgramType.KPROBE, AttachType.TRACE_KPROBE_MULTI if features.kprobe_multi() else AttachType.NONE


def _check_pattern(attachment: Attachment, _section: str) -> None:
    pattern = attachment.kprobe_pattern.pattern
    if not features.kprobe_multi():
        _need_kprobes()
    count = len(kernel_functions.matching(pattern))
    if count > MAX_ONE_BY_ONE and not features.kprobe_multi():
        why = f"{pattern} fits {count:,} functions, and one by one at most {MAX_ONE_BY_ONE:,} are probed. Narrow it"
        raise UnsupportedFeature("kprobe.multi", "5.18", why)


def _kprobe_pattern(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    wanted = attachment.kprobe_pattern
    names = kernel_functions.matching(wanted.pattern)
    word = "kretprobe" if wanted.on_return else "kprobe"
    if features.kprobe_multi():
        many = syscall.link_functions(prog_fd, names, on_return=wanted.on_return)
        return Link((many,), True, f"{word}.multi {wanted.pattern} ({len(names):,} functions)")
    made: list[Link] = []
    refused = 0
    try:
        for name in names:
            try:
                made.append(_probe(prog_fd, name, 0, wanted.on_return))
            except NoSuchTarget:
                refused += 1  # tracefs does not list what kprobes alone may not touch
    except BaseException:
        for link in made:
            link.close()
        raise
    if not made:
        raise NoSuchTarget(f"function that fits {wanted.pattern} and can be probed")
    way = f"{word} {wanted.pattern} ({len(made):,} functions" + (f", {refused:,} cannot be probed)" if refused else ")")
    fds = tuple(fd for link in made for fd in link.fds)
    return Link(fds, made[0].pinnable, way, tuple(fd for link in made for fd in link.keeps))


def _by_kprobe(section: str) -> bool:
    """Whether a program on a system call reads a kprobe's arguments."""
    return section.split("/")[0] in ("kprobe", "kretprobe", "ksyscall", "kretsyscall")


def _syscall_type(_attachment: Attachment, section: str) -> tuple[int, int]:
    return (ProgramType.KPROBE if _by_kprobe(section) else ProgramType.TRACEPOINT), AttachType.NONE


def _check_syscall(attachment: Attachment, section: str) -> None:
    if _by_kprobe(section):
        _need_kprobes()
    _syscall_target(attachment.syscall, kprobe=_by_kprobe(section))


def _syscall(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    wanted = attachment.syscall
    if syscall.program_info(prog_fd).type == ProgramType.KPROBE:
        return _probe(prog_fd, _syscall_target(wanted, kprobe=True), 0, wanted.on_return)
    return links_trace.trace(prog_fd, "syscalls", _syscall_target(wanted, kprobe=False))


def _syscall_target(wanted: plan_pb2.Syscall, *, kprobe: bool) -> str:
    """The tracepoint, or the function, of a system call."""
    if kprobe:
        return targets.syscall_function(wanted.name)
    name = f"sys_{'exit' if wanted.on_return else 'enter'}_{wanted.name}"
    targets.tracepoint_id("syscalls", name)
    return name


KINDS = {
    "kprobe": Kind(always(ProgramType.KPROBE), _check_kprobe, _kprobe),
    "kprobe_pattern": Kind(_pattern_type, _check_pattern, _kprobe_pattern),
    "syscall": Kind(_syscall_type, _check_syscall, _syscall),
}
