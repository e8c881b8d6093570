"""The shapes of ProbePolicy and ProbeMap: every field, its type and its bounds, and the rules across fields. Pure data.

``policy`` checks manifests against these; ``attach_shape`` and ``output_shape`` hold the two largest parts. They say
the same as the CRDs (``charts/probefleet``), field by field: ``tests/unit/test_crds.py`` compares them. A new field is
added here, in the CRD and in ``policy`` in one change.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping

from probefleet_core import c_declaration, errors, quantities, values
from probefleet_core.attach_shape import ATTACHMENT, C_IDENTIFIER, C_NAME
from probefleet_core.output_shape import OUTPUT, READ_MAP
from probefleet_core.shape import Anything, Flag, ListOf, MapOf, Record, Text, Union, Whole, join

MAX_SOURCE_CHARACTERS = 96 << 10
MAX_INLINE_CHARACTERS = 128 << 10  # 96 KiB of object in base64
MAX_NAME = 253
DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DNS_SUBDOMAIN = r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?"
PIN = r"/sys/fs/bpf/[A-Za-z0-9_./@%+:=-]+"
PROGRAMS = ("catalog", "bcc", "c", "object", "bpftrace")


def _within(parse: Callable[[str], int], low: str, high: str) -> Callable[[str], str | None]:
    """A check that a quantity lies within two others, written in the same way."""

    def reject(text: str) -> str | None:
        try:
            value = parse(text)
        except ValueError as error:
            return str(error)
        return None if parse(low) <= value <= parse(high) else f"it has to be from {low} to {high}"

    return reject


def _base64(text: str) -> str | None:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return "it is not base64"
    return None


def _declaration(text: str) -> str | None:
    try:
        c_declaration.parse(text)
    except ValueError as error:
        return str(error)
    return None


# The parts.

SOURCE = Text(
    max_length=MAX_SOURCE_CHARACTERS,
    min_length=1,
    write="Compile it and give it as program.object, or leave generated headers away: at most 96 KiB of source fit.",
)
LABEL_VALUE = Text(
    max_length=63, pattern=r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", write="Write a label's value."
)
LABEL_KEY = Text(
    max_length=317,
    min_length=1,
    pattern=r"([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]",
    write="Write a label's key, such as app or app.kubernetes.io/name.",
)


def _requirement_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    wants_values = value["operator"] in ("In", "NotIn")
    if wants_values and not value.get("values"):
        problems.add(
            join(path, "values"),
            "missing",
            why=f"{value['operator']} compares with values",
            write="Write values: [...].",
        )
    if not wants_values and value.get("values"):
        problems.add(
            join(path, "values"),
            f"values with {value['operator']}",
            why=f"{value['operator']} asks only whether the label is there",
            write="Leave values away, or use In or NotIn.",
        )


REQUIREMENT = Record(
    "a label expression",
    {
        "key": LABEL_KEY,
        "operator": Text(max_length=16, choices=tuple(values.Operator)),
        "values": ListOf(LABEL_VALUE, max_items=64),
    },
    required=("key", "operator"),
    rules=(_requirement_rule,),
)
SELECTOR = Record(
    "a label selector",
    {
        "matchLabels": MapOf(LABEL_VALUE, max_items=32, key=LABEL_KEY),
        "matchExpressions": ListOf(REQUIREMENT, max_items=16),
    },
)


def _selecting(what: str) -> Record:
    return Record(what, {"selector": SELECTOR}, required=("selector",))


CATALOG = Record(
    "a catalog program",
    {
        "name": Text(
            max_length=63,
            min_length=1,
            pattern=DNS_LABEL,
            write="Write the name of a catalog probe; `probefleet catalog` lists them.",
        ),
        "parameters": MapOf(
            Text(max_length=256, or_whole=True),
            max_items=32,
            key=Text(max_length=63, min_length=1, pattern=C_NAME, write="Write a parameter's name."),
        ),
    },
    required=("name",),
)
OBJECT = Record(
    "a compiled object",
    {
        "configMapKeyRef": Record(
            "a reference to a ConfigMap",
            {
                "name": Text(
                    max_length=MAX_NAME, min_length=1, pattern=DNS_SUBDOMAIN, write="Write a ConfigMap's name."
                ),
                "key": Text(max_length=MAX_NAME, min_length=1, pattern=r"[-._a-zA-Z0-9]+", write="Write a key of it."),
            },
            required=("name", "key"),
        ),
        "inline": Text(
            max_length=MAX_INLINE_CHARACTERS,
            min_length=1,
            pattern=r"[A-Za-z0-9+/]*={0,2}",
            write="Write the output of `base64 -w0 FILE`; an object of more than 96 KiB goes into a ConfigMap.",
            reject=_base64,
        ),
        "sha256": Text(
            max_length=64, min_length=64, pattern=r"[0-9a-f]{64}", write="Write the output of `sha256sum FILE`."
        ),
    },
    required=("sha256",),
    unions=(Union(("configMapKeyRef", "inline"), "place of the object", "the object's bytes come from one place"),),
)
PROGRAM = Record(
    "a program",
    {
        "catalog": CATALOG,
        "bcc": Record("a BCC program", {"source": SOURCE}, required=("source",)),
        "c": Record("a C program", {"source": SOURCE}, required=("source",)),
        "object": OBJECT,
        "bpftrace": Record("a bpftrace program", {"script": SOURCE}, required=("script",)),
    },
    unions=(Union(PROGRAMS, "program", "a policy runs one program"),),
)


def _map_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    said = [name for name in ("share", "pinned", "maxEntries", "values") if value.get(name) is not None]
    if not said:
        problems.add(
            path,
            "nothing is said of the map",
            why="an entry changes something",
            write="Write share, pinned, maxEntries or values.",
        )
    if str(value["name"]).startswith("."):
        for name in set(said) - {"values"}:
            why = "global variables are the program's own, and as many as it has"
            problems.add(join(path, name), f"{name} of {value['name']}", why=why, write="Leave it away.")
        return
    if not {"share", "pinned"} & set(said):
        return
    for name in said[1:]:
        why, write = {
            "pinned": ("one map takes the place of another", "Keep one of them."),
            "maxEntries": (
                (
                    "a shared map has the size that its ProbeMap says",
                    "Leave maxEntries away, and set it in the ProbeMap.",
                )
                if said[0] == "share"
                else ("the map is there already, and has its size", "Leave maxEntries away.")
            ),
            "values": ("what others use as well is not for one policy to replace", "Leave values away."),
        }[name]
        problems.add(join(path, name), f"{said[0]} and {name} at once", why=why, write=write)


def _pin(text: str) -> str | None:
    return "a path leads down, not up" if "/../" in f"{text}/" else None


MAX_ENTRIES = Whole(1, 1 << 24)
PROBE_MAP_NAME = Text(
    max_length=MAX_NAME, min_length=1, pattern=DNS_SUBDOMAIN, write="Write the name of a ProbeMap in this namespace."
)
MAP = Record(
    "a map",
    {
        "name": Text(
            max_length=128,
            min_length=1,
            pattern=READ_MAP,
            write="Write the name as it stands in the C source, or .data, .bss or .rodata for its variables.",
        ),
        "share": Record("a share", {"probeMap": PROBE_MAP_NAME}, required=("probeMap",)),
        "pinned": Text(
            max_length=512,
            min_length=1,
            pattern=PIN,
            write="Write where it is pinned, such as /sys/fs/bpf/tc/globals/NAME.",
            reject=_pin,
        ),
        "maxEntries": MAX_ENTRIES,
        "values": ListOf(
            Record("an entry", {"key": Anything(max_parts=256), "value": Anything(4096)}, required=("value",)),
            max_items=4096,
        ),
    },
    required=("name",),
    rules=(_map_rule,),
)
TAIL_CALLS = Record(
    "a program array",
    {
        "map": C_IDENTIFIER,
        "entries": MapOf(
            C_IDENTIFIER,
            max_items=1024,
            key=Text(max_length=10, min_length=1, pattern=r"[0-9]+", or_whole=True, write="Write a slot's number."),
        ),
    },
    required=("map", "entries"),
)
CPU = Text(
    max_length=16,
    pattern=quantities.CPU,
    or_whole=True,
    write="Write it as 10m (a hundredth of a CPU), 0.5 or 2.",
    reject=_within(quantities.cpu_millicores, "1m", "64"),
)
MEMORY = Text(
    max_length=16,
    pattern=quantities.MEMORY,
    or_whole=True,
    write="Write it as 64Ki, 8Mi or 1Gi.",
    reject=_within(quantities.memory_bytes, "4Ki", "4Gi"),
)


def _duration(low: str, high: str) -> Text:
    return Text(
        max_length=32,
        pattern=quantities.LONG_DURATION,
        write=f"Write a whole number and a unit (ms, s, m, h), such as {low} or {high}.",
        reject=_within(quantities.duration_ns, low, high),
    )


def _spec_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    program = value["program"]
    assert isinstance(program, Mapping)
    kind = next(name for name in PROGRAMS if program.get(name) is not None)
    if kind != "catalog" and value.get("scope", values.Scope.NAMESPACE) != values.Scope.CLUSTER:
        problems.add(
            join(path, "scope"),
            f"scope Namespace with program.{kind}",
            why="a program of your own can read all memory of the kernel, so one namespace cannot bound it",
            write="Write scope: Cluster (it needs the verb use-program), or use program.catalog.",
        )
    if kind == "catalog" and value.get("attach"):
        problems.add(
            join(path, "attach"),
            "attach with program.catalog",
            why="a catalog probe knows where it belongs",
            write="Leave attach away.",
        )
    maps = value.get("maps")
    there = maps if isinstance(maps, list) else []
    written = next((name for name in ("values", "pinned") if any(each.get(name) is not None for each in there)), "")
    for name in ("attach", "maps"):
        if kind == "bpftrace" and value.get(name):
            problems.add(
                join(path, name),
                f"{name} with program.bpftrace",
                why="a script says by itself what it attaches to, and bpftrace makes its maps",
                write="Leave it away.",
            )
    if kind == "bcc":
        written = "pinned" if any(each.get("pinned") is not None for each in there) else ""
    jumps = value.get("tailCalls") and kind != "bcc"
    if kind in ("catalog", "bcc", "bpftrace") and (written or jumps):
        problems.add(
            join(path, "maps" if written else "tailCalls"),
            f"{written or 'tailCalls'} with program.{kind}",
            why="a catalog probe has parameters" if kind == "catalog" else "BCC's types are known on the node only",
            write="Leave them away." if kind == "catalog" else "Write program.c.",
        )


SPEC = Record(
    "a ProbePolicy's spec",
    {
        "scope": Text(max_length=16, choices=tuple(values.Scope)),
        "nodes": _selecting("a choice of nodes"),
        "pods": _selecting("a choice of pods"),
        "program": PROGRAM,
        "attach": ListOf(ATTACHMENT, max_items=64),
        "maps": ListOf(MAP, max_items=32, unique="name"),
        "tailCalls": ListOf(TAIL_CALLS, max_items=32, unique="map"),
        "outputs": ListOf(OUTPUT, max_items=16, unique="name"),
        "interval": _duration("1s", "1h"),
        "ttl": _duration("1s", "8760h"),
        "suspend": Flag(),
        "budget": Record("a budget", {"cpu": CPU, "mapMemory": MEMORY}),
    },
    required=("program",),
    rules=(_spec_rule,),
)


_REDIRECTS = "which programs redirect packets to, and a policy only observes"
#: Types that no ProbeMap has → why, by the kernel's own rule, and what to write instead.
NOT_SHARED: Mapping[str, tuple[str, str]] = {
    "inode-storage": (
        "the kernel lets LSM programs alone look into it, and they run here as fexit programs, which have no say",
        "Count by inode in a hash: key: struct { u32 device; u64 inode; }.",
    ),
    "cgroup-array": (
        "it holds cgroups that a process puts in by descriptor, and no policy does",
        "Compare ids: a hash with key: cgroup_id_t cgroup.",
    ),
    **dict.fromkeys(
        ("sockmap", "sockhash", "reuseport-sockarray", "xskmap"),
        (f"it holds sockets, {_REDIRECTS}", "Count by socket: type: sk-storage."),
    ),
    **dict.fromkeys(
        ("devmap", "devmap-hash"),
        (f"it holds network devices, {_REDIRECTS}", "Count by interface in a hash with key: u32 ifindex."),
    ),
    "cpumap": (f"it holds queues of CPUs, {_REDIRECTS}", "Count by CPU in a percpu-array."),
    "user-ringbuf": ("user space writes it, and no policy does", "Hand numbers to programs in a hash or an array."),
    "struct-ops": (
        "it holds functions that the kernel calls in place of its own, and a policy only observes",
        "Leave it away.",
    ),
    "arena": ("it is memory without entries, which nobody could read", "Share an array."),
}
_HASHES = (
    values.MapType.HASH,
    values.MapType.PERCPU_HASH,
    values.MapType.LRU_HASH,
    values.MapType.LRU_PERCPU_HASH,
)
_ARRAYS = (values.MapType.ARRAY, values.MapType.PERCPU_ARRAY)
#: An entry for each task, cgroup or socket that programs ask about: nobody says how many.
STORAGE = (values.MapType.TASK_STORAGE, values.MapType.CGRP_STORAGE, values.MapType.SK_STORAGE)
CGROUP_STORAGE = (values.MapType.CGROUP_STORAGE, values.MapType.PERCPU_CGROUP_STORAGE)
MAX_SLOTS = 65_536
MAX_INNER_MAPS = 4096
OF_MAPS = (values.MapType.ARRAY_OF_MAPS, values.MapType.HASH_OF_MAPS)
#: A value there may say what a record is.
_RECORDS = (values.MapType.RINGBUF, values.MapType.PERF_EVENT_ARRAY)
_KEYED = (*_HASHES, values.MapType.LPM_TRIE, *CGROUP_STORAGE)
#: They have values, and no keys that anybody declares.
_VALUES = (*_ARRAYS, values.MapType.QUEUE, values.MapType.STACK, values.MapType.BLOOM_FILTER, *STORAGE)


def _map_spec_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    if said := NOT_SHARED.get(str(value["type"])):
        problems.add(join(path, "type"), f'"{value["type"]}"', why=said[0], write=said[1])
        return
    kind = values.MapType(str(value["type"]))
    _entry_rule(value, kind, path, problems)
    if (value.get("inner") is not None) != (kind in OF_MAPS):
        what, why, write = (
            "missing",
            f"a map of type {kind} holds maps that are all alike",
            "Write inner: {type: hash, …}.",
        )
        if kind not in OF_MAPS:
            what, why, write = f"inner in a map of type {kind}", "it holds no maps", "Leave inner away."
        problems.add(join(path, "inner"), what, why=why, write=write)
    inner = value.get("inner")
    if isinstance(inner, Mapping) and bool(inner.get("keys")) != (kind is values.MapType.HASH_OF_MAPS):
        what, why = "keys of an array of maps", "each of its places has an inner map"
        if kind is values.MapType.HASH_OF_MAPS:
            what, why = "missing", "programs cannot put maps into a map: it has one for each of these keys"
        write = "Leave keys away." if inner.get("keys") else "Write the keys, such as keys: [0, 1]."
        problems.add(join(path, "inner.keys"), what, why=why, write=write)
    entries = value.get("maxEntries")
    if kind in (*STORAGE, *CGROUP_STORAGE):
        if entries is not None:
            why = (
                "it has an entry for each "
                + ("attachment" if kind in CGROUP_STORAGE else "owner")
                + " that programs ask about"
            )
            problems.add(join(path, "maxEntries"), f"{entries}", why=why, write="Leave maxEntries away.")
        return
    if not isinstance(entries, int):
        why = f"a map of type {kind} has as many entries as are asked for"
        problems.add(join(path, "maxEntries"), "missing", why=why, write="Write maxEntries: 8192.")
        return
    if kind is values.MapType.RINGBUF and (entries & (entries - 1) or entries < 4096):
        problems.add(
            join(path, "maxEntries"),
            f"{entries}",
            why="a ring buffer's size is in bytes, a power of two and at least one page",
            write=f"Write {max(4096, 1 << (entries - 1).bit_length())}.",
        )
    if kind is values.MapType.PROG_ARRAY and entries > MAX_SLOTS:
        why = f"a shared program array has at most {MAX_SLOTS:,} slots, for an agent that starts looks through them all"
        problems.add(join(path, "maxEntries"), f"{entries}", why=why, write=f"Write {MAX_SLOTS}, or less.")
    if kind is values.MapType.ARRAY_OF_MAPS and entries > MAX_INNER_MAPS:
        why = f"each place of an array of maps has an inner map, and at most {MAX_INNER_MAPS:,} are made"
        problems.add(join(path, "maxEntries"), f"{entries}", why=why, write=f"Write {MAX_INNER_MAPS}, or less.")
    keys = inner.get("keys") if isinstance(inner, Mapping) else None
    if isinstance(keys, list) and len(keys) > entries:
        why = f"the map has room for {entries}"
        problems.add(
            join(path, "inner.keys"), f"{len(keys)} keys", why=why, write="Write fewer, or maxEntries with more."
        )


def _entry_rule(value: Mapping[str, object], kind: values.MapType, path: str, problems: errors.Problems) -> None:
    """What stands in a declaration of its key and value."""
    wanted = ("key", "value") if kind in _KEYED else ("value",) if kind in _VALUES else ()
    wanted = ("key",) if kind is values.MapType.HASH_OF_MAPS else wanted
    for name in wanted:
        if not value.get(name):
            problems.add(
                join(path, name),
                "missing",
                why=f"a map of type {kind} has a {name}",
                write=f"Write it in C, such as {name}: {'u32 pid' if name == 'key' else 'u64 count'}, or a struct.",
            )
    for name in sorted({"key", "value"} - {*wanted}):
        if value.get(name) and not (name == "value" and kind in _RECORDS):
            why, write = "the kernel sets it", f"Leave {name} away."
            if kind in OF_MAPS:
                why, write = "its inner maps have one", f"Write inner.{name}."
            problems.add(join(path, name), f"a {name} in a map of type {kind}", why=why, write=write)


DECLARATION = Text(
    max_length=4096,
    min_length=1,
    write="Write one C declaration, such as u32 pid, or struct { u32 pid; u32 uid; }.",
    reject=_declaration,
)


def _inner_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    _entry_rule(value, values.MapType(str(value["type"])), path, problems)


INNER = Record(
    "inner maps",
    {
        "type": Text(max_length=32, choices=(*_ARRAYS, *_HASHES)),
        "maxEntries": MAX_ENTRIES,
        "key": DECLARATION,
        "value": DECLARATION,
        "keys": ListOf(Text(max_length=256, or_whole=True), max_items=1024),
    },
    required=("type", "maxEntries"),
    rules=(_inner_rule,),
)
MAP_SPEC = Record(
    "a ProbeMap's spec",
    {
        "type": Text(max_length=32, choices=(*values.MapType, *NOT_SHARED)),
        "maxEntries": MAX_ENTRIES,
        "key": DECLARATION,
        "value": DECLARATION,
        "inner": INNER,
        "policies": ListOf(
            Text(max_length=MAX_NAME, min_length=1, pattern=DNS_SUBDOMAIN, write="Write a ProbePolicy's name."),
            max_items=64,
        ),
    },
    required=("type",),
    rules=(_map_spec_rule,),
)
