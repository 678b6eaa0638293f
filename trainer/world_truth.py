"""What the synthetic world knows and its logs do not say: the ceilings that evaluation holds a tower against.

    p(i | u, s, target, w in bucket)  proportional to  p(i | u, s) P(target and w in bucket | u, s, i)

p(i | u, s) is the choice, the probability after it the watch-time law (both in `trainer/world.py`); ranking by the
product is the best any tower can do that knows the user's state. Both factors are closed forms, with no sampling.

Evaluation only: nothing that is trained, published or served may import this file.

Which state: `true` is the state that the view was drawn from, without the view's own noise: lasting interests, taste
and level, and the session's passing interest and mood. A tower can only guess the session's part, and the lasting
part, from the history, so this ceiling cannot quite be reached. `lasting` knows the lasting part and averages over
sessions: a lower mark, which a tower that reads the session well can pass.

Shape suffixes: Q = requests, N = items in the order of `World.items_table`, T = tags, U = users of the requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from configs.errors import InputError
from trainer.world import EFFECTIVE_VIEW_S, LONG_VIEW_S, UserState, World

TARGETS = ("long_view", "effective_view", "any")
STATES = ("true", "lasting")
CONDITION_BUCKETS = 100  # CRM's condition buckets: log-spaced by log1p, to CONDITION_MAX_S
CONDITION_MAX_S = 3000.0

_ELEMENTS_AT_ONCE = 1_000_000  # requests x items of a chunk: temporaries of 8 MB each


def condition_bucket_edges(watch_s: np.ndarray, buckets: int = CONDITION_BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge, seconds, of the condition bucket floor(log1p(w) / log1p(3000) * buckets) of each w."""
    width = math.log1p(CONDITION_MAX_S) / buckets
    bucket = np.clip(np.floor(np.log1p(np.asarray(watch_s, np.float64)) / width), 0, buckets - 1)
    upper = np.where(bucket == buckets - 1, np.inf, np.expm1((bucket + 1) * width))
    return np.expm1(bucket * width), upper


class _Requests(NamedTuple):
    """Hidden state of requests."""

    users: UserState  # of the requests' distinct users
    user: np.ndarray  # int64 (Q,), row of `users`
    mood: np.ndarray  # float (Q,)
    passing: np.ndarray  # int64 (Q,)


class WorldTruth:
    """Closed-form probabilities of a world.

    A request is a user and a time. Its session is that of the user's last view at or before the time (the first
    session, before any view), so the timestamp of a logged view gives the state that view was drawn from.

    Args:
        world: the world.
        state: `true` or `lasting`, see the module.

    All methods raise InputError for a user who is not of the world.
    """

    def __init__(self, world: World, *, state: str = "true"):
        if state not in STATES:
            raise InputError(f"state is {state!r}: it must be one of {', '.join(STATES)}.")
        self.world = world
        self.state = state
        # Abscissas and weights for averages over a standard normal.
        points, weights = np.polynomial.hermite_e.hermegauss(7)
        self._normal_points, self._normal_weights = points, weights / weights.sum()

    # -- what callers ask ---------------------------------------------------------------------------------------------

    def choice_probabilities(self, user_ids: np.ndarray, timestamps_ms: np.ndarray) -> np.ndarray:
        """p(i | u, s) of requests: float32 (Q, N), rows sum to 1."""
        requests = self._requests(user_ids, timestamps_ms)
        return self._by_chunks(requests, lambda rows: self._choice(requests, rows))

    def watch_probabilities(self, user_ids: np.ndarray, timestamps_ms: np.ndarray, low_s: np.ndarray,
                            high_s: np.ndarray, *, target: str = "any") -> np.ndarray:
        """P(low <= w < high and target | u, s, i): float32 (Q, N).

        Args:
            user_ids: int64 (Q,).
            timestamps_ms: int64 (Q,).
            low_s: float (Q,) or scalar, seconds; 0 takes in views that were skipped at once.
            high_s: float (Q,) or scalar, seconds, may be inf.
            target: `long_view`, `effective_view`, or `any`.
        """
        requests = self._requests(user_ids, timestamps_ms)
        low = np.broadcast_to(np.asarray(low_s, np.float64), len(requests.user))
        high = np.broadcast_to(np.asarray(high_s, np.float64), len(requests.user))
        return self._by_chunks(requests, lambda rows: self._watch(requests, rows, low[rows], high[rows], target))

    def posterior_log_scores(self, user_ids: np.ndarray, timestamps_ms: np.ndarray,
                             watch_time_s: np.ndarray | None = None, target: str = "long_view", *,
                             buckets: int | None = CONDITION_BUCKETS) -> np.ndarray:
        """log p(i | u, s, target[, w]) up to a constant for each request: ranking by it is a tower's ceiling.

        Args:
            user_ids: int64 (Q,).
            timestamps_ms: int64 (Q,), of the view that is to be found.
            watch_time_s: float (Q,), its watch time; NaN is unknown. None gives the ceiling without a condition.
            target: the event that the view is known to be: `long_view`, `effective_view` or `any`.
            buckets: how finely w is told: in the condition buckets that towers see, or, for None, within 0.5%.

        Returns:
            float32 (Q, N); -inf where the item cannot be the answer (a long video after a short long view).
        """
        requests = self._requests(user_ids, timestamps_ms)
        low, high = np.zeros(len(requests.user)), np.full(len(requests.user), np.inf)
        if watch_time_s is not None:
            watch = np.asarray(watch_time_s, np.float64)
            if watch.shape != low.shape:
                raise InputError(f"watch_time_s has shape {watch.shape}, for {len(low)} requests.")
            known = ~np.isnan(watch)
            if buckets is None:
                low[known], high[known] = watch[known] * 0.995, np.maximum(watch[known] * 1.005, 1e-3)
            else:
                low[known], high[known] = condition_bucket_edges(watch[known], buckets)

        def scores(rows: slice) -> np.ndarray:
            seen = self._watch(requests, rows, low[rows], high[rows], target)
            with np.errstate(divide="ignore"):
                return np.log(self._choice(requests, rows)) + np.log(seen)

        return self._by_chunks(requests, scores)

    def expected_watch_s(self, user_ids: np.ndarray, timestamps_ms: np.ndarray) -> np.ndarray:
        """Expected watch time, seconds, if the user were shown each item at the request: float32 (Q, N)."""
        requests = self._requests(user_ids, timestamps_ms)
        return self._by_chunks(
            requests, lambda rows: self._over_watch_law(requests, rows, lambda drive, _: self._law_mean(drive))
        )

    # -- state --------------------------------------------------------------------------------------------------------

    def _requests(self, user_ids: np.ndarray, timestamps_ms: np.ndarray) -> _Requests:
        user_ids, timestamps_ms = np.asarray(user_ids, np.int64), np.asarray(timestamps_ms, np.int64)
        if user_ids.ndim != 1 or user_ids.shape != timestamps_ms.shape:
            raise InputError(
                f"user_ids and timestamps_ms have shapes {user_ids.shape} and {timestamps_ms.shape}: "
                "both must be (requests,)."
            )
        world = self.world
        index, user = np.unique(world.user_indices(user_ids), return_inverse=True)
        mood, passing = np.zeros(len(user)), np.zeros(len(user), np.int64)
        by_user = np.argsort(user, kind="stable")
        for begin in range(0, len(index), world.users_at_once):  # a chunk of users' views at once, not all
            end = min(begin + world.users_at_once, len(index))
            rows = by_user[np.searchsorted(user, begin, sorter=by_user) : np.searchsorted(user, end, sorter=by_user)]
            views = world.views(index[begin:end])
            # Times within the period, a band for each user: one sorted array to search all requests in.
            band = world.spec.days * 86_400_000 + 1
            since = np.clip(timestamps_ms[rows] - world.spec.start_ms, -1, band - 2) + 1
            clock = (views.timestamp_ms - world.spec.start_ms + 1) + views.user * band
            place = np.searchsorted(clock, since + (user[rows] - begin) * band, side="right") - 1
            first = np.searchsorted(views.user, user[rows] - begin)
            session = views.session[np.maximum(place, first)]
            mood[rows], passing[rows] = views.sessions.mood[session], views.sessions.passing[session]
        return _Requests(world.users(index), user, mood, passing)

    def _by_chunks(self, requests: _Requests, compute) -> np.ndarray:
        count = len(requests.user)
        result = np.empty((count, self.world.spec.items), np.float32)
        step = max(1, _ELEMENTS_AT_ONCE // self.world.spec.items)
        for begin in range(0, count, step):
            rows = slice(begin, min(begin + step, count))
            result[rows] = compute(rows)
        return result

    # -- the choice ---------------------------------------------------------------------------------------------------

    def _choice(self, requests: _Requests, rows: slice) -> np.ndarray:
        """p(i | u, s), float64 (rows, N)."""
        world, spec, users = self.world, self.world.spec, requests.users
        user = requests.user[rows]
        line = np.arange(len(user))
        tag_QT = np.zeros((len(user), spec.tags_count))
        for place, weight in enumerate(world.interest_weight):
            tag_QT[line, users.interest[user, place]] += spec.lasting_interest * weight
        if self.state == "true":
            tag_QT[line, requests.passing[rows]] += spec.passing_interest
        else:
            tag_QT += spec.passing_interest * world.tag_interest
        choice = np.tile(spec.exploration * world.popularity, (len(user), 1))
        for slot in range(world.item_tags.shape[1]):
            choice += tag_QT[:, world.item_tags[:, slot]] * world.item_share_of_tag[:, slot]
        favourites = users.favourite.shape[1]
        for place in range(favourites):
            is_theirs = users.favourite[user, place, None] == world.item_author
            choice += spec.author_loyalty / favourites * is_theirs * world.item_share_of_author
        return choice

    # -- the watch time -----------------------------------------------------------------------------------------------

    def _watch(self, requests: _Requests, rows: slice, low: np.ndarray, high: np.ndarray, target: str) -> np.ndarray:
        """P(low <= w < high and target | u, s, i), float64 (rows, N) or (rows, 1) where no item differs."""
        if target not in TARGETS:
            raise InputError(f"target is {target!r}: it must be one of {', '.join(TARGETS)}.")
        threshold = {"long_view": LONG_VIEW_S, "effective_view": EFFECTIVE_VIEW_S, "any": 0.0}[target]
        if target == "any" and not low.any() and np.isinf(high).all():
            return np.ones((len(low), 1))  # every view; spares the law
        floor = np.minimum(self.world.item_duration_s.astype(np.float64), threshold)
        return self._over_watch_law(
            requests, rows,
            lambda drive, chunk: self._law_interval(drive, np.maximum(low[chunk, None], floor), high[chunk, None]),
        )

    def _over_watch_law(self, requests: _Requests, rows: slice, of_drive) -> np.ndarray:
        """Average of of_drive(drive (rows, N), rows within the chunk) over what the state leaves open.

        In a null world the watch time comes from an item drawn by popularity, so every item has the same value.
        """
        world, spec, count = self.world, self.world.spec, len(requests.user[rows])
        everyone = slice(0, count)
        if spec.watch_time == "permuted":
            spread = math.sqrt(spec.watch_persistence**2 + spec.mood_scale**2 + spec.user_item_affinity**2)
            quality = world.law.quality_spread * world.item_quality
            drives = ((weight, quality + spread * at) for at, weight in self._nodes())
            average = sum(weight * of_drive(np.tile(drive, (count, 1)), everyone) for weight, drive in drives)
            return (average @ world.popularity)[:, None]
        fixed = self._lasting_drive(requests, rows)
        if self.state == "true":
            value = of_drive(fixed + spec.mood_scale * requests.mood[rows, None], everyone)
        else:
            value = sum(weight * of_drive(fixed + spec.mood_scale * at, everyone) for at, weight in self._nodes())
        return (value @ world.popularity)[:, None] if spec.watch_time == "independent" else value

    def _nodes(self) -> Iterator[tuple[float, float]]:
        return zip(self._normal_points, self._normal_weights, strict=True)

    def _lasting_drive(self, requests: _Requests, rows: slice) -> np.ndarray:
        """The drive without the mood, log seconds, float64 (rows, N)."""
        world, spec, users = self.world, self.world.spec, requests.users
        user = requests.user[rows]
        drive = spec.user_item_affinity * (users.taste[user] @ world.item_traits.T)
        drive += spec.watch_persistence * users.level[user, None]
        drive += world.law.quality_spread * world.item_quality
        return drive

    def _components(self, drive: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """(share, mean of log x, standard deviation of log x) of abandoned and engaged views."""
        law = self.world.law
        engaged = (1.0 - law.skipped) / (1.0 + np.exp(-(law.engaged_offset + law.engaged_slope * drive)))
        mean = law.engaged_mean + law.engaged_by_duration * self.world.item_log_duration + drive
        return [
            (1.0 - law.skipped - engaged, np.full((1, 1), law.abandoned_mean), law.abandoned_spread),
            (engaged, mean, law.engaged_spread),
        ]

    def _law_interval(self, drive: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """P(low <= w < high) at each drive, float64 (rows, N); low and high broadcast, seconds."""
        begin, end = self._log_x(low), self._log_x(high)
        total = np.where(low <= 0.0, self.world.law.skipped, 0.0) * (high > 0.0)
        for share, mean, spread in self._components(drive):
            total = total + share * _normal_interval((begin - mean) / spread, (end - mean) / spread)
        return np.where(high > low, total, 0.0)

    def _log_x(self, watch_s: np.ndarray) -> np.ndarray:
        """The log x at which a view of each item reaches a watch time: P(w < watch) = P(log x < this)."""
        law, log_d = self.world.law, self.world.item_log_duration
        with np.errstate(divide="ignore"):
            over = np.log(np.maximum(watch_s, 0.0)) - log_d
        # A hair of tolerance: durations are float32, and the whole video must count as reached.
        beyond = np.where(over <= 0.0, over, over / law.replay_slope)
        return log_d + np.where(over > law.replay_cap + 1e-9, np.inf, beyond)

    def _law_mean(self, drive: np.ndarray) -> np.ndarray:
        """E[w], seconds, at each drive, float64 (rows, N): three pieces of each lognormal."""
        law, log_d = self.world.law, self.world.item_log_duration
        kappa, last = law.replay_slope, log_d + law.replay_cap / law.replay_slope
        total = np.zeros(drive.shape)
        for share, mean, spread in self._components(drive):
            variance = spread**2
            within = np.exp(mean + variance / 2.0) * _normal_below((log_d - mean - variance) / spread)
            replay = np.exp(log_d * (1.0 - kappa) + kappa * mean + kappa**2 * variance / 2.0) * _normal_interval(
                (log_d - mean - kappa * variance) / spread, (last - mean - kappa * variance) / spread
            )
            capped = np.exp(log_d + law.replay_cap) * _normal_below((mean - last) / spread)
            total += share * (within + replay + capped)
        return total


def _normal_below(x: np.ndarray) -> np.ndarray:
    """P(standard normal < x), to a relative error of 1.2e-7 in both tails (numpy has no erfc).

    Numerical Recipes, 2nd ed., section 6.2, `erfcc`.
    """
    z = np.abs(x) * math.sqrt(0.5)
    t = 1.0 / (1.0 + 0.5 * z)
    series = np.full_like(t, 0.17087277)
    for coefficient in (-0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196,
                        1.00002368, -1.26551223):
        series *= t
        series += coefficient
    with np.errstate(under="ignore"):
        upper_tail = 0.5 * t * np.exp(series - z * z)
    return np.where(x >= 0.0, 1.0 - upper_tail, upper_tail)


def _normal_interval(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """P(begin < standard normal < end). Mirrored into the lower tail where it lies above 0, to lose no digits there."""
    begin, end = np.broadcast_arrays(begin, end)
    mirror = begin > 0.0
    low, high = np.where(mirror, -end, begin), np.where(mirror, -begin, end)
    return np.maximum(_normal_below(high) - _normal_below(low), 0.0)
