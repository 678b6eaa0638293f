"""Parquet written by ourselves, read by pyarrow."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.untrusted import open_parquet
from trainer import fixed_lists
from trainer.fixed_lists import FixedListWriter

KINDS = [pa.bool_(), pa.int32(), pa.int64(), pa.float32(), pa.float64()]


def schema_of(kinds):
    fields = []
    for number, (kind, width) in enumerate(kinds):
        listed = kind if width is None else pa.list_(pa.field("element", kind, nullable=False), width)
        fields.append(pa.field(f"column {number}", listed, nullable=False))
    return pa.schema(fields)


def drawn(kind, shape, rng):
    if pa.types.is_boolean(kind):
        return rng.random(shape) < 0.5
    if pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        return rng.integers(limits.min, limits.max, shape, kind.to_pandas_dtype(), endpoint=True)
    found = rng.normal(0, 1e3, shape).astype(kind.to_pandas_dtype())
    found[rng.random(shape) < 0.1] = np.nan
    return found


def written(schema, parts):
    sink = io.BytesIO()
    writer = FixedListWriter(sink, schema)
    for columns in parts:
        writer.write(columns)
    writer.close()
    return pa.py_buffer(sink.getvalue())


def as_table(schema, columns):
    return pa.table([pa.array(values, field.type) if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(
        pa.array(values.ravel(), field.type.value_type), type=field.type)
        for field, values in zip(schema, columns, strict=True)], schema=schema)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([None, None, 1, 2, 3, 9])), min_size=1, max_size=18),
       st.lists(st.integers(0, 90), max_size=3), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_pyarrow_reads_what_was_written(kinds, rows, page, group, seed):
    rng, schema = np.random.default_rng(seed), schema_of(kinds)
    parts = [[drawn(kind, count if width is None else (count, width), rng) for kind, width in kinds] for count in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_lists, "PAGE", page)
        patch.setattr(fixed_lists, "ROW_GROUP", group)
        file = written(schema, parts)
    expected = pa.concat_tables([as_table(schema, columns) for columns in parts] or [schema.empty_table()])
    found = open_parquet(pa.BufferReader(file), "a.parquet")  # with the checks that every file of ours is read with
    assert found.schema_arrow.equals(schema, check_metadata=True)
    table = found.read()
    for name in schema.names:  # NaN is not equal to itself
        one, other = ([*chunked.combine_chunks().to_pylist()] for chunked in (table[name], expected[name]))
        assert repr(one) == repr(other)
    some = found.read(columns=[schema.names[-1]])
    assert some.num_rows == sum(rows) == found.metadata.num_rows
    for number in range(found.metadata.num_row_groups):
        metadata = found.metadata.row_group(number)
        assert metadata.num_rows <= group
        begin = sum(found.metadata.row_group(before).num_rows for before in range(number))
        for at, name in enumerate(schema.names):
            column, values = metadata.column(at), expected[name].slice(begin, metadata.num_rows)
            if pa.types.is_integer(schema.field(name).type):
                assert column.statistics.min == min(values.to_pylist())
                assert column.statistics.max == max(values.to_pylist()) and column.statistics.null_count == 0
            else:
                assert column.statistics is None or not column.statistics.has_min_max


def test_values_are_cast_to_the_field():
    schema = schema_of([(pa.float64(), 2), (pa.int64(), None)])
    file = written(schema, [[np.array([[1, 2]], np.uint8), np.array([7], np.uint16)]])
    assert pq.read_table(pa.BufferReader(file)).to_pylist() == [{"column 0": [1.0, 2.0], "column 1": 7}]


@pytest.mark.parametrize("field", [
    pa.field("a", pa.int64()), pa.field("a", pa.string(), nullable=False), pa.field("a", pa.int16(), nullable=False),
    pa.field("a", pa.list_(pa.field("element", pa.int64(), nullable=False), 0), nullable=False),
    pa.field("a", pa.list_(pa.int64(), 2), nullable=False), pa.field("a", pa.list_(pa.int64()), nullable=False)])
def test_other_fields_are_refused(field):
    with pytest.raises(ValueError, match="only numbers and fixed-size lists of them without nulls"):
        FixedListWriter(io.BytesIO(), pa.schema([field]))


def test_values_of_another_kind_are_refused():
    writer = FixedListWriter(io.BytesIO(), schema_of([(pa.int64(), None)]))
    with pytest.raises(TypeError, match="Cannot cast"):
        writer.write([np.array([1.9])])


@pytest.mark.parametrize("columns", [[np.zeros((3, 3)), np.zeros(3, int)], [np.zeros((3, 2)), np.zeros(2, int)],
                                     [np.zeros(6), np.zeros(3, int)]])
def test_shapes_that_do_not_fit_are_refused(columns):
    sink = io.BytesIO()
    writer = FixedListWriter(sink, schema_of([(pa.float64(), 2), (pa.int64(), None)]))
    with pytest.raises(ValueError, match="has the shape .* where 3|has the shape .* where 6"):
        writer.write(columns)
    assert sink.getvalue() == b"PAR1"
