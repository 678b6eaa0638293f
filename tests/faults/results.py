"""What two runs of one config are held against each other by: losses, metrics, and every published file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from trainer.events import read_events

PUBLISHED = ("world", "sequences", "quarantine", "checkpoints", "indexes", "evaluation", "channels", "labels",
             "item_value", "routing")
PENDING = "pending.safetensors"
# Times, sizes of processes, when and from which commit, and what is hashed with the time of the logs' files in it: they
# differ between two runs that are the same.
OF_THE_CLOCK = {"seconds", "build_s", "train_s", "trained_s", "workers_s", "seconds_per_request", "peak_mib",
                "created_at", "finished", "commit", "uncommitted_changes", "stages", "attempt",
                "fingerprint", "input", "config", "sequences"}


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(inner) for key, inner in value.items() if key not in OF_THE_CLOCK}
    return [without_clock(inner) for inner in value] if isinstance(value, list) else value


def losses(run_dir: Path, within: float = 0.0) -> tuple[dict[tuple[str, int], float], list[str]]:
    """Loss by model and step; and what is wrong with them: a step that was taken twice must come out the same, or
    `within` so much where another number of workers may have taken it."""
    found: dict[tuple[str, int], float] = {}
    wrong = []
    for event in read_events(run_dir / "events.jsonl", "train_step"):
        key = (event["model"], event["step"])
        if abs(found.setdefault(key, event["loss"]) - event["loss"]) > within:
            wrong.append(f"loss of {key[0]} at step {key[1]}: {found[key]!r}, taken again {event['loss']!r}")
    return found, wrong


def published_files(run_dir: Path) -> dict[str, Any]:
    """Every published file: its checksum; of JSON, what it says without times."""
    found: dict[str, Any] = {}
    for top in PUBLISHED:
        for path in sorted((run_dir / top).rglob("*")):
            name = path.relative_to(run_dir).as_posix()
            if not path.is_file() or any(part.startswith(".") for part in path.relative_to(run_dir).parts):
                continue
            if path.suffix == ".json":
                found[name] = _of_json(path)
            elif path.name == "item_ids.parquet":  # its metadata say how long the index took to build
                found[name] = pq.read_table(path).replace_schema_metadata().to_pydict()
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _of_json(path: Path) -> Any:
    said = without_clock(json.loads(path.read_text()))
    if path.name == "manifest.json" and isinstance(said, dict) and isinstance(said.get("files"), dict):
        # The checksums of these are of files with times in them; what they say is compared by itself.
        said["files"] = {name: None if name.endswith((".json", "item_ids.parquet")) else entry
                         for name, entry in said["files"].items()}
    return said


class Results:
    """What a finished run came to."""

    def __init__(self, run_dir: Path):
        self.losses, self.wrong = losses(run_dir)
        if not (run_dir / "report.html").read_text().rstrip().endswith("</html>"):
            self.wrong.append("report.html has no end")
        metrics = json.loads((run_dir / "metrics.json").read_text())
        metrics.pop("sha256", None)
        metrics["provenance"].pop("config_hash")  # the run folder's name is in it
        self.metrics = without_clock(metrics)
        self.files = published_files(run_dir)
        self.newest = {str(path.relative_to(run_dir)): max(int(one.name.removeprefix("step-"))
                                                           for one in path.glob("step-*"))
                       for path in run_dir.glob("checkpoints/*/seed=*") if any(path.glob("step-*"))}

    def differences(self, other: Results) -> list[str]:
        """What of `other` is not as it is here, in words; the empty list: equal to the bit."""
        found = list(other.wrong)
        for key in sorted(self.losses.keys() | other.losses.keys()):
            if self.losses.get(key) != other.losses.get(key):
                found.append(f"loss of {key[0]} at step {key[1]}: {other.losses.get(key)!r} for "
                             f"{self.losses.get(key)!r}")
        found += _differences(self.metrics, other.metrics, "metrics.json")
        found += _differences(self.newest, other.newest, "newest checkpoint")
        for name in sorted(self.files.keys() | other.files.keys()):
            if _by_chance(name, self.files.keys() ^ other.files.keys()):
                continue
            if self.files.get(name) != other.files.get(name):
                found += _differences(self.files.get(name, "missing"), other.files.get(name, "missing"), name)
        return found


def _by_chance(name: str, in_one_only: set[str]) -> bool:
    """Which of the middle checkpoints are kept, and what of an index was pending in them, is a matter of time: their
    tensors are compared where both runs have them. The last one of a model both must have."""
    of_checkpoint = name.startswith("checkpoints/") and "/step-" in name
    return of_checkpoint and (name in in_one_only or name.endswith(("/state.json", "/manifest.json", "/" + PENDING)))


def _differences(expected: Any, found: Any, where: str) -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        return [line for key in sorted(expected.keys() | found.keys(), key=str)
                for line in _differences(expected.get(key, "missing"), found.get(key, "missing"), f"{where}: {key}")]
    if expected == found or (expected != expected and found != found):
        return []
    return [f"{where}: {str(found)[:60]} for {str(expected)[:60]}"]
