"""Names of what can be probed, and what a person may have meant. ``links`` resolves targets here.

Tracepoints from tracefs, functions from /proc/kallsyms and BTF, symbols from ELF files. A name that is not there
becomes NoSuchTarget with near matches, or with the reason why it cannot be there (inlined).
"""

from __future__ import annotations

import difflib
import functools
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from probefleet_agent.errors import NoSuchTarget, UnsupportedFeature
from probefleet_agent.kernel import btf_kernel, elf_file, features, mounts, symbols

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_CLONE = re.compile(r"\.(isra|constprop|part|cold)\b")
_SYSCALL_PREFIX = {"x86_64": "__x64_sys_", "aarch64": "__arm64_sys_"}
MAX_NEAR = 4


def near(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """What may have been meant: at most four, best first."""
    pool = list(names)
    close = difflib.get_close_matches(name, pool, n=MAX_NEAR, cutoff=0.75)
    if len(close) < 2 and len(name) >= 4:
        close += [each for each in sorted(pool, key=len) if name in each and each not in close][: MAX_NEAR - len(close)]
    return tuple(close)


def tracepoint_id(category: str, name: str) -> int:
    """The number of a tracepoint. NoSuchTarget with near names; UnsupportedFeature where tracefs is missing."""
    root = mounts.tracefs()
    if root is None:
        raise UnsupportedFeature("tracefs", why="it is not mounted: mount -t tracefs tracefs /sys/kernel/tracing")
    if _NAME.fullmatch(category) and _NAME.fullmatch(name):
        try:
            return int((root / "events" / category / name / "id").read_text())
        except FileNotFoundError:
            pass
    everything = tracepoints()
    in_category = [each.partition(":")[2] for each in everything if each.startswith(f"{category}:")]
    found = near(name, in_category) or near(f"{category}:{name}", everything)
    raise NoSuchTarget(f"tracepoint {category}:{name}", found)


def tracepoints() -> list[str]:
    """``category:name`` of every tracepoint."""
    root = mounts.tracefs()
    return (root / "available_events").read_text().split() if root else []


def no_raw_tracepoint(name: str, what: str = "raw tracepoint") -> NoSuchTarget:
    """The error for a raw tracepoint (or tp_btf) that is not there."""
    names = (
        set(btf_kernel.raw_tracepoints())
        if btf_kernel.available()
        else {each.partition(":")[2] for each in tracepoints()}
    )
    if name.startswith(("sys_enter_", "sys_exit_")):
        short = "sys_enter" if name.startswith("sys_enter_") else "sys_exit"
        return NoSuchTarget(f"{what} {name}", (short,), f"it is {short} for all calls; filter by the number in args[1]")
    return NoSuchTarget(f"{what} {name}", near(name, names))


@dataclass(frozen=True, slots=True)
class Pmu:
    """A dynamic event source: its number, and the bit of ``config`` that means "on return"."""

    type: int
    on_return: int


@functools.cache
def _pmu(name: str) -> Pmu | None:
    root = features.PMUS / name
    try:
        number = int((root / "type").read_text())
        form = (root / "format" / "retprobe").read_text().strip()  # "config:0"
    except OSError:
        return None
    return Pmu(number, 1 << int(form.partition(":")[2] or 0))


def pmu(name: str, feature: str) -> Pmu:
    """The "kprobe" or "uprobe" event source; UnsupportedFeature where the kernel has none."""
    found = _pmu(name)
    if found is None:
        raise UnsupportedFeature(feature, why=f"it has no {features.PMUS / name} (CONFIG_{feature[:-1].upper()}S)")
    return found


def check_function(name: str) -> None:
    """NoSuchTarget unless the kernel has a function of that name to probe."""
    names = symbols.kallsyms().functions()
    if name in names:
        return
    clones = [each for each in names if each.startswith(f"{name}.") and _CLONE.search(each)]
    if clones or (btf_kernel.available() and name in btf_kernel.functions()):
        raise NoSuchTarget(f"function {name}", tuple(sorted(clones)[:MAX_NEAR]), "inlined")
    raise NoSuchTarget(f"function {name}", near_functions(name))


def near_functions(name: str) -> tuple[str, ...]:
    """Functions with a similar name; only those that start alike are compared: all would take a second."""
    names = symbols.kallsyms().functions()
    alike = [each for each in names if each[:3] == name[:3] and abs(len(each) - len(name)) < 12 and each != name]
    return near(name, alike)


def syscall_function(name: str) -> str:
    """The function that handles a system call on this machine."""
    prefix = _SYSCALL_PREFIX.get(platform.machine(), "__x64_sys_")
    function = f"{prefix}{name}"
    names = symbols.kallsyms().functions()
    if function not in names:
        calls = [each.removeprefix(prefix) for each in names if each.startswith(prefix)]
        raise NoSuchTarget(f"system call {name}", near(name, calls))
    return function


def uprobe_offset(path: str, symbol: str, offset: int) -> int:
    """The place in the file to put a uprobe on: the symbol's plus ``offset``; without a symbol the offset."""
    file = Path(path)
    if not file.is_absolute():
        raise NoSuchTarget(f"file {path}", why="the path of a uprobe has to be absolute", where="on this node")
    try:
        with elf_file.open_file(file) as elf:
            if not symbol:
                if not elf.is_code(offset):
                    raise NoSuchTarget(f"code at offset {offset:#x}", where=f"in {path}")
                return offset
            place = elf.file_offset(symbol)
            if place is None:
                raise NoSuchTarget(f"function {symbol}", near(symbol, elf.function_names()), where=f"in {path}")
            return place + offset
    except FileNotFoundError as error:
        raise NoSuchTarget(f"file {path}", where="on this node") from error
    except (OSError, elf_file.NotElf) as error:
        raise NoSuchTarget(f"function {symbol or hex(offset)}", why=str(error), where=f"in {path}") from error
