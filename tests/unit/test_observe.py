"""What is seen of a run from outside: series from events, in Prometheus' own format, and a dashboard that asks for
series that exist."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.loader import load
from launch.console import json_line
from launch.observe import SERIES, RunMetrics, observed, write_textfile
from trainer.events import EventLog

WORKERS = [{"rank": 0, "node": "a", "memory_mib": 1.5, "wait_share": 0.25, "forward_s": 0.01, "loss_mean_s": 0.001,
            "backward_s": 0.02, "optimizer_s": 0.003, "all_to_all_s": 0.004},
           {"rank": 1, "node": "b", "memory_mib": 2.0, "wait_share": 0.5, "forward_s": 0.02, "loss_mean_s": 0.0,
            "backward_s": 0.02, "optimizer_s": 0.003, "all_to_all_s": 0.005}]
STORY = (  # every event that moves a series, as a run writes them
    ("run", {"status": "started"}),
    ("stage", {"stage": "crm", "status": "started"}),
    ("group", {"workers": 2}),
    ("train_step", {"model": "dnn/seed=0", "epoch": 1, "step": 20, "steps": 80, "loss": 4.5, "mean_loss": 4.75,
                    "learning_rate": 1e-3, "rows_per_s": 1000.0, "step_s": 0.05, "eta_s": 3.0, "workers": WORKERS,
                    **{key: value for key, value in WORKERS[0].items() if key not in ("rank", "node")}}),
    ("checkpoint", {"model": "dnn/seed=0", "step": 20, "waited_s": 0.0, "copy_s": 0.25, "write_s": 0.5}),
    ("index", {"model": "dnn/seed=0", "watermark_ms": 5000, "recall_vs_exact": 0.99, "items": 400, "bytes": 4096,
               "build_s": 0.1}),
    ("epoch", {"model": "dnn/seed=0", "step": 20, "validation_recall@100": 0.75}),
    ("evaluation", {"model": "dnn/seed=0", "queries": 10, "average.recall@100": 0.5}),
    ("warning", {"message": "odd"}),
    ("stage", {"stage": "crm", "status": "done", "rows": 9000, "seconds": 12.5, "peak_mib": 100}),
    ("stage", {"stage": "channels", "status": "started"}),
    ("snapshot", {"channel": "swing", "watermark_ms": 7000, "lag_s": 3.5, "items": 300}),
    ("stage", {"stage": "channels", "status": "failed", "seconds": 1.0, "error": "ValueError"}),
)
DNN = '{model="dnn",seed="0"}'


@pytest.fixture
def config(repository, tmp_path):
    return load(str(repository / "configs/smoke.yaml"), [f"run_dir={tmp_path / 'run'}"])


@pytest.fixture
def told(config):
    """The series after the whole story."""
    metrics = RunMetrics(config)
    tell(metrics, STORY)
    return metrics


def tell(metrics, story, at=1000.0):
    for event, fields in story:
        metrics.take({"event": event, "time": at, **fields})


def samples(metrics) -> dict[str, float]:
    """`name{label="value",..}` to value, read by prometheus_client's own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_events_become_series(told):
    found = samples(told)
    for name, value in {
            "watchtower_run_active": 1, "watchtower_last_event_timestamp_seconds": 1000, "watchtower_workers": 2,
            f"watchtower_train_loss{DNN}": 4.5, f"watchtower_train_mean_loss{DNN}": 4.75,
            f"watchtower_train_learning_rate{DNN}": 1e-3, f"watchtower_train_rows_per_second{DNN}": 1000,
            f"watchtower_train_step_seconds{DNN}": 0.05, f"watchtower_train_data_wait_ratio{DNN}": 0.25,
            'watchtower_train_step_part_seconds{model="dnn",part="backward",seed="0"}': 0.02,
            f"watchtower_train_all_to_all_seconds{DNN}": 0.004,
            'watchtower_worker_all_to_all_seconds{node="b",rank="1"}': 0.005,
            'watchtower_worker_memory_bytes{node="b",rank="1"}': 2 * 2**20,
            'watchtower_worker_data_wait_ratio{node="b",rank="1"}': 0.5,
            'watchtower_worker_step_part_seconds{node="b",part="forward",rank="1"}': 0.02,
            f"watchtower_index_recall_ratio{DNN}": 0.99, f"watchtower_index_published_timestamp_seconds{DNN}": 1000,
            f"watchtower_index_watermark_timestamp_seconds{DNN}": 5,
            'watchtower_validation{measure="recall@100",model="dnn",seed="0"}': 0.75,
            'watchtower_evaluation{measure="average.recall@100",model="dnn",seed="0"}': 0.5,
            'watchtower_channel_watermark_lag_seconds{channel="swing"}': 3.5, "watchtower_warnings_total": 1,
            'watchtower_stage_in_progress{stage="crm"}': 0, 'watchtower_stage_in_progress{stage="channels"}': 0,
            'watchtower_stage_rows{stage="crm"}': 9000, 'watchtower_stage_failures_total{stage="channels"}': 1,
            'watchtower_stage_peak_memory_bytes{stage="crm"}': 100 * 2**20, "watchtower_restarts_total": 0}.items():
        assert found[name] == pytest.approx(value), name
    shown = {name.partition("{")[0] for name in found}
    assert {s.name for s in SERIES} == shown, "the story moves every series, and there are no others"


def test_a_lost_group_counts_as_a_restart_and_its_workers_go(told):
    tell(told, [("stage", {"stage": "router", "status": "started"}), ("group", {"workers": 2})])
    assert samples(told)["watchtower_restarts_total"] == 0, "another stage, another group"
    tell(told, [("train_step", {"model": "capts/seed=1", "workers": WORKERS}), ("group", {"workers": 1})])
    found = samples(told)
    assert (found["watchtower_restarts_total"], found["watchtower_workers"]) == (1, 1)
    assert not [name for name in found if name.startswith("watchtower_worker_")]


def test_a_process_that_was_killed_leaves_nothing_in_progress(told):
    tell(told, [("stage", {"stage": "crm", "status": "started"}), ("run", {"status": "started"})])
    assert not [name for name in samples(told) if name.startswith("watchtower_stage_in_progress")]


def test_a_loss_that_is_not_finite_shows(told):
    tell(told, [("train_step", {"model": "dnn/seed=0", "loss": None, "not_finite": {"loss": "nan"}})])
    assert samples(told)[f"watchtower_train_loss{DNN}"] != samples(told)[f"watchtower_train_loss{DNN}"]


# --- while a run runs -------------------------------------------------------------------------------------------------

def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def observing(config, **observe):
    return config.model_copy(update={"observe": config.observe.model_copy(update=observe)})


def until(condition, seconds=60.0):
    """The first true value of the condition; a loaded machine has a minute."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return found


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return answer.read().decode()


def test_the_driver_serves_what_the_file_says(config, tmp_path):
    port, textfile = free_port(), tmp_path / "node" / "run.prom"
    config = observing(config, prometheus_port=port, textfile=str(textfile))
    with EventLog(tmp_path / "run" / "events.jsonl") as log, pytest.raises(KeyError):
        log.write("warning", message="of the process before")
        with observed(config, tmp_path / "run", log):
            for event, fields in STORY[1:]:
                log.write(event, **fields)
            until(lambda: 'stage_failures_total{stage="channels"} 1.0' in scrape(port))
            assert "watchtower_warnings_total 2.0" in scrape(port)
            assert "watchtower_run_active 1.0" in scrape(port)
            with pytest.raises(InputError, match="cannot be bound"), observed(config, tmp_path / "run", log):
                pass
            raise KeyError
    with pytest.raises(OSError):
        scrape(port)
    assert "watchtower_run_active 0.0" in textfile.read_text() and [p.name for p in textfile.parent.iterdir()] == [
        "run.prom"]


def test_a_text_file_that_cannot_be_written(told, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="observe.textfile"):
        write_textfile(told, tmp_path / "file" / "run.prom")


def test_config_of_observe(repository):
    smoke = str(repository / "configs/smoke.yaml")
    assert load(smoke, []).observe.prometheus_port is None
    for wrong, message in (("observe.textfile=/x/run.txt", "ends in .prom"), ("observe.prometheus_port=0", "1"),
                           ("observe.mlflow.tracking_uri=http://me:secret@host", "MLFLOW_TRACKING_USERNAME")):
        with pytest.raises(InputError, match=message):
            load(smoke, [wrong])


def test_json_lines():
    line = json.loads(json_line({"event": "train_step", "time": 1.5, "rank": 0, "node": "a", "loss": 2.0}))
    assert list(line) == ["time", "level", "event", "rank", "node", "loss"]
    assert (line["time"], line["level"]) == ("1970-01-01T00:00:01.500Z", "info")
    for event, level in (({"event": "warning"}, "warning"), ({"event": "stage", "status": "failed"}, "error"),
                         ({"event": "train_step", "not_finite": {"loss": "nan"}}, "warning")):
        assert json.loads(json_line({"time": 0, **event}))["level"] == level


# --- the dashboard and the page ---------------------------------------------------------------------------------------

def queries(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def asked_for(expression: str) -> set[str]:
    """The metric names of a PromQL expression: identifiers outside of braces, by-lists and calls."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*(?:\([^)]*\))?", " ", bare)
    return {name for name in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\()\b", bare)} - {"and", "or", "unless", "bool"}


def unknown_names(dashboard: dict) -> set[str]:
    known = {s.name for s in SERIES}
    variables = " ".join(str(v.get("query")) for v in dashboard["templating"]["list"])
    names = {name for expression in queries(dashboard) for name in asked_for(expression)}
    return (names | set(re.findall(r"label_values\((\w+),", variables))) - known


def test_the_dashboard_asks_for_series_that_exist(repository):
    dashboard = json.loads((repository / "docker/grafana/watchtower.json").read_text())
    assert len(queries(dashboard)) > 20 and unknown_names(dashboard) == set()
    labels = {s.name: {"instance", *s.labels} for s in SERIES}
    for expression in queries(dashboard):
        for name, chosen in re.findall(r"(watchtower_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", chosen)) <= labels[name], expression
    dashboard["panels"][0]["targets"][0]["expr"] = "rate(watchtower_train_speed{x=\"y\"}[5m]) / time()"
    assert unknown_names(dashboard) == {"watchtower_train_speed"}, "the check can fail"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_page_lists_every_series(repository):
    page = (repository / "docs/observing.md").read_text()
    rows = re.findall(r"^\| `(watchtower_\w+)` \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    assert rows == [(s.name, ", ".join(s.labels), s.meaning) for s in SERIES]


# --- a real Prometheus ------------------------------------------------------------------------------------------------

@pytest.fixture
def prometheus(tmp_path):
    """`prometheus(targets)` starts one that scrapes them every second; gives ask(PromQL) -> result vector."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed here (Debian: apt-get install prometheus)")
    started = []

    def start(target: str):
        port = free_port()
        scraped = {"job_name": "watchtower", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
        (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scraped]}))
        log = (tmp_path / "prometheus.log").open("w")
        started.append((subprocess.Popen(
            [program, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
             f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT), log))

        def ask(expression: str) -> list[dict]:
            query = urllib.parse.urlencode({"query": expression})
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=30) as answer:
                    return json.load(answer)["data"]["result"]
            except urllib.error.HTTPError as error:
                if error.code == 503:
                    return []  # it is starting
                raise AssertionError(f"{expression}: {error.read().decode()}") from error
            except OSError:
                return []  # it is starting

        return ask

    yield start
    for process, log in started:
        process.terminate()
        process.wait(60)
        log.close()


def test_a_real_prometheus_reads_it_and_answers_the_dashboard(config, tmp_path, prometheus, repository):
    port = free_port()
    with EventLog(tmp_path / "run" / "events.jsonl") as log, \
            observed(observing(config, prometheus_port=port), tmp_path / "run", log):
        for event, fields in STORY[1:]:
            log.write(event, **fields)
        log.write("stage", stage="router", status="started")
        ask = prometheus(f"127.0.0.1:{port}")
        until(lambda: ask('watchtower_stage_in_progress{stage="router"} == 1'))
        assert ask("up")[0]["value"][1] == "1"
        dashboard = json.loads(Path(repository / "docker/grafana/watchtower.json").read_text())
        for expression in queries(dashboard):
            filled = expression.replace("$instance", ".*").replace("$model", ".*")
            assert ask(filled), f"no answer: {filled}"
