"""What needs a kernel with kprobes, by the command line that a user has: attached, counted exactly, nothing left.

Runs in a VM (`make test-vm`). On a kernel without kprobes these tests fail: they are here because that one has them.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_agent.kernel import features

from tests.kernel import command_line
from tests.workloads import run as workloads

BPFFS = Path("/sys/fs/bpf")
# An emulated CPU: Python alone takes seconds to start there, BCC 15 s to compile.
SECONDS = 120
# sched_get_priority_max: of SCHED_FIFO (1) it is 99, of -1 it fails with EINVAL. Nothing else calls it.
MAX = "__x64_sys_sched_get_priority_max"
CORE = """
#include <probefleet.h>

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 64);
    __type(key, s64);
    __type(value, u64);
} answers SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 64);
    __type(key, s64);
    __type(value, u64);
} questions SEC(".maps");

SEC("kprobe/__x64_sys_sched_get_priority_max")
int on_call(struct pt_regs *ctx)
{
    struct pt_regs *user = (struct pt_regs *)PT_REGS_PARM1(ctx);
    s64 question = (s32)BPF_CORE_READ(user, di);

    probefleet_add(&questions, &question, 1);
    return 0;
}

SEC("kretprobe/__x64_sys_sched_get_priority_max")
int on_return(struct pt_regs *ctx)
{
    s64 answer = PT_REGS_RC(ctx);

    probefleet_add(&answers, &answer, 1);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
"""
# The same in the other dialect: the names say where the functions go.
BCC = """
#include <uapi/linux/ptrace.h>
BPF_HASH(questions, s64, u64);
BPF_HASH(answers, s64, u64);

int kprobe____x64_sys_sched_get_priority_max(struct pt_regs *ctx)
{
    struct pt_regs *user = (struct pt_regs *)PT_REGS_PARM1(ctx);
    u64 asked = 0;
    s64 question;

    bpf_probe_read_kernel(&asked, sizeof(asked), &user->di);
    question = (s32)asked;
    questions.increment(question);
    return 0;
}

int kretprobe____x64_sys_sched_get_priority_max(struct pt_regs *ctx)
{
    s64 answer = PT_REGS_RC(ctx);

    answers.increment(answer);
    return 0;
}
"""


def policy(path: Path, program: dict[str, Any], **spec: Any) -> Path:
    """A policy file with both maps as counters by key."""
    outputs = [
        {"name": name, "from": {"map": name}, "counter": {}, "groupBy": ["key"]} for name in ("questions", "answers")
    ]
    made = {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": path.stem},
        "spec": {"scope": "Cluster", "program": program, "outputs": outputs, **spec},
    }
    path.write_text(yaml.safe_dump(made))
    return path


@contextmanager
def running(file: Path, *, links: int) -> Iterator[command_line.Process]:
    """`probefleet run FILE`, once it has attached all its programs."""
    process = command_line.start("run", str(file), "--output", "json")
    try:
        pins = BPFFS / f"probefleet-run-{process.pid}" / "probefleet" / "instances"
        deadline = time.monotonic() + SECONDS
        # bpffs tells nobody of new names. A name without digits in front is still being built. Before Linux 5.15 there
        # are no links to pin.
        name, least = ("link_*", links) if features.perf_link() else ("manifest", 1)
        while len(list(pins.glob(f"[0-9a-f]*/{name}"))) < least:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "it did not attach"
            time.sleep(0.05)
        yield process
    finally:
        process.close()


def report_of(process: command_line.Process) -> dict[str, Any]:
    """End it as a user does, and take its report."""
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(said)
    return found


def totals(report: dict[str, Any], output: str) -> dict[str, int]:
    found = next(each for each in report["status"]["outputs"] if each["name"] == output)
    return {row["key"][0]: row["value"] for row in found["total"]["rows"]}


def make_calls(count: int, argument: int) -> None:
    with workloads.start("calls", "rare", count, argument) as workload:
        workload.go()
        assert workload.done()["calls"] == count


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("program", [{"c": {"source": CORE}}, {"bcc": {"source": BCC}}], ids=["c", "bcc"])
def test_a_kprobe_and_a_kretprobe_count_questions_and_answers_exactly(program: dict[str, Any], tmp_path: Path) -> None:
    assert features.kprobes(), "these tests are for a kernel with kprobes: make test-vm"
    with running(policy(tmp_path / "priorities.yaml", program), links=2) as process:
        make_calls(997, 1)
        make_calls(23, -1)
        report = report_of(process)
        assert totals(report, "questions") == {"1": 997, "-1": 23}
        assert totals(report, "answers") == {"99": 997, "-22": 23}
        assert report["status"]["columns"]["lost"] == "0"
        assert not (BPFFS / f"probefleet-run-{process.pid}").exists()
