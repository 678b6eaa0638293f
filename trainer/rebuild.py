"""The index rebuild after every epoch: vectors are taken at once, everything else happens while training goes on.

Taking them is collective: each worker encodes its share of the catalogue and of the validation requests with the
towers as they are, and the first worker receives the rows. From there a thread of the first worker builds the FAISS
index, measures it against exact search, publishes it and asks it the validation requests. The next epoch never waits
for that, unless it ends before the rebuild that was started at its own beginning.

Shape suffixes: N = items, Q = requests, D = width of index vectors, K = length of a list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from configs.errors import QualityGateError
from configs.schema import IndexConfig
from embeddings.index import INDEX_FILES, IndexSpec, ItemIndex
from embeddings.snapshots import publish, verify
from embeddings.untrusted import damaged
from trainer.batches import Collation, ItemFeatures
from trainer.metrics import retrieval_metrics
from trainer.requests import Requests
from trainer.watchdog import moved
from trainer.workers import Workers

CHOOSES_AT = 100
"""Places of the recall that picks the best epoch, whatever else is measured."""

NOT_FINITE = "not_finite.parquet"  # item_id of the items whose vector was none, in rejected/
ITEMS_AT_ONCE = 8192
REQUESTS_AT_ONCE = 256

Encode = Callable[[str, object], Tensor]
"""("items", ItemBatch) or ("users", WindowBatch) to float32 vectors, in eval mode and without gradient; collective."""


def encode_items(encode: Encode, features: ItemFeatures, row_N: np.ndarray, workers: Workers) -> np.ndarray | None:
    """Index vectors of these catalogue rows, encoded in shares: float32 (N, D) on the first worker, else None."""
    share = -(-len(row_N) // workers.count)
    mine = row_N[workers.rank * share:(workers.rank + 1) * share]
    batches = -(-share // ITEMS_AT_ONCE)
    parts = []
    for number in range(batches):
        rows = mine[number * ITEMS_AT_ONCE:(number + 1) * ITEMS_AT_ONCE]
        # A worker whose share has run out still takes part in the lookups.
        asked = rows if len(rows) else np.zeros(1, np.int64)
        parts.append(encode("items", features.take(asked).to(workers.device))[:len(rows)])
        moved(f"items {number + 1}/{batches}", in_step=False)
    gathered = workers.gather_rows(torch.cat(parts))
    return None if gathered is None else gathered.cpu().numpy()


def encode_requests(encode: Encode, collation: Collation, features: ItemFeatures, requests: Requests, history: int,
                    condition_Q: np.ndarray, workers: Workers) -> np.ndarray | None:
    """Query vectors of the requests under these conditions (seconds, NaN for none): float32 (Q, D) on the first
    worker, else None; None too where there is no request. Only the latest `history` views of each are read."""
    if not len(requests):
        return None
    share = -(-len(requests) // workers.count)
    mine = np.arange(workers.rank * share, min((workers.rank + 1) * share, len(requests)))
    parts = []
    for number in range(-(-share // REQUESTS_AT_ONCE)):
        q = mine[number * REQUESTS_AT_ONCE:(number + 1) * REQUESTS_AT_ONCE]
        asked = q if len(q) else np.zeros(1, np.int64)
        end_Q = requests.end_Q[asked]
        batch = collation.request_batch(features, requests.views, np.maximum(requests.begin_Q[asked], end_Q - history),
                                        end_Q, requests.time_ms_Q[asked], condition_Q[asked],
                                        requests.ordinal_Q[asked])
        parts.append(encode("users", batch.to(workers.device))[:len(q)])
        moved(f"requests {number + 1}", in_step=False)
    gathered = workers.gather_rows(torch.cat(parts))
    return None if gathered is None else gathered.cpu().numpy()


def index_spec(config: IndexConfig) -> IndexSpec:
    return IndexSpec(factory=config.factory, search=dict(config.search), device=config.device, threads=config.threads)


@dataclass(frozen=True)
class PublishedIndex:
    """An index that was built, measured and published.

    folder: where, below the run folder. epoch, step: of the towers it was made with. watermark_ms: nothing at or after
    it was trained on.
    recall_vs_exact: share of the exact top 100 it finds. build_s: seconds, of the build alone. bytes: its size.
    validation: mean metrics of the validation requests, through the published files.
    """

    folder: str
    epoch: int
    step: int
    watermark_ms: int
    items: int
    recall_vs_exact: float
    build_s: float
    bytes: int
    validation: dict[str, float]

    def as_json(self) -> dict:
        return asdict(self)


def publish_index(parent: Path, vectors_ND: np.ndarray, item_ids_N: np.ndarray, config: IndexConfig, *, epoch: int,
                  step: int, watermark_ms: int, sample_QD: np.ndarray, provenance: dict,
                  validation_recall: Callable[[ItemIndex], float] | None = None) -> tuple[Path, dict]:
    """Builds an index, measures it, and publishes it as `<parent>/<watermark_ms>-<step>`.

    Args:
        vectors_ND, item_ids_N: what goes in. sample_QD: queries that its recall is measured with.
        provenance: JSON that the manifest carries along (config hash, model, seed).
        validation_recall: recall@100 of the validation requests through an index; asked where
            `index.min_validation_recall` is set.

    Returns:
        The folder and its facts: recall_vs_exact, build_s, bytes.

    Raises:
        QualityGateError: naming the gate, the value and the place: its recall against exact search is below
            `index.min_recall`, that of the validation requests below `index.min_validation_recall`, or more vectors
            than `index.max_nan_share` are not finite. What was built is kept aside, in `<parent>/rejected/`, where no
            reader looks.
    """
    item_ids_N, vectors_ND, not_finite = _finite(item_ids_N, vectors_ND)
    nan_share = len(not_finite) / max(len(item_ids_N) + len(not_finite), 1)
    rejected = parent / "rejected" / f"{watermark_ms}-{step}"
    if nan_share > config.max_nan_share or not len(item_ids_N):
        publish(rejected, lambda folder: _write_ids(folder / NOT_FINITE, not_finite),
                {"kind": "rejected", "watermark_ms": int(watermark_ms), "step": int(step), "epoch": int(epoch),
                 "nan_share": nan_share, **provenance}, replace=True)
        raise QualityGateError(
            f"the vectors of {len(not_finite)} of {len(not_finite) + len(item_ids_N)} items are not finite, a share of "
            f"{nan_share:.3g} over index.max_nan_share {config.max_nan_share:g}: no index was published, their ids are "
            f"in {rejected / NOT_FINITE}. The model has diverged; lower train.learning_rate")
    index = ItemIndex.build(vectors_ND, item_ids_N, index_spec(config))
    if not np.isfinite(sample_QD).all():
        sample_QD = sample_QD[np.isfinite(sample_QD).all(axis=1)]
        sample_QD = sample_QD if len(sample_QD) else vectors_ND[:config.recall_queries]
    facts = {"recall_vs_exact": float(index.recall_against_exact(sample_QD, min(100, len(item_ids_N)))),
             "build_s": float(index.build_seconds)}
    failed = _failed_gate(index, facts["recall_vs_exact"], config, validation_recall)
    target = parent / f"{watermark_ms}-{step}" if failed is None else rejected
    # Seconds are no part of the manifest: a run that continues publishes the same index again.
    manifest = {"kind": "index", "watermark_ms": int(watermark_ms), "step": int(step), "epoch": int(epoch),
                "rows": int(len(item_ids_N)), "dim": int(vectors_ND.shape[1]), "factory": config.factory,
                "search": dict(config.search), "recall_vs_exact": facts["recall_vs_exact"], **provenance}
    if len(not_finite):
        manifest["not_finite"] = len(not_finite)
    publish(target, index.save, manifest, replace=True)
    if failed is not None:
        raise QualityGateError(f"{failed}; it was not published, and is kept in {target}")
    return target, {**facts, "bytes": int(index.bytes)}


def _failed_gate(index: ItemIndex, recall: float, config: IndexConfig,
                 validation_recall: Callable[[ItemIndex], float] | None) -> str | None:
    """Which gate an index falls short of, and what helps; None where it meets both."""
    if not recall >= config.min_recall:
        return (f"the index finds {recall:.3f} of the exact top 100, below index.min_recall {config.min_recall} (raise "
                f"its search parameters, {config.factory}: index.search, or lower the gate)")
    least = config.min_validation_recall
    if least is None or validation_recall is None:
        return None
    found = validation_recall(index)
    return None if found >= least else (f"the index answers the validation requests with a recall@{CHOOSES_AT} of "
                                        f"{found:.4f}, below index.min_validation_recall {least:g}")


def _finite(item_ids_N: np.ndarray, vectors_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, vectors of the items whose vector is finite, ids of the others)."""
    finite_N = np.isfinite(vectors_ND).all(axis=1)
    if finite_N.all():
        return item_ids_N, vectors_ND, item_ids_N[:0]
    return item_ids_N[finite_N], vectors_ND[finite_N], item_ids_N[~finite_N]


def _write_ids(path: Path, item_ids: np.ndarray) -> None:
    pq.write_table(pa.table({"item_id": np.asarray(item_ids, np.int64)}), path)


def search_rows(index: ItemIndex, query_QD: np.ndarray, k: int, item_ids_N: np.ndarray) -> np.ndarray:
    """Catalogue rows of the top k, int64 (Q, k), -1 where the index had no more.

    Args:
        item_ids_N: int64 (N,), the vocabulary's ids in row order, row 0 unknown, the others rising.
    """
    _, found_QK = index.search(query_QD, k)
    rows_QK = np.searchsorted(item_ids_N[1:], found_QK) + 1
    return np.where(found_QK == -1, -1, rows_QK)


@dataclass(frozen=True)
class Version:
    """Which index of a model and seed. epoch, step: of the towers it is made with. watermark_ms: nothing at or after it
    was trained on."""

    epoch: int
    step: int
    watermark_ms: int


@dataclass(frozen=True)
class Rebuild:
    """All that an index is made of, once the vectors are taken. vectors_ND, query_QD: float32, of the items and of the
    validation requests. item_ids_N: int64."""

    version: Version
    vectors_ND: np.ndarray
    item_ids_N: np.ndarray
    query_QD: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, as a checkpoint keeps them."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in ("vectors_ND", "item_ids_N", "query_QD")}

    @classmethod
    def from_arrays(cls, version: Version, arrays: Mapping[str, np.ndarray]) -> Rebuild:
        """Of a checkpoint.

        Raises:
            WatchtowerError: they are not what `arrays` gave.
        """
        try:
            found = cls(version, **arrays)
            vectors, ids, queries = found.vectors_ND, found.item_ids_N, found.query_QD
            if (vectors.ndim, ids.ndim, queries.ndim) != (2, 1, 2) or len(vectors) != len(ids) or (
                    len(queries) and queries.shape[1] != vectors.shape[1]):
                raise ValueError(f"shapes {vectors.shape}, {ids.shape}, {queries.shape}")
            if (vectors.dtype, ids.dtype, queries.dtype) != (np.float32, np.int64, np.float32):
                raise ValueError(f"types {vectors.dtype}, {ids.dtype}, {queries.dtype}")
        except (TypeError, ValueError) as error:
            raise damaged("the pending index of a checkpoint", error,
                          "remove the checkpoint; training goes on from the one before") from error
        return found


class IndexRebuilder:
    """Publishes and judges indexes behind the back of the training loop, one at a time and in order.

    Lives on the first worker. Its results are read when they are needed (`results`, `all_results`), where an error of
    the thread is raised too.
    """

    def __init__(self, run_dir: Path, parent: Path, config: IndexConfig, provenance: dict, validation: Requests,
                 item_ids_N: np.ndarray, at: list[int], on_result: Callable[[PublishedIndex], None]):
        self._run_dir, self._parent, self._config, self._provenance = run_dir, parent, config, provenance
        self._validation, self._item_ids_N, self._on_result = validation, item_ids_N, on_result
        self._at = sorted({*at, CHOOSES_AT})
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watchtower-index")
        self._begun: list[Future] = []
        self._under_way: dict[Version, Rebuild] = {}

    def submit(self, rebuild: Rebuild) -> None:
        """Hands the vectors over; returns at once."""
        self._under_way[rebuild.version] = rebuild
        self._begun.append(self._thread.submit(self._done, rebuild))

    def results(self, wait_for: int) -> list[PublishedIndex]:
        """The results of the first `wait_for` rebuilds, waiting for them if need be.

        Raises:
            QualityGateError, WatchtowerError: what a rebuild ended with.
        """
        return [future.result() for future in self._begun[:wait_for]]

    def pending(self) -> Rebuild | None:
        """The last rebuild, while it is under way or waits."""
        return next(reversed(list(self._under_way.values())), None)

    def all_results(self) -> list[PublishedIndex]:
        return self.results(len(self._begun))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _done(self, rebuild: Rebuild) -> PublishedIndex:
        try:
            return self._rebuild(rebuild.version, rebuild.vectors_ND, rebuild.item_ids_N, rebuild.query_QD)
        finally:
            del self._under_way[rebuild.version]

    def _rebuild(self, version: Version, vectors_ND: np.ndarray, item_ids_N: np.ndarray,
                 query_QD: np.ndarray) -> PublishedIndex:
        began = time.perf_counter()
        # Spread over the requests, so that the sample is of many users.
        sample_QD = query_QD[:: max(1, len(query_QD) // self._config.recall_queries)][:self._config.recall_queries]
        if not len(sample_QD):
            sample_QD = vectors_ND[:self._config.recall_queries]
        recall = (lambda index: self._validated(index, query_QD)[f"recall@{CHOOSES_AT}"]) if len(query_QD) else None
        folder, facts = publish_index(self._parent, vectors_ND, item_ids_N, self._config, **asdict(version),
                                      sample_QD=sample_QD, provenance=self._provenance, validation_recall=recall)
        validation: dict[str, float] = {}
        if len(query_QD):
            verify(folder, *INDEX_FILES)
            validation = self._validated(ItemIndex.load(folder, mmap=False), query_QD)
        result = PublishedIndex(folder=str(folder.relative_to(self._run_dir)), **asdict(version),
                                items=len(item_ids_N), validation=validation, **facts)
        self._on_result(result, time.perf_counter() - began)
        return result

    def _validated(self, index: ItemIndex, query_QD: np.ndarray) -> dict[str, float]:
        """Mean metrics of the validation requests through an index."""
        rows_QK = search_rows(index, query_QD, max(self._at), self._item_ids_N)
        metrics = retrieval_metrics(rows_QK, (self._validation.relevant_offset_Q1, self._validation.relevant_rows),
                                    self._at)
        return {name: float(np.nanmean(values)) for name, values in metrics.items()}
