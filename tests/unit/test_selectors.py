from dataclasses import replace

import numpy as np
import pytest
from made_routing import made_routing_run, routing_config
from scipy.optimize import minimize

from launch.routing import make_selectors
from trainer.neighbors import NeighborLists
from trainer.replay import rewards_ms
from trainer.routing_evaluation import Run, training_part
from trainer.selectors import SELECTORS
from trainer.selectors.context import LATEST_VIEWS
from trainer.selectors.lic import turn_of_each
from trainer.selectors.pdn import RIDGE, logistic
from trainer.selectors.vectors import item_vectors
from trainer.trigger_features import trigger_table
from trainer.triggers import is_future_view


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = made_routing_run(tmp_path_factory.mktemp("selectors") / "run", 2)
    return Run(routing_config(folder), folder)


@pytest.fixture(scope="module")
def blocks(run):
    return [block for n in range(run.store.shards) for _, block in run.blocks(n, run.requests(n, "test"), "test")]


def made(run, name, seed=0):
    return SELECTORS[name](run.config, run.store.vocabulary.rows, seed)


def order_of(selector, block, request, channel=0):
    """Positions of a request's triggers in routing order."""
    bounds = block.table.requests.trigger_offset_R1
    score_T = selector.score(block.table, block)[bounds[request]:bounds[request + 1], channel]
    return [t + 1 for t in sorted(range(len(score_T)), key=lambda t: (-score_T[t], t))]


def test_every_selector_scores_every_trigger(run, blocks):
    selectors, absent = make_selectors(run)
    assert absent == {"tag-top": "the catalogue has no tags"}
    for number in range(run.store.shards):
        for part in training_part(run, number):
            for selector in selectors:
                selector.learn(part)
    for selector in selectors:
        if selector.learns:
            selector.ready()
        for block in blocks:
            score_TC = selector.score(block.table, block)
            assert score_TC.shape == block.table.length_TC.shape and np.isfinite(score_TC).all(), selector.name


def test_recent_and_past_replay(run, blocks):
    table = blocks[0].table
    count = np.diff(table.requests.trigger_offset_R1)[0]
    assert order_of(made(run, "recent"), blocks[0], 0) == list(range(1, count + 1))
    ms, hits = table.past_replay_ms_TC[:count, 1], table.past_hits_TC[:count, 1]
    wanted = sorted(range(count), key=lambda t: (-ms[t], -hits[t], t))
    assert order_of(made(run, "past-replay"), blocks[0], 0, 1) == [t + 1 for t in wanted]


def test_watch_time_top_puts_unknown_long_views_before_other_unknown_ones(run, blocks):
    table = blocks[0].table
    bounds = table.requests.trigger_offset_R1
    for r in range(len(table.requests)):
        watch, long = table.watch_s_T[bounds[r]:bounds[r + 1]], table.is_target_T[bounds[r]:bounds[r + 1]]

        def key(t, watch=watch, long=long):
            group = (1 if long[t] else 2) if np.isnan(watch[t]) else 0 if watch[t] > 0 else 3
            return group, -watch[t] if group == 0 else 0, t

        wanted = [t + 1 for t in sorted(range(len(watch)), key=key)]
        assert order_of(made(run, "watch-time-top"), blocks[0], r) == wanted


def test_random_depends_on_request_item_channel_and_seed(run, blocks):
    first, second = (made(run, "random", seed).score(blocks[0].table, blocks[0]) for seed in (0, 1))
    assert (first == made(run, "random").score(blocks[0].table, blocks[0])).all()
    assert (first != second).mean() > 0.9 and (first[:, 0] != first[:, 1]).mean() > 0.9
    ranks = first.argsort(axis=0)
    assert abs(np.corrcoef(ranks[:, 0], ranks[:, 1])[0, 1]) < 0.5


def test_ltv_is_the_shrunk_mean_of_what_was_watched_after(run, blocks):
    selector, total, count = made(run, "ltv"), {}, {}
    for number in range(run.store.shards):
        for part in training_part(run, number):
            selector.learn(part)
            requests = part.table.requests
            for t, r in enumerate(requests.request_T):
                item = int(requests.trigger_row_T[t])
                total[item] = total.get(item, 0) + int(part.future_ms_R[r])
                count[item] = count.get(item, 0) + 1
    mean = sum(total.values()) / sum(count.values())
    got = selector.score(blocks[0].table, blocks[0])[:, 0]
    wanted = [(total.get(int(i), 0) + 10 * mean) / (count.get(int(i), 0) + 10)
              for i in blocks[0].table.requests.trigger_row_T]
    np.testing.assert_allclose(got, wanted)


def test_training_parts_say_what_was_next(run):
    for part in training_part(run, 0):
        assert part.next_hit_TC.shape == part.reward_ms_TC.shape and part.next_hit_TC.any()
        assert (part.future_ms_R[part.table.requests.request_T][:, None] >= part.reward_ms_TC).all()


def test_latest_views_are_effective_and_before_the_request(run, blocks):
    block = blocks[0]
    requests, shard = block.table.requests, block.shard
    offset_R1, row_H = block.latest_views
    for r in range(len(requests)):
        begin = shard.offset_U[requests.user_R[r]]
        wanted = [int(shard.item_row_E[e]) for e in range(requests.history_end_R[r] - 1, begin - 1, -1)
                  if shard.is_effective_E[e] and shard.item_row_E[e]][:LATEST_VIEWS]
        assert row_H[offset_R1[r]:offset_R1[r + 1]].tolist() == wanted


def test_vectors_of_items_with_common_neighbours_are_alike():
    lists = NeighborLists(np.array([0, 0, 3, 6, 9]), np.array([4, 5, 6, 4, 5, 6, 7, 8, 9], np.int32),
                          np.ones(9, np.float32))
    one, two, three = item_vectors(np.array([1, 2, 3]), [lists])
    assert one @ two > 0.45 > 0.3 > abs(one @ three)
    np.testing.assert_allclose(np.linalg.norm([one, two, three], axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(one, item_vectors(np.array([1]), [lists])[0])


def test_lic_takes_the_medoid_of_each_cluster_in_turn():
    rng = np.random.default_rng(0)
    centre = np.array([[10.0, 0], [0, 10.0]])
    cluster = np.array([0, 0, 1, 0, 1, 0])
    vectors = centre[cluster] + rng.normal(0, 0.1, (6, 2))
    turn = turn_of_each(vectors, 2)
    assert sorted(turn) == list(range(6))
    first = np.argsort(turn)
    assert cluster[first[:4]].tolist() == [0, 1, 0, 1]  # the larger cluster first, then in turn
    mean = vectors[cluster == 0].mean(axis=0)
    members = np.flatnonzero(cluster == 0)
    assert first[0] == members[np.linalg.norm(vectors[members] - mean, axis=1).argmin()]
    assert turn_of_each(vectors[:1]).tolist() == [0]


def test_logistic_regression_is_at_the_minimum():
    rng = np.random.default_rng(1)
    feature_TF = np.column_stack([np.ones(300), rng.normal(size=(300, 3))])
    label_T = rng.random(300) < 1 / (1 + np.exp(-feature_TF @ [-1, 1, 0, -0.5]))

    def loss(weight_F):
        logit_T = feature_TF @ weight_F
        return np.logaddexp(0, logit_T).sum() - logit_T[label_T].sum() + RIDGE * 150 * weight_F @ weight_F

    np.testing.assert_allclose(logistic(feature_TF, label_T), minimize(loss, np.zeros(4), tol=1e-10).x, atol=1e-4)


def test_oracle_is_the_forward_value(run, blocks):
    for block in blocks:
        np.testing.assert_array_equal(made(run, "oracle").score(block.table, block), block.reward_ms_TC)


def test_nothing_at_or_after_the_request_is_seen(run, blocks):
    """With another future (items, watch times and flags of all rows from the request on) no score changes but the
    oracle's. Those that learn have learned, from training requests that are left as they are."""
    selectors = make_selectors(run)[0]
    for selector in selectors:
        if selector.learns:
            for number in range(run.store.shards):
                for part in training_part(run, number):
                    selector.learn(part)
            selector.ready()
    for block in blocks:
        shard, requests = block.shard, block.table.requests
        later_E = shard.timestamp_ms_E >= requests.time_ms_R.min()
        rng = np.random.default_rng(0)
        other = replace(shard, item_row_E=np.where(later_E, rng.permutation(shard.item_row_E), shard.item_row_E),
                        watch_time_s_E=np.where(later_E, np.float32(77), shard.watch_time_s_E),
                        is_effective_E=shard.is_effective_E ^ later_E, is_target_E=shard.is_target_E ^ later_E)
        rule = run.rule("test")
        table = trigger_table(other, requests, rule, run.snapshots, run.statistics, run.store.catalogue, run.config)
        reward_ms_TC = rewards_ms(other, requests, is_future_view(other, rule), run.snapshots, [12], 1.0)[0]
        changed = replace(block, table=table, shard=other, reward_ms_TC=reward_ms_TC)
        for selector in selectors:
            same = np.array_equal(selector.score(block.table, block), selector.score(table, changed))
            assert same == (selector.name != "oracle"), selector.name
