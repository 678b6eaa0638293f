"""Who watches over a process of a run: whether anything moves, whether it is asked to stop, whether it is still wanted.

A thread of every training worker, and of the driver, looks twice a second. It ends the process

- when nothing has moved for `train.watchdog_s` seconds: the stacks of all threads go to stderr and to
  `attempts/<n>/stacks-<who>.txt`, on every rank, since a rank that stands still is seldom the one that is to blame;
- when another rank has failed: it waits for that one, perhaps in a collective that will never end;
- when a later attempt owns the run folder (embeddings/attempts.py).

What moves says so: `moved("step 12 of dnn/seed=0")`. Outside of training steps the use of a CPU counts too, so that an
index that takes hours to build is not taken for one that hangs; in a step it does not, where a rank may wait in a loop.
Tasks of the cluster (`at_work`) leave signs of life while they use one, which count as the driver's.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.errors import WatchtowerError
from configs.secrets import redact
from embeddings import elsewhere
from embeddings.attempts import Attempt, Superseded, acting, note_first, read_note, write_note

LOOK_S = 0.5
RECORD_EVERY_S = 2.0
PATIENCE_S = 5.0
"""Seconds that a rank has to end by itself once another one has failed; also for others to leave their stacks."""

BUSY_SHARE = 0.2
"""Share of a core above which a process counts as moving outside of training steps."""

BUSY_OVER_S = 5.0
"""Seconds over which that share is taken."""

BUSY_BYTES = 4 * 2**20
"""Bytes a second, read or written, above which what one rank does alone counts as moving: checksums of a slow disk."""

BUSY_TASK_SHARE = 0.02
"""The same for a task of the cluster, which reads and writes more than it computes."""

STANDS_S, STANDS_STEPS = 15.0, 3
"""A group in which nothing moves for so long, and so many times the longest step, is not waited for where it shall
save. Who waits in turns for what one rank does alone moves every few seconds, as long as that one does."""


class Stuck(WatchtowerError):
    """Nothing has moved for too long."""


@dataclass
class Progress:
    """When this process last moved, and what. in_step: what moves next is a training step; CPU time says nothing.
    training: a training loop runs here that answers a wish to stop. longest_s: that a step of it has taken so far."""

    at: float
    what: str = "the start"
    in_step: bool = False
    training: bool = False
    longest_s: float = 0.0

    def stands(self) -> bool:
        """Whether nothing has moved for much longer than any step took: it waits for one that is gone, perhaps."""
        return self.training and time.monotonic() - self.at > STANDS_S + STANDS_STEPS * self.longest_s


PROGRESS = Progress(time.monotonic())


def moved(what: str | None = None, *, in_step: bool | None = None) -> None:
    """Something got on. None leaves what was said before as it is."""
    now = time.monotonic()
    if PROGRESS.in_step:
        PROGRESS.longest_s = max(PROGRESS.longest_s, now - PROGRESS.at)
    PROGRESS.at = now
    if what is not None:
        PROGRESS.what = what
    if in_step is not None:
        PROGRESS.in_step = in_step


def training(runs: bool) -> None:
    """A training loop that answers a wish to stop begins here, or has ended."""
    moved(in_step=False)
    PROGRESS.training, PROGRESS.longest_s = runs, 0.0


class Movement:
    """Whether this process has got on since this was made: something moved, or it was busy on a core or with files."""

    def __init__(self, progress: Progress = PROGRESS, clock: Callable[[], float] = time.monotonic,
                 cpu_s: Callable[[], float] = time.process_time, file_bytes: Callable[[], int] | None = None):
        self._progress, self._clock, self._cpu_s = progress, clock, cpu_s
        self._file_bytes = file_bytes or _file_bytes
        self._before = progress.at, clock(), cpu_s(), self._file_bytes()

    def seen(self) -> bool:
        at, then, cpu_then, bytes_then = self._before
        seconds = self._clock() - then
        return (self._progress.at != at or self._cpu_s() - cpu_then > BUSY_SHARE * seconds
                or self._file_bytes() - bytes_then > BUSY_BYTES * seconds)


def _file_bytes() -> int:
    """Bytes that this process has read and written so far; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        read, written = Path("/proc/self/io").read_text(encoding="ascii").splitlines()[:2]
        return int(read.split()[1]) + int(written.split()[1])
    return 0


class Watchdog:
    """Whether a process has stood still for `limit_s` seconds; None never says so. Look at it often."""

    def __init__(self, limit_s: float | None, progress: Progress = PROGRESS,
                 clock: Callable[[], float] = time.monotonic, cpu_s: Callable[[], float] = time.process_time):
        self.limit_s, self._progress, self._clock, self._cpu_s = limit_s, progress, clock, cpu_s
        self._busy_at, self._looked = clock(), (clock(), cpu_s())

    def still_for(self) -> float | None:
        """Seconds since anything moved, once they are more than the limit."""
        now = self._clock()
        looked_at, cpu_then = self._looked
        if now - looked_at >= BUSY_OVER_S:
            cpu_now = self._cpu_s()
            if not self._progress.in_step and cpu_now - cpu_then > BUSY_SHARE * (now - looked_at):
                self._busy_at = now
            self._looked = now, cpu_now
        still = now - max(self._progress.at, self._busy_at)
        return still if self.limit_s is not None and still > self.limit_s else None


class Watch:
    """The thread that watches over one process of an attempt.

    Args:
        attempt: that this process works for; None: nobody can take its place.
        who: "rank-0", "driver": in file names and messages.
        limit_s: of the watchdog, seconds; None is off.
        end: ends the process with this error; called on the thread. None: with exit code 1, at once.
        asked: called at every look; a reason to stop goes to `wish`.
        wish: takes the reason.
        on_stuck: called before the end of a process that stands still, with the error.
        beats: keep `attempts/<n>/alive.json` fresh, by which the driver knows that there is a group.
        hard: end the process also where its threads cannot run Python (the interpreter's lock is held).
    """

    def __init__(self, attempt: Attempt | None, who: str, limit_s: float | None, *,
                 end: Callable[[WatchtowerError], None] | None = None, asked: Callable[[], str | None] | None = None,
                 wish: Callable[[str], None] | None = None, on_stuck: Callable[[WatchtowerError], None] | None = None,
                 beats: bool = False, hard: bool = False, patience_s: float = PATIENCE_S):
        moved(in_step=False)
        self.attempt, self.who, self.patience_s = attempt, who, patience_s
        self._folder = None if attempt is None else attempt.folder
        self._watchdog = Watchdog(limit_s)
        self._end, self._asked, self._wish, self._on_stuck = end or self._exit, asked, wish, on_stuck
        self._beats, self._beat, self._hard = beats, 0, hard and limit_s is not None
        self._record_at, self._signs = time.monotonic(), {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchtower-watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=self.patience_s)
        if self._hard:
            faulthandler.cancel_dump_traceback_later()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one has failed; only the first cause is kept."""
        if self._folder is None:
            return
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(Exception):  # the one that is told of must not be lost over it
            note_first(self._folder / "failed.json", {
                "who": self.who, "stuck": isinstance(error, Stuck), "error": f"{type(error).__name__}: {first[:500]}",
                "at": PROGRESS.what, "traceback": text})

    def _run(self) -> None:
        stacks = None
        try:
            if self._hard:
                with contextlib.suppress(OSError):  # then to stderr
                    stacks = open(self._folder / f"stacks-{self.who}-held.txt", "w", encoding="utf-8")  # noqa: SIM115
            while not self._over.wait(LOOK_S):
                if self._hard:
                    # In C, for a process whose threads cannot run: it goes off unless it is put off here.
                    faulthandler.dump_traceback_later(self._watchdog.limit_s + 60, exit=True, file=stacks or 2)
                try:
                    self._look()
                except Exception:  # a shared folder that is away for a while, say: the watch must not end by it
                    continue
        finally:
            if self._hard:
                faulthandler.cancel_dump_traceback_later()
            if stacks is not None:
                stacks.close()
                with contextlib.suppress(OSError):
                    Path(stacks.name).unlink()

    def _look(self) -> None:
        still = self._watchdog.still_for()
        if still is not None:
            self._stand_still(Stuck(
                f"nothing has moved for {still:.0f} s (train.watchdog_s) since {PROGRESS.what}, seen by {self.who}"
                + (f"; the stacks of all threads: {self._folder}/stacks-*.txt" if self._folder else "")))
            return
        if self._asked is not None:
            with contextlib.suppress(Exception):  # it looks into Ray's own insides; the rest is looked at all the same
                if (reason := self._asked()) is not None:
                    self._wish(reason)
        if self._folder is None:
            return
        if self._beats:
            self._beat += 1
            with contextlib.suppress(Exception):  # the next one follows, and the looks below must not be lost over it
                write_note(self._folder / "alive.json", {"beat": self._beat, "training": PROGRESS.training,
                                                         "stands": PROGRESS.stands()}, flush=False)
        if self.attempt.group is None:  # tasks of the cluster work for the driver
            signs = {sign.name: sign.read_bytes() for sign in self._folder.glob("at-work-*.json")}
            if signs != self._signs:
                self._signs = signs
                moved()
        failed = read_note(self._folder / "failed.json")
        if failed is not None:
            self._end_after(failed)
            return
        if time.monotonic() - self._record_at >= RECORD_EVERY_S:
            self._record_at = time.monotonic()
            try:
                self.attempt.check()
            except Superseded as error:
                self._end(error)
                self._over.set()

    def _stand_still(self, error: Stuck) -> None:
        if self._on_stuck is not None:
            with contextlib.suppress(Exception):
                self._on_stuck(error)
        self.fail(error)
        self._leave_stacks(str(error))
        # The other ranks leave theirs before the first end of a process breaks their connections.
        if not self._over.wait(self.patience_s):
            self._end(error)
        self._over.set()

    def _end_after(self, failed: dict) -> None:
        told = WatchtowerError(f"{failed.get('who')} has failed: {failed.get('error')}")
        if failed.get("stuck"):
            self._leave_stacks(str(told))
        if failed.get("who") != self.who and not self._over.wait(self.patience_s):
            self._end(told)
        self._over.set()

    def _leave_stacks(self, why: str) -> None:
        text = redact(f"{self.who}: {why}\nlast move: {PROGRESS.what}\n{stacks_of_all_threads()}")
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
        if self._folder is not None:
            path = self._folder / f"stacks-{self.who}.txt"
            with contextlib.suppress(Exception):
                if (mirror := elsewhere.of(path)) is not None:
                    mirror.write_note(path, text.encode())
                else:
                    path.write_text(text, encoding="utf-8")

    def _exit(self, error: WatchtowerError) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(redact(f"watchtower: {self.who}: {error}"), file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(1)


@contextlib.contextmanager
def at_work(attempt: Attempt | None) -> Iterator[None]:
    """Around a task in a process of the cluster: it acts for the driver's attempt, and leaves signs of life in
    `attempts/<n>/at-work-<host>-<pid>.json` as long as it uses a CPU."""
    if attempt is None:
        yield
        return
    over, sign = threading.Event(), attempt.folder / f"at-work-{socket.gethostname()}-{os.getpid()}.json"

    def show() -> None:
        beat, before = 0, time.process_time()
        while not over.wait(BUSY_OVER_S):
            now = time.process_time()
            if now - before > BUSY_TASK_SHARE * BUSY_OVER_S:
                beat += 1
                with contextlib.suppress(Exception):  # the folder, or its node, may be away for a while
                    write_note(sign, {"beat": beat}, flush=False)
            before = now

    thread = threading.Thread(target=show, daemon=True, name="watchtower-at-work")
    thread.start()
    try:
        with acting(attempt):
            yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(Exception):
            elsewhere.take_away(sign)


def stacks_of_all_threads() -> str:
    """The stack of every thread of this process, the newest call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
                     for ident, frame in sys._current_frames().items())
