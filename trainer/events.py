"""What a run says of itself: `events.jsonl`, TensorBoard, and one line a log step on the console.

Every process of a run appends to one file. A line is one JSON object, written by a single `write` to a file opened
for appending, so that lines of several processes never mix:

    {"event": "train_step", "time": 1767225600.0, "model": "dnn/seed=0", "step": 20, "loss": 4.1, .., "crc": "8f3a01c2"}

`time` is Unix time in seconds, `node` the host that wrote, `rank` the training worker (none: the driver). A number
that JSON cannot hold (nan, inf) is null, and its name and text stand in `not_finite`:
{"loss": null, "not_finite": {"loss": "nan"}}. A process that dies in mid-line leaves a torn line; the next writer
starts a new one, and readers pass over it. `crc` is the CRC-32 of the line without it, in hexadecimal: readers pass
over a line that is not what was written, as over a torn one, and events that they hand out have no `crc`.

The driver shows what workers write: `follow` reads the file as it grows.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import InputError, WatchtowerError
from configs.secrets import redact
from embeddings import elsewhere
from embeddings.untrusted import parse_json

POLL_S = 0.2
CURVES_EVERY_S = 30.0  # and at the end: curves go to the run folder's own node, where that is another one
_SEAL = b',"crc":"%08x"}'
_SEALED = re.compile(rb',"crc":"([0-9a-f]{8})"\}\r?\n?\Z')
_NOT_CURVES = {"time", "epoch", "epochs", "step", "steps", "seed", "rank", "worker"}


# --- writing ----------------------------------------------------------------------------------------------------------

def _jsonable(value: Any, name: str, not_finite: dict[str, str]) -> Any:
    """`value` as JSON can hold it; what is not finite becomes None and is noted under its dotted name."""
    if isinstance(value, str):
        return redact(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        not_finite[name] = str(value)
        return None
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v, f"{name}.{k}" if name else str(k), not_finite) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(v, f"{name}.{i}", not_finite) for i, v in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _jsonable(value.tolist(), name, not_finite)
    return redact(str(value))


def event_line(event: str, fields: Mapping[str, Any]) -> bytes:
    """One line of events.jsonl, with its newline."""
    not_finite: dict[str, str] = {}
    record = {"event": event, "time": round(time.time(), 3), **_jsonable(fields, "", not_finite)}
    if not_finite:
        record["not_finite"] = not_finite
    return sealed(json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
                  .encode("utf-8", "replace"))


def sealed(record: bytes) -> bytes:
    """A JSON object, as text, with its CRC-32 as the last key and a newline behind it."""
    return record[:-1] + _SEAL % zlib.crc32(record) + b"\n"


class EventLog:
    """Appends events to a file, and numbers of the same events to TensorBoard.

    Any number of processes may hold one on the same file. TensorBoard curves go to `<tensorboard>/<model>/`; let one
    process (rank 0) have them. Without the TensorBoard package the curves are left out.

    Args:
        path: the run's events.jsonl; made, with its folder, if it is not there.
        tensorboard: folder of TensorBoard's files; None is off.
        rank: of the training worker that writes; None: the driver.
    """

    def __init__(self, path: str | os.PathLike, tensorboard: str | os.PathLike | None = None, rank: int | None = None):
        self.path = Path(path)
        self._writer = {"node": socket.gethostname(), **({} if rank is None else {"rank": rank})}
        self.tensorboard = None if tensorboard is None else Path(tensorboard)
        self._writers: dict[str, Any] = {}
        self._there, self._curves_at, self._opened_at = elsewhere.of(self.path), time.monotonic(), time.time()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Numbers among the fields of an event with a `step` become curves.

        Raises:
            InputError: if the disk is full.
        """
        if self._descriptor is None:
            raise WatchtowerError(f"{self.path}: the event log is closed")
        data = event_line(event, {**fields, **self._writer})
        try:
            if self._there is not None:
                self._there.append(self.path, data)
            else:
                written = os.write(self._descriptor, data)
                if written < len(data):  # a disk that fills takes a part; say so on the rest
                    os.write(self._descriptor, data[written:])
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(f"{self.path}: the disk is full; free some space and run again") from error
            raise
        if self.tensorboard is not None and fields.get("step") is not None:
            self._write_curves(event, fields)

    def _write_curves(self, event: str, fields: Mapping[str, Any]) -> None:
        model, step = str(fields.get("model") or "run"), int(fields["step"])
        if model not in self._writers:
            self._writers[model] = _summary_writer(self.tensorboard / model, step)
        writer = self._writers[model]
        if writer is None:
            return
        for name, value in fields.items():
            number = value.item() if hasattr(value, "item") and getattr(value, "size", None) != 0 else value
            if name not in _NOT_CURVES and isinstance(number, (int, float)) and not isinstance(number, bool):
                writer.add_scalar(f"{event}/{name}", number, step)
        if time.monotonic() - self._curves_at > CURVES_EVERY_S:
            self._hand_curves_over()

    def _hand_curves_over(self) -> None:
        """The curves' files, where the run folder lies on another node."""
        self._curves_at = time.monotonic()
        if self._there is None or self.tensorboard is None:
            return
        with contextlib.suppress(Exception):  # a curve is no reason to end a run
            for path in self.tensorboard.rglob("events.*"):
                if path.stat().st_mtime >= self._opened_at:  # its own, and not what an earlier group left on this node
                    self._there.deliver(path, path)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        for writer in self._writers.values():
            if writer is not None:
                writer.close()
        if self._writers:
            self._hand_curves_over()
        self._writers.clear()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _summary_writer(folder: Path, first_step: int) -> Any:
    """A TensorBoard writer, or None where no package for it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return None
    # A continued run repeats the steps since its checkpoint: TensorBoard then forgets the first telling of them.
    return SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)


# --- reading ----------------------------------------------------------------------------------------------------------

def _parse(line: bytes) -> dict[str, Any] | None:
    seal = _SEALED.search(line)
    if seal is None:
        return None
    whole = line[:seal.start()] + b"}"
    if zlib.crc32(whole) != int(seal[1], 16):
        return None
    try:
        record = parse_json(whole)
    except ValueError:
        return None
    return record if isinstance(record.get("event"), str) else None


def read_events(path: str | os.PathLike, event: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of a file in the order written, all or those of one name; lines that are torn or damaged are
    passed over."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None and (event is None or record["event"] == event):
                yield record


def follow(path: str | os.PathLike, stop: threading.Event, show: Callable[[str], None] | None = None,
           start: int | None = None, line_of: Callable[[Mapping[str, Any]], str | None] | None = None
           ) -> threading.Thread:
    """Show the console line of every event that is appended from now on, on a thread, until `stop` is set.

    What was written before `stop` was set is still shown. Join the thread to wait for that.

    Args:
        path: an events.jsonl that may not be there yet.
        show: takes a line without newline; the default prints it.
        start: byte offset to begin at; None: the present end of the file.
        line_of: the line of an event, None for one that is not shown; the default is `console_line`.
    """
    line_of = line_of or console_line
    def take(event: dict[str, Any]) -> None:
        text = line_of(event)
        if text is not None:
            (show or _print)(text)

    path = Path(path)
    if start is None:
        start = path.stat().st_size if path.exists() else 0
    return follow_events(path, stop, take, start)


def _print(line: str) -> None:
    print(line, flush=True)


def follow_events(path: str | os.PathLike, stop: threading.Event, take: Callable[[dict[str, Any]], None],
                  start: int = 0) -> threading.Thread:
    """Hand every event from byte `start` on to `take`, on a thread, until `stop` is set; what was written before that
    is still handed over. Join the thread to wait for it."""
    thread = threading.Thread(target=_follow, args=(Path(path), stop, take, start), daemon=True,
                              name="watchtower-events")
    thread.start()
    return thread


def _follow(path: Path, stop: threading.Event, take: Callable[[dict[str, Any]], None], offset: int) -> None:
    held = b""
    while True:
        last_look = stop.is_set()
        if path.exists():
            with path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < offset:  # another file took its place
                    offset, held = 0, b""
                file.seek(offset)
                fresh = file.read()
            offset += len(fresh)
            *whole, held = (held + fresh).split(b"\n")
            for line in whole:
                record = _parse(line)
                if record is not None:
                    take(record)
        if last_look:
            return
        stop.wait(POLL_S)


# --- the console ------------------------------------------------------------------------------------------------------

def seconds_text(seconds: float) -> str:
    """A length of time for people: 8 s, 2 min 05 s, 3 h 20 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count_text(value: float) -> str:
    """A count for people: 950, 12.3k, 4.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def _of(part: Any, whole: Any) -> str:
    return f"{part}/{whole}" if whole is not None else f"{part}"


def _train_step(e: Mapping[str, Any]) -> str:
    loss = (e.get("not_finite") or {}).get("loss")
    parts = [str(e.get("model", "")), f"epoch {_of(e.get('epoch', '?'), e.get('epochs'))}",
             f"step {_of(e.get('step', '?'), e.get('steps'))}"]
    if loss is not None or e.get("loss") is not None:
        parts.append(f"loss {loss if loss is not None else format(e['loss'], '.4f')}")
    if e.get("rows_per_s") is not None:
        parts.append(f"{count_text(e['rows_per_s'])} rows/s")
    if e.get("wait_share") is not None:
        parts.append(f"waiting for data {e['wait_share']:.0%}")
    if e.get("memory_mib") is not None:
        parts.append(f"{e['memory_mib']:,.0f} MiB")
    if e.get("eta_s") is not None:
        parts.append(f"{seconds_text(e['eta_s'])} left")
    return "  ".join(part for part in parts if part)


def _stage(e: Mapping[str, Any]) -> str:
    parts = [f"{e.get('stage')}: {e.get('status')}"]
    if e.get("seconds") is not None:
        parts.append(f"{'in' if e.get('status') == 'done' else 'after'} {seconds_text(e['seconds'])}")
    if e.get("rows") is not None:
        parts.append(f"{e['rows']:,} rows")
    if e.get("peak_mib") is not None:
        parts.append(f"at most {e['peak_mib']:,.0f} MiB")
    return "  ".join(parts + [str(e[key]) for key in ("why", "error") if e.get(key) is not None])


_HIDDEN = {"event", "time", "model", "not_finite", "inputs", "rank", "node"}
_NAMELESS = {"path", "folder", "message"}


def console_line(event: Mapping[str, Any]) -> str | None:
    """The line a person sees for an event, None for one that is not shown.

    `train_step` shows model, epoch, step, loss, rows/s, the share of time spent waiting for data, memory and the time
    left; any other event its name and its plain values. An event with `"show": false` is not shown.
    """
    if event.get("show") is False:
        return None
    if event["event"] == "train_step":
        return _train_step(event)
    if event["event"] == "stage":
        return _stage(event)
    if event["event"] == "cluster":
        return str(event.get("cluster"))
    words = [str(event["model"])] if event.get("model") else []
    words.append(str(event["event"]))
    for name, value in event.items():
        if name in _HIDDEN or value is None or isinstance(value, (dict, list)):
            continue
        if "ndcg@" in name or "hit_rate@" in name:  # the file has them; a line has room for recall
            continue
        if name == "seconds" or name.endswith("_s"):
            value = seconds_text(value) if isinstance(value, (int, float)) and value >= 60 else f"{value:.3g} s" \
                if isinstance(value, (int, float)) else value
            name = name.removesuffix("_s")
        elif isinstance(value, float):
            value = f"{value:.4g}"
        words.append(f"{name} {value}" if name not in _NAMELESS else str(value))
    for name, text in (event.get("not_finite") or {}).items():
        words.append(f"{name} {text}")
    return "  ".join(words)


# --- rates ------------------------------------------------------------------------------------------------------------

class StepClock:
    """How fast training goes: rows a second, the share of time spent waiting for data, and the time left.

        clock = StepClock(steps=800)
        for ...:
            with clock.waiting():
                batch = next(batches)
            ...
            clock.step(rows=64)
            if it is time to log:
                log.write("train_step", **clock.rates(), ...)

    Args:
        steps: steps in all, for the time left; None leaves it out.
        done: steps that were done before (a continued run).
    """

    _WEIGHT = 0.4  # of the newest window in the smoothed time of a step

    def __init__(self, steps: int | None, done: int = 0, now: Callable[[], float] = time.perf_counter):
        self.steps, self.done = steps, done
        self._now = now
        self._step_s: float | None = None
        self._open_window()

    def _open_window(self) -> None:
        self._start, self._waited, self._rows, self._window_steps = self._now(), 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        begin = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - begin

    def step(self, rows: int) -> None:
        """One step over `rows` rows is done."""
        self.done += 1
        self._window_steps += 1
        self._rows += rows

    def restart(self) -> None:
        """Leave out what passed since the last `rates` (a checkpoint, an evaluation)."""
        self._open_window()

    def rates(self) -> dict[str, float]:
        """rows_per_s, wait_share (0 to 1), step_s and eta_s (seconds) since the last call; {} if no step was done."""
        elapsed = self._now() - self._start
        if not self._window_steps or elapsed <= 0:
            return {}
        step_s = elapsed / self._window_steps
        self._step_s = step_s if self._step_s is None else self._step_s + self._WEIGHT * (step_s - self._step_s)
        found = {"rows_per_s": self._rows / elapsed, "wait_share": min(1.0, self._waited / elapsed), "step_s": step_s}
        if self.steps is not None:
            found["eta_s"] = max(0, self.steps - self.done) * self._step_s
        self._open_window()
        return found


def give_back_memory() -> None:
    """Hands pages that are free in the C heap back to the system.

    glibc keeps what a model has let go of, spread over the arenas of threads that are gone: some 100 MiB a model of the
    KuaiRand run, so a worker that trains 24 of them would grow to several GiB without a leak.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have none
    if trim is not None:
        trim(0)


def memory_mib() -> float:
    """Memory of this process in MiB: on a GPU the most that its tensors took, else the resident set."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
