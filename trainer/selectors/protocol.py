"""What every selector is: scores for all triggers of a block in every channel.

Shape suffixes: T = triggers of a block, C = channels.
"""

from __future__ import annotations

import numpy as np

from configs.schema import Config
from trainer.catalogue import Catalogue
from trainer.selectors.context import Block, TrainingShard
from trainer.trigger_features import TriggerTable


class Selector:
    """A rule that says which triggers a channel should take.

    A selector that learns is given the training requests shard by shard (`learn`, in any order) and then told that
    this was all (`ready`). by_seed: whether it differs from seed to seed.
    """

    name: str
    learns = False
    by_seed = False

    def __init__(self, config: Config, rows: int, seed: int):
        """Args:
            rows: N, of the item vocabulary.
        """
        self.config, self.rows, self.seed = config, rows, seed

    @classmethod
    def absent(cls, catalogue: Catalogue) -> str | None:
        """Why these logs cannot have it; None where they can."""
        return None

    def learn(self, training: TrainingShard) -> None:
        """See the training requests of one shard."""

    def ready(self) -> None:
        """All training requests were seen."""

    def score(self, table: TriggerTable, block: Block) -> np.ndarray:
        """float64 (T, C): higher is taken first, equal ones by position."""
        raise NotImplementedError

    @staticmethod
    def over_channels(score_T: np.ndarray, table: TriggerTable) -> np.ndarray:
        """float64 (T, C): the same score in every channel."""
        return np.repeat(score_T[:, None], len(table.channels), axis=1)
