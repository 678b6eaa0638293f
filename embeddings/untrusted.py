"""Reading files that somebody else may have written: JSON, Parquet, Arrow. Nothing in them can run code.

Every reader of a run folder, of logs and of tables goes through here. What is checked before anything is read of it:

    size        a JSON file is bounded; a Parquet footer may not declare more rows, values or bytes than its file could
                plausibly hold, so that a small file cannot ask for all memory
    types       Arrow rebuilds an extension type by Python code that a library has registered for its name; Ray's
                unpickles. Files with any but Arrow's own extension types are refused, before Arrow sees their schema
    place       a folder or a file name that a file gives may not lead out of the folder it belongs to
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError, WatchtowerError
from embeddings import elsewhere

MOST_JSON_BYTES = 256 << 20
MOST_FOOTER_BYTES = 256 << 20
MOST_COLUMNS = 20_000
# What a footer may declare: a floor, and a multiple of the file's size. Runs of equal values pack 2^31 into a few
# bytes, but no logs and nothing that a stage of ours writes come near these.
ROWS_FLOOR, ROWS_PER_BYTE = 4_000_000, 512
BYTES_FLOOR, BYTES_PER_BYTE = 256 << 20, 2_000

_ARROW_SCHEMA, _HIDDEN_SCHEMA = b"ARROW:schema", b"ARROW:schemX"
_EXTENSION, _HIDDEN_EXTENSION = b"ARROW:extension:name", b"ARROW:extension:nomX"
# Arrow's own, which are built in C++ from plain parameters.
_HARMLESS_EXTENSIONS = {"arrow.json", "arrow.uuid", "arrow.bool8", "arrow.opaque", "arrow.fixed_shape_tensor",
                        "arrow.variable_shape_tensor"}


# -------------------------------------------------------------------------------------------------------------- JSON

def read_json(path: Path | str, kind: type = dict, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The value of a JSON file.

    Args:
        kind: what the file must hold, dict or list.
        most_bytes: a larger file is not read.

    Raises:
        FileNotFoundError, OSError: it cannot be opened.
        ValueError: it is too large, no JSON (NaN and Infinity are none), nested too deeply, or of another kind.
    """
    return parse_json(read_bytes(path, most_bytes), kind)


def parse_json(text: bytes | str, kind: type = dict) -> Any:
    """As `read_json`, of a text that is in memory."""
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, kind):
        raise ValueError(f"it holds a {type(found).__name__} where a {kind.__name__} is needed")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_bytes(path: Path | str, most_bytes: int) -> bytes:
    """The bytes of a plain file that is not larger than this.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is too large or no plain file (a device or a pipe would never end).
    """
    elsewhere.bring(path)
    # Without NONBLOCK, opening a pipe that nobody writes to waits for ever.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        if elsewhere.of(path) is None:
            raise
        elsewhere.bring(path)  # another process of this node was just putting a new one in its place
        descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no plain file")
        if found.st_size > most_bytes:
            raise ValueError(f"it has {found.st_size} bytes, more than the {most_bytes} that are read")
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than the {most_bytes} bytes that are read")
    return data


# ------------------------------------------------------------------------------------------------------------- places

def inside(root: Path, relative: str, source: str) -> Path:
    """The path below `root` that a file or a config names, links followed.

    Args:
        source: who names it, for the message.

    Raises:
        InputError: it is no relative path, or it leads out of `root`.
    """
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise InputError(f"{source}: {relative!r} is no path inside {root}")
    path = Path(root) / relative
    leaves = Path(relative).is_absolute() or ".." in Path(relative).parts
    try:
        leaves = leaves or not path.resolve().is_relative_to(Path(root).resolve())
    except (OSError, RuntimeError) as error:
        raise InputError(f"{source}: {relative!r} cannot be followed ({error})") from error
    if leaves:
        raise InputError(f"{source}: {relative!r} leads out of {root}")
    return path


# ------------------------------------------------------------------------------------------------------------ Parquet

# Of the statistics of sizes, where a chunk is looked at.
_THROWN = ("histogram size mismatch", "Unencoded byte array data bytes")


def open_parquet(source: pa.NativeFile, name: str, groups: range | None = None) -> pq.ParquetFile:
    """A Parquet file whose footer has been looked at before Arrow makes types of it.

    Args:
        source: the open file; it is read from its end.
        name: for messages.
        groups: the row groups that the caller is going to touch, data and metadata; None is all. Who reads a large file
            piece by piece need not look at all of it for each.

    Raises:
        InputError: extension types that are not Arrow's own, or a footer that declares what the file cannot hold.
        ArrowException, OSError: it is no Parquet file, cut off or damaged.
    """
    size = source.size()
    footer = _parquet_footer(source, size)
    # Without its key Arrow does not find the schema, and this parse makes plain types alone.
    plain = footer.replace(_ARROW_SCHEMA, _HIDDEN_SCHEMA)
    file = b"PAR1" + plain + struct.pack("<I", len(plain)) + b"PAR1"
    alone = _opened(pa.BufferReader(file), name)
    metadata = alone.metadata
    there = range(metadata.num_row_groups)
    groups = there if groups is None else there[groups.start : groups.stop]
    _check_chunks(alone, groups, name)
    _check_declared(metadata, groups, size, name)
    if (found := footer.count(_ARROW_SCHEMA)) > 1:
        raise InputError(f"{name}: has {found} Arrow schemas where a Parquet file has one")
    if found:
        _check_arrow_schema((metadata.metadata or {}).get(_HIDDEN_SCHEMA), name)
    source.seek(0)
    parquet = _opened(source, name, page_checksum_verification=True)  # of files that have such checksums
    _names(parquet.schema_arrow, name)
    return parquet


def _opened(source: pa.NativeFile, name: str, **how: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, **how)
    except UnicodeDecodeError as error:
        raise _no_text(name, error) from error


def _names(schema: pa.Schema, source: str) -> list[str]:
    try:
        return schema.names
    except UnicodeDecodeError as error:
        raise _no_text(source, error) from error


def _no_text(source: str, error: UnicodeDecodeError) -> InputError:
    return InputError(f"{source}: the name of a column is no text in UTF-8 ({error})")


def _check_once(names: list[str], source: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{source}: has two columns called {twice[0]}")


def _parquet_footer(source: pa.NativeFile, size: int) -> bytes:
    if size < 12:
        raise pa.ArrowInvalid(f"a Parquet file has 12 bytes at least, this one has {size}")
    source.seek(size - 8)
    end = source.read(8)
    length, magic = struct.unpack("<I4s", end)
    if magic != b"PAR1":
        raise pa.ArrowInvalid("it does not end as a Parquet file")
    if length > min(size - 12, MOST_FOOTER_BYTES):
        raise pa.ArrowInvalid(f"its footer of {length} bytes does not fit")
    source.seek(size - 8 - length)
    return source.read(length)


def _check_chunks(alone: pq.ParquetFile, groups: range, name: str) -> None:
    """Refuse a column's metadata that Arrow throws on: to look at it through Python's `RowGroupMetaData.column` would
    end the process, which has no handler there (pyarrow 26). Reading has one, and comes upon the metadata first.

    Args:
        alone: the footer without the data, so that nothing can be read.
    """
    columns = alone.metadata.num_columns
    for group in groups if columns <= MOST_COLUMNS else ():
        for at in range(columns):
            try:
                alone.reader.read_row_group(group, column_indices=[at], use_threads=False)
            except (OSError, pa.ArrowException) as error:
                if any(words in str(error) for words in _THROWN):
                    raise InputError(f"{name}: its footer is damaged: {error}") from error


def _check_declared(metadata: pq.FileMetaData, groups: range, size: int, name: str) -> None:
    most_values, most_bytes = ROWS_FLOOR + ROWS_PER_BYTE * size, BYTES_FLOOR + BYTES_PER_BYTE * size
    if metadata.num_columns > MOST_COLUMNS:
        raise InputError(f"{name}: has {metadata.num_columns} columns; at most {MOST_COLUMNS} are read")
    rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.num_rows < 0:
            raise InputError(f"{name}: its footer is damaged: a row group of {group.num_rows} rows")
        rows += group.num_rows
        for at in range(group.num_columns) if number in groups else ():
            column = group.column(at)
            values, plain = column.num_values, column.total_uncompressed_size
            if not (0 <= values <= most_values and 0 <= plain <= most_bytes):
                raise InputError(f"{name}: its footer declares {values} values and {plain} bytes in one column of a "
                                 f"row group, which a file of {size} bytes cannot be trusted with")
    if rows != metadata.num_rows or rows > most_values:
        raise InputError(f"{name}: its footer declares {metadata.num_rows} rows, {rows} in its row groups, which a "
                         f"file of {size} bytes cannot be trusted with")


def _check_arrow_schema(encoded: bytes | None, name: str) -> None:
    """Refuse extension types in the Arrow schema that a Parquet file carries along."""
    try:
        # Strict, so that nothing reads otherwise here than in Arrow.
        message = base64.b64decode(encoded or b"", validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: the Arrow schema in it is damaged ({error})") from error
    if _EXTENSION in message:
        hidden = pa.ipc.read_schema(pa.BufferReader(message.replace(_EXTENSION, _HIDDEN_EXTENSION)))
        _check_extensions(_extension_names(hidden), name)


def _extension_names(fields: Any) -> Iterator[str]:
    for field in fields:
        found = (field.metadata or {}).get(_HIDDEN_EXTENSION)
        if found is not None:
            yield found.decode("utf-8", "replace")
        kind = field.type
        while pa.types.is_dictionary(kind):
            kind = kind.value_type
        yield from _extension_names(kind.field(at) for at in range(kind.num_fields))


def _check_extensions(names: Iterator[str], name: str) -> None:
    for found in names:
        if found not in _HARMLESS_EXTENSIONS:
            raise InputError(f"{name}: has a column of the extension type {found}, which is rebuilt by code; write it "
                             "as a plain column (integers, floats, strings or lists of them)")


def read_parquet(path: Path | str, columns: list[str] | None = None) -> pa.Table:
    """A whole Parquet file of a local folder.

    Raises:
        InputError: as `open_parquet`; a column that is not there.
        ArrowException, OSError: it cannot be read.
    """
    with pa.memory_map(str(path)) as source:
        parquet = open_parquet(source, str(path))
        _check_once(parquet.schema_arrow.names, str(path))
        missing = [name for name in columns or [] if name not in parquet.schema_arrow.names]
        if missing:
            raise InputError(f"{path}: has no column {', '.join(missing)}; it has "
                             f"{', '.join(parquet.schema_arrow.names)}")
        return parquet.read(columns=columns)


def parquet_rows(path: Path | str) -> int:
    """The number of rows of a Parquet file.

    Raises:
        As `read_parquet`.
    """
    with pa.memory_map(str(path)) as source:
        return open_parquet(source, str(path)).metadata.num_rows


# -------------------------------------------------------------------------------------------------------------- Arrow

def map_arrow(path: Path | str) -> pa.RecordBatch:
    """The record batch of an Arrow file that holds one, mapped: read when touched, no file handle kept, freed with its
    last array.

    Raises:
        InputError: extension types, or another number of batches.
        ArrowException, OSError: it is missing or not whole.
    """
    with pa.memory_map(str(path)) as source:
        size = source.size()
        if size < 16:
            raise pa.ArrowInvalid(f"an Arrow file of {size} bytes is cut off")
        source.seek(size - 10)
        length, magic = struct.unpack("<i6s", source.read(10))
        if magic != b"ARROW1" or not 0 < length <= size - 10:
            raise pa.ArrowInvalid("it does not end as an Arrow file")
        source.seek(size - 10 - length)
        if _EXTENSION in source.read(length):  # nothing of ours has any
            raise InputError(f"{path}: has a column of an extension type, which is rebuilt by code; this is no file of "
                             "ours")
        source.seek(0)
        reader = pa.ipc.open_file(source)
        if reader.num_record_batches != 1:
            raise InputError(f"{path}: has {reader.num_record_batches} record batches where one is needed")
        _check_once(_names(reader.schema, str(path)), str(path))
        batch = reader.get_batch(0)
        batch.validate()
        return batch


def whole_column(batch: pa.RecordBatch | pa.Table, name: str, kind: pa.DataType, source: str) -> pa.Array:
    """A column of this very type and without nulls, in one array.

    Raises:
        InputError: there is none.
    """
    if name not in batch.schema.names:
        raise InputError(f"{source}: has no column {name}; it has {', '.join(batch.schema.names)}")
    column = batch[name]
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if column.type != kind:
        raise InputError(f"{source}: column {name} is {column.type} where {kind} is needed")
    if column.null_count:
        raise InputError(f"{source}: column {name} has {column.null_count} nulls where none are allowed")
    return column


def damaged(path: Path | str, error: Exception, hint: str) -> WatchtowerError:
    """The message for a file of a run folder that does not read as what it should be."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return WatchtowerError(f"{path}: cannot be read ({first}); {hint}")
