"""The towers: items to vectors, windows of views to user vectors.

Both user towers of CRM (arXiv:2412.13844) give a vector at every position of a window; the vector at position i has
seen the items before x_i and the condition W_i, so one pass trains every position:

    dnn                     u_i = MLP([pools of x_1..x_{i-1}; W_i; request_i])                         (Eq. 5)
    decision transformer    u_i = the causal transformer over (W_1, x_1, .., W_i), read at the W_i token     (Eq. 6)

Without the condition (`conditioned=False`) only the W tokens or w_{n+1} are taken away; past watch times stay a
feature of every x. In the transformer u_i is then read at x_{i-1} (a learned start token for i = 1): the backbone of
KuaiFormer (arXiv:2411.10057) is the ablation.

Positions that hold no view are never computed: views are packed, and unpacked only where a matrix needs them side by
side. Rows are taken with `F.embedding`, whose backward on a CPU is several times faster than that of `x[index]`.

Shape suffixes: U = items, T = tags of the items, B = windows, P = positions, V = views (packed positions), D = width,
R = positions that user vectors are read at, S = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batches import GAP_BUCKETS, HOURS, ItemBatch, WindowBatch
from trainer.dropout import Dropout, RowMlp, follows_rows, place_keys


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
        self.mlp = RowMlp(nn.Linear(width, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, dim))
        # The id's row enters as it is: a map in between costs 5% of the conditioned recall (docs/experiments.md).
        self.identity = nn.Identity() if table_dim == dim else nn.Linear(table_dim, dim, bias=False)

    def forward(self, items: ItemBatch, tables: dict[str, Tensor]) -> Tensor:
        """float (U, dim)."""
        dtype = self.duration.weight.dtype
        single = [tables[name].to(dtype) for name in self.single]
        tags_TD = tables["tag"].to(dtype)
        tag_UD = tags_TD.new_zeros(len(items.row_U), tags_TD.shape[1]).index_add(0, items.tag_item_T, tags_TD)
        count_U = torch.bincount(items.tag_item_T, minlength=len(items.row_U)).clamp(min=1).to(dtype)
        columns = [*single, tag_UD / count_U[:, None], self.duration(items.duration_bucket_U)]
        if items.content_UC is not None:
            columns.append(items.content_UC.to(dtype))
        return self.identity(single[0]) + self.mlp(torch.cat(columns, dim=1), items.row_U)


class ItemTower(nn.Module):
    """Hidden item vectors to what the index holds: the vector itself and what the item's bias is above log q."""

    def __init__(self, dim: int):
        super().__init__()
        self.bias = nn.Linear(dim, 1)
        nn.init.zeros_(self.bias.weight)
        nn.init.zeros_(self.bias.bias)

    def forward(self, hidden_UD: Tensor) -> tuple[Tensor, Tensor]:
        """float (U, dim) and float (U,)."""
        return hidden_UD, self.bias(hidden_UD).squeeze(1)


class WatchLookup(nn.Module):
    """A watch time's bucket as a vector, for past views and for conditions alike.

        e(b) = share_b * own_b + a straight line between the rows of two knots,     share_b = n_b / (n_b + PRIOR_VIEWS)

    with one knot for every SPACING buckets and n_b the training targets watched for b. A bucket with few views so lies
    where its neighbours do: with a free row a bucket, a condition that few views have (300 s) pulls the wrong way, and
    a model trained on permuted watch times still tells buckets apart (docs/experiments.md). The unknown bucket has a
    row of its own.

    Args:
        views: n_b of every bucket, the unknown one first.
    """

    SPACING = 8
    PRIOR_VIEWS = 500.0

    def __init__(self, dim: int, views: Sequence[int]):
        super().__init__()
        rows, buckets = len(views), len(views) - 1
        knots = -(-buckets // self.SPACING) + 1
        self.own, self.knots = nn.Embedding(rows, dim), nn.Embedding(knots, dim)
        for table in (self.own, self.knots):
            nn.init.normal_(table.weight, std=0.02)
        at = torch.arange(buckets) / self.SPACING
        line = (1 - (at[:, None] - torch.arange(knots)).abs()).clamp(min=0)
        share = torch.tensor(views, dtype=torch.float32)
        share = share / (share + self.PRIOR_VIEWS)
        share[0] = 1.0
        self.register_buffer("blend", torch.cat([torch.zeros(1, knots), line]), persistent=False)
        self.register_buffer("every_knot", torch.arange(knots), persistent=False)
        self.register_buffer("every_row", torch.arange(rows), persistent=False)
        self.register_buffer("share", share[:, None])

    def forward(self, bucket: Tensor) -> Tensor:
        """int64 of any shape, 0 unknown, to float (.., dim)."""
        own, knots = self.own(self.every_row), self.knots(self.every_knot)
        return F.embedding(bucket, self.share.to(own.dtype) * own + self.blend.to(own.dtype) @ knots)


class ViewEncoder(nn.Module):
    """A view as a token: the item and how long it was watched."""

    def __init__(self, dim: int, watch_views: Sequence[int], dropout: float):
        super().__init__()
        self.item = nn.Linear(dim, dim)
        self.watch = WatchLookup(dim, watch_views)
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, hidden_UD: Tensor, batch: WindowBatch) -> Tensor:
        """float (V, dim), x_i of every view."""
        token_VD = F.embedding(batch.item_V, self.item(hidden_UD)) + self.watch(batch.watch_bucket_V)
        return self.dropout(self.norm(token_VD), batch.key_V)


class RequestEncoder(nn.Module):
    """What is known of a request besides its history: the hour of the day, the gap since the last view, the user's
    features. Each adds one vector of its own.

    Args:
        clock: whether hour and gap are used. users: names of the tables of user features.
    """

    def __init__(self, dim: int, table_dim: int, clock: bool, users: list[str]):
        super().__init__()
        self.users = users
        self.hour = nn.Embedding(HOURS + 1, dim) if clock else None
        self.gap = nn.Embedding(GAP_BUCKETS + 1, dim) if clock else None
        for table in (self.hour, self.gap) if clock else ():
            nn.init.normal_(table.weight, std=0.02)
        self.user = nn.Linear(table_dim * len(users), dim, bias=False) if users else None

    def forward(self, batch: WindowBatch, tables: dict[str, Tensor]) -> Tensor:
        """float (R, dim), at the positions that are read."""
        parts = []
        if self.hour is not None:
            parts += [self.hour(batch.hour_V[batch.read_R]), self.gap(batch.gap_V[batch.read_R])]
        if self.user is not None:
            rows_BE = torch.cat([tables[name] for name in self.users], dim=1).to(self.user.weight.dtype)
            parts.append(F.embedding(batch.place_V[batch.read_R] // batch.positions, self.user(rows_BE)))
        return torch.stack(parts).sum(dim=0)


DECAYS = (1.0, 0.75, 0.0)
"""Of the pools of the past: its mean, its latest views, its last view."""


def past_pools(token_VD: Tensor, batch: WindowBatch, decays: Sequence[float] = DECAYS) -> Tensor:
    """Pool k at position i: sum_j<i decay_k^(i-1-j) x_j over its weights; decay 1 is the mean, decay 0 the last view.

    Returns:
        float (B * P, pools * D); padding is zero and comes last, so that it is in nobody's past.
    """
    windows, positions = batch.windows, batch.positions
    token_BPD = _unpacked(token_VD, batch.place_V, windows * positions).unflatten(0, (windows, positions))
    place = torch.arange(positions, device=token_VD.device)
    ago_PP = place[:, None] - 1 - place[None, :]
    pools = []
    for decay in decays:
        weight_PP = torch.where(ago_PP >= 0, decay ** ago_PP.clamp(min=0).to(token_VD.dtype), 0.0)
        weight_PP = weight_PP / weight_PP.sum(dim=1, keepdim=True).clamp(min=1e-9)
        pools.append(torch.matmul(weight_PP, token_BPD))
    return torch.cat(pools, dim=2).flatten(0, 1)


class PastPath(nn.Module):
    """A way for the past to the user vector beside all layers: linear, as in SLIM and EASE, and times the condition.

    Beside the pools of the views stand the user's interests. Each view is dealt out to K = D of them, and counted:

        r_j = softmax(V x_j)      n_k = sum_j<i r_jk      past_i = [pools; log((n_k + 1) K / (n + K))],  n = sum_k n_k
        added to u_i:  A past_i + O (P past_i * Q W_i)

    A feed that mixes interests asks for the log of their shares, which sums of tokens cannot give, and how long a user
    watches an item is a product of the two; layers are slow to learn either. Without a past it adds nothing.
    """

    def __init__(self, dim: int, hidden: int, out_dim: int, conditioned: bool):
        super().__init__()
        width = self.width(dim)
        self.interest = nn.Linear(dim, dim)
        self.straight = nn.Linear(width, out_dim, bias=False)
        self.of_past = nn.Linear(width, hidden, bias=False) if conditioned else None
        self.of_wanted = nn.Linear(dim, hidden, bias=False) if conditioned else None
        self.product = nn.Linear(hidden, out_dim, bias=False) if conditioned else None

    @staticmethod
    def width(dim: int) -> int:
        """Of what is known of the past."""
        return dim * (len(DECAYS) + 1)

    def known(self, token_VD: Tensor, batch: WindowBatch) -> Tensor:
        """float (R, width), past_i."""
        place_R = batch.place_V[batch.read_R]
        share_VK = torch.softmax(self.interest(token_VD), dim=1)
        share_RK = F.embedding(place_R, past_pools(share_VK, batch, (1.0,)))
        interests = share_RK.shape[1]
        views_R1 = (place_R % batch.positions).to(token_VD.dtype)[:, None]
        counted_RK = torch.log((share_RK * views_R1 + 1.0) * (interests / (views_R1 + interests)))
        return torch.cat([F.embedding(place_R, past_pools(token_VD, batch)), counted_RK], dim=1)

    def forward(self, past_RE: Tensor, condition_RD: Tensor | None) -> Tensor:
        """float (R, out_dim), what is added."""
        added_RD = self.straight(past_RE)
        if condition_RD is None:
            return added_RD
        return added_RD + self.product(self.of_past(past_RE) * self.of_wanted(condition_RD))


class DnnTower(nn.Module):
    """Pools of the past views at several decays, the condition and the request, through an MLP (Eq. 5)."""

    def __init__(self, dim: int, hidden: int, out_dim: int, watch_views: Sequence[int], conditioned: bool,
                 context: bool, dropout: float, past_path: bool):
        super().__init__()
        self.condition = WatchLookup(dim, watch_views) if conditioned else None
        width = (PastPath.width(dim) if past_path else dim * len(DECAYS)) + dim * (conditioned + context) + 1
        self.mlp = RowMlp(nn.Linear(width, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, hidden), nn.GELU(),
                          nn.Linear(hidden, out_dim))
        self.shortcut = nn.Linear(dim, out_dim, bias=False) if conditioned else None
        self.past = PastPath(dim, hidden, out_dim, conditioned) if past_path else None

    def forward(self, token_VD: Tensor, batch: WindowBatch, context_RD: Tensor | None) -> Tensor:
        """float (R, out_dim)."""
        place_R = batch.place_V[batch.read_R]
        length_R = torch.log1p((place_R % batch.positions).to(token_VD.dtype))
        if self.past is None:
            past_RE = F.embedding(place_R, past_pools(token_VD, batch))
        else:
            past_RE = self.past.known(token_VD, batch)
        columns, condition_RD = [past_RE, length_R[:, None]], None
        if self.condition is not None:
            condition_RD = self.condition(batch.condition_bucket_V[batch.read_R])
            columns.append(condition_RD)
        if context_RD is not None:
            columns.append(context_RD)
        user_RD = self.mlp(torch.cat(columns, dim=1), batch.key_V[batch.read_R])
        if self.past is not None:
            user_RD = user_RD + self.past(past_RE, condition_RD)
        return user_RD if self.condition is None else user_RD + self.shortcut(condition_RD)


def _unpacked(packed_VD: Tensor, place_V: Tensor, places: int) -> Tensor:
    """Puts packed rows to their places, which rise, zero elsewhere: float (places, D)."""
    if len(place_V) == places:  # all windows are full
        return packed_VD
    return packed_VD.new_zeros(places, packed_VD.shape[1]).index_copy_(0, place_V, packed_VD)


class _Packed(torch.autograd.Function):
    """Rows at places that rise. No place comes twice, so backward copies: that of an embedding would sort the places
    first, and on a GPU takes longer than the layer's products."""

    @staticmethod
    def forward(ctx, grid_PD: Tensor, place_V: Tensor) -> Tensor:
        ctx.save_for_backward(place_V)
        ctx.places = len(grid_PD)
        return grid_PD.index_select(0, place_V)

    @staticmethod
    def backward(ctx, gradient_VD: Tensor) -> tuple[Tensor, None]:
        place_V, = ctx.saved_tensors
        return gradient_VD.new_zeros(ctx.places, gradient_VD.shape[1]).index_copy_(0, place_V, gradient_VD), None


def _packed(grid_PD: Tensor, place_V: Tensor) -> Tensor:
    """What `_unpacked` put there: float (V, D)."""
    return grid_PD if len(place_V) == len(grid_PD) else _Packed.apply(grid_PD, place_V)


class TransformerLayer(nn.Module):
    """Pre-norm causal self-attention and MLP over packed tokens. The key has no bias: its true gradient is zero."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_value = nn.Linear(dim, 2 * dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop = Dropout(dropout)

    def forward(self, x_SD: Tensor, place_S: Tensor, tokens: int, row_B: Tensor) -> Tensor:
        """float (S, D) to the same; place_S: b * tokens + t of each packed token, rising; row_B: the windows' rows in
        the global batch."""
        windows, key_S, width = len(row_B), place_keys(row_B, place_S, tokens), x_SD.shape[1] // self.heads
        normed_SD = self.norm_attention(x_SD)
        query_value, key = (_unpacked(made_SE, place_S, windows * tokens).view(windows, tokens, -1, self.heads, width)
                            for made_SE in (self.query_value(normed_SD), self.key(normed_SD)))
        query, value, key = *query_value.permute(2, 0, 3, 1, 4), key.permute(2, 0, 3, 1, 4)[0]
        mixed = self._attention(query, key, value, row_B)
        mixed_SD = _packed(mixed.transpose(1, 2).reshape(windows * tokens, -1), place_S)
        x_SD = x_SD + self.drop(self.out(mixed_SD), key_S)
        return x_SD + self.drop(self.mlp(self.norm_mlp(x_SD)), key_S)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, row_B: Tensor) -> Tensor:
        """Causal attention with dropout on its weights, float (windows, heads, tokens, width of a head)."""
        if not follows_rows(query) or not self.training or self.drop.rate == 0.0:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True,
                                                  dropout_p=self.drop.rate if self.training else 0.0)
        # What torch does here on a CPU, but for its random numbers.
        (heads, tokens), device = query.shape[1:3], query.device
        row_N = (row_B[:, None] * heads + torch.arange(heads, device=device)).flatten()
        key_N = place_keys(row_N, torch.arange(len(row_N) * tokens, device=device), tokens)
        later = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype, device=device).triu(1)
        weight = torch.softmax(query @ (key * query.shape[3] ** -0.5).transpose(2, 3) + later, dim=3)
        return self.drop(weight.flatten(0, 2), key_N).view(weight.shape) @ value


class DecisionTransformerTower(nn.Module):
    """The causal transformer over (W_1, x_1, .., W_n, x_n, W_{n+1}), read at the W tokens (Eq. 6).

    Windows are padded at the end, where causality keeps the padding from being seen.
    """

    def __init__(self, dim: int, hidden: int, out_dim: int, layers: int, heads: int, positions: int,
                 watch_views: Sequence[int], conditioned: bool, context: bool, dropout: float, past_path: bool):
        super().__init__()
        self.condition = WatchLookup(dim, watch_views) if conditioned else None
        self.start = None if conditioned else nn.Embedding(1, dim)
        self.position = nn.Embedding(positions, dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim * (1 + context), hidden), nn.GELU(), nn.Linear(hidden, out_dim))
        self.shortcut = nn.Linear(dim, out_dim, bias=False) if conditioned else None
        self.past = PastPath(dim, hidden, out_dim, conditioned) if past_path else None

    def forward(self, token_VD: Tensor, batch: WindowBatch, context_RD: Tensor | None) -> Tensor:
        """float (R, out_dim)."""
        place_VD = self.position(batch.place_V % batch.positions)
        if self.condition is not None:
            read_RD = self._conditioned(token_VD + place_VD, place_VD, batch)
        else:
            read_RD = self._unconditioned(token_VD + place_VD, batch)
        read_RD = self.norm(read_RD)
        if context_RD is not None:
            read_RD = torch.cat([read_RD, context_RD], dim=1)
        user_RD, condition_RD = self.head(read_RD), None
        if self.condition is not None:
            condition_RD = self.condition(batch.condition_bucket_V[batch.read_R])
            user_RD = user_RD + self.shortcut(condition_RD)
        if self.past is not None:
            user_RD = user_RD + self.past(self.past.known(token_VD, batch), condition_RD)
        return user_RD

    def _conditioned(self, token_VD: Tensor, place_VD: Tensor, batch: WindowBatch) -> Tensor:
        """W_i and x_i side by side. The last x of a window is a token that nobody sees."""
        wanted_VD = self.condition(batch.condition_bucket_V) + place_VD
        sequence_SD = torch.stack([wanted_VD, token_VD], dim=1).flatten(0, 1)
        place_S = torch.stack([2 * batch.place_V, 2 * batch.place_V + 1], dim=1).flatten()
        for layer in self.layers:
            sequence_SD = layer(sequence_SD, place_S, 2 * batch.positions, batch.row_B)
        return F.embedding(2 * batch.read_R, sequence_SD)

    def _unconditioned(self, token_VD: Tensor, batch: WindowBatch) -> Tensor:
        """A start token, then x_1, x_2, ..; what stands at position i is x_{i-1}."""
        first_V = batch.place_V % batch.positions == 0
        before_VD = torch.where(first_V[:, None], self.start(torch.zeros_like(batch.item_V[:1])),
                                token_VD.roll(1, dims=0))
        for layer in self.layers:
            before_VD = layer(before_VD, batch.place_V, batch.positions, batch.row_B)
        return F.embedding(batch.read_R, before_VD)
