"""CRM as a task of the loop: towers trained on windows of target views, an index rebuilt after every epoch."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from configs.schema import HOW_INDEXED, HOW_TRAINED, INDEX_GATES, SEEN_IN_TRAINING, ModelConfig
from embeddings.tables import ShardedTables
from trainer.batches import WindowBatch
from trainer.crm import CrmModel, FeatureSizes, table_specs
from trainer.crm_data import CrmData
from trainer.loop import Forward, Pending, Position, Settings, Write
from trainer.rebuild import (
    CHOOSES_AT,
    IndexRebuilder,
    PublishedIndex,
    Rebuild,
    Version,
    encode_items,
    encode_requests,
)
from trainer.windows import EpochPlan
from trainer.workers import Workers


class CrmTask:
    """One CRM model with one seed (trainer.loop.Task). Each epoch is a pass over one time slice of the data.

    Args:
        data: shared by all models of a run. model: the tower and its condition.
    """

    results_key = "indexes"
    result_type = PublishedIndex
    what_fails = "index could not be rebuilt"

    def __init__(self, data: CrmData, model: ModelConfig, seed: int):
        config = data.config
        self.data, self.model, self.seed, self.config = data, model, seed, config
        self.model_name, self.name = model.name, f"{model.name}/seed={seed}"
        self.folder = data.run_dir / "checkpoints" / model.name / f"seed={seed}"
        self.settings = Settings(
            batch_rows=model.batch_rows or config.train.batch_rows,
            learning_rate=model.learning_rate or config.train.learning_rate, weight_decay=config.train.weight_decay,
            table_learning_rate=config.crm.tables.learning_rate,
            rates_are="train.learning_rate and crm.tables.learning_rate")
        self._passes = [time_slice for time_slice in data.slices for _ in range(model.epochs or config.train.epochs)]
        self._rebuilder: IndexRebuilder | None = None

    def fingerprint(self) -> str:
        return fingerprint(self.data, self.model)

    def plans(self) -> list[EpochPlan]:
        return [self.data.plan(self.model, self.seed, number, time_slice)
                for number, time_slice in enumerate(self._passes)]

    def build(self, device: torch.device) -> tuple[ShardedTables, CrmModel]:
        return build_model(self.data, self.model, self.seed, device)

    def start(self, workers: Workers, write: Write) -> None:
        data = self.data
        self._workers, self._write = workers, write
        if workers.first:
            self._rebuilder = IndexRebuilder(
                data.run_dir, data.run_dir / "indexes" / self.model.name / f"seed={self.seed}", self.config.index,
                {"model": self.model.name, "seed": self.seed, "config": self.fingerprint()}, data.validation,
                np.asarray(data.catalogue.item_id_N), self.config.evaluate.at, _report_index(write, self.name))

    def batches(self, plan: EpochPlan, epoch: int, first_step: int, workers: Workers) -> Iterator[WindowBatch]:
        collation = self.data.collation(self.model, training=True)
        features = self.data.features_until(plan.rule.end_ms)
        rows = plan.batches(workers.rank, workers.count, first_step)
        for step, mine in enumerate(rows, start=first_step):
            rng = np.random.default_rng([self.seed, epoch, step, 0x636F6E64])
            yield collation.window_batch(features, mine, rng)

    def after_epoch(self, forward: Forward, position: Position) -> dict[str, Any]:
        """Takes the vectors of this epoch, collectively, and leaves the rest to the rebuilder's thread."""
        data, workers = self.data, self._workers
        watermark_ms = self._passes[position.epoch - 1][1]
        version = Version(position.epoch, position.global_step, int(watermark_ms))
        began = time.perf_counter()
        rows = data.index_rows(watermark_ms)
        validation = data.validation
        vectors_ND = encode_items(forward, data.features_until(watermark_ms), rows, workers)
        queries_QD = None
        if len(validation):
            # Conditioned towers are validated under the true condition, unconditioned ones ignore it.
            condition_Q = data.statistics.condition.clamp(validation.watch_s_Q)
            queries_QD = encode_requests(forward, data.collation(self.model, training=False), data.features,
                                         validation, data.config.crm.tower.history, condition_Q, workers)
        if self._rebuilder is not None:
            queries_QD = vectors_ND[:0] if queries_QD is None else queries_QD
            self._rebuilder.submit(Rebuild(version, vectors_ND, np.asarray(data.catalogue.item_id_N)[rows],
                                           queries_QD))
        self._write("vectors", model=self.name, epoch=position.epoch, step=position.global_step,
                    items=len(rows), seconds=time.perf_counter() - began)
        return asdict(version)

    def results(self, count: int) -> list[PublishedIndex]:
        return self._rebuilder.results(count)

    def pending(self) -> Pending | None:
        rebuild = self._rebuilder.pending()
        return None if rebuild is None else Pending(asdict(rebuild.version), rebuild.arrays())

    def begin_again(self, pending: Pending) -> None:
        self._rebuilder.submit(Rebuild.from_arrays(Version(**pending.facts), pending.arrays))

    def best(self, results: Sequence[PublishedIndex]) -> PublishedIndex | None:
        """The epoch with the best validation recall@100; the last one where nothing was validated."""
        judged = [index for index in results if math.isfinite(index.validation.get(f"recall@{CHOOSES_AT}", math.nan))]
        if judged:
            return max(judged, key=lambda index: index.validation[f"recall@{CHOOSES_AT}"])
        return results[-1] if results else None

    def close(self) -> None:
        if self._rebuilder is not None:
            self._rebuilder.close()


def fingerprint(data: CrmData, model: ModelConfig) -> str:
    """What decides a model's numbers: its config, the towers', the training's and the sequences. The number of
    workers, the places where things run and the gates of the index are left out: a run may continue on another cluster,
    or under the lower gate that it asked for."""
    config = data.config
    crm = config.crm.model_dump(mode="json", exclude={"models", "publish"})
    train = config.train.model_dump(mode="json", exclude=set(HOW_TRAINED))
    judged = config.evaluate.model_dump(mode="json", include=set(SEEN_IN_TRAINING))
    parts = [model.model_dump(mode="json"), crm, train, judged, data.requests_fingerprint,
             config.index.model_dump(mode="json", exclude={*HOW_INDEXED, *INDEX_GATES})]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def build_model(data: CrmData, model: ModelConfig, seed: int, device: torch.device) -> tuple[ShardedTables, CrmModel]:
    """Fresh tables and towers; the same values whatever the number of workers. Collective."""
    crm = data.config.crm
    # The first slice's counts: an index of that slice must not know of later ones.
    known = data.statistics_until(data.slices[0][1])
    sizes = FeatureSizes.of(data.catalogue, data.store.users, known.watch_views_B)
    tables = ShardedTables(table_specs(sizes, crm), device=device, optimizer=crm.tables.optimizer,
                           learning_rate=crm.tables.learning_rate, seed=seed)
    torch.manual_seed(seed)
    return tables, CrmModel(crm, model, sizes)


def _report_index(write: Write, name: str) -> Callable[[PublishedIndex, float], None]:
    def report(index: PublishedIndex, seconds: float) -> None:
        facts = index.as_json()
        validation = facts.pop("validation")
        write("index", model=name, seconds=seconds, **facts)
        write("epoch", model=name, epoch=index.epoch, step=index.step,
              **{f"validation_{metric}": value for metric, value in validation.items()})
    return report
