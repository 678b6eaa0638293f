"""What benchmarks/ of the training side count and fit."""

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import growth
    import training_run

    yield argparse.Namespace(gpu=gpu, growth=growth, training_run=training_run)
    for name in ("gpu", "growth", "training_run", "rows", "worlds"):
        sys.modules.pop(name, None)


def test_waiting_is_a_share_of_all_steps_of_the_slowest_worker(bench):
    def event(step, step_s, first, second):
        return {"step": step, "step_s": step_s, "workers": [{"rank": 0, "wait_share": first},
                                                            {"rank": 1, "wait_share": second}]}

    # 10 steps of 0.1 s, then 20 of 0.2 s: 5 s in all, of which rank 0 waits 0.5 + 0.4 and rank 1 waits 0 + 2.
    found = bench.training_run.of_steps([event(10, 0.1, 0.5, 0.0), event(30, 0.2, 0.1, 0.5)])
    assert found["train_s"] == pytest.approx(5.0) and found["waiting"] == pytest.approx(2.0 / 5.0)


def test_an_exponent_is_the_slope_of_the_logarithms(bench):
    growth, sizes = bench.growth, [1e5, 4e5, 16e5]
    assert growth.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0.0)
    assert growth.exponent([1, 10, 100], [1, 20, 100]) == pytest.approx(1.0)  # least squares, not one pair
    for wrong in (([1e5], [1.0]), ([1e5, 1e5], [1.0, 2.0]), (sizes, [1.0, 2.0]), (sizes, [0.0, 1.0, 2.0])):
        with pytest.raises(ValueError):
            growth.exponent(*wrong)


def test_what_is_carried_on_rises_by_the_last_two_sizes_and_never_less_than_the_rows(bench):
    carried = bench.growth.carried
    # A fixed part hides the square of the first sizes; the order in which they come does not matter.
    assert carried([16, 1, 4], [256.0, 10.0, 16.0], 32) == pytest.approx(1024.0)
    assert carried([1, 4], [10.0, 11.0], 8) == pytest.approx(22.0)


def test_standing_for_the_index_counts_all_epochs_but_the_last(bench):
    events = [{"event": "vectors", "epoch": 1, "seconds": 0.5}, {"event": "followed_up", "epoch": 1, "waited_s": 0.0},
              {"event": "index", "epoch": 1, "build_s": 9.0}, {"event": "vectors", "epoch": 2, "seconds": 0.25},
              {"event": "followed_up", "epoch": 2, "waited_s": 1.0}, {"event": "vectors", "epoch": 3, "seconds": 8.0}]
    assert bench.training_run.standing_s(events, epochs=3) == 1.75


def test_figures_are_kept_and_those_of_another_run_are_not_mixed_in(bench, tmp_path):
    figures = bench.growth.Figures(tmp_path / "growth.json", {"rows": 10, "times": [1, 4]})
    for rows, seconds in ((40, 8.0), (10, 2.0)):
        figures.add("ingest", rows, {"seconds": seconds, "cpu_s": seconds, "mib": 5.0 * seconds, "peak_mib": 99.0},
                    {"hardware": "a machine", "commit": "abc", "load": 0.5})
    again = bench.growth.Figures(tmp_path / "growth.json", {"rows": 10, "times": [1, 4]})
    assert again.of("ingest")[0] == [10, 40] and again.of("ingest")[1]["seconds"] == [2.0, 8.0]
    page = "\n".join(bench.growth.tables(again))
    assert "| ingest | 2.0 (10) | 8.0 (40) | 1.00 | 1.00 | 1.00 |" in page and "commit abc" in page
    with pytest.raises(SystemExit, match="not of"):
        bench.growth.Figures(tmp_path / "growth.json", {"rows": 20, "times": [1, 4]})


def test_flops_of_a_tower_are_those_that_torch_counts(bench):
    sizes = argparse.Namespace(width=16, layers=3, heads=2, length=12, windows=2)
    bench.gpu.check_tower_flops(sizes)
    whole, causal = (bench.gpu.tower_flops(2, 12, 16, 64, 3, 16, 24, causal=causal) for causal in (False, True))
    assert whole - causal == 3 * 3 * 2 * 2 * 2 * (12 * 12 - 12 * 13 / 2) * 16
    with pytest.raises(AssertionError):
        bench.gpu.tower_flops = lambda *_, **__: whole - 1
        bench.gpu.check_tower_flops(sizes)
