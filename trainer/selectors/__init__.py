"""The selectors that routers are judged beside: one small file each, with its rule and its source.

`popular` stands apart: it is a list of items and picks no triggers (trainer/routing_results.py).
"""

from trainer.selectors.context import Block, TrainingShard
from trainer.selectors.item_value import ItemValueSum
from trainer.selectors.lic import Lic
from trainer.selectors.ltv import Ltv
from trainer.selectors.nic import Nic
from trainer.selectors.oracle import Oracle
from trainer.selectors.past_replay import PastReplay
from trainer.selectors.pdn import Pdn
from trainer.selectors.protocol import Selector
from trainer.selectors.random import Random
from trainer.selectors.recent import Recent
from trainer.selectors.tag_top import TagTop
from trainer.selectors.watch_time_top import WatchTimeTop

SELECTORS: dict[str, type[Selector]] = {
    "recent": Recent, "watch-time-top": WatchTimeTop, "tag-top": TagTop, "ltv": Ltv, "nic": Nic, "pdn": Pdn, "lic": Lic,
    "random": Random, "past-replay": PastReplay, "item-value": ItemValueSum, "oracle": Oracle}
POPULAR = "popular"

__all__ = ["POPULAR", "SELECTORS", "Block", "Selector", "TrainingShard"]
