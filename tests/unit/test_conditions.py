"""Conditions against plain loops: the buckets, W_i of every kind, what a request knows, and every strategy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.conditions import (
    UNKNOWN_BUCKET,
    PastWatch,
    WatchBuckets,
    WatchStatistics,
    choose,
    past_watch,
    returns,
    watch_statistics,
)

NAN = float("nan")
seconds = st.one_of(st.just(NAN), st.floats(0, 1e6), st.sampled_from([0.0, 3000.0, 2999.999, 3000.001]))


@given(st.lists(st.floats(-10, 1e7), min_size=1), st.integers(1, 300), st.floats(0.5, 1e5))
def test_buckets_rise_with_the_watch_time_and_stay_in_range(watch, count, max_s):
    buckets = WatchBuckets(count, max_s)
    encoded = buckets.encode(np.sort(watch))
    assert encoded.dtype == np.int64 and (np.diff(encoded) >= 0).all()
    assert encoded.min() >= 1 and encoded.max() <= count < buckets.rows
    assert buckets.encode(np.array([0.0, -3.0, max_s, 10 * max_s])).tolist() == [1, 1, count, count]


@given(st.lists(seconds, min_size=1), st.integers(1, 300))
def test_buckets_are_log_spaced_and_unknown_has_its_own(watch, count):
    encoded = WatchBuckets(count, 3000.0).encode(np.array(watch))
    for w, bucket in zip(watch, encoded, strict=True):
        if math.isnan(w):
            assert bucket == UNKNOWN_BUCKET
            continue
        low, high = (math.expm1(k / count * math.log1p(3000.0)) for k in (bucket - 1, bucket))
        assert low <= w * (1 + 1e-9) + 1e-9 and (w <= high * (1 + 1e-9) or bucket == count)
    assert WatchBuckets().encode(np.array([[NAN, 1.0]], np.float32)).shape == (1, 2)


def test_a_hundred_buckets_to_3000_seconds_as_the_protocol_says():
    watch = np.array([0.0, 1.0, 4.6, 10.0, 60.0, 62.0, 2999.0, 86_400.0])
    wanted = 1 + np.minimum(np.floor(np.log1p(watch) / np.log1p(3000) * 100), 99)
    assert WatchBuckets().encode(watch).tolist() == wanted.tolist()
    assert WatchBuckets().rows == 101


def naive_returns(kind, watch, condition, length, positions):
    out = [NAN] * positions
    for i in range(length):
        if kind == "next":
            out[i] = condition[i]
        elif kind == "to_go":
            terms = [condition[j] if j == length - 1 else watch[j] for j in range(i, length)]
            known = [t for t in terms if not math.isnan(t)]
            out[i] = sum(known) if known else NAN
        else:
            known = [watch[j] for j in range(i) if not math.isnan(watch[j])]
            out[i] = sum(known) if known else NAN
    return out


@given(st.data(), st.sampled_from(["next", "to_go", "prefix"]), st.integers(1, 5), st.integers(1, 6))
def test_returns_are_the_plain_sums(data, kind, windows, positions):
    def cell():
        return data.draw(st.one_of(st.just(NAN), st.integers(0, 500).map(float)))

    watch, condition = (np.array([[cell() for _ in range(positions)] for _ in range(windows)], np.float32)
                        for _ in range(2))
    length = np.array([data.draw(st.integers(1, positions)) for _ in range(windows)])
    got = returns(kind, watch, condition, length)
    wanted = [naive_returns(kind, watch[b], condition[b], length[b], positions) for b in range(windows)]
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, np.array(wanted))


def test_to_go_ends_in_the_condition_and_does_not_read_the_last_watch_time():
    condition = np.array([[1.0, 1.0, 7.0]])
    got = [returns("to_go", np.array([[10.0, 20.0, last]]), condition, np.array([3])) for last in (5.0, NAN)]
    assert got[0].tolist() == [[37.0, 27.0, 7.0]] == got[1].tolist()


def test_prefix_at_the_last_position_does_not_hold_the_condition():
    watch = np.array([[10.0, 20.0, 99.0]])
    got = [returns("prefix", watch, np.full((1, 3), c), np.array([3])) for c in (1.0, 300.0, NAN)]
    assert got[0][0, 2] == got[1][0, 2] == got[2][0, 2] == 30.0
    assert math.isnan(got[0][0, 0])


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="no condition kind 'sum'"):
        returns("sum", np.zeros((1, 1)), np.zeros((1, 1)), np.ones(1))


@given(st.lists(st.tuples(st.integers(0, 4), seconds), max_size=20))
def test_statistics_of_the_targets(rows):
    users, watch = [u for u, _ in rows], [float(np.float32(w)) for _, w in rows]
    got = watch_statistics(np.array(users, int), np.array(watch))
    by_user = {u: [w for v, w in zip(users, watch, strict=True) if v == u and not math.isnan(w)] for u in set(users)}
    by_user = {u: w for u, w in by_user.items() if w}
    if not by_user:
        assert math.isnan(got.median_user_average_s) and math.isnan(got.median_user_maximum_s)
        return
    everything = [w for ws in by_user.values() for w in ws]
    assert (got.least_s, got.most_s) == (min(everything), max(everything))
    assert got.median_user_average_s == pytest.approx(np.median([np.mean(w) for w in by_user.values()]))
    assert got.median_user_maximum_s == np.median([max(w) for w in by_user.values()])


@given(st.lists(seconds, max_size=12), st.integers(1, 5), st.data())
def test_the_past_of_a_request_ends_before_it(watch, latest, data):
    begin = data.draw(st.integers(0, len(watch)))
    end = data.draw(st.integers(begin, len(watch)))
    got = past_watch(np.array(watch, float), np.array([begin]), np.array([end]), latest)
    known = [w for w in watch[begin:end] if not math.isnan(w)]
    recent = known[-latest:]
    wanted = (np.mean(known), max(known), np.mean(recent), max(recent)) if known else (NAN,) * 4
    np.testing.assert_allclose([got.average_Q[0], got.maximum_Q[0], got.recent_average_Q[0], got.recent_maximum_Q[0]],
                               wanted, rtol=1e-12)
    # What the request's own view and all later ones were watched for cannot be seen.
    cheated = np.array(watch, float)
    cheated[end:] = 1e9
    cheated[:begin] = 1e9
    again = past_watch(cheated, np.array([begin]), np.array([end]), latest)
    np.testing.assert_array_equal(np.stack([*vars(got).values()]), np.stack([*vars(again).values()]))


STATISTICS = WatchStatistics(least_s=2.0, most_s=400.0, median_user_average_s=20.0, median_user_maximum_s=90.0)


def past(average, maximum, recent_average=None, recent_maximum=None):
    rows = (average, maximum, average if recent_average is None else recent_average,
            maximum if recent_maximum is None else recent_maximum)
    return PastWatch(*(np.array(row, float) for row in rows))


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=30),
       st.sampled_from(["average", "maximum", "multiplexed", "fixed", "oracle"]), st.floats(0, 1), st.integers(0, 9))
def test_every_condition_lies_in_the_trained_range(figures, strategy, p, seed):
    average, maximum = zip(*figures, strict=True)
    got = choose(strategy, past(average, maximum), STATISTICS, true_watch_Q=np.array(maximum), fixed_s=average[0],
                 multiplexed_p=p, seed=seed)
    known = np.isfinite(got)
    assert ((got[known] >= 2.0) & (got[known] <= 400.0)).all()
    if strategy in ("average", "maximum", "multiplexed"):
        assert known.all()  # nobody is left without a condition
    if strategy == "oracle":
        np.testing.assert_array_equal(known, np.isfinite(maximum))


def test_strategies_take_the_users_figures_and_the_median_users_where_there_are_none():
    p = past([30.0, NAN, 1.0], [50.0, NAN, 900.0], [10.0, NAN, 3.0], [40.0, NAN, 5.0])
    assert choose("average", p, STATISTICS).tolist() == [30.0, 20.0, 2.0]
    assert choose("maximum", p, STATISTICS).tolist() == [50.0, 90.0, 400.0]
    assert choose("multiplexed", p, STATISTICS, multiplexed_p=0.0).tolist() == [10.0, 20.0, 3.0]
    assert choose("multiplexed", p, STATISTICS, multiplexed_p=1.0).tolist() == [40.0, 90.0, 5.0]
    assert choose("fixed", p, STATISTICS, fixed_s=60.0).tolist() == [60.0] * 3
    assert choose("oracle", p, STATISTICS, true_watch_Q=np.array([7.0, 1e4, 0.0])).tolist() == [7.0, 400.0, 2.0]
    assert np.isnan(choose("null", p, STATISTICS)).all()


@settings(max_examples=20)
@given(st.floats(0.02, 0.98), st.integers(0, 1000))
def test_multiplexing_gives_a_share_p_the_maximum_by_its_seed_alone(p, seed):
    n = 4000
    figures = past(np.full(n, 10.0), np.full(n, 100.0))
    got = choose("multiplexed", figures, STATISTICS, multiplexed_p=p, seed=seed)
    np.testing.assert_array_equal(got, choose("multiplexed", figures, STATISTICS, multiplexed_p=p, seed=seed))
    assert set(np.unique(got)) <= {10.0, 100.0}
    assert abs((got == 100.0).mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert (got != choose("multiplexed", figures, STATISTICS, multiplexed_p=p, seed=seed + 1)).any()


def test_logs_without_any_watch_time_ask_for_nothing():
    nothing = watch_statistics(np.zeros(3, int), np.full(3, NAN))
    for strategy in ("average", "maximum", "multiplexed"):
        assert np.isnan(choose(strategy, past([NAN], [NAN]), nothing)).all()


def test_missing_arguments_and_unknown_strategies_are_named():
    p = past([1.0], [1.0])
    with pytest.raises(ValueError, match="fixed_s"):
        choose("fixed", p, STATISTICS)
    with pytest.raises(ValueError, match="true watch times"):
        choose("oracle", p, STATISTICS)
    with pytest.raises(ValueError, match="no strategy 'best'"):
        choose("best", p, STATISTICS)
