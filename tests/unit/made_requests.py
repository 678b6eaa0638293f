"""Shards of user sequences and published channels that tests draw at random: small, with ties, repeats, unknown watch
times, unknown items and empty lists."""

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configs.schema import Config
from trainer import item_statistics
from trainer.item_statistics import ItemStatistics, StatisticsSnapshots
from trainer.neighbors import ChannelSnapshots, publish_neighbors, top_neighbors
from trainer.sequences import SequenceShard
from trainer.triggers import RequestRule
from trainer.vocabulary import Vocabulary

T0 = 1_650_000_000_000
MINUTE_MS = 60_000
SPAN_MIN = 400  # the rows' times, minutes
ITEMS = 14
WATERMARKS_MIN = {"swing": (0, 100, 250), "content": (0, 250), "embedding": (50, 300)}
CONFIG = Config.model_validate({
    "channels": {"names": list(WATERMARKS_MIN), "before_first": "empty", "rollback_min": 20},
    "replay": {"null_watch_s": 1.5}, "routing": {"test_users": {"share": 0.3, "seed": 0}}})


def made_shard(seed, users=4, longest=14, *, items=ITEMS, times=40, unknown=0.2, effective=0.7, user_ids=None
               ) -> SequenceShard:
    """Rows at few distinct times, so that many are tied; row 0, the unknown item, among them."""
    rng = np.random.default_rng(seed)
    length_U = rng.integers(0, longest + 1, users)
    total = int(length_U.sum())
    user_E = np.repeat(np.arange(users), length_U)
    time_E = T0 + rng.integers(0, times, total) * (SPAN_MIN * MINUTE_MS // times)
    row_E = rng.integers(0, items + 1, total)
    order = np.lexsort((row_E, time_E, user_E))
    watch_E = rng.exponential(10, total).round(int(rng.integers(0, 5))).astype(np.float32)
    watch_E[rng.random(total) < unknown] = np.nan
    return SequenceShard(
        user_id_U=np.arange(users, dtype=np.int64) * 7 + 3 if user_ids is None else user_ids,
        offset_U=(np.cumsum(length_U) - length_U).astype(np.int64), length_U=length_U.astype(np.int32),
        item_row_E=row_E[order].astype(np.int32), timestamp_ms_E=time_E[order], watch_time_s_E=watch_E,
        duration_s_E=np.full(total, np.nan, np.float32), is_effective_E=rng.random(total) < effective,
        is_target_E=rng.random(total) < 0.4, is_ordinal_E=rng.random(total) < 0.2, session_E=None,
        feedback={"like": rng.integers(-1, 2, total).astype(np.int8)})


def made_rule(*, every=1, per_user=3, triggers=6, side="train", cuts=None, future_min_watch_s=None, min_future=1,
              min_triggers=1, effective_only=False) -> RequestRule:
    begin, end = T0 + 60 * MINUTE_MS, T0 + (SPAN_MIN - 50) * MINUTE_MS
    return RequestRule(side, cuts, begin, end, T0 + SPAN_MIN * MINUTE_MS, triggers, effective_only, min_triggers,
                       min_future, every, per_user, future_min_watch_s)


def made_lists(rng, rows, top=6):
    """Lists of some of the items; others have none."""
    pairs = rng.integers(1, rows, (int(rng.integers(0, 12 * rows)), 2))
    pairs = np.unique(pairs, axis=0)
    pairs = pairs[~np.isin(pairs[:, 0], rng.integers(1, rows, rows // 4))]
    return top_neighbors(pairs[:, 0], pairs[:, 1], rng.choice([0.25, 0.5, 1.0, 3.0], len(pairs)), rows, top)


def made_statistics(rng, rows, watermark_ms) -> ItemStatistics:
    views_N = rng.integers(0, 9, rows) * (np.arange(rows) > 0)
    known_N = views_N // 2
    return ItemStatistics(views_N, views_N - known_N // 2, known_N, known_N * rng.integers(1, 9000, rows) / 1000,
                          np.where(views_N > 0, watermark_ms - rng.integers(1, 10**8, rows), np.iinfo(np.int64).max),
                          np.stack([views_N // 4, views_N // 3]))


def publish_made(folder: Path, seed, vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(seed)
    for name, minutes in WATERMARKS_MIN.items():
        for minute in minutes:
            publish_neighbors(folder / name, T0 + minute * MINUTE_MS, made_lists(rng, vocabulary.rows), vocabulary, {})
    for minute in sorted({m for minutes in WATERMARKS_MIN.values() for m in minutes}):
        at = T0 + minute * MINUTE_MS
        item_statistics.publish(folder, at, made_statistics(rng, vocabulary.rows, at), vocabulary, {})


@lru_cache(maxsize=8)
def made_channels(folder: Path, seed) -> SimpleNamespace:
    """Published once per folder and seed: `snapshots`, `statistics` and the `vocabulary`."""
    vocabulary = Vocabulary(np.arange(1, ITEMS + 1) * 10)
    place = Path(folder) / f"channels-{seed}"
    publish_made(place, seed, vocabulary)
    return SimpleNamespace(folder=place, vocabulary=vocabulary,
                           snapshots=ChannelSnapshots(place, CONFIG.channels, vocabulary),
                           statistics=StatisticsSnapshots(place, CONFIG.channels, vocabulary))


def lists_of_request(snapshots, time_ms, row):
    """(channel, its list of the row) as the request at this time sees it, looked up the plain way."""
    found = []
    for channel, published in enumerate(snapshots.snapshots):
        visible = [n for n, one in enumerate(published) if one.watermark_ms <= time_ms - snapshots.rollback_ms]
        found.append(snapshots.lists(channel, visible[-1]).of(row).tolist() if visible else [])
    return found


def empty_requests(requests):
    return requests.take(np.zeros(len(requests), bool))
