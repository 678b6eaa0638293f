import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_requests import (
    CONFIG,
    ITEMS,
    T0,
    empty_requests,
    lists_of_request,
    made_channels,
    made_rule,
    made_shard,
)

from trainer import neighbors, replay
from trainer.neighbors import NeighborLists
from trainer.replay import (
    future_items,
    hits,
    rewards_ms,
    unique_counts,
    unique_of,
    unique_share,
    watch_ms,
)
from trainer.triggers import is_future_view, trigger_requests

NULL_S = 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


def naive_future(shard, requests, is_future_E, r, window):
    events = [e for e in range(requests.history_end_R[r], requests.future_end_R[r]) if is_future_E[e]]
    return events if window is None else events[:window]


def naive_ms(shard, event, null_watch_s):
    watch = float(shard.watch_time_s_E[event])
    return round(1000 * (null_watch_s if watch != watch else watch))


def requests_of(shard, rule):
    return trigger_requests(shard, 0, rule, CONFIG)


shards = st.builds(made_shard, st.integers(0, 10**6), users=st.integers(1, 5), longest=st.integers(1, 40),
                   items=st.sampled_from([3, 14]), times=st.sampled_from([3, 40, 400]))
rules = st.builds(made_rule, every=st.integers(1, 3), per_user=st.integers(1, 5), triggers=st.integers(1, 8),
                  future_min_watch_s=st.sampled_from([None, 4.0]),
                  cuts=st.sampled_from([None, ((T0 + 12_000_000, T0 + 18_000_000),),
                                        ((T0 + 6_000_000, T0 + 9_000_000), (T0 + 15_000_000, T0 + 2**40))]))


@pytest.mark.parametrize("room", [0, replay.ROOM_A_GROUP])  # no room at first: it grows
@given(shard=shards, rule=rules, seed=st.integers(0, 5),
       windows=st.lists(st.integers(1, 50), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_rewards_are_those_of_sets(room, folder, shard, rule, seed, windows):
    snapshots = made_channels(folder, seed).snapshots
    requests, is_future_E = requests_of(shard, rule), is_future_view(shard, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "ROOM_A_GROUP", room)
        reward_WTC = rewards_ms(shard, requests, is_future_E, snapshots, windows, NULL_S)
    expected_WTC = np.zeros_like(reward_WTC)
    for k, window in enumerate(windows):
        for t, r in enumerate(requests.request_T):
            events = naive_future(shard, requests, is_future_E, r, window)
            lists = lists_of_request(snapshots, requests.time_ms_R[r], requests.trigger_row_T[t])
            for c, items in enumerate(lists):
                expected_WTC[k, t, c] = sum(naive_ms(shard, e, NULL_S) for e in events
                                            if shard.item_row_E[e] in set(items))
    assert reward_WTC.dtype == np.int64 and reward_WTC.shape == (len(windows), len(requests.trigger_row_T), 3)
    np.testing.assert_array_equal(reward_WTC, expected_WTC)


@given(shard=shards, rule=rules, seed=st.integers(0, 5), window=st.sampled_from([1, 4, None]))
@settings(max_examples=40, deadline=None)
def test_hits_name_the_views_behind_the_rewards(folder, shard, rule, seed, window):
    snapshots = made_channels(folder, seed).snapshots
    requests, is_future_E = requests_of(shard, rule), is_future_view(shard, rule)
    future = future_items(shard, requests, is_future_E, window, NULL_S)
    for r in range(len(requests)):
        events = naive_future(shard, requests, is_future_E, r, window)
        mine = slice(future.offset_R1[r], future.offset_R1[r + 1])
        assert future.event_V[mine].tolist() == events
        assert future.row_V[mine].tolist() == shard.item_row_E[events].tolist()
        assert future.watch_ms_V[mine].tolist() == [naive_ms(shard, e, NULL_S) for e in events]
    found = hits(shard, requests, is_future_E, snapshots, window)
    reward_TC = rewards_ms(shard, requests, is_future_E, snapshots, [window or 10**6], NULL_S)[0]
    for t, r in enumerate(requests.request_T):
        lists = lists_of_request(snapshots, requests.time_ms_R[r], requests.trigger_row_T[t])
        for c, items in enumerate(lists):
            at = slice(*found.offset_TC1[3 * t + c:3 * t + c + 2])
            expected = [(v, items.index(future.row_V[v])) for v in range(*future.offset_R1[r:r + 2])
                        if future.row_V[v] in items]
            assert list(zip(found.view_H[at], found.rank_H[at], strict=True)) == expected
            assert future.watch_ms_V[found.view_H[at]].sum() == reward_TC[t, c]


@given(shard=shards, rule=rules, seed=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_unique_items_are_those_of_sets(folder, shard, rule, seed):
    snapshots = made_channels(folder, seed).snapshots
    requests = requests_of(shard, rule)
    unique_TC, length_TC = unique_counts(requests, snapshots)
    for t, r in enumerate(requests.request_T):
        lists = lists_of_request(snapshots, requests.time_ms_R[r], requests.trigger_row_T[t])
        for c, items in enumerate(lists):
            others = {item for place, other in enumerate(lists) if place != c for item in other}
            assert unique_TC[t, c] == len(set(items) - others) and length_TC[t, c] == len(items)
    rho_TC = unique_share(unique_TC, length_TC)
    assert rho_TC.dtype == np.float32 and (rho_TC[length_TC == 0] == 0).all() and (rho_TC <= 1).all()


def test_uniqueness_is_found_for_all_items_once_as_many_were_asked_for(folder):
    made, shard = made_channels(folder, 77), made_shard(3, users=4, longest=30)
    snapshots, requests = made.snapshots, requests_of(shard, made_rule())
    state_SC, _ = snapshots.states(requests.time_ms_R)

    def kept():
        """What is kept of each state; nothing is made by asking."""
        return [snapshots.kept(state_C, lambda: pytest.fail("made anew"), 0, ITEMS + 1) for state_C in state_SC]

    alone = unique_counts(requests.take(np.arange(1)), snapshots)
    assert all(one is None for one in kept())  # these rows alone
    whole = [unique_counts(requests, snapshots) for _ in range(40)]
    assert all(one.shape == (2, ITEMS + 1, len(snapshots.names)) for one in kept())
    again = unique_counts(requests, snapshots)
    for these_TC, once_TC, first_TC in zip(again, whole[0], alone, strict=True):
        np.testing.assert_array_equal(these_TC, once_TC)
        np.testing.assert_array_equal(these_TC[:len(first_TC)], first_TC)


def test_what_is_kept_of_states_is_bounded(folder, monkeypatch):
    snapshots, made = made_channels(folder, 78).snapshots, []
    monkeypatch.setattr(neighbors, "KEPT_BYTES", 200)

    def ask(state, asked=10):
        state_C = np.array([state, 0])
        return snapshots.kept(state_C, lambda: made.append(state) or np.full(10, state, np.int64), asked, 10)

    assert ask(0, 9) is None and not made
    assert ask(0, 1).tolist() == [0] * 10 and made == [0]
    ask(1), ask(0), ask(2)  # 80 bytes each: two fit, the one that was used longest ago goes
    assert made == [0, 1, 2]
    ask(0), ask(2)
    assert made == [0, 1, 2]
    assert ask(1, 9) is None  # gone, and counted from the beginning
    ask(1, 1)
    assert made == [0, 1, 2, 1]
    monkeypatch.setattr(neighbors, "KEPT_BYTES", 0)
    ask(3), ask(3)
    assert made == [0, 1, 2, 1, 3]  # one stays, however large


def test_uniqueness_does_not_depend_on_the_block(folder, monkeypatch):
    snapshots = made_channels(folder, 0).snapshots
    lists, row_X = [snapshots.lists(c, 1) for c in range(3)], np.arange(15)
    whole = unique_of(row_X, lists)
    monkeypatch.setattr("trainer.replay.ROWS_AT_ONCE", 4)
    np.testing.assert_array_equal(unique_of(row_X, lists), whole)
    assert unique_of(row_X[:0], lists).shape == (0, 3)
    empty = unique_of(row_X, [lists[0], NeighborLists.empty(15)])
    np.testing.assert_array_equal(empty[:, 0], lists[0].length_N)


@given(st.integers(1, 900).flatmap(lambda span: st.tuples(
    st.just(span), st.lists(st.integers(0, span - 1), unique=True, max_size=120), st.integers(0, 3))))
def test_views_are_sorted_by_bits_and_by_comparing_alike(drawn):
    span, views, before = drawn
    bits = np.zeros((span + 63) >> 6, np.uint64)
    values = np.array([7] * before + views + [5], np.int32)
    replay._sort_distinct(values, before, before + len(views), bits, len(bits))
    assert values.tolist() == [7] * before + sorted(views) + [5] and not bits.any()


def test_no_requests_and_no_windows(folder):
    snapshots = made_channels(folder, 0).snapshots
    shard, rule = made_shard(1), made_rule()
    none, is_future_E = empty_requests(requests_of(shard, rule)), is_future_view(shard, rule)
    assert rewards_ms(shard, none, is_future_E, snapshots, [5, 6], 0.0).shape == (2, 0, 3)
    assert unique_counts(none, snapshots)[0].shape == (0, 3)
    assert hits(shard, none, is_future_E, snapshots, 5).offset_TC1.tolist() == [0]
    assert future_items(shard, none, is_future_E, None).offset_R1.tolist() == [0]


def test_milliseconds_are_rounded_once():
    watch = np.array([0.0005, 0.0015, 3.0, np.nan, 86_400], np.float32)
    assert watch_ms(watch, 163.0).tolist() == [round(1000 * float(w)) for w in watch[:3]] + [163_000, 86_400_000]


def test_views_before_the_request_and_after_the_window_do_not_count(folder):
    snapshots = made_channels(folder, 3).snapshots
    shard, rule = made_shard(5, users=30, longest=60), made_rule(per_user=2)
    requests, is_future_E = requests_of(shard, rule), is_future_view(shard, rule)
    before = rewards_ms(shard, requests, is_future_E, snapshots, [3], NULL_S)
    assert (before > 0).any()
    for r in range(len(requests)):
        one = requests.take(np.array([r]))
        watch_E = shard.watch_time_s_E.copy()
        inside = naive_future(shard, requests, is_future_E, r, 3)
        watch_E[np.setdiff1d(np.arange(len(watch_E)), inside)] = 999
        changed = shard.__class__(**{**shard.__dict__, "watch_time_s_E": watch_E})
        np.testing.assert_array_equal(rewards_ms(changed, one, is_future_E, snapshots, [3], NULL_S),
                                      rewards_ms(shard, one, is_future_E, snapshots, [3], NULL_S))
