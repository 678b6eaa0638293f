"""From the scores of triggers to ranked lists, and what of the future they hold: compiled, exact, one block at a time.

A channel takes the best triggers by its scores (CAPTS Eq. 15), each lowered by what its list repeats of the picks
before it where that is asked for (`spread_picks`), or all channels together take those that cover most under one quota
(Eq. 1's own objective, `joint_picks`). Their lists are interleaved by neighbour rank, in routing order, and
de-duplicated; recall@K unites each channel's first K.

Lists come padded: list_TCL[t, c] holds the neighbours of trigger t in channel c, best first, 0 where the list has
ended. Picks are triggers of the block in routing order, NONE where there are no more.

Shape suffixes: R = requests of a block, T = their triggers, C = channels, L = places of a list, B = picks of a channel,
X = places of a channel's ranked list, F = distinct future items of all requests, V = future views, K = list lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np

from trainer.neighbors import NeighborLists

NONE = -1
PICKED = -2
NEVER = np.iinfo(np.int32).max  # rank of an item that a list does not hold
Cover = Literal["product", "max"]


# ------------------------------------------------------------------------------------------------------- the block

def padded_lists(lists: Sequence[NeighborLists], row_T: np.ndarray, top: int) -> np.ndarray:
    """int32 (T, C, top): the neighbours of these rows in each channel, best first, 0 behind the end."""
    list_TCL = np.zeros((len(row_T), len(lists), top), np.int32)
    for c, channel in enumerate(lists):
        length_T = np.minimum(channel.length_N[row_T], top)
        inside_TL = np.arange(top) < length_T[:, None]
        at_TL = channel.offset_N1[row_T][:, None] + np.arange(top)
        list_TCL[:, c][inside_TL] = channel.neighbor_L[at_TL[inside_TL]]
    return list_TCL


@dataclass(frozen=True)
class Future:
    """The distinct items of each request's next views, in the order of their first view.

    offset_R1: int64 (R + 1,) into the items. row_F: int32. first_F: int64, how many views of the request come before
    the item's first one, so the items of F_W are those with first_F < W. view_offset_R1, view_item_V (int64 into F),
    view_ms_V: the views themselves.
    """

    offset_R1: np.ndarray
    row_F: np.ndarray
    first_F: np.ndarray
    view_offset_R1: np.ndarray
    view_item_V: np.ndarray
    view_ms_V: np.ndarray

    @property
    def request_F(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.offset_R1) - 1), np.diff(self.offset_R1))


def future_of(offset_R1: np.ndarray, row_V: np.ndarray, watch_ms_V: np.ndarray) -> Future:
    """The distinct items of future views that come ragged by request, in time order."""
    requests = len(offset_R1) - 1
    request_V = np.repeat(np.arange(requests), np.diff(offset_R1))
    pair_V = request_V * (np.int64(row_V.max(initial=0)) + 1) + row_V
    _, first_P, pair_of_V = np.unique(pair_V, return_index=True, return_inverse=True)
    order_P = np.argsort(first_P, kind="stable")
    place_P = np.empty(len(order_P), np.int64)
    place_P[order_P] = np.arange(len(order_P))
    at_F = first_P[order_P]
    count_R = np.bincount(request_V[at_F], minlength=requests)
    return Future(np.concatenate([[0], np.cumsum(count_R)]).astype(np.int64), row_V[at_F].astype(np.int32),
                  at_F - offset_R1[request_V[at_F]], np.asarray(offset_R1, np.int64), place_P[pair_of_V.ravel()],
                  np.asarray(watch_ms_V, np.int64))


# -------------------------------------------------------------------------------------------------------- the picks

def top_picks(score_TC: np.ndarray, offset_R1: np.ndarray, budget: int) -> np.ndarray:
    """int32 (R, C, budget): each channel's best triggers, best first; of equal scores the earlier position first.

    NaN is the lowest score. A smaller budget's picks are the first of these.
    """
    return _top_picks(np.ascontiguousarray(score_TC, np.float64), np.asarray(offset_R1, np.int64), budget)


@numba.njit(cache=True, nogil=True)
def _top_picks(score_TC, offset_R1, budget):  # pragma: no cover - compiled
    requests, channels = len(offset_R1) - 1, score_TC.shape[1]
    pick_RCB = np.full((requests, channels, budget), NONE, np.int32)
    best = np.empty(budget, np.float64)
    for r in range(requests):
        for c in range(channels):
            found = 0
            for t in range(offset_R1[r], offset_R1[r + 1]):
                score = score_TC[t, c]
                if np.isnan(score):
                    score = -np.inf
                place = found
                while place > 0 and best[place - 1] < score:
                    place -= 1
                if place >= budget:
                    continue
                found = min(found + 1, budget)
                for k in range(found - 1, place, -1):
                    best[k], pick_RCB[r, c, k] = best[k - 1], pick_RCB[r, c, k - 1]
                best[place], pick_RCB[r, c, place] = score, t
    return pick_RCB


def spread_picks(score_TC: np.ndarray, offset_R1: np.ndarray, list_TCL: np.ndarray, weight_TCL: np.ndarray, budget: int,
                 overlap: float) -> np.ndarray:
    """Each channel's triggers by score, of which what its list repeats is taken off. EXTENSION: not in the paper, whose
    Eq. 15 scores triggers by themselves and does not see that triggers of one channel bring the same items.

        pick b of channel c = argmax over x of  S_c(x) - overlap * share_c(x)
        share_c(x) = sum of the weights of R_c(x)'s items that picks 1 .. b-1 of c bring / sum of all its weights

    A share only grows, so what a trigger was worth once bounds what it is worth later, and only triggers at the head
    are computed anew (lazy greedy; exact, as the bound also holds in floating point: a sum of more terms >= 0, in the
    same order, is not smaller). A smaller budget's picks are the first of these, and overlap 0 gives top_picks.

    Args:
        score_TC: S_c; NaN is the lowest score.
        weight_TCL: of each place of a list, at least 0. A list without any repeats nothing.
        overlap: what a list that is brought in whole costs, in units of the score, >= 0.

    Returns:
        int32 (R, C, budget): the best first; of equal ones the earlier position first; NONE behind the last.

    Raises:
        ValueError: if overlap is negative.
    """
    if not overlap >= 0:
        raise ValueError(f"overlap must be at least 0, not {overlap}")
    return _spread_picks(np.ascontiguousarray(score_TC, np.float64), np.asarray(offset_R1, np.int64),
                         np.ascontiguousarray(list_TCL, np.int32), np.ascontiguousarray(weight_TCL, np.float32), budget,
                         float(overlap), int(list_TCL.max(initial=0)) + 1)


@numba.njit(cache=True, nogil=True)
def _repeated(list_L, weight_L, is_held_N):  # pragma: no cover - compiled
    """The share of a list's weight that is held already."""
    held, total = 0.0, 0.0
    for place in range(len(list_L)):
        item = list_L[place]
        if item == 0:
            break
        total += np.float64(weight_L[place])
        if is_held_N[item]:
            held += np.float64(weight_L[place])
    return held / total if total > 0 else 0.0


@numba.njit(cache=True, nogil=True)
def _spread_picks(score_TC, offset_R1, list_TCL, weight_TCL, budget, overlap, rows):  # pragma: no cover - compiled
    requests, channels, places = len(offset_R1) - 1, list_TCL.shape[1], list_TCL.shape[2]
    pick_RCB = np.full((requests, channels, budget), NONE, np.int32)
    is_held_N = np.zeros(rows, np.bool_)
    widest = 0
    for r in range(requests):
        widest = max(widest, offset_R1[r + 1] - offset_R1[r])
    bound = np.empty(widest, np.float64)
    fresh = np.empty(widest, np.int64)  # the pick that a bound was computed for; PICKED: none any more
    for r in range(requests):
        begin, triggers = offset_R1[r], offset_R1[r + 1] - offset_R1[r]
        for c in range(channels):
            for k in range(triggers):
                score = score_TC[begin + k, c]
                bound[k], fresh[k] = -np.inf if np.isnan(score) else score, 0
            for b in range(min(budget, triggers)):
                while True:
                    best = -1
                    for k in range(triggers):
                        if fresh[k] != PICKED and (best < 0 or bound[k] > bound[best]):
                            best = k
                    if fresh[best] == b or overlap == 0.0:
                        break
                    t = begin + best
                    score = score_TC[t, c]
                    if not np.isnan(score):
                        bound[best] = score - overlap * _repeated(list_TCL[t, c], weight_TCL[t, c], is_held_N)
                    fresh[best] = b
                pick_RCB[r, c, b] = begin + best
                fresh[best] = PICKED
                for place in range(places):
                    is_held_N[list_TCL[begin + best, c, place]] = True
            for b in range(min(budget, triggers)):
                for place in range(places):
                    is_held_N[list_TCL[pick_RCB[r, c, b], c, place]] = False
    return pick_RCB


def joint_picks(chance_TCL: np.ndarray, offset_R1: np.ndarray, list_TCL: np.ndarray, quota: int, least: int = 0,
                most: int | None = None, cover: Cover = "max") -> np.ndarray:
    """A greedy pick under the quota that all channels share, which values an item once whichever channel brings it.

        worth of picks = sum over items of the greatest chance that a picked list gives it
                         ("product": of 1 - prod(1 - chance))

    Each step takes the pair (trigger, channel) that adds most; of equal ones the earlier position, then the earlier
    channel. The worth is submodular, so what a pair added once bounds what it adds later, and only pairs at the head
    are computed anew (lazy greedy; exact, as the bound also holds in floating point).

    Args:
        chance_TCL: what each place of a list is worth, 0 to 1; NaN is 0.
        quota: picks of all channels together.
        least, most: picks of each channel, at least (as far as there are triggers) and at most; None: the quota.

    Returns:
        int32 (R, C, min(most, quota)): each channel's picks in the order they were made, NONE behind the last.

    Raises:
        ValueError: if the least picks of all channels exceed the quota, or the most fall short of it or of the least.
    """
    channels = list_TCL.shape[1]
    most = quota if most is None else min(most, quota)
    if least * channels > quota or most * channels < quota or most < least:
        raise ValueError(f"a quota of {quota} picks does not fit {least} to {most} of each of {channels} channels")
    chance_TCL = np.clip(np.nan_to_num(np.asarray(chance_TCL, np.float32)), 0, 1)
    return _joint_picks(np.ascontiguousarray(chance_TCL), np.asarray(offset_R1, np.int64),
                        np.ascontiguousarray(list_TCL, np.int32), quota, least, most, cover == "max",
                        int(list_TCL.max(initial=0)) + 1)


@numba.njit(cache=True, nogil=True)
def _adds(chance_L, list_L, left_N, by_max):  # pragma: no cover - compiled
    """left_N: of each item the chance that no pick brought it; under "max" the negated greatest p so far, plus 1."""
    total = 0.0
    for place in range(len(list_L)):
        item = list_L[place]
        if item == 0:
            break
        p = np.float64(chance_L[place])
        total += max(p - (1.0 - left_N[item]), 0.0) if by_max else p * left_N[item]
    return total


@numba.njit(cache=True, nogil=True)
def _joint_picks(chance_TCL, offset_R1, list_TCL, quota, least, most, by_max, rows):  # pragma: no cover - compiled
    requests, channels = len(offset_R1) - 1, list_TCL.shape[1]
    pick_RCB = np.full((requests, channels, most), NONE, np.int32)
    left_N = np.ones(rows, np.float64)
    widest = 0
    for r in range(requests):
        widest = max(widest, offset_R1[r + 1] - offset_R1[r])
    bound = np.empty(widest * channels, np.float64)
    fresh = np.empty(widest * channels, np.int64)
    taken = np.empty(channels, np.int64)
    for r in range(requests):
        begin = offset_R1[r]
        triggers = offset_R1[r + 1] - begin
        pairs = triggers * channels
        for pair in range(pairs):
            t, c = begin + pair // channels, pair % channels
            bound[pair] = _adds(chance_TCL[t, c], list_TCL[t, c], left_N, by_max)
            fresh[pair] = 0
        taken[:] = 0
        floor, ceiling = min(least, triggers), min(most, triggers)
        for step in range(min(quota, ceiling * channels)):
            owed = 0
            for c in range(channels):
                owed += max(floor - taken[c], 0)
            only_owed = owed >= quota - step
            while True:
                best = -1
                for pair in range(pairs):
                    c = pair % channels
                    if bound[pair] < 0 or taken[c] >= ceiling or (only_owed and taken[c] >= floor):
                        continue
                    if best < 0 or bound[pair] > bound[best]:
                        best = pair
                t, c = begin + best // channels, best % channels
                if fresh[best] == step:
                    break
                bound[best] = _adds(chance_TCL[t, c], list_TCL[t, c], left_N, by_max)
                fresh[best] = step
            pick_RCB[r, c, taken[c]] = t
            taken[c] += 1
            bound[best] = -1.0
            for place in range(list_TCL.shape[2]):
                item = list_TCL[t, c, place]
                if item == 0:
                    break
                p = np.float64(chance_TCL[t, c, place])
                left_N[item] = min(left_N[item], 1.0 - p) if by_max else left_N[item] * (1.0 - p)
        for c in range(channels):
            for b in range(taken[c]):
                for place in range(list_TCL.shape[2]):
                    left_N[list_TCL[pick_RCB[r, c, b], c, place]] = 1.0
    return pick_RCB


# ------------------------------------------------------------------------------------------------- the ranked lists

@dataclass(frozen=True)
class Ranked:
    """What each channel retrieves for each request, best first.

    item_RCX: int32 rows, 0 behind the end. source_RCX: int32, the trigger that brought it first. length_RC: int32.
    """

    item_RCX: np.ndarray
    source_RCX: np.ndarray
    length_RC: np.ndarray


def interleave(pick_RCB: np.ndarray, list_TCL: np.ndarray) -> Ranked:
    """Each channel's lists dealt out in turn: first all first neighbours in routing order, then all second ones, ...;
    an item that was dealt before is left out."""
    return Ranked(*_interleave(np.ascontiguousarray(pick_RCB, np.int32), np.ascontiguousarray(list_TCL, np.int32),
                               int(list_TCL.max(initial=0)) + 1))


@numba.njit(cache=True, nogil=True)
def _interleave(pick_RCB, list_TCL, rows):  # pragma: no cover - compiled
    requests, channels, budget = pick_RCB.shape
    places = list_TCL.shape[2]
    item_RCX = np.zeros((requests, channels, budget * places), np.int32)
    source_RCX = np.full((requests, channels, budget * places), NONE, np.int32)
    length_RC = np.zeros((requests, channels), np.int32)
    seen_N = np.zeros(rows, np.int64)
    turn = 0
    for r in range(requests):
        for c in range(channels):
            turn += 1
            length = 0
            for place in range(places):
                for b in range(budget):
                    t = pick_RCB[r, c, b]
                    if t < 0:
                        break
                    item = list_TCL[t, c, place]
                    if item == 0 or seen_N[item] == turn:
                        continue
                    seen_N[item] = turn
                    item_RCX[r, c, length], source_RCX[r, c, length] = item, t
                    length += 1
            length_RC[r, c] = length
    return item_RCX, source_RCX, length_RC


def future_ranks(ranked: Ranked, future: Future) -> np.ndarray:
    """int32 (F, C): place of each future item in each channel's ranked list, from 0; NEVER where it is not there."""
    rows = max(int(ranked.item_RCX.max(initial=0)), int(future.row_F.max(initial=0))) + 1
    return _future_ranks(ranked.item_RCX, ranked.length_RC, future.offset_R1, future.row_F, rows)


@numba.njit(cache=True, nogil=True)
def _future_ranks(item_RCX, length_RC, offset_R1, row_F, rows):  # pragma: no cover - compiled
    requests, channels = length_RC.shape
    rank_FC = np.full((len(row_F), channels), NEVER, np.int32)
    turn_N = np.zeros(rows, np.int64)
    place_N = np.zeros(rows, np.int32)
    turn = 0
    for r in range(requests):
        for c in range(channels):
            turn += 1
            for x in range(length_RC[r, c]):
                turn_N[item_RCX[r, c, x]], place_N[item_RCX[r, c, x]] = turn, x
            for f in range(offset_R1[r], offset_R1[r + 1]):
                if turn_N[row_F[f]] == turn:
                    rank_FC[f, c] = place_N[row_F[f]]
    return rank_FC


def united_ranks(ranked: Ranked, future: Future) -> np.ndarray:
    """int32 (F,): place of each future item in the union of all channels, dealt out in turn: first all channels' first
    items, then all second ones, ..; NEVER where it is not there.

    Each channel's first K united are the first of these, as many as they are (`overlaps`), so that unions of different
    lengths can be cut to the same one.
    """
    rows = max(int(ranked.item_RCX.max(initial=0)), int(future.row_F.max(initial=0))) + 1
    return _united_ranks(ranked.item_RCX, ranked.length_RC, future.offset_R1, future.row_F, rows)


@numba.njit(cache=True, nogil=True)
def _united_ranks(item_RCX, length_RC, offset_R1, row_F, rows):  # pragma: no cover - compiled
    requests, channels = length_RC.shape
    rank_F = np.full(len(row_F), NEVER, np.int32)
    turn_N = np.zeros(rows, np.int64)
    place_N = np.zeros(rows, np.int32)
    for r in range(requests):
        count = 0
        for x in range(item_RCX.shape[2]):
            for c in range(channels):
                if x < length_RC[r, c] and turn_N[item_RCX[r, c, x]] != r + 1:
                    turn_N[item_RCX[r, c, x]], place_N[item_RCX[r, c, x]] = r + 1, count
                    count += 1
        for f in range(offset_R1[r], offset_R1[r + 1]):
            if turn_N[row_F[f]] == r + 1:
                rank_F[f] = place_N[row_F[f]]
    return rank_F


def overlaps(ranked: Ranked, at: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How far the channels bring the same, with each of them cut to its first K.

    Args:
        at: list lengths; NEVER for no cut.

    Returns:
        uniq_RCK float64: share of a channel's first K that no other channel's first K holds (READING of Uniq@K, CAPTS
        section 4.3.1); NaN for an empty list. union_RK int64: distinct items of all channels.
    """
    cut_K = np.minimum(np.asarray(at, np.int64), ranked.item_RCX.shape[2])
    return _overlaps(ranked.item_RCX, ranked.length_RC, cut_K, int(ranked.item_RCX.max(initial=0)) + 1)


@numba.njit(cache=True, nogil=True)
def _overlaps(item_RCX, length_RC, cut_K, rows):  # pragma: no cover - compiled
    requests, channels = length_RC.shape
    uniq_RCK = np.full((requests, channels, len(cut_K)), np.nan)
    union_RK = np.zeros((requests, len(cut_K)), np.int64)
    place_NC = np.full((rows, channels), NEVER, np.int32)
    for r in range(requests):
        for c in range(channels):
            for x in range(length_RC[r, c]):
                place_NC[item_RCX[r, c, x], c] = x
        for c in range(channels):
            alone = np.zeros(len(cut_K) + 1, np.int64)  # by the number of list lengths that count the item
            for x in range(length_RC[r, c]):
                others, before = NEVER, NEVER
                for o in range(channels):
                    if o != c:
                        place = place_NC[item_RCX[r, c, x], o]
                        others = min(others, place)
                        if o < c:
                            before = min(before, place)
                for k in range(len(cut_K)):
                    if x < cut_K[k]:
                        alone[k] += others >= cut_K[k]
                        union_RK[r, k] += before >= cut_K[k]
            for k in range(len(cut_K)):
                held = min(cut_K[k], length_RC[r, c])
                if held:
                    uniq_RCK[r, c, k] = alone[k] / held
        for c in range(channels):
            for x in range(length_RC[r, c]):
                place_NC[item_RCX[r, c, x], c] = NEVER
    return uniq_RCK, union_RK


# ------------------------------------------------------------------------------------------------- what they find

def recall(rank_F: np.ndarray, future: Future, at: Sequence[int], window: int | None = None) -> np.ndarray:
    """float64 (K, R): share of a request's distinct future items whose rank is below K; NaN without any.

    Args:
        rank_F: place of each item, NEVER where it was not found: of one channel, or the least of all of them.
        window: W, only the items of the first W future views; None: all that are there.
    """
    keep_F = np.ones(len(rank_F), bool) if window is None else future.first_F < window
    request_F, rank_F, requests = future.request_F[keep_F], rank_F[keep_F], len(future.offset_R1) - 1
    wanted_R = np.bincount(request_F, minlength=requests).astype(np.float64)
    wanted_R[wanted_R == 0] = np.nan
    return np.stack([np.bincount(request_F[rank_F < k], minlength=requests) / wanted_R for k in at])


def hit_watch_s(rank_F: np.ndarray, future: Future, at: Sequence[int], window: int) -> np.ndarray:
    """float64 (K, R): mean watch time, in seconds, of the first `window` future views whose item was found by K."""
    requests = len(future.offset_R1) - 1
    count_R = np.diff(future.view_offset_R1)
    request_V = np.repeat(np.arange(requests), count_R)
    inside_V = np.arange(len(request_V)) - np.repeat(future.view_offset_R1[:-1], count_R) < window
    rank_V = rank_F[future.view_item_V]
    found = []
    for k in at:
        hit_V = inside_V & (rank_V < k)
        hits_R = np.bincount(request_V[hit_V], minlength=requests).astype(np.float64)
        hits_R[hits_R == 0] = np.nan
        found.append(np.bincount(request_V[hit_V], weights=future.view_ms_V[hit_V], minlength=requests) / hits_R / 1000)
    return np.stack(found)


def found_by_position(rank_FC: np.ndarray, ranked: Ranked, future: Future, position_T: np.ndarray,
                      edges: Sequence[int], window: int) -> np.ndarray:
    """float64 (bands, R): recall without a cut, parted by the position of the trigger that ranked the item best (of
    equal ranks the earlier channel's), so that the bands add up to recall@all.

    Args:
        edges: first position of each band, rising, the first one 1.
    """
    requests = len(future.offset_R1) - 1
    inside_F = future.first_F < window
    request_F = future.request_F
    channel_F = rank_FC.argmin(axis=1)
    best_F = rank_FC[np.arange(len(rank_FC)), channel_F]
    hit = np.flatnonzero(inside_F & (best_F != NEVER))
    source = ranked.source_RCX[request_F[hit], channel_F[hit], best_F[hit]]
    band = np.searchsorted(edges, position_T[source], side="right") - 1
    wanted_R = np.bincount(request_F[inside_F], minlength=requests).astype(np.float64)
    wanted_R[wanted_R == 0] = np.nan
    counts = np.bincount(band * requests + request_F[hit], minlength=len(edges) * requests)
    return counts.reshape(len(edges), requests) / wanted_R


def tags_covered(hit_F: np.ndarray, future: Future, tag_offsets_N1: np.ndarray, tag_rows: np.ndarray, tags: int
                 ) -> np.ndarray:
    """float64 (R,): distinct tags of the future items that were found, over those of all; NaN where none has a tag."""
    return _tags_covered(np.asarray(hit_F, bool), future.offset_R1, future.row_F, tag_offsets_N1, tag_rows, tags)


@numba.njit(cache=True, nogil=True)
def _tags_covered(hit_F, offset_R1, row_F, tag_offsets_N1, tag_rows, tags):  # pragma: no cover - compiled
    share_R = np.full(len(offset_R1) - 1, np.nan)
    wanted = np.zeros(tags, np.int64)
    found = np.zeros(tags, np.int64)
    for r in range(len(share_R)):
        all_tags, covered = 0, 0
        for f in range(offset_R1[r], offset_R1[r + 1]):
            for at in range(tag_offsets_N1[row_F[f]], tag_offsets_N1[row_F[f] + 1]):
                tag = tag_rows[at]
                if wanted[tag] != r + 1:
                    wanted[tag] = r + 1
                    all_tags += 1
                if hit_F[f] and found[tag] != r + 1:
                    found[tag] = r + 1
                    covered += 1
        if all_tags:
            share_R[r] = covered / all_tags
    return share_R


def recent_share(pick_RCB: np.ndarray, offset_R1: np.ndarray, budget: int) -> np.ndarray:
    """float64 (R, C): share of a channel's triggers that `recent` would take under this budget; NaN without picks."""
    chosen_RCB = pick_RCB >= 0
    recent_RCB = chosen_RCB & (pick_RCB - offset_R1[:-1, None, None] < budget)
    count_RC = chosen_RCB.sum(axis=2).astype(np.float64)
    count_RC[count_RC == 0] = np.nan
    return recent_RCB.sum(axis=2) / count_RC
