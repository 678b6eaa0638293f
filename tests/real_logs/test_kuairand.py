"""What a faithful CRM shows on the KuaiRand part: the table of docs/evaluation.md, one seed, about ten minutes.

    WATCHTOWER_REAL_LOGS=<folder with kuairand-pure/logs.parquet and items.parquet> make test-real-logs
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory, repository: Path) -> dict:
    logs = Path(os.environ["WATCHTOWER_REAL_LOGS"]) / "kuairand-pure"
    run_dir = tmp_path_factory.mktemp("kuairand") / "run"
    subprocess.run([sys.executable, "-m", "launch.cli", "run", "configs/kuairand.yaml", f"run_dir={run_dir}",
                    "stages=[crm]", "seeds=[0]", f"data.logs={logs / 'logs.parquet'}",
                    f"data.items={logs / 'items.parquet'}"], cwd=repository, check=True)
    return json.loads((run_dir / "metrics.json").read_text())


def test_every_property_of_a_faithful_crm(metrics):
    missed = [f"{check} ({model}): {found['value']}" for check, models in metrics["crm_checks"].items()
              for model, found in models.items()
              if isinstance(found, dict) and found.get("floor") is not None and found.get("ok") is not True]
    assert not missed, "\n".join(missed)


def test_conditioned_towers_are_level_with_the_bayes_term_or_better(metrics):
    for tower in ("dnn", "decision_transformer"):
        ours = metrics["crm"][tower]["oracle"]["recall@100"]["mean"]
        assert ours > 0.97 * metrics["crm"][f"{tower}_bayes"]["oracle"]["recall@100"]["mean"], tower
