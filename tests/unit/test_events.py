"""Events: every line is whole JSON whatever happens to the writers, and what a person sees of them is one line each."""

import errno
import json
import math
import multiprocessing
import threading

import numpy as np
import pytest

from configs.errors import InputError, WatchtowerError
from trainer import events
from trainer.events import EventLog, StepClock, console_line, follow, memory_mib, read_events, seconds_text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "events.jsonl"


def test_one_json_object_a_line(path):
    with EventLog(path) as log:
        log.write("train_step", model="dnn/seed=0", epoch=1, step=20, loss=4.5)
        log.write("epoch", text="two\nlines", path=path, values=np.arange(2), scalar=np.float32(0.5), none=None)
    lines = path.read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert {key: first[key] for key in ("event", "model", "epoch", "step", "loss")} == {
        "event": "train_step", "model": "dnn/seed=0", "epoch": 1, "step": 20, "loss": 4.5}
    assert first["time"] > 1.7e9
    assert (second["text"], second["path"], second["values"], second["scalar"], second["none"]) == (
        "two\nlines", str(path), [0, 1], 0.5, None)
    assert [e["event"] for e in read_events(path)] == ["train_step", "epoch"]
    assert [e["event"] for e in read_events(path, "epoch")] == ["epoch"]


def test_what_json_cannot_hold(path):
    with EventLog(path) as log:
        log.write("train_step", loss=math.nan, deep={"a": [1.0, -math.inf]}, fine=np.float64("inf"))
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    event = json.loads(text)
    assert (event["loss"], event["deep"], event["fine"]) == (None, {"a": [1.0, None]}, None)
    assert event["not_finite"] == {"loss": "nan", "deep.a.1": "-inf", "fine": "inf"}
    assert "loss nan" in console_line(event)


def test_a_torn_line_is_passed_over(path):
    with EventLog(path) as log:
        log.write("a")
    with path.open("ab") as file:
        file.write(b'{"event":"torn","ti')
    assert [e["event"] for e in read_events(path)] == ["a"]
    with EventLog(path) as log:  # a new writer does not write on in the torn line
        log.write("b")
    assert [e["event"] for e in read_events(path)] == ["a", "b"]
    assert list(read_events(path.with_name("nothing.jsonl"))) == []


def test_a_damaged_line_is_passed_over(path):
    with EventLog(path) as log:
        log.write("a", text="\u00e4\ud800")  # a lone surrogate, as in a file name that is no UTF-8
        log.write("b", loss=4.5)
        log.write("c")
    first, second, third = path.read_bytes().splitlines(keepends=True)
    assert [sorted(event) for event in read_events(path)] == [
        sorted({"event", "time", "node", *more}) for more in (["text"], ["loss"], [])]
    for at in range(len(second)):
        for bit in range(8):
            changed = bytearray(second)
            changed[at] ^= 1 << bit
            path.write_bytes(first + changed + third)
            # A line feed that is lost takes the next line with it; one that is made, nothing more.
            assert [e["event"] for e in read_events(path)] == ["a"] + ["c"] * (at < len(second) - 1), (at, bit)


def test_a_full_disk_is_said(path, monkeypatch):
    log = EventLog(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(events.os, "write", full)
    with pytest.raises(InputError, match="the disk is full"):
        log.write("a")
    monkeypatch.undo()
    log.close()
    with pytest.raises(WatchtowerError, match="closed"):
        log.write("a")


def _write_many(path, name):
    with EventLog(path) as log:
        for number in range(200):
            log.write("train_step", model=name, step=number, padding="x" * (number * 37 % 900))


def test_processes_do_not_mix_lines(path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(path, f"m{i}")) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = list(read_events(path))
    assert len(found) == path.read_bytes().count(b"\n") == 600
    for i in range(3):
        assert [e["step"] for e in found if e["model"] == f"m{i}"] == list(range(200))


def test_follow_shows_what_others_append(path):
    with EventLog(path) as log:
        log.write("train_step", model="before", step=1)
        stop, shown = threading.Event(), []
        thread = follow(path, stop, shown.append)
        log.write("train_step", model="dnn/seed=0", epoch=1, epochs=4, step=2, steps=80, loss=4.0)
        log.write("note", show=False)
        with path.open("ab") as file:
            file.write(b'{"event":"half')
        stop.set()
        thread.join(5)
    assert shown == ["dnn/seed=0  epoch 1/4  step 2/80  loss 4.0000"]


def test_follow_waits_for_the_file(path):
    stop, shown = threading.Event(), []
    thread = follow(path, stop, shown.append)
    with EventLog(path) as log:
        log.write("stage", stage="ingest", status="started")
    stop.set()
    thread.join(5)
    assert shown == ["ingest: started"]


@pytest.mark.parametrize(("event", "line"), [
    ({"event": "train_step", "model": "dnn/seed=0", "epoch": 2, "epochs": 4, "step": 120, "steps": 800, "loss": 5.31214,
      "rows_per_s": 12345.6, "wait_share": 0.034, "memory_mib": 1512.3, "eta_s": 92.4},
     "dnn/seed=0  epoch 2/4  step 120/800  loss 5.3121  12.3k rows/s  waiting for data 3%  1,512 MiB  1 min 32 s left"),
    ({"event": "stage", "stage": "crm", "status": "done", "seconds": 61.0, "rows": 12345, "peak_mib": 900.2},
     "crm: done  in 1 min 01 s  12,345 rows  at most 900 MiB"),
    ({"event": "stage", "stage": "crm", "status": "again", "why": "changed: train.epochs: 4 -> 6"},
     "crm: again  changed: train.epochs: 4 -> 6"),
    ({"event": "checkpoint", "time": 1.0, "model": "dnn/seed=0", "step": 5, "path": "checkpoints/5", "seconds": 0.25},
     "dnn/seed=0  checkpoint  step 5  checkpoints/5  seconds 0.25 s"),
    ({"event": "quiet", "show": False}, None),
])
def test_console_lines(event, line):
    assert console_line(event) == line


def test_lengths_of_time():
    assert [seconds_text(s) for s in (0.4, 59, 61, 3600 * 3 + 60 * 20)] == ["0 s", "59 s", "1 min 01 s", "3 h 20 min"]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_of_the_last_window():
    clock = Clock()
    steps = StepClock(steps=10, done=2, now=clock)
    assert steps.rates() == {}
    for _ in range(2):
        with steps.waiting():
            clock.now += 0.5
        clock.now += 1.5
        steps.step(rows=64)
    assert steps.rates() == {"rows_per_s": 32.0, "wait_share": 0.25, "step_s": 2.0, "eta_s": 12.0}
    clock.now += 1.0
    steps.step(rows=64)
    found = steps.rates()
    assert (found["rows_per_s"], found["wait_share"]) == (64.0, 0.0)
    assert found["eta_s"] == pytest.approx(5 * (2.0 + 0.4 * (1.0 - 2.0)))  # smoothed: 5 steps are left
    clock.now += 50.0
    steps.restart()
    clock.now += 1.0
    steps.step(rows=10)
    assert steps.rates()["rows_per_s"] == 10.0


def test_memory_is_measured():
    assert 5 < memory_mib() < 1e6


def test_curves_go_to_tensorboard(path, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with EventLog(path, tmp_path / "tensorboard") as log:
        for step in (10, 20):
            log.write("train_step", model="dnn/seed=0", epoch=1, step=step, loss=5.0 / step, note="words")
        log.write("stage", stage="crm", seconds=3.0)
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "dnn" / "seed=0"))
    curves.Reload()
    assert curves.Tags()["scalars"] == ["train_step/loss"]
    assert [(s.step, round(s.value, 3)) for s in curves.Scalars("train_step/loss")] == [(10, 0.5), (20, 0.25)]
