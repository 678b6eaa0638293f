"""The cluster of tests/faults/nodes.py as its user sees it: where it is, what joins it needs, and what shall happen."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from tiny_run import Started

HERE = Path(__file__).resolve().parent
ANSWERS_WITHIN_S = 600.0


def can_have_networks() -> str | None:
    """Why this process may not make networks; None if it may."""
    if os.geteuid() != 0:
        return "only root may make networks"
    try:
        found = subprocess.run(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", "ip link add eth0 type bridge && ip link add p0 type "
             "veth peer name p1 && ip link set p0 master eth0 && mount -t tmpfs none /mnt && command -v nsenter"],
            capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return (found.stderr.strip() or "networks cannot be made here") if found.returncode else None


class RayNodes(Started):
    """The process that has the nodes. address: of Ray; jobs: of its job server, None without a dashboard; prefix: words
    before a command that shall run where it can reach them; environment: what it needs."""

    def __init__(self, log: Path, count: int, *, cpus: int = 1, dashboard: bool = False, networks: bool = False,
                 own_disks: Path | None = None):
        words = [f"--cpus={cpus}", *(["--dashboard"] if dashboard else []), *(["--networks"] if networks else []),
                 *([f"--own-disks={own_disks}"] if own_disks is not None else [])]
        super().__init__([sys.executable, str(HERE / "nodes.py"), str(count), *words], log, stdin=subprocess.PIPE)
        self._networks, self._dashboard, self._told = networks, dashboard, 0
        self._take(self._said("address "))

    def _take(self, answer: str) -> None:
        self.address, *rest = answer.split()
        self.jobs = rest.pop(0) if self._dashboard else None
        self.prefix = ("nsenter", "-t", rest.pop(0), "-n", "-u") if self._networks else ()
        self.environment = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled",
                            "GLOO_SOCKET_IFNAME": "eth0" if self._networks else "lo"}

    def _said(self, begin: str) -> str:
        """The rest of the line that begins so."""
        until = time.monotonic() + ANSWERS_WITHIN_S
        while time.monotonic() < until and self.is_running():
            for line in self.output.splitlines(keepends=True):
                if f"{line.rstrip()} ".startswith(begin) and line.endswith("\n"):
                    return f"{line.rstrip()} "[len(begin):].strip()
            time.sleep(0.1)
        raise AssertionError(f"the cluster did not say {begin}: {self.output[-1500:]}")

    def _tell(self, word: str) -> str:
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()
        self._told += 1
        return self._said(f"done {self._told - 1} ")

    def lose(self) -> None:
        """The node that came first is killed."""
        self._tell("lose")

    def add(self) -> None:
        """A node comes."""
        self._tell("add")

    def restart(self) -> None:
        """The head and all nodes are killed, and others started at another address."""
        self._take(self._tell("restart"))

    def workers_by_node(self) -> list[list[psutil.Process]]:
        """The training workers, by the raylet that started them."""
        found: dict[int, list[psutil.Process]] = {}
        for worker in self.victims("worker"):
            with contextlib.suppress(psutil.Error):
                found.setdefault(worker.ppid(), []).append(worker)
        return list(found.values())

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        super().end()


@contextmanager
def ray_nodes(log: Path, count: int, *, cpus: int = 1, dashboard: bool = False, networks: bool = False,
              own_disks: Path | None = None) -> Iterator[RayNodes]:
    """A cluster of a head and so many nodes of so many CPUs, until the block ends."""
    nodes = RayNodes(log, count, cpus=cpus, dashboard=dashboard, networks=networks, own_disks=own_disks)
    try:
        yield nodes
    finally:
        nodes.end()
