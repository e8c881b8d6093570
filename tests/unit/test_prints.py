"""Printed lines, put together from what a program kept of them."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from probefleet_agent import prints
from probefleet_wire.btf_layout import Field


def line(form: str, *values: int | bytes) -> str:
    """A line as the program's header keeps it: bytes stand for what a pointer points to."""
    numbers, texts, pointers = [0] * 12, b"", 0
    for index, value in enumerate(values):
        if isinstance(value, bytes):
            texts += value[: prints.TEXT_BYTES].ljust(prints.TEXT_BYTES, b"\0")
            pointers |= 1 << index
            value = 0xFFFF888000001000
        numbers[index] = value & 0xFFFF_FFFF_FFFF_FFFF
    return prints.message(form.encode().ljust(128, b"\0"), numbers, texts.ljust(256, b"\0"), pointers)


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("%d", (-5,)),
        ("%u|%i", (4294967295, 7)),
        ("%ld %llu %lld", (-1, 18446744073709551615, -(1 << 63))),
        ("%hhd %hu", (-1, 65535)),
        ("%x %X %#x %o", (255, 255, 255, 8)),
        ("%5d|%-5d|%05d|%+d", (42, 42, -42, 42)),
        ("%c%c", (111, 107)),
        ("100%% of %d", (3,)),
        ("%s ran %s", (b"bash", b"/usr/bin/ls")),
        ("%8s|%-8s|%.3s", (b"one", b"two", b"three")),
        ("nothing at all", ()),
    ],
)
def test_a_line_is_what_printf_makes(form: str, values: tuple[int | bytes, ...]) -> None:
    # bash's printf takes 64-bit numbers only: narrower conversions are given what they would see.
    said = line(form, *values)
    expected = {
        "%u|%i": "4294967295|7",
        "%ld %llu %lld": "-1 18446744073709551615 -9223372036854775808",
        "%hhd %hu": "-1 65535",
        "%c%c": "ok",
    }.get(form)
    if expected is None:
        arguments = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
        expected = subprocess.run(["printf", form, *arguments], capture_output=True, text=True, check=True).stdout
    assert said == expected


def test_what_only_the_kernel_prints() -> None:
    assert line("%pI4 %pI6", bytes([10, 0, 0, 1]), bytes(15) + b"\1") == "10.0.0.1 ::1"
    assert line("%ps", 0xFFFFFFFF81000000) == "ffffffff81000000"
    assert line("%pks %pus", b"kernel", b"user") == "kernel user"


def test_the_newline_at_the_end_goes() -> None:
    assert line("Hello World!\n") == "Hello World!"


def test_a_string_that_was_not_kept_is_its_address() -> None:
    assert line("%s", 4096) == "(0x1000)"


def test_a_format_that_was_cut_says_so() -> None:
    assert prints.message(b"x" * 127 + b"\0", [0] * 12, bytes(256), 0) == "x" * 127 + "…"


def test_flags_show_what_a_program_sees() -> None:
    assert (prints.flags(0), prints.flags(1)) == ("-.--", "-N--")


def test_records_are_read_by_their_layout() -> None:
    def field(name: str, offset: int, size: int, typedef: str) -> Field:
        return Field(
            name=name, offset_bytes=offset, size_bytes=size, kind="int", typedefs=(typedef,), type_name=typedef
        )

    layout = [
        field("format", 0, 128, prints.FORMAT),
        field("values", 128, 96, prints.VALUES),
        field("texts", 224, 256, prints.TEXTS),
        field("pointers", 480, 4, prints.POINTERS),
    ]
    record = np.zeros((1, 488), np.uint8)
    record[0, :8] = np.frombuffer(b"%s is %d", np.uint8)
    record[0, 136] = 42
    record[0, 224:228] = np.frombuffer(b"this", np.uint8)
    record[0, 480] = 1
    assert prints.is_line(layout) and all(prints.is_part(each) for each in layout)
    assert prints.messages(record, layout) == ["this is 42"]
