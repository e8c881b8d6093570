"""Objects with SEC("maps"): what is damaged is refused in words, never by a traceback."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from probefleet_core import legacy_maps
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import Elf, ElfError
from probefleet_wire.map_types import MapType

SOURCE = """
typedef unsigned int u32;
#define SEC(name) __attribute__((section(name), used))
struct bpf_map_def { u32 type, key_size, value_size, max_entries, map_flags; };
struct bpf_map_def SEC("maps") counts = { 1, 4, 8, 64, 1 };
struct bpf_map_def SEC("maps") wide = { 1, 20, 40, 5, 0 };
struct bpf_map_def SEC("maps") events = { 4, 4, 4, 8, 0 };
static void *(*lookup)(void *, const void *) = (void *)1;
SEC("raw_tp/sys_enter") int on_it(void *ctx)
{
	u32 k = 0;
	return lookup(&counts, &k) && lookup(&wide, &k) && lookup(&events, &k);
}
char LICENSE[] SEC("license") = "GPL";
"""


def compile_in(folder: Path, source: str, *options: str) -> bytes:
    assert shutil.which("clang"), "clang is missing: apt install clang"
    (folder / "old.c").write_text(source)
    command = ["clang", "-target", "bpf", *options, "-O2", "-c", "old.c", "-o", "old.o"]
    subprocess.run(command, cwd=folder, check=True)
    return Path(folder / "old.o").read_bytes()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compile_in(tmp_path_factory.mktemp("legacy"), SOURCE, "-g")


def test_definitions_become_those_of_btf(compiled: bytes) -> None:
    made = BpfObject.parse(legacy_maps.translate(compiled))
    counts, wide, events = made.maps
    assert (counts.type, counts.max_entries, counts.flags) == (MapType.HASH, 64, 1)
    assert (counts.key_bytes, counts.value_bytes) == (4, 8) and counts.key_type and counts.value_type
    assert (wide.key_bytes, wide.value_bytes, wide.key_type) == (20, 40, 0)
    assert (events.type, events.key_bytes, events.key_type) == (MapType.PERF_EVENT_ARRAY, 4, 0)
    assert [each.map for each in made.references] == ["counts", "wide", "events"]
    assert {each.name for each in made.programs} == {"on_it"} and made.line_of("on_it", 0) is not None


def test_the_form_to_write_is_c(compiled: bytes) -> None:
    counts, wide, _ = legacy_maps.definitions(Elf.parse(compiled))
    assert counts.btf_form == (
        "struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, u32); __type(value, u64); "
        '__uint(map_flags, 1); } counts SEC(".maps");'
    )
    assert "__type(key, u8[20])" in wide.btf_form


#: Seven numbers each: the last two mean something else.
SEVEN = """
typedef unsigned int u32;
#define SEC(name) __attribute__((section(name), used))
struct bpf_elf_map { u32 type, size_key, size_value, max_elem, flags, id, pinning; };
struct bpf_map_def { u32 type, key_size, value_size, max_entries, map_flags, inner_map_idx, numa_node; };
struct bpf_elf_map SEC("maps") of_iproute = { 1, 4, 8, 64, 0, 5, 2 };
struct bpf_map_def SEC("maps") of_samples = { 1, 4, 8, 64, 4, 0, 1 };
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.mark.parametrize("options", [["-g"], []], ids=["with BTF", "without"])
def test_the_two_definitions_of_seven_numbers_are_told_apart(tmp_path: Path, options: list[str]) -> None:
    made = compile_in(tmp_path, SEVEN, *options)
    of_iproute, of_samples = legacy_maps.definitions(Elf.parse(made))
    assert (of_iproute.id, of_iproute.pinning, of_iproute.numa_node) == (5, 2, 0)
    assert (of_samples.id, of_samples.pinning, of_samples.numa_node) == (0, 0, 1)
    pinning = [(each.name, each.pinning) for each in BpfObject.parse(legacy_maps.translate(made)).maps]
    assert pinning == [("of_iproute", 1), ("of_samples", 0)]


def test_names_of_members_count_more_than_their_values(tmp_path: Path) -> None:
    source = SEVEN.replace("of_samples = { 1, 4, 8, 64, 4, 0, 1 }", "of_samples = { 1, 4, 8, 64, 0, 0, 1 }")
    _, of_samples = legacy_maps.definitions(Elf.parse(compile_in(tmp_path, source, "-g")))
    assert (of_samples.pinning, of_samples.numa_node) == (0, 1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_refused_in_words(compiled: bytes, data: st.DataObject) -> None:
    broken = bytearray(compiled[: data.draw(st.integers(64, len(compiled)))])
    for _ in range(data.draw(st.integers(0, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ElfError, BtfError, legacy_maps.LegacyMapsError):
        BpfObject.parse(legacy_maps.translate(bytes(broken)))
