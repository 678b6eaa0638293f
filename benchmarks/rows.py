"""What a benchmark measures, and how it says so: the rows that `benchmarks/run_all.py` gathers.

A script of this folder takes `--rounds N` and `--json PATH`, prints a line for each row and writes

    {"load": [1, 5 and 15 minutes], "rows": [row, ..], "not_run": [{"name", "why"}, ..]}

A row is {"name", "ratio", "spread": [least, most], "reach", "ok"} and whatever else explains it ("sizes" goes into
BENCHMARKS.md). `ratio` is the median over rounds. `reach` is None where there is no mark; with "better": "lower" the
ratio must not be above it, otherwise not below. `not_run` names what this machine cannot measure, and may be left out.
The exit code is 1 where a row falls short.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / ".venv-peers"
ROUNDS = 5


def parser(documentation: str | None, rounds: int = ROUNDS) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="rounds in which the sides take turns")
    made.add_argument("--json", type=Path, help="write the rows here")
    return made


def row(name: str, ratios: Sequence[float], reach: float | None = None, better: str = "higher", **facts: Any
        ) -> dict[str, Any]:
    """A row of the ratios of each round.

    Raises:
        ValueError: no ratio, or one that is no number above 0; another `better` than higher and lower.
    """
    if not ratios or not all(0 < ratio < float("inf") for ratio in ratios) or better not in ("higher", "lower"):
        raise ValueError(f"{name}: ratios {list(ratios)}, better {better!r}")
    ratio = statistics.median(ratios)
    ok = reach is None or (ratio <= reach if better == "lower" else ratio >= reach)
    return {"name": name, "ratio": ratio, "spread": [min(ratios), max(ratios)], "reach": reach, "better": better,
            "ok": ok, **facts}


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def mark(one: Mapping[str, Any]) -> str:
    """What a row is to reach, for people."""
    if one["reach"] is None:
        return "-"
    return f"{'<=' if one.get('better') == 'lower' else '>='} {number(one['reach'])}"


def line(one: Mapping[str, Any]) -> str:
    """A row on one line: name, ratio, spread, reach, ok."""
    low, high = (number(value) for value in one["spread"])
    return (f"{one['name']:<72} {number(one['ratio']):>8}  [{low}, {high}]  reach {mark(one)}  "
            f"{'ok' if one['ok'] else 'SHORT'}")


def alternating(rounds: int, sides: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each side returned in each round. Every second round goes through the sides the other way, so that a machine
    that slows down or warms up favours none."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for at in range(rounds):
        for name in sides if at % 2 == 0 else reversed(sides):
            found[name].append(sides[name]())
    return found


def over(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def report(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace,
           not_run: Sequence[Mapping[str, str]] = ()) -> int:
    """Print the rows, write them where asked, and return the exit code."""
    for one in rows:
        print(line(one), flush=True)
    for one in not_run:
        print(f"not run: {one['name']}: {one['why']}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"load": os.getloadavg(), "rounds": arguments.rounds, "rows": list(rows),
                                              "not_run": list(not_run)}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(one["ok"] for one in rows) else 1


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


# ------------------------------------------------------------------------------------------------- processes measured

class Process:
    """A side of a benchmark in a process of its own, which answers one JSON line for each that it is sent.

    Args:
        command: what to run; its standard error goes to this process's.
        threads: for OpenMP, BLAS and numba. environment: beside the process's own.
    """

    def __init__(self, command: Sequence[str | Path], threads: int, environment: Mapping[str, str] | None = None):
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
                                "RAYON_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "PYTHONPATH": "", **limits, **(environment or {})})

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            RuntimeError: it ended instead.
        """
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{self._process.args}: ended with {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """The other end of `Process`: answer each line of the standard input until it ends. What else is printed meanwhile
    goes to the standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    for question in sys.stdin:
        print(json.dumps(answer(**json.loads(question))), file=out, flush=True)


class PeakMemory:
    """The most resident memory of this process while the block ran, MiB, as Linux counts it; `above` is how far that
    lay above what the process held when the block began."""

    def __enter__(self) -> PeakMemory:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")  # the high-water mark begins anew
        self.start = _status_mib("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = _status_mib("VmHWM")

    @property
    def above(self) -> float:
        return self.peak - self.start


def _status_mib(name: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(text.split()[1]) for text in status if text.startswith(name + ":")) / 1024
