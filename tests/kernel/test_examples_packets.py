"""The examples that look at packets: an LPM trie and an array that a policy writes, and tail calls by four slots."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from probefleet_agent.kernel import interfaces

from tests.kernel import examples_runner, network
from tests.kernel.network import Wire, ip

# An emulated machine takes minutes for what starts a command.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A node of its own, whose eth0 leads to somebody with addresses in several networks."""
    with network.namespace() as here, interfaces.entered(here), network.wire("eth0", "far0") as made:
        ip("route", "add", "198.51.100.0/24", "dev", "eth0")
        ip("route", "add", "203.0.113.0/24", "dev", "eth0")
        with interfaces.entered(made.there):
            ip("addr", "add", "198.51.100.7/32", "dev", "far0")
            ip("addr", "add", "203.0.113.9/32", "dev", "far0")
        yield made


@pytest.mark.shows("example/packets-by-prefix")
def test_packets_are_counted_by_the_longest_prefix_of_their_source(wire: Wire) -> None:
    with examples_runner.running("packets-by-prefix.yaml", links=1) as run:
        assert wire.send_here(997) == 997
        assert wire.send_here(31, payload_bytes=512) == 31
        assert wire.send_here(23, source="198.51.100.7") == 23
        assert wire.send_here(29, source="198.51.100.7", payload_bytes=256) == 29
        assert wire.send_here(101, source="203.0.113.9") == 101
    assert run.rows("packets-by-prefix", "packets") == {
        ("near", "false"): 997,
        ("near", "true"): 31,
        ("guests", "false"): 23,
        ("guests", "true"): 29,
        ("elsewhere", "false"): 101,
    }


def send_raw(wire: Wire, protocol: int, times: int, packet: bytes) -> None:
    """IP packets of any protocol from the other end; nobody has to answer."""
    with interfaces.entered(wire.there):
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol)
    with sender:
        for _ in range(times):
            sender.sendto(packet, ("192.0.2.1", 0))


@pytest.mark.shows("example/xdp-root")
def test_an_xdp_root_program_jumps_through_four_slots(wire: Wire) -> None:
    with examples_runner.running("xdp-root.yaml", links=1) as run:
        assert wire.send_here(997) == 997
        send_raw(wire, socket.IPPROTO_ICMP, 23, bytes([8, 0, 0xF7, 0xFF, 0, 0, 0, 0]))
        send_raw(wire, socket.IPPROTO_TCP, 31, bytes(20))
        send_raw(wire, 253, 29, bytes(8))  # a number for experiments: RFC 3692
        assert wire.send_here(1) == 1  # what was sent before has arrived before it
    assert run.rows("xdp-root", "packets") == {("udp",): 998, ("icmp",): 23, ("tcp",): 31, ("other",): 29}
