"""The frame of the counting kernels: items in blocks over a thread pool, and the best pairs of each item.

A kernel counts one item's neighbours into a dense row of N floats and hands on the best of them; so memory is N floats
a thread and `top` pairs an item, whatever the number of pairs. An item's sums are made in one fixed order by one
thread: neither blocks nor threads change a bit of the result.

Shape suffixes: N = vocabulary rows, P = pairs, V = views in order, G = groups of them (users, or sessions).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

BLOCKS_PER_THREAD = 16
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # item int32 (P,), neighbor int32 (P,), score float64 (P,)


def over_blocks(cost_N: np.ndarray, threads: int, block: Callable[[int, int], Pairs]) -> Pairs:
    """Call `block(begin, end)` for ranges of items of about equal cost, in threads, and join what they give."""
    rows = len(cost_N)
    cumulated = np.cumsum(cost_N + 1.0)
    cuts = np.searchsorted(cumulated, np.linspace(0, cumulated[-1], threads * BLOCKS_PER_THREAD + 1)[1:-1])
    edges = np.unique(np.concatenate([[0], cuts, [rows]]))
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(block, edges[:-1].tolist(), edges[1:].tolist()))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


@numba.njit(cache=True, nogil=True)
def append_best(item, row_T, count, sum_N, top, item_P, neighbor_P, score_P, used):  # pragma: no cover - compiled
    """Append an item's best neighbours behind `used`, clear its sums, and return the new `used`.

    The best are those of the highest float32 score, of equal ones the lower row. row_T[:count] are the rows with sums.
    top: how many; 0 appends all, unordered.
    """
    begin = used
    for t in range(count):
        row = row_T[t]
        used = _kept(item, row, sum_N[row], top, item_P, neighbor_P, score_P, begin, used)
        sum_N[row] = 0.0
    return used


@numba.njit(cache=True, nogil=True)
def append_best_of(item, row_T, sum_T, count, top, item_P, neighbor_P, score_P, used):  # pragma: no cover - compiled
    """`append_best` of sums that stand beside each other: row_T[t] has sum_T[t]."""
    begin = used
    for t in range(count):
        used = _kept(item, row_T[t], sum_T[t], top, item_P, neighbor_P, score_P, begin, used)
        sum_T[t] = 0.0
    return used


@numba.njit(cache=True, nogil=True)
def _kept(item, row, score, top, item_P, neighbor_P, score_P, begin, used):  # pragma: no cover - compiled
    """One more row in its place behind `begin`, if it is among the best; the new `used`."""
    if top == 0:
        item_P[used], neighbor_P[used], score_P[used] = item, row, score
        return used + 1
    rounded = np.float32(score)
    if used - begin == top:
        last = np.float32(score_P[used - 1])
        if rounded < last or (rounded == last and row > neighbor_P[used - 1]):
            return used
        at = used - 1
    else:
        at = used
        used += 1
    while at > begin:
        before = np.float32(score_P[at - 1])
        if before > rounded or (before == rounded and neighbor_P[at - 1] < row):
            break
        neighbor_P[at], score_P[at] = neighbor_P[at - 1], score_P[at - 1]
        at -= 1
    item_P[used - 1] = item
    neighbor_P[at], score_P[at] = row, score
    return used


def near_pairs(offset_G1: np.ndarray, item_V: np.ndarray, rows: int, window: int, *, top: int = 0, threads: int = 1,
               weight_V: np.ndarray | None = None, later_only: bool = False, by_gap: bool = False) -> Pairs:
    """Item pairs that stand within `window` places of each other in a group, with their weights added up.

        score(i, j) = sum over places p of i and q of j in one group, 0 < |q - p| <= window, i != j, of
                      weight(later of p and q) / (|q - p| if by_gap else 1)

    Args:
        offset_G1: int64 (G + 1,), the groups' places in item_V (int32 rows).
        top: neighbours of an item that are kept, the best; 0 is all.
        weight_V: float64 (V,); None is 1.
        later_only: count only pairs where j comes after i.
    """
    by_item_V = np.argsort(item_V, kind="stable")
    first_N1 = np.concatenate([[0], np.cumsum(np.bincount(item_V, minlength=rows))]).astype(np.int64)
    reach_N = np.diff(first_N1) * window * (1 if later_only else 2)
    room_N = np.minimum(reach_N, top if top else rows)
    weight_V = np.ones(0) if weight_V is None else np.asarray(weight_V, np.float64)

    def block(begin: int, end: int) -> Pairs:
        return _near_block(begin, end, int(room_N[begin:end].sum()), first_N1, by_item_V, offset_G1, item_V, rows,
                           window, top, weight_V, later_only, by_gap)

    return over_blocks(reach_N, threads, block)


@numba.njit(cache=True, nogil=True)
def _near_block(begin, end, room, first_N1, by_item_V, offset_G1, item_V, rows, window, top, weight_V, later_only,
                by_gap):  # pragma: no cover - compiled
    item_P, neighbor_P, score_P = np.zeros(room, np.int32), np.zeros(room, np.int32), np.zeros(room, np.float64)
    sum_N, is_touched_N, row_T = np.zeros(rows), np.zeros(rows, np.bool_), np.zeros(rows, np.int32)
    used = 0
    for item in range(max(begin, 1), end):
        count = 0
        for k in range(first_N1[item], first_N1[item + 1]):
            p = by_item_V[k]
            group = np.searchsorted(offset_G1, p, side="right") - 1
            low = p + 1 if later_only else max(offset_G1[group], p - window)
            for q in range(low, min(offset_G1[group + 1], p + window + 1)):
                other = item_V[q]
                if other == item or other == 0:
                    continue
                weight = weight_V[max(p, q)] if len(weight_V) else 1.0
                if by_gap:
                    weight /= abs(q - p)
                if not is_touched_N[other]:
                    is_touched_N[other] = True
                    row_T[count] = other
                    count += 1
                sum_N[other] += weight
        for t in range(count):
            is_touched_N[row_T[t]] = False
        used = append_best(item, row_T, count, sum_N, top, item_P, neighbor_P, score_P, used)
    return item_P[:used], neighbor_P[:used], score_P[:used]
