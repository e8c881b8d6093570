"""Reads what BCC's C says of its own tables, as far as the default outputs need it. Pure.

BCC is compiled on the nodes, so the planner has only the text: the macros ``BPF_HASH(name, key, leaf)``,
``BPF_HISTOGRAM(name, key)``, ``BPF_PERF_OUTPUT(name)``… name each table, and structs name the fields of a key. What
this does not find (tables behind macros of the user's own) a policy can name in ``outputs``; the agent has the last
word.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_TABLE = re.compile(
    r"\bBPF_(HASH|LRU_HASH|PERCPU_HASH|ARRAY|PERCPU_ARRAY|HISTOGRAM|PERF_OUTPUT|RINGBUF_OUTPUT|STACK_TRACE"
    r"|LPM_TRIE|TABLE\w*)"
    r"\s*\(([^()]*)\)"
)
LPM_TRIE = "LPM_TRIE"
_PROGRAM_ARRAY = re.compile(r"\bBPF_PROG_ARRAY\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)")
_SLOTS_OF_TABLE = 4  # BPF_TABLE("prog", int, int, name, size)
#: Integers of C and of the kernel: what a leaf or one of its members has to be for it to be counted.
_INTEGER = re.compile(
    r"(?:(?:un)?signed\s+)?(?:char|short|int|long|long\s+long)(?:\s+int)?|(?:un)?signed|__?[us](?:8|16|32|64)|[us](?:8|16|32|64)"
    r"|u?int(?:8|16|32|64)_t|s?size_t|pid_t|bool"
)
_DEFINED = re.compile(r"\bdefined\s*\(?\s*(\w+)\s*\)?")
_NODES = re.compile(r"CONFIG_|_|LINUX_")
_PRINT = re.compile(r"\bbpf_trace_printk\s*\(")
_FUNCTION_MARK = "probefleet_selected"


@dataclass(frozen=True, slots=True)
class Table:
    """One table: ``kind`` as in the macro's name, and the C types of key and leaf where it gives them."""

    kind: str
    name: str
    key: str = ""
    leaf: str = ""


def without_comments(source: str) -> str:
    """The text that the compiler reads."""
    return _COMMENT.sub(" ", source)


def _active(source: str) -> str:
    """The text without comments, and without what its own ``#define``s switch off. Where a node decides
    (``CONFIG_X``, ``__s390x__``, a version), everything stays.
    """
    defined: set[str] = set()
    asked: list[bool | None] = []  # of each open condition: holds, does not, not known here
    kept = []
    for line in without_comments(source).split("\n"):
        directive, _, rest = line.strip().replace("# ", "#").partition(" ")
        if directive in ("#if", "#ifdef", "#ifndef"):
            asked.append(_holds(directive, rest, defined))
        elif directive == "#else" and asked:
            asked[-1] = None if asked[-1] is None else not asked[-1]
        elif directive == "#elif" and asked:
            asked[-1] = None
        elif directive == "#endif" and asked:
            asked.pop()
        elif False not in asked:
            if directive == "#define" and rest:
                defined.add(re.split(r"[\s(]", rest.strip(), maxsplit=1)[0])
            kept.append(line)
    return "\n".join(kept)


def _holds(directive: str, condition: str, defined: Set[str]) -> bool | None:
    word = condition.strip()
    if directive == "#if" and word.isdigit():
        return int(word) != 0
    if directive == "#if" and word.isidentifier() and not _NODES.match(word):
        return None if word in defined else False
    names = _DEFINED.findall(condition) if directive == "#if" else condition.split()[:1]
    rest = _DEFINED.sub("", condition).replace("||", "").strip() if directive == "#if" else ""
    if not names or rest or any(_NODES.match(name) for name in names):
        return None
    return any(name in defined for name in names) != (directive == "#ifndef")


def tables(source: str) -> tuple[Table, ...]:
    """The tables that macros declare, in the order of the source."""
    found = []
    for kind, inside in _TABLE.findall(_active(source)):
        words = [" ".join(word.split()) for word in inside.split(",")]
        if kind.startswith("TABLE"):
            # BPF_TABLE("hash", key, leaf, name, size)
            if len(words) >= 4:
                found.append(Table(words[0].strip('"').upper(), words[3], words[1], words[2]))
        elif re.fullmatch(r"[A-Za-z_]\w*", words[0]):
            found.append(Table(kind, words[0], *_types(kind, words)))
    return tuple(found)


def program_arrays(source: str) -> dict[str, int]:
    """Name → slots of each table that programs jump through; 0 where the text does not give a number."""
    text = _active(source)
    found = _PROGRAM_ARRAY.findall(text)
    for kind, inside in _TABLE.findall(text):
        words = [word.strip() for word in inside.split(",")]
        if kind.startswith("TABLE") and words[0] == '"prog"' and len(words) > _SLOTS_OF_TABLE:
            found.append((words[3], words[_SLOTS_OF_TABLE]))
    return {name: int(slots) if slots.isdigit() else 0 for name, slots in found}


def _types(kind: str, words: list[str]) -> tuple[str, str]:
    """Key and leaf, with BCC's own defaults (src/cc/export/helpers.h)."""
    second = words[1] if len(words) > 1 and not words[1].isdigit() else ""
    third = words[2] if len(words) > 2 and not words[2].isdigit() else ""
    if kind in ("ARRAY", "PERCPU_ARRAY"):
        return "int", second or "u64"
    if kind == "HISTOGRAM":
        return second or "int", "u64"
    return (second or "u64", third or "u64") if "HASH" in kind or kind == LPM_TRIE else ("", "")


def fields_of(source: str, c_type: str) -> tuple[str, ...] | None:
    """The member names of ``struct x`` or of a typedef'd struct; None for what is no struct in this text."""
    body = _body(_active(source), c_type)
    if not body:
        return None
    members = re.findall(r"([A-Za-z_]\w*)\s*(?:\[[^\]]*\]\s*)*(?::\s*\d+\s*)?(?=[;,])", body)
    return tuple(members)


def is_integer(c_type: str) -> bool:
    """Whether a type is an integer by its name alone."""
    return _INTEGER.fullmatch(" ".join(c_type.split())) is not None


def numbers_of(source: str, c_type: str) -> tuple[str, ...]:
    """The members of a struct that are one integer each; empty where there is none, or no such struct."""
    fields = fields_of(source, c_type) or ()
    body = _body(_active(source), c_type)
    found = []
    for statement in body.split(";"):
        declared = re.fullmatch(r"\s*(.*?)((?:\b[A-Za-z_]\w*\s*,\s*)*\b[A-Za-z_]\w*)\s*", statement, re.DOTALL)
        if declared and is_integer(declared[1]):
            found += [name.strip() for name in declared[2].split(",")]
    return tuple(name for name in found if name in fields)


def _body(text: str, c_type: str) -> str:
    """What stands between a struct's braces, or a typedef's of one."""
    name = c_type.removeprefix("struct ").strip()
    found = re.search(rf"\bstruct\s+{re.escape(name)}\s*{{([^{{}}]*)}}", text) or re.search(
        rf"\btypedef\s+struct\s*\w*\s*{{([^{{}}]*)}}\s*{re.escape(name)}\s*;", text
    )
    return found[1] if found else ""


def asks_for_pods(source: str) -> bool:
    """Whether the program calls ``probefleet_selected()``."""
    return re.search(rf"\b{_FUNCTION_MARK}\s*\(", without_comments(source)) is not None


def names(source: str, word: str) -> bool:
    """Whether a name stands in the code at all."""
    return re.search(rf"\b{re.escape(word)}\b", without_comments(source)) is not None


def prints(source: str) -> bool:
    """Whether the program calls ``bpf_trace_printk()``: then it has a ring of that name for its lines."""
    return _PRINT.search(without_comments(source)) is not None
