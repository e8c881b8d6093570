"""What a register or a slot of the stack holds, by name: the values that ``map_uses`` follows. Pure.

Two are equal if they are the same number on every run of the program, whatever that is: both what one instruction left,
or the same operation on the same. An instruction in a loop leaves another one each time; ``map_uses`` forgets the old.
"""

from __future__ import annotations

from typing import NamedTuple

from probefleet_wire.bpf_code import Instruction

ADD, SUB, OR, AND, LSH, RSH, MOV, END = 0x00, 0x10, 0x40, 0x50, 0x60, 0x70, 0xB0, 0xD0
MAX_DEPTH = 6
FRAME = "stack"
_SUM = "sum"
_ALU64 = 7


class Value(NamedTuple):
    """What a register holds.

    ``constant``: ``number``. ``frame``: the stack at offset ``number``. ``map``: ``name``. ``entry``: a value of map
    ``name`` that the instruction in ``right`` looked up, at ``number`` and ``left``. ``made``: what instruction
    ``number`` left there, of so many ``bits``; out of a value of map ``name``, at ``left``, if it is named. ``result``:
    of the operation ``name`` on ``left`` and ``right``. ``low``: the lowest ``bits`` of ``left``. ``unknown``: it
    differs from path to path.
    """

    kind: str
    number: int = 0
    name: str = ""
    bits: int = 64
    left: Value | None = None
    right: Value | None = None
    #: What a pointer may point to: "stack", "map NAME", "entry NAME". "number NAME": read out of that map's values.
    may: frozenset[str] = frozenset()

    def join(self, other: Value) -> Value:
        """Either of them."""
        return self if self == other else Value("unknown", may=self.may | other.may)

    def mentions(self, number: int) -> bool:
        """Whether it was made of what that instruction left."""
        return (self.kind == "made" and self.number == number) or any(
            each is not None and each.mentions(number) for each in (self.left, self.right)
        )

    def depth(self) -> int:
        """Operations in it."""
        return 1 + max((each.depth() for each in (self.left, self.right) if each is not None), default=-1)

    def pointed(self, kind: str) -> set[str]:
        """The maps to which ("map") or to whose values ("entry") it may be a pointer, or of which it is a "number"."""
        return {each.split(" ", 1)[1] for each in self.may if each.startswith(f"{kind} ")}


UNKNOWN = Value("unknown")
#: (offset in it, bytes, value) for each part of a key.
Key = tuple[tuple[int, int, Value], ...]


def constant(number: int) -> Value:
    """A number that is known."""
    return Value("constant", number & (1 << 64) - 1)


def frame(offset: int) -> Value:
    """A pointer to the stack."""
    return Value("frame", offset, may=frozenset({FRAME}))


def narrowed(value: Value, size: int) -> Value:
    """A value in so many bytes: the same for all that differ only above them."""
    if value.kind == "constant":
        return constant(value.number & (1 << 8 * size) - 1)
    if value.kind == "low" and value.bits >= 8 * size and value.left is not None:
        return value.left
    return value


def low(value: Value, size: int) -> Value:
    """The low bytes, and zeroes above."""
    if value.kind == "constant":
        return narrowed(value, size)
    if size == 8 or value.kind == "unknown" or value.may or (value.kind in ("made", "low") and value.bits <= 8 * size):
        return value
    return Value("low", bits=8 * size, left=value)


def computed(it: Instruction, value: Value, other: Value) -> Value:
    """What an arithmetic instruction makes of two values."""
    operation, wide = it.code & 0xF0, it.kind == _ALU64
    if wide and operation in (ADD, SUB):
        if value.kind == "frame" and other.kind == "constant":
            return frame(value.number + _amount(other, operation))
        if value.kind == "entry" and not other.may:
            return _elsewhere(value, other, operation)
        if operation == ADD and (_is_number(value) or _is_number(other)) and not (value.may and other.may):
            return Value("result", name=_SUM, left=value, right=other, may=value.may | other.may)
    if value.may or other.may or UNKNOWN in (value, other):
        return Value("unknown", may=value.may | other.may)
    if not wide:
        value, other = low(value, 4), low(other, 4)
    name = f"{it.kind} {operation} {it.offset} {it.code & 8 if operation == END else 0}"
    made = _folded(operation, value, other) or Value("result", name=name, left=value, right=other)
    if operation == RSH and wide and other == constant(32) and _is_shifted_left(value) and value.left is not None:
        made = low(value.left, 4)  # how 32 bits are taken out of 64
    if made.depth() > MAX_DEPTH:
        return UNKNOWN
    return made if wide else low(made, 4)


def is_sum(value: Value, pointer: Value, size: int) -> bool:
    """Is it what lies there, with something added?"""
    if value.kind != "result" or value.name != _SUM or pointer.kind != "entry" or pointer.left == UNKNOWN:
        return False
    return any(
        each is not None and _is_number(each) and each.left == pointer and each.bits == 8 * size
        for each in (value.left, value.right)
    )


def bound(value: Value) -> int:
    """A number that the value cannot exceed."""
    if value.kind == "constant":
        return value.number
    most = (1 << value.bits) - 1 if value.kind in ("made", "low") else (1 << 64) - 1
    if value.kind == "low" and value.left is not None:
        return min(most, bound(value.left))
    if value.kind != "result" or value.left is None or value.right is None:
        return most
    operation = value.name.split(" ")[1:2]
    if operation == [str(AND)]:
        return min(bound(value.left), bound(value.right))
    if operation == [str(RSH)] and value.right.kind == "constant":
        return bound(value.left) >> (value.right.number & 63)
    return most


def _amount(by: Value, operation: int) -> int:
    amount = by.number - (1 << 64) if by.number >> 63 else by.number
    return amount if operation == ADD else -amount


def _elsewhere(entry: Value, by: Value, operation: int) -> Value:
    """A pointer into the same value of a map, moved."""
    if by.kind == "constant":
        return entry._replace(number=entry.number + _amount(by, operation))
    left = by if entry.left is None and operation == ADD and by.depth() < MAX_DEPTH else UNKNOWN
    return entry._replace(left=left)


def _is_number(value: Value) -> bool:
    """Was it read out of a map's value?"""
    return value.kind == "made" and bool(value.name)


def _is_shifted_left(value: Value) -> bool:
    return value.kind == "result" and value.name.startswith(f"{_ALU64} {LSH} ") and value.right == constant(32)


def _folded(operation: int, value: Value, other: Value) -> Value | None:
    """Arithmetic on two numbers that are known."""
    if value.kind != "constant" or other.kind != "constant":
        return None
    a, b = value.number, other.number
    made = {ADD: a + b, SUB: a - b, OR: a | b, AND: a & b, LSH: a << (b & 63), RSH: a >> (b & 63)}.get(operation)
    return None if made is None else constant(made)
