"""Three seeded kills of a tiny run, and damage to files that a run reads on its way: `make faults` does the rest.

One untouched run is shared. The run that is killed trains one model, without CAPTS, so that it takes seconds.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from damage import CHEAP, KINDS, WAYS, damaged  # noqa: E402
from kills import Kill, walk  # noqa: E402
from results import Results  # noqa: E402
from tiny_run import TinyRun, end_all  # noqa: E402

SHORT = ("stages=[ingest,crm,evaluate,report]", "crm.models=[{name: dnn, tower: dnn, condition: next}]")
KILLS = [Kill("ingest", "driver", 0.5), Kill("training", "worker", 0.2), Kill("publish", "worker", 0.01)]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("untouched") / "run"
    try:
        run = TinyRun(run_dir, *SHORT)
        assert run.wait() == 0, run.output[-3000:]
        yield run_dir
    finally:
        end_all()


def test_a_run_that_is_killed_three_times_comes_to_the_same_results(untouched, tmp_path):
    outcome = walk(KILLS, tmp_path / "run", Results(untouched), "three kills", SHORT)
    assert outcome.wrong == [], outcome.where
    assert outcome.counted >= 2, outcome.where


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in CHEAP], ids=lambda kind: kind.name)
def test_damage_is_mended_or_told(untouched, tmp_path, kind):
    outcome = damaged(untouched, kind, WAYS[0], 0, tmp_path / "run", Results(untouched), kind.name, SHORT)
    assert outcome.wrong == [], outcome.where


def test_the_comparison_sees_a_difference(untouched, tmp_path):
    """A harness that cannot fail shows nothing."""
    other = tmp_path / "run"
    shutil.copytree(untouched, other)
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["crm"]["dnn"]["oracle"]["recall@100"]["mean"] += 1e-7
    (other / "metrics.json").write_text(json.dumps(metrics))
    (other / "evaluation" / "dnn" / "seed=0" / "curve.json").unlink()
    told = Results(untouched).differences(Results(other))
    assert any("recall@100" in line for line in told) and any("curve.json" in line for line in told)
