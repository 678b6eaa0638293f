"""Item statistics against a plain loop, and which of them a request may see."""

from math import isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_shards import MadeStore, random_rows, rows_of

from configs.errors import InputError
from configs.schema import ChannelsConfig
from trainer.catalogue import NEVER_SEEN_MS
from trainer.item_statistics import RECENT_H, ItemStatistics, StatisticsSnapshots, count_items, publish

MINUTE = 60_000


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 80), st.integers(0, 45), st.integers(1, 3))
def test_equals_a_plain_loop(seed, count, watermark, shards):
    rows = random_rows(seed, count)
    found = count_items(MadeStore(rows, 8, shards), watermark)
    for item in range(1, 9):
        at = [k for k in range(count) if rows.item_row[k] == item and rows.time_ms[k] < watermark]
        known = [k for k in at if not isnan(rows.watch_s[k])]
        assert found.views_N[item] == len(at)
        assert found.effective_views_N[item] == sum(rows.effective[k] for k in at)
        for hours, recent_N in zip(RECENT_H, found.recent_views_HN, strict=True):
            since = watermark - hours * 3_600_000
            assert recent_N[item] == sum(bool(rows.effective[k]) and rows.time_ms[k] >= since for k in at)
        assert found.known_views_N[item] == len(known)
        assert found.watch_s_N[item] == sum(round(1000 * float(rows.watch_s[k])) for k in known) / 1000
        assert found.first_seen_ms_N[item] == min((rows.time_ms[k] for k in at), default=NEVER_SEEN_MS)
    assert found.views_N[0] == 0


def test_mean_is_shrunk_by_ten_views():
    rows = rows_of(*((u, 1, u) for u in range(10)), watch_s=60.0) + rows_of((1, 2, 5), watch_s=5.0)
    mean = count_items(MadeStore(rows, 3), 100).mean_watch_s_N
    overall = 605 / 11
    assert mean[1] == pytest.approx((600 + 10 * overall) / 20) and mean[2] == pytest.approx((5 + 10 * overall) / 11)
    assert mean[3] == pytest.approx(overall)
    assert not ItemStatistics.empty(4).mean_watch_s_N.any()


def test_published_and_read_as_of_a_time(tmp_path):
    store = MadeStore(random_rows(1, 80, span=40 * MINUTE), 8)
    config = ChannelsConfig(rollback_min=5)
    made = {at * MINUTE: count_items(store, at * MINUTE) for at in (10, 30)}
    for watermark, statistics in made.items():
        publish(tmp_path, watermark, statistics, store.vocabulary, {"format": 1})
    snapshots = StatisticsSnapshots(tmp_path, config, store.vocabulary)
    for name, wanted in vars(made[10 * MINUTE]).items():
        np.testing.assert_array_equal(getattr(snapshots.at(29 * MINUTE), name), wanted, err_msg=name)
    assert snapshots.at(9 * MINUTE).views_N.sum() == snapshots.at(None).views_N.sum() == 0
    assert snapshots.numbers_at(np.array([15, 34, 35]) * MINUTE).tolist() == [0, 0, 1]
    assert snapshots.number(1).views_N.sum() == made[30 * MINUTE].views_N.sum()
    with pytest.raises(InputError, match="before the first item statistics"):
        snapshots.numbers_at(np.array([14 * MINUTE]))
    with pytest.raises(InputError, match="run watchtower channels"):
        StatisticsSnapshots(tmp_path / "nowhere", config, store.vocabulary)
