"""The config: a mistake is told with its place, what is allowed and the nearest name; a config round-trips."""

from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import reference
from configs.errors import InputError
from configs.loader import changed_keys, config_hash, load, require_logs, save_resolved, to_yaml
from configs.schema import Config

RUN_FILES = sorted(p.stem for p in Path(__file__).parents[2].glob("configs/*.yaml"))


@pytest.fixture
def run_file(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path
    return write


def mistakes(path, *overrides) -> list[str]:
    with pytest.raises(InputError) as found:
        load(path, overrides)
    lines = str(found.value).splitlines()
    return lines if len(lines) == 1 else lines[1:]


# --- what is right ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RUN_FILES)
def test_run_files_are_valid(repository, name):
    config = load(repository / "configs" / f"{name}.yaml")
    assert config.name == name
    assert config.run_dir == f"runs/{name}"


def test_the_run_files_are_there():
    assert set(RUN_FILES) >= {"smoke", "demo", "kuairand", "globo", "gpu8"}


@pytest.mark.parametrize("name", ("kuairand", "globo", "gpu8"))
def test_real_logs_are_asked_for(repository, name):
    with pytest.raises(InputError, match=r"(?s)data\.logs: missing.*data\.logs=FILE_OR_FOLDER data\.items="):
        require_logs(load(repository / "configs" / f"{name}.yaml"))
    require_logs(load(repository / "configs" / f"{name}.yaml", ["data.logs=/somewhere"]))


def test_kuairand_is_the_protocol(repository):
    config = load(repository / "configs/kuairand.yaml")
    assert config.data.target.column == "long_view"
    assert config.data.effective_view.column == "effective_view"
    assert (config.data.ordinal_time, config.data.utc_offset_h) == ("timestamp_is_ordinal", 8)
    assert (config.split.validation_start, config.split.test_start, config.split.test_end) == (
        date(2022, 5, 5), date(2022, 5, 7), date(2022, 5, 9))
    assert config.seeds == [0, 1, 2]
    assert {m.name for m in config.crm.models} >= {
        "dnn", "dnn_unconditioned", "dnn_permuted", "decision_transformer", "decision_transformer_unconditioned",
        "decision_transformer_permuted", "decision_transformer_to_go", "decision_transformer_prefix"}


def test_an_empty_file_is_the_defaults(run_file):
    assert load(run_file("")) == Config()


@pytest.mark.parametrize(("override", "path", "value"), [
    ("train.epochs=7", "train.epochs", 7),
    ("stages=[crm]", "stages", ["crm"]),
    ("train.learning_rate=1e-3", "train.learning_rate", 0.001),
    ("train.checkpoint_every_steps=null", "train.checkpoint_every_steps", None),
    ("data.synth=null", "data.synth", None),
    ("data.target.column=long_view", "data.target.column", "long_view"),
    ("data.columns.user_id=uid", "data.columns", {"user_id": "uid"}),
    ("split.test_start=2022-05-05", "split.test_start", date(2022, 5, 5)),
    ("split.test_users.share=.3", "split.test_users.share", 0.3),
    ("split.test_users=users.parquet", "split.test_users", "users.parquet"),
    ("index.search={nprobe: 64}", "index.search", {"nprobe": 64.0}),
    ("run_dir=2022", "run_dir", "2022"),
    ("run_dir=a=b", "run_dir", "a=b"),
    ("data.format= kuairand_csv ", "data.format", "kuairand_csv"),
    ("data.logs=s3://bucket/logs", "data.logs", "s3://bucket/logs"),
    ("evaluate.strategies=[null, oracle]", "evaluate.strategies", ["null", "oracle"]),
    ("gates.at_least.crm.dnn.oracle.recall@100=0.4", "gates.at_least", {"crm.dnn.oracle.recall@100": 0.4}),
    ("gates.at_least.routing.lic.budget=5.overall.recall@100=0.4", "gates.at_least",
     {"routing.lic.budget=5.overall.recall@100": 0.4}),
    ('gates.at_least."crm.dnn.oracle.ndcg@10"=1', "gates.at_least", {"crm.dnn.oracle.ndcg@10": 1.0}),
])
def test_overrides(run_file, override, path, value):
    found = load(run_file(""), [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_reach_into_lists_and_the_last_one_counts(run_file):
    config = load(run_file("crm: {publish: b, models: [{name: a, tower: dnn}, {name: b, tower: dnn}]}"), [
        "crm.models.0.condition=none", "crm.models.2.name=c", "crm.models.2.tower=decision_transformer",
        "train.epochs=2", "train.epochs=3", "crm.publish=null"])
    assert [m.name for m in config.crm.models] == ["a", "b", "c"]
    assert config.crm.models[0].condition == "none"
    assert (config.train.epochs, config.crm.published) == (3, "a")
    assert [m.name for m in load(run_file(""), ["crm.models.0.name=mlp"]).crm.models] == ["mlp", "dnn_unconditioned"]


def test_extends(run_file):
    run_file("name: base\ntrain: {epochs: 9, workers: 4}\nseeds: [1, 2]", "base.yaml")
    config = load(run_file("extends: base.yaml\ntrain: {epochs: 3}\nseeds: [5]"))
    assert (config.name, config.train.epochs, config.train.workers, config.seeds) == ("base", 3, 4, [5])
    run_file("extends: b.yaml", "a.yaml")
    assert "circle" in mistakes(run_file("extends: a.yaml", "b.yaml"))[0]


def test_a_run_folder_is_a_config_too(run_file, tmp_path):
    save_resolved(Config(name="there", run_dir="elsewhere"), tmp_path / "config.yaml")
    config = load(tmp_path)
    assert (config.name, config.run_dir) == ("there", str(tmp_path))


# --- what is wrong ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("override", "words"), [
    ("train.epoch=3", ["train.epoch: unknown key", "did you mean train.epochs?"]),
    ("trian.epochs=3", ["trian: unknown key", "did you mean train?"]),
    ("batch_rows=3", ["did you mean train.batch_rows?"]),
    ("train.epochs.x=1", ["train.epochs is a whole number"]),
    ("train.epochs=0", ["train.epochs: 0 is not allowed", "a whole number, at least 1 (passes over each"]),
    ("train.epochs=true", ["train.epochs: true is not allowed"]),
    ("train.epochs=2.5", ["train.epochs: 2.5 is not allowed"]),
    ("train.zero_stage=4", ["from 0 to 3"]),
    ("train.learning_rate=.inf", ["train.learning_rate", "a number, above 0"]),
    ("train.slices=weekly", ["daily or 1"]),
    ("train.device=gpu", ["one of auto, cpu, cuda"]),
    ("crm.models.0.tower=dn", ["one of dnn, decision_transformer", "did you mean dnn?"]),
    ("crm.models.0.name=a/b", ["crm.models.0.name", "letters, digits"]),
    ("crm.models.7.name=a", ["2 elements"]),
    ("crm.models.x.name=a", ["crm.models.0"]),
    ("crm.publish=nobody", ["crm", "publish names no model", "dnn_unconditioned"]),
    ("crm.tower.dim=33", ["crm.tower", "dim (33)", "heads (2)"]),
    ("train.workers=3", ["train", "batch_rows (64)", "63 or 66"]),
    ("data.max_bad_share=2", ["data.max_bad_share: 2", "from 0 to 1"]),
    ("data.target={}", ["data.target", "exactly one"]),
    ("split={validation_start: 2022-05-05, test_start: 2022-05-05}", ["validation_start", "before test_start"]),
    ("split.test_start=2022-13-45", ["split.test_start", "not valid YAML"]),
    ("evaluate.strategies=[oracel]", ["evaluate.strategies.0", "did you mean oracle?"]),
    ("evaluate.curve_s=[30, 10]", ["curve_s must rise"]),
    ("seeds=[1, 1]", ["seeds: a seed stands there twice"]),
    ("seeds=[-1]", ["seeds.0: -1", "from 0"]),
    ("seeds=[]", ["seeds: [] is not allowed", "not empty"]),
    ("stages=crm", ['stages: "crm" is not allowed', "a list"]),
    ("stages=[train]", ["one of ingest, crm, channels, replay, router, evaluate, report"]),
    ("gates.at_least.x=high", ["gates.at_least.x", "a number"]),
    ("data.columns=[1]", ["a mapping"]),
    ("name=[", ["name: the value '[' is not valid YAML"]),
    ("epochs", ["an override is written key=value"]),
    ("=3", ["an override is written key=value"]),
    ("train..epochs=1", ["an override is written key=value"]),
])
def test_wrong_overrides(run_file, override, words):
    lines = mistakes(run_file(""), override)
    assert len(lines) == 1
    for word in (f"override {override}: ", *words):
        assert word in lines[0]


def test_a_group_of_negatives_has_two_windows(run_file):
    assert load(run_file(""), ["crm.negative_groups=32"]).crm.negative_groups == 32
    (line,) = mistakes(run_file(""), "crm.negative_groups=33")
    assert "negative_groups (33)" in line and "at most half of the 64 windows" in line and line.endswith("32")
    assert load(run_file(""), ["crm.negative_groups=1", "train.batch_rows=1", "train.workers=1"]).train.batch_rows == 1


def test_all_mistakes_at_once_each_with_its_line(run_file):
    path = run_file("train:\n  epoch: 3\n  zero_stage: 9\n"
                    "crm:\n  models:\n    - {name: a}\n    - {nam: b, tower: dnn}\n"
                    "split: {test_users: {share: 3}}\nname: 5\n")
    lines = mistakes(path, "train.workers=none", "seed=1")
    assert len(lines) == 9
    for place, words in [(2, "train.epoch: unknown key"), (3, "train.zero_stage: 9"),
                         (6, "crm.models.0.tower: missing; it must be one of dnn"),
                         (7, "crm.models.1.name: missing"), (7, "did you mean crm.models.1.name?"),
                         (8, "split.test_users.share: 3"), (9, "name: 5 is not allowed; it must be text")]:
        assert any(line.startswith(f"{path}:{place}: ") and words in line for line in lines), (place, words)
    assert sum(line.startswith("override ") for line in lines) == 2


@pytest.mark.parametrize(("text", "words"), [
    ("train: {epochs: 1}\nname: a\ntrain: {workers: 2}", ["'train' stands there twice", "line 3", "first in line 1"]),
    ("train:\n  epochs: 1\n  epochs: 2", ["'epochs' stands there twice", "line 3"]),
    ("train: [", ["not valid YAML", "line 1"]),
    ("- 1", ["a mapping"]),
    ("1: 2", ["a key must be text"]),
    ("extends: [1]", ["extends"]),
    ("extends: nobody.yaml", ["there is no such config file"]),
    ("name: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ("crm: &a {tower: *a}", ["not valid YAML"]),
    ("split: {test_start: 2022-02-30}", ["not valid YAML"]),
])
def test_wrong_files(run_file, text, words):
    found = "\n".join(mistakes(run_file(text)))
    for word in words:
        assert word in found


def test_missing_file_names_the_nearest(run_file, tmp_path):
    run_file("", "demo.yaml")
    assert mistakes(tmp_path / "dmo.yaml") == [
        f"{tmp_path / 'dmo.yaml'}: there is no such config file; did you mean {tmp_path / 'demo.yaml'}?"]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert "UTF-8" in mistakes(tmp_path / "binary.yaml")[0]
    assert "cannot be read" in mistakes(tmp_path)[0]


# --- there and back ---------------------------------------------------------------------------------------------------

texts = st.text(max_size=12) | st.sampled_from([
    "null", "1e3", "on", "2022-05-05", "true", "<<", "~", "1_0", "- a", "#", "\x85", "a\n b", "\u2028"])
configs = st.builds(dict, name=texts, run_dir=texts.filter(bool),
                    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3, unique=True),
                    data=st.fixed_dictionaries({
                        "logs": st.none() | texts, "columns": st.dictionaries(texts, texts, max_size=2),
                        "utc_offset_h": st.floats(-14, 14), "feedback": st.lists(texts, max_size=2),
                        "synth": st.none() | st.fixed_dictionaries({"views_per_user": st.floats(1e-300, 1e300)})}),
                    split=st.fixed_dictionaries({
                        "test_start": st.none() | st.dates(),
                        "test_users": st.none() | texts | st.fixed_dictionaries({"share": st.floats(0, 1)})}),
                    gates=st.fixed_dictionaries({"at_least": st.dictionaries(texts, st.floats(-1, 1), max_size=2)}),
                    train=st.fixed_dictionaries({"slices": st.sampled_from([1, "daily"])}))


@settings(max_examples=60, deadline=timedelta(seconds=5), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=configs)
def test_the_resolved_config_round_trips(tmp_path, raw):
    config = Config.model_validate(raw)
    save_resolved(config, tmp_path / "resolved.yaml")
    again = load(tmp_path / "resolved.yaml")
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert [p.name for p in tmp_path.iterdir()] == ["resolved.yaml"]


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_files_round_trip(repository, tmp_path, name):
    config = load(repository / "configs" / f"{name}.yaml")
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == config


def test_the_hash_is_of_the_values_alone(run_file):
    a = load(run_file("name: x\ntrain: {epochs: 3, workers: 2}"))
    b = load(run_file("train: {workers: 2, epochs: 3}\nname: x"))
    assert config_hash(a) == config_hash(b) != config_hash(a.train)
    assert config_hash({"b": 1, "a": a.train}) == config_hash({"a": b.train, "b": 1})
    assert config_hash(a) != config_hash(load(run_file("name: y")))
    # A change here makes every finished run be done again.
    assert config_hash({"a": [1, 2.5, None, "ä"]})[:16] == "f91db3373ac1c502"


def test_changed_keys():
    assert changed_keys({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3, "c": 2}, "d": [1], "e": None}) == [
        "a.b: 1 -> 3"]


# --- the listing ------------------------------------------------------------------------------------------------------

def test_every_key_says_what_it_means():
    keys = list(reference.all_keys())
    assert len(keys) > 100
    assert [key.path for key in keys if not key.description] == []
    assert [key.path for key in keys if "<" in key.allowed or "typing" in key.allowed] == []


def test_times_and_sizes_have_units():
    for key in reference.all_keys():
        if key.path.endswith("_s"):
            assert "second" in key.description, key.path


def test_a_section_that_is_given_in_part_has_the_defaults_of_one_that_is_left_out():
    left_out, part = Config(), Config(router={"tables": {"sharding": "row_wise"}}, routing={"test_users": {"seed": 3}})
    assert part.router.tables.dim == left_out.router.tables.dim == 32
    assert part.routing.test_users.share == left_out.routing.test_users.share == 0.3
    shown = {key.path: key.default for key in reference.all_keys()}
    assert shown["router.tables.dim"] == "32" and shown["routing.test_users.share"] == "0.3"


def test_the_page_is_current(repository):
    page = (repository / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == reference.describe(), "run: python -m configs.reference > docs/configuration.md"
