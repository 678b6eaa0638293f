"""Sequence shards that channel tests draw at random: small, with ties, repeats, sessions and null watch times."""

from dataclasses import dataclass, replace

import numpy as np

from trainer.catalogue import NEVER_SEEN_MS
from trainer.logs import NULL_SESSION
from trainer.sequences import SequenceShard, shard_of
from trainer.vocabulary import Vocabulary


@dataclass(frozen=True)
class Rows:
    """Rows of a log: arrays of one length."""

    user_id: np.ndarray
    item_row: np.ndarray
    time_ms: np.ndarray
    watch_s: np.ndarray
    effective: np.ndarray
    session: np.ndarray

    def where(self, keep) -> "Rows":
        return Rows(*(values[keep] for values in vars(self).values()))

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(*(np.concatenate([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def rows_of(*views, watch_s=30.0) -> Rows:
    """Effective views given as (user, item row, time) or (user, item row, time, session)."""
    wide = [(*view, 0)[:4] for view in views]
    user, item, time, session = (np.array([view[k] for view in wide], np.int64) for k in range(4))
    return Rows(user, item.astype(np.int32), time, np.full(len(wide), watch_s, np.float32), np.ones(len(wide), bool),
                session)


def random_rows(seed: int, rows: int, *, users=6, items=9, span=40) -> Rows:
    """About every fifth view is ineffective, of the unknown item, without watch time or without session."""
    rng = np.random.default_rng(seed)
    watch_s = rng.exponential(20, rows).astype(np.float32)
    watch_s[rng.random(rows) < 0.2] = np.nan
    session = rng.integers(0, 3, rows)
    session[rng.random(rows) < 0.2] = NULL_SESSION
    user, item, time = (rng.integers(0, limit, rows) for limit in (users, items, span))
    return Rows(user, item.astype(np.int32), time, watch_s, rng.random(rows) < 0.8, session)


class MadeStore:
    """What channels read of trainer.sequences.SequenceStore, from rows."""

    def __init__(self, rows: Rows, items: int, shards: int = 2, session: bool = True):
        self.shards, self.vocabulary = shards, Vocabulary(np.arange(1, items + 1) * 10)
        self.manifest = {"session": "session_id" if session else None}
        self._rows, self._session = rows, session

    def open(self, number: int) -> SequenceShard:
        rows = self._rows.where(shard_of(self._rows.user_id, self.shards) == number)
        rows = rows.where(np.lexsort((rows.item_row, rows.time_ms, rows.user_id)))
        user_id_U, offset_U, length_U = np.unique(rows.user_id, return_index=True, return_counts=True)
        nothing_E = np.zeros(len(rows.user_id), bool)
        return SequenceShard(user_id_U, offset_U.astype(np.int64), length_U.astype(np.int32), rows.item_row,
                             rows.time_ms, rows.watch_s, np.full(len(nothing_E), np.nan, np.float32), rows.effective,
                             nothing_E, nothing_E, rows.session if self._session else None, {})


def seen(catalogue, rows: Rows):
    """A made catalogue with durations, content flags and the time each item was first seen in these rows."""
    total = len(catalogue.item_id_N)
    first_seen_ms_N = np.full(total, NEVER_SEEN_MS)
    np.minimum.at(first_seen_ms_N, rows.item_row, rows.time_ms)
    catalogue = replace(catalogue)
    catalogue.first_seen_ms_N = first_seen_ms_N
    catalogue.duration_s_N = np.exp(np.random.default_rng(0).normal(3, 1, total)).astype(np.float32)
    catalogue.has_content_N = np.arange(total) > 0
    return catalogue
