"""The condition: the watch time that a user vector is asked for, and how a request chooses it.

CRM (arXiv:2412.13844) feeds a tower the watch time of the view it has to predict. Training knows that watch time;
inference chooses it by a strategy (section 3.2). Three things live here, all numpy and all without state:

- `WatchBuckets` turns seconds into rows of a lookup table,
- `returns` gives W_i for each position of a window (Eq. 6 and its two readings),
- `choose` gives each request the condition that a strategy picks (section 3.2, Algorithm 1).

Shape suffixes: B = windows, P = positions of a window, Q = requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNKNOWN_BUCKET = 0


@dataclass(frozen=True)
class WatchBuckets:
    """Log-spaced buckets of watch time: 1 + floor(log1p(w) / log1p(max_s) * count), the last one open above.

    Bucket 0 is the unknown watch time: a null in the log, a dropped condition, a request that asks for nothing.
    """

    count: int = 100
    max_s: float = 3000.0

    @property
    def rows(self) -> int:
        """Rows of the lookup table, the unknown bucket included."""
        return self.count + 1

    def encode(self, watch_s: np.ndarray) -> np.ndarray:
        """Rows of the lookup table.

        Args:
            watch_s: float, any shape, seconds; NaN is unknown, negative times count as 0.

        Returns:
            int64 of the same shape, in [0, count].
        """
        watch_s = np.asarray(watch_s, dtype=np.float64)
        known = np.isfinite(watch_s)
        scaled = np.log1p(np.clip(np.where(known, watch_s, 0.0), 0.0, None)) / np.log1p(self.max_s) * self.count
        return np.where(known, 1 + np.minimum(np.floor(scaled), self.count - 1), UNKNOWN_BUCKET).astype(np.int64)


def returns(kind: str, watch_BP: np.ndarray, condition_BP: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """W_i for each position of a batch of windows, in seconds.

    With c the condition of a window's last position, n+1 its length and w_j its watch times:

        next      W_i = the condition of position i
        to_go     W_i = c + sum of w_j, j = i..n, so that the last one is c itself         (Eq. 6, return-to-go)
        prefix    W_i = sum of w_j, j < i, as the paper prints it: no W holds the condition

    A watch time that is not known adds nothing to a sum; a sum of nothing known is unknown.

    Args:
        kind: "next", "to_go" or "prefix".
        watch_BP: float (B, P), what was watched, NaN where unknown. The last position's entry is not read by `to_go`.
        condition_BP: float (B, P), what is asked for at each position, NaN for nothing.
        length_B: int (B,), positions of each window that hold an event.

    Returns:
        float64 (B, P), NaN where unknown or behind the window's end.

    Raises:
        ValueError: if the kind is not one of the three.
    """
    positions_P = np.arange(watch_BP.shape[1])
    inside_BP = positions_P < length_B[:, None]
    if kind == "next":
        return np.where(inside_BP, condition_BP.astype(np.float64), np.nan)
    is_last_BP = positions_P == (length_B - 1)[:, None]
    if kind == "to_go":
        summand_BP = np.where(is_last_BP, condition_BP, watch_BP).astype(np.float64)
        known_BP = np.isfinite(summand_BP) & inside_BP
        total_BP = np.cumsum(np.where(known_BP, summand_BP, 0.0)[:, ::-1], axis=1)[:, ::-1]
        count_BP = np.cumsum(known_BP[:, ::-1], axis=1)[:, ::-1]
        return np.where(inside_BP & (count_BP > 0), total_BP, np.nan)
    if kind == "prefix":
        known_BP = np.isfinite(watch_BP) & inside_BP
        watched_BP = np.where(known_BP, watch_BP, 0.0).astype(np.float64)
        total_BP = np.cumsum(watched_BP, axis=1) - watched_BP
        count_BP = np.cumsum(known_BP, axis=1) - known_BP
        return np.where(inside_BP & (count_BP > 0), total_BP, np.nan)
    raise ValueError(f"no condition kind {kind!r}: next, to_go, prefix")


@dataclass(frozen=True)
class WatchStatistics:
    """What the training targets say about watch times: the range a condition is clamped to, and what a user without
    a known watch time is given (the medians over users). Seconds."""

    least_s: float
    most_s: float
    median_user_average_s: float
    median_user_maximum_s: float

    def clamp(self, condition_s: np.ndarray) -> np.ndarray:
        """Conditions inside the trained range; unknown ones stay unknown."""
        return np.clip(condition_s, self.least_s, self.most_s)


def watch_statistics(user_index_E: np.ndarray, watch_E: np.ndarray) -> WatchStatistics:
    """Statistics of the training targets' watch times.

    Args:
        user_index_E: int (E,), the user of each target, any numbering.
        watch_E: float (E,), seconds, NaN where unknown.
    """
    known_E = np.isfinite(watch_E)
    if not known_E.any():
        return WatchStatistics(0.0, 0.0, float("nan"), float("nan"))
    watch_K = watch_E[known_E].astype(np.float64)
    _, user_K = np.unique(user_index_E[known_E], return_inverse=True)
    average_U = np.bincount(user_K, watch_K) / np.bincount(user_K)
    maximum_U = np.zeros(len(average_U))
    np.maximum.at(maximum_U, user_K, watch_K)
    return WatchStatistics(float(watch_K.min()), float(watch_K.max()), float(np.median(average_U)),
                           float(np.median(maximum_U)))


@dataclass(frozen=True)
class PastWatch:
    """What a request knows of its user's watch times: everything before the request, nothing at or after it.

    average_Q, maximum_Q: over all known past watch times; recent_average_Q, recent_maximum_Q: over the latest n of
    them. Seconds, NaN where none is known.
    """

    average_Q: np.ndarray
    maximum_Q: np.ndarray
    recent_average_Q: np.ndarray
    recent_maximum_Q: np.ndarray


def past_watch(watch_E: np.ndarray, begin_Q: np.ndarray, end_Q: np.ndarray, latest: int) -> PastWatch:
    """Averages and maxima of the events [begin, end) of each request.

    Args:
        watch_E: float (E,), seconds in time order a user, NaN where unknown.
        begin_Q, end_Q: int (Q,), each request's past as a range of events; the request's own view is not inside.
        latest: how many of the latest known watch times the "recent" figures look at.
    """
    figures = np.full((4, len(begin_Q)), np.nan)
    for q, (begin, end) in enumerate(zip(begin_Q, end_Q, strict=True)):
        past = watch_E[begin:end]
        past = past[np.isfinite(past)].astype(np.float64)
        if len(past):
            recent = past[-latest:]
            figures[:, q] = past.mean(), past.max(), recent.mean(), recent.max()
    return PastWatch(*figures)


def choose(strategy: str, past: PastWatch, statistics: WatchStatistics, *, true_watch_Q: np.ndarray | None = None,
           fixed_s: float | None = None, multiplexed_p: float = 0.5, seed: int = 0) -> np.ndarray:
    """The condition of each request under a strategy (CRM, section 3.2).

    `average` and `maximum` are the user's own; `multiplexed` (Algorithm 1; reading, since its text lost its symbols)
    divides the requests: a share p asks for the maximum of the user's latest n watch times, the others for their
    average; `fixed` asks everybody for the same; `oracle` for the true next watch time, which only an evaluation
    knows; `null` for nothing. A user without a known watch time is given the median user's figure.

    Returns:
        float64 (Q,), seconds inside the trained range, NaN for nothing.

    Raises:
        ValueError: for a strategy that is not one of these, or one whose argument is missing.
    """
    requests = len(past.average_Q)
    if strategy == "null":
        return np.full(requests, np.nan)
    if strategy == "average":
        chosen = np.where(np.isfinite(past.average_Q), past.average_Q, statistics.median_user_average_s)
    elif strategy == "maximum":
        chosen = np.where(np.isfinite(past.maximum_Q), past.maximum_Q, statistics.median_user_maximum_s)
    elif strategy == "multiplexed":
        average = np.where(np.isfinite(past.recent_average_Q), past.recent_average_Q, statistics.median_user_average_s)
        maximum = np.where(np.isfinite(past.recent_maximum_Q), past.recent_maximum_Q, statistics.median_user_maximum_s)
        takes_maximum = np.random.default_rng([seed, 0x6D757831]).random(requests) < multiplexed_p
        chosen = np.where(takes_maximum, maximum, average)
    elif strategy == "fixed":
        if fixed_s is None:
            raise ValueError("strategy fixed needs fixed_s, seconds")
        chosen = np.full(requests, float(fixed_s))
    elif strategy == "oracle":
        if true_watch_Q is None:
            raise ValueError("strategy oracle needs the true watch times")
        chosen = np.asarray(true_watch_Q, dtype=np.float64)
    else:
        raise ValueError(f"no strategy {strategy!r}: null, average, maximum, multiplexed, fixed, oracle")
    return statistics.clamp(chosen)
