"""The batch: made once from windows of views, and never converted until the loss.

A batch holds B windows of up to P positions. Position i is one view: its watch-time condition W_i, the clock at its
request, and its item x_i with what was watched of it. A tower's user vector at position i has seen everything before
x_i and W_i itself, never x_i.

Every item of the batch, in histories and as targets, is looked up once: `items` lists the U distinct items, and
positions point into that list. A target's item is in the list because the loss needs its vector; in a batch of
requests (`Collation.request_batch`) the item that comes next is not in the batch at all.

This is the one file outside embeddings/ that knows TorchRec: a KeyedJaggedTensor is part of the batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.conditions import WatchBuckets, returns
from trainer.dropout import place_keys
from trainer.losses import Columns, softmax_columns
from trainer.windows import BatchRows, TargetViews, target_counts, target_rows

GAP_BUCKETS = 32
GAP_MAX_S = 30 * 86_400.0
HOURS = 24


@dataclass
class ItemBatch:
    """U distinct items with all their features. Row 0 of every table is the unknown row.

    features: ids for the embedding tables, one key a table: `item`, `author`, `category_<name>`, `tag` of the U items,
    and `user_<name>` of the B users of a batch of windows.
    row_U: int64, rows of the vocabulary. duration_bucket_U: int64. content_UC: float32 or None.
    tag_item_T: int64, the item (0..U-1) of each tag id. log_q_U: float32, log share of the training targets.
    """

    features: KeyedJaggedTensor
    row_U: Tensor
    duration_bucket_U: Tensor
    content_UC: Tensor | None
    tag_item_T: Tensor
    log_q_U: Tensor

    def to(self, device: torch.device) -> ItemBatch:
        return moved(self, device)


@dataclass
class WindowBatch:
    """B windows of up to P positions over the U items beside them. All int64.

    What is known of positions is packed: V of them hold a view, in window order, and nothing is computed for the rest.

    place_V: position b * P + p of each. item_V: index into the items. watch_bucket_V: what was watched of x_i (0:
    unknown). condition_bucket_V: W_i. hour_V: 0 unknown, else 1 + hour of the day of the request. gap_V: 0 unknown,
    else the log bucket of the time since the last view. read_R: the packed positions that user vectors are read at,
    the targets in training and the last ones of requests. user_B: user ids, for messages. row_B: the window's row in
    the batch of all workers. windows, positions: B, P.
    targets_per_rank: targets of each worker in this global batch. They are read group by group, targets_per_group of
    each group that this worker has a window of, and scored with that group's columns, columns_per_group of them
    (losses.Columns): column_log_q_G (float32), column_count_G (float32, how many targets are this item), and
    column_arrival_G, where among the vectors that arrive each lies. given_item_S: index into the items of those whose
    vectors this worker gives; given_per_rank, columns_per_rank, columns_travel: how many to and from each worker, and
    whether any. target_column_R: where among the group's columns the target of each position that is read lies. Empty
    in a batch of requests.
    """

    items: ItemBatch
    place_V: Tensor
    item_V: Tensor
    watch_bucket_V: Tensor
    condition_bucket_V: Tensor
    hour_V: Tensor
    gap_V: Tensor
    read_R: Tensor
    user_B: Tensor
    row_B: Tensor
    windows: int
    positions: int
    targets_per_rank: list[int]
    targets_per_group: list[int]
    columns_per_group: list[int]
    column_log_q_G: Tensor
    column_count_G: Tensor
    column_arrival_G: Tensor
    given_item_S: Tensor
    given_per_rank: list[int]
    columns_per_rank: list[int]
    columns_travel: bool
    target_column_R: Tensor

    @property
    def key_V(self) -> Tensor:
        """int64 (V,): what each packed position is in the global batch, for dropout."""
        return place_keys(self.row_B, self.place_V, self.positions)

    def to(self, device: torch.device) -> WindowBatch:
        return moved(self, device)


Moving = TypeVar("Moving")


def moved(batch: Moving, device: torch.device) -> Moving:
    """A batch (a dataclass) with all its tensors on the device."""
    if device.type == "cpu":
        return batch
    there = {f.name: getattr(batch, f.name) for f in fields(batch)}
    there = {name: value.to(device) if isinstance(value, ItemBatch) else value.to(device, non_blocking=True)
             for name, value in there.items() if hasattr(value, "to")}
    return replace(batch, **there)


class ItemFeatures:
    """The catalogue's arrays in the form that batches take them from. Shared by training, index and evaluation.

    Args:
        catalogue: trainer.catalogue.Catalogue, one row per vocabulary row, row 0 the unknown item.
        log_q_N: float32 (N,), log share of each item among the training targets.
        users: trainer.catalogue.UserFeatures, or None where the logs come without a users table.
    """

    def __init__(self, catalogue, log_q_N: np.ndarray, users=None):
        self._users = users
        self.rows = len(catalogue.item_id_N)
        self.log_q_N = np.asarray(log_q_N, dtype=np.float32)
        self.duration_bucket_N = np.asarray(catalogue.duration_bucket_N)
        self.content_NC = catalogue.content_NC
        self._single = {"item": None, "author": np.asarray(catalogue.author_row_N)}
        self._single |= {f"category_{name}": np.asarray(rows) for name, rows in catalogue.categories.items()}
        self._tag_offsets, self._tag_rows = np.asarray(catalogue.tag_offsets_N1), np.asarray(catalogue.tag_rows)

    def take(self, row_U: np.ndarray, user_id_B: np.ndarray | None = None) -> ItemBatch:
        """The features of these items, int64 (U,) rows of the vocabulary, and of these users, int64 (B,) ids, behind
        them: one lookup serves both. Users' keys are empty where none are given."""
        items = len(row_U)
        user_id_B = np.zeros(0, np.int64) if user_id_B is None or self._users is None else user_id_B
        samples = max(items, len(user_id_B))
        keys, values, lengths = [], [], []
        for name, column in self._single.items():
            keys.append(name)
            values.append(row_U if column is None else column[row_U].astype(np.int64))
            lengths.append(_ones(items, samples))
        tags_U = self._tag_offsets[row_U + 1] - self._tag_offsets[row_U]
        tag_item_T = np.repeat(np.arange(items), tags_U)
        within = np.arange(len(tag_item_T)) - np.repeat(np.cumsum(tags_U) - tags_U, tags_U)
        keys.append("tag")
        values.append(self._tag_rows[np.repeat(self._tag_offsets[row_U], tags_U) + within].astype(np.int64))
        lengths.append(np.pad(tags_U.astype(np.int64), (0, samples - items)))
        for name, rows in ({} if self._users is None else self._users.rows_of(user_id_B)).items():
            keys.append(f"user_{name}")
            values.append(rows.astype(np.int64))
            lengths.append(_ones(len(user_id_B), samples))
        features = KeyedJaggedTensor(keys=keys, values=torch.from_numpy(np.concatenate(values)),
                                     lengths=torch.from_numpy(np.concatenate(lengths)))
        content = None if self.content_NC is None else torch.from_numpy(
            np.ascontiguousarray(self.content_NC[row_U], dtype=np.float32))
        return ItemBatch(features=features, row_U=torch.from_numpy(np.ascontiguousarray(row_U)),
                         duration_bucket_U=torch.from_numpy(self.duration_bucket_N[row_U].astype(np.int64)),
                         content_UC=content, tag_item_T=torch.from_numpy(tag_item_T),
                         log_q_U=torch.from_numpy(self.log_q_N[row_U]))


def _ones(count: int, samples: int) -> np.ndarray:
    """One id each for the first `count` samples, none for the rest."""
    return (np.arange(samples) < count).astype(np.int64)


@dataclass(frozen=True)
class Collation:
    """How views become positions.

    kind: what W_i is ("next", "to_go", "prefix", "none"). buckets: how a watch time is encoded. dropout: share of
    conditions dropped to the unknown bucket in training. utc_offset_ms: where a day begins, for the hour.
    positions: the most a window has. negative_groups: groups that the windows of a global batch are dealt into, row by
    row in turn; the targets of a group are each other's negatives.
    """

    kind: str
    buckets: WatchBuckets
    dropout: float
    utc_offset_ms: int
    positions: int
    negative_groups: int = 1

    def window_batch(self, features: ItemFeatures, rows: BatchRows, rng: np.random.Generator) -> WindowBatch:
        """Training windows with their targets.

        Which conditions are dropped is drawn for the whole global batch, so that it does not depend on the number
        of workers. A worker without a row in a small last batch still takes part in every collective: it gets one
        window of the unknown item without a target.
        """
        keep_GP = rng.random((rows.global_rows, self.positions)) >= self.dropout
        softmax, targets_per_rank = self._columns(rows)
        if not rows.parts:
            return self._empty(features, softmax, targets_per_rank)
        pieces = [self._gather(views, w.begin_W, w.end_W, w.first_target_W) for views, w in rows.parts]
        columns = {name: _stack([piece[name] for piece in pieces]) for name in pieces[0]}
        length_B = columns["length"]
        keep_BP = keep_GP[rows.rank::rows.workers, :columns["item_row"].shape[1]]
        condition_BP = np.where(keep_BP, columns["watch_s"], np.nan)
        columns["row"] = rows.rank + np.arange(len(length_B)) * rows.workers
        return self._finish(features, columns, condition_BP, length_B, columns["target"], softmax, targets_per_rank)

    def request_batch(self, features: ItemFeatures, views: TargetViews, begin_Q: np.ndarray, end_Q: np.ndarray,
                      time_ms_Q: np.ndarray, condition_Q: np.ndarray,
                      ordinal_Q: np.ndarray | None = None) -> WindowBatch:
        """Requests: the views [begin, end) as history and one more position that asks for `condition_Q` seconds.

        Where `ordinal_Q` is true the time of the request only orders, as in logs of such rows; None is nowhere.
        The view that answers the request is not read, so it cannot leak: the last position holds the unknown item.
        """
        columns = self._gather(views, begin_Q, end_Q, end_Q, time_ms_Q,
                               np.zeros(len(end_Q), bool) if ordinal_Q is None else ordinal_Q)
        length_B = columns["length"]
        condition_BP = columns["watch_s"].astype(np.float64)
        last_BP = np.arange(condition_BP.shape[1]) == (length_B - 1)[:, None]
        condition_BP[last_BP] = condition_Q
        return self._finish(features, columns, condition_BP, length_B, last_BP)

    def _columns(self, rows: BatchRows) -> tuple[Columns, list[int]]:
        """Of the softmax, and the targets of every worker."""
        if rows.target_row_by_rank:
            target_row_by_rank, counts_by_rank, rank = rows.target_row_by_rank, rows.targets_by_rank, rows.rank
        else:
            target_row_by_rank, counts_by_rank, rank = [target_rows(rows.parts)], [target_counts(rows.parts)], 0
        group_by_rank = None
        if self.negative_groups > 1:
            workers = len(counts_by_rank)
            group_by_rank = [np.repeat((worker + np.arange(len(counts)) * workers) % self.negative_groups, counts)
                             for worker, counts in enumerate(counts_by_rank)]
        return (softmax_columns(target_row_by_rank, rank, group_by_rank),
                [len(of_worker) for of_worker in target_row_by_rank])

    def _gather(self, views: TargetViews, begin_B, end_B, first_target_B, request_time_ms=None,
                request_ordinal=None) -> dict:
        asks = request_time_ms is not None
        length_B = end_B - begin_B + asks
        positions_P = np.arange(int(length_B.max()))
        inside_BP = positions_P < length_B[:, None]
        is_view_BP = positions_P < (end_B - begin_B)[:, None]
        event_BP = np.where(is_view_BP, begin_B[:, None] + positions_P, 0)

        def column(values_E, missing):
            if not len(values_E):
                return np.full(event_BP.shape, missing, dtype=values_E.dtype)
            return np.where(is_view_BP, values_E[event_BP], missing)

        time_BP = column(views.timestamp_ms_E, 0).astype(np.int64)
        ordinal_BP = column(views.ordinal_E, True)
        if asks:
            last_B = length_B - 1
            time_BP[np.arange(len(last_B)), last_B] = request_time_ms
            ordinal_BP[np.arange(len(last_B)), last_B] = request_ordinal
        target_BP = is_view_BP & (event_BP >= first_target_B[:, None])
        owner_B = np.searchsorted(views.offset_U + views.length_U, begin_B, side="right")
        owner_B = np.minimum(owner_B, len(views.user_id_U) - 1)
        return {"item_row": column(views.item_row_E, 0), "watch_s": column(views.watch_s_E, np.nan), "time": time_BP,
                "ordinal": ordinal_BP, "inside": inside_BP, "target": target_BP, "length": length_B,
                "user": views.user_id_U[owner_B]}

    def _finish(self, features: ItemFeatures, columns: dict, condition_BP, length_B, read_BP,
                softmax: Columns | None = None, targets_per_rank: Sequence[int] = ()) -> WindowBatch:
        inside_BP, time_BP = columns["inside"], columns["time"]
        unknown_time_BP = columns["ordinal"] | ~inside_BP
        hour_BP = np.where(unknown_time_BP, 0, 1 + (time_BP + self.utc_offset_ms) // 3_600_000 % HOURS)
        gap_ms = np.diff(time_BP, axis=1, prepend=time_BP[:, :1]).astype(np.float64)
        no_gap_BP = unknown_time_BP | np.roll(unknown_time_BP, 1, axis=1)
        no_gap_BP[:, 0] = True
        gap_s = np.clip(gap_ms / 1000.0, 0.0, GAP_MAX_S)
        gap_BP = np.where(no_gap_BP, 0, 1 + np.minimum(
            np.floor(np.log1p(gap_s) / np.log1p(GAP_MAX_S) * GAP_BUCKETS), GAP_BUCKETS - 1))
        if self.kind == "none":
            wanted_BP = np.full(inside_BP.shape, np.nan)
        else:
            wanted_BP = returns(self.kind, columns["watch_s"], condition_BP, length_B)
        place_V = np.flatnonzero(inside_BP)

        def packed(values_BP: np.ndarray) -> Tensor:
            return torch.from_numpy(values_BP.ravel()[place_V].astype(np.int64))

        row_U, item_V = np.unique(columns["item_row"].ravel()[place_V], return_inverse=True)
        read_R = np.flatnonzero(read_BP.ravel()[place_V])
        if softmax is None:
            softmax = softmax_columns([np.zeros(0, np.int64)], 0)
        else:
            read_R = read_R[softmax.order_B]
        return WindowBatch(
            items=features.take(row_U.astype(np.int64), np.asarray(columns["user"], np.int64)),
            place_V=torch.from_numpy(place_V),
            item_V=torch.from_numpy(item_V.ravel().astype(np.int64)),
            watch_bucket_V=packed(self.buckets.encode(columns["watch_s"])),
            condition_bucket_V=packed(self.buckets.encode(wanted_BP)), hour_V=packed(hour_BP), gap_V=packed(gap_BP),
            read_R=torch.from_numpy(read_R),
            user_B=torch.from_numpy(np.asarray(columns["user"], dtype=np.int64)),
            row_B=torch.from_numpy(columns.get("row", np.arange(len(inside_BP)))),
            windows=len(inside_BP), positions=inside_BP.shape[1],
            targets_per_rank=list(targets_per_rank), targets_per_group=softmax.rows_per_group,
            columns_per_group=softmax.columns_per_group,
            column_log_q_G=torch.from_numpy(features.log_q_N[softmax.row_G]),
            column_count_G=torch.from_numpy(softmax.count_G), column_arrival_G=torch.from_numpy(softmax.arrival_G),
            given_item_S=torch.from_numpy(np.searchsorted(row_U, softmax.given_S)),
            given_per_rank=softmax.sent_per_rank, columns_per_rank=softmax.received_per_rank,
            columns_travel=softmax.travels, target_column_R=torch.from_numpy(softmax.column_B))

    def _empty(self, features: ItemFeatures, softmax: Columns, targets_per_rank: list[int]) -> WindowBatch:
        columns = {"item_row": np.zeros((1, 1), np.int64), "watch_s": np.full((1, 1), np.nan),
                   "time": np.zeros((1, 1), np.int64), "ordinal": np.ones((1, 1), bool),
                   "inside": np.ones((1, 1), bool), "target": np.zeros((1, 1), bool),
                   "length": np.ones(1, np.int64), "user": np.zeros(1, np.int64)}
        return self._finish(features, columns, columns["watch_s"], columns["length"], columns["target"],
                            softmax, targets_per_rank)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    """Joins along the first axis, padding the second to the widest: NaN for floats, True for `ordinal`-like masks
    is not needed because everything behind a window's end is masked by `inside`."""
    if len(arrays) == 1 or arrays[0].ndim == 1:
        return np.concatenate(arrays)
    width = max(a.shape[1] for a in arrays)
    missing = np.nan if arrays[0].dtype.kind == "f" else 0
    return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=missing) for a in arrays])


Item = TypeVar("Item")


class Prefetched(Iterable[Item]):
    """Runs an iterator on a thread, a few items ahead; the consumer's waiting time is measured in `waited_s`.

    An exception of the producer is raised in the consumer. Leaving early stops the thread.
    """

    def __init__(self, produce: Callable[[], Iterator[Item]], ahead: int, clock: Callable[[], float]):
        self._produce, self._ahead, self._clock = produce, ahead, clock
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Item]:
        if not self._ahead:
            yield from self._timed(self._produce())
            return
        ready: queue.Queue = queue.Queue(maxsize=self._ahead)
        stop, end = threading.Event(), object()

        def work():
            try:
                for item in self._produce():
                    while not stop.is_set():
                        try:
                            ready.put((item, None), timeout=0.1)
                            break
                        except queue.Full:
                            continue
                    if stop.is_set():
                        return
                outcome = (end, None)
            except BaseException as error:  # handed to the consumer, who raises it
                outcome = (end, error)
            while not stop.is_set():
                try:
                    return ready.put(outcome, timeout=0.1)
                except queue.Full:
                    continue

        thread = threading.Thread(target=work, name="watchtower-prefetch", daemon=True)
        thread.start()
        try:
            while True:
                began = self._clock()
                item, error = ready.get()
                self.waited_s += self._clock() - began
                if error is not None:
                    raise error
                if item is end:
                    return
                yield item
        finally:
            stop.set()
            thread.join()

    def _timed(self, items):
        iterator = iter(items)
        while True:
            began = self._clock()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited_s += self._clock() - began
            yield item
