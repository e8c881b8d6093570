"""Helpers that change what they watch, and which of them a program's instructions call; and what instructions may not
name by a number. Pure.

The operator looks at objects before a node hears of them (``probefleet_core.observe_only``); the agent looks again at
what it is about to load, because BCC's macros can hide a call from whoever reads the text, and because it is root.
"""

from __future__ import annotations

from collections.abc import Callable

# Numbers are ABI: include/uapi/linux/bpf.h.
REFUSED_HELPERS = {
    36: "bpf_probe_write_user",
    49: "bpf_setsockopt",
    58: "bpf_override_return",
    109: "bpf_send_signal",
    117: "bpf_send_signal_thread",
    166: "bpf_sys_bpf",
    168: "bpf_sys_close",
}
_CALL, _LOAD_IMMEDIATE = 0x85, 0x18
#: ``src`` of these instructions: include/uapi/linux/bpf.h.
_HELPER, _KERNEL_FUNCTION = 0, 2
_NUMBER, _OWN_FUNCTION = 0, 4
_NAMED = {
    1: "a map by a descriptor", 2: "a map by a descriptor", 3: "a variable of the kernel",
    5: "a map by its index", 6: "a map by its index",
}  # fmt: skip


def refused_helpers(code: bytes) -> list[str]:
    """Names of the refused helpers that these instructions call, by number; and functions of the kernel (kfuncs) that
    they call by number: compilers name them, and it is by their names that they are looked through.
    """
    called = _immediates(code, _CALL, lambda source: source == _HELPER)
    found = [REFUSED_HELPERS[number] for _, number in sorted(called) if number in REFUSED_HELPERS]
    hidden = _immediates(code, _CALL, lambda source: source == _KERNEL_FUNCTION)
    return found + [f"function {number} of the kernel by its number" for _, number in sorted(hidden)]


def named_by_number(code: bytes) -> list[str]:
    """What instructions of an object refer to by a number of this machine's, where a compiler leaves a relocation: a
    number could be any map that the agent has open.
    """
    found = _immediates(code, _LOAD_IMMEDIATE, lambda source: source not in (_NUMBER, _OWN_FUNCTION))
    return [f"{_NAMED.get(source, 'something')} ({number})" for source, number in sorted(found)]


def _immediates(code: bytes, operation: int, wanted: Callable[[int], bool]) -> set[tuple[int, int]]:
    """(source, immediate) of the instructions of one kind."""
    # Eight bytes an instruction: opcode, registers (source in the high four bits), offset, immediate. The second half
    # of a LOAD_IMMEDIATE has opcode 0.
    return {
        (code[at + 1] >> 4, int.from_bytes(code[at + 4 : at + 8], "little"))
        for at in range(0, len(code) - 7, 8)
        if code[at] == operation and wanted(code[at + 1] >> 4)
    }
