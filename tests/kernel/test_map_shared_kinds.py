"""ProbeMaps of the types whose entries are no plain keys and values: storage, program arrays, maps of maps."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest
from click.testing import CliRunner
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import features, map_storage, maps, syscall
from probefleet_agent.kernel.uapi import ProgramType
from probefleet_cli import local_pods, map_commands, preparation
from probefleet_cli.failures import BadInput
from probefleet_wire.map_types import MapType

from tests.kernel import policies
from tests.kernel.support import call_getppid, in_cgroup
from tests.kernel.test_map_shared import HEAD, OUTPUTS, priority_max, probe_map
from tests.kernel.test_map_types import needs_type

STORAGE_OUTPUTS = {**OUTPUTS, "outputs": [{"name": "calls", "from": {"map": "both"}, "topk": {}, "groupBy": []}]}
ON_ENTER = "int BPF_PROG({name}, struct pt_regs *regs, long id) {{ if (!ours() || id != {number}) return 0; {body} }}"
GETPPID, PRIORITY_MAX = {"x86_64": (110, 146), "aarch64": (173, 125)}[os.uname().machine]


def on_enter(name: str, number: int, body: str) -> str:
    return 'SEC("tp_btf/sys_enter")\n' + ON_ENTER.format(name=name, number=number, body=body) + "\n"


def dumped(*arguments: str) -> list[dict[str, Any]]:
    """What `probefleet map dump` prints of a ProbeMap here."""
    said = CliRunner().invoke(map_commands.maps, ["dump", *arguments, "-o", "json", "--bpffs", str(policies.folder())])
    assert said.exit_code == 0, said.output
    found: list[dict[str, Any]] = json.loads(said.output)["entries"]
    return found


def listed(name: str) -> dict[str, Any]:
    """What `probefleet map list` says of a ProbeMap here."""
    said = CliRunner().invoke(map_commands.maps, ["list", "-o", "json", "--bpffs", str(policies.folder())])
    assert said.exit_code == 0, said.output
    (found,) = [each for each in json.loads(said.output)["maps"] if each["map"] == name]
    assert isinstance(found, dict)
    return found


OWNERS = {
    "task-storage": "bpf_task_storage_get(&both, bpf_get_current_task_btf(), 0, BPF_LOCAL_STORAGE_GET_F_CREATE)",
    "cgrp-storage": "bpf_cgrp_storage_get(&both, bpf_get_current_task_btf()->cgroups->dfl_cgrp, 0, "
    "BPF_LOCAL_STORAGE_GET_F_CREATE)",
}


@pytest.mark.parametrize("kind", OWNERS)
@pytest.mark.shows("map/{kind}")
def test_storage_is_one_for_the_programs_of_two_policies(kind: str) -> None:
    """Both add to what one task, or one cgroup, has: there is one entry, with what both counted."""
    needs_type(MapType[kind.upper().replace("-", "_")])
    declaration = (
        f"struct {{ __uint(type, BPF_MAP_TYPE_{kind.upper().replace('-', '_')}); "
        '__uint(map_flags, BPF_F_NO_PREALLOC); __type(key, int); __type(value, u64); } both SEC(".maps");\n'
    )
    adds = f"u64 *n = {OWNERS[kind]}; if (n) __sync_fetch_and_add(n, 1); return 0;"
    first = policies.c_policy(declaration + on_enter("first", GETPPID, adds), name="first", **STORAGE_OUTPUTS)
    second = policies.c_policy(declaration + on_enter("second", PRIORITY_MAX, adds), name="second", **STORAGE_OUTPUTS)
    made = probe_map(kind, value="u64 calls")
    del made["spec"]["maxEntries"]
    with policies.run(made, first, second) as run:
        call_getppid(997)
        priority_max(23)
        assert [run.output("calls", each)["total"]["value"] for each in (0, 1)] == [1020, 1020]
        assert [entry["value"] for entry in dumped("both", "both")] == [1020]
        run.apply(made, second)
        call_getppid(5)
        priority_max(7)
        run.measured.sample_rest()
        assert run.measured.results()[1].outputs[0].total.whole == 1027, "the first one's program has gone"
        assert listed("both")["type"] == kind


@pytest.mark.shows("map/sk-storage")
def test_storage_of_sockets_is_one_for_the_programs_of_two_policies() -> None:
    """One program counts in the socket what leaves by it, the other reads that when the socket is closed."""
    declaration = (
        "struct { __uint(type, BPF_MAP_TYPE_SK_STORAGE); __uint(map_flags, BPF_F_NO_PREALLOC); "
        '__type(key, int); __type(value, u64); } both SEC(".maps");\n'
    )
    made = probe_map("sk-storage", value="u64 packets")
    del made["spec"]["maxEntries"]
    with in_cgroup("pf-test-sockets") as path:
        writer = policies.c_policy(
            "u64 sent = 0;\n"
            + declaration
            + """SEC("cgroup_skb/egress") int on_packet(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	u64 *packets;

	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	packets = sk ? bpf_sk_storage_get(&both, sk, 0, BPF_LOCAL_STORAGE_GET_F_CREATE) : NULL;

	if (packets)
		__sync_fetch_and_add(packets, 1);
	__sync_fetch_and_add(&sent, 1);
	return 1;
}
""",
            name="writer",
            **{**OUTPUTS, "outputs": [{"name": "sent", "from": {"map": ".bss", "value": "sent"}, "counter": {}}]},
            attach=[{"program": "on_packet", "cgroupSkb": {"cgroup": path, "direction": "egress"}}],
        )
        reader = policies.c_policy(
            "u64 packets = 0;\n"
            + declaration
            + """SEC("cgroup/sock_release") int on_close(struct bpf_sock *sk)
{
	u64 *count = bpf_sk_storage_get(&both, sk, 0, 0);

	if (count)
		__sync_fetch_and_add(&packets, *count);
	return 1;
}
""",
            name="reader",
            **{**OUTPUTS, "outputs": [{"name": "packets", "from": {"map": ".bss", "value": "packets"}, "counter": {}}]},
            attach=[{"program": "on_close", "cgroupSock": {"cgroup": path, "hook": "release"}}],
        )
        with policies.run(made, writer, reader) as run:
            for count in (997, 23):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    for _ in range(count):
                        sender.sendto(b"x", ("127.0.0.1", 9))
            assert run.output("sent", 0)["total"]["value"] == run.output("packets", 1)["total"]["value"] == 1020
            said = listed("both")
            assert said["notRead"] == "its entries lie in sockets, which cannot be listed" and said["bytes"] > 0


@pytest.mark.parametrize("kind", ["cgroup-storage", "percpu-cgroup-storage"])
@pytest.mark.shows("map/{kind}")
def test_storage_of_attachments_is_one_for_the_programs_of_two_policies(kind: str) -> None:
    """By the cgroup alone (a key of eight bytes): programs of all hooks there have one entry."""
    declaration = (
        f"struct {{ __uint(type, BPF_MAP_TYPE_{kind.upper().replace('-', '_')}); __type(key, u64); "
        '__type(value, u64); } both SEC(".maps");\n'
    )
    made = probe_map(kind, key="u64 cgroup", value="u64 sockets")
    del made["spec"]["maxEntries"]

    def of(hook: str, path: str, weight: int) -> dict[str, Any]:
        body = f"u64 *n = bpf_get_local_storage(&both, 0); if (ours()) __sync_fetch_and_add(n, {weight}); return 1;"
        return policies.c_policy(
            f'{declaration}SEC("cgroup/sock_{hook}") int on_{hook}(struct bpf_sock *sk) {{ {body} }}\n',
            name=hook,
            **{**OUTPUTS, "outputs": [{"name": "sockets", "from": {"map": "both"}, "counter": {}}]},
            attach=[{"program": f"on_{hook}", "cgroupSock": {"cgroup": path, "hook": hook}}],
        )

    with (
        in_cgroup("pf-test-attached") as path,
        policies.run(made, of("create", path, 1), of("release", path, 10)) as run,
    ):
        for _ in range(997):
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        assert [run.output("sockets", each)["total"]["value"] for each in (0, 1)] == [997 * 11, 997 * 11]


JUMPER = """
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 8); __uint(key_size, 4); __uint(value_size, 4); }
both SEC(".maps");
SEC("tracepoint/syscalls/sys_enter_SYSCALL") int on_call(void *ctx)
{
	if (!ours())
		return 0;
	bpf_tail_call(ctx, &both, SLOT);
	return count(0);
}
"""
JUMPED_TO = 'SEC("tracepoint") int in_slot(void *ctx) { return count(1); }\n'


def jumper(name: str = "jumper", slot: int = 3, call: str = "getppid") -> dict[str, Any]:
    source = JUMPER.replace("SYSCALL", call).replace("SLOT", str(slot))
    return policies.c_policy(HEAD + source, name=name, **OUTPUTS)


def filler(name: str = "filler", slot: int = 3, key: int = 1, **more: Any) -> dict[str, Any]:
    """It puts a program into the slot, and jumps through none itself."""
    source = HEAD + JUMPER.split('SEC("tracepoint')[0] + JUMPED_TO.replace("count(1)", f"count({key})")
    calls = [{"map": "both", "entries": {str(slot): "in_slot"}}]
    return policies.c_policy(source, name=name, **OUTPUTS, tailCalls=calls, **more)


@pytest.mark.shows("map/prog-array")
def test_one_policy_fills_the_slots_that_another_jumps_through() -> None:
    made = probe_map("prog-array", maxEntries=8)
    with policies.run(made, jumper(), filler()) as run:
        call_getppid(997)
        assert (run.rows("calls", 0).get(("0",), 0), run.rows("calls", 1)[("1",)]) == (0, 997)
        (entry,) = dumped("both", "both")
        assert (entry["key"], entry["value"]["program"]) == (3, "in_slot")
        # The policy that fills it is edited: another program, and then another slot, without a jump into nothing.
        run.apply(made, jumper(), filler(key=2))
        call_getppid(23)
        assert run.rows("calls", 1)[("2",)] == 23
        run.apply(made, jumper(), filler(slot=4, key=2))
        call_getppid(5)
        assert run.rows("calls", 0)[("0",)] == 5, "slot 3 is empty: the jump goes on behind the call"
        assert [entry["key"] for entry in dumped("both", "both")] == [4]
        run.apply(made, jumper())
        assert dumped("both", "both") == [], "a policy takes its programs with it"
        call_getppid(7)
        run.measured.sample_rest()
        assert run.rows("calls", 0)[("0",)] == 12


def test_a_program_of_bcc_jumps_into_one_of_libbpfs() -> None:
    source = f"""
BPF_PROG_ARRAY(both, 8);
BPF_ARRAY(counts, u64, 4);
TRACEPOINT_PROBE(syscalls, sys_enter_getppid)
{{
	if (bpf_get_current_pid_tgid() >> 32 != {os.getpid()})
		return 0;
	both.call(args, 3);
	counts.increment(0);
	return 0;
}}
"""
    bcc = policies.c_policy("", name="bcc", **OUTPUTS)
    bcc["spec"]["program"] = {"bcc": {"source": source}}
    made = probe_map("prog-array", maxEntries=8)
    with policies.run(made, bcc, filler()) as run:
        call_getppid(997)
        assert run.rows("calls", 1)[("1",)] == 997
        run.apply(made, bcc)
        call_getppid(23)
        assert run.rows("calls", 0)[("0",)] == 23


def test_a_slot_belongs_to_one_policy() -> None:
    made = probe_map("prog-array", maxEntries=8)
    with policies.run(made, jumper(), filler("one"), filler("other"), ready=False) as run:
        said = run.measured.statuses()
        late = next(at for at, each in enumerate(said) if each.reason)  # whichever comes later
        assert [each.reason for each in said] == ["", *("SlotTaken" if at == late else "" for at in (1, 2))]
        words = f"slot 3 of both holds a program of c/{'one' if late == 2 else 'other'}, which shares the ProbeMap"
        assert words in said[late].message
        call_getppid(997)
        assert run.rows("calls", 3 - late)[("1",)] == 997
        names = ["one", "other"]
        run.apply(made, jumper(), filler(names[late - 1]))  # unedited: it has the slot as soon as it is free
        call_getppid(23)
        assert run.rows("calls", late)[("1",)] == 23
        run.apply(made, jumper(), filler("one"), filler("other", slot=4))
        assert sorted(entry["key"] for entry in dumped("both", "both")) == [3, 4]
        # An edit that asks for a slot of the other's keeps what it had.
        run.measured.engine.apply(push_of(9, made, jumper(), filler("one", slot=4), filler("other", slot=4)))
        assert {each.reason for each in run.measured.engine.status().policies} == {"", "SlotTaken"}
        assert sorted(entry["key"] for entry in dumped("both", "both")) == [3, 4]
        run.measured.engine.apply(push_of(10, made, jumper(), filler("one", slot=4)))
        assert {each.reason for each in run.measured.engine.status().policies} == {""}
        assert sorted(entry["key"] for entry in dumped("both", "both")) == [4]


def push_of(version: int, *manifests: dict[str, Any]) -> Any:
    return preparation.push(policies.prepare(*manifests), pods=local_pods.find(), namespace=None, version=version)


def test_programs_of_another_type_do_not_jump_through_a_shared_array() -> None:
    made = probe_map("prog-array", maxEntries=8)
    source = JUMPER.replace("tracepoint/syscalls/sys_enter_SYSCALL", "raw_tp/sys_enter").replace("SLOT", "3")
    other = policies.c_policy(HEAD + source, name="other", **OUTPUTS)
    with policies.run(made, jumper(), other, ready=False) as run:
        # Whichever comes first decides, for good.
        (first,) = [each for each in run.measured.statuses() if not each.reason]
        (said,) = [each for each in run.measured.statuses() if each.reason]
        kinds = ("raw_tracepoint", "tracepoint") if "jumper" in first.policy_uid else ("tracepoint", "raw_tracepoint")
        assert said.reason == "LayoutMismatch"
        words = f"on_call jumps through both and is a program of type {kinds[0]}; the ProbeMap is for programs of type"
        assert f"{words} {kinds[1]}, as the first was that used it" in said.message


def test_what_is_detached_for_its_budget_leaves_its_slots() -> None:
    made = probe_map("prog-array", maxEntries=8)
    with policies.run(made, jumper(), filler()) as run:
        installed = run.measured.engine._installed  # type: ignore[attr-defined]
        (digest,) = [digest for digest, each in installed.loaded.items() if each.instance.title == "c/filler"]
        loaded = installed.loaded[digest]
        loaded.detached = "over its budget"
        installed.detach(digest)
        call_getppid(23)
        assert dumped("both", "both") == [] and run.rows("calls", 0)[("0",)] == 23
        assert installed.attach_again(loaded) is None
        call_getppid(997)
        assert (run.rows("calls", 1)[("1",)], run.rows("calls", 0)[("0",)]) == (997, 23)


def test_an_agent_that_starts_again_finds_the_slots_as_they_were_and_clears_what_is_nobodys() -> None:
    made = probe_map("prog-array", maxEntries=8)
    with policies.run(made, jumper(), filler()) as run:
        uid = "local-default-both"
        with syscall.obj_get(str(policies.folder() / f"probefleet/maps/{uid}/map_map")) as array:
            stray = syscall.map_lookup(array, (3).to_bytes(4, "little"), 4)
            assert stray is not None
            code = features.RETURN_ZERO
            with syscall.prog_load(code, ProgramType.TRACEPOINT, licence="GPL", name="stray") as program:
                syscall.map_update(array, (5).to_bytes(4, "little"), int(program).to_bytes(4, "little"))
            with Engine.open(bpffs=policies.folder()):
                pass
            assert [entry["key"] for entry in dumped("both", "both")] == [3]
        call_getppid(23)
        assert run.rows("calls", 1)[("1",)] == 23


def test_a_map_that_grows_takes_its_policies_programs_out_of_shared_slots_meanwhile() -> None:
    """The filler's program counts in a ProbeMap that grows: what jumps into it counts there before and after."""
    slots = probe_map("prog-array", maxEntries=8)
    grown = {
        entries: {
            **probe_map("hash", key="u32 k", value="u64 n", maxEntries=entries),
            "metadata": {"name": "grows"},
        }
        for entries in (16, 64)
    }
    source = HEAD + JUMPER.split('SEC("tracepoint')[0]
    source += (
        table_of("grows")
        + 'SEC("tracepoint") int in_slot(void *ctx) { u32 k = 7; probefleet_add(&grows, &k, 1); return 0; }\n'
    )
    fills = policies.c_policy(
        source,
        name="filler",
        interval="1s",
        outputs=[{"name": "calls", "from": {"map": "grows"}, "counter": {}}],
        maps=[*OUTPUTS["maps"], {"name": "grows", "share": {"probeMap": "grows"}}],
        tailCalls=[{"map": "both", "entries": {"3": "in_slot"}}],
    )
    with policies.run(slots, grown[16], jumper(), fills) as run:
        call_getppid(997)
        assert run.output("calls", 1)["total"]["value"] == 997
        run.apply(slots, grown[64], jumper(), fills)
        call_getppid(23)
        assert run.output("calls", 1)["total"]["value"] == 1020
        assert listed("grows")["entries"] == 64


def table_of(name: str) -> str:
    parts = "__uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 16); __type(key, u32); __type(value, u64);"
    return f'struct {{ {parts} }} {name} SEC(".maps");\n'


NESTED = """
struct inner { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 16); __type(key, u32); __type(value, u64); };
struct { __uint(type, OUTER); __uint(max_entries, 4); __uint(key_size, 4); __array(values, struct inner); }
both SEC(".maps");
static __always_inline int add(u32 place, u32 key)
{
	void *inner = bpf_map_lookup_elem(&both, &place);

	return inner ? (probefleet_add(inner, &key, 1) ? 0 : 0) : count(3);
}
"""


@pytest.mark.parametrize("kind", ["array-of-maps", "hash-of-maps"])
@pytest.mark.shows("map/{kind}")
def test_the_inner_maps_of_a_probe_map_are_one_for_both(kind: str) -> None:
    """Two policies count in the same inner maps; where there is none (place 9) they say so."""
    inner: dict[str, Any] = {"type": "hash", "maxEntries": 16, "key": "u32 k", "value": "u64 n"}
    made = probe_map(kind, maxEntries=4, inner=inner)
    if kind == "hash-of-maps":
        made["spec"]["key"], inner["keys"] = "u32 place", [0, 3]
    source = HEAD + NESTED.replace("OUTER", "BPF_MAP_TYPE_" + kind.upper().replace("-", "_"))
    outputs = {
        **OUTPUTS,
        "outputs": [
            {"name": "sums", "from": {"map": "both"}, "topk": {}, "groupBy": ["key.outer", "key"]},
            {"name": "calls", "from": {"map": "counts"}, "topk": {}, "groupBy": ["key"]},
        ],
    }
    first = policies.c_policy(source + "ON_CALL { return ours() ? add(3, 5) : 0; }", name="first", **outputs)
    second = policies.c_policy(
        source + "ON_OTHER { if (!ours()) return 0; add(3, 5); add(0, 7); return add(9, 1); }", name="second", **outputs
    )
    with policies.run(made, first, second) as run:
        call_getppid(997)
        priority_max(23)
        wanted = {("3", "5"): 1020, ("0", "7"): 23}
        assert [run.rows("sums", each) for each in (0, 1)] == [wanted, wanted]
        assert run.rows("calls", 1)[("3",)] == 23
        found = {(entry["key"]["outer"], entry["key"]["key"]): entry["value"] for entry in dumped("both", "both")}
        assert found == {(3, 5): 1020, (0, 7): 23}
        count = 4 if kind == "array-of-maps" else 2
        (said,) = run.measured.engine.status().probe_maps  # type: ignore[attr-defined]
        with syscall.obj_get(str(policies.folder() / "probefleet/maps/local-default-both/map_map")) as outer:
            alone, inner_maps = maps.memory_used_bytes(outer), list(map_storage.inner_maps(outer, maps.info(outer)))
            sizes = [maps.memory_used_bytes(each) for _, each in inner_maps]
            for _, each in inner_maps:
                each.close()
        assert len(sizes) == count and said.bytes == listed("both")["bytes"] == alone + sum(sizes)


def test_inner_maps_have_to_fit() -> None:
    made = probe_map("array-of-maps", maxEntries=4, inner={"type": "array", "maxEntries": 16, "value": "u64 n"})
    source = HEAD + NESTED.replace("OUTER", "BPF_MAP_TYPE_ARRAY_OF_MAPS") + "ON_CALL { return add(0, 1); }"
    with pytest.raises(BadInput, match="of its inner maps it is of type hash, the ProbeMap of array"):
        policies.prepare(made, policies.c_policy(source, **OUTPUTS))
