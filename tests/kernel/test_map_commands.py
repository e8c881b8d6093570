"""``probefleet map list | dump | set``: decoded entries of a policy's pinned maps, in and out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from probefleet_agent.kernel import maps
from probefleet_cli import main

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


def test_all_of_a_policys_maps_are_listed(running: policies.Run) -> None:
    listed = json.loads(command("list", "--output", "json"))["maps"]
    mine = {row["map"]: row for row in listed if row["policies"] == ["default/mine"]}
    assert set(mine) >= {"table", "nets", "each", "ways", ".bss"}
    assert mine["nets"]["type"] == "lpm-trie" and mine["nets"]["flags"] == ["no_prealloc"]
    assert mine["ways"]["notRead"] == "it holds programs" and mine["table"]["bytes"] > 0
    assert "default/mine" in command("list") and "percpu-array" in command("list")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("dump", "nobody", "table"), "no policy nobody is pinned here; there is: .*default/mine"),
        (("dump", "mine", "tabel"), "mine has no map tabel; it has: .*table"),
        (("set", "mine", "table", "7", "{}"), "key 7 is no struct: .*a key is 12 bytes {0: pid_nr_t pid, 4: char name"),
        (("set", "mine", "each", "0", "x"), 'value "x" is no whole number'),
        (("set", "mine", "ways", "1", "1"), "no key that BTF describes|prog-array"),
        (("set", "mine", "table", "7"), "wants a VALUE, or --delete"),
    ],
)
def test_what_is_wrong_is_said(running: policies.Run, arguments: tuple[str, ...], says: str) -> None:
    done = CliRunner().invoke(main.machine, ["map", *arguments])
    assert done.exception is not None
    assert re.search(says, str(done.exception)), done.exception
