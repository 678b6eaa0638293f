"""Checkpoints of sharded tables: no pickle, whole again on any number of workers and under any sharding.

Every rank writes the blocks that it owns, one safetensors file with one JSON beside it:

    tables-rank0.safetensors     "item.weight.0" float32 (rows, dim), "item.momentum.0" float32 (rows,), ..
    tables-rank0.json            {"format", "rank", "world_size", "optimizer", "shards": [{key, table, kind,
                                  offsets, sizes, table_rows}, ..]}

On load each rank intersects its own blocks with the saved ones and reads only those slices. Copies are bit-exact. The
files carry no checksum: a checkpoint folder is published through `embeddings.snapshots`, whose manifest does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import InputError
from embeddings.tables import ShardedTables, TableShard
from embeddings.untrusted import read_json

FORMAT = "watchtower-tables/1"
# Bounds the host memory of a load.
READ_ROWS = 262_144


@dataclass(frozen=True)
class TableState:
    """A rank's blocks copied to host memory. Training may go on while `write_state` puts them on disk."""

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _SavedBlock:
    """A block in a checkpoint: the rows start to stop - 1 of `table`'s weights or momentum, and where they lie."""

    file: Path
    key: str
    table: str
    kind: str
    start: int
    stop: int
    table_rows: int


def capture_state(tables: ShardedTables) -> TableState:
    """Copy this rank's weights and momentum to host memory; not collective."""
    rows = {spec.name: spec.rows for spec in tables.specs}
    shards, tensors = [], {}
    for shard in tables.local_shards():
        key = f"{shard.table}.{shard.kind}.{shard.start}"
        tensors[key] = shard.tensor.to("cpu", copy=True).contiguous()
        shards.append(
            {
                "key": key,
                "table": shard.table,
                "kind": shard.kind,
                "offsets": [shard.start] + [0] * (shard.tensor.dim() - 1),
                "sizes": list(shard.tensor.shape),
                "table_rows": rows[shard.table],
            }
        )
    header = {
        "format": FORMAT,
        "rank": tables.rank,
        "world_size": tables.world_size,
        "optimizer": tables.optimizer,
        "shards": shards,
    }
    return TableState(header, tensors)


def write_state(state: TableState, folder: Path, rank: int) -> None:
    """Write a rank's captured blocks; any thread, not collective. The JSON comes last."""
    save_file(dict(state.tensors), folder / f"tables-rank{rank}.safetensors")
    (folder / f"tables-rank{rank}.json").write_text(json.dumps(dict(state.header), indent=1))


def save_tables(tables: ShardedTables, folder: Path, rank: int) -> None:
    """Write this rank's weights and momentum to `folder`; not collective, every rank calls it."""
    write_state(capture_state(tables), folder, rank)


def load_tables(tables: ShardedTables, folder: Path, *, allow_growth: bool = False) -> None:
    """Fill this rank's weights and momentum from a checkpoint of any number of ranks and any sharding.

    Not collective. What is wrong with the layout is found before any row is touched, from the same JSON files on
    every rank, so all ranks raise alike.

    Args:
        tables: where to load to. Rows that the checkpoint lacks keep the values they have.
        folder: holds the files of all ranks.
        allow_growth: the table may have more rows than the checkpoint.

    Raises:
        InputError: naming file and table, if a file is missing or unreadable, if tables, sizes or optimizer differ, or
            if the saved blocks leave a gap.
    """
    saved = _read_layout(tables, folder)
    expected = {(spec.name, kind) for spec in tables.specs for kind in _kinds(tables.optimizer)}
    for table, kind in sorted(saved.keys() ^ expected):
        lacking = "the checkpoint" if (table, kind) in expected else "the model"
        raise InputError(f"{folder}: the {kind} of table {table!r} is missing from {lacking}")
    rows = {spec.name: spec.rows for spec in tables.specs}
    for (table, _), blocks in sorted(saved.items()):
        _check_cover(blocks, rows[table], allow_growth)
    for shard in tables.local_shards():
        _read_into(shard, saved[shard.table, shard.kind])


def _kinds(optimizer: str) -> tuple[str, ...]:
    return ("weight", "momentum") if optimizer == "rowwise_adagrad" else ("weight",)


def _read_layout(tables: ShardedTables, folder: Path) -> dict[tuple[str, str], list[_SavedBlock]]:
    """The saved blocks of all ranks by (table, kind), in order of rows."""
    paths = sorted(folder.glob("tables-rank*.json"))
    if not paths:
        raise InputError(f"{folder}: no tables-rank*.json, this is not a checkpoint of embedding tables")
    dims = {spec.name: spec.dim for spec in tables.specs}
    saved: dict[tuple[str, str], list[_SavedBlock]] = {}
    ranks = []
    for path in paths:
        try:
            header = read_json(path)
            if header["format"] != FORMAT:
                raise InputError(f"{path}: format {header['format']!r} is not {FORMAT!r}")
            if header["optimizer"] != tables.optimizer:
                raise InputError(f"{path}: saved with optimizer {header['optimizer']!r}, not {tables.optimizer!r}")
            if header["world_size"] != len(paths):
                raise InputError(f"{path}: written by {header['world_size']} ranks, but here are {len(paths)} files")
            ranks.append(header["rank"])
            blocks = [_parse_block(path, entry, dims) for entry in header["shards"]]
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}: not a header of embedding tables ({type(error).__name__}: {error})") from error
        for block in blocks:
            saved.setdefault((block.table, block.kind), []).append(block)
    if sorted(ranks) != list(range(len(paths))):
        raise InputError(f"{folder}: the files are of the ranks {sorted(ranks)}, not of 0 to {len(paths) - 1}")
    for blocks in saved.values():
        blocks.sort(key=lambda block: block.start)
    return saved


def _parse_block(path: Path, entry: Mapping[str, Any], dims: Mapping[str, int]) -> _SavedBlock:
    offsets, sizes = [int(value) for value in entry["offsets"]], [int(value) for value in entry["sizes"]]
    table, kind = str(entry["table"]), str(entry["kind"])
    width = [dims.get(table, sizes[-1])] if kind == "weight" else []
    if len(offsets) != len(sizes) or sizes[1:] != width or any(offsets[1:]):
        raise InputError(
            f"{path}: the {kind} of table {table!r} was saved with offsets {offsets} and sizes {sizes}; expected whole "
            f"rows of width {width}"
        )
    block = _SavedBlock(
        file=path.with_suffix(".safetensors"),
        key=str(entry["key"]),
        table=table,
        kind=kind,
        start=offsets[0],
        stop=offsets[0] + sizes[0],
        table_rows=int(entry["table_rows"]),
    )
    if not 0 <= block.start < block.stop <= block.table_rows:
        raise InputError(f"{path}: table {table!r} has rows {block.start} to {block.stop} of {block.table_rows}")
    return block


def _check_cover(blocks: Sequence[_SavedBlock], rows: int, allow_growth: bool) -> None:
    """The blocks must tile the saved table, which must be as long as ours, or shorter where growth is allowed."""
    path, table, saved_rows = blocks[0].file, blocks[0].table, blocks[0].table_rows
    if any(block.table_rows != saved_rows for block in blocks):
        raise InputError(f"{path}: table {table!r} has another number of rows in the other ranks' files")
    if saved_rows > rows or (saved_rows < rows and not allow_growth):
        hint = "" if saved_rows > rows else "; a table may only grow where that is asked for"
        raise InputError(f"{path}: table {table!r} was saved with {saved_rows} rows, the model has {rows}{hint}")
    reached = 0
    for block in blocks:
        if block.start != reached:
            raise InputError(
                f"{block.file}: rows {reached} to {block.start} of the {block.kind} of table {table!r} are saved "
                f"{'twice' if block.start < reached else 'by no rank'}"
            )
        reached = block.stop
    if reached != saved_rows:
        raise InputError(f"{path}: the {blocks[0].kind} of table {table!r} ends at row {reached} of {saved_rows}")


def _read_into(shard: TableShard, blocks: Sequence[_SavedBlock]) -> None:
    """Copy the saved rows that the shard owns into it."""
    for block in blocks:
        low, high = max(shard.start, block.start), min(shard.stop, block.stop)
        if low >= high:
            continue
        try:
            with safe_open(str(block.file), framework="pt") as file:
                rows = file.get_slice(block.key)
                shape = [block.stop - block.start, *shard.tensor.shape[1:]]
                if list(rows.get_shape()) != shape or rows.get_dtype() != "F32":
                    raise InputError(
                        f"{block.file}: the {block.kind} of table {block.table!r} is {rows.get_dtype()} "
                        f"{list(rows.get_shape())}, its JSON says float32 {shape}"
                    )
                for first in range(low, high, READ_ROWS):
                    last = min(first + READ_ROWS, high)
                    part = rows[first - block.start : last - block.start]
                    shard.tensor[first - shard.start : last - shard.start].copy_(part)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{block.file}: cannot read table {block.table!r} ({error})") from error
