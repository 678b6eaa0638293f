"""ltv: the items after which most is watched. READING: the papers that we hold do not expand the abbreviation.

    ltv(x) = (sum over training requests with x among the triggers of the watch time of F_W + p * m) / (requests + p)

with m the mean over all training triggers and p = 10 requests: one number an item, learned on the training users.
"""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector

PRIOR_REQUESTS = 10.0


class Ltv(Selector):
    name = "ltv"
    learns = True

    def __init__(self, config, rows, seed):
        super().__init__(config, rows, seed)
        self.watch_ms_N, self.requests_N = np.zeros(rows, np.int64), np.zeros(rows, np.int64)

    def learn(self, training):
        requests = training.table.requests
        np.add.at(self.watch_ms_N, requests.trigger_row_T, training.future_ms_R[requests.request_T])
        np.add.at(self.requests_N, requests.trigger_row_T, 1)

    def score(self, table, block):
        mean = self.watch_ms_N.sum() / max(self.requests_N.sum(), 1)
        value_N = (self.watch_ms_N + PRIOR_REQUESTS * mean) / (self.requests_N + PRIOR_REQUESTS)
        return self.over_channels(value_N[table.requests.trigger_row_T], table)
