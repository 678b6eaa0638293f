"""The training loop: load, step, log, save, what follows an epoch, and what stops it.

One model and one seed at a time, on all workers together. What is trained is a `Task`: CRM's towers
(trainer/crm_task.py) and the router (trainer/router_task.py) share tables, engine, checkpoints and this loop, which
knows neither Ray nor anything of a task beyond `(loss, extras)`. The engine trains the towers, the tables train
themselves in the backward pass.

Every random number of a step is a function of (seed, epoch, step) and, for dropout, of what a row is
(trainer/dropout.py; on a GPU: of the rank, unless train.dropout_by_row). So a run that continues from a checkpoint, on
any number of workers, draws the same ones and needs no saved generator.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import WatchtowerError
from configs.schema import Config
from embeddings import exchange
from embeddings.snapshots import remove, verify
from embeddings.tables import Lookup, ShardedTables
from embeddings.untrusted import read_json
from trainer import checkpoint, dropout
from trainer.batches import ItemBatch, Prefetched
from trainer.checkpoint import CheckpointSaver
from trainer.engine import DenseEngine, EngineSpec
from trainer.events import give_back_memory, memory_mib
from trainer.results import write_whole
from trainer.watchdog import moved, training
from trainer.workers import Stopped, Workers

RESULTS = "results.json"
STEP_PARTS = ("forward", "loss_mean", "backward", "optimizer")

Write = Callable[..., None]
"""write(event, **fields): one line of events.jsonl; only the first worker has one that does something."""

Forward = Callable[[str, Any], Any]
"""(what is asked of the towers, a batch) to what they answer, in eval mode and without gradient; collective."""


@dataclass
class Position:
    """Where a run stands: the next step to take. epoch counts slices x passes."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0


class Batch(Protocol):
    """What a step is taken on: one worker's share of a global batch. items: looked up in the tables. user_B: int64
    user ids, for messages."""

    items: ItemBatch
    user_B: Tensor

    def to(self, device: torch.device) -> Batch: ...


class Plan(Protocol):
    """The global batches of an epoch. steps: how many; rows: of all of them; batch_rows: of a full one."""

    steps: int
    rows: int
    batch_rows: int


class Result(Protocol):
    """What an epoch came to. epoch: how many had been trained by then. step: the global step of its checkpoint."""

    epoch: int
    step: int

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Pending:
    """What follows an epoch and was not settled when a checkpoint was taken.

    facts: JSON that names it; `step` is the global step of the epoch's end. arrays: all that it is made of; empty in
    the checkpoint of the epoch's end itself, whose towers are what it is made of.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How a task's two halves are trained. batch_rows: of a global batch. learning_rate, weight_decay: of the towers.
    table_learning_rate: of the tables. rates_are: the config keys of both rates, for messages."""

    batch_rows: int
    learning_rate: float
    weight_decay: float
    table_learning_rate: float
    rates_are: str


class Task(Protocol):
    """What the loop trains.

    name: in events, "<model>/seed=<s>"; model and seed: its two parts. folder: of its checkpoints. results_key: what a
    checkpoint's state calls the results of epochs. result_type: makes one of them from JSON. what_fails: how
    a message says that what follows an epoch failed.
    """

    config: Config
    name: str
    model_name: str
    seed: int
    folder: Path
    settings: Settings
    results_key: str
    result_type: Callable[..., Result]
    what_fails: str

    def fingerprint(self) -> str:
        """What decides the numbers of this training; a checkpoint of another fingerprint is not gone on from."""

    def plans(self) -> Sequence[Plan]:
        """One for each epoch."""

    def build(self, device: torch.device) -> tuple[ShardedTables, nn.Module]:
        """Fresh tables and towers; the same values whatever the number of workers. Collective."""

    def start(self, workers: Workers, write: Write) -> None:
        """Opens what following epochs takes; `close` is called in any case after it."""

    def batches(self, plan: Plan, epoch: int, first_step: int, workers: Workers) -> Iterator[Batch]:
        """This worker's share of the epoch's batches from `first_step` on; called on a thread."""

    def after_epoch(self, forward: Forward, position: Position) -> Mapping[str, Any]:
        """Begins what follows an epoch: an index, a validation. Collective; it may end behind the back of training.
        Returns the facts that name it (`Pending.facts`)."""

    def results(self, count: int) -> list[Result]:
        """Of the first `count` epochs that `after_epoch` was called for here, waiting for them. First worker only."""

    def pending(self) -> Pending | None:
        """What `after_epoch` began last, if it is under way. First worker only."""

    def begin_again(self, pending: Pending) -> None:
        """Begins, in a run that continues, what was pending when it was broken off; it then counts as what
        `after_epoch` began. First worker only."""

    def best(self, results: Sequence[Result]) -> Result | None:
        """The epoch to keep."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Trained:
    """What training left behind. results: one an epoch. best: the one to use; checkpoint: the folder of that epoch.
    seconds: of training, over all processes. rows: of all epochs."""

    name: str
    seed: int
    results: list[Any]
    best: Any
    checkpoint: str
    seconds: float
    rows: int


@dataclass
class _Running:
    """The parts of one model while it trains. `results`: what epochs came to as far as it is settled, the same on all
    workers; `begun`: epochs followed up, of which the last may still be under way. trained_s: seconds of training that
    earlier processes put into it. pending: what the checkpoint that the run continues from left unsettled."""

    task: Task
    workers: Workers
    write: Write
    tables: ShardedTables
    engine: DenseEngine
    epochs: int
    total_steps: int
    results: list[Result]
    trained_s: float
    pending: Pending | None
    saver: CheckpointSaver

    def __post_init__(self) -> None:
        self.begun = self.resumed = len(self.results)
        self.began = time.perf_counter()
        self.parts = PartClock()

    @property
    def config(self) -> Config:
        return self.task.config

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def best(self) -> Result | None:
        return self.task.best(self.results)

    def forward(self, what: str, batch) -> Any:
        return self.engine(what, batch, self.tables(_items(batch).features))


def _items(batch) -> ItemBatch:
    return batch if isinstance(batch, ItemBatch) else batch.items


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


def train(task: Task, workers: Workers, write: Write) -> Trained:
    """Trains a task, from its newest checkpoint if there is one, and follows up every epoch. Collective.

    Raises:
        WatchtowerError: loss or gradient not finite; the message names the batch.
        QualityGateError: what follows an epoch below its gate.
        Stopped: a worker was asked to end (`workers.stop`); a checkpoint of the step is there.
    """
    plans = task.plans()
    running, position = _start(task, plans, workers, write)
    is_trained = position.epoch == len(plans)
    try:
        training(True)
        task.start(workers, write)
        _begin_again(running, position)
        while position.epoch < len(plans) and not _out_of_patience(running, position):
            _train_epoch(running, plans[position.epoch], position)
            position.epoch, position.step = position.epoch + 1, 0
            facts = _follow_up(running, position)
            waited_s = _settle(running, running.begun - 1)
            running.write("followed_up", model=running.name, epoch=position.epoch, step=position.global_step,
                          waited_s=waited_s)
            _save(running, position, pending=Pending(facts, {}))
            _stop_if_agreed(running, position)
        running.saver.wait()
        _settle(running, running.begun)
        _keep_results(running, len(plans))
    except Stopped:
        raise
    except BaseException as error:
        workers.failing(error)  # now: what follows may take minutes, and the others stand in a collective meanwhile
        raise
    finally:
        training(False)
        running.saver.close()
        running.engine.close()
        task.close()
    give_back_memory()
    best = running.best
    kept = task.folder / f"step-{best.step}"
    if workers.first:
        checkpoint.prune(task.folder, task.config.train.keep_checkpoints, {kept}, until=position.global_step)
    seconds = running.trained_s + (0.0 if is_trained else time.perf_counter() - running.began)
    return Trained(task.model_name, task.seed, running.results, best, str(kept), seconds,
                   sum(plan.rows for plan in plans))


def load_towers(task: Task, folder: Path, workers: Workers) -> Forward:
    """The towers of a kept checkpoint, without an engine: nothing is trained with them. Collective.

    Raises:
        WatchtowerError: if the checkpoint is damaged.
    """
    workers.on_first(lambda: verify(folder))
    checkpoint.have(folder, workers)
    tables, module = task.build(workers.device)
    checkpoint.load_before_engine(folder, tables, module)
    module.to(workers.device).eval()
    low = precision(task.config, workers.device) == "bf16"

    def forward(what: str, batch) -> Any:
        with torch.no_grad(), torch.autocast(workers.device.type, torch.bfloat16, enabled=low):
            return module(what, batch, tables(_items(batch).features))

    return forward


def _start(task: Task, plans: Sequence[Plan], workers: Workers, write: Write) -> tuple[_Running, Position]:
    train, settings = task.config.train, task.settings
    newest, state = _newest_checkpoint(task, workers, write)
    if newest is not None:
        checkpoint.have(newest, workers)
    tables, module = task.build(workers.device)
    if newest is not None:
        checkpoint.load_before_engine(newest, tables, module)
    engine = DenseEngine(module, EngineSpec(
        zero_stage=zero_stage(task.config, workers.device), precision=precision(task.config, workers.device),
        optimizer=train.optimizer, learning_rate=settings.learning_rate, betas=(0.9, 0.98),
        weight_decay=settings.weight_decay if train.optimizer == "adamw" else 0.0,
        gradient_clip_norm=train.gradient_clip_norm,
        rows_per_rank_step=max(1, settings.batch_rows // workers.count)), device=workers.device)
    position, results, pending = Position(), [], None
    if newest is not None:
        checkpoint.load_into_engine(newest, engine)
        position = Position(state["epoch"], state["step"], state["global_step"])
        results = [task.result_type(**result) for result in state[task.results_key]]
        arrays = workers.on_first(lambda: checkpoint.read_pending(newest))
        pending = Pending(state["pending"], arrays or {}) if state.get("pending") else None
        write("resume", model=task.name, checkpoint=newest.name, epoch=position.epoch, step=position.step,
              global_step=position.global_step)
    saver = CheckpointSaver(task.folder, workers, keep_newest=train.keep_checkpoints, limit_s=train.timeout_s)
    return _Running(task, workers, write, tables, engine, len(plans), sum(plan.steps for plan in plans), results,
                    0.0 if newest is None else state["trained_s"], pending, saver), position


def _keep_results(running: _Running, epochs: int) -> None:
    """Notes the results of all epochs beside the checkpoints: the last checkpoint is older than the last result, and
    who only judges again shall not make that one anew."""
    task = running.task
    if running.workers.first and len(running.results) == epochs:
        write_whole(task.folder / RESULTS, json.dumps({
            "fingerprint": task.fingerprint(),
            task.results_key: [result.as_json() for result in running.results]}) + "\n")


def _with_results(task: Task, state: dict) -> dict:
    """The state with the results of all its epochs, where they were noted."""
    key = task.results_key
    try:
        noted = read_json(task.folder / RESULTS)
        whole = noted["fingerprint"] == state["fingerprint"] and len(noted[key]) == state["epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return state
    return state | {key: noted[key]} if whole and state["step"] == 0 else state


def _newest_checkpoint(task: Task, workers: Workers, write: Write):
    """The newest checkpoint that is whole and of this run, and its state; the first worker decides for all. Nothing is
    loaded before all its files were checked."""
    def choose():
        expected, damaged = task.fingerprint(), 0
        for path in reversed(checkpoint.checkpoints(task.folder)):
            try:
                state = checkpoint.read_state(path)
            except WatchtowerError as error:
                damaged += 1
                write("warning", model=task.name,
                      message=f"{path.name} is damaged, the one before is used: {error}")
                continue
            if state.get("fingerprint") == expected:
                return path, _with_results(task, state)
            write("warning", model=task.name, message=f"{path.name} is of another config or other logs; it is deleted")
            remove(path)
        if damaged:
            write("warning", model=task.name, message=f"no checkpoint in {task.folder} is whole; training starts from "
                                                      "nothing")
        return None, None

    return workers.agree(workers.on_first(choose))


def _train_epoch(running: _Running, plan: Plan, position: Position) -> None:
    """All batches of an epoch from `position.step` on."""
    task, train, workers = running.task, running.config.train, running.workers
    epoch, first_step = position.epoch, position.step
    batches = Prefetched(lambda: task.batches(plan, epoch, first_step, workers), train.prefetch, time.perf_counter)
    log = StepLog(running, plan, position, batches)
    running.engine.train()
    dropout.by_row(train.dropout_by_row)
    for batch, lookup, upcoming in _looked_up(running, batches):
        _seed_step(task.seed, position, workers)
        loss = _step(running, batch, lookup, upcoming, position)
        position.step += 1
        position.global_step += 1
        log.step(loss)
        moved(f"step {position.global_step} of {running.name}", in_step=True)
        if workers.stop.agreed and position.step < plan.steps:  # the end of an epoch is saved as one
            _save_amid(running, position)
            _stop_if_agreed(running, position)
        every = train.checkpoint_every_steps
        if every and position.global_step % every == 0 and position.step < plan.steps:
            _save_amid(running, position)


def _stop_if_agreed(running: _Running, position: Position) -> None:
    """Ends training on all workers if one of them was asked to stop, once the checkpoint of this position stands."""
    workers = running.workers
    if not workers.stop.agreed:
        return
    running.saver.wait()
    reason = workers.stop_reason()
    running.write("stop", model=running.name, epoch=position.epoch + 1, step=position.global_step, reason=reason)
    raise Stopped(reason, position.global_step)


def _looked_up(running: _Running, batches) -> Iterator[tuple[Batch, Lookup, Lookup | None]]:
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


def _step(running: _Running, batch: Batch, lookup: Lookup, upcoming: Lookup | None, position: Position) -> float:
    """One step on all workers: the mean loss of the global batch. A loss that is not finite changes nothing."""
    _set_learning_rate(running, position.global_step)
    parts = running.parts
    parts.begin()
    loss, _ = running.engine("loss", batch, lookup.rows())
    parts.lap("forward")
    # Whose save failed makes the mean not finite, and so all workers hear of it in a collective that is there anyway.
    mean = running.workers.mean(loss if running.saver.error is None else torch.full_like(loss, math.nan))
    parts.lap("loss_mean")
    if not math.isfinite(mean):
        running.saver.raise_together()
        _stop_not_finite(running, batch, position, "loss", not math.isfinite(float(loss)))
    if upcoming is not None:
        upcoming.send()
    running.engine.backward(loss)
    parts.lap("backward")
    stepped = running.engine.step()
    parts.lap("optimizer")
    if not stepped:
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
    running.engine.learning_rate = running.task.settings.learning_rate * rate
    running.tables.learning_rate = running.task.settings.table_learning_rate * rate


def _stop_not_finite(running: _Running, batch: Batch, position: Position, what: str, mine_is_bad: bool) -> None:
    told = running.workers.everybody((mine_is_bad, [int(user) for user in batch.user_B[:5]]))
    rank, users = next((rank, users) for rank, (bad, users) in enumerate(told) if bad)
    raise WatchtowerError(
        f"{running.name}: the {what} is not finite at epoch {position.epoch}, step {position.step}, seed "
        f"{running.task.seed}, worker {rank} (its first users: {', '.join(map(str, users))}). Training stopped on all "
        f"workers; the last checkpoint is untouched. Look at these users' rows, or lower "
        f"{running.task.settings.rates_are}")


def _seed_step(seed: int, position: Position, workers: Workers) -> None:
    """Alike on all workers, as `trainer.dropout` wants it; a GPU's own generator, whose masks know no row, is not
    (nor used with train.dropout_by_row)."""
    def drawn(*more: int) -> int:
        numbers = [seed, position.epoch, position.step, *more]
        return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

    # torch.manual_seed seeds the devices that are not there, too, and keeps a stack trace for each: 3% of a short step.
    torch.default_generator.manual_seed(drawn())
    if workers.device.type == "cuda":
        torch.cuda.manual_seed(drawn(workers.rank))


@contextmanager
def _judging(engine: DenseEngine):
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()


def _follow_up(running: _Running, position: Position) -> Mapping[str, Any]:
    """Begins what follows the epoch that has just ended, from the towers as they are; the facts of it. Collective."""
    moved(f"epoch {position.epoch} of {running.name}", in_step=False)
    with _judging(running.engine):
        facts = running.task.after_epoch(running.forward, position)
    moved(f"what follows epoch {position.epoch} of {running.name}", in_step=False)
    running.begun += 1
    return facts


def _begin_again(running: _Running, position: Position) -> None:
    """What follows the last epoch, where the run ended before that was settled. Collective."""
    if running.begun == position.epoch:
        return
    if position.step == 0:  # the towers are still those of that epoch
        _follow_up(running, position)
        return
    running.workers.on_first(lambda: running.task.begin_again(running.pending))
    running.begun += 1


def _settle(running: _Running, count: int) -> float:
    """Waits for what follows the first `count` epochs and makes the results known to all workers; seconds of it."""
    task, began = running.task, time.perf_counter()

    def results() -> list[Result]:
        try:
            return task.results(count - running.resumed)
        except WatchtowerError:
            raise
        except Exception as failed:
            raise WatchtowerError(f"{running.name}: the {task.what_fails}: {failed!r}") from failed

    found = running.workers.on_first(results) or []
    found = running.workers.agree([result.as_json() for result in found])
    running.results = running.results[:running.resumed] + [task.result_type(**result) for result in found]
    return time.perf_counter() - began


def _save_amid(running: _Running, position: Position) -> None:
    """A checkpoint in the middle of an epoch. Training does not wait for what follows the epoch before: where that is
    under way, the checkpoint keeps what it is made of. Collective."""
    pending = running.task.pending() if running.workers.first else None
    is_pending = running.workers.agree(pending is not None)
    _settle(running, running.begun - is_pending)
    _save(running, position, pending=pending)


def _save(running: _Running, position: Position, pending: Pending | None) -> None:
    """Begins a checkpoint at this position, with the results that are settled and, on the first worker, what is pending
    of the epoch behind them. Collective."""
    task, epoch, step = running.task, position.epoch, position.global_step
    state = {"epoch": epoch, "step": position.step, "global_step": step, "model": task.model_name, "seed": task.seed,
             "fingerprint": task.fingerprint(),
             "trained_s": running.trained_s + time.perf_counter() - running.began,
             "pending": None if pending is None else dict(pending.facts),
             task.results_key: [result.as_json() for result in running.results]}
    also = [] if running.best is None else [running.best.step]
    if pending is not None:  # it may turn out the best one
        also.append(pending.facts["step"])
    moved(f"saving step {step} of {running.name}", in_step=False)
    running.saver.save(
        running.tables, running.engine, state, {} if pending is None else pending.arrays,
        also={task.folder / f"step-{kept}" for kept in also},
        told=lambda **seconds: running.write("checkpoint", model=running.name, epoch=epoch, step=step, **seconds))


def _out_of_patience(running: _Running, position: Position) -> bool:
    """Whether as many epochs as `train.patience` have gone by since the best one. The epoch that has just ended is
    never among them, so the answer does not depend on how fast its index was built."""
    results = running.results[:max(0, position.epoch - 1)]
    patience, best = running.config.train.patience, running.task.best(results)
    return patience is not None and best is not None and results[-1].epoch - best.epoch >= patience


class PartClock:
    """Where the time of a step goes, by this process's own clock: `loss_mean` is the wait for the slowest worker.

    On a GPU a part is the time that it takes to hand its kernels over; what they take shows at the next wait for the
    device, which is `loss_mean`. The wait for the tables' all-to-all (`all_to_all_s`, embeddings/exchange.py) is part
    of forward and backward.
    """

    def __init__(self) -> None:
        self._mark, self._seconds = time.perf_counter(), dict.fromkeys(STEP_PARTS, 0.0)

    def begin(self) -> None:
        """What passed since the last lap belongs to no part."""
        self._mark = time.perf_counter()

    def lap(self, part: str) -> None:
        """What passed since the last call belongs to `part`."""
        now = time.perf_counter()
        self._seconds[part] += now - self._mark
        self._mark = now

    def take(self, steps: int) -> dict[str, float]:
        """Seconds a step of every part, as `<part>_s`, since the last call."""
        found = {f"{part}_s": seconds / steps for part, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(STEP_PARTS, 0.0)
        return found


class StepLog:
    """One line a log step: where the run is, how well and how fast, on the first worker and on each."""

    def __init__(self, running: _Running, plan: Plan, position: Position, batches: Prefetched):
        self._write, self._name, self._every = running.write, running.name, running.config.train.log_every_steps
        self._epochs, self._total_steps = running.epochs, running.total_steps
        self._running = running
        self._plan, self._position, self._batches = plan, position, batches
        self._steps, self._losses = 0, 0.0
        self._began, self._waited = time.perf_counter(), 0.0
        exchange.take_waited_s()  # what followed the epoch before looked rows up, too

    def step(self, loss: float) -> None:
        """Call after each step, the position already moved on."""
        self._steps += 1
        self._losses += loss
        if self._position.step % self._every and self._position.step != self._plan.steps:
            return
        now = time.perf_counter()
        seconds = max(now - self._began, 1e-9)
        rows = min(self._steps * self._plan.batch_rows, self._plan.rows)
        running = self._running
        mine = {"rank": running.workers.rank, "node": socket.gethostname(), "memory_mib": memory_mib(),
                "wait_share": min(1.0, (self._batches.waited_s - self._waited) / seconds),
                **running.parts.take(self._steps), "all_to_all_s": exchange.take_waited_s() / self._steps}
        workers = running.workers.everybody(mine)
        self._write(
            "train_step", model=self._name, epoch=self._position.epoch + 1, epochs=self._epochs,
            step=self._position.global_step, steps=self._total_steps, loss=loss,
            mean_loss=self._losses / self._steps, learning_rate=running.engine.learning_rate,
            rows_per_s=rows / seconds, step_s=seconds / self._steps,
            **{name: value for name, value in mine.items() if name not in ("rank", "node")},
            eta_s=(self._total_steps - self._position.global_step) * seconds / self._steps, workers=workers)
        self._steps, self._losses, self._began, self._waited = 0, 0.0, now, self._batches.waited_s
