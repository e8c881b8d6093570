"""What the agent says of an instance's cost, and of the runs that the kernel skipped."""

from __future__ import annotations

from typing import cast

from probefleet_agent import costs
from probefleet_agent.kernel import clock
from probefleet_agent.loaded import Loaded, Runs


class Skipping:
    """An instance whose programs the kernel skipped 23 times."""

    digest, map_bytes, unmeasured, running, joined = "d", 0, frozenset[str](), None, dict[str, object]()

    def runs(self) -> Runs:
        return Runs(first_program=7, count=0, time_ns=0, hook_time_ns=0, recursion_misses=23)


def test_skipped_runs_are_told_where_the_kernel_gives_no_statistics() -> None:
    stat = costs.Costs(enabled=False).stat(cast("Loaded", Skipping()), ["p"])
    assert (stat.recursion_misses, stat.cost_known) == (23, False)
    assert stat.epoch == f"{clock.boot_id()}:7"
