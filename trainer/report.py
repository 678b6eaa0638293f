"""The report of a run: one HTML file that needs nothing else, and a table for the terminal.

`report.html` is made from what lies in the run folder (metrics.json, events.jsonl, sequences/manifest.json,
config.yaml). A part that is not there is named as missing instead of being left out. Everything that comes from a
config or a log is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from configs.loader import MOST_BYTES
from configs.secrets import redact
from embeddings.untrusted import read_bytes, read_json
from trainer.charts import COLOURS, Dot, Series, bar_chart, dot_chart, line_chart, missing_figure
from trainer.events import read_events
from trainer.page import absent, dot_value, is_number, number, section, table, verdict, with_interval
from trainer.results import write_whole
from trainer.routing_report import routing_lines, routing_sections

LOSS_POINTS = 150
STRATEGIES = {
    "none": "no condition", "null": "the unknown bucket", "average": "the user's average watch time",
    "maximum": "the user's longest watch time", "multiplexed": "average or maximum, by Algorithm 1 of CRM",
    "fixed": "the same seconds for everybody", "oracle": "the true next watch time: a ceiling, not a method",
}

_LIGHT = """--paper:#fff;--card:#f6f7f9;--ink:#1b2127;--soft:#515c66;--faint:#d9dee3;--good:#00704f;--bad:#b23c00;
--s0:#0072b2;--s1:#d55e00;--s2:#00875f;--s3:#a3478a;--s4:#94700a;--s5:#5a6570"""
_DARK = """--paper:#14181c;--card:#1d2328;--ink:#e6eaee;--soft:#a9b4be;--faint:#343d45;--good:#4fd0a0;--bad:#ff9a62;
--s0:#5ab6ef;--s1:#ff8f4a;--s2:#35cf9f;--s3:#eb9fd0;--s4:#efc44f;--s5:#aeb9c3"""
STYLE = f"""
:root{{{_LIGHT};color-scheme:light dark}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
""" + """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;background:var(--paper);color:var(--ink);max-width:1180px;margin:0 auto;
  padding:24px 20px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}
h2{font-size:20px;margin:44px 0 10px;padding-top:14px;border-top:1px solid var(--faint)}
p{max-width:78ch;margin:6px 0 12px}
.soft,.open{color:var(--soft)}
.absent{color:var(--soft);font-style:italic}
code,pre{font:13.5px/1.45 ui-monospace,monospace}
pre{background:var(--card);padding:14px;border-radius:8px;overflow:auto}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:16px 0}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:15px;font-variant-numeric:tabular-nums;margin:10px 0}
th,td{padding:5px 18px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--faint)}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
td.n,th.n{text-align:right;white-space:nowrap}
tbody th{font-weight:600;overflow-wrap:anywhere;min-width:9em}
.good,.bad{font-weight:600;white-space:nowrap}
.good{color:var(--good)}
.bad{color:var(--bad)}
.meter{display:inline-block;height:10px;background:var(--s0);border-radius:2px;vertical-align:middle}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:22px;align-items:start}
figure{margin:0;background:var(--card);border-radius:10px;padding:14px 16px 12px;min-width:0}
figure.wide{margin-top:22px}
figcaption{font-weight:600;margin-bottom:6px}
.chart{display:block;width:100%;height:auto;min-width:420px}
.wide .chart{min-width:820px}
.chart text{font:12.5px system-ui,sans-serif;fill:var(--ink)}
.chart .tick,.chart .axis,.chart .value{fill:var(--soft)}
.chart .group{font-weight:600}
.grid{stroke:var(--faint);fill:none}
.base{stroke:var(--soft);fill:none}
.level{stroke:var(--soft);stroke-dasharray:4 4;fill:none}
.mean{fill:none;stroke-width:2.2;stroke-linejoin:round}
.member{fill:none;stroke-width:1;opacity:.4}
.mark{stroke:var(--card)}
.hollow{fill:var(--card);stroke-width:1.8}
.whisker{fill:none;stroke-width:2}
.bar{fill:var(--s0)}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:8px 0 0;padding:0;font-size:13.5px}
.legend svg{vertical-align:-1px;margin-right:6px}
@media print{
  figure,tr{break-inside:avoid} h2{break-after:avoid} details{display:none}
  .scroll{overflow:visible} .chart,.wide .chart{min-width:0} body{max-width:none;padding:0}
}
""" + "".join(f".mean.c{i},.member.c{i},.whisker.c{i},.hollow.c{i}{{stroke:var(--s{i})}}.mark.c{i}{{fill:var(--s{i})}}"
              for i in range(COLOURS))


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html of a run folder, in one step, and returns its path. Parts that are missing are said to be."""
    run_dir = Path(run_dir)
    metrics = _json(run_dir / "metrics.json")
    slots = {name: slot for slot, name in enumerate(metrics.get("crm", {}))}
    curves = training_curves(run_dir / "events.jsonl")
    for model in curves["loss"].keys() | curves["validation"].keys():
        slots.setdefault(model, len(slots))
    name = str(metrics.get("provenance", {}).get("name") or run_dir.name)
    sections = [
        _header(name, metrics.get("provenance", {})),
        section("Results", _results(metrics) + _strategy_chart(metrics, slots)),
        section("Control", _control(metrics, slots)),
        section("What a faithful CRM shows", _checks(metrics)),
        *([section("Against the synthetic world", _synthetic(metrics))] if metrics.get("synthetic") else []),
        *routing_sections(metrics),
        section("Training", _training(curves, slots)),
        section("Data", _data(_json(run_dir / "sequences" / "manifest.json"))),
        section("Indexes", _indexes(metrics)),
        section("Stages", _stages(metrics)),
        section("Where the numbers come from", _origin(metrics, run_dir / "config.yaml")),
    ]
    page = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)} - Watchtower</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<style>{STYLE}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n")
    return write_whole(run_dir / "report.html", page)


LEGEND = (
    "null: asked for nothing; average, maximum: for the user's own; multiplexed: for one of the two; fixed_60:",
    "for 60 s; oracle: for the true next watch time, a ceiling and no method; none: cannot be asked.",
    "retrieved s: what the items of a list are watched for; hit s: what the view that was found lasted.")


def results_table(metrics: Mapping[str, Any]) -> str:
    """The results for a terminal, at most 110 columns wide: every model and strategy, control curves, checks."""
    k = _length(metrics)
    if k is None:
        return "\n".join(routing_lines(metrics)) or "no results: nothing was evaluated"
    columns = [34, 11, 20, 8, 11, 7, 6]
    lines = [_row(["model", "strategy", f"recall@{k} [95%]", f"ndcg@{k}", "retrieved s", "hit s", "n"], columns)]
    lines.append("-" * len(lines[0]))
    for name, model in metrics["crm"].items():
        for place, (strategy, values) in enumerate(_strategies(model)):
            recall = values.get(f"recall@{k}", {})
            lines.append(_row([name if place == 0 else "", strategy, with_interval(recall),
                               number(_mean(values, f"ndcg@{k}"), ".3f"),
                               number(_mean(values, f"retrieved_watch_s@{k}"), ".1f"),
                               number(_mean(values, f"hit_watch_s@{k}"), ".1f"), str(recall.get("n", "-"))], columns))
    lines += ["", *LEGEND]
    routing = routing_lines(metrics)
    return "\n".join(lines + _curve_lines(metrics) + _check_lines(metrics) + _synthetic_lines(metrics)
                     + ([""] if routing else []) + routing)


def training_curves(events: Path) -> dict[str, dict[str, dict[str, list[tuple[float, float]]]]]:
    """Loss by step and validation recall by epoch: {"loss" | "validation": {model: {seed: [(x, y), ..]}}}.

    A continued run tells some steps twice; what was told last counts, and what an earlier run told beyond is dropped.
    """
    told: dict[str, dict[tuple[str, str], dict[float, float]]] = {"loss": {}, "validation": {}}
    for event in read_events(events):
        if event["event"] == "train_step":
            kind, x, y = "loss", event.get("step"), event.get("loss")
        elif event["event"] == "epoch":
            kind, x, y = "validation", event.get("epoch"), _validation_recall(event)
        else:
            continue
        if is_number(x) and is_number(y):
            model, _, seed = str(event.get("model", "")).partition("/seed=")
            line = told[kind].setdefault((model, seed), {})
            for later in [step for step in reversed(line) if step >= x]:
                del line[later]
            line[x] = y
    curves: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {"loss": {}, "validation": {}}
    for kind, lines in told.items():
        for (model, seed), line in lines.items():
            curves[kind].setdefault(model, {})[seed] = sorted(line.items())
    return curves


# ------------------------------------------------------------------------------------------------------------ sections

def _header(name: str, provenance: Mapping[str, Any]) -> str:
    if not provenance:
        return f'<h1>{escape(name)}</h1><p class="absent">No metrics.json yet: this run was not evaluated.</p>'
    hardware = provenance.get("hardware") or {}
    gpus = ", ".join(hardware.get("gpus") or []) or "no GPU"
    commit = provenance.get("commit") or "not known"
    changed = " with uncommitted changes" if provenance.get("uncommitted_changes") else ""
    return (f'<h1>{escape(name)}</h1><p class="soft">Watchtower run report</p>' + _facts([
        ("Made", provenance.get("created_at")), ("Version", provenance.get("version")),
        ("Commit", f"{str(commit)[:12]}{changed}"), ("Config hash", str(provenance.get("config_hash"))[:16]),
        ("Seeds", ", ".join(map(str, provenance.get("seeds") or []))), ("Intervals", provenance.get("intervals")),
        ("Hardware", f"{hardware.get('cpu')}, {hardware.get('cores')} cores, {hardware.get('memory_gib')} GiB, "
                     f"{gpus}")]))


def _results(metrics: Mapping[str, Any]) -> str:
    k = _length(metrics)
    if k is None:
        return absent("nothing was evaluated")
    rows = []
    for name, model in metrics["crm"].items():
        strategies = _strategies(model)
        for place, (strategy, values) in enumerate(strategies):
            recall = values.get(f"recall@{k}", {})
            head = f'<th scope="rowgroup" rowspan="{len(strategies)}">{escape(name)}</th>' if place == 0 else ""
            rows.append(f"<tr>{head}<td>{escape(strategy)}</td>" + "".join(f'<td class="n">{cell}</td>' for cell in (
                escape(with_interval(recall)), number(_mean(values, f"ndcg@{k}"), ".3f"),
                number(_mean(values, f"hit_rate@{k}"), ".3f"), number(_mean(values, f"retrieved_watch_s@{k}"), ".1f"),
                number(_mean(values, f"hit_watch_s@{k}"), ".1f"), number(recall.get("n"), ",d"))) + "</tr>")
    used = {strategy.split("_")[0] for model in metrics["crm"].values() for strategy, _ in _strategies(model)}
    words = "; ".join(f"<b>{name}</b> {escape(text)}" for name, text in STRATEGIES.items() if name in used)
    return (f'<p class="soft">Means over seeds, with 95% intervals. Conditions: {words}.</p>'
            + table(["Model", "Condition", f"Recall@{k} [95%]", f"NDCG@{k}", f"Hit rate@{k}", "Retrieved, s", "Hit, s",
                      "Requests"], rows, numbers_from=2))


def _strategy_chart(metrics: Mapping[str, Any], slots: Mapping[str, int]) -> str:
    k = _length(metrics)
    if k is None:
        return ""
    names = (f"recall@{k}", f"retrieved_watch_s@{k}")
    groups = [(model, [Dot(strategy, [dot_value(values.get(name)) for name in names], slots[model],
                           hollow=strategy == "oracle") for strategy, values in _strategies(result)])
              for model, result in metrics["crm"].items()]
    return dot_chart(
        "What each condition finds, and how long it is watched",
        f"Recall at {k} with 95% intervals, and mean watch time of the retrieved items, for every model and condition. "
        "Hollow marks are the oracle.", groups,
        [(f"Recall@{k}, with 95% interval (hollow: oracle)", lambda v: f"{v:.3f}"),
         (f"Watch time of the {k} retrieved, seconds", lambda v: f"{v:.1f}")])


def _control(metrics: Mapping[str, Any], slots: Mapping[str, int]) -> str:
    curves = _curves(metrics)
    if not curves:
        return absent("no conditioned model was evaluated along a curve")
    fields = [field for curve in curves.values() for field in curve[0]]
    recall = next((field for field in fields if field.startswith("recall@")), "recall@100")
    ticks = sorted({point["condition_s"] for curve in curves.values() for point in curve if point["condition_s"] > 0})
    asked = "Watch time asked for, seconds (log scale)"

    def chart(title: str, field: str, y_label: str, level: float | None = None) -> str:
        series = [Series(name, _curve_points(curve, field), slots[name],
                         [_curve_points(curve, field, seed) for seed in sorted(curve[0]["per_seed"])])
                  for name, curve in curves.items()]
        described = f"{y_label} against the watch time asked for, mean over seeds; thin lines are single seeds."
        return line_chart(title, described, series, asked, y_label, log_x=True, x_ticks=ticks, level=level)
    return ('<p class="soft">The same requests, asked for different watch times. A tower that obeys gives a rising '
            'curve; thin lines are single seeds.</p><div class="charts">'
            + chart("Control curve", "retrieved_watch_s", "Watch time of the retrieved, s")
            + chart("Bucket lift", "bucket_lift", "Lift (dashed, 1: no effect)", 1.0)
            + chart("Recall along the curve", recall, recall.capitalize()) + "</div>")


def _checks(metrics: Mapping[str, Any]) -> str:
    checks = metrics.get("crm_checks")
    if not checks:
        return absent("nothing was evaluated")
    rows, verdicts = [], []
    for name, models in checks.items():
        if "absent" in models:
            rows.append(f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td colspan="3" class="open">'
                        f'{escape(str(models["absent"]))}</td><td class="open">not run</td></tr>')
            continue
        for model, check in models.items():
            verdicts.append(check["ok"])
            form = "+.1%" if "_over_" in name else ".3g"
            values = ", ".join(_check_value(v, form) for v in check["value"].values()) or "-"
            limit = "-" if check["floor"] is None else f"{check['direction']} {_check_value(check['floor'], form)}"
            limit = "identical" if name == "prefix_ranks_identical" else "yes" if check["floor"] is True else limit
            rows.append(f'<tr><th scope="row">{escape(check["property"])}</th><td>{escape(model)}</td>'
                        f'<td>{escape(limit)}</td><td>{escape(values)}<br>'
                        f'<span class="soft">{escape(check["note"])}</span></td>'
                        f"<td>{verdict(check['ok'], check['floor'])}</td></tr>")
    judged = [ok for ok in verdicts if ok is not None]
    return (f"<p>{sum(judged)} of {len(judged)} judged properties are reached on every seed. The floors are those of "
            "the KuaiRand part; on other logs they are a yardstick, no verdict.</p>"
            + table(["Property", "Model", "Floor", "Value of each seed", "Verdict"], rows))


def _synthetic(metrics: Mapping[str, Any]) -> str:
    synthetic = metrics["synthetic"]
    if "absent" in synthetic:
        return absent(synthetic["absent"])
    k = _length(metrics)
    words = (f"The world that made these logs ranks {synthetic['requests']:,} of the test requests by what it knows. "
             "<b>history</b> knows the world and must read the user from the views that a tower sees, <b>log</b> from "
             "all views before the request; <b>lasting</b> knows the hidden user and averages over sessions, "
             "<b>true</b> knows the session's passing interest and mood, too, and no learner can. A tower's share is "
             "how much of the way it closes from its own recall unconditioned to that ceiling under the true watch "
             "time.")
    ceilings = [f'<tr><th scope="row">{escape(state)}</th>' + "".join(
        f'<td class="n">{escape(with_interval(strategies.get(name, {}).get(f"recall@{k}", {})))}</td>'
        for name in ("none", "oracle")) + "</tr>" for state, strategies in synthetic["ceiling"].items()]
    shares = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(model["unconditioned"])}</td>' + "".join(
        f'<td class="n">{escape(with_interval(model["share_of_way"].get(state, {})))}</td>'
        for state in synthetic["ceiling"]) + "</tr>" for name, model in synthetic["models"].items()]
    watched = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(strategy)}</td><td class="n">'
               f'{escape(with_interval(measured, ".1f"))}</td></tr>' for name, strategy, measured in _watched(metrics)]
    return (f'<p class="soft">{words}</p>'
            + table(["Ceiling", f"Recall@{k} [95%]", f"Recall@{k}, true watch time [95%]"], ceilings, numbers_from=1)
            + table(["Model", "From", *(f"Share of the way, {state} [95%]" for state in synthetic["ceiling"])], shares,
                     numbers_from=2)
            + f'<p class="soft">What users would have watched of the first {k} that they were given, in seconds an '
              "item: no log can tell, the world can.</p>"
            + table(["Model", "Condition", "Would be watched, s [95%]"], watched, numbers_from=2))


def _watched(metrics: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Model, strategy and expected watch time of every list that has one, and of the lists that make it greatest."""
    k = _length(metrics)
    found = [(name, strategy, values.get(f"expected_watch_s@{k}")) for name, model in metrics["crm"].items()
             for strategy, values in _strategies(model)]
    true = metrics["synthetic"].get("ceiling", {}).get("true", {})
    found.append(("the greatest possible", "-", true.get("most_watched", {}).get(f"expected_watch_s@{k}")))
    return [(name, strategy, measured) for name, strategy, measured in found if measured]


def _training(curves: Mapping[str, Any], slots: Mapping[str, int]) -> str:
    def series(kind: str, bins: int | None) -> list[Series]:
        drawn = []
        for model, seeds in curves[kind].items():
            members = list(_binned(seeds.values(), bins))
            drawn.append(Series(model, _mean_line(members), slots[model], members if len(members) > 1 else ()))
        return sorted(drawn, key=lambda s: s.slot)

    loss, recall = series("loss", LOSS_POINTS), series("validation", None)
    epochs = sorted({x for s in recall for x, _ in s.points})
    return '<div class="charts">' + (
        line_chart("Training loss", "Loss by optimizer step, mean over seeds; thin lines are single seeds.", loss,
                   "Step", "Loss, nats", from_zero=False, markers=False)
        if loss else missing_figure("Training loss", "events.jsonl holds no train_step")) + (
        line_chart("Validation recall by epoch", "Validation recall after each epoch, mean over seeds.", recall,
                   "Epoch", "Validation recall through the index", x_ticks=epochs if len(epochs) <= 12 else None)
        if recall else missing_figure("Validation recall by epoch", "events.jsonl holds no epoch")) + "</div>"


def _data(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return absent("there is no sequences/manifest.json")
    statistics = manifest.get("statistics") or {}
    days = statistics.get("rows_by_day") or {}
    facts = [(_fact_name(key), _plain_fact(key, value)) for key, value in statistics.items()
             if value is not None and not isinstance(value, Mapping | list)]
    facts += [(_fact_name(key), ", ".join(f"{k} {_plain_fact(k, v)}" for k, v in value.items()))
              for key, value in statistics.items()
              if isinstance(value, Mapping) and key not in ("rows_by_day", "quarantined") and value
              and not any(isinstance(v, Mapping) for v in value.values())]
    bars = [(day[5:] if len(day) == 10 else day, count) for day, count in days.items()]
    return ('<div class="charts"><div>' + _facts(facts) + _quarantine(statistics) + "</div>"
            + bar_chart("Rows by day", "Number of log rows of each day.", bars, "Rows") + "</div>")


def _quarantine(statistics: Mapping[str, Any]) -> str:
    reasons = statistics.get("quarantined")
    if not isinstance(reasons, Mapping):
        return '<p class="absent">The manifest does not say what was quarantined.</p>'
    if not reasons:
        return "<p>No row was quarantined.</p>"
    return table(["Quarantined because", "Rows"],
                  [f'<tr><th scope="row">{escape(reason)}</th><td class="n">{rows:,.0f}</td></tr>'
                   for reason, rows in sorted(reasons.items(), key=lambda item: -item[1])], numbers_from=1)


def _indexes(metrics: Mapping[str, Any]) -> str:
    indexes = {name: facts for name, facts in metrics.get("index", {}).items() if isinstance(facts, Mapping)}
    if not indexes:
        return absent("no index was measured")
    rows = [f'<tr><th scope="row">{escape(name)}</th>'
            f'<td class="n">{number(facts.get("recall_vs_exact"), ".4f")}</td>'
            f'<td class="n">{number(facts.get("build_s"), ".2f")}</td>'
            f'<td class="n">{number(_over(facts.get("bytes"), 2**20), ".2f")}</td></tr>'
            for name, facts in indexes.items()]
    return table(["Index", "Recall against exact search", "Build, s", "Size, MiB"], rows, numbers_from=1)


def _stages(metrics: Mapping[str, Any]) -> str:
    stages = metrics.get("stages")
    if not stages:
        return absent("no stage has left its figures")
    longest = max((stage.get("seconds") or 0 for stage in stages.values()), default=0) or 1
    rows = [f'<tr><th scope="row">{escape(name)}</th><td class="n">{number(stage.get("seconds"), ",.1f")}</td>'
            f'<td><span class="meter" style="width:{220 * (stage.get("seconds") or 0) / longest:.0f}px"></span></td>'
            f'<td class="n">{number(stage.get("rows"), ",d")}</td>'
            f'<td class="n">{number(stage.get("peak_mib"), ",.0f")}</td></tr>' for name, stage in stages.items()]
    return table(["Stage", "Seconds", "", "Rows", "Peak memory, MiB"], rows, numbers_from=1)


def _origin(metrics: Mapping[str, Any], config: Path) -> str:
    provenance = metrics.get("provenance", {})
    packages = ", ".join(f"{name} {version}" for name, version in (provenance.get("packages") or {}).items())
    facts = _facts([("Commit", provenance.get("commit") or "not known"), ("Config hash", provenance.get("config_hash")),
                    ("Platform", provenance.get("platform")), ("Python", provenance.get("python")),
                    ("Packages", packages),
                    ("Left out", ", ".join(provenance.get("ignored_evaluations") or []) or None)])
    try:
        text = redact(read_bytes(config, MOST_BYTES).decode("utf-8", "replace"))
    except (OSError, ValueError):
        text = None
    return facts + (f"<details><summary>Resolved config</summary><pre>{escape(text)}</pre></details>" if text
                    else absent("there is no config.yaml"))


# -------------------------------------------------------------------------------------------------------- small pieces

def _facts(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs
                   if value not in (None, ""))
    return f'<dl class="facts">{rows}</dl>'


def _strategies(model: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, values) for name, values in model.items() if name != "control_curve" and isinstance(values, Mapping)]


def _length(metrics: Mapping[str, Any]) -> int | None:
    lengths = {int(name.removeprefix("recall@")) for model in metrics.get("crm", {}).values()
               for _, values in _strategies(model) for name in values if name.startswith("recall@")}
    return (100 if 100 in lengths else max(lengths)) if lengths else None


def _mean(values: Mapping[str, Any], name: str) -> float | None:
    return (values.get(name) or {}).get("mean")


def _over(value: float | None, unit: float) -> float | None:
    return value / unit if is_number(value) else None


def _curves(metrics: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {name: model["control_curve"] for name, model in metrics.get("crm", {}).items()
            if model.get("control_curve")}


def _curve_points(curve: Sequence[Mapping[str, Any]], field: str, seed: str | None = None) -> list[tuple[float, float]]:
    values = [(p["condition_s"], (p if seed is None else p["per_seed"].get(seed, {})).get(field)) for p in curve]
    return [(x, y) for x, y in values if is_number(y) and x > 0]


def _binned(lines: Iterable[Sequence[tuple[float, float]]], bins: int | None) -> Iterable[list[tuple[float, float]]]:
    """Each line as means over at most `bins` equal spans of x, the same spans for all."""
    lines = [line for line in lines if line]
    last = max((x for line in lines for x, _ in line), default=0)
    for line in lines:
        if bins is None or len(line) <= bins:
            yield list(line)
            continue
        spans: dict[int, list[float]] = {}
        for x, y in line:
            spans.setdefault(min(bins - 1, int(x / last * bins)), []).append(y)
        yield [((span + 0.5) / bins * last, sum(ys) / len(ys)) for span, ys in spans.items()]


def _mean_line(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of lines at every x that all of them have, or the first line where they share none."""
    told: dict[float, list[float]] = {}
    for line in lines:
        for x, y in line:
            told.setdefault(x, []).append(y)
    shared = [(x, sum(ys) / len(ys)) for x, ys in sorted(told.items()) if len(ys) == len(lines)]
    return shared or list(lines[0] if lines else [])


def _validation_recall(event: Mapping[str, Any]) -> float | None:
    names = [name for name in event if name.startswith("validation_recall@")]
    return event.get("validation_recall@100", event.get(names[0]) if names else None)


def _check_value(value: Any, form: str) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, form)


def _fact_name(key: str) -> str:
    """`watch_time_s` as "Watch time, s"; a time in ms is shown as a date and loses its unit."""
    if key == "end_99_9_ms":
        return "99.9% of rows before"
    words = key.removesuffix("_ms")
    return (words.removesuffix("_s") + (", s" if words.endswith("_s") else "")).replace("_", " ").capitalize()


def _plain_fact(key: str, value: Any) -> str:
    if key.endswith("_ms") and is_number(value):
        return datetime.fromtimestamp(value / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if key.endswith("_share") and is_number(value):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else (
        f"{value:.4g}" if isinstance(value, float) else str(value))


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    cut = [cell if len(cell) <= width else cell[:width - 3] + "..." for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(cell.ljust(width) if place < 3 else cell.rjust(width)
                     for place, (cell, width) in enumerate(zip(cut, widths, strict=True))).rstrip()


def _curve_lines(metrics: Mapping[str, Any]) -> list[str]:
    curves = _curves(metrics)
    if not curves:
        return []
    asked = sorted({point["condition_s"] for curve in curves.values() for point in curve})[:6]
    widths = [34, 11, 20, 8, 11, 7, 6]
    head = ["control curve: retrieved s, asked"] + [f"{condition:g} s" for condition in asked]
    lines = ["", f"{head[0]:<{widths[0]}}" + "".join(f"{cell:>12}" for cell in head[1:])]
    for name, curve in curves.items():
        at = {point["condition_s"]: point["retrieved_watch_s"] for point in curve}
        name = name if len(name) <= widths[0] else name[:widths[0] - 3] + "..."
        lines.append(f"{name:<{widths[0]}}" + "".join(f"{number(at.get(c), '.1f'):>12}" for c in asked))
    return lines


def _check_lines(metrics: Mapping[str, Any]) -> list[str]:
    judged = [(f"{name} ({model})", check["ok"]) for name, models in (metrics.get("crm_checks") or {}).items()
              if "absent" not in models for model, check in models.items() if check["ok"] is not None]
    if not judged:
        return []
    missed = [name for name, ok in judged if not ok]
    return ["", f"{len(judged) - len(missed)} of {len(judged)} properties of a faithful CRM reached (KuaiRand's floors)"
            + (", not:" if missed else "")] + [f"  {name}" for name in missed]


def _synthetic_lines(metrics: Mapping[str, Any]) -> list[str]:
    synthetic = metrics.get("synthetic") or {}
    if not synthetic.get("ceiling"):
        return []
    k = _length(metrics)
    lines = ["", f"recall@{k} of what the synthetic world knows, without and with the true watch time:"]
    for state, strategies in synthetic["ceiling"].items():
        recall = [number(_mean(strategies.get(name, {}), f"recall@{k}"), ".3f") for name in ("none", "oracle")]
        lines.append(f"  {state + ' state':<34}" + "".join(f"{value:>8}" for value in recall))
    states = list(synthetic["ceiling"])
    if synthetic["models"]:
        lines.append(f"share of the way from unconditioned to there ({', '.join(states)}):")
        lines += [f"  {name:<34}" + "".join(f"{number(_mean(model['share_of_way'], state), '.0%'):>8}"
                                            for state in states) for name, model in synthetic["models"].items()]
    best: dict[str, tuple[float, str]] = {}
    for name, strategy, measured in _watched(metrics):
        best[name] = max(best.get(name, (-math.inf, "")), (measured["mean"], strategy))
    if best:
        lines.append(f"would be watched of the first {k}, seconds an item, by the condition that brings most:")
        lines += [f"  {name:<34}{value:>8.1f}  {strategy}" for name, (value, strategy) in best.items()]
    return lines


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}
