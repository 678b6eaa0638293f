"""What a job is made of before it leaves: places, variables, code, and what its end means."""

import subprocess
from types import SimpleNamespace

import pytest

from configs.errors import InputError, WatchtowerError
from configs.loader import load, save_resolved
from launch import cli
from launch.submit import PACKAGES, _told, check_places, entrypoint, environment, exit_code, stage_code


@pytest.fixture
def smoke(repository):
    return str(repository / "configs/smoke.yaml")


def test_places_that_only_this_folder_knows(smoke):
    with pytest.raises(InputError) as told:
        check_places(load(smoke, ["data.logs=logs", "data.items=s3://bucket/items"]))
    assert [line.split(":")[0] for line in str(told.value).splitlines()] == ["run_dir", "data.logs"]
    check_places(load(smoke, ["run_dir=/shared/run", "data.logs=/shared/logs"]))


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
