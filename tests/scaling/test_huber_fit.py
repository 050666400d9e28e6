"""The search compared with scipy's, and its derivatives with finite differences."""

import math

import numpy as np
import pytest

from chinchilla import fit, points
from scaling.huber_fit import centre, derivatives, huber, shares

POINTS = points()


def objective(theta):
    """The objective of a, b, e, alpha, beta, as in the papers."""
    a, b, e, alpha, beta = theta
    N, D, L = POINTS
    r = np.logaddexp(np.logaddexp(a - alpha * np.log(N), b - beta * np.log(D)), e) - np.log(L)
    return huber(r, 1e-3).sum()


def test_never_above_scipy():
    """L-BFGS-B and BFGS from our optimum and from four points like those of the usual grid."""
    optimize = pytest.importorskip("scipy.optimize")
    found = fit(*points())
    ours = np.array([math.log(found.law.A), math.log(found.law.B), math.log(found.law.E)])
    ours = np.array([*ours, found.law.alpha, found.law.beta])
    assert objective(ours) == pytest.approx(found.objective, rel=1e-10)
    starts = [
        ours,
        [5, 5, 0, 0.5, 0.5],
        [5, 10, 0.5, 0.5, 0.5],
        [10, 5, 0.5, 0.5, 0.5],
        [6, 6, 0.5, 0.3, 0.3],
    ]
    for method in ("L-BFGS-B", "BFGS"):
        for start in starts:
            best = optimize.minimize(objective, start, method=method).fun
            assert found.objective <= best * (1 + 1e-9)


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_gradient_and_hessian_are_those_of_differences(delta):
    logs, _ = centre(*points())
    theta = np.array([[-0.6, -1.2, -1.3, 0.31, 0.42], [-0.7, -1.0, -1.5, 0.4, 0.3]])
    w = np.random.default_rng(0).integers(0, 3, (2, logs.shape[1])).astype(float)

    def at(theta):
        p, q, r = shares(theta, logs)
        return (w * huber(r, delta)).sum(axis=1), *derivatives(p, q, r, w, logs, delta)

    f, g, H, M = at(theta)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        above, below = at(theta + step), at(theta - step)
        assert (above[0] - below[0]) / 2e-6 == pytest.approx(g[:, i], rel=1e-5, abs=1e-9)
        if delta == 1.0:  # all residuals are inside, where f is smooth
            difference = (above[1] - below[1]) / 2e-6
            assert np.allclose(difference, H[:, i], rtol=1e-5, atol=1e-7)
    assert (np.linalg.eigvalsh(M) > 0).all()


def test_the_mean_instead_of_the_sum_stops_where_it_starts():
    """Besiroglu et al. 2024 found how Hoffmann et al. 2022 came to their law: L-BFGS-B minimised the mean of
    Huber losses, which are all below 1e-5, so that its tolerance stopped it at once."""
    optimize = pytest.importorskip("scipy.optimize")
    theirs = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])
    stopped = optimize.minimize(lambda theta: objective(theta) / 240, theirs, method="L-BFGS-B")
    assert stopped.success and np.allclose(stopped.x, theirs, atol=1e-3)
    assert 240 * stopped.fun == pytest.approx(0.00117178, rel=1e-3)
    assert fit(*points()).objective < 0.88 * 240 * stopped.fun
