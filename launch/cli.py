"""The command line: `watchtower run CONFIG [key=value ...]` and the stages by themselves.

A mistake in the input or the config ends in one clear message and exit code 2, never in a traceback. Nothing heavy is
imported before a command needs it, so that `--help` answers at once.

Exit codes: 0 done · 1 failed · 2 the input or the config is wrong · 3 a quality gate fell short or a plan does not
fit · 130 interrupted · 143 ended by SIGTERM, training saved.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import InputError, QualityGateError, WatchtowerError
from configs.secrets import redact
from launch import submit
from launch.console import FORMAT_VARIABLE, FORMATS, is_json, say, version
from launch.stopping import TERMINATED, end_on_sigterm, is_asked, is_ended, why

if TYPE_CHECKING:
    from configs.schema import Config

STAGE_COMMANDS = {  # what is typed: (stage, what it does)
    ("ingest",): ("ingest", "read the logs, set bad rows aside, write user sequences"),
    ("train", "crm"): ("crm", "train the towers, rebuild and publish the index after every epoch"),
    ("channels",): ("channels", "build the item-to-item channels and publish their snapshots"),
    ("replay",): ("replay", "value attribution: which trigger would have brought back what was watched"),
    ("train", "router"): ("router", "train the routers on the replay's labels, score the test requests"),
    ("evaluate",): ("evaluate", "measure retrieval through the published indexes and snapshots"),
    ("report",): ("report", "write report.html from what was measured"),
}
INTERRUPTED = 130
NOT_BUILT = (("serve",), ("nearline",))
WORLD_DIALS = (  # option, type, what it is; the field of WorldSpec has the same name
    ("users", int, "number of users"),
    ("items", int, "number of items"),
    ("authors", int, "number of authors"),
    ("tags-count", int, "number of tags"),
    ("content-dim", int, "width of the content vectors"),
    ("days", int, "length of the log, days"),
    ("start-ms", int, "start of the log, Unix time in ms"),
    ("views-per-user", float, "mean number of views of a user"),
    ("views-spread", float, "spread of that number: standard deviation of its log"),
    ("session-views", float, "mean number of views of a session"),
    ("seed", int, "seed; the same seed gives the same rows"),
    ("user-item-affinity", float, "how much watch time depends on the pair of user and item, log seconds"),
    ("watch-persistence", float, "how much users differ in what they watch long, log seconds"),
    ("mood-scale", float, "how much a session's mood changes watch times, log seconds"),
    ("mood-persistence", float, "correlation of a mood with the one before, 0 to below 1"),
    ("exploration", float, "share of the feed drawn by popularity alone"),
    ("passing-interest", float, "share of the feed drawn from a passing interest"),
    ("author-loyalty", float, "share of the feed drawn from favourite authors"),
    ("interest-drift", float, "chance that a session has a new passing interest"),
    ("popularity-spread", float, "skew of popularity: standard deviation of its log"),
    ("null-watch-share", float, "share of views without a watch time"),
    ("watch-time", str, "natural, or a null world: independent, permuted"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="watchtower", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train and rebuild the retrieval stage of a video recommender.",
        epilog="exit codes: 0 done, 1 failed, 2 the input or the config is wrong, 3 a quality gate fell short\n"
               "or a plan does not fit, 130 interrupted, 143 ended by SIGTERM\n"
               "every key of a config: docs/configuration.md")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("--traceback", action="store_true", help="show tracebacks (also: WATCHTOWER_TRACEBACK=1)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    run = commands.add_parser("run", help="the whole way, CRM and CAPTS, from logs to report; what is done already "
                                          "for the same inputs is not done again")
    _takes_config(run)
    for words, (stage, does) in STAGE_COMMANDS.items():
        if len(words) == 1:
            command = commands.add_parser(words[0], help=does)
            command.set_defaults(stage=stage)
            _takes_config(command)
    train = commands.add_parser("train", help="train crm, the towers, or train router")
    kinds = train.add_subparsers(dest="what", metavar="crm|router", required=True)
    for what in ("crm", "router"):
        stage, does = STAGE_COMMANDS["train", what]
        command = kinds.add_parser(what, help=does)
        command.set_defaults(stage=stage)
        _takes_config(command)

    _adds_plan(commands.add_parser("plan", help="where tables would go on devices that are not there, and what a "
                                                "training would need of them"))
    doctor = commands.add_parser("doctor", help="what is installed, what fits together, what is missing, and the fix")
    _takes_config(doctor, nargs="?")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--deep", action="store_true", help="also start a local Ray (10 s)")
    submit.add_commands(commands, _takes_config)

    synth = commands.add_parser("synth", help="write a synthetic world in the log format")
    synth.add_argument("folder", metavar="DIR", help="where to: logs/, items.parquet and world.json")
    for name, kind, meaning in WORLD_DIALS:
        synth.add_argument(f"--{name}", type=kind, default=None, metavar=kind.__name__.upper(), help=meaning)
    synth.add_argument("--processes", type=int, default=None, metavar="INT", help="processes; default: one a core")
    _takes_traceback(synth)
    return parser


def _adds_plan(plan: argparse.ArgumentParser) -> None:
    _takes_config(plan)
    plan.add_argument("--devices", type=int, required=True, metavar="N", help="how many devices, one worker each")
    plan.add_argument("--device", choices=("h100", "h200", "a100", "cpu"), default="h100", help="default: h100")
    plan.add_argument("--per-node", type=int, metavar="N", help="devices of a machine; default: 8 GPUs, 1 CPU worker")
    plan.add_argument("--memory", type=float, metavar="GIB", help="of a device, where it is not the data sheet's")
    plan.add_argument("--items", type=int, metavar="N", help="items of the catalogue, where the run folder has none")
    plan.add_argument("--users", type=int, metavar="N", help="users; a table where data.user_categories has user_id")
    plan.add_argument("--content-dim", type=int, metavar="N", help="width of the items' content vectors")
    plan.add_argument("--rows", action="append", metavar="TABLE=N", help="rows of another table, such as author=90000")
    plan.add_argument("--json", metavar="PATH", help="write the plan as JSON")
    plan.add_argument("--picture", metavar="PATH", help="draw it into an SVG file")


def _takes_config(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs=nargs, help="a YAML file, or the folder of an earlier run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides, such as train.epochs=2")
    parser.add_argument("--log-format", choices=FORMATS, default=None, help="text, or json: one object an event "
                                                                            f"(also: {FORMAT_VARIABLE})")
    _takes_traceback(parser)


def _takes_traceback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _parse(argv: list[str]) -> argparse.Namespace:
    """Arguments, with overrides allowed before and after options."""
    words = [word for word in argv if not word.startswith("-")]
    for command in NOT_BUILT:
        if tuple(words[:len(command)]) == command:
            raise InputError(f"the command `{' '.join(command)}` is not part of this version; "
                             "`watchtower --help` lists what is")
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides"):
        arguments.overrides = [*arguments.overrides, *(r for r in rest if not r.startswith("-"))]
        rest = [r for r in rest if r.startswith("-")]
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if not arguments.version and arguments.command is None:
        parser.error("a command is missing, such as: watchtower run configs/demo.yaml")
    return arguments


# --- the commands -----------------------------------------------------------------------------------------------------

def _run(config: Config, stage: str | None) -> None:
    from launch.doctor import before_run

    before_run(config)
    from launch.stages import run

    run(config, None if stage is None else [stage])


def _synth(arguments: argparse.Namespace) -> None:
    from trainer.world import WorldSpec, write_world

    names = [name.replace("-", "_") for name, _, _ in WORLD_DIALS]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "items" in given:  # a small catalogue has room for fewer tags than the default
        given.setdefault("tags_count", max(1, min(WorldSpec.tags_count, given["items"])))
    begin = time.perf_counter()
    summary = write_world(arguments.folder, WorldSpec(**given), processes=arguments.processes)
    if not summary.written:
        print(f"{summary.folder} holds this world already")
    print(f"{summary.folder}: {summary.users:,} users, {summary.items:,} items, {summary.rows:,} views in "
          f"{summary.files} files" + (f", {time.perf_counter() - begin:.1f} s" if summary.written else ""))
    print(f"to use it: data.logs={summary.folder / 'logs'} data.items={summary.folder / 'items.parquet'}")


# --- errors -----------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is returned."""
    argv = sys.argv[1:] if argv is None else list(argv)
    run_dir: str | None = None
    arguments = None
    try:
        end_on_sigterm()
        arguments = _parse(argv)
        if arguments.traceback:
            os.environ["WATCHTOWER_TRACEBACK"] = "1"
        if getattr(arguments, "log_format", None):
            os.environ[FORMAT_VARIABLE] = arguments.log_format
        if arguments.version:
            print(f"watchtower {version()}")
        elif arguments.command == "synth":
            _synth(arguments)
        elif arguments.command == "plan":
            from launch.plan import run as plan

            plan(arguments)
        elif arguments.command == "doctor":
            from launch.doctor import run as doctor

            return doctor(arguments)
        elif arguments.command in submit.COMMANDS:
            code = submit.act(arguments)
            sys.stdout.flush()
            return code
        else:
            from launch.remote import load_config, working_folder

            config = load_config(arguments.config, arguments.overrides)
            run_dir = str(working_folder(config))
            _run(config, getattr(arguments, "stage", None))
        sys.stdout.flush()
        return 0
    except SystemExit as leaving:
        if arguments is None:  # argparse has said what there is to say
            return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        if (error := why()) is not None:
            return _fail(error, run_dir)
        # Ray's own handler, which is in place while Ray starts, exits with the signal's number; and what our handler
        # raises while Ray waits for something comes out of the wait with the code 1.
        return _interrupted(TERMINATED if is_asked() or leaving.code in (TERMINATED, signal.SIGTERM) else INTERRUPTED)
    except KeyboardInterrupt:
        return _interrupted(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if is_ended() and not isinstance(error, WatchtowerError):
            return _interrupted(TERMINATED)
        return _fail(error, run_dir)


def _interrupted(code: int) -> int:
    """Ctrl-C arrives as a KeyboardInterrupt, or, while Ray Train is at work, as its own SystemExit(1)."""
    _say("interrupted; run the same command again to go on where it stopped")
    return code


def _say(message: str) -> None:
    told = redact(message)
    say(told if is_json() else f"watchtower: {told}", "error", sys.stderr)


def _fail(error: Exception, run_dir: str | None) -> int:
    """One message on stderr; the exit code. The traceback of what nobody foresaw goes to a file."""
    if os.environ.get("WATCHTOWER_TRACEBACK", "") not in ("", "0"):
        import traceback

        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    found = unwrap(error)
    if found is not None:
        _say("\n".join([str(found), *getattr(error, "__notes__", [])]))
        return found.exit_code
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    path = _write_log(error, run_dir)
    _say("\n".join([f"failed: {type(error).__name__}: {first[:300]}", *getattr(error, "__notes__", []),
                    f"details: {path}" if path else "run again with --traceback for details"]))
    return 1


def _write_log(error: Exception, run_dir: str | None) -> Path | None:
    import tempfile
    import traceback

    for folder in (run_dir, tempfile.gettempdir()):
        if folder is None or not Path(folder).is_dir():
            continue
        path = Path(folder) / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        try:
            path.write_text(redact("".join(traceback.format_exception(error))), encoding="utf-8", errors="replace")
        except OSError:
            continue
        return path
    return None


def _inside(error: BaseException) -> list[BaseException]:
    """What an error wraps: by Python's own links, and by those of Ray's tasks and Ray Train's worker groups."""
    found = [getattr(error, "cause", None), getattr(error, "controller_failure", None),
             getattr(error, "training_failed_error", None), getattr(error, "_base_exc", None)]
    failures = getattr(error, "worker_failures", None)
    found += failures.values() if isinstance(failures, dict) else []
    found += getattr(error, "exceptions", ())
    found.append(error.__cause__)  # not __context__: an error while handling one of ours is another error
    return [each for each in found if isinstance(each, BaseException)]


def unwrap(error: BaseException) -> WatchtowerError | None:
    """The error of ours that `error` is or wraps, however deep; None if there is none.

    Errors of Ray's workers arrive wrapped; where only their text came across, it is found by the class name in it. A
    full disk, a missing right and a lack of memory are told as ours: nobody needs a traceback for them.
    """
    seen: set[int] = set()
    queue = [error]
    chain: list[BaseException] = []
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        chain.append(current)
        queue += _inside(current)
    # Ray's own subclass of ours, RayTaskError(InputError), has a traceback for a message: its cause is what we want.
    found = [each for each in chain if isinstance(each, WatchtowerError) and not hasattr(each, "traceback_str")]
    found += [told for each in chain if (told := _told_in_text(str(each))) is not None]
    exact = [each for each in found if each.exit_code != WatchtowerError.exit_code]
    known = [trouble for each in chain if (trouble := _known_trouble(each)) is not None]
    return next(iter([*exact, *known, *found]), None)  # "the workers failed" says less than why they did


# What Ray Data writes behind the message of a task's error.
RAYS_WORDS = ("Failed to apply UDF", "To change retry attempts")


def _told_in_text(text: str) -> WatchtowerError | None:
    """The last of our errors that the text of a traceback names, with its message."""
    import re

    classes = {c.__name__: c for c in (InputError, QualityGateError, WatchtowerError)}
    found = None
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    for at, line in enumerate(lines):
        match = re.match(rf"\s*(?:configs\.errors\.)({'|'.join(classes)}): ?(.*)$", line)
        if match:
            message = [match[2]]
            for more in lines[at + 1:]:
                if not more.strip() or more.startswith(("Traceback ", "ray::", "[Rank", *RAYS_WORDS)):
                    break
                message.append(more)
            found = classes[match[1]]("\n".join(message))
    return found


def _known_trouble(error: BaseException) -> WatchtowerError | None:
    import errno

    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, (InputError, QualityGateError)):
        return None
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if (isinstance(error, OSError) and error.errno in full) or "No space left on device" in str(error):
        return InputError(f"{where}the disk is full: nothing half-written was published; free some space, or set "
                          "run_dir to another disk, and run the same command again")
    if isinstance(error, PermissionError):
        return InputError(f"{where}no permission ({error.strerror or error})")
    if isinstance(error, MemoryError):
        return WatchtowerError("out of memory; a smaller train.batch_rows or fewer train.workers need less")
    return None


if __name__ == "__main__":
    sys.exit(main())
