"""Helpers of the kernel tests: objects compiled on the spot, counters read exactly, workloads of a known size."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from probefleet_agent.kernel import cgroups, libbpf, links, maps
from probefleet_wire.v1 import plan_pb2

REPOSITORY = Path(__file__).parents[2]
INCLUDE = REPOSITORY / "bpf" / "include"
PRELUDE = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
char LICENSE[] SEC("license") = "GPL";
const volatile u32 target_pid = 0;
static __always_inline bool ours(void) { return bpf_get_current_pid_tgid() >> 32 == target_pid; }
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
hits SEC(".maps");
static __always_inline int hit(void)
{
	u32 zero = 0;
	u64 *count = bpf_map_lookup_elem(&hits, &zero);
	if (count)
		*count += 1;
	return 0;
}
"""


def needs(feature: Callable[[], bool]) -> None:
    """Skip, naming the capability, unless the kernel has it or it is forced."""
    name = feature.__name__
    if not feature() and name not in os.environ.get("PROBEFLEET_TEST_FORCE", "").split(","):
        pytest.skip(f"this kernel lacks {name}; PROBEFLEET_TEST_FORCE={name} runs it all the same")


@functools.cache
def _include() -> tuple[Path, ...]:
    """bpf/include, and a vmlinux.h of the running kernel where the repository has none."""
    if (INCLUDE / "vmlinux.h").exists():
        return (INCLUDE,)
    folder = Path(tempfile.mkdtemp(prefix="probefleet-include-"))
    bpftool = shutil.which("bpftool") or "/usr/sbin/bpftool"
    dump = subprocess.run(
        [bpftool, "btf", "dump", "file", "/sys/kernel/btf/vmlinux", "format", "c"], check=True, capture_output=True
    )
    (folder / "vmlinux.h").write_bytes(dump.stdout)
    return (folder, INCLUDE)


@functools.cache
def compile_object(source: str, prelude: bool = True) -> bytes:
    """C in, the bytes of a BPF object out."""
    return clang_object((PRELUDE if prelude else "") + source)


def clang_object(text: str) -> bytes:
    """What clang makes of this text."""
    machine = {"x86_64": "x86", "aarch64": "arm64"}[os.uname().machine]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"test_{hashlib.sha256(text.encode()).hexdigest()[:8]}.bpf.c"
        path.write_text(text)
        includes = [f"-I{each}" for each in _include()]
        command = ["clang", "-g", "-O2", "-Wall", "-target", "bpf", f"-D__TARGET_ARCH_{machine}", *includes]
        done = subprocess.run([*command, "-c", str(path), "-o", f"{path}.o"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Path(f"{path}.o").read_bytes()


class Loaded:
    """One loaded object with all of its descriptors."""

    def __init__(
        self,
        source: str,
        *,
        pid: int | None = None,
        target: plan_pb2.Attachment | None = None,
        **types: tuple[int, int],
    ) -> None:
        """``target``: load the program for it, as ``execute`` does."""
        with libbpf.open_object(compile_object(source), "test") as opened:
            opened.set_rodata("target_pid", (os.getpid() if pid is None else pid).to_bytes(4, "little"))
            for program, (prog_type, attach_type) in types.items():
                opened.set_type(program, prog_type, attach_type)
            if target is not None:
                opened.set_type(target.program, *links.program_type(target, opened.section(target.program)))
                if name := links.bound_to(target):
                    opened.set_attach_target(target.program, name)
            opened.load()
            self.maps = {name: opened.map_fd(name) for name in opened.map_names}
            self.programs = {name: opened.program_fd(name) for name in opened.program_names}
            self.sections = {name: opened.section(name) for name in opened.program_names}

    def hits(self) -> int:
        """How often hit() ran, on all CPUs."""
        return int(maps.sum_lost(self.maps["hits"])[0])

    def hits_of(self, cpu: int) -> int:
        """How often hit() ran on one CPU."""
        _, values = maps.read(self.maps["hits"], maps.info(self.maps["hits"]))
        return int(values.reshape(-1, 8).view(np.uint64)[cpu, 0])

    def rows(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return maps.read(self.maps[name], maps.info(self.maps[name]))

    def close(self) -> None:
        for fd in (*self.maps.values(), *self.programs.values()):
            fd.close()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attachment(program: str, **target: object) -> plan_pb2.Attachment:
    """``attachment("on_it", tracepoint=dict(category=…, name=…))``"""
    return plan_pb2.Attachment(program=program, **target)  # type: ignore[arg-type]


def call_getppid(times: int) -> None:
    """A system call that nothing else makes in this process. Python caches no answer."""
    for _ in range(times):
        os.getppid()


@contextlib.contextmanager
def nobody_else_calls(syscall: str) -> Iterator[None]:
    """Other workers' tests of this call wait: the examples that count it count the whole machine's."""
    with Path(tempfile.gettempdir(), f"probefleet-test-{syscall}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wait_until(true: Callable[[], bool], *, spins: int = 2_000) -> None:
    """Keep a CPU busy until it is true: what the tests wait for comes from CPU time."""
    for _ in range(spins):
        if true():
            return
        sum(range(200_000))
    raise AssertionError("it did not come true")


@contextlib.contextmanager
def in_cgroup(name: str) -> Iterator[str]:
    """This thread's process in a cgroup of its own."""
    mount = cgroups.mount_point()
    before = cgroups.of_process()
    folder = mount / name
    folder.mkdir(exist_ok=True)
    try:
        (folder / "cgroup.procs").write_text(str(os.getpid()))
        yield f"/{name}"
    finally:
        (mount / before.strip("/") / "cgroup.procs").write_text(str(os.getpid()))
        folder.rmdir()


def until_nothing_was_hidden(attempt: Callable[[], tuple[int, int]]) -> None:
    """Counted must equal made; never exceed it, and be less only while a task runs that the kernel hides from BPF.

    Kernels of some sandboxes deliver no event whose current task is the sandbox's own supervisor: what it wakes, and
    whom it makes way for, no program sees. It seldom runs, so one of a few attempts is undisturbed.
    """
    seen = []
    for _ in range(20):
        counted, made = attempt()
        assert counted <= made
        assert counted > 0.9 * made
        if counted == made:
            return
        seen.append((counted, made))
    raise AssertionError(f"never exact: {seen}")
