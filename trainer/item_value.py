"""What each candidate is worth: p(item is among the user's next views), for every item that any trigger's list holds.

A trigger's list is worth what its items are. A trigger knows little of that by itself; all triggers of a request know
more together: an item that many lists hold, high up, is likelier to be watched next (item-to-item scores added up over
a history, as in Sarwar et al. 2001). A small network learns that from the training requests: votes, scores and places
of an item in the lists of each channel, how often the user saw it, and its own popularity and age as of the watermark.

Two uses, neither in the CAPTS paper: the expected hits of the first 5, 10, 20 and 50 items of a list are list-side
features of the router, and the joint assignment values every item once by this probability (Eq. 1). Everything it
reads was known before the request.

    <run_dir>/item_value/{model.safetensors, manifest.json}

Shape suffixes: R = requests, T = triggers, C = channels, K = candidates of all requests, F = features, N = vocabulary
rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

from configs.errors import InputError
from configs.schema import Config
from embeddings import elsewhere
from embeddings.snapshots import publish, verify
from embeddings.untrusted import damaged
from trainer.catalogue import Catalogue
from trainer.item_statistics import RECENT_H, StatisticsSnapshots
from trainer.labels import Labels
from trainer.neighbors import ChannelSnapshots
from trainer.replay import future_items
from trainer.sequences import SequenceShard, SequenceStore
from trainer.triggers import (
    RequestRule,
    TriggerRequests,
    is_future_view,
    request_hash,
    request_rule,
    trigger_requests,
)

FOLDER, MODEL = "item_value", "model.safetensors"
_AGAIN = "remove its folder and run watchtower train router again"
TOPS = (5, 10, 20, 50)  # prefixes of a list whose expected hits are features
POSITION_SCALE = 15.0  # positions in which a trigger's vote falls by e
RANK_SCALE = 10.0  # places of a list in which a vote falls to a half
REQUESTS_AT_ONCE = 128  # whose candidates are in memory at a time
HIDDEN, EPOCHS, RATE, DECAY = 32, 4, 3e-3, 0.01
BATCH, LEAST_STEPS = 8192, 600  # small logs are passed over more often, in smaller batches
NEGATIVE_SHARE = 0.05  # of the candidates that were not watched, in fitting; they weigh as many as they stand for
FITTED_ROWS = 6_000_000  # at most, so that memory stays bounded
FORMAT = 2


@dataclass(frozen=True)
class Candidates:
    """The distinct items of all lists of each request: request r has offset_R1[r] to offset_R1[r + 1].

    row_K: int32 vocabulary rows. feature_KF: float32.
    """

    offset_R1: np.ndarray
    row_K: np.ndarray
    feature_KF: np.ndarray

    @property
    def request_K(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.offset_R1) - 1), np.diff(self.offset_R1))


def feature_names(channels: tuple[str, ...]) -> list[str]:
    """Names of the columns of feature_KF."""
    of_lists = [f"{what}_{channel}" for what in ("votes", "score", "place") for channel in channels]
    return [*of_lists, "rows", "effective_rows", "triggers", "effective_views", "views", "effective_rank", "views_rank",
            "effective_share", *(f"effective_rank_{hours}h" for hours in RECENT_H),
            *(f"trend_{hours}h" for hours in RECENT_H), "age_h", "duration_s"]


def candidates(shard: SequenceShard, requests: TriggerRequests, snapshots: ChannelSnapshots,
               statistics: StatisticsSnapshots, catalogue: Catalogue, negatives: float = 1.0,
               future: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[Candidates, np.ndarray]:
    """The candidates of a shard's requests with their features.

    Args:
        negatives: share of the candidates that are not in the future, drawn by a hash of request and item.
        future: (offset_R1, row_V) of future_items, where labels are wanted.

    Returns:
        The candidates, and bool (K,), whether they are in the future (all false without one).
    """
    state_SC, state_R = snapshots.states(requests.time_ms_R)
    rows, channels = len(catalogue.item_id_N), len(snapshots.names)
    offset_V1, row_V = future if future is not None else (np.zeros(len(requests) + 1, np.int64), np.zeros(0, np.int32))
    count_R = np.zeros(len(requests), np.int64)
    found = []
    begin_E = shard.offset_U[requests.user_R]
    keep_below = np.uint64(min(negatives, 1.0) * (2**64 - 1)) if negatives < 1 else np.uint64(2**64 - 1)
    for state, state_C in enumerate(state_SC):
        at_R = np.flatnonzero(state_R == state)
        lists = [snapshots.lists(channel, int(number)) for channel, number in enumerate(state_C)]
        offsets_CN1 = np.stack([one.offset_N1 for one in lists])
        starts_C1 = np.concatenate([[0], np.cumsum([len(one.neighbor_L) for one in lists])]).astype(np.int64)
        neighbor_L = np.concatenate([one.neighbor_L for one in lists])
        score_L = np.concatenate([one.scaled_score_L for one in lists])
        known = statistics.of_state(snapshots, state_C)
        item_NF = known.profile_NF
        most = int(max((one.length_N.max() if len(one.neighbor_L) else 0) for one in lists))
        triggers_R = np.diff(requests.trigger_offset_R1)
        for first in range(0, len(at_R), REQUESTS_AT_ONCE):
            part_R = at_R[first:first + REQUESTS_AT_ONCE]
            room = int(np.minimum(triggers_R[part_R] * most * channels, rows).sum())
            row_K, label_K, feature_KF = (np.empty(room, np.int32), np.empty(room, np.bool_),
                                          np.empty((room, 3 * channels + 3), np.float32))
            kept = _candidates(
                part_R, requests.trigger_offset_R1, requests.trigger_row_T, requests.position_T, begin_E,
                requests.history_end_R, shard.item_row_E, shard.is_effective_E, offsets_CN1, starts_C1, neighbor_L,
                score_L, offset_V1, row_V, requests.user_id_R ^ requests.time_ms_R, keep_below, rows, row_K, label_K,
                feature_KF, count_R)
            row_K = row_K[:kept].copy()
            hours_K = np.repeat(requests.time_ms_R[part_R], count_R[part_R]) - known.first_seen_ms_N[row_K]
            age_K = np.log1p(np.maximum(hours_K, 0) / 3.6e6)
            seen_K = known.views_N[row_K] > 0
            features = [np.log1p(feature_KF[:kept]), item_NF[row_K], np.where(seen_K, age_K, 0.0)[:, None],
                        np.log1p(np.nan_to_num(catalogue.duration_s_N[row_K]))[:, None]]
            found.append((part_R, row_K, label_K[:kept].copy(), np.concatenate(features, axis=1).astype(np.float32)))
    return _in_order(found, count_R, len(feature_names(tuple(snapshots.names))))


def _in_order(found, count_R: np.ndarray, width: int) -> tuple[Candidates, np.ndarray]:
    """Joins the pieces of all states by request."""
    offset_R1 = np.concatenate([[0], np.cumsum(count_R)]).astype(np.int64)
    row_K, label_K = np.empty(offset_R1[-1], np.int32), np.empty(offset_R1[-1], bool)
    feature_KF = np.empty((offset_R1[-1], width), np.float32)
    for part_R, rows, labels, features in found:
        count = count_R[part_R]
        begin = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int64)
        at_K = np.arange(len(rows)) + np.repeat(offset_R1[part_R] - begin, count)
        row_K[at_K], label_K[at_K], feature_KF[at_K] = rows, labels, features
    return Candidates(offset_R1, row_K, feature_KF), label_K


class ItemValue(nn.Module):
    """Features to the logit of p(item is watched next): standardised, one hidden layer."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(width))
        self.register_buffer("std_F", torch.ones(width))
        self.inner, self.out = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, feature_KF: torch.Tensor) -> torch.Tensor:
        """float (K,)."""
        return self.out(F.gelu(self.inner((feature_KF - self.mean_F) / self.std_F))).squeeze(1)

    def values(self, found: Candidates) -> np.ndarray:
        """float32 (K,): the probability of each candidate."""
        out_K = np.empty(len(found.row_K), np.float32)
        with torch.no_grad():
            for first in range(0, len(out_K), 1 << 18):
                part = torch.from_numpy(found.feature_KF[first:first + (1 << 18)])
                out_K[first:first + len(part)] = torch.sigmoid(self(part)).numpy()
        return out_K


def fit_item_value(config: Config, run_dir: Path, fitted_users) -> dict[str, float]:
    """Fit the network on the training requests, once, and publish it; one that is there for the same inputs stays.

    Args:
        fitted_users: user ids to bool, the training users whose requests are fitted.

    Returns:
        requests, rows, positive_share, log_loss (of the last epoch), for the log.

    Raises:
        InputError: if no list of any training request holds a later view.
    """
    store, run_dir = SequenceStore(run_dir / "sequences"), Path(run_dir)
    snapshots = ChannelSnapshots(run_dir / "channels", config.channels, store.vocabulary, labelled_channels(run_dir))
    fingerprint = _fingerprint(config, run_dir, snapshots)
    target = run_dir / FOLDER
    elsewhere.bring(target / "manifest.json")
    if (target / "manifest.json").exists() and verify(target).get("fingerprint") == fingerprint:
        return verify(target)["fitted"]
    statistics = StatisticsSnapshots(run_dir / "channels", config.channels, store.vocabulary)
    rule = request_rule(config, store.manifest, "train")
    features, labels, keys, requests_seen = [], [], [], 0
    limit = _hash_limit(store, rule, config, fitted_users, len(snapshots.names))
    for shard, requests in _fitted(store, rule, config, fitted_users, limit):
        future = future_items(shard, requests, is_future_view(shard, rule), config.replay.window)
        for first in range(0, len(requests), REQUESTS_AT_ONCE):
            at_R = np.arange(first, min(first + REQUESTS_AT_ONCE, len(requests)))
            part = requests.take(at_R)
            bounds_R1 = future.offset_R1[first:at_R[-1] + 2]
            row_V = future.row_V[bounds_R1[0]:bounds_R1[-1]]
            found, label_K = candidates(shard, part, snapshots, statistics, store.catalogue, NEGATIVE_SHARE,
                                        (bounds_R1 - bounds_R1[0], row_V))
            features.append(found.feature_KF)
            labels.append(label_K)
            keys.append(np.stack([found.row_K.astype(np.int64), request_hash(part).view(np.int64)[found.request_K]]))
        requests_seen += len(requests)
    feature_KF = np.concatenate(features) if features else np.zeros((0, 1), np.float32)
    features.clear()
    label_K = np.concatenate(labels) if labels else np.zeros(0, bool)
    if not label_K.any():
        raise InputError("item value: no list of any training request holds a later view of its user; look at "
                         "channels.names and replay.requests (times, min_future)")
    # In an order of their own, so that the number of shards changes nothing.
    order_K = np.lexsort(np.concatenate(keys, axis=1))
    feature_KF, label_K = feature_KF[order_K], label_K[order_K]
    model, loss = _fit(feature_KF, label_K, seed=config.routing.seed)
    fitted = {"requests": requests_seen, "rows": len(label_K), "log_loss": round(loss, 6),
              "positive_share": round(float(label_K.sum() / _weights(label_K).sum()), 6)}
    arrays = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    publish(target, lambda folder: save_file(arrays, folder / MODEL), {
        "fingerprint": fingerprint, "channels": list(snapshots.names), "fitted": fitted,
        "features": feature_names(tuple(snapshots.names))}, replace=True)
    return fitted


def load_item_value(run_dir: Path) -> ItemValue:
    """The published network.

    Raises:
        WatchtowerError: if it is missing or damaged.
    """
    folder = Path(run_dir) / FOLDER
    features = verify(folder, MODEL).get("features")
    if not isinstance(features, list):
        raise damaged(folder, ValueError("its manifest names no features"), _AGAIN)
    try:
        saved = {name: torch.from_numpy(value) for name, value in load_file(folder / MODEL).items()}
        model = ItemValue(len(features))
        model.load_state_dict(saved)
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        raise damaged(folder / MODEL, error, _AGAIN) from error
    return model.eval()


def labelled_channels(run_dir: Path) -> list[str]:
    """The channels that the labels were made of, in their order."""
    return list(Labels.open(Path(run_dir) / "labels").channels)


def _fingerprint(config: Config, run_dir: Path, snapshots: ChannelSnapshots) -> str:
    labels = hashlib.sha256((run_dir / "labels" / "manifest.json").read_bytes()).hexdigest()
    parts = [FORMAT, labels, snapshots.names, config.routing.seed, config.router.validation_share]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _fitted(store: SequenceStore, rule: RequestRule, config: Config, fitted_users, hash_limit: np.uint64
            ) -> Iterator[tuple[SequenceShard, TriggerRequests]]:
    """Each shard with its fitted requests whose hash is not above the limit."""
    for number in range(store.shards):
        shard = store.open(number)
        requests = trigger_requests(shard, number, rule, config)
        requests = requests.take(np.asarray(fitted_users(requests.user_id_R)) & (request_hash(requests) <= hash_limit))
        if len(requests):
            yield shard, requests


def _hash_limit(store: SequenceStore, rule: RequestRule, config: Config, fitted_users, channels: int) -> np.uint64:
    """The hash of the last request that is fitted: as many, drawn at random, as FITTED_ROWS has room for."""
    everything = np.uint64(2**64 - 1)
    hashes, triggers = [], 0
    for _, requests in _fitted(store, rule, config, fitted_users, everything):
        hashes.append(request_hash(requests))
        triggers += len(requests.trigger_row_T)
    # At most; lists of one request share items, so that there are some 0.4 of these rows.
    rows = 0.4 * NEGATIVE_SHARE * triggers * channels * config.channels.top
    if rows <= FITTED_ROWS:
        return everything
    hash_R = np.sort(np.concatenate(hashes))
    return hash_R[max(0, int(len(hash_R) * FITTED_ROWS / rows) - 1)]


def _weights(label_K: np.ndarray) -> np.ndarray:
    return np.where(label_K, 1.0, 1.0 / NEGATIVE_SHARE).astype(np.float32)


def _fit(feature_KF: np.ndarray, label_K: np.ndarray, seed: int) -> tuple[ItemValue, float]:
    """Weighted logistic loss, AdamW; the same numbers for the same rows and seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the steps are tiny, and the sums shall not depend on the machine's cores
    try:
        return _fitted_network(feature_KF, label_K, seed)
    finally:
        torch.set_num_threads(threads)


def _fitted_network(feature_KF: np.ndarray, label_K: np.ndarray, seed: int) -> tuple[ItemValue, float]:
    generator = torch.Generator().manual_seed(seed)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = ItemValue(feature_KF.shape[1])
    torch.random.set_rng_state(state)
    x, y = torch.from_numpy(feature_KF), torch.from_numpy(label_K.astype(np.float32))
    weight = torch.from_numpy(_weights(label_K))
    model.mean_F.copy_(x.mean(dim=0))
    model.std_F.copy_(x.std(dim=0, correction=0).clamp(min=1e-4))
    with torch.no_grad():  # the base rate, so that the first steps are not spent on it
        model.out.bias.fill_(torch.logit((y * weight).sum() / weight.sum()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    batch = min(BATCH, max(256, len(y) // 64))
    each = -(-len(y) // batch)
    epochs = max(EPOCHS, -(-LEAST_STEPS // each))
    steps = epochs * each
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / steps))
    loss_sum = weight_sum = 0.0
    for _ in range(epochs):
        loss_sum = weight_sum = 0.0
        order = torch.randperm(len(y), generator=generator)
        for at in order.split(batch):
            loss = F.binary_cross_entropy_with_logits(model(x[at]), y[at], weight=weight[at], reduction="sum")
            optimizer.zero_grad()
            (loss / weight[at].sum()).backward()
            optimizer.step()
            schedule.step()
            loss_sum, weight_sum = loss_sum + float(loss.detach()), weight_sum + float(weight[at].sum())
    return model.eval(), loss_sum / weight_sum


def expected_hits(found: Candidates, value_K: np.ndarray, requests: TriggerRequests, snapshots: ChannelSnapshots,
                  rows: int, tops: tuple[int, ...] = TOPS) -> np.ndarray:
    """float32 (T, C, len(tops)): the sum of the values of the first items of each trigger's lists.

    Args:
        rows: N.
    """
    state_SC, state_R = snapshots.states(requests.time_ms_R)
    out_TCP = np.zeros((len(requests.trigger_row_T), len(snapshots.names), len(tops)), np.float32)
    for state, state_C in enumerate(state_SC):
        at_R = np.flatnonzero(state_R == state)
        for channel, number in enumerate(state_C):
            lists = snapshots.lists(channel, int(number))
            _expected_hits(at_R, requests.trigger_offset_R1, requests.trigger_row_T, lists.offset_N1, lists.neighbor_L,
                           found.offset_R1, found.row_K, value_K, np.asarray(tops, np.int64),
                           np.zeros(rows, np.float32), out_TCP[:, channel])
    return out_TCP


# ------------------------------------------------------------------------------------------------------- the kernels

@numba.njit(cache=True, nogil=True)
def splitmix64(x):  # pragma: no cover - compiled
    """A 64-bit mix of x (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _candidates(part_R, trigger_offset_R1, trigger_row_T, position_T, begin_R, history_end_R, item_row_E,
                is_effective_E, offsets_CN1, starts_C1, neighbor_L, score_L, offset_V1, row_V, key_R, keep_below, rows,
                row_K, label_K, feature_KF, count_R):  # pragma: no cover - compiled
    """Fills row_K, label_K, feature_KF for the requests of part_R in their order; returns how many rows."""
    channels = len(offsets_CN1)
    width = 3 * channels + 3
    sum_NF = np.zeros((rows, width), np.float32)
    is_found_N = np.zeros(rows, np.bool_)
    is_future_N = np.zeros(rows, np.bool_)
    found = np.empty(rows, np.int32)
    kept = 0
    for r in part_R:
        count = 0
        triggers = trigger_offset_R1[r + 1] - trigger_offset_R1[r]
        for v in range(offset_V1[r], offset_V1[r + 1]):
            is_future_N[row_V[v]] = True
        for t in range(trigger_offset_R1[r], trigger_offset_R1[r + 1]):
            near = np.exp(-(position_T[t] - 1) / POSITION_SCALE)
            for c in range(channels):
                begin = offsets_CN1[c, trigger_row_T[t]]
                for place in range(begin, offsets_CN1[c, trigger_row_T[t] + 1]):
                    j = neighbor_L[starts_C1[c] + place]
                    if not is_found_N[j]:
                        is_found_N[j] = True
                        found[count] = j
                        count += 1
                    sum_NF[j, c] += 1
                    sum_NF[j, channels + c] += score_L[starts_C1[c] + place]
                    sum_NF[j, 2 * channels + c] += near / (1 + (place - begin) / RANK_SCALE)
        for event in range(begin_R[r], history_end_R[r]):
            j = item_row_E[event]
            if is_found_N[j]:
                sum_NF[j, 3 * channels] += 1
                sum_NF[j, 3 * channels + 1] += is_effective_E[event]
        before = kept
        for k in range(count):
            j = found[k]
            if is_future_N[j] or splitmix64(np.uint64(key_R[r]) ^ splitmix64(np.uint64(j))) <= keep_below:
                row_K[kept], label_K[kept] = j, is_future_N[j]
                feature_KF[kept, :] = sum_NF[j]
                feature_KF[kept, 3 * channels + 2] = triggers
                kept += 1
            is_found_N[j] = False
            sum_NF[j, :] = 0
        count_R[r] = kept - before
        for v in range(offset_V1[r], offset_V1[r + 1]):
            is_future_N[row_V[v]] = False
    return kept


@numba.njit(cache=True, nogil=True)
def _expected_hits(at_R, trigger_offset_R1, trigger_row_T, offset_N1, neighbor_L, offset_R1, row_K, value_K, tops,
                   value_N, out_TP):  # pragma: no cover - compiled
    """Sums of the values of list prefixes. Scratch: value_N, zeros."""
    for r in at_R:
        for k in range(offset_R1[r], offset_R1[r + 1]):
            value_N[row_K[k]] = value_K[k]
        for t in range(trigger_offset_R1[r], trigger_offset_R1[r + 1]):
            begin, end = offset_N1[trigger_row_T[t]], offset_N1[trigger_row_T[t] + 1]
            for p in range(len(tops)):
                total = np.float32(0)
                for place in range(begin, min(end, begin + tops[p])):
                    total += value_N[neighbor_L[place]]
                out_TP[t, p] = total
        for k in range(offset_R1[r], offset_R1[r + 1]):
            value_N[row_K[k]] = 0
