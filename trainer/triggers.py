"""Requests and their triggers: who asks when, what may seed retrieval, and where the future lies.

A request is a user and a time t. Events before t are history, events at or after t are future. Its triggers are the
distinct items among the user's latest rows, position 1 the latest; its future are the views from t on that count.
Training and test requests are disjoint in users and in time: training futures end before the first test request.

The request at a cut is one for each user at that time; sampled views are every k-th effective view of a user, asked
for at the view's own time, so that the view itself is the first of the future.

Shape suffixes: U = users of a shard, E = its events, R = requests, T = triggers of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numba
import numpy as np

from configs.errors import InputError
from configs.schema import Config, Cut
from trainer.sequences import SequenceShard, is_test_user, split_times, user_hash

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
FOREVER_MS = np.iinfo(np.int64).max
SAMPLE_SEED = 0x52455155  # of the sampled test requests
VALIDATION_SEED = 0x76616C6964  # the same users for every seed of a router, so that seeds can be compared
Side = Literal["train", "test"]


@dataclass(frozen=True)
class RequestRule:
    """Which requests of a side there are, resolved to Unix ms.

    cuts: (at, until) of each cut; None for sampled views, which lie in [begin_ms, end_ms) with futures to until_ms.
    """

    side: Side
    cuts: tuple[tuple[int, int], ...] | None
    begin_ms: int
    end_ms: int
    until_ms: int
    triggers: int
    effective_only: bool
    min_triggers: int
    min_future: int
    every: int
    per_user: int
    future_min_watch_s: float | None


def request_rule(config: Config, manifest: dict, side: Side) -> RequestRule:
    """The requests of one side, as the config says.

    Args:
        manifest: of the sequences.

    Raises:
        InputError: if the training requests reach into the test.
    """
    rule, offset_ms = config.replay.requests, round(config.data.utc_offset_h * HOUR_MS)
    test = side == "test"
    limits = {"min_triggers": rule.test_min_triggers if test else rule.min_triggers,
              "min_future": rule.test_min_future if test else rule.min_future, "triggers": rule.triggers,
              "effective_only": rule.triggers_from == "effective", "every": rule.every, "per_user": rule.per_user,
              "future_min_watch_s": rule.future_min_watch_s}
    if rule.test_cuts is not None:
        first_test = min(_ms(cut.at, offset_ms) for cut in rule.test_cuts)
        ends = FOREVER_MS if test else first_test
        cuts = tuple(sorted(_cut(cut, offset_ms, ends) for cut in (rule.test_cuts if test else rule.train_cuts)))
        return RequestRule(side, cuts, cuts[0][0], cuts[-1][0] + 1, max(until for _, until in cuts), **limits)
    times = split_times(config, manifest)
    if test:
        return RequestRule(side, None, times.test_start_ms, times.test_end_ms, times.test_end_ms, **limits)
    begin = times.test_start_ms - round(rule.train_days * DAY_MS)
    if begin <= manifest["statistics"]["first_timestamp_ms"]:
        raise InputError(f"replay.requests.train_days ({rule.train_days}) reaches back to the beginning of the logs: "
                         "no history would be left before the training requests")
    return RequestRule(side, None, begin, times.test_start_ms, times.test_start_ms, **limits)


def _ms(time: datetime, offset_ms: int) -> int:
    return round(time.replace(tzinfo=UTC).timestamp() * 1000) - offset_ms


def _cut(cut: Cut, offset_ms: int, ends_ms: int) -> tuple[int, int]:
    return _ms(cut.at, offset_ms), min(ends_ms, FOREVER_MS if cut.until is None else _ms(cut.until, offset_ms))


def is_routing_test_user(user_ids: np.ndarray, config: Config) -> np.ndarray:
    """bool: whose requests are test requests. All others' are training requests.

    split.test_users says who they are; where it is null, routing.test_users does.
    """
    split = config.split
    if split.test_users is None:
        split = split.model_copy(update={"test_users": config.routing.test_users})
    return is_test_user(user_ids, split)


@dataclass(frozen=True)
class TriggerRequests:
    """The requests of a shard, by user and time, with their triggers, latest first.

    request_id_R: int64, unique in a run. user_R: int32, user of the shard. user_id_R, time_ms_R: int64.
    history_end_R: int64, event of the shard; the user's events before it are before the request. future_end_R: int64,
    the user's events from history_end_R to this one are the future, of which is_future_E says which views count.
    trigger_offset_R1: int64 (R + 1,). trigger_row_T: int32 vocabulary row. trigger_event_T: int64, the latest event
    of that item before the request. position_T: int32, 1 the latest.
    """

    shard: int
    request_id_R: np.ndarray
    user_R: np.ndarray
    user_id_R: np.ndarray
    time_ms_R: np.ndarray
    history_end_R: np.ndarray
    future_end_R: np.ndarray
    trigger_offset_R1: np.ndarray
    trigger_row_T: np.ndarray
    trigger_event_T: np.ndarray
    position_T: np.ndarray

    def __len__(self) -> int:
        return len(self.request_id_R)

    @property
    def request_T(self) -> np.ndarray:
        """int64 (T,): the request of each trigger."""
        return np.repeat(np.arange(len(self)), np.diff(self.trigger_offset_R1))

    def take(self, keep_R: np.ndarray) -> TriggerRequests:
        """The requests of a mask or of indices, in that order; their ids stay."""
        at_R = np.flatnonzero(keep_R) if keep_R.dtype == bool else keep_R
        count_R = np.diff(self.trigger_offset_R1)[at_R]
        offset_R1 = np.concatenate([[0], np.cumsum(count_R)]).astype(np.int64)
        at_T = np.arange(offset_R1[-1]) + np.repeat(self.trigger_offset_R1[at_R] - offset_R1[:-1], count_R)
        return TriggerRequests(
            self.shard, *(values[at_R] for values in (self.request_id_R, self.user_R, self.user_id_R, self.time_ms_R,
                                                      self.history_end_R, self.future_end_R)),
            offset_R1, *(values[at_T] for values in (self.trigger_row_T, self.trigger_event_T, self.position_T)))


def is_validation_user(user_ids: np.ndarray, config: Config) -> np.ndarray:
    """bool: of the training users those whose requests are not fitted, but choose the epoch and routing.overlap."""
    return user_hash(user_ids, VALIDATION_SEED).astype(np.float64) < config.router.validation_share * 2.0**64


def is_future_view(shard: SequenceShard, rule: RequestRule) -> np.ndarray:
    """bool (E,): the views that count as future: of at least future_min_watch_s, else the effective ones."""
    if rule.future_min_watch_s is None:
        return shard.is_effective_E
    with np.errstate(invalid="ignore"):
        return shard.watch_time_s_E >= np.float32(rule.future_min_watch_s)


def trigger_requests(shard: SequenceShard, number: int, rule: RequestRule, config: Config) -> TriggerRequests:
    """The requests of a side in one shard that have enough triggers and enough of a future.

    Args:
        number: of the shard; it makes the request ids unique.
    """
    is_test_U = is_routing_test_user(shard.user_id_U, config)
    user_Q = np.flatnonzero(is_test_U == (rule.side == "test"))
    is_future_E = is_future_view(shard, rule)
    if rule.cuts is None:
        user_Q, time_Q = _sampled_views(shard, user_Q, rule)
        until_Q = np.full(len(user_Q), rule.until_ms)
    else:
        at_C, until_C = (np.array(values, np.int64) for values in zip(*rule.cuts, strict=True))
        time_Q, until_Q = np.tile(at_C, len(user_Q)), np.tile(until_C, len(user_Q))
        user_Q = np.repeat(user_Q, len(at_C))
    row_QT, event_QT, count_Q, history_end_Q, future_end_Q, distinct_Q = _triggers(
        shard.offset_U, shard.length_U, shard.item_row_E, shard.timestamp_ms_E, shard.is_effective_E, is_future_E,
        user_Q, time_Q, until_Q, rule.triggers, rule.effective_only, rule.min_future)
    keep_Q = (count_Q >= rule.min_triggers) & (distinct_Q >= rule.min_future)
    if rule.cuts is None:
        keep_Q &= _latest_of_each(user_Q, keep_Q, rule.per_user)
    at_R = np.flatnonzero(keep_Q)
    count_R = count_Q[at_R]
    inside_RT = np.arange(rule.triggers) < count_R[:, None]
    position_RT = np.broadcast_to(np.arange(1, rule.triggers + 1, dtype=np.int32), inside_RT.shape)
    return TriggerRequests(
        number, (np.int64(number) << 32) + at_R, user_Q[at_R].astype(np.int32), shard.user_id_U[user_Q[at_R]],
        time_Q[at_R], history_end_Q[at_R], future_end_Q[at_R],
        np.concatenate([[0], np.cumsum(count_R)]).astype(np.int64), row_QT[at_R][inside_RT],
        event_QT[at_R][inside_RT], position_RT[inside_RT])


def request_hash(requests: TriggerRequests) -> np.ndarray:
    """uint64 (R,): orders the requests of all shards at random, the same way however they are sharded."""
    return user_hash(requests.user_id_R ^ requests.time_ms_R, SAMPLE_SEED)


def _sampled_views(shard: SequenceShard, user_Q: np.ndarray, rule: RequestRule) -> tuple[np.ndarray, np.ndarray]:
    """Users and times of every k-th effective view of these users that lies in the side's period, by user and time."""
    wanted_U = np.zeros(len(shard.user_id_U), bool)
    wanted_U[user_Q] = True
    event_V = np.flatnonzero(shard.is_effective_E)
    user_V = np.searchsorted(shard.offset_U, event_V, side="right") - 1
    first_U = np.searchsorted(user_V, np.arange(len(shard.user_id_U)))
    time_V = shard.timestamp_ms_E[event_V]
    keep_V = ((np.arange(len(event_V)) - first_U[user_V]) % rule.every == 0) & wanted_U[user_V]
    keep_V &= (time_V >= rule.begin_ms) & (time_V < rule.end_ms) & ~shard.is_ordinal_E[event_V]
    pairs = np.unique(np.stack([user_V[keep_V], time_V[keep_V]], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _latest_of_each(user_Q: np.ndarray, keep_Q: np.ndarray, count: int) -> np.ndarray:
    """bool (Q,): the last `count` kept requests of each user; user_Q is sorted."""
    kept = np.flatnonzero(keep_Q)
    user = user_Q[kept]
    end = np.searchsorted(user, user, side="right")
    latest_Q = np.zeros(len(user_Q), bool)
    latest_Q[kept[end - np.arange(len(user)) <= count]] = True
    return latest_Q


@numba.njit(cache=True, nogil=True)
def _triggers(offset_U, length_U, item_row_E, time_E, is_effective_E, is_future_E, user_Q, time_Q, until_Q, triggers,
              effective_only, min_future):  # pragma: no cover - compiled
    """For each candidate request: its triggers and their events (padded), their count, the ends of history and future,
    and how many distinct later items there are, counted up to min_future."""
    requests = len(user_Q)
    row_QT = np.zeros((requests, triggers), np.int32)
    event_QT = np.zeros((requests, triggers), np.int64)
    count_Q = np.zeros(requests, np.int64)
    history_end_Q = np.zeros(requests, np.int64)
    future_end_Q = np.zeros(requests, np.int64)
    distinct_Q = np.zeros(requests, np.int64)
    seen = np.zeros(max(min_future, 1), np.int32)
    for q in range(requests):
        begin = offset_U[user_Q[q]]
        end = begin + length_U[user_Q[q]]
        history_end = begin + np.searchsorted(time_E[begin:end], time_Q[q])
        future_end = begin + np.searchsorted(time_E[begin:end], until_Q[q])
        history_end_Q[q], future_end_Q[q] = history_end, max(history_end, future_end)
        rows, found = 0, 0
        for event in range(history_end - 1, begin - 1, -1):
            if rows == triggers:
                break
            if effective_only and not is_effective_E[event]:
                continue
            rows += 1
            row = item_row_E[event]
            new = row > 0
            for k in range(found):
                if row_QT[q, k] == row:
                    new = False
                    break
            if new:
                row_QT[q, found], event_QT[q, found] = row, event
                found += 1
        count_Q[q] = found
        distinct = 0
        for event in range(history_end, future_end):
            if distinct == min_future:
                break
            if not is_future_E[event]:
                continue
            new = True
            for k in range(distinct):
                if seen[k] == item_row_E[event]:
                    new = False
                    break
            if new:
                seen[distinct] = item_row_E[event]
                distinct += 1
        distinct_Q[q] = distinct
    return row_QT, event_QT, count_Q, history_end_Q, future_end_Q, distinct_Q
