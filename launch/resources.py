"""What a run asks Ray for, and what of it a cluster lacks.

Training workers are a gang: Ray reserves all of them at once (`train.cpus_per_worker`, `train.gpus_per_worker`), laid
over nodes as `train.placement` says. The tasks of ingest, channels, replay and routing come one by one, each with so
many CPUs (`ray.ingest_cpus`, ..). Both wait for nodes that may still come, `train.wait_s` at most, and then tell what
is missing. Nothing here imports Ray before it is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from configs.errors import WatchtowerError
from configs.schema import Config
from launch.stopping import interrupt

LOOK_EVERY_S = 0.5
NAMED_NODES = 8  # of those that are too small, in a message
CLOSE = 1e-6  # of sums of fractions


@dataclass(frozen=True)
class Node:
    """A living node: its address, and what Ray was told that it has (CPU, GPU, ..)."""

    address: str
    resources: Mapping[str, float]


def worker_resources(config: Config, gpu: bool) -> dict[str, float]:
    """What one training worker reserves: CPU, and GPU where the workers train on GPUs."""
    train = config.train
    return {"CPU": train.cpus_per_worker or 1.0, **({"GPU": train.gpus_per_worker} if gpu else {})}


def task_cpus(config: Config, stage: str) -> float:
    """What one task of a stage reserves, in CPUs; stage: ingest, channels, replay or routing."""
    return getattr(config.ray, f"{stage}_cpus")


def largest_task_cpus(config: Config) -> float:
    """Of the tasks of all stages."""
    return max(task_cpus(config, stage) for stage in ("ingest", "channels", "replay", "routing"))


def workers_on(node: Node, each: Mapping[str, float]) -> int:
    """How many workers a node has room for while nothing else runs there."""
    return min(int(node.resources.get(name, 0.0) / amount + CLOSE) for name, amount in each.items())


def room_for(nodes: Sequence[Node], each: Mapping[str, float], placement: str) -> int:
    """How many workers the nodes have room for while nothing else runs there; under strict_spread one on each."""
    most = 1 if placement == "strict_spread" else None
    return sum(min(count, most) if most else count for count in (workers_on(node, each) for node in nodes))


def amounts(resources: Mapping[str, float]) -> str:
    """In words: `2 CPUs and 1 GPU`."""
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 or name not in ('CPU', 'GPU') else 's'}"
                        for name, amount in resources.items())


def too_small(node: Node, each: Mapping[str, float]) -> str | None:
    """What a node lacks for one worker, in words; None where it has room."""
    lacks = {name: amount - node.resources.get(name, 0.0) for name, amount in each.items()
             if node.resources.get(name, 0.0) < amount - CLOSE}
    return f"{node.address} lacks {amounts(lacks)}" if lacks else None


def missing_workers(config: Config, least: int, gpu: bool, nodes: Sequence[Node], free: Mapping[str, float]) -> str:
    """Why a gang does not come to be, for people.

    Args:
        least: workers without which training does not begin. gpu: whether they take GPUs. free: of all nodes together,
            what nobody uses now.
    """
    each, placement = worker_resources(config, gpu), config.train.placement
    total = {name: sum(node.resources.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    asked = f"train.workers asks for at least {least}, each with {amounts(each)}"
    if placement == "strict_spread":
        asked += " on a node of its own (train.placement: strict_spread)"
    has = f"the cluster has {len(nodes)} node{'' if len(nodes) == 1 else 's'} with {amounts(total)} in all"
    room = room_for(nodes, each, placement)
    if room >= least:
        now = amounts({name: free.get(name, 0.0) for name in each})
        return f"{asked}; {has}, room enough, but other work holds it: free now are {now}"
    told = f"{asked}; {has}, room for {room}: {least - room} missing"
    small = [lack for node in nodes if (lack := too_small(node, each)) is not None]
    if small:
        more = f", and {len(small) - NAMED_NODES} more" if len(small) > NAMED_NODES else ""
        told += f" ({'; '.join(small[:NAMED_NODES])}{more})"
    return told


def missing_for_task(config: Config, stage: str, nodes: Sequence[Node]) -> str | None:
    """Why no task of a stage can run, for people; None where one can."""
    cpus = task_cpus(config, stage)
    largest = max((node.resources.get("CPU", 0.0) for node in nodes), default=0.0)
    if largest >= cpus - CLOSE:
        return None
    return (f"ray.{stage}_cpus asks for {amounts({'CPU': cpus})} a task, and the largest of the cluster's {len(nodes)} "
            f"nodes has {largest:g}")


def missing_here(config: Config, workers: int) -> str | None:
    """What a local Ray, which is one node with `ray.cpus` CPUs, can never have; None where all is well."""
    if config.train.placement == "strict_spread" and workers > 1:
        return (f"train.placement is strict_spread, and {workers} workers of a local Ray have one node: take pack or "
                "spread, or a cluster (ray.address)")
    if config.ray.cpus is None:
        return None
    wanted = workers * worker_resources(config, gpu=False)["CPU"]
    if config.ray.cpus < wanted - CLOSE:
        return (f"ray.cpus is {config.ray.cpus:g}, and {workers} workers of {amounts(worker_resources(config, False))} "
                f"need {wanted:g}: raise it, or leave it out")
    if config.ray.cpus < largest_task_cpus(config) - CLOSE:
        return (f"ray.cpus is {config.ray.cpus:g}, and a task asks for {largest_task_cpus(config):g} (ray.ingest_cpus, "
                "ray.channels_cpus, ray.replay_cpus, ray.routing_cpus): raise it, or leave it out")
    return None


def living_nodes() -> list[Node]:
    """Of the Ray that this process has joined."""
    import ray

    return [Node(node["NodeManagerAddress"], dict(node["Resources"])) for node in ray.nodes() if node["Alive"]]


@contextmanager
def waiting_for_room(config: Config, stage: str) -> Iterator[None]:
    """While the block runs the driver waits `train.wait_s` for a node that a task of this stage fits on, and ends where
    none has come; Ray itself would wait for ever."""
    from trainer.watchdog import moved  # it brings Arrow along

    over, deadline = threading.Event(), time.monotonic() + config.train.wait_s

    def look() -> str | None:
        try:
            return missing_for_task(config, stage, living_nodes())
        except Exception:  # there is no Ray, or none any more: the block will tell
            return None

    def watch() -> None:
        while (missing := look()) is not None:
            moved(f"room for a task of {stage}", in_step=False)
            if time.monotonic() > deadline:
                interrupt(WatchtowerError(f"for {config.train.wait_s:g} s (train.wait_s) no task of {stage} could "
                                          f"start: {missing}. Add a larger node, or lower ray.{stage}_cpus; the same "
                                          "command goes on from here"))
                return
            if over.wait(LOOK_EVERY_S):
                return

    thread = threading.Thread(target=watch, daemon=True, name="watchtower-room")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def scaling(config: Config, gpu: bool, least: int, most: int) -> dict[str, Any]:
    """The arguments of Ray Train's ScalingConfig."""
    return {"num_workers": most if least == most else (least, most), "use_gpu": gpu,
            "resources_per_worker": worker_resources(config, gpu), "placement_strategy": config.train.placement.upper()}
