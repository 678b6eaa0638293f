"""What can be read of the synthetic world's users: the posterior itself on tiny worlds, and only the past, and no more
than there is."""

import dataclasses
import itertools

import numpy as np
import pytest

from trainer import world_reader
from trainer.world import World, WorldSpec
from trainer.world_reader import HistoryTruth
from trainer.world_truth import WorldTruth

TINY = WorldSpec(users=60, items=12, authors=2, tags_count=3, views_per_user=10.0, session_views=3.0, days=3,
                 user_item_affinity=1.0, watch_persistence=0.5, mood_scale=0.4, interest_drift=0.4)
SMALL = WorldSpec(users=120, items=150, tags_count=15, views_per_user=40.0, user_item_affinity=1.2)


def requests(world: World, count: int, only: str | None = "long_view") -> tuple[np.ndarray, ...]:
    """(user_ids, timestamps_ms, watch_time_s, items) of logged views."""
    logs = world.logs(0, world.spec.users)
    rows = np.flatnonzero(logs[only].to_numpy()) if only else np.arange(logs.num_rows)
    rows = np.sort(np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False))
    order = np.argsort(world.item_ids)
    item = order[np.searchsorted(world.item_ids, logs["item_id"].to_numpy()[rows], sorter=order)]
    return tuple(logs[name].to_numpy()[rows] for name in ("user_id", "timestamp_ms", "watch_time_s")) + (item,)


def normalised(score: np.ndarray) -> np.ndarray:
    chance = np.exp(score.astype(np.float64) - score.max(1, keepdims=True))
    return chance / chance.sum(1, keepdims=True)


def log_loss(score: np.ndarray, item: np.ndarray) -> float:
    return float(-np.log(normalised(score)[np.arange(len(item)), item]).mean())


def seen_by(world: World, user_id: int, time_ms: int, reached: bool, last: int):
    """Items, watch times, session numbers of one user's views before a time, and the session at that time."""
    views = world.views(world.user_indices(np.array([user_id])))
    number = views.sessions.number[views.session]
    before = views.timestamp_ms < time_ms
    kept = np.flatnonzero(before & views.long if reached else before)[-last:]
    return (views.item[kept], views.watch_s[kept].astype(np.float64), number[kept],
            number[np.flatnonzero(views.timestamp_ms <= time_ms)[-1]])


def all_users(world: World):
    """Every (five interests, three favourites) of a tiny world and its prior: int (H, 5), (H, 3), float (H,)."""
    tags, authors = world.spec.tags_count, world.spec.author_count
    met_TA = np.zeros((tags, authors))
    for item, slot in itertools.product(range(world.spec.items), range(3)):
        met_TA[world.item_tags[item, slot], world.item_author[item]] += world.item_share_of_tag[item, slot]
    tau = np.array(list(itertools.product(range(tags), repeat=5)))
    alpha = np.array(list(itertools.product(range(authors), repeat=3)))
    met_HA = np.einsum("j,hja->ha", world.interest_weight, met_TA[tau])
    prior = world.tag_interest[tau].prod(1)[:, None] * met_HA[:, alpha].prod(2)
    return np.repeat(tau, len(alpha), 0), np.tile(alpha, (len(tau), 1)), prior.ravel()


def brute_choice(world: World, items, numbers, own_number) -> np.ndarray:
    """p(item) of the next view, float (N,), by summing over every user and, by the forward algorithm, every chain of
    passing interests."""
    spec = world.spec
    tau, alpha, prior = all_users(world)
    share_NT = np.zeros((spec.items, spec.tags_count))
    for slot in range(3):
        np.add.at(share_NT, (np.arange(spec.items), world.item_tags[:, slot]), world.item_share_of_tag[:, slot])
    lasting_HN = spec.exploration * world.popularity + spec.lasting_interest * np.einsum(
        "j,hjn->hn", world.interest_weight, share_NT.T[tau])
    lasting_HN += spec.author_loyalty / 3 * world.item_share_of_author * (
        alpha[:, :, None] == world.item_author).sum(1)
    forward_HT = prior[:, None] * world.tag_interest
    for number in range(numbers[0] if len(numbers) else own_number, own_number + 1):
        if number > (numbers[0] if len(numbers) else own_number):
            forward_HT = ((1 - spec.interest_drift) * forward_HT
                          + spec.interest_drift * forward_HT.sum(1, keepdims=True) * world.tag_interest)
        for item in items[numbers == number]:
            forward_HT *= lasting_HN[:, item, None] + spec.passing_interest * share_NT[item]
    forward_HT /= forward_HT.sum()
    return forward_HT.sum(1) @ lasting_HN + spec.passing_interest * share_NT @ forward_HT.sum(0)


def test_the_choice_is_the_posterior_of_every_possible_user(monkeypatch):
    monkeypatch.setattr(world_reader, "SWEEPS", 150)
    world = World(TINY)
    user, time, _, _ = requests(world, 40, only=None)
    found = HistoryTruth(world, last=100).choice_probabilities(user, time)
    wanted = np.stack([brute_choice(world, *(seen[i] for i in (0, 2, 3))) for u, t in zip(user, time, strict=True)
                       for seen in [seen_by(world, u, t, False, 100)]])
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-5)
    unread = brute_choice(world, np.zeros(0, int), np.zeros(0, int), 0)
    apart = np.abs(found - wanted).sum(1)
    assert apart.mean() < 0.08 * np.abs(wanted - unread).sum(1).mean() and apart.max() < 0.05


def brute_watch(world: World, users: int, rng: np.random.Generator, seen) -> tuple:
    """Draws of level, taste and the sessions' moods from the prior: drives at the request, float (users, N), and the
    log of how probable the views' watch times are, float (users,)."""
    items, watch_s, numbers, own_number = seen
    spec, law = world.spec, world.law
    begin = numbers[0] if len(numbers) else own_number
    mood = np.empty((users, own_number - begin + 1))
    mood[:, 0] = rng.standard_normal(users)
    for step in range(1, mood.shape[1]):
        mood[:, step] = spec.mood_persistence * mood[:, step - 1] + np.sqrt(
            1 - spec.mood_persistence**2) * rng.standard_normal(users)
    lasting = law.quality_spread * world.item_quality + spec.watch_persistence * rng.standard_normal((users, 1))
    lasting = lasting + spec.user_item_affinity * rng.standard_normal((users, 4)) @ world.item_traits.T
    weight = np.zeros(users)
    for item, watch, number in zip(items, watch_s, numbers, strict=True):
        if watch <= 0:
            continue
        truth = WorldTruth(world)
        drive = lasting + spec.mood_scale * mood[:, number - begin, None]
        # Narrow enough to be a density: the law itself, not the reader's own likelihood.
        edges = truth._law_interval(drive, np.full((1, 1), watch * 0.9995), np.full((1, 1), watch * 1.0005))
        weight += np.log(edges[:, item] + 1e-30)
    return lasting + spec.mood_scale * mood[:, -1:], weight


def test_level_taste_and_mood_are_the_posterior_of_many_drawn_users(monkeypatch):
    monkeypatch.setattr(world_reader, "DRIVE_SWEEPS", 250)
    world = World(TINY)
    user, time, _, _ = requests(world, 20, only=None)
    reader, rng = HistoryTruth(world, last=6), np.random.default_rng(1)
    reading = reader._requests(user, time)
    found = (world.law.quality_spread * world.item_quality + reading.mean_QD @ reader._feature_ND.T)
    spread = np.sqrt(np.square(np.einsum("qde,nd->qen", reading.root_QDD, reader._feature_ND)).sum(1))
    wanted, wanted_spread = [], []
    for u, t in zip(user, time, strict=True):
        drive, weight = brute_watch(world, 10_000, rng, seen_by(world, u, t, False, 6))
        chance = np.exp(weight - weight.max())
        chance /= chance.sum()
        wanted.append(chance @ drive)
        wanted_spread.append(np.sqrt(chance @ drive**2 - wanted[-1] ** 2))
    difference = found - np.array(wanted)
    told = np.array(wanted) - world.law.quality_spread * world.item_quality
    assert np.square(difference).mean() < 0.03 * np.square(told).mean()
    assert np.median(spread / np.array(wanted_spread)) == pytest.approx(1.0, abs=0.1)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SMALL)


@pytest.fixture(scope="module")
def scores(world) -> dict[str, list[np.ndarray]]:
    """Of the same requests, without and with the watch time, by how much is known."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(world_reader, "SWEEPS", 30)
    user, time, watch, _ = requests(world, 150)
    truths = {"true": WorldTruth(world), "lasting": WorldTruth(world, state="lasting"),
              "nothing": HistoryTruth(world, last=0), "few": HistoryTruth(world, last=10),
              "log": HistoryTruth(world, last=500), "history": HistoryTruth(world, last=128, target="long_view")}
    found = {name: [truth.posterior_log_scores(user, time, told) for told in (None, watch)]
             for name, truth in truths.items()}
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("told", [0, 1])
def test_who_sees_more_knows_more(world, scores, told):
    item = requests(world, 150)[3]
    loss = {name: log_loss(score[told], item) for name, score in scores.items()}
    assert loss["nothing"] > loss["few"] > loss["log"] > loss["true"]
    assert loss["nothing"] > loss["history"] > loss["log"]


def test_nothing_at_or_after_the_request_is_read(world):
    user, time, _, _ = requests(world, 40)
    for only in (None, "long_view"):
        reader = HistoryTruth(world, last=50, target=only)
        index = np.sort(world.user_indices(user))
        seen = reader._see(index, time[np.argsort(world.user_indices(user), kind="stable")])
        asked = time[np.argsort(world.user_indices(user), kind="stable")][seen.order]
        for row in range(len(asked)):
            views = world.views(index[seen.order[row:row + 1]])
            past = (views.timestamp_ms < asked[row]) & (views.long if only else True)
            mine = seen.row == row
            np.testing.assert_array_equal(seen.item[mine], views.item[past][-50:])
            np.testing.assert_array_equal(seen.watch_s[mine], views.watch_s[past][-50:].astype(np.float64))


def test_a_reading_is_the_same_again(world):
    user, time, _, _ = requests(world, 5)
    first, again = (HistoryTruth(world, last=20, seed=3).choice_probabilities(user, time) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("changes", [
    {"watch_time": "independent"}, {"watch_time": "permuted"}, {"null_watch_share": 1.0}, {"exploration": 1.0,
     "passing_interest": 0.0, "author_loyalty": 0.0}, {"user_item_affinity": 0.0, "watch_persistence": 0.0,
                                                       "mood_scale": 0.0}])
def test_other_worlds_can_be_read(changes, monkeypatch):
    for name, value in {"SWEEPS": 4, "SETTLING": 2, "DRIVE_SWEEPS": 3, "DRIVE_SETTLING": 1}.items():
        monkeypatch.setattr(world_reader, name, value)
    world = World(dataclasses.replace(SMALL, users=40, **changes))
    user, time, watch, item = requests(world, 30)
    for reader in (HistoryTruth(world, last=30), HistoryTruth(world, last=30, target="long_view"),
                   HistoryTruth(world, last=30, target="any", least_s=3.0)):
        plain, told = (reader.posterior_log_scores(user, time, w) for w in (None, watch))
        assert np.isfinite(plain[np.arange(len(item)), item]).all()
        if "watch_time" in changes:
            np.testing.assert_allclose(normalised(told), normalised(plain), atol=1e-5)
