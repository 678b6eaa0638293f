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

Lists = Callable[[np.ndarray, np.ndarray], np.ndarray | None]
"""(which test requests int64 (Q,), their conditions in seconds (Q,)) to the catalogue rows retrieved (Q, K), on the
first worker; None on the others."""

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

    def lists(which_Q: np.ndarray, condition_Q: np.ndarray) -> np.ndarray | None:
        query_QD = ask(condition_Q, data.test.take(which_Q))
        return None if query_QD is None else search_rows(index, query_QD, length, ids_N)

    _judge(data, model.name, seed, lists, facts, conditioned=model.condition != "none", workers=workers, write=write)


def evaluate_popular(data: CrmData, workers: Workers, write: Write, summary: dict) -> None:
    """The most popular items of the training targets as an index of one dimension: the baseline of baselines.
    Collective."""
    workers.on_first(lambda: _evaluate_popular(data, workers, write, summary))


def _evaluate_popular(data: CrmData, workers: Workers, write: Write, summary: dict) -> None:
    rows = data.index_rows(data.slices[-1][1])
    ids_N = np.asarray(data.catalogue.item_id_N)
    vectors_ND = data.features.log_q_N[rows][:, None]
    folder, facts = publish_index(data.run_dir / "indexes" / "popular" / "seed=0", vectors_ND, ids_N[rows],
                                  data.config.index.model_copy(update={"factory": "Flat", "search": {}}), epoch=0,
                                  step=0, watermark_ms=data.slices[-1][1], sample_QD=np.ones((1, 1), np.float32),
                                  provenance={"model": "popular"})
    index = _open(folder)

    def lists(which_Q: np.ndarray, condition_Q: np.ndarray) -> np.ndarray:
        one = search_rows(index, np.ones((1, 1), np.float32), _length(data), ids_N)
        return np.repeat(one, len(which_Q), axis=0)

    _judge(data, "popular", 0, lists, summary | {"baseline": True, "index": facts | {
        "folder": str(folder.relative_to(data.run_dir))}}, conditioned=False, workers=workers, write=write)


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

    def lists(which_Q: np.ndarray, condition_Q: np.ndarray) -> np.ndarray | None:
        if index is None:
            return None
        return search_rows(index, _with_bayes(data, query_QD[which_Q], condition_Q), length, ids_N)

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
    test, evaluate = data.test, data.config.evaluate
    conditions = strategy_conditions(data, test) if conditioned else {"none": np.full(len(test), np.nan)}
    metrics = {}
    for strategy, condition_Q in conditions.items():
        rows_QK = lists(np.arange(len(test)), condition_Q) if len(test) else None
        if rows_QK is not None:
            metrics[strategy] = _metrics(data, rows_QK)
    curve = None
    if conditioned and len(test):
        curve = _curve(data, lists, min(evaluate.curve_queries, len(test)), workers, summary)
    if workers.first:
        queries = {"query_id": np.arange(len(test)), "user_id": test.user_id_Q, "timestamp_ms": test.time_ms_Q,
                   "watch_time_s": test.watch_s_Q.astype(np.float32),
                   "target_item_id": np.asarray(data.catalogue.item_id_N)[test.target_row_Q()]}
        write_evaluation(data.run_dir, name, seed, queries, metrics, curve, summary)
        shown = {f"{strategy}.recall@{k}": float(np.nanmean(values[f"recall@{k}"])) for strategy, values in
                 metrics.items() for k in [100 if 100 in evaluate.at else evaluate.at[0]]}
        write("evaluation", model=f"{name}/seed={seed}", queries=len(test), **shown)


def _metrics(data: CrmData, rows_QK: np.ndarray) -> dict[str, np.ndarray]:
    test, at = data.test, data.config.evaluate.at
    relevant = (test.relevant_offset_Q1, test.relevant_rows)
    return (retrieval_metrics(rows_QK, relevant, at) | retrieved_watch_s(rows_QK, data.item_watch_s_N, at)
            | hit_watch_s(rows_QK, relevant, test.relevant_watch_s, at) | expected_watch(data, rows_QK))


def _curve(data: CrmData, lists: Lists, count: int, workers: Workers, summary: dict) -> list[dict] | None:
    """The control curve on a seeded sample of the test requests."""
    evaluate, test = data.config.evaluate, data.test
    which_Q = np.sort(np.random.default_rng([evaluate.seed, 0x63757276]).choice(len(test), count, replace=False))
    asked = data.statistics.condition.clamp(np.asarray(evaluate.curve_s))
    rows = [lists(which_Q, np.full(count, seconds)) for seconds in asked]
    if not workers.first:
        return None
    sample = test.take(which_Q)
    summary["prefix_ranks_identical"] = bool(all(np.array_equal(rows[0], other) for other in rows[1:]))
    return control_curve(evaluate.curve_s, rows, (sample.relevant_offset_Q1, sample.relevant_rows),
                         data.item_watch_s_N, data.test_views_NB, evaluate.lift_edges_s, at=CURVE_AT)
