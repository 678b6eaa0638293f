"""The catalogue by vocabulary row: what is known of an item before anybody watches it.

`catalogue.arrow` is one uncompressed Arrow record batch, read through a memory map without a copy; row r is vocabulary
row r, and row 0 is the unknown item (all features unknown):

    item_id int64 · in_catalogue bool as uint8 · author_row int32 (0 unknown) · tag_rows list<int32> (rows from 1)
    duration_s float32 (NaN unknown) · duration_bucket int32 (0 unknown, 1..32 log-spaced) · has_content uint8
    content_vector fixed_size_list<float32>[C] (zeros where absent; only where the catalogue has vectors)
    category_<name> int32 (0 unknown) · first_seen_ms int64 (the first kept row of the logs; int64's maximum if none)

The ids and values behind author, tag and category rows lie in `vocabulary/` as Parquet (value, row). A duration that
the catalogue lacks is the longest that the logs give for the item.

`users.arrow` is the like for the users table: user_id int64, sorted, and category_<name> int32.

Shape suffixes: N = vocabulary rows (V + 1), C = width of the content vectors, U = users, B = ids looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import InputError
from configs.schema import DataConfig
from embeddings.untrusted import map_arrow, open_parquet, parquet_rows, whole_column
from trainer.logs import Wanted, cast_column, check_columns, corrupt, list_files, nearest_name
from trainer.vocabulary import Vocabulary, rows_of_values

DURATION_BUCKETS = 33  # the unknown one and 32 log-spaced ones
LONGEST_DURATION_S = 3600.0
NEVER_SEEN_MS = np.iinfo(np.int64).max


def duration_buckets(duration_s: np.ndarray) -> np.ndarray:
    """int32 buckets of durations in seconds: 0 unknown (NaN), else 1 + floor(32 log1p(d) / log1p(3600)), at most 32."""
    duration = np.asarray(duration_s, np.float64)
    known = np.isfinite(duration)
    scale = (DURATION_BUCKETS - 1) / np.log1p(LONGEST_DURATION_S)
    bucket = 1 + np.floor(np.log1p(np.where(known, np.maximum(duration, 0), 0)) * scale)
    return np.where(known, np.minimum(bucket, DURATION_BUCKETS - 1), 0).astype(np.int32)


# ------------------------------------------------------------------------------------------------ reading the tables

def read_items(data: DataConfig) -> tuple[pa.Table, dict[str, int]] | None:
    """The catalogue as the files have it, one row an item, in our names; None where there is none.

    Columns: item_id int64, author_id, tags, duration_s float32, content_vector list<float32> (each only where the files
    have it) and the categorical columns of data.item_categories.

    Returns:
        The table, and what was set right on the way: {"null_item_id": rows, "repeated_item_id": rows, ..}.

    Raises:
        InputError: for files, columns, types and ids that are wrong; more null or repeated ids than data.max_bad_share.
    """
    if data.items is None:
        return None
    files = list_files(data.items, "data.items")
    optional = {"author_id", "tags", "duration_s", "content_vector"}
    named = {name: data.item_columns.get(name, name) for name in ["item_id", *optional, *data.item_categories]}
    check_mapping(data.item_columns, named, "data.item_columns", "item_id: video_id")
    return one_row_each(_read_named(files, named, optional, "data.item_categories"), "item_id", data, data.items)


def read_users(data: DataConfig) -> tuple[pa.Table, dict[str, int]] | None:
    """The users table, one row a user: user_id int64 and the columns of data.user_categories; None where there is none.

    Raises:
        InputError: as for `read_items`.
    """
    if data.users is None:
        return None
    files = list_files(data.users, "data.users")
    named = {name: data.user_columns.get(name, name) for name in ["user_id", *data.user_categories]}
    check_mapping(data.user_columns, named, "data.user_columns", "user_id: uid")
    return one_row_each(_read_named(files, named, set(), "data.user_categories"), "user_id", data, data.users)


def check_mapping(mapping: dict[str, str], names, key: str, example: str) -> None:
    """Raises an InputError if a config maps a name that is none of ours."""
    for name in mapping:
        if name not in names:
            raise InputError(f"{key}: {name} is no column of ours that is read{nearest_name(name, list(names))}. It "
                             f"maps our names to the files' names, as in {key}={{{example}}}.")


def _read_named(files, named: dict[str, str], optional: set[str], key: str) -> pa.Table:
    tables = []
    for file in files:
        try:
            with file.open() as handle:
                parquet = open_parquet(handle, file.name)
                schema = parquet.schema_arrow
                wanted = [Wanted(name, column, "any", None if name.endswith("_id") else key, name not in optional)
                          for name, column in named.items()]
                check_columns(schema, wanted, file.name, key.replace("categories", "columns"))
                table = parquet.read(columns=[w.column for w in wanted if w.column in schema.names])
        except (pa.ArrowException, OSError) as error:
            raise corrupt(file.name, error) from error
        tables.append(pa.table({w.name: _as_ours(table[w.column], w, file.name) for w in wanted
                                if w.column in schema.names}))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        names = ", ".join(f.name for f in files[:3])
        raise InputError(f"{names}: the files' columns do not fit each other ({error}).") from error


def _as_ours(column: pa.ChunkedArray, wanted: Wanted, source: str) -> pa.Array | pa.ChunkedArray:
    name, found = wanted.name, column.type
    if name in ("item_id", "user_id", "author_id"):
        return cast_column(column, Wanted(name, wanted.column, "id"), source)
    if name == "duration_s":
        return cast_column(column, Wanted(name, wanted.column, "seconds"), source)
    if name in ("tags", "content_vector"):
        inner = pa.int64() if name == "tags" else pa.float32()
        is_list = (pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found))
        if pa.types.is_null(found):
            return pa.nulls(len(column), pa.large_list(inner))
        fits = is_list and (pa.types.is_integer(found.value_type) or (
            name == "content_vector" and pa.types.is_floating(found.value_type))
            or pa.types.is_null(found.value_type))
        if not fits:
            raise InputError(f"{source}: column {wanted.column} is {found}, but {name} needs list<{inner}>.")
        return pc.cast(column, pa.large_list(inner), safe=name == "tags")
    if pa.types.is_nested(found) or isinstance(found, pa.BaseExtensionType):
        raise InputError(f"{source}: column {wanted.column} is {found}, but a categorical column holds one value a row "
                         "(string, integer or bool).")
    if pa.types.is_dictionary(found):
        return pc.cast(column, found.value_type)
    return pc.cast(column, pa.string()) if pa.types.is_temporal(found) else column


def one_row_each(table: pa.Table, key: str, data: DataConfig, location: str) -> tuple[pa.Table, dict[str, int]]:
    """The table without null ids and the repeats of an id (its first row stays), and how many rows those were.

    Raises:
        InputError: if there are no rows, or these are more than data.max_bad_share.
    """
    if table.num_rows == 0:
        raise InputError(f"{location}: has no rows. Leave it out, or name the file that has them.")
    present = table.filter(pc.is_valid(table[key])) if table[key].null_count else table
    ids = present[key].to_numpy()
    first = None if (ids[1:] > ids[:-1]).all() else np.sort(np.unique(ids, return_index=True)[1])
    repeated = 0 if first is None else len(ids) - len(first)
    notes = {f"null_{key}": table.num_rows - present.num_rows, f"repeated_{key}": repeated}
    bad = sum(notes.values())
    if bad > data.max_bad_share * table.num_rows:
        raise InputError(f"{location}: {notes[f'null_{key}']} rows have no {key} and {notes[f'repeated_{key}']} repeat "
                         f"one, of {table.num_rows}; data.max_bad_share allows {data.max_bad_share:.2%}. Write one row "
                         f"for each {key}, or raise data.max_bad_share (the first row of an id is taken).")
    return present.take(pa.array(first)) if repeated else present, {name: n for name, n in notes.items() if n}


# ------------------------------------------------------------------------------------------------ writing by row

def durations_by_row(items: pa.Table | None, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """float32 seconds by vocabulary row, NaN where the catalogue has none (or none that is positive and finite).

    Returns:
        The durations, and how many of the catalogue's were set aside as not positive and finite.
    """
    duration_N = np.full(vocabulary.rows, np.nan, np.float32)
    if items is None or "duration_s" not in items.column_names:
        return duration_N, 0
    values = pc.fill_null(items["duration_s"], np.nan).to_numpy().astype(np.float32)
    usable = np.isfinite(values) & (values > 0)
    duration_N[vocabulary.rows_of(items["item_id"].to_numpy())[usable]] = values[usable]
    return duration_N, int((~usable).sum()) - items["duration_s"].null_count


@dataclass(frozen=True)
class CatalogueColumns:
    """What the items table alone tells of `catalogue.arrow`, by vocabulary row, before the logs are read.

    notes: what was set right: {"unusable_content_vectors": items}, where a vector is not finite.
    """

    columns: dict[str, np.ndarray | pa.Array]
    notes: dict[str, int]

    def write(self, folder: Path, duration_s_N: np.ndarray, first_seen_ms_N: np.ndarray) -> None:
        """Write `catalogue.arrow`, with what the logs tell: float32 seconds (NaN: unknown), int64 milliseconds."""
        write_batch(folder / "catalogue.arrow", self.columns | {
            "duration_s": duration_s_N.astype(np.float32), "duration_bucket": duration_buckets(duration_s_N),
            "first_seen_ms": first_seen_ms_N.astype(np.int64)})


def catalogue_columns(folder: Path, items: pa.Table | None, vocabulary: Vocabulary, categories: list[str]
                      ) -> CatalogueColumns:
    """The catalogue by vocabulary row; writes the vocabularies of its columns.

    Raises:
        InputError: if content vectors differ in width.
    """
    rows = vocabulary.rows
    at = vocabulary.rows_of(items["item_id"].to_numpy()) if items is not None else np.zeros(0, np.int32)
    notes: dict[str, int] = {}

    def spread(values: np.ndarray, dtype) -> np.ndarray:
        out = np.zeros((rows, *values.shape[1:]), dtype)
        out[at] = values
        return out

    columns = {"item_id": np.concatenate([np.zeros(1, np.int64), vocabulary.id_V]),
               "in_catalogue": spread(np.ones(len(at), np.uint8), np.uint8),
               "author_row": np.zeros(rows, np.int32)}
    if items is not None and "author_id" in items.column_names:
        author_row, authors = rows_of_values(items["author_id"])
        columns["author_row"] = spread(author_row, np.int32)
        _save_values(folder, "authors", authors)
    columns["tag_rows"] = _tags(folder, items, at, rows)
    content_NC, unusable = _content(items, at, rows)
    columns["has_content"] = np.zeros(rows, np.uint8)
    if content_NC is not None:
        columns["has_content"] = content_NC.any(axis=1).astype(np.uint8)
        columns["content_vector"] = pa.FixedSizeListArray.from_arrays(pa.array(content_NC.ravel()), content_NC.shape[1])
    if unusable:
        notes["unusable_content_vectors"] = unusable
    for name in categories if items is not None else []:
        value_row, values = rows_of_values(items[name])
        columns[f"category_{name}"] = spread(value_row, np.int32)
        _save_values(folder, f"category_{name}", values)
    return CatalogueColumns(columns, notes)


def _tags(folder: Path, items: pa.Table | None, at: np.ndarray, rows: int) -> pa.Array:
    length_N = np.zeros(rows, np.int64)
    tag_rows = np.zeros(0, np.int32)
    if items is not None and "tags" in items.column_names:
        lists = _one_array(items["tags"])
        if (at[1:] < at[:-1]).any():  # the tags stand in the order of the items' rows
            order = np.argsort(at)
            lists, at = lists.take(pa.array(order)), at[order]
        tag_rows, values = rows_of_values(lists.flatten())
        length_N[at] = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        _save_values(folder, "tags", values)
    offset_N1 = np.concatenate([[0], np.cumsum(length_N)])
    if offset_N1[-1] > np.iinfo(np.int32).max:
        return pa.LargeListArray.from_arrays(pa.array(offset_N1), pa.array(tag_rows))
    return pa.ListArray.from_arrays(pa.array(offset_N1.astype(np.int32)), pa.array(tag_rows))


def _content(items: pa.Table | None, at: np.ndarray, rows: int) -> tuple[np.ndarray | None, int]:
    if items is None or "content_vector" not in items.column_names:
        return None, 0
    lists = _one_array(items["content_vector"])
    width = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    widths = np.unique(width[width > 0])
    if len(widths) == 0:
        return None, 0
    if len(widths) > 1:
        odd = items["item_id"].to_numpy()[np.flatnonzero((width > 0) & (width != widths[-1]))[0]]
        raise InputError(f"data.items: content vectors have {len(widths)} widths ({', '.join(map(str, widths[:5]))}), "
                         f"as at item {odd}. All must have one width; leave the vector null where an item has none.")
    value_BC = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, int(widths[0])).astype(np.float32)
    finite = np.isfinite(value_BC).all(axis=1)
    content_NC = np.zeros((rows, int(widths[0])), np.float32)
    content_NC[at[width > 0][finite]] = value_BC[finite]
    return content_NC, int((~finite).sum())


def write_users(folder: Path, users: pa.Table, categories: list[str]) -> None:
    """Write `users.arrow`, sorted by user_id, and the vocabularies of its columns."""
    users = users.sort_by("user_id")
    columns = {"user_id": users["user_id"].to_numpy()}
    for name in categories:
        columns[f"category_{name}"], values = rows_of_values(users[name])
        _save_values(folder, f"user_category_{name}", values)
    write_batch(folder / "users.arrow", columns)


def _save_values(folder: Path, name: str, values: pa.Array) -> None:
    rows = np.arange(1, len(values) + 1, dtype=np.int32)
    (folder / "vocabulary").mkdir(exist_ok=True)
    pq.write_table(pa.table({"value": values, "row": rows}), folder / "vocabulary" / f"{name}.parquet")


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def write_batch(path: Path, columns: dict[str, np.ndarray | pa.Array]) -> None:
    """Write columns as an uncompressed Arrow file of one record batch, so that it can be mapped."""
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def map_batch(path: Path) -> pa.RecordBatch:
    """The record batch of an Arrow file, mapped: read when touched, no file handle kept, freed with its last array.

    Raises:
        InputError: if the file is missing or not whole.
    """
    try:
        return map_arrow(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Remove the sequences folder and run ingest again."
                         ) from error


# ---------------------------------------------------------------------------------------------------------- reading

@dataclass(frozen=True)
class Catalogue:
    """The catalogue by vocabulary row, mapped. Sizes count the unknown row 0.

    `tag_rows[tag_offsets_N1[r]:tag_offsets_N1[r + 1]]` are the tags of row r; a tag row is never 0.
    """

    item_id_N: np.ndarray  # int64
    in_catalogue_N: np.ndarray  # bool
    author_row_N: np.ndarray  # int32
    tag_offsets_N1: np.ndarray  # int32, or int64 in a catalogue of more than 2^31 tags
    tag_rows: np.ndarray  # int32
    duration_s_N: np.ndarray  # float32, NaN unknown
    duration_bucket_N: np.ndarray  # int32, 0 unknown
    content_NC: np.ndarray | None  # float32
    has_content_N: np.ndarray  # bool
    categories: dict[str, np.ndarray]  # int32 N each
    first_seen_ms_N: np.ndarray  # int64, NEVER_SEEN_MS if never
    author_rows: int
    tag_rows_count: int
    category_rows: dict[str, int]
    duration_buckets: int = DURATION_BUCKETS

    @classmethod
    def open(cls, folder: Path, rows: int | None = None) -> Catalogue:
        """Map the catalogue of a sequences folder.

        Args:
            rows: N that the vocabulary has; None takes the file's word.

        Raises:
            InputError: if it is missing or damaged, or has other rows than the vocabularies.
        """
        folder = Path(folder)
        path = folder / "catalogue.arrow"
        batch = map_batch(path)
        tags = _tag_lists(batch, path)
        content = batch["content_vector"] if "content_vector" in batch.schema.names else None
        names = [n.removeprefix("category_") for n in batch.schema.names if n.startswith("category_")]

        def column(name: str, kind: pa.DataType) -> np.ndarray:
            return whole_column(batch, name, kind, str(path)).to_numpy()

        found = cls(
            item_id_N=column("item_id", pa.int64()), in_catalogue_N=_flag(column("in_catalogue", pa.uint8()), path),
            author_row_N=column("author_row", pa.int32()),
            tag_offsets_N1=tags.offsets.to_numpy(), tag_rows=tags.values.to_numpy(),
            duration_s_N=column("duration_s", pa.float32()), duration_bucket_N=column("duration_bucket", pa.int32()),
            content_NC=None if content is None else _content_vectors(content, path),
            has_content_N=_flag(column("has_content", pa.uint8()), path),
            categories={name: column(f"category_{name}", pa.int32()) for name in names},
            first_seen_ms_N=column("first_seen_ms", pa.int64()), author_rows=_values_saved(folder, "authors"),
            tag_rows_count=_values_saved(folder, "tags"),
            category_rows={name: _values_saved(folder, f"category_{name}") for name in names})
        _check_rows(found, len(batch) if rows is None else rows, path)
        return found


def _values_saved(folder: Path, name: str) -> int:
    """Rows of a vocabulary, the unknown one with them."""
    if "/" in name or "\0" in name:
        raise InputError(f"{folder}: a category named {name!r} leads out of the folder. Run ingest again.")
    path = folder / "vocabulary" / f"{name}.parquet"
    try:
        return 1 + (parquet_rows(path) if path.exists() else 0)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Remove the sequences folder and run ingest again."
                         ) from error


def _flag(values_N: np.ndarray, path: Path) -> np.ndarray:
    if values_N.max(initial=0) > 1:
        raise InputError(f"{path}: a flag is neither 0 nor 1. Remove the sequences folder and run ingest again.")
    return values_N.view(np.bool_)


def _tag_lists(batch: pa.RecordBatch, path: Path) -> pa.Array:
    kind = batch.schema.field("tag_rows").type if "tag_rows" in batch.schema.names else pa.null()
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or kind.value_type != pa.int32():
        raise InputError(f"{path}: column tag_rows is {kind}. Remove the sequences folder and run ingest again.")
    tags = whole_column(batch, "tag_rows", kind, str(path))
    try:
        tags.validate(full=True)
    except pa.ArrowException as error:
        raise InputError(f"{path}: damaged lists of tags ({error}). Remove the sequences folder and run ingest again."
                         ) from error
    return tags


def _content_vectors(content: pa.Array, path: Path) -> np.ndarray:
    kind = content.type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32() or kind.list_size < 1 or (
            content.null_count or content.values.null_count):
        raise InputError(f"{path}: column content_vector is {kind}, or has nulls. Remove the sequences folder and run "
                         "ingest again.")
    return content.values.to_numpy().reshape(len(content), -1)


def _check_rows(found: Catalogue, rows: int, path: Path) -> None:
    """Raises an InputError where a row leads out of its vocabulary: compiled code looks it up without a check."""
    within = [(found.author_row_N, found.author_rows), (found.duration_bucket_N, DURATION_BUCKETS),
              (found.tag_rows, found.tag_rows_count),
              *((found.categories[name], size) for name, size in found.category_rows.items())]
    if len(found.item_id_N) != rows or any(
            values.size and not (0 <= values.min() and values.max() < size) for values, size in within):
        raise InputError(f"{path}: its rows do not fit the vocabularies beside it. Remove the sequences folder and run "
                         "ingest again.")


@dataclass(frozen=True)
class UserFeatures:
    """Categorical features by user, mapped; a user who is not in the table has row 0 of every feature."""

    user_id_U: np.ndarray  # int64, sorted
    categories: dict[str, np.ndarray]  # int32 U each
    category_rows: dict[str, int]

    @classmethod
    def open(cls, folder: Path) -> UserFeatures:
        """Map the users of a sequences folder.

        Raises:
            InputError: if they are missing or damaged.
        """
        folder = Path(folder)
        path = folder / "users.arrow"
        batch = map_batch(path)
        names = [n.removeprefix("category_") for n in batch.schema.names if n.startswith("category_")]
        sizes = {n: _values_saved(folder, f"user_category_{n}") for n in names}
        found = cls(whole_column(batch, "user_id", pa.int64(), str(path)).to_numpy(),
                    {n: whole_column(batch, f"category_{n}", pa.int32(), str(path)).to_numpy() for n in names}, sizes)
        if (np.diff(found.user_id_U) <= 0).any() or any(
                values.size and not (0 <= values.min() and values.max() < sizes[n])
                for n, values in found.categories.items()):
            raise InputError(f"{path}: its rows do not fit the vocabularies beside it. Remove the sequences folder and "
                             "run ingest again.")
        return found

    def rows_of(self, user_id_B: np.ndarray) -> dict[str, np.ndarray]:
        """int32 rows of each feature for int64 user ids."""
        at = np.minimum(np.searchsorted(self.user_id_U, user_id_B), max(len(self.user_id_U) - 1, 0))
        known = self.user_id_U[at] == user_id_B if len(self.user_id_U) else np.zeros(len(user_id_B), bool)
        return {name: np.where(known, rows[at], 0).astype(np.int32) for name, rows in self.categories.items()}
