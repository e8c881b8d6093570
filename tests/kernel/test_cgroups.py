"""The id that programs see is the inode of the cgroup's folder, wherever cgroup2 is mounted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from probefleet_agent.errors import UnsupportedFeature
from probefleet_agent.kernel import cgroups, clock, links

from tests.kernel.support import Loaded, attachment

SOURCE = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1024); __type(key, u64); __type(value, u64); }
calls SEC(".maps");
SEC("tracepoint/syscalls/sys_enter_getppid")
int on_it(void *ctx)
{
	u64 id = bpf_get_current_cgroup_id(), now = bpf_ktime_get_ns(), *count;
	if (bpf_get_current_pid_tgid() >> 32 != target_pid)
		return 0;
	bpf_map_update_elem(&calls, &id, &now, BPF_ANY);
	return 0;
}
"""
GETPPID = attachment("on_it", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
CHILD = "import os, sys; sys.stdin.readline(); os.getppid()"


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup of this test's own, with one below it."""
    path = cgroups.mount_point() / f"probefleet-test-{os.getpid()}"
    inner = path / "pod" / "container"
    inner.mkdir(parents=True)
    yield inner
    for folder in (inner, inner.parent, path):
        folder.rmdir()


def test_a_program_sees_the_id_that_the_scan_finds(group: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, text=True)
    (group / "cgroup.procs").write_text(str(child.pid))
    before = time.time_ns()
    with Loaded(SOURCE, pid=child.pid) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
        child.communicate("go\n")
        keys, values = loaded.rows("calls")
    ids = np.ascontiguousarray(keys).view("<u8").ravel().tolist()
    found = cgroups.scan()
    name = f"/probefleet-test-{os.getpid()}/pod/container"
    assert ids == [cgroups.id_of(name)]
    assert found[ids[0]] == name
    assert next(iter(found)) == cgroups.id_of("/"), "parents first"
    # The same record shows that kernel time becomes wall clock.
    wall = clock.wall_ns(np.ascontiguousarray(values).view("<u8").ravel(), clock.offset_ns())
    assert before <= int(wall[0]) <= time.time_ns()


def test_a_scan_below_a_folder_stays_below_it(group: Path) -> None:
    name = f"/probefleet-test-{os.getpid()}"
    found = cgroups.scan(name)
    assert sorted(found.values()) == [name, f"{name}/pod", f"{name}/pod/container"]
    assert cgroups.scan("/no-such-group") == {}
    with pytest.raises(FileNotFoundError):
        cgroups.id_of("/no-such-group")


def test_a_process_knows_its_own() -> None:
    assert cgroups.of_process().startswith("/")
    assert cgroups.of_process() == cgroups.of_process(os.getpid())


HYBRID = (
    "24 1 0:5 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "25 24 0:6 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "26 24 0:7 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
)
PURE = "24 1 0:5 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
INSIDE = (
    "24 1 0:5 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
    "30 1 0:5 / /host/cg\\040roup rw - cgroup2 cgroup rw\n"
)


@pytest.mark.parametrize(
    ("text", "path"), [(HYBRID, "/sys/fs/cgroup/unified"), (PURE, "/sys/fs/cgroup"), (INSIDE, "/host/cg roup")]
)
def test_the_mount_that_shows_most_is_taken(text: str, path: str) -> None:
    assert cgroups.mount_point(text) == Path(path)


def test_without_cgroup2_it_says_how_to_mount_it() -> None:
    with pytest.raises(UnsupportedFeature, match="mount -t cgroup2"):
        cgroups.mount_point("24 1 0:5 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n")


def test_a_boot_has_a_name() -> None:
    assert clock.boot_id() == clock.boot_id() and len(clock.boot_id()) == 36
