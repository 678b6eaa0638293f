"""Run a function as the ranks of a process group of the backend that CPU workers train over, each in its own process.

Light on purpose: a spawned process imports this file before its environment counts, so torch is imported inside.
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# Forking after OpenMP ran hangs, so processes are spawned. DeepSpeed otherwise compiles for the CPU (35 to 86 s).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
# How long the other ranks may go on once one has failed: long enough for their own, perhaps better, error.
GRACE_S = 3.0


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on every rank of a fresh group; several cases in one call save start-ups.

    Args:
        world_size: number of processes.
        fn: a function at the top level of an importable module. What it returns is pickled by value.
        args: pickled for every rank.
        timeout_s: seconds for all ranks together; also the timeout of the collectives.

    Returns:
        The results in order of ranks.

    Raises:
        RuntimeError: with the traceback of the ranks that raised, or the ranks that died or hung. No process is left.
    """
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + timeout_s
    processes, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(rank, world_size, str(Path(folder) / "store"), timeout_s, sender, fn, args),
                    daemon=True,
                )
                process.start()
                sender.close()  # so that a dead rank reads as the end of its pipe
                processes.append(process)
                pipes.append(receiver)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        try:
            return _collect(pipes, processes, deadline)
        finally:
            for process in processes:
                process.join(timeout=GRACE_S if process.exitcode is None and sys.exc_info()[0] is None else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Any], processes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = dict(enumerate(pipes))
    while pending:
        ready = wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if not failures:
                failures = {rank: "hung; its stack is on stderr" for rank in pending}
            break
        for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
            try:
                done, payload = pending[rank].recv()
            except EOFError:
                processes[rank].join(timeout=GRACE_S)
                done, payload = False, f"died with exit code {processes[rank].exitcode}"
            if done:
                results[rank] = pickle.loads(payload)
            else:
                failures[rank] = payload
                deadline = min(deadline, time.monotonic() + GRACE_S)
            del pending[rank]
    if failures:
        raise RuntimeError("\n".join(f"rank {rank} of {len(pipes)}: {text}" for rank, text in failures.items()))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int, world_size: int, store: str, timeout_s: float, sender: Any, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(max(1.0, timeout_s - 2.0), exit=False)
    import torch
    import torch.distributed as dist

    from trainer import shared_memory

    torch.set_num_threads(1)
    try:
        shared_memory.register()
        dist.init_process_group(
            shared_memory.BACKEND,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        # Pickled here, by value: a tensor sent through the pipe itself would live in this process's shared memory.
        sender.send((True, pickle.dumps(fn(rank, world_size, *args))))
        dist.destroy_process_group()
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()
        sender.close()
