"""What a person sees while something is measured: a live view on a terminal, nothing in a pipe; the results at the end.

``run`` here and in a cluster hand it lists of ``Shown``, each a ProbeReport's status with its name. Progress goes to
stderr, results to stdout, so that ``> file`` holds results only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TextIO

import click
import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from probefleet_cli import render, render_svg
from probefleet_cli.failures import BadInput

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """One policy's report. ``stacks`` are all folded stacks, where the source has more than the report's rows.

    ``whole``: what is printed at the end is of the whole run, and not of its last interval.
    """

    name: str
    status: Json
    namespace: str = ""
    stacks: dict[str, int] = field(default_factory=dict)
    whole: bool = False


class Screen:
    """The live view; entered for as long as there is something to watch."""

    def __init__(self, *, output: str, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live: Live | None = None
        if output == "table" and self._stream.isatty():
            console = Console(file=self._stream, highlight=False)
            waiting = Text("waiting for the first sample …")
            self._live = Live(waiting, console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def live(self) -> bool:
        """Whether anyone looks."""
        return self._live is not None

    def show(self, reports: Sequence[Shown]) -> None:
        """Draw the newest reports."""
        if self._live is not None:
            console = self._live.console
            # All reports are to be seen at once; the end shows every row.
            rows = max(3, min(20, console.height // max(1, 2 * len(reports))))
            shown = [render.text(each.status, name=each.name, rows=rows, width=console.width) for each in reports]
            self._live.update(Group(*shown), refresh=True)


def progress(text: str) -> None:
    """A line about what is being done, for a person who waits."""
    if sys.stderr.isatty():
        click.secho(text, err=True, dim=True)


def print_reports(reports: Sequence[Shown], *, output: str, stream: TextIO | None = None, wide: bool = False) -> None:
    """The end: every report, in the form that was asked for."""
    stream = stream or sys.stdout
    if output in ("folded", "svg"):
        stream.write(_stacks(reports, output))
    elif len(reports) == 1 or output == "table":
        for index, each in enumerate(reports):
            stream.write("\n" if index else "")
            render.write(
                each.status,
                name=each.name,
                namespace=each.namespace,
                stream=stream,
                output=output,
                wide=wide,
                whole=each.whole,
            )
    else:
        documents = [render.document(each.status, name=each.name, namespace=each.namespace) for each in reports]
        if output == "json":
            whole = {"apiVersion": "v1", "kind": "List", "items": documents}
            stream.write(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        else:
            stream.write(yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120))
    stream.flush()


def _stacks(reports: Sequence[Shown], output: str) -> str:
    merged: dict[str, int] = {}
    units: dict[str, str] = {}
    for each in reports:
        for part in each.status.get("outputs") or ():
            if part["kind"] == "stacks":
                units.setdefault(part.get("unit") or "samples", each.name)
                for stack, count in (each.stacks or render.stacks(part)).items():
                    merged[stack] = merged.get(stack, 0) + count
    if not units:
        raise BadInput(
            f"--output {output} is for outputs of kind stacks, and there is none. Try: probefleet run profile"
        )
    if len(units) > 1:
        said = " and ".join(f"{unit} ({name})" for unit, name in units.items())
        raise BadInput(f"--output {output}: {said} cannot be added up. Run one at a time")
    return (
        render.folded(merged)
        if output == "folded"
        else render_svg.render_svg(merged, title=", ".join(each.name for each in reports), unit=next(iter(units)))
    )
