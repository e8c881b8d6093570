"""Numbers for people."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_core import format as humane

US, MS, S = 1_000, 1_000_000, 1_000_000_000


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0ns"), (1, "1ns"), (950, "950ns"), (999.9, "1µs"), (870 * US, "870µs"), (1_040 * US, "1ms"),
        (1_200 * US, "1.2ms"), (9_960 * US, "10ms"), (14 * MS, "14ms"), (1.2 * S, "1.2s"), (59 * S, "59s"),
        (125 * S, "2m5s"), (3 * 3600 * S, "3h"),
    ],
)  # fmt: skip
def test_durations(nanoseconds: float, text: str) -> None:
    assert humane.duration(nanoseconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"), (9, "9s"), (119, "119s"), (120, "2m"), (125, "2m5s"), (720, "12m"), (3600, "60m"),
        (4 * 3600, "4h"), (5 * 3600 + 600, "5h10m"), (20 * 3600, "20h"), (72 * 3600, "3d"),
    ],
)  # fmt: skip
def test_ages_read_as_kubectl_writes_them(seconds: int, text: str) -> None:
    assert humane.age(seconds * S) == text


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(0, "0/s"), (0.01, "<0.1/s"), (0.4, "0.4/s"), (31, "31/s"), (999.7, "1k/s"), (1200, "1.2k/s"), (2.1e6, "2.1M/s")],
)
def test_rates(per_second: float, text: str) -> None:
    assert humane.rate(per_second) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (512, "512"), (8 << 20, "8Mi"), (1.5 * (1 << 30), "1.5Gi"), (1 << 60, "1024Pi")]
)
def test_sizes(size: float, text: str) -> None:
    assert humane.size(size) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (0.00001, "<0.01%"), (0.0031, "0.31%"), (0.042, "4.2%"), (0.0999, "10%"), (0.61, "61%"), (1, "100%")],
)
def test_percentages(share: float, text: str) -> None:
    assert humane.percent(share) == text


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (870_000, "ns", "870µs"), (14, "ms", "14ms"), (-5, "us", "-5µs"), (8 << 20, "bytes", "8MiB"),
        (-2048, "bytes", "-2KiB"), (8, "sectors", "4KiB"), (1020, "calls", "1,020"), (2.5, "", "2.5"),
        (12345.6, "", "12,346"),
    ],
)  # fmt: skip
def test_quantities_know_their_unit(number: float, unit: str, text: str) -> None:
    assert humane.quantity(number, unit) == text


def test_times_are_rfc_3339() -> None:
    assert humane.timestamp(1_700_000_000 * S) == "2023-11-14T22:13:20Z"
    assert humane.precise_timestamp(1_700_000_000 * S + 1_234_567) == "2023-11-14T22:13:20.001234Z"
    assert humane.precise_timestamp(-1) == "1969-12-31T23:59:59.999999Z"
    assert humane.precise_timestamp(1 << 63).endswith("Z")
    assert humane.precise_timestamp(1 << 70) == f"{1 << 70}ns"


@given(st.floats(0, 1e18))
def test_whatever_the_number_it_is_short(number: float) -> None:
    assert re.fullmatch(r"<?\d{1,4}(\.\d)?[kMGT]?/s", humane.rate(number)) or number >= 9.995e15
    assert len(humane.duration(number)) <= 8
    assert len(humane.size(number)) <= 7
