"""Routing against plain references over sets and lists: picks, joint assignment, interleaving, recall, uniqueness."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import routing
from trainer.neighbors import NeighborLists
from trainer.routing import NEVER, NONE


@st.composite
def blocks(draw):
    """Requests with triggers, padded lists (some empty), futures with repeats, and scores with ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    requests, channels, top = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    items = draw(st.integers(6, 20))
    offset_R1 = np.concatenate([[0], np.cumsum(rng.integers(0, 7, requests))]).astype(np.int64)
    list_TCL = np.zeros((offset_R1[-1], channels, top), np.int32)
    for t in range(offset_R1[-1]):
        for c in range(channels):
            length = rng.integers(0, top + 1)
            list_TCL[t, c, :length] = 1 + rng.permutation(items - 1)[:length]
    score_TC = rng.integers(0, 3, (offset_R1[-1], channels)).astype(float)
    score_TC[rng.random(score_TC.shape) < 0.1] = np.nan
    view_R1 = np.concatenate([[0], np.cumsum(rng.integers(0, 6, requests))]).astype(np.int64)
    row_V = rng.integers(0, items, view_R1[-1]).astype(np.int32)
    ms_V = rng.integers(0, 9000, view_R1[-1])
    return offset_R1, list_TCL, score_TC, view_R1, row_V, ms_V


def naive_top(score_T, begin, budget):
    key = [(-(-np.inf if np.isnan(s) else s), t) for t, s in enumerate(score_T)]
    return [begin + t for _, t in sorted(key)[:budget]]


def naive_ranked(picks, list_TCL, c):
    ranked, source = [], []
    for place in range(list_TCL.shape[2]):
        for t in picks:
            item = list_TCL[t, c, place]
            if item and item not in ranked:
                ranked.append(item)
                source.append(t)
    return ranked, source


@settings(max_examples=60, deadline=None)
@given(blocks(), st.integers(1, 8))
def test_picks_and_ranked_lists_equal_plain_ones(block, budget):
    offset_R1, list_TCL, score_TC, *_ = block
    pick_RCB = routing.top_picks(score_TC, offset_R1, budget)
    ranked = routing.interleave(pick_RCB, list_TCL)
    for r in range(len(offset_R1) - 1):
        for c in range(list_TCL.shape[1]):
            begin, end = offset_R1[r], offset_R1[r + 1]
            picks = naive_top(score_TC[begin:end, c], begin, budget)
            assert pick_RCB[r, c].tolist() == picks + [NONE] * (budget - len(picks))
            items, source = naive_ranked(picks, list_TCL, c)
            assert ranked.length_RC[r, c] == len(items)
            assert ranked.item_RCX[r, c, :len(items)].tolist() == items and not ranked.item_RCX[r, c, len(items):].any()
            assert ranked.source_RCX[r, c, :len(items)].tolist() == source


@settings(max_examples=60, deadline=None)
@given(blocks(), st.integers(1, 4), st.integers(1, 6))
def test_recall_uniqueness_and_hits_equal_sets(block, budget, window):
    offset_R1, list_TCL, score_TC, view_R1, row_V, ms_V = block
    at = [1, 2, 3, 100, NEVER]
    pick_RCB = routing.top_picks(score_TC, offset_R1, budget)
    ranked = routing.interleave(pick_RCB, list_TCL)
    future = routing.future_of(view_R1, row_V, ms_V)
    rank_FC = routing.future_ranks(ranked, future)
    uniq_RCK, union_RK = routing.overlaps(ranked, at)
    united_KR = routing.recall(rank_FC.min(axis=1), future, at, window)
    watch_KR = routing.hit_watch_s(rank_FC.min(axis=1), future, at, window)
    for r in range(len(offset_R1) - 1):
        views = [int(v) for v in row_V[view_R1[r]:view_R1[r + 1]]][:window]
        ms = ms_V[view_R1[r]:view_R1[r + 1]][:window]
        wanted = set(views)
        lists = [ranked.item_RCX[r, c, :ranked.length_RC[r, c]].tolist() for c in range(list_TCL.shape[1])]
        for k, cut in enumerate(at):
            firsts = [set(one[:cut]) for one in lists]
            found = set().union(*firsts)
            assert union_RK[r, k] == len(found)
            same(united_KR[k, r], len(found & wanted) / len(wanted) if wanted else np.nan)
            hits = [m for v, m in zip(views, ms, strict=True) if v in found]
            same(watch_KR[k, r], sum(hits) / len(hits) / 1000 if hits else np.nan)
            for c, first in enumerate(firsts):
                others = set().union(*(other for o, other in enumerate(firsts) if o != c))
                same(uniq_RCK[r, c, k], len(first - others) / len(first) if first else np.nan)
                own = routing.recall(rank_FC[:, c], future, [cut], window)[0, r]
                same(own, len(first & wanted) / len(wanted) if wanted else np.nan)


def same(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(blocks(), st.integers(1, 4))
def test_found_by_position_adds_up_to_recall(block, budget):
    offset_R1, list_TCL, score_TC, view_R1, row_V, ms_V = block
    ranked = routing.interleave(routing.top_picks(score_TC, offset_R1, budget), list_TCL)
    future = routing.future_of(view_R1, row_V, ms_V)
    rank_FC = routing.future_ranks(ranked, future)
    position_T = np.concatenate([np.arange(1, n + 1) for n in np.diff(offset_R1)] or [np.zeros(0, int)])
    band_BR = routing.found_by_position(rank_FC, ranked, future, position_T, (1, 2, 4), 100)
    np.testing.assert_allclose(band_BR.sum(axis=0), routing.recall(rank_FC.min(axis=1), future, [NEVER])[0])
    for r in range(len(offset_R1) - 1):
        for f in range(future.offset_R1[r], future.offset_R1[r + 1]):
            if rank_FC[f].min() < NEVER:
                c = int(rank_FC[f].argmin())
                t = ranked.source_RCX[r, c, rank_FC[f, c]]
                assert future.row_F[f] in list_TCL[t, c]


def naive_spread(score_T, lists_TL, weight_TL, budget, overlap):
    """Every trigger computed anew for every pick; triggers of one request in one channel."""
    picks, held = [], set()

    def worth(t):
        weights = [(item, float(w)) for item, w in zip(lists_TL[t], weight_TL[t], strict=True) if item]
        total, repeated = sum(w for _, w in weights), sum(w for item, w in weights if item in held)
        score = -np.inf if np.isnan(score_T[t]) else score_T[t]
        return score - overlap * (repeated / total if total > 0 else 0.0)

    for _ in range(min(budget, len(score_T))):
        picks.append(max((t for t in range(len(score_T)) if t not in picks), key=lambda t: (worth(t), -t)))
        held |= {int(item) for item in lists_TL[picks[-1]] if item}
    return picks


@settings(max_examples=80, deadline=None)
@given(blocks(), st.integers(1, 8), st.sampled_from([0.0, 0.25, 1.0, 3.0]), st.booleans(), st.integers(0, 2**32))
def test_spread_picks_equal_a_naive_greedy(block, budget, overlap, plain, seed):
    offset_R1, list_TCL, score_TC, *_ = block
    rng = np.random.default_rng(seed)
    weight_TCL = (np.ones(list_TCL.shape) if plain else rng.choice([0.0, 0.1, 0.5, 0.7], list_TCL.shape)
                  ).astype(np.float32)
    got = routing.spread_picks(score_TC, offset_R1, list_TCL, weight_TCL, budget, overlap)
    for r in range(len(offset_R1) - 1):
        begin, end = offset_R1[r], offset_R1[r + 1]
        for c in range(list_TCL.shape[1]):
            wanted = naive_spread(score_TC[begin:end, c], list_TCL[begin:end, c], weight_TCL[begin:end, c], budget,
                                  overlap)
            assert got[r, c].tolist() == [begin + t for t in wanted] + [NONE] * (budget - len(wanted))
    if overlap == 0:
        assert got.tolist() == routing.top_picks(score_TC, offset_R1, budget).tolist()
    smaller = routing.spread_picks(score_TC, offset_R1, list_TCL, weight_TCL, 2, overlap)
    assert smaller[:, :, :budget].tolist() == got[:, :, :2].tolist()


def test_a_repeated_list_waits_for_its_turn():
    """The second best trigger brings what the best one brought: worth 0.8 - 0.3, less than the third one's 0.6."""
    list_TCL = np.array([[[1, 2]], [[2, 1]], [[3, 4]]], np.int32)
    arguments = np.array([[0.9], [0.8], [0.6]]), np.array([0, 3]), list_TCL, np.ones(list_TCL.shape), 3
    assert routing.spread_picks(*arguments, 0.3)[0, 0].tolist() == [0, 2, 1]
    assert routing.spread_picks(*arguments, 0.1)[0, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 0"):
        routing.spread_picks(*arguments, -0.1)


@settings(max_examples=40, deadline=None)
@given(blocks(), st.integers(1, 4), st.integers(1, 12))
def test_a_cut_union_is_dealt_out_in_turn(block, budget, cut):
    offset_R1, list_TCL, score_TC, view_R1, row_V, ms_V = block
    ranked = routing.interleave(routing.top_picks(score_TC, offset_R1, budget), list_TCL)
    future = routing.future_of(view_R1, row_V, ms_V)
    rank_F, request_F = routing.united_ranks(ranked, future), future.request_F
    _, union_RK = routing.overlaps(ranked, [cut])
    for r in range(len(offset_R1) - 1):
        lists = [ranked.item_RCX[r, c, :ranked.length_RC[r, c]].tolist() for c in range(list_TCL.shape[1])]
        united = []
        for x in range(max(map(len, lists))):
            united += [one[x] for one in lists if x < len(one)]
        united = list(dict.fromkeys(united))
        wanted = [united.index(row) if row in united else NEVER for row in future.row_F[request_F == r]]
        assert rank_F[request_F == r].tolist() == wanted
        assert set(united[:union_RK[r, 0]]) == set().union(*(one[:cut] for one in lists))


def naive_joint(chance_TCL, offset_R1, list_TCL, quota, least, most, by_max):
    """Every pair computed anew at every step."""
    channels, found = list_TCL.shape[1], []
    for r in range(len(offset_R1) - 1):
        begin, end = offset_R1[r], offset_R1[r + 1]
        floor, ceiling = min(least, end - begin), min(most, end - begin)
        left, picks = {}, [[] for _ in range(channels)]

        def probability(t, c, place):
            return float(chance_TCL[t, c, place]) if chance_TCL[t, c, place] > 0 else 0.0

        def adds(t, c, left=left, probability=probability):
            total = 0.0
            for place, item in enumerate(list_TCL[t, c]):
                if not item:
                    break
                p, rest = probability(t, c, place), left.get(item, 1.0)
                total += max(p - (1.0 - rest), 0.0) if by_max else p * rest
            return total

        for step in range(min(quota, ceiling * channels)):
            owed = sum(max(floor - len(p), 0) for p in picks)
            pairs = [(t, c) for t in range(begin, end) for c in range(channels)
                     if t not in picks[c] and len(picks[c]) < ceiling
                     and not (owed >= quota - step and len(picks[c]) >= floor)]
            t, c = max(pairs, key=lambda pair: (adds(*pair), -pair[0], -pair[1]))
            picks[c].append(t)
            for place, item in enumerate(list_TCL[t, c]):
                if not item:
                    break
                p, rest = probability(t, c, place), left.get(item, 1.0)
                left[item] = min(rest, 1.0 - p) if by_max else rest * (1.0 - p)
        found.append(picks)
    return found


@settings(max_examples=80, deadline=None)
@given(blocks(), st.integers(1, 5), st.integers(0, 5), st.integers(0, 5), st.booleans(), st.integers(0, 2**32))
def test_lazy_greedy_equals_the_naive_one(block, budget, below, above, by_max, seed):
    offset_R1, list_TCL, score_TC, *_ = block
    rng = np.random.default_rng(seed)
    channels = list_TCL.shape[1]
    quota, least, most = budget * channels, max(budget - below, 0), budget + above
    values = rng.choice([0.0, 0.25, 0.5, 1.0, np.nan], list_TCL.shape) if seed % 2 else rng.random(list_TCL.shape)
    chance_TCL = values.astype(np.float32)
    cover = "max" if by_max else "product"
    got = routing.joint_picks(chance_TCL, offset_R1, list_TCL, quota, least, most, cover)
    wanted = naive_joint(chance_TCL, offset_R1, list_TCL, quota, least, most, by_max)
    for r, picks in enumerate(wanted):
        for c in range(channels):
            assert [int(t) for t in got[r, c] if t != NONE] == [int(t) for t in picks[c]]


def test_joint_values_an_item_once():
    """Two triggers with the same list: the second one adds nothing, so a worse list with other items is taken."""
    list_TCL = np.array([[[1, 2]], [[1, 2]], [[3, 4]]], np.int32)
    chance_TCL = np.array([[[0.9, 0.9]], [[0.9, 0.9]], [[0.3, 0.3]]])
    got = routing.joint_picks(chance_TCL, np.array([0, 3]), list_TCL, 2)
    assert got[0, 0].tolist() == [0, 2]
    with pytest.raises(ValueError, match="does not fit"):
        routing.joint_picks(chance_TCL, np.array([0, 3]), list_TCL, 2, least=3)


def test_smaller_budgets_are_the_first_of_larger_ones():
    score_TC = np.array([[1.0], [3.0], [3.0], [2.0]])
    large = routing.top_picks(score_TC, np.array([0, 4]), 4)
    assert large[0, 0].tolist() == [1, 2, 3, 0]
    assert routing.top_picks(score_TC, np.array([0, 4]), 2)[0, 0].tolist() == [1, 2]


def test_padded_lists():
    lists = NeighborLists(np.array([0, 0, 2, 3]), np.array([2, 1, 1], np.int32), np.ones(3, np.float32))
    got = routing.padded_lists([lists, NeighborLists.empty(3)], np.array([2, 0, 1]), 2)
    assert got[:, 0].tolist() == [[1, 0], [0, 0], [2, 1]] and not got[:, 1].any()


def test_tags_covered():
    future = routing.future_of(np.array([0, 3, 4]), np.array([1, 2, 1, 3], np.int32), np.zeros(4, np.int64))
    offsets, tags = np.array([0, 0, 2, 3, 3]), np.array([1, 2, 2], np.int32)
    got = routing.tags_covered(np.array([False, True, True]), future, offsets, tags, 4)
    assert got[0] == 0.5 and np.isnan(got[1])


def test_recent_share():
    pick_RCB = np.array([[[0, 4], [1, NONE]], [[NONE, NONE], [6, 5]]], np.int32)
    got = routing.recent_share(pick_RCB, np.array([0, 5, 7]), 2)
    np.testing.assert_allclose(got, [[0.5, 1.0], [np.nan, 1.0]])
