"""Checkpoints: tables, towers, both optimizers and the place in the data, whole or not there at all.

    checkpoints/<model>/seed=<s>/step-<global step>/
        tables-*        each worker's blocks of the tables and their momentum (embeddings/table_state.py)
        dense.*         every tower parameter and moment, whole (trainer/engine.py)
        state.json      epoch, step of the epoch, global step, what identifies the run, results so far
        manifest.json   sizes and checksums of all files

All workers write into one folder beside the target; the first one seals and renames it. No file holds a pickle, and
nothing depends on how many workers wrote it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embeddings.snapshots import publish, verify
from embeddings.table_state import load_tables, save_tables
from embeddings.tables import ShardedTables
from trainer.engine import DenseEngine, load_dense_optimizer, load_dense_parameters, save_dense
from trainer.workers import Workers


def save_checkpoint(folder: Path, tables: ShardedTables, engine: DenseEngine, state: dict[str, Any],
                    workers: Workers) -> Path:
    """Writes `folder` (".../step-<n>"), collectively.

    Args:
        state: JSON; `state["global_step"]` names the checkpoint. The RNG streams of a run are functions of (seed,
            epoch, step, rank), so the position is all of their state.
    """
    writing = folder.with_name(f".{folder.name}.writing")
    if workers.first:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    workers.barrier()
    save_tables(tables, writing, workers.rank)
    save_dense(engine, writing, {"global_step": state["global_step"]})
    workers.barrier()
    if workers.first:
        (writing / "state.json").write_text(json.dumps(state, indent=1))
        publish(folder, _moved_from(writing), {"kind": "checkpoint", "global_step": state["global_step"],
                                               "workers": workers.count}, replace=True)
        shutil.rmtree(writing, ignore_errors=True)
    workers.barrier()
    return folder


def _moved_from(writing: Path) -> Callable[[Path], None]:
    def move(attempt: Path) -> None:
        for path in sorted(writing.iterdir()):
            path.rename(attempt / path.name)
    return move


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after all its files were checked.

    Raises:
        WatchtowerError: if the checkpoint is damaged; the message names the file.
    """
    verify(folder)
    return json.loads((folder / "state.json").read_text())


def checkpoints(parent: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if path.name.startswith("step-") and (path / "manifest.json").exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_before_engine(folder: Path, tables: ShardedTables, module: torch.nn.Module) -> None:
    """Tables with their momentum and tower parameters; the towers must not be in an engine yet. Collective."""
    load_tables(tables, folder)
    load_dense_parameters(module, folder)


def load_into_engine(folder: Path, engine: DenseEngine) -> None:
    """The towers' optimizer state, into the fresh engine. Collective."""
    load_dense_optimizer(engine, folder)


def prune(parent: Path, keep_newest: int, also: set[Path]) -> None:
    """Deletes all checkpoints but the newest and those in `also`."""
    for path in checkpoints(parent)[:-keep_newest]:
        if path not in also:
            shutil.rmtree(path)
