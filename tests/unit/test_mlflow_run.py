"""A run as an MLflow run, against MLflow itself with a SQLite store; what needs no MLflow is tested everywhere."""

import importlib.util
import json

import pytest

from configs.errors import InputError
from configs.loader import load
from launch.mlflow_run import flat, metric_name, metrics_of
from launch.observe import observed
from trainer.events import EventLog, read_events

has_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="MLflow is not installed here")


@pytest.fixture
def config(repository, tmp_path):
    return load(str(repository / "configs/smoke.yaml"), [
        f"run_dir={tmp_path / 'run'}", f"observe.mlflow.tracking_uri=sqlite:///{tmp_path / 'mlflow.db'}",
        "observe.mlflow.experiment=retrieval"])


def test_names_that_mlflow_takes():
    assert metric_name("dnn/seed=0/validation_recall@100") == "dnn/seed-0/validation_recall_at_100"
    assert metrics_of({"event": "train_step", "time": 1.0, "model": "dnn/seed=0", "step": 3, "steps": 9, "loss": 2.0,
                       "note": "x", "good": True}) == {"dnn/seed-0/loss": 2.0}
    assert metrics_of({"event": "epoch", "time": 1.0, "model": "m/seed=1", "step": 3, "validation_ndcg@10": 0.5}) == {
        "m/seed-1/epoch.validation_ndcg_at_10": 0.5}
    assert metrics_of({"event": "stage", "time": 1.0, "rows": 3}) == {}


def test_a_config_is_flat_text(config):
    params = flat(config)
    assert params["train.epochs"] == "3" and params["seeds"] == "[0]" and params["name"] == "smoke"
    assert all(isinstance(value, str) and len(value) <= 6000 for value in params.values())


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="MLflow is installed here")
def test_without_mlflow_it_is_said(config, tmp_path):
    with EventLog(tmp_path / "run" / "events.jsonl") as log, pytest.raises(InputError, match="pip install mlflow"), \
            observed(config, tmp_path / "run", log):
        pass


@has_mlflow
def test_a_run_and_its_continuation_are_one_mlflow_run(config, tmp_path):
    from mlflow import MlflowClient

    run_dir = tmp_path / "run"
    for at, error in ((20, KeyError), (40, None)):
        with EventLog(run_dir / "events.jsonl") as log:
            try:
                with observed(config, run_dir, log):
                    log.write("train_step", model="dnn/seed=0", step=at, loss=100 / at)
                    (run_dir / "metrics.json").write_text("{}")
                    if error:
                        raise error
            except KeyError:
                pass
    client = MlflowClient(config.observe.mlflow.tracking_uri)
    (found,) = client.search_runs([client.get_experiment_by_name("retrieval").experiment_id])
    assert found.info.run_id == json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    assert found.info.status == "FINISHED" and found.data.params["train.epochs"] == "3"
    history = client.get_metric_history(found.info.run_id, "dnn/seed-0/loss")
    assert sorted((m.step, m.value) for m in history) == [(20, 5.0), (40, 2.5)]
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["metrics.json"]


@has_mlflow
def test_what_mlflow_does_not_take_is_told_once(config, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    with EventLog(tmp_path / "run" / "events.jsonl") as log, observed(config, tmp_path / "run", log):
        def away(*_, **__):
            raise ConnectionError("the server is away")
        monkeypatch.setattr(MlflowClient, "log_batch", away)
        monkeypatch.setattr(MlflowClient, "set_terminated", away)
        log.write("train_step", model="dnn/seed=0", step=1, loss=1.0)
    (told,) = read_events(tmp_path / "run" / "events.jsonl", "warning")
    assert "the server is away" in told["message"]
    wrong = config.observe.mlflow.model_copy(update={"tracking_uri": f"sqlite:///{tmp_path}/no/such/folder/x.db"})
    config = config.model_copy(update={"observe": config.observe.model_copy(update={"mlflow": wrong})})
    with EventLog(tmp_path / "run" / "events.jsonl") as log, pytest.raises(InputError, match="cannot be used"), \
            observed(config, tmp_path / "other", log):
        pass
