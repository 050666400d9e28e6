"""Fitting the five parameters of the law: Huber loss, Newton's method, many resamples at once.

    f = sum_i w_i Huber_delta(r_i),    r = ln(e^e + e^(a - alpha x) + e^(b - beta y)) - z

is the objective of approach 3 of Hoffmann et al. 2022, section 3.3: x, y, z are the logarithms of N, D and
the loss, r is the error of the predicted logarithm, and Huber's function grows only linearly where |r| is
above delta. Here e, a, b are the logarithms of E, A, B, and not the exponents a and b of chinchilla.py. The
usual way starts L-BFGS-B from thousands of points, most of which end in a flat region. Here a grid over
(alpha, beta) alone gives the start, because the law is linear in the other three parameters once the
exponents are given (variable projection). Newton's method, damped and with the exact Hessian, does the rest.

x, y and z are centred. That changes a, b and e but not f, and brings the five unknowns to similar scales. w_i
is the number of times that a resample contains point i.

Shapes: K problems are solved at once, on n points each. theta (K, 5) holds e, a, b, alpha, beta; w and r are
(K, n); logs (3, n) holds x, y, z.
"""

import math

import numpy as np

# Bounds of theta. They keep the answer finite where the points determine no law: there a term falls to a
# 10,000th of the loss, or an exponent to a value that no data could determine. `on_border` finds such optima.
LEAST = np.array([math.log(1e-4)] * 3 + [0.01, 0.01])
MOST = np.array([math.log(10)] * 3 + [3.0, 3.0])
NEAR_LEAST = np.array([math.log(1e-3)] * 3 + [0.02, 0.02])
NEAR_MOST = np.array([np.inf] * 3 + [2.9, 2.9])
BORDER = "a term of less than a thousandth of the loss, or an exponent below 0.02 or above 2.9"


def centre(N, D, L) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithms x, y, z (3, n) of N, D, L minus their means, and the means (3,)."""
    logs = np.log(np.stack((N, D, L)))
    means = logs.mean(axis=1)
    return logs - means[:, None], means


def uncentre(theta: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return E, A, B, alpha, beta (K, 5) from theta (K, 5) and the means that `centre` subtracted."""
    e, a, b, alpha, beta = theta.T
    x, y, z = means
    return np.stack((np.exp(e + z), np.exp(a + z + alpha * x), np.exp(b + z + beta * y), alpha, beta), axis=1)


def shares(theta: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the shares of the A term and of the B term in the predicted loss, and r; (K, n) each.

    On centred data, with theta within LEAST and MOST, no exponential overflows, so log-sum-exp is not needed.
    """
    x, y, z = logs
    e, a, b, alpha, beta = theta.T[:, :, None]
    of_A = np.exp(a - alpha * x)
    of_B = np.exp(b - beta * y)
    total = of_A + of_B + np.exp(e)
    return of_A / total, of_B / total, np.log(total) - z


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """Return r^2 / 2 where |r| <= delta, and its tangent beyond: delta (|r| - delta / 2)."""
    clipped = np.clip(r, -delta, delta)
    return clipped * (r - clipped / 2)


def derivatives(p, q, r, w, logs, delta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradient g (K, 5) of f, its Hessian H (K, 5, 5), and a positive definite M (K, 5, 5) to damp
    it with. p, q, r: what `shares` returns.

    Let J = dr/dtheta, psi = Huber', and m the gradient of a term's exponent, so that the second derivative of
    r is d2r = sum over the three terms of share m m^T, minus J J^T. Then

        H = sum_i w (psi' J J^T + psi d2r)
        M = sum_i w (psi / r J J^T + |psi| sum over the terms of share m m^T)

    Beyond delta, psi' is 0, and f may curve downwards or not at all. M replaces the Huber function by the
    parabolas that touch it from above (iteratively reweighted least squares), and takes the m m^T of H with
    positive weights. So a step by M that is short enough always lowers f.
    """
    x, y, _ = logs
    J = np.stack((1 - p - q, p, q, -p * x, -q * y), axis=1)  # (K, 5, n)
    psi = np.clip(r, -delta, delta)
    g = (J @ (w * psi)[:, :, None])[:, :, 0]

    # The parts of H and M in J J^T.
    inside = np.abs(r) <= delta
    H = (J * (w * (inside - psi))[:, None]) @ J.transpose(0, 2, 1)
    M = (J * (w * delta / np.maximum(np.abs(r), delta))[:, None]) @ J.transpose(0, 2, 1)

    # Their parts in m m^T, where m is (1,) for e, (1, -x) for (a, alpha) and (1, -y) for (b, beta).
    for into, weight in ((H, w * psi), (M, w * np.abs(psi))):
        into[:, 0, 0] += (weight * (1 - p - q)).sum(axis=1)
        for share, log, i, j in ((p, x, 1, 3), (q, y, 2, 4)):
            moments = (weight * share) @ np.stack((np.ones_like(log), -log, log * log), axis=1)  # (K, 3)
            into[:, i, i] += moments[:, 0]
            into[:, i, j] += moments[:, 1]
            into[:, j, i] += moments[:, 1]
            into[:, j, j] += moments[:, 2]

    # Enlarge the diagonal, so that M is not singular where the data leave a direction open.
    M[:, range(5), range(5)] *= 1 + 1e-9
    M[:, range(5), range(5)] += 1e-12 * w.sum(axis=1)[:, None] * min(1.0, delta)
    return g, H, M


def newton(theta, w, logs, delta: float, steps: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise f from starts theta (K, 5). Return the optima (K, 5), f there (K,), and solved (K,), bool:
    whether the gradient vanishes there.

    Levenberg-Marquardt with the exact Hessian: a step solves (H + damping M) step = -g. Each of the K
    problems has its own damping. It falls to a tenth after a step that lowered f; any other step is undone,
    and the damping rises tenfold. A parameter on a bound stays there while descent would take it outside.
    """
    theta = np.clip(theta, LEAST, MOST)
    now = shares(theta, logs)
    f = (w * huber(now[2], delta)).sum(axis=1)
    # Results of all K problems. `which` are those still in the batch: a problem that is solved leaves it.
    solution, least, solved = theta.copy(), f.copy(), np.zeros(len(theta), dtype=bool)
    which, damping = np.arange(len(theta)), np.full(len(theta), 1e-3)
    for _ in range(steps):
        # The Newton step of the parameters that are free; those on a bound get a step of 0.
        g, H, M = derivatives(*now, w, logs, delta)
        pinned = ((theta <= LEAST) & (g > 0)) | ((theta >= MOST) & (g < 0))
        g[pinned] = 0
        system = H + damping[:, None, None] * M
        system = np.where(pinned[:, :, None] | pinned[:, None, :], np.eye(5), system)
        step = np.linalg.solve(system, -g[:, :, None])[:, :, 0]

        # A problem is solved when the step could lower f by no more than f's rounding error.
        gain = -(g * step).sum(axis=1)
        flat = (np.abs(gain) <= 1e-14 * f + 1e-31 * w.sum(axis=1)) & (damping <= 1)

        # Keep the step where it lowers f.
        new = np.clip(theta + step, LEAST, MOST)
        then = shares(new, logs)
        f_new = (w * huber(then[2], delta)).sum(axis=1)
        better = f_new < f
        theta, f = np.where(better[:, None], new, theta), np.where(better, f_new, f)
        now = tuple(np.where(better[:, None], b, a) for a, b in zip(now, then, strict=True))
        damping = np.where(better, np.maximum(damping / 10, 1e-12), damping * 10)
        solution[which], least[which], solved[which] = theta, f, flat

        # Continue with the problems that are neither solved nor stuck.
        on = ~flat & (damping < 1e12)
        if not on.any():
            break
        which, theta, f, damping, w = which[on], theta[on], f[on], damping[on], w[on]
        now = tuple(part[on] for part in now)
    return solution, least, solved


def linear_parameters(alpha: float, betas: np.ndarray, logs) -> np.ndarray:
    """Return e, a, b (n_betas, 3) for given exponents: variable projection.

    For given exponents the law is linear in E, A and B. They are found by least squares of the relative
    error, none negative: each of the seven sets of terms that may be positive is tried."""
    x, y, z = logs
    of_B = np.exp(-betas[:, None] * y - z)
    # The three terms over the loss (n_betas, 3, n): with the right factors they add up to 1 at every point.
    terms = np.stack(np.broadcast_arrays(np.exp(-z), np.exp(-alpha * x - z), of_B), axis=1)
    gram, target = terms @ terms.transpose(0, 2, 1), terms.sum(axis=2)
    gram[:, range(3), range(3)] *= 1 + 1e-12  # not singular where two terms are the same
    best, coefficients = np.zeros(len(betas)), np.zeros((len(betas), 3))
    for kept in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        c = np.zeros((len(betas), 3))
        c[:, kept] = np.linalg.solve(gram[:, kept][..., kept], target[:, kept, None])[..., 0]
        explained = (c * target).sum(axis=1)
        better = (c >= 0).all(axis=1) & (explained > best)
        best[better], coefficients[better] = explained[better], c[better]
    return np.log(np.maximum(coefficients, 1e-3))


def starting_points(logs, delta: float, grid: int = 32, blocks: int = 8) -> np.ndarray:
    """Return starts theta (blocks^2, 5): the best of each block of a grid over (alpha, beta)."""
    exponents = np.geomspace(0.05, 2.0, grid)
    theta = np.empty((grid, grid, 5))
    theta[..., 3], theta[..., 4] = exponents[:, None], exponents
    for i, alpha in enumerate(exponents):
        theta[i, :, :3] = linear_parameters(alpha, exponents, logs)
    f = huber(shares(theta.reshape(-1, 5), logs)[2], delta).sum(axis=1)

    # Cut the grid into blocks x blocks squares and take the least f of each.
    side = grid // blocks
    f, theta = (v.reshape(blocks, side, blocks, side, -1).swapaxes(1, 2) for v in (f, theta))
    best = f.reshape(blocks**2, -1).argmin(axis=1)
    return theta.reshape(blocks**2, -1, 5)[range(blocks**2), best]


def anneal_delta(theta, w, logs, delta: float, first: float) -> np.ndarray:
    """Return theta (K, 5) after short rounds of `newton` with a larger delta: `first` at first, tenfold less
    in each round, 10 delta in the last.

    Where delta is far below the residuals, f is nearly the sum of their absolute values. It is then full of
    kinks, and Newton's method needs a close start."""
    for k in range(math.ceil(math.log10(max(first / delta, 1)) - 1e-9), 0, -1):
        theta = newton(theta, w, logs, delta * 10**k, steps=30)[0]
    return theta


def search(logs, delta: float) -> tuple[np.ndarray, float, bool]:
    """Return the best optimum theta (1, 5) from all starts, with a weight of 1 for every point, f there, and
    whether the gradient vanishes there."""
    theta = starting_points(logs, delta)
    w = np.ones((len(theta), logs.shape[1]))
    theta = anneal_delta(theta, w, logs, delta, first=0.1)
    few = huber(shares(theta, logs)[2], delta).sum(axis=1).argsort()[:16]
    theta, f, solved = newton(theta[few], w[few], logs, delta)
    best = f.argmin()
    return theta[[best]], float(f[best]), bool(solved[best])


def search_near(theta, w, logs, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the optima (K, 5) for weights w (K, n), and whether the gradient vanishes there, bool (K,).
    theta (1, 5): a start that is near all of them."""
    found = []
    for part in np.array_split(w, math.ceil(w.size / 12000)):  # parts that fit into the CPU's cache
        start = anneal_delta(np.repeat(theta, len(part), axis=0), part, logs, delta, first=1e-3)
        found.append(newton(start, part, logs, delta))
    return np.concatenate([theta for theta, _, _ in found]), np.concatenate([solved for *_, solved in found])


def on_border(theta: np.ndarray) -> np.ndarray:
    """Return bool (K, 5): True for parameters that are near LEAST or MOST."""
    return (theta < NEAR_LEAST) | (theta > NEAR_MOST)
