"""The examples that the articles on eBPF show, each run as a user runs it, each counting a workload exactly.

Here those that tracepoints carry; those that need kprobes are in `vm_only/test_examples_kprobes.py`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_wire import clang
from probefleet_wire.bpf_object import BpfObject

from tests.kernel import examples_runner
from tests.workloads import run as workloads

ROOT = Path(__file__).parents[2]
#: A user that nothing else on the machine is.
USER = 64023


def source_of(file: str, name: str) -> str:
    """The program of one policy of an example."""
    documents = yaml.safe_load_all((examples_runner.EXAMPLES / file).read_text())
    spec = next(each["spec"] for each in documents if each["metadata"]["name"] == name)
    return str(spec["program"]["c"]["source"])


def by_task(records: Sequence[Mapping[str, str]], task: str, field: str) -> list[Mapping[str, str]]:
    """Of the machine's records those of one workload."""
    return [each for each in records if each[field] == task]


@pytest.fixture
def execs(tmp_path: Path) -> Path:
    """The workload under a name of its own: pods of other tests start programs by the usual one."""
    path = tmp_path / f"execs-{os.getpid()}"
    shutil.copy(workloads.binary("execs"), path)
    return path


def as_user(*command: object) -> None:
    subprocess.run(
        ["setpriv", f"--reuid={USER}", "--clear-groups", *map(str, command)], check=True, capture_output=True
    )


@pytest.mark.shows("example/hello-execve")
def test_hello_world_says_so_23_times(execs: Path) -> None:
    with examples_runner.running("hello-execve.yaml", links=1) as run, workloads.start(str(execs), 23) as workload:
        workload.go()
        assert workload.done()["execs"] == 23
    lines = by_task(run.records("hello-execve", "lines"), execs.name, "task")
    assert [each["message"] for each in lines] == ["Hello World!"] * 23
    assert len({each["pid"] for each in lines}) == 23


@pytest.mark.shows("example/execs-by-uid", "program/bcc")
def test_execs_are_counted_by_user() -> None:
    with examples_runner.running("execs-by-uid.yaml", links=1) as run:
        for _ in range(23):
            as_user("/bin/true")
    # setpriv has its new uid when it calls execve, and calls it once.
    assert run.rows("execs-by-uid", "execs")[(str(USER),)] == 23


@pytest.mark.shows("example/exec-records")
def test_records_of_both_kinds_of_ring_say_pid_user_command_and_message(execs: Path) -> None:
    with examples_runner.running("exec-records.yaml", links=2) as run, workloads.start(str(execs), 23) as workload:
        workload.go()
        workload.done()
    user = pwd.getpwuid(os.getuid()).pw_name
    for policy in ("exec-perf-records", "exec-ring-records"):
        records = by_task(run.records(policy, "execs"), execs.name, "command")
        assert [(each["uid"], each["message"]) for each in records] == [(user, "Hello World")] * 23
        assert len({each["pid"] for each in records}) == 23
        counts = run.counts(policy, "execs")
        assert (counts["lost"], counts["dropped"]) == (0, 0)


@pytest.mark.parametrize("policy", ["exec-perf-records", "exec-ring-records"])
def test_records_that_find_no_room_are_counted(policy: str, tmp_path: Path) -> None:
    """Each call of a rare system call makes 1,024 records: 37,888 at once, of which 64 pages hold a part."""
    documents = yaml.safe_load_all((examples_runner.EXAMPLES / "exec-records.yaml").read_text())
    found: dict[str, Any] = next(each for each in documents if each["metadata"]["name"] == policy)
    program = found["spec"]["program"]["bcc"]
    text = program["source"].replace("sys_enter_execve", "sys_enter_sched_rr_get_interval")
    body = re.search(r"(\n +(?:execs\.perf_submit|if \(execs\.ringbuf_output).*?)\n +return 0;", text, re.DOTALL)
    assert body is not None
    program["source"] = text.replace(body[1], f"\n#pragma unroll\nfor (int i = 0; i < 128; i++) {{{body[1]}\n}}")
    found["spec"]["interval"] = "1h"
    path = tmp_path / "flood.yaml"
    path.write_text(yaml.safe_dump(found))
    number = {"x86_64": 148, "aarch64": 127}[os.uname().machine]
    with examples_runner.running(path, links=1) as run, workloads.start("calls", number, 997, 0, 0) as workload:
        workload.go()
        workload.done()
    counts = run.counts(policy, "execs")
    assert counts["lost"] > 0
    assert counts["received"] + counts["dropped"] + counts["lost"] == 997 * 128


@pytest.mark.shows("example/functions")
def test_inlined_and_called_functions_count_the_same() -> None:
    with examples_runner.running("functions.yaml", links=1) as run:
        as_user(workloads.binary("opens"), 997, "/dev/null")
    for output in ("inlined", "called"):
        # The workload is static: it opens what it is told, and nothing before.
        assert run.rows("functions", output)[(str(USER),)] == 997
    made = clang.compile_core(source_of("functions.yaml", "functions"), name="x.c", include_dirs=[ROOT / "bpf/include"])
    # What is put into its caller looks its map up there; what is called does so in a function of its own.
    users = {(each.map, each.program) for each in BpfObject.parse(made.object).references}
    assert users >= {("inlined", "on_openat"), ("called", "")}
    assert not users & {("inlined", ""), ("called", "on_openat")}


EXECVE_COLUMNS = [
    "time",
    "node",
    "namespace",
    "workload",
    "pod",
    "container",
    "pid",
    "comm",
    "ppid",
    "pcomm",
    "ret",
    "filename",
]


def execve_lines(run: examples_runner.Run, policy: str, parent: int) -> list[str]:
    """The workload's records as the article prints them, numbers that change written as words."""
    records = by_task(run.records(policy, "execves"), str(parent), "ppid")
    for each in records:
        assert list(each) == EXECVE_COLUMNS, "the columns, in the order of the struct"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", each["time"]) and each["pid"].isdigit()
    return [
        f"{policy.replace('-', '_')} TIME PID {each['comm']} PARENT {each['pcomm']} {each['ret']} {each['filename']}\n"
        for each in records
    ]


def golden(name: str) -> list[str]:
    return (ROOT / "tests/golden/articles" / f"{name}.txt").read_text().splitlines(True)


@pytest.mark.shows("example/trace-execve", "program/c")
def test_execve_has_the_articles_columns_attached_by_section_and_by_name() -> None:
    with examples_runner.running("trace-execve.yaml", links=6) as run:
        with workloads.start("execs", 5, "--failing", 2) as workload:
            workload.go()
            workload.done()
            parent = workload.pid
    assert execve_lines(run, "trace-execve", parent) == golden("trace-execve")
    by_name = [
        line.replace("trace_execve_by_name", "trace_execve")
        for line in execve_lines(run, "trace-execve-by-name", parent)
    ]
    assert by_name == golden("trace-execve")
    for policy in ("trace-execve", "trace-execve-by-name"):
        assert run.counts(policy, "execves")["lost"] == 0


@pytest.mark.shows("program/object")
def test_an_object_runs_from_memory_when_its_file_is_deleted(tmp_path: Path) -> None:
    made = tmp_path / "trace_execve.bpf.o"
    made.write_bytes(
        clang.compile_core(
            source_of("trace-execve.yaml", "trace-execve"), name="x.c", include_dirs=[ROOT / "bpf/include"]
        ).object
    )
    data = made.read_bytes()
    policy = {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": "trace-execve"},
        "spec": {
            "scope": "Cluster",
            "program": {
                "object": {"sha256": hashlib.sha256(data).hexdigest(), "inline": base64.b64encode(data).decode()}
            },
            "outputs": [{"name": "execves", "from": {"map": "execves"}, "events": {}}],
        },
    }
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(policy))
    made.unlink()
    with examples_runner.running(path, links=3) as run, workloads.start("execs", 5, "--failing", 2) as workload:
        workload.go()
        workload.done()
        parent = workload.pid
    assert execve_lines(run, "trace-execve", parent) == golden("trace-execve")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
@pytest.mark.shows("example/tail-calls")
def test_tail_calls_count_by_the_number_of_the_system_call() -> None:
    calls = workloads.binary("calls")
    with examples_runner.running("tail-calls.yaml", links=1) as run:
        # access, pipe, mremap jump to the program that ignores; getppid to none.
        ran = ((222, 23), (223, 19), (224, 31), (225, 37), (226, 29), (21, 997), (22, 13), (25, 499), (110, 97))
        for number, count in ran:
            as_user(calls, number, count)
    rows = {key[1]: value for key, value in run.rows("tail-calls", "calls").items() if key[0] == str(USER)}
    assert rows["creating a timer"] == 23
    assert rows["deleting a timer"] == 29
    assert rows["some other timer operation"] == 19 + 31 + 37
    # setpriv's execve of the workload, with its new uid.
    assert rows["executing a program"] == len(ran)
    # 97 × getppid, and what every run of the workload does besides: the same each time.
    assert rows["another system call"] > 97 and (rows["another system call"] - 97) % len(ran) == 0
