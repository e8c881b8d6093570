"""A kernel that carries no types is helped by a file of them; one of another kernel is refused, whatever its name.

This kernel carries its types. They are hidden in a mount namespace, where the command runs as on one that does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_agent.kernel import btf_kernel

from tests.kernel.test_cli_run import wait_until_attached

pytestmark = pytest.mark.kernel
RELEASE = os.uname().release
#: What CO-RE reads: the parent of the caller. The program tells `argument` from what else this machine does.
CORE = """
#include <probefleet.h>
char LICENSE[] SEC("license") = "GPL";
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, u32); __type(value, u64); }
parents SEC(".maps");
SEC("tracepoint/syscalls/sys_enter_getpriority") int on_call(struct trace_event_raw_sys_enter *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	u32 parent = BPF_CORE_READ(task, real_parent, tgid);
	if (ctx->args[1] == ARGUMENT)
		probefleet_add(&parents, &parent, 1);
	return 0;
}
"""
BCC = """
#include <linux/sched.h>
BPF_HASH(parents, u32, u64);
TRACEPOINT_PROBE(syscalls, sys_enter_getpriority)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	u32 parent = task->real_parent->tgid;
	if (args->who == ARGUMENT)
		parents.increment(parent);
	return 0;
}
"""
TYPED = """
#include <probefleet.h>
char LICENSE[] SEC("license") = "GPL";
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, u32); __type(value, u64); }
parents SEC(".maps");
SEC("tp_btf/sched_process_exec") int on_exec(void *ctx) { u32 key = 0; probefleet_add(&parents, &key, 1); return 0; }
"""
#: Hidden: the folder is there and empty, as on a kernel without CONFIG_DEBUG_INFO_BTF. What runs is named by "$@".
HIDDEN = 'mount -t tmpfs none /sys/kernel/btf && exec "$@"'


@pytest.fixture(scope="module", autouse=True)
def hideable() -> None:
    if not btf_kernel.own():
        pytest.fail("this kernel carries no types: there is nothing to copy and to hide")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of BTF files: a copy of this kernel's."""
    (tmp_path / f"{RELEASE}.btf").write_bytes(btf_kernel.VMLINUX.read_bytes())
    yield tmp_path


def policy(tmp_path: Path, kind: str, source: str) -> tuple[Path, int]:
    """A policy, and the number by which its program knows the workload: this test's alone."""
    argument = os.getpid()
    path = tmp_path / "policy.yaml"
    program = {kind: {"source": source.replace("ARGUMENT", str(argument))}}
    spec: dict[str, Any] = {"scope": "Cluster", "program": program}
    spec["outputs"] = [{"name": "parents", "from": {"map": "parents"}, "topk": {}, "groupBy": ["key"]}]
    path.write_text(
        yaml.safe_dump(
            {"apiVersion": "probefleet.io/v1alpha1", "kind": "ProbePolicy", "metadata": {"name": "b"}, "spec": spec}
        )
    )
    return path, argument


def start(*command: str | Path, btf: Path | None) -> subprocess.Popen[str]:
    """``probefleet`` where the kernel's types are hidden, with a folder of BTF files or without."""
    environment = {**os.environ, "PROBEFLEET_BTF": str(btf)} if btf else dict(os.environ)
    whole = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        HIDDEN,
        "sh",
        sys.executable,
        "-m",
        "probefleet_cli.main",
        *map(str, command),
    ]
    return subprocess.Popen(
        whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, "PYTHONUNBUFFERED": "1"}
    )


def refused(*command: str | Path, btf: Path | None) -> str:
    """What it says with exit status 3: this kernel cannot."""
    with start(*command, btf=btf) as process:
        _, words = process.communicate(timeout=300)
    assert process.returncode == 3, words
    return words


@pytest.mark.parametrize(("kind", "source"), [("c", CORE), ("bcc", BCC)])
def test_programs_read_the_right_fields_by_a_file(kind: str, source: str, folder: Path, tmp_path: Path) -> None:
    path, argument = policy(tmp_path, kind, source)
    with start("run", path, "--output", "json", btf=folder) as process:
        wait_until_attached(process)
        for _ in range(997):
            with contextlib.suppress(OSError):  # there need be no such group: the kernel is asked all the same
                os.getpriority(os.PRIO_PGRP, argument)
        process.terminate()
        out, words = process.communicate(timeout=300)
    report = json.loads(out)
    status = report.get("status", report)
    (output,) = [each for each in status["outputs"] if each["name"] == "parents"]
    assert [(row["key"], row["value"]) for row in output["total"]["rows"]] == [([str(os.getppid())], 997)], words


def test_without_a_file_it_says_what_to_give(tmp_path: Path) -> None:
    path, _ = policy(tmp_path, "c", CORE)
    words = refused("check", path, btf=None)
    assert "no BTF" in words and "PROBEFLEET_BTF" in words


def test_a_folder_without_this_kernels_file_says_which_it_wants(tmp_path: Path) -> None:
    path, _ = policy(tmp_path, "bcc", BCC)
    words = refused("check", path, btf=tmp_path)
    assert f"{RELEASE}.btf" in words


@pytest.mark.parametrize("kind", ["c", "bcc"])
def test_a_file_of_another_kernel_is_refused_whatever_its_name(kind: str, folder: Path, tmp_path: Path) -> None:
    file = folder / f"{RELEASE}.btf"
    # Functions of another kernel: a third of this one's have other names there.
    file.write_bytes(re.sub(rb"\0(\w)(\w*[aeiou]_)", rb"\0x\2", file.read_bytes()))
    path, _ = policy(tmp_path, kind, CORE if kind == "c" else BCC)
    words = refused("check", path, btf=folder)
    assert "is of another kernel, whatever its name says" in words and "functions that the file describes" in words


def test_what_the_kernel_itself_looks_up_needs_its_own_types(folder: Path, tmp_path: Path) -> None:
    path, _ = policy(tmp_path, "c", TYPED)
    words = refused("check", path, btf=folder)
    assert "no tp_btf programs" in words and "CONFIG_DEBUG_INFO_BTF" in words


def test_a_catalog_probe_takes_another_way(folder: Path) -> None:
    with start("check", "execsnoop", btf=folder) as process:
        out, words = process.communicate(timeout=300)
    assert process.returncode == 0, words
    assert "tracepoint" in out and "tp_btf" not in out


def test_the_doctor_says_whose_types_they_are(folder: Path) -> None:
    with start("doctor", btf=folder) as process:
        out, _ = process.communicate(timeout=300)
    assert f"types of {folder / RELEASE}.btf; the kernel carries none" in " ".join(out.split())
