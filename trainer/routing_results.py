"""From every shard's judgement to the `routing` part of metrics.json: means, intervals, paired gains, and the checks.

    routing.<selector>.budget=<B>.overall.recall@100          {"mean", "ci95", "n", "per_seed"}
    routing.<selector>.budget=<B>.<channel>.recall@100, .uniq@100, .trigger_overlap
    routing.<selector>.budget=<B>.overall.gain_over_<other>@100   paired relative gain over another selector
    routing.<selector>.budget=<B>.overall.gain_over_recent_equal_length@100   the same over `recent`, both unions cut to
                                                              the length of the shorter one, request by request
    routing.<selector>.budget=<B>.overall.way_to_oracle@100   share of the way from `recent` to `oracle`
    routing.overlap           value and from; what validation requests say of each value, where it was chosen
    routing.<selector> = {"absent": reason}
    routing.checks, routing.channels, routing.requests

All intervals are bootstrap intervals over users (with all their requests) and seeds. A gain whose interval holds 0 is
said not to be there. Shape suffixes: S = seeds, R = requests, M = measures, P = pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from configs.schema import Config
from trainer.metrics import bootstrap_cis, paired_cis
from trainer.routing import NEVER
from trainer.routing_evaluation import JOINT, ShardJudgement, length_name

BEST = "best_baseline"
NO_BASELINE = ("oracle", "popular", "past-replay", "item-value", "random")
BASES = ("recent", "past-replay", "watch-time-top", BEST)


@dataclass(frozen=True)
class Judged:
    """All test requests under all selectors: values[name][budget] float32 (S, M, R), seeds[name]."""

    names: Sequence[str]
    user_id_R: np.ndarray
    values: Mapping[str, Mapping[int, np.ndarray]]
    seeds: Mapping[str, Sequence[int]]

    @cached_property
    def place(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def of(self, selector: str, budget: int, measures: Sequence[str]) -> np.ndarray:
        """float32 (len(measures), S, R)."""
        at = [self.place[name] for name in measures]
        return self.values[selector][budget][:, at].transpose(1, 0, 2)


def joined(names: Sequence[str], shards: Sequence[ShardJudgement]) -> Judged:
    """The judgements of all shards as one."""
    keys = sorted({key for shard in shards for key in shard.values})
    user_id_R = np.concatenate([shard.user_id_R for shard in shards])
    values: dict[str, dict[int, list[np.ndarray]]] = {}
    seeds: dict[str, list[int]] = {}
    for name, seed, budget in keys:
        parts = [shard.values[name, seed, budget] for shard in shards if len(shard.user_id_R)]
        values.setdefault(name, {}).setdefault(budget, []).append(np.concatenate(parts, axis=1))
        if seed not in seeds.setdefault(name, []):
            seeds[name].append(seed)
    return Judged(names, user_id_R, {name: {b: np.stack(v) for b, v in of.items()} for name, of in values.items()},
                  seeds)


def routing_metrics(judged: Judged, config: Config, channels: Sequence[str], absent: Mapping[str, str],
                    order: Sequence[str]) -> dict[str, Any]:
    """The `routing` part of metrics.json.

    Args:
        absent: selectors that these logs cannot have, and why.
        order: of the selectors.
    """
    metrics: dict[str, Any] = {}
    routers = router_names(config)
    for name in order:
        if name in absent:
            metrics[name] = {"absent": absent[name]}
        elif name in judged.values:
            metrics[name] = {f"budget={b}": _of_budget(judged, name, b, config, channels, routers)
                             for b in sorted(judged.values[name])}
    metrics["channels"] = list(channels)
    metrics["budgets"] = sorted(set(config.routing.budgets))
    metrics["routers"] = [name for name in routers if name in judged.values]
    metrics["requests"] = {"n": len(judged.user_id_R), "users": len(np.unique(judged.user_id_R)),
                           "window": config.replay.window, "beta": config.routing.beta}
    metrics["checks"] = routing_checks(judged, config, channels)
    return metrics


def router_names(config: Config) -> list[str]:
    """The routers of the config, the first one's joint assignment behind them."""
    names = [model.name for model in config.router.models]
    return [*names, names[0] + JOINT]


def lengths(config: Config) -> list[str]:
    """K as the metrics name it: 10, 50, .., all."""
    return [length_name(k) for k in [*sorted(set(config.routing.at)), NEVER]]


def measured(interval: np.ndarray, values_SR: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    """A measured value as metrics.json holds it."""
    finite_SR = np.isfinite(values_SR)
    per_seed = {str(seed): float(values[finite].mean(dtype=np.float64)) if finite.any() else math.nan
                for seed, values, finite in zip(seeds, values_SR, finite_SR, strict=True)}
    return {"mean": float(interval[0]), "ci95": [float(interval[1]), float(interval[2])],
            "n": int(finite_SR.any(axis=0).sum()), "per_seed": per_seed}


def best_baseline(judged: Judged, config: Config, budget: int, measure: str) -> str:
    """The baseline (neither a router nor a control) with the greatest mean. It is chosen on the test requests
    themselves, in its own favour."""
    rules = [name for name in judged.values if name not in NO_BASELINE and name not in router_names(config)]
    means = {name: np.nanmean(judged.of(name, budget, [measure]).astype(np.float64)) for name in rules}
    return max(rules, key=lambda name: (means[name], name == "recent"))


def _of_budget(judged: Judged, name: str, budget: int, config: Config, channels: Sequence[str],
               routers: Sequence[str]) -> dict[str, Any]:
    values_MSR = judged.of(name, budget, judged.names)
    intervals = bootstrap_cis(values_MSR, judged.user_id_R, config.routing.bootstrap, config.routing.seed)
    found: dict[str, Any] = {}
    for measure, interval, values_SR in zip(judged.names, intervals, values_MSR, strict=True):
        if math.isfinite(interval[0]):
            _put(found, measure, measured(interval, values_SR, judged.seeds[name]))
    pairs = [(f"overall.recall@{k}", base) for base in (BASES if name in routers or name in NO_BASELINE else BASES[:1])
             for k in lengths(config)]
    if name in routers:
        pairs += [(f"{c}.recall@{k}", base) for c in channels for base in BASES for k in lengths(config)]
    for (measure, base), gain in zip(pairs, gains(judged, config, name, budget, pairs), strict=True):
        if gain is not None:
            scope, _, rest = measure.partition(".recall@")
            _put(found, f"{scope}.gain_over_{base}@{rest}", gain)
    for k, gain in zip(lengths(config), gains_at_equal_length(judged, config, name, budget), strict=True):
        if name != "recent":
            _put(found, f"overall.gain_over_recent_equal_length@{k}", gain)
    for k in lengths(config):
        way = way_to_oracle(judged, name, budget, f"overall.recall@{k}")
        if way is not None:
            _put(found, f"overall.way_to_oracle@{k}", way)
    return found


def gains(judged: Judged, config: Config, name: str, budget: int, pairs: Sequence[tuple[str, str]]
          ) -> list[dict[str, Any] | None]:
    """Paired relative gains of a selector over others at measures; None over itself and over one that is not there."""
    found: list[dict[str, Any] | None] = [None] * len(pairs)
    own, other, where = [], [], []
    for place, (measure, base) in enumerate(pairs):
        base = best_baseline(judged, config, budget, measure) if base == BEST else base
        if base != name and base in judged.values:
            own.append(judged.of(name, budget, [measure])[0])
            other.append(judged.of(base, budget, [measure])[0])
            where.append((place, base))
    if not where:
        return found
    seeds = max(len(values) for values in (*own, *other))
    a_PSR, b_PSR = (np.stack([np.broadcast_to(values, (seeds, values.shape[1])) for values in side]).astype(np.float64)
                    for side in (own, other))
    of_seeds = judged.seeds[name] if len(judged.seeds[name]) == seeds else range(seeds)
    for (place, base), gain in zip(where, _paired(judged, config, a_PSR, b_PSR, of_seeds), strict=True):
        found[place] = gain | {"over": base}
    return found


def gains_at_equal_length(judged: Judged, config: Config, name: str, budget: int) -> list[dict[str, Any]]:
    """At each K the paired gain over `recent` where neither may bring more items than the other: so much is better, and
    what is left of the plain gain is longer."""
    a_PSR, b_PSR = (judged.of(name, budget, [f"overall.{whose}_equal_length@{k}" for k in lengths(config)])
                    .astype(np.float64) for whose in ("recall", "recent"))
    return [gain | {"over": "recent"} for gain in _paired(judged, config, a_PSR, b_PSR, judged.seeds[name])]


def _paired(judged: Judged, config: Config, a_PSR: np.ndarray, b_PSR: np.ndarray, seeds: Sequence[int]
            ) -> list[dict[str, Any]]:
    """Relative gains of a over b with their intervals, as metrics.json holds them."""
    intervals, found = paired_cis(a_PSR, b_PSR, judged.user_id_R, config.routing.bootstrap, config.routing.seed), []
    for interval, a_SR, b_SR in zip(intervals, a_PSR, b_PSR, strict=True):
        both_SR = np.isfinite(a_SR) & np.isfinite(b_SR)
        per_seed = {str(seed): _relative(a_R[both], b_R[both])
                    for seed, a_R, b_R, both in zip(seeds, a_SR, b_SR, both_SR, strict=True)}
        low, high = float(interval[1]), float(interval[2])
        found.append({"mean": float(interval[0]), "ci95": [low, high], "n": int(both_SR.any(axis=0).sum()),
                      "per_seed": per_seed})
    return found


def way_to_oracle(judged: Judged, name: str, budget: int, measure: str) -> dict[str, Any] | None:
    """(own - recent) / (oracle - recent), of the means; None where the oracle does not lead."""
    if "oracle" not in judged.values or name in ("oracle", "recent", "popular"):
        return None
    mean_of = {other: np.nanmean(judged.of(other, budget, [measure]).astype(np.float64), axis=(0, 2))[0]
               for other in {"recent", "oracle"}}
    span = mean_of["oracle"] - mean_of["recent"]
    if not span > 0:
        return None
    own_S = np.nanmean(judged.of(name, budget, [measure])[0].astype(np.float64), axis=1)
    per_seed = {str(seed): float((own - mean_of["recent"]) / span)
                for seed, own in zip(judged.seeds[name], own_S, strict=True)}
    return {"mean": float((own_S.mean() - mean_of["recent"]) / span), "per_seed": per_seed}


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.mean() / b.mean() - 1) if len(b) and b.mean() else math.nan


def _put(metrics: dict[str, Any], name: str, value: Any) -> None:
    """Under overall or a channel, then `window=<W>` where the name has one."""
    scope, _, rest = name.partition(".")
    node = metrics.setdefault(scope, {})
    if rest.startswith("window="):
        window, _, rest = rest.partition(".")
        node = node.setdefault(window, {})
    node[rest] = value


# --------------------------------------------------------------------------------------------------------- the checks

@dataclass(frozen=True)
class RoutingCheck:
    """One property of docs/evaluation.md's table: a gain, or a difference, of the first router at the least budget.

    against: None takes the first router without the diversity term. lower: the interval's lower end must reach the
    limit, or lie above it where it is 0; else the mean. difference: of two shares, not relative.
    """

    name: str
    text: str
    scope: str
    measure: str
    against: str | None
    limit: float
    lower: bool = False
    difference: bool = False


def _checks_of(channels: Sequence[str], at: Sequence[str]) -> list[RoutingCheck]:
    found = [RoutingCheck(f"over_recent_{k}", f"over recent at K = {k}, lower end", "overall", f"recall@{k}", "recent",
                          limit, lower=True) for k, limit in (("50", 0.05), ("100", 0.05), ("200", 0.03))]
    found += [RoutingCheck(f"{c}_over_watch_time_top_100", f"{c}: over watch-time-top at K = 100", c, "recall@100",
                           "watch-time-top", 0.0, lower=True) for c in channels]
    found += [RoutingCheck(f"over_past_replay_{k}", f"over past-replay at K = {k}", "overall", f"recall@{k}",
                           "past-replay", 0.0, lower=True) for k in at if k == "all" or int(k) >= 200]
    found += [RoutingCheck(f"{c}_uniq_100", f"{c}: Uniq@100, diversity term on against off", c, "uniq@100", None, 0.05,
                           difference=True) for c in channels if c in ("swing", "embedding")]
    found.append(RoutingCheck("diversity_recall_all", "recall@all, diversity term on against off", "overall",
                              "recall@all", None, 0.02))
    return found


def routing_checks(judged: Judged, config: Config, channels: Sequence[str]) -> dict[str, Any]:
    """What a faithful CAPTS shows, held against what was measured: a yardstick on other logs than KuaiRand, no verdict.

    Returns:
        check: {property, value, ci95, limit, ok, says}; or {"absent": reason}.
    """
    budget, first = min(config.routing.budgets), config.router.models[0].name
    plain = next((m.name for m in config.router.models if not m.diversity and m.calibrator), None)
    found: dict[str, Any] = {}
    for check in _checks_of(channels, lengths(config)):
        against = check.against or plain
        measure = f"{check.scope}.{check.measure}"
        missing = next((name for name in (first, against) if name is None or name not in judged.values), "")
        if missing != "" or measure not in judged.place:
            reason = f"{missing or 'a router without the diversity term'} was not judged" if missing != "" else (
                f"{measure} was not measured")
            found[check.name] = {"property": check.text, "absent": reason}
            continue
        interval = (_difference(judged, config, first, against, budget, measure) if check.difference else
                    _gain_interval(judged, config, first, against, budget, measure))
        value, low, high = (float(v) for v in interval)
        reached = low if check.lower else value
        form = "+.3f" if check.difference else "+.1%"
        found[check.name] = {
            "property": f"{first} {check.text}, budget {budget}", "over": against, "value": value, "ci95": [low, high],
            "limit": check.limit, "limit_of": "lower end" if check.lower else "mean",
            "ok": bool(reached > check.limit if check.limit == 0 else reached >= check.limit)
            if math.isfinite(reached) else None,
            "says": f"{value:{form}} [{low:{form}}, {high:{form}}]: {in_words(low, high)}"}
    return found


def in_words(low: float | None, high: float | None) -> str:
    """What an interval of a gain says."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "not measured"
    return "a gain" if low > 0 else "a loss" if high < 0 else "not there (the interval holds 0)"


def _gain_interval(judged, config, first, against, budget, measure):
    a_SR, b_SR = (judged.of(name, budget, [measure])[0][None] for name in (first, against))
    return paired_cis(a_SR, b_SR, judged.user_id_R, config.routing.bootstrap, config.routing.seed)[0]


def _difference(judged, config, first, against, budget, measure):
    a_SR, b_SR = (judged.of(name, budget, [measure])[0].astype(np.float64) for name in (first, against))
    return bootstrap_cis((a_SR - b_SR)[None], judged.user_id_R, config.routing.bootstrap, config.routing.seed)[0]
