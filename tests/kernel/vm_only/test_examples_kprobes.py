"""The articles' examples that need kprobes, run as a user runs them, each counting a workload exactly.

Runs in a VM (`make test-vm`); on a kernel without kprobes these tests fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from probefleet_agent.kernel import features

from tests.kernel import examples_runner
from tests.kernel.support import needs
from tests.workloads import run as workloads

pytestmark = pytest.mark.timeout(2 * examples_runner.SECONDS)
GOLDEN = Path(__file__).parents[2] / "golden/articles"
CONNECTIONS, BYTES = 97, 23


def exchange() -> int:
    """Connections one after the other: the client sends some bytes, and the server sends them back. The port."""
    with workloads.start("connects", "--serve", 0) as server:
        server.go()
        port = server.ready["port"]
        with workloads.start("connects", CONNECTIONS, port, "--bytes", BYTES) as client:
            client.go()
            assert client.done()["connects"] == CONNECTIONS
        server.stop()
        server.done()
    return port


@pytest.mark.shows("example/tcp-sends")
def test_tcp_sendmsg_is_counted_and_by_the_second() -> None:
    needs(features.kprobes)
    with examples_runner.running("tcp-sends.yaml", links=1) as run:
        exchange()
    # One send each way; nothing else in the machine speaks TCP.
    output = run.output("tcp-sends", "sends")
    assert run.rows("tcp-sends", "sends") == {(): 2 * CONNECTIONS}
    assert output["kind"] == "counter" and output["unit"] == "calls" and "ratePerSecond" in output


@pytest.mark.shows("example/probe-execve")
def test_execve_by_kprobe_has_the_articles_columns() -> None:
    needs(features.kprobes)
    with examples_runner.running("probe-execve.yaml", links=2) as run:
        with workloads.start("execs", 5, "--failing", 2) as workload:
            workload.go()
            workload.done()
            parent = workload.pid
    records = [each for each in run.records("probe-execve", "execves") if each["ppid"] == str(parent)]
    assert list(records[0])[-5:] == ["pid", "comm", "ppid", "pcomm", "ret"]
    lines = [f"probe_execve TIME PID {each['comm']} PARENT {each['pcomm']} {each['ret']}\n" for each in records]
    assert "".join(lines) == (GOLDEN / "probe-execve.txt").read_text()
