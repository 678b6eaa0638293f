"""From the evaluation of every model and seed to one `metrics.json`.

The evaluation writes a folder for each model and seed, whole or not at all:

    evaluation/<model>/seed=<s>/queries.parquet   one row a query: query_id, user_id, timestamp_ms, watch_time_s,
                                                  target_item_id, and float32 columns `<strategy>.<metric>`
                                curve.json        [{condition_s, retrieved_watch_s, recall@100, bucket_lift, n}, ..]
                                summary.json      {epoch, train_s, index: {recall_vs_exact, build_s, bytes}, ..}

`write_evaluation` and `load_evaluations` are the two sides of that format; `assemble` joins the seeds, puts bootstrap
intervals on the means and adds where the numbers come from. Undefined values are NaN in Parquet and null in JSON.

Shape suffixes: S = seeds, Q = queries, M = metrics.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError, WatchtowerError
from configs.loader import config_hash
from configs.schema import Config, ModelConfig, bayes_name
from embeddings import attempts, elsewhere
from embeddings.snapshots import publish
from embeddings.untrusted import read_json, read_parquet
from trainer.checks import crm_checks
from trainer.metrics import bootstrap_cis, paired_ci

QUERY_COLUMNS = ("query_id", "user_id", "timestamp_ms", "watch_time_s", "target_item_id")
BASELINES = ("popular",)
CHECKSUM = "sha256"
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "ray", "faiss-cpu", "faiss-gpu", "numpy",
            "pyarrow")


@dataclass(frozen=True)
class Evaluation:
    """What one model was measured at: the same queries for all its seeds."""

    name: str
    seeds: tuple[int, ...]
    requests: str
    """Hash of who asked, when, and for which item: only the same requests can be compared."""

    query_id_Q: np.ndarray
    user_id_Q: np.ndarray
    values: dict[str, dict[str, np.ndarray]]
    """strategy: metric: float32 (S, Q), NaN = not defined."""

    curves: dict[int, list[dict[str, Any]]]
    """seed: points of the control curve; empty for a model that has none."""

    summaries: dict[int, dict[str, Any]]


def write_evaluation(run_dir: str | Path, model: str, seed: int, queries: Mapping[str, Any],
                     metrics: Mapping[str, Mapping[str, np.ndarray]], curve: Sequence[Mapping[str, Any]] | None,
                     summary: Mapping[str, Any]) -> Path:
    """Publishes what one model and seed was measured at, replacing what stood there.

    Args:
        run_dir: the run folder.
        model: name in metrics.json.
        seed: of the model.
        queries: the QUERY_COLUMNS, (Q,) each; further columns without a dot in their name are kept.
        metrics: strategy: metric: float (Q,), as `retrieval_metrics` and its siblings give them.
        curve: what `control_curve` gave, or None for a model without conditions.
        summary: epoch, train_s, index, and whatever else is known of this training (README of the format above).

    Returns:
        The folder.

    Raises:
        ValueError: if a query column is missing or a metric does not have one value a query.
    """
    missing = [name for name in QUERY_COLUMNS if name not in queries]
    if missing:
        raise ValueError(f"the queries lack {', '.join(missing)}")
    columns = {name: pa.array(values) for name, values in queries.items()}
    for strategy, values in metrics.items():
        columns |= {f"{strategy}.{metric}": pa.array(np.asarray(v, dtype=np.float32)) for metric, v in values.items()}
    wrong = [name for name, column in columns.items() if len(column) != len(columns["query_id"])]
    if wrong:
        raise ValueError(f"not one value a query: {', '.join(wrong)}")
    folder = Path(run_dir) / "evaluation" / model / f"seed={seed}"

    def write(attempt: Path) -> None:
        pq.write_table(pa.table(columns), attempt / "queries.parquet")
        (attempt / "curve.json").write_text(_json(list(curve or [])))
        (attempt / "summary.json").write_text(_json(dict(summary)))

    publish(folder, write, {"kind": "evaluation", "model": model, "seed": seed}, replace=True)
    return folder


def load_evaluations(run_dir: str | Path, config: Config) -> tuple[dict[str, Evaluation], list[str]]:
    """The evaluations that belong to this config, and the folders that do not (left by an earlier one).

    A folder belongs when its model is one of `crm.models` (with or without the Bayes term) and its seed one of
    `seeds`, or when it is a baseline: `popular`, or its summary says `"baseline": true`.

    Raises:
        WatchtowerError: if a file is missing or damaged, or the seeds of a model answered different queries.
    """
    trained = {name for model in config.crm.models
               for name in ((model.name, bayes_name(model.name)) if model.bayes else (model.name,))}
    belong: dict[str, dict[int, Path]] = {}
    ignored = []
    for folder in sorted(Path(run_dir).glob("evaluation/*/seed=*")):
        seed = folder.name.removeprefix("seed=")
        if not seed.isdecimal():
            continue
        model = folder.parent.name
        if (model in trained and int(seed) in config.seeds) or (model not in trained and _is_baseline(folder)):
            belong.setdefault(model, {})[int(seed)] = folder
        else:
            ignored.append(f"{model}/{folder.name}")
    order = {name: place for place, name in enumerate(m.name for m in config.crm.models)}
    names = sorted(belong, key=lambda name: (order.get(name, len(order)), name))
    return {name: _load_model(name, belong[name]) for name in names}, ignored


def assemble(run_dir: str | Path, config: Config) -> dict[str, Any]:
    """The whole of metrics.json from what lies in the run folder; parts that are not there are empty.

    Args:
        run_dir: the run folder.
        config: resolved, its `evaluate.bootstrap`, `.seed` and `.split_users` say how intervals are made.

    Returns:
        Plain objects in the shape of docs/architecture.md: crm, crm_gains, crm_checks, training, index, stages,
        provenance, and routing where it was judged. Undefined numbers are None.

    Raises:
        WatchtowerError: if an evaluation folder is incomplete or damaged.
    """
    evaluations, ignored = load_evaluations(run_dir, config)
    metrics: dict[str, Any] = {
        "crm": {name: _model_metrics(evaluation, config) for name, evaluation in evaluations.items()},
        "crm_gains": _gains(evaluations, config),
        "training": {name: _training(evaluation) for name, evaluation in evaluations.items()},
        "index": {name: facts for name, evaluation in evaluations.items() if (facts := _index_facts(evaluation))},
        "stages": _stages(Path(run_dir)),
        "provenance": provenance(config) | {"ignored_evaluations": ignored},
    }
    metrics["crm_checks"] = crm_checks(metrics, config.crm.models, headline_length(config.evaluate.at))
    routing = Path(run_dir) / "evaluation" / "routing" / "metrics.json"
    if routing.exists():  # as the judgement of routing left it (routing_results.py)
        metrics["routing"] = _read_json(routing)
    return plain(metrics)


def write_metrics(run_dir: str | Path, metrics: Mapping[str, Any]) -> Path:
    """Writes metrics.json beside its place and renames it there, so that no reader sees half of it; its last key,
    `sha256`, is a checksum of all others."""
    return write_whole(Path(run_dir) / "metrics.json", _json(checksummed(plain(metrics))) + "\n")


def write_pointer(path: Path, what_serves: Mapping[str, Any]) -> Path:
    """Writes a serving.json, in one step and with a checksum as metrics.json has it."""
    return write_whole(path, json.dumps(checksummed(what_serves)) + "\n")


def checksummed(said: Mapping[str, Any]) -> dict[str, Any]:
    """With `sha256` as the last key, a checksum of all others."""
    said = {key: value for key, value in said.items() if key != CHECKSUM}
    return said | {CHECKSUM: _checksum(said)}


def is_whole(read: Mapping[str, Any] | None) -> bool:
    """Whether metrics.json or a serving.json, as it was read, is what was written; one of an earlier version has no
    checksum."""
    if not isinstance(read, Mapping):
        return False
    said = {key: value for key, value in read.items() if key != CHECKSUM}
    return read.get(CHECKSUM) in (None, _checksum(said))


def _checksum(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_whole(path: Path, text: str) -> Path:
    """Puts a text file in its place in one step; what stood there stays until then.

    Raises:
        Superseded: this process acts for an attempt that was cut off.
    """
    if (mirror := elsewhere.of(path)) is not None:
        mirror.put(path, text.encode(), attempts.who())
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with attempts.publishing():
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def value_at(metrics: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path (`crm.dnn.oracle.recall@100`): a measured value gives its mean; None if absent."""
    node: Any = metrics
    parts = path.split(".")
    while parts and isinstance(node, Mapping):
        keys = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        key = next((key for key in keys if key in node), None)
        if key is None:
            return None
        node, parts = node[key], parts[key.count(".") + 1:]
    node = node.get("mean") if isinstance(node, Mapping) else node
    return float(node) if not parts and isinstance(node, int | float) else None


def failed_gates(metrics: Mapping[str, Any], at_least: Mapping[str, float]) -> list[str]:
    """One line for each gate that is not met; a metric that is not there does not meet its gate."""
    lines = []
    for path, least in at_least.items():
        value = value_at(metrics, path)
        if value is None:
            lines.append(f"{path} was not measured, at least {least:g} is asked for")
        elif not value >= least:
            lines.append(f"{path} is {value:.4g}, at least {least:g} is asked for")
    return lines


def unmet(metrics: Mapping[str, Any], at_least: Mapping[str, float]) -> list[str]:
    """The gates that fell short of what is measured so far; those on what is not measured yet wait."""
    return failed_gates(metrics, {path: least for path, least in at_least.items()
                                  if value_at(metrics, path) is not None})


def headline_length(at: Sequence[int]) -> int:
    """The list length that tables and checks speak of: 100, or the longest where 100 is not measured."""
    return 100 if 100 in at else max(at)


def provenance(config: Config) -> dict[str, Any]:
    """Where numbers come from: code, config, seeds, packages, and the machine that this runs on."""
    commit = _output(["git", "rev-parse", "HEAD"])
    resampled = "users" if config.evaluate.split_users else "queries"
    return {
        "name": config.name,
        "version": _package_version("watchtower"),
        "commit": commit,
        "uncommitted_changes": bool(_output(["git", "status", "--porcelain"])) if commit else None,
        "config_hash": config_hash(config),
        "seeds": list(config.seeds),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "intervals": f"95%, bootstrap over {resampled} and seeds, {config.evaluate.bootstrap} samples",
        "hardware": hardware(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _package_version(name))},
    }


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in GiB and the names of the GPUs, as far as the system tells."""
    gpus = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": cores,
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": gpus.splitlines() if gpus else []}


def plain(value: Any) -> Any:
    """JSON's own types: NumPy values become numbers and lists, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _is_baseline(folder: Path) -> bool:
    return folder.parent.name in BASELINES or bool(_read_json(folder / "summary.json").get("baseline"))


def _load_model(name: str, folders: Mapping[int, Path]) -> Evaluation:
    seeds = tuple(sorted(folders))
    tables = [_read_queries(folders[seed]) for seed in seeds]
    first = tables[0]
    for seed, table in zip(seeds, tables, strict=True):
        if table.column_names != first.column_names or _requests_of(table) != _requests_of(first):
            raise WatchtowerError(f"{folders[seed]} answered other queries or has other columns than "
                                  f"{folders[seeds[0]]}: run `watchtower evaluate` again for all seeds")
    values: dict[str, dict[str, np.ndarray]] = {}
    for column in first.column_names:
        strategy, dot, metric = column.rpartition(".")
        if dot:
            values.setdefault(strategy, {})[metric] = np.stack([_floats(table[column]) for table in tables])
    return Evaluation(name, seeds, _requests_of(first), first["query_id"].to_numpy(), first["user_id"].to_numpy(),
                      values,
                      {seed: _read_json(folders[seed] / "curve.json", list) for seed in seeds},
                      {seed: _read_json(folders[seed] / "summary.json") for seed in seeds})


def _requests_of(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in ("query_id", "user_id", "timestamp_ms", "target_item_id"):
        digest.update(table[name].to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _read_queries(folder: Path) -> pa.Table:
    try:
        return read_parquet(folder / "queries.parquet").sort_by("query_id").combine_chunks()
    except (OSError, pa.ArrowException, InputError) as error:
        raise WatchtowerError(f"{folder / 'queries.parquet'} cannot be read ({error}): "
                              "run `watchtower evaluate` again") from error


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float32()).to_numpy()


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        return read_json(path, kind)
    except (OSError, ValueError) as error:
        raise WatchtowerError(f"{path} cannot be read ({error}): run its stage again") from error


def _json(value: Any) -> str:
    return json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False)


def _clusters(evaluation: Evaluation, config: Config) -> np.ndarray:
    return evaluation.user_id_Q if config.evaluate.split_users else np.arange(len(evaluation.user_id_Q))


def _model_metrics(evaluation: Evaluation, config: Config) -> dict[str, Any]:
    clusters = _clusters(evaluation, config)
    model: dict[str, Any] = {}
    for strategy, values in evaluation.values.items():
        values_MSQ = np.stack(list(values.values()))
        intervals = bootstrap_cis(values_MSQ, clusters, config.evaluate.bootstrap, config.evaluate.seed)
        model[strategy] = {metric: _measured(interval, values_SQ, evaluation.seeds)
                           for metric, interval, values_SQ in zip(values, intervals, values_MSQ, strict=True)}
    curve = _mean_curve(evaluation)
    return model | ({"control_curve": curve} if curve else {})


def _measured(interval: np.ndarray, values_SQ: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    finite_SQ = np.isfinite(values_SQ)
    per_seed = {str(seed): values[finite].mean(dtype=np.float64) if finite.any() else math.nan
                for seed, values, finite in zip(seeds, values_SQ, finite_SQ, strict=True)}
    return {"mean": interval[0], "ci95": [interval[1], interval[2]], "n": finite_SQ.any(axis=0).sum(),
            "per_seed": per_seed}


def _mean_curve(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Points of the control curve: means over seeds, with the seeds' own values beside them."""
    seeds = [seed for seed in evaluation.seeds if evaluation.curves[seed]]
    points = []
    for condition_s in sorted({point["condition_s"] for seed in seeds for point in evaluation.curves[seed]}):
        own = {str(seed): point for seed in seeds for point in evaluation.curves[seed]
               if point["condition_s"] == condition_s}
        names = [name for name in next(iter(own.values())) if name not in ("condition_s", "n")]
        points.append({"condition_s": condition_s}
                      | {name: _mean([point.get(name) for point in own.values()]) for name in names}
                      | {"n": next(iter(own.values())).get("n"),
                         "per_seed": {seed: {name: point.get(name) for name in names} for seed, point in own.items()}})
    return points


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _gains(evaluations: Mapping[str, Evaluation], config: Config) -> dict[str, Any]:
    """Paired relative gains of each conditioned model: over its tower unconditioned, over Bayes, max over average."""
    k = headline_length(config.evaluate.at)
    gains: dict[str, Any] = {}
    for model in config.crm.models:
        if model.condition == "none" or model.name not in evaluations:
            continue
        own = evaluations[model.name]
        plain_model = unconditioned_model(model, config.crm.models)
        bare = evaluations.get(plain_model.name) if plain_model else None
        bayes = evaluations.get(bayes_name(plain_model.name)) if plain_model else None
        pairs = {
            "oracle_over_unconditioned": (own, "oracle", bare, "none", f"recall@{k}"),
            "null_over_unconditioned": (own, "null", bare, "none", f"recall@{k}"),
            "oracle_over_bayes": (own, "oracle", bayes, "oracle", f"recall@{k}"),
            "maximum_over_average_watch": (own, "maximum", own, "average", f"retrieved_watch_s@{k}"),
        }
        found = {name: gain for name, pair in pairs.items() if (gain := _gain(*pair, config))}
        if found:
            gains[model.name] = found
    return gains


def unconditioned_model(model: ModelConfig, models: Sequence[ModelConfig]) -> ModelConfig | None:
    """The ablation that a conditioned model is held against: its own tower, trained without the condition."""
    same = [m for m in models if m.tower == model.tower and m.condition == "none" and not m.permute_watch]
    return next((m for m in same if m.name == f"{model.name}_unconditioned"), same[0] if same else None)


def _gain(a: Evaluation, a_strategy: str, b: Evaluation | None, b_strategy: str, metric: str,
          config: Config) -> dict[str, Any] | None:
    if b is None or metric not in a.values.get(a_strategy, {}) or metric not in b.values.get(b_strategy, {}):
        return None
    shared = [seed for seed in a.seeds if seed in b.seeds]
    if not shared or a.requests != b.requests:
        return None
    a_SQ = a.values[a_strategy][metric][[a.seeds.index(seed) for seed in shared]].astype(np.float64)
    b_SQ = b.values[b_strategy][metric][[b.seeds.index(seed) for seed in shared]].astype(np.float64)
    draws = config.evaluate.bootstrap, config.evaluate.seed
    gain, low, high = paired_ci(a_SQ, b_SQ, _clusters(a, config), *draws)
    both_SQ = np.isfinite(a_SQ) & np.isfinite(b_SQ)
    per_seed = {str(seed): _relative(a_Q[both], b_Q[both])
                for seed, a_Q, b_Q, both in zip(shared, a_SQ, b_SQ, both_SQ, strict=True)}
    return {"mean": gain, "ci95": [low, high], "n": both_SQ.any(axis=0).sum(), "per_seed": per_seed}


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return a.mean() / b.mean() - 1 if len(b) and b.mean() else math.nan


def _training(evaluation: Evaluation) -> dict[str, Any]:
    return {"per_seed": {str(seed): {key: value for key, value in summary.items() if key != "index"}
                         for seed, summary in evaluation.summaries.items()}}


def _index_facts(evaluation: Evaluation) -> dict[str, Any]:
    """Means over seeds of what is a number, what else all seeds have in common, and each seed's own."""
    own = {str(seed): summary["index"] for seed, summary in evaluation.summaries.items() if summary.get("index")}
    if not own:
        return {}
    facts = {}
    for key, value in next(iter(own.values())).items():
        values = [of_seed.get(key) for of_seed in own.values()]
        if _is_number(value):
            facts[key] = _mean(values)
        elif all(other == value for other in values):
            facts[key] = value
    return facts | {"per_seed": own}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stages(run_dir: Path) -> dict[str, Any]:
    """What finished stages noted of themselves; other files beside them have a dot in their name."""
    noted = {path.stem: _read_json(path) for path in sorted(run_dir.glob("stages/*.json")) if "." not in path.stem}
    return {stage: {key: facts.get(key) for key in ("seconds", "rows", "peak_mib")} for stage, facts in noted.items()}


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _proc_value(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
