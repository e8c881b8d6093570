"""``probefleet map list | dump | set``: decoded entries of a policy's pinned maps, in and out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from probefleet_agent.kernel import maps
from probefleet_cli import main, map_commands

from tests.kernel import policies
from tests.kernel.support import call_getppid

SOURCE = """
struct who { pid_nr_t pid; char name[8]; };
struct seen { u64 calls; u16 ports[2]; ipv4_t from; };
struct prefix { __u32 prefixlen; __be32 address; };
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, struct who); __type(value, struct seen); }
table SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(max_entries, 8); __uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix); __type(value, u64); } nets SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
each SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 4); __uint(key_size, 4); __uint(value_size, 4); }
ways SEC(".maps");
u64 calls = 0;
SEC("tracepoint") int other(void *ctx) { return 0; }
ON_CALL
{
	struct who key = { .pid = 7, .name = "seven" };
	struct seen *found;
	u32 zero = 0;
	u64 *count = bpf_map_lookup_elem(&each, &zero);
	if (!ours())
		return 0;
	calls++;
	found = bpf_map_lookup_elem(&table, &key);
	if (found)
		found->calls++;
	if (count)
		*count += 1;
	bpf_map_lookup_elem(&nets, &key);
	bpf_tail_call(ctx, &ways, 2);
	return 0;
}
"""


@pytest.fixture
def running() -> Iterator[policies.Run]:
    outputs = [{"name": "calls", "from": {"map": ".bss", "value": "calls"}, "counter": {}}]
    jumps = [{"map": "ways", "entries": {2: "other"}}]
    manifest = policies.c_policy(SOURCE, name="mine", outputs=outputs, tailCalls=jumps, interval="1s")
    with policies.run(manifest) as run:
        yield run


def command(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(main.machine, ["map", *arguments])
    assert done.exit_code == status, (done.output, done.exception)
    return str(done.output)


def entries(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(command("dump", "mine", name, "--output", "json"))["entries"]
    return found


def test_what_is_set_is_seen_by_the_program_and_dumped_again(running: policies.Run) -> None:
    command("set", "mine", "table", "{pid: 7, name: seven}", "{calls: 1000, ports: [80, 443], from: 10.0.0.1}")
    call_getppid(997)
    assert [(each["key"]["name"], each["value"]) for each in entries("table")] == [
        ("seven", {"calls": 1997, "ports": [80, 443], "from": "10.0.0.1"})
    ]
    command("set", "default/mine", "table", "{pid: 7, name: seven}", "--delete")
    assert entries("table") == []


def test_prefixes_cpus_variables_and_slots_are_shown_as_they_are_meant(running: policies.Run) -> None:
    command("set", "mine", "nets", "192.168.0.0/16", "23")
    command("set", "mine", "each", "0", "5")
    call_getppid(997)
    assert entries("nets") == [{"key": "192.168.0.0/16", "value": 23}]
    (each,) = entries("each")
    assert (each["key"], sum(each["value"])) == (0, 5 * maps.possible_cpus() + 997)
    assert entries(".bss") == [{"key": None, "value": {"calls": 997}}]
    (slot,) = entries("ways")
    assert (slot["key"], slot["value"]["program"]) == (2, "other")
    assert command("dump", "mine", "nets") == "192.168.0.0/16: 23\n"
    command("set", "mine", ".bss", "calls", "1000")
    call_getppid(23)
    assert entries(".bss") == [{"key": None, "value": {"calls": 1023}}]


def test_all_of_a_policys_maps_are_listed(running: policies.Run) -> None:
    listed = json.loads(command("list", "--output", "json"))["maps"]
    mine = {row["map"]: row for row in listed if row["policies"] == ["default/mine"]}
    assert set(mine) >= {"table", "nets", "each", "ways", ".bss"}
    assert mine["nets"]["type"] == "lpm-trie" and mine["nets"]["flags"] == ["no_prealloc"]
    assert mine["ways"]["notRead"] == "it holds programs" and mine["table"]["bytes"] > 0
    assert "default/mine" in command("list") and "percpu-array" in command("list")


def test_maps_that_go_while_they_are_listed_are_left_out(
    running: policies.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = list(map_commands._pinned(Path("/sys/fs/bpf")))
    gone = map_commands.Pinned(("default/gone",), "table", policies.folder() / "map_gone", None)
    monkeypatch.setattr(map_commands, "_pinned", lambda _: iter([gone, *there]))
    listed = json.loads(command("list", "--output", "json"))["maps"]
    assert "default/mine" in {owner for row in listed for owner in row["policies"]}
    assert "default/gone" not in {owner for row in listed for owner in row["policies"]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("dump", "nobody", "table"), "no policy nobody is pinned here; there is: .*default/mine"),
        (("dump", "mine", "tabel"), "mine has no map tabel; it has: .*table"),
        (("set", "mine", "table", "7", "{}"), "key 7 is no struct: .*a key is 12 bytes {0: pid_nr_t pid, 4: char name"),
        (("set", "mine", "each", "0", "x"), 'value "x" is no whole number'),
        (("set", "mine", "ways", "1", "1"), "no key that BTF describes|prog-array"),
        (("set", "mine", "table", "7"), "wants a VALUE, or --delete"),
        (("set", "mine", ".bss", "call", "1"), r"\.bss has no variable call; it has: calls"),
        (("set", "mine", ".bss", "calls", "x"), 'variable "x" is no whole number; a variable is 8 bytes {0: u64}'),
        (("set", "mine", ".bss", "calls", "--delete"), "calls is a global variable: it can be set, and not deleted"),
        (("set", "mine", ".rodata", "probefleet_tgid", "7"), r"\.rodata is fixed once a program is loaded"),
    ],
)
def test_what_is_wrong_is_said(running: policies.Run, arguments: tuple[str, ...], says: str) -> None:
    done = CliRunner().invoke(main.machine, ["map", *arguments])
    assert done.exception is not None
    assert re.search(says, str(done.exception)), done.exception


@pytest.mark.parametrize("kind", ["QUEUE", "STACK", "RINGBUF", "PERF_EVENT_ARRAY"])
def test_what_a_dump_would_take_out_is_left_to_outputs(kind: str) -> None:
    types = {
        "PERF_EVENT_ARRAY": "__uint(key_size, 4); __uint(value_size, 4);",
        "RINGBUF": "__uint(max_entries, 4096);",
    }
    inside = types.get(kind, "__uint(max_entries, 8); __type(value, u64);")
    source = f"""
struct {{ __uint(type, BPF_MAP_TYPE_{kind}); {inside} }} records SEC(".maps");
u64 calls = 0;
ON_CALL {{ if (ours()) calls++; return 0; }}
"""
    outputs = [{"name": "calls", "from": {"map": ".bss", "value": "calls"}, "counter": {}}]
    with policies.run(policies.c_policy(source, name="mine", outputs=outputs)):
        done = CliRunner().invoke(main.machine, ["map", "dump", "mine", "records"])
    assert str(done.exception) == (
        f"map records is of type {kind.lower().replace('_', '-')}, which is not read: reading takes its entries out; "
        "an output with events: {} does"
    )


WRITTEN = {
    "HASH": "",
    "PERCPU_HASH": "",
    "LRU_HASH": "",
    "LRU_PERCPU_HASH": "",
    "ARRAY": "",
    "PERCPU_ARRAY": "",
    "LPM_TRIE": "__uint(map_flags, BPF_F_NO_PREALLOC);",
}


def test_every_type_that_user_space_can_write_is_set_typed_by_btf_and_read_by_its_program() -> None:
    source = """
struct seen { u64 calls; u16 ports[2]; ipv4_t from; };
struct prefix { __u32 prefixlen; __be32 address; };
struct { __uint(type, BPF_MAP_TYPE_QUEUE); __uint(max_entries, 8); __type(value, u64); } waiting SEC(".maps");
u64 unused = 0;
"""
    for kind, more in WRITTEN.items():
        key = "struct prefix" if kind == "LPM_TRIE" else "u32"
        parts = f"__uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, 8); __type(key, {key}); {more}"
        source += f'struct {{ {parts} __type(value, struct seen); }} m_{kind.lower()} SEC(".maps");\n'
    source += "ON_CALL\n{\n\tu32 three = 3;\n\tstruct prefix host = { 32, bpf_htonl(0x0a010203) };\n"
    source += "\tstruct seen *found;\n\tu64 one = 1;\n\tif (!ours())\n\t\treturn 0;\n"
    source += "\tunused++;\n\tbpf_map_push_elem(&waiting, &one, 0);\n"
    for kind in WRITTEN:
        key = "&host" if kind == "LPM_TRIE" else "&three"
        source += f"\tfound = bpf_map_lookup_elem(&m_{kind.lower()}, {key});\n\tif (found)\n\t\tfound->calls++;\n"
    source += "\treturn 0;\n}\n"
    outputs = [{"name": "calls", "from": {"map": ".bss", "value": "unused"}, "counter": {}}]
    with policies.run(policies.c_policy(source, name="mine", outputs=outputs, interval="1s")):
        keys = {kind: "10.0.0.0/8" if kind == "LPM_TRIE" else "3" for kind in WRITTEN}
        for kind, key in keys.items():
            command("set", "mine", f"m_{kind.lower()}", key, "{calls: 1000, ports: [80, 443], from: 10.0.0.1}")
        call_getppid(997)
        for kind, key in keys.items():
            (found,) = [each for each in entries(f"m_{kind.lower()}") if str(each["key"]) == key]
            values = found["value"] if kind.startswith(("PERCPU", "LRU_PERCPU")) else [found["value"]]
            assert sum(each["calls"] for each in values) == 1000 * len(values) + 997, kind
            assert all((each["ports"], each["from"]) == ([80, 443], "10.0.0.1") for each in values), kind
        for kind, key in keys.items():
            if "ARRAY" not in kind:
                command("set", "mine", f"m_{kind.lower()}", key, "--delete")
                assert entries(f"m_{kind.lower()}") == []
        done = CliRunner().invoke(main.machine, ["map", "set", "mine", "m_array", "3", "--delete"])
        assert "cannot be deleted, but set to zero" in str(done.exception)
        done = CliRunner().invoke(main.machine, ["map", "set", "mine", "m_array", "8", "{}"])
        assert "m_array has no place 8: it is an array of 8" in str(done.exception)


def test_a_probe_map_is_dumped_and_set_by_its_own_name() -> None:
    source = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, u32); __type(value, u64); }
both SEC(".maps");
ON_CALL { u32 key = 7; if (ours()) probefleet_add(&both, &key, 1); return 0; }
"""
    shared = {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbeMap",
        "metadata": {"name": "conns"},
        "spec": {"type": "hash", "maxEntries": 8, "key": "u32 key", "value": "u64 calls"},
    }
    maps_of = [{"name": "both", "share": {"probeMap": "conns"}}]
    outputs = [{"name": "calls", "from": {"map": "both"}, "topk": {}, "groupBy": ["key"]}]
    manifest = policies.c_policy(source, name="mine", maps=maps_of, outputs=outputs, interval="1s")
    with policies.run(shared, manifest) as run:
        command("set", "conns", "conns", "7", "1000")
        call_getppid(997)
        assert command("dump", "default/conns", "conns") == "7: 1997\n"
        assert run.rows("calls") == {("7",): 1997}
