"""Line information of a BCC program, put back into the words of its author. Pure.

BCC rewrites a source before it compiles it (`map.lookup(&key)` becomes a call with a cast), and so the lines that it
gives the kernel are not those of the policy. ``bcc`` hands over what the child read; here the records get the policy's
own lines and file name, in a BTF that has these strings behind its own. The verifier then quotes what the user wrote.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from probefleet_wire import btf

from probefleet_agent.kernel import bcc_source

if TYPE_CHECKING:
    from probefleet_agent.kernel.bcc import BccFunction

COLUMN_BITS = 10  # of 32; the others are the line: BPF_LINE_INFO_LINE_NUM, include/uapi/linux/bpf.h
RECORD = struct.Struct("<IIII")  # bpf_line_info: instruction, file, text, line and column


def as_written(
    functions: tuple[BccFunction, ...], data: bytes, file_name: str, lines: Sequence[str]
) -> tuple[tuple[BccFunction, ...], bytes]:
    """The functions and the BTF with the source's own lines. BTF whose strings are not its last part stays as it is."""
    if not data:
        return functions, data
    types = btf.Btf.parse(data)
    header = list(btf.HEADER.unpack_from(data))
    start, length = header[3] + header[6], header[7]
    if start + length != len(data):
        return functions, data
    strings = bytearray()
    places: dict[str, int] = {}

    def place(text: str) -> int:
        if text not in places:
            places[text] = length + len(strings)
            strings.extend(text.replace("\0", "").encode() + b"\0")
        return places[text]

    def relined(name: str, records: bytes, size: int) -> bytes:
        made = bytearray(records)
        rows = [RECORD.unpack_from(made, at) for at in range(0, len(made), size or 1)]
        numbers = [where >> COLUMN_BITS if types.string(file) == bcc_source.FILE else 0 for _, file, _, where in rows]
        header = next((number for number, text in enumerate(lines, 1) if re.search(rf"\b{name}\s*\(", text)), 0)
        last = b""
        begun = False
        for index, (first, number) in enumerate(zip((row[0] for row in rows), numbers, strict=True)):
            # BCC reads the arguments from registers, in lines of its own between the function's first and second.
            begun = begun or number <= next((each for each in numbers[index + 1 :] if each), number)
            line = number if begun else header or number
            if 0 < line <= len(lines):
                last = RECORD.pack(first, place(file_name), place(lines[line - 1].strip()), line << COLUMN_BITS)
            # What the compiler made up, or took from a header, belongs to the line that it was made for.
            if last:
                made[index * size : index * size + RECORD.size] = struct.pack("<I", first) + last[4:]
        return bytes(made)

    functions = tuple(
        replace(each, line_records=(relined(each.name, data, size), size))
        for each in functions
        for data, size in (each.line_records,)
    )
    header[7] = length + len(strings)
    return functions, btf.HEADER.pack(*header) + data[btf.HEADER.size :] + bytes(strings)
