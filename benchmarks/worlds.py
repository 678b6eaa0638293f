"""The synthetic logs that benchmarks of the data side run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def world_config(folder: Path, **sections: Any):
    """A config on the world of a folder; `sections` replace the config's own."""
    from configs.schema import Config

    data = {"logs": str(folder / "world" / "logs"), "items": str(folder / "world" / "items.parquet"),
            "effective_view": {"column": "effective_view"}, "target": {"column": "long_view"}}
    return Config.model_validate({**sections, "data": {**data, **sections.get("data", {})}})


def make_world(folder: Path, **spec: Any) -> Any:
    """Write a world into `folder/world` and sum it up. A world of the same spec holds the same logs."""
    from trainer.world import WorldSpec, write_world

    return write_world(folder / "world", WorldSpec(**spec), processes=1)


def make_sequences(folder: Path, config) -> Any:
    """Ingest it into `folder/run`; the store."""
    from launch.ingest import SerialExecutor, ingest
    from trainer.sequences import SequenceStore

    ingest(config.data, folder / "run", SerialExecutor())
    return SequenceStore(folder / "run" / "sequences")
