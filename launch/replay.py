"""The replay stage: training labels from the sequences and the published channels, a task a shard.

    shards ── replay, count ── scales from all counts ── write parts ── publish labels/
              (a task a shard)                           (a task a shard)

The tasks are the same functions under either executor of launch.ingest. They write files of fixed names, each whole or
not at all, so what comes out does not depend on who runs them, how many at once, or in which order. What one process
holds at a time is the triggers of one shard and the lists of one combination of snapshots.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

from configs.errors import InputError
from configs.schema import ChannelsConfig, Config
from embeddings.snapshots import publish
from launch.console import say
from launch.ingest import Executor, RayExecutor, clear_disk_errors
from launch.resources import waiting_for_room
from trainer.channels import present_channels
from trainer.events import EventLog
from trainer.labels import (
    label_windows,
    labels_manifest,
    merged_counts,
    replay_shard,
    requests_left,
    scales_of,
    write_part,
)
from trainer.neighbors import ChannelSnapshots
from trainer.sequences import SequenceStore
from trainer.triggers import RequestRule, request_rule, trigger_requests

PROGRESS_EVERY_S = 3.0
STAGING = ".replay"  # in the run folder, of which one process at a time has the lock


def replay_labels(config: Config, run_dir: Path | str) -> dict:
    """The stage as `watchtower run` calls it, on the Ray that is running; progress goes to the console.

    Returns:
        rows (labels), requests, positive (channel: share of true labels) and seconds_per_request.

    Raises:
        InputError: there are no sequences or channels, or no training request is left.
    """
    with waiting_for_room(config, "replay"):
        found = make_labels(config, run_dir, RayExecutor(config.replay.shards_at_once, config.ray.replay_cpus), say=say)
    with EventLog(Path(run_dir) / "events.jsonl") as log:
        log.write("replay", show=False, **found)
    return found


def make_labels(config: Config, run_dir: Path | str, executor: Executor, say: Callable[[str], None] | None = None
                ) -> dict:
    """Make `run_dir/labels` from `run_dir/sequences` and `run_dir/channels`; labels that are there are swapped.

    Args:
        executor: SerialExecutor or RayExecutor.
        say: takes a line of progress; None says nothing.

    Returns, raises: as `replay_labels`.
    """
    began, run_dir = time.monotonic(), Path(run_dir).absolute()
    say = say or (lambda line: None)
    store = SequenceStore(run_dir / "sequences")
    rule, shards = request_rule(config, store.manifest, "train"), list(range(store.shards))
    channels = present_channels(config, store, run_dir / "channels")
    ChannelSnapshots(run_dir / "channels", config.channels, store.vocabulary, channels)  # tells what is missing
    _check_test_requests(config, store)
    windows = label_windows(config)
    with clear_disk_errors(run_dir), _staging(run_dir) as staging:
        with _progress(staging, "counts", "replayed", len(shards), say):
            executor.each(partial(_replay, config, run_dir, rule, staging, channels, uuid.uuid4().hex), shards)
        counts = merged_counts(staging, len(shards), len(windows), len(channels))
        if counts.requests == 0:
            raise InputError(_why_none(config, rule, requests_left(store, rule, config)))
        scales = scales_of(counts, config.replay, staging, len(shards))
        with _progress(staging, "positive", "wrote", len(shards), say):
            executor.each(partial(_write, staging, windows, scales), shards)
        manifest = labels_manifest(config, counts, scales, channels, staging, len(shards))
        publish(run_dir / "labels", lambda into: _move(staging / "labels", into), manifest, replace=True)
    share = {name: true / counts.triggers for name, true in zip(channels, manifest["positive_labels"], strict=True)}
    seconds = time.monotonic() - began
    shares = ", ".join(f"{name} {value:.1%}" for name, value in share.items())
    say(f"replay: {counts.triggers:,} labels of {counts.requests:,} requests, positive: {shares} ({seconds:.1f} s)")
    return {"rows": counts.triggers, "requests": counts.requests, "positive": share,
            "seconds_per_request": seconds / counts.requests}


# ------------------------------------------------------------------------------------------------------------- tasks

def _replay(config: Config, run_dir: Path, rule: RequestRule, staging: Path, channels: list[str], attempt: str,
            number: int) -> None:
    with _opening:  # threads that begin together share what one of them has read
        store, snapshots = _opened(config.channels.model_dump_json(), tuple(channels), run_dir, attempt)
    replay_shard(store, number, rule, config, snapshots, staging)


def _write(staging: Path, windows: list[int], scales: list, number: int) -> None:
    write_part(number, staging, staging / "labels", windows, scales)


_opening = threading.Lock()


@lru_cache(maxsize=1)
def _opened(config: str, channels: tuple[str, ...], run_dir: Path, attempt: str
            ) -> tuple[SequenceStore, ChannelSnapshots]:
    """Sequences and channels of a run, opened once in each process and attempt: a worker's tasks share the lists that
    it has read, and another attempt, which may see other channels, does not."""
    store = SequenceStore(run_dir / "sequences")
    return store, ChannelSnapshots(run_dir / "channels", ChannelsConfig.model_validate_json(config), store.vocabulary,
                                   channels)


# --------------------------------------------------------------------------------------------------------- the stage

def _check_test_requests(config: Config, store: SequenceStore) -> None:
    """Raise an `InputError` now, and not after the routers were trained, where nobody could judge them."""
    rule = request_rule(config, store.manifest, "test")
    if any(len(trigger_requests(store.open(number), number, rule, config)) for number in range(store.shards)):
        return
    left = requests_left(store, rule, config)
    raise InputError(
        f"replay: no test request is left. Of {left['users']:,} users, {left['side_users']:,} are test users "
        f"(split.test_users, routing.test_users) with {left['asked']:,} requests; {left['with_triggers']:,} have "
        f"{rule.min_triggers} triggers (replay.requests.test_min_triggers) and {left['with_future']:,} of these "
        f"{rule.min_future} later items (replay.requests.test_min_future). Lower these, or move the test")


def _why_none(config: Config, rule: RequestRule, left: dict[str, int]) -> str:
    """What took the training requests away."""
    few_triggers, few_future = left["asked"] - left["with_triggers"], left["with_triggers"] - left["with_future"]
    asked = (f"{len(rule.cuts)} train_cuts" if rule.cuts is not None
             else f"every {rule.every}th effective view of the {config.replay.requests.train_days:g} train_days")
    return (f"replay: no training request is left. Of {left['users']:,} users, "
            f"{left['users'] - left['side_users']:,} are test users (split.test_users, routing.test_users); "
            f"{asked} of the other {left['side_users']:,} make {left['asked']:,} requests, of which "
            f"replay.requests.min_triggers ({rule.min_triggers}) removes {few_triggers:,} and "
            f"replay.requests.min_future ({rule.min_future}) {few_future:,}. Move the requests to times with rows "
            "before and after them, or lower these limits.")


@contextmanager
def _staging(run_dir: Path) -> Iterator[Path]:
    """An empty folder for what the passes leave; what a replay that died left in it goes."""
    staging = run_dir / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "labels").mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move(source: Path, into: Path) -> None:
    for path in sorted(source.iterdir()):
        os.rename(path, into / path.name)


@contextmanager
def _progress(staging: Path, prefix: str, done_word: str, shards: int, say: Callable[[str], None]) -> Iterator[None]:
    """A line every few seconds, counted from the files that finished tasks leave."""
    done, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(PROGRESS_EVERY_S):
            finished = len(list(staging.glob(f"{prefix}-*.json")))
            say(f"replay: {done_word} {finished}/{shards} shards, {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
