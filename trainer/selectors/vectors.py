"""Item vectors for the selectors that measure how alike items are: random signs summed over an item's neighbours.

    v(i) = s(i) + sum over channels c and places l of R_c(i) of s(j_cl) / sqrt(1 + l),   scaled to length 1

with s a fixed vector of hashed signs for each item: a random projection of the item's row in the graph of neighbour
lists. Items with common neighbours, or that are each other's neighbours, point the same way. The lists are those of the
snapshots that a request sees, so nothing at or after it can leak; no catalogue and no training is needed.

Shape suffixes: I = items, D = vector width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from trainer.item_value import splitmix64
from trainer.neighbors import NeighborLists

WIDTH = 128


def item_vectors(row_I: np.ndarray, lists: Sequence[NeighborLists]) -> np.ndarray:
    """float32 (I, D) vectors of length 1 of these rows."""
    vector_ID = np.zeros((len(row_I), WIDTH), np.float32)
    row_I = np.asarray(row_I, np.int64)
    _add_signs(row_I, np.arange(len(row_I) + 1), row_I.astype(np.int32), vector_ID)
    for channel in lists:
        _add_signs(row_I, channel.offset_N1, channel.neighbor_L, vector_ID, True)
    return vector_ID / np.linalg.norm(vector_ID, axis=1, keepdims=True).clip(1e-9)


@numba.njit(cache=True, nogil=True)
def _add_signs(row_I, offset_N1, neighbor_L, vector_ID, by_row=False):  # pragma: no cover - compiled
    for i in range(len(row_I)):
        begin, end = (offset_N1[row_I[i]], offset_N1[row_I[i] + 1]) if by_row else (offset_N1[i], offset_N1[i + 1])
        for place in range(begin, end):
            weight = np.float32(1.0 / np.sqrt(1.0 + (place - begin)))
            for word in range(vector_ID.shape[1] // 64):
                bits = splitmix64(np.uint64(neighbor_L[place]) * np.uint64(64) + np.uint64(word))
                for bit in range(64):
                    sign = (bits >> np.uint64(bit)) & np.uint64(1)
                    vector_ID[i, word * 64 + bit] += weight if sign else -weight
