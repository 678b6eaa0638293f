"""How Ray Train starts a group of our training workers: where they meet, and without the processes that serve nothing.

On one machine the workers meet by a file in the folder of their Ray. torch's own rendezvous store (`TCPStore`) listens
on all interfaces and asks nobody for anything; a file that this user alone can read does the same. Workers on several
machines keep the port: they may share no folder. On CPUs they train over a backend of ours, which each of them has to
make known to torch first (trainer/shared_memory.py).

Ray Train starts some actors beside each group, a process and a second or two of CPU time each: one that hands out Ray
datasets, of which we have none, and one that frees the placement group of a controller that died, which on one machine
the end of the run's own Ray does.

Imports Ray Train and torch: only for whoever starts a group.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from trainer import shared_memory


@dataclass
class PortRendezvous(TorchConfig):
    """A TorchConfig that knows our backend, too."""

    @property
    def backend_cls(self):
        return _MeetAtPort


class _MeetAtPort(_TorchBackend):
    def on_start(self, worker_group, backend_config: PortRendezvous) -> None:
        worker_group.execute(shared_memory.register)
        super().on_start(worker_group, backend_config)


@dataclass
class FileRendezvous(TorchConfig):
    """A TorchConfig whose workers meet in a file of their own below `folder`, which all of them must see."""

    folder: str = ""

    @property
    def backend_cls(self):
        return _MeetInFile


class _MeetInFile(_TorchBackend):
    def on_start(self, worker_group, backend_config: FileRendezvous) -> None:
        worker_group.execute(shared_memory.register)
        worker_group.execute(_set_torch_distributed_env_vars)
        meeting = Path(backend_config.folder) / f"store-{uuid.uuid4().hex}"  # of this group: a restart takes another
        ray.get([worker_group.execute_single_async(
            rank, _setup_torch_process_group, backend=backend_config.backend, world_rank=rank,
            world_size=len(worker_group), init_method=f"file://{meeting}", timeout_s=backend_config.timeout_s)
            for rank in range(len(worker_group))])


def torch_config(backend: str, timeout_s: int, local_folder: Path | None) -> TorchConfig:
    """For Ray Train.

    Args:
        backend: `shared_memory.BACKEND`, "gloo" or "nccl". timeout_s: of collectives. local_folder: of a Ray on this
            machine alone, which goes with it; None: a cluster.
    """
    if local_folder is None:
        return PortRendezvous(backend=backend, timeout_s=timeout_s)
    return FileRendezvous(backend=backend, timeout_s=timeout_s, folder=str(local_folder))


class WorkerGroupTrainer(TorchTrainer):
    """A TorchTrainer without what no group of ours needs."""

    def _create_default_callbacks(self):
        on_one_machine = isinstance(self.backend_config, FileRendezvous)
        useless = (DatasetsCallback, *((PlacementGroupCleanerCallback,) if on_one_machine else ()))
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, useless)]
