"""In-batch sampled softmax over the negatives of all workers: the loss that joins the user tower to the item tower.

Every positive of the global batch is a column, and so a negative for every other row. Popular items turn up as
negatives more often, so each logit is lowered by log q (logQ correction):

    L = -1/sum_i w_i  sum_i w_i log( exp(s_i,t(i) - log q_t(i)) / sum_j exp(s_ij - log q_j) ),   s_ij = score(u_i, v_j)

with i over the rows of all workers, j over the columns of all workers, t(i) the column of row i's own positive and w_i
the row's weight (1 when none is given). CRM (arXiv:2412.13844, Eq. 2) changes what u_i is conditioned on, not this
loss. Correction: Yi et al., RecSys 2019.

A column j that holds the same item as t(i) but came from another row is no negative (an accidental hit): it is masked
for row i. The own column never is. The mask compares items, so it also holds across workers. Columns of padding rows
are masked for all.

What q is: q_j is proportional to the expected number of columns of a batch that hold column j's item. A factor common
to all items cancels in the softmax, so with one column for each positive the item's share of the training targets
serves. Columns that are unique per worker are allowed too (`target_B` may name one column several times), but an item
then fills at most one column for each worker, and log q must be that of the new count: an item of share p among b
draws is there with probability 1 - (1 - p)^b, not b * p. Our batches do not de-duplicate.

Both halves of the model average gradients over workers (DeepSpeed the towers, TorchRec the tables). The loss returned
on a worker is therefore scaled by the number of workers over the global weight: the mean of the workers' losses, and
of their gradients, is that of L above, exactly, also when the workers' rows or weights are unequal.

Shape suffixes: B = local rows, N = local columns, G = columns of all workers, D = vector width, W = workers.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has them under new names and warns about the old ones, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def count_rows(rows: int, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """How many rows every worker holds, in rank order; one small collective (on a GPU it waits for the device).

    Call it once a batch and hand the answer to `gather_with_gradient` and `gather_ids`; where all workers are known to
    hold the same number, `[rows] * workers` needs no collective.
    """
    if _world_size(group) == 1:
        return [rows]
    counts_W = torch.empty(_world_size(group), dtype=torch.int64, device=device)
    _all_gather(counts_W, torch.tensor([rows], dtype=torch.int64, device=device), group=group)
    return counts_W.tolist()


def gather_with_gradient(
    x_ND: Tensor, group: dist.ProcessGroup | None = None, *, rows_per_rank: list[int] | None = None
) -> Tensor:
    """The rows of all workers in rank order, differentiable.

    Backward is a reduce-scatter with SUM: the gradient of a row is what all workers' losses together ask of it, with
    no further factor. All workers of the group must call it, with the same trailing shape, and all must run backward.

    Args:
        x_ND: float (N, ...), this worker's rows; N may differ between workers and may be 0.
        group: the workers; None is all of them.
        rows_per_rank: W numbers from `count_rows`; None asks the workers.

    Returns:
        float (G, ...), G = sum of the workers' N. The input itself when there is one worker or no process group.

    Raises:
        ValueError: if rows_per_rank does not fit the group or this worker's rows.
    """
    if _world_size(group) == 1:
        return x_ND
    return _GatherRows.apply(x_ND, _checked_counts(x_ND, group, rows_per_rank), group)


def gather_ids(
    id_N: Tensor, group: dist.ProcessGroup | None = None, *, rows_per_rank: list[int] | None = None
) -> Tensor:
    """The rows of all workers in rank order, without gradient: ids, log q, weights. Arguments as above."""
    if _world_size(group) == 1:
        return id_N.detach()
    return _gather_rows(id_N.detach(), _checked_counts(id_N, group, rows_per_rank), group)


def target_columns(rows_per_rank: list[int], rank: int, device: torch.device) -> Tensor:
    """int64 (B,): the column of each local row's own positive, when every row of every worker is a column."""
    start = sum(rows_per_rank[:rank])
    return torch.arange(start, start + rows_per_rank[rank], device=device)


def in_batch_softmax(
    logits_BG: Tensor,
    item_row_G: Tensor,
    target_B: Tensor,
    *,
    log_q_G: Tensor | None = None,
    valid_G: Tensor | None = None,
    weight_B: Tensor | None = None,
    total_weight: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This worker's share of the softmax loss of the module's docstring.

    Args:
        logits_BG: float (B, G), scores of the local rows with the columns of all workers, temperature applied.
        item_row_G: int64 (G,), the item in each column; masks accidental hits.
        target_B: int64 (B,), each row's own positive as a column.
        log_q_G: float (G,), natural log of each column's sampling probability; None leaves the correction out.
        valid_G: bool (G,), False for the columns of padding rows, which are no negatives; None is True everywhere.
        weight_B: float (B,), weights >= 0 of the rows, 0 for padding; None is 1 everywhere. A row of weight 0 still
            needs a valid target.
        total_weight: sum of the weights of all workers where the caller knows it (equal batches: rows * workers);
            None asks the workers (one scalar collective).
        group: the workers; None is all of them.

    Returns:
        The loss, a float32 scalar: W * sum_i w_i l_i / total_weight over the local rows. Its mean over workers is L;
        with equal batches it is the mean of the local rows. 0 if the total weight is 0.
        Detached float32 scalars of this worker: `rows`, those with weight above 0; `hits`, those of them whose own
        positive has the highest corrected logit that is not masked, ties included.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if logits_BG.shape != (target_B.shape[0], item_row_G.shape[0]):
        raise ValueError(
            f"logits have the shape {tuple(logits_BG.shape)}, but there are {target_B.shape[0]} rows "
            f"and {item_row_G.shape[0]} columns"
        )
    columns, rows = item_row_G, target_B
    fits = (("log_q_G", log_q_G, columns), ("valid_G", valid_G, columns), ("weight_B", weight_B, rows))
    for name, given, wanted in fits:
        if given is not None and given.shape != wanted.shape:
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, not {tuple(wanted.shape)}")

    if logits_BG.device.type == "cpu" and valid_G is None:
        masked = _accidental_hits(item_row_G, target_B)
    else:  # how many there are would have to be waited for on a GPU
        own_B1 = target_B[:, None]
        masked = item_row_G == item_row_G[own_B1]
        if valid_G is not None:
            masked |= ~valid_G
        masked.scatter_(1, own_B1, False)
    weight_B = logits_BG.new_ones(len(target_B), dtype=torch.float32) if weight_B is None else weight_B.float()
    if total_weight is None:
        total_weight = weight_B.sum()
        if _world_size(group) > 1:
            dist.all_reduce(total_weight, group=group)
    total_weight = torch.as_tensor(total_weight, dtype=torch.float32, device=weight_B.device)
    # A batch of nothing but padding has loss 0, not 0/0.
    share_B = torch.where(total_weight > 0, weight_B * _world_size(group) / total_weight, torch.zeros_like(weight_B))
    loss, hit_B = _WeightedSoftmax.apply(logits_BG, None if log_q_G is None else log_q_G.float(), masked,
                                         target_B, share_B)
    counted_B = weight_B > 0
    return loss, {"rows": counted_B.sum().float(), "hits": (counted_B & hit_B).sum().float()}


def _accidental_hits(item_row_G: Tensor, target_B: Tensor) -> Tensor:
    """int64, where in the flattened (B, G) a column holds the item of the row's own positive and is another one.

    They are few: to list them takes a tenth of the time of two passes over a matrix of that size.
    """
    columns = len(item_row_G)
    item_G, column_G = item_row_G.sort()
    own_B = item_row_G[target_B]
    first_B, last_B = torch.searchsorted(item_G, own_B), torch.searchsorted(item_G, own_B, right=True)
    same_B = last_B - first_B
    row = torch.repeat_interleave(same_B)
    within = torch.arange(len(row)) - (same_B.cumsum(0) - same_B)[row]
    column = column_G[first_B[row] + within]
    return (row * columns + column)[column != target_B[row]]


class _WeightedSoftmax(torch.autograd.Function):
    """sum_i share_i * l_i with l_i the softmax loss of row i over what is not masked, and whether row i hits.

    What is masked is a bool (B, G), or int64 places of the flattened (B, G).

    One matrix of the logits' size is kept and worked on in place. Left to autograd this is twenty passes over that
    matrix, which on a CPU cost as much as the towers' own arithmetic.
    """

    @staticmethod
    def forward(ctx, logits_BG, log_q_G, masked, target_B, share_B):
        logits_BG = (logits_BG.float() - (0.0 if log_q_G is None else log_q_G)).contiguous()
        lowest = torch.finfo(torch.float32).min
        if masked.dtype == torch.bool:
            logits_BG.masked_fill_(masked, lowest)
        else:
            logits_BG.view(-1).index_fill_(0, masked, lowest)
        own_B1, share_B1 = target_B[:, None], share_B[:, None]
        own_logit_B1 = logits_BG.gather(1, own_B1)
        highest_B1 = logits_BG.amax(dim=1, keepdim=True) if logits_BG.shape[1] else own_logit_B1
        odds_BG = logits_BG.sub_(highest_B1).exp_()
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


def _checked_counts(x: Tensor, group: dist.ProcessGroup | None, rows_per_rank: list[int] | None) -> list[int]:
    if rows_per_rank is None:
        return count_rows(x.shape[0], x.device, group)
    if len(rows_per_rank) != _world_size(group) or rows_per_rank[dist.get_rank(group)] != x.shape[0]:
        raise ValueError(
            f"rows_per_rank is {rows_per_rank}, but worker {dist.get_rank(group)} of {_world_size(group)} "
            f"holds {x.shape[0]} rows"
        )
    return rows_per_rank


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
