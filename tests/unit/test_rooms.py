"""The rooms of docs/architecture.md: who may import whom, who owns which heavy library, and that nothing is pickled."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("configs", "embeddings", "trainer", "launch")  # a room imports itself and the rooms before it
OWNERS = {  # library: the folders and files that may import it
    "ray": ("launch/",),
    "deepspeed": ("trainer/engine.py",),
    "faiss": ("embeddings/index.py",),
    "torchrec": ("embeddings/", "trainer/batches.py"),
    "fbgemm_gpu": ("embeddings/",),
}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save", "read_pickle", "to_pickle"}
# What opens a file that somebody else may have written, and who may: embeddings/untrusted.py looks at it first, ingest
# reads back what its own attempt wrote.
OPENERS = {"pq.read_table", "pq.ParquetFile", "pq.read_metadata", "pq.read_schema", "pq.ParquetDataset", "ds.dataset",
           "pa.ipc.open_file", "pd.read_parquet", "ray.data.read_parquet", "torch.jit.load"}
MAY_OPEN = ("embeddings/untrusted.py", "launch/ingest.py")
NAMES_THAT_SAY_NOTHING = {"util", "utils", "common", "helper", "helpers", "misc"}
FOLDERS_WITH_NAMES = (*ROOMS, "tests", "benchmarks", "docs", "docker", "packaging")
HEAVY = ("torch", "ray", "deepspeed", "faiss", "torchrec")


def imported_modules(node: ast.AST, package: list[str]) -> list[str]:
    """Dotted names that an import statement, `import_module("x")` or `__import__("x")` brings in."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(level=0):
            return [f"{node.module}.{alias.name}" for alias in node.names]
        case ast.ImportFrom():
            base = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
            return [".".join([*base, alias.name]) for alias in node.names]
        case ast.Call(args=[ast.Constant(value=str(name)), *_]):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                return [name]
    return []


def pickling(node: ast.AST, names: list[str]) -> str | None:
    """What in this node reads or writes pickles, if anything does. `names` is what the node imports."""
    for name in names:
        if name.split(".")[0] in PICKLERS or name in PICKLING_CALLS:
            return name
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in PICKLING_CALLS or called.split(".")[-1] in PICKLING_CALLS:
            return called
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                return f"allow_pickle={ast.unparse(keyword.value)}"
    return None


def violations(root: Path) -> Iterator[str]:
    """Every breach of the rooms under a checkout, as `path:line: what`."""
    for room_index, room in enumerate(ROOMS):
        for path in sorted((root / room).rglob("*.py")):
            relative = path.relative_to(root)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(relative))):
                names = imported_modules(node, list(relative.parent.parts))
                for top in dict.fromkeys(name.split(".")[0] for name in names):
                    where = f"{relative}:{node.lineno}"
                    if top in ROOMS[room_index + 1 :]:
                        yield f"{where}: {room}/ may not know {top}/"
                    if top in OWNERS and not str(relative).startswith(OWNERS[top]):
                        yield f"{where}: {top} belongs to {' and '.join(OWNERS[top])}"
                if what := pickling(node, names):
                    yield f"{relative}:{node.lineno}: {what} pickles; nothing of ours is read or written as a pickle"
                if isinstance(node, ast.Call) and ast.unparse(node.func) in OPENERS and str(relative) not in MAY_OPEN:
                    yield (f"{relative}:{node.lineno}: {ast.unparse(node.func)} trusts the file; "
                           "embeddings/untrusted.py looks at it first")
    for folder in FOLDERS_WITH_NAMES:
        for path in sorted((root / folder).rglob("*")):
            relative = path.relative_to(root)
            if path.stem.lower() in NAMES_THAT_SAY_NOTHING and ".venv-peers" not in relative.parts:
                yield f"{relative}: the name does not say what is in it"


def test_rooms_know_only_what_they_may(repository: Path) -> None:
    assert all((repository / room / "__init__.py").is_file() for room in ROOMS)
    assert list(violations(repository)) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("configs/schema.py", "import embeddings.tables", "configs/schema.py:1: configs/ may not know embeddings/"),
        ("embeddings/tables.py", "def f():\n    from trainer import loop", "tables.py:2: embeddings/ may not"),
        ("trainer/loop.py", "import importlib\nimportlib.import_module('launch.cli')", ":2: trainer/ may not"),
        ("trainer/loop.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import launch", ":3: trainer/"),
        ("trainer/loop.py", "import ray.train", "ray belongs to launch/"),
        ("trainer/loop.py", "from deepspeed import ops", "deepspeed belongs to trainer/engine.py"),
        ("trainer/recall.py", "import faiss", "faiss belongs to embeddings/index.py"),
        ("embeddings/shards/flat.py", "__import__('faiss')", "faiss belongs to embeddings/index.py"),
        ("launch/cli.py", "from torchrec.sparse import jagged_tensor", "torchrec belongs to embeddings/ and trainer/b"),
        ("trainer/store.py", "import pickle", "pickle pickles"),
        ("trainer/store.py", "from torch import load", "torch.load pickles"),
        ("trainer/store.py", "import torch\ntorch.save({}, 'x')", "trainer/store.py:2: torch.save pickles"),
        ("trainer/store.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle=True pickles"),
        ("launch/frames.py", "frame.to_pickle('x')", "frame.to_pickle pickles"),
        ("trainer/store.py", "import pyarrow.parquet as pq\npq.read_table('x')", "pq.read_table trusts the file"),
        ("trainer/utils.py", "", "trainer/utils.py: the name does not say"),
        ("tests/helpers/worlds.py", "", "tests/helpers: the name does not say"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, path: str, source: str, message: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    found = list(violations(tmp_path))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("launch/stages.py", "import ray, configs, embeddings.tables, trainer.loop\nfrom . import cli"),
        ("trainer/engine.py", "import deepspeed.ops as ops"),
        ("trainer/batches.py", "from torchrec import KeyedJaggedTensor"),
        ("embeddings/index.py", "import faiss, torchrec, fbgemm_gpu"),
        ("embeddings/deep/tables.py", "from ..snapshots import publish"),
        ("trainer/store.py", "import json, numpy as np\njson.load(f)\nnp.load('x', allow_pickle=False)"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert list(violations(tmp_path)) == []


@pytest.mark.parametrize("module", [*ROOMS, "launch.cli"])
def test_importing_a_room_imports_nothing_heavy(repository: Path, module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    env = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
