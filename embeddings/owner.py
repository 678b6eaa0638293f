"""Beside a run folder: what mirrors of it on other nodes (embeddings/elsewhere.py) ask for.

Every name is relative to the run folder and stays in it. What is sent comes in parts into a folder of its own, which
ends with this object, and is renamed from there; so a node that is lost in the middle leaves nothing half-written.
Publishing and removing happen here as they do in a process of this node: for an attempt, under the lock of attempts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any

from configs.errors import InputError
from embeddings import attempts, snapshots
from embeddings.attempts import Attempt
from embeddings.elsewhere import MANIFEST, Who


class Owner:
    """Answers for a run folder of this node. Methods may be called by many threads.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path | str):
        self._root = Path(run_dir).absolute()
        self._incoming, self._lock = snapshots.open_attempt(self._root / "incoming")

    def close(self) -> None:
        """Nothing more comes."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        os.close(self._lock)

    def _at(self, name: str) -> Path:
        parts = name.split("/")
        if "\0" in name or name != "." and any(part in ("", ".", "..") for part in parts):
            raise InputError(f"{self._root}: the name {name!r} leads out of the run folder")
        return self._root / name

    def _for(self, who: Who):
        return attempts.this_thread_acts_for(None if who is None else Attempt(self._root, *who))

    # --- reading ---

    def facts(self, name: str) -> tuple[int, int] | None:
        """Size and time (ns) of a file; None where there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = self._at(name).stat()
            if stat.S_ISREG(found.st_mode):
                return found.st_size, found.st_mtime_ns
        return None

    def exists(self, name: str) -> bool:
        """Whether there is anything."""
        return self._at(name).exists()

    def progress(self) -> int:
        """Rises while this process reads and writes files."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return sum(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines()[:2])
        return 0

    def read(self, name: str, begin: int, most: int) -> bytes:
        """Bytes of a file, `most` of them at most."""
        with open(self._at(name), "rb") as file:
            file.seek(begin)
            return file.read(most)

    def note(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        try:
            return self._at(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, name: str) -> list[str]:
        """What a folder holds; nothing where there is none."""
        try:
            return sorted(os.listdir(self._at(name)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def files(self, name: str) -> list[str]:
        """The files of a folder and below it, relative to it; those that are being written are left out."""
        top = self._at(name)
        return sorted(path.relative_to(top).as_posix() for path in top.rglob("*")
                      if path.is_file() and not any(part.startswith(".") for part in path.relative_to(top).parts))

    def manifests(self, name: str) -> dict[str, tuple[int, int]]:
        """The folders with a manifest that lie in a folder: name to the `facts` of the manifest."""
        found = {inner: self.facts(f"{name}/{inner}/{MANIFEST}") for inner in self.names(name)
                 if not inner.startswith(".")}
        return {inner: facts for inner, facts in found.items() if facts is not None}

    # --- writing ---

    def take(self, upload: str, begin: int, data: bytes) -> None:
        """A part of a file that is sent."""
        descriptor = os.open(self._incoming / uuid.UUID(upload).hex, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while data:  # in its place, so that a part that comes twice does no harm
                written = os.pwrite(descriptor, data, begin)
                begin, data = begin + written, data[written:]
        finally:
            os.close(descriptor)

    def _arrived(self, upload: str, size: int) -> Path:
        path = self._incoming / uuid.UUID(upload).hex
        if path.stat().st_size != size:
            raise OSError(f"{path.stat().st_size} of {size} bytes came")
        return path

    def place(self, name: str, upload: str, size: int, who: Who) -> None:
        """A file that was sent, in its place."""
        sent = self._arrived(upload, size)
        try:
            path = self._place_for(name, who)
            with self._for(who), attempts.publishing():
                os.replace(sent, path)
        finally:
            sent.unlink(missing_ok=True)

    def put(self, name: str, data: bytes, who: Who) -> None:
        """A small file, whole at once."""
        path = self._place_for(name, who)
        sent = self._incoming / uuid.uuid4().hex
        try:
            sent.write_bytes(data)
            with self._for(who), attempts.publishing():
                os.replace(sent, path)
        finally:
            sent.unlink(missing_ok=True)

    def _place_for(self, name: str, who: Who) -> Path:
        """Its folder is made. What processes pass on lies in hidden folders: one that is gone shall not come again."""
        path, parts = self._at(name), name.split("/")[:-1]
        for depth, part in enumerate(parts):
            passed_on = self._root.joinpath(*parts[:depth + 1])
            if who is None and part.startswith(".") and not passed_on.is_dir():
                raise FileNotFoundError(f"{passed_on} is gone")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_note(self, name: str, data: bytes, only_first: bool) -> bool:
        """A small file in a folder that is there; with `only_first` unless there is one. Whether it was written."""
        path = self._at(name)
        sent = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            sent.write_bytes(data)
            if not only_first:
                os.replace(sent, path)
                return True
            return attempts.link_first(sent, path)
        finally:
            sent.unlink(missing_ok=True)

    def append(self, name: str, data: bytes) -> None:
        """A line at the end of a file; one that was torn is ended before."""
        descriptor = os.open(self._at(name), os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            while data:
                data = data[os.write(descriptor, data):]
        finally:
            os.close(descriptor)

    def make_folder(self, name: str) -> None:
        """A folder; those above it are made."""
        self._at(name).mkdir(parents=True, exist_ok=True)

    def remove(self, name: str, who: Who) -> None:
        """Take a folder or a file away, if it is there."""
        path = self._at(name)
        with self._for(who):
            if path.is_file():
                with attempts.publishing():
                    path.unlink(missing_ok=True)
            else:
                snapshots.remove(path)

    def publish(self, name: str, sent: dict[str, tuple[str, int]], manifest: dict[str, Any], replace: bool, who: Who
                ) -> tuple[bytes, int] | None:
        """`snapshots.publish` of files that were sent: the manifest's bytes and its time (ns); None where the same was
        there already."""
        arrived, written = {inner: self._arrived(*one) for inner, one in sent.items()}, []

        def write(into: Path) -> None:
            written.append(into)
            for inner, path in arrived.items():
                (into / inner).parent.mkdir(parents=True, exist_ok=True)
                os.rename(path, into / inner)

        try:
            with self._for(who):
                target = snapshots.publish(self._at(name), write, manifest, replace=replace)
        finally:
            for path in arrived.values():
                path.unlink(missing_ok=True)
        if not written:
            return None
        path = target / MANIFEST
        return path.read_bytes(), path.stat().st_mtime_ns

    def gather(self, writing: str, name: str, manifest: dict[str, Any], but: str, who: Who) -> None:
        """`snapshots.publish_from` of a folder that is here."""
        with self._for(who):
            snapshots.publish_from(self._at(writing), self._at(name), manifest, but=but)

    def begin_group(self, driver: int, work: str) -> int:
        """`attempts.begin_group`; the number of the group."""
        return attempts.begin_group(Attempt(self._root, driver), work).number
