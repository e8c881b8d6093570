"""Outputs of iterators: an iterator is a source by its function's name. Pure; called by ``program_parts``.

What it writes is lines (``events``), or structs of one type (``from.record``), which are events or the rows of a
``gauge``. A reading shows what is there, so nothing that only grows can be read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.btf_layout import Field
from probefleet_wire.btf_types import Kind as BtfKind

from probefleet_core import errors, interval_targets, outputs, values


def default_outputs(parsed: BpfObject) -> tuple[values.Output, ...]:
    """The lines of every iterator, for an object that has nothing else to show."""
    return tuple(
        values.Output(name, name, values.Kind.EVENTS, group_by=()) for name in interval_targets.iterators(parsed)
    )


def with_records(
    attached: Sequence[values.Attachment], wanted: Sequence[values.Output], problems: errors.Problems
) -> list[values.Attachment]:
    """The attachments, each iterator with the struct that outputs say it writes."""
    made = []
    for each in attached:
        if isinstance(each.target, interval_targets.Iterator):
            records = sorted({output.record for output in wanted if output.map == each.program})
            if len(records) > 1:
                problems.add(
                    "spec.outputs",
                    f"{' and '.join(name or 'lines' for name in records)} of {each.program}",
                    why="an iterator writes records of one kind",
                    write="Write the same from.record in all of its outputs.",
                )
            each = replace(each, target=replace(each.target, record=records[0] if records else ""))
        made.append(each)
    return made


def record_fields(parsed: BpfObject, record: str) -> tuple[Field, ...]:
    """The fields of a struct of the object; none where it has no such struct."""
    assert parsed.btf is not None
    named = parsed.btf.find(record, BtfKind.STRUCT, BtfKind.TYPEDEF) if record else None
    return parsed.btf.layout_of(named) if named else ()


def resolve(output: values.Output, parsed: BpfObject, path: str, problems: errors.Problems) -> values.Output:
    """An output that reads an iterator, checked and filled in."""
    fields = record_fields(parsed, output.record)
    if output.kind not in (values.Kind.EVENTS, values.Kind.GAUGE):
        problems.add(
            f"{path}.{output.kind}",
            f"{output.kind} of an iterator",
            why="a reading shows what is there, not what happened since the last one",
            write="Write gauge: {merge: sum}, or events: {}.",
        )
    if output.record and not fields:
        problems.add(
            f"{path}.from.record",
            f'"{output.record}"',
            why="the program has no struct of that name (or never uses it, and the compiler left it away)",
            write="Write the struct that the iterator gives to bpf_seq_write(), and keep its type in the object: "
            "`const struct NAME *unused __attribute__((unused));`.",
        )
    if output.kind is values.Kind.EVENTS:
        return replace(output, group_by=output.group_by or ())
    if not output.record:
        problems.add(
            f"{path}.from.record",
            "missing",
            why="a gauge needs rows of a known type, and lines have none",
            write="Write the struct that the iterator gives to bpf_seq_write(), or events: {}.",
        )
        return output
    numbers = [each.name for each in fields if each.kind in ("int", "enum", "bool") and not each.shape]
    if output.value and fields and output.value not in numbers:
        problems.add(
            f"{path}.from.value",
            f'"{output.value}"',
            why=f"{output.record} has no number of that name",
            write=errors.did_you_mean(output.value, numbers, what="number in the record"),
        )
    groups = output.group_by if output.group_by is not None else ()
    _check_groups(groups, fields, path, problems)
    return replace(output, group_by=groups)


def _check_groups(groups: Sequence[str], fields: Sequence[Field], path: str, problems: errors.Problems) -> None:
    names = [f"key.{each.name}" for each in fields]
    has_identity = any(outputs.CGROUP in each.typedefs for each in fields)
    for index, group in enumerate(groups):
        if group == "node" or group in names:
            continue
        if group in outputs.IDENTITIES:
            if not has_identity:
                problems.add(
                    f"{path}.groupBy[{index}]",
                    f'"{group}"',
                    why="the record does not say whose it is",
                    write=f"Give it a field of type {outputs.CGROUP}.",
                )
            continue
        problems.add(
            f"{path}.groupBy[{index}]",
            f'"{group}"',
            why="the record has no such field",
            write=errors.did_you_mean(group, names, what="field of the record"),
        )
