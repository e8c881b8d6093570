"""The shape of ``spec.outputs``: how a map is read, grouped and shown. Pure data; part of ``policy_shape``."""

from __future__ import annotations

from collections.abc import Mapping

from probefleet_core import errors, values
from probefleet_core.shape import ListOf, MapOf, Record, Text, Union, Whole, join

OUTPUT_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"
GROUP = r"node|namespace|workload|pod|container|key(\.[A-Za-z_][A-Za-z0-9_.\[\]]*)?"
SLOTS = r"value|key(\.[A-Za-z_][A-Za-z0-9_.]*)?"
READ_MAP = r"[A-Za-z_][A-Za-z0-9_]*|\.(bss|data|rodata)(\.[A-Za-z0-9_.]+)?"
FIELD = r"[A-Za-z_][A-Za-z0-9_.\[\]]*"
DECODERS = (
    *("integer", "pid", "uid", "cgroup", "ip", "big_endian", "syscall", "errno", "open_flags", "ktime"),
    *("device", "function", "text", "hex"),
)
KINDS = tuple(kind.value for kind in values.Kind)
UNIT = Text(
    max_length=16, min_length=1, pattern=r"[A-Za-zµ%][A-Za-z0-9µ/%]*", write="Write a unit such as ns, bytes or calls."
)


def _histogram_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    linear, step = value.get("scale") == "linear", value.get("step") is not None
    if linear and not step:
        problems.add(
            join(path, "step"), "missing", why="a linear scale needs the width of a slot", write="Write step: WIDTH."
        )
    if step and not linear:
        problems.add(
            join(path, "step"),
            "a step without scale linear",
            why="the slots of a log2 scale double in width",
            write="Leave step away, or write scale: linear.",
        )


def _output_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    histogram, events = value.get("histogram"), value.get("events") is not None
    source = value["from"]
    assert isinstance(source, Mapping)
    if isinstance(histogram, Mapping) and histogram.get("unit") and value.get("unit"):
        problems.add(
            join(path, "unit"), "two units", why="histogram.unit says it already", write="Keep histogram.unit."
        )
    if events and value.get("groupBy"):
        problems.add(
            join(path, "groupBy"),
            "events with groupBy",
            why="events are listed one by one",
            write="Leave groupBy away, or count in a map and use counter or topk.",
        )
    if events and source.get("value"):
        problems.add(
            join(path, "from.value"),
            "events with a value",
            why="an event's record is shown whole",
            write="Leave it away.",
        )
    if not events and value.get("gauge") is None and source.get("record"):
        problems.add(
            join(path, "from.record"),
            "a record without events",
            why="only a ring or perf buffer has records",
            write="Leave it away, or write events: {}.",
        )


OUTPUT = Record(
    "an output",
    {
        "name": Text(
            max_length=63,
            min_length=1,
            pattern=OUTPUT_NAME,
            write="Write letters, digits, _ and -, beginning with a letter.",
        ),
        "from": Record(
            "a source",
            {
                "map": Text(
                    max_length=128,
                    min_length=1,
                    pattern=READ_MAP,
                    write="Write the name as it stands in the C source, or .bss, .data or .rodata for its variables.",
                ),
                "value": Text(max_length=128, min_length=1, pattern=FIELD, write="Write a field of the map's value."),
                "record": Text(
                    max_length=128,
                    min_length=1,
                    pattern=r"(struct )?[A-Za-z_][A-Za-z0-9_]*",
                    write="Write the C struct of a record, such as struct event.",
                ),
            },
            required=("map",),
        ),
        "counter": Record("a counter", {}),
        "gauge": Record("a gauge", {"merge": Text(max_length=16, choices=tuple(values.Merge))}, required=("merge",)),
        "histogram": Record(
            "a histogram",
            {
                "scale": Text(max_length=16, choices=tuple(values.Scale)),
                "unit": UNIT,
                "step": Whole(1, (1 << 53) - 1),
                "slots": Text(
                    max_length=128,
                    min_length=1,
                    pattern=SLOTS,
                    write="Write value, or key.FIELD for a field of the key.",
                ),
            },
            rules=(_histogram_rule,),
        ),
        "topk": Record("a top list", {}),
        "stacks": Record("stacks", {}),
        "events": Record("events", {}),
        "groupBy": ListOf(
            Text(
                max_length=128,
                min_length=1,
                pattern=GROUP,
                write="Write node, namespace, workload, pod, container, key, or key.FIELD.",
            ),
            max_items=8,
        ),
        "limit": Whole(1, 50, write="Write how many rows the report shows, at most 50; totals count all rows."),
        "unit": UNIT,
        "decode": MapOf(
            Text(max_length=16, choices=DECODERS),
            max_items=32,
            key=Text(max_length=128, min_length=1, pattern=FIELD, write="Write a field's name."),
        ),
    },
    required=("name", "from"),
    unions=(Union(KINDS, "kind", "an output is read in one way"),),
    rules=(_output_rule,),
)
