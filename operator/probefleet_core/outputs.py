"""What a policy's results are: its outputs checked against the program's maps, or made from them where it names none.

Pure; called by ``planner``. For CO-RE objects BTF says what a map holds, so a wrong map, field or kind is refused
before a node hears of it. BCC's maps are known only by the text of the program (``bcc_source``): what that does not
tell is left to the agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from probefleet_wire import bpftrace_script, map_layout, map_types
from probefleet_wire.bpf_object import BpfObject, MapDef
from probefleet_wire.btf import Btf
from probefleet_wire.btf_layout import Field
from probefleet_wire.btf_types import Kind as BtfKind
from probefleet_wire.map_types import MapType, Read

from probefleet_core import bcc_source, errors, map_facts, values

IDENTITIES = ("namespace", "workload", "pod", "container")
CGROUP = "cgroup_id_t"
#: The ring of what a program prints (probefleet_print.h).
PRINTS = "trace_printk"
STACK_IDS = frozenset({"stack_id_t", "kernel_stack_id_t", "user_stack_id_t"})
#: An array of counters is a histogram from so many on; below it could be anything.
MIN_SLOTS = 8
#: A report stays readable: of a program's maps and fields no more become outputs by themselves.
MAX_DEFAULT_OUTPUTS = 16


@dataclass(frozen=True, slots=True)
class Known:
    """A map whose key and value BTF describes."""

    definition: MapDef
    btf: Btf
    key: tuple[Field, ...]
    value: tuple[Field, ...]

    @property
    def name(self) -> str:
        """As the program calls it."""
        return self.definition.name

    @property
    def type(self) -> int:
        """The map's, or of a map of maps that of the inner ones."""
        inner = self.definition.inner
        return inner.type if inner and self.definition.type in map_types.OUTER else self.definition.type

    @property
    def carries_records(self) -> bool:
        """A stream, not numbers by key."""
        return map_facts.read_as(self.definition) is Read.RECORDS

    @property
    def identity(self) -> Field | None:
        """The field that says whose event it is."""
        return next((field for field in self.key if CGROUP in field.typedefs), None)

    def key_name(self, field: Field) -> str:
        """As groupBy writes it."""
        return f"key.{field.name}" if field.name else "key"

    @property
    def counters(self) -> tuple[Field, ...]:
        """Fields of the value that can be counted: integers, and arrays of integers."""
        return tuple(
            field
            for field in self.value
            if field.kind in ("int", "enum", "bool") and not field.in_union and len(field.shape) <= 1
        )


def known_maps(parsed: BpfObject) -> dict[str, Known]:
    """The maps that outputs can name: not our own, and of a type that is read. Variables are the last of them."""
    assert parsed.btf is not None
    found = {}
    for each in parsed.all_maps:
        how = map_facts.read_as(each)
        if map_facts.is_own(each.name) or how is Read.NOT:
            continue
        layout = map_layout.layout_of(parsed, each)
        if layout is None and (each.is_section or each.type in map_types.OUTER):
            continue
        key, value = (layout.key, layout.value) if layout else (map_layout.key_of(parsed.btf, each)[0], ())
        found[each.name] = Known(each, parsed.btf, key if how is Read.TABLE else (), value)
    return found


# Defaults.


def default_outputs(maps: dict[str, Known]) -> tuple[values.Output, ...]:
    """An output for every map that BTF describes, in the order of the source."""
    made: list[values.Output] = []
    for found in maps.values():
        if found.carries_records:
            if found.value and found.type in map_facts.STREAMS:
                made.append(values.Output(found.name, found.name, values.Kind.EVENTS, group_by=()))
            continue
        if not found.key:
            continue
        fields = found.counters
        for field in fields:
            name = found.name if len(fields) == 1 else f"{found.name}_{field.name}".replace(".", "_")
            if field.shape and field.count < MIN_SLOTS:
                continue
            made.append(_default(found, field, name))
    return tuple(made[:MAX_DEFAULT_OUTPUTS])


def _default(found: Known, field: Field, name: str) -> values.Output:
    kind = values.Kind.HISTOGRAM if field.shape else values.Kind.COUNTER
    if not field.shape:
        if any(STACK_IDS & set(each.typedefs) for each in found.key):
            kind = values.Kind.STACKS
        elif found.type not in map_types.ARRAYS:
            kind = values.Kind.TOPK
    return values.Output(
        name=name,
        map=found.name,
        kind=kind,
        value=field.name,
        histogram=values.Histogram(slots="value") if kind is values.Kind.HISTOGRAM else None,
        group_by=default_groups(found, kind),
    )


def default_groups(found: Known, kind: values.Kind, slots: str = "") -> tuple[str, ...]:
    """All of the key, with the pod in place of its cgroup; stacks are rows by themselves."""
    if found.type in map_types.ARRAYS and kind is values.Kind.HISTOGRAM:
        return ()
    groups = []
    # Of an LPM trie the whole key is one field, and stands first.
    for field in found.key[:1] if found.type == MapType.LPM_TRIE else found.key:
        if field is found.identity:
            groups.append("pod")
        elif kind is values.Kind.STACKS and STACK_IDS & set(field.typedefs):
            continue
        elif found.key_name(field) != slots:
            groups.append(found.key_name(field))
    return tuple(groups[:8])


def bcc_outputs(source: str) -> tuple[values.Output, ...]:
    """An output for every table that BCC's macros declare."""
    made = []
    for table in bcc_source.tables(source):
        if table.kind in ("PERF_OUTPUT", "RINGBUF_OUTPUT"):
            made.append(values.Output(table.name, table.name, values.Kind.EVENTS, group_by=()))
        elif table.kind == "HISTOGRAM":
            slots, groups = _bcc_slots(source, table)
            made.append(
                values.Output(
                    table.name,
                    table.name,
                    values.Kind.HISTOGRAM,
                    histogram=values.Histogram(values.Scale.LOG2_BCC, slots=slots),
                    group_by=groups,
                )
            )
        elif "HASH" in table.kind or "ARRAY" in table.kind or table.kind == bcc_source.LPM_TRIE:
            made += _bcc_counters(source, table)
    if bcc_source.prints(source):
        made.append(values.Output(PRINTS, PRINTS, values.Kind.EVENTS, group_by=()))
    return tuple(made[:MAX_DEFAULT_OUTPUTS])


def bpftrace_outputs(script: str) -> tuple[values.Output, ...]:
    """An output for every map that a script writes, and one for its lines."""
    made: list[values.Output] = []
    for each in bpftrace_script.maps(script):
        groups = ("key.key",) if each.keyed else ()
        name = each.table
        match each.kind:
            case bpftrace_script.Kind.HIST | bpftrace_script.Kind.LHIST:
                linear = each.kind is bpftrace_script.Kind.LHIST
                scale = values.Histogram(values.Scale.LINEAR, each.step) if linear else values.Histogram()
                histogram = replace(scale, slots="key.slot")
                made.append(
                    values.Output(name, name, values.Kind.HISTOGRAM, "value", "", histogram=histogram, group_by=groups)
                )
            case bpftrace_script.Kind.STATS:
                made += [
                    values.Output(f"{name}_{field}", name, values.Kind.TOPK, field, group_by=groups)
                    for field in ("count", "total")
                ]
            case bpftrace_script.Kind.COUNTER:
                made.append(values.Output(name, name, values.Kind.TOPK, "value", group_by=groups))
            case kind:
                merge = values.Merge(str(kind))
                made.append(values.Output(name, name, values.Kind.GAUGE, "value", merge=merge, group_by=groups))
    if bpftrace_script.prints(script):
        made.append(values.Output(bpftrace_script.LINES, bpftrace_script.LINES, values.Kind.EVENTS, group_by=()))
    return tuple(made[:MAX_DEFAULT_OUTPUTS])


def _bcc_counters(source: str, table: bcc_source.Table) -> list[values.Output]:
    """An output for the leaf that is a number, or for each number in it; none for one that holds something else."""
    groups = bcc_groups(source, table.name)
    if bcc_source.is_integer(table.leaf):
        return [values.Output(table.name, table.name, values.Kind.TOPK, group_by=groups)]
    return [
        values.Output(f"{table.name}_{name}", table.name, values.Kind.TOPK, value=name, group_by=groups)
        for name in bcc_source.numbers_of(source, table.leaf)
    ]


def bcc_groups(source: str, name: str) -> tuple[str, ...]:
    """The key of one of BCC's tables, field by field; nothing where the text does not tell."""
    table = next((each for each in bcc_source.tables(source) if each.name == name), None)
    if table is None or not table.key:
        return ()
    if table.kind == "HISTOGRAM":
        return _bcc_slots(source, table)[1]
    # Of a trie the whole key is the prefix.
    fields = bcc_source.fields_of(source, table.key) if table.kind != bcc_source.LPM_TRIE else None
    return ("key",) if fields is None else tuple(f"key.{field}" for field in fields)[:8]


def _bcc_slots(source: str, table: bcc_source.Table) -> tuple[str, tuple[str, ...]]:
    """BCC's convention: a histogram's slot is its key, or the key's field of that name (or its last)."""
    fields = bcc_source.fields_of(source, table.key)
    if not fields:
        return "key", ()
    slot = "slot" if "slot" in fields else fields[-1]
    return f"key.{slot}", tuple(f"key.{field}" for field in fields if field != slot)[:8]


# Checks of what a user wrote. Each answers the output as the agent needs it, or notes problems and answers None.


def resolve(
    output: values.Output, maps: dict[str, Known], parsed: BpfObject, path: str, problems: errors.Problems
) -> values.Output | None:
    """Check one output against the object's maps, and fill in what it leaves to BTF."""
    found = maps.get(output.map)
    if found is None:
        there = parsed.map(output.map)
        why = "the program has no map of that name"
        if there is not None:
            reason = map_facts.why_not_read(there) or "BTF does not describe what it holds"
            why = f"a map of type {map_facts.type_name(there.type)} is not read: {reason}"
        problems.add(
            f"{path}.from.map",
            f'"{output.map}"',
            why=why,
            write=errors.did_you_mean(output.map, list(maps), what="map"),
        )
        return None
    before = len(problems.found)
    if (output.kind is values.Kind.EVENTS) != found.carries_records:
        carries = "records" if found.carries_records else "numbers by key"
        problems.add(
            f"{path}.{output.kind}",
            f"{output.kind} of a map of type {map_facts.type_name(found.type)}",
            why=f"such a map carries {carries}",
            write="Write events: {}." if found.carries_records else "Write counter, histogram or topk.",
        )
        return None
    if output.kind is values.Kind.EVENTS:
        made = _events(output, found, path, problems)
    else:
        made = _numbers(output, found, path, problems)
    return made if len(problems.found) == before else None


def _events(output: values.Output, found: Known, path: str, problems: errors.Problems) -> values.Output:
    if output.record and not found.btf.find(output.record, BtfKind.STRUCT, BtfKind.TYPEDEF):
        problems.add(
            f"{path}.from.record",
            f'"{output.record}"',
            why="the program has no struct of that name (or never uses it, and the compiler left it away)",
            write="Write the struct of a record, or give the map __type(value, struct …).",
        )
    if not output.record and not found.value:
        problems.add(
            f"{path}.from.record",
            "missing",
            why=f"the map {found.name} does not say what a record is",
            write="Write from.record, or give the map __type(value, struct …).",
        )
    return replace(output, group_by=output.group_by or ())


def _numbers(output: values.Output, found: Known, path: str, problems: errors.Problems) -> values.Output:
    field = _value(output, found, path, problems)
    histogram = output.histogram
    if histogram and field:
        slots = histogram.slots or _default_slots(found, field)
        histogram = replace(histogram, slots=slots)
        if slots == "value" and not field.shape:
            problems.add(
                f"{path}.histogram.slots",
                "value is one number",
                why="slots in the value are an array of counters",
                write="Write key.FIELD where a field of the key is the slot.",
            )
        elif slots != "value":
            _key_field(slots, found, f"{path}.histogram.slots", problems)
    elif field and field.shape:
        problems.add(
            f"{path}.from.value",
            f'"{field.name or output.map}" is an array of {field.count}',
            why=f"a {output.kind} reads one number",
            write="Write histogram, or from.value with a field that is one number.",
        )
    if output.kind is values.Kind.STACKS and not any(STACK_IDS & set(each.typedefs) for each in found.key):
        problems.add(
            f"{path}.stacks",
            f"the key of {found.name} has no stack id",
            why="stacks are found by a field of type stack_id_t, kernel_stack_id_t or user_stack_id_t",
            write="Give the key's field one of these types, or write topk.",
        )
    slots = histogram.slots if histogram else ""
    groups = output.group_by
    if groups is None:
        groups = default_groups(found, output.kind, slots)
    else:
        _groups(groups, output, found, slots, path, problems)
    return replace(output, value=field.name if field else "", histogram=histogram, group_by=groups)


def _value(output: values.Output, found: Known, path: str, problems: errors.Problems) -> Field | None:
    counters = {field.name: field for field in found.counters}
    fitting = [each for each in counters.values() if output.histogram or not each.shape] or list(counters.values())
    if output.value:
        if output.value in counters:
            return counters[output.value]
        is_there = any(field.name == output.value for field in found.value)
        problems.add(
            f"{path}.from.value",
            f'"{output.value}"',
            why="it is no number" if is_there else f"the value of {found.name} has no field of that name",
            write=errors.did_you_mean(output.value, [name for name in counters if name], what="number in the value"),
        )
        return None
    if len(fitting) == 1:
        return fitting[0]
    problems.add(
        f"{path}.from.value",
        "missing",
        why=f"the value of {found.name} has {len(fitting)} numbers" if fitting else "the map's value holds no number",
        write=f"Write one of {', '.join(field.name for field in fitting)}."
        if fitting
        else "Let the program count in an integer.",
    )
    return None


def _default_slots(found: Known, field: Field) -> str:
    """Where a histogram's slots are, if its policy does not say: an array of counters, or a key that is the slot."""
    if field.shape:
        return "value"
    by_name = {each.name: each for each in found.key}
    if len(found.key) == 1:
        return found.key_name(found.key[0])
    return "key.slot" if "slot" in by_name else "value"


def _key_field(group: str, found: Known, path: str, problems: errors.Problems) -> None:
    names = [found.key_name(field) for field in found.key]
    if group in names:
        return
    problems.add(
        path,
        f'"{group}"',
        why=f"the key of {found.name} has no such field",
        write=errors.did_you_mean(group, names, what="field of the key"),
    )


def _groups(
    groups: Sequence[str], output: values.Output, found: Known, slots: str, path: str, problems: errors.Problems
) -> None:
    for index, group in enumerate(groups):
        here = f"{path}.groupBy[{index}]"
        decoded = {name.removeprefix("key.") for name, decoder in output.decode if decoder == "cgroup"}
        if group in IDENTITIES:
            if found.identity is None and not decoded & {field.name or "key" for field in found.key}:
                problems.add(
                    here,
                    f'"{group}"',
                    why=f"the key of {found.name} does not say whose event it is",
                    write=f"Give the key a field of type {CGROUP}, set by probefleet_current_cgroup().",
                )
        elif group != "node":
            _key_field(group, found, here, problems)
            if group == slots:
                problems.add(
                    here,
                    f'"{group}"',
                    why="that field is the histogram's slot",
                    write="Leave it away: each row has all slots.",
                )
