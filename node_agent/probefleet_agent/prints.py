"""Lines that programs print: a record's format and values in, the text of bpf_trace_printk out. Pure.

``collect`` asks for records that hold a ``print_format_t``: those of ``trace_printk``, the ring that takes the place of
the machine's one trace_pipe (``probefleet_print.h`` and its twin for BCC). The program keeps what it was given: the
format, each value in 64 bits, the first bytes of whatever a pointer points to. Formats are those of the kernel
(lib/vsprintf.c) as far as BPF may use them; an address stays a number, for its symbol is another kernel's tomorrow.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from probefleet_wire.btf_layout import Field

FORMAT, VALUES, TEXTS, POINTERS, FLAGS = (
    "print_format_t",
    "print_values_t",
    "print_texts_t",
    "print_pointers_t",
    "print_flags_t",
)
TEXT_BYTES = 64
CUT = "…"
_CONVERSION = re.compile(
    rb"%(?P<flags>[-+ #0]*)(?P<width>\d*)(?:\.(?P<precision>\d+))?(?P<length>hh|h|ll|l|z|j|t)?"
    rb"(?:(?P<kind>[diuxXocs%])|p(?P<pointer>[iI][46]|[kux]s|[KxsSB])?)"
)
_BYTES = {b"hh": 1, b"h": 2, b"": 4}


def is_line(layout: Sequence[Field]) -> bool:
    """The record is a printed line."""
    return any(FORMAT in field.typedefs for field in layout)


def is_part(field: Field) -> bool:
    """The field is a part of the line's text, and no column by itself."""
    return bool({FORMAT, VALUES, TEXTS, POINTERS} & set(field.typedefs))


def messages(records: npt.NDArray[np.uint8], layout: Sequence[Field]) -> list[str]:
    """The text of each record."""
    parts = {typedef: _part(records, layout, typedef) for typedef in (FORMAT, VALUES, TEXTS, POINTERS)}
    values = parts[VALUES].view("<u8").tolist()
    pointers = parts[POINTERS].view("<u4").reshape(-1).tolist()
    return [
        message(bytes(form), value, bytes(texts), pointing)
        for form, value, texts, pointing in zip(parts[FORMAT], values, parts[TEXTS], pointers, strict=True)
    ]


def flags(value: int) -> str:
    """As ftrace's column: need-resched is seen; ``-``: whether interrupts are off no program sees."""
    return f"-{'N' if value & 1 else '.'}--"


def message(form: bytes, values: Sequence[int], texts: bytes, pointers: int) -> str:
    """One line; the newline at its end goes, as in trace_pipe."""
    text, cut = form.split(b"\0", 1)[0], b"\0" not in form[:-1]
    made: list[str] = []
    at, index, place = 0, 0, 0
    for found in _CONVERSION.finditer(text):
        made.append(_decoded(text[at : found.start()]))
        at = found.end()
        if found["kind"] == b"%":
            made.append("%")
            continue
        value = values[index] if index < len(values) else 0
        kept = None
        if pointers >> index & 1:
            kept = texts[place * TEXT_BYTES : (place + 1) * TEXT_BYTES]
            place += 1
        index += 1
        made.append(_converted(found, value, kept))
    made.append(_decoded(text[at:]))
    return "".join(made).rstrip("\n") + (CUT if cut else "")


def _converted(found: re.Match[bytes], value: int, kept: bytes | None) -> str:
    kind, pointer = (found["kind"] or b"").decode(), (found["pointer"] or b"").decode()
    if kind == "s" or pointer in ("ks", "us"):
        if not kept:
            return _padded(found, f"({value:#x})")  # a number, or more strings than a line keeps
        return _padded(found, _decoded(kept.split(b"\0", 1)[0]), cut=True)
    if kind == "c":
        return _padded(found, chr(value & 0xFF))
    if pointer[:1] in ("i", "I"):
        size = 4 if pointer[1] == "4" else 16
        return _padded(found, str(ipaddress.ip_address(kept[:size])) if kept else f"({value:#x})")
    if not kind:
        return _padded(found, f"{value:016x}")
    size = _BYTES.get(found["length"] or b"", 8)
    value &= (1 << 8 * size) - 1
    if kind in "di" and value >> (8 * size - 1):
        value -= 1 << 8 * size
    spec = {"d": "d", "i": "d", "u": "d", "x": "x", "X": "X", "o": "o"}[kind]
    prefix = {"x": "0x", "X": "0X", "o": "0"}.get(kind, "") if b"#" in found["flags"] and value else ""
    digits = f"{abs(value):{spec}}".rjust(int(found["precision"] or 0), "0")
    sign = "-" if value < 0 else "+" if b"+" in found["flags"] else " " if b" " in found["flags"] else ""
    if b"0" in found["flags"] and b"-" not in found["flags"] and found["precision"] is None:
        digits = digits.rjust(int(found["width"] or 0) - len(sign + prefix), "0")
    return _padded(found, sign + prefix + digits)


def _padded(found: re.Match[bytes], text: str, *, cut: bool = False) -> str:
    if cut and found["precision"] is not None:
        text = text[: int(found["precision"])]
    width = int(found["width"] or 0)
    return text.ljust(width) if b"-" in found["flags"] else text.rjust(width)


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _part(records: npt.NDArray[np.uint8], layout: Sequence[Field], typedef: str) -> npt.NDArray[np.uint8]:
    field = next(each for each in layout if typedef in each.typedefs)
    return np.ascontiguousarray(records[:, field.offset_bytes : field.offset_bytes + field.size_bytes])
