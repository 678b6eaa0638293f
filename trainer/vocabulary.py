"""Exact ids to rows: what a table is looked up by.

A vocabulary is a sorted array of distinct int64 ids. Its k-th id has row k + 1; row 0 stands for every id that is not
in it. Rows follow the order of the ids, so sorting by row sorts by id.

Shape suffixes: V = ids, B = ids that are looked up.
"""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import InputError
from embeddings.untrusted import read_parquet, whole_column

DENSE_SPREAD = 4  # a direct table is used where the ids span less than this many times their number


class Vocabulary:
    """Distinct int64 ids, sorted; row 0 is unknown, rows 1..V are theirs."""

    def __init__(self, id_V: np.ndarray):
        """Args:
            id_V: int64 ids, in any order, repeats allowed.
        """
        id_V = np.asarray(id_V, np.int64)
        self.id_V = id_V if (id_V[1:] > id_V[:-1]).all() else np.unique(id_V)
        self._row_of: np.ndarray | None = None
        self._first_of: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.id_V)

    @property
    def rows(self) -> int:
        """Rows of a table for this vocabulary: V + 1."""
        return len(self.id_V) + 1

    def rows_of(self, id_B: np.ndarray) -> np.ndarray:
        """int32 rows of int64 ids; 0 for an id that is not in the vocabulary."""
        id_B = np.asarray(id_B, np.int64)
        size = len(self.id_V)
        if size == 0 or len(id_B) == 0:
            return np.zeros(len(id_B), np.int32)
        low, high = int(self.id_V[0]), int(self.id_V[-1])
        if high - low < DENSE_SPREAD * size:
            return self._dense_rows(id_B, low, high)
        if self._first_of is None:
            # As many buckets of the range as ids, so that an id's is searched in a step or two where ids are even.
            self._shift = max(0, (high - low).bit_length() - size.bit_length())
            bucket_V = (self.id_V.view(np.uint64) - np.uint64(low % 2**64)) >> np.uint64(self._shift)
            self._first_of = np.searchsorted(bucket_V, np.arange(int(bucket_V[-1]) + 2, dtype=np.uint64)).astype(
                np.int32)
        return _bucket_rows(id_B, self.id_V, self._first_of, self._shift)

    def _dense_rows(self, id_B: np.ndarray, low: int, high: int) -> np.ndarray:
        if self._row_of is None:
            row_of = np.zeros(high - low + 1, np.int32)
            row_of[self.id_V - low] = np.arange(1, len(self.id_V) + 1, dtype=np.int32)
            self._row_of = row_of  # whole before another thread can see it
        inside = (id_B >= low) & (id_B <= high)
        return np.where(inside, self._row_of[np.where(inside, id_B, low) - low], 0).astype(np.int32)

    def ids_of(self, row_B: np.ndarray) -> np.ndarray:
        """int64 ids of rows 1..V.

        Raises:
            IndexError: for row 0, which has no id, and for rows that are not there.
        """
        row_B = np.asarray(row_B)
        if row_B.size and (row_B.min() < 1 or row_B.max() > len(self.id_V)):
            raise IndexError(f"rows with an id are 1 to {len(self.id_V)}; got {row_B.min()} to {row_B.max()}")
        return self.id_V[row_B - 1]

    def save(self, path: Path) -> None:
        """Write `item_id`, `row` as Parquet."""
        rows = np.arange(1, len(self.id_V) + 1, dtype=np.int32)
        pq.write_table(pa.table({"item_id": self.id_V, "row": rows}), path)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            InputError: if the file is missing, damaged or holds something else.
        """
        try:
            table = read_parquet(path, ["item_id"])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error}). Remove the sequences folder and run ingest again."
                             ) from error
        ids = whole_column(table, "item_id", pa.int64(), str(path)).to_numpy()
        if (np.diff(ids) <= 0).any():
            raise InputError(f"{path}: its ids do not rise. Remove the sequences folder and run ingest again.")
        return cls(ids)


@numba.njit(cache=True, nogil=True)
def _bucket_rows(id_B, id_V, first_of, shift):  # pragma: no cover - compiled
    """int32 rows of ids in a sorted vocabulary whose ids are counted by their high bits; 0 where there is none."""
    row_B = np.zeros(len(id_B), np.int32)
    lowest, highest = id_V[0], id_V[-1]
    for b in range(len(id_B)):
        wanted = id_B[b]
        if wanted < lowest or wanted > highest:
            continue
        bucket = (np.uint64(wanted) - np.uint64(lowest)) >> np.uint64(shift)
        low, high = first_of[bucket], first_of[bucket + np.uint64(1)]
        while low < high:
            middle = (low + high) // 2
            if id_V[middle] < wanted:
                low = middle + 1
            else:
                high = middle
        if low < len(id_V) and id_V[low] == wanted:
            row_B[b] = low + 1
    return row_B


def rows_of_values(values: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Rows of a categorical column: (int32 rows, 0 where null or NaN; the distinct values, sorted, of rows 1..).

    Any type that sorts will do: strings, integers, booleans, floats.
    """
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    if pa.types.is_null(values.type):
        return np.zeros(len(values), np.int32), pa.array([], pa.string())
    distinct = pc.drop_null(pc.unique(values))
    distinct = distinct.take(pc.sort_indices(distinct))
    rows = pc.add(pc.fill_null(pc.index_in(values, distinct), -1), 1)
    return rows.to_numpy(zero_copy_only=False).astype(np.int32), distinct
