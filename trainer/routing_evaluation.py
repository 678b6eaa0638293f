"""One shard's test requests under every selector and budget: what each would have retrieved, what of it was watched.

Requests go through in blocks, so that what is held at a time does not grow with the shard. A shard's result is one
number a request and measure; the picks under the largest budget stand beside it, as rows of routing/<selector>.parquet.

Measures of all selectors:
    overall.recall@K                  each channel's first K, united (`all`: no cut); the share of F_W's items found
    overall.hit_watch_s@K             mean watch time of the views found, seconds
    overall.tags_covered@K            distinct tags of the items found, over those of all
    overall.trigger_overlap           share of the triggers that `recent` would take
    overall.recall_from.<positions>   recall@all, parted by the position of the trigger that found the item
    overall.window=<W>.recall@K       against F_W, for the windows of the sensitivity table
    overall.union@K                   how many distinct items each channel's first K are, united
    overall.recall_equal_length@K     recall of that union, dealt out in turn, cut to the length of `recent`'s union
                                      where it is longer; .recent_equal_length@K: of `recent`, cut to the length of the
                                      selector's where that is shorter. Where all items are alike a longer list finds
                                      more, and these two do not.
    <channel>.recall@K, .uniq@K, .trigger_overlap     the same of one channel; Uniq@K of CAPTS 4.3.1, a reading

Shape suffixes: R = requests, T = triggers, C = channels, B = budget, L = places of a list, F = future items, M =
measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import InputError
from configs.schema import Config
from embeddings import elsewhere
from embeddings.snapshots import read_manifest, verify_file
from embeddings.untrusted import damaged, open_parquet
from trainer import routing
from trainer.channels import absent_channels, present_channels
from trainer.item_statistics import StatisticsSnapshots
from trainer.item_value import FOLDER, ItemValue, load_item_value
from trainer.neighbors import ChannelSnapshots
from trainer.replay import future_items, hits, rewards_ms
from trainer.results import headline_length
from trainer.routing import NEVER, NONE, Future, Ranked
from trainer.selectors import POPULAR, Block, Selector, TrainingShard
from trainer.sequences import SequenceStore
from trainer.trigger_features import trigger_table
from trainer.triggers import (
    HOUR_MS,
    RequestRule,
    TriggerRequests,
    is_future_view,
    is_validation_user,
    request_hash,
    request_rule,
    trigger_requests,
)

SCORES, VALIDATION = "scores.parquet", "validation.parquet"  # of a router: test requests, validation requests
BLOCK_REQUESTS = 512
POSITION_BANDS = (1, 6, 11, 21)  # first positions
JOINT = "-joint"
# The joint assignment: place l of a list (from 0) counts 1 / (1 + l / depth) of its item's value, so that the first K
# are covered before the rest. Items count by their greatest chance: what several channels bring counts once.
JOINT_DEPTH = 10.0
# What routing.overlap is chosen from; how many standard errors of the paired difference the best of them must lie above
# 0, which is the paper's own rule, to be taken in its place (the best of eight lies two above by chance); and from
# how many users on an error can be told.
OVERLAPS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
OVERLAP_ERRORS, OVERLAP_USERS = 3.0, 30
# How far the router's own view of a list scales the values of its items, and by how much at most.
JOINT_TRUST, JOINT_FACTOR = 0.25, 4.0


@dataclass
class Run:
    """A run folder as the judgement reads it: sequences, snapshots and item statistics, opened where they are used."""

    config: Config
    folder: Path

    @cached_property
    def store(self) -> SequenceStore:
        return SequenceStore(self.folder / "sequences")

    @cached_property
    def snapshots(self) -> ChannelSnapshots:
        folder = self.folder / "channels"
        return ChannelSnapshots(folder, self.config.channels, self.store.vocabulary,
                                present_channels(self.config, self.store, folder))

    @cached_property
    def statistics(self) -> StatisticsSnapshots:
        return StatisticsSnapshots(self.folder / "channels", self.config.channels, self.store.vocabulary)

    @cached_property
    def absent_channels(self) -> dict[str, str]:
        """Of channels.names, those that are not there, and why."""
        return {name: reason for name, reason in absent_channels(self.config, self.store).items()
                if name not in self.snapshots.names}

    @cached_property
    def item_value(self) -> ItemValue | None:
        elsewhere.bring(self.folder / FOLDER / "manifest.json")
        return load_item_value(self.folder) if (self.folder / FOLDER / "manifest.json").exists() else None

    def rule(self, side) -> RequestRule:
        return request_rule(self.config, self.store.manifest, side)

    def requests(self, number: int, side) -> TriggerRequests:
        return trigger_requests(self.store.open(number), number, self.rule(side), self.config)

    def blocks(self, number: int, requests: TriggerRequests, side) -> Iterator[tuple[TriggerRequests, Block]]:
        """The requests of a shard in blocks, with their features and true forward values."""
        shard, rule, config = self.store.open(number), self.rule(side), self.config
        is_future_E = is_future_view(shard, rule)
        for begin in range(0, len(requests), BLOCK_REQUESTS):
            part = requests.take(np.arange(begin, min(begin + BLOCK_REQUESTS, len(requests))))
            reward_ms_TC = rewards_ms(shard, part, is_future_E, self.snapshots, [config.replay.window],
                                      config.replay.null_watch_s)[0]
            table = trigger_table(shard, part, rule, self.snapshots, self.statistics, self.store.catalogue, config)
            yield part, Block(table, shard, self.snapshots, config, self.store.vocabulary.rows, reward_ms_TC,
                              self.statistics, self.store.catalogue, self.item_value)


# --------------------------------------------------------------------------------------------------------- training

def training_part(run: Run, number: int) -> list[TrainingShard]:
    """What the training requests of a shard teach selectors, in blocks."""
    config, shard, rule = run.config, run.store.open(number), run.rule("train")
    is_future_E = is_future_view(shard, rule)
    channels, window = len(run.snapshots.names), config.replay.window
    found = []
    for requests, block in run.blocks(number, run.requests(number, "train"), "train"):
        shape_TC = (len(requests.trigger_row_T), channels)
        next_TC = np.diff(hits(shard, requests, is_future_E, run.snapshots, 1).offset_TC1).reshape(shape_TC) > 0
        future = future_items(shard, requests, is_future_E, window, config.replay.null_watch_s)
        future_ms_R = np.add.reduceat(np.append(future.watch_ms_V, 0), future.offset_R1[:-1])
        future_ms_R[np.diff(future.offset_R1) == 0] = 0
        found.append(TrainingShard(block.table, next_TC, block.reward_ms_TC, future_ms_R, request_hash(requests)))
    return found


# ---------------------------------------------------------------------------------------------------- router scores

def score_schema(channels: int) -> pa.Schema:
    """The columns of a file of scores: one row a trigger, by request and position."""
    lists = pa.list_(pa.float32(), channels)
    return pa.schema([("request_id", pa.int64()), ("position", pa.int32()), ("trigger_item_id", pa.int64()),
                      ("value", lists), ("uniqueness", lists)])


@dataclass(frozen=True)
class RouterScores:
    """A router's published scores of all test requests.

    Raises:
        InputError: they are not there, or are of other channels.
    """

    name: str
    seed: int
    folder: Path
    beta: float
    channels: int
    file: str = SCORES

    @classmethod
    def open(cls, run: Run, name: str, seed: int, diversity: bool, file: str = SCORES) -> RouterScores:
        folder = run.folder / "evaluation" / "routing" / name / f"seed={seed}"
        if not (folder / file).exists():
            raise InputError(f"{folder / file}: no scores of the router {name} there; run watchtower train router "
                             "first")
        manifest = read_manifest(folder)
        verify_file(folder, manifest, file)
        channels = manifest.get("channels")
        if channels != run.snapshots.names:
            raise InputError(f"{folder}: scores of channels {channels}, but channels.names is {run.snapshots.names}; "
                             "run watchtower train router again")
        return cls(name, seed, folder, run.config.routing.beta if diversity else 0.0, len(channels), file)

    def of(self, number: int) -> pa.Table:
        """The rows of a shard, in the order of its triggers.

        Raises:
            WatchtowerError: the file does not hold what a router writes.
        """
        path, parts = self.folder / self.file, []
        elsewhere.bring(path)
        try:
            with pa.memory_map(str(path)) as source:
                parquet = open_parquet(source, str(path))
                if not parquet.schema_arrow.equals(score_schema(self.channels)):
                    raise pa.ArrowInvalid(f"its columns are {', '.join(map(str, parquet.schema_arrow))}")
                for group in range(parquet.num_row_groups):
                    shard = pc.shift_right(parquet.read_row_group(group, ["request_id"])["request_id"], 32)
                    inside = pc.equal(shard, number)
                    if pc.any(inside).as_py():
                        parts.append(parquet.read_row_group(group).filter(inside))
                rows = (pa.concat_tables(parts) if parts else parquet.schema_arrow.empty_table()).combine_chunks()
                if any(column.null_count for column in rows.columns):
                    raise pa.ArrowInvalid("it has null values")
                return rows
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error, "run watchtower train router again") from error

    def matrices(self, rows: pa.Table, requests: TriggerRequests) -> tuple[np.ndarray, np.ndarray]:
        """v' and S = v' + beta * u (Eq. 15) of these requests' triggers, float64 (T, C) each.

        Raises:
            InputError: they hold other requests or triggers.
        """
        request_id = rows["request_id"].to_numpy()
        first_R = np.searchsorted(request_id, requests.request_id_R)
        count_R = np.diff(requests.trigger_offset_R1)
        at_T = np.repeat(first_R - requests.trigger_offset_R1[:-1], count_R) + np.arange(len(requests.trigger_row_T))
        fits = len(request_id) > 0 and at_T.max(initial=0) < len(request_id)
        if not (fits and np.array_equal(request_id[at_T], np.repeat(requests.request_id_R, count_R))
                and np.array_equal(rows["position"].to_numpy()[at_T], requests.position_T)):
            raise InputError(f"{self.folder / self.file}: scores of other requests than this run's; run watchtower "
                             "train router again")
        value_TC, uniqueness_TC = (_matrix(rows[name])[at_T] for name in ("value", "uniqueness"))
        if not self.beta:
            return value_TC, value_TC
        return value_TC, value_TC + self.beta * np.nan_to_num(uniqueness_TC)


def _matrix(column) -> np.ndarray:
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return values.flatten().to_numpy().astype(np.float64).reshape(len(values), -1)


# ------------------------------------------------------------------------------------------------------- the judging

@dataclass(frozen=True)
class Union:
    """All channels' lists as one: rank_F of each future item, NEVER where it is not there, and length_RK, how many of
    the first ranks each channel's first K are."""

    rank_F: np.ndarray
    length_RK: np.ndarray


@dataclass(frozen=True)
class Judge:
    """The measures of a run, by name, and how a block's picks give them."""

    config: Config
    channels: tuple[str, ...]

    @cached_property
    def at(self) -> list[int]:
        return [*sorted(set(self.config.routing.at)), NEVER]

    @cached_property
    def headline(self) -> list[int]:
        return [headline_length(self.config.routing.at), NEVER]

    @cached_property
    def names(self) -> list[str]:
        """M: in the order of `measures`."""
        def cut(name: str, at: Sequence[int]) -> list[str]:
            return [f"{name}@{length_name(k)}" for k in at]

        bands = [f"overall.recall_from.{name}" for name in band_names(self.config.replay.requests.triggers)]
        windows = [name for w in self.config.routing.windows for name in cut(f"overall.window={w}.recall",
                                                                             self.headline)]
        own = [name for c in self.channels for name in
               (*cut(f"{c}.recall", self.at), *cut(f"{c}.uniq", self.at), f"{c}.trigger_overlap")]
        return [*cut("overall.recall", self.at), *cut("overall.hit_watch_s", self.headline),
                *cut("overall.tags_covered", self.headline), "overall.trigger_overlap", *bands, *windows, *own,
                *cut("overall.union", self.at), *cut("overall.recall_equal_length", self.at),
                *cut("overall.recent_equal_length", self.at)]

    def measures(self, pick_RCB: np.ndarray, ranked: Ranked, rank_FC: np.ndarray, uniq_RCK: np.ndarray, union: Union,
                 recent: Union, budget: int, block: Block, future: Future, catalogue) -> np.ndarray:
        """float32 (M, R), in the order of `names`. recent: the union of `recent` under the same budget."""
        requests, window = block.table.requests, self.config.replay.window
        overlap_RC = routing.recent_share(pick_RCB, requests.trigger_offset_R1, budget)
        found = routing.found_by_position(rank_FC, ranked, future, requests.position_T, POSITION_BANDS, window)
        rows = self._overall(rank_FC.min(axis=1), future, catalogue)
        rows += [overlap_RC.mean(axis=1), *found[:len(band_names(self.config.replay.requests.triggers))]]
        rows += self._windows(rank_FC.min(axis=1), future)
        for c in range(len(self.channels)):
            rows += [*routing.recall(rank_FC[:, c], future, self.at, window), *uniq_RCK[:, c].T, overlap_RC[:, c]]
        rows += [*union.length_RK.T]
        for one in (union, recent):
            rows += [self._cut(one.rank_F, np.minimum(union.length_RK[:, k], recent.length_RK[:, k]), future)
                     for k in range(len(self.at))]
        return np.stack(rows).astype(np.float32)

    def _cut(self, rank_F: np.ndarray, length_R: np.ndarray, future: Future) -> np.ndarray:
        """Recall of each request's first items, as many as it may have."""
        inside_F = rank_F < length_R[future.request_F]
        return routing.recall(np.where(inside_F, 0, NEVER), future, [NEVER], self.config.replay.window)[0]

    def popular(self, rank_F: np.ndarray, recent: Union, length_RC: np.ndarray, future: Future, catalogue
                ) -> np.ndarray:
        """The most popular items, as many as the union of `recent` holds (a channel: as many as its list holds)."""
        window, request_F = self.config.replay.window, future.request_F
        cut_FK = recent.length_RK[request_F]
        united = [np.where(rank_F < cut_FK[:, k], 0, NEVER) for k in range(len(self.at))]
        rows = [routing.recall(rank, future, [NEVER], window)[0] for rank in united]
        headline = [united[self.at.index(k)] for k in self.headline]
        rows += [routing.hit_watch_s(rank, future, [NEVER], window)[0] for rank in headline]
        rows += [self._tags(rank, NEVER, future, catalogue) for rank in headline]
        none_R = np.full(len(recent.length_RK), np.nan)
        rows += [none_R] * (1 + len(band_names(self.config.replay.requests.triggers)))
        rows += [routing.recall(rank, future, [NEVER], w)[0] for w in self.config.routing.windows for rank in headline]
        for c in range(len(self.channels)):
            length_F = length_RC[request_F, c]
            own = [np.where(rank_F < np.minimum(length_F, k), 0, NEVER) for k in self.at]
            rows += [routing.recall(rank, future, [NEVER], window)[0] for rank in own]
            rows += [none_R] * (len(self.at) + 1)
        rows += [*recent.length_RK.T]
        rows += [self._cut(rank, length_R, future) for rank in (rank_F, recent.rank_F)
                 for length_R in recent.length_RK.T]
        return np.stack(rows).astype(np.float32)

    def _overall(self, rank_F, future, catalogue) -> list[np.ndarray]:
        window = self.config.replay.window
        return [*routing.recall(rank_F, future, self.at, window),
                *routing.hit_watch_s(rank_F, future, self.headline, window),
                *(self._tags(rank_F, k, future, catalogue) for k in self.headline)]

    def _windows(self, rank_F, future) -> list[np.ndarray]:
        return [row for w in self.config.routing.windows for row in routing.recall(rank_F, future, self.headline, w)]

    def _tags(self, rank_F, k, future, catalogue) -> np.ndarray:
        if not len(catalogue.tag_rows):
            return np.full(len(future.offset_R1) - 1, np.nan)
        keep_F = future.first_F < self.config.replay.window
        return routing.tags_covered((rank_F < k)[keep_F], _within(future, keep_F), catalogue.tag_offsets_N1,
                                    catalogue.tag_rows, catalogue.tag_rows_count)


def _within(future: Future, keep_F: np.ndarray) -> Future:
    count_R = np.bincount(future.request_F[keep_F], minlength=len(future.offset_R1) - 1)
    return Future(np.concatenate([[0], np.cumsum(count_R)]).astype(np.int64), future.row_F[keep_F],
                  future.first_F[keep_F], future.view_offset_R1, future.view_item_V, future.view_ms_V)


def length_name(k: int) -> str:
    return "all" if k == NEVER else str(k)


def band_names(triggers: int) -> list[str]:
    """`1-5`, `6-10`, .. of the positions that a request's triggers can have."""
    firsts = [first for first in POSITION_BANDS if first <= triggers]
    return [f"{first}-{(firsts[k + 1] - 1) if k + 1 < len(firsts) else triggers}" for k, first in enumerate(firsts)]


@dataclass(frozen=True)
class Subject:
    """Who is judged: a selector, or a router with its scores.

    joint: the joint assignment instead of the top-B per channel. overlap: of a router's independent picks
    (routing.overlap); selectors have none.
    """

    name: str
    seed: int
    selector: Selector | None = None
    scores: RouterScores | None = None
    joint: bool = False
    overlap: float = 0.0


@dataclass
class ShardJudgement:
    """What a shard's requests came to: values[name, seed, budget] float32 (M, R), and the picks' rows by selector."""

    user_id_R: np.ndarray
    request_id_R: np.ndarray
    values: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)
    picks: dict[str, pa.Table] = field(default_factory=dict)


def judge_shard(run: Run, number: int, subjects: Sequence[Subject], hash_limit: int | None) -> ShardJudgement:
    """Judge the test requests of a shard.

    Args:
        hash_limit: only requests whose hash is not above it; None: all.
    """
    config, store = run.config, run.store
    requests = run.requests(number, "test")
    if hash_limit is not None:
        requests = requests.take(request_hash(requests) <= np.uint64(hash_limit))
    judge = Judge(config, tuple(run.snapshots.names))
    budgets = sorted(set(config.routing.budgets))
    shard, item_ids = store.open(number), store.vocabulary
    is_future_E = is_future_view(shard, run.rule("test"))
    windows = max(config.replay.window, *config.routing.windows)
    scored = {(s.scores.name, s.scores.seed): s.scores.of(number) for s in subjects if s.scores}
    values: dict[tuple[str, int, int], list[np.ndarray]] = {}
    picked: dict[str, list[pa.Table]] = {}
    first_seeds = {s.name: s.seed for s in reversed(subjects)}
    for part, block in run.blocks(number, requests, "test"):
        seen = future_items(shard, part, is_future_E, windows, config.replay.null_watch_s)
        future = routing.future_of(seen.offset_R1, seen.row_V, seen.watch_ms_V)
        recent: dict[int, Union] = {}
        for subject in subjects:  # `recent` is the first
            score_TC, picks = _picks(subject, scored, part, block, budgets)
            for budget, pick_RCB in picks.items():
                ranked = routing.interleave(pick_RCB, block.list_TCL)
                rank_FC = routing.future_ranks(ranked, future)
                uniq_RCK, union_RK = routing.overlaps(ranked, judge.at)
                union = Union(routing.united_ranks(ranked, future), union_RK)
                recent.setdefault(budget, union)
                values.setdefault((subject.name, subject.seed, budget), []).append(judge.measures(
                    pick_RCB, ranked, rank_FC, uniq_RCK, union, recent[budget], budget, block, future,
                    store.catalogue))
                if subject.name == "recent" and POPULAR in config.routing.selectors:
                    rank_F = _popularity_ranks(run, block, future)
                    values.setdefault((POPULAR, 0, budget), []).append(judge.popular(
                        rank_F, union, ranked.length_RC, future, store.catalogue))
            if subject.seed == first_seeds[subject.name]:
                picked.setdefault(subject.name, []).append(_pick_rows(
                    part, picks[budgets[-1]], score_TC, judge.channels, item_ids))
    return ShardJudgement(requests.user_id_R, requests.request_id_R,
                          {key: np.concatenate(parts, axis=1) for key, parts in values.items()},
                          {name: pa.concat_tables(parts) for name, parts in picked.items()})


def validation_recall(run: Run, number: int, scores: Sequence[RouterScores]) -> tuple[np.ndarray, np.ndarray]:
    """What each of OVERLAPS brings a shard's validation requests, which are training requests of users whom no router
    was fitted on: float64 (len(OVERLAPS), R), the mean of recall@K over routing.at, the budgets and the scores; and
    int64 (R,), their users.

    Args:
        scores: of a router's seeds, of the validation requests.
    """
    config, store = run.config, run.store
    requests = run.requests(number, "train")
    requests = requests.take(is_validation_user(requests.user_id_R, config))
    budgets, at = sorted(set(config.routing.budgets)), sorted(set(config.routing.at))
    shard, is_future_E = store.open(number), is_future_view(store.open(number), run.rule("train"))
    rows = [one.of(number) for one in scores]
    found = [np.zeros((len(OVERLAPS), 0))]
    for part, block in run.blocks(number, requests, "train"):
        seen = future_items(shard, part, is_future_E, config.replay.window, config.replay.null_watch_s)
        future = routing.future_of(seen.offset_R1, seen.row_V, seen.watch_ms_V)
        recalls = []
        for overlap in OVERLAPS:
            ranks = [routing.future_ranks(routing.interleave(pick_RCB, block.list_TCL), future).min(axis=1)
                     for one, table in zip(scores, rows, strict=True)
                     for pick_RCB in _independent(one.matrices(table, part)[1], part, block, budgets, overlap).values()]
            recalls.append(np.mean([routing.recall(rank_F, future, at) for rank_F in ranks], axis=(0, 1)))
        found.append(np.stack(recalls))
    return np.concatenate(found, axis=1), requests.user_id_R


def chosen_overlap(recall_OR: np.ndarray, user_id_R: np.ndarray) -> dict[str, Any]:
    """The overlap with the best mean recall, unless that is within OVERLAP_ERRORS standard errors of 0's: then 0. So it
    is, too, with fewer users than an error can be told from. Requests of one user are not independent of each other, so
    the error is that of users (a cluster each).

    Args:
        recall_OR, user_id_R: of validation_recall, all shards.

    Returns:
        value; best; recall: by overlap; gain_over_0 and its standard_error, of the best one; requests, users.
    """
    is_known_R = np.isfinite(recall_OR).all(axis=0)
    recall_OR, user_R = recall_OR[:, is_known_R], np.unique(user_id_R[is_known_R], return_inverse=True)[1].ravel()
    requests, users = recall_OR.shape[1], len(np.unique(user_R))
    if not requests:
        return {"value": 0.0, "requests": 0, "users": 0}
    mean_O = recall_OR.mean(axis=1)
    best = int(mean_O.argmax())
    step_R = recall_OR[best] - recall_OR[OVERLAPS.index(0.0)]
    apart_U = np.bincount(user_R, step_R - step_R.mean())
    error = float(np.sqrt((apart_U**2).sum() * users / max(users - 1, 1)) / requests)
    is_sure = users >= OVERLAP_USERS and step_R.mean() > OVERLAP_ERRORS * error
    return {"value": OVERLAPS[best] if is_sure else 0.0, "best": OVERLAPS[best], "requests": requests, "users": users,
            "gain_over_0": float(step_R.mean()), "standard_error": error,
            "recall": {f"{overlap:g}": float(mean) for overlap, mean in zip(OVERLAPS, mean_O, strict=True)}}


def _picks(subject: Subject, scored: Mapping, part: TriggerRequests, block: Block, budgets: Sequence[int]
           ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The scores (T, C), and the picks (R, C, B) under each budget."""
    if subject.scores is None:
        score_TC = subject.selector.score(block.table, block)
    else:
        value_TC, score_TC = subject.scores.matrices(scored[subject.scores.name, subject.scores.seed], part)
        if subject.joint:
            return score_TC, {b: joint(value_TC, part, block, b) for b in budgets}
    return score_TC, _independent(score_TC, part, block, budgets, subject.overlap)


def _independent(score_TC: np.ndarray, part: TriggerRequests, block: Block, budgets: Sequence[int], overlap: float
                 ) -> dict[int, np.ndarray]:
    """Eq. 15's picks, or with an overlap those of routing.spread_picks, where an item weighs its value."""
    if overlap:
        pick_RCB = routing.spread_picks(score_TC, part.trigger_offset_R1, block.list_TCL, block.value_TCL, budgets[-1],
                                        overlap)
    else:
        pick_RCB = routing.top_picks(score_TC, part.trigger_offset_R1, budgets[-1])
    return {b: np.ascontiguousarray(pick_RCB[:, :, :b]) for b in budgets}


def joint(value_TC: np.ndarray, part: TriggerRequests, block: Block, budget: int) -> np.ndarray:
    """The joint picks under the budget of all channels together (Eq. 1: an item is worth what it is worth once).

        chance(item at place l | x, c) = p(item) * f_c(x) / (1 + l / depth)
        f_c(x) = (v'_c(x) / (1 - prod over R_c(x) of (1 - p)))^trust, over its mean in the channel and request

    p is the item's value as all triggers see it (trainer/item_value.py), f what the router knows beyond that of this
    trigger and list. A router that knows nothing more leaves f at 1.

    Args:
        value_TC: v' of Eq. 7.
    """
    channels = value_TC.shape[1]
    expected_TC = 1 - np.exp(np.log1p(-np.minimum(block.value_TCL, 1 - 1e-6)).sum(axis=2, dtype=np.float64))
    factor_TC = (np.clip(value_TC, 1e-6, 1) / np.maximum(expected_TC, 1e-6)) ** JOINT_TRUST
    factor_TC = factor_TC / np.maximum(_mean_of_request(factor_TC, part.trigger_offset_R1), 1e-9)
    factor_TC = np.clip(factor_TC, 1 / JOINT_FACTOR, JOINT_FACTOR)
    depth_L = 1 / (1 + np.arange(block.value_TCL.shape[2]) / JOINT_DEPTH)
    chance_TCL = block.value_TCL * (factor_TC[:, :, None] * depth_L).astype(np.float32)
    shift = round(block.config.routing.joint_shift * budget)
    least, most = budget - shift, budget + shift
    return routing.joint_picks(chance_TCL, part.trigger_offset_R1, block.list_TCL, budget * channels, least, most)


def _mean_of_request(x_TC: np.ndarray, offset_R1: np.ndarray) -> np.ndarray:
    """float64 (T, C): the mean over the triggers of the same request."""
    count_R = np.diff(offset_R1)
    sum_RC = np.add.reduceat(np.concatenate([x_TC, np.zeros((1, x_TC.shape[1]))]), offset_R1[:-1], axis=0)
    return np.repeat(sum_RC / np.maximum(count_R, 1)[:, None], count_R, axis=0)


def _popularity_ranks(run: Run, block: Block, future: Future) -> np.ndarray:
    """int64 (F,): place of each future item among all, by effective views at the watermark; NEVER without any."""
    rank_F = np.full(len(future.row_F), NEVER, np.int64)
    number_R = run.statistics.numbers_at(block.table.requests.time_ms_R)
    for number in np.unique(number_R):
        views_N = popular_views(run, int(number))
        order = np.argsort(-views_N, kind="stable")
        place_N = np.empty(len(order), np.int64)
        place_N[order] = np.arange(len(order))
        mine_F = np.isin(future.request_F, np.flatnonzero(number_R == number))
        row_F = future.row_F[mine_F]
        rank_F[mine_F] = np.where(views_N[row_F] > 0, place_N[row_F], NEVER)
    return rank_F


def popular_views(run: Run, number: int) -> np.ndarray:
    """int64 (N,): effective views of each item at a snapshot of the statistics, in the channels' window before it as
    far as older statistics tell: those of the newest snapshot at or before the window's begin are taken off."""
    views_N, window_h = run.statistics.number(number).effective_views_N, run.config.channels.window_h
    if window_h is None or number == NONE:
        return views_N
    begin_ms = run.statistics.snapshots[number].watermark_ms - round(window_h * HOUR_MS)
    return views_N - run.statistics.at(begin_ms).effective_views_N


def _pick_rows(part: TriggerRequests, pick_RCB: np.ndarray, score_TC: np.ndarray, channels: Sequence[str], item_ids
               ) -> pa.Table:
    """Rows of routing/<selector>.parquet: request_id, channel, rank (1 the first), trigger_item_id, score."""
    r, c, b = np.nonzero(pick_RCB != NONE)
    t = pick_RCB[r, c, b]
    return pa.table({
        "request_id": part.request_id_R[r],
        "channel": pa.DictionaryArray.from_arrays(pa.array(c.astype(np.int32)), pa.array(list(channels))),
        "rank": (b + 1).astype(np.int32), "trigger_item_id": item_ids.ids_of(part.trigger_row_T[t]),
        "score": score_TC[t, c].astype(np.float32)})
