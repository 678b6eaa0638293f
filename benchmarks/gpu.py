"""What a GPU makes of towers, tables and index, against what the same card can do at most, measured in the same run.

    python benchmarks/gpu.py --device cuda [--compile] [--rounds 5] [--json PATH]        has marks
    python benchmarks/gpu.py --device cpu [--json PATH]                                  small sizes, no marks

On a GPU, at the sizes of the options' defaults:

    towers   forward and backward of the user tower (1,024 wide, 8 layers, 256 tokens, bf16), model FLOP/s over those of
             the best square bf16 product: >= 0.5. Counted are products of matrices alone, of attention the causal half;
             backward counts twice. --compile: through torch.compile
    tables   rows looked up in embeddings.tables.ShardedTables (one rank, its whole forward), bytes read and written
             over those of a device copy: >= 0.7. Forward and backward with the fused optimizer: no mark
    index    a Flat index of 27.4 million x 128 in fp16 built from host memory, and the top 100 of 10,000 queries:
             <= 60 s in all, and recall@100 against exact search in float32 >= 0.99

With --device cpu the same code runs at small sizes and no row but the recall has a mark; what is checked instead ends
the script with an error: the FLOPs against torch's own counter, looked up rows and their update against plain indexing
and the formula of row-wise Adagrad.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rows import ROOT, parser, report, row
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

from embeddings.index import IndexSpec, ItemIndex  # noqa: E402
from embeddings.tables import ADAGRAD_EPS, ShardedTables, TableSpec, gather_full  # noqa: E402
from trainer.towers import DecisionTransformerTower  # noqa: E402

GIB = 2**30
# Of each size: on the CPU, on a GPU.
SIZES = {"width": (64, 1024), "layers": (2, 8), "length": (32, 256), "heads": (2, 16), "windows": (4, 128),
         "product": (512, 8192), "table_rows": (20_000, 20_000_000), "table_dim": (64, 128), "ids": (5_000, 4_000_000),
         "items": (20_000, 27_400_000), "vector": (64, 128), "queries": (100, 10_000)}
MEANINGS = {"width": "of the tower", "layers": "of the tower", "length": "views of a window, tokens of the tower",
            "heads": "of attention", "windows": "of a batch", "product": "side of the matrices that give the peak",
            "table_rows": "of the table", "table_dim": "of a row", "ids": "of a lookup", "items": "in the index",
            "vector": "width of the vectors in the index", "queries": "asked of the index"}
TOP, RECALL_QUERIES = 100, 200
FIRST_REPEATS = 3  # not counted: allocation, compilation


# -------------------------------------------------------------------------------------------------------------- clocks

def seconds_of(act: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of one call, of `repeats` in a row; on a GPU by its own clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            act()
        return (time.perf_counter() - began) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        act()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000 / repeats


def rounds_of(act: Callable[[], Any], device: torch.device, rounds: int, repeats: int) -> list[float]:
    """Seconds of one call in each round."""
    seconds_of(act, device, FIRST_REPEATS)
    return [seconds_of(act, device, repeats) for _ in range(rounds)]


# -------------------------------------------------------------------------------------------------------------- towers

def tower_flops(windows: int, length: int, width: int, hidden: int, layers: int, out: int, reads: int,
                causal: bool = True) -> float:
    """FLOPs of forward and backward of an unconditioned `DecisionTransformerTower` on full windows: products of
    matrices alone, a product of (n, k) and (k, m) being 2 n k m, and backward two products for each.

    Args:
        reads: positions that a user vector is read at. causal: of attention's two products only what lies in the past
            counts, half and the diagonal; else all, as torch's counter has it.
    """
    tokens = windows * length
    layer = 2 * tokens * (4 * width * width + 2 * width * hidden)
    pairs = length * (length + 1) / 2 if causal else length * length
    attention = 2 * 2 * windows * pairs * width
    head = 2 * reads * (width * hidden + hidden * out)
    return 3.0 * (layers * (layer + attention) + head)


def tower_and_batch(sizes: argparse.Namespace, device: torch.device, dtype: torch.dtype, dropout: float = 0.0
                    ) -> tuple[nn.Module, SimpleNamespace, Tensor]:
    """The tower, full windows that are read at every position, and their tokens (V, width), which want a gradient."""
    torch.manual_seed(0)
    tower = DecisionTransformerTower(
        sizes.width, 4 * sizes.width, sizes.width, sizes.layers, sizes.heads, sizes.length, [0], conditioned=False,
        context=False, dropout=dropout, past_path=False).to(device, dtype).train()
    places = torch.arange(sizes.windows * sizes.length, device=device)
    batch = SimpleNamespace(place_V=places, item_V=places, read_R=places, windows=sizes.windows, positions=sizes.length,
                            key_V=places, row_B=torch.arange(sizes.windows, device=device))
    tokens = torch.randn(len(places), sizes.width, device=device, dtype=dtype, requires_grad=True)
    return tower, batch, tokens


def check_tower_flops(sizes: argparse.Namespace) -> None:
    """The formula against torch's counter, which knows no causality; with dropout, because attention on a CPU is then
    products of its own.

    Raises:
        AssertionError: they differ.
    """
    from torch.utils.flop_counter import FlopCounterMode

    tower, batch, tokens = tower_and_batch(sizes, torch.device("cpu"), torch.float32, dropout=0.1)
    with FlopCounterMode(display=False) as counter:
        tower(tokens, batch, None).sum().backward()
    ours = tower_flops(sizes.windows, sizes.length, sizes.width, 4 * sizes.width, sizes.layers, sizes.width,
                       len(batch.read_R), causal=False)
    assert counter.get_total_flops() == ours, (counter.get_total_flops(), ours)


def print_profile(act: Callable[[], Any]) -> None:
    """Where the time of one call goes, by kernel, on stderr."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        act()
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60),
          file=sys.stderr)


def tower_rows(sizes: argparse.Namespace, device: torch.device, rounds: int, compiled: bool,
               profiled: bool = False) -> Iterator[dict]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    check_tower_flops(argparse.Namespace(**vars(sizes) | {"width": 64, "heads": 2, "layers": 2, "length": 32,
                                                          "windows": 2}))
    a, b = (torch.randn(sizes.product, sizes.product, device=device, dtype=dtype) for _ in range(2))
    tower, batch, tokens = tower_and_batch(sizes, device, dtype)
    parameters = list(tower.parameters())
    call = torch.compile(tower) if compiled else tower
    upstream = torch.randn(len(tokens), sizes.width, device=device, dtype=dtype)

    def step() -> None:
        torch.autograd.grad(call(tokens, batch, None), [tokens, *parameters], upstream)

    repeats = 10 if on_gpu else 3
    # In turns: a card that gets warm slows both down.
    seconds_of(lambda: a @ b, device, FIRST_REPEATS)
    seconds_of(step, device, FIRST_REPEATS)
    peak, reached = [], []
    flops = tower_flops(sizes.windows, sizes.length, sizes.width, 4 * sizes.width, sizes.layers, sizes.width,
                        len(batch.read_R))
    for _ in range(rounds):
        peak.append(2 * sizes.product**3 / seconds_of(lambda: a @ b, device, repeats))
        reached.append(flops / seconds_of(step, device, repeats))
    if profiled and on_gpu:
        print_profile(step)
    kind = str(dtype).removeprefix("torch.")
    yield row(f"{device.type}: towers, forward and backward: FLOP/s / peak of {kind} products",
              [one / max(peak) for one in reached], 0.5 if on_gpu else None, peak_tflops=max(peak) / 1e12,
              tower_tflops=max(reached) / 1e12, compiled=compiled,
              sizes=f"{sizes.width} wide, {sizes.layers} layers, {sizes.length} tokens, {sizes.windows} windows, "
                    f"{'compiled' if compiled else 'eager'}; peak {max(peak) / 1e12:,.3g} TFLOP/s at {sizes.product:,}")


# -------------------------------------------------------------------------------------------------------------- tables

def features_of(ids: Tensor):
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(keys=["item"], values=ids, lengths=torch.ones_like(ids))


def check_tables(device: torch.device) -> None:
    """A small table: rows as plain indexing gives them, and after backward as row-wise Adagrad's formula does.

    Raises:
        AssertionError: they differ.
    """
    rows, dim, rate = 1000, 16, 0.1
    tables = ShardedTables([TableSpec("item", rows, dim, init_std=1.0)], device=device, learning_rate=rate, seed=0)
    before = gather_full(tables)["item"]
    ids = torch.arange(0, 3 * rows, 7, device=device) % rows  # a few rows come twice
    found = tables(features_of(ids))["item"]
    assert torch.equal(found.detach().cpu(), before[ids.cpu()]), "looked up rows are not the table's"
    gradient = torch.randn(len(ids), dim, generator=torch.Generator().manual_seed(1))
    found.backward(gradient.to(device))
    summed = torch.zeros(rows, dim).index_add_(0, ids.cpu(), gradient)
    momentum = summed.square().mean(dim=1)
    wanted = before - rate * summed / (momentum.sqrt() + ADAGRAD_EPS)[:, None]
    torch.testing.assert_close(gather_full(tables)["item"], wanted, rtol=1e-4, atol=1e-5)


def table_rows(sizes: argparse.Namespace, device: torch.device, rounds: int, profiled: bool = False) -> Iterator[dict]:
    check_tables(device)
    tables = ShardedTables([TableSpec("item", sizes.table_rows, sizes.table_dim)], device=device, learning_rate=0.1,
                           seed=0)
    ids = torch.randint(sizes.table_rows, (sizes.ids,), generator=torch.Generator().manual_seed(0)).to(device)
    features, moved_bytes = features_of(ids), 2 * sizes.ids * sizes.table_dim * 4
    source = torch.randn(max(1, moved_bytes // 8), device=device)  # as many bytes are read and written as in the lookup
    target, gradient = torch.empty_like(source), torch.randn(sizes.ids, sizes.table_dim, device=device)

    def look_up() -> None:
        with torch.no_grad():
            tables(features)

    def train() -> None:
        tables(features)["item"].backward(gradient)

    repeats = 20
    if profiled and device.type == "cuda":
        look_up()
        print_profile(look_up)
    copy_s = rounds_of(lambda: target.copy_(source), device, rounds, repeats)
    rates = {"copy": max(moved_bytes / seconds for seconds in copy_s)}
    told = f"{sizes.ids:,} ids of {sizes.table_rows:,} x {sizes.table_dim} float32"
    for name, act, reach in (("forward", look_up, 0.7), ("forward, backward and update", train, None)):
        found = [moved_bytes / seconds for seconds in rounds_of(act, device, rounds, repeats)]
        yield row(f"{device.type}: table lookups, {name}: bytes/s of the forward / of a copy",
                  [one / rates["copy"] for one in found], reach if device.type == "cuda" else None,
                  sizes=f"{told}; copy {rates['copy'] / 1e9:,.3g} GB/s", copy_gb_s=rates["copy"] / 1e9,
                  gb_s=max(found) / 1e9)


# --------------------------------------------------------------------------------------------------------------- index

def index_rows(sizes: argparse.Namespace, device: torch.device, rounds: int) -> Iterator[dict]:
    """On a GPU the vectors lie in host memory, as a rebuild has them."""
    import numpy as np

    rng, vectors_ND = np.random.default_rng(0), np.empty((sizes.items, sizes.vector), np.float32)
    for begin in range(0, sizes.items, 1 << 20):
        part = vectors_ND[begin:begin + (1 << 20)]
        rng.standard_normal(out=part, dtype=np.float32)
    ids_N, queries_QD = np.arange(sizes.items, dtype=np.int64), rng.standard_normal(
        (sizes.queries, sizes.vector), dtype=np.float32)
    spec, seconds, recalls = IndexSpec("SQfp16", device=device.type), [], []
    for _ in range(rounds):
        began = time.perf_counter()
        index = ItemIndex.build(vectors_ND, ids_N, spec)
        index.search(queries_QD, TOP)
        seconds.append(time.perf_counter() - began)
        recalls.append(index.recall_against_exact(queries_QD[:RECALL_QUERIES], TOP))
        del index
    told = f"{sizes.items:,} x {sizes.vector} in fp16, top {TOP} of {sizes.queries:,} queries"
    yield row(f"{device.type}: Flat index rebuilt and asked, s", seconds, 60.0 if device.type == "cuda" else None,
              "lower", sizes=told)
    yield row(f"{device.type}: Flat index in fp16: recall@{TOP} against exact search", recalls, 0.99, sizes=told)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--compile", action="store_true", help="the towers through torch.compile")
    options.add_argument("--profile", action="store_true", help="where the time of towers and lookups goes, on stderr")
    options.add_argument("--parts", nargs="+", choices=["towers", "tables", "index"],
                         default=["towers", "tables", "index"])
    for name, (small, large) in SIZES.items():
        options.add_argument(f"--{name.replace('_', '-')}", type=int,
                             help=f"{MEANINGS[name]}; default {large:,} on a GPU, {small:,} on a CPU")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            options.error("--device cuda: torch sees no GPU here; --device cpu checks the same code")
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    sizes = argparse.Namespace(**{
        name: getattr(arguments, name) or default[device.type == "cuda"] for name, default in SIZES.items()})
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows: list[dict[str, Any]] = []
    if "towers" in arguments.parts:
        rows += tower_rows(sizes, device, arguments.rounds, arguments.compile, arguments.profile)
    if "tables" in arguments.parts:
        rows += table_rows(sizes, device, arguments.rounds, arguments.profile)
    if "index" in arguments.parts:
        rows += index_rows(sizes, device, arguments.rounds)
    assert all(math.isfinite(one["ratio"]) for one in rows)
    if device.type == "cuda":
        for one in rows:
            one["card"] = torch.cuda.get_device_name(device)
    dist.destroy_process_group()
    return report(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
