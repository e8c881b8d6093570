"""What a function does with its maps: which it looks up, by which keys, and what becomes of the values. Pure.

In: a function's instructions, and which of them load which map. Out: ``Uses``, of which ``hints`` makes advice. What
registers and the stack hold is followed by name, over all paths at once: two lookups have the same key where the same
values lie in it, whatever they are. Where paths meet with different values, nothing is known of a register but what it
may point to. So what is said of a lookup is so on every path, and a map that cannot be followed is in ``others``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from probefleet_wire import register_values
from probefleet_wire.bpf_code import (
    CALL,
    EXIT,
    FROM_FUNCTION,
    FROM_HELPER,
    JUMP,
    JUMP_LONG,
    LOAD_IMM64,
    Function,
    Instruction,
)
from probefleet_wire.register_values import FRAME, MOV, UNKNOWN, Key, Value, constant, frame, low, narrowed

LOOKUP, UPDATE, DELETE = 1, 2, 3
ANY = "*"  #: in a set of maps: any of them
MAX_INSTRUCTIONS = 20_000
#: How many arguments a helper takes; of others all five registers may be some. include/uapi/linux/bpf.h
_ARGUMENTS = {LOOKUP: 2, UPDATE: 4, DELETE: 2, 16: 2} | dict.fromkeys((5, 7, 8, 14, 15, 35, 80, 125, 158, 160), 0)
_CALL_BACK = frozenset({164, 180, 181, 209})  # for_each_map_elem, find_vma, loop, user_ringbuf_drain
#: A goto or call by a register, and what has no meaning.
_UNKNOWN_JUMPS = frozenset({0x0D, 0x8D, 0x86, 0x8E, 0x96})
_LD, _LDX, _ST, _STX, _ALU, _, _, _ALU64 = range(8)
_BYTES = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}
_MEM, _ATOMIC, _FETCH, _COMPARE = 0x60, 0xC0, 0x01, 0xF0


@dataclass(frozen=True, slots=True)
class Access:
    """A call that looks up, updates or deletes."""

    helper: int
    map: str
    instruction: int
    key: Key | None  #: None where what lies in it is not known
    before: int = -1  #: of a lookup: another one, earlier on every path, with the same key, and no change between


@dataclass(slots=True)
class Uses:
    """What a function does with its maps."""

    accesses: list[Access] = field(default_factory=list)
    added: set[str] = field(default_factory=set)  #: to whose values it adds, atomically
    added_plainly: set[str] = field(default_factory=set)  #: or by reading, adding and storing
    read: set[str] = field(default_factory=set)  #: whose values it reads, for anything else than that
    stored: set[str] = field(default_factory=set)  #: into whose values it stores
    others: set[str] = field(default_factory=set)  #: used in ways that are not followed
    loads: set[int] = field(default_factory=set)  #: instructions that load a map, as far as they can be reached


def of(function: Function, maps: Mapping[int, str], key_bytes: Mapping[str, int]) -> Uses:
    """What a function does; ``maps``: instruction → the map that it loads. All of it "others" where it is too long."""
    if len(function.instructions) > MAX_INSTRUCTIONS:
        return Uses(others={ANY})
    return _Follower(function, maps, key_bytes).follow()


@dataclass(slots=True)
class _State:
    """Before an instruction: registers, what lies on the stack, and what was looked up (by which instruction first)."""

    registers: list[Value]
    slots: dict[int, tuple[int, Value]]
    looked_up: dict[tuple[str, Key], int]

    def copy(self) -> _State:
        return _State(list(self.registers), dict(self.slots), dict(self.looked_up))

    def merge(self, other: _State) -> bool:
        """Take in another way here: what is not so on both is not known. Whether that changed anything."""
        registers = [a.join(b) for a, b in zip(self.registers, other.registers, strict=True)]
        slots = {at: each for at, each in self.slots.items() if other.slots.get(at) == each}
        found = {what: min(at, other.looked_up[what]) for what, at in self.looked_up.items() if what in other.looked_up}
        changed = (registers, slots, found) != (self.registers, self.slots, self.looked_up)
        self.registers, self.slots, self.looked_up = registers, slots, found
        return changed

    def forget(self, number: int) -> None:
        """An instruction of a loop comes again: what it left the last time is another value."""
        self.registers = [Value("unknown", may=v.may) if v.mentions(number) else v for v in self.registers]
        self.slots = {at: each for at, each in self.slots.items() if not each[1].mentions(number)}
        self.looked_up = {
            (name, key): at
            for (name, key), at in self.looked_up.items()
            if not any(value.mentions(number) for _, _, value in key)
        }

    def changed(self, maps: set[str]) -> None:
        """Entries of these maps may be others now."""
        self.looked_up = {what: at for what, at in self.looked_up.items() if what[0] not in maps and ANY not in maps}

    def write(self, offset: int, size: int, value: Value) -> None:
        """Bytes of the stack have another value."""
        self.slots = {at: each for at, each in self.slots.items() if at + each[0] <= offset or at >= offset + size}
        if value.kind != "unknown":
            self.slots[offset] = (size, narrowed(value, size))

    def spoil(self, pointer: Value) -> None:
        """Somebody writes so many bytes as he likes, from a pointer upwards."""
        if pointer.kind == "frame":
            self.slots = {at: each for at, each in self.slots.items() if at + each[0] <= pointer.number}
        elif FRAME in pointer.may:
            self.slots.clear()

    def key(self, pointer: Value, size: int) -> Key | None:
        """The values that lie where a key is pointed to."""
        if pointer.kind != "frame" or not size:
            return None
        parts: list[tuple[int, int, Value]] = []
        at = 0
        while at < size:
            width, value = self.slots.get(pointer.number + at, (size + 1, UNKNOWN))
            if at + width > size:
                return None
            parts.append((at, width, value))
            at += width
        return tuple(parts)


class _Follower:
    """Goes through a function until nothing new is learnt, then once more to say what it does."""

    def __init__(self, function: Function, maps: Mapping[int, str], key_bytes: Mapping[str, int]) -> None:
        self.function, self.maps, self.key_bytes = function, maps, key_bytes
        self.uses = Uses()
        self.on_stack: frozenset[str] = frozenset()  # what any pointer on the stack may point to
        count = len(function.instructions)
        self.loops = any(to <= at for at in range(count) for to in self._targets(at))

    def follow(self) -> Uses:
        registers = [Value("made", -1 - number) for number in range(16)]  # an instruction has room for 16
        registers[10] = frame(0)
        states = {0: _State(registers, {}, {})} if self.function.instructions else {}
        waiting = set(states)
        while waiting:
            at = min(waiting)
            waiting.remove(at)
            before = self.on_stack
            after = self._step(at, states[at].copy())
            if self.on_stack != before:
                waiting |= set(states)  # what was loaded from the stack may be more than was thought
            for to in self._targets(at):
                if to not in states:
                    states[to] = after.copy()
                elif not states[to].merge(after):
                    continue
                waiting.add(to)
        self.uses = Uses()  # what was seen on the way was not settled yet
        for at in sorted(states):
            self._step(at, states[at].copy())
        return self.uses

    def _targets(self, at: int) -> Iterator[int]:
        if self.function.instructions[at].code not in _UNKNOWN_JUMPS:
            yield from (to for to in self.function.targets(at) if 0 <= to < len(self.function.instructions))

    def _step(self, at: int, state: _State) -> _State:
        it = self.function.instructions[at]
        if self.loops:
            state.forget(at)
        if it.code in _UNKNOWN_JUMPS:
            self.uses.others.add(ANY)
        elif it.code == LOAD_IMM64:
            state.registers[it.dst] = self._immediate(at, it)
        elif it.kind == _LD:
            state.registers[:6] = [Value("made", at), *[UNKNOWN] * 5]
        elif it.kind == _LDX:
            state.registers[it.dst] = self._load(at, it, state)
        elif it.kind in (_ST, _STX):
            self._store(at, it, state)
        elif it.kind in (_ALU, _ALU64):
            state.registers[it.dst] = self._compute(at, it, state)
        elif it.code == CALL:
            self._call(at, it, state)
        elif it.code == EXIT:
            self._escapes(state.registers[0])
        elif it.code not in (JUMP, JUMP_LONG):  # it compares
            compared = [state.registers[it.dst], *([state.registers[it.src]] if it.code & 0x08 else [])]
            self.uses.read |= {name for each in compared for name in each.pointed("number")}
        return state

    def _immediate(self, at: int, it: Instruction) -> Value:
        name = self.maps.get(at)
        if name is not None:
            self.uses.loads.add(at)
            return Value("map", name=name, may=frozenset({f"map {name}"}))
        if it.src or at in self.function.filled or at + 1 >= len(self.function.instructions):
            return Value("made", at)
        return constant((it.imm & 0xFFFFFFFF) | self.function.instructions[at + 1].imm << 32)

    def _load(self, at: int, it: Instruction, state: _State) -> Value:
        pointer, size, plain = state.registers[it.src], _BYTES[it.code & 0x18], it.code & 0xE0 == _MEM
        self.uses.read |= pointer.pointed("number")
        if pointer.kind == "entry" and plain:  # to add to it, perhaps
            at_entry = pointer._replace(number=pointer.number + it.offset)
            may = frozenset({f"number {pointer.name}"})
            return Value("made", at, name=pointer.name, bits=8 * size, left=at_entry, may=may)
        self.uses.read |= pointer.pointed("entry")
        if pointer.kind == "frame" and plain:
            width, value = state.slots.get(pointer.number + it.offset, (0, UNKNOWN))
            if width == size:
                return low(value, size)
        if FRAME in pointer.may:
            return Value("unknown", may=self.on_stack)
        return Value("made", at, bits=8 * size if plain else 64)

    def _store(self, at: int, it: Instruction, state: _State) -> None:
        pointer, size = state.registers[it.dst], _BYTES[it.code & 0x18]
        value = constant(it.imm) if it.kind == _ST else state.registers[it.src]
        entries = pointer.pointed("entry")
        if it.kind == _STX and it.code & 0xE0 == _ATOMIC:
            if it.imm == register_values.ADD:
                self.uses.added |= entries
            else:
                self.uses.read |= entries
            if it.imm & _FETCH:
                state.registers[0 if it.imm & 0xF0 == _COMPARE else it.src] = Value("unknown", may=self.on_stack)
            value = Value("unknown", may=value.may)
        elif register_values.is_sum(value, pointer._replace(number=pointer.number + it.offset), size):
            self.uses.added_plainly |= entries
            return
        else:
            self.uses.stored |= entries
        self.uses.read |= pointer.pointed("number") | value.pointed("number")
        if pointer.kind == "frame":
            self.on_stack |= value.may
            state.write(pointer.number + it.offset, size, value)
            return
        self._escapes(value)
        if FRAME in pointer.may:
            self.on_stack |= value.may
            state.slots.clear()

    def _compute(self, at: int, it: Instruction, state: _State) -> Value:
        value, other = state.registers[it.dst], state.registers[it.src] if it.code & 0x08 else constant(it.imm)
        if at in self.function.filled:
            return Value("made", at)
        if it.code & 0xF0 == MOV and not it.offset:
            return other if it.kind == _ALU64 else low(other, 4)
        return register_values.computed(it, value, other)

    def _call(self, at: int, it: Instruction, state: _State) -> None:
        arguments = state.registers[1:6]
        result = Value("made", at)
        if it.src == FROM_HELPER and it.imm in (LOOKUP, UPDATE, DELETE):
            result = self._access(at, it.imm, state)
        else:
            if it.src == FROM_HELPER:
                arguments = arguments[: _ARGUMENTS.get(it.imm, 5)]
            for each in arguments:
                self._escapes(each)
                state.spoil(each)
            if it.src != FROM_HELPER or it.imm in _CALL_BACK:
                state.changed({ANY})
            state.changed({name for each in arguments for name in each.pointed("map")})
            if it.src == FROM_FUNCTION:  # it may give a pointer to a value of any map back
                result = Value("unknown", may=frozenset({f"entry {ANY}"}))
        state.registers[:6] = [result, *[UNKNOWN] * 5]

    def _access(self, at: int, helper: int, state: _State) -> Value:
        target, pointers = state.registers[1], state.registers[2 : min(1 + _ARGUMENTS[helper], 4)]
        for each in pointers:
            self.uses.read |= each.pointed("entry")
        if target.kind != "map":  # one of several, or a map in a map
            self._escapes(target)
            if helper != LOOKUP:
                state.changed({ANY})
            may = frozenset(f"entry {name}" for name in target.pointed("map"))
            return Value("unknown", may=may) if may else Value("made", at)
        name, before = target.name, -1
        key = state.key(pointers[0], self.key_bytes.get(name, 0))
        if helper == LOOKUP and key is not None:
            before = state.looked_up.setdefault((name, key), at)
        elif helper != LOOKUP:
            state.changed({name})
        self.uses.accesses.append(Access(helper, name, at, key, before if before != at else -1))
        if helper != LOOKUP:
            return Value("made", at)
        return Value("entry", name=name, right=Value("made", at), may=frozenset({f"entry {name}"}))

    def _escapes(self, value: Value) -> None:
        """It goes where nobody follows it."""
        self.uses.others |= value.pointed("entry") | value.pointed("map")
        self.uses.read |= value.pointed("number")
