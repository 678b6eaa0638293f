"""In-batch sampled softmax over the negatives of all workers: the loss that joins the user tower to the item tower.

Every positive of the global batch is a negative of every other row, or, where the batch is dealt into groups, of every
other row of its group: fewer negatives, but their number, and what travels, do not grow with the workers. Popular items
turn up as negatives more often, so each logit is lowered by log q (logQ correction). Written over positives:

    L = -1/sum_i w_i  sum_i w_i log( exp(s_i,t(i) - log q_t(i)) / sum_j exp(s_ij - log q_j) ),   s_ij = score(u_i, v_j)

with i over the rows of all workers, j over the positives of i's group, t(i) row i's own one and w_i the row's weight
(1 when none is given). A positive j of the same item as t(i) but of another row is no negative (an accidental hit) and
is left out for row i. CRM (arXiv:2412.13844, Eq. 2) changes what u_i is conditioned on, not this loss. Correction: Yi
et al., RecSys 2019.

Computed is the same sum over the distinct items of the group, which may be far fewer than its positives: every
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

Shape suffixes: B = local rows, N = local columns, G = columns of the local rows' groups, S = vectors sent, D = vector
width, W = workers, P = positives of all workers.
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


def exchange_with_gradient(x_SD: Tensor, *, sent_per_rank: list[int], received_per_rank: list[int], travels: bool,
                           group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows to those workers that want them, differentiable: the gradient of a row sent twice is the sum of both.

    Args:
        x_SD: float (S, ...), rows for each worker in rank order. sent_per_rank, received_per_rank: how many go to and
            come from each worker. travels: whether any worker sends a row to another; all must say the same, and no
            collective is called where none does.
        group: the workers; None is all of them.

    Returns:
        float (G, ...), the rows of each worker for this one in rank order.

    Raises:
        ValueError: if the counts do not fit the group or the rows.
    """
    world_size = _world_size(group)
    if not len(sent_per_rank) == len(received_per_rank) == world_size or sum(sent_per_rank) != x_SD.shape[0]:
        raise ValueError(f"{sent_per_rank} rows for and {received_per_rank} of {world_size} workers, but "
                         f"{x_SD.shape[0]} are there")
    if not travels:
        return x_SD
    return _ExchangeRows.apply(x_SD, sent_per_rank, received_per_rank, group)


@dataclass(frozen=True)
class Columns:
    """What one worker's rows are scored with: the distinct items of their groups, each with the worker that gives its
    vector.

    order_B: int64, this worker's rows group by group; rows_per_group: how many are of each. row_G: int64, the item of
    each column, group by group as the rows; columns_per_group. count_G: float32, positives of the group that are this
    item. column_B: int64, for each row in `order_B` where its own positive lies among its group's columns.
    given_S: int64, the items whose vectors this worker gives. Without groups each goes to all workers, and
    sent_per_rank is empty; else they stand in the order of who gets them, an item for each group it is in, and
    sent_per_rank says how many those are. received_per_rank: how many come from each; arrival_G: int64, which of those
    each column is. travels: whether any vector goes from one worker to another, alike on all.
    """

    order_B: np.ndarray
    rows_per_group: list[int]
    row_G: np.ndarray
    columns_per_group: list[int]
    count_G: np.ndarray
    column_B: np.ndarray
    given_S: np.ndarray
    sent_per_rank: list[int]
    received_per_rank: list[int]
    arrival_G: np.ndarray
    travels: bool


def softmax_columns(positive_row_by_rank: Sequence[np.ndarray], rank: int,
                    group_by_rank: Sequence[np.ndarray] | None = None) -> Columns:
    """The columns of one worker's rows; what each gives fits what the others expect.

    An item's vector is given by one of the workers that have it among the positives of the group; where there are
    several, the item's row decides, so that none gives much more than another.

    Args:
        positive_row_by_rank: by worker, int64, items of its positives in the order of its rows. rank: this worker.
        group_by_rank: by worker, int64 >= 0, the group of each of these; None: all are of one.
    """
    workers, grouped = len(positive_row_by_rank), group_by_rank is not None
    groups_by_rank = group_by_rank or [np.zeros(len(rows), np.int64) for rows in positive_row_by_rank]
    rows_P = np.concatenate([np.zeros(0, np.int64), *positive_row_by_rank])
    group_P = np.concatenate([np.zeros(0, np.int64), *groups_by_rank])
    holder_P = np.repeat(np.arange(workers), [len(rows) for rows in positive_row_by_rank])
    height, groups = int(rows_P.max(initial=0)) + 1, int(group_P.max(initial=0)) + 1
    pair, count = np.unique((group_P * height + rows_P) * workers + holder_P, return_counts=True)
    item = pair // workers
    first_C = np.flatnonzero(np.diff(item, prepend=-1))  # columns of all groups, in ascending order of group and item
    item_C, holders_C = item[first_C], np.diff(first_C, append=len(item))
    owner_C = pair[first_C + item_C % np.maximum(holders_C, 1)] % workers
    count_C = np.add.reduceat(count, first_C) if len(first_C) else count
    group_C = item_C // height
    wants_WK = np.full((workers, groups), not grouped)
    if grouped:
        for worker, of_worker in enumerate(groups_by_rank):
            wants_WK[worker, of_worker] = True

    mine_G = np.flatnonzero(wants_WK[rank, group_C])
    mine_G = mine_G[np.lexsort((mine_G, owner_C[mine_G], group_C[mine_G]))]
    arrival_G = np.empty_like(mine_G)
    arrival_G[np.lexsort((mine_G, owner_C[mine_G]))] = np.arange(len(mine_G))
    given_N = np.flatnonzero(owner_C == rank)
    sent = [given_N[wants_WK[worker, group_C[given_N]]] for worker in range(workers)] if grouped else []
    own_group_B = groups_by_rank[rank]
    order_B = np.argsort(own_group_B, kind="stable")
    local_K = np.unique(own_group_B) if grouped else np.zeros(1, np.int64)
    columns_K = np.searchsorted(group_C[mine_G], local_K, side="right") - np.searchsorted(group_C[mine_G], local_K)
    place_C = np.zeros(len(item_C), np.int64)
    place_C[mine_G] = np.arange(len(mine_G))
    own_B = np.searchsorted(item_C, own_group_B * height + positive_row_by_rank[rank])[order_B]
    begin_K = np.cumsum(columns_K) - columns_K
    column_B = place_C[own_B] - begin_K[np.searchsorted(local_K, own_group_B[order_B])] if len(own_B) else own_B
    return Columns(
        order_B=order_B, rows_per_group=np.bincount(np.searchsorted(local_K, own_group_B),
                                                    minlength=max(1, len(local_K))).tolist(),
        row_G=item_C[mine_G] % height, columns_per_group=columns_K.tolist() or [0],
        count_G=count_C[mine_G].astype(np.float32), column_B=column_B,
        given_S=item_C[np.concatenate(sent) if grouped else given_N] % height,
        sent_per_rank=[len(to_worker) for to_worker in sent],
        received_per_rank=np.bincount(owner_C[mine_G], minlength=workers).tolist(), arrival_G=arrival_G,
        travels=bool((wants_WK.sum(axis=0)[group_C] > 1).any()))


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
        if gradient_GD.device.type == "cpu":
            # Gloo's reduce-scatter is an all-reduce and a cut: twice the bytes, and it wants equal parts.
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


class _ExchangeRows(torch.autograd.Function):
    """All-to-all of rows; backward is the way back."""

    @staticmethod
    def forward(ctx, x_SD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(x_SD, sent, received, group)

    @staticmethod
    def backward(ctx, gradient_GD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient_GD, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(x_SD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    arrived = x_SD.new_empty(sum(received), *x_SD.shape[1:])
    dist.all_to_all_single(arrived, x_SD.contiguous(), output_split_sizes=received, input_split_sizes=sent, group=group)
    return arrived


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
