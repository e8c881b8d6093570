"""Programs that the kernel asks about packets and sockets: what they may do so that it changes nothing. Pure.

XDP, TC, cgroup and socket filter programs decide by what they return, may write into packets, and have helpers that
send or change them. Probefleet runs them only when none of that can happen::

    the verdict    fixed to "go on" by ``verdicts`` (the planner), proved again before loading (the agent)
    stores         proved by ``packet_writes`` to reach neither the packet nor the context
    helpers        only those below, which read, or write to the program's own maps: a new one is refused
    the rest       tail calls lead to programs of the same object, which are proved alike; kfuncs are refused
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from probefleet_wire import packet_writes, verdicts
from probefleet_wire.bpf_code import CALL, FROM_HELPER, Code
from probefleet_wire.elf import ElfError


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of network program, and the verdict that leaves everything as it is."""

    name: str
    context: str
    verdict: int
    verdict_name: str
    keeps_legacy_loads: bool = False  #: LD_ABS past the packet's end answers 0, which here is the verdict anyway


XDP = Kind("xdp", "xdp_md", 2, "XDP_PASS")
#: TC_ACT_UNSPEC: the next filter, or the next TCX program, is asked.
TC = Kind("tc", "__sk_buff", -1, "TC_ACT_UNSPEC")
CGROUP_SKB = Kind("cgroup_skb", "__sk_buff", 1, "1 (let it through)")
CGROUP_SOCK = Kind("cgroup_sock", "bpf_sock", 1, "1 (let it be)")
#: On a packet socket of the agent's own, which nobody reads: nothing is to be queued there.
SOCKET_FILTER = Kind("socket_filter", "__sk_buff", 0, "0 (queue nothing)", keeps_legacy_loads=True)

# Numbers are ABI: include/uapi/linux/bpf.h.
_ALLOWED = frozenset({
    1, 2, 3,  # maps: lookup, update, delete
    4, 112, 113, 114, 115, 45,  # probe_read and its kin
    5, 125, 160, 208, 118,  # clocks
    6, 177,  # trace_printk
    7, 8, 42,  # random number, CPU, NUMA node
    12,  # tail call: into programs of the same object
    14, 15, 16, 33, 35, 37, 158, 80, 123, 120,  # the current task: ids, name, cgroup
    17, 24, 151,  # class, realm
    20, 29, 66,  # tunnel key, tunnel option, IPsec state: read
    25, 26, 68, 28, 34, 39,  # perf output, skb_load_bytes, checksums, hash, pull_data (same bytes, in one piece)
    27, 67,  # stack ids
    46, 47, 122, 79, 83, 128, 129, 186,  # cookies, uid, cgroup ids, the verdict so far
    69, 163,  # FIB, MTU
    84, 85, 86, 95, 96, 98, 99, 100, 136, 137, 138, 139, 140, 178, 196,  # sockets: look up, release, cast
    81, 87, 88, 89, 93, 94, 107, 108, 153, 154, 164, 195,  # queues, spin locks, local storage, per-CPU, iteration
    105, 106, 165, 182,  # numbers and text
    130, 131, 132, 133, 134, 198, 199, 200,  # ring buffer
    181, 197, 201, 202, 203,  # bpf_loop, dynptr
    188, 189,  # length of an XDP packet, bytes of it
    121,  # XDP's perf output
})  # fmt: skip
_NAMES = {
    9: "bpf_skb_store_bytes", 10: "bpf_l3_csum_replace", 11: "bpf_l4_csum_replace", 13: "bpf_clone_redirect",
    18: "bpf_skb_vlan_push", 19: "bpf_skb_vlan_pop", 21: "bpf_skb_set_tunnel_key", 23: "bpf_redirect",
    30: "bpf_skb_set_tunnel_opt", 31: "bpf_skb_change_proto", 32: "bpf_skb_change_type", 38: "bpf_skb_change_tail",
    40: "bpf_csum_update", 41: "bpf_set_hash_invalid", 43: "bpf_skb_change_head", 44: "bpf_xdp_adjust_head",
    48: "bpf_set_hash", 49: "bpf_setsockopt", 50: "bpf_skb_adjust_room", 51: "bpf_redirect_map",
    54: "bpf_xdp_adjust_meta", 65: "bpf_xdp_adjust_tail", 97: "bpf_skb_ecn_set_ce", 124: "bpf_sk_assign",
    135: "bpf_csum_level", 152: "bpf_redirect_neigh", 155: "bpf_redirect_peer", 190: "bpf_xdp_store_bytes",
    192: "bpf_skb_set_tstamp",
}  # fmt: skip


#: Functions of the kernel that only look; others could hand out a packet to write into.
_ALLOWED_KFUNCS = frozenset({"bpf_rcu_read_lock", "bpf_rcu_read_unlock"})


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a network program may not run: what it does, where, and what to write instead."""

    what: str
    function: str
    instruction: int
    write: str

    def __str__(self) -> str:
        return f"{self.what} (instruction {self.instruction} of {self.function})"


def objections(code: Code, program: str, kind: Kind, *, verdict_is_fixed: bool) -> Iterator[Objection]:
    """All that speaks against a program; ``verdict_is_fixed`` asks for the proof of its verdict too."""
    try:
        yield from _helpers(code, program)
        if not kind.keeps_legacy_loads:
            for name, number in verdicts.legacy_loads(code, program):
                what = f"it reads the packet by LD_ABS, which answers 0 instead of {kind.verdict_name} past its end"
                yield Objection(what, name, number, "Use bpf_skb_load_bytes().")
        for finding in packet_writes.findings(code, program, kind.context):
            write = "Store into a map, a ring record or a variable." + (
                " If it does so already, look the value up again just before: the pointer's way could not be followed."
            )
            yield Objection(f"it may write into {finding.what}", finding.function, finding.instruction, write)
        if verdict_is_fixed and not verdicts.pass_proved(code, program, kind.verdict):
            what = f"it may return something other than {kind.verdict_name}"
            yield Objection(what, program, 0, "Give the object to the planner: it fixes the verdict.")
    except ElfError as error:
        yield Objection(str(error), program, 0, "Write it without that.")


def _helpers(code: Code, program: str) -> Iterator[Objection]:
    for function in code.reached(program):
        for number, it in enumerate(function.instructions):
            name = ""
            if number in function.externals and function.externals[number] not in _ALLOWED_KFUNCS:
                name = function.externals[number]
            elif it.code == CALL and it.src == FROM_HELPER and it.imm not in _ALLOWED:
                name = _NAMES.get(it.imm, f"helper {it.imm}")
            if name:
                yield Objection(f"it calls {name}", function.name, number, "Leave the call away.")
