"""The replay stage on a local Ray: the same bytes as one process writes, and a worker's error as it is."""

import json
import os
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from launch.ingest import RayExecutor, SerialExecutor
from launch.replay import make_labels, replay_labels

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from made_replay import config_of, files_of, made_run  # noqa: E402


@pytest.fixture(scope="module")
def executor():
    """One Ray for the whole module, with two CPUs."""
    import ray

    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "PYTHONPATH")}
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             object_store_memory=200 << 20)
    yield RayExecutor()
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def test_ray_and_one_process_write_the_same_bytes(executor, tmp_path, capsys):
    run = made_run(tmp_path / "run", 8)
    config = config_of(run, shards_at_once=2)
    make_labels(config, run, SerialExecutor())
    alone = files_of(run / "labels")
    said = replay_labels(config, run)
    assert files_of(run / "labels") == alone
    assert said["rows"] > said["requests"] > 50 and "replay: " in capsys.readouterr().out
    assert json.loads((run / "events.jsonl").read_text())["event"] == "replay"


def test_an_error_of_a_worker_is_ours(executor, tmp_path):
    run = made_run(tmp_path / "run", 2)
    for channel in (run / "channels").iterdir():  # without the earliest snapshot the first cut has none to see
        (sorted(channel.iterdir())[0] / "manifest.json").unlink()
    with pytest.raises(InputError, match="comes before the first snapshot"):
        make_labels(config_of(run), run, executor)
