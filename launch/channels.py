"""The channels stage: a snapshot of every channel at every watermark, spread over a Ray cluster or done here.

    sequences ── co-views of a watermark ──┬─ swing ────── publish
                 (a task a watermark;      ├─ embedding ── publish      (a task a channel and watermark)
                  mapped files)            └─ ..
              └─ item statistics of a watermark ── publish

The tasks are the same plain functions under either executor. A snapshot that is there, whole and made from the same
logs and config, is kept; one made from others, or at a watermark that is not asked for now, goes: a request must not
see it. A task on a node that does not share the run folder works through launch/nodes.py.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.errors import QualityGateError, WatchtowerError
from configs.schema import Config
from embeddings import elsewhere
from embeddings.attempts import Attempt, acts_for
from embeddings.snapshots import Snapshot, list_snapshots, read_manifest, remove, verify
from launch.nodes import at_work
from trainer import item_statistics
from trainer.channels import CHANNELS, Given, absent_channels, build_channel, made_from, present_channels, watermarks
from trainer.co_views import CoViews
from trainer.neighbors import NeighborLists, publish_neighbors
from trainer.sequences import SequenceStore
from trainer.watchdog import moved

STATISTICS_FORMAT = 2
_UNFINISHED = ".co-views."
REJECTED = "rejected"  # beside a channel's snapshots: those below their gate, where no reader looks


class Executor(Protocol):
    """Who runs the tasks: any order of results; a task's own error is raised."""

    def run(self, tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
        """What each task returns, as soon as it has."""


class SerialExecutor:
    """One after the other in this process, each with `threads` threads."""

    def __init__(self, threads: int = 1):
        self.threads = threads

    def run(self, tasks):
        for task in tasks:
            yield task()


class RayExecutor:
    """As tasks of the cluster that `ray.init` has joined, each with so many CPUs, and as many threads as whole ones."""

    def __init__(self, cpus: float = 1.0):
        self.cpus, self.threads = cpus, max(1, int(cpus))

    def run(self, tasks):
        import ray

        remote = ray.remote(num_cpus=self.cpus, max_retries=2)(_call)
        waiting = [remote.remote(acts_for(), task) for task in tasks]
        try:
            while waiting:
                done, waiting = ray.wait(waiting)
                moved("a task of the channels")
                try:
                    yield from ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    # Ray raises a class of its own and ours, with a traceback for a message.
                    raise (error.cause if isinstance(error.cause, WatchtowerError) else error) from None
        finally:
            for task in waiting:
                ray.cancel(task)


def _call(attempt: Attempt | None, task: Callable[[], Any]) -> Any:
    with at_work(attempt):
        return task()


@dataclass(frozen=True)
class Work:
    """All that a task needs to know; it travels to the workers."""

    config: Config
    run_dir: Path
    scratch: Path
    threads: int

    @property
    def channels(self) -> Path:
        return self.run_dir / "channels"

    def open(self) -> SequenceStore:
        return SequenceStore(self.run_dir / "sequences")

    def given(self, store: SequenceStore) -> Given:
        return Given(self.config.channels, store.catalogue, self.run_dir / "indexes", self.threads)


def build_channels(config: Config, run_dir: Path | str, executor: Executor | None = None,
                   say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Publish the snapshots of config.channels and the item statistics that are not there yet.

    Args:
        executor: None takes the Ray that this process has joined, or this process where it has joined none.
        say: where progress lines go; None prints them.

    Returns:
        For stages/channels.json: rows (items with a list, over all snapshots), watermarks, channels {name: seconds (of
        building, added up), snapshots, kept, items and neighbors (of the newest snapshot), and the counts of its
        manifest}, item_statistics {seconds, snapshots, kept}, co_views_seconds, absent {name: reason}.

    Raises:
        InputError: no sequences, or a channel's source is missing.
    """
    run_dir, say = Path(run_dir), say or _print
    executor = executor or (RayExecutor(config.ray.channels_cpus) if _on_ray()
                            else SerialExecutor(len(os.sched_getaffinity(0))))
    store = SequenceStore(run_dir / "sequences")
    absent, at = absent_channels(config, store), watermarks(config, store.manifest)
    names = present_channels(config, store)
    for name, reason in absent.items():
        say(f"channels: {name} is absent: {reason}")
    scratch = run_dir / "channels" / f"{_UNFINISHED}{uuid.uuid4().hex[:8]}.tmp"
    scratch.parent.mkdir(parents=True, exist_ok=True)
    for left in scratch.parent.glob(f"{_UNFINISHED}*.tmp"):  # the run folder has one writer: nobody else is at work
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir()
    work = Work(config, run_dir, scratch, getattr(executor, "threads", 1))
    _drop_channels(work, set(absent))
    kept = _kept(work, store, names, at)
    try:
        seconds = _build(work, executor, [(name, w) for w in at for name in names if (name, w) not in kept],
                         [w for w in at if (item_statistics.NAME, w) not in kept], say)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _summary(work, names, at, absent, kept, seconds)


def _build(work: Work, executor: Executor, snapshots: list[tuple[str, int]], statistics: list[int],
           say: Callable[[str], None]) -> dict[str, float]:
    """Run the tasks; seconds by channel, of item statistics, and of the views under ''."""
    seconds: dict[str, float] = {}
    began, total = time.monotonic(), len(snapshots) + len(statistics)
    done = 0
    first = [partial(write_views, work, w) for w in dict.fromkeys(w for _, w in snapshots)]
    first += [partial(publish_statistics, work, w) for w in statistics]
    second = [partial(publish_channel, work, name, w) for name, w in snapshots]
    for tasks in (first, second):
        for name, took, line in executor.run(tasks):
            seconds[name] = seconds.get(name, 0.0) + took
            if line:
                done += 1
                say(f"channels: {line}, {took:.1f} s ({done}/{total}, {time.monotonic() - began:.0f} s in all)")
    return seconds


# ------------------------------------------------------------------------------------------------------------ tasks

def write_views(work: Work, watermark_ms: int) -> tuple[str, float, str]:
    """Leave the co-views of a watermark as mapped files in the attempt's folder."""
    began = time.perf_counter()
    folder = work.scratch / str(watermark_ms)
    elsewhere.take_away(folder)  # of a try that Ray gave up
    elsewhere.make_folder(folder)
    with elsewhere.workshop(folder) as here:
        CoViews.build(work.open(), watermark_ms, work.config.channels.window_h, here)
    return "", time.perf_counter() - began, ""


def publish_channel(work: Work, name: str, watermark_ms: int) -> tuple[str, float, str]:
    """Build and publish one snapshot of a channel, from the co-views in the attempt's folder."""
    began = time.perf_counter()
    store = work.open()
    given = work.given(store)
    manifest = made_from(name, watermark_ms, _fingerprint(store), given)
    elsewhere.bring_folder(work.scratch / str(watermark_ms))
    built = build_channel(name, CoViews.open(work.scratch / str(watermark_ms)), given)
    items, seen = int((built.lists.length_N > 0).sum()), _items_seen(store, watermark_ms)
    failed = failed_channel_gate(items, seen, built.lists, work.config.channels.min_items_with_list)
    folder = work.channels / name if failed is None else work.channels / name / REJECTED
    published = publish_neighbors(folder, watermark_ms, built.lists, store.vocabulary,
                                  {**manifest, "counts": dict(built.facts)}, replace=True)
    if failed is not None:
        raise QualityGateError(f"channel {name} as of {_utc(watermark_ms)}: {failed}; it was not published, and is "
                               f"kept in {published}")
    return (name, time.perf_counter() - began,
            f"{name} as of {_utc(watermark_ms)}: {items:,} items, {len(built.lists.neighbor_L):,} neighbours")


def failed_channel_gate(items: int, seen: int, lists: NeighborLists, least: float) -> str | None:
    """Why a snapshot may not be published; None where it may.

    Args:
        items: with a list. seen: first seen before the watermark. least: channels.min_items_with_list.
    """
    if (bad := int((~np.isfinite(lists.score_L)).sum())):
        return f"{bad} of its {len(lists.score_L)} scores are not finite"
    share = items / seen if seen else 1.0
    return None if share >= least else (f"{items} of {seen} items have neighbours, a share of {share:.3g} below "
                                        f"channels.min_items_with_list {least:g}")


def _items_seen(store: SequenceStore, watermark_ms: int) -> int:
    return int((store.catalogue.first_seen_ms_N[1:] < watermark_ms).sum())


def publish_statistics(work: Work, watermark_ms: int) -> tuple[str, float, str]:
    """Count and publish the item statistics of a watermark."""
    began = time.perf_counter()
    store = work.open()
    found = item_statistics.count_items(store, watermark_ms)
    item_statistics.publish(work.channels, watermark_ms, found, store.vocabulary, _statistics_from(store), replace=True)
    return (item_statistics.NAME, time.perf_counter() - began,
            f"item statistics as of {_utc(watermark_ms)}: {int((found.views_N > 0).sum()):,} items")


# ----------------------------------------------------------------------------------------------------- what is there

def _fingerprint(store: SequenceStore) -> str:
    return store.manifest["input"]["fingerprint"]


def _statistics_from(store: SequenceStore) -> dict[str, Any]:
    return {"format": STATISTICS_FORMAT, "sequences": _fingerprint(store)}


def _kept(work: Work, store: SequenceStore, names: Iterable[str], at: Sequence[int]) -> set[tuple[str, int]]:
    """The snapshots that stay; the others of these channels are removed, watermarks that are not asked for too."""
    given, kept = work.given(store), set()
    for name in [*names, item_statistics.NAME]:
        for snapshot in list_snapshots(work.channels / name):
            watermark_ms = snapshot.watermark_ms
            if watermark_ms in at and snapshot.step is None:
                wanted = (_statistics_from(store) if name == item_statistics.NAME
                          else made_from(name, watermark_ms, _fingerprint(store), given))
                if _is_whole(snapshot.path, wanted) and _meets_gate(work, store, snapshot, name):
                    kept.add((name, watermark_ms))
                    continue
            remove(snapshot.path)
    return kept


def _meets_gate(work: Work, store: SequenceStore, snapshot: Snapshot, name: str) -> bool:
    """Whether a snapshot of an earlier run meets the gate of this one; else it is made, judged and kept aside anew."""
    if name == item_statistics.NAME:
        return True
    seen, items = _items_seen(store, snapshot.watermark_ms), read_manifest(snapshot.path).get("items")
    return isinstance(items, int) and items >= work.config.channels.min_items_with_list * seen


def _is_whole(folder: Path, wanted: dict[str, Any]) -> bool:
    try:
        manifest = verify(folder)
    except WatchtowerError:
        return False
    return all(manifest.get(key) == value for key, value in wanted.items())


def _drop_channels(work: Work, absent: set[str]) -> None:
    """Remove what an absent channel published from other logs."""
    for name in absent & set(CHANNELS):
        for snapshot in list_snapshots(work.channels / name):
            remove(snapshot.path)


def _summary(work: Work, names: list[str], at: list[int], absent: dict[str, str], kept: set[tuple[str, int]],
             seconds: dict[str, float]) -> dict[str, Any]:
    def count(name: str) -> dict[str, Any]:
        return {"seconds": round(seconds.get(name, 0.0), 3), "snapshots": len(at),
                "kept": sum(found == name for found, _ in kept)}

    channels, rows = {}, 0
    for name in names:
        manifests = [read_manifest(work.channels / name / str(w)) for w in at]
        rows += sum(m["items"] for m in manifests)
        newest = manifests[-1] if manifests else {}
        channels[name] = {**count(name), **{key: newest.get(key) for key in ("items", "neighbors", "counts")}}
    return {"rows": rows, "watermarks": list(at), "channels": channels,
            "item_statistics": count(item_statistics.NAME), "co_views_seconds": round(seconds.get("", 0.0), 3),
            "absent": {name: {"absent": reason} for name, reason in absent.items()}}


def _on_ray() -> bool:
    import sys

    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _utc(watermark_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(watermark_ms / 1000))


def _print(line: str) -> None:
    print(line, flush=True)
