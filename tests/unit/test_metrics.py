"""trainer/metrics.py against definitions written out with sets and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics import (
    bootstrap_ci,
    bootstrap_cis,
    control_curve,
    first_ranks,
    hit_watch_s,
    paired_ci,
    retrieval_metrics,
    retrieved_watch_s,
    strictly_rising,
    value_range,
    watch_buckets,
    watch_histogram,
)

AT = [1, 2, 3, 10]
IDS = st.one_of(st.integers(-1, 6), st.sampled_from([2**62, -(2**62)]))


@st.composite
def requests(draw, items=IDS):
    """Retrieved lists (with padding and repeats anywhere) and the ragged relevant views of up to 5 requests."""
    queries, places = draw(st.integers(0, 5)), draw(st.integers(0, 7))
    rows = [draw(st.lists(items, min_size=places, max_size=places)) for _ in range(queries)]
    views = [draw(st.lists(items, max_size=5)) for _ in range(queries)]
    watch = [draw(st.lists(st.one_of(st.just(math.nan), st.floats(0, 500)), min_size=len(v), max_size=len(v)))
             for v in views]
    offsets = np.cumsum([0] + [len(v) for v in views])
    flat = np.array([x for v in views for x in v], dtype=np.int64)
    retrieved = np.array(rows, dtype=np.int64).reshape(queries, places)
    return rows, views, watch, retrieved, (offsets, flat), np.array([x for w in watch for x in w], dtype=np.float64)


def naive_metrics(row, views, k):
    relevant = set(views)
    if not relevant:
        return math.nan, math.nan, math.nan
    seen, hits, dcg = set(), 0, 0.0
    for rank, item in enumerate(row[:k], start=1):
        if item != -1 and item in relevant and item not in seen:
            hits, dcg = hits + 1, dcg + 1 / math.log2(rank + 1)
            seen.add(item)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(relevant)) + 1))
    return hits / len(relevant), dcg / ideal, float(hits > 0)


@given(requests())
@settings(max_examples=150, deadline=None)
def test_retrieval_metrics_are_their_definitions(case):
    rows, views, _, retrieved, relevant, _ = case
    metrics = retrieval_metrics(retrieved, relevant, AT)
    assert list(metrics) == [f"{name}@{k}" for k in AT for name in ("recall", "ndcg", "hit_rate")]
    for q, (row, wanted) in enumerate(zip(rows, views, strict=True)):
        for k in AT:
            got = [metrics[f"{name}@{k}"][q] for name in ("recall", "ndcg", "hit_rate")]
            np.testing.assert_allclose(got, naive_metrics(row, wanted, k), rtol=1e-12)


@given(requests())
@settings(max_examples=100, deadline=None)
def test_hit_watch_is_the_mean_over_the_views_that_were_hit(case):
    rows, views, watch, retrieved, relevant, watch_v = case
    metrics = hit_watch_s(retrieved, relevant, watch_v, AT)
    for q, row in enumerate(rows):
        for k in AT:
            top = set(row[:k]) - {-1}
            seconds = [w for item, w in zip(views[q], watch[q], strict=True) if item in top and not math.isnan(w)]
            expected = sum(seconds) / len(seconds) if seconds else math.nan
            np.testing.assert_allclose(metrics[f"hit_watch_s@{k}"][q], expected, rtol=1e-12)


@given(requests(items=st.integers(-1, 6)), st.lists(st.one_of(st.just(math.nan), st.floats(0, 500)), min_size=7,
                                                    max_size=7))
@settings(max_examples=100, deadline=None)
def test_retrieved_watch_is_the_mean_over_the_items_that_are_there(case, item_watch):
    rows, _, _, retrieved, _, _ = case
    metrics = retrieved_watch_s(retrieved, np.array(item_watch), AT)
    for q, row in enumerate(rows):
        for k in AT:
            seconds = [item_watch[i] for i in row[:k] if i != -1 and not math.isnan(item_watch[i])]
            expected = sum(seconds) / len(seconds) if seconds else math.nan
            np.testing.assert_allclose(metrics[f"retrieved_watch_s@{k}"][q], expected, rtol=1e-9, atol=1e-12)


@given(requests())
@settings(max_examples=100, deadline=None)
def test_ranks_count_from_zero_and_tell_absence(case):
    rows, views, _, retrieved, relevant, _ = case
    expected = [row.index(item) if item != -1 and item in row else np.iinfo(np.int64).max
                for row, wanted in zip(rows, views, strict=True) for item in wanted]
    assert first_ranks(retrieved, relevant).tolist() == expected


def test_padding_is_no_hit_even_where_the_relevant_is_unknown():
    metrics = retrieval_metrics(np.array([[-1, -1, 3]]), (np.array([0, 2]), np.array([-1, 3])), [3])
    assert metrics["recall@3"].tolist() == [0.5]
    assert metrics["ndcg@3"][0] == pytest.approx((1 / math.log2(4)) / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize("offsets", [[0, 1], [0, 1, 3], [1, 1, 2], [0, 2, 1]])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets"):
        retrieval_metrics(np.zeros((2, 3), dtype=np.int64), (np.array(offsets), np.array([1, 2])), [1])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="list lengths"):
        retrieval_metrics(np.zeros((1, 3), dtype=np.int64), (np.array([0, 0]), np.array([], dtype=np.int64)), [0])
    with pytest.raises(ValueError, match="rows must lie"):
        retrieved_watch_s(np.array([[5]]), np.ones(5), [1])
    with pytest.raises(ValueError, match="watch times"):
        hit_watch_s(np.array([[5]]), (np.array([0, 1]), np.array([5])), np.ones(2), [1])
    with pytest.raises(ValueError, match="rising"):
        watch_buckets(np.ones(2), [0, 5, 5])


@given(st.lists(st.one_of(st.just(math.nan), st.floats(0, 400), st.sampled_from([7.0, 17.0, 190.0])), max_size=20))
def test_buckets_are_closed_below_and_open_above(watch):
    edges = [0, 7, 17, 42, 85, 190]
    expected = [-1 if math.isnan(w) else max(b for b, edge in enumerate(edges) if w >= edge) for w in watch]
    assert watch_buckets(np.array(watch), edges).tolist() == expected
    assert watch_buckets(np.array(watch), edges + [math.inf]).tolist() == expected


def test_a_histogram_leaves_out_unknown_items_and_unknown_watch_times():
    counts = watch_histogram(np.array([0, 0, 2, -1, 2]), np.array([1.0, 9.0, 20.0, 5.0, math.nan]), 3, [0, 7, 17])
    assert counts.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="outside"):
        watch_histogram(np.array([3]), np.array([1.0]), 3, [0, 7])


def naive_lift(lists, views, buckets, c):
    def share(which):
        inside = total = 0
        for row in lists[which]:
            for item in row:
                if item != -1:
                    inside, total = inside + views[item][buckets[c]], total + sum(views[item])
        return inside / total
    others = [share(d) for d in range(len(lists)) if d != c]
    return share(c) / (sum(others) / len(others))


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_control_curve_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    conditions, edges = [10.0, 30.0, 300.0], [0, 7, 17, 42, 85, 190]
    lists = [rng.integers(-1, 8, size=(4, 5)) for _ in conditions]
    views, item_watch = rng.integers(1, 9, size=(8, 6)), rng.uniform(1, 99, 8)
    relevant = (np.arange(5), rng.integers(0, 8, 4))
    curve = control_curve(conditions, lists, relevant, item_watch, views, edges, at=3)
    cut = [rows[:, :3] for rows in lists]
    for c, point in enumerate(curve):
        assert point["condition_s"] == conditions[c] and point["n"] == 4
        assert point["bucket_lift"] == pytest.approx(naive_lift(cut, views.tolist(), [1, 2, 5], c))
        watch = retrieved_watch_s(lists[c], item_watch, [3])["retrieved_watch_s@3"]
        assert point["retrieved_watch_s"] == pytest.approx(np.nanmean(watch))
        assert point["recall@3"] == pytest.approx(retrieval_metrics(lists[c], relevant, [3])["recall@3"].mean())


def test_a_condition_that_changes_nothing_has_lift_one_and_a_flat_curve():
    lists, views = np.arange(12).reshape(3, 4), np.random.default_rng(0).integers(1, 5, size=(12, 6))
    relevant = (np.arange(4), np.array([0, 5, 11]))
    curve = control_curve([10, 60, 300], [lists] * 3, relevant, np.arange(12.0), views, [0, 7, 17, 42, 85, 190], at=4)
    assert [p["bucket_lift"] for p in curve] == pytest.approx([1.0] * 3)
    assert not strictly_rising([p["retrieved_watch_s"] for p in curve])
    alone = control_curve([10], [lists], relevant, np.arange(12.0), views * 0, [0, 7, 17, 42, 85, 190], at=4)
    assert math.isnan(alone[0]["bucket_lift"]) and math.isnan(alone[0]["bucket_share"])


@pytest.mark.parametrize("curve,rising", [([1, 2, 3], True), ([1, 1, 1], False), ([1, 3, 2], False), ([1], False),
                                          ([1, math.nan, 3], False), ([], False)])
def test_a_flat_or_undefined_curve_does_not_rise(curve, rising):
    assert strictly_rising(curve) is rising


def test_the_range_leaves_out_what_is_undefined():
    assert value_range([3, math.nan, 1]) == (1.0, 3.0)
    assert all(math.isnan(x) for x in value_range([math.nan]))


def test_the_mean_is_that_of_the_seeds_means_over_defined_queries():
    values = np.array([[1.0, np.nan, 3.0, 2.0], [5.0, 5.0, np.nan, 8.0]])
    mean, low, high = bootstrap_ci(values, np.arange(4), samples=200)
    assert mean == pytest.approx((2.0 + 6.0) / 2)
    assert low <= mean <= high


def test_an_interval_of_independent_queries_has_the_width_of_theory():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(1, 2000))
    mean, low, high = bootstrap_ci(values, np.arange(2000), samples=2000)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(2000), rel=0.08)


def test_groups_of_users_stand_in_for_many_users(monkeypatch):
    values, users = np.random.default_rng(8).normal(size=(1, 4000)), np.arange(4000) // 2
    one_by_one = bootstrap_ci(values, users, samples=1000)
    monkeypatch.setattr("trainer.metrics.MOST_CLUSTERS", 500)
    grouped = bootstrap_ci(values, users, samples=1000)
    assert grouped[0] == pytest.approx(one_by_one[0])
    assert grouped[2] - grouped[1] == pytest.approx(one_by_one[2] - one_by_one[1], rel=0.12)


def test_queries_of_one_user_count_as_one_draw():
    values, users = np.random.default_rng(2).normal(size=(1, 300)), np.arange(300)
    once = bootstrap_ci(values, users, samples=500)
    repeated = bootstrap_ci(np.repeat(values, 10, axis=1), np.repeat(users, 10), samples=500)
    assert repeated == pytest.approx(once)
    naive = bootstrap_ci(np.repeat(values, 10, axis=1), np.arange(3000), samples=500)
    assert naive[2] - naive[1] < 0.5 * (once[2] - once[1])


def test_an_interval_is_wider_where_seeds_differ():
    values = np.random.default_rng(3).normal(size=(1, 500))
    same = bootstrap_ci(np.repeat(values, 3, axis=0), np.arange(500), samples=500)
    differing = bootstrap_ci(values + np.array([[-0.5], [0.0], [0.5]]), np.arange(500), samples=500)
    assert differing[0] == pytest.approx(same[0])
    assert differing[2] - differing[1] > 2 * (same[2] - same[1])


def test_intervals_repeat_and_do_not_depend_on_how_they_are_batched(monkeypatch):
    values, users = np.random.default_rng(4).normal(size=(5, 2, 60)), np.random.default_rng(4).integers(0, 20, 60)
    values[1, 0, :30] = np.nan
    values[4] = np.nan
    together = bootstrap_cis(values, users, samples=100, seed=7)
    np.testing.assert_array_equal(together, bootstrap_cis(values, users, samples=100, seed=7))
    np.testing.assert_allclose(together[1], bootstrap_ci(values[1], users, samples=100, seed=7), rtol=1e-12)
    assert np.isnan(together[4]).all()
    assert not np.array_equal(together[0], bootstrap_cis(values, users, samples=100, seed=8)[0])
    monkeypatch.setattr("trainer.metrics._WEIGHTS_AT_ONCE", 64)
    np.testing.assert_allclose(together, bootstrap_cis(values, users, samples=100, seed=7), rtol=1e-12)


def test_undefined_queries_change_nothing():
    values, users = np.random.default_rng(5).normal(size=(2, 50)), np.arange(50) // 2
    padded = np.concatenate([values, np.full((2, 50), np.nan)], axis=1)
    assert bootstrap_ci(padded, np.concatenate([users, users]), samples=100) == pytest.approx(
        bootstrap_ci(values, users, samples=100))


def test_a_paired_gain_is_certain_where_one_side_is_a_multiple_of_the_other():
    b = np.random.default_rng(6).uniform(0.1, 1.0, size=(3, 80))
    gain, low, high = paired_ci(1.35 * b, b, np.arange(80) // 4, samples=200)
    assert (gain, low, high) == pytest.approx((0.35, 0.35, 0.35))


def test_a_paired_gain_leaves_out_half_defined_pairs_and_takes_one_seed_against_many():
    a = np.array([[2.0, np.nan, 4.0], [4.0, 9.0, 2.0]])
    b = np.array([[1.0, 5.0, 2.0]])
    gain, low, high = paired_ci(a, b, np.arange(3), samples=100)
    assert gain == pytest.approx(((2 + 4) / 2 + (4 + 9 + 2) / 3) / ((1 + 2) / 2 + (1 + 5 + 2) / 3) - 1)
    assert low <= gain <= high
    assert math.isnan(paired_ci(a, 0 * b, np.arange(3), samples=10)[0])


def test_users_must_fit_the_queries():
    with pytest.raises(ValueError, match="users"):
        bootstrap_ci(np.zeros((1, 3)), np.arange(4))
