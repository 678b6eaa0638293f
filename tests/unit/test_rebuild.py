"""The index rebuild: vectors in shares, the gate, and a thread whose errors are not lost."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_views import HOUR_MS, T0, made_catalogue, made_views

from configs.errors import InputError, QualityGateError, WatchtowerError
from configs.schema import IndexConfig
from embeddings.index import ItemIndex
from embeddings.snapshots import list_snapshots, newest, verify
from trainer import rebuild
from trainer.batches import Collation, ItemFeatures
from trainer.conditions import WatchBuckets
from trainer.rebuild import (
    IndexRebuilder,
    Rebuild,
    Version,
    encode_items,
    encode_requests,
    publish_index,
    search_rows,
)
from trainer.requests import sample_requests
from trainer.workers import Workers

ITEMS, WIDTH = 400, 8
IDS_N = np.concatenate([[0], np.arange(1, ITEMS + 1) * 5 - 900])  # row 0 unknown; negative ids too, not -1
CPU = torch.device("cpu")


def vectors(seed=0, items=ITEMS):
    return np.random.default_rng(seed).normal(size=(items, WIDTH)).astype(np.float32)


def queries(count=50, seed=1):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def published(parent, config, **named):
    return publish_index(parent, named.pop("vectors_ND", vectors()), IDS_N[1:], config, **{
        "epoch": 1, "step": 7, "watermark_ms": T0, "sample_QD": queries(), "provenance": {"model": "m"}, **named})


def test_a_good_index_is_published_under_its_watermark(tmp_path):
    folder, facts = published(tmp_path / "m", IndexConfig())
    assert [s.path for s in list_snapshots(tmp_path / "m")] == [folder] == [newest(tmp_path / "m")]
    assert folder.name == f"{T0}-7" and facts["recall_vs_exact"] == 1.0 and facts["bytes"] > 0
    manifest = verify(folder)
    assert manifest["watermark_ms"] == T0 and manifest["rows"] == ITEMS and manifest["model"] == "m"
    index = ItemIndex.load(folder)
    _, found = index.search(queries(), 5)
    best = np.argsort(-(queries() @ vectors().T), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found, IDS_N[1:][best])
    assert published(tmp_path / "m", IndexConfig())[0] == folder  # again, as a run that continues does


def test_an_index_below_the_gate_is_kept_where_no_reader_looks(tmp_path):
    poor = IndexConfig(factory="IVF32,Flat", search={"nprobe": 1}, min_recall=0.99)
    with pytest.raises(QualityGateError, match="index.min_recall 0.99") as told:
        published(tmp_path / "m", poor)
    assert told.value.exit_code == 3 and str(tmp_path / "m") in str(told.value)
    assert list_snapshots(tmp_path / "m") == [] and newest(tmp_path / "m") is None
    verify(tmp_path / "m" / "rejected" / f"{T0}-7")
    published(tmp_path / "m", poor.model_copy(update={"search": {"nprobe": 32.0}}))
    assert len(list_snapshots(tmp_path / "m")) == 1


@given(st.integers(1, 12), st.integers(1, 30))
def test_what_an_index_returns_are_rows_and_missing_hits_stay_missing(items, k):
    index = ItemIndex.build(vectors(items=items), IDS_N[1:items + 1], rebuild.index_spec(IndexConfig(threads=1)))
    rows = search_rows(index, queries(3), k, IDS_N)
    assert ((rows == -1) == (np.arange(k) >= items)).all()
    found = rows[rows >= 0]
    assert set(found) <= set(range(1, items + 1))
    scores = queries(3) @ vectors(items=items).T
    np.testing.assert_array_equal(rows[:, 0], scores.argmax(axis=1) + 1)


# -------------------------------------------------------------------------------------------------- vectors in shares

class Share(Workers):
    """One of several workers whose collectives are collected by the test."""

    def gather_rows(self, x_ND):
        return x_ND


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9))
def test_the_shares_of_all_workers_are_the_catalogue_in_order_and_all_make_as_many_calls(rows, workers, at_once):
    features = ItemFeatures(made_catalogue(60), np.zeros(60))
    row_N, parts, calls = np.random.default_rng(0).permutation(60)[:rows], [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuild, "ITEMS_AT_ONCE", at_once)
        for rank in range(workers):
            seen = []

            def encode(task, batch, seen=seen):
                seen.append(len(batch.row_U))
                assert task == "items" and 0 < len(batch.row_U) <= at_once
                return batch.row_U[:, None].float()

            parts.append(encode_items(encode, features, row_N, Share(rank, workers, CPU)))
            calls.append(len(seen))
    assert np.concatenate(parts)[:, 0].tolist() == row_N.tolist()
    assert len(set(calls)) == 1  # each call is collective


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 25), st.integers(1, 4), st.integers(1, 7), st.integers(1, 5))
def test_the_shares_of_all_workers_are_the_requests_in_order(count, workers, at_once, history):
    features = ItemFeatures(made_catalogue(12), np.zeros(12))
    views = made_views([20, 20])
    requests = sample_requests(lambda _: views, 1, T0, T0 + 10**10, judged=None, limit=count, future=1, seed=0)
    collation = Collation("next", WatchBuckets(100, 300.0), 0.0, 0, history + 1)
    condition = np.linspace(1, 300, count)
    parts, calls = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuild, "REQUESTS_AT_ONCE", at_once)
        for rank in range(workers):
            seen = []

            def encode(task, batch, seen=seen):
                seen.append(batch.windows)
                last = batch.read_R
                assert task == "users" and len(last) == batch.windows and batch.positions <= history + 1
                return torch.stack([batch.user_B, batch.condition_bucket_V[last],
                                    torch.bincount(batch.place_V // batch.positions)], dim=1)

            parts.append(encode_requests(encode, collation, features, requests, history, condition,
                                         Share(rank, workers, CPU)))
            calls.append(len(seen))
    got = np.concatenate(parts)
    assert got[:, 0].tolist() == requests.user_id_Q.tolist()
    assert got[:, 1].tolist() == collation.buckets.encode(condition).tolist()
    assert got[:, 2].tolist() == (np.minimum(requests.end_Q - requests.begin_Q, history) + 1).tolist()
    assert len(set(calls)) == 1


def test_no_request_at_all_needs_no_vector():
    features = ItemFeatures(made_catalogue(12), np.zeros(12))
    requests = sample_requests(lambda _: made_views([3]), 1, 0, 1, judged=None, limit=None, future=1, seed=0)
    got = encode_requests(None, Collation("next", WatchBuckets(), 0.0, 0, 5), features, requests, 4, np.zeros(0),
                          Workers(0, 1, CPU))
    assert got is None or len(got) == 0


# --------------------------------------------------------------------------------------------------------- the thread

VALIDATION = SimpleNamespace(relevant_offset_Q1=np.arange(51), relevant_rows=np.arange(50) % ITEMS + 1)


@pytest.fixture
def rebuilder(tmp_path):
    told = []
    made = IndexRebuilder(tmp_path, tmp_path / "m", IndexConfig(threads=1), {"model": "m"}, VALIDATION, IDS_N,
                          [10, 100],
                          lambda index, seconds: told.append((index.epoch, seconds)))
    made.told, made.parent = told, tmp_path / "m"
    yield made
    made.close()


def submit(rebuilder, epoch, **named):
    rebuilder.submit(Rebuild(Version(epoch, 10 * epoch, T0 + epoch * HOUR_MS), named.get("vectors_ND", vectors(epoch)),
                             IDS_N[1:], named.get("query_QD", queries())))


def test_results_come_in_order_with_validation_through_the_published_files(rebuilder):
    for epoch in (1, 2, 3):
        submit(rebuilder, epoch)
    assert [r.epoch for r in rebuilder.results(2)] == [1, 2]
    results = rebuilder.all_results()
    assert [(r.epoch, r.step, r.items) for r in results] == [(1, 10, ITEMS), (2, 20, ITEMS), (3, 30, ITEMS)]
    assert [s.watermark_ms for s in list_snapshots(rebuilder.parent)] == [T0 + e * HOUR_MS for e in (1, 2, 3)]
    assert [epoch for epoch, _ in rebuilder.told] == [1, 2, 3]
    best = np.argsort(-(queries() @ vectors(2).T), axis=1)[:, :10] + 1
    recall = np.mean([VALIDATION.relevant_rows[q] in best[q] for q in range(50)])
    assert results[1].validation["recall@10"] == pytest.approx(recall)
    assert {"recall@10", "recall@100", "ndcg@10"} <= results[0].validation.keys()


def test_handing_over_does_not_wait_for_the_build(rebuilder, monkeypatch):
    go_on, publish = threading.Event(), rebuild.publish_index

    def slow(*args, **named):
        assert go_on.wait(20)
        return publish(*args, **named)

    monkeypatch.setattr(rebuild, "publish_index", slow)
    began = time.perf_counter()
    assert rebuilder.pending() is None
    for epoch in (1, 2):
        submit(rebuilder, epoch)
    assert time.perf_counter() - began < 5 and rebuilder.told == [] and rebuilder.results(0) == []
    pending = rebuilder.pending()
    assert pending.version == Version(2, 20, T0 + 2 * HOUR_MS) and (pending.vectors_ND == vectors(2)).all()
    go_on.set()
    assert [r.epoch for r in rebuilder.all_results()] == [1, 2] and rebuilder.pending() is None


def test_an_index_begun_again_from_what_a_checkpoint_keeps_is_the_same_bytes(rebuilder):
    submit(rebuilder, 1)
    first = rebuilder.all_results()[0]
    path = rebuilder.parent / f"{T0 + HOUR_MS}-10" / "index.faiss"
    before = path.read_bytes()
    rebuilder.submit(Rebuild(Version(1, 10, T0 + HOUR_MS), **Rebuild(None, vectors(1), IDS_N[1:], queries()).arrays()))
    again = rebuilder.all_results()[1]
    assert path.read_bytes() == before
    assert {**first.as_json(), "build_s": 0} == {**again.as_json(), "build_s": 0}


def test_an_error_of_the_thread_is_raised_where_its_result_is_read(rebuilder):
    broken = vectors(2)
    broken[5, 3] = np.nan
    submit(rebuilder, 1)
    submit(rebuilder, 2, vectors_ND=broken)
    submit(rebuilder, 3)
    assert rebuilder.results(1)[0].epoch == 1  # what came before it is there
    with pytest.raises(WatchtowerError, match="finite"):
        rebuilder.results(2)
    with pytest.raises(WatchtowerError):
        rebuilder.all_results()


def test_a_rejected_index_is_an_error_too(tmp_path):
    strict = IndexConfig(factory="IVF32,Flat", search={"nprobe": 1}, min_recall=1.0)
    rebuilder = IndexRebuilder(tmp_path, tmp_path / "m", strict,
                               {}, VALIDATION, IDS_N, [10], lambda *_: None)
    submit(rebuilder, 1)
    with pytest.raises(QualityGateError):
        rebuilder.all_results()
    assert list_snapshots(tmp_path / "m") == []
    rebuilder.close()


def test_without_validation_requests_the_recall_is_measured_with_the_items(rebuilder):
    submit(rebuilder, 1, query_QD=queries(0))
    (result,) = rebuilder.all_results()
    assert result.validation == {} and result.recall_vs_exact == 1.0


def test_a_bad_factory_names_itself(tmp_path):
    with pytest.raises(InputError, match="Nonsense"):
        published(tmp_path / "m", IndexConfig(factory="Nonsense"))
    assert list_snapshots(tmp_path / "m") == []


def test_vectors_that_are_not_finite_are_kept_aside_or_left_out(tmp_path):
    broken = vectors()
    broken[[5, 9], 3] = [np.nan, np.inf]
    with pytest.raises(QualityGateError, match="index.max_nan_share 0: no index was published") as told:
        published(tmp_path / "m", IndexConfig(), vectors_ND=broken)
    kept = tmp_path / "m" / "rejected" / f"{T0}-7"
    assert "2 of 400" in str(told.value) and str(kept) in str(told.value)
    assert pq.read_table(kept / "not_finite.parquet")["item_id"].to_pylist() == IDS_N[1:][[5, 9]].tolist()
    assert list_snapshots(tmp_path / "m") == []
    folder, facts = published(tmp_path / "m", IndexConfig(max_nan_share=0.01), vectors_ND=broken)
    index = ItemIndex.load(folder)
    assert index.size == ITEMS - 2 and verify(folder)["not_finite"] == 2 and facts["recall_vs_exact"] == 1.0
    assert not set(index.item_ids) & set(IDS_N[1:][[5, 9]])
    with pytest.raises(QualityGateError, match="400 of 400"):
        published(tmp_path / "m", IndexConfig(max_nan_share=1.0), vectors_ND=np.full_like(broken, np.nan))


def test_an_index_that_answers_the_validation_badly_is_kept_aside(tmp_path):
    strict = IndexConfig(min_validation_recall=0.5)
    with pytest.raises(QualityGateError, match="recall@100 of 0.2500, below index.min_validation_recall 0.5") as told:
        published(tmp_path / "m", strict, validation_recall=lambda index: 0.25)
    assert str(tmp_path / "m" / "rejected" / f"{T0}-7") in str(told.value)
    assert list_snapshots(tmp_path / "m") == []
    with pytest.raises(QualityGateError):
        published(tmp_path / "m", strict, validation_recall=lambda index: float("nan"))
    published(tmp_path / "m", strict, validation_recall=lambda index: 0.5)
    published(tmp_path / "popular", strict)  # what is not validated has no such gate
    assert len(list_snapshots(tmp_path / "m")) == len(list_snapshots(tmp_path / "popular")) == 1


def test_the_validation_gate_is_held_by_the_rebuilder(tmp_path):
    rebuilder = IndexRebuilder(tmp_path, tmp_path / "m", IndexConfig(threads=1, min_validation_recall=1.0), {},
                               VALIDATION, IDS_N, [10], lambda *_: None)
    submit(rebuilder, 2)
    with pytest.raises(QualityGateError, match="min_validation_recall"):
        rebuilder.all_results()
    assert list_snapshots(tmp_path / "m") == []
    rebuilder.close()
