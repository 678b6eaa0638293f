"""Every benchmark that has a mark to reach: `make bench`.

    python benchmarks/run_all.py [--only NAME ..] [--rounds N] [--list]
    python benchmarks/run_all.py --write [--section NAME] [--results PATH]

Runs the scripts of BENCHMARKS one after the other, prints a line for each row (name, ratio, spread, reach, ok) and one
for each that this machine cannot measure, with the reason, and writes benchmarks/results.json. Exit code 1 where a row
falls short or a script fails. With `--only`, rows of other scripts stay in results.json as they are.

`--write` runs nothing: it puts results.json into its section of BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rows import PEERS, ROOT, line, mark, number

FOLDER = ROOT / "benchmarks"
RESULTS = FOLDER / "results.json"
PAGE = ROOT / "BENCHMARKS.md"
LIMIT_S = 900  # of a script, where it does not say otherwise


@dataclass(frozen=True)
class Benchmark:
    """A script and what it needs: modules of the peers' environment, cores, a CUDA device. limit_s: seconds that
    it may take."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    cores: int = 1
    cuda: bool = False
    limit_s: int = LIMIT_S

    @property
    def command(self) -> str:
        return " ".join(["python", f"benchmarks/{self.script}", *self.arguments])


BENCHMARKS = (
    Benchmark("start-up", "start_up.py"),
    Benchmark("ingest", "ingest.py", peers=("duckdb",)),
    Benchmark("swing", "swing.py", peers=("recfarm",)),
    Benchmark("replay", "replay.py", peers=("duckdb",)),
    Benchmark("nearest", "nearest.py"),
    Benchmark("catr", "catr_scoring.py"),
    Benchmark("training-step", "training_step.py", ("--modes", "step"), cores=2),
    Benchmark("training-run", "training_run.py", peers=("recbole",), cores=2, limit_s=2400),
    Benchmark("gpu", "gpu.py", ("--device", "cuda", "--compile"), cuda=True, limit_s=1800),
)


def hardware() -> str:
    """The processor, its cores that may be used, and the memory."""
    model = next((text.split(":", 1)[1].strip() for text in Path("/proc/cpuinfo").read_text().splitlines()
                  if text.startswith("model name")), platform.processor())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {gib:.0f} GiB"


def commit() -> str:
    """The commit, with `+` where tracked files differ from it; `unknown` outside a checkout."""
    try:
        sha, changed = (subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout
                        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha.strip() + ("+" if changed.strip() else "")


def lacking(benchmark: Benchmark) -> str | None:
    """Why it cannot run here; None where it can."""
    if not (FOLDER / benchmark.script).exists():
        return f"benchmarks/{benchmark.script} is not there"
    have = len(os.sched_getaffinity(0))
    if have < benchmark.cores:
        return f"needs {benchmark.cores} cores, has {have}"
    python = PEERS / "bin" / "python"
    for module in benchmark.peers:
        find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if not python.exists() or subprocess.run([python, "-c", find], capture_output=True).returncode:
            return f"{module} is not in benchmarks/.venv-peers (make peers)"
    if benchmark.cuda:
        try:
            found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        except OSError:
            found = ""
        if "GPU" not in found:
            return "needs a CUDA device"
    return None


def run(benchmark: Benchmark, rounds: int | None) -> tuple[list[dict], list[dict], str | None]:
    """A script's rows, what it could not measure, and what went wrong, if anything did."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path, log = Path(name) / "rows.json", Path(name) / "log"
        command = [sys.executable, str(FOLDER / benchmark.script), *benchmark.arguments, "--json", str(path),
                   *(["--rounds", str(rounds)] if rounds else [])]
        with open(log, "wb") as out:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=benchmark.limit_s,
                    env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
            except subprocess.TimeoutExpired:
                code = None
        if code not in (0, 1) or not path.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            ended = f"took more than {benchmark.limit_s} s" if code is None else f"ended with {code}"
            return [], [], f"{benchmark.command} {ended}:\n{tail}"
        found = json.loads(path.read_text(encoding="utf-8"))
    stamp = {"benchmark": benchmark.name, "command": benchmark.command, "commit": commit(),
             "date": datetime.now(UTC).date().isoformat(), "load": found["load"][0]}
    return [{**one, **stamp} for one in found["rows"]], found.get("not_run", []), None


def run_all(chosen: Sequence[Benchmark], rounds: int | None) -> tuple[list[dict], list[dict], bool]:
    """All rows, all that did not run, and whether a script failed; each is told as it comes."""
    rows: list[dict] = []
    not_run: list[dict] = []
    failed = False
    for benchmark in chosen:
        why = lacking(benchmark)
        if why is None:
            started = time.monotonic()
            found, left_out, why = run(benchmark, rounds)
            failed |= why is not None
            for one in found:
                print(line(one), flush=True)
            rows += found
            not_run += [{"benchmark": benchmark.name, **one} for one in left_out]
            for one in left_out:
                print(f"not run: {one['name']}: {one['why']}", flush=True)
            print(f"    {benchmark.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        if why is not None:
            print(f"not run: {benchmark.name}: {why}", flush=True)
            not_run.append({"benchmark": benchmark.name, "name": benchmark.name, "why": why.split("\n")[0]})
    return rows, not_run, failed


def merged(before: Mapping[str, Any], now: Mapping[str, Any], chosen: Sequence[Benchmark]) -> dict[str, Any]:
    """`now`, with the rows of `before` whose script was not run again, in the order of BENCHMARKS."""
    again = {one.name for one in chosen}
    order = {one.name: at for at, one in enumerate(BENCHMARKS)}
    return {**now, **{key: sorted([one for one in before.get(key, []) if one["benchmark"] not in again] + now[key],
                                  key=lambda one: order.get(one["benchmark"], len(order)))
                      for key in ("rows", "not_run")}}


# ----------------------------------------------------------------------------------------------------------- the page

def hardware_line(results: Mapping[str, Any]) -> str:
    return f"Hardware: {results['hardware']}; load is that of the machine as a row's script ended."


def kept_rows(page: str, section: str, results: Mapping[str, Any]) -> list[str]:
    """The lines of a section of the page that the results say nothing of: of other scripts, and what was not run.

    Raises:
        SystemExit: they are of another machine, beside which the results cannot stand.
    """
    lines = page.partition(f"<!-- {section}: begin -->")[2].partition(f"<!-- {section}: end -->")[0].splitlines()
    said = {one["command"] for one in results["rows"]}
    kept = [text for text in lines if text.endswith(" |") and "`" in text and text.split("`")[1] not in said]
    told = tuple(f"- {one[key]}: " for one in [*results["rows"], *results["not_run"]] for key in ("name", "benchmark"))
    kept += [text for text in lines if text.startswith("- ") and not text.startswith(told)]
    if kept and hardware_line(results) not in lines:
        raise SystemExit(f"{PAGE.name}: its section {section} has rows of another machine that these results do not "
                         f"measure ({kept[0].split('|')[1].strip()}, ..); run all of them, or give another --section")
    return kept


def table(results: Mapping[str, Any], kept: Sequence[str] = ()) -> Iterator[str]:
    """The lines of a section of BENCHMARKS.md, in the order of BENCHMARKS.

    Args:
        kept: of kept_rows.
    """
    yield hardware_line(results)
    yield ""
    yield "| row | ratio | least, most | reach | | sizes | command | commit, day, load |"
    yield "|---|---|---|---|---|---|---|---|"
    order = {one.command: at for at, one in enumerate(BENCHMARKS)}
    lines = [*(text for text in kept if text.startswith("|")), *map(table_line, results["rows"])]
    yield from sorted(lines, key=lambda text: order.get(text.split("`")[1], len(order)))
    not_run = [*(text for text in kept if text.startswith("- ")),
               *(f"- {one['name']}: {one['why']}" for one in results["not_run"])]
    if not_run:
        yield from ("", "Not measured here:", *not_run)


def table_line(one: Mapping[str, Any]) -> str:
    low, high = (number(value) for value in one["spread"])
    verdict = "ok" if one["ok"] else "**short**"
    return (f"| {one['name']} | {number(one['ratio'])} | {low}, {high} | {mark(one)} | "
            f"{'' if one['reach'] is None else verdict} | {one.get('sizes', '')} | `{one['command']}` | "
            f"{one['commit']}, {one['date']}, {one['load']:.1f} |")


def written(page: str, section: str, lines: Sequence[str]) -> str:
    """The page with the lines between the marks of a section.

    Raises:
        SystemExit: the page has no such marks.
    """
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"{PAGE.name}: has no section {begin} .. {end}")
    head, rest = page.split(begin)
    return "\n".join([head + begin, *lines, end]) + rest.split(end)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[one.name for one in BENCHMARKS], help="these alone")
    parser.add_argument("--rounds", type=int, help="of every script; each has its own default, 5 or more")
    parser.add_argument("--list", action="store_true", help="say what would run and what not")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="put the results into BENCHMARKS.md")
    parser.add_argument("--section", default="cpu", help="of BENCHMARKS.md")
    arguments = parser.parse_args()
    chosen = [one for one in BENCHMARKS if not arguments.only or one.name in arguments.only]
    if arguments.list:
        for one in chosen:
            print(f"{one.name:<16} {lacking(one) or one.command}")
        return 0
    if arguments.write:
        if not arguments.results.exists():
            raise SystemExit(f"{arguments.results}: not there; run make bench first, then --write")
        results, page = json.loads(arguments.results.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
        kept = kept_rows(page, arguments.section, results)
        PAGE.write_text(written(page, arguments.section, list(table(results, kept))), encoding="utf-8")
        return 0
    rows, not_run, failed = run_all(chosen, arguments.rounds)
    results = {"hardware": hardware(), "commit": commit(), "rows": rows, "not_run": not_run}
    if arguments.only and arguments.results.exists():
        results = merged(json.loads(arguments.results.read_text(encoding="utf-8")), results, chosen)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if failed or not all(one["ok"] for one in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
