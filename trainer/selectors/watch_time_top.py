"""watch-time-top: the items watched longest (CAPTS, 4.1.2), by the watch time of the item's latest row.

A trigger whose watch time is unknown stands behind all that are known to have been watched, long views (data.target)
before the others, newest first; one that was shown and not watched at all comes last.
"""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector


class WatchTimeTop(Selector):
    name = "watch-time-top"

    def score(self, table, block):
        watch_T = table.watch_s_T.astype(np.float64)
        unknown_T = np.where(table.is_target_T, -1.0, -2.0)
        return self.over_channels(np.where(np.isnan(watch_T), unknown_T, np.where(watch_T > 0, watch_T, -3.0)), table)
