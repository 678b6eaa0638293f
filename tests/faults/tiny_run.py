"""A tiny run as a user starts it, with all its processes known: started, watched, ended, and looked for afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("survive.yaml")
POLL_S = 0.02
FAMILY_EVERY_S = 0.2
# A machine that is shared does in minutes what an idle one does in seconds: only a run that stands still is hung.
STANDS_STILL_S = 420.0
GONE_WITHIN_S = 90.0
# Ray's own processes beside workers and tasks.
OF_RAY = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "DatasetManager", "PlacementGroupCleaner", "PreemptionWatcher",
          "SynchronizationActor", "_AutoscalingCoordinatorActor", "AutoscalingRequester", "_StatsActor", "RunFolder")

_LIBC = ctypes.CDLL(None)
_OVER = threading.Event()
_STARTED: list[Started] = []


class Started:
    """A process that was started here, its children, and theirs.

    Children are noted while they have a parent: once the first is killed nothing else says whose they were.

    Args:
        log: takes what it prints, behind what it holds.
        environment: variables on top of this process's.
    """

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] | None = None,
                 stdin: int = subprocess.DEVNULL):
        if _OVER.is_set():
            raise Hung("it is over: nothing more is started")
        self.log = log
        self.family: dict[int, float] = {}
        self.ray_folders: set[str] = set()
        self._log_begin = self.log.stat().st_size if self.log.exists() else 0
        self._family_lock, self._done = threading.Lock(), threading.Event()
        with open(self.log, "ab") as sink:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=stdin, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_end_with_parent,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})})
        self.pid = self.process.pid
        self._note(psutil.Process(self.pid))
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        _STARTED.append(self)

    @property
    def output(self) -> str:
        """What this start printed."""
        with open(self.log, "rb") as file:
            file.seek(self._log_begin)
            return file.read().decode("utf-8", "replace")

    def is_running(self) -> bool:
        return self.process.poll() is None

    def _note(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            self.family.setdefault(process.pid, process.create_time())
            if process.name() == "raylet" and not self.ray_folders:
                self.ray_folders |= {word.partition("=")[2] for word in process.cmdline()
                                     if word.startswith("--temp-dir=")}

    def _look(self) -> list[psutil.Process]:
        with self._family_lock, contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid).children(recursive=True)
            for process in found:
                self._note(process)
            return found
        return []

    def _watch(self) -> None:
        while not self._done.wait(FAMILY_EVERY_S) and self.is_running():
            self._look()

    def living(self) -> list[psutil.Process]:
        """Those of the family that still run, a zombie not counted."""
        found = []
        for pid, born in list(self.family.items()):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def victims(self, kind: str) -> list[psutil.Process]:
        """The live processes of a kind: driver, worker, controller, task, raylet, gcs, everything."""
        children = self._look()
        if kind == "driver":
            return [psutil.Process(self.pid)] if self.is_running() else []
        if kind == "everything":
            return [psutil.Process(self.pid), *children] if self.is_running() else []
        return [process for process in children if _kind_of(process) == kind]

    def left(self, within_s: float = GONE_WITHIN_S) -> list[str]:
        """The processes of the family that do not end by themselves."""
        deadline = time.monotonic() + within_s
        while (living := self.living()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [describe(process) for process in living]

    def end(self) -> None:
        """SIGKILL for all that is left of the family."""
        self._look()
        self._done.set()
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)


class Hung(AssertionError):
    """A run that stood still."""


class TinyRun(Started):
    """One process of `watchtower run`.

    Args:
        run_dir: the run folder; `<run_dir>.log` beside it takes what all starts print.
        environment: variables on top of this process's.
        prefix: words before the command, such as those that start it in another network.
    """

    def __init__(self, run_dir: Path, *overrides: str, environment: Mapping[str, str] | None = None,
                 config: Path = CONFIG, prefix: tuple[str, ...] = ()):
        self.run_dir = run_dir
        super().__init__([*prefix, sys.executable, "-m", "launch.cli", "run", str(config), f"run_dir={run_dir}",
                          *overrides], run_dir.with_name(f"{run_dir.name}.log"), environment)

    def wait(self, stands_still_s: float = STANDS_STILL_S) -> int:
        """The exit code, once the process has ended by itself.

        Raises:
            Hung: nothing was printed and nothing noted for so long; the run was ended.
        """
        moved, last = time.monotonic(), None
        while self.is_running():
            now = self.progress()
            if now != last:
                moved, last = time.monotonic(), now
            if time.monotonic() - moved > stands_still_s:
                self.end()
                raise Hung(f"nothing moved for {stands_still_s:.0f} s: {self.output[-600:]}")
            time.sleep(0.1)
        self._done.set()
        self._watcher.join()
        return self.process.returncode

    def progress(self) -> tuple[int, int]:
        """Grows as long as the run says something."""
        events = self.run_dir / "events.jsonl"
        size = 0
        with contextlib.suppress(OSError):
            size = events.stat().st_size
        return size, self.log.stat().st_size


def _end_with_parent() -> None:
    """In the child: whatever ends this process, SIGKILL too, ends it; and Ray's processes end with it."""
    _LIBC.prctl(1, signal.SIGKILL)


def _kind_of(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        name, words = process.name(), " ".join(process.cmdline()[:2])
        if name in ("raylet", "gcs_server"):
            return {"raylet": "raylet", "gcs_server": "gcs"}[name]
        if "TrainWorker" in words:
            return "worker"
        if "TrainController" in words:
            return "controller"
        if words.startswith("ray::") and not words.removeprefix("ray::").startswith(OF_RAY):
            return "task"
    return None


def describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())[:80] or process.name()}"
    return str(process.pid)


def end_all() -> None:
    """Nothing that was started here outlives this process, and nothing is started any more."""
    _OVER.set()
    for run in _STARTED:
        with contextlib.suppress(Exception):
            run.end()


def end_on_signals() -> None:
    """Ctrl-C and SIGTERM end this process as an exception does, so that `end_all` in a `finally` is reached."""
    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def left_in(run_dir: Path) -> list[str]:
    """What no finished run may leave in its folder: scratch folders, attempts, locks."""
    scratch = [path for path in run_dir.rglob("*") if path.name == "run.lock" or path.name.endswith(".tmp")
               or (path.name.startswith(".") and "ray" not in path.relative_to(run_dir).parts)]
    return sorted(str(path.relative_to(run_dir)) for path in scratch)


class Watched:
    """events.jsonl read as it grows: where a run is.

    Attributes:
        stage: that is running, None between two.
        steps: train_step events of this stage since the last `again`.
        last: a few words on the last event.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.events: list[dict[str, Any]] = []
        self._offset, self._torn = 0, b""
        self.again()

    def again(self) -> None:
        """Forget where the run was: it starts anew."""
        self.read()
        self.stage: str | None = None
        self.steps, self.last = 0, "start"

    def read(self) -> None:
        try:
            with open(self.run_dir / "events.jsonl", "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        self._offset += len(data)
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        what = event.get("event")
        if what == "stage":
            started = event.get("status") == "started"
            self.stage, self.steps = (event.get("stage"), 0) if started else (None, 0)
            self.last = f"{event.get('stage')} {event.get('status')}"
        elif what == "train_step":
            self.steps += 1
            self.last = f"{event.get('model')} step {event.get('step')}"
        else:
            self.last = " ".join(str(w) for w in (what, event.get("model"), event.get("step")) if w is not None)
