"""How the training workers of one machine find each other: by a file in the folder of their Ray, not by a port.

torch's own rendezvous store (`TCPStore`) listens on all interfaces and asks nobody for anything. On one machine a file
that this user alone can read does the same. Workers on several machines keep the port: they may share no folder.

Imports Ray Train and torch: only for whoever starts a group.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


@dataclass
class FileRendezvous(TorchConfig):
    """A TorchConfig whose workers meet in a file of their own below `folder`, which all of them must see."""

    folder: str = ""

    @property
    def backend_cls(self):
        return _MeetInFile


class _MeetInFile(_TorchBackend):
    def on_start(self, worker_group, backend_config: FileRendezvous) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        meeting = Path(backend_config.folder) / f"store-{uuid.uuid4().hex}"  # of this group: a restart takes another
        ray.get([worker_group.execute_single_async(
            rank, _setup_torch_process_group, backend=backend_config.backend, world_rank=rank,
            world_size=len(worker_group), init_method=f"file://{meeting}", timeout_s=backend_config.timeout_s)
            for rank in range(len(worker_group))])


def torch_config(backend: str, timeout_s: int, local_folder: Path | None) -> TorchConfig:
    """For Ray Train.

    Args:
        backend: "gloo" or "nccl". timeout_s: of collectives. local_folder: of a Ray on this machine alone, which goes
            with it; None: a cluster.
    """
    if local_folder is None:
        return TorchConfig(backend=backend, timeout_s=timeout_s)
    return FileRendezvous(backend=backend, timeout_s=timeout_s, folder=str(local_folder))
