"""Replay (VAM) against DuckDB's SQL join and pure Python sets: who would have brought back what was watched.

    python benchmarks/replay.py [--users N] [--rounds 5] [--json PATH]

A request every 10 effective views with up to 100 triggers, three channels (swing, embedding, content) of top-50 lists,
a future of 100 views. Ours goes from the sequences on disk to the labels on disk, in one process with a thread a core
(launch.replay.make_labels): requests, forward values, uniqueness, scales, labels, checksums. DuckDB goes from the same
events, numbered, and the requests (it is spared finding those) in Parquet to the same columns in Parquet, in one query.
Python sets take some of the requests, with triggers and futures at hand, and keep their results in memory. All are
checked to find the same forward values, to the millisecond, and the first two the same labels and uniqueness.

    speed: over DuckDB; over Python (values a second; no mark); million (request, trigger, channel) values a second of
        the replay alone, which leaves forward values, uniqueness and counts on disk, and to the labels (no mark)
    memory: resident GB of the process at its highest, everything included
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import PEERS, ROOT, PeakMemory, Process, alternating, cores, over, parser, report, row, serve

CHANNELS = ("swing", "embedding", "content")
TRIGGERS, TOP, WINDOW, EVERY = 100, 50, 100, 10
PER_CORE = 7.5  # million values a second: 30 on 4 cores
PYTHON_REQUESTS = 200


def config_of(folder: Path):
    from worlds import world_config

    return world_config(
        folder, split={"validation_days": 1, "test_days": 1}, channels={"names": list(CHANNELS), "top": TOP},
        replay={"window": WINDOW, "requests": {
            "every": EVERY, "per_user": 10**6, "train_days": 20, "triggers": TRIGGERS, "min_triggers": TRIGGERS // 2,
            "test_min_triggers": 1, "test_min_future": 1}},
        routing={"test_users": {"share": 0.05, "seed": 0}})


# ---------------------------------------------------------------------------------------------------------- the sides

def ours(folder: Path, threads: int):
    from launch.ingest import SerialExecutor
    from launch.replay import make_labels

    class Timed(SerialExecutor):
        """Remembers how long each pass took: the first replays, the second writes labels."""

        def each(self, task, pieces):
            began = time.perf_counter()
            super().each(task, pieces)
            self.passes.append(time.perf_counter() - began)

    config = config_of(folder)

    def answer(**_: Any) -> dict[str, Any]:
        shutil.rmtree(folder / "run" / "labels", ignore_errors=True)
        executor = Timed(threads)
        executor.passes = []
        with PeakMemory() as memory:
            began = time.perf_counter()
            found = make_labels(config, folder / "run", executor)
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "replay_seconds": executor.passes[0], "values": found["rows"] * len(CHANNELS),
                "gb": memory.peak * 2**20 / 1e9}

    return answer


def duckdb(folder: Path, threads: int):
    import duckdb as peer

    connection = peer.connect()
    connection.execute(f"SET threads = {threads}")
    events, requests, lists = (f"'{folder}/{name}.parquet'" for name in ("events", "requests", "lists"))
    every = range(len(CHANNELS))
    sums = ", ".join(f"coalesce(sum(watch_ms) FILTER (channel = {c}), 0)::BIGINT AS ms_{c}" for c in every)
    means = ", ".join(f"coalesce(avg(ms_{c}) FILTER (ms_{c} > 0) / 1000, 1) AS scale_{c}" for c in every)
    shares = ", ".join(f"coalesce(max(share) FILTER (channel = {c}), 0)::FLOAT AS share_{c}" for c in every)

    def listed(form: str, kind: str) -> str:
        return f"[{', '.join(form.format(c=c) for c in every)}]::{kind}[{len(CHANNELS)}]"

    # CTEs that are asked for twice are kept, as by a hand that writes them into tables.
    query = f"""
        WITH triggers AS MATERIALIZED (
            SELECT request_id, item, row_number() OVER (PARTITION BY request_id ORDER BY latest DESC) AS position
            FROM (SELECT r.request_id, e.item, max(e.n) AS latest FROM {requests} r
                  JOIN {events} e ON e.user_id = r.user_id AND e.n < r.history_end AND e.n >= r.history_end - {TRIGGERS}
                  WHERE e.item > 0 GROUP BY r.request_id, e.item)),
        future AS (
            SELECT r.request_id, e.item, sum(e.watch_ms) AS watch_ms FROM {requests} r
            JOIN {events} e ON e.user_id = r.user_id AND e.counted >= r.future_begin AND e.counted < r.future_end
            WHERE e.counts GROUP BY r.request_id, e.item),
        hits AS (
            SELECT t.request_id, t.position, l.channel, f.watch_ms FROM triggers t
            JOIN {lists} l ON l.item = t.item
            JOIN future f ON f.request_id = t.request_id AND f.item = l.neighbor),
        sums AS (SELECT request_id, position, {sums} FROM hits GROUP BY request_id, position),
        rewards AS MATERIALIZED (
            SELECT t.request_id, t.position, t.item, {', '.join(f'coalesce(s.ms_{c}, 0) AS ms_{c}' for c in every)}
            FROM triggers t LEFT JOIN sums s USING (request_id, position)),
        scales AS (SELECT {means} FROM rewards),
        lone AS (SELECT item, neighbor, count(*) AS channels FROM {lists} GROUP BY item, neighbor),
        shares AS (
            SELECT item, {shares} FROM (
                SELECT l.item, l.channel, sum((o.channels = 1)::INT) / (count(*) + 1e-6) AS share
                FROM {lists} l JOIN lone o USING (item, neighbor) GROUP BY l.item, l.channel) GROUP BY item)
        SELECT w.request_id, r.user_id, r.time_ms AS request_time_ms, w.item AS trigger_item, w.position,
               {listed('ms_{c} / 1000', 'DOUBLE')} AS reward, {listed('least(ms_{c} / 1000 / scale_{c}, 5)', 'FLOAT')}
               AS intensity, {listed('ms_{c} >= 3000', 'BOOLEAN')} AS label,
               {listed('coalesce(share_{c}, 0)', 'FLOAT')} AS uniqueness
        FROM rewards w JOIN {requests} r USING (request_id) LEFT JOIN shares USING (item), scales"""

    def answer(**_: Any) -> dict[str, Any]:
        began = time.perf_counter()
        connection.execute(f"COPY ({query}) TO '{folder}/duckdb.parquet' (FORMAT parquet)")
        return {"seconds": time.perf_counter() - began}

    return answer


def python_sets(folder: Path, threads: int):
    import pyarrow.parquet as pq

    first = pq.read_table(folder / "python.parquet").column("request_id").to_pylist()
    wanted = set(first)
    lists: dict[tuple[int, int], set[int]] = {}
    for item, channel, neighbor in zip(*pq.read_table(folder / "lists.parquet").to_pydict().values(), strict=True):
        lists.setdefault((item, channel), set()).add(neighbor)
    triggers: dict[int, list[tuple[int, int]]] = {request: [] for request in first}
    for request, position, item in zip(*pq.read_table(folder / "triggers.parquet").to_pydict().values(), strict=True):
        if request in wanted:
            triggers[request].append((position, item))
    views: dict[int, list[tuple[int, int]]] = {request: [] for request in first}
    for request, item, watch_ms in zip(*pq.read_table(folder / "future.parquet").to_pydict().values(), strict=True):
        if request in wanted:
            views[request].append((item, watch_ms))

    def answer(ask: str) -> dict[str, Any]:
        began, found = time.perf_counter(), []
        for request in first:
            watched: dict[int, int] = {}
            for item, watch_ms in views[request]:
                watched[item] = watched.get(item, 0) + watch_ms
            items = set(watched)
            for position, trigger in triggers[request]:
                found.append([request, position, *(sum(watched[v] for v in lists.get((trigger, c), ()) & items)
                                                   if (trigger, c) in lists else 0 for c in range(len(CHANNELS)))])
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "values": len(found) * len(CHANNELS),
                **({"found": found} if ask == "values" else {})}

    return answer


SIDES = {"ours": (sys.executable, ours), "duckdb": (PEERS / "bin" / "python", duckdb),
         "python": (sys.executable, python_sets)}


def started(name: str, folder: Path, threads: int) -> Process:
    path = {"PYTHONPATH": str(ROOT)} if name != "duckdb" else {}
    return Process([SIDES[name][0], __file__, "--side", name, "--folder", folder, "--threads", threads], threads, path)


# ----------------------------------------------------------------------------------------------------------- the data

def make_run(folder: Path, users: int, items: int, views: float, shards: int) -> None:
    """Sequences and a snapshot of each channel, from before the requests."""
    from worlds import make_sequences, make_world

    from trainer.channels import Given, build_channel
    from trainer.co_views import CoViews
    from trainer.neighbors import publish_neighbors
    from trainer.sequences import split_times

    make_world(folder, users=users, items=items, views_per_user=views, views_spread=0.3, days=30, seed=0)
    config = config_of(folder)
    config = config.model_copy(update={"data": config.data.model_copy(update={"shards": shards})})
    store = make_sequences(folder, config)
    watermark_ms = split_times(config, store.manifest).test_start_ms - 21 * 86_400_000
    views = CoViews.build(store, watermark_ms, None)
    given = Given(config.channels, store.catalogue, threads=len(cores()))
    for name in CHANNELS:
        publish_neighbors(folder / "run" / "channels" / name, watermark_ms, build_channel(name, views, given).lists,
                          store.vocabulary, {})


def write_tables(folder: Path) -> dict[str, int]:
    """Triggers, futures and lists as Parquet for the others, and which requests Python takes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trainer.neighbors import ChannelSnapshots
    from trainer.replay import counted_views, future_items, future_range, watch_ms
    from trainer.sequences import SequenceStore
    from trainer.triggers import is_future_view, request_rule, trigger_requests

    config, store = config_of(folder), SequenceStore(folder / "run" / "sequences")
    rule = request_rule(config, store.manifest, "train")
    triggers, futures, requests_all, events, asked = [], [], [], [], []
    for number in range(store.shards):
        shard = store.open(number)
        requests = trigger_requests(shard, number, rule, config)
        counts_E = is_future_view(shard, rule)
        future = future_items(shard, requests, counts_E, WINDOW, config.replay.null_watch_s)
        views = counted_views(shard, counts_E, config.replay.null_watch_s)
        low_R, high_R = future_range(views, requests, WINDOW)
        # Numbers within the shard serve as well as within the user: both sides of a join have the same user.
        asked.append(pa.table({"request_id": requests.request_id_R, "user_id": requests.user_id_R,
                               "time_ms": requests.time_ms_R, "history_end": requests.history_end_R,
                               "future_begin": low_R, "future_end": high_R}))
        events.append(pa.table({
            "user_id": np.repeat(shard.user_id_U, shard.length_U), "n": np.arange(len(counts_E)),
            "counted": views.before_E1[:-1], "counts": counts_E, "item": shard.item_row_E,
            "watch_ms": watch_ms(shard.watch_time_s_E, config.replay.null_watch_s)}))
        triggers.append(pa.table({"request_id": requests.request_id_R[requests.request_T],
                                  "position": requests.position_T, "item": requests.trigger_row_T}))
        futures.append(pa.table({"request_id": np.repeat(requests.request_id_R, np.diff(future.offset_R1)),
                                 "item": future.row_V, "watch_ms": future.watch_ms_V}))
        requests_all.append(requests.request_id_R)
    request_id_R = np.concatenate(requests_all)
    some = np.random.default_rng(0).permutation(request_id_R)[:PYTHON_REQUESTS]
    pq.write_table(pa.table({"request_id": some}), folder / "python.parquet")
    pq.write_table(pa.concat_tables(events), folder / "events.parquet")
    pq.write_table(pa.concat_tables(asked), folder / "requests.parquet")
    pq.write_table(pa.concat_tables(triggers), folder / "triggers.parquet")
    pq.write_table(pa.concat_tables(futures), folder / "future.parquet")
    snapshots = ChannelSnapshots(folder / "run" / "channels", config.channels, store.vocabulary)
    parts = []
    for channel in range(len(CHANNELS)):
        lists = snapshots.lists(channel, 0)
        parts.append(pa.table({"item": np.repeat(np.arange(store.vocabulary.rows), lists.length_N),
                               "channel": np.full(len(lists.neighbor_L), channel), "neighbor": lists.neighbor_L}))
    pq.write_table(pa.concat_tables(parts), folder / "lists.parquet")
    return {"requests": len(request_id_R), "triggers": sum(len(one) for one in triggers),
            "rows": store.manifest["statistics"]["rows"], "neighbors": sum(len(one) for one in parts)}


def check_values(folder: Path, python: list[list[int]]) -> int:
    """How many forward values all three agree on.

    Raises:
        AssertionError: they differ.
    """
    import numpy as np
    import pyarrow.parquet as pq

    def in_order(table):
        order = np.lexsort((table["position"].to_numpy(), table["request_id"].to_numpy()))
        return table.take(order)

    def values(table, name: str) -> np.ndarray:
        lists = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return lists.reshape(-1, len(CHANNELS))

    labels = in_order(pq.read_table(sorted((folder / "run" / "labels").glob("part-*.parquet"))))
    peer = in_order(pq.read_table(folder / "duckdb.parquet"))
    mine = np.column_stack([labels["request_id"].to_numpy(), labels["position"].to_numpy(),
                            np.rint(1000 * values(labels, "reward"))]).astype(np.int64)
    theirs = np.column_stack([peer["request_id"].to_numpy(), peer["position"].to_numpy(),
                              np.rint(1000 * values(peer, "reward"))]).astype(np.int64)
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(values(labels, "label"), values(peer, "label"))
    for name in ("uniqueness", "intensity"):
        np.testing.assert_allclose(values(labels, name), values(peer, name), rtol=1e-6)
    by_key = {tuple(one[:2]): one[2:] for one in mine.tolist()}
    assert python and all(by_key[one[0], one[1]] == one[2:] for one in python)
    assert (mine[:, 2:] > 0).any(axis=0).all(), "a channel without any value"
    return mine[:, 2:].size


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--users", type=int, default=4000)
    made.add_argument("--items", type=int, default=20_000)
    made.add_argument("--views", type=float, default=500, help="views of a user, mean")
    made.add_argument("--shards", type=int, default=8)
    made.add_argument("--side", choices=SIDES, help="be this side (the benchmark starts them itself)")
    made.add_argument("--folder", type=Path)
    made.add_argument("--threads", type=int, default=len(cores()))
    arguments = made.parse_args()
    if arguments.side:
        serve(SIDES[arguments.side][1](arguments.folder, arguments.threads))
        return 0
    threads = arguments.threads
    with tempfile.TemporaryDirectory(prefix="replay-") as name:
        folder = Path(name)
        make_run(folder, arguments.users, arguments.items, arguments.views, arguments.shards)
        facts = write_tables(folder)
        with (started("ours", folder, threads) as one, started("duckdb", folder, threads) as two,
              started("python", folder, 1) as three):
            one.ask(), two.ask()  # kernels are compiled once; files come into the page cache
            checked = check_values(folder, three.ask(ask="values")["found"])
            found = alternating(arguments.rounds, {"ours": lambda: one.ask(), "duckdb": lambda: two.ask(),
                                                   "python": lambda: three.ask(ask="time")})
    seconds = {side: [answer["seconds"] for answer in answers] for side, answers in found.items()}
    speed = [answer["values"] / answer["seconds"] / 1e6 for answer in found["ours"]]
    alone = [answer["values"] / answer["replay_seconds"] / 1e6 for answer in found["ours"]]
    by_python = [answer["values"] / answer["seconds"] / 1e6 for answer in found["python"]]
    sizes = (f"{facts['rows']:,} views, {facts['requests']:,} requests, {facts['triggers']:,} triggers, "
             f"{facts['neighbors']:,} neighbours, {threads} threads")
    rows = [row("replay, to labels on disk: DuckDB's time / ours", over(seconds["duckdb"], seconds["ours"]), 20,
                sizes=sizes, seconds=seconds, values_checked=checked),
            row("replay, to labels on disk: values/s / pure Python sets'", over(speed, by_python), sizes=sizes),
            row(f"replay alone: million values/s ({PER_CORE} a core)", alone, PER_CORE * threads, sizes=sizes),
            row("replay, to labels on disk: million values/s", speed, sizes=sizes),
            row("replay: resident GB of the process", [answer["gb"] for answer in found["ours"]], 2.0, "lower",
                sizes=sizes)]
    return report(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
