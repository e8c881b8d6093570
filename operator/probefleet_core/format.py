"""Numbers for people: short, with a unit, never more exact than they are. Pure.

Whatever is shown by kubectl or on a terminal comes through here; machines read the numbers beside it.
"""

from __future__ import annotations

import datetime
import math
from typing import Final

_DURATIONS: Final = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
_THOUSANDS: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_BINARY: Final = ((1 << 50, "Pi"), (1 << 40, "Ti"), (1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki"), (1, ""))
#: What a field may call a unit, in nanoseconds.
_TIME_UNITS: Final = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_BYTE_UNITS: Final = {"bytes": 1, "byte": 1, "KiB": 1 << 10, "MiB": 1 << 20, "sectors": 512}
#: Prefixes are ours, so "2.1M" is millions, and bytes have their own with an i.
MINUTE_NS: Final = 60 * 10**9
HOUR_NS: Final = 60 * MINUTE_NS
DAY_NS: Final = 24 * HOUR_NS


def duration(nanoseconds: float) -> str:
    """``870µs``, ``14ms``, ``1.2s``, ``2m5s``, ``3h10m``."""
    if nanoseconds >= MINUTE_NS:
        return age(nanoseconds)
    return _scaled(nanoseconds, _DURATIONS, zero="0ns")


def age(nanoseconds: float) -> str:
    """As kubectl writes ages: ``9s``, ``2m5s``, ``12m``, ``4h``, ``3d``."""
    seconds = max(int(nanoseconds / 1e9), 0)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    return f"{hours}h" if hours < 48 else f"{days}d"


def rate(per_second: float) -> str:
    """``0/s``, ``0.4/s``, ``31/s``, ``1.2k/s``, ``2.1M/s``."""
    if 0 < per_second < 0.05:
        return "<0.1/s"
    return short(per_second) + "/s"


def short(number: float) -> str:
    """``0.4``, ``31``, ``1.2k``, ``2.1M``."""
    return _scaled(number, _THOUSANDS, zero="0")


def count(number: int) -> str:
    """With thousands separators: ``1,020``."""
    return f"{number:,}"


def size(number_of_bytes: float) -> str:
    """``512``, ``8Mi``, ``1.5Gi``: as quantities of Kubernetes read."""
    return _scaled(number_of_bytes, _BINARY, zero="0")


def percent(share: float) -> str:
    """Of 1.0: ``0%``, ``<0.01%``, ``0.31%``, ``4.2%``, ``61%``."""
    value = share * 100
    if value <= 0:
        return "0%"
    if value < 0.01:
        return "<0.01%"
    if value < 1:
        return f"{value:.2f}%"
    return f"{value:.1f}%" if value < 9.95 else f"{value:.0f}%"


def quantity(number: float, unit: str) -> str:
    """A number with its unit: times and bytes are scaled, all others get thousands separators."""
    if unit in _TIME_UNITS:
        sign = "-" if number < 0 else ""
        return sign + duration(abs(number) * _TIME_UNITS[unit])
    if unit in _BYTE_UNITS:
        sign = "-" if number < 0 else ""
        return sign + size(abs(number) * _BYTE_UNITS[unit]) + "B"
    if float(number).is_integer():
        return count(int(number))
    return f"{number:.1f}" if abs(number) < 10 else count(round(number))


def weight(number: int, unit: str) -> str:
    """What a stack weighs: samples, unless its output has another unit."""
    if unit in ("", "samples"):
        return f"{number:,} sample{'' if number == 1 else 's'}"
    return quantity(number, unit) if unit in _TIME_UNITS or unit in _BYTE_UNITS else f"{number:,} {unit}"


def timestamp(time_ns: int) -> str:
    """RFC 3339, to the second, as Kubernetes writes times."""
    return datetime.datetime.fromtimestamp(time_ns // 10**9, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def precise_timestamp(time_ns: int) -> str:
    """RFC 3339, to the microsecond: records of one second have an order."""
    whole, part = divmod(time_ns, 10**9)
    try:
        moment = datetime.datetime.fromtimestamp(whole, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        # A node may send any number.
        return f"{time_ns}ns"
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{part // 1000:06d}Z"


def _scaled(number: float, steps: tuple[tuple[float, str], ...], *, zero: str) -> str:
    if not number:
        return zero
    for index, (step, suffix) in enumerate(steps):
        # What rounds up to the next unit belongs there: 999.9µs is 1ms.
        if number >= step * 0.9995 or index == len(steps) - 1:
            value = number / step
            if value < 9.95 and not math.isclose(value, round(value), abs_tol=0.049):
                return f"{value:.1f}{suffix}"
            return f"{value:.0f}{suffix}"
    raise AssertionError("the last step takes everything")
