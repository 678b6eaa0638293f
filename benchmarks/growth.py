"""How the cost of each stage grows with the logs: time and memory at 1x, 4x and 16x, and the exponent fitted to them.

    python benchmarks/growth.py [--rows 200000] [--times 1 4 16] [--stages NAME ..] [--folder runs/growth] [--json PATH]
    python benchmarks/growth.py --write [--folder runs/growth]

A synthetic log of `rows` views (users of 50 views, an item for every 45 views, as in CAPTS's industrial log) is written
and goes through every stage. Each stage of each size is a process of its own, which first does the stage on a tiny log
(imports, compiled kernels) and is then measured once, with all cores: wall time, CPU time, and the most memory above
what the process held when it began. Logs, run folders and what was measured stay in `--folder`, of which nothing
is done twice: an interrupted run goes on. 50 million rows: --rows 3125000.

    synth        watchtower's world, one process         replay      labels of a request a user
    ingest       sorted sequences                        epoch       one epoch of the transformer, one worker
    statistics   counts of all items                     index       all items encoded, a Flat index built and measured
    channels     swing, embedding (svd), content         routing     selectors judged on the test requests

The exponent b is the slope of log time (or memory) over log rows: 1 is linear. The last one is that of the two largest
sizes alone, where what is fixed counts least; the figures for the papers' sizes carry the largest size on by it.
`--write` puts both tables into docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import ROOT, PeakMemory, cores

PAGE = ROOT / "docs" / "scale.md"
VIEWS_PER_USER, ROWS_PER_ITEM, DAYS = 50, 45, 14
TINY_ROWS, ROWS_PER_SHARD, SIZE = 10_000, 50_000, "size.json"
# What a size has to become: (name, views). CAPTS, section 4.1.1; CRM, section 4.
PAPERS = (("CAPTS, 1.23 billion views", 1.23e9), ("CRM, 50 billion logs a day", 50e9))
HOLDS_MIB = 1.0  # memory below this is noise, of which no exponent is fitted
TRAIN_CUT, TEST_CUT = "2026-01-11", "2026-01-14"
# All that need no router: item-value takes one's fit.
SELECTORS = ("recent", "watch-time-top", "tag-top", "ltv", "nic", "pdn", "lic", "random", "past-replay", "oracle",
             "popular")


# --------------------------------------------------------------------------------------------------------- the figures

def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """b of cost = a * size^b, by least squares on the logarithms.

    Raises:
        ValueError: fewer than two sizes, or one that is not above 0.
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError(f"no exponent of the costs {list(costs)} at the sizes {list(sizes)}")
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return (sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
            / sum((a - mean_x) ** 2 for a in x))


def carried(sizes: Sequence[float], costs: Sequence[float], to: float) -> float:
    """The cost at the size `to`, from the largest size on by the exponent of the two largest ones, which counts as at
    least 1: no stage reads more rows in less time."""
    order = sorted(range(len(sizes)), key=lambda at: sizes[at])[-2:]
    last = order[-1]
    rises = max(1.0, exponent([sizes[at] for at in order], [costs[at] for at in order]))
    return costs[last] * (to / sizes[last]) ** rises


# ----------------------------------------------------------------------------------------------------------- the stages

def size_of(folder: Path) -> int:
    """Views that its log is to have."""
    return json.loads((folder / SIZE).read_text(encoding="utf-8"))["rows"]


def config_of(folder: Path):
    """Shards as large in every size, as a log that grows would have them."""
    from worlds import world_config

    return world_config(
        folder, data={"shards": max(1, size_of(folder) // ROWS_PER_SHARD)}, seeds=[0],
        split={"validation_days": 1, "test_days": 1},
        crm={"models": [{"name": "transformer", "tower": "decision_transformer"}]},
        train={"workers": 1, "threads_per_worker": len(cores()), "device": "cpu", "epochs": 1, "batch_rows": 128,
               "checkpoint_every_steps": None, "log_every_steps": 50},
        evaluate={"validation_queries": 100}, index={"threads": len(cores()), "device": "cpu"},
        replay={"requests": {"train_cuts": [{"at": TRAIN_CUT, "until": TEST_CUT}], "test_cuts": [{"at": TEST_CUT}],
                             "test_min_triggers": 10}},
        routing={"test_users": {"share": 0.3, "seed": 0}, "bootstrap": 100, "selectors": list(SELECTORS)})


def synth(folder: Path) -> None:
    from worlds import make_world

    rows = size_of(folder)
    make_world(folder, users=rows // VIEWS_PER_USER, items=rows // ROWS_PER_ITEM, views_per_user=VIEWS_PER_USER,
               days=DAYS, seed=0)


def ingested(folder: Path) -> None:
    from launch.ingest import SerialExecutor, ingest

    ingest(config_of(folder).data, folder / "run", SerialExecutor(len(cores())))


def statistics(folder: Path) -> None:
    from launch.channels import Work, publish_statistics
    from trainer.channels import watermarks

    work = Work(config_of(folder), folder / "run", folder / "run", len(cores()))
    for watermark_ms in watermarks(work.config, work.open().manifest):
        publish_statistics(work, watermark_ms)


def channels(folder: Path) -> None:
    from launch.channels import SerialExecutor, build_channels

    build_channels(config_of(folder), folder / "run", SerialExecutor(len(cores())), say=lambda line: None)


def replayed(folder: Path) -> None:
    from launch.ingest import SerialExecutor
    from launch.replay import make_labels

    make_labels(config_of(folder), folder / "run", SerialExecutor(len(cores())))


def epoch(folder: Path) -> None:
    from trainer.loop import train

    task, workers = _task(folder)
    train(task, workers, lambda *_, **__: None)


def index(folder: Path) -> None:
    from trainer import checkpoint
    from trainer.loop import load_towers
    from trainer.rebuild import encode_items, publish_index

    task, workers = _task(folder)
    data, watermark_ms = task.data, task.data.slices[-1][1]
    forward = load_towers(task, checkpoint.checkpoints(task.folder)[-1], workers)
    rows = data.index_rows(watermark_ms)
    vectors_ND = encode_items(forward, data.features_until(watermark_ms), rows, workers)
    publish_index(folder / "run" / "rebuilt", vectors_ND, data.catalogue.item_id_N[rows], data.config.index, epoch=1,
                  step=1, watermark_ms=int(watermark_ms), sample_QD=vectors_ND[:data.config.index.recall_queries],
                  provenance={})


def routing(folder: Path) -> None:
    from launch.routing import SerialExecutor, evaluate_routing

    evaluate_routing(config_of(folder), folder / "run", SerialExecutor())


def _task(folder: Path):
    """The CRM task of the run, and this process as its one worker."""
    import torch
    import torch.distributed as dist

    from trainer.crm_data import CrmData
    from trainer.crm_task import CrmTask
    from trainer.workers import Workers

    torch.set_num_threads(len(cores()))
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    data = CrmData(config_of(folder), folder / "run")
    return CrmTask(data, data.config.crm.models[0], 0), Workers.joined(torch.device("cpu"))


# name: what it does, and what it leaves (removed before it is done again), below the folder of the size.
STAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "synth": (synth, ("world",)), "ingest": (ingested, ("run/sequences", "run/quarantine")),
    "statistics": (statistics, ("run/channels/item-statistics",)),
    "channels": (channels, ("run/channels/swing", "run/channels/embedding", "run/channels/content")),
    "replay": (replayed, ("run/labels",)), "epoch": (epoch, ("run/checkpoints", "run/indexes")),
    "index": (index, ("run/rebuilt",)), "routing": (routing, ("run/routing", "run/evaluation/routing"))}


def stage_once(name: str, folder: Path) -> None:
    act, leaves = STAGES[name]
    for left in leaves:
        shutil.rmtree(folder / left, ignore_errors=True)
    act(folder)


def measured(name: str, folder: Path, tiny: Path) -> dict[str, float]:
    """In a process of its own: seconds, CPU seconds and MiB of one stage of one size."""
    if folder != tiny:
        stage_once(name, tiny)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with PeakMemory() as memory:
        began = time.perf_counter()
        stage_once(name, folder)
        seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_s": cpu_s, "mib": max(memory.above, 0.0), "peak_mib": memory.peak}


# --------------------------------------------------------------------------------------------------------------- a run

class Figures:
    """What was measured, in a file: {stage: {rows: {seconds, cpu_s, mib, peak_mib}}}, written whole after each."""

    def __init__(self, path: Path, spec: Mapping[str, Any]):
        self.path, self.spec = path, dict(spec)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if kept and kept["spec"] != self.spec:
            raise SystemExit(f"{path} is of {kept['spec']}, not of {self.spec}; remove its folder, or name another")
        self.stages: dict[str, dict[str, dict[str, float]]] = kept.get("stages", {})
        self.about: dict[str, Any] = kept.get("about", {})

    def add(self, stage: str, rows: int, found: Mapping[str, float], about: Mapping[str, Any]) -> None:
        self.stages.setdefault(stage, {})[str(rows)] = dict(found)
        self.about = dict(about)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps({"spec": self.spec, "about": self.about, "stages": self.stages}, indent=1) + "\n",
                          encoding="utf-8")
        os.replace(beside, self.path)

    def of(self, stage: str) -> tuple[list[int], dict[str, list[float]]]:
        """The sizes, and each figure at them."""
        by_rows = sorted((int(rows), found) for rows, found in self.stages.get(stage, {}).items())
        return [rows for rows, _ in by_rows], {
            key: [found[key] for _, found in by_rows] for key in ("seconds", "cpu_s", "mib", "peak_mib")}


def run(arguments: argparse.Namespace, figures: Figures) -> None:
    """Measure every stage of every size that was not measured yet."""
    from run_all import commit, hardware

    tiny = arguments.folder / "tiny"
    sizes = [TINY_ROWS, *(arguments.rows * times for times in arguments.times)]
    for rows, folder in zip(sizes, [tiny, *(arguments.folder / str(rows) for rows in sizes[1:])], strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SIZE).write_text(json.dumps({"rows": rows}), encoding="utf-8")
        for name in arguments.stages:
            done = figures.stages.get(name, {}) if folder != tiny else _marks(tiny)
            if (str(rows) if folder != tiny else name) in done:
                continue
            answer = subprocess.run(
                [sys.executable, __file__, "--stage", name, "--at", str(folder), "--folder", str(arguments.folder)],
                stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu",
                                                        "OMP_NUM_THREADS": str(len(cores()))})
            if answer.returncode:
                raise SystemExit(f"{name} at {rows:,} rows ended with {answer.returncode}")
            if folder == tiny:
                (tiny / f"{name}.done").touch()
                continue
            found = json.loads(answer.stdout.splitlines()[-1])
            figures.add(name, rows, found, {"hardware": hardware(), "commit": commit(), "load": os.getloadavg()[0]})
            print(f"{name:<12} {rows:>12,} rows {found['seconds']:8.1f} s {found['cpu_s']:8.1f} CPU s "
                  f"{found['mib']:8.0f} MiB", flush=True)


def _marks(tiny: Path) -> set[str]:
    return {path.stem for path in tiny.glob("*.done")}


def stages_of(figures: Figures) -> Iterator[tuple[str, list[int], dict[str, list[float]]]]:
    """The stages of which two sizes are there."""
    for name in STAGES:
        sizes, found = figures.of(name)
        if len(sizes) > 1:
            yield name, sizes, found


def rows_of(figures: Figures) -> list[dict[str, Any]]:
    """As benchmarks/rows.py has them: exponents, without a mark."""
    rows = []
    for name, sizes, found in stages_of(figures):
        fitted = exponent(sizes, found["seconds"])
        rows.append({"name": f"growth: {name}: exponent of its time", "ratio": fitted, "spread": [fitted, fitted],
                     "reach": None, "better": "lower", "ok": True, **found,
                     "sizes": ", ".join(f"{size:,}" for size in sizes) + " rows"})
    return rows


def tables(figures: Figures) -> Iterator[str]:
    """The lines of docs/scale.md."""
    spec, about = figures.spec, figures.about
    yield (f"`python benchmarks/growth.py --rows {spec['rows']} --times {' '.join(map(str, spec['times']))}`, commit "
           f"{about['commit']}, {about['hardware']}, load {about['load']:.1f}, one run of each.")
    yield ""
    all_sizes = [spec["rows"] * times for times in spec["times"]]
    heads = " | ".join(f"{size:,} rows" for size in all_sizes)
    yield f"| stage: seconds (MiB above the start) | {heads} | exponent of time | of the last two | of memory |"
    yield "|---|" + "---|" * (len(all_sizes) + 3)
    for name, sizes, found in stages_of(figures):
        at = dict(zip(sizes, zip(found["seconds"], found["mib"], strict=True), strict=True))
        cells = " | ".join(f"{at[size][0]:.1f} ({at[size][1]:,.0f})" if size in at else "" for size in all_sizes)
        held = f"{exponent(sizes, found['mib']):.2f}" if min(found["mib"]) > HOLDS_MIB else "-"
        yield (f"| {name} | {cells} | {exponent(sizes, found['seconds']):.2f} | "
               f"{exponent(sizes[-2:], found['seconds'][-2:]):.2f} | {held} |")
    yield ""
    yield ("Carried on from the largest size by the exponent of the last two sizes (1 where it is less), in core-hours "
           "of this machine's cores. Nothing of this was measured:")
    yield ""
    yield f"| stage | {' | '.join(name for name, _ in PAPERS)} |"
    yield "|---|" + "---|" * len(PAPERS)
    for name, sizes, found in stages_of(figures):
        hours = " | ".join(f"{carried(sizes, found['cpu_s'], to) / 3600:,.0f}" for _, to in PAPERS)
        yield f"| {name} | {hours} |"


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", type=int, default=200_000, help="views of the smallest log")
    made.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    made.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    made.add_argument("--folder", type=Path, default=ROOT / "runs" / "growth", help="what is kept between runs")
    made.add_argument("--json", type=Path, help="write the rows here")
    made.add_argument("--rounds", type=int, help="for benchmarks/run_all.py; one of each is measured")
    made.add_argument("--write", action="store_true", help="put what was measured into docs/scale.md")
    made.add_argument("--stage", choices=list(STAGES), help="be this stage (the benchmark starts them itself)")
    made.add_argument("--at", type=Path)
    arguments = made.parse_args()
    if arguments.stage:
        print(json.dumps(measured(arguments.stage, arguments.at, arguments.folder / "tiny")))
        return 0
    arguments.folder = arguments.folder.absolute()
    path = arguments.folder / "growth.json"
    if arguments.write:
        kept = json.loads(path.read_text(encoding="utf-8"))
        from run_all import written

        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), "growth", list(tables(Figures(path, kept["spec"])))),
                        encoding="utf-8")
        return 0
    figures = Figures(path, {"rows": arguments.rows, "times": arguments.times})
    run(arguments, figures)
    rows = rows_of(figures)
    for one in rows:
        print(f"{one['name']:<48} {one['ratio']:.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"load": os.getloadavg(), "rounds": 1, "rows": rows}, indent=1) + "\n",
                                  encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
