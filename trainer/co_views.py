"""What item-to-item channels count: the effective views of all users before a watermark, by user and by item.

A snapshot with watermark t sees the effective views with time in [t - window, t), of every user: test users' views
count too, as a production channel sees every history before its watermark. No view at or after t is ever read into it.
Views of items that the vocabulary lacks (row 0) are left out, and so are users without a view.

Memory is linear in the window's views: 12 bytes a view (20 with sessions), up to 8 for the distinct (user, item) pairs
both ways, 24 bytes a user and 8 an item. Given a folder, all of it lies in memory-mapped .npy files instead, which
other processes open; shards are read one at a time either way.

Shape suffixes: U = users with views, V = views, P = distinct (user, item) pairs, N = vocabulary rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np

from trainer.sequences import SequenceShard, SequenceStore

HOUR_MS = 3_600_000
_META = "co_views.json"
_ARRAYS = ("user_id_U", "offset_U1", "item_V", "time_ms_V", "session_V", "pair_offset_U1", "item_P", "user_offset_N1",
           "user_P")


@dataclass(frozen=True)
class CoViews:
    """Effective views in [since_ms, watermark_ms), user by user in time order.

    User u has views offset_U1[u]:offset_U1[u + 1] of item_V (int32 rows), time_ms_V (int64) and session_V (int64,
    NULL_SESSION none; None where the logs have no sessions). Its distinct items, the latest viewed first, are
    item_P[pair_offset_U1[u]:pair_offset_U1[u + 1]] (int32); the users of item n, rising, are
    user_P[user_offset_N1[n]:user_offset_N1[n + 1]] (int32). since_ms is None where the window is unbounded.
    """

    watermark_ms: int
    since_ms: int | None
    user_id_U: np.ndarray
    offset_U1: np.ndarray
    item_V: np.ndarray
    time_ms_V: np.ndarray
    session_V: np.ndarray | None
    pair_offset_U1: np.ndarray
    item_P: np.ndarray
    user_offset_N1: np.ndarray
    user_P: np.ndarray

    @property
    def rows(self) -> int:
        """N."""
        return len(self.user_offset_N1) - 1

    @property
    def users_N(self) -> np.ndarray:
        """int64 (N,): distinct users of each item."""
        return np.diff(self.user_offset_N1)

    @property
    def items_U(self) -> np.ndarray:
        """int64 (U,): distinct items of each user."""
        return np.diff(self.pair_offset_U1)

    @property
    def views_N(self) -> np.ndarray:
        """int64 (N,): views of each item, repeats counted."""
        return np.bincount(self.item_V, minlength=self.rows)

    @classmethod
    def build(cls, store: SequenceStore, watermark_ms: int, window_h: float | None, folder: Path | None = None
              ) -> CoViews:
        """Read them out of the sequences, shard by shard.

        Args:
            window_h: hours before the watermark that count; None is all.
            folder: where the arrays lie as memory-mapped files; None keeps them in memory. `open` maps them again.
        """
        since_ms = None if window_h is None else watermark_ms - round(window_h * HOUR_MS)
        with_session, counts = False, []
        for number in range(store.shards):
            shard = store.open(number)
            with_session = shard.session_E is not None
            counts.append(_per_user(shard, _counted(shard, since_ms, watermark_ms)))
        users, views = (sum(int(f(c)) for c in counts) for f in (np.count_nonzero, np.sum))
        user_id_U, offset_U1 = _array(folder, "user_id_U", users, np.int64), _array(folder, "offset_U1", users + 1,
                                                                                    np.int64)
        item_V, time_V = _array(folder, "item_V", views, np.int32), _array(folder, "time_ms_V", views, np.int64)
        session_V = _array(folder, "session_V", views, np.int64) if with_session else None
        user, view = 0, 0
        for number, count in enumerate(counts):
            shard = store.open(number)
            keep_E = _counted(shard, since_ms, watermark_ms)
            present, total = np.flatnonzero(count), int(count.sum())
            user_id_U[user:user + len(present)] = shard.user_id_U[present]
            offset_U1[user + 1:user + 1 + len(present)] = view + np.cumsum(count[present])
            item_V[view:view + total] = shard.item_row_E[keep_E]
            time_V[view:view + total] = shard.timestamp_ms_E[keep_E]
            if session_V is not None:
                session_V[view:view + total] = shard.session_E[keep_E]
            user, view = user + len(present), view + total
        return cls._of(user_id_U, offset_U1, item_V, time_V, session_V, store.vocabulary.rows, since_ms, watermark_ms,
                       folder)

    @classmethod
    def of_views(cls, user_id_V: np.ndarray, item_V: np.ndarray, time_ms_V: np.ndarray, rows: int, watermark_ms: int,
                 session_V: np.ndarray | None = None) -> CoViews:
        """Of plain arrays of views in any order; those at or after the watermark, or of row 0, are left out."""
        keep_V = (np.asarray(time_ms_V) < watermark_ms) & (np.asarray(item_V) > 0)
        order = np.flatnonzero(keep_V)[np.lexsort((np.asarray(item_V)[keep_V], np.asarray(time_ms_V)[keep_V],
                                                   np.asarray(user_id_V)[keep_V]))]
        user_id_U, count_U = np.unique(np.asarray(user_id_V, np.int64)[order], return_counts=True)
        return cls._of(user_id_U, np.concatenate([[0], np.cumsum(count_U)]).astype(np.int64),
                       np.asarray(item_V, np.int32)[order], np.asarray(time_ms_V, np.int64)[order],
                       None if session_V is None else np.asarray(session_V, np.int64)[order], rows, None, watermark_ms,
                       None)

    @classmethod
    def open(cls, folder: Path) -> CoViews:
        """Map what `build` left in a folder."""
        meta = json.loads((Path(folder) / _META).read_text())
        found = {name: _mapped(Path(folder) / f"{name}.npy", *meta["arrays"][name]) if name in meta["arrays"] else None
                 for name in _ARRAYS}
        return cls(meta["watermark_ms"], meta["since_ms"], **found)

    def between(self, begin_ms: int | None, end_ms: int) -> CoViews:
        """The views in [begin_ms, end_ms) alone, in memory."""
        keep_V = self.time_ms_V < end_ms
        if begin_ms is not None:
            keep_V &= self.time_ms_V >= begin_ms
        kept = np.concatenate([[0], np.cumsum(keep_V)])
        count_U = np.diff(kept[self.offset_U1])
        present = np.flatnonzero(count_U)
        return self._of(self.user_id_U[present], np.concatenate([[0], np.cumsum(count_U[present])]).astype(np.int64),
                        self.item_V[keep_V], self.time_ms_V[keep_V],
                        None if self.session_V is None else self.session_V[keep_V], self.rows,
                        self.since_ms if begin_ms is None else begin_ms, end_ms, None)

    @classmethod
    def _of(cls, user_id_U, offset_U1, item_V, time_ms_V, session_V, rows, since_ms, watermark_ms, folder) -> CoViews:
        pair_offset_U1 = _array(folder, "pair_offset_U1", len(offset_U1), np.int64)
        user_offset_N1 = _array(folder, "user_offset_N1", rows + 1, np.int64)
        _count_distinct(offset_U1, item_V, pair_offset_U1, user_offset_N1)
        item_P = _array(folder, "item_P", int(pair_offset_U1[-1]), np.int32)
        user_P = _array(folder, "user_P", int(pair_offset_U1[-1]), np.int32)
        _distinct(offset_U1, item_V, pair_offset_U1, user_offset_N1, item_P, user_P)
        found = cls(watermark_ms, since_ms, user_id_U, offset_U1, item_V, time_ms_V, session_V, pair_offset_U1, item_P,
                    user_offset_N1, user_P)
        if folder is not None:
            for name in _ARRAYS:
                if isinstance(array := getattr(found, name), np.memmap):
                    array.flush()
            arrays = {name: [getattr(found, name).dtype.str, len(getattr(found, name))] for name in _ARRAYS
                      if getattr(found, name) is not None}
            (Path(folder) / _META).write_text(json.dumps({"watermark_ms": watermark_ms, "since_ms": since_ms,
                                                          "arrays": arrays}))
        return found


def _counted(shard: SequenceShard, since_ms: int | None, watermark_ms: int) -> np.ndarray:
    """bool (E,): the shard's effective views of known items in the window."""
    keep_E = shard.is_effective_E & (shard.timestamp_ms_E < watermark_ms) & (shard.item_row_E > 0)
    return keep_E if since_ms is None else keep_E & (shard.timestamp_ms_E >= since_ms)


def _per_user(shard: SequenceShard, keep_E: np.ndarray) -> np.ndarray:
    """int32: kept events of each user of the shard."""
    kept = np.concatenate([[0], np.cumsum(keep_E)])
    return (kept[shard.offset_U + shard.length_U] - kept[shard.offset_U]).astype(np.int32)


def _array(folder: Path | None, name: str, length: int, dtype) -> np.ndarray:
    """Zeros, in memory or in a mapped file; a file cannot be mapped where it has no element."""
    if folder is None or length == 0:
        return np.zeros(length, dtype)
    return np.lib.format.open_memmap(Path(folder) / f"{name}.npy", mode="w+", dtype=dtype, shape=(length,))


def _mapped(path: Path, dtype: str, length: int) -> np.ndarray:
    # Mapped copy-on-write: nobody writes, but a kernel would be compiled once more for read-only arrays.
    return np.lib.format.open_memmap(path, mode="c") if length else np.zeros(0, np.dtype(dtype))


@numba.njit(cache=True, nogil=True)
def _count_distinct(offset_U1, item_V, pair_offset_U1, user_offset_N1):  # pragma: no cover - compiled
    """Fill the offsets of both directions."""
    seen_by_N = np.full(len(user_offset_N1) - 1, -1, np.int64)
    for u in range(len(offset_U1) - 1):
        found = 0
        for p in range(offset_U1[u], offset_U1[u + 1]):
            item = item_V[p]
            if seen_by_N[item] != u:
                seen_by_N[item] = u
                found += 1
                user_offset_N1[item + 1] += 1
        pair_offset_U1[u + 1] = pair_offset_U1[u] + found
    for n in range(len(user_offset_N1) - 1):
        user_offset_N1[n + 1] += user_offset_N1[n]


@numba.njit(cache=True, nogil=True)
def _distinct(offset_U1, item_V, pair_offset_U1, user_offset_N1, item_P, user_P):  # pragma: no cover - compiled
    """Fill each user's distinct items, latest first, and each item's users, rising."""
    rows = len(user_offset_N1) - 1
    seen_by_N = np.full(rows, -1, np.int64)
    next_N = user_offset_N1[:rows].copy()
    for u in range(len(offset_U1) - 1):
        at = pair_offset_U1[u]
        for p in range(offset_U1[u + 1] - 1, offset_U1[u] - 1, -1):
            item = item_V[p]
            if seen_by_N[item] != u:
                seen_by_N[item] = u
                item_P[at] = item
                at += 1
                user_P[next_N[item]] = u
                next_N[item] += 1
