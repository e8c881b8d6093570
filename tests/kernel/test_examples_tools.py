"""The tools that the articles show, as policies: each run as a user runs it, each counting a workload exactly.

What the probes of the catalog count, and how, is in `test_catalog_*.py`; here is the whole way, file to report.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from probefleet_agent.kernel import features

from tests.kernel import examples_runner, lossy
from tests.kernel.test_catalog_processes import until_nothing_was_hidden
from tests.workloads import run as workloads

LOCAL = "127.0.0.1"
HOST = "(host)"


@pytest.mark.shows("example/tcptop")
def test_tcptop_has_the_bytes_of_both_ends_by_peer_and_port() -> None:
    with examples_runner.running("tcptop.yaml", links=2) as run, workloads.echo_server() as port:
        workloads.run("connects", 23, port, "--bytes", 997)
    for output in ("sent", "received"):
        rows = {key: value for key, value in run.rows("tcptop", output).items() if str(port) in key}
        assert rows == {
            (HOST, LOCAL, str(port), "false"): 23 * 997,
            (HOST, LOCAL, str(port), "true"): 23 * 997,
        }


@pytest.mark.shows("example/tcpretrans")
def test_tcpretrans_has_every_syn_that_was_sent_again() -> None:
    with lossy.wire() as wire, examples_runner.running("tcpretrans.yaml", links=2) as run:
        wire.lose()
        ends = [lossy.connecting(lossy.FAR, 4711) for _ in range(23)]
        for each in ends:
            with each:
                assert select.select([], [each], [], workloads.PHASE_SECONDS)[1] == [each]
        assert wire.sent_again() == 23
    rows = {key: value for key, value in run.rows("tcpretrans", "segments").items() if key[1] == lossy.FAR}
    assert rows == {(HOST, lossy.FAR, "4711", "syn_sent"): 23}
    records = [each for each in run.records("tcpretrans", "events") if each["remote"] == lossy.FAR]
    assert [each["state"] for each in records] == ["syn_sent"] * 23


@pytest.mark.shows("example/offcputime")
def test_offcputime_has_every_long_sleep_of_a_process() -> None:
    def attempt() -> tuple[int, int]:
        with workloads.start("calls", "rare", 23, "--pause", 3000) as workload:
            with examples_runner.running("offcputime.yaml", links=1, arguments=["--pid", str(workload.pid)]) as run:
                workload.go()
                workload.done()
        stacks = run.output("offcputime", "stacks")
        assert stacks["unit"] == "ns" and stacks["total"]["value"] >= 23 * 3_000_000
        assert any("nanosleep" in row["key"][-1] for row in stacks["total"]["rows"])
        # Where it left, not what looked at it.
        assert all("schedule" in row["key"][-1].rpartition(";")[2] for row in stacks["total"]["rows"])
        # With the wait for the word to go.
        return run.rows("offcputime", "sleeps").get((HOST,), 0), 23

    until_nothing_was_hidden(attempt)


@pytest.mark.shows("example/filetop")
def test_filetop_has_every_byte_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(bytes(997 * 101))
    with examples_runner.running("filetop.yaml", links=3) as run:
        workloads.run("files", 997, path, "--writes", 23, "--size", 101)
    for output, value in (("read", 997 * 101), ("written", 23 * 101), ("reads", 997), ("writes", 23)):
        rows = {key: each for key, each in run.rows("filetop", output).items() if each and key[-1] == "ledger.db"}
        assert rows == {(HOST, tmp_path.name[:31], "ledger.db"): value}


@pytest.mark.shows("example/cachestat")
def test_cachestat_tells_hits_from_misses_by_process() -> None:
    with workloads.loop_device(997 * 4096) as device, device.open("rb", buffering=0) as held:
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with (
            examples_runner.running("cachestat.yaml", links=4) as run,
            workloads.start("files", 997, device, "--random") as cold,
            workloads.start("files", 499, device, "--random") as warm,
        ):
            for each in (cold, warm):
                each.go()
                each.done()
            run.end()

    def value(output: str, process: workloads.Workload) -> int:
        return next(
            (value for key, value in run.rows("cachestat", output).items() if key[-1].endswith(f"[{process.pid}]")), 0
        )

    assert [value(output, cold) for output in ("hits", "misses", "added")] == [0, 997, 997]
    assert [value(output, warm) for output in ("hits", "misses", "added")] == [499, 0, 0]


@pytest.mark.shows("example/pidstat")
def test_pidstat_has_the_cpu_time_of_a_process_and_how_often_it_ran() -> None:
    def attempt() -> tuple[int, int]:
        with (
            workloads.start("spin", 1, "--pause", 1000) as workload,
            examples_runner.running("pidstat.yaml", links=1) as run,
        ):
            ledger, before = workload.switches(), workload.schedule()
            workload.go()
            workload.done()
            # Asleep: all that it ran is over.
            runs = (workload.switches() - ledger).queued
            ran_ns = workload.schedule().ran_ns - before.ran_ns
            name = f"spin[{workload.pid}]"
            run.end()
        # The scheduler's clock for a task leaves out what the host took of a virtual CPU.
        (found_ns,) = [value for key, value in run.rows("pidstat", "cpu").items() if key[-1] == name]
        assert 0.98 * ran_ns <= found_ns <= 1.25 * ran_ns
        return next(value for key, value in run.rows("pidstat", "runs").items() if key[-1] == name), runs

    until_nothing_was_hidden(attempt)


@pytest.mark.shows("example/kvm-exits")
def test_kvm_exits_has_every_byte_that_a_guest_writes() -> None:
    """The hardware's exits are counted where there is hardware: KVM without it has none."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("this machine runs no virtual machines: it has no /dev/kvm")
    with examples_runner.running("kvm-exits.yaml", links=2) as run:
        with workloads.start("guest", 997) as workload:
            workload.go()
            assert workload.done() == {"exits": 997, "halts": 1}
            name = f"guest[{workload.pid}]"
            run.end()
    rows = {key[1]: value for key, value in run.rows("kvm-exits", "userspace-exits").items() if key[0] == name}
    assert rows == {"KVM_EXIT_IO": 997, "KVM_EXIT_HLT": 1}
    hardware = sum(value for key, value in run.rows("kvm-exits", "exits").items() if key[0] == name)
    assert hardware == 0 or hardware >= 998, "each that reaches the program has left the guest before"


@pytest.mark.parametrize("file", ["trace.yaml", "funccount.yaml"])
def test_where_there_are_no_kprobes_a_policy_says_so(file: str) -> None:
    if features.kprobes():
        pytest.skip("this kernel has kprobes: see vm_only/test_examples_kprobes.py")
    path = examples_runner.EXAMPLES / file
    done = subprocess.run(
        [sys.executable, "-m", "probefleet_cli.main", "run", str(path), "--for", "1s"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "this kernel has no kprobes: it was built without CONFIG_KPROBES; take a tracepoint" in done.stderr


@pytest.mark.shows("example/execsnoop")
def test_execsnoop_has_every_program_that_a_workload_starts() -> None:
    with examples_runner.running("execsnoop.yaml", links=1) as run, workloads.start("execs", 23) as workload:
        workload.go()
        assert workload.done()["execs"] == 23
        parent = f"execs[{workload.pid}]"
        run.end()
    mine = [each["arguments"] for each in run.records("execsnoop", "events") if each["parent"] == parent]
    assert mine == [f"execs exit {number}" for number in range(23)]


@pytest.mark.shows("example/runqlat")
def test_runqlat_has_every_wait_of_a_process() -> None:
    def attempt() -> tuple[int, int]:
        with workloads.start("calls", "rare", 997, "--pause", 100) as workload:
            with examples_runner.running("runqlat.yaml", links=3, arguments=["--pid", str(workload.pid)]) as run:
                before = workload.switches()
                workload.go()
                workload.done()
                made = (workload.switches() - before).queued
                run.end()
        return run.rows("runqlat", "latency").get((HOST,), 0), made

    until_nothing_was_hidden(attempt)


@pytest.mark.shows("example/profile")
def test_profile_has_the_samples_of_the_cpu_time_that_a_process_used() -> None:
    with workloads.start("spin", 2) as workload:
        arguments = ["--pid", str(workload.pid)]
        # A perf event is attached on each CPU.
        with examples_runner.running("profile.yaml", links=os.cpu_count() or 1, arguments=arguments) as run:
            workload.go()
            used_seconds = workload.done()["cpu_us"] / 1e6
            run.end()
    samples = run.output("profile", "stacks")["total"]["value"]
    assert 0.5 * 49 * used_seconds <= samples <= 1.1 * 49 * used_seconds + 2
    hot = sum(value for key, value in run.rows("profile", "stacks").items() if key[-1].endswith("spin_inner"))
    assert hot >= 0.9 * samples


@pytest.mark.shows("example/opens")
def test_opensnoop_has_every_open_of_a_process(tmp_path: Path) -> None:
    path = tmp_path / "opened"
    path.touch()
    with workloads.start("opens", 23, path, "--missing", 5) as workload:
        with examples_runner.running("opens.yaml", links=3, arguments=["--pid", str(workload.pid)]) as run:
            workload.go()
            assert workload.done()["opens"] == 23
    assert run.rows("opens", "opens") == {(HOST, "OK"): 23, (HOST, "ENOENT"): 5}
    assert [each["file"] for each in run.records("opens", "events")] == [str(path)] * 23 + [f"{path}.missing"] * 5


@pytest.mark.shows("example/tcplife")
def test_tcplife_has_every_connection_that_ended() -> None:
    with examples_runner.running("tcplife.yaml", links=1) as run, workloads.echo_server() as port:
        workloads.run("connects", 23, port, "--bytes", 997)
    for output, value in (("connections", 23), ("sent", 23 * 997), ("received", 23 * 997)):
        rows = {key: value for key, value in run.rows("tcplife", output).items() if str(port) in key}
        assert rows == {(HOST, str(port), "false"): value, (HOST, str(port), "true"): value}


@pytest.mark.shows("example/biolatency")
def test_biolatency_has_every_request_of_a_device() -> None:
    with workloads.loop_device() as device, examples_runner.running("biolatency.yaml", links=3) as run:
        workloads.run("blockio", 997, device, "--writes", 23)
        run.end()
    rows = {key: value for key, value in run.rows("biolatency", "latency").items() if key[0] == device.name}
    assert rows == {(device.name, "read"): 997, (device.name, "write"): 23}
