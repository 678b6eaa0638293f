"""item-value: how many of the list's items the user is expected to watch next. A control that is not in the paper.

S_c(x) = sum of p(item) over R_c(x, t), of the network of trainer/item_value.py, which knows what all triggers' lists
say of an item, and no attribution to triggers.
"""

from __future__ import annotations

from trainer.selectors.protocol import Selector


class ItemValueSum(Selector):
    name = "item-value"

    def score(self, table, block):
        return block.value_TCL.sum(axis=2, dtype="float64")
