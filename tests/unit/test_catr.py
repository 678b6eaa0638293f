"""CATR's equations against plain numpy, its ablations, and what must not depend on how requests are packed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_views import made_catalogue

from configs.schema import RouterConfig, RouterModelConfig
from trainer.batches import ItemFeatures
from trainer.catr import (
    EPSILON,
    CatrModel,
    Targets,
    bounded_correction,
    calibration_loss,
    diversity_loss,
    listwise_loss,
    value_loss,
)
from trainer.crm import FeatureSizes, table_specs
from trainer.router_data import FeatureScales, RouterBatch

ITEMS, TRIGGER_FEATURES, LIST_FEATURES, CHANNELS = 12, 4, 3, 2
SMALL = {"dim": 8, "hidden": 6, "history": 5, "heads": 2, "dropout": 0.0, "tables": {"dim": 4}}


def made_batch(triggers, views, seed=0, weight=None):
    """A batch of requests with these many triggers and views each, drawn at random."""
    rng = np.random.default_rng(seed)
    triggers, views = np.asarray(triggers), np.asarray(views)
    total, widest = int(triggers.sum()), int(triggers.max())
    most = max(1, int(views.max()))
    request_T, request_V = (np.repeat(np.arange(len(n)), n) for n in (triggers, views))
    within_T, within_V = (np.concatenate([np.arange(k) for k in n] + [np.zeros(0, int)]) for n in (triggers, views))
    features = ItemFeatures(made_catalogue(ITEMS), np.zeros(ITEMS, np.float32))
    trigger_TF = rng.normal(size=(total, TRIGGER_FEATURES)).astype(np.float32)
    trigger_TF[rng.random(trigger_TF.shape) < 0.2] = np.nan
    weight_T = np.full(total, 1 / total if weight is None else weight, np.float32)
    arrays = {
        "user_B": np.arange(len(triggers)), "row_B": np.arange(len(triggers)), "request_T": request_T,
        "place_T": request_T * widest + within_T,
        "item_T": rng.integers(0, ITEMS, total), "trigger_TF": trigger_TF,
        "list_TCF": rng.normal(size=(total, CHANNELS, LIST_FEATURES)).astype(np.float32), "request_V": request_V,
        "place_V": request_V * most + within_V, "item_V": rng.integers(0, ITEMS, int(views.sum())),
        "watch_bucket_V": rng.integers(0, 9, int(views.sum())), "ago_V": views[request_V] - 1 - within_V,
        "intensity_TC": (rng.random((total, CHANNELS)) * 5 * (rng.random((total, CHANNELS)) < 0.5)).astype(np.float32),
        "label_TC": rng.random((total, CHANNELS)) < 0.4,
        "uniqueness_TC": rng.random((total, CHANNELS)).astype(np.float32),
        "reward_ms_TC": rng.integers(0, 9000, (total, CHANNELS)), "weight_T": weight_T,
        "weight_B": np.full(len(triggers), 1 / len(triggers), np.float32)}
    return RouterBatch(items=features.take(np.arange(ITEMS), np.arange(len(triggers))), requests=len(triggers),
                       triggers=widest, views=most, **{name: torch.from_numpy(x) for name, x in arrays.items()})


def router(batch, seed=0, config=None, **model):
    """(the router, its tables' rows with gradient)."""
    config = RouterConfig.model_validate(SMALL | (config or {}))
    rng = np.random.default_rng(5)
    lists = LIST_FEATURES if config.features == "all" else 0
    scales = FeatureScales(
        rng.normal(size=TRIGGER_FEATURES).astype(np.float32), rng.random(TRIGGER_FEATURES).astype(np.float32) + 0.5,
        rng.normal(size=(CHANNELS, lists)).astype(np.float32), np.ones((CHANNELS, lists), np.float32), (3,) * 9)
    sizes = FeatureSizes.of(made_catalogue(ITEMS))
    torch.manual_seed(seed)
    module = CatrModel(config, RouterModelConfig(name="tested", **model), sizes, scales, [5.0] * CHANNELS, 0.5)
    generator = torch.Generator().manual_seed(1)
    weights = {spec.name: torch.randn(spec.rows, spec.dim, generator=generator) for spec in table_specs(sizes, config)}
    rows = {name: weight[batch.items.features[name].values()].requires_grad_() for name, weight in weights.items()}
    return module, rows


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------------------------------------------ the equations

@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_losses_are_those_of_the_paper(seed):
    rng = np.random.default_rng(seed)
    shape = (7, 3)
    value, correction, unique = rng.random(shape), rng.normal(size=shape) * 3, rng.random(shape)
    reward_s, scale_s, cap, tau_s, eta, bound = rng.exponential(6, shape), 4.0, 2.5, 3.0, 0.4, 0.3
    rho = rng.random(shape)
    intensity = np.minimum(reward_s / scale_s, cap)  # Eq. 4
    label, diverse = reward_s >= tau_s, rho >= eta  # Eq. 5, 13
    targets = Targets(torch.tensor(intensity), torch.tensor(label), torch.tensor(diverse),
                      torch.full((3,), cap, dtype=torch.float64))

    moved = np.clip(value + bound * np.tanh(correction), EPSILON, 1 - EPSILON)  # Eq. 7
    assert bounded_correction(torch.tensor(value), torch.tensor(correction), bound).numpy() == pytest.approx(moved)
    weight = 1 + intensity
    bce = -(label * np.log(moved) + (1 - label) * np.log(1 - moved))
    assert value_loss(torch.tensor(moved), targets).numpy() == pytest.approx((weight * bce).sum(axis=1))  # Eq. 8
    gap = sigmoid(intensity) * (moved - intensity / cap) ** 2
    assert calibration_loss(torch.tensor(moved), targets).numpy() == pytest.approx(gap.sum(axis=1))  # Eq. 9
    bce = -(diverse * np.log(unique) + (1 - diverse) * np.log(1 - unique))
    assert diversity_loss(torch.tensor(unique), targets).numpy() == pytest.approx((weight * bce).sum(axis=1))  # Eq. 13


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_listwise_loss_is_a_softmax_over_each_request(triggers, seed):
    rng = np.random.default_rng(seed)
    total, widest = sum(triggers), max(triggers)
    logit, intensity = rng.normal(size=(total, 2)) * 3, rng.random((total, 2)) * (rng.random((total, 2)) < 0.5)
    request_T = np.repeat(np.arange(len(triggers)), triggers)
    place_T = request_T * widest + np.concatenate([np.arange(k) for k in triggers])
    found = listwise_loss(torch.tensor(logit), torch.tensor(intensity), torch.tensor(place_T), len(triggers), widest)
    for request in range(len(triggers)):
        s, i = logit[request_T == request], intensity[request_T == request]
        log_share = s - np.log(np.exp(s).sum(axis=0))
        wanted = sum(-(i[:, c] / i[:, c].sum() * log_share[:, c]).sum() for c in range(2) if i[:, c].sum())
        assert float(found[request]) == pytest.approx(wanted, abs=1e-9)


def test_the_whole_loss_is_the_weighted_sum_of_its_parts():
    """Eq. 14 of what the router itself says (Eq. 6, 12), the mean over triggers."""
    batch = made_batch([3, 1, 4], [2, 0, 5])
    module, rows = router(batch, config={"calibration_weight": 0.7, "diversity_weight": 0.3, "listwise_weight": 0.0})
    loss, extras = module("loss", batch, rows)
    score_TD = module("score", batch, rows).detach().double().numpy()
    value, unique = score_TD[:, :CHANNELS], score_TD[:, CHANNELS:]
    intensity, label = batch.intensity_TC.numpy(), batch.label_TC.numpy()
    diverse = batch.uniqueness_TC.numpy() >= 0.5

    def bce(p, y):
        return -np.where(y, np.log(p), np.log1p(-p))

    parts = {"value": ((1 + intensity) * bce(value, label)).sum(axis=1).mean(),
             "calibration": (sigmoid(intensity) * (value - intensity / 5) ** 2).sum(axis=1).mean(),
             "diversity": ((1 + intensity) * bce(unique, diverse)).sum(axis=1).mean()}
    assert {name: float(part) for name, part in extras.items()} == pytest.approx(parts, rel=1e-5)
    whole = parts["value"] + 0.7 * parts["calibration"] + 0.3 * parts["diversity"]
    assert loss.item() == pytest.approx(whole, rel=1e-5)


@given(st.floats(0, 1), st.floats(-50, 50), st.floats(0.01, 0.5))
def test_a_correction_stays_within_its_bound(value, logit, bound):
    moved = float(bounded_correction(torch.tensor([[value]], dtype=torch.float64),
                                     torch.tensor([[logit]], dtype=torch.float64), bound))
    assert EPSILON <= moved <= 1 - EPSILON
    assert abs(moved - np.clip(value, EPSILON, 1 - EPSILON)) <= bound + 1e-12


# ------------------------------------------------------------------------------------------------------- the ablations

def test_without_the_calibrator_the_value_is_that_of_its_heads():
    batch = made_batch([3, 2], [4, 1])
    module, rows = router(batch, calibrator=False)
    _, extras = module("loss", batch, rows)
    assert set(extras) == {"value", "diversity"}
    logit_TC, value_TC, _ = module._predict(batch, rows)
    assert torch.equal(value_TC, torch.sigmoid(logit_TC))
    assert not any("correction" in name for name, _ in module.named_parameters())


def test_without_diversity_there_is_no_uniqueness():
    batch = made_batch([3, 2], [4, 1])
    module, rows = router(batch, diversity=False)
    _, extras = module("loss", batch, rows)
    assert set(extras) == {"value", "calibration"}
    assert not module("score", batch, rows)[:, CHANNELS:].any()


def test_with_trigger_features_alone_no_list_is_read():
    batch = made_batch([3, 2], [4, 1])
    batch.list_TCF = batch.list_TCF[:, :, :0]
    module, rows = router(batch, config={"features": "trigger"})
    loss, _ = module("loss", batch, rows)
    assert torch.isfinite(loss) and module.value_heads.own is None


# ---------------------------------------------------------------------------------------------------------- gradients

@pytest.mark.parametrize("weight", [None, 0.0])
def test_every_parameter_and_every_table_has_a_gradient(weight):
    """Of weight 0, that of a worker without a request, it is zero but there: collectives wait for it."""
    batch = made_batch([3, 1, 4] if weight is None else [1], [2, 0, 5] if weight is None else [0], weight=weight)
    module, rows = router(batch, config={"listwise_weight": 0.0 if weight == 0.0 else 0.5})
    loss, _ = module("loss", batch, rows)
    loss.backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing
    moved = {name: float(p.grad.abs().max()) for name, p in module.named_parameters()}
    assert all(torch.isfinite(row.grad).all() for row in rows.values())
    if weight is None:
        assert all(change > 0 for change in moved.values()), moved
        assert all(float(row.grad.abs().max()) > 0 for row in rows.values())
    else:
        assert not any(moved.values())


# ------------------------------------------------------------------------------------------------------- the packing

@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=2, max_size=4), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_a_request_is_scored_alike_alone_and_among_others(sizes, seed):
    batch = made_batch(*zip(*sizes, strict=True), seed=seed)
    module, rows = router(batch)
    together = module("score", batch, rows).detach()
    for request in range(batch.requests):
        of_T, of_V = batch.request_T == request, batch.request_V == request
        alone = RouterBatch(**{**batch.__dict__, **{name: getattr(batch, name)[of_T] for name in (
            "item_T", "trigger_TF", "list_TCF", "intensity_TC", "label_TC", "uniqueness_TC", "weight_T")}})
        alone.request_T, alone.place_T = torch.zeros(int(of_T.sum()), dtype=torch.int64), torch.arange(int(of_T.sum()))
        for name in ("item_V", "watch_bucket_V", "ago_V"):
            setattr(alone, name, getattr(batch, name)[of_V])
        alone.request_V, alone.place_V = torch.zeros(int(of_V.sum()), dtype=torch.int64), torch.arange(int(of_V.sum()))
        alone.row_B = batch.row_B[request:request + 1]
        alone.requests, alone.triggers, alone.views = 1, int(of_T.sum()), max(1, int(of_V.sum()))
        assert torch.allclose(module("score", alone, rows), together[of_T], atol=1e-5)
