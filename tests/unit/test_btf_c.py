"""The header made from BTF: clang says that every member lies where BTF says, also in structs made to trap it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from probefleet_wire import btf_c
from probefleet_wire.btf import Btf
from probefleet_wire.btf_build import BtfBuilder
from probefleet_wire.btf_types import BtfError, Kind


def check(btf: Btf, assertions: list[str], folder: Path) -> None:
    (folder / "vmlinux.h").write_text(btf_c.emit(btf))
    (folder / "check.c").write_text('#include "vmlinux.h"\n' + "\n".join(assertions) + "\n")
    command = ["clang", "-target", "x86_64-linux-gnu", "-fsyntax-only", "-Werror", "-Wno-packed", "check.c"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def at(struct: str, member: str, offset: int) -> str:
    return f'_Static_assert(__builtin_offsetof(struct {struct}, {member}) == {offset}, "{struct}.{member}");'


def size(kind: str, bytes_: int) -> str:
    return f'_Static_assert(sizeof({kind}) == {bytes_}, "{kind}");'


def test_structs_that_trap_compilers_keep_their_offsets(tmp_path: Path) -> None:
    make = BtfBuilder()
    u8, u64 = make.integer("unsigned char", 1), make.integer("unsigned long long", 8)
    u128 = make.integer("unsigned __int128", 16)
    tiny = make.add(Kind.ENUM, "tiny", 1, vlen=1, extra=[make.string("TINY"), 1])
    # 3 × 48 bits of bit-fields, then a byte: a run longer than any integer.
    extra: list[int] = []
    for index in range(3):
        extra += [make.string(f"bits{index}"), u64, (index * 48) | 48 << 24]
    extra += [make.string("after"), u8, 144]
    make.add(Kind.STRUCT, "run", 24, vlen=4, flag=True, extra=extra)
    make.struct("wide", 32, [("first", u8, 0), ("number", u128, 8), ("last", u8, 24)])
    make.struct("holes", 64, [("a", tiny, 3), ("b", u64, 9), ("c", tiny, 63)])
    make.struct("empty", 0, [])
    inner = make.struct("", 8, [("left", u64, 0), ("right", u8, 0)], union=True)
    make.struct("anonymous", 24, [("x", u8, 0), ("", inner, 13)])
    btf = Btf.parse(make.to_bytes())
    assertions = [
        at("run", "after", 18),
        size("struct run", 24),
        at("wide", "number", 8),
        at("wide", "last", 24),
        size("struct wide", 32),
        at("holes", "a", 3),
        at("holes", "b", 9),
        at("holes", "c", 63),
        size("struct holes", 64),
        size("enum tiny", 1),
        size("struct empty", 0),
        at("anonymous", "left", 13),
        at("anonymous", "right", 13),
        size("struct anonymous", 24),
    ]
    check(btf, assertions, tmp_path)


def test_types_come_after_what_they_need_whatever_their_order(tmp_path: Path) -> None:
    make = BtfBuilder()
    # 1: struct outer { alias inside; struct outer *next; }, defined before everything it needs.
    make.struct("outer", 16, [("inside", 2, 0), ("next", 4, 8)])
    make.typedef("alias", 3)
    make.struct("inner", 8, [("number", 5, 0)])
    make.pointer(1)
    u64 = make.integer("long unsigned int", 8)
    make.typedef("callback_t", make.pointer(make.add(Kind.FUNC_PROTO, word=u64)))
    make.typedef("table_t", make.array(make.pointer(1), 3, index=u64))
    check(
        Btf.parse(make.to_bytes()),
        [
            at("outer", "next", 8),
            size("callback_t", 8),
            size("table_t", 24),
            "struct outer *f(struct outer *p) { return p->next; }",
        ],
        tmp_path,
    )


def test_names_that_two_types_share_get_a_number(tmp_path: Path) -> None:
    make = BtfBuilder()
    u8, u64 = make.integer("unsigned char", 1), make.integer("unsigned long long", 8)
    make.struct("state", 1, [("a", u8, 0)])
    make.struct("state", 8, [("b", u64, 0)])
    make.enumeration("first", 4, [("SAME", 0)])
    make.enumeration("second", 4, [("SAME", 5)])
    check(
        Btf.parse(make.to_bytes()),
        [size("struct state", 1), size("struct state___2", 8), '_Static_assert(SAME == 0 && SAME___2 == 5, "");'],
        tmp_path,
    )


@pytest.mark.parametrize(("value", "bytes_"), [(-1, 4), (0x7FFFFFFF, 4), (0x80000000, 4), (0xFFFFFFFF, 4)])
def test_enums_keep_their_size_and_values(value: int, bytes_: int, tmp_path: Path) -> None:
    make = BtfBuilder()
    make.enumeration("edge", bytes_, [("EDGE", value)], signed=value < 0)
    check(Btf.parse(make.to_bytes()), [size("enum edge", bytes_), f'_Static_assert(EDGE == {value}LL, "");'], tmp_path)


def test_names_that_c_cannot_say_become_padding(tmp_path: Path) -> None:
    make = BtfBuilder()
    u64 = make.integer("unsigned long long", 8)
    rust = make.struct("Option<u64>", 16, [("__0", u64, 8)])
    make.struct("holder", 24, [("value", rust, 0), ("int", u64, 16)])
    check(Btf.parse(make.to_bytes()), [size("struct holder", 24), at("holder", "value", 0)], tmp_path)


def test_a_struct_that_contains_itself_is_refused() -> None:
    make = BtfBuilder()
    make.struct("loop", 8, [("self", 1, 0)])
    with pytest.raises(BtfError, match="'loop' contains itself"):
        btf_c.emit(Btf.parse(make.to_bytes()))


def test_overlapping_members_are_refused() -> None:
    make = BtfBuilder()
    u64 = make.integer("unsigned long long", 8)
    make.struct("overlap", 16, [("a", u64, 0), ("b", u64, 4)])
    with pytest.raises(BtfError, match="member 'b' of 'overlap' overlaps"):
        btf_c.emit(Btf.parse(make.to_bytes()))
