"""Batches against a plain loop over positions, features against the catalogue, and the thread that makes them."""

import math
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_views import HOUR_MS, made_catalogue, made_views

from trainer.batches import GAP_BUCKETS, GAP_MAX_S, HOURS, Collation, ItemFeatures, Prefetched
from trainer.catalogue import UserFeatures
from trainer.conditions import WatchBuckets, returns
from trainer.windows import BatchRows, EpochPlan, WindowRule, Windows, count_windows, cut_windows

ITEMS = 12
NAN = float("nan")
LOG_Q_N = np.log(np.arange(1, ITEMS + 1) / 100).astype(np.float32)
LOG_Q = {round(float(value), 5): row for row, value in enumerate(LOG_Q_N)}  # the item by its log q


def features(**catalogue):
    return ItemFeatures(made_catalogue(ITEMS, **catalogue), LOG_Q_N)


def collation(kind="next", dropout=0.0, offset_h=0, positions=8):
    return Collation(kind, WatchBuckets(20, 300.0), dropout, offset_h * HOUR_MS, positions)


# --------------------------------------------------------------------------------------------------------- the items

@pytest.mark.parametrize("content", [True, False])
@given(rows=st.lists(st.integers(0, ITEMS - 1), max_size=9), seed=st.integers(0, 50))
def test_features_are_the_catalogues(content, rows, seed):
    catalogue = made_catalogue(ITEMS, seed, content=content)
    log_q_N = np.arange(ITEMS).astype(np.float32)
    batch = ItemFeatures(catalogue, log_q_N).take(np.array(rows, np.int64))
    assert batch.features.keys() == ["item", "author", "category_genre", "tag"]
    wanted_tags = [catalogue.tag_rows[catalogue.tag_offsets_N1[r]:catalogue.tag_offsets_N1[r + 1]].tolist()
                   for r in rows]
    tags = batch.features["tag"]
    assert tags.lengths().tolist() == [len(t) for t in wanted_tags]  # items without tags too
    assert tags.values().tolist() == [t for ts in wanted_tags for t in ts]
    assert batch.tag_item_T.tolist() == [i for i, ts in enumerate(wanted_tags) for _ in ts]
    for name, column in (("item", np.arange(ITEMS)), ("author", catalogue.author_row_N),
                         ("category_genre", catalogue.categories["genre"])):
        assert batch.features[name].values().tolist() == column[rows].tolist() if rows else True
        assert batch.features[name].lengths().tolist() == [1] * len(rows)
    assert batch.features.values().dtype == torch.int64
    assert batch.row_U.tolist() == rows and batch.log_q_U.tolist() == [float(r) for r in rows]
    assert batch.duration_bucket_U.tolist() == [int(catalogue.duration_bucket_N[r]) for r in rows]
    if not content:
        assert batch.content_UC is None
    else:
        assert batch.content_UC.dtype == torch.float32
        content_UC = batch.content_UC.numpy().reshape(-1, 4)
        np.testing.assert_array_equal(content_UC, catalogue.content_NC[rows].reshape(-1, 4))


def test_a_catalogue_without_a_single_tag():
    catalogue = made_catalogue(ITEMS, categories=())
    catalogue.tag_offsets_N1, catalogue.tag_rows = np.zeros(ITEMS + 1, np.int32), np.zeros(0, np.int32)
    batch = ItemFeatures(catalogue, np.zeros(ITEMS)).take(np.array([3, 1]))
    assert batch.features["tag"].lengths().tolist() == [0, 0] and len(batch.tag_item_T) == 0
    assert batch.features.keys() == ["item", "author", "tag"]


@given(st.lists(st.integers(0, ITEMS - 1), max_size=4), st.lists(st.integers(-3, 12), max_size=6))
def test_users_stand_behind_the_items_and_unknown_ones_have_row_0(rows, users):
    known = UserFeatures(np.array([1, 4, 9]), {"city": np.array([3, 1, 2], np.int32)}, {"city": 4})
    made = ItemFeatures(made_catalogue(ITEMS), np.zeros(ITEMS), known)
    plain = features().take(np.array(rows, np.int64)).features
    batch = made.take(np.array(rows, np.int64), np.array(users, np.int64)).features
    assert batch.keys() == [*plain.keys(), "user_city"]
    assert batch["user_city"].values().tolist() == [{1: 3, 4: 1, 9: 2}.get(user, 0) for user in users]
    assert batch["user_city"].lengths().tolist()[:len(users)] == [1] * len(users)
    for key in plain.keys():
        assert batch[key].values().tolist() == plain[key].values().tolist()
        assert batch[key].lengths().tolist()[:len(rows)] == plain[key].lengths().tolist()
        assert not any(batch[key].lengths().tolist()[len(rows):])
    assert made.take(np.array(rows, np.int64)).features["user_city"].values().tolist() == []  # the index asks without


# --------------------------------------------------------------------------------------------------- the plain loops

def naive_gap(gap_ms):
    seconds = min(max(gap_ms / 1000, 0.0), GAP_MAX_S)
    return 1 + min(math.floor(math.log1p(seconds) / math.log1p(GAP_MAX_S) * GAP_BUCKETS), GAP_BUCKETS - 1)


def naive_position(c, views, event, i, *, item, watch, time_ms, ordinal, before):
    """What is known of one position: item row, watch bucket, hour and gap."""
    gap = 0
    if i > 0 and not ordinal and not views.ordinal_E[before]:
        gap = naive_gap(int(time_ms) - int(views.timestamp_ms_E[before]))
    hour = 0 if ordinal else 1 + int((time_ms + c.utc_offset_ms) // HOUR_MS % HOURS)
    return item, int(c.buckets.encode(np.array(watch))), hour, gap


def told(batch):
    """Windows of (item row, watch bucket, hour, gap, condition bucket, whether it is read)."""
    row_U = batch.items.row_U.numpy()
    read = set(batch.read_R.tolist())  # group by group of negatives, in order within each
    windows = [[] for _ in range(batch.windows)]
    for v, place in enumerate(batch.place_V.tolist()):
        window, position = divmod(place, batch.positions)
        assert position == len(windows[window])  # from the first position on, without a gap
        windows[window].append((int(row_U[batch.item_V[v]]), int(batch.watch_bucket_V[v]), int(batch.hour_V[v]),
                                int(batch.gap_V[v]), int(batch.condition_bucket_V[v]), v in read))
    assert len(read) == len(batch.read_R)
    parts = batch.read_R.split(batch.targets_per_group) if batch.targets_per_rank else [batch.read_R]
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert batch.items.row_U.tolist() == sorted({p[0] for w in windows for p in w})  # each item once, none for nothing
    return windows


kinds = st.sampled_from(["next", "to_go", "prefix", "none"])


@st.composite
def window_rows(draw):
    views = made_views(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)), draw(st.integers(0, 9999)))
    history = draw(st.integers(1, 7))
    windows = cut_windows(views, WindowRule(history, draw(st.integers(1, history + 1))), np.random.default_rng(0))
    return views, windows, history + 1


@settings(max_examples=60)
@given(window_rows(), kinds, st.integers(-14, 14), st.sampled_from([0.0, 0.4, 1.0]), st.integers(1, 3),
       st.integers(0, 99))
def test_training_windows_are_those_of_a_plain_loop(made, kind, offset_h, dropout, workers, seed):
    views, windows, positions = made
    c = collation(kind, dropout, offset_h, positions)
    keep = np.random.default_rng(seed).random((len(windows), positions)) >= dropout
    for rank in range(min(workers, len(windows))):
        mine = windows.take(slice(rank, None, workers))
        # The windows of a batch may come from several groups of shards.
        cut = len(mine) // 2
        parts = [(views, mine.take(slice(0, cut))), (views, mine.take(slice(cut, None)))]
        rows = BatchRows([p for p in parts if len(p[1])], len(windows), rank, workers)
        batch = c.window_batch(features(), rows, np.random.default_rng(seed))
        got = told(batch)
        assert len(got) == len(mine) == len(batch.user_B)
        for b in range(len(mine)):
            begin, end, first = mine.begin_W[b], mine.end_W[b], mine.first_target_W[b]
            watch = views.watch_s_E[begin:end].astype(float)
            kept = keep[rank + b * workers, :end - begin]
            condition = np.where(kept, watch, NAN)
            wanted_s = np.full(end - begin, NAN) if kind == "none" else returns(
                kind, watch[None], condition[None], np.array([end - begin]))[0]
            bucket = c.buckets.encode(wanted_s)
            for i, event in enumerate(range(begin, end)):
                known = naive_position(c, views, event, i, item=views.item_row_E[event], watch=watch[i],
                                       time_ms=views.timestamp_ms_E[event], ordinal=views.ordinal_E[event],
                                       before=event - 1)
                assert got[b][i] == (*known, bucket[i], event >= first)
            assert len(got[b]) == end - begin
            assert views.user_id_U[views.owner_E()[begin]] == batch.user_B[b]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), kinds, st.integers(-14, 14), st.integers(0, 9999),
       st.data())
def test_requests_are_those_of_a_plain_loop(lengths, kind, offset_h, seed, data):
    views = made_views(lengths, seed)
    asking = np.array(data.draw(st.lists(st.integers(0, sum(lengths) - 1), min_size=1, max_size=5)))
    history = data.draw(st.integers(1, 6))
    offset = views.offset_U[views.owner_E()[asking]]
    begin, condition = np.maximum(offset, asking - history), np.array([
        data.draw(st.sampled_from([NAN, 5.0, 60.0, 1e5])) for _ in asking])
    time_ms = views.timestamp_ms_E[asking]
    c = collation(kind, 0.5, offset_h, history + 1)  # requests are never dropped
    ordinal = np.array([data.draw(st.booleans()) for _ in asking])
    batch = c.request_batch(features(), views, begin, asking, time_ms, condition, ordinal)
    for q, window in enumerate(told(batch)):
        watch = np.append(views.watch_s_E[begin[q]:asking[q]].astype(float), NAN)
        asked = np.append(watch[:-1], condition[q])
        length = len(watch)
        wanted_s = np.full(length, NAN) if kind == "none" else returns(kind, watch[None], asked[None],
                                                                       np.array([length]))[0]
        bucket = c.buckets.encode(wanted_s)
        assert len(window) == length
        for i in range(length):
            event, last = begin[q] + i, i == length - 1
            known = naive_position(c, views, event, i, item=0 if last else views.item_row_E[event], watch=watch[i],
                                   time_ms=time_ms[q] if last else views.timestamp_ms_E[event],
                                   ordinal=ordinal[q] if last else views.ordinal_E[event], before=event - 1)
            assert window[i] == (*known, bucket[i], last)
        assert batch.user_B[q] == views.user_id_U[views.owner_E()[asking[q]]]
    assert len(batch.read_R) == len(asking)


def test_the_hour_is_that_of_the_local_day():
    views = made_views([1], ordinal=0.0)
    for offset_h, wanted in ((0, 13), (8, 21), (-14, 23)):
        batch = collation(offset_h=offset_h).request_batch(
            features(), views, np.array([0]), np.array([0]), np.array([1_650_028_500_000]), np.array([NAN]))
        assert batch.hour_V.tolist() == [1 + wanted]  # 2022-04-15 13:15 UTC


# -------------------------------------------------------------------------------------------- any number of workers

@settings(max_examples=30)
@given(st.sampled_from(["next", "to_go", "prefix"]), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99),
       st.integers(1, 5))
def test_the_rows_of_a_batch_are_the_same_whatever_the_number_of_workers(kind, workers, batch_rows, seed, groups):
    shards = [made_views([9, 5], seed), made_views([4, 11], seed + 1)]
    rule = WindowRule(4, 2)
    plan = EpochPlan(lambda s: shards[s], [count_windows(v, rule) for v in shards], rule, batch_rows=batch_rows,
                     seed=seed, epoch=0, shuffle_shards=1)
    c, f = replace(collation(kind, 0.5, positions=5), negative_groups=groups), features()

    def walk(rank, count):
        return [c.window_batch(f, rows, np.random.default_rng([seed, step]))
                for step, rows in enumerate(plan.batches(rank, count))]

    alone = walk(0, 1)
    shared = [walk(rank, workers) for rank in range(workers)]
    for step, batch in enumerate(alone):
        whole = told(batch)
        targets = [[p[0] for p in w if p[5]] for w in whole]  # by window
        assert batch.targets_per_rank == [sum(map(len, targets))] == [len(batch.read_R)]
        counted = [Counter(row for w in targets[g::groups] for row in w) for g in range(groups)]
        for mine in (batch, *(shared[rank][step] for rank in range(workers))):
            asked = mine.row_B.tolist() if len(mine.read_R) else []
            present = sorted({row % groups for row in asked if targets[row]})
            if groups == 1:
                present = [0]
            first = begin = 0
            assert len(mine.columns_per_group) == max(1, len(present))
            for g, count, width in zip(present, mine.targets_per_group, mine.columns_per_group, strict=bool(present)):
                log_q = mine.column_log_q_G[first : first + width].tolist()
                rows = [LOG_Q[round(value, 5)] for value in log_q]
                assert dict(zip(rows, mine.column_count_G[first : first + width].tolist(), strict=True)) == counted[g]
                own = [row for at in asked if at % groups == g for row in targets[at]]
                assert [rows[at] for at in mine.target_column_R[begin : begin + count].tolist()] == own
                read = mine.item_V[mine.read_R[begin : begin + count]]
                assert mine.items.row_U[read].tolist() == own
                first, begin = first + width, begin + count
            assert (begin, first) == (len(mine.read_R), len(mine.column_count_G))
        for mine in (shared[rank][step] for rank in range(workers)):
            assert mine.targets_per_rank == [sum(len(w) for w in targets[rank::workers]) for rank in range(workers)]
        for rank in range(workers):
            mine = shared[rank][step]
            if rank >= batch.windows:  # no row left for this worker: the unknown item, and no target
                assert mine.windows == 1 and mine.items.row_U.tolist() == [0] and len(mine.read_R) == 0
                assert mine.condition_bucket_V.tolist() == [0]
                continue
            assert told(mine) == whole[rank::workers]
            assert mine.user_B.tolist() == batch.user_B.tolist()[rank::workers]


def test_dropped_conditions_are_about_as_many_as_asked_for_and_leave_watch_times_alone():
    views = made_views([60] * 30, unknown=0.0)
    windows = cut_windows(views, WindowRule(7, 8), np.random.default_rng(0))
    rows = BatchRows([(views, windows)], len(windows), 0, 1)
    batch = collation("next", 0.15).window_batch(features(), rows, np.random.default_rng(0))
    assert abs((batch.condition_bucket_V == 0).float().mean() - 0.15) < 0.03
    assert (batch.watch_bucket_V > 0).all()
    kept = batch.condition_bucket_V > 0
    assert (batch.condition_bucket_V == batch.watch_bucket_V)[kept].all()


# ---------------------------------------------------------------------------------------------------------- leakage

def test_a_request_cannot_see_its_answer_nor_anything_later():
    """Tries to cheat: the answer's item is planted into every later view; the batch must not change in a single bit."""
    views = made_views([10, 8], seed=4, items=6, ordinal=0.0)
    asking, begin = np.array([4, 14]), np.array([0, 10])
    answer = ITEMS - 1
    cheated = made_views([10, 8], seed=4, items=6, ordinal=0.0)
    for at, end in ((4, 10), (14, 18)):
        cheated.item_row_E[at:end] = answer
        cheated.watch_s_E[at:end] = 299.0
        cheated.timestamp_ms_E[at:end] += 12345
    for kind in ("next", "to_go", "prefix", "none"):
        batches = [collation(kind).request_batch(features(), v, begin, asking, views.timestamp_ms_E[asking],
                                                 np.array([60.0, NAN])) for v in (views, cheated)]
        assert answer not in batches[1].items.row_U
        for name in ("place_V", "item_V", "watch_bucket_V", "condition_bucket_V", "hour_V", "gap_V", "read_R"):
            assert torch.equal(getattr(batches[0], name), getattr(batches[1], name)), name
        assert torch.equal(batches[0].items.row_U, batches[1].items.row_U)


def test_a_user_without_a_past_is_asked_with_the_unknown_item_alone():
    views = made_views([3])
    batch = collation().request_batch(features(), views, np.array([0]), np.array([0]), views.timestamp_ms_E[:1],
                                      np.array([30.0]))
    assert told(batch)[0][0][0] == 0 and batch.items.row_U.tolist() == [0]


# ------------------------------------------------------------------------------------------------------ the prefetch

@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetched_items_come_in_order_and_waiting_is_measured(ahead):
    def slow():
        for i in range(5):
            time.sleep(0.02)
            yield i

    items = Prefetched(slow, ahead, time.perf_counter)
    assert list(items) == list(range(5)) and items.waited_s > 0.05


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_producer_is_raised_where_the_batch_was_due(ahead):
    def broken():
        yield 1
        raise OSError("disk gone")

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for item in Prefetched(broken, ahead, time.perf_counter):
            seen.append(item)
    assert seen == [1]


def test_leaving_early_ends_the_thread():
    def endless():
        while True:
            yield 1

    with pytest.raises(KeyError):
        for _ in Prefetched(endless, 2, time.perf_counter):
            raise KeyError
    assert not [t for t in threading.enumerate() if t.name == "watchtower-prefetch"]


def test_windows_take_keeps_the_columns_together():
    windows = Windows(np.arange(3), np.arange(3) + 5, np.arange(3) + 2)
    taken = windows.take(np.array([2, 0]))
    assert (taken.begin_W.tolist(), taken.end_W.tolist(), taken.first_target_W.tolist()) == ([2, 0], [7, 5], [4, 2])
