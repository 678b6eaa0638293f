"""What passes between the driver and a group of training workers through the run folder; Ray is not needed for it."""

import threading
import time

import pytest

from configs.errors import WatchtowerError
from configs.schema import Config
from embeddings.attempts import begin_driver, begin_group, read_note, write_note
from launch import train


@pytest.fixture
def driver(tmp_path):
    return begin_driver(tmp_path)


def beat(group, number=1, training=True, stands=False):
    write_note(group.folder / "alive.json", {"beat": number, "training": training, "stands": stands}, flush=False)


def test_only_a_group_that_trains_is_asked_to_stop(driver):
    assert not train._ask_to_stop(driver)
    group = begin_group(driver, "crm")
    assert not train._ask_to_stop(driver)
    beat(group, training=False)
    assert not train._ask_to_stop(driver) and read_note(driver.folder / "stop.json") is None
    beat(group)
    assert train._ask_to_stop(driver)
    assert read_note(driver.folder / "stop.json") == {"reason": "SIGTERM to the driver"}
    begin_group(driver, "crm")
    assert not train._trains(driver), "the next group has given no sign of life yet"


def test_a_group_saves_before_it_is_resized(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOOK_S", 0.05)
    outcome, asked = tmp_path / "stages" / "crm.outcome.json", tmp_path / "attempts"
    train._save_before_resize(driver, outcome, 60)  # the first group: nobody is asked, nothing is waited for
    dead = begin_group(driver, "crm")
    beat(dead)
    train._save_before_resize(driver, outcome, 60)  # it died: no beat comes any more
    assert not list(asked.rglob("stop.json"))

    monkeypatch.setattr(train, "LOOK_S", 0.5)  # a beat comes within three of them, on a busy machine too
    outcome.parent.mkdir()
    group, over = begin_group(driver, "crm"), threading.Event()

    def lives():
        number = 0
        while not over.wait(0.01):
            number += 1
            beat(group, number)
            if (group.folder / "stop.json").exists():
                write_note(outcome, {"stopped": "the cluster has another size", "step": 7})

    thread = threading.Thread(target=lives)
    thread.start()
    try:
        while train._alive(driver) is None:
            time.sleep(0.01)
        train._save_before_resize(driver, outcome, 60)
    finally:
        over.set()
        thread.join()
    assert read_note(outcome)["step"] == 7


@pytest.mark.parametrize("stands_from", [0, 300])
def test_a_group_that_waits_for_a_lost_worker_is_not_waited_for(driver, tmp_path, monkeypatch, stands_from):
    """It cannot save: with the worker that is gone goes the collective in which the others stand."""
    monkeypatch.setattr(train, "LOOK_S", 0.2)
    group, over = begin_group(driver, "crm"), threading.Event()

    def lives():
        number = 0
        while not over.wait(0.01):
            number += 1
            beat(group, number, stands=number > stands_from)

    thread = threading.Thread(target=lives)
    thread.start()
    try:
        while train._alive(driver) is None or (stands_from == 0 and not train._alive(driver)["stands"]):
            time.sleep(0.01)
        train._save_before_resize(driver, tmp_path / "stages" / "crm.outcome.json", 600)
    finally:
        over.set()
        thread.join()
    assert (group.folder / "stop.json").exists() == (stands_from > 0)


def test_the_first_cause_is_that_of_the_newest_group_that_failed(driver):
    assert train._first_cause(driver) is None
    for error in ("an older one", "the cause"):
        group = begin_group(driver, "crm")
        write_note(group.folder / "failed.json", {"who": "rank-1", "at": "step 3", "error": error})
    begin_group(driver, "crm")
    assert train._first_cause(driver) == "rank-1, at step 3: the cause"
    assert train._first_cause(begin_driver(driver.run_dir)) is None, "of another driver's groups"


def test_a_driver_does_not_wait_for_ever_for_room(driver, monkeypatch):
    monkeypatch.setattr(train, "LOOK_S", 0.02)
    ended, errors = threading.Event(), []
    monkeypatch.setattr(train, "interrupt", lambda error: (errors.append(error), ended.set()))
    monkeypatch.setattr(train, "_missing", lambda config: "what is missing")
    with train._watched_group(Config(train={"wait_s": 0.2}), driver):
        assert ended.wait(20)
    assert isinstance(errors[0], WatchtowerError)
    assert "no group" in str(errors[0]) and "what is missing" in str(errors[0])


def test_a_driver_does_not_wait_for_ever_for_a_group_that_is_silent(driver, monkeypatch):
    monkeypatch.setattr(train, "LOOK_S", 0.02)
    monkeypatch.setattr(train, "SILENCE_BEYOND_WATCHDOG_S", 0.1)
    ended, errors = threading.Event(), []
    monkeypatch.setattr(train, "interrupt", lambda error: (errors.append(error), ended.set()))
    beat(begin_group(driver, "crm"))
    with train._watched_group(Config(train={"wait_s": 0.1, "watchdog_s": None}), driver):
        assert ended.wait(20)  # no Ray is there to say what the cluster has
    assert "no sign of life" in str(errors[0]) and "Ray does not say" in str(errors[0])


def test_what_a_worker_that_was_cut_off_says_does_not_reach_the_driver(driver, tmp_path):
    outcome = tmp_path / "stages" / "crm.outcome.json"
    lost, heir = begin_group(driver, "crm"), begin_group(driver, "crm")
    with train.acting(lost):
        train._write_outcome(outcome, {"error": "WatchtowerError", "message": "lost"}, 0)
    assert not outcome.parent.exists() or not list(outcome.parent.iterdir())
    with train.acting(heir):
        train._write_outcome(outcome, {"result": {}}, 0)
    assert read_note(outcome) == {"result": {}}
