"""Five numbers of least loss: how chinchilla.py fits its law, to many resamples of the data at once.

    f = sum_i w_i Huber_delta(r_i),    r = ln(e^e + e^(a - alpha x) + e^(b - beta y)) - z

is the objective of approach 3 of Hoffmann et al. 2022, section 3.3: x, y, z are the logarithms of N, D and
the loss, and f counts large errors by their size, not its square. The usual way begins L-BFGS-B at thousands
of points, of which most end in a flat region. Here a grid over (alpha, beta) alone gives the start, because
with the exponents given the law is linear in the rest (variable projection), and Newton's method does what
is left, damped and with the exact Hessian.

x, y and z are centred, which changes a, b and e, but not f, and makes the five unknowns far less alike. w_i
counts how often a resample has drawn point i. K problems are solved at once: theta (K, 5) holds e, a, b,
alpha, beta; w is (K, n), r too.
"""

import math

import numpy as np

# An optimum on the border is no law, but it is a finite answer: a term 10,000 times smaller than the loss, or
# an exponent that would need far more orders of magnitude, or far fewer, than any data have.
LEAST = np.array([math.log(1e-4)] * 3 + [0.01, 0.01])
MOST = np.array([math.log(10)] * 3 + [3.0, 3.0])
NEAR_LEAST = np.array([math.log(1e-3)] * 3 + [0.02, 0.02])
NEAR_MOST = np.array([np.inf] * 3 + [2.9, 2.9])
BORDER = "a term of less than a thousandth of the loss, or an exponent below 0.02 or above 2.9"


def centre(N, D, L) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms x, y, z (3, n) less their means (3,)."""
    logs = np.log(np.stack((N, D, L)))
    means = logs.mean(axis=1)
    return logs - means[:, None], means


def parameters(theta: np.ndarray, means: np.ndarray) -> np.ndarray:
    """E, A, B, alpha, beta (K, 5) of theta (K, 5) and what `centre` took off."""
    e, a, b, alpha, beta = theta.T
    x, y, z = means
    return np.stack((np.exp(e + z), np.exp(a + z + alpha * x), np.exp(b + z + beta * y), alpha, beta), axis=1)


def shares(theta: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shares of the terms in A and in B of the predicted loss, and r; (K, n) each.

    On centred data, within LEAST and MOST, no exponential overflows: the largest need not be taken out."""
    x, y, z = logs
    e, a, b, alpha, beta = theta.T[:, :, None]
    of_A = np.exp(a - alpha * x)
    of_B = np.exp(b - beta * y)
    total = of_A + of_B + np.exp(e)
    return of_A / total, of_B / total, np.log(total) - z


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 up to |r| = delta, a straight line beyond it."""
    clipped = np.clip(r, -delta, delta)
    return clipped * (r - clipped / 2)


def derivatives(p, q, r, w, logs, delta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where `shares` is p, q, r: gradient g (K, 5) of f, Hessian H (K, 5, 5), and a positive M to damp it.

    With J = dr/dtheta and psi = Huber', H = sum w (psi' J J^T + psi d2r), where d2r = sum over the terms of
    share m m^T - J J^T, and m is the gradient of a term's exponent. Beyond delta psi' is 0, and f may curve
    the wrong way or not at all. M = sum w (psi / r J J^T + |psi| sum of share m m^T): the parabolas that
    touch the Huber function from above (iteratively reweighted least squares), and what H has of m m^T, all
    of it taken as positive. A short enough step by M goes down.
    """
    x, y, _ = logs
    J = np.stack((1 - p - q, p, q, -p * x, -q * y), axis=1)  # (K, 5, n)
    psi = np.clip(r, -delta, delta)
    g = (J @ (w * psi)[:, :, None])[:, :, 0]
    inside = np.abs(r) <= delta
    H = (J * (w * (inside - psi))[:, None]) @ J.transpose(0, 2, 1)
    M = (J * (w * delta / np.maximum(np.abs(r), delta))[:, None]) @ J.transpose(0, 2, 1)
    for into, pull in ((H, w * psi), (M, w * np.abs(psi))):  # m is (1,), (1, -x) or (1, -y)
        into[:, 0, 0] += (pull * (1 - p - q)).sum(axis=1)
        for share, log, i, j in ((p, x, 1, 3), (q, y, 2, 4)):
            moments = (pull * share) @ np.stack((np.ones_like(log), -log, log * log), axis=1)  # (K, 3)
            into[:, i, i] += moments[:, 0]
            into[:, i, j] += moments[:, 1]
            into[:, j, i] += moments[:, 1]
            into[:, j, j] += moments[:, 2]
    M[:, range(5), range(5)] *= 1 + 1e-9  # data that leave a direction open must not make it singular
    M[:, range(5), range(5)] += 1e-12 * w.sum(axis=1)[:, None] * min(1.0, delta)
    return g, H, M


def newton(theta, w, logs, delta: float, steps: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """theta (K, 5) of least f from a start (K, 5), f (K,), and whether the gradient vanishes there (K,).

    Levenberg-Marquardt with the exact Hessian: H + damping M, where each of the K problems has a damping of
    its own, a tenth of it after a step that lowered f, ten times as much after one that did not and is taken
    back. A parameter on the border which the descent would take outside stays there. Problems that are
    solved leave the batch.
    """
    theta = np.clip(theta, LEAST, MOST)
    now = shares(theta, logs)
    f = (w * huber(now[2], delta)).sum(axis=1)
    solution, least, solved = theta.copy(), f.copy(), np.zeros(len(theta), dtype=bool)
    which, damping = np.arange(len(theta)), np.full(len(theta), 1e-3)
    for _ in range(steps):
        g, H, M = derivatives(*now, w, logs, delta)
        pinned = ((theta <= LEAST) & (g > 0)) | ((theta >= MOST) & (g < 0))
        g[pinned] = 0
        system = H + damping[:, None, None] * M
        system = np.where(pinned[:, :, None] | pinned[:, None, :], np.eye(5), system)
        step = np.linalg.solve(system, -g[:, :, None])[:, :, 0]
        # What a step may still gain: below the rounding of f there is nothing to be had.
        gain = -(g * step).sum(axis=1)
        flat = (np.abs(gain) <= 1e-14 * f + 1e-31 * w.sum(axis=1)) & (damping <= 1)
        new = np.clip(theta + step, LEAST, MOST)
        then = shares(new, logs)
        f_new = (w * huber(then[2], delta)).sum(axis=1)
        better = f_new < f
        theta, f = np.where(better[:, None], new, theta), np.where(better, f_new, f)
        now = tuple(np.where(better[:, None], b, a) for a, b in zip(now, then, strict=True))
        damping = np.where(better, np.maximum(damping / 10, 1e-12), damping * 10)
        solution[which], least[which], solved[which] = theta, f, flat
        on = ~flat & (damping < 1e12)
        if not on.any():
            break
        which, theta, f, damping, w = which[on], theta[on], f[on], damping[on], w[on]
        now = tuple(part[on] for part in now)
    return solution, least, solved


def starts(logs, delta: float, grid: int = 32, blocks: int = 8) -> np.ndarray:
    """theta (64, 5) to begin from: the best in each block of a grid of exponents (variable projection).

    For given exponents the law is linear in E, A and B: they are those of least squares of the relative error
    that are not negative. Of three unknowns there are seven sets that may be positive, so all are tried."""
    x, y, z = logs
    exponents = np.geomspace(0.05, 2.0, grid)
    theta = np.empty((grid, grid, 5))
    theta[..., 3], theta[..., 4] = exponents[:, None], exponents
    for i, alpha in enumerate(exponents):
        of_B = np.exp(-exponents[:, None] * y - z)
        terms = np.stack(np.broadcast_arrays(np.exp(-z), np.exp(-alpha * x - z), of_B), axis=1)  # over L
        gram, target = terms @ terms.transpose(0, 2, 1), terms.sum(axis=2)
        gram[:, range(3), range(3)] *= 1 + 1e-12  # terms that are the same must not make it singular
        best, coefficients = np.zeros(grid), np.zeros((grid, 3))
        for kept in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
            c = np.zeros((grid, 3))
            c[:, kept] = np.linalg.solve(gram[:, kept][..., kept], target[:, kept, None])[..., 0]
            explained = (c * target).sum(axis=1)
            better = (c >= 0).all(axis=1) & (explained > best)
            best[better], coefficients[better] = explained[better], c[better]
        theta[i, :, :3] = np.log(np.maximum(coefficients, 1e-3))
    f = huber(shares(theta.reshape(-1, 5), logs)[2], delta).sum(axis=1)
    side = grid // blocks
    f, theta = (v.reshape(blocks, side, blocks, side, -1).swapaxes(1, 2) for v in (f, theta))
    best = f.reshape(blocks**2, -1).argmin(axis=1)
    return theta.reshape(blocks**2, -1, 5)[range(blocks**2), best]


def approach(theta, w, logs, delta: float, first: float) -> np.ndarray:
    """theta (K, 5) after short rounds of `newton` with delta falling from `first`, tenfold, to ten times what
    it is: where it is far below the residuals, f is nearly the sum of their absolute values, all kinks, and
    needs a close start."""
    for k in range(math.ceil(math.log10(max(first / delta, 1)) - 1e-9), 0, -1):
        theta = newton(theta, w, logs, delta * 10**k, steps=30)[0]
    return theta


def search(logs, delta: float) -> tuple[np.ndarray, float, bool]:
    """theta (1, 5) of least f with every point counted once, f there, and whether its gradient vanishes."""
    theta = starts(logs, delta)
    w = np.ones((len(theta), logs.shape[1]))
    theta = approach(theta, w, logs, delta, first=0.1)
    few = huber(shares(theta, logs)[2], delta).sum(axis=1).argsort()[:16]
    theta, f, solved = newton(theta[few], w[few], logs, delta)
    best = f.argmin()
    return theta[[best]], float(f[best]), bool(solved[best])


def search_again(theta, w, logs, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """theta (K, 5) for other weights w (K, n), from a theta (1, 5) that is near, and whether the gradients
    vanish there (K,)."""
    found = []
    for part in np.array_split(w, math.ceil(w.size / 12000)):  # so small that it stays in the cache
        start = approach(np.repeat(theta, len(part), axis=0), part, logs, delta, first=1e-3)
        found.append(newton(start, part, logs, delta))
    return np.concatenate([theta for theta, _, _ in found]), np.concatenate([solved for *_, solved in found])


def on_border(theta: np.ndarray) -> np.ndarray:
    """Which of theta (K, 5) are near LEAST or MOST: bool (K, 5)."""
    return (theta < NEAR_LEAST) | (theta > NEAR_MOST)
