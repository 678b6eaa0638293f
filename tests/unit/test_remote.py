"""A run folder behind a URL: what a reader may ever find there, who may write, what is left alone. The store is one of
folders here; tests/end_to_end/test_storage.py has a real S3 server."""

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import InputError, WatchtowerError
from embeddings import attempts, snapshots
from launch import remote
from launch.remote import RemoteFolder, Store, is_url, work_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from remote_runs import FAST, act, begun, behind, carried, made, publish, put, taken, tree  # noqa: E402


@pytest.fixture
def url(tmp_path):
    return (tmp_path / "store" / "run").as_uri()


@pytest.fixture
def folder(tmp_path):
    return made(tmp_path / "work")


class Watching(Store):
    """After each operation that changes something, looks at what a reader would find; ends the process at one."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.changes, self.dies_at = 0, None

    def _changed(self):
        self.changes += 1
        if self.dies_at is not None and self.changes >= self.dies_at:
            raise KeyboardInterrupt
        assert_no_half(self)

    def write(self, name, data):
        super().write(name, data)
        self._changed()

    def upload(self, path, name):
        stamp = super().upload(path, name)
        self._changed()
        return stamp

    def delete(self, name):
        super().delete(name)
        self._changed()


def assert_no_half(store):
    """Every snapshot that is there is whole, and every marker's snapshot is the one that it vouches for."""
    names = store.list()
    for name in names:
        if name.endswith("/manifest.json"):
            top = name.removesuffix("/manifest.json")
            for file, entry in json.loads(store.read(name))["files"].items():
                data = store.read(f"{top}/{file}")
                assert data is not None and hashlib.sha256(data).hexdigest() == entry["sha256"], f"half of {top}"
        elif name.startswith("stages/"):
            said = json.loads(store.read(name))
            manifest = store.read(f"{said['top']}/manifest.json")
            assert manifest is not None and json.loads(manifest)["of"] == said["of"], f"{name} came too early"


STEPS = st.lists(st.tuples(st.sampled_from(["publish", "remove", "push", "log"]), st.integers(0, 2),
                           st.sampled_from("abc")), min_size=1, max_size=12)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, dies_at=st.none() | st.integers(1, 30))
def test_a_reader_never_finds_a_half(steps, dies_at):
    """Whatever a run does between two pushes, and wherever it dies; and the next one begins with a whole state."""
    with tempfile.TemporaryDirectory() as place:
        url, folder = (Path(place) / "store").as_uri(), made(Path(place) / "work")
        one = taken(url, folder)
        one.store = Watching(url, wait_s=0.001)
        put(folder, "config.yaml", {})
        one.store.dies_at = dies_at and one.store.changes + dies_at
        states = [tree(folder)]
        with contextlib.suppress(KeyboardInterrupt):
            for what, number, text in [*steps, ("push", 0, "a")]:
                if what == "push":
                    states.append(tree(folder))
                    one.push(everything=True)
                else:
                    act(folder, what, number, text)
        assert_no_half(Store(url))
        if dies_at is None:
            assert behind(url) == tree(folder)
        other = made(Path(place) / "other")
        carried(url, other)
        for top in (path.parent for path in other.rglob("manifest.json")):
            snapshots.verify(top)
        assert_no_half(Store(url))
        if dies_at is None:
            assert tree(other) == states[-1]


def test_every_operation_may_be_the_last_one(tmp_path):
    """All the places at which the carrying of a run can break off, one after the other; and it goes on from each."""
    for dies_at in range(1, 100):
        place = made(tmp_path / str(dies_at))
        url, folder = (place / "store").as_uri(), made(place / "work")
        one = taken(url, folder)
        act(folder, "publish", 0, "a")
        act(folder, "publish", 1, "a")
        put(folder, "config.yaml", {})
        one.push()
        act(folder, "publish", 0, "b")
        act(folder, "remove", 1, "b")
        put(folder, "metrics.json", {"b": 1})
        one.store = Watching(url, wait_s=0.001)
        one.store.dies_at = dies_at
        try:
            one.push()
        except KeyboardInterrupt:
            assert_no_half(Store(url))
            carried(url, folder)
            assert behind(url) == tree(folder)
            shutil.rmtree(place)
            continue
        assert dies_at > 8 and behind(url) == tree(folder)
        return
    raise AssertionError("it never came to its end")


def test_another_machine_takes_over_and_the_first_is_cut_off(url, folder, tmp_path):
    begun(url, folder)
    first = taken(url, folder)
    first.push(everything=True)
    attempt = attempts.begin_driver(folder)
    told = []
    other = made(tmp_path / "other")
    second = taken(url, other, say=told.append)  # the first gives no sign of life
    assert any("gives no sign of life" in line for line in told)
    publish(folder, "sequences", "of the dead")
    put(folder, "stages/ingest.json", {"inputs": "of the dead"})
    before = behind(url)
    with pytest.raises(attempts.Superseded, match="has taken it over"):
        first.push()
    assert behind(url) == before
    with pytest.raises(attempts.Superseded, match="was cut off"), attempts.acting(attempt):
        publish(folder, "labels", "of the dead")
    assert attempts.begin_driver(other).number >= attempt.number
    with second.carrying():
        publish(other, "sequences", "of the living")
    assert behind(url)["sequences/data.bin"] == b"of the living"
    # The first machine again, later: it begins with what the second left.
    carried(url, folder)
    assert (folder / "sequences" / "data.bin").read_text() == "of the living"
    assert (folder / "stages" / "ingest.json").read_bytes() == (other / "stages" / "ingest.json").read_bytes()


def test_a_living_one_is_not_disturbed(url, folder, tmp_path):
    begun(url, folder)
    first = RemoteFolder(url, folder, **FAST | {"every_s": 0.5})  # four beats are waited for
    first.take()
    with first.carrying():
        with pytest.raises(WatchtowerError, match="is being written by process .* wait for it"):
            RemoteFolder(url, made(tmp_path / "other"), **FAST).take()
        first.push()
    carried(url, made(tmp_path / "third"))  # it ended: nobody waits


def test_a_working_folder_that_is_away_takes_nothing_away(url, folder, tmp_path):
    expected = begun(url, folder)
    one = taken(url, folder)
    one.push(everything=True)
    folder.rename(tmp_path / "away")
    folder.mkdir()  # what a file system is mounted on
    with pytest.raises(WatchtowerError, match="is away, or was emptied"):
        one.push(everything=True)
    assert behind(url) == expected
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    snapshots.remove(folder / "sequences")
    with one.carrying():
        pass
    assert "sequences/manifest.json" not in behind(url) and "metrics.json" in behind(url)


def test_what_is_no_run_is_not_touched(url, folder):
    Store(url).write("logs/part-0.parquet", b"of somebody")
    with pytest.raises(InputError, match="holds logs/part-0.parquet and no run"):
        carried(url, folder)
    assert behind(url) == {"logs/part-0.parquet": b"of somebody"} and not list(folder.iterdir())
    with pytest.raises(InputError, match="names no folder"):
        Store("s3://?region=us-east-1")
    with pytest.raises(InputError, match="cannot be opened as a file system"):
        Store("ftp://host/run")


def test_a_damaged_snapshot_is_left_out(url, folder, tmp_path):
    begun(url, folder)
    carried(url, folder)
    Store(url).write("sequences/data.bin", b"flipped")
    Store(url).write("channels/swing/1000/manifest.json", b'{"files": {"../../../out": {"sha256": "0", "bytes": 1}}}')
    told, other = [], made(tmp_path / "other")
    carried(url, other, say=told.append)
    assert len([line for line in told if "left out" in line]) == 2
    assert not (other / "sequences").exists() and not (other / "channels/swing/1000").exists()
    snapshots.verify(other / "indexes/dnn/seed=0/1000-7")
    assert "sequences/manifest.json" in behind(url), "somebody may mend it"


def test_where_a_run_works(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = work_folder("s3://KEY:SECRETSECRET@bucket/runs/a?region=x", None)
    assert one == work_folder("s3://OTHER:SECRETSECRET2@bucket/runs/a/", None) and one.name.startswith("a-")
    assert one != work_folder("s3://bucket2/runs/a", None) and one.is_relative_to(tmp_path)
    assert work_folder("s3://bucket/runs/a", str(tmp_path / "w")) == tmp_path / "w"
    assert is_url("s3://a/b") and not is_url("/a/b") and not is_url("file:///a") and not is_url(None)
    assert remote.local_path("file:///a") == "/a"
