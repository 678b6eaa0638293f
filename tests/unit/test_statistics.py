"""Statistics of the training targets against plain loops; what is held out or later must not be counted."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_views import HOUR_MS, T0, made_views, users_only

from trainer.conditions import watch_statistics
from trainer.statistics import target_statistics
from trainer.windows import WindowRule

ROWS, EDGES = 12, (0.0, 4.0, 20.0, 60.0)


def naive(views, rule):
    """Counts by item, watch times of the targets and who watched them."""
    views_N, known_N, sum_N, bucket_NK = ([0] * ROWS, [0] * ROWS, [0.0] * ROWS, np.zeros((ROWS, len(EDGES)), int))
    users, watched = [], []
    for user, (offset, length) in enumerate(zip(views.offset_U, views.length_U, strict=True)):
        for event in range(offset + rule.min_history, offset + length):
            time = views.timestamp_ms_E[event]
            if not views.trainable_U[user] or (rule.end_ms is not None and time >= rule.end_ms) or (
                    rule.begin_ms is not None and time < rule.begin_ms):
                continue
            item, watch = views.item_row_E[event], float(views.watch_s_E[event])
            views_N[item] += 1
            if not math.isnan(watch):
                known_N[item] += 1
                sum_N[item] += watch
                bucket_NK[item, sum(watch >= edge for edge in EDGES) - 1] += 1
                users.append(user)
                watched.append(watch)
    return views_N, known_N, sum_N, bucket_NK, np.array(users, int), np.array(watched)


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=6), st.integers(0, 9999),
       st.integers(1, 3), st.one_of(st.none(), st.integers(0, 200)), st.one_of(st.none(), st.integers(0, 100)),
       st.integers(0, 2))
def test_statistics_are_those_of_a_plain_loop_over_any_number_of_shards(users, seed, shards, end_h, begin_h, least):
    views = made_views([n for n, _ in users], seed, trainable=[t for _, t in users])
    parts = [users_only(views, np.arange(len(users)) % shards == s) for s in range(shards)]
    rule = WindowRule(4, 2, begin_ms=None if begin_h is None else T0 + begin_h * HOUR_MS,
                      end_ms=None if end_h is None else T0 + end_h * HOUR_MS, min_history=least)
    got = target_statistics(lambda s: parts[s], shards, ROWS, EDGES, rule)
    views_N, known_N, sum_N, bucket_NK, user_K, watch_K = naive(views, rule)
    assert got.views_N.tolist() == views_N and got.known_views_N.tolist() == known_N
    np.testing.assert_allclose(got.watch_sum_N, sum_N, rtol=1e-9)
    np.testing.assert_array_equal(got.bucket_views_NK, bucket_NK)
    if not len(watch_K):
        assert math.isnan(got.condition.median_user_average_s)
        return
    exact = watch_statistics(user_K, watch_K)
    assert (got.condition.least_s, got.condition.most_s) == (exact.least_s, exact.most_s)
    by_user = [watch_K[user_K == u] for u in np.unique(user_K)]
    for median, figures in ((got.condition.median_user_average_s, [w.mean() for w in by_user]),
                            (got.condition.median_user_maximum_s, [w.max() for w in by_user])):
        middle = sorted(figures)[(len(figures) - 1) // 2]  # of an even number the lower one
        assert median == pytest.approx(middle, rel=6e-4, abs=6e-4)


def test_log_q_is_the_share_of_the_targets_and_half_a_view_for_the_unseen():
    views = made_views([400], seed=1, items=8)
    got = target_statistics(lambda _: views, 1, ROWS, EDGES, WindowRule(4, 2))
    share_N = np.bincount(views.item_row_E, minlength=ROWS) / 400
    log_q_N = got.log_q_N()
    assert log_q_N.dtype == np.float32
    np.testing.assert_allclose(np.exp(log_q_N[share_N > 0]), share_N[share_N > 0], rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_q_N[share_N == 0]), 0.5 / 400, rtol=1e-5)
    assert np.isfinite(target_statistics(lambda _: made_views([0]), 1, ROWS, EDGES, WindowRule(4, 2)).log_q_N()).all()


def test_views_at_or_after_the_end_change_nothing():
    views = made_views([30, 20], seed=2, trainable=[True, False])
    end = T0 + 100 * HOUR_MS
    cheated = made_views([30, 20], seed=2, trainable=[True, False])
    later = (cheated.timestamp_ms_E >= end) | (cheated.owner_E() == 1)
    assert later.any() and not later.all()
    cheated.item_row_E[later], cheated.watch_s_E[later] = 11, 5000.0
    first, second = (target_statistics(lambda _, v=v: v, 1, ROWS, EDGES, WindowRule(4, 2, end_ms=end))
                     for v in (views, cheated))
    for name in ("views_N", "known_views_N", "watch_sum_N", "bucket_views_NK"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.condition == second.condition
