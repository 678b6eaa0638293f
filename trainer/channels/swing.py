"""Swing: items that pairs of otherwise different users both watched (Yang et al. 2020, arXiv:2010.05525).

    s(i, j) = sum over unordered pairs u < v of users who hold both i and j of
              w_u w_v / (alpha + |I_u and I_v|),     w_u = 1 / sqrt(|I_u|)

I_u are u's distinct effective items in the window before the watermark; the intersection counts i and j. The weights
w_u are those of the published implementation (they damp busy users); the paper's formula alone is w_u = 1.

Per item i: for each of its users u, longest I_u first, mark I_u; run through I_v of every later user v of i, which
gives |I_u and I_v| and the items in it at once; add the pair's weight to them. A pair costs the shorter of the two
sets, and users who hold i alone are left out, as they add nothing. The other way (count the users that share items with
u, then spread the pair weights) touches every pair once, but needs all s(i, j) at once: memory N x N, or passes.

Two caps bound the cost, both counted in the manifest. A user with more than `max_items_per_user` items keeps the
latest viewed ones, which are then I_u. For the list of an item with more than `max_users_per_item` users (of two items
or more), those of the lowest seeded hash of (item, user) are paired: a uniform sample, the same whatever the order of
users, so s(i, .) keeps its expected order though not its scale, and s(i, j) may differ from s(j, i).

Shape suffixes: U = users, N = vocabulary rows, P = pairs.
"""

from __future__ import annotations

import numba
import numpy as np

from configs.schema import ChannelsConfig, SwingConfig
from trainer.channels.blocks import Pairs, append_best, over_blocks
from trainer.channels.channel import Built, Given
from trainer.co_views import CoViews
from trainer.neighbors import top_neighbors
from trainer.sequences import user_hash


class Swing:
    name = "swing"

    def section(self, config: ChannelsConfig) -> SwingConfig:
        return config.swing

    def lacks(self, store) -> None:
        return None

    def sources(self, watermark_ms, given) -> dict:
        return {}

    def build(self, views: CoViews, given: Given) -> Built:
        config, top = given.config.swing, given.config.top
        (item_P, neighbor_P, score_P), facts = swing(views, config, top, given.threads)
        return Built(top_neighbors(item_P, neighbor_P, score_P, views.rows, top), facts)


def swing(views: CoViews, config: SwingConfig, top: int, threads: int = 1) -> tuple[Pairs, dict[str, int]]:
    """The best `top` neighbours of every item, and how many users and items were cut to their caps.

    Returns:
        (item int32 (P,), neighbor int32 (P,), s float64 (P,)); {"users_capped", "items_sampled"}.
    """
    items_U = views.items_U
    kept_U = items_U if config.max_items_per_user is None else np.minimum(items_U, config.max_items_per_user)
    by_length_U = np.argsort(-kept_U, kind="stable")
    offset_N1, user_P = _users_by_item(views.pair_offset_U1, kept_U, by_length_U, views.item_P, views.rows)
    offset_N1, user_P, sampled = _sampled(offset_N1, user_P, views.user_id_U, config)
    weight_U = 1.0 / np.sqrt(np.maximum(kept_U, 1))

    def block(begin: int, end: int) -> Pairs:
        return _swing_block(begin, end, offset_N1, user_P, views.pair_offset_U1, kept_U, views.item_P, weight_U,
                            config.alpha, top)

    pairs = over_blocks(np.diff(offset_N1) ** 2.0 * kept_U.sum() / max(len(kept_U), 1), threads, block)
    return pairs, {"users_capped": int((kept_U < items_U).sum()), "items_sampled": sampled}


def _sampled(offset_N1: np.ndarray, user_P: np.ndarray, user_id_U: np.ndarray, config: SwingConfig
             ) -> tuple[np.ndarray, np.ndarray, int]:
    """The CSR with at most config.max_users_per_item users of an item, in their order, and how many items had more."""
    cap, users_N = config.max_users_per_item, np.diff(offset_N1)
    over = np.flatnonzero(users_N > cap) if cap is not None else np.zeros(0, np.int64)
    keep_P = np.ones(len(user_P), bool)
    for item in over:
        begin, end = offset_N1[item], offset_N1[item + 1]
        hashed = user_hash(user_id_U[user_P[begin:end]], config.seed) ^ user_hash(np.array([item]), config.seed + 1)
        keep_P[begin:end] = False
        # Hashed once more: the order of a xor alone would be much the same for every item.
        keep_P[begin + np.argpartition(user_hash(hashed.view(np.int64), config.seed), cap)[:cap]] = True
    if len(over):
        offset_N1 = np.concatenate([[0], np.cumsum(keep_P)])[offset_N1].astype(np.int64)
        user_P = user_P[keep_P]
    return offset_N1, user_P, len(over)


@numba.njit(cache=True, nogil=True)
def _users_by_item(pair_offset_U1, kept_U, by_length_U, item_P, rows):  # pragma: no cover - compiled
    """CSR of the users of each item who keep it among two items or more, those of most items first."""
    offset_N1 = np.zeros(rows + 1, np.int64)
    for u in range(len(kept_U)):
        if kept_U[u] > 1:
            for p in range(pair_offset_U1[u], pair_offset_U1[u] + kept_U[u]):
                offset_N1[item_P[p] + 1] += 1
    for n in range(rows):
        offset_N1[n + 1] += offset_N1[n]
    next_N = offset_N1[:rows].copy()
    user_P = np.zeros(offset_N1[rows], np.int32)
    for u in by_length_U:
        if kept_U[u] > 1:
            for p in range(pair_offset_U1[u], pair_offset_U1[u] + kept_U[u]):
                user_P[next_N[item_P[p]]] = u
                next_N[item_P[p]] += 1
    return offset_N1, user_P


@numba.njit(cache=True, nogil=True)
def _swing_block(begin, end, user_offset_N1, user_P, pair_offset_U1, kept_U, item_P, weight_U, alpha, top
                 ):  # pragma: no cover - compiled
    rows = len(user_offset_N1) - 1
    room = (end - begin) * min(top, rows)
    out_item_P, out_neighbor_P = np.zeros(room, np.int32), np.zeros(room, np.int32)
    out_score_P = np.zeros(room, np.float64)
    sum_N, is_touched_N, row_T = np.zeros(rows), np.zeros(rows, np.bool_), np.zeros(rows, np.int32)
    marked_by_N = np.full(rows, -1, np.int64)
    common = np.zeros(rows, np.int32)
    used, mark = 0, 0
    for item in range(max(begin, 1), end):
        users = user_P[user_offset_N1[item]:user_offset_N1[item + 1]]
        count = 0
        for a in range(len(users) - 1):
            u = users[a]
            mark += 1
            for p in range(pair_offset_U1[u], pair_offset_U1[u] + kept_U[u]):
                marked_by_N[item_P[p]] = mark
            for b in range(a + 1, len(users)):
                v = users[b]
                found = 0
                for p in range(pair_offset_U1[v], pair_offset_U1[v] + kept_U[v]):
                    common[found] = item_P[p]
                    found += marked_by_N[item_P[p]] == mark
                if found < 2:
                    continue
                weight = weight_U[u] * weight_U[v] / (alpha + found)
                for k in range(found):
                    other = common[k]
                    if not is_touched_N[other]:
                        is_touched_N[other] = True
                        row_T[count] = other
                        count += 1
                    sum_N[other] += weight
        others = 0
        for t in range(count):
            is_touched_N[row_T[t]] = False
            if row_T[t] != item:
                row_T[others] = row_T[t]
                others += 1
        sum_N[item] = 0.0
        used = append_best(item, row_T, others, sum_N, top, out_item_P, out_neighbor_P, out_score_P, used)
    return out_item_P[:used], out_neighbor_P[:used], out_score_P[:used]
