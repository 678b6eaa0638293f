"""Requests against a plain loop: which views ask, what they may see, what counts as found; any number of shards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_views import HOUR_MS, T0, made_views, users_only

from trainer.requests import sample_requests


@st.composite
def worlds(draw):
    lengths = draw(st.lists(st.integers(0, 10), min_size=1, max_size=6))
    ids = draw(st.permutations(range(len(lengths))))
    views = made_views(lengths, draw(st.integers(0, 9999)), items=5, ids=np.array(ids) * 11 - 20)
    begin_h, span_h = draw(st.integers(-5, 200)), draw(st.integers(0, 150))
    return views, T0 + begin_h * HOUR_MS, T0 + (begin_h + span_h) * HOUR_MS


def shards_of(views, shards):
    return [users_only(views, views.user_id_U % shards == s) for s in range(shards)]


def sampled(views, begin, end, *, shards=1, judged=None, limit=None, future=1, seed=0):
    parts = shards_of(views, shards)
    return sample_requests(lambda s: parts[s], shards, begin, end, judged=judged, limit=limit, future=future, seed=seed)


def told(requests):
    """Every request by what it holds: user, time, watch time, clock, history, what counts as found."""
    v, rows = requests.views, []
    for q in range(len(requests)):
        past = slice(requests.begin_Q[q], requests.end_Q[q])
        found = slice(requests.relevant_offset_Q1[q], requests.relevant_offset_Q1[q + 1])
        rows.append((int(requests.user_id_Q[q]), int(requests.time_ms_Q[q]), str(np.float32(requests.watch_s_Q[q])),
                     bool(requests.ordinal_Q[q]),
                     tuple(zip(v.item_row_E[past].tolist(), v.timestamp_ms_E[past].tolist(), strict=True)),
                     tuple(requests.relevant_rows[found].tolist()),
                     tuple(str(np.float32(w)) for w in requests.relevant_watch_s[found])))
    return rows


def naive(views, begin, end, judged, future):
    rows = []
    for user in np.argsort(views.user_id_U):
        first, last = views.offset_U[user], views.offset_U[user] + views.length_U[user]
        if judged is not None and not judged(views.user_id_U[user:user + 1])[0]:
            continue
        for event in range(first, last):
            if not begin <= views.timestamp_ms_E[event] < end:
                continue
            found = {}
            for later in range(event, min(event + future, last)):
                if views.timestamp_ms_E[later] < end:
                    found.setdefault(int(views.item_row_E[later]), str(views.watch_s_E[later]))
            past = tuple((int(views.item_row_E[e]), int(views.timestamp_ms_E[e])) for e in range(first, event)
                         if views.timestamp_ms_E[e] < views.timestamp_ms_E[event])
            rows.append((int(views.user_id_U[user]), int(views.timestamp_ms_E[event]), str(views.watch_s_E[event]),
                         bool(views.ordinal_E[event]), past, tuple(found), tuple(found.values())))
    return rows


def even_ids(user_id_U):
    return user_id_U % 2 == 0


@settings(max_examples=120)
@given(worlds(), st.integers(1, 4), st.integers(1, 3), st.sampled_from([None, even_ids]))
def test_requests_are_those_of_a_plain_loop(world, future, shards, judged):
    views, begin, end = world
    requests = sampled(views, begin, end, shards=shards, judged=judged, future=future)
    wanted = naive(views, begin, end, judged, future)
    assert told(requests) == wanted  # by user id, then time
    if wanted:
        assert requests.target_row_Q().tolist() == [row[5][0] for row in wanted]
        assert (requests.end_Q >= requests.begin_Q).all()


@settings(max_examples=60)
@given(worlds(), st.integers(1, 8), st.integers(0, 50), st.integers(1, 3))
def test_a_sample_is_part_of_all_and_does_not_know_the_shards(world, limit, seed, future):
    views, begin, end = world
    everything = told(sampled(views, begin, end, future=future))
    samples = [told(sampled(views, begin, end, shards=shards, limit=limit, future=future, seed=seed))
               for shards in (1, 2, 5)]
    assert samples[0] == samples[1] == samples[2]
    assert len(samples[0]) == min(limit, len(everything))
    left = list(everything)
    for row in samples[0]:
        left.remove(row)  # without replacement
    assert samples[0] == sorted(samples[0], key=lambda row: row[:2])


def test_other_seeds_take_other_samples():
    views = made_views([40, 40], items=5)
    taken = {tuple(r[1] for r in told(sampled(views, T0, T0 + 10**10, limit=10, seed=s))) for s in range(5)}
    assert len(taken) == 5


@settings(max_examples=60)
@given(worlds(), st.integers(1, 3), st.data())
def test_take_gives_some_of_the_requests_in_any_order(world, future, data):
    views, begin, end = world
    requests = sampled(views, begin, end, shards=2, future=future)
    everything = told(requests)
    which = np.array(data.draw(st.lists(st.integers(0, len(everything) - 1), max_size=6)) if everything else [], int)
    taken = requests.take(which)
    assert told(taken) == [everything[q] for q in which]
    assert len(taken) == len(which) and taken.relevant_offset_Q1[0] == 0


def test_nothing_at_or_after_a_request_is_in_its_history():
    views = made_views([25, 25], items=4)
    requests = sampled(views, T0 + 50 * HOUR_MS, T0 + 150 * HOUR_MS, shards=2)
    assert len(requests) > 10
    place = [(requests.views.timestamp_ms_E[b:e] < t).all() for b, e, t in zip(
        requests.begin_Q, requests.end_Q, requests.time_ms_Q, strict=True)]
    assert all(place)  # also not a view of the very same time that stands before it


@pytest.mark.parametrize("judged", [None, lambda ids: np.zeros(len(ids), bool)])
def test_a_period_without_a_view_has_no_request(judged):
    requests = sampled(made_views([5]), T0 - 10, T0 - 5 if judged is None else T0 + 10**10, judged=judged)
    assert len(requests) == 0 and len(requests.relevant_offset_Q1) == 1 and len(requests.target_row_Q()) == 0
