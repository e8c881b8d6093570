"""What the kernel can do is found out by trying, and only conclusive answers are kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import features, mounts


def test_a_conclusive_answer_is_kept_and_a_doubtful_one_asked_again() -> None:
    answers: list[object] = [KernelError(errno.EPERM, "try"), features._Unsure(), True, False]

    @features._probe
    def something() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    assert [something() for _ in range(4)] == [False, False, True, True]
    assert answers == [False]


def test_an_error_that_means_no_is_kept() -> None:
    asked = []

    @features._probe
    def something() -> bool:
        asked.append(1)
        raise KernelError(errno.EINVAL, "try")

    assert not something() and not something()
    assert len(asked) == 1


def test_this_kernel_has_what_it_takes() -> None:
    """Linux 6.1 and later have all of these; kprobes depend on how it was built."""
    answers = features.all_features()
    for name in ("btf", "tp_btf", "raw_tracepoints", "uprobes", "ring_buffer", "batch", "bpf_stats"):
        assert answers[name], name
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    for name, since in (("perf_link", (5, 15)), ("cookies", (5, 15)), ("percpu_batch", (5, 13))):
        assert answers[name] == (release >= since), name
    assert answers["kprobes"] == os.path.exists("/sys/bus/event_source/devices/kprobe")


def test_mounts_are_told_by_what_they_are() -> None:
    assert mounts.is_bpffs(mounts.BPFFS) and not mounts.is_bpffs(Path("/proc"))
    assert mounts.mount_bpffs() == mounts.BPFFS
    assert not mounts.is_tracefs(Path("/nowhere"))
