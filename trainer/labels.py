"""Training labels: what replay says of every trigger and channel, as files that the router is trained from.

    labels/
      manifest.json           channels in order, windows, and for each window the scales and counts (below)
      part-00000.parquet      one row a trigger, in the order of trigger_requests of shard 0
      window=50/part-*.parquet    the same with another future window W, where router.models asks for one

A row: request_id, user_id, request_time_ms, trigger_item_id int64, position int32 (1 the latest), and for each channel,
as fixed-size lists in the order of the manifest: reward float64 (seconds, whole milliseconds), intensity float32, label
bool, uniqueness float32.

Two passes over the shards, each shard by itself. The first one replays: it writes forward values in milliseconds and
counts, all of them whole numbers that add up in any order. The counts give the scales, so these do not depend on how
the users are sharded. The second one writes the parts.

    s_c    replay.scale_s, else the mean of the positive forward values
    tau_c  replay.tau_s, else their lower quantile: the least of them that at least the share tau_quantile of them does
           not exceed. It is exact: the first pass counts values by their high bits, one more pass over the forward
           values counts the low 16 bits of those with the quantile's high bits.
    eta    replay.eta, else the lower median of rho over all triggers and channels whose list is not empty; exact, from
           the counts of (|U|, |R|)

Shape suffixes: T = triggers, C = channels, W = windows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numba
import numpy as np
import pyarrow as pa

from configs.errors import InputError, WatchtowerError
from configs.schema import Config, ReplayConfig
from embeddings import elsewhere
from embeddings.snapshots import read_manifest, verify_file
from embeddings.untrusted import read_parquet, whole_column
from trainer.fixed_lists import FixedListWriter
from trainer.neighbors import ChannelSnapshots
from trainer.replay import EPSILON, rewards_ms, states_of, unique_counts, unique_share
from trainer.sequences import MOST_SHARDS, SequenceStore, whole_file
from trainer.triggers import RequestRule, TriggerRequests, is_future_view, is_routing_test_user, trigger_requests

FORMAT = 1  # of the labels folder
LOW_BITS = 16  # of a forward value in ms: a bin of the first pass is 65.5 s wide
LISTS = {"reward": pa.float64(), "intensity": pa.float32(), "label": pa.bool_(), "uniqueness": pa.float32()}
PLAIN = {"request_id": pa.int64(), "user_id": pa.int64(), "request_time_ms": pa.int64(), "trigger_item_id": pa.int64(),
         "position": pa.int32()}
TRIGGERS_AT_ONCE = 500_000  # of a shard: about 100 bytes each in memory
MOST_BINS = 1 << 22  # of a count by value; more are sorted


def label_windows(config: Config) -> list[int]:
    """The windows that labels are made for: replay.window first, then the others that routers ask for."""
    others = {model.window for model in config.router.models if model.window is not None} - {config.replay.window}
    return [config.replay.window, *sorted(others)]


# ---------------------------------------------------------------------------------------------------- the first pass

def replay_shard(store: SequenceStore, number: int, rule: RequestRule, config: Config, snapshots: ChannelSnapshots,
                 folder: Path) -> None:
    """Replay the requests of a shard, some at a time: `<folder>/replay-<number>.npy` (read by `replayed`) and its
    counts, `counts-<number>.json`."""
    shard = store.open(number)
    requests, is_future_E = trigger_requests(shard, number, rule, config), is_future_view(shard, rule)
    windows = label_windows(config)
    counts = LabelCounts.none(len(windows), len(snapshots.names))

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            for part in _parts(requests):
                states = list(states_of(part, snapshots))
                reward_ms_WTC = rewards_ms(shard, part, is_future_E, snapshots, windows, config.replay.null_watch_s,
                                           states)
                unique_TC, length_TC = unique_counts(part, snapshots, states)
                counts.add(LabelCounts.of(part, reward_ms_WTC, unique_TC, length_TC))
                _save(file, Replayed(part.request_id_R, part.user_id_R, part.time_ms_R, np.diff(part.trigger_offset_R1),
                                     store.vocabulary.ids_of(part.trigger_row_T), part.position_T, reward_ms_WTC,
                                     unique_TC, length_TC))

    whole_file(folder / f"replay-{number:05d}.npy", write)
    whole_file(folder / f"counts-{number:05d}.json", lambda path: path.write_text(json.dumps(counts.as_json())))


@dataclass(frozen=True)
class Replayed:
    """What the first pass leaves of some requests: four arrays a request, and for each trigger its item and position
    (T,), forward values (W, T, C) in ms, and |U| and |R| (T, C)."""

    request_id_R: np.ndarray
    user_id_R: np.ndarray
    time_ms_R: np.ndarray
    triggers_R: np.ndarray
    item_id_T: np.ndarray
    position_T: np.ndarray
    reward_ms_WTC: np.ndarray
    unique_TC: np.ndarray
    length_TC: np.ndarray


def _parts(requests: TriggerRequests) -> Iterator[TriggerRequests]:
    """The requests in order, about TRIGGERS_AT_ONCE triggers at a time; one part at least."""
    cuts = np.searchsorted(requests.trigger_offset_R1,
                           np.arange(TRIGGERS_AT_ONCE, requests.trigger_offset_R1[-1], TRIGGERS_AT_ONCE))
    edges = np.unique(np.concatenate([[0], cuts, [len(requests)]]))
    for begin, end in zip(edges[:-1], edges[1:], strict=True) if len(edges) > 1 else [(0, 0)]:
        yield requests.take(np.arange(begin, end))


def _save(file: BinaryIO, found: Replayed) -> None:
    for name, values in vars(found).items():
        # In as few bytes as hold them: the pass that reads them waits for the disk.
        if name in ("position_T", "reward_ms_WTC", "unique_TC", "length_TC") and values.size:
            values = values.astype(np.min_scalar_type(values.max()))
        np.save(file, values)


def replayed(folder: Path, number: int) -> Iterator[Replayed]:
    """What the first pass left of a shard, part by part."""
    elsewhere.bring(folder / f"replay-{number:05d}.npy")
    with open(folder / f"replay-{number:05d}.npy", "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        while file.tell() < end:
            yield Replayed(*(np.load(file, allow_pickle=False) for _ in fields(Replayed)))


@dataclass
class LabelCounts:
    """Whole numbers that add up over shards.

    positive, sum_ms: for each window and channel (W, C), forward values above 0 and their sum. high: for each window
    and channel, the positive values by value >> LOW_BITS. lists: for each channel, triggers by (|U|, |R|), empty lists
    aside.
    """

    requests: int
    triggers: int
    positive: list[list[int]]
    sum_ms: list[list[int]]
    high: list[list[dict[int, int]]]
    lists: list[dict[tuple[int, int], int]]

    @classmethod
    def none(cls, windows: int, channels: int) -> LabelCounts:
        return cls(0, 0, *([[0] * channels for _ in range(windows)] for _ in range(2)),
                   [[{} for _ in range(channels)] for _ in range(windows)], [{} for _ in range(channels)])

    @classmethod
    def of(cls, requests: TriggerRequests, reward_ms_WTC: np.ndarray, unique_TC: np.ndarray, length_TC: np.ndarray
           ) -> LabelCounts:
        windows, _, channels = reward_ms_WTC.shape
        bins, wide = (int(reward_ms_WTC.max(initial=0)) >> LOW_BITS) + 1, int(length_TC.max(initial=0)) + 1
        if max(bins * channels, wide * wide * channels) > MOST_BINS:
            high = [[_counts(reward_TC[:, c][reward_TC[:, c] > 0] >> LOW_BITS) for c in range(channels)]
                    for reward_TC in reward_ms_WTC]
            pairs = [_counts((unique_T * wide + length_T)[length_T > 0])
                     for unique_T, length_T in zip(unique_TC.T.astype(np.int64), length_TC.T, strict=True)]
            positive_WC, sum_WC = (reward_ms_WTC > 0).sum(axis=1), reward_ms_WTC.sum(axis=1)
        else:
            positive_WC, sum_WC = np.zeros((windows, channels), np.int64), np.zeros((windows, channels), np.int64)
            high_WCB = np.zeros((windows, channels, bins), np.int64)
            pair_CP = np.zeros((channels, wide * wide), np.int64)
            _tally(reward_ms_WTC, unique_TC, length_TC, wide, positive_WC, sum_WC, high_WCB, pair_CP)
            high = [[_found(count_B) for count_B in high_CB] for high_CB in high_WCB]
            pairs = [_found(count_P) for count_P in pair_CP]
        lists = [{divmod(pair, wide): count for pair, count in found.items()} for found in pairs]
        return cls(len(requests), len(requests.trigger_row_T), positive_WC.tolist(), sum_WC.tolist(), high, lists)

    def add(self, other: LabelCounts) -> None:
        self.requests += other.requests
        self.triggers += other.triggers
        for name in ("positive", "sum_ms"):
            for mine, more in zip(getattr(self, name), getattr(other, name), strict=True):
                mine[:] = [a + b for a, b in zip(mine, more, strict=True)]
        for mine, more in zip([one for w in self.high for one in w] + self.lists,
                              [one for w in other.high for one in w] + other.lists, strict=True):
            for key, count in more.items():
                mine[key] = mine.get(key, 0) + count

    def as_json(self) -> dict:
        return {**self.__dict__, "high": [[sorted(one.items()) for one in w] for w in self.high],
                "lists": [sorted([u, n, k] for (u, n), k in one.items()) for one in self.lists]}

    @classmethod
    def from_json(cls, read: dict) -> LabelCounts:
        return cls(**{**read, "high": [[dict(map(tuple, one)) for one in w] for w in read["high"]],
                      "lists": [{(u, n): k for u, n, k in one} for one in read["lists"]]})


def _counts(values: np.ndarray) -> dict[int, int]:
    """How often each value, at least 0, is there."""
    if values.max(initial=0) < MOST_BINS:
        return _found(np.bincount(values))
    found, count = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), count.tolist(), strict=True))


def _found(count_B: np.ndarray) -> dict[int, int]:
    """The counts that are not 0, by their place."""
    found = np.flatnonzero(count_B)
    return dict(zip(found.tolist(), count_B[found].tolist(), strict=True))


@numba.njit(cache=True, nogil=True)
def _tally(reward_ms_WTC, unique_TC, length_TC, wide, positive_WC, sum_WC, high_WCB, pair_CP
           ):  # pragma: no cover - compiled
    """LabelCounts of some triggers, added to what is there. pair_CP: at |U| x wide + |R|."""
    windows, triggers, channels = reward_ms_WTC.shape
    for window in range(windows):
        for t in range(triggers):
            for c in range(channels):
                reward_ms = reward_ms_WTC[window, t, c]
                if reward_ms > 0:
                    positive_WC[window, c] += 1
                    sum_WC[window, c] += reward_ms
                    high_WCB[window, c, reward_ms >> LOW_BITS] += 1
    for t in range(len(length_TC)):
        for c in range(channels):
            if length_TC[t, c] > 0:
                pair_CP[c, unique_TC[t, c] * wide + length_TC[t, c]] += 1


def merged_counts(folder: Path, shards: int, windows: int, channels: int) -> LabelCounts:
    """The counts of all shards of the first pass."""
    total = LabelCounts.none(windows, channels)
    for number in range(shards):
        total.add(LabelCounts.from_json(json.loads((folder / f"counts-{number:05d}.json").read_text())))
    return total


# -------------------------------------------------------------------------------------------------------- the scales

@dataclass(frozen=True)
class Scales:
    """What turns forward values of a window into labels, by channel: s_c and tau_c in seconds, k_c; eta of Eq. 13."""

    scale_s: list[float]
    tau_s: list[float]
    cap: list[float]
    eta: float

    def least_ms(self) -> np.ndarray:
        """int64 (C,), tau_c in whole milliseconds: Eq. 5 compares these."""
        return np.rint(1000 * np.array(self.tau_s)).astype(np.int64)


def scales_of(counts: LabelCounts, replay: ReplayConfig, folder: Path, shards: int) -> list[Scales]:
    """The scales of each window, from the counts of the first pass; a channel without any positive value has s_c = 1 s
    and, where tau_c is a quantile, tau_c = 1 s: none of its labels is true.

    Args:
        folder: of the first pass; it is read again where tau_c is a quantile.
    """
    channels = len(counts.lists)
    eta = median_uniqueness(counts.lists) if replay.eta is None else replay.eta
    tau_WC = ([[replay.tau_s] * channels] * len(counts.positive) if replay.tau_s is not None
              else quantiles_s(counts, replay.tau_quantile, folder, shards))
    scales = []
    for positive_C, sum_ms_C, tau_C in zip(counts.positive, counts.sum_ms, tau_WC, strict=True):
        mean_C = [ms / 1000 / n if n else 1.0 for n, ms in zip(positive_C, sum_ms_C, strict=True)]
        scales.append(Scales([replay.scale_s] * channels if replay.scale_s is not None else mean_C, list(tau_C),
                             [replay.cap] * channels, eta))
    return scales


def median_uniqueness(lists: Sequence[Mapping[tuple[int, int], int]]) -> float:
    """The lower median of rho over triggers of these channels with a list, as the float32 that the labels hold; 1 where
    there is none."""
    counts: dict[float, int] = {}
    for one in lists:
        for (unique, length), count in one.items():
            rho = float(unique_share(np.int64(unique), np.int64(length)))
            counts[rho] = counts.get(rho, 0) + count
    return float(_lower_quantile(counts, 0.5)) if counts else 1.0


def mean_uniqueness(lists: Mapping[tuple[int, int], int]) -> float | None:
    """Mean rho of a channel over triggers with a list; None where there is none."""
    total = sum(lists.values())
    return sum(u / n * k for (u, n), k in lists.items()) / total if total else None


def _lower_quantile(counts: Mapping[Any, int], share: float):
    """The least value that at least this share of the counted ones does not exceed."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    return values[int(np.searchsorted(below, max(1, np.ceil(share * below[-1]))))]


def quantiles_s(counts: LabelCounts, share: float, folder: Path, shards: int) -> list[list[float]]:
    """The lower quantile of the positive forward values of each window and channel, seconds; 1 where there is none."""
    bins = [[(_lower_quantile(one, share) if one else None) for one in high_C] for high_C in counts.high]
    low = [[np.zeros(1 << LOW_BITS, np.int64) for _ in high_C] for high_C in counts.high]
    for number in range(shards):
        for part in replayed(folder, number):
            for w, bins_C in enumerate(bins):
                for c, bin_ in enumerate(bins_C):
                    if bin_ is not None:
                        value_T = part.reward_ms_WTC[w, :, c].astype(np.int64)
                        inside = value_T[(value_T > 0) & (value_T >> LOW_BITS == bin_)] & ((1 << LOW_BITS) - 1)
                        low[w][c] += np.bincount(inside, minlength=1 << LOW_BITS)
    return [[_value_at(counts.high[w][c], bin_, low[w][c], share) / 1000 for c, bin_ in enumerate(bins_C)]
            for w, bins_C in enumerate(bins)]


def _value_at(high: Mapping[int, int], bin_: int | None, low: np.ndarray, share: float) -> int:
    if bin_ is None:
        return 1000
    wanted = max(1, np.ceil(share * sum(high.values()))) - sum(n for key, n in high.items() if key < bin_)
    return (bin_ << LOW_BITS) + int(np.searchsorted(np.cumsum(low), wanted))


# --------------------------------------------------------------------------------------------------- the second pass

def window_folder(folder: Path, window: int, windows: Sequence[int]) -> Path:
    """Where the parts of a window lie; the first one's lie at the top."""
    return folder if window == windows[0] else folder / f"window={window}"


def write_part(number: int, folder: Path, into: Path, windows: Sequence[int], scales: Sequence[Scales]) -> None:
    """Write the parts of one shard, `part-<number>.parquet` for each window, from what the first pass left; and in its
    folder how many labels are true, `positive-<number>.json`.

    Args:
        folder: of the first pass. into: the labels folder.
    """
    positive_WC = []
    for at, (window, scale) in enumerate(zip(windows, scales, strict=True)):
        place, positive_C = window_folder(into, window, windows), np.zeros(len(scale.cap), np.int64)
        place.mkdir(parents=True, exist_ok=True)

        def write(path: Path, at: int = at, scale: Scales = scale, positive_C: np.ndarray = positive_C) -> None:
            with open(path, "wb") as file:
                writer = FixedListWriter(file, _schema(len(scale.cap)))
                for part in replayed(folder, number):
                    writer.write(_labelled(part, at, scale, positive_C))
                writer.close()

        whole_file(place / f"part-{number:05d}.parquet", write)
        positive_WC.append(positive_C.tolist())
    whole_file(folder / f"positive-{number:05d}.json", lambda path: path.write_text(json.dumps(positive_WC)))


def _labelled(part: Replayed, window: int, scale: Scales, positive_C: np.ndarray) -> list[np.ndarray]:
    """The columns of a part for one of the windows; how many labels are true is added to int64 (C,) positive_C."""
    shape = part.unique_TC.shape
    lists = [np.empty(shape, kind) for kind in (np.float64, np.float32, np.bool_, np.float32)]
    _label(part.reward_ms_WTC[window], part.unique_TC, part.length_TC, np.array(scale.scale_s), np.array(scale.cap),
           scale.least_ms(), *lists, positive_C)
    return [*(np.repeat(values_R, part.triggers_R) for values_R in (part.request_id_R, part.user_id_R,
                                                                    part.time_ms_R)),
            part.item_id_T, part.position_T, *lists]


@numba.njit(cache=True, nogil=True)
def _label(reward_ms_TC, unique_TC, length_TC, scale_s_C, cap_C, least_ms_C, reward_TC, intensity_TC, label_TC,
           uniqueness_TC, positive_C):  # pragma: no cover - compiled
    """Eq. 4, Eq. 5 and Eq. 11 (`unique_share`) of each trigger and channel, in one pass."""
    for t in range(len(reward_ms_TC)):
        for c in range(len(cap_C)):
            reward_ms = np.int64(reward_ms_TC[t, c])
            reward_TC[t, c] = reward_ms / 1000
            intensity_TC[t, c] = np.float32(min(reward_ms / 1000 / scale_s_C[c], cap_C[c]))
            label_TC[t, c] = reward_ms >= least_ms_C[c]
            positive_C[c] += reward_ms >= least_ms_C[c]
            uniqueness_TC[t, c] = np.float32(np.int64(unique_TC[t, c]) / (np.int64(length_TC[t, c]) + EPSILON))


def _schema(channels: int) -> pa.Schema:
    """Nothing is null."""
    lists = {name: pa.list_(pa.field("element", kind, nullable=False), channels) for name, kind in LISTS.items()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in (PLAIN | lists).items()])


def labels_manifest(config: Config, counts: LabelCounts, scales: Sequence[Scales], channels: Sequence[str],
                    folder: Path, shards: int) -> dict[str, Any]:
    """What labels/manifest.json says: counts, and for each window the scales and how many labels are true; the keys of
    the first window stand at the top, too.

    Args:
        folder: of the first pass.
    """
    windows = label_windows(config)
    true_WC = np.zeros((len(windows), len(channels)), np.int64)
    for number in range(shards):
        true_WC += np.array(json.loads((folder / f"positive-{number:05d}.json").read_text()))
    by_window = {}
    for at, (window, scale) in enumerate(zip(windows, scales, strict=True)):
        by_window[str(window)] = {
            "scale_s": scale.scale_s, "cap": scale.cap, "tau_s": scale.tau_s, "eta": scale.eta,
            "positive_rewards": counts.positive[at], "reward_sum_s": [ms / 1000 for ms in counts.sum_ms[at]],
            "positive_labels": true_WC[at].tolist()}
    return {"kind": "labels", "format": FORMAT, "channels": list(channels), "shards": shards, "windows": windows,
            "window": windows[0], **by_window[str(windows[0])], "requests": counts.requests, "rows": counts.triggers,
            "by_window": by_window, "uniqueness_mean": [mean_uniqueness(one) for one in counts.lists],
            "uniqueness_median": [median_uniqueness([one]) if one else None for one in counts.lists],
            "empty_lists": [counts.triggers - sum(one.values()) for one in counts.lists],
            "null_watch_s": config.replay.null_watch_s}


# ----------------------------------------------------------------------------------------------------------- reading

def _check_manifest(path: Path, manifest: dict) -> None:
    """Raises an InputError where a key that readers use is missing or of another type."""
    def numbers(values: object, count: int) -> bool:
        return isinstance(values, list) and len(values) == count and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)

    channels, windows, by_window = (manifest.get(key) for key in ("channels", "windows", "by_window"))
    good = (isinstance(channels, list) and channels and all(isinstance(name, str) for name in channels)
            and isinstance(windows, list) and windows and all(type(w) is int for w in windows)
            and manifest.get("window") == windows[0] and type(manifest.get("shards")) is int
            and 0 <= manifest["shards"] <= MOST_SHARDS and isinstance(by_window, dict))
    for window in windows if good else ():
        facts = by_window.get(str(window))
        good = good and isinstance(facts, dict) and numbers([facts.get("eta")], 1) and all(
            numbers(facts.get(key), len(channels)) for key in ("scale_s", "tau_s", "cap"))
    if not good:
        raise InputError(f"{path}: is not what replay writes. Run watchtower replay again.")


@dataclass(frozen=True)
class ShardLabels:
    """The labels of a shard, in the order of its requests' triggers.

    request_id_T int64, position_T int32, reward_ms_TC int64, intensity_TC float32, label_TC bool, uniqueness_TC
    float32.
    """

    request_id_T: np.ndarray
    position_T: np.ndarray
    reward_ms_TC: np.ndarray
    intensity_TC: np.ndarray
    label_TC: np.ndarray
    uniqueness_TC: np.ndarray

    def __len__(self) -> int:
        return len(self.request_id_T)


@dataclass(frozen=True)
class Labels:
    """Published labels of one window. channels: their order. scales: s_c, tau_c, k_c and eta. shards: parts."""

    folder: Path
    manifest: dict
    window: int
    channels: tuple[str, ...]
    scales: Scales
    shards: int

    @classmethod
    def open(cls, folder: Path, window: int | None = None) -> Labels:
        """Open a labels folder, or its window=<W> folder.

        Args:
            window: W; None takes replay.window's, or the one of the folder.

        Raises:
            InputError: there are no labels, or none of this window.
        """
        folder = Path(folder)
        named = re.fullmatch(r"window=(\d+)", folder.name)
        if named:
            folder, window = folder.parent, int(named[1]) if window is None else window
        elsewhere.bring(folder / "manifest.json")
        if not (folder / "manifest.json").exists():
            raise InputError(f"{folder}: no labels there. Run watchtower replay first.")
        manifest = read_manifest(folder)
        _check_manifest(folder / "manifest.json", manifest)
        window = manifest["window"] if window is None else window
        if window not in manifest["windows"]:
            raise InputError(f"{folder}: has labels of the windows {manifest['windows']}, not of {window}. Run "
                             "watchtower replay with router.models that ask for it, or with replay.window.")
        facts = manifest["by_window"][str(window)]
        scales = Scales(facts["scale_s"], facts["tau_s"], facts["cap"], facts["eta"])
        return cls(window_folder(folder, window, manifest["windows"]), manifest, window, tuple(manifest["channels"]),
                   scales, manifest["shards"])

    def shard(self, number: int, requests: TriggerRequests | None = None) -> ShardLabels:
        """The labels of one shard.

        Args:
            requests: of trigger_requests of that shard (training side); the rows are then checked against them.

        Raises:
            InputError: naming the file, if it cannot be read or is not of these requests and this order.
        """
        top = self.folder.parent if self.folder.name.startswith("window=") else self.folder
        try:
            path = verify_file(top, self.manifest, (self.folder / f"part-{number:05d}.parquet").relative_to(
                top).as_posix())
        except WatchtowerError as error:
            raise InputError(f"{error}. Remove the labels folder and run watchtower replay again.") from error
        try:
            table = read_parquet(path, ["request_id", "position", *LISTS])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error}). Remove the labels folder and run watchtower replay "
                             "again.") from error
        reward_TC, intensity_TC, label_TC, uniqueness_TC = (self._channels(table, name, path) for name in LISTS)
        if not all(np.isfinite(values_TC).all() for values_TC in (reward_TC, intensity_TC, uniqueness_TC)):
            raise InputError(f"{path}: holds a label that is not finite. Run watchtower replay again.")
        found = ShardLabels(whole_column(table, "request_id", pa.int64(), str(path)).to_numpy(),
                            whole_column(table, "position", pa.int32(), str(path)).to_numpy(),
                            np.rint(1000 * reward_TC).astype(np.int64), intensity_TC, label_TC, uniqueness_TC)
        if requests is not None and not (
                np.array_equal(found.request_id_T, requests.request_id_R[requests.request_T])
                and np.array_equal(found.position_T, requests.position_T)):
            raise InputError(f"{path}: its rows are not the triggers of the training requests of this config and these "
                             "sequences. Run watchtower replay again.")
        return found

    def _channels(self, table: pa.Table, name: str, path: Path) -> np.ndarray:
        width, found = len(self.channels), table.schema.field(name).type
        if not pa.types.is_fixed_size_list(found) or found.list_size != width or found.value_type != LISTS[name]:
            raise InputError(f"{path}: has {found} where {width} values a row are needed, one for each channel. "
                             "Run watchtower replay again.")
        values = whole_column(table, name, found, str(path)).flatten()
        if values.null_count:
            raise InputError(f"{path}: a list of {name} holds a null. Run watchtower replay again.")
        return values.to_numpy(zero_copy_only=False).reshape(-1, width)


# ------------------------------------------------------------------------------------------- where requests are lost

def requests_left(store: SequenceStore, rule: RequestRule, config: Config) -> dict[str, int]:
    """How many users and requests of a side are left after each limit, for a message where none are.

    Returns:
        users, side_users (the users of the side), asked (their candidates: users by cuts, or every k-th effective view
        of the period), with_triggers (of these with min_triggers), with_future (of these with min_future).
    """
    everything = replace(rule, min_triggers=0, min_future=0, per_user=np.iinfo(np.int32).max)
    limits = {"asked": everything, "with_triggers": replace(everything, min_triggers=rule.min_triggers),
              "with_future": replace(everything, min_triggers=rule.min_triggers, min_future=rule.min_future)}
    left = {"users": 0, "side_users": 0, **dict.fromkeys(limits, 0)}
    for number in range(store.shards):
        shard = store.open(number)
        left["users"] += len(shard.user_id_U)
        left["side_users"] += int((is_routing_test_user(shard.user_id_U, config) == (rule.side == "test")).sum())
        for name, limit in limits.items():
            left[name] += len(trigger_requests(shard, number, limit, config))
    return left
