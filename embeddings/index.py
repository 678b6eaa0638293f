"""Nearest-neighbour indexes over item vectors: the only file that knows FAISS.

An index is a FAISS factory string and search parameters; its inner product is the score (`embeddings.similarity`). How
much the approximation loses is measured against exact search over the same vectors, never assumed.

Shape suffixes: N = items, Q = queries, D = vector width.
"""

import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError, WatchtowerError
from embeddings.untrusted import parse_json, read_parquet, whole_column

INDEX_FILE = "index.faiss"
IDS_FILE = "item_ids.parquet"
INDEX_FILES = (INDEX_FILE, IDS_FILE)
_METADATA_KEY = b"watchtower.index"
# Maps every kind of index into memory, not only inverted lists.
_MMAP_FLAG = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
_EXACT_BATCH = 64
_RECODED_AT_ONCE = 1 << 18
_MOST_WIDTH = 1 << 20
_FAISS_LIMIT = faiss.get_deserialization_vector_byte_limit()
_READING, _reading = threading.Lock(), []  # sizes of the index files that are being read


@dataclass(frozen=True)
class IndexSpec:
    """What to build and how to search it.

    Attributes:
        factory: FAISS factory string, such as `Flat`, `IVF1024,Flat`, `HNSW32`, `PQ16`, `SQ8`.
        search: search parameters by FAISS's names, such as nprobe, efSearch, k_factor_rf, quantizer_efSearch.
        device: `cuda` needs a faiss build with GPU support; `auto` takes the GPU where there is one and it knows the
            index type, the CPU otherwise.
        threads: OpenMP threads of FAISS, for the whole process; None leaves them as they are.

    Raises:
        InputError: a device that does not exist, or less than one thread.
    """

    factory: str = "Flat"
    search: Mapping[str, float] = field(default_factory=dict)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"index device {self.device!r} is not auto, cpu or cuda")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"index threads {self.threads} is less than 1")


class ItemIndex:
    """Item ids by the inner product of their vectors with a query. Make one with `build` or `load`.

    Attributes:
        spec: what was built and how it is searched.
        item_ids: int64 (N,), the item of every position.
        width: D of the vectors and queries.
        build_seconds: time that training and adding took; None for one that was loaded, so that an index that is
            built again is the same bytes.
    """

    def __init__(
        self, index: faiss.Index, item_ids: np.ndarray, width: int, spec: IndexSpec, build_seconds: float | None
    ) -> None:
        self._index = index
        self._vectors_ND: np.ndarray | None = None
        self._bytes: int | None = None
        self.item_ids = item_ids
        self.width = width
        self.spec = spec
        self.build_seconds = build_seconds

    @classmethod
    def build(cls, vectors_ND: np.ndarray, item_ids_N: np.ndarray, spec: IndexSpec) -> "ItemIndex":
        """Train where the factory needs it, add all vectors, set the search parameters.

        The vectors are kept by reference, for `recall_against_exact`, until `forget_vectors`. The same vectors give
        the same index on the CPU with one thread.

        Args:
            vectors_ND: float32 (N, D). For product quantization they are padded with zeros to a width that its parts
                divide, which changes no inner product.
            item_ids_N: int64 (N,), distinct, none of them -1, which stands for a missing hit.
            spec: what to build.

        Raises:
            InputError: a bad factory string or search parameter, too few vectors to train on, none at all, or a GPU
                asked for where there is none.
            WatchtowerError: a vector that is not finite, naming the first such item; ids that are not distinct.
        """
        vectors_ND, item_ids_N = _checked(vectors_ND, item_ids_N)
        _set_threads(spec)
        width = vectors_ND.shape[1]
        padded_ND = _pad(vectors_ND, factory_width(width, spec.factory))
        started = time.perf_counter()
        try:
            index = faiss.index_factory(padded_ND.shape[1], spec.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(
                f"index factory {spec.factory!r} is not one that FAISS builds for vectors of width {width} "
                f"({_reason(error)})"
            ) from error
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            # Some types know only the Euclidean distance and drop the metric in silence: the farthest would win.
            raise InputError(f"index factory {spec.factory!r} has no inner product in FAISS; take another type")
        _spare_training(index)
        index = _to_device(index, spec)
        try:
            if not index.is_trained:
                index.train(padded_ND)
        except RuntimeError as error:
            raise InputError(
                f"index factory {spec.factory!r} cannot be trained on {len(padded_ND)} vectors: take fewer lists or "
                f"smaller codes, or `Flat` ({_reason(error)})"
            ) from error
        if isinstance(index, faiss.IndexIDMap):  # IndexIDMap2 is one too; both refuse plain add
            index.add_with_ids(padded_ND, np.arange(len(padded_ND)))
        else:
            index.add(padded_ND)
        built = cls(index, item_ids_N, width, spec, time.perf_counter() - started)
        built._vectors_ND = vectors_ND
        built._set_search_parameters()
        return built

    def search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the highest inner product, best first.

        Args:
            queries_QD: float32 (Q, D).
            k: how many; may exceed N.

        Returns:
            (scores float32 (Q, k), item ids int64 (Q, k)). Where fewer than k were found, id -1 and score -inf.

        Raises:
            ValueError: queries of another width, or k below 1.
        """
        scores_QK, positions_QK = self._search_positions(queries_QD, k)
        missing = positions_QK < 0
        # A -1 would pick the last item, so it is never used as a position.
        item_ids_QK = self.item_ids[np.where(missing, 0, positions_QK)]
        item_ids_QK[missing] = -1
        return scores_QK, item_ids_QK

    def recall_against_exact(self, queries_QD: np.ndarray, k: int, vectors_ND: np.ndarray | None = None) -> float:
        """Mean share of the exact top k that a search for k finds, from 0 to 1.

        An item counts whose exact score reaches the k-th exact score, so ties cost nothing.

        Args:
            queries_QD: float32 (Q, D), Q at least 1.
            k: how many; at most N count.
            vectors_ND: float32 (N, D), what the index was built from; None if it was built here.

        Raises:
            WatchtowerError: the index was loaded, or has forgotten its vectors, and none are given.
            ValueError: no queries, or vectors of another shape.
        """
        vectors_ND = self._vectors_ND if vectors_ND is None else vectors_ND
        if vectors_ND is None:
            raise WatchtowerError("recall against exact search needs the vectors that the index was built from")
        if vectors_ND.shape != (len(self.item_ids), self.width) or len(queries_QD) == 0:
            raise ValueError(f"vectors {vectors_ND.shape}, queries {queries_QD.shape}; index of {len(self.item_ids)}")
        k = min(k, len(self.item_ids))
        vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        shares = []
        for first in range(0, len(queries_QD), _EXACT_BATCH):
            batch_QD = np.ascontiguousarray(queries_QD[first : first + _EXACT_BATCH], dtype=np.float32)
            _, best_QK = faiss.knn(batch_QD, vectors_ND, k, metric=faiss.METRIC_INNER_PRODUCT)
            _, found_QK = self._search_positions(batch_QD, k)
            # Both sides scored by one function: an approximate index reports scores of its codes, not of the vectors.
            threshold_Q = _exact_scores(batch_QD, vectors_ND, best_QK).min(axis=1)
            scores_QK = _exact_scores(batch_QD, vectors_ND, found_QK)
            slack_Q = 1e-6 * np.maximum(1.0, np.abs(threshold_Q))
            hits_Q = (scores_QK >= (threshold_Q - slack_Q)[:, None]).sum(axis=1)
            shares.append(np.minimum(hits_Q, k) / k)
        return float(np.concatenate(shares).mean())

    def vectors(self) -> np.ndarray:
        """The vectors that the index searches, float32 (N, D), in the order of `item_ids`.

        Those it was built from, or read back from it: exact for flat indexes, the codes' vectors for quantized ones.

        Raises:
            WatchtowerError: this kind of index cannot give its vectors back.
        """
        if self._vectors_ND is not None:
            return self._vectors_ND
        index = _to_cpu(self._index, self.spec)
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            ivf.make_direct_map()
        try:
            return np.ascontiguousarray(index.reconstruct_n(0, self.size)[:, : self.width])
        except RuntimeError as error:
            raise WatchtowerError(
                f"index factory {self.spec.factory!r} cannot give its vectors back ({_reason(error)}); take `Flat`"
            ) from error

    def forget_vectors(self) -> None:
        """Let go of the vectors that `build` keeps for `recall_against_exact`."""
        self._vectors_ND = None

    @property
    def size(self) -> int:
        """Number of items N."""
        return len(self.item_ids)

    @property
    def bytes(self) -> int:
        """Size of the index as FAISS writes it, in bytes."""
        if self._bytes is None:
            self._bytes = int(faiss.serialize_index(_to_cpu(self._index, self.spec)).nbytes)
        return self._bytes

    def save(self, folder: Path) -> None:
        """Write index.faiss and item_ids.parquet (item_id int64; the spec in its metadata) into an existing folder.

        Raises:
            OSError: the files cannot be written; with errno ENOSPC where the disk is full.
        """
        folder = Path(folder)
        # Through a Python file: FAISS's own loses the errno, and a write that only fails on closing goes unnoticed.
        with open(folder / INDEX_FILE, "wb") as file:
            faiss.write_index(_to_cpu(self._index, self.spec), faiss.PyCallbackIOWriter(file.write))
        self._bytes = (folder / INDEX_FILE).stat().st_size
        described = {
            "factory": self.spec.factory,
            "search": dict(self.spec.search),
            "width": self.width,
        }
        schema = pa.schema(
            [pa.field("item_id", pa.int64(), nullable=False)], metadata={_METADATA_KEY: json.dumps(described)}
        )
        pq.write_table(pa.table([pa.array(self.item_ids)], schema=schema), folder / IDS_FILE, use_dictionary=False,
                       column_encoding={"item_id": "DELTA_BINARY_PACKED"})

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        mmap: bool = False,
        device: Literal["auto", "cpu", "cuda"] = "cpu",
        search: Mapping[str, float] | None = None,
        threads: int | None = None,
    ) -> "ItemIndex":
        """Read a saved index. Verify the snapshot first (`verify(folder, *INDEX_FILES)`): FAISS trusts its files.

        Args:
            folder: holds index.faiss and item_ids.parquet.
            mmap: map the file instead of reading it, so that processes share one copy; on the CPU.
            device: as in IndexSpec.
            search: search parameters instead of the saved ones.
            threads: as in IndexSpec.

        Raises:
            WatchtowerError: naming the file that is missing, damaged or does not fit the other; one that asks for more
                memory than it has bytes.
            InputError: search parameters that do not apply.
        """
        folder = Path(folder)
        try:
            table = read_parquet(folder / IDS_FILE, ["item_id"])
            described = parse_json((table.schema.metadata or {})[_METADATA_KEY])
            item_ids = whole_column(table, "item_id", pa.int64(), str(folder / IDS_FILE)).to_numpy()
            width = int(_described_number(described, "width"))
            factory, saved = described["factory"], described["search"]
            if not isinstance(factory, str) or not isinstance(saved, dict) or not 1 <= width <= _MOST_WIDTH:
                raise ValueError("its factory, search parameters or width are none")
            spec = IndexSpec(factory, {name: _described_number(saved, name) for name in saved} if search is None
                             else search, device, threads)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, InputError) as error:
            raise WatchtowerError(f"{folder / IDS_FILE}: cannot be read as the ids of an index ({error})") from error
        _set_threads(spec)
        try:
            with _bounded_by(folder / INDEX_FILE):
                index = faiss.read_index(str(folder / INDEX_FILE), _MMAP_FLAG if mmap else 0)
        except (RuntimeError, MemoryError, OSError) as error:
            raise WatchtowerError(f"{folder / INDEX_FILE}: cannot be read ({_reason(error)})") from error
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise WatchtowerError(f"{folder / INDEX_FILE}: is no index of inner products")
        if index.ntotal != len(item_ids) or index.d != factory_width(width, spec.factory):
            raise WatchtowerError(
                f"{folder}: {INDEX_FILE} holds {index.ntotal} vectors of width {index.d}, {IDS_FILE} {len(item_ids)} "
                f"ids of width {width}"
            )
        loaded = cls(_to_device(index, spec), item_ids, width, spec, None)
        loaded._bytes = (folder / INDEX_FILE).stat().st_size
        loaded._set_search_parameters()
        return loaded

    def _search_positions(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores (Q, k), positions (Q, k)); -inf and -1 where missing."""
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.width or k < 1:
            raise ValueError(f"queries {queries_QD.shape}, k {k}; the index wants (Q, {self.width}) and k >= 1")
        _set_threads(self.spec)
        scores_QK = np.full((len(queries_QD), k), -np.inf, dtype=np.float32)
        positions_QK = np.full((len(queries_QD), k), -1, dtype=np.int64)
        reachable = min(k, self.size)
        if len(queries_QD):
            found = self._index.search(
                _pad(np.ascontiguousarray(queries_QD, dtype=np.float32), self._index.d), reachable
            )
            scores_QK[:, :reachable], positions_QK[:, :reachable] = found
        scores_QK[positions_QK < 0] = -np.inf
        return scores_QK, positions_QK

    def _set_search_parameters(self) -> None:
        on_gpu = _has_gpu() and "Gpu" in type(self._index).__name__
        space = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
        for name, value in self.spec.search.items():
            try:
                space.set_index_parameter(self._index, name, value)
            except RuntimeError as error:
                raise InputError(
                    f"search parameter {name}={value} does not apply to the index {self.spec.factory!r} "
                    f"({_reason(error)})"
                ) from error


def _checked(vectors_ND: np.ndarray, item_ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    item_ids_N = np.ascontiguousarray(item_ids_N, dtype=np.int64)
    if vectors_ND.ndim != 2 or item_ids_N.shape != (len(vectors_ND),):
        raise ValueError(f"vectors {vectors_ND.shape} and ids {item_ids_N.shape}; expected (N, D) and (N,)")
    if not len(vectors_ND):
        raise InputError("no items to index: the catalogue is empty")
    # A sum is finite only where every number is. Where finite numbers add up to more than a float holds, the rows are
    # looked at again. Not by a product: OpenBLAS's threads would go on spinning beside FAISS's.
    with np.errstate(over="ignore", invalid="ignore"):
        all_finite = np.isfinite(vectors_ND.sum(dtype=np.float32))
    finite_N = np.ones(len(vectors_ND), bool) if all_finite else np.isfinite(vectors_ND).all(axis=1)
    if not finite_N.all():
        bad = int((~finite_N).sum())
        raise WatchtowerError(
            f"the vector of item {item_ids_N[np.argmin(finite_N)]} is not finite (so are {bad} of {len(finite_N)} in "
            f"all): the model has diverged, its index was not built"
        )
    rising = bool((item_ids_N[1:] > item_ids_N[:-1]).all())
    if (item_ids_N == -1).any() or not rising and len(np.unique(item_ids_N)) < len(item_ids_N):
        raise WatchtowerError("item ids of an index must be distinct, and none may be -1, which marks a missing hit")
    return vectors_ND, item_ids_N


def factory_width(width: int, factory: str) -> int:
    """The least width from `width` on that the parts of every product quantizer in the factory string divide."""
    parts = [int(count) for count in re.findall(r"P(?:Q|RQ|LSQ)(\d+)", factory) if int(count)]
    return -(-width // math.lcm(*parts)) * math.lcm(*parts)


def _pad(vectors: np.ndarray, width: int) -> np.ndarray:
    if vectors.shape[1] == width:
        return vectors
    return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))


def _exact_scores(queries_QD: np.ndarray, vectors_ND: np.ndarray, positions_QK: np.ndarray) -> np.ndarray:
    """Inner products in float64 (Q, k); -inf where the position is -1."""
    gathered_QKD = vectors_ND[np.maximum(positions_QK, 0)].astype(np.float64)
    scores_QK = np.einsum("qd,qkd->qk", queries_QD.astype(np.float64), gathered_QKD)
    return np.where(positions_QK < 0, -np.inf, scores_QK)


@contextmanager
def _bounded_by(path: Path) -> Iterator[None]:
    """While an index is read, FAISS allocates no array that is larger than the file: a length in it may be a lie.

    The limit is the process's; a thread that reads another index meanwhile is bounded by the wider of the two.
    """
    size = path.stat().st_size
    with _READING:
        _reading.append(size)
        faiss.set_deserialization_vector_byte_limit(max(_reading))
    try:
        yield
    finally:
        with _READING:
            _reading.remove(size)
            faiss.set_deserialization_vector_byte_limit(max(_reading) if _reading else _FAISS_LIMIT)


def _described_number(described: Mapping, name: str) -> float:
    value = described[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is no number")
    return value


def _set_threads(spec: IndexSpec) -> None:
    if spec.threads is not None:
        faiss.omp_set_num_threads(spec.threads)


def _has_gpu() -> bool:
    # faiss-cpu has the functions that copy to GPUs, but not the resources they need.
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _to_device(index: faiss.Index, spec: IndexSpec) -> faiss.Index:
    if spec.device == "cpu" or (spec.device == "auto" and not _has_gpu()):
        return index
    if not _has_gpu():
        raise InputError("index device cuda: this faiss has no GPU support or sees no GPU; use auto or cpu")
    resources, options, half = faiss.StandardGpuResources(), faiss.GpuClonerOptions(), _is_half(index)
    options.useFloat16 = half
    try:
        on_gpu = faiss.index_cpu_to_gpu(resources, 0, _recoded(index, faiss.IndexFlatIP(index.d)) if half else index,
                                        options)
    except RuntimeError as error:
        if spec.device == "auto":
            return index
        raise InputError(f"index factory {spec.factory!r} does not exist on the GPU ({_reason(error)})") from error
    # The index must not outlive them. This is the one name that FAISS lets Python add to an index.
    on_gpu.referenced_objects = [resources]
    return on_gpu


def _to_cpu(index: faiss.Index, spec: IndexSpec) -> faiss.Index:
    if not (_has_gpu() and "Gpu" in type(index).__name__):
        return index
    on_cpu = faiss.index_gpu_to_cpu(index)
    asked = faiss.index_factory(index.d, spec.factory, faiss.METRIC_INNER_PRODUCT)
    return _recoded(on_cpu, asked) if _is_half(asked) else on_cpu


def _is_half(index: faiss.Index) -> bool:
    """Whether it is `SQfp16`. What a GPU calls a flat index of half precision is a scalar quantizer on the CPU."""
    return isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16


def _recoded(index: faiss.Index, into: faiss.Index) -> faiss.Index:
    """`into`, holding the vectors of the index; half precision to single and back changes none."""
    if not into.is_trained:
        into.train(np.zeros((1, into.d), np.float32))  # half precision has nothing to learn
    for begin in range(0, index.ntotal, _RECODED_AT_ONCE):
        into.add(index.reconstruct_n(begin, min(_RECODED_AT_ONCE, index.ntotal - begin)))
    return into


def _spare_training(index: faiss.Index) -> None:
    """Leave out of training what changes no result of ours."""
    inner = index
    wrappers = (
        (faiss.IndexIDMap, "index"),
        (faiss.IndexPreTransform, "index"),
        (faiss.IndexRefine, "base_index"),
    )
    while attribute := next((name for kind, name in wrappers if isinstance(inner, kind)), None):
        inner = faiss.downcast_index(getattr(inner, attribute))
    if hasattr(inner, "do_polysemous_training"):
        # It orders the codes for a Hamming filter that is never used here, and takes 2 s a sub-quantizer.
        inner.do_polysemous_training = False
    # A line on stderr per clustering of under 39 points a centroid says nothing: recall is measured.
    for clustering in (getattr(inner, "cp", None), getattr(getattr(inner, "pq", None), "cp", None)):
        if clustering is not None:
            clustering.min_points_per_centroid = 1


def _reason(error: BaseException) -> str:
    """A FAISS message without the place in its source."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL).strip()[:200]
