"""metrics.json and report.html from a run folder of made-up numbers, and from folders with parts missing.

The numbers here are invented to look like a run; they stand nowhere else.
"""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.errors import WatchtowerError
from configs.schema import Config
from trainer.charts import round_ticks
from trainer.events import sealed
from trainer.metrics import retrieval_metrics
from trainer.report import results_table, training_curves, write_report
from trainer.results import (
    assemble,
    bayes_name,
    failed_gates,
    load_evaluations,
    value_at,
    write_evaluation,
    write_metrics,
)

CURVE_S = [10.0, 30.0, 60.0, 120.0, 300.0]
MODELS = [
    {"name": "dnn", "tower": "dnn", "condition": "next"},
    {"name": "dnn_unconditioned", "tower": "dnn", "condition": "none", "bayes": True},
    {"name": "dnn_permuted", "tower": "dnn", "condition": "next", "permute_watch": True},
    {"name": "decision_transformer", "tower": "decision_transformer", "condition": "next"},
    {"name": "decision_transformer_unconditioned", "tower": "decision_transformer", "condition": "none"},
    {"name": "decision_transformer_prefix", "tower": "decision_transformer", "condition": "prefix"},
]
RECALL = {"none": 0.33, "null": 0.30, "average": 0.21, "maximum": 0.19, "multiplexed": 0.2, "fixed_60": 0.24,
          "oracle": 0.49}
WATCH = {"none": 48, "null": 50, "average": 39, "maximum": 77, "multiplexed": 55, "fixed_60": 62, "oracle": 54}
QUERIES = 120


def a_config(**changes) -> Config:
    return Config(name="invented <run> & co", seeds=[0, 1], crm={"models": MODELS},
                  evaluate={"bootstrap": 60, "split_users": True} | changes)


def a_run(folder: Path) -> Path:
    """Every part of a run folder that the results and the report read."""
    rng = np.random.default_rng(0)
    for model in [*MODELS, {"name": bayes_name("dnn_unconditioned"), "condition": "bayes"},
                  {"name": "popular", "condition": "none"}]:
        for seed in [0] if model["name"] == "popular" else [0, 1]:
            write_evaluation(folder, model["name"], seed, *an_evaluation(model, seed, rng))
    write_events(folder / "events.jsonl", rng)
    (folder / "sequences").mkdir()
    (folder / "sequences" / "manifest.json").write_text(json.dumps({"statistics": {
        "rows": 1_436_609, "users": 27_285, "effective": 812_004, "null_watch_share": 0.31, "longest_sequence": 910,
        "first_timestamp_ms": 1_649_347_200_000, "watch_time_s": {"p50": 4.61, "p90": 62.4},
        "rows_by_day": {f"2022-04-{day:02d}": 40_000 + 900 * (day % 7) for day in range(8, 31)},
        "quarantined": {"duplicate": 2_104, "null_item_id": 3}, "notes": {}}}))
    (folder / "stages").mkdir()
    for stage, seconds in {"ingest": 41.2, "crm": 911.7, "evaluate": 88.0}.items():
        (folder / "stages" / f"{stage}.json").write_text(
            json.dumps({"seconds": seconds, "rows": 1_436_609, "peak_mib": 2048.5, "inputs": "a hash"}))
    (folder / "stages" / "crm.outcome.json").write_text("{}")
    (folder / "config.yaml").write_text("name: '<script>alert(1)</script>'\n")
    return folder


def an_evaluation(model, seed, rng):
    conditioned = model["condition"] not in ("none",)
    strategies = ["null", "average", "maximum", "multiplexed", "fixed_60", "oracle"] if conditioned else ["none"]
    queries = {"query_id": np.arange(QUERIES), "user_id": np.arange(QUERIES) // 3,
               "timestamp_ms": np.arange(QUERIES) * 1000, "watch_time_s": rng.lognormal(3, 1, QUERIES),
               "target_item_id": np.arange(QUERIES) * 7 + 10**12}
    metrics = {}
    for strategy in strategies:
        found = rng.random(QUERIES) < RECALL[strategy] + 0.005 * seed
        retrieved = np.where(found, 7, 8)[:, None].repeat(100, axis=1)
        metrics[strategy] = retrieval_metrics(retrieved, (np.arange(QUERIES + 1), np.full(QUERIES, 7)), [10, 100])
        metrics[strategy]["retrieved_watch_s@100"] = rng.normal(WATCH[strategy], 9, QUERIES)
        metrics[strategy]["hit_watch_s@100"] = np.where(found, rng.lognormal(3.6, 0.5, QUERIES), np.nan)
    return queries, metrics, a_curve(model, seed) if conditioned else None, {
        "epoch": 4, "train_s": 61.5 + seed, "prefix_ranks_identical": model["condition"] == "prefix",
        "index": {"factory": "Flat", "recall_vs_exact": 1.0, "build_s": 0.02, "bytes": 1_940_000,
                                         "folder": f"indexes/{model['name']}/seed={seed}"}}


def a_curve(model, seed):
    flat = model.get("permute_watch") or model["condition"] == "prefix"
    steep = 0.0 if flat else 0.62 if model["name"] == "dnn" else 0.5
    return [{"condition_s": c, "retrieved_watch_s": 42 * (c / 60) ** steep + (0 if flat else seed),
             "recall@100": 0.25 if flat else 0.28 - 0.02 * abs(math.log(c / 40)), "bucket_share": 0.3,
             "bucket_lift": 1.0 if flat else 1.5 + 0.2 * math.log10(c), "n": 90} for c in CURVE_S]


def write_events(path, rng):
    lines = []
    for place, model in enumerate(MODELS):
        for seed in (0, 1):
            name = f"{model['name']}/seed={seed}"
            for step in range(0, 2000, 10):
                lines.append({"event": "train_step", "model": name, "epoch": step // 500, "step": step,
                              "loss": 5.2 + place * 0.1 + 1.8 * math.exp(-step / 400) + rng.normal(0, 0.05)})
            lines += [{"event": "epoch", "model": name, "epoch": epoch, "step": epoch * 500,
                       "validation_recall@100": 0.3 + 0.03 * math.log(epoch) + 0.01 * place + 0.004 * seed}
                      for epoch in range(1, 5)]
    path.write_bytes(b"".join(map(line_of, lines)) + b'{"event": "train_st')


def line_of(event):
    return sealed(json.dumps(event).encode())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = a_run(tmp_path_factory.mktemp("run"))
    write_metrics(folder, assemble(folder, a_config()))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def metrics(run_dir):
    return json.loads((run_dir / "metrics.json").read_text())


def test_every_measured_value_has_mean_interval_count_and_seeds(metrics):
    for model, result in metrics["crm"].items():
        for strategy, values in result.items():
            if strategy == "control_curve":
                continue
            for value in values.values():
                assert set(value) == {"mean", "ci95", "n", "per_seed"}
                assert value["ci95"][0] <= value["mean"] <= value["ci95"][1]
                assert set(value["per_seed"]) == ({"0"} if model == "popular" else {"0", "1"})
                assert value["mean"] == pytest.approx(np.mean(list(value["per_seed"].values())))
    assert metrics["crm"]["popular"]["none"]["recall@100"]["n"] == QUERIES
    assert metrics["crm"]["dnn"]["oracle"]["hit_watch_s@100"]["n"] < QUERIES


def test_a_mean_is_that_of_the_file(run_dir, metrics):
    for seed in ("0", "1"):
        table = pq.read_table(run_dir / "evaluation" / "dnn" / f"seed={seed}" / "queries.parquet", partitioning=None)
        column = table["oracle.hit_watch_s@100"].to_numpy()
        value = metrics["crm"]["dnn"]["oracle"]["hit_watch_s@100"]["per_seed"][seed]
        assert value == pytest.approx(np.nanmean(column), rel=1e-6)


def test_the_control_curve_is_the_mean_over_seeds(metrics):
    curve = metrics["crm"]["dnn"]["control_curve"]
    assert [point["condition_s"] for point in curve] == CURVE_S
    for point in curve:
        own = [seed["retrieved_watch_s"] for seed in point["per_seed"].values()]
        assert len(own) == 2 and point["retrieved_watch_s"] == pytest.approx(np.mean(own)) and point["n"] == 90
        assert {"recall@100", "bucket_lift"} <= set(point)


def test_checks_tell_what_is_reached_and_what_is_not(metrics):
    checks = metrics["crm_checks"]
    assert checks["prefix_ranks_identical"]["decision_transformer_prefix"]["ok"] is True
    assert checks["permuted_recall_spread"]["dnn_permuted"]["value"] == {"0": 0.0, "1": 0.0}
    assert checks["permuted_curve_ratio"]["dnn_permuted"]["ok"] is True
    assert checks["curve_strictly_rising"]["dnn"]["ok"] is True
    assert checks["curve_ratio"]["dnn"]["floor"] == 5.0 and checks["curve_ratio"]["dnn"]["ok"] is True
    assert checks["curve_ratio"]["decision_transformer"]["floor"] == 3.5
    assert set(checks["curve_ratio"]) == {"dnn", "decision_transformer"}
    gain = metrics["crm_gains"]["dnn"]["oracle_over_unconditioned"]
    own = checks["oracle_over_unconditioned"]["dnn"]
    assert own["value"] == gain["per_seed"]
    assert own["ok"] is all(value >= 0.35 for value in gain["per_seed"].values())
    assert checks["null_over_unconditioned"]["decision_transformer"]["floor"] == -0.12
    assert checks["maximum_over_average"]["dnn"]["ok"] is True
    assert checks["oracle_over_bayes"]["dnn"]["ok"] is None and checks["oracle_over_bayes"]["dnn"]["value"]


def test_a_flat_curve_is_not_called_rising_and_a_missing_value_is_no_pass(tmp_path):
    for seed in (0, 1):
        queries, values, curve, summary = an_evaluation(MODELS[0], seed, np.random.default_rng(seed))
        curve = [point | {"retrieved_watch_s": 40.0, "bucket_lift": None} for point in curve]
        write_evaluation(tmp_path, "dnn", seed, queries, values, curve, summary)
        prefix = an_evaluation(MODELS[5], seed, np.random.default_rng(seed))
        write_evaluation(tmp_path, "decision_transformer_prefix", seed, *prefix[:3], {"epoch": 1})
    checks = assemble(tmp_path, a_config())["crm_checks"]
    assert checks["curve_strictly_rising"]["dnn"]["ok"] is False
    assert "40 and 40 s" in checks["curve_strictly_rising"]["dnn"]["note"]
    assert checks["bucket_lift"]["dnn"]["ok"] is None
    assert checks["prefix_ranks_identical"]["decision_transformer_prefix"]["ok"] is None
    assert checks["oracle_over_unconditioned"]["dnn"] == checks["oracle_over_unconditioned"]["dnn"] | {
        "value": {}, "ok": None}
    assert "absent" in checks["permuted_curve_ratio"]


def test_indexes_stages_and_provenance_are_there(metrics):
    index = metrics["index"]["dnn"]
    assert index["recall_vs_exact"] == 1.0 and index["bytes"] == 1_940_000 and index["factory"] == "Flat"
    assert set(index["per_seed"]) == {"0", "1"} and "folder" not in index
    assert set(metrics["stages"]) == {"ingest", "crm", "evaluate"}
    assert metrics["stages"]["crm"] == {"seconds": 911.7, "rows": 1_436_609, "peak_mib": 2048.5}
    origin = metrics["provenance"]
    assert origin["seeds"] == [0, 1] and re.fullmatch("[0-9a-f]{64}", origin["config_hash"])
    assert origin["hardware"]["cores"] >= 1 and "numpy" in origin["packages"] and "users" in origin["intervals"]
    assert metrics["training"]["dnn"]["per_seed"]["1"]["train_s"] == 62.5


def test_the_file_is_json_without_nan_and_nothing_is_left_beside_it(run_dir):
    json.loads((run_dir / "metrics.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert not list(run_dir.rglob("*.tmp"))
    write_metrics(run_dir.parent / "odd", {"a": [float("nan"), np.float32(1.5), np.int64(3), np.bool_(True)]})
    odd = json.loads((run_dir.parent / "odd" / "metrics.json").read_text())
    assert odd.pop("sha256") and odd == {"a": [None, 1.5, 3, True]}


def test_results_of_another_config_are_left_out_and_named(tmp_path):
    for name, seed, more in [("dnn", 0, {}), ("dnn", 5, {}), ("gone", 0, {}), ("swing", 0, {"baseline": True})]:
        queries, values, curve, summary = an_evaluation(MODELS[0], seed, np.random.default_rng(0))
        write_evaluation(tmp_path, name, seed, queries, values, curve, summary | more)
    found, ignored = load_evaluations(tmp_path, a_config())
    assert list(found) == ["dnn", "swing"] and found["dnn"].seeds == (0,)
    assert ignored == ["dnn/seed=5", "gone/seed=0"]


def test_writing_again_replaces_and_order_of_queries_does_not_matter(tmp_path):
    for seed in (0, 1):
        queries, values, curve, summary = an_evaluation(MODELS[0], seed, np.random.default_rng(3))
        write_evaluation(tmp_path, "dnn", seed, queries, values, curve, summary)
    turned = {name: np.asarray(column)[::-1] for name, column in queries.items()}
    turned_values = {s: {m: v[::-1] for m, v in by_metric.items()} for s, by_metric in values.items()}
    write_evaluation(tmp_path, "dnn", 1, turned, turned_values, curve, summary)
    own = load_evaluations(tmp_path, a_config())[0]["dnn"]
    np.testing.assert_array_equal(own.query_id_Q, np.arange(QUERIES))
    np.testing.assert_array_equal(own.values["oracle"]["recall@100"][1], values["oracle"]["recall@100"])


def test_damaged_or_unequal_evaluations_are_refused_by_name(tmp_path):
    queries, values, curve, summary = an_evaluation(MODELS[0], 0, np.random.default_rng(0))
    write_evaluation(tmp_path, "dnn", 0, queries, values, curve, summary)
    write_evaluation(tmp_path, "dnn", 1, queries | {"query_id": np.arange(QUERIES) + 1}, values, curve, summary)
    with pytest.raises(WatchtowerError, match="seed=1 answered other queries"):
        assemble(tmp_path, a_config())
    (tmp_path / "evaluation" / "dnn" / "seed=1" / "queries.parquet").write_bytes(b"PAR1")
    with pytest.raises(WatchtowerError, match="queries.parquet cannot be read"):
        assemble(tmp_path, a_config())
    with pytest.raises(ValueError, match="lack user_id"):
        write_evaluation(tmp_path, "dnn", 2, {k: v for k, v in queries.items() if k != "user_id"}, {}, None, {})
    with pytest.raises(ValueError, match="one value a query"):
        write_evaluation(tmp_path, "dnn", 2, queries, {"oracle": {"recall@100": np.ones(3)}}, None, {})


def test_gates_look_up_dotted_paths(metrics):
    assert value_at(metrics, "crm.dnn.oracle.recall@100") == metrics["crm"]["dnn"]["oracle"]["recall@100"]["mean"]
    assert value_at(metrics, "index.dnn.recall_vs_exact") == 1.0
    dotted = {"crm": {"dnn": {"fixed_7.5": {"recall@100": {"mean": 0.2}}}}}
    assert value_at(dotted, "crm.dnn.fixed_7.5.recall@100") == 0.2
    for path in ("crm.dnn.oracle", "crm.nothing", "crm.dnn.oracle.recall@100.mean.more", "provenance.commit"):
        assert value_at(metrics, path) is None
    gates = {"crm.dnn.oracle.recall@100": 0.01, "index.dnn.recall_vs_exact": 1.5, "crm.gone": 0.1}
    assert failed_gates(metrics, gates) == ["index.dnn.recall_vs_exact is 1, at least 1.5 is asked for",
                                            "crm.gone was not measured, at least 0.1 is asked for"]


class _Page(HTMLParser):
    """Tags in balance, and every address that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(run_dir):
    html = (run_dir / "report.html").read_text()
    page = _Page()
    page.feed(html)
    assert not page.open
    return html, page, " ".join(page.text)


def test_the_report_needs_nothing_else_and_runs_nothing(run_dir):
    html, page, _ = read_page(run_dir)
    assert not page.fetched and not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in html and "@import" not in html and "prefers-color-scheme" in html
    assert "<script>" not in html and "&lt;script&gt;" in html and "invented &lt;run&gt; &amp; co" in html


def test_the_report_shows_every_part(run_dir, metrics):
    html, page, text = read_page(run_dir)
    for title in ("Training loss", "Validation recall by epoch", "Control curve", "Bucket lift", "Rows by day",
                  "What each condition finds, and how long it is watched"):
        assert title in text
    for model in metrics["crm"]:
        assert model in text
    for said in ("2,104", "duplicate", "1,436,609", "911.7", "Recall against exact search", "✓ reached"):
        assert said in text
    assert "not reached" in text or all(check["ok"] is not False for models in metrics["crm_checks"].values()
                                        for check in models.values() if isinstance(check, dict))
    assert "Not shown" not in text


def test_charts_are_sound_svg_with_title_and_description_inside_their_frame(run_dir):
    html, _, _ = read_page(run_dir)
    charts = re.findall(r'<svg class="chart".*?</svg>', html)
    assert len(charts) == 7
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.find("title").text and root.find("desc").text
        width, height = map(float, root.get("viewBox").split()[2:])
        for text in root.iter("text"):
            assert 0 <= float(text.get("x")) <= width and 8 <= float(text.get("y")) <= height
        assert "nan" not in chart


def test_a_report_of_an_empty_folder_says_what_is_missing(tmp_path):
    _, _, text = read_page(write_report(tmp_path).parent)
    assert "was not evaluated" in text and text.count("Not shown") >= 7


def test_a_run_that_only_trained_has_its_curves(tmp_path):
    write_events(tmp_path / "events.jsonl", np.random.default_rng(0))
    (tmp_path / "metrics.json").write_text('{"crm": ')
    html, _, text = read_page(write_report(tmp_path).parent)
    assert len(re.findall('<svg class="chart"', html)) == 2 and "dnn_permuted" in text


def test_repeated_steps_of_a_continued_run_count_once(tmp_path):
    told = [(0, 5.0), (10, 4.0), (20, 3.0), (10, 4.5), (20, None), (30, 2.0)]
    (tmp_path / "events.jsonl").write_bytes(b"".join(line_of(
        {"event": "train_step", "model": "dnn/seed=0", "step": step, "loss": loss}) for step, loss in told))
    assert training_curves(tmp_path / "events.jsonl")["loss"] == {"dnn": {"0": [(0, 5.0), (10, 4.5), (30, 2.0)]}}


def test_the_terminal_table_fits_and_names_everything(metrics):
    table = results_table(metrics)
    assert max(map(len, table.splitlines())) <= 110
    for model, result in metrics["crm"].items():
        assert model in table and all(s in table for s in result if s != "control_curve")
    assert f"{metrics['crm']['dnn']['oracle']['recall@100']['mean']:.3f}" in table
    assert "properties of a faithful CRM reached" in table
    assert results_table({}).startswith("no results")


@pytest.mark.parametrize("low,high", [(0, 1), (0.31, 0.34), (0, 1.4e9), (-3, 8), (5, 5), (0, 0), (1e-7, 3e-7),
                                      (-2, -2)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = round_ticks(low, high, 5)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_seeds_that_answered_other_requests_are_not_joined(tmp_path):
    for seed in (0, 1):
        queries, *rest = an_evaluation(MODELS[0], seed, np.random.default_rng(0))
        write_evaluation(tmp_path, "dnn", seed, queries | {"user_id": np.arange(QUERIES) + seed}, *rest)
    with pytest.raises(WatchtowerError, match="other queries"):
        assemble(tmp_path, a_config())
