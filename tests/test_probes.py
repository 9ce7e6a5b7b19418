"Probes: against scikit-learn, by hand, and at their optimum."

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from atm_sae.evals import probes
from atm_sae.evals.probes import (
    balanced_weights,
    f1_score,
    fit_l1_probes,
    fit_l2_probes,
    fit_logistic,
    kkt_error,
    l1_max,
    l1_slope,
    solve_signs,
    weighted_gram,
)

T = torch.tensor


def test_logistic_agrees_with_sklearn():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=g)
    y = x[:, 0] + torch.randn(200, generator=g) > 1
    w, b = fit_logistic(x, y, l2=2.0)
    ref = LogisticRegression(C=0.5, class_weight="balanced", tol=1e-10, max_iter=10000).fit(
        x.numpy(), y.numpy()
    )
    assert np.allclose(w, ref.coef_[0], atol=1e-4) and np.allclose(b, ref.intercept_, atol=1e-4)


def test_logistic_converges_on_separable_data():
    x, y = T([[-2.0], [-1], [1], [2]]), T([False, False, True, True])
    w, b = fit_logistic(x, y, l2=1e-4)
    pi = torch.sigmoid(-(y.double() * 2 - 1) * (x.double() @ w + b))
    gradient = 1e-4 * w - x.double().T @ ((y.double() * 2 - 1) * pi)
    assert w[0] > 3 and gradient.abs().max() < 1e-6


def test_logistic_needs_both_classes():
    with pytest.raises(ValueError, match="both classes; 3 of the 3 are positive"):
        fit_logistic(torch.ones(3, 1), torch.ones(3, dtype=bool))


def test_many_problems_at_once_are_the_same_as_each_by_itself():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 50, 4, generator=g), torch.rand(3, 50, generator=g) < 0.3
    w, b = fit_logistic(x, y)
    for i in range(3):
        assert torch.allclose(w[i], fit_logistic(x[i], y[i])[0], atol=1e-7) and torch.isclose(
            b[i], fit_logistic(x[i], y[i])[1], atol=1e-7
        )


def three_questions(seed, spread=0.0, n=300, d=40):
    "Inputs (n, d) of sizes from 10 ** -spread to 10 ** spread, and answers to three questions."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) * torch.logspace(-spread, spread, d)
    noisy = x[:, 20] + 0.1 * torch.randn(n, generator=g) > 1
    return x, torch.stack([noisy, torch.rand(n, generator=g) < 0.1, x[:, 3] > 0], 1)


@pytest.mark.parametrize("spread, l2", [(0, 1.0), (0, 1e-4), (3, 1.0), (3, 1e-6)])
def test_probes_on_the_same_inputs_are_those_of_each_question(spread, l2):
    x, Y = three_questions(0, spread)
    x[:, 5] = x[:, 6]
    W, b = fit_l2_probes(x, Y, l2)
    for i, y in enumerate(Y.T):
        w, bias = fit_logistic(x, y, l2, tol=1e-14)
        assert (W[:, i] - w).norm() < 1e-6 * w.norm() and abs(b[i] - bias) < 1e-6 * (1 + abs(bias))
        assert torch.equal(x.double() @ W[:, i] + b[i] > 0, x.double() @ w + bias > 0)


def test_probes_on_the_same_inputs_have_no_slope():
    x, Y = three_questions(1)
    W, b = fit_l2_probes(x, Y)
    t, s = 2.0 * Y - 1, balanced_weights(Y.T).T
    R = s * t * torch.sigmoid(-t * (x.double() @ W + b))
    assert (W - x.double().T @ R).abs().max() < 1e-7 and R.sum(0).abs().max() < 1e-7


def test_curvature_is_not_approximated_for_each_step(monkeypatch):
    made, steps = [], []
    approximate, solve = probes._near_curvature, probes._conjugate_gradients
    monkeypatch.setattr(probes, "_near_curvature", lambda *a: made.append(1) or approximate(*a))
    monkeypatch.setattr(probes, "_conjugate_gradients", lambda *a: steps.append(1) or solve(*a))
    fit_l2_probes(*three_questions(0))
    assert 1 <= len(made) < len(steps) < 20


def test_inputs_that_say_nothing_get_no_weights():
    x, y = torch.zeros(4, 2), T([True, False, True, False])
    W, b = fit_l2_probes(x, y[:, None])
    assert not W.any() and not b.any()


def test_probes_on_the_same_inputs_refuse_what_cannot_be_fitted():
    x, Y = three_questions(0)
    with pytest.raises(RuntimeError, match="3 probes did not converge in 100 steps: raise l2"):
        fit_l2_probes(x[:, :2], Y, tol=-1.0)
    with pytest.raises(ValueError, match="both classes; 0 of the 300 are positive"):
        fit_l2_probes(x, Y & False)
    x[0, 0] = np.inf
    with pytest.raises(ValueError, match="fit_l2_probes: inputs are NaN or infinite"):
        fit_l2_probes(x, Y)


def test_f1():
    assert (
        f1_score(T([True, True, False]), T([True, False, True])) == 0.5
        and f1_score(T([False]), T([False])) == 0
    )


def test_l1_max_is_where_weights_vanish():
    rng = np.random.default_rng(0)
    z = sparse.csr_matrix(rng.random((60, 8)) * (rng.random((60, 8)) < 0.3))
    Y = rng.random((60, 3)) < 0.4
    assert (fit_l1_probes(z, Y, share=1.01)[0] == 0).all() and (
        fit_l1_probes(z, Y, share=0.98)[0] != 0
    ).any(0).all()


def test_l1_probes_are_at_the_optimum_that_sklearn_finds():
    rng = np.random.default_rng(1)
    z = sparse.csr_matrix(rng.exponential(size=(400, 60)) * (rng.random((400, 60)) < 0.1))
    Y = np.stack([z[:, j].toarray()[:, 0] + 0.3 * rng.random(400) > 0.25 for j in range(4)], 1)
    W, b = fit_l1_probes(z, Y, share=0.02, tol=1e-8)
    for k in range(4):
        weights = balanced_weights(T(Y[:, k])).numpy()
        probe = LogisticRegression(
            C=1 / (0.02 * l1_max(z, Y)[k]), l1_ratio=1.0, solver="saga", tol=1e-10, max_iter=100_000
        )
        w = probe.fit(z.toarray(), Y[:, k], sample_weight=weights).coef_[0]
        assert (
            np.allclose(W[:, k], w, atol=1e-4 * np.abs(w).max())
            and abs(b[k] - probe.intercept_[0]) < 1e-3
        )
        assert 0 < (W[:, k] != 0).sum() < 60
    t, s = 2.0 * Y - 1, np.stack([balanced_weights(T(y)).numpy() for y in Y.T], 1)
    G = z.T @ (-s * t / (1 + np.exp(t * (z @ W + b))))
    assert kkt_error(G.T, W.T, 0.02 * l1_max(z, Y)).max() < 1e-7


def sparse_inputs(n=500, d=240, seed=5):
    "Inputs (n, d) with 5% non-zero, and two questions on 120 of them each."
    rng = np.random.default_rng(seed)
    z = rng.exponential(size=(n, d)) * (rng.random((n, d)) < 0.05)
    W = rng.normal(size=(d, 2)) * (rng.random((d, 2)) < 0.5)
    return z, z @ W + 0.3 * rng.normal(size=(n, 2)) > 0.3


def l1_error(z, Y, share, W, b):
    return kkt_error(l1_slope(z, Y, W, b), W.T, share * l1_max(z, Y)).max()


def test_l1_probes_with_many_weights_take_few_steps():
    z, Y = sparse_inputs()
    z = sparse.csr_matrix(z)
    W, b = fit_l1_probes(z, Y, max_steps=15)
    assert l1_error(z, Y, 0.01, W, b) < 1e-5
    assert ((W != 0).sum(0) > 90).all()


def test_l1_probes_on_nearly_equal_inputs_of_different_scales():
    z, Y = sparse_inputs(300, 20)
    noise = np.random.default_rng(6).normal(size=z.shape)
    z = np.hstack([z, z * (1 + 1e-4 * noise), 1000 * z[:, :5]])
    z = sparse.csr_matrix(np.hstack([z, z[:, :3]]))  # equal ones, too
    W, b = fit_l1_probes(z, Y)
    assert l1_error(z, Y, 0.01, W, b) < 1e-5


@pytest.mark.parametrize("share", [0.01, 0.5])  # by a sparse and by a dense product
def test_weighted_gram(share):
    rng = np.random.default_rng(7)
    X, c = sparse.random(200, 12, share, format="csc", random_state=8), rng.random(200)
    right = X.toarray().T @ (c[:, None] * X.toarray())
    assert np.allclose(weighted_gram(X, c), right, rtol=1e-12, atol=0)
    assert np.allclose(weighted_gram(X, c, single=True), right, rtol=1e-5, atol=0)


def test_curvature_that_is_singular_in_single_precision_is_made_in_double(monkeypatch):
    "Always active latents are nearly equal inputs; rounding can make their H indefinite."
    z, Y = sparse_inputs(200, 12)
    z, exact = sparse.csr_matrix(z), weighted_gram
    singles = []

    def rounded(X, c, single=False):
        singles.append(single)
        H = exact(X, c)
        return H - 2 * np.diag(H.diagonal()) if single else H

    monkeypatch.setattr(probes, "weighted_gram", rounded)
    W, b = fit_l1_probes(z, Y)
    assert l1_error(z, Y, 0.01, W, b) < 1e-5 and {*singles} == {True, False}


def test_a_step_with_signs_that_change_stops_at_zero():
    H, price = np.eye(2), np.array([1.0, 1])
    # the second weight, 1, would end at 1 - 3 + 1 = -1; a slope of 0.5 is no reason to leave zero
    assert solve_signs(H, np.array([-3.0, 3]), np.array([0.0, 1]), price).tolist() == [2, 0]
    assert solve_signs(H, np.array([-3.0, 0.5]), np.zeros(2), price).tolist() == [2, 0]


def test_l1_probes_that_do_not_converge_say_so():
    z = sparse.csr_matrix(np.random.default_rng(2).random((40, 5)))
    with pytest.raises(RuntimeError, match="1 questions did not converge in 1 steps"):
        fit_l1_probes(z, z[:, [0]].toarray() > 0.5, max_steps=1)


def test_inputs_that_are_not_numbers_and_penalties_that_are_none():
    x, y = sparse.csr_matrix(np.eye(6)), np.arange(6)[:, None] < 3
    with pytest.raises(ValueError, match="share = 0, but the penalty must be above 0"):
        fit_l1_probes(x, y, 0)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="fit_l1_probes: inputs are NaN or infinite"):
        fit_l1_probes(x, y)
    with pytest.raises(ValueError, match="fit_logistic: inputs are NaN or infinite"):
        fit_logistic(T(x.toarray()), T(y[:, 0]))


def test_slopes_of_the_logistic_loss_by_hand():
    "At zero the sigmoid is 1/2, and each class weighs half of the samples."
    x, y = sparse.csr_matrix([[1.0], [3.0]]), np.array([[True], [False]])
    slope = l1_slope(x, y, np.zeros((1, 1)), np.zeros(1))
    weights = balanced_weights(T([True, False])).tolist()
    assert slope.tolist() == [[pytest.approx((3 * weights[1] - weights[0]) / 2)]] and slope > 0


def test_a_probe_that_does_not_converge_is_an_error():
    x, y = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), torch.arange(50) < 25
    with pytest.raises(RuntimeError, match="did not converge in 100 steps"):
        fit_logistic(x, y, tol=-1.0)
