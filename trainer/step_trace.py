"""What a training step costs: one step of the real towers, on a few made rows, counted and carried on to any batch.

No formula stands for a tower here: forward and backward of the model itself are run on the CPU with 1, 2 and 3 rows,
while torch tells what autograd keeps and which matrix products are done. Everything grows with the rows B of a worker,
but for the softmax, whose logits are R x G, local targets times the distinct ones of all workers:

    f(B, G) = a + b B + c R G,       R = targets_per_row * B,   G = R * workers        (a, b, c from the three counts)

Rows are full windows of `history + 1` distinct items, or requests with all their triggers and views: what is said of
real batches is an upper bound. Attention counts as if nothing were masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Config, ModelConfig, RouterModelConfig
from trainer.batches import HOURS, ItemBatch, ItemFeatures, WindowBatch
from trainer.catr import CatrModel
from trainer.crm import CrmModel, FeatureSizes, table_specs
from trainer.item_value import TOPS
from trainer.router_data import LATEST_VIEWS, FeatureScales, RouterBatch

ROWS = (1, 2, 3)


@dataclass(frozen=True)
class Growth:
    """A count as a + b B + c R G (the module's docstring)."""

    fixed: float
    per_row: float
    per_logit: float

    def of(self, rows: int, logits: int) -> float:
        return self.fixed + self.per_row * rows + self.per_logit * logits


@dataclass(frozen=True)
class StepTrace:
    """A model's step.

    Attributes:
        parameters: trained ones, of the towers. largest: of the largest of them.
        saved_floats, saved_others: bytes that autograd keeps between forward and backward, of float32 and of integer
            tensors.
        flops: of forward and backward.
        targets_per_row: R / B; 0 where no worker needs another one's targets.
        ids_per_row: lookups of every table a row.
        gathered_width: floats a target that are gathered from all workers; 0 for none.
    """

    parameters: int
    largest: int
    saved_floats: Growth
    saved_others: Growth
    flops: Growth
    targets_per_row: int
    ids_per_row: Mapping[str, float]
    gathered_width: int

    def saved_bytes(self, rows: int, logits: int, low: bool) -> float:
        """Of a step with `rows` rows; with bfloat16 towers half of what float32 ones keep, but for the logits."""
        kept = self.saved_floats.per_logit * logits
        return kept + (self.saved_floats.of(rows, logits) - kept) * (0.5 if low else 1) + self.saved_others.of(
            rows, logits)


def trace_crm(config: Config, model: ModelConfig, sizes: FeatureSizes, tags_per_item: float, *,
              on_gpu: bool) -> StepTrace:
    """The step of one of `crm.models`.

    Args:
        tags_per_item: mean number. on_gpu: where dropout needs no matrix of attention weights.
    """
    tower, train = config.crm.tower, config.train
    positions = tower.history + 1
    targets = 1 if model.loss_positions == "last" else train.stride or max(1, tower.history // 2)
    module = CrmModel(config.crm, model, sizes)
    buckets = config.crm.condition.buckets

    def batch_of(rows: int) -> WindowBatch:
        items = rows * positions
        place_V = torch.arange(items)
        read_R = place_V[place_V % positions >= positions - targets]
        return WindowBatch(
            items=_items(items, rows, sizes, tags_per_item), place_V=place_V, item_V=torch.arange(items),
            watch_bucket_V=place_V % (buckets + 1), condition_bucket_V=place_V % (buckets + 1),
            hour_V=place_V % (HOURS + 1), gap_V=place_V % 2, read_R=read_R, user_B=torch.arange(rows),
            row_B=torch.arange(rows), windows=rows, positions=positions, targets_per_rank=[len(read_R)],
            targets_per_group=[len(read_R)], columns_per_group=[len(read_R)],
            column_log_q_G=torch.zeros(len(read_R)), column_count_G=torch.ones(len(read_R)),
            column_arrival_G=torch.arange(len(read_R)), given_item_S=read_R, given_per_rank=[],
            columns_per_rank=[len(read_R)], columns_travel=False, target_column_R=torch.arange(len(read_R)))

    return _trace(module, batch_of, config.crm.tables.dim, sizes, _ids(config.crm, sizes, positions, tags_per_item),
                  targets, tower.dim + 1, on_gpu=on_gpu)


def trace_router(config: Config, model: RouterModelConfig, sizes: FeatureSizes, tags_per_item: float, *,
                 on_gpu: bool) -> StepTrace:
    """The step of one of `router.models`; a row is a request."""
    router, channels = config.router, len(config.channels.names)
    triggers, views, buckets = config.replay.requests.triggers, router.history, config.crm.condition.buckets
    trigger_features, list_features = router_feature_counts(config)
    module = CatrModel(router, model, sizes, FeatureScales(
        np.zeros(trigger_features, np.float32), np.ones(trigger_features, np.float32),
        np.zeros((channels, list_features), np.float32), np.ones((channels, list_features), np.float32),
        (0,) * (buckets + 1)), [config.replay.cap] * channels, 0.5)

    def batch_of(rows: int) -> RouterBatch:
        of_T, of_V = torch.arange(rows * triggers), torch.arange(rows * views)
        labels = torch.zeros(len(of_T), channels)
        return RouterBatch(
            items=_items(len(of_T) + len(of_V), rows, sizes, tags_per_item), user_B=torch.arange(rows),
            row_B=torch.arange(rows), request_T=of_T // triggers, place_T=of_T, item_T=of_T,
            trigger_TF=torch.zeros(len(of_T), trigger_features),
            list_TCF=torch.zeros(len(of_T), channels, list_features), request_V=of_V // views, place_V=of_V,
            item_V=len(of_T) + of_V, watch_bucket_V=of_V % (buckets + 1), ago_V=of_V % views, intensity_TC=labels,
            label_TC=labels.bool(), uniqueness_TC=labels, reward_ms_TC=labels.long(),
            weight_T=torch.ones(len(of_T)) / len(of_T), weight_B=torch.ones(rows) / rows, requests=rows,
            triggers=triggers, views=views)

    return _trace(module, batch_of, router.tables.dim, sizes, _ids(router, sizes, triggers + views, tags_per_item),
                  0, 0, on_gpu=on_gpu)


def router_feature_counts(config: Config) -> tuple[int, int]:
    """Columns of `router_data`: of a trigger, and of a list."""
    trigger = 14 + 2 * len(config.data.feedback)
    return trigger, 10 + 1 + len(LATEST_VIEWS) + len(TOPS) if config.router.features == "all" else 0


def _items(items: int, users: int, sizes: FeatureSizes, tags_per_item: float) -> ItemBatch:
    """As many distinct items, with about as many tags each, and users."""
    ends = np.round(np.arange(items + 1) * tags_per_item).astype(np.int64)
    row_N = np.arange(items)
    catalogue = SimpleNamespace(
        item_id_N=row_N, author_row_N=np.zeros(items, np.int32), tag_offsets_N1=ends,
        tag_rows=np.zeros(int(ends[-1]), np.int32), duration_bucket_N=np.zeros(items, np.int32),
        content_NC=np.zeros((items, sizes.content_dim), np.float32) if sizes.content_dim else None,
        categories={name: np.zeros(items, np.int32) for name in sizes.categories})
    made_users = SimpleNamespace(rows_of=lambda ids: {name: np.zeros(len(ids), np.int32) for name in sizes.users})
    return ItemFeatures(catalogue, np.zeros(items, np.float32), made_users).take(row_N, np.arange(users))


def _ids(config: Any, sizes: FeatureSizes, items: int, tags_per_item: float) -> dict[str, float]:
    """Lookups of each table a row."""
    counts = {spec.name: float(items) for spec in table_specs(sizes, config)}
    return counts | {"tag": items * tags_per_item} | {f"user_{name}": 1.0 for name in sizes.users}


def _trace(module: nn.Module, batch_of, table_dim: int, sizes: FeatureSizes, ids_per_row: Mapping[str, float],
           targets: int, gathered_width: int, *, on_gpu: bool) -> StepTrace:
    module.train(not on_gpu)  # on a GPU dropout keeps a mask of bytes, which is left out
    floats, others, flops = [], [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a few small products: more threads only wait for each other
    try:
        for rows in ROWS:
            batch = batch_of(rows)
            tables = {name: torch.zeros(len(batch.items.features[name].values()), table_dim, requires_grad=True)
                      for name in ids_per_row}
            for counts, count in zip((floats, others, flops), _counted_step(module, batch, tables), strict=True):
                counts.append(count)
    finally:
        torch.set_num_threads(threads)
    trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    return StepTrace(sum(trained), max(trained), _growth(floats, targets), _growth(others, targets),
                     _growth(flops, targets), targets, dict(ids_per_row), gathered_width)


def _counted_step(module: nn.Module, batch: Any, tables: dict[str, Tensor]) -> tuple[int, int, int]:
    """Bytes of floats and of everything else that autograd keeps, and floating-point operations, of a step."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, tuple[bool, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor.is_floating_point(), storage.nbytes()
        return tensor

    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
                 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = module("loss", batch, tables)
        loss.backward()
    module.zero_grad(set_to_none=True)
    floats = sum(size for is_float, size in kept.values() if is_float)
    return floats, sum(size for _, size in kept.values()) - floats, counter.get_total_flops()


def _attention_flops(query_shape: Sequence[int], key_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products of (tokens, width) and (width, tokens) for every head."""
    batch, heads, tokens, width = query_shape
    return 4 * batch * heads * tokens * key_shape[2] * width


def _attention_backward_flops(gradient_shape: Sequence[int], query_shape: Sequence[int], key_shape: Sequence[int],
                              *_: Any, **__: Any) -> int:
    """Five products: the weights again, and the gradients of weights, values, queries and keys."""
    return _attention_flops(query_shape, key_shape) * 5 // 2


def _growth(counted: Sequence[float], targets: int) -> Growth:
    """a + b B + c (targets B)^2 through the counts of a lone worker; a line through the outer two without targets."""
    if targets:
        fixed, per_row, square = np.linalg.solve([[1.0, rows, rows**2] for rows in ROWS], counted)
        return Growth(fixed, per_row, max(0.0, round(square, 3)) / targets**2)
    per_row = (counted[-1] - counted[0]) / (ROWS[-1] - ROWS[0])
    return Growth(counted[0] - per_row * ROWS[0], per_row, 0.0)
