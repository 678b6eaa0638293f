"""The in-batch softmax against a loop that spells the equation out in float64, in one process."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses import gather_with_gradient, in_batch_softmax, softmax_columns


def naive(score, items, log_q, weights):
    """The module's first equation, positive by positive and one term at a time; `score(row, item)` with gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for i, own in enumerate(items):
        terms = [score(i, item) - log_q[item] for j, item in enumerate(items) if j == i or item != own]
        total = total - weights[i] * (score(i, own) - log_q[own] - torch.logsumexp(torch.stack(terms), dim=0))
    return total / sum(weights) if sum(weights) > 0 else total * 0.0


@st.composite
def batches(draw):
    workers = draw(st.integers(1, 4))
    by_rank = [draw(st.lists(st.integers(0, 5), max_size=6)) for _ in range(workers)]
    weights = [draw(st.integers(0, 4)) / 2 for rows in by_rank for _ in rows]
    return {"seed": draw(st.integers(0, 2**31)), "scale": draw(st.sampled_from([0.1, 5.0, 50.0])),
            "by_rank": by_rank, "weights": weights}


@settings(max_examples=150, deadline=None)
@given(batches())
def test_loss_and_gradient_equal_the_naive_loop(batch):
    """Over the distinct items, each worker's rows with its own view of the columns, against all positives."""
    by_rank = [np.array(rows, dtype=np.int64) for rows in batch["by_rank"]]
    items = [item for rows in batch["by_rank"] for item in rows]
    generator = torch.Generator().manual_seed(batch["seed"])
    scores64 = (torch.randn(len(items), 6, generator=generator, dtype=torch.float64) * batch["scale"]).requires_grad_()
    log_q = -4.0 * torch.rand(6, generator=generator)
    scores32 = scores64.detach().float().requires_grad_()

    expected = naive(lambda row, item: scores64[row, item], items, log_q.double(), batch["weights"])
    loss, rows, start = torch.zeros(()), 0.0, 0
    for rank, own in enumerate(by_rank):
        columns, part = softmax_columns(by_rank, rank), slice(start, start + len(own))
        item_G = torch.from_numpy(columns.row_G)
        share, extras = in_batch_softmax(
            scores32[part][:, item_G], torch.from_numpy(columns.column_B), log_q_G=log_q[item_G],
            count_G=torch.from_numpy(columns.count_G), weight_B=torch.tensor(batch["weights"][part]),
            total_weight=sum(batch["weights"]))
        loss, rows, start = loss + share, rows + extras["rows"].item(), part.stop
        assert 0 <= extras["hits"] <= extras["rows"]
    (expected + 0.0 * scores64.sum()).backward()
    (loss + 0.0 * scores32.sum()).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-5)
    torch.testing.assert_close(scores32.grad.double(), scores64.grad, rtol=1e-4, atol=1e-6)
    assert rows == sum(weight > 0 for weight in batch["weights"])


@settings(max_examples=150, deadline=None)
@given(batches())
def test_columns_are_the_distinct_items_each_given_by_one_that_has_it(batch):
    by_rank = [np.array(rows, dtype=np.int64) for rows in batch["by_rank"]]
    counts = Counter(item for rows in batch["by_rank"] for item in rows)
    for rank, own in enumerate(by_rank):
        columns = softmax_columns(by_rank, rank)
        assert dict(zip(columns.row_G.tolist(), columns.count_G.tolist(), strict=True)) == counts
        assert columns.row_G[columns.column_B].tolist() == own.tolist()
        given_by = [columns.of_rank(other).tolist() for other in range(len(by_rank))]
        assert [len(rows) for rows in given_by] == columns.per_rank
        assert sum(given_by, []) == columns.row_G.tolist()
        assert all(rows == sorted(set(rows) & set(by_rank[other].tolist())) for other, rows in enumerate(given_by))


def test_workers_with_the_same_items_give_as_many_each():
    shared = np.arange(90)
    assert softmax_columns([shared] * 3, 0).per_rank == [30, 30, 30]


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
