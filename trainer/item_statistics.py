"""What a server knows of every item at a watermark: how often and how long it was watched by then.

    channels/item-statistics/<watermark_ms>/{statistics.parquet, manifest.json}

statistics.parquet has one row per item with a row of the logs before the watermark: item_id, views, effective_views,
known_views (of known watch time), watch_s (sum of these, seconds), first_seen_ms, and effective_views_6h and
effective_views_24h, those of the last hours before the watermark (rows whose times only order are left out). All rows
before the watermark count, without a window, of all users; none at or after it. They stand at the channels' watermarks,
so that a request sees statistics as old as its lists.

Shape suffixes: N = vocabulary rows with the unknown row 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError
from configs.schema import ChannelsConfig
from embeddings import snapshots
from embeddings.snapshots import list_snapshots, verify
from embeddings.untrusted import damaged, read_parquet, whole_column
from trainer.catalogue import NEVER_SEEN_MS
from trainer.neighbors import MINUTE_MS, NONE, ChannelSnapshots
from trainer.sequences import HOUR_MS, SequenceStore
from trainer.vocabulary import Vocabulary

NAME = "item-statistics"
STATISTICS = "statistics.parquet"
PRIOR_VIEWS = 10.0
RECENT_H = (6, 24)
_COLUMNS = ("item_id", "views", "effective_views", "known_views", "watch_s", "first_seen_ms",
            *(f"effective_views_{hours}h" for hours in RECENT_H))


@dataclass(frozen=True)
class ItemStatistics:
    """Counts by vocabulary row, of the rows before a watermark; zeros for row 0 and for items not seen by then.

    views_N, effective_views_N, known_views_N: int64. watch_s_N: float64, sum of known watch times, whole milliseconds.
    first_seen_ms_N: int64, NEVER_SEEN_MS where the item was not seen. recent_views_HN: int64 (len(RECENT_H), N),
    effective views of the last hours before the watermark.
    """

    views_N: np.ndarray
    effective_views_N: np.ndarray
    known_views_N: np.ndarray
    watch_s_N: np.ndarray
    first_seen_ms_N: np.ndarray
    recent_views_HN: np.ndarray

    @cached_property
    def mean_watch_s_N(self) -> np.ndarray:
        """float64 (N,): mean known watch time, shrunk by ten views to the mean of all; 0 where none is known at all.

            (watch_s + 10 * overall) / (known_views + 10)
        """
        known = self.known_views_N.sum()
        overall = self.watch_s_N.sum() / known if known else 0.0
        return (self.watch_s_N + PRIOR_VIEWS * overall) / (self.known_views_N + PRIOR_VIEWS)

    @cached_property
    def profile_NF(self) -> np.ndarray:
        """float32 (N, 9): log views, and ranks among all items, which stay alike while counts grow; ranks of the last
        hours (of all time, where the last hours have no clock), and how large a part of an item's views these are."""
        effective, views = self.effective_views_N.astype(np.float64), self.views_N.astype(np.float64)
        recent_HN = self.recent_views_HN.astype(np.float64)

        def rank(values: np.ndarray) -> np.ndarray:
            return np.searchsorted(np.sort(values), values, side="right") / max(len(values), 1)

        return np.stack([np.log1p(effective), np.log1p(views), rank(effective), rank(views), effective / (views + 5),
                         *(rank(recent_N if recent_N.any() else effective) for recent_N in recent_HN),
                         *(recent_N / (effective + 5) for recent_N in recent_HN)], axis=1).astype(np.float32)

    @classmethod
    def empty(cls, rows: int) -> ItemStatistics:
        """Before anything was seen."""
        return cls(*(np.zeros(rows, np.int64) for _ in range(3)), np.zeros(rows), np.full(rows, NEVER_SEEN_MS),
                   np.zeros((len(RECENT_H), rows), np.int64))

    @classmethod
    def read(cls, folder: Path, vocabulary: Vocabulary) -> ItemStatistics:
        """A published snapshot, checked against its manifest. Items that the vocabulary lacks are left out.

        Raises:
            WatchtowerError: if the snapshot is damaged.
            InputError: if the file has other columns.
        """
        verify(folder, STATISTICS)
        source = str(Path(folder) / STATISTICS)
        try:
            table = read_parquet(source)
        except (pa.ArrowException, OSError) as error:
            raise damaged(source, error, "remove the snapshot and run watchtower channels again") from error
        if set(table.column_names) != set(_COLUMNS):
            raise InputError(f"{folder}/{STATISTICS}: has columns {', '.join(table.column_names)}; "
                             f"{', '.join(_COLUMNS)} are needed")
        row = vocabulary.rows_of(whole_column(table, "item_id", pa.int64(), source).to_numpy())
        found = cls.empty(vocabulary.rows)
        for name, values_N in (("views", found.views_N), ("effective_views", found.effective_views_N),
                               ("known_views", found.known_views_N), ("watch_s", found.watch_s_N),
                               ("first_seen_ms", found.first_seen_ms_N),
                               *((f"effective_views_{hours}h", recent_N)
                                 for hours, recent_N in zip(RECENT_H, found.recent_views_HN, strict=True))):
            kind = pa.from_numpy_dtype(values_N.dtype)
            values_N[row[row > 0]] = whole_column(table, name, kind, source).to_numpy()[row > 0]
        return found


def count_items(store: SequenceStore, watermark_ms: int) -> ItemStatistics:
    """Count the rows before a watermark, shard by shard."""
    rows = store.vocabulary.rows
    found, watch_ms_N = ItemStatistics.empty(rows), np.zeros(rows, np.int64)
    for number in range(store.shards):
        shard = store.open(number)
        before = np.flatnonzero((shard.timestamp_ms_E < watermark_ms) & (shard.item_row_E > 0))
        item, watch_s = shard.item_row_E[before], shard.watch_time_s_E[before]
        known = ~np.isnan(watch_s)
        found.views_N[:] += np.bincount(item, minlength=rows)
        found.effective_views_N[:] += np.bincount(item[shard.is_effective_E[before]], minlength=rows)
        clocked = before[shard.is_effective_E[before] & ~shard.is_ordinal_E[before]]
        for hours, recent_N in zip(RECENT_H, found.recent_views_HN, strict=True):
            latest = clocked[shard.timestamp_ms_E[clocked] >= watermark_ms - hours * HOUR_MS]
            recent_N += np.bincount(shard.item_row_E[latest], minlength=rows)
        found.known_views_N[:] += np.bincount(item[known], minlength=rows)
        # Whole milliseconds add up exactly in a double, below 2^53: the order of users and shards changes nothing.
        watch_ms = np.round(1000 * watch_s[known].astype(np.float64))
        watch_ms_N += np.bincount(item[known], weights=watch_ms, minlength=rows).astype(np.int64)
        np.minimum.at(found.first_seen_ms_N, item, shard.timestamp_ms_E[before])
    found.watch_s_N[:] = watch_ms_N / 1000
    return found


def publish(channels_folder: Path, watermark_ms: int, statistics: ItemStatistics, vocabulary: Vocabulary,
            manifest: Mapping[str, Any], *, replace: bool = False) -> Path:
    """Publish under <channels_folder>/item-statistics/<watermark_ms>, whole or not at all; rows and watermark are added
    to the manifest.

    Returns:
        Its folder.
    """
    row_I = np.flatnonzero(statistics.views_N)
    row_I = row_I[row_I > 0]

    def write(folder: Path) -> None:
        pq.write_table(pa.table({
            "item_id": vocabulary.ids_of(row_I), "views": statistics.views_N[row_I],
            "effective_views": statistics.effective_views_N[row_I], "known_views": statistics.known_views_N[row_I],
            "watch_s": statistics.watch_s_N[row_I], "first_seen_ms": statistics.first_seen_ms_N[row_I],
            **{f"effective_views_{hours}h": recent_N[row_I]
               for hours, recent_N in zip(RECENT_H, statistics.recent_views_HN, strict=True)}}),
            folder / STATISTICS)

    return snapshots.publish(Path(channels_folder) / NAME / str(watermark_ms), write, {
        "watermark_ms": int(watermark_ms), "items": len(row_I), "views": int(statistics.views_N.sum()), **manifest},
        replace=replace)


class StatisticsSnapshots:
    """The published statistics of a run, addressed as the channels' snapshots are.

    Args:
        folder: the run's channels folder.

    Raises:
        InputError: there are none.
    """

    def __init__(self, folder: Path, config: ChannelsConfig, vocabulary: Vocabulary):
        self.rollback_ms = round(config.rollback_min * MINUTE_MS)
        self.snapshots = list_snapshots(Path(folder) / NAME)
        if not self.snapshots:
            raise InputError(f"{Path(folder) / NAME} holds no snapshot; run watchtower channels first")
        self._before_first, self._vocabulary = config.before_first, vocabulary
        self._watermark_S = np.array([s.watermark_ms for s in self.snapshots], np.int64)
        self._load = lru_cache(maxsize=4)(lambda number: ItemStatistics.read(self.snapshots[number].path, vocabulary))

    def numbers_at(self, time_ms_R: np.ndarray) -> np.ndarray:
        """int64 (R,): the number of the snapshot that each request sees; NONE before the first.

        Raises:
            InputError: a request before the first snapshot, where channels.before_first is error.
        """
        seen_ms_R = np.asarray(time_ms_R, np.int64) - self.rollback_ms
        number_R = np.searchsorted(self._watermark_S, seen_ms_R, side="right") - 1
        if self._before_first == "error" and (number_R < 0).any():
            raise InputError(f"a request at {int(seen_ms_R.min()) + self.rollback_ms} ms comes before the first item "
                             f"statistics (watermark {self._watermark_S[0]} ms); build earlier ones, move the requests "
                             "later, or set channels.before_first=empty")
        return number_R

    def number(self, number: int) -> ItemStatistics:
        """One snapshot by its number; empty for NONE. The last few are kept."""
        return ItemStatistics.empty(self._vocabulary.rows) if number == NONE else self._load(number)

    def at(self, watermark_ms: int | None) -> ItemStatistics:
        """The newest statistics with a watermark up to the given one; empty where there are none, or for None."""
        if watermark_ms is None:
            return self.number(NONE)
        return self.number(int(np.searchsorted(self._watermark_S, watermark_ms, side="right")) - 1)

    def of_state(self, channels: ChannelSnapshots, state_C: np.ndarray) -> ItemStatistics:
        """At the latest watermark of a state's snapshots (ChannelSnapshots.states); empty where it has none."""
        watermarks = [channels.watermark_ms(channel, int(number)) for channel, number in enumerate(state_C)]
        return self.at(max((w for w in watermarks if w is not None), default=None))
