"""Hints on maps, from real compiled objects: each kind where it is due, and nothing where it would not be true."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probefleet_wire import bpf_code, hints, map_uses
from probefleet_wire.hints import Hint, Kind

MACHINE = f"{os.uname().machine}-linux-gnu"
INCLUDE = Path(__file__).resolve().parents[2] / "bpf/include"
#: As probefleet.h has it, without a whole kernel's types to read.
PRELUDE = """#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <stdbool.h>
#include <stddef.h>
typedef __u8 u8; typedef __u32 u32; typedef __u64 u64;
char LICENSE[] SEC("license") = "GPL";
struct pair { u64 first, second; };
struct name { char text[16]; };
#define MAP(name, kind, key_type, value_type) struct { __uint(type, BPF_MAP_TYPE_##kind); \\
	__uint(max_entries, 4096); __type(key, key_type); __type(value, value_type); } name SEC(".maps")
MAP(hash, HASH, u32, u64);
MAP(wide, HASH, u32, struct pair);
MAP(byte, HASH, u8, u64);
MAP(names, HASH, struct name, u64);
MAP(array, ARRAY, u32, u64);
MAP(own, PERCPU_ARRAY, u32, u64);
MAP(own_hash, PERCPU_HASH, u32, u64);
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } ring SEC(".maps");
#define PROGRAM SEC("raw_tp/sys_enter") int on_enter(struct bpf_raw_tracepoint_args *ctx)
MAP(probefleet_lost, PERCPU_ARRAY, u32, u64);
static __always_inline void count_lost(u32 what)
{
	u64 *count = bpf_map_lookup_elem(&probefleet_lost, &what);

	if (count)
		__sync_fetch_and_add(count, 1);
}
static __always_inline void *value_of(void *map, const void *key, const void *zero)
{
	void *value = bpf_map_lookup_elem(map, key);

	if (value)
		return value;
	bpf_map_update_elem(map, key, zero, BPF_NOEXIST);
	value = bpf_map_lookup_elem(map, key);
	if (!value)
		count_lost(0);
	return value;
}
static __always_inline void add(void *map, const void *key)
{
	u64 zero = 0, *value = value_of(map, key, &zero);

	if (value)
		__sync_fetch_and_add(value, 1);
}
u64 sink = 0;
static __noinline int elsewhere(void *value) { return value ? *(volatile u64 *)value : sink; }
"""


@functools.cache
def compiled(body: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.bpf.c"
        path.write_text(PRELUDE + body)
        command = ["clang", "-g", "-O2", "-Wall", "-target", "bpf", f"-I{INCLUDE}", f"-I/usr/include/{MACHINE}"]
        done = subprocess.run([*command, "-c", str(path), "-o", f"{path}.o"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Path(f"{path}.o").read_bytes()


def found(body: str, kind: Kind, **more: list[str]) -> list[Hint]:
    return [each for each in hints.of_object(compiled(body), **more) if each.kind == kind]


TWICE = """
PROGRAM
{
	u32 key = ctx->args[1];
	struct pair *pair = bpf_map_lookup_elem(&wide, &key);

	if (pair)
		sink += pair->first;
	BETWEEN
	pair = bpf_map_lookup_elem(&wide, &key);
	if (pair)
		sink += pair->second;
	return 0;
}
"""


def test_a_second_lookup_of_the_same_key_is_seen_with_both_lines() -> None:
    (hint,) = found(TWICE.replace("BETWEEN", ""), Kind.FEWER_LOOKUPS)
    first = PRELUDE.count("\n") + 5
    assert hint.map == "wide"
    assert hint.seen == (
        "on_enter looks map wide up again with a key that it looked up before, and does not change the map in between "
        f"(example.bpf.c:{first}, then example.bpf.c:{first + 5})"
    )


@pytest.mark.parametrize(
    "between",
    [
        "bpf_ktime_get_ns();",
        "u64 one = 1; u32 other = 5; bpf_map_update_elem(&hash, &other, &one, 0);",
        'bpf_printk("%d", key);',
        "if (ctx->args[1] & 1) sink++;",
    ],
)
def test_what_does_not_touch_the_map_makes_no_difference(between: str) -> None:
    assert found(TWICE.replace("BETWEEN", between), Kind.FEWER_LOOKUPS)


@pytest.mark.parametrize(
    "between",
    [
        "key++;",
        "bpf_get_current_comm(&key, sizeof(key));",
        "struct pair zero = {}; bpf_map_update_elem(&wide, &key, &zero, 0);",
        "bpf_map_delete_elem(&wide, &key);",
        "u32 other = 5; bpf_map_delete_elem(&wide, &other);",
        "if (ctx->args[1] & 1) key = 5;",
        "if (!pair) { struct pair zero = {}; bpf_map_update_elem(&wide, &key, &zero, BPF_NOEXIST); }",
        "elsewhere(pair);",
    ],
)
def test_a_lookup_after_a_change_is_another_one(between: str) -> None:
    assert found(TWICE.replace("BETWEEN", between), Kind.FEWER_LOOKUPS) == []


def test_the_same_value_in_another_place_is_the_same_key() -> None:
    source = """
    PROGRAM
    {
	u32 one = 3, other = 3;
	u64 *a = bpf_map_lookup_elem(&array, &one), *b;

	asm volatile("" ::"r"(&one), "r"(&other) : "memory");
	other = 3;
	b = bpf_map_lookup_elem(&array, &other);
	if (a && b)
		sink += *a + *b;
	return 0;
    }
    """
    (hint,) = found(source, Kind.FEWER_LOOKUPS)
    assert hint.map == "array"


@pytest.mark.parametrize(
    "body",
    [
        # On one of two paths only.
        "u64 *v; if (ctx->args[1] & 1) { v = bpf_map_lookup_elem(&hash, &key); if (v) sink += *v; }"
        " v = bpf_map_lookup_elem(&hash, &key); if (v) sink += *v;",
        # In a loop: each time another key.
        "for (int i = 0; i < 100; i++) { key = bpf_get_prandom_u32(); u64 *v = bpf_map_lookup_elem(&hash, &key);"
        " if (v) sink += *v; }",
        # What value_of() does: look up, insert, look up.
        "u64 zero = 0, *v = value_of(&hash, &key, &zero); if (v) sink += *v;",
        # Two keys.
        "u32 b = ctx->args[0]; u64 *v = bpf_map_lookup_elem(&hash, &key); if (v) sink += *v;"
        " v = bpf_map_lookup_elem(&hash, &b); if (v) sink += *v;",
        # Two maps.
        "u64 *v = bpf_map_lookup_elem(&hash, &key); if (v) sink += *v; v = bpf_map_lookup_elem(&array, &key);"
        " if (v) sink += *v;",
    ],
    ids=["one path", "loop", "insert", "two keys", "two maps"],
)
def test_lookups_that_are_all_needed_are_left_alone(body: str) -> None:
    assert found(f"PROGRAM {{ u32 key = ctx->args[1]; {body} return 0; }}", Kind.FEWER_LOOKUPS) == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("u32 key = 0; add(&hash, &key);", "Map hash is a hash with no keys but 0. An array of 1 entries"),
        ("u32 a = 0, b = 5; add(&hash, &a); add(&hash, &b);", "no keys but 0, 5. An array of 6 entries"),
        ("u32 key = ctx->args[1] & 63; add(&hash, &key);", "no key above 63. An array of 64 entries"),
        ("u32 key = (u32)bpf_ktime_get_ns() >> 24; add(&hash, &key);", "no key above 255. An array of 256 entries"),
        ("u32 key = *(volatile u8 *)ctx; add(&hash, &key);", "no key above 255"),
        ("u8 key = ctx->args[1]; add(&byte, &key);", "Map byte is a hash with a key of one byte. An array of 256"),
        ("u32 key = 2; add(&own_hash, &key);", "no keys but 2. A per-CPU array of 3 entries"),
    ],
)
def test_a_hash_with_small_keys_could_be_an_array(body: str, says: str) -> None:
    (hint,) = found(f"PROGRAM {{ {body} return 0; }}", Kind.INDEX_AN_ARRAY)
    assert says in str(hint)


@pytest.mark.parametrize(
    "body",
    [
        "u32 key = ctx->args[1]; add(&hash, &key);",
        "u32 key = 0, other = ctx->args[1]; add(&hash, &key); add(&hash, &other);",
        "u32 key = 0, other = 3000; add(&hash, &key); add(&hash, &other);",
        "u32 key = 0; add(&hash, &key); bpf_map_delete_elem(&hash, &key);",
        "u32 key = ctx->args[1] & 0xffff; add(&hash, &key);",
        "u32 key = 0; add(&array, &key);",
        'struct name key = {"one"}; add(&names, &key);',
        "u32 key = 0; add(&hash, &key); elsewhere(bpf_map_lookup_elem(&hash, &key));",
    ],
    ids=["any", "one of any", "far apart", "deleted", "many", "an array", "text", "handed on"],
)
def test_other_keys_get_no_such_hint(body: str) -> None:
    assert found(f"PROGRAM {{ {body} return 0; }}", Kind.INDEX_AN_ARRAY) == []


LOOKED_UP = "u32 key = ctx->args[1]; u64 *v = bpf_map_lookup_elem(&{map}, &key); if (!v) return 0; "


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            LOOKED_UP.format(map="array") + "__sync_fetch_and_add(v, 1);",
            "Programs only add to what is in map array, atomically, and do nothing else with it. In a per-CPU array "
            "each CPU adds to a value of its own, which needs no atomic addition",
        ),
        (
            LOOKED_UP.format(map="array") + "*v += ctx->args[0];",
            "map array, not atomically, so that CPUs lose counts when they meet, and do nothing else with it. In a "
            "per-CPU array each CPU adds to a value of its own",
        ),
        ("u32 key = ctx->args[1]; add(&hash, &key);", "a per-CPU hash spares them to wait"),
        (
            LOOKED_UP.format(map="wide") + "struct pair *p = (void *)v; __sync_fetch_and_add(&p->first, 1);"
            " __sync_fetch_and_add(&p->second, key);",
            "map wide, atomically",
        ),
    ],
    ids=["array", "plainly", "hash", "two numbers"],
)
def test_counters_that_are_only_added_to_could_be_each_cpus_own(body: str, says: str) -> None:
    (hint,) = found(f"PROGRAM {{ {body} return 0; }}", Kind.COUNT_PER_CPU)
    assert says in str(hint) and "the values' memory once for each CPU" in hint.advice


@pytest.mark.parametrize(
    "more",
    [
        "if (*v > 100) sink++;",
        "sink = *v;",
        "*v = 7;",
        "if (__sync_fetch_and_add(v, 1) == 3) sink++;",
        "__sync_fetch_and_or(v, 1);",
        "elsewhere(v);",
        'bpf_printk("%llu", *v);',
        "v[0] = v[0] * 2;",
        "bpf_probe_read_kernel(v, 8, ctx);",
        "bpf_map_update_elem(&hash, v, v, 0);",
        "bpf_ringbuf_output(&ring, v, 8, 0);",
        "u64 copy = *v; bpf_ringbuf_output(&ring, &copy, 8, 0);",
        "return *v;",
    ],
)
def test_values_that_are_used_otherwise_have_to_be_shared(more: str) -> None:
    body = LOOKED_UP.format(map="array") + "__sync_fetch_and_add(v, 1); " + more
    assert found(f"PROGRAM {{ {body} return 0; }}", Kind.COUNT_PER_CPU) == []


def test_another_program_that_reads_the_map_counts_as_well() -> None:
    adds = "PROGRAM { " + LOOKED_UP.format(map="array") + "__sync_fetch_and_add(v, 1); return 0; }\n"
    reads = adds.replace("__sync_fetch_and_add(v, 1);", "sink = *v;")
    reads = reads.replace("PROGRAM", 'SEC("raw_tp/sys_exit") int on_exit(struct bpf_raw_tracepoint_args *ctx)')
    assert found(adds, Kind.COUNT_PER_CPU)
    assert found(adds + reads, Kind.COUNT_PER_CPU) == []


def test_maps_that_are_used_elsewhere_are_judged_by_their_lookups_alone() -> None:
    body = "PROGRAM { u32 key = 0; add(&hash, &key); return 0; }"
    assert {each.kind for each in hints.of_object(compiled(body))} == {Kind.INDEX_AN_ARRAY, Kind.COUNT_PER_CPU}
    assert hints.of_object(compiled(body), elsewhere=["hash"]) == ()
    assert found(TWICE.replace("BETWEEN", ""), Kind.FEWER_LOOKUPS, elsewhere=["wide"])


def test_maps_of_each_cpus_own_and_those_of_headers_get_no_hint() -> None:
    body = "PROGRAM { " + LOOKED_UP.format(map="own") + "*v += 1; count_lost(3); count_lost(3); return 0; }"
    assert hints.of_object(compiled(body)) == ()


def test_a_function_that_is_too_long_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_uses, "MAX_INSTRUCTIONS", 5)
    assert hints.of_object(compiled(TWICE.replace("BETWEEN", ""))) == ()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=40))
def test_any_instructions_end_the_analysis(code: list[bytes]) -> None:
    function = bpf_code.Function("any", (0, 0), bpf_code.decode(b"".join(code)))
    maps = dict.fromkeys(range(0, len(code), 3), "hash")
    map_uses.of(function, maps, {"hash": 4})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_programs_end_the_analysis(data: st.DataObject) -> None:
    code = bpf_code.read(compiled(TWICE.replace("BETWEEN", "")))
    function = next(each for each in code.functions.values() if each.name == "on_enter")
    instructions = list(function.instructions)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(instructions) - 1))
        instructions[at] = bpf_code.decode(data.draw(st.binary(min_size=8, max_size=8)))[0]
    maps = {at: "wide" for at, it in enumerate(instructions) if it.code == bpf_code.LOAD_IMM64}
    map_uses.of(bpf_code.Function("any", (0, 0), tuple(instructions)), maps, {"wide": 4})
