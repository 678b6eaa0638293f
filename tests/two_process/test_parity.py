"""Two workers (TorchRec's sharded tables, a DeepSpeed engine) against one plain-PyTorch process on the same batches.

Both walk the same global batches of the real plan and the real collation: rank r has rows r, r + 2, .. of each, the
plain process has all of them. The negatives of both ranks, logQ and the bias, conditions dropped for the global batch,
and last batches of which one rank has no row are in. One spawn runs all cases; the tests look at what it brought back.

AdamW and row-wise Adagrad hardly see a wrong factor on the loss, so every case also runs with SGD on both halves; and
`MISTAKES` are made on purpose, each of which must be seen.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_reference import PlainCrm
from spawn import run_ranks

WORLD, STEPS, SEED, BATCH_ROWS = 2, 50, 3, 8
ITEMS, AUTHORS, TAGS, CONTENT = 60, 9, 7, 5
MISTAKE_STEPS = 20

SGD = {"optimizer": "sgd", "learning_rate": 0.1, "table_optimizer": "sgd", "table_learning_rate": 0.5}
REAL = {"optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 0.01, "gradient_clip_norm": 0.5,
        "table_optimizer": "rowwise_adagrad", "table_learning_rate": 0.02}
OPTIMIZERS = {"sgd": SGD, "real": REAL}
LOSS_TOLERANCE = 5e-6
WEIGHT_TOLERANCE = 1e-5
TOWERS = ("dnn", "decision_transformer")
SHARDINGS = ("table_wise", "row_wise")
# Every stage with every sharding and every pair of optimizers; the towers take turns, so that each meets every stage.
CASES = [(TOWERS[(stage + number + (name == "real")) % 2], stage, sharding, name)
         for stage in (0, 1, 2, 3) for number, sharding in enumerate(SHARDINGS) for name in OPTIMIZERS]
# Negatives of a group: a worker's own, and three groups of which both have windows.
GROUPED = [("dnn", 0, "row_wise", "sgd", 2), ("decision_transformer", 1, "table_wise", "real", 3)]
MISTAKES = ("loss_times_ranks", "loss_is_local_mean", "own_columns_only", "columns_averaged", "tables_summed")
# The softmax does not see what is added to all columns alike: the true gradient is zero, and AdamW steps on noise.
WITHOUT_GRADIENT = ("item_tower.bias.bias",)


def made_world():
    """A small catalogue and two shards of views such that the last batch of an epoch has one row, the first rank's."""
    from trainer.windows import TargetViews, WindowRule, count_windows

    rule = WindowRule(history=10, stride=5)
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        shards = []
        for shard in range(2):
            length_U = rng.integers(1, 25, 12)
            views = int(length_U.sum())
            watch_E = rng.lognormal(2.5, 1.2, views).astype(np.float32)
            watch_E[rng.random(views) < 0.1] = np.nan
            shards.append(TargetViews(
                user_id_U=np.arange(12) + 100 * shard, offset_U=np.cumsum(length_U) - length_U, length_U=length_U,
                item_row_E=np.minimum(rng.geometric(0.06, views), ITEMS - 1).astype(np.int64), watch_s_E=watch_E,
                timestamp_ms_E=1_600_000_000_000 + np.cumsum(rng.integers(1000, 10_000_000, views)),
                ordinal_E=rng.random(views) < 0.05, trainable_U=np.ones(12, dtype=bool)))
        counts = np.array([count_windows(views, rule) for views in shards])
        if counts.sum() % BATCH_ROWS == 1:
            break
    rng = np.random.default_rng(0)
    tags_N = rng.integers(0, 4, ITEMS)
    catalogue = SimpleNamespace(
        item_id_N=np.arange(ITEMS), author_row_N=rng.integers(0, AUTHORS, ITEMS), author_rows=AUTHORS,
        tag_offsets_N1=np.concatenate([[0], np.cumsum(tags_N)]), tag_rows=rng.integers(1, TAGS, tags_N.sum()),
        tag_rows_count=TAGS, duration_bucket_N=rng.integers(0, 33, ITEMS), duration_buckets=33,
        content_NC=rng.normal(size=(ITEMS, CONTENT)).astype(np.float32), categories={}, category_rows={})
    views_N = np.bincount(np.concatenate([views.item_row_E for views in shards]), minlength=ITEMS)
    log_q_N = np.log((views_N + 1) / (views_N + 1).sum()).astype(np.float32)
    return shards, counts, rule, catalogue, log_q_N


def batches(rank, workers, steps=STEPS, negative_groups=1):
    """This worker's part of the global batches, epoch after epoch."""
    from trainer.batches import Collation, ItemFeatures
    from trainer.conditions import WatchBuckets
    from trainer.windows import EpochPlan

    shards, counts, rule, catalogue, log_q_N = made_world()
    features = ItemFeatures(catalogue, log_q_N)
    collation = Collation(kind="next", buckets=WatchBuckets(40, 1000.0), dropout=0.2, utc_offset_ms=0,
                          positions=rule.history + 1, negative_groups=negative_groups)
    made, epoch = [], 0
    while len(made) < steps:
        plan = EpochPlan(shards.__getitem__, counts, rule, batch_rows=BATCH_ROWS, seed=SEED, epoch=epoch,
                         shuffle_shards=2)
        for step, rows in enumerate(plan.batches(rank, workers)):
            made.append(collation.window_batch(features, rows, np.random.default_rng([SEED, epoch, step])))
        epoch += 1
    return made[:steps]


def towers(tower, sharding="auto", dropout=0.2):
    from configs.schema import CrmConfig, ModelConfig
    from trainer.crm import CrmModel, FeatureSizes, table_specs

    config = CrmConfig.model_validate({
        "tower": {"dim": 16, "history": 10, "layers": 2, "heads": 2, "hidden": 24, "dropout": dropout,
                  "past_path": tower == "decision_transformer"},
        "tables": {"dim": 8, "sharding": sharding, "init_std": 0.3}, "condition": {"buckets": 40, "max_s": 1000.0}})
    sizes = FeatureSizes.of(made_world()[3])
    torch.manual_seed(SEED)
    module = CrmModel(config, ModelConfig(name="tested", tower=tower), sizes)
    with torch.no_grad():  # away from zero, where the item's own bias starts
        module.item_tower.bias.weight.normal_(std=0.1)
    return module, table_specs(sizes, config)


def plain_run(tower, name, steps=STEPS, dropout=0.2, negative_groups=1):
    """Losses, tables and towers of the plain process."""
    from embeddings.tables import initial_rows

    module, specs = towers(tower, dropout=dropout)
    weights = {spec.name: torch.cat([rows for _, rows in initial_rows(SEED, spec, 0, spec.rows)]) for spec in specs}
    plain = PlainCrm(module, weights, **OPTIMIZERS[name])
    losses = []
    for step, batch in enumerate(batches(0, 1, steps, negative_groups)):
        torch.manual_seed(step)  # as the loop does it, alike on all workers: what is dropped is the same
        losses.append(plain.step(batch))
    tensors = {f"table/{table}": weight.detach().numpy() for table, weight in plain.tables.items()}
    return losses, tensors | {key: value.detach().numpy() for key, value in module.named_parameters()}


def _ranks(rank, world, cases, grouped, mistakes):
    sharded = batches(rank, world)
    found = {case: sharded_run(sharded, *case) for case in cases}
    for case in grouped:
        found[case] = sharded_run(batches(rank, world, negative_groups=case[-1]), *case[:-1])
    for mistake in mistakes:
        found[mistake] = sharded_run(sharded[:MISTAKE_STEPS], TOWERS[0], 0, "row_wise", "sgd", mistake)
    return found, [len(batch.read_R) for batch in sharded]


def sharded_run(made, tower, stage, sharding, name, mistake=None, *, device="cpu", precision="fp32", dropout=0.2):
    """Losses, tables and towers of this rank's engine and sharded tables over its parts of the batches. Collective."""
    from embeddings.tables import ShardedTables, gather_full
    from trainer import crm
    from trainer.engine import DenseEngine, EngineSpec, gather_dense
    from trainer.workers import Workers

    settings, device = dict(OPTIMIZERS[name]), torch.device(device)
    module, specs = towers(tower, sharding, dropout)
    made = [batch.to(device) for batch in made]
    tables = ShardedTables(specs, device=device, optimizer=settings.pop("table_optimizer"),
                           learning_rate=settings.pop("table_learning_rate"), seed=SEED)
    placed = {plan["sharding"] for plan in tables.plan().values()}
    assert placed == {sharding}, placed
    workers = Workers.joined(device)
    right, losses = crm.gather_with_gradient, []
    crm.gather_with_gradient = _GATHERS.get(mistake, right)
    try:
        spec = EngineSpec(zero_stage=stage, precision=precision, **settings)
        with DenseEngine(module, spec, device=device) as engine:
            upcoming = tables.begin(made[0].items.features)
            for step, (batch, following) in enumerate(zip(made, [*made[1:], None], strict=True)):
                torch.manual_seed(step)
                lookup = upcoming  # as the loop does it: the next batch's ids travel during this step
                upcoming = None if following is None else tables.begin(following.items.features)
                rows = lookup.rows()
                if mistake == "tables_summed":
                    rows = {key: _gradient_times(value, WORLD) for key, value in rows.items()}
                loss, _ = engine("loss", batch, rows)
                losses.append(workers.mean(loss))
                if mistake == "loss_times_ranks":
                    loss = loss * WORLD
                if mistake == "loss_is_local_mean" and batch.targets_per_rank[workers.rank]:
                    loss = loss * sum(batch.targets_per_rank) / (WORLD * batch.targets_per_rank[workers.rank])
                if upcoming is not None:
                    upcoming.send()
                engine.backward(loss)
                assert engine.step()
            dense, _ = gather_dense(engine)
    finally:
        crm.gather_with_gradient = right
    tensors = {f"table/{table}": weight.numpy() for table, weight in gather_full(tables).items()}
    return losses, tensors | {key.removeprefix("parameter/"): value.numpy() for key, value in dense.items()
                              if key.startswith("parameter/")}


def _gradient_times(x, factor):
    return x * factor - (x * (factor - 1)).detach()


def _own_columns_only(x_ND, *, rows_per_rank):
    """A gather that forgets what other ranks' losses ask of this rank's columns."""
    from trainer.losses import gather_with_gradient

    rank = torch.distributed.get_rank()
    parts = list(gather_with_gradient(x_ND.detach(), rows_per_rank=rows_per_rank).split(rows_per_rank))
    parts[rank] = x_ND
    return torch.cat(parts)


def _columns_averaged(x_ND, *, rows_per_rank):
    """A gather whose backward is a mean over ranks instead of a sum."""
    from trainer.losses import gather_with_gradient

    return gather_with_gradient(_gradient_times(x_ND, 1 / WORLD), rows_per_rank=rows_per_rank)


_GATHERS = {"own_columns_only": _own_columns_only, "columns_averaged": _columns_averaged}


def differences(found, expected, skipped=()):
    """The largest difference of a loss and of a weight."""
    losses, tensors = found
    expected_losses, expected_tensors = expected
    assert tensors.keys() == expected_tensors.keys()
    loss = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
    weight = max(float(np.abs(tensors[key] - value).max()) for key, value in expected_tensors.items()
                 if key not in skipped)
    return loss, weight


@pytest.fixture(scope="module")
def sharded():
    results = run_ranks(WORLD, _ranks, CASES, GROUPED, MISTAKES, timeout_s=400)
    return results[0][0], [reads for _, reads in results]


@pytest.fixture(scope="module")
def plain():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {(tower, name): plain_run(tower, name) for tower in TOWERS for name in OPTIMIZERS}
    torch.set_num_threads(threads)


def test_the_batches_are_what_they_claim(sharded):
    """Unequal shares on the two ranks, and batches of which one rank has no row; together all targets."""
    _, (first, second) = sharded
    assert any(a != b for a, b in zip(first, second, strict=True))
    assert second.count(0) >= 2 and first.count(0) == 0
    assert [a + b for a, b in zip(first, second, strict=True)] == [len(batch.read_R) for batch in batches(0, 1)]


def test_the_plain_process_learns(plain):
    for (tower, name), (losses, tensors) in plain.items():
        assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1, (tower, name)
        start = dict(towers(tower)[0].named_parameters())
        moved = {key: float(np.abs(start[key].detach().numpy() - tensors[key]).max()) for key in start}
        assert all(change > 1e-4 for key, change in moved.items() if key not in WITHOUT_GRADIENT), moved


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_workers_equal_one_plain_process(sharded, plain, case):
    tower, _, _, name = case
    loss, weight = differences(sharded[0][case], plain[tower, name], WITHOUT_GRADIENT if name == "real" else ())
    print(f"loss {loss:.1e}, weights {weight:.1e}")
    assert loss <= LOSS_TOLERANCE
    assert weight <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: "-".join(map(str, case)))
def test_negatives_of_a_group_are_the_same_on_any_number_of_workers(sharded, plain, case):
    tower, _, _, name, groups = case
    expected = plain_run(tower, name, negative_groups=groups)
    assert differences(expected, plain[tower, name])[0] > 0.1  # fewer negatives are another loss
    loss, weight = differences(sharded[0][case], expected, WITHOUT_GRADIENT if name == "real" else ())
    print(f"loss {loss:.1e}, weights {weight:.1e}")
    assert loss <= LOSS_TOLERANCE
    assert weight <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(sharded, mistake):
    """What the tolerances are worth: each of these mistakes is far outside them."""
    loss, weight = differences(sharded[0][mistake], plain_run(TOWERS[0], "sgd", MISTAKE_STEPS))
    print(f"loss {loss:.1e}, weights {weight:.1e}")
    assert loss > 20 * LOSS_TOLERANCE
    assert weight > 20 * WEIGHT_TOLERANCE
