"""``maps[].values``: entries are there before the first event, typed by BTF, and change while the program counts on."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel import maps, syscall
from probefleet_cli.failures import BadInput
from probefleet_wire import map_layout
from probefleet_wire.map_types import Flag, MapType

from tests.kernel import policies
from tests.kernel.support import call_getppid
from tests.kernel.test_map_types import needs_type

# Counts each call in the bucket that a configured hash names for getppid's number.
COUNT = """
struct rule { u16 bucket; bool on; u8 weight; char note[8]; };
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 4); __type(key, u32); __type(value, struct rule); }
rules SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 16); __type(key, u32); __type(value, u64); }
counts SEC(".maps");
ON_CALL
{
	u32 key = 110;
	struct rule *rule;
	if (!ours())
		return 0;
	rule = bpf_map_lookup_elem(&rules, &key);
	key = rule && rule->on ? rule->bucket : 999;
	probefleet_add(&counts, &key, rule && rule->on ? rule->weight : 1);
	return 0;
}
"""
COUNTS = {"outputs": [{"name": "calls", "from": {"map": "counts"}, "topk": {}, "groupBy": ["key"]}], "interval": "1s"}


def rules(*entries: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    return {"name": "rules", "values": [{"key": key, "value": value} for key, value in entries]}


def policy(*entries: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    return policies.c_policy(COUNT, maps=[rules(*entries)], **COUNTS)


def digests() -> list[str]:
    return [path.name for path in policies.folder().glob("probefleet/instances/*")]


def test_values_are_there_before_the_first_event_and_an_edit_does_not_lose_a_count() -> None:
    with policies.run(policy((110, {"bucket": 7, "on": True, "weight": 1}))) as run:
        before = digests()
        call_getppid(23)
        run.apply(policy((110, {"bucket": 8, "on": True, "weight": 3}), (1, {"bucket": 1})))
        call_getppid(997)
        run.apply(policy((1, {"bucket": 1})))
        call_getppid(5)
        assert run.rows("calls") == {("7",): 23, ("8",): 3 * 997, ("999",): 5}
        assert digests() == before, "the same program, all the time"


def test_an_edit_leaves_alone_what_it_does_not_name() -> None:
    """Entries that a program made stay, and so does a count that began with a value of the policy's."""
    source = COUNT.replace("rules SEC", "unused SEC").replace("&rules", "&unused")

    def writing(*entries: tuple[int, int]) -> dict[str, Any]:
        listed = [{"key": key, "value": value} for key, value in entries]
        return policies.c_policy(source, maps=[{"name": "counts", "values": listed}], **COUNTS)

    with policies.run(writing((999, 1000), (5, 50), (6, 60))) as run:
        call_getppid(23)
        assert run.rows("calls")[("6",)] == 60
        run.apply(writing((999, 1000), (5, 51)))
        call_getppid(997)
        # A row that is gone from the map keeps what it came to.
        assert run.rows("calls") == {("999",): 1000 + 1020, ("5",): 51, ("6",): 60}
        (pin,) = policies.folder().glob("probefleet/instances/*/map_counts")
        with syscall.obj_get(str(pin)) as fd:
            keys, _ = maps.read(fd, maps.info(fd))
        assert sorted(int.from_bytes(bytes(key), "little") for key in keys) == [5, 999]


def test_a_full_map_is_replaced_in_place() -> None:
    """Four entries fit: old and new have no room side by side."""
    four = [(number, {"bucket": number}) for number in range(4)]
    with policies.run(policy(*four)) as run:
        run.apply(policy((110, {"bucket": 3, "on": True, "weight": 1}), *((7 + each, {}) for each in range(3))))
        call_getppid(23)
        assert run.rows("calls") == {("3",): 23}


def test_a_values_edit_outlives_the_agent() -> None:
    """What was written is in the manifest: an agent that adopts the instance knows what to take away."""
    from probefleet_agent.engine import Engine
    from probefleet_cli import local_pods, preparation

    first, second = (policies.prepare(policy((key, {"bucket": 1, "on": True, "weight": 1}))) for key in (1, 110))
    with policies.run(policy((1, {"bucket": 1, "on": True, "weight": 1}))) as run:
        assert first[0].planned.plan.instance.digest == second[0].planned.plan.instance.digest
        with Engine.open(bpffs=policies.folder()) as adopting:
            push = preparation.push(second, pods=local_pods.find(), namespace=None, version=5)
            adopting.apply(push)
        call_getppid(23)
        assert run.rows("calls") == {("1",): 23}
        (pin,) = policies.folder().glob("probefleet/instances/*/map_rules")
        with syscall.obj_get(str(pin)) as fd:
            keys, _ = maps.read(fd, maps.info(fd))
        assert [int.from_bytes(bytes(key), "little") for key in keys] == [110]


PREFIXES = """
struct prefix { __u32 prefixlen; __be32 address; };
struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(max_entries, 16); __uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix); __type(value, u64); } nets SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, ipv4_t); }
asked SEC(".maps");
ON_CALL
{
	struct prefix key = { .prefixlen = 32 };
	u32 zero = 0;
	ipv4_t *address = bpf_map_lookup_elem(&asked, &zero);
	u64 *count;
	if (!ours() || !address)
		return 0;
	key.address = *address;
	count = bpf_map_lookup_elem(&nets, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}
"""


def test_prefixes_and_addresses_are_written_as_people_write_them() -> None:
    def asking(address: str) -> dict[str, Any]:
        nets = [{"key": key, "value": 0} for key in ("10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0")]
        written = [
            {"name": "nets", "values": nets},
            {"name": "asked", "values": [{"key": 0, "value": address}]},
        ]
        outputs = [{"name": "hits", "from": {"map": "nets"}, "topk": {}}]
        return policies.c_policy(PREFIXES, maps=written, outputs=outputs, interval="1s")

    with policies.run(asking("10.1.2.3")) as run:
        call_getppid(23)
        run.apply(asking("10.2.0.1"))
        call_getppid(997)
        run.apply(asking("192.0.2.1"))
        call_getppid(5)
        assert run.rows("hits") == {("10.1.0.0/16",): 23, ("10.0.0.0/8",): 997, ("0.0.0.0/0",): 5}


def test_a_per_cpu_map_gets_its_value_on_every_cpu() -> None:
    source = """
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 2); __type(key, u32); __type(value, u32); }
start SEC(".maps");
ON_CALL
{
	u32 key = 1, *count = bpf_map_lookup_elem(&start, &key);
	if (ours() && count)
		*count += 1;
	return 0;
}
"""
    written = [{"name": "start", "values": [{"key": 1, "value": 1000}]}]
    outputs = [{"name": "calls", "from": {"map": "start"}, "topk": {}, "groupBy": ["key"]}]
    with policies.run(policies.c_policy(source, maps=written, outputs=outputs, interval="1s")) as run:
        call_getppid(997)
        assert run.rows("calls")[("1",)] == 1000 * maps.possible_cpus() + 997


KINDS = {
    "HASH": "",
    "PERCPU_HASH": "",
    "LRU_HASH": "",
    "LRU_PERCPU_HASH": "",
    "ARRAY": "",
    "PERCPU_ARRAY": "",
    "LPM_TRIE": "__uint(map_flags, BPF_F_NO_PREALLOC);",
}


def test_values_of_every_type_that_takes_them_change_live() -> None:
    """Each map's program adds one to what the policy wrote: a changed value begins anew, one that stays counts on."""
    source = "struct prefix { __u32 prefixlen; __be32 address; };\n"
    for kind, more in KINDS.items():
        key = "struct prefix" if kind == "LPM_TRIE" else "u32"
        parts = f"__uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, 8); __type(key, {key}); {more}"
        source += f'struct {{ {parts} __type(value, u64); }} m_{kind.lower()} SEC(".maps");\n'
    source += "ON_CALL\n{\n\tstruct prefix host = { 32, bpf_htonl(0x0a010203) };\n\tu32 key = 3;\n\tu64 *found;\n"
    source += "\tif (!ours())\n\t\treturn 0;\n"
    for kind in KINDS:
        key = "&host" if kind == "LPM_TRIE" else "&key"
        source += f"\tfound = bpf_map_lookup_elem(&m_{kind.lower()}, {key});\n\tif (found)\n\t\t*found += 1;\n"
    source += "\treturn 0;\n}\n"
    outputs = [
        {"name": kind.lower().replace("_", "-"), "from": {"map": f"m_{kind.lower()}"}, "gauge": {"merge": "max"}}
        for kind in KINDS
    ]

    def writing(value: int, other: int) -> dict[str, Any]:
        def entries(kind: str) -> list[dict[str, Any]]:
            keys = ("10.0.0.0/8", "192.0.2.0/24") if kind == "LPM_TRIE" else (3, 4)
            return [{"key": key, "value": each} for key, each in zip(keys, (value, other), strict=True)]

        written = [{"name": f"m_{kind.lower()}", "values": entries(kind)} for kind in KINDS]
        return policies.c_policy(source, maps=written, outputs=outputs, interval="1s")

    def held(run: policies.Run) -> dict[str, dict[str, int]]:
        run.measured.sample_rest()
        found: dict[str, dict[str, int]] = {}
        for kind in KINDS:
            (pin,) = policies.folder().glob(f"probefleet/instances/*/map_m_{kind.lower()}")
            with syscall.obj_get(str(pin)) as fd:
                keys, values = maps.read(fd, maps.info(fd))
            totals = values.reshape(len(values), -1).view("<u8").sum(axis=1).tolist()
            found[kind] = {bytes(key).hex(): total for key, total in zip(keys, totals, strict=True) if total}
        return found

    def wanted(value: int, other: int, calls: int) -> dict[str, dict[str, int]]:
        each_kind: dict[str, dict[str, int]] = {}
        for kind in KINDS:
            cpus = maps.possible_cpus() if "PERCPU" in kind else 1
            keys = ("080000000a000000", "18000000c0000200") if kind == "LPM_TRIE" else ("03000000", "04000000")
            each_kind[kind] = {keys[0]: value * cpus + calls, keys[1]: other * cpus}
        return each_kind

    with policies.run(writing(1000, 7)) as run:
        call_getppid(997)
        assert held(run) == wanted(1000, 7, 997)
        run.apply(writing(1000, 9))
        call_getppid(23)
        assert held(run) == wanted(1000, 9, 1020), "an entry that the edit leaves alone counts on"
        run.apply(writing(2000, 9))
        call_getppid(5)
        assert held(run) == wanted(2000, 9, 5)


# Takes one value out at each call, and counts by what it was.
POPPING = """
struct step { u32 key; u16 weight; };
struct { __uint(type, BPF_MAP_TYPE_KIND); __uint(max_entries, 8); __type(value, struct step); } steps SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 16); __type(key, u32); __type(value, u64); }
counts SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 8); __type(key, u32); __type(value, u64); }
order SEC(".maps");
u32 popped = 0;
ON_CALL
{
	struct step step;
	u32 place;
	if (!ours())
		return 0;
	if (!bpf_map_pop_elem(&steps, &step)) {
		u64 key = step.key;
		place = popped++;
		bpf_map_update_elem(&order, &place, &key, 0);
	} else {
		step.key = 999; /* of an empty one the kernel gives zeros */
		step.weight = 1;
	}
	probefleet_add(&counts, &step.key, step.weight);
	return 0;
}
"""


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
@pytest.mark.shows("map/{kind}")
def test_values_of_a_queue_are_pushed_once_in_their_order(kind: str) -> None:
    outputs = [
        *COUNTS["outputs"],
        {"name": "order", "from": {"map": "order"}, "gauge": {"merge": "max"}, "groupBy": ["key"]},
    ]

    def writing(*steps: tuple[int, int]) -> dict[str, Any]:
        listed = [{"value": {"key": key, "weight": weight}} for key, weight in steps]
        maps_ = [{"name": "steps", "values": listed}]
        return policies.c_policy(POPPING.replace("KIND", kind), maps=maps_, outputs=outputs, interval="1s")

    def order(run: policies.Run) -> list[int]:
        rows = run.rows("order")
        return [rows[(str(place),)] for place in range(3)]

    with policies.run(writing((7, 1), (8, 10), (9, 100))) as run:
        before = digests()
        call_getppid(23)
        assert run.rows("calls") == {("7",): 1, ("8",): 10, ("9",): 100, ("999",): 20}
        assert order(run) == ([7, 8, 9] if kind == "QUEUE" else [9, 8, 7])
        run.apply(writing((7, 1), (8, 10), (9, 100)))
        call_getppid(5)
        assert run.rows("calls")[("999",)] == 25 and digests() == before, "what is gone is not pushed once more"
        # Another list is another map, with its program; what the first one counted stays.
        run.apply(writing((8, 10), (9, 1000)))
        assert digests() != before
        call_getppid(3)
        assert run.rows("calls") == {("7",): 1, ("8",): 20, ("9",): 1100, ("999",): 26}


def test_values_of_a_queue_of_bccs_are_pushed() -> None:
    source = f"""
struct step {{ u32 key; u16 weight; }};
BPF_QUEUE(steps, struct step, 8);
BPF_HASH(counts, u32, u64, 16);
TRACEPOINT_PROBE(syscalls, sys_enter_getppid)
{{
	struct step step = {{}};
	if (bpf_get_current_pid_tgid() >> 32 != {os.getpid()})
		return 0;
	if (steps.pop(&step)) {{
		step.key = 999;
		step.weight = 1;
	}}
	counts.increment(step.key, step.weight);
	return 0;
}}
"""

    def writing(name: str, *listed: dict[str, Any]) -> dict[str, Any]:
        policy = policies.c_policy("", maps=[{"name": name, "values": list(listed)}], **COUNTS)
        policy["spec"]["program"] = {"bcc": {"source": source}}
        return policy

    steps = [{"value": {"key": key, "weight": weight}} for key, weight in ((7, 1), (8, 10))]
    with policies.run(writing("steps", *steps)) as run:
        call_getppid(23)
        assert run.rows("calls") == {("7",): 1, ("8",): 10, ("999",): 21}
    for name, listed, says in (
        ("steps", steps * 5, "10 values for steps, which has room for 8"),
        ("steps", [{"value": {"weight": -1}}], r"values\[0\] of steps does not fit: weight: -1"),
        ("counts", [{"value": 1}], "counts takes no values without a key: it is of type hash"),
        ("steps", [{"key": 1, "value": {}}], "steps takes no values: it is of type queue"),
    ):
        with policies.run(writing(name, *listed), ready=False) as run:
            (status,) = run.measured.statuses()
            assert re.search(says, status.message), status.message


def test_a_queue_that_is_filled_is_not_filled_again_by_the_next_agent() -> None:
    from probefleet_agent.engine import Engine
    from probefleet_cli import local_pods, preparation

    listed = [{"value": {"key": key, "weight": 1}} for key in (7, 8)]
    source = POPPING.replace("KIND", "QUEUE")
    manifest = policies.c_policy(source, maps=[{"name": "steps", "values": listed}], **COUNTS)
    with policies.run(manifest) as run:
        call_getppid(1)
        with Engine.open(bpffs=policies.folder()) as adopting:
            prepared = policies.prepare(manifest)
            adopting.apply(preparation.push(prepared, pods=local_pods.find(), namespace=None, version=5))
        call_getppid(22)
        assert run.rows("calls") == {("7",): 1, ("8",): 1, ("999",): 21}


@pytest.mark.shows("map/bloom-filter")
def test_values_of_a_bloom_filter_are_in_it_before_the_first_event() -> None:
    """It says of what is in it that it is, always; so each number that the policy names is counted, exactly."""
    needs_type(MapType.BLOOM_FILTER)
    source = """
struct { __uint(type, BPF_MAP_TYPE_BLOOM_FILTER); __uint(max_entries, 64); __uint(map_extra, 8); __type(value, u64); }
wanted SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1024); __type(key, u32); __type(value, u64); }
counts SEC(".maps");
u64 number = 0;
ON_CALL
{
	u64 value;
	u32 key;
	if (!ours())
		return 0;
	key = value = number++ % 997;
	if (!bpf_map_peek_elem(&wanted, &value))
		probefleet_add(&counts, &key, 1);
	return 0;
}
"""

    def writing(*wanted: int) -> dict[str, Any]:
        listed = [{"value": each} for each in wanted]
        return policies.c_policy(source, maps=[{"name": "wanted", "values": listed}], **COUNTS)

    with policies.run(writing(23, 5, 996)) as run:
        call_getppid(2 * 997)
        rows = run.rows("calls")
        assert {key: rows[key] for key in (("23",), ("5",), ("996",))} == {("23",): 2, ("5",): 2, ("996",): 2}
        first = sum(rows.values())
        run.apply(writing(24))
        call_getppid(997)
        rows = run.rows("calls")
        assert (rows[("24",)], rows[("23",)]) == (1, 2), "23 is no longer in it"
        # One in a thousand of the others may be taken for one of these (eight hash functions).
        assert 6 <= first <= 6 + 2 * 20 and sum(rows.values()) - first <= 1 + 20


@pytest.mark.parametrize("kind", ["HASH", "ARRAY"])
def test_a_map_that_programs_may_only_read_is_filled_by_the_policy(kind: str) -> None:
    source = f"""
struct {{ __uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, 4); __uint(map_flags, BPF_F_RDONLY_PROG);
	__type(key, u32); __type(value, u64); }} step SEC(".maps");
u64 sum = 0;
ON_CALL
{{
	u32 key = 3;
	u64 *found = bpf_map_lookup_elem(&step, &key);
	if (ours() && found)
		sum += *found;
	return 0;
}}
"""
    outputs = [{"name": "sum", "from": {"map": ".bss", "value": "sum"}, "counter": {}}]

    def writing(value: int) -> dict[str, Any]:
        written = [{"name": "step", "values": [{"key": 3, "value": value}]}]
        return policies.c_policy(source, maps=written, outputs=outputs, interval="1s")

    with policies.run(writing(23)) as run:
        call_getppid(997)
        run.apply(writing(1))
        call_getppid(5)
        assert run.output("sum")["total"]["value"] == 997 * 23 + 5
        (pin,) = policies.folder().glob("probefleet/instances/*/map_step")
        with syscall.obj_get(str(pin)) as fd:
            assert maps.info(fd).flags & Flag.RDONLY_PROG


# Counts each call in ``calls``, and what the variables say of it.
GLOBALS = """
struct step { u32 weight; bool on; u8 unused[3]; u64 after; };
u64 calls = 0;
u64 sum = 0;
u32 weight = 41;
struct step step = { .weight = 5, .on = true, .after = 7 };
const volatile u64 limit = 1;
const volatile char word[8] = "none";
ON_CALL
{
	if (!ours())
		return 0;
	calls++;
	if (step.on && word[0] == 'w')
		sum += (u64)weight * limit + step.weight + step.after;
	return 0;
}
"""


@pytest.mark.shows("map/global-data")
def test_global_variables_are_written_typed_and_change_while_the_program_counts() -> None:
    outputs = [{"name": name, "from": {"map": ".bss", "value": name}, "counter": {}} for name in ("calls", "sum")]

    def writing(constants: dict[str, Any], data: dict[str, Any], bss: dict[str, Any]) -> dict[str, Any]:
        sections = {".rodata": constants, ".data": data, ".bss": bss}
        written = [
            {"name": name, "values": [{"key": key, "value": value} for key, value in said.items()]}
            for name, said in sections.items()
        ]
        return policies.c_policy(GLOBALS, maps=written, outputs=outputs, interval="1s")

    def counted(run: policies.Run) -> tuple[int, int]:
        return run.output("calls")["total"]["value"], run.output("sum")["total"]["value"]

    knobs = {"limit": 1000, "word": "word"}
    with policies.run(writing(knobs, {"weight": 2, "step": {"weight": 3, "on": True}}, {"calls": 100})) as run:
        before = digests()
        call_getppid(997)
        assert counted(run) == (100 + 997, 997 * (2 * 1000 + 3)), "a field that is left away is zero"
        # One that an edit leaves alone counts on; one that it no longer names is what the source says.
        run.apply(writing(knobs, {"weight": 4}, {"calls": 100}))
        call_getppid(23)
        total = 997 * 2003 + 23 * (4 * 1000 + 5 + 7)
        assert counted(run) == (1120, total)
        run.apply(writing(knobs, {}, {"calls": 100}))
        call_getppid(5)
        total += 5 * (41 * 1000 + 12)
        assert counted(run) == (1125, total)
        assert digests() == before, "the same program, all the time"
        # What the kernel has fixed takes another program; what the first one counted stays.
        run.apply(writing({"limit": 3, "word": "word"}, {"weight": 1}, {}))
        assert digests() != before
        call_getppid(11)
        assert counted(run) == (1125 + 11, total + 11 * (3 + 12))


@contextlib.contextmanager
def calling() -> Iterator[list[int]]:
    """A thread that calls without a pause; after the block, how often."""
    done, rounds = threading.Event(), list[int]()

    def call() -> None:
        while not done.is_set():
            call_getppid(997)
            rounds.append(997)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield rounds
    finally:
        done.set()
        caller.join()


@pytest.mark.parametrize("kind", ["HASH", "LPM_TRIE"])
def test_while_values_are_edited_a_program_sees_the_old_entry_or_the_new_one_whole(kind: str) -> None:
    trie = kind == "LPM_TRIE"
    source = """
struct prefix { __u32 prefixlen; __be32 address; };
struct pair { u64 one; u64 other; };
struct { __uint(type, BPF_MAP_TYPE_KIND); __uint(max_entries, 16); __uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, KEY); __type(value, struct pair); } pairs SEC(".maps");
u64 missing = 0, torn = 0, whole = 0;
ON_CALL
{
	KEY key = INITIAL;
	volatile struct pair *pair = bpf_map_lookup_elem(&pairs, &key);

	if (!ours())
		return 0;
	if (!pair)
		missing++;
	else if (pair->one != pair->other)
		torn++;
	else
		whole++;
	return 0;
}
"""
    source = source.replace("KIND", kind).replace("KEY", "struct prefix" if trie else "u32")
    source = source.replace("INITIAL", "{ 32, bpf_htonl(0x0a010203) }" if trie else "7")
    names = ("missing", "torn", "whole")
    outputs = [{"name": name, "from": {"map": ".bss", "value": name}, "counter": {}} for name in names]

    def writing(number: int) -> dict[str, Any]:
        """The entry that the program looks up, and two whose keys change with each edit."""
        others = [100 + (2 * number + each) % 7 for each in range(2)]
        listed = ["10.1.0.0/16", *(f"192.0.{each}.0/24" for each in others)] if trie else [7, *others]
        entries = [{"key": each, "value": {"one": number, "other": number}} for each in listed]
        return policies.c_policy(source, maps=[{"name": "pairs", "values": entries}], outputs=outputs, interval="1s")

    with policies.run(writing(0)) as run:
        with calling() as rounds:
            for number in range(1, 12):
                run.apply(writing(number))
        found = {name: run.output(name)["total"]["value"] for name in names}
    assert found == {"missing": 0, "torn": 0, "whole": sum(rounds)} and len(rounds) > 1


def test_variables_beside_one_that_is_written_lose_no_count() -> None:
    """The section is one entry of an array: written whole, it would take back what was counted meanwhile."""
    source = """
u64 calls = 0;
u64 knob = 0;
ON_CALL { if (ours()) calls++; return 0; }
"""
    outputs = [{"name": "calls", "from": {"map": ".bss", "value": "calls"}, "counter": {}}]

    with policies.run(policies.c_policy(source, outputs=outputs, interval="1s")) as run:
        layout = run.measured.engine._installed.loaded[digests()[0]].maps[".bss"].layout  # type: ignore[attr-defined]
        place = map_layout.variable(layout, "knob")
        assert place is not None
        (pin,) = policies.folder().glob("probefleet/instances/*/map_%bss")
        with syscall.obj_get(str(pin)) as fd, calling() as rounds:
            for number in range(9973):
                maps.write_variables(fd, maps.info(fd), {place[0]: number.to_bytes(8, "little")})
            with pytest.raises(ProbefleetError, match="end at byte 16"):
                maps.write_variables(fd, maps.info(fd), {16: b"\1"})
        assert len(rounds) > 1 and run.output("calls")["total"]["value"] == sum(rounds)


@pytest.mark.parametrize(
    ("flag", "says"),
    [("BPF_F_RDONLY", "keeps user space from writing"), ("BPF_F_WRONLY_PROG", "programs may not read")],
)
def test_a_map_that_its_flags_close_takes_no_values(flag: str, says: str) -> None:
    source = COUNT.replace("__uint(max_entries, 4);", f"__uint(max_entries, 4); __uint(map_flags, {flag});")
    manifest = policies.c_policy(source, maps=[rules((1, {"bucket": 1}))], **COUNTS)
    with pytest.raises(BadInput, match=says):
        policies.prepare(manifest)


BCC = f"""
struct note {{ char text[12]; u16 weight; }};
BPF_HASH(notes, u32, struct note, 4);
BPF_ARRAY(steps, u64, 2);
BPF_HASH(counts, struct note, u64, 16);
TRACEPOINT_PROBE(syscalls, sys_enter_getppid)
{{
    u32 key = 110;
    int first = 1;
    struct note *note = notes.lookup(&key);
    u64 *step = steps.lookup(&first);
    if (bpf_get_current_pid_tgid() >> 32 != {os.getpid()} || !note || !step)
        return 0;
    counts.atomic_increment(*note, *step);
    return 0;
}}
"""


def by_bcc(notes: list[tuple[Any, Any]], steps: list[tuple[Any, Any]]) -> dict[str, Any]:
    written = [
        {"name": name, "values": [{"key": key, "value": value} for key, value in said]}
        for name, said in (("notes", notes), ("steps", steps))
    ]
    outputs = [{"name": "calls", "from": {"map": "counts"}, "topk": {}, "groupBy": ["key.text", "key.weight"]}]
    made = policies.c_policy("", maps=written, outputs=outputs, interval="1s")
    made["spec"]["program"] = {"bcc": {"source": BCC}}
    return made


def test_values_of_bccs_maps_are_laid_out_on_the_node_and_change_live() -> None:
    with policies.run(by_bcc([(110, {"text": "Hello World", "weight": 7})], [(1, 3)])) as run:
        before = digests()
        call_getppid(997)
        run.apply(by_bcc([(110, {"text": "Hey root!"}), (1, {})], [(1, "0x1")]))
        call_getppid(23)
        assert run.rows("calls") == {("Hello World", "7"): 3 * 997, ("Hey root!", "0"): 23}
        assert digests() == before
        with pytest.raises(AssertionError, match=r"values\[0\] of notes does not fit: weight: 70000 does not fit"):
            run.apply(by_bcc([(110, {"weight": 70000})], [(1, 1)]))
        call_getppid(5)
        assert run.rows("calls")[("Hey root!", "0")] == 28, "what was there goes on"


@pytest.mark.parametrize(
    ("notes", "steps", "says"),
    [
        ([(110, 7)], [], r"BadObject: maps: values\[0\] of notes does not fit: 7 is no struct"),
        ([], [(2, 1)], "BadObject: maps: steps has no place 2: it is an array of 2"),
        ([(each, {}) for each in range(5)], [], "BadObject: maps: 5 values for notes, which has room for 4"),
    ],
)
def test_what_does_not_fit_bccs_maps_is_said_by_the_node(
    notes: list[tuple[Any, Any]], steps: list[tuple[Any, Any]], says: str
) -> None:
    with policies.run(by_bcc(notes, steps), ready=False) as run:
        (status,) = run.measured.statuses()
        assert re.match(says, f"{status.reason}: {status.message}")


WRONG: list[tuple[list[dict[str, Any]], str]] = [
    ([{"key": 1, "value": {"bucket": 70000}}], r"\[0\].value.bucket: does not fit: 70000 does not fit unsigned short"),
    ([{"key": -1, "value": {}}], r"\[0\].key: does not fit: -1 does not fit unsigned int .*a key is 4 bytes"),
    (
        [{"key": 1, "value": {"buckets": 1}}],
        r"\[0\].value.buckets: .*no such field; a value is 12 bytes {0: u16 bucket, ",
    ),
    ([{"key": 1, "value": {"on": 1}}], r"\[0\].value.on: .*1 is neither true nor false"),
    ([{"key": 1, "value": {"note": "too long a note"}}], r'"too long a note" has 15 bytes, there is room for 8'),
    ([{"key": 1, "value": 7}], r"\[0\].value: .*7 is no struct: write its fields, as in {bucket: …, on: …, weight: …}"),
    ([{"key": 1, "value": {}}, {"key": "0x1", "value": {}}], r"\[1\].key: there twice"),
    ([{"key": each, "value": {}} for each in range(5)], r": 5 entries: rules has room for 4"),
]


@pytest.mark.parametrize(("entries", "says"), WRONG)
def test_what_does_not_fit_names_the_field_and_the_layout(entries: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(BadInput, match=r"spec.maps\[0\].values.*" + says):
        policies.prepare(policies.c_policy(COUNT, maps=[{"name": "rules", "values": entries}], **COUNTS))


def test_values_that_the_kernel_refuses_leave_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch fails half-way: the old entries are written back, and the policy says why."""
    from probefleet_agent.errors import KernelError

    with policies.run(policy((110, {"bucket": 7, "on": True, "weight": 1}))) as run:
        write, failed = maps.update_many, []

        def fail_once(fd: Any, keys: Any, values: Any) -> None:
            if not failed:
                failed.append(1)
                write(fd, keys[:1], values[:1])
                raise KernelError(12, "write 2 entries to map rules")
            write(fd, keys, values)

        monkeypatch.setattr(maps, "update_many", fail_once)
        with pytest.raises(AssertionError, match="OutOfMemory: write 2 entries"):
            run.apply(policy((110, {"bucket": 8, "on": True, "weight": 1}), (1, {})))
        call_getppid(23)
        assert run.rows("calls") == {("7",): 23}
        (pin,) = policies.folder().glob("probefleet/instances/*/map_rules")
        with syscall.obj_get(str(pin)) as fd:
            assert len(maps.read(fd, maps.info(fd))[0]) == 1
