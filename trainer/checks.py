"""What a faithful CRM shows, held against what was measured (docs/evaluation.md has the table).

Each check gives one value a seed; it is reached when every seed reaches the floor. The floors are those of the
KuaiRand part: on other logs they are a yardstick and no verdict, and no run fails by them (`gates` does that).
A value that was not measured leaves the check open (`ok` is None), it never passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.schema import ModelConfig
from trainer.metrics import strictly_rising, value_range

PerSeed = dict[str, float | bool | None]
LIFT_RANGE_S = (30.0, 300.0)
SHORT_S, LONG_S = 10.0, 300.0


@dataclass(frozen=True)
class Check:
    """One row of the table: whom it concerns, what is computed a seed, and what it must reach."""

    name: str
    text: str
    concerns: Callable[[ModelConfig], bool]
    measure: Callable[[Mapping[str, Any], str, int], tuple[PerSeed, str]]
    limit: Mapping[str, float | bool | None]
    """tower: floor (or ceiling); None: reported without one."""

    at_most: bool = False

    def judge(self, metrics: Mapping[str, Any], model: ModelConfig, k: int) -> dict[str, Any]:
        value, note = self.measure(metrics, model.name, k)
        limit = self.limit[model.tower]
        return {"property": self.text.format(k=k), "value": value, "floor": limit,
                "direction": "at most" if self.at_most else "at least", "ok": self._ok(value, limit), "note": note}

    def _ok(self, value: PerSeed, limit: float | bool | None) -> bool | None:
        if limit is None or not value or any(v is None for v in value.values()):
            return None
        return all(v <= limit if self.at_most else v >= limit for v in value.values())


def crm_checks(metrics: Mapping[str, Any], models: Sequence[ModelConfig], k: int) -> dict[str, Any]:
    """Every check for every model it concerns.

    Args:
        metrics: crm, crm_gains and training as `trainer.results.assemble` makes them.
        models: `crm.models` of the run.
        k: the list length that recall and watch time are taken at.

    Returns:
        check: model: {property, value (per seed), floor, direction, ok, note}; {"absent": reason} where the run has
        no model that the check concerns.
    """
    checks: dict[str, Any] = {}
    for check in CHECKS:
        there = [model for model in models if model.name in metrics["crm"] and check.concerns(model)]
        checks[check.name] = ({model.name: check.judge(metrics, model, k) for model in there}
                              or {"absent": "no model of this run is of the kind that this concerns"})
    return checks


def _series(metrics: Mapping[str, Any], model: str, field: str) -> dict[str, list[tuple[float, float | None]]]:
    """seed: (condition in seconds, value) along the control curve."""
    curve = metrics["crm"][model].get("control_curve", [])
    seeds = sorted({seed for point in curve for seed in point["per_seed"]})
    return {seed: [(point["condition_s"], point["per_seed"].get(seed, {}).get(field)) for point in curve]
            for seed in seeds}


def _prefix_ranks(metrics, model, k):
    per_seed = metrics["training"][model]["per_seed"]
    return ({seed: summary.get("prefix_ranks_identical") for seed, summary in per_seed.items()},
            "ranks of the same requests under every condition of the curve")


def _recall_spread(metrics, model, k):
    curve = metrics["crm"][model].get("control_curve", [])
    recall = next((name for point in curve for name in point if name.startswith("recall@")), f"recall@{k}")
    value: PerSeed = {}
    for seed, points in _series(metrics, model, recall).items():
        low, high = value_range([_number(v) for _, v in points])
        mean = sum(_number(v) for _, v in points) / len(points)
        value[seed] = (high - low) / mean if mean > 0 else None
    return value, "(greatest - least) / mean of the curve's recall"


def _curve_ratio(metrics, model, k):
    value: PerSeed = {}
    ends = ""
    for seed, points in _series(metrics, model, "retrieved_watch_s").items():
        conditions = [condition for condition, _ in points]
        short = SHORT_S if SHORT_S in conditions else conditions[0]
        long = LONG_S if LONG_S in conditions else conditions[-1]
        low, high = _number(dict(points)[short]), _number(dict(points)[long])
        value[seed] = high / low if low > 0 and high == high else None
        ends = f"retrieved watch time at {long:g} s over {short:g} s"
    return value, ends


def _rising(metrics, model, k):
    series = {seed: [_number(v) for _, v in points]
              for seed, points in _series(metrics, model, "retrieved_watch_s").items()}
    low, high = value_range([v for values in series.values() for v in values])
    return ({seed: strictly_rising(values) for seed, values in series.items()},
            f"retrieved watch time between {low:.3g} and {high:.3g} s")


def _least_lift(metrics, model, k):
    value: PerSeed = {}
    for seed, points in _series(metrics, model, "bucket_lift").items():
        lifts = [lift for condition, lift in points if LIFT_RANGE_S[0] <= condition <= LIFT_RANGE_S[1]]
        value[seed] = min(lifts) if lifts and None not in lifts else None
    return value, f"the least over conditions of {LIFT_RANGE_S[0]:g} to {LIFT_RANGE_S[1]:g} s"


def _gain(name: str):
    def measure(metrics, model, k):
        gain = metrics["crm_gains"].get(model, {}).get(name)
        if gain is None:
            return {}, "not measured: the other side of the comparison is not in this run"
        low, high = gain["ci95"]
        return dict(gain["per_seed"]), f"{gain['mean']:+.1%}, 95% interval {low:+.1%} to {high:+.1%}"
    return measure


def _recall(metrics, model, k):
    measured = metrics["crm"][model].get("none", {}).get(f"recall@{k}")
    return dict(measured["per_seed"]) if measured else {}, "the MLP's floor is with first-period targets"


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _controlled(model: ModelConfig) -> bool:
    return model.condition in ("next", "to_go") and not model.permute_watch


def _permuted(model: ModelConfig) -> bool:
    return model.condition != "none" and model.permute_watch


def _both(limit: float | bool | None) -> dict[str, float | bool | None]:
    return {"dnn": limit, "decision_transformer": limit}


CHECKS = (
    Check("prefix_ranks_identical", "prefix: ranks for any two conditions are identical",
          lambda m: m.condition == "prefix", _prefix_ranks, _both(True)),
    Check("permuted_recall_spread", "permuted watch times: spread of recall@{k} over conditions",
          _permuted, _recall_spread, _both(0.05), at_most=True),
    Check("permuted_curve_ratio", "permuted watch times: control curve, long over short",
          _permuted, _curve_ratio, _both(1.1), at_most=True),
    Check("curve_strictly_rising", "control curve strictly rising", _controlled, _rising, _both(True)),
    Check("curve_ratio", "control curve, long over short",
          _controlled, _curve_ratio, {"dnn": 5.0, "decision_transformer": 3.5}),
    Check("bucket_lift", "bucket lift, least over conditions", _controlled, _least_lift, _both(1.4)),
    Check("oracle_over_unconditioned", "recall@{k}, true condition over the unconditioned tower",
          _controlled, _gain("oracle_over_unconditioned"), _both(0.35)),
    Check("null_over_unconditioned", "recall@{k}, null condition against the unconditioned tower",
          _controlled, _gain("null_over_unconditioned"), {"dnn": -0.18, "decision_transformer": -0.12}),
    Check("maximum_over_average", "watch time of the retrieved, maximum over average",
          _controlled, _gain("maximum_over_average_watch"), _both(0.15)),
    Check("unconditioned_recall", "recall@{k} of the unconditioned tower",
          lambda m: m.condition == "none" and not m.permute_watch, _recall,
          {"dnn": 0.33, "decision_transformer": 0.32}),
    Check("oracle_over_bayes", "recall@{k}, true condition over the Bayes term (no floor)",
          _controlled, _gain("oracle_over_bayes"), _both(None)),
)
