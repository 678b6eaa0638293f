"""CRM: the dense half of the model, from table rows to loss, item vectors and user vectors.

One module holds both towers, so that one engine trains them and one forward reaches the loss. It returns
`(loss, detached extras)` and knows nothing of Ray, DeepSpeed or sharding: the tables' rows come in, and whatever
gradient they ask for flows back through them.

Score: s(u, i) = similarity(u, v_i) + b_i with b_i = log q_i + delta_i, delta_i learned and started at 0. In the
loss log q comes off again (logQ correction), so the softmax trains u, v and delta against the item's popularity, and
the index, which adds log q back, ranks by the estimate of log p(i | user, W).

Shape suffixes: U = items of the batch, V = views, D = width, R = positions read (local targets), N, G = columns of the
softmax, this worker's and all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import CrmConfig, ModelConfig, RouterConfig
from embeddings.similarity import Similarity
from embeddings.tables import TableSpec
from trainer.batches import ItemBatch, WindowBatch
from trainer.losses import exchange_with_gradient, gather_with_gradient, in_batch_softmax
from trainer.towers import DecisionTransformerTower, DnnTower, ItemEncoder, ItemTower, RequestEncoder, ViewEncoder


@dataclass(frozen=True)
class FeatureSizes:
    """Rows of every lookup, the unknown row included. `categories`, `users`: table name without prefix -> rows.
    `watch_views`: training targets in each watch-time bucket, the unknown one first; empty where nothing is known."""

    item: int
    author: int
    tag: int
    duration_buckets: int
    content_dim: int
    categories: dict[str, int]
    users: dict[str, int] = field(default_factory=dict)
    watch_views: tuple[int, ...] = ()

    @classmethod
    def of(cls, catalogue, users=None, watch_views=()) -> FeatureSizes:
        """From a trainer.catalogue.Catalogue, UserFeatures where there are any, and TargetStatistics.watch_views_B."""
        content = catalogue.content_NC
        return cls(item=len(catalogue.item_id_N), author=int(catalogue.author_rows), tag=int(catalogue.tag_rows_count),
                   duration_buckets=int(catalogue.duration_buckets),
                   content_dim=0 if content is None else int(content.shape[1]),
                   categories={name: int(rows) for name, rows in catalogue.category_rows.items()},
                   users={} if users is None else {name: int(rows) for name, rows in users.category_rows.items()},
                   watch_views=tuple(int(views) for views in watch_views))


def table_specs(sizes: FeatureSizes, config: CrmConfig | RouterConfig) -> list[TableSpec]:
    """The sharded tables: items, authors, tags and the catalogue's categories, all of one width."""
    rows = {"item": sizes.item, "author": sizes.author, "tag": sizes.tag}
    rows |= {f"category_{name}": count for name, count in sizes.categories.items()}
    rows |= {f"user_{name}": count for name, count in sizes.users.items()}
    return [TableSpec(name=name, rows=count, dim=config.tables.dim, sharding=config.tables.sharding,
                      init_std=config.tables.init_std) for name, count in rows.items()]


class CrmModel(nn.Module):
    """Both towers and the loss.

    Args:
        config: sizes. model: which user tower and which condition. sizes: rows of the lookups.
    """

    def __init__(self, config: CrmConfig, model: ModelConfig, sizes: FeatureSizes):
        super().__init__()
        tower, conditioned = config.tower, model.condition != "none"
        watch_views = sizes.watch_views or [0] * (config.condition.buckets + 1)
        self.similarity = Similarity(kind=config.similarity, temperature=config.temperature)
        self.log_q, self.item_bias = config.log_q, config.item_bias
        single = ["item", "author", *(f"category_{name}" for name in sizes.categories)]
        self.items = ItemEncoder(single, config.tables.dim, tower.dim, tower.hidden, sizes.duration_buckets,
                                 sizes.content_dim, tower.dropout)
        self.item_tower = ItemTower(tower.dim)
        self.views = ViewEncoder(tower.dim, watch_views, tower.dropout)
        users = [f"user_{name}" for name in sizes.users]
        context = tower.clock or bool(users)
        self.request = RequestEncoder(tower.dim, config.tables.dim, tower.clock, users) if context else None
        if model.tower == "dnn":
            self.user_tower = DnnTower(tower.dim, tower.hidden, tower.dim, watch_views, conditioned, context,
                                       tower.dropout, tower.past_path)
        else:
            self.user_tower = DecisionTransformerTower(
                tower.dim, tower.hidden, tower.dim, tower.layers, tower.heads, tower.history + 1, watch_views,
                conditioned, context, tower.dropout, tower.past_path)

    def forward(self, task: str, batch, tables: dict[str, Tensor]):
        """task "loss": `(loss, extras)` of a WindowBatch; "items": index vectors of an ItemBatch; "users": query
        vectors of a WindowBatch's last positions. One entry, because the engine wraps one forward."""
        if task == "loss":
            return self.loss(batch, tables)
        if task == "items":
            return self.index_vectors(batch, tables)
        return self.query_vectors(batch, tables)

    def loss(self, batch: WindowBatch, tables: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """In-batch softmax over the targets of all workers (Eq. 2), or of the groups they are in, at every target
        position."""
        hidden_UD = self.items(batch.items, tables)
        user_RD = self._users(hidden_UD, batch, tables).float()
        vector_UD, delta_U = self.item_tower(hidden_UD)
        # One exchange for the vectors and the bias: collectives on a CPU cost more than their bytes.
        item_UE = torch.cat([vector_UD, delta_U[:, None] * self.item_bias], dim=1).float()
        item_GE = self._columns(F.embedding(batch.given_item_S, item_UE), batch)
        total, losses, extras = float(sum(batch.targets_per_rank)), [], []
        begin, first = 0, 0
        for rows, columns in zip(batch.targets_per_group, batch.columns_per_group, strict=True):
            end, last = begin + rows, first + columns
            log_q_G = batch.column_log_q_G[first:last]
            bias_G = item_GE[first:last, -1] + (log_q_G if self.item_bias else 0.0)
            logits_RG = self.similarity.scores(user_RD[begin:end], item_GE[first:last, :-1], bias_G)
            loss, told = in_batch_softmax(
                logits_RG, batch.target_column_R[begin:end], log_q_G=log_q_G if self.log_q else None,
                count_G=batch.column_count_G[first:last], total_weight=total)
            losses.append(loss)
            extras.append(told)
            begin, first = end, last
        return sum(losses[1:], losses[0]), {name: sum(told[name] for told in extras) for name in extras[0]}

    def _columns(self, given_SE: Tensor, batch: WindowBatch) -> Tensor:
        """What the workers give each other, as this one's columns: float (G, E)."""
        if not batch.given_per_rank:  # each to all
            return gather_with_gradient(given_SE, rows_per_rank=batch.columns_per_rank)
        arrived_GE = exchange_with_gradient(given_SE, sent_per_rank=batch.given_per_rank,
                                            received_per_rank=batch.columns_per_rank, travels=batch.columns_travel)
        return arrived_GE if len(batch.columns_per_group) == 1 else F.embedding(batch.column_arrival_G, arrived_GE)

    def index_vectors(self, items: ItemBatch, tables: dict[str, Tensor]) -> Tensor:
        """float32 (U, D + 1): what the index holds of these items."""
        vector_UD, delta_U = self.item_tower(self.items(items, tables))
        bias_U = delta_U.float() + items.log_q_U if self.item_bias else torch.zeros_like(items.log_q_U)
        return self.similarity.index_vectors(vector_UD.float(), bias_U)

    def query_vectors(self, batch: WindowBatch, tables: dict[str, Tensor]) -> Tensor:
        """float32 (R, D + 1): what the index is asked with, one for each request of the batch."""
        return self.similarity.query_vectors(self._users(self.items(batch.items, tables), batch, tables).float())

    def _users(self, hidden_UD: Tensor, batch: WindowBatch, tables: dict[str, Tensor]) -> Tensor:
        context_RD = None if self.request is None else self.request(batch, tables)
        return self.user_tower(self.views(hidden_UD, batch), batch, context_RD)
