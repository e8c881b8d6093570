"""Can this machine run probes, and if not, what is to be changed? A list of checks for people.

``probefleet doctor`` prints it, the agent logs what is not ok at its start. Each check stands alone: one that goes
wrong itself is reported as failed, never raised.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from probefleet_wire import sandbox

from probefleet_agent.errors import KernelError, ProbefleetError, UnsupportedFeature
from probefleet_agent.kernel import bpftrace, btf_kernel, cgroups, features, libbpf, mounts, symbols, syscall

_CAPABILITIES = {
    "DAC_READ_SEARCH": 2, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_RESOURCE": 24, "SYSLOG": 34, "PERFMON": 38, "BPF": 39,
}  # fmt: skip


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, how it is, and what to do."""

    name: str
    level: Level
    detail: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        """Nothing to do."""
        return self.level is Level.OK


def checks() -> list[Check]:
    """All checks, in the order in which a person would fix them."""
    return [_run(name, check) for name, check in _CHECKS.items()]


def worst(found: list[Check]) -> Level:
    """The exit status is made from it."""
    levels = {check.level for check in found}
    return next((level for level in (Level.FAIL, Level.WARN) if level in levels), Level.OK)


def _run(name: str, check: Callable[[], tuple[Level, str, str]]) -> Check:
    try:
        return Check(name, *check())
    except (ProbefleetError, OSError, ValueError) as error:
        return Check(name, Level.FAIL, str(error))


def _ok(detail: str) -> tuple[Level, str, str]:
    return Level.OK, detail, ""


def _kernel() -> tuple[Level, str, str]:
    detail = f"Linux {platform.release()} on {platform.machine()}, {os.cpu_count()} CPUs"
    if platform.machine() not in ("x86_64", "aarch64"):
        return Level.FAIL, detail, "Probefleet runs on x86_64 and aarch64."
    return _ok(detail)


def _capabilities() -> tuple[Level, str, str]:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    mask = int(line.split()[1], 16)
    have = {name for name, bit in _CAPABILITIES.items() if mask >> bit & 1}
    missing = sorted(set(_CAPABILITIES) - have)
    detail = "has " + (", ".join(f"CAP_{name}" for name in sorted(have)) or "none")
    if "SYS_ADMIN" not in have and not {"BPF", "PERFMON"} <= have:
        return Level.FAIL, detail, "Run as root, or give the process CAP_BPF and CAP_PERFMON."
    if "SYS_ADMIN" not in have:
        return Level.WARN, detail, "Without CAP_SYS_ADMIN the cost of programs is unknown, and nothing can be mounted."
    if {"SYSLOG", "SYS_PTRACE"} & set(missing):
        absent = ", ".join(f"CAP_{name}" for name in missing)
        return Level.WARN, f"{detail}; lacks {absent}", "Kernel and other processes' stacks will have no names."
    return _ok(detail)


def _bpffs() -> tuple[Level, str, str]:
    if mounts.is_bpffs(mounts.BPFFS):
        return _ok(f"mounted at {mounts.BPFFS}")
    return Level.FAIL, f"not mounted at {mounts.BPFFS}", f"mount -t bpf bpf {mounts.BPFFS}"


def _tracefs() -> tuple[Level, str, str]:
    found = mounts.tracefs()
    if found:
        return _ok(f"mounted at {found}")
    return Level.FAIL, "not mounted: tracepoints cannot be found", f"mount -t tracefs tracefs {mounts.TRACEFS}"


def _btf() -> tuple[Level, str, str]:
    if not btf_kernel.available():
        return (
            Level.FAIL,
            f"{btf_kernel.file()} is not there",
            "Use a kernel built with CONFIG_DEBUG_INFO_BTF=y, or give a file of its types: docs/distributions.md.",
        )
    if not btf_kernel.own():
        try:
            types = len(btf_kernel.vmlinux())
        except UnsupportedFeature as error:
            return Level.FAIL, str(error), "Put the file that was made of this very kernel there."
        return (
            Level.WARN,
            f"{types:,} types of {btf_kernel.file()}; the kernel carries none",
            "No tp_btf, fentry, LSM hooks and iterators: take tracepoints, raw tracepoints, kprobes.",
        )
    return _ok(f"{len(btf_kernel.vmlinux()):,} types, {len(btf_kernel.raw_tracepoints()):,} tracepoints")


def _jit() -> tuple[Level, str, str]:
    path = Path("/proc/sys/net/core/bpf_jit_enable")
    if not path.exists():
        return _ok("always on")
    if path.read_text().strip() == "0":
        return Level.WARN, "off: programs are interpreted, several times slower", "sysctl net.core.bpf_jit_enable=1"
    return _ok("on")


def _lockdown() -> tuple[Level, str, str]:
    path = Path("/sys/kernel/security/lockdown")
    if not path.exists():
        return _ok("none")
    text = path.read_text().strip()
    mode = text.partition("[")[2].partition("]")[0]
    if mode == "confidentiality":
        advice = "Boot without lockdown=confidentiality: it forbids programs to read kernel memory."
        return Level.FAIL, mode, advice
    return _ok(mode or text)


def _paranoid() -> tuple[Level, str, str]:
    level = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text())
    try:
        syscall.perf_event_open(1, 0, cpu=0, period=1 << 40, disabled=True, what="for a try").close()
    except KernelError as error:
        advice = "Give CAP_PERFMON (CAP_SYS_ADMIN before Linux 5.8), or: sysctl kernel.perf_event_paranoid=0"
        return Level.FAIL, f"refused, perf_event_paranoid is {level}: {error}", advice
    return _ok(f"allowed (perf_event_paranoid is {level})")


def _kptr() -> tuple[Level, str, str]:
    found = symbols.kallsyms()
    if found.hidden:
        detail = "addresses are hidden: kernel stacks have no names"
        return Level.WARN, detail, "sysctl kernel.kptr_restrict=1, and give CAP_SYSLOG"
    return _ok(f"{len(found.addresses):,} kernel symbols")


def _libbpf() -> tuple[Level, str, str]:
    major, minor = libbpf.version()
    if (major, minor) < (1, 0):
        return Level.FAIL, f"libbpf {major}.{minor}", "Install libbpf 1.0 or later (Debian: libbpf1)."
    return _ok(f"libbpf {major}.{minor}")


def _bcc() -> tuple[Level, str, str]:
    found = ctypes.util.find_library("bcc")
    if found is None:
        return Level.WARN, "libbcc is not installed: policies with `bcc` cannot run here", "apt install libbpfcc"
    return _ok(f"{found} compiles policies with `bcc`, locked in: {sandbox.describe()}")


def _bpftrace() -> tuple[Level, str, str]:
    found = bpftrace.version()
    if not found:
        return Level.WARN, "bpftrace is not installed: policies with `bpftrace` cannot run here", "apt install bpftrace"
    return _ok(f"{found} runs policies with `bpftrace`, as root without a network")


def _cgroup2() -> tuple[Level, str, str]:
    return _ok(f"mounted at {cgroups.mount_point()}")


def _statistics() -> tuple[Level, str, str]:
    if features.bpf_stats():
        return _ok("programs' time can be measured")
    return Level.WARN, "programs' cost is unknown", "Give CAP_SYS_ADMIN, on Linux 5.8 or later."


def _pinning() -> tuple[Level, str, str]:
    if features.perf_link():
        return _ok("every attachment can be pinned")
    advice = "The others pause while the agent restarts, and say so; from Linux 5.15 on they do not."
    return Level.WARN, "only raw tracepoints and tp_btf can be pinned", advice


def _kprobes() -> tuple[Level, str, str]:
    if features.kprobes():
        return _ok("kprobes and kretprobes")
    return Level.WARN, "no kprobes in this kernel", "Use tracepoints, raw tracepoints or tp_btf, or CONFIG_KPROBES=y."


def _rest() -> tuple[Level, str, str]:
    answers = features.all_features()
    have = ", ".join(name for name, there in answers.items() if there)
    missing = ", ".join(name for name, there in answers.items() if not there)
    detail = f"has {have}" + (f"; lacks {missing}" if missing else "")
    if not answers["ring_buffer"] or not answers["raw_tracepoints"]:
        return Level.FAIL, detail, "Linux 5.8 or later is needed for ring buffers."
    return _ok(detail)


_CHECKS = {
    "kernel": _kernel,
    "capabilities": _capabilities,
    "bpffs": _bpffs,
    "tracefs": _tracefs,
    "types (BTF)": _btf,
    "JIT": _jit,
    "lockdown": _lockdown,
    "perf events": _paranoid,
    "kernel symbols": _kptr,
    "cgroup2": _cgroup2,
    "libbpf": _libbpf,
    "BCC": _bcc,
    "bpftrace": _bpftrace,
    "statistics": _statistics,
    "pinned links": _pinning,
    "kprobes": _kprobes,
    "features": _rest,
}
