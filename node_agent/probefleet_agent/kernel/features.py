"""What this kernel can do, found out by trying. ``links`` asks before loading, ``doctor`` prints it.

Asked by capability, never by version. An answer is kept only when it is conclusive: a "no" that may come from missing
rights or a lack of memory is asked again next time.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from probefleet_wire.btf_types import Kind

from probefleet_agent.errors import KernelError, VerifierError
from probefleet_agent.kernel import btf_kernel, maps, syscall
from probefleet_agent.kernel.uapi import BPF_F_SLEEPABLE, AttachType, Command, MapType, ProgramType

PMUS = Path("/sys/bus/event_source/devices")
PERF_TYPE_SOFTWARE, SOFTWARE_CPU_CLOCK, SOFTWARE_DUMMY = 1, 0, 9
# The kernel's own, in net/bpf/test_run.c: there to be traced, and called by nobody else.
TEST_FUNCTION = "bpf_fentry_test1"
NO_INTERFACE = 0x7FFFFFFF
# mov r0, 0; exit
RETURN_ZERO = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
_NOT_CONCLUSIVE = frozenset({errno.EPERM, errno.EACCES, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EBUSY})


class _Unsure(Exception):
    """No answer this time."""


def _probe(question: Callable[[], bool]) -> Callable[[], bool]:
    """Keep a conclusive answer; where there is none, say no and ask again next time."""
    known: list[bool] = []

    @functools.wraps(question)
    def ask() -> bool:
        if not known:
            try:
                known.append(question())
            except _Unsure:
                return False
            except KernelError as error:
                if error.errno in _NOT_CONCLUSIVE:
                    return False
                known.append(False)
        return known[0]

    return ask


@_probe
def kprobes() -> bool:
    """Whether kprobes can be made by perf_event_open (Linux 4.17, CONFIG_KPROBES)."""
    return (PMUS / "kprobe" / "type").exists()


@_probe
def uprobes() -> bool:
    """Whether uprobes can be made by perf_event_open (Linux 4.17, CONFIG_UPROBES)."""
    return (PMUS / "uprobe" / "type").exists()


@_probe
def btf() -> bool:
    """Whether the kernel carries its types: tp_btf, trampolines and iterators need them. For CO-RE a file will do."""
    return btf_kernel.own()


@_probe
def perf_link() -> bool:
    """Whether tracepoints, probes and perf events attach by a link that can be pinned (Linux 5.15)."""
    with syscall.perf_event_open(
        PERF_TYPE_SOFTWARE, SOFTWARE_CPU_CLOCK, pid=0, period=1 << 40, disabled=True, what="probe for perf links"
    ) as event, syscall.prog_load(RETURN_ZERO, ProgramType.PERF_EVENT, name="pf_probe") as program:  # fmt: skip
        try:
            syscall.link_create(program, event, AttachType.PERF_EVENT).close()
        except KernelError as error:
            if error.errno in _NOT_CONCLUSIVE:
                raise _Unsure from error
            return False
    return True


@_probe
def ring_buffer() -> bool:
    """BPF_MAP_TYPE_RINGBUF (Linux 5.8)."""
    return _map(MapType.RINGBUF, 0, 0, 4096)


@_probe
def percpu_batch() -> bool:
    """Batch reading of per-CPU arrays (Linux 5.13)."""
    return _batch(MapType.PERCPU_ARRAY)


@_probe
def batch() -> bool:
    """Batch reading of hashes and arrays (Linux 5.6)."""
    return _batch(MapType.HASH)


@_probe
def tp_btf() -> bool:
    """Whether a tp_btf program loads: BTF, and a kernel that knows them (Linux 5.5)."""
    if not btf_kernel.own():
        return False
    found = btf_kernel.vmlinux().find("btf_trace_sys_enter", Kind.TYPEDEF)
    if found is None:
        return False
    return _loads(ProgramType.TRACING, expected_attach_type=AttachType.TRACE_RAW_TP, attach_btf_id=found)


@_probe
def fentry() -> bool:
    """Whether a function can be traced by a trampoline (Linux 5.5 on x86, CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS)."""
    if not btf_kernel.own():
        return False
    found = btf_kernel.vmlinux().find(TEST_FUNCTION, Kind.FUNC)
    if found is None:
        return False
    try:
        program = syscall.prog_load(
            RETURN_ZERO, ProgramType.TRACING, name="pf_probe", expected_attach_type=AttachType.TRACE_FENTRY,
            attach_btf_id=found,
        )  # fmt: skip
    except VerifierError:
        return False
    with program:
        syscall.raw_tracepoint_open(None, program).close()
    return True


@_probe
def kprobe_multi() -> bool:
    """Whether one link can probe many functions (Linux 5.18, CONFIG_FPROBE)."""
    with syscall.prog_load(
        RETURN_ZERO, ProgramType.KPROBE, name="pf_probe", expected_attach_type=AttachType.TRACE_KPROBE_MULTI
    ) as program:
        syscall.link_functions(program, [TEST_FUNCTION], on_return=False).close()
    return True


@_probe
def uprobe_multi() -> bool:
    """Whether one link can probe many places of a file (Linux 6.6)."""
    with syscall.prog_load(
        RETURN_ZERO, ProgramType.KPROBE, name="pf_probe", expected_attach_type=AttachType.TRACE_UPROBE_MULTI
    ) as program:
        try:
            syscall.link_places(program, "/", [(0, 0, 0)]).close()
        except KernelError as error:
            # Who knows the call looks at the path, and says that a folder is no file to probe.
            return error.errno == errno.EBADF
    return True


@_probe
def syscall_programs() -> bool:
    """Programs that user space runs when it likes (Linux 5.14)."""
    return _loads(ProgramType.SYSCALL, flags=BPF_F_SLEEPABLE)


@_probe
def tcx() -> bool:
    """Whether TC programs attach by links that share an interface (TCX, Linux 6.6)."""
    with syscall.prog_load(RETURN_ZERO, ProgramType.SCHED_CLS, name="pf_probe") as program:
        try:
            syscall.link_create(program, NO_INTERFACE, AttachType.TCX_INGRESS).close()
        except KernelError as error:
            # Who knows the call looks for the interface.
            return error.errno == errno.ENODEV
    return True


@_probe
def raw_tracepoints() -> bool:
    """Raw tracepoint programs (Linux 4.17)."""
    return _loads(ProgramType.RAW_TRACEPOINT)


@_probe
def cookies() -> bool:
    """bpf_get_attach_cookie() (Linux 5.15)."""
    # call bpf_get_attach_cookie (helper 174) on the context that is in r1
    call = struct.pack("<BBhi", 0x85, 0, 0, 174)
    return _loads(ProgramType.PERF_EVENT, instructions=call + RETURN_ZERO)


@_probe
def bpf_stats() -> bool:
    """Whether this process may turn on program statistics (Linux 5.8, CAP_SYS_ADMIN)."""
    syscall.enable_stats().close()
    return True


@_probe
def hardware_counters() -> bool:
    """Whether the processor's own counters can be used (in most virtual machines they cannot)."""
    syscall.perf_event_open(0, 0, pid=0, disabled=True, what="cpu-cycles").close()
    return True


def all_features() -> dict[str, bool]:
    """Every answer by name, for ``doctor`` and bug reports."""
    return {each.__name__: each() for each in _ALL}


_ALL = (
    btf, tp_btf, fentry, raw_tracepoints, kprobes, kprobe_multi, uprobes, uprobe_multi, perf_link, cookies,
    ring_buffer, batch, percpu_batch, bpf_stats, hardware_counters, tcx,
    syscall_programs,
)  # fmt: skip


def _loads(
    prog_type: int,
    *,
    expected_attach_type: int = 0,
    attach_btf_id: int = 0,
    instructions: bytes = RETURN_ZERO,
    flags: int = 0,
) -> bool:
    try:
        syscall.prog_load(
            instructions, prog_type, name="pf_probe", expected_attach_type=expected_attach_type,
            attach_btf_id=attach_btf_id, flags=flags,
        ).close()  # fmt: skip
    except VerifierError:
        return False
    return True


def _map(map_type: int, key_size: int, value_size: int, max_entries: int) -> bool:
    syscall.map_create(
        map_type, key_size=key_size, value_size=value_size, max_entries=max_entries, name="pf_probe"
    ).close()
    return True


def _batch(map_type: int) -> bool:
    with syscall.map_create(map_type, key_size=4, value_size=8, max_entries=1, name="pf_probe") as fd:
        key, position, value = (np.zeros(size, np.uint8) for size in (8, 8, 8 * maps.possible_cpus()))
        _, error = syscall.map_batch(
            Command.MAP_LOOKUP_BATCH, fd, keys=key.ctypes.data, values=value.ctypes.data, count=1,
            out_batch=position.ctypes.data,
        )  # fmt: skip
        return error in (0, errno.ENOENT)
