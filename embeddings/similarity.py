"""The score of a user vector and an item vector, named once for the loss and for the index.

    s(u, v) = <u, v> / tau + b_v        with u and v l2-normalized first when `kind` is `cosine`

An inner-product index returns the same number when it holds (v, b_v) and is asked with (u / tau, 1).

Shape suffixes: B = user rows, G = item rows, N = items of the catalogue, D = vector width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from configs.errors import InputError


@dataclass(frozen=True)
class Similarity:
    """How well an item answers a user vector.

    All methods compute in float32, whatever comes in and under whatever autocast: a score that the loss rounded to
    bfloat16 would not be the one that the index ranks by.

    Attributes:
        kind: `dot`, or `cosine`, where both vectors are l2-normalized first (a zero vector stays zero).
        temperature: tau > 0; the inner product is divided by it, the bias is not.

    Raises:
        InputError: an unknown kind, or a temperature that is not positive and finite.
    """

    kind: Literal["dot", "cosine"] = "cosine"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in ("dot", "cosine"):
            raise InputError(f"similarity kind {self.kind!r} is not dot or cosine")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"similarity temperature {self.temperature} is not a positive number")

    def scores(self, user_BD: Tensor, item_GD: Tensor, bias_G: Tensor | None = None) -> Tensor:
        """Scores of every user row with every item row, float32 (B, G), with gradient to all three.

        Args:
            user_BD: (B, D) user vectors.
            item_GD: (G, D) item vectors.
            bias_G: (G,) item biases; None is zero.
        """
        with torch.autocast(user_BD.device.type, enabled=False):
            user_BD, item_DG = self._directed(user_BD) / self.temperature, self._directed(item_GD).T
            # One pass over (B, G) instead of three.
            return user_BD @ item_DG if bias_G is None else torch.addmm(bias_G.float(), user_BD, item_DG)

    def query_vectors(self, user_BD: Tensor) -> Tensor:
        """What the index is asked with: float32 (B, D + 1), (u / tau, 1)."""
        query_BD = self._directed(user_BD) / self.temperature
        return torch.cat([query_BD, query_BD.new_ones(query_BD.shape[0], 1)], dim=1)

    def index_vectors(self, item_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """What the index holds: float32 (N, D + 1), (v, b); the bias is zero where it is None."""
        item_ND = self._directed(item_ND)
        bias_N1 = item_ND.new_zeros(item_ND.shape[0], 1) if bias_N is None else bias_N.float()[:, None]
        return torch.cat([item_ND, bias_N1], dim=1)

    def _directed(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()
        return normalize(vectors, dim=1) if self.kind == "cosine" else vectors
