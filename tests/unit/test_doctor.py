"""`watchtower doctor`: each check on planted conditions, and the whole on this machine."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from configs.errors import InputError
from launch import cli, doctor
from launch.doctor import Accelerator
from launch.run_folder import locked

FITS = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": "1.8.0+cpu"}


def level(found):
    finding, = found
    assert (finding.fix == "") == (finding.level == "ok")
    return finding.level


@pytest.mark.parametrize(("changed", "expected"), [
    ({}, "ok"), ({"torch": "2.12.1", "torchrec": "1.7.0", "fbgemm-gpu-cpu": "1.7.0", "fbgemm-gpu": "1.7.0"}, "ok"),
    ({"torch": "2.11.0", "torchrec": "1.6.1", "fbgemm-gpu-cpu": "1.6.0", "fbgemm-gpu": "1.6.0+cpu"}, "ok"),
    ({"torch": "2.12.0"}, "error"), ({"torchrec": "1.7.0"}, "error"), ({"fbgemm-gpu-cpu": "1.9.0"}, "error"),
    ({"torch": "2.20.0"}, "error"), ({"torchrec": None}, "error"),
    ({"fbgemm-gpu-cpu": None, "fbgemm-gpu": None}, "error")])
def test_torch_fbgemm_and_torchrec_are_one_tuple(changed, expected):
    versions = {name: version for name, version in (FITS | changed).items() if version}
    assert level(doctor.check_tuple(versions)) == expected


@pytest.mark.parametrize(("version", "expected"), [
    ((3, 11, 7), "ok"), ((3, 12, 0), "ok"), ((3, 10, 9), "error"), ((3, 13, 0), "error")])
def test_python(version, expected):
    assert level(doctor.check_python(version)) == expected


@pytest.mark.parametrize(("versions", "expected", "says"), [
    ({"ray": "2.60.0", "numpy": "2.4.1"}, "ok", "2 packages"),
    ({"ray": "2.9.3", "numpy": "2.4.1"}, "error", "ray 2.9.3 is not in <3,>=2.60"),
    ({"ray": "3.0.0", "numpy": "2.4.1"}, "error", "ray 3.0.0"),
    ({"numpy": "2.0"}, "error", "ray is missing"),
    ({"ray": "2.60", "numpy": "2", "faiss-cpu": "2.0.0"}, "error", "faiss-cpu 2.0.0")])
def test_ranges(versions, expected, says):
    requirements = ["ray[data,train]<3,>=2.60", "numpy<3,>=2", 'faiss-cpu<2,>=1.15; extra == "cpu"']
    finding, = doctor.check_ranges(requirements, versions)
    assert finding.level == expected and says in finding.what


@pytest.mark.parametrize(("seen", "wanted", "levels"), [
    (Accelerator(None, None, None, ()), "auto", ["ok"]), (Accelerator(None, None, None, ()), "cuda", ["error"]),
    (Accelerator(None, None, "580.1", ()), "auto", ["warning"]),
    (Accelerator("13.0", None, "470.1", ()), "cuda", ["error"]),
    (Accelerator("13.0", "2.28", "580.1", ("H100",)), "cuda", ["ok", "ok"]),
    (Accelerator("13.0", None, "580.1", ("H100",)), "cuda", ["ok", "error"])])
def test_gpus(seen, wanted, levels):
    assert [finding.level for finding in doctor.check_accelerator(seen, wanted)] == levels


@pytest.mark.parametrize(("names", "has_gpu", "device", "expected"), [
    (["faiss-cpu"], False, "auto", "ok"), (["faiss-cpu"], True, "auto", "warning"),
    (["faiss-cpu"], True, "cuda", "error"), (["faiss-gpu"], True, "cuda", "ok"), ([], False, "auto", "error"),
    (["faiss-cpu", "faiss-gpu"], True, "auto", "error")])
def test_faiss(names, has_gpu, device, expected):
    assert level(doctor.check_faiss(dict.fromkeys(names, "1.15.1"), has_gpu, device)) == expected


@pytest.mark.parametrize(("found", "expected"), [
    (doctor.check_compiler({"g++": "/usr/bin/g++", "ninja": "/usr/bin/ninja"}), "ok"),
    (doctor.check_compiler({"g++": None, "ninja": "/usr/bin/ninja"}), "warning"),
    (doctor.check_shared_memory(2**33, 2**30), "ok"), (doctor.check_shared_memory(2**26, 2**30), "warning"),
    (doctor.check_shared_memory(None, 2**30), "warning"),
    (doctor.check_open_files(-1), "ok"), (doctor.check_open_files(65_536), "ok"),
    (doctor.check_open_files(1024), "warning"), (doctor.check_open_files(64), "error"),
    (doctor.check_cores(2, 2), "ok"), (doctor.check_cores(2, 8), "warning"),
    (doctor.check_memory(2**34, 4), "ok"), (doctor.check_memory(2**30, 4), "warning"),
    (doctor.check_loopback(), "ok"), (doctor.check_loopback("192.0.2.1"), "error"),
    (doctor.check_speed("run_dir", "/x", 2**30), "ok"), (doctor.check_speed("run_dir", "/x", 2**20), "warning"),
    (doctor.check_clocks({"a": 0.1, "b": -0.3}), "ok"), (doctor.check_clocks({"a": 0.1, "b": -9.0}), "warning"),
    (doctor.check_clocks({"a": 700.0}), "error")])
def test_this_machine(found, expected):
    assert level(found) == expected


def test_a_folder_that_can_be_written(tmp_path):
    place = tmp_path / "not" / "yet"
    finding, = doctor.check_writable(str(place), "run_dir")
    assert finding.level in ("ok", "warning") and str(place) in finding.what
    assert list(tmp_path.iterdir()) == []
    finding, = doctor.check_writable(f"file://{tmp_path}", "run_dir")
    assert finding.level in ("ok", "warning") and list(tmp_path.iterdir()) == []
    assert level(doctor.check_writable("/proc/self/none", "run_dir")) == "error"
    (tmp_path / "file").write_text("x")
    assert level(doctor.check_writable(str(tmp_path / "file"), "run_dir")) == "error"


def test_logs_that_can_be_read(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")

    def files(place):
        return [SimpleNamespace(open=lambda: open(place, "rb"))]

    assert level(doctor.check_readable(str(path), "data.logs", files)) == "ok"
    assert level(doctor.check_readable(str(tmp_path / "b"), "data.logs", files)) == "error"
    assert list(doctor.check_readable(None, "data.logs", files)) == []

    def none(place):
        raise InputError(f"data.logs: {place} holds nothing")

    finding, = doctor.check_readable("x", "data.logs", none)
    assert finding.what == "data.logs: x holds nothing"


def test_a_run_folder_that_is_in_use(tmp_path):
    assert level(doctor.check_lock(str(tmp_path))) == "ok"
    with locked(tmp_path):
        finding, = doctor.check_lock(str(tmp_path))
        assert finding.level == "error" and str(os.getpid()) in finding.what
    assert level(doctor.check_lock(str(tmp_path))) == "ok"
    (tmp_path / "run.lock").write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
    assert level(doctor.check_lock(str(tmp_path))) == "ok"


def test_an_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            assert level(doctor.check_reachable(address)) == "ok"
    assert level(doctor.check_reachable(f"127.0.0.1:{port}")) == "error"
    assert level(doctor.check_reachable("nonsense")) == "error"
    assert list(doctor.check_reachable("auto")) == []


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "c.yaml"
    path.write_text(f"run_dir: '{tmp_path / 'run'}'\ntrain: {{workers: 1}}\n")
    assert cli.main(["doctor", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    checks = {finding["check"] for finding in told["findings"]}
    assert {"python", "tables", "packages", "open files", "faiss", "run_dir", "run folder", "loopback"} <= checks
    assert cli.main(["doctor", str(path), f"data.logs={tmp_path / 'none'}", "ray.address=127.0.0.1:1"]) == 1
    said = capsys.readouterr().out
    assert "2 errors" in said and "a run would fail" in said and "fix: start Ray there" in said
    assert cli.main(["doctor", str(path), "data.log=x"]) == 2


def test_a_run_ends_at_once_where_it_would_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed_versions", lambda: FITS | {"torchrec": "1.7.0"})
    path = tmp_path / "c.yaml"
    path.write_text(f"run_dir: '{tmp_path / 'run'}'")
    assert cli.main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert "do not fit together" in said and "fix: take torch 2.13" in said
    assert not (tmp_path / "run").exists()


def test_the_cheap_part_imports_nothing_heavy(repository):
    code = ("import sys; from configs.schema import Config; from launch.doctor import before_run, before_submit\n"
            "before_run(Config()); before_submit()\n"
            "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'deepspeed', 'faiss', 'torchrec'} & set(sys.modules)\n"
            "sys.exit(f'imported: {heavy}' if heavy else 0)")
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)
