"""Item-to-item channels: which there are, when their snapshots are taken, and how one is built.

A channel takes the views before a watermark (trainer/co_views.py) and gives neighbour lists (trainer/neighbors.py).
Another channel is one file with a class like `Channel`, its section in configs/schema.py, and a line in CHANNELS.
"""

from __future__ import annotations

from pathlib import Path

from configs.errors import InputError
from configs.loader import config_hash
from configs.schema import Config
from embeddings.snapshots import list_snapshots
from trainer.channels.channel import Built, Channel, Given
from trainer.channels.content import Content
from trainer.channels.embedding import Embedding
from trainer.channels.pairwise_lr import PairwiseLr
from trainer.channels.session import Session
from trainer.channels.swing import Swing
from trainer.co_views import CoViews
from trainer.sequences import DAY_MS, HOUR_MS, SequenceStore, split_times
from trainer.triggers import request_rule

__all__ = ["CHANNELS", "Built", "Channel", "Given", "absent_channels", "build_channel", "made_from",
           "present_channels", "watermarks"]

FORMAT = 1  # of what a build makes of the same config and logs; another number builds anew
MINUTE_MS = 60_000

CHANNELS: dict[str, Channel] = {channel.name: channel for channel in (
    Swing(), Embedding(), Content(), PairwiseLr(), Session())}


def watermarks(config: Config, manifest: dict) -> list[int]:
    """When snapshots are taken, Unix ms, rising.

    requests: the rollback before each cut of replay, training and test. daily: every local midnight from the second day
    of the logs to the last one not after the end of the test, or not after the last cut where requests are cuts.

    Args:
        manifest: of the sequences.

    Raises:
        InputError: requests without cuts.
    """
    requests, kind = config.replay.requests, config.channels.snapshots
    has_cuts = requests.test_cuts is not None
    if kind is None:
        kind = "requests" if has_cuts and config.train.slices != "daily" else "daily"
    if kind == "requests" and not has_cuts:
        raise InputError("channels.snapshots is requests, but replay.requests has no cuts (its requests are sampled "
                         "views, at any time); set channels.snapshots=daily")
    cuts = [at for side in ("train", "test") for at, _ in request_rule(config, manifest, side).cuts] if has_cuts else []
    if kind == "requests":
        return sorted({at - round(config.channels.rollback_min * MINUTE_MS) for at in cuts})
    offset_ms, statistics = round(config.data.utc_offset_h * HOUR_MS), manifest["statistics"]
    end_ms = max(cuts) if has_cuts else split_times(config, manifest).test_end_ms
    first_day = (statistics["first_timestamp_ms"] + offset_ms) // DAY_MS
    last_day = (min(end_ms, statistics["last_timestamp_ms"] + DAY_MS) + offset_ms) // DAY_MS
    return [day * DAY_MS - offset_ms for day in range(first_day + 1, last_day + 1)]


def absent_channels(config: Config, store: SequenceStore) -> dict[str, str]:
    """Of channels.names, those that these logs cannot have, and why."""
    reasons = {name: CHANNELS[name].lacks(store) for name in config.channels.names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def present_channels(config: Config, store: SequenceStore, folder: Path | None = None) -> list[str]:
    """channels.names without those that these logs cannot have, in that order: the channels of labels, routers and
    results.

    Args:
        folder: of the snapshots; a channel that has some is present, whatever the logs.

    Raises:
        InputError: if none is left.
    """
    absent = absent_channels(config, store)
    names = [name for name in config.channels.names
             if name not in absent or (folder is not None and list_snapshots(Path(folder) / name))]
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise InputError(f"channels.names: these logs can have none of them ({reasons})")
    return names


def made_from(name: str, watermark_ms: int, sequences: str, given: Given) -> dict:
    """What decides a snapshot's lists: logs, the channel's own config, and its other sources; for its manifest.

    Args:
        sequences: fingerprint of the sequences' input.

    Raises:
        InputError: a source of the channel is not there.
    """
    channel, config = CHANNELS[name], given.config
    params = channel.section(config).model_dump(mode="json")
    return {"channel": name, "format": FORMAT, "top": config.top, "window_h": config.window_h, "params": params,
            "config_hash": config_hash({"top": config.top, "window_h": config.window_h, name: params}),
            "sequences": sequences, **channel.sources(watermark_ms, given)}


def build_channel(name: str, views: CoViews, given: Given) -> Built:
    """The lists of one channel as of views.watermark_ms, with what was read counted."""
    built = CHANNELS[name].build(views, given)
    return Built(built.lists, {"users": len(views.user_id_U), "views": len(views.item_V), **built.facts})
