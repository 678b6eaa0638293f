"""Logistic regression on pair features over the channel's own candidates, the co-viewed pairs (the role of SimLR).

The candidates of an item are the items that stand most often within `window` effective views of it. What is learnt, on
the users with a view in the last `label_h` hours before the watermark (the label period):

    P(u watches j in the label period | u watched i before it) = sigmoid(b + x_ij . beta)

one trial for each such user and candidate pair, so each pair is a binomial count. Features of the fit are counted
before the label period alone; then the same features, counted up to the watermark, score the candidates that are
published. All of it lies before the watermark. Re-ranking other channels' lists would leave nothing unique to this one.

The fit is Newton's method (iteratively reweighted least squares) on standardized features with a ridge of 1, which has
one maximum. Where the label period has no success at all, the conditional share of co-views ranks instead, and the
manifest says `fitted: false`.

Shape suffixes: P = candidate pairs, X = features, U = users, N = vocabulary rows.
"""

from __future__ import annotations

import numba
import numpy as np

from configs.schema import ChannelsConfig, PairwiseLrConfig
from trainer.catalogue import Catalogue
from trainer.channels.blocks import near_pairs
from trainer.channels.channel import Built, Given
from trainer.co_views import HOUR_MS, CoViews
from trainer.neighbors import top_neighbors
from trainer.sequences import user_hash

FEATURES = ("log_co_views", "cosine", "ppmi", "conditional", "log_users_item", "log_users_neighbor", "same_author",
            "tag_overlap", "duration_difference", "duration_known", "nearness", "later_share")
RIDGE, NEWTON_STEPS = 1.0, 50
SCORED_AT_ONCE = 4_000_000  # pairs


class PairwiseLr:
    name = "pairwise-lr"

    def section(self, config: ChannelsConfig) -> PairwiseLrConfig:
        return config.pairwise_lr

    def lacks(self, store) -> None:
        return None

    def sources(self, watermark_ms, given) -> dict:
        return {}

    def build(self, views: CoViews, given: Given) -> Built:
        config, catalogue = given.config.pairwise_lr, given.catalogue
        label_ms = views.watermark_ms - round(config.label_h * HOUR_MS)
        before, labels = views.between(None, label_ms), views.between(label_ms, views.watermark_ms)
        item_P, neighbor_P, co_views_P = candidates(before, config, given.threads)
        trials_P, successes_P = count_labels(before, labels, item_P, neighbor_P)
        sample = _sampled(np.flatnonzero(trials_P), item_P, neighbor_P, config)
        facts = {"candidate_pairs": len(item_P), "fitted_pairs": len(sample),
                 "trials": int(trials_P[sample].sum()), "successes": int(successes_P[sample].sum())}
        fitted = 0 < facts["successes"] < facts["trials"]
        if fitted:
            x_PX = pair_features(before, catalogue, config.window, item_P[sample], neighbor_P[sample],
                                 co_views_P[sample])
            mean_X, scale_X = x_PX.mean(0), np.maximum(x_PX.std(0), 1e-9)
            beta = fit_binomial((x_PX - mean_X) / scale_X, trials_P[sample], successes_P[sample])
        item_P, neighbor_P, co_views_P = candidates(views, config, given.threads)
        score_P = np.empty(len(item_P))
        for part in _item_slices(item_P):
            x_PX = pair_features(views, catalogue, config.window, item_P[part], neighbor_P[part], co_views_P[part])
            score_P[part] = (_sigmoid(beta[0] + ((x_PX - mean_X) / scale_X) @ beta[1:]) if fitted
                             else x_PX[:, FEATURES.index("conditional")])
        if fitted:
            facts["coefficients"] = {name: float(f"{b:.6g}") for name, b in zip(("intercept", *FEATURES), beta,
                                                                                strict=True)}
        lists = top_neighbors(item_P, neighbor_P, score_P, views.rows, given.config.top)
        return Built(lists, facts | {"fitted": fitted})


def candidates(views: CoViews, config: PairwiseLrConfig, threads: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(item, neighbor int32 (P,), co-views float64 (P,)), by item: its most co-viewed items."""
    return near_pairs(views.offset_U1, views.item_V, views.rows, config.window, top=config.candidates, threads=threads)


def pair_features(views: CoViews, catalogue: Catalogue, window: int, item_P: np.ndarray, neighbor_P: np.ndarray,
                  co_views_P: np.ndarray) -> np.ndarray:
    """float64 (P, X), the columns of FEATURES. Pairs must stand together by item; unknown catalogue features are 0.

    cosine: co-views / sqrt(users of both). ppmi: over views, not shifted. conditional: co-views / views of the item.
    nearness: mean 1 / gap of the co-views. later_share: those with the neighbour after the item.
    """
    views_N, users_N = views.views_N, views.users_N
    nearness_P, later_P = _gaps(_offsets(item_P, views.rows), neighbor_P, *_occurrences(views), views.offset_U1,
                                views.item_V, window)
    author_N, duration_N = catalogue.author_row_N, catalogue.duration_s_N.astype(np.float64)
    author = (author_N[item_P] > 0) & (author_N[item_P] == author_N[neighbor_P])
    with np.errstate(invalid="ignore"):
        difference_P = np.abs(np.log1p(duration_N[item_P]) - np.log1p(duration_N[neighbor_P]))
    known_P = np.isfinite(difference_P)
    total = 2.0 * window * max(len(views.item_V), 1)
    pmi_P = np.log(co_views_P * total / (4.0 * window**2 * views_N[item_P] * views_N[neighbor_P]))
    return np.stack([
        np.log1p(co_views_P), co_views_P / np.sqrt(users_N[item_P] * users_N[neighbor_P].astype(np.float64)),
        np.maximum(pmi_P, 0), co_views_P / views_N[item_P], np.log1p(users_N[item_P]), np.log1p(users_N[neighbor_P]),
        author, _tag_overlap(catalogue.tag_offsets_N1, catalogue.tag_rows, item_P, neighbor_P),
        np.where(known_P, difference_P, 0), known_P, nearness_P / co_views_P, later_P / co_views_P], axis=1)


def count_labels(before: CoViews, labels: CoViews, item_P: np.ndarray, neighbor_P: np.ndarray
                 ) -> tuple[np.ndarray, np.ndarray]:
    """int64 (P,) trials and successes: users of the item before the label period who have a view in it, and those of
    them who watch the neighbour in it. Pairs must stand together by item."""
    label_user_U = np.full(len(before.user_id_U), -1, np.int64)
    _, at_before, at_labels = np.intersect1d(before.user_id_U, labels.user_id_U, return_indices=True)
    label_user_U[at_before] = at_labels
    return _labels(_offsets(item_P, before.rows), neighbor_P, before.user_offset_N1, before.user_P, label_user_U,
                   labels.pair_offset_U1, labels.item_P)


def fit_binomial(x_PX: np.ndarray, trials_P: np.ndarray, successes_P: np.ndarray) -> np.ndarray:
    """float64 (1 + X,), intercept first: the most likely coefficients of successes ~ Binomial(trials, sigmoid(b + x .
    beta)) with a ridge on all but the intercept.

    Raises:
        ValueError: unless there are some successes and some failures.
    """
    successes, trials = float(successes_P.sum()), float(trials_P.sum())
    if not 0 < successes < trials:
        raise ValueError(f"{successes} successes in {trials} trials: the intercept would be infinite")
    x = np.concatenate([np.ones((len(x_PX), 1)), x_PX], axis=1)
    ridge = np.full(x.shape[1], RIDGE)
    ridge[0] = 0.0
    beta = np.zeros(x.shape[1])
    beta[0] = np.log(successes / (trials - successes))

    def loss(b: np.ndarray) -> float:
        logit = x @ b
        return float((trials_P * np.logaddexp(0, logit) - successes_P * logit).sum() + 0.5 * (ridge * b * b).sum())

    at = loss(beta)
    for _ in range(NEWTON_STEPS):
        p_P = _sigmoid(x @ beta)
        gradient = x.T @ (trials_P * p_P - successes_P) + ridge * beta
        hessian = (x * (trials_P * p_P * (1 - p_P))[:, None]).T @ x + np.diag(ridge + 1e-9)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while (now := loss(beta - size * step)) > at and size > 1e-6:
            size /= 2
        if now >= at - 1e-10 * abs(at):
            break
        beta, at = beta - size * step, now
    return beta


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -500, 500)))


def _sampled(at: np.ndarray, item_P: np.ndarray, neighbor_P: np.ndarray, config: PairwiseLrConfig) -> np.ndarray:
    """At most config.pairs of these pairs, those of the lowest seeded hash, in their order."""
    if len(at) <= config.pairs:
        return at
    hashed = user_hash((item_P[at].astype(np.int64) << 32) | neighbor_P[at], config.seed)
    return np.sort(at[np.argsort(hashed, kind="stable")[:config.pairs]])


def _item_slices(item_P: np.ndarray) -> list[slice]:
    """Slices of whole items of about SCORED_AT_ONCE pairs, so that features of all pairs never lie in memory."""
    starts = np.flatnonzero(np.diff(item_P, prepend=-1))
    chosen = starts[np.flatnonzero(np.diff(starts // SCORED_AT_ONCE, prepend=-1))]
    edges = [*chosen.tolist(), len(item_P)]
    return [slice(begin, end) for begin, end in zip(edges[:-1], edges[1:], strict=True)]


def _offsets(item_P: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(item_P, minlength=rows))]).astype(np.int64)


def _occurrences(views: CoViews) -> tuple[np.ndarray, np.ndarray]:
    """The places of each item among the views: offsets (N + 1,) and places (V,)."""
    return _offsets(views.item_V, views.rows), np.argsort(views.item_V, kind="stable")


@numba.njit(cache=True, nogil=True)
def _gaps(pair_offset_N1, neighbor_P, first_N1, by_item_V, offset_U1, item_V, window):  # pragma: no cover - compiled
    """(sum of 1 / gap, co-views with the neighbour later) of each pair."""
    rows = len(first_N1) - 1
    pair_of_N = np.full(rows, -1, np.int64)
    nearness_P, later_P = np.zeros(len(neighbor_P)), np.zeros(len(neighbor_P))
    for item in range(1, rows):
        if pair_offset_N1[item] == pair_offset_N1[item + 1]:
            continue
        for p in range(pair_offset_N1[item], pair_offset_N1[item + 1]):
            pair_of_N[neighbor_P[p]] = p
        for k in range(first_N1[item], first_N1[item + 1]):
            at = by_item_V[k]
            user = np.searchsorted(offset_U1, at, side="right") - 1
            for q in range(max(offset_U1[user], at - window), min(offset_U1[user + 1], at + window + 1)):
                pair = pair_of_N[item_V[q]]
                if pair >= 0 and q != at:
                    nearness_P[pair] += 1.0 / abs(q - at)
                    later_P[pair] += q > at
        for p in range(pair_offset_N1[item], pair_offset_N1[item + 1]):
            pair_of_N[neighbor_P[p]] = -1
    return nearness_P, later_P


@numba.njit(cache=True, nogil=True)
def _labels(pair_offset_N1, neighbor_P, user_offset_N1, user_P, label_user_U, label_offset_U1, label_item_P):  # pragma: no cover - compiled # noqa: E501
    rows = len(user_offset_N1) - 1
    pair_of_N = np.full(rows, -1, np.int64)
    trials_P, successes_P = np.zeros(len(neighbor_P), np.int64), np.zeros(len(neighbor_P), np.int64)
    for item in range(1, rows):
        if pair_offset_N1[item] == pair_offset_N1[item + 1]:
            continue
        for p in range(pair_offset_N1[item], pair_offset_N1[item + 1]):
            pair_of_N[neighbor_P[p]] = p
        trials = 0
        for k in range(user_offset_N1[item], user_offset_N1[item + 1]):
            user = label_user_U[user_P[k]]
            if user < 0:
                continue
            trials += 1
            for q in range(label_offset_U1[user], label_offset_U1[user + 1]):
                pair = pair_of_N[label_item_P[q]]
                if pair >= 0:
                    successes_P[pair] += 1
        for p in range(pair_offset_N1[item], pair_offset_N1[item + 1]):
            trials_P[p] = trials
            pair_of_N[neighbor_P[p]] = -1
    return trials_P, successes_P


@numba.njit(cache=True, nogil=True)
def _tag_overlap(tag_offsets_N1, tag_rows, item_P, neighbor_P):  # pragma: no cover - compiled
    """Shared tags over the tags of both; 0 where neither has any."""
    overlap_P = np.zeros(len(item_P))
    for p in range(len(item_P)):
        a0, a1 = tag_offsets_N1[item_P[p]], tag_offsets_N1[item_P[p] + 1]
        b0, b1 = tag_offsets_N1[neighbor_P[p]], tag_offsets_N1[neighbor_P[p] + 1]
        shared = 0
        for a in range(a0, a1):
            for b in range(b0, b1):
                shared += tag_rows[a] == tag_rows[b]
        if shared:
            overlap_P[p] = shared / (a1 - a0 + b1 - b0 - shared)
    return overlap_P
