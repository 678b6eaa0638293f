"""A run folder that tests replay: sequences of drawn logs, and two channels with snapshots."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from made_requests import made_lists

from configs.schema import Config
from launch.ingest import SerialExecutor, ingest
from trainer.neighbors import publish_neighbors
from trainer.sequences import SequenceStore

BEGIN = datetime(2022, 4, 18)
BEGIN_MS = round(BEGIN.replace(tzinfo=UTC).timestamp() * 1000)
DAY_MS = 86_400_000
USERS, ITEMS = 60, 25
NAMES = ["swing", "content"]
PLAIN = ["request_id", "user_id", "request_time_ms", "trigger_item_id", "position"]


def config_of(run_dir, **replay) -> Config:
    requests = {"train_cuts": [{"at": BEGIN + timedelta(days=d)} for d in (3, 5)],
                "test_cuts": [{"at": BEGIN + timedelta(days=7)}], "triggers": 9, "min_triggers": 2, "min_future": 1,
                "test_min_triggers": 2, "test_min_future": 1,
                "future_min_watch_s": 2.0, **replay.pop("requests", {})}
    return Config.model_validate({
        "run_dir": str(run_dir), "channels": {"names": NAMES, "rollback_min": 20},
        "replay": {"window": 12, "null_watch_s": 1.0, "requests": requests, **replay},
        "router": {"models": [{"name": "capts"}, {"name": "short", "window": 4}]}})


def made_run(folder, shards):
    """Sequences of drawn logs, and two channels with a snapshot for each cut and one that nobody may see."""
    rng = np.random.default_rng(7)
    rows = 40 * USERS
    folder.mkdir(parents=True)
    pq.write_table(pa.table({
        "user_id": rng.integers(0, USERS, rows) * 11, "item_id": rng.integers(1, ITEMS + 1, rows) * 3,
        "timestamp_ms": BEGIN_MS + rng.integers(0, 9 * DAY_MS, rows),
        "watch_time_s": pa.array(rng.exponential(8, rows).astype(np.float32), mask=rng.random(rows) < 0.2)}),
        folder / "logs.parquet")
    config = config_of(folder)
    data = config.data.model_copy(update={"logs": str(folder / "logs.parquet"), "shards": shards})
    ingest(data, folder, SerialExecutor())
    vocabulary = SequenceStore(folder / "sequences").vocabulary
    for name in NAMES:
        for day in (3, 5, 6):
            publish_neighbors(folder / "channels" / name, BEGIN_MS + day * DAY_MS - 20 * 60_000,
                              made_lists(np.random.default_rng([day, len(name)]), vocabulary.rows), vocabulary, {})
    return folder


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
