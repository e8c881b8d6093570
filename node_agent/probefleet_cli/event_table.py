"""Records of events for a terminal: what every row says alike is said less, and the rest fits between the edges.

``render`` calls it for terminals only: a pipe, ``--wide`` and ``--output json`` get every field whole. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Record = dict[str, str]
IDENTITY = ("namespace", "workload", "pod", "container")
#: No column becomes narrower than this, whatever the terminal.
LEAST = 8
GAP = 2
HOST = "(host)"
_TIME = re.compile(r"\d\d:\d\d:\d\d\.\d+")
_NUMBERED = re.compile(r"\[\d+\]$")  # a process: its name may give way, its number tells it from others


def terse(records: Sequence[Mapping[str, str]]) -> list[Record]:
    """The same records in fewer columns: the time of day, one column for whose event it is, no field twice."""
    several = len({record.get("node", "") for record in records}) > 1
    pods = any(_whose(record) != HOST for record in records)
    named = all(_names_itself(record) for record in records)
    found = []
    for record in records:
        short: Record = {}
        for name, value in record.items():
            if name == "time":
                short[name] = value.partition("T")[2][:12] or value
            elif name == "node":
                short.update({name: value} if several else {})
            elif name in IDENTITY:
                short.update({"pod": _whose(record)} if pods else {})
            elif not (named and name == "command"):
                short[name] = value
        found.append(short)
    return found


def _names_itself(record: Mapping[str, str]) -> bool:
    return bool(record.get("command")) and record.get("pid", "").startswith(f"{record['command']}[")


def _whose(record: Mapping[str, str]) -> str:
    """``shop/web-1/nginx``; what is no pod has one word for all of them."""
    parts = [record.get(name, "") for name in ("namespace", "pod", "container")]
    return "/".join(dict.fromkeys(part for part in parts if part))


def fitted(header: Sequence[str], body: Sequence[Sequence[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """The cells of a table that is no wider than ``width``: the widest columns give way first."""
    widths = [max(len(row[at]) for row in (header, *body)) for at in range(len(header))]
    room = width - GAP * (len(widths) - 1)
    if sum(widths) > room:  # parts of seconds, and titles, give way before what they stand over
        body = [[cell[:8] if _TIME.fullmatch(cell) else cell for cell in row] for row in body]
        widths = [max(LEAST, *(len(row[at]) for row in body)) for at in range(len(header))]
    limit = max(widths)
    while sum(min(each, limit) for each in widths) > room and limit > LEAST:
        limit -= 1
    # What the common limit leaves goes to the last column: arguments, a file.
    last = max(LEAST, room - sum(min(each, limit) for each in widths[:-1]))
    limits = [min(each, limit) for each in widths[:-1]] + [last]
    rows = [[_cut(cell, most) for cell, most in zip(row, limits, strict=True)] for row in (header, *body)]
    return rows[0], rows[1:]


def _cut(text: str, most: int) -> str:
    """Of a path its end, of a process its number, of anything else its beginning."""
    if len(text) <= most:
        return text
    number = _NUMBERED.search(text)
    if number and len(number[0]) < most:
        return text[: most - len(number[0]) - 1] + "…" + number[0]
    if text.startswith("/") and " " not in text:
        return "…" + text[-(most - 1) :]
    return text[: most - 1] + "…"
