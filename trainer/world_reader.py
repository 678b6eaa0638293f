"""What can be told of the synthetic world's users from their logs: the ceiling for those who must read the user.

`WorldTruth` knows the user. A tower does not, and nobody who has only the log can: interests, tastes and moods have to
be read from what was viewed, and how long. `HistoryTruth` reads them as well as they can be read: it knows the world
(items, tags and authors, how often each kind of interest occurs, the watch-time law), never a user, and averages

    p(i | history, target[, w])  proportional to  E[ p(i | u, s) P(target and w in bucket | u, s, i) ]

over the users who could have left the history. No tower that is given the same history can do better on average,
however it is trained.

How the posterior is found. Where every view is seen, the choice and the watch times say separate things:

    choice   lasting interests tau (5 tags), favourite authors alpha (3), a passing interest sigma_s for each session:
             Gibbs sampling, one of them at a time given the others; the sigma of a history at once, forward filter
             and backward sample. What view came from which part of the mixture is summed out.
    watch    level, taste and the sessions' moods: elliptical slice sampling of level and taste around a Laplace
             approximation, moods on a grid, forward and backward as above

Averages are of conditional probabilities, not of draws, where there is a closed form; taste, level and mood enter
the ceiling as the normal distribution with the mean and covariance of the draws. Both are exact in the limit of many
sweeps but for that and for the grid of moods.

Where only target views are seen (a tower's history), how often a user reaches the target depends on both, so

    p(i, w | target, u, s) = p(i | u, s) p(w and target | u, s, i) / P(target | u, s)

and the denominator is taken with the other side's estimate: of the choice for the watch times, then the reverse.

Sessions are told: those of the views, and the request's own, as the log's `session_id` tells them.

Evaluation only, like `trainer/world_truth.py`: `trainer/ceiling.py` alone may import this file.

Shape suffixes: Q = requests, V = views seen by them, S = their sessions, N = items, T = tags, A = authors, K = states
of a session, D = level, taste and mood, E = level and taste.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from trainer.world import EFFECTIVE_VIEW_S, LONG_VIEW_S, World
from trainer.world_truth import WorldTruth, _normal_below, _normal_interval

SWEEPS, SETTLING = 60, 15
"""Rounds of Gibbs sampling, and how many of them are not counted."""
DRIVE_SWEEPS, DRIVE_SETTLING = 40, 8
"""The same for level, taste and moods, which begin at a Laplace approximation."""

_REQUESTS_AT_ONCE = 500  # and no more views of each than `last`: 500 x 512 rows of a dozen columns
_ITEMS_OF_MEAN = 100  # over which P(target) of a user is averaged
_MOODS = np.linspace(-2.4, 2.4, 7)
_LITTLE = np.float32(1e-12)  # of a probability; keeps a ratio finite where rounding leaves nothing


class _Seen(NamedTuple):
    """What the logs say before requests.

    Requests are sorted by the number of their sessions, most first, and sessions by their place in the request's
    chain, so that the k-th sessions of all requests that have one lie together, in the order of requests.
    """

    order: np.ndarray  # int64 (Q,), which request each row is
    row: np.ndarray  # int64 (V,), rising
    session: np.ndarray  # int64 (V,), 0..S-1
    item: np.ndarray  # int64 (V,)
    watch_s: np.ndarray  # float64 (V,), NaN where the log does not know it
    effective: np.ndarray  # bool (V,)
    long: np.ndarray  # bool (V,)
    chains: np.ndarray  # int64 (longest chain,), how many requests have a k-th session
    own_session: np.ndarray  # int64 (Q,), the session of the request itself
    row_of_session: np.ndarray  # int64 (S,)


class _Reading(NamedTuple):
    """The posterior of requests' users."""

    user: np.ndarray  # int64 (Q,)
    tag_QT: np.ndarray  # float32, expected share of the feed that is drawn from each tag
    author_QA: np.ndarray  # float32, and from each author
    mean_QD: np.ndarray  # float64, of level, taste and the session's mood, in units of the prior
    root_QDD: np.ndarray  # float64, a square root of their covariance


class _Evidence(NamedTuple):
    """Views whose watch time says something of the drive. log x is known, or (NaN) between low and high."""

    row: np.ndarray
    session: np.ndarray
    item: np.ndarray
    feature: np.ndarray  # float32 (V, D), what a unit of level, taste and mood adds to the drive
    quality: np.ndarray  # float32 (V,), the drive without them
    mean: np.ndarray  # float32 (V,), of log x of an engaged view at drive 0
    log_x: np.ndarray  # float32 (V,)
    abandoned: np.ndarray  # float32 (V,), density or probability of what is known, if abandoned
    skipped: np.ndarray  # float32 (V,), and its probability if skipped at once
    low: np.ndarray  # float32 (V,)
    high: np.ndarray  # float32 (V,)

    def take(self, which: np.ndarray) -> _Evidence:
        return _Evidence(*(column[which] for column in self))


class HistoryTruth(WorldTruth):
    """Probabilities of a world for one who reads the user from the log.

    Args:
        world: the world.
        last: how many views are seen before a request, the newest.
        target: `long_view`, `effective_view` or `any`: only views that reach it are seen, as by a tower. None: all.
        least_s: least watch time of the target, seconds.
        seed: of the sampling.
    """

    def __init__(self, world: World, *, last: int, target: str | None = None, least_s: float = 0.0, seed: int = 0):
        super().__init__(world, state="lasting")
        self._last, self._seed = last, seed
        self._only_targets = target is not None
        duration_N = world.item_duration_s.astype(np.float64)
        threshold = {"long_view": LONG_VIEW_S, "effective_view": EFFECTIVE_VIEW_S}.get(target)
        self._floor_N = np.full(len(duration_N), least_s) if threshold is None else np.minimum(duration_N, threshold)
        self._target = target
        with np.errstate(divide="ignore"):
            self._floor_log_x_N = np.log(self._floor_N)  # no floor lies beyond the end
        law = world.law
        self._abandoned_reach_N = _normal_below((law.abandoned_mean - self._floor_log_x_N) / law.abandoned_spread)
        self._asked: tuple[bytes, _Reading] | None = None
        self._author_of_tag_TA = self._authors_met()
        spec = world.spec
        scale = [spec.watch_persistence, *[spec.user_item_affinity] * world.law.affinity_factors, spec.mood_scale]
        self._feature_ND = np.concatenate([np.ones((spec.items, 1)), world.item_traits, np.ones((spec.items, 1))],
                                          axis=1) * scale

    def _authors_met(self) -> np.ndarray:
        """float64 (T, A): how probable each author is as a favourite that is met through a tag."""
        world = self.world
        met_TA = np.zeros((world.spec.tags_count, world.spec.author_count))
        for slot in range(world.item_tags.shape[1]):
            np.add.at(met_TA, (world.item_tags[:, slot], world.item_author), world.item_share_of_tag[:, slot])
        return met_TA

    # -- in place of the known state ----------------------------------------------------------------------------------

    def _requests(self, user_ids: np.ndarray, timestamps_ms: np.ndarray) -> _Reading:
        """The posterior of these requests; the last ones asked for are remembered."""
        user_ids, timestamps_ms = np.asarray(user_ids, np.int64), np.asarray(timestamps_ms, np.int64)
        asked = user_ids.tobytes() + timestamps_ms.tobytes()
        if self._asked is None or self._asked[0] != asked:
            index = self.world.user_indices(user_ids)
            by_user = np.argsort(index, kind="stable")
            parts = [self._read(index[rows], timestamps_ms[rows], begin)
                     for begin in range(0, len(by_user), _REQUESTS_AT_ONCE)
                     if len(rows := by_user[begin:begin + _REQUESTS_AT_ONCE])]
            back = np.argsort(by_user, kind="stable")
            reading = _Reading(*(np.concatenate(column)[back] for column in zip(*parts, strict=True)))
            self._asked = asked, reading._replace(user=index)
        return self._asked[1]

    def _choice(self, requests: _Reading, rows: slice) -> np.ndarray:
        return self._mixture(requests.tag_QT[rows], requests.author_QA[rows])

    def _mixture(self, tag_QT: np.ndarray, author_QA: np.ndarray) -> np.ndarray:
        """p(i), float64 (rows, N), of a feed with these shares of tags and authors."""
        world = self.world
        choice = np.tile(world.spec.exploration * world.popularity, (len(tag_QT), 1))
        for slot in range(world.item_tags.shape[1]):
            choice += tag_QT[:, world.item_tags[:, slot]] * world.item_share_of_tag[:, slot]
        choice += author_QA[:, world.item_author] * world.item_share_of_author
        return choice

    def _over_watch_law(self, requests: _Reading, rows: slice, of_drive) -> np.ndarray:
        """Average of of_drive over what the log leaves open; in a null world over everything, all items alike."""
        if self.world.spec.watch_time != "natural":
            prior = _prior(len(requests.user[rows]), self._feature_ND.shape[1])
            return (self._over_drive(*prior, of_drive) @ self.world.popularity)[:, None]
        return self._over_drive(requests.mean_QD[rows], requests.root_QDD[rows], of_drive)

    def _over_drive(self, mean_QD: np.ndarray, root_QDD: np.ndarray, of_drive) -> np.ndarray:
        everyone = slice(0, len(mean_QD))
        middle = self.world.law.quality_spread * self.world.item_quality + mean_QD @ self._feature_ND.T
        spread = np.sqrt(np.square(np.einsum("qde,nd->qen", root_QDD, self._feature_ND)).sum(1))
        return sum(weight * of_drive(middle + at * spread, everyone) for at, weight in self._nodes())

    # -- what the log says --------------------------------------------------------------------------------------------

    def _read(self, user_Q: np.ndarray, time_Q: np.ndarray, block: int) -> _Reading:
        rng = np.random.default_rng([self._seed, 0x72656164, block])
        seen = self._see(user_Q, time_Q)
        count, watches = len(user_Q), self.world.spec.watch_time == "natural"
        mean_QD, root_QDD = _prior(count, self._feature_ND.shape[1])
        reach_QN = None
        if self._only_targets and watches:
            everyone = self._reach(mean_QD[:1], root_QDD[:1])
            choice = self._read_choice(seen, np.broadcast_to(everyone, (count, self.world.spec.items)), rng, 2)
            mean_QD, root_QDD = self._read_drive(seen, self._mixture(*choice), rng)
            reach_QN = self._reach(mean_QD, root_QDD)
        elif watches:
            mean_QD, root_QDD = self._read_drive(seen, None, rng)
        tag_QT, author_QA = self._read_choice(seen, reach_QN, rng, 1)
        back = np.argsort(seen.order, kind="stable")
        return _Reading(*(column[back] for column in (seen.order, tag_QT, author_QA, mean_QD, root_QDD)))

    def _reach(self, mean_QD: np.ndarray, root_QDD: np.ndarray) -> np.ndarray:
        """P(target | item) of each request's user, float64 (Q, N)."""
        return self._over_drive(mean_QD, root_QDD, lambda drive, _: self._law_interval(drive, self._floor_N, np.inf))

    def _see(self, user_Q: np.ndarray, time_Q: np.ndarray) -> _Seen:
        """The views before requests, of users in rising order; what a log does not hold is left where it is."""
        world = self.world
        index, user = np.unique(user_Q, return_inverse=True)
        columns = []
        length, own_number = np.zeros(len(user), np.int64), np.zeros(len(user), np.int64)
        for begin in range(0, len(index), world.users_at_once):
            end = min(begin + world.users_at_once, len(index))
            rows = np.flatnonzero((user >= begin) & (user < end))
            views = world.views(index[begin:end])
            number = views.sessions.number[views.session]
            watch_s = np.where(views.unknown, np.nan, views.watch_s.astype(np.float64))
            wanted = np.ones(len(watch_s), bool)
            if self._only_targets:
                flag = {"long_view": views.long, "effective_view": views.effective}.get(self._target)
                wanted = watch_s >= self._floor_N[views.item] if flag is None else flag
            band = world.spec.days * 86_400_000 + 1
            since = np.clip(time_Q[rows] - world.spec.start_ms, -1, band - 2) + 1 + (user[rows] - begin) * band
            clock = (views.timestamp_ms - world.spec.start_ms + 1) + views.user * band
            first = np.searchsorted(views.user, user[rows] - begin)
            own_number[rows] = number[np.maximum(np.searchsorted(clock, since, side="right") - 1, first)]
            before = np.concatenate([[0], np.cumsum(wanted)])
            until = before[np.searchsorted(clock, since, side="left")]  # the request's own view is not before it
            from_ = np.maximum(before[first], until - self._last)
            length[rows] = until - from_
            place = np.flatnonzero(wanted)[_ranges(from_, until)]
            columns.append((number[place], views.item[place], watch_s[place], views.effective[place],
                            views.long[place]))
        number_V, item, watch_s, effective, long = (np.concatenate(column) for column in zip(*columns, strict=True))
        end_Q = np.cumsum(length)
        first_number = own_number.copy()
        first_number[length > 0] = number_V[(end_Q - length)[length > 0]]
        chain_Q = own_number - first_number + 1
        order = np.argsort(-chain_Q, kind="stable")
        place = _ranges((end_Q - length)[order], end_Q[order])
        row = np.repeat(np.arange(len(order)), length[order])
        chains = len(order) - np.searchsorted(np.sort(chain_Q), np.arange(1, chain_Q.max() + 1))
        offset = np.concatenate([[0], np.cumsum(chains)])
        step_V = number_V[place] - first_number[order][row]
        row_of_session = np.concatenate([np.arange(active) for active in chains])
        own_session = offset[chain_Q[order] - 1] + np.arange(len(order))
        return _Seen(order, row, offset[step_V] + row, item[place], watch_s[place], effective[place], long[place],
                     chains, own_session, row_of_session)

    # -- the choice ---------------------------------------------------------------------------------------------------

    def _read_choice(self, seen: _Seen, reach_QN: np.ndarray | None, rng: np.random.Generator,
                     haste: int) -> tuple[np.ndarray, np.ndarray]:
        """Expected shares of tags (Q, T) and authors (Q, A) in the feed at the requests, float32.

        Args:
            seen: the views.
            reach_QN: P(target | item), where only target views are seen, rows as in `seen`; None where all are.
            haste: divides the number of sweeps.
        """
        state = _ChoiceState(self.world, self._author_of_tag_TA, seen, reach_QN, rng)
        counted = 0
        tag_QT = np.zeros((len(seen.order), self.world.spec.tags_count), np.float32)
        author_QA = np.zeros((len(seen.order), self.world.spec.author_count), np.float32)
        for sweep in range(SWEEPS // haste):
            expected = state.sweep()
            if sweep >= SETTLING // haste:
                tag_QT += expected[0]
                author_QA += expected[1]
                counted += 1
        return tag_QT / counted, author_QA / counted

    # -- the watch time -----------------------------------------------------------------------------------------------

    def _evidence(self, seen: _Seen) -> _Evidence:
        """What the watch times and flags of views say; views left at once, and flags alike for all, say nothing."""
        world, law = self.world, self.world.law
        log_d = world.item_log_duration[seen.item]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_w = np.log(seen.watch_s)
        over = log_w - log_d
        log_x = np.where(over < 0.0, log_w, log_d + over / law.replay_slope)
        low = np.full(len(log_x), -np.inf)
        high = np.full(len(log_x), np.inf)
        capped = over > law.replay_cap - 1e-4  # watch times are whole milliseconds
        low[capped] = log_d[capped] + law.replay_cap / law.replay_slope
        unknown = np.isnan(seen.watch_s)
        short, middle = (np.minimum(log_d, math.log(s)) for s in (EFFECTIVE_VIEW_S, LONG_VIEW_S))
        low = np.where(unknown, np.where(seen.long, middle, np.where(seen.effective, short, -np.inf)), low)
        high = np.where(unknown, np.where(seen.long, np.inf, np.where(seen.effective, middle, short)), high)
        log_x[capped | unknown] = np.nan
        at = (log_x - law.abandoned_mean) / law.abandoned_spread
        density = np.exp(-0.5 * at**2) / (law.abandoned_spread * math.sqrt(2.0 * math.pi))
        between = _normal_interval((low - law.abandoned_mean) / law.abandoned_spread,
                                   (high - law.abandoned_mean) / law.abandoned_spread)
        told = np.flatnonzero(unknown | (seen.watch_s > 0.0))
        item = seen.item[told]
        floats = (world.law.quality_spread * world.item_quality[item],
                  law.engaged_mean + law.engaged_by_duration * log_d[told], log_x[told],
                  np.where(np.isnan(log_x), between, density)[told],
                  np.where(unknown & ~seen.effective, law.skipped, 0.0)[told], low[told], high[told])
        return _Evidence(seen.row[told], seen.session[told], item, self._feature_ND[item].astype(np.float32),
                         *(column.astype(np.float32) for column in floats))

    def _log_seen(self, evidence: _Evidence, drive: np.ndarray) -> np.ndarray:
        """log p(what is known of the watch time | drive) of views, float32 (V,)."""
        law = self.world.law
        engaged = np.float32(1.0 - law.skipped) / (
            1.0 + np.exp(-(np.float32(law.engaged_offset) + np.float32(law.engaged_slope) * drive)))
        mean = evidence.mean + drive
        with np.errstate(under="ignore"):
            at = np.exp(-0.5 * ((evidence.log_x - mean) / np.float32(law.engaged_spread)) ** 2) / np.float32(
                law.engaged_spread * math.sqrt(2.0 * math.pi))
        between = np.flatnonzero(np.isnan(evidence.log_x))
        if len(between):
            at[between] = _normal_interval((evidence.low[between] - mean[between]) / law.engaged_spread,
                                           (evidence.high[between] - mean[between]) / law.engaged_spread)
        total = (np.float32(1.0 - law.skipped) - engaged) * evidence.abandoned + engaged * at + evidence.skipped
        return np.log(np.maximum(total, np.float32(1e-30)))

    def _read_drive(self, seen: _Seen, choice_QN: np.ndarray | None,
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Mean (Q, D) of level, taste and the request's mood, and a square root (Q, D, D) of their covariance.

        Args:
            seen: the views.
            choice_QN: p(item), where only target views are seen: what P(target) is an average over. None: all are seen.
            rng: of the draws.
        """
        count, width = len(seen.order), self._feature_ND.shape[1]
        evidence = self._evidence(seen)
        targets_Q = np.bincount(seen.row, minlength=count) if choice_QN is not None else np.zeros(count)
        targets_S = np.bincount(seen.session, minlength=len(seen.row_of_session))

        item_QM = None if choice_QN is None else self._items_like(choice_QN, rng)

        def log_target(x_QD: np.ndarray, which: np.ndarray) -> np.ndarray:
            """log P(target | user), float64 (which,)."""
            item_WM = item_QM[which]
            drive = self.world.law.quality_spread * self.world.item_quality[item_WM]
            drive = drive + np.matmul(self._feature_ND[item_WM], x_QD[:, :, None])[:, :, 0]
            return np.log(self._reach_of(item_WM, drive).mean(1))

        middle_QE, root_QEE = self._laplace(evidence, count)
        at_QE = np.zeros_like(middle_QE)  # level and taste are middle + root @ at
        mood_S = np.zeros(len(seen.row_of_session), np.float32)
        step_KK, first_K = _mood_chain(self.world.spec.mood_persistence)
        total_QD, square_QDD = np.zeros((count, width)), np.zeros((count, width, width))
        for sweep in range(DRIVE_SWEEPS):
            fixed = evidence.quality + evidence.feature[:, -1] * mood_S[evidence.session]

            def log_ratio(at_QE: np.ndarray, which: np.ndarray, fixed=fixed) -> np.ndarray:
                """log of posterior over Laplace approximation, of requests `which`, up to a constant."""
                lasting_QE = middle_QE[which] + np.einsum("qef,qf->qe", root_QEE[which], at_QE)
                part, views = evidence, fixed
                row = evidence.row
                if len(which) < count:
                    new_row = np.full(count, -1)
                    new_row[which] = np.arange(len(which))
                    inside = np.flatnonzero(new_row[row] >= 0)
                    part, views, row = evidence.take(inside), fixed[inside], new_row[row[inside]]
                drive = views + np.einsum("ve,ve->v", part.feature[:, :-1], lasting_QE.astype(np.float32)[row])
                value = _sums(row, self._log_seen(part, drive), len(which))
                if choice_QN is not None:
                    x_QD = np.concatenate([lasting_QE, np.zeros((len(which), 1))], axis=1)
                    value -= targets_Q[which] * log_target(x_QD, which)
                return value - 0.5 * np.square(lasting_QE).sum(1) + 0.5 * np.square(at_QE).sum(1)

            at_QE = _slice_around(at_QE, log_ratio, rng)
            lasting_QE = middle_QE + np.einsum("qef,qf->qe", root_QEE, at_QE)
            fixed = evidence.quality + np.einsum(
                "ve,ve->v", evidence.feature[:, :-1], lasting_QE.astype(np.float32)[evidence.row])
            log_SK = np.empty((len(mood_S), len(_MOODS)))
            for state, mood in enumerate(_MOODS):
                told = self._log_seen(evidence, fixed + evidence.feature[:, -1] * np.float32(mood))
                log_SK[:, state] = _sums(evidence.session, told, len(mood_S))
                if choice_QN is not None:
                    x_QD = np.concatenate([lasting_QE, np.full((count, 1), mood)], axis=1)
                    log_SK[:, state] -= targets_S * log_target(x_QD, np.arange(count))[seen.row_of_session]
            drawn_S, own_QK = _sample_chains(log_SK, step_KK, first_K, seen, rng)
            mood_S = _MOODS[drawn_S].astype(np.float32)
            if sweep >= DRIVE_SETTLING:
                x_QD = np.concatenate([lasting_QE, (own_QK @ _MOODS)[:, None]], axis=1)
                total_QD += x_QD
                square_QDD += x_QD[:, :, None] * x_QD[:, None, :]
                square_QDD[:, -1, -1] += own_QK @ _MOODS**2 - (own_QK @ _MOODS) ** 2
        counted = DRIVE_SWEEPS - DRIVE_SETTLING
        mean_QD = total_QD / counted
        covariance = square_QDD / counted - mean_QD[:, :, None] * mean_QD[:, None, :]
        return mean_QD, np.linalg.cholesky(covariance + 1e-6 * np.eye(width))

    def _laplace(self, evidence: _Evidence, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where level and taste lie, (Q, E), and a square root of twice their covariance (Q, E, E), by Newton's method
        without moods. It only has to be near: the sampling corrects it."""
        feature = evidence.feature[:, :-1]
        width, row, step = feature.shape[1], evidence.row, np.float32(0.3)
        reach = [np.float32(0.0)] * 3
        at_QE = np.zeros((count, width))
        for _ in range(6):
            drive = evidence.quality + np.einsum("ve,ve->v", feature, at_QE.astype(np.float32)[row])
            if self._only_targets:  # given that the views reached the target
                reach = [np.log(self._reach_of(evidence.item, drive + shift)) for shift in (-step, 0, step)]
            below, here, above = (self._log_seen(evidence, drive + shift) - minus
                                  for shift, minus in zip((-step, 0, step), reach, strict=True))
            slope, bend = (above - below) / (2 * step), np.clip((2 * here - above - below) / step**2, 0.0, 10.0)
            gradient = np.stack([_sums(row, slope * feature[:, a], count) for a in range(width)], axis=1) - at_QE
            curvature = np.tile(np.eye(width), (count, 1, 1))
            for a in range(width):
                for b in range(a + 1):
                    curvature[:, a, b] += _sums(row, bend * feature[:, a] * feature[:, b], count)
                    curvature[:, b, a] = curvature[:, a, b]
            move = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
            at_QE += move * np.minimum(1.0, 1.5 / np.maximum(np.linalg.norm(move, axis=1), 1e-9))[:, None]
        return at_QE, np.linalg.cholesky(2.0 * np.linalg.inv(curvature))

    def _reach_of(self, item: np.ndarray, drive: np.ndarray) -> np.ndarray:
        """P(target | drive) of single items, any shape."""
        law = self.world.law
        engaged = (1.0 - law.skipped) / (1.0 + np.exp(-(law.engaged_offset + law.engaged_slope * drive)))
        mean = law.engaged_mean + law.engaged_by_duration * self.world.item_log_duration[item] + drive
        reached = _normal_below((mean - self._floor_log_x_N[item]) / law.engaged_spread)
        return (engaged * reached + (1.0 - law.skipped - engaged) * self._abandoned_reach_N[item]
                + law.skipped * (self._floor_N[item] <= 0.0))

    def _items_like(self, choice_QN: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int64 (Q, M): items in the shares in which each user meets them, drawn at even steps along the durations."""
        by_duration = np.argsort(self.world.item_duration_s, kind="stable")
        running_QN = np.cumsum(choice_QN[:, by_duration], axis=1)
        level_M = (np.arange(_ITEMS_OF_MEAN) + rng.random()) / _ITEMS_OF_MEAN
        place_QM = np.stack([np.searchsorted(running_N, level_M * running_N[-1]) for running_N in running_QN])
        return by_duration[np.minimum(place_QM, len(by_duration) - 1)]


class _ChoiceState:
    """Interests and favourites of requests' users as they are sampled, rows as in `seen`.

    The share of a view's item in the mixture is kept in its parts, so that one can be exchanged without the others.
    """

    def __init__(self, world: World, author_of_tag_TA: np.ndarray, seen: _Seen, reach_QN: np.ndarray | None,
                 rng: np.random.Generator):
        spec = world.spec
        self._spec, self._rng, self._seen, self._author_of_tag_TA = spec, rng, seen, author_of_tag_TA
        self._count, self._tags, self._authors = len(seen.order), spec.tags_count, spec.author_count
        self._row = seen.row
        self._tag_V3 = world.item_tags[seen.item]
        self._share_V3 = world.item_share_of_tag[seen.item].astype(np.float32)
        self._author_V = world.item_author[seen.item]
        self._of_author_V = world.item_share_of_author[seen.item].astype(np.float32)
        self._cell_V3 = self._row[:, None] * self._tags + self._tag_V3
        self._popular_V = (spec.exploration * world.popularity[seen.item]).astype(np.float32)
        self._interest_T = world.tag_interest
        weights = world.interest_weight
        self._weights = spec.lasting_interest * weights
        self._omega = weights
        favourites = world.users(np.arange(1)).favourite.shape[1]
        self._loyalty = spec.author_loyalty / favourites
        self._step_KK = (1.0 - spec.interest_drift) * np.eye(self._tags) + spec.interest_drift * self._interest_T
        # P(target) is linear in the shares of the mixture: the mean of reach within each part.
        self._targets_Q = np.zeros(self._count)
        self._targets_S = np.zeros(len(seen.row_of_session))
        self._reach_QT = np.ones((self._count, self._tags))
        self._reach_QA = np.ones((self._count, self._authors))
        self._reach_all_Q = np.ones(self._count)
        if reach_QN is not None:
            self._targets_Q = np.bincount(self._row, minlength=self._count)
            self._targets_S = np.bincount(seen.session, minlength=len(seen.row_of_session))
            share_NT, share_NA = np.zeros((spec.items, self._tags)), np.zeros((spec.items, self._authors))
            for slot in range(world.item_tags.shape[1]):
                np.add.at(share_NT, (np.arange(spec.items), world.item_tags[:, slot]), world.item_share_of_tag[:, slot])
            share_NA[np.arange(spec.items), world.item_author] = world.item_share_of_author
            self._reach_QT, self._reach_QA = reach_QN @ share_NT, reach_QN @ share_NA
            self._reach_all_Q = reach_QN @ world.popularity

        # Nothing is known at first: every interest is the average one, until it is drawn.
        self._tau_QJ = np.full((self._count, len(weights)), -1)
        self._alpha_QM = np.full((self._count, favourites), -1)
        average_V = (self._share_V3 * self._interest_T.astype(np.float32)[self._tag_V3]).sum(1)
        self._average_V = average_V
        self._passing_V = np.float32(spec.passing_interest) * average_V
        self._passing_S: np.ndarray | None = None
        self._lasting_JV = [np.float32(weight) * average_V for weight in self._weights]
        self._loyal_V = np.float32(spec.author_loyalty) * (
            self._of_author_V * (self._interest_T @ author_of_tag_TA).astype(np.float32)[self._author_V])

    def sweep(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws everything once; expected shares (Q, T), (Q, A) given what else is drawn."""
        tag_QT = np.zeros((self._count, self._tags))
        author_QA = np.zeros((self._count, self._authors))
        for place in range(len(self._weights)):
            tag_QT += self._weights[place] * self._draw_interest(place)
        for place in range(self._alpha_QM.shape[1]):
            author_QA += self._loyalty * self._draw_favourite(place)
        tag_QT += self._spec.passing_interest * self._draw_passing()
        self._swap_interests()
        return tag_QT, author_QA

    def _mix_V(self) -> np.ndarray:
        return self._popular_V + self._passing_V + self._loyal_V + sum(self._lasting_JV)

    def _of_tag_V(self, tag_V: np.ndarray) -> np.ndarray:
        """q(item | tag) of each view, one tag each."""
        return np.where(self._tag_V3 == tag_V[:, None], self._share_V3, np.float32(0.0)).sum(1)

    def _reach_Q(self, *, interest: int | None = None, favourite: int | None = None,
                 passing: bool = True) -> np.ndarray:
        """P(target) of requests' users, without one of the parts, float64 (Q,); passing interests are averaged."""
        rows = np.arange(self._count)
        average_Q = self._reach_QT @ self._interest_T
        total = self._spec.exploration * self._reach_all_Q
        for place, weight in enumerate(self._weights):
            if place != interest:
                tag = self._tau_QJ[:, place]
                total = total + weight * np.where(tag < 0, average_Q, self._reach_QT[rows, tag])
        for place in range(self._alpha_QM.shape[1]):
            if place != favourite:
                author = self._alpha_QM[:, place]
                total = total + self._loyalty * np.where(author < 0, average_Q, self._reach_QA[rows, author])
        if passing:
            mean = average_Q
            if self._passing_S is not None and self._targets_S.any():
                row_S = self._seen.row_of_session
                reached = _sums(row_S, self._targets_S * self._reach_QT[row_S, self._passing_S], self._count)
                mean = np.where(self._targets_Q > 0, reached / np.maximum(self._targets_Q, 1), average_Q)
            total = total + self._spec.passing_interest * mean
        return total

    def _log_favourites(self, met_QA: np.ndarray) -> np.ndarray:
        """log p(favourites | interests), (Q,); a favourite that is not drawn yet says nothing."""
        rows = np.arange(self._count)
        total = np.zeros(self._count)
        for place in range(self._alpha_QM.shape[1]):
            author = self._alpha_QM[:, place]
            total += np.where(author < 0, 0.0, np.log(met_QA[rows, author] + 1e-300))
        return total

    def _met_QA(self, without: int | None = None) -> np.ndarray:
        """p(author | interests), (Q, A), or the part of it that is not of one interest."""
        average_A = self._interest_T @ self._author_of_tag_TA
        total = np.zeros((self._count, self._authors))
        for place, omega in enumerate(self._omega):
            if place != without:
                tag = self._tau_QJ[:, place]
                total += omega * np.where((tag < 0)[:, None], average_A, self._author_of_tag_TA[tag])
        return total

    def _draw_interest(self, place: int) -> np.ndarray:
        """Draws one lasting interest of every user; its conditional probabilities (Q, T)."""
        weight = self._weights[place]
        self._lasting_JV[place] = np.zeros_like(self._popular_V)
        rest_V = np.maximum(self._mix_V(), _LITTLE)
        gain_V3 = np.log(1.0 + np.float32(weight) * self._share_V3 / rest_V[:, None])
        log_QT = _sums(self._cell_V3.ravel(), gain_V3.ravel(), self._count * self._tags)
        log_QT = log_QT.reshape(self._count, self._tags) + np.log(self._interest_T)
        if self._targets_Q.any():
            rest_Q = self._reach_Q(interest=place)
            log_QT -= self._targets_Q[:, None] * np.log(rest_Q[:, None] + weight * self._reach_QT)
        met_QA, rows = self._met_QA(place), np.arange(self._count)
        for favourite in range(self._alpha_QM.shape[1]):
            author = self._alpha_QM[:, favourite]
            met_QT = met_QA[rows, author][:, None] + self._omega[place] * self._author_of_tag_TA.T[author]
            log_QT += np.where((author < 0)[:, None], 0.0, np.log(met_QT + 1e-300))
        self._tau_QJ[:, place], chance_QT = _draw(log_QT, self._rng)
        self._lasting_JV[place] = np.float32(weight) * self._of_tag_V(self._tau_QJ[self._row, place])
        return chance_QT

    def _draw_favourite(self, place: int) -> np.ndarray:
        """Draws one favourite author of every user; its conditional probabilities (Q, A)."""
        if self._alpha_QM[0, 0] < 0:
            self._loyal_V = np.zeros_like(self._loyal_V)  # the first one leaves the average behind
        drawn = self._alpha_QM[self._row, place]
        own_V = np.where(drawn == self._author_V, np.float32(self._loyalty) * self._of_author_V, np.float32(0.0))
        others_V = self._loyal_V - own_V
        self._loyal_V = others_V
        rest_V = np.maximum(self._mix_V(), _LITTLE)
        gain_V = np.log(1.0 + np.float32(self._loyalty) * self._of_author_V / rest_V)
        log_QA = _sums(self._row * self._authors + self._author_V, gain_V, self._count * self._authors)
        log_QA = log_QA.reshape(self._count, self._authors) + np.log(self._met_QA() + 1e-300)
        if self._targets_Q.any():
            rest_Q = self._reach_Q(favourite=place)
            log_QA -= self._targets_Q[:, None] * np.log(rest_Q[:, None] + self._loyalty * self._reach_QA)
        self._alpha_QM[:, place], chance_QA = _draw(log_QA, self._rng)
        drawn = self._alpha_QM[self._row, place]
        own_V = np.where(drawn == self._author_V, np.float32(self._loyalty) * self._of_author_V, np.float32(0.0))
        self._loyal_V = np.maximum(others_V, 0.0) + own_V
        return chance_QA

    def _draw_passing(self) -> np.ndarray:
        """Draws the passing interests of all sessions; the probabilities (Q, T) of the request's own."""
        seen, weight = self._seen, self._spec.passing_interest
        self._passing_V = np.zeros_like(self._popular_V)
        rest_V = np.maximum(self._mix_V(), _LITTLE)
        gain_V3 = np.log(1.0 + np.float32(weight) * self._share_V3 / rest_V[:, None])
        sessions = len(seen.row_of_session)
        cell_V3 = seen.session[:, None] * self._tags + self._tag_V3
        log_ST = _sums(cell_V3.ravel(), gain_V3.ravel(), sessions * self._tags)
        log_ST = log_ST.reshape(sessions, self._tags)
        if self._targets_S.any():
            reach_QT = np.log(self._reach_Q(passing=False)[:, None] + weight * self._reach_QT)
            log_ST -= self._targets_S[:, None] * reach_QT[seen.row_of_session]
        self._passing_S, own_QT = _sample_chains(log_ST, self._step_KK, self._interest_T, seen, self._rng)
        self._passing_V = np.float32(weight) * self._of_tag_V(self._passing_S[seen.session])
        return own_QT

    def _swap_interests(self) -> None:
        """Proposes to exchange two neighbouring interests of every user: one at a time they would have to pass through
        being the same tag."""
        first = int(self._rng.integers(len(self._weights) - 1))
        pair = [first, first + 1]
        if not self._weights[first]:
            return
        ratio = np.float32(self._weights[first + 1] / self._weights[first])
        before = _sums(self._row, np.log(self._mix_V() + _LITTLE), self._count)
        before += self._log_favourites(self._met_QA()) - self._targets_Q * np.log(self._reach_Q())
        old_tau, old_JV = self._tau_QJ.copy(), list(self._lasting_JV)
        self._tau_QJ[:, pair] = self._tau_QJ[:, pair[::-1]]
        self._lasting_JV[first], self._lasting_JV[first + 1] = old_JV[first + 1] / ratio, old_JV[first] * ratio
        after = _sums(self._row, np.log(self._mix_V() + _LITTLE), self._count)
        after += self._log_favourites(self._met_QA()) - self._targets_Q * np.log(self._reach_Q())
        stays = np.log(self._rng.random(self._count)) >= after - before
        self._tau_QJ[stays] = old_tau[stays]
        stays_V = stays[self._row]
        for place in pair:
            self._lasting_JV[place] = np.where(stays_V, old_JV[place], self._lasting_JV[place])


# ------------------------------------------------------------------------------------------------------------- sampling

def _prior(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((count, width)), np.tile(np.eye(width), (count, 1, 1))


def _ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """begin[0]..end[0]-1, begin[1]..end[1]-1, ..: int64."""
    length = end - begin
    return np.arange(length.sum()) + np.repeat(begin - (np.cumsum(length) - length), length)


def _sums(place: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    """Sum of the values at each place, float64 (count,); of none as well, where numpy's zeros are whole numbers."""
    return np.bincount(place, value, minlength=count).astype(np.float64, copy=False)


def _draw(log_QK: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One state for each row, int64 (Q,), and the probabilities (Q, K) it was drawn with."""
    chance = np.exp(log_QK - log_QK.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    return _draw_of(chance, rng), chance


def _draw_of(weight_QK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    running = np.cumsum(weight_QK, axis=1)
    level = rng.random((len(running), 1)) * running[:, -1:]
    return np.minimum((running <= level).sum(1), weight_QK.shape[1] - 1)


def _mood_chain(persistence: float) -> tuple[np.ndarray, np.ndarray]:
    """The sessions' moods on the grid: transition (K, K) and first probabilities (K,)."""
    distance = (_MOODS - persistence * _MOODS[:, None]) / math.sqrt(1.0 - persistence**2)
    step_KK, first_K = np.exp(-0.5 * distance**2), np.exp(-0.5 * _MOODS**2)
    return step_KK / step_KK.sum(1, keepdims=True), first_K / first_K.sum()


def _sample_chains(log_SK: np.ndarray, step_KK: np.ndarray, first_K: np.ndarray, seen: _Seen,
                   rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of sessions, drawn a whole history at a time.

    Args:
        log_SK: log likelihood of each state of each session.
        step_KK: probability of the next session's state (column) after a state (row).
        first_K: probability of the first session's.
        seen: how sessions follow each other.
        rng: of the draws.

    Returns:
        The states, int64 (S,), and the probabilities (Q, K) of the request's own session given all before it.
    """
    offset = np.concatenate([[0], np.cumsum(seen.chains)])
    filtered = np.exp(log_SK - log_SK.max(1, keepdims=True))
    for step, active in enumerate(seen.chains):
        rows = slice(offset[step], offset[step] + active)
        if step:
            before = slice(offset[step - 1], offset[step - 1] + active)
            filtered[rows] *= filtered[before] @ step_KK
        else:
            filtered[rows] *= first_K
        filtered[rows] /= filtered[rows].sum(1, keepdims=True)
    states = np.empty(len(filtered), np.int64)
    into_KK = np.ascontiguousarray(step_KK.T)
    for step in range(len(seen.chains) - 1, -1, -1):
        active = seen.chains[step]
        weight = filtered[offset[step]:offset[step] + active]
        if step + 1 < len(seen.chains):
            after = seen.chains[step + 1]
            weight = weight.copy()
            weight[:after] *= into_KK[states[offset[step + 1]:offset[step + 1] + after]]
        states[offset[step]:offset[step] + active] = _draw_of(weight, rng)
    return states, filtered[seen.own_session]


def _slice_around(at_QE: np.ndarray, log_ratio: Callable[[np.ndarray, np.ndarray], np.ndarray],
                  rng: np.random.Generator) -> np.ndarray:
    """One elliptical slice step of every row, for a density exp(log_ratio) times a standard normal.

    Murray, Adams, MacKay, AISTATS 2010; around an approximation: Nishihara, Murray, Adams, JMLR 2014.
    """
    count = len(at_QE)
    everyone = np.arange(count)
    other_QE = rng.standard_normal(at_QE.shape)
    least = log_ratio(at_QE, everyone) + np.log(rng.random(count))
    angle = rng.random(count) * 2.0 * math.pi
    low, high = angle - 2.0 * math.pi, angle.copy()
    found_QE, waiting = at_QE.copy(), everyone
    for _ in range(30):  # the bracket shrinks onto where the row stands, which is always inside
        turn = angle[waiting, None]
        proposed = at_QE[waiting] * np.cos(turn) + other_QE[waiting] * np.sin(turn)
        inside = log_ratio(proposed, waiting) > least[waiting]
        found_QE[waiting[inside]] = proposed[inside]
        waiting = waiting[~inside]
        if not len(waiting):
            break
        back = angle[waiting] < 0.0
        low[waiting[back]], high[waiting[~back]] = angle[waiting[back]], angle[waiting[~back]]
        angle[waiting] = low[waiting] + rng.random(len(waiting)) * (high[waiting] - low[waiting])
    return found_QE
