"""Stages: each runs when it is asked for or needed and not done for the same inputs, and never otherwise."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys

import pytest

from configs.errors import InputError, QualityGateError, WatchtowerError
from configs.loader import load
from configs.schema import Config
from embeddings.snapshots import publish
from launch import stages
from launch.local_ray import (
    local_cpus,
    local_workers,
    object_store_bytes,
    threads_per_worker,
    usable_cores,
    worker_environment,
    worker_limits,
)
from launch.run_folder import LOCK_NAME, locked, make_run_folder, sweep
from trainer.events import read_events
from trainer.results import write_pointer

WRITES = {"ingest": ["sequences/manifest.json"], "crm": ["indexes/serving.json"], "evaluate": ["metrics.json"],
          "channels": ["channels/swing/1/manifest.json"], "replay": ["labels/manifest.json"],
          "router": ["evaluation/routing/capts/seed=0/scores.parquet"],
          "routing": ["metrics.json", "evaluation/routing/metrics.json", "routing/capts.parquet"],
          "report": ["report.html"]}
METRICS = {"crm": {"dnn": {"oracle": {"recall@100": {"mean": 0.4}}}}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder on whose stages stand-ins work that write one file each; `ran` says which did."""
    ran = []

    def stand_in(name):
        def call(config, run_dir):
            ran.append(name)
            for file in WRITES[name]:
                path = run_dir / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(METRICS if file == "metrics.json" else {}))
            return {"rows": 7}
        return call

    for name, stage in stages.STAGES.items():
        monkeypatch.setattr(stages, f"stand_in_{name}", stand_in(name), raising=False)
        monkeypatch.setitem(stages.STAGES, name, stages.Stage(
            name, stage.needs, f"launch.stages:stand_in_{name}", stage.outputs, stage.reads, on_ray=False,
            files=stage.files, pointers=stage.pointers))
    monkeypatch.setattr(stages, "write_synthetic_world", lambda config, run_dir, check: None)
    monkeypatch.setattr(stages, "show_results", lambda run_dir: None)
    run_dir = tmp_path / "run"

    def run(*overrides, only=None):
        ran.clear()
        (tmp_path / "c.yaml").write_text(f"run_dir: '{run_dir}'")
        stages.run(load(tmp_path / "c.yaml", overrides), only)
        return list(ran)

    run.path = run_dir
    return run


CRM, CAPTS = ["crm", "evaluate"], ["channels", "replay", "router", "routing"]
EVERYTHING = ["ingest", *CRM, *CAPTS, "report"]


def test_everything_once(folder, capsys):
    assert folder() == EVERYTHING
    assert folder() == []
    said = capsys.readouterr().out
    for name in EVERYTHING:
        assert f"{name}: already done for the same inputs" in said
    marker = stages.marker(folder.path, "crm")
    assert {"inputs", "seconds", "rows", "peak_mib", "finished"} <= marker.keys()
    assert marker["rows"] == 7 and marker["peak_mib"] > 5
    noted = json.loads((folder.path / "metrics.json").read_text())["stages"]
    assert noted.keys() == set(EVERYTHING) and noted["ingest"].keys() == {"seconds", "rows", "peak_mib"}
    assert load(folder.path).run_dir == str(folder.path)
    assert not (folder.path / LOCK_NAME).exists()
    assert [(e["stage"], e["status"]) for e in read_events(folder.path / "events.jsonl", "stage")] == [
        (name, status) for name in EVERYTHING for status in ("started", "done")]


def test_a_stage_runs_what_it_needs_and_only_that(folder):
    assert folder(only=["crm"]) == ["ingest", "crm"]
    assert folder("stages=[crm, report]") == ["evaluate", "report"]
    assert folder("stages=[crm, evaluate]", only=["evaluate"]) == []
    assert folder(only=["evaluate"]) == CAPTS
    assert folder("stages=[router]") == []


def test_channels_train_no_towers(folder):
    assert folder("channels.names=[swing]", "stages=[channels]") == ["ingest", "channels"]
    assert folder("channels.names=[swing]", "stages=[router, report]") == ["replay", "router", "routing", "report"]
    assert folder("channels.names=[swing]", "router.from_crm=true", "stages=[router]") == [
        "crm", "router", "routing"]


@pytest.mark.parametrize(("override", "again"), [
    ("data.utc_offset_h=8", EVERYTHING),
    ("data.synth.seed=1", EVERYTHING),
    ("train.epochs=9", [*CRM, "router", "routing", "report"]),
    ("split.test_days=2", EVERYTHING[1:]),
    ("seeds=[1]", [*CRM, "router", "routing", "report"]),
    ("crm.tower.dim=32", [*CRM, "report"]),
    ("index.factory=HNSW32", [*CRM, "report"]),
    ("evaluate.queries=100", ["evaluate", "report"]),
    ("crm.publish=dnn", ["evaluate", "report"]),
    ("channels.swing.alpha=2", [*CAPTS, "report"]),
    ("channels.session.decay_h=2", []),
    ("replay.tau_s=4", [*CAPTS[1:], "report"]),
    ("router.dim=32", [*CAPTS[2:], "report"]),
    ("routing.budgets=[5]", ["routing", "report"]),
    ("name=other", ["report"]),
    ("train.workers=1", []),
    ("train.log_every_steps=1", []),
    ("ray.cpus=3", []),
    ("ray.channels_cpus=2", []),
    ("train.placement=spread", []),
    ("train.cpus_per_worker=2", []),
    ("index.threads=1", []),
])
def test_only_what_a_key_can_change_is_done_again(folder, override, again, capsys):
    folder()
    capsys.readouterr()
    assert folder(override) == again
    if again:
        said = capsys.readouterr().out
        key, _, value = override.partition("=")
        assert f"{again[0]}: again  changed: " in said and key.split(".")[-1] in said
        assert folder(override) == []


def test_what_is_gone_is_made_again_with_what_follows(folder, capsys):
    folder()
    (folder.path / "indexes/serving.json").unlink()
    (folder.path / "indexes").rmdir()
    assert folder() == [*CRM, "report"]
    assert "crm: again  indexes is gone" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ['{"folder": "indexes/a', '{"folder": "indexes/a", "sha256": "0"}'])
def test_a_damaged_pointer_is_made_again(folder, damage, capsys):
    folder()
    write_pointer(folder.path / "indexes/serving.json", {"folder": "indexes/a"})
    assert folder() == []
    (folder.path / "indexes/serving.json").write_text(damage)
    ran = folder()
    assert "evaluate" in ran and "crm" not in ran
    assert "evaluate: again  indexes/serving.json is gone or damaged" in capsys.readouterr().out


def test_a_stage_that_fails_is_not_done(folder, monkeypatch):
    def fail(config, run_dir):
        raise WatchtowerError("no")
    good = stages.stand_in_crm
    monkeypatch.setattr(stages, "stand_in_crm", fail)
    with pytest.raises(WatchtowerError, match="no"):
        folder()
    assert [e["status"] for e in read_events(folder.path / "events.jsonl", "stage")][-1] == "failed"
    assert not (folder.path / LOCK_NAME).exists()
    monkeypatch.setattr(stages, "stand_in_crm", good)
    assert folder() == EVERYTHING[1:]


def test_a_stage_that_writes_nothing_is_a_failure(folder, monkeypatch):
    monkeypatch.setattr(stages, "stand_in_ingest", lambda config, run_dir: None)
    with pytest.raises(WatchtowerError, match="did not write sequences/manifest.json"):
        folder()


def test_files_are_inputs_by_size_and_time_not_by_place(folder, tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.parquet").write_bytes(b"1")
    assert folder(f"data.logs={logs}") == EVERYTHING
    logs.rename(tmp_path / "moved")
    assert folder(f"data.logs={tmp_path / 'moved'}") == []
    assert folder(f"data.logs={logs}") == []  # the logs are gone, what was made of them is not
    (tmp_path / "moved" / "b.parquet").write_bytes(b"2")
    assert folder(f"data.logs={tmp_path / 'moved'}") == EVERYTHING


def test_no_logs_and_no_world(folder):
    with pytest.raises(InputError, match="data.logs: missing"):
        folder("data.synth=null")
    with pytest.raises(InputError, match="data.items: given, but data.logs is not"):
        folder("data.items=items.parquet")
    assert not folder.path.exists()


@pytest.mark.parametrize("override", ["data.logs=/nowhere/logs", "split.test_users=/nowhere/users.parquet"])
def test_files_that_are_missing_are_told_before_anything_starts(folder, override):
    with pytest.raises(InputError, match=f"{override.partition('=')[0]}: /nowhere/.* does not exist"):
        folder(override)
    assert not folder.path.exists()


def test_gates(folder):
    assert folder("gates.at_least.crm.dnn.oracle.recall@100=0.4") == EVERYTHING
    with pytest.raises(QualityGateError, match=r"2 of 2 quality gates.*\n.*@100 is 0.4, at least 0.5.*\n.*nothing"):
        folder("gates.at_least.crm.dnn.oracle.recall@100=0.5", "gates.at_least.crm.nothing=0")
    folder("gates.at_least.crm.nothing=0", only=["ingest"])  # nothing is measured, nothing is judged


def test_the_world_takes_the_place_of_logs(tmp_path):
    config = Config(run_dir=str(tmp_path), data={"synth": {"users": 5, "items": 20, "views_per_user": 4}})
    resolved = stages.with_world(config, tmp_path)
    assert resolved.data.logs == str(tmp_path / "world" / "logs")
    assert stages.data_source(resolved) == stages.data_source(config) == {"synth": config.data.synth.model_dump()}
    assert stages.write_synthetic_world(config, tmp_path) == stages.write_synthetic_world(config, tmp_path) > 0
    assert (tmp_path / "world/items.parquet").is_file()
    smaller = Config(run_dir=str(tmp_path), data={"synth": {"users": 3, "items": 20, "views_per_user": 4}})
    stages.write_synthetic_world(smaller, tmp_path)
    assert json.loads((tmp_path / "world/world.json").read_text())["spec"]["users"] == 3
    for path in sorted((tmp_path / "world").rglob("*.*")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        stages.write_synthetic_world(smaller, tmp_path)
        assert path.read_bytes() == whole, path


# --- the lock ---------------------------------------------------------------------------------------------------------

def test_what_a_killed_run_left_half_written_is_swept_away(tmp_path):
    kept = [tmp_path / name for name in ("stages/crm.outcome.json", "routing/capts.parquet", "ray/x.tmp", "a/b.json")]
    gone = [tmp_path / name for name in (
        "metrics.json.47.tmp", "stages/.crm.json.47.tmp", "evaluation/ceiling.47.tmp/q", "routing/.capts.parquet.tmp",
        "stages/crm.outcome.json.0.47", f"channels/swing/.1.attempt-{'0' * 32}.tmp/neighbors.parquet",
        "checkpoints/dnn/seed=0/.step-40.3f9c.writing/dense.json", "evaluation/routing/capts/.seed=0.writing/scores")]
    for path in kept + gone:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    sweep(tmp_path)
    assert [path for path in kept if not path.exists()] == [path for path in gone if path.exists()] == []
    assert not (tmp_path / "evaluation/ceiling.47.tmp").exists()


def test_two_runs_cannot_write_one_folder(tmp_path):
    with locked(tmp_path):
        with pytest.raises(WatchtowerError, match=f"written by process {os.getpid()} on {socket.gethostname()}"):
            with locked(tmp_path):
                pass
        holder = json.loads((tmp_path / LOCK_NAME).read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    code = ("import os, pathlib, sys; from launch.run_folder import locked\n"
            "with locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert (tmp_path / LOCK_NAME).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_lock_without_flock_counts_by_its_process(tmp_path, monkeypatch):
    def no_flock(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr("launch.run_folder.fcntl.flock", no_flock)
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}))
    with pytest.raises(WatchtowerError, match="remove"), locked(tmp_path):
        pass
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": "1"}))  # a reused number
    with locked(tmp_path):
        pass
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(WatchtowerError, match="on elsewhere"), locked(tmp_path):
        pass


def test_run_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "a\0b"):
        with pytest.raises(InputError, match="run_dir: "):
            make_run_folder(place)


# --- the local Ray ----------------------------------------------------------------------------------------------------

def test_a_small_machine_has_room_for_workers_and_data(monkeypatch):
    assert local_cpus(Config(), cores=2) == 4
    assert local_cpus(Config(), cores=64) == 64
    assert local_cpus(Config(train={"workers": 8}), cores=2) == 10
    assert local_cpus(Config(ray={"cpus": 3}), cores=2) == 3
    assert (threads_per_worker(Config(), cores=2), threads_per_worker(Config(), cores=16)) == (1, 8)
    assert threads_per_worker(Config(train={"threads_per_worker": 3}), cores=2) == 3


def test_workers_between_two_numbers(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = Config(train={"workers": {"min": 2, "max": 8}})
    found = {cores: (local_workers(config, cores), local_cpus(config, cores), threads_per_worker(config, cores))
             for cores in (1, 4, 64)}
    assert found == {1: ((2, 2), 4, 1), 4: ((4, 4), 6, 1), 64: ((8, 8), 64, 8)}
    on_cluster = config.model_copy(update={"ray": config.ray.model_copy(update={"address": "10.0.0.1:6379"})})
    assert worker_limits(on_cluster) == (2, 8) and worker_limits(config) == local_workers(config)
    assert (Config().train.least_workers, Config().train.most_workers) == (2, 2)
    for mistake in ({"min": 3, "max": 2}, {"min": 1, "max": 65}):  # 64 rows in a batch
        with pytest.raises(ValueError, match="above max|at least workers.max"):
            Config(train={"workers": mistake})
    assert usable_cores() >= 1
    assert object_store_bytes() > 75 * 2**20  # Ray refuses less
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    config = Config(train={"device": "cpu"})
    local, cluster = worker_environment(config, local=True), worker_environment(config, local=False)
    assert (local["GLOO_SOCKET_IFNAME"], local["DS_ACCELERATOR"], local["OMP_NUM_THREADS"]) == ("lo", "cpu", "7")
    assert "GLOO_SOCKET_IFNAME" not in cluster and "RAY_AUTH_MODE" not in cluster


def test_what_the_checksum_of_metrics_does_not_fit_is_judged_again(folder):
    folder()
    path = folder.path / "metrics.json"
    path.write_text(path.read_text().replace("0.4", "0.5"))
    assert folder() == ["evaluate", "routing", "report"]
    path.write_text(path.read_text()[:40])
    assert folder() == ["evaluate", "routing", "report"]


def test_an_output_that_was_changed_is_written_again(folder):
    folder()
    (folder.path / "evaluation" / "routing" / "metrics.json").write_text('{"a": 1}')
    assert folder() == ["routing", "report"]
    (folder.path / "report.html").write_text("half of")
    assert folder() == ["report"]
    picks = folder.path / "routing" / "capts.parquet"
    for harm in (lambda: picks.write_text("flipped"), picks.unlink):
        harm()
        assert folder() == ["routing", "report"]


@pytest.mark.parametrize("written", [["a"], "routing/capts.parquet", {"../a": "0", "routing/../../x.parquet": "0"}])
def test_a_marker_that_says_anything_leads_nowhere(folder, written):
    folder()
    path = folder.path / "stages" / "routing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"written": written}))
    assert folder() == []


def test_a_damaged_snapshot_that_is_about_to_be_read_is_made_anew(folder, monkeypatch, capsys):
    folder()
    for name, patterns in {"ingest": ("sequences",), "channels": ("channels/*/*",)}.items():
        monkeypatch.setitem(stages.STAGES, name, dataclasses.replace(stages.STAGES[name], snapshots=patterns))
    whole = publish(folder.path / "channels" / "content" / "1", lambda at: (at / "a").write_text("whole"), {})
    torn = publish(folder.path / "channels" / "swing" / "2", lambda at: (at / "a").write_text("whole"), {})
    (torn / "a").write_text("whale")
    (folder.path / "channels" / "swing" / "1" / "manifest.json").write_text('{"files": {}}')
    (folder.path / "sequences" / "manifest.json").write_text('{"files": {}}')
    note = folder.path / "stages" / "ingest.json"
    digest = hashlib.sha256(b'{"files": {}}').hexdigest()
    note.write_text(json.dumps(json.loads(note.read_text()) | {"written": {"sequences/manifest.json": digest}}))
    assert folder() == [], "nothing reads it"
    assert folder("replay.tau_s=4") == [*CAPTS, "report"]
    assert whole.exists() and not torn.exists()
    assert f"warning: {torn / 'a'}: damaged snapshot, the content does not match its checksum; it is made anew" in (
        capsys.readouterr().out)


def test_a_folder_in_the_place_of_the_run_folder_stays(tmp_path):
    """What a shared file system is mounted on, when it goes away amid a run that then fails."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(OSError), stages._no_empty_folder(run_dir):
        run_dir.rename(tmp_path / "away")
        run_dir.mkdir()
        raise OSError("gone")
    assert run_dir.exists()
    with stages._no_empty_folder(run_dir):
        pass
    assert not run_dir.exists()
