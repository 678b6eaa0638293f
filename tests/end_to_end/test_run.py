"""The real run made tiny: `watchtower run` as a user types it, CRM and CAPTS, on a synthetic world, Ray Train and two
workers.

Two runs of the same config: one is left alone; one loses a worker to SIGKILL in the middle of its training, and later
its driver gets a SIGTERM, saves, ends, and is started again. Both must end with the same losses and the same evaluation
of towers and routers, to the bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from trainer.events import read_events

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["data.synth.users=150", "data.synth.items=200", "train.epochs=2", "train.checkpoint_every_steps=4",
        "train.log_every_steps=1", "train.batch_rows=16", "evaluate.queries=100", "evaluate.curve_queries=40",
        "evaluate.validation_queries=50", "replay.requests.every=3",
        "replay.requests.per_user=4", "replay.requests.test_min_triggers=5", "gates.at_least={}"]
ROUTED = ("recent", "oracle", "capts", "capts-joint")  # popular takes no triggers


def start(run_dir: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", "configs/smoke.yaml", f"run_dir={run_dir}", *TINY, *overrides],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, timeout_s: float = 800, code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        raise
    assert process.returncode == code, output[-4000:]
    return output


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("untouched") / "run"
    return run_dir, finish(start(run_dir, f"observe.textfile={run_dir.with_suffix('.prom')}"))


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    """Loss by model and step; a step that was taken twice counts as it was taken last."""
    return {(e["model"], e["step"]): e["loss"] for e in read_events(run_dir / "events.jsonl", "train_step")}


def test_a_run_leaves_what_it_promises(untouched):
    run_dir, output = untouched
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for model in ("dnn", "decision_transformer"):
        for strategy in ("null", "average", "fixed_60", "oracle"):
            measured = metrics["crm"][model][strategy]["recall@100"]
            assert 0 < measured["mean"] <= 1 and measured["n"] == 100 and set(measured["per_seed"]) == {"0"}
        assert [point["condition_s"] for point in metrics["crm"][model]["control_curve"]] == [10, 30, 60, 120, 300]
        indexes = [path for path in (run_dir / "indexes" / model / "seed=0").iterdir() if path.is_dir()]
        assert len(indexes) == 2, "one index an epoch"
        assert all((index / name).is_file() for index in indexes
                   for name in ("index.faiss", "item_ids.parquet", "manifest.json"))
    assert metrics["crm"]["popular"]["none"]["recall@100"]["mean"] > 0
    served = json.loads((run_dir / "indexes" / "serving.json").read_text())
    assert (run_dir / served["folder"] / "manifest.json").is_file()
    assert "<svg" in (run_dir / "report.html").read_text()
    assert (run_dir / "config.yaml").is_file() and any((run_dir / "tensorboard").rglob("events.out*"))
    assert "report.html" in output and "recall@100" in output
    assert "step 1/" in output and "rows/s" in output, "progress is shown"
    assert_channels_and_labels(run_dir, metrics["routing"]["channels"])
    assert_routed(run_dir, metrics["routing"])
    for stage in ("channels", "replay", "router", "routing"):
        assert metrics["stages"][stage]["seconds"] > 0 and metrics["stages"][stage]["rows"] > 0, stage


def test_a_run_is_seen_from_outside(untouched):
    run_dir, _ = untouched
    steps = list(read_events(run_dir / "events.jsonl", "train_step"))
    for step in steps:
        assert [worker["rank"] for worker in step["workers"]] == [0, 1] and step["learning_rate"] > 0
        parts = [step[f"{part}_s"] for part in ("forward", "loss_mean", "backward", "optimizer")]
        assert min(parts) > 0 and sum(parts) <= step["step_s"], "parts of a step do not overlap"
        assert all(worker["memory_mib"] > 0 and worker["node"] for worker in step["workers"])
        assert all(0 < worker["all_to_all_s"] < step["step_s"] for worker in step["workers"])
    series = run_dir.with_suffix(".prom").read_text()
    for line in ("watchtower_run_active 0.0", "watchtower_restarts_total 0.0", "watchtower_workers 2.0"):
        assert line in series, series
    assert "watchtower_stage_in_progress{" not in series, "the run has ended"
    for name in ('train_mean_loss{model="dnn",seed="0"}', 'train_mean_loss{model="capts",seed="0"}',
                 'index_recall_ratio{model="dnn",seed="0"}', 'channel_watermark_lag_seconds{channel="swing"}',
                 'validation{measure="recall@100",model="dnn",seed="0"}', 'stage_rows{stage="replay"}'):
        assert f"watchtower_{name} " in series, name


def assert_channels_and_labels(run_dir: Path, channels: list[str]) -> None:
    assert channels == ["swing", "embedding", "content"]
    for channel in channels:
        snapshots = sorted((path for path in (run_dir / "channels" / channel).iterdir() if path.name.isdigit()),
                           key=lambda path: int(path.name))
        assert len(snapshots) > 1, channel
        for snapshot in snapshots:
            assert json.loads((snapshot / "manifest.json").read_text())["watermark_ms"] == int(snapshot.name)
            types = pq.read_schema(snapshot / "neighbors.parquet")
            assert types.names == ["item_id", "neighbors", "scores"]
            assert [str(types.field(name).type.value_type) for name in types.names[1:]] == ["int64", "float"]
        lists = pq.read_table(snapshots[-1] / "neighbors.parquet")
        assert len(lists) and 0 < max(map(len, lists["neighbors"].to_pylist())) <= 20
    manifest = json.loads((run_dir / "labels" / "manifest.json").read_text())
    parts = [pq.read_table(path) for path in sorted((run_dir / "labels").glob("*.parquet"))]
    assert manifest["channels"] == channels and manifest["rows"] == sum(map(len, parts))
    assert len(parts) == manifest["shards"] and manifest["requests"] > 100 and min(manifest["positive_labels"]) > 0
    for part in parts:
        assert part.column_names == ["request_id", "user_id", "request_time_ms", "trigger_item_id", "position",
                                     "reward", "intensity", "label", "uniqueness"]
        assert all(part.schema.field(name).type.list_size == len(channels) for name in part.column_names[5:])


def assert_routed(run_dir: Path, measured: dict) -> None:
    """Scores, picks and results of the test requests, under the one budget."""
    (budget,), channels, requests = measured["budgets"], measured["channels"], measured["requests"]["n"]
    assert requests > 30, "the tiny world has too few test requests to say anything"
    scores = pq.read_table(run_dir / "evaluation" / "routing" / "capts" / "seed=0" / "scores.parquet")
    assert scores.column_names == ["request_id", "position", "trigger_item_id", "value", "uniqueness"]
    value_TC = scores["value"].combine_chunks().flatten().to_numpy().reshape(len(scores), len(channels))
    assert ((value_TC > 0) & (value_TC < 1)).all() and (value_TC.std(axis=0) > 0).all()
    scored = set(zip(scores["request_id"].to_pylist(), scores["trigger_item_id"].to_pylist(), strict=True))
    for selector in ROUTED:
        picks = pq.read_table(run_dir / "routing" / f"{selector}.parquet")
        assert picks.column_names == ["request_id", "channel", "rank", "trigger_item_id", "score"]
        assert set(zip(picks["request_id"].to_pylist(), picks["trigger_item_id"].to_pylist(), strict=True)) <= scored
        of_request = Counter(picks["request_id"].to_pylist())
        of_channel = Counter(zip(picks["request_id"].to_pylist(), picks["channel"].to_pylist(), strict=True))
        assert len(of_request) == requests and {channel for _, channel in of_channel} == set(channels), selector
        assert max(of_request.values()) <= budget * len(channels), selector
        # The joint assignment shares one quota: routing.joint_shift (0.2) moves one of three picks between channels.
        assert max(of_channel.values()) <= budget + (selector == "capts-joint"), selector
    recall = {}
    for selector in (*ROUTED, "popular"):
        for name, found in measured[selector][f"budget={budget}"]["overall"].items():
            if name.startswith("recall@"):
                assert 0 < found["mean"] <= 1 and found["n"] == requests and set(found["per_seed"]) == {"0"}, selector
        recall[selector] = measured[selector][f"budget={budget}"]["overall"]["recall@50"]["mean"]
    # Neither learns anything: this is of the world and its lists alone, in which they are 0.14 apart.
    assert recall["oracle"] > recall["recent"]


def test_the_same_run_again_does_nothing(untouched):
    run_dir, _ = untouched
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.parquet")}
    output = finish(start(run_dir))
    assert "crm: already done for the same inputs" in output
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.parquet")} == before


def test_the_embedding_channel_of_a_tower(tmp_path):
    """The tower is trained slice by slice, each snapshot is of an index that saw nothing later, and neighbours are no
    less watched than items are on the whole (a bias that counts as a direction makes the least watched ones everybody's
    neighbours)."""
    run_dir = tmp_path / "run"
    finish(start(run_dir, "stages=[channels]", "channels.names=[embedding]", "channels.embedding.source=crm",
                 "data.synth.users=300", "data.synth.views_per_user=40"))
    watermarks = sorted(int(path.name) for path in (run_dir / "channels" / "embedding").iterdir()
                        if path.name.isdigit())
    indexes = {int(path.name.split("-")[0]) for path in (run_dir / "indexes/channel-embedding/seed=0").iterdir()
               if path.name[0].isdigit()}
    assert len(watermarks) > 3 and indexes == set(watermarks)
    lists = pq.read_table(run_dir / f"channels/embedding/{watermarks[-1]}/neighbors.parquet")
    known = pq.read_table(run_dir / f"channels/item-statistics/{watermarks[-1]}/statistics.parquet")
    views = dict(zip(known["item_id"].to_pylist(), known["views"].to_pylist(), strict=True))
    neighbours = lists["neighbors"].combine_chunks().flatten().to_pylist()
    assert len(lists) > 0.9 * len(views)
    assert np.mean([views[item] for item in neighbours]) > 0.5 * np.mean(list(views.values()))  # 0.9; with the bias 0.1


def test_a_worker_killed_and_a_driver_ended_in_training_change_nothing(untouched, tmp_path):
    run_dir = tmp_path / "run"
    # A checkpoint a step: the worker is as good as always killed amid a save, and training lasts longer than a signal
    # takes to arrive.
    process = start(run_dir, "train.grace_s=120", "train.checkpoint_every_steps=1")
    try:
        killed = _kill_a_worker(process.pid, run_dir)
        resumed = _wait_for(process, lambda: list(read_events(run_dir / "events.jsonl", "resume")))
        _wait_for(process, lambda: any(name.startswith("decision_transformer") for name, _ in losses(run_dir)))
        process.send_signal(signal.SIGTERM)
        ended = finish(process, code=143)
        # None where the group had no step left to stop at by the time it heard of the signal.
        stops = list(read_events(run_dir / "events.jsonl", "stop"))
        assert len(stops) <= 1 and all("SIGTERM" in stop["reason"] for stop in stops)
        assert "run the same command again" in ended
        assert not list(run_dir.rglob("*.writing")) and not list(run_dir.rglob("*.attempt-*.tmp"))
        process = start(run_dir)
        output = finish(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(60)
    assert killed
    assert resumed[0]["global_step"] >= 1, output[-3000:]
    for stop in stops:
        again = [e for e in read_events(run_dir / "events.jsonl", "resume") if e["model"] == stop["model"]]
        assert [e["global_step"] for e in again] == [stop["step"]], "it goes on from the step at which it stopped"
    drivers = {int(path.name) for path in (run_dir / "attempts").iterdir() if path.name.isdecimal()}
    assert json.loads((run_dir / "attempts" / "record.json").read_text())["last"] >= max(drivers)
    assert losses(run_dir) == losses(untouched[0])
    assert {model for model, _ in losses(run_dir)} == {f"{name}/seed=0" for name in
                                                       ("dnn", "decision_transformer", "capts")}
    for path in sorted(untouched[0].glob("evaluation/*/*/queries.parquet")):
        mine, other = pq.read_table(run_dir / path.relative_to(untouched[0])), pq.read_table(path)
        for name in other.column_names:  # NumPy's comparison, for which NaN (no hit, no watch time of it) equals NaN
            np.testing.assert_array_equal(mine[name].to_numpy(), other[name].to_numpy(), err_msg=f"{path} {name}")
    for path in (*untouched[0].glob("evaluation/routing/*/*/scores.parquet"), *untouched[0].glob("routing/*.parquet")):
        assert pq.read_table(run_dir / path.relative_to(untouched[0])).equals(pq.read_table(path)), path
    mine, other = (json.loads((folder / "metrics.json").read_text()) for folder in (run_dir, untouched[0]))
    assert mine["routing"] == other["routing"] and set(ROUTED) < set(other["routing"])


def _wait_for(process: subprocess.Popen, seen, timeout_s: float = 600):
    """What `seen` finds, as soon as it finds anything, while the run goes on."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if found := seen():
            return found
        time.sleep(0.05)
    raise AssertionError(f"the run came to nothing (exit code {process.poll()})")


def _kill_a_worker(driver: int, run_dir: Path, timeout_s: float = 600) -> bool:
    """SIGKILL to one of the two training workers, once a checkpoint is there and the epoch goes on."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        events = run_dir / "events.jsonl"
        if events.exists() and any(True for _ in read_events(events, "checkpoint")):
            workers = [p for p in psutil.Process(driver).children(recursive=True) if "RayTrainWorker" in p.name()
                       or any("RayTrainWorker" in word for word in p.cmdline())]
            if len(workers) == 2:
                os.kill(workers[1].pid, signal.SIGKILL)
                return True
        time.sleep(0.05)
    return False
