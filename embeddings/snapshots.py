"""Published folders: they appear at once and whole, and can be checked afterwards.

A snapshot is a folder of files and a `manifest.json` with the size and SHA-256 of each. It is written into a hidden
folder beside its place, flushed to disk and renamed, so a reader sees all of it or nothing. Folders of one kind lie
beside each other under the names `<watermark_ms>` or `<watermark_ms>-<step>`:

    channels/swing/1650067200000/          neighbors.parquet  manifest.json
    channels/swing/.1650153600000.attempt-3f9c..e1.tmp/       being written, or left by a writer that died

The watermark is the end of what a snapshot has seen: every event before it, none at or after it (Unix ms).
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError, WatchtowerError
from configs.secrets import redacted
from embeddings import attempts, elsewhere
from embeddings.elsewhere import MANIFEST
from embeddings.untrusted import read_json

SEALED_AT_ONCE = 4  # files of a snapshot that are flushed to disk, or read for their checksums

_SNAPSHOT_NAME = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_ATTEMPT_FOLDER = re.compile(r"\..+\.attempt-[0-9a-f]{32}\.tmp", re.ASCII)
# Where a file system has no locks, only a folder that nobody touched for this long counts as dead.
_UNLOCKABLE_DEAD_AFTER_S = 24 * 3600.0
_seen: dict[tuple[str, int, int, int], str] = {}  # what verify_file has read, and its checksum
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Snapshot:
    """A published snapshot.

    Attributes:
        watermark_ms: every event before it was seen, none at or after it; Unix ms.
        step: training step it was taken at; None where the name has none.
        path: its folder.
    """

    watermark_ms: int
    step: int | None
    path: Path

    @property
    def age_order(self) -> tuple[int, bool, int]:
        """Sorts by watermark, then step; without a step first."""
        return self.watermark_ms, self.step is not None, self.step or 0


def publish(target: Path, write: Callable[[Path], None], manifest: Mapping[str, Any], *, replace: bool = False) -> Path:
    """Let `write` fill a folder and make it appear as `target`, all at once.

    A target that is there already, whole and with the same manifest (its `files` aside), is kept and `write` is not
    called. With `replace` it is written anew and swapped; a reader then has the old or the new one, and one that
    opens files by path while they are swapped notices in `verify`. What dead writers left beside the target is
    removed; what living ones are writing, in any process, is not.

    Args:
        target: the folder to appear; its parents are made.
        write: fills the empty folder it is given; plain files, in folders or not, no links.
        manifest: JSON values (no NaN), without the key `files`, which is added: {name: {sha256, bytes}}.
        replace: swap a target that is there.

    Returns:
        The target.

    Raises:
        InputError: a manifest that is not JSON or holds `files`; the disk is full.
        WatchtowerError: the target is there with another manifest, or damaged, and `replace` is not set.
        Superseded: this process acts for an attempt that was cut off (embeddings/attempts.py).
        Exception: whatever `write` raises. In every case nothing half-written is left.
    """
    target = Path(target)
    manifest = _as_json(target, manifest)
    if elsewhere.of(target) is not None:
        return _publish_elsewhere(target, write, manifest, replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_dead_attempts(target.parent)
    if target.exists() and not replace and _is_same(target, manifest):
        return target
    attempt, lock = open_attempt(target)
    try:
        write(attempt)
        _seal(attempt, manifest)
        with attempts.publishing():
            _put_in_place(attempt, target, manifest, replace)
        _flush(target.parent)
    except Exception as error:
        if says_disk_full(error):
            raise InputError(f"{target}: the disk is full; nothing was published, make room and run again") from (
                error
            )
        raise
    finally:
        # After a rename there is nothing left of the attempt, after a swap it is the old target.
        shutil.rmtree(attempt, ignore_errors=True)
        os.close(lock)
    return target


def _publish_elsewhere(target: Path, write: Callable[[Path], None], manifest: dict[str, Any], replace: bool) -> Path:
    """`publish` where the run folder lies on another node: by its owner. What was written stays here as its copy."""
    try:
        elsewhere.of(target).publish(target, write, manifest, replace, attempts.who())
    except OSError as error:
        if says_disk_full(error):
            raise InputError(f"{target}: the disk of {socket.gethostname()}, or of the driver's node, is full; nothing "
                             "was published, make room and run again") from error
        raise
    return target


def publish_from(writing: Path, target: Path, manifest: Mapping[str, Any], *, but: str = "\0") -> Path:
    """`publish`, with `replace`, of the files that several processes have left in one folder, which goes.

    Args:
        but: files whose names end so are no part of it.
    """
    if (mirror := elsewhere.of(target)) is not None:
        mirror.gather(writing, target, _as_json(target, manifest), but, attempts.who())
        return target

    def move(attempt: Path) -> None:
        for path in sorted(writing.iterdir()):
            if not path.name.endswith(but):
                path.rename(attempt / path.name)

    try:
        return publish(target, move, manifest, replace=True)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def bring(folder: Path) -> None:
    """Have all files of a snapshot on this node, for who reads them without looking at their checksums: another
    worker has."""
    if (mirror := elsewhere.of(folder)) is not None:
        for name, entry in read_manifest(folder)["files"].items():
            mirror.bring_whole(folder, name, entry["bytes"])


def manifests_in(parent: Path) -> None:
    """Have the manifests of the snapshots in a folder on this node, and none of others."""
    if (mirror := elsewhere.of(parent)) is not None:
        mirror.bring_manifests(parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a snapshot, its shape and file names checked, the files themselves not.

    Raises:
        WatchtowerError: it is missing or not readable.
        InputError: a file name in it leads out of the folder.
    """
    path = Path(folder) / MANIFEST
    elsewhere.bring(path)  # what fails in it, the disk of this node say, is no damage
    try:
        manifest = read_json(path)
    except FileNotFoundError as error:
        raise WatchtowerError(f"{path}: missing, so this is not a published snapshot") from error
    except (OSError, ValueError) as error:
        raise WatchtowerError(f"{path}: damaged ({error})") from error
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise WatchtowerError(f"{path}: damaged (no list of files)")
    for name, entry in files.items():
        _check_name(path, name)
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or type(entry.get("bytes")) is not int
            or entry["bytes"] < 0
        ):
            raise WatchtowerError(f"{path}: damaged (no sha256 and bytes for {name!r})")
    return manifest


def verify(folder: Path, *needed: str) -> dict[str, Any]:
    """Read every file of a snapshot against its manifest and return the manifest. Files it does not name are ignored.

    Args:
        needed: the files that the caller is going to read: a manifest that does not name them vouches for nothing.

    Raises:
        WatchtowerError: naming the first file that is missing, of another size or of another content.
        InputError: a file name in the manifest, or a link, leads out of the folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    inside = folder.resolve()
    for name in needed:
        if name not in manifest["files"]:
            raise WatchtowerError(f"{folder}: damaged snapshot, its manifest does not name {name}")
    for name in manifest["files"]:
        _verify_file(folder, manifest, name, inside)
    return manifest


def verify_file(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """Read one file of a snapshot against its manifest, once a process as long as it stays as it is.

    For snapshots whose files are read one at a time, each of them large.

    Returns:
        Its path.

    Raises:
        As `verify`, of this file alone.
    """
    folder = Path(folder)
    if name not in manifest["files"]:
        raise WatchtowerError(f"{folder}: damaged snapshot, its manifest does not name {name}")
    path = folder / name
    with contextlib.suppress(OSError):
        found = path.stat()
        if _seen.get((str(path), found.st_ino, found.st_size, found.st_mtime_ns)) == manifest["files"][name]["sha256"]:
            return path
    _verify_file(folder, manifest, name, folder.resolve())
    found = path.stat()
    _seen[str(path), found.st_ino, found.st_size, found.st_mtime_ns] = manifest["files"][name]["sha256"]
    return path


def _verify_file(folder: Path, manifest: Mapping[str, Any], name: str, inside: Path) -> None:
    if (mirror := elsewhere.of(folder)) is not None:
        mirror.bring_whole(folder, name, manifest["files"][name]["bytes"])
        try:
            return _check_file(folder, manifest, name, inside)
        except WatchtowerError:  # what is here may be of another snapshot that was in this place
            mirror.bring_again(folder, name)
    _check_file(folder, manifest, name, inside)


def _check_file(folder: Path, manifest: Mapping[str, Any], name: str, inside: Path) -> None:
    path, entry = folder / name, manifest["files"][name]
    try:
        if not path.resolve().is_relative_to(inside):
            raise InputError(f"{path}: a link that leads out of the snapshot")
        if not path.is_file():
            raise WatchtowerError(f"{path}: damaged snapshot, the file is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise WatchtowerError(f"{path}: damaged snapshot, {size} bytes instead of {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise WatchtowerError(f"{path}: damaged snapshot, the content does not match its checksum")
    except (OSError, RuntimeError, ValueError) as error:
        raise WatchtowerError(f"{folder}: damaged snapshot, {name!r} cannot be read ({error})") from error


def list_snapshots(parent: Path) -> list[Snapshot]:
    """The published snapshots of a folder, oldest first; other folders, and ones without a manifest, are left out."""
    parent = Path(parent)
    manifests_in(parent)
    if not parent.is_dir():
        return []
    found = []
    for path in parent.iterdir():
        match = _SNAPSHOT_NAME.fullmatch(path.name)
        # A link would let a folder show what lies elsewhere. No time has 20 digits: int64 ends before.
        if match and len(path.name) < 40 and not path.is_symlink() and (path / MANIFEST).is_file():
            found.append(Snapshot(int(match[1]), None if match[2] is None else int(match[2]), path))
    return sorted(found, key=lambda snapshot: snapshot.age_order)


def newest(parent: Path) -> Path | None:
    """The snapshot with the latest watermark, the latest step among equals; None where there is none."""
    found = list_snapshots(parent)
    return found[-1].path if found else None


def as_of(parent: Path, time_ms: int, rollback_ms: int) -> Path | None:
    """The newest snapshot with watermark <= time - rollback; None where there is none.

    Args:
        parent: folder of snapshots.
        time_ms: time of the request, Unix ms.
        rollback_ms: how much later than its watermark a snapshot is in use, ms; negative would look ahead.

    Raises:
        InputError: a negative rollback.
    """
    if rollback_ms < 0:
        raise InputError(f"rollback of {rollback_ms} ms is negative: a request would see its own future")
    seen = [snapshot for snapshot in list_snapshots(parent) if snapshot.watermark_ms <= time_ms - rollback_ms]
    return seen[-1].path if seen else None


def remove(folder: Path) -> None:
    """Take a published folder away at once: a reader finds it whole or not at all, and so does the next process if
    this one dies on the way.

    Raises:
        Superseded: this process acts for an attempt that was cut off: the folder may be its successor's.
    """
    if (mirror := elsewhere.of(folder)) is not None:
        mirror.remove(folder, attempts.who())
        return
    aside = folder.parent / f".{folder.name}.attempt-{uuid.uuid4().hex}.tmp"
    try:
        with attempts.publishing():
            os.rename(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def clean_dead_attempts(parent: Path) -> list[Path]:
    """Remove what writers that died left half-written in `parent`; returns what was removed.

    A writer holds a lock on its folder, which the system lets go when the process ends, however it ends. Who removes
    holds it too, until the folder is gone: a writer that has made its folder and not locked it yet waits for that, and
    makes another one.
    """
    removed = []
    for path in sorted(Path(parent).iterdir()):
        if _ATTEMPT_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with _lock_of_the_dead(path) as is_dead:
                if is_dead:
                    shutil.rmtree(path, ignore_errors=True)
                    removed.append(path)
    return removed


def open_attempt(target: Path) -> tuple[Path, int]:
    """A fresh folder beside the target, and the open lock on it."""
    while True:
        attempt = target.parent / f".{target.name}.attempt-{uuid.uuid4().hex}.tmp"
        try:
            attempt.mkdir()
        except OSError as error:
            if says_disk_full(error):
                raise InputError(f"{target}: the disk is full; nothing was published") from error
            raise
        try:
            lock = os.open(attempt, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks on this file system; others then go by age
        # Between mkdir and flock somebody who cleans may have taken the folder for dead; it is gone by now.
        if _is_still(attempt, lock):
            return attempt, lock
        os.close(lock)


@contextlib.contextmanager
def _lock_of_the_dead(attempt: Path) -> Iterator[bool]:
    """Whether the folder's writer is dead; if it is, its lock is ours while the block runs."""
    try:
        lock = os.open(attempt, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # While we came to the lock, its writer may have renamed the folder into its place.
            is_dead = _is_still(attempt, lock)
        except BlockingIOError:
            is_dead = False
        except OSError:
            is_dead = time.time() - os.fstat(lock).st_mtime > _UNLOCKABLE_DEAD_AFTER_S
        yield is_dead
    finally:
        os.close(lock)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open folder is the one that stands at this path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with every file's size and checksum, and flush all of it to disk."""
    folders, sealed = [folder], {}
    with ThreadPoolExecutor(SEALED_AT_ONCE) as pool:  # the disk writes one file while others are read
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise WatchtowerError(f"{path}: a snapshot holds plain files only")
            if path.is_dir():
                folders.append(path)
                continue
            if name == MANIFEST:
                raise WatchtowerError(f"{path}: the manifest is written by publish, not by the writer")
            sealed[name] = pool.submit(_flush, path), pool.submit(_sha256, path), path
        files = {}
        for name, (flushed, digest, path) in sealed.items():
            flushed.result()
            files[name] = {"sha256": digest.result(), "bytes": path.stat().st_size}
    path = folder / MANIFEST
    path.write_text(json.dumps({**manifest, "files": files}, indent=1, allow_nan=False) + "\n")
    _flush(path)
    for inner in reversed(folders):
        _flush(inner)


def _put_in_place(attempt: Path, target: Path, manifest: dict[str, Any], replace: bool) -> None:
    if target.exists() and replace:
        _swap(attempt, target)
        return
    try:
        # os.rename puts a folder in the place of an empty one, and refuses a full one.
        os.rename(attempt, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if replace:
            _swap(attempt, target)
        else:
            _is_same(target, manifest)  # another writer was faster; raises unless it published the same


def _swap(attempt: Path, target: Path) -> None:
    """Exchange two folders in one step where the system can, in two otherwise."""
    if sys.platform == "linux":
        at_fdcwd, exchange = -100, 2
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename and rename(at_fdcwd, os.fsencode(attempt), at_fdcwd, os.fsencode(target), exchange) == 0:
            return
    aside = target.parent / f".{target.name}.attempt-{uuid.uuid4().hex}.tmp"
    lock = os.open(target, os.O_RDONLY | os.O_DIRECTORY)  # nobody who cleans shall take it for dead meanwhile
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(target, aside)
        try:
            os.rename(attempt, target)
        except BaseException:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(lock)


def _is_same(target: Path, manifest: dict[str, Any]) -> bool:
    """True if the target is whole and carries this manifest; raises otherwise, never returns False."""
    try:
        existing = verify(target)
    except WatchtowerError as error:
        raise WatchtowerError(f"{error}; remove {target} or publish with replace") from error
    existing.pop("files")
    if existing != manifest:
        differing = sorted(key for key in existing.keys() | manifest.keys() if existing.get(key) != manifest.get(key))
        raise WatchtowerError(f"{target}: published already, with other values of {', '.join(differing)}")
    return True


def _as_json(target: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    if "files" in manifest:
        raise InputError(f"{target}: `files` is not for the caller's manifest, publish fills it")
    try:
        return json.loads(json.dumps(redacted(dict(manifest)), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{target}: the manifest is not JSON ({error})") from error


def _check_name(manifest: Path, name: str) -> None:
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{manifest}: the file name {name!r} leads out of the snapshot")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def says_disk_full(error: BaseException) -> bool:
    """Whether an error came of a full disk, from whichever library it came."""
    # Libraries that write from C++ or Rust raise errors of their own, with the system's words in them.
    return getattr(error, "errno", None) in _DISK_FULL or "No space left on device" in str(error)
