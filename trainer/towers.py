"""The towers: items to vectors, windows of views to user vectors.

Both user towers of CRM (arXiv:2412.13844) give a vector at every position of a window; the vector at position i has
seen the items before x_i and the condition W_i, so one pass trains every position:

    dnn                     u_i = MLP([pools of x_1..x_{i-1}; W_i; clock_i])                           (Eq. 5)
    decision transformer    u_i = the causal transformer over (W_1, x_1, .., W_i), read at the W_i token     (Eq. 6)

Without the condition (`conditioned=False`) only the W tokens or w_{n+1} are taken away; past watch times stay a
feature of every x. In the transformer u_i is then read at x_{i-1} (a learned start token for i = 1): the backbone of
KuaiFormer (arXiv:2411.10057) is the ablation.

Shape suffixes: U = items, T = tags of the items, B = windows, P = positions, D = width, R = rows of a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batches import GAP_BUCKETS, HOURS, ItemBatch, WindowBatch


class ItemEncoder(nn.Module):
    """Item features to one hidden vector: id, author, categories, mean of tags, duration, content.

    Args:
        single: names of the tables with one id an item ("item", "author", categories).
        table_dim: width of a table's row. duration_buckets: rows of the duration lookup. content_dim: 0 for none.
    """

    def __init__(self, single: list[str], table_dim: int, dim: int, hidden: int, duration_buckets: int,
                 content_dim: int, dropout: float):
        super().__init__()
        self.single = single
        self.duration = nn.Embedding(duration_buckets, table_dim)
        nn.init.normal_(self.duration.weight, std=0.05)
        width = table_dim * (len(single) + 2) + content_dim
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))
        self.identity = nn.Linear(table_dim, dim, bias=False)

    def forward(self, items: ItemBatch, tables: dict[str, Tensor]) -> Tensor:
        """float (U, dim)."""
        dtype = self.identity.weight.dtype
        single = [tables[name].to(dtype) for name in self.single]
        tags_TD = tables["tag"].to(dtype)
        tag_UD = tags_TD.new_zeros(len(items.row_U), tags_TD.shape[1]).index_add(0, items.tag_item_T, tags_TD)
        count_U = torch.bincount(items.tag_item_T, minlength=len(items.row_U)).clamp(min=1).to(dtype)
        columns = [*single, tag_UD / count_U[:, None], self.duration(items.duration_bucket_U)]
        if items.content_UC is not None:
            columns.append(items.content_UC.to(dtype))
        return self.identity(single[0]) + self.mlp(torch.cat(columns, dim=1))


class ItemTower(nn.Module):
    """Hidden item vectors to what the index holds: a vector and what the item's bias is above log q."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.vector = nn.Linear(dim, out_dim)
        self.bias = nn.Linear(dim, 1)
        nn.init.zeros_(self.bias.weight)
        nn.init.zeros_(self.bias.bias)

    def forward(self, hidden_UD: Tensor) -> tuple[Tensor, Tensor]:
        """float (U, out_dim) and float (U,)."""
        return self.vector(hidden_UD), self.bias(hidden_UD).squeeze(1)


class ViewEncoder(nn.Module):
    """A view as a token: the item and how long it was watched."""

    def __init__(self, dim: int, watch_rows: int, dropout: float):
        super().__init__()
        self.item = nn.Linear(dim, dim)
        self.watch = nn.Embedding(watch_rows, dim)
        nn.init.normal_(self.watch.weight, std=0.02)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_UD: Tensor, batch: WindowBatch) -> Tensor:
        """float (B, P, dim), x_i of every position."""
        token_BPD = F.embedding(batch.item_BP, self.item(hidden_UD)) + self.watch(batch.watch_bucket_BP)
        return self.dropout(self.norm(token_BPD))


class ClockEncoder(nn.Module):
    """What is known of a request's time: the hour of the day and the gap since the last view."""

    def __init__(self, dim: int):
        super().__init__()
        self.hour = nn.Embedding(HOURS + 1, dim)
        self.gap = nn.Embedding(GAP_BUCKETS + 1, dim)
        for table in (self.hour, self.gap):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, batch: WindowBatch) -> Tensor:
        """float (B, P, dim)."""
        return self.hour(batch.hour_BP) + self.gap(batch.gap_BP)


class ConditionEncoder(nn.Module):
    """W_i as a vector: the lookup of its bucket."""

    def __init__(self, dim: int, watch_rows: int):
        super().__init__()
        self.lookup = nn.Embedding(watch_rows, dim)
        nn.init.normal_(self.lookup.weight, std=0.02)

    def forward(self, bucket_BP: Tensor) -> Tensor:
        """float (B, P, dim)."""
        return self.lookup(bucket_BP)


class DnnTower(nn.Module):
    """Pools of the past views at several decays, the condition and the clock, through an MLP (Eq. 5).

    Pool k at position i is sum_j<i decay_k^(i-1-j) x_j over its weights; decay 1 is the mean, decay 0 the last view.
    """

    DECAYS = (1.0, 0.8, 0.0)

    def __init__(self, dim: int, hidden: int, out_dim: int, watch_rows: int, conditioned: bool, clock: bool,
                 dropout: float):
        super().__init__()
        self.condition = ConditionEncoder(dim, watch_rows) if conditioned else None
        self.clock = ClockEncoder(dim) if clock else None
        width = dim * (len(self.DECAYS) + conditioned + clock)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, out_dim))
        self.shortcut = nn.Linear(dim, out_dim, bias=False) if conditioned else None

    def forward(self, token_BPD: Tensor, batch: WindowBatch) -> Tensor:
        """float (B, P, out_dim)."""
        pools_BPE = self._pools(token_BPD, batch.inside_BP)
        columns = [pools_BPE]
        if self.condition is not None:
            condition_BPD = self.condition(batch.condition_bucket_BP)
            columns.append(condition_BPD)
        if self.clock is not None:
            columns.append(self.clock(batch))
        user_BPD = self.mlp(torch.cat(columns, dim=2))
        return user_BPD if self.condition is None else user_BPD + self.shortcut(condition_BPD)

    def _pools(self, token_BPD: Tensor, inside_BP: Tensor) -> Tensor:
        positions = torch.arange(token_BPD.shape[1], device=token_BPD.device)
        ago_PP = positions[:, None] - 1 - positions[None, :]
        past_PP = ago_PP >= 0
        token_BPD = token_BPD * inside_BP[..., None]
        pools = []
        for decay in self.DECAYS:
            weight_PP = torch.where(past_PP, decay ** ago_PP.clamp(min=0).to(token_BPD.dtype), 0.0)
            weight_PP = weight_PP / weight_PP.sum(dim=1, keepdim=True).clamp(min=1e-9)
            pools.append(torch.matmul(weight_PP.to(token_BPD.dtype), token_BPD))
        return torch.cat(pools, dim=2)


class TransformerLayer(nn.Module):
    """Pre-norm causal self-attention and MLP. The key has no bias: its true gradient is zero."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_value = nn.Linear(dim, 2 * dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """float (B, S, D) to the same."""
        normed_BSD = self.norm_attention(x_BSD)
        query, value = self.query_value(normed_BSD).chunk(2, dim=2)
        split = [t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (query, self.key(normed_BSD), value)]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        x_BSD = x_BSD + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return x_BSD + self.drop(self.mlp(self.norm_mlp(x_BSD)))


class DecisionTransformerTower(nn.Module):
    """The causal transformer over (W_1, x_1, .., W_n, x_n, W_{n+1}), read at the W tokens (Eq. 6).

    Windows are padded at the end, where causality keeps the padding from being seen.
    """

    def __init__(self, dim: int, hidden: int, out_dim: int, layers: int, heads: int, positions: int, watch_rows: int,
                 conditioned: bool, clock: bool, dropout: float):
        super().__init__()
        self.condition = ConditionEncoder(dim, watch_rows) if conditioned else None
        self.start = None if conditioned else nn.Embedding(1, dim)
        self.position = nn.Embedding(positions, dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.clock = ClockEncoder(dim) if clock else None
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim * (1 + clock), hidden), nn.GELU(), nn.Linear(hidden, out_dim))

    def forward(self, token_BPD: Tensor, batch: WindowBatch) -> Tensor:
        """float (B, P, out_dim)."""
        windows, positions = batch.item_BP.shape
        place_PD = self.position(torch.arange(positions, device=token_BPD.device))
        token_BPD = token_BPD + place_PD
        if self.condition is not None:
            wanted_BPD = self.condition(batch.condition_bucket_BP) + place_PD
            sequence_BSD = torch.stack([wanted_BPD, token_BPD], dim=2).flatten(1, 2)[:, :-1]
            for layer in self.layers:
                sequence_BSD = layer(sequence_BSD)
            read_BPD = sequence_BSD[:, 0::2]
        else:
            start_BPD = self.start(batch.item_BP.new_zeros(windows, 1))
            sequence_BSD = torch.cat([start_BPD, token_BPD[:, :-1]], dim=1)
            for layer in self.layers:
                sequence_BSD = layer(sequence_BSD)
            read_BPD = sequence_BSD
        read_BPD = self.norm(read_BPD)
        if self.clock is not None:
            read_BPD = torch.cat([read_BPD, self.clock(batch)], dim=2)
        return self.head(read_BPD)
