"""The score of the loss and the inner product of the index are one number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from embeddings.similarity import Similarity


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["dot", "cosine"]),
    temperature=st.floats(0.02, 4.0),
    width=st.integers(1, 40),
    users=st.integers(1, 7),
    items=st.integers(1, 9),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_index_inner_product_is_the_score(kind, temperature, width, users, items, biased, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    user_BD = torch.randn(users, width, generator=generator).to(dtype)
    item_GD = torch.randn(items, width, generator=generator).to(dtype)
    bias_G = torch.randn(items, generator=generator).to(dtype) if biased else None
    similarity = Similarity(kind, temperature)
    scores = similarity.scores(user_BD, item_GD, bias_G)
    query, index = similarity.query_vectors(user_BD), similarity.index_vectors(item_GD, bias_G)
    assert query.shape == (users, width + 1) and index.shape == (items, width + 1)
    assert scores.dtype == query.dtype == index.dtype == torch.float32
    # float32 sums of up to 41 products, whose size grows with 1 / tau
    torch.testing.assert_close(query @ index.T, scores, rtol=1e-5, atol=1e-5 * max(1.0, 1.0 / temperature))


def test_scores_by_hand():
    user, item, bias = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0], [5.0, 0.0]]), torch.tensor([0.25, -1.0])
    dot = Similarity("dot", 2.0).scores(user, item, bias)
    torch.testing.assert_close(dot, torch.tensor([[8.0 / 2 + 0.25, 15.0 / 2 - 1.0]]))
    cosine = Similarity("cosine", 0.5).scores(user, item, bias)
    torch.testing.assert_close(cosine, torch.tensor([[0.8 / 0.5 + 0.25, 0.6 / 0.5 - 1.0]]))


def test_gradient_reaches_users_items_and_bias_and_a_zero_vector_is_harmless():
    user, item, bias = torch.zeros(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True), torch.zeros(4)
    bias.requires_grad_()
    Similarity("cosine", 0.1).scores(user, item, bias).sum().backward()
    for tensor in (user, item, bias):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


def test_autocast_does_not_round_the_score():
    user, item = torch.randn(5, 16), torch.randn(6, 16)
    similarity = Similarity("dot", 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = similarity.scores(user, item)
    assert torch.equal(rounded, similarity.scores(user, item))


@pytest.mark.parametrize(("kind", "temperature"), [("l2", 1.0), ("dot", 0.0), ("dot", -1.0), ("cosine", float("nan"))])
def test_a_similarity_that_cannot_be(kind, temperature):
    with pytest.raises(InputError, match="similarity"):
        Similarity(kind, temperature)
