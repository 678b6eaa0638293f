"""Logs as they come in: finding the files, cutting them into pieces, reading, casting and cleaning a piece.

Every function here is plain: a piece or an Arrow table in, Arrow tables out. launch/ingest.py spreads them out.

A **piece** is a range of row groups of one Parquet file (or a byte range of one CSV file), the unit of work of ingest.
Reading maps the file's column names to ours and casts without loss; what cannot be cast is an `InputError` that names
the file, the column, the type found and the type needed. Cleaning parts the rows into kept ones and quarantined ones.

Why a row is quarantined (one reason a row, the first that applies, in this order):

    null_user_id, null_item_id, null_timestamp
    negative_timestamp       timestamp_ms < 0
    timestamp_not_ms         timestamp_ms outside 1973 to 5138, so that it is hardly a Unix time in milliseconds
    negative_watch_time      watch_time_s < 0
    not_finite_watch_time    watch_time_s is NaN or infinite (unknown is null, not NaN)
    watch_time_above_max     watch_time_s > data.max_watch_s
    item_not_in_catalogue    the catalogue lacks the item and data.missing_items is quarantine
    duplicate                equal in every kept column to another row (found when a shard is sorted: sequences.py)

Not quarantined, but counted in the statistics: a null flag (effective view, target, ordinal time) reads as false, a
duration that is not positive and finite reads as unknown.

Shape suffixes: B = rows of a batch.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from configs.errors import InputError
from configs.schema import DataConfig, ViewRule
from embeddings import elsewhere
from embeddings.untrusted import open_parquet
from trainer.vocabulary import Vocabulary

REASONS = ("null_user_id", "null_item_id", "null_timestamp", "negative_timestamp", "timestamp_not_ms",
           "negative_watch_time", "not_finite_watch_time", "watch_time_above_max", "item_not_in_catalogue",
           "duplicate")
QUARANTINE_SCHEMA = pa.schema([
    ("reason", pa.string()), ("source", pa.string()), ("row", pa.int64()), ("user_id", pa.int64()),
    ("item_id", pa.int64()), ("timestamp_ms", pa.int64()), ("watch_time_s", pa.float64())])
NULL_SESSION = np.iinfo(np.int64).min
FIRST_UNIX_MS, LAST_UNIX_MS = 10**11, 10**14  # 1973 to 5138; seconds lie below, micro- and nanoseconds above
BATCH_ROWS = 131_072
PIECE_ROWS = 750_000


# ---------------------------------------------------------------------------------------------- finding the files

@dataclass(frozen=True)
class InputFile:
    """One file of an input: `location` is what the config says, `path` the file inside that file system."""

    location: str
    path: str
    size: int
    modified_ns: int

    @property
    def name(self) -> str:
        scheme, found, _ = self.location.partition("://")
        return f"{scheme}://{self.path.lstrip('/')}" if found and scheme != "file" else self.path

    def open(self) -> pa.NativeFile:
        elsewhere.bring(self.path)  # a synthetic world lies in the run folder
        return filesystem_of(self.location)[0].open_input_file(self.path)


def filesystem_of(location: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system and the path in it of a local path or of a URL (file, s3, gs, hdfs).

    Raises:
        InputError: if pyarrow knows no file system of that scheme.
    """
    if "://" not in location:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))
    try:
        return pafs.FileSystem.from_uri(location)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{location}: cannot be opened as a file system ({error}). "
                         "Use a local path or a URL of s3://, gs://, hdfs:// or file://.") from error


def list_files(location: str, key: str, suffixes: tuple[str, ...] = (".parquet", ".parq", ".pq")) -> list[InputFile]:
    """The files of an input, sorted by path: the file itself, or those under the folder with one of the suffixes.

    Names that begin with `_` or `.` are skipped, as Spark and Hive do.

    Args:
        key: the config key that named the location, for the message.

    Raises:
        InputError: if there is nothing, or nothing with such a suffix.
    """
    filesystem, path = filesystem_of(location)
    try:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{key}: {location} does not exist. Give a file or a folder that does.")
        if info.type == pafs.FileType.File:
            found = [info]
        else:
            inside = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
            files = [f for f in inside if f.type == pafs.FileType.File]
            found = [f for f in files if f.base_name.endswith(suffixes) and not _hidden(f.path, path)]
            if not found:
                names = ", ".join(sorted(f.base_name for f in files)[:5]) or "nothing"
                raise InputError(f"{key}: {location} is a folder with no {suffixes[0]} file (it holds {names}). "
                                 "Name the folder that holds the files.")
    except OSError as error:
        raise InputError(f"{key}: {location} cannot be read ({error}).") from error
    return [InputFile(location if "://" in location else path, f.path, f.size or 0, f.mtime_ns or 0)
            for f in sorted(found, key=lambda f: f.path)]


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path[len(root):].split("/"))


@dataclass(frozen=True)
class Piece:
    """The unit of work: row groups [start, stop) of a Parquet file, or bytes [start, stop) of a CSV file.

    `order` is the place of the piece's first row in the whole input (any increasing number), `first_row` its row
    number in the file, `rows` the number of rows (an estimate for CSV). `counted_from` says where row numbers begin, if
    that is not the beginning of the file.
    """

    index: int
    file: InputFile
    start: int
    stop: int
    first_row: int
    order: int
    rows: int
    counted_from: str | None = None

    @property
    def source(self) -> str:
        return f"{self.file.name} {self.counted_from}" if self.counted_from else self.file.name


def parquet_pieces(files: list[InputFile], data: DataConfig) -> list[Piece]:
    """Cut Parquet files into pieces along their row groups, after a check of every file's columns and types.

    Raises:
        InputError: if a file is corrupt, a column is missing or has a wrong type, or there are no rows at all.
    """
    with ThreadPoolExecutor(16) as threads:
        footers = list(threads.map(lambda file: _footer(file), files))
    columns = wanted_columns(data)
    total = 0
    for file, (schema, groups) in zip(files, footers, strict=True):
        check_columns(schema, columns, file.name)
        total += sum(groups)
    if total == 0:
        raise InputError(f"data.logs: {data.logs} has no rows ({len(files)} files). There is nothing to ingest.")
    target = int(min(max(total // 16, 65_536), PIECE_ROWS))
    pieces, order = [], 0
    for file, (_, groups) in zip(files, footers, strict=True):
        start = rows = row = 0
        for group, size in enumerate(groups):
            if rows and rows + size > target:
                pieces.append(Piece(len(pieces), file, start, group, row, order, rows))
                start, row, order, rows = group, row + rows, order + rows, 0
            rows += size
        if rows:
            pieces.append(Piece(len(pieces), file, start, len(groups), row, order, rows))
            order += rows
    return pieces


def _footer(file: InputFile) -> tuple[pa.Schema, list[int]]:
    try:
        with file.open() as handle:
            parquet = open_parquet(handle, file.name)
            meta = parquet.metadata
            return parquet.schema_arrow, [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise corrupt(file.name, error) from error


def corrupt(name: str, error: Exception) -> InputError:
    """The message for a file that does not read as what it should be."""
    return InputError(f"{name}: cannot be read as Parquet; it is corrupt, cut off or something else "
                      f"({_first_line(error)}). Replace the file or take it out of the folder.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ------------------------------------------------------------------------------------------- columns and their types

@dataclass(frozen=True)
class Wanted:
    """A column that ingest reads: our name, the name in the files, what it is, and the key that asks for it."""

    name: str
    column: str
    kind: str  # id, time, seconds, flag, feedback, session
    key: str | None = None  # None: the log format asks for it
    required: bool = True


def wanted_columns(data: DataConfig) -> list[Wanted]:
    """The columns that this config needs of a log file.

    Raises:
        InputError: if data.columns maps a name that nothing of ours uses.
    """
    def column(name: str) -> str:
        return data.columns.get(name, name)

    wanted = [Wanted("user_id", column("user_id"), "id"), Wanted("item_id", column("item_id"), "id"),
              Wanted("timestamp_ms", column("timestamp_ms"), "time"),
              Wanted("watch_time_s", column("watch_time_s"), "seconds"),
              Wanted("duration_s", column("duration_s"), "seconds", required=False)]
    flags = [("is_effective", data.effective_view.column, "data.effective_view.column"),
             ("is_target", data.target.column if data.target else None, "data.target.column"),
             ("is_ordinal", data.ordinal_time, "data.ordinal_time")]
    wanted += [Wanted(name, column(flag), "flag", key) for name, flag, key in flags if flag is not None]
    if data.session is not None:
        wanted.append(Wanted("session", column(data.session), "session", "data.session"))
    wanted += [Wanted(f"feedback_{name}", column(name), "feedback", "data.feedback") for name in data.feedback]
    used = {"user_id", "item_id", "timestamp_ms", "watch_time_s", "duration_s", data.session, data.ordinal_time,
            data.effective_view.column, data.target.column if data.target else None, *data.feedback}
    for name in data.columns:
        if name not in used:
            near = nearest_name(name, [u for u in used if u])
            raise InputError(f"data.columns: {name} is no log column of ours{near}. It maps our names to the files' "
                             "names, as in data.columns={item_id: video_id}.")
    return wanted


def check_columns(schema: pa.Schema, wanted: list[Wanted], source: str, mapping: str = "data.columns") -> None:
    """Say what is missing or has the wrong type, before any row is read.

    Args:
        mapping: the config key that maps names, for the message.

    Raises:
        InputError: naming the file, the column, what was found and what is needed.
    """
    for w in wanted:
        if schema.names.count(w.column) > 1:
            raise InputError(f"{source}: has two columns called {w.column}. Take one out, or give it another name.")
    missing = [w for w in wanted if w.required and w.column not in schema.names]
    if missing:
        lines = []
        for w in missing:
            near = nearest_name(w.column, schema.names)
            asks = f" (asked for by {w.key})" if w.key else ""
            ours = w.column if w.key else w.name
            lines.append(f"  {w.column}{asks}{near or ' (no name like it)'}; "
                         f"if it has another name: {mapping}={{{ours}: <name in the file>}}")
        raise InputError(f"{source}: {len(missing)} needed column(s) missing:\n" + "\n".join(lines)
                         + f"\nThe file has: {', '.join(schema.names)}.")
    for w in wanted:
        if w.column in schema.names:
            check_type(schema.field(w.column).type, w, source)


def nearest_name(name: str, names: list[str]) -> str:
    """`; the nearest is <name>`, or nothing where no name is like it."""
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; the nearest is {lowered[close[0]]}" if close else ""


NEEDED = {"id": "int64", "session": "int64", "time": "int64 milliseconds or an Arrow timestamp",
          "seconds": "float32 seconds", "flag": "bool", "feedback": "bool"}
ADVICE = {
    "id": {"string": "Ids are integers: number them, or hash them to 64 bits, when the logs are written.",
           "float": "A float cannot hold every 64-bit id. Write the column as int64 (in pandas: astype('Int64')).",
           "other": "Write the column as int64."},
    "time": {"string": "Write Unix times in milliseconds as int64.", "float": "Write whole milliseconds as int64.",
             "other": "Write Unix times in milliseconds as int64."},
    "seconds": {"string": "Write it as float32, with null where it is unknown.", "float": "",
                "other": "Write it as float32 seconds, with null where it is unknown."},
    "flag": {"string": "Write it as bool.", "float": "Write it as bool.", "other": "Write it as bool."},
}
ADVICE["session"], ADVICE["feedback"] = ADVICE["id"], ADVICE["flag"]


def check_type(found: pa.DataType, wanted: Wanted, source: str) -> None:
    """Raises an InputError if no lossless cast leads from the type found to the one needed."""
    if wanted.kind == "any":
        return
    if pa.types.is_dictionary(found):
        found = found.value_type
    integer, floating = pa.types.is_integer(found), pa.types.is_floating(found)
    fits = {"id": integer, "session": integer, "time": integer or floating or pa.types.is_timestamp(found),
            "seconds": integer or floating or pa.types.is_decimal(found),
            "flag": pa.types.is_boolean(found) or integer, "feedback": pa.types.is_boolean(found) or integer}
    if not fits[wanted.kind] and not pa.types.is_null(found):
        raise _wrong_type(found, wanted, source)


def _wrong_type(found: pa.DataType, wanted: Wanted, source: str, what: str = "") -> InputError:
    text = pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    family = "string" if text else "float" if pa.types.is_floating(found) else "other"
    return InputError(f"{source}: column {wanted.column} is {found}{what}, but {wanted.name} needs "
                      f"{NEEDED[wanted.kind]}. {ADVICE[wanted.kind][family]}".rstrip())


def cast_column(column: pa.ChunkedArray, wanted: Wanted, source: str) -> pa.Array:
    """A file's column as ours: int64 ids, times and sessions, float64 seconds, int8 flags and feedback; nulls stay.

    Raises:
        InputError: if a value would change: an id over int64, a fractional time, a flag that is neither 0 nor 1.
    """
    check_type(column.type, wanted, source)
    found = column.type
    if pa.types.is_dictionary(found):
        column = pc.cast(column, found.value_type)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    target = {"id": pa.int64(), "session": pa.int64(), "time": pa.int64(), "seconds": pa.float64(),
              "flag": pa.int8(), "feedback": pa.int8()}[wanted.kind]
    try:
        if wanted.kind == "time" and pa.types.is_timestamp(array.type):
            array = pc.cast(array, pa.timestamp("ms", array.type.tz), safe=False)
        if wanted.kind == "time" and pa.types.is_floating(array.type):
            array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        array = pc.cast(array, target)
    except pa.ArrowException as error:
        raise _wrong_type(found, wanted, source, f" with values that do not fit ({_first_line(error)})") from error
    if wanted.kind in ("flag", "feedback") and len(array):
        low_high = pc.min_max(array)
        low, high = low_high["min"].as_py(), low_high["max"].as_py()
        if low is not None and (low < 0 or high > 1):
            raise _wrong_type(found, wanted, source, f" with values from {low} to {high}, not only 0 and 1")
    return array


# --------------------------------------------------------------------------------------------------- reading a piece

def read_parquet_piece(piece: Piece, wanted: list[Wanted]) -> Iterator[tuple[int, pa.Table]]:
    """Yields (row number in the file, table of our columns) for batches of a piece, in file order.

    Raises:
        InputError: if the data are corrupt or cannot be cast.
    """
    try:
        with piece.file.open() as handle:
            parquet = open_parquet(handle, piece.source, range(piece.start, piece.stop))
            present = [w for w in wanted if w.column in parquet.schema_arrow.names]
            batches = parquet.iter_batches(BATCH_ROWS, row_groups=list(range(piece.start, piece.stop)),
                                           columns=list(dict.fromkeys(w.column for w in present)))
            row = piece.first_row
            for batch in batches:
                table = pa.Table.from_batches([batch])
                yield row, pa.table({w.name: cast_column(table[w.column], w, piece.source) for w in present})
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise corrupt(piece.source, error) from error


# -------------------------------------------------------------------------------------------------------- cleaning

@dataclass
class CleanBatch:
    """The outcome of cleaning one batch: kept rows, quarantined rows, and what was counted on the way."""

    rows: pa.Table
    quarantined: pa.Table
    counts: dict[str, int] = field(default_factory=dict)  # reason: rows
    notes: dict[str, int] = field(default_factory=dict)  # what was read as false or unknown: rows


def clean(batch: pa.Table, first_row: int, order: int, source: str, data: DataConfig, vocabulary: Vocabulary,
          duration_s_N: np.ndarray) -> CleanBatch:
    """Part a batch of our columns into rows for the sequences and rows for the quarantine.

    Args:
        batch: a table of our columns, as `read_parquet_piece` yields it.
        first_row: row number in the file of the batch's first row.
        order: place of that row in the whole input.
        source: name of the file.
        vocabulary: ids to rows; row 0 marks an item that the catalogue lacks.
        duration_s_N: float32, seconds by vocabulary row, NaN where unknown; used where the log has no duration.

    Returns:
        `rows` has user_id, order and the columns of `sequences.event_schema`, without nulls.
    """
    user_B, no_user_B = _values(batch["user_id"], 0, np.int64)
    item_B, no_item_B = _values(batch["item_id"], 0, np.int64)
    time_B, no_time_B = _values(batch["timestamp_ms"], 0, np.int64)
    watch_B, no_watch_B = _values(batch["watch_time_s"], 0.0, np.float64)
    row_B = vocabulary.rows_of(item_B)
    reason_B = np.empty(batch.num_rows, np.int8)
    bad = _find_reasons(no_user_B, no_item_B, no_time_B, time_B, watch_B, row_B, FIRST_UNIX_MS, LAST_UNIX_MS,
                        float(data.max_watch_s), reason_B)
    # Most batches are all good, and then nothing is gathered.
    keep = np.flatnonzero(reason_B < 0) if bad else slice(None)
    counts = {REASONS[c]: int(n) for c, n in enumerate(np.bincount(reason_B[reason_B >= 0])) if n} if bad else {}

    def kept(name: str, null, dtype) -> tuple[np.ndarray, int]:
        values_B, null_B = _values(batch[name], null, dtype)
        return values_B[keep], int(np.count_nonzero(null_B[keep]))

    with np.errstate(over="ignore"):
        watch = watch_B[keep].astype(np.float32)
        watch += np.float32(0)  # of zeros one sign
        watch[no_watch_B[keep]] = np.nan
        duration, unusable = _durations(batch, keep, len(watch))
    item_row = row_B[keep]
    without = np.flatnonzero(np.isnan(duration))
    duration[without] = duration_s_N[item_row[without]]
    notes = {"unusable_durations": unusable}
    columns = {"user_id": user_B[keep], "order": order + (keep if bad else np.arange(len(watch))), "item_row": item_row,
               "timestamp_ms": time_B[keep], "watch_time_s": watch, "duration_s": duration}
    for name, rule in (("is_effective", data.effective_view), ("is_target", data.target or data.effective_view)):
        source_name = name if rule is not data.effective_view else "is_effective"
        if rule.column is None:
            columns[name] = views_that_count(watch, duration, rule)
        else:
            columns[name], notes[f"null_{source_name}"] = kept(source_name, 0, np.uint8)
    columns["is_ordinal"] = np.zeros(len(item_row), np.uint8)
    if "is_ordinal" in batch.column_names:
        columns["is_ordinal"], notes["null_is_ordinal"] = kept("is_ordinal", 0, np.uint8)
    if "session" in batch.column_names:
        columns["session"], notes["null_session"] = kept("session", NULL_SESSION, np.int64)
    for name in data.feedback:
        columns[f"feedback_{name}"] = kept(f"feedback_{name}", -1, np.int8)[0]
    return CleanBatch(pa.table(columns), _quarantined(batch, reason_B, first_row, source) if bad
                      else QUARANTINE_SCHEMA.empty_table(), counts, {name: n for name, n in notes.items() if n})


@numba.njit(cache=True, nogil=True)
def _find_reasons(no_user_B, no_item_B, no_time_B, time_B, watch_B, row_B, first_ms, last_ms, max_watch_s, reason_B
                  ):  # pragma: no cover - compiled
    """Writes the place in REASONS of why a row is bad, -1 where it is not; how many are bad."""
    bad = 0
    for b in range(len(reason_B)):
        if no_user_B[b]:
            reason = 0
        elif no_item_B[b]:
            reason = 1
        elif no_time_B[b]:
            reason = 2
        elif time_B[b] < 0:
            reason = 3
        elif time_B[b] < first_ms or time_B[b] >= last_ms:
            reason = 4
        elif not np.isfinite(watch_B[b]):
            reason = 6
        elif watch_B[b] < 0:
            reason = 5
        elif watch_B[b] > max_watch_s:
            reason = 7
        elif row_B[b] == 0:
            reason = 8
        else:
            reason = -1
        reason_B[b] = reason
        bad += reason >= 0
    return bad


def views_that_count(watch_s: np.ndarray, duration_s: np.ndarray, rule: ViewRule) -> np.ndarray:
    """uint8: watched for `min_watch_s`, or the whole video where its duration is known; an unknown watch time is not.

    Compared in float32, the logs' own precision, so that 0.7 s in a log reaches a minimum of 0.7.
    """
    with np.errstate(invalid="ignore"):
        return ((watch_s >= np.float32(rule.min_watch_s)) | (watch_s >= duration_s)).astype(np.uint8)


def _durations(batch: pa.Table, keep, kept: int) -> tuple[np.ndarray, int]:
    if "duration_s" not in batch.column_names:
        return np.full(kept, np.nan, np.float32), 0
    values_B, null_B = _values(batch["duration_s"], np.nan, np.float64)
    duration = values_B[keep].astype(np.float32)
    unusable = ~(np.isfinite(duration) & (duration > 0))
    duration[unusable] = np.nan
    return duration, int(np.count_nonzero(unusable & ~null_B[keep]))


def _values(column: pa.ChunkedArray, null, dtype) -> tuple[np.ndarray, np.ndarray]:
    """A column as (values with `null` where there is none, bool mask of the nulls)."""
    if column.null_count == 0:
        return column.to_numpy().astype(dtype, copy=False), np.zeros(len(column), bool)
    null_B = pc.is_null(column).to_numpy()
    return pc.fill_null(column, null).to_numpy().astype(dtype, copy=False), null_B


def _quarantined(batch: pa.Table, reason_B: np.ndarray, first_row: int, source: str) -> pa.Table:
    bad = np.flatnonzero(reason_B >= 0)
    if not len(bad):
        return QUARANTINE_SCHEMA.empty_table()
    rows = batch.select(["user_id", "item_id", "timestamp_ms", "watch_time_s"]).take(pa.array(bad))
    reasons = pa.DictionaryArray.from_arrays(pa.array(reason_B[bad]), pa.array(REASONS)).cast(pa.string())
    return pa.table([reasons, pa.array([source]).take(pa.array(np.zeros(len(bad), np.int8))),
                     pa.array(first_row + bad), *rows.columns], schema=QUARANTINE_SCHEMA)


def check_clock(timestamp_not_ms: int, rows: int, example: int | None, column: str, source: str) -> None:
    """Most times are no Unix milliseconds: say in which unit they seem to be.

    Raises:
        InputError: if more than half of the rows were quarantined as `timestamp_not_ms`.
    """
    if rows == 0 or timestamp_not_ms * 2 <= rows:
        return
    unit, fix = "something else", "Write Unix times in milliseconds"
    if example is not None:
        if 10**8 <= example < FIRST_UNIX_MS:
            unit, fix = "seconds", "Multiply the column by 1000"
        elif LAST_UNIX_MS <= example < 10**17:
            unit, fix = "microseconds", "Divide the column by 1000"
        elif example >= 10**17:
            unit, fix = "nanoseconds", "Divide the column by 1,000,000"
    raise InputError(f"{source}: column {column} holds {unit}, not milliseconds: {timestamp_not_ms} of {rows} rows, as "
                     f"{example}. timestamp_ms is a Unix time in milliseconds. {fix} when the logs are written, or "
                     "write it as an Arrow timestamp, which carries its unit.")
