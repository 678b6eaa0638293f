"""recent: the user's latest items. The rule of most systems in use, and the base of every gain (CAPTS, 4.1.2)."""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector


class Recent(Selector):
    name = "recent"

    def score(self, table, block):
        return self.over_channels(-table.requests.position_T.astype(np.float64), table)
