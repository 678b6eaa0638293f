"""The synthetic world: the same data however it is generated, dials that do what they say, and a truth that is true."""

import dataclasses
import hashlib
import json
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from trainer.world import ITEM_SCHEMA, LOG_SCHEMA, World, WorldSpec, read_spec, write_world
from trainer.world_truth import STATES, WorldTruth, condition_bucket_edges

SMALL = WorldSpec(users=200, items=300, tags_count=20, views_per_user=12.0)


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def item_rows(world: World, item_ids: np.ndarray) -> np.ndarray:
    order = np.argsort(world.item_ids)
    return order[np.searchsorted(world.item_ids, item_ids, sorter=order)]


def requests(world: World, count: int, seed: int = 0, only: str | None = None) -> tuple[np.ndarray, ...]:
    """(user_ids, timestamps_ms, watch_time_s, item rows) of sampled logged views."""
    logs = world.logs(0, world.spec.users)
    rows = np.flatnonzero(column(logs, only)) if only else np.arange(logs.num_rows)
    rows = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
    items = item_rows(world, column(logs, "item_id")[rows])
    return tuple(column(logs, name)[rows] for name in ("user_id", "timestamp_ms", "watch_time_s")) + (items,)


def recall(scores: np.ndarray, answers: np.ndarray, k: int) -> float:
    own = scores[np.arange(len(answers)), answers][:, None]
    return float((((scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2) < k).mean())


def digests(folder) -> dict[str, str]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


# -- the data ---------------------------------------------------------------------------------------------------------


def test_tables_have_the_log_format():
    world = World(SMALL)
    logs, items = world.logs(0, SMALL.users), world.items_table()
    assert logs.schema == LOG_SCHEMA and items.schema == ITEM_SCHEMA
    assert items.num_rows == SMALL.items and logs.num_rows > 1500
    watch, duration = column(logs, "watch_time_s"), column(logs, "duration_s")
    assert (watch >= 0).all() and (duration >= 5).all() and (watch <= 3.01 * duration).all()
    np.testing.assert_array_equal(column(logs, "long_view"), watch >= np.minimum(duration, 18))
    np.testing.assert_array_equal(column(logs, "effective_view"), watch >= np.minimum(duration, 7))
    assert not column(logs, "effective_view").all()
    rows = item_rows(world, column(logs, "item_id"))
    np.testing.assert_array_equal(duration, column(items, "duration_s")[rows])
    tags = items["tags"].to_pylist()
    assert all(1 <= len(t) <= 3 and len(set(t)) == len(t) for t in tags) and len({t for row in tags for t in row}) == 20
    content = np.array(items["content_vector"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(content, axis=1), 1.0, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), index=st.integers(0, 2**34))
def test_ids_are_unique_beyond_int32_and_reversible(seed, index):
    world = World(WorldSpec(users=2**35, items=500, tags_count=5, seed=seed))
    users = world.user_ids(index, index + 2000)
    assert len(np.unique(users)) == 2000 and users.min() > 2**31 and users.max() < 2**53
    np.testing.assert_array_equal(world.user_indices(users), np.arange(index, index + 2000))
    assert len(np.unique(world.item_ids)) == 500 and world.item_ids.min() > 2**31
    assert len(np.unique(np.diff(world.item_ids))) > 490  # nothing like 0..n-1


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    watch_time=st.sampled_from(["natural", "independent", "permuted"]),
)
def test_any_split_of_the_users_gives_the_same_rows(seed, cuts, watch_time):
    world = World(dataclasses.replace(SMALL, users=60, seed=seed, watch_time=watch_time, null_watch_share=0.1))
    borders = sorted({0, 60, *cuts})
    parts = [World(world.spec).logs(a, b) for a, b in zip(borders, borders[1:], strict=False)]
    assert pa.concat_tables(parts).equals(world.logs(0, 60))
    assert world.user_logs(17).equals(world.logs(17, 18))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 100), days=st.integers(1, 20), views=st.floats(1, 3000), session=st.floats(1, 50),
    spread=st.floats(0, 2),
)
def test_times_rise_inside_the_period_and_sessions_stand_apart(seed, days, views, session, spread):
    spec = WorldSpec(users=4, items=50, tags_count=5, days=days, views_per_user=views, session_views=session,
                     views_spread=spread, seed=seed)
    world = World(spec)
    for user in range(spec.users):
        logs = world.user_logs(user)
        time, session_id = column(logs, "timestamp_ms"), column(logs, "session_id")
        assert (np.diff(time) > 0).all()
        assert spec.start_ms <= time[0] and time[-1] < spec.start_ms + days * 86_400_000
        changes = np.flatnonzero(np.diff(session_id)) + 1
        assert len(np.unique(session_id)) == len(changes) + 1  # a session is one stretch
        if len(changes) < 5:
            assert (time[changes] - time[changes - 1] >= 30 * 60_000).all()


def test_histories_are_skewed_and_their_length_is_a_dial():
    mean = {}
    for views in (5.0, 50.0):
        world = World(WorldSpec(users=4000, items=50, tags_count=5, views_per_user=views))
        count = world.users(np.arange(4000)).view_count
        mean[views] = count.mean()
        assert count.min() >= 1 and np.percentile(count, 90) > 1.5 * count.mean()
    assert mean[50.0] == pytest.approx(50, rel=0.08) and mean[5.0] == pytest.approx(5, rel=0.1)


def test_marginals_stay_near_the_real_log():
    """A loose guard on the calibration; benchmarks/world_calibration.py has the table."""
    logs = World(WorldSpec(users=4000, items=3000)).logs(0, 4000)
    watch, duration = column(logs, "watch_time_s"), column(logs, "duration_s")
    assert np.median(watch) == pytest.approx(4.6, rel=0.15)
    assert np.percentile(watch, 90) == pytest.approx(62, rel=0.15)
    np.testing.assert_allclose(np.percentile(duration, [10, 50, 90]), [13, 72, 260], rtol=0.15)
    assert (watch >= 3).mean() == pytest.approx(0.58, rel=0.1)
    counts = np.sort(np.unique(column(logs, "item_id"), return_counts=True)[1])[::-1]
    assert counts[: len(counts) // 10].sum() / counts.sum() == pytest.approx(0.59, rel=0.15)


# -- the dials --------------------------------------------------------------------------------------------------------


def affinity_correlation(affinity: float) -> float:
    """Correlation of log watch time with the view's true user-item pairing, with item means taken out."""
    world = World(WorldSpec(users=1500, items=200, tags_count=10, user_item_affinity=affinity))
    views = world.views(np.arange(1500))
    pairing = (views.users.taste[views.user] * world.item_traits[views.item]).sum(1)
    log_watch = np.log(np.maximum(views.watch_s, 0.1))
    means = np.bincount(views.item, log_watch, 200) / np.maximum(np.bincount(views.item, minlength=200), 1)
    return float(np.corrcoef(pairing, log_watch - means[views.item])[0, 1])


def test_affinity_dial():
    assert abs(affinity_correlation(0.0)) < 0.02  # 60,000 views: standard error 0.004
    assert affinity_correlation(0.4) > 0.05
    assert affinity_correlation(1.2) > affinity_correlation(0.4) + 0.05


def test_without_affinity_users_differ_by_a_level_alone():
    """At 0 the pairing is out of the law: users of one level and mood have the same watch times for every item."""
    spec = dataclasses.replace(SMALL, user_item_affinity=0.0, watch_persistence=0.0, mood_scale=0.0)
    user, time, _, _ = requests(World(spec), 20)
    expected = WorldTruth(World(spec)).expected_watch_s(user, time)
    np.testing.assert_allclose(expected, np.broadcast_to(expected[:1], expected.shape), rtol=1e-6)
    spec = dataclasses.replace(spec, user_item_affinity=1.0)
    expected = WorldTruth(World(spec)).expected_watch_s(user, time)
    assert np.corrcoef(expected[0], expected[1])[0, 1] < 0.99


def test_persistence_dial():
    """How well half of a user's views predict the mean of the other half."""
    def halves(persistence: float) -> float:
        world = World(WorldSpec(users=1500, items=200, tags_count=10, watch_persistence=persistence, mood_scale=0.0,
                                user_item_affinity=0.0))
        views = world.views(np.arange(1500))
        log_watch, odd = np.log(np.maximum(views.watch_s, 0.1)), np.arange(len(views.user)) % 2
        sums = np.stack([np.bincount(views.user, log_watch * (odd == h), 1500) for h in (0, 1)])
        counts = np.stack([np.bincount(views.user, odd == h, 1500) for h in (0, 1)])
        enough = (counts >= 10).all(0)
        means = sums[:, enough] / counts[:, enough]
        return float(np.corrcoef(means)[0, 1])

    assert abs(halves(0.0)) < 0.15  # what is left comes from the items that a user is interested in
    assert halves(0.8) > 0.4


def test_mood_and_passing_interest_last_from_session_to_session():
    for persistence in (0.0, 0.8):
        world = World(WorldSpec(users=800, items=50, tags_count=5, mood_persistence=persistence, interest_drift=0.2))
        sessions = world.sessions(world.users(np.arange(800)))
        follows = np.flatnonzero(sessions.number > 0)
        before, after = sessions.mood[follows - 1], sessions.mood[follows]
        assert np.corrcoef(before, after)[0, 1] == pytest.approx(persistence, abs=0.06)
        assert sessions.mood.std() == pytest.approx(1.0, abs=0.05)
        kept = (sessions.passing[follows - 1] == sessions.passing[follows]).mean()
        assert 0.8 < kept < 0.9  # 0.8, and chance where a new one is drawn


def test_null_watch_share():
    logs = World(dataclasses.replace(SMALL, users=2000, null_watch_share=0.25)).logs(0, 2000)
    assert logs["watch_time_s"].null_count / logs.num_rows == pytest.approx(0.25, abs=0.02)
    assert logs["long_view"].null_count == 0
    whole = World(dataclasses.replace(SMALL, users=2000)).logs(0, 2000)
    assert logs.drop_columns(["watch_time_s"]).equals(whole.drop_columns(["watch_time_s"]))


# -- null worlds ------------------------------------------------------------------------------------------------------


def item_share(world: World) -> float:
    """Correlation of log watch times of even and odd views over items, among long views."""
    views = world.views(np.arange(world.spec.users))
    rows = np.flatnonzero(views.long)
    log_watch, item, odd = np.log(views.watch_s[rows]), views.item[rows], rows % 2
    count = np.stack([np.bincount(item, odd == h, world.spec.items) for h in (0, 1)])
    total = np.stack([np.bincount(item, log_watch * (odd == h), world.spec.items) for h in (0, 1)])
    enough = (count >= 5).all(0)
    return float(np.corrcoef(total[:, enough] / count[:, enough])[0, 1])


def test_null_worlds_hide_the_item_in_watch_time_and_flags():
    spec = WorldSpec(users=1500, items=400, tags_count=20, watch_persistence=0.6)
    natural = World(spec)
    assert item_share(natural) > 0.8
    for kind in ("independent", "permuted"):
        world = World(dataclasses.replace(spec, watch_time=kind))
        assert abs(item_share(world)) < 0.2  # about 350 items: standard error 0.05
        mine, theirs = world.views(np.arange(1500)), natural.views(np.arange(1500))
        np.testing.assert_array_equal(mine.item, theirs.item)  # the choice is the same
        assert np.median(mine.watch_s) == pytest.approx(np.median(theirs.watch_s), rel=0.15)
        level = mine.users.level[mine.user]
        follows_user = np.corrcoef(level, np.log(np.maximum(mine.watch_s, 0.1)))[0, 1]
        assert (follows_user > 0.1) if kind == "independent" else (abs(follows_user) < 0.02)


@pytest.mark.parametrize("kind", ["independent", "permuted"])
@pytest.mark.parametrize("state", STATES)
def test_null_worlds_have_nothing_to_condition_on(kind, state):
    world = World(dataclasses.replace(SMALL, watch_time=kind))
    truth = WorldTruth(world, state=state)
    user, time, watch, _ = requests(world, 30, only="long_view")
    plain, conditioned = (truth.posterior_log_scores(user, time, w) for w in (None, watch))
    np.testing.assert_allclose(plain - plain[:, :1], conditioned - conditioned[:, :1], atol=1e-4)
    choice = np.log(truth.choice_probabilities(user, time))
    np.testing.assert_allclose(plain - plain[:, :1], choice - choice[:, :1], atol=1e-4)
    assert np.ptp(truth.expected_watch_s(user, time), axis=1).max() == 0


# -- the truth --------------------------------------------------------------------------------------------------------


def test_choice_matches_repeated_draws():
    """p(i | u, s) sums to 1 and is the law that `_choose` draws from, chi-square over items of a fixed session."""
    world = World(SMALL)
    users = world.users(np.arange(3))
    sessions = world.sessions(users)
    truth = WorldTruth(world)
    logs = world.logs(0, 3)
    first = np.flatnonzero(np.r_[True, np.diff(column(logs, "user_id")) != 0])
    probability = truth.choice_probabilities(column(logs, "user_id")[first], column(logs, "timestamp_ms")[first])
    np.testing.assert_allclose(probability.sum(1), 1.0, atol=1e-5)
    draws = 60_000
    for user in range(3):
        session = np.flatnonzero(sessions.user == user)[0]
        at = np.arange(10**6, 10**6 + draws)  # views that no log holds: fresh numbers of the same stream
        items = world._choose(users, sessions, np.full(draws, user), np.full(draws, session), at)
        wanted = probability[user].astype(np.float64) * draws
        seen = np.bincount(items, minlength=SMALL.items)
        often = wanted >= 5
        chi_square = ((seen - wanted)[often] ** 2 / wanted[often]).sum()
        freedom = often.sum()
        assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
        assert seen[probability[user] == 0].sum() == 0


@pytest.mark.parametrize("spec", [
    SMALL, dataclasses.replace(SMALL, watch_time="independent"), dataclasses.replace(SMALL, watch_time="permuted"),
])
def test_watch_law_matches_monte_carlo(spec):
    """Expected watch times and bucket probabilities of some pairs against draws of the generator itself."""
    world = World(spec)
    truth = WorldTruth(world)
    users, draws = world.users(np.arange(2)), 40_000
    sessions = world.sessions(users)
    logs = world.logs(0, 2)
    first = np.flatnonzero(np.r_[True, np.diff(column(logs, "user_id")) != 0])
    who, when = column(logs, "user_id")[first], column(logs, "timestamp_ms")[first]
    expected = truth.expected_watch_s(who, when)
    edges = [0.0, 2.0, 7.0, 18.0, 40.0, 90.0, np.inf]
    pairs = list(zip(edges, edges[1:], strict=False))
    buckets = np.stack([truth.watch_probabilities(who, when, a, b) for a, b in pairs], -1)
    np.testing.assert_allclose(buckets.sum(-1), 1.0, atol=1e-5)
    long = truth.watch_probabilities(who, when, 0.0, np.inf, target="long_view")
    by_length = np.argsort(world.item_duration_s)
    for user in range(2):
        session = np.flatnonzero(sessions.user == user)[0]
        for item in by_length[[2, 150, 297]]:
            at = np.arange(10**6, 10**6 + draws)
            watch, _, watched = world._watch(
                users, sessions, np.full(draws, user), np.full(draws, session), at, np.full(draws, item)
            )
            error = watch.std() / np.sqrt(draws)
            assert abs(watch.mean() - expected[user, item]) < 5 * error
            seen = np.histogram(watch, [*edges[:-1], 1e9])[0] / draws
            np.testing.assert_allclose(seen, buckets[user, item], atol=0.0125)  # 5 standard errors of a half
            is_long = watch >= np.minimum(world.item_duration_s[watched], 18)
            assert is_long.mean() == pytest.approx(long[user, item], abs=0.0125)


@pytest.mark.parametrize("state", STATES)
def test_knowing_the_watch_time_beats_not_knowing_it(state):
    world = World(WorldSpec(users=600, items=600, tags_count=40))
    truth = WorldTruth(world, state=state)
    user, time, watch, item = requests(world, 400, only="long_view")
    plain = truth.posterior_log_scores(user, time)
    told = truth.posterior_log_scores(user, time, watch)
    exact = truth.posterior_log_scores(user, time, watch, buckets=None)
    assert np.isfinite(told[np.arange(len(item)), item]).all() and np.isfinite(exact[np.arange(len(item)), item]).all()
    assert recall(told, item, 20) > recall(plain, item, 20) + 0.08
    assert recall(plain, item, 20) > recall(np.tile(world.popularity, (len(item), 1)), item, 20) + 0.05
    unknown = truth.posterior_log_scores(user, time, np.full(len(user), np.nan, np.float32))
    np.testing.assert_array_equal(unknown, plain)


def test_every_logged_view_is_possible():
    """The answer never has probability 0, for any target and watch time; what contradicts the target has."""
    world = World(dataclasses.replace(SMALL, null_watch_share=0.0))
    truth = WorldTruth(world)
    for target in ("long_view", "effective_view", "any"):
        user, time, watch, item = requests(world, 1000, only=None if target == "any" else target)
        for buckets in (100, None):
            scores = truth.posterior_log_scores(user, time, watch, target, buckets=buckets)
            assert np.isfinite(scores[np.arange(len(item)), item]).all()
    user, time, *_ = requests(world, 1)
    scores = truth.posterior_log_scores(user, time, np.array([8.0]), "long_view")[0]
    assert np.isneginf(scores[world.item_duration_s > 9]).all() and np.isfinite(scores[world.item_duration_s < 7]).all()


def test_true_state_beats_lasting_state():
    world = World(WorldSpec(users=600, items=600, tags_count=40, passing_interest=0.4))
    user, time, watch, item = requests(world, 300, only="long_view")
    scores = {s: WorldTruth(world, state=s).posterior_log_scores(user, time, watch) for s in STATES}
    assert recall(scores["true"], item, 20) > recall(scores["lasting"], item, 20)


def test_request_times_between_views_take_the_session_before():
    world = World(SMALL)
    logs = world.user_logs(5)
    user, time = column(logs, "user_id"), column(logs, "timestamp_ms")
    truth = WorldTruth(world)
    at_views = truth.choice_probabilities(user, time)
    np.testing.assert_array_equal(truth.choice_probabilities(user, time + 1), at_views)
    outside = truth.choice_probabilities(user[:2], np.array([0, 2**60]))
    np.testing.assert_array_equal(outside, at_views[[0, -1]])
    with pytest.raises(InputError, match="not of this world"):
        truth.choice_probabilities(np.array([12345]), time[:1])


def test_condition_buckets_hold_their_watch_time():
    watch = np.array([0.0, 0.05, 4.6, 18.0, 62.0, 2999.0, 3000.0, 9000.0])
    low, high = condition_bucket_edges(watch)
    assert (low <= watch + 1e-9).all() and (watch < high).all() and np.isinf(high[-1])
    width = np.log1p(3000) / 100
    np.testing.assert_array_equal(np.floor(np.log1p((low + np.minimum(high, 1e4)) / 2)[:5] / width),
                                  np.floor(np.log1p(watch[:5]) / width))


# -- writing ----------------------------------------------------------------------------------------------------------


def test_written_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    seen = []
    one = write_world(tmp_path / "one", SMALL, processes=1, rows_per_file=900, progress=lambda *at: seen.append(at))
    two = write_world(tmp_path / "two", SMALL, processes=2, rows_per_file=900)
    assert one.files == two.files == 3 and one.rows == two.rows and one.written and two.written
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert seen[-1] == (200, 200)
    assert pq.read_table(tmp_path / "one" / "logs").equals(World(SMALL).logs(0, 200))
    assert pq.read_table(tmp_path / "one" / "items.parquet").equals(World(SMALL).items_table())
    assert read_spec(tmp_path / "one") == SMALL
    described = json.loads((tmp_path / "one" / "world.json").read_text())
    assert set(described) == {"version", "spec", "rows", "files", "sha256"}


def test_the_same_world_again_does_nothing_and_another_is_refused(tmp_path):
    first = write_world(tmp_path / "world", SMALL, processes=1)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "world").rglob("*")}
    again = write_world(tmp_path / "world", SMALL, processes=1)
    assert again == dataclasses.replace(first, written=False)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "world").rglob("*")}
    with pytest.raises(InputError, match=r"world holds another world \(it differs in seed\)"):
        write_world(tmp_path / "world", dataclasses.replace(SMALL, seed=9), processes=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="taken holds no synthetic world"):
        write_world(tmp_path / "taken", SMALL, processes=1)
    (tmp_path / "empty").mkdir()
    assert write_world(tmp_path / "empty", SMALL, processes=1).written


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stop(done: int, total: int) -> None:
        assert not (tmp_path / "world").exists()  # nothing is visible before the end
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "world", SMALL, processes=1, rows_per_file=900, progress=stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_world(tmp_path / "file" / "world", SMALL, processes=1)


def test_two_writers_of_one_world_agree(tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(write_world(tmp_path / "world", SMALL, processes=1)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and sum(r.written for r in results) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize(("field", "value"), [
    ("users", 0), ("users", 1.5), ("users", True), ("items", -3), ("days", 0), ("seed", -1), ("tags_count", 6000),
    ("authors", 0), ("authors", 9999), ("views_per_user", 0.5), ("views_per_user", float("nan")),
    ("user_item_affinity", -0.1), ("watch_persistence", "much"), ("mood_persistence", 1.0), ("exploration", 1.2),
    ("null_watch_share", 2), ("watch_time", "shuffled"), ("content_dim", 0), ("passing_interest", 0.95),
])
def test_an_impossible_spec_names_its_field(field, value):
    with pytest.raises(InputError, match=field):
        WorldSpec(**{field: value})
