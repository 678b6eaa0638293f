"""What all routers of a run share: requests with their triggers, features and labels, and the batches made of them.

A request brings its triggers, and for each trigger what is known of it and of the list that each channel would bring
back for it (trainer/trigger_features.py), as of the request. Labels (trainer/labels.py) stand beside them for training
requests alone. Features of training requests are computed once, each worker its share of the shards, and read from disk
by all of them in every epoch (trainer/router_shards.py), one group of shards at a time.

The training users are parted by a seeded hash of the id: requests of a `router.validation_share` of them choose the
epoch, all others are fitted. The order of an epoch is a function of (seed, epoch): shards are permuted and taken in
groups, the requests of a group are permuted together, and the rest of a group joins the next one. Any number of
workers walks the same global batches and takes rows rank, rank + workers, .. of each.

Shape suffixes: R = requests, T = triggers of all of them, C = channels, F = features, V = recent effective views of all
requests (packed), U = distinct items, B = requests of a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import InputError, WatchtowerError
from configs.schema import Config, RouterModelConfig
from embeddings import elsewhere
from embeddings.snapshots import read_manifest, remove
from trainer.batches import ItemBatch, ItemFeatures, moved
from trainer.conditions import WatchBuckets
from trainer.dropout import place_keys
from trainer.item_statistics import StatisticsSnapshots
from trainer.item_value import FOLDER as ITEM_VALUE
from trainer.item_value import REQUESTS_AT_ONCE, TOPS, ItemValue, candidates, expected_hits, load_item_value
from trainer.labels import Labels, ShardLabels
from trainer.neighbors import ChannelSnapshots
from trainer.replay import counted_views, past_range, ranges, replay
from trainer.router_shards import FOLDER, FORMAT, RouterShard, open_shard, shard_folder, write_shard
from trainer.sequences import SequenceShard, SequenceStore, test_users_identity
from trainer.trigger_features import TriggerTable, trigger_table
from trainer.triggers import Side, TriggerRequests, is_validation_user, request_rule, trigger_requests
from trainer.workers import Workers

SCALE_TRIGGERS = 200_000  # triggers that the scales of the features are taken from
LATEST_VIEWS = (20, 5)  # effective views before a request that are looked for in a list by themselves
COMPLETION_MAX = 3.0  # of a watch time over the duration; loops of short videos are no longer told apart


@dataclass
class RouterBatch:
    """B requests with their T triggers and V recent effective views. Integers are int64.

    items: the U distinct items of triggers and views, and the users' features. user_B: user ids. row_B: the request's
    row in the batch of all workers.
    request_T, request_V: the request of each. place_T, place_V: request * widest + place within the request.
    item_T, item_V: index into the items. watch_bucket_V: what was watched of the view, 0 unknown. ago_V: 0 the latest.
    trigger_TF, list_TCF: float32 features, NaN where unknown. triggers, views: widest request.
    intensity_TC float32, label_TC bool, uniqueness_TC float32, reward_ms_TC int64: labels; zeros where there are none.
    weight_T, weight_B: float32, what a trigger and a request count in the mean over the global batch, times the number
    of workers, whose losses are averaged. A worker without a request has one of weight 0.
    """

    items: ItemBatch
    user_B: Tensor
    row_B: Tensor
    request_T: Tensor
    place_T: Tensor
    item_T: Tensor
    trigger_TF: Tensor
    list_TCF: Tensor
    request_V: Tensor
    place_V: Tensor
    item_V: Tensor
    watch_bucket_V: Tensor
    ago_V: Tensor
    intensity_TC: Tensor
    label_TC: Tensor
    uniqueness_TC: Tensor
    reward_ms_TC: Tensor
    weight_T: Tensor
    weight_B: Tensor
    requests: int
    triggers: int
    views: int

    @property
    def key_T(self) -> Tensor:
        """int64 (T,): what each trigger is in the batch of all workers, for dropout."""
        return place_keys(self.row_B, self.place_T, self.triggers)

    def to(self, device: torch.device) -> RouterBatch:
        return moved(self, device)


# ------------------------------------------------------------------------------------------------------- the features

def trigger_columns(table: TriggerTable, duration_s_T: np.ndarray) -> dict[str, np.ndarray]:
    """What is known of the triggers alone, float32 (T,) each; seconds and counts as log1p, NaN where unknown. Columns
    that may be unknown come with a `known_` one.

    Args:
        duration_s_T: of the triggers' items, NaN unknown.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        seconds = {"watch_s": table.watch_s_T, "best_watch_s": table.best_watch_s_T, "age_s": table.age_s_T}
        columns = {name: np.log1p(np.maximum(values, 0)) for name, values in seconds.items()}
        completion = table.watch_s_T / np.where(duration_s_T > 0, duration_s_T, np.nan)
    columns["completion"] = np.minimum(completion, COMPLETION_MAX)
    columns |= {f"known_{name}": np.isfinite(values) for name, values in list(columns.items())}
    columns |= {"views": np.log1p(table.views_T), "position": np.log1p(table.requests.position_T),
                "effective": table.is_effective_T, "target": table.is_target_T, "popularity": table.popularity_T,
                "tag_share": table.tag_share_T}
    for name, values in table.feedback.items():
        columns |= {f"feedback_{name}": values == 1, f"feedback_{name}_unknown": values < 0}
    return {name: np.asarray(values, np.float32) for name, values in columns.items()}


def list_columns(table: TriggerTable) -> dict[str, np.ndarray]:
    """What is known of the lists that the channels would bring back, float32 (T, C) each."""
    logs = {"length": table.length_TC, "top_score": table.top_score_TC, "mean_score": table.mean_score_TC,
            "list_age_s": table.list_age_s_TC, "list_watch_s": table.list_watch_s_TC,
            "past_replay_s": table.past_replay_ms_TC / 1000, "past_hits": table.past_hits_TC, "seen": table.seen_TC}
    columns = {name: np.log1p(np.maximum(values, 0)) for name, values in logs.items()}
    columns |= {"list_popularity": table.list_popularity_TC, "unique_share": table.unique_share_TC}
    return {name: np.asarray(values, np.float32) for name, values in columns.items()}


def liked_columns(shard: SequenceShard, requests: TriggerRequests, snapshots: ChannelSnapshots
                  ) -> dict[str, np.ndarray]:
    """How many of the user's effective views before the request each list holds, log1p of float32 (T, C) each: of all
    of them, and of the latest few. Effective views are there for logs whose past has no watch times, too."""
    views = counted_views(shard, shard.is_effective_E, 0.0)
    low_R, high_R = past_range(views, shard, requests)
    names = ["liked", *(f"liked_of_{latest}" for latest in LATEST_VIEWS)]
    low_RK = np.stack([low_R, *(np.maximum(low_R, high_R - latest) for latest in LATEST_VIEWS)], axis=1)
    high_RK = np.repeat(high_R[:, None], len(names), axis=1)
    _, count_KTC = replay(views, requests, low_RK, high_RK, snapshots)
    return dict(zip(names, np.log1p(count_KTC).astype(np.float32), strict=True))


@dataclass(frozen=True)
class FeatureScales:
    """Means and standard deviations of the known values, float32: trigger-side (F,), list-side (C, F). watch_views: how
    many of the recent views lie in each bucket of watch time."""

    trigger_mean_F: np.ndarray
    trigger_std_F: np.ndarray
    list_mean_CF: np.ndarray
    list_std_CF: np.ndarray
    watch_views: tuple[int, ...]


def _scales(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(x)
    count = np.maximum(known.sum(axis=0), 1)
    x = np.where(known, x, 0).astype(np.float64)
    mean = x.sum(axis=0) / count
    std = np.sqrt(np.maximum((x**2).sum(axis=0) / count - mean**2, 0))
    # A column that hardly varies says nothing, and must not be blown up.
    return mean.astype(np.float32), np.where(std < 1e-4, 1.0, std).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- the order

class RouterPlan:
    """The global batches of one pass over the requests: (shard, number of the request among those of its kind).

    Args:
        counts: int (shards,), requests of each shard.
        batch_rows: requests of a global batch.
        order: (seed, epoch) to shuffle by; None keeps the order of the shards.
        shuffle_shards: shards that are shuffled together.
    """

    def __init__(self, counts: np.ndarray, *, batch_rows: int, order: tuple[int, int] | None, shuffle_shards: int = 1):
        self.batch_rows, self._order, self._counts = batch_rows, order, np.asarray(counts, np.int64)
        shards = np.arange(len(counts))
        if order is not None:
            shards = np.random.default_rng([*order, 1]).permutation(shards)
        self._groups = [shards[i:i + shuffle_shards] for i in range(0, len(shards), shuffle_shards)]
        self.rows = int(self._counts.sum())
        self.steps = -(-self.rows // batch_rows)

    def batches(self, first_step: int = 0) -> Iterator[np.ndarray]:
        """int64 (rows, 2) of each batch from `first_step` on, all workers' rows together."""
        skip, held = first_step * self.batch_rows, np.zeros((0, 2), np.int64)
        for number, group in enumerate(self._groups):
            rows = int(self._counts[group].sum())
            if skip >= rows:
                skip -= rows
                continue
            held = np.concatenate([held, self._of_group(number, group)[skip:]])
            skip = 0
            while len(held) >= self.batch_rows:
                yield held[:self.batch_rows]
                held = held[self.batch_rows:]
        if len(held):
            yield held

    def _of_group(self, number: int, group: np.ndarray) -> np.ndarray:
        pairs = np.concatenate([np.stack([np.full(self._counts[shard], shard), np.arange(self._counts[shard])], axis=1)
                                for shard in group])
        return pairs if self._order is None else np.random.default_rng([*self._order, 2, number]).permutation(pairs)


# ----------------------------------------------------------------------------------------------------------- the data

class RouterData:
    """Requests, features and labels of a run. With router.features=all, trainer.item_value.fit_item_value comes first.

    Raises:
        InputError: channels, statistics or labels are missing, or no training request is left to fit.
    """

    def __init__(self, config: Config, run_dir: Path):
        self.config, self.run_dir = config, Path(run_dir)
        self.store = SequenceStore(self.run_dir / "sequences")
        self.catalogue, self.vocabulary = self.store.catalogue, self.store.vocabulary
        self.rules = {side: request_rule(config, self.store.manifest, side) for side in ("train", "test")}
        self.labels = lru_cache(maxsize=None)(self._open_labels)
        self.channels = tuple(self.labels(None).channels)
        folder = self.run_dir / "channels"
        self.snapshots = ChannelSnapshots(folder, config.channels, self.vocabulary, self.channels)
        self.statistics = StatisticsSnapshots(folder, config.channels, self.vocabulary)
        self.features = ItemFeatures(self.catalogue, np.zeros(self.vocabulary.rows, np.float32), self.store.users)
        self.buckets = WatchBuckets(config.crm.condition.buckets, config.crm.condition.max_s)
        kept = config.train.shuffle_shards + 1
        self.shard = lru_cache(maxsize=kept)(self._open_shard)
        self._shard_labels = lru_cache(maxsize=kept)(
            lambda window, number: self.labels(window).shard(number, self.shard(number).requests))
        if not self.fit_counts.sum():
            raise InputError("router: no training request is left to fit; look at replay.requests (times, "
                             "min_triggers, min_future) and router.validation_share")

    def _open_labels(self, window: int | None) -> Labels:
        """The labels of a window W; None is replay.window."""
        return Labels.open(self.run_dir / "labels", self.config.replay.window if window is None else window)

    # ------------------------------------------------------------------------------------------------------- shards

    def requests(self, side: Side, number: int, shard: SequenceShard | None = None) -> TriggerRequests:
        """The requests of a side in one shard."""
        return trigger_requests(shard or self.store.open(number), number, self.rules[side], self.config)

    def read(self, side: Side, number: int, share: tuple[int, int] | None = None) -> RouterShard:
        """A shard's requests of a side with their features.

        Args:
            share: (rank, workers): one worker's contiguous share of the requests; None is all.
        """
        shard = self.store.open(number)
        requests = self.requests(side, number, shard)
        if share is not None:
            rank, workers = share
            each = -(-len(requests) // workers)
            requests = requests.take(np.arange(min(rank * each, len(requests)), min((rank + 1) * each, len(requests))))
        table = trigger_table(shard, requests, self.rules[side], self.snapshots, self.statistics, self.catalogue,
                              self.config)
        duration_s_T = np.asarray(self.catalogue.duration_s_N)[requests.trigger_row_T]
        trigger = list(trigger_columns(table, duration_s_T).values())
        lists = []
        if self.config.router.features == "all":
            lists = [*list_columns(table).values(), *liked_columns(shard, requests, self.snapshots).values(),
                     *self._expected_columns(shard, requests).values()]
        shape_TC = table.length_TC.shape
        event_V = np.flatnonzero(shard.is_effective_E)
        begin_R = np.searchsorted(event_V, shard.offset_U[requests.user_R])
        end_R = np.searchsorted(event_V, requests.history_end_R)
        return RouterShard(
            requests, np.stack(trigger, axis=1),
            np.stack(lists, axis=2) if lists else np.zeros((*shape_TC, 0), np.float32),
            np.maximum(begin_R, end_R - self.config.router.history), end_R,
            shard.item_row_E[event_V].astype(np.int64), self.buckets.encode(shard.watch_time_s_E[event_V]),
            self.is_validation(requests.user_id_R))

    # ---------------------------------------------------------------------------------------------- features on disk

    def write_features(self, workers: Workers) -> None:
        """Write the features of the training shards that are not on disk, each worker its share of them. Collective.

        Features of other inputs are deleted; those that are there are read against their checksums.
        """
        workers.on_first(self._delete_other_features)
        # Each worker one shard a round: what the others wait for is a shard, however many there are.
        for begin in range(0, self.store.shards, workers.count):
            error = None
            try:
                if begin + workers.rank < self.store.shards:
                    self._make_whole(begin + workers.rank)
            except WatchtowerError as failed:
                error = failed
            workers.raise_together(error)

    def _make_whole(self, number: int) -> None:
        folder = shard_folder(self.run_dir, self.features_fingerprint, number)
        if not self._is_whole(folder):
            remove(folder)
            write_shard(folder, self.read("train", number))

    def _delete_other_features(self) -> None:
        for name in elsewhere.names(self.run_dir / FOLDER):
            if not name.startswith(".") and name != self.features_fingerprint:
                remove(self.run_dir / FOLDER / name)

    @staticmethod
    def _is_whole(folder: Path) -> bool:
        try:
            open_shard(folder)  # reads every array against its checksum
        except WatchtowerError:
            return False
        return True

    def _open_shard(self, number: int) -> RouterShard:
        """The features of a training shard, from disk; made here where nobody has yet."""
        folder = shard_folder(self.run_dir, self.features_fingerprint, number)
        elsewhere.bring(folder / "manifest.json")
        if not (folder / "manifest.json").exists():
            write_shard(folder, self.read("train", number))
        return open_shard(folder)

    @cached_property
    def features_fingerprint(self) -> str:
        """Of all that decides `read` of the training side: requests, sequences, snapshots, item values.

        Raises:
            WatchtowerError: the item values, which are features, were not fitted.
        """
        config, store = self.config, self.store
        folders = [*([self.run_dir / ITEM_VALUE] if config.router.features == "all" else []),
                   *(s.path for found in [*self.snapshots.snapshots, self.statistics.snapshots] for s in found)]
        parts = [FORMAT, list(self.channels), [read_manifest(folder)["files"] for folder in folders],
                 store.manifest["input"]["fingerprint"], store.manifest["files"], store.shards,
                 config.router.model_dump(mode="json", include={"features", "history", "validation_share"}),
                 config.replay.model_dump(mode="json", include={"requests", "null_watch_s"}),
                 config.crm.condition.model_dump(mode="json", include={"buckets", "max_s"}),
                 config.channels.model_dump(mode="json", include={"top", "rollback_min", "before_first"}),
                 config.split.model_dump(mode="json", exclude={"test_users"}), test_users_identity(config.split),
                 config.routing.test_users.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _expected_columns(self, shard: SequenceShard, requests: TriggerRequests) -> dict[str, np.ndarray]:
        """How many of the first items of each list will be watched, by trainer/item_value.py: float32 (T, C) each."""
        parts = []
        for first in range(0, len(requests), REQUESTS_AT_ONCE):
            part = requests.take(np.arange(first, min(first + REQUESTS_AT_ONCE, len(requests))))
            found, _ = candidates(shard, part, self.snapshots, self.statistics, self.catalogue)
            parts.append(expected_hits(found, self.item_value.values(found), part, self.snapshots,
                                       self.vocabulary.rows))
        hits_TCP = np.concatenate(parts or [np.zeros((0, len(self.channels), len(TOPS)), np.float32)])
        return {f"expected_hits_{top}": hits_TCP[:, :, place] for place, top in enumerate(TOPS)}

    @cached_property
    def item_value(self) -> ItemValue:
        """The network that values single items.

        Raises:
            WatchtowerError: it was not fitted.
        """
        return load_item_value(self.run_dir)

    def is_validation(self, user_ids: np.ndarray) -> np.ndarray:
        """bool: the training users whose requests choose the epoch."""
        return is_validation_user(user_ids, self.config)

    @cached_property
    def _counts(self) -> np.ndarray:
        """int64 (shards, 2): requests to fit, and of validation."""
        def of(number: int) -> tuple[int, int]:
            is_validation_R = self.is_validation(self.requests("train", number).user_id_R)
            return int((~is_validation_R).sum()), int(is_validation_R.sum())

        return np.array([of(number) for number in range(self.store.shards)], np.int64)

    @property
    def fit_counts(self) -> np.ndarray:
        """int64 (shards,): requests that are fitted."""
        return self._counts[:, 0]

    @property
    def validation_counts(self) -> np.ndarray:
        """int64 (shards,): requests that choose the epoch."""
        return self._counts[:, 1]

    @cached_property
    def scales(self) -> FeatureScales:
        """Of the fitted requests of the first shards, as many as SCALE_TRIGGERS takes."""
        triggers, lists, views, found = [], [], np.zeros(self.buckets.rows, np.int64), 0
        for number in range(self.store.shards):
            shard = self.shard(number)
            fit_T = ~shard.is_validation_R[shard.requests.request_T]
            triggers.append(shard.trigger_TF[fit_T])
            lists.append(shard.list_TCF[fit_T])
            at_V = ranges(shard.view_begin_R, shard.view_end_R - shard.view_begin_R)
            views += np.bincount(shard.view_bucket_V[at_V], minlength=self.buckets.rows)
            found += int(fit_T.sum())
            if found >= SCALE_TRIGGERS:
                break
        return FeatureScales(*_scales(np.concatenate(triggers)), *_scales(np.concatenate(lists)),
                             tuple(int(n) for n in views))

    # ------------------------------------------------------------------------------------------------------- batches

    def plan(self, seed: int, epoch: int) -> RouterPlan:
        """The fitted requests of one epoch."""
        return RouterPlan(self.fit_counts, batch_rows=self.config.router.batch_requests, order=(seed, epoch),
                          shuffle_shards=self.config.train.shuffle_shards)

    def batches(self, plan: RouterPlan, model: RouterModelConfig, rank: int, workers: int, first_step: int = 0, *,
                validation: bool = False) -> Iterator[RouterBatch]:
        """One worker's share of each global batch of a plan, with the labels of the model's window."""
        for pairs in plan.batches(first_step):
            parts, row_B, triggers = [], [np.zeros(0, np.int64)], 0
            mine = np.zeros(len(pairs), bool)
            mine[rank::workers] = True
            for number in np.unique(pairs[:, 0]):
                shard = self.shard(int(number))
                of_shard = pairs[:, 0] == number
                kind_R = np.flatnonzero(shard.is_validation_R == validation)
                triggers += int(np.diff(shard.requests.trigger_offset_R1)[kind_R[pairs[of_shard, 1]]].sum())
                at_R = kind_R[pairs[of_shard & mine, 1]]
                if len(at_R):
                    parts.append((shard, at_R, self._shard_labels(model.window, int(number))))
                    row_B.append(np.flatnonzero(of_shard & mine))
            yield self.batch(parts, workers / triggers, workers / len(pairs), np.concatenate(row_B))

    def batch(self, parts: Sequence[tuple[RouterShard, np.ndarray, ShardLabels | None]], weight_of_trigger: float = 1.0,
              weight_of_request: float = 1.0, row_B: np.ndarray | None = None) -> RouterBatch:
        """The batch of some requests.

        Args:
            parts: (shard, indices of its requests, the shard's labels or None) each. None at all gives a request of one
                unknown item and weight 0, so that a worker without a request takes part in every collective.
            row_B: int64, the requests' rows in the batch of all workers; None: it is this batch.
        """
        pieces = [self._piece(*part) for part in parts] or [self._nothing()]
        whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        count_B, length_B = whole["triggers"], whole["views"]
        request_T, request_V = np.repeat(np.arange(len(count_B)), count_B), np.repeat(np.arange(len(count_B)), length_B)
        within_T, within_V = ranges(np.zeros_like(count_B), count_B), ranges(np.zeros_like(length_B), length_B)
        triggers, views = int(count_B.max()), max(1, int(length_B.max()))
        row_U, item = np.unique(np.concatenate([whole["row_T"], whole["row_V"]]), return_inverse=True)
        item = item.ravel()
        real = np.float32(bool(parts))
        arrays = {
            "user_B": whole["user"],
            "row_B": row_B if row_B is not None and len(row_B) else np.arange(len(count_B)), "request_T": request_T,
            "place_T": request_T * triggers + within_T,
            "item_T": item[:len(request_T)], "trigger_TF": whole["trigger"], "list_TCF": whole["list"],
            "request_V": request_V, "place_V": request_V * views + within_V, "item_V": item[len(request_T):],
            "watch_bucket_V": whole["bucket_V"], "ago_V": length_B[request_V] - 1 - within_V,
            "intensity_TC": whole["intensity"], "label_TC": whole["label"], "uniqueness_TC": whole["uniqueness"],
            "reward_ms_TC": whole["reward_ms"],
            "weight_T": np.full(len(request_T), real * weight_of_trigger, np.float32),
            "weight_B": np.full(len(count_B), real * weight_of_request, np.float32)}
        return RouterBatch(items=self.features.take(row_U, whole["user"]), requests=len(count_B), triggers=triggers,
                           views=views, **{name: torch.from_numpy(values) for name, values in arrays.items()})

    def _piece(self, shard: RouterShard, at_R: np.ndarray, labels: ShardLabels | None) -> dict[str, np.ndarray]:
        offset_R1 = shard.requests.trigger_offset_R1
        count_R = np.diff(offset_R1)[at_R]
        at_T = ranges(offset_R1[at_R], count_R)
        begin_R, length_R = shard.view_begin_R[at_R], (shard.view_end_R - shard.view_begin_R)[at_R]
        at_V = ranges(begin_R, length_R)
        return {"user": shard.requests.user_id_R[at_R], "triggers": count_R, "views": length_R,
                "row_T": shard.requests.trigger_row_T[at_T].astype(np.int64), "row_V": shard.view_row_V[at_V],
                "bucket_V": shard.view_bucket_V[at_V], "trigger": shard.trigger_TF[at_T], "list": shard.list_TCF[at_T],
                **(self._no_labels(len(at_T)) if labels is None else {
                    "intensity": labels.intensity_TC[at_T], "label": labels.label_TC[at_T],
                    "uniqueness": labels.uniqueness_TC[at_T], "reward_ms": labels.reward_ms_TC[at_T]})}

    def _no_labels(self, triggers: int) -> dict[str, np.ndarray]:
        shape_TC = (triggers, len(self.channels))
        return {"intensity": np.zeros(shape_TC, np.float32), "label": np.zeros(shape_TC, bool),
                "uniqueness": np.zeros(shape_TC, np.float32), "reward_ms": np.zeros(shape_TC, np.int64)}

    def _nothing(self) -> dict[str, np.ndarray]:
        scales, none, one = self.scales, np.zeros(0, np.int64), np.ones(1, np.int64)
        return {"user": np.zeros(1, np.int64), "triggers": one, "views": np.zeros(1, np.int64),
                "row_T": np.zeros(1, np.int64), "row_V": none, "bucket_V": none,
                "trigger": np.full((1, len(scales.trigger_mean_F)), np.nan, np.float32),
                "list": np.full((1, *scales.list_mean_CF.shape), np.nan, np.float32), **self._no_labels(1)}
