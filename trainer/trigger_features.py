"""What a server knows of a request's triggers at request time: the features of selectors and of the router.

Trigger-side features are of the trigger and the user's own rows; list-side ones are of the list that each channel
would retrieve for it, from the snapshot the request may see, and of the user's own past with that list. Nothing here
has seen the request's time or later.

Shape suffixes: R = requests, T = triggers of all of them, C = channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.triggers import TriggerRequests


@dataclass(frozen=True)
class TriggerTable:
    """The features of a shard's requests.

    Trigger-side, (T,): watch_s_T float32 seconds of the item's latest row, NaN unknown; best_watch_s_T float32, the
    longest known watch time of the item in the user's history, NaN unknown; views_T int32, the user's history rows of
    the item; age_s_T float32 seconds since that row, NaN where its time or the gap is unknown (ordinal rows);
    is_effective_T, is_target_T bool; feedback: name to int8 (T,), -1 unknown; popularity_T float32, log1p of the item's
    effective views before the watermark; tag_share_T float32, how much of the user's effective history shares a tag
    with it, 0 without a catalogue.

    List-side, (T, C): length_TC int32; top_score_TC, mean_score_TC float32, 0 for empty lists; list_popularity_TC
    float32, mean log1p effective views of the list's items; list_age_s_TC float32, mean seconds since the list's items
    were first seen; list_watch_s_TC float32, mean watch time of their views, shrunk; past_replay_ms_TC int64, watch
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
