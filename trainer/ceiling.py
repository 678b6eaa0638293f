"""How far a tower is from what the synthetic world knows: ceilings of recall, and what users would have watched.

Where the logs are the synthetic world, the evaluation reports two things that logs cannot tell.

**The ceilings.** The test requests, ranked by log p(i | .., target[, w]) in place of a tower, with the condition told
in the buckets that towers see. Two read the hidden state (`trainer/world_truth.py`), which no learner can:

    lasting   p(item | user, watch time): knows the user, averages over sessions
    true      knows the session's passing interest and mood, too

and two, with `evaluate.read_histories`, know the world but must read the user from the log, as a tower must
(`trainer/world_reader.py`):

    history   from the views that a tower sees, the last `crm.tower.history` target views before the request
    log       from all views before the request, whatever they reached (the last 512)

What separates a tower from `history` it could have learnt; from `log`, if it were shown more; the rest is hidden.

How much of the way from unconditioned to a ceiling a tower closes, with R = recall@K of the
same requests and w the true watch time:

    share_of_way  = (R(tower | w) - R(tower unconditioned)) / (R(ceiling | w) - R(tower unconditioned))
    share_of_gain = (R(tower | w) - R(tower unconditioned)) / (R(ceiling | w) - R(ceiling))

The first is the measure: it charges the tower with whatever its unconditioned ablation leaves unlearnt of the user.
The second sets what the condition brings to the tower beside what it brings to the ceiling. It flatters: the lower a
tower stands without a condition, the more the same condition brings it, so it is no verdict and can well pass 1. The
first can pass 1 too, where a tower reads the session and so knows more than `lasting` does, and by luck alone.

**What would have been watched.** `expected_watch_s@K`: the mean, over the first K retrieved, of what this user would
have watched of each at this moment, in seconds (the true state; K times it is the list's total). `most_watched` is the
list that makes it greatest.

The lists that are judged come from towers and indexes; of the system this file alone reads the hidden state, and
nothing that is trained or published reads this file.

Shape suffixes: Q = test requests, J = judged requests (a sample of them), N = items of the world, K = length of a list.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError
from configs.schema import Config, ModelConfig, ViewRule
from embeddings import attempts, elsewhere
from embeddings.untrusted import damaged, read_json, read_parquet
from trainer.metrics import bootstrap_cis, paired_ci, retrieval_metrics
from trainer.results import (
    Evaluation,
    bayes_name,
    headline_length,
    load_evaluations,
    plain,
    unconditioned_model,
)
from trainer.world import World, read_spec
from trainer.world_reader import DRIVE_SWEEPS, SWEEPS, HistoryTruth
from trainer.world_truth import STATES, WorldTruth, condition_bucket_edges

if TYPE_CHECKING:
    from trainer.crm_data import CrmData
    from trainer.loop import Write

FOLDER = Path("evaluation") / "ceiling"
CEILING_ELEMENTS = 2_000_000
"""Requests x items that are ranked by what the world knows, 4 microseconds each; more requests are sampled."""
WATCH_ELEMENTS = 32_000_000
"""Requests x items whose expected watch time is computed and held: 128 MB, 0.25 microseconds each."""
LEAST_REQUESTS = 50
MOST_REQUESTS = 2000
"""Requests that are judged where histories are read: the sample is one for all ceilings."""
CEILINGS = ("history", "log", "lasting", "true")
LOG_VIEWS = 512
"""Views before a request that `log` reads at most."""
MOST_ITEMS = 1_000_000
"""A world of more items is not ranked: even the least number of requests would keep the workers waiting."""
_AT_ONCE = 1_000_000  # requests x items of a chunk


def expected_watch(data: CrmData, rows_QK: np.ndarray) -> dict[str, np.ndarray]:
    """What users would have watched of the lists that they were given at the test requests.

    Args:
        data: of the run.
        rows_QK: int64 (Q, K), catalogue rows for every test request, -1 = missing.

    Returns:
        `expected_watch_s@K`: float64 (Q,), mean seconds over the first K, NaN for a request outside the sample;
        nothing at all where the logs are not the synthetic world.
    """
    known = _known(data)
    return {} if known.absent else known.expected_watch(rows_QK)


def write_ceiling(data: CrmData, write: Write) -> None:
    """Ranks the test requests by what the world knows, unless that is done. On the first worker.

    Leaves `evaluation/ceiling/queries.parquet` (query_id, user_id, `<state>.<strategy>.<metric>`) and summary.json.
    """
    known = _known(data)
    folder = data.run_dir / FOLDER
    if known.absent is not None and not known.is_world:
        elsewhere.take_away(folder, attempts.who())
        return
    summary = {"judged_for": known.identity()}
    if _read_summary(folder).get("judged_for") == plain(summary["judged_for"]):
        return
    began = time.perf_counter()
    columns: dict[str, np.ndarray] = {"query_id": np.zeros(0, np.int64), "user_id": np.zeros(0, np.int64)}
    reason = known.absent or known.no_ceiling
    if reason is None:
        columns = {"query_id": known.judged_J, "user_id": data.test.user_id_Q[known.judged_J]} | known.ceilings()
        states = _states(columns)
        summary |= {"requests": len(known.judged_J), "seconds": time.perf_counter() - began}
    else:
        summary |= {"absent": reason}
        write("warning", message=f"no synthetic ceiling: {reason}")
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    pq.write_table(pa.table(columns), beside / "queries.parquet")
    (beside / "summary.json").write_text(json.dumps(plain(summary), indent=1) + "\n", encoding="utf-8")
    if (mirror := elsewhere.of(folder)) is not None:
        mirror.remove(folder, attempts.who())
        for name in ("queries.parquet", "summary.json"):
            mirror.deliver(beside / name, folder / name, attempts.who())
        shutil.rmtree(beside)
    else:
        with attempts.publishing():
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
    if reason is None:
        k = headline_length(data.config.evaluate.at)
        write("ceiling", requests=len(known.judged_J), seconds=summary["seconds"], **{
            f"{state}.{strategy}.recall@{k}": float(np.nanmean(columns[f"{state}.{strategy}.recall@{k}"]))
            for state in states for strategy in ("none", "oracle")})


@lru_cache(maxsize=1)
def _known(data: CrmData) -> _Known:
    return _Known(data)


class _Known:
    """The world behind a run's logs, and what it knows of the test requests.

    is_world: the logs lie in the folder of a world. absent: why nothing can be told, None if it can. no_ceiling: why
    the ceilings cannot, although the watch times can.
    """

    def __init__(self, data: CrmData):
        self._data, self.absent, self.no_ceiling = data, None, None
        folder = None if data.config.data.logs is None else Path(data.config.data.logs).parent
        if folder is not None:
            elsewhere.bring(folder / "world.json")
        self.is_world = folder is not None and (folder / "world.json").is_file()
        if not self.is_world:
            self.absent = "the logs are not the synthetic world"
            return
        try:
            self.world = World(read_spec(folder))
            self.world.user_indices(data.test.user_id_Q)
        except InputError as error:
            self.absent = str(error)
            return
        if not len(data.test):
            self.absent = "there is no test request"
        elif self.world.spec.items > MOST_ITEMS:
            self.absent = f"the world has more than {MOST_ITEMS:,} items"
        if self.absent:
            return
        try:
            self._target, self._least_s = _target(data.config.data.target or data.config.data.effective_view,
                                                  float(self.world.item_duration_s.min()))
        except InputError as error:
            self.no_ceiling = str(error)

        order = np.argsort(self.world.item_ids)
        ids_N = np.asarray(data.catalogue.item_id_N)
        place = np.minimum(np.searchsorted(self.world.item_ids, ids_N, sorter=order), len(order) - 1)
        self._item_of_row = np.where(self.world.item_ids[order[place]] == ids_N, order[place], -1)
        self._row_of_item = np.zeros(self.world.spec.items, np.int64)
        rows = np.flatnonzero(self._item_of_row >= 0)
        self._row_of_item[self._item_of_row[rows]] = rows
        most = MOST_REQUESTS * self.world.spec.items if data.config.evaluate.read_histories else CEILING_ELEMENTS
        self.judged_J = self._sample(min(CEILING_ELEMENTS, most))
        self._watched_J = self._sample(WATCH_ELEMENTS)
        self._place_of_request = np.full(len(data.test), -1)
        self._place_of_request[self._watched_J] = np.arange(len(self._watched_J))

    def identity(self) -> dict[str, Any]:
        """What the ceilings depend on."""
        evaluate, data = self._data.config.evaluate, self._data.config.data
        world = dataclasses.asdict(self.world.spec) if not self.absent else {"absent": self.absent}
        return {"world": world, "target": (data.target or data.effective_view).model_dump(mode="json"),
                "at": list(evaluate.at), "future": evaluate.future, "seed": evaluate.seed,
                "queries": evaluate.queries, "split": self._data.config.split.model_dump(mode="json"),
                "buckets": self._data.config.crm.condition.buckets, "elements": CEILING_ELEMENTS,
                "read": [MOST_REQUESTS, self._data.config.crm.tower.history, LOG_VIEWS, SWEEPS, DRIVE_SWEEPS]
                if evaluate.read_histories else None,
                "utc_offset_h": data.utc_offset_h}

    def ceilings(self) -> dict[str, np.ndarray]:
        """`<state>.<strategy>.<metric>`: float32 (J,). Strategies: none, oracle, and most_watched of the true state."""
        truths = {state: WorldTruth(self.world, state=state) for state in STATES}
        if self._data.config.evaluate.read_histories:
            truths["history"] = HistoryTruth(self.world, last=self._data.config.crm.tower.history,
                                             target=self._target, least_s=self._least_s)
            truths["log"] = HistoryTruth(self.world, last=LOG_VIEWS)
        lists = {f"{state}.{strategy}": [] for state in truths for strategy in ("none", "oracle")}
        lists["true.most_watched"] = []
        length = max(self._data.config.evaluate.at)
        for rows in self._chunks(self.judged_J):
            for state, truth in truths.items():
                for strategy, score in self._scores(truth, rows).items():
                    lists[f"{state}.{strategy}"].append(_top(score, length))
            lists["true.most_watched"].append(_top(self._watch_s(rows), length))
        sample = self._data.test.take(self.judged_J)
        columns = {}
        for name, found in lists.items():
            item_JK = np.concatenate(found)
            rows_JK = self._row_of_item[item_JK]
            metrics = {} if name.endswith("most_watched") else retrieval_metrics(
                rows_JK, (sample.relevant_offset_Q1, sample.relevant_rows), self._data.config.evaluate.at)
            rows_QK = np.full((len(self._data.test), item_JK.shape[1]), -1)
            rows_QK[self.judged_J] = rows_JK
            metrics |= {metric: values[self.judged_J] for metric, values in self.expected_watch(rows_QK).items()}
            columns |= {f"{name}.{metric}": values.astype(np.float32) for metric, values in metrics.items()}
        return columns

    def _scores(self, truth: WorldTruth, rows: np.ndarray) -> dict[str, np.ndarray]:
        """log p(i | u, target[, w]) up to a constant: float32 (rows, N) without the condition, and with it."""
        test, buckets = self._data.test, self._data.config.crm.condition.buckets
        asked = test.user_id_Q[rows], test.time_ms_Q[rows]
        watch_s = test.watch_s_Q[rows]
        low, high = np.zeros(len(rows)), np.full(len(rows), np.inf)
        told = np.isfinite(watch_s)
        told_low, told_high = low.copy(), high.copy()
        told_low[told], told_high[told] = condition_bucket_edges(watch_s[told], buckets)
        with np.errstate(divide="ignore"):
            choice = np.log(truth.choice_probabilities(*asked))
            return {
                "none": choice + np.log(truth.watch_probabilities(
                    *asked, np.maximum(low, self._least_s), high, target=self._target)),
                "oracle": choice + np.log(truth.watch_probabilities(
                    *asked, np.maximum(told_low, self._least_s), told_high, target=self._target))}

    def expected_watch(self, rows_QK: np.ndarray) -> dict[str, np.ndarray]:
        """See the function of this name."""
        item_JK = np.where(rows_QK[self._watched_J] < 0, -1, self._item_of_row[rows_QK[self._watched_J]])
        found_JK = item_JK >= 0
        watch_JK = np.take_along_axis(self._watch_JN, np.where(found_JK, item_JK, 0), axis=1)
        total_JK = np.cumsum(np.where(found_JK, watch_JK, 0.0), axis=1, dtype=np.float64)
        count_JK = np.cumsum(found_JK, axis=1)
        metrics = {}
        for k in self._data.config.evaluate.at:
            last = min(k, rows_QK.shape[1]) - 1
            values_Q = np.full(len(rows_QK), np.nan)
            with np.errstate(invalid="ignore"):
                values_Q[self._watched_J] = total_JK[:, last] / count_JK[:, last]
            metrics[f"expected_watch_s@{k}"] = values_Q
        return metrics

    def _watch_s(self, requests: np.ndarray) -> np.ndarray:
        return self._watch_JN[self._place_of_request[requests]]

    @cached_property
    def _watch_JN(self) -> np.ndarray:
        """float32 (watched requests, N), seconds: what the user of a request would have watched of each item."""
        truth, test = WorldTruth(self.world, state="true"), self._data.test
        rows = self._watched_J  # the truth works in chunks of its own
        return truth.expected_watch_s(test.user_id_Q[rows], test.time_ms_Q[rows])

    def _sample(self, elements: int) -> np.ndarray:
        """As many test requests as fit, int64, rising; a smaller sample is part of a larger one."""
        count = len(self._data.test)
        most = max(LEAST_REQUESTS, elements // self.world.spec.items)
        order = np.random.default_rng([self._data.config.evaluate.seed, 0x6365696C]).permutation(count)
        return np.sort(order[:most])

    def _chunks(self, rows: np.ndarray):
        step = max(1, _AT_ONCE // self.world.spec.items)
        return (rows[begin:begin + step] for begin in range(0, len(rows), step))


def _target(rule: ViewRule, shortest_s: float) -> tuple[str, float]:
    """The target rule in the words of `WorldTruth`: its name there, and the least watch time in seconds.

    Raises:
        InputError: for a rule whose probability the world does not know in closed form.
    """
    if rule.column in ("long_view", "effective_view"):
        return rule.column, 0.0
    if rule.min_watch_s is not None and rule.min_watch_s <= shortest_s:
        return "any", rule.min_watch_s  # no video is shorter, so that to have seen the whole of one is to pass
    raise InputError(f"the world knows the targets long_view, effective_view and views of up to {shortest_s:g} s, not "
                     f"{plain(rule.model_dump(exclude_none=True))}")


def _top(score_JN: np.ndarray, length: int) -> np.ndarray:
    """The items of the greatest scores, best first: int64 (J, at most `length`); ties by place."""
    length = min(length, score_JN.shape[1])
    if length == score_JN.shape[1]:
        return np.argsort(-score_JN, axis=1, kind="stable")
    best = np.sort(np.argpartition(-score_JN, length, axis=1)[:, :length], axis=1)
    order = np.argsort(-np.take_along_axis(score_JN, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


# ------------------------------------------------------------------------------------------------------ in metrics.json

def synthetic_metrics(run_dir: str | Path, config: Config) -> dict[str, Any]:
    """The `synthetic` part of metrics.json: ceilings, and how much of the way to them each model closes.

    Returns:
        {"world": spec, "requests": n, "ceiling": {<state>: {<strategy>: {<metric>: measured}}}, "models": {<model>:
        {"unconditioned": name, "share_of_way": {<state>: measured}, "share_of_gain": {<state>: measured}}}}, where
        measured is {mean, ci95, n, per_seed}; {"absent": reason} where the world can say nothing; {} for other logs.

    Raises:
        WatchtowerError: if an evaluation folder is damaged.
    """
    folder = Path(run_dir) / FOLDER
    summary = _read_summary(folder)
    if not summary:
        return {}
    if "absent" in summary:
        return {"absent": summary["absent"]}
    try:
        table = read_parquet(folder / "queries.parquet")
    except (OSError, pa.ArrowException) as error:
        raise damaged(folder / "queries.parquet", error, "run `watchtower evaluate` again") from error
    query_J, user_J = table["query_id"].to_numpy(), table["user_id"].to_numpy()
    values = {name: table[name].to_numpy() for name in table.column_names if "." in name}
    measured = _measured_ceilings(values, user_J if config.evaluate.split_users else query_J, config)
    evaluations = {name: sampled for name, evaluation in load_evaluations(run_dir, config)[0].items()
                   if (sampled := _of_queries(evaluation, query_J, user_J)) is not None}
    return {"world": summary["judged_for"]["world"], "requests": summary["requests"], "ceiling": measured,
            "models": _shares(evaluations, values, config)}


def _measured_ceilings(values: Mapping[str, np.ndarray], cluster_J: np.ndarray, config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {state: {} for state in _states(values)}
    names = list(values)
    intervals = bootstrap_cis(np.stack([values[name] for name in names])[:, None], cluster_J,
                              config.evaluate.bootstrap, config.evaluate.seed)
    for name, (mean, low, high) in zip(names, intervals, strict=True):
        state, strategy, metric = name.split(".", 2)
        found[state].setdefault(strategy, {})[metric] = {
            "mean": mean, "ci95": [low, high], "n": int(np.isfinite(values[name]).sum())}
    return found


def _states(values: Mapping[str, np.ndarray]) -> list[str]:
    """The ceilings that were measured, the least knowing first."""
    known = {name.split(".", 1)[0] for name in values}
    return [state for state in CEILINGS if state in known]


def _of_queries(evaluation: Evaluation, query_J: np.ndarray, user_J: np.ndarray) -> Evaluation | None:
    """An evaluation cut down to the judged requests; None if it answered others."""
    place_J = np.searchsorted(evaluation.query_id_Q, query_J)
    inside = place_J < len(evaluation.query_id_Q)
    if not inside.all() or not (np.array_equal(evaluation.query_id_Q[place_J], query_J)
                                and np.array_equal(evaluation.user_id_Q[place_J], user_J)):
        return None
    values = {strategy: {metric: values_SQ[:, place_J] for metric, values_SQ in metrics.items()}
              for strategy, metrics in evaluation.values.items()}
    return dataclasses.replace(evaluation, query_id_Q=query_J, user_id_Q=user_J, values=values)


def _shares(evaluations: Mapping[str, Evaluation], ceiling: Mapping[str, np.ndarray],
            config: Config) -> dict[str, Any]:
    """For every conditioned model and every Bayes term, by state."""
    metric = f"recall@{headline_length(config.evaluate.at)}"
    pairs: dict[str, ModelConfig | None] = {}
    for model in config.crm.models:
        if model.condition != "none":
            pairs[model.name] = unconditioned_model(model, config.crm.models)
        elif model.bayes:
            pairs[bayes_name(model.name)] = model
    shares = {}
    for name, bare in pairs.items():
        if bare is None or name not in evaluations or bare.name not in evaluations:
            continue
        own, without = evaluations[name], evaluations[bare.name]
        seeds = [seed for seed in own.seeds if seed in without.seeds]
        if not seeds or metric not in own.values.get("oracle", {}):
            continue
        asked_SJ = _of_seeds(own, seeds, "oracle", metric)
        bare_SJ = _of_seeds(without, seeds, "none", metric)
        shares[name] = {"unconditioned": bare.name, "share_of_way": {}, "share_of_gain": {}}
        for state in _states(ceiling):
            told_J, untold_J = (ceiling[f"{state}.{strategy}.{metric}"].astype(np.float64)
                                for strategy in ("oracle", "none"))
            shares[name]["share_of_way"][state] = _share(asked_SJ - bare_SJ, told_J - bare_SJ, seeds, own, config)
            shares[name]["share_of_gain"][state] = _share(
                asked_SJ - bare_SJ, np.broadcast_to(told_J - untold_J, bare_SJ.shape), seeds, own, config)
    return shares


def _of_seeds(evaluation: Evaluation, seeds: list[int], strategy: str, metric: str) -> np.ndarray:
    rows = [evaluation.seeds.index(seed) for seed in seeds]
    return evaluation.values[strategy][metric][rows].astype(np.float64)


def _share(closed_SJ: np.ndarray, whole_SJ: np.ndarray, seeds: list[int], evaluation: Evaluation,
           config: Config) -> dict[str, Any]:
    """mean(closed) / mean(whole) with its interval, both sides over the same requests."""
    clusters = evaluation.user_id_Q if config.evaluate.split_users else evaluation.query_id_Q
    share, low, high = (1.0 + value for value in paired_ci(closed_SJ, whole_SJ, clusters, config.evaluate.bootstrap,
                                                           config.evaluate.seed))
    per_seed = {str(seed): float(closed_J.mean() / whole_J.mean()) if whole_J.mean() else None
                for seed, closed_J, whole_J in zip(seeds, closed_SJ, whole_SJ, strict=True)}
    return {"mean": share, "ci95": [low, high], "n": closed_SJ.shape[1], "per_seed": per_seed}


def _read_summary(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "summary.json")
    except (OSError, ValueError):
        return {}
