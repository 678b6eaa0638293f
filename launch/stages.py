"""The order of the stages, and which of them are already done for the same inputs.

    ingest ─┬─ crm ─ evaluate ──────────────────┬─ report
            └─ channels ─ replay ─ router ─ routing ─┘

`evaluate` judges CRM, `routing` CAPTS; a config or a command line that says evaluate means those of the two whose
towers or routers it asks for. A stage's inputs are the config sections that can change its result, the files that it
reads, and the inputs of the stages before it, hashed. When it is done, `stages/<stage>.json` in the run folder says for
which inputs; as long as they are the same and what it wrote is there, it is not done again. How a run is done (workers,
threads, logging) is no input. A stage that is asked for runs after those that it needs and that are not done yet, and
nothing else runs.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError, QualityGateError, WatchtowerError
from configs.loader import changed_keys, config_hash, plain, require_logs, save_resolved
from configs.schema import HOW_INDEXED, HOW_TRAINED, SEEN_IN_TRAINING, Config
from configs.secrets import redacted
from embeddings import attempts, elsewhere
from embeddings.snapshots import MANIFEST, remove, verify
from embeddings.untrusted import read_json
from launch.console import is_json, json_line, say
from launch.nodes import folder_for_nodes
from launch.observe import observed
from launch.remote import worked_in, working_folder
from launch.resources import waiting_for_room
from launch.run_folder import locked, make_run_folder, sweep
from launch.stopping import TERMINATED, interrupt, is_asked, telling_why
from trainer.events import EventLog, follow, seconds_text
from trainer.watchdog import Watch, moved

# Keys that say how a run is done; with other values the results are the same up to rounding.
WHERE_THE_DATA_ARE = {"logs", "items", "users", "synth"}
MISSING = "missing: "
METRICS = "metrics.json"
VERIFIED_AT_ONCE = 8  # threads that read published folders against their checksums


@dataclass(frozen=True)
class Stage:
    """One stage: `call` names the function (module:function) that takes (config, run_dir) and returns None or a dict.

    Of the dict, `rows` (and `peak_mib`, if it is more than was seen here) are noted; the rest is kept with them.
    needs: the stages whose results it reads, for a config. snapshots: patterns of the folders with a manifest that it
    publishes and that later stages read. files: patterns of files that it writes for others and that no stage reads.
    pointers: files that say what serves, written where no gate falls short.
    """

    name: str
    needs: Callable[[Config], tuple[str, ...]]
    call: str
    outputs: tuple[str, ...]
    reads: Callable[[Config], dict[str, Any]]
    on_ray: bool
    snapshots: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    pointers: tuple[str, ...] = ()


def _without(section: Any, keys: Set[str]) -> dict[str, Any]:
    return {key: value for key, value in plain(section).items() if key not in keys}


def _reads_ingest(config: Config) -> dict[str, Any]:
    return {"data": _without(config.data, WHERE_THE_DATA_ARE), "source": data_source(config)}


def _reads_crm(config: Config) -> dict[str, Any]:
    return {"split": plain(config.split), "crm": _without(config.crm, {"publish"}), "seeds": list(config.seeds),
            "train": _without(config.train, HOW_TRAINED), "index": _without(config.index, HOW_INDEXED),
            "evaluate": {key: value for key, value in plain(config.evaluate).items() if key in SEEN_IN_TRAINING},
            "test_users": _test_users_file(config)}


def _reads_evaluate(config: Config) -> dict[str, Any]:
    return {"evaluate": plain(config.evaluate), "crm": {"publish": config.crm.publish}}


def _reads_channels(config: Config) -> dict[str, Any]:
    channels = config.channels
    known = {name.replace("-", "_"): name in channels.names for name in ("swing", "embedding", "content", "session",
                                                                         "pairwise-lr")}
    read = _without(channels, {section for section, used in known.items() if not used} | {"before_first"})
    tower = {}
    if "embedding" in channels.names and channels.embedding.source == "crm":
        tower = {"crm": _without(config.crm, {"models", "publish"}), "train": _without(config.train, HOW_TRAINED),
                 "index": _without(config.index, HOW_INDEXED), "routing": {"test_users": config.routing.test_users}}
    return {"channels": read, **tower, "split": plain(config.split), "test_users": _test_users_file(config),
            "train.slices": config.train.slices, "requests": _cuts(config)}


def _cuts(config: Config) -> dict[str, Any]:
    """What of the requests decides the watermarks."""
    requests = config.replay.requests
    return plain({"train": requests.train_cuts, "test": requests.test_cuts})


def _reads_replay(config: Config) -> dict[str, Any]:
    windows = sorted({m.window for m in config.router.models if m.window})
    return {"replay": _without(config.replay, {"shards_at_once"}), "windows": windows,
            "channels": {"before_first": config.channels.before_first, "rollback_min": config.channels.rollback_min},
            "routing": {"test_users": plain(config.routing.test_users)}}


def _reads_router(config: Config) -> dict[str, Any]:
    return {"router": plain(config.router), "seeds": list(config.seeds), "train": _without(config.train, HOW_TRAINED),
            "routing": {"beta": config.routing.beta, "seed": config.routing.seed},
            "scored": ["test", "validation"],
            "crm": {"condition": plain(config.crm.condition),
                    **({"publish": config.crm.published} if config.router.from_crm else {})}}


def _reads_routing(config: Config) -> dict[str, Any]:
    return {"routing": plain(config.routing)}


def _reads_report(config: Config) -> dict[str, Any]:
    return {"name": config.name, "gates": plain(config.gates)}


def judgements(asked: Set[str]) -> set[str]:
    """The stages that judge what is asked for: CRM's where its towers are, CAPTS's where its routers are; both where
    neither is named."""
    towers, routers = "crm" in asked, "router" in asked
    return {name for name, wanted in (("evaluate", towers or not routers), ("routing", routers or not towers))
            if wanted}


def _always(*names: str) -> Callable[[Config], tuple[str, ...]]:
    return lambda config: names


STAGES = {stage.name: stage for stage in (
    Stage("ingest", _always(), "launch.stages:ingest", ("sequences/manifest.json",), _reads_ingest, on_ray=True,
          snapshots=("sequences",)),
    Stage("crm", _always("ingest"), "launch.train:train_crm", ("indexes",), _reads_crm, on_ray=True,
          snapshots=("evaluation/*/seed=*",)),
    Stage("evaluate", _always("ingest", "crm"), "launch.train:evaluate_crm", ("metrics.json",), _reads_evaluate,
          on_ray=True, pointers=("indexes/serving.json",)),
    Stage("channels", _always("ingest"), "launch.stages:channels", ("channels",), _reads_channels,
          on_ray=True, snapshots=("channels/*/*",)),
    Stage("replay", _always("ingest", "channels"), "launch.replay:replay_labels", ("labels/manifest.json",),
          _reads_replay, on_ray=True, snapshots=("labels",)),
    Stage("router", lambda config: ("ingest", "channels", "replay", *(("crm",) if config.router.from_crm else ())),
          "launch.train:train_router", ("evaluation/routing",), _reads_router, on_ray=True,
          snapshots=("item_value", "evaluation/routing/*/seed=*")),
    Stage("routing", _always("ingest", "channels", "replay", "router"), "launch.stages:routing",
          ("metrics.json", "evaluation/routing/metrics.json"), _reads_routing, on_ray=True,
          files=("routing/*.parquet",), pointers=("routing/serving.json",)),
    Stage("report", lambda config: tuple(sorted(judgements(set(config.stages)))), "launch.stages:report",
          ("report.html",), _reads_report, on_ray=False),
)}


# --- inputs -----------------------------------------------------------------------------------------------------------

def data_source(config: Config) -> dict[str, Any]:
    """What the logs, the catalogue and the users are: the world's dials, or every file with its size and time.

    Where the files are cannot change a result, so the folder's own place is left out. A place that is gone is None.
    """
    if config.data.logs is None or _is_own_world(config):
        return {"synth": plain(config.data.synth)}
    return {key: _files(getattr(config.data, key), f"data.{key}", config.data.format)
            for key in ("logs", "items", "users")}


def _is_own_world(config: Config) -> bool:
    """Whether `data.logs` is what `with_world` set: the world in the run folder."""
    world = Path(config.run_dir).expanduser().absolute() / "world"
    return config.data.synth is not None and config.data.logs == str(world / "logs")


def _files(location: str | None, key: str, layout: str) -> list[list[Any]] | str | None:
    if location is None:
        return None
    from trainer.logs import list_files

    suffixes = (".csv", ".parquet", ".parq", ".pq") if layout == "kuairand_csv" else (".parquet", ".parq", ".pq")
    try:
        files = list_files(location, key, suffixes)
    except InputError as error:
        return f"{MISSING}{error}"
    root = os.path.commonpath([os.path.dirname(f.path) for f in files])
    return [[os.path.relpath(f.path, root), f.size, f.modified_ns] for f in files]


def _test_users_file(config: Config) -> list[list[Any]] | str | None:
    place = config.split.test_users
    return _files(place, "split.test_users", "parquet") if isinstance(place, str) else None


@dataclass(frozen=True)
class Inputs:
    """What a stage's result depends on: readable, and as one hash. needs: the stages before it that it reads."""

    reads: dict[str, Any]
    hash: str
    needs: tuple[str, ...]


def stage_inputs(config: Config, run_dir: Path) -> dict[str, Inputs]:
    """The inputs of every stage. Logs that are gone count as the ones that were ingested."""
    found: dict[str, Inputs] = {}
    for stage in STAGES.values():
        reads = stage.reads(config)
        if stage.name == "ingest":
            reads = _with_gone_files(reads, _read_json(run_dir / "stages" / "inputs" / "ingest.json") or {})
        needs = stage.needs(config)
        upstream = {name: found[name].hash for name in needs}
        found[stage.name] = Inputs(reads, config_hash({"stage": stage.name, "reads": reads, "needs": upstream}), needs)
    return found


def _with_gone_files(reads: dict[str, Any], ingested: dict[str, Any]) -> dict[str, Any]:
    before = ingested.get("source") or {}
    source = {key: before[key] if isinstance(value, str) and before.get(key) else value
              for key, value in reads["source"].items()}
    return {**reads, "source": source}


# --- what is done -----------------------------------------------------------------------------------------------------

def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(redacted(value), indent=1) + "\n", encoding="utf-8")
        with attempts.publishing():
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def marker(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """What is noted of a stage that was done: inputs (hash), seconds, rows, peak_mib, finished; None if it was not."""
    return _read_json(run_dir / "stages" / f"{stage}.json")


def is_done(run_dir: Path, stage: Stage, inputs: Inputs) -> bool:
    """Done for the same inputs, and what it wrote is still there."""
    found = marker(run_dir, stage.name)
    return found is not None and found.get("inputs") == inputs.hash and not _lost(run_dir, stage)


def _lost(run_dir: Path, stage: Stage) -> list[str]:
    """The outputs that are gone, or are not what the stage wrote, and its pointers that are damaged."""
    written = (marker(run_dir, stage.name) or {}).get("written")
    written = written if isinstance(written, dict) else {}
    files = [name for name in written if any(_fits(name, pattern) for pattern in stage.files)]
    return [*(name for name in (*stage.outputs, *files) if not _is_as_written(run_dir, name, written.get(name))),
            *_damaged_pointers(run_dir, stage)]


def _fits(name: str, pattern: str) -> bool:
    """Whether a marker's name is of a stage's pattern, and so leads nowhere else."""
    return fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


def _damaged_pointers(run_dir: Path, stage: Stage) -> list[str]:
    return [name for name in stage.pointers if (run_dir / name).exists() and not _has_its_checksum(run_dir / name)]


def _has_its_checksum(path: Path) -> bool:
    from trainer.results import is_whole

    return is_whole(_read_json(path))


def _is_as_written(run_dir: Path, name: str, digest: str | None) -> bool:
    """Whether an output is there and what was written: by its digest, where one was noted; metrics.json, into which
    later stages write too, by its own checksum."""
    path = run_dir / name
    if name == METRICS:
        return _has_its_checksum(path)
    return path.exists() and (digest is None or _digest(path) == digest)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drop_damaged(run_dir: Path, to_run: list[str], inputs: dict[str, Inputs]) -> list[str]:
    """Removes damaged snapshots of the stages that are done and that the stages to run are going to read, with those
    stages' markers: what they made is made anew, and nothing is computed from a flipped byte.

    Returns:
        What was found, in words.
    """
    read = {needed for name in to_run for needed in inputs[name].needs} - set(to_run)
    found = []
    for name in [name for name in STAGES if name in read]:
        folders = [path for pattern in STAGES[name].snapshots for path in sorted(run_dir.glob(pattern))
                   if not path.name.startswith(".") and (path / MANIFEST).exists()]
        with ThreadPoolExecutor(VERIFIED_AT_ONCE) as pool:
            told = [why for why in pool.map(_damage, folders) if why is not None]
        for folder, why in told:
            remove(folder)
            found.append(why)
        if told:
            (run_dir / "stages" / f"{name}.json").unlink(missing_ok=True)
    return found


def _damage(folder: Path) -> tuple[Path, str] | None:
    try:
        verify(folder)
    except WatchtowerError as error:
        return folder, str(error)
    return None


def why_again(run_dir: Path, stage: Stage, inputs: Inputs) -> str | None:
    """Why a stage that was done once is done again, for people; None if it never was."""
    found = marker(run_dir, stage.name)
    if found is None:
        return None
    if found.get("inputs") == inputs.hash:
        return f"{', '.join(_lost(run_dir, stage))} is gone or damaged"
    before = _read_json(run_dir / "stages" / "inputs" / f"{stage.name}.json") or {}
    changed = changed_keys(before, inputs.reads)
    if not changed:
        return "a stage before it has other inputs"
    return "changed: " + "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")


def stages_to_run(run_dir: Path, asked: list[str], inputs: dict[str, Inputs]) -> list[str]:
    """The stages that are asked for and not done, with those that they need and that are not done, in order."""
    wanted: set[str] = set()

    def want(name: str) -> None:
        if name not in wanted and not is_done(run_dir, STAGES[name], inputs[name]):
            wanted.add(name)
            for needed in inputs[name].needs:
                want(needed)

    for name in asked:
        want(name)
    again = True
    while again:  # what is asked for and comes after a stage that runs, runs too: its inputs are being made anew
        late = [name for name in STAGES if name in asked and name not in wanted and wanted & set(inputs[name].needs)]
        for name in late:
            wanted.add(name)
            for needed in inputs[name].needs:
                want(needed)
        again = bool(late)
    return [name for name in STAGES if name in wanted]


# --- doing it ---------------------------------------------------------------------------------------------------------

def run(config: Config, only: list[str] | None = None) -> Path:
    """Run the stages that the config (or `only`) asks for, show what they say, and judge the quality gates.

    Returns:
        The run folder; where run_dir is a URL, the folder that was worked in.

    Raises:
        InputError: the config asks for what is not there.
        QualityGateError: everything ran, and a measured quality is below its gate.
        WatchtowerError: another process writes this run folder.
    """
    wanted = set(only or config.stages)
    if "evaluate" in wanted:
        wanted = wanted - {"evaluate"} | judgements(set(config.stages))
    elif only is None and wanted & {"crm", "router"}:
        wanted |= judgements(wanted)  # towers are judged as they are trained; this adds only what was asked for since
    asked = [name for name in STAGES if name in wanted]
    require_logs(config)
    given, run_dir = config, make_run_folder(str(working_folder(config)))
    with _no_empty_folder(run_dir), locked(run_dir), _own_again(run_dir), worked_in(config, run_dir, say) as config:
        sweep(run_dir)
        inputs = stage_inputs(config, run_dir)
        to_run = stages_to_run(run_dir, asked, inputs)
        while damaged := drop_damaged(run_dir, to_run, inputs):
            say("\n".join(f"warning: {why}; it is made anew" for why in damaged))
            to_run = stages_to_run(run_dir, asked, inputs)
        _check_files(to_run, inputs)
        for name in asked:
            if name not in to_run:
                say(f"{name}: already done for the same inputs")
        save_resolved(given, run_dir / "config.yaml")
        if to_run:
            with _attempt(config, run_dir):
                _run_stages(with_world(config, run_dir), run_dir, to_run, inputs)
        if wanted & {"crm", "evaluate", "router", "routing", "report"}:
            show_results(run_dir)
            judge(config, run_dir, partly=only is not None)
    return run_dir


@contextlib.contextmanager
def _attempt(config: Config, run_dir: Path) -> Iterator[None]:
    """This driver's attempt at the run, watched over: what stands still, or was cut off, ends."""
    with attempts.acting(attempts.begin_driver(run_dir)) as attempt, Watch(attempt, "driver", config.train.watchdog_s,
                                                                           end=interrupt):
        yield


@contextlib.contextmanager
def _own_again(run_dir: Path) -> Iterator[None]:
    """What this node kept of the run while another node had its folder goes: it is not whole."""
    if elsewhere.clear_mirror(run_dir):
        say(f"{run_dir}: held what this node had read of a run whose driver was on another node, and is emptied")
    yield


@contextlib.contextmanager
def _no_empty_folder(run_dir: Path) -> Iterator[None]:
    """A run that ends before it wrote anything leaves no folder behind. What is in its place when a shared file system
    is away is a folder to mount it on, and stays."""
    own = run_dir.stat()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(own, run_dir.stat()):
                run_dir.rmdir()


def _check_files(to_run: list[str], inputs: dict[str, Inputs]) -> None:
    """Raise an `InputError` at once where files are missing that a stage is going to read."""
    places: list[Any] = []
    if "ingest" in to_run:
        places += inputs["ingest"].reads["source"].values()
    if set(to_run) - {"ingest", "report"}:
        places.append(inputs["crm"].reads["test_users"])
    missing = [place.removeprefix(MISSING) for place in places if isinstance(place, str)]
    if missing:
        raise InputError("\n".join(missing))


def with_world(config: Config, run_dir: Path) -> Config:
    """The config with `data.logs` and `data.items` set to the synthetic world's files, where it stands in for logs."""
    if config.data.logs is not None:
        return config
    world = run_dir / "world"
    data = config.data.model_copy(update={"logs": str(world / "logs"), "items": str(world / "items.parquet")})
    return config.model_copy(update={"data": data})


def write_synthetic_world(config: Config, run_dir: Path, check: bool = True) -> int:
    """Write the world that stands in for logs, unless it is there; another or a damaged one in its place makes room.

    Args:
        check: read its files against their checksums.

    Returns:
        Its number of views.
    """
    from trainer.world import WorldSpec, is_whole, read_spec, write_world

    synth = plain(config.data.synth)
    spec = WorldSpec(**synth, tags_count=min(WorldSpec.tags_count, synth["items"]))
    folder = run_dir / "world"
    for left in run_dir.glob(".world-*.tmp"):  # of a run that was killed; this one has the folder's lock
        shutil.rmtree(left, ignore_errors=True)
    if folder.exists():
        try:
            same = read_spec(folder) == spec and (not check or is_whole(folder))
        except InputError:
            same = False
        if not same:
            aside = folder.rename(folder.with_name(f".world-{os.getpid()}.tmp"))
            shutil.rmtree(aside, ignore_errors=True)
    return write_world(folder, spec).rows


def _run_stages(config: Config, run_dir: Path, names: list[str], inputs: dict[str, Inputs]) -> None:
    stop = threading.Event()
    with contextlib.ExitStack() as held:
        log = held.enter_context(EventLog(run_dir / "events.jsonl"))
        shown = follow(run_dir / "events.jsonl", stop, line_of=json_line if is_json() else None)
        held.callback(shown.join)
        held.callback(stop.set)
        held.enter_context(observed(config, run_dir, log))
        for name in names:
            reason = why_again(run_dir, STAGES[name], inputs[name])
            if reason is not None:
                log.write("stage", stage=name, status="again", why=reason)
        if _is_own_world(config) and names != ["report"]:
            write_synthetic_world(config, run_dir, check="ingest" in names)
        cluster = None
        for name in names:
            if is_asked():  # a SIGTERM that came to a group which had no step left to stop at
                raise SystemExit(TERMINATED)
            if STAGES[name].on_ray and cluster is None:
                from launch.local_ray import start_ray

                cluster = held.enter_context(start_ray(config))
                log.write("cluster", cluster=str(cluster), start_s=round(cluster.seconds, 2))
                if cluster.address is not None:
                    held.enter_context(folder_for_nodes())
            _run_one(STAGES[name], config, run_dir, inputs[name], log)


def _run_one(stage: Stage, config: Config, run_dir: Path, inputs: Inputs, log: EventLog) -> None:
    module, _, function = stage.call.partition(":")
    call = getattr(importlib.import_module(module), function)
    for later in _after(stage.name, config):
        if later == "routing":  # else an older judgement would go on in metrics.json
            (run_dir / "evaluation" / "routing" / "metrics.json").unlink(missing_ok=True)
        (run_dir / "stages" / f"{later}.json").unlink(missing_ok=True)
    for name in _damaged_pointers(run_dir, stage):  # where a gate falls short the stage leaves what is there
        (run_dir / name).unlink()
    log.write("stage", stage=stage.name, status="started")
    moved(f"stage {stage.name}")
    begin = time.perf_counter()
    try:
        with peak_memory() as peak, telling_why():
            result = call(config, run_dir) or {}
    except BaseException as error:
        status = "failed" if isinstance(error, Exception) else "interrupted"
        log.write("stage", stage=stage.name, status=status, seconds=round(time.perf_counter() - begin, 2),
                  error=type(error).__name__)
        raise
    noted = {**result, "stage": stage.name, "inputs": inputs.hash, "seconds": round(time.perf_counter() - begin, 3),
             "rows": result.get("rows"), "peak_mib": round(max(peak[0], result.get("peak_mib") or 0.0), 1),
             "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    lost = _lost(run_dir, stage)
    if lost:
        raise WatchtowerError(f"stage {stage.name} ended, but did not write {', '.join(lost)}")
    files = [path.relative_to(run_dir).as_posix() for pattern in stage.files for path in sorted(run_dir.glob(pattern))]
    noted["written"] = {name: _digest(run_dir / name) for name in (*stage.outputs, *files)
                        if name != METRICS and (run_dir / name).is_file()}
    _write_json(run_dir / "stages" / "inputs" / f"{stage.name}.json", plain(inputs.reads))
    _write_json(run_dir / "stages" / f"{stage.name}.json", noted)
    _note_in_metrics(run_dir)
    log.write("stage", stage=stage.name, status="done", seconds=noted["seconds"], rows=noted["rows"],
              peak_mib=noted["peak_mib"])


def _after(name: str, config: Config) -> list[str]:
    """The stage itself and every stage that needs it, however far."""
    found = [name]
    for stage in STAGES.values():
        if stage.name not in found and set(found) & set(stage.needs(config)):
            found.append(stage.name)
    return found


@contextlib.contextmanager
def peak_memory(every_s: float = 0.5) -> Iterator[list[float]]:
    """The most memory, in MiB, that this process and its children held at once while the block ran, as `found[0]`.

    Resident sets added up, so that pages which several of them share count in each; other machines are not seen.
    """
    found = [_tree_mib()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            found[0] = max(found[0], _tree_mib())

    thread = threading.Thread(target=watch, daemon=True, name="watchtower-memory")
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found[0] = max(found[0], _tree_mib())


def _tree_mib() -> float:
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total / 2**20


def _note_in_metrics(run_dir: Path) -> None:
    """Keep the `stages` part of metrics.json current: a stage's own numbers are known only when it has ended."""
    path = run_dir / "metrics.json"
    metrics = _read_json(path)
    if metrics is not None:
        from trainer.results import write_metrics

        noted = {name: found for name in STAGES if (found := marker(run_dir, name))}
        write_metrics(run_dir, {**metrics, "stages": {
            name: {key: found.get(key) for key in ("seconds", "rows", "peak_mib")} for name, found in noted.items()}})


def ingest(config: Config, run_dir: Path) -> dict[str, Any]:
    """Read the logs into sequences, on Ray Data."""
    from launch.ingest import RayExecutor
    from launch.ingest import ingest as ingest_logs

    with waiting_for_room(config, "ingest"):
        summary = ingest_logs(config.data, run_dir, RayExecutor(config.ray.ingest_tasks, config.ray.ingest_cpus),
                              say=say)
    say(str(summary))
    return {"rows": summary.statistics["rows"], "quarantined": summary.quarantined}


def channels(config: Config, run_dir: Path) -> dict[str, Any]:
    """Publish the channels' snapshots; the embedding channel's tower is trained before, where it has one."""
    from launch.channels import build_channels
    from launch.train import train_channel_embedding

    trained = {}
    if "embedding" in config.channels.names and config.channels.embedding.source == "crm":
        trained = {"tower": train_channel_embedding(config, run_dir)}
    with waiting_for_room(config, "channels"):
        found = build_channels(config, run_dir, say=say)
    with EventLog(run_dir / "events.jsonl") as log:
        for event in newest_snapshots(found, run_dir):
            log.write("snapshot", show=False, **event)
    return {**found, **trained}


def newest_snapshots(built: dict[str, Any], run_dir: Path) -> list[dict[str, Any]]:
    """Of every channel that was built: channel, watermark_ms of the newest snapshot, lag_s from there to the newest
    event of the logs, and its items."""
    from trainer.sequences import SequenceStore

    last_ms = SequenceStore(run_dir / "sequences").manifest["statistics"]["last_timestamp_ms"]
    newest_ms = max(built["watermarks"], default=None)
    if newest_ms is None or last_ms is None:
        return []
    return [{"channel": name, "watermark_ms": newest_ms, "lag_s": max(0, last_ms - newest_ms) / 1000,
             "items": channel["items"]} for name, channel in built["channels"].items()]


def routing(config: Config, run_dir: Path) -> dict[str, Any]:
    """Judge the routers beside every selector, and write what was found into metrics.json."""
    from launch.routing import evaluate_routing
    from launch.train import write_results

    with waiting_for_room(config, "routing"):
        result = evaluate_routing(config, run_dir)
    write_results(config, run_dir)
    return result


def report(config: Config, run_dir: Path) -> dict[str, Any] | None:
    """Write report.html from what the run folder holds."""
    from trainer.report import write_report

    found = told(run_dir / "metrics.json", lambda: write_report(run_dir))
    return found if isinstance(found, dict) else None


def read_metrics(run_dir: Path) -> dict[str, Any] | None:
    """What was measured; None where there is nothing yet, or nothing that reads."""
    return _read_json(run_dir / "metrics.json")


def told(path: Path, tell: Callable[[], Any]) -> Any:
    """What `tell` makes of the numbers of a file of this run.

    Raises:
        WatchtowerError: the file holds something else than a run writes. It is read in too many places to check each.
    """
    try:
        return tell()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise WatchtowerError(f"{path}: is not what a run writes ({type(error).__name__}: {str(error)[:200]}); remove "
                              "it and run its stage again") from error


def show_results(run_dir: Path) -> None:
    """Print the table of results and the path of the report."""
    metrics = read_metrics(run_dir)
    if metrics is None:
        return
    from trainer.report import results_table

    say(f"\n{told(run_dir / 'metrics.json', lambda: results_table(metrics))}\n")
    seconds = told(run_dir / "metrics.json", lambda: sum(
        float(found.get("seconds") or 0) for found in (metrics.get("stages") or {}).values()))
    if seconds:
        say(f"stages: {seconds_text(seconds)} in all")
    for name, path in (("metrics", run_dir / "metrics.json"), ("report", run_dir / "report.html")):
        if path.exists():
            say(f"{name}: {path}")


def judge(config: Config, run_dir: Path, partly: bool = False) -> None:
    """Hold metrics.json against the quality gates.

    Args:
        partly: one stage was asked for by itself, which cannot measure everything: gates on what was not measured wait.

    Raises:
        QualityGateError: naming every gate that fell short, with what was measured.
    """
    if not config.gates.at_least:
        return
    from trainer.results import failed_gates, value_at

    metrics = read_metrics(run_dir) or {}
    gates = config.gates.at_least
    if partly:
        gates = {path: least for path, least in gates.items() if value_at(metrics, path) is not None}
        if len(gates) < len(config.gates.at_least):
            say(f"quality gates: {len(config.gates.at_least) - len(gates)} of {len(config.gates.at_least)} are about "
                "what is not measured yet")
    failed = failed_gates(metrics, gates)
    if failed:
        count = f"{len(failed)} of {len(gates)} quality gates (gates.at_least) fell short:\n    "
        kept = "\nserving.json still names what served before; what was measured is kept in " + str(run_dir)
        raise QualityGateError(count + "\n    ".join(failed) + kept)
    if gates:
        say(f"quality gates: all {len(gates)} met")
