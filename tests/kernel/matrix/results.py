"""What one kernel showed: outcomes by test (`Run`, in build/), and their sum by cell (`Result`, in the repository).

A cell is "yes", "no: why", "in part: why", "fails: why" or "not tried". Pure but for `uname`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tests.kernel.matrix import cells

FOLDER = Path(__file__).with_name("results")
NOT_TRIED = "not tried"
_PACKAGED = re.compile(r"Debian \S+ \([-0-9]+\)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one test: passed, skipped or failed, and why; `cells` are what it shows."""

    state: str
    why: str = ""
    cells: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """One column of the table."""

    release: str  #: as `uname -r` says it
    version: str  #: the distribution's, where it has one
    machine: str
    emulated: bool
    tried_on: str  #: a date
    tests: Mapping[str, int]  #: how many passed, skipped, failed
    cells: Mapping[str, str]

    @property
    def series(self) -> str:
        """The column's name: 6.1."""
        return series(self.release)

    def to_json(self) -> str:
        """For the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Run:
    """All tests of one kernel, of one run or of its parts."""

    release: str
    version: str
    machine: str
    emulated: bool
    tried_on: str
    outcomes: Mapping[str, Outcome]

    def to_json(self) -> str:
        """For the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def seen(self) -> frozenset[str]:
        """The tests that need not run again."""
        return frozenset(test for test, outcome in self.outcomes.items() if outcome.state != "failed")

    def with_tests_of(self, other: Run) -> Run:
        """With tests that asked the same kernel's types elsewhere."""
        return replace(self, outcomes={**self.outcomes, **other.outcomes})

    def after(self, earlier: Run) -> Run:
        """With what an earlier part showed on the same kernel."""
        if (earlier.release, earlier.version) != (self.release, self.version):
            return self
        return replace(self, outcomes={**earlier.outcomes, **self.outcomes})

    def result(self) -> Result:
        """The column of the table."""
        states = [outcome.state for outcome in self.outcomes.values()]
        return Result(
            self.release,
            self.version,
            self.machine,
            self.emulated,
            self.tried_on,
            tests={state: states.count(state) for state in ("passed", "skipped", "failed")},
            cells=by_cell(self.outcomes.values()),
        )


def series(release: str) -> str:
    """Of a kernel's name: 6.1."""
    return ".".join(release.split(".")[:2])


def of_this_machine(outcomes: Mapping[str, Outcome]) -> Run:
    """What these tests came to on the kernel that runs."""
    name, guest = os.uname(), "VM" in os.environ
    # What a builder writes behind the number of his own kernel says nothing to others.
    release = name.release if guest else name.release.partition("-")[0]
    version = _PACKAGED.search(name.version)
    today = datetime.now(UTC).date().isoformat()
    return Run(release, version[0] if version else "", name.machine, guest, today, outcomes)


def by_cell(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Every cell there is, with what the tests that show it came to."""
    shown: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for name in outcome.cells:
            shown.setdefault(name, []).append(outcome)
    return {cell: _sum(shown.get(cell, [])) for cell in cells.cells()}


def _sum(outcomes: Sequence[Outcome]) -> str:
    why = {state: [each.why for each in outcomes if each.state == state] for state in ("passed", "skipped", "failed")}
    if why["failed"]:
        return f"fails: {why['failed'][0]}"
    reasons = ", ".join(dict.fromkeys(why["skipped"]))
    if why["passed"]:
        return f"in part: {reasons}" if reasons else "yes"
    return f"no: {reasons}" if reasons else NOT_TRIED


def read_run(file: Path) -> Run:
    """A file that `Run.to_json` made."""
    read = json.loads(file.read_text())
    outcomes = {test: Outcome(**outcome) for test, outcome in read.pop("outcomes").items()}
    return Run(**read, outcomes=outcomes)


def read(file: Path) -> Result:
    """A file that `to_json` made."""
    return Result(**json.loads(file.read_text()))


def committed() -> list[Result]:
    """Every kernel's, oldest kernel first."""
    found = [read(file) for file in FOLDER.glob("*.json")]
    return sorted(found, key=lambda each: [int(number) for number in each.series.split(".")])


def lost(before: Result, now: Result, wanted: Collection[str]) -> list[str]:
    """What worked on this series of kernels and does not now, in words; of the cells that were wanted of it."""
    return [
        f"{cell}: worked on {before.release}, now {now.cells[cell]}"
        for cell, word in before.cells.items()
        if word == "yes" and cell in wanted and now.cells.get(cell, "yes") != "yes"
    ]
