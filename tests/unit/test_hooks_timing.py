"""What a hook takes is told where it stands out from the machine's noise, and not told where it does not."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable

import pytest
from probefleet_agent.kernel import hooks, hooks_timing

Difference = Callable[[Iterable[float]], float]


@pytest.fixture
def difference(monkeypatch: pytest.MonkeyPatch) -> Difference:
    """What is told where a call is measured so: without; with, with, without; with, with, without; …"""

    def found(measured: Iterable[float]) -> float:
        takes = iter(measured)
        monkeypatch.setattr(hooks_timing, "_quickest_ns", lambda _: next(takes))
        return hooks_timing.difference_ns(lambda: None, contextlib.nullcontext)

    return found


def test_a_quiet_machine_tells_the_first_time(difference: Difference) -> None:
    assert difference([150, 450, 455, 160]) == 300


@pytest.mark.parametrize(
    "uneven",
    [
        pytest.param([600, 450, 450, 150], id="slow before"),
        pytest.param([150, 450, 450, 600], id="slow after"),
        pytest.param([600, 560, 460, 300], id="faster and faster"),
        pytest.param([150, 900, 450, 150], id="a neighbour meanwhile"),
    ],
)
def test_what_does_not_stand_out_is_measured_again(difference: Difference, uneven: list[float]) -> None:
    with pytest.raises(StopIteration):
        difference(uneven)
    assert difference([*uneven, *[450, 450, 150] * 3]) == pytest.approx(300, abs=1)


def test_a_machine_that_is_never_quiet_tells_nothing(difference: Difference) -> None:
    with pytest.raises(hooks_timing.TooUneven, match="did not stand out"):
        difference(600 / 2**turn for turn in range(99))


def test_less_than_the_clock_can_tell_is_nothing(difference: Difference) -> None:
    with pytest.raises(hooks_timing.TooUneven):
        difference(itertools.cycle([150, 150.5, 150.5, 150]))


def test_what_did_not_stand_out_is_left_alone_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement fires the hook: a policy that is there counts it."""
    now, asked = 1000.0, 0

    def measure(_: hooks.HookKind) -> float:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise hooks_timing.TooUneven("just now")
        return 60.0

    monkeypatch.setattr(hooks, "_measure", measure)
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now)
    measured, kind = hooks.Hooks(), hooks.HookKind("tp_btf")
    assert [measured.measure(kind), measured.measure(kind)] == [None, None] and asked == 1
    now += 61
    assert measured.measure(kind) is None and asked == 2
    now += 61
    assert [measured.measure(kind), measured.measure(kind)] == [60.0, 60.0] and asked == 3


def test_of_many_calls_the_quick_ones_count_but_for_the_very_quickest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in ten finds the CPU free, and three of all are quicker than that by chance; only calls move this clock."""
    now, calls = 0, 0

    def work() -> None:
        nonlocal now, calls
        calls += 1
        now += 120 if calls in (7, 77, 277) else 200 if calls % 10 == 0 else 1200

    monkeypatch.setattr(hooks_timing.time, "perf_counter_ns", lambda: now)
    assert hooks_timing._quickest_ns(work) == 200
