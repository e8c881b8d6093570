"""A ProbeReport's status on a terminal: what ``probefleet run`` and ``kubectl probefleet run`` print.

Only the status goes in, so one machine prints the same report that a cluster writes. Colours are used only where the
output is a terminal; ``--output json|yaml`` gives the object itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TextIO, TypeAlias

import yaml
from probefleet_core import summary
from probefleet_core.format import weight
from rich.console import Console
from rich.text import Text

from probefleet_cli import event_table

Json: TypeAlias = dict[str, Any]

FORMATS: Final = ("table", "json", "yaml")
MAX_EVENT_ROWS: Final = 50


def document(status: Json, *, name: str, namespace: str = "") -> Json:
    """The whole ProbeReport around a status."""
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": "probefleet.io/v1alpha1", "kind": "ProbeReport", "metadata": metadata, "status": status}


def render(status: Json, *, name: str, namespace: str = "", output: str = "table", whole: bool = False) -> str:
    """The report as text that ends with a newline; ``output`` is one of ``FORMATS``."""
    if output == "json":
        return json.dumps(document(status, name=name, namespace=namespace), indent=2, ensure_ascii=False) + "\n"
    if output == "yaml":
        body = yaml.safe_dump(
            document(status, name=name, namespace=namespace), sort_keys=False, allow_unicode=True, width=120
        )
        return str(body)
    return "\n".join(report_lines(status, name=name, whole=whole)) + "\n"


def report_lines(status: Json, *, name: str, rows: int = 50, width: int = 0, whole: bool = False) -> list[str]:
    """The long form of the report's summary: every row and every distribution that the status has.

    Rows and records are fitted into ``width`` columns; 0: they are shown whole. ``whole``: of all time that the report
    covers, as a tool prints at its end, and not of the last interval.
    """
    found = [f"== {name} =="]
    found += summary.head(status)
    for output in status["outputs"]:
        found.append("")
        if output["kind"] == "events":
            found += events_lines(output, rows=rows, width=width)
        elif output["kind"] == "stacks":
            found += stacks_lines(output)
        else:
            seconds = status["windowSeconds"]
            found += summary.output_lines(
                output, rows=rows, histograms=1, window_seconds=seconds, whole=whole, width=width
            )
            found += _row_histograms(output, summary.part_shown(output, whole=whole))
    return found


def text(status: Json, *, name: str, rows: int = 50, width: int = 0, whole: bool = False) -> Text:
    """The report for rich: the same lines, with colours that help the eye. For live views and terminals."""
    styled = Text()
    for line in report_lines(status, name=name, rows=rows, width=width, whole=whole):
        styled.append(line, style=_style(line))
        if line.endswith("|") and "|" in line[:-1]:
            # Only the bar of a histogram.
            styled.stylize("cyan", len(styled) - len(line) + line.index("|"), len(styled))
        styled.append("\n")
    return styled


def write(
    status: Json,
    *,
    name: str,
    stream: TextIO,
    namespace: str = "",
    output: str = "table",
    wide: bool = False,
    whole: bool = False,
) -> None:
    """Print the report: on a terminal in colour and fitted to it (unless ``wide``), elsewhere plain and whole."""
    if output == "table" and stream.isatty():
        console = Console(file=stream, highlight=False, soft_wrap=True)
        console.print(text(status, name=name, width=0 if wide else console.width, whole=whole), end="")
    else:
        stream.write(render(status, name=name, namespace=namespace, output=output, whole=whole))


def events_lines(output: Json, *, rows: int = MAX_EVENT_ROWS, width: int = 0) -> list[str]:
    """The newest records as a table, oldest first, with what became of the others; fitted into ``width``, if given."""
    records = output["events"]["records"][-min(rows, MAX_EVENT_ROWS) :]
    title = summary.event_title(output, len(records))
    if not records:
        return [title, "  nothing yet"]
    if width:
        records = event_table.terse(records)
    header, body = summary.event_cells(records)
    if width:
        header, body = event_table.fitted(header, body, width - 2)
    return [title, *(f"  {line}" for line in _columns(header, body))]


def event_line(record: Mapping[str, object]) -> str:
    """One record in one line, for ``--follow``."""
    return "  ".join(f"{name}={value}" for name, value in record.items() if value not in ("", None))


def stacks_lines(output: Json, *, limit: int = 10) -> list[str]:
    """The stacks that were seen most, each from its leaf down, as perf prints them."""
    part, unit = output["total"], output.get("unit", "")
    found = [f"{output['name']} (stacks), since the beginning, {weight(part['value'], unit)}"]
    for row in part["rows"][:limit]:
        *groups, stack = row["key"] or [""]
        share = f"{row['value'] / part['value']:.1%}" if part["value"] else ""
        amount = weight(row["value"], unit).removesuffix(" samples").removesuffix(" sample")
        found += ["", f"  {amount} ({share}) {' '.join(groups)}".rstrip()]
        found += [f"    {frame}" for frame in reversed(stack.split(";"))]
    if not part["rows"]:
        found.append("  nothing yet")
    return found + [text for line in summary.nameless(output) for text in ("", f"  {line}")]


def stacks(output: Json) -> dict[str, int]:
    """Folded stacks and their counts of a ``stacks`` output: other groups of the key become the lowest frames."""
    found: dict[str, int] = {}
    for row in output["total"]["rows"]:
        folded = ";".join(row["key"])
        found[folded] = found.get(folded, 0) + row["value"]
    return found


def folded(counts: Mapping[str, int]) -> str:
    """``a;b;c 23``, one stack a line: what flame graph tools read."""
    return "".join(f"{stack} {count}\n" for stack, count in sorted(counts.items()))


def _row_histograms(output: Json, which: str) -> list[str]:
    found: list[str] = []
    part = output[which]
    if len(part["rows"]) == 1 and part["rows"][0]["value"] == part["value"]:
        return found  # it would say the same once more
    for row in part["rows"]:
        if row.get("buckets"):
            key = summary.label_text(row["key"], output["groupBy"])
            found += ["", f"  {key}: {summary.percentiles_text(row, output['unit'])}"]
            found += [f"  {line}" for line in summary.histogram(row["buckets"], output["unit"])]
    return found


def _columns(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in (header, *body)) for at in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *body)
    ]


def _style(line: str) -> str:
    if line.startswith("== "):
        return "bold"
    if line.startswith(("no sample", "only old", "gap on", "not counted")):
        return "yellow"
    if line.startswith("cost"):
        return "dim"
    return ""
