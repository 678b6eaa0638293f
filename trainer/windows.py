"""Windows: which stretch of which user's views makes a training row, and in which order.

CRM's sequence is a user's target views in time order. A window is at most `history + 1` of them; its targets are the
views that no earlier window of the epoch predicts, so that every target is trained once an epoch, with at least
`history - stride` views before it where the user has them.

The order of an epoch is a function of (seed, epoch) and of nothing else: shards are permuted and taken in groups,
the windows of a group are permuted together, and the rest of a group joins the next one, so that all global batches
but the last are full. Any number of workers walks the same batches and takes its rows of each; a run that continues
skips whole groups without opening them.

Shape suffixes: E = target views of a shard, U = its users, W = windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from configs.errors import InputError
from trainer.sequences import SequenceShard, SequenceStore

PREFER_KNOWN = 16.0
"""How much sooner a target with a known watch time is drawn, where windows are drawn at random."""


@dataclass(frozen=True)
class TargetViews:
    """The target views of a shard's users, users in order, each user's views in time order.

    user_id_U int64; offset_U int64 and length_U int64 into the views; item_row_E int64; watch_s_E float32 (NaN:
    unknown); timestamp_ms_E int64; ordinal_E bool (the time only orders); trainable_U bool (False: a held-out user).
    """

    user_id_U: np.ndarray
    offset_U: np.ndarray
    length_U: np.ndarray
    item_row_E: np.ndarray
    watch_s_E: np.ndarray
    timestamp_ms_E: np.ndarray
    ordinal_E: np.ndarray
    trainable_U: np.ndarray

    def owner_E(self) -> np.ndarray:
        """int64 (E,), the user (0..U-1) of each view."""
        return np.repeat(np.arange(len(self.user_id_U)), self.length_U)

    def permuted(self, seed: int, end_ms: int | None = None) -> TargetViews:
        """The same views with the known watch times before `end_ms` dealt out anew among them: a control that must
        show nothing."""
        known_E = np.isfinite(self.watch_s_E)
        if end_ms is not None:
            known_E &= self.timestamp_ms_E < end_ms
        watch_E = self.watch_s_E.copy()
        watch_E[known_E] = np.random.default_rng(seed).permutation(watch_E[known_E])
        return replace(self, watch_s_E=watch_E)


def target_views(shard: SequenceShard, trainable_U: np.ndarray | None = None) -> TargetViews:
    """Takes the target views out of a shard; all other rows are left behind."""
    is_target_E = np.asarray(shard.is_target_E, dtype=bool)
    count_before = np.concatenate([[0], np.cumsum(is_target_E)])
    begin_U = count_before[shard.offset_U]
    end_U = count_before[shard.offset_U + shard.length_U]
    user_id_U = np.asarray(shard.user_id_U)
    return TargetViews(
        user_id_U=user_id_U, offset_U=begin_U, length_U=end_U - begin_U,
        item_row_E=np.asarray(shard.item_row_E)[is_target_E].astype(np.int64),
        watch_s_E=np.asarray(shard.watch_time_s_E)[is_target_E].astype(np.float32),
        timestamp_ms_E=np.asarray(shard.timestamp_ms_E)[is_target_E],
        ordinal_E=np.asarray(shard.is_ordinal_E)[is_target_E].astype(bool),
        trainable_U=np.ones(len(user_id_U), dtype=bool) if trainable_U is None else trainable_U)


@dataclass(frozen=True)
class Windows:
    """Rows of an epoch: views [begin, end) of a shard, of which [first_target, end) are predicted. int64 (W,) each."""

    begin_W: np.ndarray
    end_W: np.ndarray
    first_target_W: np.ndarray

    def __len__(self) -> int:
        return len(self.begin_W)

    def take(self, index: np.ndarray) -> Windows:
        return Windows(self.begin_W[index], self.end_W[index], self.first_target_W[index])


@dataclass(frozen=True)
class WindowRule:
    """How windows are cut.

    Attributes:
        history: past views a window holds before its last target.
        stride: targets of a window that follows another of the same user.
        loss_positions: "all", or "last": one window a target, `cuts_per_user` targets a user and epoch.
        cuts_per_user: see above.
        begin_ms, end_ms: the time slice whose views are targets; begin is inside, end is not; None is open.
        min_history: past views a target needs.

    Raises:
        InputError: if windows are so far apart that the views between two of them would never be a target.
    """

    history: int
    stride: int
    loss_positions: str = "all"
    cuts_per_user: int = 4
    begin_ms: int | None = None
    end_ms: int | None = None
    min_history: int = 0

    def __post_init__(self) -> None:
        if self.stride > self.history + 1:
            raise InputError(f"train.stride ({self.stride} views) must be at most crm.tower.history + 1 "
                             f"({self.history + 1}): the views between two windows would never be trained on")


def target_range(views: TargetViews, rule: WindowRule) -> tuple[np.ndarray, np.ndarray]:
    """Each user's targets as a range [first, last) of views, both int64 (U,): those in the time slice with enough
    history, none for users who are held out."""
    owner_E = views.owner_E()
    first_U = views.offset_U + rule.min_history
    last_U = views.offset_U + views.length_U
    users = len(views.user_id_U)
    if rule.begin_ms is not None:
        before_U = np.bincount(owner_E[views.timestamp_ms_E < rule.begin_ms], minlength=users)
        first_U = np.maximum(first_U, views.offset_U + before_U)
    if rule.end_ms is not None:
        last_U = views.offset_U + np.bincount(owner_E[views.timestamp_ms_E < rule.end_ms], minlength=users)
    last_U = np.where(views.trainable_U, last_U, first_U)
    return first_U, np.maximum(first_U, last_U)


def count_windows(views: TargetViews, rule: WindowRule) -> int:
    """How many windows `cut_windows` makes, without making them."""
    first_U, last_U = target_range(views, rule)
    if rule.loss_positions == "last":
        return int(np.minimum(last_U - first_U, rule.cuts_per_user).sum())
    return int(_windows_per_user(views, rule, first_U, last_U)[1].sum())


def _windows_per_user(views, rule, first_U, last_U):
    first_end_U = np.minimum(last_U, np.maximum(views.offset_U + rule.history + 1, first_U + rule.stride))
    further_U = -(-(last_U - first_end_U) // rule.stride)
    return first_end_U, np.where(last_U > first_U, 1 + further_U, 0)


def cut_windows(views: TargetViews, rule: WindowRule, rng: np.random.Generator) -> Windows:
    """The windows of a shard, users in order; `rng` draws the cuts where the loss is at the last position."""
    first_U, last_U = target_range(views, rule)
    if rule.loss_positions == "last":
        return _random_cuts(views, rule, first_U, last_U, rng)
    first_end_U, count_U = _windows_per_user(views, rule, first_U, last_U)
    owner_W = np.repeat(np.arange(len(count_U)), count_U)
    nth_W = np.arange(len(owner_W)) - np.repeat(np.cumsum(count_U) - count_U, count_U)
    end_W = np.minimum(first_end_U[owner_W] + nth_W * rule.stride, last_U[owner_W])
    previous_end_W = first_end_U[owner_W] + (nth_W - 1) * rule.stride
    first_target_W = np.where(nth_W == 0, first_U[owner_W], previous_end_W)
    begin_W = np.maximum(views.offset_U[owner_W], end_W - rule.history - 1)
    return Windows(begin_W, end_W, first_target_W)


def _random_cuts(views, rule, first_U, last_U, rng) -> Windows:
    count_U = last_U - first_U
    owner_C = np.repeat(np.arange(len(count_U)), count_U)
    start_C = np.cumsum(count_U) - count_U
    target_C = np.arange(len(owner_C)) - np.repeat(start_C, count_U) + first_U[owner_C]
    # Only a known watch time trains the condition, and a log may have few of them.
    known_C = np.isfinite(views.watch_s_E[target_C])
    order_C = np.lexsort((rng.random(len(owner_C)) * np.where(known_C, 1 / PREFER_KNOWN, 1.0), owner_C))
    rank_C = np.arange(len(owner_C)) - np.repeat(start_C, count_U)
    target_W = np.sort(target_C[order_C][rank_C < rule.cuts_per_user])
    owner_W = np.searchsorted(views.offset_U + views.length_U, target_W, side="right")
    begin_W = np.maximum(views.offset_U[owner_W], target_W - rule.history)
    return Windows(begin_W, target_W + 1, target_W)


@dataclass(frozen=True)
class BatchRows:
    """One worker's rows of a global batch, before they are collated: windows of several shards.

    parts: (views, windows) pairs, empty where a small last batch has no row for this worker; global_rows: windows of
    the whole global batch, of which rows rank, rank + workers, .. are here. target_row_by_rank: item rows of the
    targets of every worker, int64 each, in the order of the worker's own batch; targets_by_rank: how many each of its
    windows has. Every worker knows the whole plan, so the columns of the softmax need not be asked for. None: one
    worker, whose targets are those of `parts`.
    """

    parts: list[tuple[TargetViews, Windows]]
    global_rows: int
    rank: int
    workers: int
    target_row_by_rank: list[np.ndarray] | None = None
    targets_by_rank: list[np.ndarray] | None = None


def target_rows(parts: list[tuple[TargetViews, Windows]]) -> np.ndarray:
    """int64, the item rows that windows predict, window by window in time order."""
    rows = [np.zeros(0, dtype=np.int64)]
    for views, windows in parts:
        first_W = np.maximum(windows.first_target_W, windows.begin_W)
        count_W = windows.end_W - first_W
        shift_W = first_W - (np.cumsum(count_W) - count_W)
        rows.append(views.item_row_E[np.repeat(shift_W, count_W) + np.arange(count_W.sum())])
    return np.concatenate(rows)


def target_counts(parts: list[tuple[TargetViews, Windows]]) -> np.ndarray:
    """int64, how many views each window predicts."""
    counts = [windows.end_W - np.maximum(windows.first_target_W, windows.begin_W) for _, windows in parts]
    return np.concatenate([np.zeros(0, dtype=np.int64), *counts])


class EpochPlan:
    """The batches of one epoch, the same for every worker.

    Args:
        load: shard number to its TargetViews.
        windows_per_shard: int (shards,), from `count_windows`: lets a run that continues skip whole groups.
        batch_rows: windows of a global batch.
        rule, seed, epoch, shuffle_shards: see the module's text.
    """

    def __init__(self, load, windows_per_shard: np.ndarray, rule: WindowRule, *, batch_rows: int, seed: int,
                 epoch: int, shuffle_shards: int):
        self._load, self.rule, self.batch_rows = load, rule, batch_rows
        self._seed, self._epoch = seed, epoch
        self._windows_per_shard = np.asarray(windows_per_shard, dtype=np.int64)
        order = np.random.default_rng([seed, epoch, 1]).permutation(len(self._windows_per_shard))
        self._groups = [order[i:i + shuffle_shards] for i in range(0, len(order), shuffle_shards)]
        self.rows = int(self._windows_per_shard.sum())
        self.steps = -(-self.rows // batch_rows)

    def batches(self, rank: int, workers: int, first_step: int = 0) -> Iterator[BatchRows]:
        """This worker's rows of the batches from `first_step` on: rows rank, rank + workers, .. of each."""
        skip = first_step * self.batch_rows
        waiting: list[tuple[TargetViews, Windows]] = []
        held = 0
        for number, group in enumerate(self._groups):
            rows = int(self._windows_per_shard[group].sum())
            if skip >= rows and not held:
                skip -= rows
                continue
            for views, windows in self._shuffled(number, group):
                part = windows.take(slice(min(skip, len(windows)), None))
                skip -= len(windows) - len(part)
                if len(part):
                    waiting.append((views, part))
                    held += len(part)
            while held >= self.batch_rows:
                taken, waiting = _split(waiting, self.batch_rows)
                held -= self.batch_rows
                yield _mine(_by_length(taken), rank, workers, self.batch_rows)
        if held:
            yield _mine(_by_length(waiting), rank, workers, held)

    def _shuffled(self, number: int, group: np.ndarray) -> Iterator[tuple[TargetViews, Windows]]:
        """The group's windows in random order, as runs of one shard each."""
        rng = np.random.default_rng([self._seed, self._epoch, 2, number])
        views = [self._load(int(shard)) for shard in group]
        windows = [cut_windows(v, self.rule, np.random.default_rng([self._seed, self._epoch, 3, int(shard)]))
                   for v, shard in zip(views, group, strict=True)]
        joined = join_views(views)
        shift = np.cumsum([0] + [len(v.item_row_E) for v in views])
        together = Windows(*(np.concatenate([getattr(w, name) + shift[i] for i, w in enumerate(windows)])
                             for name in ("begin_W", "end_W", "first_target_W")))
        yield joined, together.take(rng.permutation(len(together)))


def join_views(views: list[TargetViews]) -> TargetViews:
    """The views of several shards as one."""
    if len(views) == 1:
        return views[0]
    shift = np.cumsum([0] + [len(v.item_row_E) for v in views])
    joined = {name: np.concatenate([getattr(v, name) for v in views])
              for name in ("user_id_U", "length_U", "item_row_E", "watch_s_E", "timestamp_ms_E", "ordinal_E",
                           "trainable_U")}
    return TargetViews(offset_U=np.concatenate([v.offset_U + shift[i] for i, v in enumerate(views)]), **joined)


def _split(parts, rows):
    taken, left = [], []
    for views, windows in parts:
        if rows >= len(windows):
            taken.append((views, windows))
            rows -= len(windows)
        elif rows:
            taken.append((views, windows.take(slice(0, rows))))
            left.append((views, windows.take(slice(rows, None))))
            rows = 0
        else:
            left.append((views, windows))
    return taken, left


def _by_length(parts):
    """The windows of each part by their length. Dealt out in turn, they give every worker about as many views: what two
    have differs by no more than the longest window of each part, where by chance it grows with their number."""
    return [(views, windows.take(np.argsort(windows.end_W - windows.begin_W, kind="stable")))
            for views, windows in parts]


def _mine(parts, rank, workers, rows) -> BatchRows:
    dealt = [_dealt(parts, worker, workers) for worker in range(workers)]
    return BatchRows(dealt[rank], rows, rank, workers, [target_rows(of_worker) for of_worker in dealt],
                     [target_counts(of_worker) for of_worker in dealt])


def _dealt(parts, rank, workers):
    """Windows rank, rank + workers, .. of all parts in a row."""
    mine, seen = [], 0
    for views, windows in parts:
        offset = (rank - seen) % workers
        if offset < len(windows):
            mine.append((views, windows.take(slice(offset, None, workers))))
        seen += len(windows)
    return mine


def load_targets(store: SequenceStore, shard: int, trainable=None) -> TargetViews:
    """The target views of a shard; `trainable` maps user ids to a bool array, None trains on all."""
    opened = store.open(shard)
    user_id_U = np.asarray(opened.user_id_U)
    return target_views(opened, None if trainable is None else trainable(user_id_U))
