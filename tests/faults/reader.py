"""A reader that opens everything a run publishes as soon as it is there, and must never see half of it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from embeddings.snapshots import MANIFEST, read_manifest, verify

EVERY_S = 0.05
FOLDERS = ("sequences", "labels", "item_value", "indexes/*/seed=*/*", "checkpoints/*/seed=*/step-*",
           "evaluation/*/seed=*", "evaluation/routing/*/seed=*", "channels/*/*")
FILES = ("metrics.json", "report.html", "stages/*.json", "indexes/serving.json", "routing/serving.json",
         "routing/*.parquet", "evaluation/routing/metrics.json", "world/world.json")


class Reader(threading.Thread):
    """Looks at a run folder until `stop`.

    Attributes:
        seen: how many published things were opened whole.
        torn: what was published and not whole, in words.
    """

    def __init__(self, run_dir: Path):
        super().__init__(daemon=True, name="reader")
        self.run_dir, self.seen, self.torn = run_dir, 0, []
        self._known: set[tuple[str, int, int]] = set()
        self._halt = threading.Event()

    def run(self) -> None:
        while not self._halt.wait(EVERY_S):
            self.look()

    def stop(self) -> None:
        self._halt.set()
        self.join()
        self._known.clear()
        self.look()

    def look(self) -> None:
        for patterns, key, opened in ((FOLDERS, _of_folder, open_snapshot), (FILES, _of_file, open_file)):
            for path in self._found(patterns):
                self._open(path, key, opened)

    def _found(self, patterns: tuple[str, ...]) -> Iterator[Path]:
        for pattern in patterns:
            with contextlib.suppress(OSError):
                yield from (path for path in sorted(self.run_dir.glob(pattern)) if not path.name.startswith("."))

    def _open(self, path: Path, key: Callable[[Path], tuple[str, int, int] | None], opened: Callable) -> None:
        before = key(path)
        if before is None or before in self._known:
            return
        try:
            opened(path)
        except Exception as error:
            # Swapped for another, or gone, while it was read: the reader of a swapped folder is told by `verify`.
            if key(path) == before:
                self._known.add(before)
                self.torn.append(f"{path.relative_to(self.run_dir)}: {str(error)[:200]}")
            return
        if key(path) == before:
            self._known.add(before)
            self.seen += 1


def _of_folder(path: Path) -> tuple[str, int, int] | None:
    """Which folder stands there, None where none is published."""
    with contextlib.suppress(OSError):
        if path.is_dir() and (path / MANIFEST).exists():
            return str(path), path.stat().st_ino, (path / MANIFEST).stat().st_ino
    return None


def _of_file(path: Path) -> tuple[str, int, int] | None:
    with contextlib.suppress(OSError):
        return str(path), path.stat().st_ino, path.stat().st_mtime_ns
    return None


def open_snapshot(folder: Path) -> None:
    """Open a published folder as its readers do.

    Raises:
        Exception: it is not whole.
    """
    kind = read_manifest(folder).get("kind")
    verify(folder)
    if kind == "index":
        from embeddings.index import ItemIndex

        ItemIndex.load(folder, mmap=False)
    elif kind == "labels":
        from trainer.labels import Labels

        labels = Labels.open(folder)
        for number in range(labels.shards):
            labels.shard(number)
    elif folder.name == "sequences":
        from trainer.sequences import SequenceStore

        store = SequenceStore(folder)
        for number in range(store.shards):
            store.open(number)
    for path in folder.rglob("*"):
        open_file(path)


def open_file(path: Path) -> None:
    """Read a file of a run folder whole, by its kind.

    Raises:
        Exception: it is not whole.
    """
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".parquet":
        pq.read_table(path)
    elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
        raise ValueError("it has no end")
