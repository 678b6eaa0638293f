"""Publishing: whole or not there, recognised when damaged, and found by time."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError, WatchtowerError
from embeddings import snapshots
from embeddings.snapshots import MANIFEST, as_of, list_snapshots, newest, publish, read_manifest, verify


def writer(content=b"neighbors", calls=None):
    def write(folder):
        if calls is not None:
            calls.append(folder)
        (folder / "neighbors.parquet").write_bytes(content)
        (folder / "parts").mkdir()
        (folder / "parts" / "0.bin").write_bytes(content * 3)

    return write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_snapshot_appears_whole_with_its_manifest(tmp_path):
    seen = []

    def write(folder):
        assert not (tmp_path / "deep" / "5").exists()
        seen.append(folder)
        writer()(folder)

    target = publish(tmp_path / "deep" / "5", write, {"rows": 3, "params": {"alpha": 0.5}})
    assert target == tmp_path / "deep" / "5" and names(target.parent) == ["5"]
    assert seen[0].parent == target.parent and not seen[0].exists()
    manifest = verify(target)
    assert manifest == read_manifest(target) == json.loads((target / MANIFEST).read_text())
    assert manifest["rows"] == 3 and set(manifest["files"]) == {"neighbors.parquet", "parts/0.bin"}
    assert (
        manifest["files"]["neighbors.parquet"]["bytes"] == 9 and len(manifest["files"]["parts/0.bin"]["sha256"]) == 64
    )


def test_the_same_again_is_not_written_again(tmp_path):
    calls = []
    for _ in range(2):
        publish(tmp_path / "5", writer(calls=calls), {"rows": (1, 2)})
    assert len(calls) == 1
    with pytest.raises(WatchtowerError, match="other values of rows"):
        publish(tmp_path / "5", writer(calls=calls), {"rows": 3})
    assert len(calls) == 1 and names(tmp_path) == ["5"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replace_swaps_and_heals(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(snapshots.sys, "platform", "elsewhere")
    publish(tmp_path / "5", writer(b"old"), {"v": 1})
    publish(tmp_path / "5", writer(b"new"), {"v": 2}, replace=True)
    assert (tmp_path / "5" / "neighbors.parquet").read_bytes() == b"new" and verify(tmp_path / "5")["v"] == 2
    (tmp_path / "5" / "neighbors.parquet").write_bytes(b"bad")
    with pytest.raises(WatchtowerError, match="neighbors.parquet: damaged.*replace"):
        publish(tmp_path / "5", writer(b"new"), {"v": 2})
    publish(tmp_path / "5", writer(b"new"), {"v": 2}, replace=True)
    assert verify(tmp_path / "5")["v"] == 2 and names(tmp_path) == ["5"]


def test_another_writer_was_faster(tmp_path):
    def slow(folder):
        writer()(folder)
        publish(tmp_path / "5", writer(), {"v": rival})

    rival = 1
    publish(tmp_path / "5", slow, {"v": 1})
    shutil.rmtree(tmp_path / "5")
    rival = 2
    with pytest.raises(WatchtowerError, match="other values of v"):
        publish(tmp_path / "5", slow, {"v": 1})
    assert verify(tmp_path / "5")["v"] == 2 and names(tmp_path) == ["5"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [ValueError("mid-write"), KeyboardInterrupt()])
def test_a_writer_that_raises_leaves_nothing(tmp_path, error, replace):
    if replace:
        publish(tmp_path / "5", writer(b"old"), {"v": 1})

    def write(folder):
        (folder / "half").write_bytes(b"x")
        raise error

    with pytest.raises(type(error)):
        publish(tmp_path / "5", write, {"v": 2}, replace=replace)
    assert names(tmp_path) == (["5"] if replace else [])
    if replace:
        assert verify(tmp_path / "5")["v"] == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_plainly(tmp_path, error):
    def write(folder):
        (folder / "half").write_bytes(b"x")
        raise error

    with pytest.raises(WatchtowerError, match="5: the disk is full"):
        publish(tmp_path / "5", write, {})
    assert names(tmp_path) == []


def publish_and_die(target, pipe):
    def write(folder):
        (folder / "half").write_bytes(b"x")
        pipe.send(str(folder))
        signal.pause()

    publish(Path(target), write, {})


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=publish_and_die, args=(str(tmp_path / "5"), sender))
    process.start()
    try:
        assert receiver.poll(60)
        leftover = Path(receiver.recv())
        foreign = tmp_path / ".5.something.tmp"
        foreign.mkdir()
        publish(tmp_path / "6", writer(), {})
        assert leftover.is_dir(), "its writer is alive"
        assert as_of(tmp_path, 99, 0) == tmp_path / "6"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert names(tmp_path) == sorted([leftover.name, ".5.something.tmp", "6"])
    publish(tmp_path / "5", writer(), {})
    assert names(tmp_path) == [".5.something.tmp", "5", "6"]


def test_damage_is_found_and_named(tmp_path):
    def damaged(name, change, expected, error=WatchtowerError):
        folder = publish(tmp_path / name, writer(), {})
        change(folder)
        with pytest.raises(error, match=expected):
            verify(folder)

    def flip(folder):
        content = bytearray((folder / "parts" / "0.bin").read_bytes())
        content[4] ^= 1
        (folder / "parts" / "0.bin").write_bytes(content)

    damaged("1", flip, "parts/0.bin.*checksum")
    damaged("2", lambda f: (f / "neighbors.parquet").write_bytes(b"neigh"), "neighbors.parquet.*5 bytes instead of 9")
    damaged("3", lambda f: (f / "neighbors.parquet").unlink(), "neighbors.parquet.*missing")
    damaged("4", lambda f: (f / MANIFEST).unlink(), "manifest.json: missing")
    for number, text in enumerate(
        ["", "{", "[]", "null", "{}", '{"files": 3}', '{"files": {"a": 1}}', "\udcff", "[" * 9999]
    ):
        damaged(
            f"5{number}",
            lambda f, text=text: (f / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape")),
            "damaged",
        )
    listed = json.dumps({"files": {"neighbors.parquet": {"sha256": "0" * 64, "bytes": True}}})
    damaged("6", lambda f: (f / MANIFEST).write_text(listed), "damaged")
    folder = publish(tmp_path / "7", writer(), {})
    (folder / "extra.txt").write_bytes(b"ignored")
    assert "extra.txt" not in verify(folder)["files"]


@pytest.mark.parametrize("name", ["../5/x", "/etc/passwd", "a/../../x", "", ".", "a//b", "..", "a\\b", "a\0b"])
def test_a_manifest_cannot_point_outside(tmp_path, name):
    folder = publish(tmp_path / "5", writer(), {})
    (folder / MANIFEST).write_text(json.dumps({"files": {name: {"sha256": "0" * 64, "bytes": 1}}}))
    with pytest.raises(InputError, match="leads out"):
        verify(folder)


def test_links_are_neither_published_nor_followed_outside(tmp_path):
    (tmp_path / "secret").write_bytes(b"neighbors")

    def link(folder):
        (folder / "neighbors.parquet").symlink_to(tmp_path / "secret")

    with pytest.raises(WatchtowerError, match="plain files"):
        publish(tmp_path / "4", link, {})
    folder = publish(tmp_path / "5", writer(), {})
    (folder / "neighbors.parquet").unlink()
    link(folder)
    with pytest.raises(InputError, match="leads out"):
        verify(folder)


@pytest.mark.parametrize("name", ["x" * 400, "\ud800", "parts"])
def test_odd_names_are_one_clear_error(tmp_path, name):
    folder = publish(tmp_path / "5", writer(), {})
    (folder / MANIFEST).write_text(json.dumps({"files": {name: {"sha256": "0" * 64, "bytes": 1}}}))
    with pytest.raises(WatchtowerError, match="damaged"):
        verify(folder)


@pytest.mark.parametrize("manifest", [{"files": {}}, {"a": float("nan")}, {"a": Path("x")}])
def test_a_manifest_that_is_not_json_is_refused(tmp_path, manifest):
    with pytest.raises(InputError, match="5"):
        publish(tmp_path / "5", writer(), manifest)
    assert not any(tmp_path.iterdir())


def test_the_writer_does_not_write_the_manifest(tmp_path):
    with pytest.raises(WatchtowerError, match="manifest"):
        publish(tmp_path / "5", lambda folder: (folder / MANIFEST).write_text("{}"), {})


def stub(parent, name):
    (parent / name).mkdir()
    (parent / name / MANIFEST).write_text('{"files": {}}')


def test_listing_knows_names_and_leaves_the_rest_alone(tmp_path):
    assert list_snapshots(tmp_path / "nowhere") == [] and newest(tmp_path) is None and as_of(tmp_path, 5, 0) is None
    for name in ["900", "1000-20", "1000-3", "1000", "x", "-5", "12a", "7-", ".900.attempt-0.tmp", "٣"]:
        stub(tmp_path, name)
    (tmp_path / "5000").mkdir()  # no manifest: not published
    (tmp_path / "6000").write_text("a file")
    assert [snapshot.path.name for snapshot in list_snapshots(tmp_path)] == ["900", "1000", "1000-3", "1000-20"]
    assert [(s.watermark_ms, s.step) for s in list_snapshots(tmp_path)] == [
        (900, None),
        (1000, None),
        (1000, 3),
        (1000, 20),
    ]
    assert newest(tmp_path) == tmp_path / "1000-20"
    with pytest.raises(InputError, match="negative"):
        as_of(tmp_path, 5, -1)


@settings(max_examples=60, deadline=None)
@given(
    keys=st.sets(st.tuples(st.integers(0, 30), st.none() | st.integers(0, 12)), max_size=8),
    time_ms=st.integers(-5, 45),
    rollback_ms=st.integers(0, 10),
)
def test_as_of_is_the_newest_that_has_not_seen_the_request(tmp_path_factory, keys, time_ms, rollback_ms):
    parent = tmp_path_factory.mktemp("snapshots")
    for watermark, step in keys:
        stub(parent, str(watermark) if step is None else f"{watermark}-{step}")
    best = None
    for watermark, step in keys:
        if watermark + rollback_ms <= time_ms:
            rank = (watermark, -1 if step is None else step)
            best = rank if best is None or rank > best else best
    found = as_of(parent, time_ms, rollback_ms)
    if best is None:
        assert found is None
    else:
        assert found.name == (str(best[0]) if best[1] == -1 else f"{best[0]}-{best[1]}")
    shutil.rmtree(parent)
