"""What all CRM models of a run share: sequences, split, statistics of the targets, features, requests.

Made once a process. Every worker makes the same from the same files; nothing here is sharded but the training rows,
which `EpochPlan` deals out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from configs.errors import InputError
from configs.schema import Config, ModelConfig
from trainer.batches import Collation, ItemFeatures
from trainer.bayes import BayesTerm, duration_bin, item_watch_mean
from trainer.conditions import WatchBuckets
from trainer.metrics import watch_histogram
from trainer.requests import Requests, sample_requests
from trainer.sequences import SequenceStore, SplitTimes, is_test_user, split_times, test_users_identity
from trainer.statistics import TargetStatistics, target_statistics
from trainer.windows import EpochPlan, TargetViews, WindowRule, count_windows, load_targets

DAY_MS = 86_400_000


class CrmData:
    """Sequences of a run and everything that is computed from them.

    Args:
        slices: time slices [begin, end) in ms to train on instead of those of `train.slices`; None is open. Nothing at
            or after the end of the last one is a target, nothing is validated or judged, and where split.test_users is
            null those of routing.test_users are held out.

    Raises:
        InputError: if the split, or the slices, leave no training target.
    """

    def __init__(self, config: Config, run_dir: Path, slices: Sequence[tuple[int | None, int]] | None = None):
        self.config, self.run_dir, self._slices = config, Path(run_dir), slices
        self.store = SequenceStore(self.run_dir / "sequences")
        self.catalogue = self.store.catalogue
        self.split = config.split
        if slices is None:
            self.times = split_times(config, self.store.manifest)
        else:
            self.times = SplitTimes(*[slices[-1][1]] * 3)
            if config.split.test_users is None:
                self.split = config.split.model_copy(update={"test_users": config.routing.test_users})
        self.buckets = WatchBuckets(config.crm.condition.buckets, config.crm.condition.max_s)
        self._test_users = self.split.test_users
        # A group of shards is open at a time; without more shards than that nothing is read twice.
        self._load = lru_cache(maxsize=max(2, config.train.shuffle_shards + 1))(self._read)
        self._permuted = lru_cache(maxsize=max(2, config.train.shuffle_shards + 1))(
            lambda shard: self._load(shard).permuted(shard, self.times.validation_start_ms))
        self._statistics_until = lru_cache(maxsize=2)(self._count_statistics)
        if not self.statistics.views_N.sum():
            if slices is not None:
                raise InputError(f"no target view lies before {slices[-1][1]} ms, the last watermark of the channels: "
                                 "nothing is there to train on; check data.target and the times of the requests")
            raise InputError("split: no target view lies before split.validation_start "
                             f"({self.times.validation_start_ms} ms); move it, or check data.target")

    def _read(self, shard: int) -> TargetViews:
        return load_targets(self.store, shard, None if self._test_users is None else self._trainable)

    def _trainable(self, user_id_U: np.ndarray) -> np.ndarray:
        return ~is_test_user(user_id_U, self.split)

    def loader(self, model: ModelConfig | None = None) -> Callable[[int], TargetViews]:
        """Shard number to its target views, as this model is trained on them."""
        return self._permuted if model is not None and model.permute_watch else self._load

    @cached_property
    def requests_fingerprint(self) -> str:
        """What decides which views are targets and requests, whatever the model: the sequences and the split."""
        config = self.config
        split = config.split.model_dump(mode="json", exclude={"test_users"})
        parts = [self.store.manifest["input"]["fingerprint"], split, test_users_identity(config.split),
                 config.train.min_history, config.train.slices]
        if self._slices is not None:
            parts = [parts[0], test_users_identity(self.split), config.train.min_history, self._slices]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def slices(self) -> list[tuple[int | None, int]]:
        """The time slices that epochs pass over, [begin, end) in ms. The end is the watermark of what is rebuilt."""
        if self._slices is not None:
            return list(self._slices)
        end = self.times.validation_start_ms
        if self.config.train.slices == 1:
            return [(None, end)]
        offset = int(self.config.data.utc_offset_h * 3_600_000)
        first = (int(self.store.manifest["statistics"]["first_timestamp_ms"]) + offset) // DAY_MS * DAY_MS - offset
        days = range(first + DAY_MS, end + DAY_MS, DAY_MS)
        return [(day - DAY_MS if number else None, min(day, end)) for number, day in enumerate(days)]

    def rule(self, model: ModelConfig, time_slice: tuple[int | None, int]) -> WindowRule:
        """How this model's windows are cut in a slice."""
        train, history = self.config.train, self.config.crm.tower.history
        return WindowRule(history=history, stride=train.stride or max(1, history // 2),
                          loss_positions=model.loss_positions, cuts_per_user=train.cuts_per_user,
                          begin_ms=time_slice[0], end_ms=time_slice[1], min_history=train.min_history)

    def plan(self, model: ModelConfig, seed: int, epoch: int, time_slice: tuple[int | None, int]) -> EpochPlan:
        """The batches of one epoch."""
        rule = self.rule(model, time_slice)
        return EpochPlan(self.loader(model), self._window_counts(rule), rule,
                         batch_rows=model.batch_rows or self.config.train.batch_rows, seed=seed, epoch=epoch,
                         shuffle_shards=self.config.train.shuffle_shards)

    def _window_counts(self, rule: WindowRule) -> np.ndarray:
        if rule not in self._counts:
            self._counts[rule] = np.array([count_windows(self._load(s), rule) for s in range(self.store.shards)])
        return self._counts[rule]

    @cached_property
    def _counts(self) -> dict[WindowRule, np.ndarray]:
        return {}

    def collation(self, model: ModelConfig, *, training: bool) -> Collation:
        """How this model's batches are made."""
        return Collation(kind=model.condition, buckets=self.buckets,
                         dropout=self.config.crm.condition.dropout if training else 0.0,
                         utc_offset_ms=int(self.config.data.utc_offset_h * 3_600_000),
                         positions=self.config.crm.tower.history + 1,
                         negative_groups=self.config.crm.negative_groups)

    @cached_property
    def statistics(self) -> TargetStatistics:
        """Of the training targets, all slices."""
        return self._count_statistics(self.slices[-1][1])

    def statistics_until(self, end_ms: int) -> TargetStatistics:
        """Of the training targets before `end_ms`: all that a slice which ends there may know."""
        return self.statistics if end_ms == self.slices[-1][1] else self._statistics_until(end_ms)

    def _count_statistics(self, end_ms: int) -> TargetStatistics:
        model = ModelConfig(name="all", tower="dnn")
        return target_statistics(self._load, self.store.shards, len(self.catalogue.item_id_N),
                                 self.config.evaluate.bayes_edges_s, self.rule(model, (None, end_ms)), self.buckets)

    @cached_property
    def features(self) -> ItemFeatures:
        return ItemFeatures(self.catalogue, self.statistics.log_q_N(), self.store.users)

    def features_until(self, end_ms: int) -> ItemFeatures:
        """The features with the log q of the targets before `end_ms`."""
        if end_ms == self.slices[-1][1]:
            return self.features
        return ItemFeatures(self.catalogue, self.statistics_until(end_ms).log_q_N(), self.store.users)

    @cached_property
    def duration_bin_N(self) -> np.ndarray:
        return duration_bin(self.catalogue.duration_s_N)

    @cached_property
    def item_watch_s_N(self) -> np.ndarray:
        """float64 (N,), seconds: what one view of an item lasts in training, shrunk to its duration bin."""
        counted = self.statistics
        return item_watch_mean(counted.watch_sum_N, counted.known_views_N, self.duration_bin_N,
                               self.config.evaluate.watch_prior_views)

    @cached_property
    def bayes(self) -> BayesTerm:
        return BayesTerm.fit(self.statistics.bucket_views_NK, self.duration_bin_N, self.config.evaluate.bayes_edges_s,
                             self.config.evaluate.bayes_prior_views)

    def index_rows(self, watermark_ms: int) -> np.ndarray:
        """Catalogue rows that an index holds, int64: the whole catalogue, or, where there is none, every item whose
        first event lies before the watermark."""
        known_N = np.asarray(self.catalogue.in_catalogue_N) | (
            np.asarray(self.catalogue.first_seen_ms_N) < watermark_ms)
        known_N[0] = False
        return np.flatnonzero(known_N)

    @cached_property
    def validation(self) -> Requests:
        evaluate = self.config.evaluate
        return self._requests(self.times.validation_start_ms, self.times.test_start_ms, evaluate.validation_queries)

    @cached_property
    def test(self) -> Requests:
        return self._requests(self.times.test_start_ms, self.times.test_end_ms, self.config.evaluate.queries)

    def _requests(self, begin_ms: int, end_ms: int, limit: int | None) -> Requests:
        judged = None if self._test_users is None else lambda user_id_U: is_test_user(user_id_U, self.split)
        return sample_requests(self._load, self.store.shards, begin_ms, end_ms, judged=judged, limit=limit,
                               future=self.config.evaluate.future, seed=self.config.evaluate.seed)

    @cached_property
    def test_views_NB(self) -> np.ndarray:
        """int64 (N, B): all test target views of each item by watch bucket, for the bucket lift."""
        total = 0
        for shard in range(self.store.shards):
            views = self._load(shard)
            inside_E = (views.timestamp_ms_E >= self.times.test_start_ms) & (
                views.timestamp_ms_E < self.times.test_end_ms)
            total = total + watch_histogram(views.item_row_E[inside_E], views.watch_s_E[inside_E],
                                            len(self.catalogue.item_id_N), self.config.evaluate.lift_edges_s)
        return total
