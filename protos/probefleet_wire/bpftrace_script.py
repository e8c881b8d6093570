"""What a bpftrace script says of its own maps: their names and kinds, as far as its text tells. Pure.

``program_parts`` makes outputs of it, and the agent the tables that bpftrace's numbers are put into: both have to
read the same from the same text. ``instrumented`` adds what has every map printed once a second, between two marks.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

#: What stands for the map without a name.
ANONYMOUS = "at"
#: bpftrace's own name of the events that printf, time, cat and join write.
LINES = "printf"
MARK, CLEARED = "\x1eprobefleet", "\x1ecleared "
_DELETE = re.compile(r"\bdelete\s*\(\s*@([A-Za-z_]\w*)?\s*[\[,)]")
_CLEAR = re.compile(r"\b(?:clear|zero)\s*\(\s*@([A-Za-z_]?\w*)\s*\)")
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*[<\"][^>\"\n]*[>\"]", re.MULTILINE)
_TEXT = re.compile(r'"(?:\\.|[^"\\])*"')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_MAP = re.compile(
    r"(?P<before>\+\+|--)?@(?P<name>[A-Za-z_]\w*)?\s*(?P<index>(?:\[[^][]*(?:\[[^][]*\][^][]*)*\])?)\s*"
    r"(?P<after>\+\+|--|\+=|-=|=(?!=))?\s*(?P<call>\w+\s*\()?"
)
_CALLS = {
    "count(": "counter",
    "sum(": "counter",
    "hist(": "hist",
    "lhist(": "lhist",
    "stats(": "stats",
    "min(": "min",
    "max(": "max",
    "avg(": "latest",
}


class Kind(enum.StrEnum):
    """How a map's numbers are to be read."""

    COUNTER = "counter"
    HIST = "hist"
    LHIST = "lhist"
    STATS = "stats"
    MIN = "min"
    MAX = "max"
    LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Map:
    """One map: ``name`` without its @; ``step`` of an lhist."""

    name: str
    kind: Kind
    keyed: bool
    step: int = 0
    deletes: bool = False  # the script deletes keys of it, which may come anew

    @property
    def table(self) -> str:
        """What the policy calls it."""
        return self.name or ANONYMOUS


def bare(script: str) -> str:
    """Without comments, and without what stands in texts."""
    return _COMMENT.sub(" ", _TEXT.sub('""', script))


def maps(script: str) -> tuple[Map, ...]:
    """The maps whose numbers are to be read, in the order of the text: not ``working`` ones, and none of text."""
    aside = working(script)
    return tuple(each for each in _written(script) if each.name not in aside)


def working(script: str) -> frozenset[str]:
    """Maps in which the script keeps something between two probes and deletes it itself, as the time of a request.

    They are not printed: bpftrace ends where a key goes while it prints, and what it would show is a moment.
    """
    return frozenset(each.name for each in _written(script) if each.kind is Kind.LATEST and each.deletes)


def _written(script: str) -> tuple[Map, ...]:
    text = bare(script)
    found: dict[str, Map] = {}
    texts: set[str] = set()
    deleted = set(_DELETE.findall(text))
    falls = {match["name"] or "" for match in _MAP.finditer(text) if {match["before"], match["after"]} & {"--", "-="}}
    for match in _MAP.finditer(text):
        name, index, operator = match["name"] or "", match["index"], match["before"] or match["after"]
        call = (match["call"] or "").replace(" ", "")
        if not operator:
            continue
        if text.startswith('""', match.end()):
            texts.add(name)  # of a number there is nothing in it
        if operator in ("++", "+=") and name not in falls:
            kind = Kind.COUNTER
        elif operator == "=" and call in _CALLS:
            kind = Kind(_CALLS[call])
        else:
            kind = Kind.LATEST
        step = 0
        if kind is Kind.LHIST:
            step = _last_number(text[match.end() :])
        if name not in found or found[name].kind is Kind.LATEST:
            found[name] = Map(name, kind, bool(index), step, name in deleted)
    return tuple(each for name, each in found.items() if name not in texts)


def _last_number(text: str) -> int:
    """The last argument of lhist(value, min, max, step)."""
    depth, at = 1, 0
    while at < len(text) and depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    last = text[: at - 1].rpartition(",")[2].strip()
    return int(last) if last.isdigit() else 1


def prints(script: str) -> bool:
    """The script writes lines of its own."""
    return re.search(r"\b(?:printf|time|cat|join|strftime)\s*\(", bare(script)) is not None


def includes(script: str) -> bool:
    """The script includes headers of the kernel: nodes have none, and BTF has what it wants of them."""
    return _INCLUDE.search(script) is not None


def instrumented(script: str) -> str:
    """The script with a probe that prints all its maps once a second, and a mark behind them.

    Where the script clears a map it says so, on the same line: a count that is reached again would look like no change.
    """
    shown = " ".join(f"print(@{each.name});" for each in maps(script))
    bare = _INCLUDE.sub("", script)
    marked = _CLEAR.sub(lambda found: f'{found[0]}; printf("%s\\n", "{CLEARED}{found[1]}")', bare)
    return f'{marked}\ninterval:s:1 {{ {shown} printf("%s\\n", "{MARK}"); }}\n'
