"""The real run made tiny: `watchtower run` as a user types it, on a synthetic world, Ray Train and two workers.

Two runs of the same config: one is left alone, one loses a worker to SIGKILL in the middle of its training. Both must
end with the same losses and the same evaluation, to the bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from trainer.events import read_events

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["data.synth.users=150", "data.synth.items=200", "train.epochs=2", "train.checkpoint_every_steps=4",
        "train.log_every_steps=1", "train.batch_rows=16", "evaluate.queries=100", "evaluate.curve_queries=40",
        "evaluate.validation_queries=50", "gates.at_least={}"]


def start(run_dir: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", "configs/smoke.yaml", f"run_dir={run_dir}", *TINY, *overrides],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, timeout_s: float = 300) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        raise
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("untouched") / "run"
    return run_dir, finish(start(run_dir))


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


def test_the_same_run_again_does_nothing(untouched):
    run_dir, _ = untouched
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.parquet")}
    output = finish(start(run_dir))
    assert "crm: already done for the same inputs" in output
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.parquet")} == before


def test_a_worker_killed_in_training_changes_nothing(untouched, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    try:
        killed = _kill_a_worker(process.pid, run_dir)
        output = finish(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    assert killed
    resumed = list(read_events(run_dir / "events.jsonl", "resume"))
    assert resumed and resumed[0]["global_step"] >= 4, output[-3000:]
    assert losses(run_dir) == losses(untouched[0])
    for path in sorted(untouched[0].glob("evaluation/*/*/queries.parquet")):
        mine, other = pq.read_table(run_dir / path.relative_to(untouched[0])), pq.read_table(path)
        for name in other.column_names:  # NumPy's comparison, for which NaN (no hit, no watch time of it) equals NaN
            np.testing.assert_array_equal(mine[name].to_numpy(), other[name].to_numpy(), err_msg=f"{path} {name}")


def _kill_a_worker(driver: int, run_dir: Path, timeout_s: float = 200) -> bool:
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
