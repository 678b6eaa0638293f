"""How large an index of a FAISS factory string would be, without building one.

    Flat            4 D a vector                        SQ8, SQ4, SQfp16, ..     D, D/2, 2 D, ..
    PQ<m>[x<b>]     ceil(m b / 8)                       HNSW<M>                  4 (2 M + M / (M - 1)) + 12 and its code
    IVF<n>,<code>   code + 8 (the id), 4 n D centroids  ..,RFlat                 4 D more
    OPQ, PCA, RR    a matrix 4 D D'                     IDMap                    8 more

`tests/unit/test_index_size.py` holds it against indexes that were built.
"""

from __future__ import annotations

import math
import re

from embeddings.index import factory_width

_SCALAR_BITS = {"SQ4": 4, "SQ6": 6, "SQ8": 8, "SQfp16": 16, "SQbf16": 16}
_TRANSFORM = re.compile(r"(?:OPQ\d+|PCA[RWL]*|RR)(?:_?(\d+))?$")


def index_bytes(factory: str, items: int, width: int) -> int | None:
    """Bytes of an index of `items` vectors of this width; None where the factory string is not one of the above."""
    dim = factory_width(width, factory)
    fixed, each = 0.0, 0.0
    coded = False
    for part in factory.replace(" ", "").split(","):
        if part in ("IDMap", "IDMap2"):
            each += 8
        elif part == "L2norm":
            continue
        elif found := _TRANSFORM.match(part):
            out = int(found[1] or dim)
            fixed += 4 * dim * (out + (dim if part.startswith("PCA") else 0))  # PCA keeps its whole basis, too
            dim = out
        elif found := re.match(r"IVF(\d+)(?:_HNSW(\d+))?$", part):
            fixed += int(found[1]) * (4 * dim + (_links(int(found[2])) if found[2] else 0))
            each += 8
        elif found := re.match(r"HNSW(\d+)(?:_(\w+))?$", part):
            code = _code_bytes(found[2] or "Flat", dim)
            if code is None:
                return None
            coded, each = True, each + _links(int(found[1])) + code
        elif part in ("RFlat", "Refine(Flat)"):
            each += 4 * dim
        elif coded and part == "Flat":
            continue  # HNSW32,Flat is HNSW32
        else:
            code = _code_bytes(part, dim)
            if code is None:
                return None
            coded, each = True, each + code
            if found := re.match(r"PQ\d+(?:x(\d+))?", part):
                fixed += 4 * dim * 2 ** int(found[1] or 8)
    return math.ceil(fixed + each * items) if coded else None


def lives_on_gpu(factory: str) -> bool:
    """Whether FAISS has the index on a GPU: flat ones, SQfp16 as one of half precision, and inverted lists over flat,
    scalar or product codes."""
    return re.fullmatch(r"Flat|SQfp16|IVF\d+,(?:Flat|SQ\w+|PQ\d+(?:x8)?)", factory.replace(" ", "")) is not None


def _code_bytes(code: str, dim: int) -> float | None:
    if code == "Flat":
        return 4 * dim
    if code in _SCALAR_BITS:
        return math.ceil(dim * _SCALAR_BITS[code] / 8)
    found = re.match(r"PQ(\d+)(?:x(\d+))?(?:fsr?|np)?$", code)
    return math.ceil(int(found[1]) * int(found[2] or 8) / 8) if found else None


def _links(neighbors: int) -> float:
    """Bytes of a vector's links in an HNSW graph: 2 M on the ground level, M on each level above, which one in M
    vectors reaches; its level and offset."""
    return 4 * (2 * neighbors + neighbors / (neighbors - 1)) + 12
