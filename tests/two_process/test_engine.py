"""The towers under DeepSpeed on real processes: parity with one plain process, checkpoints across ranks and stages.

Three spawns (2, 4 and 1 ranks) run all cases; the tests then look at what they brought back.
"""

import gc
import os
import shutil
import sys
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spawn import run_ranks
from torch import nn

from configs.errors import InputError
from trainer.engine import (
    DenseEngine,
    EngineSpec,
    gather_dense,
    load_dense_optimizer,
    load_dense_parameters,
    parameter_groups,
    save_dense,
)
from trainer.losses import gather_with_gradient, in_batch_softmax, softmax_columns

ITEMS, USERS, WIDTH = 40, 30, 8
STEPS, SAVE_AT, SAVE_END = 50, 5, 10
TABLE_RATE = 0.5
TABLE_RATES = {"sgd": 0.5, "rowwise_adagrad": 0.02}
STAGES = (0, 1, 2, 3)
SPECS = {
    "sgd": EngineSpec(optimizer="sgd", learning_rate=0.2),
    "sgd-clipped": EngineSpec(optimizer="sgd", learning_rate=0.2, gradient_clip_norm=0.05),
    "adamw": EngineSpec(learning_rate=2e-3, weight_decay=0.1),
    "adamw-clipped": EngineSpec(learning_rate=2e-3, weight_decay=0.1, gradient_clip_norm=0.05),
}


class Towers(nn.Module):
    """Two small towers of odd sizes, so that no number of ranks divides them, a frozen parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.user = nn.Sequential(nn.Linear(WIDTH, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 5))
        # No bias at the end: the softmax does not see it, and AdamW makes steps of the noise in its zero gradient.
        self.item = nn.Sequential(nn.Linear(WIDTH, 11), nn.GELU(), nn.Linear(11, 5, bias=False))
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def forward(self, rows):
        return self.user(rows["user"]) * self.frozen.sum(), self.item(rows["item"])


def fresh(seed=0):
    torch.manual_seed(seed)
    return Towers()


class PlainTables:
    """Rows outside the engine whose SGD averages over ranks, for the cases that are about the engine alone."""

    def __init__(self, weight=None):
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(USERS + ITEMS, WIDTH, generator=generator) if weight is None else weight
        self.weight.requires_grad_()

    def __call__(self, users, items):
        return {"user": self.weight[users], "item": self.weight[USERS + items]}

    def after_backward(self):
        dist.all_reduce(self.weight.grad)
        with torch.no_grad():
            self.weight -= TABLE_RATE * self.weight.grad / dist.get_world_size()
        self.weight.grad = None


class RealTables:
    """TorchRec's sharded tables, one table-wise and one row-wise, which step inside backward."""

    def __init__(self, optimizer):
        from embeddings.tables import ShardedTables, TableSpec

        specs = [
            TableSpec("user", USERS, WIDTH, "table_wise", init_std=1.0),
            TableSpec("item", ITEMS, WIDTH, "row_wise", init_std=1.0),
        ]
        kind = "sgd" if optimizer == "sgd" else "rowwise_adagrad"
        self.tables = ShardedTables(
            specs, device=torch.device("cpu"), optimizer=kind, learning_rate=TABLE_RATES[kind], seed=11
        )

    def __call__(self, users, items):
        from torchrec import KeyedJaggedTensor

        lengths = torch.tensor([len(users), len(items)])
        return self.tables(KeyedJaggedTensor(["user", "item"], torch.cat([users, items]), lengths=lengths))

    def after_backward(self):
        pass

    def whole(self):
        from embeddings.tables import gather_full

        return gather_full(self.tables)


def global_batch(step):
    generator = torch.Generator().manual_seed(1000 + step)
    rows = 24 if step % 5 else 19
    users = torch.randint(USERS, (rows,), generator=generator)
    items = users + torch.randint(ITEMS - USERS, (rows,), generator=generator)
    weights = torch.randint(1, 4, (rows,), generator=generator).float() if step % 2 else torch.ones(rows)
    return users, items, weights


LOG_Q = torch.log_softmax(torch.linspace(-2.0, 1.0, ITEMS), dim=0)


def local_part(step, rank, world):
    """Equal parts, unequal parts, a rank with no rows at all, and a rank that holds nothing but padding, by turns."""
    users, items, weights = global_batch(step)
    bounds = [round(len(users) * share / world) for share in range(world + 1)]
    if world == 1:
        return users, items, weights, torch.ones(len(users), dtype=torch.bool)
    if step % 4 == 1:
        bounds[1:-1] = [bound // 2 for bound in bounds[1:-1]]
    if step % 4 >= 2:
        bounds[-2] = bounds[-1]
    part = slice(bounds[rank], bounds[rank + 1])
    users, items, weights = users[part], items[part], weights[part]
    valid = torch.ones(len(users), dtype=torch.bool)
    if step % 4 == 3 and rank == world - 1:
        users, items, weights, valid = torch.zeros(3).long(), torch.ones(3).long(), torch.zeros(3), torch.zeros(3) > 0
    return users, items, weights, valid


def distributed_loss(engine, table, step):
    rank, world = dist.get_rank(), dist.get_world_size()
    users, items, weights, valid = local_part(step, rank, world)
    user_ND, item_ND = engine(table(users, items))
    by_rank = [local_part(step, other, world) for other in range(world)]
    positives = [items[valid].numpy() for _, items, _, valid in by_rank]
    columns = softmax_columns(positives, rank)
    first_N = [items.tolist().index(item) for item in columns.given_S]
    item_GD = gather_with_gradient(item_ND.float()[first_N], rows_per_rank=columns.received_per_rank)
    target_B = torch.zeros(len(users), dtype=torch.int64)  # of a row that is padding any column
    target_B[valid] = torch.from_numpy(columns.column_B)
    return in_batch_softmax(user_ND.float() @ item_GD.T, target_B, log_q_G=LOG_Q[columns.row_G],
                            count_G=torch.from_numpy(columns.count_G), weight_B=weights)[0]


def distributed_steps(engine, table, first, last):
    losses = []
    for step in range(first, last):
        loss = distributed_loss(engine, table, step)
        engine.backward(loss)
        assert step % 10 or engine.is_gradient_finite()
        assert engine.step()
        table.after_backward()
        losses.append(loss.detach())
    # The workers' losses are scaled so that their mean is the global batch's.
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).tolist()


def plain_steps(spec, tables, last):
    """The same training in one process, written without anything of ours but the parameter groups."""
    towers = fresh()
    tables = {name: weight.clone().requires_grad_() for name, weight in tables.items()}
    momentum = {name: torch.zeros(len(weight)) for name, weight in tables.items()}
    groups = parameter_groups(towers, spec.weight_decay)
    kind = torch.optim.AdamW if spec.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(groups, lr=spec.learning_rate)
    losses = []
    for step in range(last):
        users, items, weights = global_batch(step)
        user_BD, item_BD = towers({"user": tables["user"][users], "item": tables["item"][items]})
        logits = user_BD @ item_BD.T - LOG_Q[items]
        same = (items[:, None] == items) & ~torch.eye(len(items), dtype=torch.bool)
        row_loss = F.cross_entropy(logits.masked_fill(same, -1e30), torch.arange(len(items)), reduction="none")
        loss = (weights * row_loss).sum() / weights.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(towers.parameters(), spec.gradient_clip_norm or float("inf")).item()
        optimizer.step()
        optimizer.zero_grad()
        for name, weight in tables.items():
            with torch.no_grad():
                if spec.optimizer == "sgd":
                    weight -= TABLE_RATES["sgd"] * weight.grad
                else:
                    momentum[name] += weight.grad.square().mean(dim=1)
                    scale = TABLE_RATES["rowwise_adagrad"] / (momentum[name].sqrt() + 1e-8)
                    weight -= scale[:, None] * weight.grad
            weight.grad = None
        losses.append(loss.item())
    weights = {f"parameter/{name}": value.detach() for name, value in towers.named_parameters()}
    return losses, weights, {name: weight.detach() for name, weight in tables.items()}, norm


def furthest(left, right):
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def spec_of(name, stage, precision="fp32"):
    return EngineSpec(**{**vars(SPECS[name]), "zero_stage": stage, "precision": precision})


def parity(name, stage):
    """Furthest distance to the plain process in loss, towers, tables and gradient norm."""
    spec = spec_of(name, stage)
    tables = RealTables(spec.optimizer)
    initial = tables.whole()
    with DenseEngine(fresh(), spec, device="cpu") as engine:
        losses = distributed_steps(engine, tables, 0, STEPS)
        tensors, _ = gather_dense(engine)
        norm = engine.gradient_norm()
    final = tables.whole()
    if dist.get_rank() > 0:
        return None
    plain_losses, plain_weights, plain_tables, plain_norm = plain_steps(spec, initial, STEPS)
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)),
        "learned": plain_losses[0] - plain_losses[-1],
        "weights": furthest({n: t for n, t in tensors.items() if n in plain_weights}, plain_weights),
        "tables": furthest(final, plain_tables),
        "norm": abs(norm - plain_norm),
    }


def unbroken(folder, stage, precision):
    """Trains ten steps with a save in the middle and one at the end."""
    table = PlainTables()
    with DenseEngine(fresh(), spec_of("adamw", stage, precision), device="cpu") as engine:
        engine.module.seen += 7
        distributed_steps(engine, table, 0, SAVE_AT)
        save_dense(engine, folder / "middle", {"step": SAVE_AT})
        middle = table.weight.detach().clone()
        losses = distributed_steps(engine, table, SAVE_AT, SAVE_END)
        save_dense(engine, folder / "end", {"step": SAVE_END})
    if dist.get_rank() == 0:
        torch.save({"table": middle, "losses": losses}, folder / "test-only.pt")
    dist.barrier()


def resumed(folder, stage, precision):
    """Continues from the middle: how far it ends from the unbroken run, and how far it began from what was saved."""
    kept = torch.load(folder / "test-only.pt", weights_only=True)
    towers = fresh(seed=99)
    load_dense_parameters(towers, folder / "middle")
    with DenseEngine(towers, spec_of("adamw", stage, precision), device="cpu") as engine:
        counters = load_dense_optimizer(engine, folder / "middle")
        assert counters == {"step": SAVE_AT}
        save_dense(engine, folder / f"again-{stage}", counters)
        losses = distributed_steps(engine, PlainTables(kept["table"]), SAVE_AT, SAVE_END)
        tensors, optimizer_step = gather_dense(engine)
    assert optimizer_step == SAVE_END
    if dist.get_rank() > 0:
        return None
    from safetensors.torch import load_file

    assert tensors["buffer/seen"].tolist() == [7, 7]
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, kept["losses"], strict=True)),
        "state": furthest(tensors, load_file(folder / "end" / "dense.safetensors")),
        "loaded": furthest(
            load_file(folder / f"again-{stage}" / "dense.safetensors"),
            load_file(folder / "middle" / "dense.safetensors"),
        ),
    }


def resumed_everywhere(folder, moves, bf16_stages):
    """From each stage to those as many stages on as `moves` names, around; in bf16 each to itself."""
    pairs = [(written, (written + move) % 4, "fp32") for written in STAGES for move in moves]
    pairs += [(stage, stage, "bf16") for stage in bf16_stages]
    return {pair: resumed(folder / f"{pair[0]}-{pair[2]}", *pair[1:]) for pair in pairs}


def not_finite(stage):
    """Only the last rank's loss is broken: (finite before, step taken, weights moved) must agree on all ranks."""
    table = PlainTables()
    with DenseEngine(fresh(), spec_of("adamw", stage), device="cpu") as engine:
        distributed_steps(engine, table, 0, 1)
        before, _ = gather_dense(engine)
        loss = distributed_loss(engine, table, 1)
        engine.backward(loss * (float("nan") if dist.get_rank() == dist.get_world_size() - 1 else 1.0))
        finite, taken = engine.is_gradient_finite(), engine.step()
        after, _ = gather_dense(engine)
        norm = engine.gradient_norm()
    return finite, taken, furthest(before, after) if before else 0.0, norm


def saved_before_the_first_step(folder, stage):
    with DenseEngine(fresh(), spec_of("adamw", stage), device="cpu") as engine:
        save_dense(engine, folder, {})
    dist.barrier()
    towers = fresh(seed=5)
    load_dense_parameters(towers, folder)
    with DenseEngine(towers, spec_of("adamw", stage), device="cpu") as engine:
        load_dense_optimizer(engine, folder)
        tensors, step = gather_dense(engine)
    expected = {f"parameter/{name}": value.detach() for name, value in fresh().named_parameters()}
    return step, furthest({n: t for n, t in tensors.items() if n in expected}, expected) if tensors else 0.0


def learning_rate_is_obeyed(stage):
    """How far a step of SGD moves the towers at the rates 0, 1e-4 and 3e-4."""
    table = PlainTables()
    with DenseEngine(fresh(), spec_of("sgd", stage), device="cpu") as engine:
        start, _ = gather_dense(engine)
        ends = []
        for rate in (0.0, 1e-4, 3e-4):
            engine.learning_rate = rate
            assert engine.learning_rate == rate
            engine.backward(distributed_loss(engine, table, 0))
            engine.step()
            ends.append(gather_dense(engine)[0])
    return (furthest(start, ends[0]), furthest(ends[0], ends[1]), furthest(ends[1], ends[2])) if start else None


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def engines_one_after_another(rounds=12):
    """Growth of memory (MiB), tensors, threads and process groups over eight engines of 9 MiB, after four."""
    from torch.distributed import distributed_c10d

    sizes = []
    for number in range(rounds):
        module = nn.Sequential(nn.Linear(512, 768), nn.GELU(), nn.Linear(768, 512))
        spec = EngineSpec(zero_stage=number % 4)
        with DenseEngine(module, spec, device="cpu") as engine:
            for _ in range(2):
                engine.backward(engine(torch.randn(4, 512)).square().mean())
                engine.step()
        del module, engine
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        sizes.append((resident_mib(), tensors, threading.active_count(), len(distributed_c10d._world.pg_map)))
    return [last - warm for last, warm in zip(sizes[-1], sizes[3], strict=True)]


def collective_checks():
    """gather_with_gradient by itself: rows in rank order, gradient summed over ranks, wrong counts refused."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for rows in ([2] * world, list(range(world)), [0] * world):
        x = (torch.arange(rows[rank] * 3).reshape(-1, 3).float() + 100 * rank).requires_grad_()
        gathered = gather_with_gradient(x, rows_per_rank=rows)
        (gathered.sum(dim=1) @ torch.arange(1.0, len(gathered) + 1) * (rank + 1)).backward()
        start = sum(rows[:rank])
        row = torch.arange(start + 1.0, start + rows[rank] + 1)[:, None].expand(-1, 3)
        expected = torch.cat([torch.arange(n * 3).reshape(-1, 3).float() + 100 * r for r, n in enumerate(rows)])
        found += [torch.equal(gathered, expected), torch.equal(x.grad, row * sum(range(1, world + 1)))]
    try:
        gather_with_gradient(torch.zeros(3, 1), rows_per_rank=[2] * world)
    except ValueError as error:
        found.append("holds 3 rows" in str(error))
    return found


def ready():
    """Imports what is imported late anyway, and takes it out of the garbage collector's sight: closing an engine
    collects, which with all those modules takes 0.7 s and would be a third of the time here."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import torchrec  # noqa: F401

    gc.collect()
    gc.freeze()


def on_two_ranks(rank, world_size, folder):
    ready()
    found = {"collectives": collective_checks()}
    cases = [(name, stage) for name in ("sgd", "adamw-clipped") for stage in STAGES]
    cases += [("sgd-clipped", 0), ("sgd-clipped", 3), ("adamw", 1)]
    found["parity"] = {case: parity(*case) for case in cases}
    for stage in STAGES:
        unbroken(folder / f"{stage}-fp32", stage, "fp32")
        if stage > 0:
            unbroken(folder / f"{stage}-bf16", stage, "bf16")
    found["resumed"] = resumed_everywhere(folder, moves=(0, 1), bf16_stages=(1, 2, 3))
    found["not_finite"] = [not_finite(stage) for stage in STAGES]
    found["unstepped"] = [saved_before_the_first_step(folder / f"unstepped-{stage}", stage) for stage in STAGES]
    found["rates"] = [learning_rate_is_obeyed(stage) for stage in STAGES]
    found["growth"] = engines_one_after_another()
    found["compiled"] = "deepspeed_shm_comm" in sys.modules
    return found


def on_four_ranks(rank, world_size, folder):
    ready()
    found = {"collectives": collective_checks()}
    cases = [("sgd", 0), ("sgd", 3), ("sgd-clipped", 2), ("adamw-clipped", 1)]
    found["parity"] = {case: parity(*case) for case in cases}
    found["resumed"] = resumed_everywhere(folder, moves=(0, 2), bf16_stages=(2, 3))
    return found


def on_one_rank(rank, world_size, folder):
    return {"collectives": collective_checks(), "resumed": resumed_everywhere(folder, moves=(3,), bf16_stages=(1,))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder):
    return run_ranks(2, on_two_ranks, folder, timeout_s=240)


@pytest.fixture(scope="module")
def four(folder, two):
    return run_ranks(4, on_four_ranks, folder, timeout_s=240)


@pytest.fixture(scope="module")
def one(folder, two):
    return run_ranks(1, on_one_rank, folder, timeout_s=240)


def test_gather_is_in_rank_order_and_its_gradient_a_sum(one, two, four):
    for results in (one, two, four):
        assert all(all(result["collectives"]) for result in results)


def test_parity_with_one_plain_process(two, four):
    for results in (two, four):
        for (name, stage), far in results[0]["parity"].items():
            weights = 5e-5 if name.endswith("clipped") else 1e-5
            assert far["learned"] > 0.1, f"{name} at stage {stage} did not train: {far}"
            assert far["loss"] < 5e-6 and far["norm"] < 1e-5, f"{name} at stage {stage}: {far}"
            assert far["weights"] < weights and far["tables"] < weights, f"{name} at stage {stage}: {far}"


def test_resumed_on_the_same_ranks_is_bit_equal(two):
    for (written, read, precision), far in two[0]["resumed"].items():
        assert far["loaded"] == 0.0
        if written == read:
            assert far["loss"] == far["state"] == 0.0, f"stage {written} {precision}: {far}"
        else:
            assert far["loss"] < 1e-6 and far["state"] < 1e-6, f"stage {written} to {read}: {far}"


def test_resumed_on_other_ranks(one, four):
    for results in (one, four):
        for (written, read, precision), far in results[0]["resumed"].items():
            assert far["loaded"] == 0.0
            bound = 1e-6 if precision == "fp32" else 2e-2
            assert far["loss"] < bound and far["state"] < bound, f"stage {written} to {read} {precision}: {far}"


def test_a_checkpoint_is_two_files_without_pickle(folder, two):
    for path in (folder / "3-fp32" / "middle", folder / "0-fp32" / "end"):
        assert sorted(file.name for file in path.iterdir()) == ["dense.json", "dense.safetensors"]


def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_step(two):
    for result in two:
        for finite, taken, moved, norm in result["not_finite"]:
            assert (finite, taken, moved) == (False, False, 0.0)
            assert not norm < float("inf")


def test_a_checkpoint_before_the_first_step(two):
    assert [result["unstepped"] for result in two] == [[(0, 0.0)] * 4] * 2


def test_the_learning_rate_is_obeyed_at_every_stage(two):
    for stopped, slow, fast in two[0]["rates"]:
        assert stopped == 0.0 and slow > 0.0
        assert fast == pytest.approx(3 * slow, rel=0.02)


def test_engines_one_after_another_do_not_pile_up(two):
    for result in two:
        memory_mib, tensors, threads, groups = result["growth"]
        # One that is left by each of eight engines would be eight tensors; a few are now and then in a thread's hands.
        assert memory_mib < 36 and tensors < 8 and threads <= 0 and groups == 0, result["growth"]


def test_nothing_was_compiled(two):
    assert not any(result["compiled"] for result in two)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precision": "fp16"}, "fp16"),
        ({"precision": "bf16", "zero_stage": 0}, "zero_stage"),
        ({"zero_stage": 4}, "zero_stage is 4"),
        ({"optimizer": "adam"}, "adamw or sgd"),
        ({"gradient_clip_norm": 0.0}, "null"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "weight_decay"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(change, told):
    with pytest.raises(InputError, match=told):
        EngineSpec(**change)


def damage_json(folder):
    (folder / "dense.json").write_text("{")


def empty_json(folder):
    (folder / "dense.json").write_text("[]")


def newer_format(folder):
    path = folder / "dense.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


def cut_tensors(folder):
    path = folder / "dense.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def no_tensors(folder):
    (folder / "dense.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (damage_json, "dense.json is damaged"),
        (empty_json, "dense.json is damaged"),
        (newer_format, "has the format 2"),
        (cut_tensors, "dense.safetensors is missing or damaged"),
        (no_tensors, "dense.safetensors is missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(folder, two, tmp_path, harm, told):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "0-fp32" / "end", copy)
    harm(copy)
    with pytest.raises(InputError, match=told):
        load_dense_parameters(fresh(), copy)


def test_other_towers_are_refused_by_name(folder, two, tmp_path):
    towers = fresh()
    towers.user[0] = nn.Linear(WIDTH, 14)
    with pytest.raises(InputError, match="user.0.weight has the shape"):
        load_dense_parameters(towers, folder / "0-fp32" / "end")
    towers.extra = nn.Linear(2, 2)
    with pytest.raises(InputError, match="extra.bias"):
        load_dense_parameters(towers, folder / "0-fp32" / "end")
    with pytest.raises(InputError, match="is this the folder of a checkpoint"):
        load_dense_parameters(fresh(), tmp_path)
