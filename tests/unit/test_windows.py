"""Windows and an epoch's order against plain loops: every target once, nobody else's views, any number of workers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_views import HOUR_MS, T0, made_views, users_only

from configs.errors import InputError
from trainer.windows import EpochPlan, TargetViews, WindowRule, count_windows, cut_windows, join_views, target_views


@st.composite
def worlds(draw, most_users=5, longest=30):
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=most_users))
    trainable = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    return made_views(lengths, draw(st.integers(0, 10_000)), trainable=trainable)


@st.composite
def rules(draw, positions=("all", "last")):
    history = draw(st.integers(1, 9))
    times = st.one_of(st.none(), st.integers(-5, 210).map(lambda h: T0 + h * HOUR_MS))
    return WindowRule(history=history, stride=draw(st.integers(1, history + 1)),
                      loss_positions=draw(st.sampled_from(positions)), cuts_per_user=draw(st.integers(1, 6)),
                      begin_ms=draw(times), end_ms=draw(times), min_history=draw(st.integers(0, 3)))


def naive_targets(views, rule):
    """The views that are to be predicted: event -> (first view of its user, its user)."""
    found = {}
    for user, (offset, length) in enumerate(zip(views.offset_U, views.length_U, strict=True)):
        for event in range(offset, offset + length):
            time = views.timestamp_ms_E[event]
            inside = (rule.begin_ms is None or time >= rule.begin_ms) and (rule.end_ms is None or time < rule.end_ms)
            if inside and views.trainable_U[user] and event - offset >= rule.min_history:
                found[event] = (offset, user)
    return found


def rows_of(windows):
    return list(zip(windows.begin_W.tolist(), windows.end_W.tolist(), windows.first_target_W.tolist(), strict=True))


@settings(max_examples=150)
@given(worlds(), rules(positions=("all",)))
def test_every_target_of_a_trainable_user_is_predicted_by_exactly_one_window(views, rule):
    windows = cut_windows(views, rule, np.random.default_rng(0))
    owner_E, wanted = views.owner_E(), naive_targets(views, rule)
    predicted = []
    for begin, end, first in rows_of(windows):
        assert begin <= first < end and end - begin <= rule.history + 1
        assert len(set(owner_E[begin:end])) == 1  # nobody else's views
        for target in range(first, end):
            past = target - wanted[target][0]
            assert target - begin >= min(past, rule.history + 1 - rule.stride)
        predicted += range(first, end)
    assert sorted(predicted) == sorted(wanted)
    assert count_windows(views, rule) == len(windows)


@settings(max_examples=150)
@given(worlds(), rules(positions=("last",)), st.integers(0, 99))
def test_with_the_loss_at_the_last_position_a_user_gets_a_few_distinct_targets(views, rule, seed):
    windows = cut_windows(views, rule, np.random.default_rng(seed))
    wanted, by_user = naive_targets(views, rule), {}
    for begin, end, first in rows_of(windows):
        offset, user = wanted[first]
        assert end == first + 1 and begin == max(offset, first - rule.history)
        by_user.setdefault(user, []).append(first)
    possible = np.bincount([user for _, user in wanted.values()], minlength=len(views.user_id_U))
    for user, count in enumerate(possible):
        drawn = by_user.get(user, [])
        assert len(set(drawn)) == len(drawn) == min(count, rule.cuts_per_user)
    assert count_windows(views, rule) == len(windows)


def test_the_cuts_are_drawn_anew_for_every_generator_and_reach_all_targets():
    views = made_views([30])
    rule = WindowRule(history=4, stride=2, loss_positions="last", cuts_per_user=3)
    drawn = [tuple(cut_windows(views, rule, np.random.default_rng(s)).first_target_W) for s in range(200)]
    assert len(set(drawn)) > 100 and set(np.concatenate(drawn)) == set(range(30))


def test_slices_part_the_targets_and_keep_the_history_before_them():
    views = made_views([40, 3, 25], seed=3)
    edges = [None, T0 + 60 * HOUR_MS, T0 + 120 * HOUR_MS, None]
    seen = []
    for begin, end in zip(edges, edges[1:], strict=False):
        rule = WindowRule(history=6, stride=3, begin_ms=begin, end_ms=end)
        windows = cut_windows(views, rule, np.random.default_rng(0))
        for first_view, last, first in rows_of(windows):
            seen += range(first, last)
            assert first == views.offset_U[views.owner_E()[first]] or first_view < first  # older slices are history
    assert sorted(seen) == list(range(68))


def test_a_window_without_a_place_for_its_targets_is_refused():
    """A stride above history + 1 would leave views between two windows that nobody predicts."""
    with pytest.raises(InputError, match="train.stride"):
        WindowRule(history=4, stride=6)


def test_held_out_users_are_never_targets():
    views = made_views([20, 20], trainable=[False, True])
    for positions in ("all", "last"):
        windows = cut_windows(views, WindowRule(4, 2, positions), np.random.default_rng(0))
        assert len(windows) and windows.begin_W.min() >= 20


class Shard:
    """What target_views reads of a SequenceShard."""

    def __init__(self, lengths, seed):
        rng = np.random.default_rng(seed)
        self.length_U = np.asarray(lengths, np.int32)
        self.offset_U = (np.cumsum(lengths) - lengths).astype(np.int64)
        self.user_id_U = np.arange(len(lengths))
        total = int(sum(lengths))
        self.is_target_E = rng.random(total) < 0.5
        self.is_ordinal_E = rng.random(total) < 0.5
        self.item_row_E = np.arange(total, dtype=np.int32)
        self.watch_time_s_E = rng.random(total).astype(np.float32)
        self.timestamp_ms_E = np.arange(total)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 999))
def test_only_target_views_are_taken_out_of_a_shard(lengths, seed):
    shard = Shard(lengths, seed)
    views = target_views(shard)
    for user in range(len(lengths)):
        begin, end = shard.offset_U[user], shard.offset_U[user] + shard.length_U[user]
        mine = slice(views.offset_U[user], views.offset_U[user] + views.length_U[user])
        assert views.item_row_E[mine].tolist() == [i for i in range(begin, end) if shard.is_target_E[i]]
        ordinal = shard.is_ordinal_E[begin:end][shard.is_target_E[begin:end]]
        np.testing.assert_array_equal(views.ordinal_E[mine], ordinal)
    assert views.trainable_U.all() and len(views.item_row_E) == shard.is_target_E.sum()


def test_permuted_watch_times_are_the_same_ones_elsewhere():
    views = made_views([30, 12])
    dealt = views.permuted(5)
    np.testing.assert_array_equal(np.isnan(dealt.watch_s_E), np.isnan(views.watch_s_E))
    np.testing.assert_array_equal(np.sort(dealt.watch_s_E), np.sort(views.watch_s_E))
    assert (dealt.watch_s_E != views.watch_s_E).mean() > 0.5
    np.testing.assert_array_equal(dealt.watch_s_E, views.permuted(5).watch_s_E)
    np.testing.assert_array_equal(dealt.item_row_E, views.item_row_E)


def test_watch_times_of_the_test_are_not_dealt_out_in_training():
    views, end = made_views([30, 12]), T0 + 100 * HOUR_MS
    early = views.timestamp_ms_E < end
    assert early.any() and not early.all()
    dealt = views.permuted(5, end)
    np.testing.assert_array_equal(np.sort(dealt.watch_s_E[early]), np.sort(views.watch_s_E[early]))
    np.testing.assert_array_equal(dealt.watch_s_E[~early], views.watch_s_E[~early])
    assert (dealt.watch_s_E != views.watch_s_E)[early].mean() > 0.5


def test_joined_shards_are_their_users_one_after_the_other():
    views = made_views([3, 0, 5, 2], seed=1)
    parts = [users_only(views, [True, True, False, False]), users_only(views, [False, False, True, True])]
    joined = join_views(parts)
    for name in vars(views):
        np.testing.assert_array_equal(getattr(joined, name), getattr(views, name))


# ------------------------------------------------------------------------------------------------ the order of an epoch

@st.composite
def epochs(draw):
    users = st.lists(st.integers(0, 12), max_size=4)
    shards = [made_views(draw(users), 100 * s) for s in range(draw(st.integers(1, 5)))]
    # Ids of events that are distinct over shards, so that a window can be told by what it holds.
    shift = np.cumsum([0] + [len(v.item_row_E) for v in shards])
    shards = [replace(v, item_row_E=np.arange(len(v.item_row_E)) + shift[i]) for i, v in enumerate(shards)]
    rule = replace(draw(rules()), begin_ms=None, end_ms=None)
    return shards, rule, draw(st.integers(1, 9)), draw(st.integers(1, 4))


def plan_of(shards, rule, batch_rows, shuffle_shards, seed=0, epoch=0):
    return EpochPlan(lambda s: shards[s], [count_windows(v, rule) for v in shards], rule, batch_rows=batch_rows,
                     seed=seed, epoch=epoch, shuffle_shards=shuffle_shards)


def rows_by_rank(plan, rank, workers, first_step=0):
    """Each step's windows of a worker, as (items held, how many of them are targets)."""
    steps = []
    for batch in plan.batches(rank, workers, first_step):
        assert (batch.rank, batch.workers) == (rank, workers)
        steps.append(([(tuple(views.item_row_E[b:e].tolist()), e - f) for views, windows in batch.parts
                       for b, e, f in rows_of(windows)], batch.global_rows))
    return steps


def global_batches(plan, workers, first_step=0):
    """The workers' rows put together again: row r of a batch is at worker r mod workers."""
    ranks = [rows_by_rank(plan, rank, workers, first_step) for rank in range(workers)]
    assert len({len(steps) for steps in ranks}) == 1  # all make the same number of steps
    batches = []
    for step in zip(*ranks, strict=True):
        total = step[0][1]
        assert all(rows == total for _, rows in step) and sum(len(mine) for mine, _ in step) == total
        assert all(len(mine) == len(range(rank, total, workers)) for rank, (mine, _) in enumerate(step))
        batches.append([step[row % workers][0][row // workers] for row in range(total)])
    return batches


@settings(max_examples=80)
@given(epochs(), st.integers(1, 4))
def test_an_epoch_holds_every_window_once_whoever_walks_it(made, workers):
    shards, rule, batch_rows, shuffle_shards = made
    plan = plan_of(*made)
    batches = global_batches(plan, workers)
    assert batches == global_batches(plan, 1)
    assert len(batches) == plan.steps and sum(map(len, batches)) == plan.rows
    assert all(len(batch) == batch_rows for batch in batches[:-1])
    rows = [row for batch in batches for row in batch]
    if rule.loss_positions == "all":
        cut = [cut_windows(v, rule, np.random.default_rng(0)) for v in shards]
        wanted = [(tuple(v.item_row_E[b:e].tolist()), e - f)
                  for v, w in zip(shards, cut, strict=True) for b, e, f in rows_of(w)]
        assert sorted(rows) == sorted(wanted)
    else:
        assert len({row[0][-1] for row in rows}) == len(rows) == sum(count_windows(v, rule) for v in shards)


@settings(max_examples=80)
@given(epochs(), st.integers(1, 3), st.data())
def test_a_run_that_continues_walks_the_rest_of_the_same_epoch(made, workers, data):
    plan = plan_of(*made)
    whole = global_batches(plan, 1)
    first = data.draw(st.integers(0, len(whole) + 1))
    assert global_batches(plan_of(*made), workers, first) == whole[first:]


def test_a_run_that_continues_does_not_open_the_shards_it_has_done_with():
    shards, rule = [made_views([9, 9], s) for s in range(6)], WindowRule(history=2, stride=1)
    opened = []

    def load(shard):
        opened.append(shard)
        return shards[shard]

    plan = EpochPlan(load, [count_windows(v, rule) for v in shards], rule, batch_rows=4, seed=0, epoch=0,
                     shuffle_shards=2)
    list(plan.batches(0, 1, plan.steps - 1))
    assert len(opened) == 2


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 1}])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_another_epoch_or_seed_has_another_order(changed, positions):
    shards = [made_views([20, 15], s) for s in range(4)]
    made = (shards, WindowRule(history=4, stride=2, loss_positions=positions), 5, 2)
    first, same, other = (global_batches(plan_of(*made, **k), 1) for k in ({}, {}, changed))
    assert first == same != other
    rows = [[row for batch in batches for row in batch] for batches in (first, other)]
    if positions == "all":
        assert sorted(rows[0]) == sorted(rows[1])
    else:
        assert sorted(rows[0]) != sorted(rows[1])  # other cuts too


def test_windows_of_all_shards_of_a_group_are_mixed():
    shards = [replace(made_views([40], s), item_row_E=np.full(40, s)) for s in range(4)]
    batches = global_batches(plan_of(shards, WindowRule(2, 1), 16, 4), 1)
    assert all(len({row[0][0] for row in batch}) > 1 for batch in batches)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_have_about_as_many_views_each(workers):
    """What two of them have of a batch differs by no more than a window; by chance it would be some windows."""
    rng = np.random.default_rng(0)
    views, rule = made_views(rng.integers(1, 80, 300).tolist(), 3), WindowRule(history=32, stride=16)
    plan = EpochPlan(lambda shard: views, [count_windows(views, rule)], rule, batch_rows=128, seed=0, epoch=0,
                     shuffle_shards=1)
    has = [[sum(int((w.end_W - w.begin_W).sum()) for _, w in rows.parts) for rows in plan.batches(rank, workers)]
           for rank in range(workers)]
    assert plan.steps > 4
    assert max(max(step) - min(step) for step in zip(*has, strict=True)) <= 33


def test_an_epoch_without_a_window_has_no_step():
    empty = made_views([0, 0])
    plan = plan_of([empty, empty], WindowRule(4, 2), 8, 2)
    assert plan.steps == plan.rows == 0 and list(plan.batches(0, 2)) == []


def test_views_of_no_user_at_all():
    nobody = TargetViews(*(np.zeros(0, np.int64) for _ in range(4)), np.zeros(0, np.float32), np.zeros(0, np.int64),
                         np.zeros(0, bool), np.zeros(0, bool))
    for positions in ("all", "last"):
        rule = WindowRule(4, 2, positions, begin_ms=5, end_ms=9)
        assert len(cut_windows(nobody, rule, np.random.default_rng(0))) == count_windows(nobody, rule) == 0
