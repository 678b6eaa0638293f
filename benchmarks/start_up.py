"""How long a command takes to begin: `watchtower --help`, and a smoke run until its first training step.

    python benchmarks/start_up.py [--runs 3] [--rounds 7] [--json PATH]

`--help` stands beside `import torch`, which it does not need. The smoke run is configs/smoke.yaml with nothing done
yet; its first step is the first `train_step` of events.jsonl, which is written after five of them. All in seconds by
the wall clock, so that a busy machine shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import ROOT, alternating, over, parser, report, row

HELP_S, FIRST_STEP_S, GIVE_UP_S = 0.5, 25.0, 300.0
WATCHTOWER = (sys.executable, "-m", "launch.cli")


def seconds_of(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step_s(folder: Path) -> float:
    """From the command to the first line of a training step; the run is stopped then.

    Raises:
        RuntimeError: the run ended without one, or took too long.
    """
    began = time.perf_counter()
    with open(folder / "log", "wb") as log:
        run = subprocess.Popen([*WATCHTOWER, "run", "configs/smoke.yaml", f"run_dir={folder / 'run'}"], cwd=ROOT,
                               stdout=log, stderr=subprocess.STDOUT)
    try:
        while (took := time.perf_counter() - began) < GIVE_UP_S:
            if _has_step(folder / "run" / "events.jsonl"):
                return took
            if run.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"no training step after {took:.0f} s:\n{(folder / 'log').read_text(errors='replace')}")
    finally:
        run.terminate()  # it takes its workers along
        try:
            run.wait(timeout=60)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()


def _has_step(path: Path) -> bool:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    for text in lines:
        try:
            if json.loads(text).get("event") == "train_step":
                return True
        except json.JSONDecodeError:
            return False  # the line is being written
    return False


def main() -> int:
    made = parser(__doc__, rounds=7)
    made.add_argument("--runs", type=int, default=5, help="smoke runs; 0 leaves them out")
    arguments = made.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    found = alternating(arguments.rounds, {
        "help": lambda: seconds_of(*WATCHTOWER, "--help"),
        "torch": lambda: seconds_of(sys.executable, "-c", "import torch")})
    rows = [row("watchtower --help, seconds", found["help"], HELP_S, "lower"),
            row("watchtower --help / import torch", over(found["help"], found["torch"]), None, "lower")]
    if arguments.runs:
        steps = []
        for _ in range(arguments.runs):
            with tempfile.TemporaryDirectory(prefix="start-up-") as name:
                steps.append(first_step_s(Path(name)))
        rows.append(row("smoke run, command to first step, seconds", steps, FIRST_STEP_S, "lower"))
    return report(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
