"""The ingest stage: logs to user sequences, spread over a Ray cluster with Ray Data, or done by this process alone.

    pieces ── read, map, cast, clean ── group by shard of the user ── sort, take duplicates out, write ── publish
               (a task a piece)          (Ray Data's hash shuffle)     (a task a shard)

The tasks are the same functions under either executor. They write files of fixed names, each whole or not at all, into
the attempt's own folder, so a task that Ray runs again does no harm, and neither does a cut-off worker of an attempt
that was given up. What one process holds at a time is a batch of a piece, or one shard (2 million rows by default).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import InputError, WatchtowerError
from configs.schema import Config, DataConfig
from embeddings import elsewhere, snapshots
from embeddings.attempts import acts_for
from launch.nodes import at_work
from trainer import catalogue, kuairand_csv, logs, sequences
from trainer.events import EventLog
from trainer.logs import Piece, filesystem_of
from trainer.vocabulary import Vocabulary
from trainer.watchdog import BUSY_OVER_S, moved

FORMAT = 1  # of the sequences folder; another number ingests anew
ROWS_PER_SHARD, LEAST_SHARDS = 2_000_000, 8
PROGRESS_EVERY_S = 3.0
# Bringing 0.7 million rows of 6 pieces together took 1.4 s by Ray Data's sort, 4 to 7 s by its hash shuffle and 10 s by
# its default (2 CPUs, Ray 2.60). But the sort makes pieces x pieces objects: many pieces are left to the default.
SORTED_PIECES = 256


@dataclass(frozen=True)
class IngestSummary:
    """What became of an ingest. `reused`: the sequences were there already, from the same input and config."""

    folder: Path
    reused: bool
    seconds: float
    manifest: dict

    @property
    def statistics(self) -> dict:
        return self.manifest["statistics"]

    @property
    def quarantined(self) -> dict[str, int]:
        return self.statistics["quarantined"]

    @property
    def warnings(self) -> list[str]:
        return self.statistics["warnings"]

    def __str__(self) -> str:
        s = self.statistics
        bad = ", ".join(f"{reason} {count:,}" for reason, count in self.quarantined.items()) or "none"
        head = "already there" if self.reused else f"{self.seconds:.1f} s"
        lines = [f"ingest: {s['rows']:,} of {s['rows_read']:,} rows kept, {s['users']:,} users, {s['items']:,} items, "
                 f"{s['effective']:,} effective views, {s['targets']:,} targets; quarantined: {bad} ({head})"]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


class Executor(Protocol):
    """Who runs the tasks. Both calls return when all are done and raise what a task raised."""

    def each(self, task: Callable[[Piece], None], pieces: list[Piece]) -> None:
        """Run the task for each piece."""

    def group(self, read: Callable[[Piece], Iterator[pa.Table]], write: Callable[[pa.Table], None],
              pieces: list[Piece], shards: int, folder: Path) -> None:
        """Read each piece, bring the rows with an equal `shard` together, and write each shard that has rows.

        Args:
            folder: an empty folder for what does not fit in memory.
        """


class SerialExecutor:
    """All in this process: the tests' executor, and the one for logs that are not worth a cluster.

    Args:
        threads: tasks at once.
    """

    buffered_rows = 4_000_000

    def __init__(self, threads: int = 1):
        self.threads = threads

    def each(self, task, pieces):
        if self.threads == 1:
            for piece in pieces:
                task(piece)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(task, pieces))

    def group(self, read, write, pieces, shards, folder):
        buffer = _ShardBuffer(self.buffered_rows, shards, folder)

        def take_in(piece: Piece) -> None:
            for table in read(piece):
                buffer.add(table)

        def write_out(shard: int) -> None:
            if (rows := buffer.of(shard)) is not None:
                write(rows)

        self.each(take_in, pieces)
        self.each(write_out, list(range(shards)))


class _ShardBuffer:
    """Rows by shard: in memory, and in files of a folder once there are more than so many. Threads may add; each puts
    its own rows in the order of the shards, so that none waits for that."""

    def __init__(self, most_rows: int, shards: int, folder: Path):
        self._most_rows, self._shards, self._folder = most_rows, shards, folder
        self._held: list[tuple[pa.Table, np.ndarray]] = []  # rows by shard, and where each shard begins among them
        self._rows, self._lock = 0, threading.Lock()
        self._schema: pa.Schema | None = None
        self._files: list[tuple[Path, dict[int, int]]] = []  # and where in it the batch of each shard begins

    def add(self, table: pa.Table) -> None:
        ordered = self._by_shard(table)
        with self._lock:
            self._schema = ordered[0].schema
            self._held.append(ordered)
            self._rows += table.num_rows
            if self._rows >= self._most_rows:
                self._spill()
                self._held, self._rows = [], 0

    def _spill(self) -> None:
        """One file, with a batch for each shard: a file for each would be shards times spills of them."""
        path, begin_of = self._folder / f"{len(self._files):05d}.batches", {}
        with pa.OSFile(str(path), "wb") as sink:
            for shard in range(self._shards):
                if parts := self._parts_of(shard):
                    begin_of[shard] = sink.tell()
                    sink.write(pa.concat_tables(parts).combine_chunks().to_batches()[0].serialize())
        self._files.append((path, begin_of))

    def of(self, shard: int) -> pa.Table | None:
        """All rows of a shard in the order they were added; None where it has none."""
        parts = [pa.Table.from_batches([_mapped(path, begin_of[shard], self._schema)])
                 for path, begin_of in self._files if shard in begin_of] + self._parts_of(shard)
        return pa.concat_tables(parts) if parts else None

    def _parts_of(self, shard: int) -> list[pa.Table]:
        """The rows of a shard in memory."""
        return [table.slice(begin[shard], begin[shard + 1] - begin[shard]) for table, begin in self._held
                if begin[shard] < begin[shard + 1]]

    def _by_shard(self, table: pa.Table) -> tuple[pa.Table, np.ndarray]:
        shard = table["shard"].to_numpy()
        begin = np.concatenate([[0], np.cumsum(np.bincount(shard, minlength=self._shards))])
        place = sequences.places(shard, begin)
        return pa.table({name: sequences.put(table[name].to_numpy(), place) for name in table.column_names}), begin


def _mapped(path: Path, begin: int, schema: pa.Schema) -> pa.RecordBatch:
    """A batch of a file. The mapping ends with it: what was read of one counts as held for as long as it is there."""
    with pa.memory_map(str(path)) as source:
        source.seek(begin)
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)


class RayExecutor:
    """The tasks as a Ray Data pipeline on the cluster that `ray.init` has joined.

    Args:
        tasks: tasks at once; None leaves it to Ray.
        cpus_per_task: CPUs that a task asks for; a fraction lets it run beside training workers.
        sorted_pieces: up to this many pieces are brought together by sorting, more by hashing.
    """

    def __init__(self, tasks: int | None = None, cpus_per_task: float = 1.0, sorted_pieces: int = SORTED_PIECES):
        self.tasks = tasks
        self.cpus_per_task = cpus_per_task
        self.sorted_pieces = sorted_pieces

    def _options(self):
        import ray.data

        return {"num_cpus": self.cpus_per_task, "compute": ray.data.TaskPoolStrategy(size=self.tasks)}

    def each(self, task, pieces):
        attempt = acts_for()

        def run(batch: pa.Table) -> pa.Table:
            with at_work(attempt):
                for index in batch["piece"].to_pylist():
                    task(pieces[index])
            return batch

        with _quiet_ray():
            self._source(pieces).map_batches(run, batch_size=1, batch_format="pyarrow", **self._options()).materialize()

    def group(self, read, write, pieces, shards, folder):
        attempt = acts_for()

        def read_pieces(batch: pa.Table) -> Iterator[pa.Table]:
            with at_work(attempt):
                for index in batch["piece"].to_pylist():
                    yield from read(pieces[index])

        def write_group(rows: pa.Table) -> pa.Table:
            with at_work(attempt):
                write(rows)
            return rows.slice(0, 1).select(["shard"])

        with _quiet_ray(by_sort=len(pieces) <= self.sorted_pieces):
            options = self._options()
            rows = self._source(pieces).map_batches(read_pieces, batch_size=1, batch_format="pyarrow", **options)
            grouped = rows.groupby("shard", num_partitions=None if len(pieces) <= self.sorted_pieces else shards)
            grouped.map_groups(write_group, batch_format="pyarrow", **options).materialize()

    @staticmethod
    def _source(pieces):
        import ray.data

        return ray.data.from_items([{"piece": i} for i in range(len(pieces))], override_num_blocks=len(pieces))


@contextmanager
def _quiet_ray(by_sort: bool = False):
    """Ray Data without its bars and log lines, and a task's own error in place of Ray's wrapping of it."""
    import logging

    import ray.data
    from ray.data.context import ShuffleStrategy

    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    names = ("enable_progress_bars", "raise_original_map_exception", "shuffle_strategy")
    before, level = {name: getattr(context, name) for name in names}, logger.level
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    if by_sort:
        context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    logger.setLevel(logging.CRITICAL)
    try:
        with _shuffles_move():
            yield
    except Exception as error:
        raise _own_error(error) from None
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


@contextmanager
def _shuffles_move() -> Iterator[None]:
    """While the block runs, whatever the cluster begins and ends counts as this driver's moves: between our own tasks
    Ray Data moves rows about with tasks of its own, for as long as there are rows."""
    import ray

    over = threading.Event()

    def watch() -> None:
        before = None
        while not over.wait(BUSY_OVER_S):
            with suppress(Exception):  # a cluster that does not answer has not moved
                now = ray.available_resources()
                if now != before:
                    before = now
                    moved("the shuffle of the rows")

    thread = threading.Thread(target=watch, daemon=True, name="watchtower-shuffle")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _own_error(error: Exception) -> Exception:
    """Our error without Ray's wrapping: Ray raises a class made of its own and ours, with a traceback for a message."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, WatchtowerError) else error


# ------------------------------------------------------------------------------------------------------------ tasks

@dataclass(frozen=True)
class Work:
    """All that a task needs to know; it travels to the workers."""

    data: DataConfig
    staging: Path
    pieces: list[Piece]
    shards: int

    def partial(self, name: str) -> Path:
        return self.staging / "partials" / name


@dataclass
class PieceSummary:
    """What a piece's task tells: counts that add up over pieces."""

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    wrong_clock: int | None = None  # one of the times that are no Unix milliseconds

    def add(self, rows: int, counts: dict[str, int], notes: dict[str, int]) -> None:
        self.rows += rows
        for into, more in ((self.counts, counts), (self.notes, notes)):
            for name, count in more.items():
                into[name] = into.get(name, 0) + count


def read_piece(work: Work, piece: Piece) -> Iterator[pa.Table]:
    """Clean rows of a piece with their shard; its quarantined rows and counts go to files of the attempt."""
    with clear_disk_errors(work.staging.parent):
        yield from _read_piece(work, piece)


def _read_piece(work: Work, piece: Piece) -> Iterator[pa.Table]:
    data, summary, quarantined = work.data, PieceSummary(), []
    vocabulary, duration_s_N = _lookup(str(work.staging))
    wanted = wanted_columns(data)
    for first_row, batch in read_batches(piece, data):
        order = piece.order + first_row - piece.first_row
        result = logs.clean(batch, first_row, order, piece.source, data, vocabulary, duration_s_N)
        summary.add(batch.num_rows, result.counts, result.notes)
        if result.quarantined.num_rows:
            quarantined.append(result.quarantined)
            if summary.wrong_clock is None:
                wrong = result.quarantined.filter(pc.equal(result.quarantined["reason"], "timestamp_not_ms"))
                summary.wrong_clock = wrong["timestamp_ms"][0].as_py() if wrong.num_rows else None
            if summary.rows >= 1000:  # enough to tell, and no need to read all logs first
                logs.check_clock(summary.counts.get("timestamp_not_ms", 0), summary.rows, summary.wrong_clock,
                                 wanted["timestamp_ms"], piece.source)
        shard = sequences.shard_of(result.rows["user_id"].to_numpy(), work.shards)
        yield result.rows.append_column("shard", pa.array(shard))
    if quarantined:
        sequences.whole_file(work.staging / "quarantine" / f"part-piece-{piece.index:05d}.parquet",
                             lambda path: pq.write_table(pa.concat_tables(quarantined), path))
    _write_json(work.partial(f"piece-{piece.index:05d}.json"), asdict(summary))


def write_shard(work: Work, rows: pa.Table) -> None:
    """Write the shard that the rows belong to; duplicates, counts and items seen go to files of the attempt."""
    with clear_disk_errors(work.staging.parent):
        shard = rows["shard"][0].as_py()
        vocabulary, _ = _lookup(str(work.staging))
        summary, duplicates, seen = sequences.write_shard(
            work.staging / "sequences", shard, rows, pieces=work.pieces, vocabulary=vocabulary,
            utc_offset_h=work.data.utc_offset_h)
        if duplicates.num_rows:
            sequences.whole_file(work.staging / "quarantine" / f"part-shard-{shard:05d}.parquet",
                                 lambda path: pq.write_table(duplicates, path))
        sequences.whole_file(work.partial(f"shard-{shard:05d}.arrow"), lambda path: catalogue.write_batch(path, seen))
        _write_json(work.partial(f"shard-{shard:05d}.json"), vars(summary))


def collect_items(work: Work, piece: Piece) -> None:
    """Write the distinct item ids of a piece, where the logs must tell the vocabulary."""
    with clear_disk_errors(work.staging.parent):
        found = [pc.unique(batch["item_id"]) for _, batch in read_batches(piece, work.data, only=("item_id",))]
        ids = pc.drop_null(pc.unique(pa.chunked_array(found, pa.int64())))
        sequences.whole_file(work.partial(f"items-{piece.index:05d}.parquet"),
                             lambda path: pq.write_table(pa.table({"item_id": ids}), path))


def read_batches(piece: Piece, data: DataConfig, only: tuple[str, ...] | None = None):
    """(row number, table of our columns) of a piece, whatever the format of the logs."""
    if data.format == "kuairand_csv":
        return kuairand_csv.read_csv_piece(piece, data, only)
    wanted = [w for w in logs.wanted_columns(data) if only is None or w.name in only]
    return logs.read_parquet_piece(piece, wanted)


def wanted_columns(data: DataConfig) -> dict[str, str]:
    """Our column names and the files'."""
    if data.format == "kuairand_csv":
        return {"timestamp_ms": "time_ms"}
    return {w.name: w.column for w in logs.wanted_columns(data)}


@lru_cache(maxsize=1)
def _lookup(staging: str) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary and the catalogue's durations, read once by each process of an attempt."""
    elsewhere.bring(Path(staging) / "lookup.arrow")
    batch = catalogue.map_batch(Path(staging) / "lookup.arrow")
    return Vocabulary(batch["item_id"].to_numpy()[1:]), batch["duration_s"].to_numpy()


def _write_json(path: Path, value: dict) -> None:
    sequences.whole_file(path, lambda beside: beside.write_text(json.dumps(value, allow_nan=False)))


@contextmanager
def clear_disk_errors(folder: Path):
    """A full disk as one clear message instead of an OSError of some library."""
    try:
        yield
    except OSError as error:
        # Arrow's own errors carry the system's words alone.
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise InputError(f"{folder}: the disk is full. Nothing was published; make room (or set run_dir to a "
                             "larger disk) and run again.") from error
        raise


# -------------------------------------------------------------------------------------------------------- the stage

def ingest(data: DataConfig, folder: Path | str, executor: Executor, say: Callable[[str], None] | None = None
           ) -> IngestSummary:
    """Make `folder/sequences` (and `folder/quarantine`, where rows are bad) from the logs that the config names.

    Sequences that are there from the same files and the same config are kept, and nothing is done. Otherwise they are
    made anew beside and swapped in, whole.

    Args:
        data: the config's data section; data.logs must be set (a synthetic world is written by `watchtower synth`).
        folder: the run folder.
        executor: SerialExecutor or RayExecutor.
        say: takes a line of progress; None says nothing.

    Raises:
        InputError: for files, columns or rows that are wrong, with what to do; nothing half-written is left. Where too
            many rows are bad, `quarantine/` is published, so that they can be looked at.
    """
    began, target = time.monotonic(), Path(folder).absolute() / "sequences"
    if data.logs is None:
        raise InputError("data.logs: not set, so there is nothing to ingest. Name a file or folder of logs.")
    files = input_files(data)
    fingerprint = _fingerprint(data, files)
    if (manifest := _existing(target, fingerprint)) is not None:
        return IngestSummary(target, True, time.monotonic() - began, manifest)
    with clear_disk_errors(target.parent), _attempt(target) as staging:
        pieces = (kuairand_csv.csv_pieces(files["logs"], data) if data.format == "kuairand_csv"
                  else logs.parquet_pieces(files["logs"], data))
        shards = data.shards or max(LEAST_SHARDS, -(-sum(p.rows for p in pieces) // ROWS_PER_SHARD))
        work = Work(data, staging, pieces, shards)
        items, users = _read_tables(data)
        vocabulary = _vocabulary(work, items[0] if items else None, executor)
        duration_s_N, unusable = catalogue.durations_by_row(items[0] if items else None, vocabulary)
        catalogue.write_batch(staging / "lookup.arrow", {
            "item_id": np.concatenate([np.zeros(1, np.int64), vocabulary.id_V]), "duration_s": duration_s_N})
        with _progress(work, say or (lambda line: None)), ThreadPoolExecutor(1) as beside:
            features = beside.submit(_features, work, items, users, vocabulary)  # while the logs are read
            executor.group(partial(read_piece, work), partial(write_shard, work), pieces, shards, staging / "spill")
        read = _merge_pieces(work)
        summaries = _shard_summaries(work)
        statistics = sequences.merge_summaries(summaries, data.utc_offset_h)
        statistics |= _counted(read, statistics, len(vocabulary), items, users, unusable)
        _publish_quarantine(staging, target.parent / "quarantine")
        _check_rows(data, read, statistics, target.parent / "quarantine")
        statistics["catalogue_notes"] |= _write_catalogue(work, features.result(), duration_s_N)
        statistics["warnings"] = _warnings(data, statistics)
        manifest = {"kind": "sequences", "format": FORMAT, "shards": shards, "utc_offset_h": data.utc_offset_h,
                    "watermark_ms": statistics["last_timestamp_ms"] + 1, "feedback": data.feedback,
                    "session": data.session, "config": data.model_dump(mode="json"),
                    "input": {"fingerprint": fingerprint, "files": _listed(files)}, "statistics": statistics}
        snapshots.publish(target, lambda into: _move(staging / "sequences", into), manifest, replace=True)
    return IngestSummary(target, False, time.monotonic() - began, snapshots.read_manifest(target))


def run_ingest(config: Config, run_dir: Path | str) -> dict:
    """The stage as `watchtower run` calls it, on the Ray that is running; progress goes to the console.

    Returns:
        rows (read), rows_kept, users, items, effective, targets and quarantined (reason: rows).
    """
    summary = ingest(config.data, run_dir, RayExecutor(config.ray.ingest_tasks, config.ray.ingest_cpus), say=_print)
    _print(str(summary))
    s = summary.statistics
    found = {"rows": s["rows_read"], "rows_kept": s["rows"], "quarantined": summary.quarantined,
             **{name: s[name] for name in ("users", "items", "effective", "targets")}}
    with EventLog(Path(run_dir) / "events.jsonl") as log:
        log.write("ingest", show=False, reused=summary.reused, warnings=summary.warnings, **found)
    return found


def _print(line: str) -> None:
    print(line, flush=True)


def input_files(data: DataConfig) -> dict[str, list[logs.InputFile]]:
    """The files of logs, items and users that this config reads."""
    if data.format == "kuairand_csv":
        return kuairand_csv.find_files(data)
    keys = {"logs": data.logs, "items": data.items, "users": data.users}
    return {key: logs.list_files(location, f"data.{key}") if location is not None else []
            for key, location in keys.items()}


def _listed(files) -> dict[str, list]:
    return {key: [[f.name, f.size, f.modified_ns] for f in found] for key, found in files.items()}


def _fingerprint(data: DataConfig, files) -> str:
    """Of what the files hold as far as size and time tell, and of the config; where they lie is left out."""
    config = data.model_dump(mode="json", exclude={"synth", "logs", "items", "users"})
    inside = {key: [[f.path.removeprefix(filesystem_of(f.location)[1]) or "itself", f.size, f.modified_ns]
                    for f in found] for key, found in files.items()}
    text = json.dumps([FORMAT, config, inside], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _existing(target: Path, fingerprint: str) -> dict | None:
    """The manifest of the sequences that are there, if they come from this input and every file is as it was written.
    """
    try:
        manifest = snapshots.read_manifest(target)
        if manifest.get("input", {}).get("fingerprint") != fingerprint:
            return None
        return snapshots.verify(target)
    except (WatchtowerError, OSError):
        return None


@contextmanager
def _attempt(target: Path) -> Iterator[Path]:
    """An attempt's own folder beside the target. It is locked, so that only a dead attempt's is cleaned away."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        snapshots.clean_dead_attempts(target.parent)
        staging = target.parent / f".ingest.attempt-{uuid.uuid4().hex}.tmp"
        staging.mkdir()
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{target.parent}: cannot be written to ({error.strerror}). Set run_dir to a folder that can."
                         ) from error
    lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # no locks on this file system; then attempts are told dead by their age
    try:
        for name in ("sequences", "sequences/vocabulary", "quarantine", "partials", "spill"):
            (staging / name).mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _read_tables(data: DataConfig):
    if data.format == "kuairand_csv":
        return kuairand_csv.read_items(data), kuairand_csv.read_users(data)
    return catalogue.read_items(data), catalogue.read_users(data)


def _vocabulary(work: Work, items: pa.Table | None, executor: Executor) -> Vocabulary:
    """The catalogue's ids; and the logs', where there is no catalogue or items that it lacks are kept."""
    listed = items["item_id"].to_numpy() if items is not None else np.zeros(0, np.int64)
    if items is None or work.data.missing_items == "keep":
        executor.each(partial(collect_items, work), work.pieces)
        paths = [work.partial(f"items-{p.index:05d}.parquet") for p in work.pieces]
        listed = np.unique(np.concatenate([listed, *(pq.read_table(p)["item_id"].to_numpy() for p in paths)]))
    vocabulary = Vocabulary(listed)
    vocabulary.save(work.staging / "sequences" / "vocabulary" / "items.parquet")
    return vocabulary


def _merge_pieces(work: Work) -> PieceSummary:
    total = PieceSummary()
    for piece in work.pieces:
        one = PieceSummary(**json.loads(work.partial(f"piece-{piece.index:05d}.json").read_text()))
        total.add(one.rows, one.counts, one.notes)
        total.wrong_clock = one.wrong_clock if total.wrong_clock is None else total.wrong_clock
    if total.rows == 0:
        raise InputError(f"data.logs: {work.data.logs} has no rows. There is nothing to ingest.")
    return total


def _shard_summaries(work: Work) -> list[sequences.ShardSummary]:
    """The shards' summaries; a shard that no user fell into is written, empty."""
    summaries = []
    empty = None
    for shard in range(work.shards):
        path = work.partial(f"shard-{shard:05d}.json")
        if path.exists():
            summaries.append(sequences.ShardSummary(**json.loads(path.read_text())))
            continue
        if empty is None:
            empty = sequences.empty_rows(work.data.session is not None, work.data.feedback)
        summary, _, _ = sequences.write_shard(
            work.staging / "sequences", shard, empty, pieces=work.pieces, vocabulary=Vocabulary(np.zeros(0, np.int64)),
            utc_offset_h=work.data.utc_offset_h)
        summaries.append(summary)
    return summaries


def _counted(read: PieceSummary, statistics: dict, vocabulary_items: int, items, users, unusable: int) -> dict:
    """The statistics that do not come from shards. A row is read, and then kept or quarantined: the counts add up."""
    counts = dict(read.counts)
    if statistics.pop("duplicates"):
        counts["duplicate"] = read.rows - statistics["rows"] - sum(read.counts.values())
    if read.rows != statistics["rows"] + sum(counts.values()):
        raise WatchtowerError(f"ingest lost rows: {read.rows} read, {statistics['rows']} kept, {counts} quarantined. "
                              "This is a fault of Watchtower; please report it.")
    notes = (items[1] if items else {}) | (users[1] if users else {})
    if unusable:
        notes["unusable_durations"] = unusable
    return {"rows_read": read.rows, "quarantined": {r: counts[r] for r in logs.REASONS if counts.get(r)},
            "notes": read.notes, "items": vocabulary_items, "catalogue_notes": notes}


def _publish_quarantine(staging: Path, target: Path) -> None:
    parts = sorted((staging / "quarantine").glob("part-*.parquet"))
    if parts:
        rows = sum(pq.read_metadata(p).num_rows for p in parts)
        snapshots.publish(target, lambda into: _move(staging / "quarantine", into),
                          {"kind": "quarantine", "rows": rows}, replace=True)
    elif target.exists():
        snapshots.remove(target)


def _check_rows(data: DataConfig, read: PieceSummary, statistics: dict, quarantine: Path) -> None:
    """Raises an InputError where too many rows are bad, or nothing is left to learn from."""
    logs.check_clock(read.counts.get("timestamp_not_ms", 0), read.rows, read.wrong_clock,
                     wanted_columns(data)["timestamp_ms"], data.logs)
    bad = sum(read.counts.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in
                        sorted(read.counts.items(), key=lambda pair: -pair[1]))
    if bad > data.max_bad_share * read.rows:
        advice = {"item_not_in_catalogue": " Give a catalogue (data.items) that holds these items, or set "
                                           "data.missing_items=keep.",
                  "watch_time_above_max": " Is watch_time_s in milliseconds? It is seconds; or raise data.max_watch_s.",
                  "not_finite_watch_time": " Write an unknown watch time as null, not as NaN.",
                  }.get(max(read.counts, key=read.counts.get), "")
        raise InputError(f"data.logs: {bad:,} of {read.rows:,} rows ({bad / read.rows:.1%}) are bad, and "
                         f"data.max_bad_share allows {data.max_bad_share:.1%}: {reasons}. They are in {quarantine}, "
                         f"with their file and row.{advice} Mend the logs, or raise data.max_bad_share.")
    if statistics["rows"] == 0:
        raise InputError(f"data.logs: no row is left of {read.rows:,} ({reasons}). They are in {quarantine}.")
    for rule, key, count in ((data.effective_view, "data.effective_view", statistics["effective"]),
                             (data.target or data.effective_view, "data.target", statistics["targets"])):
        if count == 0 and rule.min_watch_s is not None:
            unknown = statistics["null_watch_share"]
            raise InputError(f"{key}: no view lasts {rule.min_watch_s:g} s or the whole video; watch_time_s is null on "
                             f"{unknown:.0%} of the rows. Name a flag column that tells which views count, as in "
                             f"{key}={{column: effective_view}}, or lower {key}.min_watch_s.")
        if count == 0:
            raise InputError(f"{key}: column {rule.column} is true on no row, so there is nothing to learn from. "
                             "Name another column.")


def _features(work: Work, items, users, vocabulary: Vocabulary) -> catalogue.CatalogueColumns:
    """Writes `users.arrow` and the vocabularies of both tables' columns."""
    into = work.staging / "sequences"
    if users is not None:
        catalogue.write_users(into, users[0], work.data.user_categories)
    return catalogue.catalogue_columns(into, items[0] if items else None, vocabulary, work.data.item_categories)


def _write_catalogue(work: Work, features: catalogue.CatalogueColumns, duration_s_N: np.ndarray) -> dict[str, int]:
    """Writes `catalogue.arrow` with what the shards tell of its items; what was set right in it."""
    first_seen_ms_N = np.full(len(duration_s_N), catalogue.NEVER_SEEN_MS, np.int64)
    longest_s_N = np.full(len(duration_s_N), np.nan, np.float32)
    for path in sorted((work.staging / "partials").glob("shard-*.arrow")):
        seen = catalogue.map_batch(path)
        row = seen["item_row"].to_numpy()
        first_seen_ms_N[row] = np.minimum(first_seen_ms_N[row], seen["first_seen_ms"].to_numpy())
        longest_s_N[row] = np.fmax(longest_s_N[row], seen["longest_duration_s"].to_numpy())
    features.write(work.staging / "sequences", np.where(np.isnan(duration_s_N), longest_s_N, duration_s_N),
                   first_seen_ms_N)
    return features.notes


def _warnings(data: DataConfig, statistics: dict) -> list[str]:
    warnings = []
    if statistics["null_watch_share"] == 1:
        warnings.append("watch_time_s is null on every row: no condition can be learnt from these logs")
    for name, count in (statistics["notes"] | statistics["catalogue_notes"]).items():
        warnings.append(f"{name}: {count:,} rows (read as false, unknown or the first of them)")
    late = (statistics["last_timestamp_ms"] - statistics["end_99_9_ms"]) / sequences.DAY_MS
    if late > 1:
        warnings.append(f"the last rows come {late:.1f} days after 99.9% of the logs: stragglers do not move the split")
    return warnings


def _move(source: Path, into: Path) -> None:
    for path in sorted(source.iterdir()):
        os.rename(path, into / path.name)


@contextmanager
def _progress(work: Work, say: Callable[[str], None]) -> Iterator[None]:
    """A line every few seconds, counted from the files that finished tasks leave."""
    done = threading.Event()

    def watch() -> None:
        began = time.monotonic()
        while not done.wait(PROGRESS_EVERY_S):
            names = [name for name in os.listdir(work.staging / "partials") if name.endswith(".json")]
            pieces = [p for p in work.pieces if f"piece-{p.index:05d}.json" in set(names)]
            say(f"ingest: read {len(pieces)}/{len(work.pieces)} pieces ({sum(p.rows for p in pieces):,} rows), wrote "
                f"{sum(name.startswith('shard-') for name in names)}/{work.shards} shards, "
                f"{time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
