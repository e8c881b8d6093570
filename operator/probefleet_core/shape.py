"""Shapes of YAML: which fields an object may have, of which type and within which bounds. Pure.

A shape is data (``Record``, ``Text``, ``ListOf``…); ``check`` walks a value along it and notes every problem in words.
``policy`` declares the shapes of the resources; a test walks them beside the CRDs' OpenAPI schemas and compares field
by field, so the API server and ``probefleet check`` cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from probefleet_core import errors

# How much of a wrong value a message repeats.
SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Text:
    """A string. ``or_whole`` also takes an integer (Kubernetes' int-or-string), which is then read as its digits."""

    max_length: int
    min_length: int = 0
    pattern: str = ""
    choices: tuple[str, ...] = ()
    write: str = ""  #: the sentence that says what to write instead
    or_whole: bool = False
    #: Says what is wrong with a text that fits all else, or None. For what a pattern cannot say.
    reject: Callable[[str], str | None] | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer."""

    minimum: int
    maximum: int
    write: str = ""


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""


@dataclass(frozen=True, slots=True)
class Anything:
    """A value whose type something else knows (a map's BTF): text, numbers, lists and objects of them."""

    max_parts: int


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list; with ``unique`` (a field's name) no two items may have the same there."""

    items: Shape
    max_items: int
    min_items: int = 0
    unique: str = ""


@dataclass(frozen=True, slots=True)
class MapOf:
    """An object whose keys are the user's own."""

    values: Shape
    max_items: int
    key: Text = Text(max_length=63, min_length=1)


@dataclass(frozen=True, slots=True)
class Union:
    """Exactly one of some fields of a record; with ``optional`` at most one. ``what`` says what they are, in a word."""

    members: tuple[str, ...]
    what: str
    why: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """An object with fields of its own."""

    what: str  #: "an output": for messages
    fields: Mapping[str, Shape]
    required: tuple[str, ...] = ()
    unions: tuple[Union, ...] = ()
    #: Rules across fields, called when each field by itself is right: they note problems at the path they are given.
    rules: tuple[Callable[[Mapping[str, object], str, errors.Problems], None], ...] = field(default=())


Shape: TypeAlias = Text | Whole | Flag | Anything | ListOf | MapOf | Record


def check(shape: Shape, value: object, path: str, problems: errors.Problems) -> None:
    """Note everything in which ``value`` differs from ``shape``."""
    match shape:
        case Text():
            _text(shape, value, path, problems)
        case Whole():
            _whole(shape, value, path, problems)
        case Flag():
            if not isinstance(value, bool):
                _wrong_type(value, path, problems, "true or false")
        case Anything():
            _anything(shape, value, path, problems)
        case ListOf():
            _list(shape, value, path, problems)
        case MapOf():
            _map(shape, value, path, problems)
        case Record():
            _record(shape, value, path, problems)


def join(path: str, name: str) -> str:
    """A field's path, as kubectl writes it."""
    return f"{path}.{name}" if path else name


def shown(value: object) -> str:
    """A value as a message repeats it: on one line, not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def type_name(value: object) -> str:
    """What YAML calls the value's type."""
    for kind, name in (
        (bool, "true or false"),
        (int, "a whole number"),
        (float, "a number"),
        (str, "text"),
        (Mapping, "an object"),
        (list, "a list"),
    ):
        if isinstance(value, kind):
            return name
    return "nothing" if value is None else type(value).__name__


def _wrong_type(value: object, path: str, problems: errors.Problems, wanted: str, write: str = "") -> None:
    problems.add(
        path,
        f"this is {type_name(value)}",
        why=f"{wanted} belongs here",
        write=write or (f'Write it in quotes: "{str(value).lower()}".' if wanted == "text" else f"Write {wanted}."),
    )


def _text(shape: Text, value: object, path: str, problems: errors.Problems) -> None:
    if shape.or_whole and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        _wrong_type(value, path, problems, "text", "" if isinstance(value, bool) else shape.write)
        return
    if shape.choices:
        if value not in shape.choices:
            problems.add(
                path,
                f'"{shown(value)}" is not known here',
                why=f"it is one of {', '.join(shape.choices)}",
                write=errors.did_you_mean(value, shape.choices, what="choice"),
            )
        return
    # The API server counts code points, and so does Python.
    if len(value) > shape.max_length:
        problems.add(
            path,
            f"{len(value):,} characters",
            why=f"at most {shape.max_length:,} are allowed",
            write=shape.write or "Write less.",
        )
        return
    if len(value) < shape.min_length:
        problems.add(path, "empty text", why="something belongs here", write=shape.write or "Write a value.")
        return
    # fullmatch, because `$` would let a line break at the end through.
    wrong = shape.pattern and not re.fullmatch(shape.pattern, value)
    reason = f"it has to match {shape.pattern}" if wrong else shape.reject(value) if shape.reject else None
    if reason:
        problems.add(path, f'"{shown(value)}"', why=reason, write=shape.write or "Write it in that form.")


def _whole(shape: Whole, value: object, path: str, problems: errors.Problems) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _wrong_type(value, path, problems, "a whole number")
    elif not shape.minimum <= value <= shape.maximum:
        problems.add(
            path,
            f"{value}",
            why=f"it has to be from {shape.minimum:,} to {shape.maximum:,}",
            write=shape.write or "Write a number from that range.",
        )


def _anything(shape: Anything, value: object, path: str, problems: errors.Problems) -> None:
    waiting, parts = [value], 0
    while waiting and parts <= shape.max_parts:
        part = waiting.pop()
        parts += 1
        if isinstance(part, Mapping):
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
        elif part is None or not isinstance(part, str | int | float):
            _wrong_type(part, path, problems, "text, a number, true or false, or a list or object of them")
            return
    if waiting:
        problems.add(path, "too much", why=f"at most {shape.max_parts} parts are allowed", write="Write less.")


def _list(shape: ListOf, value: object, path: str, problems: errors.Problems) -> None:
    if not isinstance(value, list):
        _wrong_type(value, path, problems, "a list", "Begin each item with a dash.")
        return
    if not shape.min_items <= len(value) <= shape.max_items:
        why = f"from {shape.min_items} to {shape.max_items} are allowed"
        problems.add(path, f"{len(value)} items", why=why, write="Split them over several policies.")
        return
    seen: dict[object, int] = {}
    for index, item in enumerate(value):
        here = f"{path}[{index}]"
        check(shape.items, item, here, problems)
        name = item.get(shape.unique) if shape.unique and isinstance(item, Mapping) else None
        if isinstance(name, str):
            if name in seen:
                problems.add(
                    join(here, shape.unique),
                    f'"{shown(name)}" is there twice',
                    why=f"item {seen[name]} of the list has it already",
                    write="Give each item another name.",
                )
            seen.setdefault(name, index)


def _map(shape: MapOf, value: object, path: str, problems: errors.Problems) -> None:
    if not isinstance(value, Mapping):
        _wrong_type(value, path, problems, "an object")
        return
    if len(value) > shape.max_items:
        problems.add(path, f"{len(value)} entries", why=f"at most {shape.max_items} are allowed", write="Write fewer.")
        return
    for name, item in value.items():
        check(shape.key, name, path, problems)
        check(shape.values, item, join(path, str(name)), problems)


def _record(shape: Record, value: object, path: str, problems: errors.Problems) -> None:
    if not isinstance(value, Mapping):
        _wrong_type(value, path, problems, "an object", f"Write the fields of {shape.what} below it.")
        return
    before = len(problems.found)
    for name in value:
        if name not in shape.fields:
            problems.add(
                join(path, str(name)),
                "unknown field",
                why=f"{shape.what} has no field of that name",
                write=errors.did_you_mean(str(name), tuple(shape.fields), what="field here"),
            )
    for name in shape.required:
        if value.get(name) is None:
            problems.add(join(path, name), "missing", why=f"{shape.what} needs it", write=f"Write {name}.")
    for union in shape.unions:
        _union(union, value, path, problems)
    for name, inner in shape.fields.items():
        # As the API server does, a field that is null counts as absent.
        if value.get(name) is not None:
            check(inner, value[name], join(path, name), problems)
    if len(problems.found) == before:
        for rule in shape.rules:
            rule(value, path, problems)


def _union(union: Union, value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    there = [name for name in union.members if value.get(name) is not None]
    if len(there) > 1:
        problems.add(
            path,
            f"{' and '.join(there)} at once",
            why=union.why,
            write="Keep one of them.",
        )
    elif not there and not union.optional:
        problems.add(
            path,
            f"no {union.what}",
            why=union.why,
            write=f"Write one of {', '.join(union.members)}.",
        )
