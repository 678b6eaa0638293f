"""random: a seeded hash of request, item and channel. The control that a rule must beat."""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector
from trainer.sequences import user_hash
from trainer.triggers import request_hash


class Random(Selector):
    name = "random"
    by_seed = True

    def score(self, table, block):
        requests = table.requests
        key_T = request_hash(requests).view(np.int64)[requests.request_T]
        item_T = user_hash(requests.trigger_row_T.astype(np.int64), self.config.routing.seed).view(np.int64)
        return np.stack([user_hash(key_T ^ item_T, 1 + 1000 * self.seed + c).astype(np.float64)
                         for c in range(len(table.channels))], axis=1)
