"""oracle: the true forward value of the test request (Eq. 3), which no method can know: the ceiling of a top-B rule."""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector


class Oracle(Selector):
    name = "oracle"

    def score(self, table, block):
        return block.reward_ms_TC.astype(np.float64)
