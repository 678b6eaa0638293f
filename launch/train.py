"""What is trained, each as one Ray Train group: CRM's towers, the tower of the embedding channel, the routers.

A group costs 20 s to start, so a whole list of models and seeds shares one. The workers' own functions are in this
file; what they call knows nothing of Ray. A worker that is lost restarts the group, which passes over what is already
judged or scored and goes on from the newest checkpoint of the rest.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError, LostError, QualityGateError, WatchtowerError
from configs.schema import Config
from configs.secrets import redact, redacted
from embeddings import attempts, elsewhere
from embeddings.attempts import Attempt, Superseded, acting
from embeddings.snapshots import says_disk_full
from embeddings.untrusted import damaged, inside, read_json
from launch.console import say
from launch.nodes import see_folder, tell_owner
from launch.stopping import TERMINATED, asking_first, interrupt, is_asked
from trainer.watchdog import LOOK_S, PROGRESS, Watch, moved

if TYPE_CHECKING:
    from trainer.workers import Workers

CHANNEL_EMBEDDING = "channel-embedding"  # model name of the embedding channel's tower
SILENCE_BEYOND_WATCHDOG_S = 120.0  # a group whose threads cannot run ends itself 60 s after `train.watchdog_s`
ERRORS = {kind.__name__: kind for kind in (WatchtowerError, InputError, QualityGateError)}


def train_crm(config: Config, run_dir: Path) -> dict[str, Any]:
    """Trains and judges all models, then writes metrics.json."""
    return _run_crm(config, run_dir)


def evaluate_crm(config: Config, run_dir: Path) -> dict[str, Any]:
    """Judges anew, from the kept checkpoints, what was judged under another `evaluate` section; writes metrics.json."""
    if all(_is_judged(config, run_dir, model.name, seed) for model in config.crm.models for seed in config.seeds):
        write_results(config, run_dir)
        return {}
    return _run_crm(config, run_dir)


def train_channel_embedding(config: Config, run_dir: Path) -> dict[str, Any]:
    """Trains the unconditioned tower of the embedding channel, slice by slice: one index for each watermark of the
    channels, which has seen nothing at or after it.

    Returns:
        rows, peak_mib, workers_s; indexes: by watermark (ms, a string), the folder of its index below the run folder.
    """
    return _run_group(config, run_dir, CHANNEL_EMBEDDING)


def train_router(config: Config, run_dir: Path) -> dict[str, Any]:
    """Trains every router with every seed and scores the triggers of all test requests with each of them."""
    return _run_group(config, run_dir, "router")


def write_results(config: Config, run_dir: Path) -> None:
    """metrics.json from what the run folder holds, and the pointer to the index that serves."""
    from launch.stages import told
    from trainer.ceiling import synthetic_metrics
    from trainer.results import assemble, unmet, write_metrics, write_pointer

    metrics = told(run_dir / "evaluation", lambda: assemble(run_dir, config) | {
        "synthetic": synthetic_metrics(run_dir, config)})
    write_metrics(run_dir, metrics)
    serving = _summary(run_dir, config.crm.published, config.seeds[0])
    if unmet(metrics, config.gates.at_least):
        print("indexes/serving.json stays as it is: a quality gate (gates.at_least) fell short", flush=True)
    elif serving is not None:
        inside(run_dir, serving["index"]["folder"], "summary.json of the published model")
        write_pointer(run_dir / "indexes" / "serving.json", {
            "model": config.crm.published, "seed": config.seeds[0], "folder": serving["index"]["folder"]})


def _run_crm(config: Config, run_dir: Path) -> dict[str, Any]:
    result = _run_group(config, run_dir, "crm")
    write_results(config, Path(run_dir).absolute())
    return result


def _run_group(config: Config, run_dir: Path, work: str) -> dict[str, Any]:
    """What the workers' function of this name returned, once a group of them has run it.

    A group that fails is started again by Ray Train (`train.max_restarts`). One that was asked to save and end (a node
    is taken away, the cluster has another size) is started again here, however often that happens.

    Raises:
        SystemExit: 143, a SIGTERM asked this driver to end, and training has saved.
    """
    run_dir = Path(run_dir).absolute()
    driver = attempts.acts_for() or attempts.begin_driver(run_dir)
    outcome = _outcome(run_dir, work)
    while True:
        outcome.unlink(missing_ok=True)
        try:
            with _watched_group(config, driver), asking_first(lambda: _ask_to_stop(driver), config.train.grace_s):
                _fit(config, run_dir, work, driver)
        finally:
            attempts.end_groups(driver)
        if is_asked():
            raise SystemExit(TERMINATED)
        told = _read_outcome(outcome)
        if "result" in told:
            return told["result"]
        say(f"training stopped at step {told['step']} ({told['stopped']}); it goes on with another group")


def _fit(config: Config, run_dir: Path, work: str, driver: Attempt) -> None:
    """Runs a group, and the ones that Ray Train starts in its place; returns once one has left an outcome.

    Raises:
        WatchtowerError: what ended it, in one message: a worker's own error, or the first cause that one left.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from launch.local_ray import own_folder, threads_per_worker, worker_limits
    from launch.resources import scaling
    from launch.worker_group import WorkerGroupTrainer, torch_config
    from trainer.shared_memory import BACKEND

    outcome, gpu, (least, most) = _outcome(run_dir, work), wants_gpu(config), worker_limits(config)
    trainer = WorkerGroupTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "run_dir": str(run_dir), "work": work,
                           "threads": threads_per_worker(config), "driver": driver.driver, "place": driver.place},
        scaling_config=ScalingConfig(**scaling(config, gpu, least, most)),
        run_config=RunConfig(name="train" if work == "crm" else f"train-{work}", storage_path=str(run_dir / "ray"),
                             failure_config=FailureConfig(max_failures=config.train.max_restarts),
                             callbacks=_callbacks(driver, outcome, config.train.grace_s)),
        torch_config=torch_config("nccl" if gpu else BACKEND, int(config.train.timeout_s), own_folder()))
    try:
        trainer.fit()
    except Exception as error:
        found = _told(outcome)
        if found is not None:
            raise found from None
        raise WatchtowerError(f"the training workers failed: {_first_cause(driver) or _cause(error)}") from error
    found = _told(outcome)
    if found is not None:
        raise found
    if not outcome.exists():
        raise WatchtowerError("the training workers ended and left no result; another driver may have taken the run "
                              "over")


def _callbacks(driver: Attempt, outcome: Path, grace_s: float) -> list[Any]:
    """What Ray Train's processes do beside their own: a worker hears a SIGTERM, a group saves before it is resized."""
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback

    class HearsSigterm(WorkerCallback):
        def after_init_train_context(self) -> None:  # on the main thread, where signals arrive; training is on another
            _hear_sigterm()

    class SavesBeforeResize(ControllerCallback):
        def before_controller_execute_resize_decision(self, decision: Any) -> None:
            _save_before_resize(driver, outcome, grace_s)

    return [HearsSigterm(), SavesBeforeResize()]


def _ask_to_stop(driver: Attempt) -> bool:
    """Ask the group to save and end; False where there is none that trains."""
    if not _trains(driver):
        return False
    attempts.write_note(driver.folder / "stop.json", {"reason": "SIGTERM to the driver"})
    return True


def _trains(driver: Attempt) -> bool:
    return bool((_alive(driver) or {}).get("training"))


def _alive(driver: Attempt) -> dict[str, Any] | None:
    """The last sign of life of the driver's group: group, beat, training; None where there was none."""
    with contextlib.suppress(WatchtowerError):
        group = attempts.read_record(driver.run_dir).get("group")
        found = attempts.read_note(replace(driver, group=group).folder / "alive.json") if group else None
        return found and {"group": group, **found}
    return None


def _save_before_resize(driver: Attempt, outcome: Path, grace_s: float) -> None:
    """Let a group that trains save a checkpoint; runs in Ray Train's controller, before it ends the group. Of what goes
    wrong here nothing follows: the group is ended, and the next one goes on from the checkpoint before."""
    try:
        see_folder(driver)
        before = _alive(driver)
        if before is None:
            return  # the first group
        time.sleep(3 * LOOK_S)
        after = _alive(driver)
        if after is None or after == before or not after["training"] or after.get("stands"):
            return  # it is dead, or has nothing to save, or waits for a worker that is gone
        attempts.write_note(replace(driver, group=after["group"]).folder / "stop.json",
                            {"reason": "the cluster has another size"})
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and elsewhere.size(outcome) is None:
            time.sleep(LOOK_S)
            if (_alive(driver) or {}).get("stands"):
                return
    except Exception as error:
        say(redact(f"the group was not asked to save before it is ended: {error!r}"), "warning", sys.stderr)


@contextmanager
def _watched_group(config: Config, driver: Attempt) -> Iterator[None]:
    """While the block runs the driver waits for its group, and ends where it has waited `train.wait_s` for a first sign
    of life, or for another one for longer than the group's own watchdog takes."""
    over, wait_s = threading.Event(), config.train.wait_s
    silence_s = max(wait_s, (config.train.watchdog_s or 0.0) + SILENCE_BEYOND_WATCHDOG_S)

    def watch() -> None:
        last, since = None, time.monotonic()
        while not over.wait(LOOK_S):
            beat = _alive(driver)
            moved("the training workers", in_step=False)
            if beat is not None and beat != last:
                last, since = beat, time.monotonic()
                continue
            silent_s = time.monotonic() - since
            if last is None and silent_s > wait_s:
                interrupt(WatchtowerError(
                    f"for {wait_s:g} s (train.wait_s) no group of training workers could start: {_missing(config)}"))
                return
            if last is not None and silent_s > silence_s:
                interrupt(WatchtowerError(
                    f"the training workers have given no sign of life for {silent_s:.0f} s: they cannot reach the run "
                    f"folder, or are gone and no others could start in their place: {_missing(config)}"))
                return

    thread = threading.Thread(target=watch, daemon=True, name="watchtower-group")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _missing(config: Config) -> str:
    """What a group needs, and the cluster lacks of it; raises nothing."""
    import ray

    from launch.local_ray import worker_limits
    from launch.resources import living_nodes, missing_workers

    try:
        least, _ = worker_limits(config)
        found = missing_workers(config, least, wants_gpu(config), living_nodes(), ray.available_resources())
    except Exception as error:  # whatever Ray raises when it is not there any more
        found = f"Ray does not say what the cluster has ({type(error).__name__})"
    return (f"{found}. Add nodes, ask for fewer workers or less for each, or wait longer (train.wait_s); the same "
            "command goes on from the last checkpoint")


def _first_cause(driver: Attempt) -> str | None:
    """What the first worker of the newest group that failed has left."""
    for number in sorted((int(path.name) for path in driver.folder.parent.iterdir() if path.name.isdecimal()),
                         reverse=True):
        if number <= driver.driver:
            return None
        failed = attempts.read_note(driver.folder.parent / str(number) / "failed.json")
        if failed is not None:
            return f"{failed.get('who')}, at {failed.get('at')}: {failed.get('error')}"
    return None


def _outcome(run_dir: Path, work: str) -> Path:
    return run_dir / "stages" / f"{work}.outcome.json"


def wants_gpu(config: Config) -> bool:
    """Whether the workers ask Ray for a GPU each. `auto` goes by the GPUs that are there now; with `cuda` the gang of a
    cluster waits for nodes that are still to come.

    Raises:
        InputError: if `train.device` is cuda and a local Ray, which gets no more, has fewer GPUs than workers.
    """
    from launch.local_ray import ray_address, worker_limits
    from launch.resources import living_nodes, room_for

    if config.train.device == "cpu":
        return False
    nodes, (least, _) = living_nodes(), worker_limits(config)
    enough = room_for(nodes, {"GPU": config.train.gpus_per_worker}, config.train.placement) >= least
    if config.train.device == "cuda" and not enough and ray_address(config) is None:
        gpus = sum(node.resources.get("GPU", 0.0) for node in nodes)
        raise InputError(f"train.device is cuda with train.workers={least}, but this machine has {gpus:g} "
                         "GPUs; lower train.workers or set train.device=cpu")
    return config.train.device == "cuda" or enough


def _told(outcome: Path) -> WatchtowerError | None:
    """The error that a worker left for the driver: it arrives whole, whatever Ray wraps around it."""
    elsewhere.bring(outcome)
    if not outcome.exists():
        return None
    told = _read_outcome(outcome)
    return ERRORS.get(str(told["error"]), WatchtowerError)(str(told.get("message"))) if "error" in told else None


def _read_outcome(outcome: Path) -> dict[str, Any]:
    try:
        return read_json(outcome)
    except (OSError, ValueError) as error:
        raise damaged(outcome, error, "run the stage again") from error


def _cause(error: BaseException) -> str:
    text = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return text[:500]


def _summary(run_dir: Path, model: str, seed: int) -> dict[str, Any] | None:
    try:
        return read_json(run_dir / "evaluation" / model / f"seed={seed}" / "summary.json")
    except (OSError, ValueError):
        return None


def _judgement(config: Config) -> dict[str, Any]:
    return config.evaluate.model_dump(mode="json", exclude={"bootstrap", "split_users"})


def _is_judged(config: Config, run_dir: Path, model: str, seed: int, fingerprint: str | None = None) -> bool:
    found = _summary(run_dir, model, seed)
    return found is not None and found.get("judged") == _judgement(config) and (
        fingerprint is None or found.get("fingerprint") == fingerprint)


def _worker(settings: dict[str, Any]) -> None:
    """What every worker runs. An error of ours is told to the driver through a file and ends the group in order."""
    run_dir = Path(settings["run_dir"])
    outcome, driver = _outcome(run_dir, settings["work"]), Attempt(run_dir, settings["driver"], place=settings["place"])
    try:
        see_folder(driver)
    except WatchtowerError as error:  # a restart cannot mend it
        tell_owner(driver, outcome, {"error": type(error).__name__, "message": f"{socket.gethostname()}: {error}"})
        raise
    if _told(outcome) is not None:
        return  # a restart after an error that a restart cannot mend
    import ray.train
    import torch

    from trainer.workers import Stopped, limit_collectives

    torch.set_num_threads(settings["threads"])
    config = Config.model_validate(settings["config"])
    limit_collectives(config.train.timeout_s)
    workers = _workers()
    attempt = _begin(workers, driver, outcome, settings["work"])

    def tell(error: WatchtowerError) -> None:
        try:
            _write_outcome(outcome, {"error": type(error).__name__, "message": str(error)}, workers.rank)
        except Exception as untold:  # on a full disk, say; the driver has Ray's words for it
            say(redact(f"the driver could not be told of {type(error).__name__}: {untold!r}"), "warning", sys.stderr)

    def fail(error: BaseException) -> None:
        if says_disk_full(error) and not isinstance(error, WatchtowerError):
            tell(InputError(f"{run_dir}: the disk is full; make room and run again, it goes on from the last "
                            "checkpoint"))
        elif isinstance(error, WatchtowerError) and not isinstance(error, (Superseded, LostError)):
            tell(error)
        watch.fail(error)

    with acting(attempt), Watch(attempt, f"rank-{workers.rank}", config.train.watchdog_s, asked=_asked_to_stop(attempt),
                                wish=workers.stop.ask, beats=workers.first, hard=True, on_stuck=tell) as watch:
        try:
            result = _WORK[settings["work"]](config, run_dir, replace(workers, failing=fail))
        except Stopped as stopped:
            if workers.first:
                _write_outcome(outcome, {"stopped": stopped.reason, "step": stopped.step}, workers.rank)
            return
        except BaseException as error:
            fail(error)
            raise
        if workers.first:
            _write_outcome(outcome, {"result": result}, workers.rank)
        ray.train.report({"done": True})


def _begin(workers: Workers, driver: Attempt, outcome: Path, work: str) -> Attempt:
    """The attempt of this group of workers, the same on all of them. Collective."""
    def begin() -> int:
        number = attempts.begin_group(driver, work).group
        elsewhere.take_away(outcome)  # of a group that saved and ended, whose place this one takes
        return number

    return replace(driver, group=workers.agree(workers.on_first(begin)))


_signals: list[str] = []


def _hear_sigterm() -> None:
    """A SIGTERM to this worker becomes a wish to stop while it trains, and what it was before at any other time."""
    before = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: Any) -> None:
        if PROGRESS.training and not _signals:
            _signals.append("SIGTERM to a worker")
        elif callable(before):
            before(number, frame)
        else:
            os._exit(TERMINATED)

    _signals.clear()
    signal.signal(signal.SIGTERM, hear)


def _asked_to_stop(attempt: Attempt) -> Callable[[], str | None]:
    """Why this worker shall save and end: a signal, Ray takes its node away, or a note for the driver or the group."""
    from ray.train.v2._internal.execution.context import get_train_context

    context, notes = get_train_context(), [attempt.of_driver.folder / "stop.json", attempt.folder / "stop.json"]

    def asked() -> str | None:
        if _signals:
            return _signals[0]
        preempted = getattr(context, "preemption_context", None)
        if preempted is not None and preempted.preemption_info is not None:
            return "a node is taken away"
        return next((str(found.get("reason")) for note in notes if (found := attempts.read_note(note))), None)

    return asked


def _write_outcome(outcome: Path, told: dict[str, Any], rank: int) -> None:
    """What the driver reads; a group that was cut off leaves it to its successor."""
    text = json.dumps(redacted(told))
    if (mirror := elsewhere.of(outcome)) is not None:
        with contextlib.suppress(Superseded):
            mirror.put(outcome, text.encode(), attempts.who())
        return
    outcome.parent.mkdir(parents=True, exist_ok=True)
    beside = outcome.with_name(f"{outcome.name}.{rank}.{os.getpid()}")
    beside.write_text(text)
    try:
        with attempts.publishing():
            beside.replace(outcome)
    except Superseded:
        pass
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _event_log(run_dir: Path, first: bool) -> Iterator[Callable[..., None]]:
    """write(event, **fields), which does something on the first worker."""
    from trainer.events import EventLog

    events = EventLog(run_dir / "events.jsonl", run_dir / "tensorboard", rank=0) if first else None

    def write(event: str, **fields: Any) -> None:
        if events is not None:
            events.write(event, **fields)

    try:
        yield write
    finally:
        if events is not None:
            events.close()


def _workers() -> Workers:
    import ray.train.torch

    from trainer.workers import Workers

    return Workers.joined(ray.train.torch.get_device())


def _number() -> int | None:
    """The attempt that this process works for."""
    attempt = attempts.acts_for()
    return None if attempt is None else attempt.number


def _spent(workers, began: datetime.datetime, rows: int) -> dict[str, Any]:
    from trainer.events import memory_mib

    return {"rows": rows, "peak_mib": max(workers.everybody(memory_mib())),
            "workers_s": (datetime.datetime.now(datetime.UTC) - began).total_seconds()}


def _train_and_judge(config: Config, run_dir: Path, workers: Workers) -> dict[str, Any]:
    from trainer.ceiling import write_ceiling
    from trainer.crm_data import CrmData
    from trainer.crm_task import CrmTask, fingerprint
    from trainer.evaluate import evaluate_model, evaluate_popular
    from trainer.loop import train

    data = CrmData(config, run_dir)

    def judged(model: str, seed: int, of: str | None = None) -> bool:
        return workers.agree(_is_judged(config, run_dir, model, seed, of))

    rows = 0
    with _event_log(run_dir, workers.first) as write:
        began = datetime.datetime.now(datetime.UTC)
        write("group", attempt=_number(), workers=workers.count, device=str(workers.device), training_targets=int(
            data.statistics.views_N.sum()), validation_requests=len(data.validation), test_requests=len(data.test))
        summary = {"judged": _judgement(config)}
        if not len(data.test):
            write("warning", message="no view to judge: between split.test_start and split.test_end the judged users "
                                     "have no target view, so metrics.json will hold no measure of retrieval")
        if not judged("popular", 0, data.requests_fingerprint):
            evaluate_popular(data, workers, write, summary | {"fingerprint": data.requests_fingerprint})
        workers.on_first(lambda: write_ceiling(data, write))
        for seed in config.seeds:
            for model in config.crm.models:
                if judged(model.name, seed, fingerprint(data, model)):
                    continue
                trained = train(CrmTask(data, model, seed), workers, write)
                evaluate_model(data, model, trained, workers, write, summary)
                rows += trained.rows
    return _spent(workers, began, rows)


def _train_channel_embedding(config: Config, run_dir: Path, workers: Workers) -> dict[str, Any]:
    from configs.schema import ModelConfig
    from trainer.channels import watermarks
    from trainer.crm_data import CrmData
    from trainer.crm_task import CrmTask
    from trainer.loop import train
    from trainer.sequences import SequenceStore

    channel = config.channels.embedding
    marks = watermarks(config, SequenceStore(run_dir / "sequences").manifest)
    data = CrmData(config, run_dir, slices=list(zip([None, *marks[:-1]], marks, strict=True)))
    model = ModelConfig(name=CHANNEL_EMBEDDING, tower=channel.tower, condition="none", epochs=channel.epochs)
    with _event_log(run_dir, workers.first) as write:
        began = datetime.datetime.now(datetime.UTC)
        write("group", attempt=_number(), workers=workers.count, device=str(workers.device), slices=len(marks),
              training_targets=int(data.statistics.views_N.sum()))
        trained = train(CrmTask(data, model, channel.seed), workers, write)
        if workers.first:
            _only_indexes(run_dir, run_dir / "indexes" / model.name / f"seed={channel.seed}", trained.results)
        workers.barrier()
    # Of the passes over a slice, the last one is in use.
    return _spent(workers, began, trained.rows) | {
        "indexes": {str(index.watermark_ms): index.folder for index in trained.results}}


def _only_indexes(run_dir: Path, folder: Path, indexes: list[Any]) -> None:
    """Deletes the indexes of an earlier training: of a watermark the channel takes the newest one, by its step."""
    from embeddings.snapshots import list_snapshots, remove

    ours = {run_dir / index.folder for index in indexes}
    for snapshot in list_snapshots(folder):
        if snapshot.path not in ours:
            remove(snapshot.path)


def _train_routers(config: Config, run_dir: Path, workers: Workers) -> dict[str, Any]:
    from trainer.item_value import fit_item_value
    from trainer.loop import train
    from trainer.router_data import RouterData
    from trainer.router_task import RouterTask, is_scored, score_requests
    from trainer.triggers import is_validation_user

    # Routers of all features read it, and so do selectors and the joint assignment of the routing stage.
    workers.on_first(lambda: fit_item_value(config, run_dir, lambda user_ids: ~is_validation_user(user_ids, config)))
    data = RouterData(config, run_dir)
    data.write_features(workers)
    rows = 0
    with _event_log(run_dir, workers.first) as write:
        began = datetime.datetime.now(datetime.UTC)
        write("group", attempt=_number(), workers=workers.count, device=str(workers.device),
              training_requests=int(data.fit_counts.sum()), validation_requests=int(data.validation_counts.sum()))
        for seed in config.seeds:
            for model in config.router.models:
                task = RouterTask(data, model, seed)
                if workers.agree(is_scored(task)):
                    continue
                trained = train(task, workers, write)
                score_requests(task, trained, workers, write)
                rows += trained.rows
    return _spent(workers, began, rows)


_WORK = {"crm": _train_and_judge, CHANNEL_EMBEDDING: _train_channel_embedding, "router": _train_routers}
