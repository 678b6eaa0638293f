"""The index rebuild and the all-pairs channels against bare faiss calls on the same vectors and threads.

    python benchmarks/nearest.py [--items N] [--width D] [--rounds 5] [--json PATH]

    rebuild: ItemIndex.build and save (vectors and ids checked, two files) against index_factory, train, add and
        write_index; for Flat, and for an IVF index
    published: the whole rebuild step (recall against exact search, checksums, fsync, rename) against the same; no mark
    all pairs: the lists of top-50 neighbours as the embedding and content channels publish them (normalized, without
        the item itself, equal scores in the order of rows) against IndexFlatIP and one search for 51; for vectors as a
        factorization gives them, and for hashed features, among which many are equal
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rows import alternating, cores, over, parser, report, row

TOP = 50
LIMIT = 1.1


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def seconds_into(parent: Path, call: Callable[[Path], object]) -> float:
    """Of a call that writes into a new folder, as every index of ours is: a file that is written over waits for what
    the disk still does with the one before, and two files wait twice."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    found = seconds_of(lambda: call(folder))
    shutil.rmtree(folder)
    return found


def rebuild_rows(parent: Path, items: int, width: int, rounds: int, threads: int) -> list[dict]:
    import faiss
    import numpy as np

    from configs.schema import IndexConfig
    from embeddings.index import IndexSpec, ItemIndex
    from trainer.rebuild import publish_index

    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((items, width), dtype=np.float32)
    item_ids_N = np.arange(items, dtype=np.int64) * 7 + 3
    rows = []
    for factory, search in (("Flat", {}), (f"IVF{round(items ** 0.5)},Flat", {"nprobe": 32})):
        spec = IndexSpec(factory, search, "cpu", threads)
        config = IndexConfig(factory=factory, search=search, device="cpu", threads=threads, min_recall=0.0)

        def ours(folder: Path, spec: IndexSpec = spec) -> None:
            ItemIndex.build(vectors_ND, item_ids_N, spec).save(folder)

        def bare(folder: Path, factory: str = factory) -> None:
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                index.train(vectors_ND)
            index.add(vectors_ND)
            faiss.write_index(index, str(folder / "bare.faiss"))

        def published(folder: Path, config: IndexConfig = config) -> None:
            publish_index(folder / "published", vectors_ND, item_ids_N, config, epoch=0, step=0, watermark_ms=1,
                          sample_QD=vectors_ND[:config.recall_queries], provenance={})

        for call in (ours, bare):
            seconds_into(parent, call)
        found = alternating(rounds, {name: lambda call=call: seconds_into(parent, call)
                                     for name, call in (("ours", ours), ("published", published), ("faiss", bare))})
        sizes = f"{items:,} x {width}, {threads} threads"
        name = factory.split(",")[0].rstrip("0123456789")
        rows += [row(f"index rebuild, {name}: time / bare faiss", over(found["ours"], found["faiss"]), LIMIT, "lower",
                     sizes=f"{factory}, {sizes}", seconds=found),
                 row(f"index rebuild, {name}, measured and published: time / bare faiss",
                     over(found["published"], found["faiss"]), None, "lower", sizes=f"{factory}, {sizes}")]
    return rows


def all_pairs_row(name: str, vectors_ID, rounds: int, threads: int) -> dict:
    import faiss
    import numpy as np

    from trainer.channels.nearest import nearest_neighbors

    items, width = vectors_ID.shape
    normalized_ID = vectors_ID / np.linalg.norm(vectors_ID, axis=1, keepdims=True)
    row_I = np.arange(1, items + 1, dtype=np.int32)

    def ours() -> None:
        lists = nearest_neighbors(vectors_ID, row_I, items + 1, TOP, threads)
        assert lists.length_N[1:].min() > 0

    def bare() -> None:
        index = faiss.IndexFlatIP(width)
        index.add(normalized_ID)
        index.search(normalized_ID, TOP + 1)

    for call in (ours, bare):
        call()
    found = alternating(rounds, {"ours": lambda: seconds_of(ours), "faiss": lambda: seconds_of(bare)})
    return row(f"all-pairs top-{TOP}, {name}: time / bare faiss search", over(found["ours"], found["faiss"]), LIMIT,
               "lower", sizes=f"{items:,} x {width}, {threads} threads", seconds=found)


def hashed_vectors(items: int, width: int):
    """Features of a world's catalogue as the content channel hashes them where it has no content vectors."""
    import numpy as np
    from worlds import make_sequences, make_world, world_config

    from configs.schema import ContentChannelConfig
    from trainer.channels.content import hashed_features

    with tempfile.TemporaryDirectory(prefix="nearest-") as name:
        make_world(Path(name), users=100, items=items, views_per_user=5, seed=0)
        catalogue = make_sequences(Path(name), world_config(Path(name))).catalogue
        seen_N = np.ones(items + 1, bool)
        seen_N[0] = False
        return hashed_features(catalogue, seen_N, ContentChannelConfig(hashed_dim=width))[1]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--items", type=int, default=200_000, help="of the rebuild")
    made.add_argument("--pairs", type=int, default=20_000, help="items of the all-pairs search")
    made.add_argument("--width", type=int, default=64)
    made.add_argument("--threads", type=int, default=len(cores()))
    arguments = made.parse_args()
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(arguments.threads)
    plain_ID = np.random.default_rng(1).standard_normal((arguments.pairs, arguments.width), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="index-") as name:
        rows = rebuild_rows(Path(name), arguments.items, arguments.width, arguments.rounds, arguments.threads)
    rows.append(all_pairs_row("embedding", plain_ID, arguments.rounds, arguments.threads))
    rows.append(all_pairs_row("content", hashed_vectors(arguments.pairs, 256), arguments.rounds, arguments.threads))
    return report(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
