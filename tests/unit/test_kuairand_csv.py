"""The published KuaiRand layout: real column names, small files, our columns out of them."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.errors import InputError
from configs.schema import DataConfig
from launch.ingest import SerialExecutor, ingest
from trainer import kuairand_csv
from trainer.sequences import SequenceStore

LOG = ("user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
       "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab")
VIDEOS = ("video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
          "server_height,music_id,music_type,tag")
FIRST = """0,10,20220411,1900,1649675512388,0,0,0,0,0,0,0,1385,209900,0,0,0,0,1
0,20,20220416,2000,1650111976017,1,1,0,0,1,0,1,65400,65400,0,0,0,0,0
3,10,20220411,1100,1649645295928,1,0,0,0,0,0,0,9000,0,0,0,0,0,8"""
SECOND = """3,30,20220425,1100,1650855648827,0,0,0,0,0,1,0,1970,79733,0,0,1,0,1
0,30,20220502,0900,1651453200123,1,0,1,1,0,0,1,30125,79733,0,0,0,0,1"""
RANDOM = "0,10,20220503,0900,1651539600123,1,0,0,0,0,0,1,99000,209900,0,0,0,1,1"
BASIC = """10,441,NORMAL,2022-04-10,LongImport,1.0,209900.0,720.0,1280.0,9155697141,9.0,39
20,443,AD,2022-04-10,Kmovie,0.0,65400.0,720.0,1280.0,6355810746,9.0,"12,65"
30,441,NORMAL,2022-04-09,ShortImport,0.0,,720.0,1280.0,6618412736,4.0,"""
USERS = """user_id,user_active_degree,is_lowactive_period,follow_user_num_range,onehot_feat4
0,full_active,0,"(0,10]",1.0
3,UNKNOWN,1,500+,"""


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "KuaiRand-Pure" / "data"
    folder.mkdir(parents=True)
    for name, text in {"log_standard_4_08_to_4_21_pure": f"{LOG}\n{FIRST}\n",
                       "log_standard_4_22_to_5_08_pure": f"{LOG}\n{SECOND}",  # no newline at the end
                       "log_random_4_22_to_5_08_pure": f"{LOG}\n{RANDOM}\n", "user_features_pure": f"{USERS}\n",
                       "video_features_basic_pure": f"{VIDEOS}\n{BASIC}\n",
                       "video_features_statistic_pure": "video_id,counts\n10,3\n"}.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def config(folder, **more):
    return DataConfig(**{"logs": str(folder), "format": "kuairand_csv", "effective_view": {"column": "effective_view"},
                         "target": {"column": "long_view"}, "feedback": ["like", "share", "hate", "profile_enter"],
                         "item_categories": ["video_type", "music_type", "upload_date"], "utc_offset_h": 8,
                         "user_categories": ["user_active_degree", "follow_user_num_range"], "shards": 1, **more})


def test_sequences_of_the_published_files(published, tmp_path):
    ingest(config(published), tmp_path / "run", SerialExecutor())
    store = SequenceStore(tmp_path / "run" / "sequences")
    shard = store.open(0)
    assert shard.user_id_U.tolist() == [0, 3]
    assert store.vocabulary.ids_of(shard.item_row_E).tolist() == [10, 20, 30, 10, 30]  # the random log is left out
    assert shard.timestamp_ms_E[:3].tolist() == [1649675512388, 1650111976017, 1651453200123]
    np.testing.assert_allclose(shard.watch_time_s_E, [1.385, 65.4, 30.125, 9.0, 1.97], rtol=1e-6)
    # A duration of 0 is unknown in the log, and the catalogue knows it: 209.9 s.
    np.testing.assert_allclose(shard.duration_s_E, [209.9, 65.4, 79.733, 209.9, 79.733], rtol=1e-6)
    assert shard.is_effective_E.tolist() == [False, True, True, True, False]
    assert shard.is_target_E.tolist() == [False, True, True, False, False]
    assert {k: v.tolist() for k, v in shard.feedback.items()} == {
        "like": [0, 1, 0, 0, 0], "share": [0, 1, 0, 0, 0], "hate": [0, 0, 0, 0, 1], "profile_enter": [0, 0, 0, 0, 1]}


def test_catalogue_and_users_of_the_published_files(published, tmp_path):
    ingest(config(published), tmp_path / "run", SerialExecutor())
    store = SequenceStore(tmp_path / "run" / "sequences")
    catalogue = store.catalogue

    def values(name):
        return [None, *pq.read_table(store.folder / "vocabulary" / f"{name}.parquet")["value"].to_pylist()]

    assert catalogue.item_id_N.tolist() == [0, 10, 20, 30]
    assert [values("authors")[r] for r in catalogue.author_row_N] == [None, 441, 443, 441]
    tags = [[values("tags")[r] for r in catalogue.tag_rows[a:b]]
            for a, b in zip(catalogue.tag_offsets_N1, catalogue.tag_offsets_N1[1:], strict=False)]
    assert tags == [[], [39], [12, 65], []]
    # Video 30 has no duration in the catalogue; the logs know it.
    np.testing.assert_allclose(catalogue.duration_s_N, [np.nan, 209.9, 65.4, 79.733], rtol=1e-6)
    assert [values("category_music_type")[r] for r in catalogue.categories["music_type"]] == [None, "9", "9", "4"]
    rows = store.users.rows_of(np.array([3, 0, 7]))
    assert [values("user_category_follow_user_num_range")[r] for r in rows["follow_user_num_range"]] == [
        "500+", "(0,10]", None]


def test_pieces_cut_at_any_byte_give_the_same_rows(published, monkeypatch):
    data = config(published)
    files = kuairand_csv.find_files(data)["logs"]
    whole = [row for piece in kuairand_csv.csv_pieces(files, data)
             for _, table in kuairand_csv.read_csv_piece(piece, data) for row in table.to_pylist()]
    assert len(whole) == 5
    for size in (1, 50, 75, 90, 200):
        monkeypatch.setattr(kuairand_csv, "PIECE_BYTES", size)
        pieces = kuairand_csv.csv_pieces(files, data)
        assert [p.order for p in pieces] == sorted({p.order for p in pieces})
        assert len(pieces) >= (5 if size == 1 else 2)
        assert [row for piece in pieces for _, table in kuairand_csv.read_csv_piece(piece, data)
                for row in table.to_pylist()] == whole


def test_the_random_log_can_be_named_itself(published, tmp_path):
    data = config(published / "log_random_4_22_to_5_08_pure.csv", items=str(published), users=str(published))
    assert ingest(data, tmp_path / "run", SerialExecutor()).statistics["rows"] == 1


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: (f / "log_standard_4_08_to_4_21_pure.csv").write_text(f"{LOG}\n1,2,three\n"), "4_08_to_4_21_pure.csv"),
    (lambda f: (f / "log_standard_4_08_to_4_21_pure.csv").write_text(f"{LOG}\n{FIRST.replace('1385', 'x')}\n"),
     "cannot be read as a CSV"),
    (lambda f: (f / "log_standard_4_08_to_4_21_pure.csv").write_text("user_id,video\n1,2\n"), "video_id"),
    (lambda f: [p.unlink() for p in f.glob("log_standard*")], "log_standard"),
    (lambda f: [p.write_text(LOG + "\n") for p in f.glob("log_standard*")], "no rows"),
    (lambda f: (f / "video_features_basic_pure.csv").write_text(f"{VIDEOS}\n{BASIC.replace('39', 'cats')}\n"), "tag"),
])
def test_bad_published_files(published, tmp_path, change, message):
    change(published)
    with pytest.raises(InputError, match=message):
        ingest(config(published), tmp_path / "run", SerialExecutor())
    assert not (tmp_path / "run" / "sequences").exists()


def test_columns_that_the_layout_lacks(published):
    with pytest.raises(InputError, match="no column longview; the nearest is long_view"):
        kuairand_csv.find_files(config(published, target={"column": "longview"}))
    with pytest.raises(InputError, match="fixed names"):
        kuairand_csv.find_files(config(published, columns={"item_id": "video_id"}))
