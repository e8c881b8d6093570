"""Durations, CPU and memory as Kubernetes writes them, parsed strictly: text in, integers with a unit out. Pure.

Strictly, because a budget that is read wrong is a budget that does not hold: ``10`` is no duration, ``8mb`` no memory,
and nothing is rounded silently. Each function raises ``ValueError`` with the reason; patterns are those of the CRDs.
"""

from __future__ import annotations

import re
from decimal import Decimal

NS_PER_UNIT = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60 * 1_000_000_000,
    "h": 3600 * 1_000_000_000,
}
BYTES_PER_UNIT = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
DURATION = r"([0-9]{1,9}(ns|us|µs|ms|s|m|h)){1,4}"
#: What a policy's own durations look like: nothing below a millisecond is meant there.
LONG_DURATION = r"([0-9]{1,6}(ms|s|m|h)){1,4}"
CPU = r"[0-9]{1,6}m?|[0-9]{1,3}\.[0-9]{1,3}"
MEMORY = r"[0-9]{1,12}(k|M|G|Ki|Mi|Gi)?"


def duration_ns(text: str) -> int:
    """``1ms``, ``10s``, ``1h30m`` → nanoseconds."""
    if not re.fullmatch(DURATION, text):
        raise ValueError("a duration is a whole number and a unit (ns, us, ms, s, m, h), such as 500us or 1h30m")
    parts = re.findall(r"([0-9]+)(ns|us|µs|ms|s|m|h)", text)
    return sum(int(number) * NS_PER_UNIT[unit] for number, unit in parts)


def cpu_millicores(text: str) -> int:
    """``10m``, ``1``, ``0.5`` → thousandths of a CPU."""
    if not re.fullmatch(CPU, text):
        raise ValueError("a CPU quantity is written as 10m, 0.5 or 2")
    return int(text[:-1]) if text.endswith("m") else int(Decimal(text) * 1000)


def memory_bytes(text: str) -> int:
    """``8Mi``, ``500k``, ``65536`` → bytes."""
    found = re.fullmatch(r"([0-9]{1,12})(k|M|G|Ki|Mi|Gi)?", text)
    if not found:
        raise ValueError("a memory quantity is written as 64Ki, 8Mi or 1Gi")
    return int(found[1]) * BYTES_PER_UNIT[found[2] or ""]


def show_bytes(count: int) -> str:
    """A size for people: ``1.5 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
