"""BTF in, types, sizes, dtypes and fields out; and whatever bytes come in, an answer or a BtfError."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probefleet_wire.btf import Btf
from probefleet_wire.btf_build import BtfBuilder
from probefleet_wire.btf_types import BtfError, Enum, Fwd, Int, Kind, Struct


def example() -> tuple[bytes, dict[str, int]]:
    """A struct key with a bit of everything: typedefs, text, an array, an enum, a union, structs, a
    bit-field.
    """
    make = BtfBuilder()
    u32 = make.integer("unsigned int", 4)
    u64 = make.integer("unsigned long long", 8)
    i32 = make.integer("int", 4, signed=True)
    char = make.integer("char", 1, signed=True)
    u8 = make.integer("unsigned char", 1)
    kernel_pid = make.typedef("__kernel_pid_t", i32)
    pid = make.typedef("pid_t", kernel_pid)
    comm = make.array(char, 16, index=u32)
    mac = make.array(u8, 6, index=u32)
    state = make.enumeration("state", 4, [("RUNNING", 0), ("SLEEPING", 1)])
    either = make.struct("", 8, [("a", u32, 0), ("b", u64, 0)], union=True)
    leaf = make.struct("leaf", 8, [("x", u32, 0), ("p", make.pointer(0), 0)], union=False)
    leaves = make.array(leaf, 2, index=u32)
    members = [
        ("pid", pid, 0),
        ("comm", comm, 4),
        ("mac", mac, 20),
        ("s", state, 28),
        ("", either, 32),
        ("v", leaves, 40),
    ]
    extra = [part for name, type_, offset in members for part in (make.string(name), type_, offset * 8)]
    extra += [make.string("f"), u32, 56 * 8 | 3 << 24]
    key = make.add(Kind.STRUCT, "key", 64, vlen=len(members) + 1, flag=True, extra=extra)
    return make.to_bytes(), {"key": key, "pid": pid, "comm": comm, "u32": u32, "state": state}


def test_types_are_found_by_name_and_kind() -> None:
    data, ids = example()
    btf = Btf.parse(data)
    assert btf.find("key", Kind.STRUCT) == ids["key"]
    assert btf.find("key", Kind.TYPEDEF) is None
    assert btf.find("") is None
    assert btf.type(ids["u32"]) == Int("unsigned int", 4, 32, 0, False, False, False)
    assert btf.type(ids["state"]) == Enum("state", 4, False, (("RUNNING", 0), ("SLEEPING", 1)))
    with pytest.raises(BtfError, match="there is no struct 'nothing' in this BTF"):
        btf.require("nothing", Kind.STRUCT)


def test_a_name_that_ends_another_one_is_not_mistaken() -> None:
    make = BtfBuilder()
    make.integer("my_sock", 4)
    want = make.integer("sock", 4)
    assert Btf.parse(make.to_bytes()).find_all("sock") == (want,)


def test_typedefs_are_followed_and_named_outermost_first() -> None:
    data, ids = example()
    btf = Btf.parse(data)
    assert btf.typedef_chain(ids["pid"]) == ("pid_t", "__kernel_pid_t")
    assert isinstance(btf.type(btf.resolve(ids["pid"])), Int)
    assert btf.size_of(ids["comm"]) == 16


def test_the_layout_lists_every_scalar_at_its_place() -> None:
    data, ids = example()
    fields = Btf.parse(data).layout_of(ids["key"])
    places = {field.name: (field.offset_bytes, field.size_bytes, field.kind, field.in_union) for field in fields}
    assert places == {
        "pid": (0, 4, "int", False),
        "comm": (4, 16, "char", False),
        "mac": (20, 6, "int", False),
        "s": (28, 4, "enum", False),
        "a": (32, 4, "int", True),
        "b": (32, 8, "int", True),
        "v[0].x": (40, 4, "int", False),
        "v[0].p": (40, 8, "pointer", False),
        "v[1].x": (48, 4, "int", False),
        "v[1].p": (48, 8, "pointer", False),
        "f": (56, 1, "int", False),
    }
    by_name = {field.name: field for field in fields}
    assert by_name["pid"].signed
    assert by_name["pid"].typedefs == ("pid_t", "__kernel_pid_t")
    assert by_name["comm"].is_char_array
    assert (by_name["mac"].is_char_array, by_name["mac"].count, by_name["mac"].element_bytes) == (False, 6, 1)
    assert by_name["f"].bits == 3
    assert by_name["s"].enum_names == (("RUNNING", 0), ("SLEEPING", 1))


def test_a_scalar_is_a_layout_of_one_field_without_name() -> None:
    data, ids = example()
    (field,) = Btf.parse(data).layout_of(ids["pid"])
    assert (field.name, field.offset_bytes, field.size_bytes) == ("", 0, 4)


def test_the_dtype_reads_the_bytes_that_the_struct_wrote() -> None:
    data, ids = example()
    dtype = Btf.parse(data).dtype_of(ids["key"])
    assert dtype.itemsize == 64
    raw = struct.pack("<i16s6s2xIQ16s8s", -7, b"bash", bytes(range(6)), 1, 1 << 40 | 5, b"", b"\x03")
    (row,) = np.frombuffer(raw, dtype)
    assert (row["pid"], row["comm"], list(row["mac"]), row["s"]) == (-7, b"bash", [0, 1, 2, 3, 4, 5], 1)
    assert (row["a"], row["b"]) == (5, 1 << 40 | 5)
    assert row["v"]["x"].tolist() == [0, 0]


def test_the_name_of_a_type_reads_as_c() -> None:
    data, ids = example()
    btf = Btf.parse(data)
    names = [btf.c_name_of(ids[each]) for each in ("key", "pid", "comm", "state")]
    assert names == ["struct key", "pid_t", "char[16]", "enum state"]


def test_a_modules_btf_goes_on_where_its_base_ends() -> None:
    data, _ = example()
    base = Btf.parse(data)
    # Offsets and ids of the module start after the base's.
    make = BtfBuilder()
    make.typedef("module_t", base.require("key"))
    alone = bytearray(make.to_bytes())
    struct.pack_into("<I", alone, 24, base.strings_bytes + 1)
    module = Btf.parse(bytes(alone), base)
    assert module.name_of(base.type_count) == "module_t"
    assert module.size_of(module.require("module_t")) == 64
    assert module.find("key") == base.find("key")


def broken(change: str) -> bytes:
    make = BtfBuilder()
    u32 = make.integer("u32", 4)
    if change == "struct cycle":
        make.struct("a", 4, [("self", 2, 0)])
    elif change == "typedef cycle":
        make.typedef("a", 2)
    elif change == "array of itself":
        make.add(Kind.ARRAY, extra=[2, 1, 1])
    elif change == "member past the end":
        make.struct("a", 4, [("x", u32, 2)])
    elif change == "no such type":
        make.struct("a", 4, [("x", 77, 0)])
    elif change == "billion":
        inner = int(make.struct("leaf", 8, [("x", u32, 0)]))
        for _ in range(20):
            inner = int(make.struct("u", 8, [("x", inner, 0), ("y", inner, 0)], union=True))
    elif change == "huge array":
        big = make.array(u32, 0xFFFFFFFF, index=u32)
        make.array(big, 0xFFFFFFFF, index=u32)
    return make.to_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("struct cycle", "a cycle"),
        ("typedef cycle", "a cycle"),
        ("array of itself", "a cycle"),
        ("member past the end", "ends at byte 6 of 4"),
        ("no such type", "type 77 does not exist"),
        ("billion", "more than 8192 fields"),
        ("huge array", "at most 4294967296"),
    ],
)
def test_types_that_contradict_themselves_are_refused(change: str, reason: str) -> None:
    btf = Btf.parse(broken(change))
    with pytest.raises(BtfError, match=reason):
        btf.layout_of(len(btf) - 1)


def blob(*, types: bytes, type_bytes: int | None = None, version: int = 1) -> bytes:
    size = len(types) if type_bytes is None else type_bytes
    return struct.pack("<HBBIIIII", 0xEB9F, version, 0, 24, 0, size, len(types), 3) + types + b"\0a\0"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends within its header"),
        (b"\xeb\x9f" + bytes(30), "big-endian"),
        (b"ELF!" + bytes(30), "not BTF"),
        (blob(types=b"", type_bytes=400), "type section ends at byte 424"),
        (blob(types=b"", version=2), "version 2"),
        (blob(types=struct.pack("<III", 0, 31 << 24, 0)), "kind 31"),
        (blob(types=struct.pack("<III", 0, 4 << 24 | 9, 0)), "cut off"),
        (blob(types=b"abc"), "no multiple of 4"),
    ],
)
def test_bytes_that_are_no_btf_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BtfError, match=reason):
        Btf.parse(data)


def everything(data: bytes) -> None:
    """Ask every question of every type; only BtfError may come out."""
    with contextlib.suppress(BtfError):
        btf = Btf.parse(data)
        for type_id in range(len(btf) + 1):
            for ask in (
                btf.type,
                btf.name_of,
                btf.resolve,
                btf.size_of,
                btf.layout_of,
                btf.dtype_of,
                btf.c_name_of,
            ):
                with contextlib.suppress(BtfError):
                    ask(type_id)


@given(st.data())
@settings(max_examples=100)
def test_damaged_btf_never_does_more_than_raise(data: st.DataObject) -> None:
    whole = bytearray(example()[0])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    everything(bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole))


@given(st.binary(max_size=400))
@settings(max_examples=100)
def test_random_types_never_do_more_than_raise(body: bytes) -> None:
    body = body[: len(body) // 4 * 4]
    everything(blob(types=body))


VMLINUX = Path("/sys/kernel/btf/vmlinux")


@pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel has no BTF; run on one with CONFIG_DEBUG_INFO_BTF")
def test_the_kernels_own_btf_is_read_whole() -> None:
    btf = Btf.parse(VMLINUX.read_bytes())
    task = btf.type(btf.require("task_struct", Kind.STRUCT))
    assert isinstance(task, Struct)
    tgid = next(member for member in task.members if member.name == "tgid")
    fields = {field.name: field.offset_bytes for field in btf.layout_of(btf.require("task_struct", Kind.STRUCT))}
    assert fields["tgid"] == tgid.offset_bytes
    assert btf.dtype_of(btf.require("task_struct", Kind.STRUCT)).itemsize == task.size_bytes
    assert not any(isinstance(btf.type(each), Fwd) for each in btf.find_all("task_struct", Kind.STRUCT))


def test_an_arrays_own_typedef_is_known_and_its_elements() -> None:
    make = BtfBuilder()
    u32 = make.integer("unsigned int", 4)
    byte = make.typedef("u8", make.integer("unsigned char", 1))
    address = make.typedef("ip_t", make.array(byte, 16, index=u32))
    flow = make.struct("flow", 32, [("local", address, 0), ("remote", address, 16)], union=False)
    fields = Btf.parse(make.to_bytes()).layout_of(flow)
    assert [(each.name, each.typedefs, each.shape) for each in fields] == [
        ("local", ("ip_t", "u8"), (16,)),
        ("remote", ("ip_t", "u8"), (16,)),
    ]
