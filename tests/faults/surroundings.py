"""What happens around a run: a node is lost, the disk fills, the shared folder goes away, a rank is slow or raises."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from kills import Outcome
from ray_nodes import ray_nodes
from reader import Reader
from results import Results, losses
from tiny_run import POLL_S, TinyRun, Watched, left_in

HERE = Path(__file__).resolve().parent
SLOW_S, AWAY_S = 15.0, 3.0
COMES_WITHIN_S = 600.0
STARTS = 6
WITHIN = 1e-5  # of a loss, with another number of workers


def can_mount() -> str | None:
    """Why this process may not mount; None if it may."""
    if os.geteuid() != 0:
        return "only root may mount"
    found = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True,
                           text=True)
    return found.stderr.strip() or "mount is not allowed here" if found.returncode else None


@contextmanager
def _mounted(place: Path, *words: str) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *words, str(place)], check=True)
    try:
        yield
    finally:
        while not subprocess.run(["umount", "-l", str(place)], capture_output=True).returncode:
            pass


def ends_like(run_dir: Path, reference: Results, outcome: Outcome, again: Callable[[], TinyRun],
              first: TinyRun | None = None, allowed: tuple[int, ...] = (0, 1)) -> None:
    """Starts the run until exit code 0, and holds what it left against the untouched run's."""
    run = first
    while run is None or outcome.starts < STARTS:
        if run is None:
            run = again()
            outcome.starts += 1
        code = run.wait()
        outcome.wrong += [f"still there: {one}" for one in run.left()]
        if "Traceback (most recent call last)" in run.output or code not in allowed:
            outcome.wrong.append(f"exit code {code}: {run.output[-700:]}")
            return
        if code == 0:
            break
        outcome.where.append(f"exit {code}: {message(run)}")
        run = None
    else:
        outcome.wrong.append("does not come to an end")
        return
    outcome.wrong += [f"left behind: {one}" for one in left_in(run_dir)]
    outcome.wrong += reference.differences(Results(run_dir))


def message(run: TinyRun) -> str:
    return next((line[line.index("watchtower:"):] for line in run.output.splitlines() if "watchtower:" in line),
                "no message")[:160]


@contextmanager
def case(run_dir: Path, name: str) -> Iterator[Outcome]:
    """An outcome with a reader at work; what the block raises is its failure."""
    outcome, began, reader = Outcome(name), time.monotonic(), Reader(run_dir)
    reader.start()
    try:
        yield outcome
    except Exception as error:
        outcome.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        reader.stop()
        outcome.wrong += [f"half published: {one}" for one in reader.torn]
        outcome.seconds = time.monotonic() - began


def comes(run: TinyRun, run_dir: Path, reached: Callable[[Watched], bool]) -> Watched:
    """Waits for a run to come to where it is to be hit.

    Raises:
        AssertionError: it ended before, or did not come there.
    """
    watched, until = Watched(run_dir), time.monotonic() + COMES_WITHIN_S
    while run.is_running() and time.monotonic() < until:
        watched.read()
        if reached(watched):
            return watched
        time.sleep(POLL_S)
    raise AssertionError(f"the run did not come to where it was to be hit: {run.output[-500:]}")


def training(steps: int) -> Callable[[Watched], bool]:
    return lambda watched: watched.stage == "crm" and watched.steps >= steps


# ---------------------------------------------------------------------------------------------------------- the disk

def disk_full(room: float, needed_bytes: int, run_dir: Path, reference: Results, name: str) -> Outcome:
    """A disk with a share of the room that the run needs; then with enough.

    Args:
        needed_bytes: of the untouched run.
    """
    disk = run_dir / "disk"
    with _mounted(disk, "-t", "tmpfs", "-o", f"size={int(room * needed_bytes)}", "tmpfs"), \
            case(disk / "run", name) as outcome:
        run, outcome.starts = TinyRun(disk / "run"), 1
        code = run.wait()
        said = run.output
        outcome.wrong += [f"still there: {one}" for one in run.left()]
        if code != 2 or said.count("disk is full") != 1 or "Traceback (most recent call last)" in said:
            outcome.wrong.append(f"exit code {code} and not one message of a full disk: {said[-700:]}")
        watched = Watched(disk / "run")
        watched.read()
        outcome.counted = 1
        outcome.where.append(f"full at {watched.last}: {message(run).replace(str(disk), '')}")
        outcome.wrong += [f"half written: {one}" for one in left_in(disk / "run")]
        subprocess.run(["mount", "-o", f"remount,size={4 * needed_bytes}", str(disk)], check=True)
        ends_like(disk / "run", reference, outcome, lambda: TinyRun(disk / "run"))
    return outcome


def room_of(run_dir: Path) -> int:
    """Bytes of a run folder as tmpfs counts them: the pages of its files."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in run_dir.rglob("*") if path.is_file())


# -------------------------------------------------------------------------------------------------- the shared folder

def folder_away(reached: Callable[[Watched], bool], run_dir: Path, reference: Results, name: str) -> Outcome:
    """The folder's file system is gone for a while, an empty folder in its place, and comes back."""
    real, place = run_dir / "real", run_dir / "run"
    real.mkdir(parents=True)
    with _mounted(place, "--bind", str(real)), case(place, name) as outcome:
        run, outcome.starts = TinyRun(place), 1
        outcome.where.append(f"away at {comes(run, place, reached).last}")
        outcome.counted = 1
        subprocess.run(["umount", "-l", str(place)], check=True)
        time.sleep(AWAY_S)
        subprocess.run(["mount", "--bind", str(real), str(place)], check=True)
        ends_like(place, reference, outcome, lambda: TinyRun(place), run, allowed=(0, 1, 2))
    return outcome


# ----------------------------------------------------------------------------------------------------------- the ranks

def slow_rank(run_dir: Path, reference: Results, name: str) -> Outcome:
    """One worker stops for a while, and goes on."""
    with case(run_dir, name) as outcome:
        run, outcome.starts = TinyRun(run_dir), 1
        outcome.where.append(f"stopped for {SLOW_S:.0f} s at {comes(run, run_dir, training(2)).last}")
        worker = run.victims("worker")[-1]
        worker.send_signal(signal.SIGSTOP)
        outcome.counted = 1
        time.sleep(SLOW_S)
        worker.send_signal(signal.SIGCONT)
        ends_like(run_dir, reference, outcome, lambda: TinyRun(run_dir), run)
    return outcome


def raising_rank(run_dir: Path, reference: Results, name: str) -> Outcome:
    """Rank 1 raises in the middle of an epoch, once."""
    note = run_dir.with_name(f"{run_dir.name}.raises")
    note.write_text("5")
    environment = {"WATCHTOWER_RAISES": str(note),
                   "PYTHONPATH": os.pathsep.join([str(HERE / "shims"), str(HERE.parents[1])])}
    with case(run_dir, name) as outcome:
        run, outcome.starts = TinyRun(run_dir, environment=environment), 1
        ends_like(run_dir, reference, outcome, lambda: TinyRun(run_dir, environment=environment), run)
        outcome.where.append("rank 1 at step 5")
        outcome.counted = 1
        if note.exists():
            outcome.wrong.append("no rank raised")
    note.unlink(missing_ok=True)
    return outcome


def hung_rank(run_dir: Path, reference: Results, name: str) -> Outcome:
    """One worker stops for ever: the watchdog ends the run with exit code 1, and the next start goes on."""
    limits = ("train.timeout_s=45", "train.watchdog_s=90", "train.max_restarts=0")
    with case(run_dir, name) as outcome:
        run, outcome.starts = TinyRun(run_dir, *limits), 1
        outcome.where.append(f"stopped for ever at {comes(run, run_dir, training(2)).last}")
        worker = run.victims("worker")[-1]
        worker.send_signal(signal.SIGSTOP)
        outcome.counted = 1
        try:
            code = run.wait()
        finally:
            with contextlib.suppress(psutil.Error):
                worker.kill()
        outcome.where.append(f"exit {code}: {message(run)}")
        outcome.wrong += [f"still there: {one}" for one in run.left()]
        if code != 1 or "Traceback (most recent call last)" in run.output:
            outcome.wrong.append(f"exit code {code} for 1: {run.output[-700:]}")
        ends_like(run_dir, reference, outcome, lambda: TinyRun(run_dir))
    return outcome


# ----------------------------------------------------------------------------------------------------------- the nodes

def lost_node(run_dir: Path, reference: Results, name: str, overrides: tuple[str, ...] = (), *, cpus: int = 1,
              networks: bool = False, own_disks: Path | None = None) -> Outcome:
    """Two nodes with a worker each; one is killed, and another takes its place. own_disks: tests/faults/nodes.py."""
    log = run_dir.with_name(f"{run_dir.name}.nodes.log")
    with (ray_nodes(log, 2, cpus=cpus, networks=networks, own_disks=own_disks) as nodes,
          case(run_dir, name) as outcome):
        def start() -> TinyRun:
            return TinyRun(run_dir, *overrides, environment=nodes.environment, prefix=nodes.prefix)

        run, outcome.starts = start(), 1
        watched = comes(run, run_dir, training(4))
        nodes.lose()
        outcome.counted = 1
        outcome.where.append(f"a node lost at {watched.last}")
        nodes.add()
        ends_like(run_dir, reference, outcome, start, run)
    return outcome


def elastic_nodes(run_dir: Path, reference: Results, name: str) -> Outcome:
    """train.workers: {min: 1, max: 2} on two nodes, on the one that is left, and on two again: the same steps, each
    loss within 1e-5 of the untouched run's, in which there were two all along."""
    overrides = ("train.workers={min: 1, max: 2}", "stages=[ingest,crm]")
    with ray_nodes(run_dir.with_name(f"{run_dir.name}.nodes.log"), 2) as nodes, case(run_dir, name) as outcome:
        run, outcome.starts = TinyRun(run_dir, *overrides, environment=nodes.environment), 1
        outcome.where.append(f"two, one is lost at {comes(run, run_dir, training(4)).last}")
        nodes.lose()
        outcome.counted = 1
        watched = comes(run, run_dir, lambda watched: _group(watched) == 1 and watched.last.startswith("resume"))
        outcome.where.append("one goes on")
        nodes.add()
        code = run.wait()
        watched.read()
        outcome.where.append(f"ends with {_group(watched)}")
        outcome.wrong += [f"still there: {one}" for one in run.left()]
        if code:
            outcome.wrong.append(f"exit code {code}: {run.output[-700:]}")
        found, twice = losses(run_dir, WITHIN)
        expected = {key: loss for key, loss in reference.losses.items() if not key[0].startswith("capts")}
        outcome.wrong += twice + [f"loss of {key}: {found.get(key)} for {loss}" for key, loss in expected.items()
                                  if abs(found.get(key, math.inf) - loss) > WITHIN]
    return outcome


def _group(watched: Watched) -> int | None:
    """Workers of the newest group."""
    return next((event["workers"] for event in reversed(watched.events) if event["event"] == "group"), None)
