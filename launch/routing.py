"""The judgement of routing, spread over the shards of the sequences: every selector, router and control at once.

    fit      each shard's training requests, seen once by every selector that learns
    choose   routing.overlap where the config leaves it open, on the routers' validation requests
    judge    each shard's test requests under all selectors, budgets and seeds
    write    routing/<selector>.parquet, evaluation/routing/metrics.json

A task is a shard and the same plain function under either executor. Results come back in the order of the shards, a few
ahead at most, so they do not depend on how many workers there are; what this process keeps is one float a request and
measure (routing.test_requests bounds that).
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError, WatchtowerError
from configs.schema import Config
from embeddings.attempts import acts_for, publishing
from launch.nodes import at_work
from trainer.results import plain, unmet, write_pointer, write_whole
from trainer.routing_evaluation import (
    JOINT,
    VALIDATION,
    Judge,
    RouterScores,
    Run,
    ShardJudgement,
    Subject,
    chosen_overlap,
    judge_shard,
    training_part,
    validation_recall,
)
from trainer.routing_results import joined, routing_metrics
from trainer.selectors import POPULAR, SELECTORS, Selector
from trainer.triggers import request_hash
from trainer.watchdog import moved


class Executor(Protocol):
    """Who runs the tasks."""

    def each(self, task: Callable[[int], Any], shards: int) -> Iterator[Any]:
        """The task's result for shard 0, 1, ..., in that order."""


class SerialExecutor:
    """All in this process."""

    def each(self, task, shards):
        for number in range(shards):
            yield task(number)


class RayExecutor:
    """A Ray task a shard, on the cluster that ray.init has joined.

    Args:
        ahead: tasks at once, and results that wait for their turn, at most; None: as many as the cluster has CPUs for.
        cpus: that a task asks for.
    """

    def __init__(self, ahead: int | None = None, cpus: float = 1.0):
        self.ahead, self.cpus = ahead, cpus

    def each(self, task, shards):
        import ray

        attempt = acts_for()

        def judge(number: int) -> Any:
            with at_work(attempt):
                return task(number)

        remote = ray.remote(num_cpus=self.cpus, max_retries=2)(judge)
        waiting: deque = deque()
        ahead = self.ahead or max(1, int(ray.cluster_resources().get("CPU", 1) / self.cpus))
        try:
            for number in range(shards):
                if len(waiting) == ahead:
                    yield ray.get(waiting.popleft())
                    moved("a shard of the routing")
                waiting.append(remote.remote(number))
            while waiting:
                yield ray.get(waiting.popleft())
                moved("a shard of the routing")
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, WatchtowerError) else error) from None


def evaluate_routing(config: Config, run_dir: Path, executor: Executor | None = None) -> dict[str, Any]:
    """Judge every selector, every trained router and the controls on the test requests.

    Args:
        executor: None: Ray.

    Returns:
        rows: judged test requests; absent: what these logs cannot have and why.

    Raises:
        InputError: no test requests, or no channels or router scores in the run folder.
    """
    run_dir = Path(run_dir)
    executor = executor or RayExecutor(config.ray.ingest_tasks, config.ray.routing_cpus)
    run = Run(config, run_dir)
    selectors, absent = make_selectors(run)
    overlap = choose_overlap(run, executor)
    routers, missing = open_routers(run, overlap["value"])
    absent |= missing
    _fit(run, selectors, executor)
    subjects = [Subject(s.name, s.seed, selector=s) for s in selectors] + routers + joint_subjects(run, routers)
    judged_shards, limit = [], _hash_limit(run, executor)
    with PickFiles(run_dir / "routing", config) as files:
        for shard in executor.each(lambda number: judge_shard(Run(config, run_dir), number, subjects, limit),
                                   run.store.shards):
            files.add(shard)
            judged_shards.append(replace(shard, picks={}))
    names = Judge(config, tuple(run.snapshots.names)).names
    if not sum(len(shard.user_id_R) for shard in judged_shards):
        raise InputError("there is no test request: look at replay.requests (test_cuts, test_min_triggers, "
                         "test_min_future) and at the test users (split.test_users, routing.test_users)")
    judged = joined(names, judged_shards)
    order = [name for name in ("recent", *config.routing.selectors, *(s.name for s in subjects), *absent)]
    metrics = routing_metrics(judged, config, run.snapshots.names, absent, list(dict.fromkeys(order)))
    metrics["overlap"] = overlap
    metrics["absent_channels"] = {name: {"absent": reason} for name, reason in run.absent_channels.items()}
    write_whole(run_dir / "evaluation" / "routing" / "metrics.json", _text(metrics))
    if unmet({"routing": metrics}, config.gates.at_least):
        print("routing/serving.json stays as it is: a quality gate (gates.at_least) fell short", flush=True)
    else:
        _say_what_serves(run, routers, overlap["value"])
    return {"rows": len(judged.user_id_R), "absent": absent}


def _say_what_serves(run: Run, routers: Sequence[Subject], overlap: float) -> None:
    """routing/serving.json: the selector that serves, of which router and seed, with what of an overlap."""
    first = run.config.router.models[0].name
    if any(s.name == first for s in routers):
        write_pointer(run.folder / "routing" / "serving.json", plain({
            "selector": first + (JOINT if run.config.routing.assignment == "joint" else ""), "router": first,
            "seed": run.config.seeds[0], "assignment": run.config.routing.assignment, "overlap": overlap}))


def make_selectors(run: Run) -> tuple[list[Selector], dict[str, str]]:
    """The selectors of the config, `recent` with them in any case, and which of them these logs cannot have, and why.
    """
    config, made, absent = run.config, [], {}
    for name in dict.fromkeys(["recent", *config.routing.selectors]):
        if name == POPULAR:
            continue
        reason = SELECTORS[name].absent(run.store.catalogue)
        if reason is not None:
            absent[name] = reason
            continue
        seeds = config.seeds if SELECTORS[name].by_seed else [0]
        made += [SELECTORS[name](config, run.store.vocabulary.rows, seed) for seed in seeds]
    return made, absent


def choose_overlap(run: Run, executor: Executor) -> dict[str, Any]:
    """What of an overlap all routers' independent picks have, and where it is from: the config, or the first router's
    validation requests, all seeds. No test request is looked at.

    Returns:
        value, from; and what trainer.routing_evaluation.chosen_overlap says, where it was chosen.

    Raises:
        InputError: there are no scores of the validation requests.
    """
    config, folder, first = run.config, run.folder, run.config.router.models[0]
    if config.routing.overlap is not None:
        return {"value": config.routing.overlap, "from": "config"}
    if not (folder / "evaluation" / "routing" / first.name).is_dir():
        return {"value": 0.0, "from": f"nothing: {first.name} was not trained"}
    scores = [RouterScores.open(run, first.name, seed, first.diversity, VALIDATION) for seed in config.seeds]
    parts = executor.each(lambda number: validation_recall(Run(config, folder), number, scores), run.store.shards)
    recall, users = zip(*parts, strict=True)
    return {"from": "validation requests", **chosen_overlap(np.concatenate(recall, axis=1), np.concatenate(users))}


def open_routers(run: Run, overlap: float = 0.0) -> tuple[list[Subject], dict[str, str]]:
    """The routers' scores by model and seed; models without any scores are absent."""
    found, absent, config = [], {}, run.config
    for model in config.router.models:
        if not (run.folder / "evaluation" / "routing" / model.name).is_dir():
            absent[model.name] = "not trained: there are no scores of it in the run folder"
            continue
        found += [Subject(model.name, seed, scores=RouterScores.open(run, model.name, seed, model.diversity),
                          overlap=overlap) for seed in config.seeds]
    return found, absent


def joint_subjects(run: Run, routers: Sequence[Subject]) -> list[Subject]:
    """The first model's joint assignment, for each of its seeds."""
    first = run.config.router.models[0].name
    return [Subject(first + JOINT, s.seed, scores=s.scores, joint=True) for s in routers if s.name == first]


def _fit(run: Run, selectors: Sequence[Selector], executor: Executor) -> None:
    """Show every training request to the selectors that learn."""
    config, folder = run.config, run.folder
    learning = [s for s in selectors if s.learns]
    for parts in executor.each(lambda number: training_part(Run(config, folder), number), run.store.shards):
        for part in parts:
            for selector in learning:
                selector.learn(part)
    for selector in learning:
        selector.ready()


def _hash_limit(run: Run, executor: Executor) -> int | None:
    """The hash of the last request that is judged, where routing.test_requests takes fewer than there are."""
    most, config, folder = run.config.routing.test_requests, run.config, run.folder
    if most is None:
        return None
    found = np.concatenate(list(executor.each(
        lambda number: request_hash(Run(config, folder).requests(number, "test")), run.store.shards)))
    return int(np.sort(found)[most - 1]) if len(found) > most else None


class PickFiles:
    """routing/<selector>.parquet of every selector, written shard by shard beside their places and renamed at the end.

    The picks are those under the largest budget; a smaller budget's are the first ranks of these (the joint assignment
    has an order of its own for each budget). The file's metadata says budget and seed.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder, self.budget = folder, max(config.routing.budgets)
        self.seed = config.seeds[0]
        self.writers: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> PickFiles:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, shard: ShardJudgement) -> None:
        for name, rows in shard.picks.items():
            rows = _plain_columns(rows).replace_schema_metadata(
                {"watchtower.budget": str(self.budget), "watchtower.seed": str(self.seed)})
            if name not in self.writers:
                self.writers[name] = pq.ParquetWriter(self._beside(name), rows.schema)
            self.writers[name].write_table(rows)

    def _beside(self, name: str) -> Path:
        return self.folder / f".{name}.parquet.tmp"

    def __exit__(self, failed, *_) -> None:
        try:
            for writer in self.writers.values():
                with contextlib.nullcontext() if failed is None else contextlib.suppress(OSError):
                    writer.close()  # on a disk that is full it fails again
            if failed is None:
                for name in self.writers:
                    with publishing():
                        self._beside(name).replace(self.folder / f"{name}.parquet")
                for path in self.folder.glob("*.parquet"):  # of selectors that are not judged any more
                    if path.stem not in self.writers:
                        path.unlink()
        finally:
            for left in self.folder.glob(".*.parquet.tmp"):
                left.unlink(missing_ok=True)


def _plain_columns(rows: pa.Table) -> pa.Table:
    """With the channel as a string, which Parquet keeps as a dictionary by itself."""
    at = rows.column_names.index("channel")
    return rows.set_column(at, "channel", rows["channel"].cast(pa.string()))


def _text(metrics: dict[str, Any]) -> str:
    return json.dumps(plain(metrics), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
