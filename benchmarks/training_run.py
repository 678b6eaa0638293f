"""A whole training run, data included, against RecBole's SASRec: from the log on disk to trained towers on disk.

    python benchmarks/training_run.py [--users N] [--epochs N] [--losses CE BPR] [--rounds 5] [--json PATH]

Ours is `watchtower run stages=[ingest,crm]` with the unconditioned transformer: two Ray Train workers, a core each,
with Ray's start, ingest, and a checkpoint, an index and its validation after every epoch all included. RecBole's is its
own loading, SASRec and Trainer in one process with as many threads as ours has cores, without evaluation. Both start
from nothing in every round, in turns, on the same log with the same width, layers, heads, feed-forward width, dropout,
length of the history and epochs.

A sequence is a history of up to `history` views and the view that follows it; each side trains on every sequence of the
log once an epoch (but for what is held out: two views a user in RecBole's split, the last hours in ours). RecBole makes
a padded row of each. A row of ours is a window, and its positions are several sequences that share their views:
that is most of the difference. RecBole's batch has as many sequences as ours on average.

Negatives: ours are the other targets of the batch, about as many as there are items in the catalogue. Of RecBole's
losses CE is the nearest, a softmax over the catalogue; BPR has one sampled negative, which is less work. Ours has
clock and item features beside ids, and row-wise Adagrad for tables; RecBole has ids alone and Adam for everything.

    whole run; training alone (without loading, start-up, checkpoint's and index's ends): ours / RecBole's sequences/s
    waiting for data: the share of training time, from the train_step events of the same runs, of the slowest worker
    standing for the index: seconds in which training waits for the vectors of an epoch to be taken, and for the index
        of the epoch before where that is not there yet, over training time (events vectors and followed_up). What comes
        after the last epoch keeps no training up and does not count
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import PEERS, ROOT, cores, over, parser, report, row
from worlds import make_world

SHAPE = {"dim": 64, "hidden": 256, "layers": 2, "heads": 2, "history": 32, "dropout": 0.1}
WINDOWS, ITEMS, VIEWS, DAYS = 128, 1500, 60, 14
MODEL = "transformer"
REACH, WAITING, STANDING = 2.0, 0.03, 0.02


def write_log(folder: Path, users: int) -> int:
    """The world, and the same views as RecBole wants them; how many views there are."""
    import pyarrow.dataset as ds

    make_world(folder, users=users, items=ITEMS, views_per_user=VIEWS, days=DAYS, seed=0)
    views = ds.dataset(folder / "world" / "logs").to_table(["user_id", "item_id", "timestamp_ms"]).to_pydict()
    (folder / "recbole" / "log").mkdir(parents=True)
    with open(folder / "recbole" / "log" / "log.inter", "w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        file.writelines(f"{user}\t{item}\t{ms}\n" for user, item, ms in zip(*views.values(), strict=True))
    return len(views["user_id"])


def write_config(folder: Path, epochs: int, workers: int) -> Path:
    """Every view is a target, as in RecBole's run; little is held out and judged."""
    path = folder / "run.yaml"
    path.write_text(json.dumps({
        "name": "training-run", "seeds": [0],
        "data": {"logs": str(folder / "world" / "logs"), "items": str(folder / "world" / "items.parquet"),
                 "effective_view": {"min_watch_s": 1e-3}, "target": {"min_watch_s": 1e-3}},
        "split": {"validation_days": 0.25, "test_days": 0.25},
        "crm": {"models": [{"name": MODEL, "tower": "decision_transformer", "condition": "none"}], "tower": SHAPE,
                "tables": {"dim": SHAPE["dim"]}},
        "train": {"workers": workers, "threads_per_worker": 1, "device": "cpu", "epochs": epochs,
                  "batch_rows": WINDOWS, "checkpoint_every_steps": None, "log_every_steps": 20},
        "evaluate": {"queries": 50, "validation_queries": 50, "curve_queries": 10}}), encoding="utf-8")
    return path


def ours(folder: Path, config: Path, epochs: int) -> dict[str, Any]:
    """One run; `sequences` of all epochs, `batch`: sequences of a step."""
    from trainer.events import read_events

    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    whole_s = _timed([sys.executable, "-m", "launch.cli", "run", str(config), f"run_dir={run_dir}",
                      "stages=[ingest,crm]"], ROOT, {"PYTHONPATH": str(ROOT)})[0]
    events = list(read_events(run_dir / "events.jsonl"))
    group = next(event for event in events if event["event"] == "group")
    steps = [event for event in events if event["event"] == "train_step"]
    sequences = group["training_targets"] * epochs
    found = of_steps(steps)
    return {"whole_s": whole_s, "sequences": sequences, "batch": sequences / steps[-1]["steps"], **found,
            "standing": standing_s(events, epochs) / found["train_s"]}


def standing_s(events: Sequence[Mapping[str, Any]], epochs: int) -> float:
    """Seconds in which the training of one model stood for its indexes, but for the last epoch's."""
    seconds = {"vectors": "seconds", "followed_up": "waited_s"}
    return sum(event[seconds[event["event"]]] for event in events
               if event["event"] in seconds and event["epoch"] < epochs)


def of_steps(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """From the train_step events of one model: seconds in its training loop, and of these the share that the worker
    that waited longest waited for data."""
    before, train_s, waited_s = 0, 0.0, {}
    for event in events:
        seconds = event["step_s"] * (event["step"] - before)
        before, train_s = event["step"], train_s + seconds
        for worker in event["workers"]:
            waited_s[worker["rank"]] = waited_s.get(worker["rank"], 0.0) + worker["wait_share"] * seconds
    return {"train_s": train_s, "waiting": max(waited_s.values()) / train_s}


def recbole(folder: Path, **settings: Any) -> dict[str, Any]:
    """One run of RecBole's."""
    threads = str(settings["threads"])
    whole_s, said = _timed(
        [str(PEERS / "bin" / "python"), str(ROOT / "benchmarks" / "recbole_sasrec.py"), str(folder / "recbole"),
         json.dumps(SHAPE | settings)], folder, {"PYTHONPATH": "", "OMP_NUM_THREADS": threads})
    return {"whole_s": whole_s, **json.loads(said.splitlines()[-1])}


def _timed(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[float, str]:
    """Seconds, and the standard output.

    Raises:
        RuntimeError: it failed.
    """
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return seconds, done.stdout


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--users", type=int, default=1000)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--losses", nargs="+", choices=["CE", "BPR"], default=["CE"], help="of RecBole's SASRec")
    arguments = options.parse_args()
    workers = min(2, len(cores()))
    with tempfile.TemporaryDirectory(prefix="training-run-") as name:
        folder = Path(name)
        views = write_log(folder, arguments.users)
        config = write_config(folder, arguments.epochs, workers)
        found = [ours(folder, config, arguments.epochs)]  # says how many sequences a batch of theirs has
        batch = round(found[0]["batch"])
        peers: dict[str, list[dict[str, Any]]] = {loss: [] for loss in arguments.losses}
        for at in range(arguments.rounds):
            if len(found) <= at and at % 2 == 0:
                found.append(ours(folder, config, arguments.epochs))
            for loss in arguments.losses:
                peers[loss].append(recbole(folder, loss=loss, epochs=arguments.epochs, batch=batch, threads=workers))
            if len(found) <= at:
                found.append(ours(folder, config, arguments.epochs))
    rows = []
    for loss, peer in peers.items():
        sizes = (f"{views:,} views, {ITEMS:,} items, {arguments.epochs} epochs, {batch:,} sequences a batch, {workers} "
                 f"cores; {found[0]['sequences']:,} sequences against RecBole's {peer[0]['sequences']:,} with "
                 f"{peer[0]['negatives']:,} negatives")
        for what, seconds, reach in (("whole training run", "whole_s", REACH), ("training alone", "train_s", None)):
            rates = [[one["sequences"] / one[seconds] for one in side] for side in (found, peer)]
            rows.append(row(f"{what}: sequences/s / RecBole's SASRec ({loss})", over(*rates), reach, sizes=sizes,
                            sequences_per_s=[statistics.median(side) for side in rates],
                            seconds=[statistics.median(one[seconds] for one in side) for side in (found, peer)]))
    # A run that never waited has a share of 0, which is no ratio.
    rows.append(row("training run: waiting for data / training time", [max(one["waiting"], 1e-6) for one in found],
                    WAITING, "lower", sizes=f"{WINDOWS} windows a step, {workers} workers"))
    rows.append(row("training run: standing for the index / training time", [one["standing"] for one in found],
                    STANDING, "lower", sizes=f"{ITEMS:,} items, {arguments.epochs} epochs, {workers} workers"))
    return report(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
