"""Columns on the wire: a NumPy array in, few bytes out, and back, checked.

The agent packs what it read from maps and rings (``Table.rows``, ``Table.values``, ``Column``,
``EventChunk.positions``); the operator unpacks it, from nodes that it does not trust. Arrays of any shape are
written flat in C order; the message around them (``Table.width``) gives the shape back. Three kinds exist:
unsigned, signed and floating. What comes back is always the widest of its kind (uint64, int64, float64),
because arithmetic on a uint8 overflows silently.

The format is one header byte, then the body::

    bits 0-3  element type: 0 u8, 1 u16, 2 u32, 3 u64, 4 i8, 5 i16, 6 i32, 7 i64, 8 f32, 9 f64 (little-endian)
    bit  4    the body is one zstd frame that states its content size
    bit  5    ascending: 8 bytes of the first value, then the differences of neighbours as elements (u8…u64)
    bit  6    with bit 5: the values are signed
    bit  7    0

The narrowest element type that holds every value is taken, because zstd on narrow elements is both faster and
smaller than on wide ones. Row numbers, ring positions and times ascend: their differences mostly fit one
byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from probefleet_wire.v1 import stream_pb2

Array: TypeAlias = npt.NDArray[np.uint64] | npt.NDArray[np.int64] | npt.NDArray[np.float64]
AnyArray: TypeAlias = npt.NDArray[Any]

_TYPES: Final = tuple(np.dtype(name) for name in ("<u1", "<u2", "<u4", "<u8", "<i1", "<i2", "<i4", "<i8", "<f4", "<f8"))
_UNSIGNED: Final = _TYPES[0:4]
_SIGNED: Final = _TYPES[4:8]
_F32, _F64 = _TYPES[8:10]
_ZSTD, _ASCENDING, _ASCENDING_SIGNED, _RESERVED = 0x10, 0x20, 0x40, 0x80
_FIRST_BYTES = 8

# Below this a zstd frame's own header and the call cost more than they save.
_WORTH_COMPRESSING_BYTES = 128
# The fastest level: columns of counters gain hardly anything from higher ones.
_LEVEL = 1
# Fewer than this and the eight bytes of a first value do not pay.
_WORTH_DIFFERENCES = 16

# A decoded name (a path, a stack of 127 frames) is long at times, never this long.
MAX_STRING_BYTES = 64 << 10
# All distinct strings of one column together.
MAX_STRINGS_BYTES = 16 << 20


class ColumnsError(ValueError):
    """Bytes from the wire, or values for it, that are no column: what is wrong and what was expected."""


@dataclass(frozen=True, slots=True)
class StringColumn:
    """Strings in coded form: row ``i`` has ``distinct[index[i]]``. Distinct strings do not repeat."""

    distinct: tuple[str, ...]
    index: npt.NDArray[np.uint64]

    def to_list(self) -> list[str]:
        """One string a row."""
        return [self.distinct[i] for i in self.index.tolist()]


def pack(array: npt.ArrayLike) -> bytes:
    """Any array of integers, booleans or finite floats, as bytes (see the module's docstring).

    Raises ColumnsError for other element types, and for NaN and infinity: no sum could ever recover from one.
    """
    values = np.asarray(array).reshape(-1)
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)
    if values.dtype.kind not in "uif" or values.dtype.itemsize > 8:
        raise ColumnsError(f"cannot pack elements of type {values.dtype}: integers and floats up to 64 bits only")
    if values.dtype.kind == "f":
        narrow = _narrow_floats(values)
        return _frame(_TYPES.index(narrow.dtype), b"", narrow)
    if _ascends(values):
        first = values[:1].astype("<u8" if values.dtype.kind == "u" else "<i8")
        # Modulo 2⁶⁴: from the lowest to the highest int64 the difference still fits a uint64.
        wide = values.astype("<u8", casting="unsafe")
        differences = wide[1:] - wide[:-1]
        code = _narrowest(int(differences.max()), 0, _UNSIGNED)
        flags = _ASCENDING | (_ASCENDING_SIGNED if values.dtype.kind == "i" else 0)
        return _frame(code | flags, first.tobytes(), differences.astype(_TYPES[code]))
    family = _UNSIGNED if values.dtype.kind == "u" else _SIGNED
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    code = _narrowest(high, low, family)
    return _frame(code, b"", values.astype(_TYPES[code], copy=False))


def unpack(data: bytes, *, limit: int) -> Array:
    """The array that was packed: uint64, int64 or float64, one-dimensional, read-only or not.

    ``limit`` is the most values that the caller is ready for; at most 16 × ``limit`` bytes are allocated,
    whatever the bytes claim. Raises ColumnsError.
    """
    if not data:
        raise ColumnsError("empty column: at least the header byte was expected")
    header, body = data[0], memoryview(data)[1:]
    code = header & 0x0F
    if header & _RESERVED or code >= len(_TYPES):
        raise ColumnsError(f"unknown column header 0x{header:02x}: the peer speaks another version of this format")
    ascending = bool(header & _ASCENDING)
    if (header & _ASCENDING_SIGNED and not ascending) or (ascending and code >= len(_UNSIGNED)):
        raise ColumnsError(f"contradictory column header 0x{header:02x}")
    dtype = _TYPES[code]
    most_bytes = limit * dtype.itemsize + (_FIRST_BYTES if ascending else 0)
    if header & _ZSTD:
        body = memoryview(_decompress(body, most_bytes))
    elif len(body) > most_bytes:
        raise ColumnsError(f"column of {len(body)} bytes: at most {most_bytes} ({limit} values) were expected")
    if ascending:
        return _ascending(body, dtype, signed=bool(header & _ASCENDING_SIGNED), limit=limit)
    return _widen(_elements(body, dtype))


def unpack_unsigned(data: bytes, *, limit: int) -> npt.NDArray[np.uint64]:
    """As ``unpack``, for counters, rows and positions: signed or floating columns raise ColumnsError."""
    values = unpack(data, limit=limit)
    if values.dtype != np.uint64:
        raise ColumnsError(f"column of {values.dtype}: unsigned integers were expected")
    return values.astype(np.uint64, copy=False)


def pack_strings(values: Iterable[str]) -> stream_pb2.Strings:
    """Each distinct string once, in order of first appearance, and an index a row."""
    codes: dict[str, int] = {}
    index = [codes.setdefault(value, len(codes)) for value in values]
    return stream_pb2.Strings(distinct=list(codes), index=pack(np.asarray(index, dtype=np.uint32)))


def coded_column(name: str, texts: Sequence[str], index: npt.NDArray[np.integer[Any]]) -> stream_pb2.Column:
    """Row ``i`` is ``texts[index[i]]``: as ``column``, without a loop over rows. Texts may repeat, or be unused."""
    if not len(index):
        return column(name, [])
    # By first appearance, as ``pack_strings`` has it: of several assignments to one place the last one stays.
    first = np.full(len(texts), -1)
    first[index[::-1]] = np.arange(len(index))[::-1]
    used = np.argsort(first, kind="stable")[np.count_nonzero(first < 0) :]
    codes: dict[str, int] = {}
    code_of = np.zeros(len(texts), np.uint32)
    code_of[used] = [codes.setdefault(texts[at], len(codes)) for at in used.tolist()]
    return stream_pb2.Column(
        name=name, strings=stream_pb2.Strings(distinct=list(codes), index=pack(code_of[index].astype(np.uint32)))
    )


def unpack_strings(strings: stream_pb2.Strings, *, limit: int) -> StringColumn:
    """The coded form, of at most ``limit`` rows. Raises ColumnsError for stray indices, and for size."""
    distinct = tuple(strings.distinct)
    total_bytes = 0
    for text in distinct:
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > MAX_STRING_BYTES:
            raise ColumnsError(f"a string of {size} bytes: at most {MAX_STRING_BYTES} are accepted")
        total_bytes += size
    if total_bytes > MAX_STRINGS_BYTES:
        raise ColumnsError(f"strings of {total_bytes} bytes together: at most {MAX_STRINGS_BYTES} are accepted")
    if len(set(distinct)) != len(distinct):
        raise ColumnsError("a string comes twice among the distinct ones")
    index = unpack_unsigned(strings.index, limit=limit) if strings.index else np.zeros(0, np.uint64)
    if index.size and int(index.max()) >= len(distinct):
        raise ColumnsError(f"string index {int(index.max())} of {len(distinct)} distinct strings")
    return StringColumn(distinct, index)


def column(name: str, values: AnyArray | Sequence[str] | Sequence[int] | Sequence[float]) -> stream_pb2.Column:
    """A named column of a message: a NumPy array of numbers, or a sequence of strings (or numbers)."""
    if not isinstance(values, np.ndarray) and values and isinstance(values[0], str):
        return stream_pb2.Column(name=name, strings=pack_strings(str(value) for value in values))
    if not isinstance(values, np.ndarray) and values and isinstance(values[0], int):
        # NumPy's own choice for small numbers beside those from 2⁶³ on (addresses) is a float, which rounds them.
        numbers = [int(value) for value in values]
        array: AnyArray = np.array(numbers, np.uint64 if max(numbers) > np.iinfo(np.int64).max else np.int64)
    else:
        array = np.asarray(values)
    if array.dtype.kind in "UO":
        return stream_pb2.Column(name=name, strings=pack_strings(array.tolist()))
    if array.dtype.kind == "f" and len(array):
        return stream_pb2.Column(name=name, floats=pack(array))
    return stream_pb2.Column(name=name, integers=pack(array if len(array) else np.zeros(0, np.uint64)))


def read_coded(message: stream_pb2.Column, rows: int) -> Array | StringColumn:
    """The column's content, exactly ``rows`` long, with strings in coded form. Raises ColumnsError."""
    kind = message.WhichOneof("data")
    content: Array | StringColumn
    try:
        if kind == "strings":
            content = unpack_strings(message.strings, limit=rows)
            size = content.index.size
        elif kind in ("integers", "floats"):
            content = unpack(message.integers if kind == "integers" else message.floats, limit=rows)
            size = content.size
            if size and (content.dtype.kind == "f") != (kind == "floats"):
                raise ColumnsError(f"{kind} were announced, {content.dtype} came")  # noqa: TRY301
        else:
            raise ColumnsError("neither integers, floats nor strings")  # noqa: TRY301
    except ColumnsError as error:
        raise ColumnsError(f"column {message.name[:64]!r}: {error}") from error
    if size != rows:
        raise ColumnsError(f"column {message.name[:64]!r}: {size} values for {rows} rows")
    return content


def read_column(message: stream_pb2.Column, rows: int) -> Array | list[str]:
    """The content, exactly ``rows`` long: an array of numbers or a list of strings. Raises ColumnsError."""
    content = read_coded(message, rows)
    return content.to_list() if isinstance(content, StringColumn) else content


def _narrow_floats(values: AnyArray) -> AnyArray:
    wide = values.astype(_F64)
    if not np.isfinite(wide).all():
        raise ColumnsError("cannot pack NaN or infinity: a sum would never recover from it")
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(_F32)
    # By bits: -0.0 equals 0.0, yet is another value.
    same = np.array_equal(narrow.astype(_F64).view(np.uint64), wide.view(np.uint64))
    return narrow if same else wide


def _ascends(values: AnyArray) -> bool:
    if values.size < _WORTH_DIFFERENCES:
        return False
    sample = values[:_WORTH_DIFFERENCES]
    # The first few answer for most columns of counters without reading the rest.
    if not bool((sample[1:] >= sample[:-1]).all()) or not bool((values[1:] >= values[:-1]).all()):
        return False
    # Zeros, or one value all over, are as narrow without it, and small values too.
    return int(values[-1]) > 255 or int(values[0]) < -128


def _narrowest(high: int, low: int, family: tuple[np.dtype[np.generic], ...]) -> int:
    for dtype in family[:-1]:
        # numpy's stubs do not know that the family is integers
        bounds = np.iinfo(dtype)  # type: ignore[type-var]
        if bounds.min <= low and high <= bounds.max:
            return _TYPES.index(dtype)
    return _TYPES.index(family[-1])


def _frame(header: int, first: bytes, elements: AnyArray) -> bytes:
    body = first + np.ascontiguousarray(elements).tobytes()
    if len(body) >= _WORTH_COMPRESSING_BYTES:
        # A compressor belongs to one thread; making one is cheaper than keeping one a thread.
        packed = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(body)
        if len(packed) * 8 <= len(body) * 7:
            return bytes((header | _ZSTD,)) + packed
    return bytes((header,)) + body


def _decompress(body: memoryview, most_bytes: int) -> bytes:
    try:
        size = zstandard.frame_content_size(body)
        if size < 0:
            raise ColumnsError("a zstd frame that does not state its size")
        if size > most_bytes:
            raise ColumnsError(f"a zstd frame of {size} bytes unpacked: at most {most_bytes} were expected")
        content: bytes = zstandard.ZstdDecompressor().decompress(
            body, max_output_size=max(size, 1), allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ColumnsError(f"a broken zstd frame: {error}") from error
    if len(content) != size:
        raise ColumnsError(f"a zstd frame of {len(content)} bytes that said {size}")
    return content


def _elements(body: memoryview, dtype: np.dtype[np.generic]) -> AnyArray:
    if len(body) % dtype.itemsize:
        raise ColumnsError(f"column of {len(body)} bytes: no multiple of {dtype.itemsize}, the size of {dtype}")
    return np.frombuffer(body, dtype)


def _ascending(body: memoryview, dtype: np.dtype[np.generic], *, signed: bool, limit: int) -> Array:
    if len(body) < _FIRST_BYTES:
        raise ColumnsError(f"ascending column of {len(body)} bytes: {_FIRST_BYTES} of the first value were expected")
    differences = _elements(body[_FIRST_BYTES:], dtype)
    if differences.size + 1 > limit:
        raise ColumnsError(f"column of {differences.size + 1} values: at most {limit} were expected")
    values = np.empty(differences.size + 1, np.uint64)
    values[0] = np.frombuffer(body, "<u8", count=1)[0]
    values[1:] = differences
    np.cumsum(values, out=values)
    result: Array = values.view(np.int64) if signed else values
    if bool((result[1:] < result[:-1]).any()):
        raise ColumnsError("ascending column that overflows 64 bits")
    return result


def _widen(elements: AnyArray) -> Array:
    if elements.dtype.kind == "u":
        return elements.astype(np.uint64, copy=False)
    if elements.dtype.kind == "i":
        return elements.astype(np.int64, copy=False)
    values = elements.astype(np.float64, copy=False)
    if not bool(np.isfinite(values).all()):
        raise ColumnsError("NaN or infinity in a column: a sum would never recover from it")
    return values
