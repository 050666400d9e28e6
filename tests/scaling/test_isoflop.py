"""Approaches 1 and 2 on known laws, and the bias of the parabolas to the last digit that was printed."""

import numpy as np
import pytest
from test_chinchilla import ROUNDED, grid

from chinchilla import Law
from scaling.isoflop import envelope, isoflop, parabola_bias, power_law


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (Law(1.69, 400, 400, 0.31, 0.31), (0, 0, 0, 0)),
        (ROUNDED, (-0.33, -1.30, -2.90, -5.10)),
        (Law(1.69, 400, 400, 0.465, 0.155), (-1.67, -6.50, -13.91, -23.12)),
    ],
    ids=["symmetric", "Chinchilla", "asymmetric"],
)
def test_what_parabolas_do_to_the_optimum(law, expected):
    """Errors of D* at 1e24 in %, for factors 2, 4, 8, 16 ("Problems with Chinchilla Approach 2", 2026)."""
    for factor, bias in zip((2, 4, 8, 16), expected, strict=True):
        assert 100 * parabola_bias(law, factor) == pytest.approx(bias, abs=0.01)


def test_the_envelope_finds_the_exponent():
    N, D, L = grid(ROUNDED, sizes=20, tokens=300, N=(7e7, 1.6e10), ratios=(0.5, 2000))
    assert envelope(N, D, L).a == pytest.approx(0.4516, abs=1e-3)
    order = np.random.default_rng(0).permutation(len(N))
    assert envelope(N[order], D[order], L[order]) == envelope(N, D, L)
    with pytest.raises(ValueError, match="at least 4 training curves"):
        envelope(*grid(ROUNDED, tokens=1))


def test_parabolas_at_common_budgets_have_the_exponent_and_their_bias():
    budgets = np.geomspace(1e18, 1e21, 4)
    best = ROUNDED.optimal(budgets)[0]
    N = (best[:, None] * np.geomspace(1 / 8, 8, 15)).ravel()
    D = np.repeat(budgets, 15) / (6 * N)
    found = isoflop(N, D, ROUNDED.loss(N, D), within=70)
    assert found.budgets == pytest.approx(budgets)
    # Sizes of two budgets that happen to differ by less than half a per cent are taken for one.
    assert found.factor == pytest.approx(8, rel=1e-3)
    assert found.law.a == pytest.approx(ROUNDED.a, abs=1e-4)
    bias = found.law.optimal(1e24)[1] / ROUNDED.optimal(1e24)[1] - 1
    assert bias == pytest.approx(parabola_bias(ROUNDED, 8, budgets), abs=1e-3)


def test_parabolas_through_training_curves():
    N, D, L = grid(ROUNDED, sizes=20, tokens=60, N=(7e7, 1.6e10), ratios=(0.5, 2000))
    found = isoflop(N, D, L)
    assert found.law.a == pytest.approx(ROUNDED.a, abs=0.01)  # the sizes are not centred on the optimum
    assert all(len(n) >= 4 and n[-1] / n[0] <= 64 * (1 + 1e-9) for n, _ in found.valleys)
    assert isoflop(N, D, L, budgets=[1e20, 1e21]).budgets == pytest.approx([1e20, 1e21])


def test_minima_on_the_edge_are_left_out():
    N, D, L = grid(ROUNDED, sizes=6, tokens=60, N=(7e7, 1e9), ratios=(0.5, 2000))
    largest = ROUNDED.optimal(np.array([1e19, 1e20, 1e22]))[0]
    assert largest[1] < 1e9 < largest[2]
    assert isoflop(N, D, L, budgets=[1e19, 1e20, 1e22]).budgets == pytest.approx([1e19, 1e20])
    with pytest.raises(ValueError, match="0 budgets have a minimum"):
        isoflop(N, D, L, budgets=[1e22, 2e22])


def test_a_line_by_which_the_best_size_or_its_tokens_fall_with_compute_is_refused():
    assert power_law([1, 2, 3], [0.5, 1, 1.5]).a == pytest.approx(0.5)
    for slope, falls in ((2.543, r"D\*"), (-0.2, r"N\*")):
        with pytest.raises(ValueError, match=f"the points do not decide it: .* would let {falls} fall"):
            power_law([1, 2], [slope, 2 * slope])


def test_valleys_of_a_single_compute_have_no_exponent():
    N = np.geomspace(1e7, 1e9, 9)
    D = 1e19 / (6 * N)
    with pytest.raises(
        ValueError, match=r"all budgets are near 1e\+19 FLOPs: expected runs of other compute"
    ):
        isoflop(N, D, ROUNDED.loss(N, D))
