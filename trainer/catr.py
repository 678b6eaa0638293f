"""CATR, the router of CAPTS (arXiv:2602.12564): how much each trigger is worth to each channel of a request.

    (6)  v_c      = sigmoid(f_c([h_u; h_x; z_x]))       z_x = target attention of h_x over the recent effective views
    (7)  v'_c     = clip(v_c + a * tanh(g_c(.)), eps, 1 - eps)                         (reading: tanh bounds it)
    (8)  L_value  = sum_c w_c * BCE(v'_c, y_c),   w_c = 1 + i_c                        (reading: the 1 keeps negatives)
    (9)  L_cal    = sum_c sigmoid(i_c) * (v'_c - i_c / k_c)^2                          (reading: the sigmoid weights)
    (12) u_c      = sigmoid(q_c(.))
    (13) L_div    = sum_c w_c * BCE(u_c, 1[rho_c >= eta])
    (14) L        = L_value + l_cal * L_cal + l_div * L_div
    (15) S_c(x)   = v'_c + beta * u_c

Sums run over channels, and the loss is the mean over the triggers of the global batch. Readings: f_c, g_c and q_c each
are a small MLP of [h_u; h_x; z_x] and of what is known of the list that channel c would bring back; h_x knows the
features of the trigger and of all its lists beside the item's own; the paper names no eps, and leaves open whether the
clip passes gradients (here it does not).

Not in the paper, and off by default: a softmax over the triggers of a request, with targets in proportion to their
intensities, on the logits of v_c (`router.listwise_weight`).

Shape suffixes: R = requests, T = triggers, C = channels, F = features, V = recent views, U = items, D = width, H =
hidden width, P = places of a request's triggers or views, padded to the widest request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import RouterConfig, RouterModelConfig
from trainer.crm import FeatureSizes
from trainer.dropout import Dropout
from trainer.router_data import FeatureScales, RouterBatch
from trainer.towers import ItemEncoder, WatchLookup

EPSILON = 1e-3  # of Eq. 7: a trigger that was given up costs -log(eps) = 6.9 when it is worth something


@dataclass(frozen=True)
class Targets:
    """What a batch is held against, (T, C): intensity i_c (float32, at most k_c), label y_c, is_diverse 1[rho_c >= eta]
    (both bool). cap_C: float32 (C,), k_c."""

    intensity_TC: Tensor
    label_TC: Tensor
    is_diverse_TC: Tensor
    cap_C: Tensor


def bounded_correction(value_TC: Tensor, logit_TC: Tensor, bound: float) -> Tensor:
    """v' of Eq. 7: v moved by at most `bound`, inside [eps, 1 - eps]."""
    return (value_TC + bound * torch.tanh(logit_TC)).clamp(EPSILON, 1 - EPSILON)


def value_loss(value_TC: Tensor, targets: Targets) -> Tensor:
    """L_value of Eq. 8 of each trigger, (T,)."""
    return _weighted_bce(value_TC, targets.label_TC, targets.intensity_TC)


def calibration_loss(value_TC: Tensor, targets: Targets) -> Tensor:
    """L_cal of Eq. 9 of each trigger, (T,)."""
    gap_TC = value_TC - targets.intensity_TC / targets.cap_C
    return (torch.sigmoid(targets.intensity_TC) * gap_TC**2).sum(dim=1)


def diversity_loss(uniqueness_TC: Tensor, targets: Targets) -> Tensor:
    """L_div of Eq. 13 of each trigger, (T,)."""
    return _weighted_bce(uniqueness_TC, targets.is_diverse_TC, targets.intensity_TC)


def _weighted_bce(probability_TC: Tensor, label_TC: Tensor, intensity_TC: Tensor) -> Tensor:
    return F.binary_cross_entropy(probability_TC, label_TC.to(probability_TC.dtype), weight=1 + intensity_TC,
                                  reduction="none").sum(dim=1)


def listwise_loss(logit_TC: Tensor, intensity_TC: Tensor, place_T: Tensor, requests: int, triggers: int) -> Tensor:
    """Softmax over each request's triggers against shares of its intensity, summed over channels, (R,); a channel in
    which no trigger of the request was worth anything adds nothing.

    Args:
        place_T: int64, request * triggers + place. triggers: of the widest request.
    """
    shape = (requests, triggers, logit_TC.shape[1])
    logit_RPC = logit_TC.new_full((requests * triggers, shape[2]), -1e9).index_copy(0, place_T, logit_TC).view(shape)
    intensity_RPC = unpacked(intensity_TC, place_T, requests, triggers)
    share_RPC = intensity_RPC / intensity_RPC.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return -(share_RPC * F.log_softmax(logit_RPC, dim=1)).sum(dim=(1, 2))


def unpacked(x_TD: Tensor, place_T: Tensor, requests: int, places: int) -> Tensor:
    """Packed rows side by side by request, zero where there is none: (R, P, D)."""
    grid = x_TD.new_zeros(requests * places, x_TD.shape[1]).index_copy(0, place_T, x_TD)
    return grid.view(requests, places, -1)


class TargetAttention(nn.Module):
    """z_x of Eq. 6: each trigger attends to the recent views of its request. One more key, learned, stands for none of
    them, so that a request without views has something to attend to. Keys have no bias: its gradient is zero."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.none = nn.Parameter(torch.randn(1, dim) * 0.02)

    def forward(self, trigger_TD: Tensor, view_VD: Tensor, batch: RouterBatch) -> Tensor:
        """float (T, D)."""
        requests, views = batch.requests, batch.views
        none_RPD = self.none.expand(requests, 1, -1)
        seen_RPD = torch.cat([none_RPD, unpacked(view_VD, batch.place_V, requests, views)], dim=1)
        is_view_RP = torch.zeros(requests * views, dtype=torch.bool, device=view_VD.device)
        is_view_RP = is_view_RP.index_fill(0, batch.place_V, True).view(requests, views)
        is_view_RP = torch.cat([torch.ones_like(is_view_RP[:, :1]), is_view_RP], dim=1)
        query = self._heads(unpacked(self.query(trigger_TD), batch.place_T, requests, batch.triggers))
        key, value = self._heads(self.key(seen_RPD)), self._heads(self.value(seen_RPD))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=is_view_RP[:, None, None, :])
        mixed_RPD = mixed.transpose(1, 2).flatten(2)
        return self.out(F.embedding(batch.place_T, mixed_RPD.flatten(0, 1)))

    def _heads(self, x_RPD: Tensor) -> Tensor:
        return x_RPD.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ChannelHeads(nn.Module):
    """A small MLP for each channel, side by side: of what all channels share and of the channel's own features."""

    def __init__(self, shared: int, own: int, hidden: int, channels: int, dropout: float):
        super().__init__()
        self.shared = nn.Linear(shared, channels * hidden)
        self.own = nn.Parameter(torch.randn(channels, own, hidden) * (shared + own) ** -0.5) if own else None
        self.out = nn.Parameter(torch.randn(channels, hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.dropout = Dropout(dropout)

    def forward(self, shared_TD: Tensor, own_TCF: Tensor, key_T: Tensor) -> Tensor:
        """float (T, C), logits; key_T: what the triggers are, for dropout."""
        hidden_TCH = self.shared(shared_TD).unflatten(1, self.out.shape)
        if self.own is not None:
            hidden_TCH = hidden_TCH + torch.einsum("tcf,cfh->tch", own_TCF, self.own)
        return torch.einsum("tch,ch->tc", self.dropout(F.gelu(hidden_TCH), key_T), self.out) + self.bias


class CatrModel(nn.Module):
    """The router.

    Args:
        model: which parts it has. sizes: rows of the lookups. scales: of the features. cap_C, eta: k_c and eta of the
            labels.
    """

    def __init__(self, config: RouterConfig, model: RouterModelConfig, sizes: FeatureSizes, scales: FeatureScales,
                 cap_C: Sequence[float], eta: float):
        super().__init__()
        dim, channels = config.dim, len(cap_C)
        self.correction = config.correction
        self.calibration_weight = config.calibration_weight
        self.diversity_weight, self.listwise_weight = config.diversity_weight, config.listwise_weight
        # No buffers: in bf16 they would be rounded, and with eta the labels would change.
        self.cap_C, self.eta = tuple(cap_C), float(eta)
        for name, values in (("trigger_mean_F", scales.trigger_mean_F), ("trigger_std_F", scales.trigger_std_F),
                             ("list_mean_CF", scales.list_mean_CF), ("list_std_CF", scales.list_std_CF)):
            self.register_buffer(name, torch.as_tensor(values))
        single = ["item", "author", *(f"category_{name}" for name in sizes.categories)]
        self.items = ItemEncoder(single, config.tables.dim, dim, config.hidden, sizes.duration_buckets,
                                 sizes.content_dim, config.dropout)
        self.view = nn.Linear(dim, dim)
        self.watch = WatchLookup(dim, scales.watch_views)
        self.ago = nn.Embedding(config.history, dim)
        nn.init.normal_(self.ago.weight, std=0.02)
        self.view_norm = nn.LayerNorm(dim)
        self.users = [f"user_{name}" for name in sizes.users]
        self.user = nn.Linear(config.tables.dim * len(self.users), dim, bias=False) if self.users else None
        self.trigger = nn.Linear(dim, dim)
        # Each feature as it is, and what it is beside the request's other triggers.
        self.trigger_features = nn.Linear(2 * (len(scales.trigger_mean_F) + scales.list_mean_CF.size), dim)
        self.trigger_norm = nn.LayerNorm(dim)
        self.attention = TargetAttention(dim, config.heads)
        self.dropout = Dropout(config.dropout)

        def heads() -> ChannelHeads:
            return ChannelHeads(3 * dim, 2 * scales.list_mean_CF.shape[1], config.hidden, channels, config.dropout)

        self.value_heads = heads()
        self.correction_heads = heads() if model.calibrator else None
        self.uniqueness_heads = heads() if model.diversity else None

    def forward(self, task: str, batch: RouterBatch, tables: dict[str, Tensor]):
        """task "loss": `(loss, extras)`; "score": float32 (T, 2C), v' of all channels and then u of all channels, 0
        without uniqueness heads. One entry, because the engine wraps one forward."""
        logit_TC, value_TC, uniqueness_TC = self._predict(batch, tables)
        if task == "score":
            return torch.cat([value_TC, torch.zeros_like(value_TC) if uniqueness_TC is None else uniqueness_TC], dim=1)
        return self._loss(batch, logit_TC, value_TC, uniqueness_TC)

    def _loss(self, batch: RouterBatch, logit_TC: Tensor, value_TC: Tensor, uniqueness_TC: Tensor | None):
        """Eq. 14, the mean over the triggers of the global batch once the workers' losses are averaged."""
        targets = Targets(batch.intensity_TC, batch.label_TC, batch.uniqueness_TC >= self.eta,
                          torch.tensor(self.cap_C, device=batch.label_TC.device))
        parts = {"value": value_loss(value_TC, targets)}
        loss_T = parts["value"]
        if self.correction_heads is not None:
            parts["calibration"] = calibration_loss(value_TC, targets)
            loss_T = loss_T + self.calibration_weight * parts["calibration"]
        if uniqueness_TC is not None:
            parts["diversity"] = diversity_loss(uniqueness_TC, targets)
            loss_T = loss_T + self.diversity_weight * parts["diversity"]
        loss = (loss_T * batch.weight_T).sum()
        extras = {name: (part_T * batch.weight_T).sum().detach() for name, part_T in parts.items()}
        if self.listwise_weight:
            list_R = listwise_loss(logit_TC, batch.intensity_TC, batch.place_T, batch.requests, batch.triggers)
            extras["listwise"] = (list_R * batch.weight_B).sum().detach()
            loss = loss + self.listwise_weight * (list_R * batch.weight_B).sum()
        return loss, extras

    def _predict(self, batch: RouterBatch, tables: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of v, v' and u, float32 (T, C)."""
        known = *self._encode(batch, tables), batch.key_T
        logit_TC = self.value_heads(*known).float()
        value_TC = torch.sigmoid(logit_TC)
        if self.correction_heads is not None:
            correction_TC = self.correction_heads(*known).float()
            value_TC = bounded_correction(value_TC, correction_TC, self.correction)
        if self.uniqueness_heads is None:
            return logit_TC, value_TC, None
        return logit_TC, value_TC, torch.sigmoid(self.uniqueness_heads(*known).float())

    def _encode(self, batch: RouterBatch, tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[h_u; h_x; z_x] float (T, 3D) and the lists' features float (T, C, 2F)."""
        dtype = self.view.weight.dtype
        item_UD = self.dropout(self.items(batch.items, tables), batch.items.row_U)
        view_VD = self.view_norm(F.embedding(batch.item_V, self.view(item_UD)) + self.watch(batch.watch_bucket_V)
                                 + self.ago(batch.ago_V))
        user_RD = _mean_of_each(view_VD, batch.request_V, batch.requests)
        if self.user is not None:
            user_RD = user_RD + self.user(torch.cat([tables[name] for name in self.users], dim=1).to(dtype))
        trigger_TF = self._scaled(batch.trigger_TF, self.trigger_mean_F, self.trigger_std_F, batch).to(dtype)
        own_TCF = self._scaled(batch.list_TCF, self.list_mean_CF, self.list_std_CF, batch).to(dtype)
        trigger_TD = self.trigger_norm(F.embedding(batch.item_T, self.trigger(item_UD))
                                       + self.trigger_features(torch.cat([trigger_TF, own_TCF.flatten(1)], dim=1)))
        attended_TD = self.attention(trigger_TD, view_VD, batch)
        return torch.cat([F.embedding(batch.request_T, user_RD), trigger_TD, attended_TD], dim=1), own_TCF

    def _scaled(self, x: Tensor, mean: Tensor, std: Tensor, batch: RouterBatch) -> Tensor:
        """Features (T, .., F) to mean 0 and deviation 1, an unknown one 0, and the same less their mean over the
        request: (T, .., 2F), float32."""
        x = torch.nan_to_num((x - mean.float()) / std.float(), nan=0.0)
        mean_R = _mean_of_each(x.flatten(1), batch.request_T, batch.requests)
        return torch.cat([x, x - mean_R[batch.request_T].view(x.shape)], dim=-1)


def _mean_of_each(x_VD: Tensor, request_V: Tensor, requests: int) -> Tensor:
    """Means over the rows of each request, zero where it has none: (R, D)."""
    sum_RD = x_VD.new_zeros(requests, x_VD.shape[1]).index_add(0, request_V, x_VD)
    count_R = torch.bincount(request_V, minlength=requests).clamp(min=1).to(x_VD.dtype)
    return sum_RD / count_R[:, None]
