"""Proves that a network program writes neither into a packet nor into its context; or says where it might. Pure.

The kernel lets XDP and TC programs write through pointers into the packet, and knows no way to forbid it. So this
follows every pointer through the program: what a register, or a slot of the stack, *may* hold at each instruction, over
all paths at once. A store whose address may come from the packet or the context is a finding. The kernel's verifier
does the rest: it has made sure that pointers are what they seem, that bitwise operations and 32-bit arithmetic on
pointers leave only numbers, and that nothing but the stack gives a pointer into a packet back (a map gives a number).

Where the analysis cannot tell, it says so: nothing that it lets pass writes. It is used by ``observing``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from probefleet_wire.bpf_code import (
    CALL,
    EXIT,
    LOAD_IMM64,
    Code,
    CoreField,
    Function,
    Instruction,
    Place,
)
from probefleet_wire.elf import ElfError

# What a value may be: a set of these.
OTHER, CONTEXT, STACK, CALLERS_STACK, PACKET = 1, 2, 4, 8, 16
ANYTHING = OTHER | CONTEXT | CALLERS_STACK | PACKET
MAX_INSTRUCTIONS = 100_000
_FRAME, _ARGUMENTS = 10, range(1, 6)
_LD, _LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = range(8)
_BYTES = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}
_MEM, _MEMSX, _ATOMIC = 0x60, 0x80, 0xC0
_ADD, _SUB, _MOV = 0x00, 0x10, 0xB0
_UNKNOWN_JUMPS = frozenset({0x0D, 0x8D, 0x86, 0x8E, 0x96})  # goto and call by register, and what has no meaning

#: Context → (bytes of it that are pointers into the packet, names of these members). include/uapi/linux/bpf.h.
CONTEXTS = {
    "xdp_md": (frozenset(range(12)), frozenset({"data", "data_end", "data_meta"})),
    "__sk_buff": (
        frozenset(range(76, 84)) | frozenset(range(140, 144)),
        frozenset({"data", "data_end", "data_meta"}),
    ),
    "bpf_sock": (frozenset(), frozenset()),
}


class Value(NamedTuple):
    """What a register may hold; ``at`` is the offset in the stack's frame or in the context, where it is known."""

    may: int
    at: int | None = None

    def join(self, other: Value) -> Value:
        """Either of them."""
        return self if self == other else Value(self.may | other.may, self.at if self.at == other.at else None)


NUMBER = Value(OTHER)


@dataclass(frozen=True, slots=True)
class Finding:
    """A store that may change what is watched."""

    function: str
    place: Place
    instruction: int
    what: str  #: "the packet" or "its context"


@dataclass(slots=True)
class _State:
    """Registers and slots before an instruction. A slot that is not there was not written on any path."""

    registers: list[Value]
    slots: dict[int, Value]

    def copy(self) -> _State:
        return _State(list(self.registers), dict(self.slots))

    def merge(self, other: _State) -> bool:
        """Take in another way here; whether that told anything new."""
        changed = False
        for number, value in enumerate(other.registers):
            joined = self.registers[number].join(value)
            changed |= joined != self.registers[number]
            self.registers[number] = joined
        for at, value in other.slots.items():
            joined = self.slots[at].join(value) if at in self.slots else value
            changed |= self.slots.get(at) != joined
            self.slots[at] = joined
        return changed


@dataclass(slots=True)
class _Analysis:
    """What is known of all functions together; grows until nothing new is learnt."""

    code: Code
    context: str
    entries: dict[Place, list[Value]] = field(default_factory=dict)
    returns: dict[Place, Value] = field(default_factory=dict)
    stored: int = OTHER  #: what any stack may hold, as seen from another function
    lost_track: bool = False  #: a pointer was written to a stack at a place that is not known
    changed: bool = True

    def enter(self, place: Place, arguments: list[Value]) -> None:
        known = self.entries.get(place)
        joined = arguments if known is None else [a.join(b) for a, b in zip(known, arguments, strict=True)]
        if joined != known:
            self.entries[place] = joined
            self.changed = True

    def leave(self, place: Place, value: Value) -> None:
        known = self.returns.get(place)
        joined = value if known is None else known.join(value)
        if joined != known:
            self.returns[place] = joined
            self.changed = True

    def remember(self, value: Value, *, lost: bool) -> None:
        stored = self.stored | _seen_from_outside(value).may
        lost = self.lost_track or (lost and value.may != OTHER)
        self.changed |= (stored, lost) != (self.stored, self.lost_track)
        self.stored, self.lost_track = stored, lost


def findings(code: Code, program: str, context: str) -> list[Finding]:
    """Every store of a program that may reach the packet or the context. ElfError where it cannot be followed."""
    reached = code.reached(program)
    if sum(len(function.instructions) for function in reached) > MAX_INSTRUCTIONS:
        raise ElfError(f"{program} has more than {MAX_INSTRUCTIONS:,} instructions: too many to be looked through")
    analysis = _Analysis(code, context)
    analysis.entries[code.programs[program]] = [Value(CONTEXT, 0), *[NUMBER] * 4]
    found: dict[tuple[Place, int], Finding] = {}
    while analysis.changed:
        analysis.changed = False
        for place in list(analysis.entries):
            for each in _follow(analysis, code.functions[place]):
                found[each.place, each.instruction] = each
    return [found[key] for key in sorted(found)]


def _follow(analysis: _Analysis, function: Function) -> Iterator[Finding]:
    """Walk one function until nothing changes."""
    registers = [NUMBER, *analysis.entries[function.place], *[NUMBER] * 4, Value(STACK, 0)]
    before: dict[int, _State] = {0: _State(registers, {})}
    waiting = [0]
    while waiting:
        number = waiting.pop()
        state = before[number].copy()
        # Straight on, as long as nobody else comes in.
        while True:
            if number >= len(function.instructions):
                raise ElfError(f"{function.name} runs over its end")
            yield from _step(analysis, function, number, state)
            following = function.targets(number)
            if len(following) == 1 and following[0] == number + 1 and following[0] not in before:
                number = following[0]
                before[number] = state.copy()
                continue
            for target in following:
                if not 0 <= target < len(function.instructions):
                    raise ElfError(f"{function.name} jumps out of itself at instruction {number}")
                if target not in before:
                    before[target] = state.copy()
                    waiting.append(target)
                elif before[target].merge(state):
                    waiting.append(target)
            break


def _step(analysis: _Analysis, function: Function, number: int, state: _State) -> Iterator[Finding]:
    """What one instruction does to the registers and the stack."""
    it = function.instructions[number]
    registers = state.registers
    if max(it.dst, it.src) > _FRAME:  # four bits could name sixteen registers; there are eleven
        raise _unknown(function, number)
    if it.kind in (_ALU, _ALU64):
        registers[it.dst] = _arithmetic(it, registers, moved=number in function.filled)
    elif it.kind == _LDX:
        _check_mode(it, function, number)
        registers[it.dst] = _load(analysis, function, number, state)
    elif it.kind == _LD:
        if it.code == LOAD_IMM64:
            if number in function.addresses:
                # A callback: its arguments are the kernel's, and a pointer to something on this stack.
                analysis.enter(function.addresses[number], [Value(OTHER | CALLERS_STACK)] * 5)
            registers[it.dst] = NUMBER
        else:  # LD_ABS and LD_IND: a byte, half or word of the packet
            for each in range(6):
                registers[each] = NUMBER
    elif it.kind in (_ST, _STX):
        _check_mode(it, function, number)
        yield from _store(analysis, function, number, state)
    elif it.code == CALL:
        _call(analysis, function, number, state)
    elif it.code == EXIT:
        analysis.leave(function.place, _seen_from_outside(registers[0]))
    elif it.code in _UNKNOWN_JUMPS:
        raise _unknown(function, number)


def _check_mode(it: Instruction, function: Function, number: int) -> None:
    modes = {_LDX: (_MEM, _MEMSX), _ST: (_MEM,), _STX: (_MEM, _ATOMIC)}[it.kind]
    if it.code & 0xE0 not in modes:
        raise _unknown(function, number)


def _unknown(function: Function, number: int) -> ElfError:
    code = function.instructions[number].code
    return ElfError(f"{function.name} has an instruction that is not known here ({code:#04x}, number {number})")


def _arithmetic(it: Instruction, registers: list[Value], *, moved: bool) -> Value:
    operation, by_register = it.code & 0xF0, it.code & 0x08
    left, right = registers[it.dst], registers[it.src] if by_register else NUMBER
    if it.kind == _ALU or operation not in (_ADD, _SUB, _MOV):
        return NUMBER  # the verifier lets no pointer through these
    if operation == _MOV:
        return right
    if operation == _SUB:
        if left.may == right.may == PACKET:
            return NUMBER  # a length
        right = NUMBER if left.may != OTHER else right
    if not by_register and not moved and left.at is not None:
        return Value(left.may, left.at + (it.imm if operation == _ADD else -it.imm))
    # A pointer plus a number is that pointer still.
    if right.may == OTHER:
        return Value(left.may)
    return Value(right.may if left.may == OTHER else left.may | right.may)


def _load(analysis: _Analysis, function: Function, number: int, state: _State) -> Value:
    it = function.instructions[number]
    base, size = state.registers[it.src], _BYTES[it.code & 0x18]
    moved = number in function.filled
    may = 0
    if base.may & (OTHER | PACKET):
        may |= OTHER
    if base.may & CONTEXT:
        may |= _of_context(analysis.context, base.at, it, moved, function.filled.get(number))
    if base.may & CALLERS_STACK:
        may |= ANYTHING if analysis.lost_track else analysis.stored
    if base.may & STACK:
        if analysis.lost_track:
            return Value(ANYTHING)
        if base.at is not None and not moved:
            at = base.at + it.offset
            slot = state.slots.get(at - at % 8, NUMBER)
            if size == 8 and at % 8 == 0:
                return slot if base.may == STACK else Value(slot.may | may)
            may |= OTHER  # a part of a pointer is a number
        else:
            may |= analysis.stored | STACK
    return Value(may)


def _of_context(context: str, at: int | None, it: Instruction, moved: bool, core: CoreField | None) -> int:
    pointers, names = CONTEXTS[context]
    if moved and at == 0:
        # CO-RE finds the member by its name, whatever offset stands in the file.
        named = core is not None and core.struct_name.split("___")[0] == context
        return OTHER if named and core is not None and core.field_name not in names else PACKET
    if at is None or moved:
        return PACKET | OTHER
    first = at + it.offset
    return PACKET if pointers & set(range(first, first + _BYTES[it.code & 0x18])) else OTHER


def _store(analysis: _Analysis, function: Function, number: int, state: _State) -> Iterator[Finding]:
    it = function.instructions[number]
    base = state.registers[it.dst]
    value = state.registers[it.src] if it.kind == _STX and it.code & 0xE0 == _MEM else NUMBER
    for bit, what in ((PACKET, "the packet"), (CONTEXT, "its context")):
        if base.may & bit:
            yield Finding(function.name, function.place, number, what)
    if it.code & 0xE0 == _ATOMIC:
        if it.imm & 0x100:  # load-acquire and store-release: Linux 6.15
            raise _unknown(function, number)
        state.registers[0] = Value(state.registers[0].may | OTHER)  # compare-and-exchange answers there
        if it.imm & 1:
            state.registers[it.src] = NUMBER
    if not base.may & (STACK | CALLERS_STACK):
        return
    known = base.at is not None and number not in function.filled and base.may == STACK
    analysis.remember(value, lost=not known)
    if known:
        assert base.at is not None
        at = base.at + it.offset
        whole = at % 8 == 0 and _BYTES[it.code & 0x18] == 8
        slot = at - at % 8
        # What is written over in part is joined, which claims more than there is.
        state.slots[slot] = value if whole else value.join(state.slots.get(slot, NUMBER))


def _call(analysis: _Analysis, function: Function, number: int, state: _State) -> None:
    registers = state.registers
    if number in function.calls:
        place = function.calls[number]
        analysis.enter(place, [_seen_from_outside(registers[each]) for each in _ARGUMENTS])
        registers[0] = analysis.returns.get(place, NUMBER)
    else:
        registers[0] = NUMBER  # no helper hands out a pointer into a packet
    for each in _ARGUMENTS:
        registers[each] = NUMBER


def _seen_from_outside(value: Value) -> Value:
    """In another function: there this frame is a caller's."""
    return Value(value.may & ~STACK | CALLERS_STACK) if value.may & STACK else value
