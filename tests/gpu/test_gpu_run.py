"""The smoke run on a GPU: one worker over NCCL in bf16, the index there too, the same gates as on two CPU workers."""

import json
import subprocess
import sys

import faiss
import pytest

pytestmark = pytest.mark.timeout(900)
INDEX = "cuda" if hasattr(faiss, "StandardGpuResources") else "cpu"


def watchtower(repository, run_dir):
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "run", "configs/smoke.yaml", f"run_dir={run_dir}", "train.workers=1",
         "train.device=cuda", f"index.device={INDEX}", "train.checkpoint_every_steps=10"],
        cwd=repository, text=True, capture_output=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, repository):
    run_dir = tmp_path_factory.mktemp("gpu") / "run"
    done = watchtower(repository, run_dir)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run_dir


def test_the_gates_hold(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["crm"]["dnn"]["oracle"]["recall@100"]["mean"] > 0.8


def test_the_workers_were_on_the_gpu(run):
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert {event["device"] for event in events if event["event"] == "group"} == {"cuda:0"}


def test_the_same_command_again_trains_nothing(run, repository):
    before = (run / "metrics.json").read_bytes()
    assert watchtower(repository, run).returncode == 0
    assert (run / "metrics.json").read_bytes() == before
