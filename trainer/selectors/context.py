"""What a selector may look at beside the table of features: the block's lists, the users' latest views, item vectors.

Everything is as its request sees it; the forward value is there for the oracle alone.

Shape suffixes: R = requests of a block, T = their triggers, C = channels, L = places of a list, H = latest views.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

from configs.errors import InputError
from configs.schema import Config
from trainer.catalogue import Catalogue
from trainer.item_statistics import StatisticsSnapshots
from trainer.item_value import REQUESTS_AT_ONCE, ItemValue, candidates
from trainer.neighbors import ChannelSnapshots
from trainer.routing import padded_lists
from trainer.selectors.vectors import item_vectors
from trainer.sequences import SequenceShard
from trainer.trigger_features import TriggerTable

LATEST_VIEWS = 50  # effective views that a centre of interest is the mean of


@dataclass
class Block:
    """Some requests of a shard with all that selectors are judged on.

    reward_ms_TC: int64, the true forward value of Eq. 3 (the oracle's; no other selector reads it). statistics: of
    items, as of the snapshots. item_value: the network of trainer/item_value.py; None where it was not fitted.
    """

    table: TriggerTable
    shard: SequenceShard
    snapshots: ChannelSnapshots
    config: Config
    rows: int
    reward_ms_TC: np.ndarray
    statistics: StatisticsSnapshots
    catalogue: Catalogue
    item_value: ItemValue | None = None

    @cached_property
    def states(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Snapshot numbers (C,) of each state and the requests that see it."""
        state_SC, state_R = self.snapshots.states(self.table.requests.time_ms_R)
        return [(state_C, np.flatnonzero(state_R == s)) for s, state_C in enumerate(state_SC)]

    @cached_property
    def list_TCL(self) -> np.ndarray:
        """int32 (T, C, L): the neighbours of every trigger, 0 behind the end."""
        requests, top = self.table.requests, self.config.channels.top
        list_TCL = np.zeros((len(requests.trigger_row_T), len(self.snapshots.names), top), np.int32)
        for state_C, at_R in self.states:
            mine_T = np.isin(requests.request_T, at_R)
            lists = [self.snapshots.lists(c, int(number)) for c, number in enumerate(state_C)]
            list_TCL[mine_T] = padded_lists(lists, requests.trigger_row_T[mine_T], top)
        return list_TCL

    @cached_property
    def value_TCL(self) -> np.ndarray:
        """float32 (T, C, L): p(watched next) of every item of the lists, 0 behind the end.

        Raises:
            InputError: no item values were fitted.
        """
        if self.item_value is None:
            raise InputError("there are no item values in the run folder; run watchtower train router first")
        requests, parts = self.table.requests, []
        for first in range(0, len(requests), REQUESTS_AT_ONCE):
            part = requests.take(np.arange(first, min(first + REQUESTS_AT_ONCE, len(requests))))
            found, _ = candidates(self.shard, part, self.snapshots, self.statistics, self.catalogue)
            begin = requests.trigger_offset_R1[first]
            list_TCL = self.list_TCL[begin:begin + len(part.trigger_row_T)]
            parts.append(listed_values(list_TCL, part.trigger_offset_R1, found.offset_R1, found.row_K,
                                       self.item_value.values(found), np.zeros(self.rows, np.float32)))
        return np.concatenate(parts or [np.zeros(self.list_TCL.shape, np.float32)])

    @cached_property
    def latest_views(self) -> tuple[np.ndarray, np.ndarray]:
        """offset int64 (R + 1,) and rows int32 (H,): each user's latest effective views before the request."""
        requests = self.table.requests
        return latest_effective(self.shard.offset_U[requests.user_R], requests.history_end_R, self.shard.item_row_E,
                                self.shard.is_effective_E, LATEST_VIEWS)

    def vectors_of(self, row_X: np.ndarray, request_X: np.ndarray) -> np.ndarray:
        """float32 (X, D), of length 1: the vectors of items as these requests see them (vectors.py)."""
        found = None
        for state_C, at_R in self.states:
            mine_X = np.isin(request_X, at_R)
            lists = [self.snapshots.lists(c, int(number)) for c, number in enumerate(state_C)]
            distinct, place = np.unique(row_X[mine_X], return_inverse=True)
            vectors = item_vectors(distinct, lists)
            found = np.zeros((len(row_X), vectors.shape[1]), np.float32) if found is None else found
            found[mine_X] = vectors[place.ravel()]
        return found


@dataclass(frozen=True)
class TrainingShard:
    """What selectors that learn are given: the training requests of a shard, none of a test user.

    next_hit_TC: bool, the list holds the very next counted view. reward_ms_TC: int64, Eq. 3. future_ms_R: int64, all
    that the user watched within the window. hash_R: uint64, an order of requests that no sharding changes.
    """

    table: TriggerTable
    next_hit_TC: np.ndarray
    reward_ms_TC: np.ndarray
    future_ms_R: np.ndarray
    hash_R: np.ndarray


@numba.njit(cache=True, nogil=True)
def listed_values(list_TCL, trigger_offset_R1, offset_R1, row_K, value_K, value_N):  # pragma: no cover - compiled
    """The values of the items of lists, whose requests have the values of row_K. Scratch: value_N, zeros."""
    out_TCL = np.zeros(list_TCL.shape, np.float32)
    for r in range(len(trigger_offset_R1) - 1):
        for k in range(offset_R1[r], offset_R1[r + 1]):
            value_N[row_K[k]] = value_K[k]
        for t in range(trigger_offset_R1[r], trigger_offset_R1[r + 1]):
            for c in range(list_TCL.shape[1]):
                for place in range(list_TCL.shape[2]):
                    out_TCL[t, c, place] = value_N[list_TCL[t, c, place]]
        for k in range(offset_R1[r], offset_R1[r + 1]):
            value_N[row_K[k]] = 0
    return out_TCL


@numba.njit(cache=True, nogil=True)
def latest_effective(begin_R, end_R, item_row_E, is_effective_E, count):  # pragma: no cover - compiled
    """Rows of the latest `count` effective views in [begin, end) of each request, the latest first; row 0 left out."""
    offset_R1 = np.zeros(len(begin_R) + 1, np.int64)
    row_H = np.zeros(len(begin_R) * count, np.int32)
    found = 0
    for r in range(len(begin_R)):
        for event in range(end_R[r] - 1, begin_R[r] - 1, -1):
            if found - offset_R1[r] == count:
                break
            if is_effective_E[event] and item_row_E[event] > 0:
                row_H[found] = item_row_E[event]
                found += 1
        offset_R1[r + 1] = found
    return offset_R1, row_H[:found]
