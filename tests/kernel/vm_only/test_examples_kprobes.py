"""The articles' examples that need kprobes, run as a user runs them, each counting a workload exactly.

Runs in a VM (`make test-vm`); on a kernel without kprobes these tests fail.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from probefleet_agent.kernel import features

from tests.kernel import command_line, examples_runner, tcp_latency
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


@pytest.mark.shows("example/trace")
def test_trace_has_the_arguments_and_the_answer_of_each_call() -> None:
    needs(features.kprobes)
    # The program copies 63 bytes of a name: less than pytest's own folders need.
    path = Path("/tmp") / f"opened-{os.getpid()}"
    path.touch()
    with workloads.start("opens", 13, path, "--missing", 5) as workload:
        with examples_runner.running("trace.yaml", links=2, arguments=["--pid", str(workload.pid)]) as run:
            workload.go()
            workload.done()
    path.unlink()
    assert run.counts("trace", "trace_printk") == {"received": 36, "submitted": 36, "lost": 0, "dropped": 0}
    lines = [each["message"] for each in run.records("trace", "trace_printk")]
    called = [line for line in lines if "(" in line]
    answered = [line for line in lines if "(" not in line]
    # AT_FDCWD is -100; O_RDONLY, with O_CLOEXEC or without.
    assert [line.partition('"')[0] for line in called] == ["do_sys_openat2(-100, "] * 18
    assert [line.split('"')[1] for line in called] == [str(path)] * 13 + [f"{path}.missing"] * 5
    assert [line.rpartition(" ")[2] for line in answered[13:]] == ["-2"] * 5
    assert all(int(line.rpartition(" ")[2]) >= 3 for line in answered[:13])


@pytest.mark.shows("example/funccount")
def test_funccount_has_every_call_of_the_functions_that_fit(tmp_path: Path) -> None:
    needs(features.kprobes)
    needs(features.cookies)  # of the same kernel, 5.15: bpf_get_func_ip() in kprobe programs
    path = tmp_path / "read"
    path.write_bytes(bytes(4096))
    with workloads.start("files", 997, path, "--size", 1, "--writes", 23) as workload:
        before = workload.transferred()
        arguments = ["--pid", str(workload.pid)]
        with examples_runner.running("funccount.yaml", links=1, arguments=arguments) as run:
            workload.go()
            workload.done()
            made = workload.transferred() - before
            name = f"files[{workload.pid}]"
            run.end()
    # The word to go and the "done" line are a read and a write of pipes, and the kernel's account has them.
    assert (made.read_calls, made.write_calls) == (998, 24)
    # The read that waits for the word began before.
    rows = run.rows("funccount", "calls")
    assert {key: value for key, value in rows.items() if key[0] in ("vfs_read", "vfs_write")} == {
        ("vfs_read", name): 997 + 1,
        ("vfs_write", name): 24,
    }


def test_kvm_exits_says_why_where_the_module_is_not_loaded() -> None:
    # Where an earlier test wanted it; or it was never there.
    subprocess.run(["modprobe", "-r", "kvm_amd"], capture_output=True, check=False)
    path = examples_runner.EXAMPLES / "kvm-exits.yaml"
    with contextlib.closing(command_line.start("run", str(path), "--for", "1s")) as run:
        _, errors = run.communicate(timeout=60)
        assert run.returncode != 0
    assert "kvm:kvm_exit" in errors and "on this kernel" in errors, errors


@pytest.mark.shows("example/tcp-latency")
def test_tcp_latency_by_thread_and_by_socket_over_the_same_packets(tmp_path: Path) -> None:
    needs(features.kprobes)
    with tcp_latency.own_loopback(tmp_path) as steering:
        tcp_latency.hold("tcp-latency.yaml", steering)
