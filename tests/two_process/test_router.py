"""The router on real processes: two workers against one plain-PyTorch process on the same global batches, and a
training with its validation and scores, broken off and taken up again. One spawn runs all cases.

The run folder is a small synthetic world with real channels, statistics and labels.
"""

import json
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from plain_reference import PlainCrm
from spawn import run_ranks

from configs.schema import Config

DAY = datetime(2026, 1, 1)  # midnight, the first day of the synthetic world
STEPS, SEED = 24, 3
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "table_optimizer": "sgd", "table_learning_rate": 0.2}
REAL = {"optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 0.01, "gradient_clip_norm": 0.5,
        "table_optimizer": "rowwise_adagrad", "table_learning_rate": 0.02}
OPTIMIZERS = {"sgd": SGD, "real": REAL}
CASES = [("sgd", 0), ("sgd", 2), ("real", 0), ("real", 1)]
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 5e-6, {"sgd": 1e-5, "real": 5e-5}
STOP_MID = 8  # a checkpoint in the middle of the second epoch


def config_of(run_dir, *, dropout=0.0, **router) -> Config:
    return Config.model_validate({
        "run_dir": str(run_dir), "data": {"shards": 4}, "channels": {"names": ["swing", "content"]},
        "replay": {"requests": {
            "train_cuts": [{"at": DAY + timedelta(days=d)} for d in (2, 3)],
            "test_cuts": [{"at": DAY + timedelta(days=4)}], "triggers": 12, "min_triggers": 3, "test_min_triggers": 3,
            "test_min_future": 1}, "tau_s": 3.0},
        "train": {"warmup_steps": 3, "checkpoint_every_steps": 4, "keep_checkpoints": 2, "log_every_steps": 1,
                  "shuffle_shards": 2, "zero_stage": 0},
        "router": {"models": [{"name": "capts"}, {"name": "bare", "diversity": False, "calibrator": False}],
                   "dim": 8, "hidden": 12, "history": 6, "dropout": dropout, "tables": {"dim": 4, "init_std": 0.3},
                   "batch_requests": 9, "epochs": 3, "validation_share": 0.25, "listwise_weight": 0.3, **router}})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    from launch.channels import SerialExecutor, build_channels
    from launch.ingest import SerialExecutor as SerialIngest
    from launch.ingest import ingest
    from launch.replay import make_labels
    from trainer.item_value import fit_item_value
    from trainer.triggers import is_validation_user
    from trainer.world import WorldSpec, write_world

    folder = tmp_path_factory.mktemp("router") / "run"
    write_world(folder / "synth", WorldSpec(users=70, items=60, views_per_user=40, days=6, content_dim=4, seed=3),
                processes=1)
    config = config_of(folder)
    data = config.data.model_copy(update={"logs": str(folder / "synth" / "logs"),
                                          "items": str(folder / "synth" / "items.parquet")})
    ingest(data, folder, SerialIngest())
    build_channels(config, folder, SerialExecutor(), say=lambda line: None)
    make_labels(config, folder, SimpleNamespace(each=lambda task, shards: [task(shard) for shard in shards]))
    fit_item_value(config, folder, lambda user_ids: ~is_validation_user(user_ids, config))
    return folder


# -------------------------------------------------------------------------------------------------------- the parity

def batches(folder, rank, workers):
    """(the data, this worker's part of the global batches, epoch after epoch)."""
    from trainer.router_data import RouterData

    data = RouterData(config_of(folder), folder)
    made, epoch = [], 0
    while len(made) < STEPS:
        made += data.batches(data.plan(SEED, epoch), data.config.router.models[0], rank, workers)
        epoch += 1
    return data, made[:STEPS]


def router_of(data):
    from trainer.catr import CatrModel
    from trainer.crm import FeatureSizes, table_specs

    config, scales = data.config.router, data.labels(None).scales
    sizes = FeatureSizes.of(data.catalogue, data.store.users)
    torch.manual_seed(SEED)
    return (CatrModel(config, config.models[0], sizes, data.scales, scales.cap, scales.eta),
            table_specs(sizes, config))


def plain_run(folder, name):
    """Losses, tables and towers of the plain process."""
    from embeddings.tables import initial_rows

    data, made = batches(folder, 0, 1)
    module, specs = router_of(data)
    weights = {spec.name: torch.cat([rows for _, rows in initial_rows(SEED, spec, 0, spec.rows)]) for spec in specs}
    plain = PlainCrm(module, weights, **OPTIMIZERS[name])
    losses = []
    for step, batch in enumerate(made):
        torch.manual_seed(step)  # as the loop does it, alike on all workers: what is dropped is the same
        losses.append(plain.step(batch))
    tensors = {f"table/{table}": weight.detach().numpy() for table, weight in plain.tables.items()}
    return losses, tensors | {key: value.detach().numpy() for key, value in module.named_parameters()}


def sharded_run(data, made, name, stage):
    from embeddings.tables import ShardedTables, gather_full
    from trainer.engine import DenseEngine, EngineSpec, gather_dense
    from trainer.workers import Workers

    settings = dict(OPTIMIZERS[name])
    module, specs = router_of(data)
    tables = ShardedTables(specs, device=torch.device("cpu"), optimizer=settings.pop("table_optimizer"),
                           learning_rate=settings.pop("table_learning_rate"), seed=SEED)
    workers, losses = Workers.joined(torch.device("cpu")), []
    with DenseEngine(module, EngineSpec(zero_stage=stage, **settings), device="cpu") as engine:
        for step, batch in enumerate(made):
            torch.manual_seed(step)
            loss, _ = engine("loss", batch, tables(batch.items.features))
            losses.append(workers.mean(loss))
            engine.backward(loss)
            assert engine.step()
        dense, _ = gather_dense(engine)
    tensors = {f"table/{table}": weight.numpy() for table, weight in gather_full(tables).items()}
    return losses, tensors | {key.removeprefix("parameter/"): value.numpy() for key, value in dense.items()
                              if key.startswith("parameter/")}


# ------------------------------------------------------------------------------------------------------- the training

class Stopped(Exception):
    """A run that is broken off."""


def trained(folder, case, workers, stop=None, model=0):
    """Trains in a folder of checkpoints of its own; what it told, and the scores where it came to the end."""
    from trainer.loop import train
    from trainer.router_data import RouterData
    from trainer.router_task import RouterTask, is_scored, score_requests

    data = RouterData(config_of(folder, dropout=0.1), folder)
    task = RouterTask(data, data.config.router.models[model], 0)
    task.folder, task.scores = folder / "checkpoints" / case, folder / "evaluation" / "routing" / case
    told = {"losses": {}, "validation": {}, "resumed": []}

    def write(event, **fields):
        if event == "train_step":
            told["losses"][fields["step"]] = fields["loss"]
        if event == "epoch":
            told["validation"][fields["step"]] = {k: v for k, v in fields.items() if k.startswith("validation_")}
        if event == "resume":
            told["resumed"].append(fields["global_step"])
        if event == "train_step" and fields["step"] == stop:
            raise Stopped

    scored_before = workers.agree(is_scored(task))
    try:
        found = train(task, workers, write)
    except Stopped:
        return told
    score_requests(task, found, workers, write)
    return told | {"best": found.best.as_json(), "steps": [plan.steps for plan in task.plans()],
                   "checkpoint": Path(found.checkpoint).name, "scored": (scored_before, workers.agree(is_scored(task)))}


def tables_from_crm(folder, workers):
    """The tables of a CRM model that both workers saved, and those of a router that starts from them."""
    from embeddings.table_state import save_tables
    from embeddings.tables import ShardedTables, gather_full
    from trainer.crm import FeatureSizes, table_specs
    from trainer.router_data import RouterData
    from trainer.router_task import RouterTask

    made = config_of(folder, from_crm=True).model_dump()
    config = Config.model_validate(made | {"crm": {**made["crm"], "tables": {**made["crm"]["tables"], "dim": 4}}})
    data, name, device = RouterData(config, folder), config.crm.published, torch.device("cpu")
    crm = ShardedTables(table_specs(FeatureSizes.of(data.catalogue, data.store.users), config.crm), device=device,
                        optimizer=config.crm.tables.optimizer, learning_rate=0.1, seed=91)
    for shard in crm.local_shards():
        if shard.kind == "momentum":
            shard.tensor.fill_(2.5)
    checkpoint = folder / "checkpoints" / name / "seed=0" / "step-7"
    told = folder / "evaluation" / name / "seed=0" / "summary.json"
    summary = json.dumps({"checkpoint": "step-7", "index": {"folder": f"indexes/{name}/seed=0/0-7"}})
    for place in (checkpoint, told.parent):
        place.mkdir(parents=True, exist_ok=True)
    workers.on_first(lambda: told.write_text(summary))
    save_tables(crm, checkpoint, workers.rank)
    workers.barrier()
    router, _ = RouterTask(data, config.router.models[0], 0).build(device)
    fresh, _ = RouterTask(RouterData(config_of(folder), folder), config.router.models[0], 0).build(device)
    return {name: {table: rows.numpy() for table, rows in gather_full(tables, kind).items()} for name, tables, kind in (
        ("crm", crm, "weight"), ("router", router, "weight"), ("fresh", fresh, "weight"),
        ("momentum", router, "momentum"))}


def two_workers(rank, world, folder):
    from trainer.router_data import RouterData
    from trainer.workers import Workers

    workers = Workers.joined(torch.device("cpu"))
    RouterData(config_of(folder), folder).write_features(workers)
    told = {"shards": sorted(path.name for path in (folder / "router_features").glob("*/shard-*"))}
    data, made = batches(folder, rank, world)
    told |= {"parity": {case: sharded_run(data, made, *case) for case in CASES},
             "triggers": [int((batch.weight_T > 0).sum()) for batch in made]}
    told["whole"] = trained(folder, "whole", workers)
    told["bare"] = trained(folder, "bare", workers, model=1)
    told["first"] = trained(folder, "broken", workers, stop=STOP_MID + 1)
    told["second"] = trained(folder, "broken", workers)
    told["from_crm"] = tables_from_crm(folder, workers)
    return told


@pytest.fixture(scope="module")
def ranks(run_dir):
    return run_ranks(2, two_workers, run_dir, timeout_s=200)


@pytest.fixture(scope="module")
def two(ranks):
    return ranks[0]


def test_the_features_of_all_shards_are_there_before_anybody_reads_them(ranks):
    assert all(told["shards"] == [f"shard-{number:05d}" for number in range(4)] for told in ranks)


def test_the_batches_are_what_they_claim(run_dir, ranks):
    """Unequal shares on the two ranks, and a batch of which one rank has no request; together all triggers."""
    first, second = (told["triggers"] for told in ranks)
    _, made = batches(run_dir, 0, 1)
    assert [a + b for a, b in zip(first, second, strict=True)] == [len(batch.item_T) for batch in made]
    assert any(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_workers_equal_one_plain_process(run_dir, two, case):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain_losses, plain_tensors = plain_run(run_dir, case[0])
    torch.set_num_threads(threads)
    losses, tensors = two["parity"][case]
    assert np.mean(plain_losses[-6:]) < np.mean(plain_losses[:6])
    loss = max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True))
    assert tensors.keys() == plain_tensors.keys()
    weight = {key: float(np.abs(tensors[key] - value).max()) for key, value in plain_tensors.items()}
    worst = max(weight, key=weight.get)
    print(f"loss {loss:.1e}, weights {weight[worst]:.1e} ({worst})")
    assert loss <= LOSS_TOLERANCE
    assert weight[worst] <= WEIGHT_TOLERANCE[case[0]], worst


def test_a_training_that_was_broken_off_goes_on_as_if_it_had_not_been(two):
    first, second, whole = two["first"], two["second"], two["whole"]
    per = whole["steps"][0]
    assert per < STOP_MID < 2 * per and second["resumed"] == [STOP_MID]
    assert first["losses"] | second["losses"] == whole["losses"]  # to the last bit
    assert first["validation"] | second["validation"] == whole["validation"]
    assert second["best"] == whole["best"] and second["checkpoint"] == whole["checkpoint"]


def test_a_router_starts_from_the_tables_of_crm_without_their_momentum(two):
    found = two["from_crm"]
    assert found["router"].keys() == found["crm"].keys() == found["momentum"].keys() and "item" in found["crm"]
    for table, rows in found["crm"].items():
        np.testing.assert_array_equal(found["router"][table], rows)
        assert not np.array_equal(found["fresh"][table], rows) and not found["momentum"][table].any()


def test_every_epoch_is_validated_and_the_best_one_scores(two, ranks):
    whole = two["whole"]
    assert len(whole["losses"]) == sum(whole["steps"]) and ranks[1]["whole"]["losses"] == whole["losses"]
    captured = {step: told["validation_captured@10"] for step, told in whole["validation"].items()}
    assert len(captured) == 3 and all(0 < value <= 1 for value in captured.values())
    assert whole["best"]["validation"]["captured@10"] == max(captured.values())
    assert whole["checkpoint"] == f"step-{whole['best']['step']}"
    for told in whole["validation"].values():
        assert {"validation_auc.swing", "validation_bce.content"} <= told.keys()
    assert whole["scored"] == (False, True)


@pytest.mark.parametrize("case", ["whole", "broken", "bare"])
def test_the_scores_are_of_all_triggers_of_the_test_requests_in_order(run_dir, two, case):
    from trainer.router_data import RouterData

    data = RouterData(config_of(run_dir), run_dir)
    folder = run_dir / "evaluation" / "routing" / case
    table, manifest = pq.read_table(folder / "scores.parquet"), json.loads((folder / "manifest.json").read_text())
    asked = [data.requests("test", number) for number in range(data.store.shards)]
    assert table["request_id"].to_pylist() == [i for r in asked for i in r.request_id_R[r.request_T].tolist()]
    assert table["position"].to_pylist() == [p for r in asked for p in r.position_T.tolist()]
    assert table["trigger_item_id"].to_pylist() == [
        i for r in asked for i in data.vocabulary.ids_of(r.trigger_row_T).tolist()]
    assert manifest["channels"] == ["swing", "content"] and manifest["rows"] == len(table) > 20
    value, unique = (np.stack(table[name].to_numpy(zero_copy_only=False)) for name in ("value", "uniqueness"))
    assert value.shape == unique.shape == (len(table), 2) and value.dtype == np.float32
    assert ((value > 0) & (value < 1)).all() and value.std() > 1e-3
    assert unique.any() == (case != "bare")
    if case == "broken":
        whole = pq.read_table(run_dir / "evaluation" / "routing" / "whole" / "scores.parquet")
        assert table.equals(whole)
