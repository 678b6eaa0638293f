"""What a training needs of devices: towers by ZeRO stage, tables where they lie, and a traced step carried on."""

import numpy as np
import pytest

from configs.schema import Config
from embeddings.plan import PlacedTable, place_tables
from embeddings.tables import TableSpec
from trainer import step_trace
from trainer.crm import CrmModel, FeatureSizes
from trainer.sizing import DEVICES, GIB, Training, size_up, tower_bytes
from trainer.step_trace import Growth, StepTrace, trace_crm, trace_router

SIZES = FeatureSizes(item=400, author=30, tag=20, duration_buckets=33, content_dim=4, categories={"genre": 5},
                     users={"region": 7})


@pytest.mark.parametrize(("stage", "low", "adam", "expected"), [
    (0, False, True, 4 + 4 + 8 + 4), (0, False, False, 4 + 4 + 4), (1, True, True, 2 + 2 + 12 / 8 + 2),
    (2, True, True, 2 + 2 / 8 + 12 / 8 + 2), (3, True, True, 2 / 8 + 2 + 2 / 8 + 12 / 8 + 2),
    (1, False, True, 4 + 4 + 12 / 8 + 4)])
def test_towers_by_stage(stage, low, adam, expected):
    assert tower_bytes(1000, stage, low, adam, devices=8) == pytest.approx(1000 * expected)


def placed(sharding, devices, rows=1024, dim=16):
    spec = TableSpec("item", rows, dim, sharding)
    return place_tables([spec], devices=devices, per_node=8, device_type="cuda", memory_bytes=80 * GIB,
                        optimizer="rowwise_adagrad")


def test_tables_lie_where_the_planner_puts_them():
    table, = placed("row_wise", 16, rows=1000)
    assert (table.sharding, len(table.ranks), set(table.rows_per_rank)) == ("row_wise", 16, {63, 1000 - 15 * 63})
    assert table.weight_bytes(16).sum() == 1000 * 16 * 4 and table.state_bytes(16).sum() == 1000 * 4
    table, = placed("table_wise", 16)
    assert (table.sharding, table.rows_per_rank) == ("table_wise", (1024,))
    assert np.count_nonzero(table.weight_bytes(16)) == 1
    # Too small to give every device a row: whole, as in training.
    assert placed("row_wise", 16, rows=17)[0].sharding == "table_wise"
    assert PlacedTable("t", 4, 2, "table_wise", (1,), (4,), 0).state_bytes(2).tolist() == [0, 0]


def training(**changed):
    of = {"device": DEVICES["h100"], "devices": 16, "per_node": 8, "rows": 64, "zero_stage": 1, "low": True,
          "adam": True, "index_bytes": 5 * GIB, "index_on_gpu": True, "items": 1000, "vector_width": 9}
    return Training(**of | changed)


TRACE = StepTrace(parameters=1000, largest=100, saved_floats=Growth(0, 1e6, 4), saved_others=Growth(0, 1e3, 0),
                  flops=Growth(0, 1e9, 100), targets_per_row=8, ids_per_row={"item": 32}, gathered_width=9)


def test_a_table_on_one_device_serves_them_all():
    whole = size_up(training(), TRACE, placed("table_wise", 16))
    split = size_up(training(), TRACE, placed("row_wise", 16))
    rows, dim = 4 * 32, 16  # asked by one device
    elsewhere = 15 / 16
    assert split.all_to_all_bytes == pytest.approx((2 * rows * dim * 4 + rows * 8) * elsewhere)
    assert whole.all_to_all_bytes == pytest.approx((17 * rows * dim * 4 + rows * 8) * elsewhere)
    assert whole.seconds["all_to_all"] > 15 * split.seconds["all_to_all"]
    assert whole.seconds["lookup"] == pytest.approx(16 * split.seconds["lookup"])
    assert whole.seconds["towers"] == split.seconds["towers"]


def test_the_first_device_has_the_index_and_collects_the_vectors():
    sizing = size_up(training(), TRACE, placed("row_wise", 16))
    assert sizing.fullest == 0 and sizing.memory["index"] == 5 * GIB and sizing.fits
    assert sizing.epoch_end["item_vectors"] == 2 * 1000 * 9 * 4 and "activations" not in sizing.epoch_end
    logits = (4 * 8) * (64 * 8)
    assert sizing.memory["activations"] == pytest.approx(
        4 * 1e6 / 2 + 4 * 1e3 + 4 * logits + 8 * logits + 2 * 64 * 8 * 9 * 4)
    few = size_up(training(items=100), TRACE, placed("row_wise", 16))  # no more columns than the catalogue has items
    assert few.memory["activations"] == pytest.approx(
        4 * 1e6 / 2 + 4 * 1e3 + 12 * (4 * 8 * 101) + 2 * 101 * 9 * 4)
    assert few.seconds["gather"] == pytest.approx(sizing.seconds["gather"] * 101 / 512)
    assert sizing.left == pytest.approx(DEVICES["h100"].memory_bytes - sum(sizing.memory.values()))
    many = size_up(training(items=2 * 10**9), TRACE, placed("row_wise", 16))
    assert many.left == sizing.left and many.epoch_end_left < 0 and not many.fits
    alone = size_up(training(devices=1, index_on_gpu=False), TRACE, placed("table_wise", 1))
    assert alone.memory["index"] == 0
    assert [alone.seconds[name] for name in ("all_to_all", "gather", "all_reduce", "latency")] == [0, 0, 0, 0]


@pytest.mark.parametrize(("groups", "on_a_device", "from_others"), [
    (1, 1, 15 / 16), (4, 1, 3 / 4), (16, 1, 0), (32, 2, 0), (6, 3, 7 / 8)])
def test_groups_of_negatives_take_less_room_and_time(groups, on_a_device, from_others):
    """Device 0 of 16 has rows 0, 16, 32, .. of the batch, and so those groups that have one of these."""
    assert len({row % groups for row in range(0, 16 * 96, 16)}) == on_a_device
    whole = size_up(training(items=10**7), TRACE, placed("row_wise", 16))
    sizing = size_up(training(items=10**7, negative_groups=groups), TRACE, placed("row_wise", 16))
    targets, logits = 64 * 8, (4 * 8) * (64 * 8 / groups)
    assert whole.memory["activations"] - sizing.memory["activations"] == pytest.approx(
        12 * (4 * 8 * targets - logits) + 2 * targets * (1 - on_a_device / groups) * 9 * 4)
    assert sizing.seconds["gather"] * 15 / 16 == pytest.approx(
        whole.seconds["gather"] * from_others * on_a_device / groups)
    assert sizing.seconds["softmax"] == pytest.approx(whole.seconds["softmax"] / groups)


@pytest.mark.parametrize("kind", ["dnn", "decision_transformer", "router"])
def test_a_trace_of_a_few_rows_holds_for_more(kind, monkeypatch):
    config = Config.model_validate({
        "crm": {"models": [{"name": "m", "tower": kind if kind != "router" else "dnn"}], "tables": {"dim": 8},
                "tower": {"dim": 8, "hidden": 16, "history": 8}},
        "router": {"dim": 8, "hidden": 8, "history": 4, "tables": {"dim": 8}},
        "replay": {"requests": {"triggers": 6}}})

    def traced():
        if kind == "router":
            return trace_router(config, config.router.models[0], SIZES, 2.0, on_gpu=True)
        return trace_crm(config, config.crm.models[0], SIZES, 2.0, on_gpu=True)

    few = traced()
    monkeypatch.setattr(step_trace, "ROWS", (6, 7, 8))
    more = traced()
    rows = 40
    logits = (few.targets_per_row * rows) ** 2
    for low in (False, True):
        assert few.saved_bytes(rows, logits, low) == pytest.approx(more.saved_bytes(rows, logits, low), rel=0.01)
    assert few.flops.of(rows, logits) == pytest.approx(more.flops.of(rows, logits), rel=0.01)
    assert few.saved_bytes(rows, logits, True) < few.saved_bytes(rows, logits, False)
    if kind == "router":
        assert few.saved_floats.per_logit == few.flops.per_logit == 0 and few.ids_per_row["tag"] == 20
    else:
        module = CrmModel(config.crm, config.crm.models[0], SIZES)
        assert few.parameters == sum(parameter.numel() for parameter in module.parameters())
        # Forward, and two products backward: 2 D operations a logit each.
        assert few.flops.per_logit == pytest.approx(6 * 8)
        assert few.ids_per_row == {"item": 9, "author": 9, "tag": 18, "category_genre": 9, "user_region": 1}
