"""The router as a task of the loop: fitted on replayed labels, validated after every epoch, then asked for scores.

Validation is on training users that are not fitted. Per channel: the weighted BCE of Eq. 8, the AUC of v' (labels
against all other triggers), and the captured value

    captured@B = sum of r over the top B triggers by S_c / sum of r over the top B by r itself,

the mean over requests with a positive value, then over channels. The epoch with the best captured@10 scores the test:

    evaluation/routing/<router>/seed=<s>/{scores.parquet, validation.parquet, manifest.json}

scores.parquet has one row for each request and trigger, in the order of trigger_requests shard by shard: request_id,
position, trigger_item_id, and fixed-size lists in the order of the channels: value (v', Eq. 7), uniqueness (u, Eq. 12;
0 for a router without uniqueness heads). validation.parquet beside it has those of the validation requests; routing
chooses by them what it may not choose by test requests (routing.overlap).

Shape suffixes: R = requests, T = triggers, C = channels, B = bins, P = places of a request's triggers.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configs.errors import InputError, WatchtowerError
from configs.schema import HOW_TRAINED, RouterModelConfig
from embeddings import elsewhere
from embeddings.snapshots import publish_from, read_manifest, remove
from embeddings.table_state import load_tables
from embeddings.tables import ShardedTables
from embeddings.untrusted import inside, read_json
from trainer.catr import CatrModel
from trainer.crm import FeatureSizes, table_specs
from trainer.item_value import FOLDER
from trainer.loop import Forward, Pending, Position, Settings, Trained, Write, load_towers
from trainer.router_data import RouterBatch, RouterData, RouterPlan
from trainer.router_shards import RouterShard
from trainer.routing_evaluation import SCORES, VALIDATION, score_schema
from trainer.sequences import test_users_identity
from trainer.triggers import TriggerRequests
from trainer.workers import Workers

CHOOSES_AT = 10
"""Triggers a channel takes in the captured value that picks the best epoch."""

REQUESTS_AT_ONCE = 256
AUC_BINS = 4096
# Sections of `train` that only CRM reads; the router has its own.
CRM_ONLY = frozenset({"epochs", "slices", "batch_rows", "stride", "cuts_per_user", "min_history", "learning_rate",
                      "weight_decay"})


@dataclass(frozen=True)
class RouterEpoch:
    """What an epoch came to. validation: metric: mean; empty without validation requests."""

    epoch: int
    step: int
    validation: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class RouterTask:
    """One router with one seed (trainer.loop.Task).

    Raises:
        InputError: if a CRM model has its name, whose folder of checkpoints would be the same.
    """

    results_key = "validations"
    result_type = RouterEpoch
    what_fails = "router could not be validated"

    def __init__(self, data: RouterData, model: RouterModelConfig, seed: int):
        config = data.config
        if model.name in [crm.name for crm in config.crm.models]:
            raise InputError(f"router.models and crm.models both have a {model.name}; give the router another name")
        self.data, self.model, self.seed, self.config = data, model, seed, config
        self.model_name, self.name = model.name, f"{model.name}/seed={seed}"
        self.folder = data.run_dir / "checkpoints" / model.name / f"seed={seed}"
        self.scores = data.run_dir / "evaluation" / "routing" / model.name / f"seed={seed}"
        router = config.router
        self.settings = Settings(
            batch_rows=router.batch_requests, learning_rate=router.learning_rate, weight_decay=router.weight_decay,
            table_learning_rate=router.tables.learning_rate,
            rates_are="router.learning_rate and router.tables.learning_rate")
        self._done: list[RouterEpoch] = []

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Of what decides the numbers: config of router, labels and requests, and what the run folder holds of
        sequences, labels and channels. Where and with how many workers it runs is left out."""
        config, data = self.config, self.data
        folders = [data.run_dir / "labels", *([data.run_dir / FOLDER] if config.router.features == "all" else []),
                   *(s.path for found in [*data.snapshots.snapshots, data.statistics.snapshots] for s in found)]
        files = [read_manifest(folder)["files"] for folder in folders]
        train = config.train.model_dump(mode="json", exclude={*HOW_TRAINED, *CRM_ONLY})
        crm = config.crm.condition.model_dump(mode="json", include={"buckets", "max_s"})
        parts = [self.model.model_dump(mode="json"), config.router.model_dump(mode="json", exclude={"models"}), train,
                 crm, config.replay.model_dump(mode="json", exclude={"shards_at_once"}), list(data.channels), files,
                 config.channels.rollback_min, config.channels.before_first, config.routing.beta,
                 data.store.manifest["input"]["fingerprint"], test_users_identity(config.split),
                 config.routing.test_users.model_dump(mode="json"),
                 read_manifest(crm_checkpoint(data))["files"] if config.router.from_crm else None]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def plans(self) -> list[RouterPlan]:
        return [self.data.plan(self.seed, epoch) for epoch in range(self.config.router.epochs)]

    def build(self, device: torch.device) -> tuple[ShardedTables, CatrModel]:
        data, router = self.data, self.config.router
        sizes = FeatureSizes.of(data.catalogue, data.store.users)
        tables = ShardedTables(table_specs(sizes, router), device=device, optimizer=router.tables.optimizer,
                               learning_rate=router.tables.learning_rate, seed=self.seed)
        if router.from_crm:
            load_crm_tables(data, tables)
        scales = data.labels(self.model.window).scales
        torch.manual_seed(self.seed)
        return tables, CatrModel(router, self.model, sizes, data.scales, scales.cap, scales.eta)

    def start(self, workers: Workers, write: Write) -> None:
        self._workers, self._write, self._done = workers, write, []

    def batches(self, plan: RouterPlan, epoch: int, first_step: int, workers: Workers) -> Iterator[RouterBatch]:
        return self.data.batches(plan, self.model, workers.rank, workers.count, first_step)

    def after_epoch(self, forward: Forward, position: Position) -> dict[str, Any]:
        """Validates the router as it is."""
        began = time.perf_counter()
        beta = self.config.routing.beta if self.model.diversity else 0.0
        metrics = validate(self.data, self.model, forward, beta, self._workers)
        self._done.append(RouterEpoch(position.epoch, position.global_step, metrics))
        self._write("epoch", model=self.name, epoch=position.epoch, step=position.global_step,
                    seconds=time.perf_counter() - began,
                    **{f"validation_{name}": value for name, value in metrics.items()})
        return {"epoch": position.epoch, "step": position.global_step}

    def results(self, count: int) -> list[RouterEpoch]:
        return self._done[:count]

    def pending(self) -> None:
        """A validation is over when `after_epoch` returns."""

    def begin_again(self, pending: Pending) -> None:
        raise WatchtowerError(f"{self.name}: the checkpoint names a validation that is under way, {pending.facts}; "
                              "routers have none. Delete this checkpoint, the one before it will be used")

    def best(self, results: Sequence[RouterEpoch]) -> RouterEpoch | None:
        """The epoch with the best captured value; the last one where nothing was validated."""
        name = f"captured@{CHOOSES_AT}"
        judged = [result for result in results if name in result.validation]
        if judged:
            return max(judged, key=lambda result: result.validation[name])
        return results[-1] if results else None

    def close(self) -> None:
        pass


# --------------------------------------------------------------------------------------------------- tables from CRM

def crm_checkpoint(data: RouterData) -> Path:
    """The checkpoint of the published CRM model that the router may start from.

    Raises:
        InputError: there is none, or it has seen what lies after the first training request.
    """
    name, seed = data.config.crm.published, data.config.seeds[0]
    folder = data.run_dir / "evaluation" / name / f"seed={seed}"
    try:
        summary = read_json(folder / "summary.json")
        watermark_ms = int(Path(summary["index"]["folder"]).name.split("-")[0])
        checkpoint = inside(data.run_dir / "checkpoints" / name / f"seed={seed}", summary["checkpoint"],
                            str(folder / "summary.json"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"router.from_crm: {folder} holds no judged CRM model ({error}); run watchtower train crm "
                         "first, or set router.from_crm=false") from error
    first_ms = data.rules["train"].begin_ms - data.snapshots.rollback_ms
    if watermark_ms > first_ms:
        raise InputError(f"router.from_crm: the CRM model {name} has seen views up to {watermark_ms} ms, but the first "
                         f"training request may know of nothing after {first_ms} ms. Set an earlier "
                         "split.validation_start, or router.from_crm=false")
    return checkpoint


def load_crm_tables(data: RouterData, tables: ShardedTables) -> None:
    """First values of the tables from the published CRM model, with no momentum.

    Raises:
        InputError: tables of another width, or no model to start from.
    """
    crm, router = data.config.crm.tables, data.config.router.tables
    if (crm.dim, crm.optimizer) != (router.dim, router.optimizer):
        raise InputError(f"router.from_crm: CRM's tables are {crm.dim} wide ({crm.optimizer}), the router's "
                         f"{router.dim} ({router.optimizer}); set router.tables.dim={crm.dim} and "
                         f"router.tables.optimizer={crm.optimizer}, or router.from_crm=false")
    load_tables(tables, crm_checkpoint(data))
    for shard in tables.local_shards():
        if shard.kind == "momentum":
            shard.tensor.zero_()


# -------------------------------------------------------------------------------------------------------- validation

def validate(data: RouterData, model: RouterModelConfig, forward: Forward, beta: float, workers: Workers
             ) -> dict[str, float]:
    """Metrics of the validation requests, the same on all workers; none where there are none. Collective. What is kept
    of them are counts and sums alone."""
    plan = RouterPlan(data.validation_counts, batch_rows=REQUESTS_AT_ONCE * workers.count, order=None)
    channels = len(data.channels)
    bins_2CB = np.zeros((2, channels, AUC_BINS), np.int64)
    sums = {name: np.zeros(channels) for name in ("bce", "weight", "captured", "valued")}
    for batch in data.batches(plan, model, workers.rank, workers.count, validation=True):
        if not batch.weight_T.any():  # nothing of this worker's: the lookups are collective all the same
            forward("score", batch.to(workers.device))
            continue
        score_TD = forward("score", batch.to(workers.device)).float().cpu().numpy().astype(np.float64)
        value_TC, uniqueness_TC = score_TD[:, :channels], score_TD[:, channels:]
        label_TC, weight_TC = batch.label_TC.numpy(), 1.0 + batch.intensity_TC.numpy()
        inside_TC = np.clip(value_TC, 1e-7, 1 - 1e-7)
        bce_TC = -np.where(label_TC, np.log(inside_TC), np.log1p(-inside_TC)) * weight_TC
        sums["bce"] += bce_TC.sum(axis=0)
        sums["weight"] += weight_TC.sum(axis=0)
        bin_TC = np.minimum((value_TC * AUC_BINS).astype(np.int64), AUC_BINS - 1)
        for channel in range(channels):
            for label in (0, 1):
                of_label = label_TC[:, channel] == bool(label)
                bins_2CB[label, channel] += np.bincount(bin_TC[of_label, channel], minlength=AUC_BINS)
        captured_RC = captured_value(value_TC + beta * uniqueness_TC, batch.reward_ms_TC.numpy(),
                                     batch.place_T.numpy(), batch.requests, batch.triggers, CHOOSES_AT)
        sums["captured"] += np.nansum(captured_RC, axis=0)
        sums["valued"] += np.isfinite(captured_RC).sum(axis=0)
    told = workers.everybody((bins_2CB, sums))
    bins_2CB = sum(bins for bins, _ in told)
    total = {name: sum(of_worker[name] for _, of_worker in told) for name in sums}
    if not bins_2CB.sum():
        return {}
    metrics = {}
    for channel, name in enumerate(data.channels):
        metrics[f"bce.{name}"] = total["bce"][channel] / total["weight"][channel]
        metrics[f"auc.{name}"] = binned_auc(bins_2CB[0, channel], bins_2CB[1, channel])
        metrics[f"captured@{CHOOSES_AT}.{name}"] = (
            total["captured"][channel] / total["valued"][channel] if total["valued"][channel] else math.nan)
    captured = [metrics[f"captured@{CHOOSES_AT}.{name}"] for name in data.channels]
    known = [value for value in captured if math.isfinite(value)]
    if known:
        metrics[f"captured@{CHOOSES_AT}"] = float(np.mean(known))
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def captured_value(score_TC: np.ndarray, reward_TC: np.ndarray, place_T: np.ndarray, requests: int, triggers: int,
                   budget: int) -> np.ndarray:
    """float64 (R, C): the reward of each request's top `budget` triggers by score over that of the top by reward; NaN
    where no trigger has any. Of equal scores the earlier place wins.

    Args:
        place_T: int64, request * triggers + place. triggers: of the widest request.
    """
    shape = (requests, triggers, score_TC.shape[1])
    score = np.full((requests * triggers, shape[2]), -np.inf)
    reward = np.zeros((requests * triggers, shape[2]))
    score[place_T], reward[place_T] = score_TC, reward_TC
    score_RPC, reward_RPC = score.reshape(shape), reward.reshape(shape)
    top_RPC = np.argsort(-score_RPC, axis=1, kind="stable")[:, :budget]
    taken_RC = np.take_along_axis(reward_RPC, top_RPC, axis=1).sum(axis=1)
    most_RC = -np.sort(-reward_RPC, axis=1)[:, :budget].sum(axis=1)
    return np.where(most_RC > 0, taken_RC / np.maximum(most_RC, 1e-12), np.nan)


def binned_auc(negative_B: np.ndarray, positive_B: np.ndarray) -> float:
    """Share of (negative, positive) pairs in the right order, from counts in rising bins of the score; a pair in one
    bin counts half. NaN without such a pair."""
    pairs = float(negative_B.sum()) * float(positive_B.sum())
    below_B = np.cumsum(negative_B) - negative_B
    right = float((positive_B * (below_B + 0.5 * negative_B)).sum())
    return right / pairs if pairs else math.nan


# ------------------------------------------------------------------------------------------------------------ scores

def is_scored(task: RouterTask) -> bool:
    """Whether the scores of this very training are there."""
    try:
        found = read_manifest(task.scores)
        return found["fingerprint"] == task.fingerprint() and VALIDATION in found["files"]
    except (WatchtowerError, KeyError):
        return False


def score_requests(task: RouterTask, trained: Trained, workers: Workers, write: Write) -> None:
    """Scores the triggers of all test and validation requests with the best epoch's checkpoint and publishes them.
    Collective."""
    data, began = task.data, time.perf_counter()
    forward = load_towers(task, Path(trained.checkpoint), workers)
    writing = workers.agree(workers.on_first(lambda: _new_folder(task.scores)))
    with elsewhere.workshop(writing) as here:
        _write_scores(here / VALIDATION, data, forward, _validation_shares(data, workers), workers)
        requests, rows = _write_scores(here / SCORES, data, forward, _test_shares(data, workers), workers)

    def published() -> None:
        best = trained.best
        publish_from(writing, task.scores, {
            "kind": "router scores", "router": task.model_name, "seed": task.seed, "channels": list(data.channels),
            "fingerprint": task.fingerprint(), "checkpoint": Path(trained.checkpoint).name, "epoch": best.epoch,
            "step": best.step, "train_s": trained.seconds, "requests": requests, "rows": rows,
            "validation": best.validation})

    workers.on_first(published)
    write("scores", model=task.name, requests=requests, rows=rows, seconds=time.perf_counter() - began)


def _new_folder(scores: Path) -> Path:
    """An empty folder beside the scores-to-be; what killed runs left there is removed. Its name is its own: an attempt
    that was cut off and lives on writes into another one."""
    for name in elsewhere.names(scores.parent):
        if name.startswith(f".{scores.name}.") and name.endswith("writing"):
            remove(scores.parent / name)
    writing = scores.with_name(f".{scores.name}.{uuid.uuid4().hex}.writing")
    elsewhere.make_folder(writing)
    return writing


@dataclass(frozen=True)
class _Share:
    """Requests of one shard that are scored, and this worker's share of them: indices at_R of the shard's features."""

    asked: TriggerRequests
    shard: RouterShard
    at_R: np.ndarray


def _test_shares(data: RouterData, workers: Workers) -> Iterator[_Share]:
    for number in range(data.store.shards):
        shard = data.read("test", number, (workers.rank, workers.count))
        yield _Share(data.requests("test", number), shard, np.arange(len(shard.requests)))


def _validation_shares(data: RouterData, workers: Workers) -> Iterator[_Share]:
    for number in range(data.store.shards):
        shard = data.shard(number)
        at_R = np.flatnonzero(shard.is_validation_R)
        each = -(-len(at_R) // workers.count)
        yield _Share(shard.requests.take(at_R), shard, at_R[workers.rank * each:(workers.rank + 1) * each])


def _write_scores(path: Path, data: RouterData, forward: Forward, shares: Iterator[_Share], workers: Workers
                  ) -> tuple[int, int]:
    """Scores the requests of all shards into a file, on the first worker. Collective.

    Returns:
        requests and rows.
    """
    writer = pq.ParquetWriter(path, score_schema(len(data.channels))) if workers.first else None
    rows, requests = 0, 0
    for share in shares:
        asked = share.asked
        gathered = workers.gather_rows(_score_share(data, forward, share, workers))
        if writer is not None and len(asked):
            value_TC, uniqueness_TC = np.split(gathered.cpu().numpy(), 2, axis=1)
            writer.write_table(pa.table([
                pa.array(asked.request_id_R[asked.request_T]), pa.array(asked.position_T),
                pa.array(data.vocabulary.ids_of(asked.trigger_row_T)), _fixed(value_TC), _fixed(uniqueness_TC)],
                schema=writer.schema))
        rows, requests = rows + len(asked.trigger_row_T), requests + len(asked)
    if writer is not None:
        writer.close()
    return requests, rows


def _score_share(data: RouterData, forward: Forward, share: _Share, workers: Workers) -> torch.Tensor:
    """v' and u of this worker's share, float32 (T, 2C)."""
    parts = [torch.zeros(0, 2 * len(data.channels), device=workers.device)]
    for begin in range(0, -(-len(share.asked) // workers.count), REQUESTS_AT_ONCE):
        at_R = share.at_R[begin:begin + REQUESTS_AT_ONCE]
        # A worker whose share has run out still takes part in the lookups.
        batch = data.batch([(share.shard, at_R, None)] if len(at_R) else [])
        score_TD = forward("score", batch.to(workers.device)).float()
        parts.append(score_TD if len(at_R) else score_TD[:0])
    return torch.cat(parts)


def _fixed(x_TC: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(x_TC, np.float32).ravel()), x_TC.shape[1])
