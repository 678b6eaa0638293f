"""The Ray that a run works on: a running cluster where an address names one, else one of its own on this machine.

    with start_ray(config) as cluster:
        ...

A local Ray is told of more CPUs than a small machine has, so that Ray Data and other tasks find one beside the training
workers and never wait for ever. It gets a folder of its own under /tmp (its sockets need a short path, and a
"current cluster" that a killed driver left behind must not catch us), no dashboard, and says nothing: workers speak
through events.jsonl. The environment that workers need is set before Ray starts, which is faster than a runtime_env.

Nobody else on the machine or the network gets in: a local Ray takes the loopback address for its node, and asks every
caller for a token of its own, which is made for the run, lies in its folder for this user alone, and is never shown.
What Ray and torch bind elsewhere all the same is named in SECURITY.md. A cluster's own authentication is left as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError, QualityGateError, WatchtowerError
from configs.schema import Config
from launch.console import say
from launch.resources import largest_task_cpus, worker_resources
from launch.stopping import interrupt

if TYPE_CHECKING:
    import psutil

GONE_S = 10.0  # that Ray's processes have to end in, once it is shut down
SPARE_CPUS = 2  # beside the training workers, for Ray Data and other tasks
TOKEN = "token"
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
MIB = 2**20
# A head that keeps its state elsewhere may come back; Ray itself ends a driver, without a word, after 60 s.
HEAD_LOOK_S, HEAD_AWAY_S = 2.0, 45.0
DRIVER = "driver.lock"  # in a local Ray's folder, held by the driver
_OWN: list[Path] = []  # the folder of the local Ray that this process runs


@dataclass(frozen=True)
class Cluster:
    """A Ray that runs. `address` is None for a local one; `seconds` is how long it took to start or to reach."""

    address: str | None
    cpus: float
    gpus: float
    nodes: int
    seconds: float

    def __str__(self) -> str:
        where = f"cluster at {self.address}, {self.nodes} nodes" if self.address else "local"
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        return f"Ray: {where}, {self.cpus:g} CPUs{gpus}, ready after {self.seconds:.1f} s"


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError, IndexError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()[:2]
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def local_cpus(config: Config, cores: int | None = None) -> int:
    """CPUs that a local Ray is told of: enough for every worker, and tasks beside them.

    Whole ones: given a fraction, or 2.0, Ray's node does not start and times out.
    """
    if config.ray.cpus is not None:
        return math.ceil(config.ray.cpus)
    cores = usable_cores() if cores is None else cores
    workers = local_workers(config, cores)[1] * worker_resources(config, gpu=False)["CPU"]
    return max(cores, math.ceil(workers + max(SPARE_CPUS, largest_task_cpus(config))))


def ray_address(config: Config) -> str | None:
    """The cluster that `ray.address` or RAY_ADDRESS names; None: a local Ray."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def local_workers(config: Config, cores: int | None = None) -> tuple[int, int]:
    """Training workers, at least and at most, of a local Ray: as many as there are cores, in the config's limits. A
    local Ray is told of more CPUs than there are, so its own count of them decides nothing."""
    train, cores = config.train, usable_cores() if cores is None else cores
    count = min(max(cores, train.least_workers), train.most_workers)
    return count, count


def worker_limits(config: Config) -> tuple[int, int]:
    """Training workers, at least and at most, on the Ray that this config names."""
    if ray_address(config) is None:
        return local_workers(config)
    return config.train.least_workers, config.train.most_workers


def threads_per_worker(config: Config, cores: int | None = None) -> int:
    """CPU threads of a training worker: what the config says, else the whole CPUs that it reserves, else the cores over
    the workers; at least 1."""
    if config.train.threads_per_worker is not None:
        return config.train.threads_per_worker
    if config.train.cpus_per_worker is not None:
        return max(1, int(config.train.cpus_per_worker))
    cores = usable_cores() if cores is None else cores
    return max(1, cores // local_workers(config, cores)[1])


def worker_environment(config: Config, *, local: bool) -> dict[str, str]:
    """The variables that Ray's processes need; a variable that the user set stays as it is."""
    found = {
        "OMP_NUM_THREADS": str(threads_per_worker(config)),
        # Threads that spin at OpenMP's barriers make a step ten times slower once anything else wants the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # the default, 2 s, delays every report of a checkpoint
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # of a worker that lives and does not answer; 600 s before
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a node that is taken away has seconds
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.train.device == "cpu" or (config.train.device == "auto" and not _has_nvidia()):
        found["DS_ACCELERATOR"] = "cpu"
    if local:
        found |= {"RAY_AUTH_MODE": "token", "GLOO_SOCKET_IFNAME": "lo", "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",
                  # Each of these is a process or a thread more in a group, for what one machine alone cannot need:
                  # nobody takes its node away, and nobody reads Ray's own metrics.
                  "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_METRICS_ENABLED": "0",
                  # Ray's switch for one machine alone, whatever its name says: the node's address is the loopback one.
                  LOOPBACK_SWITCH: "0"}
    return {name: os.environ.get(name, value) for name, value in found.items()}


def _has_nvidia() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists()


def usable_memory() -> int:
    """Bytes of memory that this machine has, or its container may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        memory = min(memory, int(limit)) if limit != "max" else memory
    return memory


def wanted_object_store_bytes() -> int:
    """Room that Ray's shared objects should have: a tenth of the memory, 512 MiB to 8 GiB."""
    return min(max(usable_memory() // 10, 512 * MIB), 8192 * MIB)


def object_store_bytes() -> int:
    """Room for Ray's shared objects: what they should have, and no more than /dev/shm can give."""
    wanted = wanted_object_store_bytes()
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        if free >= 128 * MIB:  # below that Ray takes /tmp instead, as large as we like
            wanted = min(wanted, int(free * 0.9))
    return wanted


@contextlib.contextmanager
def start_ray(config: Config) -> Iterator[Cluster]:
    """Connect to the cluster that `ray.address` or RAY_ADDRESS names, or run a local Ray until the block ends.

    Raises:
        WatchtowerError: the cluster cannot be reached, or a local Ray does not start.
    """
    address = ray_address(config)
    begin = time.perf_counter()
    variables = worker_environment(config, local=address is None)
    folder = held = None
    if address is None:
        folder, held = _own_folder(Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()))
        variables["RAY_AUTH_TOKEN_PATH"] = str(write_token(folder))
    # A token in a variable would win over the file; on a cluster it is the cluster's.
    before = {name: os.environ.get(name) for name in (*variables, *(["RAY_AUTH_TOKEN"] if folder else []))}
    os.environ.update(variables)
    if folder is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        import ray

        _tell_ray()
        _say_first_lines_alone()
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        try:
            if address is not None:
                ray.init(address=address, runtime_env={"env_vars": variables}, **quiet)
            else:
                ray.init(address="local", num_cpus=local_cpus(config), include_dashboard=False, _temp_dir=str(folder),
                         object_store_memory=object_store_bytes(), **quiet)
        except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
            if address is not None:
                raise WatchtowerError(
                    f"ray.address: no Ray cluster can be reached at {address} ({_first_line(error)}); start one there, "
                    "or leave ray.address and RAY_ADDRESS out for a local one") from error
            if folder is not None:
                (folder / DRIVER).unlink(missing_ok=True)
            raise WatchtowerError(f"a local Ray did not start ({_first_line(error)}); its logs: {folder}") from error
        keep_logs = False
        _OWN[:] = [] if folder is None else [folder]
        try:
            _give_back_sigterm(on_sigterm)
            total = ray.cluster_resources()
            nodes = sum(1 for node in ray.nodes() if node["Alive"])
            with contextlib.nullcontext() if address is None else watched_head(address):
                yield Cluster(address, total.get("CPU", 0.0), total.get("GPU", 0.0), nodes, time.perf_counter() - begin)
        except Exception as error:
            keep_logs = not isinstance(error, (InputError, QualityGateError))
            if keep_logs and folder is not None:
                error.add_note(f"Ray's own logs: {folder}")
            raise
        finally:
            _OWN.clear()
            processes = [] if folder is None else _processes_of(folder)
            ray.shutdown()
            _end(processes)
            if folder is not None:
                if keep_logs:
                    (folder / DRIVER).unlink(missing_ok=True)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        if folder is not None:  # which stays where Ray's logs may tell what went wrong
            (folder / TOKEN).unlink(missing_ok=True)
            os.close(held)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _tell_ray()


def _processes_of(folder: Path) -> list[psutil.Process]:
    """The processes of the local Ray that this process runs: those that name its folder, and what these have begun."""
    import psutil

    found: list[psutil.Process] = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                found += [process, *process.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process]) -> None:
    """Waits for processes that are about to end, and ends those that do not."""
    import psutil

    for process in psutil.wait_procs(processes, timeout=GONE_S)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


@contextlib.contextmanager
def watched_head(address: str) -> Iterator[None]:
    """While the block runs the head of the cluster is looked at. A head that is away for longer than HEAD_AWAY_S ends
    the run, before Ray ends the process without a word; what goes wrong because the head was lost is told as that.

    Raises:
        WatchtowerError: the head is gone, or another one is in its place.
    """
    import ray

    begun, over = ray.get_runtime_context().gcs_address, threading.Event()
    cluster = _cluster_id(begun)
    lost = (f"the head of the Ray cluster at {address} is gone, or was started anew, and its workers with it. What was "
            "published is whole: the same command on the new head (RAY_ADDRESS, ray.address) goes on from the last "
            "checkpoint")

    def watch() -> None:
        seen = time.monotonic()
        while not over.wait(HEAD_LOOK_S):
            if _answers(begun):
                seen = time.monotonic()
            elif time.monotonic() - seen > HEAD_AWAY_S:
                interrupt(WatchtowerError(lost))
                return

    thread = threading.Thread(target=watch, daemon=True, name="watchtower-head")
    thread.start()
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, QualityGateError)) or (_answers(begun) and _cluster_id(begun) == cluster):
            raise
        raise WatchtowerError(lost) from error
    finally:
        over.set()
        thread.join()


def _answers(address: str) -> bool:
    """Whether the port of a head takes a connection."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_LOOK_S):
            return True
    except OSError:
        return False


def _cluster_id(address: str) -> str | None:
    """What Ray calls the cluster of this head; None where it does not say."""
    from ray._raylet import GcsClient

    with contextlib.suppress(Exception):
        return GcsClient(address=address).cluster_id.hex()
    return None


def _say_first_lines_alone() -> None:
    """What a cluster tells every driver (a node that died, a task that took too much memory) as a warning of ours, a
    line each: Ray adds the last 20 lines of its own log, in colours."""
    import ray._private.worker as worker

    def tell(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for text in data["lines"]:
            line = next((line.strip() for line in str(text).splitlines() if line.strip()), "")
            say(f"Ray: {line[:300]}", "warning", sys.stderr)

    worker.print_to_stdstream = tell


def own_folder() -> Path | None:
    """The folder of the local Ray that this process runs, for this user alone; None: a cluster, or none."""
    return _OWN[0] if _OWN else None


def write_token(folder: Path) -> Path:
    """A fresh token in a file that only this user can read."""
    path = folder / TOKEN
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    return path


def _tell_ray() -> None:
    """A process that imported Ray before has read these variables already: let it read them again."""
    if "ray._raylet" not in sys.modules:
        return
    import ray._private.ray_constants as constants

    constants.ENABLE_RAY_CLUSTER = os.environ.get(LOOPBACK_SWITCH, "1") != "0"
    with contextlib.suppress(ImportError, AttributeError):
        from ray._raylet import AuthenticationTokenLoader
        from ray._raylet import Config as RayConfig

        RayConfig.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _own_folder(parent: Path) -> tuple[Path, int]:
    """A fresh folder for a local Ray, and the open lock that tells that its driver lives; the folders of drivers that
    were killed, which nobody needs, go."""
    for left in parent.glob("wt-*"):
        with contextlib.suppress(OSError):
            if (left / DRIVER).stat().st_uid == os.getuid() and _is_free(left / DRIVER):
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="wt-", dir=parent))
    lock = os.open(folder / f".{DRIVER}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / f".{DRIVER}", folder / DRIVER)  # seen only once it is locked
    return folder, lock


def _is_free(path: Path) -> bool:
    lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _give_back_sigterm(handler: Any) -> None:
    """Ray puts handlers of its own in place, one that exits with 1 and one in C that aborts; ours ends a run in order,
    and Ray with it."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

