"""What a packet costs on its way to a network program and back, measured on this machine (see ``hooks``).

A thread with a network namespace of its own sends datagrams to itself over loopback, with and without a program that
lets everything pass. Nobody else's packets go through it; a cgroup program sits on the agent's own cgroup for these
milliseconds, and answers what would have happened without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
import threading

from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import cgroups, hooks_timing, links, syscall

KINDS = ("xdp", "tc", "socket_filter", "cgroup_skb", "cgroup_sock")
_VERDICTS = {"xdp": 2, "tc": -1, "socket_filter": 0, "cgroup_skb": 1, "cgroup_sock": 1}
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_libc = ctypes.CDLL(None, use_errno=True)


def measure(kind: str) -> float:
    """Nanoseconds a packet (of ``cgroup_sock``: a socket), an empty program included. Raises what stands against it."""
    answer: list[float] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(_in_own_network(kind))
        except BaseException as error:  # handed on to the thread that asked
            failed.append(error)

    # The namespace ends with the thread.
    thread = threading.Thread(target=work, name="hook cost")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return answer[0]


def _in_own_network(kind: str) -> float:
    if _libc.unshare(ctypes.c_int(_CLONE_NEWNET)) < 0:
        raise KernelError(ctypes.get_errno(), "make a network namespace to measure in")
    with contextlib.ExitStack() as owned:
        receiver = owned.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sender = owned.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        _bring_up(sender, b"lo")
        receiver.bind(("127.0.0.1", 0))
        sender.connect(receiver.getsockname())

        def packet() -> None:
            sender.send(b"x")
            receiver.recv(1)

        def opened() -> None:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()

        work = opened if kind == "cgroup_sock" else packet
        attachment = _attachment(kind)
        program_type, attach_type = links.program_type(attachment)
        program = owned.enter_context(
            syscall.prog_load(_passes(_VERDICTS[kind]), program_type, name="pf_hook", expected_attach_type=attach_type)
        )
        # A packet socket on loopback sees each datagram twice: sent and received.
        runs = 2 if kind == "socket_filter" else 1
        return hooks_timing.difference_ns(work, lambda: links.attach(program, attachment)) / runs


def _attachment(kind: str) -> plan_pb2.Attachment:
    made = plan_pb2.Attachment(program="pf_hook")
    if kind.startswith("cgroup"):
        getattr(made, kind).cgroup = cgroups.of_process()
    else:
        getattr(made, kind).interfaces.append("lo")
    return made


def _passes(verdict: int) -> bytes:
    """A program that answers that, and nothing else."""
    return struct.pack("<BBhi", 0xB7, 0, 0, verdict) + struct.pack("<BBhi", 0x95, 0, 0, 0)


def _bring_up(line: socket.socket, name: bytes) -> None:
    request = struct.pack("16sH14x", name, 0)
    flags = struct.unpack_from("H", fcntl.ioctl(line, _SIOCGIFFLAGS, request), 16)[0]
    fcntl.ioctl(line, _SIOCSIFFLAGS, struct.pack("16sH14x", name, flags | _IFF_UP))
