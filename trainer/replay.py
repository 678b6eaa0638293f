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
each window is then a search in their places and one difference of prefix sums. Scratch is as long as the longest user's
views. Most neighbours were never viewed, so the table is kept sparse: its slots are looked at without a branch, and
only those that are taken are compared.

Shape suffixes: E = events of a shard, V = its counted views, R = requests, T = triggers of all of them, C = channels,
K = ranges of views, W = windows, H = hits, G = triggers of a user with the requests taken together, N = vocabulary
rows, L = neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np

from trainer.neighbors import ChannelSnapshots, NeighborLists
from trainer.sequences import SequenceShard
from trainer.triggers import TriggerRequests

EPSILON = 1e-6  # eps of Eq. 11
GROUPS_AT_ONCE = 4096  # of a user and a trigger's item
ROOM_A_GROUP = 32  # hits of a trigger list that room is taken for at first
MOST_KEPT = 1 << 23  # items x channels whose counts are found for all and kept: 64 MiB, four times while in the making
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
               windows: Sequence[int], null_watch_s: float, states: Sequence[State] | None = None) -> np.ndarray:
    """Forward values of Eq. 3 for every trigger and channel.

    Args:
        is_future_E: of trainer.triggers.is_future_view. windows: W of each. states: as of `replay`.

    Returns:
        int64 (len(windows), T, C), milliseconds.
    """
    views = counted_views(shard, is_future_E, null_watch_s)
    ranges = [future_range(views, requests, window) for window in windows]
    low_RK, high_RK = (np.stack(side, axis=1) for side in zip(*ranges, strict=True))
    sum_KTC, _ = replay(views, requests, low_RK, high_RK, snapshots, states=states, is_counted=False)
    return sum_KTC


def replay(views: CountedViews, requests: TriggerRequests, low_RK: np.ndarray, high_RK: np.ndarray,
           snapshots: ChannelSnapshots, states: Sequence[State] | None = None, is_counted: bool = True
           ) -> tuple[np.ndarray, np.ndarray]:
    """What each trigger's list, as its request sees it, holds of ranges of the user's views.

    Args:
        low_RK, high_RK: int64 (R, K), views low to high of CountedViews; empty where high <= low.
        states: of `states_of` the same requests, where they are there already.
        is_counted: whether the numbers are wanted, too; else they are (0, T, C).

    Returns:
        The watch time int64 (K, T, C), ms, and the number int32 (K, T, C) of the views whose item is in the list.
    """
    shape_KTC = (low_RK.shape[1], len(requests.trigger_row_T), len(snapshots.names))
    sum_KTC, count_KTC = np.zeros(shape_KTC, np.int64), np.zeros((is_counted * shape_KTC[0], *shape_KTC[1:]), np.int32)
    view_H, before_H = np.empty(0, np.int32), np.empty(shape_KTC[2], np.int64)
    for state_C, groups in states_of(requests, snapshots) if states is None else states:
        low_U, high_U = groups.bounds(low_RK, high_RK)
        lists_C, channels = snapshots.lists_of(state_C), shape_KTC[2]
        # Some users at a time, so that what was found of them is still in the cache when it is asked for.
        for users in _user_blocks(groups.first_U1):
            first_U1 = groups.first_U1[users.start : users.stop + 1]
            these, first_U1 = slice(first_U1[0], first_U1[-1]), first_U1 - first_U1[0]
            row_G, begin_G1C, held = groups.row_G[these], np.empty((first_U1[-1] + 1, channels), np.int64), 0
            if len(view_H) < ROOM_A_GROUP * len(row_G) * channels:
                view_H = np.empty(ROOM_A_GROUP * len(row_G) * channels, np.int32)
                before_H = np.empty(len(view_H) + channels, np.int64)
            for channel, lists in enumerate(lists_C):
                view_H, before_H, held = _find(
                    views.row_V, views.watch_ms_V, low_U[users], high_U[users], row_G, first_U1, lists.offset_N1,
                    lists.neighbor_L, lists.longest, channel, begin_G1C, view_H, before_H, held)
            _answer(low_RK, high_RK, low_U[users], groups.request_T, groups.at_T,
                    groups.begin_G1[these.start : these.stop + 1], first_U1, begin_G1C, view_H, before_H, sum_KTC,
                    count_KTC)
    return sum_KTC, count_KTC


def _user_blocks(first_U1: np.ndarray) -> Iterator[slice]:
    """Users, about GROUPS_AT_ONCE groups at a time; at least one."""
    begin = 0
    while begin < len(first_U1) - 1:
        end = int(np.searchsorted(first_U1, first_U1[begin] + GROUPS_AT_ONCE, side="right")) - 1
        yield slice(begin, max(end, begin + 1))
        begin = max(end, begin + 1)


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
    low_R1, high_R1, states = low_R[:, None], high_R[:, None], list(states_of(requests, snapshots))
    _, count_KTC = replay(views, requests, low_R1, high_R1, snapshots, states)
    offset_TC1 = np.concatenate([[0], np.cumsum(count_KTC[0].ravel(), dtype=np.int64)])
    begin_TC = offset_TC1[:-1].reshape(count_KTC.shape[1:])
    begin_R = np.cumsum(high_R - low_R) - (high_R - low_R)
    view_H, rank_H = np.zeros(offset_TC1[-1], np.int64), np.zeros(offset_TC1[-1], np.int32)
    for state_C, groups in states:
        low_U, high_U = groups.bounds(low_R1, high_R1)
        for channel, number in enumerate(state_C):
            lists = snapshots.lists(channel, int(number))
            if len(lists.neighbor_L):
                # The last shift is from an index of the shard's views to one of FutureItems.
                _fill_hits(views.row_V, low_R, high_R, low_U, high_U, groups.request_T, groups.at_T, groups.begin_G1,
                           groups.row_G, groups.first_U1, lists.offset_N1, lists.neighbor_L,
                           lists.longest, begin_TC[:, channel], begin_R - low_R, view_H, rank_H)
    return Hits(offset_TC1, view_H, rank_H)


# -------------------------------------------------------------------------------------------------------- uniqueness

def unique_counts(requests: TriggerRequests, snapshots: ChannelSnapshots, states: Sequence[State] | None = None
                  ) -> tuple[np.ndarray, np.ndarray]:
    """|U_c| and |R_c| of Eq. 10-11: int32 (T, C) items that no other channel returns, int32 (T, C) all of the list.

    Args:
        states: as of `replay`.
    """
    shape_TC = (len(requests.trigger_row_T), len(snapshots.names))
    unique_TC, length_TC = np.zeros(shape_TC, np.int32), np.zeros(shape_TC, np.int32)
    for state_C, groups in states_of(requests, snapshots) if states is None else states:
        lists = [snapshots.lists(channel, int(number)) for channel, number in enumerate(state_C)]
        counts_XC, place_G = None, groups.row_G
        items = len(lists[0].length_N)
        if items * len(lists) <= MOST_KEPT:  # requests of all users ask for the same items
            counts_XC = snapshots.kept(state_C, lambda lists=lists, items=items: _counts_of(np.arange(items), lists),
                                       len(groups.row_G), items)
        if counts_XC is None:
            row_X, place_G = np.unique(groups.row_G, return_inverse=True)
            counts_XC = _counts_of(row_X, lists)
        _spread(groups.at_T, groups.begin_G1, place_G, *counts_XC, unique_TC, length_TC)
    return unique_TC, length_TC


def _counts_of(row_X: np.ndarray, lists: Sequence[NeighborLists]) -> np.ndarray:
    """int32 (2, X, C): |U_c| and |R_c| of these rows."""
    length_XC = np.stack([one.length_N[row_X] for one in lists], axis=1)
    return np.stack([unique_of(row_X, lists), length_XC.astype(np.int32)])


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
def _spread(at_T, begin_G1, place_G, unique_XC, length_XC, unique_TC, length_TC):  # pragma: no cover - compiled
    """Give every trigger of a group the numbers of its item."""
    for group in range(len(place_G)):
        for place in range(begin_G1[group], begin_G1[group + 1]):
            for channel in range(unique_XC.shape[1]):
                unique_TC[at_T[place], channel] = unique_XC[place_G[group], channel]
                length_TC[at_T[place], channel] = length_XC[place_G[group], channel]


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

    at_T: int64 triggers, by user and item. begin_G1: int64, where each group begins in at_T. row_G: int32, its item.
    first_U1: int64, the first group of each user who has any. request_T: int32, the request of every trigger, of this
    state or another.
    """

    at_T: np.ndarray
    begin_G1: np.ndarray
    row_G: np.ndarray
    first_U1: np.ndarray
    request_T: np.ndarray

    def bounds(self, low_RK: np.ndarray, high_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (U,) and (U,): the views that each user's ranges span, low to high; high is 0 where all are empty."""
        return _bounds(low_RK, high_RK, self.request_T, self.at_T, self.begin_G1[self.first_U1])


State = tuple[np.ndarray, TriggerGroups]
"""int32 (C,) the snapshot of each channel, and the triggers of the requests that see these."""


def states_of(requests: TriggerRequests, snapshots: ChannelSnapshots) -> Iterator[State]:
    """Each combination of snapshots that requests see, with its triggers."""
    state_SC, state_R = snapshots.states(requests.time_ms_R)
    request_T = requests.request_T.astype(np.int32)
    order_R = np.lexsort((requests.user_R, state_R))
    bounds_S1 = np.searchsorted(state_R[order_R], np.arange(len(state_SC) + 1))
    for state, state_C in enumerate(state_SC):
        request_X = order_R[bounds_S1[state]:bounds_S1[state + 1]]
        at_T, begin_G, row_G, first_U = _grouped(request_X, requests.user_R, requests.trigger_offset_R1,
                                                 requests.trigger_row_T)
        if len(at_T):
            yield state_C, TriggerGroups(at_T, np.append(begin_G, len(at_T)), row_G, np.append(first_U, len(row_G)),
                                         request_T)


@numba.njit(cache=True, nogil=True)
def _grouped(request_X, user_R, offset_R1, row_T):  # pragma: no cover - compiled
    """The triggers of requests, sorted by user, by user and item: triggers, and of the groups where each begins and its
    item, and the first group of each user."""
    triggers, most, held, users = 0, 0, 0, 0
    for x in range(len(request_X)):
        if x == 0 or user_R[request_X[x]] != user_R[request_X[x - 1]]:
            held, users = 0, users + 1
        held += offset_R1[request_X[x] + 1] - offset_R1[request_X[x]]
        triggers += offset_R1[request_X[x] + 1] - offset_R1[request_X[x]]
        most = max(most, held)
    at_T, group_T = np.zeros(triggers, np.int64), np.zeros(most, np.int32)
    begin_G, row_G = np.zeros(triggers, np.int64), np.zeros(triggers, np.int32)
    first_U = np.zeros(users, np.int64)
    slots = 2
    while slots < 2 * most:
        slots *= 2
    key_S, group_S = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    groups, user, x, begin = 0, 0, 0, 0
    while x < len(request_X):
        end, held = x, 0
        while end < len(request_X) and user_R[request_X[end]] == user_R[request_X[x]]:
            held += offset_R1[request_X[end] + 1] - offset_R1[request_X[end]]
            end += 1
        if held == 0:
            x = end
            continue
        size = 2
        while size < 2 * held:
            size *= 2
        mask, first, seen = np.uint32(size - 1), groups, 0
        key_S[:size] = 0
        for r in request_X[x:end]:
            for t in range(offset_R1[r], offset_R1[r + 1]):
                slot = _slot(key_S, mask, row_T[t])
                if key_S[slot] == 0:
                    key_S[slot], group_S[slot], row_G[groups] = row_T[t], groups, row_T[t]
                    groups += 1
                group_T[seen] = group_S[slot]
                begin_G[group_S[slot]] += 1
                seen += 1
        for group in range(first, groups):
            begin_G[group], begin = begin, begin + begin_G[group]
        seen = 0
        for r in request_X[x:end]:
            for t in range(offset_R1[r], offset_R1[r + 1]):
                at_T[begin_G[group_T[seen]]] = t
                begin_G[group_T[seen]] += 1
                seen += 1
        for group in range(groups - 1, first, -1):
            begin_G[group] = begin_G[group - 1]
        begin_G[first] = begin - held
        first_U[user] = first
        user, x = user + 1, end
    return at_T, begin_G[:groups], row_G[:groups], first_U[:user]


@numba.njit(cache=True, nogil=True)
def _bounds(low_RK, high_RK, request_T, at_T, begin_U1):  # pragma: no cover - compiled
    low_U, high_U = np.zeros(len(begin_U1) - 1, np.int64), np.zeros(len(begin_U1) - 1, np.int64)
    for user in range(len(begin_U1) - 1):
        low, high = np.iinfo(np.int64).max, 0
        for place in range(begin_U1[user], begin_U1[user + 1]):
            r = request_T[at_T[place]]
            for k in range(low_RK.shape[1]):
                if high_RK[r, k] > low_RK[r, k]:
                    low, high = min(low, low_RK[r, k]), max(high, high_RK[r, k])
        low_U[user], high_U[user] = low, high
    return low_U, high_U


# ------------------------------------------------------------------------------------------------------- the kernels
# A user's views are looked up by item in an open hash table: key_S the item row (0 free), head_S its first view, and
# next_V the next view of the same item. Views count from the user's lowest one.

# A bit's place: the bit times a De Bruijn sequence has at its top six bits that no other bit has there.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF = np.zeros(64, np.int32)
for _bit in range(64):
    _BIT_OF[(1 << _bit) * int(_DE_BRUIJN) % 2**64 >> 58] = _bit


@numba.njit(cache=True, nogil=True)
def _slot(key_S, mask, row):  # pragma: no cover - compiled
    """The slot of an item, or the free one where it would go. Unsigned, so that no index can count from the end."""
    slot = ((np.uint32(row) * np.uint32(2654435769)) >> np.uint32(11)) & mask
    while key_S[slot] != 0 and key_S[slot] != row:
        slot = (slot + np.uint32(1)) & mask
    return slot


@numba.njit(cache=True, nogil=True)
def _look_up_table(row_V, low, high, key_S, head_S, next_V):  # pragma: no cover - compiled
    """Fill the table with the views low to high; the mask of its size, at least eight times the views."""
    size = 8
    while size < 8 * (high - low):
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
def _scratch(low_U, high_U, longest_list):  # pragma: no cover - compiled
    """Arrays for the user of most views: key_S, head_S, next_V, found_V; and for a list: taken_L."""
    longest = 0
    for user in range(len(low_U)):
        longest = max(longest, high_U[user] - low_U[user])
    slots = 8
    while slots < 8 * longest:
        slots *= 2
    return (np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.zeros(longest, np.int32),
            np.zeros(longest, np.int64), np.zeros(longest_list + 1, np.int32))


@numba.njit(cache=True, nogil=True)
def _taken_slots(key_S, mask, neighbor_L, begin, end, taken_L):  # pragma: no cover - compiled
    """Places of a list whose slot in the table is taken, so that they may be there, counted from begin; how many."""
    taken = np.uint64(0)
    for place in range(np.uint64(begin), np.uint64(end)):
        slot = ((np.uint32(neighbor_L[place]) * np.uint32(2654435769)) >> np.uint32(11)) & mask
        taken_L[taken] = place - np.uint64(begin)
        taken += np.uint64(key_S[slot] != 0)
    return np.int64(taken)


@numba.njit(cache=True, nogil=True)
def _sort(values, begin, end):  # pragma: no cover - compiled
    """Sort values begin to end in place; there are hardly ever more than a few."""
    if end - begin > 32:
        values[begin:end].sort()
        return
    for k in range(begin + 1, end):
        value, at = values[k], k
        while at > begin and values[at - 1] > value:
            values[at] = values[at - 1]
            at -= 1
        values[at] = value


@numba.njit(cache=True, nogil=True)
def _sort_distinct(values, begin, end, bits, words):  # pragma: no cover - compiled
    """Sort values begin to end in place, of which no two are alike and all are below 64 words: where they are many
    beside that, by a bit each, which needs no comparing. bits: uint64, at least `words`, 0, and 0 again after."""
    if (end - begin) * 4 < words or end - begin < 4:
        _sort(values, begin, end)
        return
    for place in range(begin, end):
        bits[values[place] >> 6] |= np.uint64(1) << np.uint64(values[place] & 63)
    place = begin
    for word in range(words):
        left = bits[word]
        bits[word] = 0
        while left != 0:
            lowest = left & (~left + np.uint64(1))
            values[place] = (word << 6) + _BIT_OF[(lowest * _DE_BRUIJN) >> np.uint64(58)]
            place += 1
            left ^= lowest


@numba.njit(cache=True, nogil=True)
def _first_from(values, begin, end, bound):  # pragma: no cover - compiled
    """The first place, begin to end, of the sorted values whose value is not below the bound."""
    while end - begin > 8:
        middle = (begin + end) >> 1
        if values[middle] < bound:
            begin = middle + 1
        else:
            end = middle
    while begin < end and values[begin] < bound:
        begin += 1
    return begin


@numba.njit(cache=True, nogil=True)
def _find(row_V, watch_ms_V, low_U, high_U, row_G, first_U1, offset_N1, neighbor_L, longest_list, channel, begin_G1C,
          view_H, before_H, held):  # pragma: no cover - compiled
    """The views of its user that a channel's list of each group holds, in time order, and the watch time before each,
    behind what other channels have written.

    Args:
        begin_G1C: int64, written: where each group begins in view_H. view_H: int32 views, counted from the user's
            lowest one, `held` of them there. before_H: int64, ms, before each view and behind the last one: a place
            more for each channel.

    Returns:
        view_H and before_H, or larger ones, and how many views there are now.
    """
    key_S, head_S, next_V, _, taken_L = _scratch(low_U, high_U, longest_list)
    bits = np.zeros((len(next_V) + 63) >> 6, np.uint64)
    begin_G1C[0, channel], before_H[held + channel], touched = held, 0, np.int32(0)
    for user in range(len(first_U1) - 1):
        low, high = low_U[user], high_U[user]
        if high <= low or first_U1[user] == first_U1[user + 1]:
            begin_G1C[first_U1[user] + 1:first_U1[user + 1] + 1, channel] = held
            continue
        mask, words = _look_up_table(row_V, low, high, key_S, head_S, next_V), (high - low + 63) >> 6
        next_begin, next_end = offset_N1[row_G[first_U1[user]]], offset_N1[row_G[first_U1[user]] + 1]
        for group in range(first_U1[user], first_U1[user + 1]):
            if held + high - low > len(view_H):  # an item stands in a list once, so a view is found once at most
                room = 2 * held + high - low
                more_H, more_before_H = np.empty(room, np.int32), np.empty(room + begin_G1C.shape[1], np.int64)
                more_H[:held], more_before_H[:held + channel + 1] = view_H[:held], before_H[:held + channel + 1]
                view_H, before_H = more_H, more_before_H
            begin, end, first = next_begin, next_end, held
            if group + 1 < len(row_G):  # its list is on its way from memory while this one is looked at
                next_begin, next_end = offset_N1[row_G[group + 1]], offset_N1[row_G[group + 1] + 1]
                for place in range(next_begin, next_end, 16):
                    touched ^= neighbor_L[place]
            for k in range(_taken_slots(key_S, mask, neighbor_L, begin, end, taken_L)):
                slot = _slot(key_S, mask, neighbor_L[begin + taken_L[k]])
                if key_S[slot] == 0:
                    continue
                view = head_S[slot]
                while view >= 0:
                    view_H[held] = view
                    held += 1
                    view = next_V[view]
            if held - first > 1:
                _sort_distinct(view_H, first, held, bits, words)
            for k in range(first, held):
                before_H[k + channel + 1] = before_H[k + channel] + watch_ms_V[low + view_H[k]]
            begin_G1C[group + 1, channel] = held
    taken_L[longest_list] = touched  # or the compiler would leave that reading out
    return view_H, before_H, held


@numba.njit(cache=True, nogil=True)
def _answer(low_RK, high_RK, low_U, request_T, at_T, begin_G1, first_U1, begin_G1C, view_H, before_H, sum_KTC, count_KTC
            ):  # pragma: no cover - compiled
    """Each trigger's ranges from its group's views. All channels at once: what of a trigger is read from all over
    memory is read once. begin_G1C, view_H, before_H: as `_find` leaves them. count_KTC: not filled where it is empty.
    """
    channels, is_counted = begin_G1C.shape[1], count_KTC.size > 0
    for user in range(len(first_U1) - 1):
        for group in range(first_U1[user], first_U1[user + 1]):
            found = 0
            for c in range(channels):
                found += begin_G1C[group + 1, c] - begin_G1C[group, c]
            if found == 0:
                continue
            for place in range(begin_G1[group], begin_G1[group + 1]):
                t = at_T[place]
                r = request_T[t]
                for k in range(low_RK.shape[1]):
                    low, high = low_RK[r, k] - low_U[user], high_RK[r, k] - low_U[user]
                    if high <= low:
                        continue
                    for c in range(channels):
                        end = begin_G1C[group + 1, c]
                        first = _first_from(view_H, begin_G1C[group, c], end, low)
                        last = _first_from(view_H, first, end, high)
                        sum_KTC[k, t, c] = before_H[last + c] - before_H[first + c]
                        if is_counted:
                            count_KTC[k, t, c] = last - first


@numba.njit(cache=True, nogil=True)
def _fill_hits(row_V, low_R, high_R, low_U, high_U, request_T, at_T, begin_G1, row_G, first_U1, offset_N1, neighbor_L,
               longest_list, begin_T, shift_R, view_H, rank_H):  # pragma: no cover - compiled
    key_S, head_S, next_V, found_V, taken_L = _scratch(low_U, high_U, longest_list)
    for user in range(len(first_U1) - 1):
        low, high = low_U[user], high_U[user]
        if high <= low:
            continue
        mask = _look_up_table(row_V, low, high, key_S, head_S, next_V)
        for group in range(first_U1[user], first_U1[user + 1]):
            begin, end = offset_N1[row_G[group]], offset_N1[row_G[group] + 1]
            length, found = max(end - begin, 1), 0
            for k in range(_taken_slots(key_S, mask, neighbor_L, begin, end, taken_L)):
                slot = _slot(key_S, mask, neighbor_L[begin + taken_L[k]])
                if key_S[slot] == 0:
                    continue
                view = head_S[slot]
                while view >= 0:  # the view and its place in the list as one number that sorts by view
                    found_V[found] = view * length + taken_L[k]
                    found += 1
                    view = next_V[view]
            if found == 0:
                continue
            _sort(found_V, 0, found)
            for place in range(begin_G1[group], begin_G1[group + 1]):
                t = at_T[place]
                r = request_T[t]
                to = begin_T[t]
                for k in range(found):
                    view = low + found_V[k] // length
                    if low_R[r] <= view < high_R[r]:
                        view_H[to] = view + shift_R[r]
                        rank_H[to] = found_V[k] % length
                        to += 1
