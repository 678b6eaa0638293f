"""What a server knows of a request's triggers at request time: the features of selectors and of the router.

Trigger-side features are of the trigger and the user's own rows; list-side ones are of the list that each channel
would retrieve for it, from the snapshot the request may see, and of the user's own past with that list. Nothing here
has seen the request's time or later: the user's rows end at history_end_R, lists and item statistics are those of the
snapshots that the request sees (ChannelSnapshots.states).

Shape suffixes: U = users of a shard, E = its events, R = requests, T = triggers of all of them, C = channels, N =
vocabulary rows, X = distinct triggers of one state of the snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from configs.schema import Config
from trainer.catalogue import Catalogue
from trainer.item_statistics import ItemStatistics, StatisticsSnapshots
from trainer.neighbors import ChannelSnapshots, NeighborLists
from trainer.replay import counted_views, past_range, replay, states_of, unique_counts, unique_share
from trainer.sequences import SequenceShard
from trainer.triggers import RequestRule, TriggerRequests, is_future_view


@dataclass(frozen=True)
class TriggerTable:
    """The features of a shard's requests.

    Trigger-side, (T,): watch_s_T float32 seconds of the item's latest row, NaN unknown; best_watch_s_T float32, the
    longest known watch time of the item in the user's history, NaN unknown; views_T int32, the user's history rows of
    the item; age_s_T float32 seconds since that row, NaN where its time or the gap is unknown (ordinal rows);
    is_effective_T, is_target_T bool; feedback: name to int8 (T,), -1 unknown; popularity_T float32, log1p of the item's
    effective views before the watermark; tag_share_T float32, the share of the user's effective history rows that have
    a tag in common with it, 0 without tags.

    List-side, (T, C), never NaN and all 0 for empty lists: length_TC int32; top_score_TC, mean_score_TC float32;
    list_popularity_TC float32, mean log1p effective views of the list's items; list_age_s_TC float32, mean seconds from
    when the list's items were first seen to the request, 0 for one that nobody had seen by the watermark;
    list_watch_s_TC float32, mean watch time of their views, shrunk; past_replay_ms_TC int64, watch
    time of the user's past counted views whose item is in the list (each view once; a null watch time counts
    replay.null_watch_s); past_hits_TC int32, how many views that were; seen_TC int32, items of the list that the user's
    history holds in any row; unique_share_TC float32, rho of Eq. 11.
    """

    requests: TriggerRequests
    channels: tuple[str, ...]
    watch_s_T: np.ndarray
    best_watch_s_T: np.ndarray
    views_T: np.ndarray
    age_s_T: np.ndarray
    is_effective_T: np.ndarray
    is_target_T: np.ndarray
    feedback: dict[str, np.ndarray]
    popularity_T: np.ndarray
    tag_share_T: np.ndarray
    length_TC: np.ndarray
    top_score_TC: np.ndarray
    mean_score_TC: np.ndarray
    list_popularity_TC: np.ndarray
    list_age_s_TC: np.ndarray
    list_watch_s_TC: np.ndarray
    past_replay_ms_TC: np.ndarray
    past_hits_TC: np.ndarray
    seen_TC: np.ndarray
    unique_share_TC: np.ndarray


def trigger_table(shard: SequenceShard, requests: TriggerRequests, rule: RequestRule, snapshots: ChannelSnapshots,
                  statistics: StatisticsSnapshots, catalogue: Catalogue, config: Config) -> TriggerTable:
    """The features of the requests of a shard, as of each request's time.

    Args:
        rule: of the requests; it says which past views count.
        statistics: of items, at the watermarks of the snapshots.

    Raises:
        InputError: a request before the first snapshot, where channels.before_first is error.
    """
    request_T, event_T = requests.request_T, requests.trigger_event_T
    triggers, channels = len(event_T), len(snapshots.names)
    views_T, best_watch_s_T = np.zeros(triggers, np.int32), np.full(triggers, np.nan, np.float32)
    tag_share_T = np.zeros(triggers, np.float32)
    _own_rows(shard.offset_U, shard.item_row_E, shard.watch_time_s_E, requests.user_R, requests.history_end_R,
              requests.trigger_offset_R1, requests.trigger_row_T, np.zeros(len(catalogue.item_id_N), np.int64), views_T,
              best_watch_s_T)
    if len(catalogue.tag_rows):
        _tag_shares(shard.offset_U, shard.item_row_E, shard.is_effective_E, requests.user_R, requests.history_end_R,
                    requests.trigger_offset_R1, requests.trigger_row_T, catalogue.tag_offsets_N1, catalogue.tag_rows,
                    np.zeros(catalogue.tag_rows_count, np.int64), np.zeros(catalogue.tag_rows_count, np.bool_),
                    tag_share_T)
    age_s_T = (requests.time_ms_R[request_T] - shard.timestamp_ms_E[event_T]) / 1000
    past = counted_views(shard, is_future_view(shard, rule), config.replay.null_watch_s)
    past_ms_TC, past_hits_TC = _in_past(past, shard, requests, snapshots)
    first = counted_views(shard, _first_rows(shard.offset_U, shard.length_U, shard.item_row_E,
                                             np.unique(requests.user_R), len(catalogue.item_id_N)), 0.0)
    _, seen_TC = _in_past(first, shard, requests, snapshots)
    unique_TC, length_TC = unique_counts(requests, snapshots)
    popularity_T = np.zeros(triggers, np.float32)
    of_lists = {name: np.zeros((triggers, channels), np.float32) for name in LIST_MEANS}
    for state_C, groups in states_of(requests, snapshots):
        at_T = np.sort(groups.at_T)
        known = statistics.of_state(snapshots, state_C)
        row_X, place_T = np.unique(requests.trigger_row_T[at_T], return_inverse=True)
        lists = [snapshots.lists(channel, int(number)) for channel, number in enumerate(state_C)]
        popularity_T[at_T] = np.log1p(known.effective_views_N[requests.trigger_row_T[at_T]])
        means = list_means(row_X, lists, known)
        for name in ("top_score", "mean_score", "list_popularity", "list_watch_s"):
            of_lists[name][at_T] = means[name][place_T]
        time_ms_T1 = requests.time_ms_R[request_T[at_T]][:, None]
        gap_ms = means["seen_items"][place_T] * time_ms_T1 - means["first_seen_sum_ms"][place_T]
        of_lists["list_age_s"][at_T] = gap_ms / np.maximum(1, length_TC[at_T]) / 1000
    return TriggerTable(
        requests=requests, channels=tuple(snapshots.names), watch_s_T=shard.watch_time_s_E[event_T],
        best_watch_s_T=best_watch_s_T, views_T=views_T,
        age_s_T=np.where(shard.is_ordinal_E[event_T], np.nan, age_s_T).astype(np.float32),
        is_effective_T=shard.is_effective_E[event_T], is_target_T=shard.is_target_E[event_T],
        feedback={name: values[event_T] for name, values in shard.feedback.items()}, popularity_T=popularity_T,
        tag_share_T=tag_share_T, length_TC=length_TC, past_replay_ms_TC=past_ms_TC, past_hits_TC=past_hits_TC,
        seen_TC=seen_TC, unique_share_TC=unique_share(unique_TC, length_TC),
        **{f"{name}_TC": values for name, values in of_lists.items()})


def _in_past(views, shard: SequenceShard, requests: TriggerRequests, snapshots: ChannelSnapshots
             ) -> tuple[np.ndarray, np.ndarray]:
    """Watch time int64 (T, C), ms, and number int32 (T, C) of the user's views before the request in each list."""
    low_R, high_R = past_range(views, shard, requests)
    sum_KTC, count_KTC = replay(views, requests, low_R[:, None], high_R[:, None], snapshots)
    return sum_KTC[0], count_KTC[0]


LIST_MEANS = ("top_score", "mean_score", "list_popularity", "list_age_s", "list_watch_s")


def list_means(row_X: np.ndarray, lists: Sequence[NeighborLists], known: ItemStatistics) -> dict[str, np.ndarray]:
    """What the lists of these rows look like, (X, C) each, 0 for empty lists.

    Returns:
        float64 top_score, mean_score, list_popularity, list_watch_s; int64 seen_items, the items that were seen before
        the watermark, and first_seen_sum_ms, the sum of when that was.
    """
    popularity_N = np.log1p(known.effective_views_N)
    shape_XC = (len(row_X), len(lists))
    means = {name: np.zeros(shape_XC) for name in ("top_score", "mean_score", "list_popularity", "list_watch_s")}
    means |= {name: np.zeros(shape_XC, np.int64) for name in ("seen_items", "first_seen_sum_ms")}
    for channel, one in enumerate(lists):
        _list_means(row_X, one.offset_N1, one.neighbor_L, one.score_L, popularity_N, known.mean_watch_s_N,
                    known.views_N, known.first_seen_ms_N, *(values[:, channel] for values in means.values()))
    return means


# ------------------------------------------------------------------------------------------------------- the kernels

@numba.njit(cache=True, nogil=True)
def _own_rows(offset_U, item_row_E, watch_s_E, user_R, history_end_R, trigger_offset_R1, trigger_row_T, place_N,
              views_T, best_watch_s_T):  # pragma: no cover - compiled
    """How often and how long the user watched each trigger. Scratch: place_N, 0 or the trigger of an item, from 1."""
    for r in range(len(user_R)):
        for t in range(trigger_offset_R1[r], trigger_offset_R1[r + 1]):
            place_N[trigger_row_T[t]] = t + 1
        for event in range(offset_U[user_R[r]], history_end_R[r]):
            t = place_N[item_row_E[event]] - 1
            if t >= 0:
                views_T[t] += 1
                if not watch_s_E[event] <= best_watch_s_T[t] and not np.isnan(watch_s_E[event]):
                    best_watch_s_T[t] = watch_s_E[event]
        for t in range(trigger_offset_R1[r], trigger_offset_R1[r + 1]):
            place_N[trigger_row_T[t]] = 0


@numba.njit(cache=True, nogil=True)
def _tag_shares(offset_U, item_row_E, is_effective_E, user_R, history_end_R, trigger_offset_R1, trigger_row_T,
                tag_offset_N1, tag_V, rows_G, wanted_G, tag_share_T):  # pragma: no cover - compiled
    """Share of the effective rows before the request that have a tag of the trigger's. Scratch by tag: rows_G counts
    the rows that have it, wanted_G marks a trigger's tags."""
    for r in range(len(user_R)):
        begin, end, effective = offset_U[user_R[r]], history_end_R[r], 0
        for event in range(begin, end):
            if is_effective_E[event]:
                effective += 1
                first, last = tag_offset_N1[item_row_E[event]], tag_offset_N1[item_row_E[event] + 1]
                for k in range(first, last):
                    again = False
                    for before in range(first, k):
                        again |= tag_V[before] == tag_V[k]
                    if not again:
                        rows_G[tag_V[k]] += 1
        for t in range(trigger_offset_R1[r], trigger_offset_R1[r + 1]):
            first, last = tag_offset_N1[trigger_row_T[t]], tag_offset_N1[trigger_row_T[t] + 1]
            if effective == 0 or first == last:
                continue
            shared = rows_G[tag_V[first]]
            if last - first > 1:  # rows that have several of the tags count once, so they are gone through
                for k in range(first, last):
                    wanted_G[tag_V[k]] = True
                shared = 0
                for event in range(begin, end):
                    if is_effective_E[event]:
                        for k in range(tag_offset_N1[item_row_E[event]], tag_offset_N1[item_row_E[event] + 1]):
                            if wanted_G[tag_V[k]]:
                                shared += 1
                                break
                for k in range(first, last):
                    wanted_G[tag_V[k]] = False
            tag_share_T[t] = shared / effective
        for event in range(begin, end):
            if is_effective_E[event]:
                for k in range(tag_offset_N1[item_row_E[event]], tag_offset_N1[item_row_E[event] + 1]):
                    rows_G[tag_V[k]] = 0


@numba.njit(cache=True, nogil=True)
def _first_rows(offset_U, length_U, item_row_E, user_W, rows):  # pragma: no cover - compiled
    """bool (E,): the first row of each item of these users."""
    is_first_E = np.zeros(len(item_row_E), np.bool_)
    last_user_N = np.full(rows, -1, np.int32)
    for user in user_W:
        for event in range(offset_U[user], offset_U[user] + length_U[user]):
            is_first_E[event] = last_user_N[item_row_E[event]] != user
            last_user_N[item_row_E[event]] = user
    return is_first_E


@numba.njit(cache=True, nogil=True)
def _list_means(row_X, offset_N1, neighbor_L, score_L, popularity_N, watch_s_N, views_N, first_seen_ms_N, top_X, mean_X,
                popularity_X, watch_X, seen_X, first_seen_X):  # pragma: no cover - compiled
    for x in range(len(row_X)):
        begin, end = offset_N1[row_X[x]], offset_N1[row_X[x] + 1]
        if begin == end:
            continue
        top_X[x] = score_L[begin]
        for place in range(begin, end):
            row = neighbor_L[place]
            mean_X[x] += score_L[place]
            popularity_X[x] += popularity_N[row]
            watch_X[x] += watch_s_N[row]
            if views_N[row] > 0:
                seen_X[x] += 1
                first_seen_X[x] += first_seen_ms_N[row]
        mean_X[x] /= end - begin
        popularity_X[x] /= end - begin
        watch_X[x] /= end - begin
