"""``run --pid`` by each catalog probe: the one process exactly, and nothing of another that does the same beside it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from probefleet_agent.kernel import libbpf, syscall
from probefleet_wire import bpf_code

from tests.kernel.support import compile_object, until_nothing_was_hidden
from tests.kernel.test_cli_run import finish, start, total, wait_until_attached
from tests.workloads import run

RARE = "sched_get_priority_max"
LOCAL = "127.0.0.1"
C = """
    c:
      source: |
        #include <probefleet.h>
        struct {
          __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1024); __type(key, pid_nr_t); __type(value, u64);
        } calls SEC(".maps");
        SEC("raw_tp/sys_enter") int on_enter(struct bpf_raw_tracepoint_args *ctx) {
          pid_nr_t process = bpf_get_current_pid_tgid() >> 32;
          if (ctx->args[1] != 146 || !ASKED) return 0;
          probefleet_add(&calls, &process, 1);
          return 0;
        }
        char LICENSE[] SEC("license") = "GPL";
"""
BCC = """
    bcc:
      source: |
        #include <probefleet.h>
        BPF_HASH(calls, u32, u64, 1024);
        RAW_TRACEPOINT_PROBE(sys_enter) {
          u32 process = bpf_get_current_pid_tgid() >> 32;
          if (ctx->args[1] != 146 || !ASKED) return 0;
          calls.increment(process);
          return 0;
        }
"""


def policy(path: Path, program: str, *, asks: bool) -> Path:
    asked = "probefleet_selected_process(process)" if asks else "1"
    path.write_text(
        "apiVersion: probefleet.io/v1alpha1\nkind: ProbePolicy\nmetadata: {name: rare}\nspec:\n"
        f"  scope: Cluster\n  program:{program.replace('ASKED', asked)}"
        "  outputs:\n  - {name: calls, from: {map: calls}, counter: {}, groupBy: [key]}\n"
    )
    return path


def reported(process: subprocess.Popen[str]) -> dict[str, Any]:
    """End a run; its report."""
    process.send_signal(signal.SIGINT)
    said, errors = finish(process)
    assert errors == ""
    report: dict[str, Any] = json.loads(said)
    assert report["status"]["lost"] == 0
    return report


@contextlib.contextmanager
def measured(probe: object, pid: int, *more: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """A run that counts; call it for its report."""
    process = start("run", probe, "--pid", pid, "--output", "json", *more)
    try:
        wait_until_attached(process)
        yield lambda: reported(process)
    finally:
        process.kill()
        process.communicate()


def both(wanted: run.Workload, other: run.Workload) -> tuple[dict[str, int], dict[str, int]]:
    """Let both do their work at the same time; what they did."""
    wanted.go()
    other.go()
    return dict(wanted.done()), dict(other.done())


def test_syscount_counts_one_process() -> None:
    with run.start("calls", "rare", 997) as wanted, run.start("calls", "rare", 101) as other:
        with measured("syscount", wanted.pid, "--set", f"syscalls={RARE}") as report:
            assert [each["calls"] for each in both(wanted, other)] == [997, 101]
            found = report()
    assert total(found, "calls") == total(found, "latency") == 997


def test_opensnoop_counts_one_process(tmp_path: Path) -> None:
    path = tmp_path / "opened"
    path.touch()
    with (
        run.start("opens", 97, path, "--missing", 23) as wanted,
        run.start("opens", 101, path) as other,
        measured("opensnoop", wanted.pid) as report,
    ):
        both(wanted, other)
        found = report()
    assert total(found, "opens") == total(found, "events") == 120


def test_execsnoop_counts_what_one_process_becomes() -> None:
    """Its children are other processes."""
    command = ["sh", "-c", "read go; /bin/true; exec env env env env /bin/true"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as wanted,
        subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as other,
        measured("execsnoop", wanted.pid) as report,
    ):
        for each in (wanted, other):
            each.communicate("go\n")
        found = report()
    assert total(found, "execs") == total(found, "events") == 5
    (events,) = [each for each in found["status"]["outputs"] if each["name"] == "events"]
    assert "env env env /bin/true" in json.dumps(events)


def queued(pid: int) -> int:
    """How often the scheduler says a process waited for a CPU: once after each switch away."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def test_runqlat_counts_the_waits_of_one_process() -> None:
    """Both halves of the workload wake each other: its child's waits are another process's, whoever woke it."""

    def attempt() -> tuple[int, int]:
        with run.start("wakes", 997) as wanted, run.start("wakes", 101) as other:
            with measured("runqlat", wanted.pid) as report:
                wanted.switches()
                before = queued(wanted.pid)
                both(wanted, other)
                wanted.switches()  # all of it sleeps
                made = queued(wanted.pid) - before
                return total(report(), "latency"), made

    until_nothing_was_hidden(attempt)


def test_profile_samples_one_process() -> None:
    with run.start("spin", 1) as wanted, run.start("spin", 1) as other:
        with measured("profile", wanted.pid, "--set", "frequency=199") as report:
            used_seconds = both(wanted, other)[0]["cpu_us"] / 1e6
            found = report()
    least = 0.2 if os.environ.get("VM") else 0.5
    assert least * 199 * used_seconds <= total(found, "stacks") <= 1.1 * 199 * used_seconds + 2
    stacks = next(each for each in found["status"]["outputs"] if each["name"] == "stacks")["total"]["rows"]
    assert all("spin" in json.dumps(row) for row in stacks if row["key"] != ["(other)"]), stacks


def test_offcputime_counts_the_sleeps_of_one_process() -> None:
    def attempt() -> tuple[int, int]:
        with (
            run.start("calls", "rare", 97, "--pause", 500) as wanted,
            run.start("calls", "rare", 23, "--pause", 500) as other,
            measured("offcputime", wanted.pid) as report,
        ):
            before = wanted.switches()
            both(wanted, other)
            # All but the last, which has not ended.
            return total(report(), "sleeps"), (wanted.switches() - before).woken - 1

    until_nothing_was_hidden(attempt)


def test_filetop_and_cachestat_count_one_process(tmp_path: Path) -> None:
    path = tmp_path / "read"
    path.write_bytes(bytes(101 * 4096))
    with (
        run.loop_device(101 * 4096) as device,
        device.open("rb", buffering=0),
        run.start("files", 97, device) as wanted,
        run.start("files", 101, device) as other,
        measured("filetop", wanted.pid) as of_files,
        measured("cachestat", wanted.pid) as of_pages,
    ):
        both(wanted, other)
        files, pages = of_files(), of_pages()
    # A block device is no regular file, and has a page cache all the same.
    assert total(files, "reads") == 0
    assert total(pages, "hits") + total(pages, "misses") == 97
    with run.start("files", 97, path) as wanted, run.start("files", 23, path) as other:
        with measured("filetop", wanted.pid) as of_files:
            both(wanted, other)
            files = of_files()
    assert total(files, "reads") == 97 and total(files, "read") == 97 * 4096


@contextlib.contextmanager
def server() -> Iterator[tuple[run.Workload, int]]:
    with run.start("connects", "--serve", 0) as serving:
        serving.go()
        yield serving, serving.ready["port"]
        serving.stop()
        serving.done()


def test_tcpconnlat_counts_who_connects() -> None:
    with server() as (_, port), run.start("connects", 97, port, LOCAL) as wanted:
        with run.start("connects", 101, port, LOCAL) as other, measured("tcpconnlat", wanted.pid) as report:
            both(wanted, other)
            found = report()
    assert total(found, "latency") == 97 and total(found, "failures") == 0


def test_tcpconnlat_counts_whose_connections_fail() -> None:
    with socket.create_server((LOCAL, 0)) as gone:
        port = gone.getsockname()[1]
    with run.start("connects", 23, port, LOCAL) as wanted, run.start("connects", 101, port, LOCAL) as other:
        with measured("tcpconnlat", wanted.pid) as report:
            both(wanted, other)
            found = report()
    assert total(found, "latency") == 0 and total(found, "failures") == 23


def test_tcplife_counts_who_connected_and_who_closed_what_it_accepted() -> None:
    with server() as (serving, port), run.start("connects", 97, port, LOCAL) as wanted:
        with (
            run.start("connects", 23, port, LOCAL) as other,
            measured("tcplife", wanted.pid) as of_client,
            measured("tcplife", serving.pid) as of_server,
        ):
            both(wanted, other)
            client, accepted = of_client(), of_server()
    assert total(client, "connections") == total(client, "events") == 97
    assert total(accepted, "connections") == 120


def test_tcptop_counts_who_sends_and_receives() -> None:
    with server() as (serving, port), run.start("connects", 97, port, LOCAL, "--bytes", 23) as wanted:
        with (
            run.start("connects", 101, port, LOCAL, "--bytes", 23) as other,
            measured("tcptop", wanted.pid) as of_client,
            measured("tcptop", serving.pid) as of_server,
        ):
            both(wanted, other)
            client, accepted = of_client(), of_server()
    assert total(client, "sent") == total(client, "received") == 97 * 23
    assert total(accepted, "sent") == total(accepted, "received") == 198 * 23


def test_biolatency_counts_who_asked_for_the_block() -> None:
    with (
        run.loop_device() as device,
        run.start("blockio", 97, device) as wanted,
        run.start("blockio", 23, device) as other,
        measured("biolatency", wanted.pid) as report,
    ):
        before = run.block_requests(device)
        both(wanted, other)
        assert (run.block_requests(device) - before).reads == 120
        found = report()
    assert total(found, "latency") == 97


@pytest.mark.parametrize("program", [C, BCC], ids=["c", "bcc"])
def test_a_program_of_ones_own_can_ask(program: str, tmp_path: Path) -> None:
    path = policy(tmp_path / "rare.yaml", program, asks=True)
    with run.start("calls", "rare", 997) as wanted, run.start("calls", "rare", 101) as other:
        with measured(path, wanted.pid) as report:
            both(wanted, other)
            found = report()
    rows = found["status"]["outputs"][0]["total"]["rows"]
    assert [row["value"] for row in rows] == [997]


@pytest.mark.parametrize("program", [C, BCC], ids=["c", "bcc"])
def test_one_that_does_not_ask_is_refused_with_what_to_write(program: str, tmp_path: Path) -> None:
    path = policy(tmp_path / "rare.yaml", program, asks=False)
    said, errors = finish(start("run", path, "--pid", os.getpid()), status=2)
    assert said == "" and "probefleet_selected_process(bpf_get_current_pid_tgid() >> 32)" in errors


def test_asking_costs_no_call_of_a_helper_where_every_process_is_wanted() -> None:
    source = """
        #include <probefleet.h>
        SEC("raw_tp/sys_enter") int on_enter(void *ctx) {
          return probefleet_selected_process(probefleet_current_process());
        }
    """
    with libbpf.open_object(compile_object(source, prelude=False), "asks") as opened:
        opened.load()
        with opened.program_fd("on_enter") as program:
            loaded = bpf_code.decode(syscall.program_instructions(program))
    assert bpf_code.CALL not in {each.code for each in loaded}


def test_tcpretrans_says_that_no_process_sends_again() -> None:
    said, errors = finish(start("run", "tcpretrans", "--pid", os.getpid()), status=2)
    assert said == "" and "what tcpretrans counts is no process's doing" in errors


def test_a_process_that_is_not_there_is_refused() -> None:
    _, errors = finish(start("run", "syscount", "--pid", 2**22 + 1), status=2)
    assert "there is no process with this number" in errors
