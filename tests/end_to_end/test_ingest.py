"""The ingest stage on a local Ray: the same sequences as one process makes, and every bad input ends in one message."""

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import InputError
from configs.schema import Config, DataConfig
from embeddings import snapshots
from launch import ingest as stage
from launch.ingest import RayExecutor, SerialExecutor, ingest, run_ingest
from trainer import sequences
from trainer.sequences import SequenceStore

T0 = 1_650_000_000_000


@pytest.fixture(scope="module")
def executor(two_cpus):
    return RayExecutor()


def log_rows(size: int = 4000, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {"user_id": rng.integers(0, 200, size) * 2**33, "item_id": rng.integers(0, 50, size),
            "timestamp_ms": T0 + rng.integers(0, 5 * 86_400_000, size),
            "watch_time_s": pa.array(rng.exponential(20, size).astype(np.float32), mask=rng.random(size) < 0.2)}


def write(path: Path, columns: dict, group: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "manifest.json"}


def nothing_half_written(run: Path) -> bool:
    """No sequences, no folder of an attempt; a quarantine only whole."""
    left = {p.name for p in run.iterdir()} if run.exists() else set()
    if "quarantine" in left:
        snapshots.verify(run / "quarantine")
    return left <= {"quarantine"}


@pytest.mark.parametrize("sorted_pieces", [256, 0])
def test_ray_and_one_process_write_the_same_bytes(executor, tmp_path, monkeypatch, sorted_pieces):
    monkeypatch.setattr("trainer.logs.PIECE_ROWS", 1000)
    rows = log_rows()
    for part in range(3):
        write(tmp_path / "logs" / f"{part}.parquet", {k: v[part::3] for k, v in rows.items()}, 300)
    write(tmp_path / "logs" / "again.parquet", {k: v[:40] for k, v in rows.items()})
    write(tmp_path / "items.parquet", {"item_id": np.arange(49), "duration_s": np.full(49, 30.0)})
    data = DataConfig(logs=str(tmp_path / "logs"), items=str(tmp_path / "items.parquet"), max_bad_share=0.5, shards=5)
    on_ray = ingest(data, tmp_path / "ray", RayExecutor(sorted_pieces=sorted_pieces))
    alone = ingest(data, tmp_path / "serial", SerialExecutor())
    assert on_ray.quarantined.keys() == {"duplicate", "item_not_in_catalogue"}
    assert contents(tmp_path / "ray" / "sequences") == contents(tmp_path / "serial" / "sequences")
    assert contents(tmp_path / "ray" / "quarantine") == contents(tmp_path / "serial" / "quarantine")
    assert on_ray.manifest == alone.manifest
    snapshots.verify(tmp_path / "ray" / "sequences")
    bad = sum(pq.read_metadata(p).num_rows for p in (tmp_path / "ray" / "quarantine").glob("part-*.parquet"))
    assert bad == sum(on_ray.quarantined.values()) == on_ray.statistics["rows_read"] - on_ray.statistics["rows"]


def test_without_a_catalogue_the_vocabulary_comes_from_the_logs(executor, tmp_path):
    write(tmp_path / "logs" / "a.parquet", log_rows())
    summary = ingest(DataConfig(logs=str(tmp_path / "logs")), tmp_path / "run", executor)
    assert summary.statistics["items"] == 50
    assert SequenceStore(tmp_path / "run" / "sequences").shards == 8


def test_the_stage_runs_once_and_tells_what_it_did(executor, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "PROGRESS_EVERY_S", 0.05)
    write(tmp_path / "logs" / "a.parquet", log_rows())
    config = Config(run_dir=str(tmp_path / "run"), data={"logs": str(tmp_path / "logs"), "shards": 2})
    found = run_ingest(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert found["rows"] == 4000
    assert found["users"] == 200
    assert "ingest: read " in said and "/1 pieces" in said and "4,000 of 4,000 rows kept" in said
    assert run_ingest(config, tmp_path / "run") == found
    assert "already there" in capsys.readouterr().out


def test_the_same_input_does_nothing_and_any_change_ingests_anew(tmp_path, monkeypatch):
    path = write(tmp_path / "logs" / "a.parquet", log_rows())
    data = DataConfig(logs=str(tmp_path / "logs"), shards=2)
    run = tmp_path / "run"

    def seen(data) -> tuple[bool, int]:
        summary = ingest(data, run, SerialExecutor())
        assert nothing_half_written(run / "none") and {p.name for p in run.iterdir()} <= {"sequences", "quarantine"}
        return summary.reused, summary.statistics["rows"]

    assert seen(data) == (False, 4000)
    before = contents(run / "sequences")
    inode = (run / "sequences").stat().st_ino
    assert seen(data) == (True, 4000)
    assert (run / "sequences").stat().st_ino == inode and contents(run / "sequences") == before
    assert seen(data.model_copy(update={"utc_offset_h": 8.0})) == (False, 4000)
    write(tmp_path / "logs" / "b.parquet", {k: v[:100] for k, v in log_rows(seed=1).items()})
    assert seen(data)[0] is False
    assert seen(data) == (True, 4100)
    os.utime(path, ns=(1, 1))
    assert seen(data) == (False, 4100)
    (run / "sequences" / "shard-00001.events.arrow").unlink()
    assert seen(data) == (False, 4100)
    # A run that fails leaves the sequences that are there alone.
    write(tmp_path / "logs" / "c.parquet", {"user_id": [1]})
    with pytest.raises(InputError):
        ingest(data, run, SerialExecutor())
    assert SequenceStore(run / "sequences").manifest["statistics"]["rows"] == 4100


def test_a_user_with_one_event_and_columns_that_come_and_go(tmp_path):
    write(tmp_path / "logs" / "a.parquet", {k: v[:1] for k, v in log_rows().items()} | {"watch_time_s": [9.0]})
    write(tmp_path / "logs" / "b.parquet", {"watch_time_s": [None], "duration_s": [4.0], "user_id": [5], "item_id": [5],
                                            "timestamp_ms": [T0], "other": ["x"]})
    summary = ingest(DataConfig(logs=str(tmp_path / "logs"), shards=1), tmp_path / "run", SerialExecutor())
    shard = SequenceStore(tmp_path / "run" / "sequences").open(0)
    assert shard.length_U.tolist() == [1, 1]
    assert summary.statistics["effective"] == 1


# ------------------------------------------------------------------------------------------------------- bad inputs

def good(path: Path, **change) -> Path:
    return write(path, log_rows(200) | change)


def cut_off(path: Path) -> None:
    data = good(path).read_bytes()
    path.write_bytes(data[:len(data) // 2])


def damaged_page(path: Path) -> None:
    data = bytearray(good(path).read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)


def with_users(path: Path, users) -> None:
    good(path)
    write(path.parent.parent / "users.parquet", users)


BAD = {
    "no file": (lambda p: None, {}, ["data.logs", "does not exist"]),
    "no parquet": (lambda p: (p.parent.mkdir(), (p.parent / "logs.csv").write_text("a,b\n1,2\n")), {},
                   ["is a folder with no .parquet file", "logs.csv"]),
    "empty folder": (lambda p: p.parent.mkdir(), {}, ["it holds nothing"]),
    "no rows": (lambda p: write(p, {k: v[:0] for k, v in log_rows(5).items()}), {}, ["has no rows"]),
    "no Parquet at all": (lambda p: (p.parent.mkdir(), p.write_bytes(b"not parquet")), {},
                          ["a.parquet", "cannot be read as Parquet"]),
    "zero bytes": (lambda p: (p.parent.mkdir(), p.write_bytes(b"")), {}, ["a.parquet", "cannot be read as Parquet"]),
    "cut off": (cut_off, {}, ["a.parquet", "corrupt, cut off"]),
    "damaged page": (damaged_page, {}, ["a.parquet", "corrupt"]),
    "string ids": (lambda p: good(p, user_id=["u"] * 200), {}, ["user_id is string", "needs int64"]),
    "float ids": (lambda p: good(p, item_id=np.arange(200.0)), {}, ["item_id is double", "needs int64"]),
    "missing column": (lambda p: write(p, {k: v for k, v in log_rows(9).items() if k != "watch_time_s"}), {},
                       ["watch_time_s", "missing"]),
    "seconds": (lambda p: good(p, timestamp_ms=np.arange(200) + T0 // 1000), {},
                ["timestamp_ms holds seconds", "Multiply"]),
    "mapped seconds": (lambda p: good(p, ts=np.arange(200) + T0 // 1000), {"columns": {"timestamp_ms": "ts"}},
                       ["column ts holds seconds"]),
    "microseconds": (lambda p: good(p, timestamp_ms=np.arange(200) + T0 * 1000), {}, ["holds microseconds", "Divide"]),
    "negative times": (lambda p: good(p, timestamp_ms=np.arange(200) - 500), {}, ["negative_timestamp 200", "100.0%"]),
    "too many bad rows": (lambda p: good(p, watch_time_s=np.where(np.arange(200) < 3, -1.0, 5.0)), {},
                          ["3 of 200 rows (1.5%)", "allows 1.0%: negative_watch_time 3", "raise data.max_bad_share"]),
    "watch in milliseconds": (lambda p: good(p, watch_time_s=np.full(200, 90_000.0)), {}, ["in milliseconds?"]),
    "not a number": (lambda p: good(p, watch_time_s=np.full(200, np.nan)), {}, ["null, not as NaN"]),
    "all bad, all allowed": (lambda p: good(p, watch_time_s=np.full(200, -1.0)), {"max_bad_share": 1.0},
                             ["no row is left of 200 (negative_watch_time 200)"]),
    "null watch times": (lambda p: good(p, watch_time_s=pa.nulls(200)), {},
                         ["no view lasts 3 s", "null on 100%", "column: effective_view"]),
    "no effective view": (lambda p: good(p, flag=np.zeros(200, bool)), {"effective_view": {"column": "flag"}},
                          ["data.effective_view: column flag is true on no row"]),
    "no target": (lambda p: good(p, flag=np.zeros(200, bool)), {"target": {"column": "flag"}}, ["data.target"]),
    "items not in the catalogue": (lambda p: (good(p), write(p.parent.parent / "items.parquet", {"item_id": [1]})),
                                   {"items": "items.parquet"}, ["item_not_in_catalogue", "data.missing_items=keep"]),
    "no catalogue": (good, {"items": "items.parquet"}, ["data.items", "does not exist"]),
    "empty users": (lambda p: with_users(p, {"user_id": pa.array([], pa.int64())}), {"users": "users.parquet"},
                    ["users.parquet", "has no rows"]),
    "an unknown scheme": (good, {"logs": "ftp://host/logs"}, ["ftp://host/logs", "s3://"]),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_ends_in_one_message(tmp_path, name):
    make, change, words = BAD[name]
    make(tmp_path / "logs" / "a.parquet")
    for key in ("items", "users"):
        change = change | ({key: str(tmp_path / change[key])} if key in change else {})
    with pytest.raises(InputError) as caught:
        ingest(DataConfig(**{"logs": str(tmp_path / "logs"), "shards": 2} | change), tmp_path / "run", SerialExecutor())
    for word in words:
        assert word in str(caught.value)
    assert nothing_half_written(tmp_path / "run")


def test_null_watch_times_are_fine_where_a_flag_tells(tmp_path):
    good(tmp_path / "logs" / "a.parquet", watch_time_s=pa.nulls(200), flag=np.ones(200, bool))
    data = DataConfig(logs=str(tmp_path / "logs"), effective_view={"column": "flag"})
    summary = ingest(data, tmp_path / "run", SerialExecutor())
    assert summary.statistics["effective"] == 200
    assert summary.statistics["null_watch_share"] == 1.0
    assert summary.statistics["watch_time_s"]["p50"] is None
    assert "no condition can be learnt" in str(summary)


@pytest.mark.parametrize("name", ["damaged page", "seconds", "too many bad rows"])
def test_bad_input_on_ray_is_our_error_and_not_rays(executor, tmp_path, name):
    make, change, words = BAD[name]
    make(tmp_path / "logs" / "a.parquet")
    with pytest.raises(InputError) as caught:
        ingest(DataConfig(logs=str(tmp_path / "logs"), shards=2, **change), tmp_path / "run", executor)
    assert type(caught.value) is InputError
    assert words[0] in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert nothing_half_written(tmp_path / "run")


@pytest.mark.parametrize("at", ["write_batch", "save", "publish"])
def test_a_disk_that_fills(tmp_path, monkeypatch, at):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    good(tmp_path / "logs" / "a.parquet")
    place = {"write_batch": (sequences, "write_batch"), "save": (stage.Vocabulary, "save"),
             "publish": (stage, "_move")}[at]
    monkeypatch.setattr(*place, full)
    with pytest.raises(Exception, match="the disk is full"):
        ingest(DataConfig(logs=str(tmp_path / "logs")), tmp_path / "run", SerialExecutor())
    assert nothing_half_written(tmp_path / "run")


def test_what_a_dead_attempt_left_is_removed(tmp_path):
    good(tmp_path / "logs" / "a.parquet")
    dead = tmp_path / "run" / f".ingest.attempt-{'0' * 32}.tmp"
    (dead / "sequences").mkdir(parents=True)
    ingest(DataConfig(logs=str(tmp_path / "logs")), tmp_path / "run", SerialExecutor())
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"sequences"}


def test_a_run_folder_that_cannot_be_made(tmp_path):
    good(tmp_path / "logs" / "a.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        ingest(DataConfig(logs=str(tmp_path / "logs")), tmp_path / "file" / "run", SerialExecutor())
