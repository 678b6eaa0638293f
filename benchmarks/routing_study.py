"""Whether CAPTS finds what the synthetic world holds, and nothing where it holds nothing: the study of
docs/synthetic-world.md.

    python benchmarks/routing_study.py [--worlds NAME,..] [--seeds 0] [--null-seeds 0,1]
        [--out DIR] [--write] [key=value ..]

Every world is one `watchtower run configs/routing.yaml` with its dials changed: channels from the simulated log, labels
by replay, routers trained, every selector judged. Printed are tables in the shape of the paper's tables 2 to 5 (CAPTS,
arXiv:2602.12564), and whether the worlds said yes and no where they must:

    dense       200,000 items, futures of 100 views, 50 of at least 200 triggers a channel: the router gains over the
                best baseline at K = 100 to 2000 and on every channel, and the diversity term raises Uniq@K
    independent, permuted
                the feed is drawn alike for all users, and watch time says nothing of the item: no router gains over
                `recent` with lists of the same length, the interval of that gain holds 0 at every K. (Where all items
                are alike, recall is the length of the union: triggers that bring different items make it longer, which
                finds more and is no better.)

`--write` puts the tables into docs/synthetic-world.md. A run that is done is not done again. Exit code 3 where a check
fails.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from synthetic_ceiling import measured, write_into

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/routing.yaml"
DENSE = "dense"
# Nobody has an interest and no item is more popular than another: who saw what says nothing of what is seen next.
NOTHING = ["data.synth.exploration=1", "data.synth.passing_interest=0", "data.synth.author_loyalty=0",
           "data.synth.popularity_spread=0", "data.synth.users=3000", "data.synth.items=3000",
           "data.synth.views_per_user=80", "data.shards=4", "replay.requests.triggers=50",
           "replay.requests.min_triggers=20", "replay.requests.test_min_triggers=20", "replay.requests.min_future=3",
           "replay.requests.test_min_future=3", "routing.budgets=[10]", "routing.at=[50, 100, 200]",
           "routing.test_users={share: 0.5, seed: 0}",
           "router.batch_requests=64"]
WINDOWS = (50, 150, 200)  # W of routers beside replay.window, in the dense world
WORLDS = {
    DENSE: ["router.models=[{name: capts}, {name: capts-no-diversity, diversity: false}, "
            "{name: capts-no-calibrator, calibrator: false}, "
            + ", ".join(f"{{name: capts-w{w}, window: {w}}}" for w in WINDOWS) + "]"],
    "independent": [*NOTHING, "data.synth.watch_time=independent"],
    "permuted": [*NOTHING, "data.synth.watch_time=permuted"],
}
ROUTER, JOINT, PLAIN, UNCALIBRATED = "capts", "capts-joint", "capts-no-diversity", "capts-no-calibrator"
# The paper's selectors. The project's own rules (past-replay, item-value) stand in the tables, too.
PAPER = ("recent", "watch-time-top", "tag-top", "ltv", "nic", "pdn", "lic", "random")
BEGIN, END = "<!-- routing_study: begin -->", "<!-- routing_study: end -->"


def run_world(name: str, out: Path, seeds: list[int], overrides: list[str]) -> dict[str, Any]:
    """One run of the whole way; its metrics.json."""
    run_dir = out / name
    command = [sys.executable, "-m", "launch.cli", "run", CONFIG, f"run_dir={run_dir}", f"name=routing-{name}",
               f"seeds={seeds}", *WORLDS[name], *overrides]
    print(f"\n$ {shlex.join(command[1:])}", flush=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{name}: the run ended with {done.returncode}; see {log.name}")
    return json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------- the tables

def selectors(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every judged selector and router with what was measured of it."""
    budget = f"budget={metrics['routing']['budgets'][0]}"
    for name, value in metrics["routing"].items():
        if isinstance(value, dict) and budget in value:
            yield name, value[budget]


def lengths(metrics: dict[str, Any]) -> list[str]:
    """K in order, `all` the last."""
    overall = dict(selectors(metrics))["recent"]["overall"]
    found = [key.removeprefix("recall@") for key in overall if key.startswith("recall@")]
    return sorted(found, key=lambda k: (k == "all", int(k) if k != "all" else 0))


def header(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]


def row(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def mean(values: dict[str, Any], name: str, form: str = ".3f") -> str:
    value = (values.get(name) or {}).get("mean")
    return "-" if value is None else f"{value:{form}}"


def gain(values: dict[str, Any], name: str) -> str:
    """A paired gain with its interval."""
    return measured(values.get(name), "+.1%")


def recall_tables(metrics: dict[str, Any]) -> list[str]:
    """Table 2: recall of every selector, its gain over `recent`; and the routers over the best baseline."""
    at = lengths(metrics)
    lines = header("recall, gain over recent", [f"@{k}" for k in at])
    for name, one in selectors(metrics):
        overall = one["overall"]
        lines.append(row(name, [mean(overall, f"recall@{k}") + (
            f", {gain(overall, f'gain_over_recent@{k}')}" if f"gain_over_recent@{k}" in overall else "") for k in at]))
    lines += ["", *header("gain over the best baseline", [f"@{k}" for k in at])]
    for name, one in selectors(metrics):
        if name in metrics["routing"]["routers"]:
            gains = [one["overall"].get(f"gain_over_best_baseline@{k}") for k in at]
            lines.append(row(name, [measured(g, "+.1%") + (f", {g['over']}" if g else "") for g in gains]))
    lines.append(row(f"{ROUTER}, means, over the best of the paper's selectors", paper_gains(metrics, "overall", at)))
    return lines


def paper_gains(metrics: dict[str, Any], scope: str, at: list[str]) -> list[str]:
    """The gain of the router's mean recall over the greatest mean among the paper's selectors; no interval."""
    found, cells = dict(selectors(metrics)), []
    for k in at:
        means = {name: found[name][scope][f"recall@{k}"]["mean"] for name in PAPER if name in found}
        best = max(means, key=means.get)
        own = found.get(ROUTER, {}).get(scope, {}).get(f"recall@{k}", {}).get("mean")
        cells.append("-" if own is None or not means[best] else f"{own / means[best] - 1:+.1%}, {best}")
    return cells


def channel_table(metrics: dict[str, Any]) -> list[str]:
    """Table 3: recall and uniqueness of each channel by itself."""
    at, lines = [k for k in lengths(metrics) if k != "all"], []
    for channel in metrics["routing"]["channels"]:
        lines += [*header(f"{channel}: recall; uniq", [f"@{k}" for k in at])]
        lines += [row(name, [f"{mean(one[channel], f'recall@{k}')}; {mean(one[channel], f'uniq@{k}')}" for k in at])
                  for name, one in selectors(metrics) if channel in one]
        for name in (ROUTER, JOINT):
            own = dict(selectors(metrics)).get(name, {}).get(channel, {})
            gains = [own.get(f"gain_over_best_baseline@{k}") for k in at]
            lines.append(row(f"{name} over the best baseline",
                             [measured(g, "+.1%") + (f", {g['over']}" if g else "") for g in gains]))
        lines.append(row(f"{ROUTER}, means, over the best of the paper's selectors", paper_gains(metrics, channel, at)))
        lines.append("")
    return lines[:-1]


def ablation_table(metrics: dict[str, Any]) -> list[str]:
    """Table 4: the full model beside the model without the diversity term, and without the calibrator."""
    at, found = lengths(metrics), dict(selectors(metrics))
    channels = metrics["routing"]["channels"]
    lines = header(f"uniq of {' / '.join(channels)}",
                   [*(f"recall@{k}" for k in at), *(f"uniq@{k}" for k in at if k != "all")])
    for name in (ROUTER, PLAIN, UNCALIBRATED, JOINT):
        if name in found:
            uniq = [" / ".join(mean(found[name][c], f"uniq@{k}") for c in channels) for k in at if k != "all"]
            lines.append(row(name, [*(mean(found[name]["overall"], f"recall@{k}") for k in at), *uniq]))
    return lines


def window_table(metrics: dict[str, Any]) -> list[str]:
    """Table 5: routers trained on windows of W views, judged against the next 50 to 200 views; recall and gain over
    `recent`."""
    found = dict(selectors(metrics))
    base = found["recent"]["overall"]
    windows = sorted((key for key in base if key.startswith("window=")), key=lambda key: int(key[7:]))
    recalls = [key for key in base[windows[0]] if key.startswith("recall@")] if windows else []
    lines = header("trained on W", [f"next {w[7:]}, {r.removeprefix('recall')}" for w in windows for r in recalls])
    names = {"recent": "recent", **{f"{ROUTER}-w{w}": f"W = {w}" for w in WINDOWS},
             ROUTER: f"W = {metrics['routing']['requests']['window']}"}
    for name in sorted((n for n in names if n in found), key=lambda n: (n != "recent", len(names[n]), names[n])):
        cells = []
        for w in windows:
            for recall in recalls:
                own, recent = (one[w][recall]["mean"] for one in (found[name]["overall"], base))
                cells.append(f"{own:.3f}" + (f", {own / recent - 1:+.1%}" if name != "recent" and recent else ""))
        lines.append(row(names[name], cells))
    return lines


def null_table(worlds: dict[str, dict[str, Any]]) -> list[str]:
    """The null worlds: recall and items of `recent`, and what others gain over it: plainly, in items of the union, and
    at equal length."""
    lines: list[str] = []
    for name, metrics in worlds.items():
        at, found = lengths(metrics), dict(selectors(metrics))
        lines += [*([""] if lines else []), *header(name, [f"@{k}" for k in at]),
                  row("recent", [mean(found["recent"]["overall"], f"recall@{k}") for k in at]),
                  row("recent, items", [mean(found["recent"]["overall"], f"union@{k}", ",.0f") for k in at])]
        for other in (*metrics["routing"]["routers"], "oracle", "popular"):
            if other in found:
                own, base = found[other]["overall"], found["recent"]["overall"]
                longer = [own[f"union@{k}"]["mean"] / base[f"union@{k}"]["mean"] - 1 for k in at]
                lines += [row(f"{other} over recent", [gain(own, f"gain_over_recent@{k}") for k in at]),
                          row(f"{other}, items", [f"{more:+.1%}" for more in longer]),
                          row(f"{other} over recent at equal length",
                              [gain(own, f"gain_over_recent_equal_length@{k}") for k in at])]
    return lines


def length_table(metrics: dict[str, Any]) -> list[str]:
    """Items of every selector's union, and its gain over `recent` at equal length."""
    at = lengths(metrics)
    lines = header("items of the union, gain over recent at equal length", [f"@{k}" for k in at])
    for name, one in selectors(metrics):
        overall = one["overall"]
        lines.append(row(name, [mean(overall, f"union@{k}", ",.0f") + (
            f", {gain(overall, key)}" if (key := f"gain_over_recent_equal_length@{k}") in overall else "")
            for k in at]))
    return lines


def overlap_line(metrics: dict[str, Any]) -> str:
    """What routing.overlap the independent routers had, and what the validation requests said of the others."""
    overlap = metrics["routing"]["overlap"]
    if "recall" not in overlap:
        return f"Overlap {overlap['value']:g} (from {overlap['from']})."
    means = ", ".join(f"{name}: {value:.4f}" for name, value in overlap["recall"].items())
    return (f"Overlap **{overlap['value']:g}**, chosen on {overlap['requests']:,} validation requests by "
            f"recall, the mean over K: {means}. The best, {overlap['best']:g}, is {overlap['gain_over_0']:+.4f} "
            f"(standard error {overlap['standard_error']:.4f}) from 0.")


# ---------------------------------------------------------------------------------------------------------- the checks

def checks(worlds: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    """What the worlds must say, one line and verdict each."""
    found = []
    for name, metrics in worlds.items():
        found += dense_checks(name, metrics) if name == DENSE else null_checks(name, metrics)
    return found


def dense_checks(name: str, metrics: dict[str, Any]) -> list[tuple[str, bool]]:
    """Gains over the best baseline, overall and on every channel, and what the diversity term does to uniqueness."""
    own, plain = (dict(selectors(metrics)).get(router) for router in (ROUTER, PLAIN))
    at, verdicts = [k for k in lengths(metrics) if k != "all"], []
    if own is None:
        return []  # left out by an override
    for scope in ("overall", *metrics["routing"]["channels"]):
        for k in at:
            value = own[scope].get(f"gain_over_best_baseline@{k}")
            verdicts.append((f"{name}: {ROUTER}, {scope}, over the best baseline ({value['over']}) at K = {k}, "
                             f"{measured(value, '+.1%')}", value["ci95"][0] > 0))
    for channel in metrics["routing"]["channels"] if plain else []:
        steps = {k: own[channel][f"uniq@{k}"]["mean"] - plain[channel][f"uniq@{k}"]["mean"] for k in at}
        said = ", ".join(f"{step:+.3f} at {k}" for k, step in steps.items())
        verdicts.append((f"{name}: {channel}, Uniq@K with the diversity term against without it: {said}",
                         all(step > 0 for step in steps.values())))
    return verdicts


def null_checks(name: str, metrics: dict[str, Any]) -> list[tuple[str, bool]]:
    """No gain over `recent` at any K, where neither may bring more items than the other."""
    found, verdicts = dict(selectors(metrics)), []
    for router in (name for name in (ROUTER, JOINT) if name in found):
        for k in lengths(metrics):
            value = found[router]["overall"][f"gain_over_recent_equal_length@{k}"]
            low, high = value["ci95"]
            verdicts.append((f"{name}: {router} gains nothing over recent at K = {k} and equal length, "
                             f"{measured(value, '+.1%')}", low <= 0 <= high))
    return verdicts


# --------------------------------------------------------------------------------------------------------- the section

def described(name: str, metrics: dict[str, Any], run_dir: Path) -> str:
    """A world's dials, what was judged, and what it cost."""
    import yaml

    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    synth, requests, facts = config["data"]["synth"], config["replay"]["requests"], metrics["routing"]["requests"]
    dials = ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
                      for key, value in synth.items())
    stages = [stage for stage in metrics["stages"].values() if isinstance(stage, dict) and stage.get("seconds")]
    return (f"**{name}**: {dials}. The last {requests['triggers']} rows are triggers, at least "
            f"{requests['test_min_triggers']} of them; at least {requests['test_min_future']} later items; "
            f"W = {facts['window']}; budget {metrics['routing']['budgets'][0]}; {facts['n']:,} test requests of "
            f"{facts['users']:,} users; router seeds {', '.join(map(str, config['seeds']))}; "
            f"{sum(stage['seconds'] for stage in stages):,.0f} s, at most "
            f"{max(stage.get('peak_mib') or 0 for stage in stages):,.0f} MiB (all processes).")


def section(worlds: dict[str, dict[str, Any]], out: Path) -> list[str]:
    """What stands in docs/synthetic-world.md."""
    provenance = next(iter(worlds.values()))["provenance"]
    hardware = provenance["hardware"]
    commit = str(provenance["commit"] or "not known")[:12]
    commit += " with uncommitted changes" if provenance.get("uncommitted_changes") else ""
    lines = ["## What routers find there",
             f"    python benchmarks/routing_study.py {shlex.join(sys.argv[1:])}".rstrip(), "",
             f"`{CONFIG}`, {datetime.now(UTC):%Y-%m-%d}, commit {commit}, {hardware['cores']} cores of "
             f"{hardware['cpu']}. Mean and 95% interval ({provenance['intervals']}). The best baseline is chosen at "
             "each K on the test requests themselves.", ""]
    lines += [f"- {described(name, metrics, out / name)}" for name, metrics in worlds.items()]
    if DENSE in worlds:
        dense = worlds[DENSE]
        lines += ["", "`dense`: " + overlap_line(dense),
                  "", "Table 2 of the paper, `dense`:", "", *recall_tables(dense),
                  "", "Longer or better, `dense`: of each request the longer union is cut to the shorter one's length:",
                  "", *length_table(dense),
                  "", "Table 3, `dense`; Uniq@K: the share of a channel's first K that no other one's first K holds:",
                  "", *channel_table(dense), "", "Table 4, `dense`:", "", *ablation_table(dense),
                  "", "Table 5, `dense`: recall and gain over `recent`:", "", *window_table(dense)]
    if nulls := {name: metrics for name, metrics in worlds.items() if name != DENSE}:
        lines += ["", "Where there is nothing to find (of each request the longer union is cut to the shorter one's "
                  "length):", "", *null_table(nulls), ""]
        lines += [f"- `{name}`: {overlap_line(metrics)}" for name, metrics in nulls.items()]
    return [*lines, "", *[f"- {'Yes' if ok else '**No**'}: {line}." for line, ok in checks(worlds)]]


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=numbers, default=[0], help="of the routers in the dense world, with commas")
    parser.add_argument("--null-seeds", type=numbers, default=[0, 1], help="of the routers in the null worlds")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "routing-study")
    parser.add_argument("--worlds", type=lambda text: text.split(","), default=list(WORLDS),
                        help=f"with commas: {', '.join(WORLDS)}")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/synthetic-world.md")
    arguments, overrides = parser.parse_known_args()
    wrong = [word for word in overrides if word.startswith("-") or "=" not in word]
    if unknown := set(arguments.worlds) - set(WORLDS):
        parser.error(f"no world {', '.join(sorted(unknown))}; there are {', '.join(WORLDS)}")
    if wrong:
        parser.error(f"neither an option nor key=value: {' '.join(wrong)}")
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    worlds = {name: run_world(name, out, arguments.seeds if name == DENSE else arguments.null_seeds, overrides)
              for name in arguments.worlds}
    print("\n" + "\n".join(section(worlds, out)))
    if arguments.write:
        write_into(ROOT / "docs" / "synthetic-world.md", section(worlds, out), BEGIN, END)
    if not all(ok for _, ok in checks(worlds)):
        raise SystemExit(3)


if __name__ == "__main__":
    main()
