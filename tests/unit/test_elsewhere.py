"""A run folder on another node: what a mirror reads is what its owner has, what it publishes stands there, and nothing
leads out of either."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError, WatchtowerError
from embeddings import attempts, elsewhere, snapshots
from embeddings.attempts import Attempt, Superseded
from embeddings.elsewhere import Mirror
from embeddings.owner import Owner
from embeddings.untrusted import read_json
from trainer.events import EventLog, read_events
from trainer.results import write_whole
from trainer.sequences import whole_file


class Nodes:
    """The owner's folder and mirrors of it in folders of their own, all in this process. calls: to the owner."""

    def __init__(self, parent: Path):
        self.there, self.parent, self.calls = parent / "owner" / "run", parent, []
        self.there.mkdir(parents=True)
        self.owner = Owner(self.there)

    def call(self, method: str, *arguments):
        self.calls.append(method)
        before = elsewhere.see_through(None)  # another process
        acting = attempts.act_for(None)
        try:
            return getattr(self.owner, method)(*arguments)
        finally:
            elsewhere.see_through(before)
            attempts.act_for(acting)

    def mirror(self, name: str = "node") -> Path:
        """A node's run folder; this process sees it through the owner from now on."""
        root = self.parent / name / "run"
        elsewhere.see_through(Mirror(root, self.call))
        return root


@pytest.fixture
def nodes(tmp_path):
    made = Nodes(tmp_path)
    yield made
    elsewhere.see_through(None)
    made.owner.close()


def fill(text: str):
    def write(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "in").mkdir()
        (folder / "in" / "b.txt").write_text(text * 2)
        (folder / "empty").write_text("")
    return write


def listed(folder: Path) -> dict[str, bytes]:
    """The files of a folder, the locks of a mirror left out."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.parent.name != ".mirror"}


# ----------------------------------------------------------------------------------------------------------- reading

def test_a_file_is_read_as_it_is_now(nodes):
    path = nodes.there / "stages" / "x.json"
    path.parent.mkdir()
    path.write_text('{"a": 1}')
    here = nodes.mirror() / "stages" / "x.json"
    assert read_json(here) == {"a": 1}
    path.write_text('{"a": 22}')
    assert read_json(here) == {"a": 22}
    before = nodes.calls.count("read")
    assert read_json(here) == {"a": 22} and nodes.calls.count("read") == before
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(here)


def test_a_large_file_comes_in_parts(nodes, monkeypatch):
    monkeypatch.setattr(elsewhere, "CHUNK_BYTES", 7)
    data = os.urandom(50)
    (nodes.there / "big.bin").write_bytes(data)
    root = nodes.mirror()
    elsewhere.bring(root / "big.bin")
    assert (root / "big.bin").read_bytes() == data and nodes.calls.count("read") == 8


def test_of_a_snapshot_comes_what_is_read(nodes):
    snapshots.publish(nodes.there / "labels", fill("x"), {"kind": "labels"})
    folder = nodes.mirror() / "labels"
    manifest = snapshots.read_manifest(folder)
    assert manifest["kind"] == "labels" and sorted(listed(folder)) == ["manifest.json"]
    snapshots.verify_file(folder, manifest, "in/b.txt")
    assert sorted(listed(folder)) == ["in/b.txt", "manifest.json"]
    snapshots.verify(folder)
    assert listed(folder) == listed(nodes.there / "labels")


def test_another_snapshot_of_the_same_size_in_its_place_is_noticed(nodes):
    """By whoever looks at no checksum, too."""
    snapshots.publish(nodes.there / "labels", fill("x"), {"kind": "labels"})
    folder = nodes.mirror() / "labels"
    snapshots.bring(folder)
    elsewhere.see_through(None)
    snapshots.publish(nodes.there / "labels", fill("y"), {"kind": "labels"}, replace=True)
    nodes.mirror()
    snapshots.bring(folder)
    assert listed(folder) == listed(nodes.there / "labels")


def test_a_damaged_copy_is_brought_again_and_a_damaged_snapshot_is_told(nodes):
    snapshots.publish(nodes.there / "labels", fill("x"), {})
    folder = nodes.mirror() / "labels"
    snapshots.verify(folder)
    (folder / "a.txt").write_text("y")
    snapshots.verify(folder)
    assert (folder / "a.txt").read_text() == "x"
    (nodes.there / "labels" / "a.txt").write_text("z")
    (folder / "a.txt").unlink()
    with pytest.raises(WatchtowerError, match="a.txt: damaged snapshot"):
        snapshots.verify(folder)


def test_snapshots_are_those_of_the_owner(nodes):
    for mark in (100, 200):
        snapshots.publish(nodes.there / "channels" / "swing" / str(mark), fill("x"), {})
    parent = nodes.mirror() / "channels" / "swing"
    assert [one.watermark_ms for one in snapshots.list_snapshots(parent)] == [100, 200]
    shutil.rmtree(nodes.there / "channels" / "swing" / "100")
    assert [one.watermark_ms for one in snapshots.list_snapshots(parent)] == [200]
    assert not (parent / "100").exists()


# -------------------------------------------------------------------------------------------------------- publishing

def test_what_is_published_stands_at_the_owner_and_here(nodes):
    folder = nodes.mirror() / "channels" / "swing" / "100"
    snapshots.publish(folder, fill("x"), {"kind": "channel"})
    assert listed(folder) == listed(nodes.there / "channels" / "swing" / "100")
    before = len(nodes.calls)
    snapshots.bring(folder)
    assert set(nodes.calls[before:]) == {"facts"}, "nothing of one's own is brought back"
    snapshots.publish(folder, fill("y"), {"kind": "channel"}, replace=True)
    assert listed(folder) == listed(nodes.there / "channels" / "swing" / "100")
    with pytest.raises(WatchtowerError, match="published already, with other values of kind"):
        snapshots.publish(folder, fill("z"), {"kind": "other"})
    assert (nodes.there / "channels" / "swing" / "100" / "a.txt").read_text() == "y"
    assert [path.name for path in folder.parent.iterdir()] == ["100"]
    assert list((nodes.parent / "node" / "run" / ".mirror").glob("*-*/*")) == [], "nothing is left on the way"


def test_of_two_nodes_that_publish_the_same_the_first_ones_files_stand(nodes):
    one = nodes.mirror("one") / "router_features" / "f"
    snapshots.publish(one, fill("x"), {})
    two = nodes.mirror("two") / "router_features" / "f"
    snapshots.publish(two, fill("y"), {})
    snapshots.verify(two)
    assert listed(two) == listed(one) == listed(nodes.there / "router_features" / "f")


def test_a_folder_that_several_nodes_have_filled_is_published_as_one(nodes):
    writing = ".step-4.abc.writing"
    first = nodes.mirror("one")
    elsewhere.of(first).make_folder(first / "checkpoints" / writing)
    for name in ("one", "two"):
        root = nodes.mirror(name)
        with elsewhere.workshop(root / "checkpoints" / writing) as here:
            (here / f"{name}.bin").write_text(name)
            (here / f"{name}.written").write_text("")
        assert elsewhere.size(root / "checkpoints" / writing / "one.bin") == 3
        assert listed(root) == {}, "nothing stays on the node"
    snapshots.publish_from(root / "checkpoints" / writing, root / "checkpoints" / "step-4", {"kind": "checkpoint"},
                           but=".written")
    assert os.listdir(nodes.there / "checkpoints") == ["step-4"]
    snapshots.verify(root / "checkpoints" / "step-4")
    assert sorted(listed(root / "checkpoints" / "step-4")) == ["manifest.json", "one.bin", "two.bin"]


def test_an_error_in_a_workshop_leaves_nothing(nodes):
    root = nodes.mirror()
    (nodes.there / "x").mkdir()
    with pytest.raises(ZeroDivisionError), elsewhere.workshop(root / "x" / "y") as here:
        (here / "a").write_text("a")
        1 / 0  # noqa: B018
    assert listed(root) == {} and os.listdir(nodes.there / "x") == []


def test_files_of_a_task_go_to_the_owner_while_its_folder_is_there(nodes):
    (nodes.there / ".replay").mkdir()
    root = nodes.mirror()
    whole_file(root / ".replay" / "labels" / "part-0.parquet", lambda path: path.write_text("rows"))
    assert listed(nodes.there / ".replay") == {"labels/part-0.parquet": b"rows"} and listed(root) == {}
    shutil.rmtree(nodes.there / ".replay")
    with pytest.raises(FileNotFoundError, match="is gone"):
        whole_file(root / ".replay" / "labels" / "part-1.parquet", lambda path: path.write_text("rows"))
    assert not (nodes.there / ".replay").exists()
    elsewhere.of(root).tidy()
    assert not (root / ".replay").exists()


def test_removed_is_removed_on_both_sides(nodes):
    snapshots.publish(nodes.there / "checkpoints" / "step-1", fill("x"), {})
    root = nodes.mirror()
    snapshots.bring(root / "checkpoints" / "step-1")
    snapshots.remove(root / "checkpoints" / "step-1")
    snapshots.remove(root / "checkpoints" / "step-2")
    assert os.listdir(nodes.there / "checkpoints") == [] == os.listdir(root / "checkpoints")


# ------------------------------------------------------------------------------------------------ who may, and notes

def test_an_attempt_that_was_cut_off_publishes_nothing_from_any_node(nodes):
    driver = attempts.begin_driver(nodes.there)
    root = nodes.mirror()
    mine = Attempt(root, driver.driver, place=driver.place)
    group = attempts.begin_group(mine, "crm")
    assert group.group == 2 and attempts.read_record(root)["work"] == "crm"
    with attempts.acting(group):
        snapshots.publish(root / "indexes" / "1", fill("x"), {})
        write_whole(root / "results.json", "{}")
        assert read_json(root / "results.json") == {}
        attempts.end_groups(driver)
        (nodes.there / "w").mkdir()
        for act in (lambda: snapshots.publish(root / "indexes" / "2", fill("x"), {}),
                    lambda: snapshots.remove(root / "indexes" / "1"),
                    lambda: snapshots.publish_from(root / "w", root / "indexes" / "3", {}),
                    lambda: write_whole(root / "results.json", "{1}")):
            with pytest.raises(Superseded):
                act()
    assert os.listdir(nodes.there / "indexes") == ["1"] and (nodes.there / "results.json").read_text() == "{}"
    assert (root / "indexes" / "1").is_dir() and not (root / "indexes" / "2").exists()


def test_a_record_that_was_read_a_moment_ago_lets_nobody_publish(nodes):
    """The mirror may keep a note for a second; the owner looks itself."""
    driver = attempts.begin_driver(nodes.there)
    root = nodes.mirror()
    with attempts.acting(Attempt(root, driver.driver)) as mine:
        mine.check()
        attempts.begin_driver(nodes.there)
        mine.check()
        with pytest.raises(Superseded):
            snapshots.publish(root / "indexes" / "1", fill("x"), {})
    assert not (nodes.there / "indexes" / "1").exists() and not (root / "indexes" / "1").exists()


def test_notes_pass_between_nodes_and_stay_on_none(nodes):
    driver = attempts.begin_driver(nodes.there)
    root = nodes.mirror()
    folder = Attempt(root, driver.driver).folder
    attempts.write_note(folder / "alive.json", {"beat": 1})
    assert attempts.read_note(nodes.there / "attempts" / "1" / "alive.json") == {"beat": 1}
    assert attempts.read_note(folder / "alive.json") == {"beat": 1}
    assert attempts.note_first(folder / "failed.json", {"who": "rank-1"})
    assert not attempts.note_first(folder / "failed.json", {"who": "rank-2"})
    assert attempts.read_note(folder / "failed.json") == {"who": "rank-1"}
    assert attempts.read_note(folder / "stop.json") is None
    read_json_fails = pytest.raises(FileNotFoundError)
    with read_json_fails:
        read_json(root / "attempts" / "record.json")
    assert listed(root) == {}


def test_a_note_is_asked_for_once_a_second(nodes, monkeypatch):
    driver = attempts.begin_driver(nodes.there)
    root = nodes.mirror()
    for _ in range(5):
        Attempt(root, driver.driver).check()
    assert nodes.calls.count("note") == 1
    monkeypatch.setattr(elsewhere, "FRESH_S", 0.0)
    Attempt(root, driver.driver).check()
    assert nodes.calls.count("note") == 2


def test_events_go_to_the_owners_log(nodes):
    EventLog(nodes.there / "events.jsonl").write("stage", stage="crm")
    root = nodes.mirror()
    with EventLog(root / "events.jsonl", root / "tensorboard", rank=0) as log:
        log.write("train_step", model="dnn", step=1, loss=0.5)
    assert [e["event"] for e in read_events(nodes.there / "events.jsonl")] == ["stage", "train_step"]
    assert list((nodes.there / "tensorboard" / "dnn").glob("events.*"))


# ------------------------------------------------------------------------------------------------ whose folder it is

def test_a_process_knows_whether_it_shares_the_folder(nodes):
    driver = attempts.begin_driver(nodes.there)
    assert attempts.sees(driver)
    root = nodes.parent / "node" / "run"
    assert not attempts.sees(Attempt(root, driver.driver, place=driver.place))
    attempts.begin_driver(nodes.there)
    assert not attempts.sees(driver)
    assert attempts.sees(Attempt(nodes.there, 9, place=attempts.read_record(nodes.there)["place"]))


def test_a_run_folder_of_ones_own_is_never_taken_for_a_mirror(nodes):
    own = nodes.parent / "node" / "run"
    attempts.begin_driver(own)
    (own / "labels").mkdir()
    with pytest.raises(InputError, match="there are other files at this path"):
        nodes.mirror()
    assert (own / "labels").is_dir() and not (own / ".mirror").exists()


def test_a_folder_of_somebody_else_is_never_taken_for_a_mirror(nodes):
    own = nodes.parent / "node" / "run"
    (own / "precious").mkdir(parents=True)
    (own / "precious" / "a").write_text("a")
    with pytest.raises(InputError, match="there are other files at this path"):
        nodes.mirror()
    assert not elsewhere.clear_mirror(own) and listed(own) == {"precious/a": b"a"}
    shutil.rmtree(own / "precious")
    (own / "ray").mkdir()
    nodes.mirror()
    nodes.mirror()
    assert (own / ".mirror" / "made-here").exists(), "an empty one is made one, and stays one for others"


def test_a_mirror_is_emptied_before_it_becomes_a_run_folder(nodes):
    snapshots.publish(nodes.there / "labels", fill("x"), {})
    root = nodes.mirror()
    snapshots.read_manifest(root / "labels")
    (root / "run.lock").write_text("{}")
    with pytest.raises(WatchtowerError, match=f"process {os.getpid()} of this node works for a driver on another node"):
        elsewhere.clear_mirror(root)
    os.close(elsewhere.see_through(None)._lock)  # it ends
    assert elsewhere.clear_mirror(root) and os.listdir(root) == ["run.lock"]
    assert not elsewhere.clear_mirror(nodes.there) and (nodes.there / "labels").is_dir()


def test_a_run_folder_that_bears_the_mark_of_a_mirror_keeps_what_it_has(nodes):
    attempts.begin_driver(nodes.there)
    (nodes.there / "labels").mkdir()
    (nodes.there / ".mirror" / "1-2").mkdir(parents=True)
    assert not elsewhere.clear_mirror(nodes.there)
    assert (nodes.there / "labels").is_dir() and not (nodes.there / ".mirror").exists()


def test_a_mirror_that_was_taken_away_changes_nothing_in_its_place(nodes):
    """Another driver begins in the folder while workers of an earlier one are alive."""
    snapshots.publish(nodes.there / "labels", fill("x"), {})
    root = nodes.mirror()
    snapshots.verify(root / "labels")
    mirror = elsewhere.see_through(None)
    shutil.rmtree(root)
    attempts.begin_driver(root)
    snapshots.publish(root / "labels", fill("mine"), {})
    snapshots.publish(root / "channels" / "7", fill("mine"), {})
    before = listed(root)
    elsewhere.see_through(mirror)
    for act in (lambda: snapshots.verify(root / "labels"), lambda: snapshots.list_snapshots(root / "channels"),
                lambda: snapshots.publish(root / "labels", fill("y"), {}, replace=True),
                lambda: snapshots.remove(root / "labels"), lambda: mirror.tidy(),
                lambda: whole_file(root / "labels" / "a.txt", lambda path: path.write_text("y"))):
        with contextlib.suppress(elsewhere.Away, FileNotFoundError):
            act()
        assert listed(root) == before


def test_a_folder_that_turns_out_shared_is_no_mirror(nodes):
    """Its record was shown late."""
    before = listed(nodes.there)
    with pytest.raises(elsewhere.Shared):
        Mirror(nodes.there, nodes.call)
    assert listed(nodes.there) == before and not (nodes.there / ".mirror").exists()


def test_what_dead_processes_left_goes(nodes):
    root = nodes.mirror()
    dead, passed = root / ".mirror" / "999999-abc", root / "channels" / ".co-views.1.tmp"
    for folder in (dead / "part", passed, root / ".replay"):
        folder.mkdir(parents=True)
    (nodes.there / ".replay").mkdir()
    elsewhere.of(root).tidy()
    assert not dead.exists() and not passed.exists() and (root / ".replay").exists()
    with elsewhere.workshop(root / "x"):
        assert list((root / ".mirror").glob("*-*/*")), "one's own stays"


def test_an_owner_that_does_not_answer_is_no_damage(nodes):
    """Who takes it for damage would remove what is whole."""
    snapshots.publish(nodes.there / "checkpoints" / "step-1", fill("x"), {})
    root = nodes.mirror()

    def away(*_):
        raise elsewhere.Away("the driver's node does not answer")

    elsewhere.of(root)._call = away
    for act in (lambda: snapshots.read_manifest(root / "checkpoints" / "step-1"),
                lambda: read_json(root / "results.json"), lambda: attempts.read_record(root),
                lambda: attempts.read_note(root / "attempts" / "1" / "stop.json"),
                lambda: snapshots.list_snapshots(root / "channels"), lambda: elsewhere.names(root / "checkpoints")):
        with pytest.raises(elsewhere.Away):
            act()


def test_a_file_that_changes_while_it_is_brought_comes_whole(nodes, monkeypatch):
    monkeypatch.setattr(elsewhere, "CHUNK_BYTES", 4)
    path, call = nodes.there / "x.json", nodes.call
    path.write_text('{"a": 1}')
    root = nodes.mirror()
    changes = ['{"a": 2, "b": 3}', "{}", None]

    def changing(method, *arguments):
        answer = call(method, *arguments)
        if method == "read" and changes:
            text = changes.pop(0)
            path.write_text(text) if text is not None else path.unlink()
        return answer

    elsewhere.of(root)._call = changing
    elsewhere.bring(root / "x.json")
    assert not (root / "x.json").exists() and changes == []
    path.write_text('{"c": 1}')
    elsewhere.bring(root / "x.json")
    assert (root / "x.json").read_text() == '{"c": 1}'


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/\0"])
def test_no_name_leads_out_of_the_folder(nodes, name):
    (nodes.there.parent / "x").write_text("secret")
    for ask in (lambda: nodes.owner.read(name, 0, 9), lambda: nodes.owner.put(name, b"", None),
                lambda: nodes.owner.remove(name, None), lambda: nodes.owner.names(name)):
        with pytest.raises(InputError, match="leads out"):
            ask()
    with pytest.raises(ValueError):
        nodes.owner.take("../../x", 0, b"")
    assert (nodes.there.parent / "x").read_text() == "secret"


def test_a_file_of_which_a_part_is_missing_is_not_placed(nodes):
    upload = "0" * 32
    nodes.owner.take(upload, 0, b"abc")
    nodes.owner.take(upload, 0, b"abc")
    with pytest.raises(OSError, match="3 of 4 bytes"):
        nodes.owner.place("labels/x", upload, 4, (1, None))
    assert not (nodes.there / "labels" / "x").exists()


def test_a_part_that_comes_late_a_second_time_changes_nothing(nodes):
    upload = "1" * 32
    for begin, part in ((0, b"aaaa"), (4, b"bbbb"), (0, b"aaaa"), (8, b"cc")):
        nodes.owner.take(upload, begin, part)
    nodes.owner.place("labels/x", upload, 10, None)
    assert (nodes.there / "labels" / "x").read_bytes() == b"aaaabbbbcc"


def test_what_was_sent_for_nothing_is_not_kept(nodes):
    attempts.begin_driver(nodes.there)
    root = nodes.mirror()
    with attempts.acting(Attempt(root, 7)):
        for act in (lambda: snapshots.publish(root / "indexes" / "1", fill("x"), {}),
                    lambda: elsewhere.of(root).put(root / "x.json", b"{}", attempts.who())):
            with pytest.raises(Superseded):
                act()
    assert os.listdir(nodes.owner._incoming) == []


def test_a_file_that_another_process_was_just_replacing_is_read(nodes, monkeypatch):
    snapshots.publish(nodes.there / "labels", fill("x"), {"kind": "labels"})
    root, opened = nodes.mirror(), []
    snapshots.read_manifest(root / "labels")

    def gone_once(path, flags, *more, real=os.open):
        if str(path).endswith("manifest.json") and str(path).startswith(str(root)) and not opened:
            opened.append(path)
            os.unlink(path)
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", gone_once)
    assert snapshots.read_manifest(root / "labels")["kind"] == "labels" and opened


def test_a_manifest_that_is_the_same_keeps_what_is_here(nodes):
    """On a file system with coarser times than the owner's."""
    snapshots.publish(nodes.there / "labels", fill("x"), {})
    folder = nodes.mirror() / "labels"
    snapshots.bring(folder)
    os.utime(folder / "manifest.json", (1, 1))
    inode = (folder / "a.txt").stat().st_ino
    snapshots.read_manifest(folder)
    assert (folder / "a.txt").stat().st_ino == inode


def test_a_path_outside_of_the_run_folder_is_what_it_seems(nodes, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"a": 1}))
    nodes.mirror()
    nodes.calls.clear()
    assert read_json(tmp_path / "own.json") == {"a": 1} and nodes.calls == []


# --------------------------------------------------------------------------------- against two folders that are one

NAMES, TEXTS = st.sampled_from(["1", "2", "3"]), st.sampled_from(["x", "y", "zz"])
STEPS = st.lists(st.tuples(st.sampled_from(["publish", "remove", "read"]), st.sampled_from(["owner", "a", "b"]), NAMES,
                           TEXTS), max_size=14)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_nodes_see_what_nodes_that_share_a_folder_would_see(tmp_path_factory, steps):
    nodes, truth = Nodes(tmp_path_factory.mktemp("nodes")), {}
    try:
        for what, who, name, text in steps:
            elsewhere.see_through(None)
            root = nodes.there if who == "owner" else nodes.mirror(who)
            if what == "publish":
                snapshots.publish(root / "channels" / name, fill(text), {"text": text}, replace=True)
                truth[name] = text
            elif what == "remove":
                snapshots.remove(root / "channels" / name)
                truth.pop(name, None)
            found = {one.path.name: one.path for one in snapshots.list_snapshots(root / "channels")}
            assert found.keys() == truth.keys()
            for key, path in found.items():
                assert snapshots.verify(path)["text"] == truth[key]
                assert (path / "in" / "b.txt").read_text() == truth[key] * 2
    finally:
        elsewhere.see_through(None)
        nodes.owner.close()


def test_what_is_asked_for_twice_under_one_number_is_done_once(nodes, monkeypatch):
    """The answer to the first got lost."""
    from launch import nodes as launched

    folder = launched.RunFolder(str(nodes.there))
    try:
        for _ in range(3):
            folder.ask("1", "append", "events.jsonl", b"one\n")
        folder.ask("2", "append", "events.jsonl", b"two\n")
        assert (nodes.there / "events.jsonl").read_bytes() == b"one\ntwo\n"
        for _ in range(2):
            with pytest.raises(OSError, match="No such file"):
                folder.ask("3", "place", "labels/x", "0" * 32, 1, None)
        assert folder.ask("4", "read", "events.jsonl", 0, 3) == b"one" and list(folder._done) == ["1", "2", "3"]
        monkeypatch.setattr(launched, "ANSWERS_KEPT", 2)
        folder.ask("5", "append", "events.jsonl", b"three\n")
        assert list(folder._done) == ["3", "5"]
    finally:
        folder.close()
