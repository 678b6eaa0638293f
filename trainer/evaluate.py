"""Evaluation of a CRM tower through its published index.

Vectors of requests come from the towers of the checkpoint that the best index was made with; items come from that
index's published files and from nowhere else. Each strategy (CRM, section 3.2) gives each request a condition; the
lists that come back are judged against the held-out views.

    none      a tower without a condition, and the most popular items      null      the unknown bucket
    average, maximum, multiplexed, fixed_<s>      what a server can ask for      oracle    the true next watch time

With the Bayes term (trainer/bayes.py) an unconditioned tower is asked the same: its index is published a second time
with log p(watch bucket | item) as further dimensions, and each query carries its condition's bucket.

Shape suffixes: Q = requests, D = width of index vectors, K = length of a list, N = items.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.schema import ModelConfig, bayes_name
from embeddings.index import INDEX_FILES, ItemIndex
from embeddings.snapshots import verify
from trainer.ceiling import expected_watch
from trainer.conditions import PastWatch, choose, past_watch
from trainer.crm_data import CrmData
from trainer.crm_task import CrmTask, fingerprint
from trainer.loop import Trained, Write, load_towers
from trainer.metrics import control_curve, hit_watch_s, retrieval_metrics, retrieved_watch_s
from trainer.rebuild import encode_items, encode_requests, publish_index, search_rows
from trainer.requests import Requests
from trainer.results import write_evaluation
from trainer.workers import Workers

Search = Callable[[], np.ndarray]
"""The catalogue rows retrieved, int64 (Q, K), -1 = missing. Not collective."""

Lists = Callable[[np.ndarray, np.ndarray], Search | None]
"""(which test requests int64 (Q,), their conditions in seconds (Q,)) to the search for their lists, on the first
worker; None on the others. The vectors of the requests are there by then: collective."""

CURVE_AT = 100


def evaluate_model(data: CrmData, model: ModelConfig, trained: Trained, workers: Workers, write: Write,
                   summary: dict) -> None:
    """Judges a trained model and writes `evaluation/<model>/seed=<s>/`; with `bayes`, a second one. Collective.

    `summary` is put into each summary.json: under what it was judged.
    """
    encode = load_towers(CrmTask(data, model, trained.seed), Path(trained.checkpoint), workers)
    seed, index_folder = trained.seed, data.run_dir / trained.best.folder
    facts = summary | {
        "epoch": trained.best.epoch, "train_s": trained.seconds, "windows": trained.rows,
        "step": trained.best.step, "checkpoint": Path(trained.checkpoint).name,
        "fingerprint": fingerprint(data, model), "validation": trained.best.validation,
        "index": {"recall_vs_exact": trained.best.recall_vs_exact, "build_s": trained.best.build_s,
                  "bytes": trained.best.bytes, "folder": trained.best.folder}}
    collation = data.collation(model, training=False)

    def ask(condition_Q: np.ndarray, requests: Requests) -> np.ndarray | None:
        return encode_requests(encode, collation, data.features, requests, data.config.crm.tower.history, condition_Q,
                               workers)

    if model.bayes:
        _evaluate_bayes(data, model, trained, facts, encode, ask, workers, write)
    index = workers.on_first(lambda: _open(index_folder))
    ids_N, length = np.asarray(data.catalogue.item_id_N), _length(data)

    def lists(which_Q: np.ndarray, condition_Q: np.ndarray) -> Search | None:
        query_QD = ask(condition_Q, data.test.take(which_Q))
        return None if query_QD is None else lambda: search_rows(index, query_QD, length, ids_N)

    _judge(data, model.name, seed, lists, facts, conditioned=model.condition != "none", workers=workers, write=write)


def evaluate_popular(data: CrmData, workers: Workers, write: Write, summary: dict) -> None:
    """The most popular items of the training targets as an index of one dimension: the baseline of baselines.
    Collective."""
    ids_N = np.asarray(data.catalogue.item_id_N)

    def published() -> tuple[ItemIndex, dict]:
        rows = data.index_rows(data.slices[-1][1])
        vectors_ND = data.features.log_q_N[rows][:, None]
        folder, found = publish_index(data.run_dir / "indexes" / "popular" / "seed=0", vectors_ND, ids_N[rows],
                                      data.config.index.model_copy(update={"factory": "Flat", "search": {}}), epoch=0,
                                      step=0, watermark_ms=data.slices[-1][1], sample_QD=np.ones((1, 1), np.float32),
                                      provenance={"model": "popular"})
        return _open(folder), found | {"folder": str(folder.relative_to(data.run_dir))}

    index, index_facts = workers.on_first(published) or (None, {})

    def search(requests: int) -> np.ndarray:
        one = search_rows(index, np.ones((1, 1), np.float32), _length(data), ids_N)
        return np.repeat(one, requests, axis=0)

    def lists(which_Q: np.ndarray, condition_Q: np.ndarray) -> Search | None:
        return None if index is None else lambda: search(len(which_Q))

    _judge(data, "popular", 0, lists, summary | {"baseline": True, "index": index_facts}, conditioned=False,
           workers=workers, write=write)


def _evaluate_bayes(data, model, trained, facts, encode, ask, workers, write) -> None:
    """The unconditioned tower with the Bayes term in its index: no training, the same recall to beat."""
    rows = data.index_rows(trained.best.watermark_ms)
    vectors_ND = encode_items(encode, data.features_until(trained.best.watermark_ms), rows, workers)
    test = data.test
    query_QD = ask(np.full(len(test), np.nan), test)
    name, length = bayes_name(model.name), _length(data)
    ids_N = np.asarray(data.catalogue.item_id_N)

    def published() -> tuple[ItemIndex, dict]:
        extended_ND = np.concatenate([vectors_ND, data.bayes.index_dims()[rows]], axis=1)
        sample_QD = extended_ND if query_QD is None else _with_bayes(
            data, query_QD, data.statistics.condition.clamp(test.watch_s_Q))
        # The term counts the targets of all slices, also where an earlier one has the best towers.
        folder, found = publish_index(
            data.run_dir / "indexes" / name / f"seed={trained.seed}", extended_ND, ids_N[rows], data.config.index,
            epoch=trained.best.epoch, step=trained.best.step, watermark_ms=data.slices[-1][1],
            sample_QD=sample_QD[:200],
            provenance={"model": name, "seed": trained.seed, "config": fingerprint(data, model)})
        return _open(folder), found | {"folder": str(folder.relative_to(data.run_dir))}

    index, index_facts = workers.on_first(published) or (None, {})

    def lists(which_Q: np.ndarray, condition_Q: np.ndarray) -> Search | None:
        if index is None:
            return None
        return lambda: search_rows(index, _with_bayes(data, query_QD[which_Q], condition_Q), length, ids_N)

    _judge(data, name, trained.seed, lists, facts | {"index": index_facts}, conditioned=True, workers=workers,
           write=write)


def _length(data: CrmData) -> int:
    """Places of a retrieved list: what recall and the curve need."""
    return max(*data.config.evaluate.at, CURVE_AT)


def _with_bayes(data: CrmData, query_QD: np.ndarray, condition_Q: np.ndarray) -> np.ndarray:
    return np.concatenate([query_QD, data.bayes.query_dims(condition_Q)], axis=1)


def _open(folder: Path) -> ItemIndex:
    verify(folder, *INDEX_FILES)
    return ItemIndex.load(folder, mmap=False)


def strategy_conditions(data: CrmData, requests: Requests) -> dict[str, np.ndarray]:
    """By strategy, the condition of each request: seconds (Q,), NaN for nothing."""
    evaluate, statistics = data.config.evaluate, data.statistics.condition
    past: PastWatch = past_watch(requests.views.watch_s_E, requests.begin_Q, requests.end_Q, evaluate.multiplexed_n)
    conditions = {}
    for strategy in evaluate.strategies:
        if strategy == "fixed":
            for seconds in evaluate.fixed_s:
                conditions[f"fixed_{seconds:g}"] = choose("fixed", past, statistics, fixed_s=seconds)
        elif len(requests):
            conditions[strategy] = choose(strategy, past, statistics, true_watch_Q=requests.watch_s_Q,
                                          multiplexed_p=evaluate.multiplexed_p, seed=evaluate.seed)
    return conditions


def _judge(data: CrmData, name: str, seed: int, lists: Lists, summary: dict, *, conditioned: bool, workers: Workers,
           write: Write) -> None:
    """Searches, measures and writes on the first worker, once all workers have made the vectors of all requests.
    Collective."""
    test, evaluate = data.test, data.config.evaluate
    conditions = strategy_conditions(data, test) if conditioned else {"none": np.full(len(test), np.nan)}
    searches: dict[str, Search | None] = {}
    sample_Q, curve_searches = np.zeros(0, np.int64), []
    if len(test):
        searches = {strategy: lists(np.arange(len(test)), condition_Q) for strategy, condition_Q in conditions.items()}
    if conditioned and len(test):
        sample_Q = _curve_sample(data)
        asked = data.statistics.condition.clamp(np.asarray(evaluate.curve_s))
        curve_searches = [lists(sample_Q, np.full(len(sample_Q), seconds)) for seconds in asked]

    def measured() -> None:
        metrics = {strategy: _metrics(data, search()) for strategy, search in searches.items()}
        curve = None
        if conditioned and len(test):
            curve = _curve(data, sample_Q, [search() for search in curve_searches], summary)
        queries = {"query_id": np.arange(len(test)), "user_id": test.user_id_Q, "timestamp_ms": test.time_ms_Q,
                   "watch_time_s": test.watch_s_Q.astype(np.float32),
                   "target_item_id": np.asarray(data.catalogue.item_id_N)[test.target_row_Q()]}
        write_evaluation(data.run_dir, name, seed, queries, metrics, curve, summary)
        shown = {f"{strategy}.recall@{k}": float(np.nanmean(values[f"recall@{k}"])) for strategy, values in
                 metrics.items() for k in [100 if 100 in evaluate.at else evaluate.at[0]]}
        write("evaluation", model=f"{name}/seed={seed}", queries=len(test), **shown)

    workers.on_first(measured)


def _metrics(data: CrmData, rows_QK: np.ndarray) -> dict[str, np.ndarray]:
    test, at = data.test, data.config.evaluate.at
    relevant = (test.relevant_offset_Q1, test.relevant_rows)
    return (retrieval_metrics(rows_QK, relevant, at) | retrieved_watch_s(rows_QK, data.item_watch_s_N, at)
            | hit_watch_s(rows_QK, relevant, test.relevant_watch_s, at) | expected_watch(data, rows_QK))


def _curve_sample(data: CrmData) -> np.ndarray:
    """The test requests that the control curve asks for, seeded: int64 (Q,), rising."""
    evaluate, requests = data.config.evaluate, len(data.test)
    count = min(evaluate.curve_queries, requests)
    return np.sort(np.random.default_rng([evaluate.seed, 0x63757276]).choice(requests, count, replace=False))


def _curve(data: CrmData, sample_Q: np.ndarray, rows: list[np.ndarray], summary: dict) -> list[dict]:
    """The control curve of a sample of the test requests. rows: int64 (Q, K), for each of `evaluate.curve_s`."""
    evaluate, sample = data.config.evaluate, data.test.take(sample_Q)
    summary["prefix_ranks_identical"] = bool(all(np.array_equal(rows[0], other) for other in rows[1:]))
    return control_curve(evaluate.curve_s, rows, (sample.relevant_offset_Q1, sample.relevant_rows),
                         data.item_watch_s_N, data.test_views_NB, evaluate.lift_edges_s, at=CURVE_AT)
