"""Sharded tables against plain PyTorch, and their checkpoints across numbers of ranks and shardings."""

import json
import time
from pathlib import Path

import pytest
import torch
from spawn import run_ranks
from torch import nn

from configs.errors import InputError

ROWS = {"item": 101, "author": 23, "tag": 5}
DIM = 8
STEPS = 20
LEARNING_RATE = 0.1
LATER_LEARNING_RATE = 0.03
SHARDINGS = ("table_wise", "row_wise", "auto")
LATE_S = 0.6


# Ways to spoil a checkpoint, and what the refusal says.
REFUSALS = {
    "lost_rank": "written by 2 ranks",
    "lost_tensors": "tables-rank1.safetensors: cannot read table",
    "cut_tensors": "tables-rank1.safetensors: cannot read table",
    "cut_header": "tables-rank1.json: not a header",
    "no_header": "no tables-rank*.json",
    "gap": "table 'item' ends at row 51 of 101",
    "size": "table 'item' ends at row 100 of 101",
    "list": "tables-rank1.json: not a header",
    "width": "'item' was saved with offsets [0, 0] and sizes [51, 8]",
    "fewer_rows": "'item' was saved with 101 rows, the model has 50",
    "other_table": "table 'user' is missing from the checkpoint",
    "extra_table": "table 'author' is missing from the model",
    "optimizer": "saved with optimizer 'rowwise_adagrad', not 'sgd'",
}


def build(sharding, optimizer="rowwise_adagrad", rows=ROWS, seed=7, dim=DIM):
    from embeddings.tables import ShardedTables, TableSpec

    specs = [TableSpec(name, count, dim, sharding, init_std=0.5) for name, count in rows.items()]
    return ShardedTables(specs, device=torch.device("cpu"), optimizer=optimizer, learning_rate=LEARNING_RATE, seed=seed)


def ids_of(step, rank):
    """Ids of every table; ragged, repeated, and now and then empty on one rank or on both."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = {}
    for position, (name, rows) in enumerate(ROWS.items()):
        count = 0 if (step + rank + position) % 5 == 0 or step == 3 else 6 + rank + position
        ids[name] = torch.randint(0, rows, (count,), generator=generator)
    return ids


def jagged(ids):
    from torchrec import KeyedJaggedTensor

    # The last key first: the caller's order of keys is not the specs'.
    keys = list(reversed(ids))
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([ids[key] for key in keys]),
        lengths=torch.tensor([ids[key].numel() for key in keys]),
    )


def target_of(name, ids):
    return torch.sin(ids.float()[:, None] * torch.arange(1, DIM + 1) + len(name))


def loss_of(looked_up, ids):
    """A sum over a constant, so that ranks with unequal counts still average to the whole batch's loss."""
    return sum(((looked_up[name] - target_of(name, ids[name])) ** 2).sum() for name in ids) / 40.0


def train(tables, rank, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        if step == STEPS // 2:
            tables.learning_rate = LATER_LEARNING_RATE
        ids = ids_of(step, rank)
        loss = loss_of(tables(jagged(ids)), ids)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


def reference(initial, optimizer, world_size):
    """The same steps in one process: nn.Embedding, and either SGD or row-wise Adagrad written out."""
    tables = {name: nn.Embedding.from_pretrained(weight.clone(), freeze=False) for name, weight in initial.items()}
    momentum = {name: torch.zeros(weight.shape[0]) for name, weight in initial.items()}
    losses = []
    for step in range(STEPS):
        rate = LEARNING_RATE if step < STEPS // 2 else LATER_LEARNING_RATE
        by_rank = [ids_of(step, rank) for rank in range(world_size)]
        of_ranks = [loss_of({name: tables[name](ids[name]) for name in ids}, ids) for ids in by_rank]
        (sum(of_ranks) / world_size).backward()
        losses.append([float(loss.detach()) for loss in of_ranks])
        for name, table in tables.items():
            if table.weight.grad is None:
                continue
            grad, table.weight.grad = table.weight.grad, None
            if optimizer == "rowwise_adagrad":
                momentum[name] += (grad**2).mean(dim=1)
                grad = grad / (momentum[name].sqrt() + 1e-8)[:, None]
            with torch.no_grad():
                table.weight -= rate * grad
    return losses, {name: table.weight.detach() for name, table in tables.items()}, momentum


def parity_cases(rank, world_size):
    from embeddings.tables import gather_full

    results = {}
    for sharding in SHARDINGS:
        for optimizer in ("sgd", "rowwise_adagrad"):
            tables = build(sharding, optimizer)
            initial = gather_full(tables)
            losses = train(tables, rank, STEPS)
            results[sharding, optimizer] = {
                "initial": initial,
                "losses": losses,
                "weight": gather_full(tables),
                "momentum": gather_full(tables, "momentum"),
                "plan": tables.plan(),
                "learning_rate": tables.learning_rate,
            }
    for sharding in ("table_wise", "row_wise"):
        results["late", sharding] = late_case(rank, build(sharding))
    tables = build("row_wise")
    before = gather_full(tables)
    with torch.no_grad():
        ids = ids_of(1, rank)
        looked_up = tables(jagged(ids))
    results["eval"] = all(torch.equal(looked_up[name], before[name][ids[name]]) for name in ids)
    try:
        tables(jagged({name: ids[name] for name in reversed(ids)}))
        results["order"] = "accepted"
    except ValueError as error:
        results["order"] = str(error)
    try:
        tables(jagged({name: torch.tensor([ROWS[name]]) for name in ids}))
        results["range"] = "accepted"
    except ValueError as error:
        results["range"] = str(error)
    return results


def late_case(rank, tables):
    """Seconds that forward and backward waited for others, where the second rank comes late to one of them."""
    import torch.distributed as dist

    from embeddings.exchange import take_waited_s

    waited = {}
    for late_to in ("forward", "backward"):
        dist.barrier()
        take_waited_s()
        time.sleep(LATE_S if (rank, late_to) == (1, "forward") else 0)
        ids = ids_of(1, rank)
        loss = loss_of(tables(jagged(ids)), ids)
        forward_s = take_waited_s()
        dist.barrier()
        time.sleep(LATE_S if (rank, late_to) == (1, "backward") else 0)
        loss.backward()
        waited[late_to] = {"forward": forward_s, "backward": take_waited_s()}
    return waited


def test_two_ranks_equal_one_plain_process():
    by_rank = run_ranks(2, parity_cases)
    for sharding in ("table_wise", "row_wise"):
        waits, late = (result.pop(("late", sharding)) for result in by_rank)
        for where in ("forward", "backward"):
            assert waits[where][where] > 0.9 * LATE_S > 0.5 * LATE_S > late[where][where], (sharding, waits, late)
    for case in [case for case in by_rank[0] if isinstance(case, tuple)]:
        sharding, optimizer = case
        result = by_rank[0][case]
        losses, weight, momentum = reference(result["initial"], optimizer, world_size=2)
        for rank in range(2):
            ours = torch.tensor(by_rank[rank][case]["losses"])
            torch.testing.assert_close(ours, torch.tensor([pair[rank] for pair in losses]), rtol=0, atol=2e-6)
        for name in ROWS:
            assert not torch.equal(result["initial"][name], result["weight"][name])
            torch.testing.assert_close(result["weight"][name], weight[name], rtol=0, atol=1e-6)
            if optimizer == "rowwise_adagrad":
                torch.testing.assert_close(result["momentum"][name], momentum[name], rtol=0, atol=1e-6)
        assert result["learning_rate"] == LATER_LEARNING_RATE
        if sharding == "row_wise":
            assert result["plan"]["item"]["rows_per_rank"] == [51, 50]
        if sharding == "table_wise":
            assert all(len(plan["ranks"]) == 1 for plan in result["plan"].values())
    for result in by_rank:
        assert result["eval"]
        assert "keep one order" in result["order"]
        assert "rows are 0 to" in result["range"]


def alone_cases(rank, world_size):
    from embeddings.tables import LocalLookup, gather_full

    results = {}
    for sharding in SHARDINGS:
        for optimizer in ("sgd", "rowwise_adagrad"):
            tables = build(sharding, optimizer)
            initial, losses = gather_full(tables), train(tables, rank, STEPS)
            looked_up = tables.begin(jagged(ids_of(1, rank)))
            results[sharding, optimizer] = {
                "initial": initial, "losses": losses, "weight": gather_full(tables), "is_local":
                isinstance(looked_up, LocalLookup), "rows": {name: rows.detach() for name, rows in
                                                             looked_up.rows().items()}}
    return results


def test_the_only_rank_equals_a_plain_process():
    for (_, optimizer), result in run_ranks(1, alone_cases)[0].items():
        losses, weight, _ = reference(result["initial"], optimizer, world_size=1)
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(losses)[:, 0], rtol=0, atol=2e-6)
        for name, ids in ids_of(1, 0).items():
            torch.testing.assert_close(result["weight"][name], weight[name], rtol=0, atol=1e-6)
            assert torch.equal(result["rows"][name], result["weight"][name][ids])
        assert result["is_local"] and list(result["rows"]) == list(ROWS)


def save_case(rank, world_size, folder):
    """Train, save after 6 steps, go on; the state and losses that a resumed run must repeat."""
    from embeddings.table_state import save_tables
    from embeddings.tables import gather_full

    results = {}
    for sharding in ("table_wise", "row_wise"):
        tables = build(sharding)
        results["initial", sharding] = gather_full(tables)
        train(tables, rank, 6)
        (Path(folder) / sharding).mkdir(exist_ok=True)
        save_tables(tables, Path(folder) / sharding, rank)
        results["weight", sharding] = gather_full(tables)
        results["momentum", sharding] = gather_full(tables, "momentum")
        results["later", sharding] = train(tables, rank, 3, first=6)
    return results


def load_case(rank, world_size, folder):
    from embeddings.table_state import load_tables
    from embeddings.tables import gather_full

    results = {"initial": gather_full(build("row_wise"))}
    for saved in ("table_wise", "row_wise"):
        for sharding in ("table_wise", "row_wise"):
            # Another seed: whatever is not loaded shows.
            tables = build(sharding, seed=8)
            load_tables(tables, Path(folder) / saved)
            results["weight", saved, sharding] = gather_full(tables)
            results["momentum", saved, sharding] = gather_full(tables, "momentum")
            if world_size == 2 and saved == sharding:
                results["later", sharding] = train(tables, rank, 3, first=6)
    results["again"] = save_and_load_again(rank, world_size, Path(folder))
    grown = build("row_wise", rows={**ROWS, "item": 300})
    fresh = gather_full(grown)
    results["refused"] = refusal(lambda: load_tables(grown, Path(folder) / "row_wise"))
    load_tables(grown, Path(folder) / "row_wise", allow_growth=True)
    results["grown"] = gather_full(grown)["item"]
    results["grown_fresh"] = fresh["item"]
    results["grown_momentum"] = gather_full(grown, "momentum")["item"]
    results["plan"] = grown.plan()
    results["sizes"] = {sharding: sizes_case(rank, world_size, sharding) for sharding in SHARDINGS}
    if world_size == 1:
        results["refusals"] = damage_case(Path(folder))
    return results


def sizes_case(rank, world_size, sharding):
    """Bytes of tables and optimizer on this rank, as `watchtower plan` says and as the sharded modules hold them."""
    from embeddings.plan import place_tables

    tables = build(sharding, rows={"item": 30_001, "author": 4_001, "tag": 300}, dim=16)
    placed = place_tables(tables.specs, devices=world_size, per_node=world_size, device_type="cpu", memory_bytes=None,
                          optimizer="rowwise_adagrad")
    held = {}
    for lookup in tables._collection._lookups:  # what fbgemm's operators hold, whatever TorchRec tells of it
        for module in lookup.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                    held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    plan = tables.plan()
    predicted = [table.weight_bytes(world_size)[rank] + table.state_bytes(world_size)[rank] for table in placed]
    return {
        "predicted": int(sum(predicted)),
        "held": sum(held.values()),
        "placed": [(table.name, table.sharding, list(table.ranks), list(table.rows_per_rank)) for table in placed],
        "really": [(name, at["sharding"], at["ranks"], at["rows_per_rank"]) for name, at in plan.items()],
    }


def save_and_load_again(rank, world_size, folder):
    """Saved at this number of ranks too, where some own no table at all."""
    import torch.distributed as dist

    from embeddings.table_state import load_tables, save_tables
    from embeddings.tables import gather_full

    here = folder / f"again-{world_size}"
    here.mkdir(exist_ok=True)
    tables, other = build("table_wise"), build("row_wise", seed=9)
    train(tables, rank, 2)
    save_tables(tables, here, rank)
    dist.barrier()
    load_tables(other, here)
    return all(
        torch.equal(whole, gather_full(other, kind)[name])
        for kind in ("weight", "momentum")
        for name, whole in gather_full(tables, kind).items()
    )


def refusal(load):
    try:
        load()
    except InputError as error:
        return str(error)
    return "accepted"


def damage_case(folder):
    """What a checkpoint that does not fit is refused with; one rank."""
    import shutil

    from embeddings.table_state import load_tables

    whole, results = folder / "row_wise", {}

    def damaged(name, change, tables=None):
        copy = folder / name
        shutil.copytree(whole, copy)
        change(copy)
        results[name] = refusal(lambda: load_tables(tables if tables is not None else build("row_wise"), copy))

    def edit(copy, change):
        path = copy / "tables-rank1.json"
        header = json.loads(path.read_text())
        change(header)
        path.write_text(json.dumps(header))

    def cut(path, size):
        path.write_bytes(path.read_bytes()[:size])

    damaged("lost_rank", lambda copy: (copy / "tables-rank1.json").unlink())
    damaged("lost_tensors", lambda copy: (copy / "tables-rank1.safetensors").unlink())
    damaged("cut_tensors", lambda copy: cut(copy / "tables-rank1.safetensors", 300))
    damaged("cut_header", lambda copy: cut(copy / "tables-rank1.json", 100))
    damaged("no_header", lambda copy: [path.unlink() for path in copy.glob("*.json")])
    damaged("gap", lambda copy: edit(copy, lambda h: h["shards"].pop(0)))
    damaged("size", lambda copy: edit(copy, lambda h: h["shards"][0]["sizes"].__setitem__(0, 49)))
    damaged("list", lambda copy: (copy / "tables-rank1.json").write_text("[]"))
    damaged("width", lambda copy: None, build("row_wise", dim=16))
    damaged("fewer_rows", lambda copy: None, build("row_wise", rows={**ROWS, "item": 50}))
    damaged("other_table", lambda copy: None, build("row_wise", rows={**ROWS, "user": 50}))
    damaged("extra_table", lambda copy: None, build("row_wise", rows={"item": 101, "tag": 5}))
    damaged("optimizer", lambda copy: None, build("row_wise", optimizer="sgd"))
    return results


def test_checkpoint_moves_between_ranks_and_shardings(tmp_path):
    saved = run_ranks(2, save_case, str(tmp_path))[0]
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))
    for world_size in (1, 2, 4):
        by_rank = run_ranks(world_size, load_case, str(tmp_path))
        loaded = by_rank[0]
        for result in by_rank:  # what `watchtower plan` says of tables and optimizer
            for sizes in result["sizes"].values():
                assert sizes["placed"] == sizes["really"]
                assert sizes["predicted"] == pytest.approx(sizes["held"], rel=0.1, abs=20_000)
        for name in ROWS:
            assert torch.equal(loaded["initial"][name], saved["initial", "table_wise"][name])
            assert torch.equal(loaded["initial"][name], saved["initial", "row_wise"][name])
            for kind in ("weight", "momentum"):
                for of in ("table_wise", "row_wise"):
                    for to in ("table_wise", "row_wise"):
                        assert torch.equal(loaded[kind, of, to][name], saved[kind, of][name]), (kind, of, to, name)
        if world_size == 2:
            for sharding in ("table_wise", "row_wise"):
                assert loaded["later", sharding] == saved["later", sharding]
        assert loaded["again"]
        messages = loaded.get("refusals", {})
        assert len(messages) == (13 if world_size == 1 else 0)
        for name, part in REFUSALS.items() if messages else ():
            assert part in messages[name], (name, messages[name])
        assert "'item' was saved with 101 rows, the model has 300" in loaded["refused"]
        assert torch.equal(loaded["grown"][:101], saved["weight", "row_wise"]["item"])
        assert torch.equal(loaded["grown"][101:], loaded["grown_fresh"][101:])
        assert torch.equal(loaded["grown_fresh"][:101], saved["initial", "row_wise"]["item"])
        assert torch.equal(loaded["grown_momentum"][:101], saved["momentum", "row_wise"]["item"])
        assert not loaded["grown_momentum"][101:].any()
        if world_size == 4:  # five rows cannot be cut into four blocks of two
            assert loaded["plan"]["tag"]["sharding"] == "table_wise"
            assert loaded["plan"]["item"]["sharding"] == "row_wise"


def fail_case(rank, world_size, how):
    import os
    import time

    import torch.distributed as dist

    if rank == 1:
        if how == "raise":
            raise ValueError("the second rank fails")
        if how == "die":
            os._exit(7)
        time.sleep(600)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "rank 1 of 2: Traceback.*the second rank fails"), ("die", "exit code 7"), ("hang", "rank 1 of 2: hung")],
)
def test_a_rank_that_fails_ends_all(how, message):
    import multiprocessing
    import re

    with pytest.raises(RuntimeError) as caught:
        run_ranks(2, fail_case, how, timeout_s=60.0 if how != "hang" else 8.0)
    assert re.search(message, str(caught.value), re.DOTALL)
    assert not multiprocessing.active_children()


def test_initial_rows_depend_on_seed_name_and_row_alone(monkeypatch):
    from embeddings import tables

    monkeypatch.setattr(tables, "INIT_CHUNK_ROWS", 16)

    def rows(seed, name, start, stop):
        spec = tables.TableSpec(name, 100, 4, init_std=1.0)
        return torch.cat([values for _, values in tables.initial_rows(seed, spec, start, stop)])

    whole = rows(1, "item", 0, 100)
    for start, stop in [(0, 1), (5, 16), (16, 32), (15, 50), (99, 100)]:
        assert torch.equal(rows(1, "item", start, stop), whole[start:stop])
    assert not torch.equal(rows(2, "item", 0, 100), whole)
    assert not torch.equal(rows(1, "user", 0, 100), whole)
    assert torch.unique(whole).numel() == whole.numel()
    assert abs(float(whole.mean())) < 0.2 and abs(float(whole.std()) - 1.0) < 0.15


@pytest.mark.parametrize("bad", [(0, -1), (2, 5), (3, 7), (4, 2**40)])
def test_an_id_out_of_its_table_ends_the_process_on_a_gpu_too(bad):
    from torchrec import KeyedJaggedTensor

    from embeddings.tables import assert_in_range

    ids = torch.tensor([0, 4, 0, 6, 0])
    features = KeyedJaggedTensor(keys=["small", "none", "large"], values=ids, lengths=torch.tensor([2, 1, 0, 0, 1, 1]))
    rows = {"small": 5, "none": 1, "large": 7}
    assert_in_range(features, rows)
    assert_in_range(KeyedJaggedTensor(keys=["none"], values=ids[:0], lengths=torch.tensor([0])), rows)
    ids[bad[0]] = bad[1]
    with pytest.raises(RuntimeError, match="out of the rows"):
        assert_in_range(features, rows)


@pytest.mark.parametrize("name", ["items", "keys", "values", "pop", "a.b", ""])
def test_a_table_name_that_cannot_be(name):
    from embeddings.tables import TableSpec

    with pytest.raises(InputError, match="table"):
        TableSpec(name, 3, 4)
