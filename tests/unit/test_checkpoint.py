"""Checkpoints on disk: which one a run goes on from, what is kept, and that a damaged one is never read."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch

from configs.errors import InputError, WatchtowerError
from embeddings.snapshots import publish
from trainer import checkpoint, loop
from trainer.checkpoint import CheckpointSaver, checkpoints, prune, read_pending, read_state
from trainer.workers import Stopped, Workers

ALONE = Workers(0, 1, torch.device("cpu"))
FILES = ("dense.json", "dense.safetensors", "manifest.json", "pending.safetensors", "state.json",
         "tables-rank0.json", "tables-rank0.safetensors", "tables-rank1.json", "tables-rank1.safetensors")


def made(parent, step, fingerprint="f", **state):
    """A checkpoint with a file of every kind; what is in them only counts where it is read."""
    def write(folder):
        for name in FILES:
            if name.endswith(".safetensors"):
                safetensors.numpy.save_file({"x": np.arange(40, dtype=np.float32)}, folder / name)
            elif name != "manifest.json":
                (folder / name).write_text(json.dumps({"of": name}))
        (folder / "state.json").write_text(json.dumps({
            "epoch": 1, "step": 2, "global_step": step, "fingerprint": fingerprint, **state}))

    return publish(parent / f"step-{step}", write, {"kind": "checkpoint", "global_step": step, "workers": 2})


def chosen(parent, fingerprint="f"):
    """The folder that a run would go on from, and its warnings."""
    warnings = []
    task = SimpleNamespace(folder=parent, name="m/seed=0", results_key="indexes", fingerprint=lambda: fingerprint)
    path, _ = loop._newest_checkpoint(task, ALONE, lambda event, **fields: warnings.append(fields["message"]))
    return path, warnings


def truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncated, flipped, lambda path: path.unlink()], ids=["cut", "flip", "gone"])
def test_a_damaged_checkpoint_gives_way_whichever_file_it_is(tmp_path, name, harm):
    good, bad = made(tmp_path, 4), made(tmp_path, 8)
    harm(bad / name)
    path, warnings = chosen(tmp_path)
    assert path == good and len(warnings) == 1 and "step-8 is damaged" in warnings[0]
    assert bad.exists()  # a disk that fails to read once must not cost a checkpoint


def test_without_a_whole_checkpoint_training_starts_from_nothing_and_says_so(tmp_path):
    assert chosen(tmp_path) == (None, [])
    for step in (4, 8):
        truncated(made(tmp_path, step) / "state.json")
    path, warnings = chosen(tmp_path)
    assert path is None and len(warnings) == 3 and "starts from nothing" in warnings[-1]


def test_a_checkpoint_of_another_run_is_not_gone_on_from(tmp_path):
    made(tmp_path, 4, fingerprint="other")
    path, warnings = chosen(tmp_path)
    assert path is None and "another config" in warnings[0] and checkpoints(tmp_path) == []


@pytest.mark.parametrize("state", [{"global_step": "4"}, {"epoch": None}])
def test_a_state_without_a_position_is_an_error_of_ours(tmp_path, state):
    with pytest.raises(WatchtowerError, match=r"state\.json"):
        read_state(made(tmp_path, 4, **state))


def test_the_arrays_of_a_pending_index_come_back(tmp_path):
    folder = made(tmp_path, 4)
    arrays = {"vectors_ND": np.ones((3, 2), np.float32), "query_QD": np.zeros((0, 2), np.float32)}
    safetensors.numpy.save_file(arrays, folder / "pending.safetensors")
    found = read_pending(folder)
    assert found.keys() == arrays.keys() and all((found[name] == arrays[name]).all() for name in arrays)
    assert found["query_QD"].shape == (0, 2) and found["vectors_ND"].dtype == np.float32
    (folder / "pending.safetensors").unlink()
    assert read_pending(folder) == {}


def test_the_newest_and_the_named_ones_are_kept(tmp_path):
    for step in (4, 8, 12, 16, 40):
        (tmp_path / f"step-{step}").mkdir(parents=True)
    for other in ("step-x", "step-20.bak", ".step-44.0.writing"):
        (tmp_path / other).mkdir()
    # 40 is damaged and lies ahead of where the run stands: it is not one of the newest.
    prune(tmp_path, 1, {tmp_path / "step-4"}, until=16)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4", "step-16", "step-40"]
    prune(tmp_path, 2, set(), until=40)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-16", "step-40"]


def test_what_a_killed_save_left_is_removed_and_a_folder_of_ones_own_is_made(tmp_path):
    left = checkpoint._new_folder(tmp_path / "m" / "step-4")
    assert left != checkpoint._new_folder(tmp_path / "m" / "step-4") and checkpoints(tmp_path / "m") == []
    (left / "tables-rank0.json").write_text("{")
    CheckpointSaver(tmp_path / "m", ALONE, keep_newest=1, limit_s=1.0)
    assert list((tmp_path / "m").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(WatchtowerError, match="could not be written"):
        checkpoint._new_folder(tmp_path / "file" / "step-4")


def test_a_share_counts_once_its_marker_and_all_its_bytes_are_here(tmp_path):
    writing = checkpoint._new_folder(tmp_path / "step-4")
    assert not checkpoint._is_written(writing, 1)
    (writing / "tables-rank1.json").write_text("half")
    checkpoint._marker(writing, 1).write_text(json.dumps({"tables-rank1.json": 9}))
    assert not checkpoint._is_written(writing, 1)
    (writing / "tables-rank1.json").write_text("the whole")
    assert checkpoint._is_written(writing, 1)
    saver = CheckpointSaver(tmp_path / "other", Workers(0, 3, torch.device("cpu")), keep_newest=1, limit_s=0.0)
    checkpoint._marker(writing, 0).write_text("{}")
    with pytest.raises(WatchtowerError, match="worker 2 did not write its share"):
        saver._await_shares(writing)


def test_a_full_disk_is_told_in_words():
    full = checkpoint._as_ours(OSError(28, "No space left on device"), SimpleNamespace())
    assert isinstance(full, InputError) and "Make room" in str(full)
    assert not isinstance(checkpoint._as_ours(ValueError("x"), SimpleNamespace()), InputError)


def test_patience_does_not_know_how_fast_an_index_was_built():
    """The epoch that has just ended is never among the judged ones, whether its result is there or not."""
    results = [SimpleNamespace(epoch=epoch, score=score) for epoch, score in ((1, 5), (2, 3), (3, 9))]
    task = SimpleNamespace(best=lambda found: max(found, key=lambda r: r.score) if found else None)

    def out(position, known):
        running = SimpleNamespace(task=task, results=results[:known],
                                  config=SimpleNamespace(train=SimpleNamespace(patience=1)))
        return loop._out_of_patience(running, position)

    for step in (0, 7):
        assert [out(loop.Position(2, step, 20), known) for known in (1, 2)] == [False, False]
        assert [out(loop.Position(3, step, 30), known) for known in (2, 3)] == [True, True]
    assert not out(loop.Position(0, 0, 0), 0)


@pytest.mark.parametrize("error, told", [(ValueError("a bug"), ["failing"]), (Stopped("SIGTERM", 3), [])])
def test_the_others_hear_of_an_error_before_this_worker_cleans_up(monkeypatch, error, told):
    order = []

    def start(*_):
        raise error

    task = SimpleNamespace(plans=list, start=start, close=lambda: order.append("closed"))
    running = SimpleNamespace(saver=SimpleNamespace(close=lambda: order.append("saver")),
                              engine=SimpleNamespace(close=lambda: order.append("engine")))
    monkeypatch.setattr(loop, "_start", lambda *_: (running, loop.Position()))
    workers = Workers(0, 1, torch.device("cpu"), failing=lambda found: order.append("failing"))
    with pytest.raises(type(error)):
        loop.train(task, workers, lambda *_, **fields: None)
    assert order == [*told, "saver", "engine", "closed"]


def test_a_copy_of_a_checkpoint_folder_is_a_checkpoint(tmp_path):
    shutil.copytree(made(tmp_path / "a", 4), tmp_path / "b" / "step-4")
    assert chosen(tmp_path / "b") == (tmp_path / "b" / "step-4", [])
