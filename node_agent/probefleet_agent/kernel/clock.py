"""Kernel time ↔ wall clock. ``decode`` turns bpf_ktime_get_ns() into time of day with it; epochs carry the boot id."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

_TRIES = 5


@functools.cache
def boot_id() -> str:
    """Names this boot: map ids and cgroup ids mean something only within it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@functools.cache
def booted_ns() -> int:
    """When this machine was started, by the wall clock of now."""
    return offset_ns(time.CLOCK_BOOTTIME)


def offset_ns(clock: int = time.CLOCK_MONOTONIC) -> int:
    """Wall clock minus the kernel's clock (bpf_ktime_get_ns() is CLOCK_MONOTONIC, …_boot_ns() CLOCK_BOOTTIME).

    Ask again for every batch: the wall clock is stepped and slewed. Of a few tries the one with the least time in
    between counts; its error is below a microsecond.
    """
    best = min(_sample(clock) for _ in range(_TRIES))
    return best[1]


def _sample(clock: int) -> tuple[int, int]:
    before = time.clock_gettime_ns(clock)
    wall = time.time_ns()
    after = time.clock_gettime_ns(clock)
    return after - before, wall - (before + after) // 2


def wall_ns(ktime_ns: npt.NDArray[np.uint64], offset: int) -> npt.NDArray[np.int64]:
    """Wall clock of kernel times, with an ``offset_ns`` taken near them."""
    return ktime_ns.astype(np.int64) + np.int64(offset)


def since_boot_ns() -> int:
    """How long this machine has been up, asleep or not: what nobody sets, for what lives no longer than a boot."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def ktime_ns() -> int:
    """What bpf_ktime_get_ns() would answer now."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
