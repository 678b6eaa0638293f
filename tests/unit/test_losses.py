"""The in-batch softmax against a loop that spells the equation out in float64, in one process."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses import exchange_with_gradient, gather_with_gradient, in_batch_softmax, softmax_columns


def naive(score, items, groups, log_q, weights):
    """The module's first equation, positive by positive and one term at a time; `score(row, item)` with gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for i, own in enumerate(items):
        terms = [score(i, item) - log_q[item] for j, item in enumerate(items)
                 if groups[j] == groups[i] and (j == i or item != own)]
        total = total - weights[i] * (score(i, own) - log_q[own] - torch.logsumexp(torch.stack(terms), dim=0))
    return total / sum(weights) if sum(weights) > 0 else total * 0.0


@st.composite
def batches(draw):
    workers = draw(st.integers(1, 4))
    by_rank = [draw(st.lists(st.integers(0, 5), max_size=6)) for _ in range(workers)]
    weights = [draw(st.integers(0, 4)) / 2 for rows in by_rank for _ in rows]
    groups = draw(st.one_of(st.none(), st.integers(1, 5)))
    return {"seed": draw(st.integers(0, 2**31)), "scale": draw(st.sampled_from([0.1, 5.0, 50.0])),
            "by_rank": [np.array(rows, dtype=np.int64) for rows in by_rank], "weights": weights,
            "groups": groups and [np.array([draw(st.integers(0, groups - 1)) for _ in rows], dtype=np.int64)
                                  for rows in by_rank]}


def group_of(batch):
    """By worker, the group of each row."""
    return batch["groups"] or [np.zeros(len(rows), dtype=np.int64) for rows in batch["by_rank"]]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_loss_and_gradient_equal_the_naive_loop(batch):
    """Over the distinct items of a group, each worker's rows with its own columns, against all positives."""
    by_rank = batch["by_rank"]
    items, groups = np.concatenate(by_rank).tolist(), np.concatenate(group_of(batch)).tolist()
    generator = torch.Generator().manual_seed(batch["seed"])
    scores64 = (torch.randn(len(items), 6, generator=generator, dtype=torch.float64) * batch["scale"]).requires_grad_()
    log_q = -4.0 * torch.rand(6, generator=generator)
    scores32 = scores64.detach().float().requires_grad_()

    expected = naive(lambda row, item: scores64[row, item], items, groups, log_q.double(), batch["weights"])
    loss, rows, start = torch.zeros(()), 0.0, 0
    for rank, own in enumerate(by_rank):
        columns = softmax_columns(by_rank, rank, batch["groups"])
        order = torch.from_numpy(start + columns.order_B)
        start, begin, first = start + len(own), 0, 0
        for count, width in zip(columns.rows_per_group, columns.columns_per_group, strict=True):
            part, item_G = order[begin : begin + count], torch.from_numpy(columns.row_G[first : first + width])
            share, extras = in_batch_softmax(
                scores32[part][:, item_G], torch.from_numpy(columns.column_B[begin : begin + count]),
                log_q_G=log_q[item_G], count_G=torch.from_numpy(columns.count_G[first : first + width]),
                weight_B=torch.tensor(batch["weights"])[part], total_weight=sum(batch["weights"]))
            loss, rows, begin, first = loss + share, rows + extras["rows"].item(), begin + count, first + width
            assert 0 <= extras["hits"] <= extras["rows"]
        assert (begin, first) == (len(own), len(columns.row_G))
    (expected + 0.0 * scores64.sum()).backward()
    (loss + 0.0 * scores32.sum()).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-5)
    torch.testing.assert_close(scores32.grad.double(), scores64.grad, rtol=1e-4, atol=1e-6)
    assert rows == sum(weight > 0 for weight in batch["weights"])


@settings(max_examples=200, deadline=None)
@given(batches())
def test_columns_are_the_distinct_items_of_a_group_each_given_by_one_that_has_it(batch):
    by_rank, groups = batch["by_rank"], group_of(batch)
    workers = range(len(by_rank))
    counts = Counter((int(g), int(item)) for rank in workers
                     for g, item in zip(groups[rank], by_rank[rank], strict=True))
    all_columns = [softmax_columns(by_rank, rank, batch["groups"]) for rank in workers]
    sent = []  # by sender, by receiver: the items
    for columns in all_columns:
        ends = np.cumsum(columns.sent_per_rank)
        sent.append([columns.given_S] * len(by_rank) if batch["groups"] is None
                    else [part.tolist() for part in np.split(columns.given_S, ends[:-1])])
        assert not columns.sent_per_rank or ends[-1] == len(columns.given_S)
    travels = any(len(sent[a][b]) for a in workers for b in workers if a != b) if batch["groups"] else len(workers) > 1
    for rank, columns in enumerate(all_columns):
        mine = sorted(set(groups[rank].tolist())) if batch["groups"] else [0]
        assert columns.rows_per_group == ([int((groups[rank] == g).sum()) for g in mine] or [0])
        begin, first = 0, 0
        for g, count, width in zip(mine, columns.rows_per_group, columns.columns_per_group, strict=bool(mine)):
            items = columns.row_G[first : first + width]
            told = dict(zip(items.tolist(), columns.count_G[first : first + width].tolist(), strict=True))
            assert told == {item: count for (group, item), count in counts.items() if group == g}
            rows = columns.order_B[begin : begin + count]
            assert items[columns.column_B[begin : begin + count]].tolist() == by_rank[rank][rows].tolist()
            assert (groups[rank][rows] == g).all() and (np.diff(rows) > 0).all()
            begin, first = begin + count, first + width
        # What arrives is what the others send, each vector by one that has the item itself.
        arrives = np.concatenate([sent[other][rank] for other in workers]).astype(np.int64)
        assert columns.received_per_rank == [len(sent[other][rank]) for other in workers]
        assert arrives[columns.arrival_G].tolist() == columns.row_G.tolist()
        assert set(columns.given_S.tolist()) <= set(by_rank[rank].tolist())
        if len(columns.columns_per_group) == 1:
            assert columns.arrival_G.tolist() == list(range(len(arrives)))
        assert not counts or columns.travels == travels


def test_no_vector_travels_where_each_worker_has_a_group_of_its_own():
    by_rank = [np.array([3, 1, 3]), np.array([1, 2])]
    alone = [softmax_columns(by_rank, rank, [np.zeros(3, np.int64), np.ones(2, np.int64)]) for rank in (0, 1)]
    assert not any(columns.travels for columns in alone)
    assert [columns.sent_per_rank for columns in alone] == [[2, 0], [0, 2]]
    assert [columns.row_G.tolist() for columns in alone] == [[1, 3], [1, 2]]
    assert softmax_columns(by_rank, 0, [np.zeros(3, np.int64), np.array([1, 0])]).travels


def test_workers_with_the_same_items_give_as_many_each():
    shared = np.arange(90)
    assert softmax_columns([shared] * 3, 0).received_per_rank == [30, 30, 30]


def test_without_options_it_is_plain_cross_entropy():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    loss, extras = in_batch_softmax(logits, torch.arange(6))
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.arange(6)).item(), abs=1e-6)
    assert extras["hits"].item() == (logits.argmax(1) == torch.arange(6)).sum()


def test_the_own_column_counts_once_and_others_as_often_as_they_are():
    # Three positives are item 0: for their own rows it is the one column there is, for the other row three.
    loss, _ = in_batch_softmax(torch.zeros(2, 2), torch.tensor([0, 1]), count_G=torch.tensor([3.0, 1.0]))
    assert loss.item() == pytest.approx((math.log(2.0) + math.log(4.0)) / 2, abs=1e-6)


def test_log_q_lowers_the_popular_column():
    # Scores equal, column 1 ten times as likely: the correction gives it a tenth of the denominator.
    log_q = torch.log(torch.tensor([0.1, 1.0]))
    loss, _ = in_batch_softmax(torch.zeros(1, 2), torch.tensor([0]), log_q_G=log_q)
    assert loss.item() == pytest.approx(math.log(1.1), abs=1e-6)


def test_padding_only_gives_zero_and_no_nan_gradient():
    logits = torch.randn(3, 3, requires_grad=True)
    loss, _ = in_batch_softmax(logits, torch.arange(3), weight_B=torch.zeros(3))
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


def test_no_rows_and_no_columns():
    logits = torch.zeros(0, 0, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss, extras = in_batch_softmax(logits, nothing)
    loss.backward()
    assert loss.item() == 0.0 and extras["rows"].item() == 0.0


def test_low_precision_logits_are_summed_in_float32():
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    loss, _ = in_batch_softmax(logits, torch.arange(4))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits.double(), torch.arange(4)).item(), abs=1e-5
    )


@pytest.mark.parametrize("name", ["log_q_G", "count_G", "weight_B"])
def test_a_shape_that_does_not_fit_is_named(name):
    with pytest.raises(ValueError, match=name):
        in_batch_softmax(torch.zeros(2, 3), torch.arange(2), **{name: torch.ones(7)})


def test_logits_must_fit_the_rows():
    with pytest.raises(ValueError, match="there are 4 rows"):
        in_batch_softmax(torch.zeros(2, 3), torch.arange(4))


def test_one_process_gathers_itself():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(x, rows_per_rank=[3]) is x
    with pytest.raises(ValueError, match=r"rows_per_rank is \[2\], but worker 0 of 1 holds 3 rows"):
        gather_with_gradient(x, rows_per_rank=[2])
    assert exchange_with_gradient(x, sent_per_rank=[3], received_per_rank=[3], travels=False) is x
    for sent in ([2], [3, 0]):
        with pytest.raises(ValueError, match="but 3 are there"):
            exchange_with_gradient(x, sent_per_rank=sent, received_per_rank=[3], travels=False)
