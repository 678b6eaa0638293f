"""Where TorchRec's planner would put the tables on devices that are not there, by the rules that training goes by.

    place_tables(specs, devices=64, per_node=8, device_type="cuda", memory_bytes=85e9, optimizer="rowwise_adagrad")

Sharding types, kernels, reserve and topology are those of `embeddings.tables`: what stands here is what a training on
such devices would choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from embeddings.tables import (
    OptimizerName,
    TableSpec,
    check_specs,
    choose_places,
    quiet_torchrec,
    table_planner,
    table_sharder,
    unsharded,
)

FLOAT_BYTES = 4


@dataclass(frozen=True)
class PlacedTable:
    """One table and where its rows lie.

    Attributes:
        name, rows, dim: of its TableSpec.
        sharding: `table_wise` or `row_wise`.
        ranks, rows_per_rank: the devices that hold rows of it, and how many each.
        state_floats: floats of optimizer state a row: 1 of row-wise Adagrad, 0 of SGD.
    """

    name: str
    rows: int
    dim: int
    sharding: str
    ranks: tuple[int, ...]
    rows_per_rank: tuple[int, ...]
    state_floats: int

    def weight_bytes(self, devices: int) -> np.ndarray:
        """int64 (devices,): bytes of rows on each device."""
        return self._rows_on(devices) * self.dim * FLOAT_BYTES

    def state_bytes(self, devices: int) -> np.ndarray:
        """int64 (devices,): bytes of optimizer state on each device."""
        return self._rows_on(devices) * self.state_floats * FLOAT_BYTES

    def _rows_on(self, devices: int) -> np.ndarray:
        rows = np.zeros(devices, np.int64)
        rows[list(self.ranks)] = self.rows_per_rank
        return rows


def place_tables(
    specs: Sequence[TableSpec],
    *,
    devices: int,
    per_node: int,
    device_type: str,
    memory_bytes: int | None,
    optimizer: OptimizerName,
) -> tuple[PlacedTable, ...]:
    """Plans without a process group, and without holding any table.

    Args:
        specs: the tables of one collection.
        devices, per_node: how many ranks there would be, and how many of them on a machine.
        device_type: `cuda` or `cpu`.
        memory_bytes: of a device; None is what TorchRec takes for granted.
        optimizer: the fused one.

    Raises:
        InputError: specs that do not fit together, or tables that find no place.
    """
    return _placed(tuple(specs), devices, per_node, device_type, memory_bytes, optimizer)


@lru_cache(maxsize=64)
def _placed(
    specs: tuple[TableSpec, ...],
    devices: int,
    per_node: int,
    device_type: str,
    memory_bytes: int | None,
    optimizer: OptimizerName,
) -> tuple[PlacedTable, ...]:
    check_specs(specs)
    collection, sharder = unsharded(specs), table_sharder(optimizer, learning_rate=0.0)

    def planned(allowed: Mapping[str, list[str]]) -> Mapping[str, Any]:
        planner = table_planner(allowed, devices, per_node, device_type, memory_bytes)
        return planner.plan(collection, [sharder]).plan[""]

    with quiet_torchrec():
        plan = choose_places(specs, devices, planned)
    state_floats = 1 if optimizer == "rowwise_adagrad" else 0
    placed = []
    for spec in specs:
        shards = sorted(
            (shard.placement.rank(), shard.shard_sizes[0]) for shard in plan[spec.name].sharding_spec.shards
        )
        placed.append(
            PlacedTable(
                spec.name, spec.rows, spec.dim, plan[spec.name].sharding_type,
                tuple(rank for rank, _ in shards), tuple(rows for _, rows in shards), state_floats,
            )
        )
    return tuple(placed)
