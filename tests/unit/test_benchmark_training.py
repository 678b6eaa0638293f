"""What benchmarks/ of the training side count and fit."""

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training_run

    yield argparse.Namespace(training_run=training_run)
    for name in ("training_run", "rows", "worlds"):
        sys.modules.pop(name, None)


def test_waiting_is_a_share_of_all_steps_of_the_slowest_worker(bench):
    def event(step, step_s, first, second):
        return {"step": step, "step_s": step_s, "workers": [{"rank": 0, "wait_share": first},
                                                            {"rank": 1, "wait_share": second}]}

    # 10 steps of 0.1 s, then 20 of 0.2 s: 5 s in all, of which rank 0 waits 0.5 + 0.4 and rank 1 waits 0 + 2.
    found = bench.training_run.of_steps([event(10, 0.1, 0.5, 0.0), event(30, 0.2, 0.1, 0.5)])
    assert found["train_s"] == pytest.approx(5.0) and found["waiting"] == pytest.approx(2.0 / 5.0)
