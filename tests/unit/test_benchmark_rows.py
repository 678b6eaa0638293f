"""The rows of benchmarks/: what one says, what a run of all gathers, and what goes into BENCHMARKS.md."""

import argparse
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import rows
    import run_all

    yield argparse.Namespace(rows=rows, run_all=run_all)
    for name in ("rows", "run_all"):
        sys.modules.pop(name)


def test_a_row_is_the_median_and_its_mark_has_a_direction(bench):
    row = bench.rows.row
    one = row("a", [3.0, 1.0, 2.0], reach=2.0)
    assert (one["ratio"], one["spread"], one["ok"]) == (2.0, [1.0, 3.0], True)
    assert not row("a", [1.9], reach=2.0)["ok"]
    assert row("a", [1.1], reach=1.1, better="lower")["ok"] and not row("a", [1.2], reach=1.1, better="lower")["ok"]
    unmarked = row("a", [1e-9])
    assert unmarked["ok"] and unmarked["reach"] is None
    assert "SHORT" in bench.rows.line(row("a", [1.0], reach=2)) and "reach -  ok" in bench.rows.line(unmarked)
    for ratios, better in (([], "higher"), ([0.0], "higher"), ([float("nan")], "higher"), ([1.0], "more")):
        with pytest.raises(ValueError):
            row("a", ratios, better=better)


def test_sides_take_turns_both_ways(bench):
    order = []
    sides = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert bench.rows.alternating(3, sides) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert "".join(order) == "abbaab"


def test_a_process_answers_and_its_end_is_told(bench):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from rows import serve\n"
            "def answer(x):\n    print('noise')\n    return {'twice': 2 * x} if x else sys.exit(3)\nserve(answer)")
    with bench.rows.Process([sys.executable, "-c", code, ROOT / "benchmarks"], threads=1) as process:
        assert process.ask(x=4) == {"twice": 8}
        with pytest.raises(RuntimeError, match="ended with 3"):
            process.ask(x=0)


def test_peak_memory_sees_what_is_gone_again(bench):
    with bench.rows.PeakMemory() as memory:
        block = bytearray(64 << 20)
        block[::4096] = b"x" * len(block[::4096])
        del block
    assert memory.above > 40


@pytest.fixture
def scripts(bench, monkeypatch, tmp_path):
    """A folder of benchmarks, and a function that runs them."""
    monkeypatch.setattr(bench.run_all, "FOLDER", tmp_path)

    def run(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text("import sys\nsys.path.insert(0, " + repr(str(ROOT / "benchmarks"))
                                                 + ")\nfrom rows import parser, report, row\n"
                                                 "arguments = parser(None).parse_args()\n" + source)
        monkeypatch.setattr(bench.run_all, "BENCHMARKS", tuple(
            bench.run_all.Benchmark(name, f"{name}.py") for name in sources))
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--results", str(tmp_path / "results.json"), "--rounds", "6"])
        code = bench.run_all.main()
        return code, json.loads((tmp_path / "results.json").read_text())

    return run


def test_all_rows_are_gathered_and_one_that_falls_short_is_the_exit_code(scripts, capsys):
    fine = "sys.exit(report([row('fine', [2.0] * arguments.rounds, 1)], arguments, [{'name': 'big', 'why': 'small'}]))"
    code, results = scripts(one=fine)
    assert code == 0
    assert [(r["name"], r["ok"], r["command"]) for r in results["rows"]] == [("fine", True, "python benchmarks/one.py")]
    assert results["not_run"] == [{"benchmark": "one", "name": "big", "why": "small"}]
    printed = capsys.readouterr().out
    assert "fine" in printed and "not run: big: small" in printed
    code, results = scripts(one=fine, two="sys.exit(report([row('poor', [0.5], 1)], arguments))")
    assert code == 1 and [r["ok"] for r in results["rows"]] == [True, False]


def test_a_script_that_breaks_fails_the_run_and_has_no_row(scripts, capsys):
    code, results = scripts(one="raise SystemExit('no disk left')",
                            two="sys.exit(report([row('x', [1.0])], arguments))")
    assert code == 1 and [r["name"] for r in results["rows"]] == ["x"]
    assert "no disk left" in capsys.readouterr().out and results["not_run"][0]["name"] == "one"


def test_what_this_machine_lacks_is_said(bench, monkeypatch, tmp_path):
    lacking, benchmark = bench.run_all.lacking, bench.run_all.Benchmark
    monkeypatch.setattr(bench.run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(bench.run_all, "PEERS", tmp_path / "none")
    assert "not there" in lacking(benchmark("a", "a.py"))
    (tmp_path / "a.py").touch()
    assert lacking(benchmark("a", "a.py")) is None
    assert "4096 cores" in lacking(benchmark("a", "a.py", cores=4096))
    assert "make peers" in lacking(benchmark("a", "a.py", peers=("duckdb",)))


def test_rows_of_other_scripts_stay(bench):
    before = {"rows": [{"benchmark": "swing", "name": "old"}, {"benchmark": "catr", "name": "kept"}], "not_run": []}
    now = {"hardware": "h", "rows": [{"benchmark": "swing", "name": "new"}], "not_run": []}
    swing = [one for one in bench.run_all.BENCHMARKS if one.name == "swing"]
    assert [one["name"] for one in bench.run_all.merged(before, now, swing)["rows"]] == ["new", "kept"]


def test_a_section_of_the_page_is_replaced_and_nothing_else(bench):
    page = "top\n<!-- cpu: begin -->\nold\n<!-- cpu: end -->\nbottom\n"
    stamp = {"command": "python benchmarks/a.py", "commit": "abc", "date": "2026-11-26", "load": 1.23}
    results = {"hardware": "2 cores", "not_run": [{"name": "GPU", "why": "needs one"}],
               "rows": [{**bench.rows.row("a", [1.5], 2, sizes="tiny"), **stamp}]}
    made = bench.run_all.written(page, "cpu", list(bench.run_all.table(results)))
    assert made.startswith("top\n<!-- cpu: begin -->\nHardware: 2 cores")
    assert made.endswith("<!-- cpu: end -->\nbottom\n")
    assert "old" not in made and "- GPU: needs one" in made
    assert "| a | 1.5 | 1.5, 1.5 | >= 2 | **short** | tiny | `python benchmarks/a.py` | abc, 2026-11-26, 1.2 |" in made
    assert bench.run_all.written(made, "cpu", list(bench.run_all.table(results))) == made
    with pytest.raises(SystemExit):
        bench.run_all.written(page, "gpu", [])


def test_what_was_not_measured_again_stays_on_the_page(bench):
    def results(name, script, ratio, hardware="2 cores", not_run=()):
        stamp = {"command": f"python benchmarks/{script}", "commit": "abc", "date": "2026-11-26", "load": 1.0,
                 "benchmark": script.removesuffix(".py")}
        return {"hardware": hardware, "not_run": list(not_run), "rows": [{**bench.rows.row(name, [ratio], 2), **stamp}]}

    def put(page, found):
        kept = bench.run_all.kept_rows(page, "cpu", found)
        return bench.run_all.written(page, "cpu", list(bench.run_all.table(found, kept)))

    card = {"name": "gpu: a card", "benchmark": "gpu"}
    page = put("<!-- cpu: begin -->\n<!-- cpu: end -->\n", results("swing", "swing.py", 5.0, not_run=[
        {**card, "why": "none: it ended with 3: see there"},
        {"name": "ingest", "benchmark": "ingest", "why": "no peers"}]))
    page = put(page, results("ingest", "ingest.py", 3.0))
    assert [line.split("|")[1].strip() for line in page.splitlines() if "`" in line] == ["ingest", "swing"]
    assert "- gpu: a card: none: it ended with 3: see there" in page and "no peers" not in page
    page = put(page, results("swing", "swing.py", 7.0, not_run=[{**card, "why": "still none"}]))
    assert "| swing | 7 |" in page and "| swing | 5 |" not in page and "| ingest | 3 |" in page
    assert [line for line in page.splitlines() if line.startswith("- ")] == ["- gpu: a card: still none"]
    with pytest.raises(SystemExit, match="another machine"):
        put(page, results("swing", "swing.py", 7.0, hardware="64 cores"))


def test_the_page_has_the_section_that_make_bench_writes(bench):
    bench.run_all.written((ROOT / "BENCHMARKS.md").read_text(), "cpu", [])
