"""The watch over a process: what counts as moving, and how a process ends that does not, or is not wanted any more."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.errors import WatchtowerError
from embeddings.attempts import Superseded, acts_for, begin_driver, begin_group
from launch import stopping
from trainer import watchdog
from trainer.watchdog import Movement, Progress, Stuck, Watch, Watchdog, at_work, moved, note_first


class Machine:
    """A clock and a CPU that go on when they are told to."""

    def __init__(self):
        self.now, self.cpu = 100.0, 10.0

    def passes(self, seconds, busy=0.0):
        self.now += seconds
        self.cpu += seconds * busy

    def watchdog(self, limit_s, **progress):
        return Watchdog(limit_s, Progress(self.now, **progress), lambda: self.now, lambda: self.cpu)


def test_a_process_that_stands_still_is_found_after_the_limit():
    machine = Machine()
    dog = machine.watchdog(30)
    machine.passes(29)
    assert dog.still_for() is None
    machine.passes(2)
    assert dog.still_for() == 31
    assert machine.watchdog(None).still_for() is None


def test_a_move_starts_the_time_anew():
    machine = Machine()
    dog = machine.watchdog(30)
    for _ in range(5):
        machine.passes(20)
        dog._progress.at = machine.now
        assert dog.still_for() is None


@pytest.mark.parametrize("in_step, still", [(False, None), (True, 40.0)])
def test_an_index_that_is_being_built_moves_by_its_cpu_and_a_step_does_not(in_step, still):
    machine = Machine()
    dog = machine.watchdog(30, in_step=in_step)
    for _ in range(4):
        machine.passes(10, busy=0.9)
        found = dog.still_for()
    assert found == still
    for _ in range(4):
        machine.passes(10, busy=0.05)  # threads that only look around
        found = dog.still_for()
    assert found is not None


def test_what_one_rank_does_alone_moves_by_signs_cpu_and_files():
    machine, progress, files = Machine(), Progress(0.0), [0]

    def seen(seconds=5.0, busy=0.0, file_bytes=0, moves=False):
        movement = Movement(progress, lambda: machine.now, lambda: machine.cpu, lambda: files[0])
        machine.passes(seconds, busy)
        files[0] += file_bytes
        progress.at += moves
        return movement.seen()

    assert not seen() and not seen(busy=0.05, file_bytes=2**20)  # a thread that only looks around
    assert seen(moves=True) and seen(busy=0.5) and seen(file_bytes=2**26)
    assert not seen()
    before = watchdog._file_bytes()
    Path(__file__).read_bytes()
    assert watchdog._file_bytes() > before


def waits_for(event):
    assert event.wait(20), "nothing came"


def test_a_stuck_process_leaves_its_stacks_and_tells_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "LOOK_S", 0.02)
    attempt, ended, stuck = begin_group(begin_driver(tmp_path), "crm"), threading.Event(), []
    errors = []
    watch = Watch(attempt, "rank-1", 1.0, end=lambda error: (errors.append(error), ended.set()), on_stuck=stuck.append,
                  patience_s=0.05)
    moved("step 12 of dnn/seed=0", in_step=True)
    with watch:
        waits_for(ended)
    assert isinstance(errors[0], Stuck) and "since step 12 of dnn/seed=0" in str(errors[0]) and stuck[0] is errors[0]
    stacks = (attempt.folder / "stacks-rank-1.txt").read_text()
    assert "waits_for(ended)" in stacks and "MainThread" in stacks and "step 12" in stacks
    assert "waits_for(ended)" in capsys.readouterr().err
    told = json.loads((attempt.folder / "failed.json").read_text())
    assert told["stuck"] and told["who"] == "rank-1"

    # Another rank of the same group leaves its own stacks and ends.
    ended.clear()
    with Watch(attempt, "rank-0", None, end=lambda error: (errors.append(error), ended.set()), patience_s=0.05):
        waits_for(ended)
    assert "rank-1 has failed" in str(errors[-1]) and (attempt.folder / "stacks-rank-0.txt").exists()


def test_the_first_cause_is_kept(tmp_path):
    attempt = begin_group(begin_driver(tmp_path), "crm")
    Watch(attempt, "rank-1", None).fail(ValueError("the cause\nand more"))
    Watch(attempt, "rank-0", None).fail(RuntimeError("Connection closed by peer"))
    told = json.loads((attempt.folder / "failed.json").read_text())
    assert (told["who"], told["error"], told["stuck"]) == ("rank-1", "ValueError: the cause", False)
    assert not note_first(attempt.folder / "failed.json", {}) and len(list(attempt.folder.iterdir())) == 1


def test_who_was_cut_off_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LOOK_S", 0.02)
    monkeypatch.setattr(watchdog, "RECORD_EVERY_S", 0.02)
    driver, ended, errors = begin_driver(tmp_path), threading.Event(), []
    with Watch(driver, "driver", None, end=lambda error: (errors.append(error), ended.set())):
        begin_driver(tmp_path)
        waits_for(ended)
    assert isinstance(errors[0], Superseded)


@pytest.mark.parametrize("trouble", ["asked raises", "the record is away"])
def test_the_watch_goes_on_looking_whatever_a_look_comes_upon(tmp_path, monkeypatch, trouble):
    monkeypatch.setattr(watchdog, "LOOK_S", 0.02)
    monkeypatch.setattr(watchdog, "RECORD_EVERY_S", 0.0)
    driver, ended, errors, looked = begin_driver(tmp_path), threading.Event(), [], threading.Semaphore(0)

    def asked():
        looked.release()
        if trouble == "asked raises":
            raise AttributeError("Ray has changed")

    def looks():
        for _ in range(3):
            assert looked.acquire(timeout=20), "the watch has ended"

    with Watch(driver, "driver", None, asked=asked, end=lambda error: (errors.append(error), ended.set())):
        if trouble == "the record is away":
            (tmp_path / "attempts").rename(tmp_path / "away")
            looks()
            assert not (tmp_path / "attempts").exists() and not errors
            (tmp_path / "away").rename(tmp_path / "attempts")
        looks()
        begin_driver(tmp_path)
        waits_for(ended)
    assert len(errors) == 1 and isinstance(errors[0], Superseded)


def test_a_wish_to_stop_reaches_the_worker_and_beats_reach_the_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LOOK_S", 0.02)
    attempt, asked = begin_group(begin_driver(tmp_path), "crm"), threading.Event()
    reasons = []
    with Watch(attempt, "rank-0", None, asked=lambda: "SIGTERM", wish=lambda reason: (reasons.append(reason),
                                                                                      asked.set()), beats=True):
        waits_for(asked)
        deadline = time.monotonic() + 20
        while not (attempt.folder / "alive.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert reasons[0] == "SIGTERM" and json.loads((attempt.folder / "alive.json").read_text())["beat"] >= 1


def test_a_task_acts_for_its_driver_and_leaves_signs_while_it_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "BUSY_OVER_S", 0.05)
    driver = begin_driver(tmp_path)
    with at_work(driver):
        assert acts_for() == driver
        deadline = time.monotonic() + 20
        while not list(driver.folder.glob("at-work-*.json")) and time.monotonic() < deadline:
            sum(range(10_000))
        assert list(driver.folder.glob("at-work-*.json"))
    assert acts_for() is None and not list(driver.folder.iterdir())
    with at_work(None):
        assert acts_for() is None


# -------------------------------------------------------------------------------------------- signals of the driver

DRIVER = """
import sys, time
from launch import stopping

def ask():
    print("asked", flush=True)
    return answers

answers, grace_s = sys.argv[1] == "answers", float(sys.argv[2])
stopping.end_on_sigterm()
with stopping.asking_first(ask, grace_s):
    print("ready", flush=True)
    while not (stopping.is_asked() and sys.argv[3] == "saves"):
        time.sleep(0.01)
print("saved", flush=True)
"""


@pytest.mark.parametrize("words, signals, code, said", [
    (("answers", "60", "saves"), 1, 0, "ready asked saved"),
    (("answers", "60", "hangs"), 2, stopping.TERMINATED, "ready asked"),
    (("answers", "0.1", "hangs"), 1, stopping.TERMINATED, "ready asked"),
    (("nobody", "60", "hangs"), 1, stopping.TERMINATED, "ready asked"),
])
def test_sigterm_asks_first_and_ends_at_once_the_second_time(repository, words, signals, code, said):
    process = subprocess.Popen([sys.executable, "-c", DRIVER, *words], cwd=repository, stdout=subprocess.PIPE,
                               text=True)
    heard = [process.stdout.readline().strip()]
    process.send_signal(signal.SIGTERM)
    heard.append(process.stdout.readline().strip())
    if signals == 2:
        process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert " ".join([*heard, *rest.split()]) == said


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, stopping.TERMINATED), (signal.SIGINT, 7)])
def test_a_signal_that_a_finalizer_swallows_comes_again(repository, number, code):
    # Who starts the tests in the background of a shell has them ignore SIGINT.
    script = ("import signal, time\nfrom launch import stopping\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "class Slow:\n    def __del__(self):\n        print('in', flush=True)\n        time.sleep(60)\n"
              "stopping.end_on_sigterm()\nslow = Slow()\n"
              "try:\n    del slow\n    print('out', flush=True)\n    time.sleep(60)\n"
              "except KeyboardInterrupt:\n    raise SystemExit(7)\n")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=repository, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    process.send_signal(number)
    said, told = process.communicate(timeout=50)
    assert (process.returncode, said, told) == (code, "out\n", "")


def test_a_thread_can_end_the_driver_with_its_error(repository):
    script = ("import threading\nfrom configs.errors import WatchtowerError\nfrom launch import stopping\n"
              "stopping.end_on_sigterm()\n"
              "thread = threading.Thread(target=lambda: stopping.interrupt(WatchtowerError('no room')))\n"
              "try:\n    with stopping.telling_why():\n        thread.start()\n        threading.Event().wait(60)\n"
              "except WatchtowerError as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "no room"), done.stderr


def test_only_the_first_error_is_raised_and_the_grace_ends_with_the_block(repository):
    script = ("import os, signal, threading, time\nfrom configs.errors import WatchtowerError\n"
              "from launch import stopping\nstopping.end_on_sigterm()\n"
              "with stopping.asking_first(lambda: True, 60):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
              "print(stopping._end_of_grace.finished.is_set())\n"
              "def ask():\n    raise OSError('away')\n"
              "stopping.end_on_sigterm()\n"
              "try:\n    with stopping.asking_first(ask, 60):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
              "        time.sleep(60)\nexcept SystemExit as error:\n    print(error.code)\n"
              "def fails(what):\n"
              "    thread = threading.Thread(target=stopping.interrupt, args=[WatchtowerError(what)])\n"
              "    thread.start()\n    thread.join()\n    time.sleep(0.05)\n"
              "try:\n    with stopping.telling_why():\n        fails('first')\n"
              "except WatchtowerError as error:\n    print(error)\n"
              "fails('second')\nprint('cleaned up')\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "143", "first", "cleaned", "up"]), done.stderr


def test_errors_of_the_watch_are_failures_of_the_run():
    assert issubclass(Stuck, WatchtowerError) and Stuck.exit_code == 1


def test_a_step_that_takes_much_longer_than_any_before_stands(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watchdog, "PROGRESS", Progress(100.0))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    watchdog.training(True)
    now[0] += 10
    assert not watchdog.PROGRESS.stands()
    moved("step 1", in_step=True)
    for _ in range(3):
        now[0] += 4
        moved("a step", in_step=True)
    assert watchdog.PROGRESS.longest_s == 4
    now[0] += 26
    assert not watchdog.PROGRESS.stands()
    now[0] += 2
    assert watchdog.PROGRESS.stands()
    moved("what follows the epoch", in_step=False)
    now[0] += 26
    assert not watchdog.PROGRESS.stands()
    moved()  # one rank does something alone, and gets on
    now[0] += 98
    assert not watchdog.PROGRESS.stands(), "a step took 28 s, as it turned out"
    now[0] += 2
    assert watchdog.PROGRESS.stands()
    watchdog.training(False)
    assert watchdog.PROGRESS.longest_s == 0 and not watchdog.PROGRESS.stands()
