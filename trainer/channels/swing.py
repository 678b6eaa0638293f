"""Swing: items that pairs of otherwise different users both watched (Yang et al. 2020, arXiv:2010.05525).

    s(i, j) = sum over unordered pairs u < v of users who hold both i and j of
              w_u w_v / (alpha + |I_u and I_v|),     w_u = 1 / sqrt(|I_u|)

I_u are u's distinct effective items in the window before the watermark; the intersection counts i and j. The weights
w_u are those of the published implementation (they damp busy users); the paper's formula alone is w_u = 1.

Per item i, everything happens among its own users: their items are turned round once, into the users of i who hold j,
for every j. The users of i, longest I_u first, then take turns: the later users v in the lists of u's items are
counted, which gives |I_u and I_v|, and the same lists walked again add the pair's weight to s(i, j). So a pair costs
the items that its users share, not those that they hold; a pair that shares i alone is never touched, and users who
hold i alone are left out, as they add nothing. Memory is that of the items of i's users.

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
from trainer.channels.blocks import Pairs, append_best_of, over_blocks
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
        return _swing_block(begin, end, offset_N1, user_P.view(np.uint32), views.pair_offset_U1, kept_U,
                            views.item_P.view(np.uint32), weight_U, config.alpha, top)

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
    most_users, most_held, most_kept = 0, 0, 0
    for item in range(max(begin, 1), end):
        held = 0
        for u in user_P[user_offset_N1[item]:user_offset_N1[item + 1]]:
            held += kept_U[u]
            most_kept = max(most_kept, kept_U[u])
        most_users = max(most_users, user_offset_N1[item + 1] - user_offset_N1[item])
        most_held = max(most_held, held)
    seen_N = np.zeros(rows, np.int32)
    # The other items that two of the item's users hold or more, counted 1, 2, ..: item o has the users
    # user_S[first_O[o]:last_O[o]], places in `users`, rising. User a holds other_S[begin_A1[a]:begin_A1[a + 1]].
    # Unsigned, so that no index can count from the end and none is looked at for it.
    row_T = np.zeros(min(rows, most_held) + 1, np.uint32)
    first_O, last_O = np.zeros(len(row_T), np.uint32), np.zeros(len(row_T), np.uint32)
    user_S, other_S = np.zeros(most_held, np.uint32), np.zeros(most_held + 1, np.uint32)
    begin_A1, shares_A = np.zeros(most_users + 1, np.uint32), np.zeros(most_users + 1, np.uint32)
    common_A, weight_A, of_A = np.zeros(most_users, np.int32), np.zeros(most_users), np.zeros(most_users)
    sum_O = np.zeros(len(row_T))
    # Of one user the lists that go on behind them.
    other_L, first_L, last_L = (np.zeros(most_kept + 1, np.uint32), np.zeros(most_kept + 1, np.uint32),
                                np.zeros(most_kept + 1, np.uint32))
    used = 0
    for item in range(max(begin, 1), end):
        users = user_P[user_offset_N1[item]:user_offset_N1[item + 1]]
        touched = np.uint64(0)
        for u in users:
            for p in range(np.uint64(pair_offset_U1[u]), np.uint64(pair_offset_U1[u] + kept_U[u])):
                row = item_P[p]
                row_T[touched] = row
                touched += np.uint64(seen_N[row] == 0)
                seen_N[row] += 1
        seen_N[item] = 1
        others, places = 0, 0
        for t in range(touched):
            row = row_T[t]
            if seen_N[row] == 1:
                seen_N[row] = 0
                continue
            first_O[others + 1] = last_O[others + 1] = places
            places += seen_N[row]
            row_T[others] = row
            others += 1
            seen_N[row] = others
        held = np.uint64(0)
        for a in range(len(users)):
            begin_A1[a] = held
            u = users[a]
            for p in range(np.uint64(pair_offset_U1[u]), np.uint64(pair_offset_U1[u] + kept_U[u])):
                other = seen_N[item_P[p]]
                other_S[held] = other
                held += np.uint64(other > 0)
            for s in range(np.uint64(begin_A1[a]), held):
                other = other_S[s]
                user_S[last_O[other]] = a
                last_O[other] += np.uint32(1)
        begin_A1[len(users)] = held
        for t in range(others):
            seen_N[row_T[t]] = 0
        for a in range(len(users)):
            of_A[a] = weight_U[users[a]]
        for a in range(len(users) - 1):
            walk, lists = np.int64(0), np.uint64(0)
            for s in range(begin_A1[a], begin_A1[a + 1]):
                other = other_S[s]
                first, last = first_O[other] + np.uint32(1), last_O[other]  # past this user
                first_O[other] = first
                other_L[lists], first_L[lists], last_L[lists] = other - np.uint32(1), first, last
                lists += np.uint64(first < last)
                walk += last - first
            if walk > len(users) - a:  # most of the later users share something: all of them get a weight
                for at in range(lists):
                    for k in range(first_L[at], last_L[at]):
                        common_A[user_S[k]] += 1
                for b in range(a + 1, len(users)):
                    weight_A[b] = of_A[a] * of_A[b] / (alpha + (common_A[b] + 1))
                    common_A[b] = 0
            else:
                found = 0
                for at in range(lists):
                    for k in range(first_L[at], last_L[at]):
                        b = user_S[k]
                        shares_A[found] = b
                        found += common_A[b] == 0
                        common_A[b] += 1
                for k in range(found):
                    b = shares_A[k]
                    weight_A[b] = of_A[a] * of_A[b] / (alpha + (common_A[b] + 1))
                    common_A[b] = 0
            for at in range(lists):
                k, last = np.uint64(first_L[at]), np.uint64(last_L[at])
                total, more = 0.0, 0.0  # two sums, as an addition waits for the one before it
                while k + np.uint64(4) <= last:
                    total += weight_A[user_S[k]] + weight_A[user_S[k + np.uint64(1)]]
                    more += weight_A[user_S[k + np.uint64(2)]] + weight_A[user_S[k + np.uint64(3)]]
                    k += np.uint64(4)
                while k < last:
                    total += weight_A[user_S[k]]
                    k += np.uint64(1)
                sum_O[other_L[at]] += total + more
        used = append_best_of(item, row_T, sum_O, others, top, out_item_P, out_neighbor_P, out_score_P, used)
    return out_item_P[:used], out_neighbor_P[:used], out_score_P[:used]
