"""The towers through CrmModel: what a user vector has seen and what it has not, and that packing changes nothing."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_views import HOUR_MS, T0, made_catalogue, made_views

import trainer.crm
from configs.schema import CrmConfig, ModelConfig
from trainer.batches import Collation, ItemFeatures
from trainer.catalogue import UserFeatures
from trainer.conditions import WatchBuckets
from trainer.crm import CrmModel, FeatureSizes, table_specs
from trainer.requests import sample_requests
from trainer.towers import PastPath, WatchLookup, past_pools
from trainer.windows import BatchRows, WindowRule, cut_windows

ITEMS, HISTORY, DIM = 40, 9, 16
BUCKETS = WatchBuckets(20, 300.0)
TOWERS = ("dnn", "decision_transformer")
BOTH = [(tower, condition) for tower in TOWERS for condition in ("next", "none")]
CATALOGUE = made_catalogue(ITEMS)
USERS = UserFeatures(np.arange(0, 200, 2), {"city": np.arange(100, dtype=np.int32) % 5}, {"city": 5})


class Made:
    """A model in eval mode with random tables, and the batches it is asked with."""

    def __init__(self, tower, condition, *, seed=0, users=False, dropout=0.5, past_path=False, **crm):
        config = {"tower": {"dim": DIM, "history": HISTORY, "layers": 2, "heads": 2, "hidden": 24, "dropout": dropout,
                            "past_path": past_path},
                  "tables": {"dim": 8}, "condition": {"buckets": 20, "max_s": 300.0}}
        crm = CrmConfig(**{**config, **crm})
        sizes = FeatureSizes.of(CATALOGUE, USERS if users else None)
        torch.manual_seed(seed)
        self.model = CrmModel(crm, ModelConfig(name="m", tower=tower, condition=condition), sizes).eval()
        # Small standard deviations would hide a leak; and the bias starts at zero, where it could hide its absence.
        for name, parameter in self.model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
        self.tables = {spec.name: torch.randn(spec.rows, spec.dim, requires_grad=True)
                       for spec in table_specs(sizes, crm)}
        log_q_N = np.log(np.random.default_rng(1).random(ITEMS) + 0.01)
        self.features = ItemFeatures(CATALOGUE, log_q_N, USERS if users else None)
        self.kind = condition

    def looked_up(self, features):
        return {name: table[features[name].values()] for name, table in self.tables.items()}

    def collation(self, dropout=0.0):
        return Collation(self.kind, BUCKETS, dropout, 0, HISTORY + 1)

    def windows(self, views, rule=None):
        cut = cut_windows(views, rule or WindowRule(HISTORY, HISTORY), np.random.default_rng(0))
        rows = BatchRows([(views, cut)], len(cut), 0, 1)
        return self.collation().window_batch(self.features, rows, np.random.default_rng(0))

    def at_all(self, batch, grad=False):
        """The vector at every packed position, float (V, D)."""
        batch = replace(batch, read_R=torch.arange(len(batch.place_V)))
        with torch.set_grad_enabled(grad):
            return self.model.query_vectors(batch, self.looked_up(batch.items.features))[:, :-1]

    def users(self, batch):
        with torch.no_grad():
            return self.model.query_vectors(batch, self.looked_up(batch.items.features))

    def items(self, rows):
        batch = self.features.take(np.asarray(rows, np.int64))
        with torch.no_grad():
            return self.model.index_vectors(batch, self.looked_up(batch.features))


def changed(batch, name, at_V, high):
    """The batch with another value of a packed field at some positions."""
    values = getattr(batch, name).clone()
    values[at_V] = (values[at_V] + 1 + torch.arange(int(at_V.sum())) % (high - 1)) % high
    assert (values[at_V] != getattr(batch, name)[at_V]).all()
    return replace(batch, **{name: values})


def mixed_views(seed=0):
    return made_views([10, 1, 7, 25, 3], seed, items=ITEMS)


FIELDS = {"item_V": None, "watch_bucket_V": 21, "condition_bucket_V": 21, "hour_V": 25, "gap_V": 33}


@pytest.mark.parametrize("tower, condition", BOTH)
@pytest.mark.parametrize("field", FIELDS)
def test_no_vector_sees_anything_later(tower, condition, field):
    made = Made(tower, condition)
    batch = made.windows(mixed_views())
    position_V = batch.place_V % batch.positions
    before = made.at_all(batch)
    for i in range(HISTORY + 1):
        later = position_V > i
        if not later.any():
            continue
        after = made.at_all(changed(batch, field, later, FIELDS[field] or len(batch.items.row_U)))
        assert torch.equal(after[~later], before[~later])


@pytest.mark.parametrize("tower, condition", BOTH)
@pytest.mark.parametrize("field", ["item_V", "watch_bucket_V"])
def test_no_vector_sees_its_own_view_and_every_vector_sees_the_one_before(tower, condition, field):
    made = Made(tower, condition)
    batch = made.windows(mixed_views())
    position_V = batch.place_V % batch.positions
    before = made.at_all(batch)
    for i in range(HISTORY + 1):
        after = made.at_all(changed(batch, field, position_V == i, FIELDS[field] or len(batch.items.row_U)))
        assert torch.equal(after[position_V <= i], before[position_V <= i])
        follower = position_V == i + 1
        assert not follower.any() or ((after - before)[follower].abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("tower, condition", BOTH)
def test_the_gradient_of_a_vector_reaches_the_past_items_and_no_other(tower, condition):
    made = Made(tower, condition)
    views = made_views([10], items=ITEMS)
    views.item_row_E[:] = np.random.default_rng(3).permutation(ITEMS - 1)[:10] + 1  # all distinct
    batch = made.windows(views)
    for i in range(10):
        made.tables["item"].grad = None
        made.at_all(batch, grad=True)[i].square().sum().backward()
        gradient = made.tables["item"].grad
        moved = set() if gradient is None else set(torch.nonzero(gradient.abs().sum(dim=1)).flatten().tolist())
        assert moved == set(views.item_row_E[:i].tolist())


@pytest.mark.parametrize("tower", TOWERS)
def test_the_condition_of_a_position_reaches_its_vector_and_no_earlier_one(tower):
    made = Made(tower, "next")
    batch = made.windows(mixed_views())
    position_V = batch.place_V % batch.positions
    before = made.at_all(batch)
    for i in range(HISTORY + 1):
        after = made.at_all(changed(batch, "condition_bucket_V", position_V == i, 21))
        assert torch.equal(after[position_V < i], before[position_V < i])
        own = position_V == i
        assert not own.any() or ((after - before)[own].abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_without_a_condition_does_not_read_it(tower):
    made = Made(tower, "none")
    batch = made.windows(mixed_views())
    everywhere = torch.ones(len(batch.place_V), dtype=torch.bool)
    assert torch.equal(made.at_all(batch), made.at_all(changed(batch, "condition_bucket_V", everywhere, 21)))
    assert not any("condition" in name for name, _ in made.model.named_parameters())


@pytest.mark.parametrize("tower, condition", BOTH)
@pytest.mark.parametrize("field", ["hour_V", "gap_V"])
def test_the_clock_is_that_of_the_request_alone(tower, condition, field):
    made = Made(tower, condition)
    batch = made.windows(mixed_views())
    position_V = batch.place_V % batch.positions
    before = made.at_all(batch)
    after = made.at_all(changed(batch, field, position_V == 3, FIELDS[field]))
    assert torch.equal(after[position_V != 3], before[position_V != 3])
    assert ((after - before)[position_V == 3].abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind, same", [("prefix", True), ("next", False), ("to_go", False), ("none", True)])
def test_only_a_condition_that_is_read_can_control(tower, kind, same):
    """The paper prints W_i as the sum over j < i: the last token does not hold the condition."""
    made = Made(tower, kind)
    views = made_views([8, 3, 20, 1], seed=2, items=ITEMS)
    end = views.offset_U + views.length_U - 1
    begin = np.maximum(views.offset_U, end - HISTORY)
    vectors = [made.users(made.collation().request_batch(made.features, views, begin, end, views.timestamp_ms_E[end],
                                                         np.full(len(end), seconds)))
               for seconds in (3.0, 60.0, 250.0, float("nan"))]
    for other in vectors[1:]:
        if same:
            assert torch.equal(vectors[0], other)
        else:
            assert ((vectors[0] - other).abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("tower, condition", BOTH)
@pytest.mark.parametrize("users", [False, True])
def test_windows_packed_together_are_those_alone_in_any_order(tower, condition, users):
    made = Made(tower, condition, users=users)
    views = mixed_views(5)
    cut = cut_windows(views, WindowRule(HISTORY, 4), np.random.default_rng(0))

    def vectors(which):
        part = cut.take(np.asarray(which))
        batch = made.collation().window_batch(made.features, BatchRows([(views, part)], len(part), 0, 1),
                                              np.random.default_rng(0))
        return made.at_all(batch).split(np.asarray(part.end_W - part.begin_W).tolist())

    together = vectors(range(len(cut)))
    order = np.random.default_rng(1).permutation(len(cut))
    for place, w in enumerate(order):
        torch.testing.assert_close(vectors(order)[place], together[w], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vectors([w])[0], together[w], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_features_of_a_user_reach_that_users_vectors_alone(tower):
    made = Made(tower, "next", users=True)
    views = made_views([4, 6, 5], items=ITEMS, ids=[0, 2, 7])  # 7 is not in the table of users: row 0
    batch = made.windows(views)
    assert batch.items.features["user_city"].values().tolist() == [0, 1, 0]
    before = made.at_all(batch)
    with torch.no_grad():
        made.tables["user_city"][1] += 1.0
    after = made.at_all(batch)
    mine = (batch.place_V // batch.positions) == 1
    assert torch.equal(after[~mine], before[~mine]) and ((after - before)[mine].abs().amax(dim=1) > 1e-4).all()


def test_pools_are_weighted_means_of_the_past():
    made = Made("dnn", "next")
    batch = made.windows(made_views([6, 3], items=ITEMS))
    token_VD = torch.randn(len(batch.place_V), DIM)
    pools = past_pools(token_VD, batch)
    for v, place in enumerate(batch.place_V.tolist()):
        position = place % batch.positions
        for k, decay in enumerate((1.0, 0.75, 0.0)):
            weight = torch.tensor([decay ** (position - 1 - j) for j in range(position)])
            past = token_VD[v - position:v]
            wanted = (weight[:, None] * past).sum(0) / weight.sum() if position else torch.zeros(DIM)
            torch.testing.assert_close(pools[place, k * DIM:(k + 1) * DIM], wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_interests_are_counted_over_the_past_and_nothing_is_known_without_one():
    batch = Made("dnn", "next").windows(made_views([6, 3], items=ITEMS))
    batch = replace(batch, read_R=torch.arange(len(batch.place_V)))
    path, token_VD, condition_VD = PastPath(DIM, 7, 5, True), *torch.randn(2, len(batch.place_V), DIM)
    past_VE = path.known(token_VD, batch)
    dealt_VK = torch.softmax(path.interest(token_VD), dim=1)
    for v, place in enumerate(batch.place_V.tolist()):
        views = place % batch.positions
        assert views or not past_VE[v].any()
        counts_K = dealt_VK[v - views:v].sum(dim=0)
        wanted_K = torch.log((counts_K + 1) / (views + DIM)) + np.log(DIM)
        torch.testing.assert_close(past_VE[v, -DIM:], wanted_K, rtol=1e-5, atol=1e-5)
    # Linear in the past, whatever the condition.
    torch.testing.assert_close(path(3 * past_VE, condition_VD), 3 * path(past_VE, condition_VD))


@torch.no_grad()
@pytest.mark.parametrize("tower, condition", BOTH)
def test_the_past_goes_past_the_layers_of_both_towers(tower, condition):
    made = Made(tower, condition, past_path=True)
    batch, user_tower = made.windows(mixed_views()), made.model.user_tower
    batch = replace(batch, read_R=torch.arange(len(batch.place_V)))
    token_VD = made.model.views(made.model.items(batch.items, made.looked_up(batch.items.features)), batch)
    wanted_VD = None if condition == "none" else user_tower.condition(batch.condition_bucket_V)
    added_VD = user_tower.past(user_tower.past.known(token_VD, batch), wanted_VD)
    for layer in (user_tower.mlp if tower == "dnn" else user_tower.head)[-1], user_tower.shortcut:
        for parameter in [] if layer is None else layer.parameters():
            parameter.zero_()
    torch.testing.assert_close(made.at_all(batch), added_VD)


@pytest.mark.parametrize("tower, condition", BOTH)
@pytest.mark.parametrize("field", FIELDS)
def test_beside_the_layers_no_vector_sees_anything_later_either(tower, condition, field):
    made = Made(tower, condition, past_path=True)
    batch = made.windows(mixed_views())
    position_V = batch.place_V % batch.positions
    before = made.at_all(batch)
    for i in (0, 3, 6):
        later = position_V > i
        after = made.at_all(changed(batch, field, later, FIELDS[field] or len(batch.items.row_U)))
        assert torch.equal(after[~later], before[~later])
        if field in ("item_V", "watch_bucket_V"):  # nor its own view
            after = made.at_all(changed(batch, field, position_V == i, FIELDS[field] or len(batch.items.row_U)))
            assert torch.equal(after[position_V <= i], before[position_V <= i])


# ------------------------------------------------------------------------------------------------------ in training

def in_training(made, batch, seed=7):
    torch.manual_seed(seed)
    made.model.train()
    try:
        return made.at_all(batch)
    finally:
        made.model.eval()


@pytest.mark.parametrize("tower, condition", BOTH)
def test_with_dropout_too_no_vector_sees_anything_later(tower, condition):
    made = Made(tower, condition)
    batch = made.windows(mixed_views())
    position_V = batch.place_V % batch.positions
    before = in_training(made, batch)
    assert not torch.equal(before, made.at_all(batch)) and not torch.equal(before, in_training(made, batch, seed=8))
    for field in FIELDS:
        for i in (0, 3, 6):
            after = in_training(made, changed(batch, field, position_V > i, FIELDS[field] or len(batch.items.row_U)))
            assert torch.equal(after[position_V <= i], before[position_V <= i])


@pytest.mark.parametrize("tower, condition", BOTH)
def test_dropout_of_next_to_nothing_changes_next_to_nothing(tower, condition):
    made = Made(tower, condition, dropout=1e-7)
    batch = made.windows(mixed_views())
    torch.testing.assert_close(in_training(made, batch), made.at_all(batch), rtol=1e-4, atol=1e-4)


def test_a_watch_time_lies_between_its_knots_and_leans_on_its_own_row_as_it_is_seen():
    views = [5, *np.random.default_rng(0).integers(0, 3000, 21).tolist()]
    lookup = WatchLookup(4, views)
    got = lookup(torch.arange(22)).detach()
    own, knots = lookup.own.weight.detach(), lookup.knots.weight.detach()
    torch.testing.assert_close(got[0], own[0])  # unknown
    for bucket in range(1, 22):
        below, part = divmod(bucket - 1, lookup.SPACING)
        part /= lookup.SPACING
        line = knots[below] * (1 - part) + (knots[below + 1] * part if part else 0.0)
        share = views[bucket] / (views[bucket] + lookup.PRIOR_VIEWS)
        torch.testing.assert_close(got[bucket], share * own[bucket] + line, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- the items

def test_the_vector_of_an_item_does_not_depend_on_its_company():
    made = Made("dnn", "next")
    alone = torch.cat([made.items([row]) for row in range(ITEMS)])
    torch.testing.assert_close(made.items(range(ITEMS)), alone, rtol=1e-5, atol=1e-5)
    shuffled = np.random.default_rng(0).permutation(ITEMS)
    torch.testing.assert_close(made.items(shuffled), alone[shuffled], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(alone).all()


def test_every_feature_of_an_item_counts_and_tags_are_averaged():
    made = Made("dnn", "next")
    tags_N = np.diff(CATALOGUE.tag_offsets_N1)
    before = made.items(range(ITEMS))
    for name in ("item", "author", "tag", "category_genre"):
        with torch.no_grad():
            made.tables[name] += 0.5
        moved = (made.items(range(ITEMS)) - before).abs().amax(dim=1) > 1e-4
        assert moved.tolist() == (tags_N > 0).tolist() if name == "tag" else moved.all()
        with torch.no_grad():
            made.tables[name] -= 0.5
    several = [int(np.flatnonzero(tags_N == n)[0]) for n in (1, 3)]
    with torch.no_grad():  # the mean of equal rows is the row, however many there are
        made.tables["tag"][:] = made.tables["tag"][0].clone()
    batch = made.features.take(np.array(several))
    seen = []
    made.model.items.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made.model.items(batch, made.looked_up(batch.features))
    torch.testing.assert_close(seen[0][:, 24:32], made.tables["tag"][:2].detach())


# ----------------------------------------------------------------------------------- the index's score is the loss's

def captured(made, batch, monkeypatch):
    """What the loss hands to the softmax."""
    caught = SimpleNamespace()

    def softmax(logits, target, **named):
        caught.logits, caught.target, caught.named = logits.detach(), target, named
        return logits.sum(), {}

    monkeypatch.setattr(trainer.crm, "in_batch_softmax", softmax)
    made.model.loss(batch, made.looked_up(batch.items.features))
    return caught


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("similarity, temperature", [("dot", 1.0), ("cosine", 0.05)])
@pytest.mark.parametrize("log_q", [True, False])
@pytest.mark.parametrize("item_bias", [True, False])
def test_the_index_ranks_by_the_score_of_the_loss(tower, similarity, temperature, log_q, item_bias, monkeypatch):
    made = Made(tower, "next", similarity=similarity, temperature=temperature, log_q=log_q, item_bias=item_bias)
    batch = made.windows(mixed_views(), WindowRule(HISTORY, 3))
    caught = captured(made, batch, monkeypatch)
    target = batch.items.row_U[batch.item_V[batch.read_R]]
    assert caught.named["total_weight"] == len(target)
    column, count = target.unique(return_counts=True)
    assert torch.equal(column[caught.target], target) and torch.equal(caught.named["count_G"], count.float())
    target = column
    queries, items = made.users(batch), made.items(target.numpy())
    torch.testing.assert_close(queries @ items.T, caught.logits, rtol=1e-4, atol=1e-4)
    log_q_G = torch.from_numpy(made.features.log_q_N)[target]
    if log_q:
        torch.testing.assert_close(caught.named["log_q_G"], log_q_G)
    else:
        assert caught.named["log_q_G"] is None
    # The same, told by its parts.
    with torch.no_grad():
        picked = made.features.take(target.numpy())
        hidden = made.model.items(picked, made.looked_up(picked.features))
        vector, delta = made.model.item_tower(hidden)
        bias = delta + log_q_G if item_bias else torch.zeros_like(delta)
        user = queries[:, :-1] * temperature
        torch.testing.assert_close(made.model.similarity.scores(user, vector, bias), caught.logits, rtol=1e-4,
                                   atol=1e-4)


@pytest.mark.parametrize("tower, condition", BOTH)
def test_the_loss_is_the_softmax_over_the_targets_of_the_batch(tower, condition):
    made = Made(tower, condition)
    batch = made.windows(mixed_views(), WindowRule(HISTORY, 3))
    target = batch.items.row_U[batch.item_V[batch.read_R]]
    scores = made.users(batch) @ made.items(target.numpy()).T - torch.from_numpy(made.features.log_q_N)[target]
    hit = (target[:, None] == target[None, :]) & ~torch.eye(len(target), dtype=torch.bool)
    wanted = torch.nn.functional.cross_entropy(scores.masked_fill(hit, -torch.inf), torch.arange(len(target)))
    loss, extras = made.model.loss(batch, made.looked_up(batch.items.features))
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=1e-5)
    assert extras["rows"] == len(target) and all(not value.requires_grad for value in extras.values())


@pytest.mark.parametrize("tower, condition", BOTH)
def test_a_worker_without_a_row_still_gives_a_loss_with_a_gradient(tower, condition):
    made = Made(tower, condition)
    batch = made.collation().window_batch(made.features, BatchRows([], 3, 1, 2), np.random.default_rng(0))
    loss, _ = made.model("loss", batch, made.looked_up(batch.items.features))
    loss.backward()
    assert loss.item() == 0.0 and not made.tables["item"].grad.any()


# ---------------------------------------------------------------------------------------------------------- leakage

@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind", ["next", "to_go", "prefix", "none"])
def test_planting_the_answer_into_the_future_changes_no_vector(tower, kind):
    """Tries to cheat: an item that occurs nowhere else answers every request and fills all that comes after it."""
    made = Made(tower, kind)
    answer, begin_ms = ITEMS - 1, T0 + 120 * HOUR_MS

    def asked(plant):
        views = made_views([30, 12, 25], seed=6, items=ITEMS - 1)
        late_E = views.timestamp_ms_E >= begin_ms
        assert late_E.any() and not late_E.all()
        # One request a user: the first view of the period.
        first = [np.flatnonzero(late_E & (views.owner_E() == u))[0] for u in range(3)]
        if plant:
            views.item_row_E[late_E], views.watch_s_E[late_E] = answer, 299.0
        requests = sample_requests(lambda _: views, 1, begin_ms, T0 + 10**12, judged=None, limit=None, future=3, seed=0)
        times = views.timestamp_ms_E[first]
        requests = requests.take(np.array([np.flatnonzero((requests.time_ms_Q == t) & (requests.user_id_Q == u))[0]
                                           for t, u in zip(times, views.user_id_U, strict=True)]))
        batch = made.collation().request_batch(
            made.features, requests.views, np.maximum(requests.begin_Q, requests.end_Q - HISTORY), requests.end_Q,
            requests.time_ms_Q, np.full(3, 60.0), requests.ordinal_Q)
        return requests, batch

    (_, honest), (requests, cheated) = asked(False), asked(True)
    assert (requests.relevant_rows == answer).all()
    assert answer not in cheated.items.row_U
    assert torch.equal(made.users(honest), made.users(cheated))
