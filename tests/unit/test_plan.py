"""`watchtower plan`: sizes from where they are known, a verdict with its exit code, JSON and picture."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from made_replay import ITEMS, made_run

from configs.errors import InputError
from launch import cli
from launch.plan import Asked, Planner, first_change, table_sizes
from trainer.sizing import DEVICES

SMALL = """
crm: {models: [{name: dnn, tower: dnn}], tower: {dim: 8, hidden: 16, history: 8}, tables: {dim: 8}}
stages: [ingest, crm]
train: {batch_rows: 64}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(SMALL + f"run_dir: '{tmp_path / 'run'}'\n")
    return str(path)


def asked(config, *overrides, device="h100", devices=8, **more):
    return Asked(config=config, overrides=overrides, devices=devices, device=DEVICES[device], per_node=min(8, devices),
                 **more)


def sizes_of(question):
    return table_sizes(question.load(), question)


def test_sizes_of_the_synthetic_world(config):
    sizes = sizes_of(asked(config))
    assert (sizes.features.item, sizes.features.author, sizes.features.content_dim) == (2001, 101, 32)
    assert set(sizes.sources.values()) == {"synthetic world"}


def test_sizes_by_number(config):
    question = asked(config, "data.logs=x", "data.synth=null", "data.user_categories=[user_id,region]",
                     "data.item_categories=[genre]", items=1000, users=500,
                     rows=(("author", 7), ("category_genre", 3)))
    sizes = sizes_of(question)
    assert (sizes.features.item, sizes.features.author, sizes.features.tag) == (1001, 8, 10_001)
    assert sizes.features.users == {"user_id": 501, "region": 101} and sizes.features.categories == {"genre": 4}
    assert sizes.sources["author"] == "given" and sizes.sources["tag"] == "assumed"
    assert sizes.sources["user_user_id"] == "given"


def test_sizes_of_a_run_folder(config, tmp_path):
    made_run(tmp_path / "run", 1)
    sizes = sizes_of(asked(config))
    assert (sizes.features.item, sizes.features.author, sizes.tags_per_item) == (ITEMS + 1, 1, 0.0)
    assert set(sizes.sources.values()) == {"run folder"}
    assert Planner().plan(asked(config)).fits
    assert sizes_of(asked(config, items=99)).features.item == 100


@pytest.mark.parametrize(("overrides", "more", "says"), [
    (["data.synth=null"], {}, "--items N"),
    (["data.synth=null", "data.user_categories=[user_id]"], {"items": 9}, "--users N"),
    ([], {"rows": (("nothing", 4),)}, "no such table; there are author, tag"),
    (["train.batch_rows=12"], {}, "must be a multiple of workers"),
    (["stages=[ingest]"], {}, "nothing to plan for")])
def test_what_is_missing_is_said(config, overrides, more, says):
    with pytest.raises(InputError, match=says):
        Planner().plan(asked(config, *overrides, **more))


def test_it_fits(config, tmp_path, capsys):
    told, drawn = tmp_path / "plan.json", tmp_path / "plan.svg"
    code = cli.main(["plan", config, "--devices", "16", "--items", "100000", "--json", str(told), "--picture",
                     str(drawn), "crm.tower.history=6"])
    shown = capsys.readouterr().out
    assert code == 0 and "it fits" in shown and "row-wise over 16" in shown
    assert max(map(len, shown.splitlines())) <= 130
    plan = json.loads(told.read_text())
    assert plan["fits"] and plan["change_first"] is None and plan["rows"]["item"] == 100_001
    assert plan["device"]["name"] == "h100" and plan["precision"] == "bf16" and plan["zero_stage"] == 1
    item = plan["parts"]["crm"]["tables"][0]
    assert (item["sharding"], item["devices"], item["most_rows_on_a_device"]) == ("row_wise", 16, 6251)
    assert item["most_gib_on_a_device"] == pytest.approx(6251 * 9 * 4 / 2**30)
    dnn = plan["parts"]["crm"]["models"]["dnn"]
    assert set(dnn["memory_gib"]) == {"tables", "table_optimizer", "towers", "activations", "lookups", "index",
                                      "runtime"}
    assert set(dnn["step_ms"]) == {"lookup", "all_to_all", "towers", "softmax", "gather", "all_reduce", "latency",
                                   "total"}
    assert dnn["left_gib"] == pytest.approx(plan["device"]["memory_gib"] - sum(dnn["memory_gib"].values()))
    picture = ElementTree.fromstring(drawn.read_text())
    assert picture.tag.endswith("svg") and "it fits" in "".join(picture.itertext())
    assert not any("href" in key for element in picture.iter() for key in element.attrib)


def test_tables_that_find_no_place(config, capsys):
    """400 million rows of 128 floats on one GPU; four times as many have room."""
    question = asked(config, "crm.tables.dim=128", "data.user_categories=[user_id]", devices=2, items=1000,
                     users=400_000_000)
    planner = Planner()
    plan = planner.plan(question)
    assert not plan.fits and "find no place on 2 worker" in plan.parts[0].no_place
    assert first_change(planner, plan) == "--devices 4"
    code = cli.main(["plan", config, "--devices", "2", "--items", "1000", "--users", "400000000", "crm.tables.dim=128",
                     "data.user_categories=[user_id]"])
    said = capsys.readouterr()
    assert code == 3 and "does not fit on 2 x h100; the first thing to change: --devices 4" in said.err


@pytest.mark.parametrize(("overrides", "items", "change"), [
    (["crm.tables.sharding=table_wise", "crm.tables.dim=128"], 200_000_000, "crm.tables.sharding=auto"),
    (["train.batch_rows=16384", "crm.tower.history=64"], 2_000_000, "train.batch_rows=4096"),
    (["crm.tower.dim=64", "index.device=cuda"], 110_000_000, "index.device=cpu")])
def test_the_first_change_is_the_nearest(config, overrides, items, change):
    planner = Planner()
    plan = planner.plan(asked(config, *overrides, items=items))
    assert not plan.fits
    assert first_change(planner, plan).startswith(change)


@pytest.mark.parametrize("words", ["--devices 0", "--devices 8 --rows author", "--devices 8 --memory 0",
                                   "--devices 8 --json /nonexistent/x.json"])
def test_wrong_arguments(config, words, capsys):
    assert cli.main(["plan", config, *words.split()]) == 2
    assert words.split()[-2] in capsys.readouterr().err
