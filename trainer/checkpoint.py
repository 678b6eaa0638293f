"""Checkpoints: tables, towers, both optimizers and the place in the data, whole or not there at all.

    checkpoints/<model>/seed=<s>/step-<global step>/
        tables-*              each worker's blocks of the tables and their momentum (embeddings/table_state.py)
        dense.*               every tower parameter and moment, whole (trainer/engine.py)
        pending.safetensors   what an index that was being built then is made of; only there if one was
        state.json            epoch, step of the epoch, global step, what identifies the run, results so far, and the
                              version of the index that is pending
        manifest.json         sizes and checksums of all files

Training stands still while all workers copy their state to host memory. A thread of each then writes its share into
one folder beside the target, with a marker once it is whole; the thread of the first one waits for all markers, seals
the folder and renames it. No file holds a pickle, and nothing depends on how many workers wrote it.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import Tensor

from configs.errors import InputError, LostError, WatchtowerError
from embeddings import elsewhere
from embeddings.snapshots import bring, manifests_in, publish_from, remove, says_disk_full, verify
from embeddings.table_state import TableState, capture_state, load_tables, write_state
from embeddings.tables import ShardedTables
from embeddings.untrusted import damaged, read_json
from trainer.engine import (
    DenseEngine,
    EngineSpec,
    gather_dense,
    load_dense_optimizer,
    load_dense_parameters,
    write_dense,
)
from trainer.watchdog import Movement, moved
from trainer.workers import Workers

STATE, PENDING = "state.json", "pending.safetensors"
CLOSING_S = 60.0
"""Seconds that a worker which ends with an error leaves a save that is under way: it would be good to have. Of several
workers the others end sooner (trainer/watchdog.py, PATIENCE_S), and Ray ends the group with them."""

TURN_S = 5.0
"""Seconds after which workers that wait for a save tell each other whether it goes on, and gets on."""

WRITTEN = ".written"
_NAME, _WRITING = re.compile(r"step-(\d{1,18})", re.ASCII), re.compile(r"\.step-.+\.writing", re.ASCII)
_POLL_S = 0.05


@dataclass(frozen=True)
class Content:
    """What one worker puts into a checkpoint, in host memory: training may go on. `dense`, `state` and `arrays` are
    the first worker's alone.

    dense: towers and moments by name. optimizer_step: of the towers. spec: of their engine.
    state: JSON; `state["global_step"]` names the checkpoint. The RNG streams of a run are functions of (seed, epoch,
    step, rank), so the position is all of their state. arrays: of a pending index, empty without one.
    """

    tables: TableState
    dense: Mapping[str, Tensor]
    optimizer_step: int
    spec: EngineSpec
    state: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


class CheckpointSaver:
    """Saves the checkpoints of one training behind its back, one at a time.

    All collectives are in `save`, `wait` and `raise_together`, which are for the training's own thread. Threads of
    different workers meet through files.

    Args:
        parent: the folder of checkpoints. keep_newest: how many are left beside those that a save names.
        limit_s: seconds that the first worker's thread waits for the shares of the others, once its own is written.
    """

    def __init__(self, parent: Path, workers: Workers, *, keep_newest: int, limit_s: float):
        self._parent, self._workers, self._keep_newest, self._limit_s = parent, workers, keep_newest, limit_s
        self._thread: threading.Thread | None = None
        self._deadline = math.inf
        self.error: WatchtowerError | None = None
        """What this worker's part of a save ended with; the others do not know of it yet."""
        for name in elsewhere.names(parent) if workers.first else ():
            if _WRITING.fullmatch(name):  # by a run that was killed
                remove(parent / name)

    def save(self, tables: ShardedTables, engine: DenseEngine, state: Mapping[str, Any],
             arrays: Mapping[str, np.ndarray], *, also: Set[Path], told: Callable[..., None]) -> None:
        """Begins the checkpoint of this moment; returns as soon as it is copied. Collective.

        Args:
            state, arrays: see `Content`; the first worker's count.
            also: checkpoints that are kept whatever their age; the first worker's count.
            told: called with waited_s (for the save before), copy_s and write_s once the checkpoint stands, on the
                first worker's thread.

        Raises:
            WatchtowerError: what the save before ended with, or no folder could be made; on all workers.
        """
        waited_s = _seconds(self.wait)
        began = time.perf_counter()
        folder = self._parent / f"step-{state['global_step']}"
        writing = self._workers.agree(self._workers.on_first(lambda: _new_folder(folder)))
        dense, optimizer_step = gather_dense(engine)
        content = Content(capture_state(tables), dense, optimizer_step, engine.spec, state, arrays)
        copy_s = time.perf_counter() - began
        self._deadline = math.inf

        def act() -> None:
            if not self._workers.first:
                _write_share(content, writing, self._workers.rank)
                return
            write_s = _seconds(lambda: self._write(content, writing, folder))
            prune(self._parent, self._keep_newest, set(also), until=state["global_step"])
            told(waited_s=waited_s, copy_s=copy_s, write_s=write_s)

        def guarded() -> None:
            try:
                act()
            except Exception as error:  # whatever it is, all workers shall hear of it in their own time
                self.error = _as_ours(error, folder)

        self._thread = threading.Thread(target=guarded, name="watchtower-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save that is under way stands, if there is one. Collective.

        Raises:
            WatchtowerError: what it ended with, on any worker; on all of them.
        """
        is_going_on = self._thread is not None
        while is_going_on:
            # In short turns: a disk may take longer than a collective may, and the first worker's thread would wait
            # for the share of one that failed.
            movement = Movement()
            self._thread.join(TURN_S)
            told = self._workers.everybody((self._thread.is_alive(), movement.seen()), moves=False)
            is_going_on = any(is_alive for is_alive, _ in told)
            if not is_going_on or any(gets_on for _, gets_on in told):
                moved()
            self.raise_together()
        self._thread = None

    def raise_together(self) -> None:
        """Raises on all workers what a save ended with on any of them, as far as it is known. Collective."""
        try:
            self._workers.raise_together(self.error)
        except WatchtowerError:
            self._deadline = -math.inf  # what is missing will not come
            raise

    def close(self) -> None:
        """Ends the thread, or leaves it behind after CLOSING_S; raises nothing. Not collective: after an error the
        others may be gone, so a save that is under way has that long to hear of their shares."""
        if self._thread is not None:
            self._deadline = min(self._deadline, time.monotonic() + CLOSING_S)
            self._thread.join(CLOSING_S)
            self._thread = None

    def _write(self, content: Content, writing: Path, folder: Path) -> None:
        """The first worker's share, the end of all others', and the checkpoint."""
        state = dict(content.state)
        try:
            _write_share(content, writing, 0)
            moved()
            with elsewhere.workshop(writing) as here:
                write_dense(here, dict(content.dense), content.optimizer_step, content.spec,
                            {"global_step": state["global_step"]})
                moved()
                if content.arrays:
                    safetensors.numpy.save_file(dict(content.arrays), here / PENDING)
                (here / STATE).write_text(json.dumps(state, indent=1))
            self._await_shares(writing)
            moved()
            publish_from(writing, folder, {"kind": "checkpoint", "global_step": state["global_step"],
                                           "workers": self._workers.count}, but=WRITTEN)
        finally:
            elsewhere.take_away(writing)

    def _await_shares(self, writing: Path) -> None:
        missing, until = list(range(self._workers.count)), time.monotonic() + self._limit_s
        while missing := [rank for rank in missing if not _is_written(writing, rank)]:
            if time.monotonic() > min(until, self._deadline):
                raise WatchtowerError(f"{writing}: worker {missing[0]} did not write its share in time; this "
                                      "checkpoint is not there, the one before it is untouched")
            time.sleep(_POLL_S)


def _seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _new_folder(folder: Path) -> Path:
    """An empty folder beside a checkpoint-to-be. Its name is its own: a worker of an attempt that was cut off and
    lives on writes into another one.

    Raises:
        WatchtowerError: it cannot be made.
    """
    writing = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.writing")
    try:
        elsewhere.make_folder(writing)
    except OSError as error:
        raise _as_ours(error, folder) from error
    return writing


def _write_share(content: Content, writing: Path, rank: int) -> None:
    """A worker's blocks of the tables, then the marker that says how large their files are."""
    with elsewhere.workshop(writing) as here:
        write_state(content.tables, here, rank)
        sizes = {path.name: path.stat().st_size for path in here.glob(f"tables-rank{rank}.*")}
    with elsewhere.workshop(writing) as here:
        partial = here / f"rank{rank}.partial"
        partial.write_text(json.dumps(sizes))
        partial.rename(_marker(here, rank))


def _is_written(writing: Path, rank: int) -> bool:
    """Whether a worker's share is here whole: a shared file system may show a marker before what it speaks of."""
    try:
        sizes = read_json(_marker(writing, rank))
        return all(elsewhere.size(writing / name) == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError):
        return False


def _marker(writing: Path, rank: int) -> Path:
    return writing / f"rank{rank}{WRITTEN}"


def _as_ours(error: Exception, folder: Path) -> WatchtowerError:
    """An error that all workers can be told."""
    if isinstance(error, WatchtowerError):
        return error
    if isinstance(error, elsewhere.Away):
        return LostError(str(error))
    if says_disk_full(error):
        return InputError(f"{folder}: the disk is full; this checkpoint is not there, the one before it is untouched. "
                          "Make room and run again, it goes on from there")
    return WatchtowerError(f"{folder}: the checkpoint could not be written ({error!r}); the one before it is untouched")


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after all its files were checked.

    Raises:
        WatchtowerError: if the checkpoint is damaged; the message names the file.
    """
    manifest = verify(folder)
    for name in (STATE, "dense.safetensors", "dense.json", "tables-rank0.safetensors", "tables-rank0.json"):
        if name not in manifest["files"]:
            raise WatchtowerError(f"{folder / 'manifest.json'}: damaged, it does not name {name}")
    try:
        state = read_json(folder / STATE)
        if not all(isinstance(state[name], int) for name in ("epoch", "step", "global_step")):
            raise ValueError("the position is not of whole numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WatchtowerError(f"{folder / STATE}: damaged ({error})") from error
    return state


def read_pending(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the index that was pending; empty where there are none. Check the folder before.

    Raises:
        WatchtowerError: the file is no safetensors file, or of a type that numpy does not have.
    """
    path = folder / PENDING
    try:
        return safetensors.numpy.load_file(path) if path.exists() else {}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error, "remove this checkpoint; training goes on from the one before") from error


def checkpoints(parent: Path) -> list[Path]:
    """Checkpoints, oldest first. They came whole; whether they still are, `read_state` tells."""
    manifests_in(parent)
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()
             and not path.is_symlink()]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def have(folder: Path, workers: Workers) -> None:
    """Have a checkpoint that was checked on every worker's node; what was pruned goes there. Collective: before any
    other one, as nodes that must bring it take as long as their network does."""
    if not any(workers.everybody(elsewhere.of(folder) is not None)):
        return
    failed: list[WatchtowerError] = []

    def act() -> None:
        try:
            manifests_in(folder.parent)
            bring(folder)
        except Exception as error:
            failed.append(_as_ours(error, folder))

    thread = threading.Thread(target=act, name="watchtower-bring", daemon=True)
    thread.start()
    is_going_on = True
    while is_going_on:  # in short turns: a collective has a time limit
        movement = Movement()
        thread.join(TURN_S)
        told = workers.everybody((thread.is_alive(), movement.seen()), moves=False)
        is_going_on = any(is_alive for is_alive, _ in told)
        if not is_going_on or any(gets_on for _, gets_on in told):
            moved()
    workers.raise_together(failed[0] if failed else None)


def load_before_engine(folder: Path, tables: ShardedTables, module: torch.nn.Module) -> None:
    """Tables with their momentum and tower parameters; the towers must not be in an engine yet. Collective."""
    load_tables(tables, folder)
    load_dense_parameters(module, folder)


def load_into_engine(folder: Path, engine: DenseEngine) -> None:
    """The towers' optimizer state, into the fresh engine. Collective."""
    load_dense_optimizer(engine, folder)


def prune(parent: Path, keep_newest: int, also: Set[Path], *, until: int) -> None:
    """Deletes all checkpoints up to the step `until` but the newest of them and those in `also`. What lies behind is of
    a run that got further and was damaged: it must not count as one of the newest.

    Raises:
        Superseded: this process acts for an attempt that was cut off; a successor's checkpoints are none of its own.
    """
    found = [path for path in checkpoints(parent) if _step_of(path) <= until]
    for path in found[:-keep_newest]:
        if path not in also:
            remove(path)
