"""Nearest neighbours among item vectors, through the project's index.

Shape suffixes: I = items with a vector, D = vector width, N = vocabulary rows.
"""

from __future__ import annotations

import numpy as np

from trainer.neighbors import NeighborLists, top_neighbors

EXACT_UP_TO = 200_000  # items; beyond it inverted lists, whose cost grows with I sqrt(I) instead of I^2
BATCH = 4096
_SCORE_STEP = 1e-6  # scores closer than this count as equal: the last bits of a product depend on how it was blocked


def nearest_neighbors(vectors_ID: np.ndarray, row_I: np.ndarray, rows: int, top: int, threads: int, *,
                      normalize: bool = True) -> NeighborLists:
    """Each item's `top` nearest others with a positive score; of equal scores the lower row first.

    Twice as many as `top` are looked up, so that the order among equals is ours and not the index's. Scores are rounded
    to six decimals.

    Args:
        vectors_ID: float32 (I, D); an item whose vector is zero has no neighbours.
        row_I: int32 vocabulary rows, distinct.
        rows: N.
        normalize: cosine; False takes inner products of the vectors as they are.
    """
    from embeddings.index import IndexSpec, ItemIndex

    norm_I = np.linalg.norm(vectors_ID, axis=1)
    usable = norm_I > 0
    vectors_ID, row_I = vectors_ID[usable].astype(np.float32), np.asarray(row_I)[usable]
    if len(row_I) < 2:
        return NeighborLists.empty(rows)
    if normalize:
        vectors_ID = vectors_ID / norm_I[usable, None].astype(np.float32)
    lists = round(4 * len(row_I) ** 0.5)
    spec = (IndexSpec(device="cpu", threads=threads) if len(row_I) <= EXACT_UP_TO else
            IndexSpec(f"IVF{lists},Flat", {"nprobe": max(1, lists // 32)}, "cpu", threads))
    index = ItemIndex.build(vectors_ID, row_I.astype(np.int64), spec)
    item, neighbor, score = [], [], []
    for first in range(0, len(row_I), BATCH):
        score_BK, row_BK = index.search(vectors_ID[first:first + BATCH], min(2 * top + 1, len(row_I)))
        item_BK = np.broadcast_to(row_I[first:first + BATCH, None], row_BK.shape)
        found = (row_BK >= 0) & (row_BK != item_BK)
        rounded_B = np.round(score_BK[found].astype(np.float64) / _SCORE_STEP) * _SCORE_STEP
        part = top_neighbors(item_BK[found].astype(np.int32), row_BK[found].astype(np.int32), rounded_B, rows, top)
        item.append(np.repeat(np.arange(rows, dtype=np.int32), part.length_N))
        neighbor.append(part.neighbor_L)
        score.append(part.score_L)
    return top_neighbors(np.concatenate(item), np.concatenate(neighbor), np.concatenate(score), rows, top)
