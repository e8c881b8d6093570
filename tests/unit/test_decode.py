"""Decoding: bytes of maps and rings become the numbers and names that the C types and the policy say."""

from __future__ import annotations

import dataclasses
import socket
import struct

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_agent import decode
from probefleet_agent.decode import DecodeError, Layout
from probefleet_wire.btf_layout import Field

Bytes = npt.NDArray[np.uint8]
BOOTED_NS = 1_700_000_000_000_000_000


class Machine:
    """What decoding may ask of a machine, with one answer to each question."""

    machine = "x86_64"
    wall_minus_ktime_ns = BOOTED_NS

    def command(self, pid: int) -> str:
        return {4201: "nginx"}.get(pid, "")

    def learn(self, pid: int, command: str) -> None:
        pass

    def user(self, uid: int) -> str:
        return {33: "www-data"}.get(uid, "")

    def device(self, number: int) -> str:
        return {8 << 20: "sda"}.get(number, "")

    def function(self, address: int) -> str:
        return {0xFFFF_FFFF_8100_0004: "tcp_sendmsg"}.get(address, "")


MACHINE = Machine()
U32 = Field("n", 0, 4, "int", type_name="unsigned int")
I32 = dataclasses.replace(U32, signed=True, type_name="int")
U64 = Field("n", 0, 8, "int", type_name="unsigned long long")
I64 = dataclasses.replace(U64, signed=True)


def entries(*parts: bytes) -> Bytes:
    return np.array([list(part) for part in parts], np.uint8).reshape(len(parts), -1)


def decoded(field: Field, *parts: bytes, **decoders: str) -> list[object]:
    buffer = entries(*parts)
    column = decode.column(buffer, field, decode.decoder_of(field, decoders, field.name), MACHINE)
    assert len(column) == len(parts)
    result: list[object] = column.tolist()
    return result


def typed(field: Field, *typedefs: str) -> Field:
    return dataclasses.replace(field, typedefs=typedefs)


INTEGERS = {
    (size, signed): dataclasses.replace(U32, size_bytes=size, signed=signed)
    for size in (1, 2, 4, 8)
    for signed in (False, True)
}


@pytest.mark.parametrize(("size", "signed"), INTEGERS)
@given(data=st.data())
def test_an_integer_of_any_size_at_any_place_is_itself(size: int, signed: bool, data: st.DataObject) -> None:
    low, high = (-(1 << (8 * size - 1)), (1 << (8 * size - 1)) - 1) if signed else (0, (1 << (8 * size)) - 1)
    numbers = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=5))
    offset = data.draw(st.integers(0, 9))
    field = dataclasses.replace(INTEGERS[size, signed], offset_bytes=offset)
    parts = [b"\xa5" * offset + number.to_bytes(size, "little", signed=signed) + b"\x5a" for number in numbers]
    assert decoded(field, *parts) == numbers


@given(
    bits=st.integers(1, 64),
    start=st.integers(0, 7),
    signed=st.booleans(),
    word=st.integers(0, (1 << 72) - 1),
)
def test_a_bit_field_is_its_bits_alone(bits: int, start: int, signed: bool, word: int) -> None:
    size = (start + bits + 7) // 8
    if size > 8:
        bits, size = 64 - start, 8
    field = Field("flags", 1, size, "int", signed, bit_offset=8 + start, bits=bits)
    value = (word >> start) & ((1 << bits) - 1)
    if signed and bits < 64 and value >> (bits - 1):
        value -= 1 << bits
    if signed and bits == 64 and value >> 63:
        value -= 1 << 64
    assert decoded(field, b"\xff" + word.to_bytes(9, "little")) == [value]


def test_floats_are_floats() -> None:
    field = Field("ratio", 0, 8, "float", type_name="double")
    assert decoded(field, struct.pack("<d", 0.5), struct.pack("<d", -3.25)) == [0.5, -3.25]


def test_booleans_are_words() -> None:
    assert decoded(Field("ok", 0, 1, "bool"), b"\0", b"\1") == ["false", "true"]


def test_a_value_of_an_enum_is_its_name_and_a_strange_one_its_number() -> None:
    field = Field("state", 0, 4, "enum", enum_names=(("TCP_ESTABLISHED", 1), ("TCP_CLOSE", 7)))
    assert decoded(field, *(struct.pack("<I", n) for n in (7, 1, 23))) == ["TCP_CLOSE", "TCP_ESTABLISHED", "23"]


@pytest.mark.parametrize(
    ("typedef", "data", "shown"),
    [
        ("ipv4_t", socket.inet_pton(socket.AF_INET, "10.0.0.7"), "10.0.0.7"),
        ("ipv6_t", socket.inet_pton(socket.AF_INET6, "2001:db8::7"), "2001:db8::7"),
        ("ip_t", socket.inet_pton(socket.AF_INET6, "::ffff:10.0.0.7"), "10.0.0.7"),
        ("ip_t", bytes(16), "::"),
        ("ip_t", bytes.fromhex("020304"), "020304"),
    ],
)
def test_addresses_read_as_people_write_them(typedef: str, data: bytes, shown: str) -> None:
    shape = () if len(data) == 4 else (len(data),)
    assert decoded(Field("to", 0, len(data), "int", typedefs=(typedef,), shape=shape), data) == [shown]


@pytest.mark.parametrize(("typedef", "order"), [("be_port_t", ">"), ("__be16", ">"), ("port_t", "<")])
def test_ports_are_numbers_whatever_their_byte_order(typedef: str, order: str) -> None:
    field = Field("port", 0, 2, "int", typedefs=(typedef, "__u16"))
    assert decoded(field, struct.pack(f"{order}H", 443), struct.pack(f"{order}H", 8080)) == [443, 8080]


@pytest.mark.parametrize(
    ("typedef", "number", "shown"),
    [
        ("syscall_t", 257, "openat"),
        ("syscall_t", 99_999, "syscall_99999"),
        ("errno_t", 0, "OK"),
        ("errno_t", -2, "ENOENT"),
        ("errno_t", 17, "17"),  # what a call returned, not that it failed
        ("open_flags_t", 0o2000000, "O_RDONLY|O_CLOEXEC"),
        ("open_flags_t", 0o20200102 | 1 << 30, "O_RDWR|O_TMPFILE|O_CREAT|0x40000000"),
        ("open_flags_t", 0o4010001, "O_WRONLY|O_SYNC"),
        ("open_flags_t", 0o10001, "O_WRONLY|O_DSYNC"),
        ("user_id_t", 33, "www-data"),
        ("user_id_t", 65_534, "65534"),
        ("pid_nr_t", 4201, "nginx[4201]"),
        ("pid_nr_t", 7, "7"),
        ("device_t", 8 << 20, "sda"),
        ("device_t", 259 << 20 | 3, "259:3"),
        ("tid_nr_t", 4201, 4201),
    ],
)
def test_a_typedef_names_its_decoder(typedef: str, number: int, shown: object) -> None:
    assert decoded(typed(I32, typedef, "__s32"), struct.pack("<i", number)) == [shown]


def test_an_address_in_the_kernel_is_its_functions_name() -> None:
    field = Field("ip", 0, 8, "int", typedefs=("function_t", "u64"), type_name="unsigned long long")
    found = decoded(field, struct.pack("<Q", 0xFFFF_FFFF_8100_0004), struct.pack("<Q", 0xFFFF_FFFF_8100_0005))
    assert found == ["tcp_sendmsg", "0xffffffff81000005"]


def test_system_calls_are_those_of_the_machine() -> None:
    field = typed(U32, "syscall_t")

    class Arm(Machine):
        machine = "aarch64"

    assert decode.column(entries(struct.pack("<I", 56)), field, "syscall", Arm()).tolist() == ["openat"]


def test_times_are_wall_clock_and_no_time_stays_none() -> None:
    field = typed(U64, "ktime_t_ns")
    assert decoded(field, struct.pack("<Q", 23), struct.pack("<Q", 0)) == [BOOTED_NS + 23, 0]


TEXT = Field("comm", 0, 8, "char", shape=(8,), type_name="char")


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"nginx\0\0\0", "nginx"),
        (b"sh\0stale", "sh"),
        (b"exactly8", "exactly8"),
        (bytes(8), ""),
        ("Zoë".encode() + b"\0\0\0\0", "Zoë"),
        (b"\xff\xfe\0\0\0\0\0\0", "\ufffd\ufffd"),
    ],
)
def test_text_ends_at_its_zero(data: bytes, shown: str) -> None:
    assert decoded(TEXT, data) == [shown]


def test_text_may_lie_in_an_array_of_bytes_when_the_policy_says_so() -> None:
    field = Field("path", 0, 8, "int", shape=(8,), type_name="unsigned char")
    assert decoded(field, b"/etc/x\0\0", path="text") == ["/etc/x"]


def test_text_may_lie_in_integers_when_the_policy_says_so() -> None:
    assert decoded(U64, b"redis\0\0\0", b"etcd\0\0\0\0", n="text") == ["redis", "etcd"]


@pytest.mark.parametrize(
    "field", [Field("mac", 0, 6, "int", shape=(6,)), Field("mac", 0, 6, "bytes"), Field("mac", 0, 6, "int")]
)
def test_what_has_no_better_form_is_hexadecimal_or_refused(field: Field) -> None:
    if decode.decoder_of(field, {}, "mac") == "hex":
        assert decoded(field, bytes.fromhex("020000c0ffee")) == ["020000c0ffee"]
    else:
        assert decoded(field, bytes.fromhex("020000c0ffee"), mac="hex") == ["020000c0ffee"]


def test_the_policys_word_goes_before_the_typedefs() -> None:
    field = typed(U32, "user_id_t")
    assert decode.decoder_of(field, {"n": "integer"}, "key.n") == "integer"
    assert decode.decoder_of(field, {"key.n": "syscall"}, "key.n") == "syscall"
    assert decode.decoder_of(field, {"n": "cgroup"}, "n") == "cgroup"
    assert decoded(field, struct.pack("<I", 33), n="integer") == [33]


def test_a_decoder_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(DecodeError, match=r"no decoder 'ipv5'.*big_endian.*syscall"):
        decode.decoder_of(U32, {"n": "ipv5"}, "n")


@pytest.mark.parametrize(
    ("field", "decoder"),
    [
        (TEXT, "text"),
        (Field("s", 0, 4, "enum", enum_names=(("A", 1),)), "enum"),
        (Field("b", 0, 1, "bool"), "bool"),
        (Field("f", 0, 8, "float"), "float"),
        (Field("x", 0, 3, "bytes"), "hex"),
        (Field("x", 0, 8, "int", shape=(2,)), "hex"),
        (typed(U32, "__u32"), "integer"),
    ],
)
def test_without_a_typedef_of_ours_the_c_type_decides(field: Field, decoder: str) -> None:
    assert decode.decoder_of(field, {}, field.name) == decoder


@pytest.mark.parametrize("decoder", sorted({*decode.DECODERS, "enum", "bool", "float"} - {"text"}))
def test_nothing_decodes_to_nothing(decoder: str) -> None:
    assert decode.column(np.zeros((0, 4), np.uint8), U32, decoder, MACHINE).tolist() == []


@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_name_is_asked_for_once_and_stands_in_every_row(uids: list[int]) -> None:
    asked: list[int] = []

    class Counting(Machine):
        def user(self, uid: int) -> str:
            asked.append(uid)
            return f"user-{uid}"

    buffer = np.array(uids, "<u4").view(np.uint8).reshape(-1, 4)
    names = decode.column(buffer, typed(U32, "user_id_t"), "uid", Counting()).tolist()
    assert names == [f"user-{uid}" for uid in uids]
    assert sorted(asked) == sorted(set(uids))


def test_a_field_is_found_by_its_name_and_the_only_one_without() -> None:
    whole = Field("", 0, 4, "int")
    assert decode.find([whole], "", "the key") is whole
    assert decode.find([U32, I64], "n", "the key") is U32
    with pytest.raises(DecodeError, match=r"the key has no field 'uid'; its fields are: n"):
        decode.find([U32], "uid", "the key")
    with pytest.raises(DecodeError, match=r"no field 'uid'; its fields are: \(the whole\)"):
        decode.find([whole], "uid", "the key")
    with pytest.raises(DecodeError, match="its fields are: none"):
        decode.find([], "", "the key")


def test_a_field_is_found_by_any_typedef_it_went_through() -> None:
    field = typed(U64, "cgroup_id_t", "__u64")
    assert decode.with_typedef([U32, field], *decode.CGROUP) is field
    assert decode.with_typedef([U32], *decode.CGROUP) is None


def test_a_layout_survives_the_manifest() -> None:
    layout = Layout((typed(U32, "pid_nr_t"), TEXT), 12, (Field("s", 0, 4, "enum", enum_names=(("A", -1),)),), 4)
    assert Layout.from_json(layout.to_json()) == layout


# Counters.


def counter(field: Field) -> Layout:
    return Layout((), 0, (field,), field.offset_bytes + field.size_bytes)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@given(data=st.data())
def test_narrow_counters_are_widened_before_cpus_are_summed(size: int, data: st.DataObject) -> None:
    cpus = data.draw(st.integers(1, 5))
    most = min((1 << (8 * size)) - 1, (1 << 60) - 1)
    table = data.draw(st.lists(st.lists(st.integers(0, most), min_size=cpus, max_size=cpus), min_size=1, max_size=4))
    # A per-CPU map pads each CPU's value to eight bytes.
    values = entries(*(b"".join(n.to_bytes(8, "little") for n in row) for row in table)).reshape(len(table), cpus, 8)
    layout = counter(INTEGERS[size, False])
    assert decode.numbers(values, layout, "n").tolist() == [sum(row) for row in table]
    assert decode.folded(values, layout, "n", "sum").tolist() == [sum(row) for row in table]
    assert decode.folded(values, layout, "n", "max").tolist() == [max(row) for row in table]
    assert decode.folded(values, layout, "n", "latest").tolist() == [max(row) for row in table]
    # A CPU that never wrote holds 0, and has no say in a minimum.
    lowest = [min((n for n in row if n), default=0) for row in table]
    assert decode.folded(values, layout, "n", "min").tolist() == lowest


def test_two_full_bytes_are_510() -> None:
    values = np.full((1, 2, 8), 0, np.uint8)
    values[:, :, 0] = 255
    assert decode.numbers(values, counter(INTEGERS[1, False]), "n").tolist() == [510]


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_slots_are_summed_each_for_itself(table: list[list[int]]) -> None:
    field = Field("slots", 8, 12, "int", shape=(3,))
    one = entries(*(bytes(8) + struct.pack("<3I", *row) for row in table))
    assert decode.numbers(one, counter(field), "slots").tolist() == table
    two = np.zeros((len(table), 2, 24), np.uint8)
    two[:, 0, :20] = two[:, 1, :20] = one
    assert decode.numbers(two, counter(field), "slots").tolist() == [[2 * n for n in row] for row in table]
    assert decode.folded(two, counter(field), "slots", "max").tolist() == table


def test_a_plain_maps_gauge_is_its_value() -> None:
    assert decode.folded(entries(struct.pack("<I", 23)), counter(U32), "n", "max").tolist() == [23]


@pytest.mark.parametrize(
    "field",
    [
        TEXT,
        Field("comm", 0, 8, "bytes", type_name="union bits"),
        Field("comm", 0, 8, "pointer", type_name="void *"),
        Field("comm", 0, 8, "float", type_name="double"),
        Field("comm", 0, 8, "int", shape=(2, 2), type_name="unsigned short"),
    ],
)
def test_what_is_no_number_is_not_counted(field: Field) -> None:
    with pytest.raises(DecodeError, match=f"comm is {field.type_name.replace('*', '.')}, which cannot be counted"):
        decode.numbers(entries(bytes(8)), counter(field), "comm")


def test_what_is_no_number_is_not_counted_in_a_value_without_fields() -> None:
    whole = dataclasses.replace(TEXT, name="")
    with pytest.raises(DecodeError, match=r"\(the whole\) is char"):
        decode.numbers(entries(bytes(8)), counter(whole), "")


class Learner(Machine):
    """Remembers what it is told, as the machine's lookups do."""

    def __init__(self) -> None:
        self.told: dict[int, str] = {}

    def command(self, pid: int) -> str:
        return self.told.get(pid, "") or super().command(pid)

    def learn(self, pid: int, command: str) -> None:
        self.told[pid] = command


PROCESS = dataclasses.replace(U32, name="pid", typedefs=("pid_nr_t",))
PARENT = dataclasses.replace(PROCESS, name="parent", offset_bytes=4)
COMMAND = Field("command", 8, 16, "char", shape=(16,), type_name="char", typedefs=("comm_t",))


def test_a_record_names_its_process_itself_and_others_learn_it() -> None:
    own = decode.own_command((PROCESS, PARENT, COMMAND))
    assert own == (PROCESS, COMMAND)
    lookups = Learner()
    records = entries(
        struct.pack("<II16s", 7, 4201, b"sh"), struct.pack("<II16s", 8, 7, b"ls"), struct.pack("<II16s", 0, 9, b"")
    )
    # 7 is called otherwise by now, 8 is gone; 0 is no process.
    assert decode.processes(records, own, lookups).to_list() == ["sh[7]", "ls[8]", "0"]
    parents = decode.column(records, PARENT, "pid", lookups)
    assert parents.tolist() == ["nginx[4201]", "sh[7]", "9"]
    assert decode.processes(records[:0], own, lookups).to_list() == []
    again = entries(*(struct.pack("<II16s", 7, 1, name) for name in (b"sh", b"ls", b"sh", b"cat", b"ls")))
    assert decode.processes(again, own, lookups).to_list() == ["sh[7]", "ls[7]", "sh[7]", "cat[7]", "ls[7]"]
    assert lookups.command(7) == "ls", "the last one holds"


def test_a_command_of_nobody_in_particular_names_no_process() -> None:
    assert decode.own_command((PROCESS, PARENT)) is None
    assert decode.own_command((COMMAND,)) is None
    assert decode.own_command((PROCESS, COMMAND, dataclasses.replace(COMMAND, name="next", offset_bytes=24))) is None


@given(st.lists(st.integers(0, 3), max_size=30))
def test_distinct_values_and_where_they_are(values: list[int]) -> None:
    found, index = decode.distinct(np.array(values, np.uint64))
    assert found.tolist() == sorted(set(values))
    assert found[index].tolist() == values


def test_a_single_char_is_a_letter() -> None:
    field = Field(name="type", offset_bytes=1, size_bytes=1, kind="char", type_name="char")
    entries = np.frombuffer(b"\0R\0O\0\0", np.uint8).reshape(3, 2)
    assert decode.decoder_of(field, {}, "type") == "text"
    assert decode.column(entries, field, "text", Machine()).tolist() == ["R", "O", ""]
