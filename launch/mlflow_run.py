"""A run as an MLflow run: its config as parameters, the numbers of its events as metrics by step, its results as files.

MLflow is imported only where `observe.mlflow` asks for it. `mlflow.json` in the run folder names the MLflow run, so
that a run which goes on adds to the same one. What MLflow does not take (a server that is away) is told once as a
warning and never ends a run.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.loader import plain
from configs.schema import Config
from trainer.events import EventLog, follow_events

SEND_EVERY_S = 5.0
SEND_AT_ONCE = 500  # metrics; MLflow takes 1,000 in one call
LONGEST_VALUE = 6000  # characters of a parameter
ARTIFACTS = ("config.yaml", "metrics.json", "report.html")
_NOT_METRICS = {"time", "epochs", "step", "steps", "seed", "rank", "watermark_ms"}


def flat(section: Any, prefix: str = "") -> dict[str, str]:
    """A config as MLflow's flat parameters: dotted keys, values as text."""
    found = {}
    for key, value in plain(section).items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            found[metric_name(f"{prefix}{key}")] = text[:LONGEST_VALUE]
    return found


def metric_name(name: str) -> str:
    """A name that MLflow takes: recall@100 is recall_at_100, and dnn/seed=0 is dnn/seed-0."""
    return re.sub(r"[^\w\-./: ]", "-", name.replace("@", "_at_"))


def metrics_of(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event that has a step, or of an evaluation, by MLflow's name: <model>/<field> of a training
    step, <model>/<event>.<field> of others."""
    if event.get("step") is None and event["event"] != "evaluation":
        return {}
    model = event.get("model") or "run"
    kind = "" if event["event"] == "train_step" else f"{event['event']}."
    return {metric_name(f"{model}/{kind}{name}"): float(value) for name, value in event.items()
            if name not in _NOT_METRICS and isinstance(value, (int, float)) and not isinstance(value, bool)}


@contextlib.contextmanager
def tracked(config: Config, run_dir: Path, log: EventLog, start: int) -> Iterator[None]:
    """Keep the MLflow run of this run folder current until the block ends.

    Args:
        start: byte of events.jsonl from which on events are new.

    Raises:
        InputError: MLflow is not installed, or its server or store cannot be reached.
    """
    run = _MlflowRun(config, run_dir, log)
    stop = threading.Event()
    follower = follow_events(log.path, stop, run.take, start)
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        stop.set()
        follower.join()
        run.close(status)


class _MlflowRun:
    """The connection: metrics are sent in groups from the follower's thread."""

    def __init__(self, config: Config, run_dir: Path, log: EventLog):
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise InputError("observe.mlflow needs MLflow, which is not installed here: pip install mlflow, or "
                             "observe.mlflow=null") from error
        self._run_dir, self._log, self._waiting, self._has_warned = run_dir, log, [], False
        self._sent = time.monotonic()
        where = config.observe.mlflow
        try:
            self._client = MlflowClient(tracking_uri=where.tracking_uri)
            self._id = self._open(config, where.experiment)
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            raise InputError(f"observe.mlflow: {where.tracking_uri} cannot be used ({type(error).__name__}: "
                             f"{first[:200]})") from error

    def _open(self, config: Config, experiment: str) -> str:
        from mlflow.entities import Param

        noted = self._run_dir / "mlflow.json"
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(noted.read_text())
            if found["tracking_uri"] == config.observe.mlflow.tracking_uri:
                self._client.update_run(found["run_id"], status="RUNNING")
                return found["run_id"]
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
        run_id = self._client.create_run(experiment_id, run_name=config.name).info.run_id
        params = [Param(key, value) for key, value in flat(config).items()]
        for at in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[at:at + 100])
        noted.write_text(json.dumps({"tracking_uri": config.observe.mlflow.tracking_uri, "run_id": run_id}) + "\n")
        return run_id

    def take(self, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        self._waiting += [Metric(name, value, round(event["time"] * 1000), int(event.get("step") or 0))
                          for name, value in metrics_of(event).items()]
        if len(self._waiting) >= SEND_AT_ONCE or time.monotonic() - self._sent >= SEND_EVERY_S:
            self._send()

    def _send(self) -> None:
        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for at in range(0, len(waiting), SEND_AT_ONCE):
            self._try(self._client.log_batch, self._id, metrics=waiting[at:at + SEND_AT_ONCE])

    def close(self, status: str) -> None:
        self._send()
        for name in ARTIFACTS:
            if (self._run_dir / name).exists():
                self._try(self._client.log_artifact, self._id, str(self._run_dir / name))
        self._try(self._client.set_terminated, self._id, status=status)

    def _try(self, act, *arguments: Any, **named: Any) -> None:
        try:
            act(*arguments, **named)
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                first = next(iter(str(error).splitlines()), "")
                self._log.write("warning", message=f"MLflow takes no more: {type(error).__name__}: {first[:200]}")
