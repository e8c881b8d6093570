"""Functions of the kernel: which there are, which fit a pattern, which can be traced and why one cannot.

``links_function`` and ``links_trampoline`` ask before they attach. Three lists are held against each other:
/proc/kallsyms (what there is), tracefs' available_filter_functions (what ftrace can patch: fentry and kprobe.multi need
it) and BTF (whose arguments are known: fentry needs it). One function can have several names (__x64_sys_getppid is
__ia32_sys_getppid, too), of which ftrace and BTF know only one; so they are compared by address.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from probefleet_agent.errors import NoSuchTarget
from probefleet_agent.kernel import btf_kernel, mounts, symbols, targets

_MODULE_BTF = Path("/sys/kernel/btf")
_KALLSYMS = Path("/proc/kallsyms")
_CODE = (b"t", b"T", b"w", b"W")


def check_typed(name: str) -> None:
    """NoSuchTarget unless a trampoline can be put on the function: there once, described by BTF, and not notrace."""
    targets.check_function(name)
    what = f"function {name} to trace with typed arguments"
    there = [each for each in _containing(name) if each[1] == name]
    if len({address for address, _, _ in there}) > 1:
        why = f"there are {len(there)} functions of that name (static, in several files), and BTF knows one of them"
        raise NoSuchTarget(what, why=f"{why}; a kprobe takes the first")
    address, _, module = there[0]
    (first,) = _first_names([address])
    if name not in btf_kernel.functions():
        if module and not (_MODULE_BTF / module).exists():
            raise NoSuchTarget(what, why=f"module {module} carries no BTF; a kprobe needs none")
        if not module:
            known = (first,) if first in btf_kernel.functions() else ()
            why = "BTF does not describe it (assembly, another name of the same code, or arguments optimized away)"
            raise NoSuchTarget(what, known, why=f"{why}; a kprobe needs no BTF")
    listed = _filter_functions()
    if listed and not any(
        b"\n%b%b" % (each.encode(), end) in listed for each in (name, first) for end in (b"\n", b" [")
    ):
        raise NoSuchTarget(what, why="the kernel does not let it be traced (notrace: tracing itself runs through it)")


def matching(pattern: str) -> list[str]:
    """Functions that fit a shell's pattern, each once, that can be traced; NoSuchTarget where there is none.

    Names that several static functions have are left out: a name cannot say which of them is meant.
    """
    fits = re.compile(fnmatch.translate(pattern)).match
    addresses: dict[str, int] = {}
    several: set[str] = set()
    for address, name, _ in _containing(max(re.split(r"[*?]", pattern), key=len)):
        if fits(name) and addresses.setdefault(name, address) != address:
            several.add(name)
    traceable = frozenset(line.partition(b" ")[0].decode() for line in _filter_functions().splitlines())
    found: dict[int | str, str] = {}
    for (name, address), first in zip(addresses.items(), _first_names(list(addresses.values())), strict=True):
        if name not in several and (not traceable or name in traceable or first in traceable):
            found.setdefault(address or name, name)  # addresses read as 0 where kptr_restrict hides them
    if not found:
        raise NoSuchTarget(f"function that fits {pattern}", targets.near_functions(pattern.strip("*?")))
    return sorted(found.values())


def _containing(text: str) -> Iterator[tuple[int, str, str]]:
    """(address, name, module) of functions in whose lines of kallsyms that text is: "ffffffff81000000 T name"."""
    lines, wanted = _KALLSYMS.read_bytes(), text.encode()
    at = lines.find(wanted)
    while 0 <= at < len(lines):
        start, end = lines.rfind(b"\n", 0, at) + 1, lines.find(b"\n", at)
        address, kind, name, *module = lines[start : end if end >= 0 else None].split()
        if kind in _CODE:
            yield int(address, 16), name.decode(errors="replace"), b"".join(module).decode().strip("[]")
        at = lines.find(wanted, end + 1) if end >= 0 else -1


def _first_names(addresses: list[int]) -> list[str]:
    """Of several names of one function the first: the one that ftrace calls it by."""
    return symbols.kallsyms().resolve(np.array(addresses, np.uint64))


def _filter_functions() -> bytes:
    """What ftrace can patch, a name a line, with the module in brackets; empty where the kernel does not say."""
    root = mounts.tracefs()
    try:
        return b"\n" + (root / "available_filter_functions").read_bytes() if root else b""
    except OSError:
        return b""
