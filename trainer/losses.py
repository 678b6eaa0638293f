"""In-batch sampled softmax over the negatives of all workers: the loss that joins the user tower to the item tower.

Every positive of the global batch is a negative of every other row. Popular items turn up as negatives more often, so
each logit is lowered by log q (logQ correction). Written over positives:

    L = -1/sum_i w_i  sum_i w_i log( exp(s_i,t(i) - log q_t(i)) / sum_j exp(s_ij - log q_j) ),   s_ij = score(u_i, v_j)

with i over the rows of all workers, j over the positives of all workers, t(i) row i's own one and w_i the row's weight
(1 when none is given). A positive j of the same item as t(i) but of another row is no negative (an accidental hit) and
is left out for row i. CRM (arXiv:2412.13844, Eq. 2) changes what u_i is conditioned on, not this loss. Correction: Yi
et al., RecSys 2019.

Computed is the same sum over the distinct items of the global batch, which may be far fewer than its positives: every
item is one column, n_j is how many positives it stands for, and accidental hits need no mask, for the own column counts
once whatever its n is:

    L = -1/sum_i w_i  sum_i w_i log( o_i,t(i) / (o_i,t(i) + sum_{j != t(i)} n_j o_ij) ),   o_ij = exp(s_ij - log q_j)

This needs a vector of an item that is the same for all rows, whichever worker made it (trainer/dropout.py). Where GPUs
drop out by themselves, the vector of one worker serves all.

What q is: q_j is proportional to the expected number of positives of a batch that are item j. A factor common to all
items cancels in the softmax, so the item's share of the training targets serves.

Both halves of the model average gradients over workers (DeepSpeed the towers, TorchRec the tables). The loss returned
on a worker is therefore scaled by the number of workers over the global weight: the mean of the workers' losses, and
of their gradients, is that of L above, exactly, also when the workers' rows or weights are unequal.

Shape suffixes: B = local rows, N = local columns, G = columns of all workers, D = vector width, W = workers, P =
positives of all workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has them under new names and warns about the old ones, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_with_gradient(x_ND: Tensor, *, rows_per_rank: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all workers in rank order, differentiable.

    Backward is a reduce-scatter with SUM: the gradient of a row is what all workers' losses together ask of it, with
    no further factor. All workers of the group must call it, with the same trailing shape, and all must run backward.

    Args:
        x_ND: float (N, ...), this worker's rows; N may differ between workers and may be 0.
        rows_per_rank: every worker's N. group: the workers; None is all of them.

    Returns:
        float (G, ...), G = sum of the workers' N. The input itself when there is one worker or no process group.

    Raises:
        ValueError: if rows_per_rank does not fit the group or this worker's rows.
    """
    world_size = _world_size(group)
    rank = dist.get_rank(group) if world_size > 1 else 0
    if len(rows_per_rank) != world_size or rows_per_rank[rank] != x_ND.shape[0]:
        raise ValueError(f"rows_per_rank is {rows_per_rank}, but worker {rank} of {world_size} holds {x_ND.shape[0]} "
                         "rows")
    return x_ND if world_size == 1 else _GatherRows.apply(x_ND, rows_per_rank, group)


@dataclass(frozen=True)
class Columns:
    """The columns of a global batch: its distinct items, each with the worker that gives its vector.

    row_G: int64, the item of each column, those of the first worker first. count_G: float32, positives that are this
    item. per_rank: how many columns each worker gives. column_B: int64, where each of this worker's rows has its own
    positive among the columns.
    """

    row_G: np.ndarray
    count_G: np.ndarray
    per_rank: list[int]
    column_B: np.ndarray

    def of_rank(self, rank: int) -> np.ndarray:
        """int64 (N,), the items whose vectors this worker gives, in ascending order."""
        return self.row_G[sum(self.per_rank[:rank]) : sum(self.per_rank[: rank + 1])]


def softmax_columns(positive_row_by_rank: Sequence[np.ndarray], rank: int) -> Columns:
    """The columns of a global batch, the same on every worker that asks for them.

    An item's vector is given by one of the workers that have it among their positives; where there are several, the
    item's row decides, so that none gives much more than another.

    Args:
        positive_row_by_rank: by worker, int64, items of its positives in the order of its rows. rank: this worker.
    """
    workers = len(positive_row_by_rank)
    rows_P = np.concatenate([np.zeros(0, np.int64), *positive_row_by_rank])
    holder_P = np.repeat(np.arange(workers), [len(rows) for rows in positive_row_by_rank])
    pair, count = np.unique(rows_P * max(workers, 1) + holder_P, return_counts=True)
    row = pair // max(workers, 1)
    first_G = np.flatnonzero(np.diff(row, prepend=-1))  # items in ascending order
    item_G, holders_G = row[first_G], np.diff(first_G, append=len(row))
    owner_G = pair[first_G + item_G % np.maximum(holders_G, 1)] % max(workers, 1)
    order_G = np.argsort(owner_G, kind="stable")
    place_G = np.empty_like(order_G)
    place_G[order_G] = np.arange(len(order_G))
    own_B = positive_row_by_rank[rank] if workers else rows_P
    return Columns(row_G=item_G[order_G],
                   count_G=(np.add.reduceat(count, first_G) if len(first_G) else count)[order_G].astype(np.float32),
                   per_rank=np.bincount(owner_G, minlength=workers).tolist(),
                   column_B=place_G[np.searchsorted(item_G, own_B)])


def in_batch_softmax(
    logits_BG: Tensor,
    target_B: Tensor,
    *,
    log_q_G: Tensor | None = None,
    count_G: Tensor | None = None,
    weight_B: Tensor | None = None,
    total_weight: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This worker's share of the softmax loss of the module's docstring.

    Args:
        logits_BG: float (B, G), scores of the local rows with the columns of all workers, temperature applied. No two
            columns are of one item.
        target_B: int64 (B,), each row's own positive as a column.
        log_q_G: float (G,), natural log of each column's sampling probability; None leaves the correction out.
        count_G: float (G,), > 0, how many positives each column stands for; None is 1 everywhere. For the rows whose
            own positive it is, a column counts once.
        weight_B: float (B,), weights >= 0 of the rows, 0 for padding; None is 1 everywhere. A row of weight 0 still
            needs a valid target.
        total_weight: sum of the weights of all workers where the caller knows it (equal batches: rows * workers);
            None asks the workers (one scalar collective).
        group: the workers; None is all of them.

    Returns:
        The loss, a float32 scalar: W * sum_i w_i l_i / total_weight over the local rows. Its mean over workers is L;
        with equal batches it is the mean of the local rows. 0 if the total weight is 0.
        Detached float32 scalars of this worker: `rows`, those with weight above 0; `hits`, those of them whose own
        positive has the highest corrected logit of all columns, ties included.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if logits_BG.ndim != 2 or len(logits_BG) != len(target_B):
        raise ValueError(f"logits have the shape {tuple(logits_BG.shape)}, but there are {len(target_B)} rows")
    rows, columns = target_B.shape, logits_BG.shape[1:]
    for name, given, wanted in (("log_q_G", log_q_G, columns), ("count_G", count_G, columns),
                                ("weight_B", weight_B, rows)):
        if given is not None and given.shape != wanted:
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, not {tuple(wanted)}")

    weight_B = logits_BG.new_ones(len(target_B), dtype=torch.float32) if weight_B is None else weight_B.float()
    if total_weight is None:
        total_weight = weight_B.sum()
        if _world_size(group) > 1:
            dist.all_reduce(total_weight, group=group)
    total_weight = torch.as_tensor(total_weight, dtype=torch.float32, device=weight_B.device)
    # A batch of nothing but padding has loss 0, not 0/0.
    share_B = torch.where(total_weight > 0, weight_B * _world_size(group) / total_weight, torch.zeros_like(weight_B))
    loss, hit_B = _WeightedSoftmax.apply(logits_BG, None if log_q_G is None else log_q_G.float(),
                                         None if count_G is None else count_G.float(), target_B, share_B)
    counted_B = weight_B > 0
    return loss, {"rows": counted_B.sum().float(), "hits": (counted_B & hit_B).sum().float()}


class _WeightedSoftmax(torch.autograd.Function):
    """sum_i share_i * l_i with l_i the softmax loss of row i, and whether row i hits.

    One matrix of the logits' size is kept and worked on in place. Left to autograd this is twenty passes over that
    matrix, which on a CPU cost as much as the towers' own arithmetic.
    """

    @staticmethod
    def forward(ctx, logits_BG, log_q_G, count_G, target_B, share_B):
        logits_BG = (logits_BG.float() - (0.0 if log_q_G is None else log_q_G)).contiguous()
        own_B1, share_B1 = target_B[:, None], share_B[:, None]
        own_logit_B1 = logits_BG.gather(1, own_B1)
        highest_B1 = logits_BG.amax(dim=1, keepdim=True) if logits_BG.shape[1] else own_logit_B1
        odds_BG = logits_BG.sub_(highest_B1).exp_()
        if count_G is not None:
            own_odds_B1 = odds_BG.gather(1, own_B1)
            odds_BG.mul_(count_G).scatter_(1, own_B1, own_odds_B1)
        sum_B1 = odds_BG.sum(dim=1, keepdim=True)
        loss = (share_B1 * (sum_B1.log() + (highest_B1 - own_logit_B1))).sum()
        hit_B = (own_logit_B1 >= highest_B1).squeeze(1)
        ctx.save_for_backward(odds_BG.mul_(share_B1 / sum_B1).scatter_add_(1, own_B1, -share_B1))
        ctx.mark_non_differentiable(hit_B)
        return loss, hit_B

    @staticmethod
    def backward(ctx, gradient, _):
        (gradient_BG,) = ctx.saved_tensors
        return gradient_BG.mul_(gradient), None, None, None, None


class _GatherRows(torch.autograd.Function):
    """All-gather of unequal row counts; backward gives each rank the sum of what all ask of its rows."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, rows_per_rank: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.rows_per_rank, ctx.group = rows_per_rank, group
        return _gather_rows(x_ND, rows_per_rank, group)

    @staticmethod
    def backward(ctx, gradient_GD: Tensor) -> tuple[Tensor, None, None]:
        rows_per_rank, group = ctx.rows_per_rank, ctx.group
        mine = rows_per_rank[dist.get_rank(group)]
        if dist.get_backend(group) == "gloo":
            # Its reduce-scatter is an all-reduce and a cut: twice the bytes, and it wants equal parts.
            asked = gradient_GD.new_empty(len(rows_per_rank) * mine, *gradient_GD.shape[1:])
            dist.all_to_all_single(asked, gradient_GD.contiguous(), output_split_sizes=[mine] * len(rows_per_rank),
                                   input_split_sizes=rows_per_rank, group=group)
            return asked.unflatten(0, (len(rows_per_rank), mine)).sum(dim=0), None, None
        most = max(rows_per_rank)
        if min(rows_per_rank) == most:
            padded = gradient_GD.contiguous()
        else:
            padded = gradient_GD.new_zeros(len(rows_per_rank), most, *gradient_GD.shape[1:])
            for rank, part in enumerate(gradient_GD.split(rows_per_rank)):
                padded[rank, : rows_per_rank[rank]] = part
            padded = padded.flatten(0, 1)
        reduced = gradient_GD.new_empty(most, *gradient_GD.shape[1:])
        if most > 0:
            _reduce_scatter(reduced, padded, group=group)
        return reduced[:mine], None, None


def _gather_rows(x: Tensor, rows_per_rank: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all workers; a collective of equal parts, so shorter parts are padded to the longest and cut after."""
    most = max(rows_per_rank)
    if most == 0:
        return x.new_empty(0, *x.shape[1:])
    padded = x.contiguous()
    if x.shape[0] < most:
        padded = torch.cat([padded, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    gathered = x.new_empty(most * len(rows_per_rank), *x.shape[1:])
    _all_gather(gathered, padded, group=group)
    if min(rows_per_rank) == most:
        return gathered
    return torch.cat([part[:rows] for part, rows in zip(gathered.split(most), rows_per_rank, strict=True)])


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
