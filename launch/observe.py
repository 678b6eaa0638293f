"""Seeing a run from outside: Prometheus metrics and MLflow, both made from what events.jsonl says.

events.jsonl is the one source: a thread of the driver follows it and turns events into the series below, so that what
is scraped, what the file says and what the console shows cannot differ. Workers need no port: their numbers travel with
the first worker's `train_step`. A run that goes on reads the events before it too; counters count over the run folder.

docs/observing.md lists the series for people; a test holds it and docker/grafana/watchtower.json to this list.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema import Config
from launch.console import version
from trainer.events import EventLog, follow_events, memory_mib

MIB = 2**20
MODEL = ("model", "seed")
WORKER = ("rank", "node")


@dataclass(frozen=True)
class Series:
    """One metric: its name, whether it only grows, what it means (with the unit), and its labels."""

    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    counts: bool = False


SERIES = (
    Series("watchtower_run_info", "1; says what runs here", ("name", "run_dir", "version")),
    Series("watchtower_run_active", "1 while a run works on the folder, 0 once it has ended"),
    Series("watchtower_last_event_timestamp_seconds", "Unix time of the newest event: old while active means stuck"),
    Series("watchtower_driver_memory_bytes", "resident memory of the driver"),
    Series("watchtower_warnings_total", "warnings", counts=True),
    Series("watchtower_restarts_total", "times a training group was started again after it was lost", counts=True),
    Series("watchtower_stage_in_progress", "1 while the stage runs", ("stage",)),
    Series("watchtower_stage_started_timestamp_seconds", "Unix time at which the stage was started", ("stage",)),
    Series("watchtower_stage_rows", "rows that the stage read or trained on, when it was done last", ("stage",)),
    Series("watchtower_stage_seconds", "seconds that the stage took, when it was done last", ("stage",)),
    Series("watchtower_stage_peak_memory_bytes", "most memory of the stage, when it was done last", ("stage",)),
    Series("watchtower_stage_failures_total", "times the stage failed", ("stage",), counts=True),
    Series("watchtower_workers", "training workers of the newest group"),
    Series("watchtower_train_epoch", "epoch, from 1", MODEL),
    Series("watchtower_train_step", "step, over all epochs", MODEL),
    Series("watchtower_train_steps", "steps in all", MODEL),
    Series("watchtower_train_loss", "loss of the newest logged step, over all workers", MODEL),
    Series("watchtower_train_mean_loss", "mean loss since the log step before", MODEL),
    Series("watchtower_train_learning_rate", "learning rate of the towers", MODEL),
    Series("watchtower_train_rows_per_second", "rows a second of all workers together", MODEL),
    Series("watchtower_train_step_seconds", "seconds a step, with everything between two log steps", MODEL),
    Series("watchtower_train_step_part_seconds", "seconds a step of a part (forward, loss_mean, backward, optimizer), "
                                                 "on the first worker", (*MODEL, "part")),
    Series("watchtower_train_all_to_all_seconds", "seconds a step that the first worker waits for ids, rows and "
                                                  "gradients of the tables; in forward and backward", MODEL),
    Series("watchtower_train_data_wait_ratio", "share of the time that the first worker waits for batches", MODEL),
    Series("watchtower_train_remaining_seconds", "seconds to the last step, at this speed", MODEL),
    Series("watchtower_worker_memory_bytes", "memory of a worker: tensors on a GPU (peak), else resident", WORKER),
    Series("watchtower_worker_data_wait_ratio", "share of the time that this worker waits for batches", WORKER),
    Series("watchtower_worker_step_part_seconds", "seconds a step of a part on this worker; a long loss_mean is a wait "
                                                  "for another one", (*WORKER, "part")),
    Series("watchtower_worker_all_to_all_seconds", "seconds a step that this worker waits for ids, rows and gradients "
                                                   "of the tables", WORKER),
    Series("watchtower_checkpoint_timestamp_seconds", "Unix time of the newest checkpoint", MODEL),
    Series("watchtower_checkpoint_step", "step of the newest checkpoint", MODEL),
    Series("watchtower_checkpoint_part_seconds", "seconds that the newest checkpoint held training up (waited, copy) "
                                                 "and took behind its back (write)", (*MODEL, "part")),
    Series("watchtower_index_published_timestamp_seconds", "Unix time at which the newest index was published; its age "
                                                           "is time() minus this", MODEL),
    Series("watchtower_index_watermark_timestamp_seconds", "watermark of the newest index, Unix time", MODEL),
    Series("watchtower_index_recall_ratio", "share of the exact top 100 that the newest index finds", MODEL),
    Series("watchtower_index_items", "items in the newest index", MODEL),
    Series("watchtower_index_bytes", "size of the newest index", MODEL),
    Series("watchtower_index_build_seconds", "seconds that building the newest index took", MODEL),
    Series("watchtower_validation", "a measure of the validation requests after the newest epoch", (*MODEL, "measure")),
    Series("watchtower_evaluation", "a measure of the test requests through the published index", (*MODEL, "measure")),
    Series("watchtower_channel_watermark_timestamp_seconds", "watermark of the channel's newest snapshot, Unix time",
           ("channel",)),
    Series("watchtower_channel_watermark_lag_seconds", "from that watermark to the newest event of the logs",
           ("channel",)),
    Series("watchtower_channel_items", "items with a list in the channel's newest snapshot", ("channel",)),
)

# Field of an event: the series that shows it, and the factor.
_TRAINING = {"epoch": ("epoch", 1), "step": ("step", 1), "steps": ("steps", 1), "loss": ("loss", 1),
             "mean_loss": ("mean_loss", 1), "learning_rate": ("learning_rate", 1), "rows_per_s": ("rows_per_second", 1),
             "step_s": ("step_seconds", 1), "wait_share": ("data_wait_ratio", 1), "eta_s": ("remaining_seconds", 1),
             "all_to_all_s": ("all_to_all_seconds", 1)}
_INDEX = {"time": ("published_timestamp_seconds", 1), "watermark_ms": ("watermark_timestamp_seconds", 1e-3),
          "recall_vs_exact": ("recall_ratio", 1), "items": ("items", 1), "bytes": ("bytes", 1),
          "build_s": ("build_seconds", 1)}
_STAGE = {"rows": ("rows", 1), "seconds": ("seconds", 1), "peak_mib": ("peak_memory_bytes", MIB)}
_CHECKPOINT = {"time": ("timestamp_seconds", 1), "step": ("step", 1)}
_CHANNEL = {"watermark_ms": ("watermark_timestamp_seconds", 1e-3), "lag_s": ("watermark_lag_seconds", 1),
            "items": ("items", 1)}
_PARTS = ("forward", "loss_mean", "backward", "optimizer")
# Of workers; their group may be gone.
_OF_WORKERS = ("worker_memory_bytes", "worker_data_wait_ratio", "worker_step_part_seconds", "worker_all_to_all_seconds")


class RunMetrics:
    """The series of one run, from its events. `registry` is what prometheus_client exposes."""

    def __init__(self, config: Config):
        import prometheus_client

        prometheus_client.disable_created_metrics()  # when a counter was made says nothing: it is counted from a file
        self.registry = prometheus_client.CollectorRegistry()
        self._series = {
            s.name: (prometheus_client.Counter if s.counts else prometheus_client.Gauge)(
                s.name, s.meaning, s.labels, registry=self.registry) for s in SERIES}
        self._groups: int = 0  # training groups that the stage in progress has started
        self._lock = threading.Lock()
        self._set("run_info", 1, name=config.name, run_dir=config.run_dir, version=version())
        self._series["watchtower_driver_memory_bytes"].set_function(lambda: _resident_bytes())

    def _set(self, name: str, value: float | None, /, **labels: Any) -> None:
        gauge = self._series[f"watchtower_{name}"]
        if value is not None:
            (gauge.labels(**{k: str(v) for k, v in labels.items()}) if labels else gauge).set(value)

    def _count(self, name: str, /, **labels: Any) -> None:
        counter = self._series[f"watchtower_{name}"]
        (counter.labels(**labels) if labels else counter).inc()

    def _set_all(self, family: str, fields: Mapping[str, tuple[str, float]], event: Mapping[str, Any],
                 /, **labels: Any) -> None:
        for field, (name, factor) in fields.items():
            self._set(f"{family}_{name}", _number(event, field, factor), **labels)

    def take(self, event: Mapping[str, Any]) -> None:
        """Move the series to what this event says."""
        with self._lock:
            self._set("last_event_timestamp_seconds", event.get("time"))
            act = getattr(self, f"_take_{event['event']}", None)
            if act is not None:
                act(event)

    def _take_run(self, event: Mapping[str, Any]) -> None:
        started = event.get("status") == "started"
        self._set("run_active", float(started))
        self._groups = 0
        # A process that was killed could not say that its stage had ended, nor its workers that they were gone.
        for name in ("stage_in_progress", *_OF_WORKERS):
            self._series[f"watchtower_{name}"].clear()

    def _take_stage(self, event: Mapping[str, Any]) -> None:
        stage, status = event.get("stage"), event.get("status")
        if status == "started":
            self._groups = 0
            self._set("stage_started_timestamp_seconds", event.get("time"), stage=stage)
        if status in ("started", "done", "failed", "interrupted"):
            self._set("stage_in_progress", float(status == "started"), stage=stage)
        if status == "done":
            self._set_all("stage", _STAGE, event, stage=stage)
        if status == "failed":
            self._count("stage_failures_total", stage=stage)

    def _take_group(self, event: Mapping[str, Any]) -> None:
        self._set("workers", event.get("workers"))
        if self._groups:  # a stage has one group, unless its workers were lost
            self._count("restarts_total")
        self._groups += 1
        for name in _OF_WORKERS:
            self._series[f"watchtower_{name}"].clear()

    def _take_train_step(self, event: Mapping[str, Any]) -> None:
        of = _model(event)
        self._set_all("train", _TRAINING, event, **of)
        for part in _PARTS:
            self._set("train_step_part_seconds", event.get(f"{part}_s"), **of, part=part)
        for worker in event.get("workers") or ():
            who = {"rank": worker["rank"], "node": worker["node"]}
            self._set("worker_memory_bytes", _number(worker, "memory_mib", MIB), **who)
            self._set("worker_data_wait_ratio", worker.get("wait_share"), **who)
            self._set("worker_all_to_all_seconds", worker.get("all_to_all_s"), **who)
            for part in _PARTS:
                self._set("worker_step_part_seconds", worker.get(f"{part}_s"), **who, part=part)

    def _take_checkpoint(self, event: Mapping[str, Any]) -> None:
        self._set_all("checkpoint", _CHECKPOINT, event, **_model(event))
        for part in ("waited", "copy", "write"):
            self._set("checkpoint_part_seconds", event.get(f"{part}_s"), **_model(event), part=part)

    def _take_index(self, event: Mapping[str, Any]) -> None:
        self._set_all("index", _INDEX, event, **_model(event))

    def _take_epoch(self, event: Mapping[str, Any]) -> None:
        for field, value in event.items():
            if field.startswith("validation_") and isinstance(value, (int, float)):
                self._set("validation", value, **_model(event), measure=field.removeprefix("validation_"))

    def _take_evaluation(self, event: Mapping[str, Any]) -> None:
        for field, value in event.items():
            if "@" in field and isinstance(value, (int, float)):
                self._set("evaluation", value, **_model(event), measure=field)

    def _take_snapshot(self, event: Mapping[str, Any]) -> None:
        self._set_all("channel", _CHANNEL, event, channel=event.get("channel"))

    def _take_warning(self, _: Mapping[str, Any]) -> None:
        self._count("warnings_total")

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        import prometheus_client

        with self._lock:
            return prometheus_client.generate_latest(self.registry)


def _number(event: Mapping[str, Any], field: str, factor: float) -> float | None:
    if field in (event.get("not_finite") or {}):
        return math.nan
    value = event.get(field)
    return None if value is None else value * factor


def _model(event: Mapping[str, Any]) -> dict[str, str]:
    model, _, seed = str(event.get("model") or "").partition("/seed=")
    return {"model": model, "seed": seed}


def _resident_bytes() -> float:
    return memory_mib() * MIB


# --- while a run runs -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def observed(config: Config, run_dir: Path, log: EventLog) -> Iterator[None]:
    """Say in events.jsonl that the run starts and how it ends, and show it meanwhile as the section `observe` asks.

    Raises:
        InputError: the port cannot be bound, the text file not be written, or MLflow is not installed.
    """
    observe, start = config.observe, log.path.stat().st_size
    with contextlib.ExitStack() as held:
        if observe.prometheus_port is not None or observe.textfile is not None:
            held.enter_context(_exported(config, log.path))
        if observe.mlflow is not None:
            from launch.mlflow_run import tracked

            held.enter_context(tracked(config, run_dir, log, start))
        log.write("run", status="started", name=config.name, version=version(), show=False)
        status = "interrupted"
        try:
            yield
            status = "done"
        except Exception:
            status = "failed"
            raise
        finally:
            log.write("run", status=status, show=False)


@contextlib.contextmanager
def _exported(config: Config, events: Path) -> Iterator[None]:
    observe = config.observe
    try:
        metrics = RunMetrics(config)
    except ImportError as error:
        raise InputError("observe.prometheus_port and observe.textfile need the package prometheus_client, which is "
                         "not installed here") from error
    with contextlib.ExitStack() as held:
        if observe.prometheus_port is not None:
            held.callback(_serve(metrics, observe.prometheus_address, observe.prometheus_port))
        if observe.textfile is not None:
            path = Path(observe.textfile).expanduser()
            write_textfile(metrics, path)
            held.callback(_every(observe.textfile_every_s, lambda: write_textfile(metrics, path)))
        stop = threading.Event()
        held.callback(follow_events(events, stop, metrics.take).join)
        held.callback(stop.set)
        yield


def _serve(metrics: RunMetrics, address: str, port: int):
    """Serve the series over HTTP; what ends it."""
    import prometheus_client

    try:
        server, thread = prometheus_client.start_http_server(port, address, registry=metrics.registry)
    except OSError as error:
        raise InputError(f"observe.prometheus_port: {address}:{port} cannot be bound ({error.strerror or error}); name "
                         "another port, or null") from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


def _every(seconds: float, act):
    """Do it every so many seconds on a thread; what ends that, and does it a last time."""
    stop = threading.Event()

    def go() -> None:
        ended = False
        while not ended:
            ended = stop.wait(seconds)
            with contextlib.suppress(InputError):  # it could be written when the run began; the run goes on
                act()

    thread = threading.Thread(target=go, daemon=True, name="watchtower-textfile")
    thread.start()

    def close() -> None:
        stop.set()
        thread.join()

    return close


def write_textfile(metrics: RunMetrics, path: Path) -> None:
    """The series as a file for node_exporter's textfile collector, which appears at once and whole.

    Raises:
        InputError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(metrics.text())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"observe.textfile: {path} cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
