"""Sequences against a plain sort of the same rows, and the split."""

import gc
import itertools
import tempfile
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Config, DataConfig, SplitConfig
from launch.ingest import SerialExecutor, ingest
from trainer import sequences
from trainer.sequences import SequenceStore, is_test_user, order_of, shard_of, split_times, user_hash

T0 = 1_650_000_000_000
DAY_MS = 86_400_000
ROWS = st.lists(st.tuples(
    st.integers(0, 5), st.integers(-(2**40), 2**40).map(lambda i: i // 2**38), st.integers(0, 4),
    st.sampled_from([None, 0.0, 1.5, 3.0, 60.25]), st.booleans()), min_size=1, max_size=60)


def frame(rows) -> pd.DataFrame:
    columns = ["user_id", "item_id", "timestamp_ms", "watch_time_s", "like"]
    found = pd.DataFrame(rows, columns=columns).astype({"user_id": "int64", "item_id": "int64"})
    found["timestamp_ms"] = found["timestamp_ms"].astype("int64") * 1000 + T0
    found["watch_time_s"] = found["watch_time_s"].astype("float32")
    return found


def write(folder: Path, rows: pd.DataFrame, files: int, group: int) -> None:
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        found = pa.Table.from_pandas(rows.iloc[part], preserve_index=False)
        pq.write_table(found, folder / f"{i}.parquet", row_group_size=group)


def ingested(folder: Path, **config):
    data = DataConfig(logs=str(folder / "logs"), feedback=["like"], **{"shards": 3, **config})
    return ingest(data, folder / "run", SerialExecutor())


def as_frame(store: SequenceStore) -> pd.DataFrame:
    parts = []
    for i in range(store.shards):
        shard = store.open(i)
        user = np.repeat(shard.user_id_U, shard.length_U)
        assert np.array_equal(shard.offset_U, np.cumsum(shard.length_U) - shard.length_U)
        assert (shard_of(shard.user_id_U, store.shards) == i).all()
        parts.append(pd.DataFrame({
            "user_id": user, "item_id": store.vocabulary.ids_of(shard.item_row_E), "timestamp_ms": shard.timestamp_ms_E,
            "watch_time_s": shard.watch_time_s_E, "like": shard.feedback["like"].astype(bool),
            "is_effective": shard.is_effective_E}))
    return pd.concat(parts, ignore_index=True)


KEYS = ["user_id", "timestamp_ms", "item_id", "watch_time_s", "like"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(ROWS, st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**32), st.integers(1, 4))
def test_sequences_equal_a_plain_sort_for_any_order_and_any_files(rows, files, group, seed, shards):
    rows = frame([*rows, (0, 0, 0, 60.25, True)])  # one effective view at least
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "logs", rows.sample(frac=1, random_state=seed % 2**31), files, group)
        summary = ingested(Path(scratch), shards=shards)
        store = SequenceStore(Path(scratch) / "run" / "sequences")
        found = as_frame(store)
        expected = rows.drop_duplicates()
        expected = expected.assign(is_effective=(expected["watch_time_s"] >= 3).to_numpy())
        # Users are spread over shards, and ties (same user, time and item) have an order of their own.
        assert found.groupby("user_id", sort=False).ngroups == found["user_id"].nunique()
        in_order = found.sort_values(["user_id", "timestamp_ms", "item_id"], kind="stable")
        assert (in_order.index == found.sort_values("user_id", kind="stable").index).all()
        pd.testing.assert_frame_equal(found.sort_values(KEYS, ignore_index=True)[[*KEYS, "is_effective"]],
                                      expected.sort_values(KEYS, ignore_index=True)[[*KEYS, "is_effective"]],
                                      check_dtype=False)
        assert summary.quarantined.get("duplicate", 0) == len(rows) - len(expected)
        statistics = summary.statistics
        assert statistics["rows_read"] == len(rows)
        assert statistics["effective"] == expected["is_effective"].sum()
        assert statistics["feedback"]["like"] == {"true": expected["like"].sum(), "unknown": 0}
        assert statistics["null_watch_share"] == pytest.approx(expected["watch_time_s"].isna().mean())
        first = expected.groupby("item_id")["timestamp_ms"].min()
        catalogue = store.catalogue
        assert catalogue.item_id_N[1:].tolist() == sorted(expected["item_id"].unique())
        assert catalogue.first_seen_ms_N[1:].tolist() == first.sort_index().tolist()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(ROWS, st.integers(0, 2**31))
def test_order_and_shards_change_no_users_sequence(rows, seed):
    rows = frame([*rows, (0, 0, 0, 60.25, True)])
    sequences = []
    for files, group, order, shards in ((1, 100, 0, 1), (3, 2, seed, 4)):
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch) / "logs", rows.sample(frac=1, random_state=order), files, group)
            ingested(Path(scratch), shards=shards)
            sequences.append(as_frame(SequenceStore(Path(scratch) / "run" / "sequences"))
                             .sort_values("user_id", kind="stable", ignore_index=True))
    pd.testing.assert_frame_equal(*sequences)


def test_the_serial_executor_spills(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = frame(np.column_stack([rng.integers(0, 40, 500), rng.integers(0, 9, 500), rng.integers(0, 99, 500),
                                  rng.integers(0, 9, 500), rng.integers(0, 2, 500)])).astype({"like": bool})
    found = []
    for buffered, shards in ((4_000_000, 3), (60, 3), (4_000_000, 64), (60, 64), (1, 64)):  # some of 64 have no user
        monkeypatch.setattr(SerialExecutor, "buffered_rows", buffered)
        folder = tmp_path / f"{buffered}-{shards}"
        folder.mkdir()
        write(folder / "logs", rows, 5, 30)
        ingested(folder, shards=shards)
        found.append(as_frame(SequenceStore(folder / "run" / "sequences")).sort_values("user_id", kind="stable",
                                                                                       ignore_index=True))
    for other in found[1:]:
        pd.testing.assert_frame_equal(found[0], other)


def test_duplicates_are_quarantined_with_file_and_row(tmp_path):
    rows = frame([(1, 1, 0, 5.0, True), (1, 2, 0, 5.0, True), (1, 1, 0, 5.0, True), (1, 1, 0, 5.0, False),
                  (1, 1, 0, None, True), (1, 1, 0, None, True), (1, 1, 0, 5.0, True)])
    write(tmp_path / "logs", rows, 2, 100)
    summary = ingested(tmp_path, max_bad_share=0.0)  # duplicates are no bad rows
    assert summary.quarantined == {"duplicate": 3}
    parts = sorted((tmp_path / "run" / "quarantine").glob("part-*.parquet"))
    bad = pd.concat([pq.read_table(p).to_pandas() for p in parts]).sort_values(["source", "row"])
    assert [(Path(s).name, r) for s, r in zip(bad["source"], bad["row"], strict=True)] == [
        ("0.parquet", 2), ("1.parquet", 1), ("1.parquet", 2)]
    assert bad["watch_time_s"].isna().tolist() == [False, True, False]
    assert bad["item_id"].tolist() == [1, 1, 1]


def test_a_shard_is_mapped_without_a_copy_and_keeps_no_file_open(tmp_path):
    write(tmp_path / "logs", frame([(u, u, 0, 5.0, True) for u in range(50)]), 1, 100)
    ingested(tmp_path, shards=40)
    store = SequenceStore(tmp_path / "run" / "sequences")

    def mapped() -> int:
        return sum("events.arrow" in line for line in Path("/proc/self/maps").read_text().splitlines())

    handles = len(list(Path("/proc/self/fd").iterdir()))
    shards = [store.open(i) for i in range(store.shards)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= handles
    assert mapped() == sum(len(s.user_id_U) > 0 for s in shards)
    full = next(s for s in shards if len(s.user_id_U))
    assert not full.item_row_E.flags.owndata
    assert not full.item_row_E.flags.writeable
    kept = full.watch_time_s_E
    del shards, full
    gc.collect()
    assert mapped() <= 1
    assert kept[0] == 5.0


def test_there_is_nothing_to_open(tmp_path):
    with pytest.raises(InputError, match="no sequences there"):
        SequenceStore(tmp_path)


# -------------------------------------------------------------------------------------------------- users and split

def test_user_hash_is_the_same_for_ever_and_depends_on_the_seed():
    ids = np.array([0, 1, 2**40, -1])
    assert user_hash(ids, 0).dtype == np.uint64
    assert (user_hash(ids, 0) != user_hash(ids, 1)).all()
    assert user_hash(ids, 7).tolist() == [int(user_hash(np.array([i]), 7)[0]) for i in ids]
    assert int(user_hash(np.array([0]), 0)[0]) == FIRST_HASH


FIRST_HASH = 12035550249420947055  # changing it moves users to other shards and other splits


@pytest.mark.parametrize("ids", [np.arange(100_000), np.arange(100_000) * 2**20, -np.arange(100_000) * 4096])
def test_shares_of_users_are_even_nested_and_independent_of_the_shard(ids):
    tenth = is_test_user(ids, SplitConfig(test_users={"share": 0.1, "seed": 3}))
    third = is_test_user(ids, SplitConfig(test_users={"share": 0.3, "seed": 3}))
    assert abs(tenth.mean() - 0.1) < 0.004
    assert abs(third.mean() - 0.3) < 0.006
    assert not (tenth & ~third).any()
    shard = shard_of(ids, 8)
    assert np.bincount(shard, minlength=8).min() > 12_000
    assert max(abs(third[shard == s].mean() - 0.3) for s in range(8)) < 0.015
    assert is_test_user(ids, SplitConfig()) is None
    assert not is_test_user(ids, SplitConfig(test_users={"share": 0.0})).any()
    assert is_test_user(ids, SplitConfig(test_users={"share": 1.0})).all()


def test_test_users_from_a_file(tmp_path):
    pq.write_table(pa.table({"user_id": pa.array([3, None, 2**40], pa.int64())}), tmp_path / "users.parquet")
    split = SplitConfig(test_users=str(tmp_path / "users.parquet"))
    assert is_test_user(np.array([1, 3, 0, 2**40]), split).tolist() == [False, True, False, True]
    with pytest.raises(InputError, match="split.test_users"):
        is_test_user(np.array([1]), SplitConfig(test_users=str(tmp_path / "none.parquet")))
    pq.write_table(pa.table({"uid": [3]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="user_id"):
        is_test_user(np.array([1]), SplitConfig(test_users=str(tmp_path / "other.parquet")))


def manifest(first: datetime, last: datetime, end: datetime | None = None) -> dict:
    def ms(t):
        return round(t.replace(tzinfo=UTC).timestamp() * 1000)

    return {"statistics": {"first_timestamp_ms": ms(first), "last_timestamp_ms": ms(last),
                           "end_99_9_ms": ms(end or last)}}


def times(split: dict, logs: dict, utc_offset_h: float = 0.0) -> list[str]:
    found = split_times(Config(split=split, data={"utc_offset_h": utc_offset_h}), logs)
    return [f"{datetime.fromtimestamp(t / 1000, UTC):%m-%d %H:%M}" for t in
            (found.validation_start_ms, found.test_start_ms, found.test_end_ms)]


LOGS = manifest(datetime(2022, 4, 9), datetime(2022, 5, 8, 15, 52))


@pytest.mark.parametrize(("split", "offset", "expected"), [
    ({}, 0.0, ["05-07 00:00", "05-08 00:00", "05-09 00:00"]),
    ({}, 8.0, ["05-06 16:00", "05-07 16:00", "05-08 16:00"]),
    ({"validation_days": 2, "test_days": 0.5}, 0.0, ["05-06 12:00", "05-08 12:00", "05-09 00:00"]),
    ({"validation_start": date(2022, 5, 5), "test_start": date(2022, 5, 7), "test_end": date(2022, 5, 9)}, 8.0,
     ["05-04 16:00", "05-06 16:00", "05-08 16:00"]),
    ({"test_start": date(2022, 5, 1)}, -5.5, ["04-30 05:30", "05-01 05:30", "05-09 05:30"]),
])
def test_split_times(split, offset, expected):
    assert times(split, LOGS, offset) == expected


def test_stragglers_do_not_move_the_split():
    logs = manifest(datetime(2017, 10, 1), datetime(2017, 11, 13), datetime(2017, 10, 17, 3))
    assert times({}, logs) == ["10-16 00:00", "10-17 00:00", "10-18 00:00"]


@pytest.mark.parametrize(("split", "message"), [
    ({"validation_start": date(2022, 5, 8)}, "must follow each other"),
    ({"validation_days": 40}, "nothing is left to train on"),
    ({"validation_start": date(2022, 4, 9)}, "nothing is left to train on"),
    ({"test_start": date(2022, 6, 1), "test_end": date(2022, 7, 1)}, "the test begins 2022-06-01"),
])
def test_splits_that_cannot_be(split, message):
    with pytest.raises(InputError, match=message):
        times(split, LOGS)


def test_the_999_permille_of_an_ingested_log(tmp_path):
    rows = frame([(u % 50, u, 0, 5.0, True) for u in range(4000)])
    rows["timestamp_ms"] = T0 + np.arange(4000) * (10 * DAY_MS // 4000)
    rows.loc[3999, "timestamp_ms"] = T0 + 100 * DAY_MS
    write(tmp_path / "logs", rows, 2, 900)
    statistics = ingested(tmp_path, utc_offset_h=5.5).statistics
    assert T0 + 9 * DAY_MS < statistics["end_99_9_ms"] <= T0 + 10 * DAY_MS + 3_600_000
    assert sum(statistics["rows_by_day"].values()) == 4000
    local = pd.to_datetime(rows["timestamp_ms"] + 5.5 * 3_600_000, unit="ms").dt.strftime("%Y-%m-%d")
    assert statistics["rows_by_day"] == local.value_counts().to_dict()
    assert any("stragglers" in w for w in statistics["warnings"])


@settings(max_examples=60)
@given(st.lists(st.one_of(st.integers(-3, 3), st.integers(-2**62, 2**62), st.integers(2**40, 2**40 + 5000)),
                max_size=60))
def test_rows_by_user_are_in_the_order_they_came(ids):
    user = np.array(ids, np.int64)
    at, bounds = order_of(user)
    np.testing.assert_array_equal(at, np.argsort(user, kind="stable"))
    assert [user[at[begin:end]].tolist() for begin, end in itertools.pairwise(bounds)] == [
        [one] * ids.count(one) for one in sorted(set(ids))]


def test_no_pattern_of_ids_fills_few_slots():
    """Multiples of a Fibonacci number, which a product with 2^64 over the golden ratio puts beside each other: of these
    a table with such a hash took 20 s."""
    user = np.arange(200_000) * 102_334_155
    code, user_id_U = sequences._numbered(user, np.uint64(7))
    assert user_id_U.tolist() == user.tolist() and code.tolist() == list(range(len(user)))
