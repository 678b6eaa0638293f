"""How fast a training step is: the real parts against plain PyTorch, and several workers against one.

    python benchmarks/training_step.py [--towers dnn decision_transformer] [--windows 64] [--rounds 7] [--json PATH]

(a) One worker (TorchRec, DeepSpeed, a process group of one) against `tests/two_process/plain_reference.py`, on the same
core with the same batches, towers and optimizers: with dense gradients of the tables, as nn.Embedding has them, and
with sparse ones and an optimizer of its own for them, which is as fast as plain PyTorch gets. (b) Two workers, and four
where there are as many cores, one thread on a core each, against one worker on one of these cores: weak scaling, as
many windows a worker, as the efficiency: the speed over that of one worker times the workers. Weak scaling is as much
work for each, so a row has as many negatives (crm.negative_groups: as many as workers); with the negatives of all, the
default, it has twice or four times as many. `same batch` has one global batch for both, which is what changing
train.workers does. Each as `step` (the batch is there) and as `loop` (batches made on the prefetch thread of the same
core).

All processes live side by side and take turns, so that a busy machine disturbs them alike; a row is the median over
rounds of the ratio of targets a second. `cpu` is the same ratio by CPU seconds of the busiest process: what is left
when nobody else uses the cores, without the waiting for each other. Sizes are those of configs/kuairand.yaml on a
synthetic world made on the fly. Exit code 1 where a ratio falls short.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

from rows import ROOT, cores, parser, report, row

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "two_process")]

# Windows a worker. From the environment, because every spawned process reads this file anew (--windows sets it).
WINDOWS = int(os.environ.get("WATCHTOWER_BENCH_WINDOWS", "64"))
# What runs: windows of a global batch, workers, and groups of negatives.
RUNNERS = {"dense": (WINDOWS, 1, 1), "sparse": (WINDOWS, 1, 1), "one": (WINDOWS, 1, 1),
           "one_large": (2 * WINDOWS, 1, 1), "two": (2 * WINDOWS, 2, 2), "two_whole": (2 * WINDOWS, 2, 1),
           "four": (4 * WINDOWS, 4, 4), "four_whole": (4 * WINDOWS, 4, 1)}
PLAIN = ("dense", "sparse")
# name of the ratio: who, against whom, over how many times its speed, what to reach.
RATIOS = {"one worker / plain PyTorch, dense embeddings": ("one", "dense", 1, 1.0),
          "one worker / plain PyTorch, sparse gradients": ("one", "sparse", 1, 0.9),
          "two workers, weak scaling efficiency": ("two", "one", 2, 0.9),
          "four workers, weak scaling efficiency": ("four", "one", 4, 0.8),
          "two workers, negatives of both, efficiency": ("two_whole", "one", 2, None),
          "four workers, negatives of all, efficiency": ("four_whole", "one", 4, None),
          "two workers / one worker, same batch": ("two_whole", "one_large", 1, None)}


def run_config(folder: Path, tower: str, batch_rows: int, workers: int, negative_groups: int = 1):
    from configs.schema import Config

    return Config.model_validate({
        "data": {"logs": str(folder / "world" / "logs"), "items": str(folder / "world" / "items.parquet"),
                 "target": {"column": "long_view"}, "effective_view": {"column": "effective_view"}},
        "split": {"validation_days": 1, "test_days": 1},
        "crm": {"models": [{"name": tower, "tower": tower}], "tower": {"dim": 64, "history": 32},
                "tables": {"dim": 64}, "negative_groups": negative_groups},
        "train": {"workers": workers, "batch_rows": batch_rows, "threads_per_worker": 1, "device": "cpu"}})


def make_world(folder: Path) -> None:
    """Sequences about as long as those of the KuaiRand part: 14 targets a window, 7,500 items."""
    from launch.ingest import SerialExecutor, ingest
    from trainer.world import WorldSpec, write_world

    write_world(folder / "world", WorldSpec(users=4000, items=7500, views_per_user=50, days=14, seed=0), processes=1)
    ingest(run_config(folder, "dnn", WINDOWS, 1).data, folder / "run", SerialExecutor())


def serve(pipe, kind: str, tower: str, rank: int, store: str, folder: Path, core: int | None, steps: int) -> None:
    """A process of the benchmark: builds its model, then runs what the pipe asks for: (wall, cpu, targets)."""
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        measure = _runner(kind, tower, rank, store, folder, steps)
        pipe.send("ready")
        while (mode := pipe.recv()) is not None:
            pipe.send(measure(mode))
    except EOFError:
        pass
    except BaseException:
        pipe.send(traceback.format_exc())


def _runner(kind, tower, rank, store, folder, steps):
    import numpy as np
    import torch

    from trainer.batches import Prefetched
    from trainer.crm_data import CrmData

    torch.set_num_threads(1)
    batch_rows, workers, negative_groups = RUNNERS[kind]
    config = run_config(folder, tower, batch_rows, workers, negative_groups)
    data, model = CrmData(config, folder / "run"), config.crm.models[0]
    collation = data.collation(model, training=True)

    def made():
        for epoch in itertools.count():
            plan = data.plan(model, 0, epoch, data.slices[0])
            for number, rows in enumerate(plan.batches(rank, workers)):
                yield collation.window_batch(data.features, rows, np.random.default_rng([epoch, number]))

    if kind in PLAIN:
        run = _plain_run(data, model, sparse=kind == "sparse")
    else:
        run = _worker_run(data, model, rank, workers, store, folder)
    ready = list(itertools.islice(made(), steps))
    stream = iter(Prefetched(made, config.train.prefetch, time.perf_counter))

    def measure(mode):
        batches = ready if mode == "step" else itertools.islice(stream, steps)
        targets, wall, cpu = 0, time.perf_counter(), time.process_time()
        for batch in run(batches):
            targets += sum(batch.targets_per_rank)
        return time.perf_counter() - wall, time.process_time() - cpu, targets

    for mode in ("step", "loop"):
        measure(mode)  # the first steps allocate
    return measure


def _plain_run(data, model, sparse):
    import torch
    from plain_reference import PlainCrm

    from embeddings.tables import initial_rows
    from trainer.crm import CrmModel, FeatureSizes, table_specs

    crm, train, sizes = data.config.crm, data.config.train, FeatureSizes.of(data.catalogue)
    weights = {spec.name: torch.cat([rows for _, rows in initial_rows(0, spec, 0, spec.rows)])
               for spec in table_specs(sizes, crm)}
    plain = PlainCrm(CrmModel(crm, model, sizes), weights, optimizer=train.optimizer, learning_rate=train.learning_rate,
                    weight_decay=train.weight_decay, gradient_clip_norm=train.gradient_clip_norm,
                    table_optimizer=crm.tables.optimizer, table_learning_rate=crm.tables.learning_rate,
                    sparse=sparse)

    def run(batches):
        for number, batch in enumerate(batches):
            torch.default_generator.manual_seed(number)  # as the loop does it
            plain.step(batch)
            yield batch

    return run


def _worker_run(data, model, rank, workers, store, folder):
    import torch
    import torch.distributed as dist

    from trainer import loop, shared_memory
    from trainer.crm_task import CrmTask
    from trainer.workers import Workers

    shared_memory.register()
    dist.init_process_group(shared_memory.BACKEND, init_method=f"file://{store}", rank=rank, world_size=workers)
    plan = data.plan(model, 0, 0, data.slices[0])
    task = CrmTask(data, model, 0)
    task.folder = folder / "checkpoints" / Path(store).name
    running, position = loop._start(task, [plan], Workers.joined(torch.device("cpu")), lambda *_, **__: None)
    running.engine.train()
    position.global_step = data.config.train.warmup_steps

    def run(batches):
        for number, (batch, lookup, upcoming) in enumerate(loop._looked_up(running, batches)):
            torch.default_generator.manual_seed(number)  # as the loop does it
            loop._step(running, batch, lookup, upcoming, position)
            yield batch

    return run


class Side:
    """The processes of one runner."""

    def __init__(self, kind: str, tower: str, folder: Path, cores: list[int | None], steps: int):
        context = multiprocessing.get_context("spawn")
        store = str(folder / f"store-{tower}-{kind}")
        self.kind, self.pipes, self.processes = kind, [], []
        for rank in range(RUNNERS[kind][1]):
            here, there = context.Pipe()
            process = context.Process(target=serve, daemon=True, args=(
                there, kind, tower, rank, store, folder, cores[rank], steps))
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def wait(self) -> None:
        for pipe in self.pipes:
            answer = pipe.recv()
            if answer != "ready":
                raise RuntimeError(f"{self.kind}: {answer}")

    def measure(self, mode: str) -> tuple[float, float]:
        """Targets a second, by the clock and by the CPU time of the busiest process."""
        for pipe in self.pipes:
            pipe.send(mode)
        answers = [pipe.recv() for pipe in self.pipes]
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(f"{self.kind}: {answer}")
        walls, cpus, targets = zip(*answers, strict=True)
        return targets[0] / max(walls), targets[0] / max(cpus)

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it may have died
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def measure_tower(tower: str, folder: Path, used: list[int | None], rounds: int, steps: int, modes: list[str]) -> dict:
    """{(mode, runner): [(targets/s, targets/CPU s) a round]}"""
    runners = [kind for kind, (_, workers, _) in RUNNERS.items() if workers <= len(used)]
    sides = {kind: Side(kind, tower, folder, used, steps) for kind in runners}
    found = {(mode, kind): [] for mode in modes for kind in runners}
    try:
        for side in sides.values():
            side.wait()
        for number in range(rounds):
            for mode in modes:
                for kind in (runners if number % 2 == 0 else reversed(runners)):
                    found[mode, kind].append(sides[kind].measure(mode))
    finally:
        for side in sides.values():
            side.close()
    return found


def rows_of(tower: str, found: dict, modes: list[str]) -> list[dict]:
    rows = []
    for name, (kind, against, times, reach) in RATIOS.items():
        for mode in modes:
            if (mode, kind) not in found:
                continue
            pairs = list(zip(found[mode, kind], found[mode, against], strict=True))
            by_wall, by_cpu = ([a[i] / (times * b[i]) for a, b in pairs] for i in (0, 1))
            speed, other = (statistics.median(side[0] for side in sides) for sides in zip(*pairs, strict=True))
            rows.append(row(f"{tower}, {mode}: {name}", by_wall, reach, cpu=statistics.median(by_cpu),
                            targets_per_s=speed, against_targets_per_s=other,
                            sizes=f"{WINDOWS} windows a worker; {speed:,.0f} and {other:,.0f} targets/s"))
    return rows


def main() -> int:
    options = parser(__doc__, rounds=7)
    options.add_argument("--towers", nargs="+", default=["dnn", "decision_transformer"])
    options.add_argument("--modes", nargs="+", default=["step", "loop"], choices=["step", "loop"])
    options.add_argument("--steps", type=int, default=20, help="steps a round")
    options.add_argument("--cores", type=int, nargs="+", help="two or four to pin to; default: the first there are")
    options.add_argument("--no-pin", action="store_true", help="leave the placing to the system")
    options.add_argument("--windows", type=int, default=WINDOWS, help="windows a worker and step")
    arguments = options.parse_args()
    if arguments.windows != WINDOWS:  # sizes are read where this file is: here, and in every spawned process
        os.execve(sys.executable, [sys.executable, *sys.argv],
                  {**os.environ, "WATCHTOWER_BENCH_WINDOWS": str(arguments.windows)})
    used: list[int | None] = list(arguments.cores or cores()[:4])
    if len(used) < 2:
        options.error("this needs two cores")
    not_run = [] if len(used) >= 4 else [{"name": "training step: four workers, weak scaling efficiency",
                                          "why": f"needs 4 cores, has {len(used)}"}]
    if arguments.no_pin:
        used = [None] * len(used)
    os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"})
    rows = []
    with tempfile.TemporaryDirectory(prefix="training-step-") as name:
        folder = Path(name)
        make_world(folder)
        for tower in arguments.towers:
            found = measure_tower(tower, folder, used, arguments.rounds, arguments.steps, arguments.modes)
            rows += rows_of(tower, found, arguments.modes)
    return report(rows, arguments, not_run)


if __name__ == "__main__":
    sys.exit(main())
