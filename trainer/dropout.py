"""Dropout whose masks do not depend on how many workers there are.

What is dropped is a function of the step, of the layer, and of what a row is: an item, or a place in a window of the
global batch. Whoever holds the row drops the same of it, so a run that goes on with another number of workers goes on
with the same losses. A generator that each worker draws from for itself cannot do that.

    mask[row, d] = lane d mod 4 of mix(scramble(key_row + salt) xor scramble(d div 4)) >= rate        16 bits a lane

The salt is drawn from torch's generator at each call; training seeds that alike on all workers before each step. The
mixing is a counter-based generator's (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): two rounds
of multiply and shift, which on a CPU cost what drawing as many numbers costs. On a GPU torch's own dropout is used, one
kernel instead of nine, and its fused attention; there the masks are each worker's own, unless `by_row` asks for these.

Shape suffixes: N = rows, D = width, B = windows or requests, S = packed places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ODD = (-7046029254386353131, -4658895280553007687)  # 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9: of splitmix64
_LANES = 4
_on_gpus = False


def by_row(on_gpus: bool) -> None:
    """Whether masks follow the rows on GPUs, too, from now on in this process. On a CPU they always do."""
    global _on_gpus
    _on_gpus = on_gpus


def follows_rows(x: Tensor) -> bool:
    """Whether masks of this tensor follow the rows."""
    return x.device.type == "cpu" or _on_gpus


def place_keys(row_B: Tensor, place_S: Tensor, places: int) -> Tensor:
    """What a packed place is, whatever worker holds it: int64 (S,).

    Args:
        row_B: int64, the row of each window or request in the global batch. place_S: int64, b * places + p.
    """
    return row_B[torch.div(place_S, places, rounding_mode="floor")] * 2**32 + place_S % places


class Dropout(nn.Module):
    """Drops single numbers of rows in training, and scales what is left by 1 / (1 - rate). Where masks follow the
    rows, the rate is rounded to a multiple of 2^-16.

    Args:
        rate: 0 <= rate < 1.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, key_N: Tensor) -> Tensor:
        """float (N, ..) to the same; key_N: int64, what each row is. Rows of one key have one mask."""
        if not self.training or self.rate == 0.0:
            return x
        if not follows_rows(x):
            return F.dropout(x, self.rate)
        width = x[:1].numel()
        # From the CPU's generator, whatever the device: it is the one that is alike on all workers.
        salt = torch.empty((), dtype=torch.int64).random_(-(2**63), None)
        drawn = _mixed_((key_N.to(x.device) + salt).mul_(_ODD[0]))[:, None] ^ _mixed_(
            torch.arange(1, 1 - -width // _LANES, device=x.device).mul_(_ODD[1]))
        kept = _mixed_(drawn).view(torch.int16)[:, :width] >= round(self.rate * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(1.0 / (1.0 - self.rate)).view(x.shape)


def _mixed_(z: Tensor) -> Tensor:
    """int64 of any shape but none, mixed in place: every bit of a number decides every other. The upper half is laid
    over the lower one as words: a shift of int64 drags the sign along, and would lose it."""
    words = z.view(torch.int32)
    low, high = words[..., 0::2], words[..., 1::2]  # of a little-endian machine, as all that torch runs on
    low ^= high
    for factor in _ODD:
        z *= factor
        low ^= high
    return z


class RowMlp(nn.Sequential):
    """nn.Sequential that hands the rows' keys to its Dropouts."""

    def forward(self, x: Tensor, key_N: Tensor) -> Tensor:
        """float (N, width) to what the last layer gives."""
        for layer in self:
            x = layer(x, key_N) if isinstance(layer, Dropout) else layer(x)
        return x
