"""The synthetic world: seeded users, items and watch logs in the project's log format.

The choice comes first, then the watch time: an item is drawn from what the user is interested in, and only then is it
settled how long the user watches it. No step sees a condition, so a tower that is steered by one has learnt that from
the logs. Equations, dials and the calibration against a real log are in `docs/synthetic-world.md`.

    p(i | u, s) = g P0_i + l sum_j omega_j q(i | tau_uj) + p q(i | sigma_s) + a (1/M) sum_m r(i | alpha_um)      choice
    z           = quality_i + level_u + affinity_ui + mood_s                                                drive, log s
    log x       = N(m_a, s_a^2)                          with probability 1 - engaged(z): abandoned, at any length
                = N(b_0 + b_1 log d_i + z, s_e^2)        with probability engaged(z) = sigmoid(e_0 + e_1 z)
    log w       = log x below the duration d_i, log d_i + min(kappa (log x - log d_i), cap) from there on (replays)

u is a user, s a session of that user, i an item. tau are lasting interests, sigma_s the passing one, alpha favourite
authors. Every user is a stream of random numbers of its own (SplitMix64, keyed by seed and user index), so a user's
rows do not depend on which other users are generated, in what order, or by how many processes.

The hidden state (interests, levels, moods) is read by `trainer/world_truth.py` alone, for evaluation. Nothing that is
trained or served may read it.

Shape suffixes: U = users of a chunk, S = their sessions, V = their views, N = items, T = tags, R = affinity factors.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError
from embeddings.untrusted import read_json

# Part of world.json: a world written by other equations is another world, even where its spec reads the same.
WORLD_VERSION = 1
WATCH_TIME_KINDS = ("natural", "independent", "permuted")

LOG_SCHEMA = pa.schema([
    ("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp_ms", pa.int64()), ("watch_time_s", pa.float32()),
    ("duration_s", pa.float32()), ("effective_view", pa.bool_()), ("long_view", pa.bool_()), ("like", pa.bool_()),
    ("session_id", pa.int64()),
])
ITEM_SCHEMA = pa.schema([
    ("item_id", pa.int64()), ("author_id", pa.int64()), ("tags", pa.list_(pa.int64())), ("duration_s", pa.float32()),
    ("content_vector", pa.list_(pa.float32())),
])

EFFECTIVE_VIEW_S = 7.0  # KuaiRand's valid play: 7 s, or the whole video
LONG_VIEW_S = 18.0  # KuaiRand's long view: 18 s, or the whole video

_INTERESTS = 5  # lasting interests of a user
_INTEREST_DECAY = 0.7  # each weighs this much of the one before
_FAVOURITES = 3  # favourite authors of a user
_TAG_SLOTS = 3  # most tags an item can have
_SESSION_PAUSE_MS = 30 * 60 * 1000  # shortest gap between two sessions of a user
_MAX_VIEWS_A_DAY = 1000  # keeps the longest history inside the period
_DAY_MS = 24 * 3600 * 1000
_ROWS_AT_ONCE = 131_072  # expected rows of a chunk of users; a chunk is also a Parquet row group


@dataclass(frozen=True)
class WorldSpec:
    """What a world is. Two worlds of the same spec hold the same data.

    Raises:
        InputError: if a value is impossible; the message names the field.
    """

    users: int = 2000
    """Number of users; each has at least one view."""
    items: int = 5000
    """Number of items; all exist from the start of the period on."""
    authors: int | None = None
    """Number of authors; None makes one for 20 items."""
    tags_count: int = 60
    """Number of tags. An item has one to three; users are interested in tags."""
    content_dim: int = 32
    """Width of the items' content vectors, which show an item's tags and affinity factors through noise."""
    days: int = 14
    """Length of the logged period, days."""
    start_ms: int = 1_767_225_600_000
    """Start of the period, Unix time in ms (1 January 2026, 00:00 UTC)."""
    views_per_user: float = 40.0
    """Mean number of views of a user in the period: the dial for the length of histories."""
    views_spread: float = 0.9
    """Standard deviation of the log of a user's number of views (lognormal); 0 gives all users the same number."""
    session_views: float = 8.0
    """Mean number of views of a session (geometric)."""
    seed: int = 0
    """Seed of everything, >= 0."""
    user_item_affinity: float = 0.6
    """Standard deviation, in log seconds, of what a user's pairing with an item adds to the drive. At 0 watch time does
    not depend on the pairing, so a condition can tell no more than the Bayes term p(watch time | item)."""
    watch_persistence: float = 0.3
    """Standard deviation, in log seconds, of a user's lasting level. At 0 a user's average says nothing of the next
    watch time."""
    mood_scale: float = 0.25
    """Standard deviation, in log seconds, of a session's mood."""
    mood_persistence: float = 0.5
    """Correlation of a session's mood with that of the user's session before (AR(1)), 0 to below 1."""
    exploration: float = 0.15
    """Share of the feed drawn by popularity alone (g)."""
    passing_interest: float = 0.25
    """Share of the feed drawn from the session's passing interest (p)."""
    author_loyalty: float = 0.10
    """Share of the feed drawn from favourite authors (a). What the three shares leave, l, goes to lasting interests."""
    interest_drift: float = 0.5
    """Chance that a session has a new passing interest instead of that of the session before."""
    popularity_spread: float = 1.54
    """Standard deviation of the log of an item's popularity weight (lognormal)."""
    null_watch_share: float = 0.0
    """Share of views, drawn at random, whose watch time the log does not know (null). Their flags stay."""
    watch_time: str = "natural"
    """`natural`, or a null world: `independent` (watch time and flags come from the user and an unseen item drawn by
    popularity, not from the viewed item) or `permuted` (as if exchanged among all views: neither user nor item)."""

    def __post_init__(self) -> None:
        for name, low, high in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if name == "authors" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
                raise InputError(f"WorldSpec.{name} is {value!r}: it must be a whole number from {low} to {high}.")
            object.__setattr__(self, name, int(value))
        for name, low, high in _REAL_NUMBERS:
            value = getattr(self, name)
            real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
            if not real or not low <= value <= high:
                raise InputError(f"WorldSpec.{name} is {value!r}: it must be a number from {low} to {high}.")
            object.__setattr__(self, name, float(value))
        if self.watch_time not in WATCH_TIME_KINDS:
            raise InputError(
                f"WorldSpec.watch_time is {self.watch_time!r}: it must be one of {', '.join(WATCH_TIME_KINDS)}."
            )
        if self.tags_count > self.items:
            raise InputError(f"WorldSpec.tags_count is {self.tags_count}: it must not exceed items ({self.items}).")
        if self.items * self.content_dim >= 2**31:
            raise InputError(
                f"WorldSpec.content_dim is {self.content_dim}: content_dim x items must be below 2^31, the most "
                "numbers that one Arrow list column can hold."
            )
        if self.authors is not None and self.authors > self.items:
            raise InputError(f"WorldSpec.authors is {self.authors}: it must not exceed items ({self.items}).")
        if self.exploration + self.passing_interest + self.author_loyalty > 1.0 + 1e-9:
            raise InputError(
                "WorldSpec.exploration, passing_interest and author_loyalty are shares of the feed: "
                "together they must not exceed 1."
            )

    @property
    def author_count(self) -> int:
        return self.authors if self.authors is not None else max(1, self.items // 20)

    @property
    def lasting_interest(self) -> float:
        """Share of the feed drawn from lasting interests (l)."""
        return max(0.0, 1.0 - self.exploration - self.passing_interest - self.author_loyalty)


_WHOLE_NUMBERS = (
    ("users", 1, 2**35), ("items", 1, 2**31 - 1), ("authors", 1, 2**31 - 1), ("tags_count", 1, 1_000_000),
    ("content_dim", 1, 4096), ("days", 1, 3650), ("start_ms", 0, 2**45), ("seed", 0, 2**63 - 1),
)
_REAL_NUMBERS = (
    ("views_per_user", 1.0, 100_000.0), ("views_spread", 0.0, 3.0), ("session_views", 1.0, 10_000.0),
    ("user_item_affinity", 0.0, 3.0), ("watch_persistence", 0.0, 3.0), ("mood_scale", 0.0, 3.0),
    ("mood_persistence", 0.0, 0.999), ("exploration", 0.0, 1.0), ("passing_interest", 0.0, 1.0),
    ("author_loyalty", 0.0, 1.0), ("interest_drift", 0.0, 1.0), ("popularity_spread", 0.0, 4.0),
    ("null_watch_share", 0.0, 1.0),
)


@dataclass(frozen=True)
class WatchLaw:
    """Constants of the watch-time law, fitted to KuaiRand-Pure (see docs/synthetic-world.md). Not dials."""

    skipped: float = 0.10
    """Share of views left at once, with a watch time of 0."""
    engaged_offset: float = -0.249
    """e_0: log odds of engagement at drive 0."""
    engaged_slope: float = 0.777
    """e_1: what a unit of drive adds to the log odds."""
    abandoned_mean: float = 0.830
    """m_a: mean of log x (seconds) of an abandoned view."""
    abandoned_spread: float = 0.886
    """s_a: its standard deviation."""
    engaged_mean: float = 1.861
    """b_0: log x (seconds) of an engaged view at log duration 0 and drive 0."""
    engaged_by_duration: float = 0.381
    """b_1: what a unit of log duration adds."""
    engaged_spread: float = 0.499
    """s_e: standard deviation of an engaged view's log x, the view's own noise."""
    quality_spread: float = 0.15
    """Standard deviation of items' quality in the drive, log seconds."""
    replay_slope: float = 0.30
    """kappa: share of the log overshoot past the end that becomes replay."""
    replay_cap: float = math.log(3.0)
    """Longest replay: log of watch time over duration."""
    affinity_factors: int = 4
    """R: rank of the user-item affinity."""
    affinity_from_tags: float = 0.7
    """Share of the variance of an item's affinity factors that its tags explain."""


LAW = WatchLaw()

# Duration quantiles (seconds) of the views that the world is calibrated on.
_DURATION_LEVELS = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
_DURATION_SECONDS = (5.0, 7.0, 10.3, 13.0, 27.6, 72.0, 158.0, 260.0, 309.0, 447.0, 1178.0)


# ---------------------------------------------------------------------------------------------------------------------
# Random streams and ids
# ---------------------------------------------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PURPOSE_STEP = np.uint64(0xD1342543DE82EF95)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class _Draw:
    """Purposes of random draws. A user's draw is addressed by (seed, user, purpose, index), never by call order."""

    (VIEWS, VIEWS_2, LEVEL, LEVEL_2, TASTE, TASTE_2, INTEREST, FAVOURITE_TAG, FAVOURITE, HOUR, DAY, CLOCK, CLOCK_2,
     SESSION, PASSING, DRIFT, MOOD, MOOD_2, SOURCE, GROUP, ITEM, ENGAGED, NOISE, NOISE_2, THINK, THINK_2, LIKE, UNKNOWN,
     DONOR, DONOR_DRIVE, DONOR_DRIVE_2) = (np.uint64(n) for n in range(1, 32))


def _mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 that passes as random on a counter."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _uniform(key: np.ndarray, purpose: np.uint64, index: np.ndarray | int = 0) -> np.ndarray:
    """Uniform doubles in (0, 1), one for each (key, purpose, index)."""
    counter = (np.asarray(index).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    bits = _mix64(_mix64(key + purpose * np.ones(1, np.uint64) * _PURPOSE_STEP) + counter)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _normal(key: np.ndarray, purpose: np.uint64, purpose_2: np.uint64, index: np.ndarray | int = 0) -> np.ndarray:
    """Standard normal doubles (Box-Muller)."""
    radius = np.sqrt(-2.0 * np.log(_uniform(key, purpose, index)))
    return radius * np.cos(2.0 * np.pi * _uniform(key, purpose_2, index))


class _IdSpace:
    """Indices to ids that look like real ones: a keyed bijection of 52 bits, lifted beyond int32, safe in a double."""

    BITS = 52
    OFFSET = 2**33
    _MASK = np.uint64(2**BITS - 1)
    _SHIFT = np.uint64(BITS // 2)

    def __init__(self, seed: int, kind: int):
        words = np.random.SeedSequence([seed, 1000 + kind]).generate_state(3, np.uint64)
        self._add = words[0] & self._MASK
        self._factors = [words[1] & self._MASK | np.uint64(1), words[2] & self._MASK | np.uint64(1)]
        self._inverses = [np.uint64(pow(int(f), -1, 2**self.BITS)) for f in self._factors]

    def ids(self, index: np.ndarray) -> np.ndarray:
        """int64 ids of int64 indices in [0, 2^52)."""
        x = (np.asarray(index).astype(np.uint64) + self._add) & self._MASK
        for factor in self._factors:
            x = (x * factor) & self._MASK
            x ^= x >> self._SHIFT
        return x.astype(np.int64) + self.OFFSET

    def indices(self, ids: np.ndarray) -> np.ndarray:
        """The indices that `ids` came from; an id that is none of ours gives an index that is too large or negative."""
        shifted = np.asarray(ids, np.int64) - self.OFFSET
        x = shifted.astype(np.uint64) & self._MASK
        for inverse in reversed(self._inverses):
            x ^= x >> self._SHIFT
            x = (x * inverse) & self._MASK
        x = ((x - self._add) & self._MASK).astype(np.int64)
        return np.where((shifted >= 0) & (shifted < 2**self.BITS), x, -1)


class _GroupedDraw:
    """Draws a member of a group with probability proportional to its weight.

    Args:
        group: int (E,), the group of each entry.
        member: int (E,), what is drawn.
        weight: float (E,), > 0.
        groups: number of groups; one without entries must not be drawn from.
    """

    def __init__(self, group: np.ndarray, member: np.ndarray, weight: np.ndarray, groups: int):
        order = np.argsort(group, kind="stable")
        self._group, self._member, weight = group[order], member[order], weight[order]
        self.total = np.bincount(self._group, weight, minlength=groups)  # weight of each group, (groups,)
        ends = np.cumsum(np.bincount(self._group, minlength=groups))
        starts = ends - np.bincount(self._group, minlength=groups)
        running = np.cumsum(weight)
        before = np.concatenate([[0.0], running])[starts]
        # Group k occupies (k, k + 1]: one sorted array answers every group.
        share = (running - before[self._group]) / np.where(self.total > 0, self.total, 1.0)[self._group]
        self._edges = self._group + np.clip(share, 0.0, 1.0)
        self._last = ends - 1

    def draw(self, group: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """One member of each of the groups, by uniforms in (0, 1)."""
        place = np.searchsorted(self._edges, group + uniform, side="left")
        return self._member[np.minimum(place, self._last[group])]


# ---------------------------------------------------------------------------------------------------------------------
# The world
# ---------------------------------------------------------------------------------------------------------------------


class UserState(NamedTuple):
    """The lasting hidden state of users."""

    key: np.ndarray  # uint64 (U,), their random streams
    view_count: np.ndarray  # int64 (U,)
    level: np.ndarray  # float (U,), standard normal; what watch_persistence scales
    taste: np.ndarray  # float (U, R), standard normal
    interest: np.ndarray  # int64 (U, 5), lasting tags, the strongest first
    favourite: np.ndarray  # int64 (U, 3), favourite authors


class SessionState(NamedTuple):
    """The passing hidden state of users' sessions, users in order, sessions by time."""

    user: np.ndarray  # int64 (S,), row of UserState
    number: np.ndarray  # int64 (S,), 0 is a user's first session
    first_view: np.ndarray  # int64 (S,), row of its first view
    mood: np.ndarray  # float (S,), standard normal; what mood_scale scales
    passing: np.ndarray  # int64 (S,), tag


class Views(NamedTuple):
    """Views of some users in log order (by user, then time), beside the state they were drawn from."""

    users: UserState
    sessions: SessionState
    user: np.ndarray  # int64 (V,), row of `users`
    session: np.ndarray  # int64 (V,), row of `sessions`
    item: np.ndarray  # int64 (V,), index of the item
    timestamp_ms: np.ndarray  # int64 (V,)
    watch_s: np.ndarray  # float32 (V,), also where the log will not know it
    unknown: np.ndarray  # bool (V,), the log does not know the watch time
    effective: np.ndarray  # bool (V,)
    long: np.ndarray  # bool (V,)
    like: np.ndarray  # bool (V,)


class World:
    """A world's items, and its users' logs on demand.

    Building it costs O(items) and no time for users. Indices (users 0..users-1, items 0..items-1 in the order of
    `items_table`) are for callers inside this project; ids are what the logs hold.
    """

    def __init__(self, spec: WorldSpec):
        self.spec = spec
        self.law = LAW
        self._user_space, self._item_space = _IdSpace(spec.seed, 1), _IdSpace(spec.seed, 2)
        self._session_space, author_space = _IdSpace(spec.seed, 3), _IdSpace(spec.seed, 4)
        self._stream_key = np.random.SeedSequence([spec.seed, 7]).generate_state(1, np.uint64)
        self.item_ids = self._item_space.ids(np.arange(spec.items))
        self._build_items()
        self.author_ids = author_space.ids(self.item_author)

    def _build_items(self) -> None:
        spec, law = self.spec, self.law
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([spec.seed, 11])))
        n, tags, authors = spec.items, spec.tags_count, spec.author_count
        tag_weight = _zipf(tags, 0.6)[rng.permutation(tags)]
        author_weight = _zipf(authors, 0.7)[rng.permutation(authors)]
        author_tag = rng.choice(tags, authors, p=tag_weight)
        author_quality = rng.standard_normal(authors)

        # The quantiles of a lognormal in random order: drawn weights would leave the skew to the luck of a few items.
        normal = NormalDist()
        quantiles = np.array([normal.inv_cdf((place + 0.5) / n) for place in range(n)])
        self.item_weight = np.exp(spec.popularity_spread * quantiles)[rng.permutation(n)]
        self.item_author = rng.choice(authors, n, p=author_weight)
        drawn_tags = rng.choice(tags, (n, _TAG_SLOTS), p=tag_weight)
        at_home = rng.random(n) < 0.7
        drawn_tags[at_home, 0] = author_tag[self.item_author[at_home]]
        how_many = rng.choice([1, 2, 3], n, p=[0.4, 0.4, 0.2])
        # The first items cover the tags, so that none is empty.
        cover = rng.permutation(n)[:tags]
        drawn_tags[cover, 0] = np.arange(tags)
        has_tag = np.arange(_TAG_SLOTS) < how_many[:, None]
        has_tag[:, 1] &= drawn_tags[:, 1] != drawn_tags[:, 0]
        has_tag[:, 2] &= (drawn_tags[:, 2] != drawn_tags[:, 0]) & (drawn_tags[:, 2] != drawn_tags[:, 1])
        self.item_tags, self.item_has_tag = drawn_tags, has_tag  # int64, bool (N, 3)

        # Durations walk the quantiles in the order of popularity: a low-discrepancy sequence, because a plain draw
        # would leave the quantiles of viewed durations to the few items that hold most views.
        place = np.empty(n, np.int64)
        place[np.argsort(-self.item_weight, kind="stable")] = np.arange(n)
        level = np.modf(rng.random() + place * ((math.sqrt(5.0) - 1.0) / 2.0))[0]
        seconds = np.exp(np.interp(level, _DURATION_LEVELS, np.log(_DURATION_SECONDS)))
        self.item_duration_s = np.round(seconds, 3).astype(np.float32)
        self.item_log_duration = np.log(self.item_duration_s.astype(np.float64))
        own_quality = rng.standard_normal(n)
        self.item_quality = math.sqrt(0.3) * author_quality[self.item_author] + math.sqrt(0.7) * own_quality

        tag_traits = rng.standard_normal((tags, law.affinity_factors))
        of_tags = (tag_traits[drawn_tags] * has_tag[:, :, None]).sum(1) / np.sqrt(has_tag.sum(1))[:, None]
        own = rng.standard_normal((n, law.affinity_factors))
        traits = math.sqrt(law.affinity_from_tags) * of_tags + math.sqrt(1.0 - law.affinity_from_tags) * own
        # Of length 1, so that a user's affinity with any item is standard normal over users.
        self.item_traits = traits / np.linalg.norm(traits, axis=1, keepdims=True)  # float (N, R)

        items = np.repeat(np.arange(n), _TAG_SLOTS)[has_tag.ravel()]
        self._by_tag = _GroupedDraw(drawn_tags[has_tag], items, self.item_weight[items], tags)
        self._by_author = _GroupedDraw(self.item_author, np.arange(n), self.item_weight, authors)
        self._by_popularity = _GroupedDraw(np.zeros(n, np.int64), np.arange(n), self.item_weight, 1)
        self.popularity = self.item_weight / self.item_weight.sum()  # P0, (N,)
        # q(i | tag) for each of an item's tags, and r(i | author).
        self.item_share_of_tag = np.where(has_tag, self.item_weight[:, None] / self._by_tag.total[drawn_tags], 0.0)
        self.item_share_of_author = self.item_weight / self._by_author.total[self.item_author]
        # Interests follow what there is to see, flattened so that small tags have their people.
        self.tag_interest = np.sqrt(self._by_tag.total) / np.sqrt(self._by_tag.total).sum()  # (T,)
        self._interest_edges = np.cumsum(self.tag_interest)
        decay = _INTEREST_DECAY ** np.arange(_INTERESTS)
        self.interest_weight = decay / decay.sum()  # omega, (5,)

    def items_table(self) -> pa.Table:
        """The items of `ITEM_SCHEMA`, in index order. Content vectors have length 1."""
        spec = self.spec
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([spec.seed, 12])))
        tag_vectors = rng.standard_normal((spec.tags_count, spec.content_dim)).astype(np.float32)
        trait_vectors = rng.standard_normal((self.law.affinity_factors, spec.content_dim)).astype(np.float32)
        content = rng.standard_normal((spec.items, spec.content_dim), dtype=np.float32) * np.float32(0.4)
        content += self.item_traits.astype(np.float32) @ trait_vectors
        per_tag = (self.item_has_tag / np.sqrt(self.item_has_tag.sum(1))[:, None]).astype(np.float32)
        for slot in range(_TAG_SLOTS):
            content += per_tag[:, slot, None] * tag_vectors[self.item_tags[:, slot]]
        content /= np.linalg.norm(content, axis=1, keepdims=True)

        tag_ends = np.concatenate([[0], np.cumsum(self.item_has_tag.sum(1))])
        content_ends = np.arange(spec.items + 1) * spec.content_dim
        return pa.table([
            pa.array(self.item_ids),
            pa.array(self.author_ids),
            _lists(tag_ends, pa.array(self.item_tags[self.item_has_tag] + 1)),
            pa.array(self.item_duration_s),
            _lists(content_ends, pa.array(content.ravel())),
        ], schema=ITEM_SCHEMA)

    def user_ids(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """int64 ids of the users of a range of indices."""
        return self._user_space.ids(np.arange(begin, self.spec.users if end is None else end))

    def user_indices(self, user_ids: np.ndarray) -> np.ndarray:
        """Indices of users. Raises InputError for an id that is not of this world."""
        indices = self._user_space.indices(user_ids)
        outside = (indices < 0) | (indices >= self.spec.users)
        if outside.any():
            raise InputError(f"User {np.asarray(user_ids)[outside][0]} is not of this world: are the logs another's?")
        return indices

    def user_logs(self, user_index: int) -> pa.Table:
        """All views of one user, in `LOG_SCHEMA`, by time."""
        return self.logs(user_index, user_index + 1)

    def logs(self, begin: int, end: int) -> pa.Table:
        """All views of users begin..end-1, in `LOG_SCHEMA`, users in order of index, views of a user by time."""
        if not 0 <= begin <= end <= self.spec.users:
            raise InputError(f"Users {begin} to {end} are not of this world: it has {self.spec.users}.")
        step = self.users_at_once
        tables = [self._log_table(np.arange(at, min(at + step, end))) for at in range(begin, end, step)]
        return pa.concat_tables(tables) if tables else LOG_SCHEMA.empty_table()

    @property
    def users_at_once(self) -> int:
        """Users of a chunk, for about 131,000 rows."""
        return max(1, int(_ROWS_AT_ONCE / self.spec.views_per_user))

    def _log_table(self, user_index: np.ndarray) -> pa.Table:
        views = self.views(user_index)
        index_V = user_index[views.user]
        session_V = index_V * 2**16 + views.sessions.number[views.session]
        return pa.table([
            pa.array(self._user_space.ids(index_V)),
            pa.array(self.item_ids[views.item]),
            pa.array(views.timestamp_ms),
            pa.array(views.watch_s, mask=views.unknown),
            pa.array(self.item_duration_s[views.item]),
            pa.array(views.effective),
            pa.array(views.long),
            pa.array(views.like),
            pa.array(self._session_space.ids(session_V)),
        ], schema=LOG_SCHEMA)

    # -- hidden state: read by WorldTruth alone -----------------------------------------------------------------------

    def users(self, user_index: np.ndarray) -> UserState:
        """Lasting state of users, int64 indices (U,) of any order."""
        spec = self.spec
        key = _mix64(self._stream_key + (np.asarray(user_index).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        log_mean = math.log(spec.views_per_user) - spec.views_spread**2 / 2.0
        views = np.exp(log_mean + spec.views_spread * _normal(key, _Draw.VIEWS, _Draw.VIEWS_2))
        count = np.clip(np.round(views), 1, _MAX_VIEWS_A_DAY * spec.days).astype(np.int64)
        column = key[:, None]
        taste = _normal(column, _Draw.TASTE, _Draw.TASTE_2, np.arange(self.law.affinity_factors))
        interest = self._draw_interest(_uniform(column, _Draw.INTEREST, np.arange(_INTERESTS)))
        # Favourite authors are met through lasting interests: the author of an item of one of them.
        which = np.searchsorted(
            np.cumsum(self.interest_weight)[:-1], _uniform(column, _Draw.FAVOURITE_TAG, np.arange(_FAVOURITES))
        )
        met = self._by_tag.draw(
            np.take_along_axis(interest, which, 1), _uniform(column, _Draw.FAVOURITE, np.arange(_FAVOURITES))
        )
        level = _normal(key, _Draw.LEVEL, _Draw.LEVEL_2)
        return UserState(key, count, level, taste, interest, self.item_author[met])

    def sessions(self, users: UserState) -> SessionState:
        """Sessions of users: which views they hold, their mood and passing interest."""
        spec = self.spec
        first_V = np.concatenate([[0], np.cumsum(users.view_count)[:-1]])
        user_V = np.repeat(np.arange(len(users.key)), users.view_count)
        number_V = np.arange(len(user_V)) - first_V[user_V]
        starts_V = _uniform(users.key[user_V], _Draw.SESSION, number_V) < 1.0 / spec.session_views
        starts_V |= number_V == 0
        first_view = np.flatnonzero(starts_V)
        user = user_V[first_view]
        row = np.arange(len(user))
        first_session = np.searchsorted(user, np.arange(len(users.key)))
        number = row - first_session[user]
        key = users.key[user]

        # A drift draws a new passing interest; other sessions keep that of the last one that drew.
        draws = (_uniform(key, _Draw.DRIFT, number) < spec.interest_drift) | (number == 0)
        passing = self._draw_interest(_uniform(key, _Draw.PASSING, number))
        passing = passing[np.maximum.accumulate(np.where(draws, row, 0))]

        mood = _normal(key, _Draw.MOOD, _Draw.MOOD_2, number)
        carried, fresh = spec.mood_persistence, math.sqrt(1.0 - spec.mood_persistence**2)
        by_number = np.argsort(number, kind="stable")
        counts = np.bincount(number)
        for rows in np.split(by_number, np.cumsum(counts)[:-1])[1:]:
            mood[rows] = carried * mood[rows - 1] + fresh * mood[rows]
        return SessionState(user, number, first_view, mood, passing)

    def views(self, user_index: np.ndarray) -> Views:
        """Every view of some users, with the state it was drawn from."""
        users = self.users(user_index)
        sessions = self.sessions(users)
        total = int(users.view_count.sum())
        session = np.repeat(np.arange(len(sessions.user)), np.diff(np.append(sessions.first_view, total)))
        user = sessions.user[session]
        first_V = np.concatenate([[0], np.cumsum(users.view_count)[:-1]])
        number = np.arange(total) - first_V[user]
        item = self._choose(users, sessions, user, session, number)
        watch_s, like_chance, watched = self._watch(users, sessions, user, session, number, item)
        duration_s = self.item_duration_s[watched]
        long = watch_s >= np.minimum(duration_s, np.float32(LONG_VIEW_S))
        effective = watch_s >= np.minimum(duration_s, np.float32(EFFECTIVE_VIEW_S))
        key_V = users.key[user]
        like = effective & (_uniform(key_V, _Draw.LIKE, number) < like_chance)
        unknown = _uniform(key_V, _Draw.UNKNOWN, number) < self.spec.null_watch_share
        timestamp_ms = self._clock(users, sessions, user, session, number, watch_s)
        return Views(users, sessions, user, session, item, timestamp_ms, watch_s, unknown, effective, long, like)

    def _draw_interest(self, uniform: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._interest_edges[:-1], uniform)

    def _choose(self, users: UserState, sessions: SessionState, user: np.ndarray, session: np.ndarray,
                number: np.ndarray) -> np.ndarray:
        """Items of views, drawn from p(i | u, s): first a part of the mixture, then a tag or author, then an item."""
        spec = self.spec
        key = users.key[user]
        source = _uniform(key, _Draw.SOURCE, number)
        group_uniform, uniform = _uniform(key, _Draw.GROUP, number), _uniform(key, _Draw.ITEM, number)
        explores = source < spec.exploration
        loyal = ~explores & (source < spec.exploration + spec.author_loyalty)
        passing = ~explores & ~loyal & (source < spec.exploration + spec.author_loyalty + spec.passing_interest)

        which = np.searchsorted(np.cumsum(self.interest_weight)[:-1], group_uniform)
        tag = np.where(passing, sessions.passing[session], users.interest[user, which])
        item = self._by_tag.draw(tag, uniform)
        favourite = users.favourite[user[loyal], (group_uniform[loyal] * _FAVOURITES).astype(np.int64)]
        item[loyal] = self._by_author.draw(favourite, uniform[loyal])
        item[explores] = self._by_popularity.draw(np.zeros(int(explores.sum()), np.int64), uniform[explores])
        return item

    def _watch(self, users: UserState, sessions: SessionState, user: np.ndarray, session: np.ndarray,
               number: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Watch time in seconds, float32 (V,), the chance of a like, and the item they were drawn for."""
        spec, law = self.spec, self.law
        key = users.key[user]
        watched = item
        if spec.watch_time != "natural":
            watched = self._by_popularity.draw(np.zeros(len(item), np.int64), _uniform(key, _Draw.DONOR, number))
        if spec.watch_time == "permuted":
            # Another view's watch time, in law: a user, a mood and a pairing drawn afresh.
            spread = math.sqrt(spec.watch_persistence**2 + spec.mood_scale**2 + spec.user_item_affinity**2)
            of_user = spread * _normal(key, _Draw.DONOR_DRIVE, _Draw.DONOR_DRIVE_2, number)
        else:
            of_user = spec.watch_persistence * users.level[user] + spec.mood_scale * sessions.mood[session]
            # Factor by factor, not a matrix product: the sum must not depend on the size of the chunk.
            for factor in range(law.affinity_factors if spec.user_item_affinity else 0):
                pairing = users.taste[user, factor] * self.item_traits[watched, factor]
                of_user = of_user + spec.user_item_affinity * pairing
        drive = law.quality_spread * self.item_quality[watched] + of_user

        fate = _uniform(key, _Draw.ENGAGED, number)
        engaged_chance = (1.0 - law.skipped) / (1.0 + np.exp(-(law.engaged_offset + law.engaged_slope * drive)))
        skipped = fate >= 1.0 - law.skipped
        engaged = fate < engaged_chance
        noise = _normal(key, _Draw.NOISE, _Draw.NOISE_2, number)
        log_d = self.item_log_duration[watched]
        log_x = np.where(
            engaged,
            law.engaged_mean + law.engaged_by_duration * log_d + drive + law.engaged_spread * noise,
            law.abandoned_mean + law.abandoned_spread * noise,
        )
        over = log_x - log_d
        log_w = np.where(over < 0.0, log_x, log_d + np.minimum(law.replay_slope * over, law.replay_cap))
        # Whole milliseconds, as players report; the floor keeps a watched view apart from a skipped one.
        watch_s = np.maximum(np.round(np.exp(log_w), 3), 0.001)
        watch_s = np.where(skipped, 0.0, watch_s).astype(np.float32)
        like_chance = np.where(engaged, 0.03 * np.exp(np.minimum(drive, 2.0)), 0.001)
        return watch_s, like_chance, watched

    def _clock(self, users: UserState, sessions: SessionState, user: np.ndarray, session: np.ndarray,
               number: np.ndarray, watch_s: np.ndarray) -> np.ndarray:
        """Unix times of views, int64 ms, strictly rising for a user, sessions at the user's hours and apart.

        All sums are of whole milliseconds, so that they do not depend on what else is in the chunk.
        """
        spec = self.spec
        period_ms = spec.days * _DAY_MS
        key = users.key[user]
        think_ms = np.exp(np.log(1500.0) + 0.8 * _normal(key, _Draw.THINK, _Draw.THINK_2, number))
        gap_ms = 200 + np.minimum(think_ms, 60_000.0).astype(np.int64)
        gap_ms += np.round(watch_s.astype(np.float64) * 1000.0).astype(np.int64)  # from this view to the next
        # A history too long for its period is watched faster, down to gaps of 1 ms.
        user_starts = np.concatenate([[0], np.cumsum(users.view_count)[:-1]])
        session_count = np.bincount(sessions.user, minlength=len(users.key))
        pause_ms = np.minimum(_SESSION_PAUSE_MS, period_ms // 2 // session_count)
        view_budget = (0.9 * period_ms - pause_ms * session_count) / np.add.reduceat(gap_ms, user_starts)
        gap_ms = np.maximum((gap_ms * np.minimum(view_budget, 1.0)[user]).astype(np.int64), 1)

        until = np.cumsum(gap_ms) - gap_ms
        offset_V = until - until[sessions.first_view][session]
        busy_S = np.add.reduceat(gap_ms, sessions.first_view) + pause_ms[sessions.user]

        # Wished starts: a day, and an hour around the user's own.
        key_S = users.key[sessions.user]
        hour = 24.0 * _uniform(key_S, _Draw.HOUR) + 3.5 * _normal(key_S, _Draw.CLOCK, _Draw.CLOCK_2, sessions.number)
        day = np.floor(spec.days * _uniform(key_S, _Draw.DAY, sessions.number))
        wish = ((day + np.mod(hour / 24.0, 1.0)) * _DAY_MS).astype(np.int64)
        wish = wish[np.lexsort((wish, sessions.user))]
        # Pushed back until none begins inside the one before, then forward from the end until the last one fits.
        first_S = np.searchsorted(sessions.user, np.arange(len(users.key)))
        busy_before = np.cumsum(busy_S) - busy_S
        within = busy_before - busy_before[first_S][sessions.user]
        band = sessions.user * (4 * period_ms)  # keeps the running maximum from crossing users
        start = np.maximum.accumulate(wish - within + band) - band + within
        all_busy = np.bincount(sessions.user, busy_S, minlength=len(users.key)).astype(np.int64)
        latest = period_ms - (all_busy[sessions.user] - within)
        start = np.minimum(start, latest)
        return spec.start_ms + start[session] + offset_V


def _zipf(count: int, exponent: float) -> np.ndarray:
    weight = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weight / weight.sum()


def _lists(ends: np.ndarray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorldSummary:
    """What `write_world` left in a folder."""

    folder: Path
    users: int
    items: int
    rows: int
    """Views in all log files."""
    files: int
    """Log files."""
    written: bool
    """False if the folder held this world already."""


def write_world(folder: str | Path, spec: WorldSpec, *, processes: int | None = None, rows_per_file: int = 1_000_000,
                progress: Callable[[int, int], None] | None = None) -> WorldSummary:
    """Write a world: `logs/part-*.parquet`, `items.parquet` and `world.json`, the spec without any hidden state.

    Everything is written beside the folder and renamed, so that half a world is never seen. A folder that holds
    this very world is left alone. The data are the same whatever the number of processes, and no process holds more
    than a chunk of about 131,000 views. With several processes a calling script needs the usual `__main__` guard.

    Args:
        folder: where to; it must not exist, be empty, or hold this very world.
        spec: the world.
        processes: workers; None takes one for each core, 1 works in this process.
        rows_per_file: expected views of a log file.
        progress: called with (users written, users) after every file.

    Raises:
        InputError: if the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    if processes is not None and processes < 1:
        raise InputError(f"processes is {processes}: it must be at least 1, or None for one for each core.")
    if rows_per_file < 1:
        raise InputError(f"rows_per_file is {rows_per_file}: it must be at least 1.")
    found = _existing_world(folder, spec)
    if found is not None:
        return found
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".tmp", dir=folder.parent))
        partial.chmod(0o777 & ~_umask())
        rows, files = _write_parts(partial, spec, processes, rows_per_file, progress)
        described = {"version": WORLD_VERSION, "spec": dataclasses.asdict(spec), "rows": rows, "files": files,
                     "sha256": _digests(partial)}
        (partial / "world.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        try:
            os.rename(partial, folder)  # replaces an empty folder; fails where another writer was first
        except OSError:
            found = _existing_world(folder, spec)
            if found is None:
                raise
            return found
    except OSError as error:
        raise InputError(f"The synthetic world cannot be written to {folder}: {error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return WorldSummary(folder, spec.users, spec.items, rows, files, written=True)


def is_whole(folder: str | Path) -> bool:
    """Whether every file of a written world is as it was written; of one without checksums that cannot be said."""
    try:
        wanted = _read_description(Path(folder))[1].get("sha256")
        return wanted is None or wanted == _digests(Path(folder))
    except (InputError, OSError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*.parquet")):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_spec(folder: str | Path) -> WorldSpec:
    """The spec of a written world. Raises InputError if the folder holds none, or one of another version."""
    return _read_description(Path(folder))[0]


def _read_description(folder: Path) -> tuple[WorldSpec, dict]:
    path = folder / "world.json"
    try:
        described = read_json(path)
        version, spec = described["version"], described["spec"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no synthetic world: {path} cannot be read ({error}).") from error
    if version != WORLD_VERSION:
        raise InputError(f"{path} is of version {version}, this program writes {WORLD_VERSION}: name a new folder.")
    try:
        return WorldSpec(**spec), described
    except TypeError as error:
        raise InputError(f"{path} has fields that this program does not know: {error}") from error


def _existing_world(folder: Path, spec: WorldSpec) -> WorldSummary | None:
    """The summary if the folder holds this world, None if it is free; InputError if something else is there."""
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder for the synthetic world.")
    there, described = _read_description(folder)
    if there != spec:
        names = [f.name for f in dataclasses.fields(WorldSpec) if getattr(there, f.name) != getattr(spec, f.name)]
        raise InputError(f"{folder} holds another world (it differs in {', '.join(names)}): name a new folder.")
    return WorldSummary(folder, spec.users, spec.items, described["rows"], described["files"], written=False)


def _write_parts(folder: Path, spec: WorldSpec, processes: int | None, rows_per_file: int,
                 progress: Callable[[int, int], None] | None) -> tuple[int, int]:
    """Items and log files; the number of views and of files. File borders follow from spec and rows_per_file alone."""
    (folder / "logs").mkdir()
    world = World(spec)
    pq.write_table(world.items_table(), folder / "items.parquet")
    step = max(1, int(rows_per_file / spec.views_per_user))
    parts = [
        (folder / "logs" / f"part-{number:05d}.parquet", begin, min(begin + step, spec.users))
        for number, begin in enumerate(range(0, spec.users, step))
    ]
    workers = min(processes or len(os.sched_getaffinity(0)), len(parts))
    rows = done = 0
    if workers == 1:
        for part in parts:
            rows += _write_part(world, *part)
            done = part[2]
            if progress is not None:
                progress(done, spec.users)
        return rows, len(parts)
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (Arrow's) can hang
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(spec,))
    with pool:
        begun = {pool.submit(_write_part_in_worker, *part): part for part in parts}
        try:
            for future in concurrent.futures.as_completed(begun):
                rows += future.result()
                done += begun[future][2] - begun[future][1]
                if progress is not None:
                    progress(done, spec.users)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return rows, len(parts)


_worker_world: World | None = None  # built once in each worker process


def _start_worker(spec: WorldSpec) -> None:
    global _worker_world
    _worker_world = World(spec)


def _write_part_in_worker(path: Path, begin: int, end: int) -> int:
    return _write_part(_worker_world, path, begin, end)


def _write_part(world: World, path: Path, begin: int, end: int) -> int:
    rows = 0
    with pq.ParquetWriter(path, LOG_SCHEMA) as writer:
        for at in range(begin, end, world.users_at_once):
            table = world.logs(at, min(at + world.users_at_once, end))
            writer.write_table(table)
            rows += table.num_rows
    return rows


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
