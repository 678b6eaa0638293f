"""Item transitions within a session, the recent ones counting more.

    s(i, j) = sum over sessions and places p < q <= p + max_gap of views of i and j in it, i != j, of
              exp(-(watermark - t_q) / decay) / (q - p)

Places count the effective views of a session; j comes after i, so s is not symmetric. A common form of item-to-item
session graphs; views without a session take no part.

Shape suffixes: V = views with a session, G = sessions.
"""

from __future__ import annotations

import numpy as np

from configs.schema import ChannelsConfig, SessionChannelConfig
from trainer.channels.blocks import near_pairs
from trainer.channels.channel import Built, Given
from trainer.co_views import HOUR_MS, CoViews
from trainer.logs import NULL_SESSION
from trainer.neighbors import top_neighbors


class Session:
    name = "session"

    def section(self, config: ChannelsConfig) -> SessionChannelConfig:
        return config.session

    def lacks(self, store) -> str | None:
        return None if store.manifest.get("session") else "the logs have no session column (data.session)"

    def sources(self, watermark_ms, given) -> dict:
        return {}

    def build(self, views: CoViews, given: Given) -> Built:
        config = given.config.session
        offset_G1, at_V = sessions(views)
        age_ms_V = views.watermark_ms - views.time_ms_V[at_V]
        item_P, neighbor_P, score_P = near_pairs(
            offset_G1, views.item_V[at_V], views.rows, config.max_gap, top=given.config.top, threads=given.threads,
            weight_V=np.exp(-age_ms_V / (config.decay_h * HOUR_MS)), later_only=True, by_gap=True)
        lists = top_neighbors(item_P, neighbor_P, score_P, views.rows, given.config.top)
        return Built(lists, {"sessions": len(offset_G1) - 1, "views_in_sessions": len(at_V)})


def sessions(views: CoViews) -> tuple[np.ndarray, np.ndarray]:
    """(int64 (G + 1,) offsets, int64 (V,) views of each session in time order), by user and session.

    A session is a user's: equal numbers of two users are two sessions. Interleaved sessions of a user are parted.
    """
    user_V = np.repeat(np.arange(len(views.user_id_U)), np.diff(views.offset_U1))
    present_V = np.flatnonzero(views.session_V != NULL_SESSION)
    at_V = present_V[np.lexsort((views.session_V[present_V], user_V[present_V]))]
    if not len(at_V):
        return np.zeros(1, np.int64), at_V
    starts = np.flatnonzero((np.diff(views.session_V[at_V]) != 0) | (np.diff(user_V[at_V]) != 0)) + 1
    return np.concatenate([[0], starts, [len(at_V)]]).astype(np.int64), at_V
