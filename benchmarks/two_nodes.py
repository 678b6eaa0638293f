"""Two Ray nodes against one, how long a submitted run takes to its first step, and how long a lost node holds one up.

    python benchmarks/two_nodes.py [--rounds 5] [--json PATH] [--one-address | --own-disks] [--users 4000] [--only ..]

Nodes are processes of this machine with an object store each (tests/faults/nodes.py): as root each in a network and
with a host name of its own, which --one-address leaves out. The machine should be quiet.

throughput  windows a second of two workers: one on each of two nodes (`train.placement=strict_spread`) against both on
            one (`pack`), on the same cluster and cores, in turns; the median over a run's `train_step` events, the
            first quarter left out. Both do the same batches and must come to the same losses, so it is the ratio of
            targets a second as well. Reach 0.95.
submit      from the start of `watchtower submit` (an empty run folder, a tiny world, the code that is installed) to the
            first `train_step`, on a cluster that has run one before: 30 s over the time it takes. Reach 1.
lost        a node's link is cut and its processes killed; another one comes. From the moment at which the cluster takes
            the lost one for dead, which its own health checks decide (their time limit stands beside it), to the next
            `train_step`: 60 s over that. Reach 1. The losses must be those of the run that nobody disturbed.

A row is the median over the rounds, with the least and the most. Exit code 1 where one falls short.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "faults")]

from ray_nodes import RayNodes, can_have_networks, ray_nodes  # noqa: E402
from results import losses  # noqa: E402
from surroundings import comes, training  # noqa: E402
from tiny_run import CONFIG, TinyRun, end_all, end_on_signals  # noqa: E402

from trainer.events import read_events  # noqa: E402

SUBMIT_S, LOST_S = 30.0, 60.0
SPREAD, PACK = "train.placement=strict_spread", "train.placement=pack"
ONE_MODEL = ("crm.models=[{name: dnn, tower: dnn, condition: next}]", "stages=[ingest,crm]")
LONG = (*ONE_MODEL, "train.epochs=12")  # a node that is lost must be missed in the middle of it
# Prints the times (Unix ms) at which a cluster took nodes for dead.
DEAD_NODES = ("import sys; from ray._raylet import GcsClient; print(*(info.end_time_ms for info in "
              "GcsClient(address=sys.argv[1]).get_all_node_info(timeout=30).values() if info.end_time_ms))")


def realistic(users: int) -> tuple[str, ...]:
    """Overrides for steps of a real size: those of benchmarks/training_step.py."""
    return (*ONE_MODEL, f"data.synth={{users: {users}, items: 7500, views_per_user: 50, days: 14, seed: 0}}",
            "crm.tower={dim: 64, history: 32}", "crm.tables={dim: 64, learning_rate: 0.1}", "train.batch_rows=128",
            "train.epochs=2", "train.checkpoint_every_steps=500", "train.log_every_steps=5")


class Short(RuntimeError):
    """A run did not do what is measured."""


def finished(nodes: RayNodes, run_dir: Path, *overrides: str) -> Path:
    """The folder of a run on these nodes that came to its end."""
    run = TinyRun(run_dir, *overrides, environment=nodes.environment, prefix=nodes.prefix)
    code = run.wait()
    if code:
        raise Short(f"exit code {code}: {run.output[-2000:]}")
    return run_dir


def windows_per_s(run_dir: Path) -> float:
    """Of the steps of a run, after the first quarter of its lines."""
    found = [event["rows_per_s"] for event in read_events(run_dir / "events.jsonl", "train_step")]
    return statistics.median(found[len(found) // 4:])


def row(name: str, ratios: list[float], reach: float, **more: float) -> dict:
    ratio = statistics.median(ratios)
    return {"name": name, "ratio": ratio, "spread": [min(ratios), max(ratios)], "reach": reach, "ok": ratio >= reach,
            **more}


def throughput(folder: Path, rounds: int, like: dict, users: int) -> dict:
    found: dict[str, list[float]] = {SPREAD: [], PACK: []}
    came_to = {}
    with ray_nodes(folder / "throughput-nodes.log", 2, cpus=2, **like) as nodes:
        for number in range(rounds):
            for placement in ((SPREAD, PACK) if number % 2 == 0 else (PACK, SPREAD)):
                run_dir = finished(nodes, folder / "run", placement, *realistic(users))
                hosts = {worker["node"] for event in read_events(run_dir / "events.jsonl", "train_step")
                         for worker in event["workers"]}
                if like["networks"] and len(hosts) != (2 if placement == SPREAD else 1):
                    raise Short(f"{placement} put the workers on {', '.join(sorted(hosts))}")
                found[placement].append(windows_per_s(run_dir))
                came_to.setdefault(placement, losses(run_dir))
                shutil.rmtree(run_dir)
    if came_to[SPREAD] != came_to[PACK]:
        raise Short("the losses of two nodes are not those of one")
    return row("two workers on two nodes / on one", [a / b for a, b in zip(found[SPREAD], found[PACK], strict=True)],
               0.95, windows_per_s=statistics.median(found[SPREAD]),
               against_windows_per_s=statistics.median(found[PACK]))


def submit(folder: Path, rounds: int, like: dict) -> dict:
    taken = []
    with ray_nodes(folder / "submit-nodes.log", 2, cpus=2, dashboard=True, **like) as nodes:
        finished(nodes, folder / "warm", SPREAD, *ONE_MODEL)
        for number in range(rounds):
            run_dir = folder / f"submitted-{number}"
            begin = time.time()
            done = subprocess.run(
                [*nodes.prefix, sys.executable, "-m", "launch.cli", "submit", str(CONFIG), f"run_dir={run_dir}", SPREAD,
                 *ONE_MODEL, "--installed", "--address", nodes.jobs], cwd=ROOT,
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},
                capture_output=True, text=True, timeout=1200)
            if done.returncode:
                raise Short(f"submit: exit code {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
            taken.append(next(read_events(run_dir / "events.jsonl", "train_step"))["time"] - begin)
            shutil.rmtree(run_dir)
    return row("submit to first step", [SUBMIT_S / seconds for seconds in taken], 1.0,
               seconds=statistics.median(taken))


def lost(folder: Path, rounds: int, like: dict) -> dict:
    taken, limits = [], []
    with ray_nodes(folder / "lost-nodes.log", 2, cpus=2, **like) as nodes:
        untouched = losses(finished(nodes, folder / "untouched", SPREAD, *LONG))
        for number in range(rounds):
            run_dir = folder / f"lost-{number}"
            run = TinyRun(run_dir, SPREAD, *LONG, environment=nodes.environment, prefix=nodes.prefix)
            comes(run, run_dir, training(6))
            nodes.lose()
            gone = time.time()
            nodes.add()
            if run.wait():
                raise Short(f"exit code {run.process.returncode}: {run.output[-2000:]}")
            groups = [event["time"] for event in read_events(run_dir / "events.jsonl", "group")]
            if len(groups) < 2 or losses(run_dir) != untouched:
                raise Short("the node was not missed" if len(groups) < 2 else "the losses are not the untouched run's")
            on = next(event["time"] for event in read_events(run_dir / "events.jsonl", "train_step")
                      if event["time"] > groups[1])
            dead = min(at for at in dead_nodes(nodes) if at > gone)
            taken.append(on - dead)
            limits.append(dead - gone)
            shutil.rmtree(run_dir)
    return row("lost node to next step", [LOST_S / seconds for seconds in taken], 1.0,
               seconds=statistics.median(taken), dead_after_s=statistics.median(limits))


def dead_nodes(nodes: RayNodes) -> list[float]:
    """When the cluster took nodes for dead, Unix s."""
    told = subprocess.run([*nodes.prefix, sys.executable, "-c", DEAD_NODES, nodes.address], capture_output=True,
                          text=True, check=True, env={**os.environ, **nodes.environment})
    return [int(at) / 1000 for at in told.stdout.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--one-address", action="store_true", help="no networks: all nodes at this machine's address")
    parser.add_argument("--own-disks", action="store_true", help="nodes share no disk (as root, with networks)")
    parser.add_argument("--users", type=int, default=4000, help="of the throughput's world")
    parser.add_argument("--only", nargs="+", default=["throughput", "submit", "lost"],
                        choices=["throughput", "submit", "lost"])
    arguments = parser.parse_args()
    like: dict = {"networks": not arguments.one_address and can_have_networks() is None}
    if arguments.own_disks and not like["networks"]:
        parser.error("--own-disks needs networks")
    # A job is started as `python`, which must be this one.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    measures: dict[str, Callable[[Path], dict]] = {
        "throughput": lambda folder: throughput(folder, arguments.rounds, like, arguments.users),
        "submit": lambda folder: submit(folder, arguments.rounds, like),
        "lost": lambda folder: lost(folder, arguments.rounds, like)}
    end_on_signals()
    rows, load = [], os.getloadavg()
    try:
        with tempfile.TemporaryDirectory(prefix="two-nodes-") as name:
            like["own_disks"] = Path(name) if arguments.own_disks else None
            for measure in arguments.only:
                found = measures[measure](Path(name))
                rows.append(found)
                limit = f", dead after {found['dead_after_s']:.1f} s" if "dead_after_s" in found else ""
                seconds = f"  {found['seconds']:.1f} s{limit}" if "seconds" in found else (
                    f"  ({found['windows_per_s']:,.0f} / {found['against_windows_per_s']:,.0f} windows/s)")
                print(f"{found['name']:<36} {found['ratio']:5.2f}  [{found['spread'][0]:.2f}, {found['spread'][1]:.2f}]"
                      f"  reach {found['reach']}  {'ok' if found['ok'] else 'SHORT'}{seconds}", flush=True)
    finally:
        end_all()
    if arguments.json:
        arguments.json.write_text(json.dumps({
            "load": load, "cores": len(os.sched_getaffinity(0)), "networks": like["networks"],
            "own_disks": arguments.own_disks, "rounds": arguments.rounds, "rows": rows}, indent=1) + "\n")
    return 0 if all(found["ok"] for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
