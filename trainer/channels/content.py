"""Nearest neighbours by content (the role of MMU): the catalogue's content vectors, or features hashed from it.

Where the catalogue has content vectors, an item without one has no list. Where it has none, an item's vector is a sum
of signed hashed features (Weinberger et al. 2009): each value f lies at one of `hashed_dim` places h(f) with sign s(f),

    x = author_weight * idf(author) e(author) + sum over tags of idf(tag) e(tag)
        + duration_weight * ((1 - r) e(bin) + r e(bin + 1)),        e(f) = s(f) at h(f),   idf(f) = log(n / n_f)

with n items in all and n_f with the value, and the duration between two of eight log-spaced points, so that like
durations are alike across an edge. A value that a single item has brings nobody nearer and is left out.

Only items first seen before the watermark count, as seeds, as neighbours and in the idf. The catalogue itself has no
time: its features are those of its file, and a duration that it lacks is the longest of all logs.

Shape suffixes: N = vocabulary rows, I = items with a vector, F = feature values of items, D = width.
"""

from __future__ import annotations

import numpy as np

from configs.schema import ChannelsConfig, ContentChannelConfig
from trainer.catalogue import LONGEST_DURATION_S, Catalogue
from trainer.channels.channel import Built, Given
from trainer.channels.nearest import nearest_neighbors
from trainer.co_views import CoViews
from trainer.sequences import user_hash

DURATION_POINTS = 8
HASH_SEED = 0x434F4E54
_AUTHOR, _TAG, _DURATION = 1, 2, 3  # kinds of value; equal rows of different kinds are different features


class Content:
    name = "content"

    def section(self, config: ChannelsConfig) -> ContentChannelConfig:
        return config.content

    def lacks(self, store) -> str | None:
        catalogue = store.catalogue
        if catalogue.has_content_N.any() or catalogue.author_row_N.any() or len(catalogue.tag_rows):
            return None
        return "the catalogue has no content vectors, authors or tags (data.items)"

    def sources(self, watermark_ms, given) -> dict:
        return {}

    def build(self, views: CoViews, given: Given) -> Built:
        catalogue = given.catalogue
        seen_N = catalogue.first_seen_ms_N < views.watermark_ms
        seen_N[0] = False
        if catalogue.content_NC is not None and catalogue.has_content_N.any():
            row_I = np.flatnonzero(seen_N & catalogue.has_content_N)
            vectors_ID, kind = catalogue.content_NC[row_I], "content_vector"
        else:
            row_I, vectors_ID = hashed_features(catalogue, seen_N, given.config.content)
            kind = "hashed"
        lists = nearest_neighbors(vectors_ID, row_I, views.rows, given.config.top, given.threads)
        return Built(lists, {"vectors": len(row_I), "width": vectors_ID.shape[1], "source": kind,
                             "items_seen": int(seen_N.sum())})


def hashed_features(catalogue: Catalogue, seen_N: np.ndarray, config: ContentChannelConfig
                    ) -> tuple[np.ndarray, np.ndarray]:
    """(int64 (I,) the seen rows, float32 (I, D) their features; zeros where an item has none)."""
    row_I = np.flatnonzero(seen_N)
    at_N = np.cumsum(seen_N) - 1
    vectors_ID = np.zeros((len(row_I), config.hashed_dim), np.float32)

    def add(kind: int, item_F: np.ndarray, value_F: np.ndarray, weight_F: np.ndarray) -> None:
        hash_F = user_hash(value_F.astype(np.int64) * 4 + kind, HASH_SEED)
        sign_F = np.where(hash_F >> np.uint64(63), -1.0, 1.0)
        np.add.at(vectors_ID, (at_N[item_F], (hash_F % np.uint64(config.hashed_dim)).astype(np.int64)),
                  (sign_F * weight_F).astype(np.float32))

    author_I = catalogue.author_row_N[row_I]
    _add_by_idf(add, _AUTHOR, row_I[author_I > 0], author_I[author_I > 0], len(row_I), config.author_weight)
    item_F = np.repeat(np.arange(len(seen_N)), np.diff(catalogue.tag_offsets_N1))
    tag_F = catalogue.tag_rows[catalogue.tag_offsets_N1[0]:catalogue.tag_offsets_N1[-1]]
    _add_by_idf(add, _TAG, item_F[seen_N[item_F]], tag_F[seen_N[item_F]], len(row_I), 1.0)
    duration_I = catalogue.duration_s_N[row_I].astype(np.float64)
    known = duration_I > 0
    place = np.log1p(np.minimum(duration_I[known], LONGEST_DURATION_S)) / np.log1p(LONGEST_DURATION_S)
    point = np.floor(place * (DURATION_POINTS - 1))
    rest = place * (DURATION_POINTS - 1) - point
    add(_DURATION, row_I[known], point, config.duration_weight * (1 - rest))
    add(_DURATION, row_I[known], point + 1, config.duration_weight * rest)
    return row_I, vectors_ID


def _add_by_idf(add, kind: int, item_F: np.ndarray, value_F: np.ndarray, items: int, weight: float) -> None:
    count = np.bincount(value_F) if len(value_F) else np.zeros(1, np.int64)
    shared_F = count[value_F] > 1
    add(kind, item_F[shared_F], value_F[shared_F], weight * np.log(items / count[value_F[shared_F]]))
