"""Planning: the papers' own numbers."""

import math
from pathlib import Path

import numpy as np
import pytest

from chinchilla import LAWS, Law
from engine import device
from scaling import hardware, plan
from scaling.hardware import DEVICES
from scaling.plan import REPEATED
from scaling.shapes import Shape, count_parameters, training_flops

ROOT = Path(__file__).parents[2]
BESIROGLU = LAWS["besiroglu"].law
# The exponents of an earlier version of Hoffmann et al., used by Sardana and Frankle, and by de Vries.
EARLIER = Law(E=1.69, A=406.4, B=410.7, alpha=0.336, beta=0.283)


@pytest.mark.parametrize("name", LAWS)
def test_budget_for_inverts_optimal(name):
    law = LAWS[name].law
    N, D = law.optimal(3.3e22)
    assert plan.budget_for(law, params=N) == pytest.approx(3.3e22, rel=1e-10)
    assert plan.budget_for(law, tokens=D) == pytest.approx(3.3e22, rel=1e-10)


@pytest.mark.parametrize("law", [BESIROGLU, LAWS["hoffmann3"].law])
def test_compute_for_inverts_the_best_loss(law):
    C = np.array([1e18, 5.76e23])
    assert plan.compute_for(law, law.loss(*law.optimal(C))) == pytest.approx(C, rel=1e-8)


@pytest.mark.parametrize(
    "size, earlier, besiroglu",  # per cent
    [(0.3, 105.6, 161.3), (0.5, 20.8, 25.9), (0.75, 2.8, 3.4), (1.5, 4.6, 5.3), (2, 13.1, 14.8)],
)
def test_what_other_sizes_cost_for_the_same_loss(size, earlier, besiroglu):
    for law, percent in ((EARLIER, earlier), (BESIROGLU, besiroglu)):
        for C in (1e20, 1e24):  # the share does not depend on the budget
            N, D, extra = plan.same_loss(law, C, size)
            assert 100 * extra == pytest.approx(percent, abs=0.05)
            assert law.loss(N, D) == pytest.approx(law.loss(*law.optimal(C)), rel=1e-12)


def test_too_small_a_model_never_gets_there():
    _, tokens, extra = plan.same_loss(BESIROGLU, 1e22, 0.1)
    assert tokens == math.inf and extra == math.inf


@pytest.mark.parametrize(
    "quality, served, N, times_D, saving",
    [
        (13e9, 2e12, 6.969e9, 2.165, 0.1745),
        (30e9, 1e13, 13.613e9, 2.845, 0.2798),
        (70e9, 2e12, 57.9e9, None, 0.0131),
    ],
)
def test_examples_of_sardana_and_frankle(quality, served, N, times_D, saving):
    """They print 7B, 2.1 times the data, 17 %; 13.6B, 2.84, 28 %; and 1.3 %."""
    C = float(plan.budget_for(EARLIER, params=quality))
    D0 = EARLIER.optimal(C)[1]
    got_N, got_D, got_saving = plan.inference_optimal(EARLIER, C, served)
    assert got_N == pytest.approx(N, rel=1e-3)
    assert got_saving == pytest.approx(saving, abs=6e-5)
    if times_D:
        assert got_D / D0 == pytest.approx(times_D, rel=1e-3)
    assert EARLIER.loss(got_N, got_D) == pytest.approx(EARLIER.loss(quality, D0), rel=1e-10)


def test_the_model_to_be_served_that_fits_in_the_budget_is_the_cheapest_of_its_loss():
    for budget, served in ((1e22, 2e12), (1.0, 1e20), (1e24, 1.0)):
        N, D = plan.inference_optimal_within(BESIROGLU, budget, served)
        compute = 6 * N * D
        # The total is flat near its minimum, so few digits are exact where serving outweighs training.
        assert budget * (1 - 1e-4) < compute <= budget * (1 + 1e-9)
        loss = BESIROGLU.loss(N, D)
        for other in (0.9 * N, 1.1 * N):
            tokens = BESIROGLU.tokens_for(other, loss)
            assert other * (6 * tokens + 2 * served) > N * (6 * D + 2 * served)


def test_what_is_hardly_served_is_trained_as_if_it_were_not():
    *best, saving = plan.inference_optimal(BESIROGLU, 1e22, 1.0)
    # The total is flat near its minimum, so half of float64's digits agree.
    assert best == pytest.approx(list(BESIROGLU.optimal(1e22)), rel=1e-5) and abs(saving) < 1e-9


def test_effective_multiples_of_muennighoff():
    """Repeated data are worth at most 16.388 times the unique data; 4 epochs nearly as much as new data."""
    epochs = np.array([1, 2, 4, 8, 16, 40, 100, 1e6])
    expected = [1, 1.9682, 3.7257, 6.6241, 10.5825, 15.1675, 16.3630, 16.3878]
    assert plan.effective(epochs * 1e9, 1e9, REPEATED.R_D) / 1e9 == pytest.approx(expected, abs=6e-5)


def test_muennighoffs_law_has_20_tokens_per_parameter_at_every_budget():
    for C in (1e19, 1e25):
        params, tokens = REPEATED.law.optimal(C)
        assert tokens / params == pytest.approx(19.61, abs=0.005)


def test_muennighoffs_example_of_25_billion_unique_tokens():
    params, tokens = REPEATED.optimal(9.3e21, 25e9)
    assert params == pytest.approx(6.815e9, rel=1e-3)
    assert tokens == pytest.approx(227.4e9, rel=1e-3)
    assert REPEATED.law.optimal(9.3e21)[0] == pytest.approx(8.89e9, rel=1e-3)


def test_the_optimum_of_repeated_data_is_the_best_of_a_fine_grid():
    C, unique = 9.3e21, 25e9
    N = np.geomspace(1e8, 1e13, 20_001)
    losses = REPEATED.loss(N, C / (6 * N), unique)
    best = REPEATED.optimal(C, unique)
    assert REPEATED.loss(*best, unique) <= losses.min()
    assert best[0] == pytest.approx(N[losses.argmin()], rel=1e-3)


def test_more_unique_tokens_than_are_seen_change_nothing():
    """If all unique tokens counted, the optimum would be at 2e11 parameters."""
    for unique in (1e12, 1e15):
        best = REPEATED.optimal(9.3e21, unique)
        assert best == pytest.approx(REPEATED.law.optimal(9.3e21), rel=1e-5)
    assert REPEATED.loss(1e9, 1e10, 1e12) == REPEATED.loss(1e9, 1e10, 1e10)


@pytest.mark.parametrize("hours, tonnes", [(184_320, 31.22), (368_640, 62.44), (1_720_320, 291.42)])
def test_emissions_of_llama_2(hours, tonnes):
    """Touvron et al. 2023, table 2, and its 400 W. Twice the 7B model's is 62.448: the table truncates it."""
    assert hardware.energy(hours, 400) * hardware.CO2 / 1000 == pytest.approx(tonnes, abs=0.01)


def test_a_day_of_a_v100_is_7_2_kwh_times_the_pue():
    assert hardware.energy(24, DEVICES["v100"].watts) == pytest.approx(7.2 * hardware.PUE)


def test_the_default_mfu_is_that_of_llama_2():
    for N, hours in ((6.738e9, 184_320), (13.016e9, 368_640), (68.977e9, 1_720_320)):
        at_peak = hardware.gpu_hours(6 * N * 2e12, DEVICES["a100"], mfu=1)
        assert at_peak / hours == pytest.approx(hardware.DEFAULT_MFU, abs=0.03)


def test_devices_have_the_peaks_that_train_has():
    names = {
        "a100": "NVIDIA A100-SXM4-80GB", "l40s": "NVIDIA L40S", "rtx4090": "NVIDIA GeForce RTX 4090",
        "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200",
        "mi300x": "AMD Instinct MI300X",
    }  # fmt: skip
    for name, in_train in names.items():
        assert DEVICES[name].peak == device.PEAK_FLOPS[in_train]
    assert DEVICES.keys() - names.keys() == {"v100"}  # which has no bf16


def test_cost_is_the_sum_of_what_was_asked():
    row = hardware.hardware_cost(1e22, DEVICES["h100"], gpus=8, mfu=0.5, price=2.0)
    hours = 1e22 / (989e12 * 0.5 * 3600)
    assert row["gpu_hours"] == pytest.approx(hours)
    assert row["days"] == pytest.approx(hours / 8 / 24)
    assert row["dollars"] == pytest.approx(2 * hours)
    assert row["kwh"] == pytest.approx(hours * 0.7 * 1.1)
    assert hardware.hardware_cost(1e22, DEVICES["v100"], 8, 0.5, None)["dollars"] is None


def test_the_interval_holds_the_law_and_grows_with_extrapolation():
    near, far = plan.bootstrap_interval(1e21), plan.bootstrap_interval(1e25)
    for C, ends in ((1e21, near), (1e25, far)):
        N, D = BESIROGLU.optimal(C)
        truth = {"N": N, "D": D, "tokens_per_parameter": D / N, "loss": BESIROGLU.loss(N, D)}
        for name, value in truth.items():
            assert ends[name][0] < value < ends[name][1], name
    assert far["N"][1] / far["N"][0] > near["N"][1] / near["N"][0]
    assert near == plan.bootstrap_interval(1e21) != plan.bootstrap_interval(1e21, seed=1)


def test_a_plan_agrees_with_its_laws():
    made = plan.make_plan(5.76e23)
    assert made["laws"].keys() == LAWS.keys()
    # Four digits: those printed by Besiroglu et al.'s coefficients and the unrounded ones of Hoffmann et al.
    assert made["laws"]["besiroglu"]["N"] == pytest.approx(72.25e9, rel=1e-3)
    assert made["laws"]["hoffmann3"]["N"] == pytest.approx(40.36e9, rel=1e-3)
    for row in made["laws"].values():
        assert 6 * row["N"] * row["D"] == pytest.approx(5.76e23)
        assert row["title"] and row["source"]
    assert made["laws"]["hoffmann1"]["loss"] is None
    kaplan = made["laws"]["kaplan"]
    assert kaplan["loss"] == pytest.approx(LAWS["kaplan"].law.loss(kaplan["N"], kaplan["D"]))
    half = next(row for row in made["same_loss"] if row["size"] == 0.5)
    assert half["N"] == pytest.approx(made["laws"]["besiroglu"]["N"] / 2)
    assert made["same_loss"][0]["D"] is None  # an eighth cannot reach it


def test_a_plan_warns_of_what_is_beyond_the_data():
    assert plan.make_plan(1e21)["warnings"] == []
    (warning,) = plan.make_plan(1.3e25)["warnings"]
    assert "3.0 orders of magnitude above" in warning and "besiroglu" in warning
    (warning,) = plan.make_plan(1.4e16)["warnings"]
    assert "2.0 orders of magnitude below" in warning
    (warning,) = plan.make_plan(6 * 1e8 * 1e12, run=(1e8, 1e12))["warnings"]
    assert "10k tokens per parameter" in warning
    (warning,) = plan.make_plan(1e21, unique_tokens=1e8)["warnings"]
    assert "epochs" in warning and "plateau" in warning
    assert plan.make_plan(1e22, unique_tokens=25e9)["warnings"] == []  # 0.03 orders above their largest run
    (warning,) = plan.make_plan(1.2e22, unique_tokens=25e9)["warnings"]
    assert "repeated data is extrapolated" in warning and "0.1 orders of magnitude above" in warning
    (warning,) = plan.make_plan(1e20, "kaplan")["warnings"]
    assert "kaplan is held here as an allocation alone" in warning


def test_nearly_within_the_data_is_within():
    """0.04 orders of magnitude would be printed as 0.0."""
    made = plan.make_plan(1.3e22 * 10**0.04)
    assert made["laws"]["besiroglu"]["beyond"] == 0 and made["warnings"] == []
    assert plan.make_plan(1.3e22 * 10**0.06)["laws"]["besiroglu"]["beyond"] == pytest.approx(0.06)


def test_beyond_40_epochs_much_less_compute_is_nearly_as_good():
    loss = [REPEATED.loss(*REPEATED.optimal(C, 1e8), 1e8) for C in (1e21, 1e20)]
    assert loss[1] / loss[0] < 1.01


def test_a_run_is_compared_with_the_best_of_its_budget():
    made = plan.make_plan(6 * 7e9 * 2e12, run=(7e9, 2e12))
    run = made["run"]
    assert (
        run["loss"] == pytest.approx(BESIROGLU.loss(7e9, 2e12))
        and run["loss"] > made["laws"]["besiroglu"]["loss"]
    )
    assert run["optimal_compute"] < made["compute"]
    # The transformer has the run's size and tokens, not those of the optimum.
    flops = made["flops"]
    assert flops["N"] == pytest.approx(7e9, rel=0.02) and flops["D"] == 2e12
    assert flops["6ND"] == 6 * flops["N"] * 2e12
    shape = Shape(**flops["shape"])
    assert flops["exact"] == pytest.approx(training_flops(shape) / 2048 * 2e12)
    bare = 6 * count_parameters(shape, relative=False) * 2e12
    assert flops["without_relative"] == pytest.approx(flops["exact"] / bare - 1)


@pytest.mark.parametrize("C", [0, -1e22, math.nan, math.inf])
def test_a_budget_that_is_none_is_refused(C):
    with pytest.raises(ValueError, match="expected 1 to"):
        plan.make_plan(C)
