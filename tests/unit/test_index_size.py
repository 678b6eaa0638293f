"""The size of an index by its factory string, against indexes that FAISS built."""

import numpy as np
import pytest

from embeddings.index import IndexSpec, ItemIndex
from embeddings.index_size import index_bytes, lives_on_gpu


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4", "IVF8_HNSW8,Flat", "HNSW16",
                                     "SQ8", "SQfp16", "RR16,PQ4x4", "IDMap,Flat", "PCA8,Flat", "IVF16,PQ8x4,RFlat"])
def test_as_large_as_what_is_built(factory):
    vectors_ND = np.random.default_rng(0).standard_normal((3000, 33), np.float32)
    built = ItemIndex.build(vectors_ND, np.arange(3000), IndexSpec(factory, device="cpu", threads=1))
    assert index_bytes(factory, 3000, 33) == pytest.approx(built.bytes, rel=0.03)


@pytest.mark.parametrize("factory", ["LSH", "IVF16", "nonsense"])
def test_what_it_does_not_know(factory):
    assert index_bytes(factory, 10, 4) is None


@pytest.mark.parametrize(("factory", "on_gpu"), [("Flat", True), ("IVF4096,Flat", True), ("IVF64,PQ16", True),
                                                 ("HNSW32", False), ("SQ8", False), ("SQfp16", True), ("PQ16", False),
                                                 ("IVF64,PQ16x4fs", False)])
def test_what_a_gpu_has(factory, on_gpu):
    assert lives_on_gpu(factory) is on_gpu
