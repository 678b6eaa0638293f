"""A Ray cluster of several nodes on this machine, in a process of its own, that loses nodes and gets others.

    python nodes.py 2 [--cpus 1] [--dashboard] [--networks [--own-disks FOLDER]]

A head without CPUs and so many nodes, each with processes and an object store of its own. The address is on stdout;
commands come on stdin and are answered by `done <number> <what>`: `lose` (the node that came first is killed), `add` (a
node comes), `restart` (the head and all nodes are killed, and others started, whose address is the answer).

--networks (root alone): each node in a network and with a host name of its own, joined by a bridge: the head at
10.231.0.1, nodes at 10.231.0.11 and so on, each on an interface called eth0. Nothing of it is seen outside, and it goes
with its processes. What is to join must run in the head's network: `nsenter -t PID -n -u`; the PID stands behind the
address.

--own-disks: at this folder each node but the head has a file system of its own, empty and in memory: what the head, and
whoever has joined there, has in it, no other node sees.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OBJECT_STORE = 100 << 20
GCS_PORT, DASHBOARD_PORT = 6379, 8265
STARTS_WITHIN_S = 120.0
# Three missed looks at a node, a second apart, and it is dead: Ray's own 30 s are for networks that are slow at times.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "1000",
               "RAY_health_check_failure_threshold": "3", "OMP_NUM_THREADS": "1"}


class OneAddress:
    """All nodes at this machine's address, each with ports of its own."""

    def __init__(self, count: int, cpus: int, dashboard: bool):
        self._count, self._cpus, self._dashboard = count, cpus, dashboard
        os.environ |= {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}
        self._start()

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE, "include_dashboard": self._dashboard,
                **({"dashboard_port": _free_port()} if self._dashboard else {})}
        self._cluster, self._nodes = Cluster(initialize_head=True, head_node_args=head), []
        for _ in range(self._count):
            self.add()
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        """host:port, and of the dashboard, where there is one."""
        jobs = f" http://{self._cluster.webui_url}" if self._dashboard else ""
        return f"{self._cluster.address}{jobs}"

    def add(self) -> str:
        self._nodes.append(self._cluster.add_node(num_cpus=self._cpus, object_store_memory=OBJECT_STORE))
        return ""

    def lose(self) -> str:
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)
        return ""

    def restart(self) -> str:
        for node in [*self._nodes, self._cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        self._start()
        return self.address

    def end(self) -> None:
        self._cluster.shutdown()


class Networks:
    """A network and a host name for each node, as on machines of their own; the disk is shared, but for a folder that
    may be each node's own."""

    def __init__(self, count: int, cpus: int, dashboard: bool, own: str | None = None):
        self._cpus, self._dashboard, self._own, self._made = cpus, dashboard, own, 0
        self._folder = Path("/tmp") / f"wt-nodes-{os.getpid()}"  # Ray's sockets need a short path
        os.environ |= {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"}
        self._head_host = _host("head")
        for words in (("link", "add", "eth0", "type", "bridge"), ("addr", "add", "10.231.0.1/24", "dev", "eth0"),
                      ("link", "set", "eth0", "up")):
            _ip(self._head_host, *words)
        self._count, self._starts = count, 0
        self._start()

    def _start(self) -> None:
        self._starts += 1
        # Another port each time: whoever still calls the old head must not reach the new one.
        self._port = GCS_PORT + self._starts - 1
        self._head = self._ray(self._head_host, "head", "--head", f"--port={self._port}", "--num-cpus=0",
                               "--node-ip-address=10.231.0.1", f"--temp-dir={self._folder}/{self._starts}",
                               f"--include-dashboard={str(self._dashboard).lower()}", "--dashboard-host=10.231.0.1",
                               f"--dashboard-port={DASHBOARD_PORT}")
        self._nodes: list[tuple[subprocess.Popen, subprocess.Popen]] = []
        for _ in range(self._count):
            self.add()

    @property
    def address(self) -> str:
        """host:port, and of the dashboard, where there is one."""
        jobs = f" http://10.231.0.1:{DASHBOARD_PORT}" if self._dashboard else ""
        return f"10.231.0.1:{self._port}{jobs} {self._head_host.pid}"

    def add(self) -> str:
        self._made += 1
        host, link = _host(f"node-{self._made}", self._own), f"p{self._made}"
        address = f"10.231.0.{10 + self._made}"
        _ip(self._head_host, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        _ip(self._head_host, "link", "set", link, "master", "eth0", "up")
        _ip(host, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip(host, "link", "set", "eth0", "up")
        node = self._ray(host, f"node-{self._made}", f"--address=10.231.0.1:{self._port}",
                         f"--node-ip-address={address}", f"--num-cpus={self._cpus}")
        self._nodes.append((host, node))
        return ""

    def lose(self) -> str:
        """The node is gone from one moment to the next, and nothing tells those that speak with it: its link is cut
        before its processes are killed."""
        host, node = self._nodes.pop(0)
        _ip(host, "link", "set", "eth0", "down")
        _kill_family(node)
        host.kill()
        return ""

    def restart(self) -> str:
        for node in [self._head, *(node for _, node in self._nodes)]:
            _kill_family(node)
        for host, _ in self._nodes:
            host.kill()
        self._start()
        return self.address

    def end(self) -> None:
        for process in [*(node for _, node in self._nodes), self._head]:
            _kill_family(process)
        for host in [*(host for host, _ in self._nodes), self._head_host]:
            host.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ray(self, host: subprocess.Popen, name: str, *words: str) -> subprocess.Popen:
        """`ray start` in a host's network, once it is up."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        log = self._folder / f"{self._starts}-{name}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                [*_inside(host), sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words,
                 f"--object-store-memory={OBJECT_STORE}", "--disable-usage-stats"], stdin=subprocess.DEVNULL,
                stdout=sink, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent)
        _until(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, f"{name}: {log}")
        if process.poll() is not None:
            raise RuntimeError(f"{name} did not start: {log.read_text()[-2000:]}")
        return process


def _host(name: str, own: str | None = None) -> subprocess.Popen:
    """A process that holds a network and a host name of its own until it ends; and a disk at the folder `own`."""
    disk = "" if own is None else f"mount -t tmpfs watchtower {shlex.quote(own)} && "
    holder = subprocess.Popen(["unshare", "--net", "--uts", "--mount", "sh", "-c",
                               f"{disk}hostname {name} && exec sleep infinity"],
                              stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)
    ours = os.readlink("/proc/self/ns/net")
    _until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != ours and
           b"sleep" in Path(f"/proc/{holder.pid}/cmdline").read_bytes(), "unshare")
    _ip(holder, "link", "set", "lo", "up")
    return holder


def _inside(host: subprocess.Popen) -> list[str]:
    return ["nsenter", "-t", str(host.pid), "-n", "-u", "-m"]


def _ip(host: subprocess.Popen, *words: str) -> None:
    subprocess.run([*_inside(host), "ip", *words], check=True)


def _kill_family(process: subprocess.Popen) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for each in [family, *family.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait(30)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _until(reached: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not up after {STARTS_WITHIN_S:.0f} s: {what}")
        time.sleep(0.05)


def _free_port() -> int:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--cpus", type=int, default=1, help="CPUs that each node says it has")
    parser.add_argument("--dashboard", action="store_true", help="with Ray's job server")
    parser.add_argument("--networks", action="store_true", help="an address of its own for each node")
    parser.add_argument("--own-disks", metavar="FOLDER", help="which every node has for itself; with --networks")
    given = parser.parse_args()
    if given.networks:
        nodes = Networks(given.count, given.cpus, given.dashboard, given.own_disks)
    else:
        nodes = OneAddress(given.count, given.cpus, given.dashboard)
    try:
        print(f"address {nodes.address}", flush=True)
        for number, line in enumerate(sys.stdin):
            answer = {"lose": nodes.lose, "add": nodes.add, "restart": nodes.restart}[line.strip()]()
            print(f"done {number} {answer}".rstrip(), flush=True)
    finally:
        nodes.end()


if __name__ == "__main__":
    main()
