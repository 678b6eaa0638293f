import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_requests import (
    CONFIG,
    ITEMS,
    empty_requests,
    lists_of_request,
    made_channels,
    made_rule,
    made_shard,
)

from trainer.sequences import SequenceShard
from trainer.trigger_features import TriggerTable, trigger_table
from trainer.triggers import is_future_view, trigger_requests

NULL_MS = round(1000 * CONFIG.replay.null_watch_s)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def made_tags(seed):
    """Items of 0 to 3 tags, one of them twice at times; the first has tag 1 twice, the second once."""
    rng = np.random.default_rng(seed)
    tags_N = np.concatenate([[0, 2, 1], rng.integers(0, 4, ITEMS - 2)])
    offsets = np.concatenate([[0], np.cumsum(tags_N)]).astype(np.int32)
    tags = np.concatenate([[1, 1, 1], rng.integers(1, 5, offsets[-1] - 3)]).astype(np.int32)
    return SimpleNamespace(item_id_N=np.arange(ITEMS + 1) * 10, tag_offsets_N1=offsets,
                           tag_rows=tags, tag_rows_count=5)


def tags_of(catalogue, row):
    return set(catalogue.tag_rows[catalogue.tag_offsets_N1[row]:catalogue.tag_offsets_N1[row + 1]].tolist())


def table_of(shard, rule, channels, catalogue, requests=None):
    requests = trigger_requests(shard, 0, rule, CONFIG) if requests is None else requests
    return trigger_table(shard, requests, rule, channels.snapshots, channels.statistics, catalogue, CONFIG)


shards = st.builds(made_shard, st.integers(0, 10**6), users=st.integers(1, 4), longest=st.integers(1, 25),
                   items=st.sampled_from([3, 14]), times=st.sampled_from([3, 40, 400]),
                   effective=st.sampled_from([0.1, 0.7]), unknown=st.sampled_from([0.0, 0.2, 1.0]))
rules = st.builds(made_rule, every=st.integers(1, 3), per_user=st.integers(1, 4), triggers=st.integers(1, 8),
                  future_min_watch_s=st.sampled_from([None, 4.0]))


@given(shard=shards, rule=rules, seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_features_are_those_of_plain_loops(folder, shard, rule, seed):
    channels, catalogue = made_channels(folder, seed), made_tags(seed)
    table = table_of(shard, rule, channels, catalogue)
    requests, counts_E = table.requests, is_future_view(shard, rule)
    for t, r in enumerate(requests.request_T):
        row, event, now = requests.trigger_row_T[t], requests.trigger_event_T[t], requests.time_ms_R[r]
        past = range(shard.offset_U[requests.user_R[r]], requests.history_end_R[r])
        own = [e for e in past if shard.item_row_E[e] == row]
        assert event == own[-1] and all(shard.timestamp_ms_E[e] < now for e in past)
        same(table.watch_s_T[t], shard.watch_time_s_E[event])
        same(table.best_watch_s_T[t], max((w for w in shard.watch_time_s_E[own] if w == w), default=np.nan))
        assert table.views_T[t] == len(own)
        same(table.age_s_T[t], np.nan if shard.is_ordinal_E[event]
             else np.float32((now - shard.timestamp_ms_E[event]) / 1000))
        assert table.is_effective_T[t] == shard.is_effective_E[event]
        assert table.is_target_T[t] == shard.is_target_E[event]
        assert table.feedback["like"][t] == shard.feedback["like"][event]
        effective = [e for e in past if shard.is_effective_E[e]]
        shared = [e for e in effective if tags_of(catalogue, shard.item_row_E[e]) & tags_of(catalogue, row)]
        same(table.tag_share_T[t], np.float32(len(shared) / max(1, len(effective))))
        lists = lists_of_request(channels.snapshots, now, row)
        known = statistics_of(channels, now)
        same(table.popularity_T[t], np.float32(np.log1p(known.effective_views_N[row])))
        for c, items in enumerate(lists):
            check_list(table, t, c, items, known, now, scores_of(channels.snapshots, now, row, c))
            inside = [e for e in past if shard.item_row_E[e] in items]
            counted = [e for e in inside if counts_E[e]]
            watch = [NULL_MS if shard.watch_time_s_E[e] != shard.watch_time_s_E[e]
                     else round(1000 * float(shard.watch_time_s_E[e])) for e in counted]
            assert table.past_replay_ms_TC[t, c] == sum(watch)
            assert table.past_hits_TC[t, c] == len(counted)
            assert table.seen_TC[t, c] == len({shard.item_row_E[e] for e in inside})
            others = {item for place, other in enumerate(lists) if place != c for item in other}
            same(table.unique_share_TC[t, c], np.float32(len(set(items) - others) / (len(items) + 1e-6)))


def check_list(table, t, c, items, known, now, scores):
    n = len(items)
    assert table.length_TC[t, c] == n
    if not n:
        for name in ("top_score", "mean_score", "list_popularity", "list_age_s", "list_watch_s", "unique_share"):
            assert getattr(table, f"{name}_TC")[t, c] == 0
        return
    same(table.top_score_TC[t, c], max(scores))
    np.testing.assert_allclose(table.mean_score_TC[t, c], np.mean(scores), rtol=1e-6)
    np.testing.assert_allclose(table.list_popularity_TC[t, c],
                               np.mean([np.log1p(known.effective_views_N[i]) for i in items]), rtol=1e-6)
    np.testing.assert_allclose(table.list_watch_s_TC[t, c], np.mean(known.mean_watch_s_N[items]), rtol=1e-6)
    ages = [(now - known.first_seen_ms_N[i]) / 1000 if known.views_N[i] else 0 for i in items]
    np.testing.assert_allclose(table.list_age_s_TC[t, c], np.mean(ages), rtol=1e-6)


def statistics_of(channels, now):
    visible = [one.watermark_ms for found in channels.snapshots.snapshots for one in found
               if one.watermark_ms <= now - channels.snapshots.rollback_ms]
    return channels.statistics.at(max(visible, default=None))


def scores_of(snapshots, now, row, channel):
    visible = [n for n, one in enumerate(snapshots.snapshots[channel])
               if one.watermark_ms <= now - snapshots.rollback_ms]
    if not visible:
        return []
    lists = snapshots.lists(channel, visible[-1])
    return lists.score_L[lists.offset_N1[row]:lists.offset_N1[row + 1]].tolist()


def same(found, expected):
    np.testing.assert_array_equal(found, expected)


def with_other_future(shard, requests, r, seed):
    """The shard with everything at and after a request changed: rows of its user replaced and as many more put after
    them, the other users' rows replaced altogether."""
    rng = np.random.default_rng(seed)
    user, end = requests.user_R[r], requests.history_end_R[r]
    begin, last = shard.offset_U[user], shard.offset_U[user] + shard.length_U[user]
    keep = np.zeros(len(shard.item_row_E), bool)
    keep[begin:end] = True
    more = int(rng.integers(0, 6))
    source = np.concatenate([np.arange(last), np.full(more, max(last - 1, 0)), np.arange(last, len(keep))]).astype(int)
    keep = np.concatenate([keep[:last], np.zeros(more, bool), keep[last:]])
    change = np.flatnonzero(~keep)
    columns = {}
    for field in dataclasses.fields(SequenceShard):
        values = getattr(shard, field.name)
        if field.name.endswith("_E") and values is not None:
            columns[field.name] = values[source].copy()
    columns["item_row_E"][change] = rng.integers(0, ITEMS + 1, len(change))
    columns["watch_time_s_E"][change] = rng.exponential(50, len(change))
    columns["is_effective_E"][change] = rng.random(len(change)) < 0.5
    columns["is_target_E"][change] = rng.random(len(change)) < 0.5
    columns["is_ordinal_E"][change] = rng.random(len(change)) < 0.5
    own = slice(end, last + more)
    columns["timestamp_ms_E"][own] = np.sort(requests.time_ms_R[r] + rng.integers(0, 10**7, last + more - end))
    like = shard.feedback["like"][source].copy()
    like[change] = rng.integers(-1, 2, len(change))
    length_U = shard.length_U.copy()
    length_U[user] += more
    offset_U = shard.offset_U + more * (np.arange(len(length_U)) > user)
    return SequenceShard(user_id_U=shard.user_id_U, offset_U=offset_U, length_U=length_U, session_E=None,
                         feedback={"like": like}, **columns)


@given(shard=shards, rule=rules, seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_nothing_at_or_after_the_request_is_read(folder, shard, rule, seed):
    channels, catalogue = made_channels(folder, seed), made_tags(seed)
    requests = trigger_requests(shard, 0, rule, CONFIG)
    for r in range(len(requests)):
        other = with_other_future(shard, requests, r, seed)
        one = requests.take(np.array([r]))
        shift = other.offset_U[requests.user_R[r]] - shard.offset_U[requests.user_R[r]]
        assert shift == 0
        found = trigger_requests(other, 0, made_rule(cuts=((int(one.time_ms_R[0]), 2**60),), side=rule.side,
                                                     triggers=rule.triggers, min_future=0), CONFIG)
        again = found.take(found.user_R == one.user_R[0])
        same(again.trigger_event_T, one.trigger_event_T)
        first = table_of(shard, rule, channels, catalogue, one)
        assert_equal_tables(table_of(other, rule, channels, catalogue, again), first)


def assert_equal_tables(found: TriggerTable, expected: TriggerTable):
    for field in dataclasses.fields(TriggerTable):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "feedback":
            same(a["like"], b["like"])
        elif field.name not in ("requests", "channels"):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)


DTYPES = {"watch_s_T": "f4", "best_watch_s_T": "f4", "views_T": "i4", "age_s_T": "f4", "is_effective_T": "?",
          "is_target_T": "?", "popularity_T": "f4", "tag_share_T": "f4", "length_TC": "i4", "top_score_TC": "f4",
          "mean_score_TC": "f4", "list_popularity_TC": "f4", "list_age_s_TC": "f4", "list_watch_s_TC": "f4",
          "past_replay_ms_TC": "i8", "past_hits_TC": "i4", "seen_TC": "i4", "unique_share_TC": "f4"}


def test_shapes_types_and_no_requests(folder):
    channels, catalogue = made_channels(folder, 0), made_tags(0)
    shard, rule = made_shard(2, users=9, longest=30), made_rule()
    for requests in (trigger_requests(shard, 0, rule, CONFIG),
                     empty_requests(trigger_requests(shard, 0, rule, CONFIG))):
        table = table_of(shard, rule, channels, catalogue, requests)
        triggers = len(requests.trigger_row_T)
        for name, dtype in DTYPES.items():
            values = getattr(table, name)
            assert values.dtype == np.dtype(dtype), name
            assert values.shape == ((triggers, 3) if name.endswith("TC") else (triggers,)), name
        for name in DTYPES:
            if name.endswith("TC"):
                assert np.isfinite(getattr(table, name)).all(), name
        assert table.channels == tuple(CONFIG.channels.names)


def test_no_tags_no_share(folder):
    catalogue = SimpleNamespace(item_id_N=np.arange(ITEMS + 1), tag_offsets_N1=np.zeros(ITEMS + 2, np.int32),
                                tag_rows=np.zeros(0, np.int32), tag_rows_count=1)
    table = table_of(made_shard(2, users=9, longest=30), made_rule(), made_channels(folder, 0), catalogue)
    assert len(table.tag_share_T) and not table.tag_share_T.any()


def test_requests_of_the_same_user_see_their_own_past(folder):
    """The items a user meets between two requests count for the later one alone."""
    shard, rule = made_shard(11, users=12, longest=60, times=400), made_rule(per_user=4)
    table = table_of(shard, rule, made_channels(folder, 1), made_tags(1))
    requests = table.requests
    several = np.flatnonzero(np.bincount(requests.user_R) > 1)
    assert len(several)
    for r in range(len(requests)):
        one = table_of(shard, rule, made_channels(folder, 1), made_tags(1), requests.take(np.array([r])))
        mine = slice(requests.trigger_offset_R1[r], requests.trigger_offset_R1[r + 1])
        for name in DTYPES:
            same(getattr(table, name)[mine], getattr(one, name))
