"""ProbeMaps of every type: what one policy's program puts in, another's takes out, each exactly."""

from __future__ import annotations

import os
from typing import Any

import pytest
from probefleet_cli import measurement
from probefleet_cli.failures import BadInput

from tests.kernel import policies
from tests.kernel.support import call_getppid

HEAD = """
#define ON_OTHER SEC("tracepoint/syscalls/sys_enter_sched_get_priority_max") int on_other(void *ctx)
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 4); __type(key, u32); __type(value, u64); }
counts SEC(".maps");
static __always_inline int count(u32 key) { probefleet_add(&counts, &key, 1); return 0; }
"""
OUTPUTS = {
    "outputs": [{"name": "calls", "from": {"map": "counts"}, "topk": {}, "groupBy": ["key"]}],
    "interval": "1s",
    "maps": [{"name": "both", "share": {"probeMap": "both"}}],
}


def priority_max(times: int) -> None:
    for _ in range(times):
        os.sched_get_priority_max(os.SCHED_OTHER)


def probe_map(kind: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbeMap",
        "metadata": {"name": "both"},
        "spec": {"type": kind, "maxEntries": 4096, **spec},
    }


def declared(kind: str, *parts: str) -> str:
    inside = " ".join(parts)
    return f'struct {{ __uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, 4096); {inside} }} both SEC(".maps");\n'


def pair(declaration: str, writes: str, reads: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """getppid's program writes, the other one's reads; both count what came of it."""
    writer = policies.c_policy(
        f"{HEAD}{declaration}ON_CALL {{ if (!ours()) return 0; {writes} }}", name="writer", **OUTPUTS
    )
    reader = policies.c_policy(
        f"{HEAD}{declaration}ON_OTHER {{ if (!ours()) return 0; {reads} }}", name="reader", **OUTPUTS
    )
    return writer, reader


@pytest.mark.parametrize("kind", ["queue", "stack"])
def test_what_one_program_pushes_another_pops(kind: str) -> None:
    writer, reader = pair(
        declared(kind.upper(), "__type(value, u64);"),
        "u64 one = 1; return count(bpf_map_push_elem(&both, &one, 0) ? 1 : 0);",
        "u64 got; return count(bpf_map_pop_elem(&both, &got) ? 1 : 0);",
    )
    with policies.run(probe_map(kind, value="u64 n"), writer, reader) as run:
        call_getppid(23)
        priority_max(30)
        assert run.rows("calls", 0)[("0",)] == 23
        found = run.rows("calls", 1)
        assert (found[("0",)], found[("1",)]) == (23, 7), "the queue was empty seven times"


def test_a_bloom_filter_knows_what_another_program_saw() -> None:
    writer, reader = pair(
        declared("BLOOM_FILTER", "__type(value, u32);"),
        "u32 pid = only; return count(bpf_map_push_elem(&both, &pid, 0) ? 1 : 0);",
        "u32 pid = only; return count(bpf_map_peek_elem(&both, &pid) ? 1 : 0);",
    )
    with policies.run(probe_map("bloom-filter", value="u32 pid"), writer, reader) as run:
        priority_max(23)
        call_getppid(1)
        priority_max(997)
        found = run.rows("calls", 1)
        assert (found[("1",)], found[("0",)]) == (23, 997)


def test_a_trie_is_looked_up_by_another_program() -> None:
    writer, reader = pair(
        "struct where { u32 prefixlen; ipv4_t address; };\n"
        + declared(
            "LPM_TRIE", "__uint(map_flags, BPF_F_NO_PREALLOC);", "__type(key, struct where); __type(value, u64);"
        ),
        "struct where net = { .prefixlen = 8, .address = bpf_htonl(0x0a000000) }; u64 zero = 0;"
        " return count(bpf_map_update_elem(&both, &net, &zero, 0) ? 1 : 0);",
        "struct where host = { .prefixlen = 32, .address = bpf_htonl(0x0a010203) };"
        " return count(bpf_map_lookup_elem(&both, &host) ? 0 : 1);",
    )
    trie = probe_map("lpm-trie", key="struct { u32 prefixlen; ipv4_t address; }", value="u64 n")
    with policies.run(trie, writer, reader) as run:
        priority_max(5)
        call_getppid(1)
        priority_max(997)
        found = run.rows("calls", 1)
        assert (found[("1",)], found[("0",)]) == (5, 997)


def test_a_per_cpu_lru_hash_is_one_for_both() -> None:
    writer, reader = pair(
        declared("LRU_PERCPU_HASH", "__type(key, u32); __type(value, u64);"),
        "u32 key = 7; u64 one = 1; return count(bpf_map_update_elem(&both, &key, &one, 0) ? 1 : 0);",
        "u32 key = 7; return count(bpf_map_lookup_elem(&both, &key) ? 0 : 1);",
    )
    with policies.run(probe_map("lru-percpu-hash", key="u32 k", value="u64 n"), writer, reader) as run:
        call_getppid(1)
        priority_max(997)
        assert run.rows("calls", 1)[("0",)] == 997


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"type": "queue"}, "a map of type queue has a value"),
        ({"type": "bloom-filter", "key": "u32 k", "value": "u32 v"}, "a key in a map of type bloom-filter"),
        ({"type": "lpm-trie", "value": "u32 v"}, "a map of type lpm-trie has a key"),
        ({"type": "lpm-trie", "key": "u64 k", "value": "u32 v"}, "begins with the length of the prefix in bits"),
    ],
)
def test_wrong_probe_maps_are_refused(spec: dict[str, Any], says: str) -> None:
    made = probe_map(spec.pop("type"), **spec)
    with pytest.raises(BadInput, match=says):
        policies.prepare(made, policies.c_policy(HEAD + "ON_CALL { return count(0); }"))


def test_no_output_drains_what_others_pop() -> None:
    source = (
        HEAD
        + declared("QUEUE", "__type(value, u64);")
        + "ON_CALL { u64 n = 1; return bpf_map_push_elem(&both, &n, 0); }"
    )
    outputs = [{"name": "x", "from": {"map": "both"}, "events": {}}]
    manifest = policies.c_policy(source, **{**OUTPUTS, "outputs": outputs})
    with pytest.raises(BadInput, match="reading takes entries out of a queue that other programs use as well"):
        policies.prepare(probe_map("queue", value="u64 n"), manifest)


def test_what_a_program_lost_stays_when_it_comes_again_to_a_probe_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its policy left the node and came again, unedited; the map stayed, for another policy shares it."""
    four = probe_map("hash", key="u32 k", value="u64 n", maxEntries=4)
    declaration = declared("HASH", "__type(key, u32); __type(value, u64);")
    writer, reader = pair(
        "u64 number = 0;\n" + declaration,
        "u32 key = number++; probefleet_add(&both, &key, 1); return 0;",
        "u32 key = 0; return count(bpf_map_lookup_elem(&both, &key) ? 0 : 1);",
    )
    writer["spec"]["outputs"] = [{"name": "calls", "from": {"map": "both"}, "counter": {}}]
    with policies.run(four, writer, reader) as run:
        call_getppid(23)
        assert (run.output("calls")["total"]["value"], run.output("calls")["lost"]) == (4, 19)
        run.apply(four, reader)
        run.apply(four, writer, reader)
        run.measured.engine.hello()  # type: ignore[attr-defined]  # rows begin anew: the operator asks for a new stream
        monkeypatch.setattr(measurement, "SESSION", 2)
        call_getppid(5)
        found = run.output("calls")
        assert (found["total"]["value"], found["lost"]) == (4 + 4, 19 + 1), "keys 0 to 3 are there"


RING_OUTPUT = {"outputs": [{"name": "each", "from": {"map": "both"}, "events": {}}], "interval": "1s"}


@pytest.mark.parametrize("kind", ["ringbuf", "perf-event-array"])
def test_records_of_a_shared_ring_are_read_by_each_policy_once(kind: str) -> None:
    head = "struct note { u64 n; };\nstruct note *unused __attribute__((unused));\n"
    made = probe_map(kind, maxEntries=1 << 20 if kind == "ringbuf" else 64)
    if kind == "ringbuf":
        ring = "__uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); __type(value, struct note);"
        put = "bpf_ringbuf_output(&both, &note, sizeof(note), 0);"
    else:
        ring = "__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY); __uint(key_size, 4); __uint(value_size, 4);"
        put = "bpf_perf_event_output(ctx, &both, BPF_F_CURRENT_CPU, &note, sizeof(note));"
    ring = f'struct {{ {ring} }} both SEC(".maps");\n'
    body = f"{{ struct note note = {{ .n = 1 }}; if (!ours()) return 0; {put} return 0; }}"
    shared = {**RING_OUTPUT, "maps": OUTPUTS["maps"]}
    if kind != "ringbuf":
        shared["outputs"] = [{"name": "each", "from": {"map": "both", "record": "struct note"}, "events": {}}]
    first = policies.c_policy(f"{head}{ring}ON_CALL {body}", name="first", **shared)
    on_other = 'SEC("tracepoint/syscalls/sys_enter_sched_get_priority_max") int on_other(void *ctx)'
    second = policies.c_policy(f"{head}{ring}{on_other} {body}", name="second", **shared)
    with policies.run(made, first, second) as run:
        call_getppid(997)
        priority_max(23)
        assert [run.output("each", policy)["total"]["value"] for policy in (0, 1)] == [1020, 1020]
        call_getppid(5)
        assert [run.output("each", policy)["total"]["value"] for policy in (0, 1)] == [1025, 1025]
        run.apply(made, second)
        call_getppid(997)
        priority_max(7)
        run.measured.sample_rest()
        each = run.measured.results()[1].outputs[0]
        assert each.total.whole == 1032, "the first one has gone, and its program with it"
