"""The workload of the example of TCP latency, and what both of its policies have to say of it.

Messages of known sizes go each way on connections over a loopback of their own: in one half of them the sender's own
thread carries its packet up to the other end, in the other half another CPU receives it, as if it came from elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from probefleet_agent.kernel import interfaces

from tests.kernel import examples_runner, network
from tests.workloads import run as workloads

CONNECTIONS = 97
SENDS = 2 * CONNECTIONS  # one each way
#: Bytes a message, by which the halves are told apart.
NEAR, ELSEWHERE = 211, 223


@contextlib.contextmanager
def own_loopback(folder: Path) -> Iterator[Path]:
    """A network of its own for this thread, and the file that says which CPUs receive what its loopback carries."""
    with network.namespace() as here, interfaces.entered(here):
        network.ip("link", "set", "lo", "up")
        subprocess.run(["mount", "-t", "sysfs", "sysfs", folder], check=True)  # /sys itself shows another network
        try:
            yield folder / "class/net/lo/queues/rx-0/rps_cpus"
        finally:
            subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def received_on_another_cpu(steering: Path) -> Iterator[None]:
    """Who is started here runs on CPU 0, and what its loopback carries is received on CPU 1."""
    cpus = os.sched_getaffinity(0)
    steering.write_text("2")
    os.sched_setaffinity(0, {0})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
        steering.write_text("0")


def exchange(size: int) -> int:
    """Connections one after the other, a message of that size each way on each; the server's port."""
    with workloads.start("connects", "--serve", 0) as server:
        server.go()
        port = server.ready["port"]
        with workloads.start("connects", CONNECTIONS, port, "--bytes", size) as client:
            client.go()
            assert client.done()["connects"] == CONNECTIONS
        server.stop()
        server.done()
    return port


def hold(policies: Path | str, steering: Path) -> None:
    """Run the policies over both halves of the workload and hold their reports against it."""
    with examples_runner.running(policies, links=5) as run:
        with received_on_another_cpu(steering):
            exchange(ELSEWHERE)
        port = exchange(NEAR)

    # By socket each send has an end: the packet that acknowledges it.
    found = run.rows("tcp-latency-by-socket", "answered")
    assert found == {(str(NEAR),): SENDS, (str(ELSEWHERE),): SENDS}, found
    assert run.counts("tcp-latency-by-socket", "latencies")["lost"] == 0
    ours = [each for each in run.records("tcp-latency-by-socket", "latencies") if each["size"] == str(NEAR)]
    assert ours
    for each in ours:
        assert (each["saddr"], each["daddr"]) == ("127.0.0.1", "127.0.0.1") and int(each["time"]) > 0
        assert str(port) in (each["sport"], each["dport"]), "in host order"

    # By thread it depends on who receives. Where the sender's own thread carries the packet to the other end, that
    # end's socket ends it (the kernel may leave some to a thread of its own) …
    matches = run.rows("tcp-latency-by-thread", "matches")
    near, elsewhere = (
        {socket: count for (size, socket), count in matches.items() if size == str(of)} for of in (NEAR, ELSEWHERE)
    )
    assert near["other"] > SENDS // 2 and sum(near.values()) <= SENDS, matches
    # … and where another CPU receives it, nothing does, but for what comes while the thread still has its socket.
    assert elsewhere.get("other", 0) < SENDS // 4 and sum(elsewhere.values()) <= SENDS, matches
    swapped = str(int.from_bytes(port.to_bytes(2, "big"), "little"))
    ours = [each for each in run.records("tcp-latency-by-thread", "latencies") if each["size"] == str(NEAR)]
    assert ours
    for each in ours:
        assert swapped in (each["sport"], each["dport"]), "in network order, as the socket has it"
