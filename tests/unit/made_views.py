"""Target views and a catalogue that tests draw at random: small, with ties, unknown watch times and empty users."""

from dataclasses import dataclass, field

import numpy as np

from trainer.windows import TargetViews

T0 = 1_650_000_000_000
HOUR_MS = 3_600_000


def made_views(lengths, seed=0, *, items=12, ids=None, trainable=None, span_h=200, unknown=0.2, ordinal=0.2):
    """Views of users with these many each, in time order; about every third time equals the one before."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, dtype=np.int64)
    total = int(lengths.sum())
    times = [np.sort(rng.choice(np.arange(max(2, 2 * n)) * (span_h * HOUR_MS // max(2, 2 * n)), n)) for n in lengths]
    watch_E = rng.exponential(30, total).astype(np.float32)
    watch_E[rng.random(total) < unknown] = np.nan
    return TargetViews(
        user_id_U=np.arange(len(lengths), dtype=np.int64) * 7 + 3 if ids is None else np.asarray(ids, dtype=np.int64),
        offset_U=np.cumsum(lengths) - lengths, length_U=lengths,
        item_row_E=rng.integers(0, items, total), watch_s_E=watch_E,
        timestamp_ms_E=np.concatenate([np.zeros(0, np.int64), *times]).astype(np.int64) + T0,
        ordinal_E=rng.random(total) < ordinal,
        trainable_U=np.ones(len(lengths), bool) if trainable is None else np.asarray(trainable, dtype=bool))


def users_only(views, wanted_U):
    """The views of some users, as a shard of their own."""
    wanted_U = np.asarray(wanted_U, dtype=bool)
    keep_E = wanted_U[views.owner_E()] if len(views.user_id_U) else np.zeros(0, bool)
    length_U = views.length_U[wanted_U]
    return TargetViews(
        views.user_id_U[wanted_U], np.cumsum(length_U) - length_U, length_U, views.item_row_E[keep_E],
        views.watch_s_E[keep_E], views.timestamp_ms_E[keep_E], views.ordinal_E[keep_E], views.trainable_U[wanted_U])


@dataclass
class MadeCatalogue:
    """The arrays of trainer.catalogue.Catalogue that batches and towers read."""

    item_id_N: np.ndarray
    author_row_N: np.ndarray
    tag_offsets_N1: np.ndarray
    tag_rows: np.ndarray
    duration_bucket_N: np.ndarray
    content_NC: np.ndarray | None
    categories: dict = field(default_factory=dict)
    author_rows: int = 5
    tag_rows_count: int = 9
    category_rows: dict = field(default_factory=dict)
    duration_buckets: int = 33


def made_catalogue(rows=12, seed=0, *, content=True, categories=("genre",)):
    """Row 0 is the unknown item; items have 0 to 3 tags."""
    rng = np.random.default_rng(seed)
    tags_N = rng.integers(0, 4, rows)
    tags_N[0] = 0
    content_NC = rng.normal(size=(rows, 4)).astype(np.float32)
    content_NC[0] = 0
    return MadeCatalogue(
        item_id_N=np.concatenate([[0], np.sort(rng.choice(10_000, rows - 1, replace=False)) + 1]),
        author_row_N=rng.integers(0, 5, rows).astype(np.int32),
        tag_offsets_N1=np.concatenate([[0], np.cumsum(tags_N)]).astype(np.int32),
        tag_rows=rng.integers(1, 9, tags_N.sum()).astype(np.int32),
        duration_bucket_N=rng.integers(0, 33, rows).astype(np.int32), content_NC=content_NC if content else None,
        categories={name: rng.integers(0, 4, rows).astype(np.int32) for name in categories},
        category_rows={name: 4 for name in categories})
