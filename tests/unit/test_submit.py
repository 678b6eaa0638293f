"""What a job is made of before it leaves: places, variables, code, and what its end means."""

import asyncio
import subprocess
import threading
from types import SimpleNamespace

import pytest

from configs.errors import InputError, WatchtowerError
from configs.loader import load, save_resolved
from launch import cli, doctor, submit
from launch.submit import PACKAGES, _told, check_places, entrypoint, environment, exit_code, stage_code


@pytest.fixture
def smoke(repository):
    return str(repository / "configs/smoke.yaml")


def test_places_that_only_this_folder_knows(smoke):
    with pytest.raises(InputError) as told:
        check_places(load(smoke, ["data.logs=logs", "data.items=s3://bucket/items"]))
    assert [line.split(":")[0] for line in str(told.value).splitlines()] == ["run_dir", "data.logs"]
    check_places(load(smoke, ["run_dir=/shared/run", "data.logs=/shared/logs"]))
    check_places(load(smoke, ["run_dir=s3://bucket/run", "storage.work_dir=/shared/work"]))
    check_places(load(smoke, ["run_dir=s3://bucket/run?region=eu-central-1&endpoint_override=host:9000"]))
    with pytest.raises(InputError, match=r"run_dir: s3://\*\*\*@bucket/run has a secret in it") as told:
        check_places(load(smoke, ["run_dir=s3://a-key:a-secret@bucket/run"]))
    assert "a-secret" not in str(told.value)
    with pytest.raises(InputError, match="storage.work_dir: work is relative"):
        check_places(load(smoke, ["run_dir=s3://bucket/run", "storage.work_dir=work"]))


def test_variables():
    assert environment(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    for wrong, message in (("A", "NAME=VALUE"), ("1A=2", "NAME=VALUE"), ("RAY_AUTH_TOKEN=secret", "could read it")):
        with pytest.raises(InputError, match=message) as told:
            environment([wrong])
        assert "secret" not in str(told.value)


def test_our_packages_are_sent_and_nothing_else(tmp_path):
    stage_code(None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(PACKAGES)
    assert (tmp_path / "launch/submit.py").is_file() and (tmp_path / "configs/smoke.yaml").is_file()
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_folder_is_sent_without_what_is_large_or_private(tmp_path):
    source, sent = tmp_path / "source", tmp_path / "sent"
    for name in ("launch/cli.py", "own/model.py", ".git/config", ".venv-x/a.py", "runs/r/x", "own/__pycache__/m.pyc"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    (source / "link").symlink_to("/etc/hostname")
    stage_code(source, sent)
    assert sorted(str(p.relative_to(sent)) for p in sent.rglob("*") if p.is_file()) == ["launch/cli.py", "own/model.py"]
    with (source / "data.bin").open("wb") as file:
        file.truncate(51 * 2**20)
    with pytest.raises(InputError, match="data.bin 51 MiB"):
        stage_code(source, tmp_path / "more")
    with pytest.raises(InputError, match="holds no launch/cli.py"):
        stage_code(tmp_path, tmp_path / "more")


def test_an_image_gets_the_config_in_the_command(smoke, tmp_path):
    config = load(smoke, ["run_dir=/shared/run", "name=it's $HOME \"quoted\""])
    save_resolved(config, tmp_path / "c.yaml")
    command = entrypoint((tmp_path / "c.yaml").read_text())
    (tmp_path / "watchtower").write_text('#!/bin/sh\ncat "$2"\n')
    (tmp_path / "watchtower").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(command, shell=True, env={"PATH": path}, capture_output=True, text=True)
    (tmp_path / "back.yaml").write_text(done.stdout)
    assert load(str(tmp_path / "back.yaml"), []) == config


@pytest.mark.parametrize(("status", "code", "expected"), [
    ("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", None, 1),
    ("STOPPED", -15, 130)])
def test_exit_codes(status, code, expected):
    assert exit_code(SimpleNamespace(status=status, driver_exit_code=code)) == expected


@pytest.mark.parametrize(("error", "kind", "message"), [
    (RuntimeError("Request failed with status code 404: job x"), InputError, "no such job"),
    (RuntimeError("Authentication required: Unauthorized"), WatchtowerError, "asks for a token"),
    (RuntimeError("Request failed with status code 403: Forbidden"), WatchtowerError, "does not take this token"),
    (ConnectionError("Failed to connect to Ray"), WatchtowerError, "no answer from a Ray job server"),
    (RuntimeError("The Ray jobs CLI & SDK require the ray[default] installation"), InputError, "pip install")])
def test_rays_errors_are_told_as_ours(error, kind, message):
    with pytest.raises(kind, match=message), _told("x", "http://head:8265"):
        raise error


def test_an_address_is_asked_for(monkeypatch, capsys):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["status"]) == 2
    assert "--address" in capsys.readouterr().err


@pytest.mark.parametrize(("changed", "says"), [
    ({"torchrec": "1.7.0"}, "do not fit together"), ({"ray": "2.1.0"}, "ray 2.1.0 is not in")])
def test_what_a_run_would_fail_of_is_told_before_anything_is_sent(smoke, tmp_path, monkeypatch, capsys, changed, says):
    fits = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", "ray": "2.60.0"}
    monkeypatch.setattr(doctor, "our_requirements", lambda: ["ray>=2.50,<3", "deepspeed>=0.19"])
    monkeypatch.setattr(doctor, "installed_versions", lambda: fits | changed)
    monkeypatch.setattr(submit, "stage_code", lambda *_: pytest.fail("code was staged"))
    monkeypatch.setattr(submit, "connect", lambda *_: pytest.fail("the cluster was called"))
    words = ["submit", smoke, f"run_dir={tmp_path / 'run'}", "--address", "http://127.0.0.1:1"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert says in said and "fix: " in said


def test_a_machine_that_only_sends_needs_no_training_packages(monkeypatch):
    monkeypatch.setattr(doctor, "our_requirements", lambda: ["ray>=2.50,<3", "deepspeed>=0.19"])
    for installed in ({"ray": "2.60.0"}, {"ray": "2.60.0", "torch": "2.9.0"}):
        monkeypatch.setattr(doctor, "installed_versions", lambda installed=installed: installed)
        doctor.before_submit()


# --- a log whose connection breaks ------------------------------------------------------------------------------------

LOG = ["first line\n", "second ", "line\n", "the end\n"]


@pytest.fixture
def breaking_server(monkeypatch):
    """A job server whose log stream breaks after one more piece each time; its address, and how often it was asked."""
    web = pytest.importorskip("aiohttp.web", reason="ray[default] is not installed here")
    asked = []

    async def version(_):
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"})

    async def details(_):
        ended = len(asked) > len(LOG)
        return web.json_response({"type": "SUBMISSION", "submission_id": "x", "entrypoint": "e", "metadata": {},
                                  "status": "FAILED" if ended else "RUNNING", "driver_exit_code": 3 if ended else None})

    async def tail(request):
        asked.append(request)
        stream = web.WebSocketResponse()
        await stream.prepare(request)
        for piece in LOG[:len(asked)]:
            await stream.send_str(piece)
        if len(asked) <= len(LOG):
            request.transport.abort()
        return stream

    loop = asyncio.new_event_loop()
    app = web.Application()
    app.add_routes([web.get("/api/version", version), web.get("/api/jobs/x", details),
                    web.get("/api/jobs/x/logs/tail", tail)])
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    port = site._server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(submit, "PAUSE_S", 0.01)
    monkeypatch.setattr(submit, "LOOK_EVERY_S", 0.01)
    yield f"http://127.0.0.1:{port}", asked
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


def test_a_log_goes_on_where_its_connection_broke(breaking_server, capsys):
    address, asked = breaking_server
    assert cli.main(["logs", "x", "--follow", "--address", address]) == 3
    said = capsys.readouterr()
    assert said.out == "".join(LOG) and "FAILED, exit code 3" in said.err
    assert len(asked) == len(LOG) + 1


def test_a_connection_that_stays_broken_is_told(breaking_server, monkeypatch, capsys):
    address, asked = breaking_server
    monkeypatch.setattr(submit, "TRIES", 3)
    monkeypatch.setitem(globals(), "LOG", [""] * 100)
    assert cli.main(["logs", "x", "--follow", "--address", address]) == 1
    assert "no answer from a Ray job server" in capsys.readouterr().err and len(asked) == 3
