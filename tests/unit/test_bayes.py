"""trainer/bayes.py: shrunk item means and the untrained Bayes term, against their equations in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.bayes import DURATION_BINS, DURATION_EDGES_S, BayesTerm, duration_bin, item_watch_mean
from trainer.metrics import watch_histogram

EDGES = [0, 4, 6, 9, 14, 20, 30, 45, 65, 90, 130, 200]
ITEMS = 6

views = st.lists(st.tuples(st.integers(-1, ITEMS - 1), st.one_of(st.just(math.nan), st.floats(0, 500))), max_size=40)
bins = st.lists(st.integers(0, 2), min_size=ITEMS, max_size=ITEMS)


def histogram(rows):
    item, watch = np.array([r for r, _ in rows], dtype=np.int64), np.array([w for _, w in rows], dtype=np.float64)
    return watch_histogram(item, watch, ITEMS, EDGES)


def sums(rows):
    seen = known(rows)
    item, watch = np.array([r for r, _ in seen], dtype=np.int64), np.array([w for _, w in seen], dtype=np.float64)
    return np.bincount(item, watch, ITEMS), np.bincount(item, minlength=ITEMS)


def fit(item, watch, item_bins):
    return BayesTerm.fit(watch_histogram(item, watch, len(item_bins), EDGES), item_bins, EDGES)


def known(rows):
    return [(r, w) for r, w in rows if r >= 0 and not math.isnan(w)]


@given(views, bins)
@settings(max_examples=150, deadline=None)
def test_an_items_mean_is_shrunk_to_its_duration_bin(rows, item_bins):
    got = item_watch_mean(*sums(rows), np.array(item_bins), prior_views=10)
    seen = known(rows)
    for item, its_bin in enumerate(item_bins):
        own = [w for r, w in seen if r == item]
        level = [w for r, w in seen if item_bins[r] == its_bin] or [w for _, w in seen]
        expected = (sum(own) + 10 * sum(level) / len(level)) / (len(own) + 10) if level else math.nan
        np.testing.assert_allclose(got[item], expected, rtol=1e-9, atol=1e-12)


@given(views, bins)
@settings(max_examples=100, deadline=None)
def test_the_bayes_term_is_its_equations(rows, item_bins):
    term = BayesTerm.fit(histogram(rows), np.array(item_bins), EDGES, prior_views=20)
    buckets = [(r, max(b for b, edge in enumerate(EDGES) if w >= edge)) for r, w in known(rows)]

    def smoothed(own, above, weight):
        return [(own.count(b) + weight * above[b]) / (len(own) + weight) for b in range(len(EDGES))]

    everything = smoothed([b for _, b in buckets], [1 / len(EDGES)] * len(EDGES), len(EDGES))
    for item, its_bin in enumerate(item_bins):
        level = smoothed([b for r, b in buckets if item_bins[r] == its_bin], everything, 20)
        expected = smoothed([b for r, b in buckets if r == item], level, 20)
        np.testing.assert_allclose(np.exp(term.log_p_NB[item]), expected, rtol=1e-5)


def test_probabilities_sum_to_one_and_are_never_zero():
    rng = np.random.default_rng(0)
    durations = duration_bin(rng.lognormal(4, 1, 50))
    term = fit(rng.integers(-1, 50, 500), rng.lognormal(3, 1, 500), durations)
    assert term.log_p_NB.dtype == np.float32 and term.log_p_NB.shape == (50, 12)
    assert np.isfinite(term.log_p_NB).all()
    np.testing.assert_allclose(np.exp(term.log_p_NB).sum(1), 1.0, rtol=1e-5)


def test_the_extended_vectors_score_the_sum():
    rng = np.random.default_rng(1)
    user, item = rng.normal(size=(4, 8)).astype(np.float32), rng.normal(size=(9, 8)).astype(np.float32)
    term = fit(rng.integers(0, 9, 90), rng.lognormal(3, 1, 90), duration_bin(np.full(9, 30.0)))
    condition = np.array([3.0, 64.9, math.nan, 1e4])
    score = np.hstack([user, term.query_dims(condition)]) @ np.hstack([item, term.index_dims()]).T
    for q, bucket in enumerate([0, 7, None, 11]):
        extra = 0.0 if bucket is None else term.log_p_NB[:, bucket]
        np.testing.assert_allclose(score[q], user[q] @ item.T + extra, rtol=1e-4, atol=1e-5)


def test_unknown_conditions_switch_the_term_off_and_the_weight_is_the_temperature():
    term = BayesTerm.fit(np.array([[1, 0]]), np.array([0]), [0, 10])
    assert term.query_dims(np.array([5.0, math.nan, 10.0]), weight=0.5).tolist() == [[0.5, 0], [0, 0], [0, 0.5]]


def test_it_favours_items_that_are_watched_for_the_time_asked_for():
    item, watch = np.repeat([0, 1], 200), np.concatenate([np.full(200, 10.0), np.full(200, 150.0)])
    dims = fit(item, watch, np.array([3, 3])).index_dims()
    short, long = EDGES.index(9), EDGES.index(130)
    assert dims[0, short] > dims[1, short] and dims[1, long] > dims[0, long]


def test_duration_bins_rise_and_unknown_durations_have_their_own():
    edges = np.array(DURATION_EDGES_S)
    assert duration_bin(edges).tolist() == list(range(1, len(edges) + 1))
    assert duration_bin(np.nextafter(edges, 0)).tolist() == list(range(len(edges)))
    assert duration_bin(np.array([np.nan, 0.0, -3.0])).tolist() == [DURATION_BINS - 1] * 3
    assert duration_bin(np.array([1e9])).tolist() == [DURATION_BINS - 2]


def test_no_known_watch_time_at_all_is_an_unknown_mean():
    assert np.isnan(item_watch_mean(np.zeros(3), np.zeros(3, dtype=int), np.array([0, 0, 1]))).all()


@pytest.mark.parametrize("call", [
    lambda: item_watch_mean(np.ones(3), np.ones(3), np.zeros(3, dtype=int), prior_views=0),
    lambda: BayesTerm.fit(np.ones((3, 2)), np.zeros(3, dtype=int), [0, 2], prior_views=0),
    lambda: BayesTerm.fit(np.ones((3, 2)), np.zeros(3, dtype=int), [4, 2]),
    lambda: BayesTerm.fit(np.ones((3, 3)), np.zeros(3, dtype=int), [0, 2]),
    lambda: BayesTerm.fit(np.ones((2, 2)), np.zeros(3, dtype=int), [0, 2]),
])
def test_wrong_arguments_are_refused(call):
    with pytest.raises(ValueError):
        call()
