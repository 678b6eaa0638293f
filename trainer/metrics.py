"""What a retrieved list is worth: recall, NDCG, watch time, the control curve, and intervals for all of them.

Everything here is plain NumPy over whole arrays and gives one float64 a query. NaN means "not defined for this query"
(nothing relevant, nothing retrieved, no hit) and is left out of every mean.

What is relevant to a query comes as a ragged pair `(offsets_Q1, values)`: the views of query q are
`values[offsets_Q1[q]:offsets_Q1[q + 1]]`. An item that stands there twice is two views and one relevant item. -1 in
a retrieved list is a missing place (FAISS pads with it) and is never a hit, also where -1 stands among the relevant.

Shape suffixes: Q = queries, K = places of a list, V = relevant views, N = items, B = watch buckets, C = conditions,
S = seeds, U = users, M = metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

Ragged = tuple[np.ndarray, np.ndarray]

MISSING = -1
_NEVER = np.iinfo(np.int64).max
_WEIGHTS_AT_ONCE = 1 << 22

MOST_CLUSTERS = 10_000
"""Where there are more users than this, whole groups of users, formed by chance, are resampled in their place: the
width of an interval is then uncertain by 0.7%, and its price no longer grows with the queries."""


def first_ranks(retrieved_QK: np.ndarray, relevant: Ragged) -> np.ndarray:
    """Place of each relevant view's item in its query's list, counted from 0; the largest int64 where it is not there.

    Args:
        retrieved_QK: int64 (Q, K), item rows or ids, best first, -1 = missing.
        relevant: offsets int64 (Q+1,) and values int64 (V,), of the same kind as the retrieved.

    Returns:
        int64 (V,). An item that a list holds twice counts at its first place.

    Raises:
        ValueError: if the offsets do not fit the values or the queries.
    """
    retrieved_QK = np.asarray(retrieved_QK)
    query_V, value_V = _views(relevant, len(retrieved_QK))
    rank_V = np.full(len(value_V), _NEVER, dtype=np.int64)
    if not len(value_V) or not retrieved_QK.size:
        return rank_V
    wanted, code_V = np.unique(value_V, return_inverse=True)
    item = retrieved_QK.ravel()
    code = np.minimum(np.searchsorted(wanted, item), len(wanted) - 1)
    found = np.flatnonzero((wanted[code] == item) & (item != MISSING))
    query, place = np.divmod(found, retrieved_QK.shape[1])
    pair, first = np.unique(query * len(wanted) + code[found], return_index=True)
    if not len(pair):
        return rank_V
    pair_V = query_V * len(wanted) + code_V
    at_V = np.minimum(np.searchsorted(pair, pair_V), len(pair) - 1)
    hit_V = pair[at_V] == pair_V
    rank_V[hit_V] = place[first[at_V[hit_V]]]
    return rank_V


def retrieval_metrics(retrieved_QK: np.ndarray, relevant: Ragged,
                      at: Sequence[int] = (10, 50, 100, 500)) -> dict[str, np.ndarray]:
    """Recall, NDCG and hit rate of every query at several list lengths.

        recall@K   = |top K and relevant| / |relevant|, over unique items
        ndcg@K     = sum over hits of 1 / log2(rank + 1), over the same sum for ranks 1 .. min(K, |relevant|)
        hit_rate@K = 1 where the top K holds anything relevant

    Args:
        retrieved_QK: int64 (Q, K), item rows or ids, best first, -1 = missing. Fewer places than a list length asked
            for are a list that ended early.
        relevant: offsets int64 (Q+1,) and values int64 (V,).
        at: list lengths, each at least 1.

    Returns:
        `recall@K`, `ndcg@K`, `hit_rate@K`: float64 (Q,) each; NaN for a query with nothing relevant.

    Raises:
        ValueError: if a list length is below 1 or the offsets do not fit.
    """
    _check_lengths(at)
    queries = len(retrieved_QK)
    rank_V = first_ranks(retrieved_QK, relevant)
    query_V, value_V = _views(relevant, queries)
    once = _first_of_pairs(query_V, value_V)
    query_R, rank_R = query_V[once], rank_V[once]
    relevant_Q = np.bincount(query_R, minlength=queries)
    defined_Q = relevant_Q > 0
    metrics: dict[str, np.ndarray] = {}
    for k in at:
        hit_R = rank_R < k
        query_H = query_R[hit_R]
        gain_K = 1.0 / np.log2(np.arange(2, k + 2))
        ideal_Q = np.concatenate([[0.0], np.cumsum(gain_K)])[np.minimum(relevant_Q, k)]
        found_Q = np.bincount(query_H, minlength=queries)
        gained_Q = np.bincount(query_H, weights=gain_K[rank_R[hit_R]], minlength=queries)
        metrics[f"recall@{k}"] = _ratio(found_Q, relevant_Q)
        metrics[f"ndcg@{k}"] = _ratio(gained_Q, ideal_Q)
        metrics[f"hit_rate@{k}"] = np.where(defined_Q, (found_Q > 0).astype(np.float64), np.nan)
    return metrics


def retrieved_watch_s(retrieved_QK: np.ndarray, item_watch_s_N: np.ndarray,
                      at: Sequence[int] = (10, 50, 100, 500)) -> dict[str, np.ndarray]:
    """Mean of the items' own watch time, in seconds, over the first K retrieved.

    Args:
        retrieved_QK: int64 (Q, K), item ROWS, -1 = missing.
        item_watch_s_N: float (N,), what one view of the item lasts (`trainer.bayes.item_watch_mean`); NaN = unknown.
        at: list lengths.

    Returns:
        `retrieved_watch_s@K`: float64 (Q,) each; NaN where no retrieved item has a known watch time.

    Raises:
        ValueError: if a row lies outside the N items.
    """
    _check_lengths(at)
    row_QK = _item_rows(retrieved_QK, len(item_watch_s_N))
    watch_N1 = np.append(np.asarray(item_watch_s_N, dtype=np.float64), np.nan)
    metrics: dict[str, np.ndarray] = {}
    sum_Q, count_Q, done = np.zeros(len(row_QK)), np.zeros(len(row_QK), dtype=np.int64), 0
    for k in sorted(set(at)):
        watch_QK = watch_N1[row_QK[:, done:k]]
        known_QK = np.isfinite(watch_QK)
        sum_Q = sum_Q + np.where(known_QK, watch_QK, 0.0).sum(axis=1)
        count_Q = count_Q + known_QK.sum(axis=1)
        done = k
        metrics[f"retrieved_watch_s@{k}"] = _ratio(sum_Q, count_Q)
    return metrics


def hit_watch_s(retrieved_QK: np.ndarray, relevant: Ragged, relevant_watch_s_V: np.ndarray,
                at: Sequence[int] = (10, 50, 100, 500)) -> dict[str, np.ndarray]:
    """Mean actual watch time, in seconds, of the relevant views whose item is among the first K retrieved.

    Args:
        retrieved_QK: int64 (Q, K), as in `retrieval_metrics`.
        relevant: offsets int64 (Q+1,) and values int64 (V,).
        relevant_watch_s_V: float (V,), how long each of these views really lasted; NaN = unknown, left out.
        at: list lengths.

    Returns:
        `hit_watch_s@K`: float64 (Q,) each; NaN where nothing with a known watch time was hit.

    Raises:
        ValueError: if there is not one watch time a view.
    """
    _check_lengths(at)
    watch_V = np.asarray(relevant_watch_s_V, dtype=np.float64)
    query_V, value_V = _views(relevant, len(retrieved_QK))
    if watch_V.shape != value_V.shape:
        raise ValueError(f"{len(value_V)} relevant views, but {len(watch_V)} watch times")
    rank_V = first_ranks(retrieved_QK, relevant)
    metrics: dict[str, np.ndarray] = {}
    for k in at:
        hit_V = (rank_V < k) & np.isfinite(watch_V)
        sum_Q = np.bincount(query_V[hit_V], weights=watch_V[hit_V], minlength=len(retrieved_QK))
        metrics[f"hit_watch_s@{k}"] = _ratio(sum_Q, np.bincount(query_V[hit_V], minlength=len(retrieved_QK)))
    return metrics


def watch_buckets(watch_s: np.ndarray, edges_s: Sequence[float]) -> np.ndarray:
    """Bucket of each watch time: bucket b is [edges_s[b], edges_s[b + 1]), the last one open; -1 where it is unknown.

    `edges_s` are lower edges in seconds; an infinite last edge is the open end written out and adds no bucket. A
    watch time below the first edge belongs to the first bucket.
    """
    lower_B = lower_edges(edges_s)
    watch_s = np.asarray(watch_s, dtype=np.float64)
    bucket = np.maximum(np.searchsorted(lower_B, watch_s, side="right") - 1, 0)
    return np.where(np.isnan(watch_s), -1, bucket).astype(np.int64)


def lower_edges(edges_s: Sequence[float]) -> np.ndarray:
    """The lower edges of watch buckets as float64 (B,), without an infinite end.

    Raises:
        ValueError: if they do not rise strictly.
    """
    lower_B = np.asarray(edges_s, dtype=np.float64)
    lower_B = lower_B[:-1] if len(lower_B) and np.isposinf(lower_B[-1]) else lower_B
    if not len(lower_B) or not np.isfinite(lower_B).all() or (np.diff(lower_B) <= 0).any():
        raise ValueError(f"watch bucket edges must be finite and strictly rising, not {list(edges_s)}")
    return lower_B


def watch_histogram(item_row: np.ndarray, watch_s: np.ndarray, items: int, edges_s: Sequence[float]) -> np.ndarray:
    """How many known views of each item fall into each watch bucket: int64 (items, B).

    Views with a negative row (unknown item) or an unknown watch time are left out.

    Raises:
        ValueError: if a row is `items` or more.
    """
    item_row = np.asarray(item_row, dtype=np.int64)
    buckets = len(lower_edges(edges_s))
    bucket = watch_buckets(watch_s, edges_s)
    if (item_row >= items).any():
        raise ValueError(f"item row {int(item_row.max())} lies outside the {items} items")
    known = (item_row >= 0) & (bucket >= 0)
    flat = np.bincount(item_row[known] * buckets + bucket[known], minlength=items * buckets)
    return flat.reshape(items, buckets)


def control_curve(conditions_s: Sequence[float], retrieved_CQK: Sequence[np.ndarray], relevant: Ragged,
                  item_watch_s_N: np.ndarray, item_views_NB: np.ndarray, edges_s: Sequence[float],
                  at: int = 100) -> list[dict[str, float]]:
    """What the same requests get when they are asked for other watch times.

    With R(c) the first K items of every request under condition c (all requests pooled, an item retrieved by two
    requests counts twice), h(v, b) the test views of item v in watch bucket b, and b(c) the bucket that holds c:

        share(c', b)   = sum over v in R(c') of h(v, b) / sum over v in R(c') and all b' of h(v, b')
        bucket_lift(c) = share(c, b(c)) / mean over c' != c of share(c', b(c))

    A lift of 1 is a condition that changes nothing. Items without test views weigh nothing.

    Args:
        conditions_s: C watch times in seconds.
        retrieved_CQK: C arrays int64 (Q, K) of item ROWS for the same Q requests, -1 = missing.
        relevant: offsets int64 (Q+1,) and values int64 (V,), item rows.
        item_watch_s_N: float (N,), training watch time of the items in seconds.
        item_views_NB: int (N, B), test target views of each item by watch bucket (`watch_histogram`).
        edges_s: lower edges of the B buckets in seconds.
        at: K.

    Returns:
        For each condition `condition_s`, `retrieved_watch_s` (seconds, mean over requests), `recall@K`,
        `bucket_share`, `bucket_lift` and `n` (requests). NaN where it is not defined: no test views, one condition.

    Raises:
        ValueError: if the parts do not fit each other.
    """
    if len(conditions_s) != len(retrieved_CQK):
        raise ValueError(f"{len(conditions_s)} conditions, but {len(retrieved_CQK)} sets of lists")
    if item_views_NB.shape != (len(item_watch_s_N), len(lower_edges(edges_s))):
        raise ValueError(f"item_views_NB has shape {item_views_NB.shape}, expected "
                         f"({len(item_watch_s_N)}, {len(lower_edges(edges_s))})")
    share_CB = np.stack([_bucket_share(retrieved_QK[:, :at], item_views_NB) for retrieved_QK in retrieved_CQK])
    own_C = watch_buckets(np.asarray(conditions_s), edges_s)
    curve = []
    for c, (condition_s, retrieved_QK) in enumerate(zip(conditions_s, retrieved_CQK, strict=True)):
        share_C = share_CB[:, own_C[c]]
        others = _nanmean(np.delete(share_C, c))
        watch_Q = retrieved_watch_s(retrieved_QK, item_watch_s_N, [at])[f"retrieved_watch_s@{at}"]
        recall_Q = retrieval_metrics(retrieved_QK, relevant, [at])[f"recall@{at}"]
        curve.append({
            "condition_s": float(condition_s),
            "retrieved_watch_s": _nanmean(watch_Q),
            f"recall@{at}": _nanmean(recall_Q),
            "bucket_share": float(share_C[c]),
            "bucket_lift": float(share_C[c] / others) if others > 0 else float("nan"),
            "n": len(retrieved_QK),
        })
    return curve


def strictly_rising(curve: Sequence[float]) -> bool:
    """True where each value is above the one before; never for less than two values or an undefined one."""
    values = np.asarray(curve, dtype=np.float64)
    return bool(len(values) > 1 and np.isfinite(values).all() and (np.diff(values) > 0).all())


def value_range(curve: Sequence[float]) -> tuple[float, float]:
    """Least and greatest value, which stand beside every statement on order; NaN twice where none is defined."""
    values = np.asarray(curve, dtype=np.float64)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (float("nan"), float("nan"))


def bootstrap_ci(values_SQ: np.ndarray, user_Q: np.ndarray, samples: int = 1000,
                 seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95% interval of one metric; see `bootstrap_cis`, which does many at the price of one."""
    mean, low, high = bootstrap_cis(np.asarray(values_SQ)[None], user_Q, samples, seed)[0]
    return float(mean), float(low), float(high)


def bootstrap_cis(values_MSQ: np.ndarray, user_Q: np.ndarray, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means and 95% percentile intervals, resampling users (with all their queries) and seeds.

    A mean is the mean over seeds of each seed's mean over its defined queries. One draw of users serves all metrics
    and seeds, as the seeds answer the same queries.

    Args:
        values_MSQ: float (M, S, Q); NaN = not defined, left out.
        user_Q: (Q,), the cluster of each query; one value a query makes it a bootstrap over queries.
        samples: bootstrap samples.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        float64 (M, 3): mean, low, high. NaN three times for a metric that is defined nowhere.

    Raises:
        ValueError: if there is not one user a query.
    """
    values_MSQ = np.asarray(values_MSQ, dtype=np.float64)
    metrics, seeds, _ = values_MSQ.shape
    sum_UX, count_UX = _user_totals(values_MSQ.reshape(metrics * seeds, -1), user_Q)
    point_M = _mean_of_seeds(_ratio(sum_UX.sum(0), count_UX.sum(0)).reshape(1, metrics, seeds), np.ones((1, seeds)))[0]
    draws = [_mean_of_seeds(_ratio(weight_DU @ sum_UX, weight_DU @ count_UX).reshape(-1, metrics, seeds), seed_DS)
             for weight_DU, seed_DS in _resamples(len(sum_UX), seeds, samples, seed)]
    low_M, high_M = _percentiles(np.concatenate(draws))
    return np.stack([point_M, low_M, high_M], axis=1)


def paired_ci(a_SQ: np.ndarray, b_SQ: np.ndarray, user_Q: np.ndarray, samples: int = 1000,
              seed: int = 0) -> tuple[float, float, float]:
    """Relative gain mean(a) / mean(b) - 1 with its 95% interval; both sides see the same users and seeds.

    Queries where either side is not defined are left out of both. A side with one seed stands against all seeds of
    the other.

    Args:
        a_SQ: float (S, Q) or (1, Q).
        b_SQ: float (S, Q) or (1, Q), of the same queries.
        user_Q: (Q,), the cluster of each query.
        samples: bootstrap samples.
        seed: of the draws.

    Returns:
        gain, low, high; NaN where mean(b) is zero or nothing is defined.
    """
    gain = paired_cis(np.asarray(a_SQ)[None], np.asarray(b_SQ)[None], user_Q, samples, seed)[0]
    return float(gain[0]), float(gain[1]), float(gain[2])


def paired_cis(a_MSQ: np.ndarray, b_MSQ: np.ndarray, user_Q: np.ndarray, samples: int = 1000,
               seed: int = 0) -> np.ndarray:
    """`paired_ci` of many pairs at the price of one: float64 (M, 3), gain, low, high.

    Args:
        a_MSQ, b_MSQ: float (M, S, Q), or (M, 1, Q) for a side with one seed.
    """
    a_MSQ, b_MSQ = np.broadcast_arrays(np.asarray(a_MSQ, dtype=np.float64), np.asarray(b_MSQ, dtype=np.float64))
    both_MSQ = np.isfinite(a_MSQ) & np.isfinite(b_MSQ)
    pair_2MSQ = np.where(both_MSQ, np.stack([a_MSQ, b_MSQ]), np.nan)
    pairs, seeds, queries = a_MSQ.shape
    sum_UX, count_UX = _user_totals(pair_2MSQ.reshape(2 * pairs * seeds, queries), user_Q)

    def gain(sum_DX: np.ndarray, count_DX: np.ndarray, seed_DS: np.ndarray) -> np.ndarray:
        mean_D2M = _mean_of_seeds(_ratio(sum_DX, count_DX).reshape(-1, 2 * pairs, seeds), seed_DS)
        return _ratio(mean_D2M[:, :pairs], mean_D2M[:, pairs:]) - 1.0

    point_M = gain(sum_UX.sum(0)[None], count_UX.sum(0)[None], np.ones((1, seeds)))[0]
    draws = [gain(weight_DU @ sum_UX, weight_DU @ count_UX, seed_DS)
             for weight_DU, seed_DS in _resamples(len(sum_UX), seeds, samples, seed)]
    low_M, high_M = _percentiles(np.concatenate(draws))
    return np.stack([point_M, low_M, high_M], axis=1)


def _views(relevant: Ragged, queries: int) -> tuple[np.ndarray, np.ndarray]:
    offsets_Q1, value_V = np.asarray(relevant[0], dtype=np.int64), np.asarray(relevant[1])
    if len(offsets_Q1) != queries + 1 or offsets_Q1[0] != 0 or offsets_Q1[-1] != len(value_V):
        raise ValueError(f"offsets of {queries} queries must be {queries + 1} numbers from 0 to {len(value_V)}")
    if (np.diff(offsets_Q1) < 0).any():
        raise ValueError("offsets must not fall")
    return np.repeat(np.arange(queries), np.diff(offsets_Q1)), value_V


def _first_of_pairs(query_V: np.ndarray, value_V: np.ndarray) -> np.ndarray:
    distinct, code_V = np.unique(value_V, return_inverse=True)
    return np.unique(query_V * max(len(distinct), 1) + code_V, return_index=True)[1]


def _check_lengths(at: Sequence[int]) -> None:
    if min(at, default=0) < 1:
        raise ValueError(f"list lengths must be 1 or more, not {list(at)}")


def _item_rows(retrieved_QK: np.ndarray, items: int) -> np.ndarray:
    row_QK = np.asarray(retrieved_QK, dtype=np.int64)
    if row_QK.size and (row_QK.max() >= items or row_QK.min() < MISSING):
        raise ValueError(f"retrieved rows must lie in 0 .. {items - 1} (or be -1), "
                         f"not {int(row_QK.min())} .. {int(row_QK.max())}")
    return np.where(row_QK == MISSING, items, row_QK)


def _bucket_share(retrieved_QK: np.ndarray, item_views_NB: np.ndarray) -> np.ndarray:
    items = len(item_views_NB)
    times_N = np.bincount(_item_rows(retrieved_QK, items).ravel(), minlength=items + 1)[:items]
    views_B = times_N @ item_views_NB
    return _ratio(views_B, np.full(len(views_B), views_B.sum()))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=(below != 0) & np.isfinite(below))


def _nanmean(values: np.ndarray) -> float:
    finite = np.isfinite(values)
    return float(values[finite].mean()) if finite.any() else float("nan")


def _user_totals(values_XQ: np.ndarray, user_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(user_Q) != values_XQ.shape[1:]:
        raise ValueError(f"{values_XQ.shape[1]} queries, but users of shape {np.shape(user_Q)}")
    users, code_Q = np.unique(user_Q, return_inverse=True)
    clusters = len(users)
    if clusters > MOST_CLUSTERS:
        code_Q = np.random.default_rng(clusters).permutation(clusters)[code_Q] % MOST_CLUSTERS
        clusters = MOST_CLUSTERS
    finite_XQ = np.isfinite(values_XQ)
    sum_XU = [np.bincount(code_Q[f], weights=v[f], minlength=clusters)
              for v, f in zip(values_XQ, finite_XQ, strict=True)]
    count_XU = [np.bincount(code_Q[f], minlength=clusters) for f in finite_XQ]
    return np.stack(sum_XU, axis=1), np.stack(count_XU, axis=1).astype(np.float64)


def _resamples(users: int, seeds: int, samples: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each user (D, U) and each seed (D, S) is drawn, for D of the samples at a time."""
    user_DU, seed_DS = _draws(users, seeds, samples, seed)
    rows = max(1, _WEIGHTS_AT_ONCE // max(users, 1))
    for start in range(0, samples, rows):
        yield user_DU[start:start + rows].astype(np.float64), seed_DS[start:start + rows]


@lru_cache(maxsize=2)
def _draws(users: int, seeds: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The draws of all samples: one of 10,000 users is drawn a dozen times at most, so bytes hold them."""
    of_users, of_seeds = np.random.default_rng(seed).spawn(2)
    user_DU = np.empty((samples, users), dtype=np.uint8)
    for weight_U in user_DU:
        weight_U[:] = np.minimum(np.bincount(of_users.integers(0, max(users, 1), users), minlength=users), 255)
    return user_DU, of_seeds.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=samples)


def _mean_of_seeds(mean_DMS: np.ndarray, weight_DS: np.ndarray) -> np.ndarray:
    finite_DMS = np.isfinite(mean_DMS)
    weight_DMS = finite_DMS * weight_DS[:, None, :]
    return _ratio((np.where(finite_DMS, mean_DMS, 0.0) * weight_DMS).sum(-1), weight_DMS.sum(-1))


def _percentiles(draw_DM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low_M, high_M = np.full((2, draw_DM.shape[1]), np.nan)
    defined_M = np.isfinite(draw_DM).any(axis=0)
    if defined_M.any():
        low_M[defined_M], high_M[defined_M] = np.nanpercentile(draw_DM[:, defined_M], [2.5, 97.5], axis=0)
    return low_M, high_M
