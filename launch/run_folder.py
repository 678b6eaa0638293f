"""One run, one folder, one writer: the lock of a run folder.

The lock is a file that names its holder and is held with flock, so that it ends with the process, however that ends.
Where a file system has no flock, the process that the file names decides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import InputError, WatchtowerError
from embeddings.snapshots import clean_dead_attempts

LOCK_NAME = "run.lock"
# Files and folders that are written beside their places, by every room: `.x.json.4711.tmp`, `crm.outcome.json.0.4711`.
_BESIDE = re.compile(r".+\.tmp|.+\.outcome\.json\.\d+\.\d+", re.ASCII)
# Folders of the same kind: `.step-40.3f9c..e1.writing` of a checkpoint, of router scores, `x.4711.tmp`.
_FOLDER_BESIDE = re.compile(r".+\.\d+\.tmp|\..+\.writing", re.ASCII)
_NOT_OURS = {"ray", "tensorboard", "world"}


def make_run_folder(run_dir: str) -> Path:
    """The run folder, made if it is not there.

    Raises:
        InputError: it cannot be made, or cannot be written to.
    """
    folder = Path(run_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"run_dir: {run_dir} cannot be made ({getattr(error, 'strerror', None) or error}); "
                         "name a folder that can") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"run_dir: {run_dir} cannot be written to; name another folder")
    return folder.absolute()


def sweep(folder: Path) -> None:
    """Remove what runs that were killed left half-written anywhere in a run folder. Call it with the lock held."""
    for place, names, files in os.walk(folder):
        clean_dead_attempts(Path(place))  # these have locks of their own, which a worker that was cut off may hold
        for name in files:
            if _BESIDE.fullmatch(name):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(place, name))
        for name in names:
            if _FOLDER_BESIDE.fullmatch(name):
                shutil.rmtree(os.path.join(place, name), ignore_errors=True)
        names[:] = [name for name in names if not name.startswith(".") and not name.endswith(".tmp")
                    and not (Path(place) == folder and name in _NOT_OURS)]


def _started(pid: int) -> str | None:
    """When a process of this machine started (clock ticks since boot), None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _holder(text: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("pid"), int):
            return found
    return None


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process that a lock file names still runs; one of another machine is thought to."""
    if holder.get("host") != socket.gethostname():
        return True
    started = _started(holder["pid"])
    return started is not None and holder.get("started") in (None, started)


def living_holder(folder: Path) -> dict[str, Any] | None:
    """The process that holds a run folder: pid, host, since; None if nobody does. Takes and changes nothing."""
    try:
        holder = _holder((folder / LOCK_NAME).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return holder if holder is not None and _lives(holder) else None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder against other processes until the block ends. A dead process's lock is taken over.

    Raises:
        WatchtowerError: another process has it; the message names it.
    """
    path = folder / LOCK_NAME
    descriptor = _take(path)
    try:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid()),
              "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(me) + "\n").encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            has_flock = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(path, _read(descriptor)) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                    raise
                has_flock = False
            try:
                same = os.stat(path).st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                same = False
            if not same:  # its holder removed it between our open and our flock
                os.close(descriptor)
                continue
            holder = _read(descriptor)
            # Having flock, only a process of this machine that lives can say no: flock ends with its process.
            here = holder is not None and (not has_flock or holder.get("host") == socket.gethostname())
            if here and _lives(holder):
                raise _in_use(path, holder)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _read(descriptor: int) -> dict[str, Any] | None:
    return _holder(os.pread(descriptor, 4096, 0).decode("utf-8", "replace"))


def _in_use(path: Path, holder: dict[str, Any] | None) -> WatchtowerError:
    who = "another process"
    if holder:
        who = f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"
    return WatchtowerError(f"run_dir: {path.parent} is being written by {who}; wait for it, or give this run a folder "
                           f"of its own (run_dir=...). If that process is gone for good, remove {path}")
