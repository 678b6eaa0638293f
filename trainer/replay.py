"""Value attribution (VAM): which trigger's list would have brought back what the user watched next.

A request at t has the future F_W, its next W views that count. A trigger x of channel c retrieves R_c(x, t), from the
snapshot that the request may see (CAPTS, arXiv:2602.12564):

    (3)  r_c(x)   = sum of e(v), v in R_c(x,t) and F_W          forward value; e(v) is the watch time of the view v
    (4)  i_c      = min(r_c / s_c, k_c)                         intensity
    (5)  y_c      = 1[r_c >= tau_c]                             label
    (10) U_c      = items of R_c(x,t) that no other channel returns for x
    (11) rho_c    = |U_c| / (|R_c| + eps)                       uniqueness, a fact of the snapshots alone

Watch time is summed as whole milliseconds, int64, so the order of a sum is of no account. Every view of the future
counts, a repeated item each time; one without a watch time counts null_watch_s.

The counted views of a shard stand in one array, so a future (and a past) is a range of it. For each user, list and
snapshot the views whose item is in the list are found once, through a hash table of the user's views; each request and
each window is then two binary searches in their places and one difference of prefix sums. Scratch is as long as the
longest user's views.

Shape suffixes: E = events of a shard, V = its counted views, R = requests, T = triggers of all of them, C = channels,
K = ranges of views, W = windows, H = hits, G = triggers of a user with the requests taken together, N = vocabulary
rows, L = neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from trainer.neighbors import ChannelSnapshots, NeighborLists
from trainer.sequences import SequenceShard
from trainer.triggers import TriggerRequests

EPSILON = 1e-6  # eps of Eq. 11
ROWS_AT_ONCE = 16_384  # items whose lists of all channels are compared at once


# -------------------------------------------------------------------------------------------------- views that count

@dataclass(frozen=True)
class CountedViews:
    """The views of a shard that count, by user and time.

    event_V: int64 events. row_V: int32 vocabulary rows. watch_ms_V: int64. before_E1: int64 (E + 1,), how many counted
    views lie before each event, so events a to b hold the views before_E1[a] to before_E1[b].
    """

    event_V: np.ndarray
    row_V: np.ndarray
    watch_ms_V: np.ndarray
    before_E1: np.ndarray


def watch_ms(watch_s: np.ndarray, null_watch_s: float) -> np.ndarray:
    """int64 milliseconds, round(1000 w) of float64; a NaN counts null_watch_s."""
    watch = np.asarray(watch_s, np.float64)
    return np.rint(1000 * np.where(np.isnan(watch), null_watch_s, watch)).astype(np.int64)


def counted_views(shard: SequenceShard, is_counted_E: np.ndarray, null_watch_s: float) -> CountedViews:
    """The views of a mask over the shard's events."""
    event_V = np.flatnonzero(is_counted_E)
    before_E1 = np.zeros(len(is_counted_E) + 1, np.int64)
    np.cumsum(is_counted_E, out=before_E1[1:])
    return CountedViews(event_V, shard.item_row_E[event_V], watch_ms(shard.watch_time_s_E[event_V], null_watch_s),
                        before_E1)


def future_range(views: CountedViews, requests: TriggerRequests, window: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (R,) and (R,): the first W counted views from each request on, but none behind the end of its future."""
    low_R = views.before_E1[requests.history_end_R]
    return low_R, np.minimum(low_R + window, views.before_E1[requests.future_end_R])


def past_range(views: CountedViews, shard: SequenceShard, requests: TriggerRequests) -> tuple[np.ndarray, np.ndarray]:
    """int64 (R,) and (R,): the user's counted views before each request."""
    return (views.before_E1[shard.offset_U[requests.user_R]], views.before_E1[requests.history_end_R])


@dataclass(frozen=True)
class FutureItems:
    """The futures of requests: request r has the views offset_R1[r] to offset_R1[r + 1], in time order.

    row_V: int32 vocabulary rows, 0 for an item that the vocabulary lacks; repeats stand there. watch_ms_V: int64.
    event_V: int64, events of the shard.
    """

    offset_R1: np.ndarray
    row_V: np.ndarray
    watch_ms_V: np.ndarray
    event_V: np.ndarray


def future_items(shard: SequenceShard, requests: TriggerRequests, is_future_E: np.ndarray, window: int | None,
                 null_watch_s: float = 0.0) -> FutureItems:
    """The first `window` counted views of each request's future; None takes all of it.

    Args:
        is_future_E: of trainer.triggers.is_future_view.
    """
    views = counted_views(shard, is_future_E, null_watch_s)
    low_R, high_R = future_range(views, requests, len(views.row_V) if window is None else window)
    offset_R1 = np.concatenate([[0], np.cumsum(high_R - low_R)]).astype(np.int64)
    at_V = ranges(low_R, high_R - low_R)
    return FutureItems(offset_R1, views.row_V[at_V], views.watch_ms_V[at_V], views.event_V[at_V])


# ---------------------------------------------------------------------------------------------------- forward values

def rewards_ms(shard: SequenceShard, requests: TriggerRequests, is_future_E: np.ndarray, snapshots: ChannelSnapshots,
               windows: Sequence[int], null_watch_s: float) -> np.ndarray:
    """Forward values of Eq. 3 for every trigger and channel.

    Args:
        is_future_E: of trainer.triggers.is_future_view. windows: W of each.

    Returns:
        int64 (len(windows), T, C), milliseconds.
    """
    views = counted_views(shard, is_future_E, null_watch_s)
    ranges = [future_range(views, requests, window) for window in windows]
    low_TK, high_TK = (np.stack([part[requests.request_T] for part in side], axis=1)
                       for side in zip(*ranges, strict=True))
    sum_KTC, _ = replay(views, requests, low_TK, high_TK, snapshots)
    return sum_KTC


def replay(views: CountedViews, requests: TriggerRequests, low_TK: np.ndarray, high_TK: np.ndarray,
           snapshots: ChannelSnapshots) -> tuple[np.ndarray, np.ndarray]:
    """What each trigger's list, as its request sees it, holds of ranges of the user's views.

    Args:
        low_TK, high_TK: int64 (T, K), views low to high of CountedViews; empty where high <= low.

    Returns:
        The watch time int64 (K, T, C), ms, and the number int32 (K, T, C) of the views whose item is in the list.
    """
    shape_KTC = (low_TK.shape[1], len(requests.trigger_row_T), len(snapshots.names))
    sum_KTC, count_KTC = np.zeros(shape_KTC, np.int64), np.zeros(shape_KTC, np.int32)
    for _, state_C, groups in states_of(requests, snapshots):
        for channel, number in enumerate(state_C):
            lists = snapshots.lists(channel, int(number))
            if len(lists.neighbor_L):
                _sum_ranges(views.row_V, views.watch_ms_V, low_TK, high_TK, groups.at_T, groups.begin_G1, groups.row_G,
                            groups.first_U1, lists.offset_N1, lists.neighbor_L, groups.longest(low_TK, high_TK),
                            sum_KTC[:, :, channel], count_KTC[:, :, channel])
    return sum_KTC, count_KTC


@dataclass(frozen=True)
class Hits:
    """Which views of the futures each trigger's list holds: trigger t of channel c has offset_TC1[t * C + c] to the
    next, in time order.

    view_H: int64, index into FutureItems of the same requests and window. rank_H: int32, place in the list, 0 the best.
    """

    offset_TC1: np.ndarray
    view_H: np.ndarray
    rank_H: np.ndarray


def hits(shard: SequenceShard, requests: TriggerRequests, is_future_E: np.ndarray, snapshots: ChannelSnapshots,
         window: int | None) -> Hits:
    """The views behind the forward values of one window; None is the whole future. A repeated item is a hit each time.
    """
    views = counted_views(shard, is_future_E, 0.0)
    low_R, high_R = future_range(views, requests, len(views.row_V) if window is None else window)
    low_T, high_T = low_R[requests.request_T], high_R[requests.request_T]
    _, count_KTC = replay(views, requests, low_T[:, None], high_T[:, None], snapshots)
    offset_TC1 = np.concatenate([[0], np.cumsum(count_KTC[0].ravel(), dtype=np.int64)])
    begin_TC = offset_TC1[:-1].reshape(count_KTC.shape[1:])
    begin_R = np.cumsum(high_R - low_R) - (high_R - low_R)
    # From an index of the shard's views to one of FutureItems.
    shift_T = (begin_R - low_R)[requests.request_T]
    view_H, rank_H = np.zeros(offset_TC1[-1], np.int64), np.zeros(offset_TC1[-1], np.int32)
    for _, state_C, groups in states_of(requests, snapshots):
        for channel, number in enumerate(state_C):
            lists = snapshots.lists(channel, int(number))
            if len(lists.neighbor_L):
                _fill_hits(views.row_V, low_T, high_T, shift_T, groups.at_T, groups.begin_G1, groups.row_G,
                           groups.first_U1, lists.offset_N1, lists.neighbor_L,
                           groups.longest(low_T[:, None], high_T[:, None]), begin_TC[:, channel], view_H, rank_H)
    return Hits(offset_TC1, view_H, rank_H)


# -------------------------------------------------------------------------------------------------------- uniqueness

def unique_counts(requests: TriggerRequests, snapshots: ChannelSnapshots) -> tuple[np.ndarray, np.ndarray]:
    """|U_c| and |R_c| of Eq. 10-11: int32 (T, C) items that no other channel returns, int32 (T, C) all of the list."""
    shape_TC = (len(requests.trigger_row_T), len(snapshots.names))
    unique_TC, length_TC = np.zeros(shape_TC, np.int32), np.zeros(shape_TC, np.int32)
    for at_T, state_C, _ in states_of(requests, snapshots):
        row_X, place_T = np.unique(requests.trigger_row_T[at_T], return_inverse=True)
        lists = [snapshots.lists(channel, int(number)) for channel, number in enumerate(state_C)]
        unique_TC[at_T] = unique_of(row_X, lists)[place_T]
        length_TC[at_T] = np.stack([one.length_N[row_X] for one in lists], axis=1)[place_T]
    return unique_TC, length_TC


def unique_of(row_X: np.ndarray, lists: Sequence[NeighborLists]) -> np.ndarray:
    """int32 (X, C): items of each row's list in one channel that are in no other channel's list for the row."""
    unique_XC = np.zeros((len(row_X), len(lists)), np.int32)
    seen_N = np.zeros(len(lists[0].offset_N1), np.int64)
    for begin in range(0, len(row_X), ROWS_AT_ONCE):
        rows = row_X[begin:begin + ROWS_AT_ONCE]
        length_XC = np.stack([one.length_N[rows] for one in lists], axis=1)
        offset_XC1 = np.concatenate([[0], np.cumsum(length_XC.ravel())])
        item_M = np.zeros(offset_XC1[-1], np.int32)
        for channel, one in enumerate(lists):
            inside_L = ranges(offset_XC1[:-1].reshape(length_XC.shape)[:, channel], length_XC[:, channel])
            item_M[inside_L] = one.neighbor_L[ranges(one.offset_N1[rows], length_XC[:, channel])]
        _count_unique(item_M, offset_XC1, len(lists), seen_N, unique_XC[begin:begin + ROWS_AT_ONCE])
        seen_N[:] = 0
    return unique_XC


def unique_share(unique_TC: np.ndarray, length_TC: np.ndarray) -> np.ndarray:
    """float32 rho of Eq. 11; 0 for empty lists."""
    return (unique_TC / (length_TC + EPSILON)).astype(np.float32)


def ranges(begin_X: np.ndarray, length_X: np.ndarray) -> np.ndarray:
    """int64: the numbers begin .. begin + length - 1 of each range, one range after the other."""
    before_X = np.cumsum(length_X) - length_X
    return np.arange(length_X.sum()) + np.repeat(begin_X - before_X, length_X)


@numba.njit(cache=True, nogil=True)
def _count_unique(item_M, offset_XC1, channels, seen_N, unique_XC):  # pragma: no cover - compiled
    """seen_N: 0; 2x + 1 is written where one channel has the item for row x, 2x + 2 where more have."""
    for x in range(len(unique_XC)):
        for place in range(offset_XC1[x * channels], offset_XC1[(x + 1) * channels]):
            seen_N[item_M[place]] = 2 * x + 1 + (seen_N[item_M[place]] > 2 * x)
        for channel in range(channels):
            for place in range(offset_XC1[x * channels + channel], offset_XC1[x * channels + channel + 1]):
                unique_XC[x, channel] += seen_N[item_M[place]] == 2 * x + 1


# ---------------------------------------------------------------------------------------------------- what is shared

@dataclass(frozen=True)
class TriggerGroups:
    """Triggers of one state by user and item: what the requests of a user share is looked up once.

    at_T: int64 triggers, sorted by user and row. begin_G1: int64, where each group begins in at_T. row_G: int32, its
    item. first_U1: int64, the first group of each user who has any.
    """

    at_T: np.ndarray
    begin_G1: np.ndarray
    row_G: np.ndarray
    first_U1: np.ndarray

    def longest(self, low_TK: np.ndarray, high_TK: np.ndarray) -> int:
        """Views that a user's ranges span, at most."""
        if not len(self.at_T) or not low_TK.shape[1]:
            return 0
        begin_U = self.begin_G1[self.first_U1[:-1]]
        low_U = np.minimum.reduceat(low_TK[self.at_T].min(axis=1), begin_U)
        high_U = np.maximum.reduceat(high_TK[self.at_T].max(axis=1), begin_U)
        return max(0, int((high_U - low_U).max()))


def states_of(requests: TriggerRequests, snapshots: ChannelSnapshots):
    """For each combination of snapshots that requests see: its triggers int64, snapshot numbers (C,), TriggerGroups."""
    state_SC, state_R = snapshots.states(requests.time_ms_R)
    request_T = requests.request_T
    state_T = state_R[request_T]
    order_T = np.lexsort((requests.trigger_row_T, requests.user_R[request_T], state_T))
    bounds_S1 = np.searchsorted(state_T[order_T], np.arange(len(state_SC) + 1))
    for state, state_C in enumerate(state_SC):
        at_T = order_T[bounds_S1[state]:bounds_S1[state + 1]]
        if len(at_T):
            yield np.sort(at_T), state_C, _group(at_T, requests.user_R[request_T[at_T]], requests.trigger_row_T[at_T])


def _group(at_T: np.ndarray, user_T: np.ndarray, row_T: np.ndarray) -> TriggerGroups:
    new_user_T = np.concatenate([[True], np.diff(user_T) != 0])
    new_T = new_user_T | np.concatenate([[True], np.diff(row_T) != 0])
    begin_G = np.flatnonzero(new_T)
    return TriggerGroups(at_T, np.append(begin_G, len(at_T)), row_T[begin_G],
                         np.append(np.flatnonzero(new_user_T[begin_G]), len(begin_G)))


# ------------------------------------------------------------------------------------------------------- the kernels
# A user's views are looked up by item in an open hash table: key_S the item row (0 free), head_S its first view, and
# next_V the next view of the same item. Views count from the user's lowest one.

@numba.njit(cache=True, nogil=True)
def _slot(key_S, mask, row):  # pragma: no cover - compiled
    """The slot of an item, or the free one where it would go. Unsigned, so that no index can count from the end."""
    slot = ((np.uint32(row) * np.uint32(2654435769)) >> np.uint32(11)) & mask
    while key_S[slot] != 0 and key_S[slot] != row:
        slot = (slot + np.uint32(1)) & mask
    return slot


@numba.njit(cache=True, nogil=True)
def _look_up_table(row_V, low, high, key_S, head_S, next_V):  # pragma: no cover - compiled
    """Fill the table with the views low to high; the mask of its size, at least twice the views."""
    size = 2
    while size < 2 * (high - low):
        size *= 2
    mask = np.uint32(size - 1)
    key_S[:size] = 0
    for view in range(high - 1, low - 1, -1):
        row = row_V[view]
        if row == 0:
            continue
        slot = _slot(key_S, mask, row)
        next_V[view - low] = head_S[slot] if key_S[slot] == row else -1
        key_S[slot] = row
        head_S[slot] = view - low
    return mask


@numba.njit(cache=True, nogil=True)
def _scratch(longest):  # pragma: no cover - compiled
    """Arrays for a user of so many views: key_S, head_S, next_V, found_V, before_V1."""
    slots = 2
    while slots < 2 * longest:
        slots *= 2
    return (np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.zeros(longest, np.int32),
            np.zeros(longest, np.int64), np.zeros(longest + 1, np.int64))


@numba.njit(cache=True, nogil=True)
def _bounds_of_user(low_TK, high_TK, at_T, begin, end):  # pragma: no cover - compiled
    low, high = np.iinfo(np.int64).max, 0
    for place in range(begin, end):
        for k in range(low_TK.shape[1]):
            if high_TK[at_T[place], k] > low_TK[at_T[place], k]:
                low = min(low, low_TK[at_T[place], k])
                high = max(high, high_TK[at_T[place], k])
    return low, high


@numba.njit(cache=True, nogil=True)
def _sum_ranges(row_V, watch_ms_V, low_TK, high_TK, at_T, begin_G1, row_G, first_U1, offset_N1, neighbor_L, longest,
                sum_KT, count_KT):  # pragma: no cover - compiled
    key_S, head_S, next_V, found_V, before_V1 = _scratch(longest)
    for user in range(len(first_U1) - 1):
        low, high = _bounds_of_user(low_TK, high_TK, at_T, begin_G1[first_U1[user]], begin_G1[first_U1[user + 1]])
        if high <= low:
            continue
        mask = _look_up_table(row_V, low, high, key_S, head_S, next_V)
        for group in range(first_U1[user], first_U1[user + 1]):
            found = 0
            for place in range(offset_N1[row_G[group]], offset_N1[row_G[group] + 1]):
                slot = _slot(key_S, mask, neighbor_L[place])
                if key_S[slot] == 0:
                    continue
                view = head_S[slot]
                while view >= 0:
                    found_V[found] = view
                    found += 1
                    view = next_V[view]
            if found == 0:
                continue
            found_V[:found].sort()
            for k in range(found):
                before_V1[k + 1] = before_V1[k] + watch_ms_V[low + found_V[k]]
            for place in range(begin_G1[group], begin_G1[group + 1]):
                t = at_T[place]
                for k in range(low_TK.shape[1]):
                    if high_TK[t, k] > low_TK[t, k]:
                        first = np.searchsorted(found_V[:found], low_TK[t, k] - low)
                        last = np.searchsorted(found_V[:found], high_TK[t, k] - low)
                        sum_KT[k, t] = before_V1[last] - before_V1[first]
                        count_KT[k, t] = last - first


@numba.njit(cache=True, nogil=True)
def _fill_hits(row_V, low_T, high_T, shift_T, at_T, begin_G1, row_G, first_U1, offset_N1, neighbor_L, longest, begin_T,
               view_H, rank_H):  # pragma: no cover - compiled
    key_S, head_S, next_V, found_V, _ = _scratch(longest)
    low_TK, high_TK = low_T.reshape(-1, 1), high_T.reshape(-1, 1)
    for user in range(len(first_U1) - 1):
        low, high = _bounds_of_user(low_TK, high_TK, at_T, begin_G1[first_U1[user]], begin_G1[first_U1[user + 1]])
        if high <= low:
            continue
        mask = _look_up_table(row_V, low, high, key_S, head_S, next_V)
        for group in range(first_U1[user], first_U1[user + 1]):
            begin, end = offset_N1[row_G[group]], offset_N1[row_G[group] + 1]
            length, found = max(end - begin, 1), 0
            for place in range(begin, end):
                slot = _slot(key_S, mask, neighbor_L[place])
                if key_S[slot] == 0:
                    continue
                view = head_S[slot]
                while view >= 0:  # the view and its place in the list as one number that sorts by view
                    found_V[found] = view * length + place - begin
                    found += 1
                    view = next_V[view]
            if found == 0:
                continue
            found_V[:found].sort()
            for place in range(begin_G1[group], begin_G1[group + 1]):
                t = at_T[place]
                to = begin_T[t]
                for k in range(found):
                    view = low + found_V[k] // length
                    if low_T[t] <= view < high_T[t]:
                        view_H[to] = view + shift_T[t]
                        rank_H[to] = found_V[k] % length
                        to += 1
