"""tcptop and tcpretrans: bytes while they flow, and segments that had to be sent again, by the socket's pod."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from probefleet_agent.kernel import interfaces

from tests.kernel import lossy
from tests.kernel.catalog_probe import Rows, Running, the_catalog, ways
from tests.kernel.support import until_nothing_was_hidden
from tests.kernel.test_catalog_sockets import address, server_in
from tests.workloads import run

LOCAL = "127.0.0.1"
TCP_INFO_BYTES = 232
#: The last is the one that this kernel takes.
WAYS = ["typed tracepoints", "raw tracepoints", "functions", pytest.param("", marks=pytest.mark.shows("probe/tcptop"))]


@pytest.fixture
def web() -> Iterator[Path]:
    with run.in_cgroup("web") as cgroup:
        yield cgroup


def needs_way(probe: str, way: str) -> None:
    """Skip where this kernel lacks it: Linux 6.1 has no tracepoint, this machine no fexit."""
    found = the_catalog().get(probe)
    assert found is not None
    if way and way not in {each.way for each in ways(found, way)}:
        pytest.skip(f"this kernel cannot count {probe} by {way}")


def sums(rows: tuple[Rows, Rows]) -> dict[tuple[str, int, bool], tuple[int, int]]:
    """(peer, port, accepted) → (sent, received)."""
    return {
        (address(key["peer"]), int(key["port"]), bool(key["accepted"])): (
            int(value["sent_bytes"]),
            int(value["received_bytes"]),
        )
        for key, value in zip(*rows, strict=True)
    }


@contextlib.contextmanager
def connection(host: str = LOCAL) -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """(client, server's end, the server's port) of a connection of this process with itself."""
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        port = int(listening.getsockname()[1])
        with socket.create_connection((host, port)) as client:
            accepted, _ = listening.accept()
            with accepted:
                yield client, accepted, port


def ledger(end: socket.socket) -> tuple[int, int]:
    """(sent, received) by the kernel's own account: tcpi_bytes_sent less tcpi_bytes_retrans, tcpi_bytes_received."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    (received,) = struct.unpack_from("=Q", info, 128)
    sent, again = struct.unpack_from("=QQ", info, 200)
    return sent - again, received


def of_port(probe: Running, port: int) -> dict[tuple[str, int, bool], tuple[int, int]]:
    return {key: value for key, value in sums(probe.rows("traffic")).items() if key[1] == port}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("to", [LOCAL, "::1"])
def test_both_ends_of_23_connections_have_their_bytes(web: Path, way: str, to: str) -> None:
    needs_way("tcptop", way)
    total = 23 * 65537
    with run.in_cgroup("cart") as cart, server_in(cart, to) as port, Running("tcptop", prefer=way) as probe:
        assert run.run("connects", 23, port, to, "--bytes", 65537, cgroup=web)["connects"] == 23
        assert sums(probe.rows("traffic", cgroup=run.cgroup_id(web))) == {(to, port, False): (total, total)}
        assert sums(probe.rows("traffic", cgroup=run.cgroup_id(cart))) == {(to, port, True): (total, total)}
        assert probe.lost() == [0, 0, 0, 0]


@pytest.mark.parametrize("way", WAYS)
def test_a_connection_that_was_open_before_and_stays_open_is_counted(way: str) -> None:
    needs_way("tcptop", way)
    with connection() as (client, server, port):
        before = ledger(client), ledger(server)
        with Running("tcptop", prefer=way) as probe:
            client.sendall(bytes(997))
            assert len(server.recv(997, socket.MSG_WAITALL)) == 997
            server.sendall(bytes(23))
            # What is only looked at is not received.
            assert len(client.recv(23, socket.MSG_PEEK | socket.MSG_WAITALL)) == 23
            assert len(client.recv(23, socket.MSG_WAITALL)) == 23
            assert of_port(probe, port) == {(LOCAL, port, False): (997, 23), (LOCAL, port, True): (23, 997)}
        after = ledger(client), ledger(server)
    made = [(now[0] - then[0], now[1] - then[1]) for then, now in zip(before, after, strict=True)]
    assert made == [(997, 23), (23, 997)], "the kernel's own account"


@pytest.mark.parametrize("way", WAYS)
def test_what_sendfile_sends_is_sent(way: str) -> None:
    needs_way("tcptop", way)
    with tempfile.TemporaryFile() as file, connection() as (client, server, port):
        file.write(bytes(65537))
        file.flush()
        with Running("tcptop", prefer=way) as probe:
            sent = 0
            while sent < 65537:
                sent += os.sendfile(client.fileno(), file.fileno(), sent, 65537 - sent)
                server.recv(sent, socket.MSG_DONTWAIT)
            assert of_port(probe, port)[LOCAL, port, False] == (65537, 0)


def test_a_refused_pods_traffic_is_not_counted(web: Path) -> None:
    with run.echo_server() as port, Running("tcptop", filter_on="1") as probe:
        probe.refuse(run.cgroup_id(web))
        run.run("connects", 23, port, "--bytes", 997, cgroup=web)
        assert len(probe.rows("traffic", cgroup=run.cgroup_id(web))[0]) == 0


def test_processes_are_told_apart_where_it_is_asked_for(web: Path) -> None:
    with run.echo_server() as port, Running("tcptop", processes="true") as probe:
        with run.start("connects", 1, port, "--bytes", 23, cgroup=web) as workload:
            workload.go()
            workload.done()
            keys, _ = probe.rows("traffic", cgroup=run.cgroup_id(web))
            assert keys["process"].tolist() == [workload.pid]


def test_calls_that_find_no_room_in_the_map_are_lost(web: Path) -> None:
    with run.echo_server() as one, run.echo_server() as other, Running("tcptop", sizes={"traffic": 1}) as probe:
        run.run("connects", 1, one, "--bytes", 23, cgroup=web)
        run.run("connects", 5, other, "--bytes", 23, cgroup=web)
        assert probe.lost()[0] >= 10, "five sends and five receipts at least, of one side"


# tcpretrans

SYN_SENT, SYN_RECV, ESTABLISHED = 2, 3, 1


def again(rows: tuple[Rows, Rows]) -> dict[tuple[str, int, bool, int], tuple[int, int]]:
    """(peer, port, accepted, state) → (segments, bytes)."""
    return {
        (address(key["peer"]), int(key["port"]), bool(key["accepted"]), int(key["state"])): (
            int(value["segments"]),
            int(value["bytes"]),
        )
        for key, value in zip(*rows, strict=True)
    }


def total_again(ends: Sequence[socket.socket]) -> tuple[int, int]:
    """(segments, bytes) that these sockets sent again: tcpi_total_retrans, tcpi_bytes_retrans."""
    infos = [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES) for each in ends]
    return (
        sum(struct.unpack_from("=I", each, 100)[0] for each in infos),
        sum(struct.unpack_from("=Q", each, 208)[0] for each in infos),
    )


@contextlib.contextmanager
def belonging_to(cgroup: Path) -> Iterator[None]:
    """Sockets that are made here belong to the cgroup, also when this process has left it."""
    mount = run.cgroup2_mount()
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    run.place(os.getpid(), cgroup)
    try:
        yield
    finally:
        run.place(os.getpid(), mount / own.strip("/"))


@pytest.mark.parametrize("way", ["btf", "raw"])
@pytest.mark.parametrize("to", [lossy.FAR, lossy.FAR_6])
@pytest.mark.shows("probe/tcpretrans")
def test_23_syns_that_nobody_hears_are_sent_again_once_each(web: Path, way: str, to: str) -> None:
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(lossy.wire())
        probe = stack.enter_context(Running("tcpretrans", prefer=way))
        wire.lose()
        with belonging_to(web):
            ends = [stack.enter_context(lossy.connecting(to, 4711)) for _ in range(23)]
        for each in ends:
            # Writable: it has given up.
            assert select.select([], [each], [], run.PHASE_SECONDS)[1] == [each]
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT
        me = run.cgroup_id(web)
        assert again(probe.rows("retransmitted", cgroup=me)) == {(to, 4711, False, SYN_SENT): (23, 0)}
        assert wire.sent_again() == 23
        records = probe.records(cgroup=me)
        assert len(records) == 23
        assert {address(each) for each in records["remote"]} == {to}
        assert set(records["remote_port"]) == {4711} and len(set(records["local_port"])) == 23
        assert probe.lost()[:2] == [0, 0]


@pytest.mark.parametrize("way", ["btf", "raw"])
@pytest.mark.parametrize("to", [lossy.FAR, lossy.FAR_6])
def test_segments_and_bytes_are_those_of_the_kernels_own_account(web: Path, way: str, to: str) -> None:
    """Seven connections lose what they send, until the network is there again and everything arrives."""

    def attempt() -> tuple[int, int]:
        with contextlib.ExitStack() as stack:
            wire = stack.enter_context(lossy.wire())
            listening = stack.enter_context(wire.server(to))
            port = listening.getsockname()[1]
            with belonging_to(web):
                ends = [stack.enter_context(socket.create_connection((to, port))) for _ in range(7)]
            others = [stack.enter_context(listening.accept()[0]) for _ in ends]
            probe = stack.enter_context(Running("tcpretrans", prefer=way))
            wire.lose()
            for each in ends:
                # Less than the first window holds: so it is sent, in several segments.
                each.sendall(bytes(9973))
            deadline = time.monotonic() + run.PHASE_SECONDS
            # A ring's descriptor says when there is more to read; here the sockets' own account is what is waited for.
            while total_again(ends)[0] < 23:
                assert time.monotonic() < deadline
                select.select([], [], [], 0.05)
            wire.lose(False)
            for each in others:
                # Blocking: MSG_WAITALL of a socket with a timeout takes what is there.
                each.setblocking(True)
                assert len(each.recv(9973, socket.MSG_WAITALL)) == 9973
            segments, amount = total_again(ends)
            me = run.cgroup_id(web)
            assert wire.sent_again() == segments >= 23
            ((connection, (counted, of_bytes)),) = again(probe.rows("retransmitted", cgroup=me)).items()
            assert connection == (to, port, False, ESTABLISHED)
            records = probe.records(cgroup=me)
            assert (records["segments"].sum(), records["bytes"].sum()) == (counted, of_bytes)
            assert (counted < segments and of_bytes < amount) or (counted, of_bytes) == (segments, amount)
            return counted, segments

    # A timer that interrupts a hidden task sends again unseen.
    until_nothing_was_hidden(attempt)


@pytest.mark.parametrize("way", ["btf", "raw"])
def test_what_the_machine_itself_could_not_send_is_not_counted(web: Path, way: str) -> None:
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(lossy.wire())
        listening = stack.enter_context(wire.server())
        with belonging_to(web):
            ends = [stack.enter_context(socket.create_connection(listening.getsockname())) for _ in range(5)]
        others = [stack.enter_context(listening.accept()[0]) for _ in ends]
        probe = stack.enter_context(Running("tcpretrans", prefer=way))
        wire.lose()
        for each in ends:
            each.sendall(bytes(997))
        with wire.stopped():
            deadline = time.monotonic() + run.PHASE_SECONDS
            while wire.not_sent() < 7:
                assert time.monotonic() < deadline
                select.select([], [], [], 0.05)
        wire.lose(False)
        for each in others:
            assert len(each.recv(997, socket.MSG_WAITALL)) == 997
        (sent,) = again(probe.rows("retransmitted", cgroup=run.cgroup_id(web))).values()
        assert sent[0] == wire.sent_again() - wire.not_sent() >= 5
        assert wire.not_sent() >= 7


def test_syn_acks_that_are_sent_again_are_the_listeners(web: Path) -> None:
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(lossy.wire())
        wire.set("tcp_synack_retries", 1)
        with belonging_to(web):
            listening = stack.enter_context(socket.create_server((lossy.NEAR, 0), backlog=1024))
        port = listening.getsockname()[1]
        probe = stack.enter_context(Running("tcpretrans"))
        wire.lose()
        with interfaces.entered(wire.there):
            for _ in range(23):
                # The SYN is all that it says.
                lossy.connecting(lossy.NEAR, port).close()
        deadline = time.monotonic() + run.PHASE_SECONDS
        while wire.sent_again() < 23:
            assert time.monotonic() < deadline
            select.select([], [], [], 0.05)
        me = run.cgroup_id(web)
        assert again(probe.rows("retransmitted", cgroup=me)) == {(lossy.FAR, port, True, SYN_RECV): (23, 0)}
        assert set(probe.records(cgroup=me)["local_port"]) == {port}


def test_a_refused_pods_segments_are_not_counted(web: Path) -> None:
    with lossy.wire() as wire, Running("tcpretrans", filter_on="1") as probe:
        probe.refuse(run.cgroup_id(web))
        wire.lose()
        with belonging_to(web):
            made = lossy.connecting(lossy.FAR, 4711)
        with made:
            assert select.select([], [made], [], run.PHASE_SECONDS)[1] == [made]
        assert wire.sent_again() == 1
        assert len(probe.rows("retransmitted", cgroup=run.cgroup_id(web))[0]) == 0
