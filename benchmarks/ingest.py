"""Ingest against DuckDB's sort: the same rows of the same Parquet files on the same cores.

    python benchmarks/ingest.py [--users N] [--views N] [--rounds 5] [--json PATH]

DuckDB reads the columns that ingest keeps and writes them `ORDER BY user_id, timestamp_ms` to Parquet. Ingest checks
every row on the way, maps items to rows, takes duplicates out, counts statistics, and writes checksummed shards that
are read through a memory map. Each is a process that lives through all rounds; files are in the page cache.

    one core, all cores: ingest in one process, a thread a core (launch.ingest.SerialExecutor)
    Ray Data: the same tasks on a local Ray of all cores, which runs already; no mark
    memory: the most that ingest holds beside what the process held before, of ten times the rows over that of the
    rows; shards and the spill buffer are as large in both, so that this says whether the rows add anything
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rows import PEERS, ROOT, PeakMemory, Process, alternating, cores, over, parser, report, row, serve

COLUMNS = ("user_id", "item_id", "timestamp_ms", "watch_time_s", "duration_s", "effective_view", "long_view")
SHARD_ROWS, BUFFERED_ROWS = 200_000, 400_000  # of the memory rows
FLAT = 1.2


# ---------------------------------------------------------------------------------------------------------- the sides

def ours(threads: int):
    from worlds import world_config

    from launch.ingest import RayExecutor, SerialExecutor, ingest

    def answer(folder: str, executor: str = "serial", rows: int | None = None) -> dict[str, Any]:
        config = world_config(Path(folder), data={"shards": rows and max(2, rows // SHARD_ROWS)})
        made = RayExecutor() if executor == "ray" else SerialExecutor(threads)
        if rows:
            made.buffered_rows = BUFFERED_ROWS
        into = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
        with PeakMemory() as memory:
            began = time.perf_counter()
            summary = ingest(config.data, into, made)
            seconds = time.perf_counter() - began
        shutil.rmtree(into)
        return {"seconds": seconds, "rows": summary.statistics["rows"], "mib": memory.above}

    return answer


def ours_on_ray(threads: int):
    from configs.schema import Config
    from launch.local_ray import start_ray

    held = ExitStack()
    atexit.register(held.close)
    held.enter_context(start_ray(Config()))
    return ours(threads)


def duckdb(threads: int):
    import duckdb as peer

    connection = peer.connect()
    connection.execute(f"SET threads = {threads}")

    def answer(folder: str, **_: Any) -> dict[str, Any]:
        into = Path(folder) / "sorted.parquet"
        began = time.perf_counter()
        done = connection.execute(
            f"COPY (SELECT {', '.join(COLUMNS)} FROM '{folder}/world/logs/*.parquet' ORDER BY user_id, timestamp_ms) "
            f"TO '{into}' (FORMAT parquet)").fetchone()
        return {"seconds": time.perf_counter() - began, "rows": done[0]}

    return answer


SIDES = {"ours": (sys.executable, ours), "ray": (sys.executable, ours_on_ray),
         "duckdb": (PEERS / "bin" / "python", duckdb)}


def started(name: str, threads: int) -> Process:
    path = {"PYTHONPATH": str(ROOT)} if name != "duckdb" else {}
    return Process([SIDES[name][0], __file__, "--side", name, "--threads", threads], threads, path)


# ----------------------------------------------------------------------------------------------------------- the rows

def against_duckdb(folder: Path, small: Path, threads: int, rounds: int, reach: float | None, label: str,
                   side: str = "ours") -> dict[str, Any]:
    used = cores()[:threads]
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, used)  # the processes inherit it
    try:
        with started(side, threads) as one, started("duckdb", threads) as two:
            asked = {"executor": "ray" if side == "ray" else "serial"}
            for process in (one, two):  # imports, and kernels that are compiled once
                process.ask(folder=str(small), **asked)
            found = alternating(rounds, {"ours": lambda: one.ask(folder=str(folder), **asked),
                                         "duckdb": lambda: two.ask(folder=str(folder))})
    finally:
        os.sched_setaffinity(0, before)
    rows = found["ours"][0]["rows"]
    assert all(answer["rows"] == rows for answers in found.values() for answer in answers), found
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in found.items()}
    return row(f"ingest, {label}: rows/s / DuckDB's", over(seconds["duckdb"], seconds["ours"]), reach,
               sizes=f"{rows:,} rows, {threads} threads", seconds=seconds)


def memory_row(rows_of: dict[Path, int], rounds: int) -> dict[str, Any]:
    def peak(folder: Path) -> float:
        with started("ours", 1) as process:  # a fresh process: what an allocator keeps is not counted twice
            return process.ask(folder=str(folder), rows=rows_of[folder])["mib"]

    small, large = rows_of
    mib = alternating(rounds, {"small": lambda: peak(small), "large": lambda: peak(large)})
    return row("ingest: peak memory at 10x the rows / at 1x", over(mib["large"], mib["small"]), FLAT, "lower", mib=mib,
               sizes=f"{rows_of[small]:,} and {rows_of[large]:,} rows, {SHARD_ROWS:,} rows a shard, "
                     f"{BUFFERED_ROWS:,} buffered")


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--users", type=int, default=40_000)
    made.add_argument("--items", type=int, default=50_000)
    made.add_argument("--views", type=float, default=50)
    made.add_argument("--memory-users", type=int, default=16_000, help="of the 1x rows")
    made.add_argument("--side", choices=SIDES, help="be this side (the benchmark starts them itself)")
    made.add_argument("--threads", type=int)
    arguments = made.parse_args()
    if arguments.side:
        serve(SIDES[arguments.side][1](arguments.threads))
        return 0
    from worlds import make_world

    with tempfile.TemporaryDirectory(prefix="ingest-") as name:
        folder, small, one, ten = (Path(name) / part for part in ("world", "small", "one", "ten"))
        make_world(folder, users=arguments.users, items=arguments.items, views_per_user=arguments.views, seed=0)
        make_world(small, users=200, items=arguments.items, views_per_user=20, seed=0)
        every = len(cores())
        rows = [against_duckdb(folder, small, 1, arguments.rounds, 0.8, "one core")]
        if every > 1:
            rows.append(against_duckdb(folder, small, every, arguments.rounds, 0.8, f"{every} cores"))
        rows.append(against_duckdb(folder, small, every, arguments.rounds, None, f"Ray Data, {every} cores", "ray"))
        counted = {}
        for place, times in ((one, 1), (ten, 10)):
            made = make_world(place, users=times * arguments.memory_users, items=arguments.items,
                              views_per_user=arguments.views, seed=0)
            counted[place] = made.rows
        rows.append(memory_row(counted, arguments.rounds))
    return report(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
