"""A pytest plugin: which cells of the table the tests of one run showed, and why not; into one JSON file.

`pytest -p tests.kernel.matrix.plugin --matrix FILE -m shows tests/kernel`. A test is marked with the cells that it
shows; a cell works if all tests that show it passed. A skip's words are the reason why not.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernel.matrix import cells, results

_NEEDS = re.compile(r"this kernel lacks (?P<what>[\w-]+); PROBEFLEET_TEST_FORCE")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, required=True, help="write what was shown here")
    parser.addoption("--matrix-but", type=Path, help="leave out what passed or was skipped in this earlier run")
    parser.addoption(
        "--matrix-third", type=int, help="what shows every third cell, and what another kernel is needed for"
    )


def pytest_configure(config: pytest.Config) -> None:
    earlier = config.getoption("--matrix-but")
    seen = results.read_run(earlier).seen() if earlier else frozenset()
    turn = config.getoption("--matrix-third")
    wanted = frozenset(cells.cells()) if turn is None else cells.third(turn)
    config.pluginmanager.register(Shown(config.getoption("--matrix"), seen, wanted), "matrix")


class Shown:
    """Collects outcomes by test, writes them by cell."""

    def __init__(self, file: Path, seen: frozenset[str], wanted: frozenset[str]) -> None:
        self.file, self.seen, self.wanted = file, seen, wanted
        self.cells_of: dict[str, tuple[str, ...]] = {}
        self.outcomes: dict[str, results.Outcome] = {}

    @pytest.hookimpl(trylast=True)  # what conftest.py marks is marked
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = set(cells.cells())
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            marks = [text for mark in item.iter_markers("shows") for text in mark.args]
            names = tuple(cells.named(text, parameters) for text in marks)
            if unknown := [name for name in names if name not in known]:
                raise pytest.UsageError(f"{item.nodeid} shows {', '.join(unknown)}: no such row of tests/kernel/matrix")
            self.cells_of[item.nodeid] = names
        items[:] = [item for item in items if item.nodeid not in self.seen and self._is_wanted(item)]

    def _is_wanted(self, item: pytest.Item) -> bool:
        """It shows one of the cells, or is run nowhere but in such a machine."""
        return not self.wanted.isdisjoint(self.cells_of[item.nodeid]) or item.get_closest_marker("vm_only") is not None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self._came_to(report, "skipped", _why(report))
        elif report.failed:
            self._came_to(report, "failed", _failure(report))
        elif report.when == "call" and report.nodeid not in self.outcomes:
            self._came_to(report, "passed")

    def _came_to(self, report: pytest.TestReport, state: str, why: str = "") -> None:
        """Written at once: a machine that is stopped has shown what it has shown."""
        self.outcomes[report.nodeid] = results.Outcome(state, why, self.cells_of[report.nodeid])
        self.file.write_text(results.of_this_machine(self.outcomes).to_json())


def _why(report: pytest.TestReport) -> str:
    """A skip's words: `this kernel lacks bpf_loop; …` is "no bpf loop"."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = str(reason).removeprefix("Skipped: ")
    lacks = _NEEDS.search(reason)
    return f"no {lacks['what'].replace('_', ' ')}" if lacks else reason.partition("\n")[0].partition(";")[0]


def _failure(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).partition("\n")[0][:120]
