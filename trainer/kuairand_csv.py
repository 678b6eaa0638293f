"""Reader for KuaiRand as it is published: a folder of CSV files (27K, 1K or Pure), `data.format: kuairand_csv`.

`data.logs` is the published `data/` folder. Read are `log_standard_*.csv` (the feed), `video_features_basic_*.csv` as
the catalogue and `user_features_*.csv` as the users table; `data.items` and `data.users` may name them elsewhere.
`log_random_*.csv`, where videos were shown at random, is another policy's log and is left out, unless data.logs names
that file itself. Statistics of videos are left out: they are averaged over the whole month, so they know the future.

Their columns as ours (field meanings: README of github.com/chongminggao/KuaiRand, section "Data Descriptions"):

    user_id, video_id -> item_id, time_ms -> timestamp_ms, play_time_ms / 1000 -> watch_time_s,
    duration_ms / 1000 -> duration_s (0: unknown)
    is_click -> effective_view: the README's `valid_play` in the single-column feed, i.e. played for more than 7 s, or
    to the end of a video of 7 s or less; in the two-column feed it is the click
    long_view: played to the end of a video of 18 s or less, or for 18 s
    is_like, is_follow, is_comment, is_forward, is_hate, is_profile_enter -> like, follow, comment, share, hate,
    profile_enter; is_rand -> random_exposure
    video_id -> item_id, author_id, tag ("12,65") -> tags, video_duration / 1000 -> duration_s, upload_dt ->
    upload_date, and the rest under their own names

Large files are cut into byte ranges at line ends (the logs have no quoted line ends) and read in blocks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from configs.errors import InputError
from configs.schema import DataConfig
from trainer.catalogue import one_row_each
from trainer.logs import (
    InputFile,
    Piece,
    Wanted,
    cast_column,
    check_columns,
    filesystem_of,
    list_files,
    nearest_name,
    wanted_columns,
)

LOG_COLUMNS = {"user_id": "user_id", "item_id": "video_id", "timestamp_ms": "time_ms", "watch_time_s": "play_time_ms",
               "duration_s": "duration_ms", "effective_view": "is_click", "long_view": "long_view", "like": "is_like",
               "follow": "is_follow", "comment": "is_comment", "share": "is_forward", "hate": "is_hate",
               "profile_enter": "is_profile_enter", "random_exposure": "is_rand", "session": "session"}
ITEM_COLUMNS = {"item_id": "video_id", "author_id": "author_id", "tags": "tag", "duration_s": "video_duration",
                "upload_date": "upload_dt"}
MILLISECONDS = ("watch_time_s", "duration_s")
PIECE_BYTES = 64 << 20
BYTES_PER_ROW = 75  # of the published logs, for the estimate of rows


def find_files(data: DataConfig) -> dict[str, list[InputFile]]:
    """The published files that this config reads.

    Raises:
        InputError: if there is no log, or the config maps columns (the layout's names are fixed).
    """
    for key in ("columns", "item_columns", "user_columns"):
        if getattr(data, key):
            raise InputError(f"data.{key}: data.format=kuairand_csv has fixed names; leave data.{key} empty.")
    for name in _unknown(data):
        raise InputError(f"data: the published KuaiRand logs have no column {name}{nearest_name(name, _flags())}. They "
                         f"have {', '.join(_flags())}.")
    found = list_files(data.logs, "data.logs", (".csv",))
    # A file that is named itself is read whatever its name: so is the random-exposure log.
    itself = [f.path for f in found] == [filesystem_of(data.logs)[1]]
    standard = found if itself else [f for f in found if _named(f, r"log_standard_.*\.csv")]
    if not standard:
        raise InputError(f"data.logs: {data.logs} holds no log_standard_*.csv, as KuaiRand's data/ folder does.")

    def tables(location: str | None, key: str, pattern: str) -> list[InputFile]:
        files = found if location is None else list_files(location, key, (".csv",))
        if location is not None and [f.path for f in files] == [filesystem_of(location)[1]]:
            return files
        return [f for f in files if _named(f, pattern)]

    return {"logs": standard, "items": tables(data.items, "data.items", r"video_features_basic_.*\.csv"),
            "users": tables(data.users, "data.users", r"user_features_.*\.csv")}


def _named(file: InputFile, pattern: str) -> bool:
    return re.fullmatch(pattern, file.path.split("/")[-1]) is not None


def _flags() -> list[str]:
    return [name for name in LOG_COLUMNS if name not in (
        "user_id", "item_id", "timestamp_ms", "watch_time_s", "duration_s", "session")]


def _unknown(data: DataConfig) -> list[str]:
    rules = (data.effective_view, data.target)
    names = [r.column for r in rules if r and r.column] + data.feedback
    names += [n for n in (data.ordinal_time, data.session) if n]
    return [n for n in names if n not in _flags()]


# --------------------------------------------------------------------------------------------------------- the logs

def csv_pieces(files: list[InputFile], data: DataConfig) -> list[Piece]:
    """Cut the logs into byte ranges that begin and end at line ends.

    `order` counts bytes, which rise with the rows. `first_row` is 0 in every piece of a file: how many rows lie before
    it is not known without reading, so the source of a later piece names the byte that it begins at.

    Raises:
        InputError: if a file lacks a needed column, or there is not one row.
    """
    pieces, order = [], 0
    for file in files:
        with file.open() as handle:
            header = handle.read(1 << 16).split(b"\n", 1)
            names = _header(header[0])
            check_columns(pa.schema([(n, pa.null()) for n in names]), _wanted(data), file.name)
            start, size = len(header[0]) + 1, handle.size()
            while start < size:
                stop = _line_end(handle, start + PIECE_BYTES, size)
                pieces.append(Piece(len(pieces), file, start, stop, 0, order + start, (stop - start) // BYTES_PER_ROW,
                                    f"from byte {start}"))
                start = stop
        order += size + 1
    if not pieces:
        raise InputError(f"data.logs: {data.logs} has no rows ({len(files)} files). There is nothing to ingest.")
    return pieces


def _line_end(handle: pa.NativeFile, position: int, size: int) -> int:
    while position < size:
        handle.seek(position)
        block = handle.read(1 << 16)
        if (end := block.find(b"\n")) >= 0:
            return position + end + 1
        position += len(block)
    return size


def _header(line: bytes) -> list[str]:
    text = line.decode("utf-8", "replace").strip().lstrip("\ufeff")
    return [name.strip().strip('"') for name in text.split(",")]


def _wanted(data: DataConfig, only: tuple[str, ...] | None = None) -> list[Wanted]:
    """The columns as `logs.wanted_columns` gives them, under the published names."""
    return [Wanted(w.name, LOG_COLUMNS[w.column], w.kind, w.key, w.required) for w in wanted_columns(data)
            if only is None or w.name in only]


def read_csv_piece(piece: Piece, data: DataConfig, only: tuple[str, ...] | None = None
                   ) -> Iterator[tuple[int, pa.Table]]:
    """Yields (row number in the piece, table of our columns), as `logs.read_parquet_piece` does.

    Raises:
        InputError: if a line has another number of fields, or a value that is no number.
    """
    wanted = _wanted(data, only)
    with piece.file.open() as handle:
        names = _header(handle.read(1 << 16).split(b"\n", 1)[0])
        present = [w for w in wanted if w.column in names]
        types = {w.column: pa.float64() if w.kind == "seconds" else pa.int64() for w in present}
        handle.seek(piece.start)
        row = 0
        for table in _blocks(_Range(handle, piece.stop - piece.start), names, types, piece.source):
            columns = {}
            for w in present:
                column = cast_column(table[w.column], w, piece.source)
                columns[w.name] = pc.divide(column, 1000.0) if w.name in MILLISECONDS else column
            if "duration_s" in columns:  # the published logs write an unknown duration as 0
                duration = columns["duration_s"]
                columns["duration_s"] = pc.if_else(pc.equal(duration, 0.0), pa.scalar(None, pa.float64()), duration)
            yield row, pa.table(columns)
            row += table.num_rows


class _Range(io.RawIOBase):
    """The next `size` bytes of an open file, as a file."""

    def __init__(self, handle: pa.NativeFile, size: int):
        self._handle, self._left = handle, size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._handle.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def _blocks(source, names: list[str], types: dict[str, pa.DataType], name: str) -> Iterator[pa.RecordBatch]:
    try:
        reader = pacsv.open_csv(
            source, read_options=pacsv.ReadOptions(column_names=names, block_size=8 << 20, use_threads=False),
            convert_options=pacsv.ConvertOptions(column_types=types, include_columns=list(types),
                                                 strings_can_be_null=True))
        for batch in reader:
            yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise InputError(f"{name}: cannot be read as a CSV file of KuaiRand ({first}). Replace the file.") from error


# ------------------------------------------------------------------------------------------------------- the tables

def read_items(data: DataConfig) -> tuple[pa.Table, dict[str, int]] | None:
    """The catalogue of `video_features_basic_*.csv`, as `catalogue.read_items` gives it; None where there is none.

    Raises:
        InputError: for a missing column, a value of the wrong type, or too many null or repeated ids.
    """
    files = find_files(data)["items"]
    if not files:
        return None
    named = ITEM_COLUMNS | {name: ITEM_COLUMNS.get(name, name) for name in data.item_categories}
    table = _read_tables(files, named, {"item_id": pa.int64(), "author_id": pa.int64(), "duration_s": pa.float64(),
                                        "tags": pa.string()}, "data.item_categories")
    duration = pc.divide(table["duration_s"], 1000.0)
    tags = [_tags(chunk, files[0].name) for chunk in table["tags"].chunks]
    table = table.set_column(table.column_names.index("duration_s"), "duration_s", duration)
    lists = pa.chunked_array(tags, pa.large_list(pa.int64()))
    table = table.set_column(table.column_names.index("tags"), "tags", lists)
    return one_row_each(table, "item_id", data, files[0].name)


def read_users(data: DataConfig) -> tuple[pa.Table, dict[str, int]] | None:
    """The users of `user_features_*.csv` with the columns of data.user_categories; None where there are none."""
    files = find_files(data)["users"]
    if not files:
        return None
    named = {name: name for name in ["user_id", *data.user_categories]}
    return one_row_each(_read_tables(files, named, {"user_id": pa.int64()}, "data.user_categories"), "user_id", data,
                        files[0].name)


def _read_tables(files: list[InputFile], named: dict[str, str], types: dict[str, pa.DataType], key: str) -> pa.Table:
    """Columns of our names; those without a type here are categories, kept as they are written (`9.0` as 9)."""
    tables = []
    for file in files:
        with file.open() as handle:
            line = handle.read(1 << 16).split(b"\n", 1)[0]
            names = _header(line)
            handle.seek(min(len(line) + 1, handle.size()))
            wanted = [Wanted(ours, theirs, "any", None if ours in types else key) for ours, theirs in named.items()]
            check_columns(pa.schema([(n, pa.null()) for n in names]), wanted, file.name, key)
            column_types = {theirs: types.get(ours, pa.string()) for ours, theirs in named.items()}
            blocks = list(_blocks(handle, names, column_types, file.name))
        tables += [pa.table({ours: block[theirs] if ours in types else _category(block[theirs])
                             for ours, theirs in named.items()}) for block in blocks]
    if not tables:
        raise InputError(f"{files[0].name}: has no rows. Leave it out, or replace it.")
    return pa.concat_tables(tables)


def _category(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.replace_substring_regex(column, r"^(-?\d+)\.0+$", r"\1")


def _tags(text: pa.Array, source: str) -> pa.LargeListArray:
    """`"12,65"` as [12, 65]; null and empty text as an empty list."""
    lists = pc.split_pattern(pc.fill_null(text, ""), ",")
    flat = pc.utf8_trim_whitespace(lists.flatten())
    given = pc.not_equal(flat, "")
    owner = pc.list_parent_indices(lists).filter(given)
    counts = np.bincount(owner.to_numpy(), minlength=len(text))
    try:
        values = pc.cast(pc.cast(flat.filter(given), pa.float64()), pa.int64())
    except pa.ArrowInvalid as error:
        raise InputError(f"{source}: column tag holds something else than numbers ({error}).") from error
    return pa.LargeListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)), values)
