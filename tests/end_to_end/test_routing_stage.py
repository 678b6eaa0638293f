"""The judgement of routing on a local Ray: the same figures as one process gives, and a worker's error as it is."""

import json
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from launch.routing import RayExecutor, SerialExecutor, evaluate_routing

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from made_routing import made_routing_run, routing_config  # noqa: E402


@pytest.fixture(scope="module")
def executor(two_cpus):
    return RayExecutor()


def test_ray_and_one_process_find_the_same(executor, tmp_path):
    run = made_routing_run(tmp_path / "run", 5)
    evaluate_routing(routing_config(run), run, SerialExecutor())
    alone = json.loads((run / "evaluation" / "routing" / "metrics.json").read_text())
    picks = {path.name: path.read_bytes() for path in (run / "routing").iterdir()}
    evaluate_routing(routing_config(run), run, executor)
    assert json.loads((run / "evaluation" / "routing" / "metrics.json").read_text()) == alone
    assert {path.name: path.read_bytes() for path in (run / "routing").iterdir()} == picks


def test_an_error_of_a_worker_is_ours(executor, tmp_path):
    run = made_routing_run(tmp_path / "run", 2)
    for channel in (run / "channels").iterdir():  # without the earliest snapshot the first cut has none to see
        (sorted(channel.iterdir())[0] / "manifest.json").unlink()
    with pytest.raises(InputError, match="comes before the first snapshot"):
        evaluate_routing(routing_config(run), run, executor)
