"""`watchtower doctor`: what is installed, what fits together, what is missing, and the fix.

Every check is a function of what it is told (versions, sizes, paths) that gives findings; `findings` asks the machine
and tells them. `before_run` is the cheap part, which `watchtower run` does first, and `before_submit` what of it counts
where a run is only sent from: package metadata and the config alone, nothing heavy is imported. An error is what a run
would fail of; a warning is what it would be slow or fragile of.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.errors import InputError, WatchtowerError

if TYPE_CHECKING:
    from configs.schema import Config

MIB = 2**20
GIB = 2**30
FBGEMM_OF_TORCH = {(2, 11): (1, 6), (2, 12): (1, 7), (2, 13): (1, 8)}
TUPLES = "torch 2.13 with fbgemm 1.8 and torchrec 1.8, 2.12 with 1.7, 2.11 with 1.6"
REINSTALL = ("install with packaging/constraints-cpu.txt or packaging/constraints-cuda.txt (make venv), which hold "
             "versions that fit")
OPEN_FILES = (256, 4096)  # below the first a run fails, below the second Ray warns
MEMORY_A_WORKER = 2 * GIB
SLOW_BYTES_S = 5 * MIB
SAMPLE_BYTES = 4 * MIB
CLOCK_SKEW_S = (2.0, 60.0)
LEVELS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


@dataclass(frozen=True)
class Finding:
    """What a check found. level: `error` where a run would fail. fix: empty where all is well."""

    check: str
    level: Literal["ok", "warning", "error"]
    what: str
    fix: str = ""


# --- versions ---------------------------------------------------------------------------------------------------------

def release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of `2.13.0+cpu`."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def check_python(version: Sequence[int]) -> Iterator[Finding]:
    """3.11 or 3.12."""
    told = ".".join(str(part) for part in version[:3])
    if (3, 11) <= tuple(version[:2]) < (3, 13):
        yield Finding("python", "ok", f"Python {told}")
    else:
        yield Finding("python", "error", f"Python {told}, not 3.11 or 3.12", "make the environment with python3.11 or "
                                                                             "python3.12")


def check_tuple(versions: Mapping[str, str]) -> Iterator[Finding]:
    """torch, fbgemm and torchrec come as one: the compiled operators of another tuple fail at import, or later.

    Args:
        versions: package: version, of those that are installed.
    """
    fbgemm = {name: version for name, version in versions.items() if re.match(r"fbgemm[-_]gpu", name)}
    missing = [name for name in ("torch", "torchrec") if name not in versions] + ([] if fbgemm else ["fbgemm-gpu"])
    if missing:
        yield Finding("tables", "error", f"{', '.join(missing)} not installed", REINSTALL)
        return
    torch, torchrec = release(versions["torch"])[:2], release(versions["torchrec"])[:2]
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", *fbgemm, "torchrec"))
    wanted = FBGEMM_OF_TORCH.get(torch)
    if wanted is None:
        yield Finding("tables", "error", f"{told}: this torch is in none of the sets that fit", f"take {TUPLES}; "
                                                                                                 f"{REINSTALL}")
    elif torchrec != wanted or any(release(version)[:2] != wanted for version in fbgemm.values()):
        need = ".".join(map(str, wanted))
        yield Finding("tables", "error", f"{told} do not fit together: torch {torch[0]}.{torch[1]} needs fbgemm "
                                         f"{need} and torchrec {need}", f"take {TUPLES}; {REINSTALL}")
    else:
        yield Finding("tables", "ok", f"{told} fit together")


def check_ranges(requirements: Iterable[str], versions: Mapping[str, str], *, missing: bool = True
                 ) -> Iterator[Finding]:
    """Every package of ours in its range; those of an extra only where they are installed.

    Args:
        requirements: as package metadata has them: `torch<2.14,>=2.11`, `faiss-cpu<2,>=1.15; extra == "cpu"`.
        missing: whether a package that is not installed is an error.
    """
    wrong, seen = [], 0
    for requirement in requirements:
        spec, _, marker = requirement.partition(";")
        name, extras, ranges = re.match(r"([\w.-]+)(\[[^]]*\])?(.*)", spec.strip()).groups()
        name = name.lower()
        if name not in versions:
            if missing and not marker:
                wrong.append(f"{name} is missing")
            continue
        seen += 1
        if not all(_inside(release(versions[name]), bound.strip()) for bound in ranges.split(",") if bound.strip()):
            wrong.append(f"{name} {versions[name]} is not in {ranges.strip()}")
    if wrong:
        yield Finding("packages", "error", "; ".join(wrong), REINSTALL)
    else:
        yield Finding("packages", "ok", f"{seen} packages in their ranges")


def _inside(version: tuple[int, ...], bound: str) -> bool:
    operator, limit = re.match(r"([<>=!~]*)\s*(.*)", bound).groups()
    other = release(limit)
    length = max(len(version), len(other))
    have, want = (part + (0,) * (length - len(part)) for part in (version, other))
    return {"<": have < want, "<=": have <= want, ">": have > want, ">=": have >= want,
            "==": have == want}.get(operator, True)


def installed_versions() -> dict[str, str]:
    """package, in small letters: version."""
    names = {re.match(r"[\w.-]+", text)[0].lower() for text in our_requirements()}
    names |= {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "faiss-cpu", "faiss-gpu", "ninja"}
    found = {}
    for name in sorted(names):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def our_requirements() -> list[str]:
    """As they were when the package was installed; none where it was not."""
    try:
        return metadata.requires("watchtower") or []
    except metadata.PackageNotFoundError:
        return []


# --- this machine -----------------------------------------------------------------------------------------------------

def check_compiler(found: Mapping[str, str | None]) -> Iterator[Finding]:
    """g++ and ninja, by name: path or None."""
    missing = [name for name, path in found.items() if path is None]
    if missing:
        yield Finding("compiler", "warning", f"{' and '.join(missing)} not on PATH: needed only where DeepSpeed "
                                             "compiles operators of its own, which our towers do not ask for",
                      "apt-get install g++, pip install ninja")
    else:
        yield Finding("compiler", "ok", ", ".join(str(path) for path in found.values()))


@dataclass(frozen=True)
class Accelerator:
    """What torch and the system say of GPUs. cuda, nccl: versions that torch was built with; driver: of the kernel
    module; None where there is none. devices: names of the GPUs that torch can use."""

    cuda: str | None
    nccl: str | None
    driver: str | None
    devices: tuple[str, ...]


def check_accelerator(seen: Accelerator, wanted: str) -> Iterator[Finding]:
    """CUDA, driver and NCCL against `train.device`."""
    if seen.devices:
        yield Finding("gpu", "ok", f"{len(seen.devices)} x {seen.devices[0]}, CUDA {seen.cuda}, driver {seen.driver}")
        if seen.nccl is None:
            yield Finding("nccl", "error" if wanted != "cpu" else "warning", "this torch has no NCCL, which workers on "
                          "GPUs speak through", "install a CUDA build of torch from PyPI")
        else:
            yield Finding("nccl", "ok", f"NCCL {seen.nccl}")
        return
    level = "error" if wanted == "cuda" else "warning" if seen.driver else "ok"
    if seen.driver is None:
        what, fix = "no NVIDIA driver on this machine", "run on a machine with GPUs, or set train.device=cpu"
    elif seen.cuda is None:
        what, fix = f"driver {seen.driver}, but this torch is built for the CPU", ("install the CUDA environment "
                                                                                    "(packaging/constraints-cuda.txt)")
    else:
        what = f"driver {seen.driver} and torch for CUDA {seen.cuda}, but torch can use no GPU"
        fix = "a driver of that CUDA version or newer, and a container with --gpus all (NVIDIA_VISIBLE_DEVICES)"
    yield Finding("gpu", level, what, "" if level == "ok" else fix)


def check_faiss(versions: Mapping[str, str], has_gpu: bool, index_device: str) -> Iterator[Finding]:
    """The faiss that is installed against the GPU and `index.device`."""
    names = [name for name in ("faiss-gpu", "faiss-cpu") if name in versions]
    if not names:
        yield Finding("faiss", "error", "neither faiss-cpu nor faiss-gpu is installed", REINSTALL)
    elif len(names) == 2:
        yield Finding("faiss", "error", "faiss-cpu and faiss-gpu are both installed and overwrite each other",
                      "pip uninstall both, then install the one that is meant")
    elif names == ["faiss-cpu"] and index_device == "cuda":
        yield Finding("faiss", "error", f"index.device is cuda, but faiss-cpu {versions['faiss-cpu']} has no GPU "
                                        "support", "pip install 'watchtower[cuda]', or index.device=cpu")
    elif names == ["faiss-cpu"] and has_gpu:
        yield Finding("faiss", "warning", f"a GPU, and faiss-cpu {versions['faiss-cpu']}: indexes are built on the CPU",
                      "pip uninstall faiss-cpu; pip install faiss-gpu")
    else:
        yield Finding("faiss", "ok", f"{names[0]} {versions[names[0]]}")


def check_shared_memory(free_bytes: int | None, wanted_bytes: int) -> Iterator[Finding]:
    """/dev/shm against Ray's object store.

    Args:
        free_bytes: None where there is no /dev/shm. wanted_bytes: what the object store would take with room enough.
    """
    if free_bytes is None:
        yield Finding("shared memory", "warning", "no /dev/shm: Ray keeps its objects on disk", "mount a tmpfs there")
    elif free_bytes < wanted_bytes:
        yield Finding("shared memory", "warning",
                      f"/dev/shm has {free_bytes / GIB:.2f} GiB free, Ray's object store would take "
                      f"{wanted_bytes / GIB:.2f}: it gets less, or spills to disk",
                      f"docker run --shm-size={-(-wanted_bytes // GIB) + 1}g, or an emptyDir with medium: Memory")
    else:
        yield Finding("shared memory", "ok", f"/dev/shm has {free_bytes / GIB:.1f} GiB free")


def check_open_files(limit: int) -> Iterator[Finding]:
    """The soft limit of open files; -1 is none."""
    least, good = OPEN_FILES
    if 0 <= limit < good:
        level = "error" if limit < least else "warning"
        yield Finding("open files", level, f"at most {limit} files may be open; Ray and its workers want {good}",
                      f"ulimit -n {good * 16}, or LimitNOFILE in the service")
    else:
        yield Finding("open files", "ok", "no limit" if limit < 0 else f"{limit:,} may be open")


def check_cores(cores: int, workers: int) -> Iterator[Finding]:
    """Cores of this machine against `train.workers`, where they all run here."""
    if cores < workers:
        yield Finding("cores", "warning", f"{cores} cores for {workers} workers: they take turns",
                      f"train.workers={max(1, cores)}, or a cluster (ray.address)")
    else:
        yield Finding("cores", "ok", f"{cores} cores for {workers} workers")


def check_memory(total_bytes: int, workers: int) -> Iterator[Finding]:
    """Memory for this many workers on this machine, without tables."""
    wanted = MEMORY_A_WORKER * workers
    if total_bytes < wanted:
        yield Finding("memory", "warning", f"{total_bytes / GIB:.1f} GiB for {workers} workers, each of which takes "
                                           f"{MEMORY_A_WORKER / GIB:.0f} GiB before its tables",
                      "fewer train.workers, or a larger machine; watchtower plan says what tables take")
    else:
        yield Finding("memory", "ok", f"{total_bytes / GIB:.1f} GiB")


def check_loopback(host: str = "127.0.0.1") -> Iterator[Finding]:
    """A port can be had, and reached, on the address that a local Ray and its workers speak through."""
    try:
        with socket.create_server((host, 0)) as server, socket.create_connection(server.getsockname()[:2], timeout=5):
            yield Finding("loopback", "ok", f"ports of {host} can be had and reached")
    except OSError as error:
        yield Finding("loopback", "error", f"no port of {host} can be had and reached ({error})",
                      "bring up the loopback interface (ip link set lo up), and let the firewall pass it")


# --- storage ----------------------------------------------------------------------------------------------------------

def check_writable(location: str, key: str) -> Iterator[Finding]:
    """A small file is written, synced, read and removed in a folder, or where it would be made; and how fast that
    was. A location with :// goes through pyarrow."""
    try:
        speed = _written_and_read(location)
    except Exception as error:  # each store has errors of its own
        yield Finding(key, "error", f"{location}: cannot be written and read ({_first_line(error)})",
                      f"name another {key}, or give this user the right to write there")
        return
    yield from check_speed(key, location, speed)


def check_readable(location: str | None, key: str, files: Callable[[str], Sequence[Any]]) -> Iterator[Finding]:
    """The files of a location are listed, and the first bytes of one are read.

    Args:
        location: None is not asked for. files: lists them (trainer.logs.list_files).
    """
    if location is None:
        return
    try:
        found = files(location)
        begin = time.perf_counter()
        with found[0].open() as file:
            size = len(file.read(SAMPLE_BYTES))
        speed = size / max(time.perf_counter() - begin, 1e-9) if size == SAMPLE_BYTES else None
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else f"{location}: cannot be read ({_first_line(error)})"
        yield Finding(key, "error", text.replace("\n", " "), f"set {key}, or give this user the right to read it")
        return
    yield from check_speed(key, f"{location}: {len(found)} files", speed)


def check_speed(key: str, location: str, bytes_s: float | None) -> Iterator[Finding]:
    """How fast a storage was; None is not known."""
    if bytes_s is not None and bytes_s < SLOW_BYTES_S:
        yield Finding(key, "warning", f"{location}: slow, {bytes_s / MIB:.1f} MiB/s",
                      "a storage nearer to the workers, or a faster one")
    else:
        told = "" if bytes_s is None else f", {bytes_s / MIB:,.0f} MiB/s"
        yield Finding(key, "ok", f"{location}{told}")


def _written_and_read(location: str) -> float:
    """Bytes a second."""
    name, content = f".watchtower-doctor-{socket.gethostname()}-{os.getpid()}", os.urandom(SAMPLE_BYTES)
    begin = time.perf_counter()
    if "://" in location:
        from pyarrow import fs

        store, folder = fs.FileSystem.from_uri(location)
        path = f"{folder.rstrip('/')}/{name}"
        with store.open_output_stream(path) as stream:
            stream.write(content)
        try:
            with store.open_input_stream(path) as stream:
                same = stream.read() == content
        finally:
            store.delete_file(path)
    else:
        folder = _existing(Path(location).expanduser().absolute())
        path = folder / name
        try:
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            same = path.read_bytes() == content
        finally:
            path.unlink(missing_ok=True)
    if not same:
        raise WatchtowerError("what was read is not what was written")
    return 2 * len(content) / max(time.perf_counter() - begin, 1e-9)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def check_lock(run_dir: str) -> Iterator[Finding]:
    """Whether another process writes the run folder."""
    from launch.run_folder import living_holder

    holder = living_holder(Path(run_dir).expanduser())
    if holder is None:
        yield Finding("run folder", "ok", f"{run_dir}: nobody writes there")
    else:
        yield Finding("run folder", "error", f"{run_dir}: process {holder['pid']} on {holder.get('host')} writes there "
                                             f"since {holder.get('since')}", "wait for it, or set run_dir")


# --- Ray --------------------------------------------------------------------------------------------------------------

def check_reachable(address: str, timeout_s: float = 5.0) -> Iterator[Finding]:
    """Whether the port of an address answers; `auto` and `local` name none."""
    found = re.match(r"(?:\w+://)?\[?([^/\]]+?)\]?:(\d+)", address)
    if found is None:
        if address not in ("auto", "local"):
            yield Finding("ray address", "error", f"{address} is no address", "host:port, such as head:6379")
        return
    try:
        with socket.create_connection((found[1], int(found[2])), timeout=timeout_s):
            yield Finding("ray address", "ok", f"{address} answers")
    except (OSError, OverflowError) as error:
        yield Finding("ray address", "error", f"{address} does not answer ({error})",
                      "start Ray there (ray start --head), open the port, or leave ray.address and RAY_ADDRESS out")


def check_clocks(ahead_s: Mapping[str, float]) -> Iterator[Finding]:
    """Clocks of the nodes against this machine's: node: seconds that it is ahead."""
    some, much = CLOCK_SKEW_S
    worst = max(ahead_s, key=lambda node: abs(ahead_s[node]), default=None)
    if worst is not None and abs(ahead_s[worst]) > some:
        level = "error" if abs(ahead_s[worst]) > much else "warning"
        yield Finding("clocks", level, f"node {worst} is {ahead_s[worst]:+.1f} s off: its events and snapshots carry "
                                       "wrong times", "run chrony or ntpd on every node")
    elif ahead_s:
        yield Finding("clocks", "ok", f"{len(ahead_s)} nodes within {some:g} s")


def check_room(config: Config, nodes: Sequence[Any]) -> Iterator[Finding]:
    """Room for the gang of training workers, and for the largest task of each stage.

    Args:
        nodes: launch.resources.Node of those that live.
    """
    from launch.resources import missing_for_task, missing_workers, room_for, worker_resources

    least, train = config.train.least_workers, config.train
    gpu = train.device == "cuda" or (train.device == "auto" and room_for(
        nodes, {"GPU": train.gpus_per_worker}, train.placement) >= least)
    room = room_for(nodes, worker_resources(config, gpu), train.placement)
    if room < least:
        yield Finding("room", "error", missing_workers(config, least, gpu, nodes, {}), "more or larger nodes, or fewer "
                      "train.workers, or less for each (train.cpus_per_worker, train.placement)")
    else:
        yield Finding("room", "ok", f"{len(nodes)} nodes have room for {room} workers, {least} are asked for at least")
    for stage in ("ingest", "channels", "replay", "routing"):
        missing = missing_for_task(config, stage, nodes)
        if missing is not None:
            yield Finding("room", "error", missing, f"a larger node, or lower ray.{stage}_cpus")


def check_cluster(address: str, config: Config) -> Iterator[Finding]:
    """Joins a running cluster: its room, and the clocks of its nodes. Leaves it again."""
    import logging

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from launch.resources import living_nodes

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=False)
    except Exception as error:
        yield Finding("ray", "error", f"{address} cannot be joined ({_first_line(error)})",
                      "the same versions of ray and Python on both sides, and the cluster's token (RAY_AUTH_TOKEN)")
        return
    try:
        yield from check_room(config, living_nodes())
        nodes = [node for node in ray.nodes() if node["Alive"]]
        clock = ray.remote(num_cpus=0, max_retries=0)(time.time)
        ahead = {}
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            before = time.time()
            there = ray.get(clock.options(scheduling_strategy=here).remote(), timeout=60)
            after = time.time()
            # The first answer waits for a process to start; what lies between is no skew.
            ahead[node["NodeManagerAddress"]] = min(0.0, there - before) or max(0.0, there - after)
        yield from check_clocks(ahead)
    except Exception as error:
        yield Finding("ray", "error", f"{address}: a task did not run ({_first_line(error)})",
                      "look at the cluster's dashboard; a node may be full or gone")
    finally:
        ray.shutdown()


def check_local_ray(config: Config) -> Iterator[Finding]:
    """Starts the Ray that a run would have here, and stops it."""
    from launch.local_ray import start_ray

    try:
        with start_ray(config) as cluster:
            yield Finding("local ray", "ok", str(cluster))
    except WatchtowerError as error:
        yield Finding("local ray", "error", str(error), "look at the logs that it names")


# --- all of them ------------------------------------------------------------------------------------------------------

def cheap_findings() -> Iterator[Finding]:
    """What package metadata and the system's limits tell, without importing anything heavy."""
    versions = installed_versions()
    yield from check_python(sys.version_info)
    yield from check_tuple(versions)
    yield from check_ranges(our_requirements(), versions)
    yield from check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def check_resources(config: Config) -> Iterator[Finding]:
    """What the config reserves of a local Ray."""
    from launch.local_ray import local_workers
    from launch.resources import missing_here

    missing = missing_here(config, local_workers(config)[1])
    if missing is not None:
        what, _, fix = missing.rpartition(": ")
        yield Finding("resources", "error", what, fix)


def before_run(config: Config) -> None:
    """What `watchtower run` looks at before anything else.

    Raises:
        InputError: what a run would fail of, with the fix.
    """
    from launch.local_ray import ray_address

    _raise_errors([*cheap_findings(), *(check_resources(config) if ray_address(config) is None else ())])


def before_submit() -> None:
    """What `watchtower submit` looks at before it sends anything: the packages that are installed here are those that
    the cluster should have. What is not installed is no error, and limits of this machine are not looked at, for the
    run has its own.

    Raises:
        InputError: what the run would fail of on machines with the same packages, with the fix.
    """
    versions = installed_versions()
    found = [*check_python(sys.version_info), *check_ranges(our_requirements(), versions, missing=False)]
    if {"torch", "torchrec"} <= versions.keys() and any(name.startswith("fbgemm") for name in versions):
        found += check_tuple(versions)
    _raise_errors(found)


def _raise_errors(found: Iterable[Finding]) -> None:
    errors = [finding for finding in found if finding.level == "error"]
    if errors:
        raise InputError("\n".join(f"{finding.what}\n    fix: {finding.fix}" for finding in errors))


def findings(config: Config, *, deep: bool) -> Iterator[Finding]:
    """All findings about this machine and what the config names, as they are made."""
    from launch.local_ray import (
        local_workers,
        ray_address,
        usable_cores,
        usable_memory,
        wanted_object_store_bytes,
    )

    versions = installed_versions()
    address = ray_address(config)
    yield from cheap_findings()
    yield from check_compiler({name: shutil.which(name) for name in ("g++", "ninja")})
    seen = _accelerator()
    yield from check_accelerator(seen, config.train.device if address is None else "auto")
    yield from check_faiss(versions, bool(seen.devices), config.index.device)
    if address is None:
        shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
        yield from check_shared_memory(shm, wanted_object_store_bytes())
        yield from check_cores(usable_cores(), local_workers(config)[1])
        yield from check_memory(usable_memory(), local_workers(config)[1])
        yield from check_loopback()
        yield from check_resources(config)
    yield from check_writable(config.run_dir, "run_dir")
    from launch.remote import is_url, working_folder

    if is_url(config.run_dir):
        yield from check_writable(str(working_folder(config)), "storage.work_dir")
    yield from check_lock(str(working_folder(config)))
    if config.data.logs is None and config.data.synth is None:
        yield Finding("data.logs", "error", "no logs are named, and no synthetic world", "data.logs=FILE_OR_FOLDER")
    from trainer.logs import list_files

    suffixes = (".csv", ".parquet", ".parq", ".pq") if config.data.format == "kuairand_csv" else (
        ".parquet", ".parq", ".pq")
    for name in ("logs", "items", "users"):
        key = f"data.{name}"
        yield from check_readable(getattr(config.data, name), key,
                                  lambda place, key=key: list_files(place, key, suffixes))
    if address is not None:
        reached = list(check_reachable(address))
        yield from reached
        if all(finding.level == "ok" for finding in reached):
            yield from check_cluster(address, config)
    elif deep:
        yield from check_local_ray(config)


def _accelerator() -> Accelerator:
    driver = None
    try:
        found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)",
                          Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace"))
        driver = found[1] if found else "unknown"
    except OSError:
        pass
    try:
        import torch
    except Exception:  # check_tuple has told why, or the import itself will
        return Accelerator(None, None, driver, ())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nccl = None
    if count and torch.distributed.is_nccl_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    return Accelerator(torch.version.cuda, nccl, driver,
                       tuple(torch.cuda.get_device_name(number) for number in range(count)))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def run(arguments: Any) -> int:
    """The command line's `doctor`; the exit code, 1 where a run would fail."""
    from configs.schema import Config
    from launch.remote import load_config

    config = Config() if arguments.config is None else load_config(arguments.config, arguments.overrides)
    found = []
    for finding in findings(config, deep=arguments.deep):
        found.append(finding)
        if not arguments.json:
            fix = f"\n{'':24}fix: {finding.fix}" if finding.fix else ""
            print(f"{LEVELS[finding.level]} {finding.check:<15} {finding.what}{fix}", flush=True)
    errors = sum(finding.level == "error" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    if arguments.json:
        print(json.dumps({"ok": not errors, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        print(f"{errors} errors, {warnings} warnings" + (": a run would fail" if errors else ""))
    return 1 if errors else 0
