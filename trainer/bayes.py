"""What is known of an item's watch time: its shrunk mean, and the Bayes term that every CRM tower is held against.

An unconditioned tower scores log p(item | user). By Bayes' rule the item that is watched for the time c asked for has

    log p(item | user, c) = log p(item | user) + log p(c | item, user) + const,

and where users do not differ in what they watch long, p(c | item, user) = p(c | item) can be counted from the training
views: no training, and B extra inner-product dimensions in the index. A CRM tower (arXiv:2412.13844) that does not
beat this baseline has only been wired up.

Both statistics lean on the same duration bins: half octaves of the duration, from 4 s to 4,096 s, and one bin of its
own for an unknown duration. They are fixed, not quantiles, so that a bin is the same in every run and time slice.

Shape suffixes: N = items, B = watch buckets, D = duration bins, Q = queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics import lower_edges, watch_buckets

DURATION_EDGES_S = tuple(float(2 ** (k / 2)) for k in range(4, 25))
"""Edges between duration bins, seconds: 4, 5.7, 8, 11.3, .., 4096."""

DURATION_BINS = len(DURATION_EDGES_S) + 2
"""Below the first edge, between two, above the last; and the last bin: duration unknown."""


def duration_bin(duration_s: np.ndarray) -> np.ndarray:
    """Bin of each duration in seconds, int64 in 0 .. DURATION_BINS - 1; NaN and durations <= 0 have the last one."""
    duration_s = np.asarray(duration_s, dtype=np.float64)
    known = duration_s > 0
    return np.where(known, np.searchsorted(DURATION_EDGES_S, duration_s, side="right"), DURATION_BINS - 1)


def item_watch_mean(watch_sum_N: np.ndarray, views_N: np.ndarray, duration_bin_N: np.ndarray,
                    prior_views: float = 10.0) -> np.ndarray:
    """An item's mean watch time in seconds over training target views, shrunk to that of its duration bin.

        mean(v) = (sum of its watch times + prior_views * mean of its bin) / (its views + prior_views)

    A bin's mean is over its views; a bin without views has the mean over all. Give training views only.

    Args:
        watch_sum_N: float (N,), sum of the known watch times of each item's views, seconds.
        views_N: int (N,), how many those are.
        duration_bin_N: int64 (N,), `duration_bin` of each item.
        prior_views: views of the bin that an item starts with.

    Returns:
        float64 (N,), seconds; all NaN where no view at all has a known watch time.

    Raises:
        ValueError: if the prior is not positive.
    """
    if prior_views <= 0:
        raise ValueError(f"prior_views must be above 0, not {prior_views}: items without views need it")
    duration_bin_N = np.asarray(duration_bin_N, dtype=np.int64)
    bins = _bins(duration_bin_N)
    overall = watch_sum_N.sum() / views_N.sum() if views_N.sum() else np.nan
    sum_D = np.bincount(duration_bin_N, weights=watch_sum_N, minlength=bins)
    views_D = np.bincount(duration_bin_N, weights=views_N, minlength=bins)
    mean_D = np.divide(sum_D, views_D, out=np.full(bins, overall), where=views_D > 0)
    return (watch_sum_N + prior_views * mean_D[duration_bin_N]) / (views_N + prior_views)


@dataclass(frozen=True)
class BayesTerm:
    """log p(watch bucket | item) as extra dimensions of an inner-product index.

        [u; onehot(bucket(c))] . [v; log p(. | v)]  =  <u, v> + log p(bucket(c) | v)
    """

    edges_s: np.ndarray
    """float64 (B,), lower edges of the watch buckets, seconds."""

    log_p_NB: np.ndarray
    """float32 (N, B), finite; each row sums to 1 as probabilities."""

    @classmethod
    def fit(cls, views_NB: np.ndarray, duration_bin_N: np.ndarray, edges_s: Sequence[float],
            prior_views: float = 20.0) -> BayesTerm:
        """Counts training target views, each level smoothed by the one above it.

            p(b)        = (views in b + 1) / (all views + B)
            p(b | bin)  = (the bin's views in b + prior_views * p(b)) / (the bin's views + prior_views)
            p(b | item) = (the item's views in b + prior_views * p(b | bin)) / (the item's views + prior_views)

        Args:
            views_NB: int (N, B), training target views of each item by watch bucket (`metrics.watch_histogram`).
            duration_bin_N: int64 (N,), `duration_bin` of each item.
            edges_s: lower edges of the B buckets, seconds.
            prior_views: weight of the level above, in views; above 0.

        Raises:
            ValueError: if the edges do not rise or fit the counts, or the prior is not positive.
        """
        if prior_views <= 0:
            raise ValueError(f"prior_views must be above 0, not {prior_views}: log p would be infinite")
        duration_bin_N = np.asarray(duration_bin_N, dtype=np.int64)
        if views_NB.shape != (len(duration_bin_N), len(lower_edges(edges_s))):
            raise ValueError(f"views_NB has shape {views_NB.shape}, not one row an item and one column an edge")
        views_DB = np.zeros((_bins(duration_bin_N), views_NB.shape[1]))
        np.add.at(views_DB, duration_bin_N, views_NB)
        p_B = (views_NB.sum(0) + 1.0) / (views_NB.sum() + views_NB.shape[1])
        p_DB = (views_DB + prior_views * p_B) / (views_DB.sum(1, keepdims=True) + prior_views)
        p_NB = (views_NB + prior_views * p_DB[duration_bin_N]) / (views_NB.sum(1, keepdims=True) + prior_views)
        return cls(lower_edges(edges_s), np.log(p_NB).astype(np.float32))

    def index_dims(self) -> np.ndarray:
        """float32 (N, B), to be put behind the item vectors."""
        return self.log_p_NB

    def query_dims(self, condition_s: np.ndarray, weight: float = 1.0) -> np.ndarray:
        """float32 (Q, B), to be put behind the user vectors: `weight` at the bucket of the condition, zero elsewhere.

        Args:
            condition_s: float (Q,), the watch time asked for in seconds; NaN = unknown: all zeros, the term is off.
            weight: the temperature of the tower's softmax, as its scores are temperature * log p(item | user).
        """
        bucket_Q = watch_buckets(condition_s, self.edges_s)
        dims_QB = np.zeros((len(bucket_Q), len(self.edges_s)), dtype=np.float32)
        known = np.flatnonzero(bucket_Q >= 0)
        dims_QB[known, bucket_Q[known]] = weight
        return dims_QB


def _bins(duration_bin_N: np.ndarray) -> int:
    return max(DURATION_BINS, int(duration_bin_N.max(initial=0)) + 1)
