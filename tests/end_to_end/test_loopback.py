"""A local run is nobody else's: its sockets are on the loopback interface, and its Ray asks for the run's own token."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_local_ray_listens_on_the_loopback_interface_and_asks_for_its_token(tmp_path):
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("listeners.py")), str(tmp_path)], cwd=REPOSITORY, text=True,
        env=others | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["node"].startswith("127.0.0.1:")
    assert found["mode"] == 0o600 and len(found["secret"]) == 64
    assert found["inside"] == {"another token": False, "no token": False}
    assert found["sockets"]
    assert found["groups"] == ["SharedMemoryGroup"] * 2  # they exchange through memory, as a run's own workers do
    elsewhere = [(process, address) for process, address in found["sockets"] if address not in LOOPBACK]
    assert not elsewhere
    written = "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    assert found["secret"] not in written + found["cluster"] + done.stderr
