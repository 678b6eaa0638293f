"""The replay stage on a local Ray: the same bytes as one process writes, and a worker's error as it is."""

import json
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from launch.ingest import RayExecutor, SerialExecutor
from launch.replay import make_labels, replay_labels

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from made_replay import config_of, files_of, made_run  # noqa: E402


@pytest.fixture(scope="module")
def executor(two_cpus):
    return RayExecutor()


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
