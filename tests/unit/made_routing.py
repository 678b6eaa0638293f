"""A run folder that tests judge: drawn sequences, two channels, item statistics and the scores of two routers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from made_replay import BEGIN_MS, DAY_MS, NAMES, config_of, made_run
from made_requests import made_statistics

from configs.schema import Config
from embeddings.snapshots import publish
from launch.ingest import SerialExecutor
from launch.replay import make_labels
from trainer import item_statistics
from trainer.item_value import fit_item_value
from trainer.routing_evaluation import Run
from trainer.sequences import user_hash
from trainer.triggers import is_validation_user

AT = [1, 3, 10]
ROUTERS = ["capts", "capts-no-diversity"]


def routing_config(folder, routers=ROUTERS, seeds=(0, 1), **routing) -> Config:
    values = config_of(folder, requests={"min_triggers": 3, "test_min_triggers": 3, "test_min_future": 1}).model_dump()
    values["routing"] |= {"at": AT, "budgets": [2, 4], "bootstrap": 50, "windows": [3, 12],
                          "test_users": {"share": 0.5, "seed": 0}, **routing}
    values["channels"]["top"] = 6
    values["router"]["validation_share"] = 0.4
    values["router"]["models"] = [{"name": name, "diversity": name != "capts-no-diversity"} for name in routers]
    return Config.model_validate(values | {"seeds": list(seeds)})


def made_routing_run(folder, shards):
    made_run(folder, shards)
    run = Run(routing_config(folder), folder)
    for day in (3, 5, 6):
        at = BEGIN_MS + day * DAY_MS - 20 * 60_000
        item_statistics.publish(folder / "channels", at, made_statistics(
            np.random.default_rng(day), run.store.vocabulary.rows, at), run.store.vocabulary, {})
    make_labels(run.config, folder, SerialExecutor())
    fit_item_value(run.config, folder, lambda ids: np.ones(len(ids), bool))
    for place, name in enumerate(ROUTERS):
        for seed in (0, 1):
            write_scores(run, name, seed, 10 * place + seed)
    return folder


def write_scores(run, name, seed, key):
    """Scores that depend on user, item and channel alone: the same however the run is sharded. Of the test requests,
    and of the validation requests."""
    def written(folder):
        pq.write_table(scores_of(run, "test", key), folder / "scores.parquet")
        pq.write_table(scores_of(run, "train", key), folder / "validation.parquet")

    publish(run.folder / "evaluation" / "routing" / name / f"seed={seed}", written, {"channels": NAMES}, replace=True)


def scores_of(run, side, key):
    parts = []
    for number in range(run.store.shards):
        requests = run.requests(number, side)
        if side == "train":
            requests = requests.take(is_validation_user(requests.user_id_R, run.config))
        base_T = requests.user_id_R[requests.request_T] * 1000 + requests.trigger_row_T
        draws = [[(user_hash(base_T, 100 * key + 10 * part + c) >> np.uint64(40)).astype(np.float32) / 2**24
                  for c in range(len(NAMES))] for part in range(2)]
        parts.append(pa.table({
            "request_id": requests.request_id_R[requests.request_T], "position": requests.position_T,
            "trigger_item_id": run.store.vocabulary.ids_of(requests.trigger_row_T),
            **{column: pa.FixedSizeListArray.from_arrays(pa.array(np.stack(values, axis=1).ravel()), len(NAMES))
               for column, values in zip(("value", "uniqueness"), draws, strict=True)}}))
    return pa.concat_tables(parts)
