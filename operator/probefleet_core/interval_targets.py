"""Programs that run once an interval: iterators, and syscall programs. Shapes, values and words. Pure.

What outputs make of an iterator is in ``interval_outputs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.v1 import plan_pb2

from probefleet_core.shape import Record, Text


@dataclass(frozen=True, slots=True)
class Iterator:
    """A walk over all there is of a kind: ``task``, ``tcp``. ``record``: the struct that it writes; empty: lines."""

    type: str
    record: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    """Run once an interval, for what it does: a syscall program, which fills maps."""


Target: TypeAlias = Iterator | Interval
TARGETS = (Iterator, Interval)
SHAPES = {
    "iterator": Record(
        "an iterator",
        {
            "type": Text(
                max_length=64,
                min_length=1,
                pattern=r"[a-z][a-z0-9_]*",
                write="Write what it walks over, such as task or tcp.",
            )
        },
        required=("type",),
    ),
    "interval": Record("a run each interval", {}),
}


def parse(kind: str, item: Mapping[str, Any]) -> Target:
    """A target of ``spec.attach`` that has passed its shape."""
    return Iterator(item["type"]) if kind == "iterator" else Interval()


def put(made: plan_pb2.Attachment, target: Target) -> None:
    """Write the target into the wire's attachment."""
    if isinstance(target, Iterator):
        made.iterator.CopyFrom(plan_pb2.Iterator(type=target.type, record=target.record))
    else:
        made.interval.CopyFrom(plan_pb2.Interval())


def kind_of(target: Target) -> str:
    """The target's member in ``spec.attach``."""
    return "iterator" if isinstance(target, Iterator) else "interval"


def describe(target: Target) -> str:
    """What it walks over."""
    return target.type if isinstance(target, Iterator) else "(once each)"


def read_section(section: str) -> tuple[tuple[str, ...], Target | None] | None:
    """The targets that fit a SEC() name, and the one that it names; None for other programs."""
    kind, _, rest = section.removeprefix("?").partition("/")
    if kind in ("iter", "iter.s"):
        return ("iterator",), Iterator(rest) if rest else None
    return (("interval",), Interval()) if kind == "syscall" and not rest else None


def iterators(parsed: BpfObject) -> list[str]:
    """The names of an object's iterators."""
    found = ((each.name, read_section(each.section)) for each in parsed.programs)
    return [name for name, section in found if section and section[0] == ("iterator",)]
