"""Changes of a valid file: bytewise, of a JSON tree, and of a Parquet table's columns."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "a" * 300, "\0", "0", "NaN"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
TEXT_PIECES = [b"", b"\0", b"\xff", b"\n", b"{", b"}", b"[", b"]", b":", b"- ", b"*a", b"&a ", b"<<",
               b"!!python/object:x", b"1e999", b"-1", b"9" * 40, b"nan", b"'", b'"', b",", b"../", b"%", b"=",
               b"."]


@st.composite
def changed_bytes(draw, valid: bytes) -> bytes:
    """A few bytes flipped, put in, taken out or repeated; cut off; or something else altogether."""
    data = bytearray(valid)
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=64))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        # The end of a file holds its footer, which is where the lies matter.
        at = max(len(data) - 1 - at, 0) if draw(st.booleans()) else at
        what = draw(st.integers(0, 5))
        if what == 0 and data:
            data[at] ^= draw(st.integers(1, 255))
        elif what == 1:
            del data[at:]
        elif what == 2:
            data[at:at] = draw(st.sampled_from(TEXT_PIECES) | st.binary(max_size=8))
        elif what == 3:
            del data[at:at + draw(st.integers(1, 16))]
        elif what == 4:
            data[at:at + 4] = draw(st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"]))
        else:
            data[at:at] = data[at:at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def changed_json(draw, valid: bytes) -> bytes:
    """One place of the tree is another value, or gone; or the whole is."""
    tree = json.loads(valid)
    places = list(_places(tree))
    holder, key = draw(st.sampled_from(places)) if places else (None, None)
    if holder is None or draw(st.integers(0, 15)) == 0:
        tree = draw(ANY_JSON)
    elif draw(st.integers(0, 3)) == 0:
        del holder[key]
    else:
        holder[key] = draw(ANY_JSON)
    return json.dumps(tree).encode()


def _places(node):
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield node, key
        yield from _places(value)


def _columns(rows: int) -> list[pa.Array]:
    """Columns of types and values that no reader of ours asks for."""
    numbers = np.arange(rows)
    wild = np.resize(np.array([np.nan, np.inf, -np.inf, 1e308, -1.0, 0.0]), rows)
    lists = [[int(n)] * (n % 3) for n in numbers]
    return [
        pa.array(numbers), pa.array(numbers.astype(np.int32)), pa.array(-numbers), pa.array(numbers.astype(np.uint64)),
        pa.array(np.full(rows, 2**63 - 1)), pa.array(np.full(rows, -(2**63))),
        pa.array(np.full(rows, 2**64 - 1, np.uint64)),
        pa.array(wild), pa.array(wild.astype(np.float32)), pa.array(np.zeros(rows, bool)), pa.nulls(rows),
        pa.nulls(rows, pa.int64()), pa.array([None, *numbers[1:].tolist()][:rows], pa.int64()),
        pa.array([str(n) for n in numbers]),
        pa.array([b"\xff"] * rows), pa.array(numbers, pa.timestamp("us")), pa.array(numbers, pa.timestamp("ns", "UTC")),
        pa.array(numbers, pa.duration("s")), pa.array(numbers, pa.date64()), pa.array(["a"] * rows).dictionary_encode(),
        pa.array(lists, pa.list_(pa.int64())), pa.array(lists, pa.large_list(pa.int32())),
        pa.array([None, *lists[1:]][:rows], pa.list_(pa.int64())), pa.array([[None]] * rows, pa.list_(pa.float32())),
        pa.array([[float("nan"), 1.0]] * rows, pa.list_(pa.float32(), 2)), pa.array([{"a": 1}] * rows),
        pa.array([[[1]]] * rows), pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int32())),
        pa.array(numbers.tolist(), pa.decimal128(20, 2)), pa.array(["5"] * rows, pa.string_view()),
        pa.array([b"0" * 16] * rows, pa.uuid()),
    ]


@st.composite
def changed_table(draw, valid: bytes) -> bytes:
    """A column of another type or with other values, gone, twice, in another order; or other rows."""
    table = pq.read_table(pa.BufferReader(valid))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, table.num_columns - 1))
        what = draw(st.integers(0, 7))
        if what <= 3:
            name = table.column_names[at]
            table = table.set_column(at, pa.field(name, (column := draw(st.sampled_from(_columns(len(table))))).type),
                                     column)
        elif what == 4 and table.num_columns > 1:
            table = table.remove_column(at)
        elif what == 5:
            table = table.append_column(table.column_names[at], table.column(at))
        elif what == 6:
            table = table.slice(draw(st.integers(0, len(table))))
        else:
            table = pa.concat_tables([table, table])
    if draw(st.booleans()):
        table = table.replace_schema_metadata(None)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def changes(kind: str, valid: bytes) -> st.SearchStrategy[bytes]:
    """All changes that make sense for a file of this kind."""
    found = [changed_bytes(valid)]
    if kind == "json":
        found.append(changed_json(valid))
    if kind == "parquet":
        found.append(changed_table(valid))
    return st.one_of(found)
