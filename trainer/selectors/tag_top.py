"""tag-top: the latest triggers of the user's most watched tags (CAPTS, 4.1.2).

READING: triggers go by how much of the user's effective history shares a tag with them. Absent without tags.
"""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector


class TagTop(Selector):
    name = "tag-top"

    @classmethod
    def absent(cls, catalogue):
        return None if len(catalogue.tag_rows) else "the catalogue has no tags"

    def score(self, table, block):
        return self.over_channels(table.tag_share_T.astype(np.float64), table)
