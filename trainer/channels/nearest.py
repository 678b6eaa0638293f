"""Nearest neighbours among item vectors, through the project's index.

Shape suffixes: I = items with a vector, D = vector width, N = vocabulary rows.
"""

from __future__ import annotations

import numba
import numpy as np

from trainer.neighbors import NeighborLists

EXACT_UP_TO = 200_000  # items; beyond it inverted lists, whose cost grows with I sqrt(I) instead of I^2
BATCH = 4096
SPARE = 2  # beyond the best and the item itself, so that few are looked up again
_SCORE_STEP = 1e-6  # scores closer than this count as equal: the last bits of a product depend on how it was blocked


def nearest_neighbors(vectors_ID: np.ndarray, row_I: np.ndarray, rows: int, top: int, threads: int
                      ) -> NeighborLists:
    """Each item's `top` nearest others by cosine, where that is positive; of equal scores the lower row first.

    The order among equals is ours and not the index's: scores are rounded to six decimals, and where the last of those
    looked up (`top` and a few more) is no worse than the last that is kept, twice as many are looked up.

    Args:
        vectors_ID: float32 (I, D); an item whose vector is zero has no neighbours.
        row_I: int32 vocabulary rows, distinct.
        rows: N.
    """
    from embeddings.index import IndexSpec, ItemIndex

    norm_I = np.linalg.norm(vectors_ID, axis=1)
    usable = norm_I > 0
    vectors_ID, row_I = vectors_ID[usable].astype(np.float32), np.asarray(row_I)[usable]
    if len(row_I) < 2:
        return NeighborLists.empty(rows)
    vectors_ID = vectors_ID / norm_I[usable, None].astype(np.float32)
    lists = round(4 * len(row_I) ** 0.5)
    spec = (IndexSpec(device="cpu", threads=threads) if len(row_I) <= EXACT_UP_TO else
            IndexSpec(f"IVF{lists},Flat", {"nprobe": max(1, lists // 32)}, "cpu", threads))
    index = ItemIndex.build(vectors_ID, row_I.astype(np.int64), spec)
    most = min(2 * top + 1, len(row_I))
    neighbor_IT, score_IT = np.zeros((len(row_I), top), np.int32), np.zeros((len(row_I), top), np.float32)
    length_I, asked = np.zeros(len(row_I), np.int32), np.arange(len(row_I))
    for count in dict.fromkeys((min(top + 1 + SPARE, most), most)):
        short_I = np.zeros(len(row_I), bool)
        for first in range(0, len(asked), BATCH):
            at_B = asked[first:first + BATCH]
            score_BK, row_BK = index.search(vectors_ID[at_B], count)
            _keep_best(at_B, row_I, row_BK, score_BK, top, count < most, neighbor_IT, score_IT, length_I, short_I)
        asked = np.flatnonzero(short_I)
    return _lists(row_I, neighbor_IT, score_IT, length_I, rows)


def _lists(row_I: np.ndarray, neighbor_IT: np.ndarray, score_IT: np.ndarray, length_I: np.ndarray, rows: int
           ) -> NeighborLists:
    """Lists of all rows, from the items' in any order, of which the first length_I count."""
    order_I = np.argsort(row_I)
    length_N = np.zeros(rows, np.int64)
    length_N[row_I] = length_I
    kept_IT = np.arange(neighbor_IT.shape[1]) < length_I[order_I, None]
    return NeighborLists(np.concatenate([[0], np.cumsum(length_N)]), neighbor_IT[order_I][kept_IT],
                         score_IT[order_I][kept_IT])


@numba.njit(cache=True, nogil=True)
def _keep_best(at_B, row_I, row_BK, score_BK, top, may_be_more, neighbor_IT, score_IT, length_I, short_I
               ):  # pragma: no cover - compiled
    """Sort what the index found for items at_B by rounded score and row, and keep the best. short_I: where the index
    may know of more that belong there."""
    kept = np.zeros(row_BK.shape[1], np.int32)
    scores = np.zeros(row_BK.shape[1], np.float32)
    for b in range(len(at_B)):
        i, count, found, last = at_B[b], 0, 0, np.float32(np.inf)
        for k in range(row_BK.shape[1]):
            row = row_BK[b, k]
            if row < 0:
                break
            found += 1
            last = np.float32(np.rint(np.float64(score_BK[b, k]) / _SCORE_STEP) * _SCORE_STEP)
            if row == row_I[i] or not 0 < last < np.inf:
                continue
            at = count
            while at > 0 and (scores[at - 1] < last or (scores[at - 1] == last and kept[at - 1] > row)):
                scores[at], kept[at] = scores[at - 1], kept[at - 1]
                at -= 1
            scores[at], kept[at] = last, row
            count += 1
        length_I[i] = min(count, top)
        short_I[i] = (may_be_more and found == row_BK.shape[1] and last > 0
                      and (count < top or scores[top - 1] <= last))
        for t in range(length_I[i]):
            neighbor_IT[i, t], score_IT[i, t] = kept[t], scores[t]
