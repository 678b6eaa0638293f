"""The router's batches: every request once, the same for any number of workers, nothing of a request's future."""

import json
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_router import made_router_run

from configs.errors import InputError, WatchtowerError
from trainer.router_data import RouterData, RouterPlan
from trainer.router_task import (
    RouterTask,
    _new_folder,
    binned_auc,
    captured_value,
    crm_checkpoint,
    load_crm_tables,
)
from trainer.step_trace import router_feature_counts
from trainer.workers import Workers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router-data") / "run"
    return RouterData(made_router_run(folder), folder)


def keys(batch):
    """What a trigger of a batch is told by: user, vocabulary row, position within the request."""
    row_T = batch.items.row_U[batch.item_T]
    return [(int(batch.user_B[r]), int(row), int(place) % batch.triggers) for r, row, place in zip(
        batch.request_T, row_T, batch.place_T, strict=True)]


# ---------------------------------------------------------------------------------------------------------- the order

@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 8), st.integers(1, 3), st.integers(0, 99),
       st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_pass_has_every_request_once_and_can_begin_anywhere(counts, rows, together, epoch, first):
    plan = RouterPlan(np.array(counts), batch_rows=rows, order=(3, epoch), shuffle_shards=together)
    made = list(plan.batches())
    assert len(made) == plan.steps and plan.rows == sum(counts)
    assert all(len(batch) == rows for batch in made[:-1])
    pairs = [tuple(pair) for batch in made for pair in batch.tolist()]
    assert sorted(pairs) == [(s, n) for s, count in enumerate(counts) for n in range(count)]
    later = list(plan.batches(first))
    assert [batch.tolist() for batch in later] == [batch.tolist() for batch in made[first:]]
    plain = RouterPlan(np.array(counts), batch_rows=rows, order=None)
    assert [tuple(pair) for batch in plain.batches() for pair in batch.tolist()] == sorted(pairs)


def test_epochs_differ_in_order_alone():
    one, two = (np.concatenate(list(RouterPlan(np.array([9, 9, 9]), batch_rows=4, order=(0, epoch)).batches()))
                for epoch in (0, 1))
    assert one.tolist() != two.tolist() and sorted(one.tolist()) == sorted(two.tolist())


# --------------------------------------------------------------------------------------------------------- the batches

@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_share_out_the_batches_of_one(data, workers):
    model, plan = data.config.router.models[0], data.plan(0, 0)
    alone = list(data.batches(plan, model, 0, 1))
    shared = [list(data.batches(plan, model, rank, workers)) for rank in range(workers)]
    assert {len(made) for made in shared} == {len(alone)} == {plan.steps}
    for whole, *parts in zip(alone, *shared, strict=True):
        real = [part for part in parts if part.weight_T.any()]
        assert sorted(keys(whole)) == sorted(key for part in real for key in keys(part))
        assert float(whole.weight_T.sum()) == pytest.approx(1)
        assert sum(float(part.weight_T.sum()) for part in parts) / workers == pytest.approx(1, rel=1e-5)
        assert sum(float(part.weight_B.sum()) for part in parts) / workers == pytest.approx(1, rel=1e-5)
        for name in ("intensity_TC", "uniqueness_TC"):
            assert float(getattr(whole, name).sum()) == pytest.approx(
                sum(float(getattr(part, name).sum()) for part in real), rel=1e-5)


def test_labels_stand_beside_their_triggers(data):
    for model in data.config.router.models:
        labels = data.labels(model.window)
        for number in range(data.store.shards):
            path = labels.folder / f"part-{number:05d}.parquet"
            table, shard = pq.read_table(path), data.read("train", number)
            batch = data.batch([(shard, np.arange(len(shard.requests)), labels.shard(number))])
            assert data.vocabulary.ids_of(batch.items.row_U[batch.item_T].numpy()).tolist() == table[
                "trigger_item_id"].to_pylist()
            assert (batch.reward_ms_TC.numpy() / 1000).tolist() == table["reward"].to_pylist()
            assert batch.label_TC.tolist() == table["label"].to_pylist()


def test_the_recent_views_are_the_latest_effective_ones_before_the_request(data):
    history = data.config.router.history
    for side in ("train", "test"):
        for number in range(data.store.shards):
            events, shard = data.store.open(number), data.read(side, number)
            requests = shard.requests
            if not len(requests):
                continue
            batch = data.batch([(shard, np.arange(len(requests)), None)])
            for r in range(len(requests)):
                begin = events.offset_U[requests.user_R[r]]
                past = np.arange(begin, begin + events.length_U[requests.user_R[r]])
                past = past[events.timestamp_ms_E[past] < requests.time_ms_R[r]]
                past = past[events.is_effective_E[past]][-history:]
                of_V = batch.request_V == r
                assert batch.items.row_U[batch.item_V[of_V]].tolist() == events.item_row_E[past].tolist()
                assert batch.ago_V[of_V].tolist() == list(range(len(past)))[::-1]
                assert batch.watch_bucket_V[of_V].tolist() == data.buckets.encode(events.watch_time_s_E[past]).tolist()


def test_a_worker_without_a_request_has_one_that_counts_nothing(data):
    batch = data.batch([])
    assert batch.requests == batch.triggers == len(batch.item_T) == 1 and len(batch.item_V) == 0
    assert not batch.weight_T.any() and not batch.weight_B.any() and batch.items.row_U.tolist() == [0]
    assert torch.isnan(batch.trigger_TF).all() and torch.isnan(batch.list_TCF).all()


def test_validation_users_are_not_fitted(data):
    users = {kind: set() for kind in (True, False)}
    model = data.config.router.models[0]
    for batch in data.batches(data.plan(0, 0), model, 0, 1):
        users[False] |= set(batch.user_B.tolist())
    plan = RouterPlan(data.validation_counts, batch_rows=5, order=None)
    for batch in data.batches(plan, model, 0, 1, validation=True):
        users[True] |= set(batch.user_B.tolist())
    assert users[True] and users[False] and not users[True] & users[False]
    assert all(data.is_validation(np.array(sorted(users[kind]))).all() == kind for kind in users)
    assert not data.is_validation(np.array(sorted(users[False]))).any()


def test_shares_of_a_shard_are_the_shard(data):
    whole = data.read("test", 1)
    parts = [data.read("test", 1, (rank, 3)) for rank in range(3)]
    for name in ("trigger_TF", "list_TCF", "view_begin_R", "view_end_R"):
        # A matrix product of other sizes rounds the expected hits in another way.
        np.testing.assert_allclose(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name),
                                   rtol=1e-5, atol=1e-6)


def arrays(shard):
    return {field.name: getattr(side, field.name) for side in (shard, shard.requests) for field in fields(side)
            if isinstance(getattr(side, field.name), np.ndarray)}


def test_features_from_disk_are_those_that_were_computed(data):
    for number in range(data.store.shards):
        computed, read = arrays(data.read("train", number)), arrays(data.shard(number))
        assert computed.keys() == read.keys() and len(read) == 17
        for name, values in computed.items():
            assert values.dtype == read[name].dtype and not read[name].flags.writeable, name
            assert values.shape == read[name].shape and values.tobytes() == read[name].tobytes(), name


def test_features_are_made_once_and_for_their_inputs_alone(data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(data.run_dir, folder)
    shutil.rmtree(folder / "router_features", ignore_errors=True)
    alone = Workers(0, 1, torch.device("cpu"))
    RouterData(data.config, folder).write_features(alone)
    (made,) = (folder / "router_features").iterdir()
    damaged = made / "shard-00001" / "trigger_TF.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again, computed = RouterData(data.config, folder), []
    read = again.read
    monkeypatch.setattr(again, "read", lambda side, number: computed.append(number) or read(side, number))
    again.write_features(alone)
    assert computed == [1]
    list(again.batches(again.plan(0, 0), data.config.router.models[0], 0, 1))
    assert computed == [1]
    damaged.write_bytes(b"x")
    with pytest.raises(WatchtowerError, match="damaged"):
        RouterData(data.config, folder).shard(1)
    other = data.config.model_copy(update={"router": data.config.router.model_copy(update={"history": 3})})
    RouterData(other, folder).write_features(alone)
    assert [path.name for path in (folder / "router_features").iterdir()] != [made.name]


def test_scores_are_written_into_a_folder_of_their_own_and_those_of_killed_runs_go(tmp_path):
    of_another = _new_folder(tmp_path / "capts" / "seed=10")
    left = [_new_folder(tmp_path / "capts" / "seed=1"), tmp_path / "capts" / ".seed=1.writing"]
    left[1].mkdir()
    mine = _new_folder(tmp_path / "capts" / "seed=1")
    assert mine not in left and set((tmp_path / "capts").iterdir()) == {mine, of_another}


def test_scales_are_of_the_fitted_triggers(data):
    shards = [data.read("train", number) for number in range(data.store.shards)]
    x = np.concatenate([s.trigger_TF[~s.is_validation_R[s.requests.request_T]] for s in shards])
    known = np.isfinite(x).any(axis=0)
    assert data.scales.trigger_mean_F[known] == pytest.approx(np.nanmean(x[:, known], axis=0), abs=1e-4)
    spread = np.nanstd(x[:, known], axis=0)
    assert data.scales.trigger_std_F[known] == pytest.approx(np.where(spread < 1e-4, 1, spread), abs=1e-4)
    assert sum(data.scales.watch_views) == sum(int((s.view_end_R - s.view_begin_R).sum()) for s in shards)


def test_a_router_may_not_have_the_name_of_a_crm_model(data):
    model = data.config.router.models[0].model_copy(update={"name": data.config.crm.models[0].name})
    with pytest.raises(InputError, match="give the router another name"):
        RouterTask(data, model, 0)


# --------------------------------------------------------------------------------------------------------- the metrics

@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_the_auc_counts_pairs(scored):
    negative, positive = ([score for score, label in scored if label == kind] for kind in (False, True))
    found = binned_auc(*(np.bincount(np.array(scores, int), minlength=6) for scores in (negative, positive)))
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 1000))
@settings(deadline=None)
def test_the_captured_value_is_that_of_the_top(triggers, budget, seed):
    rng = np.random.default_rng(seed)
    total, widest = sum(triggers), max(triggers)
    score, reward = rng.integers(0, 4, (total, 2)) / 4, rng.integers(0, 3, (total, 2)) * 1000
    request_T = np.repeat(np.arange(len(triggers)), triggers)
    place_T = request_T * widest + np.concatenate([np.arange(k) for k in triggers])
    found = captured_value(score, reward, place_T, len(triggers), widest, budget)
    for request in range(len(triggers)):
        for c in range(2):
            s, r = score[request_T == request, c], reward[request_T == request, c]
            top = sorted(range(len(s)), key=lambda t: (-s[t], t))[:budget]
            most = sorted(r)[::-1][:budget]
            assert found[request, c] == pytest.approx(r[top].sum() / sum(most)) if sum(most) else np.isnan(
                found[request, c])


# --------------------------------------------------------------------------------------------------- tables from CRM

def with_crm(data, **tables):
    """The data of a run whose router starts from CRM."""
    config = data.config
    router = config.router.model_copy(update={
        "from_crm": True, "tables": config.router.tables.model_copy(update={"dim": config.crm.tables.dim, **tables})})
    crm = SimpleNamespace(**data.__dict__)
    crm.config = config.model_copy(update={"router": router})
    return crm


def test_tables_from_crm_need_its_width_and_its_model(data):
    with pytest.raises(InputError, match="set router.tables.dim=64"):
        load_crm_tables(with_crm(data, dim=32), None)
    with pytest.raises(InputError, match="holds no judged CRM model"):
        load_crm_tables(with_crm(data), None)


def test_a_crm_model_that_has_seen_the_requests_is_refused(data):
    name = data.config.crm.published
    folder = data.run_dir / "evaluation" / name / "seed=0"
    folder.mkdir(parents=True)
    latest_ms = data.rules["train"].begin_ms - data.snapshots.rollback_ms

    def seen_up_to(watermark_ms):
        (folder / "summary.json").write_text(json.dumps({
            "checkpoint": "step-7", "index": {"folder": f"indexes/{name}/seed=0/{watermark_ms}-7"}}))

    seen_up_to(latest_ms + 1)
    with pytest.raises(InputError, match="the first training request may know of nothing after"):
        crm_checkpoint(with_crm(data))
    seen_up_to(latest_ms)
    assert crm_checkpoint(with_crm(data)) == data.run_dir / "checkpoints" / name / "seed=0" / "step-7"


def test_plan_knows_how_many_features_there_are(data):
    shard = data.read("train", 0)
    assert router_feature_counts(data.config) == (shard.trigger_TF.shape[1], shard.list_TCF.shape[2])
