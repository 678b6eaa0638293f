"""past-replay: the user's own past forward value of the trigger's list. A control that is not in the paper.

The watch time of the user's earlier counted views whose item is in R_c(x, t), then how many those are, then position.
"""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector

MOST_HITS = float(2**20)


class PastReplay(Selector):
    name = "past-replay"

    def score(self, table, block):
        # Whole numbers below 2^53: the float holds both exactly.
        return table.past_replay_ms_TC * MOST_HITS + np.minimum(table.past_hits_TC, MOST_HITS - 1)
