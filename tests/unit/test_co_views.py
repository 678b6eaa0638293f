"""Co-views against plain loops: what counts before a watermark, in which order, and nothing from it on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_shards import MadeStore, random_rows, rows_of

from trainer.co_views import CoViews

HOUR = 3_600_000


def naive(rows, watermark, since=None):
    """{user: [(time, item, session)]} in time order."""
    found = {}
    order = np.lexsort((rows.item_row, rows.time_ms, rows.user_id))
    for k in order:
        late = rows.time_ms[k] >= watermark or (since is not None and rows.time_ms[k] < since)
        if rows.effective[k] and rows.item_row[k] > 0 and not late:
            found.setdefault(int(rows.user_id[k]), []).append((int(rows.time_ms[k]), int(rows.item_row[k])))
    return found


def by_user(views):
    return {int(user): list(zip(views.time_ms_V[b:e].tolist(), views.item_V[b:e].tolist(), strict=True))
            for user, b, e in zip(views.user_id_U, views.offset_U1[:-1], views.offset_U1[1:], strict=True)}


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(0, 45), st.integers(1, 3))
def test_equals_a_plain_loop(seed, count, watermark, shards):
    rows = random_rows(seed, count)
    views = CoViews.build(MadeStore(rows, 8, shards), watermark, None)
    wanted = naive(rows, watermark)
    assert by_user(views) == wanted
    distinct = {user: list(dict.fromkeys(item for _, item in reversed(seen))) for user, seen in wanted.items()}
    for at, user in enumerate(views.user_id_U.tolist()):
        assert views.item_P[views.pair_offset_U1[at]:views.pair_offset_U1[at + 1]].tolist() == distinct[user]
    users = views.user_id_U.tolist()
    for item in range(views.rows):
        holders = views.user_P[views.user_offset_N1[item]:views.user_offset_N1[item + 1]]
        assert holders.tolist() == [at for at, user in enumerate(users) if item in distinct[user]]
    assert views.users_N.sum() == views.items_U.sum() == sum(map(len, distinct.values()))


@pytest.mark.parametrize("count", [0, 50])
def test_mapped_files_hold_the_same(tmp_path, count):
    store = MadeStore(random_rows(3, count), 8)
    in_memory = CoViews.build(store, 30, None)
    CoViews.build(store, 30, None, tmp_path)
    for name, wanted in vars(in_memory).items():
        np.testing.assert_array_equal(getattr(CoViews.open(tmp_path), name), wanted, err_msg=name)


def test_window_begins_where_it_should():
    rows = rows_of((1, 1, 0), (1, 2, HOUR), (1, 3, 2 * HOUR), (1, 4, 3 * HOUR))
    views = CoViews.build(MadeStore(rows, 8), 3 * HOUR, 2.0)
    assert views.item_V.tolist() == [2, 3] and views.since_ms == HOUR


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(0, 45))
def test_between_is_a_build_of_its_own(seed, count, end):
    rows = random_rows(seed, count)
    part = CoViews.build(MadeStore(rows, 8), 45, None).between(10, end)
    assert by_user(part) == naive(rows, min(end, 45), 10)
    whole = CoViews.build(MadeStore(rows.where(rows.time_ms >= 10), 8), min(end, 45), None)
    for name in ("user_id_U", "item_P", "user_P", "user_offset_N1", "session_V"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name), err_msg=name)


def test_without_sessions():
    assert CoViews.build(MadeStore(random_rows(0, 20), 8, session=False), 40, None).session_V is None
