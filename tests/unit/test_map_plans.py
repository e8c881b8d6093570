"""What a policy says of its maps, planned: entries as bytes, jumps by slot, maps of others, and what is not read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from probefleet_agent import decode
from probefleet_core import catalog, errors, planner, policy, values
from probefleet_wire import clang
from probefleet_wire.btf_layout import Field
from probefleet_wire.map_layout import LPM_KEY
from probefleet_wire.v1 import plan_pb2

Json = dict[str, Any]
SOURCE = """#include <probefleet.h>
struct rule { u16 port; u8 weight; };
struct prefix { u32 prefixlen; ipv4_t address; };
#define MAP(kind, n, rest) struct { __uint(type, BPF_MAP_TYPE_##kind); __uint(max_entries, n); rest }
MAP(HASH, 4, __type(key, u32); __type(value, struct rule);) rules SEC(".maps");
MAP(ARRAY, 2, __type(key, u32); __type(value, u64);) counts SEC(".maps");
MAP(LPM_TRIE, 8, __uint(map_flags, BPF_F_NO_PREALLOC); __type(key, struct prefix); __type(value, u64);)
nets SEC(".maps");
MAP(PROG_ARRAY, 8, __uint(key_size, 4); __uint(value_size, 4);) ways SEC(".maps");
MAP(QUEUE, 8, __type(value, u64);) line SEC(".maps");
MAP(QUEUE, 8, __uint(value_size, 8);) mute SEC(".maps");
MAP(HASH, 8, __uint(key_size, 20); __uint(value_size, 4);) untyped SEC(".maps");
MAP(HASH, 8, __uint(map_flags, BPF_F_RDONLY); __type(key, u32); __type(value, u64);) fixed SEC(".maps");
MAP(HASH, 8, __uint(map_flags, BPF_F_WRONLY_PROG); __type(key, u32); __type(value, u64);) blind SEC(".maps");
u64 started = 7;
u32 seen[2];
const volatile u64 limit = 9;
const u64 folded = 3;
static volatile u32 hidden[4] = { 1 };
SEC("raw_tp/sys_enter") int root(void *ctx)
{
	bpf_tail_call(ctx, &ways, 1);
	return started + seen[1] + limit + folded + hidden[3];
}
SEC("raw_tp") int leaf(void *ctx) { return 0; }
SEC("raw_tp") int spare(void *ctx) { return 0; }
SEC("tracepoint") int other(void *ctx) { return 0; }
char LICENSE[] SEC("license") = "GPL";
"""
OUTPUTS = [{"name": "counts", "from": {"map": "counts"}, "topk": {}}]


@pytest.fixture(scope="module")
def elf() -> bytes:
    return clang.compile_core(SOURCE, name="maps.bpf.c", include_dirs=[catalog.folder() / "include"]).object


def parsed(**spec: Any) -> values.ProbePolicy:
    whole = {"scope": "Cluster", "program": {"c": {"source": SOURCE}}, "outputs": OUTPUTS, **spec}
    return policy.parse_policy(
        {
            "apiVersion": policy.API_VERSION,
            "kind": "ProbePolicy",
            "metadata": {"name": "maps", "uid": "u1"},
            "spec": whole,
        }
    )


JUMPS = [{"map": "ways", "entries": {"1": "leaf"}}]


def planned(elf: bytes, **spec: Any) -> planner.Planned:
    spec.setdefault("tailCalls", JUMPS)
    return planner.plan(parsed(**spec), catalog=catalog.Catalog({}), elf=elf, probe_maps={}, cpus=2)


def refused(elf: bytes, **spec: Any) -> errors.Problem:
    with pytest.raises(errors.PolicyRefused) as caught:
        planned(elf, **spec)
    return caught.value.problems[0]


def writing(name: str, *entries: tuple[Any, Any], **more: Any) -> Json:
    return {"name": name, "values": [{"key": key, "value": value} for key, value in entries], **more}


def pushing(name: str, *given: Any, **more: Any) -> Json:
    return {"name": name, "values": [{"value": each} for each in given], **more}


def test_what_fills_a_queue_is_part_of_what_runs(elf: bytes) -> None:
    """Nobody can take back what was pushed: another list is another map, and so another instance."""
    one, two = (planned(elf, maps=[pushing("line", *listed)]).plan.instance for listed in ((7, 8), (8, 7)))
    (line,) = one.filled
    assert (line.map, line.count) == ("line", 2)
    assert line.values == (7).to_bytes(8, "little") + (8).to_bytes(8, "little")
    assert one.digest != two.digest and not one.contents
    assert planned(elf, maps=[pushing("line")]).plan.instance.digest == planned(elf).plan.instance.digest
    assert planned(elf, maps=[pushing("line", *range(9), maxEntries=9)]).plan.instance.filled[0].count == 9


def test_values_are_laid_out_and_stand_outside_the_digest(elf: bytes) -> None:
    one = planned(elf, maps=[writing("rules", (7, {"port": 443})), writing("nets", ("10.0.0.0/8", 5))])
    two = planned(elf, maps=[writing("rules", (8, {"weight": 1})), writing("nets")])
    rules, nets = one.plan.instance.contents
    assert (rules.map, rules.count, rules.keys) == ("rules", 1, (7).to_bytes(4, "little"))
    assert rules.values == (443).to_bytes(2, "little") + b"\0\0"
    assert nets.keys == (8).to_bytes(4, "little") + bytes([10, 0, 0, 0])
    assert one.plan.instance.digest == two.plan.instance.digest
    assert one.plan.instance.owner == "u1"
    assert two.plan.instance.contents[1].count == 0


def test_variables_are_written_by_themselves_and_constants_are_parameters(elf: bytes) -> None:
    one = planned(elf, maps=[writing(".data", ("started", 23), ("hidden", [5])), writing(".bss", ("seen", [5]))])
    data, bss = one.plan.instance.contents
    started, hidden = data.variables
    assert (data.map, started.value[0], started.initial[0]) == (".data", 23, 7)
    assert (len(hidden.value), hidden.value[0], hidden.initial[0]) == (16, 5, 1)
    (seen,) = bss.variables
    assert (bss.map, seen.value, seen.initial) == (".bss", b"\5" + bytes(7), bytes(8))
    assert one.plan.instance.digest == planned(elf).plan.instance.digest
    fixed = planned(elf, maps=[writing(".rodata", ("limit", "0x17"))])
    assert list(fixed.plan.instance.parameters) == [
        plan_pb2.Parameter(variable="limit", value=(23).to_bytes(8, "little"))
    ]
    assert fixed.plan.instance.digest != one.plan.instance.digest and not fixed.plan.instance.contents


def test_slots_name_programs_that_nothing_attaches(elf: bytes) -> None:
    made = planned(elf)
    instance = made.plan.instance
    assert [(each.map, dict(each.entries)) for each in instance.tail_calls] == [("ways", {1: "leaf"})]
    assert list(instance.tail_programs) == ["leaf", "spare", "other"]
    assert [each.program for each in instance.attachments] == ["root"]
    assert "leaf: jumped to by ways[1]" in made.summary.programs and "spare: jumped to" in made.summary.programs
    twice = planned(elf, tailCalls=[{"map": "ways", "entries": {3: "leaf", 1: "leaf"}}]).summary.programs
    assert "leaf: jumped to by ways[1, 3]" in twice
    again = planned(elf, tailCalls=[{"map": "ways", "entries": {1: "spare", 2: "leaf"}}])
    assert again.plan.instance.digest == instance.digest


def test_without_tail_calls_a_program_without_a_place_is_said(elf: bytes) -> None:
    problem = refused(elf, tailCalls=[])
    assert problem.path == "spec.attach" and "or a slot of tailCalls" in problem.write


def test_maps_of_others_are_named_and_cost_nothing(elf: bytes) -> None:
    made = planned(elf, maps=[{"name": "counts", "pinned": "/sys/fs/bpf/tc/globals/counts"}])
    assert list(made.plan.instance.pinned_maps) == [
        plan_pb2.PinnedMap(map="counts", path="/sys/fs/bpf/tc/globals/counts")
    ]
    assert "counts" not in dict(made.summary.maps) and "rules" in dict(made.summary.maps)


def test_what_no_output_reads_is_listed(elf: bytes) -> None:
    notes = dict(planned(elf).summary.not_read)
    assert notes["ways"] == "prog-array, not read: it holds programs"
    assert "an output with events: {} does" in notes["line"]
    drained = [*OUTPUTS, {"name": "line", "from": {"map": "line"}, "events": {}}]
    assert "line" not in dict(planned(elf, outputs=drained).summary.not_read)


WRONG: list[tuple[Json, str, str]] = [
    ({"maps": [writing("ways", (0, 1))]}, "spec.maps[0].values", "ways is of type prog-array"),
    ({"maps": [writing("line", (0, 1))]}, "spec.maps[0].values[0].key", "line is a queue, whose values have none"),
    ({"maps": [pushing("mute", 1)]}, "spec.maps[0].values", "mute does not say what it holds"),
    ({"maps": [pushing("line", *range(9))]}, "spec.maps[0].values", "line has room for 8"),
    ({"maps": [pushing("line", 1, -1)]}, "spec.maps[0].values[1].value", "-1 does not fit"),
    ({"maps": [pushing("rules", {"port": 7})]}, "spec.maps[0].values[0].key", "rules is a hash, whose values have one"),
    ({"maps": [writing("untyped", (0, 1))]}, "spec.maps[0].values", "untyped does not say what it holds"),
    ({"maps": [writing("fixed", (0, 1))]}, "spec.maps[0].values", "BPF_F_RDONLY keeps user space from writing"),
    ({"maps": [writing("blind", (0, 1))]}, "spec.maps[0].values", "programs may not read it"),
    ({"maps": [writing("counts", (2, 1))]}, "spec.maps[0].values[0].key", "counts is an array of 2"),
    ({"maps": [writing("counts", (0, 1), (1, 1), (2, 1))]}, "spec.maps[0].values", "3 entries"),
    ({"maps": [writing("counts", (0, 1), ("0x0", 1))]}, "spec.maps[0].values[1].key", "there twice"),
    ({"maps": [writing("rules", (0, {"port": -1}))]}, "spec.maps[0].values[0].value.port", "0: u16 port"),
    ({"maps": [writing("rulez", (0, 1))]}, "spec.maps[0].name", "Did you mean rules"),
    ({"maps": [writing(".data", ("start", 1))]}, "spec.maps[0].values[0].key", "Did you mean started"),
    ({"maps": [writing(".data", ("limit", 1))]}, "spec.maps[0].values[0].key", ".data has no variable of that name"),
    ({"maps": [writing(".data", (0, 1))]}, "spec.maps[0].values[0].key", "Known: hidden, started"),
    ({"maps": [writing(".data", ("started", 1), ("started", 2))]}, "spec.maps[0].values[1].key", "there twice"),
    ({"maps": [writing(".bss", ("seen", [1, 2, 3]))]}, "spec.maps[0].values[0].value", "3 items, there is room for 2"),
    ({"maps": [writing(".rodata", ("limit", -1))]}, "spec.maps[0].values[0].value", "a variable is 8 bytes {0: u64}"),
    ({"maps": [writing(".rodata", ("folded", 1))]}, "spec.maps[0].values[0].key", "Make it volatile"),
    # What the agent sets by itself.
    ({"maps": [writing(".rodata", ("probefleet_tgid", 1))]}, "spec.maps[0].values[0].key", "Known: limit"),
    ({"maps": [writing(".data.mine", ("x", 1))]}, "spec.maps[0].name", "no map of that name"),
    ({"tailCalls": [{"map": "way", "entries": {}}]}, "spec.tailCalls[0].map", "Did you mean ways"),
    ({"tailCalls": [{"map": "rules", "entries": {}}]}, "spec.tailCalls[0].map", "it is of type hash"),
    ({"tailCalls": [{"map": "ways", "entries": {8: "leaf"}}]}, "spec.tailCalls[0].entries.8", "has 8 slots"),
    ({"tailCalls": [{"map": "ways", "entries": {1: "leav"}}]}, "spec.tailCalls[0].entries.1", "Did you mean leaf"),
    ({"tailCalls": [{"map": "ways", "entries": {1: "other"}}]}, "spec.tailCalls[0].entries.1", "programs of one type"),
]


@pytest.mark.parametrize(("spec", "path", "says"), WRONG)
def test_what_is_wrong_is_named(elf: bytes, spec: Json, path: str, says: str) -> None:
    problem = refused(elf, **spec)
    assert problem.path == path and says in str(problem)


def test_more_entries_give_more_room(elf: bytes) -> None:
    made = planned(elf, maps=[writing("counts", (2, 1), maxEntries=3)])
    assert made.plan.instance.contents[0].count == 1


def problems(spec: Json) -> list[str]:
    with pytest.raises(errors.PolicyRefused) as caught:
        parsed(**spec)
    return [str(each) for each in caught.value.problems]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"maps": [{"name": "a", "share": {"probeMap": "b"}, "values": []}]}, "what others use as well"),
        (
            {"maps": [{"name": "a", "share": {"probeMap": "b"}, "pinned": "/sys/fs/bpf/x"}]},
            "takes the place of another",
        ),
        ({"maps": [{"name": "a", "pinned": "/sys/fs/bpf/x", "maxEntries": 5}]}, "the map is there already"),
        ({"maps": [{"name": "a", "pinned": "/sys/fs/bpf/x/../y"}]}, "a path leads down, not up"),
        ({"maps": [{"name": "a", "values": [{"key": 1, "value": {"x": object()}}]}]}, "text, a number, true or false"),
        ({"maps": [{"name": "a", "values": [{"key": [0] * 300, "value": 1}]}]}, "at most 256 parts"),
        ({"maps": [{"name": ".bss", "maxEntries": 5}]}, "maxEntries of .bss: global variables are the program's own"),
        ({"maps": [{"name": ".data", "share": {"probeMap": "b"}}]}, "share of .data: global variables are"),
        ({"maps": [{"name": ".text", "values": []}]}, ".data, .bss or .rodata for its variables"),
        ({"tailCalls": [{"map": "a", "entries": {"x": "f"}}]}, "Write a slot's number"),
        ({"program": {"catalog": {"name": "x"}}, "maps": [writing("a")]}, "values with program.catalog"),
        ({"program": {"catalog": {"name": "x"}}, "tailCalls": JUMPS}, "tailCalls with program.catalog"),
        ({"program": {"bcc": {"source": "x"}}, "maps": [{"name": "a", "pinned": "/sys/fs/bpf/x"}]}, "pinned with"),
    ],
)
def test_shapes_are_held(spec: Json, says: str) -> None:
    assert any(says in each for each in problems(spec)), problems(spec)


def shared_queue(elf: bytes) -> dict[str, planner.CompiledProbeMap]:
    spec = {"type": "queue", "maxEntries": 8, "value": "u64 n"}
    made = policy.parse_probe_map(
        {"apiVersion": policy.API_VERSION, "kind": "ProbeMap", "metadata": {"name": "q", "uid": "m"}, "spec": spec}
    )
    source = planner.probe_map_source(made)
    compiled = clang.compile_core(source, name="q.c", include_dirs=[catalog.folder() / "include"]).object
    return {"q": planner.CompiledProbeMap(made, compiled)}


def test_a_shared_queue_is_drained_by_no_output(elf: bytes) -> None:
    drained = [*OUTPUTS, {"name": "line", "from": {"map": "line"}, "events": {}}]
    sharing = [{"name": "line", "share": {"probeMap": "q"}}]
    probe_maps = shared_queue(elf)
    made = parsed(maps=sharing, tailCalls=JUMPS)
    assert planner.plan(made, catalog=catalog.Catalog({}), elf=elf, probe_maps=probe_maps).probe_maps
    with pytest.raises(errors.PolicyRefused, match="reading takes entries out of a queue"):
        made = parsed(maps=sharing, tailCalls=JUMPS, outputs=drained)
        planner.plan(made, catalog=catalog.Catalog({}), elf=elf, probe_maps=probe_maps)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("08000000 0a000000", "10.0.0.0/8"),
        ("18000000 0a0102ff", "10.1.2.0/24"),
        ("68000000 00000000000000000000ffff0a000000", "10.0.0.0/8"),
        ("20000000 20010db8000000000000000000000000", "2001:db8::/32"),
        ("28000000 010203040506", "010203040506/40"),
        ("ff000000 0a000000", "0a000000/255"),
    ],
)
def test_prefixes_are_shown_as_people_write_them(data: str, shown: str) -> None:
    raw = np.frombuffer(bytes.fromhex(data), np.uint8).reshape(1, -1)
    field = Field("", 0, raw.shape[1], "bytes", type_name="prefix", typedefs=(LPM_KEY,))

    class Nobody:
        machine, wall_minus_ktime_ns = "x86_64", 0

    assert decode.decoder_of(field, {}, "key") == "prefix"
    assert decode.column(raw, field, "prefix", Nobody()).tolist() == [shown]
