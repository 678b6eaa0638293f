"""Nearest neighbours of item vectors that were trained on nothing at or after the watermark (the role of Marm).

`source: svd` factorizes the shifted positive PMI of co-views within `window` effective views (Levy & Goldberg 2014):

    M_ij = max(0, log(#(i,j) #(.,.) / (#(i,.) #(.,j))) - log k),   M ~ U S V^T,   vectors U sqrt(S),   score: cosine

by a randomized truncated SVD (Halko et al. 2011, Algorithm 4.4 with four power iterations) from a seeded start; pairs
are summed in a fixed order, so a seed gives the same vectors up to rounding.

`source: crm` takes the item vectors of an unconditioned tower, published as indexes/channel-embedding/seed=<s>/
<watermark_ms>-<step>: of the index with the latest watermark that is not after the snapshot's; score: cosine. The last
number of what an index holds is the item's bias, which stands for its popularity and is left out here: as a product of
two biases, both far below 0, it would make the least watched items everybody's neighbours.

Shape suffixes: I = items with vectors, N = vocabulary rows, D = width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse

from configs.errors import InputError
from configs.schema import ChannelsConfig, EmbeddingChannelConfig
from embeddings.snapshots import Snapshot, list_snapshots, read_manifest, verify
from trainer.channels.blocks import near_pairs
from trainer.channels.channel import Built, Given
from trainer.channels.nearest import nearest_neighbors
from trainer.co_views import CoViews

TOWER = "channel-embedding"  # the model whose indexes the crm source reads
OVERSAMPLED, POWER_ITERATIONS = 16, 4


class Embedding:
    name = "embedding"

    def section(self, config: ChannelsConfig) -> EmbeddingChannelConfig:
        return config.embedding

    def lacks(self, store) -> None:
        return None

    def sources(self, watermark_ms: int, given: Given) -> dict:
        config = given.config.embedding
        if config.source == "svd":
            return {}
        found = tower_index(given.indexes, config.seed, watermark_ms)
        return {"index": found.path.name, "index_files": read_manifest(found.path)["files"], "score": "cosine"}

    def build(self, views: CoViews, given: Given) -> Built:
        config, top, rows = given.config.embedding, given.config.top, views.rows
        if config.source == "svd":
            row_I, vectors_ID, facts = svd_vectors(views, config, given.threads)
            return Built(nearest_neighbors(vectors_ID, row_I, rows, top, given.threads), facts)
        row_I, vectors_ID = tower_vectors(tower_index(given.indexes, config.seed, views.watermark_ms).path, given,
                                          views.watermark_ms)
        lists = nearest_neighbors(vectors_ID, row_I, rows, top, given.threads)
        return Built(lists, {"vectors": len(row_I), "width": vectors_ID.shape[1]})


def shifted_ppmi(views: CoViews, window: int, shift: float, threads: int = 1) -> scipy.sparse.csr_matrix:
    """float64 (N, N), symmetric: the shifted positive PMI of items that stand within `window` effective views."""
    item_P, neighbor_P, count_P = near_pairs(views.offset_U1, views.item_V, views.rows, window, threads=threads)
    total_N = np.bincount(item_P, weights=count_P, minlength=views.rows)
    with np.errstate(divide="ignore"):
        pmi_P = np.log(count_P * total_N.sum() / (total_N[item_P] * total_N[neighbor_P])) - np.log(shift)
    keep_P = pmi_P > 0
    return scipy.sparse.csr_matrix((pmi_P[keep_P], (item_P[keep_P], neighbor_P[keep_P])), (views.rows, views.rows))


def svd_vectors(views: CoViews, config: EmbeddingChannelConfig, threads: int = 1
                ) -> tuple[np.ndarray, np.ndarray, dict]:
    """(int64 (I,) rows with any positive PMI, float32 (I, D) vectors U sqrt(S), counts)."""
    matrix = shifted_ppmi(views, config.window, config.shift, threads)
    row_I = np.flatnonzero(np.diff(matrix.indptr))
    matrix = matrix[row_I][:, row_I]
    left, strength = truncated_svd(matrix, config.dim, config.seed)
    facts = {"vectors": len(row_I), "width": len(strength), "pmi_pairs": int(matrix.nnz)}
    return row_I, (left * np.sqrt(strength)).astype(np.float32), facts


def truncated_svd(matrix: scipy.sparse.csr_matrix, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(U float64 (I, D), S float64 (D,)), the largest singular values first; D is at most I. Signs are arbitrary."""
    size = matrix.shape[0]
    width = min(width, size)
    if size <= width + OVERSAMPLED:
        left, strength, _ = np.linalg.svd(matrix.toarray())
        return left[:, :width], strength[:width]
    start = np.random.default_rng(seed).standard_normal((size, width + OVERSAMPLED))
    turned = matrix.T.tocsr()
    basis, _ = np.linalg.qr(matrix @ start)
    for _ in range(POWER_ITERATIONS):
        basis, _ = np.linalg.qr(turned @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    inner, strength, _ = np.linalg.svd((turned @ basis).T, full_matrices=False)
    return (basis @ inner)[:, :width], strength[:width]


def tower_index(indexes: Path | None, seed: int, watermark_ms: int) -> Snapshot:
    """The tower's index with the latest watermark that is not after the given one.

    Raises:
        InputError: there is none.
    """
    folder = Path(indexes or "indexes") / TOWER / f"seed={seed}"
    found = [snapshot for snapshot in list_snapshots(folder) if snapshot.watermark_ms <= watermark_ms]
    if not found:
        raise InputError(f"channels.embedding.source is crm, but {folder} holds no index with a watermark up to "
                         f"{watermark_ms} ms. Train the channel's tower first, or set channels.embedding.source=svd")
    return found[-1]


def tower_vectors(folder: Path, given: Given, watermark_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 (I,) rows, float32 (I, D) vectors without the bias) of the index's items that were first seen before the
    watermark."""
    from embeddings.index import INDEX_FILES, ItemIndex
    from trainer.vocabulary import Vocabulary

    verify(folder, *INDEX_FILES)
    index = ItemIndex.load(folder, threads=given.threads)
    row_I = Vocabulary(given.catalogue.item_id_N[1:]).rows_of(index.item_ids)
    known_I = (row_I > 0) & (given.catalogue.first_seen_ms_N[row_I] < watermark_ms)
    return row_I[known_I], index.vectors()[known_I, :-1]  # (v, b) of embeddings.similarity.Similarity.index_vectors
