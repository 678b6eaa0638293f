"""A run folder that lies on another node, seen through the process that has it.

Nodes of a cluster need not share a disk. A process on a node that does not see the run folder keeps a **mirror** of it
under the same path: what it reads there is brought from the folder's owner (embeddings/owner.py) when it is read, and
what it publishes is put in its place there, by the owner and under the owner's lock of attempts, before it stands here.
So one node has the whole and the say, and every other one as much of it as it has read.

    of a snapshot      the manifest each time it is read; a file once, and again where it is not what the manifest says
    of other files     when size or time differ from the owner's
    of notes           (embeddings/attempts.py) their bytes, at most every FRESH_S

Without a mirror, which is the rule, every function here does nothing: the path is what it seems.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError

MANIFEST = "manifest.json"
CHUNK_BYTES = 8 << 20
FRESH_S = 1.0
"""Seconds for which a note counts as just read: watches of many workers ask for the same ones all the time."""

PASSED_ON = (".ingest.attempt-", ".replay", ".co-views.")
"""How the folders begin by which tasks of a stage pass on what is no result."""

MARK = ".mirror"
"""Of a folder that is a mirror; it has its locks."""

LOCKS = 64
"""Of a node, by path: two of its processes that want the same file do not both bring it."""

Who = tuple[int, int | None] | None
"""The numbers of the attempt that something is published for: driver, and group of workers; None: for none."""


class Mirror:
    """A run folder of another node, under the same path here.

    Args:
        root: the run folder's path.
        call: calls a method of the owner, by name; raises what that raises.
        moved: called after each part of a file that came or went.

    Raises:
        InputError: there is a run folder at this path, which is another one.
    """

    def __init__(self, root: Path, call: Callable[..., Any], moved: Callable[[], None] = lambda: None):
        self.root, self._call, self._moved = Path(root).absolute(), call, moved
        self._notes: dict[str, tuple[float, bytes | None]] = {}
        self._notes_lock = threading.Lock()
        if (self.root / "attempts" / "record.json").exists():
            raise InputError(f"{self.root}: this node has a run folder of its own at this path, which is not the one "
                             "that its driver works in. Name a folder that all nodes share or that only the driver's "
                             "node has (run_dir, storage.work_dir), or move this one away")
        try:
            (self.root / MARK).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.root}: this node has no such folder, and it cannot be made here to keep what is "
                             f"read of the run ({error.strerror}). Name one that can be made on all nodes (run_dir, "
                             "storage.work_dir)") from error

    def holds(self, path: Path | str) -> bool:
        """Whether a path lies in the run folder."""
        return Path(os.path.abspath(path)).is_relative_to(self.root)

    def name(self, path: Path | str) -> str:
        """What the owner calls it."""
        return Path(os.path.abspath(path)).relative_to(self.root).as_posix()

    # --- reading ---

    def bring(self, path: Path) -> None:
        """Make a file here what it is at the owner; one that is not there goes here, too."""
        if self.name(path).startswith("attempts/"):
            return  # notes, and what says whose folder this is: none of them stays here
        facts = self._call("facts", self.name(path))
        if facts is None:
            path.unlink(missing_ok=True)
            return
        with self._alone(path):
            if _facts(path) == tuple(facts):
                return
            if path.name == MANIFEST:  # what lies beside it is of the snapshot before
                drop(path.parent)
            self._fetch(path, *facts)

    def bring_whole(self, path: Path, size: int) -> None:
        """Have a file of a snapshot here, whose manifest says how large it is; what is here in that size stays."""
        with self._alone(path):
            found = _facts(path)
            if found is None or found[0] != size:
                facts = self._call("facts", self.name(path))
                if facts is not None:
                    self._fetch(path, *facts)

    def bring_folder(self, folder: Path) -> None:
        """All files of a folder that is no snapshot."""
        for name in self._call("files", self.name(folder)):
            self.bring(folder / name)

    def names(self, folder: Path) -> list[str]:
        """What the owner's folder holds; nothing where there is none."""
        return self._call("names", self.name(folder))

    def bring_manifests(self, parent: Path) -> None:
        """Have the folders with a manifest that lie in `parent` at the owner, and no others, as far as their manifests.
        """
        there = {name: tuple(facts) for name, facts in self._call("manifests", self.name(parent)).items()}
        for folder in parent.iterdir() if parent.is_dir() else ():
            if folder.is_dir() and not folder.name.startswith(".") and folder.name not in there:
                drop(folder)
        for name, facts in there.items():
            path = parent / name / MANIFEST
            if _facts(path) != facts:
                self.bring(path)

    def size(self, path: Path) -> int | None:
        """Bytes of a file at the owner; None where there is none."""
        facts = self._call("facts", self.name(path))
        return None if facts is None else facts[0]

    def tidy(self) -> None:
        """Take away here what stages that are over have left of what they passed between their tasks."""
        for folder in (self.root, self.root / "channels"):
            passed = [path for path in (folder.iterdir() if folder.is_dir() else ()) if path.name.startswith(PASSED_ON)]
            there = self.names(folder) if passed else ()
            for path in passed:
                if path.name not in there:
                    drop(path)

    def note(self, path: Path) -> bytes | None:
        """A small file's bytes, at most FRESH_S old; None where there is none."""
        name = self.name(path)
        with self._notes_lock:
            at, data = self._notes.get(name, (-FRESH_S, None))
            if time.monotonic() - at < FRESH_S:
                return data
        data = self._call("note", name)
        with self._notes_lock:
            self._notes[name] = time.monotonic(), data
        return data

    def _fetch(self, path: Path, size: int, modified_ns: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        name, beside = self.name(path), path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(beside, "wb") as file:
                while file.tell() < size and (part := self._call("read", name, file.tell(),
                                                                 min(CHUNK_BYTES, size - file.tell()))):
                    file.write(part)
                    self._moved()
            os.utime(beside, ns=(modified_ns, modified_ns))
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        lock = self.root / MARK / str(zlib.crc32(self.name(path).encode()) % LOCKS)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # --- writing ---

    def deliver(self, path: Path, place: Path, who: Who = None) -> None:
        """Put a file in a place at the owner, whole; with `who`, under the lock of attempts.

        Raises:
            Superseded: that attempt was cut off.
        """
        self._call("place", self.name(place), *self._sent(path), who)

    def put(self, path: Path, data: bytes, who: Who = None) -> None:
        """`deliver` of bytes that are no file here."""
        self._call("put", self.name(path), data, who)

    def write_note(self, path: Path, data: bytes, only_first: bool = False) -> bool:
        """A small file; its folder must be there. only_first: unless there is one; whether this was the first."""
        return self._call("write_note", self.name(path), data, only_first)

    def append(self, path: Path, data: bytes) -> None:
        self._call("append", self.name(path), data)

    def make_folder(self, folder: Path) -> None:
        self._call("make_folder", self.name(folder))

    def remove(self, path: Path, who: Who = None) -> None:
        """Take a folder or a file away at the owner, and here."""
        self._call("remove", self.name(path), who)
        drop(path)

    def publish(self, folder: Path, target: Path, manifest: Mapping[str, Any], replace: bool, who: Who) -> None:
        """`snapshots.publish` at the owner, of the files of a folder that is here; it stays here as the copy of it."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        sent = {name: self._sent(path) for name, path in files.items()}
        sealed = self._call("publish", self.name(target), sent, dict(manifest), replace, who)
        if sealed is None:
            return  # somebody else was faster
        data, modified_ns = sealed
        (folder / MANIFEST).write_bytes(data)
        os.utime(folder / MANIFEST, ns=(modified_ns, modified_ns))
        drop(target)
        with contextlib.suppress(OSError):  # another process of this node was faster
            os.rename(folder, target)

    def gather(self, writing: Path, target: Path, manifest: Mapping[str, Any], but: str, who: Who) -> None:
        """`snapshots.publish_from` at the owner, of a folder that is there."""
        self._call("gather", self.name(writing), self.name(target), dict(manifest), but, who)

    def begin_group(self, driver: int, work: str) -> int:
        return self._call("begin_group", driver, work)

    def _sent(self, path: Path) -> tuple[str, int]:
        """The name under which the owner keeps a file until it is placed, and its size."""
        upload, size = uuid.uuid4().hex, 0
        with open(path, "rb") as file:
            while (part := file.read(CHUNK_BYTES)) or not size:
                self._call("take", upload, size, part)
                self._moved()
                size += len(part)
                if not part:
                    break
        return upload, size


_mirror: Mirror | None = None


def see_through(mirror: Mirror | None) -> Mirror | None:
    """From now on this process sees a run folder through `mirror`; returns the one before."""
    global _mirror
    before, _mirror = _mirror, mirror
    return before


def of(path: Path | str) -> Mirror | None:
    """The mirror that a path of this process is seen through; None where the path is what it seems."""
    return _mirror if _mirror is not None and _mirror.holds(path) else None


def bring(path: Path | str) -> None:
    """Have a file of the run folder here as it is now."""
    if (mirror := of(path)) is not None:
        mirror.bring(Path(path))


def bring_folder(folder: Path | str) -> None:
    """Have all files of a folder that is no snapshot here as they are now."""
    if (mirror := of(folder)) is not None:
        mirror.bring_folder(Path(folder))


def hand_over(path: Path) -> None:
    """Give a file that was written for the run folder's owner to it; nothing of it stays on this node."""
    if (mirror := of(path)) is not None:
        mirror.deliver(path, path)
        path.unlink()


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """Where to write the files that belong into a folder of the run folder: that one, or one of this block's own, whose
    files are handed over at its end, if that is no error."""
    mirror = of(folder)
    if mirror is None:
        yield folder
        return
    here = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    here.mkdir(parents=True)
    try:
        yield here
        for path in sorted(path for path in here.rglob("*") if path.is_file()):
            mirror.deliver(path, folder / path.relative_to(here))
    finally:
        shutil.rmtree(here, ignore_errors=True)


def make_room(folder: Path) -> None:
    """A folder of the run folder, which its owner has, is made here too: for what is written beside its place."""
    if of(folder) is not None:
        folder.mkdir(parents=True, exist_ok=True)


def names(folder: Path) -> list[str]:
    """What a folder of the run folder holds; nothing where there is none."""
    if (mirror := of(folder)) is not None:
        return mirror.names(folder)
    return os.listdir(folder) if folder.is_dir() else []


def clear_mirror(root: Path) -> None:
    """Empty a folder that was a mirror of a run folder, for one that is to have it to itself: files are missing in it.
    """
    if (root / MARK).is_dir():
        for path in root.iterdir():
            if path.name not in (MARK, "run.lock"):
                drop(path)
        drop(root / MARK)


def size(path: Path) -> int | None:
    """Bytes of a file of the run folder; None where there is none."""
    if (mirror := of(path)) is not None:
        return mirror.size(path)
    return found[0] if (found := _facts(path)) is not None else None


def drop(path: Path) -> None:
    """Take away what this node holds of a path, at once."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(OSError):
        os.rename(path, aside)
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def _facts(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


