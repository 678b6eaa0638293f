"""An index on a GPU answers as the same index on a CPU does, and what is written can be read without one."""

import numpy as np
import pytest

from configs.errors import InputError
from embeddings.index import IndexSpec, ItemIndex

ITEMS, WIDTH, QUERIES, TOP = 20_000, 64, 200, 100


@pytest.fixture(scope="module", autouse=True)
def faiss_gpu():
    import faiss

    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        pytest.skip("this faiss has no GPU support")


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((ITEMS, WIDTH), dtype=np.float32)
    return vectors_ND, np.arange(ITEMS, dtype=np.int64) * 3 + 1, rng.standard_normal((QUERIES, WIDTH), dtype=np.float32)


def overlap(first, second):
    return np.mean([len(np.intersect1d(a, b)) / TOP for a, b in zip(first, second, strict=True)])


# Clusters are trained with other sums on a GPU, so lists differ a little.
@pytest.mark.parametrize("factory, search, least", [
    ("Flat", {}, 0.999), ("SQfp16", {}, 0.995), ("IVF64,Flat", {"nprobe": 32}, 0.9)])
def test_a_gpu_finds_what_a_cpu_finds(vectors, tmp_path, factory, search, least):
    vectors_ND, ids_N, queries_QD = vectors
    on = {device: ItemIndex.build(vectors_ND, ids_N, IndexSpec(factory, search=search, device=device))
          for device in ("cpu", "cuda")}
    ids = {device: index.search(queries_QD, TOP)[1] for device, index in on.items()}
    assert ids["cuda"].shape == ids["cpu"].shape
    assert overlap(ids["cpu"], ids["cuda"]) >= least
    recall = {device: index.recall_against_exact(queries_QD, TOP) for device, index in on.items()}
    assert recall["cuda"] >= recall["cpu"] - 0.02


def test_what_does_not_exist_on_a_gpu(vectors):
    vectors_ND, ids_N, _ = vectors
    with pytest.raises(InputError, match="HNSW"):
        ItemIndex.build(vectors_ND, ids_N, IndexSpec("HNSW16", device="cuda"))
    assert ItemIndex.build(vectors_ND, ids_N, IndexSpec("HNSW16", device="auto")) is not None
