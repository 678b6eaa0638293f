"""Indexes: what they find, what they refuse, and that a saved one answers alike."""

import json

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError, WatchtowerError
from embeddings.index import IDS_FILE, INDEX_FILE, IndexSpec, ItemIndex, _is_half, _recoded

WIDTH = 17  # an odd width, as the bias makes it: a product quantizer cannot cut it as it is
FACTORIES = [
    ("Flat", {}, 1.0),
    ("IVF16,Flat", {"nprobe": 12}, 0.9),
    ("HNSW16", {"efSearch": 128}, 0.9),
    ("PQ16", {}, 0.3),
    ("SQ8", {}, 0.9),
    ("IDMap,HNSW16", {"efSearch": 128}, 0.9),
    ("IDMap2,Flat", {}, 1.0),
    ("OPQ4_16,IVF16,PQ4x4", {"nprobe": 16}, 0.1),
    ("IVF16,PQ4,RFlat", {"nprobe": 16, "k_factor_rf": 20}, 0.8),
    ("PCA8,Flat", {}, 0.1),
    ("HNSW16_SQ8", {"efSearch": 128}, 0.9),
    ("IVF16,PQ4x4fs", {"nprobe": 16}, 0.1),
    ("RQ2x4", {}, 0.1),
    ("IVF16_HNSW8,SQ8", {"nprobe": 16, "quantizer_efSearch": 64}, 0.9),
]


@pytest.fixture(scope="module")
def world():
    generator = np.random.default_rng(5)
    centers = generator.standard_normal((20, WIDTH))
    vectors = (centers[generator.integers(0, 20, 1200)] + 0.4 * generator.standard_normal((1200, WIDTH))).astype("f4")
    item_ids = generator.permutation(10**12 + np.arange(1200) * 7)
    queries = generator.standard_normal((30, WIDTH)).astype("f4")
    return vectors, item_ids, queries


def spec_of(factory, search=None):
    return IndexSpec(factory, search or {}, device="cpu", threads=1)


def naive(vectors, item_ids, queries, k):
    order = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(queries @ vectors.T, order, axis=1), item_ids[order]


@pytest.mark.parametrize(("factory", "search", "floor"), FACTORIES, ids=[case[0] for case in FACTORIES])
def test_every_factory_finds_saves_and_maps_alike(world, tmp_path, factory, search, floor):
    vectors, item_ids, queries = world
    index = ItemIndex.build(vectors, item_ids, spec_of(factory, search))
    scores, found = index.search(queries, 10)
    assert scores.shape == found.shape == (30, 10) and scores.dtype == np.float32 and found.dtype == np.int64
    assert np.isin(found, item_ids).all()
    assert (np.diff(scores, axis=1) <= 1e-5).all()
    recall = index.recall_against_exact(queries, 10)
    assert floor <= recall <= 1.0, recall
    if floor == 1.0:
        exact_scores, exact_ids = naive(vectors, item_ids, queries, 10)
        assert (found == exact_ids).all() and np.allclose(scores, exact_scores, atol=1e-4)
    size = index.bytes
    index.save(tmp_path)
    assert index.bytes == size == (tmp_path / INDEX_FILE).stat().st_size
    assert pq.read_table(tmp_path / IDS_FILE).column_names == ["item_id"]
    ids_file = (tmp_path / IDS_FILE).read_bytes()
    index.build_seconds += 1.0
    index.save(tmp_path)
    assert (tmp_path / IDS_FILE).read_bytes() == ids_file  # how long it took is not in it
    for mmap in (False, True):
        loaded = ItemIndex.load(tmp_path, mmap=mmap, threads=1)
        again_scores, again = loaded.search(queries, 10)
        assert (again == found).all() and (again_scores == scores).all()
        assert loaded.bytes == size and loaded.build_seconds is None and loaded.size == 1200
        assert loaded.spec.factory == factory and loaded.spec.search == search
        with pytest.raises(WatchtowerError, match="vectors"):
            loaded.recall_against_exact(queries, 10)
        assert loaded.recall_against_exact(queries, 10, vectors) == recall


def test_search_parameters_matter_and_can_be_changed_on_load(world, tmp_path):
    vectors, item_ids, queries = world
    recalls = {}
    for factory, name, low, high in [
        ("IVF16,Flat", "nprobe", 1, 16),
        ("OPQ4_16,IVF16,Flat", "nprobe", 1, 16),
        ("HNSW4", "efSearch", 10, 400),
        ("IDMap,HNSW4", "efSearch", 10, 400),
    ]:
        index = ItemIndex.build(vectors, item_ids, spec_of(factory, {name: low}))
        narrow = index.recall_against_exact(queries, 10)
        index.save(tmp_path)
        wide = ItemIndex.load(tmp_path, search={name: high}, threads=1).recall_against_exact(queries, 10, vectors)
        assert narrow < wide, factory
        recalls[factory] = wide
    assert recalls["IVF16,Flat"] == 1.0


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "SQ8", "IVF4,Flat"])
def test_more_asked_for_than_there_is(world, factory):
    vectors, item_ids, queries = world
    index = ItemIndex.build(vectors[:7], item_ids[:7], spec_of(factory, {"nprobe": 4} if "IVF" in factory else {}))
    scores, found = index.search(queries, 12)
    assert (found[:, 7:] == -1).all() and np.isneginf(scores[:, 7:]).all()
    assert all(set(row[:7]) == set(item_ids[:7]) for row in found)
    assert index.recall_against_exact(queries, 12) == 1.0


def test_a_short_probe_leaves_gaps_that_are_not_the_last_item(world):
    vectors, item_ids, queries = world
    index = ItemIndex.build(vectors[:40], item_ids[:40], spec_of("IVF16,Flat", {"nprobe": 1}))
    scores, found = index.search(queries, 30)
    missing = found == -1
    assert missing.any() and (np.isneginf(scores) == missing).all()
    for row in found:
        hits = row[row != -1]
        assert len(set(hits)) == len(hits)
    assert index.recall_against_exact(queries, 30) < 1.0


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 40),
    k=st.integers(1, 50),
    copies=st.integers(1, 4),
    seed=st.integers(0, 999),
    queries=st.integers(1, 5),
)
def test_flat_recall_is_one_whatever_the_ties(count, k, copies, seed, queries):
    generator = np.random.default_rng(seed)
    vectors = np.repeat(generator.integers(-2, 3, (count, 3)), copies, axis=0).astype("f4")
    index = ItemIndex.build(vectors, np.arange(len(vectors)), spec_of("Flat"))
    assert index.recall_against_exact(generator.standard_normal((queries, 3)).astype("f4"), k) == 1.0


def test_recall_counts_what_is_missing(world):
    vectors, item_ids, queries = world
    # Codes of one byte a vector: recall must be what a count by hand gives.
    index = ItemIndex.build(vectors, item_ids, spec_of("PQ2x4"))
    _, exact = naive(vectors, item_ids, queries, 10)
    _, found = index.search(queries, 10)
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
    assert index.recall_against_exact(queries, 10) == pytest.approx(by_hand) and by_hand < 1.0
    index.forget_vectors()
    with pytest.raises(WatchtowerError, match="vectors"):
        index.recall_against_exact(queries, 10)


def test_no_queries_is_no_result(world):
    vectors, item_ids, queries = world
    scores, found = ItemIndex.build(vectors, item_ids, spec_of("Flat")).search(queries[:0], 3)
    assert scores.shape == found.shape == (0, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_named(world, value):
    vectors, item_ids, _ = world
    broken = vectors.copy()
    broken[17, 3] = broken[900, 0] = value
    with pytest.raises(WatchtowerError, match=f"item {item_ids[17]} is not finite .so are 2 of 1200"):
        ItemIndex.build(broken, item_ids, spec_of("Flat"))


@pytest.mark.parametrize(
    ("spec", "count", "message"),
    [
        (("nonsense", {}), 1200, "index factory 'nonsense'"),
        (("IVF16,Nope", {}), 1200, "index factory 'IVF16,Nope'"),
        (("PQ0", {}), 1200, "index factory 'PQ0'"),
        (("HNSW16_PQ4", {}), 1200, "'HNSW16_PQ4' has no inner product"),
        (("IDMap,HNSW16_PQ4", {}), 1200, "'IDMap,HNSW16_PQ4' has no inner product"),
        (("LSH", {}), 1200, "index factory 'LSH' is not one"),
        (("IVF64,Flat", {}), 20, "cannot be trained on 20 vectors"),
        (("PQ4", {}), 20, "cannot be trained on 20 vectors"),
        (("Flat", {"nprobe": 3}), 50, "nprobe=3 does not apply to the index 'Flat'"),
        (("HNSW8", {"bogus": 1}), 50, "bogus=1 does not apply"),
        (("Flat", {}), 0, "catalogue is empty"),
    ],
)
def test_what_cannot_be_built_says_why(world, spec, count, message):
    vectors, item_ids, _ = world
    with pytest.raises(InputError) as caught:
        ItemIndex.build(vectors[:count], item_ids[:count], spec_of(*spec))
    assert message in str(caught.value)
    assert "/project/faiss" not in str(caught.value)


def test_ids_must_be_distinct_and_not_the_mark_of_a_gap(world):
    vectors, _, _ = world
    for ids in ([1, 2, 2], [1, -1, 2]):
        with pytest.raises(WatchtowerError, match="distinct"):
            ItemIndex.build(vectors[:3], np.array(ids), spec_of("Flat"))


def test_specs_that_cannot_be():
    for arguments in ({"device": "tpu"}, {"threads": 0}):
        with pytest.raises(InputError, match="index"):
            IndexSpec(**arguments)


def test_cuda_without_a_gpu_is_refused_and_auto_goes_on(world):
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("there is a GPU")
    vectors, item_ids, queries = world
    with pytest.raises(InputError, match="no GPU"):
        ItemIndex.build(vectors, item_ids, IndexSpec("Flat", device="cuda"))
    assert ItemIndex.build(vectors, item_ids, IndexSpec("Flat", device="auto")).recall_against_exact(queries, 5) == 1.0


def test_half_precision_stays_what_it_is_on_its_way_to_a_gpu_and_back():
    """A GPU has it as a flat index; what comes back is the scalar quantizer that was there."""
    vectors_ND = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    half = _recoded(faiss.IndexFlatIP(8), faiss.index_factory(8, "SQfp16", faiss.METRIC_INNER_PRODUCT))
    half.add(vectors_ND)
    assert _is_half(half) and not _is_half(faiss.IndexFlatIP(8))
    assert not _is_half(faiss.index_factory(8, "SQ8", faiss.METRIC_INNER_PRODUCT))
    flat = _recoded(half, faiss.IndexFlatIP(8))
    np.testing.assert_array_equal(flat.reconstruct_n(0, 300), vectors_ND.astype(np.float16).astype(np.float32))
    back = _recoded(flat, faiss.index_factory(8, "SQfp16", faiss.METRIC_INNER_PRODUCT))
    np.testing.assert_array_equal(faiss.serialize_index(back), faiss.serialize_index(half))


def test_a_damaged_folder_is_named(world, tmp_path):
    vectors, item_ids, _ = world
    index = ItemIndex.build(vectors, item_ids, spec_of("Flat"))

    def fresh():
        index.save(tmp_path)
        return (tmp_path / INDEX_FILE).read_bytes(), (tmp_path / IDS_FILE).read_bytes()

    content, ids = fresh()
    (tmp_path / INDEX_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(WatchtowerError, match=INDEX_FILE):
        ItemIndex.load(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(WatchtowerError, match=INDEX_FILE):
        ItemIndex.load(tmp_path)
    fresh()
    (tmp_path / IDS_FILE).write_bytes(ids[:100])
    with pytest.raises(WatchtowerError, match=IDS_FILE):
        ItemIndex.load(tmp_path)
    pq.write_table(pa.table({"item_id": item_ids}), tmp_path / IDS_FILE)
    with pytest.raises(WatchtowerError, match=IDS_FILE):
        ItemIndex.load(tmp_path)
    described = {"factory": "Flat", "search": {}, "width": WIDTH}
    shorter = pa.table({"item_id": item_ids[:5]}).replace_schema_metadata({"watchtower.index": json.dumps(described)})
    pq.write_table(shorter, tmp_path / IDS_FILE)
    with pytest.raises(WatchtowerError, match="holds 1200 vectors"):
        ItemIndex.load(tmp_path)
