"""Attempts: who may publish into a run folder, where a process that was cut off may live on.

Every driver of a run, and every group of training workers that it starts, is an attempt with a number of its own, which
rises over the life of the folder:

    attempts/record.json     {"last": 9, "driver": 7, "group": 9, "work": "crm", "host": .., "pid": .., "since": ..}
    attempts/lock            held for an instant: alone by who begins an attempt, together by those who publish
    attempts/9/              what attempt 9 was asked (stop.json) and what it left (failed.json, stacks-rank-0.txt)

A driver owns the folder until another one begins; a group, until its driver ends it, another group begins, or another
driver does. Whoever publishes looks right before the rename, under the lock, so that a successor cannot begin between
the look and the rename. One that was cut off gets `Superseded` there and publishes nothing.

A process acts for one attempt at a time (`acting`, `act_for`), all its threads with it; without one nothing is checked.
Only who answers for a run folder of this node to others (embeddings/owner.py) acts for one in each thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import WatchtowerError
from configs.secrets import redacted
from embeddings import elsewhere
from embeddings.untrusted import parse_json, read_json

FOLDER = "attempts"
LOCK_WITHIN_S = 60.0
PASSING = ("alive.json", "stop.json")
"""Notes that say nothing once their attempt is over."""


class Superseded(WatchtowerError):
    """A later attempt owns the run folder; this one must publish nothing more and end."""


@dataclass(frozen=True)
class Attempt:
    """An attempt at a run. driver: the driver's number. group: that of a group of training workers; None: the driver
    itself, and the tasks that it spreads out. place: what the record of the folder that is meant says of itself: a
    process that finds another one at this path, or none, is on a node that does not share it."""

    run_dir: Path
    driver: int
    group: int | None = None
    place: str | None = None

    @property
    def number(self) -> int:
        return self.driver if self.group is None else self.group

    @property
    def folder(self) -> Path:
        """Where this attempt leaves what is not a result."""
        return self.run_dir / FOLDER / str(self.number)

    @property
    def of_driver(self) -> Attempt:
        return replace(self, group=None)

    def check(self) -> None:
        """Whether this attempt still owns the run folder.

        Raises:
            Superseded: a later one does.
            WatchtowerError: nobody can say; the folder's file system may be away for a while.
        """
        record = read_record(self.run_dir)
        if "driver" not in record:
            raise _no_record(self.run_dir)
        if record.get("driver") != self.driver:
            raise Superseded(f"{self.run_dir}: attempt {self.number} was cut off: driver {record.get('driver')} on "
                             f"{record.get('host')} has taken the run over; nothing was published here")
        if self.group is not None and record.get("group") != self.group:
            successor = record.get("group")
            what = f"group {successor} has taken its place" if successor else "its driver has ended the group"
            raise Superseded(f"{self.run_dir}: attempt {self.number} was cut off: {what}; nothing was published here")

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Around a rename: this attempt owns the folder, and no other one can begin until the block ends.

        Raises:
            Superseded: it does not.
            WatchtowerError: nobody can say.
        """
        if elsewhere.of(self.run_dir) is not None:  # the folder's owner takes the lock, and looks again
            self.check()
            yield
            return
        with _locked(self.run_dir, fcntl.LOCK_SH):
            self.check()
            yield


_acting_for: Attempt | None = None
_this_thread = threading.local()


def act_for(attempt: Attempt | None) -> Attempt | None:
    """From now on this process acts for `attempt`; returns the one before."""
    global _acting_for
    before, _acting_for = _acting_for, attempt
    return before


def acts_for() -> Attempt | None:
    """The attempt that this process acts for, or this thread."""
    return getattr(_this_thread, "attempt", _acting_for)


def who() -> elsewhere.Who:
    """The numbers of that attempt; None without one."""
    attempt = acts_for()
    return None if attempt is None else (attempt.driver, attempt.group)


@contextlib.contextmanager
def this_thread_acts_for(attempt: Attempt | None) -> Iterator[None]:
    """While the block runs, this thread acts for `attempt`, whatever its process does: for who answers several."""
    _this_thread.attempt = attempt
    try:
        yield
    finally:
        del _this_thread.attempt


@contextlib.contextmanager
def acting(attempt: Attempt | None) -> Iterator[Attempt | None]:
    before = act_for(attempt)
    try:
        yield attempt
    finally:
        act_for(before)


@contextlib.contextmanager
def publishing() -> Iterator[None]:
    """`Attempt.publishing` of the attempt that this process acts for; nothing where it acts for none."""
    attempt = acts_for()
    if attempt is None:
        yield
        return
    with attempt.publishing():
        yield


# ----------------------------------------------------------------------------------------------------- the record

def read_record(run_dir: Path) -> dict[str, Any]:
    """The record of attempts; empty where there is none yet.

    Raises:
        WatchtowerError: it is there and cannot be read: nobody can say who owns the folder.
    """
    path = Path(run_dir) / FOLDER / "record.json"
    try:
        return _read_note(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WatchtowerError(f"{path}: cannot be read ({error}); nothing is published without it") from error


def _no_record(run_dir: Path) -> WatchtowerError:
    return WatchtowerError(f"{run_dir / FOLDER / 'record.json'}: the record of attempts is not there; nothing is "
                           "published without it")


def begin_driver(run_dir: Path) -> Attempt:
    """A new driver takes the run folder over from every attempt before it."""
    run_dir = Path(run_dir).absolute()
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    with _locked(run_dir, fcntl.LOCK_EX):
        try:
            record = read_record(run_dir)
        except WatchtowerError:  # half a disk's worth of power cuts: the folders say which numbers were given
            record = {}
        number, place = max([record.get("last") or 0, *_numbers(run_dir)]) + 1, uuid.uuid4().hex
        _write_record(run_dir, {"last": number, "driver": number, "group": None, "work": None, "place": place})
        attempt = Attempt(run_dir, number, place=place)
        attempt.folder.mkdir(parents=True, exist_ok=True)
    for before in _numbers(run_dir):
        if before < number:
            _remove_unless_telling(run_dir / FOLDER / str(before))
    return attempt


def _remove_unless_telling(folder: Path) -> None:
    """Removes the folder of an attempt that is over, unless it left what tells how it ended."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            is_passing = path.name in PASSING or path.name.startswith(("at-work-", "."))
            if is_passing or (path.name.endswith("-held.txt") and not path.stat().st_size):
                path.unlink(missing_ok=True)
        folder.rmdir()


def begin_group(driver: Attempt, work: str) -> Attempt:
    """A new group of workers takes the place of the driver's groups before it.

    Raises:
        Superseded: the driver was cut off.
    """
    if (mirror := elsewhere.of(driver.run_dir)) is not None:
        return replace(driver, group=mirror.begin_group(driver.driver, work))
    with _locked(driver.run_dir, fcntl.LOCK_EX):
        driver.of_driver.check()
        record = read_record(driver.run_dir)
        number = record["last"] + 1
        _write_record(driver.run_dir, {**record, "last": number, "group": number, "work": work})
        attempt = replace(driver, group=number)
        attempt.folder.mkdir(parents=True, exist_ok=True)
    return attempt


def cut_off(run_dir: Path, by: str) -> None:
    """Nobody who acts for an attempt at this folder may publish any more: somebody else has taken the run over in
    another place.

    Args:
        by: who, in words; stands in the record as its host.
    """
    (Path(run_dir) / FOLDER).mkdir(exist_ok=True)
    with _locked(run_dir, fcntl.LOCK_EX):
        record = read_record(run_dir)
        number = max([record.get("last") or 0, *_numbers(run_dir)]) + 1
        _write_record(run_dir, {**record, "last": number, "driver": number, "group": None, "work": None}, host=by)


def end_groups(driver: Attempt) -> None:
    """No group of this driver may publish any more. A driver that was cut off changes nothing."""
    with contextlib.suppress(Superseded), _locked(driver.run_dir, fcntl.LOCK_EX):
        driver.of_driver.check()
        record = read_record(driver.run_dir)
        if record.get("group") is not None:
            _write_record(driver.run_dir, {**record, "group": None, "work": None})


def _numbers(run_dir: Path) -> list[int]:
    return [int(path.name) for path in (run_dir / FOLDER).iterdir() if path.name.isdecimal()]


def _write_record(run_dir: Path, record: dict[str, Any], host: str | None = None) -> None:
    path = run_dir / FOLDER / "record.json"
    record = record | {"host": host or socket.gethostname(), "pid": os.getpid(),
                       "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_note(path, record)


def write_note(path: Path, note: dict[str, Any], *, flush: bool = True) -> None:
    """A small JSON file, whole at once. flush: it must outlast a power cut.

    Its folder must be there: where the run folder's file system is away, nothing shall be made in its place.
    """
    text = json.dumps(redacted(note)) + "\n"
    if (mirror := elsewhere.of(path)) is not None:
        mirror.write_note(path, text.encode())
        return
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_note(path: Path) -> dict[str, Any] | None:
    """What `write_note` wrote; None where there is nothing that can be read."""
    try:
        return _read_note(path)
    except (OSError, ValueError):
        return None


def _read_note(path: Path) -> dict[str, Any]:
    if (mirror := elsewhere.of(path)) is None:
        return read_json(path)
    data = mirror.note(path)
    if data is None:
        raise FileNotFoundError(path)
    return parse_json(data)


def note_first(path: Path, note: dict[str, Any]) -> bool:
    """`write_note`, unless there is one; whether this was the first."""
    if (mirror := elsewhere.of(path)) is not None:
        return mirror.write_note(path, (json.dumps(redacted(note)) + "\n").encode(), only_first=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    write_note(beside, note)
    try:
        return link_first(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def link_first(beside: Path, path: Path) -> bool:
    """Put a file in its place unless one is there; whether none was."""
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.replace(beside, path)
    return True


def sees(attempt: Attempt) -> bool:
    """Whether the folder at this path, on this node, is the one that the attempt is of."""
    try:
        return read_json(attempt.run_dir / FOLDER / "record.json").get("place") == attempt.place
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _locked(run_dir: Path, how: int) -> Iterator[None]:
    """The lock of the attempts. Where a file system has no locks, the record alone decides.

    Raises:
        WatchtowerError: somebody holds it for longer than any rename takes, or the folder of attempts is not there.
    """
    path = run_dir / FOLDER / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError as error:
        raise _no_record(run_dir) from error
    try:
        deadline = time.monotonic() + LOCK_WITHIN_S
        while True:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WatchtowerError(
                        f"{path}: another process has held it for {LOCK_WITHIN_S:.0f} s, where a rename takes an "
                        "instant; it stands still, or its disk does. End it and run again") from None
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
