"""A run folder behind a URL: s3://, gs:// or hdfs://, through pyarrow's file systems.

Object stores have no rename, no lock and no appending, on which every promise of a run folder rests. So a run whose
run_dir is a URL works in a folder of its own, `storage.work_dir`, as any other run does, and a thread of the driver
carries what was published there to the URL, in the same layout:

    snapshots     the files of a folder first, its manifest.json last: without one a folder is not there for a reader
    pointers      serving.json, metrics.json and report.html after these
    markers       stages/<stage>.json once everything that the stage wrote is there; taken away before that changes
    removed       what is gone in the working folder goes at the end, a manifest before its files

Each object appears whole or not at all, which object stores promise (on others: written beside and moved). A run on
another machine, or in an empty folder, takes first what the URL has; every file of a snapshot is read against its
checksum on the way. What is made anew in seconds to minutes is left out: the synthetic world, the router's features.

Who writes there: `attempts/owner.json` names the last driver that took the folder, `attempts/beat-<id>.json` rises
while it lives. Another driver takes the folder over once the beat has stood still for a while. One that was cut off and
lives on finds another name there before it puts anything, puts nothing more, and its attempt ends by the same rules as
in a shared folder (embeddings/attempts.py). Stores promise no comparing writes through this interface, so between a
look and a put an instant is open.

What fails for a while (timeouts, 500s, connections that break) is tried again, `storage.attempts` times, and meanwhile
the run goes on. Only where what was done cannot be put to its URL at the end does the run end with an error; the
working folder still has all of it, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from configs.errors import InputError, WatchtowerError
from configs.loader import load
from configs.schema import Config
from configs.secrets import redact, redacted
from embeddings import attempts
from embeddings.snapshots import MANIFEST, read_manifest, says_disk_full, verify, verify_file
from embeddings.untrusted import parse_json
from launch.run_folder import LOCK_NAME

OWNER = f"{attempts.FOLDER}/owner.json"
RECORD = f"{attempts.FOLDER}/record.json"
CARRIED = {"attempts", "channels", "checkpoints", "config.yaml", "evaluation", "events.jsonl", "indexes", "item_value",
           "labels", "metrics.json", "quarantine", "report.html", "routing", "sequences", "stages", "tensorboard"}
"""What of a run folder is carried. World and router features are made anew where they are missing; whatever else lies
at the URL is somebody's own."""
AT_ONCE = 8  # files that go up or down at a time
CHUNK_BYTES = 8 << 20
SLOW_S = 60.0  # files that only grow (events.jsonl, TensorBoard's) go up again at most this often
BEATS_TO_WAIT = 4  # a driver whose beat stood still for so many is taken for dead
MOST_WAIT_S = 30.0  # between two tries
_LAST = ("metrics.json", "report.html")
_NEVER_MENDS = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "NO_SUCH_BUCKET", "INVALID_CLIENT",
                "permission denied", "Permission denied", "invalid_grant", "NotAuthorized")
T = TypeVar("T")


class Refused(InputError):
    """The store does not let us, now or later."""


class Unreachable(WatchtowerError):
    """The store still failed at the last try; later it may not."""


def is_url(place: str | None) -> bool:
    """Whether a run_dir lies behind a URL and not in a folder of this machine."""
    return "://" in (place or "") and not (place or "").startswith("file://")


def local_path(place: str) -> str:
    """A run_dir of this machine, without the file:// that it may have."""
    return place.removeprefix("file://")


def work_folder(url: str, work_dir: str | None) -> Path:
    """Where a run behind this URL works: `storage.work_dir`, or a folder of the user's cache that is named after it."""
    if work_dir is not None:
        return Path(work_dir).expanduser().absolute()
    bare = redact(url).rstrip("/").partition("?")[0]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", bare.rpartition("/")[2]) or "run"
    return Path(cache).expanduser().absolute() / "watchtower" / f"{name}-{_digest(bare.encode())[:8]}"


def working_folder(config: Config) -> Path:
    """Where the files of this config's run lie on this machine."""
    if is_url(config.run_dir):
        return work_folder(config.run_dir, config.storage.work_dir)
    return Path(local_path(config.run_dir)).expanduser().absolute()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the store --------------------------------------------------------------------------------------------------------

class Store:
    """The objects below a URL, by their names relative to it. Whatever fails for a while is tried again.

    Args:
        url: s3://, gs:// or hdfs://; options of pyarrow behind a `?`, such as endpoint_override and region.
        attempts: tries of one operation, each after a longer wait.

    Raises:
        InputError: pyarrow knows no such file system; and, by every method, where the store refuses us for good.
        Unreachable: by every method, where it still failed at the last try.
    """

    def __init__(self, url: str, attempts: int = 6, wait_s: float = 0.5):
        from pyarrow import fs

        from trainer.logs import filesystem_of

        self.url, self.attempts, self.wait_s = redact(url).partition("?")[0].rstrip("/"), attempts, wait_s
        base, path = filesystem_of(url)
        base, path = _without_queue(base, url), path.rstrip("/")
        if not path.strip("/"):
            raise InputError(f"run_dir: {self.url} names no folder; add one, such as {self.url}/run")
        self._has_folders = base.type_name not in ("s3", "gcs")
        self._fs = fs.SubTreeFileSystem(path, base)
        if self._has_folders:
            self._try("made", "", lambda: base.create_dir(path, recursive=True))

    def _try(self, what: str, name: str, call: Callable[[], T]) -> T:
        for number in range(1, self.attempts + 1):
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                text = " ".join(str(error).split())
                where = f"{self.url}/{name}".rstrip("/")
                if any(words in text for words in _NEVER_MENDS):
                    raise Refused(f"{where}: cannot be {what}: {text}") from error
                if says_disk_full(error):
                    raise InputError(f"{where}: cannot be {what}: the disk here is full; make room and run again"
                                     ) from error
                if number == self.attempts:
                    raise Unreachable(f"{where}: could not be {what} in {number} tries: {text}") from error
                time.sleep(min(MOST_WAIT_S, self.wait_s * 2 ** (number - 1)) * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def list(self) -> dict[str, int]:
        """Size in bytes of every object, by name.

        Raises:
            InputError: a name that would lead out of a folder.
        """
        from pyarrow import fs

        selector = fs.FileSelector("", recursive=True, allow_not_found=True)
        found = self._try("listed", "", lambda: self._fs.get_file_info(selector))
        names = {info.path: int(info.size or 0) for info in found if info.type == fs.FileType.File}
        for name in names:
            if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
                raise InputError(f"{self.url}: the name {name!r} leads out of the run folder; remove it")
        return names

    def read(self, name: str) -> bytes | None:
        """A small object whole; None where there is none."""
        def get() -> bytes:
            with self._fs.open_input_stream(name) as stream:
                return stream.read()

        try:
            return self._try("read", name, get)
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small JSON object; None where there is none that can be read."""
        data = self.read(name)
        try:
            return None if data is None else parse_json(data)
        except ValueError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda stream: stream.write(data))

    def upload(self, path: Path, name: str) -> tuple[int, int]:
        """A file of this machine, as it is while it is open: size and time (ns) of what was put.

        Raises:
            FileNotFoundError: it is gone.
        """
        with open(path, "rb") as file:  # before the stream: closing that one makes an object, however little is in it
            found = os.fstat(file.fileno())

            def copy(stream: Any) -> None:
                file.seek(0)
                left = found.st_size  # a log that grows is put as long as it was
                while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                    stream.write(chunk)
                    left -= len(chunk)

            self._put(name, copy)
        return found.st_size, found.st_mtime_ns

    def _put(self, name: str, fill: Callable[[Any], Any]) -> None:
        def put() -> None:
            # Nothing is deleted where a put to an object store failed: what was there before is still whole.
            place = name
            if self._has_folders:
                place = f"{name}.{uuid.uuid4().hex}.tmp"
                if parent := name.rpartition("/")[0]:
                    self._fs.create_dir(parent, recursive=True)
            try:
                with self._fs.open_output_stream(place) as stream:
                    fill(stream)
                if place != name:
                    self._fs.move(place, name)
            except BaseException:
                if place != name:
                    with contextlib.suppress(OSError):
                        self._fs.delete_file(place)
                raise

        self._try("written", name, put)

    def download(self, name: str, path: Path) -> None:
        """An object into a file, whose folder is there."""
        def get() -> None:
            with self._fs.open_input_stream(name) as stream, open(path, "wb") as file:
                while chunk := stream.read(CHUNK_BYTES):
                    file.write(chunk)

        self._try("read", name, get)

    def delete(self, name: str) -> None:
        """An object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._try("removed", name, lambda: self._fs.delete_file(name))


def _without_queue(base: Any, url: str) -> Any:
    """S3 with writes that wait for their end: pyarrow's own would take a file into memory as fast as it can be read,
    and let nothing else through. Where the URL has an option that is not known here, it stays as it is."""
    from pyarrow import fs

    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if base.type_name != "s3" or not options.keys() <= {"region", "scheme", "endpoint_override"}:
        return base
    keys = {} if parts.username is None else {"access_key": unquote(parts.username),
                                              "secret_key": unquote(parts.password or "")}
    return fs.S3FileSystem(background_writes=False, **keys, **{"region": base.region} | options)


# --- what lies in a run folder ----------------------------------------------------------------------------------------

def _parts_of(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Names of files as snapshots (folder: its files' names, relative to it) and loose files. The outermost folder with
    a manifest is a snapshot, and everything below it is its own."""
    names = sorted(names)
    tops: set[str] = set()
    for name in sorted((n for n in names if n.endswith(f"/{MANIFEST}")), key=lambda n: n.count("/")):
        folder = name.removesuffix(f"/{MANIFEST}")
        if not any(str(above) in tops for above in PurePosixPath(folder).parents):
            tops.add(folder)
    snapshots: dict[str, list[str]] = {top: [] for top in sorted(tops)}
    loose = []
    for name in names:
        top = next((str(above) for above in PurePosixPath(name).parents if str(above) in tops), None)
        if top is None:
            loose.append(name)
        else:
            snapshots[top].append(name[len(top) + 1:])
    return snapshots, loose


def _is_carried(name: str) -> bool:
    """Whether a file of a run folder belongs behind its URL."""
    parts = name.split("/")
    if parts[0] not in CARRIED or any(p.startswith(".") or p.endswith(".tmp") for p in parts):
        return False
    return parts[0] != attempts.FOLDER or name == RECORD


def _local_names(folder: Path) -> list[str]:
    found = []
    for place, folders, files in os.walk(folder):
        at = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if _is_carried(f"{(at / name).as_posix()}/x")
                      or (at / name).as_posix() == attempts.FOLDER]
        found += [name for file in files if _is_carried(name := (at / file).as_posix())]
    return found


def _is_marker(name: str) -> bool:
    return name.startswith("stages/") and name.count("/") == 1 and not name.endswith(".outcome.json")


def _is_last(name: str) -> bool:
    return name in _LAST or name.rpartition("/")[2] == "serving.json"


def _only_grows(name: str) -> bool:
    return name == "events.jsonl" or name.startswith("tensorboard/")


# --- the run folder ---------------------------------------------------------------------------------------------------

@dataclass
class _Carried:
    """What is known to be behind the URL: of snapshots their manifest's digest, of loose files size and time (ns) here,
    or the digest of those that are small."""

    snapshots: dict[str, str] = field(default_factory=dict)
    loose: dict[str, tuple[int, int] | str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)  # of all objects
    grown_at: float = 0.0


class RemoteFolder:
    """A run folder behind a URL and the folder of this machine that is worked in.

    Use: `take` with the working folder's lock held, then `carrying` around the run.

    Args:
        url: of the run folder. folder: the working folder, which is there.
        every_s: seconds between two looks for what is new; also of a beat.
        say: takes warnings.
    """

    def __init__(self, url: str, folder: Path, *, every_s: float = 5.0, attempts: int = 6, wait_s: float = 0.5,
                 say: Callable[[str], None] = lambda line: None):
        self.store, self.folder, self.every_s, self.say = Store(url, attempts, wait_s), folder, every_s, say
        self.id = uuid.uuid4().hex
        self._carried = _Carried()
        self._stop, self._is_over = threading.Event(), threading.Event()
        self._is_cut_off = False
        self._left_out: set[str] = set()
        self._me: dict[str, Any] = {}
        self._is_gone = False
        self._lock = threading.Lock()
        self._beater = threading.Thread(target=self._beat_on, daemon=True, name="watchtower-beat")

    # --- taking it ---

    def take(self) -> None:
        """Become the one that writes there, and bring the working folder to what the URL has, if somebody else wrote
        there since.

        Raises:
            InputError: the working folder holds something else; the store refuses us.
            WatchtowerError: a driver elsewhere writes there; the store cannot be reached.
        """
        before = self.store.read_json(OWNER) or {}
        ours = attempts.read_note(self.folder / OWNER) or {}
        self._refuse_another_run(ours, before)
        is_newest = "id" in ours and before.get("id") in (None, ours["id"], ours.get("was"))
        if is_newest and not before and "config.yaml" in self.store.list():
            raise InputError(f"run_dir: {self.store.url}/{OWNER} is missing or damaged, so nobody can say whether the "
                             f"URL or {self.folder} is newer; empty that folder to go on with what the URL has, or the "
                             "URL to put there what the folder has")
        if before and not is_newest:
            self._wait_for_its_end(before)
        me = {"id": self.id, "url": self.store.url, "host": socket.gethostname(), "pid": os.getpid(),
              "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._me = me
        (self.folder / attempts.FOLDER).mkdir(exist_ok=True)
        # Before anything else, as this may end at any time: a folder that is the newest stays that under both names,
        # and what is taken from now on is of this URL, even if it is not all of it.
        attempts.write_note(self.folder / OWNER, {**me, "was": before.get("id")} if is_newest else
                            {"url": self.store.url})
        self._beat(0)
        self.store.write(OWNER, _json(me))
        self._beater.start()
        try:
            if is_newest:
                self._learn()
            else:
                self.pull()
            attempts.write_note(self.folder / OWNER, me)
            for name in list(self._carried.names):
                if name.startswith(f"{attempts.FOLDER}/beat-") and name != self._beat_name(self.id):
                    self.store.delete(name)
        except BaseException:
            self._end_beat()
            raise

    def _refuse_another_run(self, ours: dict[str, Any], before: dict[str, Any]) -> None:
        """What is not a run is neither taken nor removed."""
        if ours.get("url") != self.store.url and any(name != LOCK_NAME for name in os.listdir(self.folder)):
            raise InputError(f"storage.work_dir: {self.folder} holds {ours.get('url') or 'something else'} and not "
                             f"{self.store.url}; name an empty folder, or one that this run worked in before")
        if not before and "id" not in ours and (names := self.store.list()) and "config.yaml" not in names:
            raise InputError(f"run_dir: {self.store.url} holds {min(names)} and no run (there is no config.yaml); "
                             "name a place that is empty")

    def _beat_name(self, owner: str) -> str:
        return f"{attempts.FOLDER}/beat-{owner}.json"

    def _beat(self, number: int) -> None:
        self.store.write(self._beat_name(self.id), _json({"beat": number, "every_s": self.every_s}))

    def _wait_for_its_end(self, owner: dict[str, Any]) -> None:
        name = self._beat_name(str(owner.get("id")))
        if not re.fullmatch(r"attempts/beat-[0-9a-f]{32}\.json", name) or (first := self.store.read_json(name)) is None:
            return
        every_s = first.get("every_s")
        every_s = min(float(every_s), 600.0) if isinstance(every_s, (int, float)) and every_s > 0 else self.every_s
        for _ in range(BEATS_TO_WAIT):
            time.sleep(every_s)
            now = self.store.read_json(name)
            if now is None:
                return
            if now != first:
                raise WatchtowerError(
                    f"run_dir: {self.store.url} is being written by process {owner.get('pid')} on {owner.get('host')} "
                    f"since {owner.get('since')}; wait for it, or give this run a folder of its own (run_dir=...)")
        self.say(f"warning: {self.store.url}: process {owner.get('pid')} on {owner.get('host')} gives no sign of life; "
                 "this run takes its place")

    def _learn(self) -> None:
        """What the URL has of this working folder, which is at least as new: snapshots by their manifests."""
        self._carried.names = set(self.store.list())
        snapshots, _ = _parts_of(name for name in self._carried.names if _is_carried(name))
        manifests = self._each(lambda top: self.store.read(f"{top}/{MANIFEST}"), snapshots)
        marks = [name for name in self._carried.names if _is_marker(name) or _is_last(name)]
        self._carried.loose = {name: _digest(data) for name, data in zip(marks, self._each(self.store.read, marks),
                                                                         strict=True) if data is not None}
        self._carried.snapshots = {top: _digest(data) for top, data in zip(snapshots, manifests, strict=True)
                                   if data is not None and self._has_all(top, data)}

    def _has_all(self, top: str, manifest: bytes) -> bool:
        try:
            files = parse_json(manifest).get("files")
        except ValueError:
            return False
        return isinstance(files, dict) and all(f"{top}/{name}" in self._carried.names for name in files)

    # --- down ---

    def pull(self) -> None:
        """Make the working folder what the URL has. Snapshots that are not whole are left out, with a warning."""
        sizes = self.store.list()
        self._carried = _Carried(names=set(sizes))
        names = [name for name in sizes if _is_carried(name)]
        snapshots, loose = _parts_of(names)
        stale_snapshots, stale = _parts_of(_local_names(self.folder))
        for top in stale_snapshots.keys() - snapshots.keys():
            shutil.rmtree(self.folder / top, ignore_errors=True)
        for name in set(stale) - set(loose):
            (self.folder / name).unlink(missing_ok=True)
        size = sum(sizes[name] for name in names)
        if names:
            self.say(f"{self.store.url}: {len(names)} files, {size / 2**20:,.0f} MiB, are taken into {self.folder}")
        self._each(self._pull_loose, loose)
        self._each(lambda top: self._pull_snapshot(top, snapshots[top]), snapshots)

    def _pull_loose(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.store.download(name, beside)
            found = beside.stat()
            os.replace(beside, path)
            is_mark = _is_marker(name) or _is_last(name)
            self._carried.loose[name] = _digest(path.read_bytes()) if is_mark else (found.st_size, found.st_mtime_ns)
        except FileNotFoundError:
            self._carried.names.discard(name)
        finally:
            beside.unlink(missing_ok=True)

    def _pull_snapshot(self, top: str, names: list[str]) -> None:
        place = self.folder / top
        manifest = self.store.read(f"{top}/{MANIFEST}")
        if manifest is None:
            return
        if (place / MANIFEST).is_file() and (place / MANIFEST).read_bytes() == manifest:
            self._carried.snapshots[top] = _digest(manifest)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=f".{os.getpid()}.tmp", dir=place.parent))
        try:
            beside.chmod(0o755)
            (beside / MANIFEST).write_bytes(manifest)
            for name in read_manifest(beside)["files"]:
                (beside / name).parent.mkdir(parents=True, exist_ok=True)
                self.store.download(f"{top}/{name}", beside / name)
                try:
                    verify_file(beside, read_manifest(beside), name)
                except WatchtowerError:  # of a connection, or of the store: once more tells
                    self.store.download(f"{top}/{name}", beside / name)
            verify(beside)
            shutil.rmtree(place, ignore_errors=True)
            os.rename(beside, place)
            self._carried.snapshots[top] = _digest(manifest)
        except (FileNotFoundError, WatchtowerError) as error:
            if isinstance(error, (Unreachable, Refused)) or says_disk_full(error.__cause__ or error):
                raise
            self._left_out.add(top)  # and stays where it is: somebody may mend it
            self.say(f"warning: {self.store.url}/{top}: damaged or half removed, and left out ({error})")
            shutil.rmtree(place, ignore_errors=True)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    # --- up ---

    @contextlib.contextmanager
    def carrying(self) -> Iterator[RemoteFolder]:
        """Carry what is published to the URL while the block runs, and the last of it at its end, however it ends.

        Raises:
            WatchtowerError: the block ended well and its last results could not be put to the URL.
        """
        carrier = threading.Thread(target=self._carry_on, daemon=True, name="watchtower-storage")
        carrier.start()
        ended_well = False
        try:
            yield self
            ended_well = True
        finally:
            self._stop.set()
            carrier.join()
            try:
                self.push(everything=True)
            except attempts.Superseded:
                if ended_well:
                    raise
            except (WatchtowerError, OSError) as error:
                told = (f"{error}\nwhat this run did is whole in {self.folder}; the same command carries it to "
                        f"{self.store.url} once that can be reached")
                if ended_well:
                    raise WatchtowerError(told) from error
                self.say(f"warning: {told}")
            finally:
                self._end_beat()

    def _end_beat(self) -> None:
        self._is_over.set()
        self._beater.join()
        if not self._is_cut_off:
            with contextlib.suppress(WatchtowerError, OSError):
                self.store.delete(self._beat_name(self.id))

    def _carry_on(self) -> None:
        told = ""
        while not self._stop.wait(self.every_s):
            try:
                self.push()
                told = ""
            except attempts.Superseded:
                return
            except Exception as error:  # whatever it is, the run goes on, and its end says what was not carried
                if str(error) != told:
                    self.say(f"warning: {error}; the run goes on, and this is tried again")
                told = str(error)

    def _beat_on(self) -> None:
        number, told = 0, ""
        while not self._is_over.wait(self.every_s):
            number += 1
            try:
                self.check()
                self._beat(number)
                told = ""
            except attempts.Superseded:
                pass  # its attempt ends by that and says so; on and on, for it may not have begun yet
            except Exception as error:  # without a sign of life another driver may take the run over
                if str(error) != told:
                    self.say(f"warning: no sign of life could be given: {error}; this is tried again")
                told = str(error)

    def check(self) -> None:
        """Whether this process is still the one that writes there. Where it is not, its attempt at the working folder
        is cut off, too.

        Raises:
            Superseded: it is not.
        """
        owner = self.store.read_json(OWNER)
        if owner is None or owner.get("id") == self.id:
            self._is_gone = owner is None
            return
        self._is_cut_off = True
        where = f"{owner.get('host')}, process {owner.get('pid')}"
        attempts.cut_off(self.folder, f"{where}, through {self.store.url}")
        raise attempts.Superseded(f"{self.store.url}: this run was cut off: {where} has taken it over; nothing more is "
                                  "put there")

    def push(self, everything: bool = False) -> None:
        """Carry what is new to the URL, in an order in which a reader never finds a half.

        Args:
            everything: also what only grows, at once.
        """
        with self._lock:
            self._push(everything)

    def _check_folder(self) -> None:
        """Whether the working folder is there. Where its file system is away, all that was carried looks removed.

        Raises:
            WatchtowerError: it is not.
        """
        if (attempts.read_note(self.folder / OWNER) or {}).get("id") != self.id:
            raise WatchtowerError(f"{self.folder} is away, or was emptied: {OWNER} is not there; nothing is carried to "
                                  f"{self.store.url}, and nothing taken away")

    def _push(self, everything: bool) -> None:
        self.check()
        if self._is_gone:  # somebody emptied the place: all is put there again
            self.store.write(OWNER, _json(self._me))
            self._carried = _Carried()
        known = self._carried
        marked = [name for name in _local_names(self.folder) if _is_marker(name) or _is_last(name)]
        # As they are now: what they vouch for was written before, and is put before they are.
        marks = {name: data for name in marked if (data := _bytes_of(self.folder / name)) is not None}
        names = _local_names(self.folder)
        self._check_folder()
        for name in [n for n in known.names if _is_marker(n) and n not in marks]:
            self._drop(name)
        snapshots, loose = _parts_of(names)
        # A stage that is done again: its marker goes before what it vouches for is changed.
        digests = {name: _digest(data) for name, data in marks.items()}
        for name in [n for n in marks if _is_marker(n) and n in known.names and known.loose.get(n) != digests[n]]:
            self._drop(name)
        manifests = {top: data for top in snapshots if (data := _bytes_of(self.folder / top / MANIFEST)) is not None
                     and known.snapshots.get(top) != _digest(data)}
        # A checkpoint's events go with it: a run that goes on from there elsewhere has its curves from the beginning.
        grows = everything or manifests or time.monotonic() - known.grown_at > SLOW_S
        self._each(self._push_loose, [n for n in loose if n not in marks and (grows or not _only_grows(n))])
        if grows:
            known.grown_at = time.monotonic()
        self._each(lambda top: self._push_snapshot(top, manifests[top]), manifests)
        self.check()
        for name in sorted(marks, key=_is_last, reverse=True):  # a marker vouches for metrics.json and pointers, too
            if known.loose.get(name) != digests[name] and _bytes_of(self.folder / name) == marks[name]:
                self.store.write(name, marks[name])
                known.names.add(name)
                known.loose[name] = digests[name]
        here = set(names)
        gone = [name for name in known.names if _is_carried(name) and name not in here
                and not (self.folder / name).exists()]
        # Not before what takes its place is there: of checkpoints that go faster than they can be put, one must stay.
        waited_for = {top.rpartition("/")[0] for top in snapshots if top not in known.snapshots}
        kept = self._left_out | {top for top in known.snapshots if top.rpartition("/")[0] in waited_for}
        gone = [name for name in gone if not any(str(above) in kept for above in PurePosixPath(name).parents)]
        self._check_folder()
        for name in sorted(gone, key=lambda n: not n.endswith(f"/{MANIFEST}")):
            self._drop(name)
        for top in [top for top in known.snapshots if f"{top}/{MANIFEST}" not in known.names]:
            del known.snapshots[top]

    def _push_snapshot(self, top: str, manifest: bytes) -> None:
        known, place = self._carried, self.folder / top
        if f"{top}/{MANIFEST}" in known.names:  # another one in its place: not there for readers until it is whole
            self._drop(f"{top}/{MANIFEST}")
            known.snapshots.pop(top, None)
        try:
            for name in parse_json(manifest)["files"]:  # and not what a walk saw, which may be of the one before
                self.store.upload(place / name, f"{top}/{name}")
                known.names.add(f"{top}/{name}")
        except FileNotFoundError:
            return  # it was removed or replaced meanwhile; the next look sees what is there then
        if _bytes_of(place / MANIFEST) != manifest:
            return
        self.check()
        self.store.write(f"{top}/{MANIFEST}", manifest)
        known.names.add(f"{top}/{MANIFEST}")
        known.snapshots[top] = _digest(manifest)

    def _push_loose(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = (self.folder / name).stat()
            if self._carried.loose.get(name) != (found.st_size, found.st_mtime_ns):
                self._carried.loose[name] = self.store.upload(self.folder / name, name)
                self._carried.names.add(name)

    def _drop(self, name: str) -> None:
        self.store.delete(name)
        self._carried.names.discard(name)
        self._carried.loose.pop(name, None)

    @staticmethod
    def _each(call: Callable[[str], T], names: Iterable[str]) -> list[T]:
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="watchtower-storage") as pool:
            return list(pool.map(call, names))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(redacted(value)) + "\n").encode()


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


# --- a config and its run folder --------------------------------------------------------------------------------------

def load_config(place: str, overrides: Iterable[str] = ()) -> Config:
    """`configs.loader.load`, also of a run folder behind a URL; `run_dir` is then that URL.

    Raises:
        InputError: as it does; there is no run at that URL.
    """
    if not is_url(place):
        return load(place, overrides)
    data = Store(place).read("config.yaml")
    if data is None:
        raise InputError(f"{redact(place)}: there is no config.yaml of a run")
    with tempfile.TemporaryDirectory(prefix="watchtower-config-") as folder:
        (Path(folder) / "config.yaml").write_bytes(data)
        try:
            config = load(folder, overrides)
        except InputError as error:
            raise InputError(str(error).replace(folder, redact(place).rstrip("/"))) from None
    return config.model_copy(update={"run_dir": place}) if config.run_dir == folder else config


@contextlib.contextmanager
def worked_in(config: Config, folder: Path, say: Callable[[str], None]) -> Iterator[Config]:
    """The config with `run_dir` as a folder of this machine. Where the config's is a URL, what the URL has is taken
    before the block, and what is published in the folder is carried there while it runs and at its end.

    Args:
        folder: the working folder, locked.

    Raises:
        As `RemoteFolder.take` and `RemoteFolder.carrying`.
    """
    if not is_url(config.run_dir):
        yield config
        return
    remote = RemoteFolder(config.run_dir, folder, every_s=config.storage.every_s, attempts=config.storage.attempts,
                          say=say)
    remote.take()
    with remote.carrying():
        yield config.model_copy(update={"run_dir": str(folder)})
