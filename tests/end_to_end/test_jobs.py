"""`watchtower submit` as a user types it, to a Ray head with a dashboard and token authentication."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-this-test-and-nothing-else"
TINY = ["data.synth.users=40", "data.synth.items=50", "gates.at_least={}", "stages=[ingest]"]


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # The job is started as `python`, which must be this one.
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0", **more}


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Address of the job server of a Ray head of its own, which asks for TOKEN."""
    pytest.importorskip("aiohttp_cors", reason="ray[default], which has the dashboard, is not installed here")
    folder = Path("/tmp") / f"wt-submit-{os.getpid()}"  # Ray's sockets need a short path
    gcs, dashboard, agent, client, metrics = free_ports(5)
    log = (tmp_path_factory.mktemp("head") / "head.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={gcs}", "--num-cpus=3",
         f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}",
         f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", "--node-ip-address=127.0.0.1",
         f"--object-store-memory={200 << 20}", "--disable-usage-stats"],
        env=clean_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN), stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_answer(address, process, Path(log.name))
        yield address
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        process.terminate()
        for each in psutil.wait_procs([psutil.Process(process.pid), *family], timeout=20)[1]:
            each.kill()
        process.wait(20)
        log.close()


def wait_for_answer(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=10)
            return
        except urllib.error.HTTPError:
            return  # it answers: it wants the token
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the head did not come up: {log.read_text()[-3000:]}")


def watchtower(*words: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    more = {} if token is None else {"RAY_AUTH_TOKEN": token}
    found = subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=REPOSITORY, capture_output=True, text=True,
                           env=clean_environment(**more), timeout=700)
    assert TOKEN not in found.stdout + found.stderr and "Traceback" not in found.stderr, found.stderr
    return found


def test_a_run_is_sent_and_its_exit_code_comes_back(head, tmp_path):
    run_dir = tmp_path / "run"
    done = watchtower("submit", "configs/smoke.yaml", f"run_dir={run_dir}", *TINY, "--address", head, "--job-id", "one",
                      "--env", "OMP_NUM_THREADS=1", "--log-format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run_dir / "sequences/manifest.json").is_file()
    assert '"event":"stage"' in done.stdout and '"status":"done"' in done.stdout
    told = watchtower("status", "one", "--address", head)
    assert told.returncode == 0 and "one: SUCCEEDED" in told.stdout and "exit code 0" in told.stdout
    assert str(run_dir) in told.stdout and "one: SUCCEEDED" in watchtower("status", "--address", head).stdout
    assert '"stage":"ingest"' in watchtower("logs", "one", "--address", head).stdout


def test_a_run_that_fails_there_fails_here(head, tmp_path):
    done = watchtower("submit", "configs/smoke.yaml", f"run_dir={tmp_path / 'run'}", f"data.logs={tmp_path / 'none'}",
                      "--address", head)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "none" in done.stdout and "FAILED, exit code 2" in done.stderr


def test_ctrl_c_lets_go_and_stop_ends_it(head, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "submit", "configs/smoke.yaml", f"run_dir={tmp_path / 'run'}", *TINY,
         "data.synth.users=40000", "--address", head, "--job-id", "two"], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(RAY_AUTH_TOKEN=TOKEN))
    assert process.stdout.readline() == "job two is sent\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 130 and "job two was not stopped" in said and "watchtower stop two" in said
    assert re.search(r"two: (PENDING|RUNNING)", watchtower("status", "two", "--address", head).stdout)
    assert watchtower("stop", "two", "--address", head).returncode == 0
    assert watchtower("logs", "two", "--follow", "--address", head).returncode == 130
    assert "two: STOPPED" in watchtower("status", "two", "--address", head).stdout


def test_tokens_and_names(head):
    for token, message in ((None, "asks for a token"), ("wrong-" + "x" * 20, "does not take this token")):
        told = watchtower("status", "--address", head, token=token)
        assert told.returncode == 1 and message in told.stderr, told.stderr
    told = watchtower("logs", "nobody", "--address", head)
    assert told.returncode == 2 and "no such job" in told.stderr
