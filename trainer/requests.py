"""The requests that a retrieval is judged on: held-out target views, each with everything before it and nothing else.

One request a held-out view: its user's earlier target views are the history, the view itself (and the next ones, where
`future` is above 1) is what should be found. The history ends before the first view of the request's own time, so
nothing at or after the request can be read.

Shape suffixes: Q = requests, E = views of their users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.windows import TargetViews, join_views


@dataclass(frozen=True)
class Requests:
    """Sampled requests and the views of their users.

    views: TargetViews of the users in question. begin_Q, end_Q int64: the user's earlier views, [begin, end).
    time_ms_Q int64, ordinal_Q bool (the time only orders), watch_s_Q float64 (NaN unknown), user_id_Q int64 of the
    view that asks. relevant_offset_Q1, relevant_rows: the items that count as found, the first one the view's own.
    relevant_watch_s: of each, seconds.
    """

    views: TargetViews
    begin_Q: np.ndarray
    end_Q: np.ndarray
    time_ms_Q: np.ndarray
    ordinal_Q: np.ndarray
    watch_s_Q: np.ndarray
    user_id_Q: np.ndarray
    relevant_offset_Q1: np.ndarray
    relevant_rows: np.ndarray
    relevant_watch_s: np.ndarray

    def __len__(self) -> int:
        return len(self.begin_Q)

    def take(self, which: np.ndarray) -> Requests:
        """Some of the requests, in the order of `which` (int64)."""
        count = np.diff(self.relevant_offset_Q1)[which]
        offset = np.concatenate([[0], np.cumsum(count)])
        place = np.arange(offset[-1]) - np.repeat(offset[:-1], count) + np.repeat(self.relevant_offset_Q1[which], count)
        return Requests(self.views, self.begin_Q[which], self.end_Q[which], self.time_ms_Q[which],
                        self.ordinal_Q[which], self.watch_s_Q[which], self.user_id_Q[which], offset,
                        self.relevant_rows[place], self.relevant_watch_s[place])

    def target_row_Q(self) -> np.ndarray:
        """int64 (Q,): the item of the view that asks."""
        return self.relevant_rows[self.relevant_offset_Q1[:-1]]


def sample_requests(load: Callable[[int], TargetViews], shards: int, begin_ms: int, end_ms: int, *,
                    judged: Callable[[np.ndarray], np.ndarray] | None, limit: int | None, future: int,
                    seed: int) -> Requests:
    """The requests of a period.

    Args:
        load: shard number to its target views. shards: how many.
        begin_ms, end_ms: the period, begin inside, end not.
        judged: user ids to a bool array, True for users whose requests count; None is everybody.
        limit: how many are sampled, without replacement; None takes all.
        future: next target views of the user, inside the period, that count as relevant.
        seed: of the sample. The same logs give the same requests whatever the number of shards.

    Returns:
        Requests sorted by user id and time; none where the period has no view.
    """
    found = []
    for shard in range(shards):
        views = load(shard)
        inside_E = (views.timestamp_ms_E >= begin_ms) & (views.timestamp_ms_E < end_ms)
        if judged is not None:
            inside_E &= judged(views.user_id_U)[views.owner_E()]
        place = np.flatnonzero(inside_E)
        owner = views.owner_E()[place]
        found.append((np.full(len(place), shard), place, views.user_id_U[owner]))
    shard_Q, place_Q, user_Q = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((place_Q, user_Q))
    if limit is not None and limit < len(order):
        order = order[np.sort(np.random.default_rng([seed, 0x71756572]).choice(len(order), limit, replace=False))]
    shard_Q, place_Q, user_Q = shard_Q[order], place_Q[order], user_Q[order]

    kept, columns = [], {name: np.zeros(len(order), np.int64) for name in ("begin", "at")}
    shift = 0
    for shard in range(shards):
        mine = np.flatnonzero(shard_Q == shard)
        if not len(mine):
            continue
        views = load(shard)
        wanted_U = np.isin(views.user_id_U, user_Q[mine])
        compact, new_place_E = _only(views, wanted_U)
        at = new_place_E[place_Q[mine]]
        owner = np.searchsorted(compact.offset_U + compact.length_U, at, side="right")
        columns["begin"][mine] = compact.offset_U[owner] + shift
        columns["at"][mine] = at + shift
        kept.append(compact)
        shift += len(compact.item_row_E)
    if not kept:
        empty = np.zeros(0, np.int64)
        return Requests(load(0), empty, empty, empty, np.zeros(0, bool), np.zeros(0), empty, np.zeros(1, np.int64),
                        empty, np.zeros(0))
    views = join_views(kept)
    begin_Q, at_Q = columns["begin"], columns["at"]
    user_end_Q = (views.offset_U + views.length_U)[np.searchsorted(views.offset_U + views.length_U, at_Q, "right")]
    rows, watch, offsets = [], [], [0]
    for at, user_end in zip(at_Q, user_end_Q, strict=True):
        reach = min(at + future, user_end)
        late = np.flatnonzero(views.timestamp_ms_E[at:reach] >= end_ms)
        reach = at + late[0] if len(late) else reach
        items, first = np.unique(views.item_row_E[at:reach], return_index=True)
        first = np.sort(first)
        rows.append(views.item_row_E[at + first])
        watch.append(views.watch_s_E[at + first])
        offsets.append(offsets[-1] + len(first))
    return Requests(
        views=views, begin_Q=begin_Q, end_Q=np.maximum(begin_Q, _first_of_its_time(views)[at_Q]),
        time_ms_Q=views.timestamp_ms_E[at_Q], ordinal_Q=views.ordinal_E[at_Q],
        watch_s_Q=views.watch_s_E[at_Q].astype(np.float64), user_id_Q=user_Q,
        relevant_offset_Q1=np.asarray(offsets, np.int64), relevant_rows=np.concatenate(rows),
        relevant_watch_s=np.concatenate(watch).astype(np.float64))


def _first_of_its_time(views: TargetViews) -> np.ndarray:
    """int64 (E,): the first view with a view's time, among neighbours; it may be of the user before."""
    time_E = views.timestamp_ms_E
    place_E = np.arange(len(time_E))
    return np.maximum.accumulate(np.where(np.diff(time_E, prepend=time_E[:1] - 1) != 0, place_E, 0))


def _only(views: TargetViews, wanted_U: np.ndarray) -> tuple[TargetViews, np.ndarray]:
    """The views of some users, and where each view went (-1: nowhere)."""
    keep_E = wanted_U[views.owner_E()]
    length_U = views.length_U[wanted_U]
    new_place_E = np.where(keep_E, np.cumsum(keep_E) - 1, -1)
    return TargetViews(
        user_id_U=views.user_id_U[wanted_U], offset_U=np.cumsum(length_U) - length_U, length_U=length_U,
        item_row_E=views.item_row_E[keep_E], watch_s_E=views.watch_s_E[keep_E],
        timestamp_ms_E=views.timestamp_ms_E[keep_E], ordinal_E=views.ordinal_E[keep_E],
        trainable_U=views.trainable_U[wanted_U]), new_place_E
