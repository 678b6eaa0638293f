"""Faults, seeded: the run is killed, cut off, starved and damaged, and must come out as the untouched one did.

    make faults                                   100 kills, and every other group once
    python tests/faults/survive.py --only kills --kills 20 --seed 3 --jobs 1 --folder /tmp/faults

One line a case, one a group, and at the end `survived N of N`; exit code 1 where the two differ. A case that fails
leaves its run folder and what it printed; the others' are removed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import surroundings  # noqa: E402
from damage import KINDS, WAYS, damaged  # noqa: E402
from kills import Outcome, plan, walk  # noqa: E402
from results import Results  # noqa: E402
from tiny_run import TinyRun, end_all, end_on_signals  # noqa: E402

KILLS_A_WALK = 4
MORE_WALKS = 3  # at most, a planned one, where kills found nothing to hit
ROOM = (0.2, 0.5, 0.7, 0.85)  # of what the run needs
AWAY = {"training": lambda watched: watched.stage == "crm" and watched.steps >= 4,
        "replay": lambda watched: watched.stage == "replay"}


@dataclass(frozen=True)
class Case:
    """One case. run: with its folder, the untouched run's results, and its name."""

    name: str
    run: Callable[[Path, Results, str], Outcome]


class Cases:
    """The cases of each group. A case's folder is named after it; only those that fail keep theirs."""

    def __init__(self, folder: Path, seed: int, kills: int):
        self.folder, self.seed, self.kills = folder, seed, kills
        self.reference_dir = folder / "untouched"
        self.reference: Results | None = None
        self.landed = 0  # kills of the group that runs

    def prepare(self) -> None:
        """The untouched run. One that is there from before, of the same code, is taken."""
        code = TinyRun(self.reference_dir).wait()
        if code:
            raise SystemExit(f"the untouched run ended with {code}: {self.reference_dir}.log")
        self.reference = Results(self.reference_dir)

    def folder_of(self, name: str) -> Path:
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.with_name(f"{name}.log").unlink(missing_ok=True)
        return path

    def group(self, name: str) -> Iterable[Case] | str:
        """The cases of a group, or why there is none here."""
        self.landed = 0
        return getattr(self, f"_{name}")()

    def _walks(self, name: str, count: int, number: int) -> Iterator[Case]:
        """Walks until that many kills have landed."""
        for at in range(MORE_WALKS * -(-count // KILLS_A_WALK)):
            missing = count - self.landed
            if missing <= 0:
                return
            kills = plan(self.seed * 1000 + at, min(KILLS_A_WALK, missing), number)
            yield Case(f"{name}-{self.seed}-{at}", partial(walk, kills))

    def _kills(self) -> Iterator[Case]:
        return self._walks("kills", self.kills, signal.SIGKILL)

    def _terms(self) -> Iterator[Case]:
        return self._walks("terms", max(KILLS_A_WALK, self.kills // 10), signal.SIGTERM)

    def _nodes(self) -> list[Case]:
        return [Case("nodes-lost", surroundings.lost_node), Case("nodes-elastic", surroundings.elastic_nodes)]

    def _ranks(self) -> list[Case]:
        return [Case("ranks-slow", surroundings.slow_rank), Case("ranks-raising", surroundings.raising_rank),
                Case("ranks-hung", surroundings.hung_rank)]

    def _disk(self) -> list[Case] | str:
        needed = surroundings.room_of(self.reference_dir)
        return surroundings.can_mount() or [
            Case(f"disk-{share:.0%}".rstrip("%"), partial(surroundings.disk_full, share, needed)) for share in ROOM]

    def _folder(self) -> list[Case] | str:
        return surroundings.can_mount() or [
            Case(f"folder-{name}", partial(surroundings.folder_away, reached)) for name, reached in AWAY.items()]

    def _damage(self) -> list[Case]:
        return [Case(f"damage-{way.__name__}-{kind.name.replace(' ', '-')}",
                     partial(damaged, self.reference_dir, kind, way, self.seed)) for kind in KINDS for way in WAYS]


GROUPS = ("kills", "terms", "nodes", "disk", "damage", "ranks", "folder")


def done(cases: Cases, group: Iterable[Case], only: str, jobs: int) -> Iterator[Outcome]:
    """The outcomes of a group, `jobs` cases at once."""
    waiting: deque[Future[Outcome]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for case in group:
                if only in case.name:
                    waiting.append(pool.submit(case.run, cases.folder_of(case.name), cases.reference, case.name))
                if len(waiting) == jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            end_all()  # the cases' threads wait for these runs, and the pool for the threads
            raise


def report(group: str, outcome: Outcome) -> None:
    facts = f"{outcome.counted} landed, {outcome.starts} starts, {outcome.seconds:.0f} s"
    print(f"{group}  {outcome.name}  {'FAILED' if outcome.wrong else 'ok'}  {facts}  {'; '.join(outcome.where)}",
          flush=True)
    for line in outcome.wrong[:12]:
        print(f"    {line}", flush=True)
    if len(outcome.wrong) > 12:
        print(f"    and {len(outcome.wrong) - 12} more", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups: {', '.join(GROUPS)}")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs in all")
    parser.add_argument("--seed", type=int, default=0, help="of the plan")
    parser.add_argument("--cases", default="", help="only cases whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once")
    parser.add_argument("--folder", type=Path, default=None, help="where the run folders go; default: a new one")
    arguments = parser.parse_args()
    groups = arguments.only.split(",")
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        parser.error(f"no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="watchtower-faults-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    end_on_signals()
    survived = total = 0
    try:
        began = time.monotonic()
        cases = Cases(folder, arguments.seed, arguments.kills)
        cases.prepare()
        print(f"untouched run: {len(cases.reference.losses)} losses, {len(cases.reference.files)} files, "
              f"{time.monotonic() - began:.0f} s ({folder})", flush=True)
        for group in groups:
            found = cases.group(group)
            if isinstance(found, str):
                print(f"{group}: skipped: {found}", flush=True)
                continue
            well = landed = 0
            for outcome in done(cases, found, arguments.cases, arguments.jobs):
                report(group, outcome)
                cases.landed += outcome.counted
                landed += max(outcome.counted, bool(outcome.wrong))
                well += 0 if outcome.wrong else outcome.counted
                if not outcome.wrong:
                    shutil.rmtree(folder / outcome.name, ignore_errors=True)
            print(f"{group}: survived {well} of {landed}", flush=True)
            survived, total = survived + well, total + landed
    finally:
        end_all()
    if survived == total and arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"survived {survived} of {total}", flush=True)
    return 0 if survived == total else 1


if __name__ == "__main__":
    sys.exit(main())
