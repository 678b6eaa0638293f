"""Run by test_loopback.py: a local Ray with two training workers, and every socket that its processes listen on.

Prints one JSON object: the node's address, the sockets as [process, address], whether the token file is this user's
alone, and what a caller with another token is told.
"""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from configs.loader import load
from launch.local_ray import own_folder, start_ray

INTRUDER = ("import logging, ray; ray.init(address='{}', logging_level=logging.CRITICAL, log_to_driver=False); "
            "print('inside', ray.get(ray.remote(lambda: 42).remote()))")


def listening() -> set[tuple[str, str]]:
    me, found = psutil.Process(), set()
    for process in (me, *me.children(recursive=True)):
        try:
            name = " ".join(process.cmdline())[:80]
            found |= {(name, c.laddr.ip) for c in process.net_connections(kind="inet") if c.status == "LISTEN"}
        except psutil.Error:
            continue
    return found


def worker(settings: dict) -> None:
    import ray.train
    import torch

    rank = ray.train.get_context().get_world_rank()
    torch.distributed.all_reduce(torch.ones(1))
    with open(os.path.join(settings["folder"], f"up-{rank}"), "w") as file:
        file.write(type(torch.distributed.group.WORLD).__name__)
    while not os.path.exists(os.path.join(settings["folder"], "seen")):
        time.sleep(0.1)
    ray.train.report({"done": True})


def intruders(gcs: str) -> dict[str, subprocess.Popen]:
    """Callers with another token and with none. They try for half a minute, beside everything else."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    return {name: subprocess.Popen([sys.executable, "-c", INTRUDER.format(gcs)], env={**others, **environment},
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for name, environment in {"another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
                                      "no token": {"RAY_AUTH_MODE": "disabled"}}.items()}


def watch(folder: str, found: set[tuple[str, str]]) -> None:
    """Note the sockets while both workers are up, and let them go."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not all(
            os.path.exists(os.path.join(folder, f"up-{rank}")) for rank in (0, 1)):
        time.sleep(0.2)
    found.update(listening())
    open(os.path.join(folder, "seen"), "w").close()


def main(folder: str) -> None:
    found: set[tuple[str, str]] = set()
    with start_ray(load("configs/smoke.yaml", [f"run_dir={folder}"])) as cluster:
        import ray
        from ray.train import RunConfig, ScalingConfig

        from launch.worker_group import WorkerGroupTrainer, torch_config
        from trainer.shared_memory import BACKEND

        gcs = ray.get_runtime_context().gcs_address
        callers = intruders(gcs)
        watcher = threading.Thread(target=watch, args=(folder, found))
        watcher.start()
        WorkerGroupTrainer(worker, train_loop_config={"folder": folder}, scaling_config=ScalingConfig(num_workers=2),
                           run_config=RunConfig(name="listeners", storage_path=os.path.join(folder, "ray")),
                           torch_config=torch_config(BACKEND, 120, own_folder())).fit()
        watcher.join()
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        answers = {name: "inside" in caller.communicate(timeout=200)[0] for name, caller in callers.items()}
        with open(token) as file:
            secret = file.read()
        print(json.dumps({"node": gcs, "mode": stat.S_IMODE(os.stat(token).st_mode), "inside": answers,
                          "cluster": str(cluster), "sockets": sorted(found), "secret": secret, "groups": [
                              Path(folder, f"up-{rank}").read_text() for rank in (0, 1)]}))


if __name__ == "__main__":
    main(sys.argv[1])
