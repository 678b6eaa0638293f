"""Damage to every kind of file of a run folder: cut short, or one bit turned.

A case is a copy of the untouched run in which the stages that read the file are undone, and the file is damaged. The
command that reads it then either comes to the untouched run's results, because what was damaged is made anew or the
checkpoint before is used, or it ends with one message that names the file. It never ends with a traceback, and never
with other results.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kills import Outcome
from results import Results
from tiny_run import TinyRun

CRM_RESULTS = ("evaluation/dnn",)
ROUTED = ("routing", "evaluation/routing/metrics.json")


@dataclass(frozen=True)
class Kind:
    """A kind of file. pattern: of the files, of which a seeded one is damaged. undone: stages whose markers go, so that
    the file is read again; removed: what of theirs goes too."""

    name: str
    pattern: str
    undone: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


AFTER_INGEST = ("replay",)
KINDS = (
    Kind("world logs", "world/logs/*.parquet", ("ingest",), ("sequences",)),
    Kind("world items", "world/items.parquet", ("ingest",), ("sequences",)),
    Kind("world description", "world/world.json", ("ingest",), ("sequences",)),
    Kind("events of a shard", "sequences/*.events.arrow", ("replay",)),
    Kind("users of a shard", "sequences/*.users.arrow", ("replay",)),
    Kind("catalogue", "sequences/catalogue.arrow", ("replay",)),
    Kind("vocabulary", "sequences/vocabulary/*.parquet", ("replay",)),
    Kind("manifest of the sequences", "sequences/manifest.json", ("replay",)),
    Kind("neighbours", "channels/*/*/neighbors.parquet", ("replay",)),
    Kind("manifest of a channel", "channels/*/*/manifest.json", ("replay",)),
    Kind("item statistics", "channels/item-statistics/*/statistics.parquet", ("routing",), ROUTED),
    Kind("labels", "labels/part-*.parquet", ("router",), ("evaluation/routing", "item_value")),
    Kind("manifest of the labels", "labels/manifest.json", ("router",), ("evaluation/routing", "item_value")),
    Kind("item values", "item_value/*.safetensors", ("routing",), ROUTED),
    Kind("scores of the router", "evaluation/routing/capts/seed=0/scores.parquet", ("routing",), ROUTED),
    Kind("manifest of the scores", "evaluation/routing/capts/seed=0/manifest.json", ("routing",), ROUTED),
    Kind("tables of the newest checkpoint", "checkpoints/dnn/seed=0/{newest}/tables-*.safetensors", ("crm",),
         CRM_RESULTS),
    Kind("towers of the newest checkpoint", "checkpoints/dnn/seed=0/{newest}/dense.safetensors", ("crm",), CRM_RESULTS),
    Kind("state of the newest checkpoint", "checkpoints/dnn/seed=0/{newest}/state.json", ("crm",), CRM_RESULTS),
    Kind("manifest of the newest checkpoint", "checkpoints/dnn/seed=0/{newest}/manifest.json", ("crm",), CRM_RESULTS),
    Kind("results beside the checkpoints", "checkpoints/dnn/seed=0/results.json", ("crm",), CRM_RESULTS),
    Kind("index", "indexes/dnn/seed=0/*/index.faiss", ("crm",), CRM_RESULTS),
    Kind("ids of the index", "indexes/dnn/seed=0/*/item_ids.parquet", ("crm",), CRM_RESULTS),
    Kind("manifest of the index", "indexes/dnn/seed=0/*/manifest.json", ("crm",), CRM_RESULTS),
    Kind("answers of an evaluation", "evaluation/dnn/seed=0/queries.parquet", ("evaluate",), ("metrics.json",)),
    Kind("control curve", "evaluation/dnn/seed=0/curve.json", ("evaluate",), ("metrics.json",)),
    Kind("summary of an evaluation", "evaluation/dnn/seed=0/summary.json", ("evaluate",), ("metrics.json",)),
    Kind("measures of routing", "evaluation/routing/metrics.json"),
    Kind("picks of a selector", "routing/*.parquet"),
    Kind("marker of a stage", "stages/*[a-z].json"),
    Kind("inputs of a stage", "stages/inputs/*.json"),
    Kind("outcome of the workers", "stages/*.outcome.json"),
    Kind("events", "events.jsonl", ("report",)),
    Kind("metrics", "metrics.json"),
    Kind("report", "report.html"),
    Kind("config of the run", "config.yaml"),
    Kind("pointer to what serves", "*/serving.json"),
)
CHEAP = ("metrics", "events", "report")  # what was damaged is made from files alone, without training


def cut(path: Path, rng: random.Random) -> str:
    """Cut a file short at a random place."""
    data = path.read_bytes()
    at = rng.randrange(len(data)) if data else 0
    path.write_bytes(data[:at])
    return f"cut to {at} of {len(data)} bytes"


def flip(path: Path, rng: random.Random) -> str:
    """Turn one random bit of a file."""
    data = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} turned"


WAYS: tuple[Callable[[Path, random.Random], str], ...] = (cut, flip)


def prepare(untouched: Path, run_dir: Path, kind: Kind) -> None:
    """A copy of the untouched run in which the stages that read this kind of file are not done."""
    shutil.copytree(untouched, run_dir)  # with its times: a world that is as old is the same input
    for stage in kind.undone:
        (run_dir / "stages" / f"{stage}.json").unlink()
    for name in kind.removed:
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def damaged(untouched: Path, kind: Kind, way: Callable, seed: int, run_dir: Path, reference: Results,
            name: str, overrides: tuple[str, ...] = ()) -> Outcome:
    """One file of this kind damaged, and the run started again."""
    began, outcome, rng = time.monotonic(), Outcome(name), random.Random(seed)
    prepare(untouched, run_dir, kind)
    newest = max((p.name for p in (run_dir / "checkpoints/dnn/seed=0").glob("step-*")),
                 key=lambda one: int(one.removeprefix("step-")), default="none")
    path = rng.choice(sorted(run_dir.glob(kind.pattern.format(newest=newest))))
    outcome.where.append(f"{path.relative_to(run_dir)} {way(path, rng)}")
    left = path.read_bytes()
    run, outcome.starts, outcome.counted = TinyRun(run_dir, *overrides), 1, 1
    try:
        code = run.wait()
        said = run.output
        outcome.wrong += [f"still there: {one}" for one in run.left()]
        if "Traceback (most recent call last)" in said:
            outcome.wrong.append(f"a traceback: {said[-700:]}")
        elif code == 0:
            outcome.where.append("made anew" if path.exists() and path.read_bytes() != left else "kept")
            outcome.wrong += _differences(reference, run_dir, kind)
        elif code in (1, 2) and path.name in said:
            told = next(line for line in said.splitlines() if path.name in line)
            outcome.where.append(f"exit {code}: {told.replace(str(run_dir), '')[:160]}")
        else:
            outcome.wrong.append(f"exit code {code}, and no message names {path.name}: {said[-700:]}")
    except Exception as error:
        outcome.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        run.end()
    outcome.seconds = time.monotonic() - began
    return outcome


def _differences(reference: Results, run_dir: Path, kind: Kind) -> list[str]:
    try:
        results = Results(run_dir)
        if kind.pattern == "events.jsonl":  # the log itself: what is lost of it stays lost, and nothing else may be
            results.losses, results.wrong = reference.losses, []
        return reference.differences(results)
    except (OSError, json.JSONDecodeError) as error:
        return [f"exit code 0, but {error}"]
