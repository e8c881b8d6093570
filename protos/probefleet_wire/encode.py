"""From what a person writes to the bytes of a map's key or value: numbers, text, addresses, prefixes, structs. Pure.

The planner encodes ``maps[].values`` with it, ``probefleet map set`` what stands on the command line. The fields come
from BTF (``map_layout``); what does not fit is refused with the field and the whole layout, as in::

    value.rate: 300 does not fit unsigned char (0 to 255); a value is 8 bytes {0: u8 rate, 4: u32 uid}
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Iterator, Mapping, Sequence

from probefleet_wire import map_layout
from probefleet_wire.btf_layout import Field
from probefleet_wire.map_layout import LPM_KEY

_NUMBER = re.compile(r"[+-]?(0[xX][0-9a-fA-F]+|[0-9]+)")
_BIG_ENDIAN = frozenset({"ipv4_t", "__be16", "__be32", "__be64", "be_port_t"})
MAX_DEPTH = 16


class EncodeError(ValueError):
    """A value that does not fit its type. ``where`` is the path within it, "" for the whole."""

    def __init__(self, where: str, why: str) -> None:
        self.where = where
        self.why = why
        super().__init__(f"{where}: {why}" if where else why)


def encode(fields: Sequence[Field], size_bytes: int, given: object, *, whole: bool, what: str) -> bytes:
    """The bytes of a key or value. ``whole``: every field has to be given (a key); else what is absent is zero.

    Raises EncodeError, whose text ends with the layout of the ``what`` ("key", "value").
    """
    try:
        return _encode(fields, size_bytes, given, whole)
    except EncodeError as error:
        layout = map_layout.words(size_bytes, fields)
        raise EncodeError(error.where, f"{error.why}; a {what} is {layout}") from None


def _encode(fields: Sequence[Field], size_bytes: int, given: object, whole: bool) -> bytes:
    buffer = bytearray(size_bytes)
    if fields and LPM_KEY in fields[0].typedefs:
        if isinstance(given, str):
            return _prefix(given, size_bytes)
        fields = fields[1:]
    if len(fields) == 1 and not fields[0].name:
        _put(buffer, fields[0], given)
        return bytes(buffer)
    if not isinstance(given, Mapping):
        raise EncodeError("", f"{_shown(given)} is no struct: write its fields, as in {{{_example(fields)}}}")
    by_name = {field.name: field for field in fields}
    seen = set()
    for name, value in _leaves(given, "", by_name, 0):
        _put(buffer, by_name[name], value)
        seen.add(name)
    missing = [field.name for field in fields if field.name not in seen and not field.in_union]
    if whole and missing:
        raise EncodeError(missing[0], "missing")
    return bytes(buffer)


def _leaves(given: object, name: str, fields: Mapping[str, Field], depth: int) -> Iterator[tuple[str, object]]:
    """(field, value) of a nested mapping: ``{a: {b: 1}}`` is the field ``a.b``, ``{s: [{x: 1}]}`` is ``s[0].x``."""
    if name in fields:
        yield name, given
    elif depth > MAX_DEPTH:
        raise EncodeError(name, "lies too deep")
    elif isinstance(given, Mapping):
        for key, value in given.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key), fields, depth + 1)
    elif isinstance(given, list) and any(each.startswith(f"{name}[") for each in fields):
        for index, value in enumerate(given):
            yield from _leaves(value, f"{name}[{index}]", fields, depth + 1)
    else:
        inside = any(each.startswith((f"{name}.", f"{name}[")) for each in fields)
        raise EncodeError(name, "a struct: write its fields" if inside else "there is no such field")


def _put(buffer: bytearray, field: Field, given: object) -> None:
    try:
        data = _bytes_of(field, given)
    except EncodeError as error:
        raise EncodeError(".".join(part for part in (field.name, error.where) if part), error.why) from None
    if field.bits:
        at, size = field.offset_bytes, field.size_bytes
        word = int.from_bytes(buffer[at : at + size], "little")
        shift = field.bit_offset % 8
        mask = ((1 << field.bits) - 1) << shift
        word = word & ~mask | (int.from_bytes(data, "little") << shift) & mask
        buffer[at : at + size] = word.to_bytes(size, "little")
        return
    buffer[field.offset_bytes : field.offset_bytes + len(data)] = data


def _bytes_of(field: Field, given: object) -> bytes:
    if field.is_char_array:
        return _text(field, given)
    if isinstance(given, str) and (address := _address(field, given)) is not None:
        return address
    if field.shape:
        return _array(field, given)
    if field.kind == "float":
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise EncodeError("", f"{_shown(given)} is no number")
        return struct.pack("<f" if field.size_bytes == 4 else "<d", given)
    if field.kind == "bytes":
        return _hex(field.size_bytes, given)
    return _integer(field, field.size_bytes, given)


def _integer(field: Field, size_bytes: int, given: object) -> bytes:
    if field.kind == "bool":
        if not isinstance(given, bool):
            raise EncodeError("", f"{_shown(given)} is neither true nor false")
        return int(given).to_bytes(size_bytes, "little")
    number = _number(field, given)
    bits = field.bits or 8 * size_bytes
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if field.signed else (0, (1 << bits) - 1)
    if not low <= number <= high:
        kind = f"{field.bits} bits" if field.bits else field.type_name
        raise EncodeError("", f"{number} does not fit {kind} ({low} to {high})")
    order = "big" if _BIG_ENDIAN & set(field.typedefs) else "little"
    if field.bits:
        return (number & ((1 << bits) - 1)).to_bytes(size_bytes, "little")
    return number.to_bytes(size_bytes, "big" if order == "big" else "little", signed=field.signed)


def _number(field: Field, given: object) -> int:
    names = dict(field.enum_names)
    if isinstance(given, str) and given in names:
        return names[given]
    if isinstance(given, str) and _NUMBER.fullmatch(given):
        return int(given, 16 if "x" in given.lower() else 10)
    if isinstance(given, bool) or not isinstance(given, int):
        known = f": it is one of {', '.join(list(names)[:12])}" if names else ""
        raise EncodeError("", f"{_shown(given)} is no whole number{known}")
    return given


def _text(field: Field, given: object) -> bytes:
    if not isinstance(given, str):
        raise EncodeError("", f"{_shown(given)} is no text: put it in quotes")
    data = given.encode()
    if len(data) > field.size_bytes:
        raise EncodeError("", f'"{given}" has {len(data)} bytes, there is room for {field.size_bytes}')
    return data.ljust(field.size_bytes, b"\0")


def _array(field: Field, given: object) -> bytes:
    if isinstance(given, str) and field.element_bytes == 1:
        return _hex(field.size_bytes, given)
    if not isinstance(given, list):
        raise EncodeError("", f"{_shown(given)} is no list of {field.count}")
    if len(field.shape) > 1:
        given = [part for row in given for part in (row if isinstance(row, list) else [row])]
    if len(given) > field.count:
        raise EncodeError("", f"{len(given)} items, there is room for {field.count}")
    data = b""
    for index, item in enumerate(given):
        try:
            data += _integer(field, field.element_bytes, item)
        except EncodeError as error:
            raise EncodeError(f"[{index}]", error.why) from None
    return data.ljust(field.size_bytes, b"\0")


def _hex(size_bytes: int, given: object) -> bytes:
    text = given.removeprefix("0x") if isinstance(given, str) else ""
    if not re.fullmatch(r"([0-9a-fA-F]{2})+", text) or len(text) != 2 * size_bytes:
        raise EncodeError("", f"{_shown(given)} is not {size_bytes} bytes in hex, such as {'00' * min(size_bytes, 4)}")
    return bytes.fromhex(text)


def _address(field: Field, given: str) -> bytes | None:
    """An IP address where the field has room for one; None where it is no address, or the field no place for it."""
    try:
        address = ipaddress.ip_address(given)
    except ValueError:
        return None
    in_bytes = field.element_bytes == 1 and field.shape
    as_word = field.size_bytes == 4 and not field.shape and (field.kind == "int")
    if as_word and isinstance(address, ipaddress.IPv4Address):
        return address.packed
    if in_bytes and field.size_bytes == len(address.packed):
        return address.packed
    if in_bytes and field.size_bytes == 16:  # as probefleet.h's ip_t keeps IPv4
        return b"\0" * 10 + b"\xff\xff" + address.packed
    if field.count * field.element_bytes == 16 and field.shape == (4,):  # __be32[4], as in struct in6_addr
        return address.packed if len(address.packed) == 16 else None
    return None


def _prefix(given: str, size_bytes: int) -> bytes:
    """An LPM trie's key: ``10.0.0.0/8``. Bits behind the prefix are as written: the kernel does not look at them."""
    room = map_layout.lpm_address_bytes(size_bytes)
    try:
        interface = ipaddress.ip_interface(given)
    except ValueError:
        raise EncodeError("", f'"{given}" is no prefix such as 10.0.0.0/8') from None
    data, length = interface.packed, interface.network.prefixlen
    if room == 16 and len(data) == 4:
        data, length = b"\0" * 10 + b"\xff\xff" + data, length + 96
    if len(data) != room:
        raise EncodeError("", f'"{given}" has {8 * len(data)} bits of address, the key {8 * (size_bytes - 4)}')
    return length.to_bytes(4, "little") + data


def _shown(given: object) -> str:
    text = f'"{given}"' if isinstance(given, str) else str(given)
    return text if len(text) <= 40 else text[:39] + "…"


def _example(fields: Sequence[Field]) -> str:
    return ", ".join(f"{field.name}: …" for field in fields[:3])
