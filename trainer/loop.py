"""The training loop: load, step, log, save, rebuild the index, and what stops it.

One model and one seed at a time, on all workers together. The loop knows neither Ray nor the task beyond
`(loss, extras)`: the engine trains the towers, the tables train themselves in the backward pass.

Every random number of a step is a function of (seed, epoch, step) and, for dropout, the rank: a run that continues
from a checkpoint needs no saved generator to draw the same ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.errors import WatchtowerError
from configs.schema import HOW_INDEXED, HOW_TRAINED, SEEN_IN_TRAINING, Config, ModelConfig
from embeddings.tables import Lookup, ShardedTables
from trainer import checkpoint
from trainer.batches import Prefetched, WindowBatch
from trainer.crm import CrmModel, FeatureSizes, table_specs
from trainer.crm_data import CrmData
from trainer.engine import DenseEngine, EngineSpec
from trainer.events import memory_mib
from trainer.rebuild import CHOOSES_AT, IndexRebuilder, PublishedIndex, encode_items, encode_requests
from trainer.results import write_whole
from trainer.windows import EpochPlan
from trainer.workers import Workers

RESULTS = "results.json"

Write = Callable[..., None]
"""write(event, **fields): one line of events.jsonl; only the first worker has one that does something."""


@dataclass
class Position:
    """Where a run stands: the next step to take. epoch counts slices x passes."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class TrainedModel:
    """What training left behind. indexes: one an epoch. best: the one with the best validation; checkpoint: the
    folder of that epoch. seconds: of training, over all processes. windows: rows of all epochs."""

    name: str
    seed: int
    indexes: list[PublishedIndex]
    best: PublishedIndex
    checkpoint: str
    seconds: float
    windows: int


@dataclass
class _Running:
    """The parts of one model while it trains. `indexes`: results of rebuilds that are settled, the same on all
    workers; `rebuilt`: rebuilds begun, of which the last may still be under way. trained_s: seconds of training that
    earlier processes put into it."""

    data: CrmData
    model: ModelConfig
    seed: int
    workers: Workers
    write: Write
    tables: ShardedTables
    engine: DenseEngine
    folder: Path
    epochs: int
    total_steps: int
    rebuilder: IndexRebuilder | None
    indexes: list[PublishedIndex]
    trained_s: float

    def __post_init__(self) -> None:
        self.rebuilt = self.resumed = len(self.indexes)
        self.began = time.perf_counter()

    @property
    def config(self) -> Config:
        return self.data.config

    @property
    def name(self) -> str:
        return f"{self.model.name}/seed={self.seed}"

    def encode(self, task: str, batch) -> torch.Tensor:
        features = batch.features if task == "items" else batch.items.features
        return self.engine(task, batch, self.tables(features))


def precision(config: Config, device: torch.device) -> str:
    """auto is bf16 on a GPU and fp32 on the CPU."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if device.type == "cuda" else "fp32"


def zero_stage(config: Config, device: torch.device) -> int:
    """null is the least that the precision allows."""
    if config.train.zero_stage is not None:
        return config.train.zero_stage
    return 1 if precision(config, device) == "bf16" else 0


def train_model(data: CrmData, model: ModelConfig, seed: int, workers: Workers, write: Write) -> TrainedModel:
    """Trains one model with one seed, from its newest checkpoint if there is one, and rebuilds its index after
    every epoch. Collective.

    Raises:
        WatchtowerError: loss or gradient not finite; the message names the batch.
        QualityGateError: an index below its gate.
    """
    config = data.config
    folder = data.run_dir / "checkpoints" / model.name / f"seed={seed}"
    passes = [time_slice for time_slice in data.slices for _ in range(model.epochs or config.train.epochs)]
    plans = [data.plan(model, seed, number, time_slice) for number, time_slice in enumerate(passes)]
    running, position = _start(data, model, seed, workers, write, folder, plans)
    is_trained = position.epoch == len(passes)
    try:
        if running.rebuilt < position.epoch:
            # The run ended between a checkpoint and its index; the towers are still those of that epoch.
            _rebuild(running, position, passes[position.epoch - 1][1])
        while position.epoch < len(passes) and not _out_of_patience(running):
            _train_epoch(running, plans[position.epoch], position)
            watermark_ms = passes[position.epoch][1]
            position.epoch, position.step = position.epoch + 1, 0
            _rebuild(running, position, watermark_ms)
            _save(running, position, settled=running.rebuilt - 1)
        _settle(running, running.rebuilt)
        _keep_results(running, len(passes))
    finally:
        running.engine.close()
        if running.rebuilder is not None:
            running.rebuilder.close()
    best = best_index(running.indexes)
    kept = folder / f"step-{best.step}"
    if workers.first:
        checkpoint.prune(folder, config.train.keep_checkpoints, {kept})
    seconds = running.trained_s + (0.0 if is_trained else time.perf_counter() - running.began)
    return TrainedModel(model.name, seed, running.indexes, best, str(kept), seconds, sum(plan.rows for plan in plans))


def _start(data, model, seed, workers, write, folder, plans) -> tuple[_Running, Position]:
    config, train = data.config, data.config.train
    name = f"{model.name}/seed={seed}"
    newest, state = _newest_checkpoint(folder, fingerprint(data, model), workers, write, name)
    tables, module = build_model(data, model, seed, workers.device)
    if newest is not None:
        checkpoint.load_before_engine(newest, tables, module)
    engine = DenseEngine(module, EngineSpec(
        zero_stage=zero_stage(config, workers.device), precision=precision(config, workers.device),
        optimizer=train.optimizer,
        learning_rate=model.learning_rate or train.learning_rate, betas=(0.9, 0.98),
        weight_decay=train.weight_decay if train.optimizer == "adamw" else 0.0,
        gradient_clip_norm=train.gradient_clip_norm,
        rows_per_rank_step=max(1, (model.batch_rows or train.batch_rows) // workers.count)), device=workers.device)
    position, indexes = Position(), []
    if newest is not None:
        checkpoint.load_into_engine(newest, engine)
        position = Position(state["epoch"], state["step"], state["global_step"])
        indexes = [PublishedIndex(**index) for index in state["indexes"]]
        write("resume", model=name, checkpoint=newest.name, epoch=position.epoch, step=position.step,
              global_step=position.global_step)
    rebuilder = None
    if workers.first:
        rebuilder = IndexRebuilder(
            data.run_dir, data.run_dir / "indexes" / model.name / f"seed={seed}", config.index,
            {"model": model.name, "seed": seed, "config": fingerprint(data, model)}, data.validation,
            np.asarray(data.catalogue.item_id_N), config.evaluate.at, _report_index(write, name))
    return _Running(data, model, seed, workers, write, tables, engine, folder, len(plans),
                    sum(plan.steps for plan in plans), rebuilder, indexes,
                    0.0 if newest is None else state["trained_s"]), position


def fingerprint(data: CrmData, model: ModelConfig) -> str:
    """What decides a model's numbers: its config, the towers', the training's and the sequences. The number of
    workers, the places where things run and the gate of the index are left out: a run may continue on another cluster,
    or under the lower gate that it asked for."""
    config = data.config
    crm = config.crm.model_dump(mode="json", exclude={"models", "publish"})
    train = config.train.model_dump(mode="json", exclude=set(HOW_TRAINED))
    judged = config.evaluate.model_dump(mode="json", include=set(SEEN_IN_TRAINING))
    parts = [model.model_dump(mode="json"), crm, train, judged, data.requests_fingerprint,
             config.index.model_dump(mode="json", exclude={*HOW_INDEXED, "min_recall"})]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _keep_results(running: _Running, epochs: int) -> None:
    """Notes the results of all epochs beside the checkpoints: the last checkpoint is older than the last index, and who
    only judges again shall not build that index anew."""
    if running.workers.first and len(running.indexes) == epochs:
        write_whole(running.folder / RESULTS, json.dumps({
            "fingerprint": fingerprint(running.data, running.model),
            "indexes": [index.as_json() for index in running.indexes]}) + "\n")


def _with_results(state: dict, folder: Path) -> dict:
    """The state with the results of all its epochs, where they were noted and the last index is still there."""
    try:
        noted = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return state
    whole = noted["fingerprint"] == state["fingerprint"] and len(noted["indexes"]) == state["epoch"]
    return state | {"indexes": noted["indexes"]} if whole and state["step"] == 0 else state


def _newest_checkpoint(folder: Path, expected: str, workers: Workers, write: Write, name: str):
    """The newest checkpoint that is whole and of this run, and its state; the first worker decides for all."""
    chosen = None
    if workers.first:
        for path in reversed(checkpoint.checkpoints(folder)):
            try:
                state = checkpoint.read_state(path)
            except WatchtowerError as error:
                write("warning", model=name, message=f"{path.name} is damaged, the one before is used: {error}")
                continue
            if state["fingerprint"] == expected:
                chosen = (path, _with_results(state, folder))
                break
            write("warning", model=name, message=f"{path.name} is of another config or other logs; it is deleted")
            shutil.rmtree(path)
    chosen = workers.agree(chosen)
    return (None, None) if chosen is None else chosen


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


def _train_epoch(running: _Running, plan: EpochPlan, position: Position) -> None:
    """All batches of an epoch from `position.step` on."""
    train, workers = running.config.train, running.workers
    batches = Prefetched(lambda: _batches(running, plan, position.epoch, position.step), train.prefetch,
                         time.perf_counter)
    log = StepLog(running, plan, position, batches)
    running.engine.train()
    for batch, lookup, upcoming in _looked_up(running, batches):
        torch.manual_seed(_step_seed(running.seed, position.epoch, position.step, workers.rank))
        loss = _step(running, batch, lookup, upcoming, position)
        position.step += 1
        position.global_step += 1
        log.step(loss)
        every = train.checkpoint_every_steps
        due = every and position.global_step % every == 0 and position.step < plan.steps
        # A checkpoint holds the results of all rebuilds before it. Training does not wait for one that is under way;
        # the next checkpoint comes soon enough.
        if due and not running.workers.agree(running.rebuilder is not None and running.rebuilder.is_busy()):
            _save(running, position, settled=running.rebuilt)


def _batches(running: _Running, plan, epoch: int, first_step: int) -> Iterator[WindowBatch]:
    collation, workers = running.data.collation(running.model, training=True), running.workers
    features = running.data.features_until(plan.rule.end_ms)
    rows = plan.batches(workers.rank, workers.count, first_step)
    for step, mine in enumerate(rows, start=first_step):
        rng = np.random.default_rng([running.seed, epoch, step, 0x636F6E64])
        yield collation.window_batch(features, mine, rng)


def _looked_up(running: _Running, batches) -> Iterator[tuple[WindowBatch, Lookup, Lookup | None]]:
    """Each batch with its own lookup and that of the batch after it, whose ids set off before this one is computed."""
    ready = None
    for batch in batches:
        batch = batch.to(running.workers.device)
        lookup = running.tables.begin(batch.items.features)
        if ready is not None:
            yield *ready, lookup
        ready = batch, lookup
    if ready is not None:
        yield *ready, None


def _step(running: _Running, batch: WindowBatch, lookup: Lookup, upcoming: Lookup | None, position: Position) -> float:
    """One step on all workers: the mean loss of the global batch. A loss that is not finite changes nothing."""
    _set_learning_rate(running, position.global_step)
    loss, _ = running.engine("loss", batch, lookup.rows())
    mean = running.workers.mean(loss)
    if not math.isfinite(mean):
        _stop_not_finite(running, batch, position, "loss", not math.isfinite(float(loss)))
    if upcoming is not None:
        upcoming.send()
    running.engine.backward(loss)
    if not running.engine.step():
        _stop_not_finite(running, batch, position, "gradient of the towers", True)
    return mean


def _set_learning_rate(running: _Running, global_step: int) -> None:
    """Linear warm-up, then the decay, for both halves alike."""
    train = running.config.train
    rate = 1.0
    if train.warmup_steps and global_step < train.warmup_steps:
        rate = (global_step + 1) / train.warmup_steps
    elif train.decay != "none":
        span = max(1, running.total_steps - train.warmup_steps)
        done = min(1.0, (global_step - train.warmup_steps) / span)
        rate = 0.5 * (1 + math.cos(math.pi * done)) if train.decay == "cosine" else 1.0 - done
        rate = max(rate, 0.01)
    running.engine.learning_rate = (running.model.learning_rate or train.learning_rate) * rate
    running.tables.learning_rate = running.config.crm.tables.learning_rate * rate


def _stop_not_finite(running: _Running, batch: WindowBatch, position: Position, what: str, mine_is_bad: bool) -> None:
    told = running.workers.everybody((mine_is_bad, [int(user) for user in batch.user_B[:5]]))
    rank, users = next((rank, users) for rank, (bad, users) in enumerate(told) if bad)
    raise WatchtowerError(
        f"{running.name}: the {what} is not finite at epoch {position.epoch}, step {position.step}, seed "
        f"{running.seed}, worker {rank} (its first users: {', '.join(map(str, users))}). Training stopped on all "
        f"workers; the last checkpoint is untouched. Look at these users' rows, or lower train.learning_rate and "
        f"crm.tables.learning_rate")


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _judging(engine: DenseEngine):
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()


def _rebuild(running: _Running, position: Position, watermark_ms: int) -> None:
    """Takes the vectors of this epoch, collectively, and leaves the rest to the rebuilder's thread."""
    data, workers = running.data, running.workers
    began = time.perf_counter()
    rows = data.index_rows(watermark_ms)
    validation = data.validation
    with _judging(running.engine):
        vectors_ND = encode_items(running.encode, data.features_until(watermark_ms), rows, workers)
        queries_QD = None
        if len(validation):
            # Conditioned towers are validated under the true condition, unconditioned ones ignore it.
            condition_Q = data.statistics.condition.clamp(validation.watch_s_Q)
            queries_QD = encode_requests(running.encode, data.collation(running.model, training=False), data.features,
                                         validation, data.config.crm.tower.history, condition_Q, workers)
    running.rebuilt += 1
    if running.rebuilder is not None:
        queries_QD = vectors_ND[:0] if queries_QD is None else queries_QD
        running.rebuilder.submit(vectors_ND, np.asarray(data.catalogue.item_id_N)[rows], queries_QD,
                                 epoch=position.epoch, step=position.global_step, watermark_ms=watermark_ms)
    running.write("vectors", model=running.name, epoch=position.epoch, step=position.global_step, items=len(rows),
                  seconds=time.perf_counter() - began)


def _settle(running: _Running, count: int) -> None:
    """Waits for the first `count` rebuilds and makes their results known to all workers."""
    found, error, cause = [], None, None
    if running.rebuilder is not None:
        try:
            found = running.rebuilder.results(count - running.resumed)
        except WatchtowerError as failed:
            error = failed
        except Exception as failed:  # all workers must hear of it, whatever it is: they would wait for this one
            error, cause = WatchtowerError(f"{running.name}: the index could not be rebuilt: {failed!r}"), failed
    try:
        running.workers.raise_together(error)
    except WatchtowerError as told:
        raise told from cause
    found = running.workers.agree([index.as_json() for index in found])
    running.indexes = running.indexes[:running.resumed] + [PublishedIndex(**index) for index in found]


def _save(running: _Running, position: Position, settled: int) -> None:
    """A checkpoint at this position, with the results of the first `settled` rebuilds: all but one that was begun
    right here, from these very towers, and can be begun again."""
    _settle(running, settled)
    state = {"epoch": position.epoch, "step": position.step, "global_step": position.global_step,
             "model": running.model.name, "seed": running.seed,
             "fingerprint": fingerprint(running.data, running.model),
             "trained_s": running.trained_s + time.perf_counter() - running.began,
             "indexes": [index.as_json() for index in running.indexes]}
    began = time.perf_counter()
    checkpoint.save_checkpoint(running.folder / f"step-{position.global_step}", running.tables, running.engine, state,
                               running.workers)
    if running.workers.first:
        best = best_index(running.indexes)
        checkpoint.prune(running.folder, running.config.train.keep_checkpoints,
                         set() if best is None else {running.folder / f"step-{best.step}"})
    running.write("checkpoint", model=running.name, epoch=position.epoch, step=position.global_step,
                  seconds=time.perf_counter() - began)


def best_index(indexes: list[PublishedIndex]) -> PublishedIndex | None:
    """The epoch with the best validation recall@100; the last one where nothing was validated."""
    judged = [index for index in indexes if math.isfinite(index.validation.get(f"recall@{CHOOSES_AT}", math.nan))]
    if judged:
        return max(judged, key=lambda index: index.validation[f"recall@{CHOOSES_AT}"])
    return indexes[-1] if indexes else None


def _out_of_patience(running: _Running) -> bool:
    """Whether as many settled epochs as `train.patience` have gone by since the best one."""
    patience = running.config.train.patience
    best = best_index(running.indexes)
    return patience is not None and best is not None and running.indexes[-1].epoch - best.epoch >= patience


def _report_index(write: Write, name: str) -> Callable[[PublishedIndex, float], None]:
    def report(index: PublishedIndex, seconds: float) -> None:
        facts = index.as_json()
        validation = facts.pop("validation")
        write("index", model=name, seconds=seconds, **facts)
        write("epoch", model=name, epoch=index.epoch, step=index.step,
              **{f"validation_{metric}": value for metric, value in validation.items()})
    return report


class StepLog:
    """One line a log step: where the run is, how well and how fast."""

    def __init__(self, running: _Running, plan: EpochPlan, position: Position, batches: Prefetched):
        self._write, self._name, self._every = running.write, running.name, running.config.train.log_every_steps
        self._epochs, self._total_steps = running.epochs, running.total_steps
        self._plan, self._position, self._batches = plan, position, batches
        self._steps, self._losses = 0, 0.0
        self._began, self._waited = time.perf_counter(), 0.0

    def step(self, loss: float) -> None:
        """Call after each step, the position already moved on."""
        self._steps += 1
        self._losses += loss
        if self._position.step % self._every and self._position.step != self._plan.steps:
            return
        now = time.perf_counter()
        seconds = max(now - self._began, 1e-9)
        rows = min(self._steps * self._plan.batch_rows, self._plan.rows)
        self._write(
            "train_step", model=self._name, epoch=self._position.epoch + 1, epochs=self._epochs,
            step=self._position.global_step, steps=self._total_steps, loss=loss,
            mean_loss=self._losses / self._steps, rows_per_s=rows / seconds,
            wait_share=min(1.0, (self._batches.waited_s - self._waited) / seconds),
            memory_mib=memory_mib(),
            eta_s=(self._total_steps - self._position.global_step) * seconds / self._steps)
        self._steps, self._losses, self._began, self._waited = 0, 0.0, now, self._batches.waited_s
