"""What is recorded: each scenario makes numbers that are known before, and says what its frames must come to."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

from tests.recordings.stage import API, OTHER, SHOP, Json, Stage, held

UID = 61027  # of nobody on this machine

SYSCOUNT = {
    "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": "sched_get_priority_max"}}},
    "interval": "1s",
    "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}],
}


async def two_nodes(stage: Stage) -> Json:
    """A namespace's two pods on two nodes make 997 and 23 calls; a pod of another namespace makes 59."""
    web, cart = stage.pod(SHOP, "web-1", "node1"), stage.pod(SHOP, "cart-1", "node2")
    stranger = stage.pod(OTHER, "stranger-1", "node1")
    stage.agent("node1"), stage.agent("node2")
    stage.apply("ProbePolicy", "calls", SYSCOUNT)
    await stage.until(lambda: stage.condition("calls", "Programmed"), "calls is Programmed")
    with (
        held(web, "calls", "rare", "997") as first,
        held(cart, "calls", "rare", "23") as second,
        held(stranger, "calls", "rare", "59") as third,
    ):
        for go in (first, second, third):
            await asyncio.to_thread(go)
        await stage.until(lambda: stage.total("calls", "calls") >= 1020, "1,020 calls in the report")
    await stage.removed("calls")
    return {"calls": {"calls": {"web-1": 997, "cart-1": 23}}}


BCC = """BPF_HASH(execs, u32);
TRACEPOINT_PROBE(syscalls, sys_enter_execve)
{
    u32 uid = bpf_get_current_uid_gid();

    execs.increment(uid);
    return 0;
}
"""


async def bcc(stage: Stage) -> Json:
    """BCC's C counts execve by user: 23 of a user that nobody else is."""
    stage.agent("node1")
    spec: Json = {
        "scope": "Cluster",
        "nodes": {"selector": {"matchLabels": {"pool": "web"}}},
        "program": {"bcc": {"source": BCC}},
        "interval": "1s",
        "outputs": [
            {
                "name": "execs",
                "from": {"map": "execs"},
                "topk": {},
                "groupBy": ["key"],
                "decode": {"key": "uid"},
                "limit": 50,
            }
        ],
    }
    with held(None, "execs", "23", user=UID) as go:
        stage.apply("ProbePolicy", "execs", spec)
        await stage.until(lambda: stage.condition("execs", "Programmed"), "execs is Programmed")
        await asyncio.to_thread(go)

        def counted() -> bool:
            status = stage.read("probereports/execs").get("status", {})
            rows = {row["key"][0]: row["value"] for each in status.get("outputs", ()) for row in each["total"]["rows"]}
            return int(rows.get(str(UID), 0)) >= 23

        await stage.until(counted, "23 execs in the report")
    await stage.removed("execs")
    return {"execs": {"execs": {str(UID): 23}}}


async def events_across_kill(stage: Stage) -> Json:
    """A pod starts 11 programs, 7 while the agent is dead by kill -9, and 5 after it came back: 23 records, once."""
    starter = stage.pod(SHOP, "starter-1", "node1")
    agent = stage.agent("node1")
    with (
        held(starter, "execs", "11") as before,
        held(starter, "execs", "7") as without,
        held(starter, "execs", "5") as after,
    ):
        spec = {"program": {"catalog": {"name": "execsnoop"}}, "interval": "1s"}
        stage.apply("ProbePolicy", "starts", {**spec, "nodes": {"selector": {"matchLabels": {"pool": "web"}}}})
        await stage.until(lambda: stage.condition("starts", "Programmed"), "starts is Programmed")
        await asyncio.to_thread(before)
        await stage.until(lambda: stage.total("starts", "events") >= 11, "11 records in the report")
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        await asyncio.to_thread(without)
        stage.agent("node1")
        await stage.until(lambda: stage.total("starts", "events") >= 18, "18 records in the report")
        await asyncio.to_thread(after)
        await stage.until(lambda: stage.total("starts", "events") >= 23, "23 records in the report")
        await stage.until(lambda: stage.total("starts", "execs") >= 23, "23 execs in the report")
    await stage.removed("starts")
    return {"starts": {"events": 23, "execs": 23}}


BROKEN = """#include <probefleet.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, u32);
	__type(value, u64);
} counts SEC(".maps");

SEC("tp_btf/sched_switch")
int on_switch(void *ctx)
{
	u32 key = 1;
	u64 *count = bpf_map_lookup_elem(&counts, &key);

	%s
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
"""


async def refused(stage: Stage) -> Json:
    """A program that the verifier refuses: held after one node, beside a policy that counts; then it is mended."""
    web = stage.pod(SHOP, "web-2", "node2")
    stage.agent("node1"), stage.agent("node2")
    stage.apply("ProbePolicy", "healthy", SYSCOUNT)
    await stage.until(lambda: stage.condition("healthy", "Programmed"), "healthy is Programmed")
    stage.apply("ProbePolicy", "broken", {"scope": "Cluster", "program": {"c": {"source": BROKEN % "*count += 1;"}}})

    def failed() -> bool:
        return bool(stage.read("probepolicies/broken").get("status", {}).get("failures"))

    await stage.until(failed, "broken has failed")
    with held(web, "calls", "rare", "101") as go:
        await asyncio.to_thread(go)
        await stage.until(lambda: stage.total("healthy", "calls") >= 101, "101 calls in the report")
    stage.apply(
        "ProbePolicy", "broken", {"scope": "Cluster", "program": {"c": {"source": BROKEN % "if (count) *count += 1;"}}}
    )
    await stage.until(lambda: stage.condition("broken", "Programmed", 2), "broken is mended")
    await stage.removed("healthy", "broken")
    return {"healthy": {"calls": {"web-2": 101}}}


WRITER = """
BPF_HASH(execs, u32, u64, 1024);

TRACEPOINT_PROBE(syscalls, sys_enter_execve)
{
    u32 uid = bpf_get_current_uid_gid();

    execs.increment(uid);
    return 0;
}
"""
READER = """#include <probefleet.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, u64);
} execs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, user_id_t);
	__type(value, u64);
} seen SEC(".maps");

SEC("tp_btf/sched_process_exec")
int on_exec(void *ctx)
{
	u32 uid = bpf_get_current_uid_gid();
	u64 *count = bpf_map_lookup_elem(&execs, &uid);

	if (count)
		bpf_map_update_elem(&seen, &uid, count, BPF_ANY);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
"""


async def shared(stage: Stage) -> Json:
    """A ProbeMap that a BCC program writes and a CO-RE program reads: 23 in both; the writer goes before the reader."""
    stage.agent("node1")
    stage.apply("ProbeMap", "by-uid", {"type": "hash", "maxEntries": 1024, "key": "u32 uid", "value": "u64 execs"})
    spec: Json = {
        "scope": "Cluster",
        "nodes": {"selector": {"matchLabels": {"pool": "web"}}},
        "maps": [{"name": "execs", "share": {"probeMap": "by-uid"}}],
        "interval": "1s",
    }
    output: Json = {"gauge": {"merge": "max"}, "groupBy": ["key"], "limit": 50}
    writes = {"name": "execs", "from": {"map": "execs"}, "decode": {"key": "uid"}, **output}
    reads = {"name": "seen", "from": {"map": "seen"}, **output}
    with held(None, "execs", "23", user=UID) as go:
        stage.apply("ProbePolicy", "writer", {**spec, "program": {"bcc": {"source": WRITER}}, "outputs": [writes]})
        stage.apply("ProbePolicy", "reader", {**spec, "program": {"c": {"source": READER}}, "outputs": [reads]})
        for name in ("writer", "reader"):
            await stage.until(lambda name=name: stage.condition(name, "Programmed"), f"{name} is Programmed")
        await asyncio.to_thread(go)

        def counted(policy: str) -> bool:
            status = stage.read(f"probereports/{policy}").get("status", {})
            rows = {row["key"][0]: row["value"] for each in status.get("outputs", ()) for row in each["total"]["rows"]}
            return int(rows.get(str(UID), 0)) >= 23

        for name in ("writer", "reader"):
            await stage.until(lambda name=name: counted(name), f"23 execs in {name}'s report")
    await asyncio.to_thread(stage.plane.request, "DELETE", f"{API}/{SHOP}/probepolicies/writer")
    await stage.until(lambda: all(len(each.policies) == 1 for each in stage.newest()), "the writer has gone")
    await stage.removed("reader")
    await asyncio.to_thread(stage.plane.request, "DELETE", f"{API}/{SHOP}/probemaps/by-uid")
    return {"writer": {"execs": {str(UID): 23}}, "reader": {"seen": {str(UID): 23}}}


SCENARIOS: dict[str, Callable[[Stage], Awaitable[Json]]] = {
    "two-nodes": two_nodes,
    "bcc": bcc,
    "events-across-kill": events_across_kill,
    "refused": refused,
    "shared": shared,
}
