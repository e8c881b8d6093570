"""Columns: what goes in comes out, and nothing that a hostile agent sends does harm."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from probefleet_wire import columns
from probefleet_wire.columns import ColumnsError
from probefleet_wire.v1 import stream_pb2

DTYPES = [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64]
LIMIT = 10_000


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(0, 300))))
def test_integers_come_back_as_they_went(array: np.ndarray) -> None:
    back = columns.unpack(columns.pack(array), limit=LIMIT)
    assert back.dtype == (np.uint64 if array.dtype.kind == "u" else np.int64)
    assert back.tolist() == array.tolist()


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(0, 300))))
def test_ascending_integers_come_back_as_they_went(array: np.ndarray) -> None:
    array.sort()
    assert columns.unpack(columns.pack(array), limit=LIMIT).tolist() == array.tolist()


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.integers(0, 100),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)
def test_floats_come_back_bit_by_bit(array: np.ndarray) -> None:
    back = columns.unpack(columns.pack(array), limit=LIMIT)
    assert back.view(np.uint64).tolist() == array.astype(np.float64).view(np.uint64).tolist()


def test_the_ends_of_the_number_line_survive_differences() -> None:
    array = np.concatenate([np.full(20, -(2**63)), np.full(20, 2**63 - 1)]).astype(np.int64)
    assert columns.unpack(columns.pack(array), limit=40).tolist() == array.tolist()


def test_shapes_are_flattened_in_c_order_and_strides_do_not_matter() -> None:
    array = np.arange(12, dtype=np.uint64).reshape(3, 4)
    assert columns.unpack(columns.pack(array.T), limit=12).tolist() == array.T.reshape(-1).tolist()


def test_big_endian_arrays_are_turned() -> None:
    assert columns.unpack(columns.pack(np.array([1, 997], dtype=">u4")), limit=2).tolist() == [1, 997]


def test_booleans_are_small_integers() -> None:
    assert columns.unpack(columns.pack([True, False]), limit=2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("array", "most_bytes"),
    [
        (np.arange(100_000, dtype=np.uint32), 50),  # all row numbers
        (np.arange(0, 48 * 10_000, 48, dtype=np.uint64) + 2**40, 60),  # ring positions
        (np.full(1000, 200, dtype=np.uint64), 40),
        (np.array([7], dtype=np.uint64), 2),
        (np.zeros(0, dtype=np.uint64), 1),
    ],
)
def test_what_is_regular_is_small(array: np.ndarray, most_bytes: int) -> None:
    packed = columns.pack(array)
    assert len(packed) <= most_bytes
    assert columns.unpack(packed, limit=array.size).tolist() == array.tolist()


@pytest.mark.parametrize("bad", [np.array(["a"]), np.array([1j]), np.array([None])])
def test_other_types_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ColumnsError, match="cannot pack"):
        columns.pack(bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_neither_leaves_nor_enters(bad: float) -> None:
    with pytest.raises(ColumnsError, match="NaN"):
        columns.pack([1.0, bad])
    with pytest.raises(ColumnsError, match="NaN"):
        columns.unpack(b"\x09" + np.array([bad], "<f8").tobytes(), limit=5)
    with pytest.raises(ColumnsError, match="NaN"):
        columns.unpack(b"\x08" + np.array([bad], "<f4").tobytes(), limit=5)


@given(st.binary(max_size=400), st.integers(0, 50))
def test_any_bytes_give_a_bounded_array_or_the_one_error(data: bytes, limit: int) -> None:
    try:
        values = columns.unpack(data, limit=limit)
    except ColumnsError:
        return
    assert values.size <= limit


@given(st.data())
def test_a_flipped_byte_gives_a_bounded_array_or_the_one_error(data: st.DataObject) -> None:
    packed = bytearray(columns.pack(data.draw(hnp.arrays(np.uint64, 200, elements=st.integers(0, 5)))))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] = data.draw(st.integers(0, 255))
    try:
        assert columns.unpack(bytes(packed), limit=200).size <= 200
    except ColumnsError:
        pass


def zstd(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty column"),
        (b"\x0a", "unknown column header 0x0a"),
        (b"\x80", "unknown column header 0x80"),
        (b"\x40", "contradictory"),
        (b"\x29", "contradictory"),
        (b"\x01abc", "no multiple of 2"),
        (b"\x00" + bytes(101), "at most 100 "),
        (b"\x20abc", "8 of the first value"),
        (b"\x20" + bytes(8 + 100), "101 values"),
        (b"\x20" + b"\xff" * 9, "overflows"),
        (b"\x10" + zstd(bytes(1 << 24)), "16777216 bytes unpacked"),
        (b"\x10" + zstd(bytes(8), write_content_size=False), "does not state its size"),
        (b"\x10" + zstd(bytes(50)) + b"more", "broken zstd"),
        (b"\x10" + zstd(bytes(50))[:-3], "broken zstd"),
        (b"\x10nonsense", "broken zstd"),
        (b"\x10", "broken zstd"),
    ],
)
def test_hostile_bytes_are_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(ColumnsError, match=words):
        columns.unpack(data, limit=100)


def test_an_empty_zstd_frame_is_an_empty_column() -> None:
    assert columns.unpack(b"\x10" + zstd(b""), limit=0).size == 0


def test_unsigned_columns_are_asked_for_by_name() -> None:
    assert columns.unpack_unsigned(columns.pack(np.array([3], np.uint64)), limit=1).tolist() == [3]
    with pytest.raises(ColumnsError, match="unsigned"):
        columns.unpack_unsigned(columns.pack(np.array([3], np.int64)), limit=1)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)))
def test_strings_come_back_as_they_went(values: list[str]) -> None:
    packed = stream_pb2.Strings.FromString(columns.pack_strings(values).SerializeToString())
    assert columns.unpack_strings(packed, limit=LIMIT).to_list() == values
    assert len(packed.distinct) == len(set(values))


@pytest.mark.parametrize(
    ("strings", "words"),
    [
        (stream_pb2.Strings(distinct=["a"], index=columns.pack(np.array([1], np.uint32))), "index 1 of 1"),
        (stream_pb2.Strings(distinct=["a", "a"], index=columns.pack(np.array([1], np.uint32))), "twice"),
        (stream_pb2.Strings(distinct=["x" * (65 << 10)]), "at most 65536"),
        (stream_pb2.Strings(distinct=[str(i).ljust(60_000) for i in range(300)]), "together"),
        (stream_pb2.Strings(distinct=["a"], index=columns.pack(np.array([0] * 11, np.uint32))), "at most"),
        (stream_pb2.Strings(distinct=["a"], index=columns.pack(np.array([-1], np.int32))), "unsigned"),
    ],
)
def test_hostile_strings_are_refused_in_words(strings: stream_pb2.Strings, words: str) -> None:
    with pytest.raises(ColumnsError, match=words):
        columns.unpack_strings(strings, limit=10)


@pytest.mark.parametrize(
    ("values", "kind", "back"),
    [
        ([0, 2**63 + 1, 2**64 - 1], "integers", [0, 2**63 + 1, 2**64 - 1]),
        ([-(2**63), 0], "integers", [-(2**63), 0]),
        (["a", "b", "a"], "strings", ["a", "b", "a"]),
        (np.array(["a", "b"], dtype=object), "strings", ["a", "b"]),
        (np.array(["a", "b"]), "strings", ["a", "b"]),
        (np.array([1, 2], np.uint16), "integers", [1, 2]),
        ([1, -2], "integers", [1, -2]),
        (np.array([0.5]), "floats", [0.5]),
        ([], "integers", []),
        (np.zeros(0), "integers", []),
    ],
)
def test_a_column_takes_what_it_is_given(values: object, kind: str, back: list[object]) -> None:
    message = columns.column("c", values)  # type: ignore[arg-type]
    assert (message.name, message.WhichOneof("data")) == ("c", kind)
    content = columns.read_column(message, len(back))
    assert (content if isinstance(content, list) else content.tolist()) == back


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (stream_pb2.Column(name="c"), "column 'c': neither"),
        (columns.column("c", [1, 2]), "2 values for 3 rows"),
        (columns.column("c", ["a"]), "1 values for 3 rows"),
        (
            stream_pb2.Column(name="c", integers=columns.pack([0.5, 1.5, 2.5])),
            "integers were announced, float64",
        ),
        (
            stream_pb2.Column(name="c", floats=columns.pack(np.array([1, 2, 3]))),
            "floats were announced, int64",
        ),
        (stream_pb2.Column(name="c", integers=b"\x0f"), "column 'c': unknown column header"),
    ],
)
def test_a_column_that_does_not_fit_its_rows_is_refused(message: stream_pb2.Column, words: str) -> None:
    with pytest.raises(ColumnsError, match=words):
        columns.read_column(message, 3)


@given(st.lists(st.text(max_size=3), min_size=1, max_size=5), st.data())
def test_a_coded_column_reads_as_its_texts_however_they_repeat(texts: list[str], data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=20)), np.int64)
    assert columns.coded_column("c", texts, index) == columns.column("c", [texts[at] for at in index.tolist()])
