"""The command line: one clear message and the right exit code, whatever went wrong and wherever it was raised."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from configs.errors import InputError, QualityGateError, WatchtowerError
from launch import cli, stages, stopping

COMMAND = [sys.executable, "-m", "launch.cli"]


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """`failing(error)` runs `watchtower run` on stages that raise it; gives (exit code, stderr)."""
    (tmp_path / "c.yaml").write_text(f"run_dir: '{tmp_path / 'run'}'")
    (tmp_path / "run").mkdir()
    monkeypatch.delenv("WATCHTOWER_TRACEBACK", raising=False)

    def run(error, capsys, *arguments):
        def fail(*_):
            raise error
        monkeypatch.setattr(stages, "run", fail)
        code = cli.main(["run", str(tmp_path / "c.yaml"), *arguments])
        return code, capsys.readouterr().err
    run.folder = tmp_path / "run"
    return run


@pytest.fixture(autouse=True)
def _keep_process_state():
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    yield
    os.environ.clear()
    os.environ.update(before)
    signal.signal(signal.SIGTERM, handler)


def test_help_is_quick_and_lists_what_exists(repository):
    command = [*COMMAND, "--help"]
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        found = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=True)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.5
    for word in ("run", "ingest", "train", "channels", "replay", "router", "evaluate", "report", "plan", "doctor",
                 "synth", "submit", "status", "logs", "stop", "exit codes"):
        assert word in found.stdout
    for word in ("serve", "nearline"):
        assert word not in found.stdout


def test_nothing_heavy_before_a_command_needs_it(repository):
    code = ("import sys, launch.cli as c; c.main(['--help']); c.main(['submit']); c.main(['--version'])\n"
            "heavy = {'torch', 'ray', 'pyarrow', 'pydantic', 'numpy', 'yaml', 'deepspeed'} & set(sys.modules)\n"
            "sys.exit(f'imported: {heavy}' if heavy else 0)")
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, capture_output=True)


@pytest.mark.parametrize("words", ["serve c.yaml", "nearline"])
def test_what_is_not_built_says_so(words, capsys):
    assert cli.main(words.split()) == 2
    assert "not part of this version" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", "run", "train", "train nothing", "nonsense", "run --nonsense c.yaml",
                                   "submit", "logs", "submit c.yaml --image x --installed",
                                   "synth d --users many"])
def test_wrong_usage(words, capsys):
    assert cli.main(words.split()) == 2
    assert "usage: " in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("watchtower ")


@pytest.mark.parametrize(("words", "only"), [
    ("run", None), ("ingest", ["ingest"]), ("train crm", ["crm"]), ("evaluate", ["evaluate"]), ("report", ["report"])])
def test_commands_run_their_stage(words, only, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(stages, "run", lambda config, only: seen.append((config, only)))
    (tmp_path / "c.yaml").write_text("train: {epochs: 1}")
    arguments = [*words.split(), str(tmp_path / "c.yaml"), "train.epochs=2", "--traceback", "seeds=[4]"]
    assert cli.main(arguments) == 0
    (config, found), = seen
    assert (config.train.epochs, config.seeds, found) == (2, [4], only)


def test_a_wrong_config_is_told_without_traceback(repository, tmp_path):
    (tmp_path / "c.yaml").write_text("train: {epoch: 1}\nname: 3")
    found = subprocess.run([*COMMAND, "run", str(tmp_path / "c.yaml"), "x=1"], capture_output=True, text=True,
                           cwd=repository)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr and found.stdout == ""
    for words in ("c.yaml:1: train.epoch: unknown key; did you mean train.epochs?", "c.yaml:2: name: 3",
                  "override x=1: x: unknown key"):
        assert words in found.stderr


def test_logs_that_are_missing(repository, tmp_path, capsys):
    code = cli.main(["run", str(repository / "configs/kuairand.yaml"), f"run_dir={tmp_path}"])
    assert code == 2
    assert "data.logs=FILE_OR_FOLDER" in capsys.readouterr().err


def test_synth(tmp_path, capsys):
    arguments = ["synth", str(tmp_path / "w"), "--users", "5", "--items", "20", "--views-per-user", "3", "--processes",
                 "1"]
    assert cli.main(arguments) == 0
    assert f"data.logs={tmp_path / 'w' / 'logs'}" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "holds this world already" in capsys.readouterr().out
    assert cli.main([*arguments, "--seed", "1"]) == 2
    assert "another world" in capsys.readouterr().err
    assert cli.main(["synth", str(tmp_path / "v"), "--days", "0"]) == 2
    assert not (tmp_path / "v").exists()


def test_every_dial_of_the_world_is_an_option():
    import dataclasses

    from trainer.world import WorldSpec
    assert [f.name for f in dataclasses.fields(WorldSpec)] == [n.replace("-", "_") for n, _, _ in cli.WORLD_DIALS]


# --- errors -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("error", "code"), [
    (WatchtowerError("it did not work"), 1), (InputError("row 3 is bad"), 2), (QualityGateError("too low"), 3),
    (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2), (PermissionError(13, "denied", "/data/x"), 2),
    (MemoryError(), 1)])
def test_errors_of_ours_are_one_message(error, code, failing, capsys):
    found, said = failing(error, capsys)
    assert found == code
    assert said.startswith("watchtower: ") and "Traceback" not in said
    assert not list(failing.folder.glob("error-*"))
    if error.args and isinstance(error, WatchtowerError):
        assert said == f"watchtower: {error}\n"
    assert failing(error, capsys, "--traceback")[1].startswith("Traceback") or not error.args


def test_an_unforeseen_error_leaves_its_traceback_in_the_run_folder(failing, capsys):
    code, said = failing(ZeroDivisionError("division\nby zero"), capsys)
    assert code == 1
    assert "Traceback" not in said and "failed: ZeroDivisionError: division\n" in said
    path, = failing.folder.glob("error-*.log")
    assert str(path) in said
    assert "ZeroDivisionError: division" in path.read_text()


@pytest.mark.parametrize(("error", "code"), [
    (KeyboardInterrupt(), 130), (SystemExit(1), 130), (SystemExit(143), 143),  # Ray Train turns Ctrl-C into exit 1,
    (SystemExit(signal.SIGTERM), 143)])  # and a Ray that starts turns SIGTERM into exit 15
def test_interrupted(error, code, failing, capsys):
    found, said = failing(error, capsys)
    assert found == code and "interrupted" in said


def test_a_signal_that_ray_gave_another_code(failing, monkeypatch, capsys):
    """What a handler raises while Ray waits comes out of the wait as SystemExit(1)."""
    monkeypatch.setattr(stopping, "_asked", True)
    monkeypatch.setattr(cli, "end_on_sigterm", lambda: None)
    assert failing(SystemExit(1), capsys)[0] == 143


def test_what_a_signal_broke_is_no_failure(failing, monkeypatch, capsys):
    """A module that was half imported when SIGTERM came, and what was raised there swallowed."""
    monkeypatch.setattr(stopping, "_raised", True)
    monkeypatch.setattr(cli, "end_on_sigterm", lambda: None)
    assert failing(AttributeError("partially initialized module"), capsys)[0] == 143
    code, said = failing(WatchtowerError("the disk is full"), capsys)
    assert code == 1 and "the disk is full" in said


def test_terminated(repository):
    code = ("import sys, time, launch.cli as c, launch.stages as s\n"
            "def wait(*_):\n    print('ready', flush=True)\n    time.sleep(30)\n"
            "s.run = wait\nsys.exit(c.main(['run', 'configs/smoke.yaml']))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(10) == 143
    process.stdout.close()


# Errors as Ray 2.60 hands them to a driver; the layouts were taken from real ones.

class RayTaskError(Exception):
    def __init__(self, text, cause=None):
        super().__init__(text)
        self.traceback_str, self.cause = text, cause


class RayTaskErrorOfOurs(RayTaskError, InputError):  # what Ray makes: a task error that is an InputError too
    pass


class WorkerGroupError(Exception):
    def __init__(self, text, worker_failures):
        super().__init__(text)
        self.worker_failures = worker_failures


TASK_TEXT = ('\x1b[36mray::Map(read)()\x1b[39m (pid=15395, ip=192.0.2.2)\n  File "x.py", line 27, in <lambda>\n'
             "    raise InputError(text)\nconfigs.errors.InputError: a.parquet: row 3\nis bad\n\nThe above exception "
             "was the direct cause of the following exception:\n\nray.exceptions.UserCodeException: UDF failed")


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(("error", "kind", "message"), [
    (InputError("plain"), InputError, "plain"),
    (RayTaskErrorOfOurs("ray::f()\nconfigs.errors.InputError: x", InputError("x")), InputError, "x"),
    (RayTaskErrorOfOurs("ray::f()\nconfigs.errors.InputError: lost cause"), InputError, "lost cause"),
    (RayTaskError(TASK_TEXT), InputError, "a.parquet: row 3\nis bad"),
    (RayTaskError("ray::f()", RuntimeError(TASK_TEXT)), InputError, "a.parquet: row 3\nis bad"),
    (WorkerGroupError("failed", {0: RuntimeError("lost"), 1: QualityGateError("low")}), QualityGateError, "low"),
    (WorkerGroupError("[Rank 0,1 Error Snippet]:\nTraceback (most recent call last):\nconfigs.errors.QualityGateError: "
                      "low\n", {}), QualityGateError, "low"),
    (chained(RuntimeError("outer"), chained(ValueError("middle"), InputError("deep"))), InputError, "deep"),
    (WatchtowerError("the training workers failed: OSError: [Errno 28] No space left on device"), InputError,
     "the disk is full"),
    (chained(WatchtowerError("the workers failed"), InputError("row 3")), InputError, "row 3"),
    (ExceptionGroup("several", [ValueError(), WatchtowerError("one")]), WatchtowerError, "one"),
])
def test_unwrap(error, kind, message):
    found = cli.unwrap(error)
    assert isinstance(found, kind) and str(found).startswith(message)


def test_unwrap_finds_nothing_where_there_is_nothing():
    assert cli.unwrap(ValueError("InputError: said in passing")) is None
    try:
        try:
            raise InputError("handled")
        except InputError:
            raise KeyError("a mistake of ours while it was handled")  # noqa: B904
    except KeyError as error:
        assert cli.unwrap(error) is None
