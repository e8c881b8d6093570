"""The example that looks into a program of user space: uprobes by offset and by symbol, static probes with one and two
arguments, every call counted and every argument read.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel import examples_runner
from tests.workloads import run as workloads

# An emulated machine takes minutes for what starts a command.
pytestmark = pytest.mark.timeout(2 * examples_runner.SECONDS)
INSTALLED = "/usr/local/bin/sums"
COUNT, SUMS = 997, 23


def here(folder: Path, *, next_at: int) -> Path:
    """The example for the program that was built here: where it is, and where its first function lies in it."""
    text = (examples_runner.EXAMPLES / "user-functions.yaml").read_text()
    assert "offset: 5776}" in text
    path = folder / "user-functions.yaml"
    path.write_text(
        text.replace(INSTALLED, str(workloads.binary("sums"))).replace("offset: 5776}", f"offset: {next_at}}}")
    )
    return path


@pytest.mark.shows("example/user-functions")
def test_uprobes_and_static_probes_see_every_call_and_its_arguments(tmp_path: Path) -> None:
    with workloads.start("sums", COUNT, SUMS) as workload:
        policies = here(tmp_path, next_at=workload.ready["next_at"])
        with examples_runner.running(policies, links=4) as run:
            workload.go()
            done = workload.done()
    first, second = range(1, COUNT + 1), [(i + 3, i + 8) for i in range(1, SUMS + 1)]
    assert done == {"next": sum(x + 1 for x in first), "sums": sum(x + y for x, y in second)}

    assert run.rows("functions-by-uprobe", "totals") == {("next_number",): COUNT, ("sum_of",): SUMS}
    assert run.rows("functions-by-uprobe", "results") == {("next_number",): done["next"], ("sum_of",): done["sums"]}
    assert run.rows("functions-by-usdt", "totals") == {("next",): COUNT, ("sum",): SUMS}
    assert run.rows("functions-by-usdt", "x") == {("next",): sum(first), ("sum",): sum(x for x, _ in second)}
    assert run.rows("functions-by-usdt", "y") == {("sum",): sum(y for _, y in second)}

    last_fields = (("functions-by-uprobe", "sum_of", "result"), ("functions-by-usdt", "sum", "arguments"))
    for policy, function, last in last_fields:
        counts = run.counts(policy, "calls")
        assert counts == {"received": COUNT + SUMS, "submitted": COUNT + SUMS, "lost": 0, "dropped": 0}
        calls = run.records(policy, "calls")[-SUMS:]
        assert [(each["function"], each["pid"], each["comm"]) for each in calls] == [
            (function, str(workload.pid), "sums")
        ] * SUMS
        expected = [(x, y, x + y if last == "result" else 2) for x, y in second]
        assert [tuple(int(each[field]) for field in ("x", "y", last)) for each in calls] == expected
