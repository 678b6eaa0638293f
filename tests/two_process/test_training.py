"""Training on real processes: the loop with its checkpoints, indexes and evaluation, broken off and taken up again.

Three spawns (2, 1 and 4 ranks) run all cases; the tests then look at what they brought back.
"""

import errno
import hashlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spawn import run_ranks

from configs.schema import Config, ModelConfig

T0 = 1_767_225_600_000  # midnight, the first day of the synthetic world
DAY_MS = 86_400_000
TRANSFORMER = ModelConfig(name="dt", tower="decision_transformer", condition="next")
MLP = ModelConfig(name="mlp", tower="dnn", condition="to_go", loss_positions="last")
PLAIN = ModelConfig(name="mlp_unconditioned", tower="dnn", condition="none", bayes=True)
STOP_MID = 20  # a checkpoint in the middle of the second epoch


def config_of(case: str, **train) -> Config:
    tower = {"dim": 8, "history": 6, "layers": 1, "heads": 2, "hidden": 16, "dropout": 0.1}
    return Config(
        data={"shards": 4}, split={"validation_days": 1, "test_days": 1, **train.pop("split", {})},
        crm={"models": [TRANSFORMER, MLP, PLAIN], "tower": tower, "tables": {"dim": 8}},
        train={"batch_rows": 24, "epochs": 3, "learning_rate": 2e-2, "warmup_steps": 3, "checkpoint_every_steps": 4,
               "keep_checkpoints": 2, "log_every_steps": 1, "shuffle_shards": 2, **train},
        index={"threads": 1}, evaluate={"at": [5, 20], "queries": 60, "curve_queries": 30, "validation_queries": 40})


# ------------------------------------------------------------------------------------------------------- the worlds

def write_logs(folder: Path, columns: dict) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "logs.parquet")


def ingested(folder: Path, logs: Path, items: Path | None) -> Path:
    from launch.ingest import SerialExecutor, ingest

    data = config_of("").data.model_copy(update={"logs": str(logs), "items": None if items is None else str(items)})
    ingest(data, folder, SerialExecutor())
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """`world`: 70 users; `cheated`: the same but for all that happens from the second day on; `three`: 3 users."""
    from trainer.world import WorldSpec, write_world

    root = tmp_path_factory.mktemp("training")
    write_world(root / "synth", WorldSpec(users=70, items=60, views_per_user=40, days=6, content_dim=4, seed=3),
                processes=1)
    ingested(root / "world", root / "synth" / "logs", root / "synth" / "items.parquet")
    table = pa.concat_tables(pq.read_table(path) for path in sorted((root / "synth" / "logs").glob("*.parquet")))
    late = table["timestamp_ms"].to_numpy() >= T0 + DAY_MS
    item, watch = table["item_id"].to_numpy().copy(), table["watch_time_s"].to_numpy(zero_copy_only=False).copy()
    item[late] = np.sort(item)[len(item) // 2]  # one item is all that anybody ever sees again
    watch[late] = 100.0
    for name, values in (("item_id", item), ("watch_time_s", watch)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    write_logs(root / "cheat-logs", {name: table[name] for name in ("user_id", "item_id", "timestamp_ms",
                                                                    "watch_time_s")})
    plain = pa.concat_tables(pq.read_table(path) for path in sorted((root / "synth" / "logs").glob("*.parquet")))
    write_logs(root / "same-logs", {name: plain[name] for name in ("user_id", "item_id", "timestamp_ms",
                                                                   "watch_time_s")})
    for name in ("cheat", "same"):
        ingested(root / name, root / f"{name}-logs", root / "synth" / "items.parquet")
    rng = np.random.default_rng(0)
    few = {"user_id": np.repeat([1, 2, 3], 8), "item_id": rng.integers(1, 9, 24),
           "timestamp_ms": T0 + np.tile(np.arange(8), 3) * 12 * 3_600_000 + np.repeat([0, 1, 2], 8),
           "watch_time_s": rng.exponential(40, 24).astype(np.float32) + 3}
    write_logs(root / "three-logs", few)
    ingested(root / "three", root / "three-logs", None)
    return root


# -------------------------------------------------------------------------------------------- what runs on the ranks

class Stopped(Exception):
    """A run that is broken off."""


class Run:
    """A run folder beside a world, and what happened in it."""

    def __init__(self, root: Path, world: str, case: str, rank: int, workers: int):
        import torch
        import torch.distributed as dist

        from trainer.workers import Workers

        self.folder = root / "runs" / case
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "sequences").exists():
                (self.folder / "sequences").symlink_to(root / world / "sequences")
        dist.barrier()
        self.workers = Workers(rank, workers, torch.device("cpu"))
        self.events = []

    def data(self, config):
        from trainer.crm_data import CrmData

        return CrmData(config, self.folder)

    def train(self, config, model, stop=None, data=None, seed=0):
        """Trains, or is stopped by the callable `stop(event, fields)` on every worker; returns what came of it."""
        from trainer.crm_task import CrmTask
        from trainer.loop import train

        self.events = []

        def write(event, **fields):
            self.events.append((event, fields))
            if stop is not None and stop(event, fields):
                raise Stopped

        try:
            return train(CrmTask(data or self.data(config), model, seed), self.workers, write)
        except Stopped:
            return None

    def told(self):
        return {"losses": {f["step"]: f["loss"] for e, f in self.events if e == "train_step"},
                "saved": [f for e, f in self.events if e == "checkpoint"],
                "resumed": [f["global_step"] for e, f in self.events if e == "resume"],
                "warnings": [f["message"] for e, f in self.events if e == "warning"],
                "indexes": self.indexes(), "checkpoints": self.checkpoints()}

    def indexes(self):
        """Bytes of every published index, by model and watermark-step."""
        return {f"{p.parents[2].name}/{p.parent.name}": p.read_bytes()
                for p in sorted(self.folder.glob("indexes/*/seed=*/*/index.faiss"))}

    def checkpoints(self):
        return sorted(p.name for p in self.folder.glob("checkpoints/*/seed=*/step-*"))


def after_step(step):
    """Before the save that falls due there, behind the one of the step before."""
    return lambda event, fields: event == "train_step" and fields["step"] == step


def stopped_with_a_pending_index(run, config, built_at, stop_at, **named):
    """Trains until `stop_at`; the index of the epoch that ended at step `built_at` never comes to an end."""
    from trainer import rebuild

    publish, over = rebuild.publish_index, threading.Event()

    def held(*args, **named):
        if named["step"] == built_at:
            over.wait(200)
            raise OSError("killed")
        return publish(*args, **named)

    def stop(event, fields):
        if after_step(stop_at)(event, fields):
            over.set()
        return over.is_set()

    rebuild.publish_index = held
    try:
        run.train(config, TRANSFORMER, stop, **named)
    finally:
        over.set()
        rebuild.publish_index = publish


def two_workers(rank, workers, root):
    told = {}
    for case in (whole, broken_off, while_an_index_is_built, without_its_index, failing_saves, damaged, portable,
                 not_finite, few_rows, daily, evaluated):
        told |= case(root, rank, workers)
    return told


def whole(root, rank, workers):
    run = Run(root, "world", "whole", rank, workers)
    data = run.data(config_of("whole"))
    trained = run.train(config_of("whole"), TRANSFORMER, data=data)
    plans = [data.plan(TRANSFORMER, 0, epoch, data.slices[0]) for epoch in range(3)]
    return {"whole": run.told() | {
        "trained": {"best": trained.best.as_json(), "checkpoint": trained.checkpoint, "windows": trained.rows,
                    "indexes": [index.as_json() for index in trained.results]},
        "steps": [plan.steps for plan in plans], "watermark": data.times.validation_start_ms,
        "events": [event for event, _ in run.events]}}


def broken_off(root, rank, workers):
    """Directly before and behind a checkpoint of the second epoch."""
    told = {}
    for case, stop in (("before-it", STOP_MID), ("behind-it", STOP_MID + 1)):
        run = Run(root, "world", case, rank, workers)
        run.train(config_of(case), TRANSFORMER, after_step(stop))
        first = run.told()
        run.train(config_of(case), TRANSFORMER)
        told[case] = {"first": first, "second": run.told()}
    run.train(config_of(case), TRANSFORMER)  # once more, when all is done
    told["done"] = run.told()
    return told


def while_an_index_is_built(root, rank, workers):
    """The index of the first epoch is being built when the run ends in the second one, behind two checkpoints."""
    run = Run(root, "world", "pending", rank, workers)
    config = config_of("pending", keep_checkpoints=1)
    data = run.data(config)
    ends = data.plan(TRANSFORMER, 0, 0, data.slices[0]).steps
    stopped_with_a_pending_index(run, config, ends, STOP_MID + 1, data=data)
    first = run.told() | {"state": json.loads(
        (run.folder / "checkpoints/dt/seed=0" / f"step-{STOP_MID}" / "state.json").read_text())}
    trained = run.train(config_of("pending"), TRANSFORMER)
    return {"pending": {"first": first, "second": run.told() | {"best": trained.best.as_json(), "indexes of": [
        index.as_json() for index in trained.results]}}}


def failing_saves(root, rank, workers):
    """The second save fails, on one worker or the other; the first one takes until training is two steps ahead."""
    from configs.errors import WatchtowerError
    from trainer import checkpoint

    told, publish, write_state = {}, checkpoint.publish_from, checkpoint.write_state
    for case, bad in (("save-fails-first", 0), ("save-fails-last", 1)):
        run, ahead = Run(root, "world", case, rank, workers), threading.Event()

        def published(writing, folder, *args, ahead=ahead, bad=bad, **named):
            assert folder.name != "step-4" or ahead.wait(200)
            if folder.name == "step-8" and bad == 0:
                raise OSError("the machine went away")
            return publish(writing, folder, *args, **named)

        def written(state, folder, rank, bad=bad):
            if folder.name.startswith(".step-8.") and rank == bad == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            write_state(state, folder, rank)

        def stop(event, fields, ahead=ahead):
            if after_step(6)(event, fields):
                ahead.set()

        checkpoint.publish_from, checkpoint.write_state, error = published, written, None
        try:
            run.train(config_of(case), TRANSFORMER, stop)
        except WatchtowerError as failed:
            error = (type(failed).__name__, str(failed))
        finally:
            checkpoint.publish_from, checkpoint.write_state = publish, write_state
        told[case] = run.told() | {"error": error, "left": sorted(
            path.name for path in (run.folder / "checkpoints/dt/seed=0").iterdir())}
    run.workers.barrier()
    run.train(config_of(case), TRANSFORMER)
    return told | {"save-again": run.told()}


def without_its_index(root, rank, workers):
    """The checkpoint of an epoch is there, its index is not: the machine's fault, which all workers hear of."""
    from configs.errors import WatchtowerError
    from trainer import rebuild

    run = Run(root, "world", "no-index", rank, workers)
    publish = rebuild.publish_index

    def dies(*args, **named):
        raise OSError("the machine went away")

    rebuild.publish_index, message = dies, None
    try:
        run.train(config_of("no-index", checkpoint_every_steps=None), TRANSFORMER)
    except WatchtowerError as error:
        message = str(error)
    finally:
        rebuild.publish_index = publish
    first = run.told()
    run.train(config_of("no-index"), TRANSFORMER)
    return {"no-index": {"first": first, "message": message, "second": run.told()}}


def damaged(root, rank, workers):
    run = Run(root, "world", "damaged", rank, workers)
    run.train(config_of("damaged"), TRANSFORMER, after_step(STOP_MID + 1))
    first = run.told()
    if rank == 0:
        victim = max((run.folder / "checkpoints/dt/seed=0" / f"step-{STOP_MID}").glob("*.safetensors"))
        content = bytearray(victim.read_bytes())
        content[-3] ^= 1
        victim.write_bytes(content)
    run.train(config_of("damaged"), TRANSFORMER)
    return {"damaged": {"first": first, "second": run.told()}}


def portable(root, rank, workers):
    """A step does not know the number of workers, what it drops out neither."""
    told = {}
    for model in (TRANSFORMER, MLP):
        run = Run(root, "world", f"two-{model.name}", rank, workers)
        run.train(config_of("two"), model)
        told[run.folder.name] = run.told()
        run = Run(root, "world", f"moved-{model.name}", rank, workers)
        run.train(config_of("two"), model, after_step(STOP_MID + 1))
        if rank == 0:
            shutil.copytree(run.folder, root / "runs" / f"spread-{model.name}", symlinks=True)
        run.workers.barrier()
        told[f"loaded-{model.name}"] = loaded(run, model)
    return told


def loaded(run, model):
    """What the newest checkpoint gives here: a digest of every parameter and moment, and the rows of the windows that
    this worker still trains on in that epoch."""
    from embeddings.tables import gather_full
    from trainer import loop
    from trainer.crm_task import CrmTask
    from trainer.engine import gather_dense

    data = run.data(config_of("two"))
    task = CrmTask(data, model, 0)
    running, position = loop._start(task, task.plans(), run.workers, silent)
    tensors, steps = gather_dense(running.engine)
    for kind in ("weight", "momentum"):
        tensors |= {f"{name}.{kind}": tensor for name, tensor in gather_full(running.tables, kind).items()}
    running.engine.close()
    rows = [[(int(begin), int(end)) for _, windows in batch.parts
             for begin, end in zip(windows.begin_W, windows.end_W, strict=True)]
            for batch in task.plans()[position.epoch].batches(run.workers.rank, run.workers.count, position.step)]
    return {"step": (position.epoch, position.step, position.global_step, steps), "rows": rows, "tensors": {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}}


def not_finite(root, rank, workers):
    """A content vector that is not finite, and a gradient: both strike behind a checkpoint, on all workers."""
    from configs.errors import WatchtowerError

    told = {}
    for case in ("content", "gradient"):
        run = Run(root, "world", f"nan-{case}", rank, workers)
        config = config_of(case)
        run.train(config, MLP, after_step(5))
        data, heal = run.data(config), lambda: None
        before = {p.name: p.read_bytes() for p in sorted(run.folder.glob("checkpoints/*/seed=0/step-4/*"))}
        if case == "content":
            data.features.content_NC = np.full_like(data.features.content_NC, np.nan)
        else:
            heal = poisoned()
        try:
            run.train(config, MLP, data=data)
            message = None
        except WatchtowerError as error:
            message = str(error)
        heal()
        after = {p.name: p.read_bytes() for p in sorted(run.folder.glob("checkpoints/*/seed=0/step-4/*"))}
        told[f"nan-{case}"] = run.told() | {"message": message, "untouched": before == after and len(before) > 3,
                                            "users": [int(u) for s in range(4) for u in data.loader()(s).user_id_U]}
    return told


def poisoned():
    """From now on the loss is finite and its gradient is not; returns what takes that back."""
    import torch

    from trainer.crm import CrmModel

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    loss = CrmModel.loss

    def poisonous(self, batch, tables):
        value, extras = loss(self, batch, tables)
        return Poison.apply(value), extras

    CrmModel.loss = poisonous
    return lambda: setattr(CrmModel, "loss", loss)


def few_rows(root, rank, workers):
    """Three windows: over two workers one has one row less, or none."""
    told = {}
    for rows in (1, 2, 3):
        run = Run(root, "three", f"rows-{rows}-over-{workers}", rank, workers)
        # The config is that of one worker, so that 1 and 3 rows are allowed; there are two all the same.
        config = config_of("three", batch_rows=rows, workers=1)
        data = run.data(config)
        run.train(config, TRANSFORMER, data=data)
        plan = data.plan(TRANSFORMER, 0, 0, data.slices[0])
        mine = [sum(len(w) for _, w in batch.parts) for batch in plan.batches(rank, workers)]
        told[f"rows-{rows}"] = run.told() | {"plan": (plan.rows, plan.steps), "mine": mine}
    return told


def daily(root, rank, workers):
    told = {}
    for world in ("same", "cheat"):
        run = Run(root, world, f"daily-{world}", rank, workers)
        config = config_of("daily", slices="daily", epochs=2, decay="none")
        data = run.data(config)
        run.train(config, TRANSFORMER, data=data)
        told[f"daily-{world}"] = run.told() | {"ends": [end for _, end in data.slices]}
    # In the middle of the second pass over the second slice, with the index of the first pass under way.
    run = Run(root, "same", "daily-broken", rank, workers)
    config = config_of("daily", slices="daily", epochs=2, decay="none", checkpoint_every_steps=1)
    data = run.data(config)
    ends = [sum(data.plan(TRANSFORMER, 0, epoch, data.slices[epoch // 2]).steps for epoch in range(count))
            for count in (3, 4)]
    stopped_with_a_pending_index(run, config, ends[0], ends[0] + 3, data=data)
    first = run.told()
    run.train(config, TRANSFORMER)
    return told | {"daily-broken": {"first": first, "second": run.told(), "ends": ends}}


def silent(event, **fields):
    pass


def evaluated(root, rank, workers):
    from trainer.evaluate import evaluate_model, evaluate_popular

    run = Run(root, "world", "evaluated", rank, workers)
    config = config_of("evaluated", epochs=1)
    data = run.data(config)
    evaluate_popular(data, run.workers, silent, {"judged": "x"})
    for model in (TRANSFORMER, PLAIN):
        evaluate_model(data, model, run.train(config, model, data=data), run.workers, silent, {"judged": "x"})
    # Nobody to judge: the users who are held out have no view.
    nobody = root / "nobody.parquet"
    if rank == 0:
        pq.write_table(pa.table({"user_id": np.array([-77])}), nobody)
    empty = Run(root, "world", "nobody", rank, workers)
    config = config_of("nobody", epochs=1, split={"test_users": str(nobody)})
    unjudged = empty.data(config)
    evaluate_model(unjudged, PLAIN, empty.train(config, PLAIN, data=unjudged), empty.workers, silent, {})
    told = {"evaluated": {"folder": str(run.folder), "views_N": data.statistics.views_N,
                          "target_Q": data.test.target_row_Q(), "time_Q": data.test.time_ms_Q,
                          "begin_ms": data.times.test_start_ms, "end_ms": data.times.test_end_ms},
            "nobody": {"requests": (len(unjudged.test), len(unjudged.validation)), "folder": str(empty.folder)}}
    return told | broken_evaluation(root, rank, workers)


def one_worker(rank, workers, root):
    told = {}
    for model in (TRANSFORMER, MLP):
        run = Run(root, "world", f"moved-{model.name}", rank, workers)
        told[f"loaded-{model.name}"] = loaded(run, model)
        run.train(config_of("two"), model)
        told[run.folder.name] = run.told()
    return told | few_rows(root, rank, workers)


def four_workers(rank, workers, root):
    run = Run(root, "world", "spread-dt", rank, workers)
    told = {"loaded-dt": loaded(run, TRANSFORMER)}
    run.train(config_of("two"), TRANSFORMER)
    return told | {"spread-dt": run.told()}


def broken_evaluation(root, rank, workers):
    """A number comes through the published files: where they are damaged there is none."""
    from trainer.evaluate import evaluate_model

    run = Run(root, "world", "damaged-files", rank, workers)
    config = config_of("damaged-files", epochs=1)
    data = run.data(config)
    trained = run.train(config, TRANSFORMER, data=data)
    told = {}
    for case in ("index", "checkpoint"):
        folder = run.folder / trained.best.folder if case == "index" else Path(trained.checkpoint)
        victim = max(p for p in folder.iterdir() if p.suffix in (".faiss", ".safetensors"))
        if rank == 0:
            content = bytearray(victim.read_bytes())
            content[-1] ^= 1
            victim.write_bytes(content)
        run.workers.barrier()
        try:
            evaluate_model(data, TRANSFORMER, trained, run.workers, silent, {})
        except Exception as error:
            told[f"damaged {case}"] = (type(error).__name__, str(error), victim.name)
    return told


@pytest.fixture(scope="module")
def ranks(worlds):
    """What the two workers brought back; every case ran once."""
    return run_ranks(2, two_workers, worlds, timeout_s=400)


@pytest.fixture(scope="module")
def two(ranks):
    return ranks[0]


@pytest.fixture(scope="module")
def one(worlds, ranks):
    return run_ranks(1, one_worker, worlds, timeout_s=200)[0]


@pytest.fixture(scope="module")
def four(worlds, ranks):
    return run_ranks(4, four_workers, worlds, timeout_s=200)


# ------------------------------------------------------------------------------------------------- the unbroken run

def mean(values):
    return sum(values) / len(values)


def test_the_loss_falls_and_every_epoch_has_its_index(two, ranks):
    told = two["whole"]
    assert len(set(told["steps"])) == 1 and told["steps"][0] < STOP_MID < 2 * told["steps"][0]
    losses = [told["losses"][step] for step in sorted(told["losses"])]
    per = told["steps"][0]
    assert len(losses) == sum(told["steps"]) and mean(losses[-per:]) < mean(losses[:per]) - 0.1
    assert ranks[1]["whole"]["losses"] == told["losses"]  # the mean of all workers, on all
    assert sorted(told["indexes"]) == sorted(f"dt/{told['watermark']}-{per * e}" for e in (1, 2, 3))
    assert [index["step"] for index in told["trained"]["indexes"]] == [per, 2 * per, 3 * per]
    assert told["trained"]["indexes"] == ranks[1]["whole"]["trained"]["indexes"]
    assert [e for e in told["events"] if e in ("vectors", "index", "epoch")].count("index") == 3


def test_the_best_checkpoint_is_kept_beside_the_newest(two):
    trained = two["whole"]["trained"]
    scores = [max(index["validation"].values()) for index in trained["indexes"]]
    assert max(trained["best"]["validation"].values()) == max(scores)
    assert Path(trained["checkpoint"]).name == f"step-{trained['best']['step']}" in two["whole"]["checkpoints"]
    assert len(two["whole"]["checkpoints"]) <= 3


# ------------------------------------------------------------------------------------------------------ broken off

@pytest.mark.parametrize("case", ["before-it", "behind-it"])
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(two, case):
    first, second, whole = two[case]["first"], two[case]["second"], two["whole"]
    assert max(first["losses"]) == (STOP_MID if case == "before-it" else STOP_MID + 1)
    resumed = STOP_MID - 4 if case == "before-it" else STOP_MID
    assert second["resumed"] == [resumed] and min(second["losses"]) == resumed + 1
    assert first["losses"] | second["losses"] == whole["losses"]  # to the last bit
    assert all(first["losses"][s] == whole["losses"][s] for s in first["losses"])
    assert second["indexes"] == whole["indexes"] and second["checkpoints"] == whole["checkpoints"]


def test_a_run_that_is_done_trains_no_step_more(two):
    assert two["done"]["losses"] == {} and two["done"]["indexes"] == two["whole"]["indexes"]


def judged(indexes):
    return [{name: value for name, value in index.items() if name != "build_s"} for index in indexes]


def test_an_index_that_was_being_built_is_the_same_after_all(two):
    """Its checkpoints name it, hold what it is made of, and keep the checkpoint of its epoch, which may be the best."""
    first, second, whole = two["pending"]["first"], two["pending"]["second"], two["whole"]
    ends = whole["steps"][0]
    assert first["indexes"] == {} and first["checkpoints"] == [f"step-{ends}", f"step-{STOP_MID}"]
    assert first["state"]["pending"] == {"epoch": 1, "step": ends, "watermark_ms": whole["watermark"]}
    assert first["state"]["indexes"] == [] and second["resumed"] == [STOP_MID]
    assert first["losses"] | second["losses"] == whole["losses"] and second["checkpoints"] == whole["checkpoints"]
    assert second["indexes"] == whole["indexes"]  # to the last bit
    assert judged(second["indexes of"]) == judged(whole["trained"]["indexes"])
    assert judged([second["best"]]) == judged([whole["trained"]["best"]])


def test_training_goes_on_while_a_checkpoint_is_written(two):
    """The first save of both runs ended only behind the sixth step, and says what it took."""
    saved = two["save-fails-first"]["saved"]
    assert [f["step"] for f in saved] == [4] and saved[0].keys() >= {"copy_s", "waited_s", "write_s"}
    steps = [f["step"] for f in two["whole"]["saved"]]
    assert steps == sorted({*range(4, sum(two["whole"]["steps"]), 4), *np.cumsum(two["whole"]["steps"]).tolist()})


@pytest.mark.parametrize("case, kind, what", [
    ("save-fails-first", "WatchtowerError", "could not be written (OSError('the machine went away'))"),
    ("save-fails-last", "InputError", "the disk is full")])
def test_a_save_that_fails_stops_all_workers_with_one_message(ranks, case, kind, what):
    errors = {told[case]["error"] for told in ranks}
    assert len(errors) == 1
    (found, message), = errors
    assert found == kind and what in message and "step-8" in message
    assert ranks[0][case]["left"] == ["step-4"] and max(ranks[0][case]["losses"]) < STOP_MID


def test_after_a_save_that_failed_the_run_goes_on(two):
    first, second = two["save-fails-last"], two["save-again"]
    assert second["resumed"] == [4] and first["losses"] | second["losses"] == two["whole"]["losses"]
    assert second["indexes"] == two["whole"]["indexes"] and second["checkpoints"] == two["whole"]["checkpoints"]


def test_an_epoch_whose_index_is_missing_gets_it(two, ranks):
    first, second, whole = two["no-index"]["first"], two["no-index"]["second"], two["whole"]
    assert first["indexes"] == {} and first["checkpoints"] == [f"step-{whole['steps'][0]}"]
    assert {told["no-index"]["message"] for told in ranks} == {
        "dt/seed=0: the index could not be rebuilt: OSError('the machine went away')"}
    assert second["resumed"] == [whole["steps"][0]]
    assert first["losses"] | second["losses"] == whole["losses"]
    assert second["indexes"] == whole["indexes"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(two):
    first, second, whole = two["damaged"]["first"], two["damaged"]["second"], two["whole"]
    assert f"step-{STOP_MID}" in first["checkpoints"]
    assert second["resumed"] and second["resumed"][0] < STOP_MID
    assert len(second["warnings"]) == 1 and f"step-{STOP_MID} is damaged" in second["warnings"][0]
    assert ".safetensors" in second["warnings"][0]
    assert second["losses"] == {s: loss for s, loss in whole["losses"].items() if s > second["resumed"][0]}
    assert second["indexes"] == whole["indexes"]


@pytest.mark.parametrize("model", [TRANSFORMER.name, MLP.name])
def test_a_checkpoint_of_two_workers_goes_on_with_one(one, two, model):
    moved, whole = one[f"moved-{model}"], two[f"two-{model}"]
    assert moved["resumed"] == [STOP_MID] and len(moved["losses"]) == len(whole["losses"]) - STOP_MID
    for step, loss in moved["losses"].items():
        assert loss == pytest.approx(whole["losses"][step], abs=1e-5)
    assert moved["indexes"].keys() == whole["indexes"].keys()


def test_a_checkpoint_of_two_workers_goes_on_with_four(four, two):
    spread, whole = four[0]["spread-dt"], two["two-dt"]
    assert spread["resumed"] == [STOP_MID] and len(spread["losses"]) == len(whole["losses"]) - STOP_MID
    assert spread["losses"] == pytest.approx({s: whole["losses"][s] for s in spread["losses"]}, abs=1e-5)
    assert spread["indexes"].keys() == whole["indexes"].keys()


def test_other_numbers_of_workers_load_the_same_and_share_the_rest_of_the_epoch(ranks, one, four):
    def windows(told):
        return [sorted(sum(step, [])) for step in zip(*(worker["loaded-dt"]["rows"] for worker in told), strict=True)]

    saved = ranks[0]["loaded-dt"]
    assert saved["step"][2] == saved["step"][3] == STOP_MID and len(saved["tensors"]) > 20
    assert len({name.split("/")[0] for name in saved["tensors"] if "/" in name}) >= 3  # parameters and both moments
    for told in ([one], four):
        assert told[0]["loaded-dt"]["tensors"] == saved["tensors"]
        assert told[0]["loaded-dt"]["step"] == saved["step"]
        assert windows(told) == windows(ranks)
    assert {len(step) for step in windows(ranks)[:-1]} == {24}


# ------------------------------------------------------------------------------------------------------- not finite

@pytest.mark.parametrize("case, what", [("content", "loss"), ("gradient", "gradient of the towers")])
def test_a_number_that_is_not_finite_stops_all_workers_and_names_the_batch(ranks, case, what):
    messages = {told[f"nan-{case}"]["message"] for told in ranks}
    assert len(messages) == 1  # both stopped, with the same words
    (message,) = messages
    assert message.startswith(f"mlp/seed=0: the {what} is not finite at epoch 0, step 4, seed 0, worker ")
    users = message.split("its first users: ")[1].split(")")[0].split(", ")
    assert users and {int(user) for user in users} <= set(ranks[0][f"nan-{case}"]["users"])
    assert all(told[f"nan-{case}"]["untouched"] for told in ranks)


# --------------------------------------------------------------------------------- whose checkpoint a checkpoint is

def test_a_run_knows_its_checkpoints_wherever_it_goes_on(tmp_path):
    from types import SimpleNamespace

    from trainer.crm_data import CrmData
    from trainer.crm_task import fingerprint

    def told(model=TRANSFORMER, logs="a", **sections):
        config = config_of("any")
        config = config.model_copy(update={name: getattr(config, name).model_copy(update=changed)
                                           for name, changed in sections.items()})
        data = SimpleNamespace(config=config, _slices=None,
                               store=SimpleNamespace(manifest={"input": {"fingerprint": logs}}))
        data.requests_fingerprint = CrmData.requests_fingerprint.func(data)
        return fingerprint(data, model)

    same = ({"train": {"workers": 3}}, {"train": {"device": "cpu"}}, {"train": {"checkpoint_every_steps": 9}},
            {"index": {"threads": 2}}, {"index": {"min_recall": 0.1}}, {"evaluate": {"queries": 7}})
    assert {told(**changed) for changed in same} == {told()}
    other = ({"model": MLP}, {"logs": "b"}, {"train": {"batch_rows": 8}}, {"train": {"learning_rate": 1.0}},
             {"crm": {"temperature": 2.0}}, {"index": {"factory": "HNSW8"}}, {"evaluate": {"validation_queries": 7}})
    assert len({told(**changed) for changed in other} | {told()}) == len(other) + 1

    # The file of held-out users counts by what is in it: other users, other towers.
    held_out = {"split": {"test_users": str(tmp_path / "users.parquet")}}
    pq.write_table(pa.table({"user_id": [1, 2]}), tmp_path / "users.parquet")
    first = told(**held_out)
    pq.write_table(pa.table({"user_id": [2, 1]}), tmp_path / "users.parquet")
    assert told(**held_out) == first != told()
    pq.write_table(pa.table({"user_id": [1, 3]}), tmp_path / "users.parquet")
    assert told(**held_out) != first


# -------------------------------------------------------------------------------------- rows that workers do not divide

@pytest.mark.parametrize("rows, mine", [(1, ([1, 1, 1], [0, 0, 0])), (2, ([1, 1], [1, 0])), (3, ([2], [1]))])
def test_three_rows_over_two_workers_are_those_of_one(ranks, one, rows, mine):
    case = f"rows-{rows}"
    assert tuple(told[case]["mine"] for told in ranks) == mine
    assert ranks[0][case]["plan"] == (3, -(-3 // rows))
    losses, alone = ranks[0][case]["losses"], one[case]["losses"]
    assert len(losses) == len(alone) == 3 * ranks[0][case]["plan"][1]
    assert [losses[s] for s in sorted(losses)] == pytest.approx([alone[s] for s in sorted(alone)], abs=1e-5)


# ------------------------------------------------------------------------------------------------------ time slices

def test_daily_slices_leave_a_snapshot_for_every_end(two):
    told = two["daily-same"]
    assert told["ends"] == [T0 + day * DAY_MS for day in (1, 2, 3, 4)]
    marks = sorted({int(name.split("/")[1].split("-")[0]) for name in told["indexes"]})
    assert marks == told["ends"] and len(told["indexes"]) == 8  # two epochs each


def test_a_day_that_was_broken_off_with_its_index_pending_goes_on_as_if_it_had_not_been(two):
    whole, (built_at, end) = two["daily-same"], two["daily-broken"]["ends"]
    first, second = two["daily-broken"]["first"], two["daily-broken"]["second"]
    assert second["resumed"] == [built_at + 2] and built_at + 2 < end
    assert f"step-{built_at}" in first["checkpoints"] and len(first["indexes"]) == 2
    assert first["losses"] | second["losses"] == whole["losses"] and second["indexes"] == whole["indexes"]


def test_an_index_knows_nothing_at_or_after_its_watermark(two):
    """Tries to cheat: from the second day on everybody watches one item, for 100 s. The first day's indexes are the
    same bytes; the later ones are not."""
    same, cheat = two["daily-same"]["indexes"], two["daily-cheat"]["indexes"]
    first = {name for name in same if f"/{T0 + DAY_MS}-" in name}
    assert len(first) == 2
    assert {name: cheat.get(name) == same[name] for name in first} == dict.fromkeys(first, True)
    assert not any(cheat.get(name) == same[name] for name in same.keys() - first)


# -------------------------------------------------------------------------------------------------------- evaluation

def read_evaluation(folder, model):
    folder = Path(folder) / "evaluation" / model / "seed=0"
    return (pq.read_table(folder / "queries.parquet"), json.loads((folder / "curve.json").read_text()),
            json.loads((folder / "summary.json").read_text()))


def test_every_model_has_its_evaluation(two):
    told = two["evaluated"]
    assert {p.name for p in Path(told["folder"], "evaluation").iterdir()} == {
        "dt", "mlp_unconditioned", "mlp_bayes", "popular"}
    for model, strategies in (("dt", {"null", "average", "maximum", "multiplexed", "fixed_60", "oracle"}),
                              ("mlp_bayes", {"null", "average", "maximum", "multiplexed", "fixed_60", "oracle"}),
                              ("mlp_unconditioned", {"none"}), ("popular", {"none"})):
        queries, curve, summary = read_evaluation(told["folder"], model)
        assert {name.split(".")[0] for name in queries.column_names if "." in name} == strategies
        assert queries["timestamp_ms"].to_pylist() == told["time_Q"].tolist() and summary["judged"] == "x"
        assert all(told["begin_ms"] <= t < told["end_ms"] for t in queries["timestamp_ms"].to_pylist())
        assert len(curve) == (0 if strategies == {"none"} else 5)
        assert (Path(told["folder"]) / summary["index"]["folder"] / "index.faiss").exists()
        hits = np.array([queries[f"{s}.recall@20"].to_numpy() for s in strategies])
        assert ((hits == 0) | (hits == 1)).all()  # one view is to be found


def test_the_popular_lists_are_those_of_the_training_targets(two):
    told = two["evaluated"]
    queries, _, _ = read_evaluation(told["folder"], "popular")
    least = np.sort(told["views_N"][1:])[-20]
    found = queries["none.recall@20"].to_numpy()
    views_Q = told["views_N"][told["target_Q"]]
    assert found[views_Q > least].all() and not found[views_Q < least].any()


def test_where_there_is_nobody_to_judge_the_run_still_ends(two):
    told = two["nobody"]
    assert told["requests"] == (0, 0)
    for model in ("mlp_unconditioned", "mlp_bayes"):
        queries, curve, summary = read_evaluation(told["folder"], model)
        assert len(queries) == len(curve) == 0 and summary["index"]["bytes"] > 0


@pytest.mark.parametrize("what", ["index", "checkpoint"])
def test_a_damaged_publication_gives_no_number(ranks, what):
    assert ranks[0][f"damaged {what}"] == ranks[1][f"damaged {what}"]  # nobody is left waiting
    kind, message, file = ranks[0][f"damaged {what}"]
    assert kind == "WatchtowerError" and file in message and "damaged" in message
