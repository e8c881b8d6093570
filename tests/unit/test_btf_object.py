"""A compiled object: its maps, parameters, programs and source lines; damaged, an ElfError or BtfError."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probefleet_wire import btf_check, elf_strip
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import BtfError, Kind
from probefleet_wire.elf import SHT_REL, SHT_SYMTAB, Elf, ElfError

SOURCE = r"""
typedef unsigned int u32; typedef unsigned long long u64;
#define SEC(x) __attribute__((section(x), used))
#define __uint(name, val) int (*name)[val]
#define __type(name, val) typeof(val) *name
#define __array(name, val) typeof(val) *name[]
struct key { u32 pid; char comm[16]; };
struct inner { __uint(type, 2); __type(key, u32); __type(value, u64); __uint(max_entries, 5); };
struct {
	__uint(type, 1); __uint(max_entries, 997); __uint(map_flags, 1);
	__type(key, struct key); __type(value, u64);
} counts SEC(".maps");
struct {
	__uint(type, 13); __uint(max_entries, 2); __uint(key_size, 4);
	__array(values, struct inner);
} outer SEC(".maps");
struct { __uint(type, 27); __uint(max_entries, 1 << 16); } ring SEC(".maps");
const volatile u32 target = 7;
const volatile char word[8] = "hi";
u64 seen;
static void *(*lookup)(void *, const void *) = (void *)1;
SEC("tracepoint/syscalls/sys_enter_execve")
int first(void *ctx)
{
	struct key k = { .pid = target };
	k.comm[0] = word[3];
	u64 *v = lookup(&counts, &k);
	if (v)
		__sync_fetch_and_add(v, 1);
	return lookup(&outer, &k) && lookup(&ring, &k);
}
SEC("tracepoint/syscalls/sys_enter_execve")
int second(void *ctx)
{
	seen++;
	return 3;
}
char LICENSE[] SEC("license") = "Dual BSD/GPL";
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if not shutil.which("clang"):
        pytest.fail("clang is missing: apt install clang")
    folder = tmp_path_factory.mktemp("object")
    (folder / "probe.bpf.c").write_text(SOURCE)
    command = ["clang", "-target", "bpf", "-g", "-O2", "-c", "probe.bpf.c", "-o", "probe.bpf.o"]
    subprocess.run(command, cwd=folder, check=True)
    return Path(folder / "probe.bpf.o").read_bytes()


def test_maps_are_read_with_their_types(compiled: bytes) -> None:
    found = BpfObject.parse(compiled)
    counts, outer, ring = found.maps
    assert found.btf is not None
    assert (counts.name, counts.type, counts.max_entries, counts.flags) == ("counts", 1, 997, 1)
    assert (counts.key_bytes, counts.value_bytes) == (20, 8)
    assert [field.name for field in found.btf.layout_of(counts.key_type)] == ["pid", "comm"]
    assert (ring.type, ring.key_bytes, ring.max_entries) == (27, 0, 65536)
    assert outer.inner is not None
    assert (outer.inner.name, outer.inner.max_entries, outer.inner.value_bytes) == ("outer.inner", 5, 8)


def test_parameters_are_read_with_their_place_and_default(compiled: bytes) -> None:
    found = BpfObject.parse(compiled)
    parameters = {each.name: each.initial for each in found.parameters()}
    assert parameters == {"target": struct.pack("<I", 7), "word": b"hi\0\0\0\0\0\0"}
    rodata = Elf.parse(compiled).section(".rodata")
    assert rodata is not None
    for each in found.parameters():
        assert rodata.data[each.offset_bytes :].startswith(each.initial)
    assert [each.name for each in found.variables if each.section == ".bss"] == ["seen"]


def test_programs_of_one_section_are_told_apart(compiled: bytes) -> None:
    found = BpfObject.parse(compiled)
    assert found.licence == "Dual BSD/GPL"
    assert {each.section for each in found.programs} == {"tracepoint/syscalls/sys_enter_execve"}
    first, second = found.programs
    assert (first.name, second.name) == ("first", "second")
    # 0x95 is `exit`: every program ends with it.
    assert first.instructions[-8] == second.instructions[-8] == 0x95
    with pytest.raises(ElfError, match="no program 'third' in this object; there is: first, second"):
        found.program("third")


def test_an_instruction_is_traced_to_its_source_line(compiled: bytes) -> None:
    found = BpfObject.parse(compiled)
    lines = SOURCE.splitlines()
    line = found.line_of("second", 0)
    assert line is not None
    assert line.text == "seen++;"
    assert lines[line.line - 1].strip() == line.text
    assert line.file.endswith("probe.bpf.c")
    last = found.line_of("first", found.program("first").instruction_count - 1)
    assert last is not None
    assert last.text == "return lookup(&outer, &k) && lookup(&ring, &k);"


def test_relocations_name_the_map(compiled: bytes) -> None:
    elf = Elf.parse(compiled)
    section = elf.section("tracepoint/syscalls/sys_enter_execve")
    assert section is not None
    names = [each.symbol.name for each in elf.relocations(section)]
    assert {"counts", "outer", "ring", "seen"} <= set(names)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "not an ELF file"), (b"\x7fELF\x01\x01" + bytes(60), "not 64-bit little-endian")],
)
def test_what_is_no_object_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ElfError, match=reason):
        BpfObject.parse(data)


def test_an_object_for_another_machine_is_refused(compiled: bytes) -> None:
    other = bytearray(compiled)
    struct.pack_into("<H", other, 18, 62)
    with pytest.raises(ElfError, match="for machine 62, not BPF"):
        BpfObject.parse(bytes(other))


def test_every_truncation_is_refused(compiled: bytes) -> None:
    for length in range(0, len(compiled), 37):
        with pytest.raises((ElfError, BtfError)):
            BpfObject.parse(compiled[:length])


@given(data=st.data())
@settings(max_examples=100)
def test_damage_never_does_more_than_raise(compiled: bytes, data: st.DataObject) -> None:
    whole = bytearray(compiled)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ElfError, BtfError):
        found = BpfObject.parse(bytes(whole))
        for program in found.programs:
            found.line_of(program.name, program.instruction_count // 2)
        for each in found.maps:
            if found.btf is not None and each.key_type:
                found.btf.layout_of(each.key_type)


def test_debug_sections_go_and_nothing_else_changes(compiled: bytes) -> None:
    stripped = elf_strip.without_debug(compiled)
    assert any(each.name.startswith(".debug_") for each in Elf.parse(compiled).sections), "there was something to take"
    before, after = Elf.parse(compiled), Elf.parse(stripped)
    assert not any("debug" in each.name for each in after.sections)
    kept = {each.name: each for each in before.sections if "debug" not in each.name and each.name != ".llvm_addrsig"}
    assert [each.name for each in after.sections] == list(kept)
    for section in after.sections:
        old = kept[section.name]
        if section.type not in (SHT_SYMTAB, SHT_REL):
            assert section.data == old.data
        relocated = [(each.offset_bytes, each.type, each.symbol.name) for each in after.relocations(section)]
        assert relocated == [(each.offset_bytes, each.type, each.symbol.name) for each in before.relocations(old)]
    one, other = BpfObject.parse(stripped), BpfObject.parse(compiled)
    assert replace(one, btf=None) == replace(other, btf=None)
    assert elf_strip.without_debug(stripped) == stripped


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_object_is_refused_or_stripped(compiled: bytes, data: st.DataObject) -> None:
    broken = bytearray(compiled[: data.draw(st.integers(0, len(compiled)))] if data.draw(st.booleans()) else compiled)
    for _ in range(data.draw(st.integers(0, 3)) if broken else 0):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ElfError):
        elf_strip.without_debug(bytes(broken))


def without_its_target(data: bytes, kind: Kind, word: int, target: int) -> bytes:
    """The object with one word of its first type of that kind (from the second word of three on) set to another."""
    section = Elf.parse(data).section(".BTF")
    assert section is not None
    btf = Btf.parse(section.data)
    found = next(i for i in range(1, btf.type_count) if btf.kind_of(i) == kind)
    header_bytes, types_at = struct.unpack_from("<II", section.data, 4)
    place = data.index(section.data) + header_bytes + types_at + 4 * (int(btf.starts()[found - 1]) + word)
    made = bytearray(data)
    struct.pack_into("<I", made, place, target or found)
    return bytes(made)


@pytest.mark.parametrize(
    ("kind", "word", "target", "says"),
    [
        (Kind.PTR, 2, 77777, r"refers to type 77777; the highest is \d+"),
        (Kind.TYPEDEF, 2, 77777, "refers to type 77777"),
        (Kind.TYPEDEF, 2, 0, "a cycle"),
        (Kind.ARRAY, 3, 77777, "refers to type 77777"),
        (Kind.ARRAY, 4, 77777, "refers to type 77777"),
        (Kind.STRUCT, 4, 77777, "refers to type 77777"),
        (Kind.FUNC_PROTO, 2, 77777, "refers to type 77777"),
        (Kind.FUNC, 2, 77777, "refers to type 77777"),
        (Kind.FUNC, 2, 1, "needs a func_proto, and type 1 is none"),
        (Kind.VAR, 2, 77777, "refers to type 77777"),
        (Kind.DATASEC, 3, 77777, "refers to type 77777"),
    ],
)
def test_types_that_lead_nowhere_are_found_before_libbpf_follows_them(
    compiled: bytes, kind: Kind, word: int, target: int, says: str
) -> None:
    btf_check.check(Elf.parse(compiled))
    with pytest.raises(BtfError, match=says):
        btf_check.check(Elf.parse(without_its_target(compiled, kind, word, target)))
