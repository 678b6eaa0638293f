import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_replay import NAMES, PLAIN, config_of, files_of, made_run

from configs.errors import InputError
from configs.schema import Config
from embeddings.snapshots import verify
from launch.ingest import SerialExecutor
from launch.replay import make_labels
from trainer.labels import LabelCounts, Labels, Replayed, _save, label_windows, median_uniqueness, scales_of
from trainer.neighbors import ChannelSnapshots
from trainer.replay import rewards_ms, unique_counts, unique_share
from trainer.sequences import SequenceStore
from trainer.triggers import is_future_view, request_rule, trigger_requests


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one shard and one of eight, of the same logs."""
    base = tmp_path_factory.mktemp("labels")
    return SimpleNamespace(one=made_run(base / "one", 1), eight=made_run(base / "eight", 8))


class ThreadedExecutor:
    """Several tasks at once, in another order."""

    def each(self, task, pieces):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(task, random.Random(0).sample(pieces, len(pieces))))


def rows_of(folder, pattern="part-*.parquet"):
    table = pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob(pattern))])
    return sorted(map(repr, table.drop_columns(["request_id"]).to_pylist()))


def test_labels_are_what_replay_says(runs):
    config = config_of(runs.eight)
    said = make_labels(config, runs.eight, SerialExecutor(), say=(lines := []).append)
    store = SequenceStore(runs.eight / "sequences")
    rule = request_rule(config, store.manifest, "train")
    snapshots = ChannelSnapshots(runs.eight / "channels", config.channels, store.vocabulary)
    verify(runs.eight / "labels")
    assert "labels of" in lines[-1] and not (runs.eight / ".replay").exists()
    rows = requests_found = 0
    rewards, rhos, labels_true = [[], []], [], np.zeros(2)
    for place, window in enumerate(label_windows(config)):
        labels = Labels.open(runs.eight / "labels", None if place == 0 else window)
        assert labels.channels == tuple(NAMES) and labels.shards == 8 and labels.window == window
        for number in range(store.shards):
            shard = store.open(number)
            requests = trigger_requests(shard, number, rule, config)
            reward_TC = rewards_ms(shard, requests, is_future_view(shard, rule), snapshots, [window], 1.0)[0]
            rho_TC = unique_share(*unique_counts(requests, snapshots))
            found = labels.shard(number, requests)
            np.testing.assert_array_equal(found.reward_ms_TC, reward_TC)
            np.testing.assert_array_equal(found.label_TC, reward_TC >= 3000)
            np.testing.assert_array_equal(found.uniqueness_TC, rho_TC)
            scale = np.array(labels.scales.scale_s)
            np.testing.assert_array_equal(found.intensity_TC,
                                          np.minimum(reward_TC / 1000 / scale, 5.0).astype(np.float32))
            assert found.reward_ms_TC.dtype == np.int64 and found.intensity_TC.dtype == np.float32
            assert found.label_TC.dtype == np.bool_ and found.uniqueness_TC.dtype == np.float32
            rewards[place].append(reward_TC)
            if place == 0:
                rows, requests_found = rows + len(found), requests_found + len(requests)
                labels_true += found.label_TC.sum(axis=0)
                rhos.append(rho_TC[unique_counts(requests, snapshots)[1] > 0])
        every_TC = np.concatenate(rewards[place])
        for c in range(2):
            positive = every_TC[:, c][every_TC[:, c] > 0]
            assert labels.scales.scale_s[c] == positive.sum() / 1000 / len(positive)
    assert said["rows"] == rows == labels.manifest["rows"] and said["requests"] == requests_found > 50
    assert said["positive"] == dict(zip(NAMES, labels_true / rows, strict=True)) and labels_true.all()
    rho = np.sort(np.concatenate(rhos))
    assert labels.scales.eta == rho[(len(rho) - 1) // 2] and 0 < labels.scales.eta < 1


def test_files_have_the_documented_columns(runs):
    make_labels(config_of(runs.eight), runs.eight, SerialExecutor())
    folder = runs.eight / "labels"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["channels"], manifest["windows"], set(manifest["by_window"])) == (NAMES, [12, 4], {"12", "4"})
    for part in (folder / "part-00003.parquet", folder / "window=4" / "part-00003.parquet"):
        schema = pq.ParquetFile(part).schema_arrow
        assert [str(schema.field(name).type) for name in PLAIN] == ["int64"] * 4 + ["int32"]
        for name, kind in (("reward", pa.float64()), ("intensity", pa.float32()), ("label", pa.bool_()),
                           ("uniqueness", pa.float32())):
            assert pa.types.is_fixed_size_list(schema.field(name).type) and schema.field(name).type.list_size == 2
            assert schema.field(name).type.value_type == kind
    assert Labels.open(folder / "window=4").window == 4


def test_sharding_changes_only_the_request_ids(runs):
    for run in (runs.one, runs.eight):
        make_labels(config_of(run, tau_s=None), run, SerialExecutor())
    for pattern in ("part-*.parquet", "window=4/part-*.parquet"):
        assert rows_of(runs.one / "labels", pattern) == rows_of(runs.eight / "labels", pattern)
    facts = [json.loads((run / "labels" / "manifest.json").read_text()) for run in (runs.one, runs.eight)]
    for manifest in facts:
        manifest.pop("files")
        manifest.pop("shards")
    assert facts[0] == facts[1]


def test_order_and_number_of_workers_change_no_byte(runs):
    config = config_of(runs.eight)
    make_labels(config, runs.eight, SerialExecutor())
    alone = files_of(runs.eight / "labels")
    make_labels(config, runs.eight, ThreadedExecutor())
    assert files_of(runs.eight / "labels") == alone


@given(values=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 10**7)), min_size=1, max_size=60),
       share=st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_quantiles_are_exact(tmp_path_factory, values, share):
    folder = tmp_path_factory.mktemp("quantiles")
    reward_WTC = np.array(values, np.int64).reshape(1, -1, 1)
    total = LabelCounts.none(1, 1)
    for number, part in enumerate(np.array_split(reward_WTC, 3, axis=1)):
        none = np.zeros(0, np.int64)
        with open(folder / f"replay-{number:05d}.npy", "wb") as file:
            for some in np.array_split(part, 2, axis=1):
                _save(file, Replayed(none, none, none, none, none, none, some, none, none))
        total.add(LabelCounts.from_json(json.loads(json.dumps(counts_of(part).as_json()))))
    replay = Config.model_validate({"replay": {"tau_s": None, "tau_quantile": share}}).replay
    scales = scales_of(total, replay, folder, 3)[0]
    positive = sorted(v for v in values if v > 0)
    if not positive:
        assert scales.tau_s == [1.0] and scales.scale_s == [1.0] and not (scales.least_ms() <= 0).any()
        return
    expected = next(v for v in positive if sum(p <= v for p in positive) >= share * len(positive))
    assert scales.tau_s == [expected / 1000] and scales.scale_s == [sum(positive) / 1000 / len(positive)]
    assert (reward_WTC[0] >= scales.least_ms()).ravel().tolist() == [v >= expected for v in values]
    shutil.rmtree(folder)


def counts_of(reward_WTC):
    none_TC = np.zeros((0, reward_WTC.shape[2]), np.int64)
    return LabelCounts.of(NoRequests(), reward_WTC, none_TC, none_TC)


class NoRequests:
    trigger_row_T = np.zeros(0, np.int32)

    def __len__(self):
        return 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=12))
def test_the_median_of_uniqueness_is_exact(found):
    found = [(min(u, n), n, k) for u, n, k in found]
    counts = {}
    for u, n, k in found:
        counts[u, n] = counts.get((u, n), 0) + k
    every = sorted(float(unique_share(np.int64(u), np.int64(n))) for u, n, k in found for _ in range(k))
    assert median_uniqueness([counts]) == every[(len(every) - 1) // 2]
    assert median_uniqueness([{}]) == 1.0


def test_set_scales_are_taken(runs):
    make_labels(config_of(runs.one, scale_s=2.5, tau_s=4.5, cap=3, eta=0.4), runs.one, SerialExecutor())
    scales = Labels.open(runs.one / "labels").scales
    assert (scales.scale_s, scales.tau_s, scales.cap, scales.eta) == ([2.5] * 2, [4.5] * 2, [3.0] * 2, 0.4)


@pytest.mark.parametrize("requests, said", [
    ({"min_triggers": 40, "triggers": 50}, r"min_triggers \(40\) removes [1-9]\d*"),
    ({"min_future": 60}, r"min_triggers \(2\) removes \d+ and replay.requests.min_future \(60\) [1-9]\d*")])
def test_no_request_left_names_the_limit(runs, requests, said):
    with pytest.raises(InputError, match=said) as error:
        make_labels(config_of(runs.eight, requests=requests), runs.eight, SerialExecutor())
    assert "test users" in str(error.value) and not (runs.eight / ".replay").exists()


def test_other_requests_than_the_labels_are_noticed(runs):
    config = config_of(runs.one)
    make_labels(config, runs.one, SerialExecutor())
    labels, store = Labels.open(runs.one / "labels"), SequenceStore(runs.one / "sequences")
    other = config_of(runs.one, requests={"triggers": 5})
    requests = trigger_requests(store.open(0), 0, request_rule(other, store.manifest, "train"), other)
    with pytest.raises(InputError, match="part-00000.parquet: its rows are not"):
        labels.shard(0, requests)
    with pytest.raises(InputError, match="part-00009.parquet"):
        labels.shard(9)
    with pytest.raises(InputError, match=r"\[12, 4\], not of 5"):
        Labels.open(runs.one / "labels", 5)
    with pytest.raises(InputError, match="no labels there"):
        Labels.open(runs.one / "nowhere")


def test_a_failed_replay_leaves_the_labels_as_they_were(runs, monkeypatch):
    make_labels(config_of(runs.one), runs.one, SerialExecutor())
    before = files_of(runs.one / "labels")

    def broken(*args):
        raise RuntimeError("a worker died")

    monkeypatch.setattr("launch.replay.write_part", broken)
    with pytest.raises(RuntimeError, match="a worker died"):
        make_labels(config_of(runs.one, tau_s=9.0), runs.one, SerialExecutor())
    assert files_of(runs.one / "labels") == before and not (runs.one / ".replay").exists()
