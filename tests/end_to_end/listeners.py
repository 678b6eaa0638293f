"""Run by test_loopback.py: a local Ray with two training workers, and every socket that its processes listen on.

Prints one JSON object: the node's address, the sockets as [process, address], whether the token file is this user's
alone, and what a caller with another token is told.
"""

import json
import os
import stat
import subprocess
import sys
import time

import psutil

from configs.loader import load
from launch.local_ray import start_ray

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
    open(os.path.join(settings["folder"], f"up-{rank}"), "w").close()
    while not os.path.exists(os.path.join(settings["folder"], "seen")):
        time.sleep(0.1)
    ray.train.report({"done": True})


def main(folder: str) -> None:
    import threading

    config = load("configs/smoke.yaml", [f"run_dir={folder}"])
    with start_ray(config) as cluster:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        found: set[tuple[str, str]] = set()

        def watch() -> None:
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and not all(
                    os.path.exists(os.path.join(folder, f"up-{rank}")) for rank in (0, 1)):
                time.sleep(0.2)
            found.update(listening())
            open(os.path.join(folder, "seen"), "w").close()

        thread = threading.Thread(target=watch)
        thread.start()
        TorchTrainer(worker, train_loop_config={"folder": folder}, scaling_config=ScalingConfig(num_workers=2),
                     run_config=RunConfig(name="listeners", storage_path=os.path.join(folder, "ray")),
                     torch_config=TorchConfig(backend="gloo", timeout_s=120)).fit()
        thread.join()
        gcs = ray.get_runtime_context().gcs_address
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        mode = stat.S_IMODE(os.stat(token).st_mode)
        secret = open(token).read()
        answers = {}
        for name, environment in {"another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
                                  "no token": {"RAY_AUTH_MODE": "disabled"}}.items():
            others = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
            try:
                done = subprocess.run([sys.executable, "-c", INTRUDER.format(gcs)], env={**others, **environment},
                                      capture_output=True, text=True, timeout=40)
                answers[name] = "inside" in done.stdout
            except subprocess.TimeoutExpired:
                answers[name] = False
        print(json.dumps({"node": gcs, "mode": mode, "inside": answers, "cluster": str(cluster),
                          "sockets": sorted(found), "secret": secret}))


if __name__ == "__main__":
    main(sys.argv[1])
