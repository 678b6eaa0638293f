"""The workers of a run as the trainer sees them: one process each, joined by torch.distributed.

Who starts the processes (Ray Train, a test) is not known here. With one worker no collective is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import LostError, WatchtowerError
from embeddings.elsewhere import Away
from trainer.watchdog import Movement, moved

SIGN_OF_LIFE_S = 5.0
"""Seconds after which the others are told whether what the first worker does alone goes on, and gets on."""


class Stopped(WatchtowerError):
    """All workers have ended training at the same step because one of them was asked to. reason: why. step: the global
    step of the checkpoint."""

    def __init__(self, reason: str, step: int):
        super().__init__(f"training was stopped at step {step}: {reason}")
        self.reason, self.step = reason, step


@dataclass
class StopWish:
    """That this worker was asked to stop, and what came of it. reason: why; None: it was not asked. agreed: all
    workers know of it, and have known since the same step."""

    reason: str | None = None
    agreed: bool = False

    def ask(self, reason: str) -> None:
        """May be called on any thread; the first reason counts."""
        self.reason = self.reason or reason


def limit_collectives(timeout_s: float) -> None:
    """Every collective fails after this many seconds: those of the group that is there, and those of the groups that
    TorchRec and DeepSpeed make later, which otherwise take PyTorch's own 10 or 30 minutes."""
    timeout = timedelta(seconds=timeout_s)
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timeout)


def _tell_nobody(_: BaseException) -> None:
    pass


@dataclass(frozen=True)
class Workers:
    """This process among the workers. `device`: where its share of the model lives. `stop`: asks them to end.
    `failing`: takes an error that is going to end this worker, before it cleans up: the others wait for it."""

    rank: int
    count: int
    device: torch.device
    stop: StopWish = field(default_factory=StopWish, compare=False)
    failing: Callable[[BaseException], None] = field(default=_tell_nobody, compare=False, repr=False)

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
        moved()

    def agree(self, value: Any, *, moves: bool = True) -> Any:
        """The first worker's value, on all of them. Small Python values; they travel between our own processes. moves:
        that it came counts as a move."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._transfer)
        if moves:
            moved()
        return box[0]

    def everybody(self, value: Any, *, moves: bool = True) -> list[Any]:
        """The values of all workers in rank order, on all of them. moves: that they came counts as a move."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        if moves:
            moved()
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
        moved()
        if received is None:
            return None
        return torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)])

    def raise_together(self, error: WatchtowerError | None) -> None:
        """Raises on every worker if any of them brings an error, so that nobody waits for one that is gone. It is no
        move: who waits for something that hangs asks again and again.

        Raises:
            WatchtowerError: the error of the lowest rank that has one; its own class on every worker.
        """
        for found in self.everybody(None if error is None else (type(error), str(error)), moves=False):
            if found is not None:
                kind, message = found
                raise kind(message)

    def on_first(self, act: Callable[[], Any]) -> Any:
        """What `act` gives on the first worker, None on the others.

        It may take longer than a collective may: it runs on a thread, and the others are told every few seconds that it
        goes on. That counts as a move only if the first worker has got on, so that the watchdog sees what hangs.

        Raises:
            WatchtowerError: what `act` raised, on every worker, so that nobody waits for the first one; of an error
                that is not ours, its text on the others.
        """
        if self.count == 1:
            return act()
        alone = _OnThread(act, self.device) if self.first else None
        still, failed = True, None
        moved(in_step=False)
        while still:
            turn = None if alone is None else alone.turn(SIGN_OF_LIFE_S)
            still, failed, gets_on = self.agree(turn, moves=False)
            if gets_on or not still:
                moved()
        if failed is not None:
            if alone is not None:
                raise alone.error
            kind, message = failed
            raise kind(message)
        return None if alone is None else alone.result

    def mean(self, loss: Tensor) -> float:
        """The mean of a scalar over the workers; not finite as soon as one of them is not. One collective, which also
        carries whether anybody was asked to stop: all of them see `stop.agreed` at the same call."""
        mine = loss.detach().float()
        told = torch.stack([mine, mine.new_full((), self.stop.reason is not None)])
        if self.count > 1:
            dist.all_reduce(told)
            told[0] /= self.count
        moved()
        mean, asked = told.tolist()
        self.stop.agreed = self.stop.agreed or asked > 0
        return mean

    def stop_reason(self) -> str:
        """Why the workers stop, as the lowest rank that was asked knows it. Collective."""
        return next(filter(None, self.everybody(self.stop.reason)), "asked to")

    @property
    def _transfer(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")


class _OnThread:
    """`act` on a thread of its own, as if it were called here."""

    def __init__(self, act: Callable[[], Any], device: torch.device):
        self.result: Any = None
        self.error: BaseException | None = None
        self.failed: tuple[type[WatchtowerError], str] | None = None
        self._act, self._device, self._grad = act, device, torch.is_grad_enabled()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchtower-first")
        self._thread.start()

    def turn(self, wait_s: float) -> tuple[bool, tuple[type[WatchtowerError], str] | None, bool]:
        """After so many seconds: whether it is still at work, what it failed with, whether it has got on."""
        movement = Movement()
        self._thread.join(wait_s)
        is_at_work = self._thread.is_alive()
        return is_at_work, self.failed, movement.seen()

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        torch.set_grad_enabled(self._grad)
        try:
            self.result = self._act()
        except WatchtowerError as error:
            self.error, self.failed = error, (type(error), str(error))
        except Away as error:
            self.error, self.failed = error, (LostError, str(error))
        except BaseException as error:
            self.error, self.failed = error, (WatchtowerError, f"the first worker failed: {error!r}")
