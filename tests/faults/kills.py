"""Kills that land where they hurt: a walk through a tiny run, shot at by a seeded plan, started again until it is done.

A kill is a moment (what the run must be at), a delay of its own after that, and a victim. It counts if it hit a process
of a run that was going on; where it landed is written down. Each walk ends with exit code 0 and the results of the
untouched run, to the bit.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from reader import Reader
from results import Results
from tiny_run import POLL_S, STANDS_STILL_S, TinyRun, Watched, left_in

ON_RAY = ("driver", "driver", "driver", "task", "task", "raylet", "everything", "gcs")
TRAINING = ("worker", "worker", "worker", "worker", "driver", "driver", "driver", "controller", "everything", "raylet",
            "gcs")
EXPECTED_CODES = {0, 1, 2}  # of a run that lost a process other than the driver


@dataclass(frozen=True)
class Moment:
    """Where a kill waits for a run to come to. reached: of what was read of it. spread_s: of the delay from there on.
    victims: kinds that live then."""

    name: str
    reached: Callable[[Watched], bool]
    spread_s: float
    victims: tuple[str, ...]
    stage: str | None = None


def _appears(pattern: str, stage: str) -> Callable[[Watched], bool]:
    """Something by this name is being written."""
    return lambda watched: watched.stage == stage and any(watched.run_dir.glob(pattern))


def _in(stage: str, steps: int = 0) -> Callable[[Watched], bool]:
    return lambda watched: watched.stage == stage and watched.steps >= steps


# In the order of a run.
MOMENTS = (
    Moment("world", lambda watched: any(watched.run_dir.glob("*world*")), 0.2, ("driver",)),
    Moment("ingest", _in("ingest"), 4.0, ON_RAY, "ingest"),
    Moment("ingest, writing", _appears(".*/sequences/*", "ingest"), 0.05, ON_RAY, "ingest"),
    Moment("start of the workers", _in("crm"), 10.0, ("driver", "controller", "raylet", "gcs", "everything"), "crm"),
    Moment("training", _in("crm", 1), 3.0, TRAINING, "crm"),
    Moment("save", _appears("checkpoints/*/*/.*", "crm"), 0.03, TRAINING, "crm"),
    Moment("publish", _appears("indexes/*/*/.*", "crm"), 0.03, TRAINING, "crm"),
    Moment("evaluation", _appears("evaluation/*/.*", "crm"), 0.03, TRAINING, "crm"),
    Moment("channels", _in("channels"), 6.0, ON_RAY, "channels"),
    Moment("publish of a channel", _appears("channels/*/.*", "channels"), 0.03, ON_RAY, "channels"),
    Moment("replay", _in("replay"), 4.0, ON_RAY, "replay"),
    Moment("replay, writing", _appears(".replay/*.json", "replay"), 0.2, ON_RAY, "replay"),
    Moment("router", _in("router", 1), 1.0, TRAINING, "router"),
    Moment("save of the router", _appears("checkpoints/capts/*/.*", "router"), 0.03, TRAINING, "router"),
    Moment("routing", _in("routing"), 3.0, ON_RAY, "routing"),
    Moment("report", _in("report"), 0.1, ("driver",), "report"),
)
BY_NAME = {moment.name: moment for moment in MOMENTS}


@dataclass(frozen=True)
class Kill:
    moment: str
    victim: str
    delay_s: float
    number: int = signal.SIGKILL

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name} to {self.victim} at {self.moment}"


def plan(seed: int, count: int, number: int = signal.SIGKILL) -> list[Kill]:
    """`count` kills in the order of a run; the same seed gives the same ones."""
    rng = random.Random(seed)
    found = []
    for at in sorted(rng.choices(range(len(MOMENTS)), k=count)):
        moment = MOMENTS[at]
        victim = "driver" if number == signal.SIGTERM else rng.choice(moment.victims)
        found.append(Kill(moment.name, victim, rng.uniform(0, moment.spread_s), number))
    return found


@dataclass
class Outcome:
    """What became of a case. wrong: in words, the empty list if all is well. counted: faults that landed. where:
    what and where they were."""

    name: str
    wrong: list[str] = field(default_factory=list)
    counted: int = 0
    where: list[str] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0


def walk(kills: list[Kill], run_dir: Path, reference: Results, name: str, overrides: tuple[str, ...] = ()) -> Outcome:
    """A run from where its folder stands to exit code 0, shot at by `kills` in their order."""
    began, outcome, waiting = time.monotonic(), Outcome(name), list(kills)
    reader = Reader(run_dir)
    reader.start()
    runs: list[TinyRun] = []
    watched = Watched(run_dir)
    try:
        while True:
            if outcome.starts > len(kills) + 4:
                outcome.wrong.append("does not come to an end")
                break
            watched.again()
            run = TinyRun(run_dir, *overrides)
            runs.append(run)
            outcome.starts += 1
            hit = _shoot(run, watched, waiting, outcome)
            code = run.wait()
            if _ended_well(run, code, hit, outcome):
                break
    except Exception as error:
        outcome.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        for run in runs:
            outcome.wrong += [f"still there: {one}" for one in run.left()]
            run.end()
        reader.stop()
    outcome.wrong += [f"half published: {one}" for one in reader.torn]
    if not outcome.wrong:
        outcome.wrong += [f"left behind: {one}" for one in left_in(run_dir)]
        outcome.wrong += [f"left behind: {folder}" for run in runs for folder in run.ray_folders
                          if Path(folder).exists() and run.process.returncode != 1]
        outcome.wrong += reference.differences(Results(run_dir))
    outcome.seconds = time.monotonic() - began
    return outcome


def _ended_well(run: TinyRun, code: int, hit: list[Kill], outcome: Outcome) -> bool:
    """Whether the walk is over; what is wrong with how this start ended is noted."""
    drivers = [kill for kill in hit if kill.victim in ("driver", "everything")]
    if "Traceback (most recent call last)" in run.output:
        outcome.wrong.append(f"a traceback: {run.output[-700:]}")
        return True
    if code == 0:
        return True
    if drivers and drivers[-1].number == signal.SIGKILL and code == -signal.SIGKILL:
        return False
    if drivers and drivers[-1].number == signal.SIGTERM:
        if code != 128 + signal.SIGTERM:
            outcome.wrong.append(f"exit code {code} after SIGTERM: {run.output[-500:]}")
        return code != 128 + signal.SIGTERM
    if hit and code in EXPECTED_CODES:
        outcome.where[-1] += f" (exit {code})"
        return False
    outcome.wrong.append(f"exit code {code} after {', '.join(map(str, hit)) or 'nothing'}: {run.output[-700:]}")
    return True


def _shoot(run: TinyRun, watched: Watched, waiting: list[Kill], outcome: Outcome) -> list[Kill]:
    """Takes kills off the list and lets them happen, until one ends the driver, the run ends, or none is left."""
    hit: list[Kill] = []
    while waiting and run.is_running():
        kill = waiting.pop(0)
        if not _comes_to(run, watched, kill):
            if not run.is_running():
                waiting.insert(0, kill)  # the process that it was meant for was ended by the kill before
            continue
        landed = _strike(run, kill)
        if landed is None:
            continue
        hit.append(kill)
        watched.read()
        outcome.counted += 1
        outcome.where.append(f"{kill.victim} at {kill.moment} ({watched.last})")
        if kill.victim in ("driver", "everything"):
            break
    return hit


def _comes_to(run: TinyRun, watched: Watched, kill: Kill) -> bool:
    """Waits for the moment and the delay; False where the run ended first or has passed the moment."""
    moment, moved, last = BY_NAME[kill.moment], time.monotonic(), None
    while run.is_running():
        watched.read()
        if moment.reached(watched):
            time.sleep(kill.delay_s)
            return run.is_running()
        if _has_passed(watched, moment):
            return False
        now = run.progress()
        if now != last:
            moved, last = time.monotonic(), now
        if time.monotonic() - moved > STANDS_STILL_S:
            return False  # `wait` tells that it hangs
        time.sleep(POLL_S)
    return False


def _has_passed(watched: Watched, moment: Moment) -> bool:
    """Whether the run has its moment behind it: that stage is done, or a later one runs."""
    if moment.stage is None:
        return watched.stage is not None
    order = [m.stage for m in MOMENTS]
    return watched.stage in order and order.index(watched.stage) > order.index(moment.stage)


def _strike(run: TinyRun, kill: Kill) -> str | None:
    """Sends the signal; the victim in words, None where there was none."""
    victims = run.victims(kill.victim)
    if not victims:
        return None
    if kill.victim not in ("everything",):
        victims = [random.Random(str(kill)).choice(victims)]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(kill.number)
    return kill.victim
