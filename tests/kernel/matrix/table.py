"""The table of docs/kernels.md, made of the results that are committed. Text in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.kernel.matrix import cells, results

DOCUMENT = cells.ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- made by the tests: begin -->\n", "<!-- made by the tests: end -->\n"


def table(found: Sequence[results.Result]) -> str:
    """What was run, then one table a section; the columns are kernels."""
    if not found:
        return ""
    lines = ["| Linux | exactly | where | tests | on |", "| --- | --- | --- | --- | --- |"]
    for each in found:
        where = "virtual machine, emulated" if each.emulated else "the machine that builds it"
        counts = ", ".join(f"{number} {state}" for state, number in each.tests.items() if number)
        exactly = f"{each.release}, {each.version}" if each.version else each.release
        lines.append(f"| {each.series} | {exactly} | {where} | {counts} | {each.tried_on} |")
    for section, title in cells.TITLES.items():
        names = dict.fromkeys(name for each in found for name in each.cells if name.startswith(f"{section}/"))
        if not names:
            continue
        lines += ["", f"| {title} | {' | '.join(each.series for each in found)} |"]
        lines.append("| --- |" + " --- |" * len(found))
        for name in names:
            row = name.partition("/")[2]
            words = [each.cells.get(name, results.NOT_TRIED) for each in found]
            lines.append(f"| {_label(section, row)} | {' | '.join(_cell(word) for word in words)} |")
    return "\n".join(lines) + "\n"


def _label(section: str, row: str) -> str:
    if section == "besides":
        return cells.BESIDES.get(row, row)
    return row if " " in row else f"`{row}`"


def _cell(word: str) -> str:
    """`no: no kprobes` reads as "no kprobes"."""
    kind, _, why = word.partition(": ")
    if kind == "no" and why:
        return why.replace("|", "\\|")
    return word.replace("|", "\\|")


def written_into(document: str, found: Sequence[results.Result]) -> str:
    """The document with this table between its marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(found)}{END}{after}"


def write(document: Path = DOCUMENT) -> None:
    """Make the document's table anew."""
    document.write_text(written_into(document.read_text(), results.committed()))
