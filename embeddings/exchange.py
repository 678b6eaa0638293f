"""How long this process waits for the all-to-all of the tables: ids, rows and gradients of other workers.

TorchRec starts each of them and waits for it later, forward and backward, in places of its own. Its two modules that do
so call `torch.distributed` by a name of theirs, which here becomes one that keeps the time: what is measured is what a
step stands for it, not what passed while something else was computed. On a GPU a wait is one of the device's stream,
which the host does not feel; there a profile tells.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from torchrec.distributed import comm_ops, dist_data

_waited_s = 0.0


def take_waited_s() -> float:
    """Seconds that this process has waited since the last call."""
    global _waited_s
    waited, _waited_s = _waited_s, 0.0
    return waited


class _Timed:
    """A collective that is under way."""

    def __init__(self, work: dist.Work):
        self._work = work

    def wait(self, *arguments: Any) -> Any:
        global _waited_s
        began = time.perf_counter()
        try:
            return self._work.wait(*arguments)
        finally:
            _waited_s += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class _Distributed:
    """torch.distributed, whose all-to-all keeps the time."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_to_all_single(self, *arguments: Any, **named: Any) -> Any:
        global _waited_s
        began = time.perf_counter()
        work = dist.all_to_all_single(*arguments, **named)
        if work is None:  # it has waited itself
            _waited_s += time.perf_counter() - began
            return None
        return _Timed(work)


def keep_time() -> None:
    """From now on TorchRec's all-to-all of this process counts."""
    for module in (comm_ops, dist_data):
        if module.dist is dist:
            module.dist = _Distributed()
