"""tcpconnlat and tcplife: connections and their bytes, by the socket's pod; biolatency: requests, by who made them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.kernel.catalog_probe import Running
from tests.kernel.support import wait_until
from tests.workloads import run

ECONNREFUSED = -111


@pytest.fixture
def web() -> Iterator[Path]:
    with run.in_cgroup("web") as cgroup:
        yield cgroup


@contextlib.contextmanager
def server_in(cgroup: Path, address: str = "127.0.0.1") -> Iterator[int]:
    """An echo server whose listening socket is made in the cgroup; its port. (`run.start` moves it afterwards.)"""
    enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    command = ["sh", "-c", enter, str(cgroup), str(run.binary("connects")), "--hold", "--serve", "0", address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        port = int(server.stdout.readline().split("port=")[1].split()[0])
        server.stdin.write("g")
        server.stdin.flush()
        try:
            yield port
        finally:
            server.kill()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def address(value: object) -> str:
    found = ipaddress.IPv6Address(bytes(value))  # type: ignore[call-overload]
    return str(found.ipv4_mapped or found)


@pytest.mark.parametrize("way", ["btf", "raw"])
@pytest.mark.parametrize("to", ["127.0.0.1", "::1"])
@pytest.mark.shows("probe/tcpconnlat")
def test_997_connections_are_997_latencies(web: Path, way: str, to: str) -> None:
    with run.echo_server(address=to) as port, run.start("connects", 997, port, to, cgroup=web) as workload:
        with Running("tcpconnlat", prefer=way) as probe:
            workload.go()
            assert workload.done()["connects"] == 997
            keys, found = probe.rows("durations", cgroup=run.cgroup_id(web))
            assert keys["port"].tolist() == [port]
            assert found["slots"].sum() == 997
            assert len(probe.rows("failures", cgroup=run.cgroup_id(web))[0]) == 0
            assert probe.lost() == [0, 0, 0, 0]


def test_refused_connections_are_failures_with_their_error(web: Path) -> None:
    port = closed_port()
    with Running("tcpconnlat") as probe:
        assert run.run("connects", 23, port, cgroup=web)["refused"] == 23
        keys, counts = probe.rows("failures", cgroup=run.cgroup_id(web))
        assert (keys["port"].tolist(), keys["error"].tolist(), counts.tolist()) == ([port], [ECONNREFUSED], [23])
        assert len(probe.rows("durations", cgroup=run.cgroup_id(web))[0]) == 0
        assert len(probe.rows("attempts")[0]) == 0


def test_connections_faster_than_the_minimum_are_left_out(web: Path) -> None:
    with run.echo_server() as port, Running("tcpconnlat", minimum="1m") as probe:
        run.run("connects", 23, port, cgroup=web)
        assert len(probe.rows("durations", cgroup=run.cgroup_id(web))[0]) == 0


def test_a_refused_pods_connections_are_not_measured(web: Path) -> None:
    with run.echo_server() as port, Running("tcpconnlat", filter_on="1") as probe:
        probe.refuse(run.cgroup_id(web))
        run.run("connects", 23, port, cgroup=web)
        assert len(probe.rows("durations", cgroup=run.cgroup_id(web))[0]) == 0


@pytest.mark.parametrize("way", ["btf", "raw"])
@pytest.mark.parametrize("to", ["127.0.0.1", "::1"])
@pytest.mark.shows("probe/tcplife")
def test_both_ends_of_23_connections_say_the_same_bytes(web: Path, way: str, to: str) -> None:
    """Each sends 65,537 bytes and gets them back; the client's pod connected, the server's pod accepted."""
    total = 23 * 65537
    with run.in_cgroup("cart") as cart, server_in(cart, to) as port, Running("tcplife", prefer=way) as probe:
        assert run.run("connects", 23, port, to, "--bytes", 65537, cgroup=web)["connects"] == 23
        for cgroup, accepted in ((web, False), (cart, True)):
            keys, sums = probe.rows("traffic", cgroup=run.cgroup_id(cgroup))
            assert (keys["port"].tolist(), keys["accepted"].tolist()) == ([port], [accepted])
            assert [int(sums[name].sum()) for name in sums.dtype.names] == [23, total, total]
            records = probe.records(cgroup=run.cgroup_id(cgroup))
            assert len(records) == 23
            assert set(records["sent_bytes"]) == set(records["received_bytes"]) == {65537}
            assert {address(each) for each in [*records["local"], *records["remote"]]} == {to}
            assert set(records["local_port" if accepted else "remote_port"]) == {port}
            assert {bytes(each) for each in records["command"]} == {b"connects"}
            assert 0 not in set(records["pid"])
            assert (records["duration"] > 0).all()
        assert probe.lost()[:2] == [0, 0]


def test_connections_that_fail_have_no_life(web: Path) -> None:
    with Running("tcplife") as probe:
        run.run("connects", 23, closed_port(), cgroup=web)
        assert len(probe.records(cgroup=run.cgroup_id(web))) == 0


@pytest.mark.parametrize("queued", ["false", "true"])
@pytest.mark.shows("probe/biolatency")
def test_requests_are_counted_by_operation_device_and_pod(web: Path, queued: str) -> None:
    with run.loop_device() as device, run.start("blockio", 997, device, "--writes", 23, cgroup=web) as workload:
        number = os.stat(device).st_rdev
        before = run.block_requests(device)
        with Running("biolatency", queued=queued) as probe:
            workload.go()
            assert workload.done()["reads"] == 997
            # The kernel wakes who waits for a request before it books it.
            wait_until(lambda: (run.block_requests(device) - before).writes >= 23)
            made = run.block_requests(device) - before
            assert (made.reads, made.writes) == (997, 23)
            keys, found = probe.rows("durations")
            mine = keys["device"] == os.major(number) << 20 | os.minor(number)
            counts = {
                int(operation): int(found["slots"][mine & (keys["operation"] == operation)].sum())
                for operation in np.unique(keys["operation"][mine])
            }
            assert counts == {0: 997, 1: 23}
            assert set(keys["cgroup"][mine]) == {run.cgroup_id(web)}
            assert probe.lost() == [0, 0, 0, 0]
