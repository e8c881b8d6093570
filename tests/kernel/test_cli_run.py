"""The command line on this kernel: exact numbers, exit statuses that scripts can rely on, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_agent.kernel import features
from probefleet_wire import syscalls

from tests.workloads import run as workloads

BPFFS = Path("/sys/fs/bpf")
EXAMPLES = Path(__file__).parents[2] / "examples"
RARE = "sched_get_priority_max"
#: A call that nobody else on the machine makes: no other test, here or end to end.
OWN_CALL = ("ioprio_get", syscalls.number("ioprio_get", os.uname().machine))
KPROBE = """
apiVersion: probefleet.io/v1alpha1
kind: ProbePolicy
metadata: {name: sends}
spec:
  scope: Cluster
  program:
    c:
      source: |
        #include <probefleet.h>
        struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
        sends SEC(".maps");
        SEC("kprobe/tcp_sendmsg") int on_send(void *ctx) { u32 zero = 0; probefleet_add(&sends, &zero, 1); return 0; }
        char LICENSE[] SEC("license") = "GPL";
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "probefleet_cli.main", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], *, status: int = 0) -> tuple[str, str]:
    said, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    return said, errors


def pins_of(process: subprocess.Popen[str]) -> list[str]:
    folder = BPFFS / f"probefleet-run-{process.pid}" / "probefleet" / "instances"
    return [path.name for path in folder.glob("[0-9a-f]*/link_*")]


def wait_until(process: subprocess.Popen[str] | None, true: Callable[[], bool]) -> None:
    # bpffs tells nobody of new names, so this looks again and again; a run that died ends it.
    deadline = time.monotonic() + 60
    while not true():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_attached(process: subprocess.Popen[str]) -> None:
    wait_until(process, lambda: bool(pins_of(process)))


def total(report: dict[str, Any], output: str) -> int:
    found = next(each for each in report["status"]["outputs"] if each["name"] == output)
    return int(found["total"]["value"])


def test_a_run_counts_a_workload_exactly() -> None:
    name, number = OWN_CALL
    with workloads.in_cgroup("web") as cgroup, workloads.start("calls", number, 997, cgroup=cgroup) as workload:
        process = start("run", "syscount", "--set", f"syscalls={name}", "--output", "json")
        wait_until_attached(process)
        workload.go()
        assert workload.done()["calls"] == 997
        process.send_signal(signal.SIGINT)
        said, errors = finish(process)
    report = json.loads(said)
    assert report["kind"] == "ProbeReport" and report["metadata"]["name"] == "syscount"
    assert total(report, "calls") == 997 and total(report, "latency") == 997
    rows = report["status"]["outputs"][0]["total"]["rows"]
    assert [(row["key"], row["value"]) for row in rows] == [(["(host)", name], 997)]
    assert report["status"]["lost"] == 0
    assert errors == "", "nothing but the report where nobody looks"


def test_yaml_of_two_policies_is_two_reports_and_no_pipe_gets_colours() -> None:
    said, errors = finish(start("run", "execsnoop", "runqlat", "--for", "1s", "-o", "yaml"))
    documents = list(yaml.safe_load_all(said))
    assert [each["kind"] for each in documents] == ["ProbeReport", "ProbeReport"]
    assert [each["metadata"]["name"] for each in documents] == ["execsnoop", "runqlat"]
    said, errors = finish(start("run", "execsnoop", "--for", "1s"))
    assert "\x1b" not in said + errors and "== execsnoop ==" in said


def test_on_a_terminal_the_table_is_alive_and_what_is_done_is_said() -> None:
    person, terminal = pty.openpty()
    command = [sys.executable, "-m", "probefleet_cli.main", "run", "syscount", "--for", "3s"]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError), os.fdopen(person, "rb", buffering=0) as screen:  # EIO: nobody writes any more
        while part := screen.read(65536):
            seen += part
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert text.index("loading …") < text.index("counting …") < text.index("== syscount ==")
    head = "1/1 nodes for "
    assert text.count(head) >= 2, "while it counts, and at the end"
    # A live view goes back up over what it drew.
    assert re.search(r"\x1b\[\d*A|\x1b\[1A", text[text.index(head) : text.rindex(head)])


def test_a_process_that_is_gone_has_the_name_that_its_record_gave() -> None:
    """Also as the parent of another: a shell within a shell, each over at once."""
    process = start("run", "execsnoop", "-o", "json")
    wait_until_attached(process)
    subprocess.run(["bash", "-c", "bash -c '/bin/true parent-test; :'; :"], check=True)
    process.send_signal(signal.SIGINT)
    said, _ = finish(process)
    events = next(each for each in json.loads(said)["status"]["outputs"] if each["name"] == "events")
    (found,) = [each for each in events["events"]["records"] if each["arguments"] == "/bin/true parent-test"]
    assert found["pid"].startswith("true[") and found["parent"].startswith("bash[")


def test_a_run_ends_by_itself_and_leaves_nothing() -> None:
    process = start("run", "syscount", "--for", "2s", "--output", "json")
    wait_until_attached(process)
    said, _ = finish(process)
    assert total(json.loads(said), "calls") > 0
    assert not (BPFFS / f"probefleet-run-{process.pid}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_prints_its_report_and_leaves_nothing(number: signal.Signals) -> None:
    process = start("run", "syscount", "runqlat")
    wait_until_attached(process)
    process.send_signal(number)
    said, _ = finish(process)
    assert "== syscount ==" in said and "== runqlat ==" in said
    assert not (BPFFS / f"probefleet-run-{process.pid}").exists()


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    process = start("run", "syscount")
    wait_until_attached(process)
    process.kill()
    process.communicate()
    left = BPFFS / f"probefleet-run-{process.pid}"
    assert left.exists(), "pins outlive their process"
    finish(start("run", "runqlat", "--for", "1s"))
    assert not left.exists()


def test_a_bad_policy_ends_with_2_and_says_all_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "apiVersion: probefleet.io/v1alpha1\nkind: ProbePolicy\nmetadata: {name: x}\nspec: {scop: Cluster}\n"
    )
    said, errors = finish(start("run", path), status=2)
    assert said == ""
    assert (
        "spec.scop: unknown field" in errors and "Did you mean scope?" in errors and "spec.program: missing" in errors
    )


def test_what_this_kernel_refuses_ends_with_3(tmp_path: Path) -> None:
    if features.kprobes():
        pytest.skip("this kernel has kprobes; there is nothing for it to refuse here")
    path = tmp_path / "sends.yaml"
    path.write_text(KPROBE)
    _, errors = finish(start("run", path, "--for", "1s"), status=3)
    assert "UnsupportedFeature" in errors and "no kprobes" in errors
    _, errors = finish(start("check", path), status=3)
    assert "no kprobes" in errors


LONG = """
apiVersion: probefleet.io/v1alpha1
kind: ProbePolicy
metadata: {name: slow}
spec:
  scope: Cluster
  program:
    c:
      source: |
        #include <probefleet.h>
        struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
        sums SEC(".maps");
        SEC("raw_tp/sys_enter") int on_enter(struct bpf_raw_tracepoint_args *ctx) {
          u32 zero = 0;
          u64 sum = 0;
        #pragma unroll
          for (int i = 0; i < 100; i++)
            sum += bpf_ktime_get_ns() ^ i;
          u64 *value = bpf_map_lookup_elem(&sums, &zero);
          *value = sum;
          return 0;
        }
        char LICENSE[] SEC("license") = "GPL";
"""


def test_check_v_prints_the_whole_log_of_the_verifier(tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text(LONG)
    _, short = finish(start("check", path), status=3)
    assert "VerifierRefused: verifier refused on_enter at line 11: value may be null. Test the pointer first." in short
    assert f"Whole log: probefleet check -v {path}" in short and len(short.splitlines()) < 12
    _, whole = finish(start("check", "-v", path), status=3)
    assert len(whole) > 4 * 4096 and "Whole log" not in whole
    log = whole.splitlines()[1:]
    assert any(line.startswith("    0: ") for line in log), "from the first instruction"
    assert short.splitlines()[-2] == log[-1], "to the last words"


BCC = """
apiVersion: probefleet.io/v1alpha1
kind: ProbePolicy
metadata: {name: calls}
spec:
  scope: Cluster
  program:
    bcc:
      source: |
        BPF_HASH(calls, u32, u64);

        RAW_TRACEPOINT_PROBE(sys_enter)
        {
          u32 key = ctx->args[1];
          u64 *value = calls.lookup(&key);

          *value += 1;
          return 0;
        }
"""


def test_what_the_verifier_refuses_of_bcc_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "calls.yaml"
    path.write_text(BCC)
    _, errors = finish(start("check", path), status=3)
    words = "verifier refused raw_tracepoint__sys_enter at line 8: value may be null. Test the pointer first."
    assert words in errors
    assert "; *value += 1;" in errors and "bpf_map_lookup_elem((void" not in errors, "as it was written"


def test_bcc_attached_to_a_system_call_by_the_policy_gets_the_tracepoint_or_registers(tmp_path: Path) -> None:
    """What the function takes decides: registers are a kprobe's, anything else gets the tracepoint's record."""
    path = tmp_path / "calls.yaml"
    attach = "  attach:\n  - {program: count, syscall: {name: sched_get_priority_max}}\n"
    head, _, _ = BCC.partition("        RAW_TRACEPOINT_PROBE")
    body = "{\n          u32 key = 1;\n          calls.increment(key);\n          return 0;\n        }\n"
    path.write_text(f"{head}        int count(void *ctx) {body}{attach}")
    with workloads.start("calls", "rare", 997) as workload:
        process = start("run", path, "--output", "json")
        wait_until_attached(process)
        workload.go()
        workload.done()
        process.send_signal(signal.SIGINT)
        said, _ = finish(process)
    assert total(json.loads(said), "calls") >= 997
    path.write_text(f"{head}        int count(struct pt_regs *ctx) {body}{attach}")
    process = start("check", path)
    said, errors = process.communicate(timeout=60)
    if features.kprobes():
        assert process.returncode == 0 and "sched_get_priority_max" in said, errors
    else:
        assert process.returncode == 3 and "no kprobes" in errors


def test_check_loads_and_leaves_nothing() -> None:
    process = start("check", "syscount", "runqlat")
    said, _ = finish(process)
    assert "catalog syscount: ok, loads on this kernel" in said and "catalog runqlat: ok" in said
    assert not (BPFFS / f"probefleet-run-{process.pid}").exists()


def test_a_program_that_does_not_compile_is_the_policys_mistake_and_not_the_kernels(tmp_path: Path) -> None:
    """BCC's C is compiled against this kernel's types, and libbpf's is not: the status is the same."""
    for name, text in (("bcc", BCC.replace("return 0;", "return 0")), ("c", KPROBE.replace("return 0;", "return 0"))):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        for command in (("check",), ("run", "--for", "1s")):
            _, errors = finish(start(*command, path), status=2)
            assert re.search(r":\d+:\d+: error: expected ';'", errors), errors


def test_check_gives_hints_on_a_programs_own_maps_and_fails_by_none() -> None:
    said, _ = finish(start("check", EXAMPLES / "tail-calls.yaml"))
    (hint,) = [line for line in said.splitlines() if line.startswith("  hint: ")]
    assert "Programs only add to what is in map calls, atomically, and do nothing else with it." in hint


@pytest.mark.parametrize(("call", "how"), [("atomic_increment", "atomically,"), ("increment", "not atomically,")])
def test_check_gives_hints_on_programs_of_bcc_as_json(call: str, how: str, tmp_path: Path) -> None:
    path = tmp_path / "execs.yaml"
    path.write_text((EXAMPLES / "execs-by-uid.yaml").read_text().replace("atomic_increment", call))
    said, _ = finish(start("check", path, "--output", "json"))
    (policy,) = json.loads(said)["policies"]
    assert policy["loads"] and policy["verifiedInstructions"] > 0 and policy["attached"]
    (found,) = policy["hints"]
    assert (found["kind"], found["map"]) == ("count-per-cpu", "execs")
    assert f"Programs only add to what is in map execs, {how}" in found["seen"]


def test_check_gives_no_hints_on_the_catalogs_programs() -> None:
    said, _ = finish(start("check", "syscount", "--output", "json"))
    assert json.loads(said)["policies"][0]["hints"] == []


def test_without_root_it_says_so() -> None:
    command = [sys.executable, "-m", "probefleet_cli.main", "run", "syscount", "--for", "1s"]
    done = subprocess.run(
        command, capture_output=True, text=True, user=65534, group=65534, cwd="/", env=dict(os.environ)
    )
    assert done.returncode == 1, done.stderr
    assert "Loading programs needs root: sudo probefleet" in done.stderr
