"""How long this process waits for the all-to-all of the tables: ids, rows and gradients of other workers.

TorchRec starts each of them and waits for it later. For ids a lookup waits itself, in `waiting`. For rows and their
gradients TorchRec's autograd functions do, in a module that calls `torch.distributed` by a name of its own, which here
becomes one that keeps the time. What is measured is what a step stands for it, not what passed while something else was
computed. On a GPU a wait is one of the device's stream, which the host does not feel; there a profile tells.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torchrec.distributed import comm_ops

_waited_s = 0.0


def take_waited_s() -> float:
    """Seconds that this process has waited since the last call."""
    global _waited_s
    waited, _waited_s = _waited_s, 0.0
    return waited


@contextmanager
def waiting() -> Iterator[None]:
    """The time of this block counts; no other such block, and no lookup's rows, are waited for in it."""
    global _waited_s
    began = time.perf_counter()
    try:
        yield
    finally:
        _waited_s += time.perf_counter() - began


class _Timed:
    """A collective that is under way."""

    def __init__(self, work: dist.Work):
        self._work = work

    def wait(self, *arguments: Any) -> Any:
        with waiting():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class _Distributed:
    """torch.distributed, whose all-to-all keeps the time."""

    Work = (dist.Work, _Timed)  # for isinstance: TorchRec looks in some places whether there is anything to wait for

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_to_all_single(self, *arguments: Any, **named: Any) -> Any:
        work = dist.all_to_all_single(*arguments, **named)
        return None if work is None else _Timed(work)


def keep_time() -> None:
    """From now on the waits of TorchRec's own for rows and gradients count, in this process."""
    if comm_ops.dist is dist:
        comm_ops.dist = _Distributed()
