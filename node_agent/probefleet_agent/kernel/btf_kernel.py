"""The running kernel's own types, and those of any map or program. ``decode`` and ``links`` ask."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import SupportsIndex

from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import BtfError, Kind

from probefleet_agent.errors import UnsupportedFeature
from probefleet_agent.kernel import syscall

VMLINUX = Path("/sys/kernel/btf/vmlinux")


def available() -> bool:
    """Whether this kernel carries its types."""
    return VMLINUX.exists()


@functools.cache
def vmlinux() -> Btf:
    """The kernel's types, parsed once a process (0.1 s). UnsupportedFeature where it carries none."""
    try:
        return Btf.parse(VMLINUX.read_bytes())
    except (OSError, BtfError) as error:
        raise UnsupportedFeature("BTF", why=f"{VMLINUX}: {error}; it needs CONFIG_DEBUG_INFO_BTF=y") from error


def for_fd(btf_fd: SupportsIndex) -> Btf:
    """The types behind a BTF descriptor."""
    return Btf.parse(syscall.btf_bytes(btf_fd))


@functools.cache
def raw_tracepoints() -> frozenset[str]:
    """Names of the tracepoints that tp_btf and raw tracepoints attach to, those of the kernel proper."""
    btf = vmlinux()
    prefix, names = "btf_trace_", set()
    for offset in btf.name_offsets()[btf.kinds() == Kind.TYPEDEF].tolist():
        name = btf.string(offset)
        if name.startswith(prefix):
            names.add(name.removeprefix(prefix))
    return frozenset(names)


@functools.cache
def functions() -> frozenset[str]:
    """Names of the kernel's functions that BTF describes (also those that were inlined everywhere)."""
    btf = vmlinux()
    return frozenset(btf.string(offset) for offset in btf.name_offsets()[btf.kinds() == Kind.FUNC].tolist())
