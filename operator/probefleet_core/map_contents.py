"""What a policy writes into its program's maps: ``maps[].values`` and ``tailCalls``, checked and laid out. Pure.

Called by ``planner``. Both change while the program runs, so they stand outside the instance's digest; instead the
instance belongs to the one policy that writes them (``Instance.owner``). Only ``.rodata`` is fixed once a program is
loaded: what is written there are the instance's parameters. So is what fills a queue, a stack or a bloom filter: nobody
can take back what was pushed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from probefleet_wire import encode, map_layout, map_types
from probefleet_wire.bpf_object import BpfObject, MapDef, ProgramDef, Variable
from probefleet_wire.btf_layout import Field
from probefleet_wire.map_types import Flag, MapType
from probefleet_wire.v1 import plan_pb2

from probefleet_core import bcc_source, errors, map_facts, values

#: Types whose entries can be set one by one, and taken away again.
WRITABLE = frozenset({*map_types.HASHES, *map_types.ARRAYS, MapType.LPM_TRIE})
#: Types that values without keys are pushed into.
PUSHED = frozenset({*map_types.POPPED, MapType.BLOOM_FILTER})
#: First word of a SEC() name → the kernel's type of program, where they differ. A jump stays within one type.
_TYPES = {
    "tp": "tracepoint",
    "raw_tp": "raw_tracepoint",
    "tp_btf": "tracing",
    "fentry": "tracing",
    "fexit": "tracing",
    "iter": "tracing",
    "kretprobe": "kprobe",
    "ksyscall": "kprobe",
    "kretsyscall": "kprobe",
    "uprobe": "kprobe",
    "uretprobe": "kprobe",
    "usdt": "kprobe",
    "classifier": "tc",
    "tcx": "tc",
}
KERNEL_JUMPS = 33
RODATA = ".rodata"
#: How variables begin that the agent sets by itself.
OF_OURS = "probefleet_"


def program_type(section: str) -> str:
    """The kernel's type of program that a SEC() name stands for."""
    word = re.split(r"[./]", section.removeprefix("?"))[0]
    return _TYPES.get(word, word)


def tail_programs(policy: values.ProbePolicy, parsed: BpfObject) -> tuple[str, ...]:
    """Programs that others jump to: nothing attaches them, unless ``attach`` says so.

    With ``tailCalls`` also those whose SEC() names no place: they are kept ready, so that an edit can jump to them.
    """
    named = {name for each in policy.tail_calls for _, name in each.entries}
    named |= {name for each in parsed.maps if each.type == MapType.PROG_ARRAY for _, name in each.slots}
    if policy.tail_calls:
        named |= {each.name for each in parsed.programs if "/" not in each.section and each.section[:1] != "?"}
    attached = {each.program for each in policy.attach}
    return tuple(each.name for each in parsed.programs if each.name in named - attached)


def contents(
    policy: values.ProbePolicy, parsed: BpfObject, sizes: Mapping[str, int], problems: errors.Problems
) -> list[plan_pb2.MapContent]:
    """The entries of every map with ``values``, as bytes."""
    made = []
    for index, use in enumerate(policy.maps):
        found = parsed.map(use.name)
        if use.entries is None or found is None or found.name.startswith(RODATA) or found.type in PUSHED:
            continue
        path = f"spec.maps[{index}].values"
        if found.is_section:
            made.append(_variables(use, found, parsed, path, problems))
            continue
        content = _content(use, found, parsed, sizes.get(use.name) or found.max_entries, path, problems)
        if content is not None:
            made.append(content)
    return made


def filled(
    policy: values.ProbePolicy, parsed: BpfObject, sizes: Mapping[str, int], problems: errors.Problems
) -> list[plan_pb2.MapContent]:
    """What queues, stacks and bloom filters hold when they are made, in the order in which it is pushed."""
    made = []
    for index, use in enumerate(policy.maps):
        found, path = parsed.map(use.name), f"spec.maps[{index}].values"
        if not use.entries or found is None or found.type not in PUSHED:
            continue
        if not _takes_values(use, found, len(use.entries), sizes.get(use.name) or found.max_entries, path, problems):
            continue
        layout = map_layout.layout_of(parsed, found)
        if layout is None:
            _untyped(use, path, "__type(value, …)", problems)
            continue
        data = []
        for number, entry in enumerate(use.entries):
            here = f"{path}[{number}]"
            if entry.key is not None:
                why = f"{use.name} is a {map_facts.type_name(found.type)}, whose values have none"
                problems.add(f"{here}.key", "a key", why=why, write="Leave key away.")
            value = _encoded(layout.value, layout.value_bytes, entry.value, f"{here}.value", "value", problems)
            data.append(value or b"")
        made.append(plan_pb2.MapContent(map=use.name, values=b"".join(data), count=len(data)))
    return made


def constants(policy: values.ProbePolicy, parsed: BpfObject, problems: errors.Problems) -> dict[str, bytes]:
    """The ``const volatile`` variables that the policy sets, whole."""
    made: dict[str, bytes] = {}
    for index, use in enumerate(policy.maps):
        found = parsed.map(use.name)
        if use.entries is None or found is None or not found.name.startswith(RODATA):
            continue
        path = f"spec.maps[{index}].values"
        if found.name != RODATA:
            problems.add(
                path, f"values in {found.name}", why="they go to .rodata", write="Leave its section name away."
            )
            continue
        for variable, data in _encoded_variables(use, found, parsed, path, problems):
            made[variable.name] = data.ljust(variable.size_bytes, b"\0")
    return made


def _variables(
    use: values.MapUse, found: MapDef, parsed: BpfObject, path: str, problems: errors.Problems
) -> plan_pb2.MapContent:
    """Variables of ``.data`` and ``.bss``: each is written by itself, for programs change those beside it."""
    content = plan_pb2.MapContent(map=use.name)
    for variable, data in _encoded_variables(use, found, parsed, path, problems):
        initial = variable.initial.ljust(variable.size_bytes, b"\0")[: len(data)]
        content.variables.add(offset=variable.offset_bytes, value=data, initial=initial)
    return content


def _encoded_variables(
    use: values.MapUse, found: MapDef, parsed: BpfObject, path: str, problems: errors.Problems
) -> list[tuple[Variable, bytes]]:
    """What the entries say, variable by variable; each one's key is its name."""
    assert use.entries is not None
    there = {
        each.name: each for each in parsed.variables if each.section == found.name and not each.name.startswith(OF_OURS)
    }
    layout = map_layout.layout_of(parsed, found)
    made: dict[str, tuple[Variable, bytes]] = {}
    for index, entry in enumerate(use.entries):
        here = f"{path}[{index}]"
        variable = there.get(entry.key) if isinstance(entry.key, str) else None
        place = map_layout.variable(layout, variable.name) if layout and variable else None
        if variable is None or place is None:
            write = errors.did_you_mean(str(entry.key), [name for name in there if there[name].used], what="variable")
            problems.add(f"{here}.key", f'"{entry.key}"', why=f"{use.name} has no variable of that name", write=write)
            continue
        if not variable.used:
            problems.add(
                f"{here}.key",
                f'"{entry.key}"',
                why="no instruction reads it: the compiler wrote its value into the program",
                write="Make it volatile in the C source.",
            )
        if variable.name in made:
            problems.add(f"{here}.key", "there twice", why="another item has the same key", write="Keep one of them.")
        _, own = place
        data = _encoded(own.value, own.value_bytes, entry.value, f"{here}.value", "variable", problems)
        if data is not None:
            made[variable.name] = variable, data
    return list(made.values())


def _content(
    use: values.MapUse, found: MapDef, parsed: BpfObject, room: int, path: str, problems: errors.Problems
) -> plan_pb2.MapContent | None:
    assert use.entries is not None
    kind = map_facts.type_name(found.type)
    layout = map_layout.layout_of(parsed, found)
    if found.type not in WRITABLE:
        problems.add(
            path,
            f"{use.name} is of type {kind}",
            why="entries are written to hashes, arrays, LPM tries, queues, stacks, bloom filters and global variables",
            write="Leave values away.",
        )
        return None
    if layout is None or not layout.key:
        _untyped(use, path, "__type(key, …) and __type(value, …)", problems)
        return None
    if not _takes_values(use, found, len(use.entries), room, path, problems):
        return None
    keys, data = [], []
    seen: dict[bytes, int] = {}
    for index, entry in enumerate(use.entries):
        here = f"{path}[{index}]"
        if entry.key is None:
            why = f"{use.name} is a {kind}, whose values have one"
            problems.add(f"{here}.key", "missing", why=why, write="Write key.")
            continue
        key = _encoded(layout.key, layout.key_bytes, entry.key, f"{here}.key", "key", problems)
        value = _encoded(layout.value, layout.value_bytes, entry.value, f"{here}.value", "value", problems)
        if key is None or value is None:
            continue
        if found.type in map_types.ARRAYS and int.from_bytes(key, "little") >= room:
            problems.add(
                f"{here}.key",
                str(int.from_bytes(key, "little")),
                why=f"{use.name} is an array of {room}",
                write="Write an index below that, or maxEntries with more.",
            )
        if key in seen:
            problems.add(
                f"{here}.key",
                "there twice",
                why=f"item {seen[key]} of the list has the same key",
                write="Keep one of them.",
            )
        seen.setdefault(key, index)
        keys.append(key)
        data.append(value)
    return plan_pb2.MapContent(map=use.name, keys=b"".join(keys), values=b"".join(data), count=len(keys))


def _takes_values(
    use: values.MapUse, found: MapDef, count: int, room: int, path: str, problems: errors.Problems
) -> bool:
    """Whether its flags and its size allow that the policy fills it."""
    if found.flags & (Flag.RDONLY | Flag.WRONLY_PROG):
        why = "BPF_F_RDONLY keeps user space from writing" if found.flags & Flag.RDONLY else "programs may not read it"
        problems.add(path, f"{use.name} takes no values", why=why, write="Leave values or the flag away.")
        return False
    if count > room:
        why = f"{use.name} has room for {room}"
        problems.add(path, f"{count} entries", why=why, write="Write fewer, or maxEntries with more.")
        return False
    return True


def _untyped(use: values.MapUse, path: str, how: str, problems: errors.Problems) -> None:
    what, write = f"{use.name} does not say what it holds", f"Declare the map with {how}."
    problems.add(path, what, why="values are typed by BTF", write=write)


def _encoded(
    fields: tuple[Field, ...], size: int, given: object, path: str, what: str, problems: errors.Problems
) -> bytes | None:
    try:
        return encode.encode(fields, size, given, whole=what == "key", what=what)
    except encode.EncodeError as error:
        where = f"{path}.{error.where}" if error.where and not error.where.startswith("[") else f"{path}{error.where}"
        problems.add(where, "does not fit", why=error.why, write="Write what the map's types take.")
        return None


# Tail calls.


def tail_calls(
    policy: values.ProbePolicy, parsed: BpfObject, sizes: Mapping[str, int], problems: errors.Problems
) -> list[plan_pb2.TailCalls]:
    """The slots of every program array that ``tailCalls`` names."""
    made = []
    arrays = [each.name for each in parsed.maps if each.type == MapType.PROG_ARRAY]
    programs = {each.name: each for each in parsed.programs}
    for index, use in enumerate(policy.tail_calls):
        path = f"spec.tailCalls[{index}]"
        found = parsed.map(use.map)
        if found is None or found.type != MapType.PROG_ARRAY:
            why = "the program has no map of that name"
            if found is not None:
                why = f"it is of type {map_facts.type_name(found.type)}, and jumps go through a BPF_MAP_TYPE_PROG_ARRAY"
            write = errors.did_you_mean(use.map, arrays, what="program array")
            problems.add(f"{path}.map", f'"{use.map}"', why=why, write=write)
            continue
        room = sizes.get(use.map) or found.max_entries
        callers = parsed.callers(use.map)
        for slot, name in use.entries:
            here = f"{path}.entries.{slot}"
            if slot >= room:
                write = "Write a slot below that, or maxEntries with more."
                problems.add(here, str(slot), why=f"{use.map} has {room} slots", write=write)
            program = programs.get(name)
            if program is None:
                write = errors.did_you_mean(name, list(programs), what="program")
                problems.add(here, f'"{name}"', why="the object has no program of that name", write=write)
            else:
                _same_type(program, callers, use.map, here, problems)
        made.append(plan_pb2.TailCalls(map=use.map, entries=dict(use.entries)))
    return made


def bcc_contents(policy: values.ProbePolicy) -> list[plan_pb2.MapContent]:
    """Entries as they are written: the node, which compiles the program, lays them out."""
    return [_given(use) for use in policy.maps if use.entries is not None and not _is_pushed(use)]


def bcc_filled(policy: values.ProbePolicy) -> list[plan_pb2.MapContent]:
    """The same of what is pushed: values without a key."""
    return [_given(use) for use in policy.maps if _is_pushed(use)]


def _is_pushed(use: values.MapUse) -> bool:
    return bool(use.entries) and all(each.key is None for each in use.entries or ())


def _given(use: values.MapUse) -> plan_pb2.MapContent:
    listed = [[each.key, each.value] for each in use.entries or ()]
    return plan_pb2.MapContent(map=use.name, given=json.dumps(listed, separators=(",", ":")))


def bcc_tail_calls(
    policy: values.ProbePolicy, source: str, sizes: Mapping[str, int], problems: errors.Problems
) -> list[plan_pb2.TailCalls]:
    """The same for BCC's C, as far as its text tells; the node, which compiles it, has the last word."""
    arrays = bcc_source.program_arrays(source)
    for index, use in enumerate(policy.tail_calls):
        path = f"spec.tailCalls[{index}]"
        if use.map not in arrays:
            write = errors.did_you_mean(use.map, list(arrays), what="program array")
            problems.add(f"{path}.map", f'"{use.map}"', why="the text has no BPF_PROG_ARRAY of that name", write=write)
            continue
        room = sizes.get(use.map) or arrays[use.map]
        for slot, name in use.entries:
            here = f"{path}.entries.{slot}"
            if room and slot >= room:
                write = "Write a slot below that, or maxEntries with more."
                problems.add(here, str(slot), why=f"{use.map} has {room} slots", write=write)
            if not bcc_source.names(source, name):
                write = "Write the function's name as it stands in the source."
                problems.add(here, f'"{name}"', why="the source has no function of that name", write=write)
    return [plan_pb2.TailCalls(map=use.map, entries=dict(use.entries)) for use in policy.tail_calls]


def _same_type(
    program: ProgramDef, callers: tuple[ProgramDef, ...], array: str, path: str, problems: errors.Problems
) -> None:
    mine = program_type(program.section)
    others = {program_type(each.section): each for each in callers if each.name != program.name}
    if not others or mine in others:
        return
    kind, caller = next(iter(others.items()))
    problems.add(
        path,
        f'"{program.name}" is a {mine} program (SEC("{program.section}")), and {caller.name}, which jumps through '
        f'{array}, a {kind} program (SEC("{caller.section}"))',
        why="the kernel jumps only between programs of one type",
        write=f'Write SEC("{kind}") for {program.name}.',
    )
