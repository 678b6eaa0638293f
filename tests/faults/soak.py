"""A soak: 200 tiny epochs with their index rebuilds in one process tree, and nothing that grows.

    make soak
    python tests/faults/soak.py --epochs 200 --folder /tmp/soak

Every few epochs the whole tree is looked at: memory that belongs to it (PSS, which shares shared pages out, and USS,
which leaves them out), open files, threads, processes, and shared memory. Over the second half a line is fitted to
each; what it rises by in that half must stay below the bound beside it. Exit code 1 where it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from tiny_run import TinyRun, Watched, end_all, end_on_signals  # noqa: E402

MIB = 2**20
SMALL = ("stages=[ingest,crm]", "crm.models=[{name: dnn, tower: dnn, condition: next}]", "data.synth.users=60",
         "data.synth.views_per_user=20", "data.synth.items=80", "train.batch_rows=32", "train.checkpoint_every_steps=2",
         "evaluate.queries=20", "evaluate.curve_queries=5", "evaluate.validation_queries=10",
         "data.effective_view={min_watch_s: 1}", "data.target=null")
SAMPLES = 40
# What may be gained over the second half. Memory: what an allocator takes before it settles, in MiB; a leak of one
# index (20 KB) or one batch (100 KB) an epoch would come to more. Files, threads, processes, shared memory: nothing.
BOUNDS = {"pss_mib": 16.0, "uss_mib": 16.0, "files": 2.0, "threads": 2.0, "processes": 0.5, "shared_mib": 1.0}


@dataclass(frozen=True)
class Sample:
    """The tree at one time. worker_mib: PSS of the training workers alone."""

    epoch: int
    pss_mib: float
    uss_mib: float
    worker_mib: float
    files: int
    threads: int
    processes: int
    shared_mib: float


def sample(run: TinyRun, epoch: int) -> Sample:
    """Look at every process of the run."""
    pss = uss = worker = files = threads = count = 0
    workers = {process.pid for process in run.victims("worker")}
    for process in run.victims("everything"):
        with contextlib.suppress(psutil.Error):
            memory = process.memory_full_info()
            handles, running = process.num_fds(), process.num_threads()
            pss, uss, files, threads, count = (pss + memory.pss, uss + memory.uss, files + handles, threads + running,
                                               count + 1)
            worker += memory.pss if process.pid in workers else 0
    return Sample(epoch, pss / MIB, uss / MIB, worker / MIB, files, threads, count, _shared_bytes(run) / MIB)


def _shared_bytes(run: TinyRun) -> int:
    """Of the files in /dev/shm that the tree has mapped, deleted ones too: what they take."""
    found: dict[str, int] = {}
    for process in run.victims("everything"):
        with contextlib.suppress(psutil.Error, OSError):
            path = None
            for line in Path(f"/proc/{process.pid}/smaps").read_text(errors="replace").splitlines():
                words = line.split()
                if "-" in words[0] and ":" not in words[0]:
                    path = f"{words[3]} {words[4]}" if len(words) > 5 and words[5].startswith("/dev/shm") else None
                elif path is not None and words[0] == "Rss:":
                    found[path] = max(found.get(path, 0), 1024 * int(words[1]))
    return sum(found.values())


def growth(samples: list[Sample], name: str) -> float:
    """What the line through the second half of the samples rises by over that half."""
    half = samples[len(samples) // 2:]
    epochs = np.array([one.epoch for one in half], float)
    slope = np.polyfit(epochs, [getattr(one, name) for one in half], 1)[0]
    return float(slope * (epochs[-1] - epochs[0]))


def soak(run_dir: Path, epochs: int) -> list[Sample]:
    """Train for so many epochs; what the tree was like after every few of them.

    Raises:
        AssertionError: the run failed.
    """
    run, watched, samples = TinyRun(run_dir, *SMALL, f"train.epochs={epochs}"), Watched(run_dir), []
    every, seen = max(1, epochs // SAMPLES), 0
    while run.is_running():
        watched.read()
        done = max((event["epoch"] for event in watched.events if event["event"] == "epoch"), default=0)
        if done >= seen + every and watched.stage == "crm":
            samples.append(sample(run, done))
            seen = done
            print(row(samples[-1]), flush=True)
        time.sleep(0.1)
    code = run.wait()
    left = run.left()
    assert code == 0 and not left, f"exit code {code}, left {left}: {run.output[-1000:]}"
    return samples


HEAD = f"{'epoch':>6}{'PSS MiB':>10}{'USS MiB':>10}{'workers':>10}{'files':>8}{'threads':>9}{'procs':>7}{'shm MiB':>9}"


def row(one: Sample) -> str:
    return (f"{one.epoch:>6}{one.pss_mib:>10.1f}{one.uss_mib:>10.1f}{one.worker_mib:>10.1f}{one.files:>8}"
            f"{one.threads:>9}{one.processes:>7}{one.shared_mib:>9.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=None, help="of the run; default: a new one, removed afterwards")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="watchtower-soak-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    end_on_signals()
    print(HEAD, flush=True)
    try:
        samples = soak(folder / "run", arguments.epochs)
    finally:
        end_all()
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    flat = len(samples) >= SAMPLES // 2
    if not flat:
        print(f"only {len(samples)} samples: too few to say anything")
    print(f"\nover the second half, epochs {samples[len(samples) // 2].epoch} to {samples[-1].epoch}:")
    for name, bound in BOUNDS.items():
        gained = growth(samples, name)
        flat &= gained <= bound
        print(f"  {name:<12}{gained:>+9.2f}   at most {bound:g}{'' if gained <= bound else '   GROWS'}")
    print(f"soak: {arguments.epochs} epochs, {'flat' if flat else 'NOT FLAT'}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
