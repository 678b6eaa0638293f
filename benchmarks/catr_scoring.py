"""CATR scoring on one core: scores a second, and the share of the machine's matrix-product peak that they take.

    python benchmarks/catr_scoring.py [--requests N] [--triggers N] [--rounds 7] [--json PATH]

The router of configs/schema.py's defaults scores batches of requests: item features looked up in its tables, target
attention over the recent views, and the heads of three channels. The peak is that of float32 products of square
matrices, the best of several sizes, measured in turn with the scoring on the same core. What the products of a batch
cost is counted by PyTorch as they run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from rows import alternating, cores, over, parser, report, row

CHANNELS, TRIGGER_FEATURES, LIST_FEATURES = 3, 14, 14  # the features of logs without feedback columns
LEAST = 100_000
PEAK_SIZES = (512, 1024, 2048)


def made_batch(catalogue, requests: int, triggers: int, views: int):
    """Requests with so many triggers and views each, drawn at random."""
    import numpy as np
    import torch

    from trainer.batches import ItemFeatures
    from trainer.router_data import RouterBatch

    rng, total, viewed = np.random.default_rng(0), requests * triggers, requests * views
    rows = len(catalogue.item_id_N)
    item_row_U, item = np.unique(rng.integers(1, rows, total + viewed), return_inverse=True)
    request_T, request_V = (np.repeat(np.arange(requests), many) for many in (triggers, views))
    trigger_TF = rng.normal(size=(total, TRIGGER_FEATURES)).astype(np.float32)
    trigger_TF[rng.random(trigger_TF.shape) < 0.1] = np.nan
    zeros_TC = np.zeros((total, CHANNELS), np.float32)
    arrays = {
        "user_B": np.arange(requests), "row_B": np.arange(requests), "request_T": request_T,
        "place_T": np.arange(total), "item_T": item[:total],
        "trigger_TF": trigger_TF,
        "list_TCF": rng.normal(size=(total, CHANNELS, LIST_FEATURES)).astype(np.float32), "request_V": request_V,
        "place_V": np.arange(viewed), "item_V": item[total:], "watch_bucket_V": rng.integers(0, 100, viewed),
        "ago_V": np.tile(np.arange(views)[::-1].copy(), requests), "intensity_TC": zeros_TC,
        "label_TC": zeros_TC > 0, "uniqueness_TC": zeros_TC, "reward_ms_TC": zeros_TC.astype(np.int64),
        "weight_T": np.full(total, 1 / total, np.float32), "weight_B": np.full(requests, 1 / requests, np.float32)}
    features = ItemFeatures(catalogue, np.zeros(rows, np.float32))
    return RouterBatch(items=features.take(item_row_U, np.arange(requests)), requests=requests, triggers=triggers,
                       views=views, **{name: torch.from_numpy(values) for name, values in arrays.items()})


def scorer(catalogue, batch):
    """A call that scores the batch: float32 (T, 2C)."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from configs.schema import RouterConfig
    from trainer.catr import CatrModel
    from trainer.crm import FeatureSizes, table_specs
    from trainer.router_data import FeatureScales

    config, sizes = RouterConfig(), FeatureSizes.of(catalogue)
    scales = FeatureScales(np.zeros(TRIGGER_FEATURES, np.float32), np.ones(TRIGGER_FEATURES, np.float32),
                           np.zeros((CHANNELS, LIST_FEATURES), np.float32),
                           np.ones((CHANNELS, LIST_FEATURES), np.float32), (1,) * 101)
    torch.manual_seed(0)
    model = CatrModel(config, config.models[0], sizes, scales, [5.0] * CHANNELS, 0.5).eval()
    weights = {spec.name: torch.randn(spec.rows, spec.dim) for spec in table_specs(sizes, config)}

    @torch.inference_mode()
    def score():
        ids = {name: batch.items.features[name].values() for name in weights}
        return model("score", batch, {name: F.embedding(ids[name], weight) for name, weight in weights.items()})

    return score


def peak_flops(seconds: float = 0.3) -> float:
    """The most float operations a second that products of square matrices reach."""
    import torch

    best = 0.0
    for size in PEAK_SIZES:
        left, right, out = (torch.randn(size, size) for _ in range(3))
        torch.mm(left, right, out=out)
        began, times = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < seconds / len(PEAK_SIZES) or not times:
            torch.mm(left, right, out=out)
            times += 1
        best = max(best, 2 * size**3 * times / took)
    return best


def main() -> int:
    made = parser(__doc__, rounds=7)
    made.add_argument("--items", type=int, default=50_000)
    made.add_argument("--requests", type=int, default=64, help="of a batch")
    made.add_argument("--triggers", type=int, default=100)
    made.add_argument("--views", type=int, default=50)
    made.add_argument("--batches", type=int, default=10, help="of a round")
    arguments = made.parse_args()
    os.sched_setaffinity(0, cores()[:1])
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from worlds import make_sequences, make_world, world_config

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="catr-") as name:
        make_world(Path(name), users=100, items=arguments.items, views_per_user=5, seed=0)
        catalogue = make_sequences(Path(name), world_config(Path(name))).catalogue
        batch = made_batch(catalogue, arguments.requests, arguments.triggers, arguments.views)
        score = scorer(catalogue, batch)
        with FlopCounterMode(display=False) as counted:
            found = score()
        assert torch.isfinite(found).all() and (found[:, CHANNELS:] > 0).all(), "the router has lost its heads"
        flops = counted.get_total_flops()

        def batches_per_s() -> float:
            began = time.perf_counter()
            for _ in range(arguments.batches):
                score()
            return arguments.batches / (time.perf_counter() - began)

        batches_per_s()
        found = alternating(arguments.rounds, {"scoring": batches_per_s, "peak": peak_flops})
    scores = arguments.requests * arguments.triggers * CHANNELS
    sizes = (f"{arguments.requests} requests of {arguments.triggers} triggers, {CHANNELS} channels, {arguments.views} "
             f"views, 1 thread")
    rows = [row("CATR scoring: (trigger, channel) scores/s on one core", [scores * each for each in found["scoring"]],
                LEAST, sizes=sizes),
            row("CATR scoring: share of the core's matmul peak",
                over([flops * each for each in found["scoring"]], found["peak"]), sizes=sizes,
                flops_a_score=flops / scores, peak_gflops=[each / 1e9 for each in found["peak"]])]
    return report(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
