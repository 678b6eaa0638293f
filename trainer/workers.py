"""The workers of a run as the trainer sees them: one process each, joined by torch.distributed.

Who starts the processes (Ray Train, a test) is not known here. With one worker no collective is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import WatchtowerError


@dataclass(frozen=True)
class Workers:
    """This process among the workers. `device`: where its share of the model lives."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def joined(cls, device: torch.device) -> Workers:
        """From the process group that is already there."""
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """True on the one worker that writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def agree(self, value: Any) -> Any:
        """The first worker's value, on all of them. Small Python values; they travel between our own processes."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._transfer)
        return box[0]

    def everybody(self, value: Any) -> list[Any]:
        """The values of all workers in rank order, on all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, x_ND: Tensor) -> Tensor | None:
        """Rows of all workers in rank order on the first one, None on the others; N may differ between workers."""
        if self.count == 1:
            return x_ND
        counts = self.everybody(len(x_ND))
        padded = x_ND.new_zeros(max(counts), *x_ND.shape[1:])
        padded[:len(x_ND)] = x_ND
        received = [torch.empty_like(padded) for _ in counts] if self.first else None
        dist.gather(padded, received, dst=0)
        if received is None:
            return None
        return torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)])

    def raise_together(self, error: WatchtowerError | None) -> None:
        """Raises on every worker if any of them brings an error, so that nobody waits for one that is gone.

        Raises:
            WatchtowerError: the error of the lowest rank that has one; its own class on every worker.
        """
        for found in self.everybody(None if error is None else (type(error), str(error))):
            if found is not None:
                kind, message = found
                raise kind(message)

    def on_first(self, act: Callable[[], Any]) -> Any:
        """What `act` gives on the first worker, None on the others.

        Raises:
            WatchtowerError: what `act` raised, on every worker, so that nobody waits for the first one.
        """
        done, error = None, None
        if self.first:
            try:
                done = act()
            except WatchtowerError as failed:
                error = failed
        self.raise_together(error)
        return done

    def mean(self, loss: Tensor) -> float:
        """The mean of a scalar over the workers; not finite as soon as one of them is not. One collective."""
        mean = loss.detach().float().clone()
        if self.count > 1:
            dist.all_reduce(mean)
            mean /= self.count
        return float(mean)

    @property
    def _transfer(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")
