"""How close towers come to what the synthetic world knows: the study of docs/synthetic-world.md.

    python benchmarks/synthetic_ceiling.py [--seeds 0,1,2] [--worlds NAME,..] [--out DIR] [--write] [key=value ..]

Every world is one `watchtower run configs/synthetic.yaml` with its dials changed: the towers with and without the
condition and the Bayes term, trained, indexed and judged as in any run. Printed is a table, and whether the worlds said
yes and no where they must:

    affinity 1.2, 0.6     the tower under the true watch time beats the Bayes term: the interval of the gain is above 0
    affinity 0            users do not differ in what they watch long (persistence 0, too): it cannot beat it
    independent           watch time says nothing of the item: the condition wins nothing over the unconditioned tower
    the way               at least 80% of the way from unconditioned to each ceiling at affinity 1.2: `history` and
                          `log`, which read the user from the log as a tower must, `lasting` and `true`, which know
                          the hidden user as no learner can (trainer/ceiling.py)

`--write` puts the table into docs/synthetic-world.md. A run that is done is not done again. Exit code 3 where a check
fails.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/synthetic.yaml"
WORLDS = {
    "affinity 1.2": ["data.synth.user_item_affinity=1.2"],
    "affinity 0": ["data.synth.user_item_affinity=0", "data.synth.watch_persistence=0"],
    "independent": ["data.synth.user_item_affinity=1.2", "data.synth.watch_time=independent"],
    "affinity 0.6": ["data.synth.user_item_affinity=0.6"],
}
TOWERS = ("dnn", "decision_transformer")
METRIC = "recall@100"
CEILINGS = {"history": "from the tower's history", "log": "from all earlier views", "lasting": "lasting state",
            "true": "true state"}
WAY = 0.8
BEGIN, END = "<!-- synthetic_ceiling: begin -->", "<!-- synthetic_ceiling: end -->"


def run_world(name: str, out: Path, seeds: list[int], overrides: list[str]) -> dict[str, Any]:
    """One run of the whole way; its metrics.json."""
    run_dir = out / name.replace(" ", "-")
    command = [sys.executable, "-m", "launch.cli", "run", CONFIG, f"run_dir={run_dir}",
               f"name=synthetic-{run_dir.name}", f"seeds={seeds}", *WORLDS[name], *overrides]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(out / f"{run_dir.name}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{name}: the run ended with {done.returncode}; see {log.name}")
    return json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))


def measured(value: dict[str, Any] | None, form: str = ".3f") -> str:
    """A mean with its interval."""
    if not value or value.get("mean") is None:
        return "-"
    low, high = value["ci95"]
    return f"{value['mean']:{form}}" + (f" ({low:{form}} to {high:{form}})" if low is not None else "")


def table(worlds: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of what was measured, columns of worlds."""
    def row(label: str, cell) -> str:
        return f"| {label} | " + " | ".join(cell(metrics) for metrics in worlds.values()) + " |"

    def recall(model: str, strategy: str):
        return lambda metrics: measured(metrics["crm"].get(model, {}).get(strategy, {}).get(METRIC))

    def ceiling(state: str, strategy: str):
        return lambda metrics: measured(metrics["synthetic"]["ceiling"][state][strategy][METRIC])

    def share(model: str, kind: str, state: str):
        return lambda metrics: measured(metrics["synthetic"]["models"].get(model, {}).get(kind, {}).get(state), ".0%")

    def watched(model: str, strategy: str):
        return lambda metrics: measured(metrics["crm"].get(model, {}).get(strategy, {}).get("expected_watch_s@100"),
                                        ".1f")

    lines = [f"| {METRIC} | " + " | ".join(worlds) + " |", "|---" * (1 + len(worlds)) + "|",
             row("popular", recall("popular", "none"))]
    for tower in TOWERS:
        lines += [row(f"{tower}, unconditioned", recall(f"{tower}_unconditioned", "none")),
                  row(f"{tower} + Bayes term, true watch time", recall(f"{tower}_bayes", "oracle")),
                  row(f"{tower}, true watch time", recall(tower, "oracle"))]
    for state, words in CEILINGS.items():
        lines += [row(f"ceiling, {words}", ceiling(state, "none")),
                  row(f"ceiling, {words}, true watch time", ceiling(state, "oracle"))]
    for tower in TOWERS:
        lines += [row(f"{tower}: gain over the Bayes term", lambda metrics, tower=tower: measured(
            metrics["crm_gains"].get(tower, {}).get("oracle_over_bayes"), "+.1%"))]
        for state in CEILINGS:
            lines += [row(f"{tower}: share of the way, {state}", share(tower, "share_of_way", state)),
                      row(f"{tower}: share of the gain, {state}", share(tower, "share_of_gain", state)),
                      row(f"{tower} + Bayes term: share of the way, {state}",
                          share(f"{tower}_bayes", "share_of_way", state))]
    lines += ["", "| would be watched of the first 100, s an item | " + " | ".join(worlds) + " |",
              "|---" * (1 + len(worlds)) + "|", row("popular", watched("popular", "none"))]
    for tower in TOWERS:
        lines += [row(f"{tower}, unconditioned", watched(f"{tower}_unconditioned", "none"))]
        lines += [row(f"{tower}, {strategy}", watched(tower, strategy)) for strategy in (
            "null", "average", "maximum", "multiplexed", "fixed_60", "oracle")]
    lines += [row("the greatest possible", lambda metrics: measured(
        metrics["synthetic"]["ceiling"]["true"]["most_watched"]["expected_watch_s@100"], ".1f"))]
    return lines


def checks(worlds: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    """What the worlds must say, one line and verdict each."""
    verdicts = []
    for name, metrics in worlds.items():
        for tower in TOWERS:
            gains = metrics["crm_gains"].get(tower)
            if gains is None:
                continue  # left out by an override
            over_bayes, over_bare = gains.get("oracle_over_bayes"), gains.get("oracle_over_unconditioned")
            if name == "independent":
                verdicts.append((f"{name}: {tower} gains nothing over itself unconditioned, "
                                 f"{measured(over_bare, '+.1%')}", over_bare["ci95"][0] <= 0))
            elif name == "affinity 0":
                verdicts.append((f"{name}: {tower} does not beat the Bayes term, {measured(over_bayes, '+.1%')}",
                                 over_bayes["ci95"][0] <= 0))
            else:
                verdicts.append((f"{name}: {tower} beats the Bayes term, {measured(over_bayes, '+.1%')}",
                                 over_bayes["ci95"][0] > 0))
        if name == "affinity 1.2":
            for state, words in CEILINGS.items():
                shares = {tower: metrics["synthetic"]["models"][tower]["share_of_way"][state]
                          for tower in TOWERS if tower in metrics["synthetic"]["models"]}
                best = max(shares, key=lambda tower, shares=shares: shares[tower]["mean"])
                verdicts.append((f"{name}: {best} closes {measured(shares[best], '.0%')} of the way to the ceiling "
                                 f"{words}, at least {WAY:.0%}", shares[best]["mean"] >= WAY))
    return verdicts


def section(worlds: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """What stands in docs/synthetic-world.md."""
    first = next(iter(worlds.values()))
    spec, provenance = first["synthetic"]["world"], first["provenance"]
    requests = first["crm"]["popular"]["none"][METRIC]["n"]
    hardware = provenance["hardware"]
    changed = " with uncommitted changes" if provenance.get("uncommitted_changes") else ""
    commit = str(provenance["commit"] or "not known")[:12]
    return [
        "## What towers reach there",
        f"    python benchmarks/synthetic_ceiling.py {shlex.join(sys.argv[1:])}".rstrip(), "",
        f"`{CONFIG}`: {spec['users']:,} users, {spec['items']:,} items, {spec['views_per_user']:g} views a user, "
        f"{spec['tags_count']} tags; seeds {', '.join(map(str, arguments.seeds))} of the towers, seed {spec['seed']} "
        f"of the world; ceilings over {first['synthetic']['requests']:,} of {requests:,} test requests. "
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}{changed}, "
        f"{hardware['cores']} cores of {hardware['cpu']}. Mean and 95% interval ({provenance['intervals']}).", "",
        *table(worlds), "",
        *[f"- {'Yes' if ok else '**No**'}: {line}." for line, ok in checks(worlds)]]


def write_into(page: Path, lines: list[str], begin: str = BEGIN, end: str = END) -> None:
    """The section between its markers, or at the end of the page."""
    text = page.read_text(encoding="utf-8")
    block = "\n".join([begin, *lines, end])
    if begin in text and end in text:
        text = text[:text.index(begin)] + block + text[text.index(end) + len(end):]
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0],
                        help="of the towers, with commas")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "synthetic")
    parser.add_argument("--worlds", type=lambda text: text.split(","), default=list(WORLDS),
                        help=f"with commas: {', '.join(WORLDS)}")
    parser.add_argument("--write", action="store_true", help="put the table into docs/synthetic-world.md")
    arguments, overrides = parser.parse_known_args()
    wrong = [word for word in overrides if word.startswith("-") or "=" not in word]
    if unknown := set(arguments.worlds) - set(WORLDS):
        parser.error(f"no world {', '.join(sorted(unknown))}; there are {', '.join(WORLDS)}")
    if wrong:
        parser.error(f"neither an option nor key=value: {' '.join(wrong)}")
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    worlds = {name: run_world(name, out, arguments.seeds, overrides) for name in arguments.worlds}
    print("\n" + "\n".join(section(worlds, arguments)))
    if arguments.write:
        write_into(ROOT / "docs" / "synthetic-world.md", section(worlds, arguments))
    if not all(ok for _, ok in checks(worlds)):
        raise SystemExit(3)


if __name__ == "__main__":
    main()
