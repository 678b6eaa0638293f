"""What a folder or a file of somebody else can not do: run code, take all memory, lead elsewhere, or learn a secret."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import InputError, WatchtowerError
from configs.loader import load
from configs.schema import Config
from embeddings import untrusted
from embeddings.index import INDEX_FILES, IndexSpec, ItemIndex
from embeddings.snapshots import list_snapshots, publish, read_manifest, verify, verify_file
from embeddings.untrusted import inside, map_arrow, open_parquet, parquet_rows, read_json, read_parquet
from trainer.catalogue import read_items
from trainer.logs import list_files, parquet_pieces

NAME, METADATA = b"ARROW:extension:name", b"ARROW:extension:metadata"


class RunsCode(pa.ExtensionType):
    """An extension type as a library registers it: rebuilding it runs the library's code on the file's bytes."""

    ran: list[bytes] = []

    def __init__(self) -> None:
        super().__init__(pa.int64(), "test.runs_code")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        cls.ran.append(serialized)
        return cls()


@pytest.fixture
def registered():
    pa.register_extension_type(RunsCode())
    RunsCode.ran.clear()
    yield RunsCode.ran
    pa.unregister_extension_type("test.runs_code")


def hostile(field_type=None, name=b"test.runs_code", payload=b"payload", **more) -> pa.Table:
    """A log table with a column that asks to be rebuilt by code, at any depth."""
    metadata = {NAME: name, METADATA: payload}
    inner = pa.field("extra", field_type or pa.int64(), metadata=metadata)
    columns = {"user_id": pa.array([1, 2]), "item_id": pa.array([3, 4]),
               "timestamp_ms": pa.array([1_700_000_000_000, 1_700_000_001_000]),
               "watch_time_s": pa.array([1.0, 2.0], pa.float32()), **more}
    schema = pa.schema([*(pa.field(n, c.type) for n, c in columns.items()), inner])
    return pa.table([*columns.values(), pa.nulls(2, inner.type)], schema=schema)


def nested() -> pa.Table:
    field = pa.field("inner", pa.int64(), metadata={NAME: b"test.runs_code", METADATA: b"payload"})
    kind = pa.list_(pa.field("element", pa.struct([field])))
    return pa.table({"user_id": pa.array([1])}).append_column(pa.field("deep", kind), pa.nulls(1, kind))


@pytest.mark.parametrize("table", [hostile(), nested()], ids=["column", "nested"])
def test_a_type_that_is_rebuilt_by_code_is_refused_before_arrow_sees_it(tmp_path, registered, table):
    path = tmp_path / "logs.parquet"
    pq.write_table(table, path)
    RunsCode.ran.clear()
    with pytest.raises(InputError, match="extension type test.runs_code"):
        read_parquet(path)
    with pytest.raises(InputError, match="extension type"):
        parquet_rows(path)
    with pytest.raises(InputError, match="extension type"):
        parquet_pieces(list_files(str(path), "data.logs"), Config(data={"logs": str(path)}).data)
    with pytest.raises(InputError, match="extension type"):
        read_items(Config(data={"logs": "x", "items": str(path)}).data)
    assert registered == []
    pq.read_table(path)
    assert registered  # without the look at the footer the code does run


def test_an_arrow_file_with_such_a_type_is_refused_too(tmp_path, registered):
    path = tmp_path / "catalogue.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, hostile().schema) as writer:
        writer.write_table(hostile())
    RunsCode.ran.clear()
    with pytest.raises(InputError, match="extension type"):
        map_arrow(path)
    assert registered == []


def test_arrows_own_types_pass(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": pa.array([b"0" * 16], pa.uuid()), "n": [1]}), path)
    assert read_parquet(path, ["n"])["n"].to_pylist() == [1]


@pytest.mark.parametrize("change", [
    lambda footer: footer.replace(b"ARROW:schema", b"ARROW:schema", 1),
    lambda footer: footer.replace(b"QAA", b"Q!A", 1),
])
def test_a_schema_that_two_parsers_might_read_differently_is_refused(tmp_path, registered, change):
    path = tmp_path / "a.parquet"
    pq.write_table(hostile(), path)
    data = path.read_bytes()
    length = struct.unpack("<I", data[-8:-4])[0]
    footer = change(data[-8 - length:-8])
    path.write_bytes(data[:-8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    RunsCode.ran.clear()
    with pytest.raises((InputError, pa.ArrowException, OSError)):
        read_parquet(path)
    assert registered == []


def test_rays_own_types_do_not_unpickle_what_a_file_holds(tmp_path, repository):
    """The hole as it is in Ray: with its types registered, reading a footer can unpickle the metadata of a column."""
    path, planted = tmp_path / "logs.parquet", tmp_path / "planted"
    code = f"""
import os, sys
os.environ["RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA"] = "1"
import pickle, pyarrow as pa, pyarrow.parquet as pq
import ray.data._internal.tensor_extensions.arrow as tensors, ray.data._internal.object_extensions.arrow
class Planted:
    def __reduce__(self):
        return (open, ({str(planted)!r}, "w"))
kind = pa.list_(pa.int64())
for name in ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"):
    field = pa.field("x", kind, metadata={{"ARROW:extension:name": name,
                                          "ARROW:extension:metadata": pickle.dumps(Planted(), 4)}})
    pa.unregister_extension_type(name)
    pq.write_table(pa.table([pa.nulls(1, kind)], schema=pa.schema([field])), {str(path)!r})
    pa.register_extension_type((tensors.ArrowTensorType if name.endswith("tensor") else tensors.ArrowTensorTypeV2)(
        (0,), pa.int64()))
    from embeddings.untrusted import read_parquet
    from configs.errors import InputError
    try:
        read_parquet({str(path)!r})
    except InputError as error:
        print("refused", os.path.exists({str(planted)!r}), str(error).count(name))
try:
    pq.read_table({str(path)!r})
except Exception as error:
    pass
print("plain pyarrow", os.path.exists({str(planted)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(repository)})
    assert done.stdout.splitlines() == ["refused False 1", "refused False 1", "plain pyarrow True"], done.stderr


def footer_of(table: pa.Table, size: int) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    metadata = pq.ParquetFile(pa.BufferReader(sink.getvalue())).metadata
    untrusted._check_declared(metadata, range(metadata.num_row_groups), size, "x.parquet")


def test_a_small_file_cannot_declare_a_large_table(monkeypatch):
    monkeypatch.setattr(untrusted, "ROWS_FLOOR", 1000)
    footer_of(pa.table({"a": np.zeros(1000, np.int64)}), 500)
    with pytest.raises(InputError, match="cannot be trusted"):
        footer_of(pa.table({"a": np.zeros(300_000, np.int64)}), 500)
    with pytest.raises(InputError, match="20001 columns"):
        footer_of(pa.table({f"c{n}": pa.array([], pa.int8()) for n in range(20_001)}), 10**9)


def test_a_row_group_that_is_asked_for_cannot_declare_a_large_table(monkeypatch):
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, pa.schema({"a": pa.int64()}), use_dictionary=False) as writer:
        for rows in (10, 300_000, 10):
            writer.write_table(pa.table({"a": np.zeros(rows, np.int64)}), row_group_size=rows)
    metadata = pq.ParquetFile(pa.BufferReader(sink.getvalue())).metadata
    monkeypatch.setattr(untrusted, "ROWS_FLOOR", 400_000)
    monkeypatch.setattr(untrusted, "BYTES_FLOOR", 1000)
    for groups in (range(1), range(2, 3)):
        untrusted._check_declared(metadata, groups, 50, "x.parquet")
    for groups in (range(3), range(1, 2)):
        with pytest.raises(InputError, match="in one column of a row group"):
            untrusted._check_declared(metadata, groups, 50, "x.parquet")


def test_who_reads_some_row_groups_is_answered_for_those(monkeypatch):
    sink, looked_at = pa.BufferOutputStream(), []
    pq.write_table(pa.table({"a": np.arange(40), "b": np.arange(40)}), sink, row_group_size=10)
    check_chunks = untrusted._check_chunks

    def noted(alone, groups, name):
        looked_at.append(list(groups))
        check_chunks(alone, groups, name)

    monkeypatch.setattr(untrusted, "_check_chunks", noted)
    file = open_parquet(pa.BufferReader(sink.getvalue()), "a.parquet", range(1, 3))
    assert file.read_row_group(2)["a"].to_pylist() == list(range(20, 30))
    open_parquet(pa.BufferReader(sink.getvalue()), "a.parquet")
    open_parquet(pa.BufferReader(sink.getvalue()), "a.parquet", range(3, 6))  # of a file that is shorter by now
    assert looked_at == [[1, 2], [0, 1, 2, 3], [3]]


def test_a_footer_that_arrow_throws_on_is_refused(tmp_path):
    """A required column with the histogram of an optional one, and every other footer with one number off by one: to
    look at some of them with pyarrow's own means ends the process."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"column": pa.array([1, None, 3])}), path, compression="none")
    whole, refused = path.read_bytes(), []
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in range(begin, len(whole) - 8):
        for step in (1, 255):
            changed = bytearray(whole)
            changed[at] = (changed[at] + step) % 256
            try:
                open_parquet(pa.BufferReader(bytes(changed)), "a.parquet")
            except (InputError, OSError, pa.ArrowException) as error:
                refused.append(str(error))
    assert any("histogram size mismatch" in message for message in refused)


def test_a_column_name_that_is_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"column": [1]}), path)
    with pytest.raises(InputError, match="a.parquet: the name of a column is no text in UTF-8"):
        open_parquet(pa.BufferReader(path.read_bytes().replace(b"column", b"col\xdbmn")), "a.parquet")


@pytest.mark.parametrize(("text", "message"), [
    (b"{", "Expecting"), (b"[1]", "dict is needed"), (b'{"a": NaN}', "NaN"), (b'{"a": Infinity}', "Infinity"),
    (b"[" * 200_000, "nested too deeply"), (b'{"a": "\xff"}', "utf-8"), (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
])
def test_json_that_is_none_is_one_clear_error(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_json_is_bounded_and_a_plain_file(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="8 bytes"):
        read_json(tmp_path / "a.json", most_bytes=7)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="plain file"):
            read_json(place)


def test_a_path_of_a_file_stays_in_its_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "out").symlink_to(tmp_path)
    assert inside(tmp_path / "run", "indexes/m/1-2", "x") == tmp_path / "run" / "indexes/m/1-2"
    for name in ("../other", "a/../../other", "/etc/passwd", "out/other", "", "a\0b", 3):
        with pytest.raises(InputError, match="summary.json"):
            inside(tmp_path / "run", name, "summary.json")


def test_a_manifest_vouches_only_for_what_it_names(tmp_path):
    folder = publish(tmp_path / "1", lambda into: (into / "a").write_text("x"), {"kind": "k"})
    assert verify(folder, "a") and verify_file(folder, read_manifest(folder), "a") == folder / "a"
    (folder / "b").write_text("planted")
    with pytest.raises(WatchtowerError, match="does not name b"):
        verify(folder, "b")
    with pytest.raises(WatchtowerError, match="does not name b"):
        verify_file(folder, read_manifest(folder), "b")
    (folder / "a").write_text("y")
    with pytest.raises(WatchtowerError, match="checksum"):
        verify_file(folder, read_manifest(folder), "a")
    (tmp_path / "2").symlink_to(folder)
    assert [s.path for s in list_snapshots(tmp_path)] == [folder]


def test_an_index_asks_for_no_more_memory_than_its_file_has(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    ItemIndex.build(vectors, np.arange(50), IndexSpec()).save(tmp_path)
    data = bytearray((tmp_path / INDEX_FILES[0]).read_bytes())
    at = data.index(struct.pack("<Q", 400))  # the number of floats of the vectors
    data[at:at + 8] = struct.pack("<Q", 1 << 37)
    (tmp_path / INDEX_FILES[0]).write_bytes(bytes(data))
    with pytest.raises(WatchtowerError, match="index.faiss"):
        ItemIndex.load(tmp_path)


def test_a_run_folders_config_stands_for_itself_and_a_config_is_bounded(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("extends: ../other.yaml\n")
    with pytest.raises(InputError, match="stands for itself"):
        load(tmp_path / "run")
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join('*' + chr(97 + n) for _ in range(10))}]\n" for n in range(9))
    (tmp_path / "bomb.yaml").write_text(bomb)
    with pytest.raises(InputError, match="more than 50000 values"):
        load(tmp_path / "bomb.yaml")
    with pytest.raises(InputError, match="no plain file"):
        load("/dev/zero")
    with pytest.raises(InputError, match="item_categories"):
        load(_file(tmp_path, "data: {item_categories: ['../../x']}\n"))


def _file(folder: Path, text: str) -> Path:
    (folder / "c.yaml").write_text(text)
    return folder / "c.yaml"


def test_json_files_of_a_run_hold_no_secret(tmp_path):
    folder = publish(tmp_path / "1", lambda into: (into / "a").write_text("x"),
                     {"config": {"logs": "s3://KEY:SECRETPART@bucket/logs"}})
    assert "SECRETPART" not in (folder / "manifest.json").read_text()
    assert json.loads((folder / "manifest.json").read_text())["config"]["logs"] == "s3://***@bucket/logs"


def test_an_open_file_is_looked_at_from_its_end(tmp_path):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.parquet")) as handle:
        assert open_parquet(handle, "a").read()["a"].to_pylist() == [1, 2]
