"""Maps from before BTF: ``struct bpf_map_def`` and iproute2's ``struct bpf_elf_map`` are loaded, read and exact."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from probefleet_agent.kernel import maps, syscall
from probefleet_cli.failures import BadInput
from probefleet_core import legacy_maps
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.elf import Elf

from tests.kernel import policies
from tests.kernel.support import call_getppid

HEAD = """
typedef unsigned int u32; typedef unsigned long long u64;
#define SEC(name) __attribute__((section(name), used))
static void *(*lookup)(void *, const void *) = (void *)1;
static long (*update)(void *, const void *, const void *, u64) = (void *)2;
static u64 (*pid_tgid)(void) = (void *)14;
struct bpf_map_def { u32 type, key_size, value_size, max_entries, map_flags; };
struct bpf_elf_map { u32 type, size_key, size_value, max_elem, flags, id, pinning, inner_id, inner_idx; };
char LICENSE[] SEC("license") = "GPL";
"""
COUNT = """
SEC("tracepoint/syscalls/sys_enter_getppid")
int on_call(void *ctx)
{
	u32 key = pid_tgid() >> 32, zero = 0;
	u64 one = 1, *count;
	if (key != PID)
		return 0;
	count = lookup(&counts, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		update(&counts, &key, &one, 0);
	count = lookup(&total, &zero);
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}
"""
DEFS = """
struct bpf_map_def SEC("maps") counts = { .type = 1, .key_size = 4, .value_size = 8, .max_entries = 64,
	.map_flags = 1 };
struct bpf_map_def SEC("maps") total = { .type = 2, .key_size = 4, .value_size = 8, .max_entries = 1 };
"""
IPROUTE = """
struct bpf_elf_map SEC("maps") counts = { .type = 1, .size_key = 4, .size_value = 8, .max_elem = 64, .id = 7,
	.pinning = 2 };
struct bpf_elf_map SEC("maps") total = { .type = 2, .size_key = 4, .size_value = 8, .max_elem = 1, .id = 8 };
"""


def compiled(source: str, *options: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "old.c"
        path.write_text(HEAD + source.replace("PID", str(os.getpid())))
        command = ["clang", *options, "-O2", "-target", "bpf", "-c", str(path), "-o", f"{path}.o"]
        subprocess.run(command, check=True, capture_output=True)
        return Path(f"{path}.o").read_bytes()


def policy(data: bytes, **more: Any) -> dict[str, Any]:
    program = {"object": {"sha256": hashlib.sha256(data).hexdigest(), "inline": base64.b64encode(data).decode()}}
    outputs = [{"name": each, "from": {"map": each}, "topk": {}, "groupBy": ["key"]} for each in ("counts", "total")]
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": "old"},
        "spec": {"scope": "Cluster", "program": program, "outputs": outputs, "interval": "1s", **more},
    }


@pytest.mark.parametrize("definitions", [DEFS, IPROUTE], ids=["bpf_map_def", "bpf_elf_map"])
@pytest.mark.parametrize("debug", [["-g"], []], ids=["with BTF", "without"])
def test_old_definitions_count_exactly(definitions: str, debug: list[str]) -> None:
    data = compiled(definitions + COUNT, *debug)
    assert (Elf.parse(data).section(".BTF") is not None) == bool(debug)
    with policies.run(policy(data)) as run:
        call_getppid(997)
        assert run.rows("counts") == {(str(os.getpid()),): 997}
        assert run.rows("total") == {("0",): 997}
        (pin,) = policies.folder().glob("probefleet/instances/*/map_counts")
        with syscall.obj_get(str(pin)) as fd:
            info = maps.info(fd)
        assert (info.max_entries, info.flags) == (64, 1 if definitions is DEFS else 0)


def test_annotated_types_are_those_of_the_map() -> None:
    annotated = """
struct who { u32 pid; u32 uid; };
struct ____btf_map_total { struct who key; u64 value; };
struct ____btf_map_total SEC(".maps.total") ____btf_map_total = {};
struct bpf_map_def SEC("maps") total = { .type = 1, .key_size = 8, .value_size = 8, .max_entries = 4 };
SEC("tracepoint/a/b") int on_it(void *ctx) { u64 key = 0; return lookup(&total, &key) != 0; }
"""
    parsed = BpfObject.parse(legacy_maps.translate(compiled(annotated, "-g")))
    assert parsed.btf is not None
    (total,) = parsed.maps
    assert [field.name for field in parsed.btf.layout_of(total.key_type)] == ["pid", "uid"]


def test_what_is_pinned_for_all_is_still_said() -> None:
    parsed = BpfObject.parse(legacy_maps.translate(compiled(IPROUTE + COUNT, "-g")))
    assert [(each.name, each.pinning) for each in parsed.maps] == [("counts", 1), ("total", 0)]
    assert not Path("/sys/fs/bpf/counts").exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            'struct bpf_elf_map SEC("maps") outer = { .type = 12, .size_key = 4, .size_value = 4, .max_elem = 3, '
            '.inner_id = 7 };\nSEC("raw_tp/x") int f(void *c) { u32 k = 0; return lookup(&outer, &k) != 0; }',
            r"outer holds maps.*Write struct { __uint\(type, BPF_MAP_TYPE_ARRAY_OF_MAPS\); __uint\(max_entries, 3\)",
        ),
        (
            'struct { u32 a; } odd SEC("maps") = { 1 };\n'
            'SEC("raw_tp/x") int f(void *c) { u32 k = 0; return lookup(&odd, &k) != 0; }',
            r'odd in SEC\("maps"\) has 4 bytes; a struct bpf_map_def has 20',
        ),
        (
            DEFS + "struct { int (*type)[2]; int (*max_entries)[1]; u32 *key; u64 *value; } "
            'current SEC(".maps");\n' + COUNT.replace("&total", "&current"),
            r'maps in SEC\("maps"\) and in SEC\("\.maps"\).*BPF_MAP_TYPE_HASH.*__type\(key, u32\).*map_flags, 1',
        ),
    ],
    ids=["maps of maps", "unknown form", "both forms"],
)
def test_what_cannot_be_translated_is_refused_with_the_form_to_write(source: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        policies.prepare(policy(compiled(source, "-g"), outputs=[]))


def test_a_current_object_is_left_alone() -> None:
    from tests.kernel.support import compile_object

    data = compile_object('SEC("raw_tp/sys_enter") int on_it(void *ctx) { return hit(); }')
    assert legacy_maps.translate(data) is data


def test_a_bare_section_is_attached_where_the_policy_says_and_wins_over_sec() -> None:
    """SEC("tracepoint") names no target, SEC("tracepoint/…/sys_enter_getuid") another one."""
    for section in ("tracepoint", "tracepoint/syscalls/sys_enter_getuid"):
        data = compiled(DEFS + COUNT.replace("tracepoint/syscalls/sys_enter_getppid", section), "-g")
        target = {"category": "syscalls", "name": "sys_enter_getppid"}
        with policies.run(policy(data, attach=[{"program": "on_call", "tracepoint": target}])) as run:
            call_getppid(23)
            assert run.rows("total") == {("0",): 23}
