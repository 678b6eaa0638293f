"""A run as a job of a Ray cluster: send it, look at it, read its logs, stop it.

    watchtower submit configs/own.yaml run_dir=/shared/run --address http://head:8265
    watchtower status | logs | stop JOB --address http://head:8265

`submit` checks the config here, sends the resolved one along, and the code with it: our packages (or the folder that
--working-dir names) as Ray's working directory; nothing where --image names an image that Ray starts the job in, or
--installed says that the machines of the cluster have the package. It then prints the job's log and ends with the run's
own exit code. Ctrl-C lets go of the log, not of the job.

A cluster that asks for a token gets the one of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; it is never printed, and not
taken as --env, where everybody who sees the job could read it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError, WatchtowerError
from configs.secrets import redact
from launch.console import FORMAT_VARIABLE, FORMATS, say, version

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from configs.schema import Config

COMMANDS = ("submit", "status", "logs", "stop")
PACKAGES = ("configs", "embeddings", "trainer", "launch")
EXCLUDED = (".git", ".venv*", "venv", "runs", "__pycache__", "*.pyc", "*.egg-info", "build", ".pytest_cache",
            ".ruff_cache", ".hypothesis", "node_modules")
LARGEST_MIB = 50
CONFIG_NAME = "watchtower-run.yaml"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TRIES, PAUSE_S = 12, 5.0  # of a connection that breaks while the log is read
LOOK_EVERY_S = 1.0
INTERRUPTED = 130


def add_commands(commands: Any, takes_config: Callable[[argparse.ArgumentParser], None]) -> None:
    """The four commands, for argparse."""
    submit = commands.add_parser("submit", help="the same run as a job of a Ray cluster")
    takes_config(submit)
    code = submit.add_mutually_exclusive_group()
    code.add_argument("--working-dir", metavar="DIR", help="folder with the code to send; default: the installed one")
    code.add_argument("--image", metavar="IMAGE", help="image that Ray starts the job in (it needs podman there)")
    code.add_argument("--installed", action="store_true", help="send no code: the cluster's machines have it")
    submit.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], help="a variable for all processes")
    submit.add_argument("--job-id", metavar="ID", help="the job's name; default: of the run's name and the time")
    submit.add_argument("--no-wait", action="store_true", help="do not follow the log; print the job's id and leave")
    status = commands.add_parser("status", help="how a job is; without an id, all jobs of ours")
    status.add_argument("job", metavar="JOB", nargs="?")
    logs = commands.add_parser("logs", help="what a job printed")
    logs.add_argument("job", metavar="JOB")
    logs.add_argument("--follow", action="store_true", help="until it ends; with its exit code")
    stop = commands.add_parser("stop", help="end a job; the same submit goes on where it stopped")
    stop.add_argument("job", metavar="JOB")
    for command in (submit, status, logs, stop):
        command.add_argument("--address", metavar="ADDR", help="http://HEAD:8265, or a Ray address; default: "
                                                               + " or ".join(ADDRESS_VARIABLES))
        if command is not submit:
            command.add_argument("--log-format", choices=FORMATS, default=None, help=argparse.SUPPRESS)
            command.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def act(arguments: argparse.Namespace) -> int:
    """Do one of the four commands; its exit code."""
    if arguments.command == "submit":
        from configs.loader import require_logs
        from launch.doctor import before_submit
        from launch.remote import load_config

        before_submit()
        config = load_config(arguments.config, arguments.overrides)
        require_logs(config)
        check_places(config)
        return submit(config, arguments)
    client = connect(arguments.address)
    with _told(arguments.job, arguments.address):
        if arguments.command == "status":
            return show_status(client, arguments.job)
        if arguments.command == "logs":
            return _follow(client, arguments.job, arguments.address) if arguments.follow else _print_log(
                client, arguments.job)
        return _stop(client, arguments.job)


# --- what is sent -----------------------------------------------------------------------------------------------------

def check_places(config: Config) -> None:
    """Files that the machines of a cluster must reach are named in full, and by no secret.

    Raises:
        InputError: for every place that only means something in this folder, and every one that has a password in it:
            everybody who sees the job could read it.
    """
    named = {"run_dir": config.run_dir, "data.logs": config.data.logs, "data.items": config.data.items,
             "data.users": config.data.users,
             "split.test_users": config.split.test_users if isinstance(config.split.test_users, str) else None}
    if "://" in config.run_dir:
        named["storage.work_dir"] = config.storage.work_dir
    wrong = []
    for key, place in named.items():
        if place is not None and not Path(place).is_absolute() and "://" not in place:
            instead = {"run_dir": "a whole path of the machine that the driver runs on, or a URL",
                       "storage.work_dir": "a whole path of the machine that the driver runs on"}.get(
                           key, "a whole path that all its machines share, or a URL")
            wrong.append(f"{key}: {place} is relative to this folder, which the cluster does not have; give {instead}")
        if place is not None and redact(place) != place:
            wrong.append(f"{key}: {redact(place)} has a secret in it, which everybody who sees the job could read, so "
                         "it is not sent. Leave it out of the URL; the cluster's machines have the keys, in their "
                         "environment or by their identity")
    if wrong:
        raise InputError("\n".join(wrong))


def environment(pairs: list[str]) -> dict[str, str]:
    """NAME=VALUE words as a mapping.

    Raises:
        InputError: a word without a name, or a token of Ray's.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--env takes NAME=VALUE, not {name!r}")
        if name in TOKEN_VARIABLES:
            raise InputError(f"--env {name}: everybody who sees the job could read it; the cluster's own machines have "
                             "the token, and this command takes it from its environment")
        found[name] = value
    return found


def stage_code(source: Path | None, folder: Path) -> None:
    """Copy what is sent into an empty folder: our packages, or all of `source` but EXCLUDED. Links are left out.

    Raises:
        InputError: `source` is not there, holds no package of ours, or is larger than LARGEST_MIB.
    """
    if source is not None and not (source / "launch" / "cli.py").is_file():
        raise InputError(f"--working-dir: {source} holds no launch/cli.py; name a checkout of Watchtower")
    root = source or Path(__file__).resolve().parents[1]
    tops = sorted(root.iterdir()) if source else [root / name for name in PACKAGES]
    files: list[Path] = []
    for top in tops:
        for path in [top, *(top.rglob("*") if top.is_dir() and not top.is_symlink() else ())]:
            parts = path.relative_to(root).parts
            if path.is_file() and not path.is_symlink() and not any(
                    fnmatch.fnmatch(part, pattern) for part in parts for pattern in EXCLUDED):
                files.append(path)
    sizes: dict[str, int] = {}
    for path in files:
        name = path.relative_to(root).parts[0]
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    if sum(sizes.values()) > LARGEST_MIB * 2**20:
        largest = sorted(sizes, key=sizes.get, reverse=True)[:3]
        raise InputError(f"--working-dir: {root} has {sum(sizes.values()) / 2**20:.0f} MiB to send, at most "
                         f"{LARGEST_MIB} are meant ({', '.join(f'{n} {sizes[n] / 2**20:.0f} MiB' for n in largest)}); "
                         "name a smaller folder, or an image")
    for path in files:
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def entrypoint(config_text: str | None) -> str:
    """The shell command that the cluster runs: the sent code with the config beside it, or, with the config's text, the
    code that is there."""
    if config_text is None:
        return f"exec python -m launch.cli run {CONFIG_NAME}"
    return (f"folder=$(mktemp -d) && cat > \"$folder/{CONFIG_NAME}\" <<'END_OF_CONFIG'\n"
            f"{config_text.rstrip()}\nEND_OF_CONFIG\nexec watchtower run \"$folder/{CONFIG_NAME}\"")


def submit(config: Config, arguments: argparse.Namespace) -> int:
    """Send the run; follow it unless told not to."""
    from configs.loader import save_resolved

    variables = environment(arguments.env)
    if os.environ.get(FORMAT_VARIABLE):
        variables.setdefault(FORMAT_VARIABLE, os.environ[FORMAT_VARIABLE])
    # A run sets variables of its own for its workers (launch/local_ray.py) and keeps the values that are given here.
    variables["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    variables["PYTHONUNBUFFERED"] = "1"
    job = arguments.job_id or _new_id(config.name)
    sends_code = not (arguments.image or arguments.installed)
    with tempfile.TemporaryDirectory(prefix="watchtower-") as name:
        folder = Path(name)
        if sends_code:
            stage_code(Path(arguments.working_dir).expanduser() if arguments.working_dir else None, folder)
        save_resolved(config, folder / CONFIG_NAME)
        runtime: dict[str, Any] = {"env_vars": variables}
        if sends_code:
            runtime["working_dir"] = str(folder)
        elif arguments.image:
            runtime["image_uri"] = arguments.image
        client = connect(arguments.address)
        with _told(job, arguments.address):
            client.submit_job(
                entrypoint=entrypoint(None if sends_code else (folder / CONFIG_NAME).read_text(encoding="utf-8")),
                submission_id=job, runtime_env=runtime,
                metadata={"watchtower": version(), "name": config.name, "run_dir": redact(config.run_dir)})
    sent = f"job {job} is sent"
    if arguments.no_wait:
        say(sent)
        say(_how_to_go_on(job, arguments.address))
        return 0
    with _told(job, arguments.address):
        return _follow(client, job, arguments.address, sent)


def _new_id(name: str) -> str:
    return f"watchtower-{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


# --- the cluster ------------------------------------------------------------------------------------------------------

def connect(address: str | None) -> JobSubmissionClient:
    """The job server of a cluster.

    Raises:
        InputError: no address is given, or Ray's job part is not installed here.
        WatchtowerError: nobody answers there, or the token is missing or wrong.
    """
    address = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if address is None:
        raise InputError("name the cluster: --address http://HEAD:8265 (or RAY_ADDRESS)")
    if "RAY_AUTH_MODE" not in os.environ and any(os.environ.get(name) for name in TOKEN_VARIABLES):
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray sends no token otherwise
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import logging

    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray lets these win over the address that it is given.
    before = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        with _told(None, address):
            return JobSubmissionClient(address)
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def _told(job: str | None, address: str | None) -> Iterator[None]:
    """Ray's errors as ours, in one message."""
    from ray.exceptions import RayError  # a missing token is one; the rest are Python's own

    try:
        yield
    except (RuntimeError, ConnectionError, OSError, ValueError, RayError) as error:
        if isinstance(error, WatchtowerError):
            raise
        text = str(error)
        if "ray[default]" in text:
            raise InputError("Ray's job client is not installed here: pip install 'ray[default]'") from error
        if re.search(r"Authentication required|status code 401|Unauthorized", text):
            raise WatchtowerError(f"{address}: the cluster asks for a token; give it in RAY_AUTH_TOKEN, or its file in "
                                  "RAY_AUTH_TOKEN_PATH") from error
        if re.search(r"status code 403|Forbidden|token authentication failed", text, re.IGNORECASE):
            raise WatchtowerError(f"{address}: the cluster does not take this token") from error
        if job is not None and re.search(r"status code 404|does not exist", text):
            raise InputError(f"{job}: the cluster knows no such job; `watchtower status` lists them") from error
        if job is not None and "already exists" in text:
            raise InputError(f"--job-id {job}: the cluster has a job of this name") from error
        first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
        raise WatchtowerError(f"{address}: no answer from a Ray job server ({first[:300]}); is it the dashboard's "
                              "address, http://HEAD:8265, and can this machine reach it?") from error


def _how_to_go_on(job: str, address: str | None) -> str:
    at = f" --address {address}" if address else ""
    return (f"it goes on without this command: watchtower logs {job} --follow{at} · watchtower status {job}{at} · "
            f"watchtower stop {job}{at}")


def _print_log(client: JobSubmissionClient, job: str) -> int:
    sys.stdout.write(client.get_job_logs(job))
    return 0


def _follow(client: JobSubmissionClient, job: str, address: str | None, begin: str | None = None) -> int:
    """Print `begin`, then the log until the job ends; the run's exit code. Ctrl-C detaches from then on."""
    try:
        with _heard_ctrl_c() as heard:
            if begin is not None:
                say(begin)
            return _follow_to_the_end(client, job, heard)
    except KeyboardInterrupt:
        say(f"\njob {job} was not stopped: {_how_to_go_on(job, address)}", "warning", sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _heard_ctrl_c() -> Iterator[Callable[[], None]]:
    """Gives what raises KeyboardInterrupt once Ctrl-C was pressed: Python drops one that comes while it runs a
    finalizer, and the network code that follows a log has many."""
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def heard() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


def _follow_to_the_end(client: JobSubmissionClient, job: str, heard: Callable[[], None]) -> int:
    shown, failed = 0, 0
    while True:
        before = shown
        broke = None
        try:
            for text in _tail(client, job, shown):
                heard()
                sys.stdout.write(text)
                sys.stdout.flush()
                shown += len(text)
        except (RuntimeError, OSError) as error:  # the connection broke, or the log is not there yet
            broke = error
        heard()
        try:
            details = client.get_job_info(job)
            if details.status.is_terminal() and broke is None:
                return _ended(job, details)
        except (RuntimeError, OSError) as error:
            broke = broke or error
        failed = 0 if broke is None or shown > before else failed + 1
        if failed >= TRIES:
            raise broke
        time.sleep(PAUSE_S if failed else LOOK_EVERY_S)


def _tail(client: JobSubmissionClient, job: str, shown: int) -> Iterator[str]:
    """What the job prints from character `shown` on, until the server closes the stream."""
    import asyncio

    import aiohttp

    loop = asyncio.new_event_loop()
    stream = client.tail_job_logs(job)
    try:
        while True:
            try:
                text = loop.run_until_complete(anext(stream))
            except StopAsyncIteration:
                return
            except aiohttp.ClientError as error:
                raise ConnectionError(str(error)) from error
            skipped = min(shown, len(text))
            shown -= skipped
            if text[skipped:]:
                yield text[skipped:]
    finally:
        loop.run_until_complete(stream.aclose())
        loop.close()


def exit_code(details: Any) -> int:
    """What `submit` ends with: the run's own code; 128 + n where signal n ended it; 130 where somebody stopped it; 1
    where Ray could not run it."""
    status = str(getattr(details.status, "value", details.status))
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return INTERRUPTED
    code = details.driver_exit_code
    if code is None or code == 0:
        return 1
    return code if code > 0 else 128 - code


def _ended(job: str, details: Any) -> int:
    code = exit_code(details)
    status = str(getattr(details.status, "value", details.status))
    level = "info" if code == 0 else "error"
    say(f"job {job}: {status}, exit code {code}", level, None if code == 0 else sys.stderr)
    if code and details.message and details.driver_exit_code in (None, 0):
        say(str(details.message)[:2000], level, sys.stderr)  # no run said why: Ray does
    return code


def show_status(client: JobSubmissionClient, job: str | None) -> int:
    """A line a job, newest first."""
    found = [client.get_job_info(job)] if job else sorted(
        (each for each in client.list_jobs() if (each.metadata or {}).get("watchtower")),
        key=lambda each: each.start_time or 0, reverse=True)
    for details in found:
        say(status_line(details))
    if not found:
        say("the cluster knows no job of ours")
    return 0


def status_line(details: Any) -> str:
    """id: STATUS, name, since when, how long, exit code, run folder."""
    from trainer.events import seconds_text

    status = str(getattr(details.status, "value", details.status))
    about = details.metadata or {}
    parts = [f"{details.submission_id}: {status}"]
    if details.start_time:
        begun = datetime.datetime.fromtimestamp(details.start_time / 1000, datetime.UTC)
        took = (details.end_time or time.time() * 1000) - details.start_time
        parts.append(f"since {begun:%Y-%m-%d %H:%M:%S} UTC ({seconds_text(took / 1000)})")
    if details.end_time:
        parts.append(f"exit code {exit_code(details)}")
    return "  ".join([*parts, *(f"{key} {about[key]}" for key in ("name", "run_dir") if key in about)])


def _stop(client: JobSubmissionClient, job: str) -> int:
    details = client.get_job_info(job)
    if not details.status.is_terminal():
        client.stop_job(job)
        while not (details := client.get_job_info(job)).status.is_terminal():
            time.sleep(LOOK_EVERY_S)
    say(status_line(details))
    return 0
