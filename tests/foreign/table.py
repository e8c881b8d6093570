"""What came of foreign programs, as a table: rows in, the document `docs/foreign.md` out, and back. Pure.

``run`` writes the document and reads it again: what was known to work has to go on working. `tests/unit` reads it too,
so that no other document says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: So many of each kind have to give rows that change.
LEAST = 25
PACKAGES = {"bcc": "bpfcc-tools", "bpftrace": "bpftrace"}
_WORDS = {
    "works": "works",
    "loads": "loads, no row changed",
    "no": "not yet",
    "none": "no program",
    "late": "not tried",
}
_ORDER = {state: place for place, state in enumerate(_WORDS)}
_ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]*) \|$")
_HEADING = re.compile(r"^## .*\((\w+)\)$")


@dataclass(frozen=True, slots=True)
class Row:
    """One program: ``kind`` as in ``spec.program``, how far it gets, and which outputs change or why none does."""

    kind: str
    name: str
    state: str
    words: str

    @property
    def line(self) -> str:
        """Of a table in Markdown."""
        return f"| `{self.name}` | {_WORDS[self.state]} | {self.words} |"


def row(kind: str, name: str, found: Mapping[str, object]) -> Row:
    """From what ``attempt`` says, or from why it was not asked."""
    states = {"changes": "works", "loads": "loads", "none": "none", "late": "late"}
    state = states.get(str(found["state"]), "no")
    outputs = found.get("outputs")
    words = ", ".join(map(str, outputs)) if isinstance(outputs, list) and outputs else str(found.get("why", ""))
    words = re.sub(r"\s+", " ", words).replace("|", "/").replace("`", "'").strip()
    return Row(kind, name, state, words[:160])


def counts(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """kind → (works, all)."""
    return {
        kind: (sum(each.kind == kind and each.state == "works" for each in rows), sum(e.kind == kind for e in rows))
        for kind in PACKAGES
        if any(each.kind == kind for each in rows)
    }


def document(rows: Sequence[Row], *, release: str, versions: Mapping[str, str], date: str) -> str:
    """The whole of `docs/foreign.md`."""
    found = counts(rows)
    told = " and ".join(f"{found[kind][0]} of {found[kind][1]} of {PACKAGES[kind]}" for kind in found)
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    text = [
        "# Programs that nobody here wrote\n",
        f"Each row is of the last run of `make test-foreign` that came to it; the newest was on {date},",
        f"on Linux {release}, with Debian's {packages}.\n",
        "Every command of bpfcc-tools and every script of bpftrace becomes a ProbePolicy without a change: a command's",
        "C and its attach points, a script's text. It *works* where rows of its report change under [a workload that",
        f"says what it does](../tests/foreign/workload.py): {told}.",
        "`make test-foreign-tenth` tries a tenth of them, in turn; one that works here and gives nothing then is a",
        "failure.\n",
    ]
    for kind, (works, every) in found.items():
        text += [f"## {PACKAGES[kind]}: {works} of {every} work ({kind})\n"]
        text += ["| program | | outputs that change, or why none does |", "| --- | --- | --- |"]
        mine = [each for each in rows if each.kind == kind]
        text += [each.line for each in sorted(mine, key=lambda each: (_ORDER[each.state], each.name))]
        text += [""]
    return "\n".join(text)


def read(text: str) -> list[Row]:
    """The rows of that document."""
    states = {words: state for state, words in _WORDS.items()}
    rows, kind = [], ""
    for line in text.splitlines():
        if heading := _HEADING.match(line):
            kind = heading[1]
        elif (found := _ROW.match(line)) and found[2] in states:
            rows.append(Row(kind, found[1], states[found[2]], found[3]))
    return rows


def renewed(known: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """What is known, with these rows in the places of their programs'."""
    new = {(each.kind, each.name): each for each in rows}
    kept = [each for each in known if (each.kind, each.name) not in new]
    return sorted([*kept, *rows], key=lambda each: (each.kind, each.name))


def broken(rows: Sequence[Row], known: Sequence[Row]) -> list[Row]:
    """Those that are known to work and do not; all of them where the kernel came to none, whose end they may be."""
    good = {(each.kind, each.name) for each in known if each.state == "works"}
    tried = [each for each in rows if each.state != "late"] or rows
    return [each for each in tried if each.state != "works" and (each.kind, each.name) in good]


def tenth(names: Sequence[tuple[str, str]], turn: int) -> list[tuple[str, str]]:
    """Every tenth (kind, name): all of them in ten turns."""
    return sorted(names)[turn % 10 :: 10]
