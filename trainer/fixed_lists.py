"""Parquet files of numbers and of fixed-size lists of numbers, none of them null, written from NumPy arrays.

pyarrow writes such files too, and reads these. It goes through a list's repetition and definition levels value by
value, which takes longer than all else that is done to write labels (docs/experiments.md); where no list is short and
nothing is null, the levels are a pattern that is known beforehand, and the values are written as they lie in memory.

Format: https://parquet.apache.org/docs/file-format/ (apache/parquet-format: Thrift's compact protocol, data pages of
version 1, PLAIN values, levels in the RLE and bit-packing hybrid, LZ4_RAW). A list is the three-level one of that page.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import pyarrow as pa

ROW_GROUP = 131_072
PAGE = 32_768  # rows
_MAGIC, _CREATED_BY = b"PAR1", b"watchtower version 1.0.0 (build 1)"  # in the form that readers take apart
_BOOLEAN, _INT32, _INT64, _FLOAT, _DOUBLE = 0, 1, 2, 4, 5
_KINDS = {pa.bool_(): (_BOOLEAN, np.bool_), pa.int32(): (_INT32, np.int32), pa.int64(): (_INT64, np.int64),
          pa.float32(): (_FLOAT, np.float32), pa.float64(): (_DOUBLE, np.float64)}
_REQUIRED, _REPEATED = 0, 2
_PLAIN, _RLE, _LZ4_RAW, _DATA_PAGE, _LIST = 0, 3, 7, 0, 3


class FixedListWriter:
    """Writes one file; `write` row groups, then `close`.

    Args:
        file: written from its beginning. schema: fields of bool, int32, int64, float32, float64, or of fixed-size lists
            of them, of one value or more; nothing nullable, neither the fields nor the lists' elements.

    Raises:
        ValueError: a field of another type, or one that may be null.
    """

    def __init__(self, file: BinaryIO, schema: pa.Schema):
        for field in schema:
            inner = field.type.field(0) if _is_list(field) else field
            is_empty = _is_list(field) and field.type.list_size < 1
            if field.nullable or inner.nullable or inner.type not in _KINDS or is_empty:
                raise ValueError(f"{field}: only numbers and fixed-size lists of them without nulls are written")
        self._file, self.schema, self._groups, self._rows = file, schema, [], 0
        self._codec = pa.Codec("lz4_raw")
        self._at = file.write(_MAGIC)

    def write(self, columns: Sequence[np.ndarray]) -> None:
        """Append rows.

        Args:
            columns: of the schema, in its order: (T,), or (T, C) for lists of C. Cast to the field's type, which must
                hold every value.

        Raises:
            ValueError: shapes that do not fit the schema or each other. TypeError: values of another kind than the
                field's, floats for integers.
        """
        made, rows = [], len(columns[0])
        for field, values in zip(self.schema, columns, strict=True):
            if values.shape != ((rows, field.type.list_size) if _is_list(field) else (rows,)):
                raise ValueError(f"{field.name}: has the shape {values.shape} where {rows} rows of {field.type} are "
                                 "written")
            _, dtype = _kind_of(field)
            made.append(np.ascontiguousarray(values.astype(dtype, casting="same_kind", copy=False)))
        for begin in range(0, rows, ROW_GROUP):
            self._write_group([values[begin : begin + ROW_GROUP] for values in made])

    def close(self) -> None:
        """Write the footer."""
        footer = _struct({
            1: _i32(2), 2: _list(_STRUCT, [_struct(one) for one in self._schema_elements()]), 3: _i64(self._rows),
            4: _list(_STRUCT, self._groups),
            5: _list(_STRUCT, [_struct({1: _binary(b"ARROW:schema"),
                                        2: _binary(base64.b64encode(self.schema.serialize().to_pybytes()))})]),
            6: _binary(_CREATED_BY),
            # The order of minimum and maximum is that of the type; without this a reader may not use them.
            7: _list(_STRUCT, [_struct({1: (_STRUCT, _struct({}))})] * len(self.schema))})
        self._file.write(footer + struct.pack("<I", len(footer)) + _MAGIC)

    def _schema_elements(self):
        yield {4: _binary(b"schema"), 5: _i32(len(self.schema))}
        for field in self.schema:
            name = _binary(field.name.encode())
            kind, _ = _kind_of(field)
            if _is_list(field):
                yield {3: _i32(_REQUIRED), 4: name, 5: _i32(1), 6: _i32(_LIST),
                       10: (_STRUCT, _struct({3: (_STRUCT, _struct({}))}))}
                yield {3: _i32(_REPEATED), 4: _binary(b"list"), 5: _i32(1)}
                yield {1: _i32(kind), 3: _i32(_REQUIRED), 4: _binary(b"element")}
            else:
                yield {1: _i32(kind), 3: _i32(_REQUIRED), 4: name}

    def _write_group(self, columns: list[np.ndarray]) -> None:
        begin, plain_bytes = self._at, 0
        chunks = []
        for field, values in zip(self.schema, columns, strict=True):
            first, plain = self._at, 0
            for row in range(0, len(values), PAGE):
                plain += self._write_page(values[row : row + PAGE])
            is_list = _is_list(field)
            path = [field.name.encode(), b"list", b"element"] if is_list else [field.name.encode()]
            metadata = {1: _i32(_kind_of(field)[0]),
                        2: _list(_I32, [_zigzag(_PLAIN), *([_zigzag(_RLE)] if is_list else [])]),
                        3: _list(_BINARY, [_sized(part) for part in path]), 4: _i32(_LZ4_RAW), 5: _i64(values.size),
                        6: _i64(plain), 7: _i64(self._at - first), 9: _i64(first)}
            if not is_list and values.dtype.kind == "i":  # a NaN has no place in an order
                low, high = values.min().tobytes(), values.max().tobytes()
                metadata[12] = (_STRUCT, _struct({3: _i64(0), 5: _binary(high), 6: _binary(low)}))
            chunks.append(_struct({2: _i64(first), 3: (_STRUCT, _struct(metadata))}))
            plain_bytes += plain
        rows = len(columns[0])
        self._groups.append(_struct({1: _list(_STRUCT, chunks), 2: _i64(plain_bytes), 3: _i64(rows), 5: _i64(begin),
                                     6: _i64(self._at - begin), 7: (_I16, _zigzag(len(self._groups)))}))
        self._rows += rows

    def _write_page(self, values: np.ndarray) -> int:
        """Writes one page; its bytes before they were compressed, header included."""
        levels = _levels(*values.shape) if values.ndim == 2 else b""
        plain = np.packbits(values.ravel(), bitorder="little") if values.dtype == np.bool_ else values.ravel()
        body = np.empty(len(levels) + plain.nbytes, np.uint8)
        body[: len(levels)] = np.frombuffer(levels, np.uint8)
        body[len(levels) :] = plain.view(np.uint8)
        packed = self._codec.compress(pa.py_buffer(body))
        header = _struct({1: _i32(_DATA_PAGE), 2: _i32(len(body)), 3: _i32(packed.size),
                          5: (_STRUCT, _struct({1: _i32(values.size), 2: _i32(_PLAIN), 3: _i32(_RLE), 4: _i32(_RLE)}))})
        self._file.write(header)
        self._file.write(packed)
        self._at += len(header) + packed.size
        return len(header) + len(body)


def _is_list(field: pa.Field) -> bool:
    return pa.types.is_fixed_size_list(field.type)


def _kind_of(field: pa.Field) -> tuple[int, type]:
    """Of the numbers in a field: Parquet's type and NumPy's."""
    return _KINDS[field.type.value_type if _is_list(field) else field.type]


@lru_cache(maxsize=8)  # pages are of one size, but for the last ones
def _levels(rows: int, width: int) -> bytes:
    """Repetition levels, 0 where a list begins and 1 within it, and definition levels, 1 all along."""
    count = rows * width
    repeated = np.packbits(np.arange(count) % width != 0, bitorder="little").tobytes()
    repetition = _varint(len(repeated) << 1 | 1) + repeated
    definition = _varint(count << 1) + b"\x01"
    return b"".join(struct.pack("<I", len(part)) + part for part in (repetition, definition))


# ------------------------------------------------------------------------------------------ Thrift's compact protocol
# A field's value is (type, bytes); a struct is the bytes of its fields.

_I16, _I32, _I64, _BINARY, _LIST_TYPE, _STRUCT = 4, 5, 6, 8, 9, 12


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _zigzag(number: int) -> bytes:
    return _varint(number << 1 if number >= 0 else (-number << 1) - 1)


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _i32(number: int) -> tuple[int, bytes]:
    return _I32, _zigzag(number)


def _i64(number: int) -> tuple[int, bytes]:
    return _I64, _zigzag(number)


def _binary(data: bytes) -> tuple[int, bytes]:
    return _BINARY, _sized(data)


def _list(kind: int, items: Sequence[bytes]) -> tuple[int, bytes]:
    size = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([0xF0 | kind]) + _varint(len(items))
    return _LIST_TYPE, size + b"".join(items)


def _struct(fields: dict[int, tuple[int, bytes]]) -> bytes:
    out, before = b"", 0
    for number, (kind, data) in fields.items():
        step = number - before
        out += (bytes([step << 4 | kind]) if step < 16 else bytes([kind]) + _zigzag(number)) + data
        before = number
    return out + b"\x00"
