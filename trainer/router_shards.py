"""A shard's requests with their features, and where those of training lie: on disk, made once, read by every worker.

    router_features/<fingerprint>/shard-00003/{<array>.npy, .., manifest.json}

The fingerprint is of all that decides the features (RouterData.features_fingerprint), so a folder holds what its name
says or is not there. A shard appears at once and whole; its arrays are memory-mapped, so a worker holds of it what it
touches, and the system may take that back. The folder may be deleted: it is made anew where it is needed.

Shape suffixes: R = requests, T = triggers, C = channels, F = features, V = effective views of the shard.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from configs.errors import WatchtowerError
from embeddings.snapshots import publish, read_manifest, verify_file
from embeddings.untrusted import damaged
from trainer.triggers import TriggerRequests

FOLDER, FORMAT = "router_features", 1
REQUESTS = "requests."  # files of the requests' own arrays begin with it


@dataclass(frozen=True)
class RouterShard:
    """A shard's requests of one side, ready for batches.

    trigger_TF, list_TCF: float32. view_begin_R, view_end_R: int64, the latest `router.history` effective views before
    each request, as a range of the shard's effective views; view_row_V, view_bucket_V: int64, of these.
    is_validation_R: bool.
    """

    requests: TriggerRequests
    trigger_TF: np.ndarray
    list_TCF: np.ndarray
    view_begin_R: np.ndarray
    view_end_R: np.ndarray
    view_row_V: np.ndarray
    view_bucket_V: np.ndarray
    is_validation_R: np.ndarray


REQUEST_ARRAYS = tuple(field.name for field in fields(TriggerRequests) if field.name != "shard")
OWN_ARRAYS = tuple(field.name for field in fields(RouterShard) if field.name != "requests")


def shard_folder(run_dir: Path, fingerprint: str, number: int) -> Path:
    """Where the features of a training shard lie."""
    return Path(run_dir) / FOLDER / fingerprint / f"shard-{number:05d}"


def write_shard(folder: Path, shard: RouterShard) -> None:
    """Publish a shard; where another worker was faster, its folder stays."""
    def write(attempt: Path) -> None:
        for name in REQUEST_ARRAYS:
            np.save(attempt / f"{REQUESTS}{name}.npy", getattr(shard.requests, name), allow_pickle=False)
        for name in OWN_ARRAYS:
            np.save(attempt / f"{name}.npy", getattr(shard, name), allow_pickle=False)

    publish(folder, write, {"kind": "router features", "format": FORMAT, "shard": shard.requests.shard,
                            "requests": len(shard.requests), "triggers": len(shard.requests.trigger_row_T)})


def open_shard(folder: Path) -> RouterShard:
    """A published shard, its arrays memory-mapped and read-only.

    Raises:
        WatchtowerError: it is missing, of another format or damaged. Checksums are read once a process.
    """
    manifest = read_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise WatchtowerError(f"{folder}: format {manifest.get('format')}, not {FORMAT}; remove the folder")

    def mapped(name: str) -> np.ndarray:
        path = verify_file(folder, manifest, f"{name}.npy")
        try:
            # As a plain array: numpy's own class of mapped ones is slower to index.
            found = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            if found.ndim == 0 or len(found) != rows.get(name.rsplit("_", 1)[1][:2].rstrip("FC"), len(found)):
                raise ValueError(f"it has the shape {found.shape}")
            return found
        except (OSError, ValueError) as error:
            raise damaged(path, error, f"remove {folder} and run again") from error

    try:
        rows = {"R": int(manifest["requests"]), "R1": int(manifest["requests"]) + 1, "T": int(manifest["triggers"])}
        number = int(manifest["shard"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error, "remove it and run again") from error
    requests = TriggerRequests(number, *(mapped(REQUESTS + name) for name in REQUEST_ARRAYS))
    return RouterShard(requests, *(mapped(name) for name in OWN_ARRAYS))
