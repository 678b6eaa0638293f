import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_replay import NAMES
from made_routing import AT, ROUTERS, made_routing_run, routing_config, write_scores

from configs.errors import InputError, WatchtowerError
from embeddings.snapshots import publish, read_manifest
from launch.routing import SerialExecutor, choose_overlap, evaluate_routing
from trainer.metrics import paired_ci, paired_cis
from trainer.report import results_table, write_report
from trainer.results import value_at, write_metrics
from trainer.routing import NONE, top_picks
from trainer.routing_evaluation import (
    OVERLAPS,
    VALIDATION,
    RouterScores,
    Run,
    band_names,
    chosen_overlap,
    validation_recall,
)
from trainer.routing_results import in_words
from trainer.triggers import is_routing_test_user, is_validation_user


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = made_routing_run(tmp_path_factory.mktemp("routing") / "run", 3)
    evaluate_routing(routing_config(folder), folder, SerialExecutor())
    return folder


@pytest.fixture(scope="module")
def metrics(folder):
    return {"routing": json.loads((folder / "evaluation" / "routing" / "metrics.json").read_text())}


def naive_recall(block, r, orders, budget, k, wanted):
    """Recall of one request with sets; orders are each channel's triggers, the best first."""
    begin, union = block.table.requests.trigger_offset_R1[r], set()
    for c, order in enumerate(orders):
        ranked = []
        for place in range(block.list_TCL.shape[2]):
            for t in order[:budget]:
                item = int(block.list_TCL[begin + t, c, place])
                if item and item not in ranked:
                    ranked.append(item)
        union |= set(ranked[:k])
    return len(union & wanted) / len(wanted)


def by_score(score_N):
    return sorted(range(len(score_N)), key=lambda t: (-score_N[t], t))


def test_recall_equals_sets(folder, metrics):
    """`recent` and a router, from the published scores and lists alone."""
    run = Run(routing_config(folder), folder)
    rows = pq.read_table(folder / "evaluation/routing/capts/seed=1/scores.parquet").to_pandas()
    recent, router = {1: [], 10: []}, {1: [], 10: []}
    for number in range(run.store.shards):
        shard = run.store.open(number)
        for part, block in run.blocks(number, run.requests(number, "test"), "test"):
            for r in range(len(part)):
                views = [e for e in range(part.history_end_R[r], part.future_end_R[r]) if shard.watch_time_s_E[e] >= 2]
                wanted = {int(shard.item_row_E[e]) for e in views[:run.config.replay.window]}
                mine = rows[rows.request_id == part.request_id_R[r]].sort_values("position")
                score_NC = np.stack(mine.value).astype(float) + 0.1 * np.stack(mine.uniqueness).astype(float)
                for k in (1, 10):
                    recent[k].append(naive_recall(block, r, [range(len(mine))] * len(NAMES), 2, k, wanted))
                    router[k].append(naive_recall(block, r, [by_score(s) for s in score_NC.T], 2, k, wanted))
    for k in (1, 10):
        np.testing.assert_allclose(value_at(metrics, f"routing.recent.budget=2.overall.recall@{k}"), np.mean(recent[k]),
                                   rtol=1e-6)
        own = metrics["routing"]["capts"]["budget=2"]["overall"][f"recall@{k}"]
        np.testing.assert_allclose(own["per_seed"]["1"], np.mean(router[k]), rtol=1e-6)
        assert own["n"] == len(router[k]) and own["ci95"][0] <= own["mean"] <= own["ci95"][1]


def test_shards_change_nothing(metrics, tmp_path):
    other = made_routing_run(tmp_path / "run", 1)
    evaluate_routing(routing_config(other), other, SerialExecutor())
    again = {"routing": json.loads((other / "evaluation" / "routing" / "metrics.json").read_text())}
    names = [name for name, value in metrics["routing"].items() if isinstance(value, dict) and "budget=2" in value]
    assert {"recent", "random", "popular", "oracle", "pdn", "lic", "capts", "capts-joint"} <= set(names)
    for name in names:
        for k in [*AT, "all"]:
            path = f"routing.{name}.budget=4.overall.recall@{k}"
            assert value_at(metrics, path) == pytest.approx(value_at(again, path), rel=1e-6), path


def test_structure_and_order(metrics):
    routing = metrics["routing"]
    overall = routing["capts"]["budget=4"]["overall"]
    for k in [*AT, "all"]:
        assert {f"recall@{k}", f"gain_over_recent@{k}", f"gain_over_past-replay@{k}",
                f"gain_over_best_baseline@{k}"} <= set(overall)
        assert {f"recall@{k}", f"uniq@{k}"} <= set(routing["capts"]["budget=4"]["swing"])
    values = [overall[f"recall@{k}"]["mean"] for k in [*AT, "all"]]
    assert values == sorted(values)
    uncut = [routing["oracle"][f"budget={b}"]["overall"]["recall@all"]["mean"] for b in (2, 4)]
    assert uncut[0] <= uncut[1]
    bands = [overall[f"recall_from.{band}"]["mean"] for band in band_names(9)]
    assert sum(bands) == pytest.approx(overall["recall@all"]["mean"], rel=1e-5)
    assert set(overall["window=3"]) == {"recall@10", "recall@all"}
    assert overall["window=12"]["recall@all"] == overall["recall@all"]
    assert routing["tag-top"] == {"absent": "the catalogue has no tags"}
    assert routing["recent"]["budget=2"]["overall"]["trigger_overlap"]["mean"] == 1.0
    assert "gain_over_recent@1" not in routing["recent"]["budget=2"]["overall"]
    assert 0 < value_at(metrics, "routing.capts-joint.budget=2.swing.recall@3") <= 1
    assert routing["checks"]["over_past_replay_all"]["ok"] in (True, False)
    assert "absent" in routing["checks"]["over_recent_50"]


def test_unions_are_counted_and_cut_to_the_same_length(folder, metrics):
    for name, value in metrics["routing"].items():
        if not isinstance(value, dict) or "budget=2" not in value:
            continue
        own, recent = value["budget=2"]["overall"], metrics["routing"]["recent"]["budget=2"]["overall"]
        for k in ("1", "3", "10", "all"):
            cut, plain = own[f"recall_equal_length@{k}"]["mean"], own[f"recall@{k}"]["mean"]
            assert cut <= plain + 1e-6
            assert own[f"recent_equal_length@{k}"]["mean"] <= recent[f"recall@{k}"]["mean"] + 1e-6
            if name == "recent":
                assert cut == pytest.approx(plain) and f"gain_over_recent_equal_length@{k}" not in own
            else:
                gain = cut / own[f"recent_equal_length@{k}"]["mean"] - 1
                assert own[f"gain_over_recent_equal_length@{k}"]["mean"] == pytest.approx(gain, abs=1e-5)
        if name == "popular":  # as long as the union of recent
            assert own["union@10"] == recent["union@10"] | {"per_seed": own["union@10"]["per_seed"]}
            assert own["recall_equal_length@10"]["mean"] == pytest.approx(own["recall@10"]["mean"])


def test_union_of_a_router_equals_sets(folder):
    run, rows = Run(routing_config(folder), folder), pq.read_table(folder / "routing/capts.parquet").to_pandas()
    wanted = []
    for number in range(run.store.shards):
        for part, block in run.blocks(number, run.requests(number, "test"), "test"):
            ids = run.store.vocabulary.ids_of(part.trigger_row_T).tolist()
            row_of = dict(zip(ids, part.trigger_row_T, strict=True))
            for r in range(len(part)):
                first, at = part.trigger_offset_R1[r], {}
                for t in range(first, part.trigger_offset_R1[r + 1]):
                    at[int(part.trigger_row_T[t])] = t
                mine = rows[(rows.request_id == part.request_id_R[r]) & (rows["rank"] <= 2)]
                union = set()
                for channel, item in zip(mine.channel, mine.trigger_item_id, strict=True):
                    union |= {int(i) for i in block.list_TCL[at[int(row_of[item])], NAMES.index(channel)] if i}
                wanted.append(len(union))
    told = json.loads((folder / "evaluation" / "routing" / "metrics.json").read_text())["capts"]["budget=2"]["overall"]
    assert told["union@all"]["per_seed"]["0"] == pytest.approx(np.mean(wanted))


def plain_validation_recall(run, shard, part, block, r, scores, number):
    """The mean over seeds, budgets and K of one request's recall under the paper's own rule, from scores and lists."""
    views = [e for e in range(part.history_end_R[r], part.future_end_R[r]) if shard.watch_time_s_E[e] >= 2]
    wanted = {int(shard.item_row_E[e]) for e in views[:run.config.replay.window]}
    found = []
    for one in scores:
        score_TC = one.matrices(one.of(number), part)[1]
        score_NC = score_TC[part.trigger_offset_R1[r]:part.trigger_offset_R1[r + 1]]
        orders = [by_score(score_N) for score_N in score_NC.T]
        found += [naive_recall(block, r, orders, budget, k, wanted) for budget in (2, 4) for k in AT]
    return np.mean(found)


def test_the_overlap_is_chosen_on_validation_requests_alone(folder, metrics):
    config = routing_config(folder, overlap=None)
    run = Run(config, folder)
    hidden = [folder / f"evaluation/routing/capts/seed={seed}/scores.parquet" for seed in (0, 1)]
    for path in hidden:
        path.rename(path.with_suffix(".hidden"))
    try:
        choice = choose_overlap(run, SerialExecutor())
    finally:
        for path in hidden:
            path.with_suffix(".hidden").rename(path)
    assert choice["from"] == "validation requests" and choice["requests"] > 3
    assert list(choice["recall"]) == [f"{overlap:g}" for overlap in OVERLAPS]
    scores = [RouterScores.open(run, "capts", seed, True, VALIDATION) for seed in (0, 1)]
    told, wanted, users = [validation_recall(run, number, scores) for number in range(run.store.shards)], [], []
    for number in range(run.store.shards):
        asked = run.requests(number, "train")
        asked = asked.take(is_validation_user(asked.user_id_R, config))
        shard = run.store.open(number)
        for part, block in run.blocks(number, asked, "train"):
            for r in range(len(part)):
                wanted.append(plain_validation_recall(run, shard, part, block, r, scores, number))
                users.append(int(part.user_id_R[r]))
    np.testing.assert_allclose(np.concatenate([recall_OR for recall_OR, _ in told], axis=1)[0], wanted, rtol=1e-6)
    assert np.concatenate([user_R for _, user_R in told]).tolist() == users
    assert not is_routing_test_user(np.array(users), config).any()
    assert choice["recall"]["0"] == pytest.approx(np.mean(wanted)) and choice["users"] == len(set(users))
    with pytest.raises(InputError, match="validation.parquet: no scores of the router"):
        RouterScores.open(run, "capts", 7, True, VALIDATION)


def repeated_share(folder, name):
    """Of the value of the lists that the published picks bring, what a pick of the same channel before them brought:
    the mean over picks."""
    run, rows = Run(routing_config(folder), folder), pq.read_table(folder / f"routing/{name}.parquet").to_pandas()
    shares = []
    for number in range(run.store.shards):
        for part, block in run.blocks(number, run.requests(number, "test"), "test"):
            ids = run.store.vocabulary.ids_of(part.trigger_row_T)
            for r in range(len(part)):
                begin, end = part.trigger_offset_R1[r:r + 2]
                at = dict(zip(ids[begin:end].tolist(), range(begin, end), strict=True))
                mine = rows[(rows.request_id == part.request_id_R[r])].sort_values("rank")
                for channel, picks in mine.groupby("channel", observed=True):
                    c, held = NAMES.index(channel), set()
                    for item in picks.trigger_item_id:
                        list_L, value_L = block.list_TCL[at[item], c], block.value_TCL[at[item], c]
                        total = value_L[list_L > 0].sum()
                        again = sum(value for i, value in zip(list_L, value_L, strict=True) if i in held)
                        shares.append(again / total if total > 0 else 0.0)
                        held |= set(list_L[list_L > 0].tolist())
    return np.mean(shares)


def test_an_overlap_changes_the_picks_of_routers_alone(folder, metrics):
    evaluate_routing(routing_config(folder, overlap=0.5), folder, SerialExecutor())
    spread = json.loads((folder / "evaluation" / "routing" / "metrics.json").read_text())
    serving = json.loads((folder / "routing" / "serving.json").read_text())
    after = [repeated_share(folder, name) for name in (*ROUTERS, "pdn")]
    evaluate_routing(routing_config(folder), folder, SerialExecutor())
    before = [repeated_share(folder, name) for name in (*ROUTERS, "pdn")]
    assert json.loads((folder / "evaluation" / "routing" / "metrics.json").read_text()) == metrics["routing"]
    assert spread["overlap"] == {"value": 0.5, "from": "config"} and serving["overlap"] == 0.5
    for name in ("recent", "pdn", "oracle", "capts-joint"):
        assert spread[name]["budget=2"]["overall"]["recall@all"] == metrics["routing"][name]["budget=2"]["overall"][
            "recall@all"]
    assert after[0] < 0.8 * before[0] and after[1] < 0.8 * before[1] and after[2] == before[2] > 0, (before, after)


def test_an_overlap_is_taken_where_it_is_surely_better():
    rng = np.random.default_rng(0)
    recall_OR, user_R = np.full((len(OVERLAPS), 400), 0.2) + rng.normal(0, 0.05, (1, 400)), np.arange(400)
    noisy = recall_OR + rng.normal(0, 0.05, recall_OR.shape)
    noisy[3] += 0.002
    assert chosen_overlap(noisy, user_R)["value"] == 0.0 and chosen_overlap(noisy, user_R)["best"] != 0.0
    noisy[3] += 0.02
    choice = chosen_overlap(noisy, user_R)
    assert choice["value"] == choice["best"] == OVERLAPS[3]
    step_R = noisy[3] - noisy[0]
    assert choice["standard_error"] == pytest.approx(step_R.std(ddof=1) / 20) and choice["users"] == 400
    nothing = chosen_overlap(np.full((len(OVERLAPS), 2), np.nan), np.arange(2))
    assert nothing == {"value": 0.0, "requests": 0, "users": 0}


def test_an_overlap_is_not_chosen_by_few_users():
    """Many requests of few users are no more than these users; and one request has no error at all."""
    rng = np.random.default_rng(1)
    recall_OU = np.full((len(OVERLAPS), 40), 0.2) + rng.normal(0, 0.05, (1, 40))
    recall_OU[3] += rng.normal(0.02, 0.05, 40)
    once, often = chosen_overlap(recall_OU, np.arange(40)), chosen_overlap(np.repeat(recall_OU, 9, axis=1),
                                                                         np.repeat(np.arange(40), 9))
    assert once["value"] == often["value"] == 0.0 < once["gain_over_0"]
    assert once["standard_error"] == pytest.approx(often["standard_error"]) and often["requests"] == 360
    surely = np.full((len(OVERLAPS), 29), 0.2)
    surely[3] += 0.1
    assert chosen_overlap(surely, np.arange(29))["value"] == 0.0
    assert chosen_overlap(surely[:, :1], np.arange(1))["value"] == 0.0
    assert chosen_overlap(np.pad(surely, ((0, 0), (0, 1)), mode="edge"), np.arange(30))["value"] == OVERLAPS[3]


def test_pick_files_hold_the_largest_budget(folder):
    run = Run(routing_config(folder), folder)
    rows = pq.read_table(folder / "routing" / "oracle.parquet")
    assert rows.column_names == ["request_id", "channel", "rank", "trigger_item_id", "score"]
    assert rows.schema.metadata[b"watchtower.budget"] == b"4"
    wanted = []
    for number in range(run.store.shards):
        for part, block in run.blocks(number, run.requests(number, "test"), "test"):
            pick_RCB = top_picks(block.reward_ms_TC, part.trigger_offset_R1, 4)
            wanted += [(int(part.request_id_R[r]), NAMES[c], b + 1,
                        int(run.store.vocabulary.ids_of(part.trigger_row_T[[t]])[0]))
                       for (r, c, b), t in np.ndenumerate(pick_RCB) if t != NONE]
    got = zip(*(rows[name].to_pylist() for name in rows.column_names[:4]), strict=True)
    assert sorted(got) == sorted(wanted)
    assert not list((folder / "routing").glob(".*"))


def test_limit_takes_the_requests_of_least_hash(folder, tmp_path, metrics):
    most = metrics["routing"]["requests"]["n"] // 2
    config = routing_config(folder, test_requests=most, selectors=["recent", "oracle"])
    assert evaluate_routing(config, folder, SerialExecutor())["rows"] == most
    evaluate_routing(routing_config(folder), folder, SerialExecutor())


def test_scores_that_do_not_fit_are_named(folder, tmp_path):
    run = Run(routing_config(folder), folder)
    table = pq.read_table(folder / "evaluation/routing/capts/seed=0/scores.parquet")
    path = folder / "evaluation/routing/capts/seed=0/scores.parquet"
    pq.write_table(table.slice(3), path)
    with pytest.raises(WatchtowerError, match="scores.parquet: damaged snapshot"):
        evaluate_routing(routing_config(folder), folder, SerialExecutor())
    manifest = read_manifest(path.parent)  # of other requests, but whole
    manifest.pop("files")
    publish(path.parent, lambda into: pq.write_table(table.slice(3), into / path.name), manifest, replace=True)
    with pytest.raises(InputError, match="train router again"):
        evaluate_routing(routing_config(folder), folder, SerialExecutor())
    write_scores(run, "capts", 0, 0)
    with pytest.raises(InputError, match="no scores of the router"):
        evaluate_routing(routing_config(folder, seeds=[0, 7]), folder, SerialExecutor())
    assert not list((folder / "routing").glob(".*"))


def test_routers_that_were_not_trained_are_absent(folder, metrics):
    config = routing_config(folder, routers=["other"], selectors=["recent", "oracle"])
    assert evaluate_routing(config, folder, SerialExecutor())["absent"].keys() == {"other"}
    (folder / "evaluation" / "routing" / "metrics.json").write_text(json.dumps(metrics["routing"]))


def test_report_and_terminal(folder, metrics):
    write_metrics(folder, metrics)
    page = write_report(folder).read_text()
    for word in ("Which triggers seed which channel", "capts-joint", "not known to us", "the catalogue has no tags",
                 "Ablations", "way to the oracle", "the paper"):
        assert word in page
    text = results_table(metrics)
    short = [c for c in metrics["routing"]["checks"].values() if c.get("ok") is False]
    assert len(text.splitlines()) <= 20 + len(short) and max(map(len, text.splitlines())) <= 120
    assert all(check["property"] in text for check in short) and "gain over recent" in text
    assert "capts-joint" in text and "absent: tag-top" in text


def test_words_of_an_interval():
    assert in_words(0.01, 0.2) == "a gain" and in_words(-0.2, -0.1) == "a loss"
    assert in_words(-0.1, 0.1).startswith("not there") and in_words(None, 1.0) == "not measured"


def test_many_paired_intervals_equal_single_ones():
    rng = np.random.default_rng(0)
    a, b, user = rng.random((3, 2, 40)), rng.random((3, 1, 40)), rng.integers(0, 9, 40)
    a[0, 0, 3] = np.nan
    many = paired_cis(a, b, user, 50, 1)
    for place in range(3):
        np.testing.assert_allclose(many[place], paired_ci(a[place], b[place], user, 50, 1))
