"""User sequences: the logs grouped by user and sorted by time, in shards that are read through a memory map.

    sequences/
      manifest.json                 config and input fingerprint, statistics, sizes and checksums of the files
      shard-00000.events.arrow      one uncompressed record batch, no nulls, sorted by user and time
      shard-00000.users.arrow       user_id int64, offset int64 and length int32 into the events
      catalogue.arrow, users.arrow  features (catalogue.py)
      vocabulary/items.parquet      item_id, row; and one file for each other vocabulary (value, row)

Columns of an event: item_row int32 (vocabulary row, 0 unknown) · timestamp_ms int64 · watch_time_s float32 (NaN:
unknown) · duration_s float32 (of the log, else of the catalogue; NaN: unknown) · is_effective, is_target, is_ordinal
uint8 · session int64 where data.session names one (NULL_SESSION: none) · feedback_<name> int8 (-1: unknown) for each of
data.feedback.

A user is in the shard that a seeded hash of the id gives. Within a shard users are sorted by id, their events by time,
then item, then by the remaining columns, so the sequences depend on the set of rows alone: not on the order of the
logs, nor on how they are cut into files. Rows that are equal in every kept column are one event; the others of them are
quarantined as `duplicate`.

Shape suffixes: U = users of a shard, E = its events, B = ids looked up.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property, lru_cache
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa

from configs.errors import InputError, WatchtowerError
from configs.schema import Config, SplitConfig
from embeddings import elsewhere
from embeddings.snapshots import read_manifest, verify_file
from embeddings.untrusted import open_parquet, whole_column
from trainer.catalogue import Catalogue, UserFeatures, map_batch, write_batch
from trainer.logs import (
    LAST_UNIX_MS,
    QUARANTINE_SCHEMA,
    Piece,
    Wanted,
    cast_column,
    check_columns,
    corrupt,
    list_files,
)
from trainer.vocabulary import Vocabulary

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
SHARD_SEED = 0x5EED0F5A4D  # not a seed that split.test_users would take: shards and held-out users are independent
MOST_SHARDS = 1_000_000
MOST_ROWS_A_VIEW = 4  # of a vocabulary whose rows are looked up in an array; those of a larger one are sorted
MOST_BINS = 1 << 20  # of a count by value; more are sorted
WATCH_BITS = 15  # of a float32 that the statistics' histogram of watch times leaves off: a bin is 0.2% to 0.4% wide
_HASH_KEY = np.uint64(int.from_bytes(os.urandom(8), "little"))  # so that no log can be made to collide; sorted away
_sound: set[tuple[str, str, int]] = set()  # shards whose numbers this process has checked: their checksums


# ------------------------------------------------------------------------------------------------------ which shard

def user_hash(user_ids: np.ndarray, seed: int) -> np.ndarray:
    """uint64 hash of int64 user ids, uniform for any ids: SplitMix64 of the id, keyed by the mixed seed."""
    with np.errstate(over="ignore"):
        key = _mix(np.asarray([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
        return _mix(np.asarray(user_ids, np.int64).view(np.uint64) ^ key)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_mixed = numba.njit(cache=True, nogil=True)(_mix)  # of one number, in compiled code


def shard_of(user_ids: np.ndarray, shards: int) -> np.ndarray:
    """int32 shard of each user."""
    return (user_hash(user_ids, SHARD_SEED) % np.uint64(shards)).astype(np.int32)


@numba.njit(cache=True, nogil=True)
def places(shard, begin):  # pragma: no cover - compiled
    """int64: where each row goes so that the rows of a shard stand together, in the order they came.

    Args:
        shard: int32 of each row. begin: int64, where each shard's rows begin.
    """
    free, place = begin.copy(), np.empty(len(shard), np.int64)
    for k in range(len(shard)):
        place[k] = free[shard[k]]
        free[shard[k]] += 1
    return place


def put(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The values, each at its place."""
    there = np.empty_like(values)
    _put(values, place, there)
    return there


@numba.njit(cache=True, nogil=True)
def _put(values, place, there):  # pragma: no cover - compiled
    for k in range(len(values)):
        there[place[k]] = values[k]


# --------------------------------------------------------------------------------------------------- writing a shard

@dataclass
class ShardSummary:
    """What a shard's task tells: counts that add up over shards."""

    shard: int
    rows: int = 0
    users: int = 0
    duplicates: int = 0
    effective: int = 0
    targets: int = 0
    ordinal: int = 0
    null_watch: int = 0
    longest: int = 0
    first_ms: int | None = None
    last_ms: int | None = None
    hours: list[list[int]] = field(default_factory=lambda: [[], []])  # local hours since 1970, and rows of each
    watch: list[list[int]] = field(default_factory=lambda: [[], []])  # bins of watch times, and rows of each
    feedback: dict[str, list[int]] = field(default_factory=dict)  # name: [true, unknown]


def empty_rows(session: bool, feedback: list[str]) -> pa.Table:
    """Clean rows of a shard without users."""
    types = {"user_id": np.int64, "order": np.int64, "item_row": np.int32, "timestamp_ms": np.int64,
             "watch_time_s": np.float32, "duration_s": np.float32, "is_effective": np.uint8, "is_target": np.uint8,
             "is_ordinal": np.uint8}
    types |= {"session": np.int64} if session else {}
    types |= {f"feedback_{name}": np.int8 for name in feedback}
    return pa.table({name: np.zeros(0, dtype) for name, dtype in types.items()})


def write_shard(folder: Path, shard: int, rows: pa.Table, *, pieces: list[Piece], vocabulary: Vocabulary,
                utc_offset_h: float) -> tuple[ShardSummary, pa.Table, dict[str, np.ndarray]]:
    """Sort the rows of a shard, take the duplicates out and write its two files, each at once and whole.

    Args:
        rows: the shard's clean rows in any order, as `logs.clean` gives them.
        pieces: all pieces of the input, to name the source of a duplicate.

    Returns:
        The summary; the duplicates as quarantine rows; and item_row, first_seen_ms, longest_duration_s of its items.
    """
    columns = {name: rows[name].to_numpy() for name in rows.column_names if name != "shard"}
    columns, duplicates = sort_events(columns)
    user = columns.pop("user_id")
    offset_U = np.flatnonzero(np.concatenate([np.ones(min(len(user), 1), bool), user[1:] != user[:-1]]))
    user_id_U, length_U = user[offset_U], np.diff(np.append(offset_U, len(user)))
    columns.pop("order")
    whole_file(folder / f"shard-{shard:05d}.events.arrow", lambda path: write_batch(path, columns))
    whole_file(folder / f"shard-{shard:05d}.users.arrow", lambda path: write_batch(path, {
        "user_id": user_id_U, "offset": offset_U.astype(np.int64), "length": length_U.astype(np.int32)}))
    summary = summarize(shard, columns, length_U, utc_offset_h)
    summary.duplicates = len(duplicates["order"])
    return summary, _as_quarantine(duplicates, pieces, vocabulary), _items_seen(columns)


def sort_events(columns: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sort by user, time, item and the rest, and part the exact duplicates (all columns but `order` equal).

    Of equal rows the one that comes first in the input (the least `order`) is kept.

    Returns:
        The sorted events and the duplicates, both as columns.
    """
    user, time, item = columns["user_id"], columns["timestamp_ms"], columns["item_row"]
    at, bounds_U1 = order_of(user)
    time_at, item_at = time[at], item[at]
    _sort_within(at, time_at, item_at, bounds_U1, columns["order"])
    same, duplicate = np.zeros(len(at), bool), None
    if _ties(time_at, item_at, bounds_U1, same):  # rare, so that only ties pay for comparing every column
        duplicate = np.zeros(len(at), bool)
        tied = same.copy()
        tied[:-1] |= same[1:]
        place = np.flatnonzero(tied)
        group = np.cumsum(~same)[place]
        rest = [_bits(columns[name])[at[place]] for name in columns
                if name not in ("user_id", "timestamp_ms", "item_row", "order")]
        by = np.lexsort((columns["order"][at[place]], *reversed(rest), group))
        at[place] = at[place][by]
        equal = np.ones(len(place) - 1, bool) & (np.diff(group) == 0)
        for values in rest:
            equal &= np.diff(values[by]) == 0
        duplicate[place[1:]] = equal
    if duplicate is None or not duplicate.any():
        kept, dropped, ready = at, at[:0], {"timestamp_ms": time_at, "item_row": item_at}
    else:
        kept, dropped, ready = at[~duplicate], at[duplicate], {}
    return ({name: ready[name] if name in ready else values[kept] for name, values in columns.items()},
            {name: values[dropped] for name, values in columns.items()})


def order_of(user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows by user, those of a user as they came, and where each user's begin: int64 (E,) and (U + 1,).

    Users are few beside their rows, so they are numbered through a hash table, sorted by themselves, and the rows
    counted into place: a sort of all rows takes four times as long.
    """
    code, user_id_U = _numbered(user, _HASH_KEY)
    rank_U = np.empty(len(user_id_U), np.int64)
    rank_U[np.argsort(user_id_U)] = np.arange(len(user_id_U))
    return _counted_into_place(code, rank_U)


@numba.njit(cache=True, nogil=True)
def _numbered(user, hash_key):  # pragma: no cover - compiled
    """int32 (E,), numbers of users in the order in which they come first, and their ids."""
    bits = 4
    while (1 << bits) < 2 * len(user):
        bits += 1
    slots, mask = np.full(1 << bits, -1, np.int32), (1 << bits) - 1
    code, user_id, users = np.empty(len(user), np.int32), np.empty(len(user), np.int64), 0
    for k in range(len(user)):
        slot = np.int64(_mixed(np.uint64(user[k]) ^ hash_key) & np.uint64(mask))
        while slots[slot] >= 0 and user_id[slots[slot]] != user[k]:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot], user_id[users] = users, user[k]
            users += 1
        code[k] = slots[slot]
    return code, user_id[:users].copy()


@numba.njit(cache=True, nogil=True)
def _counted_into_place(code, rank_U):  # pragma: no cover - compiled
    bounds = np.zeros(len(rank_U) + 1, np.int64)
    for k in range(len(code)):
        bounds[rank_U[code[k]] + 1] += 1
    for u in range(len(rank_U)):
        bounds[u + 1] += bounds[u]
    free, at = bounds[:-1].copy(), np.empty(len(code), np.int64)
    for k in range(len(code)):
        rank = rank_U[code[k]]
        at[free[rank]] = k
        free[rank] += 1
    return at, bounds


@numba.njit(cache=True, nogil=True)
def _ties(time_at, item_at, bounds_U1, same):  # pragma: no cover - compiled
    """Marks the events that have user, time and item of the one before; whether there are any."""
    found = False
    for user in range(len(bounds_U1) - 1):
        for k in range(bounds_U1[user] + 1, bounds_U1[user + 1]):
            if time_at[k] == time_at[k - 1] and item_at[k] == item_at[k - 1]:
                same[k] = found = True
    return found


@numba.njit(cache=True, nogil=True)
def _sort_within(at, time_at, item_at, bounds_U1, order):  # pragma: no cover - compiled
    """Sort each user's part of three arrays by time, item and order, in place. A user's rows come as they lay in the
    logs, or nearly, and logs are mostly written in the order of time: so runs are found and merged."""
    longest = 0
    for user in range(len(bounds_U1) - 1):
        longest = max(longest, bounds_U1[user + 1] - bounds_U1[user])
    spare_at, spare_time, spare_item = at[:longest].copy(), time_at[:longest].copy(), item_at[:longest].copy()
    for user in range(len(bounds_U1) - 1):
        begin, end = bounds_U1[user], bounds_U1[user + 1]
        width = 8
        for first in range(begin, end, width):
            for k in range(first + 1, min(first + width, end)):
                one, when, what = at[k], time_at[k], item_at[k]
                place = k
                while place > first and _comes_after(time_at[place - 1], item_at[place - 1], order[at[place - 1]], when,
                                                     what, order[one]):
                    at[place], time_at[place], item_at[place] = at[place - 1], time_at[place - 1], item_at[place - 1]
                    place -= 1
                at[place], time_at[place], item_at[place] = one, when, what
        while width < end - begin:
            for first in range(begin, end, 2 * width):
                middle, last = min(first + width, end), min(first + 2 * width, end)
                if middle == last or not _comes_after(time_at[middle - 1], item_at[middle - 1], order[at[middle - 1]],
                                                      time_at[middle], item_at[middle], order[at[middle]]):
                    continue
                left = middle - first
                spare_at[:left], spare_time[:left] = at[first:middle], time_at[first:middle]
                spare_item[:left] = item_at[first:middle]
                a, b, place = 0, middle, first
                while a < left:
                    if b < last and _comes_after(spare_time[a], spare_item[a], order[spare_at[a]], time_at[b],
                                                 item_at[b], order[at[b]]):
                        at[place], time_at[place], item_at[place] = at[b], time_at[b], item_at[b]
                        b += 1
                    else:
                        at[place], time_at[place], item_at[place] = spare_at[a], spare_time[a], spare_item[a]
                        a += 1
                    place += 1
            width *= 2


@numba.njit(inline="always")
def _comes_after(time, item, order, other_time, other_item, other_order):  # pragma: no cover - compiled
    if time != other_time:
        return time > other_time
    if item != other_item:
        return item > other_item
    return order > other_order


def _bits(values: np.ndarray) -> np.ndarray:
    """Values that compare as equal exactly where the stored bits do (NaN equals NaN)."""
    return values.view(np.int32) if values.dtype == np.float32 else values


def _as_quarantine(duplicates: dict[str, np.ndarray], pieces: list[Piece], vocabulary: Vocabulary) -> pa.Table:
    order = duplicates["order"]
    if not len(order):
        return QUARANTINE_SCHEMA.empty_table()
    starts = np.array([p.order for p in pieces])
    piece = np.searchsorted(starts, order, side="right") - 1
    row = order - starts[piece] + np.array([p.first_row for p in pieces])[piece]
    sources = pa.array([p.source for p in pieces]).take(pa.array(piece))
    watch = duplicates["watch_time_s"].astype(np.float64)
    return pa.table([pa.array(["duplicate"] * len(order)), sources, pa.array(row), duplicates["user_id"],
                     pa.array(vocabulary.ids_of(duplicates["item_row"])), duplicates["timestamp_ms"],
                     pa.array(watch, mask=np.isnan(watch))], schema=QUARANTINE_SCHEMA)


def _items_seen(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    item, time, duration = columns["item_row"], columns["timestamp_ms"], columns["duration_s"]
    rows = int(item.max(initial=-1)) + 1
    if rows <= MOST_ROWS_A_VIEW * len(item):
        seen_N, first_N, longest_N = np.zeros(rows, np.bool_), np.zeros(rows, np.int64), np.zeros(rows, np.float32)
        _first_and_longest(item, time, duration, seen_N, first_N, longest_N)
        row_I = np.flatnonzero(seen_N).astype(np.int32)
        return {"item_row": row_I, "first_seen_ms": first_N[row_I], "longest_duration_s": longest_N[row_I]}
    at = np.argsort(item)
    item = item[at]
    start = np.flatnonzero(np.diff(item, prepend=-1))
    if not len(at):
        return {"item_row": item, "first_seen_ms": np.zeros(0, np.int64), "longest_duration_s": np.zeros(0, np.float32)}
    return {"item_row": item[start], "first_seen_ms": np.minimum.reduceat(time[at], start),
            "longest_duration_s": np.fmax.reduceat(duration[at], start)}


@numba.njit(cache=True, nogil=True)
def _first_and_longest(item_E, time_E, duration_E, seen_N, first_N, longest_N):  # pragma: no cover - compiled
    for e in range(len(item_E)):
        item = item_E[e]
        if not seen_N[item]:
            seen_N[item], first_N[item], longest_N[item] = True, time_E[e], duration_E[e]
            continue
        first_N[item] = min(first_N[item], time_E[e])
        if duration_E[e] > longest_N[item] or np.isnan(longest_N[item]):
            longest_N[item] = duration_E[e]


def summarize(shard: int, columns: Mapping[str, np.ndarray], length_U: np.ndarray, utc_offset_h: float
              ) -> ShardSummary:
    """Count what the manifest's statistics need of a shard's events."""
    time, watch = columns["timestamp_ms"], columns["watch_time_s"]
    summary = ShardSummary(shard, len(time), len(length_U))
    if not len(time):
        return summary
    for name, column in (("effective", "is_effective"), ("targets", "is_target"), ("ordinal", "is_ordinal")):
        setattr(summary, name, int(np.count_nonzero(columns[column])))
    summary.longest = int(length_U.max())
    summary.first_ms, summary.last_ms = int(time.min()), int(time.max())
    offset_ms = round(utc_offset_h * HOUR_MS)
    first, last = (summary.first_ms + offset_ms) // HOUR_MS, (summary.last_ms + offset_ms) // HOUR_MS
    if last - first < MOST_BINS:
        summary.hours = _as_counts(_hours(time, offset_ms - first * HOUR_MS, int(last - first) + 1), first)
    else:
        found, counts = np.unique((time + offset_ms) // HOUR_MS, return_counts=True)
        summary.hours = [found.tolist(), counts.tolist()]
    # No watch time is negative, so that a NaN's bits alone are above infinity's.
    bits = (watch.view(np.uint32) & np.uint32(0x7FFFFFFF)) >> np.uint32(WATCH_BITS)
    counts = np.bincount(bits, minlength=1)
    unknown = np.uint32(0x7F800000) >> np.uint32(WATCH_BITS)
    summary.null_watch = int(counts[unknown:].sum())
    summary.watch = _as_counts(counts[:unknown])
    summary.feedback = {name.removeprefix("feedback_"): [int((v == 1).sum()), int((v < 0).sum())]
                        for name, v in columns.items() if name.startswith("feedback_")}
    return summary


@numba.njit(cache=True, nogil=True)
def _hours(time, shift_ms, hours):  # pragma: no cover - compiled
    counts = np.zeros(hours, np.int64)
    for k in range(len(time)):
        counts[(time[k] + shift_ms) // HOUR_MS] += 1
    return counts


def _as_counts(counts: np.ndarray, low: int = 0) -> list[list[int]]:
    """low + place, and count, of what is there."""
    found = np.flatnonzero(counts)
    return [(found + low).tolist(), counts[found].tolist()]


def whole_file(path: Path, write) -> None:
    """Write a file beside its place and rename it: it is there whole or not at all, whoever else writes it too."""
    if elsewhere.of(path) is not None:
        with elsewhere.workshop(path.parent) as here:
            write(here / path.name)
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- the statistics

def merge_summaries(summaries: list[ShardSummary], utc_offset_h: float) -> dict:
    """The statistics of all shards, as they stand in the manifest.

    `end_99_9_ms` is the end of the local hour before which 99.9% of the rows lie: later rows are stragglers.
    """
    def total(name: str) -> int:
        return sum(getattr(s, name) for s in summaries)

    rows, feedback, days = total("rows"), {}, {}
    for s in summaries:
        for name, counts in s.feedback.items():
            feedback[name] = [a + b for a, b in zip(feedback.get(name, [0, 0]), counts, strict=True)]
    hour_H, rows_H = _summed([s.hours for s in summaries])
    for day, count in zip((hour_H // 24).tolist(), rows_H.tolist(), strict=True):
        days[day] = days.get(day, 0) + count
    last_hour = _quantile_bin(hour_H, rows_H, 0.999)
    bin_H, watched_H = _summed([s.watch for s in summaries])
    quantiles = {}
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        at = _quantile_bin(bin_H, watched_H, share)  # None where no watch time is known; bin 0 begins at 0 s
        quantiles[f"p{round(share * 100)}"] = None if at is None else round(_middle_of(at), 4)
    return {
        "rows": rows, "users": total("users"), "effective": total("effective"), "targets": total("targets"),
        "ordinal": total("ordinal"), "duplicates": total("duplicates"),
        "null_watch_share": total("null_watch") / rows if rows else None, "watch_time_s": quantiles,
        "longest_sequence": max((s.longest for s in summaries), default=0),
        "first_timestamp_ms": min((s.first_ms for s in summaries if s.first_ms is not None), default=None),
        "last_timestamp_ms": max((s.last_ms for s in summaries if s.last_ms is not None), default=None),
        "end_99_9_ms": None if last_hour is None else (last_hour + 1) * HOUR_MS - round(utc_offset_h * HOUR_MS),
        "rows_by_day": {datetime.fromtimestamp(day * 86_400, UTC).date().isoformat(): count
                        for day, count in days.items()},
        "feedback": {name: {"true": true, "unknown": unknown} for name, (true, unknown) in feedback.items()},
    }


def _summed(counts: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """int64: the keys of all, sorted, and what they count together."""
    key_H, place = np.unique(np.concatenate([np.array(keys, np.int64) for keys, _ in counts]), return_inverse=True)
    summed_H = np.zeros(len(key_H), np.int64)
    np.add.at(summed_H, place.ravel(), np.concatenate([np.array(values, np.int64) for _, values in counts]))
    return key_H, summed_H


def _quantile_bin(key_H: np.ndarray, count_H: np.ndarray, share: float) -> int | None:
    cumulated = np.cumsum(count_H)
    return int(key_H[np.searchsorted(cumulated, share * cumulated[-1])]) if len(key_H) else None


def _middle_of(watch_bin: int) -> float:
    """Seconds in the middle of a bin of watch times; 0 for the one that begins there."""
    low, high = np.array([watch_bin, watch_bin + 1], np.uint32) << np.uint32(WATCH_BITS)
    edges = np.array([low, high], np.uint32).view(np.float32).astype(np.float64)
    return float(edges.mean()) if watch_bin else 0.0


# ---------------------------------------------------------------------------------------------------------- reading

@dataclass(frozen=True)
class SequenceShard:
    """A shard's users and events as memory-mapped arrays; user u has events offset_U[u] to offset_U[u] + length_U[u].

    Arrays are read-only. The mapping lives as long as any of them does.
    """

    user_id_U: np.ndarray  # int64, sorted
    offset_U: np.ndarray  # int64
    length_U: np.ndarray  # int32
    item_row_E: np.ndarray  # int32
    timestamp_ms_E: np.ndarray  # int64
    watch_time_s_E: np.ndarray  # float32, NaN unknown
    duration_s_E: np.ndarray  # float32, NaN unknown
    is_effective_E: np.ndarray  # bool
    is_target_E: np.ndarray  # bool
    is_ordinal_E: np.ndarray  # bool
    session_E: np.ndarray | None  # int64, NULL_SESSION none
    feedback: dict[str, np.ndarray]  # int8 E each, -1 unknown


class SequenceStore:
    """A published sequences folder. Opening it reads the manifest alone; shards, vocabulary and catalogue come when
    they are asked for, and a shard keeps no file open.

    Raises:
        InputError: if the folder holds no sequences.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            self.manifest: dict = read_manifest(self.folder)
        except WatchtowerError as error:
            raise InputError(f"{self.folder}: no sequences there ({error}). Run watchtower ingest first.") from error
        _check_manifest(self.folder / "manifest.json", self.manifest)
        self.shards: int = self.manifest["shards"]

    def open(self, shard: int) -> SequenceShard:
        """Map one of the shards 0..shards - 1.

        Raises:
            InputError: if its files are missing or damaged.
        """
        names = [f"shard-{shard:05d}.{part}.arrow" for part in ("users", "events")]
        users, events = (map_batch(self._file(name)) for name in names)

        def column(name: str, kind: pa.DataType, batch: pa.RecordBatch = events) -> np.ndarray:
            return whole_column(batch, name, kind, str(self.folder / names[batch is events])).to_numpy()

        found = SequenceShard(
            column("user_id", pa.int64(), users), column("offset", pa.int64(), users),
            column("length", pa.int32(), users), column("item_row", pa.int32()), column("timestamp_ms", pa.int64()),
            column("watch_time_s", pa.float32()), column("duration_s", pa.float32()),
            *(column(name, pa.uint8()).view(np.bool_) for name in ("is_effective", "is_target", "is_ordinal")),
            column("session", pa.int64()) if "session" in events.schema.names else None,
            {name.removeprefix("feedback_"): column(name, pa.int8()) for name in events.schema.names
             if name.startswith("feedback_")})
        files = self.manifest["files"]
        checked = (*(files[name]["sha256"] for name in names), self.vocabulary.rows)
        if checked not in _sound:
            _check_shard(found, self.vocabulary.rows, self.folder / names[1])
            _sound.add(checked)
        return found

    def _file(self, name: str) -> Path:
        try:
            return verify_file(self.folder, self.manifest, name)
        except WatchtowerError as error:
            raise InputError(f"{error}. Remove the sequences folder and run ingest again.") from error

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self._file("vocabulary/items.parquet"))

    @cached_property
    def catalogue(self) -> Catalogue:
        for name in self.manifest["files"]:
            if name == "catalogue.arrow" or name.startswith("vocabulary/"):
                self._file(name)
        return Catalogue.open(self.folder, self.vocabulary.rows)

    @cached_property
    def users(self) -> UserFeatures | None:
        """The users' features; None where no users table was given."""
        if "users.arrow" not in self.manifest["files"]:
            return None
        for name in self.manifest["files"]:
            if name == "users.arrow" or name.startswith("vocabulary/"):
                self._file(name)
        return UserFeatures.open(self.folder)


def _check_manifest(path: Path, manifest: Mapping) -> None:
    """Raises an InputError where a key that readers use is missing or of another type."""
    statistics, source = manifest.get("statistics"), manifest.get("input")
    times = ("first_timestamp_ms", "last_timestamp_ms", "end_99_9_ms")
    good = (type(manifest.get("shards")) is int and 1 <= manifest["shards"] <= MOST_SHARDS
            and isinstance(statistics, dict)
            and all(type(statistics.get(key)) is int and abs(statistics[key]) < LAST_UNIX_MS for key in times)
            and (source is None or isinstance(source, dict) and isinstance(source.get("fingerprint"), str)))
    if not good:
        raise InputError(f"{path}: is not what ingest writes. Remove the sequences folder and run watchtower ingest "
                         "again.")


def _check_shard(shard: SequenceShard, rows: int, path: Path) -> None:
    """Raises an InputError where a shard's numbers lead out of its own arrays or of the vocabulary: compiled code walks
    them without a check of its own."""
    events, begin_U = len(shard.item_row_E), shard.offset_U
    reached = np.concatenate([np.zeros(1, np.int64), np.cumsum(shard.length_U, dtype=np.int64)])
    good = (len(begin_U) == len(shard.length_U) == len(shard.user_id_U) and (shard.length_U >= 0).all()
            and np.array_equal(begin_U, reached[:-1]) and reached[-1] == events
            and (np.diff(shard.user_id_U) > 0).all()
            and (not events or 0 <= shard.item_row_E.min() and shard.item_row_E.max() < rows)
            and all(flag.view(np.uint8).max(initial=0) <= 1
                    for flag in (shard.is_effective_E, shard.is_target_E, shard.is_ordinal_E)))
    if not good:
        raise InputError(f"{path}: its users and events do not fit each other or the vocabulary. Remove the sequences "
                         "folder and run watchtower ingest again.")


# -------------------------------------------------------------------------------------------------------- the split

@dataclass(frozen=True)
class SplitTimes:
    """Training is before `validation_start_ms`, validation before `test_start_ms`, the test before `test_end_ms`."""

    validation_start_ms: int
    test_start_ms: int
    test_end_ms: int


def split_times(config: Config, manifest: Mapping) -> SplitTimes:
    """When validation and test begin and end, Unix ms. A date of the config is its midnight at data.utc_offset_h.

    A null test_end is the midnight after the local day in which 99.9% of the rows have been seen, so that a few
    stragglers do not move it; a null test_start lies `test_days` before that end, a null validation_start
    `validation_days` before the test's start.

    Args:
        manifest: of the sequences.

    Raises:
        InputError: if the three are not in order, or nothing is left to train on.
    """
    split, offset_ms = config.split, round(config.data.utc_offset_h * HOUR_MS)
    statistics = manifest["statistics"]

    def midnight(day: date) -> int:
        return (day - date(1970, 1, 1)).days * DAY_MS - offset_ms

    if split.test_end is not None:
        end = midnight(split.test_end)
    else:
        end = -(-(statistics["end_99_9_ms"] + offset_ms) // DAY_MS) * DAY_MS - offset_ms
    start = midnight(split.test_start) if split.test_start else end - round(split.test_days * DAY_MS)
    validation = (midnight(split.validation_start) if split.validation_start
                  else start - round(split.validation_days * DAY_MS))
    first, last = statistics["first_timestamp_ms"], statistics["last_timestamp_ms"]
    logs = f"the logs run from {_local(first, offset_ms)} to {_local(last, offset_ms)}"
    if not validation < start < end:
        raise InputError(f"split: validation begins {_local(validation, offset_ms)}, the test "
                         f"{_local(start, offset_ms)}, and it ends {_local(end, offset_ms)}; they must follow each "
                         f"other ({logs}).")
    if validation <= first:
        raise InputError(f"split: validation begins {_local(validation, offset_ms)}, but {logs}: nothing is left to "
                         "train on. Set split.validation_start and split.test_start, or fewer split.validation_days "
                         "and split.test_days (fractions of a day will do).")
    if start > last:
        raise InputError(f"split: the test begins {_local(start, offset_ms)}, but {logs}. Set an earlier "
                         "split.test_start.")
    return SplitTimes(validation, start, end)


def _local(time_ms: int, offset_ms: int) -> str:
    return f"{datetime.fromtimestamp((time_ms + offset_ms) // 1000, UTC):%Y-%m-%d %H:%M}"


def test_users_identity(split: SplitConfig) -> str | None:
    """What says who the held-out users are: a hash of the ids in the file, or of the share and its seed."""
    if split.test_users is None:
        return None
    if isinstance(split.test_users, str):
        ids = np.unique(_users_of(tuple(list_files(split.test_users, "split.test_users"))))
        return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]
    return f"{split.test_users.share} {split.test_users.seed}"


def is_test_user(user_ids: np.ndarray, split: SplitConfig) -> np.ndarray | None:
    """bool, true for the held-out users of split.test_users; None where it names none.

    A share holds a user out if the seeded hash of the id lies in the first `share` of the hash's range: the same users
    whatever else is in the logs, and a larger share holds the smaller one's users.

    Args:
        user_ids: int64.

    Raises:
        InputError: if the file of users is missing or has no int64 `user_id`.
    """
    if split.test_users is None:
        return None
    if isinstance(split.test_users, str):
        files = list_files(split.test_users, "split.test_users")
        return np.isin(user_ids, _users_of(tuple(files)))
    share = split.test_users.share
    return user_hash(user_ids, split.test_users.seed).astype(np.float64) < share * 2.0**64


@lru_cache(maxsize=4)
def _users_of(files: tuple) -> np.ndarray:
    wanted = Wanted("user_id", "user_id", "id")
    found = []
    for file in files:
        try:
            with file.open() as handle:
                parquet = open_parquet(handle, file.name)
                check_columns(parquet.schema_arrow, [wanted], file.name)
                column = parquet.read(columns=["user_id"])["user_id"]
        except (pa.ArrowException, OSError) as error:
            raise corrupt(file.name, error) from error
        found.append(cast_column(column, wanted, file.name).drop_null().to_numpy())
    return np.unique(np.concatenate(found))
