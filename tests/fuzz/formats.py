"""Every file that a reader of ours takes from somebody else: how a valid one is made, and how it is read.

`Format.read` reads a folder in which one file was changed. It returns a few words on what it saw, or raises a
WatchtowerError; anything else that it raises, an AssertionError of its own checks with it, is a finding. A sealed
format lies under a manifest with checksums: changed as it is, it must be refused; resealed (a hostile folder, whose
manifest fits) it must be refused or read as something sound.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

from configs.errors import WatchtowerError
from configs.loader import load
from configs.schema import Config, DataConfig
from embeddings.index import INDEX_FILES, IndexSpec, ItemIndex
from embeddings.snapshots import list_snapshots, publish, read_manifest, verify
from embeddings.table_state import FORMAT as TABLES_FORMAT
from embeddings.table_state import TableState, load_tables, write_state
from embeddings.tables import TableShard
from launch import run_folder, stages
from launch.ingest import SerialExecutor, ingest
from launch.train import _told
from trainer import catalogue, item_statistics, kuairand_csv, logs
from trainer.checkpoint import PENDING, checkpoints, read_pending, read_state
from trainer.engine import EngineSpec, load_dense_parameters, write_dense
from trainer.events import read_events, sealed
from trainer.item_statistics import ItemStatistics
from trainer.item_value import FOLDER as ITEM_VALUE
from trainer.item_value import MODEL, ItemValue, load_item_value
from trainer.labels import LISTS, Labels
from trainer.neighbors import publish_neighbors as publish_lists
from trainer.neighbors import read_neighbors, top_neighbors
from trainer.rebuild import Rebuild, Version
from trainer.report import results_table
from trainer.results import assemble, failed_gates, write_evaluation
from trainer.routing_evaluation import SCORES, RouterScores, score_schema
from trainer.sequences import SequenceStore, split_times
from trainer.vocabulary import Vocabulary
from trainer.world import read_spec

T0 = 1_650_000_000_000
ITEMS = np.arange(1, 9) * 10
VOCABULARY = Vocabulary(ITEMS)
LOG_HEADER = ("user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
              "long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab")
VIDEO_HEADER = ("video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
                "server_height,music_id,music_type,tag")


@dataclass(frozen=True)
class Format:
    """One file of one format.

    Attributes:
        name: of the format. file: inside the folder.
        make: writes a valid folder. read: reads it.
        sealed: the folder, inside, whose manifest vouches for the file; None where there is none.
        kind: json, parquet or bytes: how its changes are made besides bytewise ones.
    """

    name: str
    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], str]
    sealed: str | None = None
    kind: str = "bytes"


def reseal(folder: Path) -> None:
    """Make the manifest fit the files, as whoever hands over a folder can."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))


class Bench:
    """A scratch folder with a valid example of a format, in which its file is changed again and again."""

    def __init__(self, of: Format, scratch: Path):
        self.of, self.folder = of, scratch / of.name.replace("/", "-").replace(" ", "-")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        of.make(self.folder)
        self.path = self.folder / of.file
        self.valid = self.path.read_bytes()
        self._manifest = self.folder / of.sealed / "manifest.json" if of.sealed is not None else None
        self._sealed = self._manifest.read_bytes() if self._manifest else b""
        of.read(self.folder)  # the valid example must not be refused

    def outcome(self, data: bytes) -> str:
        """`read` or `refused`; raises what no reader may raise."""
        self.path.write_bytes(data)
        try:
            if self._manifest is not None and self.path != self._manifest:
                if data != self.valid:
                    try:
                        self.of.read(self.folder)
                    except WatchtowerError:
                        pass
                    else:
                        raise AssertionError(f"{self.of.name}: a change under an old checksum was read")
                reseal(self._manifest.parent)
            self.of.read(self.folder)
            return "read"
        except WatchtowerError as error:
            assert str(error).strip(), "an error without a message"
            return "refused"
        finally:
            self.path.write_bytes(self.valid)
            if self._manifest is not None:
                self._manifest.write_bytes(self._sealed)


# ------------------------------------------------------------------------------------------------- logs and tables

def log_table(rows: int = 40) -> pa.Table:
    rng = np.random.default_rng(0)
    watch = rng.exponential(20, rows).astype(np.float32)
    return pa.table({
        "user_id": rng.integers(0, 6, rows), "item_id": rng.choice(ITEMS, rows),
        "timestamp_ms": T0 + rng.integers(0, 9 * 86_400_000, rows),
        "watch_time_s": pa.array(watch, mask=rng.random(rows) < 0.2), "like": rng.random(rows) < 0.5})


def items_table() -> pa.Table:
    rng = np.random.default_rng(1)
    return pa.table({
        "item_id": ITEMS, "author_id": ITEMS // 20, "duration_s": rng.exponential(30, 8).astype(np.float32),
        "tags": pa.array([[1, 2], [2], [], None, [3], [1], [1, 3], [2]], pa.list_(pa.int64())),
        "content_vector": pa.array(rng.normal(size=(8, 4)).astype(np.float32).tolist(), pa.list_(pa.float32())),
        "kind": ["a", "b", None, "a", "c", "b", "a", "a"]})


def users_table() -> pa.Table:
    return pa.table({"user_id": np.arange(6), "country": ["de", "fr", None, "de", "pl", "fr"]})


def data_config(folder: Path, **more: Any) -> DataConfig:
    return DataConfig(logs=str(folder / "logs.parquet"), feedback=["like"], item_categories=["kind"],
                      user_categories=["country"], shards=2, max_bad_share=1.0, **more)


def write(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=16, write_page_checksum=True)


def check_rows(batches, data: DataConfig) -> str:
    """Clean all batches: a row is kept, and then sound, or quarantined and counted."""
    kept = bad = 0
    for first_row, batch in batches:
        found = logs.clean(batch, first_row, first_row, "log", data, VOCABULARY, np.full(9, np.nan, np.float32))
        rows = found.rows
        assert rows.num_rows + found.quarantined.num_rows == batch.num_rows
        assert sum(found.counts.values()) == found.quarantined.num_rows
        assert all(column.null_count == 0 for column in rows.columns)
        time, watch = rows["timestamp_ms"].to_numpy(), rows["watch_time_s"].to_numpy()
        assert ((time >= logs.FIRST_UNIX_MS) & (time < logs.LAST_UNIX_MS)).all()
        assert (np.isnan(watch) | ((watch >= 0) & (watch <= data.max_watch_s))).all()
        assert ((rows["item_row"].to_numpy() > 0) & (rows["item_row"].to_numpy() <= 8)).all()
        kept, bad = kept + rows.num_rows, bad + found.quarantined.num_rows
    return f"{kept} kept, {bad} quarantined"


def read_logs(folder: Path) -> str:
    data = data_config(folder)
    wanted = logs.wanted_columns(data)
    pieces = logs.parquet_pieces(logs.list_files(data.logs, "data.logs"), data)
    return check_rows((batch for piece in pieces for batch in logs.read_parquet_piece(piece, wanted)), data)


def read_items(folder: Path) -> str:
    table, _ = catalogue.read_items(data_config(folder, items=str(folder / "items.parquet")))
    vocabulary = Vocabulary(table["item_id"].to_numpy())
    duration_N, _ = catalogue.durations_by_row(table, vocabulary)
    into = folder / "catalogue"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    columns = catalogue.catalogue_columns(into, table, vocabulary, ["kind"])
    columns.write(into, duration_N, np.zeros(vocabulary.rows, np.int64))
    found = catalogue.Catalogue.open(into, vocabulary.rows)
    assert found.content_NC is None or np.isfinite(found.content_NC).all()
    return f"{len(found.item_id_N)} rows"


def read_users(folder: Path) -> str:
    table, _ = catalogue.read_users(data_config(folder, users=str(folder / "users.parquet")))
    into = folder / "users"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    catalogue.write_users(into, table, ["country"])
    return f"{len(catalogue.UserFeatures.open(into).user_id_U)} users"


def make_csv(folder: Path) -> None:
    (folder / "log_standard_1.csv").write_text(
        f"{LOG_HEADER}\n0,10,20220411,1900,1649675512388,0,0,0,0,0,0,0,1385,209900,0,0,0,0,1\n"
        "0,20,20220416,2000,1650111976017,1,1,0,0,1,0,1,65400,65400,0,0,0,0,0\n"
        "3,10,20220411,1100,1649645295928,1,0,0,0,0,0,0,9000,0,0,0,0,0,8\n")
    (folder / "video_features_basic_1.csv").write_text(
        f"{VIDEO_HEADER}\n10,441,NORMAL,2022-04-10,LongImport,1.0,209900.0,720.0,1280.0,9155697141,9.0,39\n"
        '20,443,AD,2022-04-10,Kmovie,0.0,65400.0,720.0,1280.0,6355810746,9.0,"12,65"\n')
    (folder / "user_features_1.csv").write_text("user_id,user_active_degree\n0,full_active\n3,UNKNOWN\n")


def csv_config(folder: Path) -> DataConfig:
    return DataConfig(logs=str(folder), format="kuairand_csv", effective_view={"column": "effective_view"},
                      target={"column": "long_view"}, feedback=["like"], item_categories=["video_type"],
                      user_categories=["user_active_degree"], max_bad_share=1.0)


def read_csv(folder: Path) -> str:
    data = csv_config(folder)
    pieces = kuairand_csv.csv_pieces(kuairand_csv.find_files(data)["logs"], data)
    kuairand_csv.read_items(data)
    kuairand_csv.read_users(data)
    return check_rows((batch for piece in pieces for batch in kuairand_csv.read_csv_piece(piece, data)), data)


# ------------------------------------------------------------------------------------------------------- run folders

def make_sequences(folder: Path) -> None:
    write(folder / "logs.parquet", log_table())
    write(folder / "items.parquet", items_table())
    write(folder / "users.parquet", users_table())
    ingest(data_config(folder, items=str(folder / "items.parquet"), users=str(folder / "users.parquet")),
           folder / "run", SerialExecutor())


def read_sequences(folder: Path) -> str:
    store = SequenceStore(folder / "run" / "sequences")
    events = 0
    for number in range(min(store.shards, 64)):
        shard = store.open(number)
        events += len(shard.item_row_E)
        for begin, length in zip(shard.offset_U.tolist(), shard.length_U.tolist(), strict=True):
            store.vocabulary.ids_of(shard.item_row_E[begin:begin + length][shard.item_row_E[begin:begin + length] > 0])
    found = store.catalogue
    assert len(found.item_id_N) == store.vocabulary.rows
    if store.users is not None:
        store.users.rows_of(np.arange(6))
    split_times(Config(split={"test_days": 2.0, "validation_days": 2.0}), store.manifest)
    return f"{events} events"


def make_neighbors(folder: Path) -> None:
    rng = np.random.default_rng(2)
    pair = rng.permutation(64)[:40]  # each once
    lists = top_neighbors(1 + pair // 8, 1 + pair % 8, rng.random(40), 9, 5)
    publish_lists(folder / "swing", T0, lists, VOCABULARY, {"kind": "channel"})


def read_lists(folder: Path) -> str:
    found = 0
    for snapshot in list_snapshots(folder / "swing"):
        lists = read_neighbors(snapshot.path, VOCABULARY)
        assert lists.offset_N1[0] == 0 and lists.offset_N1[-1] == len(lists.neighbor_L) == len(lists.score_L)
        assert len(lists.offset_N1) == 10 and (np.diff(lists.offset_N1) >= 0).all()
        assert not len(lists.neighbor_L) or 0 < lists.neighbor_L.min() and lists.neighbor_L.max() < 9
        assert np.isfinite(lists.score_L).all()
        found += len(lists.neighbor_L)
    return f"{found} neighbours"


def make_statistics(folder: Path) -> None:
    item_statistics.publish(folder, T0, ItemStatistics.empty(9), VOCABULARY, {"format": 2})
    target = folder / item_statistics.NAME / str(T0)
    assert target.is_dir()


def read_statistics(folder: Path) -> str:
    found = ItemStatistics.read(folder / item_statistics.NAME / str(T0), VOCABULARY)
    return f"{len(found.views_N)} rows"


def make_labels(folder: Path) -> None:
    rows, facts = 6, {"scale_s": [1.0, 2.0], "tau_s": [1.0, 1.0], "cap": [3.0, 3.0], "eta": 0.5}

    def part(into: Path) -> None:
        plain = {"request_id": np.arange(rows) // 2, "user_id": np.arange(rows),
                 "request_time_ms": T0 + np.arange(rows), "trigger_item_id": ITEMS[:rows],
                 "position": np.arange(rows, dtype=np.int32) + 1}
        lists = {name: pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * rows)).cast(kind), 2)
                 for name, kind in LISTS.items()}
        write(into / "part-00000.parquet", pa.table({**plain, **lists}))

    publish(folder / "labels", part, {
        "kind": "labels", "format": 1, "channels": ["swing", "content"], "shards": 1, "windows": [100], "window": 100,
        "by_window": {"100": facts}, **facts, "requests": 3, "rows": rows})


def read_labels(folder: Path) -> str:
    labels = Labels.open(folder / "labels")
    found = labels.shard(0)
    assert found.reward_ms_TC.shape == (len(found), len(labels.channels))
    assert np.isfinite(found.intensity_TC).all() and np.isfinite(found.uniqueness_TC).all()
    labels.scales.least_ms()
    return f"{len(found)} triggers"


def make_checkpoint(folder: Path) -> None:
    shards = [{"key": "items/weight/0", "table": "items", "kind": "weight", "offsets": [0, 0], "sizes": [5, 4],
               "table_rows": 5}]
    header = {"format": TABLES_FORMAT, "rank": 0, "world_size": 1, "optimizer": "sgd", "shards": shards}

    def files(into: Path) -> None:
        write_state(TableState(header, {"items/weight/0": torch.ones(5, 4)}), into, 0)
        dense = {f"{kind}/{name}": torch.full(tuple(value.shape), 0.5) for name, value in towers().named_parameters()
                 for kind in ("parameter", "exp_avg", "exp_avg_sq")}
        write_dense(into, dense, 7, EngineSpec(optimizer="adamw", learning_rate=0.1), {"global_steps": 7})
        save_file(pending_index().arrays(), into / PENDING)
        (into / "state.json").write_text(json.dumps({"epoch": 1, "step": 0, "global_step": 7, "fingerprint": "a",
                                                     "indexes": []}))

    publish(folder / "seed=0" / "step-7", files, {"kind": "checkpoint", "global_step": 7})


def towers() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


def pending_index() -> Rebuild:
    return Rebuild(Version(1, 7, T0), np.ones((8, 4), np.float32), ITEMS, np.ones((2, 4), np.float32))


def read_checkpoint(folder: Path) -> str:
    (path,) = checkpoints(folder / "seed=0")
    state = read_state(path)
    tensor = torch.zeros(5, 4)
    # All that load_tables reads of sharded tables, which need a process group.
    tables = SimpleNamespace(specs=[SimpleNamespace(name="items", rows=5, dim=4)], optimizer="sgd",
                             local_shards=lambda: [TableShard("items", "weight", 0, tensor)])
    load_tables(tables, path)
    module = towers()
    load_dense_parameters(module, path)
    rebuild = Rebuild.from_arrays(Version(1, 7, T0), read_pending(path))
    assert len(rebuild.vectors_ND) == len(rebuild.item_ids_N)
    return f"state of {len(state)} keys"


def make_index(folder: Path) -> None:
    vectors = np.random.default_rng(3).normal(size=(8, 4)).astype(np.float32)
    index = ItemIndex.build(vectors, ITEMS, IndexSpec("IVF2,Flat", {"nprobe": 2}, "cpu"))
    publish(folder / "m" / f"{T0}-7", index.save, {"kind": "index"})


def read_index(folder: Path) -> str:
    found = ""
    for snapshot in list_snapshots(folder / "m"):
        verify(snapshot.path, *INDEX_FILES)
        index = ItemIndex.load(snapshot.path)
        scores, ids = index.search(np.ones((2, 4), np.float32), 3)
        assert ids.shape == scores.shape == (2, 3)
        found = f"{index.size} items"
    return found


def make_markers(folder: Path) -> None:
    inputs = stages.stage_inputs(Config(run_dir=str(folder)), folder)
    for name in ("ingest", "crm"):
        stages._write_json(folder / "stages" / f"{name}.json", {
            "stage": name, "inputs": inputs[name].hash, "seconds": 1.0, "rows": 3, "peak_mib": 1.0})
        stages._write_json(folder / "stages" / "inputs" / f"{name}.json", inputs[name].reads)
    (folder / "indexes").mkdir(exist_ok=True)
    (folder / "stages" / "crm.outcome.json").write_text(json.dumps({"result": {"rows": 1}}))


def read_markers(folder: Path) -> str:
    config = Config(run_dir=str(folder))
    inputs = stages.stage_inputs(config, folder)
    for stage in stages.STAGES.values():
        stages.why_again(folder, stage, inputs[stage.name])
    wanted = stages.stages_to_run(folder, ["crm"], inputs)
    _told(folder / "stages" / "crm.outcome.json")
    return f"to run: {wanted}"


def make_metrics(folder: Path) -> None:
    measured = {"mean": 0.1, "ci95": [0.05, 0.15], "n": 10, "per_seed": {"0": 0.1}}
    strategy = {f"{name}@{k}": measured for name in ("recall", "ndcg") for k in (10, 100)}
    strategy |= {"retrieved_watch_s@100": measured, "hit_watch_s@100": measured}
    point = {"retrieved_watch_s": 5.0, "recall@100": 0.1, "bucket_lift": 1.0}
    (folder / "metrics.json").write_text(json.dumps({
        "crm": {"dnn": {"oracle": strategy, "average": strategy, "control_curve": [
            {"condition_s": s, **point, "per_seed": {"0": point}} for s in (10, 60)]}},
        "routing": {}, "index": {"dnn": {"recall_vs_exact": 1.0, "build_s": 0.1, "bytes": 100}},
        "stages": {"ingest": {"seconds": 1.0, "rows": 10, "peak_mib": 5.0}}, "checks": {},
        "provenance": {"version": "1", "commit": "abc", "seeds": [0]}}))


def read_metrics(folder: Path) -> str:
    with open(os.devnull, "w") as nowhere:
        print(results_table_of(folder), file=nowhere)
    stages.report(Config(), folder)
    return "a report"


def results_table_of(folder: Path) -> str:
    metrics = stages.read_metrics(folder)
    failed_gates(metrics or {}, {"crm.dnn.oracle.recall@100": 0.1})
    return "" if metrics is None else stages.told(folder / "metrics.json", lambda: results_table(metrics))


def make_evaluation(folder: Path) -> None:
    queries = {"query_id": np.arange(4), "user_id": np.arange(4) // 2, "timestamp_ms": T0 + np.arange(4),
               "watch_time_s": np.ones(4, np.float32), "target_item_id": ITEMS[:4]}
    measured = {f"recall@{k}": np.asarray([0, 1, 1, np.nan], np.float32) for k in (10, 100)}
    point = {"condition_s": 10.0, "retrieved_watch_s": 5.0, "recall@100": 0.1, "bucket_lift": 1.0, "n": 4}
    write_evaluation(folder, "dnn", 0, queries, {"oracle": measured}, [point, {**point, "condition_s": 30.0}],
                     {"epoch": 1, "train_s": 2.0, "index": {"recall_vs_exact": 1.0, "build_s": 0.1, "bytes": 9}})


def read_evaluation(folder: Path) -> str:
    config = Config.model_validate({"seeds": [0], "crm": {"models": [{"name": "dnn", "tower": "dnn"}]},
                                    "evaluate": {"bootstrap": 5}})
    metrics = stages.told(folder / "evaluation", lambda: assemble(folder, config))
    json.dumps(metrics, allow_nan=False)
    return f"{len(metrics['crm'])} models"


def make_scores(folder: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.full(8, 0.5, np.float32)), 2)

    def files(into: Path) -> None:
        write(into / SCORES, pa.table([np.arange(4) // 2, np.asarray([1, 2, 1, 2], np.int32), ITEMS[:4], lists, lists],
                                      schema=score_schema(2)))

    publish(folder / "evaluation" / "routing" / "capts" / "seed=0", files, {"kind": "router scores",
                                                                           "channels": ["swing", "content"]})


def read_scores(folder: Path) -> str:
    run = SimpleNamespace(folder=folder, snapshots=SimpleNamespace(names=["swing", "content"]), config=Config())
    scores = RouterScores.open(run, "capts", 0, True)
    rows = scores.of(0)
    value_TC, score_TC = scores.matrices(rows, SimpleNamespace(
        request_id_R=np.arange(2), trigger_offset_R1=np.asarray([0, 2, 4]), trigger_row_T=np.arange(1, 5),
        position_T=np.asarray([1, 2, 1, 2])))
    assert value_TC.shape == score_TC.shape == (4, 2)
    return f"{len(value_TC)} triggers"


def make_item_value(folder: Path) -> None:
    model = ItemValue(3)
    publish(folder / ITEM_VALUE, lambda into: save_file(
        {name: value.numpy().copy() for name, value in model.state_dict().items()}, into / MODEL),
        {"fingerprint": "a", "channels": ["swing"], "features": ["a", "b", "c"]})


def read_item_value(folder: Path) -> str:
    return f"{sum(value.numel() for value in load_item_value(folder).parameters())} parameters"


def make_config(folder: Path) -> None:
    (folder / "base.yaml").write_text("train: {epochs: 2, batch_rows: 64}\nseeds: [0, 1]\n")
    (folder / "run.yaml").write_text(
        "extends: base.yaml\nname: fuzzed\nsplit: {test_start: 2026-01-05}\n"
        "crm:\n  models:\n    - {name: dnn, tower: dnn}\n    - &u {name: none, tower: dnn, condition: none}\n"
        "gates: {at_least: {crm.dnn.oracle.recall@100: 0.1}}\ndata: {columns: {item_id: video_id}}\n")


def read_config(folder: Path) -> str:
    config = load(folder / "run.yaml")
    return config.name


def make_override(folder: Path) -> None:
    make_config(folder)
    (folder / "override").write_text("crm.models.0.name=mlp")


def read_override(folder: Path) -> str:
    text = (folder / "override").read_bytes().decode("utf-8", "surrogateescape")
    return load(folder / "base.yaml", text.split("\n")).name


def make_events(folder: Path) -> None:
    event = {"event": "train_step", "time": 1.0, "step": 3, "loss": 4.1}
    (folder / "events.jsonl").write_bytes(sealed(json.dumps(event).encode()))
    (folder / "run.lock").write_text(json.dumps({"pid": 1, "host": "somewhere", "started": "5", "since": "today"}))


def read_all_events(folder: Path) -> str:
    read = sum(1 for _ in read_events(folder / "events.jsonl"))
    lines = [line.split(b',"crc":')[0] + b"}" for line in (folder / "events.jsonl").read_bytes().split(b"\n")]
    resealed = folder / "resealed.jsonl"  # by whoever hands over a folder
    resealed.write_bytes(b"".join(map(sealed, lines)))
    return f"{read} events, {sum(1 for _ in read_events(resealed))} resealed"


def read_lock(folder: Path) -> str:
    return str(run_folder._holder((folder / "run.lock").read_bytes().decode("utf-8", "replace")))


def make_world(folder: Path) -> None:
    from trainer.world import WorldSpec, write_world

    write_world(folder / "world", WorldSpec(users=6, items=8, authors=3, tags_count=4, days=3, views_per_user=5),
                processes=1)


def read_world(folder: Path) -> str:
    return str(read_spec(folder / "world"))


def read_any_manifest(folder: Path) -> str:
    return f"{len(read_manifest(folder / 'm' / f'{T0}-7')['files'])} files"


def _made(name: str, table: Callable[[], pa.Table]) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, table())


SEQUENCES, INDEX, STEP = "run/sequences", f"m/{T0}-7", "seed=0/step-7"
JUDGED, SCORED = "evaluation/dnn/seed=0", "evaluation/routing/capts/seed=0"
FORMATS = [
    Format("logs", "logs.parquet", _made("logs.parquet", log_table), read_logs, kind="parquet"),
    Format("items", "items.parquet", _made("items.parquet", items_table), read_items, kind="parquet"),
    Format("users", "users.parquet", _made("users.parquet", users_table), read_users, kind="parquet"),
    Format("kuairand log", "log_standard_1.csv", make_csv, read_csv),
    Format("kuairand items", "video_features_basic_1.csv", make_csv, read_csv),
    Format("kuairand users", "user_features_1.csv", make_csv, read_csv),
    Format("config", "run.yaml", make_config, read_config),
    Format("override", "override", make_override, read_override),
    Format("manifest", f"{INDEX}/manifest.json", make_index, read_any_manifest, kind="json"),
    Format("index ids", f"{INDEX}/item_ids.parquet", make_index, read_index, INDEX, "parquet"),
    Format("neighbors", f"swing/{T0}/neighbors.parquet", make_neighbors, read_lists, f"swing/{T0}", "parquet"),
    Format("item statistics", f"{item_statistics.NAME}/{T0}/{item_statistics.STATISTICS}", make_statistics,
           read_statistics, f"{item_statistics.NAME}/{T0}", "parquet"),
    Format("labels", "labels/part-00000.parquet", make_labels, read_labels, "labels", "parquet"),
    Format("labels manifest", "labels/manifest.json", make_labels, read_labels, kind="json"),
    Format("checkpoint state", f"{STEP}/state.json", make_checkpoint, read_checkpoint, STEP, "json"),
    Format("checkpoint tables", f"{STEP}/tables-rank0.json", make_checkpoint, read_checkpoint, STEP, "json"),
    Format("checkpoint tensors", f"{STEP}/tables-rank0.safetensors", make_checkpoint, read_checkpoint, STEP),
    Format("checkpoint towers", f"{STEP}/dense.safetensors", make_checkpoint, read_checkpoint, STEP),
    Format("checkpoint header", f"{STEP}/dense.json", make_checkpoint, read_checkpoint, STEP, "json"),
    Format("checkpoint pending", f"{STEP}/{PENDING}", make_checkpoint, read_checkpoint, STEP),
    Format("evaluation queries", f"{JUDGED}/queries.parquet", make_evaluation, read_evaluation, kind="parquet"),
    Format("evaluation curve", f"{JUDGED}/curve.json", make_evaluation, read_evaluation, kind="json"),
    Format("evaluation summary", f"{JUDGED}/summary.json", make_evaluation, read_evaluation, kind="json"),
    Format("router scores", f"{SCORED}/{SCORES}", make_scores, read_scores, SCORED, "parquet"),
    Format("item value", f"{ITEM_VALUE}/{MODEL}", make_item_value, read_item_value, ITEM_VALUE),
    Format("item value manifest", f"{ITEM_VALUE}/manifest.json", make_item_value, read_item_value, kind="json"),
    Format("sequences manifest", f"{SEQUENCES}/manifest.json", make_sequences, read_sequences, kind="json"),
    Format("sequences events", f"{SEQUENCES}/shard-00000.events.arrow", make_sequences, read_sequences, SEQUENCES),
    Format("sequences users", f"{SEQUENCES}/shard-00000.users.arrow", make_sequences, read_sequences, SEQUENCES),
    Format("catalogue", f"{SEQUENCES}/catalogue.arrow", make_sequences, read_sequences, SEQUENCES),
    Format("vocabulary", f"{SEQUENCES}/vocabulary/items.parquet", make_sequences, read_sequences, SEQUENCES,
           "parquet"),
    Format("stage marker", "stages/crm.json", make_markers, read_markers, kind="json"),
    Format("stage inputs", "stages/inputs/ingest.json", make_markers, read_markers, kind="json"),
    Format("outcome", "stages/crm.outcome.json", make_markers, read_markers, kind="json"),
    Format("metrics", "metrics.json", make_metrics, read_metrics, kind="json"),
    Format("events", "events.jsonl", make_events, read_all_events, kind="json"),
    Format("lock", "run.lock", make_events, read_lock, kind="json"),
    Format("world", "world/world.json", make_world, read_world, kind="json"),
]
