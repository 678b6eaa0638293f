"""The synthetic ceilings: what they rank, what is asked of them, and that nothing else reads the hidden state."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from configs.schema import Config
from trainer import ceiling, world_reader
from trainer.ceiling import FOLDER, expected_watch, synthetic_metrics, write_ceiling
from trainer.metrics import retrieval_metrics
from trainer.report import results_table, write_report
from trainer.results import assemble, write_evaluation, write_metrics
from trainer.world import World, WorldSpec, write_world
from trainer.world_truth import WorldTruth

SPEC = WorldSpec(users=150, items=200, tags_count=20, views_per_user=20.0, user_item_affinity=1.2)
MODELS = [{"name": "dnn", "tower": "dnn", "condition": "next"},
          {"name": "dnn_unconditioned", "tower": "dnn", "condition": "none", "bayes": True},
          {"name": "alone", "tower": "decision_transformer", "condition": "next"}]
AT = [10, 50]
READ = {"evaluate": {"at": AT, "bootstrap": 50, "read_histories": True}}


class SomeRequests(SimpleNamespace):
    """The fields of `trainer.requests.Requests` that the ceilings read, one relevant view a request."""

    def __len__(self) -> int:
        return len(self.user_id_Q)

    def take(self, which: np.ndarray) -> SomeRequests:
        return some_requests(self.user_id_Q[which], self.time_ms_Q[which], self.watch_s_Q[which],
                             self.relevant_rows[which])


def some_requests(user_id_Q, time_ms_Q, watch_s_Q, target_Q) -> SomeRequests:
    return SomeRequests(user_id_Q=user_id_Q, time_ms_Q=time_ms_Q, watch_s_Q=watch_s_Q, relevant_rows=target_Q,
                        relevant_offset_Q1=np.arange(len(user_id_Q) + 1))


class SomeData:
    """The parts of `CrmData` that the ceilings read: rows of the catalogue are not in the world's order, row 0 is
    the unknown item."""

    def __init__(self, run_dir: Path, world: World, **changes):
        self.run_dir = run_dir
        self.config = a_config(run_dir, **changes)
        ids_N = np.concatenate([[-1], np.random.default_rng(1).permutation(world.item_ids)])
        self.catalogue = SimpleNamespace(item_id_N=ids_N)
        logs = world.logs(0, world.spec.users)
        logs = logs.filter(pc.and_(logs["long_view"], pc.greater(logs["watch_time_s"], 0.0))).slice(0, 500)
        order = np.argsort(ids_N)
        row_Q = order[np.searchsorted(ids_N, logs["item_id"].to_numpy(), sorter=order)]
        self.test = some_requests(logs["user_id"].to_numpy(), logs["timestamp_ms"].to_numpy(),
                                  logs["watch_time_s"].to_numpy().astype(np.float64), row_Q)

    def world_items(self, world: World, rows: np.ndarray) -> np.ndarray:
        order = np.argsort(world.item_ids)
        return order[np.searchsorted(world.item_ids, self.catalogue.item_id_N[rows], sorter=order)]


def a_config(run_dir: Path, **changes) -> Config:
    values = {"name": "made up", "run_dir": str(run_dir), "seeds": [0, 1], "crm": {"models": MODELS},
              "data": {"logs": str(run_dir / "world" / "logs"), "target": {"column": "long_view"}},
              "evaluate": {"at": AT, "bootstrap": 50}}
    return Config.model_validate(values | changes)


@pytest.fixture(autouse=True)
def hasty_reading(monkeypatch):
    """What a reading is worth is for test_world_reader.py."""
    for name, value in {"SWEEPS": 4, "SETTLING": 2, "DRIVE_SWEEPS": 3, "DRIVE_SETTLING": 1}.items():
        monkeypatch.setattr(world_reader, name, value)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SPEC)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_world(tmp_path / "world", SPEC, processes=1)
    return tmp_path


def silent(event: str, **fields) -> None:
    pass


def the_ceiling(folder: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / FOLDER / "queries.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


def test_ceilings_are_recalls_of_what_the_world_knows(run_dir, world):
    data = SomeData(run_dir, world, **READ)
    write_ceiling(data, silent)
    found = the_ceiling(run_dir)
    score = WorldTruth(world, state="lasting").posterior_log_scores(
        data.test.user_id_Q, data.test.time_ms_Q, data.test.watch_s_Q, "long_view")
    target = data.world_items(world, data.test.relevant_rows)
    rank = (score > score[np.arange(len(target)), target][:, None]).sum(1)
    assert np.array_equal(found["lasting.oracle.recall@10"], rank < 10)
    recall = {name: found[f"{name}.recall@10"].mean() for name in
              ("lasting.none", "lasting.oracle", "true.none", "true.oracle")}
    assert recall["lasting.none"] < recall["true.none"] < recall["true.oracle"]
    assert recall["lasting.none"] < recall["lasting.oracle"] < recall["true.oracle"]
    assert {name.split(".")[0] for name in found if "." in name} == set(ceiling.CEILINGS)
    assert recall["true.none"] > found["history.none.recall@10"].mean()
    assert recall["true.oracle"] > found["history.oracle.recall@10"].mean() > found["history.none.recall@10"].mean()


def test_expected_watch_is_the_mean_of_what_would_be_watched(run_dir, world):
    data = SomeData(run_dir, world)
    rows_QK = np.random.default_rng(0).integers(1, 201, (len(data.test), 50))
    rows_QK[0, 5:] = -1
    found = expected_watch(data, rows_QK)
    seconds = WorldTruth(world).expected_watch_s(data.test.user_id_Q, data.test.time_ms_Q)
    of_lists = np.take_along_axis(seconds, data.world_items(world, np.maximum(rows_QK, 1)), axis=1)
    assert np.allclose(found["expected_watch_s@10"][1:], of_lists[1:, :10].mean(1), rtol=1e-5)
    assert np.isclose(found["expected_watch_s@50"][0], of_lists[0, :5].mean(), rtol=1e-5)
    write_ceiling(data, silent)
    assert (the_ceiling(run_dir)["true.most_watched.expected_watch_s@10"] >= found["expected_watch_s@10"] - 1e-3).all()


def test_other_logs_have_no_ceiling(tmp_path, world):
    data = SomeData(tmp_path, world)
    assert expected_watch(data, np.ones((len(data.test), 10), np.int64)) == {}
    write_ceiling(data, silent)
    assert not (tmp_path / FOLDER).exists()
    assert synthetic_metrics(tmp_path, data.config) == {}


def test_logs_of_another_world_are_told(run_dir, world):
    data = SomeData(run_dir, World(WorldSpec(users=150, items=200, tags_count=20, seed=1)))
    told = []
    write_ceiling(data, lambda event, **fields: told.append((event, fields)))
    assert told[0][0] == "warning" and "not of this world" in told[0][1]["message"]
    assert "not of this world" in synthetic_metrics(run_dir, data.config)["absent"]


@pytest.mark.parametrize(("rule", "possible"), [
    ({"column": "effective_view"}, True), ({"min_watch_s": 3.0}, True), ({"min_watch_s": 30.0}, False),
    ({"column": "like"}, False)])
def test_the_target_is_the_runs_own(run_dir, world, rule, possible):
    data = SomeData(run_dir, world, data={"logs": str(run_dir / "world" / "logs"), "target": rule})
    write_ceiling(data, silent)
    absent = synthetic_metrics(run_dir, data.config).get("absent")
    assert absent is None if possible else "not {" in absent
    assert expected_watch(data, np.ones((len(data.test), 10), np.int64))  # what is watched does not need the target


def test_a_sample_stands_in_for_many_requests(run_dir, world, monkeypatch):
    monkeypatch.setattr(ceiling, "CEILING_ELEMENTS", 200 * 80)
    monkeypatch.setattr(ceiling, "WATCH_ELEMENTS", 200 * 120)
    data = SomeData(run_dir, world)
    found = expected_watch(data, np.ones((len(data.test), 10), np.int64))
    assert np.isfinite(found["expected_watch_s@10"]).sum() == 120
    write_ceiling(data, silent)
    assert len(the_ceiling(run_dir)["query_id"]) == 80


def test_ceilings_are_made_once(run_dir, world):
    write_ceiling(SomeData(run_dir, world), silent)
    made = (run_dir / FOLDER / "queries.parquet").stat().st_mtime_ns
    write_ceiling(SomeData(run_dir, world), silent)
    assert (run_dir / FOLDER / "queries.parquet").stat().st_mtime_ns == made
    write_ceiling(SomeData(run_dir, world, evaluate={"at": [20], "bootstrap": 50}), silent)
    assert (run_dir / FOLDER / "queries.parquet").stat().st_mtime_ns != made


def with_models(run_dir: Path, world: World, share: float, **changes) -> SomeData:
    """An evaluated run, whose dnn closes a share of the way to the lasting ceiling at every request."""
    data = SomeData(run_dir, world, **changes)
    write_ceiling(data, silent)
    told = the_ceiling(run_dir)["lasting.oracle.recall@50"]
    rng = np.random.default_rng(0)
    queries = {"query_id": np.arange(len(data.test)), "user_id": data.test.user_id_Q,
               "timestamp_ms": data.test.time_ms_Q, "watch_time_s": data.test.watch_s_Q,
               "target_item_id": data.test.relevant_rows}
    for seed in (0, 1):
        bare = np.minimum(rng.random(len(told)) < 0.3, told)
        for name, strategy, recall in (("dnn_unconditioned", "none", bare),
                                       ("dnn_bayes", "oracle", bare + 0.5 * share * (told - bare)),
                                       ("dnn", "oracle", bare + share * (told - bare)), ("alone", "oracle", bare)):
            summary = {"index": {}}
            write_evaluation(run_dir, name, seed, queries, {strategy: {
                "recall@50": recall, "expected_watch_s@50": np.full(len(told), 20.0)}}, None, summary)
    return data


def test_share_of_the_way(run_dir, world):
    data = with_models(run_dir, world, 0.8, **READ)
    found = synthetic_metrics(run_dir, data.config)
    assert set(found["models"]) == {"dnn", "dnn_bayes"}  # `alone` has no unconditioned tower of its own kind
    dnn = found["models"]["dnn"]
    assert dnn["unconditioned"] == "dnn_unconditioned"
    assert dnn["share_of_way"]["lasting"]["mean"] == pytest.approx(0.8, abs=1e-6)
    assert dnn["share_of_way"]["lasting"]["ci95"] == pytest.approx([0.8, 0.8], abs=1e-6)
    assert dnn["share_of_way"]["true"]["mean"] < 0.8
    assert list(dnn["share_of_way"]) == list(found["ceiling"]) == ["history", "log", "lasting", "true"]
    assert found["models"]["dnn_bayes"]["share_of_way"]["lasting"]["per_seed"]["1"] == pytest.approx(0.4, abs=1e-6)
    told, untold = (found["ceiling"]["lasting"][name]["recall@50"]["mean"] for name in ("oracle", "none"))
    ceilings = the_ceiling(run_dir)
    assert told == pytest.approx(ceilings["lasting.oracle.recall@50"].mean())
    closed = 0.8 * (told - 0.3 * told)
    assert dnn["share_of_gain"]["lasting"]["mean"] == pytest.approx(closed / (told - untold), rel=0.2)


def test_an_evaluation_of_other_requests_has_no_share(run_dir, world):
    data = with_models(run_dir, world, 0.8)
    queries = {"query_id": np.arange(5), "user_id": np.arange(5), "timestamp_ms": np.arange(5),
               "watch_time_s": np.ones(5), "target_item_id": np.arange(5)}
    retrieved = retrieval_metrics(np.ones((5, 50), np.int64), (np.arange(6), np.ones(5, np.int64)), [50])
    for seed in (0, 1):
        write_evaluation(run_dir, "dnn", seed, queries, {"oracle": retrieved}, None, {"index": {}})
    assert set(synthetic_metrics(run_dir, data.config)["models"]) == {"dnn_bayes"}


def test_histories_are_read_where_asked(run_dir, world):
    data = SomeData(run_dir, world)
    write_ceiling(data, silent)
    assert {name.split(".")[0] for name in the_ceiling(run_dir) if "." in name} == {"lasting", "true"}
    assert list(synthetic_metrics(run_dir, data.config)["ceiling"]) == ["lasting", "true"]


def test_report_and_table_show_it(run_dir, world):
    data = with_models(run_dir, world, 0.8)
    metrics = assemble(run_dir, data.config) | {"synthetic": synthetic_metrics(run_dir, data.config)}
    metrics = json.loads(write_metrics(run_dir, metrics).read_text())
    shown = results_table(metrics)
    assert "80%" in shown and "would be watched" in shown and max(map(len, shown.splitlines())) <= 120
    page = write_report(run_dir).read_text()
    assert "Against the synthetic world" in page and "the greatest possible" in page


def test_only_the_ceiling_reads_the_hidden_state(repository: Path):
    def readers(module: str) -> set[str]:
        imports = re.compile(rf"^\s*(from|import)\b.*\b{module}\b", re.MULTILINE)
        return {str(path.relative_to(repository)) for room in ("configs", "embeddings", "trainer", "launch")
                for path in (repository / room).rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))}
    assert readers("world_truth") == {"trainer/ceiling.py", "trainer/world_reader.py"}
    assert readers("world_reader") == {"trainer/ceiling.py"}
