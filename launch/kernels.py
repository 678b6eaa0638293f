"""Compiles the kernels ahead of the first run: `python -m launch.kernels`, the last step of an installation.

Numba compiles a kernel for the array types that it meets and keeps the result beside the source. A first run would
compile in every one of its processes at once. So the stages that have kernels run here in one process, small: the types
are then those that real runs have, without a list of them that somebody must keep.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from configs.schema import Config

USERS, ITEMS, VIEWS, DAYS = 60, 60, 40, 7


def small_config(folder: Path) -> Config:
    """Every kind of channel that a log with sessions and a catalogue has, every selector, and a router."""
    from trainer.selectors import SELECTORS

    return Config.model_validate({
        "seeds": [0],
        "data": {"logs": str(folder / "world" / "logs"), "items": str(folder / "world" / "items.parquet"), "shards": 1,
                 "target": {"column": "long_view"}, "effective_view": {"column": "effective_view"}},
        "split": {"validation_days": 1, "test_days": 2},
        "channels": {"top": 10, "embedding": {"source": "svd"}},
        "replay": {"requests": {"every": 2, "per_user": 4, "triggers": 20, "min_triggers": 3, "test_min_triggers": 3,
                                "test_min_future": 1}},
        "router": {"models": [{"name": "capts"}], "dim": 8, "hidden": 8, "history": 8, "tables": {"dim": 8},
                   "epochs": 1, "batch_requests": 16},
        "routing": {"budgets": [2], "at": [10], "windows": [100], "selectors": list(SELECTORS), "bootstrap": 10,
                    "overlap": None},
        "train": {"workers": 1, "threads_per_worker": 1, "device": "cpu", "checkpoint_every_steps": None}})


def compile_kernels(folder: Path) -> None:
    """Run the stages with kernels in this process, in an empty folder. Needs no Ray; joins a gloo group of one."""
    import torch
    import torch.distributed as dist

    from launch import channels, ingest, replay, routing
    from trainer.item_value import fit_item_value
    from trainer.loop import train
    from trainer.router_data import RouterData
    from trainer.router_task import RouterTask, score_requests
    from trainer.triggers import is_validation_user
    from trainer.workers import Workers
    from trainer.world import WorldSpec, write_world

    run_dir, config = folder / "run", small_config(folder)
    write_world(folder / "world", WorldSpec(users=USERS, items=ITEMS, views_per_user=VIEWS, days=DAYS, seed=0),
                processes=1)
    ingest.ingest(config.data, run_dir, ingest.SerialExecutor())
    channels.build_channels(config, run_dir, channels.SerialExecutor(), say=lambda line: None)
    replay.make_labels(config, run_dir, ingest.SerialExecutor())
    fit_item_value(config, run_dir, lambda user_ids: ~is_validation_user(user_ids, config))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        workers, data = Workers.joined(torch.device("cpu")), RouterData(config, run_dir)
        data.write_features(workers)
        task = RouterTask(data, config.router.models[0], 0)
        score_requests(task, train(task, workers, lambda *_, **__: None), workers, lambda *_, **__: None)
    finally:
        dist.destroy_process_group()
    routing.evaluate_routing(config, run_dir, routing.SerialExecutor())


def main() -> int:
    began = time.monotonic()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory(prefix="watchtower-kernels-") as name:
        compile_kernels(Path(name))
    print(f"watchtower: compiled the kernels in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
