"""Dropout: its share, its independence of who holds a row, and how free its bits are of each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.dropout import Dropout, RowMlp, place_keys


def dropped(keys, width, rate, seed=0):
    """bool (N, width): what is kept."""
    torch.manual_seed(seed)
    return Dropout(rate)(torch.ones(len(keys), width), torch.as_tensor(keys)) != 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (200, 301), (50, 3, 5)])
def test_it_drops_its_share_and_keeps_the_mean(rate, shape):
    drop = Dropout(rate)
    x = torch.full(shape, 2.0, requires_grad=True)
    torch.manual_seed(0)
    y = drop(x, torch.arange(shape[0]))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2.0 / (1 - rate)))
    if y.numel() > 10_000:
        assert abs(kept.float().mean().item() - (1 - rate)) < 0.01
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept.float() / (1 - rate))
    assert drop.eval()(x, torch.arange(shape[0])) is x


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_numbers_beside_and_below_each_other_and_in_other_steps_are_free(rate):
    """Keys that differ in low bits alone, as those of places do, and in high bits alone, as those of windows do."""
    kept = 1 - rate
    for keys in (np.arange(400), np.arange(400) << 32, np.random.default_rng(0).integers(-2**63, 2**63 - 1, 400)):
        first, second = dropped(keys, 240, rate), dropped(keys, 240, rate, seed=1)
        spread = 4 * (kept * rate / first.numel()) ** 0.5
        assert abs(first.float().mean() - kept) < spread
        pairs = [(first, second)]
        pairs += [(first[:, d:], first[:, :-d]) for d in (1, 2, 3, 4, 8, 64)]
        pairs += [(first[d:], first[:-d]) for d in (1, 2, 16, 256)]
        for one, other in pairs:
            assert abs((one & other).float().mean() - kept**2) < 2 * spread
        for share in (first.float().mean(dim=0), first.float().mean(dim=1)):
            assert (share - kept).abs().max() < 5 * (kept * rate / min(first.shape)) ** 0.5


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**62))
@settings(max_examples=50, deadline=None)
def test_what_is_dropped_of_a_row_does_not_depend_on_who_holds_it(rows, width, workers, seed):
    keys = np.random.default_rng(seed).integers(0, 2**40, rows)
    whole = dropped(keys, width, 0.4, seed)
    for rank in range(min(workers, rows)):
        assert torch.equal(dropped(keys[rank::workers], width, 0.4, seed), whole[rank::workers])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_a_place_has_one_key_whatever_the_widest_window_of_a_worker_is(lengths, workers):
    def keys(rows):
        widest = max(lengths[row] for row in rows)
        place = [b * widest + p for b, row in enumerate(rows) for p in range(lengths[row])]
        return place_keys(torch.tensor(rows), torch.tensor(place), widest).tolist()

    rows = list(range(len(lengths)))
    everything = keys(rows)
    assert len(set(everything)) == sum(lengths)
    dealt = [key for rank in range(min(workers, len(rows))) for key in keys(rows[rank::workers])]
    assert sorted(dealt) == sorted(everything)


def test_an_mlp_hands_the_keys_on_and_keeps_the_names_of_its_parameters():
    torch.manual_seed(3)
    mlp = RowMlp(torch.nn.Linear(4, 6), torch.nn.GELU(), Dropout(0.5), torch.nn.Linear(6, 2))
    x, keys = torch.randn(5, 4), torch.tensor([7, 1, 7, 3, 9])
    torch.manual_seed(0)
    together = mlp(x, keys)
    torch.manual_seed(0)
    torch.testing.assert_close(mlp(x[3:], keys[3:]), together[3:])
    x[2] = x[0]
    torch.manual_seed(0)
    same = mlp(x, keys)
    torch.testing.assert_close(same[2], same[0])  # one key, one mask
    assert set(mlp.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
