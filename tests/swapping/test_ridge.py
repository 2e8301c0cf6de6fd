"""Streaming ridge regression against scikit-learn's, which sees all samples at once."""

import logging

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score

from anyvlm.swapping import ridge
from anyvlm.swapping.ridge import REGULARISATIONS, RidgePath, RidgeSums, fit, penalty, solve


def _samples(n=400, d=24, out=7, seed=0, noise=0.5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 3, size=d) + rng.normal(size=d)
    y = x @ rng.normal(size=(d, out)) + rng.normal(size=(n, out)) * noise + 3
    return x, y


def _sums(x, y, batch=57, weights=None) -> RidgeSums:
    sums = RidgeSums(x.shape[1], y.shape[1])
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        own = None if weights is None else torch.tensor(weights[part])
        sums.update(torch.tensor(x[part]), torch.tensor(y[part]), own)
    return sums


def _error(found, expected):
    expected = torch.as_tensor(expected)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("regularisation", [1e-6, 1e-2, 1.0, 100.0])
def test_as_scikit_learn(regularisation):
    x, y = _samples()
    sums = _sums(x, y)
    oracle = Ridge(alpha=penalty(sums, regularisation), solver="svd").fit(x, y)
    weight, bias = fit(sums, regularisation)
    assert _error(weight, oracle.coef_) < 1e-10
    assert _error(bias, oracle.intercept_) < 1e-10
    assert sums.explained_variance(weight, bias) == pytest.approx(
        r2_score(y, oracle.predict(x), multioutput="variance_weighted"), abs=1e-10
    )


def test_nasty_numbers():
    """Means 10,000 times the deviation, collinear features, fewer samples than features."""
    x, y = _samples(n=60, d=100)
    x[:, 50:] = x[:, :50] + 1e-4 * np.random.default_rng(1).normal(size=(60, 50))
    x, y = x + 3e4, y - 1e4
    sums = _sums(x, y, batch=7)
    assert _error(sums.xx, np.cov(x.T, bias=True) * len(x)) < 1e-10
    for regularisation in (1e-3, 1.0):
        oracle = Ridge(alpha=penalty(sums, regularisation), solver="svd").fit(x, y)
        weight, bias = fit(sums, regularisation)
        assert _error(weight, oracle.coef_) < 1e-8
        assert _error(bias, oracle.intercept_) < 1e-8


def test_without_a_penalty_the_smallest_map_of_those_that_fit():
    x, y = _samples(n=30, d=60)
    weight, bias = fit(_sums(x, y), 0.0)
    oracle = LinearRegression().fit(x, y)
    assert _error(weight, oracle.coef_) < 1e-8
    assert _error(bias, oracle.intercept_) < 1e-8


def test_batches_and_merging_make_no_difference():
    x, y = _samples()
    whole, single = _sums(x, y, batch=len(x)), _sums(x, y, batch=1)
    merged = _sums(x[:100], y[:100]) + _sums(x[100:], y[100:]) + RidgeSums(24, 7)
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        for other in (single, merged):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-11, atol=1e-9)
    assert merged.weight == whole.weight == len(x)


def test_weights():
    x, y = _samples()
    weights = np.random.default_rng(3).uniform(0, 2, size=len(x))
    weights[:50] = 0
    sums = _sums(x, y, weights=weights)
    oracle = Ridge(alpha=penalty(sums, 0.1), solver="svd").fit(x, y, sample_weight=weights)
    weight, bias = fit(sums, 0.1)
    assert _error(weight, oracle.coef_) < 1e-10
    assert _error(bias, oracle.intercept_) < 1e-10


def test_error_on_held_out_samples():
    x, y = _samples(n=90, d=40, noise=3)
    train, held_out = _sums(x[:60], y[:60]), _sums(x[60:] + 0.3, y[60:])
    path = RidgePath(train)
    errors = path.squared_errors(held_out, REGULARISATIONS)
    for regularisation, error in zip(REGULARISATIONS, errors):
        oracle = Ridge(alpha=penalty(train, regularisation), solver="svd").fit(x[:60], y[:60])
        expected = np.square(oracle.predict(x[60:] + 0.3) - y[60:]).sum()
        assert float(error) == pytest.approx(expected, rel=1e-6)
        for weight, bias in (fit(train, regularisation), path.map(regularisation)):
            assert held_out.squared_error(weight, bias) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("validated", [1, 3])
def test_choice_by_folds(validated):
    x, y = _samples(n=90, d=60, noise=4)
    folds = [_sums(x[start::3], y[start::3]) for start in range(3)]
    solution = solve(folds, validated=validated)
    shares = []
    for regularisation in REGULARISATIONS:
        error = scatter = 0
        for k in range(validated):
            kept = np.arange(90) % 3 != k
            alpha = penalty(_sums(x[kept], y[kept]), regularisation)
            predicted = Ridge(alpha=alpha, solver="svd").fit(x[kept], y[kept]).predict(x[~kept])
            error += np.square(predicted - y[~kept]).sum()
            scatter += np.square(y[~kept] - y[~kept].mean(0)).sum()
        shares.append(1 - error / scatter)
    assert [c["explained_variance"] for c in solution.candidates] == pytest.approx(shares, rel=1e-6)
    assert solution.regularisation == REGULARISATIONS[int(np.argmax(shares))]
    assert REGULARISATIONS[0] < solution.regularisation < REGULARISATIONS[-1]
    oracle = Ridge(alpha=penalty(_sums(x, y), solution.regularisation), solver="svd").fit(x, y)
    assert _error(solution.weight, oracle.coef_) < 1e-8


def test_a_prior():
    """Drawn to a map, the rest alone is regressed; with an infinite penalty the map stays."""
    x, y = _samples()
    prior = torch.randn(7, 24, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    sums = _sums(x, y)
    rest = y - x @ prior[0].numpy().T - prior[1].numpy()
    oracle = Ridge(alpha=penalty(sums, 0.3), solver="svd").fit(x, rest)
    weight, bias = fit(sums, 0.3, prior)
    assert _error(weight, oracle.coef_ + prior[0].numpy()) < 1e-9
    assert _error(bias, oracle.intercept_ + prior[1].numpy()) < 1e-9
    kept, shifted = fit(sums, float("inf"), prior)
    assert torch.equal(kept, prior[0])
    assert _error(shifted, (y - x @ prior[0].numpy().T).mean(0)) < 1e-9
    halves = [_sums(x[::2], y[::2]), _sums(x[1::2], y[1::2])]
    path = RidgePath(halves[0], prior)
    errors = path.squared_errors(halves[1], [0.3, float("inf")])
    assert torch.equal(path.map(float("inf"))[0], prior[0])
    assert float(errors[0]) == pytest.approx(halves[1].squared_error(*fit(halves[0], 0.3, prior)), rel=1e-9)
    assert float(errors[1]) == pytest.approx(halves[1].squared_error(*fit(halves[0], float("inf"), prior)), rel=1e-9)


def test_half_precision_samples():
    x, y = _samples()
    x, y = torch.tensor(x).to(torch.bfloat16), torch.tensor(y).to(torch.float16)
    sums = RidgeSums(24, 7)
    sums.update(x, y)
    oracle = Ridge(alpha=penalty(sums, 0.1), solver="svd").fit(x.double().numpy(), y.double().numpy())
    assert _error(fit(sums, 0.1)[0], oracle.coef_) < 1e-10


def test_constant_features_give_the_mean():
    y = torch.randn(20, 3)
    folds = [RidgeSums(4, 3), RidgeSums(4, 3)]
    for index, sums in enumerate(folds):
        sums.update(torch.ones(10, 4), y[10 * index : 10 * index + 10])
    solution = solve(folds)
    torch.testing.assert_close(solution.bias.float(), y.mean(0))
    assert not solution.weight.any()


def test_bad_input():
    sums = RidgeSums(3, 2)
    with pytest.raises(ValueError, match="finite"):
        sums.update(torch.full((4, 3), float("nan")), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one n"):
        sums.update(torch.zeros(4, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="widths"):
        sums.update(torch.zeros(4, 4), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="two sets"):
        solve([sums, sums])


def test_what_takes_minutes_says_so(monkeypatch, caplog):
    monkeypatch.setattr(ridge, "_WIDE", 8)
    x, y = _samples()
    with caplog.at_level(logging.WARNING):
        solve([_sums(x[::2], y[::2]), _sums(x[1::2], y[1::2])])
    assert "24 features" in caplog.text and "minutes" in caplog.text
