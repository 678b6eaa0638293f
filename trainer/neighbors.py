"""Neighbour lists: what an item-to-item channel publishes, and the snapshots that a request may see.

    channels/<name>/<watermark_ms>/{neighbors.parquet, manifest.json}

neighbors.parquet has one row per item that has neighbours: item_id, neighbors list<int64> (best first), scores
list<float32>. In memory a snapshot is addressed by vocabulary row. A request at t sees, of every channel, the newest
snapshot whose watermark lies at least the rollback before t (CAPTS, section 3.1: R_c(x, t)).

Shape suffixes: N = vocabulary rows with the unknown row 0, L = neighbours of all items, R = requests, C = channels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError
from configs.schema import ChannelsConfig
from embeddings.snapshots import Snapshot, list_snapshots, publish, verify
from embeddings.untrusted import damaged, read_parquet, whole_column
from trainer.vocabulary import Vocabulary

NEIGHBORS = "neighbors.parquet"
NONE = -1  # number of a snapshot where a request comes before the first
MINUTE_MS = 60_000
KEPT_BYTES = 256 << 20  # of what was found out of the lists of whole states


@dataclass(frozen=True)
class NeighborLists:
    """Lists of all items: row n has neighbor_L[offset_N1[n]:offset_N1[n + 1]], best first, never n itself.

    offset_N1: int64 (N + 1,). neighbor_L: int32 vocabulary rows, distinct within a list. score_L: float32, falling.
    """

    offset_N1: np.ndarray
    neighbor_L: np.ndarray
    score_L: np.ndarray

    @property
    def length_N(self) -> np.ndarray:
        """int64 (N,): neighbours of each item."""
        return np.diff(self.offset_N1)

    @cached_property
    def longest(self) -> int:
        """The most neighbours of an item."""
        return int(self.length_N.max(initial=0))

    @cached_property
    def scaled_score_L(self) -> np.ndarray:
        """Scores over their own 0.9-quantile, so that channels and snapshots compare."""
        return self.score_L / max(float(np.quantile(self.score_L, 0.9)), 1e-9) if len(self.score_L) else self.score_L

    def of(self, row: int) -> np.ndarray:
        """The neighbours of one item, best first."""
        return self.neighbor_L[self.offset_N1[row]:self.offset_N1[row + 1]]

    @classmethod
    def empty(cls, rows: int) -> NeighborLists:
        return cls(np.zeros(rows + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


def top_neighbors(item_P: np.ndarray, neighbor_P: np.ndarray, score_P: np.ndarray, rows: int, top: int
                  ) -> NeighborLists:
    """The best `top` neighbours of each item out of scored pairs; of equal scores, the lower row first.

    Args:
        item_P, neighbor_P: vocabulary rows of the pairs, each pair once. Row 0 and an item itself are left out.
        score_P: float; pairs whose score is not above 0 or not finite are left out.
        rows: N.
    """
    score_P = np.asarray(score_P, np.float32)
    keep_P = (item_P > 0) & (neighbor_P > 0) & (item_P != neighbor_P) & (score_P > 0) & np.isfinite(score_P)
    item, neighbor, score = item_P[keep_P], neighbor_P[keep_P], score_P[keep_P]
    if not _in_order(item, neighbor, score):  # the counting kernels' pairs are
        order = np.lexsort((neighbor, -score, item))
        item, neighbor, score = item[order], neighbor[order], score[order]
    first = np.searchsorted(item, np.arange(rows + 1))
    keep = np.arange(len(item)) - first[item] < top
    length_N = np.minimum(np.diff(first), top)
    return NeighborLists(np.concatenate([[0], np.cumsum(length_N)]).astype(np.int64), neighbor[keep].astype(np.int32),
                         score[keep].astype(np.float32))


def _in_order(item_P: np.ndarray, neighbor_P: np.ndarray, score_P: np.ndarray) -> bool:
    """Whether the pairs are sorted by item, falling score and neighbour."""
    same_P, gain_P = item_P[1:] == item_P[:-1], score_P[1:] - score_P[:-1]
    return bool(((item_P[1:] > item_P[:-1])
                 | (same_P & ((gain_P < 0) | ((gain_P == 0) & (neighbor_P[1:] > neighbor_P[:-1]))))).all())


def publish_neighbors(channel_folder: Path, watermark_ms: int, lists: NeighborLists, vocabulary: Vocabulary,
                      manifest: Mapping[str, Any], *, replace: bool = False) -> Path:
    """Publish a snapshot under channels/<name>/<watermark_ms>, whole or not at all; one that is there with the same
    manifest stays.

    Args:
        manifest: what the lists were made from and how (params, counts); rows and watermark are added.
        replace: swap one that is there.

    Returns:
        Its folder.
    """
    length_N = lists.length_N
    row_I = np.flatnonzero(length_N)
    if len(row_I) and row_I[0] == 0:
        raise ValueError("row 0 stands for unknown items and has no neighbours")
    offsets = pa.array(np.concatenate([[0], np.cumsum(length_N[row_I])]).astype(np.int32))
    ids_L = vocabulary.ids_of(lists.neighbor_L)

    def write(folder: Path) -> None:
        pq.write_table(pa.table({
            "item_id": vocabulary.ids_of(row_I), "neighbors": pa.ListArray.from_arrays(offsets, pa.array(ids_L)),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(lists.score_L))}), folder / NEIGHBORS)

    return publish(Path(channel_folder) / str(watermark_ms), write, {
        "watermark_ms": int(watermark_ms), "items": len(row_I), "neighbors": len(ids_L), **manifest},
        replace=replace)


def read_neighbors(folder: Path, vocabulary: Vocabulary) -> NeighborLists:
    """A published snapshot, checked against its manifest. Items that the vocabulary lacks are left out.

    Raises:
        WatchtowerError: if the snapshot is damaged.
        InputError: if the file has other columns or types, or lists that are none: nulls, scores that are not finite or
            of another number, an item twice.
    """
    verify(folder, NEIGHBORS)
    table = _read_lists(Path(folder) / NEIGHBORS)
    source = f"{folder}/{NEIGHBORS}"
    if set(table.column_names) != {"item_id", "neighbors", "scores"}:
        raise InputError(f"{source}: has columns {', '.join(table.column_names)}; item_id, neighbors and scores are "
                         "needed")
    id_I = whole_column(table, "item_id", pa.int64(), source).to_numpy()
    neighbors, scores = (whole_column(table, name, pa.list_(pa.field("element", kind)), source)
                         for name, kind in (("neighbors", pa.int64()), ("scores", pa.float32())))
    length_I = neighbors.value_lengths().to_numpy(zero_copy_only=False)
    if not np.array_equal(length_I, scores.value_lengths().to_numpy(zero_copy_only=False)):
        raise InputError(f"{source}: an item has another number of scores than of neighbors")
    if neighbors.flatten().null_count or scores.flatten().null_count:
        raise InputError(f"{source}: a list holds a null")
    if len(np.unique(id_I)) < len(id_I):
        raise InputError(f"{source}: an item stands there twice")
    if not np.isfinite(scores.flatten().to_numpy()).all():
        raise InputError(f"{source}: a score is not finite")
    row_I = vocabulary.rows_of(id_I)
    neighbor_L = vocabulary.rows_of(neighbors.flatten().to_numpy())
    item_L = np.repeat(row_I, length_I)
    keep_L = (item_L > 0) & (neighbor_L > 0)
    score_L = scores.flatten().to_numpy().astype(np.float32, copy=False)
    order = np.argsort(item_L[keep_L], kind="stable")
    counts_N = np.bincount(item_L[keep_L], minlength=vocabulary.rows)
    lists = NeighborLists(np.concatenate([[0], np.cumsum(counts_N)]).astype(np.int64),
                          neighbor_L[keep_L][order].astype(np.int32), score_L[keep_L][order])
    if _row_of_twice(lists.offset_N1, lists.neighbor_L, np.zeros(vocabulary.rows, np.int32)) > 0:
        raise InputError(f"{source}: a list holds an item twice")  # compiled code makes room for each of them once
    return lists


@numba.njit(cache=True, nogil=True)
def _row_of_twice(offset_N1, neighbor_L, seen_N):  # pragma: no cover - compiled
    """The first row whose list holds an item twice, 0 where there is none. seen_N: int32 zeros."""
    for row in range(1, len(offset_N1) - 1):
        for place in range(offset_N1[row], offset_N1[row + 1]):
            if seen_N[neighbor_L[place]] == row:
                return row
            seen_N[neighbor_L[place]] = row
    return 0


def _read_lists(path: Path) -> pa.Table:
    try:
        return read_parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error, "remove the snapshot and run watchtower channels again") from error


class ChannelSnapshots:
    """The published snapshots of a run's channels, and which of them a request may see.

    A state is one combination of snapshots, one of each channel: requests of the same state see the same lists.

    Raises:
        InputError: a channel without any snapshot.
    """

    def __init__(self, folder: Path, config: ChannelsConfig, vocabulary: Vocabulary,
                 names: Sequence[str] | None = None):
        self.names = list(names or config.names)
        self.rollback_ms = round(config.rollback_min * MINUTE_MS)
        self._before_first, self._vocabulary = config.before_first, vocabulary
        self.snapshots: list[list[Snapshot]] = [list_snapshots(Path(folder) / name) for name in self.names]
        for name, found in zip(self.names, self.snapshots, strict=True):
            if not found:
                raise InputError(f"channels.names has {name}, but {Path(folder) / name} holds no snapshot; run "
                                 "watchtower channels first")
        self._load = lru_cache(maxsize=16 * len(self.names))(self._read)
        # Threads that want the same lists wait for the one that reads them.
        self._loading = [threading.Lock() for _ in self.names]
        self._made: dict[tuple[int, ...], np.ndarray] = {}
        self._asked: dict[tuple[int, ...], int] = {}
        self._making = threading.Lock()

    def numbers_at(self, time_ms_R: np.ndarray) -> np.ndarray:
        """int32 (R, C): the number of the snapshot that each request sees of each channel; NONE before the first.

        Raises:
            InputError: a request before the first snapshot, where channels.before_first is error.
        """
        seen_ms_R = np.asarray(time_ms_R, np.int64) - self.rollback_ms
        columns = []
        for name, found in zip(self.names, self.snapshots, strict=True):
            watermark_S = np.array([snapshot.watermark_ms for snapshot in found], np.int64)
            number_R = np.searchsorted(watermark_S, seen_ms_R, side="right") - 1
            if self._before_first == "error" and (number_R < 0).any():
                early = int(seen_ms_R[number_R < 0].min()) + self.rollback_ms
                raise InputError(f"a request at {early} ms comes before the first snapshot of channel {name} "
                                 f"(watermark {watermark_S[0]} ms, in use {self.rollback_ms // MINUTE_MS} min later). "
                                 "Build an earlier snapshot, move the requests, or set channels.before_first=empty")
            columns.append(number_R)
        return np.stack(columns, axis=1).astype(np.int32)

    def states(self, time_ms_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(int32 (S, C) distinct combinations of snapshot numbers, int64 (R,) the state of each request)."""
        number_RC = self.numbers_at(time_ms_R)
        if not len(number_RC):
            return number_RC, np.zeros(0, np.int64)
        state_SC, state_R = np.unique(number_RC, axis=0, return_inverse=True)
        return state_SC, state_R.ravel()

    def lists(self, channel: int, number: int) -> NeighborLists:
        """The lists of a channel's snapshot; empty ones for NONE. The last few are kept."""
        if number == NONE:
            return NeighborLists.empty(self._vocabulary.rows)
        with self._loading[channel]:
            return self._load(channel, number)

    def lists_of(self, state_C: np.ndarray) -> list[NeighborLists]:
        """`lists` of every channel of a state; those that are still to be read are read at once."""
        with ThreadPoolExecutor(len(state_C)) as pool:
            return list(pool.map(self.lists, range(len(state_C)), map(int, state_C)))

    def kept(self, state_C: np.ndarray, make: Callable[[], np.ndarray], asked: int, whole: int) -> np.ndarray | None:
        """What `make` finds out of all lists of a state, always the same thing. None as long as it would cost more than
        it spares: until as many rows were asked for, over all calls, as there are. The latest used are kept, of
        KEPT_BYTES in all (one at least).

        Args:
            asked: rows that the caller wants now. whole: rows of `make`.
        """
        key = tuple(int(number) for number in state_C)
        with self._making:
            if key not in self._made:
                self._asked[key] = self._asked.get(key, 0) + asked
                if self._asked[key] < whole:
                    return None
                self._made[key] = make()
            found = self._made[key] = self._made.pop(key)  # the last one is the latest used
            while len(self._made) > 1 and sum(one.nbytes for one in self._made.values()) > KEPT_BYTES:
                oldest = next(iter(self._made))
                del self._made[oldest], self._asked[oldest]
            return found

    def watermark_ms(self, channel: int, number: int) -> int | None:
        return None if number == NONE else self.snapshots[channel][number].watermark_ms

    def _read(self, channel: int, number: int) -> NeighborLists:
        return read_neighbors(self.snapshots[channel][number].path, self._vocabulary)
