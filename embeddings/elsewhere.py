"""A run folder that lies on another node, seen through the process that has it.

Nodes of a cluster need not share a disk. A process on a node that does not see the run folder keeps a **mirror** of it
under the same path: what it reads there is brought from the folder's owner (embeddings/owner.py) when it is read, and
what it publishes is put in its place there, by the owner and under the owner's lock of attempts, before it stands here.
So one node has the whole and the say, and every other one as much of it as it has read.

    of a snapshot      the manifest each time it is read; a file once, and again where it is not what the manifest says
    of other files     when size or time differ from the owner's
    of notes           (embeddings/attempts.py) their bytes, at most FRESH_S old; none of them stays here

    .mirror/           marks a folder as a mirror: locks of this node's processes, and a folder of each of them, where
                       everything is written before it is renamed. Without it a process changes nothing at this path
                       any more: another driver has the folder now

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

from configs.errors import InputError, WatchtowerError

MANIFEST = "manifest.json"
CHUNK_BYTES = 8 << 20
FRESH_S = 1.0
"""Seconds for which a note counts as just read: watches of many workers ask for the same ones all the time."""

PASSED_ON = (".ingest.attempt-", ".replay", ".co-views.")
"""How the folders begin by which tasks of a stage pass on what is no result."""

MARK, MADE = ".mirror", "made-here"
LOCKS = 64
"""Of folders, and of files, by path: two of a node's processes that want the same do not both bring it."""

TRIES = 5
"""Of a file that changes while it is read."""

POLL_S, LOOK_S = 0.05, 1.0

Who = tuple[int, int | None] | None
"""The numbers of the attempt that something is published for: driver, and group of workers; None: for none."""


class Away(Exception):
    """The owner does not answer, or this process's mirror is not its own any more. Nothing is known of any file: it is
    none of the errors that say that one is not there, or damaged."""


class Shared(Exception):
    """The folder at this path is the owner's own: there is nothing to mirror."""


class Mirror:
    """A run folder of another node, under the same path here.

    Args:
        root: the run folder's path.
        call: calls a method of the owner, by name; raises what that raises, and Away.
        moved: called whenever something got on.

    Raises:
        InputError: there is a run folder at this path, which is another one; or none can be made.
        Shared: it is the owner's.
    """

    def __init__(self, root: Path, call: Callable[..., Any], moved: Callable[[], None] = lambda: None):
        self.root, self._call, self._moved = Path(os.path.abspath(root)), call, moved
        self._notes: dict[str, tuple[float, bytes | None]] = {}
        self._notes_lock = threading.Lock()
        try:
            self._own, self._lock = _own_folder(self.root / MARK)
        except OSError as error:
            raise InputError(f"{self.root}: this node has no such folder, and it cannot be made here to keep what is "
                             f"read of the run ({error.strerror}). Name one that can be made on all nodes (run_dir, "
                             "storage.work_dir)") from error
        if self._call("exists", self.name(self._own)):
            self.close()
            raise Shared
        # Nothing but a mirror is ever emptied for another one: what is here already must be one.
        if _record(self.root).exists() or not (self._own.parent / MADE).exists() and not _holds_nothing(self.root):
            self.close()
            raise InputError(f"{self.root}: on this node there are other files at this path: of a run whose driver was "
                             "here, or of somebody else; or a later driver has taken the run over. Name a folder that "
                             "all nodes share, or that only the driver's node has (run_dir, storage.work_dir)")
        (self._own.parent / MADE).touch()

    def close(self) -> None:
        """Take away what this process has for itself."""
        shutil.rmtree(self._own, ignore_errors=True)
        os.close(self._lock)
        if not (self._own.parent / MADE).exists():
            with contextlib.suppress(OSError):  # others may be at work, too
                self._own.parent.rmdir()

    def holds(self, path: Path | str) -> bool:
        """Whether a path lies in the run folder."""
        return Path(os.path.abspath(path)).is_relative_to(self.root)

    def name(self, path: Path | str) -> str:
        """What the owner calls it."""
        return Path(os.path.abspath(path)).relative_to(self.root).as_posix()

    # --- reading ---

    def bring(self, path: Path) -> None:
        """Make a file here what it is at the owner; one that is not there goes here, too. With another manifest than
        before goes what lies beside it: that is of the snapshot before."""
        if self.name(path).startswith("attempts/"):
            return  # notes, and what says whose folder this is
        is_manifest = path.name == MANIFEST
        if is_manifest and _facts(path) == self._facts_there(path):
            return
        with self._folder(path.parent, alone=is_manifest), self._file(path):
            self._fetch(path, lambda there: _facts(path) == there, instead_of=path.parent if is_manifest else None)

    def bring_whole(self, folder: Path, name: str, size: int) -> None:
        """Have a file of a snapshot here, whose manifest says how large it is; what is here in that size stays."""
        path = folder / name
        with self._folder(folder), self._file(path):
            found = _facts(path)
            if found is None or found[0] != size:
                self._fetch(path, lambda there: False)

    def bring_again(self, folder: Path, name: str) -> None:
        """`bring_whole` of a file that is here and not what its manifest says."""
        path = folder / name
        with self._folder(folder), self._file(path):
            path.unlink(missing_ok=True)
            self._fetch(path, lambda there: False)

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
                with self._folder(folder, alone=True):
                    if self._facts_there(folder / MANIFEST) is None:  # a moment ago, that is; it may have come since
                        self._drop(folder)
        for name, facts in there.items():
            if _facts(parent / name / MANIFEST) != facts:
                self.bring(parent / name / MANIFEST)

    def size(self, path: Path) -> int | None:
        """Bytes of a file at the owner; None where there is none."""
        there = self._facts_there(path)
        return None if there is None else there[0]

    def tidy(self) -> None:
        """Take away here what processes that are dead were writing, and what stages that are over passed on."""
        for own in (self.root / MARK).iterdir():
            if own.is_dir() and own != self._own:
                with _lock_of(own) as is_dead:
                    if is_dead:
                        shutil.rmtree(own, ignore_errors=True)
        for folder in (self.root, self.root / "channels"):
            passed = [path for path in (folder.iterdir() if folder.is_dir() else ()) if path.name.startswith(PASSED_ON)]
            there = self.names(folder) if passed else ()
            for path in passed:
                if path.name not in there:
                    self._drop(path)

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

    def _facts_there(self, path: Path) -> tuple[int, int] | None:
        found = self._call("facts", self.name(path))
        return None if found is None else tuple(found)

    def _fetch(self, path: Path, is_here: Callable[[tuple[int, int]], bool], instead_of: Path | None = None) -> None:
        """Have a file here as it is at the owner, whole. instead_of: a folder that it takes the place of, first."""
        beside = self._spare()
        try:
            for _ in range(TRIES):
                there = self._facts_there(path)
                if there is None:
                    path.unlink(missing_ok=True)
                    return
                if is_here(there):
                    return
                with contextlib.suppress(FileNotFoundError):
                    self._copy(path, beside, there[0])
                    if self._facts_there(path) == there:
                        os.utime(beside, ns=(there[1], there[1]))
                        if instead_of is not None and path.exists() and path.read_bytes() == beside.read_bytes():
                            instead_of = None  # the same after all, on a file system with coarser times
                        aside = None if instead_of is None else self._aside(instead_of)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        self._check()
                        os.replace(beside, path)
                        if aside is not None:
                            _delete(aside)
                        return
        finally:
            beside.unlink(missing_ok=True)
        raise Away(f"{path}: has changed {TRIES} times while it was brought from the driver's node")

    def _copy(self, path: Path, beside: Path, size: int) -> None:
        self._check()
        name = self.name(path)
        with open(beside, "wb") as file:
            while file.tell() < size:
                part = self._call("read", name, file.tell(), min(CHUNK_BYTES, size - file.tell()))
                if not part:
                    raise FileNotFoundError(f"{path}: is shorter than it was")
                file.write(part)
                self._moved()

    # --- this node's processes among each other ---

    def _check(self) -> None:
        """Raises Away where the mirror was taken away: nothing at this path is ours to change."""
        if not self._own.is_dir():
            raise Away(f"{self.root}: was taken away: another driver works in this folder, on this node")

    def _spare(self) -> Path:
        return self._own / uuid.uuid4().hex

    def _drop(self, path: Path) -> None:
        """Take away what this node holds of a path, at once."""
        aside = self._aside(path)
        if aside is not None:
            _delete(aside)

    def _aside(self, path: Path) -> Path | None:
        """Where what this node holds of a path lies now, and can be deleted; None where it held nothing."""
        self._check()
        aside = self._spare()
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return None
        return aside

    def _on_the_way(self) -> int:
        """Bytes that this node's processes are writing."""
        found = 0
        for path in (self.root / MARK).glob("*-*/*"):
            with contextlib.suppress(OSError):
                found += path.stat().st_size
        return found

    def _folder(self, folder: Path, alone: bool = False):
        """Nobody takes a folder away while the block runs; alone: nobody else brings anything into it, either."""
        return self._held(f"folder-{self._number(folder)}", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)

    def _file(self, path: Path):
        return self._held(f"file-{self._number(path)}", fcntl.LOCK_EX)

    def _number(self, path: Path) -> int:
        return zlib.crc32(self.name(path).encode()) % LOCKS

    @contextlib.contextmanager
    def _held(self, name: str, how: int) -> Iterator[None]:
        self._check()
        descriptor = os.open(self.root / MARK / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            looked_at, before = time.monotonic(), -1
            while _flock(descriptor, how | fcntl.LOCK_NB) is False:
                time.sleep(POLL_S)
                if time.monotonic() - looked_at > LOOK_S:
                    looked_at, was, before = time.monotonic(), before, self._on_the_way()
                    if before != was:  # the one that has it gets on
                        self._moved()
            yield
        finally:
            os.close(descriptor)

    # --- writing ---

    @contextlib.contextmanager
    def workshop(self, folder: Path) -> Iterator[Path]:
        """See `elsewhere.workshop`."""
        self._check()
        here = self._spare()
        here.mkdir()
        try:
            yield here
            self._check()
            for path in sorted(path for path in here.rglob("*") if path.is_file()):
                self.deliver(path, folder / path.relative_to(here))
        finally:
            shutil.rmtree(here, ignore_errors=True)

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
        """A line at the end of a file."""
        self._call("append", self.name(path), data)

    def make_folder(self, folder: Path) -> None:
        self._call("make_folder", self.name(folder))

    def remove(self, path: Path, who: Who = None) -> None:
        """Take a folder or a file away at the owner, and here."""
        self._call("remove", self.name(path), who)
        with self._folder(path, alone=True):
            self._drop(path)

    def publish(self, target: Path, write: Callable[[Path], None], manifest: Mapping[str, Any], replace: bool, who: Who
                ) -> None:
        """`snapshots.publish` at the owner, of files that are written here; they stay here as the copy of it."""
        self._check()
        folder = self._spare()
        folder.mkdir()
        try:
            write(folder)
            files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
            sent = {name: self._sent(path) for name, path in files.items()}
            sealed = self._call("publish", self.name(target), sent, dict(manifest), replace, who)
            if sealed is None:
                return  # the same was there already
            data, modified_ns = sealed
            (folder / MANIFEST).write_bytes(data)
            os.utime(folder / MANIFEST, ns=(modified_ns, modified_ns))
            with self._folder(target, alone=True):
                if self._facts_there(target / MANIFEST) == (len(data), modified_ns):
                    aside = self._aside(target)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._check()
                    os.rename(folder, target)
                    if aside is not None:
                        _delete(aside)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

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


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """Where to write the files that belong into a folder of the run folder: that one, or one of this block's own, whose
    files go to the owner at its end, if that is no error; nothing of them stays on this node."""
    mirror = of(folder)
    with contextlib.nullcontext(folder) if mirror is None else mirror.workshop(folder) as here:
        yield here


def make_folder(folder: Path) -> None:
    """A folder that was not there, and those above it, where the run folder lies."""
    if (mirror := of(folder)) is not None:
        mirror.make_folder(folder)
    else:
        folder.mkdir(parents=True)


def take_away(path: Path, who: Who = None) -> None:
    """A file or a folder that is no snapshot, where the run folder lies and here, if it is there."""
    if (mirror := of(path)) is not None:
        mirror.remove(path, who)
    else:
        _delete(path)


def names(folder: Path) -> list[str]:
    """What a folder of the run folder holds; nothing where there is none."""
    if (mirror := of(folder)) is not None:
        return mirror.names(folder)
    return os.listdir(folder) if folder.is_dir() else []


def size(path: Path) -> int | None:
    """Bytes of a file of the run folder; None where there is none."""
    if (mirror := of(path)) is not None:
        return mirror.size(path)
    return found[0] if (found := _facts(path)) is not None else None


def clear_mirror(root: Path) -> bool:
    """Empty a folder that was a mirror of a run folder, for one that is to have it to itself: files are missing in it.
    Whether it was one. A run folder in which the mark of a mirror lies keeps all but that.

    Raises:
        WatchtowerError: processes that work in the mirror are alive.
    """
    if not (root / MARK).is_dir():
        return False
    for own in (root / MARK).iterdir():
        if own.is_dir():
            with _lock_of(own) as is_dead:
                if not is_dead:
                    raise WatchtowerError(f"{root}: process {own.name.partition('-')[0]} of this node works for a "
                                          "driver on another node in it; end that run first")
    is_mirror = (root / MARK / MADE).exists() and not _record(root).exists()
    for path in root.iterdir() if is_mirror else ():
        if path.name not in (MARK, "run.lock"):
            _delete(path)
    shutil.rmtree(root / MARK, ignore_errors=True)  # last: who is ended on the way begins again
    return is_mirror


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _holds_nothing(root: Path) -> bool:
    """Whether there is nothing but what Ray, and a driver that is about to begin, put there."""
    return set(os.listdir(root)) <= {MARK, "ray", "run.lock"}


def _record(root: Path) -> Path:
    return root / "attempts" / "record.json"


def _own_folder(mark: Path) -> tuple[Path, int]:
    """A folder of this process, and its lock, which is held as long as the process lives."""
    while True:
        own = mark / f"{os.getpid()}-{uuid.uuid4().hex}"
        own.mkdir(parents=True)
        try:
            lock = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # before it was locked, somebody has taken it for that of a dead process
            continue
        _flock(lock, fcntl.LOCK_EX)
        if own.is_dir():
            return own, lock
        os.close(lock)


@contextlib.contextmanager
def _lock_of(own: Path) -> Iterator[bool]:
    """Whether the process that a folder belongs to is dead; its lock is ours meanwhile."""
    try:
        descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        had = _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield had or (had is None and not Path(f"/proc/{own.name.partition('-')[0]}").exists())
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int) -> bool | None:
    """Whether the lock was had; None where a file system has no locks."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _facts(path: Path) -> tuple[int, int] | None:
    """Size and time (ns) of a file; None where there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size, found.st_mtime_ns
