"""Every channel: against plain loops, blind to everything from its watermark on, and published whole by the stage."""

from collections import defaultdict
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_requests import CONFIG, made_rule, made_shard, made_statistics
from made_shards import MadeStore, random_rows, rows_of, seen
from made_views import made_catalogue

from configs.errors import InputError, QualityGateError, WatchtowerError
from configs.schema import ChannelsConfig, Config
from embeddings.index import IndexSpec, ItemIndex
from embeddings.snapshots import list_snapshots, publish, read_manifest
from launch import channels as stage
from launch.ingest import SerialExecutor as SerialIngest
from launch.ingest import ingest
from trainer import item_statistics, item_value
from trainer.channels import CHANNELS, Given, build_channel, nearest, pairwise_lr, watermarks
from trainer.channels.blocks import near_pairs
from trainer.channels.embedding import shifted_ppmi, truncated_svd
from trainer.channels.nearest import nearest_neighbors
from trainer.channels.pairwise_lr import candidates, count_labels, fit_binomial, pair_features
from trainer.channels.session import sessions
from trainer.co_views import CoViews
from trainer.item_statistics import ItemStatistics, StatisticsSnapshots
from trainer.logs import NULL_SESSION
from trainer.neighbors import ChannelSnapshots, NeighborLists, publish_neighbors, read_neighbors
from trainer.replay import rewards_ms
from trainer.sequences import SequenceStore
from trainer.triggers import is_future_view, is_routing_test_user, trigger_requests
from trainer.vocabulary import Vocabulary

HOUR, DAY = 3_600_000, 86_400_000
T0 = 1_641_168_000_000  # 3 January 2022, 00:00 UTC
ALL = tuple(CHANNELS)


def pairs_of(lists):
    return {(item, int(other)) for item in range(len(lists.length_N)) for other in lists.of(item)}


# ------------------------------------------------------------------------------------------- counts, by plain loops

@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(1, 5), st.booleans(), st.booleans())
def test_near_pairs_equal_a_plain_loop(seed, count, window, later_only, by_gap):
    views = CoViews.build(MadeStore(random_rows(seed, count), 8), 45, None)
    weight_V = np.random.default_rng(seed).random(len(views.item_V))
    wanted = defaultdict(float)
    for begin, end in zip(views.offset_U1[:-1], views.offset_U1[1:], strict=True):
        for p in range(begin, end):
            for q in range(p + 1, min(end, p + window + 1)):
                i, j = int(views.item_V[p]), int(views.item_V[q])
                if i != j:
                    wanted[i, j] += weight_V[q] / (q - p if by_gap else 1)
                    if not later_only:
                        wanted[j, i] += weight_V[q] / (q - p if by_gap else 1)
    item, neighbor, score = near_pairs(views.offset_U1, views.item_V, views.rows, window, threads=1 + seed % 2,
                                       weight_V=weight_V, later_only=later_only, by_gap=by_gap)
    found = dict(zip(zip(item.tolist(), neighbor.tolist(), strict=True), score, strict=True))
    assert found.keys() == wanted.keys() and all(found[p] == pytest.approx(wanted[p]) for p in wanted)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 60))
def test_sessions_are_a_users_own_and_in_time_order(seed, count):
    views = CoViews.build(MadeStore(random_rows(seed, count), 8), 45, None)
    user_V = np.repeat(views.user_id_U, np.diff(views.offset_U1))
    wanted = defaultdict(list)
    for v in range(len(user_V)):
        if views.session_V[v] != NULL_SESSION:
            wanted[int(user_V[v]), int(views.session_V[v])].append(v)
    offset, at = sessions(views)
    found = [at[b:e].tolist() for b, e in zip(offset[:-1], offset[1:], strict=True)]
    assert sorted(found) == sorted(wanted.values())


def test_ppmi_by_hand():
    rows = rows_of((1, 1, 0), (1, 2, 1), (2, 1, 0), (2, 2, 1), (3, 1, 0), (3, 3, 1), (4, 4, 0), (4, 3, 1))
    matrix = shifted_ppmi(CoViews.build(MadeStore(rows, 4), 9, None), 1, 1.25).toarray()
    # 8 ordered co-views; item 1 has 3, item 2 has 2.
    assert matrix[1, 2] == matrix[2, 1] == pytest.approx(np.log(2 * 8 / (3 * 2)) - np.log(1.25))
    assert matrix[1, 3] == pytest.approx(np.log(1 * 8 / (3 * 2)) - np.log(1.25))
    assert matrix[1, 4] == 0


def test_truncated_svd_finds_the_largest_values():
    rng = np.random.default_rng(0)
    strength = 0.7 ** np.arange(200)
    left, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    right, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    import scipy.sparse

    matrix = scipy.sparse.csr_matrix((left * strength) @ right.T)
    found, values = truncated_svd(matrix, 10, 0)
    np.testing.assert_allclose(values, strength[:10], rtol=1e-8)
    np.testing.assert_allclose(found @ found.T, left[:, :10] @ left[:, :10].T, atol=1e-6)
    np.testing.assert_array_equal(truncated_svd(matrix, 10, 0)[0], found)


def test_nearest_neighbors_through_inverted_lists_are_nearly_the_exact_ones(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8)).repeat(40, axis=0) + 0.3 * rng.normal(size=(2000, 8))
    exact = pairs_of(nearest_neighbors(vectors, np.arange(1, 2001), 2001, 10, 1))
    monkeypatch.setattr(nearest, "EXACT_UP_TO", 100)
    found = pairs_of(nearest_neighbors(vectors, np.arange(1, 2001), 2001, 10, 1))
    assert len(found & exact) > 0.8 * len(exact)


def test_nearest_neighbors_take_the_lower_row_among_equals_and_leave_zeros_out():
    vectors = np.array([[1, 0], [2, 0], [1, 1], [0, 0], [3, 0]], np.float32)
    lists = nearest_neighbors(vectors, np.array([1, 2, 3, 4, 5]), 6, 2, 1)
    assert lists.of(1).tolist() == [2, 5] and lists.of(5).tolist() == [1, 2] and lists.of(3).tolist() == [1, 2]
    assert not len(lists.of(4)) and lists.score_L[0] == 1


# ---------------------------------------------------------------------------------------------------- the regression

@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 80))
def test_pair_features_and_labels_equal_plain_loops(seed, count):
    rows = random_rows(seed, count)
    store, catalogue, window = MadeStore(rows, 8), seen(made_catalogue(9), rows), 3
    views = CoViews.build(store, 45, None)
    before, labels = views.between(None, 20), views.between(20, 45)
    item, neighbor, co_views = candidates(before, ChannelsConfig().pairwise_lr.model_copy(update={"window": window}))
    x = pair_features(before, catalogue, window, item, neighbor, co_views)
    trials, successes = count_labels(before, labels, item, neighbor)
    assert np.isfinite(x).all()
    held_before, held_later = ({int(u): set(v.item_P[b:e].tolist()) for u, b, e in zip(
        v.user_id_U, v.pair_offset_U1[:-1], v.pair_offset_U1[1:], strict=True)} for v in (before, labels))
    tags = [set(catalogue.tag_rows[b:e].tolist()) for b, e in zip(catalogue.tag_offsets_N1[:-1],
                                                                  catalogue.tag_offsets_N1[1:], strict=True)]
    for p in range(len(item)):
        i, j = int(item[p]), int(neighbor[p])
        gaps = [q - k for b, e in zip(before.offset_U1[:-1], before.offset_U1[1:], strict=True) for k in range(b, e)
                for q in range(max(b, k - window), min(e, k + window + 1))
                if before.item_V[k] == i and before.item_V[q] == j]
        assert co_views[p] == len(gaps)
        assert x[p, 10] == pytest.approx(np.mean([1 / abs(g) for g in gaps]))
        assert x[p, 11] == pytest.approx(np.mean([g > 0 for g in gaps]))
        tried = [u for u in held_before if i in held_before[u] and u in held_later]
        assert trials[p] == len(tried) and successes[p] == sum(j in held_later[u] for u in tried)
        assert x[p, 6] == (catalogue.author_row_N[i] == catalogue.author_row_N[j] > 0)
        wanted = len(tags[i] & tags[j]) / max(len(tags[i] | tags[j]), 1)  # a tag may stand twice in a made list
        if len(tags[i]) + len(tags[j]) == np.diff(catalogue.tag_offsets_N1)[[i, j]].sum():
            assert x[p, 7] == pytest.approx(wanted)


def test_pairs_are_scored_in_slices_with_the_same_result(monkeypatch):
    rows = random_rows(5, 200, users=20)
    whole = lists_of("pairwise-lr", rows, 40, pairwise_lr={"label_h": 15 / HOUR})
    monkeypatch.setattr(pairwise_lr, "SCORED_AT_ONCE", 5)
    parts = lists_of("pairwise-lr", rows, 40, pairwise_lr={"label_h": 15 / HOUR})
    assert len(whole.neighbor_L) > 20
    np.testing.assert_array_equal(parts.neighbor_L, whole.neighbor_L)
    np.testing.assert_array_equal(parts.score_L, whole.score_L)


def test_binomial_fit_finds_what_made_the_labels():
    rng = np.random.default_rng(0)
    x, trials = rng.normal(size=(4000, 3)), rng.integers(1, 30, 4000)
    beta = np.array([-2.0, 1.0, 0.0, -0.5])
    successes = rng.binomial(trials, 1 / (1 + np.exp(-(beta[0] + x @ beta[1:]))))
    np.testing.assert_allclose(fit_binomial(x, trials, successes), beta, atol=0.03)
    with pytest.raises(ValueError, match="0.0 successes"):
        fit_binomial(x, trials, np.zeros(4000))


# ------------------------------------------------------------------------------------------------------ no look ahead

def given_all(rows, tmp_path=None, **config):
    return Given(ChannelsConfig(top=5, **config), seen(made_catalogue(9), rows), tmp_path)


def lists_of(name, rows, watermark, tmp_path=None, **config):
    views = CoViews.build(MadeStore(rows, 8), watermark, None)
    return build_channel(name, views, given_all(rows, tmp_path, **config)).lists


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.integers(0, 80), st.integers(0, 30))
def test_what_comes_later_changes_nothing(name, seed, count, watermark):
    """The same lists, bit by bit, whether the future is this one, another one, or none."""
    past = random_rows(seed, count, span=30).where(slice(None))
    past = past.where(past.time_ms < watermark)
    settings_ = {"pairwise_lr": {"label_h": 10 / HOUR}}
    alone = lists_of(name, past, watermark, **settings_)
    for future_seed in (1, 2):
        future = random_rows(seed + future_seed, 40, span=10)
        future.time_ms[:] += watermark
        found = lists_of(name, past + future, watermark, **settings_)
        for key, wanted in vars(alone).items():
            np.testing.assert_array_equal(getattr(found, key), wanted, err_msg=key)


@pytest.mark.parametrize("name", [name for name in ALL if name != "content"])
def test_a_pair_that_co_occurs_later_is_in_no_earlier_list(name):
    """Items 1 and 5 are watched before t by users who share nothing; from t on other users watch both."""
    before = rows_of(*((user, item, item * HOUR, 1) for user in range(4) for item in (1, 2, 3, 4)),
                     *((user, item, item * HOUR, 1) for user in range(4, 8) for item in (5, 6, 7)))
    t = 10 * HOUR
    later = rows_of(*((user, item, t + k * HOUR, 2) for user in range(8, 16) for k, item in enumerate((1, 8, 5))))
    config = {"embedding": {"dim": 100}, "pairwise_lr": {"label_h": 2.0}}
    early = pairs_of(lists_of(name, before + later, t, **config))
    assert (1, 2) in early and not early & {(1, 5), (5, 1)}
    assert (1, 5) in pairs_of(lists_of(name, before + later, t + 5 * HOUR, **config))


@pytest.mark.parametrize("name", [name for name in ALL if name != "content"])
def test_no_label_and_no_candidate_knows_of_a_pair_that_co_occurs_later(name, tmp_path):
    """The pair of the test above, published, and a user who watches 1, then 5, then 5 again: at a request between the
    first two neither the label of trigger 1 nor a candidate says so; at one that sees the later snapshot both do."""
    t = 10 * HOUR
    before = rows_of(*((user, item, item * HOUR, 1) for user in range(4) for item in (1, 2, 3, 4)),
                     *((user, item, item * HOUR, 1) for user in range(4, 8) for item in (5, 6, 7)))
    later = rows_of(*((user, item, t + k * HOUR, 2) for user in range(8, 16) for k, item in enumerate((1, 8, 5))))
    vocabulary = Vocabulary(np.arange(1, 9) * 10)
    for watermark in (t, t + 5 * HOUR):
        lists = lists_of(name, before + later, watermark, embedding={"dim": 100}, pairwise_lr={"label_h": 2.0})
        publish_neighbors(tmp_path / name, watermark, lists, vocabulary, {})
        item_statistics.publish(tmp_path, watermark, made_statistics(np.random.default_rng(0), 9, watermark),
                                vocabulary, {})
    config = CONFIG.model_copy(update={"channels": CONFIG.channels.model_copy(update={"names": [name]})})
    snapshots = ChannelSnapshots(tmp_path, config.channels, vocabulary, [name])
    user = next(u for u in range(9) if not is_routing_test_user(np.array([u]), config)[0])
    time_E = np.array([t - HOUR, t + 2 * HOUR, t + 7 * HOUR])
    shard = replace(made_shard(0, users=1, longest=0), user_id_U=np.array([user]), length_U=np.array([3], np.int32),
                    item_row_E=np.array([1, 5, 5], np.int32), timestamp_ms_E=time_E, feedback={},
                    watch_time_s_E=np.full(3, 9, np.float32), duration_s_E=np.full(3, 9, np.float32),
                    is_effective_E=np.ones(3, bool), is_target_E=np.ones(3, bool), is_ordinal_E=np.zeros(3, bool))
    rule = made_rule(cuts=((t + HOUR, t + 3 * HOUR), (t + 6 * HOUR, t + 9 * HOUR)))
    requests = trigger_requests(shard, 0, rule, config)
    reward_ms_T = rewards_ms(shard, requests, is_future_view(shard, rule), snapshots, [5], 0.0)[0, :, 0]
    catalogue = SimpleNamespace(item_id_N=np.arange(9), duration_s_N=np.full(9, np.nan, np.float32))
    found, _ = item_value.candidates(shard, requests, snapshots,
                                     StatisticsSnapshots(tmp_path, config.channels, vocabulary), catalogue)
    brought = [set(found.row_K[found.request_K == r].tolist()) for r in range(2)]
    reward = dict(zip(zip(requests.request_T.tolist(), requests.trigger_row_T.tolist(), strict=True),
                      reward_ms_T.tolist(), strict=True))
    assert reward[0, 1] == 0 and 5 not in brought[0] and 2 in brought[0]
    assert reward[1, 1] == 9000 and 5 in brought[1]


@pytest.mark.parametrize("vectors", [True, False])
def test_content_knows_no_item_before_it_was_seen(vectors):
    rows = rows_of((1, 1, 0), (1, 2, 5), (1, 3, 9), (2, 4, 3))
    catalogue = seen(made_catalogue(9, content=vectors), rows)
    catalogue.has_content_N = catalogue.has_content_N & vectors
    catalogue.author_row_N = np.array([0, 1, 1, 1, 1, 2, 2, 2, 2], np.int32)
    if vectors:
        catalogue.content_NC = np.abs(catalogue.content_NC)
    views = CoViews.build(MadeStore(rows, 8), 5, None)
    built = build_channel("content", views, Given(ChannelsConfig(), catalogue))
    assert pairs_of(built.lists) == {(1, 4), (4, 1)} and built.facts["items_seen"] == 2
    later = CoViews.build(MadeStore(rows, 8), 6, None)
    assert (1, 2) in pairs_of(build_channel("content", later, Given(ChannelsConfig(), catalogue)).lists)


def test_tower_vectors_are_the_newest_that_are_not_later(tmp_path):
    rows = rows_of((1, 1, 0), (1, 2, 1), (1, 3, 2), (1, 4, 70))
    folder = tmp_path / "channel-embedding" / "seed=0"
    item_ids = made_catalogue(9).item_id_N[1:]
    near = {40: (1, 2), 60: (1, 3), 90: (2, 3)}  # which two items each index puts together
    for watermark, (a, b) in near.items():
        vectors = np.eye(8, dtype=np.float32)
        vectors[b - 1] = vectors[a - 1]
        vectors[3] = vectors[a - 1]  # item 4, which nobody has seen at 60
        bias = -np.arange(1, 9, dtype=np.float32)[:, None] * 3  # log popularity, about; it makes nobody a neighbour
        held = np.concatenate([vectors, bias], axis=1)
        publish(folder / f"{watermark}-7", ItemIndex.build(held, item_ids, IndexSpec(device="cpu")).save, {})
    config = {"embedding": {"source": "crm"}}
    assert pairs_of(lists_of("embedding", rows, 50, tmp_path, **config)) == {(1, 2), (2, 1)}
    assert pairs_of(lists_of("embedding", rows, 60, tmp_path, **config)) == {(1, 3), (3, 1)}
    assert (2, 4) in pairs_of(lists_of("embedding", rows, 90, tmp_path, **config))
    with pytest.raises(InputError, match="holds no index with a watermark up to 30 ms"):
        lists_of("embedding", rows, 30, tmp_path, **config)


def test_neighbours_by_a_tower_are_by_its_vectors_and_not_by_its_bias(tmp_path):
    """What CRM's index holds of items: two directions, and a bias that is the lower the fewer views an item has."""
    from embeddings.similarity import Similarity

    rng = np.random.default_rng(0)
    direction = np.repeat(np.eye(2, 6, dtype=np.float32), 4, axis=0) + 0.1 * rng.normal(size=(8, 6)).astype(np.float32)
    bias = np.array([-3, -4, -5, -12, -3, -4, -5, -12], np.float32)
    held = Similarity("cosine").index_vectors(torch.from_numpy(direction), torch.from_numpy(bias)).numpy()
    item_ids = made_catalogue(9).item_id_N[1:]
    publish(tmp_path / "channel-embedding" / "seed=0" / "0-7",
            ItemIndex.build(held, item_ids, IndexSpec(device="cpu")).save, {})
    rows = rows_of(*((user, item, item) for user in range(2) for item in range(1, 9)))
    lists = lists_of("embedding", rows, 50, tmp_path, embedding={"source": "crm"})
    found = {tuple(sorted([item, *lists.of(item)[:3].tolist()])) for item in range(1, 9)}
    assert found == {(1, 2, 3, 4), (5, 6, 7, 8)}


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_index_gives_its_vectors_back(tmp_path, factory):
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    index = ItemIndex.build(vectors, np.arange(300) * 3, IndexSpec(factory, device="cpu", threads=1))
    index.save(tmp_path)
    np.testing.assert_array_equal(ItemIndex.load(tmp_path).vectors(), vectors)
    np.testing.assert_array_equal(index.vectors(), vectors)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [rows_of(), rows_of((1, 1, 0), (2, 2, 1)), rows_of(*((1, 1, t) for t in range(5)))],
                         ids=["empty", "one view each", "one item"])
def test_nothing_co_viewed(name, rows):
    lists = lists_of(name, rows, 10)
    assert not (pairs_of(lists) - ({(1, 2), (2, 1)} if name == "content" else set()))


# ---------------------------------------------------------------------------------------------------------- the stage

def made_run(tmp_path, name, rows, items=True):
    """A run folder with ingested sequences of these rows, and its config."""
    folder = tmp_path / name
    (folder / "run").mkdir(parents=True)
    watch_s = pa.array(rows.watch_s, mask=np.isnan(rows.watch_s))
    pq.write_table(pa.table({"user_id": rows.user_id, "item_id": rows.item_row.astype(np.int64) * 10,
                             "timestamp_ms": rows.time_ms, "watch_time_s": watch_s}), folder / "logs.parquet")
    data = {"logs": str(folder / "logs.parquet"), "shards": 2}
    if items:
        pq.write_table(pa.table({"item_id": np.arange(1, 9) * 10, "author_id": np.arange(1, 9) % 3}),
                       folder / "items.parquet")
        data["items"] = str(folder / "items.parquet")
    cuts = {"train_cuts": [{"at": "2022-01-05T00:00:00", "until": "2022-01-06T00:00:00"}],
            "test_cuts": [{"at": "2022-01-07T00:00:00"}]}
    config = Config.model_validate({
        "run_dir": str(folder / "run"), "data": data, "replay": {"requests": cuts},
        "channels": {"names": list(ALL), "top": 5, "embedding": {"dim": 4}}})
    ingest(config.data, folder / "run", SerialIngest())
    return config, folder / "run"


def hourly_rows(seed=0):
    rows = random_rows(seed, 150, users=12, span=120)
    rows.time_ms[:] = T0 + rows.time_ms * HOUR
    return rows.where((rows.item_row > 0) & rows.effective)


def changed(config, **channels):
    return config.model_copy(update={"channels": config.channels.model_copy(update=channels)})


def test_stage_publishes_keeps_and_replaces(tmp_path):
    config, run_dir = made_run(tmp_path, "a", hourly_rows())
    lines = []
    result = stage.build_channels(config, run_dir, stage.SerialExecutor(), lines.append)
    at = [T0 + 2 * DAY - 20 * 60_000, T0 + 4 * DAY - 20 * 60_000]
    assert result["watermarks"] == at and result["absent"].keys() == {"session"}
    assert any("session is absent: the logs have no session column" in line for line in lines)
    assert not (run_dir / "channels" / "session").exists()
    assert list(result["channels"]) == ["swing", "embedding", "content", "pairwise-lr"]
    assert result["channels"]["swing"]["snapshots"] == 2 and result["channels"]["swing"]["kept"] == 0
    assert result["rows"] > 0 and result["channels"]["swing"]["counts"]["items_sampled"] == 0
    assert not list((run_dir / "channels").glob(".*"))
    again = stage.build_channels(config, run_dir, stage.SerialExecutor(), lines.append)
    assert {c["kept"] for c in again["channels"].values()} == {2} and again["item_statistics"]["kept"] == 2
    assert again["rows"] == result["rows"]
    other = changed(config, swing=config.channels.swing.model_copy(update={"alpha": 3.0}))
    again = stage.build_channels(other, run_dir, stage.SerialExecutor(), lines.append)
    assert {name: c["kept"] for name, c in again["channels"].items()} == {
        "swing": 0, "embedding": 2, "content": 2, "pairwise-lr": 2}
    assert read_manifest(run_dir / "channels" / "swing" / str(at[0]))["params"]["alpha"] == 3.0
    stage.build_channels(changed(other, rollback_min=60.0), run_dir, stage.SerialExecutor(), lines.append)
    assert sorted(int(p.name) for p in (run_dir / "channels" / "swing").iterdir()) == [
        T0 + 2 * DAY - HOUR, T0 + 4 * DAY - HOUR]


def test_stage_builds_a_damaged_snapshot_anew(tmp_path):
    config, run_dir = made_run(tmp_path, "a", hourly_rows())
    config = changed(config, names=["swing"])
    stage.build_channels(config, run_dir, stage.SerialExecutor(), print)
    snapshot = next((run_dir / "channels" / "swing").iterdir())
    (snapshot / "neighbors.parquet").write_bytes(b"no")
    result = stage.build_channels(config, run_dir, stage.SerialExecutor(), print)
    assert result["channels"]["swing"]["kept"] == 1
    read_neighbors(snapshot, SequenceStore(run_dir / "sequences").vocabulary)


def test_published_snapshots_have_not_seen_the_future(tmp_path):
    """End to end: logs that differ from t on give the same published neighbours and statistics as of t."""
    rows = hourly_rows()
    t = T0 + 2 * DAY - 20 * 60_000
    other = hourly_rows(seed=9)
    other = rows.where(rows.time_ms < t) + other.where(other.time_ms >= t)
    found = []
    for name, logs in (("a", rows), ("b", other)):
        config, run_dir = made_run(tmp_path, name, logs)
        stage.build_channels(config, run_dir, stage.SerialExecutor(), print)
        vocabulary = SequenceStore(run_dir / "sequences").vocabulary
        found.append(({channel: pq.read_table(run_dir / "channels" / channel / str(t) / "neighbors.parquet")
                       for channel in ("swing", "embedding", "content", "pairwise-lr")},
                      ItemStatistics.read(run_dir / "channels" / "item-statistics" / str(t), vocabulary)))
    (lists_a, statistics_a), (lists_b, statistics_b) = found
    assert lists_a == lists_b and lists_a["swing"].num_rows
    for name, wanted in vars(statistics_a).items():
        np.testing.assert_array_equal(getattr(statistics_b, name), wanted, err_msg=name)
    before = rows.where(rows.time_ms < t)
    assert statistics_a.views_N.sum() == len(np.unique(np.stack([before.user_id, before.item_row, before.time_ms]),
                                                       axis=1)[0])


def test_absent_without_a_catalogue(tmp_path):
    config, run_dir = made_run(tmp_path, "a", hourly_rows(), items=False)
    result = stage.build_channels(changed(config, names=["content", "swing"]), run_dir, None, print)
    assert "no content vectors" in result["absent"]["content"]["absent"] and list(result["channels"]) == ["swing"]


def test_a_tasks_error_leaves_no_scratch(tmp_path):
    config, run_dir = made_run(tmp_path, "a", hourly_rows())
    config = changed(config, names=["embedding"],
                     embedding=config.channels.embedding.model_copy(update={"source": "crm"}))
    with pytest.raises(WatchtowerError, match="Train the channel's tower first"):
        stage.build_channels(config, run_dir, stage.SerialExecutor(), print)
    assert not list((run_dir / "channels").glob(".*"))


def test_watermarks():
    manifest = {"statistics": {"first_timestamp_ms": 5 * HOUR, "last_timestamp_ms": 9 * DAY + 5 * HOUR,
                               "end_99_9_ms": 9 * DAY + 5 * HOUR}}

    def at(channels=None, **requests):
        config = {"replay": {"requests": requests}, "channels": channels or {}, "data": {"utc_offset_h": 2}}
        return watermarks(Config.model_validate(config), manifest)

    cuts = {"train_cuts": [{"at": datetime(1970, 1, 3, 15), "until": datetime(1970, 1, 4)},
                           {"at": datetime(1970, 1, 4), "until": datetime(1970, 1, 5)}],
            "test_cuts": [{"at": datetime(1970, 1, 5, 15)}]}
    local = -2 * HOUR
    assert at({"rollback_min": 60}, **cuts) == [2 * DAY + 14 * HOUR + local, 3 * DAY - HOUR + local,
                                                4 * DAY + 14 * HOUR + local]
    assert at({"snapshots": "daily"}, **cuts) == [day * DAY + local for day in (1, 2, 3, 4)]
    assert at() == [day * DAY + local for day in range(1, 11)]
    with pytest.raises(InputError, match="set channels.snapshots=daily"):
        at({"snapshots": "requests"})


def test_a_snapshot_with_too_few_lists_is_kept_where_no_reader_looks(tmp_path):
    config, run_dir = made_run(tmp_path, "a", hourly_rows())
    alone = config.channels.swing.model_copy(update={"max_items_per_user": 1})  # no two items of a user: no list at all
    config = changed(config, names=["swing"], swing=alone)
    stage.build_channels(config, run_dir, stage.SerialExecutor(), print)
    assert [read_manifest(s.path)["items"] for s in list_snapshots(run_dir / "channels" / "swing")] == [0, 0]
    with pytest.raises(QualityGateError, match="a share of 0 below channels.min_items_with_list 0.01") as told:
        stage.build_channels(changed(config, min_items_with_list=0.01), run_dir, stage.SerialExecutor(), print)
    (kept,) = (run_dir / "channels" / "swing" / "rejected").iterdir()
    assert str(kept) in str(told.value) and read_manifest(kept)["items"] == 0
    assert list_snapshots(run_dir / "channels" / "swing") == []
    # What was published before meets a gate that it reaches, and stays.
    wide = changed(config, names=["swing"], swing=ChannelsConfig().swing)
    stage.build_channels(wide, run_dir, stage.SerialExecutor(), print)
    again = stage.build_channels(changed(wide, min_items_with_list=0.01), run_dir, stage.SerialExecutor(), print)
    assert again["channels"]["swing"]["kept"] == 2


def test_scores_that_are_not_finite_are_never_published():
    lists = NeighborLists(np.array([0, 0, 1]), np.array([1], np.int32), np.array([np.nan], np.float32))
    assert "1 of its 1 scores are not finite" in stage.failed_channel_gate(1, 1, lists, 0.0)
    assert stage.failed_channel_gate(0, 0, NeighborLists.empty(2), 1.0) is None
