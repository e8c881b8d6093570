"""What people write becomes the bytes that C has there; what does not fit says which field, and the whole layout."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_wire import map_layout
from probefleet_wire.btf_layout import Field
from probefleet_wire.encode import EncodeError, encode

U8 = Field("flag", 0, 1, "int", type_name="unsigned char", typedefs=("u8",))
S16 = Field("delta", 2, 2, "int", signed=True, type_name="short")
NAME = Field("name", 4, 8, "char", type_name="char", shape=(8,))
PORT = Field("port", 12, 2, "int", type_name="unsigned short", typedefs=("be_port_t", "__be16"))
STATE = Field("state", 16, 4, "enum", type_name="enum state", enum_names=(("IDLE", 0), ("BUSY", 7)))
RATIO = Field("ratio", 20, 4, "float", signed=True, type_name="float")
ON = Field("on", 24, 1, "bool", type_name="_Bool")
SLOTS = Field("slots", 28, 12, "int", type_name="unsigned int", shape=(3,))
MAC = Field("mac", 40, 6, "int", type_name="unsigned char", shape=(6,))
BITS = Field("bits", 46, 1, "int", type_name="unsigned char", bit_offset=46 * 8 + 2, bits=3)
INNER = Field("in.x", 48, 4, "int", type_name="unsigned int")
LISTED = Field("in.list[1].y", 52, 4, "int", type_name="unsigned int")
ALL = (U8, S16, NAME, PORT, STATE, RATIO, ON, SLOTS, MAC, BITS, INNER, LISTED)
WORD = (Field("", 0, 4, "int", type_name="unsigned int"),)
ADDRESS = (Field("", 0, 4, "int", type_name="unsigned int", typedefs=("ipv4_t", "__be32")),)
IN6 = (Field("", 0, 16, "int", type_name="unsigned char", shape=(16,)),)


def value(given: object, fields: tuple[Field, ...] = ALL, size: int = 56) -> bytes:
    return encode(fields, size, given, whole=False, what="value")


def test_every_kind_of_field_lies_where_c_has_it() -> None:
    made = value(
        {
            "flag": 200, "delta": -3, "name": "seven", "port": 443, "state": "BUSY", "ratio": 0.5, "on": True,
            "slots": [1, 2], "mac": "0a:1b".replace(":", "") + "00" * 4, "bits": 5,
            "in": {"x": "0xff", "list": [{}, {"y": 9}]},
        }
    )  # fmt: skip
    assert struct.unpack_from("<Bxh8s", made) == (200, -3, b"seven\0\0\0")
    assert struct.unpack_from(">H", made, 12) == (443,)
    assert struct.unpack_from("<If?", made, 16) == (7, 0.5, True)
    assert struct.unpack_from("<III", made, 28) == (1, 2, 0)
    assert made[40:46] == bytes.fromhex("0a1b00000000") and made[46] == 5 << 2
    assert struct.unpack_from("<II", made, 48) == (255, 9)


@given(st.integers(0, (1 << 32) - 1))
def test_numbers_are_little_endian_and_come_back(number: int) -> None:
    assert value(number, WORD, 4) == number.to_bytes(4, "little") == value(hex(number), WORD, 4)
    assert value(number, ADDRESS, 4) == number.to_bytes(4, "big")


def test_addresses_lie_as_the_network_has_them() -> None:
    assert value("10.1.2.3", ADDRESS, 4) == value("10.1.2.3", WORD, 4) == bytes([10, 1, 2, 3])
    assert value("2001:db8::1", IN6, 16)[:4] == bytes.fromhex("20010db8")
    assert value("10.1.2.3", IN6, 16) == b"\0" * 10 + b"\xff\xff\x0a\x01\x02\x03"
    words = (Field("", 0, 16, "int", type_name="unsigned int", typedefs=("__be32",), shape=(4,)),)
    assert value("2001:db8::1", words, 16)[:4] == bytes.fromhex("20010db8")


def trie(address_bytes: int) -> tuple[Field, ...]:
    whole = Field("", 0, 4 + address_bytes, "bytes", type_name="prefix", typedefs=(map_layout.LPM_KEY,))
    rest = Field("data", 4, address_bytes, "int", type_name="unsigned char", shape=(address_bytes,))
    return (whole, Field("prefixlen", 0, 4, "int", type_name="unsigned int"), rest)


def test_prefixes() -> None:
    assert value("10.0.0.0/8", trie(4), 8) == struct.pack("<I4B", 8, 10, 0, 0, 0)
    assert value("10.0.0.0/8", trie(16), 20)[:4] == (104).to_bytes(4, "little")
    assert value("2001:db8::/32", trie(16), 20)[4:8] == bytes.fromhex("20010db8")
    assert value({"prefixlen": 12, "data": [10, 16, 0, 0]}, trie(4), 8) == struct.pack("<I4B", 12, 10, 16, 0, 0)
    for wrong in ("10.0.0.0/33", "x/8", "2001:db8::/32"):
        with pytest.raises(EncodeError):
            value(wrong, trie(4), 8)


WRONG: list[tuple[Any, str, str]] = [
    ({"flag": 256}, "flag", "256 does not fit unsigned char (0 to 255)"),
    ({"flag": True}, "flag", "True is no whole number"),
    ({"delta": 40000}, "delta", "(-32768 to 32767)"),
    ({"name": "longer than 8"}, "name", "has 13 bytes, there is room for 8"),
    ({"name": 7}, "name", "put it in quotes"),
    ({"state": "BUZY"}, "state", "it is one of IDLE, BUSY"),
    ({"ratio": "x"}, "ratio", "is no number"),
    ({"on": 1}, "on", "neither true nor false"),
    ({"slots": [1, 2, 3, 4]}, "slots", "4 items, there is room for 3"),
    ({"slots": [1, -2]}, "slots.[1]", "-2 does not fit"),
    ({"slots": 1}, "slots", "is no list of 3"),
    ({"mac": "0a1b"}, "mac", "is not 6 bytes in hex"),
    ({"bits": 8}, "bits", "8 does not fit 3 bits (0 to 7)"),
    ({"in": 5}, "in", "a struct: write its fields"),
    ({"in": {"z": 5}}, "in.z", "there is no such field"),
    ([1], "", "is no struct: write its fields"),
]


@pytest.mark.parametrize(("given", "where", "why"), WRONG)
def test_what_does_not_fit_names_the_field_and_the_layout(given: object, where: str, why: str) -> None:
    with pytest.raises(EncodeError) as caught:
        value(given)
    assert caught.value.where == where and why in caught.value.why
    assert "a value is 56 bytes {0: u8 flag, 2: short delta, 4: char name[8]" in str(caught.value)


def test_a_key_names_all_of_its_fields() -> None:
    with pytest.raises(EncodeError, match="delta: missing; a key is"):
        encode((U8, S16), 4, {"flag": 1}, whole=True, what="key")
    assert encode((U8, S16), 4, {"flag": 1, "delta": 0}, whole=True, what="key") == b"\1\0\0\0"


def test_endless_structs_end() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with pytest.raises(EncodeError, match="too deep"):
        value(endless)
