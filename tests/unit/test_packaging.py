"""What a fresh machine gets: the declared dependencies, their pins, and the one environment that make keeps."""

import ast
import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOMS = ("configs", "embeddings", "trainer", "launch")
OF_MODULE = {"yaml": "pyyaml"}  # modules that are not called as their project is
FIT_TOGETHER = (  # sets that were run: our ranges must admit each
    {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", "faiss-gpu": "1.15.1"},
    {"torch": "2.11.0", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0", "fbgemm-gpu-cpu": "1.6.0", "faiss-cpu": "1.15.1"},
)
TORCH = '"torch==2.13.*"'
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pins(path: Path) -> dict[str, str]:
    """{canonical name: version} of a constraints file; every line of it pins with ==."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def declared(project: dict) -> dict[str, Requirement]:
    """What the package and its extras cpu, cuda and mlflow ask for, by canonical name."""
    extras = project["optional-dependencies"]
    requirements = map(Requirement, [*project["dependencies"], *extras["cpu"], *extras["cuda"], *extras["mlflow"]])
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_every_import_is_declared(repository: Path, declared: dict[str, Requirement]) -> None:
    imported: dict[str, str] = {}
    for path in (path for room in ROOMS for path in (repository / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            imported |= {name.split(".")[0]: str(path.relative_to(repository)) for name in names}
    ours = {*ROOMS, "__future__"}
    foreign = {name: path for name, path in imported.items() if name not in sys.stdlib_module_names | ours}
    provided = {name.replace("-gpu", "").replace("-cpu", "") for name in declared} | {"fbgemm-gpu"}
    undeclared = {
        name: path for name, path in foreign.items() if canonicalize_name(OF_MODULE.get(name, name)) not in provided
    }
    assert undeclared == {}, "add these to dependencies in pyproject.toml and their versions to packaging/constraints-*"


def test_ranges_admit_every_set_that_was_run(declared: dict[str, Requirement]) -> None:
    for together in FIT_TOGETHER:
        for name, version in together.items():
            assert declared[name].specifier.contains(version), f"{declared[name]} leaves out {version}"
    assert not declared["torch"].specifier.contains("2.14.0")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_constraints_pin_what_is_declared(repository: Path, project: dict, kind: str) -> None:
    pinned = pins(repository / f"packaging/constraints-{kind}.txt")
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras[kind], *(extras["test"] if kind == "cpu" else [])]:
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version.replace("*", "0")), f"{line}: the pin is {version}"


def test_cpu_constraints_keep_cuda_away(repository: Path) -> None:
    pinned = pins(repository / "packaging/constraints-cpu.txt")
    stub = tomllib.loads((repository / "packaging/fbgemm-gpu-stub/pyproject.toml").read_text())["project"]
    assert pinned["fbgemm-gpu"] == stub["version"] == f"{pinned['fbgemm-gpu-cpu']}+cpu"
    assert stub["dependencies"] == [f"fbgemm-gpu-cpu=={pinned['fbgemm-gpu-cpu']}"]
    assert pinned["torch"] == "2.13.*"  # a +cpu label could not be met where only the other index answers
    assert not [name for name in pinned if name.startswith(("nvidia-", "cuda-")) or name == "triton"]


def test_make_and_docker_install_torch_alike(repository: Path) -> None:
    recipes = [(repository / path).read_text() for path in ("packaging/make-venv", "docker/Dockerfile")]
    for recipe in recipes:
        command = re.search(r"pip install [^#&]*?" + re.escape(TORCH), recipe.replace("\\\n", " "))
        assert command is not None
        assert f"--retries 0 --extra-index-url {CPU_INDEX}" in command[0]


def test_only_public_hosts_and_no_path_of_one_machine(repository: Path) -> None:
    """The one host that an installation names is torch's own; registries are the reader's business."""
    files = ["pyproject.toml", "Makefile", ".ci/run", "docker/Dockerfile", *map(str, Path("packaging").glob("*"))]
    for name in files:
        path = repository / name
        if not path.is_file():
            continue
        text = path.read_text()
        assert set(re.findall(r"https?://([\w.-]+)", text)) <= {"download.pytorch.org"}, name
        assert not re.search(r"file:|find-links|/home/|/root/", text), name


def test_environment_is_exactly_the_constraints(repository: Path, installed_by_make: bool) -> None:
    if not installed_by_make:
        pytest.skip("this environment was not installed by make")
    pinned = pins(repository / "packaging/constraints-cpu.txt")
    # Of the environment alone: Ray, once imported, puts a folder with packages of its own on the path.
    installed = metadata.distributions(path=[sysconfig.get_path("purelib")])
    there = {canonicalize_name(found.metadata["Name"]): found.version for found in installed}
    for ours in ("pip", "watchtower"):
        there.pop(ours, None)
    assert Version(there.pop("torch")).release == (2, 13, 0)
    pinned.pop("torch")
    cuda = {name for name in there if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    there = {name: version for name, version in there.items() if name not in cuda}
    assert pinned.items() <= there.items(), "packaging/constraints-cpu.txt must say what pip installed"
    if os.environ.get("CI") == "true":  # nobody added anything by hand there
        assert not cuda, "CUDA wheels came into the CPU environment"
        assert set(there) == set(pinned), "packaging/constraints-cpu.txt must pin everything that is installed"


def test_console_script_is_the_command_line(project: dict) -> None:
    assert project["scripts"] == {"watchtower": "launch.cli:main"}
    done = subprocess.run([sys.executable, "-c", "from launch.cli import main; assert callable(main)"])
    assert done.returncode == 0


# ---- the environment that make keeps, tried with an interpreter that only writes down what it is asked --------------
PYTHON = """#!/bin/sh
# Stands for python: makes an "environment" that holds itself, and logs every pip command.
case "$*" in
-c*) echo 3.11 ;;
"-m venv "*) mkdir -p "$3/bin" "$3/lib/python3.11" && cp "$0" "$3/bin/python" ;;
*"-e .[cpu,test]"*) echo install >>pip.log; sleep "${INSTALL_TAKES:-0}"; [ ! -e fail ] ;;
*) : ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    """Only what `make venv` reads, and a `python` that installs nothing."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(repository / name, tmp_path)
    shutil.copytree(repository / "packaging", tmp_path / "packaging")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.Popen(
        ["make", "venv", *arguments],
        cwd=checkout,
        env=inherited | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def installations(checkout: Path) -> int:
    log = checkout / "pip.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_make_installs_once_and_again_after_a_change(checkout: Path) -> None:
    for _ in range(2):
        assert make(checkout, "PYTHON=./python").wait(60) == 0
        assert installations(checkout) == 1
    for count, changed in enumerate(("pyproject.toml", "packaging/constraints-cpu.txt"), start=2):
        with (checkout / changed).open("a") as file:
            file.write("# changed\n")
        assert make(checkout, "PYTHON=./python").wait(60) == 0
        assert installations(checkout) == count
    assert len(list((checkout / ".venv").glob(".installed-*"))) == 1


def test_a_failed_installation_is_done_again_from_the_start(checkout: Path) -> None:
    (checkout / "fail").touch()
    assert make(checkout, "PYTHON=./python").wait(60) != 0
    assert not list((checkout / ".venv").glob(".installed-*"))
    (checkout / "fail").unlink()
    (checkout / ".venv/half").touch()
    retried = make(checkout, "PYTHON=./python")
    assert "did not finish" in retried.communicate(timeout=60)[0]
    assert retried.returncode == 0
    assert not (checkout / ".venv/half").exists()


def test_two_makes_at_once_install_once(checkout: Path) -> None:
    both = [make(checkout, "PYTHON=./python", INSTALL_TAKES="1") for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert installations(checkout) == 1


def test_a_missing_interpreter_is_named_with_the_way_out(checkout: Path) -> None:
    missing = make(checkout, "PYTHON=no-such-python")
    message = missing.communicate(timeout=60)[1]
    assert missing.returncode == 2
    assert "no-such-python" in message and "apt-get install python3.11" in message and "PYTHON=" in message
    assert "Traceback" not in message
    assert not (checkout / ".venv").exists()
