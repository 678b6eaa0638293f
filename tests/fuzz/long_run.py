"""The long run of the fuzzers: `make fuzz`. Guided by coverage (atheris, libFuzzer) on the readers of bytes.

    python tests/fuzz/long_run.py --seconds 60 [--only config,manifest] [--findings FOLDER]

Each reader of `formats.py` gets a process of its own, for so many seconds: libFuzzer changes the valid file, keeps what
reaches new branches of our code, and stops at the first exception that is no WatchtowerError. An input that does so is
saved, and the exit code is 1. Without atheris (--plain) the changes of tests/fuzz/changes.py are drawn at random.
The last line is `findings: N`; before it stand the inputs tried of each reader.
"""

import argparse
import hashlib
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

MOST_BYTES = 1 << 16  # of an input
MOST_MEMORY = 8 << 30  # of a process; an allocation beyond it is a finding
ROOT = Path(__file__).resolve().parents[2]
OURS = ("configs", "embeddings", "trainer")


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz every reader for so long")
    parser.add_argument("--seconds", type=int, default=60, help="of each reader")
    parser.add_argument("--only", default="", help="names of formats, separated by commas")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where inputs are saved")
    parser.add_argument("--plain", action="store_true", help="random changes instead of atheris")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    return one(arguments) if arguments.one else all_of_them(arguments)


def all_of_them(arguments: argparse.Namespace) -> int:
    from formats import FORMATS

    names = [of.name for of in FORMATS]
    wanted = [name.strip() for name in arguments.only.split(",") if name.strip()] or names
    if unknown := set(wanted) - set(names):
        print(f"no format {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        return 2
    tried = findings = 0
    for name in wanted:
        command = [sys.executable, __file__, "--one", name, "--seconds", str(arguments.seconds), "--findings",
                   str(arguments.findings), *(["--plain"] if arguments.plain else [])]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        text = done.stdout + done.stderr
        count = re.findall(r"(?:inputs tried: |stat::number_of_executed_units: )(\d+)", text)
        inputs = max(map(int, count), default=0)
        found = done.returncode != 0
        tried, findings = tried + inputs, findings + found
        where = f"   FINDING, see {arguments.findings}" if found else ""
        print(f"{name:<20} {inputs:>9,} inputs{where}", flush=True)
        if found:
            print("\n".join(text.splitlines()[-40:]), flush=True)
    print(f"inputs tried: {tried:,}\nfindings: {findings}")
    return 1 if findings else 0


def one(arguments: argparse.Namespace) -> int:
    """Fuzz one format in this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if arguments.plain:
        return _plainly(arguments)
    import atheris

    with atheris.instrument_imports(include=list(OURS), exclude=with_kernels(), enable_loader_override=False):
        from formats import FORMATS, Bench
    bench = Bench(next(of for of in FORMATS if of.name == arguments.one), Path(tempfile.mkdtemp(prefix="wt-fuzz-")))
    seeds = Path(tempfile.mkdtemp(prefix="wt-fuzz-seeds-"))
    (seeds / "valid").write_bytes(bench.valid)
    arguments.findings.mkdir(parents=True, exist_ok=True)

    def test_one_input(data: bytes) -> None:
        try:
            bench.outcome(data)
        except BaseException:
            _save(arguments, data)
            raise

    atheris.Setup([sys.argv[0], f"-max_total_time={arguments.seconds}", f"-max_len={MOST_BYTES}",
                   f"-rss_limit_mb={MOST_MEMORY >> 20}", "-print_final_stats=1", "-timeout=120",
                   f"-artifact_prefix={arguments.findings}/", str(seeds)], test_one_input)
    atheris.Fuzz()  # ends the process
    return 0


def with_kernels() -> list[str]:
    """Modules of ours that are not guided by: what atheris puts into a function, numba cannot compile."""
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for package in OURS
            for path in (ROOT / package).rglob("*.py") if "import numba" in path.read_text(encoding="utf-8")]


def _plainly(arguments: argparse.Namespace) -> int:
    from changes import changes
    from formats import FORMATS, Bench
    from hypothesis import HealthCheck, Phase, given, seed, settings

    of = next(of for of in FORMATS if of.name == arguments.one)
    bench, tried, began = Bench(of, Path(tempfile.mkdtemp(prefix="wt-fuzz-"))), 0, time.monotonic()
    while time.monotonic() - began < arguments.seconds:
        @seed(tried)
        @settings(max_examples=200, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(changes(of.kind, bench.valid))
        def hold(data: bytes) -> None:
            nonlocal tried
            tried += 1
            try:
                bench.outcome(data)
            except BaseException:
                _save(arguments, data)
                raise
        try:
            hold()
        except BaseException:
            traceback.print_exc()
            print(f"inputs tried: {tried}")
            return 1
    print(f"inputs tried: {tried}")
    return 0


def _save(arguments: argparse.Namespace, data: bytes) -> None:
    arguments.findings.mkdir(parents=True, exist_ok=True)
    name = f"{arguments.one.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    (arguments.findings / name).write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
