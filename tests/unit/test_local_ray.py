"""What a local Ray leaves when it is shut down."""

import subprocess
import sys
import time

import psutil

from launch import local_ray


def lives(process: psutil.Process) -> bool:
    """Whether it has not ended; one that nobody has waited for yet has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_that_does_not_end_by_itself_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ray, "GONE_S", 0.3)
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); " \
           "print('ready', flush=True); time.sleep(60)"
    ours = subprocess.Popen([sys.executable, "-c", code, f"--temp-dir={tmp_path}"], stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert ours.stdout.readline() == "ready\n"
        found = local_ray._processes_of(tmp_path)
        assert len(found) == 2 and found[0].pid == ours.pid and other.pid not in {one.pid for one in found}
        local_ray._end(found)
        assert ours.wait(10) == -9 and other.poll() is None
        until = time.monotonic() + 30
        while any(lives(one) for one in found) and time.monotonic() < until:
            time.sleep(0.05)
        assert not [one for one in found if lives(one)]
    finally:
        ours.kill()
        other.kill()
        other.wait()
        ours.stdout.close()
