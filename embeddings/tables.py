"""Embedding tables sharded over the workers by TorchRec's planner, with a fused row-wise optimizer.

A table is one matrix (rows, dim) in float32. Row 0 is the row of unknown ids; it is initialized and trained like any
other. The planner places every table whole on one worker (table-wise) or splits its rows over all of them (row-wise).
Column-wise is never chosen: row-wise Adagrad would keep one momentum per column shard, which is another optimizer and
cannot be resharded.

The optimizer is fused into the backward pass: once `backward` has run over the output, the tables have been updated.
TorchRec divides the gradients by the number of workers, so that the mean loss of the local rows on every worker is the
mean loss of the global batch.

    row-wise Adagrad, per row r with gradient g_r (dim,):   m_r += mean(g_r^2),   w_r -= lr * g_r / (sqrt(m_r) + eps)
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingEnv

from configs.errors import InputError
from embeddings import exchange

# An EmbeddingCollection keeps its tables in a ModuleDict, whose own methods may not be shadowed.
FORBIDDEN_NAMES = frozenset({"items", "keys", "values", "pop"})
ADAGRAD_EPS = 1e-8
INIT_CHUNK_ROWS = 65_536
RESERVED_SHARE = 0.15  # of a device's memory, which the planner leaves to everything but tables

OptimizerName = Literal["rowwise_adagrad", "sgd"]
Sharding = Literal["auto", "table_wise", "row_wise"]
StateKind = Literal["weight", "momentum"]

_FUSED_OPTIMIZERS = {"rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "sgd": EmbOptimType.EXACT_SGD}


@dataclass(frozen=True)
class TableSpec:
    """One embedding table.

    Attributes:
        name: name of the table and of the feature that looks it up.
        rows: number of rows, row 0 (unknown) included.
        dim: width of a row; the same for all tables of one collection.
        sharding: `auto` leaves the choice to the planner. A table too small to give every worker a row of its own is
            placed table-wise, whatever is asked.
        init_std: standard deviation of the initial values, a normal around zero.

    Raises:
        InputError: a name, size or standard deviation that cannot be.
    """

    name: str
    rows: int
    dim: int
    sharding: Sharding = "auto"
    init_std: float = 0.01

    def __post_init__(self) -> None:
        if self.name in FORBIDDEN_NAMES or not self.name.isidentifier():
            raise InputError(
                f"table {self.name!r}: a table's name is an identifier and none of {', '.join(sorted(FORBIDDEN_NAMES))}"
            )
        if self.rows < 1 or self.dim < 1:
            raise InputError(f"table {self.name!r}: rows ({self.rows}) and dim ({self.dim}) must be positive")
        if self.sharding not in ("auto", "table_wise", "row_wise"):
            raise InputError(f"table {self.name!r}: sharding {self.sharding!r} is not auto, table_wise or row_wise")
        if not (0.0 <= self.init_std < float("inf")):
            raise InputError(f"table {self.name!r}: init_std {self.init_std} is not a finite number >= 0")


@dataclass(frozen=True)
class TableShard:
    """A block of one table, or of its momentum, that this rank owns. `tensor` is the live storage, not a copy.

    Attributes:
        table: the table's name.
        kind: `weight`, float32 (rows, dim), or `momentum`, the row-wise Adagrad's accumulator, float32 (rows,).
        start: the table's row that the block begins with.
        tensor: the block.
    """

    table: str
    kind: StateKind
    start: int
    tensor: Tensor

    @property
    def stop(self) -> int:
        """The first row after the block."""
        return self.start + self.tensor.shape[0]


class ShardedTables(nn.Module):
    """An EmbeddingCollection sharded by TorchRec's planner with a fused row-wise optimizer.

    Building one is collective: every rank of the process group builds it with the same arguments. The parameters are
    updated by the backward pass itself; do not hand them to another optimizer or to a DeepSpeed engine.

    Args:
        specs: the tables; at least one, distinct names, one dim.
        device: where this rank's shards live; `cpu`, or `cuda:<i>` with NCCL.
        optimizer: `rowwise_adagrad`, or `sgd` for tests of parity.
        learning_rate: of the fused optimizer; may be changed later through the property.
        seed: with the table's name and the row it decides the initial values, whatever the number of ranks.
        process_group: the ranks that share the tables; None is the default group, which the caller has initialized.

    Raises:
        InputError: specs that do not fit together, or tables that do not fit into the workers' memory.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        device: torch.device,
        optimizer: OptimizerName = "rowwise_adagrad",
        learning_rate: float,
        seed: int,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_specs(specs)
        if optimizer not in _FUSED_OPTIMIZERS:
            raise InputError(f"table optimizer {optimizer!r} is not one of {', '.join(_FUSED_OPTIMIZERS)}")
        self.specs = tuple(specs)
        self.optimizer: OptimizerName = optimizer
        self.device = device
        self.process_group = process_group if process_group is not None else dist.group.WORLD
        self._feature_order: list[str] | None = None
        self._is_laid_out = False  # TorchRec fixes the order of the features at its first lookup
        self._rows = {spec.name: spec.rows for spec in specs}
        self._learning_rate = learning_rate
        exchange.keep_time()
        collection = unsharded(specs)
        sharder = table_sharder(optimizer, learning_rate)
        with quiet_torchrec():
            self._plan = self._placed(collection, sharder)
            self._collection = sharder.shard(
                collection, self._plan, ShardingEnv.from_process_group(self.process_group), device
            )
        self.fill_initial(seed)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Rows of all tables for the ids of the batch. Collective: every rank calls it the same number of times.

        Args:
            features: one key per table, named like it, always in the same order; values int64 row numbers in
                [0, rows). Any feature may be empty on any rank. Ranks may bring different numbers of rows.

        Returns:
            By table, float32 (ids of the feature, dim) in the order of the feature's values, with gradient. The
            backward pass over them updates the tables.

        Raises:
            ValueError: if the keys are not the tables or their order changed; on CPU also if an id is out of range.
        """
        return self.begin(features).rows()

    def begin(self, features: KeyedJaggedTensor) -> "Lookup":
        """Sends the ids on their way, for rows that are wanted later; `forward` in two halves. Collective.

        The ids of the next batch travel while this one is computed: three of the five collectives of a lookup then
        cost no waiting. The rows are read when `Lookup.rows` is called, so they are as fresh as those of `forward`.
        """
        self._check_features(features)
        names = [spec.name for spec in self.specs]
        if self.world_size == 1 and self._is_laid_out:
            return LocalLookup(self._collection, features, names)
        lookup = Lookup(self._collection, features, names)
        self._is_laid_out = True
        return lookup

    @property
    def learning_rate(self) -> float:
        """Learning rate of the fused optimizer. Setting it takes effect with the next backward pass."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        if value == self._learning_rate:
            return
        fused = self._collection.fused_optimizer
        for group in fused.param_groups:
            group["lr"] = value
        # The kernels keep a copy of their own, which only step() refreshes. It does not update any row.
        fused.step()
        self._learning_rate = value

    @property
    def rank(self) -> int:
        """This process's rank among those that share the tables."""
        return dist.get_rank(self.process_group)

    @property
    def world_size(self) -> int:
        """Number of ranks that share the tables."""
        return dist.get_world_size(self.process_group)

    def plan(self) -> dict[str, dict[str, Any]]:
        """Where each table lies, as JSON: {table: {sharding, rows, dim, ranks, rows_per_rank}}."""
        described = {}
        for spec in self.specs:
            placed = self._plan[spec.name]
            rows_by_rank = {shard.placement.rank(): shard.shard_sizes[0] for shard in placed.sharding_spec.shards}
            described[spec.name] = {
                "sharding": placed.sharding_type,
                "rows": spec.rows,
                "dim": spec.dim,
                "ranks": sorted(rows_by_rank),
                "rows_per_rank": [rows_by_rank[rank] for rank in sorted(rows_by_rank)],
            }
        return described

    def local_shards(self) -> list[TableShard]:
        """The blocks of weights and momentum that this rank owns, as live storage; not collective."""
        shards = []
        weights = self._collection.state_dict()
        for spec in self.specs:
            for local in weights[f"embeddings.{spec.name}.weight"].local_shards():
                shards.append(TableShard(spec.name, "weight", local.metadata.shard_offsets[0], local.tensor.detach()))
        # A rank lists the optimizer states of its own tables only, so they are addressed by name.
        for states in self._collection.fused_optimizer.state_dict()["state"].values():
            for key, state in states.items():
                table, _, name = key.rpartition(".")
                if name == "momentum1" and self.optimizer == "rowwise_adagrad":
                    for local in state.local_shards():
                        tensor = local.tensor.detach().view(-1)
                        shards.append(TableShard(table, "momentum", local.metadata.shard_offsets[0], tensor))
        return [shard for shard in shards if shard.tensor.numel()]

    def fill_initial(self, seed: int) -> None:
        """Set every local row to its initial value and every momentum to zero; not collective."""
        by_name = {spec.name: spec for spec in self.specs}
        for shard in self.local_shards():
            if shard.kind == "momentum":
                shard.tensor.zero_()
                continue
            spec = by_name[shard.table]
            for start, rows in initial_rows(seed, spec, shard.start, shard.stop):
                offset = start - shard.start
                shard.tensor[offset : offset + rows.shape[0]].copy_(rows)

    def _placed(self, collection: EmbeddingCollection, sharder: EmbeddingCollectionSharder) -> Mapping[str, Any]:
        """Rank 0 plans, all ranks get the same plan: {table: ParameterSharding}."""
        ranks = self.world_size
        # The planner's default of 32 GB a GPU is not what most devices have.
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory if on_gpu else None

        def planned(allowed: Mapping[str, list[str]]) -> Mapping[str, Any]:
            planner = table_planner(allowed, ranks, get_local_size(ranks), self.device.type, memory)
            return planner.collective_plan(collection, [sharder], self.process_group).plan[""]

        return choose_places(self.specs, ranks, planned)

    def _check_features(self, features: KeyedJaggedTensor) -> None:
        keys = list(features.keys())
        if self._feature_order is None:
            if sorted(keys) != sorted(spec.name for spec in self.specs):
                raise ValueError(f"features {keys} are not the tables {[spec.name for spec in self.specs]}")
            self._feature_order = keys
        elif keys != self._feature_order:
            # TorchRec fixes the permutation at the first batch and would look up the wrong tables in silence.
            raise ValueError(f"features {keys} came before in the order {self._feature_order}; keep one order")
        if self.device.type != "cpu":
            assert_in_range(features, self._rows)  # to look at the ids here would wait for the device at every step
            return
        ends, ids = features.offset_per_key(), features.values()
        for name, begin, end in zip(keys, ends, ends[1:], strict=False):
            if begin < end:
                low, high = (int(limit) for limit in torch.aminmax(ids[begin:end]))
                if low < 0 or high >= self._rows[name]:
                    raise ValueError(f"table {name}: ids span {low} to {high}, rows are 0 to {self._rows[name] - 1}")


def assert_in_range(features: KeyedJaggedTensor, rows: Mapping[str, int]) -> None:
    """Ends the process where an id is out of its table's rows, without waiting for the device to look: on a GPU as a
    device-side assertion, at some later call. fbgemm's own check takes two thirds as long as the lookup of as many ids
    itself (docs/experiments.md), so on a GPU it is off, and nothing else keeps a lookup within its table.

    Raises:
        RuntimeError: on a CPU, at once.
    """
    ids, ends = features.values(), features.offset_per_key()
    if not len(ids):
        return
    in_range_V = torch.empty_like(ids, dtype=torch.bool)
    for name, begin, end in zip(features.keys(), ends, ends[1:], strict=False):
        torch.lt(ids[begin:end], rows[name], out=in_range_V[begin:end])
    torch._assert_async(in_range_V.all() & (ids.amin() >= 0), "an id is out of the rows of its table")


class Lookup:
    """A lookup on its way: `begin`, then perhaps `send`, then `rows`, each of them collective and in one order."""

    def __init__(self, collection, features: KeyedJaggedTensor, names: list[str]):
        self._collection, self._names = collection, names
        self._context = collection.create_context()
        self._sizes = collection.input_dist(self._context, features)
        self._ids = None

    def send(self) -> None:
        """The second leg: all know by now how many ids come from whom, and the ids themselves follow."""
        if self._ids is None:
            with exchange.waiting():
                self._ids = self._sizes.wait()

    def rows(self) -> dict[str, Tensor]:
        """What `ShardedTables.forward` returns; once."""
        self.send()
        with exchange.waiting():
            ids = self._ids.wait()
        looked_up = self._collection.compute_and_output_dist(self._context, ids).wait()
        return {name: looked_up[name].values() for name in self._names}


class LocalLookup(Lookup):
    """A lookup of the one worker there is: TorchRec's kernels by themselves. Its way for several workers, contexts and
    futures included, takes longer than the lookup where nothing has to travel (docs/experiments.md)."""

    def __init__(self, collection, features: KeyedJaggedTensor, names: list[str]):
        self._collection, self._features, self._names = collection, features, names

    def send(self) -> None:
        """Nothing is sent."""

    def rows(self) -> dict[str, Tensor]:
        """What `ShardedTables.forward` returns; once."""
        collection, features = self._collection, self._features
        if collection._features_order:
            features = features.permute(collection._features_order, collection._features_order_tensor)
        looked_up: dict[str, Tensor] = {}
        for lookup, part in zip(collection._lookups, features.split(collection._feature_splits), strict=True):
            rows = lookup(part).view(-1, collection._embedding_dim)
            looked_up.update(zip(part.keys(), rows.split(part.length_per_key()), strict=True))
        return {name: looked_up[name] for name in self._names}


def gather_full(tables: ShardedTables, kind: StateKind = "weight") -> dict[str, Tensor]:
    """Every table whole, on the CPU of every rank, for tests and small tables. Collective.

    Args:
        tables: the sharded tables.
        kind: `weight` for float32 (rows, dim), `momentum` for float32 (rows,).

    Returns:
        By table name; without the tables that have no such state.
    """
    own = [(s.table, s.start, s.tensor.cpu().clone()) for s in tables.local_shards() if s.kind == kind]
    gathered: list[Any] = [None] * tables.world_size
    dist.all_gather_object(gathered, own, group=tables.process_group)
    blocks = sorted((block for of_rank in gathered for block in of_rank), key=lambda block: block[:2])
    names = [spec.name for spec in tables.specs if any(block[0] == spec.name for block in blocks)]
    return {name: torch.cat([tensor for table, _, tensor in blocks if table == name]) for name in names}


def initial_rows(seed: int, spec: TableSpec, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Initial values of the rows start to stop - 1, a function of (seed, table name, row) alone.

    Rows are drawn in chunks that each have a stream of their own, so a rank draws only the chunks it owns rows of,
    and a row keeps its value when the table grows.

    Yields:
        (first row, float32 (rows, dim)), in order, at most `INIT_CHUNK_ROWS` rows at a time.
    """
    for chunk in range(start // INIT_CHUNK_ROWS, -(-stop // INIT_CHUNK_ROWS)):
        first = chunk * INIT_CHUNK_ROWS
        low, high = max(start, first), min(stop, first + INIT_CHUNK_ROWS)
        digest = hashlib.blake2b(f"{seed}/{spec.name}/{chunk}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        # NumPy draws one value after the other, so the rows before `high` do not depend on how many follow.
        values = generator.standard_normal((high - first, spec.dim), dtype=np.float32)[low - first :]
        yield low, torch.from_numpy(values * np.float32(spec.init_std))


def unsharded(specs: Sequence[TableSpec]) -> EmbeddingCollection:
    """The tables as TorchRec takes them, on the meta device: no rank ever holds a whole table. init_fn does nothing;
    the rows are filled once they have their places."""
    tables = [
        EmbeddingConfig(
            name=spec.name,
            num_embeddings=spec.rows,
            embedding_dim=spec.dim,
            feature_names=[spec.name],
            init_fn=_leave_as_is,
        )
        for spec in specs
    ]
    return EmbeddingCollection(tables=tables, device=torch.device("meta"))


def table_sharder(optimizer: OptimizerName, learning_rate: float) -> EmbeddingCollectionSharder:
    """Shards an EmbeddingCollection and fuses its optimizer into the backward pass."""
    fused_params: dict[str, Any] = {"optimizer": _FUSED_OPTIMIZERS[optimizer], "learning_rate": learning_rate}
    if optimizer == "rowwise_adagrad":
        fused_params["eps"] = ADAGRAD_EPS
    return EmbeddingCollectionSharder(fused_params=fused_params)


def table_planner(
    allowed: Mapping[str, list[str]], ranks: int, ranks_per_node: int, device_type: str, memory_bytes: int | None
) -> EmbeddingShardingPlanner:
    """TorchRec's planner with the sharding types that each table may have.

    Args:
        memory_bytes: of a GPU; None is TorchRec's own assumption, as for the memory of a CPU rank (128 GiB).
    """
    checked = BoundsCheckMode.NONE if device_type == "cuda" else None  # `assert_in_range` does it
    return EmbeddingShardingPlanner(
        topology=Topology(
            world_size=ranks,
            local_world_size=ranks_per_node,
            compute_device=device_type,
            **({} if memory_bytes is None else {"hbm_cap" if device_type == "cuda" else "ddr_cap": memory_bytes}),
        ),
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED_SHARE),
        constraints={
            name: ParameterConstraints(sharding_types=types, compute_kernels=["fused"], bounds_check_mode=checked)
            for name, types in allowed.items()
        },
        stats=[],
        debug=False,
    )


def choose_places(
    specs: Sequence[TableSpec], ranks: int, planned: Callable[[Mapping[str, list[str]]], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Where every table goes: {table: ParameterSharding}.

    Args:
        planned: the planner's answer to the sharding types that each table may have.

    Raises:
        InputError: the tables do not fit.
    """
    allowed = {spec.name: _sharding_types(spec, ranks) for spec in specs}
    try:
        plan = planned(allowed)
        free = [spec for spec in specs if len(allowed[spec.name]) > 1]
        if not free:
            return plan
        # Every kind of sharding costs five collectives a step of its own, so the small tables go with the largest.
        kind = plan[max(free, key=lambda spec: spec.rows).name].sharding_type
        if all(plan[spec.name].sharding_type == kind for spec in free):
            return plan
        return planned(allowed | {spec.name: [kind] for spec in free})
    except PlannerError as error:
        gib = sum(spec.rows * spec.dim * 4 for spec in specs) / 2**30
        raise InputError(
            f"the embedding tables ({gib:.1f} GiB) find no place on {ranks} worker(s): use more workers, "
            f"fewer rows or a smaller dim ({str(error).strip().splitlines()[0]})"
        ) from error


def _sharding_types(spec: TableSpec, world_size: int) -> list[str]:
    """What the planner may choose. TorchRec cuts rows into ceil(rows / ranks) and fails on a rank left with none."""
    block = -(-spec.rows // world_size)
    if spec.sharding == "table_wise" or block * (world_size - 1) >= spec.rows:
        return ["table_wise"]
    return ["table_wise", "row_wise"] if spec.sharding == "auto" else ["row_wise"]


def check_specs(specs: Sequence[TableSpec]) -> None:
    if not specs:
        raise InputError("no embedding tables: give at least one")
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise InputError(f"embedding tables share a name: {', '.join(names)}")
    if len({spec.dim for spec in specs}) > 1:
        widths = ", ".join(f"{spec.name}={spec.dim}" for spec in specs)
        raise InputError(f"tables of one collection share their dim; here {widths}")


def _leave_as_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def quiet_torchrec() -> Iterator[None]:
    """Hold back warnings that say nothing to the user: how the topology was made, and what FX tracing will mean."""
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    logger = logging.getLogger("torchrec")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
