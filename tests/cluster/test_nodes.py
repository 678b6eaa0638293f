"""A run spread over two and three Ray nodes, each with an object store of its own, and what happens to them: a node is
lost, the head is started anew, one is slow. What comes out equals the run of one node to the bit.

Nodes are processes of this machine (tests/faults/nodes.py): at one address, and, as root, each in a network and with a
host name of its own.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from kills import Outcome  # noqa: E402
from ray_nodes import RayNodes, can_have_networks, ray_nodes  # noqa: E402
from results import Results  # noqa: E402
from surroundings import SLOW_S, case, comes, ends_like, lost_node, training  # noqa: E402
from tiny_run import TinyRun, end_all  # noqa: E402

from trainer.events import read_events  # noqa: E402

SPREAD = "train.placement=strict_spread"
SHORT = ("stages=[ingest,crm,evaluate,report]", "crm.models=[{name: dnn, tower: dnn, condition: next}]")
THREE = (*SHORT, "train.workers=3", "train.batch_rows=18")
CPUS = 2  # of a node: room for two workers, so that spreading them is not a matter of room

own_networks = pytest.mark.skipif(can_have_networks() is not None, reason=str(can_have_networks()))
networks = pytest.mark.parametrize("networks", [
    False, pytest.param(True, marks=pytest.mark.skipif(can_have_networks() is not None,
                                                       reason=str(can_have_networks())))],
    ids=["one-address", "own-addresses"])


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory):
    """The results of the run of one node, by its overrides; each is made once."""
    folder, made = tmp_path_factory.mktemp("one-node"), {}

    def results(*overrides: str) -> Results:
        if overrides not in made:
            run_dir = folder / f"run-{len(made)}"
            run = TinyRun(run_dir, *overrides)
            assert run.wait() == 0, run.output[-3000:]
            made[overrides] = Results(run_dir)
        return made[overrides]

    yield results
    end_all()


def started(nodes: RayNodes, run_dir: Path, *overrides: str) -> TinyRun:
    return TinyRun(run_dir, SPREAD, *overrides, environment=nodes.environment, prefix=nodes.prefix)


def check_spread(nodes: RayNodes, count: int, outcome: Outcome) -> None:
    """A worker on each node, by the raylets that started them."""
    found = [len(workers) for workers in nodes.workers_by_node()]
    if found != [1] * count:
        outcome.wrong.append(f"workers by node: {found}")


def spread_over(count: int, run_dir: Path, reference: Results, networks: bool, *overrides: str,
                own_disks: Path | None = None) -> Outcome:
    log = (own_disks or run_dir).with_name("nodes.log")
    with (ray_nodes(log, count, cpus=CPUS, networks=networks, own_disks=own_disks) as nodes,
          case(run_dir, f"{count} nodes") as outcome):
        run, outcome.starts = started(nodes, run_dir, *overrides), 1
        comes(run, run_dir, training(2))
        check_spread(nodes, count, outcome)
        if own_disks is not None:
            outcome.wrong += [f"{worker.pid} does not work in a mirror" for workers in nodes.workers_by_node()
                              for worker in workers if not Path(f"/proc/{worker.pid}/root{run_dir}/.mirror").is_dir()]
            assert not (run_dir / ".mirror").exists()
        ends_like(run_dir, reference, outcome, lambda: started(nodes, run_dir, *overrides), run)
    return outcome


@networks
def test_two_nodes_come_to_what_one_comes_to(on_one_node, tmp_path, networks):
    """Every stage, CAPTS too."""
    run_dir = tmp_path / "run"
    outcome = spread_over(2, run_dir, on_one_node(), networks)
    assert outcome.wrong == [] and outcome.starts == 1, outcome.where
    if networks:
        hosts = {worker["node"] for event in read_events(run_dir / "events.jsonl", "train_step")
                 for worker in event["workers"]}
        assert hosts == {"node-1", "node-2"}


@own_networks
def test_nodes_that_share_no_disk_come_to_what_one_comes_to(on_one_node, tmp_path):
    """Every stage; all tasks and workers are on nodes that do not see the run folder, which the head has."""
    disks = tmp_path / "disks"
    disks.mkdir()
    outcome = spread_over(2, disks / "run", on_one_node(), True, own_disks=disks)
    assert outcome.wrong == [] and outcome.starts == 1, outcome.where
    groups = [event["attempt"] for event in read_events(disks / "run" / "events.jsonl", "group")]
    assert groups == [2, 3], "of the towers and of the routers, none of them started again"
    assert {path.parent.name for path in (disks / "run" / "tensorboard").rglob("events.*")} >= {"seed=0"}
    left = [path for path in (disks / "run").rglob("*") if path.suffix in (".tmp", ".writing")]
    assert not left, "what was on its way is still there"


@own_networks
def test_a_node_with_a_disk_of_its_own_is_lost(on_one_node, tmp_path):
    disks = tmp_path / "disks"
    disks.mkdir()
    outcome = lost_node(disks / "run", on_one_node(*SHORT), "lost", (SPREAD, *SHORT), cpus=CPUS, networks=True,
                        own_disks=disks)
    assert outcome.wrong == [] and outcome.starts == 1, outcome.where


def test_three_nodes_come_to_what_one_comes_to(on_one_node, tmp_path):
    outcome = spread_over(3, tmp_path / "run", on_one_node(*THREE), False, *THREE)
    assert outcome.wrong == [] and outcome.starts == 1, outcome.where


@networks
def test_another_node_takes_the_place_of_one_that_is_lost(on_one_node, tmp_path, networks):
    """With networks its link is cut first, so that nobody is told that it has gone."""
    outcome = lost_node(tmp_path / "run", on_one_node(*SHORT), "lost", (SPREAD, *SHORT), cpus=CPUS, networks=networks)
    assert outcome.wrong == [], outcome.where
    assert outcome.starts == 1, "Ray Train starts another group under the same driver"


def test_a_head_that_is_started_anew_ends_the_run_with_one_message(on_one_node, tmp_path):
    run_dir = tmp_path / "run"
    with ray_nodes(tmp_path / "nodes.log", 2, cpus=CPUS) as nodes, case(run_dir, "head") as outcome:
        run, outcome.starts = started(nodes, run_dir, *SHORT), 1
        comes(run, run_dir, training(4))
        nodes.restart()
        assert run.wait() == 1, run.output[-2000:]
        said = [line for line in run.output.splitlines() if line.startswith("watchtower:")]
        assert len(said) == 1 and "the head of the Ray cluster" in said[0] and "is gone" in said[0], run.output[-2000:]
        assert "Traceback" not in run.output and "(raylet)" not in run.output, run.output[-2000:]
        outcome.wrong += [f"still there: {one}" for one in run.left()]
        ends_like(run_dir, on_one_node(*SHORT), outcome, lambda: started(nodes, run_dir, *SHORT), allowed=(0,))
    assert outcome.wrong == [], outcome.where


def test_a_straggler_changes_nothing(on_one_node, tmp_path):
    run_dir = tmp_path / "run"
    with ray_nodes(tmp_path / "nodes.log", 2, cpus=CPUS) as nodes, case(run_dir, "straggler") as outcome:
        run, outcome.starts = started(nodes, run_dir, *SHORT), 1
        comes(run, run_dir, training(2))
        check_spread(nodes, 2, outcome)
        straggler = nodes.workers_by_node()[-1][0]
        straggler.send_signal(signal.SIGSTOP)
        time.sleep(SLOW_S)
        straggler.send_signal(signal.SIGCONT)
        ends_like(run_dir, on_one_node(*SHORT), outcome, lambda: started(nodes, run_dir, *SHORT), run)
    assert outcome.wrong == [] and outcome.starts == 1, outcome.where
    slowest = max(event["step_s"] for event in read_events(run_dir / "events.jsonl", "train_step"))
    assert slowest > SLOW_S / 2, "nobody waited for it"


def test_a_gang_without_room_says_what_is_missing(tmp_path):
    with ray_nodes(tmp_path / "nodes.log", 1, cpus=CPUS) as nodes:
        run = started(nodes, tmp_path / "run", "stages=[crm]", "train.wait_s=5")
        assert run.wait() == 1, run.output[-2000:]
        assert "on a node of its own (train.placement: strict_spread)" in run.output, run.output[-2000:]
        assert "room for 1: 1 missing" in run.output and run.output.count("watchtower:") == 1, run.output[-2000:]
        assert "Traceback" not in run.output and run.left() == [], run.output[-2000:]
