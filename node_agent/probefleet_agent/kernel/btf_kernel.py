"""The running kernel's own types, and those of any map or program. ``decode`` and ``links`` ask.

A kernel without them (CONFIG_DEBUG_INFO_BTF) can be helped by a file: ``use`` names a folder of such files, each called
after its kernel (``5.4.0-1009-azure.btf``, as BTFHub has them). CO-RE and BCC are content with it. What the kernel
itself looks up is not: tp_btf, fentry, LSM hooks and iterators need ``own``.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import SupportsIndex

from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import BtfError, Kind

from probefleet_agent.errors import UnsupportedFeature
from probefleet_agent.kernel import symbols, syscall

VMLINUX = Path("/sys/kernel/btf/vmlinux")
#: Names the folder, where nobody called ``use``.
ENVIRONMENT = "PROBEFLEET_BTF"
#: So many of the functions that a kernel's types name are functions of that kernel: 98 % of its own on Linux 6.18, 68
#: to 73 % of those of 5.10, 6.1, 6.12 and 7.2. Of the files of one series the name decides.
MIN_FUNCTIONS_KNOWN = 0.9
_folder: Path | None = None


def use(folder: Path | None) -> None:
    """Take types from this folder where the kernel carries none."""
    global _folder
    _folder = folder
    for cached in (vmlinux, raw_tracepoints, functions):
        cached.cache_clear()


def own() -> bool:
    """Whether this kernel carries its types itself."""
    return VMLINUX.exists()


def file() -> Path:
    """Where its types are, or would be: the kernel's own go before any file."""
    folder = _folder or os.environ.get(ENVIRONMENT)
    return VMLINUX if own() or not folder else Path(folder) / f"{os.uname().release}.btf"


def available() -> bool:
    """Whether there are types of this kernel."""
    return file().exists()


@functools.cache
def vmlinux() -> Btf:
    """The kernel's types, parsed once a process (0.1 s). UnsupportedFeature where there are none."""
    place = file()
    try:
        found = Btf.parse(place.read_bytes())
    except (OSError, BtfError) as error:
        raise missing(error) from error
    if place != VMLINUX:
        _require_fitting(found, place)
    return found


def data() -> bytes:
    """The bytes of ``vmlinux()``, checked like it."""
    vmlinux()
    return file().read_bytes()


def missing(error: Exception | None = None) -> UnsupportedFeature:
    """What to say where there are no types, or none that can be read."""
    place = file()
    said = f"cannot be read: {error}" if error and place.exists() else "is not there"
    if place == VMLINUX:
        why = (
            f"{VMLINUX} {said}. It needs CONFIG_DEBUG_INFO_BTF=y, or a file of its types: agent.btf.hostPath in the "
            f"chart, {ENVIRONMENT} on one machine"
        )
    else:
        why = f"it carries none, and {place} {said}"
    return UnsupportedFeature("BTF", why=why)


def _require_fitting(btf: Btf, place: Path) -> None:
    """A file of another kernel would have programs read other fields than they say."""
    there = symbols.kallsyms()
    described = _functions(btf)
    if there.hidden or not described:
        return  # nothing to compare with: it is called after this kernel
    known = len(described & there.functions()) / len(described)
    if known < MIN_FUNCTIONS_KNOWN:
        why = (
            f"{place} is of another kernel, whatever its name says: this one has only {known:.0%} of the "
            f"{len(described):,} functions that the file describes"
        )
        raise UnsupportedFeature("BTF", why=why)


def _functions(btf: Btf) -> frozenset[str]:
    return frozenset(btf.string(offset) for offset in btf.name_offsets()[btf.kinds() == Kind.FUNC].tolist())


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
    return _functions(vmlinux())
