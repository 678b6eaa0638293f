"""Fencing: who was cut off publishes nothing, leaves nothing, and is told why."""

import shutil
import threading
import uuid

import pytest

from configs.errors import WatchtowerError
from embeddings import attempts, snapshots
from embeddings.attempts import Superseded, acting, begin_driver, begin_group, end_groups
from embeddings.snapshots import list_snapshots, publish, remove
from trainer.results import write_whole


def write(folder):
    (folder / "data").write_text("x")


def test_numbers_rise_over_drivers_and_groups(tmp_path):
    first = begin_driver(tmp_path)
    groups = [begin_group(first, "crm").number, begin_group(first, "router").number]
    assert [first.number, *groups, begin_driver(tmp_path).number] == [1, 2, 3, 4]
    (tmp_path / "attempts" / "4" / "failed.json").write_text("{}")
    assert begin_driver(tmp_path).number == 5
    # An attempt that left nothing has no folder any more, one that left something is kept.
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir() if path.is_dir()) == ["4", "5"]
    for name in ("alive.json", "stop.json", "at-work-a-7.json", ".alive.json.1.tmp", "stacks-rank-0-held.txt"):
        (tmp_path / "attempts" / "5" / name).write_text("" if name.startswith("stacks") else "{}")
    assert begin_driver(tmp_path).number == 6
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir() if path.is_dir()) == ["4", "6"]


def test_numbers_go_on_where_the_record_is_damaged(tmp_path):
    for _ in range(3):
        begin_driver(tmp_path)
    driver = begin_driver(tmp_path)
    (tmp_path / "attempts" / "record.json").write_text("{")
    with pytest.raises(WatchtowerError, match="damaged|cannot be read"):
        driver.check()
    assert begin_driver(tmp_path).number == 5


def test_nothing_is_published_nor_made_where_the_record_is_away(tmp_path):
    driver = begin_driver(tmp_path)
    shutil.rmtree(tmp_path / "attempts")
    for act in (driver.check, driver.publishing().__enter__, lambda: begin_group(driver, "crm")):
        with pytest.raises(WatchtowerError, match="record of attempts is not there") as found:
            act()
        assert not isinstance(found.value, Superseded)
    with pytest.raises(FileNotFoundError):
        attempts.write_note(driver.folder / "alive.json", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("successor", ["driver", "group", "end of the group"])
def test_a_group_that_was_cut_off_publishes_nothing_over_its_successor(tmp_path, successor):
    driver = begin_driver(tmp_path)
    lost = begin_group(driver, "crm")
    with acting(lost):
        publish(tmp_path / "indexes" / "1-1", write, {"by": lost.number})
    if successor == "driver":
        heir = begin_driver(tmp_path)
    elif successor == "group":
        heir = begin_group(driver, "crm")
    else:
        end_groups(driver)
        heir = driver
    with acting(heir):
        publish(tmp_path / "indexes" / "1-1", write, {"by": heir.number}, replace=True)
        write_whole(tmp_path / "metrics.json", "heir")
    with acting(lost):
        for act in (lambda: publish(tmp_path / "indexes" / "1-1", write, {"by": lost.number}, replace=True),
                    lambda: publish(tmp_path / "indexes" / "2-2", write, {"by": lost.number}),
                    lambda: write_whole(tmp_path / "metrics.json", "lost"),
                    lambda: remove(tmp_path / "indexes" / "1-1")):
            with pytest.raises(Superseded, match=f"attempt {lost.number} was cut off"):
                act()
    assert [found.path.name for found in list_snapshots(tmp_path / "indexes")] == ["1-1"]
    assert snapshots.read_manifest(tmp_path / "indexes" / "1-1")["by"] == heir.number
    assert (tmp_path / "metrics.json").read_text() == "heir"
    assert sorted(path.name for path in (tmp_path / "indexes").iterdir()) == ["1-1"], "nothing is left beside it"
    assert {path.name for path in tmp_path.iterdir()} == {"attempts", "indexes", "metrics.json"}


def test_a_driver_goes_on_publishing_while_its_groups_come_and_go(tmp_path):
    driver = begin_driver(tmp_path)
    begin_group(driver, "crm")
    end_groups(driver)
    with acting(driver):
        write_whole(tmp_path / "metrics.json", "x")
    assert attempts.acts_for() is None
    lost, _ = driver, begin_driver(tmp_path)
    for act in (lambda: begin_group(lost, "crm"), lost.check):
        with pytest.raises(Superseded, match="taken the run over"):
            act()
    end_groups(lost)  # says nothing and changes nothing
    assert attempts.read_record(tmp_path)["driver"] == 3


def test_nobody_begins_between_the_look_and_the_rename(tmp_path, monkeypatch):
    """A successor that wants to begin while a rename is under way waits for it."""
    driver, order = begin_driver(tmp_path), []
    thread = threading.Thread(target=lambda: order.append(begin_driver(tmp_path).number))
    rename = snapshots._put_in_place

    def slow(*arguments):
        thread.start()
        thread.join(0.3)
        order.append("renamed")
        rename(*arguments)

    monkeypatch.setattr(snapshots, "_put_in_place", slow)
    with acting(driver):
        publish(tmp_path / "indexes" / "1-1", write, {})
    thread.join()
    assert order == ["renamed", 2]


def test_a_lock_that_nobody_gives_back_is_an_error_and_no_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "LOCK_WITHIN_S", 0.05)
    driver = begin_driver(tmp_path)
    with driver.publishing(), pytest.raises(WatchtowerError, match="another process has held it"):
        begin_driver(tmp_path)


# ------------------------------------------------------------------------------------- the sweep of dead attempts

def test_a_writer_is_not_swept_between_its_folder_and_its_lock(tmp_path, monkeypatch):
    """A sweep that comes upon a folder that was made and not locked yet may remove it, but only before the writer goes
    on; the writer then makes another one."""
    has_lock, swept = threading.Event(), []
    remove, lock = shutil.rmtree, snapshots.fcntl.flock

    def removes_late(path, **how):
        if ".attempt-" in str(path) and threading.current_thread() is not threading.main_thread():
            has_lock.wait(0.5)  # the writer comes to its lock meanwhile, unless the sweep keeps it from that
            swept.append(path)
        remove(path, **how)

    def sweeps_before(descriptor, how):
        if how == snapshots.fcntl.LOCK_EX and not swept and threading.current_thread() is threading.main_thread():
            at_it = threading.Event()
            monkeypatch.setattr(snapshots, "_is_still", lambda *found: at_it.set() or is_still(*found))
            sweep.start()
            at_it.wait(5)
            lock(descriptor, how)
            has_lock.set()
            return
        lock(descriptor, how)

    is_still = snapshots._is_still
    sweep = threading.Thread(target=lambda: snapshots.clean_dead_attempts(tmp_path))
    monkeypatch.setattr(snapshots.shutil, "rmtree", removes_late)
    monkeypatch.setattr(snapshots.fcntl, "flock", sweeps_before)
    published = publish(tmp_path / "1-1", write, {})
    sweep.join()
    assert len(swept) == 1 and snapshots.verify(published)
    assert [path.name for path in tmp_path.iterdir()] == ["1-1"]


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path):
    dead = tmp_path / f".1-1.attempt-{uuid.uuid4().hex}.tmp"
    dead.mkdir()
    living = {}

    def looks_around(folder):
        living["removed"] = snapshots.clean_dead_attempts(tmp_path)
        write(folder)

    publish(tmp_path / "2-2", looks_around, {})
    assert not dead.exists() and living["removed"] == []
