"""Helpers that change what they watch, and which of them a program's instructions call. Pure.

The operator looks at objects before a node hears of them (``probefleet_core.observe_only``); the agent looks again at
what it is about to load, because BCC's macros can hide a call from whoever reads the text, and because it is root.
"""

from __future__ import annotations

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
_CALL = 0x85


def refused_helpers(code: bytes) -> list[str]:
    """Names of the refused helpers that these instructions call, by number."""
    # Eight bytes an instruction: opcode, registers (source in the high four bits), offset, immediate.
    called = {
        int.from_bytes(code[at + 4 : at + 8], "little")
        for at in range(0, len(code) - 7, 8)
        if code[at] == _CALL and code[at + 1] >> 4 == 0
    }
    return [REFUSED_HELPERS[number] for number in sorted(called & REFUSED_HELPERS.keys())]
