"""The examples that take a probe of the catalog, and the one that shares a map: each run as a user runs it, exact.

Examples of scope Namespace see a namespace's pods; what they count of whom is asked in `test_cgroup_versions.py`, and
end to end in `tests/e2e`. Here their policies run in the scope Cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kernel import examples_runner
from tests.workloads import run as workloads

pytestmark = pytest.mark.timeout(400)


def of_the_whole_machine(file: str, tmp_path: Path) -> Path:
    """An example's policy without its pods."""
    manifest: dict[str, Any] = yaml.safe_load((examples_runner.EXAMPLES / file).read_text())
    manifest["spec"].pop("pods", None)
    manifest["spec"]["scope"] = "Cluster"
    path = tmp_path / file
    path.write_text(yaml.safe_dump(manifest))
    return path


@pytest.mark.shows("example/syscount", "program/catalog")
def test_system_calls_are_counted_and_timed(tmp_path: Path) -> None:
    with workloads.start("calls", "rare", 997) as workload:
        # Of its process alone: others on the machine make these calls, too.
        of_it = ("--pid", str(workload.pid))
        file = of_the_whole_machine("syscount.yaml", tmp_path)
        with examples_runner.running(file, instances=1, arguments=of_it) as run:
            workload.go()
            assert workload.done()["calls"] == 997
    rows = run.rows("syscount", "calls")
    assert rows[("(host)", "sched_get_priority_max")] == 997
    histogram = run.output("syscount", "latency")
    assert histogram["kind"] == "histogram" and histogram["total"]["value"] >= 997


@pytest.mark.shows("example/events")
def test_programs_that_start_are_events(tmp_path: Path) -> None:
    with examples_runner.running(of_the_whole_machine("events.yaml", tmp_path), instances=1) as run:
        with workloads.start("execs", 23) as workload:
            workload.go()
            workload.done()
            mine = f"[{workload.pid}]"
    # Others on the machine start programs, too.
    records = [each for each in run.records("execs", "events") if each["parent"].endswith(mine)]
    assert [each["arguments"] for each in records] == [f"execs exit {number}" for number in range(23)]
    assert run.counts("execs", "events")["lost"] == 0


@pytest.mark.shows("example/slow-connects")
def test_connections_below_a_millisecond_are_left_out(tmp_path: Path) -> None:
    """As it stands it counts slow ones; without its minimum every one."""
    manifest = yaml.safe_load(of_the_whole_machine("slow-connects.yaml", tmp_path).read_text())
    manifest["spec"]["program"]["catalog"]["parameters"] = {"minimum": "0"}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({**manifest, "metadata": {"name": "all-connects"}}))
    files = (tmp_path / "slow-connects.yaml", tmp_path / "all.yaml")
    with workloads.echo_server() as port, examples_runner.running(*files, instances=2) as run:
        workloads.run("connects", 997, port)

    def connects(policy: str) -> int:
        """Of the server's port alone: others on the machine connect, too."""
        return sum(count for key, count in run.rows(policy, "latency").items() if str(port) in key)

    assert connects("all-connects") == 997
    assert connects("slow-connects") < 997


@pytest.mark.shows("example/shared-map")
def test_two_policies_count_in_one_map() -> None:
    with examples_runner.running("shared-map.yaml", links=2) as run:
        with workloads.start("opens", 997, "/proc/version") as workload:
            workload.go()
            workload.done()
            pid = workload.pid
    (mine,) = [count for key, count in run.rows("opens-by-process", "opens").items() if str(pid) in str(key)]
    assert mine == 997
    buckets = {
        (each["from"], each["to"]): each["count"]
        for each in run.output("opens-at-exit", "files-at-exit")["total"]["buckets"]
    }
    assert sum(count for (low, high), count in buckets.items() if low <= 997 <= high) == 1
