"""Runs a file of ``examples/`` as a user does, `probefleet run FILE`, while a workload of a known size goes by.

The tests of the examples use it: what needs tracepoints on this kernel (`tests/kernel/test_examples*.py`), what needs
kprobes in a VM (`tests/kernel/vm_only/test_examples*.py`).
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probefleet_agent.kernel import features

from tests.kernel import command_line

BPFFS = Path("/sys/fs/bpf")
EXAMPLES = Path(__file__).parents[2] / "examples"
# In an emulated machine Python alone takes seconds to start.
SECONDS = 150


class Run:
    """One `probefleet run`; its reports by the policy's name, once it has ended."""

    def __init__(self, process: command_line.Process) -> None:
        self.process = process
        self.reports: dict[str, dict[str, Any]] = {}

    @property
    def pins(self) -> Path:
        """Its own folder in bpffs."""
        return BPFFS / f"probefleet-run-{self.process.pid}" / "probefleet"

    def attached(self) -> int:
        """How many links it has; a name without digits in front is still being built."""
        return len(list((self.pins / "instances").glob("[0-9a-f]*/link_*")))

    def loaded(self) -> int:
        """How many instances run: of bpftrace's there are no links to count."""
        return len(list((self.pins / "instances").glob("[0-9a-f]*/manifest")))

    def end(self) -> None:
        """Press Ctrl-C and take the reports."""
        self.process.send_signal(signal.SIGINT)
        said, errors = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, errors
        found = json.loads(said)
        self.reports = {each["metadata"]["name"]: each["status"] for each in found.get("items", [found])}

    def output(self, policy: str, output: str) -> dict[str, Any]:
        """One output of one report."""
        found: dict[str, Any] = next(each for each in self.reports[policy]["outputs"] if each["name"] == output)
        return found

    def rows(self, policy: str, output: str) -> dict[tuple[str, ...], int]:
        """The total's rows."""
        return {tuple(row["key"]): row["value"] for row in self.output(policy, output)["total"]["rows"]}

    def records(self, policy: str, output: str) -> list[dict[str, str]]:
        """The records that the report keeps, oldest first."""
        return list(self.output(policy, output)["events"]["records"])

    def counts(self, policy: str, output: str) -> dict[str, int]:
        """Of an events output: received, submitted, lost, dropped."""
        events = self.output(policy, output)["events"]
        return {name: events[name] for name in ("received", "submitted", "lost", "dropped")}


@contextmanager
def running(*files: Path | str, links: int = 0, instances: int = 0, arguments: Sequence[str] = ()) -> Iterator[Run]:
    """Start it and wait until so many programs are attached; leaving ends it and reads the reports."""
    paths = [str(EXAMPLES / file) if isinstance(file, str) else str(file) for file in files]
    if links and not (features.perf_link() and features.tcx()):
        # Before Linux 5.15 most links cannot be pinned, before 6.6 none of TC; an instance has its name once all of its
        # are made.
        links, instances = 0, sum(Path(path).read_text().count("\nkind: ProbePolicy") for path in paths) or 1
    process = command_line.start("run", *paths, "--output", "json", *arguments)
    run = Run(process)
    try:
        deadline = time.monotonic() + SECONDS
        # bpffs tells nobody of new names.
        while run.attached() < links or run.loaded() < instances:
            assert process.poll() is None, process.communicate()
            if time.monotonic() > deadline:
                have = f"{run.attached()} of {links} programs attached, {run.loaded()} of {instances} instances"
                process.send_signal(signal.SIGINT)
                raise AssertionError(f"{have}: {process.communicate(timeout=SECONDS)}")
            time.sleep(0.02)
        yield run
        if not run.reports:
            run.end()
        assert not run.pins.exists(), "nothing is left"
    finally:
        process.close()
