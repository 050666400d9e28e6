"""What points leave open, case by case."""

import numpy as np
import pytest
from test_chinchilla import grid

from chinchilla import LAWS, Law, fit
from scaling import identified

LAW = LAWS["besiroglu"].law
FOUND = {"undetermined": [], "C": [1e18, 1e22], "D/N": [0.5, 300.0], "loss": [2.1, 3.4]}
ROW = {"C": 1e23, "N": [3e10, 2e10, 4e10], "D": [5e11] * 3, "D/N": [18.0] * 3, "loss": [2.0] * 3}


def reasons(N, D, L):
    fitted = fit(N, D, L)
    return identified.reasons_against_law(fitted, Law(*fitted.bootstrap(50).T))


def test_a_good_design_determines_the_law():
    assert reasons(*grid(LAW, noise=0.005)) == []


def test_a_law_that_points_leave_open_has_its_reasons():
    N = np.geomspace(1e7, 1e10, 12)
    assert "D follows from N" in reasons(N, 20 * N, LAW.loss(N, 20 * N))[0]
    assert reasons(*grid(LAW, sizes=2, noise=0.001))[0].startswith("there are only 2 sizes")
    N, D, _ = grid(LAW)
    of_data_alone = reasons(N, D, 1.5 + 2000 / D**0.37)
    assert any(reason.startswith("A ") and "on the border" in reason for reason in of_data_alone), (
        of_data_alone
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"C": 1.1e25}, "3.0 orders of magnitude above the points, more than 1,000 times beyond them"),
        ({"C": 0.9e15}, "3.0 orders of magnitude below the points"),
        ({"N": [3e10, 1e9, 2e11]}, "the 95 % interval of N* is 1B to 200B"),
        ({"D/N": [4e4] * 3}, "it would have 40k tokens per parameter, where the points have 0.5 to 300"),
        ({"D/N": [0.004] * 3}, "it would have 0.004 tokens per parameter"),
        ({"loss": [1.04] * 3}, "its loss would be 1.04, where the least measured is 2.1"),
    ],
)
def test_an_optimum_outside_any_sense_has_a_reason_in_its_place(changed, reason):
    found = identified.reason_against_optimum(ROW | changed, FOUND)
    assert found is None if reason is None else found.startswith(reason)


def test_an_undetermined_law_has_no_optimum():
    found = identified.reason_against_optimum(ROW, FOUND | {"undetermined": ["D follows from N"]})
    assert found == "the points do not determine the law"
