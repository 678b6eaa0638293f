"""The CAPTS part of the report: the paper's four tables beside what is known of its own figures, where the recall goes,
the checks in words, and a table for the terminal.

What the paper (Zhou et al. 2026, arXiv:2602.12564) is known to say of its tables 2 to 5 is one line: a relative gain
over the baseline of 25% at K = 100, falling to 11% at K = 2000. Its other figures are not known to us, and the page
says so in each place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from trainer.charts import Dot, Series, dot_chart, line_chart
from trainer.page import absent, dot_value, is_number, number, section, table, verdict, with_interval

PAPER_GAIN = {"100": 0.25, "2000": 0.11}
NOT_KNOWN = "The paper's own figures for this table are not known to us."
TERMINAL_LENGTHS = ("50", "100", "200", "all")
CONTROLS = {"oracle": "the true forward value, a ceiling of top-B and no method",
            "popular": "the most popular items, as many as the union of recent's lists holds",
            "past-replay": "the user's own past forward value of the list; not in the paper",
            "random": "a seeded hash"}


def routing_sections(metrics: Mapping[str, Any]) -> list[str]:
    """The sections of report.html; none where nothing was routed."""
    routing = metrics.get("routing")
    if not routing:
        return []
    if "absent" in routing:
        return [section("Which triggers seed which channel (CAPTS)", absent(str(routing["absent"])))]
    budget = routing["budgets"][0]
    return [section("Which triggers seed which channel (CAPTS)", _recall_table(routing, budget)
                    + _charts(routing, budget) + _budgets(routing)),
            section("Channels and uniqueness (CAPTS, table 3)", _channel_table(routing, budget)),
            section("Ablations (CAPTS, table 4)", _ablations(routing, budget)),
            section("Size of the future window (CAPTS, table 5)", _windows(routing, budget)),
            section("Better lists, or longer ones", _equal_length(routing, budget)),
            section("Where the recall goes", _where(routing, budget)),
            section("What a faithful CAPTS shows", _checks(routing))]


def routing_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Recall of every selector at the least budget, with its gain over `recent`, for a terminal."""
    routing = metrics.get("routing") or {}
    if not routing.get("budgets"):
        return []
    budget = routing["budgets"][0]
    names = [k for k in TERMINAL_LENGTHS if k in _lengths(routing, budget)]
    head = f"routing, budget {budget}: recall (gain)"
    lines = [f"{head:<38}" + "".join(f"{'@' + k:>17}" for k in names)]
    lines.append("-" * len(lines[0]))
    for name, overall in _overall(routing, budget):
        cells = [number(_mean(overall, f"recall@{k}"), ".3f")
                 + (f" ({_mean(overall, f'gain_over_recent@{k}'):+.1%})"
                    if is_number(_mean(overall, f"gain_over_recent@{k}")) else "") for k in names]
        lines.append(f"{name[:38]:<38}" + "".join(f"{cell:>17}" for cell in cells))
    missing = sorted(name for name, value in routing.items() if isinstance(value, Mapping) and "absent" in value)
    lines += [f"absent: {', '.join(missing)}"] if missing else []
    lines += [f"in brackets: gain over recent; {budget} triggers a channel; past-replay, item-value and popular (as",
              "many most-popular items) are controls; oracle knows the future: the ceiling of independent routing"]
    judged = [check for check in routing.get("checks", {}).values() if check.get("ok") is not None]
    short = [f"  {check['property']}: {check['says'].split(':')[0]}" for check in judged if not check["ok"]]
    if judged:
        lines.append(f"{len(judged) - len(short)} of {len(judged)} properties of a faithful CAPTS reached (KuaiRand's "
                     f"floors, a yardstick on other logs)" + (", not:" if short else ""))
    return lines + short


# ------------------------------------------------------------------------------------------------------------ sections

def _recall_table(routing: Mapping[str, Any], budget: int) -> str:
    lengths, facts = _lengths(routing, budget), routing["requests"]
    rows = []
    for name, overall in _overall(routing, budget):
        rows.append(_row(name, [_cell(overall, f"recall@{k}", f"gain_over_recent@{k}") for k in lengths]))
    rows += [f'<tr><th scope="row">{escape(name)}</th><td colspan="{len(lengths)}" class="open">'
             f'{escape(str(value["absent"]))}</td></tr>' for name, value in routing.items()
             if isinstance(value, Mapping) and "absent" in value]
    rows.append(_row("the paper, over its baseline",
                     [f'<span class="soft">{PAPER_GAIN[k]:+.0%}</span>' if k in PAPER_GAIN else "-" for k in lengths]))
    controls = "; ".join(f"<b>{name}</b> {text}" for name, text in CONTROLS.items() if name in routing)
    paper = " and ".join(f"{gain:+.0%} at K = {k}" for k, gain in PAPER_GAIN.items())
    return (f'<p class="soft">Table 2 of the paper: recall of the next {facts["window"]} views of {facts["n"]:,} '
            f'requests ({facts["users"]:,} users), {budget} triggers a channel, K items of each channel, united; below '
            "it the paired gain over <b>recent</b> with its 95% interval. Recall on logs is no measure of quality by "
            f"itself: look at the controls. {controls}. Of the paper's own table only two gains over its "
            f"baseline are known to us: {paper}.</p>"
            + table(["Selector", *(f"@{k}" for k in lengths)], rows, numbers_from=1))


def _charts(routing: Mapping[str, Any], budget: int) -> str:
    numbers = [k for k in _lengths(routing, budget) if k != "all"]
    shown = [name for name, _ in _overall(routing, budget)
             if name in routing["routers"] or name in ("past-replay", "lic", "watch-time-top", "popular")]
    slots = {name: slot for slot, name in enumerate(shown)}
    series = [Series(name, [(float(k), _mean(overall, f"gain_over_recent@{k}")) for k in numbers
                            if is_number(_mean(overall, f"gain_over_recent@{k}"))], slots[name])
              for name, overall in _overall(routing, budget) if name in slots]
    series.append(Series("the paper", [(float(k), gain) for k, gain in PAPER_GAIN.items()], len(slots)))
    gains = line_chart("Gain over recent by K", "Relative gain in recall over recent, by the number of items of each "
                       "channel; the dashed line is no gain.", series, "K (log scale)", "Gain over recent",
                       log_x=True, x_ticks=[float(k) for k in numbers], from_zero=False, level=0.0)
    recalls = line_chart("Recall by K", "Recall by the number of items of each channel.", [
        Series(name, [(float(k), _mean(overall, f"recall@{k}")) for k in numbers], slot) for slot, (name, overall) in
        enumerate((name, overall) for name, overall in _overall(routing, budget)
                  if name in routing["routers"] or name in ("recent", "oracle", "popular"))],
        "K (log scale)", "Recall", log_x=True, x_ticks=[float(k) for k in numbers])
    headline = "100" if "100" in numbers else (numbers or ["all"])[-1]
    groups = [(f"budget {budget}", [
        Dot(name, [dot_value(overall.get(f"recall@{headline}")), dot_value(overall.get("recall@all"))],
            0 if name in routing["routers"] else 1, hollow=name in CONTROLS) for name, overall in
        _overall(routing, budget)])]
    recall = dot_chart("Recall of every selector", "Recall with 95% intervals; hollow marks are controls.", groups, [
        (f"Recall@{headline} (hollow: control)", lambda v: f"{v:.3f}"), ("Recall@all", lambda v: f"{v:.3f}")])
    return f'<div class="charts">{gains}{recalls}</div>{recall}'


def _budgets(routing: Mapping[str, Any]) -> str:
    if len(routing["budgets"]) < 2:
        return ""
    names = [name for name, _ in _overall(routing, routing["budgets"][0])]
    length = "100" if "100" in _lengths(routing, routing["budgets"][0]) else _lengths(routing, routing["budgets"][0])[0]
    rows = [_row(name, [_cell(dict(_overall(routing, budget)).get(name, {}), f"recall@{k}", f"gain_over_recent@{k}")
                        for budget in routing["budgets"] for k in (length, "all")]) for name in names]
    return ('<p class="soft">The same table for every budget:</p>'
            + table(["Selector", *(f"B = {budget}, @{k}" for budget in routing["budgets"] for k in (length, "all"))],
                    rows, numbers_from=1))


def _channel_table(routing: Mapping[str, Any], budget: int) -> str:
    k = "100" if "100" in _lengths(routing, budget) else _lengths(routing, budget)[0]
    rows = []
    for name, of_name in _selectors(routing, budget):
        cells = []
        for channel in routing["channels"]:
            own = of_name.get(channel, {})
            cells += [_cell(own, f"recall@{k}", f"gain_over_watch-time-top@{k}"), number(_mean(own, f"uniq@{k}"),
                                                                                         ".3f")]
        rows.append(_row(name, cells))
    return (f'<p class="soft">Recall@{k} of each channel by itself, for routers with the paired gain over '
            f"watch-time-top below it, and Uniq@{k}: the share of a channel's first {k} that no other channel's first "
            f"{k} holds (a reading of section 4.3.1). {NOT_KNOWN}</p>" + table(
                ["Selector", *(f"{c}, {what}" for c in routing["channels"] for what in (f"recall@{k}", f"uniq@{k}"))],
                rows, numbers_from=1))


def _ablations(routing: Mapping[str, Any], budget: int) -> str:
    routers = [(name, overall) for name, overall in _overall(routing, budget) if name in routing["routers"]]
    if not routers:
        return absent("no router was trained")
    k = "100" if "100" in _lengths(routing, budget) else _lengths(routing, budget)[0]
    bases = ("recent", "best_baseline", "past-replay")
    rows = [_row(name, [with_interval(overall.get(f"recall@{k}", {})), with_interval(overall.get("recall@all", {})),
                        *(_gain_cell(overall.get(f"gain_over_{base}@{k}")) for base in bases),
                        number(_mean(overall, f"way_to_oracle@{k}"), ".0%")]) for name, overall in routers]
    return (f'<p class="soft">{NOT_KNOWN} A gain whose interval holds 0 is not there.</p>' + table(
        ["Router", f"Recall@{k}", "Recall@all", f"over recent @{k}", f"over the best baseline @{k}",
         f"over past-replay @{k}", f"way to the oracle @{k}"], rows, numbers_from=1))


def _windows(routing: Mapping[str, Any], budget: int) -> str:
    shown = [(name, overall) for name, overall in _overall(routing, budget)
             if name in routing["routers"] or name in ("recent", "past-replay", "oracle")]
    windows = sorted({key for _, overall in shown for key in overall if key.startswith("window=")},
                     key=lambda key: int(key.removeprefix("window=")))
    if not windows:
        return absent("no window was judged")
    recalls = sorted({key for _, overall in shown for key in overall[windows[0]]},
                     key=lambda key: (key.endswith("all"), key))
    base = dict(shown).get("recent", {})
    rows = []
    for name, overall in shown:
        cells = []
        for window in windows:
            for recall in recalls:
                own, recent = (_mean(side.get(window, {}), recall) for side in (overall, base))
                gain = f'<br><span class="soft">{own / recent - 1:+.1%}</span>' if (
                    name != "recent" and is_number(own) and is_number(recent) and recent) else ""
                cells.append(number(own, ".3f") + gain)
        rows.append(_row(name, cells))
    return (f'<p class="soft">Recall against the next W views, with the gain over recent below. {NOT_KNOWN} Where '
            "futures are shorter than the windows, all windows are the same.</p>" + table(
                ["Selector", *(f"W = {w.removeprefix('window=')}, {r.removeprefix('recall')}" for w in windows
                               for r in recalls)], rows, numbers_from=1))


def _equal_length(routing: Mapping[str, Any], budget: int) -> str:
    names = _lengths(routing, budget)
    shown = [k for k in names if k in ("100", "all")] or names[-1:]
    rows = []
    for name, one in _overall(routing, budget):
        rows.append(_row(name, [cell for k in shown for cell in (
            number(_mean(one, f"union@{k}"), ",.0f"), _gain_cell(one.get(f"gain_over_recent@{k}")),
            _gain_cell(one.get(f"gain_over_recent_equal_length@{k}")))]))
    return ('<p class="soft">A selector whose triggers bring different items has a longer union under the same budget, '
            "and a longer list finds more even where all items are alike. Beside the gain over recent stands the one "
            "at equal length: of each request the longer of the two unions is cut to the length of the shorter one "
            "(all channels' first items, then all second ones, ..)."
            + _overlap_in_words(routing.get("overlap") or {}) + "</p>" + table(
                ["Selector", *(text for k in shown for text in (f"Items @{k}", f"gain over recent @{k}",
                                                                f"at equal length @{k}"))], rows, numbers_from=1))


def _overlap_in_words(overlap: Mapping[str, Any]) -> str:
    """What routing.overlap is, and why."""
    if not is_number(overlap.get("value")):
        return ""
    text = (f" Routers' independent picks take {overlap['value']:g} off the score of a list that the channel's picks "
            "before bring whole (routing.overlap, not in the paper)")
    if "recall" not in overlap:
        return f"{text}; from: {escape(str(overlap.get('from')))}."
    means = ", ".join(f"{name}: {mean:.4f}" for name, mean in overlap["recall"].items())
    return (f"{text}, chosen on {overlap['requests']:,} validation requests by mean recall ({means}): "
            f"the best, {overlap['best']:g}, is {overlap['gain_over_0']:+.4f} (standard error "
            f"{overlap['standard_error']:.4f}) from 0, and is taken where that is more than three errors.")


def _where(routing: Mapping[str, Any], budget: int) -> str:
    overall = _overall(routing, budget)
    bands = list(dict.fromkeys(key for _, one in overall for key in one if key.startswith("recall_from.")))
    k = "100" if "100" in _lengths(routing, budget) else _lengths(routing, budget)[0]
    rows = []
    for name, one in overall:
        rows.append(_row(name, [number(_mean(one, "recall@all"), ".3f"),
                                *(number(_mean(one, band), ".3f") for band in bands),
                                number(_mean(one, f"way_to_oracle@{k}"), ".0%"),
                                number(_mean(one, "way_to_oracle@all"), ".0%"),
                                number(_mean(one, "trigger_overlap"), ".2f"),
                                number(_mean(one, f"hit_watch_s@{k}"), ".1f"),
                                number(_mean(one, f"tags_covered@{k}"), ".3f")]))
    return ('<p class="soft">Recall without a cut, parted by the position of the trigger that found the item (1 is the '
            "latest); how much of the way from recent to the oracle is gone; the share of triggers that recent would "
            f"take; the mean watch time of what is found by {k}, and the share of its tags.</p>" + table(
                ["Selector", "Recall@all", *(f"from {band.removeprefix('recall_from.')}" for band in bands),
                 f"Way to oracle @{k}", "Way @all", "As recent", f"Hit, s @{k}", f"Tags @{k}"], rows, numbers_from=1))


def _checks(routing: Mapping[str, Any]) -> str:
    rows, judged = [], []
    for check in routing.get("checks", {}).values():
        if "absent" in check:
            rows.append(f'<tr><th scope="row">{escape(check["property"])}</th><td colspan="2" class="open">'
                        f'{escape(check["absent"])}</td><td class="open">not run</td></tr>')
            continue
        judged += [] if check["ok"] is None else [check["ok"]]
        limit = "above 0" if check["limit"] == 0 else f"at least {check['limit']:+.3g}"
        rows.append(f'<tr><th scope="row">{escape(check["property"])}</th><td>{escape(limit)} '
                    f'({escape(check["limit_of"])})</td><td>{escape(check["says"])}</td>'
                    f'<td>{verdict(check["ok"], check["limit"])}</td></tr>')
    if not rows:
        return absent("nothing was judged")
    return (f"<p>{sum(judged)} of {len(judged)} judged properties are reached. The floors are those of the KuaiRand "
            "part; on other logs they are a yardstick, no verdict.</p>"
            + table(["Property", "Floor", "Measured [95%]", "Verdict"], rows))


# -------------------------------------------------------------------------------------------------------- small pieces

def _selectors(routing: Mapping[str, Any], budget: int) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, value[f"budget={budget}"]) for name, value in routing.items()
            if isinstance(value, Mapping) and f"budget={budget}" in value]


def _overall(routing: Mapping[str, Any], budget: int) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, value.get("overall", {})) for name, value in _selectors(routing, budget)]


def _lengths(routing: Mapping[str, Any], budget: int) -> list[str]:
    """K in order, `all` the last; ones at which no selector has anything left to cut are told by `all`."""
    overall = [one for _, one in _overall(routing, budget)]
    found = {key.removeprefix("recall@") for one in overall for key in one if key.startswith("recall@")}
    kept = [k for k in found if k == "all" or any(_mean(one, f"recall@{k}") != _mean(one, "recall@all")
                                                  for one in overall)]
    return sorted(kept, key=lambda k: (k == "all", int(k) if k != "all" else 0))


def _mean(values: Mapping[str, Any], name: str) -> float | None:
    return (values.get(name) or {}).get("mean")


def _row(name: str, cells: Iterable[str]) -> str:
    values = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{values}</tr>'


def _cell(values: Mapping[str, Any], name: str, gain: str) -> str:
    below = _gain_cell(values.get(gain))
    return number(_mean(values, name), ".3f") + (f'<br><span class="soft">{below}</span>' if below != "-" else "")


def _gain_cell(gain: Mapping[str, Any] | None) -> str:
    if not gain or not is_number(gain.get("mean")):
        return "-"
    over = f" ({escape(str(gain['over']))})" if gain.get("over") not in (None, "recent", "watch-time-top",
                                                                           "past-replay") else ""
    return escape(with_interval(gain, "+.1%")).replace(" [", "<br>[") + over
