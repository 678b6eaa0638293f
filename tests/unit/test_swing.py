"""Swing against its definition, on random graphs with repeated views, ties, and users of one item."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import SwingConfig
from trainer.channels.swing import swing
from trainer.co_views import CoViews
from trainer.neighbors import top_neighbors


def graph(seed, views, users, items):
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.geometric(0.2, views), items)  # some items are everybody's
    return CoViews.of_views(rng.integers(0, users, views), item, rng.integers(0, 50, views), items + 1, 50)


def naive(views, alpha, max_items=None):
    """{(i, j): s(i, j)} for ordered pairs, straight from the equation."""
    held = [list(views.item_P[b:e]) for b, e in zip(views.pair_offset_U1[:-1], views.pair_offset_U1[1:], strict=True)]
    held = [set(map(int, items[:max_items])) for items in held]
    score = defaultdict(float)
    for u in range(len(held)):
        for v in range(u + 1, len(held)):
            common = held[u] & held[v]
            if not common:
                continue
            weight = 1 / np.sqrt(len(held[u]) * len(held[v])) / (alpha + len(common))
            for i in common:
                for j in common - {i}:
                    score[i, j] += weight
    return dict(score)


def scored(views, config, top=100, threads=1):
    (item, neighbor, score), facts = swing(views, config, top, threads)
    return dict(zip(zip(item.tolist(), neighbor.tolist(), strict=True), score, strict=True)), facts


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 120), st.integers(1, 12), st.integers(1, 12),
       st.sampled_from([0.0, 1.0, 5.5]))
def test_equals_the_definition(seed, views, users, items, alpha):
    made = graph(seed, views, users, items)
    found, facts = scored(made, SwingConfig(alpha=alpha), threads=1 + seed % 2)
    wanted = naive(made, alpha)
    assert found.keys() == wanted.keys()
    assert all(abs(found[pair] - wanted[pair]) < 1e-6 for pair in wanted)
    assert facts == {"users_capped": 0, "items_sampled": 0}


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_keeps_the_best_and_of_equals_the_lower_row(seed, top):
    made = graph(seed, 80, 10, 10)
    (item, neighbor, score), _ = swing(made, SwingConfig(), 100)
    wanted = top_neighbors(item, neighbor, score, made.rows, top)
    (item, neighbor, score), _ = swing(made, SwingConfig(), top)
    found = top_neighbors(item, neighbor, score, made.rows, top)
    np.testing.assert_array_equal(found.neighbor_L, wanted.neighbor_L)
    np.testing.assert_array_equal(found.offset_N1, wanted.offset_N1)
    assert len(item) == len(found.neighbor_L)


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_busy_users_keep_their_latest_items(seed, max_items):
    made = graph(seed, 100, 8, 12)
    found, facts = scored(made, SwingConfig(max_items_per_user=max_items))
    wanted = naive(made, 1.0, max_items)
    assert found.keys() == wanted.keys() and all(abs(found[p] - wanted[p]) < 1e-6 for p in wanted)
    assert facts["users_capped"] == int((made.items_U > max_items).sum())


def test_sampled_users_are_the_same_whatever_the_order_and_the_threads():
    made = graph(1, 600, 60, 10)
    config = SwingConfig(max_users_per_item=7)
    found, facts = scored(made, config)
    assert facts["items_sampled"] > 5
    user_V = np.repeat(made.user_id_U, np.diff(made.offset_U1))
    mixed = np.random.default_rng(0).permutation(len(user_V))
    again, _ = scored(CoViews.of_views(user_V[mixed], made.item_V[mixed], made.time_ms_V[mixed], made.rows, 50), config,
                      threads=3)
    assert found == again
    other, _ = scored(made, SwingConfig(max_users_per_item=7, seed=5))
    assert found != other


def test_a_sample_of_users_is_unbiased_up_to_scale():
    """Every user holds items 1 and 2, half of them 3: sampled scores of item 1 keep that proportion."""
    users = 2000
    views = [(u, i) for u in range(users) for i in ((1, 2, 3) if u % 2 else (1, 2))]
    user, item = map(np.array, zip(*views, strict=True))
    made = CoViews.of_views(user, item, np.zeros(len(user)), 4, 1)
    whole, _ = scored(made, SwingConfig(max_users_per_item=None))
    part, _ = scored(made, SwingConfig(max_users_per_item=500))
    assert part[1, 3] / part[1, 2] == pytest.approx(whole[1, 3] / whole[1, 2], rel=0.15)


@pytest.mark.parametrize("views", [0, 1])
def test_nothing_to_count(views):
    found, _ = scored(CoViews.of_views(np.zeros(views), np.ones(views), np.zeros(views), 5, 1), SwingConfig())
    assert found == {}
