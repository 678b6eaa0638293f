"""What a run asks Ray for, and what it says where a cluster lacks it; no Ray is started."""

import threading

import pytest

from configs.errors import InputError, WatchtowerError
from configs.schema import Config
from launch import cli, doctor, local_ray, resources, train
from launch.local_ray import local_cpus, threads_per_worker
from launch.resources import Node, missing_for_task, missing_here, missing_workers, room_for, scaling, worker_resources


def node(address, cpus, gpus=0.0):
    return Node(address, {"CPU": cpus, **({"GPU": gpus} if gpus else {}), "memory": 1e9})


SMALL = [node("10.0.0.1", 0), node("10.0.0.2", 4, 1), node("10.0.0.3", 1, 1), node("10.0.0.4", 4)]


def test_what_ray_train_is_asked_for():
    assert scaling(Config(), False, 2, 2) == {
        "num_workers": 2, "use_gpu": False, "resources_per_worker": {"CPU": 1.0}, "placement_strategy": "PACK"}
    config = Config(train={"workers": {"min": 1, "max": 4}, "cpus_per_worker": 6, "gpus_per_worker": 0.75,
                           "placement": "spread"})
    assert scaling(config, True, 1, 4) == {"num_workers": (1, 4), "use_gpu": True, "placement_strategy": "SPREAD",
                                           "resources_per_worker": {"CPU": 6.0, "GPU": 0.75}}


def test_ray_train_takes_it():
    pytest.importorskip("ray.train")
    from ray.train import ScalingConfig

    for placement in ("pack", "spread", "strict_spread"):
        config = Config(train={"cpus_per_worker": 0.5, "gpus_per_worker": 0.6, "placement": placement})
        found = ScalingConfig(**scaling(config, True, 2, 2))
        assert found._resources_per_worker_not_none == {"CPU": 0.5, "GPU": 0.6}
        assert found.placement_strategy == placement.upper()


@pytest.mark.parametrize(("asked", "placement", "room"), [
    ({"CPU": 1.0}, "pack", 9), ({"CPU": 1.0}, "strict_spread", 3), ({"CPU": 3.0}, "spread", 2),
    ({"CPU": 0.1}, "pack", 90),
    ({"CPU": 1.0, "GPU": 1.0}, "pack", 2), ({"CPU": 2.0, "GPU": 1.0}, "pack", 1), ({"GPU": 0.3}, "pack", 6),
    ({"CPU": 5.0}, "pack", 0)])
def test_room(asked, placement, room):
    assert room_for(SMALL, asked, placement) == room


def test_what_is_missing_names_what_each_worker_asks_for_and_which_nodes_are_too_small():
    config = Config(train={"cpus_per_worker": 2, "placement": "strict_spread", "workers": 4})
    assert missing_workers(config, 4, True, SMALL, {}) == (
        "train.workers asks for at least 4, each with 2 CPUs and 1 GPU on a node of its own (train.placement: "
        "strict_spread); the cluster has 4 nodes with 9 CPUs and 2 GPUs in all, room for 1: 3 missing (10.0.0.1 lacks "
        "2 CPUs and 1 GPU; 10.0.0.3 lacks 1 CPU; 10.0.0.4 lacks 1 GPU)")


def test_a_node_that_has_room_for_many_is_one_under_strict_spread():
    config = Config(train={"placement": "strict_spread", "workers": 4})
    told = missing_workers(config, 4, False, [node("10.0.0.1", 64), node("10.0.0.2", 64)], {"CPU": 128})
    assert told.endswith("the cluster has 2 nodes with 128 CPUs and 0 GPUs in all, room for 2: 2 missing")


def test_many_small_nodes_are_not_all_named():
    told = missing_workers(Config(train={"cpus_per_worker": 8}), 2, False,
                           [node(f"10.0.1.{at}", 4) for at in range(20)], {})
    assert "10.0.1.7 lacks 4 CPUs, and 12 more)" in told and "10.0.1.8" not in told


def test_room_that_others_hold_is_told_apart():
    told = missing_workers(Config(), 2, False, [node("10.0.0.2", 4)], {"CPU": 1.0})
    assert "1 node with 4 CPUs and 0 GPUs in all, room enough" in told and told.endswith("free now are 1 CPU")


def test_the_driver_says_it(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(resources, "living_nodes", lambda: SMALL)
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 9.0})
    told = train._missing(Config(train={"workers": 4, "device": "cuda", "cpus_per_worker": 2}))
    assert told.startswith("train.workers asks for at least 4, each with 2 CPUs and 1 GPU; the cluster has 4 nodes")
    assert "room for 1: 3 missing" in told and told.endswith("the same command goes on from the last checkpoint")


def test_a_cluster_is_waited_for_and_this_machine_is_not(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(resources, "living_nodes", lambda: SMALL)
    config = Config(train={"workers": 4, "device": "cuda"})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert train.wants_gpu(config)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(InputError, match="workers=4, but this machine has 2 GPUs"):
        train.wants_gpu(config)
    for device, workers, expected in (("auto", 2, True), ("auto", 4, False), ("cpu", 2, False)):
        assert train.wants_gpu(Config(train={"workers": workers, "device": device})) is expected


def test_tasks():
    config = Config(ray={"channels_cpus": 4.5})
    assert missing_for_task(config, "ingest", SMALL) is None
    assert missing_for_task(config, "channels", SMALL) == (
        "ray.channels_cpus asks for 4.5 CPUs a task, and the largest of the cluster's 4 nodes has 4")


def test_a_task_does_not_wait_for_ever(monkeypatch):
    ended, errors, nodes = threading.Event(), [], []
    monkeypatch.setattr(resources, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(resources, "living_nodes", lambda: nodes)
    monkeypatch.setattr(resources, "interrupt", lambda error: (errors.append(error), ended.set()))
    config = Config(train={"wait_s": 0.1}, ray={"replay_cpus": 8})
    with resources.waiting_for_room(config, "replay"):
        assert ended.wait(20)
    assert isinstance(errors[0], WatchtowerError)
    assert "no task of replay could start: ray.replay_cpus asks for 8 CPUs" in str(errors[0])
    nodes.append(node("10.0.0.1", 8))
    with resources.waiting_for_room(config, "replay"):
        threading.Event().wait(0.3)
    assert len(errors) == 1, "a node with room has come"


def test_a_local_ray_is_told_of_enough(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = Config(train={"workers": 2, "cpus_per_worker": 3}, ray={"channels_cpus": 4})
    assert local_cpus(config, cores=2) == 10 and threads_per_worker(config, cores=2) == 3
    assert threads_per_worker(Config(train={"cpus_per_worker": 0.5}), cores=2) == 1
    assert worker_resources(Config(), gpu=True) == {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(("changed", "says"), [
    ({}, None),
    ({"train": {"placement": "strict_spread"}}, "have one node"),
    ({"train": {"placement": "strict_spread", "workers": 1}}, None),
    ({"ray": {"cpus": 2}}, None),
    ({"ray": {"cpus": 2}, "train": {"cpus_per_worker": 1.5}}, "2 workers of 1.5 CPUs need 3"),
    ({"ray": {"cpus": 2, "routing_cpus": 3}}, "a task asks for 3"),
])
def test_what_a_local_ray_can_never_have(changed, says):
    config = Config(**changed)
    found = missing_here(config, config.train.most_workers)
    assert found is None if says is None else says in found


def test_a_run_that_no_local_ray_can_have_ends_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "c.yaml"
    path.write_text(f"run_dir: '{tmp_path / 'run'}'\ntrain: {{placement: strict_spread}}")
    assert cli.main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert "workers of a local Ray have one node" in said and "fix: take pack or spread" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mistake", [
    {"placement": "strict_spread", "workers": {"min": 1, "max": 2}}, {"gpus_per_worker": 0.5}, {"gpus_per_worker": 2},
    {"cpus_per_worker": 0}, {"placement": "near"}])
def test_what_cannot_be_asked_for(mistake):
    with pytest.raises(ValueError, match=r"strict_spread|NCCL|less than or equal to 1|greater than 0|placement"):
        Config(train=mistake)


@pytest.mark.parametrize(("changed", "levels"), [
    ({"train": {"workers": 2}}, ["ok"]), ({"train": {"workers": 3, "batch_rows": 63}}, ["ok"]),
    ({"train": {"workers": 2, "placement": "strict_spread", "cpus_per_worker": 5}}, ["error"]),
    ({"ray": {"ingest_cpus": 5, "replay_cpus": 6}}, ["ok", "error", "error"])])
def test_doctor_looks_at_the_room_of_a_cluster(changed, levels):
    found = list(doctor.check_room(Config(**changed), SMALL))
    assert [finding.level for finding in found] == levels, found
    assert all(finding.fix for finding in found if finding.level == "error")


# --- a head that is lost ----------------------------------------------------------------------------------------------

@pytest.fixture
def head(monkeypatch):
    """A head that answers as long as `alive` holds, and calls itself `name`."""
    ray = pytest.importorskip("ray")
    state = {"alive": True, "name": "one"}

    class Context:
        gcs_address = "10.0.0.1:6379"

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(local_ray, "_answers", lambda address: state["alive"])
    monkeypatch.setattr(local_ray, "_cluster_id", lambda address: state["name"] if state["alive"] else None)
    return state


@pytest.mark.parametrize("what", [{"alive": False}, {"name": "two"}])
def test_what_fails_because_the_head_was_lost_is_told_as_that(head, what):
    with pytest.raises(WatchtowerError, match=r"head of the Ray cluster at x:1 is gone.*goes on from"), \
            local_ray.watched_head("x:1"):
        head.update(what)
        raise WatchtowerError("the training workers failed: an actor is unavailable")


def test_other_errors_stay_what_they_are(head):
    for error in (RuntimeError("a"), InputError("b")):
        with pytest.raises(type(error), match=str(error)), local_ray.watched_head("x:1"):
            raise error
    with pytest.raises(InputError, match="c"), local_ray.watched_head("x:1"):
        head["alive"] = False
        raise InputError("c")


def test_a_head_that_stays_away_ends_the_run(head, monkeypatch):
    ended, errors = threading.Event(), []
    monkeypatch.setattr(local_ray, "HEAD_LOOK_S", 0.02)
    monkeypatch.setattr(local_ray, "HEAD_AWAY_S", 0.2)
    monkeypatch.setattr(local_ray, "interrupt", lambda error: (errors.append(error), ended.set()))
    with local_ray.watched_head("x:1"):
        assert not ended.wait(0.5)
        head["alive"] = False
        assert ended.wait(20)
    assert "is gone" in str(errors[0])


def test_what_the_cluster_tells_is_a_line_of_ours(capsys, monkeypatch):
    worker = pytest.importorskip("ray._private.worker")
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    local_ray._say_first_lines_alone()
    worker.print_to_stdstream({"lines": ["\nRaylet is terminated.\n    [log line]\n"], "pid": "raylet"}, False)
    assert capsys.readouterr().err == "Ray: Raylet is terminated.\n"
