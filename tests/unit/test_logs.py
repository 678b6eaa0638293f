"""Reading and cleaning logs: every reason of the quarantine, every wrong column, and what is read as unknown."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import InputError
from configs.schema import DataConfig
from trainer import logs
from trainer.vocabulary import Vocabulary, rows_of_values

T0 = 1_650_000_000_000


def table(**columns) -> pa.Table:
    size = len(next(iter(columns.values()))) if columns else 3
    base = {"user_id": pa.array([1] * size), "item_id": pa.array([7] * size), "timestamp_ms": pa.array([T0] * size),
            "watch_time_s": pa.array([5.0] * size, pa.float32())}
    return pa.table(base | {k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()})


def read(path, data):
    pieces = logs.parquet_pieces(logs.list_files(str(path), "data.logs"), data)
    wanted = logs.wanted_columns(data)
    return [(piece, row, batch) for piece in pieces for row, batch in logs.read_parquet_piece(piece, wanted)]


def cleaned(tmp_path, source, duration_s_N=None, **config):
    path = tmp_path / "logs.parquet"
    pq.write_table(source, path)
    data = DataConfig(logs=str(path), **config)
    [(piece, row, batch)] = read(path, data)
    vocabulary = Vocabulary([7, 8])
    duration_s_N = np.full(3, np.nan, np.float32) if duration_s_N is None else duration_s_N
    return logs.clean(batch, row, piece.order, piece.source, data, vocabulary, duration_s_N)


@pytest.mark.parametrize(("reason", "change"), [
    ("null_user_id", {"user_id": [1, None, 1]}),
    ("null_item_id", {"item_id": [7, None, 7]}),
    ("null_timestamp", {"timestamp_ms": [T0, None, T0]}),
    ("negative_timestamp", {"timestamp_ms": [T0, -5, T0]}),
    ("timestamp_not_ms", {"timestamp_ms": [T0, T0 // 1000, T0]}),
    ("timestamp_not_ms", {"timestamp_ms": [T0, T0 * 1000, T0]}),
    ("negative_watch_time", {"watch_time_s": [1.0, -0.5, 1.0]}),
    ("not_finite_watch_time", {"watch_time_s": pa.array([1.0, np.nan, 1.0], from_pandas=False)}),
    ("not_finite_watch_time", {"watch_time_s": [1.0, -np.inf, 1.0]}),
    ("watch_time_above_max", {"watch_time_s": [1.0, 86_400.1, 1.0]}),
    ("item_not_in_catalogue", {"item_id": [7, 9, 8]}),
])
def test_each_reason_is_counted_and_its_row_kept(tmp_path, reason, change):
    result = cleaned(tmp_path, table(**change))
    assert result.counts == {reason: 1}
    assert result.rows.num_rows == 2
    [bad] = result.quarantined.to_pylist()
    assert bad["reason"] == reason
    assert bad["row"] == 1
    assert bad["source"] == str(tmp_path / "logs.parquet")
    assert result.rows["order"].to_pylist() == [0, 2]


def test_a_row_has_one_reason(tmp_path):
    result = cleaned(tmp_path, table(user_id=pa.array([None], pa.int64()), item_id=pa.array([None], pa.int64()),
                                     timestamp_ms=[-1], watch_time_s=[-1.0]))
    assert result.counts == {"null_user_id": 1}
    [bad] = result.quarantined.to_pylist()
    assert (bad["user_id"], bad["item_id"], bad["timestamp_ms"], bad["watch_time_s"]) == (None, None, -1, -1.0)


def test_an_unknown_watch_time_is_kept_and_not_effective(tmp_path):
    rows = cleaned(tmp_path, table(watch_time_s=pa.array([None, 2.9, 3.0], pa.float32()))).rows
    assert rows["is_effective"].to_pylist() == [0, 0, 1]
    assert rows["is_target"].to_pylist() == [0, 0, 1]
    assert np.isnan(rows["watch_time_s"][0].as_py())


def test_the_whole_video_is_effective_by_the_logs_or_the_catalogues_duration(tmp_path):
    source = table(watch_time_s=[2.0, 2.0, 2.0, 2.0], item_id=[7, 8, 7, 8],
                   duration_s=pa.array([2.0, 2.5, None, None], pa.float32()))
    rows = cleaned(tmp_path, source, np.array([np.nan, 1.5, np.nan], np.float32)).rows
    assert rows["is_effective"].to_pylist() == [1, 0, 1, 0]
    np.testing.assert_array_equal(rows["duration_s"].to_numpy(), np.float32([2.0, 2.5, 1.5, np.nan]))


def test_the_minimum_is_compared_in_the_logs_precision(tmp_path):
    source = table(watch_time_s=pa.array([0.7, 0.69], pa.float32()))
    assert cleaned(tmp_path, source, effective_view={"min_watch_s": 0.7}).rows["is_effective"].to_pylist() == [1, 0]


def test_null_flags_and_unusable_durations_are_counted(tmp_path):
    source = table(valid=[True, None, False], late=[None, True, None], session=[3, None, 4], like=[True, None, False],
                   duration_s=[0.0, -1.0, np.inf])
    result = cleaned(tmp_path, source, effective_view={"column": "valid"}, ordinal_time="late", session="session",
                     feedback=["like"], target={"min_watch_s": 3})
    assert result.notes == {"unusable_durations": 3, "null_is_effective": 1, "null_is_ordinal": 2, "null_session": 1}
    assert result.rows["is_effective"].to_pylist() == [1, 0, 0]
    assert result.rows["is_ordinal"].to_pylist() == [0, 1, 0]
    assert result.rows["session"].to_pylist() == [3, logs.NULL_SESSION, 4]
    assert result.rows["feedback_like"].to_pylist() == [1, -1, 0]
    assert result.rows["is_target"].to_pylist() == [1, 1, 1]


def test_ids_beyond_int32_are_exact(tmp_path):
    big = [2**62 + 1, 2**62 + 2, -(2**63)]
    rows = cleaned(tmp_path, table(user_id=big)).rows
    assert rows["user_id"].to_pylist() == big


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint64(), pa.int8(), pa.dictionary(pa.int32(), pa.int64())])
def test_integer_ids_of_any_width(tmp_path, kind):
    ids = pa.array([1, 2, 3])
    ids = ids.dictionary_encode() if pa.types.is_dictionary(kind) else ids.cast(kind)
    assert cleaned(tmp_path, table(user_id=ids)).rows["user_id"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.timestamp("s"), pa.float64()])
def test_times_of_other_types_that_say_their_unit(tmp_path, kind):
    milliseconds = pa.array([T0] * 3, pa.timestamp("ms", "UTC"))
    times = milliseconds.cast(kind) if pa.types.is_timestamp(kind) else pa.array([float(T0)] * 3)
    assert cleaned(tmp_path, table(timestamp_ms=times)).rows["timestamp_ms"].to_pylist() == [T0] * 3


@pytest.mark.parametrize(("change", "words"), [
    ({"user_id": ["a", "b", "c"]}, ["user_id is string", "needs int64", "hash them"]),
    ({"item_id": [1.0, 2.0, 3.0]}, ["item_id is double", "needs int64", "float cannot hold"]),
    ({"user_id": pa.array([2**63, 1, 1], pa.uint64())}, ["user_id is uint64", "do not fit"]),
    ({"timestamp_ms": [1.5, 2.5, 3.5]}, ["timestamp_ms is double", "do not fit", "whole milliseconds"]),
    ({"timestamp_ms": ["2022-04-09"] * 3}, ["timestamp_ms is string", "Unix times"]),
    ({"watch_time_s": ["5"] * 3}, ["watch_time_s is string", "float32"]),
    ({"valid": ["yes"] * 3}, ["valid is string", "needs bool"]),
    ({"valid": [0, 1, 2]}, ["values from 0 to 2"]),
    ({"like": [0.0, 1.0, 1.0]}, ["like is double", "needs bool"]),
    ({"session": ["s1"] * 3}, ["session is string", "int64"]),
])
def test_wrong_types_name_file_column_found_and_needed(tmp_path, change, words):
    source = table(**({"valid": [True] * 3, "like": [True] * 3, "session": [1] * 3} | change))
    with pytest.raises(InputError) as caught:
        cleaned(tmp_path, source, effective_view={"column": "valid"}, feedback=["like"], session="session")
    for word in ["logs.parquet", *words]:
        assert word in str(caught.value)


def test_missing_columns_name_the_nearest_and_the_mapping(tmp_path):
    source = table().rename_columns(["userId", "video", "timestamp_ms", "watch_time"])
    with pytest.raises(InputError) as caught:
        cleaned(tmp_path, source)
    message = str(caught.value)
    assert "3 needed column(s) missing" in message
    assert "user_id; the nearest is userId" in message
    assert "watch_time_s; the nearest is watch_time; if it has another name: data.columns={watch_time_s:" in message
    assert "The file has: userId, video, timestamp_ms, watch_time." in message


def test_a_missing_flag_names_its_key(tmp_path):
    with pytest.raises(InputError, match="longview.*asked for by data.target.column.*the nearest is long_view"):
        cleaned(tmp_path, table(long_view=[True] * 3), target={"column": "longview"})


def test_columns_are_mapped(tmp_path):
    source = table(is_click=[True, False, True]).rename_columns(["u", "i", "t", "w", "is_click"])
    rows = cleaned(tmp_path, source, effective_view={"column": "valid"}, columns={
        "user_id": "u", "item_id": "i", "timestamp_ms": "t", "watch_time_s": "w", "valid": "is_click"}).rows
    assert rows["is_effective"].to_pylist() == [1, 0, 1]


def test_a_mapping_the_wrong_way_round_is_told(tmp_path):
    with pytest.raises(InputError, match="data.columns: usr_id is no log column of ours; the nearest is user_id"):
        cleaned(tmp_path, table(), columns={"usr_id": "user_id"})


@pytest.mark.parametrize(("example", "unit"), [(1_650_000_000, "seconds"), (1_650_000_000_000_000, "microseconds"),
                                               (1_650_000_000_000_000_000, "nanoseconds"), (5, "something else")])
def test_the_clock_names_its_unit(example, unit):
    with pytest.raises(InputError, match=f"column time holds {unit}, not milliseconds"):
        logs.check_clock(6, 10, example, "time", "logs.parquet")
    logs.check_clock(5, 10, example, "time", "logs.parquet")


def test_pieces_cover_all_rows_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "PIECE_ROWS", 10)
    monkeypatch.setattr(logs, "BATCH_ROWS", 3)
    folder = tmp_path / "logs" / "date=2022-04-09"
    folder.mkdir(parents=True)
    users = np.arange(47)
    for name, part, size in (("b.parquet", users[20:], 4), ("a.parquet", users[:20], 7)):
        pq.write_table(table(user_id=part.tolist()), folder / name, row_group_size=size)
    (tmp_path / "logs" / "_SUCCESS").write_text("")
    (tmp_path / "logs" / ".part.parquet.crc").write_text("")
    data = DataConfig(logs=str(tmp_path / "logs"))
    found = read(tmp_path / "logs", data)
    pieces = {piece.index: piece for piece, _, _ in found}
    assert max(p.rows for p in pieces.values()) <= 10
    orders = [p.order + row - p.first_row + i for p, row, batch in found for i in range(batch.num_rows)]
    assert orders == list(range(47))
    assert [u for _, _, batch in found for u in batch["user_id"].to_pylist()] == list(range(47))
    last_piece, last_row, last = found[-1]
    assert last_row + last.num_rows == 27  # rows are numbered within their file
    assert last_piece.source.endswith("b.parquet")


def test_a_file_url_is_read(tmp_path):
    pq.write_table(table(), tmp_path / "logs.parquet")
    data = DataConfig(logs=(tmp_path / "logs.parquet").as_uri())
    assert sum(batch.num_rows for _, _, batch in read(data.logs, data)) == 3


@pytest.mark.parametrize("dense", [True, False])
def test_vocabulary(dense):
    ids = np.array([5, 3, 9, 3]) if dense else np.array([2**62, 3, -(2**63), 3])
    vocabulary = Vocabulary(ids)
    assert vocabulary.rows == 4
    assert vocabulary.id_V.tolist() == sorted(set(ids.tolist()))
    unknown = [-1, 4, 2**63 - 1, -(2**63) + 1]
    assert vocabulary.rows_of(np.array([*vocabulary.id_V, *unknown])).tolist() == [1, 2, 3, 0, 0, 0, 0]
    assert vocabulary.ids_of(np.array([3, 1])).tolist() == [vocabulary.id_V[2], vocabulary.id_V[0]]
    with pytest.raises(IndexError):
        vocabulary.ids_of(np.array([0]))
    assert Vocabulary([]).rows_of(np.array([1])).tolist() == [0]


@pytest.mark.parametrize(("values", "rows", "distinct"), [
    (["b", None, "a", "b"], [2, 0, 1, 2], ["a", "b"]), ([3, None, -1, 3], [2, 0, 1, 2], [-1, 3]),
    ([1.0, np.nan, None, 0.5], [2, 0, 0, 1], [0.5, 1.0]), ([None, None], [0, 0], []), ([], [], []),
])
def test_rows_of_values(values, rows, distinct):
    found, kept = rows_of_values(pa.array(values, from_pandas=False))
    assert found.tolist() == rows
    assert kept.to_pylist() == distinct
