"""The catalogue by vocabulary row: every feature, known and unknown, and the users' features."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import InputError
from configs.schema import DataConfig
from launch.ingest import SerialExecutor, ingest
from trainer.catalogue import (
    DURATION_BUCKETS,
    NEVER_SEEN_MS,
    Catalogue,
    catalogue_columns,
    duration_buckets,
    read_items,
    read_users,
    write_users,
)
from trainer.catalogue import UserFeatures as Users
from trainer.sequences import SequenceStore
from trainer.vocabulary import Vocabulary

T0 = 1_650_000_000_000
ITEMS = {"item_id": [40, 10, 30, 20], "author_id": pa.array([7, None, 9, 7], pa.int64()),
         "tags": [[3, 1], None, [], [1]], "duration_s": pa.array([10.0, None, -1.0, 3600.0], pa.float32()),
         "content_vector": [[1.0, 2.0], None, [0.5, 0.0], [np.nan, 1.0]], "kind": ["ad", "normal", None, "ad"],
         "live": [True, False, None, True]}


def items_of(tmp_path, columns, **config):
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    return read_items(DataConfig(items=str(tmp_path / "items.parquet"), **config))


def written(tmp_path, columns, vocabulary, categories=("kind", "live")):
    items, _ = items_of(tmp_path, columns, item_categories=list(categories))
    size = vocabulary.rows
    columns = catalogue_columns(tmp_path, items, vocabulary, list(categories))
    columns.write(tmp_path, np.full(size, np.nan, np.float32), np.full(size, NEVER_SEEN_MS))
    return Catalogue.open(tmp_path), columns.notes


def names(folder, name):
    return [None, *pq.read_table(folder / "vocabulary" / f"{name}.parquet")["value"].to_pylist()]


def test_features_by_row_beside_an_item_that_only_the_logs_know(tmp_path):
    catalogue, notes = written(tmp_path, ITEMS, Vocabulary([10, 20, 25, 30, 40]))
    assert catalogue.item_id_N.tolist() == [0, 10, 20, 25, 30, 40]
    assert catalogue.in_catalogue_N.tolist() == [False, True, True, False, True, True]
    assert [names(tmp_path, "authors")[r] for r in catalogue.author_row_N] == [None, None, 7, None, 9, 7]
    tags = [[names(tmp_path, "tags")[r] for r in catalogue.tag_rows[a:b]]
            for a, b in zip(catalogue.tag_offsets_N1, catalogue.tag_offsets_N1[1:], strict=False)]
    assert tags == [[], [], [1], [], [], [3, 1]]
    assert catalogue.tag_rows.min() == 1
    np.testing.assert_array_equal(catalogue.content_NC, [[0, 0], [0, 0], [0, 0], [0, 0], [0.5, 0], [1, 2]])
    assert catalogue.has_content_N.tolist() == [False, False, False, False, True, True]
    assert notes == {"unusable_content_vectors": 1}
    assert [names(tmp_path, "category_kind")[r] for r in catalogue.categories["kind"]] == [
        None, "normal", "ad", None, None, "ad"]
    assert [names(tmp_path, "category_live")[r] for r in catalogue.categories["live"]] == [
        None, False, True, None, None, True]
    assert (catalogue.author_rows, catalogue.tag_rows_count, catalogue.category_rows) == (3, 3, {"kind": 3, "live": 3})
    assert not catalogue.content_NC.flags.owndata and not catalogue.author_row_N.flags.writeable


def test_a_catalogue_of_ids_alone(tmp_path):
    catalogue, _ = written(tmp_path, {"item_id": [2, 1]}, Vocabulary([1, 2]), ())
    assert catalogue.content_NC is None
    assert (catalogue.author_rows, catalogue.tag_rows_count, catalogue.category_rows) == (1, 1, {})
    assert catalogue.tag_offsets_N1.tolist() == [0, 0, 0, 0]
    assert catalogue.duration_bucket_N.tolist() == [0, 0, 0]


def test_other_list_types_are_read(tmp_path):
    items = {"item_id": [1, 2], "tags": pa.array([[1], [2, 3]], pa.list_(pa.int32())),
             "content_vector": pa.array([[1, 2], [3, 4]], pa.list_(pa.float64(), 2))}
    catalogue, _ = written(tmp_path, items, Vocabulary([1, 2]), ())
    assert catalogue.content_NC[1:].tolist() == [[1, 2], [3, 4]]
    assert catalogue.tag_rows.tolist() == [1, 2, 3]


def test_duration_buckets():
    buckets = duration_buckets(np.array([np.nan, 0.1, 13.0, 72.0, 260.0, 3600.0, 1e9]))
    assert buckets[0] == 0
    assert (np.diff(buckets[1:-1]) > 0).all()
    assert buckets[1] == 1
    assert buckets[-1] == DURATION_BUCKETS - 1


@pytest.mark.parametrize(("change", "message"), [
    ({"item_id": ["a", "b", "c", "d"]}, "item_id is string.*int64"),
    ({"item_id": [1.0, 2.0, 3.0, 4.0]}, "item_id is double"),
    ({"item_id": [1, 1, 2, 3]}, "1 repeat one, of 4"),
    ({"item_id": [1, None, 2, 3]}, "1 rows have no item_id"),
    ({"tags": [["x"], [], [], []]}, "tags is list<.*string.*needs list<int64>"),
    ({"content_vector": [1.0, 2.0, 3.0, 4.0]}, "content_vector is double.*list<float>"),
    ({"kind": [["a"], ["b"], [], []]}, "kind is list.*one value a row"),
])
def test_wrong_catalogues(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        items_of(tmp_path, ITEMS | change, item_categories=["kind"])


def test_repeated_ids_within_the_share_are_counted_and_the_first_is_taken(tmp_path):
    items, notes = items_of(tmp_path, {"item_id": [5, 4, 5], "duration_s": [1.0, 2.0, 3.0]}, max_bad_share=0.5)
    assert notes == {"repeated_item_id": 1}
    assert items.to_pylist() == [{"item_id": 5, "duration_s": 1.0}, {"item_id": 4, "duration_s": 2.0}]


def test_vectors_of_two_widths(tmp_path):
    with pytest.raises(InputError, match="2 widths .2, 3.*at item 1"):
        written(tmp_path, {"item_id": [1, 2], "content_vector": [[1.0, 2.0], [1.0, 2.0, 3.0]]}, Vocabulary([1, 2]), ())


def test_missing_columns_and_mappings(tmp_path):
    with pytest.raises(InputError, match="item_id; the nearest is video_id.*data.item_columns={item_id:"):
        items_of(tmp_path, {"video_id": [1]})
    with pytest.raises(InputError, match="genre.*asked for by data.item_categories"):
        items_of(tmp_path, {"item_id": [1]}, item_categories=["genre"])
    with pytest.raises(InputError, match="data.item_columns: itemid is no column of ours.*nearest is item_id"):
        items_of(tmp_path, {"item_id": [1]}, item_columns={"itemid": "item_id"})
    items, _ = items_of(tmp_path, {"video_id": [1], "g": ["x"]}, item_categories=["genre"],
                        item_columns={"item_id": "video_id", "genre": "g"})
    assert items.to_pylist() == [{"item_id": 1, "genre": "x"}]


def test_user_features(tmp_path):
    pq.write_table(pa.table({"user_id": [2**40, 3], "degree": ["full", "low"], "onehot": [1.0, None]}),
                   tmp_path / "users.parquet")
    users, _ = read_users(DataConfig(users=str(tmp_path / "users.parquet"), user_categories=["degree", "onehot"]))
    write_users(tmp_path, users, ["degree", "onehot"])
    found = Users.open(tmp_path)
    assert found.category_rows == {"degree": 3, "onehot": 2}
    rows = found.rows_of(np.array([3, 2**40, 5, -1]))
    assert {name: r.tolist() for name, r in rows.items()} == {"degree": [2, 1, 0, 0], "onehot": [0, 1, 0, 0]}


def ingested(tmp_path, log_items, **config):
    size = len(log_items)
    pq.write_table(pa.table({"user_id": np.arange(size), "item_id": log_items, "timestamp_ms": T0 + np.arange(size),
                             "watch_time_s": np.full(size, 30.0, np.float32),
                             "duration_s": np.full(size, 60.0, np.float32)}), tmp_path / "logs.parquet")
    pq.write_table(pa.table({"item_id": [1, 2], "duration_s": pa.array([12.0, None], pa.float32())}),
                   tmp_path / "items.parquet")
    ingest(DataConfig(logs=str(tmp_path / "logs.parquet"), **config), tmp_path / "run", SerialExecutor())
    return SequenceStore(tmp_path / "run" / "sequences")


@pytest.mark.parametrize(("config", "ids", "in_catalogue"), [
    ({"items": True}, [1, 2], [True, True]),
    ({"items": True, "missing_items": "keep"}, [1, 2, 9], [True, True, False]),
    ({}, [1, 9], [False, False]),
])
def test_the_vocabulary_is_of_the_catalogue_or_also_of_the_logs(tmp_path, config, ids, in_catalogue):
    config = {key: str(tmp_path / "items.parquet") if key == "items" else value for key, value in config.items()}
    store = ingested(tmp_path, [1, 1, 9], max_bad_share=0.5, **config)
    assert store.vocabulary.id_V.tolist() == ids
    assert store.catalogue.in_catalogue_N[1:].tolist() == in_catalogue
    kept = [1, 1] if 9 not in ids else [1, 1, 9]
    found = [i for s in range(store.shards) for i in store.vocabulary.ids_of(store.open(s).item_row_E).tolist()]
    assert sorted(found) == kept
    first = dict(zip(store.catalogue.item_id_N.tolist(), store.catalogue.first_seen_ms_N.tolist(), strict=True))
    assert first[1] == T0
    assert first.get(2, NEVER_SEEN_MS) == NEVER_SEEN_MS


def test_a_duration_that_the_catalogue_lacks_comes_from_the_logs(tmp_path):
    store = ingested(tmp_path, [1, 2, 2], items=str(tmp_path / "items.parquet"))
    assert store.catalogue.duration_s_N[1:].tolist() == [12.0, 60.0]
