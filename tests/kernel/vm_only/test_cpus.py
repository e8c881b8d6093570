"""A CPU goes offline and comes back: its perf event with it. Runs in a VM (`make test-vm`), whose CPUs are ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from probefleet_agent.kernel import links, links_network

from tests.kernel.support import Loaded, attachment, wait_until
from tests.kernel.test_links import PERF

ONLINE = Path("/sys/devices/system/cpu/cpu1/online")


@pytest.mark.skipif("VM" not in os.environ, reason="not this machine's to switch off")
@pytest.mark.shows("attach/a CPU that comes online")
def test_a_cpu_that_was_offline_is_sampled_again() -> None:
    target = attachment("on_it", perf_event={"event": "cpu-clock", "period": 1_000_000})
    with Loaded(PERF) as loaded:
        spread = links.spread(loaded.programs["on_it"], target, links_network.Surroundings())
        assert spread is not None
        try:
            assert spread.follow({}, 1).came == ("CPU 0", "CPU 1")
            ONLINE.write_text("0")
            assert spread.follow({}, 2).gone == (1,)
            ONLINE.write_text("1")
            assert spread.follow({}, 3).came == ("CPU 1",)
            os.sched_setaffinity(0, {1})
            before = loaded.hits_of(1)
            wait_until(lambda: loaded.hits_of(1) > before + 23)
        finally:
            ONLINE.write_text("1")
            os.sched_setaffinity(0, {0, 1})
            spread.close()
