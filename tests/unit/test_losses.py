"""The in-batch softmax against a loop that spells the equation out in float64, in one process."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses import gather_ids, gather_with_gradient, in_batch_softmax, target_columns


def naive(logits, items, targets, log_q, valid, weights):
    """The module's equation, one term at a time; differentiable through `logits`."""
    total = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(targets):
        terms = [
            logits[i, j] - log_q[j]
            for j in range(len(items))
            if j == t or (items[j] != items[t] and valid[j])
        ]
        total = total - weights[i] * (logits[i, t] - log_q[t] - torch.logsumexp(torch.stack(terms), dim=0))
    return total / sum(weights) if sum(weights) > 0 else total * 0.0


@st.composite
def batches(draw):
    columns = draw(st.integers(1, 8))
    rows = draw(st.integers(1, 8))
    whole = lambda low, high, size: draw(st.lists(st.integers(low, high), min_size=size, max_size=size))  # noqa: E731
    return {
        "seed": draw(st.integers(0, 2**31)),
        "scale": draw(st.sampled_from([0.1, 5.0, 50.0])),
        "items": whole(0, 4, columns),
        "targets": whole(0, columns - 1, rows),
        "valid": [flag > 0 for flag in whole(0, 3, columns)],
        "weights": [weight / 2 for weight in whole(0, 4, rows)],
    }


@settings(max_examples=150, deadline=None)
@given(batches(), st.booleans())
def test_loss_and_gradient_equal_the_naive_loop(batch, has_padding):
    """Columns of padding have a mask of their own, and without them accidental hits are listed instead."""
    if not has_padding:
        batch["valid"] = [True] * len(batch["items"])
    generator = torch.Generator().manual_seed(batch["seed"])
    shape = (len(batch["targets"]), len(batch["items"]))
    logits64 = (torch.randn(shape, generator=generator, dtype=torch.float64) * batch["scale"]).requires_grad_()
    log_q = -4.0 * torch.rand(shape[1], generator=generator)
    logits32 = logits64.detach().float().requires_grad_()

    expected = naive(logits64, batch["items"], batch["targets"], log_q.double(), batch["valid"], batch["weights"])
    loss, extras = in_batch_softmax(
        logits32,
        torch.tensor(batch["items"]),
        torch.tensor(batch["targets"]),
        log_q_G=log_q,
        valid_G=torch.tensor(batch["valid"]) if has_padding else None,
        weight_B=torch.tensor(batch["weights"]),
    )
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-5)
    torch.testing.assert_close(logits32.grad.double(), logits64.grad, rtol=1e-4, atol=1e-6)
    assert extras["rows"].item() == sum(weight > 0 for weight in batch["weights"])
    assert 0 <= extras["hits"] <= extras["rows"]


def test_without_options_it_is_plain_cross_entropy():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    loss, extras = in_batch_softmax(logits, torch.arange(6), torch.arange(6))
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.arange(6)).item(), abs=1e-6)
    assert extras["hits"].item() == (logits.argmax(1) == torch.arange(6)).sum()


def test_the_own_column_is_never_masked_and_duplicates_are():
    # Both columns hold item 7: each row keeps only its own column, so nothing is left to learn.
    loss, _ = in_batch_softmax(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), torch.tensor([7, 7]), torch.tensor([0, 1]))
    assert loss.item() == 0.0


def test_log_q_lowers_the_popular_column():
    # Scores equal, column 1 ten times as likely: the correction gives it a tenth of the denominator.
    log_q = torch.log(torch.tensor([0.1, 1.0]))
    loss, _ = in_batch_softmax(torch.zeros(1, 2), torch.tensor([1, 2]), torch.tensor([0]), log_q_G=log_q)
    assert loss.item() == pytest.approx(math.log(1.1), abs=1e-6)


def test_padding_only_gives_zero_and_no_nan_gradient():
    logits = torch.randn(3, 3, requires_grad=True)
    loss, _ = in_batch_softmax(logits, torch.arange(3), torch.arange(3), weight_B=torch.zeros(3))
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


def test_no_rows_and_no_columns():
    logits = torch.zeros(0, 0, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss, extras = in_batch_softmax(logits, nothing, nothing)
    loss.backward()
    assert loss.item() == 0.0 and extras["rows"].item() == 0.0


def test_low_precision_logits_are_summed_in_float32():
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    loss, _ = in_batch_softmax(logits, torch.arange(64), torch.arange(4))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits.double(), torch.arange(4)).item(), abs=1e-5
    )


@pytest.mark.parametrize("name", ["log_q_G", "valid_G", "weight_B"])
def test_a_shape_that_does_not_fit_is_named(name):
    with pytest.raises(ValueError, match=name):
        in_batch_softmax(torch.zeros(2, 3), torch.arange(3), torch.arange(2), **{name: torch.ones(7)})


def test_logits_must_fit_rows_and_columns():
    with pytest.raises(ValueError, match="2 rows and 4 columns"):
        in_batch_softmax(torch.zeros(2, 3), torch.arange(4), torch.arange(2))


def test_one_process_gathers_itself():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(x) is x
    assert torch.equal(gather_ids(torch.arange(3)), torch.arange(3))
    assert target_columns([2, 3], 1, torch.device("cpu")).tolist() == [2, 3, 4]
