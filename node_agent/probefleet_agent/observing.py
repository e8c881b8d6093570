"""What the agent itself makes sure of before it loads a program as root: that it only observes. Pure.

The planner has looked at the object too. But the agent is the one that has the power, so it proves again.
"""

from __future__ import annotations

from collections.abc import Mapping

from probefleet_wire import bpf_code, network_programs
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import ElfError
from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import NotObserving, ObjectError
from probefleet_agent.kernel.uapi import ProgramType

_TARGETS = frozenset({"xdp", "tc", "socket_filter", "cgroup_skb", "cgroup_sock"})
_KINDS = {
    ProgramType.XDP: network_programs.XDP,
    ProgramType.SCHED_CLS: network_programs.TC,
    ProgramType.CGROUP_SKB: network_programs.CGROUP_SKB,
    ProgramType.CGROUP_SOCK: network_programs.CGROUP_SOCK,
    ProgramType.SOCKET_FILTER: network_programs.SOCKET_FILTER,
}


def check_attachments(instance: plan_pb2.Instance) -> None:
    """Raise NotObserving where a program that is compiled on the node would be asked about packets."""
    for attachment in instance.attachments:
        if attachment.WhichOneof("target") in _TARGETS:
            why = f"{attachment.program} would decide about packets, and its verdict was not fixed before it came here"
            raise NotObserving.because(instance.title, why)


def check(title: str, blob: bytes, programs: Mapping[str, int]) -> None:
    """Raise NotObserving where a program (name → program type) could change a packet, a verdict or a process."""
    network = {name: _KINDS[ProgramType(number)] for name, number in programs.items() if number in _KINDS}
    if not network:
        return
    try:
        code = bpf_code.read(blob)
        for name, kind in network.items():
            for objection in network_programs.objections(code, name, kind, verdict_is_fixed=True):
                raise NotObserving.because(title, f"{name}: {objection}")
    except (ElfError, BtfError) as error:
        raise ObjectError(f"{title} cannot be looked through: {error}") from error
