"""The tools that the articles show, as policies: each run as a user runs it, each counting a workload exactly.

What the probes of the catalog count, and how, is in `test_catalog_*.py`; here is the whole way, file to report.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from probefleet_agent.kernel import features

from tests.kernel import examples_runner, lossy
from tests.kernel.support import until_nothing_was_hidden
from tests.workloads import run as workloads

LOCAL = "127.0.0.1"
HOST = "(host)"


def only(workload: workloads.Workload) -> tuple[str, str]:
    """Of one process: a report shows the first rows, and the machine has others that do much."""
    return "--pid", str(workload.pid)


@pytest.mark.shows("example/tcptop")
def test_tcptop_has_the_bytes_of_a_process_by_peer_and_port() -> None:
    with workloads.echo_server() as port, workloads.start("connects", 23, port, "--bytes", 997) as client:
        with examples_runner.running("tcptop.yaml", instances=1, arguments=only(client)) as run:
            client.go()
            client.done()
    for output in ("sent", "received"):
        assert run.rows("tcptop", output) == {(HOST, LOCAL, str(port), "false"): 23 * 997}


@pytest.mark.shows("example/tcpretrans")
def test_tcpretrans_has_every_syn_that_was_sent_again() -> None:
    # Of this process alone: another that runs the same test has a network of the same addresses.
    port = 10_000 + os.getpid() % 50_000
    with lossy.wire() as wire, examples_runner.running("tcpretrans.yaml", instances=1) as run:
        wire.lose()
        ends = [lossy.connecting(lossy.FAR, port) for _ in range(23)]
        for each in ends:
            with each:
                assert select.select([], [each], [], workloads.PHASE_SECONDS)[1] == [each]
        assert wire.sent_again() == 23
    rows = {key: value for key, value in run.rows("tcpretrans", "segments").items() if key[2] == str(port)}
    assert rows == {(HOST, lossy.FAR, str(port), "syn_sent"): 23}
    records = [each for each in run.records("tcpretrans", "events") if each["remote_port"] == str(port)]
    assert [each["state"] for each in records] == ["syn_sent"] * 23


@pytest.mark.shows("example/offcputime")
def test_offcputime_has_every_long_sleep_of_a_process() -> None:
    def attempt() -> tuple[int, int]:
        with workloads.start("calls", "rare", 23, "--pause", 3000) as workload:
            with examples_runner.running("offcputime.yaml", links=1, arguments=only(workload)) as run:
                workload.go()
                workload.done()
        # With the wait for the word to go.
        sleeps = run.rows("offcputime", "sleeps").get((HOST,), 0)
        stacks = run.output("offcputime", "stacks")
        assert stacks["unit"] == "ns" and stacks["total"]["value"] >= sleeps * 3_000_000
        assert any("nanosleep" in row["key"][-1] for row in stacks["total"]["rows"])
        # Where it left, not what looked at it.
        leaves = {row["key"][-1].rpartition(";")[2] for row in stacks["total"]["rows"]}
        assert all("sched" in leaf for leaf in leaves), leaves
        return sleeps, 23

    until_nothing_was_hidden(attempt)


@pytest.mark.shows("example/filetop")
def test_filetop_has_every_byte_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(bytes(997 * 101))
    with workloads.start("files", 997, path, "--writes", 23, "--size", 101) as workload:
        with examples_runner.running("filetop.yaml", instances=1, arguments=only(workload)) as run:
            workload.go()
            workload.done()
    for output, value in (("read", 997 * 101), ("written", 23 * 101), ("reads", 997), ("writes", 23)):
        assert run.rows("filetop", output) == {(HOST, tmp_path.name[:31], "ledger.db"): value}


def in_memory(descriptor: int, length: int) -> int:
    """How many pages of a file the page cache has, by the kernel's own account: mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(descriptor, length, prot=mmap.PROT_READ) as mapped:
        pages = np.zeros((length + 4095) // 4096, np.uint8)
        seen = np.frombuffer(mapped, np.uint8)
        found = libc.mincore(
            ctypes.c_void_p(seen.ctypes.data), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)
        )
        del seen
    assert found == 0, os.strerror(ctypes.get_errno())
    return int((pages & 1).sum())


@pytest.mark.shows("example/cachestat")
def test_cachestat_tells_hits_from_misses_by_process() -> None:
    """Of 997 pages of a device 499 have been read before."""
    with workloads.loop_device(997 * 4096) as device, device.open("rb", buffering=0) as held:
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert len(os.pread(held.fileno(), 499 * 4096, 0)) == 499 * 4096
        with workloads.start("files", 997, device, "--random") as workload:
            with examples_runner.running("cachestat.yaml", instances=1, arguments=only(workload)) as run:
                # Memory that others need can have taken some of them.
                there = in_memory(held.fileno(), 997 * 4096)
                workload.go()
                workload.done()
                key = (HOST, f"files[{workload.pid}]")
                run.end()
    assert 0 < there <= 499
    assert run.rows("cachestat", "hits") == {key: there}
    assert run.rows("cachestat", "misses") == {key: 997 - there}
    # And what else it needed of its own file.
    assert run.rows("cachestat", "added")[key] >= 997 - there


@pytest.mark.shows("example/pidstat")
def test_pidstat_has_the_cpu_time_of_a_process_and_how_often_it_ran() -> None:
    def attempt() -> tuple[int, int]:
        with (
            workloads.start("spin", 1, "--pause", 1000) as workload,
            examples_runner.running("pidstat.yaml", instances=1, arguments=only(workload)) as run,
        ):
            ledger, before = workload.switches(), workload.schedule()
            workload.go()
            workload.done()
            # Asleep: all that it ran is over.
            runs = (workload.switches() - ledger).queued
            ran_ns = workload.schedule().ran_ns - before.ran_ns
            key = (HOST, f"spin[{workload.pid}]")
            run.end()
        # The scheduler's clock for a task leaves out what the host took of a virtual CPU.
        assert 0.98 * ran_ns <= run.rows("pidstat", "cpu")[key] <= 1.25 * ran_ns
        return run.rows("pidstat", "runs")[key], runs

    until_nothing_was_hidden(attempt)


#: (instruction set, I/O instruction, halt): what Intel's and AMD's processors call these exits.
HARDWARE = {"1": ("30", "12"), "2": (str(0x7B), str(0x78))}


@pytest.mark.shows("example/kvm-exits")
def test_kvm_exits_has_every_byte_that_a_guest_writes() -> None:
    """A guest of tests/kernel/vm is emulated with SVM; a KVM that does without such hardware has no such exits."""
    for module in ("kvm_intel", "kvm_amd"):
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            subprocess.run(["modprobe", module], capture_output=True, check=False)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("this machine runs no virtual machines: it has no /dev/kvm")
    types = Path("/sys/kernel/btf")
    if not (types / "kvm").exists() and b"trace_event_raw_kvm_exit" not in (types / "vmlinux").read_bytes():
        pytest.skip("no types of modules: the example reads those of KVM")
    with examples_runner.running("kvm-exits.yaml", instances=1) as run, workloads.start("guest", 997) as workload:
        workload.go()
        assert workload.done() == {"exits": 997, "halts": 1}
        name = f"guest[{workload.pid}]"
        run.end()
    rows = {key[1]: value for key, value in run.rows("kvm-exits", "userspace-exits").items() if key[0] == name}
    assert rows == {"KVM_EXIT_IO": 997, "KVM_EXIT_HLT": 1}
    # Others are pages that were not there yet, and interrupts.
    exits = {key[1:]: value for key, value in run.rows("kvm-exits", "exits").items() if key[0] == name}
    for isa, (port, halt) in HARDWARE.items():
        if any(each[0] == isa for each in exits):
            assert (exits[isa, port], exits[isa, halt]) == (997, 1)


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
            with examples_runner.running("runqlat.yaml", links=3, arguments=only(workload)) as run:
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
        with examples_runner.running("profile.yaml", instances=1, arguments=only(workload)) as run:
            workload.go()
            used_seconds = workload.done()["cpu_us"] / 1e6
            run.end()
    samples = run.output("profile", "stacks")["total"]["value"]
    assert 0.5 * 49 * used_seconds <= samples <= 1.1 * 49 * used_seconds + 2
    rows = run.rows("profile", "stacks")
    hot = sum(value for key, value in rows.items() if key[-1].endswith("spin_inner"))
    # An emulated CPU takes its interrupts between blocks of code: more of them in what calls and in the kernel.
    assert hot >= (0.7 if os.environ.get("VM") else 0.9) * samples, rows


@pytest.mark.shows("example/opens")
def test_opensnoop_has_every_open_of_a_process(tmp_path: Path) -> None:
    path = tmp_path / "opened"
    path.touch()
    with workloads.start("opens", 23, path, "--missing", 5) as workload:
        with examples_runner.running("opens.yaml", links=3, arguments=only(workload)) as run:
            workload.go()
            assert workload.done()["opens"] == 23
    assert run.rows("opens", "opens") == {(HOST, "OK"): 23, (HOST, "ENOENT"): 5}
    assert [each["file"] for each in run.records("opens", "events")] == [str(path)] * 23 + [f"{path}.missing"] * 5


@pytest.mark.shows("example/tcplife")
def test_tcplife_has_every_connection_that_ended() -> None:
    with workloads.echo_server() as port, workloads.start("connects", 23, port, "--bytes", 997) as client:
        with examples_runner.running("tcplife.yaml", instances=1, arguments=only(client)) as run:
            client.go()
            client.done()
    for output, value in (("connections", 23), ("sent", 23 * 997), ("received", 23 * 997)):
        assert run.rows("tcplife", output) == {(HOST, str(port), "false"): value}


@pytest.mark.shows("example/biolatency")
def test_biolatency_has_every_request_of_a_device() -> None:
    with workloads.loop_device() as device, examples_runner.running("biolatency.yaml", links=3) as run:
        workloads.run("blockio", 997, device, "--writes", 23)
        run.end()
    rows = {key: value for key, value in run.rows("biolatency", "latency").items() if key[0] == device.name}
    assert rows == {(device.name, "read"): 997, (device.name, "write"): 23}
