"""Item values: the candidates, their features and the expected hits of lists, against plain Python."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_replay import config_of, made_run
from made_requests import CONFIG, ITEMS, lists_of_request, made_channels, made_rule, made_shard

from configs.errors import InputError
from embeddings.snapshots import list_snapshots
from launch.ingest import SerialExecutor
from launch.replay import make_labels
from trainer import item_statistics, item_value
from trainer.replay import future_items
from trainer.sequences import SequenceStore
from trainer.triggers import is_future_view, trigger_requests

ROWS = ITEMS + 1
CATALOGUE = SimpleNamespace(item_id_N=np.arange(ROWS), duration_s_N=np.full(ROWS, np.nan, np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("item-value")


def votes(made, requests, shard, r):
    """What the lists of a request's triggers say of each item: item -> votes, scores, places by channel."""
    found, channels = {}, len(made.snapshots.names)
    numbers_C = made.snapshots.numbers_at(requests.time_ms_R)[r]
    for t in range(requests.trigger_offset_R1[r], requests.trigger_offset_R1[r + 1]):
        lists = lists_of_request(made.snapshots, requests.time_ms_R[r], requests.trigger_row_T[t])
        for channel, items in enumerate(lists):
            whole = made.snapshots.lists(channel, int(numbers_C[channel]))
            begin = whole.offset_N1[requests.trigger_row_T[t]]
            for place, item in enumerate(items):
                of = found.setdefault(item, np.zeros(3 * channels + 3))
                of[channel] += 1
                of[channels + channel] += whole.score_L[begin + place] / np.quantile(whole.score_L, 0.9)
                of[2 * channels + channel] += np.exp(-(requests.position_T[t] - 1) / 15) / (1 + place / 10)
    history = shard.item_row_E[shard.offset_U[requests.user_R[r]]:requests.history_end_R[r]]
    effective = shard.is_effective_E[shard.offset_U[requests.user_R[r]]:requests.history_end_R[r]]
    for item, of in found.items():
        of[-3:] = (history == item).sum(), (effective & (history == item)).sum(), np.diff(requests.trigger_offset_R1)[r]
    return found


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), channels=st.integers(0, 2))
def test_candidates_and_expected_hits_equal_a_plain_count(folder, seed, channels):
    made, shard = made_channels(folder, channels), made_shard(seed)
    rule = made_rule()
    requests = trigger_requests(shard, 3, rule, CONFIG)
    future = future_items(shard, requests, is_future_view(shard, rule), 5)
    found, label_K = item_value.candidates(shard, requests, made.snapshots, made.statistics, CATALOGUE,
                                           future=(future.offset_R1, future.row_V))
    rng = np.random.default_rng(seed)
    value_K = rng.random(len(found.row_K)).astype(np.float32)
    hits_TCP = item_value.expected_hits(found, value_K, requests, made.snapshots, ROWS, tops=(1, 3, 50))
    assert found.feature_KF.shape[1] == len(item_value.feature_names(tuple(made.snapshots.names)))
    for r in range(len(requests)):
        at = slice(found.offset_R1[r], found.offset_R1[r + 1])
        expected = votes(made, requests, shard, r)
        assert set(found.row_K[at].tolist()) == set(expected) and at.stop - at.start == len(expected)
        later = set(future.row_V[future.offset_R1[r]:future.offset_R1[r + 1]].tolist())
        assert [item in later for item in found.row_K[at]] == label_K[at].tolist()
        width = len(next(iter(expected.values()), []))
        for item, features in zip(found.row_K[at], found.feature_KF[at], strict=True):
            np.testing.assert_allclose(features[:width], np.log1p(expected[item]), rtol=2e-5)
        value = dict(zip(found.row_K[at].tolist(), value_K[at].tolist(), strict=True))
        for t in range(requests.trigger_offset_R1[r], requests.trigger_offset_R1[r + 1]):
            lists = lists_of_request(made.snapshots, requests.time_ms_R[r], requests.trigger_row_T[t])
            for channel, items in enumerate(lists):
                wanted = [sum(value[item] for item in items[:top]) for top in (1, 3, 50)]
                np.testing.assert_allclose(hits_TCP[t, channel], wanted, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nothing_at_or_after_the_request_is_read(folder, seed):
    made, shard = made_channels(folder, 0), made_shard(seed)
    requests = trigger_requests(shard, 0, made_rule(), CONFIG)
    before, _ = item_value.candidates(shard, requests, made.snapshots, made.statistics, CATALOGUE)
    later_E = np.ones(len(shard.item_row_E), bool)
    for r in range(len(requests)):
        later_E[shard.offset_U[requests.user_R[r]]:requests.history_end_R[r]] = False
    changed = made_shard(seed)
    changed.item_row_E[later_E], changed.is_effective_E[later_E] = 1, True
    after, _ = item_value.candidates(changed, requests, made.snapshots, made.statistics, CATALOGUE)
    np.testing.assert_array_equal(before.row_K, after.row_K)
    np.testing.assert_array_equal(before.feature_KF, after.feature_KF)


def test_sampling_keeps_every_hit_and_the_same_rest(folder):
    made, shard, rule = made_channels(folder, 1), made_shard(5, users=40, longest=30), made_rule()
    requests = trigger_requests(shard, 0, rule, CONFIG)
    future = future_items(shard, requests, is_future_view(shard, rule), 5)
    known = (future.offset_R1, future.row_V)
    every, label_K = item_value.candidates(shard, requests, made.snapshots, made.statistics, CATALOGUE, 1.0, known)
    some, is_hit_K = item_value.candidates(shard, requests, made.snapshots, made.statistics, CATALOGUE, 0.3, known)
    again, _ = item_value.candidates(shard, requests, made.snapshots, made.statistics, CATALOGUE, 0.3, known)
    assert is_hit_K.sum() == label_K.sum() > 0
    assert 0.15 < (~is_hit_K).sum() / (~label_K).sum() < 0.45
    np.testing.assert_array_equal(some.row_K, again.row_K)


def test_the_network_learns_and_is_calibrated():
    rng = np.random.default_rng(0)
    feature_KF = rng.normal(size=(100_000, 3)).astype(np.float32) * [1, 50, 0] + [0, 7, 3]
    p_K = 1 / (1 + np.exp(4 - 1.5 * feature_KF[:, 0]))
    hit_K = rng.random(len(p_K)) < p_K
    keep_K = hit_K | (rng.random(len(p_K)) < item_value.NEGATIVE_SHARE)
    model, loss = item_value._fit(feature_KF[keep_K].astype(np.float32), hit_K[keep_K], seed=0)
    found = item_value.Candidates(np.array([0, len(p_K)]), np.zeros(len(p_K), np.int32), feature_KF.astype(np.float32))
    value_K = model.values(found)
    assert value_K.mean() == pytest.approx(p_K.mean(), rel=0.15)
    assert np.corrcoef(value_K, p_K)[0, 1] > 0.9
    twin, same_loss = item_value._fit(feature_KF[keep_K].astype(np.float32), hit_K[keep_K], seed=0)
    assert loss == same_loss and all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(),
                                                                      strict=True))


def test_fit_publishes_once(tmp_path):
    config = config_of(made_run(tmp_path / "run", 2))
    store = SequenceStore(tmp_path / "run" / "sequences")
    for snapshot in list_snapshots(tmp_path / "run" / "channels" / "swing"):
        item_statistics.publish(tmp_path / "run" / "channels", snapshot.watermark_ms,
                                item_statistics.count_items(store, snapshot.watermark_ms), store.vocabulary, {})
    make_labels(config, tmp_path / "run", SerialExecutor())
    fitted = item_value.fit_item_value(config, tmp_path / "run", lambda ids: np.ones(len(ids), bool))
    assert fitted["requests"] > 0 and 0 < fitted["positive_share"] < 1 and np.isfinite(fitted["log_loss"])
    file = tmp_path / "run" / "item_value" / "model.safetensors"
    written = file.stat().st_mtime_ns
    assert item_value.fit_item_value(config, tmp_path / "run", lambda ids: np.ones(len(ids), bool)) == fitted
    assert file.stat().st_mtime_ns == written
    model = item_value.load_item_value(tmp_path / "run")
    assert model.mean_F.shape[0] == len(item_value.feature_names(("swing", "content")))
    (tmp_path / "run" / "item_value" / "manifest.json").unlink()
    with pytest.raises(InputError, match="no list of any training request"):
        item_value.fit_item_value(config, tmp_path / "run", lambda ids: np.zeros(len(ids), bool))
