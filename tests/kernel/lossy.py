"""A network of a test's own in which packets vanish on request: what a side sent is lost, and nothing else.

Two namespaces and a veth pair. Frames that go to a hardware address that nobody has reach the other side and are
dropped there (PACKET_OTHERHOST), without an error to the sender: so a neighbour entry is all that loses packets.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from probefleet_agent.kernel import interfaces

from tests.kernel import network

NEAR, FAR = "192.0.2.1", "192.0.2.2"
NEAR_6, FAR_6 = "2001:db8::1", "2001:db8::2"
NOBODY, PEER = "02:00:00:00:00:99", "02:00:00:00:00:02"


@dataclass(frozen=True)
class Wire:
    """The calling thread is in the near namespace; the far one is ``there``."""

    there: interfaces.Namespace

    def lose(self, lost: bool = True) -> None:
        """From now on what the near side sends is lost, or arrives."""
        for address in (FAR, FAR_6):
            hardware = NOBODY if lost else PEER
            network.ip("neigh", "replace", address, "lladdr", hardware, "dev", "near", "nud", "permanent")

    def set(self, name: str, value: int) -> None:
        """A setting of the near side's TCP, where this kernel has it."""
        path = Path(f"/proc/sys/net/ipv4/{name}")
        if path.exists():
            path.write_text(f"{value}\n")

    def sent_again(self) -> int:
        """Segments that the near side sent again, by the kernel's own account (RetransSegs)."""
        names, values = [
            line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if line[:4] == "Tcp:"
        ]
        return int(values[names.index("RetransSegs")])

    def not_sent(self) -> int:
        """Segments of those that did not get out of the machine (TCPRetransFail)."""
        names, values = [
            line.split()
            for line in Path("/proc/thread-self/net/netstat").read_text().splitlines()
            if line.startswith("TcpExt:")
        ]
        return int(values[names.index("TCPRetransFail")])

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """In the block the near side's queue has room for no packet, and says so to who sends."""
        subprocess.run(["tc", "qdisc", "replace", "dev", "near", "root", "bfifo", "limit", "1"], check=True)
        try:
            yield
        finally:
            subprocess.run(["tc", "qdisc", "del", "dev", "near", "root"], check=True)

    @contextlib.contextmanager
    def server(self, address: str = FAR) -> Iterator[socket.socket]:
        """Listens on the far side."""
        with interfaces.entered(self.there):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listening = socket.create_server((address, 0), family=family, backlog=1024)
        with listening:
            yield listening


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """Two new namespaces; inside the block the calling thread sits in the near one."""
    with network.namespace() as here, network.namespace() as there, interfaces.entered(here):
        pair = ("link", "add", "near", "type", "veth", "peer", "name", "far", "address", PEER)
        try:
            network.ip(*pair)
        except subprocess.CalledProcessError:
            # A guest of tests/kernel/vm has the driver as a module, and nothing that loads it when it is wanted.
            subprocess.run(["modprobe", "veth"], check=True)
            network.ip(*pair)
        network.ip("link", "set", "far", "netns", there.path)
        _up("near", NEAR, NEAR_6)
        with interfaces.entered(there):
            _up("far", FAR, FAR_6)
        found = Wire(there)
        found.lose(False)
        # From 6.5 the first SYNs go out each second, and TCP_SYNCNT counts those that come after them.
        found.set("tcp_syn_linear_timeouts", 0)
        yield found


def _up(name: str, address: str, address_6: str) -> None:
    network.ip("addr", "add", f"{address}/30", "dev", name)
    network.ip("addr", "add", f"{address_6}/64", "dev", name, "nodad")
    network.ip("link", "set", name, "up")


def connecting(host: str, port: int, *, retries: int = 1) -> socket.socket:
    """A socket whose SYN is on its way, and is sent again so many times at most."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setblocking(False)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, retries)
    with contextlib.suppress(BlockingIOError):
        made.connect((host, port))
    return made
